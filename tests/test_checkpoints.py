"""Nothing damaged and nothing odd in a checkpoint is ever used, and one is there at every moment."""

import contextlib
import copy
import errno
import functools
import io
import math
import os
import random
import resource
import zipfile

import pytest
import torch
from test_train import same

from core import checkpoints, runs
from core.checkpoints import BEST, CKPT, PREVIOUS
from core.errors import UserError

ODD = (
    None,
    "x",
    -1,
    math.nan,
    10**400,
    [],
    {"x": 1},
    b"",
    True,
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(()),
)


@pytest.fixture(scope="module")
def saved(trained):
    return torch.load(trained / CKPT, weights_only=True)


@pytest.fixture
def folder(trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CKPT).write_bytes((trained / CKPT).read_bytes())
    return tmp_path / "run"


# ---- bits


def test_a_flipped_bit_is_refused_or_changes_nothing(trained, saved):
    """Half of the flips are in the headers, half anywhere; torch.load alone takes nearly all of them."""
    whole = (trained / CKPT).read_bytes()
    directory, draw, used = whole.rindex(b"PK\1\2", 0, whole.index(b"PK\1\2") + 4), random.Random(0), 0
    for index in range(400):
        byte = draw.randrange(directory if index % 2 else 0, len(whole))
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << draw.randrange(8)
        with contextlib.suppress(RuntimeError):
            if checkpoints.is_whole(io.BytesIO(flipped)):
                assert same(torch.load(io.BytesIO(flipped), weights_only=True), saved), byte
                used += 1
    assert used < 150  # bits of padding and times are read by nobody


def test_a_record_that_says_to_be_a_folder_is_refused(trained):
    """torch reads nothing of it, and its tensor is then what the memory held before."""
    whole = (trained / CKPT).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        directory = archive.start_dir
    flipped = bytearray(whole)
    flipped[directory + 38] ^= 16  # the first entry's external attributes
    assert checkpoints.is_whole(io.BytesIO(whole)) and not checkpoints.is_whole(io.BytesIO(flipped))


