"""Races measure both sides alike. The other side is a stand-in here: a script and a model of known loss."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import runs
from core.errors import UserError
from core.settings import Config
from data import vocabulary
from lab.bench import decode, others, published, race, timing

TEXT = "".join(chr(97 + n * n % 23) for n in range(4000))
MODEL = """
import math, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 64
    vocab_size: int = 23
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.0
    bias: bool = False
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, y=None):  # says the right token with a probability that its one weight decides
        return None, self.level.sigmoid().log().neg()
    def generate(self, tokens, count):
        for _ in range(count):
            self(tokens)
"""
TRAIN = """
import sys, torch
exec(open("configurator.py").read())
assert sys.argv[1].endswith("train_shakespeare_char.py") and "--max_iters=2000" in sys.argv
SIZES = {"batch_size": 12, "block_size": 64}
for step in (10, 20):
    weights, shape = {"level": torch.tensor(step / 10)}, {"vocab_size": 23, "block_size": 64}
    torch.save({"model": weights, "iter_num": step, "model_args": shape, "config": SIZES}, "ckpt.pt")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "theirs"
    (folder / "config").mkdir(parents=True)
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    (folder / "train.py").write_text(TRAIN, encoding="utf-8")
    (folder / "configurator.py").write_text("", encoding="utf-8")
    (folder / "config" / "train_shakespeare_char.py").write_text("", encoding="utf-8")
    return folder


