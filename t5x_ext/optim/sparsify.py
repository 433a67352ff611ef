"""Gradual pruning with death and regrowth: an Optax wrapper that sparsifies groups of parameters while they train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_ext.contracts import Params, PyTree, UserError, path_name, path_predicate
from t5x_ext.optim.bits import pack, unpack
from t5x_ext.optim.checks import check_choice, check_integer, check_number
from t5x_ext.optim.learning_rate import with_learning_rate
from t5x_ext.optim.matrices import named_axes
from t5x_ext.optim.top_k import WORD, Count, ceil_share, count_true, subtract, top_k_mask

_OWNER = "gradual_pruning"

Score = Literal["momentum", "gradient", "random"]
Slots = Literal["keep", "reset", "mask"]


@dataclasses.dataclass(frozen=True)
class PruningGroup:
    """Parameters that are pruned together, and how many of their entries stay.

    Attributes:
      patterns: regular expressions that are searched in parameter paths such as `encoder/layers/mlp/kernel`.
      final_density: part of the entries that stay in the end, above 0 and at most 1, taken as the decimal written.
      initial_density: part of the entries that stay after the update `begin`.
      scope: `"global"` ranks the entries of all tensors of the group together, `"local"` those of each tensor alone.
      importance: what entries are ranked by: their `"magnitude"`, or their `"value"`, for logits, of which a strongly
        negative one means an entry that hardly counts.
      name: of the group in logs, as in `density/weights`; "": its first pattern.

    Raises:
      UserError: for values out of range.
    """

    patterns: Sequence[str]
    final_density: float
    initial_density: float = 1.0
    scope: Literal["global", "local"] = "global"
    importance: Literal["magnitude", "value"] = "magnitude"
    name: str = ""

    def __post_init__(self) -> None:
        name = "PruningGroup"
        if isinstance(self.patterns, str) or not self.patterns:
            raise UserError(f"{name}: patterns = {self.patterns!r} must be a list of regular expressions, not empty")
        check_number(name, "final_density", self.final_density, above=0, at_most=1)
        check_number(name, "initial_density", self.initial_density, at_least=self.final_density, at_most=1)
        check_choice(name, "scope", self.scope, ("global", "local"))
        check_choice(name, "importance", self.importance, ("magnitude", "value"))

    def density(self, event: int, events: int) -> Fraction:
        """The density after one of the events 0 to `events`: d_f + (d_0 - d_f) (1 - event / events)^3, exactly."""
        first, last = (Fraction(format(float(d), ".15f")) for d in (self.initial_density, self.final_density))
        return last + (first - last) * (1 - Fraction(event, events)) ** 3


@dataclasses.dataclass(frozen=True)
class Regrowth:
    """What part of the active entries of each tensor dies at an event, and by what as many inactive ones are chosen.

    Attributes:
      initial_rate: part that dies in the beginning, from 0 and below 1; it falls to `final_rate` along a half cosine.
      final_rate: part in the end.
      score: the inactive entries with the largest score grow: `"momentum"`, the first moment of the inner optimizer,
        divided by the root of the second where there is one; `"gradient"`, the gradient of this update; `"random"`.
      steps: updates after which `final_rate` is reached; None: the `end` of pruning.

    Raises:
      UserError: for values out of range.
    """

    initial_rate: float = 0.2
    final_rate: float = 0.005
    score: Score = "momentum"
    steps: int | None = None

    def __post_init__(self) -> None:
        name = "Regrowth"
        check_number(name, "initial_rate", self.initial_rate, at_least=0, below=1)
        check_number(name, "final_rate", self.final_rate, at_least=0, at_most=self.initial_rate)
        check_choice(name, "score", self.score, ("momentum", "gradient", "random"))
        if self.steps is not None:
            check_integer(name, "steps", self.steps, at_least=1)

    def rate(self, step: int, steps: int) -> float:
        """The part that dies at an update: r_min + (r_0 - r_min) (1 + cos(pi step / steps)) / 2, constant after it."""
        decay = (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
        return self.final_rate + (self.initial_rate - self.final_rate) * decay


class GradualPruningState(NamedTuple):
    """State of `gradual_pruning`."""

    count: Int[Array, ""]  # type: ignore[assignment]  # int32: updates done
    mask: PyTree  # uint8, `bits.packed_shape` of each parameter of a group, None for others; 1 where active
    opt_state: PyTree  # of the inner optimizer
    density: dict[str, Float[Array, ""]]  # float32: active part of each group, by its name

    @property
    def metrics(self) -> dict[str, Float[Array, ""]]:
        """What the training step reports: `density/weights`, ..."""
        return {f"density/{name}": value for name, value in self.density.items()}


def gradual_pruning(
    optimizer: optax.GradientTransformation,
    groups: Sequence[PruningGroup],
    *,
    end: int,
    every: int,
    begin: int = 0,
    regrowth: Regrowth | None = None,
    slots: Slots = "keep",
    axes: PyTree = None,
    authors_rule: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Prunes groups of parameters from dense to sparse within one training run, with death and regrowth.

    After the updates :math:`t_k = \text{begin} + k \cdot \text{every}`, k from 1 to
    :math:`F = \lfloor (\text{end} - \text{begin}) / \text{every} \rfloor`, an event changes the masks:

    1. prune: of N entries the :math:`\lfloor N d_k \rfloor` most important stay active,
       :math:`d_k = d_F + (d_0 - d_F)(1 - k/F)^3`, over a whole group or tensor by tensor (`PruningGroup.scope`);
    2. death: in each tensor the :math:`\lceil r_t n \rceil` least important of n active entries are dropped,
       :math:`r_t = r_{min} + (r_0 - r_{min})(1 + \cos(\pi t / T)) / 2`;
    3. growth: in each tensor as many inactive entries become active as died, those with the largest score. They start
       from 0; one that died a moment ago and grows again keeps its value.

    Inactive entries are exactly 0 after every update, for any inner optimizer; between events and after the
    last one masks stay as they are. Ties go to the first entry (`top_k_mask`), so that numbers of active entries are
    exact. With `regrowth=None` this is gradual magnitude pruning; with final density 1 and no regrowth the inner
    optimizer remains, bit for bit.

    The inner optimizer sees the whole gradient, that of inactive entries too: moments of inactive entries say which of
    them should grow. Where a model removes what is inactive (edges of a graph), its gradient must be a straight-through
    one (`models.graphs.gate`), or all of its inactive entries score 0.

    Args:
      optimizer: the inner optimizer with all that belongs to it: clipping, weight decay, learning rate. Spare logits
        from decay there (`adam(..., no_decay=["logits$"])`): decay would rank them.
      groups: what is pruned; parameters that no group matches are left alone.
      end: the update at which pruning ends.
      every: updates between events; at least 3 events must fit between `begin` and `end`.
      begin: the update after which the first density holds; 0, or at least 1 with an initial density below 1.
      regrowth: death and growth; None: entries once pruned stay so.
      slots: what happens to moments of the inner optimizer: `"keep"` nothing; `"reset"` those of entries that grow
        become 0; `"mask"` those of inactive entries are 0 after every update too, as the authors' code does with SGD.
      axes: tree of axis names, such as `models.logical_axes` gives: every layer of a stack is then a tensor of its own.
        None: every array is one tensor.
      authors_rule: the rule of the released code for the sake of comparison: entries strictly above the
        floor(N d_k)-th largest stay (ties drop together, one entry fewer at least), likewise in death, and there is no
        event F, so that (d_0 - d_F) / F^3 of the way is left.
      seed: of the random score.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose `update` needs `params`; keywords are handed to `optimizer`.
      It belongs outermost: what follows it in a chain would move inactive entries. Its state holds one bit an entry.

    Raises:
      UserError: if a number is out of range; at `init`, if a pattern matches nothing, a parameter is in two groups,
        nothing of a group or tensor would stay, or a score needs moments that `optimizer` does not have.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> optimizer = gradual_pruning(optax.sgd(0.1), [PruningGroup(["kernel"], 0.25)], end=3, every=1)
      >>> params = {"kernel": jnp.arange(1.0, 9.0), "bias": jnp.ones(2)}
      >>> state, update = optimizer.init(params), jax.jit(optimizer.update)
      >>> for _ in range(3):
      ...     updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["kernel"].tolist())
      [0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 7.0, 8.0]
      [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 8.0]
      [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 8.0]

    References:
      Liu et al., Comprehensive Graph Gradual Pruning for Sparse Training in Graph Neural Networks (arXiv 2207.08629);
      the controller is that of GraNet (Liu et al., arXiv 2106.10404), the cubic schedule Zhu and Gupta's (arXiv
      1710.01878). Their code keeps one entry fewer, drops ties together and ends before the last event; see
      `authors_rule`.
    """
    plan = _Plan(tuple(groups), begin, end, every, regrowth, authors_rule)
    plan.check()
    check_choice(_OWNER, "slots", slots, ("keep", "reset", "mask"))
    check_integer(_OWNER, "seed", seed, at_least=0)
    base, find_axes = optax.with_extra_args_support(optimizer), named_axes(axes)

    def init(params: Params) -> GradualPruningState:
        tensors = _tensors(params, plan.groups, find_axes)
        plan.check_tensors(tensors)
        opt_state = base.init(params)
        if regrowth is not None and regrowth.score == "momentum":
            _check_moments(_slots(opt_state, params), tensors, slots)
        leaves, structure = jax.tree.flatten(params)
        words: list[Array | None] = [None] * len(leaves)
        for tensor in tensors:
            words[tensor.number] = pack(jnp.ones(leaves[tensor.number].shape, bool))
        mask, dense = jax.tree.unflatten(structure, words), dict.fromkeys(plan.names, jnp.ones((), jnp.float32))
        return GradualPruningState(jnp.zeros((), jnp.int32), mask, opt_state, dense)

    def update(
        grads: PyTree, state: GradualPruningState, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, GradualPruningState]:
        if params is None:
            raise UserError(f"{_OWNER} needs params: update(grads, state, params)")
        tensors = _tensors(params, plan.groups, find_axes)
        updates, opt_state = base.update(grads, state.opt_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        old, structure = jax.tree.flatten(params)
        moves, words = jax.tree.leaves(updates), jax.tree.leaves(state.mask)

        def event() -> tuple[list[Array], list[Array], dict[str, Array]]:
            """The packed masks, of those the entries that keep their values (what grows starts from 0), densities."""
            active = [unpack(word, tensor.shape) for word, tensor in zip(words, tensors, strict=True)]
            values = [_moved(old[t.number], moves[t.number], mask) for t, mask in zip(tensors, active, strict=True)]
            number = (count - begin) // every  # of the event
            pruned = plan.prune(tensors, values, active, number)
            if regrowth is None:
                packed = list(map(pack, pruned))
                return packed, packed, plan.densities(tensors, pruned)
            scores = _growth_scores(regrowth.score, tensors, grads, _slots(opt_state, params), (seed, count))
            grown = [plan.regrow(*each, number) for each in zip(tensors, values, pruned, scores, strict=True)]
            kept = [pack(p & g) for p, g in zip(pruned, grown, strict=True)]
            return list(map(pack, grown)), kept, plan.densities(tensors, grown)

        words, kept, density = jax.lax.cond(plan.is_due(count), event, lambda: (words, words, state.density))
        if slots != "keep":
            spared = kept if slots == "mask" else [~word | keeps for word, keeps in zip(words, kept, strict=True)]
            masks = [unpack(word, tensor.shape) for word, tensor in zip(spared, tensors, strict=True)]
            opt_state = _masked_slots(opt_state, params, tensors, masks)
        for tensor, word in zip(tensors, kept, strict=True):
            leaf = old[tensor.number]
            moves[tensor.number] = jnp.where(unpack(word, leaf.shape), moves[tensor.number], -leaf)
        mask = jax.tree.unflatten(jax.tree.structure(state.mask), words)
        return jax.tree.unflatten(structure, moves), GradualPruningState(count, mask, opt_state, density)

    return with_learning_rate(optax.GradientTransformationExtraArgs(init, update), optimizer)


def pruning_masks(optimizer_state: PyTree, params: Params) -> PyTree:
    """The masks in the state of an optimizer: booleans shaped like `params`, None if a parameter is in no group.

    Args:
      optimizer_state: of `gradual_pruning`, or of a wrapper around it.
      params: the parameters, or their shapes.

    Raises:
      UserError: if there is no `gradual_pruning` in the state.
    """
    is_state = lambda node: isinstance(node, GradualPruningState)
    found = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_state) if is_state(node)]
    if not found:
        raise UserError("pruning_masks: the optimizer state is not one of gradual_pruning")
    unpacked = lambda leaf, words: None if words is None else unpack(words, leaf.shape)
    return jax.tree.map(unpacked, params, found[0].mask)


