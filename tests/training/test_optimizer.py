"""The learning rate at its corners, and which parameters decay."""

import jax
import numpy as np
import pytest
from flax import nnx

from longctx import config
from longctx.training import optimizer
from longctx.training.step import abstract_model


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.2), (4, 1.0), (5, 1.0), (10, 0.55), (15, 0.1), (99, 0.1)], ids=lambda value: str(value)
)
def test_learning_rate(step, rate):
    """Warm-up over 5 steps to 1, half way down at 10, a tenth at 15 and after."""
    training = config.Training((config.Stage(15, 1, 1),), learning_rate=1.0, final_learning_rate=0.1, warmup_steps=5)
    np.testing.assert_allclose(optimizer.learning_rate(training, step), rate, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_only_rises():
    training = config.Training((config.Stage(3, 1, 1),), learning_rate=1.0, warmup_steps=10)
    np.testing.assert_allclose(
        [optimizer.learning_rate(training, step) for step in range(3)], [0.1, 0.2, 0.3], rtol=1e-6
    )


def test_only_matrices_decay(parse):
    """With a zero gradient matrices shrink; gains, decay rates and taps, stacked over layers or not, stay.

    Guards against `ndim >= 2` in place of what the parameters say: stacked gains and all taps would shrink.
    """
    mixer = {"kind": "gated_delta", "heads": 2, "key_width": 4, "value_width": 4, "conv_width": 4}
    experiment = parse(mixer)
    _, params = abstract_model(experiment, 20)
    transform = optimizer.make(experiment.training, params)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), nnx.as_pure(params))
    zeros = jax.tree.map(np.zeros_like, ones)
    updates = jax.jit(lambda ones: transform.update(zeros, transform.init(ones), ones, rate=1e-3)[0])(ones)
    shrunk = {
        jax.tree_util.keystr(path): bool(np.all(u < 0)) for path, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    matrices = {name for name in shrunk if name.endswith("['weight']") or name == "['embedding']"}
    assert matrices == {name for name, does in shrunk.items() if does}
    assert 5 < len(matrices) < len(shrunk) - 3
