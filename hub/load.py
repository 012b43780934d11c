"""Published checkpoints in, ours out: Hugging Face folders of config.json, safetensors and tokenizer.json.

    python sample.py hf:FOLDER            or hf:OWNER/NAME, which is downloaded: wherever a run can be named
    python export.py out/rope FOLDER      a finished run as such a folder

FAMILIES maps the names that their files use to ours. What a config.json asks for and this model does not compute is an
error that names the key, and so is a tensor that has no place in it.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import posenc
from core.errors import UserError, require
from core.flags import convert
from core.settings import Config
from data import vocabulary
from model import GPT

try:
    from safetensors import SafetensorError, safe_open

    from data import tokenizer_json
except ImportError:  # an extra, requirements-hf.txt
    tokenizer_json = None

PREFIX = "hf:"
PATIENCE = 10  # seconds for the first answer of the server
TOKENIZER, WEIGHTS, INDEX = "tokenizer.json", "model.safetensors", "model.safetensors.index.json"
FILES = ("config.json", TOKENIZER, "model*.safetensors", INDEX)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_WEIGHTS = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # of older writers


@dataclass(frozen=True)
class Family:
    """How the files of one family say what GPTConfig and GPT say."""

    architecture: str  # their class
    keys: dict  # our setting -> their key, and after bars other names of it
    settings: dict  # ours that all its models have, or those without the key
    only: dict  # their key -> the value that it must have where it is given
    read: Callable  # config.json -> our settings that take more than one key
    write: Callable  # Config -> their keys for these
    modules: dict  # our module -> theirs, or those that ours has stacked; {} is the layer
    prefix: str  # of all their modules but the head; some writers leave it out
    transposed: bool = False  # matrices in their blocks are (inputs, outputs)
    by_head: bool = False  # stacked rows are a head's query, key and value, then the next head's


def unsupported(key, value):
    raise ValueError(f"{key}={value!r} is not supported")


# rope_type -> our scaling, and the keys that go with it in both
SCALINGS = {
    "default": ("none", ()),
    "linear": ("linear", ("factor",)),
    "dynamic": ("dynamic", ("factor",)),
    "yarn": ("yarn", ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")),
    "llama3": ("llama3", ("factor", "low_freq_factor", "high_freq_factor")),
    "longrope": ("longrope", ("factor", "short_factor", "long_factor", "attention_factor")),
    "proportional": ("linear", ("factor",)),  # of a share of the pairs
}
FROM_ORIGINAL = ("yarn", "llama3", "longrope")  # relative to original_max_position_embeddings


def read_rope(cfg, base="rope_theta", share="partial_rotary_factor", usual_share=1.0):
    """posenc and original_length, from `rope_parameters` or, in older files and before it, `rope_scaling` and the keys
    beside it, whose names are given."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(cfg.get(key) or {}, dict):
            unsupported(key, cfg[key])
    given = cfg.get("rope_scaling") or cfg.get("rope_parameters") or {}
    given = {key: value for key, value in given.items() if value is not None}
    kind = [given.pop(key, None) for key in ("type", "rope_type")]
    kind = kind[1] or kind[0] or "default"
    if kind not in SCALINGS:
        unsupported("rope_type", kind)
    scaling, keys = SCALINGS[kind]
    given.pop("finetuned", None)  # of YaRN's authors, who say nothing with it
    head_dim, longest = cfg["hidden_size"] // cfg["num_attention_heads"], cfg["max_position_embeddings"]
    original = given.pop("original_max_position_embeddings", longest) or longest
    original = (cfg.get("original_max_position_embeddings") or original) if kind in FROM_ORIGINAL else longest
    arguments = {"base": float(given.pop("rope_theta", cfg.get(base) or 10000.0))}
    turned = float(given.pop("partial_rotary_factor", cfg.get(share) or usual_share))
    if kind == "proportional":
        arguments["fraction"] = turned
    elif turned != 1 and usual_share == 1:  # they read the share of these families for that kind alone
        unsupported("partial_rotary_factor", turned)
    elif int(head_dim * turned) != head_dim:
        arguments["dims"] = int(head_dim * turned)
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", longest / original)
    if kind == "yarn":
        over, under = (given.pop(key, 0) for key in ("mscale", "mscale_all_dim"))
        if over and under:
            over, under = (0.1 * scale * math.log(given["factor"]) + 1 for scale in (over, under))
            given.setdefault("attention_factor", over / under)
    for key in sorted(given.keys() - set(keys)):
        unsupported(f"rope_scaling: {key}", given[key])
    require("factor" in given or kind in ("default", "proportional"), f"rope_scaling of type {kind} lacks factor")
    if scaling != "none" and (scaling, given.get("factor", 1)) != ("linear", 1):
        arguments |= {"scaling": scaling} | given
    text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {"posenc": f"rope({text})", "original_length": original if original != longest else 0}


