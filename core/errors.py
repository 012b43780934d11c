"""A mistake the user can mend is one clear line on stderr and exit status 2, never a traceback."""

import difflib
import os
import signal
import sys
import time

PATIENCE = 10  # seconds in which torchrun has certainly ended the processes that another one left alone


class UserError(Exception):
    """What is wrong, and what to type instead, in one line."""


def require(condition, message):
    if not condition:
        raise ValueError(message)


def nearest(word, known, cutoff=0.6):
    """'did you mean X?', or all that is known where nothing is as similar as `cutoff`."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean '{match[0]}'?" if match else f"choose from {', '.join(known)}"


def run(main):
    """Call main(argv) of a script and turn a UserError, or what the file system refuses, into one line."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail again
        sys.exit(0)
    except Exception as error:
        mistake, rank = isinstance(error, UserError | OSError), int(os.environ.get("LOCAL_RANK", "0"))
        # Under torchrun one process of a machine speaks, and as it leaves, torchrun ends the others, which wait here.
        # So what one of them alone ran into is said after all, and no lost connection where the other end said why.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (mistake and rank == 0):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE + rank)
        if not mistake:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
