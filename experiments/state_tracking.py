"""State tracking: the product so far of a word over a group of permutations, at every position.

Command, for any mixer of `longctx.layers` (by default gated_delta) and a group of `parity`, `s3`, `s4`, `s5`:

    python -m longctx.train --config=experiments/state_tracking.py:gated_delta --workdir=runs/tracking \\
        --config.data.group=parity

Two layers of width 64. A layer whose transitions are diagonal and positive solves no group at lengths beyond training;
reflections (a delta rule whose β reaches 2) can solve parity, and products of them S3 and S5 (Grazzi et al. 2024).
Made for a GPU at this size, which was not run; `,small` takes a CPU minutes.
"""

from ml_collections import ConfigDict

OPTIONS = {"gated_delta": {"negative_eigenvalues": True}}


def get_config(arg: str = "gated_delta") -> ConfigDict:
    """`KIND`, `KIND,small` (what benchmarks/capability.py runs) or `KIND,smoke` (a test of the machinery)."""
    kind, _, size = arg.partition(",")
    if size not in ("", "small", "smoke"):
        raise ValueError(f"the size is '{size}'; give 'small', 'smoke', or nothing for the whole run")
    config = ConfigDict()
    config.seed = 0  # of the parameters and of the rows

    config.data = ConfigDict()
    config.data.kind = "state_tracking"
    config.data.group = "s3"  # "parity", "s3", "s4" or "s5"
    config.data.lengths = (32, 64, 128, 256, 512)  # tokens of the rows tested

    config.model = ConfigDict()
    config.model.width = 64  # D
    config.model.pattern = ("block",)
    config.model.repeats = 2
    config.model.blocks = ConfigDict()
    config.model.blocks.block = {
        "mixer": {"kind": kind, **OPTIONS.get(kind, {})},
        "mlp": {"kind": "swiglu", "hidden": 128},
    }

    config.training = ConfigDict()
    config.training.stages = ((2000, 64, 16), (4000, 64, 64))  # (steps, rows, tokens a row)
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 50

    config.evaluation = ConfigDict()
    config.evaluation.samples = 64  # rows per length; every token of them is an answer

    if size == "small":
        config.data.group = "parity"
        config.data.lengths = (16, 32, 64, 128, 256)
        config.training.stages = ((200, 64, 8), (400, 32, 32))
    if size == "smoke":
        config.data.lengths = (32, 64)
        config.training.stages = ((4, 4, 32),)
        config.evaluation.samples = 4
    return config
