"""Tokenizers: bytes are the identity, fingerprints tell vocabularies apart, and what is missing says how to get it."""

import os
import random
import re
import string
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext import openai_public

from core.errors import UserError
from data import bpe, vocabulary

ROOT = Path(bpe.__file__).parent.parent
TEXTS = {
    "empty": "",
    "ascii": string.printable,
    "line ends": "a\r\nb\rc\n\n\x0b\x0c\x1c\x85\u2028",
    "marks": "e\u0301 👩‍👩‍👧 🇨🇭 न‍मस्ते\ufeff\ufffe\x00",
    "looks special": "<|endoftext|> <|fim_prefix|> <|endoftext|><|endoftext|>",
    "long": "naïve café – 日本語 " * 500,
}


def tokenizer_of(*tokens, special=None):
    """An Encoding of the 256 bytes and these tokens."""
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *tokens])}
    special = {"<|endoftext|>": len(ranks)} if special is None else special
    return tiktoken.Encoding("test", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens=special)


def mistake(name):
    with pytest.raises(UserError) as error:
        vocabulary.load(name)
    return str(error.value)


# bytes


def test_bytes_is_the_identity_on_utf8():
    tokenizer = vocabulary.load("bytes")
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    for text in (*TEXTS.values(), everything):
        ids = tokenizer.encode_ordinary(text)
        assert ids == list(text.encode()) and tokenizer.decode_bytes(ids) == text.encode()


def test_bytes_has_one_more_token_that_ends_a_text():
    tokenizer = vocabulary.load("bytes")
    assert tokenizer.n_vocab == 257
    assert tokenizer.encode_single_token("<|endoftext|>") == tokenizer.eot_token == 256


# All tokenizers.


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_encoding_loses_nothing_and_byte_lengths_say_how_much_it_is(name, text):
    tokenizer = vocabulary.load(name)
    ids = tokenizer.encode_ordinary(TEXTS[text])
    assert tokenizer.decode(ids) == TEXTS[text]
    lengths = vocabulary.byte_lengths(tokenizer)
    assert lengths.shape == (tokenizer.n_vocab,) and lengths.dtype == "int64"
    assert lengths[ids].sum() == len(TEXTS[text].encode())


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_end_of_text_is_one_id_that_no_text_gives_and_that_is_no_bytes_long(name):
    tokenizer = vocabulary.load(name)
    end = tokenizer.encode_single_token("<|endoftext|>")
    assert end == tokenizer.n_vocab - 1 and vocabulary.byte_lengths(tokenizer)[end] == 0
    assert end not in tokenizer.encode_ordinary(TEXTS["looks special"])


def test_ids_that_a_vocabulary_leaves_out_are_no_bytes_long():
    tokenizer = tokenizer_of(b"ab", special={"<|endoftext|>": 260, "<|other|>": 258})
    assert vocabulary.token_bytes(tokenizer) == [*(bytes([b]) for b in range(256)), b"ab", *[b""] * 4]
    assert vocabulary.byte_lengths(tokenizer).tolist() == [1] * 256 + [2, 0, 0, 0, 0]


def test_bpe_is_the_shipped_vocabulary():
    tokenizer = vocabulary.load("bpe")
    assert tokenizer.n_vocab == 4096
    assert len(tokenizer.encode_ordinary("    def __init__(self):\n        return self\n")) < 15
    again = vocabulary.load(str(ROOT / "data" / "python4096.tiktoken"))
    assert vocabulary.fingerprint(again) == vocabulary.fingerprint(tokenizer)


def test_a_file_is_a_tokenizer(tmp_path):
    path = tmp_path / "my.tiktoken"
    bpe.save({bytes([b]): b for b in range(256)} | {b"lo": 256, b"low": 257}, path)
    tokenizer = vocabulary.load(str(path))
    assert tokenizer.encode_ordinary("lowlot,low") == [257, 256, *b"t,", 257]
    assert tokenizer.encode_single_token("<|endoftext|>") == 258 == tokenizer.n_vocab - 1


# Pieces.


def patterns(monkeypatch):
    """Tokenizers by tiktoken's own regular expressions, over the shipped vocabulary."""
    ranks = bpe.load(vocabulary.SHIPPED["bpe"])
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: ranks)
    names = ("gpt2", "cl100k_base", "o200k_base")
    return [vocabulary.make(name, getattr(openai_public, name)()["pat_str"], ranks) for name in names]


