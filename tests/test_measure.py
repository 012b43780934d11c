"""The loss against context and the usual perplexities, on models whose right answers are known."""

import math

import numpy as np
import pytest
import torch
from small import CPU, Copier, dataset

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
    result = length_loss(model, dataset([400, 50, 600]), CPU, count=10, multiples=FEW)
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
        assert any(start <= row[0] and row[-1] + 1 < stop for start, stop in ((0, 400), (450, 1050)))


def drawn(lengths, T, count):
    """The first and the last target of every block, by their numbers, and the Targets."""
    found = measure.targets(dataset(lengths), T, count)
    last = found.windows(1)[:, -1]
    return last - found.scored + 1, last, found


@pytest.mark.parametrize("count", [5, 16, 61])
def test_targets_come_evenly_from_documents_and_the_places_in_them(count):
    """A stretch that holds the share p of all blocks to draw from has p * count of those drawn, give or take one."""
    lengths, T = [400, 50, 1256, 700], 16
    first, last, found = drawn(lengths, T, count)
    assert (len(last), found.scored, found.own) == (count, 4, 256)
    assert (np.diff(last) >= 4).all()
    begin, rooms = np.cumsum([0, *lengths[:-1]]), [max(0, length - 256) // 4 for length in lengths]
    for start, length, room in zip(begin, lengths, rooms, strict=True):
        inside = (first >= start) & (last < start + length)
        assert abs(inside.sum() - count * room / sum(rooms)) <= 1
        assert (first[inside] - 256 >= start + 1 - 4).all()  # the last target of a block has 256 tokens before it
        for part in range(3):  # thirds of what lies deep enough in a document
            at = (last - start - 256) / (length - 256) if room else last * 0.0 - 1
            third = inside & (part / 3 <= at) & (at < (part + 1) / 3)
            assert abs(third.sum() - count * room / sum(rooms) / 3) <= 2  # one at either end


def test_a_model_has_one_loss_at_a_length_whatever_else_is_asked():
    ids = np.random.default_rng(0).integers(40, size=2000)
    model, text = exact_model(), dataset([1200, 800], ids)
    found = [length_loss(model, text, CPU, 6, multiples) for multiples in (measure.MULTIPLES, FEW, [1], [0.1, 1, 20])]
    at_T = {record["loss"][record["lengths"].index(16)] for record in found}
    assert len(at_T) == 1
    assert {record["own_context"] for record in found} == {256}
    assert found[3]["lengths"] == [2, 16, 320]
    # Two tokens of context score the targets one by one.
    ends = measure.targets(text, 16, 6).ends
    nats = [-model(torch.tensor(ids[None, t - 2 : t]))[0, -1].log_softmax(-1)[ids[t]].item()
            for end in ends for t in range(end - 4, end)]  # fmt: skip
    assert found[3]["loss"][0] == pytest.approx(np.mean(nats), rel=1e-6)


def test_documents_that_are_too_short_are_read_across():
    T = 16
    for lengths, own in (([1000], 256), ([100] * 20, 64), ([30] * 20, 16), ([17] * 30, 256), ([60], 32), ([10], 2)):
        found = measure.targets(dataset(lengths), T, 5)
        assert found.own == own, lengths
        assert found.windows(sum(lengths) - 1).shape == (len(found.ends), sum(lengths))  # as long as there is text
    result = length_loss(Recorder(T), dataset([100] * 20), CPU, 5, FEW)
    assert (result["lengths"][-1], result["own_context"]) == (128, 64)
    title = "nats per token, 5 windows, past 4 T in other documents"
    assert tables.table({"a": result}, "loss")[0].startswith(f"| {title} | 0.5 T |")
    first = measure.Targets(np.arange(9), np.array([4, 9]), 2, 2)
    assert first.windows(5).tolist() == [[7, 8, 0, 1, 2, 3], [3, 4, 5, 6, 7, 8]]  # the last one is before the first
    assert first.windows(2, back=1).tolist() == [[0, 1, 2], [5, 6, 7]]


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
    window = torch.tensor(measure.targets(text, 8, 4).windows(64))
    own = [model(window[:, begin : begin + 8])[:, -1].log_softmax(-1) for begin in (55, 56)]
    nats = -sum(p.gather(1, window[:, i + 63 : i + 64]).sum().item() for i, p in enumerate(own)) / 8
    assert windowed[1] == pytest.approx(nats, rel=1e-6)  # one layer: the last 8 tokens are all there is


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
