"""Multi-query associative recall: which value stood after this key, for up to 256 keys a row?

Command, for any mixer of `longctx.layers` (by default gated_delta):

    python -m longctx.train --config=experiments/mqar.py:gated_delta --workdir=runs/mqar

The mixed setting of Zoology (Arora et al. 2023): trained on documents of 64 to 256 tokens with 4 to 64 pairs, tested on
up to 1,024 tokens with 256 pairs. Zoology's blocks have no MLP and a batch of 256 rows; these have a small MLP.
Made for a GPU at this size, which was not run; `,small` takes a CPU minutes.
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
    config.data.kind = "mqar"
    config.data.vocab_size = 8192  # filler, keys in the lower half, values in the upper
    config.data.train = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))  # (tokens, pairs), drawn for each row
    config.data.test = ((64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))  # the last two are extrapolation
    config.data.power = 0.01  # of the law of the distances to the questions
    config.data.random_filler = True  # or token 0

    # Attention needs a convolution to read the token before each value, and no positions, to read longer rows.
    options = {"positions": {"kind": "nope"}, "conv_width": 4} if kind == "attention" else {}
    config.model = ConfigDict()
    config.model.width = 64  # D
    config.model.pattern = ("block",)
    config.model.repeats = 2
    config.model.blocks = ConfigDict()
    config.model.blocks.block = {
        "mixer": {"kind": kind, **options},
        "mlp": {"kind": "swiglu", "hidden": 64},
    }

    config.training = ConfigDict()
    config.training.stages = ((4000, 64, 256),)  # (steps, rows, tokens a row)
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 50

    config.evaluation = ConfigDict()
    config.evaluation.samples = 64  # rows per length

    if size == "small":
        config.data.vocab_size = 512
        config.data.train = ((32, 4), (64, 8), (64, 16))
        config.data.test = ((32, 8), (64, 16), (128, 32), (256, 64))
        config.training.stages = ((400, 16, 64),)
    if size == "smoke":
        config.data.vocab_size = 64
        config.data.train = ((16, 2), (32, 4))
        config.data.test = ((16, 4), (32, 8))
        config.training.stages = ((4, 4, 32),)
        config.evaluation.samples = 4
    return config
