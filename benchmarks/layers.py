"""Every layer's speed on this machine, by length, next to full attention and to transformers' layers on the same CPU.

    pip install -e '.[bench]' && python benchmarks/layers.py --write

Layers have width 256 and, where they have heads, 4 of 64, in float32, one row; projections, convolutions and norms are
included on both sides. A number is the best of several calls; with a peer, the two sides take turns. Memory is what the
compiler sets aside for temporaries. What is measured is kept in a file of results, and a cell that is there is not
measured again, so that a run can be stopped and go on. With --write the tables replace benchmarks/layers.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from flax import nnx
from timing import best, compiled, machine, normal, peak

from longctx.layers import MIXERS, MLPS
from longctx.typing import Segments

WIDTH = 256
SIZES = {"heads": 4, "kv_heads": 4, "head_width": 64, "key_width": 64, "value_width": 64, "hidden": 256}
LENGTHS = (1024, 4096, 16384, 65536)
PEER_LENGTH = 2048
DECODED = (1024, 65536)  # tokens before the decoded one


def build(name: str):
    """The layer at the benchmark's size; an MLP has twice the width hidden."""
    cls = MIXERS.get(name) or MLPS[name]
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    sizes = SIZES | ({"hidden": 2 * WIDTH} if name in MLPS else {})
    return cls(WIDTH, cls.Config(**{key: size for key, size in sizes.items() if key in fields}), nnx.Rngs(params=0))


def programs(name: str):
    """The layer's forward pass, its gradients by parameters and input, and the parameters."""
    graph, params = nnx.split(build(name))

    def forward(params, segments, x):
        return nnx.merge(graph, params)(x, segments)[0]

    def both_ways(params, segments, x):
        return jax.grad(lambda params, x: jnp.sum(forward(params, segments, x)), (0, 1))(params, x)

    return forward, both_ways, nnx.as_pure(params)


def timed(call, limit: float = 3.0) -> float:
    """The least seconds of a call, of as many as fit into `limit` seconds, one at least after the first."""
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return min(best(call, repeats=1)[0] for _ in range(max(1, min(5, int(limit / max(once, 1e-6))))))


def by_length(name: str, length: int) -> dict:
    """Tokens a second and temporary bytes, forward and forward + backward."""
    forward, both_ways, params = programs(name)
    arguments, found = (params, Segments.single(1, length), normal(0, 1, length, WIDTH)), {}
    for way, function in (("forward", forward), ("both", both_ways)):
        program = jax.jit(function).lower(*arguments).compile()
        seconds = timed(lambda program=program: jax.block_until_ready(program(*arguments)))
        found[way] = length / seconds
        found[f"{way} bytes"] = program.memory_analysis().temp_size_in_bytes
    return found


