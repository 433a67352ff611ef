"""The report on a program before it runs: memory, operations, network, and a lower bound on its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

from t5x_ext.plan.hlo_cost import Collective
from t5x_ext.plan.roofline import Roofline

GIB = 2**30
_BAR = 40
_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device.

    Attributes:
      params: parameters, the exact size of the arrays, like `optimizer`, `ema` and `batch`.
      optimizer: optimizer state.
      ema: EMA of the parameters.
      temporaries: all else that the program needs: activations, gradients, gathered weights, the program itself, and
        the padding of tiled layouts.
      batch: the batch.
    """

    params: int
    optimizer: int
    ema: int
    temporaries: int
    batch: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.params + self.optimizer + self.ema + self.temporaries + self.batch

    def parts(self) -> dict[str, int]:
        """By name, in the order of the report."""
        return {name: getattr(self, name) for name in ("params", "optimizer", "ema", "temporaries", "batch")}


class Cost(NamedTuple):
    """The work of a program in a day at some speed, and the days of a run at that speed."""

    rows_per_device_day: float
    target_tokens_per_device_day: float
    run_days: float | None  # None for decoding


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`.

    Attributes:
      program: `train`, one update, or `decode`, one batch searched to its maximum length.
      topology: as given.
      num_slices: slices, or nodes.
      device_kind: of every device.
      mesh: axis -> size, outermost first.
      rows: of the batch, over all devices.
      source_tokens: real tokens of the batch on the encoder's side.
      target_tokens: likewise on the decoder's side.
      assumption: what the tokens and the model FLOPs assume.
      fits: whether a device has enough memory.
      hbm_bytes: memory of one device that a program may use.
      memory: bytes that it needs.
      is_estimate: True if no compiler for these devices was used. Then memory is computed by formula, and so is the
        memory traffic of decoding; that of an update is not among the bounds.
      largest: the largest arrays or parts: (bytes on one device, description).
      advice: what would make it fit, the most useful first; empty if it fits.
      model_flops: operations of the model for the batch, without recomputation, over all devices.
      hlo_flops: operations of the compiled program, with loops counted as often as they run, over all devices; None if
        the compiler refused.
      collectives: those of one device, the largest first.
      roofline: lower bounds in seconds; None if the compiler refused or the kind of device is not in the table.
      mfu_bound: (overlapped, serial) model FLOPs utilisation at those bounds; None if they are.
      compile_seconds: seconds the compiler took.
      steps: updates of the run; None for decoding.
      assumed_mfu: model FLOPs utilisation to show costs for beside the bounds, 0 to 1; None: the bounds only.
    """

    program: str
    topology: str
    num_slices: int
    device_kind: str
    mesh: dict[str, int]
    rows: int
    source_tokens: int
    target_tokens: int
    assumption: str
    fits: bool
    hbm_bytes: int
    memory: DeviceMemory
    is_estimate: bool
    largest: tuple[tuple[int, str], ...]
    advice: tuple[str, ...]
    model_flops: float
    hlo_flops: float | None
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    mfu_bound: tuple[float, float] | None
    compile_seconds: float
    steps: int | None = None
    assumed_mfu: float | None = None

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    def costs(self) -> dict[str, Cost]:
        """Costs in days at the bounds and the assumed MFU: `overlapped`, `serial`, `assumed`; empty without bounds.

        Tokens are those of rows without padding.
        """
        if self.roofline is None or self.mfu_bound is None:
            return {}
        seconds = {"overlapped": self.roofline.overlapped, "serial": self.roofline.serial}
        if self.assumed_mfu is not None:
            seconds["assumed"] = self.roofline.overlapped * self.mfu_bound[0] / self.assumed_mfu
        return {name: self._cost(step) for name, step in seconds.items()}

    def _cost(self, step_seconds: float) -> Cost:
        steps_a_day = _DAY / step_seconds
        return Cost(
            rows_per_device_day=self.rows * steps_a_day / self.num_devices,
            target_tokens_per_device_day=self.target_tokens * steps_a_day / self.num_devices,
            run_days=None if self.steps is None else self.steps / steps_a_day,
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON; sizes in bytes, times in seconds."""
        times = {} if self.roofline is None else {time.collective: time for time in self.roofline.collectives}
        bounds = self.mfu_bound or (None, None)
        return {
            "program": self.program,
            "topology": self.topology,
            "num_slices": self.num_slices,
            "num_devices": self.num_devices,
            "device_kind": self.device_kind,
            "mesh": self.mesh,
            "rows": self.rows,
            "source_tokens": self.source_tokens,
            "target_tokens": self.target_tokens,
            "assumption": self.assumption,
            "fits": self.fits,
            "is_estimate": self.is_estimate,
            "hbm_bytes": self.hbm_bytes,
            "per_device_bytes": {**self.memory.parts(), "total": self.memory.total},
            "largest": [{"bytes": size, "what": what} for size, what in self.largest],
            "advice": list(self.advice),
            "model_flops": self.model_flops,
            "hlo_flops": self.hlo_flops,
            "collectives": [
                {
                    "kind": collective.kind,
                    "axes": list(collective.axes),
                    "group_size": collective.group_size,
                    "dtype": collective.dtype,
                    "count": collective.count,
                    "bytes": collective.bytes,
                    "seconds": _seconds(times.get(collective)),
                }
                for collective in self.collectives
            ],
            "roofline_step_seconds": {
                "overlapped": self.roofline and self.roofline.overlapped,
                "serial": self.roofline and self.roofline.serial,
                "compute": self.roofline and self.roofline.compute_seconds,
                "hbm": self.roofline.hbm_seconds if self.roofline and self._knows_traffic else None,
                "network": self.roofline and self.roofline.network_seconds,
                "slice_network": self.roofline and self.roofline.slice_network_seconds,
            },
            "mfu_bound": {"overlapped": bounds[0], "serial": bounds[1]},
            "steps": self.steps,
            "costs": {name: cost._asdict() for name, cost in self.costs().items()},
            "compile_seconds": self.compile_seconds,
        }

    def __str__(self) -> str:
        """The report as text."""
        return "\n".join([*self._head(), "", *self._memory(), "", *self._work(), "", *self._network(), *self._bounds()])

    @property
    def _knows_traffic(self) -> bool:
        """Whether memory traffic is among the bounds."""
        return not self.is_estimate or self.program == "decode"

    def _head(self) -> Iterator[str]:
        slices = f" in {self.num_slices} slices" if self.num_slices > 1 else ""
        mesh = " ".join(f"{name} {size}" for name, size in self.mesh.items())
        yield f"{self.program} on {self.topology}: {self.num_devices} x {self.device_kind}{slices}, mesh {mesh}"

    def _memory(self) -> Iterator[str]:
        label = "estimated by formula; no compiler for these devices was used" if self.is_estimate else ""
        yield _joined(f"memory of one device, {self.hbm_bytes / GIB:.2f} GiB", label)
        for name, size in {**self.memory.parts(), "total": self.memory.total}.items():
            if size or name != "ema":
                yield f"  {name:<12}{amount(size):>11}  {bar(size, self.hbm_bytes)}"
        yield f"  {'fits' if self.fits else 'does not fit'}: {self.memory.total / self.hbm_bytes:.0%} of it"
        if not self.fits:
            yield "  largest:"
            yield from (f"  - {amount(size):>11}  {what}" for size, what in self.largest)
            yield "  what would make it fit:"
            yield from (f"  - {advice}" for advice in self.advice)

    def _work(self) -> Iterator[str]:
        tokens = f"{self.source_tokens:,} source and {self.target_tokens:,} target tokens"
        unit = "update" if self.program == "train" else "batch"
        yield f"one {unit}: {self.rows:,} rows, {tokens} ({self.assumption})"
        yield f"  model FLOPs {self.model_flops:>11.4g}"
        if self.hlo_flops is not None:
            times = self.hlo_flops / self.model_flops
            yield f"  HLO FLOPs   {self.hlo_flops:>11.4g}  {times:.2f} times those of the model"

    def _network(self) -> Iterator[str]:
        if not self.collectives:
            return
        rows = [("collectives of one device", "over", "devices", "times", "bytes", "time")]
        times = {} if self.roofline is None else {time.collective: time for time in self.roofline.collectives}
        shown = [collective for collective in self.collectives if collective.bytes >= 1e-3 * self.collectives[0].bytes]
        for collective in shown:
            seconds = _seconds(times.get(collective))
            rows.append(
                (
                    f"  {collective.kind} {collective.dtype}",
                    " ".join(collective.axes) or "?",
                    str(collective.group_size),
                    f"{collective.count:,.0f}",
                    amount(collective.bytes),
                    "" if seconds is None else duration(seconds),
                )
            )
        yield from table(rows)
        if len(shown) < len(self.collectives):
            rest = self.collectives[len(shown) :]
            yield f"  and {len(rest)} small ones, {amount(sum(collective.bytes for collective in rest))} together"
        yield ""

    def _bounds(self) -> Iterator[str]:
        if self.roofline is None or self.mfu_bound is None:
            if self.hlo_flops is None:
                yield f"refused by the compiler after {self.compile_seconds:.1f} s"
            else:
                yield f"no bound on time: the peak of {self.device_kind} is not in the table of hardware"
                yield f"compiled in {self.compile_seconds:.1f} s"
            return
        roofline = self.roofline
        parts = {
            "compute": roofline.compute_seconds,
            "HBM": roofline.hbm_seconds,
            "network": roofline.network_seconds,
            "between slices": roofline.slice_network_seconds,
        }
        if not self._knows_traffic:
            parts.pop("HBM")
        if not roofline.slice_network_seconds:
            parts.pop("between slices")
        yield "at least: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        local = "max(compute, HBM)" if self._knows_traffic else "compute"
        serial = " + ".join([local, *(name for name in parts if name not in ("compute", "HBM"))])
        formulas = {"overlapped": f"max({', '.join(parts)})", "serial": serial}
        seconds = {"overlapped": roofline.overlapped, "serial": roofline.serial}
        for (name, formula), mfu in zip(formulas.items(), self.mfu_bound):
            yield f"  {name:<11}{duration(seconds[name]):>11}  MFU at most {mfu:6.1%}  = {formula}"
        yield from self._costs()
        yield f"compiled in {self.compile_seconds:.1f} s"

    def _costs(self) -> Iterator[str]:
        """Work of a device in a day, and for training the days of the run, for decoding sentences."""
        last = "sentences a device-day" if self.steps is None else f"{self.steps:,} updates"
        rows = [("", "target tokens a device-day", last)]
        for name, cost in self.costs().items():
            label = f"{self.assumed_mfu:.0%} MFU" if name == "assumed" else name
            tokens = f"{cost.target_tokens_per_device_day:,.0f}"
            days = f"{cost.rows_per_device_day:,.0f}" if cost.run_days is None else _days(cost.run_days)
            rows.append((f"  {label}", tokens, days))
        yield from table(rows)


def amount(size: float) -> str:
    """Bytes in a suitable unit.

    >>> amount(3 * 2**30), amount(300_000), amount(12)
    ('3.00 GiB', '293 KiB', '12 B')
    """
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}" if unit == GIB else f"{size / unit:.0f} {name}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in a suitable unit.

    >>> duration(2.86), duration(0.0123), duration(4e-6)
    ('2.860 s', '12.300 ms', '4.000 us')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:,.3f} {name}"
    return f"{seconds * 1e6:.3f} us"


def _days(days: float) -> str:
    return f"{days:,.2f} days" if days >= 1 else f"{days:.2g} days"


def bar(size: float, whole: float, width: int = _BAR) -> str:
    """A bar whose length is the share of `size` in `whole`, with an arrow if `size` is larger.

    >>> bar(1, 4, 8), bar(9, 4, 8)
    ('##......', '########>')
    """
    filled = min(round(width * size / whole), width)
    return "#" * filled + ("." * (width - filled) if size <= whole else ">")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; the first is left-aligned, the others are right-aligned."""
    columns = ("left", *["right"] * (len(rows[0]) - 1))
    lines = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=columns, preserve_whitespace=True)
    return lines.splitlines()


def _seconds(time: Any) -> float | None:
    return None if time is None else time.seconds + time.slice_seconds


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
