"""Ours beside others on the CPU, by turns: what `bench.py` runs for --race, --decode and --published.

The race is against nanoGPT: both learn the same characters.

Every checkpoint of both is measured by one function, in nats per character, in one pass over all of the validation
text. The clock starts with the process: imports and evaluations count. nanoGPT's code is the user's checkout.
"""

import contextlib
import importlib.util
import inspect
import io
import itertools
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core import place as places
from core import report, runs
from core.errors import UserError
from data import shakespeare
from data.download import fetch
from hub import load as hf
from model import generate

# nanoGPT's own example for the CPU, from its README; the last flag only makes it keep every checkpoint.
THEIRS = [
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
    "--always_save_checkpoint=True",
]  # fmt: skip
OURS = {
    "trainshort, 240 small steps": (
        "configs/shakespeare.py --train_length=64 --length_schedule={} --n_layer=3 --n_embd=128 --n_head=4 "
        "--batch_size=16 --max_steps=240 --learning_rate=1e-2 --decay=0.6"
    ),
    "trainshort, 820 steps": "configs/shakespeare.py --max_steps=820 --eval_interval=410 --checkpoint_interval=410",
    "trainshort, 1900 steps": "configs/shakespeare.py",
}
A100 = 1.4697  # what nanoGPT's README has its larger model reach in three minutes of an A100, with 256 of context
CONTEXTS = (64, 256)  # characters
PROMPTS = (1024, 8192)  # tokens
# Runs a training script, and keeps each checkpoint's weights in a file named for its step and the seconds it took.
DRIVER = """
import runpy, sys, time
from pathlib import Path
began, folder, script = float(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.argv = sys.argv[3:]
sys.path.insert(0, str(Path(script).parent))
try:
    import core.start
except ImportError:
    pass
import torch
save = torch.save
def keep(state, *where):
    step = state["step"] if "step" in state else state["iter_num"]
    if not list(Path(folder).glob(f"{step}-*")):
        save({key: state[key] for key in ("model", "config", "model_args", "step") if key in state},
             f"{folder}/{step}-{time.time() - began:.3f}.pt")
    save(state, *where)
torch.save = keep
runpy.run_path(script, run_name="__main__")
"""


def plain_environment():
    """This process's environment without what before_torch.py laid over it."""
    return {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}


def train(words, work):
    """Run a training command in the folder `work` -> ({step: (seconds, checkpoint)}, seconds to its end)."""
    kept = Path(tempfile.mkdtemp(dir=work))
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(began), str(kept), *words],
        cwd=work, env=plain_environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{words[0]} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    seconds = time.time() - began
    files = {int(file.stem.partition("-")[0]): file for file in kept.glob("*.pt")}
    return {step: (float(files[step].stem.partition("-")[2]), files[step]) for step in sorted(files)}, seconds


@torch.inference_mode()
def full_pass(losses, ids, context, at_once=64):
    """Mean nats per token over all of ids (N,) but the first, in windows of `context` tokens side by side.

    losses: inputs (B, T), targets (B, T) -> nats of all those targets together.
    """
    total, ids = 0.0, torch.as_tensor(ids)
    whole = (len(ids) - 1) // context
    inputs, targets = (x[: whole * context].view(-1, context) for x in (ids[:-1], ids[1:]))
    for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        total += losses(x, y)
    rest = slice(whole * context, None)
    if len(ids[:-1][rest]):
        total += losses(ids[:-1][rest][None], ids[1:][rest][None])
    return total / (len(ids) - 1)


def nanogpt(checkout):
    """The module model.py of a checkout of nanoGPT."""
    for name in ("model.py", "train.py", "configurator.py", "config/train_shakespeare_char.py"):
        if not (Path(checkout) / name).is_file():
            raise UserError(f"{checkout} has no {name}; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(module, **shape):
    """Its model of that shape, in silence: it tells its size."""
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**shape))


class NanoGPT:
    """A checkout of nanoGPT, and its files of tokens made from `text` in the folder `work`."""

    def __init__(self, checkout, text, work):
        self.checkout, self.work, self.module = Path(checkout).resolve(), work, nanogpt(checkout)
        letters = sorted(set(text))
        self.ids = {letter: index for index, letter in enumerate(letters)}
        folder = work / "data" / "shakespeare_char"
        folder.mkdir(parents=True)
        border = int(0.9 * len(text))
        self.val = np.array([self.ids[letter] for letter in text[border:]])
        np.array([self.ids[letter] for letter in text[:border]], np.uint16).tofile(folder / "train.bin")
        self.val.astype(np.uint16).tofile(folder / "val.bin")
        meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": self.ids}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        shutil.copy(self.checkout / "configurator.py", work)  # which train.py opens where it runs

    def train(self):
        config = self.checkout / "config" / "train_shakespeare_char.py"
        return train([str(self.checkout / "train.py"), str(config), *THEIRS], self.work)

    def losses(self, checkpoint):
        """What `full_pass` asks of a checkpoint, and the longest context that has positions."""
        state = torch.load(checkpoint, weights_only=True)
        model = build(self.module, **state["model_args"]).eval()
        model.load_state_dict(state["model"])
        return lambda x, y: model(x, y)[1].item() * y.numel(), state["model_args"]["block_size"]


