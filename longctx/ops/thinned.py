r"""Blockwise attention under any pattern, in the order of tokens that suits it.

The tokens that a thin pattern shows (`longctx/ops/patterns`) lie apart in the row: nearly every block of keys holds
some, and a loop over blocks would do nearly all of full attention's work. Three steps bring them together, each exact:

    apart:   a union is the merger of disjoint parts, A | B = A + (B & ~A), and each part has an order of its own;
    chosen:  queries that see nothing and keys that nothing sees are left out;
    folded:  at distances that are multiples of n, a row of T tokens is n rows of T/n tokens that never meet:
             tokens r, r + n, r + 2n, ... for r = 0 ... n-1.

Strided attention over T tokens is then n causal attentions over T/n, at 1/n of the work, and dilated attention is that
of its chosen tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from longctx.ops.biases import Bias
from longctx.ops.blockwise import Plan, Tokens, blockwise
from longctx.ops.partial import Partial, merge
from longctx.ops.patterns import Range, terms


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    queries: Tokens,
    keys: Tokens,
    plan: Plan,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    bias: Bias | None = None,
    *,
    own: bool,
) -> Partial:
    """Attention output and logsumexp of the logits.

    Args:
      q, k, v, queries, keys, plan, decay, key_decay, bias: as in `blockwise`.
      own: whether the keys are the queries' own tokens.
    """
    places = tuple(Range(np.arange(x.shape[1]), np.arange(x.shape[1])) for x in (q, k)) if own else None
    arrays = (q, decay), (k, v, key_decay)
    parts = (dataclasses.replace(plan, pattern=pattern) for pattern in terms(plan.pattern))
    return functools.reduce(merge, (_part(*arrays, bias, queries, keys, places, part) for part in parts))


def _part(of_queries, of_keys, bias, queries: Tokens, keys: Tokens, places, plan: Plan) -> Partial:
    """Attention under a pattern that is no union of thin ones; `of_queries` and `of_keys` are the arrays by token."""
    pattern = plan.pattern
    if places is not None:
        queries = _with_spans(queries, pattern)
    seeing, seen = pattern.seeing(queries.positions), pattern.seen(keys.positions)
    if seeing is not None or seen is not None:
        return _chosen(of_queries, of_keys, bias, queries, keys, places, plan, seeing, seen)
    if pattern.stride > 1 and places is not None:
        return _folded(of_queries, of_keys, bias, queries, keys, plan)
    return _blockwise(of_queries, of_keys, bias, queries, keys, places, plan)


def _with_spans(queries: Tokens, pattern) -> Tokens:
    """Queries that know which of the row's keys they see, where those of their order of tokens are all of a range."""
    thin = pattern.seeing(queries.positions) is not None or pattern.seen(queries.positions) is not None
    behind = pattern.inside.behind(queries.positions)
    if pattern.ahead != 0 or behind is None or (thin and pattern.stride > 1):
        return queries
    xp, later = (np, np.maximum.accumulate) if isinstance(queries.ids, np.ndarray) else (jnp, jax.lax.cummax)
    place, before = np.arange(queries.ids.shape[1], dtype=np.int32), xp.pad(queries.ids, ((0, 0), (1, 0)))[:, :-1]
    document = later(xp.where(queries.ids == before, 0, place), axis=1)  # where it begins
    first, end = xp.maximum(document, place - behind.last), place + 1 - behind.first
    return queries._replace(first=first, end=xp.where(queries.ids > 0, end, 0))


def _blockwise(of_queries, of_keys, bias, queries, keys, places, plan) -> Partial:
    (q, decay), (k, v, key_decay) = of_queries, of_keys
    return Partial(*blockwise(q, k, v, queries, keys, places, plan, decay, key_decay, bias))