def write_rope(config, base="rope_theta", share="partial_rotary_factor", usual_share=1.0):
    """The inverse, in the older form, which all versions of transformers read; {} for what is no rope. Arguments that
    have no place in it are left out."""
    cls, arguments = posenc.parse(config.posenc) if isinstance(config.posenc, str) else (None, {})
    if cls is not posenc.RoPE:
        return {}
    arguments = cls.checked(arguments)
    scaling, T, head_dim = arguments["scaling"], config.sizes["train_length"], config.sizes["head_dim"]
    kind = next(kind for kind, (ours, _) in SCALINGS.items() if ours == scaling)
    cfg = {base: arguments["base"]}
    if usual_share != 1:
        dims = arguments["dims"] or head_dim
        exact = int(head_dim * (dims / head_dim)) == dims  # as they compute it
        cfg[share] = dims / head_dim if exact else math.nextafter(dims / head_dim, 1)
    given = {key: arguments[key] for key in SCALINGS[kind][1] if arguments[key] or key == "truncate"}
    if arguments["fraction"] != 1:
        kind = "proportional"
        given = {"partial_rotary_factor": arguments["fraction"]} | ({"factor": arguments["factor"]} if given else {})
    # With an original length, some versions of transformers take the factor to be the quotient of the lengths.
    if kind == "llama3" or (kind in FROM_ORIGINAL and config.train_length == T * arguments["factor"]):
        cfg["original_max_position_embeddings"] = given["original_max_position_embeddings"] = T
    elif kind in ("dynamic", *FROM_ORIGINAL):
        cfg["max_position_embeddings"] = T
    return cfg if kind == "default" else cfg | {"rope_scaling": {"rope_type": kind} | given}


ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip


def read_activation(cfg, key, usual):
    theirs = cfg.get(key) or usual
    if theirs not in ACTIVATIONS:
        unsupported(key, theirs)
    return {"activation": ACTIVATIONS[theirs]}


def write_activation(config, key):
    return {key: next((theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation), None)}


def read_llama(cfg):
    wide = cfg["hidden_size"] // cfg["num_attention_heads"]
    if cfg.get("head_dim") not in (None, wide):
        unsupported("head_dim", cfg["head_dim"])
    bias = {(False, False): False, (True, False): "attention", (True, True): True}
    given = bool(cfg.get("attention_bias")), bool(cfg.get("mlp_bias"))
    if given not in bias:
        unsupported("mlp_bias", True)
    return read_rope(cfg) | {"bias": bias[given]}


def write_llama(config):
    return write_rope(config) | {"attention_bias": bool(config.bias), "mlp_bias": config.bias is True}


def megatron(block, attention):
    """The modules of a block as Megatron calls them, and those who come from it."""
    return {
        "blocks.{}.attn_norm": f"{block}.input_layernorm",
        "blocks.{}.attn.qkv": f"{block}.{attention}.query_key_value",
        "blocks.{}.attn.proj": f"{block}.{attention}.dense",
        "blocks.{}.ff_norm": f"{block}.post_attention_layernorm",
        "blocks.{}.ff.fc": f"{block}.mlp.dense_h_to_4h",
        "blocks.{}.ff.proj": f"{block}.mlp.dense_4h_to_h",
    }


