"""Published models as runs: a Hugging Face folder of config.json, safetensors and tokenizer.json becomes a run folder.

    python sample.py hf:FOLDER            hf:OWNER/NAME is downloaded; both stand wherever a run can be named

That happens once, into out/hf/; from then on the run is read, until its source changes. Weights stay in the dtype that
they were published in. A tensor that is missing, left over or of another shape than config.json says is a UserError.
"""

import functools
import hashlib
import os
import re
import sys
from pathlib import Path, PureWindowsPath

import torch

from core import files, runs
from core.errors import UserError, brief
from core.settings import Config
from data import vocabulary
from hub.families import FAMILIES, relaid, settings_of, skeleton, theirs

try:
    from safetensors import SafetensorError, safe_open

    from data import tokenizer_json
except ImportError:  # They are an extra, requirements-hf.txt.
    tokenizer_json = None

FORMAT = 2  # of the runs that are made here: under another number they are made anew
OUT = Path("out/hf")  # where the runs made from published models lie
PATIENCE = 10  # seconds for the first answer of the server
CONFIG, TOKENIZER = "config.json", vocabulary.FILE
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (CONFIG, TOKENIZER, "model*.safetensors", INDEX)
NAME_A_FOLDER = f"name a folder with {', '.join(FILES)}"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_WEIGHTS = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # of older writers


# From a name to a run folder.


def as_run(name):
    """hf:FOLDER or hf:OWNER/NAME -> its run folder, which is made where it is missing, and made anew where the source
    has changed. One whose source is gone stays as it is. UserError where none can be made, with what to do."""
    folder = local_run(name)
    if not is_folder(name):
        if (folder / runs.SOURCE).exists():
            return folder
        folder = OUT / name.removeprefix(runs.PUBLISHED).replace("/", "--")
    made = (folder / runs.SOURCE).exists()
    try:
        source = find(name)
    except UserError:
        if made and not is_folder(name):
            return folder
        raise
    if runs.read_json(folder / runs.SOURCE) == record(source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = files.lock(f"{folder}.lock", wait=True)
    try:
        if runs.read_json(folder / runs.SOURCE) != record(source):  # Another process may have been faster.
            convert(source, folder)
            said = f"has changed: the run {folder} is made anew" if made else f"is now the run {folder}"
            print(f"{name} {said}", file=sys.stderr)
    finally:
        lock.release()
    return folder


def is_folder(name):
    """Whether hf:... names a folder that is there."""
    path = name.removeprefix(runs.PUBLISHED)
    return bool(path) and Path(path).expanduser().is_dir()


def local_run(name):
    """Where the run made from hf:FOLDER lies. A key of the whole path tells apart folders of one name."""
    path = Path(name.removeprefix(runs.PUBLISHED)).expanduser().resolve()
    return OUT / f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def record(source):
    """What tells one state of a source folder from another, as plain values: sizes and times of the files that are
    read, and the index of the tensors."""
    index = weight_map(source)
    stats = {}
    about_ends = (tokenizer_json.GENERATION, tokenizer_json.END)
    for name in sorted({CONFIG, TOKENIZER, *about_ends, *(index.values() or {WEIGHTS})}):
        path = source / name
        stats[name] = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
    return {"format": FORMAT, "folder": str(source.resolve()), "files": stats, "index": index}


def convert(source, folder):
    """Make the run folder from the source folder."""
    recorded, cfg = record(source), tokenizer_json.read_object(source / CONFIG, NAME_A_FOLDER)
    for name in recorded["files"]:
        check_content(source / name)
    try:
        with torch.device("meta"):  # The sizes are not known to fit the weights yet.
            config = Config(**settings_of(cfg), tokenizer=TOKENIZER)
    except (UserError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{source / CONFIG}: {error}") from None
    tokenizer = tokenizer_json.load(source / TOKENIZER)
    check_vocabulary(tokenizer, config.vocab_size)
    checkpoint = {"model": weights(source, cfg, config), "step": 0, "config": runs.plain(config)}
    checkpoint["tokenizer_fingerprint"] = vocabulary.fingerprint(tokenizer)
    # The record of the source is written last: until then a kill leaves a folder that the next try fills anew. Other
    # files in it, such as measurements, stay.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.SOURCE).unlink(missing_ok=True)
    (folder / runs.CKPT).unlink(missing_ok=True)
    tokenizer_json.copy(tokenizer, folder)
    runs.write_json(folder / CONFIG, checkpoint["config"])
    runs.save(folder, runs.CKPT, checkpoint)
    runs.write_json(folder / runs.SOURCE, recorded)


def check_vocabulary(tokenizer, rows):
    """UserError for a tokenizer with more tokens than the table of embeddings has rows."""
    count = tokenizer.n_vocab
    if count > rows:
        raise UserError(
            f"{tokenizer.path} has {count} tokens, and {CONFIG}'s vocab_size is {rows}: remove those from id {rows} "
            f"on, or give the model rows for them, in transformers: model.resize_token_embeddings({count}); "
            "model.save_pretrained(FOLDER)"
        )


# Finding a source.


def find(name):
    """hf:FOLDER or hf:OWNER/NAME -> the source folder, downloaded if need be. UserError says what to do instead."""
    if tokenizer_json is None:
        raise UserError(f"{name}: published models take more packages: pip install -r requirements-hf.txt")
    place = name.removeprefix(runs.PUBLISHED)
    if is_folder(name):
        if (Path(place).expanduser() / runs.CKPT).exists():
            raise UserError(f"{place} is a run of this program; name it without {runs.PUBLISHED}")
        return Path(place).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        known = ", ".join(FILES)
        raise UserError(f"{name} is no folder; name one with {known}, or OWNER/NAME, as hf:openai-community/gpt2")
    return download(name)


@functools.cache
def download(name):
    """hf:OWNER/NAME -> the folder that huggingface_hub keeps it in. Without an answer it is what is there already."""
    from huggingface_hub import HfApi, snapshot_download

    repository, refused = name.removeprefix(runs.PUBLISHED), None
    try:
        HfApi().model_info(repository, timeout=PATIENCE)  # snapshot_download alone would wait without end.
    except Exception as error:  # It passes on what it meets in the network, in HTTP and on the disk.
        refused = error
    try:
        wanted = [*FILES, tokenizer_json.GENERATION]
        return Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=refused is not None))
    except Exception as error:
        said = " ".join(str(refused or error).split()) or type(refused or error).__name__
        raise UserError(
            f"{name} is no folder here, and cannot be downloaded: {said.rstrip('.')}; get {', '.join(FILES)} "
            f"elsewhere, and name their folder: hf:FOLDER"
        ) from None


