"""How far checkpoints extrapolate, for contexts of L tokens from half to 16 times the training length T.

    python evaluate.py out/rope out/alibi --out_dir=out/reach
    python evaluate.py hf:FOLDER --posenc=rope --posenc='rope(scaling="yarn", factor=2)' --lengths='[4096, 8192, 16384]'

**The same targets**: the last T/4 tokens of windows inside one long validation document each, with the L tokens that
end there as input. Every length is asked the same question and only the context grows: a loss that falls uses the
longer context, one that is flat ignores it, one that rises is broken by it.

**The usual perplexity**, over stretches of validation text: in windows that do not overlap, where the first tokens have
little context, so that longer windows look better for that alone (the early-token curse; Press et al. 2021, appendix
B); and in windows that slide by L/2, where all but the first tokens have at least that much.

**By position**, in windows of up to 8 T; and **attention**: how far it spreads, and how much the first token gets.
"""

import core.start  # noqa: F401  # isort: skip

import dataclasses
import functools
import itertools
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import data
from core import measure as probes
from core import place as places
from core import report, runs
from core.cache import PIECE, WHOLE, Cache, pieces
from core.errors import UserError, require, run
from core.flags import Dtype, flags, make
from data import tasks, vocabulary
from lab import spread as inside

MULTIPLES = (0.5, 1, 1.1, 1.25, 1.5, 2, 4, 8, 16)  # of the training length
HOLDS = 1.05  # a length holds while its perplexity is at most so many times that at T


@torch.inference_mode()
def validation_loss(model, windows, token_bytes, device, rows):
    """Mean loss of `windows`, inputs and targets (N, T), `rows` at a time -> (nats per token, bits per byte).

    token_bytes (V,) are the bytes that each token stands for. The processes of a run share the windows among them.
    """
    inputs, targets = (half[device.rank :: device.world] for half in windows)
    nats = 0.0
    for x, y in zip(batches(inputs, rows), batches(targets, rows), strict=True):
        with device.autocast():
            nats += model(x.to(device.device), y.to(device.device)).cpu().double().sum().item()
    targets = targets[targets >= 0]
    nats, tokens, size = device.sum(nats, targets.size, float(token_bytes[targets].sum()))
    return nats / tokens, nats / size / math.log(2)


def batches(array, rows):
    return torch.from_numpy(array).split(rows) if len(array) else []


def long_windows(dataset, length, step, count):
    """(<= count, length + 1) ids from the validation set, whose last `step` tokens differ: windows inside one document
    each, from as many documents as there are. Where so many do not fit into documents, windows span them."""
    borders = dataset.documents("val")
    if (np.diff(borders) - length).clip(0).sum() < count * step:
        borders = borders[[0, -1]]
    ends = [
        (turn, end)  # first one window of every document, then a second of each, ...
        for begin, stop in itertools.pairwise(borders)
        for turn, end in enumerate(range(begin + length + 1, stop + 1, step))
    ]
    chosen = [end for _, end in sorted(ends)]
    if len(borders) == 2:  # one document: from all over it
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(int)]
    return np.stack([dataset.val[end - length - 1 : end] for end in chosen[:count]]).astype(np.int64)


@torch.inference_mode()
def token_losses(model, ids, scored, device, **reading):
    """ids (B, L + 1) -> (B, scored) nats of the last tokens, each seen with all before it. They enter a cache in
    chunks, so that attention and logits of long contexts fit in memory. reading: the cache's window, sinks, log_n."""
    ids, cache, losses = ids.to(device.device), Cache(total=ids.shape[1] - 1, **reading), []
    context, inputs, targets = ids[:, : -scored - 1], ids[:, -scored - 1 : -1], ids[:, -scored:]
    with device.autocast():
        for part in pieces(context, cache):
            model(part, past=cache, last=1)
        for x, y in zip(inputs.split(PIECE, dim=1), targets.split(PIECE, dim=1), strict=True):
            losses.append(model(x, y, past=cache))
    return torch.cat(losses, dim=1).cpu()


