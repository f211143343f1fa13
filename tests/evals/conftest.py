"""A small corpus and models to measure on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config, data
from longctx.layers import MIXERS, MLPS
from longctx.models import LanguageModel

EXPERIMENT = {
    "data": {"tokenizer": "bytes", "needles": {"rows": 0.5, "facts": 4}},
    "model": {
        "width": 16,
        "pattern": ("delta", "full"),
        "blocks": {
            "delta": {
                "mixer": {"kind": "gated_delta", "heads": 2, "key_width": 8, "value_width": 8},
                "mlp": {"kind": "swiglu", "hidden": 16},
            },
            "full": {
                "mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_width": 8},
                "mlp": {"kind": "swiglu", "hidden": 16},
            },
        },
    },
    "training": {"stages": ((4, 8, 32), (4, 4, 64))},
    "evaluation": {"factors": (1, 4), "depths": 3, "samples": 4, "final_block": 16, "documents": 5},
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """As `data.Corpus`, without the training documents."""

    tokenizer: data.Tokenizer
    heldout: data.TokenStore


@pytest.fixture(scope="session")
def experiment():
    return config.parse(EXPERIMENT, MIXERS, MLPS)


@pytest.fixture(scope="session")
def corpus():
    tokenizer = data.Tokenizer.bytes()
    rng = np.random.default_rng(0)
    words = ["north", "south", "east", "west", "over", "under", "river", "hill"]
    documents = [
        np.append(tokenizer.document, tokenizer.encode(" ".join(rng.choice(words, count)))).astype(np.int32)
        for count in (120, 20, 90, 60, 6)
    ]
    offsets = np.cumsum([0, *map(len, documents)])
    sizes = np.diff(offsets) - 1
    tokens = np.concatenate([*documents, [tokenizer.document]]).astype(np.int32)
    return Corpus(tokenizer, data.TokenStore(tokens, offsets, tuple("abcde"), sizes, tuple("edcba")))


@pytest.fixture(scope="session")
def model(experiment, corpus):
    return LanguageModel(experiment.model, corpus.tokenizer.vocab_size, nnx.Rngs(params=0))


class Bigram(nnx.Module):
    """The next token from the last one alone: a model that compiles in no time."""

    def __init__(self, vocab_size: int, width: int = 8):
        draws = jax.random.normal(jax.random.key(0), (2, vocab_size, width))
        self.embedding, self.out = nnx.Param(draws[0]), nnx.Param(draws[1])

    @property
    def unembedding(self):
        return self.out[...]

    def __call__(self, tokens, segments, state=None):
        return self.embedding[...][tokens], None


@pytest.fixture(scope="session")
def bigram(corpus):
    return Bigram(corpus.tokenizer.vocab_size)


class Oracle(nnx.Module):
    """Answers a row's last token, a key, with the value that a statement gave it; with `broken`, with another's."""

    def __init__(self, tokenizer: data.Tokenizer, broken: bool = False):
        self.fact, self.vocab_size, self.broken = tokenizer.fact, tokenizer.vocab_size, broken

    @property
    def unembedding(self):
        return jnp.eye(self.vocab_size)

    def __call__(self, tokens, segments, state=None):
        keys, values = jnp.roll(tokens, -1, axis=1), jnp.roll(tokens, -2, axis=1)
        stated = (tokens == self.fact) & segments.valid
        asked = stated & ((keys == tokens[:, -1:]) != self.broken)
        place = jnp.argmax(asked, axis=1)
        value = jnp.take_along_axis(values, place[:, None], axis=1)
        return jnp.broadcast_to(jax.nn.one_hot(value, self.vocab_size), (*tokens.shape, self.vocab_size)), None


@pytest.fixture(scope="session")
def oracle():
    return Oracle
