#!/usr/bin/env python3
"""Trains all parameters of a large model on one accelerator, with Flora and with Adam: memory, largest batch, speed.

  scripts/bench_one_card.py --json_out=one_card.json
  scripts/bench_one_card.py --dry_run                        needs no accelerator: shapes, and temporaries by formula
  scripts/bench_one_card.py --dry_run --topology=v5p:1x1x1   likewise, with memory as the TPU compiler allocates it

For each optimizer the largest batch is searched that fits into `--memory_gb`, all of it in one microbatch: that one
decides what a step needs, more of them cost time only. Then both are timed with the same batch, the largest that both
can take, and each with its own largest. Every trial is a process of its own, which may run out of memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from launch_common import run_script
from shaped_runs import full_batch

if TYPE_CHECKING:
    import jax

    from t5x_ext.train import Run
    from t5x_ext.train.program import Program
    from t5x_ext.train.state import TrainState

ARMS = {"flora": [], "adam": ["optim/adam.gin"]}
"""What is laid over the run, which itself has Flora."""

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "CUDA_ERROR_OUT_OF_MEMORY")

_QUICK_BINDINGS = (
    "MODEL=@presets.VegaTiny()",
    "VocabularyConfig.size=300",
    "BatchConfig.source_length=16",
    "BatchConfig.target_length=16",
)


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of the script."""
    flags.DEFINE_string("gin_file", "runs/vega_mt_4b7_h100_1.gin", "the run, with Flora; its texts need not be there",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_multi_string("gin", [], "one binding over those of the file, as --gin.Vega4B7.remat='none'",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "optimizers", flag_values=values)
    flags.DEFINE_float("memory_gb", 80, "memory that may be used, in 1e9 bytes; of a larger card a part",
                       flag_values=values)  # fmt: skip
    flags.DEFINE_integer("most_rows", 1024, "largest batch that is tried", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("updates", 50, "updates that are timed", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("dry_run", False, "compute what needs no accelerator", flag_values=values)
    flags.DEFINE_string("topology", "h100:1", "device of a dry run; a TPU's compiler is asked for its memory",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("quick", False, "a tiny model and rows: shows that everything runs, measures nothing",
                         flag_values=values)  # fmt: skip
    flags.DEFINE_string("json_out", None, "file for the figures as JSON", flag_values=values)
    flags.DEFINE_string("trial", None, "used by the script itself: arm,rows,updates to be run in this process",
                        flag_values=values)  # fmt: skip


def main(values: flags.FlagValues) -> int:
    """Searches, measures, prints every trial and writes JSON."""
    if values.trial:
        arm, rows, updates = values.trial.split(",")
        print(json.dumps(trial(values, arm, int(rows), int(updates))))
        return 0
    if values.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    lines: list[dict[str, Any]] = []

    def examine(arm: str, rows: int, updates: int) -> bool:
        found = _planned(values, arm, rows) if values.dry_run else _in_a_process(values, arm, rows, updates)
        lines.append({"arm": arm, "rows": rows, **found})
        print(_short(lines[-1]), flush=True)
        return found["fits"]

    most = min(2, values.most_rows) if values.quick else values.most_rows
    largest = {arm: largest_rows(lambda rows, arm=arm: examine(arm, rows, 1), most) for arm in values.arm}
    both = min((rows for rows in largest.values() if rows), default=0)
    for arm, own in largest.items():
        for rows in sorted({both, own}) if own and not values.dry_run else ():
            examine(arm, rows, 2 if values.quick else values.updates)
    print("largest batches in one microbatch:", *(f"{arm} {rows} rows" for arm, rows in largest.items()))
    if values.json_out:
        found = {"memory_gb": values.memory_gb, "largest_rows": largest, "lines": lines}
        Path(values.json_out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def largest_rows(fits: Callable[[int], bool], most: int) -> int:
    """The most rows that fit, to within an eighth: by doubling, then by halving the interval; 0 where not even one."""
    low, high, rows = 0, most + 1, 1
    while low < rows < high:
        if fits(rows):
            low, rows = rows, min(2 * rows, most)
        else:
            high = rows
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def trial(values: flags.FlagValues, arm: str, rows: int, updates: int) -> dict[str, Any]:
    """Trains in this process, and says whether memory sufficed."""
    import jax

    try:
        return {"fits": True, **_train(values, arm, rows, updates)}
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        return {"fits": False, "error": str(error).splitlines()[0]}


def _train(values: flags.FlagValues, arm: str, rows: int, updates: int) -> dict[str, Any]:
    """Compiles, begins, does one update that starts everything up, and times the others one by one."""
    import jax

    from t5x_ext.parallel import hardware_of
    from t5x_ext.plan.check import training_flops

    device = jax.devices()[0]
    program = _program(_run(values, arm, rows), [device])
    start = time.perf_counter()
    compiled: Any = program.compile()
    compile_seconds = time.perf_counter() - start
    state, batch = _first_state(program), full_batch(program.batch, program.model.config.vocab_size)
    peak_at_start = _peak_bytes(device)
    seconds = []
    for _ in range(1 + updates):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, {}, batch))
        seconds.append(time.perf_counter() - start)
        if not metrics.finite:
            raise RuntimeError(f"{arm}: the gradient of update {len(seconds)} is not finite")
    usual = statistics.median(seconds[1:])
    length = program.run.task.data.batch.target_length
    flops, _, target_tokens = training_flops(program.model.config, program.run, length)
    hardware = hardware_of(device.device_kind)
    memory = compiled.memory_analysis()
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "updates": updates,
        "peak_bytes": _peak_bytes(device),
        "peak_bytes_at_start": peak_at_start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "seconds": usual,
        "slowest_seconds": max(seconds[1:]),
        "target_tokens_per_second": target_tokens / usual,
        "mfu": flops / usual / hardware.peak_flops if hardware else None,
        "loss": float(metrics.loss.sum / metrics.loss.weight),
    }


def _in_a_process(values: flags.FlagValues, arm: str, rows: int, updates: int) -> dict[str, Any]:
    """`trial` in a process of its own: not every lack of memory is an exception."""
    run = [f"--gin_file={values.gin_file}", *(f"--gin={binding}" for binding in values.gin)]
    run += ["--quick"] if values.quick else []
    command = [sys.executable, __file__, f"--trial={arm},{rows},{updates}", *run]
    process = subprocess.run(command, env=_environment(values.memory_gb), capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    signs = [line for line in process.stderr.splitlines() if any(sign in line for sign in _OUT_OF_MEMORY)]
    if not signs:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr}")
    return {"fits": False, "error": signs[-1]}


def _environment(memory_gb: float) -> dict[str, str]:
    """That of a process which may use so much of an NVIDIA card; other devices are used whole."""
    # All at once and nothing more: what is left of a card would hide that memory did not suffice.
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        total = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20
    except (FileNotFoundError, subprocess.CalledProcessError):
        return environment
    return environment | {"XLA_CLIENT_MEM_FRACTION": str(min(0.97, memory_gb * 1e9 / total))}


def _planned(values: flags.FlagValues, arm: str, rows: int) -> dict[str, Any]:
    """The bytes of a step: of what is stored by shapes, of its temporaries as the compiler or a formula says."""
    from t5x_ext.plan.compiling import Compiled, compile_for
    from t5x_ext.plan.estimate import estimate_temporaries, stored_bytes
    from t5x_ext.plan.topology import find_target

    target = find_target(values.topology)
    program = _program(_run(values, arm, rows), target.devices)
    stored = stored_bytes(program)
    if target.is_compiled_for:
        compiled = compile_for(program.lower(), dict(program.mesh.shape))
        if not isinstance(compiled, Compiled):
            return {"fits": False, "total_bytes": compiled.total, "error": f"more than {target.name} has"}
        temporaries = compiled.arguments + compiled.others - stored.total
    else:
        temporaries = estimate_temporaries(program).total
    total = stored.total + temporaries
    return {
        "fits": total <= values.memory_gb * 1e9,
        "total_bytes": total,
        "params_bytes": stored.params,
        "optimizer_bytes": stored.optimizer,
        "temporary_bytes": temporaries,
    }


def _run(values: flags.FlagValues, arm: str, rows: int) -> Run:
    from t5x_ext.cli.flags import parse
    from t5x_ext.cli.run_flags import define_run_flags, run_from_flags

    bindings = [*values.gin, *(_QUICK_BINDINGS if values.quick else ()), f"BatchConfig.rows={rows}"]
    arguments = [f"--gin_file={name}" for name in (values.gin_file, *ARMS[arm])]
    arguments += [f"--gin.{binding}" for binding in (*bindings, "Run.num_microbatches=1")]
    return run_from_flags(parse(define_run_flags, arguments))[0]


def _program(run: Run, devices: Sequence[jax.Device]) -> Program:
    from t5x_ext.parallel import make_mesh
    from t5x_ext.train.program import make_program

    return make_program(run, {"vocab_size": run.task.data.vocabulary.size}, make_mesh(run.mesh, devices))


def _first_state(program: Program) -> TrainState:
    """Random weights first, then the rest: what drawing them takes for a moment is not held beside the optimizer."""
    from functools import partial

    import jax

    from t5x_ext.models import init_params
    from t5x_ext.train.state import create_state

    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.template)
    draw = jax.jit(partial(init_params, program.model.config), out_shardings=shardings.params)
    create = partial(create_state, optimizer=program.run.optimizer, with_ema=program.run.ema_decay is not None)
    begin = jax.jit(create, out_shardings=shardings, donate_argnums=0)
    return jax.block_until_ready(begin(draw(jax.random.key(program.run.seed))))


def _peak_bytes(device: jax.Device) -> int | None:
    """The most that arrays and programs have used so far; None where the device does not say, as a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def _short(line: dict[str, Any]) -> str:
    shown = {name: f"{value / 1e9:.2f} GB" for name, value in line.items() if name.endswith("bytes") and value}
    shown |= {name: f"{value:.4g}" for name, value in line.items() if isinstance(value, float)}
    return " ".join(f"{name}={value}" for name, value in (line | shown).items())


if __name__ == "__main__":
    sys.exit(run_script(define_flags, main, "bench_one_card.py", __doc__ or "", sys.argv[1:]))
