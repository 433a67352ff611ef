"""Several processes of one run: what they share, that they end alike, and what is kept of how fast they were.

Processes are threads here, each of which takes itself for one; what joins them stands in for JAX's service.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import pytest
from stand_ins import Given, StandIn, opener

from t5x_ext.contracts import UserError
from t5x_ext.decode import DecodeConfig, Greedy
from t5x_ext.pipeline import (
    Artefact,
    GreedyEnsemble,
    Interrupted,
    Pipeline,
    SharedStage,
    Stage,
    Translate,
    decoding,
    execute,
)
from t5x_ext.storage import processes as together
from t5x_ext.vega_mt import CycleTranslate, Synthesize

GREEDY = DecodeConfig(Greedy())
WORDS = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben")
MONO = Given("mono", texts=(("m", ("de",), tuple((" ".join(WORDS[: 1 + n % 7]) + f" {n}",) for n in range(25))),))
DEV = Given("dev", texts=(("d", ("en", "de"), tuple((f"one {n}", f"eins {n}") for n in range(9))),))
MODEL, OTHER = (Given(name, directions=("en-de", "de-en")) for name in ("model", "other"))
LM = Given("lm", directions=("de-de",))
TIME_AND_MACHINE = ("record.json", "manifest.json", "environment.json")
STAGES = (
    *(MONO, DEV, MODEL, OTHER, LM),
    CycleTranslate("cycle", "model", "lm", ("mono",), ("de-en",), tau=0.5, decode=GREEDY),
    Synthesize("round", "model", ("mono", "dev"), ("de-en",), GREEDY, GREEDY),
    GreedyEnsemble("best", ("model", "other"), ("dev",), GREEDY),
    Translate("test", "best", ("dev",), decode=GREEDY),
)


class Service:
    """What the processes of a run have of JAX's coordination service."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values, key
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: as the service says it")
            return self._values[key]

    def key_value_dir_get(self, folder):
        with self._changed:
            return [(key, value) for key, value in self._values.items() if key.startswith(f"{folder}/")]


class Visits(threading.local):
    """Counts for each thread."""

    def __init__(self):
        self._counts = collections.Counter()

    def __getitem__(self, key):
        return self._counts[key]

    def __setitem__(self, key, value):
        self._counts[key] = value


@pytest.fixture
def processes(monkeypatch):
    """Runs a function of the number of a process in each of so many; what it returned or raised."""

    def run(count, work):
        this, service = threading.local(), Service()

        def begin(index):
            this.index = index
            try:
                return work(index)
            except Exception as error:
                return error

        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: count)
            patch.setattr(jax, "process_index", lambda: this.index)
            patch.setattr(together, "coordination_client", lambda: service)
            patch.setattr(together, "_visits", Visits())
            patch.setattr(together, "_LOOK_MILLISECONDS", 50)
            with ThreadPoolExecutor(count) as threads:
                return list(threads.map(begin, range(count)))

    return run


