"""Runs of which only the shapes matter, for benchmarks that measure updates and not what is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax

    from t5x_ext.contracts import Batch
    from t5x_ext.models import TransformerConfig
    from t5x_ext.train import Run


def shaped_run(
    model: TransformerConfig, rows: int, length: int, optimizer: optax.GradientTransformation, **run: Any
) -> Run:
    """A run whose texts are never opened, with rows of the same length on both sides."""
    from t5x_ext.corpora import ParallelText
    from t5x_ext.data import BatchConfig, DataConfig
    from t5x_ext.tasks import Translation
    from t5x_ext.train import Run

    data = DataConfig(
        train=(ParallelText("never.en", "opened.de", "en", "de"),),
        batch=BatchConfig(rows=rows, source_length=length, target_length=length),
    )
    return Run(task=Translation(data, model), optimizer=optimizer, steps=100, **run)


def full_batch(template: Batch, vocab_size: int) -> Batch:
    """Rows of one example each that fills them: every place holds a token."""
    import jax
    import numpy as np

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if name.endswith("segment_ids"):
            return np.ones(leaf.shape, leaf.dtype)
        if name.endswith("positions"):
            return np.broadcast_to(np.arange(leaf.shape[1], dtype=leaf.dtype), leaf.shape)
        return np.random.default_rng(0).integers(4, vocab_size, leaf.shape, leaf.dtype)

    return {name: jax.device_put(fill(name, leaf), leaf.sharding) for name, leaf in template.items()}
