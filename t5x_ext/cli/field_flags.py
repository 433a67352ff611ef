"""Flags that are fields of a dataclass: type, choices and default are read from its source.

The module is read and not imported: `--help` and mistakes in flags must not wait for JAX.
"""

from __future__ import annotations

import ast
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

_PACKAGE = Path(__file__).parent.parent
_NAMES: dict[str, Any] = {
    "__builtins__": {},
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "Literal": typing.Literal,
}
_NUMBERS: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}


class Field(NamedTuple):
    """A field of a dataclass: its annotation, evaluated, and its default."""

    hint: Any
    default: Any


@dataclass(frozen=True)
class FieldFlag:
    """What a flag has beside the field.

    Attributes:
      about: its help.
      name: of the flag; None: that of the field.
      lower_bound: least value, for a number.
      upper_bound: largest value, for a number.
    """

    about: str
    name: str | None = None
    lower_bound: float | None = None
    upper_bound: float | None = None


def define_field_flags(
    values: flags.FlagValues, module: str, config: str, field_flags: Mapping[str, FieldFlag]
) -> None:
    """Declares flags with the types, choices and defaults of a dataclass's fields.

    Args:
      values: where they are declared.
      module: of the dataclass, as "parallel.distributed".
      config: its name.
      field_flags: by field; other fields get no flag.
    """
    fields = dataclass_fields(module, config)
    for field, flag in field_flags.items():
        hint, default = fields[field]
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        name = flag.name or field
        if typing.get_origin(hint) is typing.Literal:
            flags.DEFINE_enum(name, default, kinds, flag.about, flag_values=values)
        elif kinds[0] in _NUMBERS:
            bounds = {"lower_bound": flag.lower_bound, "upper_bound": flag.upper_bound}
            _NUMBERS[kinds[0]](name, default, flag.about, **bounds, flag_values=values)
        else:
            define = flags.DEFINE_boolean if kinds[0] is bool else flags.DEFINE_string
            define(name, default, flag.about, flag_values=values)


def field_values(values: flags.FlagValues, field_flags: Mapping[str, FieldFlag]) -> dict[str, Any]:
    """The fields that the flags give, as arguments of the dataclass."""
    return {field: getattr(values, flag.name or field) for field, flag in field_flags.items()}


@functools.cache
def dataclass_fields(module: str, config: str) -> dict[str, Field]:
    """The fields of a dataclass of this package whose types and defaults are plain: numbers, text, choices, None.

    >>> dataclass_fields("parallel.mesh", "MeshConfig")["fsdp"]
    Field(hint=<class 'int'>, default=1)
    """
    tree = ast.parse((_PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config)
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            try:
                hint = eval(ast.unparse(node.annotation), dict(_NAMES))
                fields[node.target.id] = Field(hint, ast.literal_eval(node.value))
            except (NameError, ValueError):
                continue
    return fields
