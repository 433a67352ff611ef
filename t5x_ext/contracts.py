"""Floor 0: the shapes of things that rooms hand to each other. No behaviour beyond reading tree paths.

A batch is a mapping of arrays. An objective turns parameters and a batch into a `Loss`. A batch source gives batch i as
a pure function of its configuration and i. A corpus yields pairs of lines. A plugin is any importable object that
satisfies the small Protocol of its kind; nothing is registered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypedDict, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree: TypeAlias = Any
Params: TypeAlias = Any
"""A nested dictionary of arrays without metadata boxes, as an initialised model gives after unboxing."""

Frozen: TypeAlias = Mapping[str, Params]
"""Parameters that an objective reads and no update changes, by name: a teacher, or the rest of a trainable subset."""

AXIS_NAMES = ("batch", "length", "embed", "heads", "head_dim", "mlp", "vocab", "layers")
"""The one vocabulary of logical axis names; `None` marks an axis that is never split."""

Axes: TypeAlias = tuple[str | None, ...]
"""A logical name for each axis of an array."""

MERGED_AXES: tuple[Axes, ...] = (("heads", "head_dim"),)
"""Axes to merge before a kernel is treated as a matrix: attention kernels are `embed x (heads * head_dim)`."""


class UserError(Exception):
    """A user's mistake, said in one line: what was wrong, where, what would be right. Commands exit with code 2."""


AnyArray: TypeAlias = Array | np.ndarray
"""An array of JAX, or of NumPy where a function is called outside of `jit`."""

if TYPE_CHECKING:
    Batch: TypeAlias = Mapping[str, Array]
else:
    Batch = Mapping[str, AnyArray]  # what runs outside of `jit` may be given NumPy arrays
"""Arrays by name, rows first; a task says which (`train.Definition.batch`)."""


