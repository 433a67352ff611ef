"""Model sizes by name; each only overrides defaults of its config, and gin overrides them in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from t5x_ext.models.config import (
    ActivationName,
    ComputeDtype,
    EncoderConfig,
    LayerConfig,
    NormPlacement,
    Remat,
    TransformerConfig,
)
from t5x_ext.models.sharing import LayerSharing


@dataclass(frozen=True)
class VegaTiny(TransformerConfig):
    """The quickstart's multilingual model: one shared set over two positions a stack; trains on two CPU cores."""

    vocab_size: int = 1200
    embed_dim: int = 128
    mlp_dim: int = 512
    num_heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    encoder_sharing: LayerSharing = field(default_factory=lambda: LayerSharing("universal"))
    decoder_sharing: LayerSharing = field(default_factory=lambda: LayerSharing("universal"))
    dropout: float = 0.0


@dataclass(frozen=True)
class Base(TransformerConfig):
    """Transformer-base (arXiv 1706.03762): post-norm, no final norms, 60,915,712 parameters at 32,768 tokens."""

    norm_placement: NormPlacement = "post"
    final_norm: bool = False


@dataclass(frozen=True)
class Big(TransformerConfig):
    """Transformer-big (arXiv 1706.03762): post-norm, no final norms, 209,911,808 parameters at 32,768 tokens.

    Dropout as in fairseq's `transformer_wmt_en_de_big`: 0.3, and 0.1 on attention weights.
    """

    embed_dim: int = 1024
    mlp_dim: int = 4096
    num_heads: int = 16
    norm_placement: NormPlacement = "post"
    final_norm: bool = False
    dropout: float = 0.3
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class Vega4B7(TransformerConfig):
    """The shape of Vega-MT (arXiv 2209.09444): 24+24 layers, 4,693,321,728 parameters at 128,009 tokens.

    Inferred from the published total and from the public model whose decoding recipe Vega-MT shares (fairseq's WMT21
    dense-24-wide): pre-norm, ReLU, everything tied, dropout 0.1 everywhere but on inner activations. Executed as its
    size asks for: bfloat16 compute, scanned stacks, every layer recomputed in the backward pass.
    """

    vocab_size: int = 128009
    embed_dim: int = 2048
    mlp_dim: int = 16384
    num_heads: int = 32
    encoder_layers: int = 24
    decoder_layers: int = 24
    attention_dropout: float = 0.1
    compute_dtype: ComputeDtype = "bfloat16"
    scan_layers: bool = True
    remat: Remat = "full"


@dataclass(frozen=True)
class MiniLM(EncoderConfig):
    """The encoder of all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957): BERT with 6 layers of width 384.

    22,565,376 parameters; the published 22,713,216 have BERT's pooler, which sentence embeddings do not use.
    """

    vocab_size: int = 30522
    embed_dim: int = 384
    mlp_dim: int = 1536
    num_heads: int = 12
    layers: int = 6
    norm_placement: NormPlacement = "post"
    final_norm: bool = False
    norm_epsilon: float = 1e-12
    activation: ActivationName = "gelu"
    scale_embedding: bool = False
    max_positions: int | None = 512
    token_types: int = 2
    embedding_norm: bool = True
    attention_dropout: float = 0.1


PRESETS: dict[str, type[LayerConfig]] = {
    "vega_tiny": VegaTiny,
    "base": Base,
    "big": Big,
    "mini_lm": MiniLM,
    "vega_4b7": Vega4B7,
}
"""Presets by the name that commands and gin files use."""
