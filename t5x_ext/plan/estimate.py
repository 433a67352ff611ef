"""Memory of a training step before, or without, its compiler: what is stored exactly, what is computed by formula.

Parameters, optimizer state, moving average and batch follow from shapes and shardings alone. Temporaries are a sum of

- gradients: of one microbatch and, where there are several, the accumulator's state, cut as the parameters;
- residuals: what the traced forward pass of one microbatch hands to its backward pass (`jax.vjp`), for the run's own
  remat policy. Weights cast and gathered that a policy keeps are among them. Arrays that are cut along `tensor`, told
  by their sizes (`mlp_dim`, `num_heads`, `vocab_size`), count by their part;
- one layer a stack computed again: the residuals of a model with one layer a stack and nothing recomputed;
- gathered weights: those of one layer of each stack twice (the next ones arrive while one is used), and the output
  table with its gradient in float32;
- scores: those of one chunk of the loss and their gradient, float32.

Compilers fuse, reuse and pad, so this is an estimate: for seven layouts of the 4.7B model (remat none, dots_saveable,
dots_with_no_batch_dims_saveable and full, tensor 1 and 4) it was 0.76 to 1.6 times what the TPU compiler allocated.

Temporaries of decoding are a sum of

- weights: those that every step reads, in the type they are computed in, where they are stored in another;
- caches: keys and values of self-attention of all hypotheses, with room for the longest result, so many times
  (`CACHE_COPIES`) as the TPU compiler keeps them: as the search has them, reordered, and laid out for a step;
- memory: keys and values of cross-attention, once a sentence;
- scores: those of one step, float32, and what is computed from them.

Each step moves weights, memory and scores once and the caches so many times (`CACHE_PASSES`) as in the TPU compiler's
program for heads as wide as its tiles, where nothing is padded.
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
import numpy as np
from jax.sharding import Mesh

from t5x_ext.contracts import Batch, Context, PyTree, TranslationBatch
from t5x_ext.models import EncoderDecoder, TransformerConfig, init_params
from t5x_ext.parallel.mesh import batch_devices
from t5x_ext.tasks import text_task
from t5x_ext.train.program import Program


class Stored(NamedTuple):
    """Bytes on one device of what a step is given."""

    params: int
    optimizer: int
    ema: int
    batch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Temporaries(NamedTuple):
    """Estimated bytes on one device of what a step computes and drops again; see the module."""

    gradients: int
    residuals: int
    recomputed: int
    gathered: int
    scores: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


CACHE_COPIES = 4
"""How often the caches of a search are there at once."""

CACHE_PASSES = 6
"""How often a step reads or writes all of them."""

_SCORE_COPIES = 4


class DecodingTemporaries(NamedTuple):
    """Estimated bytes on one device of what decoding a batch computes; see the module."""

    weights: int
    caches: int
    memory: int
    scores: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s with shardings on one device; exact but for a compiler's padding."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stored_bytes(program: Program) -> Stored:
    """What the state and the batch of a run take on one device."""
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
    residuals = partial(_residuals, run.objective, rows=rows, lengths=(shape.source_length, shape.target_length))
    one_layer = dataclasses.replace(config, encoder_layers=int(config.has_encoder), decoder_layers=1, remat="none")
    recomputed = 0 if config.remat == "none" else residuals(one_layer, parts=_parts(program, one_layer))
    return Temporaries(
        # Compilers take a loop of one apart: its gradient is the sum.
        gradients=device_bytes(params) + (accumulated_bytes(program) if run.num_microbatches > 1 else 0),
        residuals=residuals(config, parts=_parts(program, config)),
        recomputed=recomputed,
        gathered=_gathered(program),
        scores=2 * 4 * _chunk_tokens(program, rows) * config.vocab_size // _tensor(mesh, run.axis_rules.vocab),
    )


def accumulated_bytes(program: Program) -> int:
    """Estimated bytes on one device of the sum of the gradients of several microbatches: cut as the parameters."""
    params = program.template.params
    accumulator = jax.eval_shape(program.run.accumulator.init, params, program.template.step)
    return int(tree_bytes(accumulator) * device_bytes(params) / tree_bytes(params))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays, whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def estimate_decoding(
    program: Program, rows: int, hypotheses: int, source_length: int, max_length: int, members: int = 1
) -> tuple[DecodingTemporaries, int]:
    """What a search takes on one device, by the formula of this module: temporaries, and bytes that each step moves.

    Args:
      program: gives model and mesh.
      rows: sentences of the batch, over all devices.
      hypotheses: of a sentence, searched side by side.
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
    # All but the encoder's: stored as float32. Of what is cut over `fsdp` a device needs all, and is taken to keep it.
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
    """Bytes on one device of what is cut over other axes than `fsdp` only."""

    def of(leaf: jax.ShapeDtypeStruct) -> int:
        axes = [axis for axis in jax.tree.leaves(tuple(leaf.sharding.spec)) if axis != "fsdp"]
        pieces = math.prod(leaf.sharding.mesh.shape[axis] for axis in axes)
        return leaf.size * leaf.dtype.itemsize // pieces

    return sum(map(of, jax.tree.leaves(params)))


