"""Attention's speed on this machine: full, next to PyTorch; sparse, next to what its pattern leaves to do.

    pip install -e '.[bench]' && python benchmarks/attention.py --write

Every number is the best of several calls, all of a table taking turns, so that what else the machine does falls on all.
A ratio is the other's time over ours: above 1 we are faster. A pattern that shows n pairs of tokens promises T(T+1)/2n
times the speed of full causal attention, as if work were all in the pairs; its share is how much of that is measured.
Its work is that of the blocks it touches, read off the compiled program.
With --write the tables replace benchmarks/attention.md.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from layers import WIDTH, programs, table
from timing import best, compiled, machine, normal, peak, require_peers

from longctx.ops.attention import attention
from longctx.ops.patterns import Blocks, Causal, Heads, Pattern, causal, parse
from longctx.planning.programs import operations
from longctx.typing import Segments

HEADS, KEYS = 4, 64
LENGTHS = {"forward": (4096, 8192, 16384), "forward + backward": (4096, 8192)}
LENGTH = 32768  # of the patterns' rows
PATTERNS = {
    "the own token": "Window(1)",
    "sliding window": "Window(512)",
    "... and the first tokens": "Window(512) | Sinks(4)",
    "wide window": "Window(4096)",
    "groups": "Chunked(512)",
    "shifted groups": "ShiftedGroups(512)",
    "LongLoRA": "Chunked(512), ShiftedGroups(512)",
    "stride": "Strided(128)",
    "Sparse Transformer, strided": "Window(128) | Strided(128)",
    "Sparse Transformer, fixed": "Chunked(128) | Fixed(128, 8)",
    "LongNet": "Dilated(2048, 1) + Dilated(4096, 2) + Dilated(8192, 4) + Dilated(16384, 8) + Dilated(32768, 16)",
    "random blocks": "RandomBlocks(64, 3)",
    "BigBird": "Window(256) | Global(64) | RandomBlocks(64, 3)",
    "Longformer": "Window(512) | Global((0, 1000, 20000))",
}
LAYOUT = np.random.default_rng(0).random((64, 64)) < 0.1
LAYERS = {  # those whose pattern is in the tokens, with sizes of their papers, and hierarchies
    "attention": {},
    "moba": {"block": 512, "count": 3},
    "nsa": {"compressed": 32, "stride": 16, "selected": 64, "count": 16, "window": 512},
    "indexer_topk": {"count": 2048, "index_heads": 4, "index_width": 32},
    "lsh": {"buckets": 64, "rounds": 2},
    "h_transformer": {"block": 16, "levels": 11},
    "pyramid": {"window": 64, "levels": 6},
}
ROWS = (2048, 8192, 32768)  # tokens in the layers' rows


def forward(function: Callable) -> Callable:
    return lambda q, k, v, dy: function(q, k, v)


def both_ways(function: Callable) -> Callable:
    """Forward and backward: the gradients of q, k and v, given that of the output."""
    return lambda q, k, v, dy: jax.vjp(function, q, k, v)[1](dy)


WAYS = {"forward": forward, "forward + backward": both_ways}


def heads(length: int) -> list[np.ndarray]:
    """q, k, v, and the output's gradient."""
    return [normal(seed, 1, length, HEADS, KEYS) for seed in range(4)]


def against_torch() -> list[list[str]]:
    """Rows of full causal attention next to scaled_dot_product_attention."""
    import torch

    product, rows = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True), []
    for way, lengths in LENGTHS.items():
        for length in lengths:
            arrays = heads(length)
            *peers, cotangent = (torch.from_numpy(x).transpose(1, 2).contiguous().requires_grad_() for x in arrays)

            def theirs(peers=peers, cotangent=cotangent, backward=way != "forward"):
                with torch.set_grad_enabled(backward):
                    y = product(*peers)
                if backward:
                    torch.autograd.grad(y, peers, cotangent)

            seconds = best(compiled(WAYS[way](attention), *arrays), theirs)
            rows.append([way, f"{length:,}", *(f"{1e3 * s:,.0f}" for s in seconds), f"{seconds[1] / seconds[0]:.2f}"])
    return rows


def visible_pairs(pattern: Pattern | Heads, length: int, rows: int = 256) -> float:
    """How many keys the queries of a row of one document see, all together: `rows` queries at a time, mean of heads."""
    patterns = pattern.patterns if isinstance(pattern, Heads) else (pattern,)
    places = jnp.arange(length)

    def count(queries):
        return [one.times(queries[:, None], places).sum(dtype=jnp.int32) for one in patterns]

    counts = jax.jit(lambda: jax.lax.map(count, places.reshape(-1, rows)))()
    return float(np.asarray(counts).sum(dtype=np.int64)) / len(patterns)


