"""A mistake the user can mend is one clear line on stderr and exit status 2, never a traceback."""

import os
import sys


class UserError(Exception):
    """What is wrong, and what to type instead, in one line."""


def run(main):
    """Call main(argv) of a script and turn a UserError, or what the file system refuses, into one line."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail again
        sys.exit(0)
    except (UserError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