def decoding(name: str, before: int) -> dict:
    """Microseconds of a token after `before` others, and the bytes of the state."""
    layer = build(name)
    state = layer.init_state(1, before + 64, jnp.float32)
    segments = Segments.single(1, 1, before)
    step = jax.jit(lambda x, state: layer(x, segments, state), donate_argnums=1)
    x, tokens = jnp.asarray(normal(0, 1, 1, WIDTH)), 32
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        _, state = jax.block_until_ready(step(x, state))
        seconds.append(time.perf_counter() - start)
    return {"microseconds": 1e6 * min(seconds), "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))}


def against_peer(name: str, length: int = PEER_LENGTH) -> dict:
    """Our time and the peer's, forward and forward + backward, in turns."""
    import torch

    torch.manual_seed(0)
    forward, both_ways, params = programs(name)
    x = normal(0, 1, length, WIDTH)
    arguments = (params, Segments.single(1, length), x)
    peer_name, module, call = PEERS[name]()
    given = torch.from_numpy(x).requires_grad_()

    def peer_forward():
        with torch.no_grad():
            call(given)

    def peer_both():
        module.zero_grad()
        call(given).sum().backward()

    found = {"peer": peer_name, "length": length}
    for way, ours, theirs in (("forward", forward, peer_forward), ("both", both_ways, peer_both)):
        found[way] = best(compiled(ours, *arguments), theirs, repeats=3)
    return found


def _qwen3_next():
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    config = peer.Qwen3NextConfig(
        hidden_size=WIDTH, num_hidden_layers=1, linear_num_value_heads=4, linear_num_key_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64, linear_conv_kernel_dim=4, layer_types=["linear_attention"],
    )  # fmt: skip
    module = peer.Qwen3NextGatedDeltaNet(config, 0)
    return "Qwen3-Next", module, module


def _recurrent_gemma():
    import torch
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as peer

    config = peer.RecurrentGemmaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, lru_width=WIDTH, num_attention_heads=4, conv1d_width=4
    )
    module = peer.RecurrentGemmaRecurrentBlock(config, 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    positions = torch.arange(PEER_LENGTH)[None]
    return "RecurrentGemma", module, lambda x: module(x, positions, None, use_cache=False)[0]


PEERS = {"gated_delta": _qwen3_next, "rglru": _recurrent_gemma}


def measure(names: list[str], results: pathlib.Path) -> dict:
    """All cells of the named layers, from the file of results or measured now and appended to it."""
    cells = {}
    if results.exists():
        cells = dict(map(json.loads, results.read_text().splitlines()))
    jobs = [(f"{name} T={length}", by_length, (name, length)) for name in names for length in LENGTHS]
    jobs += [(f"{name} decoding={before}", decoding, (name, before)) for name in names for before in DECODED]
    jobs += [(f"{name} peer", against_peer, (name,)) for name in names if name in PEERS]
    for number, (key, function, arguments) in enumerate(jobs, 1):
        if key in cells:
            continue
        cells[key] = function(*arguments)
        print(f"[{number}/{len(jobs)}] {key}: {cells[key]}", flush=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps([key, cells[key]]) + "\n")
    return cells


def report(names: list[str], cells: dict) -> str:
    """The tables in Markdown."""
    columns = "".join(f" {length:,} |" for length in LENGTHS)
    head = f"| layer |{columns}\n|---|{'---:|' * len(LENGTHS)}\n"

    def table(title, cell):
        rows = "".join(
            f"| {name} |" + "".join(f" {cell(cells[f'{name} T={length}'])} |" for length in LENGTHS) + "\n"
            for name in names
        )
        return f"\n## {title}\n\n{head}{rows}"

    text = [
        "# The layers' speed on a CPU\n\n"
        f"`python benchmarks/layers.py --write`, on {machine()}. One row, width {WIDTH}, heads of 64, float32, "
        f"projections included; a matrix product of 2048 x 2048 runs at {peak() / 1e9:.0f} GFLOP/s here. Columns are "
        "tokens in the row.\n",
        table("Forward, tokens a second", lambda cell: f"{cell['forward']:,.0f}"),
        table("Forward + backward, tokens a second", lambda cell: f"{cell['both']:,.0f}"),
        table("Forward + backward, MiB of temporaries", lambda cell: f"{cell['both bytes'] / 2**20:,.0f}"),
        "\n## Decoding one token\n\n"
        + "| layer |"
        + "".join(f" µs after {before:,} tokens | state, bytes |" for before in DECODED)
        + "\n|---|"
        + "---:|---:|" * len(DECODED)
        + "\n",
    ]
    for name in names:
        row = [cells[f"{name} decoding={before}"] for before in DECODED]
        text.append(f"| {name} |" + "".join(f" {c['microseconds']:,.0f} | {c['bytes']:,} |" for c in row) + "\n")
    text.append(
        "\n## Next to transformers' layers\n\n"
        "In turns; a ratio is the peer's time over ours: above 1 we are faster.\n\n"
        "| layer | peer | tokens | forward, ms | peer's, ms | ratio | both ways, ms | peer's, ms | ratio |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    for name in names:
        if (cell := cells.get(f"{name} peer")) is None:
            continue
        ways = "".join(
            f" {1e3 * ours:,.1f} | {1e3 * theirs:,.1f} | {theirs / ours:.1f} |"
            for ours, theirs in (cell["forward"], cell["both"])
        )
        text.append(f"| {name} | {cell['peer']} | {cell['length']:,} |{ways}\n")
    return "".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join((*MIXERS, *MLPS)), help="names, by commas")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("runs/layers.jsonl"))
    parser.add_argument("--write", action="store_true", help="replace benchmarks/layers.md")
    arguments = parser.parse_args()
    chosen = arguments.layers.split(",")
    text = report(chosen, measure(chosen, arguments.results))
    if arguments.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
