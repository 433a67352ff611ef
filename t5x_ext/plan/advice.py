"""Settings of a run that would make its update fit, each with the memory that it saves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from t5x_ext.parallel.mesh import batch_devices
from t5x_ext.plan.estimate import Temporaries, accumulated_bytes, estimate_temporaries
from t5x_ext.plan.report import GIB, CheckReport
from t5x_ext.tasks import text_task
from t5x_ext.train.program import Program


class _Knob(NamedTuple):
    saving: float  # bytes on one device
    text: str


def training_advice(program: Program, report: CheckReport, estimate: Temporaries | None) -> tuple[str, ...]:
    """Settings that need less memory, the most useful first.

    Savings are exact for parameters and optimizer state. For the rest they are the share, by formula, of the compiler's
    figure. A setting that is enough alone says so.
    """
    estimate = scaled(estimate or estimate_temporaries(program), report.memory.temporaries)
    excess = report.memory.total - report.hbm_bytes
    knobs = sorted(_knobs(program, report, estimate, excess), reverse=True)
    useful = [knob for knob in knobs if knob.saving > 0.01 * report.hbm_bytes]
    if not useful:
        return (f"more devices, or devices with more memory: {report.memory.total / GIB:.1f} GiB are needed on each",)
    lines = [
        f"{knob.text}: saves some {knob.saving / GIB:.1f} GiB{', enough' if knob.saving >= excess else ''}"
        for knob in useful
    ]
    if useful[0].saving < excess:
        lines.append("none of these is enough alone: combine several; --search finds a combination if there is one")
    return tuple(lines)


def scaled(estimate: Temporaries, temporaries: int) -> Temporaries:
    """The estimate scaled to the compiler's figure for temporaries; gradients are not scaled, their size is known."""
    rest = estimate.total - estimate.gradients
    share = max(0.0, temporaries - estimate.gradients) / max(1, rest)
    parts = {name: int(share * size) for name, size in estimate._asdict().items()}
    return Temporaries(**{**parts, "gradients": min(estimate.gradients, temporaries)})


def _knobs(program: Program, report: CheckReport, estimate: Temporaries, excess: float) -> Iterator[_Knob]:
    run, config = program.run, program.model.config
    yield from _state_knobs(program, report, estimate, excess)
    activations = estimate.residuals + estimate.recomputed
    # With two microbatches there is also a sum of gradients.
    added = accumulated_bytes(program) if run.num_microbatches == 1 else 0
    more = _microbatches(program, activations, excess + added)
    saving = activations * (1 - run.num_microbatches / more) - added
    if saving > 0:
        yield _Knob(saving, f"Run.num_microbatches = {more} (now {run.num_microbatches})")
    else:
        rows = text_task(run).data.batch.rows
        yield _Knob(activations / 2, f"BatchConfig.rows = {max(1, rows // 2)} (now {rows})")
    if config.remat != "full":
        model = program.model.clone(config=dataclasses.replace(config, remat="full"))
        full = program._replace(definition=program.definition._replace(model=model))
        now, less = (e.residuals + e.recomputed for e in (estimate_temporaries(program), estimate_temporaries(full)))
        saving = activations * (1 - less / now)
        yield _Knob(saving, f"{type(text_task(run).model).__name__}.remat = 'full' (now '{config.remat}')")
    chunk = getattr(program.objective, "chunk_tokens", None)
    if chunk is not None:
        yield _Knob(
            estimate.scores / 2, f"{type(program.objective).__name__}.chunk_tokens = {chunk // 2} (now {chunk})"
        )


def _state_knobs(program: Program, report: CheckReport, estimate: Temporaries, excess: float) -> Iterator[_Knob]:
    """What makes parameters and the arrays that are sharded like them smaller on a device."""
    memory, mesh, run = report.memory, program.mesh, program.run
    state = memory.params + memory.optimizer + memory.ema
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    devices = shards * mesh.shape["data"]
    now = shards if run.axis_rules.embed == "fsdp" else 1
    # Gradients are sharded like the parameters.
    sharded = state + estimate.gradients
    if now < devices:
        text = f"parameters and optimizer state sharded over all {devices} devices of a slice (parallel/fsdp.gin)"
        yield _Knob(sharded * (1 - now / devices), text)
    elif state > report.hbm_bytes / 4:
        more = devices * 2 ** max(1, math.ceil(math.log2(sharded / max(sharded - excess, 0.1 * sharded))))
        yield _Knob(sharded * (1 - devices / more), f"a topology of {more} devices (now {devices})")
    if run.ema_decay is not None:
        yield _Knob(memory.ema, f"Run.ema_decay = None (now {run.ema_decay})")


def _microbatches(program: Program, activations: float, excess: float) -> int:
    """The fewest microbatches that reduce activations by `excess`, or the most that the rows allow."""
    count = program.run.num_microbatches
    rows = text_task(program.run).data.batch.rows // batch_devices(program.mesh)
    while rows % (2 * count) == 0 and activations * (1 - program.run.num_microbatches / count) < excess:
        count *= 2
    return count
