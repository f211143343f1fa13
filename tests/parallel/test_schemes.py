"""What each scheme sends, read off the compiled programs, next to the model of costs; and what the model chooses."""

import dataclasses
import logging
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longctx import config
from longctx.errors import UsageError
from longctx.layers.attention import Attention
from longctx.ops.attention import ATTENTION, attention_partial
from longctx.ops.patterns import Causal
from longctx.parallel import attention as sharded
from longctx.parallel import mesh, schemes, tree
from longctx.parallel.schemes import Case, Scheme
from longctx.typing import Segments

DEVICES, HEADS, GROUPS, KEYS, WIDTH = 8, 8, 2, 32, 16
SCHEMES = [
    Scheme("ring", 1, False),
    Scheme("ring", 1, True),
    Scheme("heads", 8, False),
    Scheme("both", 2, True),
    Scheme("gather", 1, True),
]
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"(f32|bf16|s32|pred)\[([\d,]*)\]")
SIZES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}


def bytes_sent(text):
    """By a device in a compiled program, whose permutes and reductions in loops count as often as these run."""
    computations, entry = {}, None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif " = " in line:
            current.append(line.split(" = ", 1)[1])

    def of(name):
        return sum(map(cost, computations[name]))

    def cost(line):
        assert not re.search(r"[\])}] (all-gather|all-to-all|reduce-scatter)\(", line)
        if found := re.match(r"(.*?) (?:collective-permute|all-reduce)\(", line):
            arrays = ARRAY.findall(found[1])
            return sum(SIZES[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays)
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line)
        inside = sum(map(of, called))
        if " while(" in line and inside:
            inside *= int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
        return inside

    return of(entry)


