"""Token folders: written whole, then read only as they were written.

    train.bin  val.bin      little-endian uint16 or uint32 ids, every document ended by the end-of-text token
    meta.json               what they hold: tokens and documents of each split, the tokenizer, checksums

`data_checksum` is the SHA-256 of the two files' SHA-256; `seal` is that of all else in meta.json. Folders made before
there was a seal have none, and what theirs says is compared with the tokens.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core import files
from core.errors import UserError, require
from data import vocabulary

SPLITS = ("train", "val")
META = "meta.json"
KEYS = {  # of META
    "dataset", "tokenizer", "tokenizer_fingerprint", "vocab_size", "dtype", "tokens", "data_checksum", "documents",
}  # fmt: skip
LOCK = ".lock"  # beside the folders: one process at a time prepares one
WHOLE = 1 << 28  # bytes of tokens up to which they are all read at every start, which takes .1 to .6 seconds


def prepare(folder, documents, tokenizer, known):
    """Tokenise (split, text) of all documents into `folder`, which appears only when it is whole and on the disk.

    One process at a time does so; a second one waits and finds the folder. `known`: what else META says of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / LOCK
    lock = files.lock(path)
    if lock is None:
        tqdm.write(f"{folder.parent}: another process prepares tokens there; waiting for it", file=sys.stderr)
        lock = files.lock(path, wait=True)
    try:
        if folder.exists():
            return
        for litter in folder.parent.glob("*.part") if lock.is_locked else ():  # of processes that were killed
            shutil.rmtree(litter, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.{platform.node()}-{os.getpid()}.part")
        try:
            part.mkdir()
            meta = known | write(part, documents, tokenizer)
            with files.atomic(part / META) as file:
                file.write(json.dumps(meta | {"seal": seal(meta)}))
            files.flush_names(part)
            os.rename(part, folder)
            files.flush_names(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        lock.release()
    tokens = [f"{meta['tokens'][split]:,}" for split in SPLITS]
    tqdm.write(f"{folder}: {tokens[0]} tokens for training, {tokens[1]} for validation", file=sys.stderr)


def write(folder, documents, tokenizer):
    """(split, text) of all documents -> train.bin and val.bin in `folder`. Returns what META says of them. A text is a
    str or several in a row; of what was read and encoded, memory holds one piece at a time."""
    dtype = dtype_of(tokenizer.n_vocab)
    begin, end = vocabulary.begin(tokenizer), [tokenizer.eot_token]
    starts, tokens = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    digests = {split: hashlib.sha256() for split in SPLITS}
    with files.named(folder), contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=None))
        outputs = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        for split, document in documents:
            pieces = vocabulary.encode_in_pieces(tokenizer, document)
            first = next(pieces, None)
            if first is None:
                continue  # A document without text is none.
            starts[split].append(tokens[split])
            for ids in itertools.chain([begin, first], pieces, [end]):
                content = np.array(ids, dtype).tobytes()
                tokens[split] += len(ids)
                digests[split].update(content)
                outputs[split].write(content)
                bar.update(len(ids))
        for file in outputs.values():
            files.flush(file)
    checksum = data_checksum({split: digest.hexdigest() for split, digest in digests.items()})
    return {
        "vocab_size": tokenizer.n_vocab,
        "dtype": dtype.str,
        "tokens": tokens,
        "data_checksum": checksum,
        "documents": starts,
    }


def dtype_of(n_vocab):
    """The dtype of ids of a vocabulary of so many tokens."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def data_checksum(digests):
    """The checksum of a data set from {split: SHA-256 of its file, in hexadecimal}."""
    return hashlib.sha256("".join(digests[split] for split in SPLITS).encode()).hexdigest()


def seal(meta):
    """The checksum of all that META says."""
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def check(folder, tokenizer=None, fingerprint="", whole=False):
    """({split: memory-mapped ids}, what META says) of a folder. UserError for whatever is not as it was written.

    What META says and the files' sizes are always checked; the tokens themselves where they are few, where `whole` is
    true, and where a file has changed since META did. The time of META so is that of the last check of them all.
    tokenizer, fingerprint: the ones to read it with, if any.
    """
    folder = Path(folder)
    try:
        meta = read_meta(folder)
        ids = {split: read_ids(folder / f"{split}.bin", meta, split, tokenizer) for split in SPLITS}
        paths = [folder / f"{split}.bin" for split in SPLITS]
        times = [path.stat().st_mtime_ns for path in [*paths, folder / META]]
        few = sum(array.nbytes for array in ids.values()) <= WHOLE
        if whole or few or max(times[:2]) >= times[2]:
            require(checksum_of(folder) == meta["data_checksum"], "the tokens are not those that were written")
            if not few:
                with contextlib.suppress(OSError):  # A folder that cannot be written is checked again.
                    os.utime(folder / META)
        other = fingerprint and meta["tokenizer_fingerprint"] != fingerprint
        require(not other, "the tokens are another tokenizer's")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        again = f"remove the folder {folder} and it is made again"
        raise UserError(f"{folder} is damaged ({error}); {again}") from None
    return ids, meta


def read_meta(folder):
    """What META of a folder says. ValueError where that contradicts itself, the folder's name, or its seal."""
    content = (folder / META).read_bytes()
    meta = json.loads(content.decode("utf-8"))
    require(json.dumps(meta).encode() == content, f"{META} is not as it was written")
    sealed = meta.pop("seal", None)
    require(meta.keys() == KEYS, f"{META} has other keys")
    require(sealed is None or sealed == seal(meta), f"{META} is not as it was written")
    name = f"{meta['dataset']}-{Path(meta['tokenizer']).stem}-"
    require(os.path.basename(os.path.abspath(folder)).startswith(name), f"{META} is of {name}...")
    return meta


def read_ids(path, meta, split, tokenizer):
    """The ids (tokens,) of a split, memory-mapped. ValueError where its file and META do not fit together."""
    count, dtype = meta["tokens"][split], dtype_of(meta["vocab_size"])
    require(meta["dtype"] == dtype.str, f"{META} says another dtype")
    size = path.stat().st_size
    require(size == count * dtype.itemsize, f"{path} has {size} bytes instead of {count} tokens of {dtype.itemsize}")
    borders = np.array([*meta["documents"][split], count])
    require(borders[0] == 0 and (np.diff(borders) > 0).all(), f"{META} contradicts itself")
    ids = np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
    if tokenizer:
        require(meta["vocab_size"] == tokenizer.n_vocab, f"{META} says another size of the vocabulary")
        require((ids[borders[1:] - 1] == tokenizer.eot_token).all(), "a document has no end")
    return ids


def checksum_of(folder):
    """The `data_checksum` of the files that are in a folder."""
    digests = {}
    for split in SPLITS:
        with open(folder / f"{split}.bin", "rb") as file:
            digests[split] = hashlib.file_digest(file, "sha256").hexdigest()
    return data_checksum(digests)
