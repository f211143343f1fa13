"""Induction heads: which token followed the trigger? Trained at 256 tokens, tested at longer rows.

Command, for any mixer of `longctx.layers` (by default gated_delta):

    python -m longctx.train --config=experiments/induction_heads.py:gated_delta --workdir=runs/induction

The setting of Mamba (Gu and Dao 2023, section 4.1): two layers, width 64, vocabulary 16. The paper tests up to 2^20
tokens, where Mamba alone is right every time: `--config.data.lengths='(256,1048576)'`.

Measured with gated_delta on 2 CPU cores shared with other work (training 8 min 25 s, evaluation 1 min): every answer is
right from step 50 of 500 on; in new rows 100 % at 64, 256 and 1,024 tokens, 41 ± 6 % at 4,096 (64 rows), 25 ± 11 % at
16,384 (16 rows), 25 ± 22 % at 65,536 (4 rows). Guessing gives 7 %. Longer rows probably want gates that close
wholly, which 500 steps do not give: the loss is below 1e-6 from step 440 on.
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
    config.data.kind = "induction_heads"
    config.data.vocab_size = 16  # the trigger, and tokens that are noise or content
    config.data.lengths = tuple(2**k for k in range(6, 17, 2))  # tokens of the rows tested

    # Attention needs a convolution to see the token before each key, and no positions, to read longer rows.
    options = {"rope_base": 0.0, "conv_width": 4} if kind == "attention" else {}
    config.model = ConfigDict()
    config.model.width = 64  # D
    config.model.pattern = ("block",)
    config.model.repeats = 2
    config.model.blocks = ConfigDict()
    config.model.blocks.block = {
        "mixer": {"kind": kind, **options},
        "mlp": {"kind": "swiglu", "hidden": 128},
    }
    if kind == "attention":
        config.data.lengths = tuple(2**k for k in range(6, 15, 2))  # its work grows with the square of the length

    config.training = ConfigDict()
    config.training.stages = ((500, 8, 256),)  # (steps, rows, tokens a row)
    config.training.learning_rate = 2e-3
    config.training.final_learning_rate = 1.0  # constant
    config.training.warmup_steps = 50
    config.training.weight_decay = 0.0

    config.evaluation = ConfigDict()
    config.evaluation.samples = 64  # rows per length
    config.evaluation.tokens = 2**18  # of the rows of one length, at most: of long rows there are fewer, at least 4

    if size == "small":
        config.training.stages = ((150, 8, 256),)
        config.data.lengths = (64, 256, 1024, 4096)
    if size == "smoke":
        config.training.stages = ((4, 4, 32),)
        config.data.lengths = (32, 64)
        config.evaluation.samples = 4
    return config
