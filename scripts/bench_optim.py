#!/usr/bin/env python3
"""Measures what the optimizers cost: time of a step and memory. What they reach: gin/studies/optim_multi30k.gin.

  taskset -c 2,3 scripts/bench_optim.py --json_out=optim.json --figure_out=docs/figures

Nothing needs more than a CPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from launch_common import run_script

PARTS = ("cost", "memory")


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of the script."""
    flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "what to measure", flag_values=values)
    flags.DEFINE_boolean("quick", False, "tiny sizes: shows that everything runs, measures nothing", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the figures as JSON; parts that it holds and that are not measured "
                        "now stay", flag_values=values)  # fmt: skip
    flags.DEFINE_string("figure_out", None, "folder for the pictures", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Measures the parts, prints their tables, and writes JSON and pictures."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("t5x_ext").setLevel(logging.WARNING)
    import optim_cost

    sizes = optim_cost.QUICK_SIZES if values.quick else optim_cost.SIZES
    json_out = Path(values.json_out) if values.json_out else None
    figures = json.loads(json_out.read_text(encoding="utf-8")) if json_out and json_out.exists() else {}
    for part in values.part:
        machine = _machine()
        figures[part] = {"machine": machine, **getattr(optim_cost, part)(sizes)}
        machine["load_average"] = [machine["load_average"], round(os.getloadavg()[0], 1)]
        print_table(part, figures[part])
        if json_out:
            json_out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if values.figure_out:
        optim_cost.draw(figures, Path(values.figure_out))
    return 0


def print_table(part: str, found: dict[str, Any]) -> None:
    """The lines of a part as a Markdown table; columns are the keys of its first line."""
    from tabulate import tabulate

    rows = [[_short(value) for value in line.values()] for line in found["lines"]]
    table = tabulate(rows, list(found["lines"][0]), tablefmt="github", disable_numparse=True)
    print(f"\n{part}, on {found['machine']}\n\n{table}", flush=True)


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        "jax": importlib.metadata.version("jax"),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(run_script(define_flags, main, "bench_optim.py", __doc__ or "", sys.argv[1:]))