# Reading its files.


def check_content(path):
    """UserError for a damaged file in the cache of huggingface_hub, whose links lead to large files that are called by
    their SHA-256. No other folder says what its files should hold."""
    content = path.resolve()
    if content.is_file() and re.fullmatch("[0-9a-f]{64}", content.name):
        with content.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != content.name:
                raise UserError(f"{path} is damaged; remove {content}, and it is downloaded again")


def weight_map(source):
    """{tensor: the file it is in} where the weights lie in several files; {} where they lie in one, which goes before
    an index that an earlier version of the model left behind. UserError for an index that leads out of the folder."""
    if (source / WEIGHTS).exists() or not (source / INDEX).exists():
        return {}
    index = tokenizer_json.read_object(source / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{source / INDEX} has no weight_map from tensors to files; download it again")
    for file in index.values():
        path = PureWindowsPath(file)  # It knows the separators and roots of all systems.
        text = file.isprintable() and len(file) <= 255  # What is no character, or half a one, is not printable.
        if path.anchor or ".." in path.parts or not path.name or not text:
            raise UserError(f"{source / INDEX} names {brief(file)!r}, no file in its folder; download it again")
    return index


def open_weights(source):
    """{tensor: the open safetensors file it is in}. UserError for what is missing or damaged."""
    index, opened = weight_map(source), {}
    if not index and not (source / WEIGHTS).exists():
        raise UserError(f"{source} has neither {WEIGHTS} nor {INDEX}; other formats can run code and are not read")
    for name in sorted(set(index.values())) or [WEIGHTS]:
        tokenizer_json.require_file(source / name, f"{f'{INDEX} names it; ' if index else ''}download it again")
        try:
            file = safe_open(source / name, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source / name} is damaged, perhaps cut short ({error}); download it again") from None
        # Where several files hold a tensor, the index says whose it is.
        held = file.keys()
        opened |= {tensor: file for tensor in held if index.get(tensor, name) == name}
    for tensor in index.keys() - opened.keys():
        raise UserError(f"{source / index[tensor]} lacks {tensor}, which {INDEX} says is in it; download it again")
    return opened


def weights(source, cfg, config):
    """{our name: tensor}, in the dtype of the files. UserError for what is missing, left over, or of another shape than
    config.json says."""
    family, opened, state, used = FAMILIES[cfg["model_type"]], open_weights(source), {}, set()
    if config.n_layer > len(opened):
        layers = f"config.json asks for {config.n_layer} layers, and the files have {len(opened)} tensors"
        raise UserError(f"{source}: {layers}: they do not belong together")
    for name, empty in skeleton(config).items():
        if name == "head.weight" and config.tie_embeddings:
            state[name] = state["token.weight"]
            continue
        names = [family.prefix + part if family.prefix + part in opened else part for part in theirs(family, name)]
        for part in names:
            if part not in opened:
                raise UserError(f"{source} lacks the tensor {part}; download it again")
        used.update(names)
        parts = [floats(source, opened, part) for part in names]
        check_parts(source, dict(zip(names, parts, strict=True)), relaid(family, name, empty, config.n_head, back=True))
        state[name] = relaid(family, name, torch.cat(parts) if parts[1:] else parts[0], config.n_head)
    for name in sorted(opened.keys() - used):
        tied = config.tie_embeddings and [name] == theirs(family, "head.weight")
        tied = tied and torch.equal(floats(source, opened, name).float(), state["token.weight"].float())
        if not tied and not NO_WEIGHTS.search(name):
            raise UserError(f"{source}: the tensor {name} has no place in this {cfg['model_type']} model")
    return state


def floats(source, opened, name):
    """A tensor of the open files. UserError for one of another dtype than floats have."""
    try:
        tensor = opened[name].get_tensor(name)
        dtype = tensor.dtype
    except SafetensorError as error:  # of a dtype that torch has not
        dtype = error
    if dtype not in FLOATS:
        raise UserError(f"{source}: {name} is of {dtype}, and quantised weights are not supported")
    return tensor


def check_parts(source, parts, expected):
    """UserError unless {name: tensor}, stacked, are of the expected tensor's shape."""
    shape, rows = list(expected.shape), sum(part.shape[:1].numel() for part in parts.values())
    if any(part.dim() == 0 or [rows, *part.shape[1:]] != shape for part in parts.values()):
        shapes = ", ".join(f"{name} is {list(part.shape)}" for name, part in parts.items())
        raise UserError(f"{source}: {shapes}, and config.json asks for {shape}: they do not belong together")
