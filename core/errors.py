"""A mistake the user can mend is one clear line on stderr and exit status 2, never a traceback."""

import contextlib
import difflib
import math
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from core import streams

PATIENCE = 10  # seconds in which torchrun has certainly ended the processes that another one left alone
PROCESSES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what torchrun sets, and what holds without it
ENDS_WITH_PARENT = "TRAINSHORT_ENDS_WITH_PARENT"  # an environment variable that lab/workers.py sets for its processes


class UserError(Exception):
    """A line that says what is wrong, and what to type instead."""


def require(condition, message):
    """ValueError with this message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


RANGES = {  # a range in words -> whether a number lies in it; infinity and not-a-number lie in none
    "at least 1": lambda x: 1 <= x < math.inf,
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "in 1 ... 10^4": lambda x: 1 <= x <= 10**4,  # of what is made one by one, such as layers
    "in 1 ... 10^6": lambda x: 1 <= x <= 10**6,  # of what is listed, such as rows of a batch
    "in 0 ... 10^6": lambda x: 0 <= x <= 10**6,
    "in 1 ... 10^8": lambda x: 1 <= x <= 10**8,  # of what is multiplied: a matrix then has a size in 64 bits
    "in 0 ... 10^8": lambda x: 0 <= x <= 10**8,
    "in 0 ... 2^63 - 1": lambda x: 0 <= x < 2**63,  # of what becomes an integer of a tensor
    "in -2^63 ... 2^64 - 1": lambda x: -(2**63) <= x < 2**64,  # of what seeds torch's generators
    "in 0 ... 1": lambda x: 0 <= x <= 1,
    "in 0 ... 1 and below 1": lambda x: 0 <= x < 1,
    "in 0 ... 1 and above 0": lambda x: 0 < x <= 1,
}


def require_range(settings, words, *keys):
    """ValueError for an attribute of `settings` that does not lie in the range which `words` names, a key of RANGES."""
    for key in keys:
        value = getattr(settings, key)
        require(RANGES[words](value), f"{key} must be {words}, not {value}")


def count(number, noun):
    """A number of things in words: '1 run', '1,024 runs'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def nearest(word, known, cutoff=0.6):
    """'did you mean X?', or all that is known where nothing is as similar as `cutoff` (0 ... 1)."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean '{match[0]}'?" if match else f"choose from {', '.join(known)}"


def brief(value, width=200):
    """A value as text of `width` signs or so, the middle of longer ones left out. What a terminal would obey (escapes,
    marks of direction) is spelled out."""
    text = str(value)
    text = text if len(text) <= width else f"{text[: width * 2 // 3]} ... {text[-width // 4 :]}"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def line_of(error):
    """What a UserError, an OSError or a text says, as one line. Each word of it is as `brief` leaves it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error = f"{error.filename}: {error.strerror}"
    # Spaces inside a line stay, as they may be part of a file's name.
    text = " ".join(filter(None, map(str.strip, str(error).splitlines())))
    return brief(" ".join(map(brief, text.split(" "))), 1500)


def note(text):
    """Say what is no mistake, but not what a user expects: one line on stderr."""
    print(line_of(text), file=sys.stderr)


def out_of_memory(error):
    """Whether an exception says that memory is used up: CUDA and numpy have classes for it, MPS and the CPU do not."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


# Commands that a user is told to type.


def no_flag(path):
    """A path as a word of a command line, where one that begins with a dash would be a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def pasted(*words):
    """The words as a line to be pasted into a shell, whatever they hold. A Path among them is no flag."""
    return shlex.join(no_flag(word) if isinstance(word, Path) else str(word) for word in words)


def command(script, *words):
    """The line that runs one of our scripts, such as "sample.py", from where the running one was started."""
    beside = Path(os.path.dirname(sys.argv[0]), script)  # not so where that is a file of lab/ or hub/
    return pasted("python", beside if beside.is_file() else script, *words)


def program():
    """The name of the running program: train.py, or lab.bench for `python -m lab.bench`."""
    spec = sys.modules["__main__"].__spec__  # `python -m` alone sets it
    return spec.name.removesuffix(".__main__") if spec else os.path.basename(sys.argv[0])


def processes():
    """(RANK, WORLD_SIZE, LOCAL_RANK) of this process as torchrun has set them, (0, 1, 0) where they are not set.
    UserError where they do not make sense, as those that a cluster leaves behind."""
    rank, world, local_rank = words = [os.environ.get(key) or value for key, value in PROCESSES.items()]
    try:
        rank, world, local_rank = map(int, words)
        met = world == 1 or bool(os.environ.get("MASTER_ADDR") and int(os.environ.get("MASTER_PORT") or 0))
        if met and 0 <= local_rank <= rank < world:
            return rank, world, local_rank
    except ValueError:
        pass
    where = [f"{key}={os.environ[key]}" for key in (*PROCESSES, "MASTER_ADDR", "MASTER_PORT") if key in os.environ]
    way_out = f"unset {' '.join(PROCESSES)}, or start with torchrun, which sets all of them"
    raise UserError(f"the environment says {' '.join(where)}, which is no process of several: {way_out}")


def end_with_parent():
    """Where ENDS_WITH_PARENT is set and stdin is a pipe: get SIGTERM when the process at its other end has gone."""

    def wait():
        os.read(0, 1)  # It returns when the kernel closes the pipe of a process that was killed.
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(ENDS_WITH_PARENT, None):
        threading.Thread(target=wait, daemon=True).start()


def end_bars():
    """End the lines of all progress bars, so that no other line is glued to one."""
    for bar in list(getattr(tqdm, "_instances", ())):  # tqdm has no public name for them.
        bar.close()


def run(main, lasting=True):
    """Call main(argv) of a command and exit with its status. A UserError, or what the file system refuses, is one line
    and status 2.

    lasting: the command goes on where nobody reads what it prints any more (`| head -1`), since its work lies in files.
    One whose text is all there is ends there, with status 0. Output that a full disk lost is status 2 either way.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, instead of core.start's
    end_with_parent()
    with streams.prepared(lasting) as lost:
        try:
            sys.exit(main(sys.argv[1:]) or 2 * bool(lost))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and not lasting:
                sys.exit(0)
            end_bars()
            if out_of_memory(error):
                error = UserError("out of memory: take less at once, or a smaller model")
            mistake, rank, world = isinstance(error, UserError | OSError), 0, 1
            with contextlib.suppress(UserError):
                _, world, rank = processes()
            # Under torchrun one process of each machine speaks, and when it leaves, torchrun ends the others, which
            # wait here. A mistake of another process alone is said after that wait, and a connection that was lost
            # because the first one left is not reported at all.
            if world > 1 and not (mistake and rank == 0):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(PATIENCE + rank)
            if not mistake:
                raise
            print(f"{program()}: {line_of(error)}", file=sys.stderr)
            sys.exit(2)
