"""Synthetic tasks as data sets: endless fresh examples whose answers are known, so that being right can be counted.

An example is a list of strings, by turns question and answer: ["abc=", "abc"]. The end-of-text token belongs to the
last of them. Each example is one row from position 0, padded with end-of-text; the tokens of answers are targets, and
all other targets are -1, which the loss leaves out. The tasks of BESIDE ask for a state after every character, and
what they answer is never read: else the state would only have to be carried on from one answer to the next. Their
example is a text and a string of the same length, with a blank where nothing is asked.

Every function below takes a length and a numpy Generator, and returns an example of that many characters or as few
less as its form allows; below its shortest form it returns that. No alphabet bounds a length, but that of recall: only
what is asked for has to be unlike all else, and what stands between may repeat itself.
"""

import functools
import hashlib
import itertools
import string

import numpy as np

from core.errors import UserError
from data import vocabulary

VERSION = 1  # of the examples; raise it when they change
LETTERS, DIGITS, BITS = string.ascii_lowercase, string.digits, "01"
KEYS = np.array([a + b for a in LETTERS for b in LETTERS])  # (676,) of two letters each


def draw(alphabet, rng, count):
    """So many random characters of an alphabet."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


def copy(length, rng):
    """abcd=abcd"""
    word = draw(LETTERS, rng, max(1, (length - 1) // 2))
    return [f"{word}=", word]


def reverse(length, rng):
    """abcd=dcba"""
    word = draw(LETTERS, rng, max(1, (length - 1) // 2))
    return [f"{word}=", word[::-1]]


def recall(length, rng):
    """ab1cd2ef1cd2ef1ab1: distinct keys with a digit each, then the same keys in another order: which digit was theirs?

    Multi-query associative recall (Arora et al. 2023, "Zoology"). The keys of the second half are questions, since
    nobody could know them, and so is the end.
    """
    count = min(len(KEYS), max(1, length // 6))
    keys = [KEYS[i] for i in rng.permutation(len(KEYS))[:count]]
    values = draw(DIGITS, rng, count)
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
    a, b = draw(DIGITS, rng, count), draw(DIGITS, rng, count)
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
    key, question = draw(DIGITS, rng, 4), "The pass key is "
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


def needles(length, rng, queries=1, values=1):
    """ab4821 cd1930 ef7755 ?cd1930: keys with a number each, among them those that are asked for.

    RULER's needles in a haystack of other needles (Hsieh et al. 2024). Of several keys each is asked for when the one
    before has been answered; of several numbers of a key all are, in the order in which they stood.
    """
    room = length - queries * (len("?ab") + 4 * values)
    count = max(queries * values, room // len("ab4821 "))
    keys = rng.permutation(KEYS)
    asked, others = keys[:queries], keys[queries:]
    whose = rng.permutation([*np.repeat(asked, values), *rng.choice(others, count - queries * values)])
    hidden = [(key, f"{number:04}") for key, number in zip(whose, rng.integers(10**4, size=count), strict=True)]
    parts = ["".join(f"{key}{number} " for key, number in hidden)]
    for key in asked:
        parts[-1] += f"?{key}"
        parts += ["".join(number for other, number in hidden if other == key), ""]
    return parts


CHAIN = 5  # variables that hold one value


def variables(length, rng):
    """ab=42 gh=17 cd=ab xy=gh ... ?42abcd...: which five variables hold 42, in the order in which they were set?

    RULER's variable tracking (Hsieh et al. 2024), with other such chains between as the haystack. Whoever has named one
    variable finds the next where this one is assigned.
    """
    count = max(CHAIN, (length - len("?42") - CHAIN * 2) // len("ab=42 "))
    names, numbers = rng.permutation(KEYS), rng.permutation([f"{number:02}" for number in range(100)])
    asked, others = names[:CHAIN], rng.choice(names[CHAIN:], count - CHAIN)
    names, value = [*asked, *others], numbers[0]
    numbers = [value, *rng.choice(numbers[1:], count // CHAIN)]
    held = [names[i - 1] if i % CHAIN else numbers[i // CHAIN] for i in range(count)]
    # The places of the chains in turn, those of each in ascending order.
    places = np.argsort(rng.permutation(np.arange(count) // CHAIN), kind="stable")
    lines = [f"{name}={what} " for _, name, what in sorted(zip(places, names, held, strict=True))]
    return ["".join(lines) + f"?{value}", "".join(asked)]


def indexing(length, rng):
    """QEOHoUbzK,z-3o,E+5b: which letter stands three before the z, which five behind the E? Four questions, to 9 away.

    Indirect indexing (Gopalakrishnan et al. 2025, "Decoupling the what and where with polar coordinate positional
    embeddings"): a place is found by content, another from there by distance, and its content is the answer.
    """
    count, alphabet = max(4, length - 4 * len(",z-3o")), rng.permutation([*string.ascii_letters])
    sources, others = alphabet[:4], alphabet[4:]
    word = "".join(rng.permutation([*sources, *rng.choice(others, count - 4)]))
    parts = [word]
    for source in sources:
        place = word.index(source)
        near = range(max(0, place - 9), min(count, place + 10))
        target = int(rng.choice([there for there in near if there != place]))
        parts[-1] += f",{source}{target - place:+}"
        parts += [word[target], ""]
    return parts


def flipflop(length, rng):
    """w1i0i1r1w0r0: a bit is written, others are to be ignored, and r reads the one that was written last.

    Flip-flop language (Liu et al. 2023, "Exposing attention glitches"), of whose instructions .8 are to be ignored.
    """
    count = max(2, length // 2)
    between = "".join(rng.choice([*"iwr"], count - 2, p=[0.8, 0.1, 0.1]))
    parts, bit = [""], ""
    for step, new in zip(f"w{between}r", draw(BITS, rng, count), strict=True):
        bit = new if step == "w" else bit
        parts[-1] += step
        if step == "r":
            parts += [bit, ""]
        else:
            parts[-1] += new
    return parts


def sort(length, rng):
    """31415=11345

    Bucket sort (Delétang et al. 2023, "Neural networks and the Chomsky hierarchy"): long words need counting.
    """
    word = draw(DIGITS, rng, max(1, (length - 1) // 2))
    return [f"{word}=", "".join(sorted(word))]


def parity(length, rng):
    """0110, of which 0100 is asked: whether the ones so far are odd in number.

    Hahn 2020, "Theoretical limitations of self-attention". The parity of the whole word alone, as Delétang et al. 2023
    ask for it, is the last of these; all of them teach more, and need no other state.
    """
    word = draw(BITS, rng, max(1, length))
    return [word, "".join(map(str, np.cumsum([*map(int, word)]) % 2))]


SWAPS = dict(zip(LETTERS, itertools.combinations("12345", 2), strict=False))  # a ... j


def s5(length, rng):
    """aej, of which 233 is asked: under which of five cups is the ball after each swap, if it was under the first?

    A word problem of S5, the group of all orders of the cups (Merrill et al. 2024, "The illusion of state"): complete
    for NC1, so that no fixed number of layers is thought to solve it at all lengths. They ask for the whole order, of
    which one place is as hard. The letters are the ten swaps: a is 1 and 2, b is 1 and 3, ..., j is 4 and 5.
    """
    word, cup, cups = draw([*SWAPS], rng, max(1, length)), "1", ""
    for letter in word:
        one, other = SWAPS[letter]
        cup = {one: other, other: one}.get(cup, cup)
        cups += cup
    return [word, cups]


BRACKETS, DEPTH = {"(": ")", "[": "]", "{": "}"}, 4


def dyck(length, rng):
    """([]{, of which )])} is asked: which bracket closes the innermost that is open? Nothing where none is.

    The Dyck language of three brackets, at most four deep (Hewitt et al. 2020, "RNNs can generate bounded hierarchical
    languages"; Yao et al. 2021 for attention), a beginning of one of its words.
    """
    word, wanted, open_ones = "", "", []
    for opens, kind in zip(rng.random(max(1, length)) < 0.5, rng.integers(3, size=max(1, length)), strict=True):
        if not open_ones or (opens and len(open_ones) < DEPTH):
            word += [*BRACKETS][kind]
            open_ones.append(BRACKETS[word[-1]])
        else:
            word += open_ones.pop()
        wanted += open_ones[-1] if open_ones else " "
    return [word, wanted]


TASKS = {
    "copy": copy,
    "reverse": reverse,
    "recall": recall,
    "addition": addition,
    "passkey": passkey,
    "multikey": needles,
    "multivalue": functools.partial(needles, values=4),
    "multiquery": functools.partial(needles, queries=4),
    "variables": variables,
    "indexing": indexing,
    "flipflop": flipflop,
    "sort": sort,
    "parity": parity,
    "s5": s5,
    "dyck": dyck,
}
BESIDE = {"parity", "s5", "dyck"}  # what these ask for stands beside the text, not in it


class Task:
    """A task with the methods of data.Dataset. UserError for settings that it cannot be trained with."""

    masks, size, text = True, "endless", None
    folder = "data/tasks.py"  # where the examples come from, for messages

    def __init__(self, config, tokenizer):
        self.name, self.example = config.dataset, TASKS[config.dataset]
        self.tasks = {self.name: self}
        self.end = tokenizer.eot_token
        self.shortest = len(self.asked(self.example(0, np.random.default_rng(0)))[0])
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
        return question, 1 if self.name in BESIDE else len(answer) + 1

    def asked(self, parts):
        """An example -> its text, and for each character of it the token that is asked for behind it, or -1."""
        if self.name in BESIDE:
            text, states = parts
            return text, [-1 if state == " " else ord(state) for state in states]
        text, sizes = "".join(parts), [len(part) for part in parts]
        sizes[-1] += 1  # the end
        answers = np.repeat(np.arange(len(parts)) % 2 == 1, sizes)
        return text, np.where(answers, [*text.encode(), self.end], -1)[1:]

    def rows(self, length, keys, least=None, **more):
        """Inputs and targets (len(keys), length), int64: for each key an example of `least` ... length characters, by
        default of any length. Keys are hashed, since default_rng([1]) and default_rng([1, 0]) are the same."""
        inputs, targets = (np.full((len(keys), length), value) for value in (self.end, -1))
        for row, key in enumerate(keys):
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))
            text, wanted = self.asked(self.example(int(rng.integers(least or self.shortest, length + 1)), rng, **more))
            inputs[row, : len(text)] = list(text.encode())
            targets[row, : len(text)] = wanted
        return inputs, targets
