"""Records to tables and pictures.

A record is what was measured of one run: {"train_length": T, "lengths": [tokens of context, ...]}, numbers for each of
these lengths ("loss", "exact", ...), and what made them. A run's length.json is one; a results.json has several, as
{"made": ..., "runs": {name: record}}. Records of runs with different T share columns, which are multiples of T. Every
table goes through `pivot`.
"""

import functools
import math
import statistics

from core import report
from core.errors import require
from lab import passkey

BROKEN = 1.05  # a length breaks a model if its perplexity is more than so many times that at T
NOISE = 3  # standard errors that a gain exceeds by chance once in 740 times, so once in some 90 tables of 8 distances
SAME = float  # a number stands in its table as the record has it

# key: (title of its table, how its numbers are written, where a record has them, what is made of each)
TABLES = {
    "exact": ("exact match", "{:.1%}", ["exact"], SAME),
    "loss": ("nats per token", "{:.3f}", ["loss"], SAME),
    "gain": ("nats saved by the same passage, so far back", "{:.3f}", ["gain", "gain"], SAME),
    "key": ("nats per key token", "{:.3f}", ["key", "loss"], SAME),
    "non_overlapping": ("perplexity, windows apart", "{:.2f}", ["non_overlapping"], math.exp),
    "sliding": ("perplexity, windows sliding by L/2", "{:.2f}", ["sliding"], math.exp),
    "bits_per_byte": ("bits per byte, windows apart", "{:.3f}", ["bits_per_byte"], SAME),
    "entropy": ("entropy of attention, nats", "{:.2f}", ["attention", "entropy"], SAME),
    "first": ("attention on the first token", "{:.1%}", ["attention", "first"], SAME),
    "far": ("attention T tokens back or more", "{:.1%}", ["attention", "far"], SAME),
}


def pivot(heads, cells, multiple="{:.3g} T"):
    """Cells [(labels of the row, column, text)] -> lines of a Markdown table.

    heads stand above the labels. A column is a multiple of T, which `multiple` writes, or a text. Rows stand as they
    first come, multiples ascend, texts follow them.
    """
    rows = {}
    for labels, column, text in cells:
        rows.setdefault(labels, {})[column] = text
    columns = dict.fromkeys(column for _, column, _ in cells)
    named = [column for column in columns if isinstance(column, str)]
    multiples = sorted(columns.keys() - set(named))
    return report.markdown(
        [*heads, *map(multiple.format, multiples), *named],
        [
            [*labels, *(row.get(at, "no position") for at in multiples), *(row.get(name, "") for name in named)]
            for labels, row in rows.items()
        ],
    )


def by_multiple(record, key, name=""):
    """{length / T: number} of one of the TABLES, {} where the record has none; with a name, of what has it beside these
    numbers. The multiples have three digits, or 1.1 T would differ from one T to another."""
    _, _, (*path, last), readable = TABLES[key]
    part = functools.reduce(lambda part, name: part.get(name, {}), path, record)
    numbers, lengths = part.get(name or last, {}), part.get("distances", record["lengths"])
    multiples = [float(f"{length / record['train_length']:.3g}") for length in lengths]
    return dict(zip(multiples, map(readable, numbers), strict=True)) if numbers else {}


def headline(records):
    """The key of the TABLES that {name: record} are about first of all."""
    return "exact" if has(records, "exact") else "loss"


def has(records, key):
    """Whether all of {name: record} have numbers for one of the TABLES."""
    return all(by_multiple(record, key) for record in records.values())


def cells_of(records, key):
    """{name: record} -> cells of one of the TABLES, with standard errors where the records have them."""
    form, cells = TABLES[key][1], []
    for name, record in records.items():
        errors = by_multiple(record, key, "error")
        for at, x in by_multiple(record, key).items():
            error = f" ± {form.format(errors[at])}" if errors else ""
            cells.append(((name,), at, form.format(x) + error))
    return cells


