"""Published models: what `transformers` computes from a folder is what we compute from it, and what we refuse."""

import concurrent.futures
import hashlib
import http.server
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from published import (
    FROM,
    ORIGINAL,
    Q,
    T,
    V,
    changed,
    copy,
    cut,
    edit,
    oracle,
    refused,
    retokenized,
    safetensors,
    save,
    shard,
    store,
    stored,
    tokenizers,
)
from small import CPU
from tiny import ROOT, TINY, finish, start

import data
import posenc
import sample
from core import report, runs
from core.errors import UserError
from data import vocabulary
from hub import export, load
from model import Cache


@pytest.fixture(autouse=True)
def one_thread_and_seed(tmp_path, monkeypatch):
    """One thread, one seed, and a folder of its own, where what hf:... is converted to goes to out/hf."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(length, rows=2):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def pieces(tokens, prompt):
    """The prompt, three tokens together, what is left, and the last six one by one."""
    rest = tokens.shape[1] - prompt - 9
    return tokens.split([prompt, 3, rest, *[1] * 6], dim=1)


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
    return torch.cat([model(part, past=cache) for part in parts], dim=1)


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


LEFT_OUT = {
    "llama": (
        "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "head_dim", "hidden_act", "attention_bias",
        "mlp_bias", "rope_parameters",
    ),
    "qwen2": ("rms_norm_eps", "tie_word_embeddings", "hidden_act", "rope_parameters", "use_sliding_window"),
    "gpt_neox": (
        "layer_norm_eps", "tie_word_embeddings", "hidden_act", "rope_parameters", "use_parallel_residual",
        "attention_bias",
    ),
    "gpt2": ("n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights"),
    "bloom": ("layer_norm_epsilon", "tie_word_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_keys_that_are_left_out_have_their_defaults(tmp_path, bpe, model_type):
    check(edit(save(tmp_path, bpe, model_type), **dict.fromkeys(LEFT_OUT[model_type])), 24)


def test_bloom_has_older_names_for_its_sizes(tmp_path, bpe):
    folder = save(tmp_path, bpe, "bloom")
    new = dict(hidden_size=None, n_head=None, n_layer=None)
    check(edit(folder, **new, n_embed=48, num_attention_heads=6, num_hidden_layers=2), 24)


NEOX = [
    (None, dict(rotary_pct=1.0)),
    (None, dict(rotary_pct=0.5, rotary_emb_base=500.0)),
    (None, dict(rotary_pct=0.0)),
    (dict(rope_type="default", partial_rotary_factor=0.0), {}),
    (dict(rope_type="default", partial_rotary_factor=0.1), {}),  # less than one dimension
]


@pytest.mark.parametrize(("newer", "older"), NEOX)
def test_neox_rotates_the_share_that_its_keys_name_which_may_be_none(tmp_path, plain, newer, older):
    check(copy(plain["gpt_neox"], tmp_path / "share", rope_parameters=newer, **older), 24)


# ---- scalings of rope

FACTORS = dict(short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 1.5, 3.0, 6.0])  # of the pairs of 8 dimensions
SCALINGS = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "yarn": dict(rope_type="yarn", factor=4.0) | FROM,
    "yarn, not from a shorter one": dict(rope_type="yarn", factor=4.0),
    "yarn, attention_factor": dict(rope_type="yarn", factor=2.0, attention_factor=1.4) | FROM,
    "yarn, mscale": dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5) | FROM,
    "yarn, mscale alone": dict(rope_type="yarn", factor=4.0, mscale=3.0) | FROM,
    "yarn, betas": dict(rope_type="yarn", factor=4.0, beta_fast=0.5, beta_slow=0.05) | FROM,
    "yarn, not truncated": dict(rope_type="yarn", factor=4.0, beta_fast=0.5, beta_slow=0.1, truncate=False) | FROM,
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) | FROM,
    "longrope": dict(rope_type="longrope") | FACTORS | FROM,
    "longrope, factor": dict(rope_type="longrope", factor=8.0) | FACTORS | FROM,
    "longrope, attention_factor": dict(rope_type="longrope", factor=2.0, attention_factor=1.3) | FACTORS | FROM,
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.5),
    "proportional, factor": dict(rope_type="proportional", partial_rotary_factor=0.75, factor=3.0),
}


def rope_keys(form, scaling):
    """config.json's keys for a scaling, as versions of transformers have written them."""
    if form == "rope_parameters":
        return {"rope_parameters": {"rope_theta": 1000.0} | scaling}
    kind = {form: scaling["rope_type"]}
    given = {key: value for key, value in scaling.items() if key != "rope_type"}
    return {"rope_parameters": None, "rope_theta": 1000.0, "rope_scaling": kind | given}


