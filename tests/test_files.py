"""Files are whole or as they were, whatever happens in between; a lock lets one in."""

import json
import resource
import subprocess
import sys
import threading

import pytest

from core import files, log, runs

TEXT = "naïve 日本語 👍\n"


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    for mode, old, new in (("w", None, TEXT), ("wb", TEXT.encode(), b"\xff\n"), ("w", b"\xff\n", "")):
        with files.atomic(path, mode) as file:
            file.write(new)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == old
        assert path.read_bytes() == (new if mode == "wb" else new.encode())
    assert list(tmp_path.iterdir()) == [path]


def write_half(path, error):
    with files.atomic(path) as file:
        file.write("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    for path in (tmp_path / "new", tmp_path / "old"):
        if path.name == "old":
            path.write_text("whole", encoding="utf-8")
        with pytest.raises(error):
            write_half(path, error)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("old", "whole")]


def test_text_is_utf8_wherever_it_is_written(tmp_path):
    code = f"from core import files\nwith files.atomic({str(tmp_path / 'file')!r}) as file: file.write({TEXT!a})"
    root = files.Path(files.__file__).parent.parent
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=root, env={"LC_ALL": "C"}, check=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == TEXT


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic(tmp_path / "missing" / "file"):
        pass


def test_a_lock_lets_one_in_and_the_next_when_it_is_gone(tmp_path):
    lock = files.lock(tmp_path / "lock")
    assert lock is not None and files.lock(tmp_path / "lock") is None
    waiting = threading.Thread(target=files.lock, args=(tmp_path / "lock", True))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    lock.release()
    waiting.join(10)
    assert not waiting.is_alive()


def test_where_files_cannot_be_locked_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files.FileLock, "acquire", lambda self, **_: (_ for _ in ()).throw(OSError(37, "no locks")))
    assert files.lock(tmp_path / "lock") is not None and files.lock(tmp_path / "lock", wait=True) is not None


def test_a_line_that_a_full_disk_cuts_short_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    files.append(path, "one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
        with pytest.raises(OSError, match="cannot be written: File too large") as error:
            files.append(path, "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path) and path.read_text(encoding="utf-8") == "one\n"


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
        files.set_aside(tmp_path / "x.json")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "x.json.damaged": "first", "x.json.damaged1": "second",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b"\0" * 9, b"[" * 100000, None])
def test_a_damaged_json_file_is_set_aside_with_a_line(tmp_path, content, capsys):
    path = tmp_path / "length.json"
    path.write_bytes(content) if content is not None else path.mkdir()
    assert runs.read_json(path) == {} and not path.exists()
    assert capsys.readouterr().err == f"{path} is damaged: set aside as length.json.damaged\n"
    assert runs.read_json(path) == {}
    assert capsys.readouterr().err == ""


def test_a_file_keeps_its_mode_and_a_link_stays_one(tmp_path):
    (tmp_path / "page.md").write_text("old", encoding="utf-8")
    (tmp_path / "page.md").chmod(0o600)
    (tmp_path / "link.md").symlink_to("page.md")
    with files.atomic(tmp_path / "link.md") as file:
        file.write("new")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "page.md").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "page.md").stat().st_mode & 0o777 == 0o600


def test_a_lock_that_cannot_be_had_is_an_error_and_no_lock(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.lock(tmp_path / "folder")


def test_a_flipped_bit_of_a_record_is_set_aside_or_changes_no_number(tmp_path, capsys):
    """In length.json and results.json, and in the lines of metrics.jsonl."""
    path, value = tmp_path / "results.json", {"made": {"seed": 1}, "runs": {"a": {"loss": [1.25, 2.5], "step": 7}}}
    for position in range(0, 8 * len(json.dumps(value, indent=1)), 5):  # every bit of a byte in turn
        files.write_record(path, value)
        content = bytearray(path.read_bytes())
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        found = runs.read_json(path)
        assert found == {} or {key: found[key] for key in value} == value
    runs.write_json(path, value)
    assert runs.read_json(path) == value  # from before there was a checksum
    capsys.readouterr()


def test_a_flipped_bit_of_a_line_is_a_damaged_line(tmp_path):
    reader, line = object.__new__(log.Log), {"step": 10, "loss": 1.25, "seconds": 2.5}
    reader.path = tmp_path / "metrics.jsonl"
    for position in range(8 * len(log.written(line)) - 8):
        content = bytearray(log.written(line).encode())
        content[position // 8] ^= 1 << position % 8
        reader.path.write_bytes(log.written(line).encode() + content)
        lines, damaged = reader.lines()
        assert damaged + len(lines) >= 2 and all(found == line for found in lines)
    reader.path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert reader.lines() == ([line], 0)
