"""dataset = "text": files or folders of the user's own, UTF-8. Every file is a document."""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from core.errors import UserError

HELD_OUT = 0.1  # of the text goes to validation


def named(config):
    """The files and folders that `text` names, as list of Path."""
    paths = [config.text] if isinstance(config.text, str) else config.text
    return [Path(os.path.expanduser(path)) for path in paths]


def find(paths):
    """Files, and folders with all that is in them (hidden files apart) -> sorted list of Path."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            files += [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def read(path):
    """The text of a file, line ends as they are. UserError names the file and the place that is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it or leave it out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def files(config):
    """The files that dataset = "text" consists of. UserError where there is no text in them."""
    paths = find(named(config))
    for path in paths:
        if not path.exists():
            raise UserError(f"--text: no file or folder {path}")
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"--text: {', '.join(map(str, named(config)))}: nothing but empty files")
    return paths


def signature(config):
    """A value that changes whenever the corpus may have changed."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files(config)]


def documents(config):
    """Yields (split, text). Whole files are held out where there are enough of them, otherwise the end of each file. A
    file in a folder that is no text is left out, with a line that says so; one that is named itself is a UserError."""
    texts, refused = [], []
    for file in files(config):
        try:
            texts += [file] if read(file) else []
        except UserError as error:
            if file in named(config):
                raise
            refused.append(str(error))
    if refused:
        tqdm.write(f"--text: {len(refused)} of its files left out; the first: {refused[0]}", file=sys.stderr)
    if not texts:
        raise UserError(f"--text: {', '.join(map(str, named(config)))}: no file in it is UTF-8 text")
    every = round(1 / HELD_OUT)
    for index, file in enumerate(texts):
        text = read(file)
        if len(texts) >= 2 * every:
            yield "val" if index % every == every // 2 else "train", text
        else:
            yield from cut(text, HELD_OUT)


def cut(text, share):
    """One text -> its first part for training, its last `share` for validation."""
    border = int(len(text) * (1 - share))
    yield "train", text[:border]
    yield "val", text[border:]
