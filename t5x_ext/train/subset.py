"""Trainable subsets: gradient, optimizer state, EMA and checkpoint of some parameters, the others only read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Int

from t5x_ext.checkpoints import BASE
from t5x_ext.contracts import Batch, Context, Loss, Params, PyTree, UserError, path_predicate


def split_params(params: Params, is_trainable: Callable[[str], bool], prefix: str = "") -> tuple[Params, Params]:
    """Divides nested dictionaries by the names of their leaves; paths stay as they are.

    >>> split_params({"a": {"kernel": 1, "adapter": 2}}, lambda name: "adapter" in name)
    ({'a': {'adapter': 2}}, {'a': {'kernel': 1}})
    """
    part: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            inside, outside = split_params(value, is_trainable, f"{path}/")
            part |= {name: inside} if inside else {}
            rest |= {name: outside} if outside else {}
        else:
            (part if is_trainable(path) else rest)[name] = value
    return part, rest


def merge_params(part: Params, rest: Params) -> Params:
    """What `split_params` has divided; leaves are not copied.

    >>> merge_params({"a": {"adapter": 2}}, {"a": {"kernel": 1}})
    {'a': {'adapter': 2, 'kernel': 1}}
    """
    merged = dict(part)
    for name, value in rest.items():
        merged[name] = merge_params(part[name], value) if name in part else value
    return dict(sorted(merged.items()))


def check_patterns(params: Params, patterns: Sequence[str], setting: str) -> None:
    """Refuses patterns in which no parameter is found.

    Raises:
      UserError: naming the pattern and a few parameters.
    """
    names = list(leaf_names(params))
    for pattern in patterns:
        matches = path_predicate(pattern)
        if not any(map(matches, names)):
            shown = ", ".join(names[:3])
            raise UserError(f"{setting}: no parameter is called {pattern!r}; there are {len(names)}, as {shown}")


def leaf_names(params: Params, prefix: str = "") -> Sequence[str]:
    """Names of the leaves of nested dictionaries, parts joined by slashes."""
    names: list[str] = []
    for name, value in params.items():
        path = f"{prefix}{name}"
        names += leaf_names(value, f"{path}/") if isinstance(value, dict) else [path]
    return names


class SubsetObjective:
    """An objective over the trainable parameters, the others read from `context.frozen["base"]`.

    Attributes:
      whole: the objective over all parameters.
    """

    def __init__(self, objective: Any):
        """Wraps an objective over all parameters."""
        self.whole = objective

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """See `contracts.Objective`."""
        return self.whole(_all(params, context), batch, context)

    def logits(self, params: Params, batch: Batch, context: Context) -> Array:
        """See `contracts.Likelihood`."""
        return self.whole.logits(_all(params, context), batch, context)

    def labels(self, batch: Batch) -> Int[Array, "*labels"]:
        """See `contracts.Likelihood`."""
        return self.whole.labels(batch)

    def label_weights(self, batch: Batch, context: Context) -> Array:
        """See `contracts.Likelihood`."""
        return self.whole.label_weights(batch, context)

    def single_examples(self, batch: Batch, count: int) -> tuple[Batch, Int[Array, ""]]:
        """See `contracts.Likelihood`."""
        return self.whole.single_examples(batch, count)

    def totals(self, batch: Batch, context: Context) -> PyTree:
        """See `contracts.Objective`; nothing where the objective has none."""
        return totals_of(self.whole, batch, context)


def totals_of(objective: Any, batch: Batch, context: Context) -> PyTree:
    """What an objective computes once over a whole batch; () where it has no `totals`."""
    totals = getattr(objective, "totals", None)
    return () if totals is None else totals(batch, context)


def _all(params: Params, context: Context) -> Params:
    return merge_params(params, context.frozen[BASE])
