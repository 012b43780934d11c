"""Config files and flags: how they merge and convert, that they are never executed, and one clear line per mistake."""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import typing
from pathlib import Path
from typing import ClassVar

import pytest
from tiny import TINY

import compare
import evaluate
import posenc
import sample
from core import flags as configs
from core import log
from core.errors import UserError, line_of
from core.settings import Config
from data import bpe
from lab import gallery
from lab.bench import timing


def merged(argv):
    return configs.parse(argv, Config)


ROOT = Path(configs.__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))
SCRIPTS = ["data.bpe", "hub.export", "sample", "evaluate"]


@pytest.fixture
def write(tmp_path):
    """write("n_layer = 2") -> the path of a config file with that text, or those bytes."""

    def to_file(text, name="mine.py"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return to_file


def parse(*argv):
    """The settings that a command line gives, as {key: (value, type)}: 1 == 1.0 == True, but they are not the same."""
    return {key: (value, type(value)) for key, value in configs.parse(argv, Config)[1].items()}


def mistake(call, *arguments):
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def make(**settings):
    return configs.make(Config, settings)


# Merging.


def test_files_merge_left_to_right_and_flags_win(write):
    a = write("n_layer = 1\nn_head = 1\nn_embd = 1", "a.py")
    b = write('"""A docstring."""\nn_head = 2\nn_embd = 2  # a comment', "b.py")
    names, settings = configs.parse([a, "--n_embd=3", b], Config)
    assert names == ["a", "b"] and settings == {"n_layer": 1, "n_head": 2, "n_embd": 3}
    assert configs.parse(["--n_embd", "3", b, a], Config)[1] == {"n_layer": 1, "n_head": 1, "n_embd": 3}
    assert configs.parse(["--n_layer=1", "--n_layer=2"], Config)[1] == {"n_layer": 2}


def test_the_last_of_two_assignments_in_a_file_counts(write):
    assert configs.parse([write("n_layer = 1\nn_layer = 2")], Config)[1] == {"n_layer": 2}


# Values, in flags and files.


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--n_layer=2"], "n_layer", 2),
        (["--n_layer", "2"], "n_layer", 2),
        (["--n-layer=2"], "n_layer", 2),
        (["--max_steps=1e4"], "max_steps", 10000),
        (["--max_steps", "1_000"], "max_steps", 1000),
        (["--seed", "-1"], "seed", -1),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate=3e-4"], "learning_rate", 0.0003),
        (["--learning_rate", "+.25"], "learning_rate", 0.25),
        (["--bias"], "bias", True),
        (["--bias", "--n_layer=2"], "bias", True),
        (["--bias=true"], "bias", True),
        (["--bias=True"], "bias", True),
        (["--bias", "false"], "bias", False),
        (["--bias=False"], "bias", False),
        (["--compile"], "compile", True),
        (["--compile", "auto"], "compile", "auto"),
        (["--compile=false"], "compile", False),
        (["--optimizer=adamw"], "optimizer", "adamw"),
        (["--posenc=rope(base=5e5)"], "posenc", "rope(base=5e5)"),
        (['--posenc=["rope", "none"]'], "posenc", ["rope", "none"]),
        (["--posenc", "('rope', 'none')"], "posenc", ["rope", "none"]),
        (["--text=a.txt"], "text", "a.txt"),
        (["--text", "-"], "text", "-"),
        (["--length_schedule={0.0: 64, .5: 128}"], "length_schedule", {0.0: 64, 0.5: 128}),
    ],
)
def test_flag(flags, key, value):
    assert parse(*flags)[key] == (value, type(value))


@pytest.mark.parametrize(
    "text", ["1e4", "True", "None", "[1, 2]", "'quoted'", "a=b", "  spaces ", "", "--dashes", "é\n\t%"]
)
def test_text_flags_are_taken_verbatim(text):
    assert parse(f"--out_dir={text}")["out_dir"] == (text, str)
    assert configs.flags([f"--prompt={text}"], sample.Options)[1] == {"prompt": text}


