"""Test sets like WMT's: the outputs of many systems in many directions, found by pattern and scored alike.

`read_directions` reads a folder by its `Layout`, `score_directions` scores every system against every reference and
ranks them, `compare_systems` tests differences for significance.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from xml.etree import ElementTree

from tqdm import tqdm

from t5x_ext.contracts import Direction, UserError
from t5x_ext.corpora import read_lines
from t5x_ext.evaluate.metrics import tokenizer_for
from t5x_ext.evaluate.scores import Scores, evaluate_domains, evaluate_texts
from t5x_ext.evaluate.significance import PairedResult, paired_test

ALL_REFERENCES = "all"
"""Name under which a system is scored against several references at once, as in WMT's own tables."""

_LANGUAGE = r"[A-Za-z]{2,3}(?:_[A-Za-z]{2,4})*"
_PLACEHOLDERS = {"source": _LANGUAGE, "target": _LANGUAGE, "system": r"[^/]+", "reference": r"[^/]+"}
_ONLY_REFERENCE = "ref"

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Layout:
    """File name patterns of a test set, relative to its folder; files are text, plain or gzipped, a segment a line.

    `{source}` and `{target}` match language codes, `{system}` and `{reference}` names, `*` and `?` any characters. The
    defaults are WMT22's.

    Attributes:
      systems: translations; `{system}`, `{source}` and `{target}` must occur.
      references: reference translations; a pattern without `{reference}` has one a direction, named `ref`.
      sources: source texts; empty for none.
      domains: a label for each line, in the first of tab-separated columns, or WMT's XML (`.xml`) with the domain of
        each document; empty for none.
    """

    systems: str = "system-outputs/generaltest2022.{source}-{target}.hyp.{system}.{target}"
    references: str = "references/generaltest2022.{source}-{target}.ref.{reference}.{target}"
    sources: str = "sources/generaltest2022.{source}-{target}.src.{source}"
    domains: str = "xml/wmttest2022.{source}-{target}.all.xml"


@dataclass(frozen=True)
class DirectionTexts:
    """All texts of one direction; line i is the same segment in each.

    Attributes:
      source: code of the source language.
      target: code of the target language.
      systems: translations by name of the system, names sorted.
      references: reference translations by name, names sorted; may be empty.
      sources: source text, if there is any.
      domains: a label for each segment, if they are known.
    """

    source: str
    target: str
    systems: Mapping[str, Sequence[str]]
    references: Mapping[str, Sequence[str]]
    sources: Sequence[str] | None = None
    domains: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """Both languages, as in `en-de`."""
        return Direction(self.source, self.target).name

    def reference_sets(self) -> dict[str, list[Sequence[str]]]:
        """What systems are scored against, by name: each reference, then all together if there are several."""
        sets = {name: [lines] for name, lines in self.references.items()}
        if len(sets) > 1:
            sets.setdefault(ALL_REFERENCES, list(self.references.values()))
        return sets


@dataclass(frozen=True)
class SystemResult:
    """Scores of one system in one direction against one reference or all of them.

    Attributes:
      direction: as in `en-de`.
      system: its name.
      reference: name of the reference, `ALL_REFERENCES` for all together.
      scores: over all segments.
      rank: by BLEU among the systems of this direction and reference, from 1, the best; equal scores share a rank.
      domains: scores by domain; empty if domains are not known, and for several references.
    """

    direction: str
    system: str
    reference: str
    scores: Scores
    rank: int
    domains: Mapping[str, Scores]

    def to_json(self) -> dict[str, Any]:
        """As JSON; `signature` is that of BLEU, and `domains` is absent if they are not known."""
        fields: dict[str, Any] = {
            "direction": self.direction,
            "system": self.system,
            "reference": self.reference,
            "bleu": self.scores.bleu.value,
            "chrf": self.scores.chrf.value,
            "signature": self.scores.bleu.signature,
            "rank": self.rank,
        }
        if self.domains:
            fields["domains"] = {
                name: {"bleu": scores.bleu.value, "chrf": scores.chrf.value, "lines": scores.num_lines}
                for name, scores in self.domains.items()
            }
        return fields