class _Tensor(NamedTuple):
    """A parameter of a group, a stack of as many tensors as it has layers."""

    name: str
    number: int  # among the leaves of the parameters
    shape: tuple[int, ...]
    layers: int | None  # length of the leading axis where that is one of layers
    group: int

    @property
    def size(self) -> int:
        """Entries of one tensor."""
        return math.prod(self.shape[self.layers is not None :])

    def each(self, function: Callable[..., Any], *args: Any, shared: Sequence[Any] = ()) -> Any:
        """`function` on the arrays of each layer, or on the whole; `shared` are arguments that all layers get."""
        if self.layers is None:
            return function(*args, *shared)
        return jax.vmap(function, in_axes=(0,) * len(args) + (None,) * len(shared))(*args, *shared)


def _tensors(
    params: Params, groups: Sequence[PruningGroup], find_axes: Callable[[str, Sequence[int]], Any]
) -> list[_Tensor]:
    """The parameters of the groups, in the order of the leaves."""
    matches = [path_predicate(*group.patterns) for group in groups]
    found = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = path_name(path)
        numbers = [number for number, match in enumerate(matches) if match(name)]
        if len(numbers) > 1:
            raise UserError(f"{_OWNER}: {name} is in two groups, {' and '.join(map(str, numbers[:2]))} counted from 0")
        if numbers:
            names = find_axes(name, leaf.shape)
            layers = leaf.shape[0] if names and names[0] == "layers" else None
            found.append(_Tensor(name, index, leaf.shape, layers, numbers[0]))
    return found


