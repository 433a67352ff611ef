"""`Translate` and `Evaluate`: translations as readers get them, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from t5x_ext.contracts import UserError
from t5x_ext.decode import DecodeConfig
from t5x_ext.evaluate import Scores, evaluate_texts, format_table, paired_test, tokenizer_for
from t5x_ext.pipeline.artefact import Artefact, Kind, Reading, TextFiles
from t5x_ext.pipeline.finishing import Finished
from t5x_ext.pipeline.postprocess import Postprocessor
from t5x_ext.pipeline.stage import Stage, StageDefaults, StageWork, decoding_work, models_and_corpora
from t5x_ext.pipeline.texts import check_distinct
from t5x_ext.pipeline.workspace import Workspace
from t5x_ext.storage.files import write_json


@dataclass(frozen=True)
class Translate(StageDefaults):
    """Translates both sides of test sets, in every direction of a model.

    Attributes:
      name: of the stage.
      model: the stage of the model, or of one for each direction.
      texts: stages of pairs, one side of which is translated and the other kept as its reference.
      directions: those to translate in; empty: all of the model.
      decode: options of the search.
      normalize: see `finishing.Finished`.
      postprocess: see there.

    Raises:
      UserError: if there are no texts, and for an unknown postprocessor.
    """

    makes: ClassVar[Kind] = "corpora"

    name: str
    model: str
    texts: tuple[str, ...]
    directions: tuple[str, ...] = ()
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    normalize: bool = True
    postprocess: str | Postprocessor = "widths"

    def __post_init__(self) -> None:
        if not self.texts:
            raise UserError("Translate.texts: there is no stage; give at least one")
        self._finished()

    def reads(self) -> Mapping[str, Kind]:
        """The model and the texts."""
        return models_and_corpora([self.model], self.texts)

    def program(self, earlier: Mapping[str, Stage]) -> StageWork | None:
        """The search with its model."""
        return decoding_work(self.model, self.decode, earlier)

    def make(self, workspace: Workspace) -> Artefact:
        """Translates text by text, or resumes."""
        directions = self.directions or workspace.models(self.model).directions
        jobs = [
            (text, reading)
            for direction in directions
            for text in workspace.corpora(self.texts)
            for reading in text.readings()
            if reading.direction == direction
        ]
        if not jobs:
            raise UserError(f"stage {self.name!r}: there is no pair for {', '.join(directions)}")
        check_distinct(f"{text.name}.{reading.languages[0]}" for text, reading in jobs)
        found = [self._translated(text, reading, workspace) for text, reading in jobs]
        return Artefact("corpora", tuple(found), counts={"lines": sum(text.lines for text in found)})

    def _finished(self) -> Finished:
        return Finished(self.decode, self.normalize, self.postprocess)

    def _translated(self, text: TextFiles, reading: Reading, workspace: Workspace) -> TextFiles:
        languages, (input_file, reference) = reading
        name = f"{text.name}.{reading.direction}"
        output = workspace.own(f"{name}.{languages[1]}")
        model = workspace.model_for(self.model, languages)
        self._finished().translate(model, input_file, output, languages, workspace)
        files = (input_file, output)
        return TextFiles(name, languages, files, text.lines, "target", one_way=True, reference=reference)


class _Row(NamedTuple):
    """The translations of one text by one stage."""

    stage: str
    text: TextFiles

    @property
    def name(self) -> str:
        return f"{self.stage}  {self.text.name}"


@dataclass(frozen=True)
class Evaluate(StageDefaults):
    """BLEU, chrF and exact match of translations, a row for every stage, text and direction.

    It writes `scores.txt`, a table with signatures, and `scores.json`. A text for each domain gives a row for each.

    Attributes:
      name: of the stage.
      translations: stages of translations.
      baseline: one of them, which the others are tested against by paired bootstrap on the same texts; or a mapping
        from some of them to the one that each is tested against, such as the stage before; None: no tests.
      tokenizers: BLEU tokenizers by target language, instead of the usual ones, such as WMT22's `char` for ja.
      seed: of the bootstrap.

    Raises:
      UserError: if there are no translations, and for an unknown baseline or tokenizer.
    """

    makes: ClassVar[Kind] = "scores"

    name: str
    translations: tuple[str, ...]
    baseline: str | Mapping[str, str] | None = None
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    seed: int = 12345

    def __post_init__(self) -> None:
        if not self.translations:
            raise UserError("Evaluate.translations: there are none; give at least one stage")
        if self.seed < 0:
            raise UserError(f"Evaluate.seed={self.seed}: must be at least 0")
        for language, tokenizer in self.tokenizers.items():
            tokenizer_for(language, tokenizer)
        given = self.baseline if isinstance(self.baseline, Mapping) else {self.baseline: self.baseline}
        for name in (*given, *given.values()):
            if name is not None and name not in self.translations:
                raise UserError(f"Evaluate.baseline={name!r}: must be one of {', '.join(self.translations)}")

    def reads(self) -> Mapping[str, Kind]:
        """The translations."""
        return dict.fromkeys(self.translations, "corpora")

    def make(self, workspace: Workspace) -> Artefact:
        """Scores and tests."""
        rows = [_Row(stage, text) for stage in self.translations for text in workspace.corpora([stage])]
        scores = {row.name: self._scores(row, workspace) for row in rows}
        tests = dict(self._tests(rows, workspace))
        lines = [format_table(scores, label="translations")]
        for baseline in dict.fromkeys(test["against"] for test in tests.values()):
            lines += ["", f"against {baseline}, paired bootstrap:"]
            lines += [_described(name, test["tests"]) for name, test in tests.items() if test["against"] == baseline]
        workspace.write_lines(workspace.own("scores.txt"), "\n".join(lines).split("\n"))
        found: dict[str, Any] = {}
        for row in rows:
            found.setdefault(row.stage, {})[row.text.name] = scores[row.name].to_json() | tests.get(row.name, {})
        write_json(workspace.path(workspace.own("scores.json")), found)
        return Artefact("scores", scores=found)

    def _texts(self, row: _Row, workspace: Workspace) -> tuple[list[str], list[str], str, dict[str, Any]]:
        """Translations, references, their language, and options of the scores."""
        if row.text.reference is None:
            raise UserError(f"stage {self.name!r}: {row.stage!r} makes no translations with a reference")
        language = row.text.languages[1]
        options = {"tokenizer": self.tokenizers.get(language)}
        return list(workspace.lines(row.text.files[1])), list(workspace.lines(row.text.reference)), language, options

    def _scores(self, row: _Row, workspace: Workspace) -> Scores:
        hypotheses, references, language, options = self._texts(row, workspace)
        return evaluate_texts(hypotheses, references, language, **options)

    def _tests(self, rows: list[_Row], workspace: Workspace) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of each row that is tested: its name; the baseline, and the tests by metric."""
        known = {(row.stage, row.text.name): row for row in rows}
        for row in rows:
            baseline = known.get((self._baseline_of(row.stage), row.text.name))
            if baseline is None or baseline is row:
                continue
            before = self._texts(baseline, workspace)[0]
            after, references, language, options = self._texts(row, workspace)
            tests = paired_test(before, after, references, language, seed=self.seed, **options)
            found = {name: test.to_json() for name, test in tests.items()}
            yield row.name, {"against": baseline.stage, "tests": found}

    def _baseline_of(self, stage: str) -> str:
        return self.baseline.get(stage, "") if isinstance(self.baseline, Mapping) else self.baseline or ""


def _described(name: str, tests: Mapping[str, Mapping[str, Any]]) -> str:
    parts = (f"{metric} {test['difference']:+.2f} (p = {test['p_value']:.4f})" for metric, test in tests.items())
    return f"{name}: {', '.join(parts)}"