@dataclass(frozen=True)
class Comparison:
    """One system compared with another in one direction.

    Attributes:
      direction: as in `en-de`.
      system: name of the system.
      other: name of the baseline.
      reference: name of the reference.
      metrics: results by metric.
    """

    direction: str
    system: str
    other: str
    reference: str
    metrics: Mapping[str, PairedResult]


class _Texts(NamedTuple):
    """What a worker process needs to score one system."""

    hypotheses: Sequence[str]
    references: list[Sequence[str]]
    domains: Sequence[str] | None
    target: str
    tokenizer: str


class _Pair(NamedTuple):
    """What a worker process needs to test one pair of systems."""

    baseline: Sequence[str]
    system: Sequence[str]
    reference: Sequence[str]
    target: str
    options: dict[str, Any]


class _Found(NamedTuple):
    """A file that matches a pattern, and the values of the placeholders."""

    fields: dict[str, str]
    path: str

    @property
    def direction(self) -> Direction:
        """Source and target language."""
        return Direction(self.fields["source"], self.fields["target"])


def read_directions(
    folder: str | Path,
    layout: Layout,
    *,
    only: Collection[str] = (),
    exclude: Collection[str] = (),
) -> list[DirectionTexts]:
    """The texts in a folder, sorted by direction.

    Args:
      folder: folder of the test set.
      layout: file name patterns.
      only: directions to read, as `en-de`; all if empty.
      exclude: systems to skip, `*` and `?` allowed; some collections have references among the systems.

    Returns:
      The directions that any system translated, also those without a reference, which cannot be scored.

    Raises:
      UserError: if a pattern has an unknown placeholder or lacks one, two files match for one text, there are no
        outputs (or none in a direction of `only`), or a file is empty, damaged, not UTF-8, or differs from the others
        in the number of lines.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder")
    systems = [
        found
        for found in _find(folder, layout.systems, "source", "target", "system")
        if not any(fnmatch.fnmatchcase(found.fields["system"], name) for name in exclude)
    ]
    if not systems:
        raise UserError(f"{folder}: no file matches {layout.systems}, the pattern of system outputs")
    known = {found.direction.name: found.direction for found in systems}
    for name in only:
        if name not in known:
            raise UserError(f"{folder}: no system outputs for {name}; there are outputs for {', '.join(sorted(known))}")
    references = _find(folder, layout.references, "source", "target")
    sources = {found.direction: found.path for found in _find(folder, layout.sources, "source", "target")}
    domains = {found.direction: found.path for found in _find(folder, layout.domains, "source", "target")}
    return [
        _read_direction(
            *languages,
            systems={found.fields["system"]: found.path for found in systems if found.direction == languages},
            references={
                found.fields.get("reference", _ONLY_REFERENCE): found.path
                for found in references
                if found.direction == languages
            },
            source_path=sources.get(languages),
            domains_path=domains.get(languages),
        )
        for name, languages in sorted(known.items())
        if not only or name in only
    ]


def score_directions(
    directions: Iterable[DirectionTexts], tokenizers: Mapping[str, str] | None = None, jobs: int = 1
) -> list[SystemResult]:
    """Scores every system of every direction against each of its references, and against all of them together.

    Args:
      directions: from `read_directions`; those without references have no results.
      tokenizers: BLEU tokenizers by target language; other languages have the default one.
      jobs: number of processes; the results do not depend on it.

    Returns:
      Results in the order of direction, reference and rank; systems of one rank by name.

    Raises:
      UserError: if a tokenizer is unknown.
    """
    names: list[tuple[str, str, str]] = []
    tasks: list[_Texts] = []
    for direction in directions:
        tokenizer = _tokenizer(direction.target, tokenizers)
        for reference, sets in direction.reference_sets().items():
            domains = direction.domains if len(sets) == 1 else None
            for system, lines in direction.systems.items():
                names.append((direction.name, system, reference))
                tasks.append(_Texts(lines, sets, domains, direction.target, tokenizer))
    scored = dict(zip(names, _in_processes(_score, tasks, jobs)))
    return _ranked(scored)


def compare_systems(
    directions: Iterable[DirectionTexts],
    system: str,
    others: Sequence[str],
    *,
    references: Mapping[str, str] | None = None,
    kind: Literal["bootstrap", "approximate_randomization"] = "bootstrap",
    seed: int = 12345,
    tokenizers: Mapping[str, str] | None = None,
    jobs: int = 1,
) -> list[Comparison]:
    """Tests the differences between one system and others, in every direction that both translated.

    Args:
      directions: from `read_directions`.
      system: the system to compare.
      others: the baselines.
      references: name of the reference by direction; by default the first.
      kind: see `paired_test`.
      seed: see `paired_test`.
      tokenizers: see `score_directions`.
      jobs: see `score_directions`.

    Returns:
      Comparisons in the order of direction and then of `others`.

    Raises:
      UserError: if two systems have no direction in common, a tokenizer is unknown, or the seed is below 1.
    """
    scorable = [direction for direction in directions if direction.references]
    for other in others:
        if not any(system in direction.systems and other in direction.systems for direction in scorable):
            raise UserError(f"no direction with a reference has outputs of both {system} and {other}")
    names: list[tuple[str, str, str, str]] = []
    tasks: list[_Pair] = []
    for direction in scorable:
        options = {"kind": kind, "seed": seed, "tokenizer": _tokenizer(direction.target, tokenizers)}
        reference = main_reference(direction, references)
        for other in others:
            if system in direction.systems and other in direction.systems:
                baseline, lines = direction.systems[other], direction.systems[system]
                names.append((direction.name, system, other, reference))
                tasks.append(_Pair(baseline, lines, direction.references[reference], direction.target, options))
    return [Comparison(*name, metrics) for name, metrics in zip(names, _in_processes(_compare, tasks, jobs))]


def main_reference(direction: DirectionTexts, references: Mapping[str, str] | None = None) -> str:
    """The reference to use: the one given for the direction if it exists, else the first by name."""
    named = (references or {}).get(direction.name, "")
    return named if named in direction.references else min(direction.references)


def _ranked(scored: Mapping[tuple[str, str, str], tuple[Scores, dict[str, Scores]]]) -> list[SystemResult]:
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for (direction, system, reference), (scores, _) in scored.items():
        groups.setdefault((direction, reference), []).append((-scores.bleu.value, system))
    results = []
    for (direction, reference), group in groups.items():
        values = [value for value, _ in group]
        for value, system in sorted(group):
            rank = 1 + sum(other < value for other in values)
            scores, domains = scored[direction, system, reference]
            results.append(SystemResult(direction, system, reference, scores, rank, domains))
    return results


def _tokenizer(target: str, tokenizers: Mapping[str, str] | None) -> str:
    named = tokenizers or {}
    return tokenizer_for(target, named.get(target, named.get(target.partition("_")[0])))


def _score(texts: _Texts) -> tuple[Scores, dict[str, Scores]]:
    arguments = (texts.hypotheses, texts.references)
    scores = evaluate_texts(*arguments, texts.target, tokenizer=texts.tokenizer)
    if texts.domains is None:
        return scores, {}
    domains = evaluate_domains(*arguments, texts.domains, texts.target, tokenizer=texts.tokenizer)
    return scores, dict(sorted(domains.items()))


def _compare(pair: _Pair) -> dict[str, PairedResult]:
    return paired_test(pair.baseline, pair.system, pair.reference, pair.target, **pair.options)


def _in_processes(function: Callable[[_Task], _Result], tasks: Sequence[_Task], jobs: int) -> list[_Result]:
    """`function` of each task, in the order of the tasks, with a progress bar on a terminal."""
    if min(jobs, len(tasks)) < 2:
        return [function(task) for task in tqdm(tasks, unit="output", disable=None)]
    # A process with JAX in it must not be forked.
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(function, tasks), total=len(tasks), unit="output", disable=None))


def _read_direction(
    source: str,
    target: str,
    *,
    systems: Mapping[str, str],
    references: Mapping[str, str],
    source_path: str | None,
    domains_path: str | None,
) -> DirectionTexts:
    lengths: dict[str, int] = {}

    def checked(path: str, lines: list[str]) -> list[str]:
        lengths[path] = len(lines)
        first = next(iter(lengths))
        if len(lines) != lengths[first]:
            raise UserError(
                f"{path} has {len(lines)} lines but {first} has {lengths[first]}: line i must be the same everywhere"
            )
        return lines

    # Lines are compared with those of the source or the first reference: an output is most likely to be wrong.
    sources = checked(source_path, list(read_lines(source_path))) if source_path else None
    reference_lines = {name: checked(path, list(read_lines(path))) for name, path in sorted(references.items())}
    system_lines = {name: checked(path, list(read_lines(path))) for name, path in sorted(systems.items())}
    domains = checked(domains_path, list(_domain_labels(domains_path))) if domains_path else None
    return DirectionTexts(source, target, system_lines, reference_lines, sources, domains)


def _domain_labels(path: str) -> Iterator[str]:
    """A label for each segment."""
    if not path.removesuffix(".gz").endswith(".xml"):
        yield from (line.partition("\t")[0] for line in read_lines(path))
        return
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a complete XML file ({error})") from None
    for document in root.iter("doc"):
        # Some documents of WMT22 name their domain only as the first word of their id: `social_ru_197`.
        label = document.get("domain") or document.get("id", "").partition("_")[0] or "unknown"
        yield from (label for _ in document.iterfind("src//seg"))


def _find(folder: str | Path, pattern: str, *required: str) -> list[_Found]:
    """The files that match a pattern, sorted by path; none for an empty pattern."""
    if not pattern:
        return []
    expression = re.compile(_regex(pattern, required))
    anything = re.sub(r"\{\w+\}", "*", pattern).replace("[", "[[]")  # a bracket stands for itself
    paths = {path for suffix in ("", ".gz") for path in glob.glob(anything + suffix, root_dir=folder)}
    found: dict[tuple[tuple[str, str], ...], _Found] = {}
    for path in sorted(paths):
        match = expression.fullmatch(path.removesuffix(".gz"))
        if match is None or not Path(folder, path).is_file():
            continue
        this = _Found(match.groupdict(), str(Path(folder, path)))
        before = found.setdefault(tuple(this.fields.items()), this)
        if before is not this:
            raise UserError(
                f"{before.path} and {this.path} match the pattern {pattern} as the same text: keep one of them"
            )
    return list(found.values())


def _regex(pattern: str, required: Sequence[str]) -> str:
    """A regular expression with a group for each placeholder; a repeated placeholder must match the same text."""
    seen: set[str] = set()
    parts = []
    for part in re.split(r"(\{\w*\}|\*|\?)", pattern):
        name = part[1:-1]
        if part in ("*", "?"):
            parts.append("[^/]*?" if part == "*" else "[^/]")  # lazy, so that placeholders match as much as possible
        elif not part.startswith("{"):
            parts.append(re.escape(part))
        elif name not in _PLACEHOLDERS:
            known = ", ".join(f"{{{known}}}" for known in _PLACEHOLDERS)
            raise UserError(f"pattern {pattern}: {part} is no placeholder; there are {known}")
        else:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{_PLACEHOLDERS[name]})")
            seen.add(name)
    for name in required:
        if name not in seen:
            raise UserError(f"pattern {pattern}: {{{name}}} is missing")
    return "".join(parts)
