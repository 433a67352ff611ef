"""The page for people who want only the transforms: its blocks of Python run, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
MODEL, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    """The names of the first block, which stands before each of the others."""
    names: dict[str, Any] = {}
    exec(MODEL, names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs_after_the_first_one(block, model):
    names = dict(model)
    exec(block, names)
    if "nnx_step" in names:
        losses = [names["nnx_step"](names["model"], names["optimizer"], names["batch"]) for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]
    if "step" in names:
        params, state, start = names["params"], names["state"], names["loss"](names["params"], names["batch"])
        for _ in range(20):
            params, state = names["step"](params, state, names["batch"])
        assert names["loss"](params, names["batch"]) < 0.8 * start


def test_there_is_a_training_step_for_every_transform():
    steps = [re.findall(r"optim\.(fsam|flora|flora_accumulator|ginger)\(", b)[0] for b in BLOCKS if "def step(" in b]
    assert steps == ["fsam", "flora", "flora_accumulator", "ginger"]


def test_importing_the_transforms_loads_nothing_heavy():
    code = "import jax, optax, sys; before = set(sys.modules); import t5x_ext.optim; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {name.split(".")[0] for name in loaded} <= {"t5x_ext", "jax", "optax", "jaxtyping", "numpy", "fractions"}


def test_links_of_the_page_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert [link for link in links if not (PAGE.parent / link.split("#")[0]).exists()] == []


def test_flora_goes_on_from_the_data_of_its_key(model):
    optimizer, params = model["optim"].scale_by_flora(rank=2, min_dim_size_to_compress=4), {"w": jnp.eye(8)}
    state = optimizer.init(params)
    restored = state._replace(key=jax.random.wrap_key_data(jax.random.key_data(state.key)))
    updates = [optimizer.update(params, each)[1].mu["w"] for each in (state, restored)]
    assert (updates[0] == updates[1]).all()
