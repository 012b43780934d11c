"""A mistake the user can mend is one clear line on stderr and exit status 2, never a traceback."""

import difflib
import os
import signal
import sys
import time

PATIENCE = 10  # seconds in which torchrun has certainly ended the processes that another one left alone


class UserError(Exception):
    """A line that says what is wrong, and what to type instead."""


def require(condition, message):
    """ValueError with this message, unless the condition holds."""
    if not condition:
        raise ValueError(message)


RANGES = {  # a range in words -> whether a number lies in it; not-a-number lies in none
    "at least 1": lambda x: x >= 1,
    "0 or more": lambda x: x >= 0,
    "in 0 ... 1": lambda x: 0 <= x <= 1,
    "in 0 ... 1 and below 1": lambda x: 0 <= x < 1,
    "in 0 ... 1 and above 0": lambda x: 0 < x <= 1,
}


def require_range(settings, words, *keys):
    """ValueError for an attribute of `settings` that does not lie in the range which `words` names, a key of RANGES."""
    for key in keys:
        value = getattr(settings, key)
        require(RANGES[words](value), f"{key} must be {words}, not {value}")


def nearest(word, known, cutoff=0.6):
    """'did you mean X?', or all that is known where nothing is as similar as `cutoff` (0 ... 1)."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean '{match[0]}'?" if match else f"choose from {', '.join(known)}"


def brief(value, width=200):
    """A value as text of at most `width` characters, the middle of longer ones left out."""
    text = str(value)
    return text if len(text) <= width else f"{text[: width * 2 // 3]} ... {text[-width // 4 :]}"


def line_of(error):
    """What a UserError or an OSError says, as one line. No word of it is longer than `brief` lets it be."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error = f"{error.filename}: {error.strerror}"
    return brief(" ".join(map(brief, str(error).split())), 1500)


def program():
    """The name of the running program: train.py, or lab.bench for `python -m lab.bench`."""
    spec = sys.modules["__main__"].__spec__  # `python -m` alone sets it
    return spec.name.removesuffix(".__main__") if spec else os.path.basename(sys.argv[0])


def run(main):
    """Call main(argv) of a command and exit with its status. A UserError, or what the file system refuses, is one line
    and status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # The reader of our output left, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Flushing at exit would fail again.
        sys.exit(0)
    except Exception as error:
        mistake, rank = isinstance(error, UserError | OSError), int(os.environ.get("LOCAL_RANK", "0"))
        # Under torchrun one process of each machine speaks, and when it leaves, torchrun ends the others, which wait
        # here. A mistake of another process alone is said after that wait, and a connection that was lost because the
        # first one left is not reported at all.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (mistake and rank == 0):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE + rank)
        if not mistake:
            raise
        print(f"{program()}: {line_of(error)}", file=sys.stderr)
        sys.exit(2)