def test_a_word_after_a_switch_is_no_value_of_it(write):
    file = write("n_layer = 2")
    assert parse("--bias", file) == {"bias": (True, bool), "n_layer": (2, int)}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("n_layer = 2", 2),
        ("max_steps = 1e4", 10000),
        ("max_steps = 1_000", 1000),
        ("learning_rate = 1", 1.0),
        ("learning_rate = 3E-4", 3e-4),
        ("weight_decay = +1", 1.0),
        ("seed = -3", -3),
        ("bias = True", True),
        ("bias = false", False),
        ("compile = 'auto'", "auto"),
        ("posenc = 'rope(base=5e5)'", "rope(base=5e5)"),
        ("posenc = ['rope'] ", ["rope"]),
        ("posenc = 'rope', 'no' 'ne'", ["rope", "none"]),
        ("out_dir = '1e4'", "1e4"),
        ("length_schedule = {0: 64, 0.5: 128}", {0: 64, 0.5: 128}),
    ],
)
def test_file_line(write, line, value):
    key = line.split()[0]
    assert parse(write(line)) == {key: (value, type(value))}


# Nothing in a config file, or a flag, is ever run.

HARMFUL = [
    "import pathlib; pathlib.Path(MARK).touch()",
    "from pathlib import Path",
    "open(MARK, 'w')",
    "n_layer = open(MARK, 'w') or 2",
    "n_layer = len(open(MARK, 'w').mode)",
    "n_layer = [open(MARK, 'w') for _ in [0]]",
    "n_layer = (x := open(MARK, 'w'))",
    "n_layer = 2 if open(MARK, 'w') else 3",
    "n_layer = 2 + open(MARK, 'w').fileno()",
    "out_dir = f\"{open(MARK, 'w')}\"",
    "out_dir = 'a'.join(['b'])",
    "out_dir = 'a' * 10**9",
    "n_layer = {2: 2}[2]",
    "n_layer = truth",
    "n_layer = ...",
    "n_layer = {2}",
    "out_dir = b'bytes'",
    "length_schedule = {0.0: open(MARK, 'w')}",
    "length_schedule = {open(MARK, 'w'): 2}",
    "length_schedule = {**globals()}",
    "text = [*open(MARK, 'w')]",
    "n_layer = (2).real",
    "n_layer = __file__",
    "n_layer = [2][0]",
    "n_layer = lambda: 2",
    "n_layer += 2",
    "n_layer: int = open(MARK, 'w')",
    "n_layer = n_head = 2",
    "n_layer, n_head = 2, 2",
    "Config.n_layer = 2",
    "if open(MARK, 'w'): n_layer = 2",
    "class Config: open(MARK, 'w')",
    "def n_layer(x=open(MARK, 'w')): pass",
    "@open(MARK, 'w')\ndef n_layer(): pass",
    "del n_layer",
]


@pytest.mark.parametrize("code", HARMFUL)
def test_code_in_a_config_file_is_refused_and_does_not_run(write, tmp_path, code):
    mark = tmp_path / "ran"
    code = code.replace("MARK", repr(str(mark)))
    compile(code, "mine.py", "exec")  # it is Python: what refuses it is not its syntax
    file = write(f'"""A config."""\nn_layer = 2\n{code}\n')
    line = 4 if code.startswith("@") else 3  # of a decorated function Python gives the line of its `def`
    assert mistake(merged, [file]).startswith(f"{file}, line {line}: ")
    assert not mark.exists()


