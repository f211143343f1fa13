"""What is drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.errors import UsageError
from longctx.inference import Sampling
from longctx.inference.sampling import nucleus, sample

PROBABILITIES = jnp.array([0.125, 0.5, 0.125, 0.25])
LOGITS = jnp.log(PROBABILITIES)[None]


def drawn(seed, logits, sampling):
    keys = jax.random.split(jax.random.key(seed), len(logits))
    return jax.jit(sample)(keys, logits, *sampling.rows(len(logits)))


def draws(sampling, count=4000):
    logits = jnp.broadcast_to(LOGITS, (count, 4))
    return np.bincount(drawn(0, logits, sampling), minlength=4) / count


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),  # never empty
        (0.5, {1}),  # exactly the mass asked for is enough
        (0.51, {1, 3}),
        (0.75, {1, 3}),
        (0.8, {0, 1, 3}),  # of two equally likely tokens the first is enough
        (0.9, {0, 1, 2, 3}),
    ],
)
def test_nucleus_is_the_smallest_set_of_the_mass(top_p, kept):
    """Fails if the token that crosses the mass is left out, or all ties at the edge are kept."""
    inside = nucleus(LOGITS, jnp.array([top_p]))[0]
    assert set(np.flatnonzero(np.isfinite(inside))) == kept
    np.testing.assert_array_equal(inside[jnp.array(sorted(kept))], LOGITS[0][jnp.array(sorted(kept))])


def test_nucleus_of_each_row_is_its_own():
    rows = jnp.stack([LOGITS[0], LOGITS[0][::-1]])
    np.testing.assert_array_equal(np.isfinite(nucleus(rows, jnp.array([0.6, 0.5]))), [[0, 1, 0, 1], [0, 0, 1, 0]])


def test_rows_of_each_sampling():
    """A row is drawn by its own key, temperature and mass, whatever the others have. Seen to fail: one key for all."""
    keys = jax.random.split(jax.random.key(2), 3)
    logits = jax.random.normal(jax.random.key(3), (3, 50))
    how = jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.5, 1.0])
    together = sample(keys, logits, *how)
    alone = [sample(*(x[row : row + 1] for x in (keys, logits, *how)))[0] for row in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_frequencies():
    """4,000 draws: a standard error of 0.008 at most, and a tolerance of five of them."""
    np.testing.assert_allclose(draws(Sampling()), PROBABILITIES, atol=0.04)
    np.testing.assert_allclose(draws(Sampling(top_p=0.7)), [0, 2 / 3, 0, 1 / 3], atol=0.04)
    squared = PROBABILITIES**2 / jnp.sum(PROBABILITIES**2)
    np.testing.assert_allclose(draws(Sampling(temperature=0.5)), squared, atol=0.04)
    # The nucleus is taken after the temperature: 0.73 of the mass is on the first token now.
    np.testing.assert_allclose(draws(Sampling(temperature=0.5, top_p=0.7)), [0, 1, 0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-38, 1e-45, 5e-324])
def test_no_temperature_takes_the_most_likely(temperature):
    """Fails if the logits overflow when divided by a tiny temperature."""
    logits = jnp.array([[1.0, 3.0, 2.0], [1e4, 0.0, 1e4 - 1]])
    np.testing.assert_array_equal(drawn(1, logits, Sampling(temperature)), [1, 0])


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e38, 1.7e308])
@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-38, 0.5, 1 - 1e-16, 1.0])
def test_extremes_draw_what_can_be_drawn(temperature, top_p):
    """Fails when a number that float32 rounds to 0 or infinity is computed with: all is nan, or nothing is kept."""
    logits = jnp.array([[-1e38, -jnp.inf, 1e38, 3e38, 1e38]] * 50)
    found = drawn(0, logits, Sampling(temperature, top_p))
    assert set(found.tolist()) <= ({3} if temperature < 1 or top_p < 1e-30 else {0, 2, 3, 4})


def test_equal_keys_draw_equal_tokens():
    logits = jnp.zeros((64, 100))
    first, again, other = (drawn(seed, logits, Sampling()) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 1.0), "temperature is -0.1"),
        ((float("nan"), 1.0), "temperature is nan"),
        ((float("inf"), 1.0), "temperature is inf"),
        ((1.0, 0.0), "top_p is 0.0"),
        ((1.0, 1.01), "top_p is 1.01"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Sampling(*values)
