"""Tries meshes, remat policies and numbers of microbatches for a run, and ranks those that fit a topology by step time.

Every candidate is estimated first: memory by the formula of `t5x_ext.plan.estimate`, time from operations and the bytes
that parameters and activations must move. Candidates that cannot fit are dropped, the most promising of the rest are
compiled, and only compiled ones are ranked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp

from t5x_ext.contracts import UserError
from t5x_ext.data import BatchConfig
from t5x_ext.models import DecoderConfig, TransformerConfig, count_params
from t5x_ext.models.config import Remat
from t5x_ext.parallel import AxisRules, MeshConfig, data_parallel, fsdp, fsdp_tensor, make_mesh
from t5x_ext.parallel.mesh import batch_devices
from t5x_ext.plan.check import MEAN_LENGTH, check, on_slices, training_flops
from t5x_ext.plan.estimate import Stored, estimate_temporaries, stored_bytes
from t5x_ext.plan.report import CheckReport, amount, duration, table
from t5x_ext.plan.topology import Target
from t5x_ext.tasks import text_task, with_model
from t5x_ext.train.program import Program, make_program
from t5x_ext.train.run import Run

MOST_MICROBATCHES = 64
MOST_TENSOR = 8
"""Larger values only cost time: each microbatch gathers the weights again, and sharded matrices add collectives."""

_RULES: dict[str, AxisRules] = {"data_parallel": data_parallel(), "fsdp": fsdp(), "fsdp_tensor": fsdp_tensor()}

_RECOMPUTED = {
    # Share of the forward pass's products that the backward pass recomputes. A layer recomputed from its input does not
    # need its last product; policies that keep products recompute attention, or nothing.
    "none": 0.0,
    "dots_saveable": 0.0,
    "dots_with_no_batch_dims_saveable": 0.05,
    "full": 0.7,
}

_NEEDED = {"none": 1.3, "dots_saveable": 1.3, "dots_with_no_batch_dims_saveable": 1.3, "full": 0.8}
"""Temporaries that the TPU compiler allocates, over those by formula."""

_SLACK = 1.6
"""Candidates with estimates above this many times the available memory are not tried."""

_DOUBT = 1.25
"""A candidate that seems not to fit must be this many times faster to be tried before one that does."""


class Candidate(NamedTuple):
    """One layout of a run."""

    mesh: MeshConfig  # with every size given
    rules: str  # a preset of `parallel`
    remat: Remat
    num_microbatches: int

    def apply(self, run: Run) -> Run:
        """The run with this layout."""
        return dataclasses.replace(
            with_model(run, remat=self.remat),
            mesh=self.mesh,
            axis_rules=_RULES[self.rules],
            num_microbatches=self.num_microbatches,
        )

    def gin(self, run: Run) -> list[str]:
        """A gin file with this layout, to be given after the run's own."""
        kind = type(text_task(run).model)
        folder, _, module = kind.__module__.rpartition(".")
        return [
            "from __gin__ import dynamic_registration",
            "from t5x_ext import parallel",
            "from t5x_ext import train",
            f"from {folder} import {module}" if folder else f"import {module}",
            "train.Run.mesh = @parallel.MeshConfig()",
            *(f"parallel.MeshConfig.{name} = {size}" for name, size in dataclasses.asdict(self.mesh).items()),
            f"train.Run.axis_rules = @parallel.{self.rules}()",
            f"train.Run.num_microbatches = {self.num_microbatches}",
            f"{module}.{kind.__name__}.remat = {self.remat!r}",
        ]


class Estimate(NamedTuple):
    """Estimates for a candidate before it is compiled."""

    candidate: Candidate
    seconds: float  # of a step, communication overlapped, by formula


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
      run: the run.
      considered: number of candidates.
      fitting: candidates that fit with their reports, the fastest first.
      refused: candidates that were compiled and do not fit.
    """

    run: Run
    considered: int
    fitting: tuple[tuple[Candidate, CheckReport], ...]
    refused: tuple[tuple[Candidate, CheckReport], ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON: the report of the best, and all of them by rank."""
        best = self.fitting[0][1].to_json() if self.fitting else {"fits": False}
        return {
            **best,
            "search": {
                "considered": self.considered,
                "compiled": len(self.fitting) + len(self.refused),
                "fitting": [_entry(*found) for found in self.fitting],
                "refused": [_entry(*found) for found in self.refused],
                "gin": self.fitting[0][0].gin(self.run) if self.fitting else [],
            },
        }

    def __str__(self) -> str:
        """The ranking as text, the report of the best, and the gin lines for it."""
        compiled = len(self.fitting) + len(self.refused)
        head = f"{self.considered:,} layouts, {compiled} of them compiled, {len(self.fitting)} fit"
        if not self.fitting:
            return "\n".join([head, "", *_advice(self.refused)])
        rows: list[tuple[str, ...]] = [
            ("mesh", "remat", "microbatches", "a device", "overlapped", "serial", "MFU at most"),
            *(_row(candidate, report) for candidate, report in self.fitting),
        ]
        candidate, report = self.fitting[0]
        return "\n".join(
            [
                *(head, "", *table(rows), "", str(report)),
                *("", "as another --gin_file after the run's own:", "", *candidate.gin(self.run)),
            ]
        )


