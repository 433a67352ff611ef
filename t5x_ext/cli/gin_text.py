"""The resolved configuration of a run as gin text: a record that builds the same run again."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from t5x_ext.cli.gin_read import Config, Reference, Scopes, Target, leaves, parameters
from t5x_ext.cli.messages import one_line


def resolved_text(config: Config, records: Mapping[tuple[Scopes, Target], Mapping[str, Any]]) -> str:
    """Every value in force as gin text, one `name = value` a line; defaults that gin cannot write are comments.

    Args:
      config: gives the names of classes and functions.
      records: by scopes and class or function, the values bound to its parameters, macros replaced by their values.
    """
    named = (leaf.target for bound in records.values() for leaf in leaves(dict(bound)) if isinstance(leaf, Reference))
    targets = {*(target for _, target in records), *named}
    imports = sorted({f"import {_module_of(config.path_of(target))}" for target in targets})
    blocks = []
    for (scopes, target), bound in records.items():
        prefix = "/".join((*scopes, config.path_of(target)))
        lines = {name: f"{prefix}.{name} = {_text(config, value)}" for name, value in bound.items()}
        for name, parameter in (parameters(target) or {}).items():
            lines.setdefault(name, _default_text(f"{prefix}.{name}", _default_of(target, parameter)))
        blocks.append("\n".join(filter(None, (lines[name] for name in sorted(lines)))))
    header = "\n".join(["from __gin__ import dynamic_registration", *imports])
    return "\n\n".join([header, *sorted(filter(None, blocks))]) + "\n"


def _module_of(path: str) -> str:
    """The longest beginning of a dotted path that is a module; what follows are its attributes."""
    module = path.rpartition(".")[0]
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    return module


def _text(config: Config, value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(config, key)}: {_text(config, item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(config, item) for item in value) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_text(config, item)}, " for item in value).rstrip() + ")"
    if isinstance(value, Reference):
        return "@" + "/".join((*value.scopes, config.path_of(value.target))) + "()" * value.evaluate
    return repr(value)


def _default_of(target: Target, parameter: inspect.Parameter) -> Any:
    fields = {field.name: field for field in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else {}
    factory = fields[parameter.name].default_factory if parameter.name in fields else dataclasses.MISSING
    return parameter.default if factory is dataclasses.MISSING else factory()


def _default_text(name: str, default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    plain = all(_is_literal(leaf) for leaf in leaves(default))
    # Addresses in memory would make equal configurations differ.
    shown = one_line(re.sub(r" at 0x[0-9a-f]+", "", repr(default)))
    return f"{'' if plain else '# '}{name} = {shown}"


def _is_literal(leaf: Any) -> bool:
    return leaf is None or type(leaf) in (bool, int, str) or (type(leaf) is float and math.isfinite(leaf))
