"""What optimizers cost: the time of an update relative to Adam's, and the bytes of their state; for bench_optim.py."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shaped_runs import full_batch, shaped_run

from t5x_ext import optim
from t5x_ext.contracts import Accumulator, PyTree
from t5x_ext.models import TransformerConfig, init_params, logical_axes
from t5x_ext.models.presets import Base, Vega4B7
from t5x_ext.parallel import make_mesh
from t5x_ext.plan.estimate import tree_bytes
from t5x_ext.train.program import make_program
from t5x_ext.train.state import create_state

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATE = 1e-6
"""So low that weights stay where they are however many updates are timed."""

_MICROBATCHES = 4
"""Of the arms that accumulate."""


class Sizes(NamedTuple):
    """Sizes of what is measured."""

    model: TransformerConfig  # trained here
    planned: TransformerConfig  # too large: of its state only the shapes are computed
    rows: int
    length: int  # tokens of a row on both sides
    rank: int
    rounds: int  # how often every update is timed


SIZES = Sizes(Base(), Vega4B7(), rows=32, length=128, rank=128, rounds=5)
QUICK_SIZES = Sizes(
    Base(vocab_size=64, embed_dim=32, mlp_dim=64, num_heads=2, encoder_layers=1, decoder_layers=1),
    Base(vocab_size=64, embed_dim=64, mlp_dim=128, num_heads=2, encoder_layers=2, decoder_layers=2),
    rows=4,
    length=8,
    rank=4,
    rounds=1,
)


class Arm(NamedTuple):
    """An optimizer whose cost is measured.

    Attributes:
      name: in tables and figures.
      make: from the axes of the parameters to the optimizer.
      bars: the arms it is compared with, and how many times as long as theirs its update may take.
      accumulate: from the axes of the parameters to how gradients of microbatches add up.
      num_microbatches: pieces of a batch.
      interval: of so many updates one does more than the others: a new mask, a new projection, new curvature.
      due: the count at which the state has that update come next.
    """

    name: str
    make: Callable[[PyTree], optax.GradientTransformation]
    bars: tuple[tuple[str, float | None], ...] = ()
    accumulate: Callable[[PyTree], Accumulator] = lambda axes: optim.mean_accumulator()
    num_microbatches: int = 1
    interval: int = 1
    due: int = 0


def arms(rank: int, min_dim: int = 128) -> tuple[Arm, ...]:
    """Everything whose update is timed, Adam first.

    Args:
      rank: of Flora's projections.
      min_dim: matrices with a shorter side stay whole.
    """
    adam = lambda axes: optim.adam(_RATE)
    compressed = lambda axes: optim.flora_accumulator(rank, axes=axes, min_dim_size_to_compress=min_dim)
    factored = partial(optim.adafactor, _RATE, min_dim_size_to_factor=min_dim)
    flora = partial(optim.flora, _RATE, rank, min_dim_size_to_compress=min_dim)
    pieces = f"{_MICROBATCHES} microbatches"
    return (
        Arm("adam", adam),
        Arm("adafactor", lambda axes: factored(axes=axes)),
        Arm("adafactor, momentum", lambda axes: factored(0.9, axes=axes)),
        Arm(
            f"flora {rank}",
            lambda axes: flora(axes=axes),
            (("adafactor", 1.1), ("adafactor, momentum", None)),
            interval=1000,
            due=999,
        ),
        Arm("sam", lambda axes: optim.sam(optim.adam(_RATE))),
        Arm("fsam", lambda axes: optim.fsam(optim.adam(_RATE)), (("sam", 1.05), ("adam", 2.1)), interval=100),
        Arm("ginger 4", lambda axes: optim.ginger(_RATE, 4, axes=axes), (("adam", 2.3),)),
        Arm(
            "ginger 4, curvature every 10",
            lambda axes: optim.ginger(_RATE, 4, curvature_every=10, axes=axes),
            (("adam", 1.2),),
            interval=10,
        ),
        Arm(f"adam, {pieces}", adam, num_microbatches=_MICROBATCHES),
        Arm(
            f"adam, {pieces}, flora {rank}",
            adam,
            ((f"adam, {pieces}", None),),
            accumulate=compressed,
            num_microbatches=_MICROBATCHES,
        ),
    )


def cost(sizes: Sizes) -> dict[str, Any]:
    """Times the updates of all arms in turn, so that a drifting machine favours none; pinned to one core.

    Returns:
      `lines`, one a comparison: medians and ranges of the ratios of the rounds, the seconds of an update in the mean
      over an interval; and `seconds` of all updates that were timed.
    """
    measured = arms(sizes.rank, min_dim=min(128, sizes.model.embed_dim))
    params = init_params(sizes.model, jax.random.key(0))
    trainings = {arm.name: _Training(arm, sizes, params) for arm in measured}
    cases = [(arm, count) for arm in measured for count in _counts(arm)]
    seconds: dict[str, dict[int, list[float]]] = {arm.name: {count: [] for count in _counts(arm)} for arm in measured}
    shuffler = random.Random(0)
    for number in range(1 + sizes.rounds):
        for arm, count in shuffler.sample(cases, len(cases)):
            taken = trainings[arm.name].update(count)
            if number:  # the first round starts everything up
                seconds[arm.name][count].append(taken)
    means = {arm.name: _mean_updates(arm, seconds[arm.name]) for arm in measured}
    lines = [
        _comparison(arm, other, bar, means)
        for arm in measured
        for other, bar in ({measured[0].name: None} | dict(arm.bars)).items()
    ]
    return {"lines": lines, "seconds": seconds}


def memory(sizes: Sizes) -> dict[str, Any]:
    """Bytes of the state: of arrays that are there for the small model, of shapes for the large one.

    Returns:
      `lines`, one an arm; those of accumulators are what they hold while the microbatches of a batch go by.
    """
    min_dim = min(128, sizes.model.embed_dim)
    measured = arms(sizes.rank, min_dim)
    halves = partial(optim.flora, _RATE, 2 * sizes.rank, mu_dtype=jnp.bfloat16, min_dim_size_to_compress=min_dim)
    halved = Arm(f"flora {2 * sizes.rank}, bfloat16", lambda axes: halves(axes=axes))
    states: dict[str, Callable[[PyTree, PyTree], PyTree]] = {}
    for arm in (*measured, halved):
        if arm.num_microbatches == 1:
            states[arm.name] = lambda params, axes, arm=arm: arm.make(axes).init(params)
        else:
            states[f"accumulator: {arm.name}"] = lambda params, axes, arm=arm: arm.accumulate(axes).init(params, 0)
    params = init_params(sizes.model, jax.random.key(0))
    planned = jax.eval_shape(partial(init_params, sizes.planned), jax.random.key(0))
    lines = []
    for name, state in states.items():
        live = jax.block_until_ready(
            jax.jit(lambda params, state=state: state(params, logical_axes(sizes.model)))(params)
        )
        shapes = jax.eval_shape(lambda params, state=state: state(params, logical_axes(sizes.planned)), planned)
        lines.append({
            "state": name,
            "bytes": tree_bytes(live),
            "to_params": tree_bytes(live) / tree_bytes(params),
            "planned_bytes": tree_bytes(shapes),
            "planned_to_adam": tree_bytes(shapes) / (lines[0]["planned_bytes"] if lines else tree_bytes(shapes)),
        })  # fmt: skip
    return {"lines": lines}


class _Training:
    """One arm with its program; its state is there only while it is timed, since all of them would be gigabytes."""

    def __init__(self, arm: Arm, sizes: Sizes, params: PyTree) -> None:
        axes = logical_axes(sizes.model)
        run = shaped_run(
            sizes.model,
            sizes.rows,
            sizes.length,
            arm.make(axes),
            accumulator=arm.accumulate(axes),
            num_microbatches=arm.num_microbatches,
        )
        program = make_program(run, {"vocab_size": sizes.model.vocab_size}, make_mesh(run.mesh, jax.devices()[:1]))
        self.step, self.batch = program.compile(), full_batch(program.batch, sizes.model.vocab_size)
        self.begin = partial(create_state, optimizer=run.optimizer, with_ema=False)
        self.params = params

    def update(self, count: int) -> float:
        """Seconds of the update that follows so many others: of this process, so that others do not count."""
        state = optax.tree.set(self.begin(jax.tree.map(jnp.array, self.params)), count=np.int32(count))
        jax.block_until_ready(state)
        start = time.process_time()
        _, metrics = jax.block_until_ready(self.step(state, {}, self.batch))
        seconds = time.process_time() - start
        assert metrics.finite, "an update that is left out would not be the one to measure"
        return seconds


def _counts(arm: Arm) -> tuple[int, ...]:
    """The counts at which an update is timed: one of the many, and the one that does more."""
    return (1,) if arm.interval == 1 else (1, arm.due)


def _mean_updates(arm: Arm, seconds: dict[int, list[float]]) -> list[float]:
    """Seconds of an update in the mean over an interval, by round."""
    if arm.interval == 1:
        return seconds[1]
    return [usual + (due - usual) / arm.interval for usual, due in zip(seconds[1], seconds[arm.due], strict=True)]


def _comparison(arm: Arm, other: str, bar: float | None, means: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [mine / theirs for mine, theirs in zip(means[arm.name], means[other], strict=True)]
    return {
        "arm": arm.name,
        "to": other,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "bar": bar,
        "seconds": statistics.median(means[arm.name]),
    }


def draw(figures: dict[str, Any], folder: Path) -> None:
    """`optim_cost.png`: a panel for the times and one for the bytes of the large model, where they were measured.

    Args:
      figures: the findings of `cost` and `memory` by these names.
      folder: of pictures.
    """
    from matplotlib.figure import Figure

    panels = {"cost": _draw_cost, "memory": _draw_memory}
    drawn = [part for part in panels if part in figures]
    figure = Figure(figsize=(5.6 * len(drawn), 4.6), layout="constrained")
    for part, axes in zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        panels[part](axes, figures[part]["lines"])
        axes.invert_yaxis()
    figure.savefig(folder / "optim_cost.png", dpi=100)


_COLORS = {"adam": "C7", "adafactor": "C7", "sam": "C7", "fsam": "C2", "flora": "C0", "ginger": "C1"}


def _color(name: str) -> str:
    """One color a method of this project, grey for what it is compared with."""
    return "C0" if "flora" in name else _COLORS[name.replace(",", "").split()[0]]


def _draw_cost(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    to_adam = {line["arm"]: line for line in lines if line["to"] == "adam"}
    for row, (name, line) in enumerate(to_adam.items()):
        around = [[line["ratio"] - line["least"]], [line["most"] - line["ratio"]]]
        axes.barh(row, line["ratio"], 0.65, color=_color(name), xerr=around, error_kw={"elinewidth": 1, "capsize": 3})
        axes.text(line["most"], row, f"  {line['ratio']:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(to_adam)), to_adam, fontsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("time of an update, relative to Adam's")
    axes.set_title("Time: what costs is a second gradient", fontsize=10.5)


def _draw_memory(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    lines = [line for line in lines if not line["state"].startswith("accumulator") and "every" not in line["state"]]
    for row, line in enumerate(lines):
        axes.barh(row, line["planned_bytes"] / 1e9, 0.65, color=_color(line["state"]))
        label = f"  {line['planned_bytes'] / 1e9:.3g} GB, {100 * line['planned_to_adam']:.3g} %"
        axes.text(line["planned_bytes"] / 1e9, row, label, va="center", fontsize=9)
    axes.set_yticks(range(len(lines)), [line["state"] for line in lines], fontsize=9)
    axes.margins(x=0.42)
    axes.set_xlabel("state of the optimizer, GB, and relative to Adam's")
    axes.set_title("Memory of vega_4b7: what Flora is for", fontsize=10.5)