class _Plan(NamedTuple):
    """When events happen and how many entries they leave."""

    groups: tuple[PruningGroup, ...]
    begin: int
    end: int
    every: int
    regrowth: Regrowth | None
    strict: bool

    @property
    def names(self) -> list[str]:
        """Names of the groups."""
        return [group.name or group.patterns[0] for group in self.groups]

    @property
    def events(self) -> int:
        """F: events from `begin` on, the one at `begin` not counted."""
        return (self.end - self.begin) // self.every

    def check(self) -> None:
        """Refuses numbers that make no sense together."""
        if not self.groups:
            raise UserError(f"{_OWNER}: groups is empty; name at least one PruningGroup")
        check_integer(_OWNER, "begin", self.begin, at_least=0)
        check_integer(_OWNER, "every", self.every, at_least=1)
        check_integer(_OWNER, "end", self.end, at_least=1)
        if self.events < 3:
            raise UserError(
                f"{_OWNER}: every = {self.every} leaves {max(self.events, 0)} events between begin = {self.begin} and "
                f"end = {self.end}; at least 3 are needed to reach the final density gradually"
            )
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{_OWNER}: two groups have one name: {', '.join(self.names)}; set PruningGroup.name")
        if self.begin == 0 and any(group.initial_density < 1 for group in self.groups):
            raise UserError(f"{_OWNER}: begin = 0 must be at least 1 with an initial_density below 1: updates prune")

    def check_tensors(self, tensors: Sequence[_Tensor]) -> None:
        """Refuses groups that match nothing or of which nothing would stay."""
        for number, group in enumerate(self.groups):
            own = [tensor for tensor in tensors if tensor.group == number]
            if not own:
                raise UserError(f"{_OWNER}: patterns {list(group.patterns)} match no parameter")
            pools = [("the group", self._entries(own))] if group.scope == "global" else [(t.name, t.size) for t in own]
            for name, size in pools:
                if self._kept(group, self.events, size) < 1 + self.strict:
                    raise UserError(
                        f"{_OWNER}: final_density = {group.final_density} of {list(group.patterns)} leaves no entry of "
                        f"{name}, which has {size}; it must be at least {1 / size:.3g}"
                    )

    def is_due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether an event follows the update of this number, counted from 1."""
        passed = count - self.begin
        return (passed >= 0) & (passed <= self._last * self.every) & (passed % self.every == 0)

    def prune(
        self, tensors: Sequence[_Tensor], values: Sequence[Array], active: Sequence[Array], event: Array
    ) -> list[Array]:
        """Masks after step 1 of an event."""
        masks: list[Array] = list(active)
        for number, group in enumerate(self.groups):
            own = [i for i, tensor in enumerate(tensors) if tensor.group == number]
            ranks = [_importance(values[i], active[i], group) for i in own]
            if group.scope == "global":
                kept = self._kept_at(group, self._entries([tensors[i] for i in own]), event)
                chosen = _largest(ranks, kept, self.strict)
            else:
                chosen = [
                    tensors[i].each(
                        partial(_largest, strict=self.strict),
                        rank,
                        shared=(self._kept_at(group, tensors[i].size, event),),
                    )
                    for i, rank in zip(own, ranks, strict=True)
                ]
            for i, mask in zip(own, chosen, strict=True):
                masks[i] = mask
        return masks

    def regrow(self, tensor: _Tensor, values: Array, active: Array, score: Array, event: Array) -> Array:
        """The mask of one parameter after steps 2 and 3 of an event."""
        group = self.groups[tensor.group]

        def one(values: Array, active: Array, score: Array, share: Array) -> Array:
            before = count_true(active)
            survivors = _largest(
                _importance(values, active, group), subtract(before, ceil_share(before, share)), self.strict
            )
            dead = subtract(before, count_true(survivors))
            return survivors | top_k_mask(jnp.where(survivors, -1.0, score), dead)

        return tensor.each(one, values, active, score, shared=(self._shares()[event],))

    def densities(self, tensors: Sequence[_Tensor], masks: Sequence[Array]) -> dict[str, Array]:
        """The active part of each group."""
        found = {}
        for number, name in enumerate(self.names):
            own = [(mask, tensor) for mask, tensor in zip(masks, tensors, strict=True) if tensor.group == number]
            active = sum(jnp.sum(mask, dtype=jnp.float32) for mask, _ in own)
            found[name] = jnp.asarray(active / self._entries([tensor for _, tensor in own]), jnp.float32)
        return found

    @property
    def _last(self) -> int:
        return self.events - 1 if self.strict else self.events

    def _entries(self, tensors: Sequence[_Tensor]) -> int:
        return sum(math.prod(tensor.shape) for tensor in tensors)

    def _kept(self, group: PruningGroup, event: int, size: int) -> int:
        """How many entries of `size` stay at an event; by the authors' rule the number of the threshold."""
        if not self.strict:
            return math.floor(group.density(event, self.events) * size)
        decay = (1 - event / self.events) ** 3
        rate = (1 - group.initial_density) + (group.initial_density - group.final_density) * (1 - decay)
        return int(size * (1 - rate))

    def _kept_at(self, group: PruningGroup, size: int, event: Array) -> Count:
        kept = [self._kept(group, number, size) - self.strict for number in range(self.events + 1)]
        high, low = (np.array(part, np.uint32) for part in zip(*(divmod(k, 2**WORD) for k in kept), strict=True))
        return Count(jnp.asarray(high)[event], jnp.asarray(low)[event])

    def _shares(self) -> UInt32[Array, " events"]:
        """The part that dies at each event, in 2^-32."""
        assert self.regrowth is not None
        steps = self.regrowth.steps or self.end
        times = (self.begin + number * self.every for number in range(self.events + 1))
        return jnp.asarray([int(self.regrowth.rate(time, steps) * 2**WORD) for time in times], jnp.uint32)


