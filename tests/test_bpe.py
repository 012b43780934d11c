"""The byte-pair trainer against a naive one, the file format, and the vocabulary that comes with the repository."""

import base64
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken

from data import bpe

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data" / "python4096.tiktoken"
CODE = Path(bpe.__file__).read_text(encoding="utf-8")
TEXTS = {
    "empty": "",
    "prose": "She sells sea shells by the sea shore; the shells she sells are sea shells, I'm sure. " * 3,
    "code": CODE[:4000],
    "overlaps": "a aa aaa aaaa aaaaa aaaaaa aaaaaaa baaa baaaa aaab abab ababa bababab",
    "unicode": "naïve café – 日本語のテキスト、日本語。 Привет мир! 👩‍👩‍👧 ❤️ 🇨🇭 e\u0301 न‍मस्ते",
    "white space": "if x:\r\n\tpass\r\n\r\n  \t \n\n    y = 1\r  # \u00a0\u2003end \x1c\x85 ",
    "numbers": "1 12 123 1234 1234567890 3.14159 0xdeadbeef १२३४ ½",
}


def naive_merge(word, pair):
    """Merge from left to right, in a way that has nothing in common with the trainer's."""
    for i in range(len(word) - 1):
        if tuple(word[i : i + 2]) == pair:
            return [*word[:i], pair[0] + pair[1], *naive_merge(word[i + 2 :], pair)]
    return word


