"""What the scripts of shared tasks print: rankings, domains, tests, and how scores compare with published ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from t5x_ext.evaluate import ALL_REFERENCES, Comparison, SystemResult
from t5x_ext.evaluate.table import align_rows

TOLERANCE = 0.05
"""By how much a claim, given to two decimals, may differ."""

Key = tuple[str, str, str]
"""Direction, system, reference."""


class Claim(NamedTuple):
    """A published score."""

    direction: str
    reference: str
    bleu: float


class Official(NamedTuple):
    """What a task's own table says."""

    scores: dict[tuple[str, str, str, str], float]  # by direction, system, metric, reference
    constrained: set[tuple[str, str]]  # direction, system


def key_of(result: SystemResult) -> Key:
    """What a result is of."""
    return result.direction, result.system, result.reference


def rankings(results: Sequence[SystemResult], comet: Mapping[Key, float]) -> str:
    """A table for each direction and reference."""
    groups: dict[tuple[str, str], list[SystemResult]] = {}
    for result in results:
        groups.setdefault((result.direction, result.reference), []).append(result)
    tables = []
    for (direction, reference), group in groups.items():
        with_comet = any(key_of(result) in comet for result in group)
        body = [
            [
                result.system,
                str(result.rank),
                f"{result.scores.bleu.value:.2f}",
                f"{result.scores.chrf.value:.2f}",
                *([f"{comet[key_of(result)]:.4f}"] if with_comet else []),
            ]
            for result in group
        ]
        lines = group[0].scores.num_lines
        head = [f"{direction}, {_reference_words(reference)}", "rank", "BLEU", "chrF", *(["COMET"] * with_comet)]
        tables.append("\n".join([*align_rows(head, body), f"{lines:,} lines"]))
    return "\n\n".join(tables)


def _reference_words(reference: str) -> str:
    return "all references" if reference == ALL_REFERENCES else f"reference {reference}"


def domains(results: Sequence[SystemResult], system: str | None, references: Mapping[str, str]) -> str:
    """BLEU by domain of the system that matters, or of every system; one line where none is known."""
    shown = [
        result
        for result in results
        if result.reference == references[result.direction] and system in (None, result.system)
    ]
    known = [result for result in shown if result.domains]
    without = sorted({result.direction for result in shown if not result.domains})
    body = [
        [
            f"{result.direction} {result.system}",
            name,
            f"{scores.num_lines:,}",
            f"{scores.bleu.value:.2f}",
            f"{scores.chrf.value:.2f}",
        ]
        for result in known
        for name, scores in result.domains.items()
    ]
    table = align_rows(["by domain", "domain", "lines", "BLEU", "chrF"], body) if body else []
    note = [f"no domains by line are known of {', '.join(without)}"] if without else []
    return "\n".join([*table, *note])


def paired_tests(comparisons: Sequence[Comparison]) -> str:
    """The paired tests, and the signatures they share."""
    if not comparisons:
        return ""
    body = [
        [
            f"{test.direction} {test.system}",
            f"against {test.other}",
            test.reference,
            name,
            f"{found.difference:+.2f}",
            f"{found.p_value:.4f}",
        ]
        for test in comparisons
        for name, found in test.metrics.items()
    ]
    footer = {f"{name}  {found.signature}": None for test in comparisons for name, found in test.metrics.items()}
    return "\n".join([*align_rows(["paired test", "", "ref", "", "difference", "p"], body), *footer])


def against_official(results: Sequence[SystemResult], official: Official, name: str | None) -> str:
    """How far scores are from the task's own table."""
    differences = []
    for result in results:
        for metric, value in (("bleu", result.scores.bleu.value), ("chrf", result.scores.chrf.value)):
            said = official.scores.get((result.direction, result.system, metric, result.reference))
            if said is not None:
                differences.append((abs(value - said), f"{metric}-{result.reference}", result, value, said))
    if not differences:
        return ""
    most = max(difference for difference, *_ in differences)
    far = [
        f"  {result.direction} {result.system} {metric}: {value:.2f}, {name} says {said:.2f}"
        for difference, metric, result, value, said in differences
        if difference > TOLERANCE
    ]
    return "\n".join([f"{name}: {len(differences)} scores compared, greatest difference {most:.4f}", *far])


def against_claims(
    claims: Sequence[Claim],
    system: str | None,
    results: Sequence[SystemResult],
    official: Official,
    only: Sequence[str],
) -> str:
    """Claimed against measured."""
    claims = [claim for claim in claims if not only or claim.direction in only]
    if not claims:
        return ""
    by_key = {key_of(result): result for result in results}
    measured = [by_key.get((claim.direction, str(system), claim.reference)) for claim in claims]
    body = [_claim_row(claim, result, results, official) for claim, result in zip(claims, measured)]
    head = [str(system), "reference", "claimed", "measured", "difference", "chrF", "rank", "constrained"]
    count = sum(
        result is not None and abs(result.scores.bleu.value - claim.bleu) <= TOLERANCE
        for claim, result in zip(claims, measured)
    )
    return "\n".join([*align_rows(head, body), f"{count} of {len(claims)} claims reproduced to {TOLERANCE}"])


def _claim_row(
    claim: Claim, result: SystemResult | None, results: Sequence[SystemResult], official: Official
) -> list[str]:
    start = [claim.direction, claim.reference, f"{claim.bleu:.2f}"]
    if result is None:
        return [*start, "not given", "-", "-", "-", "-"]
    rivals = [other for other in results if (other.direction, other.reference) == (claim.direction, claim.reference)]
    measured = result.scores.bleu.value

    def place(counts: Callable[[SystemResult], bool]) -> str:
        among = [rival.scores.bleu.value for rival in rivals if counts(rival)]
        return f"{1 + sum(value > measured for value in among)}/{len(among)}"

    def constrained(rival: SystemResult) -> bool:
        return (rival.direction, rival.system) in official.constrained

    return [
        *start,
        f"{measured:.2f}",
        f"{measured - claim.bleu:+.3f}",
        f"{result.scores.chrf.value:.2f}",
        place(lambda rival: True),
        place(constrained) if constrained(result) else "-",
    ]


def signatures(results: Sequence[SystemResult]) -> str:
    """Each signature with the target languages and references that it is of."""
    members: dict[str, dict[str, None]] = {}
    for result in results:
        where = f"{result.direction}.{result.reference}"
        for line in (f"BLEU  {result.scores.bleu.signature}", f"chrF  {result.scores.chrf.signature}"):
            members.setdefault(line, {})[where] = None
    return "\n".join(f"{line}  [{', '.join(where)}]" for line, where in sorted(members.items()))
