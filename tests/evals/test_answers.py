"""Answers are counted as one pass over the whole row would count them, in spans, batches and on meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import config, data
from longctx.data import TASKS
from longctx.data.synthetic import InductionHeads, StateTracking
from longctx.evals import answers, evaluate
from longctx.models import LanguageModel
from longctx.ops.cross_entropy import cross_entropy
from longctx.parallel import mesh as meshes
from longctx.typing import Segments

TASK = StateTracking("s3", lengths=(20, 70))


@pytest.fixture(scope="module")
def solver(experiment):
    """An untrained model over the group's six elements: a layer with a bounded state and one without."""
    return LanguageModel(experiment.model, TASK.vocab_size, nnx.Rngs(params=0))


@pytest.fixture
def short_spans(monkeypatch):
    monkeypatch.setattr(answers, "SPAN", 32)


class Parity(nnx.Module):
    """Solves parity by its state, the sum so far; padding and the order of spans count."""

    def __init__(self):
        self.out = nnx.Param(jnp.eye(2))

    @property
    def unembedding(self):
        return self.out[...]

    def init_state(self, batch, capacity):
        return jnp.zeros((batch,), jnp.int32)

    def __call__(self, tokens, segments, state=None):
        sums = state[:, None] + jnp.cumsum(tokens * segments.valid, axis=1)
        return jax.nn.one_hot(sums % 2, 2), sums[:, -1]


def test_spans_are_the_whole_row(solver, short_spans):
    """70 tokens are spans of 32, 32 and 6; fails if the state is not handed on, or padding is counted."""
    found = answers.Reader(solver, tokens_per_call=64).measure(TASK, 70, samples=3, seed=1)
    rng = data.heldout_rng(1, 70)
    rows = [TASK.test_rows(rng, 2, 70) for _ in range(2)]  # the reader's batches; the fourth row is left out
    row = {name: np.concatenate([each[name] for each in rows])[:3] for name in rows[0]}
    hidden, _ = jax.jit(solver)(row["tokens"], Segments.single(3, 70))
    expected = cross_entropy(hidden, solver.unembedding, row["targets"], row["weights"])
    np.testing.assert_allclose(found.correct, np.mean(expected.correct, axis=1))
    np.testing.assert_allclose(found.loss, np.mean(expected.losses), rtol=1e-5)
    assert found.answers == 3 * 70
    assert 0 < found.correct.mean() < 1


def test_a_solver_is_right(short_spans):
    """Rows without a mistake at both lengths, all counted; fails as the test above does."""
    task = StateTracking("parity", lengths=(20, 70))
    seen = []
    reader = answers.Reader(Parity(), tokens_per_call=64, progress=seen.append)
    measured = {length: reader.measure(task, length, 5, seed=0) for length in task.lengths}
    summary = answers.summarise(task, measured)
    assert summary["accuracy"] == summary["whole"] == {"20": 1.0, "70": 1.0}
    assert summary["rows"] == {"20": 5, "70": 5}
    assert summary["answers"] == {"20": 100, "70": 350}
    assert len(reader._programs) == 2  # for three rows of 20 tokens, and two of 32
    assert sum(seen) == 100 + 350


def test_a_mesh_changes_nothing(solver, short_spans):
    """Batch, sequence and heads split over eight devices; accuracies of few answers near a tie would differ by one."""
    alone = answers.Reader(solver, tokens_per_call=64).measure(TASK, 70, samples=2, seed=0)
    with jax.set_mesh(meshes.make(config.Mesh(2, 2, 2))):
        split = answers.Reader(solver, tokens_per_call=64).measure(TASK, 70, samples=2, seed=0)
    np.testing.assert_allclose(split.loss, alone.loss, rtol=1e-4)
    np.testing.assert_allclose(split.correct, alone.correct, atol=1 / 70)


def test_long_rows_are_fewer():
    assert [answers.samples_of(n, 64, 2**20) for n in (256, 2**15, 2**20)] == [64, 32, 4]
    assert answers.samples_of(2**20, 2, 2**20) == 2


def test_report(tmp_path, experiment):
    """The same files and tables as for text, of what there is."""
    task = InductionHeads(lengths=(16, 64))
    given = dataclasses.replace(experiment, data=task)
    row = {"step": 1, "stage": 0, "loss": 2.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "retrieval_accuracy": 0.5}
    row |= {"hits": 1.0, "answers": 2.0, "tokens": 64, "seconds": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    summary = evaluate(Bigram(), given, task, tmp_path)
    assert json.loads((tmp_path / "report" / "summary.json").read_text()) == summary
    assert set(summary["task"]["accuracy"]) == set(summary["speed"]) == {"16", "64"}
    assert summary["task"]["guessing"]["64"] == 1 / 15
    page = (tmp_path / "report" / "report.html").read_text()
    assert "rows without a mistake" in page
    assert "needle accuracy" not in page
    assert {file.stem for file in (tmp_path / "report").glob("*.png")} == {"task", "speed", "training"}


class Bigram(Parity):
    """Names one of sixteen tokens without looking."""

    def __init__(self):
        self.out = nnx.Param(jnp.eye(16))

    def __call__(self, tokens, segments, state=None):
        return jax.nn.one_hot((tokens + 3) % 16, 16), state


def test_all_tasks_have_what_the_report_asks():
    for cls in TASKS.values():
        task = cls()
        assert all(0 < task.guessing(length) <= 0.5 for length in task.lengths)
