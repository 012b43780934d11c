"""Synthetic tasks as data sets: endless fresh examples whose answers are known, so that being right can be counted.

An example is a list of strings, by turns question and answer: ["abc=", "abc"]. The end-of-text token belongs to the
last of them. Each example is one row from position 0, padded with end-of-text; the tokens of answers are targets, and
all other targets are -1, which the loss leaves out.

Every function below takes a length and a numpy Generator, and returns an example of that many characters or as few
less as its form allows; below its shortest form it returns that.
"""

import hashlib
import string

import numpy as np

from core.errors import UserError
from data import vocabulary

VERSION = 1  # of the examples; raise it when they change


def letters(rng, count):
    """So many random lower-case letters."""
    return "".join(string.ascii_lowercase[i] for i in rng.integers(26, size=count))


def digits(rng, count):
    """So many random decimal digits."""
    return "".join(string.digits[i] for i in rng.integers(10, size=count))


def copy(length, rng):
    """abcd=abcd"""
    word = letters(rng, max(1, (length - 1) // 2))
    return [f"{word}=", word]


def reverse(length, rng):
    """abcd=dcba"""
    word = letters(rng, max(1, (length - 1) // 2))
    return [f"{word}=", word[::-1]]


def recall(length, rng):
    """ab1cd2ef1cd2ef1ab1: distinct keys with a digit each, then the same keys in another order: which digit was theirs?

    Multi-query associative recall (Arora et al. 2023, "Zoology"). The keys of the second half are questions, since
    nobody could know them, and so is the end.
    """
    count = min(26**2, max(1, length // 6))
    keys = [string.ascii_lowercase[i // 26] + string.ascii_lowercase[i % 26] for i in rng.permutation(26**2)[:count]]
    values = digits(rng, count)
    parts = ["".join(key + value for key, value in zip(keys, values, strict=True))]
    for i in rng.permutation(count):
        parts[-1] += keys[i]
        parts += [values[i], ""]
    return parts


def addition(length, rng):
    """21+93=511: 12 + 39 = 051, all written from the least significant digit on.

    The carry then runs in the order of reading: a digit of the sum needs the two digits at its place and one carry,
    where the usual order would need all of the sum before its first digit (Lee et al. 2023, "Teaching arithmetic to
    small transformers"). Numbers have as many digits as fit, the sum one more, zeros included.
    """
    count = max(1, (length - 3) // 3)
    a, b = digits(rng, count), digits(rng, count)
    total, carry = "", 0
    for x, y in zip(a, b, strict=True):
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        total += str(digit)
    return [f"{a}+{b}=", f"{total}{carry}"]


WHO = ["The cook", "A sailor", "My uncle", "The crow", "One child", "Her horse", "The king", "A clerk"]
DOES = ["sees", "likes", "paints", "finds", "sells", "hides", "draws", "counts"]
WHAT = ["the hills", "a red hat", "old maps", "the rain", "two apples", "the sea", "a lamp", "his boots"]


def passkey(length, rng, depth=None):
    """A king hides a lamp. The pass key is 4821. A crow likes the rain. The pass key is 4821

    The key stands behind the share `depth` of the other sentences, 0 ... 1, by default anywhere (Mohtashami & Jaggi
    2023, "Landmark attention").
    """
    key, question = digits(rng, 4), "The pass key is "
    room, filler = length - 2 * len(question + key) - 2, []
    depth = rng.random() if depth is None else depth
    for i, j, k in rng.integers(8, size=(max(0, room) // 16, 3)):
        sentence = f"{WHO[i]} {DOES[j]} {WHAT[k]}. "
        room -= len(sentence)
        if room < 0:
            break
        filler.append(sentence)
    filler.insert(round(depth * len(filler)), f"{question}{key}. ")
    return ["".join(filler) + question, key]


TASKS = {"copy": copy, "reverse": reverse, "recall": recall, "addition": addition, "passkey": passkey}


class Task:
    """A task with the methods of data.Dataset. UserError for settings that it cannot be trained with."""

    masks, size, text = True, "endless", None
    folder = "data/tasks.py"  # where the examples come from, for messages

    def __init__(self, config, tokenizer):
        self.name, self.example = config.dataset, TASKS[config.dataset]
        self.shortest = len("".join(self.example(0, np.random.default_rng(0))))
        self.tasks = {self.name: self}
        self.end = tokenizer.eot_token
        least = min(length for _, length in config.phases)
        for wrong, message in (
            (config.tokenizer != "bytes", "is spelt in characters; take --tokenizer=bytes"),
            (config.eval_tokens > 10**8, "makes the examples it is measured on; take --eval_tokens=32768"),
            (config.segments > 1, "has no text behind its examples; take --segments=1"),
            (least < self.shortest, f"needs {self.shortest} characters, not {least}; take a longer --train_length"),
        ):
            if wrong:
                raise UserError(f"dataset={self.name} {message}")
        self.meta = {
            "tokenizer_fingerprint": vocabulary.fingerprint(tokenizer),
            "data_checksum": hashlib.sha256(repr((self.name, VERSION)).encode()).hexdigest(),
        }

    def batch(self, length, count, key, step, part=slice(None)):
        """Inputs and targets (rows, length), int64, of the `part` of the `count` rows that make up step `step`: a pure
        function of its arguments, as data.batch is. Rows differ in the lengths of their examples."""
        return self.rows(length, [("train", *key, row) for row in range(step * count, (step + 1) * count)[part]])

    def validation(self, length, count):
        """Inputs and targets (count, length): a fixed set, like the rows of training and none of them."""
        return self.rows(length, [("validation", length, row) for row in range(count)])

    def examples(self, length, count, **more):
        """Inputs and targets (count, length): a fixed set whose examples fill the rows. more: for the task."""
        return self.rows(length, [("examples", length, row) for row in range(count)], length, **more)

    def prompt(self, length):
        """The first question of a small example, and how many tokens answer it."""
        question, answer, *_ = self.example(min(length, 2 * self.shortest), np.random.default_rng(0))
        return question, len(answer) + 1

    def rows(self, length, keys, least=None, **more):
        """Inputs and targets (len(keys), length), int64: for each key an example of `least` ... length characters, by
        default of any length. Keys are hashed, since default_rng([1]) and default_rng([1, 0]) are the same."""
        ids = np.full((len(keys), length + 1), self.end)
        answers = np.zeros(ids.shape, bool)  # which ids belong to answers
        for row, key in enumerate(keys):
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))
            parts = self.example(int(rng.integers(least or self.shortest, length + 1)), rng, **more)
            text, sizes = "".join(parts).encode(), [len(part) for part in parts]
            sizes[-1] += 1  # the end
            ids[row, : len(text)] = list(text)
            answers[row, : sum(sizes)] = np.repeat(np.arange(len(parts)) % 2 == 1, sizes)
        return ids[:, :-1], np.where(answers, ids, -1)[:, 1:]
