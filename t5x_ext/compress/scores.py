"""Which entries of a parameter tree matter: scores that pruning at initialisation keeps the largest of.

A score is any callable `score(loss_fn, params, selected, batches, key)`; those of this file are examples of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from t5x_ext.contracts import Batch, Params, PyTree, UserError, path_name

LossFn: TypeAlias = Callable[[Params, Batch], Float[Array, ""]]
"""`(params, batch) -> mean loss` of a batch, without dropout. A `jax.tree_util.Partial` passes its arrays as arguments
where a closure would compile them in as constants."""

ScoreFunction = TypeVar("ScoreFunction", bound=Callable[..., Any])


@runtime_checkable
class Score(Protocol):
    """Scores entries of parameters; the largest are kept.

    An attribute `scope` (see `masks.Scope`) names the scope that a score is meant for; without it that is "global".
    """

    def __call__(
        self, loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array
    ) -> PyTree:
        """Scores of the selected parameters.

        Args:
          loss_fn: mean loss of a batch.
          params: the tree at which to score.
          selected: a tree like `params`: False where a parameter is not scored, else True, or from the second round of
            iterative pruning on a boolean array of the parameter's shape, True where an entry is kept so far.
          batches: calibration batches; data-free scores ignore them.
          key: random key.

        Returns:
          A tree like `params` with scores of the parameter's shape where `selected` is not False; the rest is ignored.
        """
        ...


def is_selected(flag: Any) -> bool:
    """Whether a leaf of `selected` asks for scores: True or an array of the entries kept so far."""
    return bool(flag) if isinstance(flag, bool | np.bool_) else True


def map_selected(function: Callable[..., Any], params: Params, selected: PyTree, *others: PyTree) -> PyTree:
    """`function` of the selected leaves of `params` (and of the same leaves of `others`), None elsewhere.

    >>> map_selected(abs, {"kernel": -1.0, "bias": -2.0}, {"kernel": True, "bias": False})
    {'bias': None, 'kernel': 1.0}
    """
    return jax.tree.map(
        lambda leaf, flag, *rest: function(leaf, *rest) if is_selected(flag) else None, params, selected, *others
    )


def for_scope(scope: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """A decorator that marks a score as meant for a scope of `masks.from_scores`."""

    def mark(score: ScoreFunction) -> ScoreFunction:
        setattr(score, "scope", scope)  # noqa: B010  # mypy knows no attributes of functions
        return score

    return mark


def random(loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array) -> PyTree:
    """Independent normal numbers: every set of entries is equally likely.

    Args:
      loss_fn: not used.
      params: parameters.
      selected: which of them; see `Score`.
      batches: not used.
      key: random key.
    """
    del loss_fn, batches
    leaves, structure = jax.tree.flatten(params)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return map_selected(lambda leaf, key: jax.random.normal(key, leaf.shape, jnp.float32), params, selected, keys)


def magnitude(loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array) -> PyTree:
    """Absolute values.

    Args:
      loss_fn: not used.
      params: parameters.
      selected: which of them; see `Score`.
      batches: not used.
      key: not used.

    Raises:
      UserError: if all of a parameter are zero.
    """
    del loss_fn, batches, key
    return checked("magnitude", map_selected(lambda w: jnp.abs(_widened(w)), params, selected))


@for_scope("er")
def er(loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array) -> PyTree:
    """Random scores, for the layer densities of a sparse Erdős-Rényi graph (`masks.er_densities`).

    Args:
      loss_fn: not used.
      params: parameters.
      selected: which of them; see `Score`.
      batches: not used.
      key: random key.

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity (arXiv
      1707.04780). Between matrices of one shape it differs from `random` only in that each keeps the same share.
    """
    return random(loss_fn, params, selected, batches, key)


def snip(loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array) -> PyTree:
    r"""The effect of removing an entry on the loss, to first order: :math:`|w \odot \sum_b \nabla L_b|`.

    That is the absolute derivative of the loss by a mask of ones. Gradients of batches are summed before the absolute
    value, in float32 at least; the released code's division by the sum of all scores changes no order.

    Args:
      loss_fn: mean loss of a batch.
      params: parameters.
      selected: which of them; see `Score`.
      batches: calibration batches, one or more.
      key: not used.

    Raises:
      UserError: if there are no batches, or every score of a parameter is zero (as with a factor that is initialised
        to zero), or one is not finite.

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity (arXiv 1810.02340).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda params, batch: jnp.sum(params["w"] * batch["x"])
      >>> scores = snip(loss, {"w": jnp.array([1.0, -2.0])}, {"w": True}, [{"x": jnp.array([3.0, 1.0])}], None)
      >>> scores["w"].tolist()
      [3.0, 2.0]
    """
    del key
    gradients = _summed(_gradient, "snip", as_partial(loss_fn), params, selected, batches)
    return checked("snip", map_selected(lambda w, g: jnp.abs(_widened(w) * g), params, selected, gradients))


def grasp(loss_fn: LossFn, params: Params, selected: PyTree, batches: Sequence[Batch], key: Array) -> PyTree:
    r"""The effect of an entry on the gradient flow: :math:`w \odot \sum_b H_b g` with :math:`g = \sum_b \nabla L_b`.

    Removing entry q changes :math:`\|g\|^2` by about :math:`-2 w_q (Hg)_q`, so that the largest values are those whose
    removal would cost most of the gradient. Gradient and Hessian are those of the selected parameters alone; the
    product is one forward-over-reverse derivative a batch. The released code divides by :math:`|\sum z|`, which changes
    no order.

    Args:
      loss_fn: mean loss of a batch, twice differentiable.
      params: parameters.
      selected: which of them; see `Score`.
      batches: calibration batches, one or more; they are read twice.
      key: not used.

    Raises:
      UserError: as `snip`.

    References:
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow (arXiv 2002.07376).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda params, batch: jnp.sum(batch["a"] * params["w"] ** 2) / 2  # gradient a w, Hessian diag(a)
      >>> scores = grasp(loss, {"w": jnp.array([1.0, 2.0])}, {"w": True}, [{"a": jnp.array([3.0, 1.0])}], None)
      >>> scores["w"].tolist()
      [9.0, 4.0]
    """
    del key
    loss, batches = as_partial(loss_fn), tuple(batches)
    gradients = _summed(_gradient, "grasp", loss, params, selected, batches)
    flow = _summed(_hessian_product, "grasp", loss, params, selected, batches, gradients)
    return checked("grasp", map_selected(lambda w, hg: _widened(w) * hg, params, selected, flow))


def synflow(
    loss_fn: LossFn,
    params: Params,
    selected: PyTree,
    batches: Sequence[Batch],
    key: Array,
    *,
    chains: Sequence[tuple[str, str]] = (("down/kernel", "up/kernel"),),
) -> PyTree:
    r"""The flow through an entry: :math:`|w \, \partial R / \partial w|`, R a sum of path products of absolute weights.

    Without data. R is the mean output of each chain of two matrices, first down then up, for an input of ones and
    absolute weights; activations pass positive numbers through, biases count as zero. For stacked matrices there is one
    chain a layer. Entries that are removed so far count as zero, so that rounds matter as they do in the paper.

    Args:
      loss_fn: not used.
      params: parameters.
      selected: which of them; see `Score`. Both matrices of a chain must be selected.
      batches: not used.
      key: not used.
      chains: ends of paths of the first and the second matrix of a chain, whose beginnings are equal.

    Raises:
      UserError: if a selected parameter belongs to no chain, two matrices do not fit, or every score of one is zero.

    References:
      Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow (arXiv
      2006.05467).
    """
    del loss_fn, batches, key
    weights, scores = _absolute_by_name(params, selected), {}
    for name in weights:
        for first, second in chains:
            if name.endswith(first) and (partner := name.removesuffix(first) + second) in weights:
                scores[name], scores[partner] = _flows(name, weights[name], partner, weights[partner])
    left = [name for name in weights if name not in scores]
    if left:
        shown = ", ".join(" -> ".join(chain) for chain in chains)
        raise UserError(f"synflow: {left[0]} is selected and in no chain; chains are {shown}")
    return checked("synflow", jax.tree_util.tree_map_with_path(lambda path, _: scores.get(path_name(path)), params))


def checked(name: str, scores: PyTree) -> PyTree:
    """The scores, where they say anything.

    Args:
      name: of the score, for messages.
      scores: a tree of arrays or None.

    Raises:
      UserError: if every score of a parameter is zero, or one is not finite.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(scores):
        largest = float(jnp.max(jnp.abs(leaf))) if leaf.size else 1.0  # NaN wins every maximum
        if not math.isfinite(largest):
            raise UserError(f"{name}: a score of {path_name(path)} is not finite; look at the calibration batches")
        if largest == 0.0:
            raise UserError(
                f"{name}: every score of {path_name(path)} is 0 and says nothing; where one of two factors is "
                "initialised to zero (up, LoRA's B), products of weights and gradients are 0: initialise both with "
                "normal(0.02), init='bert'"
            )
    return scores


