"""Induction heads: which token followed the trigger? Trained at 256 tokens, tested at up to a million.

Command, for any mixer of `longctx.layers` (by default delta_net):

    python -m longctx.train --config=experiments/induction_heads.py:delta_net --workdir=runs/induction

The setting of Mamba (Gu and Dao 2023, section 4.1): two layers, width 64, vocabulary 16, where of the paper's layers
Mamba alone is right every time up to 2^20 tokens.

Measured on 2 busy CPU cores with delta_net and with linear_attention, seeds 0 to 2: 100 % at all lengths up to 2^20, of
which 4 rows are read (benchmarks/induction_heads.md); training takes 1 to 4 minutes, testing 1 to 3.
"""

from ml_collections import ConfigDict

# Each needs a convolution to read the token before. A layer that never forgets is right at any length if noise writes
# nothing where the answer is read: exactly nothing, which ReLU's zeros allow and training at 256 tokens finds.
OPTIONS = {
    # Positions would not reach beyond the trained length.
    "attention": {"positions": {"kind": "nope"}, "conv_width": 4},
    "delta_net": {"activation": "relu"},
    "linear_attention": {"feature_map": "relu2", "conv_width": 4},
}


def get_config(arg: str = "delta_net") -> ConfigDict:
    """`KIND`, `KIND,small` (what benchmarks/capability.py runs) or `KIND,smoke` (a test of the machinery)."""
    kind, _, size = arg.partition(",")
    if size not in ("", "small", "smoke"):
        raise ValueError(f"the size is '{size}'; give 'small', 'smoke', or nothing for the whole run")
    config = ConfigDict()
    config.seed = 0  # of the parameters and of the rows

    config.data = ConfigDict()
    config.data.kind = "induction_heads"
    config.data.vocab_size = 16  # the trigger, and tokens that are noise or content
    config.data.lengths = tuple(2**k for k in range(6, 21, 2))  # tokens of the rows tested

    config.model = ConfigDict()
    config.model.width = 64  # D
    config.model.pattern = ("block",)
    config.model.repeats = 2
    config.model.blocks = ConfigDict()
    config.model.blocks.block = {
        "mixer": {"kind": kind, **OPTIONS.get(kind, {})},
        "mlp": {"kind": "swiglu", "hidden": 128},
    }
    if kind in ("attention", "forgetting", "path"):
        config.data.lengths = tuple(2**k for k in range(6, 15, 2))  # work grows with the square of the length

    config.training = ConfigDict()
    config.training.stages = ((600, 8, 256),)  # (steps, rows, tokens a row)
    config.training.learning_rate = 2e-3
    config.training.final_learning_rate = 1.0  # constant
    config.training.warmup_steps = 50
    config.training.weight_decay = 0.0
    # What noise adds to an answer's logits costs, however sure the answer is: without smoothing training would end
    # with as much noise as 256 tokens can bear.
    config.training.label_smoothing = 0.1

    config.evaluation = ConfigDict()
    config.evaluation.samples = 64  # rows per length
    config.evaluation.tokens = 2**20  # of the rows of one length, at most: of long rows there are fewer, at least 4

    if size == "small":
        config.data.lengths = (64, 128, 512, 2048)
        config.training.stages = ((400, 8, 128),)
    if size == "smoke":
        config.training.stages = ((4, 4, 32),)
        config.data.lengths = (32, 64)
        config.evaluation.samples = 4
    return config
