"""What `longctx.evaluate` may be told of a run on the command line."""

import dataclasses

import pytest

from longctx import commands, config, evaluate
from longctx.errors import UsageError


def given(monkeypatch, run, **parts):
    monkeypatch.setattr(commands, "experiment", lambda: dataclasses.replace(run, **parts))
    return evaluate._overridden(run)


def test_what_is_measured(parse, monkeypatch):
    """Told in the report, as other text is."""
    run = parse()
    evaluation = dataclasses.replace(run.evaluation, samples=3)
    other = dataclasses.replace(run.data, path="other")
    assert given(monkeypatch, run) == (run, [])
    found, notes = given(monkeypatch, run, evaluation=evaluation, data=other)
    assert (found.evaluation, found.data) == (evaluation, other)
    assert notes == [
        "evaluation.samples was 16, and is 3 in this report.",
        "data.path was '', and is 'other' in this report.",
    ]


def test_what_a_model_is(parse, monkeypatch):
    """Its own options, its tokens and its training are refused."""
    run = parse()
    parts = {"seed": 3, "mesh": config.Mesh(2, 1, 1), "data": dataclasses.replace(run.data, heldout=0.5)}
    for name, value in parts.items():
        with pytest.raises(UsageError, match="what a trained model is cannot be overridden"):
            given(monkeypatch, run, **{name: value})
