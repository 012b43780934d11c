"""Records to tables and pictures.

A record is what was measured of one run: {"train_length": T, "lengths": [tokens of context, ...]}, numbers for each of
these lengths ("loss", "exact", ...), and what made them. A run's length.json is one; a results.json has several, as
{"made": ..., "runs": {name: record}}. A run that learned several tasks, or some beside a text, has a record of each
under "tasks". Records of runs with different T share columns, which are multiples of T. Every table goes through
`pivot`.
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


def of_task(record, task):
    """A record, or where a task is named that of the task."""
    return record["tasks"][task] if task else record


def by_multiple(record, key, task="", name=""):
    """{length / T: number} of one of the TABLES, {} where the record has none. The multiples have three digits, or 1.1
    T would differ from one T to another. task: the one of several that is asked for. name: of what the record has
    beside these numbers, in their place."""
    (_, _, (*path, last), readable), record = TABLES[key], of_task(record, task)
    part = functools.reduce(lambda part, name: part.get(name, {}), path, record)
    numbers, lengths = part.get(name or last, {}), part.get("distances", record["lengths"])
    multiples = [float(f"{length / record['train_length']:.3g}") for length in lengths]
    return dict(zip(multiples, map(readable, numbers), strict=True)) if numbers else {}


def kinds(records):
    """[(key, task)] of the TABLES that all of {name: record} have numbers for, those of several tasks last, in the
    order of the first record."""
    first, *others = records.values()
    shared = [task for task in first.get("tasks", {}) if all(task in other.get("tasks", {}) for other in others)]
    keys = [key for key in TABLES if all(by_multiple(record, key) for record in records.values())]
    return [(key, "") for key in keys] + [("exact", task) for task in shared]


def headlines(records):
    """[(key, task)] that {name: record} are about first of all: exact match or else loss, what far context is worth,
    and each of several tasks."""
    found = kinds(records)
    return [kind for kind in found if kind == found[0] or kind[0] in ("gain", "key") or kind[1]]


def titled(key, task):
    """The title of one of the TABLES, with the task that it is of."""
    return f"{TABLES[key][0]}, {task}" if task else TABLES[key][0]


def cells_of(records, key, task=""):
    """{name: record} -> cells of one of the TABLES, with standard errors where the records have them."""
    form, cells = TABLES[key][1], []
    for name, record in records.items():
        errors = by_multiple(record, key, task, "error")
        for at, x in by_multiple(record, key, task).items():
            error = f" ± {form.format(errors[at])}" if errors else ""
            cells.append(((name,), at, form.format(x) + error))
    return cells


def table(records, key, task=""):
    """{name: record} -> lines: one of the TABLES at multiples of T, perhaps of one of several tasks."""
    title, cells = titled(key, task), cells_of(records, key, task)
    if key in ("exact", "loss"):
        counts = sorted({of_task(record, task)["windows"] for record in records.values()})
        title += f", {' or '.join(map(str, counts))} window{'s' * (counts != [1])}"
    if key == "key":
        title += f", of {' or '.join(sorted({marked(record) for record in records.values()}))}"
    if key == "loss":
        title += crossed(records)
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


def tables(records, of=kinds):
    """The TABLES of {name: record}, all there are or the `headlines`, with an empty line between two."""
    return [line for kind in of(records) for line in ("", *table(records, *kind))][1:]


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
    gains, errors = by_multiple(record, "gain"), by_multiple(record, "gain", name="error")
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
    """{name: [record of each seed]} -> lines: mean, every seed, and the paired difference to the first name."""
    form, cells, (first, *_) = TABLES[key][1], [], records
    base = [by_multiple(record, key, task) for record in records[first]]
    for name, of_seeds in records.items():
        numbers = [by_multiple(record, key, task) for record in of_seeds]
        for at in numbers[0]:
            column = [number[at] for number in numbers]
            cells.append(((name, "mean"), at, f"**{form.format(statistics.fmean(column))}**"))
            cells += [
                ((name, f"seed {seed}"), at, form.format(number)) for seed, number in zip(seeds, column, strict=True)
            ]
            if name != first and at in base[0]:
                pairs = [number - other[at] for number, other in zip(column, base, strict=True)]
                cells.append(((name, f"less {first}"), at, with_error(pairs, form)))
    return pivot([titled(key, task), ""], cells)


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
# The names of pictures that are not of the first of the TABLES that a record has.
FILES = {"gain": "gain.png", "key": "key.png", "entropy": "attention.png", "first": "first.png", "far": "far.png"}


def file_of(key, task=""):
    """The name of the picture of one of the TABLES."""
    return f"exact-{task}.png" if task else FILES.get(key, "length.png")


def picture(path, records, key, task="", seeds=()):
    """One of the TABLES of {name: record}, as a PNG. Bands are standard errors or, with seeds, {name: [record of each
    seed]}, from the least to the largest."""
    series = {}
    for name, record in records.items():
        curve = by_multiple(record, key, task)
        series[name] = list(curve), list(curve.values()), *band(record, key, task, seeds[name] if seeds else [])
    label = "distance / training length" if key == "gain" else "context / training length"
    report.lines(path, series, label, LABELS[key], log_x=True, mark_x=1)


def band(record, key, task, of_seeds):
    """[lows, highs] around the record's numbers in one of the TABLES, [] where nothing says how sure they are."""
    numbers, errors = by_multiple(record, key, task), by_multiple(record, key, task, "error")
    around = [by_multiple(one, key, task) for one in of_seeds]
    if errors and not around:
        around = [{at: numbers[at] + side * errors[at] for at in numbers} for side in (-1, 1)]
    return [[end(one[at] for one in around) for at in numbers] for end in (min, max) if around]


def pictures(folder, records, seeds=()):
    """Those of the headlines, and what else {name: record} have numbers for, into the folder."""
    first = headlines(records)
    for key, task in kinds(records):
        if (key, task) in first or key in FILES:
            picture(folder / file_of(key, task), records, key, task, seeds)
    by_position = {}
    for name, record in records.items():
        if "map" in record:
            file = f"passkey-{report.slug(name)}.png" if len(records) > 1 else "passkey.png"
            passkey.picture(folder / file, record["map"])
        if "by_position" in record:
            middles, loss = record["by_position"]["position"], record["by_position"]["loss"]
            by_position[name] = [middle / record["train_length"] for middle in middles], loss
    if by_position:
        labels = "position / training length", "loss (nats per token)"
        report.lines(folder / "position.png", by_position, *labels, mark_x=1)


def is_whole(record):
    """Whether a record that was read from a file is one: every table can be made of it."""
    try:
        return min([record["train_length"], *record["lengths"]]) > 0 and bool(tables({"": record}))
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
