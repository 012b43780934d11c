"""The families of published models: how the files of each say what GPTConfig and GPT say. Tables and pure functions.

FAMILIES maps the names that config.json and the tensors have in a family to ours; hub/load.py reads by it, and
hub/export.py writes by it. A key of config.json that asks for what this model does not compute is a ValueError that
names the key.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from core.errors import brief, require
from core.flags import convert
from core.settings import Config
from hub.rope import LARGEST, read_rope, unsupported, write_rope
from model import GPT


@dataclass(frozen=True)
class Family:
    """How the files of one family say what GPTConfig and GPT say."""

    architecture: str  # the name of their class
    keys: dict  # our setting -> their key, with older names of it behind bars
    settings: dict  # our settings that all its models have, and those of a model whose file lacks the key
    only: dict  # their key -> the one value that is supported, where the key is there
    read: Callable  # config.json -> our settings that take more than one key
    write: Callable  # Config -> their keys for these
    modules: dict  # our module -> theirs, or a list of theirs where ours has them stacked; {} is the layer
    prefix: str  # stands before all of their modules but the head, and some writers leave it out
    transposed: bool = False  # matrices in their blocks are (inputs, outputs)
    by_head: bool = False  # rows of their stacked matrix are a head's query, key and value, then the next head's


# Settings that take more than one key.

# their activation -> ours
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip


def read_activation(cfg, key, usual):
    """config.json's `key`, or `usual` where it is not there -> our `activation`."""
    name = usual if cfg.get(key) is None else cfg[key]
    if name not in list(ACTIVATIONS):
        unsupported(key, name)
    return {"activation": ACTIVATIONS[name]}


def write_activation(config, key):
    """The inverse of `read_activation`; None for an activation that they do not have."""
    return {key: next((name for name, ours in ACTIVATIONS.items() if ours == config.activation), None)}


def read_llama(cfg):
    """Rope, and which layers have biases."""
    bias = {(False, False): False, (True, False): "attention", (True, True): True}
    biases = bool(cfg.get("attention_bias")), bool(cfg.get("mlp_bias"))
    if biases not in bias:
        unsupported("mlp_bias", True)
    return read_rope(cfg) | {"bias": bias[biases]}


def write_llama(config):
    """The inverse of `read_llama`."""
    return write_rope(config) | {"attention_bias": bool(config.bias), "mlp_bias": config.bias is True}


def megatron(block, attention):
    """The modules of a block, as Megatron calls them and the families that come from it."""
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
    settings = dict(family.settings)
    for ours, names in family.keys.items():
        names = names.split("|")
        values = [cfg[name] for name in names if cfg.get(name) is not None]
        require(values or ours in settings, f"it lacks {names[0]}")
        if values:
            value = settings[ours] = convert(values[0], ours, Config, names[0])
            # To us a size or an eps of 0 means a default, which theirs does not.
            most = 1.0 if type(value) is float else LARGEST
            fits = type(value) is bool or 0 < value <= most
            require(fits, f"{names[0]}: {ours} must be above 0 and at most {most}, not {brief(value)}")
    for key, value in ({"quantization_config": None, "is_encoder_decoder": False} | family.only).items():
        if cfg.get(key) not in (None, value):
            unsupported(key, cfg[key])
    return settings | family.read(cfg)


# Tensors.


def skeleton(config):
    """{name: tensor} of the model's shapes, without memory."""
    with torch.device("meta"):
        return GPT(config, seed=None).state_dict()


def theirs(family, name):
    """The name of one of our tensors -> the names of theirs that it stacks, without the prefix."""
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\d+", module)
    modules = family.modules[re.sub(r"\d+", "{}", module)]
    modules = modules if isinstance(modules, list) else [modules]
    return [f"{module.format(layer[0] if layer else '')}.{leaf}" for module in modules]


def relaid(family, name, tensor, n_head, back=False):
    """One of their tensors in our layout, or `back` in theirs."""
    if family.transposed and name.startswith("blocks.") and tensor.dim() == 2:
        return tensor.T.contiguous()
    if family.by_head and ".attn.qkv." in name:
        order = (3, n_head) if back else (n_head, 3)
        return tensor.unflatten(0, (*order, -1)).transpose(0, 1).flatten(0, 2)
    return tensor
