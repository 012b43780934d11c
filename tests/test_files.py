"""Files are whole or as they were, whatever happens in between; a lock lets one in."""

import subprocess
import sys
import threading

import pytest

from core import files

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
            path.write_text("whole")
        with pytest.raises(error):
            write_half(path, error)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "whole")]


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
