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
import math
import pathlib
import time

import jax
import jax.numpy as jnp
from flax import nnx
from layer_peers import HEAD_WIDTH, HEADS, PEERS, WIDTH
from timing import best, compiled, machine, normal, peak, require_peers

from longctx.layers import MIXERS, MLPS
from longctx.typing import Segments

SIZES = {"heads": HEADS, "kv_heads": HEADS, "hidden": WIDTH}
SIZES |= {"head_width": HEAD_WIDTH, "key_width": HEAD_WIDTH, "value_width": HEAD_WIDTH}
LENGTHS = (1024, 4096, 16384, 65536)
COUNTED = 4096  # tokens in the row whose operations are told
DECODED = (1024, 65536)  # tokens before the decoded ones
PEER_LENGTH = 2048
LONGEST = 60.0  # seconds: a call that would take longer, as those of shorter rows foretell, is not made
ENOUGH = 1.0  # seconds of calls after which no other is made


def build(name: str, options: dict | None = None):
    """The layer at the benchmark's size; an MLP has twice the width hidden."""
    cls = MIXERS.get(name) or MLPS[name]
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    sizes = SIZES | ({"hidden": 2 * WIDTH} if name in MLPS else {})
    sizes = {key: size for key, size in sizes.items() if key in fields} | (options or {})
    return cls(WIDTH, cls.Config(**sizes), nnx.Rngs(params=0))


def programs(name: str, options: dict | None = None):
    """The layer's forward pass, its gradients by parameters and input given the output's, and the parameters."""
    graph, params = nnx.split(build(name, options))

    def forward(params, segments, x, dy):
        return nnx.merge(graph, params)(x, segments)[0]

    def both_ways(params, segments, x, dy):
        return jax.vjp(lambda params, x: forward(params, segments, x, dy), params, x)[1](dy)

    return {"forward": forward, "both": both_ways}, nnx.as_pure(params)


def by_length(name: str, length: int, foretold: dict[str, float]) -> dict:
    """Seconds and temporary bytes, forward and forward + backward, and the operations of the forward pass.

    Args:
      name: of the layer.
      length: T.
      foretold: seconds that the two will take; None in place of what would take too long.
    """
    functions, params = programs(name)
    arguments, found = (
        (params, Segments.single(1, length), normal(0, 1, length, WIDTH), normal(1, 1, length, WIDTH)),
        {},
    )
    for way, function in functions.items():
        traced = jax.jit(function).trace(*arguments)
        program = traced.lower().compile()
        found[f"{way} bytes"] = program.memory_analysis().temp_size_in_bytes
        if way == "forward":
            found["operations"] = operations(traced.jaxpr.jaxpr) + VISIBLE.get(name, 0) * 2 * WIDTH * length**2
        found[way] = None
        if foretold[way] <= LONGEST:
            (found[way],) = best(lambda program=program: jax.block_until_ready(program(*arguments)), limit=ENOUGH)
    return found


# Attention's loops over blocks of keys have lengths known when they run. Full attention has two products of T²/2 pairs
# of tokens, each 2 WIDTH operations; those of short windows are left out.
VISIBLE = {"attention": 1, "forgetting": 1}


