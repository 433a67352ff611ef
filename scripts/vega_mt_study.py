"""Tables and the picture of bench_vega_mt.py, from the files that a pipeline has written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sacrebleu.metrics.bleu import BLEU

from t5x_ext.corpora import read_lines
from t5x_ext.evaluate import tokenizer_for
from t5x_ext.pipeline import StageFolder

DIRECTIONS = ("en-de", "de-en", "en-cs", "cs-en")
TABLES = ("scores", "controlled")
"""Stages of the pipeline that score: each stage of training against the one before it, and against its control."""

SAMPLES = 1000
"""Of the bootstrap, as many as sacreBLEU takes."""

LABELS = {
    "pretrain": "P1 pretraining, both directions",
    "retrain1": "P2, P3 first round",
    "retrain2": "P2, P3 second round",
    "finetune": "P4 a model for each direction",
    "generalise": "P5 generalisation tuning",
    "average": "P6 average of the last 3",
    "best": "P6 greedy ensemble",
    "bit_forward": "P1, from English only",
    "bit_switch": "P1, both in the first third only",
    "temperature_1": "P1, 2,000 pairs en-cs, T = 1",
    "temperature_5": "P1, 2,000 pairs en-cs, T = 5",
    "temperature_inf": "P1, 2,000 pairs en-cs, T infinite",
    "onward1": "no round, updates of one",
    "onward2": "no round, updates of two",
    "stay": "one round, updates of two",
    "no_cycle": "first round without cycle translation",
    "onward3": "no round, updates of three",
    "backward": "back-translation one way by that of two",
    "onward1_again": "no round, another seed",
    "retrain1_again": "first round, another seed",
    "plain": "back-translation alone (tau = 0)",
    "cycled": "cycle translation alone",
    "further": "no P4, updates of P4",
    "tuned": "no P5, updates of P5",
}
"""What people call the model of a stage."""


class Difference(NamedTuple):
    """BLEU of one stage minus that of another on the same lines, with the middle 95 % of the bootstrap."""

    value: float
    low: float
    high: float


def rows_of(output_dir: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table, in the order in which the stage has scored them.

    Args:
      output_dir: the pipeline's folder.
      table: one of `TABLES`.

    Returns:
      For every stage its name, BLEU by direction and their mean; with a baseline also its name, and by direction the
      difference, its interval and sacreBLEU's p-value, and the difference of the means with its interval.
    """
    found = json.loads((output_dir / table / "scores.json").read_text(encoding="utf-8"))
    return [_row(output_dir, stage, scores) for stage, scores in found.items()]


