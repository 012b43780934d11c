"""A finished run as a published model: a Hugging Face folder that `transformers` loads, where one of the families in
hf.py has its settings.

    python export.py out/rope FOLDER

What would be written is read back through the tables of hf.py, and what then differs stands in the way.
"""

import core.start  # noqa: F401  # isort: skip

import dataclasses
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import posenc
from core import runs
from core.errors import UserError, run
from core.flags import flags, make
from data import vocabulary
from hub import load as hf
from model import GPTConfig, make_norm

try:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
except ImportError:  # an extra, requirements-hf.txt
    pass

# What a family cannot say, other weights can, for some settings: each value's model is the next one's too.
ABSORBED = {
    "norm_affine": (False, True),  # with weights of one
    "bias": (False, "qkv", "attention", True),  # of zeros
    "embed_norm": (True, False),  # of embeddings that are normalised already
    "tie_embeddings": (True, False),  # with the head written out
}
TRAINING = ("train_length", "original_length", "init_std", "zero_init", "dropout")  # or of `posenc` alone


def explicit(config):
    """The GPTConfig with every setting spelled out, and in one way: settings for the same model are equal."""
    return dataclasses.replace(
        config, posenc=plain_posenc(config), n_kv_head=config.kv_heads, n_hidden=config.hidden,
        norm_eps=make_norm(config).eps,
    )  # fmt: skip


def plain_posenc(config):
    """Its posenc with all arguments that do something. ntk is another base, linear by 1 is nothing, and none is
    a rope that turns no pair."""
    if not isinstance(config.posenc, str):
        return config.posenc
    (cls, arguments), head_dim = posenc.parse(config.posenc), config.sizes["head_dim"]
    if cls is posenc.NoPE and head_dim % 2 == 0:
        cls, arguments = posenc.RoPE, {"fraction": 0.0}
    arguments = cls.checked(arguments)
    if cls is posenc.RoPE:
        dims, factor, scaling = arguments["dims"] or head_dim, arguments["factor"], arguments["scaling"]
        if scaling == "ntk":
            arguments |= {"base": arguments["base"] * factor ** (dims / (dims - 2)), "scaling": "none"}
        elif scaling == "linear" and factor == 1:
            arguments |= {"scaling": "none"}
        keys = next(keys for ours, keys in hf.SCALINGS.values() if ours == arguments["scaling"])
        arguments = {key: arguments[key] for key in ("base", "fraction", "scaling", *keys)} | {"dims": dims}
    elif cls is posenc.ALiBi and config.n_head.bit_count() == 1:
        arguments = {}  # both rules give the same slopes
    elif cls is posenc.Learned and arguments["overflow"] != "interpolate":
        arguments = {"overflow": arguments["overflow"]}
    said = {key: float(value) if isinstance(cls.arguments[key], float) else value for key, value in arguments.items()}
    return f"{cls.name}({', '.join(f'{key}={value!r}' for key, value in said.items())})"


def config_json(config, kind):
    """An explicit config -> what a config.json of that family can say of it."""
    family = hf.FAMILIES[kind]
    keys = {names.partition("|")[0]: getattr(config, ours) for ours, names in family.keys.items()}
    return {"model_type": kind, "architectures": [family.architecture]} | keys | family.write(config)


def differences(config, kind):
    """(obstacles, absorbed): the settings that this family reads back as another model's, and of those that other
    weights make up for. None where its encoding does not even fit the heads."""
    try:
        read = explicit(GPTConfig(**hf.settings_of(config_json(config, kind))))
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


def choose(config):
    """The family that says most of a config, and its config.json. UserError names the settings in its way."""
    try:
        said = explicit(config)
    except (ValueError, ArithmeticError) as error:  # a base beyond all numbers
        raise UserError(f"posenc={config.posenc!r} cannot be written: {error}") from None
    # Of a qwen2 folder, transformers 5 splits text by Qwen2's own rule, whatever tokenizer.json says: llama will do.
    kinds = [kind for kind in hf.FAMILIES if kind != "qwen2" or config.tokenizer.startswith(hf.PREFIX)]
    found = {kind: pair for kind in kinds if (pair := differences(said, kind)) is not None}
    kind = min(found, key=lambda kind: [len(names) for names in found[kind]])
    obstacles, absorbed = found[kind]
    if obstacles:
        what = ", ".join(f"{key}={getattr(config, key)!r}" for key in obstacles)
        raise UserError(f"no published family has models with these settings; the nearest is {kind}, but for {what}")
    if "embed_norm" in absorbed:
        said = dataclasses.replace(said, tie_embeddings=False)  # the head did not meet the norm
    return kind, config_json(said, kind)


