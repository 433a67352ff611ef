"""Compiled programs are kept on disk, so that a command that is run again starts at once."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from absl import flags

SHORTEST_COMPILE_SECONDS = 0.1
"""Programs that compile faster are not kept: there are many, and they cost as much to read."""


def define_compile_cache_flag(values: flags.FlagValues) -> None:
    """Declares the flag that `keep_compiled_programs` reads."""
    flags.DEFINE_string(
        "compile_cache_dir", None,
        "folder of compiled programs; empty keeps none; by default JAX_COMPILATION_CACHE_DIR, or t5x_ext/compile in "
        "XDG_CACHE_HOME (~/.cache)",
        flag_values=values,
    )  # fmt: skip


def keep_compiled_programs(values: flags.FlagValues) -> None:
    """Turns JAX's persistent compilation cache on, before anything is compiled."""
    import jax

    root = values.compile_cache_dir
    if root is None:
        root = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        if root is None and jax.config.values["jax_compilation_cache_dir"]:
            return  # the program that called this one has decided
        root = root or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t5x_ext" / "compile")
    if root:
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, _host_key()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_COMPILE_SECONDS)
    else:
        jax.config.update("jax_enable_compilation_cache", False)


def _host_key() -> str:
    """Names the hosts that may share programs.

    A program for the CPU holds instructions of the CPU that compiled it, and is cut for its number of threads, of both
    of which JAX's key knows nothing.
    """
    from t5x_ext.parallel import cpu_threads

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    threads = str(cpu_threads())
    digest = hashlib.sha256("\n".join((platform.machine(), features, threads)).encode()).hexdigest()
    return f"{platform.machine()}-{threads}-{digest[:12]}"
