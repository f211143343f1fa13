"""How two ways of computing the same are compared: in float32, with errors relative to the largest entry."""

import chex
import jax
import numpy as np

from longctx.layers import reports

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 5e-4


def close(actual, expected, tolerance, what):
    """Every leaf of `actual` is within `tolerance` of `expected`, relative to that leaf's largest entry."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all(), f"{what}{jax.tree_util.keystr(path)} is not finite"
        error, scale = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=1e-3)
        assert error <= tolerance * scale, f"{what}{jax.tree_util.keystr(path)}: error {error:.2e} at scale {scale:.2e}"


def with_losses(run, *arguments):
    """What `run` gives, and the sum of the losses that its layers record."""
    with reports.collected() as recorded:
        out = run(*arguments)
    return out, sum(record.weighted for record in recorded.values())


def compare(actual, expected):
    close(actual[0], expected[0], OUTPUT_TOLERANCE, "output")
    close(actual[1], expected[1], GRADIENT_TOLERANCE, "gradient")
