"""The report's pictures, as PNG bytes, in a light and a dark style, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter


@dataclasses.dataclass(frozen=True)
class Style:
    """Colours of a page: paper, ink, lines of a grid, and two (after Okabe and Ito) for the curves."""

    paper: str
    ink: str
    grid: str
    first: str
    second: str

    def settings(self) -> dict[str, Any]:
        """For `matplotlib.rc_context`."""
        inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        return dict.fromkeys(inks, self.ink) | {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "legend.frameon": False,
        }


LIGHT = Style("#ffffff", "#24292f", "#e4e7eb", "#0072b2", "#d55e00")
DARK = Style("#161b22", "#dfe4ea", "#30363d", "#56b4e9", "#e69f00")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
      name: of the file, without its ending.
      title, caption: what it shows, and how to read it in a sentence or two.
      light, dark: PNG.
    """

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def pictures(summary: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[Picture]:
    """Those pictures for which there is something to show.

    Args:
      summary: what `evaluate` measured.
      history: the lines of metrics.jsonl.
    """
    block = summary["perplexity"].get("block")
    samples = summary["needle"].get("samples")
    last = f"the last {block} tokens of each window" if block else ""
    for name, title, caption, there, draw in (
        (
            "task",
            "The task",
            "Share of answers that are right (most likely of the whole vocabulary), in new rows, by their length; bars "
            "are intervals at 95 %, and the dotted line is what guessing gives.",
            summary.get("task"),
            _task,
        ),
        (
            "needle",
            "Retrieval",
            "Accuracy of naming the value of a fact that was stated once, by the length of the text and the fact's "
            "depth in it (0 is its start); right means most likely of the whole vocabulary."
            + f" Of each length and depth {samples} were asked."
            * bool(samples),
            summary["needle"]["accuracy"],
            _needle,
        ),
        (
            "perplexity",
            "Perplexity of a fixed final block",
            f"Perplexity of {last}, always the same ones, as the context before them grows: where the curve falls, the "
            "added context is used; bars are standard errors over documents.",
            summary["perplexity"]["final_block"],
            _perplexity,
        ),
        (
            "loss_by_position",
            "Loss by position",
            "Mean loss of held-out tokens by their position in the longest rows, in buckets that double in length; "
            "bars are standard errors over documents.",
            summary["loss_by_position"],
            _positions,
        ),
        (
            "speed",
            "Speed and memory",
            "Tokens a second of the forward pass, and its memory on one device by the compiler's account, at about "
            "equal numbers of tokens a call until one row is longer: flat lines mean costs linear in the length.",
            summary["speed"],
            _speed,
        ),
        (
            "training",
            "Training",
            "Loss of the training batches (thin) with its running mean (thick), that of held-out text where it was "
            "measured, and below the share of "
            "questions answered right; dotted lines mark where rows become longer.",
            history,
            _training,
        ),
    ):
        if there:
            light, dark = (
                save(lambda figure, style, draw=draw: draw(figure, style, summary, history), style)
                for style in (LIGHT, DARK)
            )
            yield Picture(name, title, caption, light, dark)


def save(draw: Callable[[Figure, Style], None], style: Style, form: str = "png", size=(7.2, 4.0)) -> bytes:
    """What `draw` draws, in the form "png", "svg" or "pdf"; equal drawings give equal bytes."""
    with matplotlib.rc_context(style.settings()):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        FigureCanvasAgg(figure)
        draw(figure, style)
        buffer = io.BytesIO()
        dates = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(buffer, format=form, metadata=dates[form])
    return buffer.getvalue()


def length_axis(axes: Axes, ticks: Iterable[float]) -> None:
    """A logarithmic axis of lengths; those are named that have room, the longest first. Call it last."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(ticks))
    low, high = axes.get_xlim()
    if low <= 0:  # nothing is drawn over it
        low, high = axes.set_xlim(ticks[0], ticks[-1])
    if high < 4 * low:  # a single length, or nearly so
        middle = math.sqrt(low * high)
        low, high = axes.set_xlim(middle / 2, middle * 2)
    place = axes.get_subplotspec()
    inches = 0.8 * axes.figure.get_figwidth() / place.get_gridspec().ncols
    scale, letter = inches / math.log2(high / low), 0.09
    shown: list[float] = []
    for tick in reversed(ticks):
        room = letter * ((len(f"{tick:,}") + len(f"{shown[0]:,}")) / 2 + 1.5) if shown else 0
        if not shown or scale * math.log2(shown[0] / tick) >= room:
            shown.insert(0, tick)
    axes.set_xticks(shown, [f"{tick:,}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def number_axis(axis: Axis, whole: bool = False) -> None:
    """Few ticks, numbers with commas, no two of them alike; only whole ones if `whole`."""
    axis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def running_mean(steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]):
    """Means over a fiftieth of the values each, centred, and their steps."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    middles = steps[(width - 1) // 2 : len(steps) - width // 2]
    return middles, (sums[width:] - sums[:-width]) / width


def _training(figure, style: Style, summary, history) -> None:
    retrieval = [line for line in history if line.get("retrieval_accuracy") is not None]
    if retrieval:
        loss_axes, axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _curve(axes, style.second, retrieval, "retrieval_accuracy")
        axes.set(ylabel="retrieval", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        loss_axes = axes = figure.subplots()
    _curve(loss_axes, style.first, history, "loss")
    heldout = [line for line in history if isinstance(line.get("heldout_loss"), float)]
    if heldout:
        steps, losses = ([line[name] for line in heldout] for name in ("step", "heldout_loss"))
        loss_axes.plot(steps, losses, color=style.ink, marker="o", markersize=4, linewidth=1, label="held out")
        loss_axes.legend(loc="lower left")
    loss_axes.set(ylabel="loss (nats)")
    axes.set(xlabel="step")
    axes.margins(x=0.01)
    number_axis(axes.xaxis, whole=True)
    number_axis(loss_axes.yaxis)
    stages = summary["config"].get("training", {}).get("stages", [])
    low, high = axes.get_xlim()
    line_of, last = 0, -math.inf  # labels that would overlap stand below one another
    for before, line in zip([None, *history[:-1]], history, strict=True):
        stage = line.get("stage")
        if before is not None and stage == before.get("stage"):
            continue
        for each in {id(loss_axes): loss_axes, id(axes): axes}.values():
            if before is not None:
                each.axvline(line["step"], color=style.ink, linewidth=1, linestyle=":")
        if isinstance(stage, int) and stage < len(stages):
            line_of = (line_of + 1) % 4 if line["step"] - last < 0.22 * (high - low) else 0
            last = line["step"]
            right = last > high - 0.22 * (high - low)
            label = f" {_stage_length(stages[stage]):,} tokens "
            transform = loss_axes.get_xaxis_transform()
            loss_axes.text(
                last,
                1 - 0.09 * line_of,
                label,
                transform=transform,
                va="top",
                ha="right" if right else "left",
                fontsize=9,
            )


def _stage_length(stage) -> int:
    return stage["length"] if isinstance(stage, dict) else stage[2]


def _curve(axes, color: str, history, name: str) -> None:
    """The values of every line, and their running mean."""
    steps = np.array([line["step"] for line in history])
    values = np.array([line[name] for line in history], float)
    if len(values) < 50:  # few enough to be visible one by one; a single one is no line
        axes.plot(steps, values, color=color, marker="o", markersize=3 if len(values) > 1 else 6)
        return
    axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
    axes.plot(*running_mean(steps, values), color=color)


def _task(figure, style: Style, summary, history) -> None:
    axes = figure.subplots()
    task = summary["task"]
    tokens = [int(length) for length in task["accuracy"]]
    axes.errorbar(tokens, *_with_bars(task), color=style.first, marker="o", capsize=3, elinewidth=1)
    axes.plot(tokens, list(task["guessing"].values()), color=style.ink, linewidth=1, linestyle=":")
    axes.set(xlabel="tokens a row", ylabel="accuracy", ylim=(-0.03, 1.12), yticks=np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _trained(axes, style, summary)
    length_axis(axes, tokens)


def _with_bars(shares: dict[str, Any]):
    """Accuracies, and how far their intervals reach below and above, as `errorbar` takes them."""
    values, edges = np.array(list(shares["accuracy"].values())), np.array(list(shares["interval"].values()))
    return values, np.maximum([values - edges[:, 0], edges[:, 1] - values], 0)


def _perplexity(figure, style: Style, summary, history) -> None:
    axes = figure.subplots()
    found = summary["perplexity"]
    contexts = [int(context) for context in found["final_block"]]
    values, errors = (np.array(list(found[name].values()), float) for name in ("final_block", "standard_error"))
    axes.errorbar(contexts, values, errors, color=style.first, marker="o", capsize=3, elinewidth=1)
    axes.set(xlabel="tokens of context", ylabel="perplexity")
    number_axis(axes.yaxis)
    _trained(axes, style, summary)
    length_axis(axes, contexts)


def _positions(figure, style: Style, summary, history) -> None:
    axes = figure.subplots()
    buckets = summary["loss_by_position"]
    middles = [np.sqrt(bucket["from"] * bucket["to"]) for bucket in buckets]
    losses, errors = (np.array([bucket[name] for bucket in buckets], float) for name in ("loss", "standard_error"))
    edges = [bucket["from"] for bucket in buckets] + [buckets[-1]["to"] + 1]
    axes.stairs(losses, edges, color=style.first, linewidth=1.8, baseline=None)
    axes.errorbar(middles, losses, errors, color=style.first, linestyle="none", capsize=3, elinewidth=1)
    axes.set(xlabel="position in the row", ylabel="loss (nats)")
    number_axis(axes.yaxis)
    _trained(axes, style, summary)
    length_axis(axes, edges[1:-1] or edges)


def _needle(figure, style: Style, summary, history) -> None:
    axes = figure.subplots()
    needle = summary["needle"]
    grid = np.array(list(needle["grid"].values())).T  # depths down, lengths across
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if grid.shape[0] <= 11 and grid.shape[1] <= 12:
        for (row, column), value in np.ndenumerate(grid):
            color = "#ffffff" if value < 0.55 else "#1b1b1b"
            size = 11 if grid.shape[1] <= 8 else 8
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color, fontsize=size)
    tokens = [f"{int(length):,}" for length in needle["grid"]]
    leaning = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if grid.shape[1] > 6 else {}
    every = -(-len(tokens) // 24)
    axes.set_xticks(range(0, len(tokens), every), tokens[::every], **leaning)
    every = -(-grid.shape[0] // 11)
    axes.set_yticks(range(0, grid.shape[0], every), [f"{depth:.3g}" for depth in needle["depths"]][::every])
    axes.set(xlabel="tokens of text", ylabel="depth of the fact")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), pad=0.02)
    bar.outline.set_visible(False)


def _speed(figure, style: Style, summary, history) -> None:
    speeds, memory = figure.subplots(1, 2)
    measured = summary["speed"]
    tokens = [int(length) for length in measured]
    for axes, color, title, values in (
        (speeds, style.first, "tokens a second", [m["tokens_per_second"] for m in measured.values()]),
        (memory, style.second, "peak memory (MiB)", [m["peak_bytes"] / 2**20 for m in measured.values()]),
    ):
        axes.plot(tokens, values, color=color, marker="o")
        axes.set(title=title, xlabel="tokens a row", ylim=(0, 1.15 * max(values)))
        number_axis(axes.yaxis)
        length_axis(axes, tokens)


def _trained(axes, style: Style, summary) -> None:
    """A dashed line at the length that training ended with, named on the side that has room."""
    length = summary["model"]["trained_length"]
    axes.set_xscale("log", base=2)
    axes.axvline(length, color=style.second, linewidth=1.2, linestyle="--")
    low, high = axes.get_xlim()
    side = "right" if length * length > low * high else "left"
    label = {"right": "trained length ", "left": " trained length"}[side]
    transform = axes.get_xaxis_transform()
    axes.text(length, 1.0, label, color=style.second, transform=transform, va="top", ha=side, fontsize=9)
