from __future__ import annotations

import json

import numpy as np
import pytest

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["the", "a", "cat", "dog", "sat", "ran", "well", "badly", "very", "not", "good", "bad", "fine", "poor", "film"],
]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": len(PIECES),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}


def random_tensors(seed=0):
    """Tensors of a BERT by Hugging Face's names, [out, in]."""
    rng = np.random.default_rng(seed)
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for name, (size_in, out) in {
            **dict.fromkeys((f"attention.self.{one}" for one in ("query", "key", "value")), (width, width)),
            "attention.output.dense": (width, width),
            "intermediate.dense": (width, inner),
            "output.dense": (inner, width),
        }.items():
            shapes[f"{prefix}{name}.weight"] = (out, size_in)
            shapes[f"{prefix}{name}.bias"] = (out,)
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def bert_folder(tmp_path):
    """Writes a small BERT with random weights; fields of its config and tensors may be changed (None removes)."""
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")

    def write(name="bert", tensors=None, prefix="", **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
        found = {key: value for key, value in {**random_tensors(), **(tensors or {})}.items() if value is not None}
        numpy.save_file({prefix + key: value for key, value in found.items()}, folder / "model.safetensors")
        return folder

    return write
