"""BERT-like encoders from Hugging Face's files (config.json, model.safetensors, a tokenizer) as a run folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from t5x_ext.checkpoints import CheckpointStore, RunFolder, trees
from t5x_ext.contracts import Params, UserError
from t5x_ext.data.wordpiece import FILE, WordPiece
from t5x_ext.models import EncoderConfig

logger = logging.getLogger(__name__)

ENCODER_TASK = "encoder"
"""The task that the record of a folder with an imported encoder names."""

PACKAGE = "package:"
"""The beginning of a source that is an installed Python package with the files, or a zip of them, inside."""

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}

_UNUSED = ("pooler.", "cls.", "embeddings.position_ids", "classifier.")
"""Beginnings of names of tensors that an encoder does not read: heads of pretraining, and a table of 0, 1, 2, ..."""


@dataclass(frozen=True)
class BertFiles:
    """What the files of a model hold.

    Attributes:
      source: where they were read.
      config: of `config.json`.
      tensors: of `model.safetensors` by name, without the prefix `bert.`.
      tokenizer: the tokenizer.
      pooling: what `1_Pooling/config.json` says of the vector of a text, `first` or `mean`; None without that file.
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    tokenizer: WordPiece
    pooling: str | None = None


def read_bert(source: str) -> BertFiles:
    """Reads a model.

    Args:
      source: a folder, a zip archive, or `package:NAME` for an installed package that has either inside; the package
        is not imported.

    Raises:
      UserError: if there is no such source, a file is missing or damaged, or a library is not installed.
    """
    read = _reader(source)
    try:
        config = json.loads(_needed(read, "config.json", source))
    except ValueError as error:
        raise UserError(f"{source}: config.json is damaged: {error}") from error
    tensors = _tensors(_needed(read, "model.safetensors", source), source)
    pooling_file = read("1_Pooling/config.json")
    pooling = None
    if pooling_file is not None:
        pooling = "first" if json.loads(pooling_file).get("pooling_mode_cls_token") else "mean"
    return BertFiles(source, config, tensors, _tokenizer(read, source), pooling)


def encoder_config(files: BertFiles) -> EncoderConfig:
    """The config of the model.

    Raises:
      UserError: for what is no BERT, or a BERT that `Encoder` does not compute.
    """
    config, source = files.config, files.source
    if config.get("model_type") != "bert":
        raise UserError(f"{source}: config.json is of a {config.get('model_type')!r}; this reads 'bert'")
    if config.get("hidden_act") not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{source}: hidden_act is {config.get('hidden_act')!r}; there are {known}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{source}: position_embedding_type is {config['position_embedding_type']!r}, not 'absolute'")
    try:
        return EncoderConfig(
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            mlp_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            norm_placement="post",
            final_norm=False,
            norm_epsilon=config["layer_norm_eps"],
            activation=_ACTIVATIONS[config["hidden_act"]],  # type: ignore[arg-type]
            scale_embedding=False,
            dropout=config.get("hidden_dropout_prob", 0.1),
            attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
            max_positions=config["max_position_embeddings"],
            token_types=config["type_vocab_size"],
            embedding_norm=True,
        )
    except KeyError as error:
        raise UserError(f"{source}: config.json says nothing of {error}") from error


def encoder_params(files: BertFiles, config: EncoderConfig) -> Params:
    """The parameters of `Encoder(config)`, float32.

    Raises:
      UserError: if a tensor is missing, has another shape, or is not of such a model.
    """
    taken = _Tensors(files)
    layers = [_layer(taken, f"encoder.layer.{number}.", config) for number in range(config.layers)]
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    width = config.embed_dim
    tables = {
        "embedding": ("word_embeddings", config.vocab_size),
        "position_embedding": ("position_embeddings", config.max_positions),
        "type_embedding": ("token_type_embeddings", config.token_types),
    }
    leaves = {f"encoder/layers/{name}": leaf for name, leaf in stacked.items()}
    for name, (tensor, rows) in tables.items():
        leaves[f"{name}/table"] = taken(f"embeddings.{tensor}.weight", (rows or 0, width))
    leaves |= {f"embedding_norm/{name}": leaf for name, leaf in _norm(taken, "embeddings.LayerNorm", width).items()}
    taken.check_all()
    return trees.nested(dict(sorted(leaves.items())))


def import_encoder(source: str, run_dir: str) -> EncoderConfig:
    """Writes a model as a run folder: `InitFrom(run_dir)` starts from it, `t5x_ext.load(run_dir)` embeds texts.

    Args:
      source: see `read_bert`.
      run_dir: the folder to write; it must not hold a run yet.

    Raises:
      UserError: for a source that cannot be read, or a folder that is in use.
    """
    folder = RunFolder(run_dir)
    if folder.model_json.exists():
        raise UserError(f"{run_dir} holds a run already; give another folder")
    files = read_bert(source)
    config = encoder_config(files)
    params = encoder_params(files, config)
    files.tokenizer.save(folder.path)
    with CheckpointStore(folder.checkpoints) as store:
        store.save(0, {"params": params})
        store.wait()
    record = {"model": config.to_json(), "tokenizer": files.tokenizer.fingerprint(), "pooling": files.pooling or "mean"}
    folder.write_record({"task": ENCODER_TASK, **record, "source": source})
    return config


