#!/usr/bin/env python3
"""Injects one fault after the other into real training runs, and prints which of them the run survived.

  taskset -c 0 scripts/bench_faults.py --json_out=faults.json

A fault is survived when training goes on by itself, or says in one line what is wrong and ends with its weights on
disk; and when, once the cause is taken away, the same command ends with the metrics and weights of a run that nobody
disturbed, bit for bit (where the fault left data out, with finite ones). The exit code is 1 unless all were survived.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from etils import epath
from trial_runs import TIMEOUT_SECONDS, Trial

from t5x_ext.checkpoints import CheckpointStore
from t5x_ext.storage.digests import DIGESTS, write_digests

_ONLY = flags.DEFINE_list("only", [], "names of faults, as the table shows them; by default all")
_GOLDEN = flags.DEFINE_string(
    "golden",
    str(Path(__file__).resolve().parents[1] / "tests/checkpoints/golden"),
    "folder of the checkpoint of an earlier version",
)
_JSON_OUT = flags.DEFINE_string("json_out", None, "file for the table as JSON")

POISON = '''
from dataclasses import dataclass

import jax.numpy as jnp

from t5x_ext.contracts import Loss
from t5x_ext.objectives import LabelSmoothedCrossEntropy


@dataclass(frozen=True)
class Poisoned(LabelSmoothedCrossEntropy):
    """Not a number on certain batches, which are known by the sum of their labels, or from an update on."""

    bad: tuple[int, ...] = ()
    after: int = 1_000_000

    def __call__(self, params, batch, context):
        loss = super().__call__(params, batch, context)
        checksum = jnp.sum(batch["target_labels"] * self.label_weights(batch, context))
        poisoned = jnp.any(checksum == jnp.array((-1, *self.bad))) | (context.step >= self.after)
        metrics = {**loss.metrics, "checksum": (checksum, jnp.ones(()))}
        return Loss(loss.sum * jnp.where(poisoned, jnp.nan, 1.0), loss.weight, metrics)
'''

POISON_GIN = """
import poison

