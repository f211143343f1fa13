r"""Attention dilution: over how many keys does attention spread, as the context grows?

The entropy of a query's attention, per head, with p_s = exp(logit_s - L) over its visible keys and L their logsumexp,

    H = sum_s p_s (L - logit_s)

in nats: 0 if one key has all the weight, log n if n keys share it alike. A head that finds what it looks for whatever
stands around it keeps its H as the context grows; one whose H grows as log n, its share H / log n of the largest
possible staying the same, is diluted. With logits of bounded size softmax cannot but dilute (Veličković et al.,
"softmax is not enough (for sharp out-of-distribution)", 2024, arXiv:2410.01104).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from longctx.evals.plots import DARK, LIGHT, Picture, Style, length_axis, save
from longctx.ops.patterns import Causal, Pattern
from longctx.typing import Segments, checked

_CAUSAL = Causal()


@checked
def entropy(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    pattern: Pattern = _CAUSAL,
    segments: Segments | None = None,
    scale: float | None = None,
    *,
    sinks: Float[Array, " H"] | None = None,
    soft_cap: float | None = None,
    chunk: int = 64,
) -> Float[Array, "B T H"]:
    """Entropy of the attention of every query, in nats; float32.

    Args:
      q, k: as `longctx.ops.attention.attention` is given them: turned by their positions, normed, scaled.
      pattern: which keys a query may see. A key that it sees n times is n keys.
      segments: the documents of the row; None is one.
      scale: of the logits; None for 1 / sqrt(K).
      sinks: a logit per head: one more key.
      soft_cap: bound of the logits.
      chunk: queries whose logits are held at once, so that memory grows linearly with T.

    Returns:
      0 for padding and for queries that see nothing.
    """
    batch, length, heads, width = q.shape
    segments = Segments.of(segments, batch, length)
    scale = width**-0.5 if scale is None else scale
    q = (scale * q.astype(jnp.float32)).reshape(batch, length, k.shape[2], -1, width)
    k = k.astype(jnp.float32)

    def of_token(token):
        q, ids, positions = token  # of one place in all rows
        logits = jnp.einsum("bgrk,bsgk->bgrs", q, k, precision="highest")
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        document = (ids[:, None] == segments.ids) & (ids[:, None] > 0)
        times = document * pattern.times(positions[:, None], segments.positions).astype(jnp.float32)
        if sinks is not None:
            column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(*q.shape[1:3], 1), (*q.shape[:3], 1))
            logits = jnp.concatenate([logits, column], axis=-1)
            times = jnp.pad(times, ((0, 0), (0, 1)), constant_values=1.0)
        times = times[:, None, None]
        best = jnp.where(times > 0, logits, -jnp.inf).max(-1, keepdims=True)
        behind = jnp.where(times > 0, best - logits, 0.0)
        weights = times * jnp.exp(-behind)
        total = jnp.maximum(weights.sum(-1), 1.0)  # it is less where nothing is seen
        return jnp.log(total) + (weights * behind).sum(-1) / total

    tokens = (jnp.swapaxes(x, 0, 1) for x in (q, segments.ids, segments.positions))
    found = jax.lax.map(of_token, tuple(tokens), batch_size=min(chunk, length))
    found = jnp.swapaxes(found, 0, 1).reshape(batch, length, heads)
    return jnp.where(segments.valid[..., None], found, 0.0)


@dataclasses.dataclass(frozen=True)
class Dilution:
    """Entropy of attention by the tokens n of the document up to the query, which are what `Causal()` shows it.

    Attributes:
      edges: of the n buckets: from one edge to the next, that not included.
      entropy: `[buckets, H]` float64, the mean of the bucket's queries, in nats; NaN where it has none.
      share: the same of H / log n, 1 for a query that attends to all tokens alike.
      tokens: queries of each bucket.
    """

    edges: tuple[int, ...]
    entropy: Float[np.ndarray, "buckets H"]
    share: Float[np.ndarray, "buckets H"]
    tokens: Int[np.ndarray, " buckets"]


def by_length(entropy: Float[Array, "B T H"], segments: Segments, edges: Sequence[int]) -> Dilution:
    """Means of what `entropy` gives, by the number of tokens that the query may look back on, its own included.

    Args:
      entropy: of each query.
      segments: the documents of the rows.
      edges: ascending, at least two, from 2 on: a single key leaves nothing to share.

    Raises:
      ValueError: other edges.
    """
    if len(edges) < 2 or edges[0] < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges are {list(edges)}; give two lengths or more in ascending order, the first at least 2.")
    valid = np.asarray(segments.valid)
    lengths = np.asarray(segments.positions)[valid] + 1
    values = np.asarray(entropy, np.float64)[valid]
    bucket = np.searchsorted(edges, lengths, side="right") - 1
    inside = (bucket >= 0) & (bucket < len(edges) - 1)
    bucket, lengths, values = bucket[inside], lengths[inside], values[inside]
    tokens = np.bincount(bucket, minlength=len(edges) - 1)

    def means(values):
        sums = np.zeros((len(tokens), values.shape[1]))
        np.add.at(sums, bucket, values)
        return np.where(tokens[:, None] > 0, sums / np.maximum(tokens, 1)[:, None], np.nan)

    return Dilution(tuple(edges), means(values), means(values / np.log(lengths)[:, None]), tokens)


def plot(runs: Mapping[str, Dilution]) -> Picture:
    """Entropy, and its share of the largest possible, by the length of the context, a curve for each run."""
    caption = (
        "Mean entropy of attention by the tokens up to the query (left, the dotted line is that of attending to all of "
        "them alike), and divided by that line's (right); bands span the heads. What rises with the dotted line is "
        "diluted by context; what falls on the right keeps to few tokens."
    )
    light, dark = (save(lambda figure, style: _draw(runs, figure, style), style) for style in (LIGHT, DARK))
    return Picture("entropy", "Attention dilution", caption, light, dark)


def _draw(runs: Mapping[str, Dilution], figure: Figure, style: Style) -> None:
    left, right = figure.subplots(1, 2)
    looks = itertools.cycle(itertools.product(("-", "--", "-."), (style.first, style.second)))
    for (name, run), (line, color) in zip(runs.items(), looks, strict=False):
        middles = np.sqrt(np.multiply(run.edges[:-1], run.edges[1:]))
        for axes, values in ((left, run.entropy), (right, run.share)):
            axes.plot(middles, values.mean(1), line, color=color, marker="o", label=name)
            axes.fill_between(middles, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
    edges = sorted({edge for run in runs.values() for edge in run.edges})
    left.plot(edges, np.log(edges), ":", color=style.ink, linewidth=1)
    left.set(title="entropy (nats)")
    right.set(title="entropy / log n")
    for axes in (left, right):
        axes.set(xlabel="n, tokens up to the query", ylim=(0, None))
        length_axis(axes, edges)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
