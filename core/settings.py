"""The settings of a run: one dataclass, whose comments are the lines of `--help`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import posenc
from core.errors import UserError, require, require_range
from core.flags import Dtype
from model import GPTConfig

Dataset = Literal[
    "python", "shakespeare", "wikitext2", "ptb", "fineweb", "text",
    "copy", "reverse", "recall", "addition", "passkey", "multikey", "multivalue", "multiquery", "variables", "indexing",
    "flipflop", "sort", "parity", "s5", "dyck",
]  # fmt: skip


@dataclass
class Config(GPTConfig):
    """A whole run: the model of GPTConfig, what it learns from, how it learns, and where it computes."""

    usage: ClassVar[str] = "python train.py [configs/FILE.py ...] [--key=value ...]"

    # The text that it learns from.
    dataset: Dataset | list = "python"  # a corpus ('text' is yours, see --text) or task; mixed: '["python", "recall"]'
    text: str | list = ""  # your file or folder, for dataset = "text"; several: --text='["a.txt", "b/"]'
    packages: bool = False  # python data set: also the source of site-packages
    shards: int = 1  # fineweb data set: files of 100 million tokens each, 1 to 9
    tokenizer: str = "bytes"  # bytes, bpe (4,096 tokens, shipped), a tiktoken name such as gpt2, or a .tiktoken file
    data_dir: str = "data"  # token files go to its tokens/, downloads to its raw/
    seed: int = 1337  # of initial weights, batches and dropout
    # The steps in which it learns.
    max_steps: int = 700  # optimiser steps
    batch_size: int = 32  # sequences of train_length in a step, over all processes
    micro_batch_size: int = 0  # sequences a process computes at once (gradients accumulate); 0 means its whole share
    length_schedule: dict = field(default_factory=dict)  # {share of the run: length}, at constant tokens a step
    window_schedule: dict = field(default_factory=dict)  # {share of the run: factor on the layers' windows}, up to 1
    segments: int = 1  # windows of so many times T, read T by T over a memory of the T tokens before (Transformer-XL)
    optimizer: Literal["muon", "adamw"] = "muon"  # muon is for the blocks' matrices, with adamw for all else
    learning_rate: float = 6e-3  # at its peak; muon's updates are scaled to adamw's size
    weight_decay: float = 0.1  # on matrices; positions, embeddings, norms and biases are left alone
    beta1: float = 0.9  # adamw's momentum
    beta2: float = 0.95  # adamw's decay of squared gradients
    momentum: float = 0.95  # muon's momentum
    grad_clip: float = 1.0  # largest norm of the gradient; 0 leaves it alone
    schedule: Literal["wsd", "cosine"] = "wsd"  # warmup, stable, decay; or warmup and a cosine
    warmup: float = 0.02  # share of the run in which the learning rate rises
    decay: float = 0.4  # share of the run in which the learning rate of wsd falls
    final_lr: float = 0.0  # learning rate at the end, as a share of its peak
    init_from: str = ""  # a run to take weights and model settings from, with another posenc or length perhaps
    # Measuring and saving.
    eval_interval: int = 100  # steps between evaluations
    eval_tokens: int = 32768  # validation tokens an evaluation reads, the same ones each time
    log_interval: int = 10  # steps between lines of metrics.jsonl
    checkpoint_interval: int = 100  # steps between checkpoints
    length_targets: int = 128  # windows behind the closing table of loss against length; 0 leaves the table out
    # Where it computes and writes.
    out_dir: str = ""  # the run's folder; by default out/ and the config names joined by '-'
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of products; auto is bfloat16 where the hardware has it, float16 on older CUDA, or float32
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto means on CUDA

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "at least 1", "max_steps", "eval_interval", "log_interval", "checkpoint_interval")
        require_range(self, "at least 1", "eval_tokens", "segments", "shards")
        require_range(self, "in 1 ... 10^6", "batch_size")
        require_range(self, "in 0 ... 10^6", "micro_batch_size", "length_targets")
        require_range(self, "0 or more", "seed", "learning_rate", "weight_decay", "grad_clip")
        require_range(self, "in 0 ... 1", "warmup", "decay", "final_lr")
        require_range(self, "in 0 ... 1 and below 1", "beta1", "beta2", "momentum")
        levels = self.schedule == "cosine" or self.warmup + self.decay <= 1
        require(levels, "warmup and decay must not exceed 1 together")
        require(isinstance(self.text, str) or all(isinstance(path, str) for path in self.text), "text must list paths")
        names = self.datasets
        known = ", ".join(get_args(Dataset))
        require(names and all(name in get_args(Dataset) for name in names), f"dataset must list some of {known}")
        require(bool(self.text) == ("text" in names), "--text=PATH and --dataset=text go together")
        require(not self.packages or "python" in names, "--packages goes with --dataset=python")
        require(self.shards == 1 or "fineweb" in names, "--shards goes with --dataset=fineweb")
        require(self.segments == 1 or not self.length_schedule, "segments and length_schedule exclude each other")
        # A memory's first tokens would be mixed with none, where those before them have left.
        require(self.segments == 1 or not self.short_conv, "segments and short_conv exclude each other")
        if self.length_schedule:
            self.check_length_schedule()
        if self.window_schedule:
            bounded = any(sight.span for sight in posenc.sights(self.posenc, self.n_layer))
            require(bounded, "window_schedule needs a window in posenc, such as rope(window=32)")
            factors = list(self.window_schedule.values())
            form = "window_schedule must look like {0.0: 0.25, 0.5: 1.0}, from 0.0 on with rising shares, ending at 1.0"
            rises = all(type(x) in (int, float) and 0 < x <= 1 for x in factors) and factors[-1] == 1
            require(rises and covers_the_run(self.window_schedule), form)

    def check_length_schedule(self):
        """ValueError for shares or lengths that make no schedule which ends at train_length."""
        lengths = list(self.length_schedule.values())
        form = "length_schedule must look like {0.0: 128, 0.6: 256}, from 0.0 on with rising shares below 1"
        require(all(type(x) is int and x > 0 for x in lengths) and covers_the_run(self.length_schedule), form)
        last = lengths[-1]
        require(last == self.train_length, f"length_schedule ends at {last}: set train_length={last} too")
        for length in lengths:
            require(last % length == 0, f"length_schedule: {length} does not divide the last length, {last}")

    @property
    def datasets(self):
        """The names of the data sets, [name, ...]: one, or those that are mixed."""
        return self.dataset if isinstance(self.dataset, list) else [self.dataset]

    @property
    def phases(self):
        """[(first step, length of a window)] of the length schedule, in order."""
        whole = {0.0: self.train_length * self.segments}
        return [(round(share * self.max_steps), length) for share, length in (self.length_schedule or whole).items()]

    def window_factor(self, step):
        """The factor on the layers' windows in that step, see window_schedule."""
        begun = [factor for share, factor in self.window_schedule.items() if share * self.max_steps <= step]
        return begun[-1] if begun else 1.0


