"""Sharpness-aware minimization (SAM), dense or on the entries with the largest Fisher information (FSAM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import AnyArray, Params, PyTree, UserError, path_name, path_predicate
from t5x_ext.optim.bits import pack, packed_shape, unpack
from t5x_ext.optim.checks import check_choice, check_given, check_integer, check_number, check_outermost
from t5x_ext.optim.learning_rate import with_learning_rate
from t5x_ext.optim.top_k import num_kept, top_k_mask

GradFn = Callable[[Params, int], PyTree]
FisherFn = Callable[[Params], PyTree]

_GRAD_FN = "(params, index) -> the gradient of this batch at other weights"
_FISHER_FN = "(params) -> the mean of squared gradients of examples"


class FsamState(NamedTuple):
    """State of `fsam`."""

    count: Int[Array, ""]  # type: ignore[assignment]  # int32: updates whose gradient was finite
    mask: PyTree  # uint8, `bits.packed_shape` of each maskable parameter; () where all entries are kept, or none
    opt_state: PyTree  # of the base optimizer

    @property
    def pulls_gradients(self) -> bool:
        """Tells the training step to refuse it inside `optax.MultiSteps`."""
        return True


class _Scope(NamedTuple):
    """What the hyperparameters mean for given parameters; lists follow the leaves."""

    maskable: list[bool]
    kept: int  # entries of maskable parameters that are perturbed
    total: int  # entries of maskable parameters
    perturbs_unmaskable: bool

    @property
    def has_mask(self) -> bool:
        return 0 < self.kept < self.total

    @property
    def moves(self) -> bool:
        return self.kept > 0 or (self.perturbs_unmaskable and not all(self.maskable))


def fsam(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    sparsity: float | Fraction = 0.9,
    mask_update_interval: int = 100,
    fisher: Literal["batch", "per_example"] = "batch",
    maskable: Callable[[str], bool] | Sequence[str] | None = None,
    unmaskable: Literal["perturb", "skip", "error"] = "perturb",
    normalize: Literal["full", "masked"] = "full",
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher-masked SAM: the base optimizer gets the gradient at weights perturbed along their important entries.

    .. math::
      m_t &= \text{1 at the } k = \lfloor (1 - \text{sparsity}) N \rfloor \text{ largest entries of } F
             \text{ if } t \bmod T = 0, \text{ else } m_{t-1} \\
      \epsilon_t &= \rho \, \frac{m_t \odot g_t}{\lVert g_t \rVert_2 + \text{eps}}, \qquad g_t = \nabla f(w_t) \\
      w_{t+1} &= w_t + \text{optimizer}(\nabla f(w_t + \epsilon_t), w_t)

    :math:`F` is the diagonal of the empirical Fisher information of the current batch, ranked over all maskable
    parameters together; ties go to the first entry (`top_k_mask`). The mask is refreshed before it is used, at the
    first update too. With sparsity 0 this is SAM. With sparsity 1 nothing is perturbed, no second gradient is computed,
    and the result is that of the base optimizer, bit for bit.

    If the gradient is not finite, nothing is perturbed, mask and count do not change, and the base optimizer gets this
    gradient. A second gradient that is not finite goes to the base optimizer too;
    `fsam(optax.apply_if_finite(optimizer, n))` skips such updates.

    It must be outermost. It works inside `optax.chain`, but transformations before it (clipping) see the first gradient
    only; put them into `optimizer`. Perturbed weights have the weights' dtype: bfloat16 loses steps below half a unit
    in the last place, so keep float32 weights and cast where they are used.

    Args:
      optimizer: the base optimizer, with all that applies to the second gradient: clipping, decay.
      rho: norm of the perturbation; a number or a schedule of the count.
      sparsity: share of the maskable entries that are not perturbed, from 0 to 1, taken as the decimal that is written.
      mask_update_interval: updates between two refreshes of the mask, T above.
      fisher: `"batch"` ranks by the squared gradient of the batch, at no cost; `"per_example"` by `fisher_fn`, the
        mean over examples of squared gradients of log-likelihoods.
      maskable: which parameters are masked: a predicate on paths such as `encoder/layers/mlp/kernel`, or regular
        expressions that are searched in them; None for all.
      unmaskable: what happens to the others: `"perturb"` perturbs all their entries, as the released code does with
        biases and embeddings; `"skip"` none; `"error"` refuses parameters of which some are not maskable.
      normalize: `"full"` divides by the norm of the full gradient, so that the perturbation is shorter than `rho`;
        `"masked"` by that of its perturbed entries, so that its norm is `rho`.
      eps: added to the norm.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `update(grads, state, params, *, grad_fn, fisher_fn=None)`.
      `grad_fn(params, index)` gives the gradient of the same batch, with the same dropout and microbatches, at other
      weights; it is called once, with index 0. `fisher_fn(params)` gives non-negative arrays shaped like the
      parameters, on any scale; it is only computed when the mask is refreshed. Further keywords go to `optimizer`.
      The state has one bit a maskable entry in addition to that of `optimizer`. Under `optax.inject_hyperparams` name
      `sparsity` in `static_args`: k must be known when compiling.

    Raises:
      UserError: if a hyperparameter is out of range; at `init`, if `maskable` selects nothing or a wrapper hides
        parameters or microbatches (`optax.masked`, `partition`, `MultiSteps`); at `update`, if a callable is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda w: jnp.sum(w**2 * jnp.array([4.0, 1.0])) / 2
      >>> grad_fn = lambda w, index=0: jax.grad(loss)(w)
      >>> optimizer = fsam(optax.sgd(0.1), rho=0.5, sparsity=0.5)
      >>> w = jnp.array([0.75, 4.0])  # gradient (3, 4), norm 5: only the second entry moves uphill, to 4.4
      >>> updates, state = optimizer.update(grad_fn(w), optimizer.init(w), w, grad_fn=grad_fn)
      >>> [round(float(update), 4) for update in updates]
      [-0.3, -0.44]

    References:
      Zhong et al., Improving Sharpness-Aware Minimization with Fisher Mask for Better Generalization on Language Models
      (arXiv 2210.05497); SAM: Foret et al. (arXiv 2010.01412). To exclude the same parameters from the mask as the
      released code: `maskable=["^(?!.*(bias|embed))"]`. That code loses its gradient when it refreshes the mask, and
      sums the second loss. Here both gradients are of the mean loss, and the step of a refresh perturbs too.
    """
    return _masked_sam(
        "fsam",
        optimizer,
        rho,
        sparsity=sparsity,
        mask_update_interval=mask_update_interval,
        fisher=fisher,
        maskable=maskable,
        unmaskable=unmaskable,
        normalize=normalize,
        eps=eps,
    )


