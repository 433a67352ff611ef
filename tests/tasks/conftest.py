from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.corpora import LabelledText
from t5x_ext.data import RowConfig
from t5x_ext.models import EncoderConfig, init_params
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import adam
from t5x_ext.tasks import Classification
from t5x_ext.train import CheckpointConfig, EvaluationConfig, InitFrom, Run

GOOD, BAD = ("good", "fine", "great", "lovely"), ("bad", "poor", "awful", "dull")
FILLING = ("the", "a", "film", "was", "very", "it", "and", "plot")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLING]
ENCODER = EncoderConfig(
    vocab_size=len(PIECES),
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    layers=2,
    norm_placement="post",
    final_norm=False,
    activation="gelu",
    scale_embedding=False,
    dropout=0.0,
    max_positions=24,
    token_types=2,
    embedding_norm=True,
    scan_layers=True,
)


@pytest.fixture
def encoder(tmp_path) -> str:
    """A run folder with a small encoder of random weights and its tokenizer."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from t5x_ext.data import WordPiece

    folder = RunFolder(tmp_path / "encoder")
    tokenizer = WordPiece.from_vocabulary(PIECES)
    tokenizer.save(folder.path)
    with CheckpointStore(folder.checkpoints) as store:
        store.save(0, {"params": init_params(ENCODER, jax.random.key(0))})
        store.wait()
    record = {"model": ENCODER.to_json(), "tokenizer": tokenizer.fingerprint(), "pooling": "mean"}
    folder.write_record({"task": "encoder", **record})
    return str(folder.path)


def sentence(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    filling = list(rng.choice(FILLING, int(rng.integers(2, 6))))
    filling.insert(int(rng.integers(len(filling) + 1)), str(rng.choice(words)))
    return " ".join(filling)


@pytest.fixture
def sentiment(tmp_path) -> dict[str, LabelledText]:
    """Sentences with one word that decides their class: 200 to learn, 40 to measure on, 40 to test on."""
    rng, found = np.random.default_rng(0), {}
    for split, count in (("train", 200), ("valid", 40), ("test", 40)):
        lines = ["sentence\tkind"]
        for number in range(count):
            lines.append(f"{sentence(rng, GOOD if number % 2 else BAD)}\t{'good' if number % 2 else 'bad'}")
        Path(tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        found[split] = LabelledText(str(tmp_path / f"{split}.tsv"), "sentence", "kind")
    return found


@pytest.fixture
def classification_run(encoder, sentiment):
    """A run of a classification from the small encoder; fields of run and task replaced."""

    def make(steps=30, optimizer=None, task=None, **fields):
        changes = {
            "optimizer": optimizer or adam(1e-2),
            "init_from": InitFrom(encoder, only=("^(?!head/)",)),
            "objective": lambda model: LabelSmoothedCrossEntropy(model, label_smoothing=0.0),
            "evaluation": EvaluationConfig(every=0, metric="valid/accuracy", higher_is_better=True),
            "checkpoints": CheckpointConfig(every=0),
            "tensorboard": False,
            **fields,
        }
        whole = Classification(ENCODER, **sentiment, batch=RowConfig(4, 24, 3), pooling="mean")
        return Run(task=dataclasses.replace(whole, **(task or {})), steps=steps, **changes)

    return make
