"""The optimizers that bench_optim.py compares, each with what it needs to stand in any of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optax

from t5x_ext import optim
from t5x_ext.contracts import Accumulator, PyTree

MIN_DIM = 64
"""Matrices with a shorter side stay whole: small enough for the models that train here, the width of a head in others."""

RHO = 0.05
MASK_UPDATE_INTERVAL = 10
"""The paper's 100 would leave a run of some hundred updates with two masks."""


class Arm(NamedTuple):
    """An optimizer to be compared.

    Attributes:
      name: in tables and figures.
      make: `(learning_rate, axes) -> optimizer`, the rate a number or a schedule, the axes those of `logical_axes`.
      family: arms of one family stand side by side, at several ranks.
      rank: of what is compressed or approximated; None where nothing is.
      pulls: the callable of the training step that its update evaluates, if any.
      accumulator: how gradients of microbatches add up.
    """

    name: str
    make: Callable[[optax.ScalarOrSchedule, PyTree], optax.GradientTransformation]
    family: str
    rank: int | None = None
    pulls: str | None = None
    accumulator: Callable[[], Accumulator] = optim.mean_accumulator


def flora(rank: int, resample_every: int = 100) -> Arm:
    """Flora; a run of some hundred updates changes the projection every 100 rather than every 1,000."""
    return Arm(
        f"flora {rank}",
        lambda rate, axes: optim.flora(
            rate, rank, resample_every=resample_every, min_dim_size_to_compress=MIN_DIM, axes=axes
        ),
        "flora",
        rank,
    )


def ginger(rank: int, curvature_every: int = 1) -> Arm:
    """Ginger, by default with curvature every step."""
    return Arm(
        f"ginger {rank}" + (f" every {curvature_every}" if curvature_every > 1 else ""),
        lambda rate, axes: optim.ginger(rate, rank, curvature_every=curvature_every, axes=axes),
        "ginger",
        rank,
        "curvature_grad_fn",
    )


def adafactor(b1: float | None) -> Arm:
    """The uncompressed counterpart of Flora: the same body around ordinary momentum, or around none."""
    return Arm(
        "adafactor" if b1 is None else "adafactor momentum",
        lambda rate, axes: optim.flora(
            rate, 1, b1 or 0.0, min_dim_size_to_compress=MIN_DIM, axes=axes, compressible=lambda name: False
        ),
        "adafactor",
    )


ADAM = Arm("adam", lambda rate, axes: optim.adam(rate), "adam")
SAM = Arm("sam", lambda rate, axes: optim.sam(optim.adam(rate), RHO), "sam", pulls="grad_fn")
FSAM = Arm(
    "fsam",
    lambda rate, axes: optim.fsam(optim.adam(rate), RHO, mask_update_interval=MASK_UPDATE_INTERVAL),
    "sam",
    pulls="grad_fn",
)
FIXED = flora(16, resample_every=10**6)._replace(name="flora 16 fixed", family="fixed")
"""One projection for the whole run: what drawing anew is worth."""

ARMS = (
    ADAM,
    adafactor(None),
    adafactor(0.9),
    SAM,
    FSAM,
    *map(flora, (4, 16, 32)),
    *map(ginger, (1, 4, 16)),
)
