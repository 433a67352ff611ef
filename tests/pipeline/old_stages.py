"""The stages of `old_folder`, which was written by the first edition of the pipeline and must stay valid.

Run in `old_folder`, with the package of commit b556cdd, this file writes it: `python ../old_stages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stand_ins import Given, StandIn

from t5x_ext.checkpoints import CheckpointStore, Retention, RunFolder
from t5x_ext.corpora import ParallelText
from t5x_ext.corpora.filters import FilterConfig
from t5x_ext.pipeline import (
    Artefact,
    Average,
    Clean,
    Evaluate,
    Model,
    Pipeline,
    Texts,
    Translate,
    Weights,
    Workspace,
    execute,
)

PLAIN = FilterConfig(min_script_share=None, min_language_probability=None, near_duplicate_similarity=None)
RAW = ParallelText("text/a.en", "text/a.zh", "en", "zh")


@dataclass(frozen=True)
class Runs:
    """A run folder with two checkpoints of two small arrays."""

    name: str

    def inputs(self):
        return ()

    def sources(self):
        return ()

    def make(self, workspace: Workspace) -> Artefact:
        folder = RunFolder(workspace.path(workspace.own("run")))
        folder.write_model({"a": 1}, {}, ("en-zh", "zh-en"), "")
        folder.vocabulary.mkdir()
        (folder.vocabulary / "vocabulary.json").write_text("{}")
        with CheckpointStore(folder.checkpoints, Retention(9, 9, "loss", "min")) as store:
            for step in (1, 2):
                weights = {"w": np.float32([step, 2.5]), "b": np.float32(-step)}
                store.save(step, {"params": weights}, {}, {"loss": step})
        return Artefact("models", models=(Model(("en-zh", "zh-en"), (Weights(workspace.own("run"), 2),)),))


PIPELINE = Pipeline(
    (
        Texts("raw", (RAW,)),
        Clean("clean", texts=("raw",), config=PLAIN),
        Texts("some", (RAW,), stop=2, side="target"),
        Runs("runs"),
        Average("mean", "runs", last=2),
        Given("lines", texts=(("x", ("en", "zh"), (("one, two", "一，二"), ("three.", "三。"))),)),
        Translate("plain", "runs", ("lines",), postprocess="none"),
        Translate("test", "mean", ("lines",)),
        Evaluate("scores", ("plain", "test"), baseline="plain"),
    )
)
CONFIGURATIONS = {
    stage.name: f"# {stage.name}\n{type(stage).__name__}.name = '{stage.name}'\nMeshConfig.fsdp = 1\n"
    for stage in PIPELINE.stages
}
ANSWERS = {"one, two": "一,二", "three.": "三.", "一，二": "one, two", "三。": "three."}


def main() -> None:
    """Writes the folder."""
    Path("text").mkdir()
    Path("text/a.en").write_text("One  line\nsame\nOne line\nTwo lines.\n", encoding="utf-8")
    Path("text/a.zh").write_text("一行\nsame\n一行\n两行。\n", encoding="utf-8")
    model = StandIn(lambda source, target, line: ANSWERS[line])
    execute(PIPELINE, "made", configurations=CONFIGURATIONS, opener=lambda folder, opened: model)


if __name__ == "__main__":
    main()
