"""Layer sharing: which of M parameter sets each of N positions of a stack uses, and how that map is executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from t5x_ext.contracts import UserError

Scheme = Literal["none", "universal", "sequence", "cycle", "cycle_rev", "sandwich"]

SCHEMES: tuple[str, ...] = get_args(Scheme)


class LayerRun(NamedTuple):
    """Consecutive positions that walk through consecutive sets: one scan over a slice, without gather or scatter.

    Positions `position .. position + (stop - start) * repeat - 1` use the sets `start .. stop - 1`, from the last to
    the first when `reverse`, each `repeat` times in a row.
    """

    position: int
    start: int
    stop: int
    reverse: bool
    repeat: int

    @property
    def length(self) -> int:
        """How many positions the run covers."""
        return (self.stop - self.start) * self.repeat

    def sets(self) -> tuple[int, ...]:
        """The set of each position of the run, in order.

        >>> LayerRun(position=0, start=1, stop=3, reverse=True, repeat=2).sets()
        (2, 2, 1, 1)
        """
        walk = range(self.start, self.stop)
        return tuple(index for index in (reversed(walk) if self.reverse else walk) for _ in range(self.repeat))


@dataclass(frozen=True)
class LayerSharing:
    """How the positions of one stack share parameter sets (Takase & Kiyono, arXiv 2104.06022; Subformer for sandwich).

    A set is a whole layer: projections, biases and norms. Dropout and caches belong to positions and are never shared.

    Attributes:
      scheme: with N positions and M sets, position i uses the set
        `none`: i; `universal`: 0; `sequence`: floor(i / ceil(N/M)); `cycle`: i mod M; `cycle_rev`: as `cycle`, but the
        last M positions walk back from set M-1; `sandwich`: the first and the last are private, the middle is shared.
      unique_layers: M. None means N for `none`, 1 for `universal`, 3 for `sandwich`, which allow nothing else; the
        other schemes need it.
      allow_uneven: accept M that does not divide N in `sequence`, `cycle` and `cycle_rev`. The map is then that of the
        authors' released code with `share_layer_num = ceil(N/M)`, which differs from the closed form.

    Raises:
      UserError: for an unknown scheme or an impossible number of sets.
    """

    scheme: Scheme = "none"
    unique_layers: int | None = None
    allow_uneven: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(f"LayerSharing.scheme is {self.scheme!r}; it must be one of {', '.join(SCHEMES)}")
        if self.unique_layers is None:
            if self.scheme in ("sequence", "cycle", "cycle_rev"):
                raise UserError(f"LayerSharing.unique_layers is missing; {self.scheme!r} needs the number of sets")
        elif isinstance(self.unique_layers, bool) or not isinstance(self.unique_layers, int) or self.unique_layers < 1:
            raise UserError(f"LayerSharing.unique_layers is {self.unique_layers!r}; it must be a positive integer")

    def num_sets(self, layers: int) -> int:
        """M, the number of parameter sets of a stack of `layers` positions.

        Raises:
          UserError: when the scheme cannot spread that many sets over the positions.
        """
        natural = {"none": layers, "universal": 1, "sandwich": 3}.get(self.scheme)
        sets = self.unique_layers if natural is None or self.unique_layers is not None else natural
        assert sets is not None
        if natural is not None and sets != natural:
            raise UserError(f"LayerSharing.unique_layers is {sets}; {self.scheme!r} over {layers} layers has {natural}")
        if sets > layers:
            raise UserError(f"LayerSharing: {self.scheme!r} needs {sets} layers or more, the stack has {layers}")
        if natural is None and layers % sets:
            self._check_uneven(layers, sets)
        return sets

    def _check_uneven(self, layers: int, sets: int) -> None:
        if not self.allow_uneven:
            raise UserError(
                f"LayerSharing.unique_layers is {sets}, which does not divide {layers} layers; "
                f"choose a divisor or set allow_uneven=True"
            )
        uses = -(-layers // sets)
        if self.scheme == "sequence" and -(-layers // uses) != sets:
            raise UserError(
                f"LayerSharing: 'sequence' over {layers} layers cannot use {sets} sets; "
                f"{uses} uses of each set make {-(-layers // uses)} sets"
            )

    def layer_map(self, layers: int) -> tuple[int, ...]:
        """The set of each of `layers` positions.

        >>> LayerSharing("cycle_rev", unique_layers=3).layer_map(6)
        (0, 1, 2, 2, 1, 0)
        >>> LayerSharing("cycle_rev", unique_layers=3, allow_uneven=True).layer_map(8)
        (0, 1, 2, 0, 1, 2, 1, 0)
        """
        sets = self.num_sets(layers)
        positions = range(layers)
        if self.scheme == "sequence":
            uses = -(-layers // sets)
            return tuple(i // uses for i in positions)
        if self.scheme == "cycle_rev":
            # With fewer than 2M positions the released code goes forward once and walks back as far as it gets.
            turn = max(layers - sets, sets)
            return tuple(i % sets if i < turn else sets - 1 - (i - turn) for i in positions)
        if self.scheme == "sandwich":
            return (0, *(1 for _ in positions[1:-1]), 2)
        return tuple(i % sets for i in positions)

    def runs(self, layers: int) -> tuple[LayerRun, ...]:
        """The map of `layers` positions split into runs, longest first from the left.

        >>> [run.sets() for run in LayerSharing("cycle_rev", unique_layers=3).runs(6)]
        [(0, 1, 2), (2, 1, 0)]
        """
        layer_map = self.layer_map(layers)
        runs: list[LayerRun] = []
        position = 0
        while position < layers:
            runs.append(_longest_run(layer_map, position))
            position += runs[-1].length
        return tuple(runs)


def _longest_run(layer_map: tuple[int, ...], position: int) -> LayerRun:
    """The longest run of `layer_map` that begins at `position`."""
    rest = layer_map[position:]
    first = rest[0]
    repeat = next((i for i, index in enumerate(rest) if index != first), len(rest))
    candidates = [
        run
        for stride in range(1, max(layer_map) + 2)
        for run in (
            LayerRun(position, first, first + stride, False, repeat),
            LayerRun(position, first - stride + 1, first + 1, True, repeat),
        )
        if rest[: run.length] == run.sets()
    ]
    return max(candidates, key=lambda run: (run.length, not run.reverse))
