"""The optimizers that every check of `test_table.py` is run on, and the functions that they minimise there.

A new optimizer is a new row in `ROWS`. All functions are half a sum of squares, so that gradients, gradients at other
weights and curvature gradients have one definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from t5x_ext.optim import (
    PruningGroup,
    Regrowth,
    adafactor,
    adam,
    flora,
    flora_accumulator,
    fsam,
    ginger,
    gradual_pruning,
    mean_accumulator,
    sam,
)
from t5x_ext.train.step import split_rows


@dataclass(frozen=True)
class Row:
    """One optimizer; `make(learning_rate, axes)` gets the tree of axis names, None where parameters have none."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    learning_rate: float
    needs: tuple[str, ...] = ()  # callables that `update` is given: "grad_fn", "curvature_grad_fn"
    quadratic: tuple[float, int] = (0.1, 300)  # learning rate and steps that bring the loss to 1e-3 of the first one
    rosenbrock: tuple[float, int] = (0.05, 1000)  # to 2e-3
    tolerance: float = 2e-5  # of parameters after STEPS updates whose sums were taken in another order
    accumulator: Callable[[], Any] = mean_accumulator
    own: bool = True  # ours: state in float32 whatever the parameters are, and zero gradients harm nothing

    def __str__(self) -> str:
        return self.name


_FLORA: dict[str, Any] = {
    "rank": 3,
    "min_dim_size_to_compress": 4,
    "compressible": lambda name: name in ("kernel", "embedding", "layers/in"),
}


def _flora(learning_rate: Any, axes: Any) -> optax.GradientTransformation:
    return flora(learning_rate, b1=0.7, resample_every=2, axes=axes, multiply_by_parameter_scale=False, **_FLORA)


def _adafactor(learning_rate: Any, axes: Any) -> optax.GradientTransformation:
    return adafactor(learning_rate, 0.7, axes=axes, min_dim_size_to_factor=4, multiply_by_parameter_scale=False)


def _ginger(learning_rate: Any, axes: Any) -> optax.GradientTransformation:
    # Rosenbrock's valley has a curvature of 1000: the first steps, of learning rate over damping, must stand it.
    return ginger(learning_rate, rank=3, damping=1.0, curvature_every=2, axes=axes)


def _gradual_pruning(learning_rate: Any, axes: Any) -> optax.GradientTransformation:
    # Half of a network; functions whose minimum is dense keep all entries.
    group = PruningGroup(["^(?!.*scale)"], 0.5 if axes else 1.0)
    return gradual_pruning(adam(learning_rate), [group], end=3, every=1, regrowth=Regrowth(0.2, 0.1), axes=axes)


def _optax_sam(learning_rate: Any, axes: Any) -> optax.GradientTransformation:
    away = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    return optax.contrib.sam(optax.sgd(learning_rate), away, sync_period=2, opaque_mode=True)


