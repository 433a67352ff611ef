"""What the sub-layers of a model are, as values that hash, compare and can be written into `model.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn

from t5x_ext.contracts import UserError
from t5x_ext.models.adapters import AdapterResidual, LoraProjection, PrefixAttention
from t5x_ext.models.sublayers import Attention, Factory, FeedForward, Norm, Projection, Residual


@dataclass(frozen=True)
class LayerParts:
    """Factories of the parts of a layer; each is called in a layer's `setup` and gives a Flax module.

    A factory is a module class with the default's arguments, or a frozen dataclass that is called with them: a model
    is a static argument of `jax.jit`, so parts are compared and hashed. Names of parameters follow the attributes that
    hold the modules; a module finds out where it is (`self_attention/query`) by its `path`.

    Sub-layers give an output and a dictionary of named side outputs, usually empty; `EncoderDecoder.hidden_and_aux`
    collects them.

    Attributes:
      attention: `(config, projection, placement)` -> module with `keys_and_values(x) -> KeyValue` and
        `(x, memory, mask, deterministic) -> (y, aux)`.
      feed_forward: `(config, projection, placement)` -> module `(x, deterministic) -> (y, aux)`.
      residual: `(config, norm, placement)` -> module with `enter(x) -> y`, what the sub-layer reads, and
        `leave(x, y, deterministic) -> x`, what follows it.
      norm: `(config)` -> module `(x) -> y`; also of the norms after a stack.
      projection: `(config, features, axes, gain, placement)` -> module `(x) -> y`, see `Projection`.
      per_position: regular expressions, searched in a parameter's path in its layer. Parameters that match belong to
        positions of a stack and not to the parameter sets that positions share: they are in `positions` [N, ...]
        beside `layers` [M, ...].
    """

    attention: Factory = Attention
    feed_forward: Factory = FeedForward
    residual: Factory = Residual
    norm: Factory = Norm
    projection: Factory = Projection
    per_position: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Kind and fields of each part that is not the default, as JSON.

        A factory that is not in `KINDS` is recorded by its Python name, which tells a reader what it was;
        `from_json` refuses it.
        """
        names = (name for name in KINDS if getattr(self, name) != KINDS[name]["default"])
        record: dict[str, Any] = {name: _factory_to_json(name, getattr(self, name)) for name in names}
        return record | ({"per_position": list(self.per_position)} if self.per_position else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerParts:
        """The parts of a `to_json` dictionary; imports nothing that it names.

        Raises:
          UserError: for an unknown part, kind or field.
        """
        unknown = sorted(set(record) - set(KINDS) - {"per_position"})
        if unknown:
            raise UserError(f"parts: unknown part {unknown[0]!r}; a layer has {', '.join(KINDS)}")
        factories = {name: _factory_from_json(name, record[name]) for name in KINDS if name in record}
        return cls(**factories, per_position=tuple(record.get("per_position", ())))


KINDS: dict[str, dict[str, Any]] = {
    "attention": {"default": Attention, "prefix": PrefixAttention},
    "feed_forward": {"default": FeedForward},
    "residual": {"default": Residual, "adapter": AdapterResidual},
    "norm": {"default": Norm},
    "projection": {"default": Projection, "lora": LoraProjection},
}
"""Built-in factories by part and name: module classes, or frozen dataclasses whose fields are JSON or tuples of it."""


def _factory_to_json(part: str, factory: Factory) -> dict[str, Any]:
    for kind, built_in in KINDS[part].items():
        if factory is built_in:
            return {"kind": kind}
        if type(factory) is built_in:
            return {"kind": kind, **dataclasses.asdict(cast(Any, factory))}
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return {"kind": f"{named.__module__}.{named.__qualname__}"}


def _factory_from_json(part: str, record: Mapping[str, Any]) -> Factory:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    kind = fields.pop("kind", None)
    if kind not in KINDS[part]:
        raise UserError(f"parts: {part} is of the unknown kind {kind!r}; built in are {', '.join(KINDS[part])}")
    built_in = KINDS[part][kind]
    is_module = issubclass(built_in, nn.Module)
    known = [] if is_module else [item.name for item in dataclasses.fields(built_in)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UserError(f"parts: {part} {kind!r} has no field {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return built_in if is_module else built_in(**fields)
