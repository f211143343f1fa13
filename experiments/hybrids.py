"""Hybrid language models: recurrent layers between layers of softmax attention, in the patterns of six papers.

Command, for any name in PATTERNS (by default griffin):

    python -m longctx.train --config=experiments/hybrids.py:griffin --workdir=runs/griffin

Hardware: 2 CPU cores at this size (width 128); for a GPU or a pod, give `--config.model.width`, the heads and hidden
widths of the blocks, `--config.training.stages` and `--config.mesh`. What a model scores depends on all of these; only
that each pattern trains, evaluates and reports was checked here (`NAME,smoke`).
"""

from ml_collections import ConfigDict

PATTERNS = {
    # De et al. 2024: two recurrent blocks, then one of local attention.
    "griffin": ("rglru", "rglru", "window"),
    # Ren et al. 2024: Mamba and sliding-window attention in turn.
    "samba": ("mamba", "window"),
    # Lieber et al. 2024: one attention layer, without positions, in eight; its experts are left out.
    "jamba": ("mamba", "mamba", "mamba", "mamba", "full", "mamba", "mamba", "mamba"),
    # Kimi Team 2025: three layers of Kimi Delta Attention, then full attention without positions.
    "kimi_linear": ("kda", "kda", "kda", "full"),
    # Hutchins et al. 2022: one recurrent layer among layers of sliding-window attention.
    "block_recurrent": ("window", "window", "block_recurrent", "window"),
    # Munkhdalai et al. 2024: every layer has local attention and a compressive memory.
    "infini": ("infini", "infini", "infini", "infini"),
}

MIXERS = {
    "rglru": {"kind": "rglru", "hidden": 128, "heads": 2},
    "mamba": {"kind": "mamba", "inner": 256, "state": 16, "step_rank": 8},
    "kda": {"kind": "kda", "heads": 2, "key_width": 64, "value_width": 64},
    "window": {
        "kind": "attention",
        "heads": 2,
        "kv_heads": 1,
        "head_width": 64,
        "pattern": "Window(128)",
        "conv_width": 4,
    },
    "full": {
        "kind": "attention",
        "heads": 2,
        "kv_heads": 2,
        "head_width": 64,
        "positions": {"kind": "nope"},
        "conv_width": 4,
    },
    "block_recurrent": {"kind": "block_recurrent", "heads": 2, "head_width": 64, "block": 128, "vectors": 32},
    "infini": {"kind": "infini", "heads": 2, "head_width": 64, "segment": 128},
}


def get_config(arg: str = "griffin") -> ConfigDict:
    """`NAME`, or `NAME,smoke` for a test of the machinery."""
    name, _, size = arg.partition(",")
    if name not in PATTERNS or size not in ("", "smoke"):
        raise ValueError(
            f"the hybrid is '{arg}'; choose one of {', '.join(PATTERNS)}, and ',smoke' after it or nothing"
        )
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the rows and the planted facts

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that are left
    config.mesh.context = 1  # devices that split the sequence
    config.mesh.model = 1  # devices that split heads and hidden widths

    config.data = ConfigDict()
    config.data.kind = "corpus"
    config.data.path = ""  # a file or folder of your own documents; empty: the interpreter's standard library
    config.data.vocab_size = 2048  # entries of the byte-pair vocabulary
    config.data.heldout = 0.1  # fraction of the text kept for evaluation
    config.data.needles = ConfigDict()
    config.data.needles.rows = 0.5  # fraction of the rows that carry facts to be asked for later
    config.data.needles.facts = 8  # facts per such row

    config.model = ConfigDict()
    config.model.width = 128  # D
    config.model.pattern = PATTERNS[name]  # blocks, in order
    config.model.repeats = 1  # times the pattern is repeated
    config.model.dtype = "auto"  # of activations: bfloat16 on GPU and TPU, float32 on CPU
    config.model.remat = "none"  # what the backward pass recomputes: "none", "dots", "full" or "offload"
    config.model.blocks = ConfigDict()
    for block in dict.fromkeys(PATTERNS[name]):
        config.model.blocks[block] = {"mixer": MIXERS[block], "mlp": {"kind": "swiglu", "hidden": 256}}

    config.training = ConfigDict()
    config.training.stages = ((100, 16, 128), (450, 8, 512))  # (steps, rows, tokens a row)
    config.training.learning_rate = 3e-3  # at its peak
    config.training.warmup_steps = 50  # linear, from 0
    config.training.answer_weight = 2.0  # of an answer in the loss; any other token weighs 1

    config.evaluation = ConfigDict()
    config.evaluation.factors = (1, 2, 4, 8)  # lengths tested, in multiples of the trained length
    config.evaluation.samples = 16  # needles per depth and length
    config.evaluation.documents = 48  # held-out windows for perplexity and loss by position

    if size == "smoke":
        config.model.width = 32
        config.training.stages = ((6, 2, 96),)
        config.evaluation.factors = (1, 2)
        config.evaluation.samples = 2
        config.evaluation.documents = 4
    return config
