"""gin files and bindings become one `Run`, checked on the way.

The objects are built here and not by gin's registry, which is global, silent about unused bindings and wrong types,
and looks bindings up when a function is called: here a reference passed on as a function (`@Name` without
parentheses) keeps its bindings for good, two builds cannot disturb each other, and each mistake has its place.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from t5x_ext.cli.gin_read import (
    Binding,
    Config,
    Key,
    Macro,
    Reference,
    Scopes,
    Source,
    Target,
    leaves,
    map_leaves,
    parameters,
)
from t5x_ext.cli.gin_text import resolved_text
from t5x_ext.cli.messages import did_you_mean
from t5x_ext.cli.type_check import annotations_of, describe, fits
from t5x_ext.contracts import UserError

_PIPELINE = "; this is a pipeline: t5x_ext pipeline runs it, t5x_ext check takes one --stage of it"


def build_run(
    gin_files: Sequence[str], bindings: Sequence[str | Source] = (), root: type | None = None
) -> tuple[Any, str]:
    """Builds the root object of a run.

    Args:
      gin_files: paths, or names below the packaged gin folder (`runs/two_files.gin`); later files override.
      bindings: what overrides the files: texts `NAME=VALUE` from the command line, or whole `Source`s.
      root: the class to build; None builds `t5x_ext.train.run.Run`.

    Returns:
      The object, and the resolved configuration: gin text with every value in force, which builds an equal object.

    Raises:
      UserError: for a missing file, a syntax error, a misspelt or unused name, a value of the wrong type, or one that a
        class refuses; the message begins with the file and line, or the flag.
    """
    config = _read(gin_files, bindings)
    _refuse_study(config, root)
    builder = _Builder(config)
    run = builder.call(root or _default_root(), (), "")
    _refuse_unused(config, builder)
    return run, resolved_text(config, builder.records)


def build_field(
    name: str, gin_files: Sequence[str], bindings: Sequence[str | Source] = (), root: type | None = None
) -> Any:
    """One field of the root object (its model, say), where the rest need not be bound or used; None if it is not bound.

    Args:
      name: the field.
      gin_files: as for `build_run`, like the others.
      bindings: see there.
      root: see there.

    Raises:
      UserError: as `build_run`.
    """
    config = _read(gin_files, bindings)
    return _Builder(config).field(root or _default_root(), name)


def build_parts(
    name: str, gin_files: Sequence[str], bindings: Sequence[str | Source] = (), root: type | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The root object, and for each element of one of its fields, a list, the configuration of that element alone.

    Args:
      name: the field.
      gin_files: as for `build_run`, like the others.
      bindings: see there.
      root: see there.

    Returns:
      The object, and the elements' resolved configurations in their order; that of the field for each, where a
      function makes the list.

    Raises:
      UserError: as `build_run`.
    """
    run, _ = build_run(gin_files, bindings, root)
    config = _read(gin_files, bindings)
    value = _Builder(config).plain(root or _default_root(), name)
    elements = value if isinstance(value, list | tuple) else [value] * len(getattr(run, name))
    parts = []
    for element in elements:
        builder = _Builder(config)
        builder.built(element)
        parts.append(resolved_text(config, builder.records))
    return run, tuple(parts)


def _read(gin_files: Sequence[str], bindings: Sequence[str | Source]) -> Config:
    config = Config()
    for name in gin_files:
        config.read_file(name)
    for binding in bindings:
        config.read(binding if isinstance(binding, Source) else Source.from_flag(binding))
    return config


def _refuse_study(config: Config, root: type | None) -> None:
    """Names the command for a study, which binds nothing that another one could use."""
    for (_, target, name), binding in config.bindings.items():
        if (_name(target), name) == ("Study", "arms") and target is not root:
            raise UserError(f"{binding.where}: this is a study; t5x_ext study runs it")


def _default_root() -> type:
    return importlib.import_module("t5x_ext.train.run").Run


