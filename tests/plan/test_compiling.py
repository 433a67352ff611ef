"""What is read of a compilation is read of one that took place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_ext.plan.compiling import compile_for, partition


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """JAX's cache of programs, in which everything is kept."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.devices(8)
def test_a_program_in_the_cache_is_compiled_again(cache):
    """What the partitioner says is there only then: a sum over devices in bfloat16, which the CPU makes float32."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    left = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "data")))
    right = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    product = jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P()))
    product.lower(left, right).compile()
    kept = set(cache.iterdir())
    assert kept
    found = [partition(product.lower(left, right), {"data": 8}).hlo.collective_ops for _ in range(2)]
    assert [(op.kind, op.dtype) for op in found[0]] == [("all-reduce", "bf16")]
    assert found[0] == found[1]
    in_the_end = compile_for(product.lower(left, right), {"data": 8}).hlo.collective_ops
    assert [(op.kind, op.dtype) for op in in_the_end] == [("all-reduce", "f32")]
    assert set(cache.iterdir()) == kept
    jax.jit(jnp.add).lower(left, left).compile()
    assert set(cache.iterdir()) > kept  # the cache is in use again
