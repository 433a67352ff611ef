"""Compiles the program of a run for devices that are not present, and reports its memory and bounds on its speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_ext.contracts import PyTree, UserError
from t5x_ext.decode import DecodeConfig, Ensemble
from t5x_ext.decode.programs import decode_batch, without_seed
from t5x_ext.models import DecoderConfig, TransformerConfig
from t5x_ext.parallel import make_mesh
from t5x_ext.parallel.batches import batch_sharding
from t5x_ext.parallel.mesh import batch_devices
from t5x_ext.plan.advice import scaled, training_advice
from t5x_ext.plan.compiling import Compiled, Refused, compile_for, partition
from t5x_ext.plan.estimate import (
    DecodingTemporaries,
    Stored,
    Temporaries,
    device_bytes,
    estimate_decoding,
    estimate_temporaries,
    stored_bytes,
)
from t5x_ext.plan.hlo_cost import Buffer
from t5x_ext.plan.report import CheckReport, DeviceMemory
from t5x_ext.plan.roofline import mfu_bound, roofline
from t5x_ext.plan.topology import Target
from t5x_ext.tasks import text_task
from t5x_ext.tasks.text import pair_flops
from t5x_ext.train.program import Program, check_rows, make_program
from t5x_ext.train.run import Run

MEAN_LENGTH = 32
"""Target tokens of an example for which model FLOPs are counted: about a sentence of WMT, tags and end included."""


class _Work(NamedTuple):
    """A program to check, and the work that it does."""

    program: str
    lowered: jax.stages.Lowered
    stored: Stored
    rows: int
    source_tokens: int
    target_tokens: int
    assumption: str
    model_flops: float
    unknown_trips: int = 1


def check(run: Run, vocab_size: int, target: Target, mean_length: int = MEAN_LENGTH) -> CheckReport:
    """Checks one update of a run, with the same program that training compiles.

    Model FLOPs are `3 * config.flops`, for forward and backward pass, of rows filled with examples of one
    length; without packing a row has one such example, and padding. Short examples need the fewest, because attention
    grows with the square of their length.

    Args:
      run: its data is not read.
      vocab_size: size of its vocabulary.
      target: devices, from `find_target`. If there are several slices and the run's mesh has one, its axis `slices` is
        set to their number.
      mean_length: target tokens of an example; source rows are assumed to have as many examples.

    Raises:
      UserError: if mesh, rows and microbatches do not fit the devices.
    """
    run = on_slices(run, target)
    program = make_program(run, {"vocab_size": vocab_size}, _mesh(run, target))
    check_rows(run, program.mesh)
    work = _training_work(program, mean_length)
    if target.is_compiled_for:
        compiled = compile_for(work.lowered, dict(program.mesh.shape))
        estimate = None if isinstance(compiled, Compiled) else estimate_temporaries(program)
    else:
        compiled = partition(work.lowered, dict(program.mesh.shape))
        estimate = estimate_temporaries(program)
    report = dataclasses.replace(_report(work, target, program.mesh, compiled, estimate), steps=run.steps)
    return report if report.fits else dataclasses.replace(report, advice=training_advice(program, report, estimate))


def check_decoding(
    run: Run,
    vocab_size: int,
    target: Target,
    decode: DecodeConfig,
    rows: int,
    source_length: int,
    members: int = 1,
) -> CheckReport:
    """Checks the decoding of one batch: weights sharded by the run's axis rules, rows and their caches over devices.

    Every sentence is assumed to have `source_length` tokens, and its search to continue to the maximum length of
    `decode`, so that times are those of the slowest batch of this shape.

    Args:
      run: gives model, mesh and axis rules.
      vocab_size: see `check`.
      target: see `check`.
      decode: how to decode.
      rows: sentences of a batch, over all devices.
      source_length: tokens of a sentence, tag and end included.
      members: models of an ensemble, see `decode.Ensemble`.

    Raises:
      UserError: if the rows do not divide among the devices.
    """
    run = on_slices(run, target)
    program = make_program(run, {"vocab_size": vocab_size}, _mesh(run, target))
    shards = batch_devices(program.mesh)
    if rows % shards:
        raise UserError(f"{rows} rows to decode do not divide among {shards} devices; take a multiple of {shards}")
    work, lengths = _decoding_work(program, decode, rows, source_length, members)
    mesh_shape, estimate = dict(program.mesh.shape), None
    compiled: Compiled | Refused
    if target.is_compiled_for:
        compiled = compile_for(work.lowered, mesh_shape, work.unknown_trips)
    else:
        compiled = partition(work.lowered, mesh_shape, work.unknown_trips)
        estimate, step_traffic = estimate_decoding(program, rows, *lengths, members)
        traffic = float(work.unknown_trips * step_traffic)
        compiled = compiled._replace(hlo=dataclasses.replace(compiled.hlo, bytes_accessed=traffic))
    report = _report(work, target, program.mesh, compiled, estimate)
    return report if report.fits else dataclasses.replace(report, advice=tuple(_decoding_advice(rows, shards)))


def on_slices(run: Run, target: Target) -> Run:
    """The run with its mesh extended over the slices of a target, unless it sets `slices` itself."""
    if run.mesh.slices == 1 < target.num_slices:
        return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, slices=target.num_slices))
    return run


def training_flops(config: TransformerConfig | DecoderConfig, run: Run, mean_length: int) -> tuple[float, int, int]:
    """Model FLOPs of an update, and the real source and target tokens that they are for; see `check`."""
    shape = text_task(run).data.batch
    length = min(mean_length, shape.target_length)
    examples = shape.target_length / length if shape.packing else 1.0
    # Source rows are as full as target rows, so the length of their examples is in proportion to the rows'.
    source_length = length * shape.source_length / shape.target_length
    flops = 3 * shape.rows * examples * pair_flops(config)(np.array([source_length]), np.array([length]))
    return flops, round(shape.rows * examples * source_length), round(shape.rows * examples * length)


def decoding_flops(config: TransformerConfig, rows: int, hypotheses: int, source_length: int, length: int) -> float:
    """Model FLOPs of searching `rows` sentences: one encoder pass and one decoder pass for each hypothesis.

    Keys and values of cross-attention are computed once a sentence.
    """
    once = config.flops([source_length], [0])
    return rows * (once + hypotheses * (config.flops([source_length], [length]) - once))


def _mesh(run: Run, target: Target) -> Mesh:
    return make_mesh(run.mesh, target.devices)


def _training_work(program: Program, mean_length: int) -> _Work:
    flops, source_tokens, target_tokens = training_flops(program.model.config, program.run, mean_length)
    batch = text_task(program.run).data.batch
    kind = "rows packed with" if batch.packing else "one a row:"
    assumption = f"{kind} examples of {min(mean_length, batch.target_length)} target tokens"
    stored = stored_bytes(program)
    return _Work("train", program.lower(), stored, batch.rows, source_tokens, target_tokens, assumption, flops)


def _decoding_work(
    program: Program, decode: DecodeConfig, rows: int, source_length: int, members: int
) -> tuple[_Work, tuple[int, int, int]]:
    """The work, and hypotheses, source length and maximum length of a sentence."""
    # Room for one forced tag.
    max_length = 1 + decode.max_target_length(source_length)
    row_wise = NamedSharding(program.mesh, PartitionSpec(batch_sharding(program.mesh).spec[0]))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=row_wise)
    key = jax.eval_shape(lambda: jax.random.key(0))
    replicated = NamedSharding(program.mesh, PartitionSpec())
    batch = (integers(rows, source_length), integers(rows), integers(rows, 1), integers(rows), integers(rows))
    model, params = (program.model, program.params) if members == 1 else _ensemble(program, members)
    lowered = decode_batch.lower(
        model,
        params,
        *batch,
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated),
        eos_id=1,
        max_length=max_length,
        search=without_seed(decode.search),
        constraints=decode.constraints,
    )
    hypotheses = decode.search.rows_per_source
    flops = members * decoding_flops(program.model.config, rows, hypotheses, source_length, max_length)
    stored = Stored(device_bytes(params), 0, 0, device_bytes(batch))
    models = f"{members} models together, " if members > 1 else ""
    search = type(decode.search).__name__.lower()
    assumption = (
        f"{models}{search}, {hypotheses} hypotheses of {max_length} tokens for each sentence of {source_length}"
    )
    work = _Work(
        "decode", lowered, stored, rows, rows * source_length, rows * max_length, assumption, flops, max_length
    )
    return work, (hypotheses, source_length, max_length)


def _ensemble(program: Program, members: int) -> tuple[Ensemble, PyTree]:
    """`members` models of the program's shape, and their parameters, sharded like those of one."""

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(program.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=sharding)

    return Ensemble(program.model, members), jax.tree.map(stacked, program.params)


