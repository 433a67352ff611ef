"""What a run costs, before a machine is rented, from the output of the compiler.

- `analyse(text, mesh_shape) -> HloReport`: operations, memory traffic, collectives by mesh axis and arrays of a
  compiled program, loops counted as often as they run;
- `roofline(report, hardware, mesh_shape, coordinates) -> Roofline`: the least seconds a step can take, communication
  overlapped and not, and `mfu_bound` of such a time;
- `parse_module(text) -> Module`: the text as instructions, for other analyses.

Other modules work on runs: `topology.find_target` describes devices that are not present, `check.check` and
`check.check_decoding` compile a run's programs for them, `search.search` ranks layouts, and `estimate` computes memory
by formula.
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
