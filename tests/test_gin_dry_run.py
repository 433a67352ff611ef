"""Every packaged gin file, dry: built into a run whose update is traced at its real shapes. Nothing is computed."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from t5x_ext.cli.flags import parse
from t5x_ext.cli.gin_read import gin_root
from t5x_ext.cli.run_flags import DEFAULT_RUN, define_run_flags, run_from_flags
from t5x_ext.contracts import Batch
from t5x_ext.models import EncoderDecoder, init_params
from t5x_ext.train import Run, create_state, make_train_step

FILES = sorted(path.relative_to(gin_root()).as_posix() for path in gin_root().rglob("*.gin"))
RUNS = [name for name in FILES if name.startswith("runs/")]
FRAGMENTS = [name for name in FILES if name not in RUNS]
TWO_FILES = ["--train_source=a.en", "--train_target=a.de", "--source_language=en", "--target_language=de"]


def build(*names: str) -> Run:
    """The run of these files; the packaged default run takes its text from flags, as it is used."""
    needs_text = DEFAULT_RUN in names and not any(name.startswith("data/") for name in names)
    flags = [*(f"--gin_file={name}" for name in names), *(TWO_FILES if needs_text else [])]
    return run_from_flags(parse(define_run_flags, flags))[0]


def trace(run: Run) -> None:
    """Traces one update; what comes out must be a state like the one that went in."""
    config = dataclasses.replace(run.model, vocab_size=run.data.vocabulary.size)
    step = make_train_step(
        run.objective(EncoderDecoder(config)),
        run.optimizer,
        run.accumulator,
        seed=run.seed,
        num_microbatches=run.num_microbatches,
        ema_decay=run.ema_decay,
    )
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params()
    state = jax.eval_shape(partial(create_state, optimizer=run.optimizer, with_ema=run.ema_decay is not None), params)
    shape = run.data.batch
    lengths = {"source": shape.source_length, "target": shape.target_length}
    batch = {
        name: jax.ShapeDtypeStruct((shape.rows, lengths[name.partition("_")[0]]), jnp.int32)
        for name in Batch.__annotations__
    }
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(kind, after) == jax.tree.map(kind, state)
    assert metrics.loss.sum.shape == ()


@pytest.fixture(autouse=True)
def without_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder without any text; empty files stand where a run looks for files of a folder by their names."""
    (tmp_path / "here").mkdir()
    multi30k = tmp_path / "shared/data/multi30k"
    multi30k.mkdir(parents=True)
    for stem in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            (multi30k / f"{stem}.{language}").touch()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_take_a_step(name):
    trace(build(name))


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_fragment_goes_with_the_default_run(name):
    run, plain = build(DEFAULT_RUN, name), build(DEFAULT_RUN)
    if name.startswith("data/"):
        assert run.data != plain.data
        assert run.model == plain.model
    elif name.startswith("models/"):
        # Scanned, so that tracing a deep model is not what this test spends its time on.
        trace(dataclasses.replace(run, model=dataclasses.replace(run.model, scan_layers=True)))
    assert run.steps == plain.steps
