"""The optimizers whose quality bench_optim.py compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from t5x_ext import optim
from t5x_ext.contracts import PyTree, UserError

MIN_DIM = 64
"""Matrices with a shorter side stay whole. The models that train here are 64 and 128 wide."""

RHO = 0.05
"""Of SAM and FSAM, as in the papers."""

INTERVAL = 50
"""Updates between masks and between projections: runs here have some hundred, the papers' have thousands."""


class Arm(NamedTuple):
    """An optimizer to be compared.

    Attributes:
      name: in tables and figures.
      make: `(learning_rate, axes) -> optimizer`, the rate a number or a schedule, the axes those of `logical_axes`.
      rates: learning rates to choose from.
      family: arms of one family stand side by side.
      rank: of what is compressed or approximated; None where nothing is.
      rate_of: the arm that it adds something to, whose learning rate it takes; None: it has one chosen for itself.
      counterpart: the arm that a gap is measured to.
    """

    name: str
    make: Callable[[optax.ScalarOrSchedule, PyTree], optax.GradientTransformation]
    rates: tuple[float, ...]
    family: str
    rank: int | None = None
    rate_of: str | None = None
    counterpart: str | None = None


_ABSOLUTE = (1e-3, 3e-3, 1e-2)
_RELATIVE = (1e-2, 3e-2, 1e-1, 3e-1)
_MOMENTUM = "adafactor momentum"


def flora(rank: int, variant: str = "", resample_every: int = INTERVAL, **options: Any) -> Arm:
    """Flora, to be held against Adafactor with momentum: the same but for the compression."""
    return Arm(
        f"flora {rank} {variant}".rstrip(),
        lambda rate, axes: optim.flora(
            rate, rank, resample_every=resample_every, min_dim_size_to_compress=MIN_DIM, axes=axes, **options
        ),
        (1e-2, 3e-2, 1e-1),
        f"flora {variant}".rstrip(),
        rank,
        rate_of=f"flora {rank}" if variant else None,
        counterpart=_MOMENTUM,
    )


def ginger(rank: int) -> Arm:
    """Ginger with curvature every step and a damping that leaves room for it."""
    return Arm(
        f"ginger {rank}",
        lambda rate, axes: optim.ginger(rate, rank, axes=axes),
        (1e-2, 3e-2, 1e-1),
        "ginger",
        rank,
    )


def ginger_reference(rank: int) -> Arm:
    """Ginger with the authors' settings, which cut nearly every entry of the update to the same size."""
    return Arm(
        f"ginger reference {rank}",
        lambda rate, axes: optim.ginger_reference(rate, rank, axes=axes),
        (3e-4, 1e-3, 3e-3, 1e-2),
        "ginger reference",
        rank,
        rate_of="ginger reference 4" if rank != 4 else None,
    )


def adafactor(name: str, b1: float | None) -> Arm:
    """Adafactor, with momentum or without."""
    return Arm(
        name,
        lambda rate, axes: optim.adafactor(rate, b1, min_dim_size_to_factor=MIN_DIM, axes=axes),
        _RELATIVE,
        "adafactor",
        counterpart=_MOMENTUM if b1 is None else None,
    )


ADAM = Arm("adam", lambda rate, axes: optim.adam(rate), _ABSOLUTE, "adam")
SAM = Arm("sam", lambda rate, axes: optim.sam(optim.adam(rate), RHO), _ABSOLUTE, "sam", rate_of="adam")
FSAM = Arm(
    "fsam",
    lambda rate, axes: optim.fsam(optim.adam(rate), RHO, mask_update_interval=INTERVAL),
    _ABSOLUTE,
    "sam",
    rate_of="adam",
)

ARMS = (
    ADAM,
    adafactor("adafactor", None),
    adafactor(_MOMENTUM, 0.9),
    SAM,
    FSAM,
    *map(flora, (4, 16, 32, 64)),
    flora(16, "fixed", resample_every=10**6),  # one projection for a whole run: what is drawing anew worth?
    flora(16, "projected", output="projected"),  # as the paper has it
    flora(16, "reset", transfer="reset"),
    flora(16, "orthogonal", projection=optim.orthogonal),
    ginger(4),
    *map(ginger_reference, (1, 4, 16)),
)


def by_name(name: str) -> Arm:
    """The arm of this name.

    Raises:
      UserError: if there is none.
    """
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise UserError(f"no arm is called {name!r}; there are {', '.join(arm.name for arm in ARMS)}")
