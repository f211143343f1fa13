r"""Softmax attention over the keys that a pattern and the documents of a packed row make visible to a query.

For query t with visible keys s, per head (Vaswani et al., arXiv:1706.03762):

    logit_ts = scale q_t . k_s,   if soft-capped c tanh(logit / c)          (Gemma 2, arXiv:2408.00118)
               + d_t - d_s, if it decays, d the sum of log decays so far    (Forgetting Transformer, arXiv:2503.02130)
               + b(p_t - p_s), if it has a bias by distance                 (`ops/biases.py`)
    L_t = log sum_s exp(logit_ts)
    out_t = sum_s exp(logit_ts - L_t) v_s

A query may see a key if both bear the same document id, neither is padding, and the pattern shows it at their
positions. A query that sees nothing gives 0 and has L = -inf.

`(out, L)` over a part of the keys is a partial result (`ops/partial.py`).

Implementations: "dense" (the definition; holds all logits), "blockwise" (`ops/blockwise.py`), "cudnn" and
"splash" (`ops/kernels/`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longctx.ops import blockwise, kernels, thinned
from longctx.ops.backend import platform
from longctx.ops.biases import Bias
from longctx.ops.family import Keyed, Result
from longctx.ops.kernels import cudnn, splash
from longctx.ops.partial import Partial, add_sinks, merge
from longctx.ops.patterns import Causal, Heads, Pattern, parse
from longctx.ops.row import Row
from longctx.typing import Segments, checked

_CAUSAL = Causal()
_DENSE_LOGITS = 128 * 128  # up to this many logits a head, holding them all costs no more than a loop over blocks


@checked
def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern | Heads | str = _CAUSAL,
    segments: Segments | Int[Array, "B T"] | None = None,
    key_segments: Segments | Int[Array, "B S"] | None = None,
    *,
    scale: float | None = None,
    sinks: Float[Array, " H"] | Partial | None = None,
    soft_cap: float | None = None,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    bias: Bias | None = None,
    before: int | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention; see the module's docstring for the formula.

    Args:
      q: queries. Head h reads the keys and values of group h // (H // G).
      k: keys.
      v: values.
      pattern: which keys of its document a query may see, and how many times; `Heads` for heads that differ; or a text,
        as `patterns.parse` reads it.
      segments: document of each query, 0 for padding; ids differ between the documents of a row. None: the
        row is one document. Plain ids are taken for whole documents, positions counted from the row's start.
      key_segments: the same for keys that are not the queries' own tokens (a cache and then the span: S != T);
        pass `Segments` on both sides there, since ids do not say positions. None: keys are the queries' own tokens,
        S == T.
      scale: of the logits; None for 1 / sqrt(K).
      sinks: a logit per head that joins the softmax's denominator; or attention to what is of no row.
      soft_cap: c, bound of the logits.
      decay: d at each query, finite: the sum of the log decays of its document's tokens up to it, float32.
      key_decay: d at each key, for each head of the queries. None: keys are the queries' own tokens.
      bias: b, one of `longctx.ops.biases`.
      before: where the keys of `key_segments` are neighbouring tokens of a row, of which the queries' own are the last,
        how many stand before those. Kernels need it.
      implementation: "dense", "blockwise", "cudnn" or "splash"; None chooses by platform and case and logs the
        choice once.
      block: tokens a block of "blockwise"; None chooses.

    Returns:
      `[B, T, H, V]` in v's dtype; the softmax is float32 whatever the inputs. 0 for padding and for queries that
      see no key. First derivatives only, except with "dense".

    Raises:
      ValueError: shapes that do not fit together, no pattern, an unknown implementation.
      NotImplementedError: the named implementation cannot compute this case, or not on this platform.
    """
    pattern = parse(pattern)
    if isinstance(pattern, Heads):
        options = {"scale": scale, "soft_cap": soft_cap, "implementation": implementation, "block": block}
        call = functools.partial(attention, segments=segments, key_segments=key_segments, **options)
        return by_head(call, pattern, q, k, v, bias, sinks=sinks, decay=decay, key_decay=key_decay)
    queries, keys = _tokens(q, k, segments, key_segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key_decay = decay if key_decay is None else key_decay
    case = {"segments": segments, "key_segments": key_segments, "sinks": sinks, "soft_cap": soft_cap}
    case |= {"decay": decay, "bias": bias, "before": before}
    chosen = _choose(q, k, v, pattern, case) if implementation is None else implementation
    if chosen == "dense":
        document = (queries.ids[:, :, None] == keys.ids[:, None, :]) & (queries.ids[:, :, None] > 0)
        times = document * pattern.times(queries.positions[:, :, None], keys.positions[:, None, :])
        added = None if bias is None else bias(queries.positions[:, :, None] - keys.positions[:, None, :])
        options = {"sinks": sinks, "soft_cap": soft_cap, "decay": decay, "key_decay": key_decay, "bias": added}
        return dense(q, k, v, times, scale=scale, **options)
    if chosen == "blockwise":
        plan = blockwise.Plan(pattern, scale, soft_cap, block, block)
        result = thinned.attend(q, k, v, queries, keys, plan, decay, key_decay, bias, own=key_segments is None)
        result = result if sinks is None else add_sinks(result, sinks)
        return result.output.astype(v.dtype)
    if chosen not in _KERNELS:
        raise ValueError(
            f"implementation is '{chosen}'; choose one of dense, blockwise, {', '.join(_KERNELS)}, or None."
        )
    if refusal := _KERNELS[chosen].refusal(q, k, v, pattern, **case):
        raise NotImplementedError(f"implementation '{chosen}' {refusal}")
    case = {"segments": segments, "key_segments": key_segments, "before": before}
    return _KERNELS[chosen].attention(q, k, v, pattern, scale=scale, soft_cap=soft_cap, **case)


class Queries(NamedTuple):
    """Queries of one pattern or several; head h reads the keys and values of group h // (H // G).

    Attributes:
      q: a tuple, one for each pattern, where they differ, such as rotated in another way.
      decay: d at each query, finite: the sum of the log decays of its document's tokens up to it, float32.
      besides: attention to what is of no row, such as learned tokens.
    """

    q: Float[Array, "B T H K"] | tuple[Array, ...]
    decay: Float[Array, "B T H"] | None = None
    besides: Partial | None = None


class Keys(NamedTuple):
    """Keys, for each pattern as queries are, values, and d at each key for each head of the queries."""

    k: Float[Array, "B S G K"] | tuple[Array, ...]
    v: Float[Array, "B S G V"]
    decay: Float[Array, "B S H"] | None = None


class Parameters(NamedTuple):
    """A logit per head that joins the softmax's denominator, and a bias by distance."""

    sinks: Float[Array, " H"] | None = None
    bias: Bias | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What attention has beside arrays.

    Attributes:
      pattern: which keys of its document a query may see; a tuple of patterns without heads of their own that share no
        pair of query and key, one for each set of queries and keys; one softmax is over all of them.
      scale, soft_cap, implementation, block: as in `attention`; several patterns and shards are always "blockwise".
      context_parallel: how devices that share a row meet all keys where a pattern's reach is unbounded: one of
        `longctx.parallel.schemes.NAMES`.
    """

    pattern: Pattern | Heads | str | tuple[Pattern, ...] = _CAUSAL
    scale: float | None = None
    soft_cap: float | None = None
    implementation: str | None = None
    block: int | None = None
    context_parallel: str = "auto"

    @property
    def patterns(self) -> tuple[Pattern | Heads, ...]:
        """One for each set of queries and keys."""
        return tuple(map(parse, self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)))

    @property
    def unbounded(self) -> bool:
        """Whether a query may see any number of tokens back, which all heads do."""
        return not isinstance(self.patterns[0], Heads) and any(pattern.reach is None for pattern in self.patterns)


class Part(NamedTuple):
    """Queries, keys, and which of them may see which."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S G K"]
    pattern: Pattern | Heads

    @classmethod
    def all(cls, queries: Queries, keys: Keys, options: Options) -> list[Part]:
        """Those of attention to several patterns, or one."""
        sides = (x if isinstance(x, tuple) else (x,) for x in (queries.q, keys.k))
        return list(map(cls, *sides, options.patterns))


