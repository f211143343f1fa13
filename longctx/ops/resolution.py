r"""A row at a coarser resolution: one coarse token for every c tokens of a document, and back.

Documents are cut, from their start, into groups of c tokens. Group g of a document is whole with its token
(g + 1) c - 1, and that token is coarse token g. Token t reads what the last whole group made of it,

    g(t) = (t + 1) // c - 1,    y_t = u_{g(t), (t + 1) mod c}    (0 if there is none yet)

with a vector u_{g, r} of its own for each of the c tokens that a group is the last one for: its own last token (r = 0)
and the c - 1 of the group in progress. So no token depends on what comes after it. This is how language models
downsample, work at a coarse resolution, and upsample (Nawrot et al., Hourglass, arXiv:2110.13711, where the row is
shifted by c - 1 tokens instead).

The ends of any two groups are c tokens apart or more: a row of T tokens, cut into cells of c, has at most one end in
each, and the coarse row has a slot for each cell: its token, or padding, which is before and after documents only.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from longctx.ops.chunks import cut
from longctx.typing import Segments, checked


@checked
def coarsen(x: Float[Array, "B T D"], segments: Segments, factor: int) -> tuple[Float[Array, "B N D"], Segments]:
    """The tokens with which groups of `factor` tokens are whole, and their documents; N = ⌈T / factor⌉."""

    def split(x):
        return jnp.swapaxes(cut(x, factor), 0, 1)

    ends = split(segments.valid & (segments.positions % factor == factor - 1))
    there, place = ends.any(2), jnp.argmax(ends, axis=2)[:, :, None]
    ids, positions = (jnp.take_along_axis(split(y), place, axis=2)[:, :, 0] for y in (segments.ids, segments.positions))
    coarse = jnp.take_along_axis(split(x), place[..., None], axis=2)[:, :, 0]
    index = jnp.where(there, positions // factor, 0)
    segments = Segments(jnp.where(there, ids, 0), index, there & (index == 0))
    return jnp.where(there[..., None], coarse, 0), segments


@checked
def refine(u: Float[Array, "B N C D"], before: Float[Array, "B 2 C D"], segments: Segments) -> Float[Array, "B T D"]:
    """What each token reads of the last whole group of its document.

    Args:
      u: of each coarse token, what the C tokens for which it is the last read.
      before: the same of the last two slots of the coarse row before this one. Where the span goes on with a document,
        and nothing is known of how its groups lay, both are the last whole group's.
      segments: of the tokens; T is a multiple of C if the row has other parts.

    Returns:
      `[B, T, D]`, 0 for tokens before which no group of their document is whole.
    """
    cells, factor = u.shape[1:3]
    length = segments.ids.shape[1]
    place = jnp.arange(length)
    since = (segments.positions + 1) % factor  # tokens since the group became whole
    end = place - since
    ongoing = segments.valid & (segments.runs == 0)
    first = jnp.where(ongoing.any(1), jnp.argmax(ongoing, axis=1), 0)[:, None]
    earlier = end < jnp.where(segments.runs == 0, first, 0)
    cell = jnp.where(earlier, (jnp.minimum(end, -1) + length) // factor - cells, end // factor)
    rows = jnp.concatenate([before, u], axis=1).reshape(u.shape[0], -1, u.shape[-1])
    index = (cell + 2).clip(0, cells + 1) * factor + since
    read = jnp.take_along_axis(rows, index[..., None], axis=1)
    return jnp.where((segments.valid & (segments.positions + 1 >= factor))[..., None], read, 0)