train.Run.objective = @poison.Poisoned
"""

FULL_DISK = """
mount -t tmpfs -o size={kilobytes}k tmpfs {checkpoints} || exit 99
{train}
echo "exit code $?" >> {log}
mount -o remount,size=1g {checkpoints}
{train}
code=$?
cp -r {checkpoints} {checkpoints}.copy
exit $code
"""
"""In a name space of mounts of its own; it ends with the shell, and the disk with it."""


class Outcome(NamedTuple):
    """What a fault came to."""

    happened: str
    survived: bool


class Place:
    """The folder of all runs: `whole`, which nobody disturbed, and `killed`, which was killed in its middle."""

    def __init__(self, folder: Path):
        """Trains the two."""
        (folder / "poison.py").write_text(POISON, encoding="utf-8")
        self.trial = Trial(folder, extra_gin=POISON_GIN)
        self.folder = folder
        if self.trial.train("whole") != 0:
            raise SystemExit(f"the undisturbed run failed:\n{self.trial.said('whole')}")
        lines = (folder / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.checksums = {line["step"]: int(line["checksum"]) for line in map(json.loads, lines) if "checksum" in line}
        process = self.trial.start("killed")
        self.trial.until(process, lambda: self.trial.updates("killed") >= 28)
        process.kill()
        process.wait()

    def copy_of_killed(self, name: str) -> Path:
        """A copy of the killed run; gives the folder of its newest checkpoint."""
        shutil.copytree(self.folder / "killed", self.folder / name)
        (self.folder / f"{name}.log").write_text("")
        return self.newest(name)

    def newest(self, name: str) -> Path:
        """The newest finished checkpoint of a run."""
        with CheckpointStore(self.trial.checkpoints(name)) as store:
            return Path(store.directory / f"{store.steps()[-1]:08d}")

    def line_with(self, name: str, words: str) -> str:
        """The first line of what a run said that holds the words (a regular expression), without paths; or nothing."""
        found = [line for line in self.trial.said(name).splitlines() if re.search(words, line)]
        return re.sub(r"(?<!\w)/\S*/", "", found[0]).strip() if found else ""

    def goes_on(self, name: str, happened: str, *flags: str) -> Outcome:
        """Starts a run again, without the fault: it must end like the undisturbed one."""
        code = self.trial.train(name, *flags)
        if not happened:
            return Outcome(f"nothing was said; it ended with {code}", False)
        difference = self.trial.differences(name, "whole") if code == 0 else f"it ended with {code}"
        return Outcome(f"{happened}; then {difference or 'identical'}", difference is None)


def _damaged(damage: Callable[[Path], object]) -> Callable[[Place, str], Outcome]:
    def fault(place: Place, name: str) -> Outcome:
        newest = place.copy_of_killed(name)
        damage(newest)
        outcome = place.goes_on(name, "said so")
        said = place.line_with(name, f"{newest.name} refused")
        back = place.line_with(name, "resuming from step")
        return Outcome(
            f"{said}; {back}; {outcome.happened.removeprefix('said so; ')}", outcome.survived and bool(said and back)
        )

    return fault


def _largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncated(newest: Path) -> None:
    """A file of the weights lacks its end."""
    path = _largest_file(newest / "params")
    os.truncate(path, path.stat().st_size // 2)


def flipped(newest: Path) -> None:
    """One bit of the optimizer state has turned over."""
    path = _largest_file(newest / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def missing(newest: Path) -> None:
    """A file is gone."""
    (newest / "meta/metadata").unlink()


def half_written(newest: Path) -> None:
    """A save ended in its middle: half of its files, under the temporary name and under the final one."""
    shutil.copytree(newest, newest.with_name("00000035.orbax-checkpoint-tmp"))
    for folder in (newest, newest.with_name("00000035.orbax-checkpoint-tmp")):
        for path in sorted(path for path in folder.rglob("*") if path.is_file())[::2]:
            path.unlink()
        (folder / DIGESTS).unlink(missing_ok=True)


def other_model(place: Place, name: str) -> Outcome:
    """The newest checkpoint is that of a larger model."""
    newest = place.copy_of_killed(name)
    other = ("--steps=5", "--gin.models.TransformerConfig.mlp_dim=80")
    if place.trial.train(f"{name}_larger", *other) != 0:
        return Outcome("the larger model could not be trained", False)
    intruder = newest.with_name("00000099")
    shutil.copytree(place.newest(f"{name}_larger"), intruder)
    code = place.trial.train(name)
    said = place.line_with(name, "belongs to another model")
    rows = [line for line in place.trial.said(name).splitlines() if "float32[" in line]
    if code != 2 or not said or len(rows) < 4 or not newest.exists():
        return Outcome(f"{said or 'nothing was said'}; it ended with {code}", False)
    shutil.rmtree(intruder)
    return place.goes_on(name, f"{said}, with a table of {len(rows) - 1} rows")


def older_schema(place: Place, name: str) -> Outcome:
    """The checkpoint of an earlier version that is kept beside the tests is read; an unknown one is refused."""
    with CheckpointStore(_GOLDEN.value) as store:
        kernel = store.restore_params("last")["encoder"]["kernel"]
    newest = place.copy_of_killed(name)
    path = newest / "meta/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    write_digests(epath.Path(newest))
    code = place.trial.train(name)
    said = place.line_with(name, "has format 0")
    if code != 2 or kernel.shape != (3, 4):
        return Outcome(f"{said or 'nothing was said'}; it ended with {code}", False)
    shutil.rmtree(newest)
    return place.goes_on(name, f"golden one read; {said}")


def full_disk(place: Place, name: str) -> Outcome:
    """The disk of the checkpoints has room for one and a half."""
    checkpoints = place.trial.checkpoints(name)
    checkpoints.mkdir(parents=True)
    size = sum(path.stat().st_blocks * 512 for path in place.newest("killed").rglob("*") if path.is_file())
    log = place.folder / f"{name}.log"
    script = FULL_DISK.format(
        kilobytes=size * 3 // 2 // 1024,
        checkpoints=checkpoints,
        log=log,
        train=" ".join([*place.trial.command(name), f">> {log} 2>&1"]),
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    code = subprocess.run(command, cwd=place.folder, env=place.trial.environment(), timeout=TIMEOUT_SECONDS).returncode
    if code in (1, 99) and not log.exists():
        return Outcome("not injected: this machine lets no user mount a small disk", False)
    said = place.line_with(name, "could not be saved")
    first = place.line_with(name, "^exit code")
    if code != 0 or first != "exit code 2" or not said:
        return Outcome(f"{said or 'nothing was said'}; {first}, then {code}", False)
    shutil.rmtree(checkpoints)
    checkpoints.with_name("checkpoints.copy").rename(checkpoints)
    difference = place.trial.differences(name, "whole")
    return Outcome(f"{said}; with more room {difference or 'identical'}", difference is None)


def no_room_in_a_save(place: Place, name: str) -> Outcome:
    """Writing fails in the middle of a file, as it does where the disk is full (a limit on the size of files)."""
    newest = place.copy_of_killed(name)
    limit = _largest_file(newest).stat().st_size * 3 // 4
    with _files_of_at_most(limit):
        process = place.trial.start(name)
    code = process.wait(TIMEOUT_SECONDS)
    said = place.line_with(name, "could not be saved")
    left = sorted(path.name for path in newest.parent.iterdir() if not (path / DIGESTS).exists())
    if code != 2 or not said or left or "Traceback" in place.trial.said(name):
        return Outcome(f"{said or 'nothing was said'}; it ended with {code}; left behind: {left}", False)
    return place.goes_on(name, said)


@contextlib.contextmanager
def _files_of_at_most(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def infinite_once(place: Place, name: str) -> Outcome:
    """The loss of one batch is not a number."""
    code = place.trial.train(name, f"--gin.poison.Poisoned.bad=({place.checksums[25]},)")
    lines = place.trial.lines(name)
    skipped = [line["step"] for line in lines if line.get("skipped_updates")]
    good = code == 0 and skipped and skipped[0] == 25 and lines[-1].get("skipped_updates", 1) == 1
    said = place.line_with(name, "left out")
    ids = len(_bad_examples(place, name))
    return Outcome(f"{said}; {ids} example ids on disk; it ended with {code}", bool(good and said and ids))


def infinite_in_a_row(place: Place, name: str) -> Outcome:
    """The losses of four batches in a row are not numbers, and three are too many."""
    bad = tuple(place.checksums[step] for step in range(23, 27))
    code = place.trial.train(
        name, f"--gin.poison.Poisoned.bad={bad}".replace(" ", ""), "--gin.Run.max_skipped_updates=3"
    )
    said = place.line_with(name, "going back")
    results = _results(place, name)
    good = code == 0 and results.get("rewinds") == 1 and place.trial.lines(name)[-1]["step"] == place.trial.steps
    ids = len(_bad_examples(place, name))
    return Outcome(f"{said}; {ids} example ids on disk; it ended with {code}", bool(good and said and ids))


def infinite_for_ever(place: Place, name: str) -> Outcome:
    """From update 20 on no loss is a number."""
    code = place.trial.train(name, "--gin.poison.Poisoned.after=20", "--gin.Run.max_skipped_updates=3")
    said = place.line_with(name, "^t5x_ext train: ")
    ids = len(_bad_examples(place, name))
    with CheckpointStore(place.trial.checkpoints(name)) as store:
        whole = store.steps()
    good = code == 2 and ids and whole and max(whole) <= 20 and "not finite" in said
    return Outcome(f"{said}; {ids} example ids and checkpoints {whole} on disk", bool(good))


def _bad_examples(place: Place, name: str) -> list[Any]:
    path = place.folder / name / "skipped_examples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [example for line in lines for example in json.loads(line)["examples"]]


def _results(place: Place, name: str) -> dict[str, Any]:
    path = place.folder / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def dead_reader(place: Place, name: str) -> Outcome:
    """The shards of the token cache turn to noise while the run reads them."""
    place.copy_of_killed(name)
    caches = place.folder / f"{name}_caches"
    shutil.copytree(place.folder / "caches", caches)
    shards = sorted(path for path in caches.rglob("*.array*") if path.is_file())
    good = {path: path.read_bytes() for path in shards}
    process = place.trial.start(name, f"--cache_dir={caches}")
    before = place.trial.updates(name)
    place.trial.until(process, lambda: place.trial.updates(name) > before)
    for path, data in good.items():
        with path.open("r+b") as file:  # in place: the run has these files open
            file.write(bytes(len(data)))
    code = process.wait(TIMEOUT_SECONDS)
    for path, data in good.items():
        path.write_bytes(data)
    said = place.line_with(name, r"^(t5x_ext train: |\w+(\.\w+)*(Error|Exception): )")
    if code == 0 or not shards:
        return Outcome("the run never read what was damaged", False)
    return place.goes_on(name, f"ended with {code}: {said}" if said else "", f"--cache_dir={caches}")


def missing_host(place: Place, name: str) -> Outcome:
    """The second of two processes never comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    two = ("--distributed=explicit", f"--coordinator_address={address}", "--num_processes=2", "--process_id=0")
    begin = time.monotonic()
    code = place.trial.train(name, *two, "--initialization_timeout=3")
    seconds = time.monotonic() - begin
    said = place.line_with(name, "^t5x_ext train: ")
    good = code == 2 and re.search(r"\b1\b", said.split("process", 1)[-1]) and seconds < 30
    return Outcome(f"{said} (after {seconds:.0f} s)", bool(good))