def _parts(program: Program, config: TransformerConfig) -> dict[int, int]:
    """Size of an axis -> pieces it is cut into along `tensor`."""
    rules, mesh = program.run.axis_rules, program.mesh
    sizes = {config.vocab_size: rules.vocab, config.mlp_dim: rules.mlp, config.num_heads: rules.heads}
    return {size: _tensor(mesh, axis) for size, axis in sizes.items()}


def _tensor(mesh: Mesh, axis: str | None) -> int:
    return mesh.shape["tensor"] if axis == "tensor" else 1


def _residuals(
    objective: Any, config: TransformerConfig, *, parts: dict[int, int], rows: int, lengths: tuple[int, int]
) -> int:
    """Bytes that the forward pass over `rows` keeps for the backward pass, parameters apart.

    Traced for one row and for two: every array kept either grows with the rows or does not.
    """
    one, two = (
        sum(
            size // max(parts.get(axis, 1) for axis in (*shape, 1))
            for shape, size in _kept(objective, config, n, lengths)
        )
        for n in (1, 2)
    )
    return one + (rows - 1) * (two - one)


@functools.lru_cache(maxsize=256)
def _kept(
    objective: Any, config: TransformerConfig, rows: int, lengths: tuple[int, int]
) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Shape and bytes of what the forward pass hands to the backward pass, parameters apart."""
    value = objective(EncoderDecoder(config))
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    sides = dict(zip(("source", "target"), lengths))
    batch = {
        name: jax.ShapeDtypeStruct((rows, sides[name.split("_")[0]]), np.int32)
        for name in TranslationBatch.__annotations__
    }

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
    """Whole weights on a device while they are used: none if parameters are not sharded along the rows' axes."""
    config, mesh, rules = program.model.config, program.mesh, program.run.axis_rules
    if rules.embed != "fsdp" or mesh.shape["fsdp"] == 1:
        return 0
    bytes_each = jnp.dtype(config.compute_dtype).itemsize
    d, f = config.embed_dim, config.mlp_dim
    layers = 12 * d * d // _tensor(mesh, rules.heads) + 4 * d * f // _tensor(mesh, rules.mlp)
    table = config.vocab_size * d // _tensor(mesh, rules.vocab)
    return 2 * layers * bytes_each + table * (bytes_each + 4)


def _chunk_tokens(program: Program, rows: int) -> int:
    """Target positions whose scores a device holds at once."""
    length = text_task(program.run).data.batch.target_length
    chunk = getattr(program.objective, "chunk_tokens", None)
    if chunk is None:
        return rows * length
    microbatch_rows = max(1, text_task(program.run).data.batch.rows // program.run.num_microbatches)
    return rows * min(length, max(1, chunk // microbatch_rows))