def _row(output_dir: Path, stage: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    by_direction = {text.rpartition(".")[2]: score for text, score in scores.items()}
    bleu = {direction: by_direction[direction]["bleu"] for direction in DIRECTIONS if direction in by_direction}
    row: dict[str, Any] = {"stage": stage.removesuffix("_test"), "bleu": bleu, "mean": float(np.mean([*bleu.values()]))}
    against = next((score["against"] for score in scores.values() if "against" in score), None)
    if against is None:
        return row
    found = differences(
        {
            direction: (_counts(output_dir, against, direction), _counts(output_dir, stage, direction))
            for direction in bleu
        }
    )
    return row | {
        "against": against.removesuffix("_test"),
        "difference": {
            direction: found[direction]._asdict() | {"p_value": by_direction[direction]["tests"]["BLEU"]["p_value"]}
            for direction in bleu
        },
        "mean_difference": found["mean"]._asdict(),
    }


def differences(
    counts: Mapping[str, tuple[Float[np.ndarray, "lines 10"], Float[np.ndarray, "lines 10"]]],
) -> dict[str, Difference]:
    """Differences of BLEU with intervals, by direction and as `mean` over them.

    The lines of the test text are the same in all directions, so one draw of line numbers serves all of them: what is
    hard in every language makes the mean as uncertain as it is.

    Args:
      counts: by direction those of the translations before and after, see `counts_of`.
    """
    values, drawn = {}, {}
    for direction, (before, after) in counts.items():
        weights = _draws(len(before))
        values[direction] = bleu_of_counts(after.sum(axis=0)) - bleu_of_counts(before.sum(axis=0))
        drawn[direction] = bleu_of_counts(weights @ after) - bleu_of_counts(weights @ before)
    values["mean"], drawn["mean"] = np.mean([*values.values()]), np.mean([*drawn.values()], axis=0)
    return {
        name: Difference(float(value), *map(float, np.percentile(drawn[name], (2.5, 97.5))))
        for name, value in values.items()
    }


def _draws(lines: int) -> Float[np.ndarray, "samples lines"]:
    """How often every line is drawn, sample by sample; always the same for as many lines."""
    return np.random.default_rng(0).multinomial(lines, np.full(lines, 1 / lines), SAMPLES).astype(float)


def _counts(output_dir: Path, stage: str, direction: str) -> Float[np.ndarray, "lines 10"]:
    artefact = StageFolder(output_dir, stage).artefact
    assert artefact is not None
    text = next(text for text in artefact.corpora if "-".join(text.languages) == direction)
    assert text.reference is not None
    hypotheses, references = (list(read_lines(str(output_dir / file))) for file in (text.files[1], text.reference))
    return counts_of(hypotheses, references, text.languages[1])


def counts_of(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Float[np.ndarray, "lines 10"]:
    """What BLEU adds up over lines: lengths of translation and reference, n-grams that match, and all, n = 1 to 4."""
    metric = BLEU(tokenize=tokenizer_for(language), effective_order=True)
    found = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        score = metric.sentence_score(hypothesis, [reference])
        found.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(found, float)


def bleu_of_counts(counts: Float[np.ndarray, "*samples 10"]) -> Float[np.ndarray, "*samples"]:
    """Corpus BLEU from sums over lines, see `counts_of`; 0 where no n-gram of some order matches, without smoothing."""
    lengths, references, matches, totals = counts[..., 0], counts[..., 1], counts[..., 2:6], counts[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.minimum(0.0, 1 - references / lengths)
        logarithm = np.log(matches / totals).mean(axis=-1)
        return 100 * np.nan_to_num(np.exp(brevity + logarithm))


def seconds_of(output_dir: Path) -> dict[str, float]:
    """How long every stage took, in the order in which they stand in the manifest."""
    manifest = json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))
    return {name: record["seconds"] for name, record in manifest["stages"].items()}


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as a table: BLEU, in brackets the difference; * and ** for p below 0.05 and 0.01."""
    yield "| model | against | " + " | ".join((*DIRECTIONS, "mean")) + " |"
    yield "|---" * (len(DIRECTIONS) + 3) + "|"
    for row in rows:
        cells = [_label(row["stage"]), _label(row.get("against", ""))]
        cells += [_cell(row, direction) for direction in DIRECTIONS]
        yield "| " + " | ".join((*cells, _mean_cell(row))) + " |"


def _label(stage: str) -> str:
    return LABELS.get(stage, stage)


def _cell(row: Mapping[str, Any], direction: str) -> str:
    if direction not in row["bleu"]:
        return ""
    text = f"{row['bleu'][direction]:.1f}"
    found = row.get("difference", {}).get(direction)
    if found is None:
        return text
    stars = "**" if found["p_value"] < 0.01 else "*" if found["p_value"] < 0.05 else ""
    return f"{text} ({found['value']:+.1f}{stars.replace('*', chr(92) + '*')})"


def _mean_cell(row: Mapping[str, Any]) -> str:
    text = f"{row['mean']:.1f}"
    found = row.get("mean_difference")
    return text if found is None else f"{text} ({found['value']:+.1f}, {found['low']:+.1f} to {found['high']:+.1f})"


def draw(tables: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """BLEU after every stage, and what every arm adds to its control.

    Args:
      tables: rows by table, see `rows_of`.
      path: the PNG to write.
    """
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    stages, arms = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_stages(stages, tables["scores"], {row["stage"]: row for row in tables["controlled"]})
    _draw_differences(arms, [row for row in tables["controlled"] if "against" in row])
    for axes in (stages, arms):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def _draw_stages(axes: Axes, rows: Sequence[Mapping[str, Any]], controlled: Mapping[str, Mapping[str, Any]]) -> None:
    places = range(len(rows))
    for number, direction in enumerate(DIRECTIONS):
        points = [(place, row["bleu"][direction]) for place, row in zip(places, rows) if direction in row["bleu"]]
        axes.plot(*zip(*points), "o-", color=f"C{number}", label=direction, linewidth=1.2, markersize=4)
    axes.plot(places, [row["mean"] for row in rows], "s-", color="black", label="mean", linewidth=2, markersize=5)
    controls = [
        (place, controlled[controlled[row["stage"]]["against"]]["mean"])
        for place, row in zip(places, rows)
        if "against" in controlled.get(row["stage"], {})
    ]
    if controls:
        axes.plot(*zip(*controls), "D", color="black", fillstyle="none", label="mean, its control", markersize=6)
    axes.set_xticks(places, [row["stage"] for row in rows], rotation=35, ha="right")
    axes.set_ylabel("BLEU, test_2016_flickr")
    axes.set_title("After every stage", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.18))


def _draw_differences(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        found = row["mean_difference"]
        errors = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
        is_clear = found["low"] > 0 or found["high"] < 0
        axes.errorbar(
            found["value"], place, xerr=errors, fmt="o", capsize=3, color="C0" if is_clear else "C7", markersize=5
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['stage']} − {row['against']}" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("BLEU, mean over directions, and 95 % of the bootstrap")
    axes.set_title("One against another; grey where 0 is within", fontsize=10.5)
