#!/usr/bin/env python3
"""Compares the optimizers on real text: quality, sharpness, time of a step and memory.

  taskset -c 2,3 scripts/bench_optim.py --json_out=optim.json --figure_out=docs/figures

Quality needs SST-2 sentences and Multi30k in `--data_dir`, and some two hours of a core; nothing needs more than a CPU.
Every core that may be used trains one arm at a time, with one thread.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from launch_common import run_script

PARTS = ("sst2", "multi30k", "sharpness", "cost", "memory")


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of the script."""
    flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "what to measure", flag_values=values)
    flags.DEFINE_list("arms", [], "names of the arms whose quality is measured; none: all", flag_values=values)
    flags.DEFINE_string("data_dir", "../shared/data", "folder with glue/SST-2-sentences and multi30k",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("quick", False, "tiny sizes, made-up text: shows that everything runs, measures nothing",
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("json_out", None, "file for the figures as JSON; parts that it holds and that are not measured "
                        "now stay", flag_values=values)  # fmt: skip
    flags.DEFINE_string("figure_out", None, "folder for the pictures", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Measures the parts, prints their tables, and writes JSON and pictures."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("t5x_ext").setLevel(logging.WARNING)
    json_out = Path(values.json_out) if values.json_out else None
    figures = json.loads(json_out.read_text(encoding="utf-8")) if json_out and json_out.exists() else {}
    for part in values.part:
        machine = _machine()
        figures[part] = {"machine": machine, **_measure(values, part, figures)}
        machine["load_average"] = [machine["load_average"], round(os.getloadavg()[0], 1)]
        print_table(part, figures[part])
        if json_out:
            json_out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if values.figure_out:
        draw(figures, Path(values.figure_out))
    return 0


def _measure(values: flags.FlagValues, part: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a part found: JSON that at least holds `lines`, one a row of its table."""
    if part in ("cost", "memory"):
        import optim_cost

        sizes = optim_cost.QUICK_SIZES if values.quick else optim_cost.SIZES
        return getattr(optim_cost, part)(sizes)
    import optim_arms
    import optim_quality

    arms = [optim_arms.by_name(name) for name in values.arms] or optim_arms.ARMS
    with tempfile.TemporaryDirectory() as folder:
        if not values.quick:
            return optim_quality.measure(part, optim_quality.SIZES, arms, Path(values.data_dir), figures)
        optim_quality.made_up_data(Path(folder))
        return optim_quality.measure(part, optim_quality.QUICK_SIZES, arms, Path(folder), figures)


def print_table(part: str, found: dict[str, Any]) -> None:
    """The lines of a part as a Markdown table; columns are the keys of its first line."""
    lines = found["lines"]
    print(f"\n{part}, on {found['machine']}\n")
    print("| " + " | ".join(lines[0]) + " |")
    print("|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(map(_short, line.values())) + " |", flush=True)


def draw(figures: dict[str, Any], folder: Path) -> None:
    """The pictures of the parts that were measured."""
    if "cost" in figures or "memory" in figures:
        import optim_cost

        optim_cost.draw(figures, folder)
    import optim_pictures

    optim_pictures.draw(figures, folder)


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