def _importance(values: Array, active: Array, group: PruningGroup) -> Float[Array, "..."]:
    """What active entries are ranked by; inactive ones come after all of them."""
    if group.importance == "magnitude":
        return jnp.where(active, jnp.abs(values.astype(jnp.float32)), -1.0)
    return jnp.where(active, values.astype(jnp.float32), -jnp.inf)


def _largest(scores: PyTree, kept: Count, strict: bool) -> PyTree:
    """The `kept` largest entries; by the authors' rule without those that equal the largest of the others."""
    chosen = top_k_mask(scores, kept)
    if not strict:
        return chosen
    others = jax.tree.map(lambda score, mask: jnp.max(jnp.where(mask, -jnp.inf, score)), scores, chosen)
    threshold = jnp.max(jnp.stack(jax.tree.leaves(others)))
    return jax.tree.map(lambda score: score > threshold, scores)


def _moved(leaf: Array, move: Array, active: Bool[Array, "..."]) -> Array:
    """What `optax.apply_updates` will make of a parameter, inactive entries 0."""
    return jnp.where(active, jnp.asarray(leaf + move).astype(leaf.dtype), 0)


class _Slot(NamedTuple):
    """An array of an optimizer's state that is one to one with a parameter."""

    number: int  # among the leaves of the state
    kind: str  # the name in front of the parameter's path: mu, nu, trace
    array: Array


