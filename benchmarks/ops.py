"""The ops' speed on this machine, next to PyTorch and transformers, in one run.

    pip install -e '.[bench]' && python benchmarks/ops.py --write

Every number is the best of several calls, the two sides of a ratio taking turns, so that what else the machine does
falls on both. A ratio is the peer's time over ours: above 1 we are faster. Beside it stand the operations that the
definition asks for (multiply-adds of its matrix products, counted twice) and the share of the machine's measured
peak for matrix products that they come to. With --write the table replaces benchmarks/ops.md.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import best, compiled, machine, normal, peak, require_peers

from longctx.layers import MIXERS
from longctx.ops import GATED_DELTA, attention
from longctx.ops.patterns import Causal, Window
from longctx.typing import Segments

HEADS, WIDTH = 4, 64


def both_ways(function: Callable, count: int) -> Callable:
    """Forward and backward: the gradient of the sum of what `function` gives with respect to its arguments."""
    return jax.grad(lambda *arguments: jnp.sum(function(*arguments)), tuple(range(count)))


def against_torch(length: int = 8192) -> list[dict]:
    """Causal attention next to scaled_dot_product_attention."""
    import torch

    q, k, v = (normal(seed, 1, length, HEADS, WIDTH) for seed in range(3))
    run = functools.partial(attention.attention, pattern=Causal())
    peers = [torch.from_numpy(x).transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    product = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def peer_forward():
        with torch.no_grad():
            product(*peers)

    operations = 2 * HEADS * WIDTH * length**2  # two products of T x T / 2 pairs
    rows = []
    for name, ours, theirs, factor in (
        ("forward", run, peer_forward, 1),
        ("forward + backward", both_ways(run, 3), lambda: product(*peers).sum().backward(), 3.5),
    ):
        seconds = best(compiled(ours, q, k, v), theirs)
        rows.append(row(f"causal attention, {name}, T={length}", seconds, "torch SDPA", factor * operations))
    return rows


def against_transformers(length: int = 8192) -> list[dict]:
    """The gated delta rule next to transformers' chunked form in PyTorch."""
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v = (normal(seed, 1, length, HEADS, WIDTH) for seed in range(3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = 1 / (1 + np.exp(-normal(3, 1, length, HEADS)))
    log_decay = -np.log1p(np.exp(normal(4, 1, length, HEADS) - 3))
    ours = both_ways(lambda *inputs: GATED_DELTA(*inputs)[0], 5)
    peers = [torch.from_numpy(x).requires_grad_() for x in (q, k, v, log_decay, beta)]
    seconds = best(
        compiled(ours, q, k, v, beta, log_decay),
        lambda: torch_chunk_gated_delta_rule(*peers)[0].sum().backward(),
    )
    chunk = 64
    # Per token and head: scores of keys and queries, the inverse, U and W, reading and writing the state, A times rows.
    products = 2 * chunk * WIDTH + chunk**2 / 3 + 2 * chunk * WIDTH + 3 * WIDTH**2 + chunk * WIDTH
    operations = 3 * 2 * HEADS * length * products
    name = f"gated delta rule, forward + backward, T={length}"
    return [row(name, seconds, "transformers torch_chunk_gated_delta_rule", operations)]


def window_against_full(length: int = 32768, window: int = 512) -> list[dict]:
    """Sliding-window attention next to full attention: work must follow the pattern."""
    q, k, v = (normal(seed, 1, length, HEADS, WIDTH) for seed in range(3))
    patterns = (Causal() & Window(window), Causal())
    calls = [compiled(functools.partial(attention.attention, pattern=pattern), q, k, v) for pattern in patterns]
    operations = 4 * HEADS * WIDTH * length * window
    name = f"window-{window} attention, forward, T={length}"
    return [row(name, best(*calls, repeats=3), "our full attention", operations)]


def row(name: str, seconds: list[float], peer: str, operations: float) -> dict:
    return {"name": name, "ours": seconds[0], "theirs": seconds[1], "peer": peer, "operations": operations}


def growth(short: int = 16384, long: int = 65536) -> list[tuple[str, float, float]]:
    """Microseconds a token of every mixer with a bounded state, forward, at two lengths."""
    layers = {name: (cls, cls.Config()) for name, cls in MIXERS.items() if name != "attention"}
    layers["attention, window=512"] = (MIXERS["attention"], MIXERS["attention"].Config(pattern="Window(512)"))
    width, found = 128, []
    for name, (cls, options) in layers.items():
        layer = cls(width, options, nnx.Rngs(params=0))
        calls = [
            compiled(lambda x, layer=layer: layer(x, Segments.single(1, x.shape[1]))[0], normal(0, 1, length, width))
            for length in (short, long)
        ]
        seconds = best(*calls)
        found.append((name, *(1e6 * s / length for s, length in zip(seconds, (short, long), strict=True))))
    return found


def report() -> str:
    top = peak()
    rows = against_torch() + against_transformers() + window_against_full()
    lines = [
        "# The ops' speed on a CPU",
        "",
        f"`python benchmarks/ops.py --write`, on {machine()}. B=1, H={HEADS}, K=V={WIDTH}, float32; a matrix product "
        f"of 2048 x 2048 runs at {top / 1e9:.0f} GFLOP/s here.",
        "",
        "| op | ours, ms | peer, ms | peer | peer / ours | GFLOP of the definition | of the peak |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for each in rows:
        lines.append(
            f"| {each['name']} | {1e3 * each['ours']:.0f} | {1e3 * each['theirs']:.0f} | {each['peer']} "
            f"| {each['theirs'] / each['ours']:.2f} | {each['operations'] / 1e9:.1f} "
            f"| {each['operations'] / each['ours'] / top:.0%} |"
        )
    lines += [
        "",
        "Layers with a bounded state, projections included, width 128, forward: the time of a token must not grow.",
        "",
        "| layer | µs a token at T=16,384 | at T=65,536 | ratio |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {name} | {short:.2f} | {long:.2f} | {long / short:.2f} |" for name, short, long in growth()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace benchmarks/ops.md")
    write = parser.parse_args().write
    require_peers()
    text = report()
    if write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