class Trainshort:
    """One of OURS, and the same text as bytes."""

    def __init__(self, words, text, data_dir, work):
        here = Path(__file__).resolve().parent.parent.parent
        config, *flags = words.split()
        self.words = [str(here / "train.py"), str(here / config), f"--data_dir={Path(data_dir).resolve()}", *flags]
        self.val, self.work = np.frombuffer(text[int(0.9 * len(text)) :].encode(), np.uint8).astype(np.int64), work

    def train(self):
        out = tempfile.mkdtemp(dir=self.work)
        return train([*self.words, "--device=cpu", "--length_targets=0", f"--out_dir={out}"], self.work)

    def losses(self, checkpoint):
        """The same."""
        state = runs.load(checkpoint)
        model = runs.build(runs.config_of(state)).eval()
        runs.load_weights(model, state)
        return lambda x, y: model(x, y).sum().item(), model.max_length


def reached(curve, goal):
    """Seconds until a curve [(seconds, step, loss), ...] passed the goal; None where it did not, or has no losses."""
    return next((seconds for seconds, _, loss in curve if loss is not None and loss <= goal), None)


def spread(values, form):
    """Median (least - most) of some numbers; a dash where one is None."""
    if None in values:
        return "-"
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} - {high})"


def run(config):
    """Rounds in which all contestants train by turns -> lines of Markdown."""
    text = fetch(shakespeare.URL, f"{config.data_dir}/raw/tinyshakespeare.txt", shakespeare.SHA256).read_text("utf-8")
    with tempfile.TemporaryDirectory() as work:
        contestants = {"nanoGPT": NanoGPT(config.race, text, Path(work))}
        contestants |= {name: Trainshort(words, text, config.data_dir, Path(work)) for name, words in OURS.items()}
        runs_of = {name: [] for name in contestants}
        turns = [(name, one) for _ in range(config.rounds) for name, one in contestants.items()]
        for name, one in tqdm(turns, "training", disable=None):
            checkpoints, seconds = one.train()
            curves = {context: [] for context in CONTEXTS}
            for step, (when, file) in checkpoints.items():
                losses, longest = one.losses(file)
                for context, curve in curves.items():
                    loss = full_pass(losses, one.val, context) if context <= longest else None
                    curve.append((when, step, loss))
            runs_of[name].append((curves, seconds, step * tokens_per_step(file) / when))
    return table(runs_of)


def tokens_per_step(checkpoint):
    config = torch.load(checkpoint, weights_only=True)["config"]
    return config["batch_size"] * config["train_length" if "train_length" in config else "block_size"]


def table(runs_of):
    """{contestant: [({context: [(seconds, step, loss), ...]}, seconds in all, tokens/s), ...]} -> lines of Markdown."""
    near, far = CONTEXTS
    theirs = max(curves[near][-1][2] for curves, *_ in runs_of["nanoGPT"])
    goals = [(near, theirs), (far, 1.5), (far, A100)]
    heads = ["", *(f"seconds to {goal:.4g}, {context} of context" for context, goal in goals)]
    heads += [f"last loss, {near} of context", f"{far} of context", "seconds in all", "tokens/s"]
    rows, details = [], []
    for name, rounds in runs_of.items():
        row = [name]
        row += [spread([reached(curves[context], goal) for curves, *_ in rounds], ".1f") for context, goal in goals]
        row += [spread([curves[context][-1][2] for curves, *_ in rounds], ".4f") for context in CONTEXTS]
        row += [spread([seconds for _, seconds, _ in rounds], ".1f"), spread([speed for *_, speed in rounds], ",.0f")]
        rows.append(row)
        for point in zip(*(zip(curves[near], curves[far], strict=True) for curves, *_ in rounds), strict=True):
            losses = [spread([pair[context][2] for pair in point], ".4f") for context in range(len(CONTEXTS))]
            seconds = spread([pair[0][0] for pair in point], ".1f")
            details.append([name, str(point[0][0][1]), seconds, *losses])
    more = ["", "step", "seconds", *(f"loss, {context} of context" for context in CONTEXTS)]
    return [*report.markdown(heads, rows), "", *report.markdown(more, details)]


def watched(model, call):
    """What call() returns, and the times at which it called the model."""
    times, hook = [], lambda *_: times.append(time.perf_counter())
    handle = model.register_forward_pre_hook(hook)
    with torch.inference_mode():
        found = call()
    handle.remove()
    return found, times


def by_transformers(model, tokens, count):
    """Its greedy decoding of `count` tokens -> the ids of all, and the times of its calls."""
    given = dict(attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0)
    return watched(model, lambda: model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **given))


