"""The loss against context and the usual perplexities, on models whose right answers are known."""

import math

import numpy as np
import pytest
import torch
from small import CPU, dataset

import data
from core import cache, measure
from core.measure import length_loss
from lab import perplexity, tables
from model import GPT, GPTConfig

FEW = (0.5, 1, 1.5, 2, 4, 8)


class Recorder:
    """Stands for a model: writes down what it is asked, and answers with a loss of 1 for every target."""

    bounded = False

    def __init__(self, train_length, max_length=math.inf):
        self.config, self.max_length = GPTConfig(train_length=train_length, vocab_size=1), max_length
        self.calls, self.context = [], []

    def __call__(self, tokens, targets=None, past=None, last=None):
        self.context.append(tokens)
        if targets is None:
            return None
        self.calls.append((torch.cat(self.context, dim=1), targets))
        self.context = []
        return torch.ones(targets.shape)


def test_every_length_is_scored_on_the_same_targets_with_the_tokens_before_them():
    model = Recorder(train_length=16)
    result = length_loss(model, dataset([200, 50, 300]), CPU, count=10, multiples=FEW)
    assert result["lengths"] == [8, 16, 24, 32, 64, 128]
    assert result["loss"] == [1.0] * 6
    longest = model.calls[-1][0]
    for (seen, targets), length in zip(model.calls, result["lengths"], strict=True):
        assert seen.shape == (10, length)
        assert targets.shape == (10, 4)
        assert torch.equal(seen, longest[:, -length:])  # only the context before grows
        assert torch.equal(targets, seen[:, -4:] + 1)  # tokens are numbered: the next ones
    assert len(set(targets.flatten().tolist())) == 40  # no target twice
    for row in longest:  # inside one document
        assert any(start <= row[0] and row[-1] + 1 < stop for start, stop in ((0, 200), (250, 550)))
    assert {int(row[0]) < 200 for row in longest[:2]} == {True, False}  # of as many documents as there are


def test_documents_that_are_too_short_are_read_across():
    result = length_loss(Recorder(16), dataset([100] * 20), CPU, 5, FEW)
    assert result["lengths"][-1] == 128


def test_windows_come_from_all_over_the_text():
    one = measure.long_windows(dataset([1000]), 64, 4, 5)
    assert one[:, -1].tolist() == [64, 296, 528, 760, 996]  # the last ids, which are numbered
    short = measure.long_windows(dataset([70, 70, 70, 70]), 64, 4, 8)  # fewer than eight would fit into documents
    assert len(short) == 8
    assert short[-1, -1] > 270


def test_lengths_the_validation_text_cannot_hold_are_left_out():
    assert length_loss(Recorder(16), dataset([60]), CPU, 5, FEW)["lengths"] == [8, 16, 24, 32]


def test_lengths_without_positions_are_left_out():
    result = length_loss(Recorder(16, max_length=16), dataset([500]), CPU, 5, FEW)
    assert (result["lengths"], len(result["loss"])) == ([8, 16], 2)
    assert tables.table({"learned": result, "rope": result | {"lengths": [8, 32]}}, "loss")[2:] == [
        "| learned | 1.000 | 1.000 | no position | 1 T |",
        "| rope | 1.000 | no position | 1.000 |  |",
    ]


def uniform(vocab_size):
    """A model that holds every token for equally likely."""
    model = GPT(GPTConfig(vocab_size=vocab_size, n_layer=1, n_embd=32, train_length=16)).eval()
    torch.nn.init.zeros_(model.head.weight)
    return model


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary():
    ids = np.random.default_rng(0).integers(40, size=600)
    result = length_loss(uniform(40), dataset([600], ids), CPU, 8, FEW)
    assert result["loss"] == pytest.approx([math.log(40)] * 6, rel=1e-6)
    windows, sizes = data.even_windows(ids, 16, 10), np.arange(40) % 3 + 1
    nats, bits = measure.validation_loss(uniform(40), windows, sizes, CPU, rows=3)
    assert nats == pytest.approx(math.log(40), rel=1e-6)
    assert bits == pytest.approx(160 * math.log2(40) / sum(int(sizes[y]) for y in windows[1].flatten()), rel=1e-6)


def exact_model(**changes):
    config = dict(vocab_size=40, n_layer=2, n_embd=32, train_length=16, zero_init=False) | changes
    return GPT(GPTConfig(**config)).double().eval()


