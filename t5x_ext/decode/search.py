"""What a search is: from a model and a batch of sources to hypotheses. Nothing lists the searches that there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Params

Constraint: TypeAlias = Callable[
    [Float[Array, "rows vocab"], Int[Array, "rows length"], Int[Array, ""]], Float[Array, "rows vocab"]
]
"""`(logits, tokens, position) -> logits`, with -inf for every token that is forbidden next.

`tokens` are a hypothesis so far, without its forced prefix: the first `position` of them are chosen, and the
end-of-sentence token fills the rest. `logits` score the token at `position`. A constraint may also lower logits by
finite amounts, which counts in the score of a hypothesis; it must not raise any, or searches stop too early. It is
hashable, as a frozen dataclass is.
"""


class SearchInputs(NamedTuple):
    """A padded batch of sources, and what is asked of their translations."""

    source: Int[Array, "rows source_length"]  # encoder input, tag and end of sentence included; padded with anything
    source_lengths: Int[Array, " rows"]  # tokens of each row that are no padding
    prefix: Int[Array, "rows prefix"]  # tokens that every hypothesis starts with; the end of sentence is none of them
    max_lengths: Int[Array, " rows"]  # most tokens of a row's hypotheses, prefix and end of sentence included
    row_ids: Int[Array, " rows"]  # a number for each row that does not depend on the batch, as that of its line
    key: Array  # random key, of the search's `seed`
    eos_id: int  # end of sentence, also the decoder's first input
    max_length: int  # static bound of `max_lengths`
    constraints: tuple[Constraint, ...] = ()  # applied in order


class Hypotheses(NamedTuple):
    """What a search found for each row, best first; independent samples in the order of sampling."""

    tokens: Int[Array, "rows n_best max_length"]  # prefix first, end of sentence last and repeated up to `max_length`
    lengths: Int[Array, "rows n_best"]  # tokens with prefix and end of sentence; 0 where a row has fewer hypotheses
    scores: Float[Array, "rows n_best"]  # log-probability over the length penalty, float32; -inf where a row has fewer


@runtime_checkable
class Search(Protocol):
    """A way to find hypotheses: a frozen dataclass whose fields are its options.

    It alone decides which methods of the model it calls, through `model.apply({"params": params}, ..., method=name)`:
    an autoregressive search needs a model that is `Decodable`, others may need something else, and `require_methods`
    says in one line that a model lacks it. What it finds must not depend on `n_best`, which only says how much of it
    is returned; where there is a most, a larger `n_best` is refused at construction.

    A search that draws random numbers has a field `seed`, from which `SearchInputs.key` is made. Another seed does not
    compile another program: while the search is called, the field is 0.
    """

    @property
    def n_best(self) -> int:
        """Hypotheses that are returned for each source."""
        ...

    @property
    def rows_per_source(self) -> int:
        """Rows of a source that are computed side by side: what memory and operations grow with."""
        ...

    def __call__(self, model: Any, params: Params, inputs: SearchInputs) -> Hypotheses:
        """Searches; traced by `jax.jit`.

        Args:
          model: a module, or an `Ensemble`.
          params: its parameters.
          inputs: arrays are traced, the rest is static.

        Returns:
          `Hypotheses` of shape [rows, n_best].

        Raises:
          UserError: where the model lacks what the search needs.
        """
        ...


class OneHypothesis:
    """Base of searches that find one hypothesis for each source, side by side with nothing."""

    @property
    def n_best(self) -> int:
        """One."""
        return 1

    @property
    def rows_per_source(self) -> int:
        """One."""
        return 1
