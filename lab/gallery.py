"""One picture and one page of measured facts for every encoding: docs/encodings/ and docs/encodings.md.

    python gallery.py                          # the default model
    python gallery.py --only='["rope", "alibi"]' --docs=out/docs

Trains what has no finished run yet (all of them with the same data and initial weights; about two CPU minutes each),
measures the loss from T to 16 T, and the speed of all encodings in turn. Each picture shows what the trained encoding
does to the logits of a query at 4 T, over keys that differ in nothing but position, or what it adds to the embeddings.
"""

import core.start  # noqa: F401  # isort: skip

import inspect
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

import data
import evaluate
import posenc
from core import flags as configs
from core import place as places
from core import report, runs
from core.encoding import Pairs
from core.errors import UserError, run
from core.settings import Config
from data import vocabulary
from lab.bench import timing as bench
from lab.bench.timing import LONG, Bench
from posenc import ENCODINGS

MULTIPLES = (1, 2, 4, 8, 16)  # of the training length
SEEN = 4  # training lengths that a picture spans
NOTHING = -30  # a logit so far below others gets no weight; lower ones are drawn here
DPI = 75


@dataclass
class Gallery(Bench):
    """A Config, how to measure speed, and where everything goes."""

    usage: ClassVar[str] = "python gallery.py [configs/FILE.py ...] [--key=value ...]"

    runs_dir: str = "out/gallery"  # a folder for the runs, one each
    docs: str = "docs"  # encodings.md and encodings/ go here
    targets: int = 64  # windows scored at every length


def train(spec, folder, argv):
    """Train the encoding into the folder, or go on; nothing to do for a finished run."""
    script = Path(__file__).parent.parent / "train.py"
    command = [sys.executable, str(script), *argv, f"--posenc={spec}", f"--out_dir={folder}"]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"training {spec} failed; by itself: {' '.join(command[1:])}")


def losses(spec, folder, config, device, known):
    """{multiple of T: nats per token} of the run in the folder with `spec` laid over its encoding, as far as it has
    positions. `known` are those measured before, {spec: {"made": of which checkpoint and how, "loss": ...}}."""
    made = f"{runs.find(folder).stat().st_mtime}, {config.targets} windows"
    if known.get(spec, {}).get("made") != made:
        opened = runs.open_run(folder, device.device, spec)
        dataset = data.open_dataset(config, opened.tokenizer)
        result = evaluate.length_loss(opened.model, dataset, device, config.targets, MULTIPLES)
        known[spec] = {"made": made, "loss": dict(zip(map(str, MULTIPLES), result["loss"], strict=False))}
    return known[spec]["loss"]


@torch.no_grad()
def probe(encoding, length, count=64):
    """The logits of a query at the end of `length` tokens whose keys are all equal, over the distance (H, length), less
    that at distance 0. The mean for `count` random vectors, which queries, keys and heads share."""
    generator = torch.Generator().manual_seed(0)
    pos = encoding.positions(torch.arange(length), length)
    same = torch.randn(count, 1, 1, encoding.head_dim, generator=generator).expand(-1, encoding.n_kv_head, -1, -1)
    x = torch.randn(count, 1, encoding.n_embd, generator=generator).expand(-1, length, -1)
    groups = encoding.n_head // encoding.n_kv_head
    keys, state = same.expand(-1, -1, length, -1), encoding.state(x, {})
    own = {name: kept[:, :, -1:] for name, kept in state.items()}
    seen = torch.ones(1, length, dtype=torch.bool)
    pairs = Pairs(same.repeat_interleave(groups, 1), keys, keys, pos[-1:], pos, seen, state, own, length)
    q, k = encoding.rotate(pairs)
    logits = encoding.logits(replace(pairs, q=q, k=k.repeat_interleave(groups, 1)))
    logits = logits[:, :, 0].mean(0).flip(-1)  # (H, length)
    return logits - logits[:, :1]


@torch.no_grad()
def picture(path, encoding, T):
    """Draw what the encoding does into a PNG."""
    length = int(min(SEEN * T, encoding.max_length))
    pos = encoding.positions(torch.arange(length), length)
    added = encoding.embed(pos) if encoding.embeds else encoding.ffn(pos, encoding.n_embd)
    if added is not None:
        added = added / added.square().mean(-1, keepdim=True).sqrt()  # as the model sees it
        report.heat(path, added.T.numpy(), "position / T", "dimension", scale=1 / T, mark_x=1, dpi=DPI)
        return
    distance = (torch.arange(length) / T).tolist()
    heads = probe(encoding, length).clamp(min=NOTHING)
    if torch.allclose(heads, heads[:1].expand_as(heads), atol=1e-4):
        curves = {"all heads": (distance, heads[0].tolist())}
    else:
        curves = {f"head {h}": (distance, row.tolist()) for h, row in enumerate(heads, start=1)}
    report.lines(path, curves, "distance / T", "change of the logit", mark_x=1, dpi=DPI)


