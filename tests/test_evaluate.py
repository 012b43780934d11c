"""The measurement itself, on models whose right answers are known."""

import json
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import model as model_module
from core import report
from core.place import Place
from model import GPT, GPTConfig

CPU = Place(torch.device("cpu"), torch.float32)


FEW = (0.5, 1, 1.5, 2, 4, 8)


def dataset(lengths, tokens=None):
    """Validation documents of the given lengths, of numbered tokens unless given."""
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    ids = np.arange(total) if tokens is None else tokens
    return data.Dataset(ids, ids, {"documents": {"val": starts}, "tokens": {"val": total}}, None)


class Recorder:
    """Stands for a model: writes down what it is asked, and answers with a loss of 1 for every target."""

    def __init__(self, train_length, max_length=math.inf):
        self.config, self.max_length = GPTConfig(train_length=train_length, vocab_size=1), max_length
        self.calls, self.context = [], []

    def __call__(self, tokens, targets=None, cache=None, last=None):
        self.context.append(tokens)
        if targets is None:
            return None
        self.calls.append((torch.cat(self.context, dim=1), targets))
        self.context = []
        return torch.ones(targets.shape)


def test_every_length_is_scored_on_the_same_targets_with_the_tokens_before_them():
    model = Recorder(train_length=16)
    result = evaluate.length_loss(model, dataset([200, 50, 300]), CPU, count=10, multiples=FEW)
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
    result = evaluate.length_loss(Recorder(16), dataset([100] * 20), CPU, 5, FEW)
    assert result["lengths"][-1] == 128


def test_windows_come_from_all_over_the_text():
    one = evaluate.long_windows(dataset([1000]), 64, 4, 5)
    assert one[:, -1].tolist() == [64, 296, 528, 760, 996]  # the last ids, which are numbered
    short = evaluate.long_windows(dataset([70, 70, 70, 70]), 64, 4, 8)  # fewer than eight would fit into documents
    assert len(short) == 8
    assert short[-1, -1] > 270


def test_lengths_the_validation_text_cannot_hold_are_left_out():
    assert evaluate.length_loss(Recorder(16), dataset([60]), CPU, 5, FEW)["lengths"] == [8, 16, 24, 32]


def test_lengths_without_positions_are_left_out():
    result = evaluate.length_loss(Recorder(16, max_length=16), dataset([500]), CPU, 5, FEW)
    assert (result["lengths"], len(result["loss"])) == ([8, 16], 2)
    assert evaluate.table({"learned": result, "rope": result | {"lengths": [8, 32]}})[2:] == [
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
    result = evaluate.length_loss(uniform(40), dataset([600], ids), CPU, 8, FEW)
    assert result["loss"] == pytest.approx([math.log(40)] * 6, rel=1e-6)
    windows, sizes = data.even_windows(ids, 16, 10), np.arange(40) % 3 + 1
    nats, bits = evaluate.validation_loss(uniform(40), windows, sizes, CPU, rows=3)
    assert nats == pytest.approx(math.log(40), rel=1e-6)
    assert bits == pytest.approx(160 * math.log2(40) / sum(int(sizes[y]) for y in windows[1].flatten()), rel=1e-6)


def exact_model(**changes):
    config = dict(vocab_size=40, n_layer=2, n_embd=32, train_length=16, zero_init=False) | changes
    return GPT(GPTConfig(**config)).double().eval()


def test_chunks_and_batches_change_nothing(monkeypatch):
    ids = np.random.default_rng(0).integers(40, size=2000)
    losses = []
    for rows, chunk in ((1000, 1000), (1, 5), (3, 64)):
        monkeypatch.setattr(evaluate, "at_once", lambda model, length, rows=rows: rows)
        for module, name in ((model_module, "WHOLE"), (model_module, "PIECE"), (evaluate, "PIECE")):
            monkeypatch.setattr(module, name, chunk)
        losses.append(evaluate.length_loss(exact_model(), dataset([2000], ids), CPU, 8)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (7, 3), (40, 40), (8, 1)])
def test_windows_give_every_token_the_context_they_say(length, stride):
    model, ids = exact_model(), torch.randint(40, (2, 31))
    got = evaluate.windowed_losses(model, ids, length, stride, CPU)
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
    found = evaluate.usual_losses(model, text, sizes, CPU, 2, (0.5, 1, 1.1, 4))
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
    found = evaluate.position_loss(model, text, CPU, 2, T=8)
    assert found["position"] == [2 * i + 1 for i in range(32)]
    assert found["loss"][5] == pytest.approx(apart[:, 10:12].mean().item(), rel=1e-6)


def test_a_window_and_the_training_length_of_another_run():
    ids = np.random.default_rng(0).integers(40, size=600)
    model, text = exact_model(n_layer=1), dataset([600], ids)
    whole, windowed = (evaluate.length_loss(model, text, CPU, 4, (1, 8), T=8, window=w)["loss"] for w in (None, 8))
    assert whole[0] == pytest.approx(windowed[0], rel=1e-9)
    assert whole[1] != windowed[1]
    window = torch.tensor(evaluate.long_windows(text, 64, 2, 4))
    own = [model(window[:, begin : begin + 8])[:, -1].log_softmax(-1) for begin in (55, 56)]
    nats = -sum(p.gather(1, window[:, i + 63 : i + 64]).sum().item() for i, p in enumerate(own)) / 8
    assert windowed[1] == pytest.approx(nats, rel=1e-6)  # one layer: the last 8 tokens are all there is


