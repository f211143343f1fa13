"""AdamW with linear warm-up, cosine decay and clipping by the global norm of the gradient."""

from __future__ import annotations

import math

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float

from longctx import config


def learning_rate(training: config.Training, step: int) -> float:
    """The rate of update number `step`, counted from 0. A step is given it, so that all rates share one program.

    With p the peak, f the final fraction, w the warm-up and n all steps:

        rate = p * min(1, (step + 1) / w) * (f + (1 - f) * (1 + cos(pi * x)) / 2),   x = (step - w) / (n - w) in [0, 1]
    """
    warmup = training.warmup_steps
    rise = min(1.0, (step + 1) / max(1, warmup))
    x = min(max((step - warmup) / max(1, training.horizon - warmup), 0.0), 1.0)
    final = training.final_learning_rate
    return training.learning_rate * rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * x)))


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


def make(training: config.Training, params: nnx.State) -> optax.GradientTransformationExtraArgs:
    """The optimiser (Loshchilov and Hutter, 2019) of parameters like `params`; see `decayed` for its type.

    `update` is given the learning rate as well, `rate=`.
    """
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.chain(
            optax.scale_by_adam(b1=training.beta1, b2=training.beta2),
            optax.add_decayed_weights(training.weight_decay, decayed(params)),
            optax.GradientTransformationExtraArgs(optax.init_empty_state, _descend),
        ),
    )


def _descend(updates, state, params=None, *, rate: Float[Array, ""]):
    return jax.tree.map(lambda update: -rate * update, updates), state