def test_code_in_a_flag_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for key in ("n_layer", "bias", "length_schedule", "compile"):
        assert mistake(merged, [f"--{key}=open({str(mark)!r}, 'w')"]).startswith(f"--{key}: ")
    assert configs.parse([f"--out_dir=open({str(mark)!r}, 'w')"], Config)[1]["out_dir"].startswith("open(")
    assert not mark.exists()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param("1" + "0" * 31, id="32 digits"),
        "-1e30",
        "1e400",
        "9**9**9",  # the computer's memory holds no number of that length
        "2**10**10",
        "10.0**-400",
        "9**-(9**9)",
        "((2**64)**64)**64",  # a quarter of a million bits; once more is 16 million, and twice more fills the memory
        "(10**64)**5",  # beyond every float
        pytest.param("1" + "0" * 400, id="400 digits"),
        "1/0",
        "1//0",
        "0**-1",
    ],
)
def test_numbers_beyond_reason_are_refused_at_once(write, number):
    for key in ("n_layer", "learning_rate"):
        file = write(f"{key} = {number}")
        assert mistake(merged, [file]).startswith(f"{file}, line 1: ")
        told = mistake(merged, [f"--{key}={number}"])
        assert told.startswith(f"--{key}: ") and ("numbers go to 1e30" in told or not number.lstrip("-").isdigit())


# Mistakes.


@pytest.mark.parametrize("value", ["4 * 128", "2**20", "-(1 + 1)", "[1, 2 * 3]", "{0.0: 64, 1 / 2: 128}", "1 + 2j"])
def test_arithmetic_is_told_to_write_the_number(write, value):
    for key in ("n_layer", "length_schedule", "out_dir"):
        assert "write the number" in mistake(merged, [write(f"{key} = {value}")])
    assert "--n_layer: " in mistake(merged, [f"--n_layer={value}"])


@pytest.mark.parametrize(
    ("wrong", "meant"), [("n_layers", "n_layer"), ("learning_rat", "learning_rate"), ("Seed", "seed")]
)
def test_unknown_key_names_the_nearest(write, wrong, meant):
    file = write(f"n_head = 2\n\n{wrong} = 1")
    said = mistake(merged, [file])
    assert said.startswith(f"{file}, line 3: ") and f"'{wrong}'" in said and f"did you mean '{meant}'?" in said
    said = mistake(merged, [f"--{wrong}=1"])
    assert f"--{wrong}" in said and f"did you mean '{meant}'?" in said


@pytest.mark.parametrize("key", ["usage", "phases", "kv_heads", "__class__", "__post_init__"])
def test_what_is_no_setting_cannot_be_set(write, key):
    """Names of the class that are not its fields."""
    assert f"unknown key '{key}'" in mistake(merged, [write(f"{key} = 'x'")])
    assert f"unknown key '{key}'" in mistake(merged, [f"--{key}=x"])
    assert f"unknown key '{key}'" in mistake(merged, [f"--{key}"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n_layer", "'4'", "int"),
        ("n_layer", "True", "int"),
        ("n_layer", "2.5", "int"),
        ("n_layer", "None", "int"),
        ("n_layer", "[2]", "int"),
        ("learning_rate", "'fast'", "float"),
        ("learning_rate", "True", "float"),
        ("learning_rate", "1j", "float"),
        ("qk_norm", "1", "bool"),
        ("bias", "1", "False, True, attention, qkv"),
        ("qk_norm", "'yes'", "bool"),
        ("length_schedule", "[64, 128]", "dict"),
        ("length_schedule", "{[0]: 64}", ""),
        ("optimizer", "'sgd'", "muon, adamw"),
        ("compile", "1", "auto, True, False"),
    ],
)
def test_wrong_type_names_the_place_and_what_is_expected(write, key, value, expected):
    file = write(f"\n{key} = {value}")
    said = mistake(merged, [file])
    assert said.startswith(f"{file}, line 2: ") and key in said and expected in said
    said = mistake(merged, [f"--{key}={value}"])
    assert said.startswith(f"--{key}: ") and expected in said


@pytest.mark.parametrize(
    "line", ["out_dir = 3", "out_dir = None", "posenc = 3", "posenc = True", "text = {}", "dataset = 1"]
)
def test_files_put_text_in_quotes(write, line):
    assert ", line 1: " in mistake(merged, [write(line)])


