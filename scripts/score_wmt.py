#!/usr/bin/env python3
"""Scores the outputs of many systems in many directions, as shared tasks publish them: BLEU, chrF, ranks, differences.

  scripts/score_wmt.py --data_dir=wmt23 --json_out=wmt23.json
  scripts/score_wmt.py --data_dir=mt-metrics-eval-v2/wmt21.news --direction=en-de \\
    --systems='system-outputs/{source}-{target}/{system}.txt' --sources='sources/{source}-{target}.txt' \\
    --references='references/{source}-{target}.{reference}.txt' --exclude='ref*' \\
    --domains='documents/{source}-{target}.docs'

Texts are UTF-8, plain or gzipped, line i the same segment everywhere. A direction without a reference is left out, and
said so; an output with another number of lines than its source is a mistake, and nothing is scored. JSON is a list with
a line for each direction, system and reference, `all` being all references at once where there are several.
`score_wmt22.py` is this with the patterns of WMT22, and with claims to hold its scores against.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from launch_common import run_script
from wmt_tables import (
    Claim,
    Key,
    Official,
    against_claims,
    against_official,
    domains,
    key_of,
    paired_tests,
    rankings,
    signatures,
)

from t5x_ext.cli.files import check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.contracts import UserError
from t5x_ext.corpora import read_lines
from t5x_ext.evaluate import (
    CometTexts,
    Comparison,
    DirectionTexts,
    Layout,
    comet_scores,
    compare_systems,
    main_reference,
    read_directions,
    score_directions,
)

_CLAIM = re.compile(r"(?P<direction>[^.=]+)\.(?P<reference>[^=]+)=(?P<bleu>\d+(\.\d+)?)")
_TESTS = ["bootstrap", "approximate_randomization"]


class Defaults(NamedTuple):
    """What a test set brings along, all of which flags can change."""

    layout: Layout
    tokenizers: tuple[str, ...] = ()
    system: str | None = None
    claims: tuple[str, ...] = ()
    official: str | None = None


# The file names of the years from 2021 on; `*` stands for name and year of the test.
ANY_YEAR = Defaults(
    Layout(
        systems="system-outputs/*.{source}-{target}.hyp.{system}.{target}",
        references="references/*.{source}-{target}.ref.{reference}.{target}",
        sources="sources/*.{source}-{target}.src.{source}",
        domains="",
    )
)


def define(values: flags.FlagValues, defaults: Defaults) -> None:
    """Declares the flags."""
    own: dict[str, Any] = {"flag_values": values}
    layout = defaults.layout
    flags.DEFINE_string("data_dir", None, "folder of the test set; required", **own)
    flags.DEFINE_string("systems", layout.systems, "pattern of the system outputs in it", **own)
    flags.DEFINE_string("references", layout.references, "pattern of the references", **own)
    flags.DEFINE_string("sources", layout.sources, "pattern of the sources; empty for none", **own)
    flags.DEFINE_string("domains", layout.domains, "pattern of files with a domain for each line, or WMT's XML", **own)
    flags.DEFINE_list("direction", [], "directions to score, as en-de,de-en; all by default", **own)
    flags.DEFINE_multi_string("exclude", [], "systems to skip, as 'ref*'", **own)
    flags.DEFINE_multi_string(
        "tokenizer", list(defaults.tokenizers), "BLEU's tokenizer for a target language, as ja=char; by default "
        "that of the language: zh, ja-mecab, or 13a", **own)  # fmt: skip
    flags.DEFINE_string("system", defaults.system, "the system that claims, domains and --against are about", **own)
    flags.DEFINE_multi_string(
        "claim", list(defaults.claims), "a score that --system is said to have, as en-de.A=37.79 (A the reference)",
        **own)  # fmt: skip
    flags.DEFINE_multi_string("against", [], "system to test the difference of --system from", **own)
    flags.DEFINE_enum("test", "bootstrap", _TESTS, "the paired test", **own)
    flags.DEFINE_integer("seed", 12345, "of the paired test", lower_bound=1, **own)
    flags.DEFINE_string("official", defaults.official, "the task's own table of scores, in --data_dir: tab-separated "
                        "pair, system, is_constrained, metric (bleu-A, chrf-all, ...), score", **own)  # fmt: skip
    flags.DEFINE_string("comet_model", None, "checkpoint file of a COMET model, to score with it, too", **own)
    flags.DEFINE_string("comet_python", None, "Python that has unbabel-comet; by default this one", **own)
    flags.DEFINE_integer("comet_gpus", 0, "GPUs for COMET; 0 computes on the CPU", lower_bound=0, **own)
    flags.DEFINE_integer("comet_batch_size", 16, "segments a batch of COMET", lower_bound=1, **own)
    flags.DEFINE_integer("jobs", len(os.sched_getaffinity(0)), "processes that share the work", lower_bound=1, **own)
    flags.DEFINE_string("json_out", None, "file for the scores as JSON; - is standard output", **own)


def run(script: str, description: str, defaults: Defaults, arguments: Sequence[str]) -> int:
    """Parses the flags and scores; a mistake is one line and exit code 2."""
    return run_script(lambda values: define(values, defaults), score, script, description, arguments)


def score(values: flags.FlagValues) -> int:
    """Reads, scores, compares, and reports."""
    require(values, "data_dir")
    check_writable(values.json_out, "--json_out")
    claims, tokenizers = [_claim(text) for text in values.claim], _tokenizers(values.tokenizer)
    if (claims or values.against) and not values.system:
        raise UsageError("--system is missing: the system that --claim and --against are about")
    layout = Layout(values.systems, values.references, values.sources, values.domains)
    directions = read_directions(values.data_dir, layout, only=values.direction, exclude=values.exclude)
    official = _read_official(values)
    scorable = _with_references(directions, values)

    # What can still turn out to be a mistake comes first, since the scores take minutes.
    comet = _comet(values, scorable)
    comparisons = _comparisons(values, scorable, claims, tokenizers)
    results = score_directions(scorable, tokenizers, values.jobs)
    rows = {key_of(result): result.to_json() for result in results}
    for key, value in comet.items():
        rows[key]["comet"] = value
    for test in comparisons:
        row = rows[test.direction, test.system, test.reference]
        row.setdefault("against", {})[test.other] = {name: found.to_json() for name, found in test.metrics.items()}

    references = {direction.name: main_reference(direction, _references(claims)) for direction in scorable}
    parts = [
        rankings(results, comet),
        domains(results, values.system, references),
        paired_tests(comparisons),
        against_official(results, official, values.official),
        against_claims(claims, values.system, results, official, values.direction),
        signatures(results),
    ]
    report("\n\n".join(part for part in parts if part), list(rows.values()), values.json_out)
    return 0


def _claim(text: str) -> Claim:
    match = _CLAIM.fullmatch(text)
    if match is None:
        raise UsageError(f"--claim={text}: expected direction.reference=BLEU, as en-de.A=37.79")
    return Claim(match["direction"], match["reference"], float(match["bleu"]))


def _references(claims: Sequence[Claim]) -> dict[str, str]:
    return {claim.direction: claim.reference for claim in claims}


def _tokenizers(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (language, _, name) in zip(texts, pairs):
        if not language or not name:
            raise UsageError(f"--tokenizer={text}: expected language=tokenizer, as ja=char")
    return {language: name for language, _, name in pairs}


def _with_references(directions: Sequence[DirectionTexts], values: flags.FlagValues) -> list[DirectionTexts]:
    """The directions that can be scored; the others are named on standard error."""
    scorable = [direction for direction in directions if direction.references]
    if not scorable:
        raise UserError(
            f"{values.data_dir}: no file matches {values.references}, the pattern of references, for any output"
        )
    for direction in directions:
        if not direction.references:
            print(
                f"{direction.name}: no reference, so its {len(direction.systems)} outputs are left out", file=sys.stderr
            )
    return scorable


def _comet(values: flags.FlagValues, directions: Sequence[DirectionTexts]) -> dict[Key, float]:
    """COMET of every system by each single reference."""
    if not values.comet_model:
        return {}
    texts: dict[Key, CometTexts] = {}
    for direction in directions:
        if direction.sources is None:
            raise UserError(f"COMET needs the sources of {direction.name}: no file matches --sources={values.sources}")
        for reference, lines in direction.references.items():
            for system, outputs in direction.systems.items():
                texts[direction.name, system, reference] = CometTexts(direction.sources, outputs, lines)
    scores = comet_scores(
        values.comet_model,
        list(texts.values()),
        python=values.comet_python,
        gpus=values.comet_gpus,
        batch_size=values.comet_batch_size,
    )
    return dict(zip(texts, scores))


def _comparisons(
    values: flags.FlagValues,
    directions: Sequence[DirectionTexts],
    claims: Sequence[Claim],
    tokenizers: Mapping[str, str],
) -> list[Comparison]:
    if not values.against:
        return []
    return compare_systems(
        directions,
        values.system,
        values.against,
        references=_references(claims),
        kind=values.test,
        seed=values.seed,
        tokenizers=tokenizers,
        jobs=values.jobs,
    )


def _read_official(values: flags.FlagValues) -> Official:
    """The task's own table; empty where there is none and none was asked for."""
    path = Path(values.data_dir, values.official or "")
    if not values.official or (values["official"].using_default_value and not path.exists()):
        return Official({}, set())
    scores: dict[tuple[str, str, str, str], float] = {}
    constrained = set()
    head, *lines = (line.split("\t") for line in read_lines(str(path)))
    for number, fields in enumerate(lines, start=2):
        row = dict(zip(head, fields))
        try:
            metric, _, reference = row["metric"].partition("-")
            scores[row["pair"], row["system"], metric, reference] = float(row["score"])
            if row["is_constrained"] == "TRUE":
                constrained.add((row["pair"], row["system"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, line {number}: not a line of a table of scores ({error!r})") from None
    return Official(scores, constrained)


if __name__ == "__main__":
    sys.exit(run("score_wmt.py", __doc__, ANY_YEAR, sys.argv[1:]))
