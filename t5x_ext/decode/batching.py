"""Sentences of similar length become padded batches of few static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from t5x_ext.parallel import MeshPlacement, batch_devices

SHORTEST_BUCKET = 16
CPU_BATCH_TOKENS = 512
ACCELERATOR_BATCH_TOKENS = 8192


class LengthBatch(NamedTuple):
    """Which sentences go together, and the shape they are padded to."""

    indices: Int[np.ndarray, " sentences"]
    rows: int  # at least as many as there are sentences; the rest is padding
    length: int


def bucket_length(length: int) -> int:
    """The padded length for sentences of this length: a power of two, so that few shapes are compiled.

    >>> [bucket_length(n) for n in (3, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def mesh_of(model: Any) -> Mesh | None:
    """The mesh that a model is placed on; None for a model without a placement."""
    placement = getattr(model, "placement", None)
    return placement.mesh if isinstance(placement, MeshPlacement) else None


def plan_batches(
    lengths: Sequence[int], batch_tokens: int | None = None, mesh: Mesh | None = None
) -> list[LengthBatch]:
    """Batches of sentences sorted by length, longest first, one bucket's length in each.

    A batch has `batch_rows` rows. With fewer sentences than that, rows are rounded up to a power of 8: small inputs
    stay cheap, and growing inputs trigger few compilations.

    Args:
      lengths: tokens of each sentence.
      batch_tokens: padded tokens of a batch, see `DecodeConfig`.
      mesh: devices that the rows are sharded over, if any.
    """
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_BATCH_TOKENS
    copies = 1 if mesh is None else mesh.shape["slices"] * mesh.shape["data"]
    shards = 1 if mesh is None else batch_devices(mesh)
    ordered = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    buckets = np.array([bucket_length(lengths[i]) for i in ordered], np.int64)
    few = 8 ** int(np.ceil(np.log(max(1, len(lengths))) / np.log(8) - 1e-9))
    batches = []
    for length in sorted(set(buckets.tolist()), reverse=True):
        members = ordered[buckets == length]
        rows = batch_rows(length, batch_tokens, copies, shards, few)
        batches += [LengthBatch(members[i : i + rows], rows, length) for i in range(0, len(members), rows)]
    return batches


def batch_rows(length: int, batch_tokens: int, copies: int = 1, shards: int = 1, most: int | None = None) -> int:
    """Rows of a batch: `batch_tokens` for each copy of the model, and a multiple of the devices that share the rows.

    Args:
      length: padded tokens of a sentence.
      batch_tokens: padded tokens of a batch for one copy of the model.
      copies: of the model on a mesh.
      shards: devices that the rows are sharded over.
      most: no more rows than that are needed; rounding up to `shards` comes after.

    >>> batch_rows(16, 512), batch_rows(16, 512, copies=2, shards=3), batch_rows(16, 512, shards=4, most=1)
    (32, 66, 4)
    """
    rows = max(1, batch_tokens * copies // length)
    return -(-min(rows, most or rows) // shards) * shards


def pad(
    sentences: Sequence[Sequence[int]], rows: int, length: int
) -> tuple[Int[np.ndarray, "rows length"], np.ndarray]:
    """Token arrays filled up with 0, and the number of real tokens in each row, int32."""
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, sentence in enumerate(sentences):
        tokens[row, : len(sentence)] = sentence
        lengths[row] = len(sentence)
    return tokens, lengths


def encoder_inputs(
    tokens: Int[Array, "rows length"], lengths: Int[Array, " rows"]
) -> tuple[Int[Array, "rows length"], Int[Array, "rows length"]]:
    """Segment ids (1 for a row's own tokens, 0 beyond) and positions of unpacked rows."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return (positions < lengths[:, None]).astype(jnp.int32), positions
