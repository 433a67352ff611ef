#!/usr/bin/env python3
"""Kills training at random moments and checks that, started again, it ends as if nothing had happened, bit for bit.

  taskset -c 0 scripts/bench_resume.py --repetitions=50 --json_out=resume.json

A repetition starts a small run on the embedded corpus, kills it with SIGKILL one to three times (while it starts, after
a random update, inside a save, between the save and its digests), starts it again each time, and lets it finish. Every
line of its metrics (losses, gradient norms, held-out losses) and the bytes of its last weights and their average are
then compared with those of a run that nobody disturbed. The last line printed is `50 of 50`; the exit code is 1 when it
is less. Pin it from outside, as above: results are equal only for equal numbers of threads.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from trial_runs import Trial

_REPETITIONS = flags.DEFINE_integer("repetitions", 50, "runs that are killed", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 3, "at most so many kills a run", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "root of the random moments")
_STEPS = flags.DEFINE_integer("steps", 60, "updates of a run", lower_bound=10)
_JSON_OUT = flags.DEFINE_string("json_out", None, "file for the counts as JSON")

MOMENTS = ("start", "update", "save", "commit")
_START_SECONDS = 4.0


def main(argv: Sequence[str]) -> None:
    """Runs the repetitions and prints how many ended as they should."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.WARNING)
    begin = time.monotonic()
    draw = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), steps=_STEPS.value)
        if trial.train("whole") != 0:
            raise SystemExit(f"the undisturbed run failed:\n{trial.said('whole')}")
        results = []
        for number in range(1, _REPETITIONS.value + 1):
            results.append(repetition(trial, f"killed{number}", draw))
            print(f"{number}: {_in_words(results[-1])}", flush=True)
        good = sum(result["difference"] is None for result in results)
    figures = {
        "identical": good,
        "repetitions": len(results),
        "kills": collections.Counter(kill["moment"] for result in results for kill in result["kills"]),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "seconds": round(time.monotonic() - begin, 1),
        "results": results,
    }
    if _JSON_OUT.value:
        Path(_JSON_OUT.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    killed = ", ".join(f"{count} in {moment}" for moment, count in figures["kills"].items())
    print(f"kills: {killed}; {figures['cores']} cores; {figures['seconds']:,.0f} s")
    print(f"{good} of {len(results)}")
    raise SystemExit(0 if good == len(results) else 1)


def repetition(trial: Trial, run_dir: str, draw: random.Random) -> dict[str, Any]:
    """One run that is killed and started again; where it differs from `whole`, if anywhere."""
    kills: list[dict[str, Any]] = []
    wanted = draw.randint(1, _KILLS.value)
    tries = 0
    while len(kills) < wanted and tries < 3 * wanted:
        tries += 1
        moment = draw.choice(MOMENTS)
        process = trial.start(run_dir)
        if trial.until(process, _happens(moment, trial, run_dir, draw)):
            time.sleep(draw.uniform(0, 0.02) if moment == "save" else 0)
            process.kill()
        code = process.wait()
        if code == -signal.SIGKILL:
            kills.append({"moment": moment, "updates": trial.updates(run_dir)})
        elif code == 0:
            # It came to its end before the moment that was waited for, and must be killed another time.
            shutil.rmtree(trial.folder / run_dir)
            kills.clear()
        else:
            break
    else:
        code = trial.train(run_dir)
    difference = trial.differences(run_dir, "whole") if code == 0 else f"exit code {code}"
    if difference is None and len(kills) < wanted:
        difference = "it could not be killed"
    said = trial.said(run_dir) if difference else ""
    shutil.rmtree(trial.folder / run_dir)
    (trial.folder / f"{run_dir}.log").unlink()
    return {"kills": kills, "difference": difference, **({"said": said[-4000:]} if said else {})}


def _happens(moment: str, trial: Trial, run_dir: str, draw: random.Random) -> Callable[[], bool]:
    """A question that becomes true at the moment for killing."""
    if moment == "start":
        end = time.monotonic() + draw.uniform(0, _START_SECONDS)
        return lambda: time.monotonic() > end
    last = trial.updates(run_dir)
    step = draw.randint(min(last + 1, trial.steps - 1), trial.steps - 1)
    if moment == "update":
        return lambda: trial.updates(run_dir) >= step
    folder = trial.checkpoints(run_dir)
    return lambda: trial.updates(run_dir) >= step - 5 and _is_saving(folder, digesting=moment == "commit")


def _is_saving(folder: Path, digesting: bool) -> bool:
    """Whether a checkpoint is being written, or, `digesting`, written but not yet whole."""
    try:
        found = list(os.scandir(folder))
        if digesting:
            return any(entry.name.isdecimal() and not os.path.exists(f"{entry.path}/digests.json") for entry in found)
        return any("tmp" in entry.name for entry in found)
    except OSError:
        return False


def _in_words(result: dict[str, Any]) -> str:
    kills = ", ".join(f"{kill['moment']} after update {kill['updates']}" for kill in result["kills"])
    return f"killed {kills}: {result['difference'] or 'identical'}"


if __name__ == "__main__":
    app.run(main)