def search(
    run: Run,
    vocab_size: int,
    target: Target,
    mean_length: int = MEAN_LENGTH,
    most_compiles: int = 12,
    progress: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Ranks layouts of a run by the lower bound on the time of a step, first with overlapped communication.

    Args:
      run: its mesh, axis rules, remat policy and microbatches are varied; the batch does not change.
      vocab_size: see `check`.
      target: see `check`.
      mean_length: see `check`.
      most_compiles: programs to compile at most.
      progress: called with a message for each program that is compiled.

    Raises:
      UserError: if no mesh divides the rows of the batch.
    """
    if target.hardware is None:
        raise UserError(
            f"no search for {target.name}: the speed of {target.device_kind} is not in the table of hardware"
        )
    everything = list(candidates(run, target))
    if not everything:
        raise UserError(
            f"BatchConfig.rows is {text_task(run).data.batch.rows}: no mesh of {len(target.devices)} devices divides it"
        )
    estimates = _estimates(run, vocab_size, target, everything, mean_length)
    # The run's own layout is always compiled, for comparison.
    own = _own_layout(run, target)
    promising = sorted(estimates, key=lambda estimate: (estimate.candidate != own, estimate.seconds))
    fitting: list[tuple[Candidate, CheckReport]] = []
    refused: list[tuple[Candidate, CheckReport]] = []
    for number, estimate in enumerate(promising[:most_compiles], 1):
        candidate = estimate.candidate
        progress(f"compiling {number} of {min(most_compiles, len(promising))}: {' '.join(_row(candidate)[:3])}")
        report = check(candidate.apply(run), vocab_size, target, mean_length)
        (fitting if report.fits else refused).append((candidate, report))
    fitting.sort(key=lambda found: _step_seconds(found[1]))
    return SearchResult(run, len(everything), tuple(fitting), tuple(refused))


def candidates(run: Run, target: Target) -> Iterator[Candidate]:
    """Every layout whose devices and microbatches divide the rows of the batch."""
    slices = max(target.num_slices, on_slices(run, target).mesh.slices)
    inside = len(target.devices) // slices
    for tensor in _divisors(math.gcd(inside, text_task(run).model.num_heads), MOST_TENSOR):
        for data in _divisors(inside // tensor):
            mesh = MeshConfig(data=data, fsdp=inside // tensor // data, tensor=tensor, slices=slices)
            shards = slices * data * mesh.fsdp
            rules = "fsdp_tensor" if tensor > 1 else "fsdp" if mesh.fsdp > 1 else "data_parallel"
            for count in _divisors(text_task(run).data.batch.rows // shards, MOST_MICROBATCHES):
                if text_task(run).data.batch.rows % shards == 0 and count & (count - 1) == 0:
                    yield from (Candidate(mesh, rules, remat, count) for remat in get_args(Remat))


def _own_layout(run: Run, target: Target) -> Candidate | None:
    """The run's own layout as a candidate; None if its axis rules are no preset."""
    slices, data, fsdp_size, tensor = on_slices(run, target).mesh.sizes(len(target.devices))
    preset = next((name for name, rules in _RULES.items() if rules == run.axis_rules), None)
    mesh = MeshConfig(data=data, fsdp=fsdp_size, tensor=tensor, slices=slices)
    return None if preset is None else Candidate(mesh, preset, text_task(run).model.remat, run.num_microbatches)


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _estimates(
    run: Run, vocab_size: int, target: Target, everything: Sequence[Candidate], mean_length: int
) -> Iterator[Estimate]:
    """Estimates of the candidates that may fit."""
    programs: dict[tuple[MeshConfig, str], tuple[Program, Stored]] = {}
    for candidate in everything:
        key = candidate.mesh, candidate.rules
        if key not in programs:
            laid_out = candidate.apply(run)
            program = make_program(laid_out, {"vocab_size": vocab_size}, make_mesh(candidate.mesh, target.devices))
            programs[key] = program, stored_bytes(program)
        base, stored = programs[key]
        # A step needs at least the gradients of one microbatch and their sum, in addition to its arguments.
        if stored.total + 2 * stored.params > target.hbm_bytes:
            continue
        laid_out = candidate.apply(run)
        model = base.model.clone(config=dataclasses.replace(base.model.config, remat=candidate.remat))
        program = base._replace(run=laid_out, definition=base.definition._replace(model=model))
        needed = stored.total + _NEEDED[candidate.remat] * estimate_temporaries(program).total
        if needed <= _SLACK * target.hbm_bytes:
            seconds = _seconds(program, candidate, target, mean_length)
            # Candidates that may not fit must not displace those that do.
            yield Estimate(candidate, seconds * (_DOUBT if needed > target.hbm_bytes else 1.0))


def _seconds(program: Program, candidate: Candidate, target: Target, mean_length: int) -> float:
    """Seconds of a step by formula, communication overlapped.

    Compute: the model's operations, recomputation included. Network, over all links of a chip at once: each microbatch
    gathers the weights for the forward and for the backward pass, scatters their gradients (over a full slice the TPU
    compiler uses an all-reduce, with twice the bytes) and sums them over replicas; activations are summed along
    `tensor` after each sub-layer, in both passes. The result is the larger of the two plus a tenth of the other, which
    breaks ties in favour of less communication.
    """
    hardware, mesh, config = target.hardware, candidate.mesh, program.model.config
    assert hardware is not None
    flops, _, _ = training_flops(config, program.run, mean_length)
    compute = flops * (1 + _RECOMPUTED[candidate.remat] / 3) / (hardware.peak_flops * len(target.devices))
    links = max(1, hardware.torus_dimensions) * hardware.link_bandwidth
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    weights = itemsize * count_params(program.params) / mesh.tensor
    batch = text_task(program.run).data.batch
    sub_layers = _sub_layer_tokens(config, batch)
    network = 0.0
    if mesh.fsdp > 1:
        scatters = 2 if target.is_compiled_for and mesh.data == mesh.tensor == 1 else 1
        gathers = 1 if candidate.remat == "none" else 2
        network += (gathers + scatters) * candidate.num_microbatches * weights / links
    if mesh.data > 1:
        network += 2 * candidate.num_microbatches * weights / mesh.fsdp / links
    if mesh.slices > 1:
        network += 2 * candidate.num_microbatches * weights / mesh.fsdp / hardware.slice_network_bandwidth
    if mesh.tensor > 1:
        rows = batch.rows / batch_devices(program.mesh)
        network += 2 * 2 * rows * sub_layers * config.embed_dim * itemsize / links
    return max(compute, network) + 0.1 * min(compute, network)


def _sub_layer_tokens(config: TransformerConfig | DecoderConfig, batch: BatchConfig) -> int:
    """Tokens of a row times the sub-layers that they go through."""
    if isinstance(config, DecoderConfig):
        return 2 * config.layers * batch.target_length
    return 2 * config.encoder_layers * batch.source_length + 3 * config.decoder_layers * batch.target_length


def _step_seconds(report: CheckReport) -> tuple[float, float]:
    assert report.roofline is not None
    # If times are equal to three digits, the network decides.
    return float(f"{report.roofline.overlapped:.3g}"), report.roofline.serial


def _row(candidate: Candidate, report: CheckReport | None = None) -> tuple[str, ...]:
    sizes = dataclasses.asdict(candidate.mesh).items()
    mesh = " ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one device"
    described = mesh, candidate.remat, str(candidate.num_microbatches)
    if report is None or report.roofline is None or report.mfu_bound is None:
        return described
    overlapped, serial = report.roofline.overlapped, report.roofline.serial
    figures = amount(report.memory.total), duration(overlapped), duration(serial), f"{report.mfu_bound[0]:.1%}"
    return *described, *figures


def _entry(candidate: Candidate, report: CheckReport) -> dict[str, Any]:
    entry = {**candidate._asdict(), "mesh": dataclasses.asdict(candidate.mesh)}
    found = report.to_json()
    kept = ("per_device_bytes", "roofline_step_seconds", "mfu_bound", "compile_seconds")
    return entry | {name: found[name] for name in kept}


def _advice(refused: Sequence[tuple[Candidate, CheckReport]]) -> list[str]:
    if not refused:
        return ["parameters, optimizer state and gradients alone are more than the devices have: take more devices"]
    return ["none of those compiled fits; of the last one:", str(refused[-1][1])]
