"""The report's pictures, by matplotlib: SVG whose ink follows the reader's light or dark page, and the contact sheet.

Drawn 4.6 inches wide with names above their bars, so that they can be read on a phone.
"""

import io
import re

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

INK = "#010203"  # stands for the page's text colour, and occurs nowhere else
BAR, ACCENT = "#3b82c4", "#e0762b"
STAGES = {  # what a bar is made of: (label, colour, stages of the results)
    "encode": ("#8b6fc9", ("prompt_encoding", "image_encoding")),
    "steps": ("#3b82c4", ("denoising_step",)),
    "decode": ("#3f9e6b", ("decoding",)),
    "to PIL": ("#e0762b", ("postprocessing", "pil_conversion")),
}
WIDTH = 4.6
SHEET_BYTES = 30_000
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "flux-faster", "font.family": "sans-serif", "font.size": 9,
         "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
COLOURS = ("#3b82c4", "#e0762b", "#3f9e6b", "#8b6fc9", "#c7444f", "#8a8f98", "#b8952b", "#2aa5a5", "#c069a8", "#6b7f3a")


LOOK = ("<style>svg{color:#1c1e21;font-family:sans-serif}text{fill:currentColor;font-size:9px}"
        "@media(prefers-color-scheme:dark){svg{color:#e4e6ea}}</style>")

# What matplotlib writes and a chart does not need: two thirds of the file.
SURPLUS = (r"<\?xml.*?<svg(?= )|<metadata>.*?</metadata>|<!--.*?-->", r"<clipPath.*?</clipPath>", r' clip-path="[^"]*"',
           r' id="[a-z0-9._]*_\d+"', r' transform="rotate\(-0 [^"]*\)"', r" font-family: [^;]*;", r' type="text/css"')


def svg(figure: Figure) -> str:
    """The figure as small SVG text without a date, so that the same results give the same file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = re.sub(SURPLUS[0], lambda found: "<svg" if found[0].endswith("<svg") else "", buffer.getvalue(),
                  flags=re.DOTALL)
    for pattern in SURPLUS[1:]:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"""="([^"']*)\"""", lambda value: f"='{shorter(value[1])}'", text)  # attributes, not labels
    text = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", text)).replace(INK, "currentColor")
    text = re.sub(r"<path d='[^']*' style='fill:none'/>", "", text)  # backgrounds
    text = re.sub(r" style='fill:currentColor;stroke:currentColor[^']*'| style=''", "", text)  # ticks have it already
    if "<g " not in text:  # groups without a meaning
        text = re.sub(r"</?g/?>", "", text)
    return re.sub(r"(<svg[^>]*>)", rf"\1{LOOK}", text, count=1)


def shorter(value: str) -> str:
    """An attribute with coordinates to a tenth of a point, and without what `LOOK` says of all text."""
    value = re.sub(r"\.0(?!\d)", "", re.sub(r"(\d+\.\d)\d+", r"\1", value))
    value = re.sub(r"([:;]) ", r"\1", value)
    return value.replace("font-size:9px;", "").replace("text-anchor:start;", "").removesuffix(f"fill:{INK}").rstrip(";")


def bars(names: list[str], parts: dict[str, tuple[str, list[float]]], texts: list[str], unit: str) -> str:
    """Horizontal bars from top to bottom, each a stack of `parts` (label to colour and lengths), its name above and its
    text behind it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.45 * len(names) + 0.6))
        axes = figure.subplots()
        total = np.zeros(len(names))
        where = np.arange(len(names))
        for label, (colour, lengths) in parts.items():
            axes.barh(where, lengths, 0.4, left=total, color=colour, label=label)
            total += lengths
        for y, (name, text, end) in enumerate(zip(names, texts, total, strict=True)):
            axes.text(0, y - 0.27, name, va="bottom")
            axes.text(end + total.max() * 0.015, y, text, va="center", fontweight="bold")
        axes.set(xlim=(0, total.max() * 1.35), ylim=(len(names) - 0.6, -0.75), yticks=[], xlabel=unit)
        axes.spines.left.set_visible(False)
        if len(parts) > 1:
            axes.legend(loc="lower left", ncols=len(parts), bbox_to_anchor=(0, 1), handlelength=1, columnspacing=1.2,
                        borderaxespad=0.1, borderpad=0)
        return svg(figure)


def ladder(names: list[str], seconds: list[float], ratios: list[float | None]) -> str:
    """Seconds of each row, and on each bar how many times as fast as the first it has become."""
    texts = [f"{s:.3f} s" + (f"  ×{ratio:.2f}" if ratio else "") for s, ratio in zip(seconds, ratios, strict=True)]
    return bars(names, {"": (BAR, seconds)}, texts, "seconds an image, median")


def stages(names: list[str], found: list[dict[str, float]], steps: list[int]) -> str:
    """Where an image's milliseconds go: medians of the stages, the step's times its number."""
    parts = {label: (colour, [sum(ms.get(key, 0) * (count if key == "denoising_step" else 1) for key in keys)
                              for ms, count in zip(found, steps, strict=True)])
             for label, (colour, keys) in STAGES.items()}
    totals = [sum(lengths) for lengths in zip(*(lengths for _, lengths in parts.values()), strict=True)]
    return bars(names, parts, [f"{total:.0f} ms" for total in totals], "milliseconds an image")


def pareto(costs: list[float], errors: list[float]) -> list[int]:
    """Indices of the points than which none is as cheap and as good and better in one of the two, by cost."""
    points = list(zip(costs, errors, strict=True))
    front = [i for i, (cost, error) in enumerate(points)
             if not any(c <= cost and e <= error and (c, e) != (cost, error) for c, e in points)]
    return sorted(front, key=lambda i: points[i])


def speed_against_quality(names: list[str], seconds: list[float], quality: list[float], x: str, y: str,
                          higher_is_better: bool) -> str:
    """One point a row; the names stand to the right in the order of the points' heights; the Pareto front is joined."""
    front = pareto(seconds, [-value for value in quality] if higher_is_better else quality)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, max(2.6, 0.24 * len(names) + 0.4)))
        axes = figure.add_axes((0, 0, 0.5, 1))
        axes.plot([seconds[i] for i in front], [quality[i] for i in front], "-", color=ACCENT, zorder=1)
        colours = [ACCENT if i in front else BAR for i in range(len(names))]
        axes.scatter(seconds, quality, 26, colours, zorder=2)
        axes.set(xlabel=x, ylabel=y)
        axes.margins(0.08)
        order = sorted(range(len(names)), key=lambda i: (quality[i], -seconds[i]))
        for place, i in enumerate(order):
            axes.annotate("\n".join(wrapped(names[i], 24)), (seconds[i], quality[i]),
                          (1.08, (place + 0.5) / len(order)), textcoords="axes fraction", va="center", fontsize=8,
                          linespacing=0.95, fontweight="bold" if i in front else "normal",
                          arrowprops=dict(arrowstyle="-", color=colours[i], alpha=0.5, lw=0.7, shrinkA=1, shrinkB=3,
                                          relpos=(0, 0.5)))
        return svg(figure)


