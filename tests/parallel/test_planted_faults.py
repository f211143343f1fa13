"""Faults that sequence-sharded layers have had, planted one by one: what each breaks, and what it leaves whole.

`docs/context_parallelism.md` lists them; its table is held to what is found here. Four devices, shards of 8 tokens.
"""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import attend
from laws import spans

from longctx import config
from longctx.ops import LINEAR_SCAN
from longctx.ops.patterns import Causal, Sinks, Window
from longctx.parallel import attention as sharded
from longctx.parallel import halo, mesh, prefix, ring, sequence, simulate
from longctx.typing import Segments

SHARDS, LENGTH = 4, 32
TOLERANCE = 1e-5
# Documents: one that continues the state, one that ends and one that begins at an edge; padding first and last; one
# that goes on through three shards; one that begins two tokens before an edge.
ROWS = ([5, 11, 14, -2], [-2, 20, 10])
NEAR = Causal() & (Window(5) | Sinks(2))


def segments():
    rows = [[i if n > 0 else 0 for i, n in enumerate(row, 1) for _ in range(abs(n))] for row in ROWS]
    return Segments.from_ids(np.array(rows))


def arrays(*shapes):
    return [jax.random.normal(jax.random.key(i), (2, *shape)) for i, shape in enumerate(shapes)]


def log_decay(gate):
    return -0.1 * jnp.abs(gate)  # slow, so that what enters a shard is seen at its end


def recurrence(x, gate, state):
    return sequence.run(LINEAR_SCAN, (x, log_decay(gate)), state=state, segments=segments())[0]


def entering():
    """The states that enter the shards, by the sharded form's own parts."""
    x, gate, state = CASES["recurrence"][1]

    def shard(x, gate, state, segments):
        transition = LINEAR_SCAN.transition(*LINEAR_SCAN.prepare((x, log_decay(gate)), segments=segments).span)
        return prefix.entering(LINEAR_SCAN, transition, state, "context")[None]

    row, whole, out = jax.P(None, "context"), jax.P(), jax.P("context")
    island = jax.shard_map(
        shard, in_specs=(row, row, whole, row), out_specs=out, axis_names={"context"}, check_vma=False
    )
    return jax.jit(island)(x, gate, state, segments())


# What the sharded form computes, its arrays, and the same shard by shard on one device.
CASES = {
    "recurrence": (
        recurrence,
        arrays((LENGTH, 3), (LENGTH, 3), (3,)),
        lambda x, gate, state: simulate.recurrence(
            LINEAR_SCAN, (x, log_decay(gate)), state=state, shards=SHARDS, segments=segments()
        )[0],
    ),
    "halo": (
        lambda q, k, v: attend(q, k, v, NEAR, segments()),
        arrays(*[(LENGTH, 1, 4)] * 3),
        lambda q, k, v: simulate.halo(q, k, v, NEAR, segments(), SHARDS),
    ),
    "ring": (
        lambda q, k, v: attend(q, k, v, Causal(), segments()),
        arrays(*[(LENGTH, 1, 4)] * 3),
        lambda q, k, v: simulate.ring(q, k, v, Causal(), segments(), SHARDS),
    ),
}


def run(f, case):
    """Outputs, and the gradients of what has a time, side by side."""
    given = CASES[case][1]
    timed = [i for i, x in enumerate(given) if x.shape[1] == LENGTH]

    def loss(*arrays):
        y = f(*arrays)
        return jnp.sum(jnp.sin(y) * segments().valid.reshape(2, LENGTH, *(1,) * (y.ndim - 2))), y

    gradients, y = jax.jit(jax.grad(loss, argnums=timed, has_aux=True))(*given)
    return {"outputs": y, "gradients": jnp.concatenate([x.reshape(2, LENGTH, -1) for x in gradients], axis=2)}


@functools.cache
def on_one_device(case):
    found = run(CASES[case][2], case)
    if case == "recurrence":
        x, gate, state = CASES[case][1]
        found["states"] = simulate.recurrence(
            LINEAR_SCAN, (x, log_decay(gate)), state=state, shards=SHARDS, segments=segments()
        )[2]
    return found


def compared(case):
    """For states, outputs and gradients: the shards in which they differ from the simulation, and the sentence."""
    with jax.set_mesh(mesh.make(config.Mesh(1, SHARDS, 1))):
        found = run(CASES[case][0], case) | ({"states": entering()} if case == "recurrence" else {})
    said = {}
    for what, expected in on_one_device(case).items():
        if what == "states":
            error = np.abs(np.asarray(found[what] - expected)).reshape(SHARDS, -1).max(1) / np.abs(expected).max()
            said[what] = ", ".join(map(str, np.flatnonzero(error > TOLERANCE)))
        else:
            difference = simulate.first_difference(found[what], expected, segments(), SHARDS, TOLERANCE)
            said[what] = difference.split("in shards ")[1] if difference else ""
    return said


def local(segments):
    """What a shard makes of its ids alone: it does not know what stands before it."""
    return segments and Segments.from_ids(segments.ids)


def positions_restart(patch):
    patch.setattr(sharded, "attention", lambda *a, f=sharded.attention: f(*a[:3], local(a[3]), *a[4:]))


def of_segments(patch, name, change):
    """A form of the family that is given other segments: the last argument but one."""
    form = getattr(LINEAR_SCAN, name)
    patch.setitem(vars(LINEAR_SCAN), name, lambda *a: form(*a[:-2], change(a[-2]), a[-1]))


