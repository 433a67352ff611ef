"""Checks of an optimizer's arguments, with errors of one line: numbers out of range, missing callables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import optax

from t5x_ext.contracts import PyTree, UserError

Pulled = TypeVar("Pulled", bound=Callable[..., Any])


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Checks the range of a hyperparameter; schedules and arrays (`optax.inject_hyperparams`) are not checked.

    Raises:
      UserError: if it is outside, or not a number.

    Example:
      >>> check_number("adam", "b1", 0.9, at_least=0, below=1)
      >>> check_number("adam", "b1", 1.5, at_least=0, below=1)
      Traceback (most recent call last):
      t5x_ext.contracts.UserError: adam: b1 = 1.5 must be at least 0 and below 1
    """
    if callable(value) or isinstance(value, jax.Array):
        return
    bounds = (
        ("at least", at_least, lambda bound: value >= bound),
        ("above", above, lambda bound: value > bound),
        ("at most", at_most, lambda bound: value <= bound),
        ("below", below, lambda bound: value < bound),
    )
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    try:
        inside = all(holds(bound) for _, bound, holds in given)
    except TypeError:
        inside = False
    if not inside:
        wanted = " and ".join(f"{words} {bound}" for words, bound, _ in given)
        raise UserError(f"{owner}: {name} = {value!r} must be {wanted}")


def check_integer(owner: str, name: str, value: Any, *, at_least: int) -> None:
    """Checks a count, such as steps or a rank; arrays are not checked.

    Raises:
      UserError: if it is too small or no integer.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, jax.Array) and not (whole and value >= at_least):
        raise UserError(f"{owner}: {name} = {value!r} must be an integer of at least {at_least}")


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks an option with a few allowed values.

    Raises:
      UserError: if it has none of them.
    """
    if value not in choices:
        raise UserError(f"{owner}: {name} = {value!r} is none of {', '.join(map(repr, choices))}")


def check_given(owner: str, name: str, value: Pulled | None, what: str) -> Pulled:
    """The callable that an optimizer needs, checked to be given.

    Args:
      owner: the optimizer.
      name: the keyword of its `update`.
      value: the callable.
      what: its description for the message.

    Raises:
      UserError: if it is None.
    """
    if value is None:
        raise UserError(
            f"{owner} needs {name}: call update(grads, state, params, {name}=...) with {what}; "
            f"{owner} must be outermost, since not every wrapper of Optax hands the keyword on"
        )
    return value


def check_outermost(owner: str, params: PyTree) -> None:
    """For `init` of an optimizer that pulls gradients: refuses wrappers under which those would be wrong.

    `optax.masked` and `optax.partition` are seen by the holes they leave in the parameters. Inside `optax.MultiSteps`
    the callables would be those of its last batch; the training step refuses that, which sees the whole state.

    Raises:
      UserError: under either of them.
    """
    is_hole = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise UserError(
            f"{owner} must be outermost: inside optax.partition/masked it sees only a part of the parameters; "
            "give it its own path predicate instead"
        )
