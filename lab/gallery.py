"""One picture and one page of measured facts for every encoding: docs/encodings/ and docs/encodings.md.

    python -m lab.gallery                          # the default model
    python -m lab.gallery --only='["rope", "alibi"]' --docs=out/docs

Trains what has no finished run yet (all of them with the same data and initial weights; about two CPU minutes each),
measures the loss from T to 16 T, and the speed of all encodings in turn. Each picture shows what the trained encoding
does to the logits of a query at 4 T, over keys that differ in nothing but position, or what it adds to the embeddings.
"""

import core.start  # noqa: F401  # isort: skip

import functools
import inspect
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

import data
import posenc
from core import flags as configs
from core import place as places
from core import report, runs
from core.attention import ready
from core.encoding import Pairs
from core.errors import require, require_range, run
from core.measure import targets
from core.settings import Config
from data import vocabulary
from lab import tables
from lab.bench import timing
from lab.workers import Workers, trained
from posenc import ENCODINGS

MULTIPLES = (1, 2, 4, 8, 16)  # of the training length
SEEN = 4  # training lengths that a picture spans
TEXTS = 3  # whose curves stand in a picture of what an encoding does by content
BY_CONTENT = ("zoo.content", "zoo.paths")  # the chapters whose encodings read the text
NOTHING = -30  # a logit so far below others gets no weight; lower ones are drawn here
DPI = 75


@dataclass
class Gallery(Config):
    """A Config, how losses and speeds are measured, and where everything goes."""

    usage: ClassVar[str] = "python -m lab.gallery [configs/FILE.py ...] [--key=value ...]"

    only: str | list = ""  # encodings to show beside none, a name or a list; by default all
    rounds: int = 7  # times that every speed is taken
    decode_tokens: int = 16  # tokens decoded in a round
    targets: int = 64  # windows scored at every length
    runs_dir: str = "out/gallery"  # a folder for the runs, one each
    docs: str = "docs"  # encodings.md and encodings/ go here

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "in 1 ... 10^6", "rounds", "decode_tokens", "targets")
        require(str(self.dataset) in data.SOURCES, f"the gallery reads one text, which dataset={self.dataset} is not")


def learn(specs, argv, place, options):
    """Train every encoding and measure it, alone and with what stretches it laid over -> {spec: {spec laid over it:
    record}}."""
    files, named = configs.flags(argv, Gallery)
    shared = {field.name for field in fields(Config)}
    told = [*files, *(f"--{key}={value}" for key, value in named.items() if key in shared and key != "device")]
    settings = {key: getattr(options, key) for key in shared}
    dataset = data.open_dataset(options, vocabulary.load(options.tokenizer))
    home, checksum = Path(options.runs_dir), dataset.meta["data_checksum"]
    (home / "logs").mkdir(parents=True, exist_ok=True)
    workers, jobs = Workers(0, place.device, home / "logs"), {}
    lengths = [length for multiple in MULTIPLES if (length := multiple * options.train_length) < len(dataset.val)]
    for spec in specs:
        config = runs.settle([], settings | {"posenc": spec, "out_dir": str(home / report.slug(spec))})
        laid_over = [f"--posenc={way}" for way in (spec, *stretches(spec))]
        measured = f"--targets={options.targets}", f"--lengths={lengths}", *laid_over
        jobs[spec] = functools.partial(trained, workers, config, [*told, f"--posenc={spec}"], checksum, *measured)
    return workers.all(jobs)


def stretches(spec):
    """Values of `posenc` to lay over a finished run of this one."""
    return ENCODINGS[spec].stretches if spec in ENCODINGS else ()


def speeds(specs, options, place):
    """{spec: (training at T as a share of the speed of none, milliseconds for a token decoded at 16 T)}, the encodings
    taking turns."""
    T, count = options.train_length, options.decode_tokens
    steps = {spec: timing.training_step(timing.variant(options, spec, T), place)[0] for spec in specs}
    trained_in = timing.median_times(steps, options.rounds)
    del steps
    serving = places.choose(options.device, options.dtype, inference=True)
    decoders = {
        spec: timing.decoder(timing.variant(options, spec, T), serving, timing.LONG * T, count) for spec in specs
    }
    decoded_in = timing.median_times(decoders, options.rounds)
    return {spec: (trained_in["none"] / trained_in[spec], decoded_in[spec] / count * 1e3) for spec in specs}


# Pictures.


@torch.no_grad()
def probe(encoding, length, count=64):
    """The logits of a query at the end of `length` tokens whose keys are all equal, over the distance (H, length), less
    that at distance 0; or the logarithms of weights that are no softmax, less that at distance 1, as a query's own key
    has what is left. The mean for `count` random vectors, which queries, keys and heads share."""
    generator = torch.Generator().manual_seed(0)
    pos = encoding.positions(torch.arange(length), length)
    same = torch.randn(count, 1, 1, encoding.head_dim, generator=generator).expand(-1, encoding.n_kv_head, -1, -1)
    x = torch.randn(count, 1, encoding.n_embd, generator=generator).expand(-1, length, -1)
    groups = encoding.n_head // encoding.n_kv_head
    keys, state = same.expand(-1, -1, length, -1), encoding.state(x, {})
    own = {name: kept[:, :, -1:] for name, kept in state.items()} | encoding.asks(x[:, -1:])
    seen = torch.ones(1, length, dtype=torch.bool)
    pairs = Pairs(same.repeat_interleave(groups, 1), keys, keys, pos[-1:], pos, seen, state, own, length)
    q, k = encoding.rotate(pairs)
    pairs = replace(pairs, q=q, k=k.repeat_interleave(groups, 1))
    logits = encoding.logits(pairs)
    logits = encoding.weights(logits, [pairs]).log() if encoding.weighs else logits
    logits, first = logits[:, :, 0].mean(0).flip(-1), int(encoding.weighs)  # (H, length)
    return logits - logits[:, first : first + 1]


