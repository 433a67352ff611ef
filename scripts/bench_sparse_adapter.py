#!/usr/bin/env python3
"""SparseAdapter on classification sets: full fine-tuning, dense adapters, sparse ones by score and sparsity.

example: scripts/bench_sparse_adapter.py --encoder=runs/minilm --tasks=TREC,SUBJ --out=table.json

The encoder is a run folder that `t5x_ext convert` wrote. Each arm is trained on the same few examples with the same
seeds; what it reaches on the test examples is written to --out after every run, and the table printed at the end. Rerun
the same command to resume. A program is compiled once for a task and a kind of arm; without dropout it does not depend
on the seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from t5x_ext import compress
from t5x_ext.checkpoints import CheckpointStore, RunFolder
from t5x_ext.contracts import Batch
from t5x_ext.corpora import LabelledText
from t5x_ext.data import RowConfig
from t5x_ext.models import LayerParts, config_from_json, houlsby
from t5x_ext.optim import adam, linear_decay, static_mask
from t5x_ext.parallel import global_batch, make_mesh
from t5x_ext.tasks import Classification
from t5x_ext.train import Clock, InitFrom, Loop, Program, PruneAtInit, Run, Session, make_program, train
from t5x_ext.train.restore import first_loop

_ENCODER = flags.DEFINE_string("encoder", None, "run folder of a pretrained encoder", required=True)
_DATA = flags.DEFINE_string("data", "../shared/data", "folder with text_tasks/ and glue/")
_TASKS = flags.DEFINE_list("tasks", ["TREC", "SUBJ", "SST2", "CoLA", "RTE"], "which sets")
_ARMS_MATCHING = flags.DEFINE_string(
    "arms", "", "regular expression on names of arms: which are measured; all by default"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each arm")
_STEPS = flags.DEFINE_integer("steps", 40, "updates of a run")
_TRAIN = flags.DEFINE_integer("train_examples", 1000, "training examples of a run")
_TEST = flags.DEFINE_integer("test_examples", 400, "test examples")
_BOTTLENECK = flags.DEFINE_integer("bottleneck", 16, "width of the dense adapter")
_OUT = flags.DEFINE_string("out", None, "file for the numbers as JSON", required=True)


class Arm(NamedTuple):
    """One way of training."""

    name: str
    kind: str  # "full", "adapter" or "wide", an adapter of four times the width
    score: compress.Score | None = None
    sparsity: float | Fraction = 0


WIDER = 4

ARMS = (
    Arm("full fine-tuning", "full"),
    Arm("dense adapters", "adapter"),
    Arm("SNIP 40 %", "adapter", compress.snip, 0.4),
    Arm("SNIP 80 %", "adapter", compress.snip, 0.8),
    Arm("random 80 %", "adapter", compress.random, 0.8),
    Arm("magnitude 80 %", "adapter", compress.magnitude, 0.8),
    Arm("GraSP 80 %", "adapter", compress.grasp, 0.8),
    Arm("SynFlow 80 %", "adapter", compress.synflow, 0.8),
    Arm("Large-Sparse x4, SNIP 75 %", "wide", compress.snip, Fraction(3, 4)),
)


def main(arguments: Sequence[str]) -> None:
    """Measures what --out does not hold yet."""
    del arguments
    out = Path(_OUT.value)
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {(row["task"], row["arm"], row["seed"]) for row in rows}
    for name in _TASKS.value:
        steps: dict[str, Any] = {}
        for seed, kind in itertools.product(range(_SEEDS.value), dict.fromkeys(arm.kind for arm in ARMS)):
            wanted = [arm for arm in ARMS if arm.kind == kind and re.search(_ARMS_MATCHING.value, arm.name)]
            for row in _measure(name, kind, seed, [arm for arm in wanted if (name, arm.name, seed) not in done], steps):
                rows.append(row)
                out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds, a line an arm."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| arm | trained | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [_cell([row for row in mine if row["task"] == task]) for task in tasks]
        lines.append(f"| {arm} | {mine[0]['trained']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    metric = "matthews" if rows[0]["task"] == "CoLA" else "accuracy"
    values = [100 * row[metric] for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _task(name: str, kind: str) -> Classification:
    def text(split: str, examples: int) -> LabelledText:
        if name == "RTE":
            return LabelledText(f"{_DATA.value}/glue/RTE/{split}.tsv", ("sentence1", "sentence2"), examples=examples)
        return LabelledText(f"{_DATA.value}/text_tasks/{name}/{split}.tsv", examples=examples)

    record = RunFolder(_ENCODER.value).read_record()
    config: Any = config_from_json(record["model"])
    config = dataclasses.replace(config, dropout=0.0, attention_dropout=0.0, scan_layers=True)
    width = _BOTTLENECK.value
    parts = {"full": LayerParts(), "adapter": houlsby(width), "wide": houlsby(compress.large_sparse(width, WIDER)[0])}
    shape = RowConfig(rows=4, length=128, examples_per_row=2) if name == "RTE" else RowConfig(4, 64, 8)
    return Classification(
        config,
        train=text("train", _TRAIN.value),
        test=text("test", _TEST.value),
        tokenizer=_ENCODER.value,
        batch=shape,
        parts=parts[kind],
        pooling="mean",
    )


def _run(name: str, kind: str) -> Run:
    peak = 3e-4 if kind == "full" else 5e-3
    optimizer = adam(linear_decay(peak, max(1, _STEPS.value // 10), _STEPS.value))
    only = ("^(?!head/)",) if kind == "full" else ()
    return Run(
        task=_task(name, kind),
        optimizer=optimizer if kind == "full" else static_mask(optimizer),
        steps=_STEPS.value,
        trainable=() if kind == "full" else ("adapter", "^head/"),
        init_from=InitFrom(_ENCODER.value, only=only),
    )


def _measure(name: str, kind: str, seed: int, arms: Sequence[Arm], steps: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of some arms of one kind; `steps` keeps compiled updates by kind."""
    if not arms:
        return
    run = dataclasses.replace(_run(name, kind), seed=seed)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = RunFolder(folder_name)
        prepared = run.task.prepare(folder, None, seed)
        program = make_program(run, prepared.sizes, make_mesh(run.mesh))
        if kind not in steps:
            steps[kind] = program.compile()
        for arm in arms:
            started = time.process_time()
            loop = _trained(program, prepared, folder, steps[kind], arm)
            scores = prepared.test(program, program.whole(loop.state.params, loop.frozen))
            pruned = loop.memory.hooks.get("prune_at_init", {"entries": 0, "kept": 0})
            trained = sum(leaf.size for leaf in jax.tree.leaves(loop.state.params))
            row = {
                "task": name,
                "arm": arm.name,
                "seed": seed,
                "trained": trained - pruned["entries"] + pruned["kept"],
                "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state.params)),
                "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state.optimizer_state)),
                "cpu_seconds": round(time.process_time() - started, 1),
                **scores,
            }
            print(json.dumps(row), flush=True)
            yield row


def _trained(program: Program, prepared: Any, folder: RunFolder, step: Any, arm: Arm) -> Loop:
    with tempfile.TemporaryDirectory() as checkpoints, CheckpointStore(Path(checkpoints) / "checkpoints") as store:
        loop = first_loop(program, prepared, folder, store, program.run.init_from, {}, {}, Clock())
        if arm.score is not None:
            hook = PruneAtInit(arm.score, sparsity=arm.sparsity, examples=160)
            hook.begin(Session(program, prepared, store, loop))
        return train(loop, step, _batches(program, prepared), steps=program.run.steps, hooks=())


def _batches(program: Program, prepared: Any) -> Iterator[Batch]:
    sharded, index = set(program.definition.batch), 0
    while True:
        yield global_batch(program.mesh, prepared.batches.read(index, 0, prepared.batches.rows), sharded)
        index += 1


if __name__ == "__main__":
    app.run(main)
