"""A hybrid language model on text that is already on the machine, trained and evaluated in minutes on 2 cores.

Command:

    python -m longctx.train --config=experiments/quickstart.py --workdir=runs/quickstart

On 2 CPU cores: about six minutes with compilation and evaluation. Expected: needle accuracy 1.00 at the trained length
of 512 tokens and at 4,096; perplexity of the fixed final block some 16 % lower after 4,096 tokens of context than
after 256 (the standard error of that is 5 %).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart; `smoke` (`--config=experiments/quickstart.py:smoke`) shrinks it to a test of the machinery."""
    if arg not in ("", "smoke"):
        raise ValueError(f"the argument is '{arg}'; give 'smoke', or nothing for the whole run")
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the rows and the planted facts

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that are left
    config.mesh.context = 1  # devices that split the sequence
    config.mesh.model = 1  # devices that split heads and hidden widths

    config.data = ConfigDict()
    config.data.kind = "corpus"  # real text; or a synthetic task, as in induction_heads.py
    config.data.path = ""  # a file or folder of your own documents; empty: the interpreter's standard library
    config.data.tokenizer = "bpe"  # "bpe" is trained on the corpus; or "bytes", or the path of a tokenizer.json
    config.data.vocab_size = 2048  # entries of the byte-pair vocabulary
    config.data.heldout = 0.1  # fraction of the text kept for evaluation
    config.data.needles = ConfigDict()
    config.data.needles.rows = 0.5  # fraction of the rows that carry facts to be asked for later
    config.data.needles.facts = 8  # facts per such row

    def mlp():
        return {"kind": "relu2", "hidden": 256}  # squared ReLU; F

    config.model = ConfigDict()
    config.model.width = 128  # D
    config.model.pattern = ("local", "full", "delta", "full")  # blocks, in order
    config.model.repeats = 1  # times the pattern is repeated
    config.model.dtype = "auto"  # of activations: bfloat16 on GPU and TPU, float32 on CPU
    config.model.remat = "none"  # what the backward pass recomputes: "none", "dots", "full" or "offload"
    config.model.blocks = ConfigDict()
    config.model.blocks.delta = {  # a matrix memory of bounded size, written by the gated delta rule
        "mixer": {
            "kind": "gated_delta",
            "heads": 2,
            "key_width": 64,  # per head
            "value_width": 64,  # per head
            "conv_width": 4,  # taps of a causal convolution on queries, keys and values
        },
        "mlp": mlp(),
    }
    config.model.blocks.local = {  # softmax attention over the last tokens, with rotary positions
        "mixer": {
            "kind": "attention",
            "heads": 2,
            "kv_heads": 2,  # heads of keys and values; divides heads
            "head_width": 64,
            "pattern": "Window(64)",  # keys visible to a query: its own token and the 63 before it
            "conv_width": 4,
        },
        "mlp": mlp(),
    }
    config.model.blocks.full = {  # softmax attention over the whole document, without positions
        "mixer": {
            "kind": "attention",
            "heads": 2,
            "kv_heads": 2,
            "head_width": 64,
            "positions": {"kind": "nope"},  # none; the default is {"kind": "rope", "base": 10_000.0}
            "conv_width": 4,
            "length_base": 256.0,  # n: logits are scaled by log(tokens so far + 1) / log n
        },
        "mlp": mlp(),
    }

    config.training = ConfigDict()
    config.training.stages = ((100, 16, 128), (450, 8, 512))  # (steps, rows, tokens a row)
    config.training.learning_rate = 6e-3  # at its peak
    config.training.final_learning_rate = 0.1  # at the end, as a fraction of the peak
    config.training.warmup_steps = 50  # linear, from 0
    config.training.weight_decay = 0.1  # on matrices
    config.training.beta1 = 0.9
    config.training.beta2 = 0.95
    config.training.clip_norm = 1.0  # of the global gradient
    config.training.accumulate = 1  # micro-batches a step
    config.training.answer_weight = 2.0  # of an answer in the loss; any other token weighs 1
    config.training.log_every = 20  # steps between scalars in TensorBoard

    config.checkpoints = ConfigDict()
    config.checkpoints.every = 500  # steps
    config.checkpoints.keep = 2  # newest ones kept

    config.evaluation = ConfigDict()
    config.evaluation.factors = (1, 2, 4, 8)  # lengths tested, in multiples of the trained length
    config.evaluation.depths = 5  # depths of the needle in the context
    config.evaluation.samples = 16  # needles per depth and length
    config.evaluation.final_block = 128  # tokens of the fixed final block
    config.evaluation.documents = 48  # held-out windows for perplexity and loss by position
    config.evaluation.every = 110  # steps between measurements of the held-out loss; 0: only in the end
    config.evaluation.heldout_tokens = 2**17  # of the held-out text that it is of, at most

    if arg == "smoke":
        config.model.width = 32
        config.training.stages = ((6, 4, 64), (6, 2, 96))
        config.evaluation.factors = (1, 2)
        config.evaluation.samples = 2
        config.evaluation.documents = 4
        config.evaluation.every = 6
        config.evaluation.heldout_tokens = 2**12
    return config
