"""The checkpoint that is kept beside the tests: what is in it, and how it was made.

Every later version must load it. A change of the format gets a second golden folder beside this one; this one is never
made again: `python tests/checkpoints/golden.py` makes it where there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_ext.checkpoints import CheckpointStore, Retention
from t5x_ext.storage.digests import write_digests

GOLDEN = Path(__file__).parent / "golden"
EXTRA = {"batches_consumed": 12, "skipped": [[3, 5]], "memory": {"language": "česky"}}
METRICS = {"valid/loss": 2.5}


def state() -> dict[str, Any]:
    """The saved tree, from formulas: every kind of leaf that training saves."""
    kernel = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    params = {"encoder": {"kernel": jnp.asarray(kernel), "bias": jnp.arange(4, dtype=jnp.bfloat16)}}
    moments = {"encoder": {"kernel": jnp.asarray(kernel**2), "bias": jnp.zeros(4, jnp.bfloat16)}}
    return {
        "step": jnp.int32(7),
        "params": params,
        "optimizer_state": [(jnp.int32(7), moments, None), {"key": jax.random.key(3), "empty": jnp.zeros((0, 2))}],
        "ema": jax.tree.map(lambda leaf: leaf / 2, params),
        "mutable": (),
    }


def main() -> None:
    """Makes the golden checkpoint."""
    with CheckpointStore(GOLDEN, Retention(metric="valid/loss", mode="min")) as store:
        if store.steps():
            raise SystemExit(f"{GOLDEN} is there, and stays as it is")
        store.save(7, state(), EXTRA, METRICS)
    folder = store.directory / "00000007"
    for note in Path(folder).rglob("commit_success.txt"):
        # Orbax notes the path, which is another one wherever this is unpacked.
        note.write_text(note.read_text().replace(str(GOLDEN.parent), "..."))
    write_digests(folder)


if __name__ == "__main__":
    main()
