"""Masks of parameters: exactly so many entries kept, over all matrices together or by matrix, in one round or several.

A mask tree is shaped like the parameters, with a boolean array where entries are masked (True: kept) and None where all
of a parameter is kept. A matrix is one layer's slice of a stacked parameter, or a parameter that is not stacked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.compress.scores import LossFn, Score, as_partial, is_selected
from t5x_ext.contracts import MERGED_AXES, AnyArray, Batch, Params, PyTree, UserError, path_name

Scope: TypeAlias = Literal["global", "local", "er"]
"""Where entries compete: in all matrices together, in each matrix alone at one density, or in each matrix alone at the
density that an Erdős-Rényi graph gives its shape."""

Schedule: TypeAlias = Literal["exponential", "linear"]
"""How the density falls over rounds: density^((i+1)/rounds), or 1 - (1 - density) (i+1)/rounds."""


class LargeSparse(NamedTuple):
    """A wider bottleneck and the sparsity at which it keeps the budget of the narrow one."""

    bottleneck: int
    sparsity: Fraction


class MatrixReport(NamedTuple):
    """What a mask keeps of one matrix."""

    name: str  # path of the parameter, and `[layer]` where it is stacked
    entries: int
    kept: int


def as_density(*, density: float | Fraction | None = None, sparsity: float | Fraction | None = None) -> Fraction:
    """The share of entries that are kept, from it or from the share of zeros; exactly one of them is given.

    A float stands for the nearest decimal of 15 places, so that 0.9 is nine tenths.

    Raises:
      UserError: if both or none are given, or the number is outside of [0, 1].

    >>> as_density(sparsity=0.4), as_density(density=0.25)
    (Fraction(3, 5), Fraction(1, 4))
    """
    if (density is None) == (sparsity is None):
        raise UserError("give either density, the share of entries kept, or sparsity, the share of zeros")
    name, value = ("density", density) if sparsity is None else ("sparsity", sparsity)
    if not isinstance(value, Rational | float | np.floating) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{name} = {value!r} must be a number from 0 to 1")
    exact = Fraction(value) if isinstance(value, Rational) else Fraction(format(float(str(value)), ".15f"))
    return exact if sparsity is None else 1 - exact


def kept_entries(total: int, density: float | Fraction) -> int:
    """floor(density * total), which is total - ceil((1 - density) * total), in exact arithmetic.

    >>> kept_entries(580, 0.1), kept_entries(160, 0.6), kept_entries(3, Fraction(1, 3))
    (58, 96, 1)
    """
    return math.floor(as_density(density=density) * total)


def large_sparse(bottleneck: int, factor: int | float | Fraction) -> LargeSparse:
    """The Large-Sparse setting: `factor` times the bottleneck at sparsity 1 - 1/factor keeps as many weights.

    Args:
      bottleneck: width of the dense adapter.
      factor: how much wider the sparse one is; at least 1, and `factor * bottleneck` must be whole.

    Raises:
      UserError: otherwise.

    >>> large_sparse(64, 4)
    LargeSparse(bottleneck=256, sparsity=Fraction(3, 4))
    """
    exact = Fraction(str(factor))
    if exact < 1 or (exact * bottleneck).denominator != 1 or bottleneck < 1:
        raise UserError(
            f"large_sparse: factor {factor} must be at least 1 and make a whole number of bottleneck {bottleneck}"
        )
    return LargeSparse(int(exact * bottleneck), 1 - 1 / exact)


def er_densities(shapes: Sequence[tuple[int, int]], density: float | Fraction) -> list[float]:
    r"""Densities of matrices in proportion to (n_in + n_out) / (n_in n_out), at most 1, of `density` over all of them.

    A matrix whose density would exceed 1 is dense, and the factor is solved again for the others, until none does.

    Args:
      shapes: (n_in, n_out) of each matrix.
      density: the share of all entries to keep.

    >>> er_densities([(4, 4), (4, 12)], 0.5)
    [0.6666666666666666, 0.4444444444444444]
    >>> er_densities([(2, 2), (20, 20)], 0.2)
    [1.0, 0.19200000000000003]
    """
    sizes = [n_in * n_out for n_in, n_out in shapes]
    wanted = float(as_density(density=density)) * sum(sizes)
    dense: set[int] = set()
    while len(dense) < len(shapes):
        free = [i for i in range(len(shapes)) if i not in dense]
        scale = (wanted - sum(sizes[i] for i in dense)) / sum(sum(shapes[i]) for i in free)
        densities = {i: scale * sum(shapes[i]) / sizes[i] for i in free}
        over = {i for i in free if densities[i] > 1}
        if not over:
            return [densities.get(i, 1.0) for i in range(len(shapes))]
        dense |= over
    return [1.0] * len(shapes)


def from_scores(
    scores: PyTree, density: float | Fraction, *, scope: Scope = "global", axes: PyTree | None = None
) -> PyTree:
    """Masks that keep the entries with the largest scores, floor(density * N) of all N together, exactly.

    Equal scores are taken in order: of leaves, then row by row within an array. With scope "local" or "er" each matrix
    keeps its share rounded down or up: what rounding down leaves goes one by one to the matrices with the largest
    remainders, earlier ones first, so that the total is exact there too.

    Args:
      scores: arrays, or None where nothing is masked; NaN counts as smallest.
      density: the share of entries to keep, from 0 to 1.
      scope: see `Scope`.
      axes: a tree like the parameters with a tuple of axis names for each (`models.logical_axes`): a leading axis
        `layers` stacks matrices, heads and head_dim are one axis. None: every parameter is one matrix, its last axis
        going out.

    Returns:
      A mask tree.

    Raises:
      UserError: for a density outside of [0, 1] or an unknown scope.

    Example:
      >>> masks = from_scores({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0, 0.0]), "c": None}, 0.4)
      >>> masks["a"].tolist(), masks["b"].tolist(), masks["c"]
      ([True, False], [True, False, False], None)
    """
    density = as_density(density=density)
    if scope not in get_args(Scope):
        raise UserError(f"scope = {scope!r} is none of {', '.join(map(repr, get_args(Scope)))}")
    leaves, structure = jax.tree.flatten(scores)
    matrices = _matrices(scores, axes)
    if scope == "global":
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) if leaves else jnp.zeros(0)
        mask = _largest(flat[None], np.array([kept_entries(flat.size, density)]))[0]
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = jnp.split(mask, ends) if leaves else []
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)
    shapes = [shape for matrix in matrices for shape in [matrix.shape] * matrix.layers]
    densities: Sequence[float | Fraction] = [density] * len(shapes)
    if scope == "er":
        densities = er_densities(shapes, density)
    counts = iter(_shares([n_in * n_out for n_in, n_out in shapes], densities, density))
    masks = []
    for leaf, matrix in zip(leaves, matrices, strict=True):
        kept = np.array([next(counts) for _ in range(matrix.layers)])
        masks.append(_largest(leaf.reshape(matrix.layers, -1), kept).reshape(leaf.shape))
    return jax.tree.unflatten(structure, masks)


def at_init(
    score: Score,
    loss_fn: LossFn,
    params: Params,
    selected: PyTree,
    batches: Sequence[Batch],
    key: Array,
    *,
    density: float | Fraction | None = None,
    sparsity: float | Fraction | None = None,
    scope: Scope | None = None,
    rounds: int = 1,
    schedule: Schedule = "exponential",
    axes: PyTree | None = None,
    allow_collapse: bool = False,
) -> PyTree:
    """Masks for training: scores at the initial weights, then the largest kept.

    With several rounds the scores are computed again under the mask so far: the loss sees masked weights, while the
    weights that scores are multiplied with, and the gradients that reach them, are not masked. So an entry that one
    round removed may come back in a later one.

    Args:
      score: what to keep the largest of; any callable of the signature of `Score`.
      loss_fn: mean loss of a batch, without dropout.
      params: initial weights.
      selected: a tree of booleans, True where a parameter is masked (`contracts.select`).
      batches: calibration batches.
      key: random key.
      density: the share of selected entries to keep; or
      sparsity: the share to remove.
      scope: where entries compete; None takes what the score is meant for, which is "global" unless it says so.
      rounds: how often to score and remove.
      schedule: densities of the rounds.
      axes: as in `from_scores`.
      allow_collapse: accept masks that keep nothing of a matrix.

    Returns:
      A mask tree.

    Raises:
      UserError: if nothing is selected, scores do not fit the parameters, or a matrix keeps no entry.
    """
    kept = as_density(density=density, sparsity=sparsity)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds = {rounds!r} must be a positive integer")
    if schedule not in get_args(Schedule):
        raise UserError(f"schedule = {schedule!r} is none of {', '.join(map(repr, get_args(Schedule)))}")
    if not any(map(is_selected, jax.tree.leaves(selected))):
        raise UserError("no parameter is selected for masking")
    scope = scope or preferred_scope(score)
    masks = None
    for number in range(rounds):
        masked_loss, live = loss_fn, selected
        if masks is not None:
            masked_loss, live = Partial(_masked_loss, as_partial(loss_fn), masks), _live(params, masks)
        scores = score(masked_loss, params, live, batches, jax.random.fold_in(key, number))
        scores = _fitting(scores, params, selected)
        masks = from_scores(scores, density_of_round(kept, number, rounds, schedule), scope=scope, axes=axes)
    if kept > 0 and not allow_collapse:
        _refuse_collapse(report(masks, axes), kept, scope)
    return masks


def density_of_round(density: Fraction, number: int, rounds: int, schedule: Schedule) -> Fraction:
    """The density after round `number` (from 0) of `rounds`; the last is `density` itself.

    >>> [float(density_of_round(Fraction(1, 4), i, 2, "exponential")) for i in range(2)]
    [0.5, 0.25]
    >>> [float(density_of_round(Fraction(1, 4), i, 2, "linear")) for i in range(2)]
    [0.625, 0.25]
    """
    done = Fraction(number + 1, rounds)
    if schedule == "linear" or done == 1:
        return 1 - (1 - density) * done
    return Fraction(float(density) ** float(done))


def preferred_scope(score: Callable[..., Any]) -> Scope:
    """What the attribute `scope` of a score says, through `functools.partial` too; else "global"."""
    while isinstance(score, functools.partial):
        score = score.func
    return getattr(score, "scope", "global")


def apply_masks(params: Params, masks: PyTree) -> Params:
    """The parameters with zeros where masks are False; those without a mask are returned as they are.

    >>> apply_masks({"a": jnp.array([1.0, 2.0]), "b": 3.0}, {"a": jnp.array([True, False]), "b": None})["a"].tolist()
    [1.0, 0.0]
    """
    return map_masks(lambda leaf, mask: jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)), params, masks)


def map_masks(function: Callable[[Array, Bool[Array, "..."]], Any], tree: PyTree, masks: PyTree) -> PyTree:
    """`function(leaf, mask)` where there is a mask, the leaf itself elsewhere."""
    return jax.tree.map(lambda leaf, mask: leaf if mask is None else function(leaf, mask), tree, masks)


def report(masks: PyTree, axes: PyTree | None = None) -> list[MatrixReport]:
    """How much of each matrix is kept, in the order of the tree.

    >>> report({"adapter": jnp.array([[True, False]]), "bias": None})
    [MatrixReport(name='adapter', entries=2, kept=1)]
    """
    rows = []
    matrices = _matrices(masks, axes)
    for (path, leaf), matrix in zip(jax.tree_util.tree_leaves_with_path(masks), matrices, strict=True):
        counts = np.asarray(jnp.sum(leaf.reshape(matrix.layers, -1), axis=1))
        for layer, kept in enumerate(counts):
            name = path_name(path) + (f"[{layer}]" if matrix.stacked else "")
            rows.append(MatrixReport(name, leaf.size // matrix.layers, int(kept)))
    return rows


def report_text(rows: Sequence[MatrixReport]) -> str:
    """A report as a table, its total last.

    >>> print(report_text([MatrixReport("down/kernel[0]", 8, 2)]))
    down/kernel[0]  kept 2 of 8  sparsity 0.7500
    all             kept 2 of 8  sparsity 0.7500
    """
    total = MatrixReport("all", sum(row.entries for row in rows), sum(row.kept for row in rows))
    width = max(len(row.name) for row in (*rows, total))
    sparsity = lambda row: 1 - row.kept / row.entries if row.entries else 0.0
    lines = (
        f"{row.name:{width}}  kept {row.kept:,} of {row.entries:,}  sparsity {sparsity(row):.4f}"
        for row in (*rows, total)
    )
    return "\n".join(lines)


class _Matrices(NamedTuple):
    """A parameter as matrices: how many are stacked, their shape, and whether by an axis `layers`."""

    layers: int
    shape: tuple[int, int]
    stacked: bool


def _matrices(tree: PyTree, axes: PyTree | None) -> list[_Matrices]:
    """For each array of a tree (None being no array) the matrices that it holds."""
    arrays = jax.tree.leaves(tree)
    names: list[Any] = [None] * len(arrays)
    if axes is not None:
        pairs = jax.tree.map(lambda leaf, name: (leaf, name), tree, axes, is_leaf=lambda node: node is None)
        is_pair = lambda node: isinstance(node, tuple)
        names = [name for leaf, name in jax.tree.leaves(pairs, is_leaf=is_pair) if leaf is not None]
    return [_as_matrices(leaf.shape, name) for leaf, name in zip(arrays, names, strict=True)]


def _as_matrices(shape: tuple[int, ...], names: Sequence[str | None] | None) -> _Matrices:
    stacked = bool(names) and names[0] == "layers"  # type: ignore[index]
    count = shape[0] if stacked else 1
    rest = list(shape[1:] if stacked else shape)
    labels: list[Any] = list(names[1:] if stacked else names) if names else [None] * len(rest)
    for merged in MERGED_AXES:
        for at in range(len(labels) - len(merged) + 1):
            if tuple(labels[at : at + len(merged)]) == merged:
                rest[at : at + len(merged)] = [math.prod(rest[at : at + len(merged)])]
                labels[at : at + len(merged)] = [None]
    return _Matrices(count, (math.prod(rest[:-1]), rest[-1] if rest else 1), stacked)


@jax.jit
def _largest(scores: Float[Array, "rows entries"], kept: Int[AnyArray, " rows"]) -> Bool[Array, "rows entries"]:
    """True at the `kept[r]` largest scores of row r, the first ones of equals; NaN below everything."""
    missing = jnp.isnan(scores)
    order = jnp.lexsort((-jnp.where(missing, 0.0, scores), missing), axis=-1)
    ranks = jnp.argsort(order, axis=-1)
    return ranks < kept[:, None]


def _shares(sizes: Sequence[int], densities: Sequence[float | Fraction], density: Fraction) -> list[int]:
    """Entries kept of each matrix: its share rounded, the total being exactly that of all matrices together."""
    exact = [Fraction(share) * size for share, size in zip(densities, sizes, strict=True)]
    # Densities of floats may miss a whole number by a rounding error.
    near = [Fraction(round(value)) if abs(value - round(value)) < Fraction(1, 10**6) else value for value in exact]
    counts = [math.floor(value) for value in near]
    left = kept_entries(sum(sizes), density) - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - near[i], i))
    for i in by_remainder[: max(left, 0)]:
        counts[i] += 1
    return counts


def _masked_loss(loss_fn: Partial, masks: PyTree, params: Params, batch: Batch) -> Float[Array, ""]:
    """The loss at masked weights; gradients pass as if there were no mask."""
    seen = map_masks(lambda w, mask: w + jax.lax.stop_gradient(jnp.where(mask, w, 0) - w), params, masks)
    return loss_fn(seen, batch)


def _live(params: Params, masks: PyTree) -> PyTree:
    """`selected` of a later round: the mask where there is one, else False."""
    return jax.tree.map(lambda _, mask: False if mask is None else mask, params, masks)


def _fitting(scores: PyTree, params: Params, selected: PyTree) -> PyTree:
    """Scores of the selected parameters only, after a look at their shapes."""

    def fitting(path: Sequence[Any], leaf: Array, flag: Any, score: Any) -> Array | None:
        if not is_selected(flag):
            return None
        if getattr(score, "shape", None) != leaf.shape:
            found = getattr(score, "shape", type(score).__name__)
            raise UserError(f"the score of {path_name(path)} has shape {found}, the parameter {leaf.shape}")
        return jnp.asarray(score)

    try:
        return jax.tree_util.tree_map_with_path(fitting, params, selected, scores)
    except ValueError as error:
        raise UserError(
            "a score must return a tree like the parameters, with an array for each selected one"
        ) from error


def _refuse_collapse(rows: Sequence[MatrixReport], density: Fraction, scope: Scope) -> None:
    empty = [row.name for row in rows if row.kept == 0 and row.entries]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        way = "scope='local' keeps a share of each; " if scope == "global" else ""
        raise UserError(
            f"at density {float(density):g} nothing is kept of {empty[0]}{more}; {way}allow_collapse=True accepts it"
        )
