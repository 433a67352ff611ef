"""The compiled program of one batch: a search with a model, to token ids."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Int

from t5x_ext.contracts import Params, UserError
from t5x_ext.decode.search import Constraint, Hypotheses, Search, SearchInputs


@partial(jax.jit, static_argnames=("model", "eos_id", "max_length", "search", "constraints"))
def decode_batch(
    model: Any,
    params: Params,
    source: Int[Array, "rows source_length"],
    source_lengths: Int[Array, " rows"],
    prefix: Int[Array, "rows prefix"],
    max_lengths: Int[Array, " rows"],
    row_ids: Int[Array, " rows"],
    key: Array,
    *,
    eos_id: int,
    max_length: int,
    search: Search,
    constraints: tuple[Constraint, ...] = (),
) -> Hypotheses:
    """Searches a padded batch; the arguments are the fields of `SearchInputs`.

    Compiled once for each model and search (compared by their fields, so that two equal ones share), constraints and
    shape. On a mesh the devices must divide the rows.

    Raises:
      UserError: where model and search do not fit each other.
    """
    inputs = SearchInputs(
        source, source_lengths, prefix, max_lengths, row_ids, key, eos_id, max_length, tuple(constraints)
    )
    found = search(model, params, inputs)
    expected = (source.shape[0], search.n_best)
    if found.tokens.shape[:2] != expected or found.lengths.shape != expected or found.scores.shape != expected:
        raise UserError(
            f"{type(search).__name__} returned hypotheses of shape {found.lengths.shape}, "
            f"not [rows, n_best] = {expected}"
        )
    return found


def random_key(search: Search) -> Array:
    """The random key of a search, from its field `seed`; of one without such a field it is not used."""
    return jax.random.key(getattr(search, "seed", 0))


def without_seed(search: Search) -> Search:
    """The search as it is compiled: another seed must not compile it again."""
    if dataclasses.is_dataclass(search) and not isinstance(search, type) and getattr(search, "seed", 0) != 0:
        return dataclasses.replace(search, seed=0)
    return search
