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
    """A token's key is made from the row's seed and its number, so drawn text can be checked too; equal seeds, equal
    text, in steps or together, and whatever the room.
    """
    sampling = Sampling(temperature=2.0, top_p=0.9)
    prefill, decode = Prefill(model), Decode(model)

    def write(seed, count=COUNT, **options):
        logits, state = prefill(TOKENS, options.get("room", 64))
        return np.concatenate(list(decode(logits, state, TOKENS.shape[1], count, sampling, seed, **options)), axis=1)

    def choose(logits, number):
        keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), number) for seed in (7, 8)])
        return sample(keys, logits, *sampling.rows(2))

    found = write(7)
    np.testing.assert_array_equal(found, full_passes(choose))
    np.testing.assert_array_equal(found, write(7, together=True))
    np.testing.assert_array_equal(found, write(7, room=23))  # which the document fills, and a larger one takes over
    np.testing.assert_array_equal(found, write(7, room=23, together=True))
    np.testing.assert_array_equal(found[:, :1], write(7, count=1))
    assert (found != write(8)).any()


def test_a_step_writes_in_place(model):
    """From the compiled program: the state is aliased, and temporaries take less than half of it.

    Seen to fail: keys kept with slots first; a write that is not set apart from what reads the slots.
    """
    unrolled = model.unrolled()
    state = jax.jit(unrolled.init_state, static_argnums=(0, 1))(1, 4096)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    row, how = np.zeros(1, np.int32), (np.zeros(1, np.uint32), *Sampling().rows(1))
    decode = Decode(unrolled)
    for program, count in ((decode._step, ()), (decode._steps, (np.int32(3),))):
        memory = program.lower(decode._params, row[:, None], row, how, state, *count).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 2
