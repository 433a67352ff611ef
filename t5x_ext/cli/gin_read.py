"""gin text becomes bindings: read by gin's own parser, names resolved as gin's dynamic registration does it.

Each file imports what it names. A flag has no imports of its own: it sees those of all files, it may write any name
that a file used by its last part (`Run.steps`), and others by their full path (`my_module.my_optimizer`). Every
binding remembers its file and line, or its flag.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import pkgutil
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import t5x_ext
from gin import config_parser  # type: ignore[attr-defined]  # mypy sees the folder gin/ of this repository
from t5x_ext.cli.messages import did_you_mean
from t5x_ext.cli.retired import moved_name, retired_setting
from t5x_ext.contracts import UserError

Scopes = tuple[str, ...]
Target = Callable[..., Any]
Key = tuple[Scopes, Target, str]
"""What a binding sets: in which scopes, of which class or function, which parameter."""


class LocatedError(UserError):
    """A user's mistake whose message already begins with the file and line, or the flag."""


@dataclass(frozen=True)
class Source:
    """A piece of gin text and the name that errors give it.

    Attributes:
      text: statements in gin's language.
      label: a file name, or a flag.
      is_flag: whether it comes from the command line.
      through_macros: a binding whose present value is just a macro sets the macro instead, so that `--steps` also
        reaches a schedule that shares `%STEPS`.
    """

    text: str
    label: str
    is_flag: bool = False
    through_macros: bool = False

    @classmethod
    def from_flag(cls, binding: str) -> Source:
        """`NAME=VALUE` of the command line, where text needs no quotes of its own.

        Raises:
          UserError: where there is no value.
        """
        name, _, value = binding.partition("=")
        name, value, label = name.strip(), value.strip(), f"--gin.{name.strip()}"
        if not name or not value:
            raise UserError(f"{label} needs a value: --gin.NAME=VALUE")
        return cls(f"{name} = {value if _is_gin_value(value) else repr(value)}", label, is_flag=True)


@dataclass(frozen=True)
class Reference:
    """`@scope/Name`, a class or function, or `@scope/Name()`, what it returns."""

    scopes: Scopes
    target: Target
    evaluate: bool


@dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str


@dataclass(frozen=True)
class Binding:
    """A value, possibly with references and macros inside, and where it was written."""

    value: Any
    where: str
    is_flag: bool


