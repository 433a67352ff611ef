"""What a run costs before anything is booked, read from the compiler's own text.

- `analyse(text, mesh_shape) -> HloReport`: operations, memory traffic, collectives by mesh axis and arrays of a
  compiled program, loops counted as often as they run;
- `roofline(report, hardware, mesh_shape, coordinates) -> Roofline`: the least seconds a step can take, communication
  overlapped and not, and `mfu_bound` of such a time;
- `parse_module(text) -> Module`: the text as instructions, for questions nobody asked yet.

In modules of their own, because they know of runs: `topology.find_target`, devices that are not here; `check.check` and
`check.check_decoding`, a run's programs compiled for them; `search.search`, layouts ranked; `estimate`, memory by
formula.
"""

from t5x_ext.plan.hlo import Module, parse_module
from t5x_ext.plan.hlo_cost import Buffer, Collective, CollectiveOp, HloReport, analyse
from t5x_ext.plan.roofline import Roofline, mfu_bound, roofline

__all__ = [
    "Buffer",
    "Collective",
    "CollectiveOp",
    "HloReport",
    "Module",
    "Roofline",
    "analyse",
    "mfu_bound",
    "parse_module",
    "roofline",
]