class Copier(torch.nn.Module):
    """Stands for a model that copies: what stood `period` tokens before gets probability 3/4, the other V - 1 tokens
    share the rest; without that much context all are equal."""

    def __init__(self, period, vocab_size, train_length):
        super().__init__()
        self.config, self.max_length = GPTConfig(train_length=train_length, vocab_size=vocab_size), math.inf
        self.period = period

    def forward(self, tokens, targets=None, cache=None, last=None):
        before = cache.layers.get(0, tokens[:, :0])
        seen = cache.layers[0] = torch.cat((before, tokens), dim=1)
        if targets is None:
            return None
        place = torch.arange(seen.shape[1] - targets.shape[1], seen.shape[1]) + 1 - self.period
        guess, V = seen[:, place.clamp(min=0)], self.config.vocab_size
        p = torch.where(guess == targets, 0.75, 0.25 / (V - 1))
        return -torch.where(place >= 0, p, 1 / V).log()


def test_a_model_that_copies_has_the_loss_computed_by_hand():
    text, ln = dataset([1000], np.tile(np.arange(20), 50)), math.log
    model = Copier(20, 20, train_length=16)
    result = evaluate.length_loss(model, text, CPU, 10, (0.5, 1, 1.25, 1.5, 4))
    # 20 tokens of context reach the copy for the last of four targets, 24 for all of them.
    quarter = (3 * ln(20) - ln(0.75)) / 4
    assert result["loss"] == pytest.approx([ln(20), ln(20), quarter, -ln(0.75), -ln(0.75)], rel=1e-6)
    usual = evaluate.usual_losses(model, text, np.full(20, 2), CPU, 3, (1, 2, 4))
    at = {L: (min(19, L) * ln(20) - max(0, L - 19) * ln(0.75)) / L for L in (16, 32, 64)}
    assert usual["non_overlapping"] == pytest.approx([at[16], at[32], at[64]], rel=1e-6)
    assert usual["bits_per_byte"] == pytest.approx([at[L] / ln(2) / 2 for L in (16, 32, 64)], rel=1e-6)
    # Of 64 tokens, windows of 32 that slide by 16 leave the first 19 and three of every later 16 without their copy.
    slid = ((19 + 3 + 3) * ln(20) - (64 - 25) * ln(0.75)) / 64
    assert usual["sliding"] == pytest.approx([ln(20), slid, at[64]], rel=1e-6)
    by_position = evaluate.position_loss(model, text, CPU, 3, T=8)["loss"]  # of two positions each
    assert by_position[:9] == pytest.approx([ln(20)] * 9, rel=1e-6)
    assert by_position[9:11] == pytest.approx([(ln(20) - ln(0.75)) / 2, -ln(0.75)], rel=1e-6)


def test_a_length_holds_while_perplexity_is_within_five_percent():
    def result(*losses):
        return {"train_length": 10, "lengths": [5, 10, 15, 20, 40][: len(losses)], "loss": list(losses)}

    assert evaluate.holds_to(result(9, 1, 1 + math.log(1.049), 1, 1.1)) == 2
    assert evaluate.holds_to(result(9, 1, 1 + math.log(1.051), 1, 1)) == 1  # what comes back later does not count
    assert evaluate.holds_to(result(9, 1, 0.9, 0.8, 0.7)) == 4
    assert evaluate.holds_to(result(9)) is None


def test_the_command_puts_runs_side_by_side(trained, learned, call_script, tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- evaluate -->\nstale\n<!-- /evaluate -->\nafter\n")
    flags = [f"--table={tmp_path}/page.md", f"--picture={tmp_path}/curves.png", "--targets=4"]
    done = call_script("evaluate.py", trained, learned, *flags)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- evaluate -->\n| nats per token, 4 windows | 0.5 T | 1 T | 1.12 T |")
    assert page.endswith(".\n<!-- /evaluate -->\nafter\n")
    assert "stale" not in page
    assert page.count("no position") == 7
    assert "Made by `python evaluate.py" in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((learned / "length.json").read_text())["lengths"] == [8, 16]


def test_runs_of_two_lengths_share_their_columns():
    results = {}
    for T in (128, 512):
        lengths = [round(T * multiple) for multiple in evaluate.MULTIPLES]  # 141 / 128 and 563 / 512 are 1.1 T
        results[str(T)] = {"train_length": T, "lengths": lengths, "loss": [1.0] * len(lengths), "windows": 4}
    lines = evaluate.table(results)
    assert "no position" not in "".join(lines)
    assert lines[0].count("1.1 T") == 1


def test_several_encodings_of_one_run_share_a_table(trained, call_script, tmp_path):
    ways = ["--posenc=rope", '--posenc=rope(scaling="linear", factor=2)', "--posenc=none"]
    done = call_script("evaluate.py", trained, *ways, "--lengths=[8, 16, 48]", "--targets=4", "--out_dir=reach")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "reach" / "length.json").read_text())["runs"]
    assert list(found) == ["rope", 'rope(scaling="linear", factor=2)', "none"]
    for way, result in found.items():
        alone = call_script("evaluate.py", trained, f"--posenc={way}", "--lengths=[8, 16, 48]", "--targets=4")
        assert alone.returncode == 0
        assert result["lengths"] == [8, 16, 48]
        assert all(f"{loss:.3f}" in alone.stdout for loss in result["loss"])
        assert "non_overlapping" not in result
    assert len({tuple(result["loss"]) for result in found.values()}) == 3
    assert (tmp_path / "reach" / "length.png").exists()


