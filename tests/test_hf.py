"""Published models: what `transformers` computes from a folder is what we compute from it, and what we refuse."""

import json
import math
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -r requirements-hf.txt")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra: pip install -r requirements-hf.txt")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra: pip install -r requirements-hf.txt")

import runs
from model import Cache

T, ORIGINAL, V = 64, 32, 300  # positions of the tiny models, those before a scaling, and their vocabulary
LLAMA = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=T
)
SIZES = {
    "llama": LLAMA,
    "qwen2": LLAMA | dict(num_key_value_heads=3),
    "gpt_neox": LLAMA,
    "gpt2": dict(n_embd=48, n_layer=2, n_head=6, n_positions=T),
    "bloom": dict(hidden_size=48, n_layer=2, n_head=6),
}


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A tokenizer.json as GPT-2's, of 300 tokens; 0 ends a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"line {n} says that {n} times {n} is {n * n}.\n" for n in range(99)], trainer)
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@torch.no_grad()
def scatter(model):
    """Draw every parameter anew, so large that attention and logits differ clearly, norms and biases too."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.normal_(std=0.3).add_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.dim() == 1:
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=1.0 if "emb" in name or "wte" in name or "wpe" in name else 1.5 * 48**-0.5)
    return model


def save(folder, bpe, model_type, dtype=torch.float32, **settings):
    """A model of the family, drawn anew, as a folder."""
    sizes = SIZES[model_type] | dict(vocab_size=V, bos_token_id=0, eos_token_id=0) | settings
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = scatter(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    model.save_pretrained(folder)
    shutil.copy(bpe, folder / "tokenizer.json")
    return folder


def oracle(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(length, rows=2):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def pieces(tokens, prompt):
    """The prompt, three tokens together, and the others one by one."""
    rest = tokens.shape[1] - prompt - 3
    return tokens.split([prompt, 3, *[1] * rest], dim=1)


@torch.inference_mode()
def theirs(model, parts):
    past, found = None, []
    for part in parts:
        out = model(part, past_key_values=past, use_cache=len(parts) > 1)
        past, _ = out.past_key_values, found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.inference_mode()
def ours(model, parts):
    cache = Cache(total=sum(part.shape[1] for part in parts)) if len(parts) > 1 else None
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


def check(folder, length, prompt=8, stale=False):
    """Logits of the folder's model are theirs, all at once and from the cache. Returns those of all at once.

    stale: their cache keeps keys rotated for a shorter context, so ours is compared with what they compute at once.
    """
    tokens, reference, run = ids(length), oracle(folder), runs.open_run(f"hf:{folder}")
    whole = theirs(reference, [tokens])
    assert whole.std() > 0.5
    torch.testing.assert_close(ours(run.model, [tokens]), whole, atol=1e-4, rtol=1e-4)
    cached = whole if stale else theirs(reference, pieces(tokens, prompt))
    torch.testing.assert_close(ours(run.model, pieces(tokens, prompt)), cached, atol=1e-4, rtol=1e-4)
    return whole


# ---- families


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", dict(num_key_value_heads=2, num_hidden_layers=3, rms_norm_eps=1e-2)),
        ("llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
        ("llama", dict(attention_bias=True)),
        ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=3)),
        ("qwen2", {}),
        ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=6)),
        ("gpt_neox", {}),
        ("gpt_neox", dict(use_parallel_residual=False, hidden_act="gelu_new")),
        ("gpt_neox", dict(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, layer_norm_eps=1e-2)),
        ("gpt2", {}),
        ("gpt2", dict(n_inner=80, activation_function="gelu", layer_norm_epsilon=1e-2)),
        ("gpt2", dict(tie_word_embeddings=False, activation_function="gelu_pytorch_tanh")),
        ("bloom", {}),  # six heads: no power of two
        ("bloom", dict(n_head=4, tie_word_embeddings=False, layer_norm_epsilon=1e-2)),
    ],
)
def test_logits_are_theirs(tmp_path, bpe, model_type, settings):
    check(save(tmp_path, bpe, model_type, **settings), 24)


@pytest.mark.parametrize("rotary", [dict(rotary_pct=1.0), dict(rotary_pct=0.5, rotary_emb_base=500.0)])
def test_neox_rotates_the_share_that_its_older_keys_name(tmp_path, bpe, rotary):
    folder = save(tmp_path, bpe, "gpt_neox")
    edit(folder, rope_parameters=None, **rotary)
    check(folder, 24)


def edit(folder, **changes):
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    cfg = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return folder


# ---- scalings of rope

FACTORS = dict(short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 1.5, 3.0, 6.0])  # of the pairs of 8 dimensions
FROM = dict(original_max_position_embeddings=ORIGINAL)
SCALINGS = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=4.0) | FROM,
    "yarn, not from a shorter one": dict(rope_type="yarn", factor=4.0),
    "yarn, attention_factor": dict(rope_type="yarn", factor=2.0, attention_factor=1.4) | FROM,
    "yarn, mscale": dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5) | FROM,
    "yarn, mscale alone": dict(rope_type="yarn", factor=4.0, mscale=3.0) | FROM,
    "yarn, betas": dict(rope_type="yarn", factor=4.0, beta_fast=6.0, beta_slow=0.5) | FROM,
    "yarn, not truncated": dict(rope_type="yarn", factor=4.0, beta_fast=6.0, truncate=False) | FROM,
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) | FROM,
    "longrope": dict(rope_type="longrope") | FACTORS | FROM,
    "longrope, factor": dict(rope_type="longrope", factor=8.0) | FACTORS | FROM,
    "longrope, attention_factor": dict(rope_type="longrope", factor=2.0, attention_factor=1.3) | FACTORS | FROM,
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.5),
    "proportional, factor": dict(rope_type="proportional", partial_rotary_factor=0.75, factor=3.0),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, bpe):
    """{family: a folder without scaling}"""
    torch.manual_seed(0)
    return {one: save(tmp_path_factory.mktemp(one), bpe, one) for one in ("llama", "qwen2", "gpt_neox")}


def copy(folder, target, **changes):
    shutil.copytree(folder, target)
    return edit(target, **changes)


def rope_keys(form, scaling):
    """config.json's keys for a scaling, as versions of transformers have written them."""
    if form == "rope_parameters":
        return {"rope_parameters": {"rope_theta": 1000.0} | scaling}
    kind = {form: scaling["rope_type"]}
    given = {key: value for key, value in scaling.items() if key != "rope_type"}
    return {"rope_parameters": None, "rope_theta": 1000.0, "rope_scaling": kind | given}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotations_are_theirs(tmp_path, plain, name, form):
    folder = copy(plain["llama"], tmp_path / "scaled", **rope_keys(form, SCALINGS[name]))
    unscaled = copy(plain["llama"], tmp_path / "plain", **rope_keys("rope_parameters", SCALINGS["default"]))
    for length in (ORIGINAL - 4, T - 4, T + 16) if form == "rope_parameters" else (T + 16,):
        # Their cache keeps what was rotated for a shorter context; a prompt that is as long has the regime of the whole.
        stale = name == "dynamic" and length > T
        prompt = ORIGINAL + 4 if length > ORIGINAL else 8
        found = check(folder, length, prompt, stale)
        differs = name != "default" and (name != "dynamic" or length > T)
        other = theirs(oracle(unscaled), [ids(length)])
        assert ((found - other).abs().max() > 0.05) == differs


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen2", "yarn"), ("qwen2", "linear"), ("gpt_neox", "linear"), ("gpt_neox", "dynamic"), ("gpt_neox", "yarn")],
)
def test_other_families_scale_too(tmp_path, plain, model_type, name):
    more = {"partial_rotary_factor": 0.5} if model_type == "gpt_neox" else {}
    keys = rope_keys("rope_parameters", SCALINGS[name] | more)
    check(copy(plain[model_type], tmp_path / "scaled", **keys), T + 16, ORIGINAL + 4, stale=name == "dynamic")
