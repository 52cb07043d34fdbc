"""The report's pictures: quality against cost, and loss curves; as SVG that takes the page's colours, and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from reftune.comparison.summary import MethodSummary

COLOURS = ("#3b82c4", "#d97a2b", "#35996b", "#c9565e", "#8a6cc2", "#22979b", "#c063a0", "#96794c", "#6f8fa6", "#a3a02e",
           "#e0559a", "#4f7f1f", "#7a5cff", "#b04a1e", "#1f9fd6", "#98818f")  # fmt: skip
"""By method, in order; each reads on white and on near-black."""
BASE_COLOUR = "#8a919c"
_INK = "#1f2430"
"""The text colour of the PNG; in the SVG it becomes the page's."""
_SETTINGS = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "font.family": "DejaVu Sans",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture: a file name's stem, what it shows, and both renderings."""

    name: str
    caption: str
    svg: str
    png: bytes


def colour_of(summaries: Sequence[MethodSummary]) -> dict[str, str]:
    """A colour a method; the base model is grey."""
    trained = [item.name for item in summaries if item.method.kind != "base"]
    found = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(trained)}
    return found | {item.name: BASE_COLOUR for item in summaries if item.method.kind == "base"}


def draw_pictures(summaries: Sequence[MethodSummary]) -> list[Picture]:
    """Every picture for which there is something to draw."""
    trained = [item for item in summaries if item.method.trains]
    measured = [item for item in summaries if math.isfinite(item.kl)]
    colours = colour_of(summaries)
    base = [(_untrained_name(item), item.loss, colours[item.name]) for item in summaries if not item.method.trains]

    def pareto(axis: str, label: str, log: bool) -> Callable[[Axes], None]:
        return lambda axes: _pareto(axes, trained, colours, base, axis, label, log)

    def beside(axes: Axes) -> None:
        _pareto(axes, measured, colours, (), "kl", "KL from the base on neutral text (nats a token)", False)

    bars = "Points are means over seeds, bars the lowest and the highest seed; the line joins the frontier."
    effect = (
        _picture(
            "loss-by-kl",
            f"Effect and side effect: held-out loss against divergence from the base. {bars}",
            beside,
            len(measured),
        )
        if len(measured) > 1
        else None
    )
    if not trained:
        return [effect] if effect else []
    return [
        _picture(
            "loss-by-parameters", f"Held-out loss against trained parameters. {bars}",
            pareto("parameters", "trained parameters", True), len(trained),
        ),
        _picture(
            "loss-by-seconds", f"Held-out loss against seconds of training. {bars}",
            pareto("seconds", "seconds of training", False), len(trained),
        ),
        _picture(
            "held-out-loss", "Held-out loss after each epoch; the band reaches from the lowest to the highest seed.",
            lambda axes: _held_out(axes, trained, colours, base), len(trained),
        ),
        _picture(
            "training-loss", "Training loss, smoothed, mean over seeds.",
            lambda axes: _training(axes, trained, colours), len(trained),
        ),
        *([effect] if effect else []),
    ]  # fmt: skip