def _slots(opt_state: PyTree, params: Params) -> dict[str, list[_Slot]]:
    """The slots of every parameter, found by paths that end in the parameter's, however optimizers are chained."""
    shapes = {_parts(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found: dict[str, list[_Slot]] = {"/".join(parts): [] for parts in shapes}
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(opt_state)):
        parts = _parts(path)
        start = next((i for i in range(len(parts) + 1) if parts[i:] in shapes), None)
        is_slot = start is not None and shapes[parts[start:]] == leaf.shape
        if is_slot and jnp.issubdtype(leaf.dtype, jnp.floating):
            found["/".join(parts[start:])].append(_Slot(index, parts[start - 1] if start else "", leaf))
    return found


def _parts(path: tuple) -> tuple[str, ...]:
    return tuple(path_name((part,)) for part in path)


def _moments(slots: Sequence[_Slot]) -> dict[str, Array]:
    """First moment, Adam's `mu` or SGD's `trace`, and Adam's second moment `nu` of one parameter, where there are."""
    return {"mu" if slot.kind == "trace" else slot.kind: slot.array for slot in slots}


def _check_moments(slots: dict[str, list[_Slot]], tensors: Sequence[_Tensor], treatment: Slots) -> None:
    for tensor in tensors:
        moments = _moments(slots[tensor.name])
        if "mu" not in moments:
            raise UserError(
                f"{_OWNER}: Regrowth.score = 'momentum' needs the first moment of {tensor.name}, uncompressed, and the "
                "inner optimizer keeps none; use score = 'gradient' or 'random'"
            )
        if "nu" in moments and treatment == "mask":
            raise UserError(
                f"{_OWNER}: slots = 'mask' leaves nothing of Adam's moments for Regrowth.score = 'momentum'; "
                "use slots = 'keep' or 'reset', or score = 'gradient'"
            )


def _growth_scores(
    kind: Score, tensors: Sequence[_Tensor], grads: PyTree, slots: dict[str, list[_Slot]], key: tuple[int, Array]
) -> list[Float[Array, "..."]]:
    """Non-negative scores of all entries of the parameters."""
    if kind == "random":
        seed, count = key
        root = jax.random.fold_in(jax.random.key(seed), count)
        return [jax.random.uniform(jax.random.fold_in(root, t.number), t.shape, jnp.float32) for t in tensors]
    if kind == "gradient":
        gradients = jax.tree.leaves(grads)
        return [jnp.abs(gradients[tensor.number].astype(jnp.float32)) for tensor in tensors]
    scores = []
    for tensor in tensors:
        moments = {name: array.astype(jnp.float32) for name, array in _moments(slots[tensor.name]).items()}
        divisor = jnp.sqrt(moments["nu"]) + 1e-8 if "nu" in moments else 1.0
        scores.append(jnp.abs(moments["mu"]) / divisor)
    return scores


def _masked_slots(opt_state: PyTree, params: Params, tensors: Sequence[_Tensor], masks: Sequence[Array]) -> PyTree:
    """The state with 0 in the slots of entries where the masks of their parameters are False."""
    leaves, structure = jax.tree.flatten(opt_state)
    slots = _slots(opt_state, params)
    for tensor, mask in zip(tensors, masks, strict=True):
        for slot in slots[tensor.name]:
            leaves[slot.number] = jnp.where(mask, slot.array, jnp.zeros_like(slot.array))
    return jax.tree.unflatten(structure, leaves)
