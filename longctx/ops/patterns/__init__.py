r"""Patterns: which keys a query may see, as small frozen data composed with `&`, `|`, `~` and `+`.

    Causal() & (Window(512) | Sinks(4))                       # the last 512 tokens, and the first 4 of the document
    Causal() & (Window(256) | Global(64) | RandomBlocks(64, 3))                  # BigBird, arXiv:2007.14062
    Causal() & (Window(512) | Global((0, 17)))                                   # Longformer, arXiv:2004.05150
    Causal() & (Window(128) | Strided(128))                   # Sparse Transformer, strided, arXiv:1904.10509
    Causal() & (Chunked(128) | Fixed(128, 8))                 # the same, fixed
    Causal() & (Dilated(2048, 1) + Dilated(4096, 2))          # LongNet, arXiv:2307.02486
    Heads((Causal() & Chunked(512), Causal() & ShiftedGroups(512)))              # LongLoRA, arXiv:2309.12307

A pattern speaks of positions within a document; that query and key belong to the same document is the attention op's
part, not the pattern's. With p and s the positions of query and key,

    Causal():            s <= p
    Window(w):           |p - s| < w
    Chunked(n, b):       0 <= p // n - s // n <= b; b is 0 unless given
    ShiftedGroups(n):    (p + n//2) // n = (s + n//2) // n
    Strided(n):          p - s is a multiple of n
    Fixed(n, c):         s mod n >= n - c
    Dilated(w, r, o):    p // w = s // w, and both p and s have (· mod w) mod r = o
    Sinks(n):            s < n
    Global(chosen):      p or s is chosen
    RandomBlocks(b, n):  block s // b is one of n drawn for block p // b
    Blocks(layout, b):   layout[p // b, s // b]

Every pattern answers these questions: its dense `mask` (the definition); its `block_map`, which blocks of keys each
block of queries touches; whether two ranges of positions are anywhere or everywhere visible to each other (`touches`,
`covers`), from which the same map follows when positions are known only at run time; how far a query looks: whatever
it sees is a key with `-ahead <= p - s`, and either `p - s <= reach` or `s` among the `anchors`. From those a sharded
caller knows which keys to move: a bounded reach is a halo, anchors are a broadcast, an unbounded reach is a ring.

Some patterns are thin: their tokens lie apart in the row, and every block holds some, though few are visible. They say
so with `stride`, `seeing` and `seen`: in another order of tokens, or with those left out that nothing sees, they are as
dense as any other, and `terms` takes a union apart so that each part has its own order.

A sum shows what its patterns show, a key as often as it is seen: its attention is that of each, mixed by the
denominators of their softmax. `Heads` gives heads different patterns.

Patterns are hashable, so that they can be static arguments of a jitted function.
"""

from longctx.ops.patterns.algebra import Both, Either, Everything, Heads, Not, Pattern, Range, Sum, terms, touched_pairs
from longctx.ops.patterns.bands import Causal, Chunked, ShiftedGroups, Window
from longctx.ops.patterns.sparse import (
    Blocks,
    Dilated,
    Fixed,
    Global,
    Keys,
    Queries,
    RandomBlocks,
    Sinks,
    Strided,
)
from longctx.ops.patterns.text import causal, parse

__all__ = [
    "Blocks",
    "Both",
    "Causal",
    "Chunked",
    "Dilated",
    "Either",
    "Everything",
    "Fixed",
    "Global",
    "Heads",
    "Keys",
    "Not",
    "Pattern",
    "Queries",
    "RandomBlocks",
    "Range",
    "ShiftedGroups",
    "Sinks",
    "Strided",
    "Sum",
    "Window",
    "causal",
    "parse",
    "terms",
    "touched_pairs",
]