def decoders(config, longest):
    """{name: function of tokens (B, T) and a count, which decodes so many tokens and returns when it got each}, of
    models of one shape: layers, heads, width, vocabulary."""
    ours = runs.build(config).eval()
    if ours.max_length < longest:
        raise UserError(ours.too_long(longest))
    shape = {"vocab_size": config.vocab_size, "n_layer": config.n_layer, "n_head": config.n_head}
    module = nanogpt(config.decode)
    theirs = build(module, block_size=longest, n_embd=config.n_embd, dropout=0.0, bias=False, **shape).eval()

    forward, _ = places.compiled(ours, True, places.choose("cpu"), decoding=True)

    def stepwise(compiled):
        return lambda tokens, count: [
            time.perf_counter() for _ in generate(ours, tokens, count, temperature=0, compiled=compiled)
        ]

    found = {
        "trainshort": stepwise(None),
        **({} if forward is ours else {"compiled": stepwise(forward)}),
        "nanoGPT": lambda tokens, count: watched(theirs, lambda: theirs.generate(tokens, count))[1],
    }
    try:
        import transformers
    except ImportError:
        return found
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.hidden,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, max_position_embeddings=longest,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    return found | {"transformers": lambda tokens, count: by_transformers(llama, tokens, count)[1]}


def decode(config):
    """Tokens per second of decoding after contexts of T, 4 T and 16 T -> lines of Markdown."""
    T, count = config.train_length, config.decode_tokens
    contexts = [T, 4 * T, 16 * T]
    contestants, rows = decoders(config, contexts[-1] + count), []
    ours = [name for name in contestants if name in ("trainshort", "compiled")]
    pairs = [(one, other) for other in contestants if other not in ours for one in ours]
    for context, batch in tqdm([(n, b) for n in contexts for b in (1, 16)], "decoding", disable=None):
        tokens, speeds = torch.randint(config.vocab_size, (batch, context)), {name: [] for name in contestants}
        for _ in range(config.rounds):
            for name, call in contestants.items():
                times = call(tokens, count)[2:]  # the first took in the context, the second may have compiled
                gaps = [after - before for before, after in itertools.pairwise(times)]
                speeds[name].append(batch / statistics.median(gaps))
        middle = {name: statistics.median(each) for name, each in speeds.items()}
        ratios = [f"{middle[ours] / middle[other]:.1f}" for ours, other in pairs]
        rows.append([str(context), str(batch), *(f"{speed:,.0f}" for speed in middle.values()), *ratios])
    heads = ["context", "batch", *(f"{name} tokens/s" for name in contestants)]
    return report.markdown([*heads, *(" / ".join(pair) for pair in pairs)], rows)


def published(config):
    """A published model here and in transformers: tokens per second of taking in Python source, and of going on with
    it greedily; and how many tokens both agree on before they differ -> lines of Markdown."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install -r requirements-hf.txt") from None
    if not config.published.startswith(hf.PREFIX):
        raise UserError(f"--published={config.published} is no published model; name one as hf:FOLDER or hf:OWNER/NAME")
    folder, count, rows = hf.find(config.published), config.decode_tokens, []
    longest = runs.open_run(config.published).model.max_length
    todo = [(name, n) for name in ("float32", "bfloat16") for n in PROMPTS if n + count <= longest]
    if not todo:
        raise UserError(f"{config.published} has {longest} positions, and {PROMPTS[0] + count} are needed")
    for name, context in tqdm(todo, "prefill and decoding", disable=None):
        device = places.choose("cpu", name)
        opened = runs.open_run(config.published)
        ours = opened.model
        device.prepare(ours)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=device.dtype).eval()
        theirs.generation_config.eos_token_id = None  # or they would not draw it, so that a text does not end
        tokens = torch.tensor([opened.tokenizer.encode_ordinary(inspect.getsource(inspect))[:context]])
        seconds = {"prefill": [], "decoding": []}
        for _ in range(config.rounds):
            with device.autocast():
                ids, mine = watched(ours, lambda: list(generate(ours, tokens, count, temperature=0)))  # noqa: B023
            same, other = by_transformers(theirs, tokens, count)
            # The first call takes in the context, and the second is when that was done.
            seconds["prefill"].append([(each[1] - each[0]) / context for each in (mine, other)])
            gaps = [[after - before for before, after in itertools.pairwise(each[1:])] for each in (mine, other)]
            seconds["decoding"].append([statistics.median(each) for each in gaps])
        equal = (torch.cat(ids) == same[0, context:]).long().cumprod(0).sum()
        row = [name, str(context)]
        for pairs in seconds.values():
            row += [f"{1 / statistics.median(each):,.0f}" for each in zip(*pairs, strict=True)]
            row.append(spread([other / mine for mine, other in pairs], ".2f"))
        rows.append([*row, f"{equal} of {count}"])
    each = ("trainshort", "transformers", "ours / theirs")
    heads = [f"{what}: {who}" for what in ("prefill", "decoding") for who in each]
    return report.markdown(["tokens/s", "context", *heads, "the same tokens"], rows)