def test_a_flipped_bit_of_a_weight_is_one_line_in_every_command(folder, call_script):
    content = bytearray((folder / CKPT).read_bytes())
    content[len(content) // 2] ^= 64
    (folder / CKPT).write_bytes(content)
    for words in (["sample.py", folder], ["evaluate.py", folder], ["train.py", f"--init_from={folder}"],
                  ["hub/export.py", folder, "there"], ["compare.py", "rope", f"--init_from={folder}"]):  # fmt: skip
        done = call_script(*words)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
        assert f"{folder / CKPT} is damaged" in done.stderr


def test_what_is_no_file_is_one_line(folder):
    (folder / CKPT).unlink()
    os.mkfifo(folder / CKPT)
    for run in (folder, folder / CKPT):
        with pytest.raises(UserError, match="is no file|holds no checkpoint"):
            runs.load(run)
    (folder / CKPT).unlink()
    (folder / CKPT).mkdir()
    with pytest.raises(UserError, match="is no file"):
        runs.load(folder)


def test_only_damage_is_called_damage(folder, monkeypatch):
    for code in (errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ENOSPC):
        for module, name in ((checkpoints.zipfile, "ZipFile"), (torch, "load")):
            refusals = [OSError(code, os.strerror(code))]
            if code in (errno.ENOMEM, errno.EMFILE):
                refusals.append(RuntimeError(f"[enforce fail] unable to map: {os.strerror(code)} ({code})"))
            for refusal in refusals[: 1 if module is checkpoints.zipfile else 2]:
                with monkeypatch.context() as patch:
                    patch.setattr(module, name, lambda *_, refusal=refusal, **__: (_ for _ in ()).throw(refusal))
                    with pytest.raises(OSError, match=os.strerror(code)) as error:
                        runs.load(folder)
                assert error.value.filename == str(folder / CKPT)


# ---- content


def leaves(value, path=()):
    """The paths of all values in a state: keys of dicts, the first two members of lists."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from leaves(value[index], (*path, index))


def changed(state, path, value=leaves):
    """A copy of the state with another value at the path, or with none."""
    if not path:
        return value
    copied = copy.copy(state)
    if len(path) > 1 or value is not leaves:
        copied[path[0]] = changed(state[path[0]], path[1:], value)
    else:
        del copied[path[0]]
    return copied


def fits(path, old, new):
    """Whether a state is as good with the new value: a setting that is missing has its default, others of the right
    type may be those of another run; so may checksums; without an optimizer it is a best.pt; its step may be lower."""
    if new is leaves:
        return (path[0] == "config" and len(path) == 2) or path == ("optimizer",)
    named = path[0] in ("config", "tokenizer_fingerprint", "data_checksum")
    return (named and type(new) in (type(old), bool, str)) or (path[-1] == "step" and torch.is_tensor(new))


@pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
def test_whatever_is_odd_in_a_state_is_refused_in_one_place(saved, share):
    """Each value of it is replaced by others, and left out. What optimizers' groups say of themselves is not read."""
    paths = [path for path in leaves(saved) if "param_groups" not in path or path[4:5] in ((), ("params",))]
    cases = [(path, new) for path in paths for new in (*ODD, leaves)[: None if path else -1]]
    for path, new in random.Random(0).sample(cases, int(share * len(cases))):
        try:
            checkpoints.check(changed(saved, path, new))
        except (ValueError, UserError):
            continue
        assert fits(path, functools.reduce(lambda value, key: value[key], path, saved), new), (path, new)


def test_an_odd_state_is_one_line_in_every_command(folder, saved, call_script):
    for path, new, said in (
        (("step",), -1, "has the step -1"),
        (("config", "n_layer"), "x", "n_layer is 'x'; expected int"),
        (("config", "n_layer"), 9999, "do not fit its settings"),
        (("model", "token.weight"), torch.zeros(3), r"do not fit its settings (token.weight)"),
        (("optimizer", 0, "state", 0), {}, "odd state of its optimizer"),
    ):
        torch.save(changed(saved, path, new), folder / CKPT)
        for words in (["sample.py", folder], ["train.py", f"--init_from={folder}"], ["hub/export.py", folder, "there"]):
            done = call_script(*words)
            assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
            assert f"{folder / CKPT} has " in done.stderr and said in done.stderr, done.stderr


# ---- writing


def states(folder):
    return {path.name: torch.load(path)["step"] for path in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_one_is_there_at_every_moment(tmp_path, monkeypatch, links):
    """Also after a kill between the two renames, and where the disk knows no links."""
    seen, replace, link = [], os.replace, os.link

    def look(work):
        def watched(*names):
            if links or work is replace:
                work(*names)
            seen.append(torch.load(tmp_path / CKPT)["step"])
            if not links and work is link:
                raise OSError(errno.EPERM, "no links here")

        return watched

    checkpoints.save(tmp_path, CKPT, {"step": 1})
    monkeypatch.setattr(os, "link", look(link))
    monkeypatch.setattr(os, "replace", look(replace))
    for step in (2, 3):
        checkpoints.save(tmp_path, CKPT, {"step": step})
    assert seen == [1, 1, 2, 2, 2, 3]
    checkpoints.keep(tmp_path / CKPT)  # as far as a killed process came
    checkpoints.save(tmp_path, CKPT, {"step": 4})
    checkpoints.save(tmp_path, BEST, {"step": 0})
    assert states(tmp_path) == {CKPT: 4, PREVIOUS: 3, BEST: 0}


def test_a_disk_that_is_full_at_any_byte_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    state = {"step": 1, "weights": torch.zeros(20000)}
    checkpoints.save(tmp_path, CKPT, state)
    size, limits = (tmp_path / CKPT).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, size, size // 20):
        for name in (CKPT, BEST):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
                with pytest.raises(OSError, match="cannot be written: File too large") as error:
                    checkpoints.save(tmp_path, name, state | {"step": 2})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert error.value.filename == str(tmp_path / name)
            assert states(tmp_path) == {CKPT: 1}


def test_the_one_before_is_taken_with_a_line(folder, capsys):
    (folder / CKPT).rename(folder / PREVIOUS)
    assert runs.load(folder)["step"] == 24
    assert capsys.readouterr().err == f"{folder / CKPT} is missing: taking {folder / PREVIOUS}, the one before it\n"
