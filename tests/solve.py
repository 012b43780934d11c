"""The tasks, solved by plain programs that share no code with data/tasks.py.

Each takes the text of an example, checks its form, and returns {place in the text: what is asked for there}. What is
asked for behind the last character stands at the text's length, and "END" is the end-of-text token.
"""

import re


def behind(given, said):
    """All of `said`, which stands behind `given`, and the end."""
    return dict(enumerate([*said, "END"], start=len(given)))


def copy(text):
    given, _, said = text.partition("=")
    assert re.fullmatch("[a-z]+", given) and said == given
    return behind(given + "=", given)


def reverse(text):
    given, _, said = text.partition("=")
    assert re.fullmatch("[a-z]+", given) and [*said] == [*reversed(given)]
    return behind(given + "=", said)


def recall(text):
    assert re.fullmatch("([a-z]{2}[0-9])+", text) and len(text) % 6 == 0
    half = len(text) // 2
    pairs = [(text[i : i + 2], text[i + 2]) for i in range(0, len(text), 3)]
    first, second = pairs[: half // 3], pairs[half // 3 :]
    assert len(dict(first)) == len(first) and sorted(first) == sorted(second)
    return {place: dict(first)[text[place - 2 : place]] for place in range(half + 2, len(text), 3)}


def addition(text):
    a, b, total = re.fullmatch(r"(\d+)\+(\d+)=(\d+)", text).groups()
    assert int(a[::-1]) + int(b[::-1]) == int(total[::-1]) and len(a) == len(b) == len(total) - 1
    return behind(f"{a}+{b}=", total)


def passkey(text):
    form = r"((?:[A-Z][a-z ]+\. )*)The pass key is (\d{4})\. ((?:[A-Z][a-z ]+\. )*)The pass key is (\d{4})"
    before, key, after, again = re.fullmatch(form, text).groups()
    assert key == again and "key" not in before + after
    return behind(text[:-4], key)


def needles(text, queries, values):
    assert re.fullmatch(r"([a-z]{2}\d{4} )+(\?[a-z]{2}(\d{4})+)+", text)
    hidden, *questions = text.split("?")
    asked, place = {}, len(hidden)
    assert len(questions) == len({question[:2] for question in questions}) == queries
    for question in questions:
        place += 3  # the question mark and the key
        found = []
        for needle in hidden.split(" "):
            if needle[:2] == question[:2]:
                found.append(needle[2:])
        assert len(found) == values and question[2:] == "".join(found)
        for digit in "".join(found):
            asked[place] = digit
            place += 1
    return asked


def multikey(text):
    return needles(text, 1, 1)


def multivalue(text):
    return needles(text, 1, 4)


def multiquery(text):
    return needles(text, 4, 1)


def variables(text):
    assert re.fullmatch(r"([a-z]{2}=([a-z]{2}|\d\d) )+\?\d\d([a-z]{2}){5}", text)
    program, _, question = text.partition("?")
    memory = {}
    for line in program.split():
        name, what = line.split("=")
        memory[name] = what if what.isdigit() else memory[what]  # Nothing is read before it was set.
    holders = [name for name in memory if memory[name] == question[:2]]
    assert question[2:] == "".join(holders) and len(holders) == 5
    return behind(f"{program}?{question[:2]}", "".join(holders))


def indexing(text):
    word, *questions = text.split(",")
    asked, place = {}, len(word)
    assert word.isalpha() and len(questions) == 4
    for question in questions:
        source, sign, steps, target = re.fullmatch(r"([a-zA-Z])([+-])([1-9])([a-zA-Z])", question).groups()
        assert word.count(source) == 1
        before, after = word.split(source)
        there = after[int(steps) - 1] if sign == "+" else before[-int(steps)]
        assert target == there
        asked[place + 4] = there
        place += len(question) + 1
    return asked


def flipflop(text):
    assert re.fullmatch("w[01]([wri][01])*r[01]", text)
    asked, bit = {}, ""
    for place in range(0, len(text), 2):
        if text[place] == "w":
            bit = text[place + 1]
        if text[place] == "r":
            assert text[place + 1] == bit
            asked[place + 1] = bit
    return asked


def sort(text):
    given, _, said = text.partition("=")
    ordered = ""
    for digit in "0123456789":
        ordered += digit * given.count(digit)
    assert given.isdigit() and said == ordered
    return behind(given + "=", ordered)


def parity(text):
    asked, odd = {}, False
    for place, bit in enumerate(text, start=1):
        assert bit in "01"
        odd = odd != (bit == "1")
        asked[place] = "1" if odd else "0"
    return asked


def s5(text):
    swaps = {"a": (0, 1), "b": (0, 2), "c": (0, 3), "d": (0, 4), "e": (1, 2)}
    swaps |= {"f": (1, 3), "g": (1, 4), "h": (2, 3), "i": (2, 4), "j": (3, 4)}
    table, asked = ["ball", "", "", "", ""], {}
    for place, letter in enumerate(text, start=1):
        i, j = swaps[letter]
        table[i], table[j] = table[j], table[i]
        asked[place] = str(table.index("ball") + 1)
    return asked


def dyck(text):
    closing, asked = {"(": ")", "[": "]", "{": "}"}, {}
    for place in range(1, len(text) + 1):
        left = text[:place]
        while left != (less := re.sub(r"\(\)|\[\]|\{\}", "", left)):
            left = less
        assert set(left) <= set(closing) and len(left) <= 4
        if left:
            asked[place] = closing[left[-1]]
    return asked


SOLVE = {
    solver.__name__: solver
    for solver in (
        copy, reverse, recall, addition, passkey, multikey, multivalue, multiquery, variables, indexing, flipflop, sort,
        parity, s5, dyck,
    )
}  # fmt: skip
