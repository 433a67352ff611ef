"""Ginger: low-rank Gauss-Newton curvature, one block a parameter, at a cost linear in the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from t5x_ext.contracts import Params, PyTree, UserError, path_name, path_predicate, select
from t5x_ext.optim.checks import check_choice, check_given, check_integer, check_number, check_outermost
from t5x_ext.optim.learning_rate import with_learning_rate
from t5x_ext.optim.matrices import named_axes

CurvatureGradFn = Callable[[Params], PyTree]
_EPS = float(jnp.finfo(jnp.float32).eps)


class ScaleByGingerState(NamedTuple):
    """State of `scale_by_ginger`."""

    count: Int[Array, ""]  # type: ignore[assignment]  # updates done, int32
    mu: PyTree  # float32, the shape of the parameters: momentum
    basis: PyTree  # float32, layers + (rank,) + the other axes: orthonormal along the rank axis, unused entries zero
    eigvals: Float[Array, "blocks rank"]  # float32, descending; blocks are layers of a leaf, leaves in tree order

    @property
    def pulls_gradients(self) -> bool:
        """Tells the training step to refuse it inside `optax.MultiSteps`."""
        return True


def scale_by_ginger(
    rank: int = 4,
    b1: float = 0.9,
    b2: float = 0.99,
    damping: float = 1e-2,
    *,
    curvature_every: int = 1,
    axes: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides momentum by a low-rank estimate of the Gauss-Newton matrix, one block a parameter and layer.

    With :math:`n_t` the curvature gradient, whose outer product is an unbiased estimate of the Gauss-Newton matrix:

    .. math::
      m_t &= b_1 m_{t-1} + (1-b_1) g_t \\
      A_t &= \mathrm{top}_{rank}\left( b_2 A_{t-1} + (1-b_2)\, n_t n_t^\top \right)
             = U_t\, \mathrm{diag}(s_t)\, U_t^\top \\
      u_t &= (A_t + \text{damping} \cdot I)^{-1}\, m_t / (1-b_1^t)

    The paper stores the inverse; in exact arithmetic that is the same recursion. Here the eigenvalues of the curvature
    itself are stored: the released code loses them to rounding once they are 1e5 times the damping. The damping never
    decays, and the curvature has no bias correction. A step costs one curvature gradient, operations linear in the
    number of parameters, two rounds of batched reductions (the second orthogonalisation depends on the first) and one
    batched eigendecomposition of matrices with `rank + 1` rows.

    The update is `optimizer.update(grads, state, params, curvature_grad_fn=...)`; the training step gives the callable.
    Its result must not be scaled, clipped or averaged over devices after its scale sqrt(N), see
    `ginger_curvature_grads`. A curvature gradient that is not finite does not change basis and eigenvalues.

    Args:
      rank: eigenvectors a block. State is `rank + 1` float32 numbers a parameter; 0 leaves momentum over damping.
      b1: decay of momentum.
      b2: decay of curvature.
      damping: added to every eigenvalue. Outside the basis the step is momentum over damping, so small values make
        huge steps there.
      curvature_every: updates between two curvature gradients; in between the callable is not evaluated and the basis
        does not change.
      axes: the tree of parameters with a tuple of axis names for each (`models.logical_axes`): each entry of a leading
        axis `layers` is one block. None: every parameter is one block.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates are float32 and point uphill, as those of every `scale_by_*`.

    Raises:
      UserError: if a number is out of its range, `axes` do not fit, or `update` gets no `curvature_grad_fn`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> optimizer = scale_by_ginger(rank=1, b1=0.0, b2=0.5, damping=1.0)
      >>> params = jnp.zeros(2)
      >>> curvature = lambda params: jnp.array([2.0, 0.0])
      >>> updates, state = optimizer.update(
      ...     jnp.array([3.0, 3.0]), optimizer.init(params), params, curvature_grad_fn=curvature)
      >>> updates.round(4).tolist(), state.eigvals.tolist()  # curvature (1 - b2) * 2^2 along the first axis
      ([1.0, 3.0], [[2.0]])

    References:
      Hao et al., Ginger: An Efficient Curvature Approximation with Linear Complexity for General Neural Networks
      (arXiv 2402.03295).
    """
    check_integer("ginger", "rank", rank, at_least=0)
    check_number("ginger", "b1", b1, at_least=0, below=1)
    check_number("ginger", "b2", b2, at_least=0, below=1)
    check_number("ginger", "damping", damping, above=0)
    check_integer("ginger", "curvature_every", curvature_every, at_least=1)

    def init(params: Params) -> ScaleByGingerState:
        check_outermost("ginger", params)
        layout = _Layout.of(params, axes)
        leaves, structure = jax.tree.flatten(params)
        mu = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
        basis = [jnp.zeros(shape, jnp.float32) for shape in layout.basis_shapes(rank)]
        eigvals = jnp.zeros((len(layout.dims), rank), jnp.float32)
        return ScaleByGingerState(
            jnp.int32(0), jax.tree.unflatten(structure, mu), jax.tree.unflatten(structure, basis), eigvals
        )

    def update(
        updates: PyTree,
        state: ScaleByGingerState,
        params: Params | None = None,
        *,
        curvature_grad_fn: CurvatureGradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByGingerState]:
        del extra_args
        check_given("ginger", "curvature_grad_fn", curvature_grad_fn, "(params) -> sampled-label gradients")
        layout = _Layout.of(updates, axes)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(jnp.float32), state.mu, updates)
        momentum = layout.blocks(jax.tree.map(lambda m: m / (1 - b1 ** count.astype(jnp.float32)), mu))
        basis = layout.blocks(state.basis)

        def with_curvature(basis: list[Array], eigvals: Array) -> tuple[list[Array], list[Array], Array]:
            gradient = layout.blocks(curvature_grad_fn(params))  # type: ignore[misc]
            return _learn_and_solve(basis, eigvals, gradient, momentum, layout.dims, b2, damping)

        def without(basis: list[Array], eigvals: Array) -> tuple[list[Array], list[Array], Array]:
            return _solve(basis, eigvals, momentum, layout.dims, damping), basis, eigvals

        if curvature_every == 1:
            solved, basis, eigvals = with_curvature(basis, state.eigvals)
        else:
            due = state.count % curvature_every == 0
            solved, basis, eigvals = lax.cond(due, with_curvature, without, basis, state.eigvals)
        new = ScaleByGingerState(count, mu, layout.like(basis, state.basis), eigvals)
        return layout.like(solved, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def ginger(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 4,
    b1: float = 0.9,
    b2: float = 0.99,
    damping: float = 1e-2,
    clip_value: float | None = None,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    *,
    curvature_every: int = 1,
    axes: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Ginger as an Optax chain: `scale_by_ginger`, clipping of every entry, decoupled decay, learning rate.

    Args:
      learning_rate: a constant or an `optax.Schedule`.
      rank: eigenvectors a block, see `scale_by_ginger` for this and the next ones.
      b1: decay of momentum.
      b2: decay of curvature.
      damping: added to every eigenvalue.
      clip_value: entries of the preconditioned momentum are clipped to this size, before the learning rate; None:
        never.
      weight_decay: decoupled decay, multiplied by the learning rate.
      no_decay: regular expressions on paths of parameters without decay.
      curvature_every: updates between two curvature gradients.
      axes: the tree of parameters with a tuple of axis names for each; None: every parameter is one block.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose update takes `curvature_grad_fn`.

    Raises:
      UserError: if a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> optimizer = ginger(learning_rate=0.5, b1=0.0, damping=1.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(params, optimizer.init(params), params, curvature_grad_fn=jnp.zeros_like)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, -1.0]

    References:
      Hao et al. (arXiv 2402.03295). Weight decay is applied after preconditioning; the paper does not say.
    """
    check_number("ginger", "learning_rate", learning_rate, at_least=0)
    check_number("ginger", "weight_decay", weight_decay, at_least=0)
    if clip_value is not None:
        check_number("ginger", "clip_value", clip_value, above=0)
    spared = path_predicate(*no_decay)

    def decayed(params: Params) -> PyTree:
        return select(params, lambda name: not spared(name))

    chain = optax.chain(
        scale_by_ginger(rank, b1, b2, damping, curvature_every=curvature_every, axes=axes),
        optax.clip(clip_value) if clip_value is not None else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_learning_rate(chain, learning_rate)


def ginger_reference(
    learning_rate: optax.ScalarOrSchedule = 2e-4, rank: int = 4, *, axes: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """The settings of the authors' experiments: damping 1e-5, entries of the update clipped to 1.

    Outside the basis such a step is 1e5 times momentum, and nearly every entry is clipped: the update is about the sign
    of momentum times the learning rate. `ginger` has a damping with which curvature has an effect.

    Args:
      learning_rate: a constant or an `optax.Schedule`.
      rank: eigenvectors a block.
      axes: the tree of parameters with a tuple of axis names for each; None: every parameter is one block.

    References:
      Hao et al. (arXiv 2402.03295); numbers of their released configuration files.
    """
    return ginger(learning_rate, rank, b1=0.9, b2=0.99, damping=1e-5, clip_value=1.0, axes=axes)


def ginger_curvature_grads(
    apply_fn: Callable[[Params, Any], Float[Array, "..."]],
    params: Params,
    batch: Any,
    key: Array,
    likelihood: Literal["categorical", "gaussian", "bernoulli"] = "categorical",
    *,
    weights: Float[Array, "..."] | None = None,
) -> PyTree:
    r"""Gradients whose outer product is, over random keys, the Gauss-Newton matrix of the mean loss.

    .. math::
      n = \frac{1}{\sqrt N} \sum_{i=1}^N \nabla \left( -\log p(\tilde y_i \mid x_i) \right), \qquad
      \tilde y_i \sim p(\cdot \mid x_i)

    Labels are sampled from the model, one a prediction. This function is for models trained without `t5x_ext.train`,
    whose step gives the same as `curvature_grad_fn`.

    Args:
      apply_fn: `(params, batch) -> outputs`, the model: logits [..., classes], means [..., dim] of unit variance, or
        logits [...] of yes against no.
      params: the point at which gradients are computed.
      batch: argument of `apply_fn`, all of it: scaled gradients of parts must not be averaged.
      key: random key of the labels, a new one each step.
      likelihood: the distribution that the outputs parameterise.
      weights: 1 where a prediction counts and 0 for padding, shaped like the predictions [...]; None: all count.

    Returns:
      Gradients shaped like `params`, N being the number of predictions that count.

    Raises:
      UserError: if the likelihood is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> linear = lambda weights, x: x @ weights
      >>> n = ginger_curvature_grads(linear, jnp.zeros((1, 1)), jnp.ones((4, 1)), jax.random.key(0), "bernoulli")
      >>> n.shape
      (1, 1)
    """
    check_choice("ginger_curvature_grads", "likelihood", likelihood, ("categorical", "gaussian", "bernoulli"))

    def sampled_sum(params: Params) -> tuple[Array, Array]:
        outputs = apply_fn(params, batch).astype(jnp.float32)
        fixed = lax.stop_gradient(outputs)
        if likelihood == "categorical":
            labels = jax.random.categorical(key, fixed)
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        elif likelihood == "bernoulli":
            labels = jax.random.bernoulli(key, jax.nn.sigmoid(fixed)).astype(jnp.float32)
            losses = optax.sigmoid_binary_cross_entropy(outputs, labels)
        else:
            labels = fixed + jax.random.normal(key, fixed.shape)
            losses = 0.5 * jnp.sum((outputs - labels) ** 2, axis=-1)
        counted = jnp.ones_like(losses) if weights is None else weights
        return jnp.sum(losses * counted), jnp.sum(counted)

    grads, count = jax.grad(sampled_sum, has_aux=True)(params)
    return jax.tree.map(lambda g: g / jnp.sqrt(jnp.maximum(count, 1.0)).astype(g.dtype), grads)


class _Layout(NamedTuple):
    """How leaves are split into blocks; all lists follow the leaves.

    Blocks are arrays [blocks of the leaf, rank or nothing, ...]. The axes of a block are never merged, so that their
    shardings do not change.
    """

    shapes: list[tuple[int, ...]]
    stacked: list[int]  # number of leading `layers` axes
    dims: Float[np.ndarray, " blocks"]  # entries of every block of every leaf

    @classmethod
    def of(cls, tree: PyTree, axes: PyTree | None) -> _Layout:
        names = named_axes(axes)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        shapes = [leaf.shape for _, leaf in leaves]
        stacked = [_num_layer_axes(path_name(path), names(path_name(path), leaf.shape)) for path, leaf in leaves]
        counts = [math.prod(shape[:layers]) for shape, layers in zip(shapes, stacked, strict=True)]
        dims = [math.prod(shape[layers:]) for shape, layers in zip(shapes, stacked, strict=True)]
        return cls(shapes, stacked, np.repeat(np.array(dims, np.float32), counts))

    def basis_shapes(self, rank: int) -> list[tuple[int, ...]]:
        """The rank axis follows the layers, so that the parameter's axes stay innermost, where devices tile them."""
        return [(*s[:layers], rank, *s[layers:]) for s, layers in zip(self.shapes, self.stacked, strict=True)]

    def blocks(self, tree: PyTree) -> list[Float[Array, "blocks ..."]]:
        leaves = jax.tree.leaves(tree)
        return [
            leaf.astype(jnp.float32).reshape(math.prod(leaf.shape[:layers]), *leaf.shape[layers:])
            for leaf, layers in zip(leaves, self.stacked, strict=True)
        ]

    def like(self, blocks: list[Array], tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [x.reshape(leaf.shape) for x, leaf in zip(blocks, leaves, strict=True)])


def _num_layer_axes(name: str, axes: Sequence[str | None] | None) -> int:
    if axes is None:
        return 0
    leading = next((i for i, axis in enumerate(axes) if axis != "layers"), len(axes))
    if "layers" in axes[leading:]:
        raise UserError(f"ginger: parameter {name} has axis names {tuple(axes)}: layers must come first")
    return leading


def _inner(a: list[Array], b: list[Array]) -> Float[Array, "blocks i j"]:
    """Inner products of the rows of every block, [n, i, ...] with [n, j, ...], for all leaves in one array."""

    def products(a: Array, b: Array) -> Array:
        # Not a dot: with so few rows, compilers sum this faster and with smaller errors.
        return jnp.sum(a[:, :, None] * b[:, None], axis=tuple(range(3, a.ndim + 1)))

    return jnp.concatenate([products(*pair) for pair in zip(a, b, strict=True)])


def _combine(weights: Float[Array, "blocks i j"], rows: list[Array]) -> list[Float[Array, "n i ..."]]:
    """Linear combinations of the rows of every block, [n, j, ...] to [n, i, ...]."""
    results, start = [], 0
    for row in rows:
        mine = weights[start : start + len(row)]
        start += len(row)
        results.append(lax.dot_general(mine, row, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST))
    return results


class _Split(NamedTuple):
    """Vectors x = U inside + rest, the rest orthogonal to the basis once `again` is taken off it."""

    inside: Float[Array, "blocks rank vectors"]
    rest: list[Array]  # [n, vectors, ...]
    again: Float[Array, "blocks rank vectors"]  # component of the rest in the basis, from rounding
    gram: Float[Array, "blocks vectors vectors"]  # inner products of the rests without it
    threshold: Float[Array, "blocks vectors"]  # squared length up to which a rest is only rounding
    fine: Bool[Array, " vectors"]  # False: not finite, and zero in everything above


def _split(basis: list[Array], vectors: list[Array], dims: np.ndarray) -> _Split:
    """Gram-Schmidt, twice: one pass loses the angle if a vector is nearly within the basis.

    Of the vectors [n, vectors, ...] the first is momentum, which keeps non-finite values; in others they become zero.
    """
    norms = jnp.diagonal(_inner(vectors, vectors), axis1=1, axis2=2)
    fine = jnp.all(jnp.isfinite(norms), axis=0).at[0].set(True)
    first = jnp.where(fine, _inner(basis, vectors), 0.0)
    rest = [x - y for x, y in zip(vectors, _combine(first.swapaxes(1, 2), basis), strict=True)]
    rest = [jnp.where(fine.reshape(-1, *(1,) * (x.ndim - 2)), x, 0.0) for x in rest]
    again = _inner(basis, rest)
    gram = _inner(rest, rest) - jnp.einsum("nri,nrj->nij", again, again, precision="highest")
    threshold = (10 * _EPS) ** 2 * jnp.asarray(dims)[:, None] * jnp.where(fine, norms, 0.0)
    return _Split(first + again, rest, again, gram, threshold, fine)


def _solve(
    basis: list[Array], eigvals: Array, momentum: list[Array], dims: np.ndarray, damping: float | Array
) -> list[Array]:
    """(U diag(s) U^T + damping)^-1 m: outside the basis a division by the damping, inside by damping + s."""
    split = _split(basis, [m[:, None] for m in momentum], dims)
    outside = split.gram[:, :, 0] > split.threshold
    along_rest = jnp.where(outside, jnp.float32(1 / damping), 0.0)
    along_basis = split.inside[:, :, 0] / (damping + eigvals) - split.again[:, :, 0] * along_rest
    solved = _add(_combine(along_basis[:, None], basis), _combine(along_rest[:, None], split.rest))
    return [u[:, 0] for u in solved]


def _learn_and_solve(
    basis: list[Array],
    eigvals: Array,
    gradient: list[Array],
    momentum: list[Array],
    dims: np.ndarray,
    b2: float | Array,
    damping: float | Array,
) -> tuple[list[Array], list[Array], Array]:
    """The next basis and eigenvalues, and momentum solved by them, from two passes over the old basis.

    With p the normalised rest of the curvature gradient, all results are combinations of the old basis, p and the rest
    of momentum, with weights from matrices with rank + 1 rows. So momentum need not be projected again.
    """
    rank = eigvals.shape[1]
    split = _split(basis, [jnp.stack(pair, axis=1) for pair in zip(momentum, gradient, strict=True)], dims)
    fine = split.fine[1]
    known = split.gram[:, 1, 1] > split.threshold[:, 1]
    length = jnp.sqrt(jnp.where(known, split.gram[:, 1, 1], 0.0))
    per_length = jnp.where(known, 1 / jnp.where(known, length, 1.0), 0.0)

    # Curvature and momentum in the basis [U p].
    column = jnp.concatenate([split.inside[:, :, 1], length[:, None]], axis=1)
    along_p = split.gram[:, 0, 1] * per_length
    inside = jnp.concatenate([split.inside[:, :, 0], along_p[:, None]], axis=1)
    fresh = jnp.where(fine, jnp.float32(1 - b2), 0.0)
    # Not b2 * eigvals: 0.99 in float32 is 1e-8 too large, and the error would add up over steps.
    vectors, values = _top(eigvals - fresh * eigvals, fresh * column[:, :, None] * column[:, None, :])

    # u = [U p] V (s + damping)^-1 V^T inside + (rest - p along_p) / damping
    weights = jnp.einsum("nij,nkj,nk->ni", vectors / (values + damping)[:, None], vectors, inside, precision="highest")
    outside = split.gram[:, 0, 0] - along_p**2 > split.threshold[:, 0]
    along_rest = jnp.where(outside, jnp.float32(1 / damping), 0.0)
    along_gradient = (weights[:, rank] - along_p * along_rest) * per_length
    on_rest = jnp.stack([along_rest, along_gradient], axis=1)
    on_basis = weights[:, :rank] - jnp.einsum("nri,ni->nr", split.again, on_rest, precision="highest")
    solved = _add(_combine(on_basis[:, None], basis), _combine(on_rest[:, None], split.rest))

    # U+ = [U p] V, without the last column
    on_gradient = vectors[:, rank, :rank] * per_length[:, None]
    rotation = vectors[:, :rank, :rank] - split.again[:, :, 1, None] * on_gradient[:, None]
    rest = [x[:, 1:] for x in split.rest]
    rotated = _add(_combine(rotation.swapaxes(1, 2), basis), _combine(on_gradient[:, :, None], rest))
    rotated = [jnp.where(fine, new, old) for new, old in zip(rotated, basis, strict=True)]
    return [u[:, 0] for u in solved], rotated, jnp.where(fine, values[:, :rank], eigvals)


def _top(
    eigvals: Float[Array, "blocks rank"], outer: Float[Array, "blocks rank+1 rank+1"]
) -> tuple[Float[Array, "blocks rank+1 rank+1"], Float[Array, "blocks rank+1"]]:
    """Eigenvectors of diag(eigvals, 0) + outer, largest first, and the eigenvalues, the last one dropped to zero."""
    padded = jnp.pad(eigvals, ((0, 0), (0, 1)))
    matrix = outer + padded[:, :, None] * jnp.eye(padded.shape[1], dtype=jnp.float32)
    vectors = _orthonormal(jnp.linalg.eigh(matrix)[1][:, :, ::-1])
    # Rayleigh quotients are exact to second order in the error of the vectors; eigh's own values are not.
    values = jnp.einsum("nij,nik,nkj->nj", vectors, matrix, vectors, precision="highest")
    values = jnp.sort(values, axis=1, descending=True)
    # Signs are arbitrary; a rule makes them the same on all devices and compilers.
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=1)[:, None], axis=1)
    kept = (jnp.arange(values.shape[1]) < eigvals.shape[1]) & (values > _EPS * values[:, :1])
    return vectors * jnp.where(largest < 0, -1.0, 1.0), jnp.where(kept, values, 0.0)


def _orthonormal(vectors: Float[Array, "blocks i j"]) -> Float[Array, "blocks i j"]:
    """One Newton-Schulz step: eigh is inexact by some roundings, which would add up over thousands of rotations."""
    gram = jnp.einsum("nki,nkj->nij", vectors, vectors, precision="highest")
    return vectors + 0.5 * jnp.einsum(
        "nik,nkj->nij", vectors, jnp.eye(gram.shape[1], dtype=jnp.float32) - gram, precision="highest"
    )


def _add(a: list[Array], b: list[Array]) -> list[Array]:
    return [x + y for x, y in zip(a, b, strict=True)]