def chunked(
    queries: Queries,
    keys: Keys,
    parameters: Parameters,
    segments: Segments,
    key_segments: Segments,
    options: Options,
) -> Result:
    """`attention`, or under several patterns the merged results of `attention_partial`."""
    parts, own = Part.all(queries, keys, options), key_segments is segments
    if len(parts) > 1:
        call = queries, keys, parameters, segments, key_segments, options
        return finish(partial(*call), *call)
    added = {"decay": queries.decay, "key_decay": keys.decay, "bias": parameters.bias}
    added |= {name: getattr(options, name) for name in ("scale", "soft_cap", "implementation", "block")}
    q, k, pattern = parts[0]
    tokens = segments, None if own else key_segments
    return Result(attention(q, k, keys.v, pattern, *tokens, sinks=sinks(queries, parameters), **added))


def definition(queries, keys, parameters, segments, key_segments, options: Options) -> Result:
    """The same with all logits of a pattern held at once."""
    options = dataclasses.replace(options, implementation="dense")
    return chunked(queries, keys, parameters, segments, key_segments, options)


def partial(queries: Queries, keys: Keys, parameters: Parameters, segments, key_segments, options: Options) -> Partial:
    """Attention to these keys alone, without sinks and what is of no row."""
    added = {"decay": queries.decay, "key_decay": keys.decay, "bias": parameters.bias}
    added |= {name: getattr(options, name) for name in ("scale", "soft_cap", "block")}
    tokens = segments, None if key_segments is segments else key_segments
    results = (attention_partial(q, k, keys.v, p, *tokens, **added) for q, k, p in Part.all(queries, keys, options))
    return functools.reduce(merge, results)