@pytest.mark.parametrize(
    "form", ["rope_parameters", *(pytest.param(form, marks=pytest.mark.slow) for form in ("rope_type", "type"))]
)
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotations_are_theirs(tmp_path, plain, name, form):
    folder = copy(plain["llama"], tmp_path / "scaled", **rope_keys(form, SCALINGS[name]))
    unscaled = copy(plain["llama"], tmp_path / "plain", **rope_keys("rope_parameters", SCALINGS["default"]))
    for length in (ORIGINAL - 4, T - 4, T + 16) if form == "rope_parameters" else (T + 16,):
        # Their cache keeps what was rotated for a shorter context. A prompt past ORIGINAL has the regime of the whole.
        stale = name == "dynamic" and length > T
        prompt = ORIGINAL + 4 if length > ORIGINAL else 8
        found = check(folder, length, prompt, stale)
        differs = name != "default" and (name != "dynamic" or length > T)
        other = theirs(oracle(unscaled), [ids(length)])
        assert ((found - other).abs().max() > 0.05) == differs


@pytest.mark.parametrize("form", ["rope_parameters", "type"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen2", "yarn"), ("qwen2", "linear"), ("gpt_neox", "linear"), ("gpt_neox", "dynamic"), ("gpt_neox", "yarn")],
)
def test_other_families_scale_too(tmp_path, plain, model_type, name, form):
    keys = rope_keys(form, SCALINGS[name])
    if model_type == "gpt_neox" and form == "type":
        keys |= {"rotary_pct": 0.5, "rotary_emb_base": keys.pop("rope_theta")}
    elif model_type == "gpt_neox":
        keys["rope_parameters"]["partial_rotary_factor"] = 0.5
    check(copy(plain[model_type], tmp_path / "scaled", **keys), T + 16, ORIGINAL + 4, stale=name == "dynamic")


def test_the_older_key_goes_before_the_newer_one(tmp_path, plain):
    both = rope_keys("rope_parameters", SCALINGS["linear"]) | {"rope_scaling": SCALINGS["yarn"]}
    found = check(copy(plain["llama"], tmp_path / "both", **both), T)
    yarn = rope_keys("rope_parameters", SCALINGS["yarn"] | {"rope_theta": 1e4})
    torch.testing.assert_close(check(copy(plain["llama"], tmp_path / "one", **yarn), T), found)


@pytest.mark.parametrize("name", ["longrope", "yarn"])
def test_the_original_length_may_stand_outside(tmp_path, plain, name):
    keys = rope_keys("rope_parameters", SCALINGS[name])
    found = check(copy(plain["llama"], tmp_path / "inside", **keys), T, ORIGINAL + 4)
    del keys["rope_parameters"]["original_max_position_embeddings"]
    torch.testing.assert_close(
        check(copy(plain["llama"], tmp_path / "outside", **keys, **FROM), T, ORIGINAL + 4), found
    )


# ---- files


def test_weights_may_lie_in_several_files(tmp_path, plain):
    folder = copy(plain["llama"], tmp_path / "shards")
    assert len(shard(folder)) > 3
    assert torch.equal(check(folder, 24), theirs(oracle(plain["llama"]), [ids(24)]))


def test_a_whole_file_goes_before_an_index_that_was_left_behind(tmp_path, plain):
    folder = copy(plain["llama"], tmp_path / "both")
    tensors = stored(folder)
    shard(folder)
    store(folder, tensors | {Q: tensors[Q] + 1})
    assert not torch.equal(check(folder, 24), theirs(oracle(plain["llama"]), [ids(24)]))
    (folder / load.INDEX).write_text("{", encoding="utf-8")
    check(folder, 24)


def test_a_tensor_in_two_files_is_that_of_the_file_which_the_index_names(tmp_path, plain):
    folder = copy(plain["llama"], tmp_path / "shards")
    names, index = shard(folder), json.loads((folder / load.INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name in names:
        if index[Q] != name:
            store(folder, safetensors.load_file(folder / name) | {Q: torch.ones(48, 48)}, name)
    found = ours(runs.open_run(f"hf:{folder}").model, [ids(24)])
    assert torch.equal(found, ours(runs.open_run(f"hf:{plain['llama']}").model, [ids(24)]))


def test_links_out_of_the_folder_are_followed_as_in_the_cache_of_huggingface_hub(tmp_path, plain):
    folder, blobs = copy(plain["llama"], tmp_path / "snapshot"), tmp_path / "blobs"
    shard(folder)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    check(folder, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32(tmp_path, bpe, dtype):
    folder = save(tmp_path, bpe, "llama", dtype)
    assert {tensor.dtype for tensor in stored(folder).values()} == {dtype}
    check(folder, 24)
    assert {p.dtype for p in runs.open_run(f"hf:{folder}").model.parameters()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_names_may_lack_the_prefix_as_in_the_first_files(tmp_path, bpe, model_type):
    folder = save(tmp_path, bpe, model_type)
    before = check(folder, 24)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored(folder).items()}
    if model_type == "gpt2":
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, T, T).tril() for layer in range(2)}
        tensors |= masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    store(folder, tensors)
    torch.testing.assert_close(check(folder, 24), before)


@pytest.mark.parametrize(("model_type", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out")])
def test_a_tied_head_may_be_stored_too_if_it_is_the_embeddings(tmp_path, bpe, call_script, model_type, head):
    folder = save(tmp_path / "tied", bpe, model_type, tie_word_embeddings=True)
    (tokens,) = (tensor for name, tensor in stored(folder).items() if tensor.shape == (V, 48))
    store(folder, stored(folder) | {f"{head}.weight": tokens.clone()})
    check(folder, 24)
    store(folder, stored(folder) | {f"{head}.weight": tokens + 1})
    refused(call_script("sample.py", f"hf:{folder}"), f"{head}.weight")


def test_frequencies_that_older_versions_stored_are_left_out(tmp_path, plain):
    folder = copy(plain["llama"], tmp_path / "old")
    store(folder, stored(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    check(folder, 24)


# ---- tokenizers

TEXTS = [
    "", " ", "line 7 says", "  two spaces,\ttab\r\n\n", "naïve Ελλάδα 日本語", "👩‍👩‍👧 🇩🇪", "\x00\x07\x1b[2m\x7f",
    "e\u0301 \u00e9 \u200f\ufeff\u2028", "<|endoftext|>", "<s> </s> <0x0A> <unk>",
]  # fmt: skip


def sentencepiece(file, more=(), **how):
    """A tokenizer.json as Llama 2's: characters and bytes, no pre-tokenizer, <s> before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"\u2581abcdefghilnoprstuvxy,.0123456789", "\u2581s", "\u2581sa", "li", "ne", "\u2581li", *more]
    merges = [("\u2581", "s"), ("\u2581s", "a"), ("l", "i"), ("n", "e"), ("\u2581", "li")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    if how.get("metaspace"):
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        )
    decoders = tokenizers.decoders
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    single = how.get("single", "<s> $A")
    special = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    if how.get("padding"):
        inner.enable_padding(length=40, pad_id=0, pad_token="<unk>")
        inner.enable_truncation(max_length=4)
    inner.save(str(file))
    return inner


@pytest.fixture(scope="module")
def llama2(tmp_path_factory, bpe):
    """A folder as Llama 2's."""
    torch.manual_seed(0)
    folder = save(tmp_path_factory.mktemp("llama2"), bpe, "llama", vocab_size=320, bos_token_id=1, eos_token_id=2)
    sentencepiece(folder / "tokenizer.json")
    return folder


def inner_of(folder):
    """Their tokenizer, to which special tokens in a text are text."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.encode_special_tokens = True
    return inner


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_theirs_and_give_back_the_text(plain, llama2, text):
    for folder, before in ((plain["llama"], ""), (llama2, " ")):
        tokenizer, inner = vocabulary.load(f"hf:{folder}"), inner_of(folder)
        ids = tokenizer.encode_ordinary(text)
        assert ids == inner.encode(text, add_special_tokens=False).ids
        expected = (before + text if text else "").encode()  # the one space that sentencepiece puts before a text
        assert tokenizer.decode_bytes(ids) == expected
        assert inner.decode(ids, skip_special_tokens=False) == text
        assert sum(vocabulary.byte_lengths(tokenizer)[ids]) == len(expected)
        assert tokenizer.eot_token not in ids


def test_merged_tokens_are_used(plain, llama2):
    for folder in (plain["llama"], llama2):
        tokenizer = vocabulary.load(f"hf:{folder}")
        assert len(tokenizer.encode_ordinary("line says")) < len("line says")


def test_streamed_text_has_no_half_characters(plain, llama2, capsys):
    for folder, before in ((plain["llama"], ""), (llama2, " ")):
        tokenizer, text, seen = vocabulary.load(f"hf:{folder}"), "é日本👩‍👧 line!", ""
        stream = sample.Stream(tokenizer)
        for token in tokenizer.encode_ordinary(text):
            stream.write([token])
            seen += capsys.readouterr().out
            assert (before + text).startswith(seen)
        assert seen == before + text


@pytest.mark.parametrize("how", [{}, dict(metaspace=True), dict(padding=True), dict(single="<s> $A </s>")])
def test_a_text_begins_as_the_post_processor_says(tmp_path, llama2, how):
    shutil.copy(llama2 / "config.json", tmp_path)
    sentencepiece(tmp_path / "tokenizer.json", **how)
    tokenizer = vocabulary.load(f"hf:{tmp_path}")
    assert (vocabulary.begin(tokenizer), tokenizer.eot_token) == ([1], 2)
    long = tokenizer.encode_ordinary("line says " * 9)
    assert tokenizer.decode_bytes(long) == b" " + b"line says " * 9
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary("line")) == b" line"  # not padded


def test_nothing_begins_a_text_where_nothing_is_put_before_it(plain):
    assert vocabulary.begin(vocabulary.load(f"hf:{plain['llama']}")) == []


ENDS = [  # eos_token_id in config.json, and in generation_config.json -> all of them
    (0, None, [0]),
    ([7, 0], None, [7, 0]),
    (0, [7, 0], [0, 7]),
    ([0, 7], 9, [0, 7, 9]),
    (None, [7, 9], [7, 9]),
]


@pytest.mark.parametrize(("config", "generation", "ends"), ENDS)
def test_every_token_that_ends_a_text_comes_along_into_the_run_and_out_again(tmp_path, plain, config, generation, ends):
    folder = copy(plain["llama"], tmp_path / "published", eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}), encoding="utf-8")
    assert vocabulary.load(f"hf:{folder}").ends == ends
    run = runs.find(f"hf:{folder}").parent
    said = ends if ends[1:] else ends[0]
    assert json.loads((run / "tokenizer_config.json").read_text(encoding="utf-8")) == {"eos_token_id": said}
    export.main([str(run), "exported"])
    shutil.rmtree(folder)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    runs.bring_tokenizer(runs.config_of(runs.load(run)), tuned)
    shutil.rmtree(load.OUT)
    for name in (str(tuned / "tokenizer.json"), "hf:exported"):
        tokenizer = vocabulary.load(name)
        assert (tokenizer.ends, tokenizer.eot_token) == (ends, ends[0])
    assert json.loads(Path("exported/config.json").read_text(encoding="utf-8"))["eos_token_id"] == said
    assert oracle("exported").generation_config.eos_token_id == said


def test_every_one_of_them_ends_a_text_and_without_stop_none_is_drawn(tmp_path, plain, capsys):
    """A head of zeros makes every token as likely as any other."""
    ends = [0, *range(10, 200)]
    folder = copy(plain["llama"], tmp_path / "published", eos_token_id=ends)
    changed(folder, "lm_head.weight", torch.zeros_like)
    opened = runs.open_run(f"hf:{folder}")
    lengths = {}
    for stop in (False, True):
        options = sample.Options(samples=8, temperature=1.0, stop=stop)
        texts, _ = sample.write_texts(opened.model, opened.tokenizer, [250], 50, options, CPU)
        lengths[stop] = [len(text) for text in texts]
        assert not set(ends) & {token for text in texts for token in text}
    assert lengths[False] == [51] * 8
    assert max(lengths[True]) < 51
    assert sample.Stream(opened.tokenizer).silent >= set(ends)
    opened.tokenizer.ends = list(range(V))
    with pytest.raises(UserError, match="there is nothing to draw"):
        sample.never_drawn(opened.tokenizer, V, False)


def test_a_prompt_that_is_no_utf_8_is_one_line(plain, call_script):
    prompt, _ = os.fsdecode(b"line \xff"), converted(plain["llama"])
    refused(call_script("sample.py", f"hf:{plain['llama']}", f"--prompt={prompt}"), "the text is no UTF-8")


def test_added_tokens_that_are_not_special_are_text(tmp_path, plain):
    folder = copy(plain["llama"], tmp_path / "added")
    inner = inner_of(folder)
    inner.add_tokens(["    ", "naïve"])  # GPT-NeoX has such runs of spaces
    inner.add_special_tokens(["<|pad|>"])
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = vocabulary.load(f"hf:{folder}")
    ids = tokenizer.encode_ordinary("line    naïve <|pad|>")
    assert {V, V + 1} < set(ids) and V + 2 not in ids
    assert tokenizer.decode_bytes(ids).decode() == "line    naïve <|pad|>"
    lengths = vocabulary.byte_lengths(tokenizer)
    assert lengths[[0, V, V + 1, V + 2]].tolist() == [0, 4, len("naïve".encode()), 0]


def test_tokenizers_differ_by_their_vocabulary(tmp_path, plain, llama2):
    one = [vocabulary.load(f"hf:{plain[name]}") for name in ("llama", "qwen2")]
    assert vocabulary.fingerprint(one[0]) == vocabulary.fingerprint(one[1])
    shutil.copy(llama2 / "config.json", tmp_path)
    sentencepiece(tmp_path / "tokenizer.json", more=["\u2581lin"])
    other = [vocabulary.load(f"hf:{folder}") for folder in (llama2, tmp_path)]
    assert vocabulary.fingerprint(other[0]) != vocabulary.fingerprint(other[1])


def test_prepared_documents_begin_and_end(tmp_path, llama2):
    for name in ("a", "b"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(f"line {name} says " * 90, encoding="utf-8")
    run = runs.open_run(f"hf:{llama2}")
    run.config.dataset, run.config.text, run.config.data_dir = "text", str(tmp_path / "texts"), str(tmp_path / "data")
    dataset = data.open_dataset(run.config, run.tokenizer)
    borders = dataset.documents("train")
    for begin, end in itertools.pairwise(borders):
        assert (dataset.train[begin], dataset.train[end - 1]) == (1, 2)
        assert (dataset.train[begin + 1 : end - 1] > 2).all()
    assert len(borders) == 3
    text = run.tokenizer.decode_bytes(dataset.train[borders[0] + 1 : borders[1] - 1])
    assert text.startswith(b" line a says line a says")


# ---- downloads


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of its server, for `server.folder` as owner/tiny and nothing else."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        folder, sha = self.server.folder, "0123456789" * 4
        headers, body = {"X-Error-Code": "RepoNotFound"}, b"{}"
        if self.path.startswith("/api/models/owner/tiny"):
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            files = [{"rfilename": name} for name in sizes]
            tree = [{"type": "file", "path": name, "size": size, "oid": sha} for name, size in sizes.items()]
            info = {"id": "owner/tiny", "sha": sha, "siblings": files}
            headers, body = {}, json.dumps(tree if "/tree/" in self.path else info).encode()
        elif self.path.startswith(f"/owner/tiny/resolve/{sha}/"):
            body = (folder / self.path.rpartition("/")[2]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(plain, tmp_path):
    """A server that has the tiny Llama, and beside it files that we have no use for."""
    folder = copy(plain["llama"], tmp_path / "published")
    (folder / "pytorch_model.bin").write_bytes(b"code" * 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked, server.daemon_threads = folder, [], True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub_at(tmp_path, monkeypatch):
    """hub_at(port, offline=False): the server that huggingface_hub asks, and a cache of its own."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setenv("no_proxy", "*")

    def choose(port, offline=False):
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        load.download.cache_clear()

    yield choose
    load.download.cache_clear()


def test_a_published_model_is_downloaded_once(hub, hub_at, tmp_path, plain, call_script):
    flags = ["--tokens=8", "--temperature=0", "--prompt=line 7"]
    hub_at(hub.server_port)
    done = call_script("sample.py", "hf:owner/tiny", *flags)
    assert done.returncode == 0
    assert done.stderr.endswith("\nhf:owner/tiny is now the run out/hf/owner--tiny\n")  # after a bar of huggingface_hub
    local = call_script("sample.py", f"hf:{plain['llama']}", *flags)
    assert done.stdout.partition(" tokens in")[0] == local.stdout.partition(" tokens in")[0]
    assert any(path.endswith("/model.safetensors") for path in hub.asked)
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    assert sum("/tree/" in path for path in hub.asked) == 1
    hub.asked.clear()
    hub_at(hub.server_port, offline=True)
    again = call_script("sample.py", "hf:owner/tiny", *flags)
    assert (again.returncode, again.stderr, hub.asked) == (0, "", [])
    assert again.stdout.partition(" tokens in")[0] == done.stdout.partition(" tokens in")[0]
    shutil.rmtree(tmp_path / "home")  # the run made from it is enough
    hub_at(hub.server_port, offline=True)
    last = call_script("sample.py", "hf:owner/tiny", *flags)
    assert (last.returncode, last.stderr, last.stdout.partition(" tokens in")[0]) == (
        0, "", done.stdout.partition(" tokens in")[0],
    )  # fmt: skip


def test_a_bit_that_flips_in_the_cache_is_found_by_the_name_of_the_file(hub, hub_at, tmp_path, call_script):
    hub_at(hub.server_port)
    run = runs.find("hf:owner/tiny").parent
    (blob,) = {path.resolve() for path in (tmp_path / "home").rglob("model.safetensors")}
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    shutil.rmtree(run)
    refused(call_script("sample.py", "hf:owner/tiny"), "model.safetensors is damaged", f"remove {blob}")
    blob.unlink()
    hub_at(hub.server_port)
    assert runs.find("hf:owner/tiny").exists()


def test_an_older_run_finds_the_tokenizer_of_a_downloaded_model(hub, hub_at, tmp_path):
    hub_at(hub.server_port)
    state = runs.load("hf:owner/tiny")
    (tmp_path / "older").mkdir()
    runs.save(tmp_path / "older", runs.CKPT, state | {"config": state["config"] | {"tokenizer": "hf:owner/tiny"}})
    assert runs.open_run(tmp_path / "older").config.tokenizer == "out/hf/owner--tiny/tokenizer.json"


def test_a_published_model_that_cannot_be_had_is_one_line(hub, hub_at, call_script):
    hub_at(hub.server_port)
    unknown = call_script("sample.py", "hf:owner/unknown")
    refused(unknown, "hf:owner/unknown", "404", "api/models/owner/unknown", "hf:FOLDER")
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        hub_at(free.getsockname()[1])
        nobody = call_script("sample.py", "hf:owner/tiny")
    refused(nobody, "hf:owner/tiny", "Connection refused", "hf:FOLDER")


def test_a_server_that_never_answers_is_not_waited_for(hub_at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at(silent.getsockname()[1])
        monkeypatch.setattr(load, "PATIENCE", 0.1)
        with pytest.raises(UserError, match="hf:owner/tiny is no folder here, and cannot be downloaded.*timed out"):
            runs.find("hf:owner/tiny")


# ---- the run that is made from a published model


def converted(folder):
    """Where the run made from hf:FOLDER lies."""
    return runs.find(f"hf:{folder}").parent


def test_a_published_model_becomes_a_run_folder_once(tmp_path, bpe, capsys, monkeypatch):
    folder = save(tmp_path / "tiny", bpe, "llama", torch.bfloat16)
    capsys.readouterr()  # of transformers
    run = converted(folder)
    assert capsys.readouterr().err == f"hf:{folder} is now the run {run}\n"
    assert (run.parent, run.name[:-8]) == (load.OUT, "tiny-")
    names = ["ckpt.pt", "config.json", "source.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["tokenizer"] == "tokenizer.json"
    state = runs.load(run)
    assert {weight.dtype for weight in state["model"].values()} == {torch.bfloat16}  # as published
    monkeypatch.setattr(load, "convert", None)
    opened = [runs.open_run(name) for name in (f"hf:{folder}", run, run / "ckpt.pt")]
    assert capsys.readouterr().err == ""
    for each in opened:
        assert (each.config.tokenizer, each.step) == (str(run / "tokenizer.json"), 0)
        assert all(
            torch.equal(weight, state["model"][name].float()) for name, weight in each.model.state_dict().items()
        )


def test_half_precision_becomes_float32_once_for_all_overrides(tmp_path, bpe):
    folder = save(tmp_path / "tiny", bpe, "llama", torch.bfloat16, tie_word_embeddings=True)
    one, other = runs.open_runs(f"hf:{folder}", ["", 'rope(scaling="linear", factor=2)'])
    for name, weight in one.model.state_dict().items():
        assert weight.dtype == torch.float32
        assert weight.data_ptr() == other.model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("what", ["config.json", "tokenizer.json", "model.safetensors", load.INDEX])
def test_a_source_that_changed_is_converted_anew(tmp_path, plain, capsys, what):
    folder = copy(plain["llama"], tmp_path / "tiny")
    run = converted(folder)
    before = runs.load(run)
    if what == load.INDEX:
        shard(folder)
    elif what == "model.safetensors":
        changed(folder, Q, lambda weight: weight + 1)
    elif what == "config.json":
        edit(folder, rms_norm_eps=0.25)
    else:
        retokenized(folder, lambda inner: inner["added_tokens"][0].update(special=False))
    capsys.readouterr()  # of transformers too
    assert runs.find(f"hf:{folder}").parent == run
    assert capsys.readouterr().err == f"hf:{folder} has changed: the run {run} is made anew\n"
    after = runs.load(run)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(before["model"][name], after["model"][name]) == (what != "model.safetensors")
    assert (before["config"] == after["config"]) == (what != "config.json")
    assert (before["tokenizer_fingerprint"] == after["tokenizer_fingerprint"]) == (what != "tokenizer.json")
    assert sorted(path.name for path in load.OUT.iterdir()) == [run.name, f"{run.name}.lock"]


def test_a_source_that_is_damaged_by_now_is_refused(tmp_path, plain, call_script):
    folder = copy(plain["llama"], tmp_path / "tiny")
    converted(folder)
    cut(folder / "model.safetensors")
    refused(call_script("sample.py", f"hf:{folder}", "--tokens=1"), "model.safetensors is damaged")


@pytest.mark.parametrize("name", ["tiny", "models/tiny"])  # the second may be an OWNER/NAME too
def test_a_source_that_is_gone_is_not_needed(tmp_path, plain, name, monkeypatch):
    copy(plain["llama"], tmp_path / name)
    before = runs.open_run(f"hf:{name}").model.state_dict()
    shutil.rmtree(tmp_path / name)
    monkeypatch.setattr(load, "download", None)
    after = runs.open_run(f"hf:{name}").model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_folders_of_one_name_do_not_collide(tmp_path, plain):
    copy(plain["llama"], tmp_path / "a" / "tiny")
    copy(plain["qwen2"], tmp_path / "b" / "tiny")
    one, other = (runs.open_run(f"hf:{tmp_path / parent / 'tiny'}") for parent in "ab")
    assert (one.config.bias, other.config.bias) == (False, "qkv")
    assert runs.names([f"hf:{tmp_path / parent / 'tiny'}" for parent in "ab"]) == [
        f"hf:{tmp_path / parent / 'tiny'}" for parent in "ab"
    ]


def test_what_else_lies_in_its_folder_stays_when_the_source_changes(tmp_path, plain):
    source = copy(plain["llama"], tmp_path / "source")
    folder = runs.find(f"hf:{source}").parent
    (folder / "reach").mkdir()
    (folder / "reach/results.json").write_text("{}", encoding="utf-8")
    before = (folder / runs.SOURCE).read_text(encoding="utf-8")
    os.utime(source / "config.json", (1, 1))
    assert runs.find(f"hf:{source}").parent == folder
    assert (folder / runs.SOURCE).read_text(encoding="utf-8") != before
    assert {path.name for path in folder.iterdir()} == {
        "reach", "ckpt.pt", "config.json", "tokenizer.json", "tokenizer_config.json", runs.SOURCE,
    }  # fmt: skip


def test_a_kill_while_it_is_made_leaves_nothing_that_is_used(tmp_path, plain):
    (tmp_path / "kill.py").write_text(
        "import os, signal, sys, torch\n"
        "from core import runs\n"
        "def half(state, file):\n"
        "    file.write(b'PK')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "runs.find(sys.argv[1])\n",
        encoding="utf-8",
    )
    name = f"hf:{plain['llama']}"
    killed = finish([sys.executable, tmp_path / "kill.py", name], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (path for path in load.OUT.iterdir() if path.is_dir())
    assert (left / "tokenizer.json").exists() and not (left / "ckpt.pt").exists()
    assert not (left / runs.SOURCE).exists()
    assert runs.find(name) == left / "ckpt.pt"
    assert (left / runs.SOURCE).exists()


def test_processes_that_want_it_at_once_make_it_once(plain, monkeypatch, capsys):
    convert, made = load.convert, []

    def slowly(source, folder):
        made.append(folder)
        time.sleep(0.1)
        convert(source, folder)

    monkeypatch.setattr(load, "convert", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(load.as_run, [f"hf:{plain['llama']}"] * 3))
    assert folders == set(made) and len(made) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_one_says_how_it_is_made_again(plain, call_script):
    run = converted(plain["llama"])
    cut(run / "ckpt.pt")
    refused(call_script("sample.py", run, "--tokens=1"), f"{run}/ckpt.pt is damaged", f"remove {run}")
    shutil.rmtree(run)
    assert call_script("sample.py", f"hf:{plain['llama']}", "--tokens=1").returncode == 0


# ---- the scripts


def lengthened(folder, target, length):
    """A copy that was trained at another length."""
    return copy(folder, target, max_position_embeddings=length)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_greedy_text_is_theirs(tmp_path, bpe, call_script, model_type):
    folder = save(tmp_path / "tiny", bpe, model_type)
    tokenizer, prompt = vocabulary.load(f"hf:{folder}"), "line 7 says that"
    ids = tokenizer.encode_ordinary(prompt)
    count = T - 1 - len(ids)
    greedy = dict(do_sample=False, max_new_tokens=count, suppress_tokens=[0], pad_token_id=0)  # 0 ends a text
    with torch.inference_mode():
        found = oracle(folder).generate(torch.tensor([ids]), **greedy)[0].tolist()
    assert len(set(found[len(ids) :])) > 5
    done = call_script("sample.py", f"hf:{folder}", f"--prompt={prompt}", f"--tokens={count}", "--temperature=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.partition(f"\n\n{count} tokens in")[0] == tokenizer.decode_bytes(found).decode(errors="replace")


def test_what_is_put_before_a_text_is_read_and_not_printed(llama2, call_script):
    done = call_script("sample.py", f"hf:{llama2}", "--prompt=line", "--tokens=3", "--samples=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[--- sample 1 ---]\n line") and "[--- sample 2 ---]\n line" in done.stdout
    assert "<s>" not in done.stdout
    begun = vocabulary.load(f"hf:{llama2}").encode_ordinary("line")
    assert f"{1 + len(begun)} - {3 + len(begun)} " in done.stdout  # <s> is a token of the prompt
    empty = call_script("sample.py", f"hf:{llama2}", "--tokens=3")
    assert empty.returncode == 0, empty.stderr
    assert "1 - 3 " in empty.stdout  # <s> alone


def test_a_published_model_is_evaluated(tmp_path, plain, bpe, llama2, call_script, monkeypatch):
    monkeypatch.setattr(report, "lines", lambda *_, **__: None)  # pictures are drawn in other tests
    (tmp_path / "text.txt").write_text(
        "".join(f"line {n} says that {n} times {n} is {n * n}.\n" for n in range(300)), encoding="utf-8"
    )
    for folder in (plain["llama"], save(tmp_path / "gpt2", bpe, "gpt2"), llama2):
        flags = ["--data=text.txt", "--targets=2", "--train_length=16", "--data_dir=data"]
        done = call_script("evaluate.py", f"hf:{folder}", *flags, f"--out_dir=reach/{folder.name}")
        assert done.returncode == 0, done.stderr
        (result,) = runs.read_json(tmp_path / "reach" / folder.name / "results.json")["runs"].values()
        assert result["lengths"][:2] == [8, 16] and result["step"] == 0
        assert all(0 < loss < 30 for loss in result["loss"])


def test_a_published_folder_is_not_written_into_and_a_run_is_none(plain, trained, call_script):
    for argv, said in (
        ([f"hf:{plain['llama']}", f"--out_dir={plain['llama']}"], "holds a run or a model"),
        ([f"hf:{trained}"], "is a run of this program; name it without hf:"),
    ):
        refused(call_script("evaluate.py", *argv), said)


@pytest.fixture
def tuning(tmp_path, plain, corpus):
    """(the folder of a published model, a run folder, flags of train.py that tune the one to twice its length)"""
    folder, out = lengthened(plain["llama"], tmp_path / "published", 16), tmp_path / "run"
    settings = {key: value for key, value in TINY.items() if key not in ("n_layer", "n_embd", "train_length")}
    settings |= {
        "init_from": f"hf:{folder}", "posenc": 'rope(scaling="yarn", factor=2)', "train_length": 32, "text": corpus,
        "data_dir": tmp_path / "data", "out_dir": out, "checkpoint_interval": 1000, "optimizer": "adamw",
        "learning_rate": 1e-2, "length_targets": 0,
    }  # fmt: skip
    return folder, out, [f"--{key}={value}" for key, value in settings.items()]


def test_a_published_model_is_tuned_to_twice_its_length_goes_on_after_a_stop_and_moves(tmp_path, tuning, call_script):
    folder, out, flags = tuning
    process = start([sys.executable, ROOT / "train.py", *flags], cwd=tmp_path)
    while process.poll() is None and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text(encoding="utf-8")
    ):
        time.sleep(0.005)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()  # before the first step
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    stopped = runs.load(out)["step"]
    assert 0 < stopped < TINY["max_steps"]
    done = call_script("train.py", *flags)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").open("rb")) if "loss" in line]
    assert len(losses) == TINY["max_steps"] and losses[-1] < losses[0] - 1
    assert runs.read_json(out / "config.json")["tokenizer"] == "tokenizer.json"
    for gone in (folder, load.OUT):
        shutil.rmtree(gone)
    moved = out.rename(tmp_path / "moved")
    state = runs.load(moved)
    config = runs.config_of(state)
    assert state["step"] == TINY["max_steps"]
    assert (config.train_length, config.original_length, config.tokenizer) == (32, 16, f"{moved}/tokenizer.json")
    assert posenc.parse(config.posenc) == (posenc.RoPE, {"base": 10000.0, "scaling": "yarn", "factor": 2}, {})
    done = call_script("evaluate.py", moved, "--targets=2")
    assert done.returncode == 0, done.stderr
    cut(moved / "tokenizer.json")
    refused(call_script("evaluate.py", moved, "--targets=2"), f"{moved}/tokenizer.json is damaged")


def test_a_run_that_was_tuned_before_tokenizers_were_copied_goes_on(tuning, call_script):
    folder, out, flags = tuning
    assert call_script("train.py", *flags, "--max_steps=2").returncode == 0
    state = torch.load(out / "ckpt.pt", weights_only=True)
    state["config"]["tokenizer"] = f"hf:{folder}"
    runs.save(out, "ckpt.pt", state)
    (out / "tokenizer.json").unlink()
    assert runs.open_run(out).tokenizer.path == folder / "tokenizer.json"
    done = call_script("train.py", *flags, "--max_steps=4")
    assert done.returncode == 0, done.stderr
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert (state["step"], state["config"]["tokenizer"]) == (4, "tokenizer.json")
    assert runs.load(out)["config"]["tokenizer"] == f"{out}/tokenizer.json"


def test_an_older_run_without_its_tokenizer_says_where_it_was(tmp_path, plain, call_script):
    folder = copy(plain["llama"], tmp_path / "published")
    state = runs.load(f"hf:{folder}")
    (tmp_path / "older").mkdir()
    runs.save(tmp_path / "older", "ckpt.pt", state | {"config": state["config"] | {"tokenizer": f"hf:{folder}"}})
    shutil.rmtree(folder)
    assert runs.open_run("older").tokenizer.n_vocab == V  # of the run that was made from it
    shutil.rmtree(load.OUT)
    refused(
        call_script("sample.py", "older"), "its tokenizer is that of a published model", f"hf:{folder} is no folder"
    )


def test_a_tokenizer_json_can_be_trained_with(tmp_path, plain, corpus, call_script):
    for name in (plain["llama"] / "tokenizer.json", f"hf:{plain['llama']}"):
        settings = TINY | {"tokenizer": name, "text": corpus, "data_dir": tmp_path / "data", "max_steps": 1}
        settings |= {"out_dir": "run", "length_targets": 0}
        done = call_script("train.py", *(f"--{key}={value}" for key, value in settings.items()))
        assert done.returncode == 0, done.stderr
        opened = runs.open_run("run")
        assert (opened.config.tokenizer, opened.tokenizer.eot_token) == ("run/tokenizer.json", 0)
        shutil.rmtree("run")