def operations(jaxpr) -> int:
    """Operations of the matrix products in a program; those of a scan's step count as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            operations(getattr(leaf, "jaxpr", leaf))
            for leaf in jax.tree.leaves(list(equation.params.values()))
            if hasattr(getattr(leaf, "jaxpr", leaf), "eqns")
        ]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name != "while":
            total += equation.params.get("length", 1) * sum(inner)
    return total


def decoding(name: str, before: int, tokens: int = 64) -> dict:
    """Microseconds of a token after `before` others, the mean over `tokens` of them, and the bytes of the state."""
    graph, params = nnx.split(build(name))
    params = nnx.as_pure(params)

    def run(params, segments, x, state=None):
        return nnx.merge(graph, params)(x, segments, state)

    prefill = jax.jit(lambda *arguments: run(*arguments)[1])
    state = prefill(params, Segments.single(1, before), normal(0, 1, before, WIDTH))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step, x = jax.jit(run, donate_argnums=3), jnp.asarray(normal(0, 1, 1, WIDTH))
    segments = [Segments.single(1, 1, before + token) for token in range(tokens)]
    _, state = jax.block_until_ready(step(params, segments[0], x, state))  # compiled before the clock starts

    def decode():
        nonlocal state
        for place in segments:
            _, state = jax.block_until_ready(step(params, place, x, state))

    return {"microseconds": 1e6 * best(decode, repeats=3, limit=ENOUGH)[0] / tokens, "bytes": size}


def against_peer(name: str, length: int = PEER_LENGTH) -> dict:
    """Seconds of ours and of the peer, forward and forward + backward, in turns, and the parameters of both."""
    import torch

    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as XLA does
    peer = PEERS[name]
    module, call = peer.build(length)
    module.train(False)
    for parameter in module.parameters():  # some modules leave theirs to the model to set
        torch.nn.init.normal_(parameter, std=0.05)
    functions, params = programs(peer.layer, peer.options)
    numbers = [sum(leaf.size for leaf in jax.tree.leaves(params)), sum(leaf.numel() for leaf in module.parameters())]
    if numbers[0] + peer.extra != numbers[1]:
        raise ValueError(
            f"{peer.layer} has {numbers[0]:,} parameters and its peer {name} {numbers[1]:,}, of which {peer.extra:,} "
            "should be its alone; give both the same sizes in benchmarks/layer_peers.py."
        )
    x, dy = normal(0, 1, length, WIDTH), normal(1, 1, length, WIDTH)
    given, cotangent = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)

    def forward():
        with torch.no_grad():
            call(given)

    def both_ways():
        module.zero_grad()
        given.grad = None
        call(given).backward(cotangent)

    found = {"length": length, "parameters": numbers}
    for way, theirs in (("forward", forward), ("both", both_ways)):
        ours = compiled(functions[way], params, Segments.single(1, length), x, dy)
        found[way] = best(ours, theirs, repeats=10, limit=4 * ENOUGH)
    return found


def foretell(cells: dict, name: str, length: int) -> dict[str, float]:
    """Seconds that calls will take if they grow as between the last two rows; infinite where one was left out."""
    shorter = [cells[key] for each in LENGTHS if each < length and (key := f"{name} T={each}") in cells]
    found = {}
    for way in ("forward", "both"):
        times = [cell[way] or float("inf") for cell in shorter]
        found[way] = times[-1] * max(times[-1] / times[-2], 1) if len(times) > 1 else 0.0
    return found


def measure(names: list[str], results: pathlib.Path) -> dict:
    """All cells of the named layers, from the file of results or measured now and appended to it."""
    cells = {}
    if results.exists():
        cells = dict(map(json.loads, results.read_text().splitlines()))
    jobs = [(f"peer {name}", against_peer, (name,)) for name, peer in PEERS.items() if peer.layer in names]
    jobs += [(f"{name} T={length}", by_length, (name, length)) for name in names for length in LENGTHS]
    jobs += [(f"{name} decoding={before}", decoding, (name, before)) for name in names for before in DECODED]
    jobs = [job for job in jobs if job[0] not in cells]
    if any(function is against_peer for _, function, _ in jobs):
        require_peers()
    begin = time.perf_counter()
    for number, (key, function, arguments) in enumerate(jobs, 1):
        cells[key] = function(*arguments, *([foretell(cells, *arguments)] if function is by_length else []))
        left = (time.perf_counter() - begin) / number * (len(jobs) - number) / 60
        print(f"[{number}/{len(jobs)}, some {left:.0f} min left] {key}: {cells[key]}", flush=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps([key, cells[key]]) + "\n")
    return cells


def report(names: list[str], cells: dict) -> str:
    """The tables in Markdown."""
    top = peak()

    def by_lengths(title, cell):
        rows = [[name, *(cell(cells[f"{name} T={length}"], length) for length in LENGTHS)] for name in names]
        return f"\n## {title}\n\n" + table(["layer", *(f"{length:,}" for length in LENGTHS)], rows)

    def speed(way):
        return lambda cell, length: f"{length / cell[way]:,.0f}" if cell[way] else "—"

    text = (
        "# The layers' speed on a CPU\n\n"
        f"`python benchmarks/layers.py --write`, on {machine()}. One row, width {WIDTH}, heads of {HEAD_WIDTH}, "
        f"float32, projections included; a matrix product of 2048 x 2048 runs at {top / 1e9:.0f} GFLOP/s here. "
        f"Columns are tokens in the row; a dash stands for a call that would take more than {LONGEST:.0f} s, as those "
        "of shorter rows foretell.\n"
    )
    text += by_lengths("Forward, tokens a second", speed("forward"))
    text += by_lengths("Forward + backward, tokens a second", speed("both"))
    text += by_lengths("Forward + backward, MiB of temporaries", lambda cell, _: f"{cell['both bytes'] / 2**20:,.0f}")
    text += (
        f"\n## Matrix products of the forward pass, {COUNTED:,} tokens\n\n"
        "Operations are counted in the traced program, those of full attention by its definition, and those of "
        "attention in short windows left out; what a branch skips is counted (half of PaTH's).\n\n"
    )
    rows = []
    for name in names:
        cell = cells[f"{name} T={COUNTED}"]
        share = f"{cell['operations'] / cell['forward'] / top:.0%}" if cell["forward"] else "—"
        rows.append([name, f"{cell['operations'] / COUNTED / 1000:,.0f}", share])
    text += table(["layer", "thousand operations a token", "of the machine's peak"], rows)
    rows = []
    for name in names:
        row = [cells[f"{name} decoding={before}"] for before in DECODED]
        rows.append([name, *(text for c in row for text in (f"{c['microseconds']:,.0f}", f"{c['bytes']:,}"))])
    heads = [text for before in DECODED for text in (f"µs after {before:,} tokens", "state, bytes")]
    text += "\n## Decoding one token\n\n" + table(["layer", *heads], rows)
    if rows := peer_rows(names, cells):
        heads = ["layer", "peer", "parameters", "peer's", "peer's way", "forward, ms", "peer's", "ratio"]
        text += (
            f"\n## Next to transformers' layers, {PEER_LENGTH:,} tokens\n\n"
            "In turns, at equal sizes; a ratio is the peer's time over ours: above 1 we are faster. The peer's way "
            "through the tokens is the fastest that transformers has on a CPU without further packages.\n\n"
        ) + table([*heads, "both ways, ms", "peer's", "ratio"], rows, words=(0, 1, 4))
    return text


def peer_rows(names: list[str], cells: dict) -> list[list[str]]:
    rows = []
    for name, peer in PEERS.items():
        if peer.layer in names:
            cell = cells[f"peer {name}"]
            options = "".join(f", {key}={value}" for key, value in peer.options.items())
            row = [peer.layer + options, name, *(f"{number:,}" for number in cell["parameters"]), peer.path]
            for ours, theirs in (cell["forward"], cell["both"]):
                row += [f"{1e3 * ours:,.1f}", f"{1e3 * theirs:,.1f}", f"{theirs / ours:.1f}"]
            rows.append(row)
    return rows


def table(heads: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """A table in Markdown, of which the columns `words` are not numbers."""
    line = ["---" if column in words else "---:" for column in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, line, *rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join((*MIXERS, *MLPS)), help="names, by commas")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("runs/layers.jsonl"))
    parser.add_argument("--write", action="store_true", help="replace benchmarks/layers.md")
    arguments = parser.parse_args()
    chosen = arguments.layers.split(",")
    if unknown := [name for name in chosen if name not in {*MIXERS, *MLPS}]:
        parser.error(f"no layer is called {', '.join(unknown)}; choose of {', '.join((*MIXERS, *MLPS))}")
    text = report(chosen, measure(chosen, arguments.results))
    if arguments.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
