"""Data sets as token files, and the batch as a pure function of (seed, step).

A data set is a module with `signature(config)`, a value that changes when its text may have changed, and
`documents(config)`, which yields (split, text). It is tokenised once into a folder of its own,

    data/tokens/<dataset>-<tokenizer>-<key>/train.bin  val.bin  meta.json

of little-endian uint16 or uint32 ids, memory-mapped. Every document ends with the end-of-text token.

The synthetic tasks of data/tasks.py have the same methods and no files.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from core import files
from core.errors import UserError
from data import fineweb, ptb, python, shakespeare, tasks, text, vocabulary, wikitext2

SOURCES = {
    "python": python,
    "shakespeare": shakespeare,
    "wikitext2": wikitext2,
    "ptb": ptb,
    "fineweb": fineweb,
    "text": text,
}
SPLITS = ("train", "val")
FORMAT = 1  # of the token folders; raise it when they change


@dataclass
class Dataset:
    train: np.ndarray  # (tokens,) memory-mapped ids
    val: np.ndarray
    meta: dict  # what meta.json says of them: see `prepare` and `write_tokens`
    folder: Path
    masks: ClassVar[bool] = False  # every token is a target

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


def open_dataset(config, tokenizer):
    """The token files of config.dataset under a tokenizer, prepared if they are missing -> Dataset; or a Task.

    UserError for text that cannot be had or read, for token files that are damaged or not this tokenizer's, and for a
    text shorter than one window.
    """
    if config.dataset in tasks.TASKS:
        return tasks.Task(config, tokenizer)
    source, fingerprint = SOURCES[config.dataset], vocabulary.fingerprint(tokenizer)
    # Published models that share a vocabulary differ in the tokens that stand around a document.
    around = [(tokenizer.begin, tokenizer.eot_token)] if hasattr(tokenizer, "begin") else []
    key = hashlib.sha256(repr((FORMAT, source.signature(config), fingerprint, *around)).encode()).hexdigest()[:8]
    folder = Path(config.data_dir) / "tokens" / f"{config.dataset}-{Path(config.tokenizer).stem}-{key}"
    if not folder.exists():
        prepare(source, config, tokenizer, fingerprint, folder)
    dataset = check(folder, tokenizer, fingerprint)
    longest = max(length for _, length in config.phases)
    for split in SPLITS:
        size, name = len(getattr(dataset, split)), config.text or config.dataset
        if size <= longest:
            raise UserError(
                f"{name} is too short: its {split} part has {size} tokens, one window of train_length={longest} needs "
                f"{longest + 1}; give more text or a smaller train_length"
            )
    return dataset


def prepare(source, config, tokenizer, fingerprint, folder):
    """Tokenise the documents of `source` into `folder`, which appears only when it is whole."""
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    part = folder.with_name(f"{folder.name}.{platform.node()}-{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        meta = {
            "dataset": config.dataset,
            "tokenizer": config.tokenizer,
            "tokenizer_fingerprint": fingerprint,
            "vocab_size": tokenizer.n_vocab,
            "dtype": dtype.str,
        }
        documents = tqdm(source.documents(config), f"tokenising {config.dataset}", unit="", disable=None)
        meta |= write_tokens(documents, tokenizer, dtype, part)
        with files.atomic(part / "meta.json") as file:
            json.dump(meta, file)
        try:
            os.rename(part, folder)
        except OSError:  # Another process may have been faster.
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tokens(documents, tokenizer, dtype, folder):
    """(split, text) of all documents -> train.bin and val.bin in `folder`. Returns what meta.json says of them: tokens
    of each split, where each document begins, and a checksum."""
    begin, end = vocabulary.begin(tokenizer), [tokenizer.eot_token]
    starts, tokens = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    digest = {split: hashlib.sha256() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        outputs = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        for split, document in documents:
            if not document:
                continue
            ids = np.array([*begin, *tokenizer.encode_ordinary(document), *end], dtype)
            starts[split].append(tokens[split])
            tokens[split] += len(ids)
            digest[split].update(ids.tobytes())
            outputs[split].write(ids.tobytes())
    checksum = hashlib.sha256("".join(digest[split].hexdigest() for split in SPLITS).encode()).hexdigest()
    return {"tokens": tokens, "data_checksum": checksum, "documents": starts}


def check(folder, tokenizer, fingerprint):
    """The Dataset of the token files in `folder`. UserError for whatever does not fit together, with what to do."""
    again = f"remove the folder {folder} and it is made again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, counts, checksum = np.dtype(meta["dtype"]), meta["tokens"], meta["data_checksum"]
        written_by, size = meta["tokenizer_fingerprint"], {}
        for split in SPLITS:
            size[split] = (folder / f"{split}.bin").stat().st_size
            borders = np.array([*meta["documents"][split], counts[split]])
            if not isinstance(checksum, str) or borders[0] != 0 or (np.diff(borders) <= 0).any():
                raise ValueError("meta.json contradicts itself")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}); {again}") from None
    if written_by != fingerprint:
        raise UserError(f"{folder} holds the tokens of another tokenizer; {again}")
    ids_of = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        if dtype.str not in ("<u2", "<u4") or size[split] != counts[split] * dtype.itemsize:
            raise UserError(
                f"{file} has {size[split]} bytes instead of {counts[split]} tokens of {dtype.itemsize}: cut short, or "
                f"of another dtype; {again}"
            )
        ids = np.memmap(file, dtype, "r") if counts[split] else np.empty(0, dtype)
        sample = ids[:: max(1, len(ids) >> 26)]  # all of it up to 67 million tokens
        if len(sample) and sample.max() >= tokenizer.n_vocab:
            raise UserError(f"{file} has ids beyond the vocabulary of {tokenizer.n_vocab} tokens; {again}")
        ids_of[split] = ids
    return Dataset(**ids_of, meta=meta, folder=folder)


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
