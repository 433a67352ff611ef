"""Stages and models that stand for dear ones: plain functions of text, with the methods that stages call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from t5x_ext.contracts import Direction
from t5x_ext.decode import Hypothesis
from t5x_ext.decode.scoring import Score
from t5x_ext.pipeline import Artefact, Model, TextFiles, Weights, Workspace


@dataclass(frozen=True)
class Lines:
    """A corpus of given lines, with the members of the Protocol only."""

    name: str
    languages: tuple[str, str]
    lines: tuple[tuple[str, str], ...]

    def pairs(self) -> Iterator[tuple[str, str]]:
        return iter(self.lines)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.languages, self.lines)).encode()).hexdigest()


@dataclass
class StandIn:
    """Stands for a Translator: `words(source_language, target_language, line)` translates, `log_prob(line)` scores."""

    words: Callable[[str, str, str], str] = lambda source, target, line: line
    log_prob: Callable[[str], float] = lambda line: -1.0
    name: str = "stand-in"
    calls: list[tuple[str, str, int]] = field(default_factory=list)

    def resolve(self, source_language, target_language):
        return Direction(source_language, target_language)

    def fingerprint(self):
        return self.name

    def translate_n_best(self, lines, source, target, config, progress=None, first_line=0):
        self.calls.append((source, target, len(lines)))
        return [[Hypothesis(self.words(source, target, line), 0.0, 1)] for line in lines]

    def score(self, sources, targets, source, target, config=None, progress=None):
        self.calls.append((source, target, len(targets)))
        return [Score((self.log_prob(line),)) for line in targets]


@dataclass(frozen=True)
class Given:
    """A stage that makes a given artefact of texts or of stand-in models, without any file of its own."""

    name: str
    directions: tuple[str, ...] = ()
    texts: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = ()

    def inputs(self):
        return ()

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        if self.directions:
            return Artefact("models", models=(Model(self.directions, (Weights(f"stand-ins/{self.name}", 1),)),))
        found = []
        for name, languages, rows in self.texts:
            files = tuple(workspace.own(f"{name}.{language}") for language in languages)
            found.append(TextFiles(name, languages, files, workspace.write_aligned(files, rows)))
        return Artefact("corpora", tuple(found))


def opener(**models: StandIn) -> Callable[[Path, Model], StandIn]:
    """Opens, for what the stage of each name made, the stand-in given for it."""
    return lambda folder, model: models[Path(model.members[0].run_dir).name]


def read(folder: Path, file: str) -> list[str]:
    """The lines of a file of a pipeline."""
    return (folder / file).read_text(encoding="utf-8").split("\n")[:-1]
