"""A verified store of checkpoints, averages of them, and the names of files in a run folder."""

from t5x_ext.checkpoints.averaging import average_params, average_run
from t5x_ext.checkpoints.references import BASE, Reference, read_references, run_params, write_references
from t5x_ext.checkpoints.retention import Retention
from t5x_ext.checkpoints.run_folder import ModelRecord, RunFolder
from t5x_ext.checkpoints.store import CheckpointStore, SaveError
from t5x_ext.checkpoints.trees import StructureError, check_structure

__all__ = [
    "BASE",
    "CheckpointStore",
    "ModelRecord",
    "Reference",
    "Retention",
    "RunFolder",
    "SaveError",
    "StructureError",
    "average_params",
    "average_run",
    "check_structure",
    "read_references",
    "run_params",
    "write_references",
]
