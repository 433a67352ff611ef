"""Rules from the logical axis names of parameters to mesh axes, with the shipped presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from t5x_ext.contracts import UserError
from t5x_ext.parallel.mesh import MESH_AXES


@dataclass(frozen=True)
class AxisRules:
    """The mesh axis for each logical axis of a parameter; None: not sharded.

    Rows of a batch are always sharded over `BATCH_AXES`, independent of these rules; see `global_batch`.

    Attributes:
      embed: model dimension.
      heads: attention heads.
      head_dim: dimension of a head.
      mlp: feed-forward dimension.
      vocab: vocabulary.
      layers: stacked layers.
    """

    embed: str | None = None
    heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = None
    vocab: str | None = None
    layers: str | None = None

    def __post_init__(self) -> None:
        for name, axis in asdict(self).items():
            if axis is not None and axis not in MESH_AXES:
                raise UserError(f"AxisRules: {name} = {axis!r} is not a mesh axis; use one of {MESH_AXES} or None")

    def mesh_axis(self, name: str | None) -> str | None:
        """The mesh axis of a logical axis name.

        Raises:
          UserError: if the name is unknown.
        """
        if name is None:
            return None
        rules = asdict(self)
        if name not in rules:
            raise UserError(f"AxisRules: unknown axis name {name!r}; parameters use {', '.join(rules)}")
        return rules[name]


def data_parallel() -> AxisRules:
    """Parameters are replicated on every device."""
    return AxisRules()


def fsdp() -> AxisRules:
    """Parameters sharded along `embed` over `fsdp`, gathered layer by layer when used (ZeRO-3, arXiv 1910.02054)."""
    return AxisRules(embed="fsdp")


def fsdp_tensor() -> AxisRules:
    """`fsdp`, with attention heads, feed-forward dimension and vocabulary sharded over `tensor` (arXiv 1909.08053)."""
    return AxisRules(embed="fsdp", heads="tensor", mlp="tensor", vocab="tensor")