def table(records, key=None, task=""):
    """{name: record} -> lines: one of the TABLES at multiples of T, by default the headline. task: what the records are
    of, for the title."""
    key = key or headline(records)
    title, cells = f"{TABLES[key][0]}, {task}" if task else TABLES[key][0], cells_of(records, key)
    if key in ("exact", "loss"):
        counts = sorted({record["windows"] for record in records.values()})
        title += f", {' or '.join(map(str, counts))} window{'s' * (counts != [1])}{crossed(records)}"
    if key == "key":
        title += f", of {' or '.join(sorted({marked(record) for record in records.values()}))}"
    if key == "loss":
        for column, measure in (("not broken to", not_broken_to), ("uses to", uses_to)):
            found = {name: measure(record) for name, record in records.items()}
            cells += [((name,), column, f"{at:.3g} T") for name, at in found.items() if at is not None]
    return pivot([title], cells)


def marked(record):
    """How many key tokens a record is of, and who marked them."""
    return f"{record['key']['tokens']} that {record['key']['evaluator']} marked"


def crossed(records):
    """What the title says of {name: record} whose longest windows reach into other documents than their targets'."""
    ends = [record.get("own_context", math.inf) / record["train_length"] for record in records.values()]
    longest = max(record["lengths"][-1] / record["train_length"] for record in records.values())
    return f", past {min(ends):.3g} T in other documents" if min(ends) < longest else ""


def tables(records):
    """Every one of the TABLES that all of {name: record} have, with an empty line between two."""
    parts = [table(records, key) for key in TABLES if has(records, key)]
    parts += [table(of_task(records, task), "exact", task) for task in tasks_of(records)]
    return [line for part in parts for line in ("", *part)][1:]


def tasks_of(records):
    """The tasks beside a text that all of {name: record} answer, in the order of the first."""
    first, *others = records.values()
    return [task for task in first.get("tasks", {}) if all(task in other.get("tasks", {}) for other in others)]


def of_task(records, task):
    """{name: record} -> the records of one of the tasks beside their text."""
    return {name: record["tasks"][task] for name, record in records.items()}


def not_broken_to(record):
    """The largest length, in T, up to which perplexity is at most BROKEN times that at T wherever it was measured; None
    where T was not."""
    T, held = record["train_length"], None
    loss = dict(zip(record["lengths"], record["loss"], strict=True))
    for length in (length for length in loss if length >= T and T in loss):
        if loss[length] > loss[T] + math.log(BROKEN):
            break
        held = length / T
    return held


def uses_to(record):
    """The largest distance, in T, at which an earlier passage saves more than NOISE standard errors; 0 where there is
    none, None where nothing was measured. Those of means over seeds are means too, and so too large."""
    gains, errors = by_multiple(record, "gain"), by_multiple(record, "gain", "error")
    return max((at for at in gains if gains[at] > NOISE * errors[at]), default=0) if gains else None


# Runs of several seeds.


def mean(records):
    """Records of several seeds -> one with their means: nested dicts and lists of numbers, of the same form in all."""
    first = records[0]
    if isinstance(first, dict):
        return {key: mean([record[key] for record in records]) for key in first}
    if isinstance(first, list):
        return [mean(list(column)) for column in zip(*records, strict=True)]
    return statistics.fmean(records) if isinstance(first, float) else first


def with_error(numbers, form):
    """Numbers of several seeds -> their mean, with its sign, and its standard error, as text."""
    error = f" ± {form.format(statistics.stdev(numbers) / math.sqrt(len(numbers)))}" if len(numbers) > 1 else ""
    return form.replace("{:", "{:+").format(statistics.fmean(numbers)) + error


def seeds_table(records, seeds, key, task=""):
    """{name: [record of each seed]} -> lines: mean, every seed, and the paired difference to the first name. task: what
    the records are of, for the title."""
    title, form, *_ = TABLES[key]
    title, cells, (first, *_) = f"{title}, {task}" if task else title, [], records
    base = [by_multiple(record, key) for record in records[first]]
    for name, of_seeds in records.items():
        numbers = [by_multiple(record, key) for record in of_seeds]
        for at in numbers[0]:
            column = [number[at] for number in numbers]
            cells.append(((name, "mean"), at, f"**{form.format(statistics.fmean(column))}**"))
            cells += [
                ((name, f"seed {seed}"), at, form.format(number)) for seed, number in zip(seeds, column, strict=True)
            ]
            if name != first and at in base[0]:
                pairs = [number - other[at] for number, other in zip(column, base, strict=True)]
                cells.append(((name, f"less {first}"), at, with_error(pairs, form)))
    return pivot([title, ""], cells)