def test_chunks_and_batches_change_nothing(monkeypatch):
    ids = np.random.default_rng(0).integers(40, size=2000)
    losses = []
    for rows, chunk in ((1000, 1000), (1, 5), (3, 64)):
        monkeypatch.setattr(measure, "at_once", lambda model, length, rows=rows: rows)
        for module, name in ((cache, "WHOLE"), (cache, "PIECE"), (measure, "PIECE")):
            monkeypatch.setattr(module, name, chunk)
        losses.append(length_loss(exact_model(), dataset([2000], ids), CPU, 8, (0.5, 1.1, 5))["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (7, 3), (40, 40), (8, 1)])
def test_windows_give_every_token_the_context_they_say(length, stride):
    model, ids = exact_model(), torch.randint(40, (2, 31))
    got = measure.windowed_losses(model, ids, length, stride, CPU)
    assert got.shape == (2, 30)
    for token in range(1, 31):  # one token at a time, without a cache
        behind = 0 if token <= length else (token - length - 1) // stride * stride + stride
        assert token <= length or length - stride < token - behind <= length
        log_p = model(ids[:, behind:token])[:, -1].log_softmax(-1)
        for row in range(2):
            assert got[row, token - 1].item() == pytest.approx(-log_p[row, ids[row, token]].item(), rel=1e-6)


def test_the_usual_measures_are_means_over_the_same_tokens():
    ids, sizes = np.random.default_rng(0).integers(40, size=600), np.arange(40) % 3 + 1
    model, text = exact_model(), dataset([600], ids)
    found = perplexity.usual_losses(model, text, sizes, CPU, 2, (0.5, 1, 1.1, 4))
    stretches = torch.tensor(np.stack([ids[begin : begin + 65] for begin in (0, 600 - 65)]))
    targets = stretches[:, 1:]
    for index, length in enumerate((8, 16, 18, 64)):
        windows = zip(stretches[:, :-1].split(length, 1), targets.split(length, 1), strict=True)
        apart = torch.cat([model(x, y) for x, y in windows], 1)
        assert found["non_overlapping"][index] == pytest.approx(apart.mean().item(), rel=1e-6)
        bits = apart.sum().item() / math.log(2) / int(sizes[targets].sum())
        assert found["bits_per_byte"][index] == pytest.approx(bits, rel=1e-6)
    assert found["sliding"][3] == found["non_overlapping"][3]  # one window
    assert found["sliding"][0] != found["non_overlapping"][0]
    found = perplexity.position_loss(model, text, CPU, 2, T=8)
    assert found["position"] == [2 * i + 1 for i in range(32)]
    assert found["loss"][5] == pytest.approx(apart[:, 10:12].mean().item(), rel=1e-6)


def test_a_window_and_the_training_length_of_another_run():
    ids = np.random.default_rng(0).integers(40, size=600)
    model, text = exact_model(n_layer=1), dataset([600], ids)
    whole, windowed = (length_loss(model, text, CPU, 4, (1, 8), T=8, window=w)["loss"] for w in (None, 8))
    assert whole[0] == pytest.approx(windowed[0], rel=1e-9)
    assert whole[1] != windowed[1]
    window = torch.tensor(measure.long_windows(text, 64, 2, 4))
    own = [model(window[:, begin : begin + 8])[:, -1].log_softmax(-1) for begin in (55, 56)]
    nats = -sum(p.gather(1, window[:, i + 63 : i + 64]).sum().item() for i, p in enumerate(own)) / 8
    assert windowed[1] == pytest.approx(nats, rel=1e-6)  # one layer: the last 8 tokens are all there is


class Copier(torch.nn.Module):
    """Stands for a model that copies: what stood `period` tokens before gets probability 3/4, the other V - 1 tokens
    share the rest; without that much context all are equal."""

    bounded = False

    def __init__(self, period, vocab_size, train_length):
        super().__init__()
        self.config, self.max_length = GPTConfig(train_length=train_length, vocab_size=vocab_size), math.inf
        self.period = period

    def forward(self, tokens, targets=None, past=None, last=None):
        before = past.layers.get(0, tokens[:, :0])
        seen = past.layers[0] = torch.cat((before, tokens), dim=1)
        if targets is None:
            return None
        place = torch.arange(seen.shape[1] - targets.shape[1], seen.shape[1]) + 1 - self.period
        guess, V = seen[:, place.clamp(min=0)], self.config.vocab_size
        p = torch.where(guess == targets, 0.75, 0.25 / (V - 1))
        return -torch.where(place >= 0, p, 1 / V).log()


def test_a_model_that_copies_has_the_loss_computed_by_hand():
    text, ln = dataset([1000], np.tile(np.arange(20), 50)), math.log
    model = Copier(20, 20, train_length=16)
    result = length_loss(model, text, CPU, 10, (0.5, 1, 1.25, 1.5, 4))
    # 20 tokens of context reach the copy for the last of four targets, 24 for all of them.
    quarter = (3 * ln(20) - ln(0.75)) / 4
    assert result["loss"] == pytest.approx([ln(20), ln(20), quarter, -ln(0.75), -ln(0.75)], rel=1e-6)
    usual = perplexity.usual_losses(model, text, np.full(20, 2), CPU, 3, (1, 2, 4))
    at = {L: (min(19, L) * ln(20) - max(0, L - 19) * ln(0.75)) / L for L in (16, 32, 64)}
    assert usual["non_overlapping"] == pytest.approx([at[16], at[32], at[64]], rel=1e-6)
    assert usual["bits_per_byte"] == pytest.approx([at[L] / ln(2) / 2 for L in (16, 32, 64)], rel=1e-6)
    # Of 64 tokens, windows of 32 that slide by 16 leave the first 19 and three of every later 16 without their copy.
    slid = ((19 + 3 + 3) * ln(20) - (64 - 25) * ln(0.75)) / 64
    assert usual["sliding"] == pytest.approx([ln(20), slid, at[64]], rel=1e-6)
    by_position = perplexity.position_loss(model, text, CPU, 3, T=8)["loss"]  # of two positions each
    assert by_position[:9] == pytest.approx([ln(20)] * 9, rel=1e-6)
    assert by_position[9:11] == pytest.approx([(ln(20) - ln(0.75)) / 2, -ln(0.75)], rel=1e-6)


def test_lengths_in_tokens_score_the_same_targets_within_the_shortest():
    model = Recorder(16)
    multiples = [length / 16 for length in (6, 16, 37)]
    assert length_loss(model, dataset([200, 50, 300]), CPU, 5, multiples)["lengths"] == [6, 16, 37]
    targets = [y for _, y in model.calls]
    assert all(y.shape[1] == 3 for y in targets)  # half of the shortest, and less than T/4
    assert {tuple(row.tolist()) for row in targets[0]} == {tuple(row.tolist()) for row in targets[-1]}