def _chosen(of_queries, of_keys, bias, queries, keys, places, plan, seeing, seen) -> Partial:
    """Attention of the queries that see anything to the keys that are seen."""
    shape = *of_queries[0].shape[:3], of_keys[1].shape[-1]
    q_places, k_places = (None, None) if places is None else places
    of_queries, queries, q_places, put_back = _keep(of_queries, queries, q_places, seeing)
    of_keys, keys, k_places, _ = _keep(of_keys, keys, k_places, seen)
    if seen is not None and queries.first is not None:  # places among those that are kept
        xp = np if isinstance(seen, np.ndarray) else jnp
        kept = xp.pad(xp.cumsum(seen, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        first, end = (xp.take_along_axis(kept, x, axis=1) for x in (queries.first, queries.end))
        queries = queries._replace(first=first, end=end)
    if 0 in (queries.ids.shape[1], keys.ids.shape[1]):
        return Partial(jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], -jnp.inf, jnp.float32))
    if plan.pattern.stride == 1:
        plan = dataclasses.replace(plan, pattern=plan.pattern.inside)
    places = None if places is None else (q_places, k_places)
    return put_back(_blockwise(of_queries, of_keys, bias, queries, keys, places, plan))


def _keep(arrays, tokens: Tokens, places: Range | None, chosen: Bool[Array, "rows T"] | None):
    """Arrays, tokens and places of the chosen tokens alone, and how results for these become results for all.

    Where positions are known at run time only, so is the number of chosen tokens: the others follow them as padding.
    """
    if chosen is None:
        return arrays, tokens, places, lambda partial: partial
    if isinstance(chosen, np.ndarray):  # all rows are alike
        index = np.flatnonzero(chosen[0])

        def scatter(partial):
            def put(x, rest):
                return jnp.full((x.shape[0], chosen.shape[1], *x.shape[2:]), rest, x.dtype).at[:, index].set(x)

            return Partial(put(partial.output, 0), put(partial.logsumexp, -jnp.inf))

        arrays = jax.tree.map(lambda x: x[:, index], arrays)
        places = None if places is None else Range(places.first[index], places.last[index])
        return arrays, jax.tree.map(lambda x: x[:, index], tokens), places, scatter
    order = jnp.argsort(~chosen, axis=1, stable=True)
    arrays, back = _take(arrays, order), jnp.argsort(order, axis=1)
    tokens = tokens._replace(ids=jnp.where(chosen, tokens.ids, 0))
    if tokens.end is not None:
        tokens = tokens._replace(end=jnp.where(chosen, tokens.end, 0))
    tokens = _take(tokens, order)
    if places is not None:  # tokens move towards the start only
        places = Range(places.first, np.full_like(places.last, places.last[-1]))
    return arrays, tokens, places, lambda partial: _take(partial, back)


def _take(tree, index):
    """Tokens of each row by their index, `[rows or 1, T]`."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1), tree
    )


def _folded(of_queries, of_keys, bias, queries, keys, plan) -> Partial:
    """Attention at distances that are multiples of the stride, as one of more and shorter rows."""
    stride, (batch, length) = plan.pattern.stride, of_queries[0].shape[:2]

    def fold(x):
        xp = np if isinstance(x, np.ndarray) else jnp
        x = xp.pad(x, ((0, 0), (0, -length % stride), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, stride, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def unfold(x):
        x = x.reshape(batch, stride, -1, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(batch, -1, *x.shape[3:])[:, :length]

    def rows(x):  # tokens that are the same in all rows still are, but no longer in those that a row became
        return x if x.shape[0] == batch * stride else (np if isinstance(x, np.ndarray) else jnp).tile(x, (batch, 1))

    if queries.first is not None:  # places in the row that a token's becomes
        row = np.arange(length, dtype=np.int32) % stride
        queries = queries._replace(first=-((row - queries.first) // stride), end=-((row - queries.end) // stride))
    of_queries, of_keys, queries, keys = jax.tree.map(fold, (of_queries, of_keys, queries, keys))
    queries, keys = jax.tree.map(rows, (queries, keys))
    place = np.arange(queries.ids.shape[1]) * stride
    places = Range(place, place), Range(place, place)
    plan = dataclasses.replace(plan, pattern=plan.pattern.inside)
    return jax.tree.map(unfold, _blockwise(of_queries, of_keys, bias, queries, keys, places, plan))
