"""Memory of a training step without its compiler: stored arrays exactly, temporaries by formula.

Sizes of parameters, optimizer state, EMA and batch follow from shapes and shardings. Temporaries are the sum of

- gradients: of one microbatch and, if there are several, the accumulator's state, sharded like the parameters;
- residuals: what the traced forward pass of one microbatch passes to its backward pass (`jax.vjp`), for the run's remat
  policy. They include cast and gathered weights that a policy keeps. Arrays that are sharded along `tensor`, recognised
  by their sizes (`mlp_dim`, `num_heads`, `vocab_size`), count by their shard;
- recomputation: the residuals of a model with one layer a stack and without remat;
- gathered weights: those of one layer of each stack twice (the next ones are gathered while one is used), and the
  output table with its gradient in float32;
- scores: those of one chunk of the loss and their gradient, float32.

Compilers fuse, reuse and pad, so this is an estimate: for seven layouts of the 4.7B model (remat none, dots_saveable,
dots_with_no_batch_dims_saveable and full, tensor 1 and 4) it was 0.76 to 1.6 times what the TPU compiler allocated.

Temporaries of decoding are a sum of

- weights: those that every step reads, in the dtype of the computation, if they are stored in another;
- caches: keys and values of self-attention of all hypotheses, with room for the longest result, times the number of
  copies that the TPU compiler keeps (`CACHE_COPIES`): the search's, reordered, and in a step's layout;
- memory: keys and values of cross-attention, once a sentence;
- scores: those of one step, float32, and what is computed from them.

Each step moves weights, memory and scores once, and the caches `CACHE_PASSES` times, as in the TPU compiler's program
for heads as wide as its tiles, which need no padding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5x_ext.contracts import Batch, Context, PyTree
from t5x_ext.models import UNPLACED, LayerConfig, Transformer
from t5x_ext.parallel.mesh import batch_devices
from t5x_ext.tasks import text_task
from t5x_ext.train.program import Program

_Array = tuple[str, tuple[int, ...], Any]
"""Name, shape without rows, and dtype of an array of a batch."""


class Stored(NamedTuple):
    """Bytes on one device of a step's arguments."""

    params: int
    optimizer: int
    ema: int
    batch: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


class Temporaries(NamedTuple):
    """Estimated bytes on one device of a step's temporaries; see the module."""

    gradients: int
    residuals: int
    recomputed: int
    gathered: int
    scores: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


CACHE_COPIES = 4
"""Copies of a search's caches that exist at the same time."""

CACHE_PASSES = 6
"""How often a step reads or writes all caches."""

_SCORE_COPIES = 4


class DecodingTemporaries(NamedTuple):
    """Estimated bytes on one device of the temporaries of decoding a batch; see the module."""

    weights: int
    caches: int
    memory: int
    scores: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s with shardings on one device, without a compiler's padding."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stored_bytes(program: Program) -> Stored:
    """Bytes of the state and the batch of a run on one device."""
    state = program.template
    optimizer = device_bytes((state.optimizer_state, state.mutable, state.step))
    params = device_bytes(state.params) + device_bytes(program.frozen)
    return Stored(params, optimizer, device_bytes(state.ema), device_bytes(program.batch))


def estimate_temporaries(program: Program) -> Temporaries:
    """The temporaries of a training step on one device, by the formula of this module."""
    config, mesh, run = program.model.config, program.mesh, program.run
    shape = text_task(run).data.batch
    rows = max(1, shape.rows // (batch_devices(mesh) * run.num_microbatches))
    params = program.template.params
    arrays = tuple((name, leaf.shape[1:], leaf.dtype) for name, leaf in sorted(program.batch.items()))
    residuals = partial(_residuals, run.objective, parts=_parts(program, config), rows=rows, arrays=arrays)
    model = program.model.clone(placement=UNPLACED)
    one_layer = model.clone(config=dataclasses.replace(config.shallow(), remat="none"))
    return Temporaries(
        # With one microbatch XLA unrolls the accumulation loop, so there is no separate accumulator.
        gradients=device_bytes(params) + (accumulated_bytes(program) if run.num_microbatches > 1 else 0),
        residuals=residuals(model),
        recomputed=0 if config.remat == "none" else residuals(one_layer),
        gathered=_gathered(program),
        scores=2 * 4 * _chunk_tokens(program, rows) * config.vocab_size // _tensor(mesh, run.axis_rules.vocab),
    )


def accumulated_bytes(program: Program) -> int:
    """Estimated bytes on one device of the sum of microbatches' gradients, sharded like the parameters."""
    params = program.template.params
    accumulator = jax.eval_shape(program.run.accumulator.init, params, program.template.step)
    return int(tree_bytes(accumulator) * device_bytes(params) / tree_bytes(params))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays, over all shards."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def estimate_decoding(
    program: Program, rows: int, hypotheses: int, source_length: int, max_length: int, members: int = 1
) -> tuple[DecodingTemporaries, int]:
    """A search on one device, by the formula of this module: temporaries, and bytes that each step moves.

    Args:
      program: gives model and mesh.
      rows: sentences of the batch, over all devices.
      hypotheses: of a sentence, searched in parallel.
      source_length: tokens of a sentence.
      max_length: tokens that caches have room for.
      members: models of an ensemble.
    """
    config, rules, mesh = program.model.config, program.run.axis_rules, program.mesh
    rows = rows // batch_devices(mesh)
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    width = config.embed_dim // _tensor(mesh, rules.heads)
    # Keys and values of one position of one sentence, in all layers and members.
    entry = 2 * config.decoder_layers * width * itemsize * members
    cache = rows * hypotheses * max_length * entry
    # All but the encoder's, stored as float32. Weights sharded over `fsdp` are gathered, and assumed to be kept.
    params = {name: tree for name, tree in program.params.items() if name != "encoder"}
    read = members * _gathered_bytes(params) * itemsize // 4
    cuts = _tensor(mesh, rules.vocab)
    scores = 4 * members * rows * hypotheses * config.vocab_size // (cuts if config.vocab_size % cuts == 0 else 1)
    temporaries = DecodingTemporaries(
        weights=read if itemsize != 4 or mesh.shape["fsdp"] > 1 else 0,
        caches=CACHE_COPIES * cache,
        memory=rows * source_length * entry,
        scores=_SCORE_COPIES * scores,
    )
    return temporaries, read + CACHE_PASSES * cache + temporaries.memory + temporaries.scores


