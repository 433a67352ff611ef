"""What a translator is made of, opened from run folders: model, parameters, vocabulary, tags and directions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from t5x_ext.checkpoints import RunFolder, check_structure, run_params
from t5x_ext.contracts import Params, PyTree, UserError
from t5x_ext.data.tags import TagPolicy
from t5x_ext.data.vocabulary import Vocabulary
from t5x_ext.decode.ensemble import Combine, Ensemble, member_shapes, stack_members
from t5x_ext.models import UNPLACED, Transformer, logical_axes, model_from_json
from t5x_ext.parallel import AxisRules, MeshPlacement, tree_shardings
from t5x_ext.storage.digests import params_digest


class Opened(NamedTuple):
    """The parts of a translator."""

    model: Transformer | Ensemble
    params: Params
    vocabulary: Vocabulary
    tags: TagPolicy
    directions: tuple[str, ...]  # what the model was trained for, such as `en-de`


def open_run(
    run_dir: epath.PathLike,
    checkpoint: str | int = "best",
    mesh: Mesh | None = None,
    axis_rules: AxisRules | None = None,
) -> Opened:
    """Reads a run folder: its JSON, its vocabulary and the weights of one checkpoint, nothing else.

    Args:
      run_dir: local or remote folder.
      checkpoint: `best`, `last` or a step.
      mesh: the devices to decode on, which may be others than those of the training; None: the default device.
      axis_rules: how the weights are sharded over the mesh; None: every device has all of them.

    Returns:
      The parts; parameters are NumPy arrays, those of the EMA where the run kept one.

    Raises:
      UserError: where the folder is not that of a run, has no such checkpoint, or its parts do not fit.
    """
    run = RunFolder(run_dir)
    record = run.read_model()
    placement = UNPLACED if mesh is None else MeshPlacement(mesh, axis_rules or AxisRules())
    model = model_from_json(record.model, placement)
    vocabulary = Vocabulary.load(str(run.vocabulary))
    if vocabulary.fingerprint() != record.vocabulary:
        raise UserError(f"{run.vocabulary} is not the vocabulary that this model was trained with; restore it")
    try:
        tags = TagPolicy(**record.tags)
    except TypeError:
        raise UserError(f"{run.model_json}: tags {record.tags} are not those of a TagPolicy") from None
    return Opened(model, run_params(run, checkpoint), vocabulary, tags, tuple(record.directions))


def join_members(members: Sequence[Opened], combine: Combine = "log_prob") -> Opened:
    """Several models of one shape, vocabulary and tag policy as one, see `Ensemble`.

    Args:
      members: at least one; none of them an ensemble.
      combine: average log-probabilities (`log_prob`) or probabilities.

    Raises:
      UserError: where the members do not fit each other.
    """
    first = members[0]
    for number, other in enumerate(members[1:], start=2):
        for what, differs in (
            ("vocabulary", other.vocabulary.fingerprint() != first.vocabulary.fingerprint()),
            ("model", other.model != first.model),
            ("tag policy", other.tags != first.tags),
        ):
            if differs:
                raise UserError(f"ensemble: model {number} has another {what} than the first; members must agree")
    shared = tuple(name for name in first.directions if all(name in member.directions for member in members))
    if not shared:
        raise UserError("ensemble: the models have no direction in common")
    if isinstance(first.model, Ensemble):
        raise UserError("ensemble: a member is an ensemble itself; give its models instead")
    model = Ensemble(first.model, len(members), combine)
    params = stack_members([member.params for member in members])
    return Opened(model, params, first.vocabulary, first.tags, shared)


def place(opened: Opened) -> Opened:
    """Checks that the parts fit each other, and puts the parameters on devices.

    NumPy arrays go where the model's placement wants them, or else to the default device; JAX arrays stay.

    Raises:
      UserError: where vocabulary or parameters do not fit the model.
    """
    model, vocabulary = opened.model, opened.vocabulary
    if vocabulary.size != model.config.vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.size} pieces, the model {model.config.vocab_size}: "
            "they are not of the same run"
        )
    check_structure(opened.params, abstract_params(model), where="the checkpoint")
    return opened._replace(params=_placed(model, opened.params))


def abstract_params(model: Transformer | Ensemble) -> PyTree:
    """Shapes and dtypes of all parameters of a model, or of all members of an ensemble; nothing is allocated."""
    return member_shapes(model, _member(model).abstract_params())


def fingerprint(opened: Opened) -> str:
    """SHA-256 over everything that decides a translation but the options: weights, model, vocabulary, tags."""
    # Where arrays are stored decides nothing.
    parts = (
        repr(_unplaced(opened.model)),
        opened.vocabulary.fingerprint(),
        repr(opened.tags),
        repr(opened.directions),
        params_digest(opened.params),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _placed(model: Transformer | Ensemble, params: Params) -> Params:
    """Parameters as JAX arrays, NumPy arrays placed as the model wants them."""
    placement = model.placement
    if not isinstance(placement, MeshPlacement):
        return jax.tree.map(jnp.asarray, params)
    axes = logical_axes(_member(model))
    if isinstance(model, Ensemble):
        axes = jax.tree.map(lambda names: (None, *names), axes, is_leaf=lambda node: isinstance(node, tuple))
    shardings = tree_shardings(placement.mesh, placement.rules, axes, params)
    put = lambda leaf, sharding: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, sharding)
    return jax.tree.map(put, params, shardings)


def _member(model: Transformer | Ensemble) -> Transformer:
    return model.model if isinstance(model, Ensemble) else model


def _unplaced(model: Transformer | Ensemble) -> Transformer | Ensemble:
    if isinstance(model, Ensemble):
        return dataclasses.replace(model, model=model.model.clone(placement=UNPLACED))
    return model.clone(placement=UNPLACED)
