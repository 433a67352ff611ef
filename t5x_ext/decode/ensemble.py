"""Several models of one shape decoding as one: their predictions are averaged at every step of the search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_ext.contracts import Params, PyTree, UserError
from t5x_ext.models import LayerConfig, Placement, Transformer

Combine = Literal["log_prob", "probability"]

# Index of the members' axis in what a method takes and gives, beside the parameters, whose first axis it is. Caches
# keep layers and rows in front, which is where a search reorders them.
_MEMBERS: dict[str, tuple[tuple[int | None, ...], Any]] = {
    "encode": ((None, None, None), 0),
    "cross_memory": ((0,), 0),
    "hidden": ((None,), 1),
    "decode_step": ((None, None, 2, 0, None), (0, 2)),
    "project": ((0,), 0),
}


@dataclass(frozen=True)
class Ensemble:
    """Takes the place of an `EncoderDecoder` wherever something is decoded or scored.

    Parameters have a leading axis of members. Combined scores are log-probabilities: the mean of the members'
    (`log_prob`; a search normalises it again), or the logarithm of their mean probability (`probability`). Several
    times the same model decode as it does alone.

    Attributes:
      model: what every member computes.
      members: how many there are.
      combine: what is averaged.
    """

    model: Transformer
    members: int
    combine: Combine = "log_prob"

    @property
    def config(self) -> LayerConfig:
        """Sizes and switches of a member."""
        return self.model.config

    @property
    def placement(self) -> Placement:
        """How a member constrains shardings."""
        return self.model.placement

    def apply(self, variables: dict[str, Params], *arguments: Any, method: str) -> Any:
        """As `Transformer.apply`, deterministic, for the methods that decoding and scoring call.

        Args:
          variables: `{"params": tree}` whose leaves are [members, ...].
          arguments: as the method of one model takes them; what depends on the members comes from other methods here.
          method: `encode`, `cross_memory`, `empty_cache`, `decode_step`, `hidden` or `project`.

        Raises:
          UserError: for another method.
        """
        params = variables["params"]
        if method == "empty_cache":
            one = jax.tree.map(lambda leaf: leaf[0], params)
            cache = self.model.apply({"params": one}, *arguments, method=method)
            return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :, None], self.members, axis=2), cache)
        if method not in _MEMBERS:
            known = ", ".join(("empty_cache", *_MEMBERS))
            raise UserError(f"an ensemble cannot average {method} of its members, only {known}; decode with one model")
        axes, out_axes = _MEMBERS[method]
        call = lambda params, *arguments: self.model.apply({"params": params}, *arguments, method=method)
        result: Any = jax.vmap(call, in_axes=(0, *axes), out_axes=out_axes)(params, *arguments)
        if method == "project":
            return self._combined(result)
        return (self._combined(result[0]), result[1]) if method == "decode_step" else result

    def _combined(self, scores: Float[Array, "members ... vocab"]) -> Float[Array, "... vocab"]:
        log_probs = jax.nn.log_softmax(scores)
        if self.combine == "log_prob":
            return jnp.mean(log_probs, axis=0)
        return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(self.members)


def stack_members(params: list[Params]) -> Params:
    """Parameters of models of one shape as those of an `Ensemble`."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *params)


def member_shapes(model: Transformer | Ensemble, one: PyTree) -> PyTree:
    """Shapes of all parameters of a model, or of all members, from those of one."""
    if not isinstance(model, Ensemble):
        return one
    return jax.eval_shape(partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * model.members)), one)
