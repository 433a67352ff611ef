"""Where a stage works: what earlier stages have made, its own folder, and models opened for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import jax

from t5x_ext.contracts import Direction, UserError
from t5x_ext.corpora import read_lines
from t5x_ext.decode import DecodeConfig, FileReport, Translator
from t5x_ext.parallel import AxisRules, MeshConfig, make_mesh
from t5x_ext.pipeline.artefact import Artefact, Kind, Model, TextFiles, wrong_kind
from t5x_ext.pipeline.decoding import Decoding, Journal
from t5x_ext.pipeline.shared_work import SharedWork, ask
from t5x_ext.pipeline.stage_folder import SCRATCH, PipelineFolder
from t5x_ext.storage.files import whole_files

OpenModel: TypeAlias = Callable[[Path, Model], Any]
"""From the pipeline's folder and a model in it to the opened model.

What that is, the stages that use it must agree on: those of this package call the methods of `decode.Translator`.
"""


def open_model(
    output_dir: Path, model: Model, mesh: MeshConfig | None = None, axis_rules: AxisRules | None = None
) -> Translator:
    """Opens a translation or language model from its run folders; several members as an ensemble.

    Args:
      output_dir: the pipeline's folder.
      model: the model, as an artefact describes it.
      mesh: layout of the devices of this process; None: each device decodes lines of its own.
      axis_rules: how the weights are sharded over the mesh; None: every device has all of them.
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
    begins. So a file that has its final name is complete, and is kept when a stage that was killed is run again.

    With several processes, the first of them makes the stages and the others help with what takes long: `translate`,
    `translate_with` and `score`. Each needs room for the model on its own devices, and all see the folder.

    Attributes:
      output_dir: the pipeline's folder.
      stage: name of the stage.
      configuration: its resolved gin text; empty if it was not built from gin.
    """

    def __init__(self, folder: PipelineFolder, stage: str, configuration: str = "", opener: OpenModel = open_model):
        """Nothing is read or written yet.

        Args:
          folder: the pipeline's folder.
          stage: see the attribute, like the next.
          configuration: see there.
          opener: opens models.
        """
        self.output_dir, self.stage, self.configuration = folder.path, stage, configuration
        self._folder, self._opener = folder, opener
        self._opened: dict[Model, Any] = {}

    @property
    def cache_dir(self) -> str:
        """The folder of token caches, which all stages share."""
        return str(self.output_dir / "cache")

    def artefact(self, stage: str, kind: Kind | None = None) -> Artefact:
        """What an earlier stage has made.

        Args:
          stage: the stage.
          kind: the kind that it must be; None: any.

        Raises:
          UserError: if the stage has not finished, or has made another kind.
        """
        artefact = self._folder.stage(stage).artefact
        if artefact is None:
            raise UserError(f"stage {self.stage!r} needs {stage!r}, which has not finished")
        if kind is not None and artefact.kind != kind:
            raise wrong_kind(self.stage, stage, kind, artefact.kind)
        return artefact

    def corpora(self, stages: Iterable[str]) -> list[TextFiles]:
        """The texts of earlier stages, in order.

        Raises:
          UserError: if one of them has not finished, or has made something else.
        """
        return [text for stage in stages for text in self.artefact(stage, "corpora").corpora]

    def models(self, stage: str) -> Artefact:
        """The artefact of an earlier stage, which must be models.

        Raises:
          UserError: if the stage has not finished, or has made something else.
        """
        return self.artefact(stage, "models")

    def open(self, model: Model) -> Any:
        """The model, opened by the pipeline's opener; only the model that was opened last stays in memory."""
        if model not in self._opened:
            self._opened.clear()
            self._opened[model] = self._opener(self.output_dir, model)
        return self._opened[model]

    def model_for(self, stage: str, languages: tuple[str, str]) -> Model:
        """The model of an earlier stage for a direction.

        Raises:
          UserError: if it has none.
        """
        artefact, direction = self.models(stage), Direction(*languages).name
        model = artefact.model_for(direction)
        if model is None:
            known = ", ".join(artefact.directions)
            raise UserError(f"stage {self.stage!r}: {stage!r} has no model for {direction}; it has {known}")
        return model

    # Files

    def own(self, name: str) -> str:
        """Path of a file of this stage, relative to the pipeline's folder."""
        return f"{self.stage}/{name}"

    def scratch(self, name: str) -> str:
        """The same for a file that is deleted once the stage has finished."""
        (self.output_dir / self.stage / SCRATCH).mkdir(parents=True, exist_ok=True)
        return f"{self.stage}/{SCRATCH}/{name}"

    def path(self, file: str) -> str:
        """The full path of a file that is given relative to the pipeline's folder."""
        return str(self.output_dir / file)

    def lines(self, file: str) -> Iterator[str]:
        """The lines of a text in the pipeline's folder."""
        return read_lines(self.path(file))

    def write_lines(self, file: str, lines: Iterable[str]) -> int:
        """Writes a text atomically; returns its number of lines."""
        return self.write_aligned((file,), ((line,) for line in lines))

    def write_aligned(self, files: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
        """Writes texts with the same number of lines, each atomically; returns that number."""
        count = 0
        with whole_files([self.path(file) for file in files]) as sinks:
            for row in rows:
                count += 1
                for sink, line in zip(sinks, row, strict=True):
                    sink.write(f"{line}\n")
        return count

    # Work of hours: all processes share it, and it resumes where it was killed

    def translate(
        self, stage: str, input_file: str, output_file: str, direction: tuple[str, str], config: DecodeConfig
    ) -> None:
        """Translates a text with the model of an earlier stage, line for line; an output that exists is kept.

        Raises:
          UserError: if the stage has no model for the direction.
        """
        self.translate_with(self.model_for(stage, direction), input_file, output_file, direction, config)

    def translate_with(
        self, model: Model, input_file: str, output_file: str, direction: tuple[str, str], config: DecodeConfig
    ) -> None:
        """Does the same with a given model."""
        self._decode(Decoding(model, input_file, output_file, direction, config))

    def score(self, stage: str, input_file: str, language: str, config: DecodeConfig, output_file: str) -> list[float]:
        """The length-normalised log-probability of every line under the language model of an earlier stage.

        It is the sum over the tokens, including tag and end of sentence, divided by their number; in nats.

        Args:
          stage: the stage of the language model.
          input_file: the text.
          language: its language.
          config: gives the size of batches.
          output_file: keeps the numbers, one a line; if it exists, nothing is computed.

        Raises:
          UserError: if the stage has no model of the language.
        """
        direction = (language, language)
        model = self.model_for(stage, direction)
        self._decode(Decoding(model, input_file, output_file, direction, config, scores=True))
        return [float(line) for line in self.lines(output_file)]

    def take_part(self, decoding: Decoding) -> FileReport:
        """Does this process's share of a decoding."""
        return decoding.run(self.output_dir, self.open(decoding.model))

    @property
    def journal(self) -> Journal:
        """What models have done for the stage."""
        return Journal(Path(self.path(self.scratch("decoded.json"))))

    def _decode(self, decoding: Decoding) -> None:
        """Makes a file with all processes, in the scratch folder first: a killed attempt leaves nothing elsewhere."""
        output = self.path(decoding.output_file)
        if os.path.exists(output):
            return
        draft = self.scratch(f"{Path(output).name}.decoded")
        if not os.path.exists(self.path(draft)):
            elsewhere = replace(decoding, output_file=draft)
            ask(SharedWork(self.stage, elsewhere))
            self.journal.add(decoding.output_file, elsewhere, self.take_part(elsewhere))
        os.replace(self.path(draft), output)