def _picture(name: str, caption: str, draw: Callable[[Axes], None], methods: int) -> Picture:
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 3.9 + 0.14 * max(0, methods - 5)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.grid(True, color=_INK, alpha=0.1, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        text, image = io.StringIO(), io.BytesIO()
        nothing: Any = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        figure.savefig(image, format="png", dpi=160)
    return Picture(name, caption, _inline(text.getvalue(), name), image.getvalue())


def _inline(svg: str, name: str) -> str:
    """The SVG as it stands in a page: no prologue, no addresses, identifiers of its own, the page's ink and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    svg = re.sub(r"(font:[^;\"]*?)'DejaVu Sans'(, [^;\"]*)?", r"\1system-ui, sans-serif", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*pt"', r"\1", svg)
    return svg.replace(_INK, "currentColor").strip()


_Levels = Sequence[tuple[str, float, str]]
"""What is not trained, as lines: what it is called, its loss, its colour."""


def _untrained_name(item: MethodSummary) -> str:
    return "base model" if item.method.kind == "base" else item.name


def _limits(axes: Axes, values: Sequence[float], base: _Levels) -> None:
    """Room for the methods; what is not trained is a line where it does not push them together, else a number."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-3 * max(abs(high), 1e-6))
    near = [level for level in base if low - 0.6 * span <= level[1] <= high + 0.6 * span]
    for name, loss, colour in near:
        low, high = min(low, loss), max(high, loss)
        axes.axhline(loss, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            name, (1, loss), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", va="bottom", fontsize=8, color=colour,
        )  # fmt: skip
    axes.set_ylim(low - 0.14 * span, high + 0.14 * span)
    far = [f"{name}: {loss:.3f}" for name, loss, _ in base if name not in {level[0] for level in near}]
    axes.annotate(
        "; ".join(far), (1, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=BASE_COLOUR,
    )  # fmt: skip


def _pareto(
    axes: Axes, items: Sequence[MethodSummary], colours: dict[str, str], base: _Levels, axis: str, label: str,
    log: bool,
) -> None:  # fmt: skip
    costs = [float(getattr(item, axis)) for item in items]
    _limits(axes, [v for item in items for v in (item.seed_range.low, item.seed_range.high)], base)
    if log:
        axes.set_xscale("log")
        low, high = math.log10(max(min(costs), 1)), math.log10(max(costs))
        pad = max(0.1 * (high - low), 0.15)
        axes.set_xlim(10 ** (low - pad), 10 ** (high + 2.2 * pad))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if high - low < 1:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    else:
        span = max(max(costs) - min(costs), 0.2 * max(costs), 1e-9)
        axes.set_xlim(max(0.0, min(costs) - 0.12 * span), max(costs) + 0.45 * span)
    steps = sorted(((c, i.loss) for c, i in zip(costs, items, strict=True) if axis in i.frontier))
    axes.plot(*zip(*steps, strict=True), color=BASE_COLOUR, linewidth=1, alpha=0.6, zorder=1)
    markers: list[Line2D] = []
    for cost, item in zip(costs, items, strict=True):
        colour, seeds = colours[item.name], item.seed_range
        axes.plot([cost, cost], [seeds.low, seeds.high], color=colour, linewidth=1.4, alpha=0.7, zorder=2)
        markers += axes.plot([cost], [item.loss], marker="o", markersize=6.5, color=colour, zorder=3, label=item.name)
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss (nats a token)")
    _label_points(axes, markers)


def _label_points(axes: Axes, markers: Sequence[Line2D]) -> None:
    """Write each marker's label beside it, clear of the others where there is room, with a line to it where apart."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now stays where it is
    xs, ys = ([float(values[0]) for values in part] for part in zip(*(m.get_data() for m in markers), strict=True))
    texts = [
        axes.text(x, y, str(marker.get_label()), fontsize=8, color=marker.get_color())
        for x, y, marker in zip(xs, ys, markers, strict=True)
    ]
    adjust_text(
        texts, x=xs, y=ys, objects=markers, ax=axes, expand=(1.1, 1.5), force_text=(0.3, 0.6), iter_lim=1000,
        arrowprops={"arrowstyle": "-", "color": BASE_COLOUR, "linewidth": 0.6, "shrinkB": 4},
    )  # fmt: skip


def _held_out(axes: Axes, items: Sequence[MethodSummary], colours: dict[str, str], base: _Levels) -> None:
    curves = {item.name: item.curve() for item in items}
    if max(len(curve) for curve in curves.values()) > 2:  # the base model's loss would press the rest together
        curves = {name: curve[1:] for name, curve in curves.items()}
    _limits(axes, [v for curve in curves.values() for point in curve for v in point[2:]], base)
    for name, curve in curves.items():
        epochs, means, low, high = (list(values) for values in zip(*curve, strict=True))
        axes.fill_between(epochs, low, high, color=colours[name], alpha=0.15, linewidth=0)
        axes.plot(epochs, means, color=colours[name], linewidth=1.7, marker="o", markersize=3.5, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("held-out loss (nats a token)")
    _legend(axes)


def _training(axes: Axes, items: Sequence[MethodSummary], colours: dict[str, str]) -> None:
    for item in items:
        curve = item.train_curve()
        if not curve:
            continue
        epochs, losses = zip(*curve, strict=True)
        axes.plot(epochs, _smoothed(losses), color=colours[item.name], linewidth=1.5, label=item.name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss (nats a token)")
    _legend(axes)


def _legend(axes: Axes) -> None:
    figure: Any = axes.figure
    handles, names = axes.get_legend_handles_labels()
    widest = max(len(name) for name in names)
    columns = max(1, min(len(names), 4, int(76 / (widest + 6))))
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, handlelength=1.4,
        columnspacing=1.4,
    )  # fmt: skip


def _smoothed(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // 20)
    windows = [values[max(0, index - width) : index + width + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