class TranslationBatch(TypedDict):
    """Packed encoder-decoder rows.

    Padding is where a segment id is 0, with any token; examples of one row are numbered from 1 on both sides,
    and positions restart at 0 with every example.
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

    `sum / weight` is the mean loss; a metric is a pair (sum, weight) of its own. `mutable` is the next value of the
    objective's mutable state; () keeps it.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
    mutable: PyTree = ()


class Context(NamedTuple):
    """What an objective may read beside parameters and batch."""

    step: Int[Array, ""] | int  # updates done
    key: Array | None = None  # random key of this microbatch and step; fold in a constant of your own but for dropout
    train: bool = False  # whether dropout is on
    frozen: Frozen = MappingProxyType({})
    mutable: PyTree = ()  # masks, queues, statistics; as `init_mutable` or the last `Loss.mutable` gave them
    totals: PyTree = ()  # what `totals` gave for the whole batch of which this is a microbatch

    @property
    def rngs(self) -> dict[str, Array] | None:
        """The random keys of Flax modules: `dropout` in training; None in evaluation."""
        return {"dropout": self.key} if self.train and self.key is not None else None


@runtime_checkable
class Objective(Protocol):
    """What is minimised.

    Two more methods are used where an objective has them: `init_mutable(params) -> PyTree` gives the first value of its
    mutable state, and `totals(batch, context) -> PyTree` is computed once over the whole batch before its microbatches
    and given to each in `Context.totals`, so that a sum of means over different denominators is exact under gradient
    accumulation.
    """

    def __call__(self, params: Params, batch: Batch, context: Context) -> Loss:
        """Value over a batch, as sums."""
        ...


@runtime_checkable
class Likelihood(Objective, Protocol):
    """An objective over labels with a categorical likelihood: curvature, scoring and distillation derive from it."""

    def logits(self, params: Params, batch: Batch, context: Context) -> Float[Array, "*labels vocab"]:
        """Scores of every label position, float32."""
        ...

    def labels(self, batch: Batch) -> Int[Array, "*labels"]:
        """The labels."""
        ...

    def label_weights(self, batch: Batch, context: Context) -> Float[Array, "*labels"]:
        """1 where a label counts, 0 where it is padding."""
        ...

    def single_examples(self, batch: Batch, count: int) -> tuple[Batch, Int[Array, ""]]:
        """`count` evenly spaced examples, each alone in a row: arrays [count, 1, ...], and how many were found."""
        ...


class Epoch(NamedTuple):
    """The size of a pass over the data."""

    batches: int
    examples: int


@runtime_checkable
class BatchSource(Protocol):
    """Training batches without end: batch i is a pure function of (configuration, seed, i, skipped ranges)."""

    @property
    def rows(self) -> int:
        """Rows of a batch, over all hosts."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """What decides the batches, as JSON; a run that resumes must find the same."""
        ...

    def read(self, index: int, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """Rows `start` to `stop` of batch `index`; arrays that are not sharded over rows are whole."""
        ...

    def skipping(self, ranges: Sequence[tuple[int, int]]) -> BatchSource:
        """The same batches without the ranges [start, stop) of them, later ones moved forward."""
        ...

    def unskipped(self, index: int) -> int:
        """The number that batch `index` has where nothing is skipped."""
        ...

    def examples(self, index: int) -> Sequence[Any]:
        """Identities of the examples of batch `index`, as JSON: what a person looks for when a batch is bad."""
        ...

    def work(self, index: int) -> float | None:
        """Floating point operations of the model for an update on batch `index`; None if unknown."""
        ...

    def memory(self) -> Any:
        """JSON that spares a resumed run planning or reading from the beginning; kept in checkpoints."""
        ...

    def remember(self, memory: Any) -> None:
        """Takes what `memory` gave in an earlier process."""
        ...

    def epoch(self) -> Epoch | None:
        """The size of the first pass over the data; None where there are no passes."""
        ...


class Direction(NamedTuple):
    """Language codes of a direction of translation; the same code twice is a language model's."""

    source_language: str
    target_language: str

    @property
    def name(self) -> str:
        """Both codes.

        >>> Direction("en", "de").name
        'en-de'
        """
        return f"{self.source_language}-{self.target_language}"


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
class Decodable(Protocol):
    """A Flax module that a search can decode with.

    All but `abstract_params` run through `model.apply({"params": params}, ..., method="encode")`. The source is encoded
    once, its `cross_memory` computed once, and `decode_step` called for one target position after the other. `rows` are
    hypotheses; several of a sentence may share one memory, which the search maps over.
    """

    def apply(self, variables: Mapping[str, Params], *args: Any, method: str, **kwargs: Any) -> Any:
        """Calls a method with parameters."""
        ...

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        ...

    def encode(
        self,
        source_tokens: Int[AnyArray, "batch source_length"],
        source_segment_ids: Int[AnyArray, "batch source_length"],
        source_positions: Int[AnyArray, "batch source_length"],
    ) -> Float[Array, "batch source_length embed"]:
        """What the decoder reads of the source; segment ids are 0 at padding, where values mean nothing."""
        ...

    def cross_memory(self, encoded: Float[Array, "batch source_length embed"]) -> PyTree:
        """What the decoder's layers keep of it: arrays [layers, batch, source_length, ...]."""
        ...

    def empty_cache(self, rows: int, max_length: int) -> Cache:
        """A cache with room for `max_length` target positions: arrays [layers, rows, max_length, ...]."""
        ...

    def decode_step(
        self,
        tokens: Int[AnyArray, " rows"],
        position: Int[Array, ""],
        cache: Cache,
        memory: PyTree,
        source_mask: Bool[AnyArray, "rows source_length"],
    ) -> tuple[Float[Array, "rows vocab"], Cache]:
        """Scores of the token after `position`, float32, and the cache with this position written.

        Args:
          tokens: decoder input at `position`; EOS at position 0.
          position: the same for all rows; those before it are in the cache.
          cache: from `empty_cache` or the step before.
          memory: from `cross_memory`, its axis 1 aligned with `tokens`.
          source_mask: True where the source has a token.
        """
        ...


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