def finish(result: Partial, queries: Queries, keys: Keys, parameters: Parameters, *_) -> Result:
    """What queries read, when the results of all keys have been merged."""
    besides = sinks(queries, parameters)
    result = result if besides is None else add_sinks(result, besides)
    return Result(result.output.astype(keys.v.dtype))


def sharded(queries, keys, parameters, segments, key_segments, options: Options, row: Row) -> Result:
    """The same on a part of a row."""
    return Result(row.attention(queries, keys, parameters, segments, options))


def sinks(queries: Queries, parameters: Parameters) -> Float[Array, " H"] | Partial | None:
    """All that queries see beside the row."""
    if queries.besides is None or parameters.sinks is None:
        return parameters.sinks if queries.besides is None else queries.besides
    return add_sinks(queries.besides, parameters.sinks)


@checked
def attention_partial(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    pattern: Pattern | str = _CAUSAL,
    segments: Segments | Int[Array, "B T"] | None = None,
    key_segments: Segments | Int[Array, "B S"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    decay: Float[Array, "B T H"] | None = None,
    key_decay: Float[Array, "B S H"] | None = None,
    bias: Bias | None = None,
    block: int | None = None,
) -> Partial:
    """Blockwise attention over these keys alone, to be merged with that over others; arguments as `attention`.

    Differentiable once in both parts of the result. Sinks are not a part of it: see `add_sinks`.
    """
    queries, keys = _tokens(q, k, segments, key_segments)
    plan = blockwise.Plan(parse(pattern), q.shape[-1] ** -0.5 if scale is None else scale, soft_cap, block, block)
    key_decay = decay if key_decay is None else key_decay
    return thinned.attend(q, k, v, queries, keys, plan, decay, key_decay, bias, own=key_segments is None)


def by_head(attend, heads: Heads, q, k, v, bias: Bias | None = None, **by_head) -> Float[Array, "B T H V"]:
    """`attend(q, k, v, pattern, bias=bias, **by_head)` for the heads of each pattern, put together again.

    Args:
      attend: such as `attention`, with all other arguments bound.
      heads: which head has which pattern.
      q, k, v, bias: as in `attention`.
      by_head: arrays `[H]` or `[B, T, H, ...]`, or trees of them, or None.
    """
    period = len(heads.patterns) if q.shape[2] % len(heads.patterns) == 0 else q.shape[2]
    repeats = q.shape[2] // k.shape[2]

    def pick(x, axis, chosen):  # sliced, not gathered, within each period: heads may be split over devices
        x = x.reshape(*x.shape[:axis], -1, period, *x.shape[axis + 1 :]).take(np.array(chosen), axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    outputs, order = [], []
    for pattern, chosen in heads.groups(period):
        keys = k, v  # shared as before
        if repeats == 1:
            keys = (pick(x, 2, chosen) for x in keys)
        elif repeats % period:  # one for each head
            keys = (pick(x.repeat(repeats, axis=2), 2, chosen) for x in keys)
        own = jax.tree.map(lambda x, chosen=chosen: pick(x, min(2, x.ndim - 1), chosen), by_head)
        own["bias"] = jax.tree.map(functools.partial(pick, axis=0, chosen=chosen), bias)
        y = attend(pick(q, 2, chosen), *keys, pattern, **own)
        outputs.append(y.reshape(*y.shape[:2], -1, len(chosen), y.shape[-1]))
        order += chosen
    return jnp.concatenate(outputs, axis=3)[:, :, :, np.argsort(order)].reshape(*q.shape[:3], v.shape[-1])


def dense(q, k, v, times, *, scale, sinks=None, soft_cap=None, decay=None, key_decay=None, bias=None):
    """The definition. `times[B or 1, T, S]`: how often the query sees the key, or whether. Holds all logits.

    `bias[B or 1, H, T, S]` is added to them.
    """
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # heads by group
    # In the order of the products' own axes, which leaves keys and values where a store has them.
    logits = jnp.einsum("bgrtk,bsgk->bgrts", q.transpose(0, 2, 3, 1, 4), k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if decay is not None:
        now, since = (jnp.moveaxis(x.reshape(*x.shape[:2], *q.shape[2:4]), 1, -1) for x in (decay, key_decay))
        logits += now[..., :, None] - since[..., None, :]
    if bias is not None:
        logits += bias.reshape(bias.shape[0], *q.shape[2:4], *bias.shape[2:])
    mask = times[:, None, None] > 0
    if bias is not None:
        mask &= logits > -jnp.inf
    if times.dtype != bool:
        logits += jnp.log(jnp.maximum(times, 1).astype(jnp.float32))[:, None, None]
    # A row without a visible key would be 0 / 0: its softmax runs over zeros and is then masked away.
    alone = mask.any(-1, keepdims=True) | (sinks is not None)
    logits = jnp.where(mask, logits, jnp.where(alone, -jnp.inf, 0.0))
    if sinks is not None:
        column = sinks.logsumexp if isinstance(sinks, Partial) else sinks.astype(jnp.float32)[None, None]
        column = jnp.moveaxis(column.reshape(*column.shape[:2], *q.shape[2:4]), 1, -1)[..., None]
        logits = jnp.concatenate([logits, jnp.broadcast_to(column, (*logits.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    weights, besides = jnp.where(mask, weights[..., : k.shape[1]], 0.0), weights[..., -1:]
    y = jnp.einsum("bgrts,bsgv->bgrtv", weights, v.astype(jnp.float32)).transpose(0, 3, 1, 2, 4)
    if isinstance(sinks, Partial):
        y += jnp.moveaxis(besides, 3, 1) * sinks.output.reshape(y.shape)
    return y.reshape(*q.shape[:2], -1, v.shape[3]).astype(v.dtype)


_KERNELS = {"cudnn": cudnn, "splash": splash}
_PLATFORM_KERNELS = {"gpu": "cudnn", "tpu": "splash"}


def _tokens(q, k, segments, key_segments) -> tuple[blockwise.Tokens, blockwise.Tokens]:
    """Ids and positions of queries and keys, once the shapes are found to fit."""
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads and k has {k.shape[2]}; give q a multiple of k's heads.")
    batch, length = q.shape[:2]
    if key_segments is None:
        if k.shape[1] != length:
            raise ValueError(
                f"q has {length} tokens and k has {k.shape[1]}; pass segments and key_segments where the keys "
                "are not the queries' own tokens."
            )
        if segments is None:  # known while tracing, and so is all the work
            positions = np.arange(length, dtype=np.int32)[None]
            return (blockwise.Tokens(np.ones_like(positions), positions),) * 2
    elif segments is None:
        raise ValueError("key_segments were given without segments; pass both, so that positions are known.")
    sides = [Segments.of(segments, batch, length)]
    if key_segments is not None:
        sides.append(Segments.of(key_segments, batch, k.shape[1]))
    tokens = [blockwise.Tokens(jnp.asarray(side.ids), jnp.asarray(side.positions)) for side in sides]
    return tokens[0], tokens[-1]


def _choose(q, k, v, pattern: Pattern, case) -> str:
    """The implementation for this case on this platform."""
    kernel = _PLATFORM_KERNELS.get(platform()) if kernels.allowed() else None
    refusal = _KERNELS[kernel].refusal(q, k, v, pattern, **case) if kernel else None
    if kernel and not refusal:
        chosen, reason = kernel, f"the kernel of this platform ({platform()})"
    elif q.shape[1] * k.shape[1] <= _DENSE_LOGITS or q.shape[1] == 1:
        chosen, reason = "dense", "few logits"
    else:
        chosen, reason = "blockwise", f"'{kernel}' {refusal}" if kernel else "many logits"
    _log(chosen, reason, logging.WARNING if kernel and chosen == "blockwise" else logging.INFO)
    return chosen


@functools.cache
def _log(chosen: str, reason: str, level: int):
    logging.log(level, "attention: implementation '%s' (%s)", chosen, reason)


ATTENTION = Keyed(
    "attention",
    Queries,
    Keys,
    definition,
    chunked,
    partial,
    sharded,
    finish,
    shares_slots=lambda options: options.unbounded,
    together=lambda options: len(getattr(options.patterns[0], "patterns", (None,))),
    parameters=Parameters,
    options=Options,
)
