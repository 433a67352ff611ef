"""The one description of a model: sizes and switches, and the operations that follow from them.

`LayerConfig` is what layers read. Four models are built from the same layers, each with a config of its own:
`TransformerConfig` (encoder and decoder), `ParallelConfig` (whose decoder writes all tokens at once), `DecoderConfig`
(a language model) and `EncoderConfig` (an encoder alone).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

from t5x_ext.contracts import UserError
from t5x_ext.models.sharing import LayerSharing

NormPlacement = Literal["pre", "post"]
NormKind = Literal["layernorm", "rmsnorm"]
TiedEmbeddings = Literal["all", "decoder", "none"]
ComputeDtype = Literal["float32", "bfloat16"]
ActivationName = Literal["relu", "gelu"]
DecoderInput = Literal["copy", "unknown"]
Remat = Literal["none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"]

Config = TypeVar("Config", bound="LayerConfig")

Lengths = Sequence[int] | Sequence[float] | np.ndarray
"""Tokens of each example."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm_placement": get_args(NormPlacement),
    "norm": get_args(NormKind),
    "activation": get_args(ActivationName),
    "tied_embeddings": get_args(TiedEmbeddings),
    "compute_dtype": get_args(ComputeDtype),
    "remat": get_args(Remat),
}
_SIZES = ("vocab_size", "embed_dim", "mlp_dim", "num_heads")
_RATES = ("dropout", "attention_dropout", "activation_dropout")
_SWITCHES = ("final_norm", "use_bias", "scale_embedding", "scan_layers", "embedding_norm")


