"""Eight simulated devices, set before jax starts, so that every sharding law runs on a laptop's CPU.

The compiler's back end leaves out its optimisations: a test runs a program once, and so compiles it in half the time.
Compiled programs are dropped now and then: those of all tests together would fill a laptop's memory.
"""

import itertools
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _drop_programs():
    yield
    if next(_TESTS) % 25 == 0:
        import jax

        jax.clear_caches()
