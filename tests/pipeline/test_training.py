"""What a training stage makes of its run: which texts it learns from, from which weights, and what it hands on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optax
import pytest
from stand_ins import Given, Lines

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.data import BatchConfig, DataConfig, TagPolicy, VocabularyConfig
from t5x_ext.models import DecoderConfig, TransformerConfig
from t5x_ext.pipeline import Artefact, Interrupted, Model, Pipeline, TextFiles, Train, Weights, audit, execute, training
from t5x_ext.tasks import LanguageModeling, Translation, with_data
from t5x_ext.train import CheckpointConfig, EvaluationConfig, InitFrom, Run
from t5x_ext.vega_mt import NoisyDev

PAIRS = tuple((f"one two {number}", f"eins zwei {number}") for number in range(12))
TEXTS = Given("texts", texts=(("a", ("en", "de"), PAIRS), ("b", ("en", "cs"), PAIRS[:4])))
MONO = Given("mono", texts=(("c", ("de",), tuple((pair[1],) for pair in PAIRS)),))


@pytest.fixture
def run() -> Run:
    dev = Lines("dev", ("en", "de"), PAIRS[:2])
    data = DataConfig(
        train=(dev,),
        valid=(dev,),
        bidirectional=True,
        tags=TagPolicy(decoder="target"),
        vocabulary=VocabularyConfig(size=300),
        batch=BatchConfig(rows=4, source_length=16, target_length=16),
    )
    model = TransformerConfig(embed_dim=8, mlp_dim=16, num_heads=2, encoder_layers=1, decoder_layers=1)
    return Run(
        task=Translation(data, model, max_lines=0),
        optimizer=optax.sgd(0.1),
        steps=2,
        tensorboard=False,
        evaluation=EvaluationConfig(every=0),
        checkpoints=CheckpointConfig(every=1, keep_last=3),
    )


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Run, str, InitFrom | None]]:
    """The runs that stages would have executed: run, last part of its folder, where it starts."""
    calls = []

    def record(run, run_dir, *, config_text, cache_dir, init_from):
        calls.append((run, run_dir.rsplit("/out/", 1)[1], init_from))
        folder = RunFolder(run_dir)
        directions = dict.fromkeys(
            f"{first}-{second}"
            for corpus in run.task.data.train
            for first, second in (corpus.languages, corpus.languages[::-1])[: 1 + run.task.data.bidirectional]
        )
        folder.write_model({}, {}, tuple(directions), "")
        folder.vocabulary.mkdir(exist_ok=True)
        with CheckpointStore(folder.checkpoints) as store:
            for step in (1, 2):
                store.save(step, {"params": {"w": np.float32(step)}}, {})
        return {"steps": 2, "parameters": 1}

    monkeypatch.setattr(training, "execute", record)
    return calls


def made(tmp_path, *stages) -> dict[str, Artefact]:
    return execute(Pipeline(stages), tmp_path / "out")


def names(data: DataConfig) -> list[tuple[str, str, str | None]]:
    """Name, direction and marked side of the corpora."""
    return [(corpus.name, "-".join(corpus.languages), corpus.synthetic) for corpus in data.train]


def test_texts_take_the_place_of_the_run_s_own(run, asked, tmp_path):
    artefacts = made(tmp_path, TEXTS, Train("p1", run, corpora=("texts",), upsample={"texts": 2}))
    (done, folder, init_from), *_ = asked
    assert (folder, init_from) == ("p1/run", None)
    assert names(done.task.data) == [("a", "en-de", None), ("b", "en-cs", None)] * 2
    assert done.task.data.bidirectional
    assert with_data(done, run.task.data) == run
    assert artefacts["p1"].models == (Model(("en-de", "de-en", "en-cs", "cs-en"), (Weights("p1/run", 2),)),)


def test_without_stages_it_is_the_run_itself(run, asked, tmp_path):
    stage = Train("p1", run)
    assert stage.sources() == (*run.task.data.train, *run.task.data.valid)
    assert Train("p1", run, corpora=("texts",)).sources() == run.task.data.valid
    made(tmp_path, stage)
    assert asked[0][0] == run


def test_each_direction_gets_a_model_from_that_of_all(run, asked, tmp_path):
    first = Train("p1", run, corpora=("texts",))
    tuned = Train("p4", run, corpora=("texts",), init_from="p1", per_direction=True)
    again = Train("p5", run, corpora=("texts",), init_from="p4", per_direction=True, directions=("de-en",))
    artefacts = made(tmp_path, TEXTS, first, tuned, again)
    assert [folder for _, folder, _ in asked] == [
        *("p1/run", "p4/en-de", "p4/de-en", "p4/en-cs", "p4/cs-en", "p5/de-en")
    ]
    out = str(tmp_path / "out")
    assert all(init == InitFrom(f"{out}/p1/run", 2, False) for _, _, init in asked[1:5])
    assert asked[5][2] == InitFrom(f"{out}/p4/de-en", 2, False)
    backward = asked[2][0].task.data
    assert (backward.bidirectional, backward.bidirectional_steps) == (False, None)
    assert names(backward) == [("a", "de-en", None)]
    assert list(backward.train[0].pairs()) == [pair[::-1] for pair in PAIRS]
    assert list(backward.valid[0].pairs()) == [pair[::-1] for pair in PAIRS[:2]]
    assert asked[3][0].task.data.valid == ()
    assert asked[4][0].task.data.valid == ()
    assert artefacts["p4"].model_for("de-en") == Model(("de-en",), (Weights("p4/de-en", 2),))
    assert artefacts["p4"].directions == ("en-de", "de-en", "en-cs", "cs-en")


def test_a_language_model_reads_each_side_by_itself(run, asked, tmp_path):
    model = DecoderConfig(embed_dim=8, mlp_dim=16, num_heads=2, layers=1)
    lm_run = replace(run, task=LanguageModeling(run.task.data, model))
    lm = Train("lm", lm_run, corpora=("texts", "mono"), languages=("de",), vocabulary="p1")
    made(tmp_path, TEXTS, MONO, Train("p1", run, corpora=("texts",)), lm)
    data = asked[1][0].task.data
    assert [(corpus.name, corpus.languages) for corpus in data.train] == [
        ("a.de", ("de", "de")),
        ("c.de", ("de", "de")),
    ]
    assert list(data.train[1].pairs()) == [(pair[1], pair[1]) for pair in PAIRS]
    assert not data.bidirectional
    assert data.vocabulary.path == str(tmp_path / "out/p1/run/vocabulary")
    french = Train("lm2", lm.run, corpora=("texts", "mono"), languages=("fr",))
    with pytest.raises(UserError, match=r"stage 'lm2': no text is in fr \(Train\.languages\); there is en, de, cs"):
        made(tmp_path, TEXTS, MONO, french)


class Written(Given):
    """Makes what a model would have written: a corpus each way, each for one direction only."""

    def make(self, workspace):
        (text,) = super().make(workspace).corpora
        forward = replace(text, name="forward", synthetic="target", one_way=True)
        backward = TextFiles(
            "backward", text.languages[::-1], text.files[::-1], text.lines, synthetic="source", one_way=True
        )
        return Artefact("corpora", (forward, backward))


def test_texts_for_one_direction_are_not_read_in_the_other(run, asked, tmp_path):
    written = Written("written", texts=(("a", ("en", "de"), PAIRS),))
    stage = Train("p3", run, corpora=("texts", "written"), provenance=True)
    made(tmp_path, TEXTS, written, stage)
    data = asked[0][0].task.data
    assert names(data) == [
        *(("a", "en-de", None), ("a", "de-en", None), ("b", "en-cs", None), ("b", "cs-en", None)),
        *(("forward", "en-de", "target"), ("backward", "de-en", "source")),
    ]
    assert not data.bidirectional
    assert [corpus.languages for corpus in data.valid] == [("en", "de"), ("de", "en")]
    made(tmp_path / "plain", TEXTS, written, replace(stage, provenance=False))
    assert {marked for _, _, marked in names(asked[1][0].task.data)} == {None}
    switching = with_data(run, replace(run.task.data, bidirectional_steps=1))
    with pytest.raises(UserError, match="stage 'p3': bidirectional_steps changes the direction of every corpus"):
        made(tmp_path / "switching", TEXTS, written, replace(stage, run=switching))


def test_noisy_text_is_translated_from_and_never_into(run, asked, tmp_path):
    """Held out or learned from, for one model of all directions or one of each."""
    noisy = NoisyDev("noisy", ("texts",))
    held_out = Train("p1", run, corpora=("texts",), valid=("texts", "noisy"))
    learned = Train("p5", run, corpora=("noisy",), valid=("noisy",), per_direction=True, directions=("de-en",))
    made(tmp_path, TEXTS, noisy, held_out, learned)
    data = asked[0][0].task.data
    assert not data.bidirectional
    assert [(corpus.name, "-".join(corpus.languages)) for corpus in data.valid] == [
        *(("a", "en-de"), ("a", "de-en"), ("b", "en-cs"), ("b", "cs-en"), ("a.noisy.en-de", "en-de")),
        *(("a.noisy.de-en", "de-en"), ("b.noisy.en-cs", "en-cs"), ("b.noisy.cs-en", "cs-en")),
    ]
    assert [name for name, _, _ in names(data)] == ["a", "a", "b", "b"]
    data = asked[1][0].task.data
    assert names(data) == [("a.noisy.de-en", "de-en", None)]
    assert [corpus.name for corpus in data.valid] == ["a.noisy.de-en"]
    assert [target for _, target in data.train[0].pairs()] == [pair[0] for pair in PAIRS]


def test_a_reversed_pair_exchanges_its_marked_side(tmp_path):
    text = ParallelText(tsv_path="a.tsv", source_language="en", target_language="de", synthetic="source")
    there = training.reversed_corpus(text)
    assert (there.languages, there.source_column, there.synthetic) == (("de", "en"), 1, "target")
    assert training.reversed_corpus(there) == text
    lines = Lines("l", ("en", "de"), PAIRS)
    assert list(training.reversed_corpus(lines).pairs()) == [pair[::-1] for pair in PAIRS]
    assert training.reversed_corpus(lines).fingerprint() != lines.fingerprint()


def test_mistakes(run, asked, tmp_path):
    for fields, message in (
        ({"upsample": {"mono": 2}}, r"Train\.upsample"),
        ({"init_from": "a", "vocabulary": "b"}, "init_from brings its own vocabulary"),
        ({"keep_optimizer": True}, "keep_optimizer goes with init_from"),
        ({"directions": ("en-de",)}, "directions goes with per_direction"),
        ({"languages": ("en",)}, "languages is for language models"),
    ):
        with pytest.raises(UserError, match=message):
            Train("p1", run, **fields)
    with pytest.raises(UserError, match="'c' is monolingual"):
        made(tmp_path, MONO, Train("p1", run, corpora=("mono",)))
    with pytest.raises(UserError, match="the corpora have no direction de-cs; they have en-de"):
        made(tmp_path, TEXTS, Train("p2", run, corpora=("texts",), per_direction=True, directions=("de-cs",)))
    some = Train("p2", run, corpora=("texts",), per_direction=True, directions=("en-de",))
    trained = len(asked)
    with pytest.raises(UserError, match="'p2' has no single model for de-en"):
        made(tmp_path / "some", TEXTS, some, Train("p3", run, corpora=("texts",), init_from="p2", per_direction=True))
    assert len(asked) == trained + 1
    with pytest.raises(UserError, match="stage 'p3' reads models of 'texts', which makes corpora"):
        made(tmp_path, TEXTS, Train("p3", run, corpora=("texts",), init_from="texts"))
    with pytest.raises(UserError, match="stage 'p5' reads corpora of 'p4', which makes models"):
        made(tmp_path, Train("p4", run), Train("p5", run, corpora=("p4",)))


def test_an_interrupted_run_goes_on_and_gives_the_same_artefact(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    run = replace(run, steps=3)
    stages = (TEXTS, Train("p1", run, corpora=("texts",)))
    made(tmp_path / "whole", *stages)
    part = tmp_path / "part"
    real = training.execute

    def first_part(run, *arguments, **options):
        real(replace(run, steps=1), *arguments, **options)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(training, "execute", first_part)
        with pytest.raises(Interrupted):
            made(part, *stages)
    made(part, *stages)
    files = [folder / "out/p1/artefact.json" for folder in (tmp_path / "whole", part)]
    assert files[0].read_text() == files[1].read_text()
    assert '"p1/run:3"' in files[0].read_text()
    # A bit of the weights that is not as it was, or another checkpoint in their place, is found.
    assert [stage.problems for stage in audit(part / "out")] == [(), ()]
    with CheckpointStore(part / "out/p1/run/checkpoints") as store:
        weights = store.restore_params(3)
        store.discard_after(2)
        weights["decoder"]["final_norm"]["scale"] = np.nextafter(weights["decoder"]["final_norm"]["scale"], 2)
        store.save(3, {"params": weights}, {})
    assert audit(part / "out")[0].problems == ("p1/run:3 has changed",)
