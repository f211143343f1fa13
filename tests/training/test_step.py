"""The loss by its definition, micro-batches, and the same step on one device and on many."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.layers import reports
from longctx.parallel import mesh as meshes
from longctx.parallel import relay
from longctx.training.step import Program, new_model
from longctx.typing import Segments

VOCABULARY = 40
STAGE = config.Stage(steps=1, batch=8, length=16)


@pytest.fixture(scope="module")
def batch():
    """Two documents and padding in every row; weights that differ from row to row, so that means of means differ."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (STAGE.batch, STAGE.length + 1), np.int32)
    ids = np.repeat([[1] * 5 + [2] * 9 + [0] * 2], STAGE.batch, 0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(9), 0, 0]], STAGE.batch, 0).astype(np.int32)
    weights = (ids > 0) * (rng.random(ids.shape) < np.linspace(0.1, 1, STAGE.batch)[:, None])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights.astype(np.float32),
        "answers": (weights > 0) & (rng.random(ids.shape) < 0.3),
        "segment_ids": ids,
        "positions": positions,
    }


def run(experiment, batch, steps=2):
    """The metrics of the steps, and the parameters after them."""
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, VOCABULARY, mesh)
        state, step = program.init(), program.compile(STAGE)
        sharding = program.batch_sharding((STAGE.batch, STAGE.length))
        metrics = []
        for i in range(steps):
            rows = {name: jax.device_put(x, sharding) for name, x in batch.items()}
            state, found = step(state, rows, program.rate(i))
            metrics.append({name: float(value) for name, value in found.items()})
    return metrics, jax.tree.map(np.asarray, state.params)