def sam(
    optimizer: optax.GradientTransformation, rho: optax.ScalarOrSchedule = 0.05, *, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the base optimizer gets the gradient at weights moved along the gradient by `rho`.

    .. math::
      w_{t+1} = w_t + \text{optimizer}(\nabla f(w_t + \epsilon_t), w_t), \qquad
      \epsilon_t = \rho \, g_t / \lVert g_t \rVert_2

    This is `fsam` with sparsity 0; see there. `optax.contrib.sam` in its opaque mode computes the same, except that it
    divides by zero for a zero gradient.

    Args:
      optimizer: the base optimizer.
      rho: norm of the perturbation, a number or a schedule.
      eps: added to the norm.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `update(grads, state, params, *, grad_fn)`.

    Raises:
      UserError: as `fsam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> grad_fn = lambda w, index=0: jax.grad(lambda w: jnp.sum(w**2) / 2)(w)
      >>> optimizer, w = sam(optax.sgd(0.1), rho=1.0), jnp.array([3.0, 4.0])
      >>> updates, _ = optimizer.update(grad_fn(w), optimizer.init(w), w, grad_fn=grad_fn)
      >>> [round(float(update), 4) for update in updates]
      [-0.36, -0.48]

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization (arXiv 2010.01412).
    """
    return _masked_sam("sam", optimizer, rho, eps=eps)


def _masked_sam(
    owner: str,
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    *,
    sparsity: float | Fraction = 0.0,
    mask_update_interval: int = 1,
    fisher: str = "batch",
    maskable: Callable[[str], bool] | Sequence[str] | None = None,
    unmaskable: str = "perturb",
    normalize: str = "full",
    eps: float,
) -> optax.GradientTransformationExtraArgs:
    """What `fsam` says; `owner` is whom its messages speak of."""
    _check(owner, rho, sparsity, mask_update_interval, fisher, unmaskable, normalize, eps)
    base = optax.with_extra_args_support(optimizer)
    patterns = (maskable,) if isinstance(maskable, str) else maskable
    is_maskable = path_predicate(*patterns) if isinstance(patterns, Sequence) else patterns

    def scope_of(params: Params) -> _Scope:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        selected = [is_maskable is None or bool(is_maskable(name)) for name in names]
        total = sum(leaf.size for leaf, chosen in zip(jax.tree.leaves(params), selected, strict=True) if chosen)
        if names and not any(selected):
            raise UserError(f"{owner}: maskable selects no parameter; names look like {names[0]!r}")
        if unmaskable == "error" and not all(selected):
            raise UserError(f"{owner}: {names[selected.index(False)]} is not maskable, and unmaskable = 'error'")
        return _Scope(selected, num_kept(sparsity, total), total, unmaskable == "perturb")

    def init(params: Params) -> FsamState:
        check_outermost(owner, params)
        scope = scope_of(params)
        leaves, structure = jax.tree.flatten(params)
        words = [
            jnp.zeros(packed_shape(leaf.shape), jnp.uint8) if chosen else None
            for leaf, chosen in zip(leaves, scope.maskable, strict=True)
        ]
        mask = jax.tree.unflatten(structure, words) if scope.has_mask else ()
        return FsamState(jnp.zeros((), jnp.int32), mask, base.init(params))

    def update(
        grads: PyTree,
        state: FsamState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        fisher_fn: FisherFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, FsamState]:
        if params is None:
            raise UserError(f"{owner} needs params: update(grads, state, params, grad_fn=...)")
        pull = check_given(owner, "grad_fn", grad_fn, _GRAD_FN)
        scope = scope_of(params)
        norm = optax.tree.norm(jax.tree.map(_at_least_float32, grads))
        finite = jnp.isfinite(norm)
        mask = state.mask
        if scope.has_mask:
            due = finite & (state.count % mask_update_interval == 0)
            scores = lambda: grads
            if fisher == "per_example":
                scores = partial(check_given(owner, "fisher_fn", fisher_fn, _FISHER_FN), params)
            mask = jax.lax.cond(due, lambda: _fresh_mask(scores(), scope), lambda: state.mask)
        if scope.moves:
            entries = _perturbed_entries(mask, params, scope)
            if normalize == "masked":
                norm = _norm_of_entries(grads, entries)
            length = rho(state.count) if callable(rho) else rho
            scale = jnp.where(finite & (norm > 0), length / (norm + eps), 0.0)
            grads = pull(_uphill(params, grads, entries, scale, finite), 0)
        updates, opt_state = base.update(grads, state.opt_state, params, **extra_args)
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        return updates, FsamState(count, mask, opt_state)

    return with_learning_rate(optax.GradientTransformationExtraArgs(init, update), optimizer)


def _check(
    owner: str,
    rho: Any,
    sparsity: Any,
    mask_update_interval: Any,
    fisher: Any,
    unmaskable: Any,
    normalize: Any,
    eps: Any,
) -> None:
    if isinstance(sparsity, jax.Array) or callable(sparsity):
        raise UserError(f"{owner}: sparsity must be a number; under optax.inject_hyperparams name it in static_args")
    check_number(owner, "rho", rho, at_least=0)
    check_number(owner, "sparsity", sparsity, at_least=0, at_most=1)
    check_number(owner, "eps", eps, at_least=0)
    check_integer(owner, "mask_update_interval", mask_update_interval, at_least=1)
    check_choice(owner, "fisher", fisher, ("batch", "per_example"))
    check_choice(owner, "unmaskable", unmaskable, ("perturb", "skip", "error"))
    check_choice(owner, "normalize", normalize, ("full", "masked"))


def _at_least_float32(x: AnyArray) -> Array:
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _fresh_mask(scores: PyTree, scope: _Scope) -> PyTree:
    """The packed mask; magnitudes have the order of squares, and neither underflow nor overflow."""
    leaves, structure = jax.tree.flatten(scores)
    ranked = [leaf if chosen else None for leaf, chosen in zip(leaves, scope.maskable, strict=True)]
    chosen = top_k_mask(ranked, scope.kept, magnitude=True)
    return jax.tree.unflatten(structure, jax.tree.map(pack, chosen))


def _perturbed_entries(mask: PyTree, params: Params, scope: _Scope) -> list[Array | bool]:
    """For each parameter which entries are perturbed: booleans of its shape, or one for all of them."""
    words = iter(jax.tree.leaves(mask))

    def entries(leaf: AnyArray, chosen: bool) -> Array | bool:
        if not chosen:
            return scope.perturbs_unmaskable
        return unpack(next(words), leaf.shape) if scope.has_mask else scope.kept > 0

    return [entries(leaf, chosen) for leaf, chosen in zip(jax.tree.leaves(params), scope.maskable, strict=True)]


def _norm_of_entries(grads: PyTree, entries: list[Array | bool]) -> Float[Array, ""]:
    chosen = zip(jax.tree.leaves(grads), entries, strict=True)
    return optax.tree.norm([jnp.where(kept, _at_least_float32(grad), 0.0) for grad, kept in chosen])


def _uphill(params: Params, grads: PyTree, entries: list[Array | bool], scale: Array, finite: Array) -> Params:
    """Weights moved by scale * grads at the chosen entries; others are unchanged, bit for bit."""

    def moved(leaf: Array, grad: Array, kept: Array | bool) -> Array:
        if kept is False:
            return leaf
        step = jnp.where(finite & kept, scale * _at_least_float32(grad), 0.0)
        return (_at_least_float32(leaf) + step).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, map(moved, leaves, jax.tree.leaves(grads), entries))
