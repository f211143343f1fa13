"""TPU pods and GPU hosts as their compilers describe them, on a machine that has none."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from longctx.errors import UsageError
from longctx.planning.chips import GPUS, NETWORK, PROCESSORS, TPUS, Chip

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server, which would hang elsewhere
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may plan at a time
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: with these two libtpu does not warn that it finds none
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_CONFIGURATION = {"v4": {"chip_config_name": "megacore"}}  # a chip's two cores are one device, as jax has them there
_EXAMPLES = "v4:2x2x2, v5e:2x4, v5e:16x16, v5p:4x4x8, v5p:8x8x8, v6e:4x4, v6e:16x16"
_GPU_EXAMPLES = "a100:2x8, h100:1x8, h200:4x8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs can be compiled for, none of which is here.

    Attributes:
      name: such as "v5p:4x4x8" or "h100:4x8".
      devices: all of them.
      device: what one of them has. Of GPUs in several hosts, `links` are those between hosts.
      hosts: of GPUs; 0 for a TPU pod.
    """

    name: str
    devices: tuple[jax.Device, ...]
    device: Chip
    hosts: int = 0


def describe(name: str) -> Topology:
    """The devices of a name: a TPU, a colon and its chips along each axis of the torus, or a GPU, hosts x GPUs in each.

    It must be called before JAX has begun to use a device: this process works on the CPU from then on.

    Raises:
      UsageError: there is no such topology, or what compiles for it is missing.
    """
    kind, _, shape = name.partition(":")
    kind = kind.lower()
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        return _pod(name, kind)
    if kind in GPUS and re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
        return _gpus(name, kind, *map(int, shape.split("x")))
    raise UsageError(
        f"--topology is '{name}'; give one of {', '.join(TPUS)}, a colon, and the chips along each axis, such as "
        f"{_EXAMPLES}; or one of {', '.join(GPUS)}, a colon, and hosts x GPUs in each, such as {_GPU_EXAMPLES}."
    )


def _pod(name: str, kind: str) -> Topology:
    """That of TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("libtpu, which compiles for TPUs, is not installed; run pip install -e '.[plan]' first.")
    jax.config.update("jax_platforms", "cpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices = tuple(topologies.get_topology_desc(name, platform="tpu", **_CONFIGURATION.get(kind, {})).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UsageError(f"--topology={name} is no pod ({reason}); there are for example {_EXAMPLES}.") from error
    return Topology(name, devices, TPUS[kind])


def _gpus(name: str, kind: str, hosts: int, gpus: int) -> Topology:
    """That of GPUs. Any number of them compiles: XLA knows no board."""
    if any(importlib.util.find_spec(package) is None for package in ("jax_cuda13_plugin", "jax_plugins")):
        raise UsageError(
            "jax-cuda13-plugin and jax-cuda13-pjrt, which compile for GPUs, are not installed; run "
            "pip install -e '.[plan-gpu]' first."
        )
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # finds the plugins
    shape = f"{hosts}x1x{gpus}"  # parts that NVLink joins, hosts of such a part, GPUs of a host
    described = topologies.get_topology_desc(kind, platform="cuda", topology=shape, target_config=_target(kind))
    chip = GPUS[kind] if hosts == 1 else dataclasses.replace(GPUS[kind], links=NETWORK)
    return Topology(name, tuple(described.devices), chip, hosts)


def _target(kind: str) -> str:
    """A GPU as XLA's `GpuTargetConfigProto`. It has no cuDNN, which would have to be here to compile for it."""
    own, chip = PROCESSORS[kind], GPUS[kind]
    major, minor = own.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{own.name}"
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {own.count}
          fpus_per_core: {own.lanes}
          clock_rate_ghz: {own.clock}
          l2_cache_size: {own.cache}
          memory_bandwidth: {chip.bandwidth:.0f}
          device_memory_size: {chip.memory}
          shared_memory_per_core: {own.shared}
          shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {own.shared - 2**10}
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
        }}"""