def by_pattern(ways: list[str], length: int = LENGTH) -> list[list[str]]:
    """Rows of the patterns next to full causal attention."""
    patterns = [causal(parse(text)) for text in PATTERNS.values()] + [Causal() & Blocks(LAYOUT, length // len(LAYOUT))]
    texts = [*PATTERNS.items(), ("a table of blocks", f"Blocks({LAYOUT.mean():.0%} of 64 x 64, {length // 64})")]
    visible, pairs = [visible_pairs(pattern, length) for pattern in patterns], length * (length + 1) / 2
    rows = []
    for (name, text), seen in zip(texts, visible, strict=True):
        text = text.replace("|", "\\|")  # not the end of a cell
        rows.append([name, f"`{text}`", f"{seen:,.0f}", f"{seen / pairs:.2%}", f"{pairs / seen:.1f}"])
    arrays = heads(length)
    for way in ways:
        runs = [WAYS[way](functools.partial(attention, pattern=pattern)) for pattern in (Causal(), *patterns)]
        all_work, *work = (operations(jax.jit(run).lower(*arrays).compile().as_text()) for run in runs)
        full, *seconds = best(*(compiled(run, *arrays) for run in runs), repeats=3)
        for row, s, seen, done in zip(rows, seconds, visible, work, strict=True):
            row += [f"{done / all_work:.2%}", f"{1e3 * s:,.0f}", f"{full / s:.1f}"]
            row += [f"{full / s * seen / pairs:.2f}", f"{s / full * all_work / done:.1f}"]
    return rows


def by_layer() -> list[list[str]]:
    """Rows of the layers whose tokens choose what they see, next to full attention as a layer, forward."""
    columns = []
    for length in ROWS:
        arguments = (Segments.single(1, length), normal(0, 1, length, WIDTH), normal(1, 1, length, WIDTH))
        calls = []
        for name, options in LAYERS.items():
            functions, params = programs(name, options)
            calls.append(compiled(functions["forward"], params, *arguments))
        columns.append(best(*calls, repeats=3))
    return [
        [
            f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name,
            *(text for times in columns for text in (f"{1e3 * times[i]:,.0f}", f"{times[0] / times[i]:.2f}")),
        ]
        for i, (name, options) in enumerate(LAYERS.items())
    ]


def report(ways: list[str]) -> str:
    text = (
        "# Attention's speed on a CPU\n\n"
        f"`python benchmarks/attention.py --write`, on {machine()}. B=1, H={HEADS}, K=V={KEYS}, float32; a matrix "
        f"product of 2048 x 2048 runs at {peak() / 1e9:.0f} GFLOP/s here.\n\n"
        "## Full causal attention next to PyTorch\n\n"
    )
    titles = ["way", "tokens", "ours, ms", "torch SDPA, ms", "torch / ours"]
    text += table(titles, against_torch())
    text += (
        f"\n## Patterns next to full causal attention, {LENGTH:,} tokens\n\n"
        "All with `Causal() &`. Pairs are those of one head; a key seen twice counts twice. Promised is the speed-up "
        "if work were all in the pairs, and the share is how much of it is measured. Work is that of the touched "
        "blocks, in operations of the compiled program as a part of full attention's; time / work is how much longer "
        "a pattern takes than its work at full attention's pace. `Window(1)` shows what there is beside the pairs: "
        "bringing queries, keys and values into blocks, and the output back.\n\n"
    )
    titles = ["", "pattern", "visible pairs", "of the causal", "promised"]
    titles += [title for way in ways for title in ("work", f"{way}, ms", "speed-up", "share", "time / work")]
    text += table(titles, by_pattern(ways), words=(0, 1))
    text += (
        "\n## Layers whose tokens choose what they see, and hierarchies, forward\n\n"
        f"Width {WIDTH}, heads of {KEYS}, projections included; a ratio is full attention's time over the layer's.\n\n"
    )
    titles = ["layer", *(title for length in ROWS for title in (f"ms, {length:,} tokens", "ratio"))]
    return text + table(titles, by_layer())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace benchmarks/attention.md")
    parser.add_argument("--backward", action="store_true", help="the patterns' backward pass too: some more minutes")
    arguments = parser.parse_args()
    require_peers()
    text = report(list(WAYS) if arguments.backward else ["forward"])
    if arguments.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
