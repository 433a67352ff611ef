"""How to decode: one frozen dataclass of options, and its JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from t5x_ext.contracts import UserError
from t5x_ext.decode.beam import Beam
from t5x_ext.decode.checks import at_least
from t5x_ext.decode.greedy import Greedy
from t5x_ext.decode.records import build, describe, read_part
from t5x_ext.decode.sampling import Sample
from t5x_ext.decode.search import Constraint, Search

_WITH = "with decode.DecodeConfig.search ="

RETIRED = {
    "DecodeConfig.strategy": "decode.DecodeConfig.search = @decode.Beam(), @decode.Greedy() or @decode.Sample()",
    "DecodeConfig.beam_size": f"decode.Beam.beam_size, {_WITH} @decode.Beam()",
    "DecodeConfig.n_best": f"decode.Beam.n_best or decode.Sample.n_best, {_WITH} @decode.Beam() or @decode.Sample()",
    "DecodeConfig.length_penalty": f"decode.Beam.length_penalty, {_WITH} @decode.Beam(), or that of another search",
    "DecodeConfig.alpha": f"decode.Beam.alpha, {_WITH} @decode.Beam(), or that of another search",
    "DecodeConfig.temperature": f"decode.Sample.temperature, {_WITH} @decode.Sample()",
    "DecodeConfig.top_k": f"decode.Sample.top_k, {_WITH} @decode.Sample()",
    "DecodeConfig.top_p": f"decode.Sample.top_p, {_WITH} @decode.Sample()",
    "DecodeConfig.seed": f"decode.Sample.seed, {_WITH} @decode.Sample()",
}
"""Options of earlier versions, and what to write instead, in gin's language."""


@dataclass(frozen=True)
class DecodeConfig:
    """Options of decoding; the defaults are beam search with beam 5.

    Attributes:
      search: how hypotheses are found: `Beam`, `Greedy`, `Sample`, or any other `Search`.
      constraints: what hypotheses may say, such as `MinimumLength` or any other `Constraint`, applied in order.
      max_length_ratio: a translation has at most `ceil(max_length_ratio * source tokens) + max_length_extra` tokens;
        tags do not count, ends of sentence do.
      max_length_extra: see `max_length_ratio`.
      max_source_length: tokens of encoder input, tag and end of sentence included; longer lines are truncated, and the
        log says how many.
      batch_tokens: padded source tokens of a batch, which is its rows times the length of its bucket, for each copy of
        the model on a mesh. None: 512 on a CPU, where a large batch only waits for its longest sentence, and 8192 on
        an accelerator, which needs many rows to be busy.

    Raises:
      UserError: for a value that is not allowed, and for an option of earlier versions (`RETIRED`), at construction.
    """

    search: Search = field(default_factory=Beam)
    constraints: tuple[Constraint, ...] = ()
    max_length_ratio: float = 3.0
    max_length_extra: int = 20
    max_source_length: int = 512
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_search(self.search)
        for constraint in self.constraints:
            if not callable(constraint) or isinstance(constraint, type):
                raise UserError(f"constraints: {constraint!r} is no Constraint; give objects such as MinimumLength(3)")
            _check_hashable("constraints", constraint)
        at_least("max_length_ratio", self.max_length_ratio, 0)
        at_least("max_length_extra", self.max_length_extra, 0)
        at_least("max_source_length", self.max_source_length, 4)
        if self.batch_tokens is not None:
            at_least("batch_tokens", self.batch_tokens, 1)

    def max_target_length(self, source_length: int) -> int:
        """Most tokens of a translation, end of sentence included, forced prefix not.

        >>> DecodeConfig(max_length_ratio=1.5, max_length_extra=3).max_target_length(5)
        11
        """
        return max(1, math.ceil(self.max_length_ratio * source_length) + self.max_length_extra)

    def to_json(self) -> dict[str, Any]:
        """Plain values. Searches and constraints from elsewhere are described by their import path and fields.

        >>> DecodeConfig(Greedy()).to_json()["search"]
        {'kind': 'Greedy', 'length_penalty': 'fairseq', 'alpha': 1.0}
        """
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return fields | {"search": describe(self.search), "constraints": [describe(one) for one in self.constraints]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DecodeConfig:
        """The configuration that `to_json` described, now or in earlier versions, whose records were flat.

        Raises:
          UserError: for a search or constraint that is not of this package, and for fields that are not known.
        """
        if "search" not in record:
            record = _without_flat_fields(record)
        constraints = tuple(map(read_part, record.get("constraints", ())))
        return build(cls, {**record, "search": read_part(record["search"]), "constraints": constraints})


def _refuse_retired(cls: type[DecodeConfig]) -> None:
    """Lets the constructor say what an option of earlier versions is called now."""
    construct = cls.__init__

    @functools.wraps(construct)
    def construct_or_refuse(self: DecodeConfig, *args: Any, **options: Any) -> None:
        for name in options:
            if (full := f"DecodeConfig.{name}") in RETIRED:
                raise UserError(f"{full} is retired; use {RETIRED[full]}")
        construct(self, *args, **options)

    cls.__init__ = construct_or_refuse  # type: ignore[method-assign]


_refuse_retired(DecodeConfig)


def _check_search(search: Any) -> None:
    if isinstance(search, type):
        raise UserError(f"search is the class {search.__name__}; write {search.__name__}() to make one")
    if not isinstance(search, Search):
        raise UserError(f"search = {search!r}: must be a Search, as Beam(), Greedy() or Sample()")
    _check_hashable("search", search)
    at_least(f"{type(search).__name__}.n_best", search.n_best, 1)
    at_least(f"{type(search).__name__}.rows_per_source", search.rows_per_source, 1)


def _check_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise UserError(f"{name}: {value!r} cannot be hashed; make it a frozen dataclass of plain values") from None


def _without_flat_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of an earlier version, where the fields of all searches were fields of the configuration."""
    kind = {"beam": Beam, "greedy": Greedy, "sample": Sample}[record["strategy"]]
    fields = {one.name: record[one.name] for one in dataclasses.fields(kind) if one.name in record}
    rest = {name: value for name, value in record.items() if f"DecodeConfig.{name}" not in RETIRED}
    return rest | {"search": {"kind": kind.__name__, **fields}}
