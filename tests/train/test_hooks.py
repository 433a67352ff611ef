"""Hooks, each with a loop whose losses are made up: what is logged, measured, kept, and why a run ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import struct
import threading

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from t5x_ext.checkpoints import CheckpointStore, Retention
from t5x_ext.contracts import UserError
from t5x_ext.train import hooks
from t5x_ext.train.log import JsonLines, Log, cut_log
from t5x_ext.train.memory import Memory
from t5x_ext.train.preemption import SIGNALS, StopOnSignal
from t5x_ext.train.recovery import BadUpdates, Diverged


def log(path, *, every=1, steps=100, start=0, tensorboard=None, **options):
    return Log(path, tensorboard, every=every, steps=steps, start=start, **options)


def lines(path):
    """The lines of a metrics file, read as strictly as any other language reads JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_does_not_take_are_written_later_and_none_is_cut(tmp_path, caplog):
    """A limit on the size of files writes a part of the second line and then fails, as a full disk does."""
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [{"step": step, "text": "x" * 50} for step in (1, 2, 3, 4)]
    file = JsonLines(path)
    file.append(records[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        file.append(records[1])
        file.append(records[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines(path) == records[:1]
    assert caplog.text.count("cannot be written") == 1
    file.append(records[3])
    assert lines(path) == records


class Measure:
    """Gives held-out values at some updates, as an evaluation would."""

    def __init__(self, values):
        self._values = values

    def after_step(self, loop):
        loop.evaluation = dict(self._values.get(loop.step, {}))

    def at_end(self, loop):
        pass


def test_a_line_gives_means_over_the_updates_since_the_line_before(new_loop, run_loop, report, tmp_path):
    path = tmp_path / "metrics.jsonl"
    reports = [
        report(loss=10, labels=4, hits=1, norm=1),
        report(loss=2, labels=2, hits=2, norm=3),
        report(loss=9, labels=1, hits=0, norm=8),
        report(loss=6, labels=2, hits=1, norm=2),
        report(loss=5, labels=5, hits=3, norm=4),
    ]
    loop = run_loop(new_loop(), reports, log(path, every=2))
    first, second, last = lines(path)
    # Each update takes 2 s, after waiting 0.5 s. A line is written when the update after it is under way: the first
    # covers three of them, the second two, and what the last line covers took no time of its own.
    assert first == {
        "step": 2, "loss": 12 / 6, "accuracy": 3 / 6, "target_tokens": 6, "gradient_norm": 2,
        "target_tokens_per_second": 6 / 7.5, "seconds": 7.5, "time/data": 0.2, "time/step": 0.8,
    }  # fmt: skip
    assert second == {
        "step": 4, "loss": 15 / 3, "accuracy": 1 / 3, "target_tokens": 3, "gradient_norm": 5,
        "target_tokens_per_second": 3 / 5, "seconds": 5, "time/data": 0.2, "time/step": 0.8,
    }  # fmt: skip
    assert [last[name] for name in ("step", "loss", "accuracy", "gradient_norm")] == [5, 1, 3 / 5, 4]
    assert loop.memory.target_tokens == 14


def test_a_line_tells_where_the_time_went(new_loop, run_loop, report, seconds, tmp_path):
    """Evaluation and saving slow no speed down: 70 operations in 2 x 2.5 s, of 20 possible a second."""

    class Work(Measure):
        def after_step(self, loop):
            if loop.step == 1:
                seconds.now += 4.0  # somewhere
                for name, spent in (("evaluate", 5.0), ("save", 1.0)):
                    with loop.clock.section(name):
                        seconds.now += spent

    path = tmp_path / "metrics.jsonl"
    flops = {0: 30.0, 1: 40.0}
    loop = run_loop(
        new_loop(), [report()] * 2, Work({}), log(path, every=2, batch_flops=flops.__getitem__, peak_flops=20.0)
    )
    (line,) = lines(path)
    times = {"data": 1, "step": 4, "evaluate": 5, "save": 1, "other": 4}
    assert line["seconds"] == 15
    assert {name: line[f"time/{name}"] for name in times} == {name: spent / 15 for name, spent in times.items()}
    assert line["target_tokens_per_second"] == 2 / 5
    assert line["model_flops_per_second"] == 70 / 5
    assert line["mfu"] == 70 / 5 / 20
    assert loop.memory.model_flops == 70


def test_measurements_have_a_line_of_their_own(new_loop, run_loop, report, tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_loop(new_loop(), [report()] * 4, Measure({2: {"valid/loss": 3.5, "valid/ter": math.inf}}), log(path, every=4))
    assert lines(path)[0] == {"step": 2, "valid/loss": 3.5, "valid/ter": None}
    assert [line["step"] for line in lines(path)] == [2, 4]


@pytest.mark.parametrize("cut", ["", '{"step": 4, "lo', '{"step": 3, "loss": 3.0}'])
def test_after_a_crash_each_update_stands_in_the_file_once(new_loop, run_loop, report, tmp_path, cut):
    """The run had written up to update 5 (or half a line), its newest checkpoint is of update 3."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": float(step), "seconds": 2.0}) for step in range(1, 6 if not cut else 3)]
    path.write_text("".join(f"{line}\n" for line in whole) + cut)
    assert cut_log(path, 3) == (4.0 if not cut else 0.0)
    run_loop(new_loop(step=3), [report(loss=10 * step) for step in range(1, 7)], log(path, start=3))
    steps = [1, 2, 3] if "3.0}" in cut or not cut else [1, 2]
    assert [(line["step"], line["loss"]) for line in lines(path)] == [
        *((step, step) for step in steps),
        (4, 40),
        (5, 50),
        (6, 60),
    ]


def test_updates_left_out_are_counted_and_in_no_mean(new_loop, run_loop, report, tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = report(loss=math.nan, labels=3, norm=math.inf, finite=False)
    reports = [report(loss=4, labels=2), bad, bad, report(loss=6, labels=2), bad, bad, report(loss=1, labels=1)]
    run_loop(new_loop(), reports, bad_updates(limit=3), log(path, every=2))
    read = lines(path)
    assert [line["step"] for line in read] == [2, 4, 6, 7]
    assert [line.get("skipped_updates") for line in read] == [1, 2, 4, 4]
    assert [line.get("loss") for line in read] == [2, 3, None, 1]
    assert [line.get("gradient_norm") for line in read] == [1, 1, None, 1]
    assert [line.get("target_tokens") for line in read] == [2, 2, None, 1]


def bad_updates(path=None, limit=3):
    """Counts; the examples of batch i are `pair i`, its number is 100 + i."""
    return Observing(BadUpdates(path, lambda index: 100 + index, lambda index: [f"pair {index}"], limit))


class Observing:
    """An observer as a hook."""

    def __init__(self, observer):
        self.observe = observer.observe

    def after_step(self, loop):
        pass

    def at_end(self, loop):
        pass


def test_too_many_updates_left_out_in_a_row_are_reported_with_their_examples(new_loop, run_loop, report, tmp_path):
    bad, path = report(finite=False), tmp_path / "skipped_examples.jsonl"
    reports = [report(), bad, report(), bad, bad, bad, report()]
    loop = new_loop()
    with pytest.raises(Diverged, match="updates 4 to 6 all had a loss or gradient that is not finite") as error:
        run_loop(loop, reports, bad_updates(path))
    assert (error.value.first, error.value.last) == (4, 6)
    assert lines(path) == [
        {"step": step, "batch": 99 + step, "examples": [f"pair {step - 1}"]} for step in (2, 4, 5, 6)
    ]
    assert loop.memory.skipped_updates == 4
    # A restart in the middle of the stretch goes on counting, and records no batch twice.
    with path.open("a") as file:
        file.write('{"step": 6, "ba')
    loop = new_loop(step=5, memory=Memory(skipped_in_row=2))
    with pytest.raises(Diverged, match="updates 4 to 6"):
        run_loop(loop, reports, bad_updates(path))
    assert len(lines(path)) == 4


def tensorboard_events(path):
    """The events of a file as TensorBoard reads them: length, checksum, message, checksum; again and again."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        yield Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length


def tensorboard_points(folder):
    """(tag, step) to value over all files of a folder; a start of step s takes the place of what was s or later."""
    points = {}
    for path in sorted(folder.iterdir()):
        for event in tensorboard_events(path):
            if event.session_log.status == SessionLog.START:
                points = {key: value for key, value in points.items() if key[1] < event.step}
            points |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return points


def test_tensorboard_shows_what_the_lines_say_also_after_a_restart(new_loop, run_loop, report, tmp_path):
    path, folder = tmp_path / "metrics.jsonl", epath.Path(tmp_path / "tensorboard")
    measure = Measure({2: {"valid/loss": 7.0}, 3: {"valid/loss": math.nan}})
    run_loop(new_loop(), [report(loss=n) for n in (1, 2, 3, 4)], measure, log(path, tensorboard=folder))
    cut_log(path, 2)
    run_loop(new_loop(step=2), [report(loss=10 * n) for n in (1, 2, 3)], log(path, start=2, tensorboard=folder))
    expected = {(name, line["step"]): value for line in lines(path) for name, value in line.items() if name != "step"}
    points = tensorboard_points(folder)
    assert points.keys() == expected.keys()
    for key, value in expected.items():
        assert points[key] == pytest.approx(value)
    assert [points["loss", step] for step in (1, 2, 3)] == [1, 2, 30]
    assert points["valid/loss", 2] == 7


def test_a_full_disk_ends_the_file_of_tensorboard_and_nothing_else(new_loop, run_loop, report, tmp_path, caplog):
    """Many more lines than a queue would hold."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        written = log(tmp_path / "metrics.jsonl", tensorboard=epath.Path(tmp_path / "tensorboard"))
        assert run_loop(new_loop(), [report()] * 40, written).step == 40
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("TensorBoard's file ends here") == 1


def test_early_stop_counts_over_restarts(new_loop, run_loop, report):
    """Losses 5, 4, | 4, nan, | 4.5: the third evaluation in a row without gain stops, wherever the run was cut."""
    losses = {2: 5.0, 4: 4.0, 6: 4.0, 8: math.nan, 10: 4.5, 12: 1.0}
    memory = Memory().to_json()
    for start, end in ((0, 5), (5, 9), (9, 12)):
        measure = Measure({step: {"valid/loss": loss} for step, loss in losses.items()})
        stop = hooks.EarlyStop("valid/loss", higher_is_better=False, patience=3)
        loop = run_loop(
            new_loop(step=start, memory=Memory.from_json(json.loads(json.dumps(memory)))),
            [report()] * end,
            measure,
            stop,
        )
        memory = loop.memory.to_json()
    assert loop.step == 10
    assert loop.stop == "valid/loss has not become better in 3 evaluations"
    assert not loop.interrupted


def test_early_stop_knows_which_way_is_better(new_loop, run_loop, report):
    scores = {step: {"valid/bleu": score} for step, score in enumerate([10.0, 20.0, 15.0, 30.0, 29.0, 28.0, 40.0], 1)}
    stop = hooks.EarlyStop("valid/bleu", higher_is_better=True, patience=2)
    assert run_loop(new_loop(), [report()] * 7, Measure(scores), stop).step == 6


def test_evaluations_come_at_the_interval_and_after_the_last_update(new_loop, run_loop, report, capsys):
    for every, expected in ((3, [3, 6, 7]), (0, [7]), (7, [7])):
        at = []

        class Scores:
            name, every = "scores", None

            def __call__(self, params, frozen, mutable, step, at=at):
                at.append(step)
                return {"valid/bleu": 12.345678, "valid/bleu/en-de": 1.0}

        class Look(Measure):
            def after_step(self, loop, at=at):
                assert bool(loop.evaluation) == (loop.step in at)

        run_loop(new_loop(), [report()] * 7, hooks.Evaluate([(Scores(), every)], steps=7), Look({}))
        assert at == expected
    assert "evaluation at step 7: valid/bleu 12.35\n" in capsys.readouterr().err


def test_a_run_that_is_told_to_stop_does_not_evaluate_first(new_loop, run_loop, report):
    class Preempted(Measure):
        def after_step(self, loop):
            if loop.step == 3:
                loop.stop, loop.interrupted = "SIGTERM received", True

    class Never:
        name, every = "never", None

        def __call__(self, *_):
            pytest.fail("an evaluation")

    evaluate = hooks.Evaluate([(Never(), 3)], steps=7)
    assert run_loop(new_loop(), [report()] * 7, Preempted({}), evaluate).step == 3


@pytest.fixture
def store(tmp_path):
    retention = Retention(keep_last=1, keep_best=1, metric="valid/loss", mode="min")
    with CheckpointStore(tmp_path / "checkpoints", retention) as store:
        yield store


def test_saves_keep_the_best_and_the_newest_with_everything_to_go_on(new_loop, run_loop, report, store):
    measure = Measure({2: {"valid/loss": 3.0}, 4: {"valid/loss": 1.0}, 6: {"valid/loss": 2.0}})
    loop = new_loop(memory=Memory(hooks={"note": [1]}))
    save = hooks.Save(store, every=3, data={"vocabulary": "v"}, metric="valid/loss")
    run_loop(loop, [report(labels=5)] * 7, measure, save)
    assert store.steps() == [4, 7]
    assert store.best_step() == 4
    state, extra = store.restore(loop.state, 7)
    assert state.step == 7
    assert extra["batches_consumed"] == 7
    assert extra["data"] == {"vocabulary": "v"}
    assert Memory.from_json(extra["memory"]) == loop.memory
    assert extra["memory"]["hooks"] == {"note": [1]}
    assert extra["clock"]["data"] + extra["clock"]["step"] == 7 * 2.5
    assert store.restore(loop.state, 4)[0].step == 4


def test_seconds_add_up_over_restarts(new_loop, run_loop, report, store):
    save = hooks.Save(store, every=0, data={}, metric="valid/loss")
    loop = new_loop(step=4)
    loop.clock.add({"step": 90.0, "other": 10.0})
    run_loop(loop, [report()] * 6, save)
    clock = store.restore(new_loop().state)[1]["clock"]
    assert clock["step"] == 90 + 2 * 2.0
    assert sum(clock.values()) == 100 + 2 * 2.5


def test_a_bad_stretch_does_not_push_good_checkpoints_out(new_loop, run_loop, report, store):
    reports = [report(), report(), *[report(finite=False)] * 4, report()]
    save = hooks.Save(store, every=1, data={}, metric="valid/loss")
    saved = []
    store.save = lambda step, *_: saved.append(step)
    run_loop(new_loop(), reports, bad_updates(limit=9), save)
    assert saved == [1, 2, 7]


def test_nothing_is_saved_twice(new_loop, run_loop, report):
    calls = []

    class Store:
        def save(self, step, state, extra, metrics):
            calls.append((step, metrics))

        def wait(self):
            calls.append("on disk")

    run_loop(new_loop(), [report()] * 4, Measure({4: {"x": 1.0}}), hooks.Save(Store(), every=2, data={}, metric="x"))
    assert calls == [(2, None), (4, {"x": 1.0}), "on disk"]


def test_a_metric_that_nobody_measures_is_a_mistake_and_loses_nothing(new_loop, run_loop, report, store):
    save = hooks.Save(store, every=0, data={}, metric="valid/blue")
    with pytest.raises(UserError, match="'valid/blue', which is not measured here; measured are valid/bleu, valid/l"):
        run_loop(new_loop(), [report()] * 4, Measure({2: {"valid/bleu": 1.0, "valid/loss": 2.0}}), save)
    store.wait()
    assert store.steps() == [2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_loop_after_the_running_update(new_loop, run_loop, report, number):
    class Send(Measure):
        def after_step(self, loop):
            if loop.step == 2:
                os.kill(os.getpid(), number)

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopOnSignal() as stop:
        assert signal.getsignal(number) not in before
        loop = run_loop(new_loop(), [report()] * 9, Send({}), stop)
        # It is being saved: what a scheduler sends further changes nothing, an impatient person ends it.
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (loop.step, loop.stop, loop.interrupted) == (2, f"{number.name} received", True)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_that_fails_gives_the_signals_back():
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ZeroDivisionError), StopOnSignal():
        assert signal.getsignal(signal.SIGINT) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_in_a_thread_leaves_signals_alone(new_loop, run_loop, report):
    """Python takes signals in the main thread only; a server or a notebook's worker may train all the same."""
    steps = []

    def work():
        with StopOnSignal() as stop:
            steps.append(run_loop(new_loop(), [report()] * 3, stop).step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps == [3]