def unstacked(tensor, name, count, config):
    """One of our tensors -> those that it stacks."""
    if count == 1:
        return [tensor]
    heads = [config.n_head, config.kv_heads, config.kv_heads]
    width = config.n_embd // config.n_head
    return tensor.split([width * n for n in heads] if ".attn.qkv." in name else len(tensor) // count)


@torch.no_grad()
def their_weights(model, kind, written):
    """{their name: tensor}, of a model whose settings are written where its own differ by ABSORBED alone."""
    family, ours, config, state = hf.FAMILIES[kind], model.state_dict(), model.config, {}
    for name, empty in hf.skeleton(written).items():
        if name == "head.weight" and written.tie_embeddings:
            continue
        usual = torch.zeros if name.endswith("bias") else torch.ones  # where we have none
        tensor = ours[name].float() if name in ours else usual(empty.shape)
        if config.embed_norm and not written.embed_norm and name.startswith(("token.", "posenc.")):
            tensor = model.token_norm(tensor)
        tensor, names = hf.relaid(family, name, tensor, config.n_head, back=True), hf.theirs(family, name)
        for one, part in zip(names, unstacked(tensor, name, len(names), config), strict=True):
            state[one if name.startswith("head.") else family.prefix + one] = part.clone()  # no two share memory
    return state


@dataclass
class Options:
    usage: ClassVar[str] = "python export.py RUN FOLDER [--posenc=...]"

    posenc: str | list = ""  # arguments for the run's encoding, such as a scaling, to be written with it


def main(argv):
    paths, given = flags(argv, Options)
    options = make(Options, given)
    if len(paths) != 2:
        raise UserError(f"name a run and a folder to write; usage: {Options.usage}")
    folder = Path(paths[1]).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a new folder")
    if hf.tokenizer_json is None:
        raise UserError("writing a Hugging Face folder takes more packages: pip install -r requirements-hf.txt")
    opened = runs.open_run(paths[0], override=options.posenc)
    kind, cfg = choose(opened.config)
    written = GPTConfig(**hf.settings_of(cfg))
    inner, end = hf.tokenizer_json.inner(opened.tokenizer), opened.tokenizer.eot_token
    ends = {"bos_token": (vocabulary.begin(opened.tokenizer) or [end])[0], "eos_token": end}
    cfg |= {f"{key}_id": id for key, id in ends.items()} | {"pad_token_id": None, "torch_dtype": "float32"}
    about = {key: inner.id_to_token(id) for key, id in ends.items()}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": written.train_length}
    about |= {"clean_up_tokenization_spaces": False}

    part = Path(f"{folder.resolve()}.part")  # renamed when whole; what a kill left there is written anew
    part.mkdir(parents=True, exist_ok=True)
    (part / hf.TOKENIZER).write_text(inner.to_str(pretty=True))
    runs.write_json(part / "tokenizer_config.json", about)
    runs.write_json(part / "config.json", cfg)
    try:
        save_file(their_weights(opened.model, kind, written), part / hf.WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # of the disk too
        raise UserError(f"{part / hf.WEIGHTS} cannot be written: {error}") from None
    shutil.copymode(part / "config.json", part / hf.WEIGHTS)  # it is written for its owner alone
    if folder.exists():
        folder.rmdir()
    part.rename(folder)
    print(f"{folder}: {cfg['architectures'][0]}, for AutoModelForCausalLM and AutoTokenizer.from_pretrained")
    print("next:", shlex.join(["python", "sample.py", f"{hf.PREFIX}{folder}", "--prompt=..."]))


if __name__ == "__main__":
    run(main)