@dataclass(frozen=True)
class LayerConfig:
    """What every Transformer layer, and the embedding before the first one, is told.

    Attributes:
      vocab_size: tokens of the vocabulary; training replaces it by the size of the vocabulary it uses.
      embed_dim: width of the residual stream, d.
      mlp_dim: inner width of the feed-forward sub-layer, f.
      num_heads: attention heads; must divide `embed_dim`.
      norm_placement: `pre` normalises the input of a sub-layer, `post` the sum after it.
      final_norm: one more norm after each stack; usual with `pre`.
      norm: `layernorm` (scale, and bias when `use_bias`) or `rmsnorm` (scale only, no mean).
      norm_epsilon: added to the variance.
      use_bias: biases in projections and in LayerNorm. The output projection never has one.
      activation: of the feed-forward sub-layers; `gelu` is exact (by the error function), as in BERT.
      scale_embedding: multiply embeddings by sqrt(embed_dim).
      dropout: after embedding plus positions and after each sub-layer, before the residual sum (as fairseq places it).
      attention_dropout: on attention weights.
      activation_dropout: on the inner activations of the feed-forward sub-layer.
      compute_dtype: dtype of activations and matrix products. Parameters, norms, softmax and logits are float32.
      scan_layers: execute a stack with one `lax.scan` per run of the layer map instead of unrolled: compiles in time
        independent of depth. Parameters and results are the same either way.
      remat: what the backward pass recomputes per layer: `none` nothing, `full` everything, otherwise the policy of
        that name in `jax.checkpoint_policies`.

    Raises:
      UserError: at construction, for values of the wrong type, outside their range, or that do not fit each other.
    """

    kind: ClassVar[str] = "layers"
    """Name of the config in `model.json`."""

    stacks: ClassVar[Mapping[str, str]] = {}
    """The field with the positions of a stack -> the field with its sharing."""

    vocab_size: int = 32768
    embed_dim: int = 512
    mlp_dim: int = 2048
    num_heads: int = 8
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    norm: NormKind = "layernorm"
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    activation: ActivationName = "relu"
    scale_embedding: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    compute_dtype: ComputeDtype = "float32"
    scan_layers: bool = False
    remat: Remat = "none"

    def __post_init__(self) -> None:
        own = {item.name for item in dataclasses.fields(self)}
        for name in (*_SIZES, *self.stacks):
            _require(self, name, _is_integer(getattr(self, name)) and getattr(self, name) > 0, "a positive integer")
        for name in _RATES:
            _require(self, name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in (name for name in _SWITCHES if name in own):
            _require(self, name, isinstance(getattr(self, name), bool), "True or False")
        for name in (name for name in _CHOICES if name in own):
            _require(self, name, getattr(self, name) in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}")
        _require(self, "norm_epsilon", _is_number(self.norm_epsilon) and self.norm_epsilon > 0, "a positive number")
        _require(self, "embed_dim", self.embed_dim % 2 == 0, "even, for sine and cosine positions")
        _require(self, "num_heads", self.embed_dim % self.num_heads == 0, f"a divisor of embed_dim={self.embed_dim}")
        for layers, sharing in self.stacks.items():
            _require(self, sharing, isinstance(getattr(self, sharing), LayerSharing), "a LayerSharing")
            getattr(self, sharing).num_sets(getattr(self, layers))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    def shallow(self: Config) -> Config:
        """The same model with one layer a stack."""
        changes: dict[str, Any] = dict.fromkeys(self.stacks, 1) | dict.fromkeys(self.stacks.values(), LayerSharing())
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The kind and the fields as nested dictionaries that JSON can hold; `config_from_json` reads them."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """The config of a `to_json` dictionary of this kind; missing fields take their defaults.

        Raises:
          UserError: for another kind, an unknown field or a value that is not allowed.
        """
        values = dict(fields)
        kind = values.pop("kind", cls.kind)
        if kind != cls.kind:
            raise UserError(f"model: the record is of the kind {kind!r}, not {cls.kind!r}")
        for name in cls.stacks.values():
            if isinstance(values.get(name), Mapping):
                values[name] = _build(LayerSharing, values[name], name)
        config: Config = _build(cls, values, "model")
        return config

    def _layer_flops(self, tokens: np.ndarray) -> np.ndarray:
        """Operations of one layer's projections in self-attention and feed-forward, each example."""
        return 2 * tokens * (4 * self.embed_dim**2 + 2 * self.embed_dim * self.mlp_dim)

    def _causal_flops(self, tokens: np.ndarray) -> np.ndarray:
        """Operations of causal self-attention in one layer over its T(T+1)/2 pairs, each example."""
        return 2 * tokens * (tokens + 1) * self.embed_dim


@dataclass(frozen=True)
class TransformerConfig(LayerConfig):
    """An encoder-decoder Transformer (Vaswani et al., arXiv 1706.03762) in the variants of the translation literature.

    Attributes:
      encoder_layers: positions of the encoder stack, N (not parameter sets).
      decoder_layers: positions of the decoder stack.
      encoder_sharing: which parameter set each encoder position uses.
      decoder_sharing: which parameter set each decoder position uses.
      tied_embeddings: `all` is one table for source, target and output; `decoder` one for source and one for target
        and output; `none` three.

    The other attributes, and errors, are those of `LayerConfig`.
    """

    kind: ClassVar[str] = "encoder_decoder"
    stacks: ClassVar[Mapping[str, str]] = {"encoder_layers": "encoder_sharing", "decoder_layers": "decoder_sharing"}

    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_sharing: LayerSharing = field(default_factory=LayerSharing)
    decoder_sharing: LayerSharing = field(default_factory=LayerSharing)
    tied_embeddings: TiedEmbeddings = "all"

    def __post_init__(self) -> None:
        if _is_integer(self.encoder_layers) and self.encoder_layers == 0:
            raise UserError(
                f"{type(self).__name__}.encoder_layers is 0; a language model is a DecoderConfig(layers=..., "
                "sharing=...), an encoder-decoder has 1 or more"
            )
        super().__post_init__()

    def flops(self, source_lengths: Lengths, target_lengths: Lengths) -> float:
        """Floating point operations of one forward pass over real tokens, 2 per multiply-add.

        Matrix products only. Examples attend to themselves alone, in any row; causal
        self-attention counts its T(T+1)/2 pairs; keys and values of cross-attention are computed per source token.

        Args:
          source_lengths: tokens of each example's encoder input.
          target_lengths: tokens of each example's decoder input, aligned with `source_lengths`.
        """
        s, t = np.asarray(source_lengths, np.float64), np.asarray(target_lengths, np.float64)
        d = self.embed_dim
        encoder = self._layer_flops(s) + 4 * s * s * d
        cross_attention = 4 * t * d * d + 4 * s * d * d + 4 * t * s * d
        decoder = self._layer_flops(t) + self._causal_flops(t) + cross_attention
        output = 2 * t * d * self.vocab_size
        return float(np.sum(self.encoder_layers * encoder + self.decoder_layers * decoder + output))


@dataclass(frozen=True)
class ParallelConfig(TransformerConfig):
    """An encoder-decoder that writes all tokens at once (Gu et al., arXiv 1711.02281; GLAT, arXiv 2008.07905).

    Attributes:
      decoder_input: what the decoder reads: `copy` spreads the source's embeddings evenly over the target's positions
        (`parallel_decoder.uniform_copy`); `unknown` is the embedding of the unknown token everywhere.
      max_target_length: classes of the length head, in tokens, end of sentence included; longer targets count as
        `max_target_length - 1`.
      upsample: None: the encoder predicts the target's length. A number: there is no length head, and the decoder has
        so many positions for each source token; for CTC, which needs at least as many as the target has tokens.
      auxiliary_layers: layers of a second decoder, used in training only, that reads the decoder's input without
        revealed tokens (ParaGen's GLAT with an auxiliary decoder has 2); 0: there is none.
      unk_id: the unknown token, which is also CTC's blank; training replaces it by that of the vocabulary it uses.

    The other attributes, and errors, are those of `TransformerConfig`.
    """

    kind: ClassVar[str] = "parallel"

    decoder_input: DecoderInput = "copy"
    max_target_length: int = 256
    upsample: int | None = None
    auxiliary_layers: int = 0
    unk_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = lambda value, least: _is_integer(value) and value >= least
        _require(self, "decoder_input", self.decoder_input in get_args(DecoderInput), "copy or unknown")
        _require(self, "max_target_length", at_least(self.max_target_length, 2), "an integer, 2 or more")
        _require(self, "upsample", self.upsample is None or at_least(self.upsample, 1), "a positive integer, or None")
        for name in ("auxiliary_layers", "unk_id"):
            _require(self, name, at_least(getattr(self, name), 0), "an integer, 0 or more")
        if self.upsample is not None and self.auxiliary_layers:
            raise UserError("ParallelConfig.auxiliary_layers goes with a length head, not with upsample")

    def flops(self, source_lengths: Lengths, target_lengths: Lengths) -> float:
        """Floating point operations of one forward pass, see `TransformerConfig.flops`.

        The decoder's self-attention counts all T * T pairs, and with `upsample` T follows from the source. The second
        decoder counts; the additional pass of glancing, which has no gradient, does not.
        """
        s, t = np.asarray(source_lengths, np.float64), np.asarray(target_lengths, np.float64)
        t = t if self.upsample is None else self.upsample * s
        d = self.embed_dim
        later_pairs = self.decoder_layers * 2 * t * (t - 1) * d
        cross_attention = 4 * t * d * d + 4 * s * d * d + 4 * t * s * d
        auxiliary = self.auxiliary_layers * (self._layer_flops(t) + 4 * t * t * d + cross_attention)
        second_output = 2 * t * d * self.vocab_size if self.auxiliary_layers else 0 * t
        length_head = 2 * d * self.max_target_length if self.upsample is None else 0
        return super().flops(s, t) + float(np.sum(later_pairs + auxiliary + second_output + length_head))


@dataclass(frozen=True)
class DecoderConfig(LayerConfig):
    """A language model: the layers of an encoder-decoder's encoder, in which no token sees a later one.

    Attributes:
      layers: positions of the stack, N (not parameter sets).
      sharing: which parameter set each position uses.
      tied_embeddings: `all` or `decoder` is one table for input and output, called `embedding` and `target_embedding`
        as in an encoder-decoder; `none` two.

    The other attributes, and errors, are those of `LayerConfig`.
    """

    kind: ClassVar[str] = "decoder"
    stacks: ClassVar[Mapping[str, str]] = {"layers": "sharing"}

    layers: int = 6
    sharing: LayerSharing = field(default_factory=LayerSharing)
    tied_embeddings: TiedEmbeddings = "all"

    def flops(self, lengths: Lengths) -> float:
        """Floating point operations of one forward pass, see `TransformerConfig.flops`; `lengths` in tokens."""
        tokens = np.asarray(lengths, np.float64)
        layer = self._layer_flops(tokens) + self._causal_flops(tokens)
        return float(np.sum(self.layers * layer + 2 * tokens * self.embed_dim * self.vocab_size))


@dataclass(frozen=True)
class EncoderConfig(LayerConfig):
    """An encoder alone: every token sees all tokens of its example (Devlin et al., BERT, arXiv 1810.04805).

    The defaults are those of this package's encoder-decoders; BERT's are in the preset `MiniLM`.

    Attributes:
      layers: positions of the stack, N (not parameter sets).
      sharing: which parameter set each position uses.
      max_positions: rows of a learned table of positions; None: sines and cosines.
      token_types: rows of a learned table of token types (BERT's segments A and B), added to embeddings; 0: none.
      embedding_norm: a norm of the sum of embeddings, before dropout.

    The other attributes, and errors, are those of `LayerConfig`.
    """

    kind: ClassVar[str] = "encoder"
    stacks: ClassVar[Mapping[str, str]] = {"layers": "sharing"}

    layers: int = 6
    sharing: LayerSharing = field(default_factory=LayerSharing)
    max_positions: int | None = None
    token_types: int = 0
    embedding_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positions, types = self.max_positions, self.token_types
        learned = positions is None or (_is_integer(positions) and positions > 0)
        _require(self, "max_positions", learned, "a positive integer, or None for sines and cosines")
        _require(self, "token_types", _is_integer(types) and types >= 0, "a positive integer, or 0 for none")

    def flops(self, lengths: Lengths) -> float:
        """Floating point operations of one forward pass without an output projection, see `TransformerConfig.flops`."""
        tokens = np.asarray(lengths, np.float64)
        return float(np.sum(self.layers * (self._layer_flops(tokens) + 4 * tokens * tokens * self.embed_dim)))


CONFIGS: tuple[type[LayerConfig], ...] = (TransformerConfig, ParallelConfig, DecoderConfig, EncoderConfig)
"""The configs of models."""


def config_from_json(fields: Mapping[str, Any]) -> TransformerConfig | DecoderConfig | EncoderConfig:
    """The config of a `to_json` dictionary, of the kind that it names.

    Records without a kind are of the time when a `TransformerConfig` with `encoder_layers=0` was a language model.

    Raises:
      UserError: for an unknown kind or field, or a value that is not allowed.
    """
    kinds = {config.kind: config for config in CONFIGS}
    kind = fields.get("kind", TransformerConfig.kind)
    if kind not in kinds:
        raise UserError(f"model: unknown kind {kind!r}; this version knows {', '.join(kinds)}")
    if "kind" not in fields and fields.get("encoder_layers") == 0:
        own = {name: value for name, value in fields.items() if not name.startswith(("encoder_", "decoder_"))}
        renamed = {name: fields[f"decoder_{name}"] for name in ("layers", "sharing") if f"decoder_{name}" in fields}
        return DecoderConfig.from_json(own | renamed)
    config: Any = kinds[kind].from_json(fields)
    return config


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    known = [item.name for item in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r} of {cls.__name__}; it has {', '.join(known)}")
    return cls(**values)


def _require(config: LayerConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it must be {allowed}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