def _told_to_stop(number: signal.Signals) -> Callable[[Place, str], Outcome]:
    def fault(place: Place, name: str) -> Outcome:
        process = place.trial.start(name)
        place.trial.until(process, lambda: place.trial.updates(name) >= 17)
        process.send_signal(number)
        code = process.wait(TIMEOUT_SECONDS)
        said = place.line_with(name, "is on disk")
        if code != 130 or not said:
            return Outcome(f"{said or 'nothing was said'}; it ended with {code}", False)
        return place.goes_on(name, said)

    return fault


def killed_in_a_save(place: Place, name: str) -> Outcome:
    """SIGKILL while a checkpoint is being written."""
    process = place.trial.start(name)
    folder = place.trial.checkpoints(name)

    def saving() -> bool:
        with contextlib.suppress(OSError):
            return place.trial.updates(name) >= 14 and any("tmp" in entry.name for entry in os.scandir(folder))
        return False

    place.trial.until(process, saving)
    process.kill()
    code = process.wait()
    return place.goes_on(name, f"killed at update {place.trial.updates(name)}" if code == -signal.SIGKILL else "")


FAULTS: dict[str, Callable[[Place, str], Outcome]] = {
    "checkpoint_truncated": _damaged(truncated),
    "checkpoint_flipped_bit": _damaged(flipped),
    "checkpoint_file_gone": _damaged(missing),
    "checkpoint_half_written": _damaged(half_written),
    "checkpoint_of_another_model": other_model,
    "checkpoint_of_older_schema": older_schema,
    "disk_full_before_a_save": full_disk,
    "disk_full_in_a_save": no_room_in_a_save,
    "loss_not_finite_once": infinite_once,
    "loss_not_finite_in_a_row": infinite_in_a_row,
    "loss_not_finite_for_ever": infinite_for_ever,
    "data_reader_dies": dead_reader,
    "host_never_arrives": missing_host,
    "sigterm": _told_to_stop(signal.SIGTERM),
    "sigusr1": _told_to_stop(signal.SIGUSR1),
    "killed_in_a_save": killed_in_a_save,
}


def main(argv: Sequence[str]) -> None:
    """Injects the faults and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    unknown = [name for name in _ONLY.value if name not in FAULTS]
    if unknown:
        raise app.UsageError(f"--only={unknown[0]} is unknown; known: {', '.join(FAULTS)}")
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    table: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for name in _ONLY.value or FAULTS:
            table[name] = FAULTS[name](place, name)
            print(f"{name:<28} {'yes' if table[name].survived else 'NO':<4} {table[name].happened}", flush=True)
            if not table[name].survived and (Path(folder) / f"{name}.log").exists():
                print(place.trial.said(name)[-6000:], file=sys.stderr, flush=True)
    survived = sum(outcome.survived for outcome in table.values())
    if _JSON_OUT.value:
        rows = {name: outcome._asdict() for name, outcome in table.items()}
        figures = {"survived": survived, "total": len(table), "faults": rows}
        Path(_JSON_OUT.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"survived {survived}/{len(table)}")
    raise SystemExit(0 if survived == len(table) else 1)


if __name__ == "__main__":
    app.run(main)
