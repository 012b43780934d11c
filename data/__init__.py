"""Data sets as token files, and the batch as a pure function of (seed, step).

A data set is a module with `signature(config)`, a value that changes when its text may have changed, and
`documents(config)`, which yields (split, text). It is tokenised once into a folder of its own,

    data/tokens/<dataset>-<tokenizer>-<key>/train.bin  val.bin  meta.json

as data/folders.py says. A text is a str, or several in a row: long ones are never in memory as a whole.

The synthetic tasks of data/tasks.py have the same methods and no files. A `Mix` takes its rows from several tasks, and
perhaps a text.
"""

import copy
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from core.errors import UserError
from data import fineweb, folders, ptb, python, shakespeare, tasks, text, vocabulary, wikitext2

SOURCES = {
    "python": python,
    "shakespeare": shakespeare,
    "wikitext2": wikitext2,
    "ptb": ptb,
    "fineweb": fineweb,
    "text": text,
}
# Of the token folders; a new one is added when they change. Version 1 held out every tenth of many files, whatever its
# size, and let copies of a document stand on both sides.
VERSIONS = (1, 2)


def reads_text(config):
    """Whether a run with these settings reads a text, perhaps beside tasks."""
    return any(name in SOURCES for name in config.datasets)


@dataclass
class Dataset:
    train: np.ndarray  # (tokens,) memory-mapped ids
    val: np.ndarray
    meta: dict  # what meta.json says of them: see data/folders.py
    folder: Path
    masks: ClassVar[bool] = False  # every token is a target
    tasks: ClassVar[dict] = {}  # no task is learned beside it

    @property
    def text(self):
        """The data set whose text a run reads: this one."""
        return self

    @property
    def size(self):
        """Training tokens, in words."""
        return f"{len(self.train):,}"

    def batch(self, length, count, key, step, part=slice(None)):
        """Inputs and targets (rows, length) of one training step: see `batch`."""
        return batch(self.train, length, count, key, step, part)

    def validation(self, length, count):
        """Inputs and targets (<= count, length) of the validation set: see `even_windows`."""
        return even_windows(self.val, length, count)

    def documents(self, split):
        """(documents + 1,) int64: where each document of the split begins, and where the last one ends."""
        return np.array([*self.meta["documents"][split], self.meta["tokens"][split]])