def ratio_table(records):
    """{name: record} -> lines: perplexity over that at T."""
    losses = {name: by_multiple(record, "loss") for name, record in records.items()}
    cells = [
        ((name,), at, f"{math.exp(nats - loss[1]):.2f}")
        for name, loss in losses.items()
        for at, nats in loss.items()
        if 1 in loss
    ]
    return pivot(["perplexity / perplexity at T"], cells)


# Pictures.

# Of the TABLES that are drawn: what stands beside the axis.
LABELS = {
    "exact": "exact match",
    "loss": "loss (nats per token)",
    "gain": "nats saved by an earlier passage",
    "key": "loss (nats per key token)",
    "entropy": "entropy of attention (nats)",
    "first": "attention on the first token",
    "far": "attention T tokens back or more",
}
FILES = {"gain": "gain.png", "key": "key.png", "entropy": "attention.png", "first": "first.png", "far": "far.png"}


def picture(path, records, seeds=(), key=None):
    """One of the TABLES, by default the headline, of {name: record} that have its numbers, as a PNG. Bands are standard
    errors or, with seeds, {name: [record of each seed]}, from the least to the largest."""
    key = key or headline(records)
    curves = {name: by_multiple(record, key) for name, record in records.items()}
    series = {
        name: (list(curve), list(curve.values()), *band(records[name], key, seeds[name] if seeds else []))
        for name, curve in curves.items()
        if curve
    }
    label = "distance / training length" if key == "gain" else "context / training length"
    if series:
        report.lines(path, series, label, LABELS[key], log_x=True, mark_x=1)


def band(record, key, of_seeds):
    """[lows, highs] around the record's numbers in one of the TABLES, [] where nothing says how sure they are."""
    numbers, errors = by_multiple(record, key), by_multiple(record, key, "error")
    around = [by_multiple(one, key) for one in of_seeds]
    if errors and not around:
        around = [{at: numbers[at] + side * errors[at] for at in numbers} for side in (-1, 1)]
    return [[end(one[at] for one in around) for at in numbers] for end in (min, max) if around]


def pictures(folder, records, seeds=()):
    """length.png, and what else {name: record} have numbers for, into the folder."""
    picture(folder / "length.png", records, seeds)
    for key, file in FILES.items():
        picture(folder / file, records, seeds, key)
    by_position = {}
    for name, record in records.items():
        if "map" in record:
            file = f"passkey-{report.slug(name)}.png" if len(records) > 1 else "passkey.png"
            passkey.picture(folder / file, record["map"])
        if "by_position" in record:
            middles, loss = record["by_position"]["position"], record["by_position"]["loss"]
            by_position[name] = [middle / record["train_length"] for middle in middles], loss
    for task in tasks_of(records):
        of_seeds = {name: [record["tasks"][task] for record in seeds[name]] for name in seeds}
        picture(folder / f"exact-{task}.png", of_task(records, task), of_seeds)
    if by_position:
        labels = "position / training length", "loss (nats per token)"
        report.lines(folder / "position.png", by_position, *labels, mark_x=1)


def is_whole(record):
    """Whether a record that was read from a file is one: every table can be made of it."""
    try:
        return min(record["train_length"], *record["lengths"]) > 0 and bool(tables({"": record}))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False


def check_folder(folder):
    """ValueError where pages or pictures in the folder would be overwritten that no earlier call of ours has left, even
    one that was killed before its last file."""
    page = folder / "results.md"
    ours = any((folder / f"{name}.json").exists() for name in ("results", "length", "frequencies", "key_tokens"))
    ours = ours or (page.is_file() and b"\nMade by `python" in page.read_bytes())
    others = [] if ours else sorted(file.name for file in folder.glob("*") if file.suffix in (".md", ".png", ".json"))
    require(not others, f"--out_dir={folder} holds other files ({', '.join(others[:3])}); choose another folder")
