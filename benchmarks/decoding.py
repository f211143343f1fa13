"""Milliseconds of a decoded token next to transformers' and to what reading memory once takes, on a CPU.

    pip install -e '.[bench]' && python benchmarks/decoding.py --write

A Llama of 135 million parameters with random weights in float32, one row, with so many tokens in its cache. The bound
is the bytes of parameters and filled cache over the memory bandwidth, measured in the same run as a product of a matrix
of 512 MiB and a vector. Ours, theirs and the bound take turns; a number is the best of all rounds. `--tokens` gives
other lengths, and with --write the table replaces benchmarks/decoding.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import best, compiled, machine, require_peers

from longctx import config
from longctx.inference.decode import STEPS, Decode
from longctx.inference.prefill import capacity_for
from longctx.inference.sampling import Sampling
from longctx.layers import MIXERS, MLPS
from longctx.layers.attention import AttentionState
from longctx.memory.store import RingStore
from longctx.models import LanguageModel

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 30, 576, 9, 3, 1536, 49_152
STEP = 8  # tokens a turn


def ours() -> LanguageModel:
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_width": WIDTH // HEADS}
    block = {"mixer": {"kind": "attention", **sizes, "qk_norm": False}, "mlp": {"kind": "swiglu", "hidden": HIDDEN}}
    model = {"width": WIDTH, "pattern": ("llama",), "repeats": LAYERS, "blocks": {"llama": block}, "dtype": "float32"}
    tree = {"model": model, "training": {"stages": ((1, 1, 64),)}}
    return LanguageModel(config.parse(tree, MIXERS, MLPS).model, VOCABULARY, nnx.Rngs(params=0)).unrolled()


def theirs():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_flush_denormal(True)  # as XLA does
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 2**20}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation="sdpa")).eval()


def filled(state: tuple, tokens: int) -> tuple:
    """The state of as many random tokens."""

    def fill(mixer: AttentionState) -> AttentionState:
        store: RingStore = mixer.cache
        rng = np.random.default_rng(0)
        entries = tuple(jnp.asarray(rng.standard_normal(x.shape, np.float32)) for x in store.entries)
        positions = jnp.where(jnp.arange(store.positions.shape[1]) < tokens, jnp.arange(store.positions.shape[1]), -1)
        written = jnp.full_like(store.written, tokens)
        cache = dataclasses.replace(store, entries=entries, positions=positions[None], written=written)
        return AttentionState(cache, mixer.conv)

    return tuple((fill(mixer), mlp) for mixer, mlp in state)


def measure(model: LanguageModel, peer, tokens: int, room: int, rounds: int) -> dict:
    """Seconds of a token of ours, step by step and `STEPS` together, of theirs, and of reading memory once."""
    import torch
    from transformers import DynamicCache

    decode, batch = Decode(model), np.zeros(1, np.int32)
    how = (np.zeros(1, np.uint32), *Sampling(temperature=0).rows(1))
    state = filled(jax.jit(model.init_state, static_argnums=(0, 1))(1, room), tokens - STEP)
    arguments = decode._params, batch[:, None], batch, how, state
    memory = decode._step.lower(*arguments).compile().memory_analysis()
    step, steps = (program.lower(*arguments, *more).compile() for program, more in
                   ((decode._step, ()), (decode._steps, (np.int32(1),))))  # fmt: skip

    def streamed():
        nonlocal state
        chosen = batch[:, None]
        for number in range(tokens - STEP, tokens):
            chosen, state = step(decode._params, chosen, np.full(1, number, np.int32), how, state)
            np.asarray(chosen)

    def together():
        nonlocal state
        first = np.full(1, tokens - STEP, np.int32)
        chosen, _, state = steps(decode._params, batch[:, None], first, how, state, np.int32(STEP))
        np.asarray(chosen)

    cache, generator = DynamicCache(config=peer.config), torch.Generator().manual_seed(0)
    shape = 1, KV_HEADS, tokens - STEP, WIDTH // HEADS
    for layer in range(LAYERS):
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)

    def peers():
        chosen = torch.zeros(1, 1, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(STEP):
                chosen = peer(chosen, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-STEP)

    matrix = jnp.ones((2**16, 2**11))
    read = compiled(jnp.matmul, matrix, jnp.ones(2**11))
    times = best(streamed, together, peers, read, repeats=rounds)
    bandwidth = matrix.nbytes / times[3]
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(decode._params))
    cached = 2 * 4 * LAYERS * KV_HEADS * (WIDTH // HEADS) * tokens
    return {
        "streamed": times[0] / STEP, "together": times[1] / STEP, "peer": times[2] / STEP, "bandwidth": bandwidth,
        "bound": (parameters + cached) / bandwidth, "temporary": memory.temp_size_in_bytes,
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }  # fmt: skip


def report(lengths: list[int], rounds: int) -> str:
    model, peer = ours(), theirs()
    counts = sum(x.size for x in jax.tree.leaves(nnx.state(model))), sum(x.numel() for x in peer.parameters())
    if counts[0] != counts[1]:
        raise ValueError(f"ours has {counts[0]:,} parameters and transformers' {counts[1]:,}; give both the same sizes")
    text = (
        "# Decoding's speed on a CPU\n\n"
        f"`python benchmarks/decoding.py --write`, on {machine()}.\n\n"
        f"A Llama of {counts[0]:,} parameters ({LAYERS} layers, width {WIDTH}, {HEADS} heads, {KV_HEADS} of keys, "
        f"vocabulary {VOCABULARY:,}), random weights, float32, one row. Milliseconds a token; ours, transformers' "
        "`LlamaForCausalLM` (SDPA, dynamic cache) and the bound in turns, the best of all rounds. The bound is "
        "parameters and filled cache over the bandwidth. A room that is not full is read whole: it has at most a "
        "quarter more than the tokens, or 256.\n\n"
        f"| tokens | room | GB/s | bound | ours, streamed | ours, {STEPS} a program | transformers | ours / bound "
        "| transformers / ours | temporaries / state |\n|" + " --- |" * 10 + "\n"
    )
    for tokens in lengths:
        for room in (capacity_for(tokens), capacity_for(tokens + 1)):
            found = measure(model, peer, tokens, room, rounds)
            ours_best = min(found["streamed"], found["together"])
            cells = [f"{tokens:,}", f"{room:,}", f"{found['bandwidth'] / 1e9:.1f}"]
            cells += [f"{1e3 * found[name]:.1f}" for name in ("bound", "streamed", "together", "peer")]
            cells += [f"{ours_best / found['bound']:.2f}", f"{found['peer'] / ours_best:.2f}"]
            text += "| " + " | ".join([*cells, f"{found['temporary'] / found['state']:.1%}"]) + " |\n"
            print(text.splitlines()[-1], flush=True)
    load = os.getloadavg()[2]
    return text + f"\nThe machine's load at the end: {load:.1f}. Other work slows most what waits for all cores.\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace benchmarks/decoding.md")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="in the cache")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each")
    arguments = parser.parse_args()
    require_peers()
    found = report(arguments.tokens, arguments.rounds)
    if arguments.write:
        pathlib.Path(__file__).with_suffix(".md").write_text(found, encoding="utf-8")
    print(found)