def _report(
    work: _Work,
    target: Target,
    mesh: Mesh,
    compiled: Compiled | Refused,
    estimate: Temporaries | DecodingTemporaries | None = None,
) -> CheckReport:
    """The report from what is stored, the compiler's result and the bounds."""
    memory = _memory(work.stored, target, compiled, estimate)
    hlo = compiled.hlo if isinstance(compiled, Compiled) else None
    bounds = None
    if hlo is not None and target.hardware is not None:
        coordinates = [device.coords for device in mesh.devices.flat] if target.is_compiled_for else None
        bounds = roofline(hlo, target.hardware, dict(mesh.shape), coordinates)
    mfu = None
    if bounds is not None and target.hardware is not None:
        overlapped, serial = (
            mfu_bound(work.model_flops, seconds, target.hardware, mesh.size)
            for seconds in (bounds.overlapped, bounds.serial)
        )
        mfu = overlapped, serial
    return CheckReport(
        program=work.program,
        topology=target.name,
        num_slices=target.num_slices,
        device_kind=target.device_kind,
        mesh=dict(mesh.shape),
        rows=work.rows,
        source_tokens=work.source_tokens,
        target_tokens=work.target_tokens,
        assumption=work.assumption,
        fits=isinstance(compiled, Compiled) and memory.total <= target.hbm_bytes,
        hbm_bytes=target.hbm_bytes,
        memory=memory,
        is_estimate=not target.is_compiled_for,
        largest=_largest(memory, compiled, estimate),
        advice=(),
        model_flops=work.model_flops,
        hlo_flops=None if hlo is None else hlo.flops * mesh.size,
        collectives=() if hlo is None else hlo.collectives,
        roofline=bounds,
        mfu_bound=mfu,
        compile_seconds=round(compiled.seconds, 2),
    )


