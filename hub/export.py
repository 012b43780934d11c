"""A finished run as a published model: a Hugging Face folder that `transformers` loads, where one of the families in
families.py has its settings.

    python -m hub.export out/rope FOLDER

The config.json that would be written is read back through the tables of families.py; a setting that comes back as
another model's stands in the way.
"""

import core.start  # noqa: F401  # isort: skip

import contextlib
import dataclasses
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import posenc
from core import files, runs
from core.errors import UserError, run
from core.flags import flags, make
from data import vocabulary
from hub import load
from hub.families import FAMILIES, relaid, settings_of, skeleton, theirs
from hub.rope import LARGEST, SCALINGS
from model import GPTConfig, make_norm

try:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from data import tokenizer_json
except ImportError:  # They are an extra, requirements-hf.txt.
    pass

# Where a family cannot say a setting, other weights can: a model with one of these values is one with the next, too.
ABSORBED = {
    "norm_affine": (False, True),  # with weights of one
    "bias": (False, "qkv", "attention", True),  # with biases of zero
    "embed_norm": (True, False),  # with embeddings that are normalised already
    "tie_embeddings": (True, False),  # with the head written out
}
# Settings that training alone knows, or that `posenc` and the sizes say already.
TRAINING = ("train_length", "original_length", "init_std", "zero_init", "dropout")


def explicit(config):
    """The GPTConfig with every setting spelled out, and in one way: settings for the same model are equal."""
    return dataclasses.replace(
        config, posenc=plain_posenc(config), n_kv_head=config.kv_heads, n_hidden=config.hidden,
        norm_eps=make_norm(config).eps,
    )  # fmt: skip


def plain_posenc(config):
    """A config's posenc with all arguments that do something. A list over the layers whose members are then all the
    same is one of them."""
    listed = [config.posenc] if isinstance(config.posenc, str) else config.posenc
    plain = []
    for member in listed:
        try:
            plain.append(plain_member(member, config))
            posenc.parse(plain[-1])
        except (ValueError, ArithmeticError) as error:  # a base beyond all numbers
            raise UserError(f"posenc: {member} cannot be written: {error}") from None
    return plain[0] if len(set(plain)) == 1 else plain


def plain_member(member, config):
    """One encoding with all arguments that do something: ntk is another base, linear by 1 is nothing, and none is a
    rope that turns no pair."""
    (cls, arguments, layer), head_dim = posenc.parse(member), config.sizes["head_dim"]
    if cls is posenc.NoPE and head_dim % 2 == 0:
        cls, arguments = posenc.RoPE, {"fraction": 0.0}
    arguments = cls.checked(arguments)
    if cls is posenc.RoPE:
        dims, factor, scaling = arguments["dims"] or head_dim, arguments["factor"], arguments["scaling"]
        if scaling == "ntk":
            arguments |= {"base": arguments["base"] * factor ** (dims / (dims - 2)), "scaling": "none"}
        elif scaling == "linear" and factor == 1:
            arguments |= {"scaling": "none"}
        keys = next(keys for ours, keys in SCALINGS.values() if ours == arguments["scaling"])
        ours_alone = [key for key in ("cut", "clip", "values", "learned") if arguments[key]]
        said = ("base", "fraction", "scaling", *keys, *ours_alone)
        arguments = {key: arguments[key] for key in said} | {"dims": dims}
    elif cls is posenc.ALiBi and config.n_head.bit_count() == 1 and arguments["slopes"] == "paper":
        arguments |= {"slopes": "authors"}  # both rules give the same slopes
    elif cls is posenc.Learned and arguments["overflow"] != "interpolate":
        arguments = {"overflow": arguments["overflow"]}
    for key, value in arguments.items():
        arguments[key] = float(value) if isinstance(cls.arguments[key], float) else value
    return posenc.written(cls, arguments, layer)


def config_json(config, kind):
    """An explicit config -> what a config.json of that family can say of it."""
    family = FAMILIES[kind]
    keys = {names.partition("|")[0]: getattr(config, ours) for ours, names in family.keys.items()}
    return {"model_type": kind, "architectures": [family.architecture]} | keys | family.write(config)


def differences(config, kind):
    """(obstacles, absorbed): the settings that this family reads back as another model's, and of those that other
    weights make up for. None where its encoding does not even fit the heads."""
    try:
        read = explicit(GPTConfig(**settings_of(config_json(config, kind))))
    except ValueError:
        return None
    obstacles, absorbed = [], []
    for key in (field.name for field in dataclasses.fields(GPTConfig) if field.name not in TRAINING):
        pair = getattr(config, key), getattr(read, key)
        if pair[0] != pair[1]:
            order = ABSORBED.get(key, ())
            fits = all(value in order for value in pair) and order.index(pair[0]) < order.index(pair[1])
            (absorbed if fits else obstacles).append(key)
    return obstacles, absorbed


def in_the_way(config, said, kind):
    """Of a list over the layers, the first member that the family has not, and why. `said` is `explicit(config)`."""
    settings = {field.name: getattr(said, field.name) for field in dataclasses.fields(GPTConfig)}
    for layer, member in enumerate(said.posenc):
        cls, arguments, own = posenc.parse(member)
        alone = differences(GPTConfig(**settings | {"posenc": posenc.written(cls, arguments)}), kind)
        if any(own.values()):
            why = f"its layers have no {' and no '.join(key for key in own if own[key])} of their own"
        elif alone is None or "posenc" in alone[0]:
            why = "it has no such encoding"
        elif member != said.posenc[0]:
            why = "its layers share one encoding"
        else:
            continue
        return f"layer {layer + 1}'s {config.posenc[layer]} ({why})"


