"""Checks of options that the dataclasses of this room share."""

from __future__ import annotations

from t5x_ext.contracts import UserError


def at_least(name: str, value: float, least: int) -> None:
    """Raises `UserError` for a value below `least`, and for nan."""
    if not value >= least:
        raise UserError(f"{name} = {value}: must be {least} or more")
