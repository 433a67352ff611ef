"""Reading and writing the arrays of a checkpoint by Orbax: the state, and separately each kind of weights.

Orbax is imported on first use, because that is slow.
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
"""Parts of a state that are stored separately, so that reading parameters reads nothing else."""

STATE = "state"
"""The rest of a state."""


def make_checkpointer(*, alone: bool) -> Any:
    """An `AsyncCheckpointer` for all processes, or for this one only."""
    ocp = _orbax()
    options = _only_here() if alone else ocp.options.MultiprocessingOptions()
    # Without compression: weights hardly compress, and it costs time.
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
    """A reader that does not wait for other processes."""
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
    """Starts writing arrays by name, and the record, in the background; returns when they are copied to the host."""
    ocp = _orbax()
    items = {item: ocp.args.PyTreeSave(tree) for item, tree in _items(arrays).items()}
    checkpointer.save(folder, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))


def read(reader: Any, folder: epath.Path, requests: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays by name.

    Args:
      reader: from `make_checkpointer` or `lone_reader`.
      folder: the checkpoint.
      requests: by name, from `request_like` or `request_numpy`.
    """
    ocp = _orbax()
    items = {item: ocp.args.PyTreeRestore(item=tree, restore_args=tree) for item, tree in _items(requests).items()}
    restored = reader.restore(folder, args=ocp.args.Composite(**items))
    return {name: leaf for item in items for name, leaf in trees.flatten(restored[item]).items()}


def request_like(leaf: Any) -> Any:
    """A request for an array like a leaf: with its sharding, or on the first device; NumPy if it is not JAX's."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return request_numpy()
    plain = jax.eval_shape(jax.random.key_data, leaf) if trees.is_key(leaf) else leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return _orbax().ArrayRestoreArgs(sharding=sharding, global_shape=plain.shape, dtype=plain.dtype)


def request_numpy() -> Any:
    """A request for a NumPy array."""
    return _orbax().RestoreArgs(restore_type=np.ndarray)


def item_of(name: str) -> str:
    """The part of a checkpoint's folder that an array, or a file, is in, by its name."""
    head = name.split("/")[0]
    return head if head in WEIGHTS else STATE


def is_stored(spec: trees.LeafSpec) -> bool:
    """Whether an array is in the folder: Orbax refuses arrays without elements, which the record describes."""
    return 0 not in spec.shape


def empty_like(leaf: Any) -> Any:
    """An array like a leaf, for one that is not stored."""
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint


def _only_here() -> Any:
    """Orbax' options for not waiting for other processes."""
    here = jax.process_index()
    return _orbax().options.MultiprocessingOptions(primary_host=here, active_processes={here})


def _items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dictionaries of arrays by the part of the folder, with full names."""
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        parts.setdefault(item_of(name), {})[name] = leaf
    return {item: trees.nested(part) for item, part in parts.items()}
