"""Whether a model can be built, found before anything is: each block on its own, as shapes."""

from __future__ import annotations

import math

import jax
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.models.block import Block

MOST = 2**43  # parameters of a model: no machine holds them


def check(model: config.Model) -> int:
    """Builds each block as shapes alone; returns how many parameters all of them have together, embedding excepted.

    Raises:
      UsageError: with every block that cannot be built, and why; or that the model is too large.
    """
    problems, counts = [], {}
    for name, options in model.blocks.items():
        try:
            built = nnx.eval_shape(lambda options=options: Block(model.width, options, nnx.Rngs(params=0)))
            counts[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
        except Exception as error:  # layers, a user's own among them, raise whatever they meet
            why = " ".join(str(error).split()) or type(error).__name__
            problems.append(
                f"model.blocks.{name} cannot be built: {why[:300]} (mixer {options.mixer.kind}, "
                f"mlp {options.mlp.kind}, model.width {model.width:,}); change their options or the width"
            )
    if problems:
        raise UsageError("\n".join(problems))
    total = model.repeats * sum(counts[name] for name in model.pattern)
    if total > MOST:
        largest = max(model.pattern, key=counts.get)
        raise UsageError(
            f"the model has {total:,} parameters, {counts[largest]:,} of them in each block '{largest}', and at most "
            f"{MOST:,} are possible; give a smaller model.width, fewer model.repeats, or smaller options of the block"
        )
    return total
