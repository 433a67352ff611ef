"""Floor 0: the shapes of things that rooms hand to each other. No behaviour beyond reading tree paths.

A batch is a mapping of arrays, one row packing several examples (see `Batch`). An objective turns parameters and a
batch into a `Loss`. A corpus yields pairs of lines. A plugin is any importable object that satisfies the small
Protocol of its kind; nothing is registered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

PyTree: TypeAlias = Any
Params: TypeAlias = Any
"""A nested dictionary of arrays without metadata boxes, as an initialised model gives after unboxing."""

Rngs: TypeAlias = Mapping[str, jax.Array]
"""Random keys by name; the models read `dropout` only."""

AXIS_NAMES = ("batch", "length", "embed", "heads", "head_dim", "mlp", "vocab", "layers")
"""The one vocabulary of logical axis names; `None` marks an axis that is never split."""

Axes: TypeAlias = tuple[str | None, ...]
"""A logical name for each axis of an array."""

ONE_SIDE: tuple[Axes, ...] = (("heads", "head_dim"),)
"""Neighbouring axes that are one side of a matrix: attention kernels map `embed` to all heads at once."""


class UserError(Exception):
    """A user's mistake, said in one line: what was wrong, where, what would be right. Commands exit with code 2."""


class Batch(TypedDict):
    """Packed encoder-decoder rows.

    Padding is wherever a segment id is 0, whatever the token there; examples of one row are numbered from 1 on both
    sides, and positions restart at 0 with every example.
    """

    source_tokens: Int[Array, "batch source_length"]
    source_segment_ids: Int[Array, "batch source_length"]
    source_positions: Int[Array, "batch source_length"]
    target_inputs: Int[Array, "batch length"]
    target_labels: Int[Array, "batch length"]
    target_segment_ids: Int[Array, "batch length"]
    target_positions: Int[Array, "batch length"]


class Loss(NamedTuple):
    """Sums over the labels of a batch, so that microbatches and hosts add up exactly.

    `sum / weight` is the mean loss; a metric is a pair (sum, weight) of its own.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


class Context(NamedTuple):
    """What an objective may read beside parameters and batch.

    `rngs` is None when nothing is random (evaluation); `frozen` holds teachers or reference weights, `mutable` holds
    masks and statistics.
    """

    step: Int[Array, ""] | int
    rngs: Rngs | None = None
    frozen: PyTree = ()
    mutable: PyTree = ()


@runtime_checkable
class Objective(Protocol):
    """What is optimised. Curvature gradients, scoring and distillation derive from `logits` and `label_weights`."""

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """Value over a batch, as sums."""
        ...

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "batch length vocab"]:
        """Scores of every label position, float32."""
        ...

    def label_weights(self, batch: Batch) -> Float[Array, "batch length"]:
        """1 where a label counts, 0 where it is padding."""
        ...


class Accumulator(NamedTuple):
    """How gradients of microbatches become one gradient.

    `init(params, step) -> state`; `add(state, grads, weight) -> state`, `grads` being the gradient of the SUM of the
    microbatch's losses and `weight` its number of labels; `finish(state) -> grads` of the mean loss.
    """

    init: Callable[[Params, Array], PyTree]
    add: Callable[[PyTree, PyTree, Array], PyTree]
    finish: Callable[[PyTree], PyTree]


Cache: TypeAlias = PyTree
"""Incremental decoding state: every array leaf is [layers, rows, ...], so a beam reorders axis 1."""

TokensToLogits: TypeAlias = Callable[
    [Int[Array, " rows"], Int[Array, ""], Cache], tuple[Float[Array, "rows vocab"], Cache]
]
"""`(tokens, position, cache) -> (logits, cache)`: one decoding step, all rows at the same position."""


@runtime_checkable
class Corpus(Protocol):
    """Aligned lines in two languages. `pairs` may be called more than once and gives the same lines each time."""

    @property
    def languages(self) -> tuple[str, str]:
        """Language codes of the first and the second side of a pair."""
        ...

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        ...

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The aligned lines, in order, without line ends."""
        ...

    def fingerprint(self) -> str:
        """A hash of the content: equal fingerprints mean equal pairs."""
        ...


@runtime_checkable
class FamilyCorpus(Corpus, Protocol):
    """A corpus that knows which family (or domain) each pair belongs to; scores are then given by family too."""

    def families(self) -> list[str]:
        """A label for each pair, aligned with `pairs`."""
        ...


def path_name(path: Sequence[Any]) -> str:
    """The name of a JAX key path, parts joined by slashes.

    >>> import jax
    >>> tree = {"encoder": {"kernel": 1.0}}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['encoder/kernel']
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def path_predicate(*patterns: str) -> Callable[[str], bool]:
    """True for names in which any of the regular expressions is found: the one mechanism for per-parameter rules.

    >>> is_norm = path_predicate(r"norm/(scale|bias)$")
    >>> is_norm("encoder/layers/norm/scale"), is_norm("encoder/layers/kernel")
    (True, False)
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def select(params: PyTree, predicate: Callable[[str], bool]) -> PyTree:
    """A tree of booleans shaped like `params`: True where the predicate holds for the parameter's path.

    >>> select({"kernel": 1.0, "bias": 2.0}, path_predicate("bias"))
    {'bias': True, 'kernel': False}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: predicate(path_name(path)), params)
