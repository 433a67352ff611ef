"""Where it runs: the device mesh, rules from logical axis names to mesh axes, shardings and global batches."""

from t5x_ext.parallel.batches import global_batch, host_rows
from t5x_ext.parallel.hardware import HARDWARE, Hardware, hardware_of
from t5x_ext.parallel.mesh import BATCH_AXES, MESH_AXES, MeshConfig, batch_devices, make_mesh
from t5x_ext.parallel.placement import MeshPlacement
from t5x_ext.parallel.rules import AxisRules, data_parallel, fsdp, fsdp_tensor
from t5x_ext.parallel.shardings import state_shardings, tree_shardings

__all__ = [
    "BATCH_AXES",
    "HARDWARE",
    "MESH_AXES",
    "AxisRules",
    "Hardware",
    "MeshConfig",
    "MeshPlacement",
    "batch_devices",
    "data_parallel",
    "fsdp",
    "fsdp_tensor",
    "global_batch",
    "hardware_of",
    "host_rows",
    "make_mesh",
    "state_shardings",
    "tree_shardings",
]
