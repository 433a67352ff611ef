"""Scores as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from t5x_ext.contracts import UserError
from t5x_ext.evaluate.scores import Scores

_ROW = DataRow("", "  ", "")
_FORMAT = TableFormat(None, Line("", "-", "--", ""), None, None, _ROW, _ROW, padding=0, with_header_hide=None)


def format_table(scores: Mapping[str, Scores], label: str = "direction") -> str:
    """A table with a row for each direction (or domain), their mean if there are several, and signatures below.

    A signature that all rows share is printed once. If rows differ (in the tokenizer of the language, say), each
    signature lists its rows.

    Args:
      scores: by the name of the row; the order is kept.
      label: heading of the first column.

    Raises:
      UserError: if there are no scores.
    """
    if not scores:
        raise UserError("no scores to print: evaluate something first")
    rows = list(scores.values())
    columns: list[tuple[str, Callable[[Scores], float | None]]] = [
        ("BLEU", lambda row: row.bleu.value),
        ("chrF", lambda row: row.chrf.value),
        ("TER", lambda row: row.ter.value if row.ter else None),
        ("exact %", lambda row: row.exact_match),
    ]
    columns = [(name, value) for name, value in columns if any(value(row) is not None for row in rows)]
    body = [
        [name, f"{row.num_lines:,}", *(_number(value(row)) for _, value in columns)] for name, row in scores.items()
    ]
    head = [label, "lines", *(name for name, _ in columns)]
    foot = []
    if len(rows) > 1:
        means = [_mean([value(row) for row in rows]) for _, value in columns]
        foot = [["mean", f"{sum(row.num_lines for row in rows):,}", *map(_number, means)]]
    return "\n".join([*align_rows(head, body, foot), "", *_signatures(scores)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def align_rows(head: Sequence[str], body: Sequence[Sequence[str]], foot: Sequence[Sequence[str]] = ()) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers, with rules around the body."""
    # The head is a row like the others, because tabulate pads the columns of headers.
    rows = [head, SEPARATING_LINE, *body, *([SEPARATING_LINE, *foot] if foot else [])]
    columns = ("left", *["right"] * (len(head) - 1))
    table = tabulate(rows, tablefmt=_FORMAT, disable_numparse=True, colalign=columns, preserve_whitespace=True)
    return table.splitlines()


def _signatures(scores: Mapping[str, Scores]) -> list[str]:
    names: dict[tuple[str, str], list[str]] = {}
    for metric in ("BLEU", "chrF", "TER"):
        for name, row in scores.items():
            score = getattr(row, metric.lower())
            if score is not None:
                names.setdefault((metric, score.signature), []).append(name)
    width = max(len(metric) for metric, _ in names)
    return [
        f"{metric.ljust(width)}  {signature}" + ("" if len(members) == len(scores) else f"  [{', '.join(members)}]")
        for (metric, signature), members in names.items()
    ]
