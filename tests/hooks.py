"""An encoding's hooks and attention, called with plain tensors in place of Pairs."""

from core import attention
from core.encoding import ALL, Pairs


def pairs(q, k, v, i, j, seen=None, state=None, length=0, asked=None, sight=ALL):
    """The queries are the last T of the keys' tokens."""
    state = state or {}
    own = {name: x[:, :, -len(i) :] for name, x in state.items()} | (asked or {})
    return Pairs(q, k, v, i, j, seen, state, own, length, sight=sight)


def rotate(encoding, q, k, i, j, length, **state):
    return encoding.rotate(pairs(q, k, k, i, j, state=state, length=length))


def logits(encoding, q, k, i, j, seen, asked=None, **state):
    return encoding.logits(pairs(q, k, k, i, j, seen, state, asked=asked))


def attend(encoding, q, k, v, i, j, seen=None, state=None, dropout=0.0, sight=ALL):
    return attention.attend(encoding, [pairs(q, k, v, i, j, seen, state, sight=sight)], dropout)
