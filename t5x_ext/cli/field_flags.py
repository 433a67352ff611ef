"""Flags that are the fields of a dataclass: names, types, defaults and descriptions are written there only."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from t5x_ext.cli.messages import UsageError, did_you_mean
from t5x_ext.cli.type_check import annotations_of

_DEFINE: dict[type, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define_field_flags(cls: type, values: flags.FlagValues, names: Sequence[str] | None = None) -> None:
    """Declares a flag for each field of a dataclass that there is no flag for yet.

    Args:
      cls: fields are numbers, text, or choices of texts (`Literal`); the `Attributes:` of its docstring describe them.
      values: the verb's flags.
      names: which fields; None: all.
    """
    hints, descriptions = annotations_of(cls), attribute_texts(cls)
    for field in dataclasses.fields(cls):
        if field.name in values or (names is not None and field.name not in names):
            continue
        default: Any = field.default
        hint, about = _without_none(hints[field.name]), descriptions[field.name].rstrip(".")
        if typing.get_origin(hint) is typing.Literal:
            flags.DEFINE_enum(field.name, default, list(typing.get_args(hint)), about, flag_values=values)
        else:
            _DEFINE[hint](field.name, default, about, flag_values=values)


def field_names(cls: type) -> tuple[str, ...]:
    """The fields of a dataclass; none of another class."""
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


def attribute_texts(cls: type) -> dict[str, str]:
    """What the section `Attributes:` of a class says of each attribute, on one line.

    >>> class Shape:
    ...     '''A shape.
    ...
    ...     Attributes:
    ...       rows: of a batch,
    ...         padding included.
    ...       length: in tokens.
    ...     '''
    >>> attribute_texts(Shape)
    {'rows': 'of a batch, padding included.', 'length': 'in tokens.'}
    """
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n(?=[ ]))*)", inspect.getdoc(cls) or "", re.MULTILINE)
    texts = re.findall(r"^  (\w+): (.*(?:\n {3,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


def imported(path: str, flag: str, known: Iterable[str] = ()) -> Any:
    """What an import path such as `my_module.MySearch` names.

    Raises:
      UsageError: where there is no such thing, with the nearest of the names that the flag also knows.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UsageError(f"{flag}={path}: no such choice{did_you_mean(path, known)}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{flag}={path}: cannot import {module_name}: {error}") from None
    if not hasattr(module, name):
        raise UsageError(f"{flag}={path}: {module_name} has no '{name}'{did_you_mean(name, vars(module), most=0)}")
    return getattr(module, name)


def _without_none(hint: Any) -> Any:
    """`int` for `int | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    return hint