def _gathered_bytes(params: PyTree) -> int:
    """Bytes on one device if only axes other than `fsdp` are sharded."""

    def of(leaf: jax.ShapeDtypeStruct) -> int:
        axes = [axis for axis in jax.tree.leaves(tuple(leaf.sharding.spec)) if axis != "fsdp"]
        shards = math.prod(leaf.sharding.mesh.shape[axis] for axis in axes)
        return leaf.size * leaf.dtype.itemsize // shards

    return sum(map(of, jax.tree.leaves(params)))


def _parts(program: Program, config: LayerConfig) -> dict[int, int]:
    """Size of an axis -> number of its shards along `tensor`."""
    rules, mesh = program.run.axis_rules, program.mesh
    sizes = {config.vocab_size: rules.vocab, config.mlp_dim: rules.mlp, config.num_heads: rules.heads}
    return {size: _tensor(mesh, axis) for size, axis in sizes.items()}


def _tensor(mesh: Mesh, axis: str | None) -> int:
    return mesh.shape["tensor"] if axis == "tensor" else 1


def _residuals(
    objective: Any, model: Transformer, *, parts: dict[int, int], rows: int, arrays: tuple[_Array, ...]
) -> int:
    """Bytes that the forward pass over `rows` keeps for the backward pass, without parameters.

    It is traced for one row and for two, to see which of the arrays grow with the rows.
    """
    one, two = (
        sum(
            size // max(parts.get(axis, 1) for axis in (*shape, 1))
            for shape, size in _kept(objective, model, n, arrays)
        )
        for n in (1, 2)
    )
    return one + (rows - 1) * (two - one)


@functools.lru_cache(maxsize=256)
def _kept(
    objective: Any, model: Transformer, rows: int, arrays: tuple[_Array, ...]
) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Shape and bytes of what the forward pass passes to the backward pass, without parameters."""
    value, params = objective(model), model.abstract_params()
    batch = {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, shape, dtype in arrays}

    def backward(params: PyTree, batch: Batch, key: jax.Array) -> Any:
        loss = lambda params: value(params, batch, Context(0, key, train=True)).sum
        return jax.vjp(loss, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, params, batch, jax.eval_shape(lambda: jax.random.key(0))))
    own = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
    found = []
    for leaf in leaves:
        if own[leaf.shape, leaf.dtype] > 0:
            own[leaf.shape, leaf.dtype] -= 1
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append((leaf.shape, leaf.size * leaf.dtype.itemsize))
    return tuple(found)


def _gathered(program: Program) -> int:
    """Gathered weights on a device: none if parameters are not sharded along the rows' axes."""
    config, mesh, rules = program.model.config, program.mesh, program.run.axis_rules
    if rules.embed != "fsdp" or mesh.shape["fsdp"] == 1:
        return 0
    bytes_each = jnp.dtype(config.compute_dtype).itemsize
    stacks = [tree["layers"] for tree in program.params.values() if "layers" in tree]
    layers = sum(_gathered_bytes(stack) // jax.tree.leaves(stack)[0].shape[0] for stack in stacks) // 4
    table = config.vocab_size * config.embed_dim // _tensor(mesh, rules.vocab)
    return 2 * layers * bytes_each + table * (bytes_each + 4)


def _chunk_tokens(program: Program, rows: int) -> int:
    """Target positions whose scores are on a device at the same time."""
    length = text_task(program.run).data.batch.target_length
    chunk = getattr(program.objective, "chunk_tokens", None)
    if chunk is None:
        return rows * length
    microbatch_rows = max(1, text_task(program.run).data.batch.rows // program.run.num_microbatches)
    return rows * min(length, max(1, chunk // microbatch_rows))