def cells(lines):
    """Lines of Markdown -> rows of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_a_full_pass_scores_every_token_but_the_first_once():
    seen = []

    def losses(x, y):
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen.extend(y.flatten().tolist())
        return float(y.sum())

    ids = torch.arange(1000) % 7
    assert race.full_pass(losses, ids, 64, at_once=3) == float(ids[1:].sum()) / 999
    assert sorted(seen) == sorted(ids[1:].tolist())
    assert race.full_pass(losses, ids[:65], 64) == float(ids[1:65].sum()) / 64  # no rest


def stand_in(words, work):
    """Checkpoints such as `race.timed` finds, without the processes that make them."""
    work, theirs = Path(work), "theirs" in words[0]
    checkpoints = {}
    for index, step in enumerate((10, 20) if theirs else (2, 4), start=1):
        if theirs:
            state = {
                "model": {"level": torch.tensor(step / 10)},
                "model_args": {"vocab_size": 23, "block_size": 64},
                "config": {"batch_size": 12, "block_size": 64},
            }
        else:
            config = Config(vocab_size=257, n_layer=1, n_embd=16, n_head=2, train_length=64)
            state = {"model": runs.build(config).state_dict(), "config": runs.plain(config), "step": step}
            state["tokenizer_fingerprint"] = vocabulary.fingerprint(vocabulary.load("bytes"))
        torch.save(state, work / f"{index}.pt")
        checkpoints[step] = float(index), work / f"{index}.pt"
    return checkpoints, 2.5


@pytest.mark.parametrize("timed", [stand_in, pytest.param(race.timed, marks=pytest.mark.slow)])
def test_the_race_prints_both_sides(timed, checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "timed", timed)
    monkeypatch.setattr(race, "fetch", lambda *_: checkout.parent / "text.txt")
    monkeypatch.setattr(race, "THEIRS", ["--max_iters=2000"])
    (checkout.parent / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = f"--text={checkout.parent}/text.txt --dataset=text --max_steps=4 --eval_interval=2 --checkpoint_interval=2"
    small = "--length_schedule={} --n_layer=1 --n_embd=16 --n_head=2 --train_length=64 --batch_size=2 --compile=false"
    monkeypatch.setattr(race, "OURS", {"trainshort": f"configs/shakespeare.py {flags} {small}"})
    rows = cells(race.measure(race.Options(rounds=2, data_dir=str(tmp_path / "data")), checkout))
    theirs = {row[1]: row for row in rows if row[0] == "nanoGPT" and len(row) == 5}
    for step in (10, 20):
        loss = math.log1p(math.exp(-step / 10))
        assert theirs[str(step)][3].startswith(f"{loss:.4f}")
        assert theirs[str(step)][4] == "-"  # its positions end at 64
    ours = [row for row in rows if row[0] == "trainshort" and len(row) == 5]
    assert [row[1] for row in ours] == ["2", "4"]
    for row in ours:
        seconds = [float(number) for number in re.findall(r"[\d.]+", row[2])]
        assert 0 < seconds[1] <= seconds[0] <= seconds[2] < 300
        assert 2 < float(row[3].split()[0]) < math.log(257) + 1


@pytest.mark.slow
def test_a_process_is_timed_and_every_checkpoint_kept(checkout, tmp_path):
    race.NanoGPT(checkout, TEXT, tmp_path)
    script, config = checkout / "train.py", checkout / "config" / "train_shakespeare_char.py"
    checkpoints, seconds = race.timed([str(script), str(config), "--max_iters=2000"], tmp_path)
    assert list(checkpoints) == [10, 20]
    assert 0 < checkpoints[10][0] <= checkpoints[20][0] <= seconds
    for step, (_, file) in checkpoints.items():
        assert torch.load(file, weights_only=True)["model"]["level"] == step / 10
    script.write_text("raise SystemExit('the disk is full')", encoding="utf-8")
    with pytest.raises(UserError, match="failed: the disk is full"):
        race.timed([str(script)], tmp_path)


def test_a_goal_is_reached_at_the_first_checkpoint_below_it():
    result = race.Result({64: [(1.0, 10, 2.0), (2.0, 20, 1.5), (3.0, 30, 1.6)], 256: [(1.0, 10, None)]}, 4.0, 1.0)
    assert result.reached(64, 1.7) == 2.0
    assert result.reached(64, 1.4) is None
    assert result.reached(256, 9.9) is None
    assert timing.spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 - 3.0)"
    assert timing.spread([3.0, None], ".1f") == "-"


def test_what_is_no_checkout_of_nanogpt_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.py"):
        others.nanogpt(tmp_path)


@pytest.mark.parametrize("transformers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decoding_is_timed_for_every_contestant(transformers, checkout, monkeypatch):
    if not transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    elif not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    monkeypatch.setattr(decode.places, "compiled", lambda model, *_, **__: (model, None))
    options = decode.Options(rounds=1, decode_tokens=5, train_length=4, n_layer=1, n_embd=16, n_head=2, vocab_size=20)
    head, *rows = cells(decode.measure(options, checkout))
    assert [row[0] for row in rows] == ["4", "4", "16", "16", "64", "64"]
    assert [cell.removesuffix(" tokens/s") for cell in head[2:]] == (
        ["trainshort", "nanoGPT", "transformers", "trainshort / nanoGPT", "trainshort / transformers"]
        if transformers
        else ["trainshort", "nanoGPT", "trainshort / nanoGPT"]
    )
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[1:4])


def published_llama(folder):
    """A folder as transformers saves a tiny Llama, with a tokenizer of 256 bytes and the end of a text."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    letters = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    shape = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
def test_a_published_model_goes_on_as_in_transformers(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(published, "CONTEXTS", (24, 48))
    monkeypatch.chdir(tmp_path)
    folder = published_llama(tmp_path / "llama")
    head, *rows = cells(published.measure(published.Options(rounds=2, decode_tokens=8), folder))
    assert len(head) == 9 and [row[:2] for row in rows] == [
        [d, n] for d in ("float32", "bfloat16") for n in ("24", "48")
    ]
    for row in rows:
        assert all(float(row[index].replace(",", "")) > 0 for index in (2, 3, 5, 6))
        assert all(re.fullmatch(r"[\d.]+ \([\d.]+ - [\d.]+\)", row[index]) for index in (4, 7))
    assert [row[8] for row in rows[:2]] == ["8 of 8", "8 of 8"]


def test_what_a_published_model_lacks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"has no config\.json"):
        published.measure(published.Options(), tmp_path)
    (tmp_path / "config.json").touch()
    opened = SimpleNamespace(model=SimpleNamespace(max_length=512))
    monkeypatch.setattr(published.runs, "open_run", lambda name: opened)
    with pytest.raises(UserError, match=r"512 positions, and 1040 are needed"):
        published.measure(published.Options(), tmp_path)
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-hf\.txt"):
        published.measure(published.Options(), tmp_path)