NEOX_ROPE = dict(base="rotary_emb_base", share="rotary_pct", usual_share=0.25)
LAYERNORM = dict(norm="layernorm", norm_affine=True, norm_eps=1e-5, bias=True)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    keys={
        "vocab_size": "vocab_size",
        "train_length": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    settings=dict(
        norm="rmsnorm", norm_affine=True, norm_eps=1e-6, activation="swiglu", embed_norm=False, n_kv_head=0,
        tie_embeddings=False,
    ),
    only={"hidden_act": "silu"},
    read=read_llama,
    write=write_llama,
    modules={
        "token": "embed_tokens",
        "blocks.{}.attn_norm": "layers.{}.input_layernorm",
        "blocks.{}.attn.qkv": [f"layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
        "blocks.{}.attn.proj": "layers.{}.self_attn.o_proj",
        "blocks.{}.ff_norm": "layers.{}.post_attention_layernorm",
        "blocks.{}.ff.fc": ["layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"],
        "blocks.{}.ff.proj": "layers.{}.mlp.down_proj",
        "norm": "norm",
        "head": "lm_head",
    },
    prefix="model.",
)  # fmt: skip

FAMILIES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(
        LLAMA,
        architecture="Qwen2ForCausalLM",
        settings=LLAMA.settings | {"bias": "qkv"},
        only=LLAMA.only | {"use_sliding_window": False},
        read=read_rope,
        write=write_rope,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "train_length": "n_positions",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "n_hidden": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        settings=LAYERNORM | dict(posenc="learned", embed_norm=False, n_hidden=0, tie_embeddings=True),
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        read=lambda cfg: read_activation(cfg, "activation_function", "gelu_new"),
        write=lambda config: (
            write_activation(config, "activation_function") | {"n_positions": config.sizes["train_length"]}
        ),
        modules={
            "token": "wte",
            "posenc.{}": "wpe",
            "blocks.{}.attn_norm": "h.{}.ln_1",
            "blocks.{}.attn.qkv": "h.{}.attn.c_attn",
            "blocks.{}.attn.proj": "h.{}.attn.c_proj",
            "blocks.{}.ff_norm": "h.{}.ln_2",
            "blocks.{}.ff.fc": "h.{}.mlp.c_fc",
            "blocks.{}.ff.proj": "h.{}.mlp.c_proj",
            "norm": "ln_f",
            "head": "lm_head",
        },
        prefix="transformer.",
        transposed=True,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        keys={
            "vocab_size": "vocab_size",
            "train_length": "max_position_embeddings",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_embd": "hidden_size",
            "n_hidden": "intermediate_size",
            "norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
            "tie_embeddings": "tie_word_embeddings",
        },
        settings=LAYERNORM | dict(parallel_residual=True, embed_norm=False, tie_embeddings=False),
        only={"attention_bias": True},
        read=lambda cfg: read_rope(cfg, **NEOX_ROPE) | read_activation(cfg, "hidden_act", "gelu"),
        write=lambda config: write_rope(config, **NEOX_ROPE) | write_activation(config, "hidden_act"),
        modules={
            "token": "embed_in",
            **megatron("layers.{}", "attention"),
            "norm": "final_layer_norm",
            "head": "embed_out",
        },
        prefix="gpt_neox.",
        by_head=True,
    ),
    "bloom": Family(
        architecture="BloomForCausalLM",
        keys={
            "vocab_size": "vocab_size",
            "train_length": "seq_length",
            "n_layer": "n_layer|num_hidden_layers",
            "n_head": "n_head|num_attention_heads",
            "n_embd": "hidden_size|n_embed",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        settings=LAYERNORM
        | dict(posenc="alibi", activation="gelu_tanh", embed_norm=True, train_length=2048, tie_embeddings=True),
        only={"apply_residual_connection_post_layernorm": False},
        read=lambda cfg: {},
        write=lambda config: {},
        modules={
            "token": "word_embeddings",
            "token_norm": "word_embeddings_layernorm",
            **megatron("h.{}", "self_attention"),
            "norm": "ln_f",
            "head": "lm_head",
        },
        prefix="transformer.",
        by_head=True,
    ),
}


def settings_of(cfg):
    """config.json -> our settings of the model. ValueError names the key that this model does not know."""
    if cfg.get("model_type") not in list(FAMILIES):
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type={cfg.get('model_type')!r} is not supported; those that are: {known}")
    family = FAMILIES[cfg["model_type"]]
    found = dict(family.settings)
    for ours, names in family.keys.items():
        given = [cfg[name] for name in names.split("|") if cfg.get(name) is not None]
        if not given and ours not in found:
            raise ValueError(f"it lacks {names.split('|')[0]}")
        found[ours] = convert(given[0], ours, Config, names.split("|")[0]) if given else found[ours]
    require(found["n_head"] >= 1, f"n_head must be at least 1, not {found['n_head']}")
    for key, value in ({"quantization_config": None, "is_encoder_decoder": False} | family.only).items():
        if cfg.get(key) not in (None, value):
            unsupported(key, cfg[key])
    return found | family.read(cfg)


def skeleton(config):
    """{name: tensor} of the model's shapes, without memory."""
    with torch.device("meta"):
        return GPT(config, seed=None).state_dict()


def theirs(family, name):
    """The name of one of our tensors -> the names of theirs, stacked; without the prefix."""
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\d+", module)
    found = family.modules[re.sub(r"\d+", "{}", module)]
    found = found if isinstance(found, list) else [found]
    return [f"{one.format(layer[0] if layer else '')}.{leaf}" for one in found]


def relaid(family, name, tensor, n_head, back=False):
    """One of their tensors in our layout, or `back` in theirs."""
    if family.transposed and name.startswith("blocks.") and tensor.dim() == 2:
        return tensor.T.contiguous()
    if family.by_head and ".attn.qkv." in name:
        order = (3, n_head) if back else (n_head, 3)
        return tensor.unflatten(0, (*order, -1)).transpose(0, 1).flatten(0, 2)
    return tensor


class Folder:
    """The safetensors of a folder: names, shapes and tensors. UserError for what is missing or damaged."""

    def __init__(self, folder):
        self.folder, self.files = folder, {}
        if (folder / INDEX).exists():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; download it again")
        elif (folder / WEIGHTS).exists():
            names = {}
        else:
            raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats can run code and are not read")
        for file in sorted(set(names.values())) or [WEIGHTS]:
            if not (folder / file).exists():
                raise UserError(f"{folder} lacks {file}, which {INDEX} names; download it again")
            try:
                opened = safe_open(folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / file} is damaged, perhaps cut short ({error}); download it again") from None
            self.files |= dict.fromkeys(opened.keys(), opened)
        for name in names.keys() - self.files.keys():
            raise UserError(f"{folder / names[name]} lacks {name}, which {INDEX} says is in it; download it again")

    def read(self, name):
        return self.files[name].get_tensor(name)


def weights(folder, cfg, config):
    """{our name: tensor} in float32. UserError for what is missing, left over, or of another shape than config.json
    says."""
    family, stored, state, used = FAMILIES[cfg["model_type"]], Folder(folder), {}, set()
    for name, empty in skeleton(config).items():
        if name == "head.weight" and config.tie_embeddings:
            state[name] = state["token.weight"]
            continue
        names = theirs(family, name)
        names = [family.prefix + one if family.prefix + one in stored.files else one for one in names]
        for one in names:
            if one not in stored.files:
                raise UserError(f"{folder} lacks the tensor {one}; download it again")
        parts = [stored.read(one) for one in names]
        used.update(names)
        if any(part.dtype not in FLOATS for part in parts):
            raise UserError(f"{folder}: {names[0]} is of {parts[0].dtype}, and quantised weights are not supported")
        asked = list(relaid(family, name, empty, config.n_head, back=True).shape)
        rows = sum(part.shape[:1].numel() for part in parts)
        if any([rows, *part.shape[1:]] != asked or part.dim() == 0 for part in parts):
            shapes = ", ".join(f"{one} is {list(part.shape)}" for one, part in zip(names, parts, strict=True))
            raise UserError(f"{folder}: {shapes}, and config.json asks for {asked}: they do not belong together")
        state[name] = relaid(family, name, torch.cat(parts) if parts[1:] else parts[0], config.n_head).float()
    for name in sorted(stored.files.keys() - used):
        tied = config.tie_embeddings and [name] == theirs(family, "head.weight")
        tied = tied and torch.equal(stored.read(name).float(), state["token.weight"])
        if not tied and not NO_WEIGHTS.search(name):
            raise UserError(f"{folder}: the tensor {name} has no place in this {cfg['model_type']} model")
    return state


def load(name):
    """hf:FOLDER or hf:OWNER/NAME -> a state as `runs.load` gives it, after no step, and of no known corpus."""
    folder = find(name)
    cfg = read_json(folder / "config.json")
    place = f"{PREFIX}{folder.resolve()}" if is_folder(name) else name
    try:
        config = Config(**settings_of(cfg), tokenizer=place)
    except (UserError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    encoding = tokenizer_json.Tokenizer(folder / TOKENIZER, cfg.get("eos_token_id"))
    if encoding.n_vocab > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {encoding.n_vocab} tokens, and config.json's vocab_size is {config.vocab_size}: "
            "they do not belong together"
        )
    return {
        "model": weights(folder, cfg, config),
        "step": 0,
        "config": dataclasses.asdict(config),
        "tokenizer_fingerprint": vocabulary.fingerprint(encoding),
    }


def read_json(path):
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}; name a folder with {', '.join(FILES)}")
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def is_folder(name):
    place = name.removeprefix(PREFIX)
    return bool(place) and Path(place).expanduser().is_dir()


