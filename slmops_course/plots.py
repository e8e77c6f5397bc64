"""Figures with titles, units and colours that survive colour blindness. Each function returns a matplotlib figure.

Titles, axis labels and alternative texts are shown in the reader's language where they have a translation; see language.py.

Colours: Okabe, Ito, "Color Universal Design", 2008.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmops_course.language import ENGLISH, SCRIPT_FONTS, _, current

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def plot_size_against_score(
    rows: Sequence[dict], *, title: str = "Smaller models against what they still know", with_frontier: bool = False
):
    """Exact match with its interval against model size, on a logarithmic axis; `rows` are scoreboard rows.

    With the frontier, a line joins the models that no smaller one beats; see `frontier`.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = new_figure(title, "size on disk (MB, logarithmic)", "exact match (%)", size=(8, 4.5))
    for number, row in enumerate(rows):
        score = row["scores"]["exact_match"]
        x, y = row["size_bytes"] / 1e6, 100 * score["value"]
        error = [[100 * (score["value"] - score["low"])], [100 * (score["high"] - score["value"])]]
        # The marker moves on when the colours start again, so that no two models look alike.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(x, y, _never_negative(error), fmt=marker, color=colour, capsize=3, label=row["name"])
    if with_frontier:
        best = frontier(rows)
        values = [100 * row["scores"]["exact_match"]["value"] for row in best]
        sizes = [row["size_bytes"] / 1e6 for row in best]
        axes.plot(sizes, values, color="#888888", linestyle="--", label=_("frontier"), zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def frontier(rows: Sequence[dict]) -> list[dict]:
    """The scoreboard rows that no smaller, or equally large, model beats in exact match, smallest first.

    Example: sizes 1, 2, 3 with scores 0.5, 0.4, 0.6 -> the first and the third
    """
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["size_bytes"], -row["scores"]["exact_match"]["value"])):
        if not best or row["scores"]["exact_match"]["value"] > best[-1]["scores"]["exact_match"]["value"]:
            best.append(row)
    return best


def _never_negative(error):
    """Bootstrap intervals never turn negative by rounding."""
    return [[max(0.0, value) for value in side] for side in error]


def plot_losses(histories: Mapping[str, Sequence[dict]], *, title: str, window: int = 8):
    """Training loss against rows seen in epochs, averaged over `window` steps; `histories` are from `training.train`."""
    figure, axes = new_figure(title, "epoch", "loss (nats a token, logarithmic)")
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        losses = [step["loss"] for step in history]
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        axes.plot([step["epoch"] for step in history], means, label=name, color=colour)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def plot_scores(scores: Mapping, *, title: str, xlabel: str = "exact match (%)"):
    """Horizontal bars with 95 % intervals; `scores` maps a name to an evaluation.Score, drawn from top to bottom."""
    figure, axes = new_figure(title, xlabel, "", size=(7, 0.6 + 0.34 * len(scores)))
    names = list(scores)[::-1]
    values = [100 * scores[n].value for n in names]
    error = [
        [100 * max(0.0, scores[n].value - scores[n].low) for n in names],
        [100 * max(0.0, scores[n].high - scores[n].value) for n in names],
    ]
    axes.barh(names, values, xerr=error, color=COLOURS[0], ecolor="#444444", capsize=3)
    axes.set_xlim(0, 100)
    return figure


def plot_bars(values: Mapping[str, float], *, title: str, xlabel: str):
    """Plain horizontal bars, drawn from top to bottom, each with its value."""
    figure, axes = new_figure(title, xlabel, "", size=(7, 0.8 + 0.34 * len(values)))
    names = list(values)[::-1]
    bars = axes.barh(names, [values[n] for n in names], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    return figure


def plot_lines(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, xlabel: str, ylabel: str):
    """Lines by name, each a pair of x and y values."""
    figure, axes = new_figure(title, xlabel, ylabel)
    for number, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, label=name, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], ms=4)
    axes.legend(frameon=False)
    return figure


def plot_reliability(calibration, *, title: str):
    """How sure a model was against how often it was right; `calibration` is a textmetrics.Calibration.

    Points on the diagonal are well calibrated; each carries the number of answers in its bin.
    """
    figure, axes = new_figure(title, "how sure the model was (%)", "how often it was right (%)", size=(5.5, 5))
    axes.plot([0, 100], [0, 100], color="#888888", linestyle="--", label=_("as often right as sure"))
    sure, right = ([100 * getattr(b, name) for b in calibration.bins] for name in ("confidence", "accuracy"))
    axes.plot(sure, right, color=COLOURS[0], marker="o", label=_("this model"))
    for x, y, one in zip(sure, right, calibration.bins, strict=True):
        axes.annotate(f"{one.count:,}", (x, y), textcoords="offset points", xytext=(6, -12), fontsize=8)
    axes.set(xlim=(0, 104), ylim=(0, 104))
    axes.legend(frameon=False, loc="upper left")
    return figure


def new_figure(title: str, xlabel: str, ylabel: str, *, size: tuple[float, float] = (7, 4)):
    """An empty figure and its axes, with title and axis labels set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=_(title), xlabel=_(xlabel), ylabel=_(ylabel))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def font_families(folder: Path | None = None) -> set[str]:
    """The font families that there are for figures: the machine's, and those that `make course` put into the environment."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted((folder or Path(sys.prefix) / "share" / "fonts").glob("*.ttf")):
        if str(path) not in known:
            font_manager.fontManager.addfont(path)
    return set(font_manager.get_font_names())


def use_fonts(figure) -> None:
    """Let a figure's texts fall back on fonts of the course's other scripts, as far as this machine has them."""
    if current() == ENGLISH:
        return
    from matplotlib import rcParams
    from matplotlib.text import Text

    installed = font_families()
    families = [name for fonts in SCRIPT_FONTS.values() for name in sorted(fonts & installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily([*rcParams["font.family"], *families])


def image_html(figure, alternative_text: str) -> str:
    """A figure as an HTML image that carries its alternative text for readers who cannot see it."""
    import base64
    import html
    import io

    use_fonts(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(_(alternative_text), quote=True)}" src="data:image/png;base64,{data}">'


def show(figure, alternative_text: str) -> None:
    """Display a figure in a notebook, see `image_html`."""
    from IPython.display import HTML, display

    display(HTML(image_html(figure, alternative_text)))