def _memory(
    stored: Stored, target: Target, compiled: Compiled | Refused, estimate: Temporaries | DecodingTemporaries | None
) -> DeviceMemory:
    if isinstance(compiled, Refused):
        # A message without figures still tells that more memory is needed than there is.
        needed = compiled.total or max(target.hbm_bytes + 1, stored.total + (estimate.total if estimate else 0))
        temporaries = max(0, needed - stored.total)
    elif target.is_compiled_for:
        temporaries = compiled.arguments + compiled.others - stored.total
    else:
        temporaries = estimate.total if estimate else 0
    return DeviceMemory(stored.params, stored.optimizer, stored.ema, temporaries, stored.batch)


def _largest(
    memory: DeviceMemory, compiled: Compiled | Refused, estimate: Temporaries | DecodingTemporaries | None
) -> tuple[tuple[int, str], ...]:
    """The compiler's list if it gives one; else parts, with temporaries split by formula."""
    if isinstance(compiled, Refused) and compiled.largest:
        return compiled.largest
    if isinstance(compiled, Compiled) and compiled.hlo.buffers and estimate is None:
        return tuple((buffer.padded_bytes, _named(buffer)) for buffer in compiled.hlo.buffers[:5])
    parts = memory.parts()
    if estimate is not None:
        parts.pop("temporaries")
        shares = (scaled(estimate, memory.temporaries) if isinstance(estimate, Temporaries) else estimate)._asdict()
        parts |= {f"{name} (of the temporaries, by formula)": size for name, size in shares.items()}
    return tuple(sorted(((size, name) for name, size in parts.items() if size), reverse=True)[:5])


def _named(buffer: Buffer) -> str:
    dims = ",".join(map(str, buffer.dims))
    return f"{buffer.dtype}[{dims}] {buffer.op_name or buffer.name}"


def _decoding_advice(rows: int, shards: int) -> Iterator[str]:
    if rows > shards:
        fewer = max(shards, rows // 2 // shards * shards)
        yield f"--decode_rows={fewer} (now {rows}): caches of fewer sentences"
    yield "--beam_size: fewer hypotheses have fewer caches"
    yield "--decode_length: shorter sentences have shorter caches"
    yield "MeshConfig.tensor: weights that stay sharded while they are used"