class Mix:
    """Tasks in one run, perhaps with a text, with the methods of Dataset: rows come from each in turn.

    config.dataset is a list; one that stands twice in it has twice as many rows. UserError where there are two texts.
    """

    masks = True

    def __init__(self, config, tokenizer):
        names, texts = config.datasets, [name for name in dict.fromkeys(config.datasets) if name in SOURCES]
        if len(texts) > 1:
            raise UserError(f"dataset={names}: a mixture has one text at most, {texts[0]} say, and tasks besides")
        self.parts = {
            name: open_dataset(only(config, name), tokenizer) for name in sorted(dict.fromkeys(names), key=texts.count)
        }
        # (data set, its rows in a round, the place among them) of each row of a round
        self.turns = [(self.parts[name], names.count(name), names[:i].count(name)) for i, name in enumerate(names)]
        self.tasks = {name: part for name, part in self.parts.items() if name in tasks.TASKS}
        *_, last = self.parts.values()  # the text, if there is one
        self.text, self.folder, self.size = last.text, last.folder, last.size
        known = repr([(name, self.parts[name].meta["data_checksum"]) for name in config.datasets])
        self.meta = last.meta | {"data_checksum": hashlib.sha256(known.encode()).hexdigest()}

    def batch(self, length, count, key, step, part=slice(None)):
        """Inputs and targets (rows, length): a pure function of its arguments, as `batch` is. Whose row it is goes
        round and round over all rows of a run, and each data set gives its own in their order."""
        rows = []
        for index in range(step * count, (step + 1) * count)[part]:
            done, turn = divmod(index, len(self.turns))
            one, share, place = self.turns[turn]
            rows.append(one.batch(length, 1, key, done * share + place))
        return tuple(np.concatenate(half) for half in zip(*rows, strict=True))

    def validation(self, length, count):
        """Inputs and targets (about count, length): of each as much of its validation set as it has of the rows."""
        rounds = max(1, count // len(self.turns))
        sets = [one.validation(length, rounds * share) for one, share, place in self.turns if place == 0]
        return tuple(np.concatenate(half) for half in zip(*sets, strict=True))


def only(config, name):
    """The settings with one of their data sets alone."""
    config = copy.copy(config)
    config.dataset = name
    return config


def open_dataset(config, tokenizer):
    """The token files of config.dataset under a tokenizer, prepared if they are missing -> Dataset; or a Task or Mix.

    UserError for text that cannot be had or read, for token files that are damaged or not this tokenizer's, and for a
    text shorter than one window.
    """
    if isinstance(config.dataset, list):
        return Mix(config, tokenizer)
    if config.dataset in tasks.TASKS:
        return tasks.Task(config, tokenizer)
    source, fingerprint = SOURCES[config.dataset], vocabulary.fingerprint(tokenizer)
    # Published models that share a vocabulary differ in the tokens that stand around a document.
    around = [(tokenizer.begin, tokenizer.eot_token)] if hasattr(tokenizer, "begin") else []
    signature, name = source.signature(config), f"{config.dataset}-{Path(config.tokenizer).stem}"
    for version in VERSIONS:  # A folder of an earlier version stays the one of the runs that began with it.
        key = hashlib.sha256(repr((version, signature, fingerprint, *around)).encode()).hexdigest()[:8]
        folder = Path(config.data_dir) / "tokens" / f"{name}-{key}"
        if existed := folder.exists():
            break
    else:
        known = {"dataset": config.dataset, "tokenizer": config.tokenizer, "tokenizer_fingerprint": fingerprint}
        folders.prepare(folder, unchanged(source, config, signature), tokenizer, known)
    ids, meta = folders.check(folder, tokenizer, fingerprint, whole=not existed)  # what was just written is read back
    longest = max(length for _, length in config.phases)
    for split, tokens in ids.items():
        if len(tokens) <= longest:
            raise UserError(
                f"{config.text or config.dataset} is too short: its {split} part has {len(tokens)} tokens, one window "
                f"of train_length={longest} needs {longest + 1}; give more text or a smaller train_length"
            )
    return Dataset(**ids, meta=meta, folder=folder)


def unchanged(source, config, signature):
    """The documents of a source, whose signature must be the same at their end. UserError where it is not."""
    yield from source.documents(config)
    if source.signature(config) != signature:
        raise UserError(f"{config.text or config.dataset} changed while it was read; start again")


def batch(tokens, length, count, key, step, part=slice(None)):
    """Inputs and targets (rows, length), int64, of the `part` of the `count` windows that make up step `step`.

    A pure function of its arguments: windows are drawn without replacement, epoch by epoch, in an order that `key`
    (integers: the seed, and the phase of a length schedule) and the epoch decide. Each epoch lays its windows at
    another offset. Nothing about the data needs saving, and any number of processes sees what one would.
    """
    per_epoch = max(1, (len(tokens) - length) // length)
    rows = []
    for index in range(step * count, (step + 1) * count)[part]:
        order, offset = epoch_order(len(tokens), length, per_epoch, key, index // per_epoch)
        start = offset + length * order[index % per_epoch]
        rows.append(tokens[start : start + length + 1])
    rows = np.stack(rows).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


@functools.lru_cache(maxsize=4)
def epoch_order(total, length, per_epoch, key, epoch):
    """The order of an epoch's windows (per_epoch,), and the offset at which the first of them begins."""
    generator = np.random.default_rng([*key, epoch])
    return generator.permutation(per_epoch), generator.integers(min(length, total - per_epoch * length))


def even_windows(tokens, length, count):
    """Inputs and targets (<= count, length) from evenly spread places without overlap: a fixed set to evaluate on."""
    starts = np.linspace(0, len(tokens) - length - 1, min(count, (len(tokens) - 1) // length)).astype(np.int64)
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]
