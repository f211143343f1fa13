"""Tokens that are made one by one are those that full passes would make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.inference import Decode, Prefill, Sampling, generate
from longctx.inference.sampling import sample
from longctx.typing import Segments

TOKENS = np.random.default_rng(1).integers(4, 260, (2, 21)).astype(np.int32)
COUNT = 12


@pytest.fixture(scope="module")
def full_passes(model):
    """A function that takes each next token from a pass over all before it."""
    forward = jax.jit(lambda tokens, segments: model.logits(model(tokens, segments)[0]))

    def run(choose):
        length = TOKENS.shape[1]
        tokens = np.pad(TOKENS, ((0, 0), (0, COUNT)))
        for number in range(length, length + COUNT):
            logits = forward(tokens, Segments.single(*tokens.shape))[:, number - 1]  # causal: the rest is not read
            tokens[:, number] = choose(logits, number)
        return tokens[:, length:]

    return run


def test_greedy_is_the_most_likely_of_full_passes(model, full_passes):
    """Fails if the state after the prompt, or a position, is off by one token."""
    found = generate(model, TOKENS, COUNT, Sampling(temperature=0))
    np.testing.assert_array_equal(found, full_passes(lambda logits, _: jnp.argmax(logits, axis=-1)))


def test_draws_are_those_of_full_passes(model, full_passes):
    """A token's key is made from the seed and its number, so drawn text can be checked too; equal seeds, equal text."""
    sampling = Sampling(temperature=2.0, top_p=0.9)
    prefill, decode = Prefill(model), Decode(model, sampling)

    def write(seed, count=COUNT):
        logits, state = prefill(TOKENS, capacity=64)
        return np.stack(list(decode(logits, state, TOKENS.shape[1], count, seed)), axis=1)

    def choose(logits, number):
        return sample(jax.random.fold_in(jax.random.key(7), number), logits, sampling)

    found = write(7)
    np.testing.assert_array_equal(found, full_passes(choose))
    np.testing.assert_array_equal(found, write(7))
    np.testing.assert_array_equal(found[:, :1], write(7, count=1))
    assert (found != write(8)).any()
