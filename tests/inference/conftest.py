"""A small model whose layers have every kind of state: a memory, a window, a cache, tails of convolutions."""

import pytest
from flax import nnx

from longctx import config, data
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel

MLP = {"kind": "swiglu", "hidden": 16}
ATTENTION = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_width": 8}
CONFIG = {
    "model": {
        "width": 16,
        "pattern": ("delta", "local", "full"),
        "blocks": {
            "delta": {
                "mixer": {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8, "conv_width": 4},
                "mlp": MLP,
            },
            "local": {"mixer": ATTENTION | {"pattern": "Window(8)"}, "mlp": MLP},
            "full": {"mixer": ATTENTION | {"positions": {"kind": "nope"}, "conv_width": 3}, "mlp": MLP},
        },
    },
    "training": {"stages": ((1, 1, 64),)},
}


@pytest.fixture(scope="session")
def tokenizer():
    return data.Tokenizer.bytes()


@pytest.fixture(scope="session")
def model(tokenizer):
    return LanguageModel(config.parse(CONFIG, MIXERS, MLPS).model, tokenizer.vocab_size, nnx.Rngs(params=0))
