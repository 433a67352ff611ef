"""Groups sentences of similar length into batches of few static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from t5x_ext.parallel import MeshPlacement, batch_devices

SHORTEST_BUCKET = 16
CPU_BATCH_TOKENS = 512
ACCELERATOR_BATCH_TOKENS = 8192


class LengthBatch(NamedTuple):
    """Which sentences go together, and the shape they are padded to."""

    indices: Int[np.ndarray, " sentences"]
    rows: int
    """At least as many as there are sentences; the rest is padding."""
    length: int


def bucket_length(length: int) -> int:
    """The padded length for sentences of this length: a power of two, so that few shapes are compiled.

    >>> [bucket_length(n) for n in (3, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def mesh_of(model: Any) -> Mesh | None:
    """The mesh that a model is placed on; None where nobody has said where its arrays lie."""
    placement = getattr(model, "placement", None)
    return placement.mesh if isinstance(placement, MeshPlacement) else None


def plan_batches(
    lengths: Sequence[int], batch_tokens: int | None = None, mesh: Mesh | None = None
) -> list[LengthBatch]:
    """Batches of sentences sorted by length, longest first, one bucket's length in each.

    Rows are `batch_tokens` (None: see `DecodeConfig`) over the bucket's length, at least 1; for fewer sentences than
    that the next power of 8, so that one line does not pay for a whole batch and a growing number of lines does not
    compile at every step. On a mesh every copy of the model has so many tokens, and the rows are a multiple of the
    devices that they are cut over.
    """
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_BATCH_TOKENS
    pieces = 1
    if mesh is not None:
        batch_tokens *= mesh.shape["slices"] * mesh.shape["data"]
        pieces = batch_devices(mesh)
    ordered = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    buckets = np.array([bucket_length(lengths[i]) for i in ordered], np.int64)
    few = 8 ** int(np.ceil(np.log(max(1, len(lengths))) / np.log(8) - 1e-9))
    batches = []
    for length in sorted(set(buckets.tolist()), reverse=True):
        members = ordered[buckets == length]
        rows = -(-min(max(1, batch_tokens // length), few) // pieces) * pieces
        batches += [LengthBatch(members[i : i + rows], rows, length) for i in range(0, len(members), rows)]
    return batches


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