def close(found, expected, atol=2e-5):
    """Tolerance: 2e-5 absolute, of losses near 4 and parameters near 1 after two Adam steps of up to 3e-3."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=atol), found, expected)


@pytest.fixture(scope="module")
def experiment(parse):
    return dataclasses.replace(parse(answer_weight=3.0, label_smoothing=0.1, z_loss=0.2), mesh=config.Mesh(1, 1, 1))


@pytest.fixture(scope="module")
def plain(cache, experiment, batch):
    return run(experiment, batch)


def test_loss_is_the_weighted_mean_of_the_definition(experiment, batch, plain):
    """Answers weigh three times as much, and the vocabulary shares a tenth of every target; z-loss is told apart.

    Seen to fail: the smoothing not handed to the loss; the loss with the z-loss in it.
    """
    model = new_model(experiment, VOCABULARY)
    segments = Segments.from_ids(batch["segment_ids"], batch["positions"])
    hidden, _ = jax.jit(lambda tokens: model(tokens, segments))(jnp.asarray(batch["tokens"]))
    logits = np.asarray(model.logits(hidden), np.float64)
    log_mass = np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = logits - log_mass
    losses = -0.9 * np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] - 0.1 * log_p.mean(-1)
    weights = batch["weights"] * np.where(batch["answers"], 3, 1)
    found = plain[0][0]
    np.testing.assert_allclose(found["loss"], (weights * losses).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        found["z_loss"], 0.2 * (weights * log_mass[..., 0] ** 2).sum() / weights.sum(), rtol=1e-5
    )
    hits = (logits.argmax(-1) == batch["targets"]) & batch["answers"]
    assert (found["hits"], found["answers"]) == (hits.sum(), batch["answers"].sum())


def test_micro_batches_are_one_batch(cache, experiment, batch, plain):
    """Four micro-batches of unequal weight. Guards against normalising each by its own weight."""
    training = dataclasses.replace(experiment.training, stages=((9, 8, 16),), accumulate=4)
    close(run(dataclasses.replace(experiment, training=training), batch), plain)


def test_a_mesh_changes_nothing(cache, experiment, batch, plain):
    """Batch, sequence and heads split, parameters split over all."""
    training = dataclasses.replace(experiment.training, accumulate=2)
    close(run(dataclasses.replace(experiment, training=training, mesh=config.Mesh(2, 2, 2)), batch), plain)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_add_their_losses(parse, batch, remat):
    """Two layers' indexers learn from the sum of their mean losses, whatever is recomputed and in micro-batches too;
    the metric is the mean of both. 1e-5 of the largest entry.

    Seen to fail: sums over tokens for means; one layer's records for all; a micro-batch counted whole.
    """
    mixer = {"kind": "indexer_topk", "heads": 2, "kv_heads": 1, "head_width": 8, "index_heads": 2, "count": 3}
    experiment = parse(mixer | {"kl_weight": 0.5}, accumulate=2, stages=((9, 8, 16),))
    options = dataclasses.replace(experiment.model, repeats=2, remat=remat)
    experiment = dataclasses.replace(experiment, model=options, mesh=config.Mesh(1, 1, 1))
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, VOCABULARY, mesh)
        params = nnx.as_pure(nnx.split(new_model(experiment, VOCABULARY), nnx.Param)[1])
        arrays = {name: jnp.asarray(x) for name, x in batch.items()}
        found, sums = jax.jit(lambda params: program._gradient(params, arrays, arrays["weights"].sum()))(params)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def definition(params):
        model = program.model(params)
        segments = Segments.from_ids(arrays["segment_ids"], arrays["positions"])
        x, means = model.embedding[...][arrays["tokens"]] * options.width**0.5, []
        for i in range(2):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks[0])
            with reports.collected() as recorded:
                x, _ = block(x, segments)
            means.append(recorded["indexer_kl"].total / (arrays["segment_ids"] > 0).sum())
        return 0.5 * sum(means), sum(means) / 2

    (_, mean), expected = definition(params)
    np.testing.assert_allclose(sums.recorded["indexer_kl"].mean, mean, rtol=1e-5)
    for name in ("index_query", "index_key", "index_weight"):
        a, b = (tree["blocks"][0]["mixer"][name]["weight"] for tree in (found, expected))
        assert np.abs(b).max() > 1e-4
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_no_device_holds_a_whole_matrix(experiment):
    """Parameters and both moments are split eight ways where the mesh has eight devices."""
    mesh = meshes.make(config.Mesh(2, 2, 2))
    with jax.set_mesh(mesh):
        program = Program.make(experiment, VOCABULARY, mesh)
        state = program.init()
    alone = nnx.as_pure(nnx.split(new_model(experiment, VOCABULARY), nnx.Param)[1])
    close(state.params, alone, atol=1e-6)
    moments = state.optimizer[1][0]
    for tree in (state.params, moments.mu, moments.nu):
        shard = tree["embedding"].addressable_shards[0].data
        assert shard.size * 8 == tree["embedding"].size


def test_rates_and_seeds_share_a_program(experiment):
    """A sweep compiles once. Guards against a schedule traced into the step, and a seed into `init`."""
    stages = (config.Stage(90, 8, 16),)
    training = dataclasses.replace(
        experiment.training, learning_rate=1e-4, final_learning_rate=0.5, warmup_steps=7, stages=stages
    )
    mesh = meshes.make(experiment.mesh)
    texts = []
    with jax.set_mesh(mesh):
        for each in (experiment, dataclasses.replace(experiment, training=training, seed=5)):
            program = Program.make(each, VOCABULARY, mesh)
            texts.append((program.trace(STAGE).lower().as_text(), program._init.lower(np.uint32(0)).as_text()))
    assert texts[0] == texts[1]


def test_the_state_is_donated(cache, experiment, batch):
    """A step holds one copy of the state."""
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = Program.make(experiment, VOCABULARY, mesh)
        state = program.init()
        program.compile(STAGE)(state, {name: jnp.asarray(x) for name, x in batch.items()}, program.rate(0))
    assert state.params["embedding"].is_deleted()


@pytest.mark.parametrize(
    "mixer",
    [
        {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8},
        {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 8, "context_parallel": "ring"},
        pytest.param({"kind": "mamba2", "heads": 2, "key_width": 8, "value_width": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda mixer: mixer["kind"],
)
def test_equal_blocks_recomputed_over_a_mesh(parse, mixer, monkeypatch):
    """Three blocks alike, recomputed, on rows and sequences split at once: the compiler shares what is equal in them.

    Seen to fail with jax 0.10.2 (PartitionId is not supported) when the scan asks for the device's number inside its
    own derivative.
    """
    monkeypatch.setattr(relay, "blocks", lambda transition, devices: 0)  # the scan, also where it sends more
    experiment = parse(mixer)
    model = dataclasses.replace(experiment.model, pattern=("only",) * 3, remat="full")
    experiment = dataclasses.replace(experiment, model=model, mesh=config.Mesh(2, 4, 1))
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        Program.make(experiment, 64, mesh).compile(config.Stage(1, 2, 64))
