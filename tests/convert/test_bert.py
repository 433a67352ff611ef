"""Imported encoders against a forward pass written in NumPy, a published model against published numbers, mistakes."""

from __future__ import annotations

import importlib.util
import zipfile

import numpy as np
import pytest
from scipy.special import erf, softmax

import t5x_ext
from t5x_ext.checkpoints import RunFolder
from t5x_ext.contracts import UserError
from t5x_ext.convert import encoder_config, import_encoder, read_bert

MINILM = "all_minilm_l6_v2"
LINES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
COSINES = (0.6660, 0.1046, 0.1411)
"""Of lines 1 and 2, 1 and 3, 2 and 3, as the documentation of sentence-transformers gives them."""


def reference(files, lines):
    """Sentence vectors in float64: one line at a time, without padding."""
    t = {name: np.asarray(tensor, np.float64) for name, tensor in files.tensors.items()}
    config, vectors = files.config, []
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * t[f"{name}.weight"] + t[f"{name}.bias"]

    for tokens in files.tokenizer.encode([(line,) for line in lines], 256):
        x = t["embeddings.word_embeddings.weight"][tokens.ids] + t["embeddings.token_type_embeddings.weight"][0]
        x = norm(x + t["embeddings.position_embeddings.weight"][: len(x)], "embeddings.LayerNorm")
        for layer in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}."
            split = lambda y: y.reshape(len(y), heads, -1).swapaxes(0, 1)
            q, k, v = (split(linear(x, f"{prefix}attention.self.{one}")) for one in ("query", "key", "value"))
            weights = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), axis=-1)
            read = (weights @ v).swapaxes(0, 1).reshape(x.shape)
            x = norm(x + linear(read, f"{prefix}attention.output.dense"), f"{prefix}attention.output.LayerNorm")
            inner = linear(x, f"{prefix}intermediate.dense")
            inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
            x = norm(x + linear(inner, f"{prefix}output.dense"), f"{prefix}output.LayerNorm")
        vectors.append(x.mean(0) / np.linalg.norm(x.mean(0)))
    return np.array(vectors)


TEXTS = ["the cat sat", "a very good film", "", "the dog ran badly not well the dog ran badly not well"]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_vectors_are_those_of_an_independent_computation(bert_folder, tmp_path, prefix):
    source = str(bert_folder(prefix=prefix))
    config = import_encoder(source, str(tmp_path / "run"))
    assert (config.layers, config.embed_dim, config.max_positions) == (2, 16, 20)
    vectors = t5x_ext.load(str(tmp_path / "run")).encode(TEXTS)
    np.testing.assert_allclose(vectors, reference(read_bert(source), TEXTS), atol=2e-6)


def test_an_archive_and_old_names_of_norms(bert_folder, tmp_path):
    folder = bert_folder()
    tensors = read_bert(str(folder)).tensors
    old = {name: None for name in tensors if "LayerNorm" in name}
    old |= {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensors[name]
        for name in list(old)
    }
    renamed = bert_folder("old", tensors=old)
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in renamed.iterdir():
            file.write(path, f"model/{path.name}")
    import_encoder(str(archive), str(tmp_path / "run"))
    vectors = t5x_ext.load(str(tmp_path / "run")).encode(TEXTS)
    np.testing.assert_allclose(vectors, reference(read_bert(str(folder)), TEXTS), atol=2e-6)


def test_a_folder_tells_what_it_holds(bert_folder, tmp_path):
    import_encoder(str(bert_folder()), str(tmp_path / "run"))
    record = RunFolder(tmp_path / "run").read_record()
    assert record["task"] == "encoder"
    assert record["pooling"] == "mean"
    with pytest.raises(UserError, match="holds a run already; give another folder"):
        import_encoder(str(tmp_path / "bert"), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"config.json is of a 'gpt2'; this reads 'bert'"),
        ({"hidden_act": "gelu_new"}, r"hidden_act is 'gelu_new'; there are gelu, relu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', not 'absolute'"),
        ({"hidden_size": None}, r"config.json says nothing of 'hidden_size'"),
        ({"num_hidden_layers": 3}, r"has no tensor encoder.layer.2.attention.self.query.weight, which its config"),
        ({"num_hidden_layers": 1}, r"the tensor encoder.layer.1.attention.output.LayerNorm.bias is of no BERT"),
        ({"vocab_size": 7}, r"embeddings.word_embeddings.weight has the shape \(19, 16\), not \(7, 16\)"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_one_line(bert_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        import_encoder(str(bert_folder(**changes)), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_sources_that_cannot_be_read_are_refused_in_one_line(bert_folder, tmp_path):
    folder = bert_folder()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        read_bert(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors; give a folder or a zip archive"):
        read_bert(str(folder))
    with pytest.raises(UserError, match="does not exist; give a folder, a zip archive, or package:NAME"):
        read_bert(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is neither a folder nor a zip archive"):
        read_bert(str(tmp_path / "file"))
    with pytest.raises(UserError, match="no package 'not_there' is installed"):
        read_bert("package:not_there")
    with pytest.raises(UserError, match=r"the package has neither config.json nor a zip archive"):
        read_bert("package:t5x_ext")


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"the package {MINILM} is not installed")
def test_a_published_model_gives_its_published_similarities(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    files = read_bert(f"package:{MINILM}")
    assert encoder_config(files).layers == 6
    import_encoder(f"package:{MINILM}", str(tmp_path / "run"))
    vectors = t5x_ext.load(str(tmp_path / "run")).encode(LINES)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose((cosines[0, 1], cosines[0, 2], cosines[1, 2]), COSINES, atol=1e-4)
    np.testing.assert_allclose(vectors, reference(files, LINES), atol=2e-6)