def find(name):
    """hf:FOLDER or hf:OWNER/NAME -> the folder, downloaded if need be; UserError says what to do instead."""
    if tokenizer_json is None:
        raise UserError(f"{name}: published models take more packages: pip install -r requirements-hf.txt")
    place = name.removeprefix(PREFIX)
    if is_folder(name):
        if (Path(place).expanduser() / "ckpt.pt").exists():
            raise UserError(f"{place} is a run of this program; name it without {PREFIX}")
        return Path(place).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        known = ", ".join(FILES)
        raise UserError(f"{name} is no folder; name one with {known}, or OWNER/NAME, as hf:openai-community/gpt2")
    return download(name)


@functools.cache
def download(name):
    """hf:OWNER/NAME -> the folder that huggingface_hub keeps it in. Without an answer it is what is there already."""
    from huggingface_hub import HfApi, snapshot_download

    place, refused = name.removeprefix(PREFIX), None
    try:
        HfApi().model_info(place, timeout=PATIENCE)  # the other would wait without end
    except Exception as error:  # of the network, of HTTP, of the disk: it passes on what it met
        refused = error
    try:
        return Path(snapshot_download(place, allow_patterns=FILES, local_files_only=refused is not None))
    except Exception as error:
        said = " ".join(str(refused or error).split()) or type(refused or error).__name__
        raise UserError(
            f"{name} is no folder here, and cannot be downloaded: {said.rstrip('.')}; get {', '.join(FILES)} "
            f"elsewhere, and name their folder: hf:FOLDER"
        ) from None


def load_tokenizer(name):
    folder = find(name)
    return tokenizer_json.Tokenizer(folder / TOKENIZER, read_json(folder / "config.json").get("eos_token_id"))
