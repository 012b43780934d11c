"""The gallery draws and measures what the encodings do."""

import pytest
import torch
from here import in_process  # noqa: F401
from test_every_encoding import FEW
from tiny import TINY

import posenc
from lab import gallery
from model import GPT, GPTConfig

SIZES = dict(n_embd=32, n_head=4, n_kv_head=2, head_dim=8, train_length=16)


def probe(spec):
    return gallery.probe(posenc.build(spec, 1, **SIZES)[0], 40)


def test_the_probe_sees_position_alone():
    n = torch.arange(40.0)
    assert torch.equal(probe("none"), torch.zeros(4, 40))
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    assert torch.allclose(probe("alibi"), -slopes[:, None] * n, atol=1e-4)
    angles = n[:, None] * 10000.0 ** -torch.tensor([0, 0.25, 0.5, 0.75])
    waves = angles.cos().mean(-1) - 1  # of vectors whose pairs all have the same size, on average
    rope = probe("rope")
    assert torch.equal(rope[0], rope[3])
    assert torch.corrcoef(torch.stack((rope[0], waves)))[0, 1] > 0.95


@pytest.mark.parametrize(
    "spec", [spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in posenc.every()]
)
def test_every_encoding_has_a_picture(spec, tmp_path):
    encoding = posenc.build(spec, 1, **SIZES)[0]
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    gallery.picture(tmp_path / "one.png", encoding, 16)
    assert (tmp_path / "one.png").stat().st_size > 5000


def content(spec, texts):
    config = dict(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, train_length=16, vocab_size=9)
    torch.manual_seed(1)
    model = GPT(GPTConfig(posenc=spec, **config), seed=3).double().eval()
    for parameter in model.posenc.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return gallery.by_content(model, texts)


def test_what_content_does_ends_where_texts_begin_to_differ():
    """In the first layer nothing knows what two texts of one ending have before it, as far as that ending reaches."""
    texts = torch.randint(9, (2, 40), generator=torch.Generator().manual_seed(2))
    texts[1, 20:] = texts[0, 20:]
    for spec in (name for name, cls in posenc.ENCODINGS.items() if cls.__module__ in gallery.BY_CONTENT):
        one, other = content(spec, texts)
        near = slice(int(posenc.ENCODINGS[spec].weighs), 17)  # a short convolution reads three tokens further back
        assert torch.allclose(one[:, near], other[:, near], atol=1e-9), spec
        assert one.std() > 1e-3, spec
        if posenc.ENCODINGS[spec].has_state:
            assert (one[:, 20:] - other[:, 20:]).abs().max() > 1e-3, spec
    n = torch.arange(40.0, dtype=torch.float64)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    assert content("none", texts).abs().max() < 1e-12
    assert torch.allclose(content("alibi", texts), -slopes[:, None] * n, atol=1e-9)


@pytest.mark.usefixtures("in_process")
def test_the_command_trains_measures_and_writes_the_page_and_goes_on_from_there(corpus, tmp_path, call_script):
    settings = TINY | {"text": corpus, "data_dir": corpus.parent / "data", "max_steps": 4, "rounds": 1, "targets": 2}
    flags = [f"--{key}={value}" for key, value in settings.items()] + ["--decode_tokens=2", "--only=learned"]
    words = ["lab/gallery.py", *flags, f"--runs_dir={tmp_path}/runs", f"--docs={tmp_path}"]
    done = call_script(*words)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "encodings.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == [
        "encoding", "in 2026", "parameters", "training speed / none", "decoding at 16 T, ms/token",
        "loss at 1 T", "loss at 2 T", "loss at 4 T", "loss at 8 T", "loss at 16 T",
    ]  # fmt: skip
    clamped = 'learned → learned(overflow="clamp")'
    assert [row[0] for row in rows[1:3]] == ["none", "learned"]
    assert clamped in [row[0] for row in rows]
    assert rows[1][3] == "1.00"
    assert rows[2][6:] == ["no position"] * 4
    assert rows[2][1:3] == ["history", str(16 * 32)]
    assert rows[3][3:5] == ["", ""]  # nobody trained it
    for spec in ("none", "learned", "learned-overflow-clamp"):
        assert f"(encodings/{spec}.png)" in page
        assert (tmp_path / "encodings" / f"{spec}.png").exists()
    assert "Made by `python -m lab.gallery --" in page

    def written():
        files = [*tmp_path.glob("runs/*/ckpt.pt"), *tmp_path.glob("runs/*/reach/results.json")]
        return {file: file.stat().st_mtime for file in files}

    before = written()
    assert len(before) == 4
    assert call_script(*words).returncode == 0
    assert written() == before


def test_mistakes_are_one_line(call_script):
    for words, said in (
        (["--only=rpe"], "did you mean 'rope'"),
        (["--rounds=0"], "rounds must be in 1 ... 10^6, not 0"),
        (["--dataset=copy"], "reads one text"),
        (["--growth=a"], "unknown key 'growth'"),
    ):
        done = call_script("lab/gallery.py", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