def contents(folder):
    """What a pipeline has made, but for time and machine."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in TIME_AND_MACHINE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def stand_ins() -> dict[str, StandIn]:
    words = lambda source, target, line: f"{line} {target}"
    return {
        "model": StandIn(words, name="model"),
        "other": StandIn(lambda *given: words(*given).upper(), name="other"),
        "lm": StandIn(log_prob=lambda line: -float(len(line))),
    }


@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_number_of_processes_makes_what_one_makes(tmp_path, processes, monkeypatch, count):
    """Byte for byte; every line is decoded once, by one of them, and none of them has all the work."""
    monkeypatch.setattr(decoding, "CHUNK_LINES", 3)
    alone = stand_ins()
    expected = execute(Pipeline(STAGES), tmp_path / "one", opener=opener(**alone))
    models = [stand_ins() for _ in range(count)]
    made = processes(count, lambda n: execute(Pipeline(STAGES), tmp_path / "all", opener=opener(**models[n])))
    assert made == [expected] + [{}] * (count - 1)
    assert contents(tmp_path / "all") == contents(tmp_path / "one")
    for name, model in alone.items():
        calls = [call for one in models for call in one[name].calls]
        assert sorted(calls) == sorted(model.calls)
        lines = [sum(lines for _, _, lines in one[name].calls) for one in models]
        assert 0 < max(lines) < sum(lines)
    record = json.loads((tmp_path / "all/round/record.json").read_text())
    assert record["decoding"]["translated"]["processes"] == count


def test_a_failure_of_the_first_is_everyones(tmp_path, processes):
    """A stage that refuses its input while the others wait to be asked for something."""
    stages = (*STAGES[:5], Translate("test", "model", ("mono",)))
    start = time.monotonic()
    found = processes(3, lambda n: execute(Pipeline(stages), tmp_path, opener=opener(**stand_ins())))
    assert all(isinstance(error, UserError) for error in found)
    assert str(found[0]) == "stage 'test': there is no pair for en-de, de-en"
    assert {str(error) for error in found[1:]} == {f"process 0: {found[0]}"}
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_in_the_midst_of_a_decoding_is_everyones(tmp_path, processes, monkeypatch, failing):
    """Whoever it is, the others do not wait for its part for ever; and the next run goes on."""
    monkeypatch.setattr(decoding, "CHUNK_LINES", 3)

    def fails(source, target, line):
        raise MemoryError("no room")

    models = [stand_ins() for _ in range(3)]
    models[failing]["model"] = StandIn(fails, name="model")
    found = processes(3, lambda n: execute(Pipeline(STAGES), tmp_path / "all", opener=opener(**models[n])))
    assert isinstance(found.pop(failing), MemoryError)
    assert {str(error) for error in found} == {f"process {failing}: no room"}

    execute(Pipeline(STAGES), tmp_path / "one", opener=opener(**stand_ins()))
    again = [stand_ins() for _ in range(2)]
    processes(2, lambda n: execute(Pipeline(STAGES), tmp_path / "all", opener=opener(**again[n])))
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


@dataclass(frozen=True)
class Gathers:
    """A stage in which all processes do the same, and which is interrupted in all where it is told so."""

    name: str
    seen: tuple[list[int], ...]
    interrupted: bool = False

    def inputs(self):
        return ()

    def sources(self):
        return ()

    def make(self, workspace) -> Artefact:
        self.take_part(workspace)
        return Artefact("scores", scores={"processes": jax.process_count()})

    def take_part(self, workspace) -> None:
        self.seen[0].append(jax.process_index())
        together.barrier("all are here")
        if self.interrupted:
            raise Interrupted(self.name)


def test_a_shared_stage_is_made_by_all(tmp_path, processes):
    stage = Gathers("all", ([],))
    assert isinstance(stage, SharedStage)
    assert isinstance(MONO, Stage)
    assert not isinstance(MONO, SharedStage)
    processes(3, lambda n: execute(Pipeline((MONO, stage)), tmp_path))
    assert sorted(stage.seen[0]) == [0, 1, 2]
    assert json.loads((tmp_path / "all/artefact.json").read_text())["artefact"]["scores"] == {"processes": 3}
    # What has finished is not asked for again.
    processes(3, lambda n: execute(Pipeline((MONO, stage)), tmp_path))
    assert len(stage.seen[0]) == 3


def test_all_are_interrupted_together(tmp_path, processes):
    found = processes(2, lambda n: execute(Pipeline((Gathers("all", ([],), interrupted=True),)), tmp_path))
    assert [type(error) for error in found] == [Interrupted] * 2


# How fast it went


def test_counts_and_speed_of_all_that_was_decoded_are_in_the_record_and_not_in_the_artefact(tmp_path, caplog):
    caplog.set_level("INFO")
    execute(Pipeline(STAGES), tmp_path, opener=opener(**stand_ins()))
    record = json.loads((tmp_path / "cycle/record.json").read_text())
    done = record["decoding"]
    assert set(done) == {"translated", "scored", "files"}
    # There and, for the worst half, back; all are scored, and the half again.
    assert (done["translated"]["lines"], done["scored"]["lines"]) == (25 + 12, 25 + 12)
    assert done["translated"]["target_tokens"] == 25 + 12
    for one in (done["translated"], *done["files"].values()):
        assert one["sentences_per_second"] == pytest.approx(one["lines"] / one["seconds"])
        assert one["target_tokens_per_second"] == pytest.approx(one["target_tokens"] / one["seconds"])
    files = {name: report["task"] for name, report in done["files"].items()}
    assert files["cycle/mono.m.cycle.en-de.en"] == "translated"
    assert sorted(files.values()) == ["scored", "scored", "translated", "translated"]
    assert "stage cycle: scored 37 lines (" in caplog.text
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["cycle"]["decoding"] == done
    assert "decoding" not in json.loads((tmp_path / "mono/record.json").read_text())
    assert "second" not in (tmp_path / "cycle/artefact.json").read_text()


def test_what_killed_processes_have_done_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_LINES", 5)

    class Killed(BaseException):
        pass

    def kills(source, target, line):
        if line.endswith(" 22"):
            raise Killed
        return f"{line} {target}"

    with pytest.raises(Killed):
        execute(Pipeline(STAGES), tmp_path, opener=opener(**stand_ins() | {"model": StandIn(kills, name="model")}))
    execute(Pipeline(STAGES), tmp_path, opener=opener(**stand_ins()))
    files = json.loads((tmp_path / "cycle/record.json").read_text())["decoding"]["files"]
    there = files["cycle/mono.m.cycle.en-de.en"]
    assert (there["lines"], there["resumed_lines"]) == (5, 20)
    assert not (tmp_path / "cycle/work").exists()
