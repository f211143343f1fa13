"""What layers report beside their outputs: losses of their own, and metrics.

A layer calls `record`, and whoever traces layers collects:

    with collected() as records:
        y, _ = layer(x, segments)

Records are traced arrays. Code that traces layers apart from what is around them (the body of a scan, a checkpoint)
collects inside, returns the records, and passes their sums on with `add`. Where nobody collects, nothing is recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Record(NamedTuple):
    """Sums, float32, of what was recorded by one name; those of spans, layers and micro-batches add up.

    Attributes:
      total: over tokens.
      count: tokens.
      weighted: of totals times their weights.
      times: how often it was recorded: once a layer.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    weighted: Float[Array, ""]
    times: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """A token's, of all layers."""
        return self.total / jnp.maximum(self.count, 1)

    @property
    def loss(self) -> Float[Array, ""]:
        """The sum over layers of weighted means over tokens, where all layers count the same tokens."""
        return self.times * self.weighted / jnp.maximum(self.count, 1)


_local = threading.local()


def _open() -> list[dict[str, Record]]:
    if not hasattr(_local, "open"):
        _local.open = []
    return _local.open


def collecting() -> bool:
    """Whether what is recorded is collected."""
    return bool(_open())


@contextlib.contextmanager
def collected(wanted: bool = True) -> Iterator[dict[str, Record]]:
    """A dictionary of what is recorded within, by name; empty unless it is `wanted`."""
    found: dict[str, Record] = {}
    if not wanted:
        yield found
        return
    _open().append(found)
    try:
        yield found
    finally:
        _open().pop()


def record(name: str, total: Float[Array, ""], count: Float[Array, ""], weight: float = 0.0) -> None:
    """Records a sum over tokens, whose mean is reported as the metric `layers_<name>`.

    Args:
      name: equal names add up over layers.
      total: the sum over the valid tokens of all rows, as a shard or a span has them.
      count: how many tokens that are.
      weight: of the mean in the training loss.
    """
    if collecting():
        total, count = jnp.float32(total), jax.lax.stop_gradient(jnp.float32(count))
        add({name: Record(total, count, weight * total, jnp.float32(1))})


def add(records: dict[str, Record]) -> None:
    """Adds records that were collected within."""
    if collecting():
        found = _open()[-1]
        for name, each in records.items():
            found[name] = Record(*map(jnp.add, found[name], each)) if name in found else each
