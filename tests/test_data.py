"""Token files and batches: what is trained on is the text, each window once an epoch; damage does not go unnoticed."""

import errno
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import data
from core.errors import UserError
from core.settings import Config
from data import download, fineweb, folders, ptb, python, shakespeare, text, vocabulary, wikitext2

ROOT = Path(data.__file__).parent.parent
END = 256  # the end-of-text token of the bytes


def config_of(folder, source=None, **settings):
    settings = {"train_length": 8, "n_layer": 1, "posenc": "none", "data_dir": str(folder / "data")} | settings
    return Config(dataset="text", text=str(source), **settings) if source else Config(**settings)


def open_dataset(config):
    return data.open_dataset(config, vocabulary.load(config.tokenizer))


def mistake(config):
    with pytest.raises(UserError) as error:
        open_dataset(config)
    return str(error.value)


def files_below(folder):
    """All files in a folder, but for the lock of the downloads."""
    return sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != download.LOCK)


def texts(dataset, split):
    """The documents of a split, as bytes; each must end with the end-of-text token, and hold no other."""
    ids, borders = getattr(dataset, split), dataset.documents(split)
    assert borders[0] == 0 and borders[-1] == len(ids)
    documents = [ids[begin:end].tolist() for begin, end in pairwise(borders)]
    assert all(document[-1] == END and END not in document[:-1] and document[:-1] for document in documents)
    return [bytes(document[:-1]) for document in documents]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"".join(b"line %d\n" % n for n in range(100)))
    return file


@pytest.fixture
def dataset(tmp_path, corpus):
    return open_dataset(config_of(tmp_path, corpus))


# Batches. With the position itself as the token, a window shows where it was taken.


def starts(total, length, count, steps, key=(1337, 0), dtype=np.uint16):
    """Where the windows of some steps begin, (steps * count,); each is checked to be whole and in one piece."""
    tokens = np.arange(total).astype(dtype)
    found = []
    for step in steps:
        inputs, targets = data.batch(tokens, length, count, key, step)
        assert inputs.shape == targets.shape == (count, length) and inputs.dtype == targets.dtype == np.int64
        assert (inputs == inputs[:, :1] + np.arange(length)).all() and (targets == inputs + 1).all()
        found += inputs[:, 0].tolist()
    return found


@pytest.mark.parametrize(("total", "length", "count"), [(103, 10, 3), (1000, 7, 8), (50, 16, 5), (33, 16, 4)])
def test_an_epoch_has_every_window_exactly_once(total, length, count):
    size = (total - length) // length  # windows side by side, wherever below `length` the first one begins
    drawn = starts(total, length, count, range(4 * size))
    for epoch in range(4 * count):
        places = sorted(drawn[epoch * size : (epoch + 1) * size])
        assert [b - a for a, b in pairwise(places)] == [length] * (size - 1)  # side by side: none twice, no gap
        assert places[0] < length and total - places[-1] <= 3 * length  # and from one end of the text to the other


def test_windows_fit_into_every_text_that_is_long_enough():
    for length in (1, 2, 5):
        for total in range(length + 1, 6 * length + 2):
            starts(total, length, 2, range(10))


def test_order_and_offset_differ_from_epoch_to_epoch():
    drawn = starts(1010, 10, 100, range(10))
    epochs = [tuple(drawn[i : i + 100]) for i in range(0, 1000, 100)]
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 10
    assert len({start % 10 for start in drawn}) > 2
    assert all(sorted(epoch) != list(epoch) for epoch in epochs)


def test_a_batch_depends_on_nothing_but_its_arguments():
    expected = {step: starts(500, 10, 4, [step]) for step in range(40)}
    data.epoch_order.cache_clear()
    for step in np.random.default_rng(0).permutation(40):
        starts(300, 10, 3, [step], key=(1, 2))  # other calls in between
        assert starts(500, 10, 4, [int(step)], dtype=np.uint32) == expected[step]


