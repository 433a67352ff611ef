"""Processes, the device mesh, rules from logical axes to mesh axes, shardings and global batches."""

from t5x_ext.parallel.batches import global_batch, host_rows
from t5x_ext.parallel.distributed import DistributedConfig, initialize_distributed
from t5x_ext.parallel.hardware import HARDWARE, Hardware, cpu_threads, hardware_of
from t5x_ext.parallel.mesh import BATCH_AXES, MESH_AXES, MeshConfig, batch_devices, make_mesh
from t5x_ext.parallel.placement import MeshPlacement
from t5x_ext.parallel.rules import AxisRules, data_parallel, fsdp, fsdp_tensor
from t5x_ext.parallel.shardings import state_shardings, tree_shardings
from t5x_ext.storage.processes import barrier, failing_together, from_primary, is_primary, primary_first

__all__ = [
    "BATCH_AXES",
    "HARDWARE",
    "MESH_AXES",
    "AxisRules",
    "DistributedConfig",
    "Hardware",
    "MeshConfig",
    "MeshPlacement",
    "barrier",
    "batch_devices",
    "cpu_threads",
    "data_parallel",
    "failing_together",
    "from_primary",
    "fsdp",
    "fsdp_tensor",
    "global_batch",
    "hardware_of",
    "host_rows",
    "initialize_distributed",
    "is_primary",
    "make_mesh",
    "primary_first",
    "state_shardings",
    "tree_shardings",
]
