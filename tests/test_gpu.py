"""The tables of `lab.bench.gpu`, made on the CPU from a tiny model: what it measures on a GPU, a GPU shows."""

import dataclasses
import re

import pytest
import torch

from core.place import Place
from lab.bench import gpu, timing
from model import GPT, GPTConfig

CPU = Place(torch.device("cpu"), torch.float32)
TINY = gpu.Options(
    vocab_size=20, n_layer=1, n_embd=16, n_head=2, train_length=8, batch_size=2, rounds=1, tie_embeddings=True,
    decode_tokens=2, only="rope",
)  # fmt: skip
NANOGPT = '''
"""Takes what nanoGPT's model takes."""
from dataclasses import dataclass
import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool
    dropout: float


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.token = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, x, y):
        logits = self.head(self.token(x))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
'''


@pytest.fixture
def measured(monkeypatch):
    """measured(options) -> the tables, as lists of rows of cells, and the lines below them."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    for name, value in {"LENGTHS": (1, 2), "PRODUCT": 16, "MEGABYTES": 1, "LAYERS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(gpu, name, value)

    def measure(options):
        *tables, last = "\n".join(gpu.tables(options, CPU)).split("\n\n")
        notes = [line for line in last.splitlines() if line.startswith("- ")]
        tables += [] if notes else [last]
        return [[re.findall(r"\|([^|\n]*)", row) for row in table.splitlines()] for table in tables], notes

    return measure


def checkout(folder):
    """A stand-in for nanoGPT."""
    (folder / "config").mkdir()
    for name in ("train.py", "configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).touch()
    (folder / "model.py").write_text(NANOGPT, encoding="utf-8")


@pytest.mark.slow
def test_every_cell_has_a_figure(measured, tmp_path, capsys):
    checkout(tmp_path)
    tables, notes = measured(dataclasses.replace(TINY, nanogpt=str(tmp_path)))
    assert [[len(table) - 2, len(table[0]) - 1] for table in tables] == [[2, 2], [2, 5], [1, 4], [4, 3], [2, 3]]
    assert all(len(row) == len(table[0]) for table in tables for row in table)
    assert all(cell.strip() for table in tables for row in table for cell in row[:-1])
    assert [row[0].strip() for row in tables[1][2:]] == ["rope", "nanoGPT"]
    assert not notes
    assert "number of parameters" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_fails_is_an_empty_cell_and_a_line(measured, monkeypatch):
    step = timing.training_step

    def failing(config, *arguments):
        if config.posenc == "none":
            raise RuntimeError("the compiler gave up\nand said much more")
        return step(config, *arguments)

    monkeypatch.setattr(timing, "training_step", failing)
    tables, notes = measured(TINY)
    assert [cell.strip() for cell in tables[4][2][:-1]] == ["none", "", ""]
    assert tables[4][3][1].strip()
    assert notes == ["- none: the compiler gave up"]


def test_no_time_left_is_a_table_without_figures(measured, monkeypatch):
    monkeypatch.setattr(gpu, "MINUTES", 0)
    tables, notes = measured(TINY)
    assert not any(cell.strip() for table in tables[1:] for row in table[2:] for cell in row[1:-1])
    assert len(notes) == 1 + 1 + 4 * 2 + 2
    assert all(note.endswith(": no time was left") for note in notes)


def test_a_token_reads_tied_embeddings_once_and_others_not_at_all():
    for tied in (True, False):
        config = dataclasses.replace(TINY, tie_embeddings=tied)
        size = 4 * sum(p.numel() for p in GPT(GPTConfig(vocab_size=20, n_layer=1, n_embd=16, n_head=2)).parameters())
        assert gpu.decoding(config, CPU)[1] == size - 4 * 20 * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so_in_a_line(call_script):
    done = call_script("lab/bench/gpu.py")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "needs an NVIDIA GPU" in done.stderr


def test_a_checkout_that_is_none_is_a_line(call_script):
    done = call_script("lab/bench/gpu.py", "--nanogpt=nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--nanogpt" in done.stderr
