"""A run written as a Hugging Face folder: transformers computes the same from it, and what it cannot is refused."""

import dataclasses
import json
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

WHY = "needs the extra: pip install -r requirements-hf.txt"
transformers = pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("safetensors", reason=WHY)
pytest.importorskip("tokenizers", reason=WHY)

import tiktoken
from tiny import ROOT, finish

from core import runs
from core.errors import UserError
from core.flags import make, read
from core.settings import Config
from data import bpe, tokenizer_json, vocabulary
from hub import export, load
from posenc import every

T = 16
SMALL = dict(train_length=T, n_layer=2, n_embd=32, n_head=2)
GPT2 = read(ROOT / "configs/gpt2_style.py", Config) | {"tie_embeddings": False}
BLOOM = GPT2 | dict(posenc="alibi", embed_norm=True, activation="gelu_tanh")
LONGROPE = f'rope(scaling="longrope", short_factor={[1.0] * 8}, long_factor={[1, 1.5, 2, 3, 4, 5, 6, 7]}, factor='
TEXTS = [
    "",
    "It's 12345 o'clock;  they'LL say \"naïve café\" — 日本語 नमस्ते 👩‍👩‍👧 e\u0301.\r\n\r\n\tx\n \n  ",
    "\u00a0\u2028\u200b\ufeff\x00\x7f 'ſ ﬀ Ⅷ ½ ١٢٣ \U0001f1e9\U0001f1ea",
    "supercalifragilistic" * 20,
    (ROOT / "model.py").read_text(encoding="utf-8")[:20000],
    "".join(random.Random(0).choices("abe ll ve\n\t_.1é日K'\r\u00a0\u0301👩‍", k=5000)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """What hf:... is converted to goes to tmp_path/out/hf."""
    monkeypatch.chdir(tmp_path)


def save(folder, tokens="bytes", **settings):
    """A run folder of a tiny model whose parameters are all random, and that model."""
    tokenizer = vocabulary.load(tokens)
    config = make(Config, SMALL | {"vocab_size": tokenizer.n_vocab + 3, "tokenizer": tokens} | settings)
    model, generator = runs.build(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    state = {"model": model.state_dict(), "step": 0, "config": dataclasses.asdict(config)}
    folder.mkdir()
    runs.save(folder, runs.CKPT, state | {"tokenizer_fingerprint": vocabulary.fingerprint(tokenizer)})
    return model


def written(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def check(model, folder, lengths=(5, T, 3 * T)):
    """transformers, and this project, compute from the folder what the model computes."""
    again = runs.open_run(f"hf:{folder}").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            ours = model(tokens)
            assert ours.std() > 0.1
            torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-4, rtol=0)
            torch.testing.assert_close(again(tokens), ours, atol=1e-4, rtol=0)


MODELS = [
    ("llama", {}),  # the project's own habits
    ("llama", dict(tie_embeddings=True, n_kv_head=1, norm_eps=1e-3, n_hidden=40)),
    ("llama", dict(tie_embeddings=True, embed_norm=False, norm_affine=True, bias=True)),
    ("llama", dict(bias="attention", norm_affine=True)),
    ("llama", dict(bias="qkv")),
    ("llama", dict(posenc="none")),
    ("llama", dict(posenc=["rope", "rope(base=10000)"])),  # a list that gives all layers the same
    ("gpt2", GPT2 | dict(posenc="learned", tie_embeddings=True)),
    ("gpt2", GPT2 | dict(posenc="learned", embed_norm=True, tie_embeddings=True, norm_affine=False, bias="qkv")),
    ("gpt2", GPT2 | dict(posenc="learned", activation="relu2", bias=False, original_length=8)),
    ("gpt_neox", GPT2 | dict(posenc="rope")),
    ("gpt_neox", GPT2 | dict(posenc="rope(dims=4, base=500)", parallel_residual=True, tie_embeddings=True)),
    ("gpt_neox", GPT2 | dict(posenc='rope(dims=30, scaling="yarn")', n_embd=88, activation="gelu_tanh")),
    ("gpt_neox", GPT2 | dict(posenc="rope(fraction=0.5)", norm_affine=False, bias=False, embed_norm=True)),
    ("bloom", BLOOM),
    ("bloom", BLOOM | dict(posenc='alibi(slopes="paper")', tie_embeddings=True, bias="attention", norm_affine=False)),
    ("bloom", BLOOM | dict(n_head=3, n_embd=48)),
]


@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_every_family_computes_the_same(kind, settings, tmp_path, call_script):
    model = save(tmp_path / "run", **settings)
    done = call_script("hub/export.py", tmp_path / "run", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"next: python sample.py hf:{tmp_path / 'there'} --prompt=...\n")
    assert written(tmp_path / "there")["model_type"] == kind
    lengths = (5, model.max_length) if settings.get("posenc") == "learned" else (5, T, 3 * T)
    check(model, tmp_path / "there", lengths)
    if settings.get("posenc") == "learned":
        assert runs.open_run(f"hf:{tmp_path / 'there'}").model.max_length == model.max_length


SCALINGS = [
    "rope(fraction=0.5)", "rope(fraction=0.0)", 'rope(fraction=0.75, scaling="linear", factor=3)',
    'rope(scaling="linear")', 'rope(scaling="linear", factor=1)', 'rope(scaling="ntk", factor=4)',
    'rope(fraction=0.75, scaling="ntk")', 'rope(scaling="dynamic", factor=1)', 'rope(scaling="dynamic", factor=3)',
    'rope(scaling="yarn", factor=2)', 'rope(scaling="yarn", factor=3)',
    'rope(scaling="yarn", truncate=False, beta_fast=8, attention_factor=1.3)', 'rope(scaling="llama3", base=500000)',
    f"{LONGROPE}2)", f"{LONGROPE}4, attention_factor=1.5)",
]  # fmt: skip


@pytest.mark.parametrize("original", [pytest.param(0, marks=pytest.mark.slow), T // 2])
@pytest.mark.parametrize("spec", SCALINGS)
def test_every_scaling_of_rope_computes_the_same(spec, original, tmp_path):
    model = save(tmp_path / "run", posenc=spec, original_length=original)
    export.main([str(tmp_path / "run"), str(tmp_path / "there")])
    assert written(tmp_path / "there")["model_type"] == "llama"
    check(model, tmp_path / "there", (5, T // 2, T, 3 * T))


def test_a_scaling_laid_over_the_run_is_written(trained, tmp_path, call_script):
    done = call_script("hub/export.py", trained, "there", '--posenc=rope(scaling="yarn", factor=4)')
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "there")["rope_scaling"]["rope_type"] == "yarn"
    check(runs.open_run(trained, override='rope(scaling="yarn", factor=4)').model, tmp_path / "there")


def test_a_trained_run_goes_out_and_is_sampled_from(trained, tmp_path, run_script):
    done = run_script("hub/export.py", trained, "a/there")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "a/there").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["there"]
    check(runs.open_run(trained).model, tmp_path / "a/there")
    texts = [run_script("sample.py", run, "--tokens=20", "--prompt=line 7").stdout for run in (trained, "hf:a/there")]
    assert texts[0].partition(" tokens in")[0] == texts[1].partition(" tokens in")[0] != ""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bloom"])
@pytest.mark.parametrize("tokens", ["bytes", "bpe"])
def test_tokenizers_give_the_same_ids(tokens, kind, tmp_path):
    posenc = {"gpt2": "learned", "bloom": "alibi"}.get(kind, "rope")
    settings = {} if kind == "llama" else (BLOOM if kind == "bloom" else GPT2) | dict(posenc=posenc)
    save(tmp_path / "run", tokens, **settings)
    export.main([str(tmp_path / "run"), str(tmp_path / "there")])
    assert written(tmp_path / "there")["model_type"] == kind
    tokenizer, theirs = vocabulary.load(tokens), transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer.encode_ordinary(text)
        assert theirs.decode(tokenizer.encode_ordinary(text)) == text
    end = tokenizer.eot_token
    assert theirs("a<|endoftext|>").input_ids == [*tokenizer.encode_ordinary("a"), end]
    assert theirs.eos_token_id == theirs.bos_token_id == written(tmp_path / "there")["eos_token_id"] == end
    assert theirs.model_max_length == T
    assert vocabulary.fingerprint(vocabulary.load(f"hf:{tmp_path / 'there'}")) == vocabulary.fingerprint(tokenizer)


PATTERNS = {  # as tiktoken writes them
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_other_vocabularies(name):
    ranks = bpe.train(TEXTS, 900, pattern=tokenizer_json.dialect(PATTERNS[name]).replace(r"\z", r"\Z"))
    special = {"<|endoftext|>": len(ranks) + 1, "<|other|>": len(ranks) + 4}  # ids with gaps
    tokenizer = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special)
    inner = tokenizer_json.inner(tokenizer)
    for text in TEXTS:
        assert inner.encode(text).ids == tokenizer.encode_ordinary(text)
    assert {text: inner.token_to_id(text) for text in special} == special


def test_merges_are_those_that_were_learned():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    assert tokenizer_json.merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]  # and xyz is whole words alone


@pytest.mark.parametrize("settings", [dict(bias="qkv"), {}])
def test_a_run_from_a_published_model_keeps_its_tokenizer(settings, tmp_path):
    """Such a run has its tokenizer from the folder, and goes out as the family that has these biases."""
    save(tmp_path / "run", "bpe", **settings)
    export.main([str(tmp_path / "run"), str(tmp_path / "there")])
    state = runs.load(f"hf:{tmp_path / 'there'}")
    (tmp_path / "tuned").mkdir()
    if settings:
        state["config"]["bias"] = "qkv"
        state["model"] = {name: x for name, x in state["model"].items() if not name.endswith("attn.proj.bias")}
    config = runs.config_of(state)
    runs.bring_tokenizer(config, tmp_path / "tuned")
    runs.save(tmp_path / "tuned", runs.CKPT, state | {"config": runs.plain(config)})
    export.main([str(tmp_path / "tuned"), str(tmp_path / "again")])
    assert written(tmp_path / "again")["model_type"] == ("qwen2" if settings else "llama")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()
    check(runs.open_run(tmp_path / "run").model, tmp_path / "again")


OWN = "its layers have no {} of their own"
OBSTACLES = [
    (dict(posenc="xpos"), "llama", "posenc='xpos'"),
    (dict(posenc="learned"), "llama", "posenc='learned'"),
    (dict(posenc="rope(dims=4)"), "llama", "posenc='rope(dims=4)'"),
    (dict(posenc='rope(fraction=0.5, scaling="yarn")'), "llama", "posenc='rope(fraction=0.5, scaling=\"yarn\")'"),
    (dict(posenc="rope(window=8)"), "llama", "posenc='rope(window=8)'"),
    (dict(posenc=["rope", "none"]), "llama", "layer 2's none (its layers share one encoding)"),
    (dict(posenc=["rope", "alibi"], qk_norm=True), "llama", "layer 2's alibi (it has no such encoding), qk_norm=True"),
    (dict(posenc=["rope(window=8)", "rope"]), "llama", f"layer 1's rope(window=8) ({OWN.format('window')})"),
    (dict(posenc=["rope", 'none(temper="su")']), "llama", f'layer 2\'s none(temper="su") ({OWN.format("temper")})'),
    (
        dict(posenc=["none", "none", "alibi(window=8)"], n_layer=3, window_schedule={0.0: 0.5, 0.5: 1.0}),
        "llama",
        f"layer 3's alibi(window=8) ({OWN.format('window')})",
    ),
    (dict(logit_softcap=30.0, qk_norm=True), "llama", "qk_norm=True, logit_softcap=30.0"),
    (dict(activation="relu2"), "llama", "activation='relu2'"),
    (dict(parallel_residual=True), "llama", "parallel_residual=True"),
    (GPT2 | dict(posenc='learned(overflow="clamp")'), "gpt2", "posenc='learned(overflow=\"clamp\")'"),
    (GPT2 | dict(posenc="rope(dims=4, fraction=0.5)"), "gpt2", "posenc='rope(dims=4, fraction=0.5)'"),
    (BLOOM | dict(n_hidden=40), "bloom", "n_hidden=40"),
    (BLOOM | dict(posenc='alibi(slopes="paper")', n_head=3, n_embd=33), "bloom", "posenc='alibi(slopes=\"paper\")'"),
]


@pytest.mark.parametrize(("settings", "nearest", "named"), OBSTACLES)
def test_what_stands_in_the_way_is_named_in_one_line(settings, nearest, named, tmp_path, call_script):
    save(tmp_path / "run", **settings)
    done = call_script("hub/export.py", tmp_path / "run", "there")
    assert done.returncode == 2
    assert done.stderr == (
        f"export.py: no published family has models with these settings; the nearest is {nearest}, but for {named}\n"
    )
    assert not list(tmp_path.glob("there*"))


def test_numbers_and_disks_have_ends(trained, tmp_path, call_script, monkeypatch):
    done = call_script("hub/export.py", trained, "there", '--posenc=rope(scaling="ntk", factor=1e29, base=1e29)')
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "numbers go to 1e30" in done.stderr
    member = 'rope(scaling="ntk", factor=1e29, base=1e29)'
    with pytest.raises(UserError, match=f"^posenc: {re.escape(member)} cannot be written: ") as refused:
        export.choose(make(Config, SMALL | dict(vocab_size=50, posenc=["rope", member])))
    assert "\n" not in str(refused.value)

    def full(*_):
        raise export.SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    done = call_script("hub/export.py", trained, "there")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith("model.safetensors cannot be written: No space left on device\n")
    assert not (tmp_path / "there").exists()


def test_a_folder_with_something_in_it_is_left_alone(trained, tmp_path, call_script):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name in ("there", "file"):
        done = call_script("hub/export.py", trained, name)
        assert (done.returncode, done.stderr) == (2, f"export.py: {name} holds something already; name a new folder\n")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]
    (tmp_path / "there/notes.txt").unlink()
    assert call_script("hub/export.py", trained, "there").returncode == 0  # an empty one will do
    assert (tmp_path / "there/config.json").exists()


def test_what_lies_beside_the_folder_is_not_touched(trained, tmp_path, call_script):
    (tmp_path / "there.part").mkdir()
    (tmp_path / "there.part/notes.txt").write_text("mine", encoding="utf-8")
    assert call_script("hub/export.py", trained, "there").returncode == 0
    assert (tmp_path / "there.part/notes.txt").read_text(encoding="utf-8") == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "there.part"}


def test_a_killed_export_leaves_no_folder_and_the_next_one_removes_its_litter(trained, tmp_path, call_script):
    (tmp_path / "kill.py").write_text(
        "import os, signal, sys\n"
        "from hub import export\n"
        "export.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    folder = tmp_path / "a" / "there"
    killed = finish([sys.executable, tmp_path / "kill.py", trained, folder])
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in folder.parent.iterdir()} == {".there.lock", ".there.part"}
    with export.whole(folder):  # as long as another process writes it
        done = call_script("hub/export.py", trained, folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"another process writes {folder}" in done.stderr
    assert call_script("hub/export.py", trained, folder).returncode == 0
    assert [path.name for path in folder.parent.iterdir()] == ["there"]
    check(runs.open_run(trained).model, folder)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a run and a folder to write; usage: python -m hub.export RUN FOLDER"),
        (["a", "b", "c"], "name a run and a folder to write"),
        (["nowhere", "there"], "no run nowhere"),
        (["nowhere", "there", "--posens=rope"], "unknown key 'posens'"),
    ],
)
def test_mistakes_are_one_line(argv, said, tmp_path, call_script):
    done = call_script("hub/export.py", *argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path(tmp_path / "there").exists()


def test_help(call_script):
    done = call_script("hub/export.py", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m hub.export RUN FOLDER")


def test_without_the_extra_it_says_what_to_install(trained, call_script, monkeypatch):
    monkeypatch.setattr(load, "tokenizer_json", None)
    done = call_script("hub/export.py", trained, "there")
    assert done.returncode == 2
    assert done.stderr.endswith("pip install -r requirements-hf.txt\n")


@pytest.mark.parametrize(
    "spec", [spec for spec in every() if not spec.startswith(("rope", "none", "learned", "alibi"))]
)
def test_other_encodings_stand_in_the_way(spec):
    config = Config(posenc=spec, vocab_size=50, train_length=16)
    with pytest.raises(UserError, match="no published family has models with these settings.*posenc="):
        export.choose(config)