@torch.no_grad()
def by_content(model, windows):
    """What the first layer's encoding does to the logits of the last query of several texts (N, L), over the distance:
    (N, H, L), less the logits q k / sqrt(D) without it; or the logarithms of weights that are no softmax, of which the
    query's own key has what is left.

    Where it keeps something for each token, all keys are the query itself, so that the text between speaks alone.
    """
    found = {}

    def watch(layer, encoding, new, pairs):
        found.setdefault("first", (encoding, new, pairs))

    model(windows, last=1, watch=watch)
    encoding, new, pairs = found["first"]
    last, groups = windows.shape[1] - 1, new.q.shape[1] // new.k.shape[1]
    if encoding.has_state:
        new = replace(new, k=new.q[:, ::groups, last:].expand_as(new.k))
        q, k = encoding.rotate(new)
        pairs = replace(pairs, q=q, k=k)
    one = ready(pairs.rows(last, last + 1, slice(None)))
    plain = new.q[:, :, last:] @ new.k.repeat_interleave(groups, 1).transpose(-2, -1) * encoding.head_dim**-0.5
    logits = encoding.logits(one)
    logits = encoding.weights(logits, [one]).log() if encoding.weighs else logits - plain
    return logits[:, :, 0].flip(-1)


def content_picture(path, model, windows, T):
    """Draw `by_content` into a PNG, for the head in which the texts differ most."""
    changes = by_content(model, windows).clamp(min=NOTHING)
    head = int(changes.std(0).mean(-1).argmax())
    first, distance = int(model.posenc[0].weighs), (torch.arange(changes.shape[-1]) / T).tolist()
    curves = {f"text {n}": (distance[first:], row[head, first:].tolist()) for n, row in enumerate(changes, start=1)}
    label = "logarithm of the weight" if model.posenc[0].weighs else "change of the logit"
    report.lines(path, curves, "distance / T", f"{label}, head {head + 1}", mark_x=1, dpi=DPI)


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


# The page.


def page(config, pictures):
    """The Markdown of docs/encodings.md. pictures: {spec: [path, ...]}."""
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
        "Where the weights are no softmax, their logarithm stands for the logits. An encoding that goes by the content",
        f"has a second picture, of the same for {TEXTS} texts of the validation set and the head in which they differ",
        "most: over their own keys, or where the encoding keeps something of each token, over keys equal to the query.",
    ]
    for name, cls in ENCODINGS.items():
        lines += ["", f"## {name}", "", inspect.cleandoc(cls.__doc__)]
        lines += ["", f"Its standing in 2026: {cls.standing}."] if cls.standing else []
        for spec, paths in pictures.items():
            if posenc.parse(spec)[0] is cls:
                lines += ["", f"`{spec}`", "", *(f"![{spec}]({path})" for path in paths)]
    return lines


def table(rows):
    """[(name, standing, parameters, (training, decoding) as `speeds` has them or (), record)] -> lines of the page's
    table."""
    heads = ["encoding", "in 2026", "parameters", "training speed / none", "decoding at 16 T, ms/token"]
    cells = []
    for name, standing, parameters, speed, record in rows:
        labels = name, standing, f"{parameters:,}", *([f"{number:.2f}" for number in speed] or ["", ""])
        cells += [(labels, at, f"{nats:.3f}") for at, nats in tables.by_multiple(record, "loss").items()]
    return tables.pivot(heads, cells, "loss at {:g} T")


def main(argv):
    options = configs.make(Gallery, configs.parse(argv, Gallery)[1])
    options.vocab_size = options.vocab_size or vocabulary.load(options.tokenizer).n_vocab
    tested = {spec for cls in ENCODINGS.values() for spec in cls.stretches}
    names = [name for name in timing.chosen(options.only) if name not in tested]
    specs = [spec for name in names for spec in (name, *ENCODINGS[name].variants)]
    place, docs = places.choose(options.device, options.dtype), Path(options.docs)
    (docs / "encodings").mkdir(parents=True, exist_ok=True)

    records = learn(specs, argv, place, options)
    measured, rows, pictures = speeds(specs, options, place), [], {}
    dataset = data.open_dataset(options, vocabulary.load(options.tokenizer))
    windows = targets(dataset, options.train_length, TEXTS).windows(SEEN * options.train_length)
    pairs = [(spec, spec) for spec in specs] + [(base, spec) for base in specs for spec in stretches(base)]
    for base, spec in pairs:
        model = runs.open_run(Path(options.runs_dir) / report.slug(base), "cpu", spec).model
        name, speed = (spec, measured[spec]) if base == spec else (f"{base} → {spec}", ())
        first, parameters = model.posenc[0], sum(p.numel() for p in model.posenc.parameters())
        rows.append((name, type(first).standing, parameters, speed, records[base][spec]))
        pictures[spec] = [f"encodings/{report.slug(spec)}.png"]
        picture(docs / pictures[spec][0], first, options.train_length)
        if type(first).__module__ in BY_CONTENT:
            pictures[spec].append(f"encodings/{report.slug(spec)}-texts.png")
            content_picture(docs / pictures[spec][1], model, torch.from_numpy(windows[:, 1:]), options.train_length)
    lines = table(rows)
    print("\n".join(lines))
    command = shlex.join(["python", "-m", "lab.gallery", *argv])
    made = dict(seed=options.seed, dtype=place.dtype_name, windows=options.targets)
    made |= dict(page="\n".join(page(options, pictures)) + "\n")
    report.write_table(docs / "encodings.md", "encodings", lines, command, place, **made)


if __name__ == "__main__":
    run(main)
