"""Settings of any dataclass: config files of literals that merge left to right, and `--key=value` flags on top.

A config file is plain assignments of literals. It is read, never run. Every mistake is a UserError that names the file
or flag and the nearest key. The comment beside a field is its line in `--help`.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import os
import re
import typing
import warnings
from pathlib import Path
from typing import Literal

from core.errors import UserError, brief, nearest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HOME = Path(__file__).parent.parent  # the folder of train.py and of configs/
MOST = 1 << 20  # bytes of a config file


# Reading literals.


class Lowercase(ast.NodeTransformer):
    """`true` and `false` mean True and False."""

    def visit_Name(self, node):
        return ast.Constant(node.id == "true") if node.id in ("true", "false") else node


def parsed(text, mode="exec"):
    """Python's text -> its tree, which is never run. ValueError with the line where it is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of \d in a text, say
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno or 1}: {error.msg}") from None
    except (RecursionError, MemoryError):  # for thousands of nested signs
        raise ValueError("nested too deeply") from None


def literal(node):
    """The value of a parsed expression, which is never run. ValueError for anything but a literal, OverflowError for a
    number beyond reason."""
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp):
            raise ValueError("arithmetic is not computed here; write the number, such as 512 for 4 * 128")
        value = getattr(part, "value", None)
        if type(value) in (int, float) and not abs(value) < 1e30:
            raise OverflowError("numbers go to 1e30")
    try:
        return ast.literal_eval(Lowercase().visit(node))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("not a literal (a number, text in quotes, True, a list, a dict)") from None


def find(path):
    """The config file that a word names: by its path, or where there is nothing by its path beside train.py. UserError
    for what is no file."""
    try:
        file = HOME / path if not Path(path).exists() and (HOME / path).is_file() else Path(path)
        if file.is_file():
            return file
        what = "a folder" if file.is_dir() else "a pipe or a device" if file.exists() else ""
    except (OSError, ValueError) as error:  # The name is too long, or no name.
        raise UserError(f"no config file {brief(path)}: {getattr(error, 'strerror', None) or error}") from None
    if what:
        raise UserError(f"{path} is {what} and no config file")
    known = {each.stem: each.relative_to(HOME).as_posix() for each in sorted((HOME / "configs").rglob("*.py"))}
    close = difflib.get_close_matches(file.stem, known, n=1, cutoff=0.7)
    hint = f"did you mean '{known[close[0]]}'?" if close else f"choose from {', '.join(known.values())}"
    raise UserError(f"no config file {path}; {hint}")


def read(path, cls):
    """A config file -> {key: value}, checked against the fields of the dataclass cls."""
    file = find(path)
    try:
        if file.stat().st_size > MOST:
            raise UserError(f"{path} is no config file: it has {file.stat().st_size:,} bytes")
        tree = parsed(file.read_text(encoding="utf-8-sig"))  # Windows' editor puts a mark before UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is no config file: {error}") from None
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
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {key}: {error}") from None
        settings[key] = convert(value, key, cls, where)
    return settings


# Types of the fields.


def field_type(key, cls, where):
    """The type of the field `key` of cls. UserError names the nearest key where there is none."""
    known = [field.name for field in dataclasses.fields(cls)]
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)  # A worse guess would lead astray.
        raise UserError(f"{where}: unknown key '{key}'; {nearest(key, close) if close else '--help lists all of them'}")
    return typing.get_type_hints(cls)[key]


def choices_of(hint):
    """The values that a type names one by one, perhaps beside another type: of Literal["a", "b"] | list, a and b."""
    kinds = (hint, *typing.get_args(hint))
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal), ())


