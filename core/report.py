"""Tables and pictures for people, with what made them."""

import os
import re
import subprocess
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from core.files import atomic

COLOURS = ["#0b6e99", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", "#5c5c5c", "#c26a00", "#3d5a80"]
STYLES = ["-", "--", ":"]  # one for each round of the colours
WIDTH = 36  # characters of a name in one line of a legend


def slug(text):
    """A text as a file name: letters, digits and dots, with a hyphen for all else."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def lines(path, series, x_label, y_label, *, log_x=False, log_y=False, mark_x=None, dpi=150):
    """A PNG at `path` of a line for each of the series, {name: (xs, ys)}, or (xs, ys, lows, highs) for a band around
    the line. mark_x: where to draw a dashed vertical line, at the training length say."""

    def draw(figure, axes):
        for index, (name, (xs, ys, *band)) in enumerate(series.items()):
            look = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}
            # A name can be a folder's, whose bytes need not be UTF-8; a dollar would begin a formula.
            look["label"] = textwrap.fill(os.fsencode(name).decode(errors="replace").replace("$", r"\$"), WIDTH)
            axes.plot(xs, ys, marker="o" if len(xs) < 30 else None, markersize=4, **look)
            if band:
                axes.fill_between(xs, *band, color=look["color"], alpha=0.2, linewidth=0)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if log_y:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if beside:  # The curves leave no room for it.
            figure.legend(frameon=False, loc="outside right center")
        else:
            axes.legend(frameon=False)

    beside = log_y or len(series) > len(COLOURS)
    save(path, draw, x_label, y_label, mark_x, dpi, (10, 4.5) if beside else (7, 4))


def heat(
    path, rows, x_label, y_label, *, scale=1.0, mark_x=None, dpi=150, span=(-2, 2), colours="RdBu", ticks=({}, {})
):
    """A PNG at `path` of the numbers `rows` (N, M) as colours, columns `scale` apart, with NaN left white. span: the
    values at the ends of the colours, None for the least or largest of all. ticks: {position: label} along x and y, {}
    for the usual ones."""

    def draw(figure, axes):
        extent = (0, rows.shape[1] * scale, rows.shape[0], 0)
        low, high = span
        image = axes.imshow(
            rows, aspect="auto", cmap=colours, extent=extent, vmin=low, vmax=high, interpolation="nearest"
        )
        above = high is not None and (rows > high).any()
        figure.colorbar(image, ax=axes, extend="max" if above else "neither")
        for axis, named in zip((axes.xaxis, axes.yaxis), ticks, strict=True):
            if named:
                axis.set_ticks(list(named), labels=list(named.values()))

    save(path, draw, x_label, y_label, mark_x, dpi)


def save(path, draw, x_label, y_label, mark_x, dpi, size=(7, 4)):
    """A PNG at `path` of the figure that draw(figure, axes) fills; `size` is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, dpi=dpi, layout="constrained")
    draw(figure, axes)
    if mark_x is not None:
        axes.axvline(mark_x, linestyle="--", linewidth=1, color="#999999")
    axes.set(xlabel=x_label, ylabel=y_label)
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def markdown(heads, rows):
    """Heads (N,) and rows of N cells, all of them text -> the lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def progress(total, title, place):
    """A bar over so many tokens, on the main process alone."""
    hidden = None if place.main else True
    return tqdm(total=total, desc=title, unit=" tokens", unit_scale=True, leave=False, disable=hidden)


def provenance(place):
    """The origin of a number: commit, versions, hardware, date. The commit is dirty where code differs from it."""

    def git(*words):
        root = Path(__file__).parent.parent
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "torch": torch.__version__, "hardware": place.hardware, "date": time.strftime("%Y-%m-%d")}


def place_of(name):
    """The pattern, in bytes, of what stands in a page between the lines <!-- name --> and <!-- /name -->."""
    mark = re.escape(name.encode(errors="surrogateescape"))
    return re.compile(rb"(?s)(?<=<!-- %b -->)(\r?\n).*?(?=<!-- /%b -->)" % (mark, mark))


def write_table(path, name, lines, command, place, *, page=None, **more):
    """Put Markdown lines into the file at `path`, with the command and the provenance below them: into the place that
    `place_of` finds in it, or in `page`, a whole new text for it; without such a place as the whole file."""
    made = ", ".join(f"{key} {value}" for key, value in (more | provenance(place)).items())
    text = "\n".join([*lines, "", f"Made by `{command}`: {made}."]) + "\n"
    path, text = Path(path), text.encode(errors="surrogateescape")  # A name in the command need not be UTF-8.
    old = page.encode(errors="surrogateescape") if page else path.read_bytes() if path.exists() else b""
    new, places = place_of(name).subn(lambda found: found[1] + text, old)
    with atomic(path, "wb") as file:
        file.write(new if places else text)
