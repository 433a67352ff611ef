"""Pictures of what optim_quality.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optim_arms
from matplotlib.figure import Figure
from optim_quality import moments

_COLOURS = {
    "adam": "C7",
    "adafactor": "C0",
    "sam": "C3",
    "flora": "C2",
    "flora fixed": "C8",
    "flora projected": "C9",
    "flora reset": "C6",
    "flora orthogonal": "C5",
    "ginger": "C4",
    "ginger reference": "C1",
}


def draw(figures: Mapping[str, Any], folder: Path) -> None:
    """Writes `optim_{sst2,multi30k,sharpness}.png`, those that the measured parts have something for.

    Args:
      figures: what the parts returned, by their names, as JSON gives it back.
      folder: where to.
    """
    drawings = {"sst2": _draw_sst2, "multi30k": _draw_multi30k, "sharpness": _draw_sharpness}
    for part, drawing in drawings.items():
        if part in figures:
            figure = Figure(figsize=(10, 4.2), layout="constrained")
            drawing(figure, figures[part]["runs"])
            for axes in figure.axes:
                axes.grid(alpha=0.3)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / f"optim_{part}.png", dpi=100)


def _draw_sst2(figure: Figure, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Accuracies, and differences to Adam paired by seeds."""
    accuracy, difference = figure.subplots(1, 2, width_ratios=(1, 1.2))
    counts = list(next(iter(runs.values())))
    for number, (name, found) in enumerate(runs.items()):
        shift = 0.07 * (number - (len(runs) - 1) / 2)
        means, errors = zip(*(moments(found[count]) for count in counts))
        style = {"fmt": _marker(name), "color": _colour(name), "label": name, "capsize": 2, "markersize": 5}
        accuracy.errorbar(np.arange(len(counts)) + shift, means, errors, **style)
        if "adam" in runs and name != "adam":
            pairs = [moments(np.subtract(found[count], runs["adam"][count])) for count in counts]
            difference.errorbar(np.arange(len(counts)) + shift, *zip(*pairs), **style)
    for axes in (accuracy, difference):
        axes.set_xticks(range(len(counts)), counts)
        axes.set_xlabel("training sentences")
    accuracy.set_ylabel("accuracy on SST-2 dev, %")
    difference.set_ylabel("accuracy minus Adam's, points")
    difference.axhline(0, color="black", linewidth=0.8)
    handles, labels = accuracy.get_legend_handles_labels()
    difference.legend(handles, labels, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("SST-2 sentences, trained from scratch: mean and standard error over seeds", fontsize=10.5)


def _draw_multi30k(figure: Figure, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Validation loss of every arm, and how far each rank is from no compression."""
    losses, gaps = figure.subplots(1, 2, width_ratios=(1.2, 1))
    found = {name: [run["loss"] for run in each] for name, each in runs.items()}
    for place, (name, values) in enumerate(found.items()):
        losses.plot(values, [place] * len(values), "o", color=_colour(name), alpha=0.5, markersize=4)
        losses.plot(np.mean(values), place, "|", color=_colour(name), markersize=16, markeredgewidth=2)
    losses.set_yticks(range(len(found)), list(found))
    losses.invert_yaxis()
    losses.set_xlabel("validation loss, nats a token")
    losses.set_title("Multi30k en-de, one short run a seed", fontsize=10.5)
    compared = [arm for arm in map(optim_arms.by_name, found) if arm.counterpart in found]
    gap_of = lambda arm: moments(np.subtract(found[arm.name], found[arm.counterpart]))
    for family in dict.fromkeys(arm.family for arm in compared if arm.rank):
        arms = [arm for arm in compared if arm.family == family]
        style = {"color": _COLOURS[family], "label": family, "capsize": 3}
        gaps.errorbar([arm.rank for arm in arms], *zip(*map(gap_of, arms)), fmt="o-", **style)
    for arm in compared:
        if not arm.rank:
            gaps.axhline(gap_of(arm)[0], color=_colour(arm.name), linestyle="--", label=f"{arm.name}, no momentum")
    ranks = sorted({arm.rank for arm in compared if arm.rank})
    if ranks:
        gaps.set_xscale("log", base=2)
        gaps.set_xticks(ranks, ranks)
        gaps.legend(frameon=False, fontsize=9)
    gaps.axhline(0, color="black", linewidth=0.8)
    gaps.set_xlabel("rank (of 128)")
    gaps.set_ylabel("loss minus that of uncompressed momentum")
    gaps.set_title("The gap to no compression, by rank", fontsize=10.5)


def _draw_sharpness(figure: Figure, runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> None:
    """Two measures a task, a dot a seed."""
    measures = [("largest eigenvalue", "largest eigenvalue"), (f"uphill {optim_arms.RHO:g}", "loss rise uphill")]
    panels = [(task, measure, title) for task in runs for measure, title in measures]
    for axes, (task, measure, title) in zip(figure.subplots(1, len(panels)), panels):
        for place, (name, each) in enumerate(runs[task].items()):
            values = [run[measure] for run in each]
            axes.plot([place] * len(values), values, "o", color=_colour(name), alpha=0.4, markersize=4)
            axes.errorbar(place, *moments(values), fmt="_", color=_colour(name), capsize=5, markersize=16)
        axes.set_xticks(range(len(runs[task])), list(runs[task]))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.2)
        axes.set_title(f"{task}: {title}", fontsize=9.5)
    figure.suptitle("Sharpness of the training loss where runs end: mean and standard error over seeds", fontsize=10.5)


def _colour(name: str) -> str:
    return _COLOURS[optim_arms.by_name(name).family]


def _marker(name: str) -> str:
    """Arms of one family in their order."""
    family = [arm.name for arm in optim_arms.ARMS if arm.family == optim_arms.by_name(name).family]
    return "osD^v"[family.index(name)]
