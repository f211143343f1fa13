"""Ticks that can be read: none repeats, none lies over another, whatever there is to show."""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longctx.evals import plots
from longctx.evals.statistics import wilson


def summary(count):
    """Of `count` lengths; the longest context is close to the one before it, as a corpus may make it."""
    lengths = [str(512 * 2**i) for i in range(count)]
    contexts = [str(64 * 2**i) for i in range(count - 1)] + [str(64 * 2 ** max(count - 2, 0) + 30)]
    edges = [1, *(2 ** (4 + i) for i in range(count))]
    shares = {"accuracy": dict.fromkeys(lengths, 1.0), "interval": dict.fromkeys(lengths, wilson(1.0, 16))}
    grid = np.random.default_rng(0).random((count, 5)).tolist()
    return {
        "model": {"trained_length": 512},
        "task": shares | {"guessing": dict.fromkeys(lengths, 0.1)},
        "needle": shares | {"depths": [0, 0.25, 0.5, 0.75, 1], "grid": dict(zip(lengths, grid, strict=True))},
        "perplexity": {
            "block": 128,
            "final_block": {context: 7 - 0.3 * i for i, context in enumerate(contexts)},
            "standard_error": dict.fromkeys(contexts, None if count == 1 else 0.5),
        },
        "loss_by_position": [
            {"from": a, "to": b - 1, "loss": 3.0, "standard_error": None} for a, b in itertools.pairwise(edges)
        ],
        "speed": {n: {"tokens_per_second": 1234567.0, "peak_bytes": 400_000 * int(n) / 512} for n in lengths},
        "config": {"training": {"stages": [[2, 4, 64], [3, 4, 128], [995, 4, 512]]}},
    }


def history(steps):
    return [
        {"step": i + 1, "stage": min(i // 2, 2), "loss": 6 - i / 500, "retrieval_accuracy": i / steps}
        for i in range(steps)
    ]


@pytest.mark.parametrize(("lengths", "steps"), [(1, 1), (2, 2), (4, 60), (12, 1000)])
def test_ticks_can_be_told_apart(monkeypatch, lengths, steps):
    """Seen to fail of one length, of twelve, and of a memory below a MiB: 1 1 0 0."""
    seen = []

    def look(draw, style):
        with matplotlib.rc_context(style.settings()):
            figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
            canvas = FigureCanvasAgg(figure)
            draw(figure, style)
            figure.draw_without_rendering()
            for axes in figure.axes:
                for axis in (axes.xaxis, axes.yaxis):
                    low, high = sorted(axis.get_view_interval())
                    ticks = [
                        tick.label1
                        for tick in axis.get_major_ticks()
                        if low <= tick.get_loc() <= high and tick.label1.get_visible() and tick.label1.get_text()
                    ]
                    texts = [label.get_text() for label in ticks]
                    assert len(set(texts)) == len(texts)
                    across = [label.get_window_extent(canvas.get_renderer()) for label in ticks]
                    if not any(label.get_rotation() for label in ticks):  # boxes of leaning labels are no measure
                        assert not any(a.overlaps(b) for a, b in itertools.combinations(across, 2)), texts
                    seen.append(texts)
        return b""

    monkeypatch.setattr(plots, "save", look)
    monkeypatch.setattr(plots, "DARK", plots.LIGHT)
    names = [picture.name for picture in plots.pictures(summary(lengths), history(steps))]
    assert names == ["task", "needle", "perplexity", "loss_by_position", "speed", "training"]
    assert all(len(texts) >= 1 for texts in seen if texts)


def test_number_axis_shows_whole_steps():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1, 1])
    plots.number_axis(axes.xaxis, whole=True)
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels() if 1 <= label.get_position()[0] <= 2] == ["1", "2"]


def test_an_axis_of_lengths_over_nothing():
    """As in the differences of runs that share no text. Seen to fail: limits below 0."""
    axes = plots.Figure().subplots()
    axes.errorbar([], [], [])
    axes.axhline(0)
    plots.length_axis(axes, [64, 512, 4096])
    assert axes.get_xlim() == (64, 4096)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "512", "4,096"]
