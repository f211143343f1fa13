"""`evaluate` measures everything and leaves a whole report, which needs nothing from outside."""

import copy
import dataclasses
import json
import re
import subprocess
import types

import jax
import numpy as np
import pytest
from flax import nnx

from longctx import provenance
from longctx.evals import evaluate, perplexity, report, suite

TRAINING = {"finished": True, "steps": 8, "tokens": 2048, "seconds": 1.5, "tokens_per_second": 1365.3, "loss": 5.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory, bigram, experiment, corpus):
    workdir = tmp_path_factory.mktemp("run")
    stages = [{"steps": 4, "batch": 8, "length": 32}, {"steps": 4, "batch": 4, "length": 64}]
    (workdir / "config.json").write_text(json.dumps({"training": {"stages": stages}, "name": "<script>"}))
    rest = {"gradient_norm": 1.0, "learning_rate": 1e-3, "hits": 0.0, "answers": 0.0, "tokens": 256, "seconds": 0.1}
    lines = [
        {"step": step, "stage": step // 5, "loss": 6.0 - step / 8, "retrieval_accuracy": step / 8 if step % 2 else None}
        | rest
        for step in range(1, 9)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    return workdir, evaluate(bigram, experiment, corpus, workdir, TRAINING)


def test_summary(run):
    workdir, summary = run
    assert json.loads((workdir / "report" / "summary.json").read_text()) == summary
    assert set(summary["needle"]["accuracy"]) == {"64", "256"}
    assert all(0 <= value <= 1 for value in summary["needle"]["accuracy"].values())
    assert list(summary["perplexity"]["final_block"]) == ["64", "128", "256"]
    assert all(value > 1 for value in summary["perplexity"]["final_block"].values())
    assert summary["perplexity"]["windows"] == 5
    assert (summary["train"]["wall_seconds"], summary["train"]["final_loss"]) == (1.5, 5.1)
    assert summary["train"]["tokens_per_second"] == 1365.3
    assert summary["model"] == {"parameters": 2 * 260 * 8, "trained_length": 64}
    assert {"python", "jax", "jaxlib", "flax"} <= set(summary["versions"])
    assert summary["loss_by_position"][0]["from"] == 1
    assert summary["loss_by_position"][-1]["to"] == 256 + 16 - 1
    for measured in summary["speed"].values():
        assert measured["tokens_per_second"] > 0
        assert measured["peak_bytes"] > 4 * summary["model"]["parameters"]
    assert summary["notes"] == []


def test_context_is_worth_nothing_to_a_model_that_does_not_read_it(run):
    """A bigram's final block is as likely after any context; fails if the block moves with the context's length."""
    values = list(run[1]["perplexity"]["final_block"].values())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert run[1]["perplexity"]["gain"]["fraction"] == pytest.approx(0, abs=1e-5)


def test_page_stands_alone(run):
    folder = run[0] / "report"
    page = (folder / "report.html").read_text()
    names = {file.stem for file in folder.glob("*.png")}
    assert names == {"training", "perplexity", "loss_by_position", "needle", "speed"}
    assert len(re.findall(r'(?:src|srcset)="data:image/png;base64,iVBOR', page)) == 2 * len(names)
    outside = re.findall(r"""(?:https?:)?//[a-z]|<link|<script|@import|url\(""", re.sub(r"base64,[^\"]*", "", page))
    assert outside == []
    assert "&lt;script&gt;" in page  # what the config holds is told, not run


def test_reports_are_whole_and_earlier_ones_kept(run, tmp_path, monkeypatch):
    """Fails if the new report is written into the old one's folder, or in its place."""
    summary = run[1]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old.txt").write_text("from before")
    (tmp_path / ".report.partial").mkdir()  # what a killed run left
    report.write(tmp_path, summary, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report", "report.1"]
    assert not (tmp_path / "report" / "old.txt").exists()
    assert (tmp_path / "report.1" / "old.txt").exists()
    broken = copy.deepcopy(summary)
    broken["loss_by_position"] = [{"from": 1}]
    with pytest.raises(KeyError):
        report.write(tmp_path, broken, {})
    assert json.loads((tmp_path / "report" / "summary.json").read_text()) == summary
    monkeypatch.setattr(report, "pictures", lambda summary, history: [])
    (tmp_path / ".report.partial").rename(tmp_path / "left")
    (tmp_path / ".report.partial").write_text("a file in its place")
    report.write(tmp_path, summary, {})
    report.write(tmp_path, summary, {}, "other")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["left", "other", "report", "report.1", "report.2"]


def test_report_is_strict_json(run, tmp_path):
    broken = run[1] | {"evaluation": {"seconds": float("nan"), "tokens": 1}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(tmp_path, broken, {})
    assert list(tmp_path.iterdir()) == []


def test_report_says_where_it_comes_from(run):
    workdir, summary = run
    assert summary["run"]["name"] == workdir.name
    assert summary["run"]["workdir"] == str(workdir)
    assert re.fullmatch(r"[0-9a-f]{12}\+?", summary["run"]["commit"] or "0" * 12)
    page, table = (workdir / "report" / "report.html").read_text(), report.table(summary)
    for text in (workdir.name, str(workdir), summary["run"]["date"], f"jax {summary['versions']['jax']}"):
        assert text in table
        assert text in page[: page.index("<main>")]
    assert f"<h1>{workdir.name}</h1>" in page
    assert "trained by" not in table


@pytest.mark.parametrize("text", ["{", "null", "[]", '{"run": 3}', '{"run": {"command": 3}}'])
def test_a_damaged_start_says_nothing(tmp_path, text):
    (tmp_path / "start.json").write_text(text)
    assert suite._trained(tmp_path) is None


def test_the_command_that_trained_is_told(run, tmp_path):
    (tmp_path / "start.json").write_text('{"run": {"command": "python -m longctx.train --config=x.py"}}')
    told = run[1] | {"run": run[1]["run"] | {"trained": suite._trained(tmp_path)}}
    assert "python -m longctx.train --config=x.py" in report.table(told)


def test_commit_is_of_the_checkout_that_holds_the_package(tmp_path):
    """None outside a checkout, and none for a package installed in somebody's checkout, which does not track it."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert provenance.commit(package) is None

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert provenance.commit(package) is None
    git("add", ".")
    git("commit", "-m", "second")
    assert re.fullmatch(r"[0-9a-f]{12}", provenance.commit(package))
    (package / "__init__.py").write_text("changed")
    assert provenance.commit(package).endswith("+")


def test_what_is_not_finite_is_left_out_and_told(tmp_path, bigram, experiment, corpus, monkeypatch):
    """Guards against "nan ± nan" in the table, and NaN in summary.json."""
    real = perplexity.final_block

    def broken(*arguments):
        blocks, whole = real(*arguments)
        blocks[max(blocks)][0] = np.nan
        return blocks, whole

    monkeypatch.setattr(perplexity, "final_block", broken)
    summary = evaluate(bigram, experiment, corpus, tmp_path)
    text = (tmp_path / "report" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in summary.json"))
    assert summary["perplexity"]["final_block"]["256"] is None
    assert summary["perplexity"]["final_block"]["64"] > 1
    assert "perplexity.final_block.256" in summary["notes"][-1]
    assert "nan" not in report.table(summary)
    assert "not finite" in report.table(summary)


def test_a_model_without_a_finite_loss_is_an_error(tmp_path, bigram, experiment, corpus):
    graphdef, params = nnx.split(bigram)
    broken = nnx.merge(graphdef, jax.tree.map(lambda x: x * np.nan, params))
    with pytest.raises(FloatingPointError, match="losses of the model are nan"):
        evaluate(broken, experiment, corpus, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_table(run):
    text = report.table(run[1])
    value = run[1]["perplexity"]["final_block"]["256"]
    assert f"{value:.2f}" in text
    assert "1,365 tokens/s" in text


def test_short_documents_and_no_facts_are_told(tmp_path, bigram, experiment, corpus):
    """Documents too short for the longest context: the longest that they allow, and a note."""
    needles = dataclasses.replace(experiment.data, needles=dataclasses.replace(experiment.data.needles, rows=0.0))
    options = dataclasses.replace(experiment.evaluation, factors=(16,))
    unplanted = dataclasses.replace(experiment, data=needles, evaluation=options)
    summary = evaluate(bigram, unplanted, corpus, tmp_path)
    assert list(summary["perplexity"]["final_block"]) == ["64"]
    assert summary["needle"] == {"accuracy": {}}
    assert "No held-out document has 1,040 tokens" in summary["notes"][0]
    assert "no facts" in summary["notes"][1]
    assert "no facts" in (tmp_path / "report" / "report.html").read_text()
    assert not (tmp_path / "report" / "needle.png").exists()


def test_epochs_are_told(run, corpus):
    store = corpus.heldout
    found = suite._corpus(types.SimpleNamespace(train=store), {"tokens": 2 * store.size})
    assert found == {"tokens": store.size, "documents": 5, "epochs": 2.0}
    assert f"{store.size:,} tokens in 5 documents, 2 epochs" in report.table(run[1] | {"corpus": found})
