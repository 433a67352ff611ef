"""That nothing a pipeline is tested on is in what it learns from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand_ins import Given

from t5x_ext.cli.gin_config import build_parts
from t5x_ext.cli.gin_read import gin_root
from t5x_ext.corpora.filters import FilterConfig
from t5x_ext.pipeline import Clean, Pipeline, Texts, Train, execute

PLAIN = FilterConfig(min_script_share=None, min_language_probability=None, near_duplicate_similarity=None)
RUNS = sorted((gin_root() / "runs").glob("vega_mt_*.gin"))
PIPELINES = [path.name for path in RUNS if "include 'pipelines/" in path.read_text(encoding="utf-8")]
TEST = Given("test", texts=(("t", ("en", "de"), (("A test line.", "Ein Test."), ("Another one", "Noch einer"))),))
DEV = Given("dev", texts=(("d", ("zh",), (("开发集。",),)),))
RAW = Given(
    "raw",
    texts=(
        ("a", ("en", "zh"), (("this stays", "这个"), ("A TEST LINE", "其他"), ("x", "开 发 集"), ("noch einer", "好"))),
        ("m", ("de",), (("“Noch” einer!",), ("das bleibt",), ("A test line.",))),
    ),
)


def test_held_out_texts_are_those_of_earlier_stages_in_all_languages(tmp_path):
    clean = Clean("clean", texts=("raw",), held_out=("dev", "test"), config=PLAIN)
    made = execute(Pipeline((RAW, DEV, TEST, clean)), tmp_path)["clean"]
    assert (tmp_path / "clean/a.en").read_text() == "this stays\nnoch einer\n"
    assert (tmp_path / "clean/m.de").read_text() == "das bleibt\nA test line.\n"
    assert [made.counts[name]["held_out"] for name in ("a", "m.de")] == [2, 1]
    assert clean.inputs() == ("raw", "dev", "test")


def learned_from(stage: object, stages: dict[str, object]) -> Iterator[tuple[str, ...]]:
    """Ways from a stage to the texts that it, or models that it asks, learn from, each by names of stages."""
    if isinstance(stage, (Clean, Texts)):
        yield (stage.name,)
        return
    held_back = getattr(stage, "valid", ())
    for name in stage.inputs():
        if name not in held_back:
            yield from ((stage.name, *way) for way in learned_from(stages[name], stages))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_packaged_pipeline_learns_only_from_what_dev_and_test_are_held_out_of(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipeline, _ = build_parts("stages", [f"runs/{name}"], root=Pipeline)
    stages = {stage.name: stage for stage in pipeline.stages}
    ways = [way for stage in pipeline.stages if isinstance(stage, Train) for way in learned_from(stage, stages)]
    assert {way[-1] for way in ways} == {"clean", "clean_mono", "clean_past"}
    for name in ("clean", "clean_mono", "clean_past"):
        assert {"dev", "test"} <= set(stages[name].held_out)
    assert "past" in stages["clean"].held_out