def default(key, cls):
    """The default of the field `key` of cls."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == key)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def convert(value, key, cls, where):
    """value as the type of the field `key` of cls: an int serves for a float, 1e4 for an int, a tuple for a list.
    UserError otherwise, which begins with `where`."""
    hint = field_type(key, cls, where)
    allowed, choices = typing.get_args(hint) or (hint,), choices_of(hint)
    if choices and not (list in allowed and type(value) in (list, tuple)):
        # The type is compared too, since 1 == True.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            meant = nearest(str(value), list(map(str, choices)))
            raise UserError(f"{where}: {key} is {value!r}; {meant}")
        return value
    if float in allowed and type(value) is int:
        return float(value)
    if int in allowed and type(value) is float and value.is_integer():
        return int(value)
    if list in allowed and type(value) is tuple:
        return list(value)
    if type(value) not in allowed:
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise UserError(f"{where}: {key} is {value!r}; expected {expected}, such as {default(key, cls)!r}")
    return value


def convert_flag(text, key, cls):
    """A flag's text as the type of the field `key`: text fields take it as it is, all others as a literal."""
    hint = field_type(key, cls, f"--{key}")
    if hint is str or (str in typing.get_args(hint) and not text.lstrip().startswith(("[", "("))):
        return text
    try:
        value = literal(parsed(text.strip(), mode="eval").body)
    except ValueError:
        value = text
    except OverflowError as error:
        raise UserError(f"--{key}: {error}") from None
    return convert(value, key, cls, f"--{key}")


# The command line.


def flags(argv, cls):
    """['configs/rope.py', '--n_layer', '2', '--compile'] -> (['configs/rope.py'], {'n_layer': 2, 'compile': True}).

    --key=value, --key value, and --key alone for a switch. The fields that cls.repeats names may be given several times
    and become lists. --help prints every field of cls and exits.
    """
    words = spelled_out(argv, cls)
    if "--help" in words or "-h" in words:
        print(help_text(cls))
        raise SystemExit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(cls):
        action = "append" if field.name in getattr(cls, "repeats", ()) else "store"
        kind = functools.partial(convert_flag, key=field.name, cls=cls)
        parser.add_argument(f"--{field.name}", action=action, type=kind)
    settings, positional = parser.parse_known_args(words)
    keys = [field.name for field in dataclasses.fields(cls)]
    for word in positional:
        if word.startswith("--"):
            field_type(word[2:].partition("=")[0], cls, word)
        elif word.startswith("-"):
            raise UserError(f"{word} has one dash; write -{word}")
        elif "=" in word and word.partition("=")[0].replace("-", "_") in keys and not os.path.exists(word):
            raise UserError(f"{word} has no dashes; write --{word}")
    return positional, vars(settings)


def spelled_out(argv, cls):
    """The words with every flag as --key=value, its key with underscores: argparse would guess from dashes and spaces
    which words are values. UserError for a flag that has none."""
    hints, words, ahead = typing.get_type_hints(cls), [], list(argv)
    keys = {field.name for field in dataclasses.fields(cls)}
    while ahead:
        word = ahead.pop(0)
        flag, equals, text = word.partition("=")
        key = flag[2:].replace("-", "_")
        if word.startswith("--") and key in keys:
            choices = typing.get_args(hints[key]) or (hints[key],)
            is_switch = bool in choices or True in choices
            if (
                is_switch
                and not equals
                and (not ahead or ahead[0].lower() not in ("true", "false", *map(str, choices)))
            ):
                text = "True"
            elif not equals and (not ahead or ahead[0].startswith("--")):
                raise UserError(f"{word} needs a value: {word}={default(key, cls)!r}, say")
            elif not equals:
                text = ahead.pop(0)
            if text == "--":
                raise UserError(f"{word}: two dashes are no value by themselves")  # argparse of Python 3.11 drops them
            word = f"--{key}={text}"
        words.append(word)
    return words


def parse(argv, cls):
    """Command line -> (names of the config files, {key: value}): files merge left to right, flags come last."""
    files, from_flags = flags(argv, cls)
    settings = {}
    for file in files:
        settings |= read(file, cls)
    return [Path(file).stem for file in files], settings | from_flags


def make(cls, settings):
    """The dataclass from its settings; what does not fit together is a UserError."""
    try:
        return cls(**settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def changed(settings, **changes):
    """A copy of a dataclass with other values for some of its fields; what does not fit together is a UserError."""
    return make(type(settings), vars(settings) | changes)


def help_text(cls):
    """One line for every key: name, default, and the comment beside it in the source."""
    lines, comments = [f"usage: {cls.usage}", ""], {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(base), re.MULTILINE)
    for key, comment in comments.items():
        hint = typing.get_type_hints(cls)[key]
        choices = choices_of(hint)
        allowed = f" [{' | '.join(map(str, choices))}]" if choices else ""
        lines.append(f"  --{key}={default(key, cls)!r}".ljust(34) + f" {comment}{allowed}")
    return "\n".join(lines)