def page(config, pictures):
    """The Markdown of docs/encodings.md."""
    T = config.train_length
    lines = [
        "# Every encoding: formula, picture, facts",
        "",
        f"T is the training length, here {T} tokens. Losses are in nats per token, for the same last T/4 tokens of",
        "windows inside one long validation document each, with L tokens of input: past T, a loss that falls uses the",
        "longer context, one that is flat ignores it, one that rises is broken by it. A row with an arrow lays the",
        "second encoding over the trained weights of the first, without training. Speeds are ratios within one run.",
        "",
        "<!-- encodings -->",
        "<!-- /encodings -->",
        "",
        f"The pictures span {SEEN} T, with a dashed line at T. They show, for the first layer of each model, how the",
        "logits of the last query change over keys that are all equal (the mean of random vectors); or what is added.",
    ]
    for name, cls in ENCODINGS.items():
        lines += ["", f"## {name}", "", inspect.cleandoc(cls.__doc__)]
        for spec, path in pictures.items():
            if posenc.parse(spec)[0] is cls:
                lines += ["", f"`{spec}`", "", f"![{spec}]({path})"]
    return lines


def table(rows):
    heads = ["encoding", "parameters", "training speed / none", "decoding at 16 T, ms/token"]
    lines = []
    for name, row in rows.items():
        loss = [f"{row['loss'][str(m)]:.3f}" if str(m) in row["loss"] else "no position" for m in MULTIPLES]
        speed = [f"{row['speed']:.2f}", f"{row['decode'] * 1e3:.2f}"] if "speed" in row else ["", ""]
        lines.append([name, f"{row['parameters']:,}", *speed, *loss])
    return report.markdown([*heads, *(f"loss at {m} T" for m in MULTIPLES)], lines)


def speeds(specs, config, device):
    """{spec: (tokens/s of training at T, seconds for a token decoded at 16 T)}, the encodings taking turns."""
    T = config.train_length
    steps = {spec: bench.training_step(bench.variant(config, spec, T), device)[0] for spec in specs}
    trained = bench.median_times(steps, config.rounds)
    del steps
    serving = places.choose(config.device, config.dtype, inference=True)
    decoders = {
        spec: bench.decoder(bench.variant(config, spec, T), serving, LONG * T, config.decode_tokens) for spec in specs
    }
    decoded = bench.median_times(decoders, config.rounds)
    return {spec: (config.batch_size * T / trained[spec], decoded[spec] / config.decode_tokens) for spec in specs}


def main(argv):
    files, given = configs.flags(argv, Gallery)
    _, settings = configs.parse(argv, Gallery)
    config = configs.make(Gallery, settings)
    encoding = vocabulary.load(config.tokenizer)
    config.vocab_size = config.vocab_size or encoding.n_vocab
    names = bench.chosen(config.only)
    own = {field.name for field in fields(Gallery)} - {field.name for field in fields(Config)}
    passed = [*files, *(f"--{key}={value}" for key, value in given.items() if key not in own)]
    device = places.choose(config.device, config.dtype)
    home, docs = Path(config.runs_dir), Path(config.docs)
    (docs / "encodings").mkdir(parents=True, exist_ok=True)

    tested = {spec for cls in ENCODINGS.values() for spec in cls.stretches}
    trained = [spec for name in names if name not in tested for spec in (name, *ENCODINGS[name].variants)]
    for spec in trained:
        train(spec, home / report.slug(spec), passed)
    known, rows, pictures = runs.read_json(home / "losses.json"), {}, {}
    stretched = [(base, spec) for base in trained if base in ENCODINGS for spec in ENCODINGS[base].stretches]
    for base, spec in tqdm([(spec, spec) for spec in trained] + stretched, "losses", disable=None, leave=False):
        name = spec if base == spec else f"{base} → {spec}"
        folder = home / report.slug(base)
        rows[name] = {"loss": losses(spec, folder, config, device, known)}
        runs.write_json(home / "losses.json", known)
        model = runs.open_run(folder, "cpu", spec).model
        rows[name]["parameters"] = sum(p.numel() for p in model.posenc.parameters())
        pictures[spec] = f"encodings/{report.slug(spec)}.png"
        picture(docs / pictures[spec], model.posenc[0], config.train_length)
    measured = speeds(trained, config, device)
    for spec in trained:
        rows[spec]["speed"], rows[spec]["decode"] = measured[spec][0] / measured["none"][0], measured[spec][1]
    lines = table(rows)
    print("\n".join(lines))
    runs.write_whole(docs / "encodings.md", "\n".join(page(config, pictures)) + "\n")
    command = " ".join(["python gallery.py", *argv])
    made = dict(seed=config.seed, dtype=device.dtype_name, windows=config.targets)
    report.write_table(docs / "encodings.md", "encodings", lines, command, device, **made)


if __name__ == "__main__":
    run(main)
