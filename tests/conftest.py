"""Fixtures that several test files share."""

import importlib
import subprocess
import sys

import pytest
from tiny import ROOT, finish, run

from core import errors


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.py", "--max_steps=1", cwd=None, env=None): a script of the repository in a process of its own;
    one that lies in a folder, such as hub/export.py, as `python -m hub.export`.

    The working directory is tmp_path unless `cwd` says otherwise; `env` is laid over this process's environment.
    """

    def start(script, *arguments, cwd=None, env=None):
        module = script.removesuffix(".py").replace("/", ".")
        words = ["-m", module] if "." in module else [ROOT / script]
        return finish(
            [sys.executable, *words, *arguments], cwd=cwd or tmp_path, env={"PYTHONPATH": str(ROOT)} | (env or {})
        )

    return start


@pytest.fixture
def call_script(tmp_path, monkeypatch, capsys):
    """As run_script, but in this process, without the seconds that importing torch takes."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # errors would name `python -m pytest`

    def start(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            errors.run(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
        return subprocess.CompletedProcess(sys.argv, left.value.code or 0, *capsys.readouterr())

    return start


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """One long text that is no noise."""
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("".join(f"line {n} says that {n} times {n} is {n * n}.\n" for n in range(1500)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """The folder of a tiny run with rope that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(corpus, out)
    return out


@pytest.fixture(scope="session")
def learned(corpus, tmp_path_factory):
    """The folder of a tiny run whose positions end at its training length."""
    out = tmp_path_factory.mktemp("learned") / "run"
    run(corpus, out, posenc="learned")
    return out


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A tokenizer.json as GPT-2's, of 300 tokens; 0 ends a text."""
    import published  # It needs the extra packages.

    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    published.train_bpe(file)
    return file


@pytest.fixture(scope="session")
def plain(tmp_path_factory, bpe):
    """{family: the folder of a published model without scaling}"""
    import published

    published.torch.manual_seed(0)
    families = ("llama", "qwen2", "gpt_neox")
    return {family: published.save(tmp_path_factory.mktemp(family), bpe, family) for family in families}
