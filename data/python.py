"""dataset = "python": the source of the standard library of the running Python. Real text, on every machine."""

import hashlib
import sysconfig
from pathlib import Path

from data import text
from errors import UserError

# Tests, which some systems do not install, and tables that programs wrote.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def stdlib_files():
    """Sorted paths of the standard library's modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if not LEFT_OUT & set(file.relative_to(folder).parts))
    if not files:
        raise UserError(f"no source of the standard library in {folder}; use --dataset=shakespeare or --text=FILE")
    return [file for file in files if file.stat().st_size]


def signature(config):
    return [(file.name, file.stat().st_size) for file in stdlib_files()]


def documents(config):
    """Yields (split, text). A file's own name decides its split, so Python versions nearly agree on it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in stdlib_files():
        name = file.relative_to(folder).as_posix()
        held_out = hashlib.sha256(name.encode()).digest()[0] < 256 * text.HELD_OUT
        yield "val" if held_out else "train", text.read(file)
