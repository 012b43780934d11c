"""Files that are whole or not there, and locks between processes. A leaf: it imports nothing of ours."""

import contextlib
import errno
import os
import shutil
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
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
        with open(part, mode, **text) as file:
            yield file
            flush(file)
        if os.path.exists(path):
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename is None and error.errno:
            raise OSError(error.errno, f"cannot be written: {os.strerror(error.errno)}", path) from None
        raise


def flush(file):
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


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
