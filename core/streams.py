"""What a command prints, whatever stands behind stdout and stderr: an encoding that lacks letters, a pipe whose reader
has left, a terminal that has gone. A leaf: it imports nothing of ours."""

import contextlib
import errno
import os
import sys

from tqdm import tqdm

# A pipe without a reader, on Windows too, and a terminal that has gone.
READER_LEFT = (errno.EPIPE, errno.EINVAL, errno.EIO)


@contextlib.contextmanager
def prepared(lasting):
    """A context in which no letter is a UnicodeError on stdout and stderr, and every line is written when it ends.

    lasting: a stream that cannot be written any more is left out, with a line on the other one and no exception. The
    context's value is a list of the OSErrors that this has cost output which somebody wanted.
    """
    outputs, lost = (sys.stdout, sys.stderr), []
    for stream in outputs:
        if hasattr(stream, "reconfigure"):  # A notebook's has no encoding that lacks letters.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    with contextlib.ExitStack() as stack:
        if lasting:
            stack.enter_context(contextlib.redirect_stdout(Lasting("stdout", sys.stdout, lost)))
            stack.enter_context(contextlib.redirect_stderr(Lasting("stderr", sys.stderr, lost)))
        try:
            yield lost
        finally:
            for stream in outputs:  # The interpreter would report a second time what cannot be written.
                try:
                    stream.flush()
                except OSError:
                    discard(stream)


def discard(stream):
    """Let all that is written into an open file go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Lasting:
    """The open text file `stream`, in which writing never fails. That it would is said once, on the other stream, and
    added to `lost` unless its reader has left."""

    def __init__(self, name, stream, lost):
        self.name, self.stream, self.lost = name, stream, lost

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write text, or drop it -> its length."""
        return self.attempt(self.stream.write, text) or len(text)

    def flush(self):
        """Write what is buffered, or drop it."""
        self.attempt(self.stream.flush)

    def attempt(self, function, *argument):
        try:
            return function(*argument)
        except OSError as error:
            discard(self.stream)
            self.lost += [error] if error.errno not in READER_LEFT else []
            other = sys.stderr if self.name == "stdout" else sys.stdout
            tqdm.write(f"{self.name}: {error.strerror}; going on without it", file=other)
