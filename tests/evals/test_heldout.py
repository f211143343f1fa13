"""The held-out loss: the mean over every token of the held-out text, on any mesh, in units that compare tokenizers."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from longctx import config, data
from longctx.data.corpus import Document
from longctx.evals import HeldOut
from longctx.models import LanguageModel
from longctx.parallel import mesh as meshes


def pure(model):
    graphdef, params = nnx.split(model)
    return graphdef, nnx.as_pure(params)


def bigram_losses(bigram, tokens):
    """-log p of each token but the first, from the one before it."""
    logits = np.asarray(bigram.embedding[...])[tokens[:-1]] @ np.asarray(bigram.out[...]).T
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]


def test_every_token_is_predicted_once(bigram, experiment, corpus):
    """Fails if rows that are not full are left out, or a document's tokens are counted as another's."""
    graphdef, params = pure(bigram)
    measure, seen = HeldOut(graphdef, experiment, corpus), []
    found = measure(params, seen.append)
    store = corpus.heldout
    expected = bigram_losses(bigram, store.tokens)
    assert sum(seen) == measure.tokens == found.tokens.sum() == store.size == len(expected)
    np.testing.assert_allclose(found.loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.nats, np.add.reduceat(expected, store.offsets[:-1]), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, store.lengths)
    assert found.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / store.bytes.sum(), rel=1e-5)
    assert found.whole
    assert found.names == store.texts
    summary = found.summary()
    assert (summary["documents"], summary["tokens"]) == (5, store.size)
    assert summary["loss"] == pytest.approx(found.loss)
    assert summary["bits_per_byte"] == pytest.approx(found.bits_per_byte)
    assert found.scalars() == {"heldout_loss": found.loss, "heldout_bits_per_byte": found.bits_per_byte}


def test_bounded_text_is_whole_documents_but_the_last(bigram, experiment, corpus):
    """In the order of digests, here from the last to the first: 6 words and 90 whole, and of the 60 the beginning."""
    store = corpus.heldout
    few = int(store.lengths[4] + store.lengths[3] + 50)
    options = dataclasses.replace(experiment.evaluation, heldout_tokens=few)
    graphdef, params = pure(bigram)
    found = HeldOut(graphdef, dataclasses.replace(experiment, evaluation=options), corpus)(params)
    assert not found.whole
    assert found.names == tuple(store.texts[i] for i in (2, 3, 4))
    cut = bigram_losses(bigram, store.document(2)[:50])
    np.testing.assert_allclose(found.nats[0], cut.sum(), rtol=1e-5)
    assert found.tokens.tolist() == [49, *store.lengths[3:]]
    np.testing.assert_allclose(found.bytes, [store.bytes[2] * 50 / store.lengths[2], *store.bytes[3:]])


def test_bits_a_byte_do_not_depend_on_the_tokenizer(experiment):
    """A uniform model over byte tokens, and one over pairs of letters that knows as much: nats a token differ."""
    text = "abab" * 50
    bits = {}
    for name, vocabulary, tokens in (("letters", 4, [1, 2] * 100), ("pairs", 16, [3] * 100)):
        ids = np.array([0, *tokens, 0], np.int32)
        store = data.TokenStore(ids, np.array([0, len(ids) - 1]), ("a",), np.array([len(text)]), ("a",))
        model = Uniform(vocabulary)
        graphdef, params = pure(model)
        found = HeldOut(graphdef, experiment, Held(store))(params)
        assert found.loss == pytest.approx(math.log(vocabulary), rel=1e-6)
        bits[name] = found.bits_per_byte
    assert bits["letters"] == pytest.approx(2 * 201 / 200)
    assert bits["pairs"] == pytest.approx(2 * 101 / 100)  # of the end, too, four bits


@dataclasses.dataclass(frozen=True)
class Held:
    heldout: data.TokenStore


class Uniform(nnx.Module):
    def __init__(self, vocabulary):
        self.out = nnx.Param(np.zeros((vocabulary, 2), np.float32))

    @property
    def unembedding(self):
        return self.out[...]

    def __call__(self, tokens, segments, state=None):
        return np.zeros((*tokens.shape, 2), np.float32), None


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1)])
def test_a_mesh_changes_nothing(experiment, corpus, sizes):
    """Rows of 64 tokens over four devices, and a last batch that is not full; documents are cut by rows and shards."""
    model = LanguageModel(experiment.model, corpus.tokenizer.vocab_size, nnx.Rngs(params=0))
    graphdef, params = pure(model)
    alone = HeldOut(graphdef, experiment, corpus)(params)
    with jax.set_mesh(meshes.make(config.Mesh(*sizes), jax.devices()[: math.prod(sizes)])):
        found = HeldOut(graphdef, experiment, corpus)(params)
    np.testing.assert_allclose(found.nats, alone.nats, rtol=1e-4)
    np.testing.assert_array_equal(found.tokens, alone.tokens)


def test_a_task_has_new_rows_and_no_bytes(experiment):
    task = data.TASKS["induction_heads"](lengths=(40,))
    model = Uniform(task.vocab_size)
    graphdef, params = pure(model)
    found = HeldOut(graphdef, experiment, task)(params)
    assert found.loss == pytest.approx(math.log(task.vocab_size), rel=1e-6)
    assert found.bits_per_byte is None
    assert found.scalars() == {"heldout_loss": found.loss}


def test_text_is_known_by_its_digest():
    """Whatever the document is called, and whatever the tokenizer."""
    tokenizer = data.Tokenizer.bytes()
    one = data.TokenStore.encode([Document("a", "größer")], tokenizer)
    other = data.TokenStore.encode([Document("b", "größer"), Document("c", "")], tokenizer)
    assert one.texts[0] == other.texts[0] != other.texts[1]
    np.testing.assert_array_equal(other.bytes, [8, 0])
