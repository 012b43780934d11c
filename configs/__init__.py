"""Settings: one dataclass, literal config files that merge left to right, and `--key=value` flags on top.

A config file is plain assignments of literals (arithmetic on numbers allowed). It is read, never run. Every mistake is
a UserError that names the file or flag and the nearest key. The comment beside a field is its line in `--help`.
"""

import ast
import dataclasses
import inspect
import operator
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from errors import UserError
from model import GPTConfig, require
from posenc import nearest

Dataset = Literal[
    "python", "shakespeare", "wikitext2", "ptb", "fineweb", "text", "copy", "reverse", "recall", "addition", "passkey"
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Config(GPTConfig):
    """A whole run: GPTConfig's model, and what it learns from, how, and where."""

    usage: ClassVar[str] = "python train.py [configs/FILE.py ...] [--key=value ...]"

    # what it learns from
    dataset: Dataset = "python"  # the corpus ('text' is your own, named with --text), or a task of data/tasks.py
    text: str | list = ""  # your file or folder, for dataset = "text"; several: --text='["a.txt", "b/"]'
    packages: bool = False  # python data set: also the source of site-packages
    shards: int = 1  # fineweb data set: files of 100 million tokens each, 1 to 9
    tokenizer: str = "bytes"  # bytes, bpe (4,096 tokens, shipped), a tiktoken name such as gpt2, or a .tiktoken file
    data_dir: str = "data"  # token files go to its tokens/, downloads to its raw/
    seed: int = 1337  # of initial weights, batches and dropout
    # how
    max_steps: int = 700  # optimiser steps
    batch_size: int = 32  # sequences of train_length in a step, over all processes
    micro_batch_size: int = 0  # sequences a process computes at once (gradients accumulate); 0 means its whole share
    length_schedule: dict = field(default_factory=dict)  # {share of the run: length}, at constant tokens a step
    segments: int = 1  # windows of so many times T, read T by T over a memory of the T tokens before (Transformer-XL)
    optimizer: Literal["muon", "adamw"] = "muon"  # muon is for the blocks' matrices, with adamw for all else
    learning_rate: float = 6e-3  # peak; muon's updates are scaled to adamw's size
    weight_decay: float = 0.1  # on matrices; positions, embeddings, norms and biases are left alone
    beta1: float = 0.9  # adamw's momentum
    beta2: float = 0.95  # adamw's decay of squared gradients
    momentum: float = 0.95  # muon's
    grad_clip: float = 1.0  # largest norm of the gradient; 0 leaves it alone
    schedule: Literal["wsd", "cosine"] = "wsd"  # warmup, stable, decay; or warmup and a cosine
    warmup: float = 0.02  # share of the run in which the learning rate rises
    decay: float = 0.4  # share of the run in which wsd's falls
    final_lr: float = 0.0  # share of the peak at the end
    init_from: str = ""  # a run to take weights and model settings from, with another posenc or length perhaps
    # measuring
    eval_interval: int = 100  # steps between evaluations
    eval_tokens: int = 32768  # validation tokens an evaluation reads, the same ones each time
    log_interval: int = 10  # steps between lines of metrics.jsonl
    checkpoint_interval: int = 100  # steps between checkpoints
    length_targets: int = 128  # windows behind the closing table of loss against length; 0 leaves the table out
    # where
    out_dir: str = ""  # the run's folder; by default out/ and the config names joined by '-'
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of products; auto is bfloat16 where the hardware has it, float16 on older CUDA, or float32
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto means on CUDA

    def __post_init__(self):
        super().__post_init__()
        for key in (
            "max_steps",
            "batch_size",
            "segments",
            "shards",
            "eval_interval",
            "eval_tokens",
            "log_interval",
            "checkpoint_interval",
        ):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, not {getattr(self, key)}")
        for key in ("seed", "micro_batch_size", "learning_rate", "weight_decay", "grad_clip", "length_targets"):
            require(getattr(self, key) >= 0, f"{key} must not be negative")
        for key in ("warmup", "decay", "final_lr"):
            require(0 <= getattr(self, key) <= 1, f"{key} must lie in 0 ... 1, not {getattr(self, key)}")
        for key in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, key) < 1, f"{key} must lie in 0 ... 1 and below 1, not {getattr(self, key)}")
        levels = self.schedule == "cosine" or self.warmup + self.decay <= 1
        require(levels, "warmup and decay must not exceed 1 together")
        require(isinstance(self.text, str) or all(isinstance(path, str) for path in self.text), "text must list paths")
        require(bool(self.text) == (self.dataset == "text"), "--text=PATH and --dataset=text go together")
        require(not self.packages or self.dataset == "python", "--packages goes with --dataset=python")
        require(self.shards == 1 or self.dataset == "fineweb", "--shards goes with --dataset=fineweb")
        require(self.segments == 1 or not self.length_schedule, "segments and length_schedule exclude each other")
        if self.length_schedule:
            starts, lengths = list(self.length_schedule), list(self.length_schedule.values())
            form = "length_schedule must look like {0.0: 128, 0.6: 256}, from 0.0 on with rising shares below 1"
            require(all(type(x) in (int, float) for x in starts) and all(type(x) is int for x in lengths), form)
            require(starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1 and min(lengths) > 0, form)
            last = lengths[-1]
            require(last == self.train_length, f"length_schedule ends at {last}: set train_length={last} too")
            for length in lengths:
                require(last % length == 0, f"length_schedule: {length} does not divide the last length, {last}")

    @property
    def phases(self):
        """[(first step, length of a window)] of the length schedule, in order."""
        whole = {0.0: self.train_length * self.segments}
        return [(round(share * self.max_steps), length) for share, length in (self.length_schedule or whole).items()]