ROWS = (
    Row("adam", lambda rate, axes: adam(rate), learning_rate=0.01),
    Row(
        "adam_decay",
        lambda rate, axes: adam(rate, weight_decay=1e-3, no_decay=["scale$"], clip_norm=1.0),
        learning_rate=0.01,
    ),
    Row("optax.adam", lambda rate, axes: optax.adam(rate), learning_rate=0.01, own=False),
    Row(
        "optax.adafactor",
        lambda rate, axes: optax.adafactor(rate, min_dim_size_to_factor=8, multiply_by_parameter_scale=False),
        learning_rate=0.01,
        quadratic=(0.01, 600),
        rosenbrock=(0.003, 3000),
        own=False,
    ),
    Row(
        "optax.sgd",
        lambda rate, axes: optax.sgd(rate, momentum=0.9),
        learning_rate=0.01,
        rosenbrock=(3e-4, 3000),
        own=False,
    ),
    Row("optax.sam", _optax_sam, learning_rate=0.01, needs=("grad_fn",), rosenbrock=(1e-3, 5000), own=False),
    Row(
        "sam",
        lambda rate, axes: sam(optax.sgd(rate), rho=0.01),
        learning_rate=0.01,
        needs=("grad_fn",),
        rosenbrock=(1e-3, 5000),
    ),
    Row(
        "fsam",
        lambda rate, axes: fsam(adam(rate), 0.01, sparsity=0.5, mask_update_interval=2, maskable=["^(?!.*(bias|emb))"]),
        learning_rate=0.01,
        needs=("grad_fn",),
    ),
    Row("adafactor", _adafactor, learning_rate=0.01, quadratic=(0.01, 600), rosenbrock=(0.003, 3000)),
    Row("flora", _flora, learning_rate=0.01, quadratic=(0.01, 600), rosenbrock=(0.003, 3000)),
    Row(
        "adam under flora_accumulator",
        lambda rate, axes: adam(rate),
        learning_rate=0.01,
        accumulator=lambda: flora_accumulator(axes=AXES, **_FLORA),
    ),
    Row("gradual_pruning", _gradual_pruning, learning_rate=0.01),
    Row("ginger", _ginger, learning_rate=0.01, needs=("curvature_grad_fn",), rosenbrock=(0.01, 3000)),
)


# --- Two functions without data --------------------------------------------------------------------------------------

MATRIX = {"kernel": jnp.linspace(-1.0, 1.5, 24).reshape(6, 4), "bias": jnp.array([0.5, -2.0, 0.0])}
VALLEYS = {"kernel": jnp.array([[-1.2, 1.0], [0.0, 0.0], [0.5, -0.5]])}


def quadratic(params: Any) -> jax.Array:
    """Residuals of a quadratic with eigenvalues from 0.5 to 2, mixed, and its minimum away from 0."""
    flat, _ = ravel_pytree(params)
    orthogonal, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(flat.size, flat.size)))
    return jnp.asarray(np.sqrt(np.linspace(0.5, 2.0, flat.size))[:, None] * orthogonal, jnp.float32) @ (flat - 0.3)


def rosenbrock(params: Any) -> jax.Array:
    """Residuals of Rosenbrock's valley, one a row (x, y): (1 - x)^2 + 100 (y - x^2)^2 = 2 * half the sum of squares."""
    x, y = params["kernel"].T
    return jnp.concatenate([1 - x, 10 * (y - x**2)])


def minimize(row: Row, learning_rate: float, steps: int, residuals: Callable[[Any], jax.Array], params: Any) -> Any:
    """Losses before every step and after the last."""
    optimizer = row.make(learning_rate, None)
    loss = lambda params: 0.5 * jnp.sum(residuals(params) ** 2)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        signs = jax.random.rademacher(key, jax.eval_shape(residuals, params).shape, jnp.float32)
        offered = {
            "grad_fn": lambda params, index=0: jax.grad(loss)(params),
            "curvature_grad_fn": jax.grad(lambda params: signs @ residuals(params)),
        }
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, **{name: offered[name] for name in row.needs})
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps)))
    (params, _), losses = run((params, optimizer.init(params)))
    return np.append(losses, loss(params))


# --- A function with data: stacked layers with attention kernels, as the models have ---------------------------------

STEPS = 4
SIZES = {"vocab": 16, "embed": 8, "heads": 2, "head_dim": 4, "mlp": 16, "layers": 2}
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "in": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "mlp": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
    },
}


class Rows(NamedTuple):
    """Training data; curvature gradients take their residuals from `noise`, so they add up over rows exactly."""

    tokens: Any
    targets: Any
    noise: Any


