"""Softmax attention alone, with any position scheme, trained on 512 tokens and evaluated on 512 to 8,192.

Command, for any kind of positions (by default rope):

    python -m longctx.train --config=experiments/extension.py:alibi --workdir=runs/alibi

Hardware: 2 CPU cores, about eight minutes. `benchmarks/extension.py` makes a table and a plot of what each scheme
scores (`benchmarks/extension.md`), other schemes put in place of RoPE after training included. From 512 to 8,192
tokens RoPE's perplexity goes from 22.2 to 37.5 and ALiBi's from 21.4 to 20.0; of the needles they find 0.93 and 1.00,
then 0.20. YaRN in place of RoPE, without training: 21.9 to 18.9, 0.97 to 0.95.
"""

from ml_collections import ConfigDict

# Schemes that learn on short rows; what replaces RoPE afterwards is a field of `positions` as well.
KINDS = ("rope", "nope", "alibi", "t5", "cope", "xpos", "random", "giraffe_power", "giraffe_truncated")
OPTIONS = {"random": {"trained": 512, "span": 16_384}}  # where the defaults are for longer rows than these


def get_config(arg: str = "rope") -> ConfigDict:
    """`KIND`, or `KIND,smoke` for a test of the machinery."""
    kind, _, size = arg.partition(",")
    if kind not in KINDS or size not in ("", "smoke"):
        raise ValueError(f"the argument is '{arg}'; choose one of {', '.join(KINDS)}, and ',smoke' or nothing")
    config = ConfigDict()
    config.seed = 0

    config.mesh = {"data": 1, "context": 1, "model": 1}  # devices that split batch, sequence, heads

    config.data = ConfigDict()
    config.data.kind = "corpus"
    config.data.path = ""  # a file or folder of your own documents; empty: the interpreter's standard library
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.heldout = 0.1
    config.data.needles = {"rows": 0.5, "facts": 8}  # rows that carry facts to be asked for, and how many

    config.model = ConfigDict()
    config.model.width = 128  # D
    config.model.pattern = ("full",)
    config.model.repeats = 4
    config.model.dtype = "auto"
    config.model.remat = "none"
    config.model.blocks = ConfigDict()
    config.model.blocks.full = {
        "mixer": {
            "kind": "attention",
            "heads": 2,
            "kv_heads": 2,
            "head_width": 64,
            "positions": {"kind": kind, **OPTIONS.get(kind, {})},
            "conv_width": 4,  # makes facts quick to learn; it gives only the order of neighbours
        },
        "mlp": {"kind": "relu2", "hidden": 256},
    }

    config.training = ConfigDict()
    config.training.stages = ((100, 16, 128), (450, 8, 512))  # (steps, rows, tokens a row)
    config.training.learning_rate = 6e-3
    config.training.final_learning_rate = 0.1
    config.training.warmup_steps = 50
    config.training.weight_decay = 0.1
    config.training.beta1 = 0.9
    config.training.beta2 = 0.95
    config.training.clip_norm = 1.0
    config.training.accumulate = 1
    config.training.answer_weight = 2.0
    config.training.log_every = 20

    config.checkpoints = {"every": 500, "keep": 1}

    config.evaluation = ConfigDict()
    config.evaluation.factors = (1, 2, 4, 8, 16)  # lengths tested, in multiples of the trained length
    config.evaluation.depths = 5
    config.evaluation.samples = 8  # needles per depth and length
    config.evaluation.final_block = 128
    config.evaluation.documents = 24

    if size == "smoke":
        config.model.width = 32
        config.training.stages = ((6, 4, 64), (6, 2, 96))
        config.evaluation.factors = (1, 2)
        config.evaluation.samples = 2
        config.evaluation.documents = 4
    return config
