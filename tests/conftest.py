"""Tests on several devices: `@pytest.mark.devices(8)` runs a test in a process that sees 8 virtual CPU devices.

The number of devices is fixed when JAX starts, so such tests need a process of their own. All marked tests of a module
that ask for the same number share one; each reports its own outcome.

Programs of tests are compiled quickly: their machine code is not optimised. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles
them as users do. Processes that they start compile as users do, too, unless a test says otherwise.

Shapes and types that functions of the pure floors say are checked whenever a test of these floors calls them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

PURE_FLOORS = ("contracts", "models", "objectives", "optim", "compress")

# Before anything imports the package. An int is a float, as everywhere in Python.
install_import_hook(
    [f"t5x_ext.{room}" for room in PURE_FLOORS],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
jaxtyping.config.update("jaxtyping_disable", True)

# The same examples in every run; compiled programs and other tests on the machine set no deadline.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

OUTCOMES_FILE = "T5X_EXT_TEST_OUTCOMES"
"""Set in the inner process only: the file to which it appends one JSON line a test."""

MOST_RESIDENT_BYTES = 3 * 2**29
"""A module of tests may leave so much; beyond it compiled programs are dropped, which others would have used."""

_outcomes: dict[str, tuple[str, str]] = {}

_programs: list[tempfile.TemporaryDirectory[str]] = []


@pytest.fixture(autouse=True)
def no_thread_count_left_behind() -> Iterator[None]:
    """A command that goes on with a run sets NPROC for its process, which in tests is that of the next one, too."""
    os.environ.pop("NPROC", None)
    yield
    os.environ.pop("NPROC", None)


@pytest.fixture(autouse=True)
def annotations_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of the pure floors; those of other rooms spend their time elsewhere."""
    parts = request.path.relative_to(request.config.rootpath).parts
    jaxtyping.config.update("jaxtyping_disable", not {*PURE_FLOORS} & {*parts})
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def unchecked(annotations_are_checked: None) -> None:
    """Lets a test hand over what an annotation forbids, to see how the package itself refuses it."""
    jaxtyping.config.update("jaxtyping_disable", True)


def pytest_configure(config: pytest.Config) -> None:
    # A small program that is run a few times: to compile it takes most of the time.
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        jax.config.update("jax_disable_most_optimizations", True)
    # Commands keep compiled programs: those of tests in a folder of their own, one a process.
    _programs.append(tempfile.TemporaryDirectory(prefix="programs"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs[-1].name
    config.addinivalue_line("markers", "devices(count): runs in a process that sees `count` virtual CPU devices")


def pytest_unconfigure() -> None:
    while _programs:
        _programs.pop().cleanup()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("devices")
    if marker is None or OUTCOMES_FILE in os.environ:
        return None
    if pyfuncitem.nodeid not in _outcomes:
        same_process = [
            item.nodeid
            for item in pyfuncitem.session.items
            if item.path == pyfuncitem.path and item.get_closest_marker("devices") == marker
        ]
        _run_inside(same_process, marker.args[0], pyfuncitem.config)
    outcome, report = _outcomes[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(report)
    if outcome == "failed":
        pytest.fail(report, pytrace=False)
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if sys.platform == "linux" and (nextitem is None or nextitem.path != item.path):
        _give_memory_back()


def _give_memory_back() -> None:
    """Programs stay in JAX's caches, and what compilers have freed in the C library's: gigabytes in a whole run."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    if resident_pages * os.sysconf("SC_PAGE_SIZE") > MOST_RESIDENT_BYTES:
        jax.clear_caches()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(OUTCOMES_FILE)
    if path and (report.when == "call" or report.outcome != "passed"):
        with Path(path).open("a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, report.longreprtext]) + "\n")


def _run_inside(node_ids: list[str], devices: int, config: pytest.Config) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment["JAX_PLATFORMS"] = "cpu"
    options = ["-q", "-o", "addopts=--import-mode=importlib", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *node_ids]
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
        environment[OUTCOMES_FILE] = file.name
        process = subprocess.run(command, cwd=config.rootpath, env=environment, capture_output=True, text=True)
        lines = file.readlines()
    crashed = (
        "failed",
        f"the process with {devices} devices ended with {process.returncode}:\n{process.stdout}{process.stderr}",
    )
    _outcomes.update(dict.fromkeys(node_ids, crashed))
    _outcomes.update({node_id: (outcome, report) for node_id, outcome, report in map(json.loads, lines)})


WORDS = {
    "en": ("the", "cat", "dog", "house", "tree", "river", "child", "street", "garden", "window", "letter"),
    "de": ("das", "Katze", "Hund", "Haus", "Baum", "Fluss", "Kind", "Straße", "Garten", "Fenster", "Brief"),
    "zh": ("这", "猫", "狗", "房子", "树", "河", "孩子", "街道", "花园", "窗户", "信"),
}


@dataclass(frozen=True)
class ListCorpus:
    """A corpus from outside the package: nothing but the Protocol's members."""

    lines: tuple[tuple[str, str], ...]
    languages: tuple[str, str] = ("en", "de")
    name: str = "list"

    def pairs(self) -> Iterator[tuple[str, str]]:
        return iter(self.lines)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.lines, self.languages)).encode()).hexdigest()


def sentences(count: int, languages: tuple[str, str], seed: int = 0) -> tuple[tuple[str, str], ...]:
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        words = random.integers(0, len(WORDS["en"]), random.integers(1, 12))
        source, target = (" ".join(WORDS[language][word] for word in words) for language in languages)
        pairs.append((f"{source} {number}", f"{target} {number}"))
    return tuple(pairs)


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., ListCorpus]:
    """`make_corpus(count, ("en", "de"), seed, name)`: random aligned sentences, each ending in its number."""

    def make(count: int, languages: tuple[str, str] = ("en", "de"), seed: int = 0, name: str = "list") -> ListCorpus:
        return ListCorpus(sentences(count, languages, seed), languages, name)

    return make


@pytest.fixture(scope="session")
def list_corpus() -> type[ListCorpus]:
    return ListCorpus


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    """`write(name, content)` -> path of a new file."""

    def write_file(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write_file
