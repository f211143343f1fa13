"""Operations are counted as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from longctx.evals.programs import operations

X = jax.ShapeDtypeStruct((16, 32, 32), jnp.float32)


def text(function):
    return jax.jit(function).lower(X).compile().as_text()


def test_loops_count_as_often_as_they_run():
    """Seen to fail: a loop's body counted once."""

    def once(x):
        return x @ x

    def looped(x):
        inner = lambda _, y: jax.lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z @ x), y)  # noqa: E731
        return jax.lax.fori_loop(0, 5, inner, x)

    assert operations(text(once)) == 16 * 2 * 32**3
    assert operations(text(looped)) == 15 * 16 * 2 * 32**3
    assert operations(text(jnp.tanh)) == 0
    assert operations(text(lambda x: x[:, :8] @ x[:, :, :4])) == 16 * 2 * 8 * 32 * 4


def test_the_larger_branch_counts():
    def branches(x):
        return jax.lax.cond(x[0, 0, 0] > 0, lambda x: jnp.tanh(x @ x) @ x, lambda x: x @ x, x)

    assert operations(text(branches)) == 2 * 16 * 2 * 32**3


def test_unknown_loops_are_refused():
    def unknown(x):
        return jax.lax.fori_loop(0, x[0, 0, 0].astype(int), lambda _, y: jnp.tanh(y @ x), x)

    with pytest.raises(ValueError, match="known at run time only"):
        operations(text(unknown))