class _Builder:
    """Calls what the configuration names.

    `records` holds, for every class and function that was called, the values bound to it; `used` and `used_macros`
    what they were taken from.
    """

    def __init__(self, config: Config):
        self._config = config
        self._calling: list[tuple[Scopes, Target]] = []
        self.records: dict[tuple[Scopes, Target], dict[str, Any]] = {}
        self.used: set[Key] = set()
        self.used_macros: set[str] = set()

    def call(self, target: Target, scopes: Scopes, where: str) -> Any:
        """The result of calling a class or function with the bindings of its scope and of the scopes around it."""
        bound = self._bound(target, scopes)
        arguments = self._arguments(target, scopes, bound, where)
        for name, parameter in (parameters(target) or {}).items():
            if parameter.default is parameter.empty and name not in arguments:
                raise UserError(f"{_prefix(where)}{_name(target)}.{name} has no value; it must be bound")
        try:
            return target(**arguments)
        except (UserError, ValueError) as error:
            about = "" if _name(target) in str(error) else f"{_name(target)}: "
            raise UserError(f"{_blamed(error, bound, where)}{about}{error}") from error

    def field(self, target: Target, name: str) -> Any:
        """The value bound to one parameter, None if there is none."""
        binding = self._config.bindings.get(((), target, name))
        return self._arguments(target, (), {name: self._plain(binding)}, "")[name] if binding else None

    def plain(self, target: Target, name: str) -> Any:
        """The same without building what it refers to."""
        binding = self._config.bindings.get(((), target, name))
        return self._plain(binding).value if binding else None

    def built(self, value: Any) -> Any:
        """A value with what its references stand for in their place."""
        return map_leaves(value, partial(self._built, scopes=(), where=""))

    def _bound(self, target: Target, scopes: Scopes) -> dict[str, Binding]:
        bound: dict[str, Binding] = {}
        for depth in range(len(scopes) + 1):
            for key, binding in self._config.bindings.items():
                if key[:2] == (scopes[:depth], target):
                    self.used.add(key)
                    bound[key[2]] = self._plain(binding)
        return bound

    def _plain(self, binding: Binding) -> Binding:
        """The binding with values in the place of macros; one that is just a macro gets its place, to be blamed."""
        value = map_leaves(binding.value, partial(self._without_macros, where=binding.where))
        while isinstance(binding.value, Macro):
            binding = self._config.macros[binding.value.name]
        return dataclasses.replace(binding, value=value)

    def _arguments(self, target: Target, scopes: Scopes, bound: Mapping[str, Binding], where: str) -> dict[str, Any]:
        if (scopes, target) in self._calling:
            raise UserError(f"{_prefix(where)}{_name(target)} refers to itself")
        self._calling.append((scopes, target))
        self.records[scopes, target] = {name: binding.value for name, binding in bound.items()}
        hints = annotations_of(target)
        arguments = {}
        for name, binding in bound.items():
            value = map_leaves(binding.value, partial(self._built, scopes=scopes, where=binding.where))
            arguments[name] = _checked(value, hints.get(name, Any), f"{binding.where}: {_name(target)}.{name}")
        self._calling.pop()
        return arguments

    def _without_macros(self, leaf: Any, where: str, inside: tuple[str, ...] = ()) -> Any:
        if not isinstance(leaf, Macro):
            # As in gin, what a macro refers to is built in a scope of the macro's name, where that has bindings.
            scopes = tuple(inside[-1].split("/")) if inside else ()
            in_scope = isinstance(leaf, Reference) and not leaf.scopes and self._config.has_scope(scopes)
            return dataclasses.replace(leaf, scopes=scopes) if in_scope else leaf
        if leaf.name in inside:
            raise UserError(f"{where}: %{leaf.name} refers to itself")
        if leaf.name not in self._config.macros:
            raise UserError(f"{where}: %{leaf.name} has no value{did_you_mean(leaf.name, self._config.macros)}")
        self.used_macros.add(leaf.name)
        binding = self._config.macros[leaf.name]
        inner = partial(self._without_macros, where=binding.where, inside=(*inside, leaf.name))
        return map_leaves(binding.value, inner)

    def _built(self, leaf: Any, scopes: Scopes, where: str) -> Any:
        if not isinstance(leaf, Reference):
            return leaf
        scopes = leaf.scopes or scopes
        if leaf.evaluate:
            return self.call(leaf.target, scopes, where)
        bound = self._bound(leaf.target, scopes)
        return partial(leaf.target, **self._arguments(leaf.target, scopes, bound, where)) if bound else leaf.target


