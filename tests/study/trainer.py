"""A trainer that stands in for `t5x_ext`: it counts to a number, saves when it is told to stop, and can fail.

train --seed=N --steps=N --run_dir=DIR --gin.NAME=VALUE...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(verb: str, *arguments: str) -> int:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    settings = {name.removeprefix("gin."): value for name, value in flags.items() if name.startswith("gin.")}
    folder = Path(flags["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()} {os.nice(0)} {len(os.sched_getaffinity(0))}\n")
    if "fail" in settings:
        print(f"some words before\nt5x_ext {verb}: {settings['fail']}", file=sys.stderr)
        return 2
    if "crash" in settings:
        raise ValueError(settings["crash"])
    if (folder / "busy").exists():
        sys.exit(f"two processes in {folder}")
    (folder / "busy").touch()
    count(folder, flags, settings, told)
    (folder / "busy").unlink()
    return 130 if told else 0


def count(folder: Path, flags: dict[str, str], settings: dict[str, str], told: list[int]) -> None:
    saved = folder / "saved"
    step, steps, loss = int(saved.read_text()) if saved.exists() else 0, int(flags["steps"]), 0.0
    with (folder / "metrics.jsonl").open("a") as metrics:
        while step < steps and not told:
            step += 1
            loss = float(settings.get("level", 1)) + int(flags["seed"]) / 8 + 4 / step
            line = {"step": step, "loss": loss, "target_tokens": 10.0, "seconds": 1.0, "time/step": 0.5}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            time.sleep(float(settings.get("pause", 0)))
        if not told:
            metrics.write(json.dumps({"step": step, "valid/loss": loss}) + "\n")
    if told:
        time.sleep(float(settings.get("saving", 0)))
    else:
        (folder / "results.json").write_text(json.dumps({"steps": step, "directions": {"en-de": {"bleu": 10 * loss}}}))
    saved.write_text(str(step))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