@pytest.mark.parametrize("text", [[3], [None], [["a"]]])
def test_a_list_of_texts_holds_names(text):
    assert "text" in mistake(lambda: make(dataset="text", text=text))


def test_a_flag_without_its_value_says_how_to_write_it():
    for argv in (["--n_layer"], ["--n_layer", "--n_head=2"]):
        said = mistake(merged, argv)
        assert "--n_layer needs a value" in said and "--n_layer=4" in said


def test_a_value_may_begin_with_one_dash_and_a_flag_is_no_value():
    assert configs.flags(["--prompt", "-x", "RUN"], sample.Options) == (["RUN"], {"prompt": "-x"})
    assert configs.flags(["--prompt", "-h"], sample.Options)[1] == {"prompt": "-h"}
    assert configs.flags(["--prompt=--tokens=3"], sample.Options)[1] == {"prompt": "--tokens=3"}
    assert "--posenc needs a value" in mistake(merged, ["--posenc", "--length_schedule={0.0: 4, 0.5: 8}"])
    assert "unknown key" in mistake(merged, ["--lenght_schedule={0.0: 4, 0.5: 8}"])


def test_a_flag_with_one_dash_is_told_to_take_two():
    assert "write --max_steps=5" in mistake(merged, ["-max_steps=5"])
    assert "write --max_steps" in mistake(merged, ["-max_steps", "5"])
    assert "write --hide" in mistake(merged, ["-hide"])


def test_keys_are_not_abbreviated():
    for argv in (["--n_lay=2"], ["--n_lay", "2"], ["--bia"], ["--he"], ["--help=x"], ["--"], ["--=2"]):
        assert "unknown key" in mistake(merged, argv)


def test_what_argparse_drops_is_refused():
    assert "two dashes" in mistake(merged, ["--out_dir=--"])


def test_missing_config_file_names_the_nearest():
    said = mistake(merged, ["configs/ropes.py"])
    assert "configs/ropes.py" in said and "did you mean 'configs/rope.py'?" in said
    assert "configs/alibi.py" in mistake(merged, ["nothing like it"])


@pytest.mark.parametrize(
    "content",
    [
        b"n_layer = 2  # caf\xe9\n",
        b"\xff\xfen\x00=\x002\x00",
        b"\x7fELF\x02\x01\x01\x00\x00",
        b"n_layer = 2\x00",
        b"PK\x03\x04 not Python",
        b"n_layer == 2 =",
        b"n_layer = " + b"(" * 300,
    ],
)
def test_what_is_no_python_text_is_refused(write, content):
    assert write(content) in mistake(merged, [write(content)])


def test_python_that_is_none_is_named_with_file_and_line(write):
    for line, said in (
        ("n_layer = = 2", "invalid syntax"),
        ("n_layer = 2\n  n_head = 2", "indent"),
        ("a = 'b", "literal"),
    ):
        file = write(f"n_embd = 32\n{line}\n")
        where = f"{file} is no config file: line {2 + line.count(chr(10))}: "
        told = mistake(merged, [file])
        assert told.startswith(where) and said in told and "unknown" not in told


