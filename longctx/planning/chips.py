"""What Google and NVIDIA publish of their chips."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

GIB = 2**30


class Passes(NamedTuple):
    """Products in bfloat16 that take as long as one in float32, by JAX's precision."""

    default: float
    high: float
    highest: float


OF_TPU = Passes(1, 3, 6)  # which makes it of so many


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of a chip, per second where they are rates.

    Attributes:
      flops: of matrix products in bfloat16.
      memory: bytes of HBM.
      bandwidth: bytes between HBM and chip.
      links: bytes that a chip sends to others, over all its links together.
      passes: that products in float32 take.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float
    passes: Passes = OF_TPU


@dataclasses.dataclass(frozen=True)
class Processors:
    """What XLA wants to know of a GPU to compile for it, beside `Chip`; bytes, and of one multiprocessor.

    Attributes:
      name: as the driver says it.
      capability: major and minor number of the compute capability.
      count: multiprocessors.
      lanes: float32 operations at a time.
      shared: memory that the threads of a block share.
      cache: of the second level, of the whole GPU.
      clock: the highest, GHz.
    """

    name: str
    capability: tuple[int, int]
    count: int
    lanes: int
    shared: int
    cache: int
    clock: float


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications", 2026; links: half of what it calls bidirectional.
TPUS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 400e9),
}
# NVIDIA's data sheets of the SXM boards: products of dense matrices; links: NVLink, half of what it calls bandwidth.
# In float32 the tensor cores take TF32, at half the rate; at the precision "highest" they are not used.
GPUS = {
    "a100": Chip(312e12, 80 * 10**9, 2039e9, 300e9, Passes(2, 2, 312 / 19.5)),
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 450e9, Passes(2, 2, 989 / 67)),
    "h200": Chip(989e12, 141 * 10**9, 4800e9, 450e9, Passes(2, 2, 989 / 67)),
}
NETWORK = 50e9  # bytes that a GPU sends to other hosts: an assumption, one adapter of 400 Gb/s for each GPU
# The white papers of the architectures, and the table of compute capabilities in the CUDA programming guide.
PROCESSORS = {
    "a100": Processors("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 2**10, 40 * 2**20, 1.41),
    "h100": Processors("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
    "h200": Processors("NVIDIA H200", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
}