def windowed_losses(model, ids, length, stride, device, **reading):
    """ids (B, N + 1) -> (B, N) nats of every token after the first, in windows of `length` tokens that move by `stride`
    and begin at position 0: from the second window on, a token has `length` - `stride` tokens before it or more."""
    losses, done, total = [], 0, ids.shape[1] - 1
    while done < total:
        begin, end = max(0, done - length + stride), min(total, done + (stride if done else length))
        losses.append(token_losses(model, ids[:, begin : end + 1], end - done, device, **reading))
        done = end
    return torch.cat(losses, dim=1)


def at_once(model, length):
    """Windows of so many tokens that are computed together: what their activations and logits leave room for."""
    return max(1, min(WHOLE, (1 << 28) // model.config.vocab_size) // length)


def scored_at(T, multiples=MULTIPLES):
    """Targets of a window: the last T/4 tokens, and at most half of the shortest context."""
    return max(1, min(T // 4, round(T * min(multiples)) // 2))


def reach(model, T, available, multiples=MULTIPLES):
    """Tokens of context to measure, as far as there is text, and those of them that the encoding has positions for.
    UserError where there are none."""
    wanted = [max(1, round(T * m)) for m in multiples]
    lengths = [length for length in wanted if length < available]
    if min(wanted) > min(available - 1, model.max_length):
        least = f"{min(wanted)} tokens of context, the least for a T of {T}"
        raise UserError(f"{least}, exceed the text ({available}) or the positions ({model.max_length}); lower T")
    return lengths, [length for length in lengths if length <= model.max_length]


def length_loss(model, dataset, device, count, multiples=MULTIPLES, T=0, **reading):
    """Loss of the same targets against context -> {"train_length", "lengths", "loss", ...}, as length.json holds it.

    `count` windows are scored at each length that the encoding has positions for. T of lengths and targets is the
    model's own unless given. The processes of a run share the windows among them.
    """
    T = T or model.config.train_length
    scored = scored_at(T, multiples)
    lengths, reached = reach(model, T, len(dataset.val), multiples)
    windows = long_windows(dataset, lengths[-1], scored, count)
    mine, losses = windows[device.rank :: device.world], []
    with report.progress(len(mine) * sum(reached), "loss against context", device) as bar:
        for length in reached:
            nats = 0.0
            for rows in batches(mine, at_once(model, length)):
                nats += token_losses(model, rows[:, -length - 1 :], scored, device, **reading).double().sum().item()
                bar.update(length * len(rows))
            (total,) = device.sum(nats)
            losses.append(total / (len(windows) * scored))
    return {
        "train_length": T,
        "lengths": reached,
        "loss": losses,
        "windows": len(windows),
        "targets": len(windows) * scored,
        "max_length": None if model.max_length == math.inf else model.max_length,
    }


def usual_losses(model, dataset, token_bytes, device, count, multiples=MULTIPLES, T=0, **reading):
    """Nats per token over `count` stretches of validation text, each as long as the longest context ->

    {"non_overlapping", "sliding", "bits_per_byte" of the former}: a number for each length. token_bytes (V,) are the
    bytes that each token stands for.
    """
    T = T or model.config.train_length
    lengths, reached = reach(model, T, len(dataset.val), multiples)
    ids = stretches(dataset, lengths[-1], count)
    bytes_per_token = float(token_bytes[ids[:, 1:]].mean())

    def loss(length, stride):
        rows = batches(ids, at_once(model, length))
        found = torch.cat([windowed_losses(model, part, length, stride, device, **reading) for part in rows])
        bar.update(length // stride * found.numel())
        return found.double().mean().item()

    with report.progress(3 * len(reached) * ids[:, 1:].size, "perplexity", device) as bar:
        apart, sliding = ([loss(length, max(1, length // part)) for length in reached] for part in (1, 2))
    bits = [nats / bytes_per_token / math.log(2) for nats in apart]
    return {"non_overlapping": apart, "sliding": sliding, "bits_per_byte": bits}


def position_loss(model, dataset, device, count, T=0, **reading):
    """Nats per token by position, over `count` windows of 8 T tokens or as many as there are positions -> {"position":
    the middle of every T/4 of them, "loss"}."""
    T = T or model.config.train_length
    ids = stretches(dataset, int(min(8 * T, model.max_length, len(dataset.val) - 1)), count)
    losses = []
    with report.progress(ids[:, 1:].size, "loss by position", device) as bar:
        for rows in batches(ids, at_once(model, ids.shape[1])):
            losses.append(token_losses(model, rows, ids.shape[1] - 1, device, **reading).double())
            bar.update(losses[-1].numel())
    width = max(1, T // 4)
    bins = torch.cat(losses).mean(0).split(width)
    middles = [width * index + len(one) / 2 for index, one in enumerate(bins)]
    return {"position": middles, "loss": [one.mean().item() for one in bins]}


def stretches(dataset, length, count):
    """(<= count, length + 1) ids of the validation set, evenly spread."""
    inputs, targets = data.even_windows(dataset.val, length, count)
    return np.concatenate((inputs, targets[:, -1:]), axis=1)


def summary(model, dataset, device, count):
    """What a run closes with: loss against context up to 8 T; for a task exact match, by depth too for a pass key."""
    if not dataset.masks:
        return length_loss(model, dataset, device, count, MULTIPLES[:-1])
    result = probes.exact_match(model, dataset, device, count)
    if dataset.name == "passkey":
        result["map"] = probes.passkey_map(model, dataset, device, max(1, count // 4))
    return result


def measure(model, dataset, encoding, device, count, T=0, lengths=(), **reading):
    """All of it, with count windows of targets -> a result: see length_loss, usual_losses and inside.attention; or the
    loss of the same targets at these lengths alone; or, for a task, `summary`."""
    T = T or model.config.train_length
    if dataset.masks:
        if model.config.train_length != T or lengths or any(reading.values()):
            what = "--train_length, --lengths, --window and --log_n"
            raise UserError(f"tasks are read as they were trained: leave out {what}")
        return summary(model, dataset, device, count)
    if lengths:
        if lengths[-1] >= len(dataset.val):
            raise UserError(f"--lengths: {lengths[-1]} tokens exceed the text, which has {len(dataset.val)}")
        if lengths[0] > model.max_length:
            raise UserError(f"--lengths: {model.too_long(lengths[0])}")
        return length_loss(model, dataset, device, count, [length / T for length in lengths], T, **reading)
    result = length_loss(model, dataset, device, count, T=T, **reading)
    few = max(1, count // 8)  # each of them has 64 times as many tokens as a window has targets
    result |= usual_losses(model, dataset, vocabulary.byte_lengths(encoding), device, few, T=T, **reading)
    result["by_position"] = position_loss(model, dataset, device, count, T, **reading)
    if not any(reading.values()):  # under a window attention is another
        lengths, reached = reach(model, T, len(dataset.val))
        windows = long_windows(dataset, lengths[-1], scored_at(T), few)
        result["attention"] = inside.attention(model, windows, device, reached, T=T)
    return result


def holds_to(result):
    """The largest length, in T, up to which perplexity is at most HOLDS times that at T wherever it was measured."""
    T, held = result["train_length"], None
    loss = dict(zip(result["lengths"], result["loss"], strict=True))
    for length in (length for length in loss if length >= T and T in loss):
        if loss[length] > loss[T] + math.log(HOLDS):
            break
        held = length / T
    return held


# key: (what stands above its table, the numbers for every length from a result, how they are written)
TABLES = {
    "exact": ("exact match", lambda r: r["exact"], "{:.1%}"),
    "loss": ("nats per token", lambda r: r["loss"], "{:.3f}"),
    "non_overlapping": ("perplexity, windows apart", lambda r: map(math.exp, r["non_overlapping"]), "{:.2f}"),
    "sliding": ("perplexity, windows sliding by L/2", lambda r: map(math.exp, r["sliding"]), "{:.2f}"),
    "bits_per_byte": ("bits per byte, windows apart", lambda r: r["bits_per_byte"], "{:.3f}"),
    "entropy": ("entropy of attention, nats", lambda r: r["attention"]["entropy"], "{:.2f}"),
    "first": ("attention on the first token", lambda r: r["attention"]["first"], "{:.1%}"),
}


def has(result, key):
    return key in (result if key not in ("entropy", "first") else result.get("attention", ()))


def by_multiple(result, key):
    """{length / T: number} of one of the TABLES. To three digits, or 1.1 T would differ from one T to another."""
    T, numbers = result["train_length"], TABLES[key][1](result)
    return {float(f"{length / T:.3g}"): x for length, x in zip(result["lengths"], numbers, strict=True)}


def at_multiples(heads, rows, extra=()):
    """{first cells: {multiple of T: text}} -> lines of a Markdown table. extra: (head, {first cells: text}), a column
    more. heads: above the first cells."""
    multiples = sorted({multiple for cells in rows.values() for multiple in cells})
    more_head, more = extra or (None, None)
    return report.markdown(
        [*heads, *(f"{multiple:.3g} T" for multiple in multiples), *([more_head] if more else [])],
        [
            [*first, *(cells.get(multiple, "no position") for multiple in multiples), *([more[first]] if more else [])]
            for first, cells in rows.items()
        ],
    )


def headline(results):
    """The key of the TABLES that results are about first of all."""
    return "exact" if all(has(result, "exact") for result in results.values()) else "loss"


def table(results, key=None):
    """{name: result} -> lines of a Markdown table: one of the TABLES at multiples of T, by default the headline."""
    key = key or headline(results)
    title, _, form = TABLES[key]
    rows = {(name,): {m: form.format(x) for m, x in by_multiple(r, key).items()} for name, r in results.items()}
    if key not in ("exact", "loss"):
        return at_multiples([title], rows)
    windows = " or ".join(str(count) for count in sorted({result["windows"] for result in results.values()}))
    held = {(name,): f"{at:.3g} T" if (at := holds_to(result)) else "" for name, result in results.items()}
    return at_multiples([f"{title}, {windows} windows"], rows, ("holds to", held) if key == "loss" else ())


def tables(results):
    """Every one of the TABLES that all results have numbers for, with an empty line between two."""
    found = [table(results, key) for key in TABLES if all(has(result, key) for result in results.values())]
    return [line for one in found for line in ("", *one)][1:]


def curve(result, key):
    """([multiple of T, ...], [number, ...]) of one of the TABLES."""
    return tuple(map(list, zip(*by_multiple(result, key).items(), strict=True)))


def picture(path, results, seeds=()):
    """Loss, or exact match, against the length of the context. seeds: {name: [result of each]}, drawn as bands."""
    key = headline(results)
    label = {"exact": "exact match", "loss": "loss (nats per token)"}[key]
    series = {name: curve(result, key) for name, result in results.items()}
    for name in seeds:
        columns = list(zip(*(curve(result, key)[1] for result in seeds[name]), strict=True))
        series[name] = *series[name], list(map(min, columns)), list(map(max, columns))
    report.lines(path, series, "context / training length", label, log_x=True, mark_x=1)


def pictures(folder, results, seeds=()):
    """length.png, and what else the results have numbers for, into the folder."""
    picture(folder / "length.png", results, seeds)
    places, spread = {}, {}
    for name, result in results.items():
        if "map" in result:
            file = f"passkey-{report.slug(name)}.png" if len(results) > 1 else "passkey.png"
            probes.picture_map(folder / file, result["map"])
        if "by_position" in result:
            loss = result["by_position"]["loss"]
            places[name] = [p / result["train_length"] for p in result["by_position"]["position"]], loss
        if has(result, "entropy"):
            spread[name] = curve(result, "entropy")
    if places:
        report.lines(folder / "position.png", places, "position / training length", "loss (nats per token)", mark_x=1)
    if spread:
        label = "entropy of attention (nats)"
        report.lines(folder / "attention.png", spread, "context / training length", label, log_x=True, mark_x=1)


@dataclass
class Options:
    usage: ClassVar[str] = "python evaluate.py RUN [RUN ...] [--key=value ...]"
    repeats: ClassVar[tuple] = ("posenc",)

    targets: int = 128  # windows scored at every length
    lengths: int | list = field(default_factory=list)  # tokens of context: the same targets there, and nothing else
    posenc: str | list = ""  # arguments for the runs' encoding, or another, at test time; several to compare them
    window: int = 0  # attend to the last WINDOW tokens alone; 0 means to all
    sinks: int = 0  # with a window, keep the first SINKS tokens in sight too
    log_n: bool = False  # multiply queries by ln n / ln T where they see n > T tokens
    data: str = ""  # another data set than the run's: its name, or a file or folder of text
    train_length: int = 0  # T of the lengths and targets; by default each run's own
    frequencies: bool = False  # look at the pairs of rope's rotations instead: norms, shares of the logits, silencing
    out_dir: str = ""  # write length.json, results.md and the pictures into this folder
    table: str = ""  # also write the first table to this Markdown file, with what made it
    picture: str = ""  # also draw the curves into this PNG
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of products; auto is the run's
    data_dir: str = ""  # where the token files are; by default where the run had them

    def __post_init__(self):
        require(self.targets >= 1, f"--targets must be at least 1, not {self.targets}")
        for key in ("window", "sinks", "train_length"):
            require(getattr(self, key) >= 0, f"--{key} must not be negative")
        require(self.window or not self.sinks, "--sinks needs a --window")
        self.lengths = [self.lengths] if isinstance(self.lengths, int) else self.lengths
        ascending = all(type(x) is int and x > 1 for x in self.lengths) and self.lengths == sorted(set(self.lengths))
        form = "must be whole numbers above 1 that rise, as in --lengths='[1024, 2048, 4096]'"
        require(ascending, f"--lengths={self.lengths} {form}")
        require(not (self.lengths and self.frequencies), "--frequencies and --lengths exclude each other")
        require(not self.picture or self.picture.endswith(".png"), f"--picture={self.picture} must end in .png")
        for key, path in (("table", self.table), ("picture", self.picture)):
            require(Path(path).parent.is_dir(), f"--{key}={path}: there is no folder {Path(path).parent}")
            require(not path or not Path(path).is_dir(), f"--{key}={path} is a folder; name a file in it")
        page, mark = Path(self.table), f"<!-- {'frequencies' if self.frequencies else 'evaluate'} -->"
        mine = not self.table or not page.exists() or mark in page.read_text(errors="replace")
        require(mine, f"--table={page} has no line {mark}, so the table would replace all of it")
        out = Path(self.out_dir)
        held = any((out / name).exists() for name in (runs.CKPT, "config.json"))
        require(not held, f"--out_dir={out} holds a run or a model; name another folder, {out}/reach say")
        require(out.is_dir() or not out.exists(), f"--out_dir={out} is a file; name a folder")


def open_dataset(opened, options):
    """The run's data set, or the one that --data names. UserError where the run's own has changed."""
    config = opened.config
    config.data_dir = options.data_dir or config.data_dir
    if options.lengths:  # no longer window has to fit into the text
        known = dict(original_length=config.original_length or config.train_length, length_schedule={}, segments=1)
        config = dataclasses.replace(config, train_length=options.lengths[0], **known)
    if not options.data:
        dataset = data.open_dataset(config, opened.tokenizer)
        if opened.data_checksum and dataset.meta["data_checksum"] != opened.data_checksum:
            where = dataset.folder
            raise UserError(f"the corpus of {opened.path} is not the one here ({where}); name another --data_dir")
        return dataset
    known = options.data in data.SOURCES and options.data != "text"
    if not known and not Path(options.data).expanduser().exists():
        names = ", ".join(name for name in data.SOURCES if name != "text")
        raise UserError(f"--data={options.data} is neither a file or folder nor one of {names}")
    other = dict(dataset=options.data, text="") if known else dict(dataset="text", text=options.data)
    other |= dict(packages=False, shards=1)
    return data.open_dataset(dataclasses.replace(config, **other), opened.tokenizer)


def measured(opened_runs, datasets, device, options):
    """Measure the runs -> ({name: result}, lines of all tables)."""
    results = {}
    for name, opened in opened_runs.items():
        checksum = opened.data_checksum or datasets[name].meta["data_checksum"]
        known = {"step": opened.step, "posenc": opened.config.posenc, "data_checksum": checksum}
        results[name] = known | measure(
            opened.model, datasets[name], opened.tokenizer, device, options.targets, options.train_length,
            options.lengths, window=options.window or None, sinks=options.sinks, log_n=options.log_n,
        )  # fmt: skip
    return results, tables(results)


def rotations(opened_runs, datasets, device, options):
    """The same for --frequencies, whose pictures go straight to their folder."""
    looked_at = {}
    for name, opened in opened_runs.items():
        T, dataset = opened.config.train_length, datasets[name]
        loss = functools.partial(length_loss, opened.model, dataset, device, options.targets, (1, 2, 4))
        looked_at[name] = opened.model, long_windows(dataset, T, scored_at(T), options.targets), loss
    lines, results = inside.report_frequencies(looked_at, device, options.out_dir)
    return results, lines


def main(argv):
    paths, given = flags(argv, Options)
    options = make(Options, given)
    if not paths:
        raise UserError(f"which runs? usage: {Options.usage}")
    if options.frequencies and not options.out_dir:
        raise UserError("--frequencies draws pictures: name a folder for them, --out_dir=out/frequencies say")
    # All of them first: a mistake comes before the work.
    opened_runs = {}
    for name, path in zip(runs.names(paths), paths, strict=True):
        ways = [f"{name}: {way}" if paths[1:] else str(way) for way in options.posenc] or [name]
        opened_runs |= zip(ways, runs.open_runs(path, options.posenc or [""]), strict=True)
    if len({vocabulary.fingerprint(opened.tokenizer) for opened in opened_runs.values()}) > 1:
        raise UserError("these runs have different tokenizers: a loss per token does not compare them")
    if options.frequencies:
        for key in ("train_length", "window", "log_n"):
            if getattr(options, key):
                raise UserError(f"--frequencies looks at runs as they were trained: leave out --{key}")
        if not options.data and any(opened.config.dataset in tasks.TASKS for opened in opened_runs.values()):
            raise UserError("--frequencies reads text, and some of these runs learned a task: name one with --data")
    if len({opened.config.dataset in tasks.TASKS for opened in opened_runs.values()}) > 1:
        raise UserError("some of these runs learned a task and some a text: exact match and loss do not compare them")
    datasets = {name: open_dataset(opened, options) for name, opened in opened_runs.items()}
    dtype = next(iter(opened_runs.values())).config.dtype if options.dtype == "auto" else options.dtype
    device = places.choose(options.device, dtype)
    for opened in opened_runs.values():
        device.prepare(opened.model)
    what = "frequencies" if options.frequencies else "length"
    results, lines = (rotations if options.frequencies else measured)(opened_runs, datasets, device, options)
    print("\n".join(lines))

    command = shlex.join(["python", "evaluate.py", *argv])
    seed = ", ".join(map(str, sorted({opened.config.seed for opened in opened_runs.values()})))
    if options.out_dir:
        out = Path(options.out_dir)
        out.mkdir(parents=True, exist_ok=True)
        made = {"command": command, "seed": seed} | report.provenance(device)
        runs.write_json(out / f"{what}.json", {"made": made, "runs": results})
        report.write_table(out / "results.md", "evaluate", lines, command, device, seed=seed)
        if not options.frequencies:
            pictures(out, results)
    if options.table:
        name, some = ("frequencies", lines) if options.frequencies else ("evaluate", table(results))
        report.write_table(options.table, name, some, command, device, seed=seed)
    if options.picture and not options.frequencies:
        picture(options.picture, results)


if __name__ == "__main__":
    run(main)