def parse_literal(text):
    """The value of a literal expression, which is never evaluated; ValueError for anything else."""
    try:
        return literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):  # the last two for thousands of nested signs
        raise ValueError("not a literal") from None


def literal(node):
    match node:
        case ast.Constant():
            value = node.value
        case ast.Name(id="true" | "false"):
            value = node.id == "true"
        case ast.List() | ast.Tuple():
            value = [literal(item) for item in node.elts]
        case ast.Dict():
            value = [(literal(key), literal(item)) for key, item in zip(node.keys, node.values, strict=True)]
            if any(isinstance(key, list | dict) for key, _ in value):
                raise ValueError("a list or a dict cannot be a key")
            value = dict(value)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            value = arithmetic(node.op, literal(node.operand))
        case ast.BinOp() if type(node.op) in OPERATORS:
            value = arithmetic(node.op, literal(node.left), literal(node.right))
        case _:
            raise ValueError("not a literal (a number, text in quotes, True, a list, a dict)")
    if type(value) in (int, float) and not abs(value) < 1e30:
        raise ValueError("numbers go to 1e30")
    return value


def arithmetic(op, *numbers):
    if any(type(number) not in (int, float) for number in numbers):
        raise ValueError("arithmetic is for numbers")
    if isinstance(op, ast.Pow) and abs(numbers[1]) > 64:
        raise ValueError("exponents go to 64")
    try:
        return OPERATORS[type(op)](*numbers)
    except ArithmeticError as error:
        raise ValueError(str(error)) from None


OPERATORS = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def read(path, cls):
    """A config file -> {key: value}, checked against the fields of the dataclass cls."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [f"configs/{file.name}" for file in sorted(Path(__file__).parent.glob("[!_]*.py"))]
        raise UserError(f"no config file {path}; {nearest(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not a config file: {error}") from None
    settings = {}
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1):
            raise UserError(f"{where}: only plain assignments, such as n_layer = 4, stand in a config file")
        key = node.targets[0].id
        try:
            value = literal(node.value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {key}: {error}") from None
        settings[key] = convert(value, key, cls, where)
    return settings


def convert(value, key, cls, where):
    """value as the type of field `key` of cls: an int serves for a float, 1e4 for an int. UserError otherwise."""
    hint = field_type(key, cls, where)
    allowed = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is Literal:
        # type first: 1 == True
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            expected = ", ".join(str(choice) for choice in allowed)
            raise UserError(f"{where}: {key} is {value!r}; choose from {expected}")
        return value
    if float in allowed and type(value) is int:
        return float(value)
    if int in allowed and type(value) is float and value.is_integer():
        return int(value)
    if type(value) not in allowed:
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise UserError(f"{where}: {key} is {value!r}; expected {expected}, such as {default(key, cls)!r}")
    return value


def convert_flag(text, key, cls, where):
    """A flag's text as the type of field `key`: text fields take it as it is, all others as a literal."""
    hint = field_type(key, cls, where)
    if hint is str or (str in typing.get_args(hint) and not text.lstrip().startswith(("[", "("))):
        return text
    try:
        value = parse_literal(text)
    except ValueError:
        value = text
    return convert(value, key, cls, where)


def field_type(key, cls, where):
    known = [one.name for one in dataclasses.fields(cls)]
    if key not in known:
        raise UserError(f"{where}: unknown key '{key}'; {nearest(key, known, cutoff=0)}")
    return typing.get_type_hints(cls)[key]


def flags(argv, cls):
    """['configs/rope.py', '--n_layer', '2', '--compile'] -> (['configs/rope.py'], {'n_layer': 2, 'compile': True}).

    --key=value, --key value, and --key alone for a switch. The fields that cls.repeats names may be given several times
    and become lists. --help prints every field of cls and exits.
    """
    words, positional, settings = list(argv), [], {}
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print(help_text(cls))
            raise SystemExit(0)
        if not word.startswith("--"):
            if word.startswith("-"):
                raise UserError(f"{word} has one dash; write -{word}")
            positional.append(word)
            continue
        key, given, text = word[2:].partition("=")
        key = key.replace("-", "_")
        hint = field_type(key, cls, word)
        if not given:
            switch = hint is bool or True in typing.get_args(hint)
            values = {"true", "false", *map(str, typing.get_args(hint))}
            if switch and (not words or words[0].lower() not in values):
                text = "True"
            elif not words or words[0].startswith("--"):
                raise UserError(f"{word} needs a value: {word}={default(key, cls)!r}, say")
            else:
                text = words.pop(0)
        value = convert_flag(text, key, cls, f"--{key}")
        settings[key] = [*settings.get(key, []), value] if key in getattr(cls, "repeats", ()) else value
    return positional, settings


def make(cls, settings):
    """The dataclass from its settings; what does not fit together is a UserError."""
    try:
        return cls(**settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse(argv, cls=Config):
    """Command line -> (names of the config files, {key: value}): files merge left to right, flags come last."""
    files, given = flags(argv, cls)
    settings = {}
    for file in files:
        settings |= read(file, cls)
    return [Path(file).stem for file in files], settings | given


def default(key, cls):
    one = next(one for one in dataclasses.fields(cls) if one.name == key)
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def help_text(cls):
    """One line for every key: name, default, and the comment beside it in the source."""
    lines = [f"usage: {cls.usage}", ""]
    for base in reversed(cls.__mro__[:-1]):
        for key, comment in re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(base), re.MULTILINE):
            hint = typing.get_type_hints(cls)[key]
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            allowed = f" [{' | '.join(map(str, choices))}]" if choices else ""
            lines.append(f"  --{key}={default(key, cls)!r}".ljust(34) + f" {comment}{allowed}")
    return "\n".join(lines)
