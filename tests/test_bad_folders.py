"""Published folders that are damaged, odd or hostile: one line says what is wrong, and nothing of them is used."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import FROM, Q, V, changed, copy, cut, edit, oracle, refused, retokenized, save, shard, store, stored

import data
from core import runs
from core.errors import UserError, line_of
from core.settings import Config
from data import vocabulary
from hub import load
from hub.families import FAMILIES, settings_of


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """What hf:... is converted to goes to tmp_path/out/hf."""
    monkeypatch.chdir(tmp_path)


def without(folder, name):
    tensors = stored(folder)
    del tensors[name]
    store(folder, tensors)


def scaled(folder, **scaling):
    edit(folder, rope_parameters={"rope_theta": 1e4} | scaling)


# what is wrong: (what breaks a folder, words that the line has)
BAD = {
    "a missing shard": (lambda f: (f / shard(f)[1]).unlink(), ["model-00002-of-", "index.json names it"]),
    "a shard cut short": (lambda f: cut(f / shard(f)[1]), ["model-00002-of-", "cut short"]),
    "an index cut short": (lambda f: (shard(f), cut(f / load.INDEX)), [load.INDEX, "cannot be read"]),
    "an index of another form": (
        lambda f: (shard(f), (f / load.INDEX).write_bytes(b'{"weight_map": ["a"]}')), [load.INDEX, "weight_map"]
    ),
    "a file cut short": (lambda f: cut(f / "model.safetensors"), ["model.safetensors is damaged", "cut short"]),
    "a header cut short": (lambda f: cut(f / "model.safetensors", 1e-2), ["model.safetensors is damaged"]),
    "an empty file": (lambda f: cut(f / "model.safetensors", 0), ["model.safetensors is damaged"]),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["neither model.safetensors nor"]
    ),
    "an extra tensor": (lambda f: store(f, stored(f) | {"model.extra.weight": torch.ones(3)}), ["model.extra.weight"]),
    "biases that config.json does not know": (
        lambda f: store(f, stored(f) | {Q.replace("weight", "bias"): torch.ones(48)}), ["0.self_attn.q_proj.bias"]
    ),
    "a missing tensor": (lambda f: without(f, Q), ["layers.0.self_attn.q_proj.weight", "lacks"]),
    "a missing head": (lambda f: without(f, "lm_head.weight"), ["lm_head.weight", "lacks"]),
    "a quantised tensor": (lambda f: changed(f, Q, lambda x: x.to(torch.int8)), ["q_proj.weight", "int8"]),
    "a tensor of another shape": (lambda f: changed(f, Q, lambda x: x[:24]), ["q_proj.weight", "[24, 48]"]),
    "a tensor without dimensions": (lambda f: changed(f, "model.norm.weight", lambda x: x[0]), ["norm.weight", "[]"]),
    "another vocabulary": (lambda f: edit(f, vocab_size=V + 7), ["embed_tokens.weight is [300, 48]", "[307, 48]"]),
    "a tokenizer of more tokens": (lambda f: edit(f, vocab_size=V - 7), ["300 tokens", "vocab_size is 293"]),
    "two tokens of one id": (
        lambda f: retokenized(f, lambda j: j["model"]["vocab"].update({"!": 7})), ["300 tokens of 299 ids"]
    ),
    "an id beyond all tables": (
        lambda f: retokenized(f, lambda j: j["model"]["vocab"].update({"!": 1 << 31})), ["id 2147483648"]
    ),
    "a word among the ends": (lambda f: edit(f, eos_token_id=[0, "2"]), ["eos_token_id=2 is no id"]),
    "an end of generation_config.json that is no token": (
        lambda f: (f / "generation_config.json").write_bytes(b'{"eos_token_id": [0, 300]}'), ["eos_token_id=300"]
    ),
    "more layers than tensors": (lambda f: edit(f, num_hidden_layers=9999), ["9999 layers", "21 tensors"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer.json", "save_pretrained"]),
    "a damaged tokenizer": (lambda f: cut(f / "tokenizer.json"), ["tokenizer.json is damaged"]),
    "a tokenizer of another form": (lambda f: (f / "tokenizer.json").write_bytes(b"[]"), ["tokenizer.json is damaged"]),
    "a tokenizer without a decoder": (
        lambda f: retokenized(f, lambda j: j.update(decoder=None)), ["tokenizer.json", "decoder"]
    ),
    "a tokenizer without tokens": (
        lambda f: retokenized(f, lambda j: (j["model"].update(vocab={}, merges=[]), j.update(added_tokens=[]))),
        ["tokenizer.json", "no tokens"],
    ),
    "an end that is no token": (lambda f: edit(f, eos_token_id=V), ["eos_token_id=300"]),
    "no end": (
        lambda f: (edit(f, eos_token_id=None), (f / "generation_config.json").unlink()), ["eos_token_id=None"]
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "a config.json that is no JSON": (lambda f: cut(f / "config.json"), ["config.json cannot be read"]),
    "a config.json that is no text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json cannot be read"]
    ),
    "a config.json that is a list": (lambda f: (f / "config.json").write_bytes(b"[1]"), ["is no JSON object"]),
    "a word for a number": (lambda f: edit(f, num_hidden_layers="two"), ["config.json", "num_hidden_layers", "'two'"]),
    "a list for a number": (lambda f: edit(f, hidden_size=[48]), ["config.json", "hidden_size", "[48]"]),
    "a null for a number": (lambda f: edit(f, num_hidden_layers=None), ["config.json", "it lacks num_hidden_layers"]),
    "no heads": (lambda f: edit(f, num_attention_heads=0), ["config.json", "n_head"]),
    "too many heads": (lambda f: edit(f, num_attention_heads=7, head_dim=None), ["config.json", "n_head (7)"]),
    "a negative number": (lambda f: edit(f, intermediate_size=-1), ["config.json", "n_hidden"]),
    "another family": (lambda f: edit(f, model_type="t5"), ["model_type='t5'", "llama, qwen2, gpt2, gpt_neox, bloom"]),
    "no family": (lambda f: edit(f, model_type=None), ["model_type=None"]),
    "a list for a family": (lambda f: edit(f, model_type=["llama"]), ["model_type=['llama']"]),
    "wider heads": (lambda f: edit(f, head_dim=12), ["head_dim=12"]),
    "odd heads": (
        lambda f: edit(f, num_attention_heads=16, num_key_value_heads=16, head_dim=3), ["must be even, not 3"]
    ),
    "quantisation": (lambda f: edit(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "another activation": (lambda f: edit(f, hidden_act="relu"), ["hidden_act='relu'"]),
    "biases of the feed-forward layer alone": (lambda f: edit(f, mlp_bias=True), ["mlp_bias=True"]),
    "an unknown scaling": (lambda f: scaled(f, rope_type="mrope"), ["rope_type='mrope'"]),
    "an unknown key of a scaling": (lambda f: scaled(f, rope_type="linear", factor=2.0, twist=3), ["twist=3"]),
    "a scaling without its factor": (lambda f: scaled(f, rope_type="linear"), ["rope_scaling", "factor"]),
    "a word for a factor": (lambda f: scaled(f, rope_type="linear", factor="two"), ["factor='two'"]),
    "a word for a base": (lambda f: scaled(f, rope_type="default", rope_theta="big"), ["'big'"]),
    "a factor below 1": (lambda f: scaled(f, rope_type="linear", factor=0.5), ["factor must be at least 1"]),
    "too few factors": (
        lambda f: scaled(f, rope_type="longrope", short_factor=[1.0], long_factor=[2.0], **FROM), ["short_factor=[...]"]
    ),
    "a word for a scaling": (lambda f: edit(f, rope_parameters="linear"), ["rope_parameters='linear'"]),
    "part of the pairs": (
        lambda f: scaled(f, rope_type="default", partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, plain, call_script, what):
    spoil, words = BAD[what]
    folder = copy(plain["llama"], tmp_path / "bad")
    spoil(folder)
    refused(call_script("sample.py", f"hf:{folder}", "--tokens=1"), *words)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
        ("gpt2", dict(scale_attn_weights=False)),
        ("gpt2", dict(add_cross_attention=True)),
        ("gpt2", dict(activation_function="relu")),
        ("qwen2", dict(use_sliding_window=True)),
        ("gpt_neox", dict(attention_bias=False)),
        ("gpt_neox", dict(hidden_act="silu")),
        ("gpt_neox", dict(head_dim=12)),
        ("gpt_neox", dict(hidden_act="")),
        ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    ],
)
def test_a_key_that_asks_for_another_model_is_named(tmp_path, bpe, call_script, model_type, changes):
    folder = edit(save(tmp_path / "bad", bpe, model_type), **changes)
    ((key, value),) = changes.items()
    refused(call_script("evaluate.py", f"hf:{folder}", f"--data={bpe}"), f"{key}={value!r} is not supported")


@pytest.mark.parametrize("name", ["hf:", "hf:nowhere", "hf:/no/where", "hf:../up", "hf:a/b/c", "hf:a b/c"])
def test_a_name_that_is_no_folder_says_what_a_name_is(call_script, name):
    refused(call_script("sample.py", name), "OWNER/NAME")
    refused(call_script("evaluate.py", name), "OWNER/NAME")


def test_a_published_model_named_as_a_run_is_told_its_name(plain, call_script):
    refused(call_script("sample.py", plain["llama"]), f"hf:{plain['llama']}")


def test_without_the_extra_packages_a_line_says_how_to_get_them(plain, call_script, monkeypatch):
    monkeypatch.setattr(load, "tokenizer_json", None)
    refused(call_script("sample.py", f"hf:{plain['llama']}"), "pip install -r requirements-hf.txt")
    monkeypatch.delattr(data, "tokenizer_json")
    monkeypatch.setitem(sys.modules, "data.tokenizer_json", None)
    with pytest.raises(UserError, match="pip install -r requirements-hf.txt"):
        vocabulary.load(str(plain["llama"] / "tokenizer.json"))


# ---- content that is odd or hostile

JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", load.INDEX)
ODD = (
    None, True, 0, -1, 1, 7, 10**9, 10**30, 10**400, 0.5, 1e-320, math.nan, math.inf, "", "2", "x" * 5000, "\0",
    "\ud800", "../../x", [], [0], [None], [1e400], {}, {"a": [1]}, {"type": "yarn", "factor": -1},
)  # fmt: skip


def refusal(folder):
    """The line that says why a folder is not converted."""
    with pytest.raises(UserError) as refused:
        load.convert(folder, Path("run"))
    assert not Path("run", runs.CKPT).exists()
    return line_of(refused.value)


@pytest.fixture
def sharded(tmp_path, plain):
    """A Llama with all the files that one can have, its weights in several of them."""
    folder = copy(plain["llama"], tmp_path / "sharded")
    shard(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_of_any_depth_is_one_line(sharded, name, opening):
    (sharded / name).write_text(opening * 100_000, encoding="utf-8")
    assert str(sharded / name) in refusal(sharded)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
@pytest.mark.parametrize("name", [*JSON, "model.safetensors", "model-00002-of-00016.safetensors"])
def test_a_pipe_is_not_waited_for(sharded, name):
    pipe = sharded / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    # A process that opens and closes it lets a reader go, so that this test can fail.
    writer = subprocess.Popen(["sh", "-c", 'exec > "$0"', pipe])
    try:
        assert f"{pipe} is no regular file" in refusal(sharded)
    finally:
        writer.kill()
        writer.wait()


OUTSIDE = ("../out.safetensors", "a/../../out.safetensors", "C:\\out", "C:out", "..\\out", "\\\\server\\out", "", ".")


@pytest.mark.parametrize("name", [*OUTSIDE, "a\0b", "x" * 100_000, 7, None])
def test_an_index_leads_to_files_in_its_folder_alone(tmp_path, sharded, name):
    for inside in sharded.glob("*.safetensors"):
        shutil.copy(inside, tmp_path / "out.safetensors")
    for path in (name, str(tmp_path / "out.safetensors")):
        (sharded / load.INDEX).write_text(json.dumps({"weight_map": {Q: path}}), encoding="utf-8")
        assert re.search("no file in its folder|no weight_map from tensors to files", refusal(sharded))
        assert len(refusal(sharded)) < 1000


@pytest.mark.parametrize("kind", FAMILIES)
def test_sizes_that_no_model_has_name_their_key(kind):
    cfg = {key.partition("|")[0]: 4 for key in FAMILIES[kind].keys.values()}
    floats = {key: 1e-5 for key in cfg if key.endswith(("eps", "epsilon"))}
    booleans = {key: True for key in cfg if key.startswith(("tie", "use"))}
    cfg |= {"model_type": kind} | floats | booleans
    settings_of(cfg)
    for key in cfg.keys() - {"model_type"}:
        for value in (-1, 0, 10**30, math.nan, math.inf, "4", [4], {}, *([] if key in booleans else [True])):
            with pytest.raises((UserError, ValueError), match=key):
                settings_of(cfg | {key: value})


@pytest.mark.parametrize("how", ["a tokenizer without it", "a model with a row for it"])
def test_a_token_beyond_the_table_says_how_to_go_on_and_both_ways_work(tmp_path, plain, how):
    folder = copy(plain["llama"], tmp_path / "padded")
    token = {"id": V, "content": "<pad>", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    retokenized(folder, lambda inner: inner["added_tokens"].append(token))
    said = refusal(folder)
    assert f"has {V + 1} tokens" in said and f"those from id {V} on" in said
    call = re.search(r"model\.(resize_token_embeddings\(\d+\)); model\.save_pretrained\(FOLDER\)", said)[1]
    if how == "a tokenizer without it":
        retokenized(folder, lambda inner: inner["added_tokens"].pop())
    else:
        model = oracle(folder)
        model.resize_token_embeddings(int(re.search(r"\d+", call)[0]))
        model.save_pretrained(folder)
    load.convert(folder, Path("run"))


def test_a_bit_of_the_header_that_flips_is_one_line_or_nothing(plain, tmp_path):
    """Which bits of the weights flipped, no file says. In the header, some belong to what nobody reads."""
    folder = copy(plain["llama"], tmp_path / "flipped")
    file, cfg = folder / "model.safetensors", json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, before = Config(**settings_of(cfg)), file.read_bytes()
    size = 8 + int.from_bytes(before[:8], "little")
    whole = load.weights(folder, cfg, config)
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    lines = []
    for bit in random.Random(0).sample(range(8 * size), 100):
        after = bytearray(before)
        after[bit // 8] ^= 1 << bit % 8
        file.write_bytes(after)
        try:
            found = load.weights(folder, cfg, config)
        except UserError as error:
            lines.append(line_of(error))
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert len(lines) > 80 and max(map(len, lines)) < 1600


def test_a_dtype_that_torch_has_not_is_one_line(tmp_path):
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 12]}}).encode()
    (tmp_path / load.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(UserError, match="F6_E2M3"):
        load.floats(tmp_path, load.open_weights(tmp_path), "x")


def oddly(value, generator):
    """Put something odd somewhere into a value of JSON."""
    while True:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not (isinstance(value[key], dict | list) and value[key]) or generator.random() < 0.2:
            value[key] = generator.choice(ODD)
            return
        value = value[key]


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_no_odd_value_is_more_than_one_line(sharded, count):
    generator, lines = random.Random(0), []
    (sharded / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}), encoding="utf-8")
    for _ in range(count):
        path = sharded / generator.choice(JSON)
        before = path.read_text(encoding="utf-8")
        value = json.loads(before)
        oddly(value, generator)
        path.write_text(json.dumps(value), encoding="utf-8")
        try:
            load.convert(sharded, Path("run"))
            runs.open_run("run")
        except UserError as error:
            lines.append(line_of(error))
        path.write_text(before, encoding="utf-8")
    assert 0 < len(lines) < count and max(map(len, lines)) < 1600
