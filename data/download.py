"""Downloads that go on where they broke off, with a checksum; what fails says how to place the file by hand."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from core import files
from core.errors import UserError

LOCK = ".lock"  # in the folder of downloads: one process at a time brings a file into it


def fetch(url, path, sha256):
    """The file at `path`, downloaded from `url` if it is not there. UserError where it cannot be had, or is another.

    What came before a connection broke stays beside it as a .part file, and the next call goes on from there.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = files.lock(path.parent / LOCK, wait=True)
        try:
            if not path.exists():  # Another process may have brought it while this one waited.
                bring(url, path, sha256)
        finally:
            lock.release()
    check(path, path, sha256)
    return path


def bring(url, path, sha256):
    """Download `url` to `path`, which appears only when it is whole and right. UserError where it cannot be had."""
    part = path.with_name(f"{path.name}.part")
    try:
        download(url, part)
        try:
            check(part, "what came", sha256)
        except UserError:
            part.unlink()  # Going on from there would be of no use.
            raise
        os.replace(part, path)
    except (OSError, http.client.HTTPException, UserError) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"cannot download {url} ({error}); get it elsewhere and place it at {path}") from None


def download(url, part):
    """Append to the file `part` what it lacks of `url`, or write it anew where the server knows no ranges. OSError or
    HTTPException for a connection that fails or breaks."""
    begin = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:
            raise
        part.unlink()  # The file on the server ends here or before.
        return download(url, part)
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
    if total and size < total:  # The response does not say so by itself.
        raise OSError(f"broke off at {size:,} of {total:,} bytes; the same command goes on from there")


def check(file, name, sha256):
    """UserError unless the file's SHA-256 is the one expected. name: what to call it."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise UserError(f"{name} is not the file expected (SHA-256 {digest[:12]}..., not {sha256[:12]}...)")