def _checked(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, list) and not fits(value, hint) and fits(tuple(value), hint):
        return tuple(value)
    if fits(value, hint):
        return value
    shown = repr(value) if isinstance(value, str | int | float | list | tuple | dict | None) else _name(value)
    call = f"; write @{_name(value)}() to call it" if callable(value) else ""
    raise UserError(f"{where} is {describe(hint)}, not {shown}{call}")


def _blamed(error: Exception, bound: Mapping[str, Binding], where: str) -> str:
    """The place of the binding that a refused call is about: one whose parameter the message names, else the last."""
    named = [binding for name, binding in bound.items() if re.search(rf"\b{name}\b", str(error))]
    suspects = named or list(bound.values())
    by_flag = [binding for binding in suspects if binding.is_flag]
    return _prefix((by_flag or suspects)[-1].where if suspects else where)


def _refuse_unused(config: Config, builder: _Builder) -> None:
    """Raises UserError for the first binding that nothing used, unless it belongs to a part that was replaced."""
    unused = {key: binding for key, binding in config.bindings.items() if key not in builder.used}
    macros = {name: binding for name, binding in config.macros.items() if name not in builder.used_macros}
    replaced = _reachable(config, config.replaced)
    for (scopes, target, name), binding in unused.items():
        if binding.is_flag or target not in replaced:
            full = "/".join((*scopes, f"{_name(target)}.{name}"))
            hint = _PIPELINE if full == "Pipeline.stages" else _instead(target, name, scopes, builder.records)
            raise UserError(f"{binding.where}: nothing in this run uses {full}{hint}")
    for name, binding in macros.items():
        if binding.is_flag or name not in replaced:
            raise UserError(f"{binding.where}: nothing in this run uses %{name}")


def _reachable(config: Config, values: list[Any]) -> set[Any]:
    """Targets and macro names that values refer to, directly or through the bindings of what they refer to."""
    found: set[Any] = set()
    waiting = list(values)
    while waiting:
        for leaf in leaves(waiting.pop()):
            name = leaf.name if isinstance(leaf, Macro) else leaf.target if isinstance(leaf, Reference) else None
            if name is None or name in found:
                continue
            found.add(name)
            if name in config.macros:
                waiting.append(config.macros[name].value)
            waiting += [binding.value for key, binding in config.bindings.items() if key[1] is name]
    return found


def _instead(target: Target, name: str, scopes: Scopes, built: Mapping[tuple[Scopes, Target], Any]) -> str:
    """A hint at what the run does have in the place of an unused binding."""
    same = ["/".join(at) for at, other in built if other is target and at]
    if scopes and same:
        return did_you_mean("/".join(scopes), same).replace("mean ", "mean the scope ")
    have = [other for _, other in built if name in (parameters(other) or {})]
    related = [other for other in have if _is_related(other, target)] or have
    return f"; did you mean {_name(related[0])}.{name}?" if related else ""


def _is_related(one: Target, other: Target) -> bool:
    return inspect.isclass(one) and inspect.isclass(other) and (issubclass(one, other) or issubclass(other, one))


def _name(value: Any) -> str:
    value = value.func if isinstance(value, partial) else value
    return getattr(value, "__name__", type(value).__name__)


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""
