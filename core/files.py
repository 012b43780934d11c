"""Files that are whole or not there, and locks between processes. A leaf: it imports nothing of ours."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import zlib
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def atomic(path, mode="w"):
    """An open file (UTF-8, unless `mode` is "wb") whose content stands at `path` once the block has ended. What is no
    UTF-8 in the name of another file is written as it is.

    It is written to the side, flushed to the disk and renamed into place: a kill leaves the old file or the new one. An
    exception in the block leaves the old one, and nothing beside it. The file's mode stays, and a link stays a link.
    OSError names the file, also where its disk is full.
    """
    path = os.path.realpath(path)
    part = Path(f"{path}.part")
    try:
        with named(path):
            text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
            with open(part, mode, **text) as file:
                yield file
                flush(file)
            if os.path.exists(path):
                shutil.copymode(path, part)
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_whole(path, text):
    """Write a text file: a kill leaves the old one or the new one."""
    with atomic(path) as file:
        file.write(text)


def write_json(path, value):
    """Write a value of plain types as a JSON file: a kill leaves the old one or the new one."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def checksum(value):
    """A CRC-32 of a value of plain types as JSON writes it, in which a flipped bit shows."""
    return zlib.crc32(json.dumps(value).encode())


def write_record(path, value):
    """Write {key: value of plain types} as `write_json` does, with its checksum, which core.runs.read_json compares."""
    value = json.loads(json.dumps(value))  # as it will be read, with text for keys
    write_json(path, value | {"crc32": checksum(value)})


@contextlib.contextmanager
def named(path):
    """An OSError in the block names the file that was written: Python's own names none once the file is open."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, f"cannot be written: {os.strerror(error.errno)}", str(path)) from None
        raise


def append(path, text):
    """Add text to a file, as UTF-8. OSError names the file; where its disk is full, nothing is added."""
    with named(path), open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def set_aside(path):
    """Rename a damaged file, or a folder in its place, so that a new one can be written -> its new name."""
    path = Path(path)
    names = (path.with_name(f"{path.name}.damaged{count or ''}") for count in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    os.replace(path, aside)
    return aside


def flush(file):
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder):
    """Wait until the files in a folder, which other libraries wrote, are on the disk."""
    for path in Path(folder).iterdir():
        with open(path, "r+b") as file:  # Windows flushes what may be written alone.
            flush(file)


def flush_names(folder):
    """Wait until the names in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):  # Windows opens no folders.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path, wait=False):
    """Keep other processes out while the FileLock returned exists. None where another one is in and `wait` is False.

    The kernel ends the lock with its process, however that ends; the empty file at `path` stays.
    """
    held = FileLock(path, fallback_to_soft=False)
    try:
        held.acquire(blocking=wait)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        # On a file system without locks, nothing keeps the others out.
    return held
