"""The language model: repeats, states, and what it says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import architecture, config
from longctx.errors import UsageError
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel, parameter_count
from longctx.typing import Segments

DELTA = {"mixer": {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8}, "mlp": {"kind": "relu2"}}
FULL = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_width": 8}, "mlp": {"kind": "swiglu"}}


SMALL = {"mixer": FULL["mixer"], "mlp": {"kind": "relu2", "hidden": 16}}


def make(pattern, repeats=1, vocab_size=50, **options):
    model = {"pattern": pattern, "repeats": repeats, "width": 16, "blocks": {"delta": DELTA, "full": FULL}}
    tree = {"model": model | options}
    experiment = config.parse(tree | {"training": {"stages": ((1, 1, 64),)}}, MIXERS, MLPS)
    return LanguageModel(experiment.model, vocab_size, nnx.Rngs(params=0))


def test_repeats_are_blocks_in_turn():
    """Fails if the scan runs over the pattern's places before its repeats, or shares a repeat's parameters."""
    model = make(("delta", "full"), repeats=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    segments = Segments.single(2, 12)
    x = model.embedding[...][tokens] * 4.0
    run = jax.jit(lambda layer, x: layer(x, segments))
    for repeat in range(2):
        for block in model.blocks:
            x, _ = run(jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], block), x)
    hidden, state = run(model, tokens)
    assert state is None
    np.testing.assert_allclose(hidden, model.norm(x), atol=1e-4)
    first, second = (np.asarray(model.blocks[0].mixer.query.weight[...][i]) for i in range(2))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("width", "vocabulary"), [(16, 2048), (64, 2048), (512, 512), (2048, 64)])
def test_the_initial_loss_is_a_uniform_guess(width, vocabulary, tied):
    """Of any width and vocabulary, within 5 %, on targets drawn at random and on the tokens themselves.

    Seen to fail: unit logits, of which a token's own is √D.
    """
    model = make(("full",), width=width, vocab_size=vocabulary, embedding={"tied": tied}, blocks={"full": SMALL})
    tokens, targets = jax.random.randint(jax.random.key(1), (2, 2, 64), 0, vocabulary)

    @jax.jit
    def losses(model):
        log_p = jax.nn.log_softmax(model.logits(model(tokens)[0]))
        return tuple(-jnp.take_along_axis(log_p, t[..., None], -1).mean() for t in (targets, tokens))

    uniform = np.log(vocabulary)
    at_random, own = losses(model)
    assert abs(at_random - uniform) < 0.05 * uniform
    assert own < uniform  # the right way round


def test_an_untied_model_begins_as_a_tied_one():
    """The same logits to rounding, from two matrices, of which each has a gradient of its own."""
    tied, untied = make(("full",)), make(("full",), embedding={"tied": False})
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    run = jax.jit(lambda model: model.logits(model(tokens)[0]))
    np.testing.assert_allclose(run(untied), run(tied), atol=1e-5)
    assert parameter_count(untied) == parameter_count(tied) + 50 * 16


def test_bounded_and_parameters():
    assert make(("delta",)).bounded
    assert not make(("delta", "full")).bounded
    model = make(("full",), repeats=3)
    per_block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 8 + 3 * 16 * 256 + 2 * 16
    assert parameter_count(model) == 50 * 16 + 16 + 3 * per_block


def test_groups_are_layers_in_turn():
    """Two groups, in training, with a state and unrolled. Seen to fail: a group's repeats taken from another's; its
    blocks from the first places.
    """
    model = make((), groups=((("delta", "full"), 2), (("delta",), 1)))
    names = [layer.block for layer in model.options.layers]
    assert names == ["delta", "full", "delta", "full", "delta"]
    assert model.options.layers[3] == architecture.Layer("full", 0, 1, 1)
    assert model.options.layers[4] == architecture.Layer("delta", 1, 2, 0)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    x = model.embedding[...][tokens] * 4.0
    run = jax.jit(lambda block, x: block(x, Segments.single(2, 12)))
    for layer in model.options.layers:
        x, _ = run(jax.tree.map(lambda leaf, i=layer.repeat: leaf[i], model.blocks[layer.place]), x)
    expected = model.norm(x)
    for each in (model, model.unrolled()):
        np.testing.assert_allclose(jax.jit(lambda model: model(tokens)[0])(each), expected, atol=1e-4)
        with_state = jax.jit(lambda model: model(tokens, None, model.init_state(2, 12))[0])
        np.testing.assert_allclose(with_state(each), expected, atol=1e-4)


def test_groups_that_cannot_be():
    for options, message in [({"repeats": 2}, "are one group"), ({"groups": ((("none",), 1),)}, "not among blocks")]:
        with pytest.raises(UsageError, match=message):
            make((), **{"groups": ((("full",), 1),)} | options)
    with pytest.raises(UsageError, match="pattern is empty"):
        make(())
