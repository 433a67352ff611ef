"""Where a stage works: what earlier stages have made, its own folder, and models opened for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import jax

from t5x_ext.checkpoints import to_disk
from t5x_ext.contracts import Direction, UserError
from t5x_ext.corpora import read_lines
from t5x_ext.decode import DecodeConfig, FileReport, Translator
from t5x_ext.parallel import AxisRules, MeshConfig, make_mesh
from t5x_ext.pipeline.artefact import Artefact, Model, TextFiles, read_artefact, wrong_kind
from t5x_ext.pipeline.decoding import Decoding, Journal
from t5x_ext.pipeline.shared_work import Task, ask

SCRATCH = "work"
"""Folder of a stage for what it need not keep; deleted once the stage has finished."""

OpenModel: TypeAlias = Callable[[Path, Model], Translator]
"""From the pipeline's folder and a model in it to what translates."""


def open_model(
    output_dir: Path, model: Model, mesh: MeshConfig | None = None, axis_rules: AxisRules | None = None
) -> Translator:
    """The model from its run folders; several members as an ensemble.

    Args:
      output_dir: the pipeline's folder.
      model: what an artefact says of it.
      mesh: how the devices of this process are laid out; None: one after the other, each decoding lines of its own.
      axis_rules: how the weights are cut over the mesh; None: every device has all of them.
    """
    devices = make_mesh(mesh or MeshConfig(), jax.local_devices())
    members = [
        Translator.from_run(output_dir / weights.run_dir, weights.step, devices, axis_rules)
        for weights in model.members
    ]
    return members[0] if len(members) == 1 else Translator.ensemble(members, model.combine)


