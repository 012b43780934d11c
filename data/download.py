"""Downloads with a progress bar and a checksum; what fails says how to place the file by hand."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from errors import UserError


def fetch(url, path, sha256):
    """The file at `path`, downloaded from `url` if it is not there. UserError where it cannot be had, or is another."""
    path = Path(path)
    if path.exists():
        check(path, path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
        check(part, "what came", sha256)
        os.replace(part, path)
    except (OSError, http.client.HTTPException, UserError) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"cannot download {url} ({error}); get it elsewhere and place it at {path}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def check(file, name, sha256):
    """UserError unless the file's SHA-256 is the one expected. name: what to call it."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{name} is not the file expected (SHA-256 {found[:12]}..., not {sha256[:12]}...)")