def covers_the_run(schedule):
    """Whether {share of the run: any} begins at 0, and its shares rise and stay below 1."""
    starts = list(schedule)
    numbers = all(type(x) in (int, float) for x in starts)
    return numbers and starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1


@dataclass
class Reading:
    """Options for reading a finished run: an encoding or a window laid over it at test time, and the device."""

    posenc: str | list = ""  # another encoding, arguments for the run's own, or by layer '["rope(window=64)", "none"]'
    window: int = 0  # attend to the last WINDOW tokens alone, over a cache that stays that small; 0 means to all
    sinks: int = 0  # with a window, keep the first SINKS tokens in sight too
    log_n: bool = False  # multiply queries by ln n / ln T where they see n > T tokens
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of products; auto is bfloat16 on CUDA, float16 on older CUDA, else float32

    def __post_init__(self):
        require_range(self, "in 0 ... 10^8", "window", "sinks")
        require(self.window or not self.sinks, "--sinks needs a --window")

    def check_model(self, model):
        """UserError where these options do not go with the model."""
        for encoding in model.posenc if self.sinks else ():
            encoding.check_sinks()
        tempers = sorted({block.attn.temper_kind for block in model.blocks} - {"none"})
        if self.log_n and tempers:
            raise UserError(f"--log_n is a temper, and the model was trained with {', '.join(tempers)}: leave it out")
