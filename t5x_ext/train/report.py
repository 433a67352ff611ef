"""What a finished run shows: the learning curve as a picture."""

from __future__ import annotations

import io
import json
import math

from etils import epath


def read_metrics(path: epath.Path) -> list[dict[str, float | None]]:
    """The lines of a metrics file, None for what was not finite; an empty list where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_learning_curve(metrics_path: epath.Path, picture_path: epath.Path, title: str) -> None:
    """Draws training and held-out loss, and below them the held-out scores, over updates.

    Args:
      metrics_path: the JSON-lines file that `hooks.Log` writes.
      picture_path: the PNG to write.
      title: shown above the picture.
    """
    # Imported here: matplotlib takes a second to load, and training should begin before that.
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(line["step"] or 0)
            values.append(math.nan if value is None else value)
    scores = {
        name: label
        for name, label in {"valid/bleu": "BLEU", "valid/chrf": "chrF", "valid/exact_match": "exact match, %"}.items()
        if name in curves
    }
    figure = Figure(figsize=(8, 6 if scores else 3.6), layout="constrained")
    axes = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title)
    # Without label smoothing, so that both curves mean the same; an objective of one's own may know no such thing.
    loss = "nll" if "nll" in curves else "loss"
    for name, label, style in ((loss, "training", "-"), (f"valid/{loss}", "held-out", "o-")):
        if name in curves:
            axes[0].plot(*curves[name], style, label=label, linewidth=1.5, markersize=3)
    axes[0].set_ylabel("loss, nats per target token")
    axes[0].set_ylim(bottom=0)
    if axes[0].lines:
        axes[0].legend(frameon=False)
    if scores:
        for name, label in scores.items():
            axes[1].plot(*curves[name], "o-", label=label, linewidth=1.5, markersize=3)
        axes[1].set_ylabel("held-out score")
        axes[1].set_ylim(0, 100)
        axes[1].legend(frameon=False, ncols=len(scores))
    axes[-1].set_xlabel("updates")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    epath.Path(picture_path).write_bytes(picture.getvalue())
