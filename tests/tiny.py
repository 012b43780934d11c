"""Commands in real processes of their own, a tiny run among them, and the bounds that tests allow for rounding.

`start` and `run` fork a command off a server that has imported torch and the project once: it has arguments, a folder,
an environment, output, an exit status and signals of its own, and begins after .1 s instead of 3.
"""

from core import start as before_torch  # isort: skip

import contextlib
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# One thread, so that runs are the same to the last bit; not a member of any torchrun that may have started the tests.
ENV = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENV["OMP_NUM_THREADS"] = "1"
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # products this small gain nothing from more, and lose where the cores are busy
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PATIENCE = 300  # seconds after which a command hangs
TINY = {
    "dataset": "text", "train_length": 16, "n_layer": 2, "n_embd": 32, "batch_size": 8, "max_steps": 24,
    "eval_interval": 8, "checkpoint_interval": 4, "log_interval": 1, "eval_tokens": 256, "length_targets": 4,
    "dropout": 0.1, "dtype": "float32", "device": "cpu",
}  # fmt: skip


# ---- bounds


def bound(dtype, terms, scale=1.0):
    """The largest difference that rounding explains between two ways to compute a number in `dtype`.

    terms: the roundings on the way to it: the lengths of its sums, those behind one another added up. scale: the size
    of what is added. A rounding moves a result by at most eps / 2 of its size, and there are two results, so it is
    terms * eps * scale, whatever the order in which a machine adds (Higham 2002, section 4.2, to first order in eps).
    """
    return terms * torch.finfo(dtype).eps * scale


def sums(config, keys):
    """The `terms` of a logit of the model that has `keys` keys in sight."""
    inside = 3 * config.n_embd + config.n_embd // config.n_head + keys + config.hidden
    return config.n_layer * inside + config.n_embd + config.vocab_size


def step_sums(config, tokens):
    """The `terms` of a gradient over so many tokens, and so of the loss after the step it makes: a gradient goes back
    through the sums of the forward pass twice, to inputs and to weights, and is summed over the tokens."""
    return 3 * sums(config, config.train_length) + tokens


# ---- processes

FORKS = sys.platform == "linux"  # elsewhere commands are started as any other program is
METHOD = "forkserver" if FORKS else "spawn"
_CONTEXT = multiprocessing.get_context(METHOD)
_OUTPUT = tempfile.TemporaryDirectory(prefix="output-")


def prepare_server():
    """Start the server that commands are forked from, unless it runs. It has one thread and has run nothing of OpenMP,
    since neither survives a fork."""
    if not FORKS:
        return
    modules = ["core.start", "torch", "pytest", "matplotlib.pyplot", "train", "sample", "evaluate", "compare", "tiny"]
    _CONTEXT.set_forkserver_preload(modules)
    before = dict(os.environ)
    try:
        os.environ.update(ENV, PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        # A killed command leaves a semaphore of tqdm's behind, of which the tracker would warn when the tests end.
        os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(words, cwd, env, out, err):
    """In the forked process: run the words of a command line behind `python`, as `python` would."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.current_process()._config["daemon"] = False  # it may have processes of its own
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # torch has read the server's environment, not this one
    before_torch.BEGAN = time.perf_counter()
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class Command:
    """A command line that runs. Its output goes to files, so that it never waits for a reader.

    fresh: a new interpreter, not a fork. Command lines of other programs, or of torchrun, always are fresh.
    """

    def __init__(self, line, cwd=None, env=None, fresh=False):
        line, cwd, env = [str(word) for word in line], str(cwd or os.getcwd()), ENV | (env or {})
        self.line, number = line, len(os.listdir(_OUTPUT.name))
        self.files = [Path(_OUTPUT.name) / f"{number}{end}" for end in ("out", "err")]
        for file in self.files:
            file.touch()
        ours = line[0] == sys.executable and (line[1].endswith(".py") or line[1] == "-m")
        self.forked = bool(FORKS and ours and not fresh and "torch.distributed.run" not in line)
        if self.forked:
            prepare_server()
            self.process = _CONTEXT.Process(target=_become, args=(line[1:], cwd, env, *self.files), daemon=True)
            self.process.start()
        else:
            with open(self.files[0], "w", encoding="utf-8") as out, open(self.files[1], "w", encoding="utf-8") as err:
                self.process = subprocess.Popen(line, cwd=cwd, env=env, stdout=out, stderr=err)
        self.pid = self.process.pid

    def poll(self):
        """The exit status, minus the signal that ended the process, or None while it runs."""
        return self.process.exitcode if self.forked else self.process.poll()

    def wait(self, timeout=PATIENCE):
        with contextlib.suppress(subprocess.TimeoutExpired):
            (self.process.join if self.forked else self.process.wait)(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.line, timeout, self.stdout, self.stderr)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # A fork's end is known a moment later than it is gone.
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self):
        return self.files[0].read_text(encoding="utf-8")

    @property
    def stderr(self):
        return self.files[1].read_text(encoding="utf-8")


class Ranks:
    """A command in several processes that compute together, as torchrun starts them: a signal goes to all of them, and
    when one of them fails, the others are ended."""

    def __init__(self, line, processes, cwd=None, env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.commands = []
        for rank in map(str, range(processes)):
            own = address | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)}
            self.commands.append(Command(line, cwd, (env or {}) | own))

    def poll(self):
        states = [command.poll() for command in self.commands]
        if any(states):
            self.send_signal(signal.SIGTERM)
        return None if None in states else next(filter(None, states), 0)

    def wait(self, timeout=PATIENCE):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.commands[0].line, timeout, self.stdout, self.stderr)
            time.sleep(0.01)
        return self.poll()

    def send_signal(self, number):
        for command in self.commands:
            command.send_signal(number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self):
        return "".join(command.stdout for command in self.commands)

    @property
    def stderr(self):
        return "".join(command.stderr for command in self.commands)


def start(line, processes=1, **options):
    """Begin a command line and go on meanwhile: .pid, .poll(), .wait(), .kill(), .send_signal(), .stdout, .stderr."""
    return Command(line, **options) if processes == 1 else Ranks(line, processes, **options)


def finish(line, timeout=PATIENCE, **options):
    """Run a command line to its end -> subprocess.CompletedProcess."""
    begun = start(line, **options)
    return subprocess.CompletedProcess(line, begun.wait(timeout), begun.stdout, begun.stderr)


# ---- the tiny run


def command(corpus, out, launcher=(), **settings):
    """The command line that trains the tiny run into `out`; launcher: what stands before train.py, torchrun say."""
    settings = TINY | {"text": corpus, "data_dir": corpus.parent / "data", "out_dir": out} | settings
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *flags]


def run(corpus, out, check=True, processes=1, env=None, **settings):
    """The tiny run, to its end."""
    done = finish(command(corpus, out, **settings), processes=processes, env=env)
    assert not check or done.returncode == 0, done.stderr
    return done
