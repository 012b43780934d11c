"""Downloads that go on where they broke off, with a checksum; what fails says how to place the file by hand."""

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PAUSES = (1, 2, 4)  # seconds before a broken download is taken up again


def fetch(url, path, sha256):
    """The file at `path`, downloaded from `url` if it is not there. UserError where it cannot be had, or is another.

    What came before a connection broke stays beside it as a .part file, and the next call goes on from there.
    """
    path = Path(path)
    if path.exists():
        check(path, path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with alone(path.parent):
        if path.exists():  # another process brought it while this one waited
            return fetch(url, path, sha256)
        try:
            download(url, part)
            try:
                check(part, "what came", sha256)
            except UserError:
                part.unlink()  # no use in going on from there
                raise
            os.replace(part, path)
        except (OSError, http.client.HTTPException, UserError) as error:  # URLError and timeouts are OSErrors
            raise UserError(f"cannot download {url} ({error}); get it elsewhere and place it at {path}") from None
    return path


@contextlib.contextmanager
def alone(folder):
    """One process at a time downloads into a folder. The kernel ends the lock with its process, however that ends."""
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: there the checksum alone guards the file
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def download(url, part):
    """All of `url` into the file `part`, in several attempts if need be. OSError or HTTPException for the last."""
    for pause in (*PAUSES, None):
        try:
            return attempt(url, part)
        except (OSError, http.client.HTTPException) as error:
            # An answer such as 404 stays what it is, and where nothing ever came, we are most likely offline.
            if pause is None or isinstance(error, urllib.error.HTTPError) or not part.exists():
                raise
        time.sleep(pause)


def attempt(url, part):
    """Append to `part` what it lacks of `url`, or write it anew where the server knows no ranges."""
    begin = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:
            raise
        part.unlink()  # there is no more than that, or less
        return attempt(url, part)
    with response:
        if response.status != 206:
            begin = 0
        length = response.headers.get("Content-Length")
        total = begin + int(length) if length else None
        bar = tqdm(total=total, initial=begin, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, open(part, "ab" if begin else "wb") as out:
            while block := response.read(1 << 16):
                out.write(block)
                bar.update(len(block))
            size = out.tell()
    if total and size < total:  # the response does not say so by itself
        raise OSError(f"broke off at {size:,} of {total:,} bytes; the same command goes on from there")


def check(file, name, sha256):
    """UserError unless the file's SHA-256 is the one expected. name: what to call it."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{name} is not the file expected (SHA-256 {found[:12]}..., not {sha256[:12]}...)")
