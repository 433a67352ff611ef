"""Does a value fit an annotation? A small checker for what configuration files hold."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


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

    An integer is a float too; True is no integer.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None:
        return value is None
    if _is_union(origin):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple or hint is tuple:
        return _fits_tuple(value, arguments)
    if _is_callable(origin) or hint is Callable:
        return callable(value)
    if origin in _SEQUENCES:
        items = arguments or (Any,)
        return isinstance(value, list | tuple) and all(fits(item, items[0]) for item in value)
    if origin in (dict, collections.abc.Mapping):
        keys, items = arguments
        return isinstance(value, dict) and all(fits(k, keys) and fits(v, items) for k, v in value.items())
    return _fits_class(value, origin or hint)


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


def _fits_class(value: Any, hint: Any) -> bool:
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(hint, type):
        return True
    try:
        return isinstance(value, hint)
    except TypeError:
        # Protocols without runtime_checkable, shape classes: an instance check is not defined for them.
        return True


def _fits_tuple(value: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, tuple):
        return False
    if not arguments or arguments[1:] == (...,):
        return all(fits(item, arguments[0]) for item in value) if arguments else True
    return len(value) == len(arguments) and all(map(fits, value, arguments))


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def _is_callable(origin: Any) -> bool:
    return origin is collections.abc.Callable