@dataclass
class Config:
    """All bindings read so far, later ones over earlier ones.

    Attributes:
      bindings: by what they set.
      macros: by name.
      paths: every class and function that was named, by its full dotted path.
      replaced: values that a later binding took the place of.
    """

    bindings: dict[Key, Binding] = field(default_factory=dict)
    macros: dict[str, Binding] = field(default_factory=dict)
    paths: dict[str, Target] = field(default_factory=dict)
    replaced: list[Any] = field(default_factory=list)
    _imports: dict[str, ModuleType] = field(default_factory=dict)
    _reading: list[Path] = field(default_factory=list)

    def read_file(self, name: str) -> None:
        """Reads a gin file and what it includes.

        Raises:
          UserError: for a missing file, a syntax error or an unknown name.
        """
        path = find_gin_file(name)
        if path in self._reading:
            raise UserError(f"'{name}' includes itself")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (at byte {error.start})") from None
        self._reading.append(path)
        self.read(Source(text, os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)))
        self._reading.pop()

    def read(self, source: Source) -> None:
        """Reads one piece of gin text.

        Raises:
          UserError: for a syntax error or an unknown name.
        """
        symbols = dict(self._imports) if source.is_flag else {}
        for statement in _statements(source):
            where = _where(source, statement.location.line_num)
            try:
                self._take(statement, symbols, where, source)
            except LocatedError:
                raise
            except UserError as error:
                raise LocatedError(f"{where}: {error}") from error
        self._imports.update(symbols)

    def path_of(self, target: Target) -> str:
        """The dotted path by which the configuration names a class or function."""
        named = (path for path, known in self.paths.items() if known is target)
        return next(named, f"{target.__module__}.{target.__qualname__}")

    def has_scope(self, scopes: Scopes) -> bool:
        """Whether anything is bound in these scopes, or in one within them."""
        return any(key[0][: len(scopes)] == scopes for key in self.bindings)

    def _take(self, statement: Any, symbols: dict[str, ModuleType], where: str, source: Source) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            _import(statement, symbols)
        elif isinstance(statement, config_parser.IncludeStatement):
            self.read_file(statement.filename)
        elif isinstance(statement, config_parser.BlockDeclaration):
            self._resolve(statement.selector, symbols, source.is_flag)
        else:
            value = map_leaves(statement.value, lambda leaf: self._resolved(leaf, symbols, source.is_flag))
            self._bind(statement, Binding(value, where, source.is_flag), symbols, source.through_macros)

    def _bind(self, statement: Any, binding: Binding, symbols: Mapping[str, ModuleType], through_macros: bool) -> None:
        scopes = tuple(filter(None, statement.scope.split("/")))
        if not statement.arg_name:
            name = "/".join((*scopes, statement.selector))
            if binding.is_flag and name not in self.macros:
                raise UserError(f"the run has no value '{name}'{did_you_mean(name, self._known_names())}")
            _put(self.macros, name, binding, self.replaced)
            return
        target = self._resolve(statement.selector, symbols, binding.is_flag)
        known = parameters(target)
        if known is not None and statement.arg_name not in known:
            hint = retired_setting(target.__name__, statement.arg_name) or did_you_mean(statement.arg_name, known)
            raise UserError(f"'{statement.selector}' has no parameter '{statement.arg_name}'{hint}")
        key = (scopes, target, statement.arg_name)
        if through_macros and key in self.bindings and isinstance(self.bindings[key].value, Macro):
            _put(self.macros, self.bindings[key].value.name, binding, self.replaced)
        else:
            _put(self.bindings, key, binding, self.replaced)

    def _resolved(self, leaf: Any, symbols: Mapping[str, ModuleType], is_flag: bool) -> Any:
        if not isinstance(leaf, _Name):
            return leaf
        *scopes, name = leaf.scoped_name.split("/")
        return Reference(tuple(scopes), self._resolve(name, symbols, is_flag), leaf.evaluate)

    def _resolve(self, selector: str, symbols: Mapping[str, ModuleType], is_flag: bool) -> Target:
        first, *rest = selector.split(".")
        if first not in symbols:
            if is_flag:
                return self._resolve_by_last_part(selector)
            raise UserError(f"'{selector}': nothing named '{first}' is imported here{did_you_mean(first, symbols)}")
        target: Any = symbols[first]
        for part in rest:
            if not hasattr(target, part):
                public = [name for name in dir(target) if not name.startswith("_")]
                hint = moved_name(target.__name__, part) or did_you_mean(part, public)
                raise UserError(f"'{selector}': {target.__name__} has no '{part}'{hint}")
            target = getattr(target, part)
        if not callable(target):
            raise UserError(f"'{selector}' is neither a class nor a function")
        self.paths[".".join((symbols[first].__name__, *rest))] = target
        return target

    def _resolve_by_last_part(self, selector: str) -> Target:
        found = {target: path for path, target in self.paths.items() if f".{path}".endswith(f".{selector}")}
        if len(found) > 1:
            raise UserError(f"'{selector}' could be {' or '.join(found.values())}; write more of the name")
        if found:
            return next(iter(found))
        module, _, name = selector.rpartition(".")
        target = getattr(_module(module), name, None) if module else None
        if not callable(target):
            raise UserError(f"the run has no '{selector}'{did_you_mean(_last(selector), map(_last, self.paths))}")
        self.paths[selector] = target
        return target

    def _known_names(self) -> Iterator[str]:
        yield from self.macros
        for scopes, target, name in self.bindings:
            yield "/".join((*scopes, f"{_last(self.path_of(target))}.{name}"))


