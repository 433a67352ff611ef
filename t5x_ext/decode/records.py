"""Searches and constraints as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.decode.beam import Beam
from t5x_ext.decode.constraints import ForbidTokens, MinimumLength, NoRepeatNgrams
from t5x_ext.decode.greedy import Greedy
from t5x_ext.decode.parallel import CtcGreedy, LengthBeam, ParallelGreedy
from t5x_ext.decode.sampling import Sample

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Beam, Greedy, Sample, LengthBeam, ParallelGreedy, CtcGreedy),
        *(ForbidTokens, MinimumLength, NoRepeatNgrams),
    )
}
"""What can be read back by its name. Reading JSON imports nothing that it names."""


def describe(part: Any) -> dict[str, Any]:
    """Kind and fields of a search or constraint; of one that is not of this package the import path is its kind.

    >>> describe(Beam(beam_size=4))
    {'kind': 'Beam', 'beam_size': 4, 'n_best': 1, 'length_penalty': 'fairseq', 'alpha': 1.0}
    """
    kind: Any = part if hasattr(part, "__qualname__") else type(part)  # a function, or the class of an object
    name = kind.__name__ if kind in _KINDS.values() else f"{kind.__module__}.{kind.__qualname__}"
    if not dataclasses.is_dataclass(part):
        return {"kind": name, "text": _plain(part)}
    return {"kind": name} | {field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(part)}


def read_part(record: Mapping[str, Any]) -> Any:
    """The search or constraint that `describe` described.

    Raises:
      UserError: for one that is not of this package, and for fields that are not known.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    kind = fields.pop("kind")
    if kind not in _KINDS:
        raise UserError(f"{kind} is not of t5x_ext, so that its record cannot be read back; build it from its module")
    return build(_KINDS[kind], fields)


def build(cls: type, fields: Mapping[str, Any]) -> Any:
    """A dataclass from its fields.

    Raises:
      UserError: for fields that it does not have, as those of a later version.
    """
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise UserError(f"a record of {cls.__name__} has fields that are not known here: {', '.join(unknown)}")
    return cls(**fields)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back, or as text; an address in memory would make equal options differ."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