def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch):
    signs = [
        *" \n\n\t\r\x0c\x1c\x85\u00a0\u3000.,!?'_-/(=\"019½²Ⅷ१azXÉß日カ한ʰ𝒳",
        "e\u0301",
        "n\u200d",
        "👩‍👩‍👧",
        "'LL",
        "\r\n",
    ]
    draw, letters = random.Random(0), "azXéЖ日ʰª𝒳"
    tokenizers = [vocabulary.load("bytes"), vocabulary.load("bpe"), *patterns(monkeypatch)]
    monkeypatch.setattr(vocabulary, "PIECE", 100)
    for _ in range(50):
        words = ["".join(draw.choices(signs, k=draw.randrange(20))) + draw.choice(letters) for _ in range(40)]
        text = "".join(word + draw.choice(" \n") for word in words)
        places = sorted(draw.sample(range(len(text)), 5))
        parts = [text[begin:end] for begin, end in pairwise([0, *places, None])]
        assert "".join(vocabulary.cut(text)) == text and [*vocabulary.cut(text)] == [*vocabulary.cut(parts)]
        assert max(map(len, vocabulary.cut(text))) <= 100
        for tokenizer in tokenizers:
            assert vocabulary.encode(tokenizer, text) == tokenizer.encode_ordinary(text), tokenizer.name


def test_a_million_spaces_pass_through_a_tokenizer(monkeypatch):
    """They end tiktoken's regular expression of o200k_base with a panic, which is no Exception."""
    text, tokenizer = " " * 1_000_000, patterns(monkeypatch)[-1]
    assert tokenizer.decode_bytes(vocabulary.encode(tokenizer, text)) == text.encode()


@pytest.mark.parametrize("sign", " a\n!1é")
def test_a_text_of_one_sign_is_cut_and_loses_nothing(monkeypatch, sign):
    monkeypatch.setattr(vocabulary, "PIECE", 100)
    for tokenizer in (vocabulary.load("bytes"), vocabulary.load("bpe"), *patterns(monkeypatch)):
        assert tokenizer.decode_bytes(vocabulary.encode(tokenizer, sign * 950)) == (sign * 950).encode()


# Fingerprints.


def test_fingerprints_differ_when_any_id_stands_for_other_bytes():
    tokenizers = [
        vocabulary.load("bytes"),
        vocabulary.load("bpe"),
        tokenizer_of(b"ab"),
        tokenizer_of(b"ac"),
        tokenizer_of(b"ab", b"ac"),
        tokenizer_of(b"ac", b"ab"),
        tokenizer_of(b"ab", b"cde"),  # the same bytes in a row as the next
        tokenizer_of(b"abc", b"de"),
        tokenizer_of(b"ab", special={"<|endoftext|>": 259}),
    ]
    assert len({vocabulary.fingerprint(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)


def test_fingerprint_is_of_the_vocabulary_not_of_the_name():
    other = tiktoken.Encoding(
        "other", pat_str=r"(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={"<|end|>": 256}
    )
    assert vocabulary.fingerprint(other) == vocabulary.fingerprint(vocabulary.load("bytes"))


def test_fingerprint_is_the_same_in_every_process():
    code = "from data import vocabulary; print(*[vocabulary.fingerprint(vocabulary.load(n)) for n in ('bytes', 'bpe')])"
    expected = [vocabulary.fingerprint(vocabulary.load(name)) for name in ("bytes", "bpe")]
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        assert out.stdout.decode().split() == expected


# Mistakes.


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("Hash mismatch"), OSError(13, "x")])
def test_a_vocabulary_that_cannot_be_had_names_one_that_can(monkeypatch, error):
    def get_encoding(_):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    said = mistake("gpt2")
    assert "gpt2" in said and str(error) in said and "--tokenizer=bpe" in said


def test_without_network_the_message_says_where_tiktoken_looks_for_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # as if none had been loaded before
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nothing listens there
    for key in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(key, raising=False)
    said = mistake("p50k_base")
    url = re.search(r"https://\S+/p50k_base\.tiktoken", said)[0]
    place = Path(re.search(rf"{re.escape(str(tmp_path))}/\w+", said)[0])
    place.write_bytes(b"placed by hand")
    assert tiktoken.load.read_file_cached(url) == b"placed by hand"


def test_our_own_tokenizers_need_no_network(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: pytest.fail("asked tiktoken for a download"))
    assert [vocabulary.load(name).n_vocab for name in ("bytes", "bpe")] == [257, 4096]


@pytest.mark.parametrize("name", ["gtp2", "byte", "", "my_vocabulary.txt", "bytes "])
def test_unknown_name_lists_the_known_ones(monkeypatch, name):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: pytest.fail("asked tiktoken for a download"))
    said = mistake(name)
    assert f"'{name}'" in said and all(known in said for known in ("bytes", "bpe", "gpt2", ".tiktoken"))


@pytest.mark.parametrize("content", [b"", b"not a vocabulary\n", b"\x00\xff\n", b"YQ== 0\n", b"YQ== 0\nYQ== 1\n"])
def test_a_malformed_file_is_named(tmp_path, content):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    assert str(path) in mistake(str(path))


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    assert str(tmp_path / "missing.tiktoken") in mistake(str(tmp_path / "missing.tiktoken"))
    (tmp_path / "folder.tiktoken").mkdir()
    assert str(tmp_path / "folder.tiktoken") in mistake(str(tmp_path / "folder.tiktoken"))
