"""A profile of a run that goes on: asked for by a file or by a signal."""

from __future__ import annotations

import os
import signal

import pytest

from t5x_ext.train.profiling import Profile


class Ask:
    """Asks for a profile after an update."""

    def __init__(self, step, how):
        self._step, self._how = step, how

    def after_step(self, loop):
        if loop.step == self._step:
            self._how()

    def at_end(self, loop):
        pass


@pytest.mark.usefixtures("compile_once")
def test_a_file_in_the_run_folder_asks_for_a_profile(place, tmp_path):
    (tmp_path / "profile").touch()
    place.run(tmp_path)
    assert not (tmp_path / "profile").exists()
    (folder,) = (tmp_path / "profiles").iterdir()
    assert folder.name == "step_1"
    assert any(path.stat().st_size > 1000 for path in folder.rglob("*.xplane.pb"))


def test_a_signal_asks_for_a_profile_of_so_many_updates(new_loop, run_loop, report, tmp_path, monkeypatch):
    traces = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: traces.append([folder]))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: traces[-1].append("stopped"))
    before = signal.getsignal(signal.SIGUSR2)
    seen = []
    with Profile(tmp_path, updates=2) as profile:
        ask = [Ask(step, lambda: os.kill(os.getpid(), signal.SIGUSR2)) for step in (2, 7)]
        look = Ask(5, lambda: seen.append(list(traces[0])))
        run_loop(new_loop(), [report()] * 8, *ask, profile, look)
    assert traces == [
        [str(tmp_path / "profiles" / "step_2"), "stopped"],
        [str(tmp_path / "profiles" / "step_7"), "stopped"],
    ]
    assert seen == [[str(tmp_path / "profiles" / "step_2"), "stopped"]]
    assert signal.getsignal(signal.SIGUSR2) == before