def test_a_text_may_be_shorter_than_the_training_length_where_lengths_are(trained, call_script, tmp_path):
    (tmp_path / "short.txt").write_text("line 7 says that 7 times 7 is 49.\n" * 4)  # 13 tokens held out, and T is 16
    flags = [f"--data={tmp_path}/short.txt", "--targets=1"]
    assert "too short" in call_script("evaluate.py", trained, *flags).stderr
    done = call_script("evaluate.py", trained, *flags, "--lengths=[4, 8]")
    assert done.returncode == 0, done.stderr


def test_lengths_in_tokens_score_the_same_targets_within_the_shortest():
    model = Recorder(16)
    multiples = [length / 16 for length in (6, 16, 37)]
    assert evaluate.length_loss(model, dataset([200, 50, 300]), CPU, 5, multiples)["lengths"] == [6, 16, 37]
    targets = [y for _, y in model.calls]
    assert all(y.shape[1] == 3 for y in targets)  # half of the shortest, and less than T/4
    assert {tuple(row.tolist()) for row in targets[0]} == {tuple(row.tolist()) for row in targets[-1]}


def test_a_prepared_model_computes_what_autocast_would():
    device = Place(torch.device("cpu"), torch.bfloat16)
    for posenc, tied in (("fire", False), ("rope", True), ("alibi", False)):
        model = GPT(GPTConfig(posenc=posenc, vocab_size=30, tie_embeddings=tied, zero_init=False), seed=1).eval()
        tokens = torch.arange(40)[None] % 30
        with torch.no_grad(), device.autocast():
            before = model(tokens)
            device.prepare(model)
            assert torch.equal(model(tokens), before)
        assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert model.token.weight.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.posenc.parameters())


def test_the_command_refuses_in_one_line(trained, learned, call_script, tmp_path):
    for argv, said in (
        ([], "which runs"),
        (["nowhere"], "no run nowhere"),
        ([trained, "--target=3"], "'targets'"),
        ([trained, "--targets=0"], "at least 1"),
        ([trained, "--picture=nowhere/a.png"], "no folder nowhere"),
        ([trained, "--table=nowhere/a.md"], "no folder nowhere"),
        ([trained, f"--table={trained}"], "is a folder"),
        ([trained, f"--table={trained}/config.json"], "would replace all of it"),
        ([trained, "--picture=a.pdf"], "must end in .png"),
        ([trained, "--train_length=1000000"], "exceed the text"),
        ([learned, "--train_length=64"], "or the positions (16)"),
        ([trained, "--frequencies", "--window=8", f"--out_dir={tmp_path}"], "leave out --window"),
        ([trained, "--lengths=[16, 8]"], "that rise"),
        ([trained, "--lengths=far"], "expected int or list"),
        ([trained, "--lengths=[16, 1000000]", "--targets=2"], "exceed the text"),
        ([trained, "--posenc=rope", "--posenc=learned"], "has weights of its own"),
    ):
        done = call_script("evaluate.py", *argv)
        assert done.stdout == ""
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr


def test_write_table_leaves_the_rest_of_the_page_alone(tmp_path):
    page = tmp_path / "page.md"
    for between in ("", "| old |\n", "<!-- bench -->\n\n"):
        page.write_text(f"before\n<!-- x -->\n{between}<!-- /x -->\nafter\n")
        report.write_table(page, "x", ["| \\1 |"], "python x.py", CPU)
        text = page.read_text()
        assert text.startswith("before\n<!-- x -->\n| \\1 |\n\nMade by")
        assert text.endswith(".\n<!-- /x -->\nafter\n")
        assert "old" not in text


def test_write_table_takes_a_name_as_it_is(tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- c++ (2) -->\n<!-- /c++ (2) -->\n")
    report.write_table(tmp_path / "page.md", "c++ (2)", ["| a |"], "python x.py", CPU)
    assert (tmp_path / "page.md").read_text().startswith("before\n<!-- c++ (2) -->\n| a |\n")


def test_write_table_without_markers_is_the_whole_file(tmp_path):
    report.write_table(tmp_path / "new.md", "bench", ["| a |"], "python x.py", CPU, seed=3)
    text = (tmp_path / "new.md").read_text()
    assert text.startswith("| a |\n\nMade by `python x.py`: seed 3, commit ")
