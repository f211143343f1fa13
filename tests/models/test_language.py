"""The language model: repeats, states, and what it says of itself."""

import jax
import numpy as np
from flax import nnx

from longctx import config
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel, parameter_count
from longctx.typing import Segments

DELTA = {"mixer": {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8}, "mlp": {"kind": "relu2"}}
FULL = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_width": 8}, "mlp": {"kind": "swiglu"}}


def make(pattern, repeats=1, **options):
    blocks = {"delta": DELTA, "full": FULL}
    tree = {"model": {"pattern": pattern, "repeats": repeats, "width": 16, "blocks": blocks, **options}}
    experiment = config.parse(tree | {"training": {"stages": ((1, 1, 64),)}}, MIXERS, MLPS)
    return LanguageModel(experiment.model, 50, nnx.Rngs(params=0))


def test_repeats_are_blocks_in_turn():
    """Fails if the scan runs over the pattern's places before its repeats, or shares a repeat's parameters."""
    model = make(("delta", "full"), repeats=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    segments = Segments.single(2, 12)
    x = model.embedding[...][tokens] * 4.0
    for repeat in range(2):
        for block in model.blocks:
            x, _ = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], block)(x, segments)
    hidden, state = jax.jit(lambda model: model(tokens, segments))(model)
    assert state is None
    np.testing.assert_allclose(hidden, model.norm(x), atol=1e-4)
    first, second = (np.asarray(model.blocks[0].mixer.query.weight[...][i]) for i in range(2))
    assert np.abs(first - second).max() > 0.1


def test_bounded_and_parameters():
    assert make(("delta",)).bounded
    assert not make(("delta", "full")).bounded
    model = make(("full",), repeats=3)
    per_block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 8 + 3 * 16 * 256 + 2 * 16
    assert parameter_count(model) == 50 * 16 + 16 + 3 * per_block
