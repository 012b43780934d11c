"""Settings of any dataclass: literal config files that merge left to right, and `--key=value` flags on top.

A config file is plain assignments of literals (arithmetic on numbers allowed). It is read, never run. Every mistake is
a UserError that names the file or flag and the nearest key. The comment beside a field is its line in `--help`.
"""

import ast
import dataclasses
import inspect
import operator
import re
import typing
from pathlib import Path
from typing import Literal

from core.errors import UserError, nearest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
        known = [f"configs/{file.name}" for file in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))]
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


def parse(argv, cls):
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
