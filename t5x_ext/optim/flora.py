"""Flora: momentum and accumulated gradients stored as random projections, which are regenerated and never stored."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from t5x_ext.contracts import Accumulator, Params, PyTree, UserError, path_name
from t5x_ext.optim.adafactor import factored_chain
from t5x_ext.optim.checks import check_choice, check_integer, check_number
from t5x_ext.optim.matrices import Axes, MatrixShape, matrix_shape, named_axes
from t5x_ext.optim.projections import Projection, gaussian

Output = Literal["mixed", "projected", "nesterov"]
Transfer = Literal["project", "reset"]

_TOGETHER = 2**24
"""Entries of the matrices that are processed at the same time."""


class FloraState(NamedTuple):
    """Momentum; the projections are functions of `key` and `count`."""

    count: Int[Array, ""]  # type: ignore[assignment]  # updates done, int32
    key: Array  # typed random key, never changed
    mu: PyTree  # mu_dtype: batch + (rank,) + cols or batch + rows + (rank,); of other parameters their own shape


def scale_by_flora(
    rank: int,
    b1: float | Array = 0.9,
    resample_every: int = 1000,
    *,
    output: Output = "mixed",
    transfer: Transfer = "project",
    mu_dtype: Any = None,
    key: Array | int = 0,
    min_dim_size_to_compress: int = 128,
    axes: PyTree = None,
    compressible: Callable[[str], bool] | None = None,
    projection: Projection = gaussian,
) -> optax.GradientTransformation:
    r"""Momentum of the incoming updates, stored as a random projection of rank `rank`.

    The shorter side of a matrix is compressed. If rows are (columns are alike), with y the incoming update, P the
    current projection [rank, rows] and M [rank, cols] the state:

    .. math::
      M_t = b_1 M_{t-1} + (1 - b_1) P y_t, \qquad
      u_t = \begin{cases}
        b_1 P^T M_{t-1} + (1 - b_1) y_t & \text{mixed: the gradient of this step is exact} \\
        P^T M_t & \text{projected: the paper's rule} \\
        b_1 P^T M_t + (1 - b_1) y_t & \text{nesterov: the authors' JAX code}
      \end{cases}

    Every `resample_every` updates a new projection is sampled, before the gradient of that update is added:
    :math:`M \leftarrow P_\text{new} P_\text{old}^T M` (project), or :math:`M \leftarrow 0` (reset). There is no bias
    correction. Parameters that are not compressed have ordinary momentum: vectors, matrices whose shorter side is below
    `min_dim_size_to_compress` or not above `rank`, and those for which `compressible` is False.

    A transfer grows the norm of M by about :math:`\sqrt{1 + (d + 1) / \text{rank}}` for a compressed side of size d.
    Momentum must decay by more before the next: :math:`b_1^\text{resample\_every}` times that factor must be below 1.

    Args:
      rank: rows of a projection.
      b1: decay of the momentum. The rule above is not checked for an array or a schedule.
      resample_every: updates between new projections.
      output: the formula of the update, see above. Without compression `mixed` and `projected` are the same.
      transfer: what happens to the momentum when the projection changes.
      mu_dtype: dtype of the state; None is float32. bfloat16 loses additions below 2^-8 of an entry: do not use it with
        b1 of 0.99 or more.
      key: random key or seed of the projections. The key of a matrix is folded with the CRC-32 of its path, with
        `count // resample_every` and, in a batch of matrices, with its index.
      min_dim_size_to_compress: matrices with a shorter side below this are not compressed.
      axes: tree of axis names, such as `models.logical_axes` gives: every layer of a stack has its own projection, and
        attention kernels are matrices embed x (heads * head_dim). None: the last two axes are the matrix.
      compressible: whether the parameter of this path may be compressed; None: all.
      projection: `(key, (rank, dim), dtype) -> [rank, dim]`. An update calls it once for each compressed matrix, in
        the order of the tree, and once more for the new projection when it changes; the same key must give the same
        array. Outside compiled functions keys are concrete, so that an array may be looked up by its key; in compiled
        ones it is traced, under `vmap` for batches of matrices.

    Returns:
      An `optax.GradientTransformation`. Under `optax.inject_hyperparams` all arguments but `b1` are static.

    Raises:
      UserError: if numbers are out of range, or momentum would grow without bound: at construction if it would for any
        matrix, at `init` if it would for one of the parameters.

    Example:
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
      >>> state = scale_by_flora(rank=16).init(params)
      >>> state.mu["kernel"].shape, state.mu["bias"].shape
      ((16, 512), (512,))

    References:
      Hao, Cao and Mou, Flora: Low-Rank Adapters Are Secretly Gradient Compressors (arXiv 2402.03293). After a change
      the released JAX code decodes with another projection than it encoded with; here the paper is followed.
    """
    name = "scale_by_flora"
    compression = _Compression(name, rank, min_dim_size_to_compress, named_axes(axes), compressible, projection)
    check_choice(name, "output", output, get_args(Output))
    check_choice(name, "transfer", transfer, get_args(Transfer))
    check_number(name, "b1", b1, at_least=0, below=1)
    check_integer(name, "resample_every", resample_every, at_least=1)
    check_stable = _stability_check(name, rank, b1, resample_every, transfer)
    check_stable("any matrix", max(rank + 1, min_dim_size_to_compress))

    def init(params: Params) -> FloraState:
        def zeros(path: tuple, leaf: Array) -> Array:
            layout = compression.layout(path, leaf)
            if layout is None:
                return jnp.zeros(leaf.shape, mu_dtype or jnp.float32)
            check_stable(layout.name, layout.dim)
            return jnp.zeros(layout.shape, mu_dtype or jnp.float32)

        mu = jax.tree_util.tree_map_with_path(zeros, params)
        return FloraState(jnp.zeros((), jnp.int32), _as_key(key), mu)

    def dense(y: Array, mu: Array) -> tuple[Array, Array]:
        mu = b1 * mu + (1 - b1) * y
        return b1 * mu + (1 - b1) * y if output == "nesterov" else mu, mu

    def compressed(layout: _Layout, y: Array, mu: Array, state: FloraState) -> tuple[Array, ...]:
        draw = lambda epoch: compression.draw(layout, state.key, epoch)
        up, down = layout.expand, layout.compress
        last = draw(state.count // resample_every)

        def change() -> tuple[Array, Array]:
            new = draw((state.count + 1) // resample_every)
            moved = layout.each_matrix(layout.transfer, mu, last, new) if transfer == "project" else jnp.zeros_like(mu)
            return moved, new

        encoded, current = _cond((state.count + 1) % resample_every == 0, change, lambda: (mu, last))

        def matrix(update: Array, moved: Array, p: Array, mu: Array, old: Array) -> tuple[Array, Array]:
            y = update.astype(jnp.float32)
            new = b1 * moved + (1 - b1) * down(y, p)
            match output:
                case "mixed":
                    out = b1 * up(mu, old) + (1 - b1) * y
                case "projected":
                    out = up(new, p)
                case "nesterov":
                    out = b1 * up(new, p) + (1 - b1) * y
            return out.astype(update.dtype), new

        return layout.replace_matrices(matrix, (y, encoded), current, mu, last)

    def update(updates: PyTree, state: FloraState, params: Params | None = None) -> tuple[PyTree, FloraState]:
        del params

        def step(path: tuple, leaf: Array, moment: Array) -> _Stepped:
            layout, mu = compression.layout(path, leaf), moment.astype(jnp.float32)
            if layout is None:
                out, mu = dense(leaf.astype(jnp.float32), mu)
            else:
                out, mu = compressed(layout, layout.matrices(leaf), layout.matrices(mu), state)
            return _Stepped(out.reshape(leaf.shape).astype(leaf.dtype), mu.reshape(moment.shape).astype(moment.dtype))

        results = jax.tree_util.tree_map_with_path(step, updates, state.mu)
        is_result = lambda node: isinstance(node, _Stepped)
        out, mu = (jax.tree.map(itemgetter(i), results, is_leaf=is_result) for i in range(2))
        return out, FloraState(optax.safe_increment(state.count), state.key, mu)

    return optax.GradientTransformation(init, update)


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    b1: float | Array = 0.9,
    resample_every: int = 1000,
    *,
    output: Output = "mixed",
    transfer: Transfer = "project",
    mu_dtype: Any = None,
    key: Array | int = 0,
    min_dim_size_to_compress: int = 128,
    axes: PyTree = None,
    compressible: Callable[[str], bool] | None = None,
    projection: Projection = gaussian,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
    r"""`adafactor` with compressed momentum: second moments as row and column means, momentum as in `scale_by_flora`.

    .. math::
      y = g / \sqrt{\hat v}, \quad u = \text{scale\_by\_flora}(y), \quad
      w \leftarrow w - \eta_t \max(\text{rms}(w), 10^{-3}) \,
        \left(\frac{u}{\max(1, \text{rms}(u) / \text{clipping\_threshold})} + \text{weight\_decay} \cdot w\right)

    Momentum is applied before clipping and scaling, as in the authors' code; `optax.adafactor` applies it last. Every
    layer of a stack is clipped and scaled by itself. With b1 = 0 and matrices of two axes this is `optax.adafactor`.

    Args:
      learning_rate: a constant or an `optax.Schedule`, relative to the size of the weights. Adafactor's rates fit.
      rank: see `scale_by_flora`, also for the arguments up to `projection`.
      b1: decay of the momentum.
      resample_every: updates between new projections.
      output: the formula of the momentum's update.
      transfer: what happens to the momentum when the projection changes.
      mu_dtype: dtype of the momentum, None is float32; second moments are float32.
      key: random key or seed of the projections.
      min_dim_size_to_compress: matrices with a shorter side below this keep full first and second moments.
      axes: tree of axis names, such as `models.logical_axes` gives.
      compressible: whether the momentum of the parameter of this path may be compressed; None: all.
      projection: `(key, (rank, dim), dtype) -> [rank, dim]`.
      decay_rate: of the second moment, see `factored.scale_by_factored_rms`.
      eps: added to squared gradients.
      clipping_threshold: largest root mean square of an update before scaling; None clips nothing.
      multiply_by_parameter_scale: False makes learning rates absolute.
      weight_decay: decoupled; multiplied by the learning rate and, as updates are, by the scale of the weights.
      no_decay: regular expressions on paths of parameters without decay.

    Returns:
      An `optax.GradientTransformation` whose `update` needs `params`. Under `optax.inject_hyperparams` all arguments
      but `learning_rate` and `b1` are static.

    Raises:
      UserError: see `scale_by_flora`.

    Example:
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> optimizer = flora(learning_rate=1e-2, rank=16)
      >>> gradients = {"kernel": jnp.full((256, 512), 3.0)}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> round(float(updates["kernel"][0, 0]), 6)
      -0.001

    References:
      Flora (arXiv 2402.03293) over Adafactor (Shazeer and Stern, arXiv 1804.04235).
    """
    momentum = scale_by_flora(
        rank,
        b1,
        resample_every,
        output=output,
        transfer=transfer,
        mu_dtype=mu_dtype,
        key=key,
        min_dim_size_to_compress=min_dim_size_to_compress,
        axes=axes,
        compressible=compressible,
        projection=projection,
    )
    return factored_chain(
        "flora",
        learning_rate,
        momentum,
        min_dim_size_to_factor=min_dim_size_to_compress,
        axes=axes,
        decay_rate=decay_rate,
        eps=eps,
        clipping_threshold=clipping_threshold,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        weight_decay=weight_decay,
        no_decay=no_decay,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedSum:
    """The compressed sum of a parameter's gradients.

    Attributes:
      sum: float32.
      shape: of the parameter, static.
    """

    sum: Float[Array, "..."]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


class FloraAccumulatorState(NamedTuple):
    """Running sums of one update."""

    step: Int[Array, ""]  # updates done before, which choose the projections
    sum: PyTree  # a CompressedSum a parameter
    weight: Float[Array, ""]  # float32: labels counted so far


def flora_accumulator(
    rank: int,
    *,
    key: Array | int = 0,
    min_dim_size_to_compress: int = 128,
    axes: PyTree = None,
    compressible: Callable[[str], bool] | None = None,
    projection: Projection = gaussian,
) -> Accumulator:
    r"""Accumulates gradients of microbatches as random projections: full-size sums are never stored.

    .. math::
      g = P^T \frac{\sum_i P \, \nabla S_i}{\sum_i n_i}

    with :math:`S_i` the summed loss of microbatch i and :math:`n_i` its labels. P is sampled once an update. Its
    expectation over P is the exact gradient. The squared error of one update is (d + 1) / rank times the squared
    gradient for a compressed side of size d; with one microbatch there is nothing to gain for it. Devices may also sum
    compressed gradients, which are rank / d of the bytes.

    Args:
      rank: rows of a projection.
      key: random key or seed of the projections; must differ from that of `scale_by_flora`.
      min_dim_size_to_compress: matrices with a shorter side below this, or not above `rank`, are summed exactly.
      axes: tree of axis names, see `scale_by_flora`.
      compressible: whether the parameter of this path may be compressed; None: all.
      projection: `(key, (rank, dim), dtype) -> [rank, dim]`.

    Returns:
      A `contracts.Accumulator`; `finish` gives float32 gradients, zero if there was no label.

    Raises:
      UserError: if a number is out of range.

    Example:
      >>> params = {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}
      >>> accumulator = flora_accumulator(rank=16)
      >>> state = accumulator.init(params, jnp.int32(0))
      >>> state.sum["kernel"].sum.shape
      (16, 512)
      >>> gradients = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
      >>> accumulator.finish(accumulator.add(state, gradients, 2.0))["bias"][0].item()
      0.5

    References:
      Flora (arXiv 2402.03293), gradient accumulation.
    """
    compression = _Compression(
        "flora_accumulator", rank, min_dim_size_to_compress, named_axes(axes), compressible, projection
    )
    is_sum = lambda node: isinstance(node, CompressedSum)

    def init(params: Params, step: Array) -> FloraAccumulatorState:
        def zeros(path: tuple, leaf: Array) -> CompressedSum:
            layout = compression.layout(path, leaf)
            return CompressedSum(jnp.zeros(layout.shape if layout else leaf.shape, jnp.float32), leaf.shape)

        total = jax.tree_util.tree_map_with_path(zeros, params)
        return FloraAccumulatorState(jnp.asarray(step, jnp.int32), total, jnp.zeros((), jnp.float32))

    def add(state: FloraAccumulatorState, grads: PyTree, weight: Array | float) -> FloraAccumulatorState:
        def added(path: tuple, total: CompressedSum, grad: Array) -> CompressedSum:
            layout = compression.layout(path, grad)
            if layout is None:
                return dataclasses.replace(total, sum=total.sum + grad.astype(jnp.float32))
            p = compression.draw(layout, _as_key(key), state.step)
            plus = lambda total, g, p: (total + layout.compress(g.astype(jnp.float32), p),)
            (new,) = layout.replace_matrices(plus, (layout.matrices(total.sum),), layout.matrices(grad), p)
            return dataclasses.replace(total, sum=new.reshape(layout.shape))

        total = jax.tree_util.tree_map_with_path(added, state.sum, grads, is_leaf=is_sum)
        return FloraAccumulatorState(state.step, total, state.weight + weight)

    def finish(state: FloraAccumulatorState) -> PyTree:
        empty = state.weight == 0
        divisor = jnp.where(empty, 1.0, state.weight)

        def mean(path: tuple, total: CompressedSum) -> Array:
            layout = compression.layout(path, total)
            result = jnp.where(empty, 0.0, total.sum / divisor)
            if layout is None:
                return result
            p = compression.draw(layout, _as_key(key), state.step)
            return layout.each_matrix(layout.expand, layout.matrices(result), p).reshape(total.shape)

        return jax.tree_util.tree_map_with_path(mean, state.sum, is_leaf=is_sum)

    return Accumulator(init, add, finish)


class _Stepped(NamedTuple):
    """The update of one parameter and its momentum."""

    update: Array
    mu: Array


class _Layout(NamedTuple):
    """How one parameter is compressed."""

    name: str
    matrix: MatrixShape
    rank: int

    @property
    def left(self) -> bool:
        """Whether rows are compressed, being the shorter side; columns are if both are equal."""
        _, rows, cols = self.matrix.sizes
        return rows < cols

    @property
    def dim(self) -> int:
        """Size of the compressed side."""
        return min(self.matrix.sizes[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is stored: `rank` replaces the compressed side; the other axes are not merged."""
        batch, rows, cols = self.matrix
        return batch + ((self.rank, *cols) if self.left else (*rows, self.rank))

    def matrices(self, x: Array) -> Float[Array, "batch rows cols"]:
        """A parameter, or what is stored of it, as matrices."""
        batch, rows, cols = self.matrix.sizes
        if x.size == batch * rows * cols:
            return x.reshape(batch, rows, cols)
        return x.reshape((batch, self.rank, cols) if self.left else (batch, rows, self.rank))

    def compress(self, x: Float[Array, "rows cols"], p: Float[Array, "rank dim"]) -> Array:
        return p @ x if self.left else x @ p.T

    def expand(self, x: Array, p: Float[Array, "rank dim"]) -> Float[Array, "rows cols"]:
        return p.T @ x if self.left else x @ p

    def transfer(self, x: Array, old: Float[Array, "rank dim"], new: Float[Array, "rank dim"]) -> Array:
        """Expands with `old` and compresses with `new`, without an array as large as the parameter."""
        between = new @ old.T
        return between @ x if self.left else x @ between.T

    def each_matrix(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Applies a function to all matrices: vectorised if they are small, else one after the other."""
        chunks = self._chunks(arrays)
        if chunks[0].shape[0] == 1:
            return jax.vmap(function)(*arrays)
        results = jax.lax.map(lambda chunk: jax.vmap(function)(*chunk), chunks)
        return results.reshape(-1, *results.shape[2:])

    def replace_matrices(
        self, function: Callable[..., tuple[Array, ...]], replaced: tuple[Array, ...], *arrays: Array
    ) -> tuple[Array, ...]:
        """The same for functions whose results replace their first arguments, in shape, dtype and memory.

        Temporaries are then those of one large layer, because no second copy of a stack is made.
        """
        chunks, given = self._chunks(replaced), self._chunks(arrays)
        if chunks[0].shape[0] == 1:
            return jax.vmap(function)(*replaced, *arrays)

        def replace(i: Array, chunks: tuple[Array, ...]) -> tuple[Array, ...]:
            take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            results = jax.vmap(function)(*map(take, chunks), *map(take, given))
            put = jax.lax.dynamic_update_index_in_dim
            return tuple(put(x, result, i, 0) for x, result in zip(chunks, results, strict=True))

        chunks = jax.lax.fori_loop(0, chunks[0].shape[0], replace, chunks)
        return tuple(chunk.reshape(x.shape) for chunk, x in zip(chunks, replaced, strict=True))

    def _chunks(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Reshapes [matrices, ...] to [chunks, matrices a chunk, ...]."""
        batch, rows, cols = self.matrix.sizes
        together = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * rows * cols <= _TOGETHER))
        return tuple(x.reshape(batch // together, together, *x.shape[1:]) for x in arrays)


@dataclasses.dataclass(frozen=True)
class _Compression:
    """Which parameters are compressed, and with which projections."""

    owner: str
    rank: int
    min_dim: int
    find_axes: Callable[[str, Sequence[int]], Axes]
    compressible: Callable[[str], bool] | None
    projection: Projection

    def __post_init__(self) -> None:
        check_integer(self.owner, "rank", self.rank, at_least=1)
        check_integer(self.owner, "min_dim_size_to_compress", self.min_dim, at_least=1)

    def layout(self, path: tuple, leaf: Any) -> _Layout | None:
        """How the parameter of this path and shape is compressed; None if it is not."""
        name = path_name(path)
        matrix = matrix_shape(leaf.shape, self.find_axes(name, leaf.shape))
        short = min(matrix.sizes[1:])
        wanted = self.compressible is None or self.compressible(name)
        return _Layout(name, matrix, self.rank) if wanted and short >= self.min_dim and short > self.rank else None

    def draw(self, layout: _Layout, key: Array, epoch: Array) -> Float[Array, "batch rank dim"]:
        """The projections of a parameter during an epoch."""
        shape = (self.rank, layout.dim)
        key = jax.random.fold_in(jax.random.fold_in(key, np.uint32(zlib.crc32(layout.name.encode()))), epoch)
        project = lambda key: jnp.asarray(self.projection(key, shape, jnp.float32), jnp.float32)
        each = lambda i: project(jax.random.fold_in(key, i))
        if not layout.matrix.batch:
            p = project(key)[None]
        elif isinstance(key, jax.core.Tracer):
            p = jax.vmap(each)(jnp.arange(layout.matrix.sizes[0]))
        else:  # concrete keys, for projections that look arrays up by them
            p = jnp.stack([each(i) for i in range(layout.matrix.sizes[0])])
        if p.shape[1:] != shape:
            raise UserError(f"{self.owner}: projection gave {p.shape[1:]} for {layout.name}: want {shape}")
        return p


def _stability_check(
    owner: str, rank: int, b1: Any, resample_every: int, transfer: Transfer
) -> Callable[[str, int], None]:
    """A check of a matrix's name and compressed side; it passes if `b1` is traced or scheduled."""

    def check(name: str, dim: int) -> None:
        if transfer == "reset" or not isinstance(b1, float | int) or b1 == 0:
            return
        growth = math.sqrt(1 + (dim + 1) / rank)
        if b1**resample_every * growth >= 1:
            enough = math.floor(-math.log(growth) / math.log(b1)) + 1
            raise UserError(
                f"{owner}: momentum of {name} would grow without bound: a new projection of {dim} to rank {rank} every "
                f"{resample_every} updates with b1 = {b1}; use resample_every >= {enough}, or transfer='reset'"
            )

    return check


def _as_key(key: Array | int) -> Array:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.key(key) if jnp.ndim(key) == 0 else jax.random.wrap_key_data(jnp.asarray(key))


def _cond(predicate: Array, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
    """`lax.cond`, but outside compiled functions only the selected branch runs, on concrete arrays."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, true, false)
    return true() if predicate else false()