def compiled(scheme, length, monkeypatch, gradients):
    """The program on shards, one row of `length` tokens, in float32: XLA:CPU permutes bfloat16 as float32."""
    monkeypatch.setattr(schemes, "choose", lambda case, named: scheme)

    def run(q, k, v, segments):
        call = ATTENTION.prepare((q,), (k, v), segments=segments, options=ATTENTION.options(Causal(), block=64))
        return sharded.attention(*call[:4], call.options, "context")

    def forward(q, k, v, segments):
        spec = jax.P(None, "context")
        return jax.shard_map(run, in_specs=spec, out_specs=spec, axis_names={"context"}, check_vma=False)(
            q, k, v, segments
        )

    def loss(q, k, v, segments):
        return jnp.sum(jnp.sin(forward(q, k, v, segments).astype(jnp.float32)))

    with jax.set_mesh(mesh.make(config.Mesh(1, DEVICES, 1))):
        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))
        shapes = [((1, length, *each), jnp.float32) for each in ((HEADS, KEYS), (GROUPS, KEYS), (GROUPS, WIDTH))]
        arrays = [jax.ShapeDtypeStruct(*each, sharding=place) for each in shapes]
        segments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            jax.eval_shape(lambda: Segments.single(1, length)),
        )
        f = jax.value_and_grad(loss, argnums=(0, 1, 2)) if gradients else forward
        return jax.jit(f).lower(*arrays, segments).compile()


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes(scheme, gradients, monkeypatch):
    """What a device sends is what the model of costs says, within a fiftieth, at T and 4T.

    Seen to fail: the ring's last hop sent home for nothing; a scheme's results sent in another dtype than said.
    """
    for length in (512, 2048):
        sent = bytes_sent(compiled(scheme, length, monkeypatch, gradients).as_text())
        case = Case(1, length // DEVICES, HEADS, GROUPS, KEYS, WIDTH, 4, DEVICES, (2, 4), (1, 2), "cpu")
        cost = schemes.cost(case, scheme, schemes.PLATFORMS["cpu"])
        said = cost.forward + (cost.backward if gradients else 0)
        print(f"{scheme}, {length} tokens: {sent} bytes sent, {said:.0f} said, {sent / said:.3f}")
        assert 0.98 <= sent / said <= 1.02  # of results, the logsumexps stay where nobody asks for them


def test_bytes_of_the_tree():
    """Decoding over a shared cache sends three small reductions, however long the cache. Fails if keys are gathered."""

    def sent(length):
        def run(q, k, v, query, held):
            return tree.merged(attention_partial(q, k, v, Causal(), query, held), "context").output

        with jax.set_mesh(mesh.make(config.Mesh(1, DEVICES, 1))):
            shard, whole = jax.P(None, "context"), jax.P()
            specs = whole, shard, shard, whole, shard
            made = jax.shard_map(run, in_specs=specs, out_specs=whole, axis_names={"context"}, check_vma=False)
            shapes = (1, HEADS, KEYS), (length, GROUPS, KEYS), (length, GROUPS, WIDTH)
            q, k, v = (jnp.zeros((1, *shape)) for shape in shapes)
            segments = Segments.single(1, 1, length), Segments.single(1, length)
            return bytes_sent(jax.jit(made).lower(q, k, v, *segments).compile().as_text())

    assert sent(512) == sent(2048) == 4 * HEADS * (WIDTH + 2)


def case(length, devices=8, heads=32, groups=8, platform="tpu"):
    """One row in bfloat16 of heads of 128, on a device of a context axis."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    sharing = tuple(n for n in divisors if n > 1 and heads % n == 0)
    return Case(1, length, heads, groups, 128, 128, 2, devices, sharing, tuple(divisors[:-1]), platform)


def test_choices(caplog):
    """What the model says of a few cases, and that `auto` takes the quickest of what fits, and says so once.

    Seen to fail: the slowest device's work taken for the mean; gathered keys of any size allowed; of what holds more
    than its share of the memory, nothing but the ring.
    """
    constants = schemes.PLATFORMS["tpu"]
    balanced, plain = (schemes.cost(case(16384), Scheme("ring", 1, which), constants) for which in (True, False))
    assert (balanced.slowest, plain.slowest) == pytest.approx((1, 2 - 1 / 8))
    assert balanced.seconds < 0.6 * plain.seconds
    assert balanced.forward > plain.forward
    schemes.choose.cache_clear()
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert schemes.choose(case(16384), "auto").name == "heads"  # which a device has enough of
    assert len(caplog.records) == 1
    assert re.search(r"8 devices of 16384 tokens: heads \(balanced ring: .* bytes sent, 9 messages,", caplog.text)
    assert schemes.choose(case(16384, heads=3, groups=1), "auto") == Scheme("ring", 1, True)  # nobody can share them
    assert schemes.choose(case(16384, devices=32), "auto").name == "both"  # too far from each other for all-to-all
    assert schemes.choose(case(256, groups=1, platform="gpu"), "auto").name == "gather"  # few keys, slow messages
    long = case(1 << 20, heads=3, groups=1, platform="gpu")
    gathered, ring = (
        schemes.cost(long, Scheme(name, 1, True), schemes.PLATFORMS["gpu"]) for name in ("gather", "ring")
    )
    assert gathered.seconds < ring.seconds
    assert schemes.choose(long, "auto").name == "ring"  # all keys would not fit
    assert schemes.choose(long, "gather").name == "gather"
    large = case(1 << 18, groups=4)  # every way holds more than a layer's share
    assert schemes.choose(large, "auto").name == "heads"  # as much as a ring, and sends less


@pytest.mark.parametrize("named", ["ring", "gather"])
def test_an_experiment_can_name_it(named, monkeypatch):
    """Seen to fail: the option not passed on by the layer."""
    seen = []
    choose = schemes.choose
    monkeypatch.setattr(schemes, "choose", lambda case, name: seen.append((case, name)) or choose(case, name))
    layer = Attention(32, Attention.Config(heads=4, kv_heads=2, context_parallel=named), nnx.Rngs(0))
    with jax.set_mesh(mesh.make(config.Mesh(2, 2, 2))):
        jax.eval_shape(lambda x: layer(x, Segments.single(2, 256))[0], jnp.zeros((2, 256, 32)))
    expected = Case(1, 128, 2, 1, 32, 32, 4, 2, (2,), (1,), "cpu")
    assert {name for _, name in seen} == {named}
    assert [dataclasses.asdict(found) for found, _ in seen] == [dataclasses.asdict(expected)] * len(seen)


def test_an_unknown_name_is_a_problem():
    with pytest.raises(UsageError, match="context_parallel is 'zigzag'; choose one of auto, ring, heads, both, gather"):
        Attention.Config(context_parallel="zigzag")