class Workspace:
    """What a stage is given to work with.

    Everything that a stage writes is a pure function of its configuration and its inputs, which are recorded before it
    begins. So whatever is there under its final name is whole and stays, when a stage that was killed is run again.

    Where a run has several processes, the first of them makes the stages and the others help with what takes long:
    `translate`, `translate_with` and `score`. Each needs room for the model on its own devices, and all see the folder.

    Attributes:
      output_dir: the pipeline's folder.
      stage: name of the stage.
      configuration: its resolved gin text; empty where it was not built from gin.
    """

    def __init__(self, output_dir: Path, stage: str, configuration: str = "", opener: OpenModel = open_model):
        """Nothing is read or written yet.

        Args:
          output_dir: see the attribute, like the next two.
          stage: see there.
          configuration: see there.
          opener: how models are opened.
        """
        self.output_dir, self.stage, self.configuration = output_dir, stage, configuration
        self._opener = opener
        self._opened: dict[Model, Translator] = {}

    @property
    def cache_dir(self) -> str:
        """The folder of token caches, which all stages share."""
        return str(self.output_dir / "cache")

    def artefact(self, stage: str) -> Artefact:
        """What an earlier stage has made.

        Raises:
          UserError: where it has not finished.
        """
        artefact = read_artefact(self.output_dir, stage)
        if artefact is None:
            raise UserError(f"stage {self.stage!r} needs {stage!r}, which has not finished")
        return artefact

    def corpora(self, stages: Iterable[str]) -> list[TextFiles]:
        """The texts of earlier stages, in order.

        Raises:
          UserError: where one of them has made something else.
        """
        found: list[TextFiles] = []
        for stage in stages:
            artefact = self.artefact(stage)
            if artefact.kind != "corpora":
                raise wrong_kind(self.stage, stage, "corpora", artefact.kind)
            found += artefact.corpora
        return found

    def models(self, stage: str) -> Artefact:
        """The artefact of an earlier stage, which must be models.

        Raises:
          UserError: where it is something else.
        """
        artefact = self.artefact(stage)
        if artefact.kind != "models":
            raise wrong_kind(self.stage, stage, "models", artefact.kind)
        return artefact

    def open(self, model: Model) -> Translator:
        """The model, opened; the one that was opened last stays in memory, no other does."""
        if model not in self._opened:
            self._opened.clear()
            self._opened[model] = self._opener(self.output_dir, model)
        return self._opened[model]

    def model_for(self, stage: str, languages: tuple[str, str]) -> Model:
        """The model of an earlier stage for a direction.

        Raises:
          UserError: where it has none.
        """
        artefact, direction = self.models(stage), Direction(*languages).name
        model = artefact.model_for(direction)
        if model is None:
            known = ", ".join(artefact.directions)
            raise UserError(f"stage {self.stage!r}: {stage!r} has no model for {direction}; it has {known}")
        return model

    # Files

    def own(self, name: str) -> str:
        """Path of a file of this stage, below the pipeline's folder."""
        return f"{self.stage}/{name}"

    def scratch(self, name: str) -> str:
        """The same for a file that is deleted once the stage has finished."""
        (self.output_dir / self.stage / SCRATCH).mkdir(parents=True, exist_ok=True)
        return f"{self.stage}/{SCRATCH}/{name}"

    def path(self, file: str) -> str:
        """The whole path of a file below the pipeline's folder."""
        return str(self.output_dir / file)

    def lines(self, file: str) -> Iterator[str]:
        """The lines of a text below the pipeline's folder."""
        return read_lines(self.path(file))

    def write_lines(self, file: str, lines: Iterable[str]) -> int:
        """Writes a text whole or not at all; how many lines it has."""
        return self.write_aligned((file,), ((line,) for line in lines))

    def write_aligned(self, files: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
        """Writes texts of equally many lines, whole or not at all; how many lines each has."""
        drafts = [Path(self.path(f"{file}.draft")) for file in files]
        try:
            count = _write(drafts, rows)
        except Exception:
            for draft in drafts:
                draft.unlink(missing_ok=True)
            raise
        for draft, file in zip(drafts, files):
            draft.replace(self.path(file))
        return count

    # Work of hours: all processes share it, and it goes on where it was killed

    def translate(
        self, stage: str, input_file: str, output_file: str, direction: tuple[str, str], config: DecodeConfig
    ) -> None:
        """Translates a text with the model of an earlier stage, line for line; what is done already stays.

        Raises:
          UserError: where the stage has no model for the direction.
        """
        self.translate_with(self.model_for(stage, direction), input_file, output_file, direction, config)

    def translate_with(
        self, model: Model, input_file: str, output_file: str, direction: tuple[str, str], config: DecodeConfig
    ) -> None:
        """Does the same with a given model."""
        self._decode(Decoding(model, input_file, output_file, direction, config))

    def score(self, stage: str, input_file: str, language: str, config: DecodeConfig, output_file: str) -> list[float]:
        """The length-normalised log-probability of every line to the language model of an earlier stage.

        The sum over the tokens, tag and end of sentence included, over their number; in nats.

        Args:
          stage: the stage of the language model.
          input_file: the text.
          language: its language.
          config: gives the size of batches.
          output_file: keeps the numbers, one a line; what is there already is not computed again.

        Raises:
          UserError: where the stage has no model of the language.
        """
        direction = (language, language)
        model = self.model_for(stage, direction)
        self._decode(Decoding(model, input_file, output_file, direction, config, scores=True))
        return [float(line) for line in self.lines(output_file)]

    def take_part(self, decoding: Decoding) -> FileReport:
        """Does this process's part of a decoding."""
        return decoding.run(self.output_dir, self.open(decoding.model))

    @property
    def journal(self) -> Journal:
        """What models have done for the stage."""
        return Journal(Path(self.path(self.scratch("decoded.json"))))

    def _decode(self, decoding: Decoding) -> None:
        """Makes a file with all processes, elsewhere first: of one that is killed nothing is left beside the output."""
        output = self.path(decoding.output_file)
        if os.path.exists(output):
            return
        draft = self.scratch(f"{Path(output).name}.decoded")
        if not os.path.exists(self.path(draft)):
            elsewhere = replace(decoding, output_file=draft)
            ask(Task(self.stage, elsewhere))
            self.journal.add(decoding.output_file, elsewhere, self.take_part(elsewhere))
        os.replace(self.path(draft), output)


def _write(paths: Sequence[Path], rows: Iterable[Sequence[str]]) -> int:
    count = 0
    with ExitStack() as stack:
        sinks = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        for row in rows:
            count += 1
            for sink, line in zip(sinks, row, strict=True):
                sink.write(f"{line}\n")
        for sink in sinks:
            to_disk(sink)
    return count
