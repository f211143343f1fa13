"""Whether a model can be built, found before anything is: each block on its own, as shapes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import jax
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.models.block import Block

_BYTES = 16  # of a parameter in training: itself, its gradient and two moments, float32
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
            kinds = ", ".join(f"{part} {layer.kind}" for part, layer in options.layers.items())
            why = " ".join(str(error).split()) or type(error).__name__
            problems.append(
                f"model.blocks.{name} cannot be built: {why[:300]} ({kinds}, model.width {model.width:,}); "
                "change their options or the width"
            )
    if problems:
        raise UsageError("\n".join(problems))
    total = sum(group.repeats * sum(counts[name] for name in group.pattern) for group in model.scans)
    if total > MOST:
        largest = max((name for group in model.scans for name in group.pattern), key=counts.get)
        raise UsageError(
            f"the model has {total:,} parameters, {counts[largest]:,} of them in each block '{largest}', and at most "
            f"{MOST:,} are possible; give a smaller model.width, fewer model.repeats, or smaller options of the block"
        )
    return total


def room(experiment: config.Experiment, devices: Sequence[jax.Device]) -> None:
    """Compares what parameters, gradients and moments take with the memory that the devices have together.

    Raises:
      UsageError: they do not fit, whatever the rows.
    """
    table = experiment.data.vocab_size * experiment.model.width
    needed, there = _BYTES * (check(experiment.model) + table), _memory(devices)
    if there and needed > there:
        raise UsageError(
            f"the model has {needed // _BYTES:,} parameters, whose training takes {needed / 2**30:,.1f} GiB before any "
            f"row is read, and the {len(devices)} devices have {there / 2**30:,.1f} GiB; give a smaller model.width, "
            "fewer model.repeats, or more devices"
        )


def _memory(devices: Sequence[jax.Device]) -> int:
    """Bytes of all devices; simulated ones share the host's. 0 if it is not known."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    if not local:
        return 0
    if local[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    limit = (local[0].memory_stats() or {}).get("bytes_limit", 0)
    return limit * len(devices)