def network_params(dtype: Any = jnp.float32) -> Any:
    """Weights with AXES as axis names."""
    is_axes = lambda node: isinstance(node, tuple)
    leaves, structure = jax.tree.flatten(AXES, is_leaf=is_axes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, axes: 0.4 * jax.random.normal(key, [SIZES[axis] for axis in axes], jnp.float32)
    params = structure.unflatten([draw(key, axes).astype(dtype) for key, axes in zip(keys, leaves, strict=True)])
    return jax.device_put(params, jax.devices()[0])


def rows_of_data(step: int, rows: int = 8) -> Rows:
    """Fresh rows for every step."""
    tokens, targets, noise = jax.random.split(jax.random.fold_in(jax.random.key(2), step), 3)
    shape = (rows, SIZES["embed"])
    tokens = jax.random.randint(tokens, (rows,), 0, SIZES["vocab"])
    return Rows(tokens, jax.random.normal(targets, shape), jax.random.rademacher(noise, shape, jnp.float32))


def network(params: Any, tokens: jax.Array) -> jax.Array:
    """Outputs [rows, embed]."""

    x = params["embedding"][tokens]
    for index in range(SIZES["layers"]):
        weights = jax.tree.map(lambda stacked, index=index: stacked[index], params["layers"])
        heads = jnp.tanh(jnp.einsum("be,ehd->bhd", x * (1 + weights["scale"]), weights["in"]))
        x = x + jnp.einsum("bhd,hde->be", heads, weights["out"])
        x = x + jnp.tanh(x @ weights["mlp"]) @ weights["mlp"].T
    return x.astype(jnp.float32)


def loss(params: Any, data: Rows) -> jax.Array:
    """Summed over rows."""
    return 0.5 * jnp.sum((network(params, data.tokens) - data.targets) ** 2)


def sampled_loss(params: Any, data: Rows) -> jax.Array:
    """The sum whose gradient is, up to a factor, a curvature gradient."""
    return jnp.sum(network(params, data.tokens) * data.noise)


# Apart from the updates, so that the network is compiled once and not for every optimizer.
gradient = jax.jit(jax.grad(loss))
sampled_gradient = jax.jit(jax.grad(sampled_loss))


def make_update(row: Row, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """`(params, state, pieces, grads) -> (params, state)`, as the training step does it, for a row of the table.

    `pieces` are the microbatches and `grads` their gradients, which the row's accumulator puts together.
    """
    accumulator = row.accumulator()

    def mean(params: Any, pieces: list[Rows], grads: list[Any]) -> Any:
        total = accumulator.init(params, jnp.int32(0))
        for piece, grad in zip(pieces, grads, strict=True):
            total = accumulator.add(total, grad, jnp.float32(piece.tokens.size))
        return accumulator.finish(total)

    def update(params: Any, state: Any, pieces: list[Rows], grads: list[Any]) -> Any:
        def grad_fn(params: Any, index: int = 0) -> Any:
            return mean(params, pieces, [gradient(params, piece) for piece in pieces])

        def curvature_grad_fn(params: Any) -> Any:
            total = jax.tree.map(lambda *g: sum(g), *[sampled_gradient(params, piece) for piece in pieces])
            return jax.tree.map(lambda g: g / np.sqrt(sum(piece.tokens.size for piece in pieces)), total)

        offered = {"grad_fn": grad_fn, "curvature_grad_fn": curvature_grad_fn}
        extra = {name: offered[name] for name in row.needs}
        updates, state = optimizer.update(mean(params, pieces, grads), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return update


def begin(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The first state, placed as updates and checkpoints place it: for arrays anywhere all is compiled once more."""
    return jax.device_put(jax.jit(optimizer.init)(params), jax.devices()[0])


def step(update: Callable[..., Any], params: Any, state: Any, data: Rows, microbatches: int = 1) -> tuple[Any, Any]:
    """One update on these rows."""
    pieces = [jax.tree.map(lambda x, i=i: x[i], split_rows(data, microbatches)) for i in range(microbatches)]
    return update(params, state, pieces, [gradient(params, piece) for piece in pieces])


def run(
    update: Callable[..., Any], params: Any, state: Any, start: int = 0, stop: int = STEPS, microbatches: int = 1
) -> tuple[Any, Any]:
    """The updates `start` to `stop`, each on rows of its own."""
    for number in range(start, stop):
        params, state = step(update, params, state, rows_of_data(number), microbatches)
    return params, state