def choose(config):
    """The family that says most of a config, and its config.json. UserError names the settings in its way."""
    said = explicit(config)
    # Of a qwen2 folder, transformers 5 splits text by Qwen2's own rule, whatever tokenizer.json says: llama will do.
    kinds = [kind for kind in FAMILIES if kind != "qwen2" or vocabulary.published(config.tokenizer)]
    by_kind = {kind: pair for kind in kinds if (pair := differences(said, kind)) is not None}
    if not by_kind:
        raise UserError(f"no published family has models of these sizes: they go to {LARGEST}")
    kind = min(by_kind, key=lambda kind: [len(keys) for keys in by_kind[kind]])
    obstacles, absorbed = by_kind[kind]
    if obstacles:
        named = {key: f"{key}={getattr(config, key)!r}" for key in obstacles}
        if "posenc" in named and not isinstance(said.posenc, str):
            named["posenc"] = in_the_way(config, said, kind)
        names = ", ".join(named.values())
        raise UserError(f"no published family has models with these settings; the nearest is {kind}, but for {names}")
    if "embed_norm" in absorbed:
        said = dataclasses.replace(said, tie_embeddings=False)  # the head did not meet the norm
    return kind, config_json(said, kind)


def unstacked(tensor, name, count, config):
    """One of our tensors -> the `count` of theirs that it stacks."""
    if count == 1:
        return [tensor]
    heads = [config.n_head, config.kv_heads, config.kv_heads]
    width = config.n_embd // config.n_head
    return tensor.split([width * n for n in heads] if ".attn.qkv." in name else len(tensor) // count)


@torch.no_grad()
def their_weights(model, kind, written):
    """{their name: tensor} of a model, in the family `kind`, for a config.json that says `written`. The GPTConfigs
    `written` and model.config differ by ABSORBED alone."""
    family, ours, config, state = FAMILIES[kind], model.state_dict(), model.config, {}
    for name, empty in skeleton(written).items():
        if name == "head.weight" and written.tie_embeddings:
            continue
        neutral = torch.zeros if name.endswith("bias") else torch.ones  # for a tensor that we have not
        tensor = ours[name].float() if name in ours else neutral(empty.shape)
        if config.embed_norm and not written.embed_norm and name.startswith(("token.", "posenc.")):
            tensor = model.token_norm(tensor)
        tensor, names = relaid(family, name, tensor, config.n_head, back=True), theirs(family, name)
        prefix = "" if name == "head.weight" else family.prefix
        for their_name, part in zip(names, unstacked(tensor, name, len(names), config), strict=True):
            state[prefix + their_name] = part.clone()  # No two share memory.
    return state


# The command.


@dataclass
class Options:
    """The flags of this command."""

    usage: ClassVar[str] = "python -m hub.export RUN FOLDER [--posenc=...]"

    posenc: str | list = ""  # arguments for the run's encoding, such as a scaling, to be written with it


def tokenizer_keys(tokenizer):
    """The entries about a tokenizer in config.json, and those in tokenizer_config.json."""
    inner, ends = tokenizer_json.inner(tokenizer), vocabulary.ends(tokenizer)
    begin = [*vocabulary.begin(tokenizer), ends[0]][0]
    texts = {"bos_token": inner.id_to_token(begin), "eos_token": inner.id_to_token(ends[0])}
    about = texts | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ids = {"bos_token_id": begin, "eos_token_id": ends if ends[1:] else ends[0], "pad_token_id": None}
    return ids, about


@contextlib.contextmanager
def whole(folder):
    """A new folder beside `folder`, an empty one or none, which gets its name when the block has ended. A kill leaves a
    hidden folder that nothing uses, and the next one removes. UserError where another process writes it now."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    locked, part = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("lock", "part"))
    lock = files.lock(locked)
    if lock is None:
        raise UserError(f"another process writes {folder}: wait for its end, or name another folder")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        yield part
        files.flush_folder(part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, f"{folder}/{Path(error.filename or '').name}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows keeps a file that is open.
            locked.unlink()
        lock.release()


def write(folder, opened, kind, cfg):
    """Write an open run as a folder of the family `kind` with that config.json, which appears when it is whole."""
    written = GPTConfig(**settings_of(cfg))
    ids, about = tokenizer_keys(opened.tokenizer)
    with whole(folder) as part:
        runs.write_whole(part / vocabulary.FILE, tokenizer_json.inner(opened.tokenizer).to_str(pretty=True))
        runs.write_json(part / "tokenizer_config.json", about | {"model_max_length": written.train_length})
        runs.write_json(part / "config.json", cfg | ids | {"torch_dtype": "float32"})
        try:
            save_file(their_weights(opened.model, kind, written), part / load.WEIGHTS, {"format": "pt"})
        except SafetensorError as error:  # What the disk refuses comes as one too.
            raise UserError(f"{folder / load.WEIGHTS} cannot be written: {error}") from None
        shutil.copymode(part / "config.json", part / load.WEIGHTS)  # safetensors lets its owner alone read it.


def main(argv):
    paths, settings = flags(argv, Options)
    options = make(Options, settings)
    if len(paths) != 2:
        raise UserError(f"name a run and a folder to write; usage: {Options.usage}")
    folder = Path(paths[1]).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a new folder")
    if load.tokenizer_json is None:
        raise UserError("writing a Hugging Face folder takes more packages: pip install -r requirements-hf.txt")
    opened = runs.open_run(paths[0], override=options.posenc)
    kind, cfg = choose(opened.config)
    write(folder, opened, kind, cfg)
    print(f"{folder}: {cfg['architectures'][0]}, for AutoModelForCausalLM and AutoTokenizer.from_pretrained")
    print("next:", shlex.join(["python", "sample.py", f"{runs.PUBLISHED}{folder}", "--prompt=..."]))


if __name__ == "__main__":
    run(main)
