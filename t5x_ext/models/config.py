"""The one description of a model: sizes and switches, and the parameters and operations that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from t5x_ext.contracts import UserError
from t5x_ext.models.sharing import LayerSharing

NormPlacement = Literal["pre", "post"]
NormKind = Literal["layernorm", "rmsnorm"]
TiedEmbeddings = Literal["all", "decoder", "none"]
ComputeDtype = Literal["float32", "bfloat16"]
ActivationName = Literal["relu", "gelu"]
Remat = Literal["none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm_placement": get_args(NormPlacement),
    "norm": get_args(NormKind),
    "activation": get_args(ActivationName),
    "tied_embeddings": get_args(TiedEmbeddings),
    "compute_dtype": get_args(ComputeDtype),
    "remat": get_args(Remat),
}
_SIZES = ("vocab_size", "embed_dim", "mlp_dim", "num_heads", "decoder_layers")
_RATES = ("dropout", "attention_dropout", "activation_dropout")
_SWITCHES = ("final_norm", "use_bias", "scale_embedding", "scan_layers")


@dataclass(frozen=True)
class TransformerConfig:
    """An encoder-decoder Transformer (Vaswani et al., arXiv 1706.03762) in the variants of the translation literature.

    With `encoder_layers=0` it is a decoder alone, without cross-attention: a language model of the target side, which
    does not read the source.

    Attributes:
      vocab_size: pieces of the joint vocabulary; training replaces it by the size of the vocabulary it uses.
      embed_dim: width of the residual stream, d.
      mlp_dim: inner width of the feed-forward sub-layer, f.
      num_heads: attention heads; must divide `embed_dim`.
      encoder_layers: positions of the encoder stack, N (not parameter sets); 0: a language model.
      decoder_layers: positions of the decoder stack.
      encoder_sharing: which parameter set each encoder position uses.
      decoder_sharing: which parameter set each decoder position uses.
      norm_placement: `pre` normalises the input of a sub-layer, `post` the sum after it.
      final_norm: one more norm after each stack; usual with `pre`.
      norm: `layernorm` (scale, and bias when `use_bias`) or `rmsnorm` (scale only, no mean).
      norm_epsilon: added to the variance.
      use_bias: biases in projections and in LayerNorm. The output projection never has one.
      activation: of the feed-forward sub-layers.
      tied_embeddings: `all` is one table for source, target and output; `decoder` one for source and one for target
        and output; `none` three. A language model has no table for the source.
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

    vocab_size: int = 32768
    embed_dim: int = 512
    mlp_dim: int = 2048
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_sharing: LayerSharing = field(default_factory=LayerSharing)
    decoder_sharing: LayerSharing = field(default_factory=LayerSharing)
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    norm: NormKind = "layernorm"
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    activation: ActivationName = "relu"
    tied_embeddings: TiedEmbeddings = "all"
    scale_embedding: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    compute_dtype: ComputeDtype = "float32"
    scan_layers: bool = False
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in _SIZES:
            _require(self, name, _is_integer(getattr(self, name)) and getattr(self, name) > 0, "a positive integer")
        layers = self.encoder_layers
        _require(self, "encoder_layers", _is_integer(layers) and layers >= 0, "a positive integer, or 0 for no encoder")
        for name in _RATES:
            _require(self, name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in _SWITCHES:
            _require(self, name, isinstance(getattr(self, name), bool), "True or False")
        for name, choices in _CHOICES.items():
            _require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("encoder_sharing", "decoder_sharing"):
            _require(self, name, isinstance(getattr(self, name), LayerSharing), "a LayerSharing")
        _require(self, "norm_epsilon", _is_number(self.norm_epsilon) and self.norm_epsilon > 0, "a positive number")
        _require(self, "embed_dim", self.embed_dim % 2 == 0, "even, for sine and cosine positions")
        _require(self, "num_heads", self.embed_dim % self.num_heads == 0, f"a divisor of embed_dim={self.embed_dim}")
        if self.has_encoder:
            self.encoder_sharing.num_sets(self.encoder_layers)
        self.decoder_sharing.num_sets(self.decoder_layers)

    @property
    def has_encoder(self) -> bool:
        """Whether there is an encoder and attention to it; False for a language model."""
        return self.encoder_layers > 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    def num_params(self) -> int:
        """Parameters of the initialised model: M sets a stack, whatever the number of positions.

        With biases and LayerNorm an encoder set has 4d^2 + 4d + 2df + f + d + 4d, a decoder set
        8d^2 + 8d + 2df + f + d + 6d, the final norms 4d, each table V d.
        """
        d, f = self.embed_dim, self.mlp_dim
        norm = d * (2 if self.norm == "layernorm" and self.use_bias else 1)
        attention = 4 * d * d + 4 * d * self.use_bias
        feed_forward = 2 * d * f + (f + d) * self.use_bias
        layer, cross = attention + feed_forward + 2 * norm, attention + norm
        stacks = self.decoder_sharing.num_sets(self.decoder_layers) * (layer + cross * self.has_encoder)
        tables = {"all": 1, "decoder": 1, "none": 2}[self.tied_embeddings]
        if self.has_encoder:
            stacks += self.encoder_sharing.num_sets(self.encoder_layers) * layer
            tables += self.tied_embeddings != "all"
        return stacks + (1 + self.has_encoder) * norm * self.final_norm + tables * self.vocab_size * d

    def flops(self, source_lengths: Sequence[int] | np.ndarray, target_lengths: Sequence[int] | np.ndarray) -> float:
        """Floating point operations of one forward pass over real tokens, 2 per multiply-add.

        Matrix products only. Examples attend to themselves alone, whatever row they are packed in; causal
        self-attention counts its T(T+1)/2 pairs; keys and values of cross-attention are computed per source token.

        Args:
          source_lengths: tokens of each example's encoder input; without an encoder they do not matter.
          target_lengths: tokens of each example's decoder input, aligned with `source_lengths`.
        """
        s, t = np.asarray(source_lengths, np.float64), np.asarray(target_lengths, np.float64)
        d, f = self.embed_dim, self.mlp_dim
        encoder = s * (2 * (4 * d * d + 2 * d * f) + 4 * s * d)
        decoder = 2 * t * (4 * d * d + 2 * d * f) + 2 * t * (t + 1) * d
        if self.has_encoder:
            decoder = decoder + 4 * t * d * d + 4 * s * d * d + 4 * t * s * d
        output = 2 * t * d * self.vocab_size
        return float(np.sum(self.encoder_layers * encoder + self.decoder_layers * decoder + output))

    def to_json(self) -> dict[str, Any]:
        """The fields as nested dictionaries that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TransformerConfig:
        """The config of a `to_json` dictionary; missing fields take their defaults.

        Raises:
          UserError: for an unknown field or a value that is not allowed.
        """
        values = dict(fields)
        for name in ("encoder_sharing", "decoder_sharing"):
            if isinstance(values.get(name), Mapping):
                values[name] = _build(LayerSharing, values[name], name)
        return _build(TransformerConfig, values, "model")


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    known = [item.name for item in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r} of {cls.__name__}; it has {', '.join(known)}")
    return cls(**values)


def _require(config: TransformerConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it must be {allowed}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