def gin_root() -> Path:
    """The folder of the gin files that come with the package."""
    package = Path(t5x_ext.__file__).parent
    installed = package / "_gin"
    return installed if installed.is_dir() else package.parent / "gin"


def find_gin_file(name: str) -> Path:
    """The gin file of that name in the current folder or, failing that, in the packaged gin folder.

    Raises:
      UserError: where neither has it, with the nearest name that exists.
    """
    in_package = name.removeprefix("gin/")
    for path in (Path(name), gin_root() / in_package):
        if path.is_file():
            return path
    packaged = [path.relative_to(gin_root()).as_posix() for path in gin_root().rglob("*.gin")]
    beside = [path.as_posix() for path in Path(name).parent.glob("*.gin")]
    raise UserError(f"there is no gin file '{name}'{did_you_mean(in_package, packaged + beside, most=0)}")


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """The value with `function` applied to everything that is not a plain list, tuple or dict."""
    if type(value) in (list, tuple):
        return type(value)(map_leaves(item, function) for item in value)
    if type(value) is dict:
        return {map_leaves(key, function): map_leaves(item, function) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """Whatever in the value is not a plain list, tuple or dict."""
    if type(value) in (list, tuple):
        for item in value:
            yield from leaves(item)
    elif type(value) is dict:
        yield from leaves([*value.keys(), *value.values()])
    else:
        yield value


def parameters(target: Target) -> dict[str, inspect.Parameter] | None:
    """The parameters that can be bound by name; None where any name is accepted."""
    try:
        signature = inspect.signature(target).parameters
    except ValueError:  # builtins do not tell
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in signature.items() if parameter.kind in by_name}


@dataclass(frozen=True)
class _Name:
    """A reference as it is written, before its file's imports say what it means."""

    scoped_name: str
    evaluate: bool


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Name:
        return _Name(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _statements(source: Source) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(io.StringIO(source.text), _Delegate())
    except SyntaxError as error:
        # Where Python could not read a value, gin's last line says which; text there lacks its quotes.
        reason = error.msg.splitlines()[-1].strip().rstrip(".")
        raise LocatedError(f"{_where(source, error.lineno or 1)}: {reason}: {(error.text or '').strip()}") from None
    except tokenize.TokenError as error:
        raise LocatedError(f"{_where(source, error.args[1][0])}: a bracket or a quote is not closed") from None


def _where(source: Source, line: int) -> str:
    return source.label if source.is_flag else f"{source.label}:{line}"


def _is_gin_value(text: str) -> bool:
    if text[0] in "@%([{'\"":
        return True  # meant as gin: let its parser complain
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        parser.parse_value()
        return parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
    except (SyntaxError, tokenize.TokenError):
        return False


def _import(statement: Any, symbols: dict[str, ModuleType]) -> None:
    name = statement.module
    if statement.is_from and name.startswith("__gin__."):
        if name != "__gin__.dynamic_registration":
            raise UserError(f"'{name}' is not known; write: from __gin__ import dynamic_registration")
        return
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"cannot import '{name}': {error}") from error
        hint = moved_name(*_split(error.name)) or did_you_mean(error.name, _siblings(error.name))
        raise UserError(f"there is no module '{error.name}'{hint}") from None
    except ImportError as error:
        raise UserError(f"cannot import '{name}': {error}") from error
    whole = statement.is_from or statement.alias
    symbols[statement.bound_name()] = module if whole else importlib.import_module(name.split(".")[0])


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition(".")
    return parent, name


def _siblings(name: str) -> list[str]:
    parent = name.rpartition(".")[0]
    folders = importlib.import_module(parent).__path__ if parent else None
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(folders)] if folders else []


def _module(name: str) -> ModuleType | None:
    """The module of that full name, or None."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _put(table: dict[Any, Binding], key: Any, binding: Binding, replaced: list[Any]) -> None:
    if key in table:
        replaced.append(table[key].value)
    table[key] = binding


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
