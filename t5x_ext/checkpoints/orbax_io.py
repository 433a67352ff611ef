"""Arrays in a checkpoint's folder, through Orbax: the state, and apart from it each kind of weights.

Orbax is imported on first use: that takes as long as importing the rest of the room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from t5x_ext.checkpoints import trees
from t5x_ext.storage.processes import TIMEOUT_SECONDS

WEIGHTS = ("params", "ema")
"""Parts of a state that are stored apart, so that reading parameters touches nothing else."""

STATE = "state"
"""The part of a state that is not weights."""


def make_checkpointer(*, alone: bool) -> Any:
    """An `AsyncCheckpointer` of all processes, or of this one alone."""
    ocp = _orbax()
    options = _only_here() if alone else ocp.options.MultiprocessingOptions()
    # Trained weights are noise to a compressor: it would cost time and save little.
    trees_of_arrays = {
        item: ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
        for item in (STATE, *WEIGHTS)
    }
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=options)
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options), meta=meta, **trees_of_arrays
        ),
        timeout_secs=TIMEOUT_SECONDS,
        multiprocessing_options=options,
    )


@contextmanager
def lone_reader() -> Iterator[Any]:
    """A reader that waits for no other process."""
    ocp, options = _orbax(), _only_here()
    handlers = {item: ocp.PyTreeCheckpointHandler(multiprocessing_options=options) for item in (STATE, *WEIGHTS)}
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )
    with ocp.Checkpointer(composite, multiprocessing_options=options) as reader:
        yield reader


def start_writing(
    checkpointer: Any, folder: epath.Path, arrays: Mapping[str, jax.Array | np.ndarray], meta: Mapping[str, Any]
) -> None:
    """Begins to write arrays by name, and the record, in the background; returns when they are copied to the host."""
    ocp = _orbax()
    items = {item: ocp.args.PyTreeSave(tree) for item, tree in _items(arrays).items()}
    checkpointer.save(folder, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))


def read(reader: Any, folder: epath.Path, requests: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by name.

    Args:
      reader: what `make_checkpointer` or `lone_reader` gives.
      folder: the checkpoint.
      requests: by name, what `request_like` or `request_numpy` gives.
    """
    ocp = _orbax()
    items = {item: ocp.args.PyTreeRestore(item=tree, restore_args=tree) for item, tree in _items(requests).items()}
    restored = reader.restore(folder, args=ocp.args.Composite(**items))
    return {name: leaf for item in items for name, leaf in trees.flatten(restored[item]).items()}


def request_like(leaf: Any) -> Any:
    """Asks for an array like a leaf: with its sharding, or on the first device; NumPy for anything not of JAX."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return request_numpy()
    plain = jax.eval_shape(jax.random.key_data, leaf) if trees.is_key(leaf) else leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return _orbax().ArrayRestoreArgs(sharding=sharding, global_shape=plain.shape, dtype=plain.dtype)


def request_numpy() -> Any:
    """Asks for a NumPy array."""
    return _orbax().RestoreArgs(restore_type=np.ndarray)


def item_of(name: str) -> str:
    """The part of a checkpoint's folder that holds an array, or a file, by its name."""
    head = name.split("/")[0]
    return head if head in WEIGHTS else STATE


def is_stored(spec: trees.LeafSpec) -> bool:
    """Whether an array is in the folder: Orbax refuses arrays without elements, whose shape and dtype say all."""
    return 0 not in spec.shape


def empty_like(leaf: Any) -> Any:
    """An array that is not stored, of the kind of a leaf."""
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint


def _only_here() -> Any:
    """Orbax' options for what waits for no other process."""
    here = jax.process_index()
    return _orbax().options.MultiprocessingOptions(primary_host=here, active_processes={here})


def _items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested dictionaries a part of the folder, full names kept inside."""
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        parts.setdefault(item_of(name), {})[name] = leaf
    return {item: trees.nested(part) for item, part in parts.items()}
