"""Pictures of a study: every arm's values, their course, and what they are along a sweep.

Colours are those of Okabe and Ito, which people who see red and green alike can tell apart; line styles and markers say
the same once more.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from t5x_ext.study.measurements import AXES, Curve, Recorded, curve
from t5x_ext.study.statistics import moments
from t5x_ext.study.study import Arm, Study
from t5x_ext.study.table import Cell, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X"
_POINTS = 200
"""Of a curve."""


class Picture(NamedTuple):
    """A PNG."""

    name: str  # of the file, without its ending
    title: str
    png: bytes


class _Style(NamedTuple):
    colour: str
    line: str
    marker: str


def pictures(results: Results, folder: Path) -> Iterator[Picture]:
    """All pictures for which there is something to draw.

    Args:
      results: what was found.
      folder: of the study, for the courses of its runs.
    """
    study = results.study
    for name in results.names:
        yield _picture("arms", study.label_of(name), name, _draw_arms(results, name))
        if sum(arm.position is not None and bool(results.values(arm, name)) for arm in study.arms) > 1:
            yield _picture("sweep", f"{study.label_of(name)} by {study.axis}", name, _draw_sweep(results, name))
    axis = study.budget.kind if study.budget else "steps"
    for name in _curve_names(study):
        found = {arm.name: _mean_curve(results, folder, arm, name, axis) for arm in study.arms}
        curves = {arm: one for arm, one in found.items() if one is not None}
        if curves:
            figure = _draw_curves(study, curves, study.label_of(name), AXES[axis])
            yield _picture("curve", f"{study.label_of(name)} over {AXES[axis]}", name, figure)


def _picture(kind: str, title: str, name: str, figure: Figure) -> Picture:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return Picture(f"{kind}_{re.sub('[^A-Za-z0-9]+', '_', name)}", title, png.getvalue())


def _figure(width: float, height: float) -> Figure:
    # Imported here: matplotlib takes a second to load. A Figure of its own has no state that it shares with others.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def styles(study: Study) -> dict[str, _Style]:
    """By name of an arm: a colour a family (or arm, of those without one), line and marker by its place of a colour."""
    families: dict[str, list[str]] = {}
    for arm in study.arms:
        families.setdefault(arm.family or arm.name, []).append(arm.name)
    found = {}
    places: Counter[str] = Counter()  # of arms of a colour; more families than colours share them
    for number, members in enumerate(families.values()):
        colour = _COLOURS[number % len(_COLOURS)]
        for name in members:
            place = places[colour]
            found[name] = _Style(colour, _STYLES[place % len(_STYLES)], _MARKERS[place % len(_MARKERS)])
            places[colour] += 1
    return found


def _draw_arms(results: Results, name: str) -> Figure:
    """A line an arm: its seeds as dots, mean and standard error; beside it its difference to its baseline."""
    study = results.study
    arms = [arm for arm in study.arms if results.values(arm, name)]
    cells = {arm.name: results.cell(arm, name) for arm in arms}
    compared = any(cell.difference for cell in cells.values())
    figure = _figure(10 if compared else 6.5, 1.4 + 0.32 * len(arms))
    panels = figure.subplots(1, 2 if compared else 1, squeeze=False, sharey=True)[0]
    look = styles(study)
    for place, arm in enumerate(arms):
        values, style = list(results.values(arm, name).values()), look[arm.name]
        panels[0].plot(values, [place] * len(values), style.marker, color=style.colour, alpha=0.45, markersize=5)
        mean, error, _ = moments(values)
        panels[0].errorbar(mean, place, xerr=error, fmt="|", color=style.colour, capsize=4, markersize=14)
        if compared:
            _draw_difference(panels[1], place, cells[arm.name], style)
    panels[0].set_yticks(range(len(arms)), [arm.title for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    panels[0].set_xlabel(f"{study.label_of(name)}: seeds, mean, standard error")
    if compared:
        panels[1].axvline(0, color="black", linewidth=0.8)
        bars = "95 % interval" if any(cell.resampled for cell in cells.values()) else "standard error"
        panels[1].set_xlabel(f"difference to {_against(study, cells)}, {bars}")
    return figure


def _against(study: Study, cells: Mapping[str, Cell]) -> str:
    names = {cell.against for cell in cells.values() if cell.difference}
    return study.arm(names.pop()).title if len(names) == 1 else "the baseline of each"


def _draw_difference(axes: Axes, place: int, cell: Cell, style: _Style) -> None:
    if cell.resampled is not None:
        found = cell.resampled
        error: Any = [[found.difference - found.low], [found.high - found.difference]]
        axes.errorbar(found.difference, place, xerr=error, fmt=style.marker, color=style.colour, capsize=4)
    elif cell.difference is not None:
        found_mean, found_error = cell.difference.difference, cell.difference.error
        axes.errorbar(found_mean, place, xerr=found_error, fmt=style.marker, color=style.colour, capsize=4)


def _draw_sweep(results: Results, name: str) -> Figure:
    """Means and standard errors along the sweep, a line a family; arms without a position as levels."""
    study = results.study
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    look = styles(study)
    families: dict[str, list[Arm]] = {}
    for arm in study.arms:
        if results.values(arm, name):
            families.setdefault(arm.family if arm.position is not None else "", []).append(arm)
    for arm in families.pop("", []):
        mean, error, _ = moments(list(results.values(arm, name).values()))
        axes.axhline(mean, color=look[arm.name].colour, linestyle=look[arm.name].line, linewidth=1.2, label=arm.title)
        if error:
            axes.axhspan(mean - error, mean + error, color=look[arm.name].colour, alpha=0.08, linewidth=0)
    for family, arms in families.items():
        arms = sorted(arms, key=lambda arm: arm.position or 0.0)
        means, errors, _ = zip(*(moments(list(results.values(arm, name).values())) for arm in arms))
        style = look[arms[0].name]
        axes.errorbar(
            np.array([arm.position for arm in arms], float),
            means,
            yerr=np.array([error or 0.0 for error in errors]),
            fmt=f"{style.marker}-",
            color=style.colour,
            capsize=3,
            label=family or arms[0].title,
        )
    positions = sorted({arm.position for arm in study.arms if arm.position is not None})
    if min(positions) > 0 and max(positions) >= 8 * min(positions):
        axes.set_xscale("log", base=2)
    axes.set_xticks(positions, [f"{position:g}" for position in positions])
    axes.minorticks_off()
    axes.set_xlabel(study.axis)
    axes.set_ylabel(study.label_of(name))
    _add_legend(figure, axes)
    return figure


class _MeanCurve(NamedTuple):
    x: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    error: Float[np.ndarray, " points"]  # 0 of a single seed


def _curve_names(study: Study) -> tuple[str, ...]:
    if study.curves is not None:
        return study.curves
    named = (one.name if isinstance(one, Recorded) else one for one in study.measurements)
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str)))


def _mean_curve(results: Results, folder: Path, arm: Arm, name: str, axis: str) -> _MeanCurve | None:
    """Over the seeds that have finished, at common points; None where there is no course: a point is none."""
    runs = results.runs[arm.name].values()
    found = [curve(folder / run.path, name, axis) for run in runs if run.state == "finished"]
    curves = [one for one in found if one is not None and len(one.x) > 1]
    if not curves:
        return None
    x = _common_points(curves)
    values = np.array([np.interp(x, *one) for one in curves])
    error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(x)
    return _MeanCurve(x, values.mean(axis=0), error)


def _common_points(curves: Sequence[Curve]) -> Float[np.ndarray, " points"]:
    if all(np.array_equal(one.x, curves[0].x) for one in curves):
        return curves[0].x
    return np.linspace(max(one.x[0] for one in curves), min(one.x[-1] for one in curves), _POINTS)


def _draw_curves(study: Study, curves: Mapping[str, _MeanCurve], value: str, over: str) -> Figure:
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    look = styles(study)
    for name, (x, mean, error) in curves.items():
        style = look[name]
        marker = style.marker if len(x) <= 20 else ""
        axes.plot(x, mean, style.line, color=style.colour, marker=marker, markersize=4, label=study.arm(name).title)
        if error.any():
            axes.fill_between(x, mean - error, mean + error, color=style.colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(over)
    axes.set_ylabel(value)
    axes.margins(x=0.02)
    _add_legend(figure, axes)
    return figure


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
