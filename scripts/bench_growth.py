#!/usr/bin/env python3
"""Measures how the costs of training grow: compile time and memory with depth, step time with the batch, start-up.

  taskset -c 0,1 scripts/bench_growth.py --json_out=growth.json --figure_out=docs/figures/cost_growth.png

Nothing but a CPU is needed. With libtpu (`pip install 't5x_ext[tpu]'`) the compiler of `--topology` is measured too,
and tells the memory of a device; `--topology=` leaves it out. Every time is the least of `--repeats`, since whatever
else a machine does only adds to it; the operations of a compiled program are counted too and depend on no machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags
from shaped_runs import full_batch, shaped_run

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from t5x_ext.train import Run

PARTS = ("compilation", "memory", "steps", "startup")
REMAT = ("none", "dots_saveable", "dots_with_no_batch_dims_saveable", "full")

_UPDATES = 4
"""Updates a repeat: they are short."""

_PARTS = flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "what to measure")
_DEPTHS = flags.DEFINE_list("depths", "6,12,24,48,96", "layers of the encoder, and as many of the decoder")
_UNROLLED = flags.DEFINE_list("unrolled_depths", "6,12,24,48", "depths to compile unrolled, too")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU slice to compile for; empty for none")
_GIN_FILE = flags.DEFINE_string("gin_file", "runs/quickstart.gin", "run whose start-up is measured")
_REPEATS = flags.DEFINE_integer("repeats", 3, "how often a time is taken", lower_bound=1)
_QUICK = flags.DEFINE_boolean("quick", False, "tiny sizes, once: shows that everything runs, measures nothing")
_JSON_OUT = flags.DEFINE_string(
    "json_out", None, "file for the figures as JSON; parts that it holds and that are not measured now stay"
)
_FIGURE_OUT = flags.DEFINE_string("figure_out", None, "PNG file for the picture")


class Sizes(NamedTuple):
    """Sizes of everything that is measured."""

    depths: tuple[int, ...]
    unrolled_depths: tuple[int, ...]
    repeats: int
    embed_dim: int
    compiled_batch: tuple[int, int]  # rows, length of a row
    memory_batch: tuple[int, int]  # of the whole slice
    step_depth: int
    step_rows: tuple[int, ...]
    step_length: int  # of a row while rows grow
    step_lengths: tuple[int, ...]
    step_fixed_rows: int  # while lengths grow


class Compilation(NamedTuple):
    """What it took to compile a training step, and what came out."""

    trace_seconds: float  # Python and lowering
    compile_seconds: float
    traced_operations: int
    compiled_operations: int
    temporary_bytes: int  # of one device


def main(argv: Sequence[str]) -> None:
    """Measures the parts, prints them, and writes JSON and picture."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    # Only its compiler is asked of a TPU; the rest is measured on the CPU whatever else there is.
    os.environ["JAX_PLATFORMS"] = "cpu"
    sizes = _sizes()
    json_out = Path(_JSON_OUT.value) if _JSON_OUT.value else None
    figures = json.loads(json_out.read_text(encoding="utf-8")) if json_out and json_out.exists() else {}
    measures = {"compilation": _compilation, "memory": _memory, "steps": _steps, "startup": _startup}
    for part in _PARTS.value:
        machine, lines = _machine(), []
        for line in measures[part](sizes):
            lines.append(line)
            print(part, *(f"{name}={_short(value)}" for name, value in line.items()), flush=True)
        machine["load_average"] = [machine["load_average"], round(os.getloadavg()[0], 1)]
        figures[part] = {"machine": machine, "lines": lines}
        print(part, "on", machine)
        if json_out:
            json_out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if _FIGURE_OUT.value:
        draw(figures, Path(_FIGURE_OUT.value))


def _sizes() -> Sizes:
    if _QUICK.value:
        return Sizes((2, 4), (2, 4), 1, 32, (4, 16), (4, 16), 1, (2,), 16, (16,), 2)
    return Sizes(
        depths=tuple(map(int, _DEPTHS.value)),
        unrolled_depths=tuple(map(int, _UNROLLED.value)),
        repeats=_REPEATS.value,
        embed_dim=256,
        compiled_batch=(16, 64),
        memory_batch=(32, 256),
        step_depth=3,
        step_rows=(4, 8, 16, 32, 64),
        step_length=64,
        step_lengths=(32, 64, 128, 256, 512),
        step_fixed_rows=8,
    )


def _machine() -> dict[str, Any]:
    import jax

    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
    }


