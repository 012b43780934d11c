"""dataset = "python": the source of the standard library of the running Python. Real text, on every machine. With
--packages the source of what is installed beside it too."""

import hashlib
import sysconfig
from pathlib import Path

from core.errors import UserError
from data import text

# Tests, which some systems do not install, tables that programs wrote, and packages' copies of other packages.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_vendor"}


def modules(folder):
    """Sorted paths of the modules below a folder."""
    files = sorted(file for file in folder.rglob("*.py") if not LEFT_OUT & set(file.relative_to(folder).parts))
    return [file for file in files if file.is_file() and file.stat().st_size]


def stdlib_files():
    """Sorted paths of the standard library's modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = modules(folder)
    if not files:
        raise UserError(f"no source of the standard library in {folder}; use --dataset=shakespeare or --text=FILE")
    return files


def sources(config):
    """[(folder, module below it)] of the standard library, then of the packages if they are asked for."""
    paths = sysconfig.get_paths()
    listed = [(Path(paths["stdlib"]), file) for file in stdlib_files()]
    # The two folders of packages are mostly the same one, which a dict holds once.
    for folder in {paths["purelib"]: 0, paths["platlib"]: 0} if config.packages else ():
        listed += [(Path(folder), file) for file in modules(Path(folder))]
    return listed


def signature(config):
    """A value that changes when modules come, go or change their size."""
    return [(file.name, file.stat().st_size) for _, file in sources(config)]


def documents(config):
    """Yields (split, text). A file's own name decides its split, so Python versions nearly agree on it; a copy of
    another file goes where that one went."""
    side = {}  # SHA-256 of a text -> its split
    for folder, file in sources(config):
        try:
            content = text.read(file)
        except UserError:  # A package that is not in UTF-8 is no mistake of the user's.
            if not config.packages:
                raise
            continue
        held_out = hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest()[0] < 256 * text.HELD_OUT
        digest = hashlib.sha256(content.encode()).digest()
        yield side.setdefault(digest, "val" if held_out else "train"), content
