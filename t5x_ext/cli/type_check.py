"""Whether a value from a configuration file fits an annotation (beartype checks), and annotations in words."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from itertools import starmap
from typing import Annotated, Any

from beartype import BeartypeConf, FrozenDict
from beartype.door import is_bearable
from beartype.roar import BeartypeException
from beartype.vale import Is

_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
# What configuration files can give where an annotation asks for a container.
_CONTAINERS: dict[Any, Any] = {
    **dict.fromkeys(_LISTS, (list, tuple)),
    dict: dict,
    collections.abc.Mapping: dict,
    tuple: tuple,
}


def _is_no_flag(value: object) -> bool:
    return not isinstance(value, bool)


_CONF = BeartypeConf(
    hint_overrides=FrozenDict({int: Annotated[int, Is[_is_no_flag]], float: Annotated[float | int, Is[_is_no_flag]]})
)


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of every parameter of a class or function that can be evaluated; others are left out.

    Names that are only imported for type checkers, and shapes that are not Python, make single annotations
    unreadable; the rest are still checked.
    """
    owners = reversed(inspect.getmro(target)) if inspect.isclass(target) else (target,)
    found: dict[str, Any] = {}
    for owner in owners:
        # The constructor of a dataclass repeats its fields, but out of sight of the names that base classes imported.
        is_plain_class = inspect.isclass(owner) and "__dataclass_fields__" not in vars(owner)
        source = vars(owner).get("__init__") if is_plain_class else owner
        scope = vars(inspect.getmodule(owner) or typing)
        for name, hint in inspect.get_annotations(source).items() if source else ():
            found[name] = _evaluated(hint, scope)
    return {name: hint for name, hint in found.items() if hint is not inspect.Parameter.empty}


def fits(value: Any, hint: Any) -> bool:
    """False where the value contradicts the annotation; True where it fits or nothing can be said.

    An integer is a float too; True is no integer, and text is no sequence.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return any(fits(value, argument) for argument in arguments)
    if origin in _CONTAINERS and not isinstance(value, _CONTAINERS[origin]):
        return False
    return _is_bearable(value, hint) and all(starmap(fits, _items(value, origin, arguments)))


def _is_bearable(value: Any, hint: Any) -> bool:
    try:
        with warnings.catch_warnings():
            # Beartype warns of outdated names such as typing.List in annotations of other packages.
            warnings.simplefilter("ignore")
            return is_bearable(value, hint, conf=_CONF)
    except BeartypeException:
        # Text that is not Python, protocols without runtime_checkable: no check is defined for them.
        return True


def _items(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    """Every item of a container beside its annotation: beartype looks at a single item, chosen at random."""
    if isinstance(value, dict) and origin in _CONTAINERS:
        return [pair for key, item in value.items() for pair in zip((key, item), arguments)]
    if origin is tuple and arguments[1:] != (...,):
        return zip(value, arguments)
    return [(item, arguments[0]) for item in value] if origin in _CONTAINERS else ()


def describe(hint: Any) -> str:
    """An annotation in words.

    >>> from typing import Literal
    >>> describe(int | None), describe(Literal["pre", "post"]), describe(tuple[int, ...])
    ('int or None', "one of 'pre', 'post'", 'tuple of int')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "None"
    if _is_union(origin):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"tuple of {describe(arguments[0])}"
        return f"tuple ({', '.join(map(describe, arguments))})"
    if origin is not None and not _is_callable(origin):
        inner = f" of {', '.join(map(describe, arguments))}" if arguments else ""
        return f"{origin.__name__.lower()}{inner}"
    if hint is Callable or _is_callable(origin):
        return "a function"
    if hint is bool:
        return "True or False"
    return getattr(hint, "__name__", str(hint))


def _evaluated(hint: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, scope)
    except Exception:
        # An annotation is arbitrary text that only its own tool reads; there is nothing to check then.
        return inspect.Parameter.empty


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def _is_callable(origin: Any) -> bool:
    return origin is collections.abc.Callable