def start_lost(patch):
    for name in ("transition", "chunked"):
        of_segments(patch, name, local)


def earlier_document_leaks(patch):
    of_segments(patch, "transition", lambda x: dataclasses.replace(x, starts=jnp.zeros_like(x.starts)))


def padding_counts(patch):
    of_segments(patch, "transition", lambda x: dataclasses.replace(x, ids=jnp.maximum(x.ids, 1)))


def halo_off_by_one(patch):
    def last(tree, n, axis_name, f=halo.last):
        return jax.tree.map(lambda x: x[:, :n], f(tree, n + 1, axis_name))

    patch.setattr(halo, "last", last)


def wrong_neighbour(patch):
    def shift(tree, hop, axis_name):
        pairs = [(i + hop, i) for i in range(SHARDS - hop)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)

    patch.setattr(prefix, "shift", shift)


def gradient_stopped(patch):
    patch.setattr(prefix, "entering", lambda *a, f=prefix.entering: jax.lax.stop_gradient(f(*a)))


def gradient_not_sent_back(patch):
    shift = prefix.shift
    patch.setattr(prefix, "shift", lambda tree, hop, axis_name: tree if hop < 0 else shift(tree, hop, axis_name))


def gradient_away_from_home(patch):
    def onward(tree, axis_name, step=1, f=ring.onward):
        travels = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(tree))
        return tree if travels else f(tree, axis_name, step)  # keys go with their ids; gradients alone

    patch.setattr(ring, "onward", onward)


def counted_twice(patch):
    class Nothing:
        def __init__(self, _):
            pass

        def seen(self, positions):
            return jnp.zeros(positions.shape, bool)

    patch.setattr(sharded, "terms", lambda pattern: (pattern,))  # window and anchors in one part
    patch.setattr(sharded, "Keys", Nothing)  # and of the halo none is known to be an anchor


def zeros_applied(patch):
    patch.setattr(jax.lax, "axis_index", lambda name, f=jax.lax.axis_index: jnp.maximum(f(name), 1))


def order_swapped(patch):
    patch.setattr(prefix, "exclusive", lambda compose, *a, f=prefix.exclusive: f(lambda p, q: compose(q, p), *a))


FAULTS = {
    "positions restart at an edge": (positions_restart, "ring"),
    "start lost at an edge": (start_lost, "recurrence"),
    "earlier document leaks": (earlier_document_leaks, "recurrence"),
    "padding counts": (padding_counts, "recurrence"),
    "halo off by one": (halo_off_by_one, "halo"),
    "halo of the wrong neighbour": (wrong_neighbour, "halo"),
    "key counted twice": (counted_twice, "halo"),
    "gradient stopped": (gradient_stopped, "recurrence"),
    "gradient not sent back": (gradient_not_sent_back, "recurrence"),
    "gradient away from home": (gradient_away_from_home, "ring"),
    "zeros used as a transition": (zeros_applied, "recurrence"),
    "order swapped": (order_swapped, "recurrence"),
}
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "context_parallelism.md"


def rows():
    """The page's table: a fault, then where states, outputs and gradients differ, and the law that catches it."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("*"): rest for name, *rest in cells}


def test_the_page_lists_the_faults():
    assert list(rows()) == list(FAULTS)


@pytest.mark.parametrize("case", CASES)
def test_without_a_fault(case):
    """The sharded form is the simulation, and the simulation is the op on the whole row. Float32, 1e-5."""
    assert not any(compared(case).values())
    whole = run(CASES[case][0], case)  # without a mesh
    for what in ("outputs", "gradients"):
        assert simulate.first_difference(on_one_device(case)[what], whole[what], segments(), SHARDS, 1e-5) is None


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_breaks(name, monkeypatch):
    """Entering states, outputs and gradients differ in the shards that the page says, and nowhere else."""
    plant, case = FAULTS[name]
    on_one_device(case)  # before the fault
    plant(monkeypatch)
    said = compared(case)
    found = [said.get(what, "none") or "equal" for what in ("states", "outputs", "gradients")]
    assert found == rows()[name][:3]


# The ring's has two groups of heads, which four devices cannot share.
LAYERS = {"recurrence": "rglru", "halo": "attention/window+sinks", "ring": "attention/everything"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_law_that_catches_a_fault(name, monkeypatch):
    """The law that the page names fails under the fault."""
    plant, case = FAULTS[name]
    module, arguments = {
        "test_shard": ("laws.test_shard", (LAYERS[case],)),
        "test_shards_equal_whole": ("test_sequence", ("linear_scan", (2, 4, 1))),
    }[rows()[name][3].strip("`")]
    law = getattr(importlib.import_module(module), rows()[name][3].strip("`"))
    plant(monkeypatch)
    monkeypatch.setattr("laws.spans.program", spans.compiled)  # none that was compiled without the fault, or with it
    with pytest.raises(AssertionError):
        law(*arguments)


def test_the_first_difference_is_told():
    """Padding is not compared; a number that is not finite differs; the earliest token of any row comes first."""
    expected = np.ones((2, LENGTH, 3), np.float32)
    found = expected.copy()
    found[1, 0] = 5  # padding
    assert simulate.first_difference(found, expected, segments(), SHARDS) is None
    found[0, 17, 1] = 1.5
    found[1, 9, 2] = np.nan
    told = simulate.first_difference(found, expected, segments(), SHARDS)
    assert told == (
        "first at token 9 (row 1; shard 1, its token 1; document 2, position 7), by inf of the largest entry; in all 2 "
        "tokens, by at most inf, in shards 1, 2"
    )
