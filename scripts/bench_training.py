#!/usr/bin/env python3
"""Measures training speed on real batches, in turn with a peer, so that a drifting machine favours neither.

  taskset -c 0,1 scripts/bench_training.py --gin_file=runs/multi30k_en_de.gin --rounds=3 \
      --peer_command='taskset -c 0,1 ./train_the_peer.sh'

Each round trains a fresh run for a while through the ordinary command, then lets the peer train; the figure is the
median of the round's log lines, the first left out (it holds the start-up). Target tokens are real ones: end of
sentence counted, padding not. The peer's command prints `target_tokens_per_second=NUMBER`; its last such line counts.
Pin both to the same cores from outside, as above.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

_GIN_FILE = flags.DEFINE_string("gin_file", "runs/multi30k_en_de.gin", "the run to measure")
_BINDINGS = flags.DEFINE_multi_string("binding", [], "a binding NAME=VALUE over those of the file")
_CACHE_DIR = flags.DEFINE_string("cache_dir", "runs/bench_cache", "where token caches are kept between rounds")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each side trains", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 60, "updates of a round", lower_bound=20)
_PEER = flags.DEFINE_string("peer_command", None, "shell command that trains the peer")
_JSON_OUT = flags.DEFINE_string("json_out", None, "file for the figures as JSON")

_LOG_EVERY = 10


def main(argv: Sequence[str]) -> None:
    """Runs the rounds and prints the figures."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    ours, peers = [], []
    for number in range(1, _ROUNDS.value + 1):
        ours.append(_train())
        print(f"round {number}: {ours[-1]:,.0f} target tokens/s", flush=True)
        if _PEER.value:
            peers.append(_train_peer(_PEER.value))
            print(f"round {number}: peer {peers[-1]:,.0f}, ratio {ours[-1] / peers[-1]:.2f}", flush=True)
    figures = {"cores": len(os.sched_getaffinity(0)), "target_tokens_per_second": ours, "peer": peers}
    print(f"median of {len(ours)}: {statistics.median(ours):,.0f} target tokens/s on {figures['cores']} cores")
    if peers:
        figures["ratios"] = [own / peer for own, peer in zip(ours, peers)]
        print(f"median ratio to the peer: {statistics.median(figures['ratios']):.2f}")
    if _JSON_OUT.value:
        Path(_JSON_OUT.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _train() -> float:
    with tempfile.TemporaryDirectory() as folder:
        # No held-out text: only training is measured.
        silent = [f"Run.log_every={_LOG_EVERY}", "DataConfig.valid=()", "DataConfig.test=()"]
        flags_of_run = [f"--gin.{binding}" for binding in [*_BINDINGS.value, *silent]]
        subprocess.run(
            [
                *(sys.executable, "-m", "t5x_ext", "train", f"--gin_file={_GIN_FILE.value}"),
                *(f"--run_dir={folder}/run", f"--cache_dir={_CACHE_DIR.value}", f"--steps={_UPDATES.value}"),
                *flags_of_run,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        speeds = [line["target_tokens_per_second"] for line in lines if "target_tokens_per_second" in line]
    return statistics.median(speeds[1:])


def _train_peer(command: str) -> float:
    output = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"target_tokens_per_second=([\d.]+)", output)
    if not found:
        raise app.UsageError(f"the peer's output has no target_tokens_per_second=NUMBER: {output[-300:]!r}")
    return float(found[-1])


if __name__ == "__main__":
    app.run(main)
