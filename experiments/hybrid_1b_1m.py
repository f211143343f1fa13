"""A language model of 1.1 billion parameters trained on rows of 1,048,576 tokens, over a TPU pod of 128 chips.

Three gated delta layers, then one of sliding-window attention: the order of Gated DeltaNet-H1 (Yang, Kautz and
Hatamizadeh, arXiv:2412.06464) with the ratio of Qwen3-Next and Kimi Linear. What crosses devices is a matrix state in
log2 hops, and the last 2,047 keys and values: the bytes that a layer sends do not depend on the length of the row.

Command, for any name in ROWS (by default 1m), or `attention` after a comma for full softmax attention in every layer:

    python -m longctx.plan --config=experiments/hybrid_1b_1m.py:1m --topology=v5p:4x4x8
    python -m longctx.train --config=experiments/hybrid_1b_1m.py:1m --workdir=runs/hybrid_1b_1m

Hardware: TPU v5p, 128 chips. It was compiled for them, and what it takes is in docs/plans/hybrid_1b_1m.md; it was
never run there. Only `smoke`, the same at a size for a test, was trained.
"""

from ml_collections import ConfigDict

ROWS = {"128k": 2**17, "1m": 2**20, "4m": 2**22, "smoke": 128}  # tokens
CONTEXT = {"128k": 8, "1m": 16, "4m": 128, "smoke": 1}  # devices that share a row
TOKENS = 2**23  # a step, in rows of any length


def get_config(arg: str = "1m") -> ConfigDict:
    """`ROW`, or `ROW,attention` for full softmax attention in every layer."""
    row, _, kind = arg.partition(",")
    if row not in ROWS or kind not in ("", "attention"):
        raise ValueError(f"the row is '{arg}'; choose one of {', '.join(ROWS)}, and ',attention' after it or nothing")
    small = row == "smoke"
    heads, head_width, width = (2, 16, 32) if small else (16, 128, 2048)
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the rows and the planted facts

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that are left
    config.mesh.context = CONTEXT[row]  # devices that split the sequence
    config.mesh.model = 1  # devices that split heads and hidden widths

    config.data = ConfigDict()
    config.data.kind = "corpus"
    config.data.path = ""  # a file or folder of your own documents; empty: the interpreter's standard library
    config.data.vocab_size = 512 if small else 32768  # entries of the byte-pair vocabulary
    config.data.heldout = 0.1 if small else 0.01  # fraction of the text kept for evaluation
    config.data.needles = ConfigDict()
    config.data.needles.rows = 0.5  # fraction of the rows that carry facts to be asked for later
    config.data.needles.facts = 8  # facts per such row

    delta = {"kind": "gated_delta", "heads": heads, "key_width": head_width // 2, "value_width": head_width}
    window = {"kind": "attention", "heads": heads, "kv_heads": heads // 2, "head_width": head_width}
    window["pattern"] = f"Window({16 if small else 2048})"
    blocks = {"full": window | {"pattern": "Causal()"}} if kind else {"delta": delta, "window": window}
    config.model = ConfigDict()
    config.model.width = width  # D
    config.model.pattern = ("full",) * 4 if kind else ("delta", "delta", "delta", "window")  # blocks, in order
    config.model.repeats = 1 if small else 5  # times the pattern is repeated
    config.model.dtype = "auto"  # of activations: bfloat16 on GPU and TPU, float32 on CPU
    config.model.remat = "full"  # the backward pass recomputes all but the inputs of a repeat
    config.model.blocks = ConfigDict()
    for name, mixer in blocks.items():
        config.model.blocks[name] = {"mixer": mixer, "mlp": {"kind": "swiglu", "hidden": 64 if small else 5632}}

    config.training = ConfigDict()
    config.training.stages = ((6, 2, 128),) if small else ((20_000, TOKENS // ROWS[row], ROWS[row]),)
    config.training.learning_rate = 3e-3 if small else 4e-4  # at its peak
    config.training.warmup_steps = 2 if small else 1000  # linear, from 0
    config.training.accumulate = 1  # micro-batches a step

    config.evaluation = ConfigDict()
    config.evaluation.factors = (1, 2) if small else (1,)  # lengths tested, in multiples of the trained length
    config.evaluation.samples = 2 if small else 16  # needles per depth and length
    config.evaluation.documents = 4 if small else 32  # held-out windows for perplexity and loss by position
    return config
