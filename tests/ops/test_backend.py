"""A program is traced for the devices of the ambient mesh, not for this machine's."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from longctx import config
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel
from longctx.ops.backend import platform


def test_the_platform_is_that_of_the_mesh():
    """Inside of a program and of an island in it too. Seen to fail: `platform` asks for the default backend alone."""
    assert platform() == "cpu"
    block = config.Block(MIXERS["gla"].Config(), MLPS["relu2"].Config())
    options = config.Model(("only",), {"only": block}, width=8)
    model = nnx.eval_shape(lambda: LanguageModel(options, 16, nnx.Rngs(params=0)))
    assert model.dtype == jnp.float32
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("context",), (AxisType.Auto,), abstract_device=device)
    found = []

    def island(x):
        found.append(platform())
        return x

    def program(x):
        found.append(platform())
        split = jax.P("context")
        return jax.shard_map(island, in_specs=split, out_specs=split, axis_names={"context"}, check_vma=False)(x)

    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(program).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
        assert model.dtype == jnp.bfloat16
    assert found == ["tpu", "tpu"]
