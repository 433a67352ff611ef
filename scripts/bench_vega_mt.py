#!/usr/bin/env python3
"""Measures what each stage of Vega-MT adds on Multi30k, and draws it.

  taskset -c 0 scripts/bench_vega_mt.py --output_dir=study --json_out=study.json --figure_out=vega_mt_stages.png

Runs the pipeline of vega_mt_arms.gin, whose head says what is compared with what, in some three hours of a
core. The same command goes on where it was stopped, and only tells what was found where all has finished. Until then,
`t5x_ext pipeline --stages=...` with the same files takes some of the arms to another core.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from absl import flags
from launch_common import run_script

from t5x_ext.cli.flags import require

ARMS = Path(__file__).resolve().with_name("vega_mt_arms.gin")
QUICK = ARMS.with_name("vega_mt_quick.gin")


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of the script."""
    flags.DEFINE_string("output_dir", None, "folder of the pipeline; required", flag_values=values)
    flags.DEFINE_string("data_dir", "../shared/data/multi30k", "folder with train, val and test_2016_flickr in en, de "
                        "and cs", flag_values=values)  # fmt: skip
    flags.DEFINE_string("gin_file", str(ARMS), "the pipeline: another one includes this one and has other stages",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("quick", False, "two updates an arm: shows that everything runs, measures nothing",
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("json_out", None, "file for the figures as JSON", flag_values=values)
    flags.DEFINE_string("figure_out", None, "PNG file for the picture", flag_values=values)


def main(values: flags.FlagValues) -> int:
    """Runs what has not run yet, prints the tables, and writes JSON and picture."""
    require(values, "output_dir")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    done = subprocess.run(pipeline_command(values), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        return done.returncode
    import vega_mt_study

    output_dir = Path(values.output_dir)
    tables = {name: vega_mt_study.rows_of(output_dir, name) for name in vega_mt_study.TABLES}
    for name, rows in tables.items():
        print(f"\n{name}\n", *vega_mt_study.markdown(rows), sep="\n")
    if values.json_out:
        versions = {"python": sys.version.split()[0], "jax": importlib.metadata.version("jax")}
        found = {"versions": versions, "seconds": vega_mt_study.seconds_of(output_dir), **tables}
        Path(values.json_out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if values.figure_out:
        vega_mt_study.draw(tables, Path(values.figure_out))
    return 0


def pipeline_command(values: flags.FlagValues) -> list[str]:
    """The command that runs the study, or goes on with it."""
    files = [values.gin_file, *([QUICK] if values.quick else [])]
    return [
        *(sys.executable, "-m", "t5x_ext", "pipeline", *(f"--gin_file={file}" for file in files)),
        *(f"--gin.DATA_DIR={values.data_dir!r}", f"--output_dir={values.output_dir}"),
    ]


if __name__ == "__main__":
    sys.exit(run_script(define_flags, main, "bench_vega_mt.py", __doc__ or "", sys.argv[1:]))
