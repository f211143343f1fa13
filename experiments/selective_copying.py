"""Selective copying: write the data tokens of a row in their order, leaving out the noise.

Command, for any mixer of `longctx.layers` (by default gated_delta):

    python -m longctx.train --config=experiments/selective_copying.py:gated_delta --workdir=runs/copying

The setting of Mamba (Gu and Dao 2023, section 4.1): 4,096 tokens, vocabulary 16, 16 data tokens; two layers, width 64.
The paper's Mamba reaches 99.8 %. gated_delta answers all of 1,024 there, with each of three seeds, after half an hour
on one core (`benchmarks/selective_copying.md`); `,small` takes minutes.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "gated_delta") -> ConfigDict:
    """`KIND`, `KIND,small` (what benchmarks/capability.py runs) or `KIND,smoke` (a test of the machinery)."""
    kind, _, size = arg.partition(",")
    if size not in ("", "small", "smoke"):
        raise ValueError(f"the size is '{size}'; give 'small', 'smoke', or nothing for the whole run")
    config = ConfigDict()
    config.seed = 0  # of the parameters and of the rows

    config.data = ConfigDict()
    config.data.kind = "selective_copying"
    config.data.vocab_size = 16  # noise, "write", and 14 data tokens
    config.data.items = 16  # data tokens a row
    config.data.lengths = (64, 256, 1024, 4096, 16384)  # tokens of the rows tested, the 16 to write included
    # Tokens of the documents that fill a row. Were they as long as it, noise would be counted, not passed over.
    config.data.train = (32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)

    # Attention needs a convolution to know tokens' neighbours; its default rotary positions give their order.
    options = {"conv_width": 4} if kind == "attention" else {}
    config.model = ConfigDict()
    config.model.width = 64  # D
    config.model.pattern = ("block",)
    config.model.repeats = 2
    config.model.blocks = ConfigDict()
    config.model.blocks.block = {
        "mixer": {"kind": kind, **options},
        "mlp": {"kind": "swiglu", "hidden": 128},
    }

    config.training = ConfigDict()
    config.training.stages = ((1200, 16, 128), (1500, 8, 512), (2400, 2, 4096))  # (steps, rows, tokens)
    config.training.learning_rate = 2e-3
    config.training.final_learning_rate = 0.02
    config.training.warmup_steps = 50
    config.training.weight_decay = 0.0
    config.training.label_smoothing = 0.1  # as in experiments/induction_heads.py

    config.evaluation = ConfigDict()
    config.evaluation.samples = 64  # rows per length, 16 answers each

    if size == "small":
        config.data.items = 8
        config.data.lengths = (64, 128, 256)
        config.data.train = (16, 24, 32, 48, 64)
        config.training.stages = ((400, 16, 64),)
    if size == "smoke":
        config.data.items = 4
        config.data.lengths = (32, 64)
        config.data.train = ()
        config.training.stages = ((4, 4, 32),)
        config.evaluation.samples = 4
    return config
