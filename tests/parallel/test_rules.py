"""The table of sharding rules, for parameters and for activations."""

import logging
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longctx import config
from longctx.parallel import mesh, rules
from longctx.planning import programs

SIZES = {"data": 2, "context": 2, "model": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), P(("context", "data"), "model")),
        (("vocab", "embed"), (6, 8), P("model", ("context", "data"))),
        (("embed", "mlp"), (3, 8, 6), P(None, ("context", "data"), "model")),  # a stack of three layers
        (("embed", "heads"), (6, 3), P("context", None)),  # what does not divide is left out
        (("embed", "embed"), (8, 8), P(("context", "data"), None)),  # each mesh axis once
        (("batch", "time", "width"), (4, 8, 16), P("data", "context", None)),
        (("batch", "time", "heads", "head"), (4, 1, 2, 16), P("data", None, "model", None)),
        ((None, "mlp"), (5, 4), P(None, "model")),
    ],
)
def test_spec(axes, shape, expected):
    assert rules.spec(axes, shape, SIZES) == expected


def test_spec_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"w of shape \(2, 3, 4\) has the axes \('embed',\)"):
        rules.spec(("embed",), (2, 3, 4), SIZES, "w")
    with pytest.raises(ValueError, match="an axis 'embde'; choose among batch"):
        rules.spec(("embde",), (2,), SIZES)


class Layer(nnx.Module):
    def __init__(self, key):
        self.weight = nnx.Param(jax.random.normal(key, (8, 6)), axes=("embed", "mlp"))
        self.odd = nnx.Param(jnp.ones(7), axes=("mlp",))
        self.plain = nnx.Param(jnp.ones((3, 3)))


def test_shardings_of_parameters(caplog):
    made = mesh.make(config.Mesh(data=2, context=2, model=2))

    def stacked():
        return nnx.split(nnx.vmap(Layer)(jax.random.split(jax.random.key(0), 3)), nnx.Param)[1]

    with caplog.at_level(logging.WARNING):
        shardings = rules.shardings(made, jax.eval_shape(stacked))
        rules.shardings(made, jax.eval_shape(stacked))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "odd" in told[0]
    assert "mlp=7 is not a multiple of the 2 devices along 'model'" in told[0]
    specs = {name: leaf.get_value().spec for name, leaf in shardings.items()}
    assert specs == {
        "weight": P(None, ("context", "data"), "model"),
        "odd": P(None, None),
        "plain": P(None, None, None),
    }
    params = jax.jit(lambda: nnx.as_pure(stacked()), out_shardings=nnx.as_pure(shardings))()
    assert params["weight"].addressable_shards[0].data.shape == (3, 2, 3)


def test_constrain():
    x = jnp.ones((4, 8, 6))
    assert rules.constrain(x, ("batch", "time", "width")) is x
    with jax.set_mesh(mesh.make(config.Mesh(data=2, context=2, model=2))):
        split = jax.jit(lambda x: rules.constrain(2 * x, ("batch", "time", "width")))
        assert split(x).sharding.spec == P("data", "context")
        assert split(x[:1, :1]).sharding.is_fully_replicated  # one token of one row divides by nothing
        island = jax.shard_map(
            lambda x: rules.constrain(x, ("batch", "time", "mlp")),
            in_specs=P(None, "context"), out_specs=P(None, "context"), axis_names={"context"},
        )  # fmt: skip
        assert jax.jit(island)(x).sharding.spec == P("data", "context", "model")
        with pytest.raises(ValueError, match="name each dimension once"):
            rules.constrain(x, ("batch", "time"))


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_a_parameter_is_gathered_over_one_axis_after_the_other(axes):
    """A product's weight, in its two gathers, and its gradient as without a mesh, scattered over `context` first.

    Both along the first dimension, whichever of the weight's that is.
    Seen to fail: the gathers in one (one all-gather, of all devices); the plain transpose of the two steps, which asks
    for the whole sum first; the gradient doubled; a weight whose outputs are split gathered as it is.
    """
    x, w = jax.random.normal(jax.random.key(0), (4, 16, 8)), jax.random.normal(jax.random.key(1), (8, 6))
    turned = axes[0] != "embed"
    x, w = (x[..., :6], w.T) if turned else (x, w)

    def loss(w, x):
        return jnp.sum(jnp.sin(x @ rules.gathered(w, axes)))

    assert rules.gathered(w, axes) is w
    expected = jax.value_and_grad(loss)(w, x)
    with jax.set_mesh(made := mesh.make(config.Mesh(data=2, context=4))):
        split = rules.spec(axes, w.shape, made.shape)
        assert split == (P(None, ("context", "data")) if turned else P(("context", "data"), None))
        places = [jax.sharding.NamedSharding(made, spec) for spec in (split, P("data", "context"))]
        step = jax.jit(jax.value_and_grad(loss), in_shardings=places, out_shardings=(None, places[0]))
        found = step(w, x)
        program = step.lower(w, x).compile().as_text()
        steps = re.findall(r"spec=P\((.*)\)\)\n", str(jax.make_jaxpr(jax.grad(loss))(w, x)))
    assert steps == ["'context', None", "None, None", "'context', None", "('context', 'data'), None"]
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    gathers = [run.instruction for run in programs.messages(program, 8) if run.instruction.op == "all-gather"]
    assert [gather.type.split("{")[0] for gather in gathers] == ["f32[6,2]" if turned else "f32[2,6]", "f32[8,6]"]
