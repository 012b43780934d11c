"""Tables and pictures for people, with what made them."""

import re
import subprocess
import time
from pathlib import Path

import torch

import device as devices

COLOURS = ["#0b6e99", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", "#5c5c5c", "#c26a00", "#3d5a80"]


def lines(path, series, x_label, y_label, log_x=False, mark_x=None, dpi=150):
    """series {name: (xs, ys)} -> a PNG at `path`. mark_x draws a dashed vertical line, at the training length say."""

    def draw(figure, axes):
        for index, (name, (xs, ys)) in enumerate(series.items()):
            marker = "o" if len(xs) < 30 else None
            axes.plot(xs, ys, marker=marker, markersize=4, label=name, color=COLOURS[index % len(COLOURS)])
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    save(path, draw, x_label, y_label, mark_x, dpi)


def heat(path, rows, x_label, y_label, scale=1.0, mark_x=None, dpi=150, limits=(-2, 2), ticks=None):
    """rows (N, M) -> a PNG at `path` of M columns, which lie `scale` apart. limits: the values that are all red and all
    blue. ticks: names of the columns, and of the rows."""

    def draw(figure, axes):
        extent = (0, rows.shape[1] * scale, rows.shape[0], 0)
        image = axes.imshow(rows, aspect="auto", cmap="RdBu", extent=extent, interpolation="nearest")
        image.set_clim(*limits)
        figure.colorbar(image, ax=axes)
        for axis, names, apart in zip((axes.xaxis, axes.yaxis), ticks or (), (scale, 1), strict=False):
            axis.set_ticks([(index + 0.5) * apart for index in range(len(names))], names)

    save(path, draw, x_label, y_label, mark_x, dpi)


def save(path, draw, x_label, y_label, mark_x, dpi):
    """A figure that draw(figure, axes) fills, written to the side and put in place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=dpi, layout="constrained")
    draw(figure, axes)
    if mark_x is not None:
        axes.axvline(mark_x, linestyle="--", linewidth=1, color="#999999")
    axes.set(xlabel=x_label, ylabel=y_label)
    part = Path(f"{path}.part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)


def provenance(device):
    """What made a number: commit, versions, hardware, date. The commit is dirty where code differs from it."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    hardware = devices.describe(device)
    return {"commit": commit, "torch": torch.__version__, "hardware": hardware, "date": time.strftime("%Y-%m-%d")}


def write_table(path, name, lines, command, device, **more):
    """Put Markdown lines into the file at `path`, with the command and the provenance below them: between the comments
    <!-- name --> and <!-- /name --> where the file has them, else as the whole file."""
    made = ", ".join(f"{key} {value}" for key, value in (more | provenance(device)).items())
    path, text = Path(path), "\n".join([*lines, "", f"Made by `{command}`: {made}."]) + "\n"
    old = path.read_text() if path.exists() else ""
    new, found = re.subn(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _: text, old)
    path.write_text(new if found else text)