def _compilation(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Compile time against depth: scanned and unrolled on the CPU, scanned for the TPU."""
    import jax

    # The compilers' usual dtypes: a CPU emulates bfloat16.
    targets = {"cpu": (_mesh(jax.devices()[:1]), "float32")}
    cases = [("cpu", True, layers) for layers in sizes.depths]
    cases += [("cpu", False, layers) for layers in sizes.unrolled_depths]
    if _TOPOLOGY.value:
        targets[_TOPOLOGY.value] = _mesh(_tpu_devices()), "bfloat16"
        cases += [(_TOPOLOGY.value, True, layers) for layers in sizes.depths]

    def measure(case: tuple[str, bool, int]) -> Compilation:
        target, scan, layers = case
        mesh, dtype = targets[target]
        return _compile(_run(sizes, layers, sizes.compiled_batch, scan_layers=scan, compute_dtype=dtype), mesh)

    # In turn, so that a drifting machine favours no depth.
    rounds = [[measure(case) for case in cases] for _ in range(sizes.repeats)]
    for (target, scan, layers), *measured in zip(cases, *rounds):
        yield {"target": target, "scan_layers": scan, "layers": layers, **_least(measured)._asdict()}


def _memory(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Temporaries of one TPU device against depth, by what the backward pass recomputes."""
    if not _TOPOLOGY.value:
        return
    mesh = _mesh(_tpu_devices())
    for remat in REMAT:
        for layers in sizes.depths:
            run = _run(sizes, layers, sizes.memory_batch, scan_layers=True, compute_dtype="bfloat16", remat=remat)
            yield {"remat": remat, "layers": layers, "temporary_bytes": _compile(run, mesh).temporary_bytes}


def _steps(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Seconds of an update on the CPU against rows, then against the length of a row; every place holds a token."""
    batches = [("rows", rows, sizes.step_length) for rows in sizes.step_rows]
    batches += [("length", sizes.step_fixed_rows, length) for length in sizes.step_lengths]
    trainings = [_training(_run(sizes, sizes.step_depth, batch)) for _, *batch in batches]
    # In turn, as above; the first round starts everything up.
    rounds = [[next(training) for training in trainings] for _ in range(1 + _UPDATES * sizes.repeats)]
    for (varied, rows, length), *seconds in zip(batches, *rounds[1:]):
        least = min(seconds)
        speed = rows * length / least
        yield {
            "varied": varied, "rows": rows, "length": length, "seconds": least, "target_tokens_per_second": speed,
        }  # fmt: skip


def _startup(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Seconds from the command to its first update: with nothing there yet, and going on with the same run."""
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(sizes.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for steps, kind in enumerate(starts, start=1):
                starts[kind].append(_start(folder, steps))
    for kind, measured in starts.items():
        yield {"start": kind, **min(measured, key=lambda seconds: seconds["first_update"])}


def _run(sizes: Sizes, layers: int, batch: Sequence[int], **model: Any) -> Run:
    from t5x_ext.models import TransformerConfig
    from t5x_ext.optim import adam, linear_decay

    config = TransformerConfig(
        vocab_size=4096,
        embed_dim=sizes.embed_dim,
        mlp_dim=4 * sizes.embed_dim,
        num_heads=4,
        encoder_layers=layers,
        decoder_layers=layers,
        **model,
    )
    rows, length = batch
    return shaped_run(config, rows, length, adam(linear_decay(peak=1e-3, warmup_steps=10, total_steps=100)))


def _mesh(devices: Sequence[Any]) -> Mesh:
    from t5x_ext.parallel import MeshConfig, make_mesh

    return make_mesh(MeshConfig(), devices)


def _tpu_devices() -> Sequence[Any]:
    from t5x_ext.plan.topology import tpu_devices

    return tpu_devices(_TOPOLOGY.value)


def _compile(run: Run, mesh: Mesh) -> Compilation:
    from t5x_ext.train.program import make_program

    start = time.perf_counter()
    lowered = make_program(run, {"vocab_size": run.task.model.vocab_size}, mesh).lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Compilation(
        trace_seconds=traced - start,
        compile_seconds=end - traced,
        traced_operations=_operations(lowered.as_text()),
        compiled_operations=_operations(compiled.as_text()),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def _least(measured: Sequence[Compilation]) -> Compilation:
    first = measured[0]
    return first._replace(
        trace_seconds=min(each.trace_seconds for each in measured),
        compile_seconds=min(each.compile_seconds for each in measured),
    )


def _operations(text: str) -> int:
    """Operations in the text of a program, in StableHLO or HLO: both write `name = operation`, one a line."""
    return len(re.findall(r"^\s*(?:ROOT )?%\S+ = ", text, re.MULTILINE))


def _training(run: Run) -> Iterator[float]:
    """Seconds of one update after another."""
    import jax

    from t5x_ext.models import init_params
    from t5x_ext.train.program import make_program
    from t5x_ext.train.state import create_state

    program = make_program(run, {"vocab_size": run.task.model.vocab_size}, _mesh(jax.devices()[:1]))
    step, batch = program.compile(), full_batch(program.batch, run.task.model.vocab_size)
    state = create_state(init_params(program.model.config, jax.random.key(0)), run.optimizer, with_ema=False)
    while True:
        start = time.perf_counter()
        state, metrics = step(state, {}, batch)
        jax.block_until_ready((state, metrics))
        yield time.perf_counter() - start


def _start(folder: str, steps: int) -> dict[str, Any]:
    """Starts the run, up to this many updates in all, and splits the time to its first line of log.

    Returns:
      Wall seconds: `first_update` up to that line, of which `compile` to compile the step and `before` until then;
      `process` to its end. `cache` is what JAX's cache had of the step.
    """
    command = [
        *(sys.executable, "-m", "t5x_ext", "train", f"--gin_file={_GIN_FILE.value}", f"--run_dir={folder}/run"),
        # Not --steps: the learning rate follows that, and other rates are another run.
        *(f"--compile_cache_dir={folder}/programs", f"--gin.Run.steps={steps}", "--gin.Run.log_every=1"),
        *("--gin.DataConfig.valid=()", "--gin.DataConfig.test=()"),
    ]
    start = time.perf_counter()
    seconds: dict[str, Any] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            now = time.perf_counter() - start
            compiled = re.match(r"training step compiled in ([\d.]+) s \(cache: (.*)\)", line)
            if compiled:
                seconds |= {"before": now - float(compiled[1]), "compile": float(compiled[1]), "cache": compiled[2]}
            if line.startswith("step ") and "first_update" not in seconds:
                seconds["first_update"] = now
    if process.returncode or len(seconds) < 4:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}")
    return seconds | {"process": time.perf_counter() - start}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(figures: dict[str, Any], path: Path) -> None:
    """One panel a part.

    Args:
      figures: what `main` measured.
      path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.2), layout="constrained")
    panels = dict(zip(PARTS, figure.subplots(2, 2).flat))
    drawings = {
        "compilation": _draw_compilation, "memory": _draw_memory, "steps": _draw_steps, "startup": _draw_startup,
    }  # fmt: skip
    for part, axes in panels.items():
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if figures.get(part, {}).get("lines"):
            drawings[part](axes, figures[part]["lines"])
        else:
            axes.set_axis_off()
    figure.savefig(path, dpi=100)


def _draw_compilation(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    series: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for line in lines:
        seconds = line["trace_seconds"] + line["compile_seconds"]
        series.setdefault((line["target"], line["scan_layers"]), []).append((line["layers"], seconds))
    for (target, scan), points in series.items():
        label = f"{'CPU' if target == 'cpu' else 'TPU ' + target}, {'scanned' if scan else 'unrolled'}"
        axes.plot(*zip(*points), "o-", label=label, linewidth=1.5, markersize=4)
    _depth_axis(axes, lines)
    axes.set_yscale("log")
    axes.set_ylabel("trace and compile the step, s")
    _plain_logarithms(axes.yaxis)
    axes.set_title("Compile time is flat in depth when scanned", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9)


def _draw_memory(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    labels = {"dots_with_no_batch_dims_saveable": "dots_with_no_batch_dims_\nsaveable"}
    for remat in REMAT:
        points = [(line["layers"], line["temporary_bytes"] / 2**30) for line in lines if line["remat"] == remat]
        axes.plot(*zip(*points), "o-", label=labels.get(remat, remat), linewidth=1.5, markersize=4)
    axes.set_xticks(sorted({line["layers"] for line in lines}))
    axes.set_xlabel("layers of each stack")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("temporaries of a TPU device, GiB")
    axes.set_title("Memory grows with what the backward pass keeps", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, title="remat", alignment="left")


def _draw_steps(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    for varied in ("rows", "length"):
        chosen = [line for line in lines if line["varied"] == varied]
        first, last = chosen[0], chosen[-1]
        label = (
            f"rows {first['rows']} to {last['rows']}, length {last['length']}"
            if varied == "rows"
            else f"length {first['length']} to {last['length']}, rows {last['rows']}"
        )
        tokens = [line["rows"] * line["length"] for line in chosen]
        axes.plot(tokens, [line["seconds"] for line in chosen], "o-", label=label, linewidth=1.5, markersize=4)
        axes.annotate(
            f"{last['target_tokens_per_second']:,.0f} tokens/s",
            (tokens[-1], last["seconds"]),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(right=2.6 * max(line["rows"] * line["length"] for line in lines))  # room for the speeds
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _plain_logarithms(axes.yaxis)
    axes.set_xlabel("target tokens of a batch")
    axes.set_ylabel("an update, s")
    axes.set_title("Step time follows the tokens; long rows cost more", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9)


def _draw_startup(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    names = {"cold": "cold: empty folder", "warm": "warm: the run goes on"}
    for row, line in enumerate(lines):
        parts = {
            "Python, data, weights": line["before"],
            "compile the step": line["compile"],
            "first update": line["first_update"] - line["before"] - line["compile"],
        }
        left = 0.0
        for number, (label, seconds) in enumerate(parts.items()):
            axes.barh(row, seconds, 0.5, left=left, color=f"C{number}", label=label if row == 0 else None)
            left += seconds
        axes.text(left, row, f"  {left:.1f} s", va="center", fontsize=9)
        axes.text(0, row - 0.31, names[line["start"]], va="bottom", fontsize=9)
    axes.set_ylim(len(lines) - 0.2, -0.7)
    axes.set_yticks([])
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds from the command to the first update")
    axes.set_title("Start-up of vega_tiny", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", handlelength=1, columnspacing=1)


def _plain_logarithms(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _depth_axis(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted({line["layers"] for line in lines}), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("layers of each stack")


if __name__ == "__main__":
    app.run(main)