class _Tensors:
    """Tensors by name, each to be taken once."""

    def __init__(self, files: BertFiles):
        self._files, self._left = files, dict(files.tensors)

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, as float32; LayerNorm's weights are called gamma and beta in old files."""
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        found = name if name in self._left else old
        if found not in self._left:
            raise UserError(f"{self._files.source}: model.safetensors has no tensor {name}, which its config asks for")
        tensor = np.asarray(self._left.pop(found), np.float32)
        if tensor.shape != shape:
            raise UserError(
                f"{self._files.source}: {name} has the shape {tensor.shape}, not {shape} as config.json says"
            )
        return tensor

    def check_all(self) -> None:
        """Refuses tensors that nothing has taken, but for those of heads of pretraining."""
        unknown = sorted(name for name in self._left if not name.startswith(_UNUSED))
        if unknown:
            raise UserError(
                f"{self._files.source}: the tensor {unknown[0]} is of no BERT encoder ({len(unknown)} such)"
            )
        if self._left:
            logger.info("%s: not read: %s", self._files.source, ", ".join(sorted(self._left)))


def _layer(taken: _Tensors, prefix: str, config: EncoderConfig) -> dict[str, np.ndarray]:
    """The parameters of one layer by their names in it. Tensors of Hugging Face are [out, in]."""
    width, inner = config.embed_dim, config.mlp_dim
    heads = (config.num_heads, config.head_dim)
    leaves: dict[str, np.ndarray] = {}

    def projection(name: str, tensor: str, into: tuple[int, ...], out: tuple[int, ...]) -> None:
        size_in, size_out = int(np.prod(into)), int(np.prod(out))
        kernel = taken(f"{prefix}{tensor}.weight", (size_out, size_in))
        leaves[f"{name}/kernel"] = np.ascontiguousarray(kernel.T).reshape(*into, *out)
        leaves[f"{name}/bias"] = taken(f"{prefix}{tensor}.bias", (size_out,)).reshape(out)

    for name in ("query", "key", "value"):
        projection(f"self_attention/{name}", f"attention.self.{name}", (width,), heads)
    projection("self_attention/out", "attention.output.dense", heads, (width,))
    projection("feed_forward/up", "intermediate.dense", (width,), (inner,))
    projection("feed_forward/down", "output.dense", (inner,), (width,))
    for sublayer, tensor in (("self_attention", "attention.output"), ("feed_forward", "output")):
        for name, leaf in _norm(taken, f"{prefix}{tensor}.LayerNorm", width).items():
            leaves[f"{sublayer}_residual/norm/{name}"] = leaf
    return leaves


def _norm(taken: _Tensors, tensor: str, width: int) -> dict[str, np.ndarray]:
    return {"scale": taken(f"{tensor}.weight", (width,)), "bias": taken(f"{tensor}.bias", (width,))}


def _tensors(content: bytes, source: str) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise UserError(f"{source} needs safetensors: pip install 't5x_ext[pretrained]' ({error})") from error
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{source}: model.safetensors is damaged: {error}") from error
    # Models with a head of pretraining or of classification keep the encoder under `bert.`.
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def _tokenizer(read: Callable[[str], bytes | None], source: str) -> WordPiece:
    definition, vocabulary = read(FILE), read("vocab.txt")
    if definition is not None:
        return WordPiece(definition.decode(), f"{source}: {FILE}")
    if vocabulary is None:
        raise UserError(f"{source} has no tokenizer: neither {FILE} nor vocab.txt")
    settings = json.loads(read("tokenizer_config.json") or b"{}")
    return WordPiece.from_vocabulary(vocabulary.decode().splitlines(), settings.get("do_lower_case", True))


def _needed(read: Callable[[str], bytes | None], name: str, source: str) -> bytes:
    content = read(name)
    if content is None:
        raise UserError(f"{source} has no {name}; give a folder or a zip archive with the files of a model")
    return content


def _reader(source: str) -> Callable[[str], bytes | None]:
    """From the name of a file to its content, None if there is none."""
    path = _in_package(source) if source.startswith(PACKAGE) else epath.Path(source)
    if not path.exists():
        raise UserError(f"{source} does not exist; give a folder, a zip archive, or {PACKAGE}NAME")
    if path.is_dir():
        return lambda name: (path / name).read_bytes() if (path / name).exists() else None
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{source} is neither a folder nor a zip archive") from error
    top = next((name.removesuffix("config.json") for name in names if name in _configs(names)), "")

    def read(name: str) -> bytes | None:
        if top + name not in names:
            return None
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.read(top + name)

    return read


def _configs(names: list[str]) -> list[str]:
    """Paths of the outermost config.json of an archive."""
    found = [name for name in names if name.split("/")[-1] == "config.json"]
    return sorted(found, key=lambda name: name.count("/"))[:1]


def _in_package(source: str) -> epath.Path:
    """Where in an installed package the files are; the package is found, not imported."""
    name = source.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{source}: no package {name!r} is installed")
    folder = epath.Path(next(iter(spec.submodule_search_locations)))
    if (folder / "config.json").exists():
        return folder
    archives = sorted(path for path in folder.iterdir() if path.suffix == ".zip")
    if not archives:
        raise UserError(f"{source}: the package has neither config.json nor a zip archive")
    return archives[0]
