"""Eight simulated devices, set before jax starts, so that every sharding law runs on a laptop's CPU.

The compiler's back end leaves out its optimisations, and where jaxlib still has it, the older of its two emitters of
fused loops is used: a test runs a program once, and so compiles it in a fifth of the time.
Compiled programs are dropped now and then: those of all tests together would fill a laptop's memory. Python looks for
garbage less often than it would: tracing makes objects by the hundred thousand, few of them garbage.
"""

import gc
import itertools
import os
from importlib import metadata

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

gc.set_threshold(100_000, 10, 10)

_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _drop_programs():
    yield
    if next(_TESTS) % 25 == 0:
        import jax

        jax.clear_caches()
        gc.collect()
