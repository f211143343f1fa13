"""TPU pods as libtpu describes them, on a machine that has none, and what Google publishes of their chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from longctx.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of a chip, per second where they are rates.

    Attributes:
      flops: of matrix products in bfloat16.
      memory: bytes of HBM.
      bandwidth: bytes between HBM and chip.
      links: bytes that a chip sends to others, over all its links together.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications", 2026; links: half of what it calls bidirectional.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 400e9),
}
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server, which would hang elsewhere
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may plan at a time
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: with these two libtpu does not warn that it finds none
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_EXAMPLES = "v4:2x2x2, v5e:2x4, v5e:16x16, v5p:4x4x8, v5p:8x8x8, v6e:4x4, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod that programs can be compiled for.

    Attributes:
      name: such as "v5p:4x4x8".
      devices: of the pod, none of which is here.
      device: what one of them has; of a v4 chip there are two, each with half.
    """

    name: str
    devices: tuple[jax.Device, ...]
    device: Chip


def describe(name: str) -> Topology:
    """The pod of a name: the chip, a colon, and its chips along each axis of the torus.

    It must be called before JAX has begun to use a device: this process works on the CPU from then on.

    Raises:
      UsageError: there is no such pod, or libtpu is missing.
    """
    kind = name.split(":")[0].lower()
    if re.fullmatch(r"(rtx|gtx|[a-z]{1,2})\d{2,}\w*|gpu|cuda|rocm", kind) and not kind.startswith("v"):
        raise UsageError(
            f"--topology={name} names GPUs, for which nothing can be compiled on a machine without one; give a TPU "
            f"topology ({_EXAMPLES}), or train a few steps on the GPUs themselves."
        )
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", name.partition(":")[2]):
        raise UsageError(
            f"--topology is '{name}'; give one of {', '.join(CHIPS)}, a colon, and the chips along each axis, such as "
            f"{_EXAMPLES}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("libtpu, which compiles for TPUs, is not installed; run pip install -e '.[plan]' first.")
    jax.config.update("jax_platforms", "cpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices = tuple(topologies.get_topology_desc(name, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UsageError(f"--topology={name} is no pod ({reason}); there are for example {_EXAMPLES}.") from error
    cores = 1 + max(device.core_on_chip for device in devices)
    chip = CHIPS[kind]
    device = Chip(chip.flops / cores, chip.memory // cores, chip.bandwidth / cores, chip.links / cores)
    return Topology(name, devices, device)