def test_a_file_of_windows_editor_is_read(write):
    assert configs.parse([write(b"\xef\xbb\xbfn_layer = 2\r\n")], Config)[1] == {"n_layer": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.py")
    os.symlink("pipe.py", "link.py")
    os.symlink("loop.py", "loop.py")
    Path("folder.py").mkdir()
    with open("huge.py", "wb") as file:
        file.truncate(1 << 40)
    for word in (
        "pipe.py",
        "link.py",
        "loop.py",
        "folder.py",
        "huge.py",
        "/dev/zero",
        "a" * 100_000,
        "a/" * 10_000,
        "\0",
    ):
        assert "config file" in mistake(merged, [word])


# From another folder.


def test_a_config_file_that_is_not_here_is_the_one_beside_train_py(tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    assert merged(["configs/rope.py", "configs/quick.py"]) == merged(
        [str(ROOT / "configs" / f) for f in ("rope.py", "quick.py")]
    )
    done = call_script("compare.py", "configs/rope.py", "none", "--common=configs/gpt2.py", "--n_head=5")
    assert done.stderr == "compare.py: n_embd (768) must be a multiple of n_head (5)\n"  # both of the files were read
    Path("configs").mkdir()
    Path("configs/rope.py").write_text("n_layer = 9\n", encoding="utf-8")
    assert merged(["configs/rope.py"])[1] == {"n_layer": 9}


def test_words_that_are_nearly_right_say_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("seed=3").mkdir()
    for word, said in (
        ("rope", "did you mean 'configs/rope.py'?"),
        ("configs/rope", "did you mean 'configs/rope.py'?"),
        ("rop.py", "did you mean 'configs/rope.py'?"),
        ("max_steps=5", "write --max_steps=5"),
        ("max-steps=5", "write --max-steps=5"),
        ("seed=3", "seed=3 is a folder and no config file"),
        ("--dataset=wikitext", "did you mean 'wikitext2'?"),
        ("--dataset=tinyshakespeare", "did you mean 'shakespeare'?"),
        ("--optimizer=adam", "did you mean 'adamw'?"),
    ):
        assert said in mistake(merged, [word]), word
    assert configs.flags(["seed=3"], sample.Options) == (["seed=3"], {})  # a run's folder may have such a name


# However odd it is.

DEEP = [
    "[",
    "(",
    "{1:",
    "-",
    "not ",
    "~",
    "lambda:",
    "1+",
    "f(",
    "x.",
    "'",
    "\\",
    "9",
    "a=",
    "rope(inner=",
    "1 if ",
    "x[",
]


@pytest.mark.parametrize("many", [199, 7_000])
@pytest.mark.parametrize("sign", DEEP)
def test_what_is_nested_deeply_or_long_is_one_line_without_a_warning(write, sign, many, recwarn):
    told = [
        mistake(merged, [write(f"length_schedule = {sign * many}1")]),
        mistake(merged, [f"--length_schedule={sign * many}1"]),
    ]
    told += [mistake(merged, [word]) for word in (f"--{sign * many}=1", f"-{sign * many}", f"--dataset={sign * many}")]
    assert all(len(line_of(UserError(text))) <= 1500 for text in told)
    assert not recwarn.list


def test_python_does_not_warn_of_what_is_only_read(write, recwarn):
    for text in ("'\\d'", "1if 2else 3", "0x1for x in []", "'a' is 'b'"):
        mistake(merged, [write(f"n_layer = {text}")])
        mistake(merged, [f"--n_layer={text}"])
    assert not recwarn.list


PIECES = [*"-='\"\\#;:,()[]{}~é \n\0\ufeff\udcff\u202e", "--", "\\d", "\x1b[2J", "9" * 5000, "a" * 9999, "None", "true"]
PIECES += ["nan", "1e999", "1_0", "0x", "lambda:", "f'{x}'", "rope(", "inner=", "%s", "../", "auto"]


def test_generated_flags_and_files_are_settings_or_one_harmless_line(write, recwarn, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(0), 0
    keys = [field.name for field in dataclasses.fields(Config)]
    for _ in range(100):
        key, value = rng.choice([*keys, rng.choice(PIECES)]), "".join(rng.choices(PIECES, k=rng.choice([1, 1, 2, 5])))
        file = write(f"{key} = {value}".encode("utf-8", "surrogatepass"))
        for word in (f"--{key}={value}", value, file):
            try:
                configs.make(Config, configs.parse([word], Config)[1])
            except UserError as error:
                line, refused = line_of(error), refused + 1
                assert line.isprintable() and len(line) <= 1500
    assert refused > 230 and not recwarn.list


# Numbers without reason.

# These whole numbers may be as large as a flag can be: nothing is as large as they say, or it is refused for what else
# is set. Every other one has an upper bound.
ANY = {
    "train": {
        "max_steps",
        "eval_interval",
        "log_interval",
        "checkpoint_interval",
        "eval_tokens",
        "segments",
        "shards",
        "seed",
    },
    "sample": {"top_k", "crop"},
    "data.bpe": {"vocab_size"},
}
OPTIONS = {
    "train": Config, "sample": sample.Options, "evaluate": evaluate.Options, "compare": compare.Compare,
    "lab.gallery": gallery.Gallery, "lab.bench": timing.Bench, "data.bpe": bpe.Options,
}  # fmt: skip


@pytest.mark.parametrize("script", OPTIONS)
def test_every_whole_number_has_an_upper_bound_or_needs_none(script):
    cls, needed = OPTIONS[script], {"dataset": "fineweb"} if script == "train" else {}
    free = ANY.get(script, ANY["train"] if issubclass(cls, Config) else set())
    unbounded = set()
    for field in dataclasses.fields(cls):
        if typing.get_type_hints(cls)[field.name] is int:
            with contextlib.suppress(UserError):
                configs.make(cls, needed | {field.name: 10**29} | ({"window": 1} if field.name == "sinks" else {}))
                unbounded.add(field.name)
    assert unbounded <= free


def test_numbers_that_need_no_bound_are_used(call_script, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(log.Log, "draw", lambda self: None)
    huge = dict.fromkeys(ANY["train"] - {"max_steps", "segments", "shards"}, 10**29)
    settings = TINY | {"text": corpus, "data_dir": corpus.parent / "data", "max_steps": 1, "length_targets": 0} | huge
    done = call_script("train.py", *(f"--{key}={value}" for key, value in settings.items()), "--out_dir=out")
    assert done.returncode == 0, done.stderr
    assert call_script("sample.py", "out", "--tokens=2", f"--top_k={10**29}").returncode == 0


def test_empty_config_file_changes_nothing(write):
    assert configs.parse([write("")], Config)[1] == configs.parse([write("# a comment\n")], Config)[1] == {}


# What does not fit together.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd"),
        ({"n_head": 4, "n_kv_head": 3}, "n_kv_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"train_length": -1}, "train_length"),
        ({"max_steps": 0}, "max_steps"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 0.7, "decay": 0.7}, "warmup"),
        ({"final_lr": 2.0}, "final_lr"),
        ({"dataset": "text"}, "--text"),
        ({"text": "a.txt"}, "--dataset=text"),
        ({"posenc": "ropes"}, "rope"),
        ({"posenc": "rope(bass=3)"}, "base"),
        ({"posenc": []}, "posenc"),
    ],
)
def test_settings_that_do_not_fit_together(settings, said):
    assert said in mistake(lambda: make(**settings))


def test_length_schedule_gives_the_phases():
    config = make(length_schedule={0.0: 32, 0.6: 64, 0.85: 128}, train_length=128, max_steps=1000)
    assert config.phases == [(0, 32), (600, 64), (850, 128)]
    assert make(train_length=64).phases == [(0, 64)]


@pytest.mark.parametrize(
    "schedule",
    [
        {0.1: 64, 0.5: 128},  # does not begin at the start
        {0.0: 64, 0.5: 32, 0.4: 128},  # goes back
        {0.0: 64, 1.0: 128},  # begins at the end
        {0.0: 64, 1.5: 128},
        {-0.5: 64, 0.0: 128},
        {0.0: 0, 0.5: 128},
        {0.0: -64, 0.5: 128},
        {0.0: 64.0, 0.5: 128},
        {0.0: "64", 0.5: 128},
        {"0": 64, 0.5: 128},
        {False: 64, 0.5: 128},
        {0.0: 64, 0.5: 64},  # does not end at train_length
        {0.0: 256, 0.5: 128},  # longer than train_length, which is what positions and windows are made for
        {0.0: 96, 0.5: 128},  # 128 tokens are no whole number of windows of 96
    ],
)
def test_length_schedule_that_cannot_be_run(schedule):
    assert "length_schedule" in mistake(lambda: make(length_schedule=schedule, train_length=128, batch_size=6))


@pytest.mark.parametrize("length", [10**8 + 1, 2**31, 2**63, 10**29])
def test_lengths_to_measure_have_a_bound(length):
    said = mistake(configs.make, evaluate.Options, {"lengths": [16, length]})
    assert "in 2 ... 10^8 that rise" in said
    assert "train_length must be in 1 ... 10^8" in mistake(lambda: timing.variant(Config(), "rope", length))


# Help.


@pytest.mark.parametrize("script", [None, *SCRIPTS])
def test_every_field_has_a_line_of_help(script, capsys):
    cls = importlib.import_module(script).Options if script else Config
    with pytest.raises(SystemExit) as status:
        configs.flags(["--help"], cls)
    usage, _, *lines = capsys.readouterr().out.splitlines()
    assert status.value.code == 0 and usage.startswith("usage: ")
    for field, line in zip(dataclasses.fields(cls), lines, strict=True):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        start = f"--{field.name}={value!r} "
        assert line.strip().startswith(start)
        assert line.strip().removeprefix(start).split("[")[0].strip(), line


@pytest.mark.parametrize("cls", [Config, sample.Options, evaluate.Options])
def test_help_shows_a_schedule_over_the_layers_that_can_be_typed(cls):
    line = next(line for line in configs.help_text(cls).splitlines() if "--posenc=" in line)
    example = re.search(r"'(\[.*\])'", line)[1]
    spec = configs.convert_flag(example, "posenc", cls)
    assert len({sight.window for sight in posenc.sights(spec, 4)}) == 2


def test_help_lists_the_choices():
    line = next(line for line in configs.help_text(Config).splitlines() if "--schedule=" in line)
    assert "wsd" in line and "cosine" in line


# The files that come with the repository.


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_file_makes_a_config(file):
    settings = configs.parse([str(file)], Config)[1]
    config = configs.make(Config, settings)
    assert settings and all(getattr(config, key) == value for key, value in settings.items())


def test_encodings_compose_with_all_other_shipped_files():
    """What (a file that sets posenc alone) and how big (all others)."""
    settings = {file: configs.parse([str(file)], Config)[1] for file in FILES}
    encodings = [file for file in FILES if settings[file].keys() == {"posenc"}]
    others = [file for file in FILES if "posenc" not in settings[file]]
    assert {"rope", "alibi", "learned", "none", "t5", "sinusoidal"} <= {file.stem for file in encodings}
    for what in encodings:
        for big in others:
            one, other = (
                configs.make(Config, configs.parse(map(str, pair), Config)[1]) for pair in ((what, big), (big, what))
            )
            assert one == other and one.posenc == settings[what]["posenc"]
            assert json.loads(json.dumps(dataclasses.asdict(one)))  # plain values, as config.json wants them


# A whole command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.py"], r"train\.py: mine\.py, line 2: unknown key 'n_layers'; did you mean 'n_layer'\?"),
        (["configs/ropes.py"], r"train\.py: .*'configs/rope\.py'\?"),
        (["--n_layer=four"], r"train\.py: --n_layer: n_layer is 'four'; expected int.*"),
        (["--dataset=text", "--text=missing.txt"], r"train\.py: .*missing\.txt"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(call_script, tmp_path, arguments, said):
    (tmp_path / "mine.py").write_text("n_head = 2\nn_layers = 2\n", encoding="utf-8")
    done = call_script("train.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(said + "\n", done.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


def test_repeated_flags_that_the_options_name_become_a_list():
    @dataclasses.dataclass
    class Options:
        repeats: ClassVar[tuple] = ("posenc",)
        posenc: str | list = ""
        seed: int = 0

    given = configs.flags(["--posenc=rope", "a", "--seed=1", "--posenc", '["t5"]', "--seed=2"], Options)
    assert given == (["a"], {"posenc": ["rope", ["t5"]], "seed": 2})
