"""AdamW with linear warm-up, cosine decay and clipping by the global norm of the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx import config


def learning_rate(training: config.Training, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update number `step`, counted from 0.

    With p the peak, f the final fraction, w the warm-up and n all steps:

        rate = p * min(1, (step + 1) / w) * (f + (1 - f) * (1 + cos(pi * x)) / 2),   x = (step - w) / (n - w) in [0, 1]
    """
    warmup = training.warmup_steps
    rise = jnp.minimum(1.0, (step + 1) / max(1, warmup))
    x = jnp.clip((step - warmup) / max(1, training.steps - warmup), 0.0, 1.0)
    final = training.final_learning_rate
    return training.learning_rate * rise * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x)))


def decayed(params: nnx.State) -> nnx.State:
    """Which parameters weight decay applies to: those that say so where a layer makes them, by `decays=True`.

    Args:
      params: what `nnx.split(model, nnx.Param)` gives, of arrays or of shapes.

    Returns:
      A bool per parameter, in the structure of `nnx.as_pure(params)`.
    """

    def decays(variable):
        return variable.replace(variable.get_metadata().get("decays", False))

    return nnx.as_pure(jax.tree.map(decays, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def make(training: config.Training, params: nnx.State) -> optax.GradientTransformation:
    """The optimiser (Loshchilov and Hutter, 2019) of parameters like `params`; see `decayed` for its type."""
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            lambda step: learning_rate(training, step),
            b1=training.beta1,
            b2=training.beta2,
            weight_decay=training.weight_decay,
            mask=decayed(params),
        ),
    )
