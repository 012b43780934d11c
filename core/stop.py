"""Signals that ask a run to stop."""

import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
# Signals within so many seconds are one wish: `timeout` sends each of them twice, and Ctrl-C reaches the runs of a
# comparison from the terminal and from the comparison.
ONE_WISH = 0.5


def kept_out(number):
    """Whether the signal is a hangup that nohup wants ignored."""
    return number == getattr(signal, "SIGHUP", 0) and signal.getsignal(number) == signal.SIG_IGN


class Stop:
    """A context in which Ctrl-C, SIGTERM or a terminal that hangs up ask the run to finish its step, save and leave; a
    second of these signals ends it at once. Before and behind the context, where nothing is left to save, so does the
    first.

    Python calls a handler when the running operation returns, and a step may be minutes of one operation. The answer,
    and the end that the second signal asks for, come from a thread instead. It reads the socket into which
    `signal.set_wakeup_fd` writes the number of every signal as it arrives.
    """

    def __init__(self, place):
        self.signal, self.speaker = 0, f"rank {place.rank}: " if place.world > 1 else ""
        # A group of its own on the CPU: asking costs the GPU no synchronisation.
        self.group = dist.new_group(backend="gloo") if place.world > 1 else None

    def __enter__(self):
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        threading.Thread(target=self.answer, args=(reader,), daemon=True).start()
        self.wakeup_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS if not kept_out(number)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None stands for one that Python did not set.
        signal.set_wakeup_fd(self.wakeup_before)
        self.writer.close()

    def note(self, number, frame):
        """Remember the signal. This is its handler."""
        self.signal = number

    def answer(self, reader):
        """Say in a thread of its own that a signal has come, and end the process at the next."""
        numbers = (byte[0] for byte in iter(lambda: reader.recv(1), b"") if byte[0] in SIGNALS)
        answer = threading.Timer(ONE_WISH, tqdm.write, [f"{self.speaker}stopping after this step; again to quit now"])
        answer.kwargs, answer.daemon = {"file": sys.stderr}, True
        with reader:
            if next(numbers, None):
                answer.start()
                began = time.monotonic()
            for number in numbers:
                if time.monotonic() > began + ONE_WISH:
                    os._exit(128 + number)
            answer.cancel()

    def asked(self):
        """The signal that any process got, or 0: all processes stop after the same step."""
        if self.group is None:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return int(flag)