def drift(names: list[str], curves: list[list[float]]) -> str:
    """Relative error of the latents after each step, one line a row. Zeros, where a cache still computes all, are left
    out: the axis is logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3.2))
        axes = figure.subplots()
        for i, (name, curve) in enumerate(zip(names, curves, strict=True)):
            values = np.array(curve, float)
            axes.plot(np.arange(1, len(curve) + 1), np.where(values > 0, values, np.nan) * 100, lw=1.4, label=name,
                      color=COLOURS[i % len(COLOURS)], ls="-" if i < len(COLOURS) else "--")
        axes.set(yscale="log", xlabel="after step", ylabel="error of the latents, %, median")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, handlelength=1.4, columnspacing=1)
        return svg(figure)


def caches(names: list[str], cached: list[list[float]], diffs: list[dict[str, float]]) -> str:
    """Residual differences of each step, one line a row, if any; below, one strip a row: the share of images in which a
    step was cached, from blank to full colour. Steps count from 1, as in `drift`."""
    compared = any(diffs)
    with matplotlib.rc_context(STYLE):
        heights = [2.0] * compared + [0.32 * len(names) + 0.3]
        figure = Figure((WIDTH, sum(heights) + 0.5))
        *above, below = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for i, (name, shares, found) in enumerate(zip(names, cached, diffs, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            for axes in above if found else []:
                axes.plot([int(step) + 1 for step in found], list(found.values()), ".-", lw=1, ms=4, color=colour)
            below.barh(i, len(shares), 0.45, left=0.5, facecolor="none", edgecolor=colour, lw=0.5)
            for step, share in enumerate(shares, 1):
                if share:
                    below.barh(i, 1, 0.45, left=step - 0.5, color=colour, alpha=share, lw=0)
            below.text(0.5, i - 0.27, name, va="bottom", fontsize=8)
        for axes in above:
            axes.set(ylabel="residual difference", ylim=(0, None))
        below.set(xlabel="step", ylim=(len(names) - 0.6, -0.8), yticks=[])
        below.spines.left.set_visible(False)
        return svg(figure)


def contact_sheet(names: list[str], strips: list[PIL.Image.Image], metrics: list[list[str]], prompts: list[str]
                  ) -> bytes:
    """Rows are switches, columns prompts, the metric under each picture; a WebP, on white."""
    side = strips[0].height
    with matplotlib.rc_context(STYLE | {"text.color": "#1c1e21", "font.size": 7}):
        columns = len(prompts)
        figure = Figure((0.95 * columns + 0.1, 1.2 * len(names) + 0.5), dpi=70, facecolor="white")
        grid = figure.subplots(len(names), columns, squeeze=False)
        for row, (name, strip) in enumerate(zip(names, strips, strict=True)):
            for column in range(columns):
                axes = grid[row, column]
                axes.imshow(np.asarray(strip.crop((column * side, 0, (column + 1) * side, side))))
                axes.set_xlabel(metrics[row][column], labelpad=2, color="#1c1e21")
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if row == 0:
                    axes.set_title("\n".join(wrapped(prompts[column], 17)), fontsize=6, pad=14)
            grid[row, 0].text(0, 1.05, name, transform=grid[row, 0].transAxes, fontweight="bold", fontsize=8)
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.75 / figure.get_figheight(), hspace=0.42,
                               wspace=0.06)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    with PIL.Image.open(buffer) as picture:
        for quality in (70, 50, 35, 20, 10):
            found = io.BytesIO()
            picture.convert("RGB").save(found, "webp", quality=quality, method=6)
            if found.tell() < SHEET_BYTES:
                break
    return found.getvalue()


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of about `width` letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
