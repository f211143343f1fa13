"""Runs that look alike by themselves are told apart on the same text, and what is not the same text is not paired."""

import csv
import json
import re

import numpy as np
import pytest

from longctx import compare as command
from longctx import data
from longctx.errors import UsageError
from longctx.evals import compare, compared, evaluate, pieces, report
from longctx.evals.heldout import Measured
from longctx.evals.perplexity import Window


def run(name, nats=None, seed=0, config="a", needles=None, heldout=None, text="text"):
    """A run whose final blocks have these losses: `[windows]`, of which two at a time are of one document."""
    windows = {"final_block": pieces.EMPTY, "heldout": heldout or HELD, "needle": {}, "task": {}}
    if nats is not None:
        windows["final_block"] = {
            "windows": [f"{text}{i}" for i in range(len(nats))],
            "documents": [i // 2 for i in range(len(nats))],
            "nats": {"64": [x + 0.5 for x in nats], "512": list(nats)},
        }
    if needles is not None:
        windows["needle"] = {"128": {"rows": "r", "hits": needles}}
    facts = {"parameters": 1000.0, "tokens trained on": 64.0, "final training loss, nats": 2.0}
    history = [{"step": i, "loss": 3 - i / 100} for i in range(1, 60)] + [{"step": 60, "loss": 2, "heldout_loss": 2.1}]
    configured = {"model": config, "seed": seed}
    return compare.Run(name, configured, facts, f"/runs/{name}", history, compare._items(windows))


HELD = {"names": ["x", "y", "z"], "nats": [70.0, 700.0, 140.0], "tokens": [35, 350, 70], "bytes": [100, 1000, 200]}


def test_paired_differences_tell_alike_models_apart():
    """7.01 and 6.28 with errors of 0.5, and 0.11 ± 0.02 nats; seen to fail with errors of each alone."""
    rng = np.random.default_rng(0)
    of_window = 1.9 + rng.normal(0, 0.5, 48)
    noise = rng.normal(0, 0.05, 48)
    found = compare.compare([run("a", of_window), run("b", of_window - 0.11 + noise, config="b")])
    cell = found.cells[compare.BLOCK, 512][1]
    difference = -0.11 + noise.mean()
    of_documents = noise.reshape(24, 2).mean(axis=1)
    assert cell.difference == pytest.approx(difference)
    assert cell.difference_error == pytest.approx(of_documents.std(ddof=1) / 24**0.5)
    assert cell.difference_error < 0.02 < 0.05 < cell.error
    assert (cell.pairs, cell.clusters) == (48, 24)
    text = compared.table(found)
    assert f"({difference:+.4f} ± {cell.difference_error:.4f})" in text
    assert found.notes == []


def test_seeds_are_one_column():
    """Means over what differs by seed alone, in any order, and the spread of seeds in the error."""
    base = np.linspace(1, 3, 20)
    runs = [run("a", base, 0), run("b", base + 0.2, 0, "b"), run("a1", base + 0.1, 1), run("b1", base + 0.5, 1, "b")]
    found = compare.compare(runs)
    assert [group.name for group in found.groups] == ["a (2 seeds)", "b (2 seeds)"]
    first, second = found.cells[compare.BLOCK, 512]
    assert first.value == pytest.approx(base.mean() + 0.05)
    assert second.difference == pytest.approx(0.3)
    of_seeds = np.var([0, 0.1], ddof=1) / 2 + np.var([0.2, 0.5], ddof=1) / 2
    assert second.difference_error == pytest.approx(of_seeds**0.5)  # windows all differ by the same
    same = compare.compare([run("a", base, 0), run("again", base, 0)])
    assert [group.name for group in same.groups] == ["a", "again"]  # not two seeds
    mixed = compare.compare([*runs[:1], *runs[1::2]])
    assert "how much seeds differ" in mixed.notes[0]


def test_other_text_is_not_paired():
    """Other windows: no difference, a sentence, and bits a byte on the same documents all the same."""
    one, other = run("a", [1.0] * 8), run("b", [2.0] * 8, config="b", text="other")
    found = compare.compare([one, other])
    cell = found.cells[compare.BLOCK, 512][1]
    assert (cell.value, cell.difference) == (pytest.approx(2.0), None)
    assert "'b' was not measured on the pieces of 'a'" in found.notes[0]
    assert found.cells[compare.BITS, None][1].difference == 0
    elsewhere = run("c", [1.0] * 8, config="c", heldout=HELD | {"names": ["p", "q", "r"]})
    found = compare.compare([one, elsewhere])
    assert found.cells[compare.BITS, None][1].difference is None
    assert "other held-out text" in found.notes[0]


def test_bits_a_byte_are_paired_over_documents_of_any_tokenizer():
    """The mean of all text, not of documents, and the error of a ratio."""
    other = HELD | {"nats": [80.0, 710.0, 120.0], "tokens": [90, 900, 180]}
    found = compare.compare([run("a"), run("b", config="b", heldout=other)])
    first, second = found.cells[compare.BITS, None]
    assert first.value == pytest.approx(910 / np.log(2) / 1300)
    assert second.difference == pytest.approx(0, abs=1e-12)
    assert second.difference_error == pytest.approx(np.sqrt(1.5 * (10**2 + 10**2 + 20**2)) / np.log(2) / 1300)


def test_copies_of_a_text_all_count():
    """Guards against the last copy alone. They hang together in the error."""
    copies = HELD | {"names": ["x", "y", "y"]}
    found = compare.compare([run("a", heldout=copies), run("b", config="b", heldout=copies | {"nats": [70, 710, 150]})])
    first, second = found.cells[compare.BITS, None]
    assert first.value == pytest.approx(910 / np.log(2) / 1300)
    assert second.difference == pytest.approx(20 / np.log(2) / 1300)
    assert (second.pairs, second.clusters) == (3, 2)


def test_windows_measured_by_one_run_alone_are_left_out_of_the_difference():
    found = compare.compare([run("a", [1.0] * 8), run("b", [1.5] * 6, config="b")])
    cell = found.cells[compare.BLOCK, 512][1]
    assert (cell.difference, cell.pairs) == (pytest.approx(0.5), 6)
    assert "on 6 pieces that both measured, of 6 and 8" in found.notes[0]


def test_needles_found_alike_are_no_proof_of_equality():
    """80 of 80 and 80 of 80 differ by 0 ± something. Guards against ± 0.0 %."""
    right = [[1] * 16] * 5
    missed = [[0] * 4 + [1] * 12, *[[1] * 16] * 4]
    found = compare.compare([run("a", needles=right), run("b", config="b", needles=right)])
    cell = found.cells[compare.NEEDLE, 128][1]
    assert cell.difference == 0
    assert cell.difference_error == pytest.approx(1 / 82)
    assert cell.error == pytest.approx(np.sqrt(82 / 84 * 2 / 84 / 84))
    found = compare.compare([run("a", needles=right), run("b", config="b", needles=missed)])
    cell = found.cells[compare.NEEDLE, 128][1]
    assert cell.difference == pytest.approx(-0.05)
    assert cell.difference_error == pytest.approx(np.sqrt(4 + 1 - 16 / 82) / 82)


def test_one_document_gives_no_error():
    found = compare.compare([run("a", [1.0, 1.2]), run("b", [1.5, 1.7], config="b")])
    cell = found.cells[compare.BLOCK, 512][1]
    assert (cell.difference, cell.difference_error) == (pytest.approx(0.5), None)
    assert "1.6000 (+0.5000)" in compared.table(found)


def test_files(tmp_path):
    """A page, numbers, and pictures that a paper can take."""
    base, right = np.linspace(1, 3, 20), [[1] * 4] * 5
    found = compare.compare([run("a|x", base, needles=right), run("b", base + 0.2, config="b", needles=right)])
    compared.write(found, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.{form}" for name in ("training", "final_block", "needles") for form in ("png", "svg")}
    assert names == {"comparison.md", "comparison.csv"} | pictures
    assert (tmp_path / "out" / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "needles.svg").read_text()
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| measured | tokens | a\\|x | b |" in page
    assert "/runs/b" in page
    with (tmp_path / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    line = next(line for line in lines if line["run"] == "b" and line["tokens"] == "512")
    assert float(line["difference"]) == pytest.approx(0.2)
    assert {len(line) for line in lines} == {10}


def test_evaluated_runs_are_compared(tmp_path, bigram, experiment, corpus, monkeypatch, capsys):
    """From `evaluate` to the table: the same model on the same text differs by nothing at all."""
    monkeypatch.setattr(report, "pictures", lambda summary, history: [])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model": name}))
        evaluate(bigram, experiment, corpus, tmp_path / name)
    windows = json.loads((tmp_path / "one" / "report" / "windows.json").read_text())
    assert {len(losses) for losses in windows["final_block"]["nats"].values()} == {5}
    assert np.shape(windows["needle"]["64"]["hits"]) == (3, 4)
    summary = json.loads((tmp_path / "one" / "report" / "summary.json").read_text())
    nats = windows["final_block"]["nats"]["64"]
    assert np.exp(np.mean(nats)) == pytest.approx(summary["perplexity"]["final_block"]["64"])
    runs = [compare.load(tmp_path / name, name) for name in ("one", "two")]
    found = compare.compare(runs)
    assert found.notes == []
    assert {key[0] for key in found.cells} == {compare.BLOCK, compare.BITS, compare.NEEDLE}
    for _, cell in found.cells.values():
        assert cell.difference == 0
    assert compare.load(tmp_path / "one" / "report", "one").items == runs[0].items


def test_identity_of_a_window_is_its_text_place_and_tokens():
    """Another tokenizer's tokens at the same place of the same text are another window."""

    def names(tokens, text="t", end=6):
        store = data.TokenStore(np.array(tokens), np.array([0, 8]), ("a",), np.array([8]), (text,))
        return pieces.final_block(store, [Window(0, end)], 2, {4: np.ones((1, 2))})["windows"]

    same = names(range(9))
    assert same == names([*range(6), 0, 0, 0])
    assert len({*same, *names(range(1, 10)), *names(range(9), "u"), *names(range(9), end=7)}) == 4


def test_runs_without_what_is_needed_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no report; give .*longctx\.evaluate --workdir="):
        compare.load(tmp_path, "x")
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=r"windows\.json; measure the run anew"):
        compare.load(tmp_path, "x")
    for text in ("{", "[]", "null", "{}", '{"final_block": 3}', '{"heldout": NaN}', "[" * 100_000):
        (folder / "windows.json").write_text(text)
        with pytest.raises(UsageError, match="cannot be read"):
            compare.load(tmp_path, "x")


@pytest.mark.parametrize(
    ("words", "out", "message"),
    [
        (["a"], None, "1 runs are given; name two or more"),
        (["a", "b", "./a"], None, "a run is given twice"),
        (["a", "b"], __file__, "is a file; name a folder"),
        (["a", "b"], None, "a holds no report"),
    ],
)
def test_command_lines_are_refused(monkeypatch, words, out, message):
    monkeypatch.setattr(command.commands, "words", lambda: words)
    monkeypatch.setattr(command, "_OUT", type("Flag", (), {"value": out}))
    with pytest.raises(UsageError, match=re.escape(message)):
        command.main()


def test_a_task_is_compared_by_rows():
    """Of a task there are no bytes: nats an answer, and the share of each row's answers."""
    heldout = pieces.heldout(Measured(np.array([4.0, 6.0]), np.array([2, 2]), np.zeros(2), ("r0", "r1"), True))
    windows = {"final_block": pieces.EMPTY, "heldout": heldout, "needle": {}}
    windows["task"] = {"40": {"rows": "r", "shares": [0.5, 1.0]}}
    found = compare._items(windows)
    assert found[compare.LOSS, None]["r1", 0] == compare.Item(3.0, "r1", 2)
    assert [item.value for item in found[compare.TASK, 40].values()] == [0.5, 1.0]