def naive_train(texts, vocab_size):
    """Byte-pair encoding by its definition: count all pairs of the whole text anew before every merge."""
    words = [[bytes([b]) for b in chunk.encode()] for text in texts for chunk in regex.findall(bpe.PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [naive_merge(word, best) for word in words]
        ranks[best[0] + best[1]] = len(ranks)
    return ranks, [ranks[token] for word in words for token in word]


def naive_encode(text, ranks):
    """Textbook encoding: in every chunk, merge the pair of lowest rank (the leftmost of equals) until none is left."""
    ids = []
    for chunk in regex.findall(bpe.PATTERN, text):
        word = [bytes([b]) for b in chunk.encode()]
        while len(word) > 1:
            rank, i = min((ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(word)))
            if rank == len(ranks):
                break
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += [ranks[token] for token in word]
    return ids


def tokenizer_of(ranks):
    return tiktoken.Encoding(
        "test", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


@pytest.fixture(scope="module")
def shipped():
    return bpe.load(SHIPPED)


@pytest.mark.parametrize("name", TEXTS)
def test_equals_naive_trainer(name):
    ranks = bpe.train([TEXTS[name]], vocab_size=350)
    expected, tokens = naive_train([TEXTS[name]], vocab_size=350)
    assert list(ranks.items()) == list(expected.items())
    # What the merges made of the training text is what tiktoken makes of it.
    assert tokenizer_of(ranks).encode_ordinary(TEXTS[name]) == tokens


def test_equals_naive_trainer_on_random_words():
    """Two letters give many ties and overlaps, the places where fast trainers go wrong."""
    rng = random.Random(0)
    for _ in range(30):
        text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(40))
        ranks = bpe.train([text], vocab_size=330)
        expected, tokens = naive_train([text], vocab_size=330)
        assert list(ranks.items()) == list(expected.items())
        assert tokenizer_of(ranks).encode_ordinary(text) == naive_encode(text, ranks) == tokens


def test_first_merges_by_hand():
    """The words "low" twice and "lot" once: l-o occurs 3 times, then lo-w 2 times, then the single lo-t."""
    learned = list(bpe.train(["low\nlow\nlot"], vocab_size=1000, pattern=r"\w+"))[256:]
    assert learned == [b"lo", b"low", b"lot"]  # and no fourth token: the text ran out of pairs


def test_ties_go_to_the_smaller_bytes():
    assert list(bpe.train(["zz", "yy", "xx"], vocab_size=1000))[256:] == [b"xx", b"yy", b"zz"]


def test_vocab_size_counts_end_of_text():
    single_bytes = bpe.train([CODE], vocab_size=257)
    assert list(single_bytes.items()) == [(bytes([b]), b) for b in range(256)]
    assert len(bpe.train([CODE], vocab_size=300)) == 299
    with pytest.raises(ValueError, match="256 is too small"):
        bpe.train([CODE], vocab_size=256)


def test_order_of_texts_does_not_matter():
    lines = CODE.splitlines(keepends=True)
    ranks = bpe.train(lines, vocab_size=600)
    random.Random(0).shuffle(lines)
    assert list(bpe.train(iter(lines), vocab_size=600).items()) == list(ranks.items())


def test_hash_seed_does_not_matter(tmp_path):
    files = []
    for seed in ["0", "1"]:
        out = tmp_path / seed
        assert command(bpe.__file__, "--vocab_size=600", f"--out={out}", seed=seed).returncode == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", TEXTS)
def test_shipped_vocabulary_encodes_like_the_textbook(name, shipped):
    tokenizer = tokenizer_of(shipped)
    ids = tokenizer.encode_ordinary(TEXTS[name])
    assert tokenizer.decode(ids) == TEXTS[name]
    assert ids == naive_encode(TEXTS[name], shipped)


def test_pattern_covers_every_character(shipped):
    """tiktoken silently drops what the pattern does not match, so nothing may be left out."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    tokenizer = tokenizer_of(shipped)
    assert tokenizer.decode(tokenizer.encode_ordinary(everything)) == everything


def test_pattern_on_code_and_prose():
    chunks = regex.findall(bpe.PATTERN, "def f_one(x):\n\n    return x  != 12345 # it's\tnice 👍")
    assert chunks == [
        *["def", " f", "_one", "(x", "):", "\n\n    ", "return", " x", "  ", "!="],
        *[" ", "123", "45", " #", " it", "'s", "\t", "nice", " 👍"],
    ]


def test_shipped_vocabulary(shipped):
    assert len(shipped) == 4095
    assert all(shipped[bytes([b])] == b for b in range(256))
    tokenizer = tokenizer_of(shipped)
    assert tokenizer.n_vocab == 4096 and tokenizer.eot_token == 4095
    this_file = Path(__file__).read_text(encoding="utf-8")
    assert len(tokenizer.encode_ordinary(this_file)) < 0.4 * len(this_file.encode())


def test_save_and_load(tmp_path, shipped):
    path = tmp_path / "copy.tiktoken"
    bpe.save(shipped, path)
    assert path.read_bytes() == SHIPPED.read_bytes()
    assert bpe.load(str(path)) == shipped
    path.write_bytes(SHIPPED.read_bytes().replace(b"\n", b"\r\n"))  # as some editors leave it
    assert bpe.load(path) == shipped


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "expected a token"),
        (b"YWI=", "expected a token"),
        (b"YWI= 256 7", "expected a token"),
        (b"YW 256", "not valid base64"),
        (b"Y*I= 256", "not valid base64"),
        (b"\xff\xfe 256", "not valid base64"),
        (b"YWI= 257", "expected rank 256, found 257"),
        (b"YWI= 2_56", "expected rank 256"),
        (b"YWI= \xff", "expected rank 256"),
        (b"YQ== 256", "already has rank 97"),
    ],
)
def test_malformed_line(tmp_path, line, message):
    path = tmp_path / "bad.tiktoken"
    bpe.save({bytes([b]): b for b in range(256)}, path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        bpe.load(path)
    assert str(error.value).startswith(f"{path}, line 257: ") and "\n" not in str(error.value)


def test_incomplete_file(tmp_path):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(base64.b64encode(b"\0") + b" 0\n")
    with pytest.raises(ValueError, match="255 of the 256 single bytes are missing"):
        bpe.load(path)


def command(*args, seed="random"):
    return subprocess.run(
        [sys.executable, "-m", "data.bpe", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_command(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a.txt").write_text(CODE, encoding="utf-8")  # a folder means all files in it
    (tmp_path / "b.txt").write_text("more\r\n" * 99, encoding="utf-8", newline="")
    out = tmp_path / "out.tiktoken"
    result = command(tmp_path / "folder", "--vocab_size", 300, tmp_path / "b.txt", f"--out={out}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "300 tokens" in result.stdout and "seconds" in result.stdout and "bytes per token" in result.stdout
    assert bpe.load(out) == bpe.train([CODE, "more\r\n" * 99], vocab_size=300)


def test_help_has_a_line_for_every_option(capsys):
    with pytest.raises(SystemExit) as exit_status:
        bpe.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit_status.value.code == 0
    assert [line.split("=")[0].strip() for line in lines[2:]] == ["--out", "--vocab_size", "--force"]
    assert all(len(line.split(maxsplit=1)[1]) > 9 for line in lines[2:])


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    good, latin1, empty, folder = (tmp_path / name for name in ["good.py", "latin1.py", "empty.py", "folder"])
    good.write_text("x = 1\n", encoding="utf-8")
    latin1.write_bytes(b"# caf\xe9\n")
    empty.touch()
    folder.mkdir()
    out = f"--out={tmp_path / 'out'}"
    mistakes = {
        "--out=FILE is missing": [good],
        "expected int": [good, out, "--vocab_size=many"],
        "did you mean 'vocab_size'": [good, out, "--vocab=300"],
        "too small": [good, out, "--vocab_size=256"],
        "No such file": [tmp_path / "missing.py", out],
        "not UTF-8": [latin1, out],
        "no text": [empty, out],
        "no files in": [folder, out],
        "exists already": [good, f"--out={good}"],
        "no folder": [good, f"--out={tmp_path / 'missing' / 'out'}"],
        "Is a directory": [good, f"--out={folder}", "--force"],
    }
    for expected, args in mistakes.items():
        monkeypatch.setattr(sys, "argv", ["data.bpe", *map(str, args)])
        with pytest.raises(SystemExit) as exit_status:
            bpe.run(bpe.main)
        captured = capsys.readouterr()
        assert exit_status.value.code == 2 and captured.out == ""
        assert expected in captured.err and captured.err.count("\n") == 1, captured.err
    assert good.read_text(encoding="utf-8") == "x = 1\n" and not (tmp_path / "out").exists()

    result = command(tmp_path / "missing.py", out)  # once for real
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