def as_partial(loss_fn: LossFn) -> Partial:
    """The loss as a tree that compiled functions take as an argument."""
    return loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)


def _widened(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _summed(
    derivative: Callable[..., list[Array]],
    name: str,
    loss_fn: Partial,
    params: Params,
    selected: PyTree,
    batches: Sequence[Batch],
    *more: PyTree,
) -> PyTree:
    """The sum over batches of a derivative by the selected parameters, shaped like them, None elsewhere."""
    flags = tuple(map(is_selected, jax.tree.leaves(selected)))
    if not any(flags):
        raise UserError(f"{name}: no parameter is selected")
    total = None
    for batch in batches:
        term = derivative(loss_fn, params, flags, batch, *more)
        total = term if total is None else jax.tree.map(jnp.add, total, term)
    if total is None:
        raise UserError(f"{name} scores by gradients and got no calibration batch")
    found = iter(total)
    return jax.tree.unflatten(jax.tree.structure(params), [next(found) if flag else None for flag in flags])


def _loss_of_selected(
    loss_fn: Partial, params: Params, flags: tuple[bool, ...], batch: Batch
) -> tuple[Callable[[list[Array]], Array], list[Array]]:
    """The loss as a function of the selected leaves alone, and those leaves."""
    leaves, structure = jax.tree.flatten(params)

    def loss(chosen: list[Array]) -> Array:
        given = iter(chosen)
        merged = [next(given) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return loss_fn(jax.tree.unflatten(structure, merged), batch)

    return loss, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]


@jax.jit(static_argnums=2)
def _gradient(loss_fn: Partial, params: Params, flags: tuple[bool, ...], batch: Batch) -> list[Array]:
    loss, chosen = _loss_of_selected(loss_fn, params, flags, batch)
    return list(map(_widened, jax.grad(loss)(chosen)))


@jax.jit(static_argnums=2)
def _hessian_product(
    loss_fn: Partial, params: Params, flags: tuple[bool, ...], batch: Batch, direction: PyTree
) -> list[Array]:
    loss, chosen = _loss_of_selected(loss_fn, params, flags, batch)
    tangents = [tangent.astype(leaf.dtype) for tangent, leaf in zip(jax.tree.leaves(direction), chosen, strict=True)]
    _, product = jax.jvp(jax.grad(loss), (chosen,), (tangents,))
    return list(map(_widened, product))


def _absolute_by_name(params: Params, selected: PyTree) -> dict[str, Array]:
    absolute = map_selected(lambda w, flag: jnp.where(flag, jnp.abs(_widened(w)), 0.0), params, selected, selected)
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(absolute)}


def _flows(down_name: str, down: Array, up_name: str, up: Array) -> tuple[Array, Array]:
    """For both matrices of each chain w dR/dw, R the mean of ones @ down @ up."""
    fitting = [
        lead
        for lead in range(min(down.ndim, up.ndim) - 1)
        if down.shape[:lead] == up.shape[:lead] and down.shape[-1] == up.shape[lead]
    ]
    if not fitting:
        raise UserError(f"synflow: {down_name} {down.shape} and {up_name} {up.shape} do not multiply")
    lead = fitting[-1]
    matrices = down.reshape(*down.shape[:lead], -1, down.shape[-1]), up.reshape(*up.shape[: lead + 1], -1)
    flow = lambda pair: jnp.sum(jnp.mean(jnp.sum(pair[0], axis=-2, keepdims=True) @ pair[1], axis=-1))
    gradients = jax.grad(flow)(matrices)
    first, second = (w * g for w, g in zip(matrices, gradients, strict=True))
    return first.reshape(down.shape), second.reshape(up.shape)