def test_seed_and_phase_decide_the_order():
    keys = [(1337, 0), (1338, 0), (1337, 1), (0, 1337)]
    assert len({tuple(starts(1000, 10, 90, range(1), key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_parts_of_the_processes_make_up_the_whole_batch(world):
    tokens = np.arange(400, dtype=np.uint16)
    for step in range(8):  # an epoch has 39 windows, so that some batches span two
        whole = data.batch(tokens, 10, 12, (1, 0), step)
        share = 12 // world
        parts = [data.batch(tokens, 10, 12, (1, 0), step, slice(r * share, (r + 1) * share)) for r in range(world)]
        for half in (0, 1):
            assert np.array_equal(np.concatenate([part[half] for part in parts]), whole[half])


@pytest.mark.parametrize("length", [1, 3, 16])
def test_even_windows_are_spread_over_the_text_and_do_not_overlap(length):
    for total in [*range(length + 1, 5 * length + 3), 997]:
        for count in (1, 2, 7, 10**6):
            inputs, targets = data.even_windows(np.arange(total, dtype=np.uint16), length, count)
            assert (targets == inputs + 1).all() and (inputs == inputs[:, :1] + np.arange(length)).all()
            first = inputs[:, 0].tolist()
            assert len(first) == min(count, (total - 1) // length)  # as many as fit side by side
            assert first[0] == 0 and targets.max() < total and all(b - a >= length for a, b in pairwise(first))
            assert len(first) == 1 or first[-1] == total - 1 - length


# Token files.


@pytest.mark.parametrize(
    "content", [b"a\r\nb\rc\n\n  d\t\n" * 9, "naïve 日本語 👍\ufeff\x00<|endoftext|>\n".encode() * 9]
)
def test_the_tokens_are_the_bytes_of_the_file(tmp_path, content):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    opened = open_dataset(config_of(tmp_path, file))
    (train,), (val,) = texts(opened, "train"), texts(opened, "val")
    assert train + val == content
    characters = len(content.decode())
    assert abs(len(val.decode()) - characters / 10) <= 1


def test_files_are_documents_and_empty_or_hidden_ones_are_none(tmp_path):
    contents = {f"{n:02}.txt": f"document {n}\n".encode() for n in range(40)}
    folder = tmp_path / "folder"
    (folder / "inner" / ".git").mkdir(parents=True)
    for name, content in contents.items():
        (folder / ("inner" if name < "20" else "") / name).write_bytes(content)
    (folder / "inner" / ".git" / "config").write_bytes(b"hidden folder")
    (folder / ".hidden").write_bytes(b"hidden file")
    (folder / "empty.txt").touch()
    opened = open_dataset(config_of(tmp_path, folder))
    train, val = texts(opened, "train"), texts(opened, "val")
    # So many files are held out whole.
    assert sorted(train + val) == sorted(contents.values()) and len(val) == 4


def split_of(folder, sizes, tmp_path):
    """Texts of so many characters, by name, in a folder -> the Dataset of it."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (folder / name).write_text((f"{name} " * size)[:size], encoding="utf-8")
    return open_dataset(config_of(tmp_path, folder))


def test_a_tenth_is_held_out_by_size_not_by_number(tmp_path):
    """Whole files where they come near it, else the end of every file."""
    generator, near = np.random.default_rng(0), []
    for number, sizes in enumerate(
        [
            {f"{n:02}": 100 for n in range(20)} | {"big": 40000},  # the small ones are no tenth of it
            {f"{n:02}": 1000 for n in range(27)} | {f"tiny{n}": 6 for n in range(3)},
            {f"{n:02}": int(size) for n, size in enumerate(generator.lognormal(6, 1.5, size=60)) if size >= 2},
        ]
    ):
        opened = split_of(tmp_path / str(number), sizes, tmp_path)
        train, val = texts(opened, "train"), texts(opened, "val")
        assert sum(map(len, train + val)) == sum(sizes.values())
        assert 0.075 <= sum(map(len, val)) / sum(sizes.values()) <= 0.125
        near.append(len(train) + len(val) == len(sizes))
    assert near == [False, True, True]


def test_copies_of_a_document_stand_on_one_side(tmp_path):
    (tmp_path / "folder").mkdir()
    for n in range(120):
        (tmp_path / "folder" / f"{n:03}.txt").write_text(f"document {n % 40}\n" * (n % 40 + 1), encoding="utf-8")
    opened = open_dataset(config_of(tmp_path, tmp_path / "folder"))
    train, val = texts(opened, "train"), texts(opened, "val")
    assert len(train) + len(val) == 120 and not {*train} & {*val} and {*map(val.count, val)} == {3}


def test_what_programs_of_ours_wrote_hidden_files_and_null_bytes_are_no_text(tmp_path, monkeypatch, capsys):
    """And they change nothing: a run in the midst of its own corpus goes on."""
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a note\n" * 99, encoding="utf-8")
    Path("table.bin").write_bytes(b"a\0b" * 99)
    config = config_of(tmp_path, ".", data_dir="data")
    before = open_dataset(config)
    said = capsys.readouterr().err
    assert (
        "left out: folders of runs and tokens (1), files that are no text (1); the first: table.bin holds null bytes"
        in said
    )
    for name in ("out/run/ckpt.pt", "out/run/config.json", "out/new/train.lock", "data/raw/play.txt", ".cache/x/y",
                 "out/all/logs/train.lock", "out/all/results.md", "out/all/results.json", "copy/train.bin",
                 "copy/meta.json", ".hidden", "data/tokens/killed.part/train.bin"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("not a note", encoding="utf-8")
    assert open_dataset(config).folder == before.folder
    assert b"".join(texts(before, "train") + texts(before, "val")) == b"a note\n" * 99
    _, left_out = text.found(config)
    assert left_out == {"folders of runs and tokens": 6, "hidden files and folders": 2}
    Path("run").mkdir()
    for own in ("out/run", "run"):
        assert "--out_dir" in mistake(config_of(tmp_path, own, out_dir="run"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path}/pipe is a pipe or a device" in mistake(config_of(tmp_path, tmp_path / "pipe"))
    assert "/dev/null is a pipe or a device" in mistake(config_of(tmp_path, "/dev/null"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe")
    (tmp_path / "folder" / "a.txt").write_text("text " * 99, encoding="utf-8")
    open_dataset(config_of(tmp_path, tmp_path / "folder"))


def test_files_whose_names_are_not_utf8_are_read(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_text("text " * 99, encoding="utf-8")
    (folder / os.fsdecode(b"\xfe.txt")).write_bytes(b"\xff")
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)  # as Python's is
    monkeypatch.setattr(sys, "stderr", stderr)
    open_dataset(config_of(tmp_path, folder))
    assert b"\\udcfe.txt is not UTF-8 text" in stderr.buffer.getvalue()


def test_a_file_is_read_in_pieces_that_cut_no_character(tmp_path, monkeypatch):
    content = "naïve 日本語 👍\r\n\ufeff" * 3
    file = tmp_path / "text.txt"
    file.write_text(content, newline="", encoding="utf-8")
    for block in (1, 2, 3, 7):
        monkeypatch.setattr(text, "BLOCK", block)
        assert text.read(file) == content
        for begin, end in ((0, 5), (5, 20), (20, None), (7, 7)):
            assert "".join(text.pieces(file, begin, end)) == content[begin:end]
    file.write_bytes("日本語".encode() + b"\xe9\x20")
    for block in (1, 4, 100):
        monkeypatch.setattr(text, "BLOCK", block)
        assert "byte 9: invalid continuation" in mistake(config_of(tmp_path, file))
    file.write_bytes(b"ab\xe6\x97")
    assert "byte 2: unexpected end" in mistake(config_of(tmp_path, file))


def test_each_of_a_few_files_gives_its_end_to_validation(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 200, encoding="utf-8")
    listed = config_of(tmp_path, "replaced")
    listed.text = [str(tmp_path / name) for name in "cab"]
    opened = open_dataset(listed)
    assert sorted(map(len, texts(opened, "train"))) == [180] * 3
    assert sorted({text[:1] for text in texts(opened, "val")}) == [b"a", b"b", b"c"]
    assert sum(map(len, texts(opened, "val"))) == 60


def test_a_part_without_text_is_no_document(tmp_path):
    """One letter is too short to be cut: all of it is validation's."""
    (tmp_path / "a").write_text("a" * 100, encoding="utf-8")
    (tmp_path / "b").write_text("b", encoding="utf-8")
    config = config_of(tmp_path, "replaced")
    config.text = [str(tmp_path / "a"), str(tmp_path / "b")]
    opened = open_dataset(config)
    assert texts(opened, "train") == [b"a" * 90] and texts(opened, "val") == [b"a" * 10, b"b"]


def test_meta_tells_what_is_in_the_folder(dataset):
    meta = json.loads((dataset.folder / "meta.json").read_text(encoding="utf-8"))
    assert sorted(file.name for file in dataset.folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert meta["tokenizer"] == "bytes" and meta["vocab_size"] == 257
    for split in ("train", "val"):
        raw = np.fromfile(dataset.folder / f"{split}.bin", "<u2")
        assert meta["tokens"][split] == len(raw) and np.array_equal(raw, getattr(dataset, split))
    assert not dataset.train.flags.writeable


def test_checksum_changes_with_any_token_and_with_nothing_else(tmp_path, corpus, dataset):
    content = corpus.read_bytes()
    (tmp_path / "copy.txt").write_bytes(content)
    (tmp_path / "other.txt").write_bytes(content.replace(b"line 99", b"line 98"))
    copy, other = (open_dataset(config_of(tmp_path, tmp_path / f"{name}.txt")) for name in ("copy", "other"))
    assert copy.meta["data_checksum"] == dataset.meta["data_checksum"] != other.meta["data_checksum"]


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, corpus, size, dtype):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number in range(size - 257):
        ranks[b"\xff" + number.to_bytes(2, "big")] = len(ranks)
    tokenizer = vocabulary.make("wide", r"(?s:.)", ranks)
    config = config_of(tmp_path, corpus)
    for _ in range(2):  # prepared, then opened again
        opened = data.open_dataset(config, tokenizer)
        assert opened.train.dtype == dtype and opened.train[-1] == opened.val[-1] == size - 1
        assert bytes(opened.train[:-1].tolist()) + bytes(opened.val[:-1].tolist()) == corpus.read_bytes()


def test_opening_again_does_not_prepare_again(tmp_path, corpus, dataset, monkeypatch):
    before = [(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in files_below(tmp_path)]
    monkeypatch.setattr(text, "documents", lambda config: pytest.fail("read the text again"))
    again = open_dataset(config_of(tmp_path, corpus))
    assert np.array_equal(again.train, dataset.train) and again.meta == dataset.meta
    assert [(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in files_below(tmp_path)] == before


@pytest.mark.parametrize("change", ["longer", "same length"])
def test_another_text_gets_another_folder(tmp_path, corpus, dataset, change):
    before, tokens = {file: file.read_bytes() for file in files_below(dataset.folder)}, dataset.train.tolist()
    content, changed = corpus.read_bytes(), corpus.stat().st_mtime_ns + 10**9
    corpus.write_bytes(b"more\n" + content if change == "longer" else content.replace(b"line 7", b"LINE 7"))
    os.utime(corpus, ns=(changed, changed))
    new = open_dataset(config_of(tmp_path, corpus))
    assert new.folder != dataset.folder and b"".join(texts(new, "train") + texts(new, "val")) == corpus.read_bytes()
    assert {file: file.read_bytes() for file in files_below(dataset.folder)} == before
    assert dataset.train.tolist() == tokens


def test_every_tokenizer_gets_its_own_folder(tmp_path, corpus, dataset):
    other = open_dataset(config_of(tmp_path, corpus, tokenizer="bpe"))
    assert other.folder != dataset.folder and other.meta["vocab_size"] == 4096
    decoded = [vocabulary.load("bpe").decode_bytes(getattr(other, split)[:-1].tolist()) for split in ("train", "val")]
    assert b"".join(decoded) == corpus.read_bytes()


# Damage.


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def put_id(file, index, value):
    ids = np.fromfile(file, "<u2")
    ids[index] = value
    ids.tofile(file)


DAMAGE = {
    "cut by a byte": lambda folder: os.truncate(folder / "train.bin", os.path.getsize(folder / "train.bin") - 1),
    "cut by a token": lambda folder: os.truncate(folder / "val.bin", os.path.getsize(folder / "val.bin") - 2),
    "cut to nothing": lambda folder: os.truncate(folder / "train.bin", 0),
    "longer": lambda folder: (folder / "val.bin").open("ab").write(b"\0\0"),
    "missing": lambda folder: (folder / "val.bin").unlink(),
    "id beyond the vocabulary": lambda folder: put_id(folder / "train.bin", 5, 257),
    "id far beyond the vocabulary": lambda folder: put_id(folder / "val.bin", -1, 65535),
    "wider dtype": lambda folder: change_meta(folder, dtype="<u4"),
    "other dtype": lambda folder: change_meta(folder, dtype="<f2"),
    "signed dtype": lambda folder: change_meta(folder, dtype="<i2"),
    "other byte order": lambda folder: change_meta(folder, dtype=">u2"),
    "no dtype": lambda folder: change_meta(folder, dtype="tokens"),
    "null dtype": lambda folder: change_meta(folder, dtype=None),
    "meta cut short": lambda folder: os.truncate(folder / "meta.json", 40),
    "meta empty": lambda folder: os.truncate(folder / "meta.json", 0),
    "meta not UTF-8": lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe{}"),
    "meta a list": lambda folder: (folder / "meta.json").write_text("[]", encoding="utf-8"),
    "meta an empty dict": lambda folder: (folder / "meta.json").write_text("{}", encoding="utf-8"),
    "counts missing": lambda folder: change_meta(folder, tokens=None),
    "count of one split missing": lambda folder: change_meta(
        folder, tokens={"train": (folder / "train.bin").stat().st_size // 2}
    ),
    "counts no numbers": lambda folder: change_meta(folder, tokens={"train": "many", "val": "few"}),
    "documents missing": lambda folder: change_meta(folder, documents=None),
    "documents of one split missing": lambda folder: change_meta(folder, documents={"train": [0]}),
    "documents beyond the end": lambda folder: change_meta(folder, documents={"train": [0, 10**6], "val": [0]}),
    "documents in disorder": lambda folder: change_meta(folder, documents={"train": [0, 9, 5], "val": [0]}),
    "checksum missing": lambda folder: change_meta(folder, data_checksum=None),
    "other tokenizer": lambda folder: change_meta(folder, tokenizer_fingerprint="0123456789abcdef"),
    "meta missing": lambda folder: (folder / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_token_files_are_named_or_made_again(tmp_path, corpus, dataset, damage):
    good = {file: file.read_bytes() for file in files_below(dataset.folder)}
    DAMAGE[damage](dataset.folder)
    assert {file: file.read_bytes() for file in files_below(dataset.folder)} != good
    said = None
    try:
        open_dataset(config_of(tmp_path, corpus))
    except UserError as error:
        said = str(error)
    if said is not None:
        assert str(dataset.folder) in said and "\n" not in said
        shutil.rmtree(dataset.folder)  # as the message advises
        open_dataset(config_of(tmp_path, corpus))
    assert {file: file.read_bytes() for file in files_below(dataset.folder)} == good


def unsealed(folder):
    """The folder as it was written before there was a seal."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    del meta["seal"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize("sealed", [True, False])
def test_no_flipped_bit_of_a_token_folder_is_used(tmp_path, corpus, dataset, sealed):
    tokenizer, generator = vocabulary.load("bytes"), np.random.default_rng(0)
    if not sealed:
        unsealed(dataset.folder)
    reader = tokenizer, vocabulary.fingerprint(tokenizer)
    folders.check(dataset.folder, *reader)
    for file in files_below(dataset.folder):
        good = file.read_bytes()
        for bit in generator.integers(8 * len(good), size=100):
            damaged = bytearray(good)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(UserError, match="is damaged"):
                folders.check(dataset.folder, *reader)
        file.write_bytes(good)
    folders.check(dataset.folder, *reader)


def test_tokens_that_are_too_many_for_every_start_are_read_when_their_file_has_changed(dataset, monkeypatch):
    monkeypatch.setattr(folders, "WHOLE", 0)
    checksum_of, read, tokens, meta = folders.checksum_of, [], *(dataset.folder / n for n in ("train.bin", "meta.json"))
    monkeypatch.setattr(folders, "checksum_of", lambda folder: read.append(folder) or checksum_of(folder))
    os.utime(meta, ns=(0, tokens.stat().st_mtime_ns + 10**9))
    folders.check(dataset.folder)
    assert read == []
    os.utime(tokens, ns=(0, meta.stat().st_mtime_ns))
    folders.check(dataset.folder)
    os.utime(meta, ns=(0, meta.stat().st_mtime_ns + 10**9))
    folders.check(dataset.folder)
    assert len(read) == 1
    folders.check(dataset.folder, whole=True)
    assert len(read) == 2
    put_id(tokens, 5, 255)
    os.utime(tokens, ns=(0, meta.stat().st_mtime_ns + 10**9))
    with pytest.raises(UserError, match="not those that were written"):
        folders.check(dataset.folder)


def test_folders_are_checked_wholly_when_asked(tmp_path, dataset, call_script):
    done = call_script("data/check.py")
    assert done.returncode == 0 and done.stdout.startswith(f"data/tokens/{dataset.folder.name}: 792 tokens")
    put_id(dataset.folder / "val.bin", 5, 255)
    done = call_script("data/check.py", dataset.folder)
    assert done.returncode == 2 and f"{dataset.folder} is damaged" in done.stderr and done.stderr.count("\n") == 1
    done = call_script("data/check.py", f"--data_dir={tmp_path}/other")
    assert done.returncode == 2 and f"no token folders in {tmp_path}/other/tokens" in done.stderr


def test_a_folder_of_an_earlier_version_stays_in_use(tmp_path, corpus, monkeypatch):
    versions = data.VERSIONS
    monkeypatch.setattr(data, "VERSIONS", versions[:1])
    before = open_dataset(config_of(tmp_path, corpus))
    unsealed(before.folder)
    monkeypatch.setattr(data, "VERSIONS", versions)
    assert open_dataset(config_of(tmp_path, corpus)).folder == before.folder
    shutil.rmtree(before.folder)
    assert open_dataset(config_of(tmp_path, corpus)).folder != before.folder


# Preparations that do not come to their end.


def test_a_failed_preparation_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("good text\n" * 99, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n" * 99)
    config = config_of(tmp_path, "replaced")
    config.text = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    said = mistake(config)
    assert str(tmp_path / "b.txt") in said and "UTF-8" in said and "\n" not in said
    assert files_below(tmp_path / "data") == []
    (tmp_path / "b.txt").write_text("mended\n" * 99, encoding="utf-8")
    opened = open_dataset(config)
    assert sum(map(len, texts(opened, "train") + texts(opened, "val"))) == 99 * (10 + 7)


def test_a_killed_preparation_is_not_taken_for_a_whole_one(tmp_path, corpus):
    code = """
import os, signal, sys
from types import SimpleNamespace
import data
from data import text, vocabulary

def documents(config):
    yield "train", "half a text " * 10000
    yield "val", "half a text " * 10000
    os.kill(os.getpid(), signal.SIGKILL)

text.documents = documents
config = SimpleNamespace(dataset="text", text=sys.argv[1], tokenizer="bytes", data_dir=sys.argv[2], phases=[(0, 8)])
data.open_dataset(config, vocabulary.load("bytes"))
"""
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "data")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    assert len(files_below(tmp_path / "data")) == 2  # it was killed between its first token and its last
    opened = open_dataset(config_of(tmp_path, corpus))
    assert b"".join(texts(opened, "train") + texts(opened, "val")) == corpus.read_bytes()
    assert len(files_below(tmp_path / "data")) == 3  # and what the killed one left is gone


def test_a_second_process_waits_for_the_one_that_prepares(tmp_path, corpus, monkeypatch, capsys):
    config, documents, begun, go_on = config_of(tmp_path, corpus), text.documents, threading.Event(), threading.Event()

    def slow(config):
        begun.set()
        assert go_on.wait(60)
        yield from documents(config)

    monkeypatch.setattr(text, "documents", slow)
    monkeypatch.setattr(folders.tqdm, "write", lambda line, file: go_on.set() if "waiting for it" in line else None)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(open_dataset, config)
        assert begun.wait(60)
        monkeypatch.setattr(text, "documents", lambda config: pytest.fail("prepared twice"))
        second = open_dataset(config)
        assert second.folder == first.result().folder and np.array_equal(second.train, first.result().train)
    assert [file.name for file in second.folder.parent.iterdir() if file.name != folders.LOCK] == [second.folder.name]


def test_all_files_are_on_the_disk_before_they_are_renamed_into_place(tmp_path, corpus, monkeypatch):
    flushed, rename, fsync = set(), os.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.add(os.fstat(number).st_ino), fsync(number)))

    def check(source, target):
        assert {path.stat().st_ino for path in (source, *source.iterdir())} <= flushed
        renamed.append(target)
        rename(source, target)

    renamed = []
    monkeypatch.setattr(os, "rename", check)
    folder = open_dataset(config_of(tmp_path, corpus)).folder
    assert renamed == [folder] and folder.parent.stat().st_ino in flushed  # and so is the folder's new name


def test_a_text_that_changes_while_it_is_read_is_not_used(tmp_path, corpus, monkeypatch):
    documents = text.documents

    def changing(config):
        yield from documents(config)
        corpus.write_bytes(corpus.read_bytes() + b"more")

    monkeypatch.setattr(text, "documents", changing)
    assert "changed while it was read" in mistake(config_of(tmp_path, corpus))
    assert files_below(tmp_path / "data") == []


def test_a_disk_that_is_full_leaves_nothing(tmp_path, corpus, monkeypatch):
    def documents(config):
        yield "train", "some text " * 99
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(text, "documents", documents)
    with pytest.raises((UserError, OSError), match="No space left"):  # either becomes one line
        open_dataset(config_of(tmp_path, corpus))
    assert files_below(tmp_path / "data") == []


def test_a_data_dir_that_is_a_file_is_named(tmp_path, corpus):
    with pytest.raises((UserError, OSError), match=re.escape(str(corpus))):
        open_dataset(config_of(tmp_path, corpus, data_dir=str(corpus)))


# dataset = "text"


def test_missing_text_is_named(tmp_path):
    assert str(tmp_path / "missing.txt") in mistake(config_of(tmp_path, tmp_path / "missing.txt"))
    assert not (tmp_path / "data").exists()


def test_text_of_nothing_but_empty_files_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    assert str(tmp_path / "folder") in mistake(config_of(tmp_path, tmp_path / "folder"))
    (tmp_path / "folder" / "empty.txt").touch()
    assert str(tmp_path / "folder") in mistake(config_of(tmp_path, tmp_path / "folder"))
    assert not (tmp_path / "data").exists()


def test_a_binary_file_is_left_out_of_a_folder_and_refused_by_name(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("good text\n" * 99, encoding="utf-8")
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes(b"good text, then \x89PNG\xff")
    opened = open_dataset(config_of(tmp_path, folder))
    assert b"".join(texts(opened, "train") + texts(opened, "val")) == b"good text\n" * 99
    said = capsys.readouterr().err
    assert f"files that are no text (2); the first: {folder}/b.png is not UTF-8 text" in said
    config = config_of(tmp_path, folder)
    config.text = [str(folder / "a.txt"), str(folder / "c.png")]
    assert f"{folder}/c.png is not UTF-8 text" in mistake(config)
    (folder / "a.txt").unlink()
    assert f"{folder}: no file in it is UTF-8 text" in mistake(config_of(tmp_path, folder))


def test_a_tilde_is_the_home_folder(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        open_dataset(config_of(tmp_path, f"~/{corpus.name}")).folder == open_dataset(config_of(tmp_path, corpus)).folder
    )


def test_text_must_be_longer_than_a_window(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"x" * 100)  # 10 go to validation; with the end of text 11 tokens, for inputs and one target more
    assert open_dataset(config_of(tmp_path, file, train_length=10)).val.tolist() == [120] * 10 + [256]
    said = mistake(config_of(tmp_path, file, train_length=11))
    assert str(file) in said and "train_length" in said and "val" in said
    schedule = {0.0: 5, 0.5: 10}
    open_dataset(config_of(tmp_path, file, train_length=10, length_schedule=schedule))


# dataset = "python"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 300 modules, and what must not be learned from."""
    folder = tmp_path / "library"
    for n in range(300):
        file = folder / ("email" if n % 3 else "") / f"module_{n}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"x = {n}\n", encoding="utf-8")
    for name in ("site-packages", "test", "email/tests", "encodings", "idlelib/idle_test", "lib2to3/tests/data"):
        (folder / name).mkdir(parents=True)
        (folder / name / "left_out.py").write_text("left_out = True\n", encoding="utf-8")
    (folder / "empty.py").touch()
    (folder / "notes.txt").write_text("left_out\n", encoding="utf-8")
    packages = str(folder / "site-packages")
    paths = {"stdlib": str(folder), "purelib": packages, "platlib": packages}
    monkeypatch.setattr(python.sysconfig, "get_paths", lambda: paths)
    return folder


def test_python_splits_by_file(tmp_path, library):
    opened = open_dataset(config_of(tmp_path, train_length=8))
    train, val = texts(opened, "train"), texts(opened, "val")
    assert sorted(train + val) == sorted(f"x = {n}\n".encode() for n in range(300))
    assert not set(train) & set(val) and 10 <= len(val) <= 60


def test_a_copy_of_a_module_goes_where_the_module_went(library):
    for file in list(library.rglob("module_*.py")):
        file.with_name(f"copy_of_{file.name}").write_bytes(file.read_bytes())
    found = list(python.documents(Config()))
    assert len(found) == 600 and len({*found}) == 300


def test_a_module_stays_in_its_split_when_others_come_and_go(library):
    before = {content: split for split, content in python.documents(Config())}
    for n in range(0, 300, 2):
        next(library.rglob(f"module_{n}.py")).unlink()
    (library / "new.py").write_text("new = True\n", encoding="utf-8")
    after = {content: split for split, content in python.documents(Config())}
    assert len(after) == 151 and all(before.get(content, split) == split for content, split in after.items())


def test_packages_add_their_source_and_nothing_else(tmp_path, library):
    packages = library / "site-packages"
    (packages / "left_out.py").unlink()
    for name in ("one/__init__.py", "one/inner/core.py", "one/tests/test_core.py", "one/_vendor/two.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(f"name = '{name}'\n", encoding="utf-8")
    (packages / "one" / "latin.py").write_bytes(b"# caf\xe9\n")
    plain, more = config_of(tmp_path), config_of(tmp_path, packages=True)
    before, after = open_dataset(plain), open_dataset(more)
    assert before.folder != after.folder
    added = {*texts(after, "train"), *texts(after, "val")} - {*texts(before, "train"), *texts(before, "val")}
    assert added == {b"name = 'one/__init__.py'\n", b"name = 'one/inner/core.py'\n"}
    assert python.signature(plain) == [(file.name, file.stat().st_size) for file in python.stdlib_files()]
    (packages / "new.py").write_text("new = True\n", encoding="utf-8")
    assert open_dataset(plain).folder == before.folder and open_dataset(more).folder != after.folder


def test_packages_and_shards_belong_to_one_data_set_each():
    for settings in ({"dataset": "ptb", "packages": True}, {"dataset": "ptb", "shards": 2}):
        with pytest.raises(ValueError, match="goes with --dataset="):
            Config(**settings)


def test_python_without_its_source_names_the_way_out(tmp_path, library):
    shutil.rmtree(library)
    library.mkdir()
    said = mistake(config_of(tmp_path))
    assert str(library) in said and "--dataset=shakespeare" in said and "--text" in said


def test_the_real_standard_library_is_long_and_a_tenth_of_it_is_held_out():
    sizes = {"train": 0, "val": 0}
    for split, content in python.documents(Config()):
        sizes[split] += len(content)
    assert sum(sizes.values()) > 5e6 and 0.05 < sizes["val"] / sum(sizes.values()) < 0.2


# dataset = "shakespeare"

PLAY = b"First Citizen:\r\nBefore we proceed any further, hear me speak.\n" * 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.answer`: (status, body), announced as `announced` bytes."""

    def do_GET(self):
        self.server.asked += 1
        status, body, announced = self.server.answer
        if status is None:
            self.wfile.write(body)  # no HTTP at all
            return
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server in place of the real one, for a play of our own."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.asked = (200, PLAY, len(PLAY)), 0
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(shakespeare, "URL", f"http://127.0.0.1:{server.server_port}/play.txt")
        monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(PLAY).hexdigest())
        yield server
        server.shutdown()
        thread.join()


def play_config(folder):
    return config_of(folder, dataset="shakespeare")


def place(folder):
    """Where the message of a failed download says that the file belongs."""
    return folder / "data" / "raw" / "tinyshakespeare.txt"


def test_shakespeare_is_downloaded_once_and_split_as_nanogpt_does(tmp_path, server):
    for _ in range(2):
        opened = open_dataset(play_config(tmp_path))
        (train,), (val,) = texts(opened, "train"), texts(opened, "val")
        assert train + val == PLAY and len(train) == int(len(PLAY) * 0.9)
    assert server.asked == 1 and files_below(tmp_path / "data" / "raw") == [place(tmp_path)]
    assert place(tmp_path).read_bytes() == PLAY


def test_shakespeare_placed_by_hand_is_used(tmp_path, server):
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(PLAY)
    assert b"".join(texts(open_dataset(play_config(tmp_path)), "train")) == PLAY[: int(len(PLAY) * 0.9)]
    assert server.asked == 0


def test_another_file_placed_by_hand_is_refused_and_kept(tmp_path, server):
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(PLAY[:-1])
    said = mistake(play_config(tmp_path))
    assert str(place(tmp_path)) in said and "SHA-256" in said
    assert place(tmp_path).read_bytes() == PLAY[:-1] and server.asked == 0
    assert files_below(tmp_path / "data") == [place(tmp_path)]


@pytest.mark.parametrize(
    "answer",
    [
        (200, PLAY.replace(b"hear", b"mark"), len(PLAY)),
        (200, b"", 0),
        (200, b"<html>log in first</html>", 25),
        (404, b"not found", 9),
        (503, b"", 0),
        (None, b"no HTTP at all\r\n\r\n", None),
    ],
    ids=["wrong bytes", "empty", "login page", "not found", "unavailable", "no HTTP"],
)
def test_a_failed_download_leaves_no_file_and_says_where_to_place_it(tmp_path, server, answer):
    server.answer = answer
    said = mistake(play_config(tmp_path))
    assert files_below(tmp_path) == []
    assert str(place(tmp_path)) in said and shakespeare.URL in said
    server.answer = (200, PLAY, len(PLAY))
    open_dataset(play_config(tmp_path))  # later it works


def test_no_network_leaves_no_file_and_says_where_to_place_it(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(shakespeare, "URL", f"http://127.0.0.1:{port}/play.txt")
    said = mistake(play_config(tmp_path))
    assert str(place(tmp_path)) in said and shakespeare.URL in said and "refused" in said
    assert files_below(tmp_path) == []


# The other downloads, from files placed by hand.


def put(monkeypatch, module, name, file, content):
    """Write `content` where `module` looks for it, and make its checksum the one that the module expects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    monkeypatch.setattr(module, name, hashlib.sha256(content).hexdigest())


ARTICLES = [
    " \n = One = \n \n Text of one , 1 = 1 . \n \n = = Section = = \n \n More . \n",
    " \n = Two ( = 2 ) = \n \n Table : \n = no title = \n \n = nor this = \n 1 \n \n = = = Deeper = = = \n",
    " \n = Naïve – three = \n \n Text . \n",
]


def test_wikitext2_is_cut_into_articles(tmp_path, monkeypatch):
    archive = tmp_path / "data" / "raw" / "wikitext-2-raw-v1.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as out:
        for name, content in (("train", "".join(ARTICLES)), ("valid", ARTICLES[0]), ("test", " = Never read = \n")):
            out.writestr(f"wikitext-2-raw/wiki.{name}.raw", content)
    put(monkeypatch, wikitext2, "SHA256", archive, archive.read_bytes())
    opened = open_dataset(config_of(tmp_path, dataset="wikitext2"))
    assert texts(opened, "train") == [article.encode() for article in ARTICLES]
    assert texts(opened, "val") == [ARTICLES[0].encode()]


def test_ptb_is_one_document_for_each_split(tmp_path, monkeypatch):
    files = {"train": b" some <unk> text \n N lines \n", "val": b" other text \n"}
    known = {split: (f"{split}.txt", hashlib.sha256(content).hexdigest()) for split, content in files.items()}
    monkeypatch.setattr(ptb, "FILES", known)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    for split, content in files.items():
        (tmp_path / "data" / "raw" / f"{split}.txt").write_bytes(content)
    opened = open_dataset(config_of(tmp_path, dataset="ptb"))
    assert texts(opened, "train") == [files["train"]] and texts(opened, "val") == [files["val"]]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """FineWeb of two small shards and a validation shard, under a GPT-2 that knows single bytes alone."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"\xff" + number.to_bytes(2, "big"): 256 + number for number in range(fineweb.END - 256)}
    gpt2, load = vocabulary.make("gpt2", r"(?s:.)", ranks), vocabulary.load
    monkeypatch.setattr(vocabulary, "load", lambda name: gpt2 if name == "gpt2" else load(name))
    listed = []
    for name, tail, documents in (
        ("one", b"", [b"first page", "zweite Seite, naïve".encode(), b"third"]),
        ("two", b" page, which goes on in the next file", [b"fourth page"]),
        ("val", b"", [b"validation", b"more of it, of which only the first letters are read"]),
    ):
        ids = [*tail, *(id for document in documents for id in (fineweb.END, *document))]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        content = header.tobytes() + np.array(ids, "<u2").tobytes()
        file = tmp_path / "data" / "raw" / "fineweb" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        listed.append((name, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(fineweb, "TRAIN", listed[:2])
    monkeypatch.setattr(fineweb, "VAL", listed[2])
    monkeypatch.setattr(fineweb, "VAL_TOKENS", 16)
    return tmp_path


def test_fineweb_is_decoded_for_any_tokenizer(shards):
    opened = open_dataset(config_of(shards, dataset="fineweb"))
    first = [b"first page", "zweite Seite, naïve".encode(), b"third"]
    assert texts(opened, "train") == first and texts(opened, "val") == [b"validation", b"more"]
    two = open_dataset(config_of(shards, dataset="fineweb", shards=2))
    assert two.folder != opened.folder
    assert texts(two, "train") == [*first, b" page, which goes on in the next file", b"fourth page"]
    again = open_dataset(config_of(shards, dataset="fineweb", tokenizer="gpt2"))
    assert again.train.tolist()[:11] == [*b"first page", fineweb.END] and len(again.train) == len(opened.train)


def test_fineweb_has_so_many_shards_and_no_others(shards):
    assert "--shards=3" in mistake(config_of(shards, dataset="fineweb", shards=3))
    file = shards / "data" / "raw" / "fineweb" / "two"
    file.write_bytes(file.read_bytes()[:-2])
    assert str(file) in mistake(config_of(shards, dataset="fineweb", shards=2))
