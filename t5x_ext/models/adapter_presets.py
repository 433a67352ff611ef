"""The adapters of the literature, as parts of a layer."""

from __future__ import annotations

from t5x_ext.models.adapters import AdapterInit, AdapterResidual, LoraProjection, PrefixAttention
from t5x_ext.models.parts import LayerParts

PER_POSITION = ("adapter",)
"""`LayerParts.per_position` for adapters of their own at positions that share a parameter set."""


def houlsby(
    bottleneck: int = 64, *, init: AdapterInit = "bert", dropout: float = 0.0, per_position: bool = False
) -> LayerParts:
    """A bottleneck after every sub-layer, before the residual sum (Houlsby et al., arXiv 1902.00751).

    Args:
      bottleneck: width.
      init: of the matrices.
      dropout: rate inside the adapters.
      per_position: one for each position of a stack that shares parameter sets, instead of one for each set.
    """
    residual = AdapterResidual(bottleneck, "sequential", init=init, dropout=dropout)
    return LayerParts(residual=residual, per_position=PER_POSITION * per_position)


def pfeiffer(
    bottleneck: int = 64, *, init: AdapterInit = "bert", dropout: float = 0.0, per_position: bool = False
) -> LayerParts:
    """A bottleneck a layer, after the feed-forward sub-layer and its norm (Pfeiffer et al., arXiv 2005.00247).

    Args:
      bottleneck: width.
      init: of the matrices.
      dropout: rate inside the adapters.
      per_position: see `houlsby`.
    """
    residual = AdapterResidual(bottleneck, "after_norm", ("feed_forward",), init=init, norm=False, dropout=dropout)
    return LayerParts(residual=residual, per_position=PER_POSITION * per_position)


def parallel(
    bottleneck: int = 512,
    *,
    scale: float = 4.0,
    sublayers: tuple[str, ...] = ("feed_forward",),
    init: AdapterInit = "bert",
    dropout: float = 0.0,
    per_position: bool = False,
) -> LayerParts:
    """A bottleneck beside sub-layers, reading what they read (He et al., arXiv 2110.04366).

    Args:
      bottleneck: width.
      scale: of the output.
      sublayers: which of `self_attention`, `cross_attention` and `feed_forward`.
      init: of the matrices.
      dropout: rate inside the adapters.
      per_position: see `houlsby`.
    """
    residual = AdapterResidual(bottleneck, "parallel", sublayers, scale, init, False, dropout)
    return LayerParts(residual=residual, per_position=PER_POSITION * per_position)


def lora(
    rank: int = 8,
    *,
    alpha: float = 32.0,
    targets: tuple[str, ...] = ("query$", "value$"),
    init: AdapterInit = "bert",
    per_position: bool = False,
) -> LayerParts:
    """Low-rank products beside projections, those of queries and values by default (Hu et al., arXiv 2106.09685).

    Args:
      rank: of the products.
      alpha: their scale, times the rank.
      targets: regular expressions on paths such as `self_attention/query` and `feed_forward/up`.
      init: of the matrices.
      per_position: see `houlsby`.
    """
    return LayerParts(projection=LoraProjection(rank, alpha, targets, init), per_position=PER_POSITION * per_position)


def mam(
    prefix_length: int = 30,
    bottleneck: int = 512,
    *,
    scale: float = 4.0,
    init: AdapterInit = "bert",
    dropout: float = 0.0,
    per_position: bool = False,
) -> LayerParts:
    """Mix-and-match: a short prefix in self-attention and a wide parallel bottleneck (He et al., arXiv 2110.04366).

    Args:
      prefix_length: learned keys of each self-attention.
      bottleneck: width of the adapter beside each feed-forward sub-layer.
      scale: of its output.
      init: of its matrices.
      dropout: rate inside it.
      per_position: see `houlsby`.
    """
    return LayerParts(
        attention=PrefixAttention(prefix_length),
        residual=AdapterResidual(bottleneck, "parallel", ("feed_forward",), scale, init, False, dropout),
        per_position=PER_POSITION * per_position,
    )
