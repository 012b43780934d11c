"""dataset = "text": files or folders of the user's own, UTF-8. Every file is a document."""

import codecs
import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.errors import UserError

HELD_OUT = 0.1  # of the text goes to validation
NEAR = 0.25  # whole files may miss that by such a share of it, or the end of every file is held out
ENOUGH = 20  # files from which on whole ones are held out: of fewer, one or two would speak for all
BLOCK = 1 << 20  # bytes read at once

# A folder that holds one of these sets of files was written by a program of ours, and is no text.
OURS = (
    {"train.lock"},
    {"ckpt.pt"},
    {"best.pt"},
    {"results.json", "results.md"},
    {"frequencies.json"},
    {"train.bin", "meta.json"},
)


@dataclass
class Document:
    """A file of text."""

    path: Path
    characters: int
    digest: bytes  # the same for the same text


def named(config):
    """The files and folders that `text` names, as list of Path."""
    paths = [config.text] if isinstance(config.text, str) else config.text
    return [Path(os.path.expanduser(path)) for path in paths]


def find(paths, own=()):
    """Files, and folders with all files in them, in order -> (list of Path, Counter of what was left out of folders:
    hidden files and folders, runs and token folders, and the folders `own`, set of resolved Path). UserError for a pipe
    or a device that is named, which might be waited for for ever."""
    files, left_out = [], Counter()
    for path in map(Path, paths):
        if not path.is_dir():
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is a pipe or a device; write what comes from it to a file, and name that")
            files.append(path)
            continue
        inside = []
        for folder, folders, names in os.walk(path):
            ours = [name for name in folders if is_ours(Path(folder, name), own)]
            hidden = [name for name in (*folders, *names) if name.startswith(".")]
            folders[:] = sorted({*folders} - {*ours, *hidden})
            left_out += Counter({"folders of runs and tokens": len(ours), "hidden files and folders": len(hidden)})
            inside += [Path(folder, name) for name in {*names} - {*hidden}]
        files += [file for file in sorted(inside) if file.is_file()]
    return list(dict.fromkeys(files)), left_out


def is_ours(folder, own):
    """Whether a folder is one of `own`, or a program of ours writes into it: a run, a comparison, tokens."""
    try:
        names = set(os.listdir(folder))
    except OSError:  # What cannot be listed holds nothing to read.
        return False
    return folder.resolve() in own or (folder / "logs" / "train.lock").exists() or any(mark <= names for mark in OURS)


def pieces(path, begin=0, end=None):
    """The characters begin ... end of a file, line ends as they are, yielded in pieces. UserError names the file, and
    the place that is not UTF-8."""
    decoder, read, characters = codecs.getincrementaldecoder("utf-8")(), 0, 0
    try:
        with open(path, "rb") as file:
            block = b" "
            while block and (end is None or characters < end):
                held = len(decoder.getstate()[0])
                block = file.read(BLOCK)
                text = decoder.decode(block, final=not block)
                yield text[max(0, begin - characters) : None if end is None else end - characters]
                read, characters = read + len(block), characters + len(text)
    except UnicodeDecodeError as error:
        place = f"byte {read - held + error.start}: {error.reason}"
        raise UserError(f"{path} is not UTF-8 text ({place}); convert it or leave it out") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read(path):
    """The text of a file, line ends as they are. UserError as `pieces` says."""
    return "".join(pieces(path))


def found(config):
    """(files that dataset = "text" consists of, Counter of what was left out). UserError where there is no text in
    them, or what is named is not there."""
    own = {Path(config.data_dir, name).resolve() for name in ("tokens", "raw")}
    out_dir = getattr(config, "out_dir", "")
    for path in named(config):
        if path.is_dir() and ((out_dir and path.resolve() == Path(out_dir).resolve()) or is_ours(path, ())):
            raise UserError(f"--text={path}: the run's own files go there; choose another folder with --out_dir")
    paths, left_out = find(named(config), own)
    for path in paths:
        if not path.exists():
            raise UserError(f"--text: no file or folder {path}")
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"--text: {', '.join(map(str, named(config)))}: nothing but empty files")
    return paths, left_out


def signature(config):
    """A value that changes whenever the corpus may have changed."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found(config)[0]]


def survey(path, whole):
    """The Document of a file, read once in pieces. UserError for what is no text; null bytes are text in a file that
    is taken as a `whole`, whatever is in it, alone."""
    characters, digest = 0, hashlib.sha256()
    for piece in pieces(path):
        if "\0" in piece and not whole:
            raise UserError(f"{path} holds null bytes")
        characters += len(piece)
        digest.update(piece.encode())
    return Document(path, characters, digest.digest())


def documents(config):
    """Yields (split, pieces of text). A tenth of the text is held out: whole files where enough of them come near that,
    otherwise the end of each file. Files with the same text go to the same side. A file in a folder that is no text is
    left out, with a line that says so; one that is named itself is a UserError."""
    (paths, left_out), texts, refused = found(config), [], []
    for path in paths:
        try:
            texts.append(survey(path, whole=path in named(config)))
        except UserError as error:
            if path in named(config):
                raise
            refused.append(str(error))
    left_out["files that are no text"] = len(refused)
    if said := [f"{what} ({count})" for what, count in left_out.items() if count]:
        first = f"; the first: {refused[0]}" if refused else ""
        tqdm.write(f"--text: left out: {', '.join(said)}{first}", file=sys.stderr)
    texts = [text for text in texts if text.characters]
    if not texts:
        raise UserError(f"--text: {', '.join(map(str, named(config)))}: no file in it is UTF-8 text")
    held_out = choose(texts)
    for text in texts:
        if held_out:
            yield "val" if text.digest in held_out else "train", pieces(text.path)
        else:
            border = int(text.characters * (1 - HELD_OUT))
            yield "train", pieces(text.path, 0, border)
            yield "val", pieces(text.path, border)


def choose(texts):
    """Documents -> the digests of those to hold out whole, which have HELD_OUT of all characters; empty where no whole
    ones come NEAR that. The digests give the order of choice, as good as chance and the same everywhere."""
    sizes = Counter()
    for text in texts:
        sizes[text.digest] += text.characters
    wanted, chosen, size = HELD_OUT * sizes.total(), set(), 0
    for digest in sorted(sizes):
        if abs(size + sizes[digest] - wanted) < abs(size - wanted):
            chosen.add(digest)
            size += sizes[digest]
    return chosen if abs(size - wanted) <= NEAR * wanted and len(texts) >= ENOUGH else set()


def cut(text, share):
    """One text -> its first part for training, its last `share` for validation."""
    border = int(len(text) * (1 - share))
    yield "train", text[:border]
    yield "val", text[border:]
