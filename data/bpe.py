"""Byte-pair encoding: learn a vocabulary of frequent byte strings from text.

A model reads integers, so text must be cut into numbered pieces, the tokens. Single bytes make long sequences; whole
words can never all be listed. Byte-pair encoding (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with
Subword Units") lies in between: start from the 256 bytes, find the most frequent pair of neighbouring tokens, merge it
into one new token everywhere, and repeat until the vocabulary is full. Starting from bytes instead of characters, as
GPT-2 does, means that every possible text can be encoded and that no "unknown" token is needed.

    python -m data.bpe --vocab_size=4096 --out=my.tiktoken my_texts/ more.txt

This file only learns the merges. Encoding text with them is left to tiktoken, whose file format is used here.
"""

import base64
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import regex
import tiktoken
from tqdm import tqdm

from core.errors import UserError, run
from core.files import atomic
from core.flags import flags, make
from data.python import stdlib_files
from data.text import find, read
from data.vocabulary import encode_in_pieces

# Text is first cut into chunks, and no token ever reaches across a chunk's border. Otherwise the vocabulary would fill
# up with accidents such as "dog." and "dog,". The first alternative that matches wins, and every character matches one.
PATTERN = (
    r"[ \p{P}\p{S}]?[\p{L}\p{M}]+"  # letters with the one space or sign before them: " the", ".join", "_name"
    r"|\p{N}{1,3}"  # at most three digits, so that there is no token for every year or long number
    r"| ?[^\s\p{L}\p{M}\p{N}]+"  # all other visible signs, with the space before them: " !=", "):", emoji
    r"|\s*[\r\n][^\S\r\n]*"  # line breaks with the indentation after them: a line of code starts with one token
    r"|\s+"  # spaces and tabs inside a line, all together
)


def train(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Learn `vocab_size - 1` tokens; the last id is left free for the end-of-text token. Returns token -> rank.

    Ranks 0-255 are the single bytes, then come the merges in the order learned. Of equally frequent pairs, the one
    whose (left, right) byte strings sort first is merged, so neither hash seeds nor the order of texts matter.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the end-of-text token make 257")
    # The same chunks occur again and again: count them once, then work on the distinct ones only.
    split = regex.compile(pattern)
    chunks = Counter(chunk[0] for text in texts for chunk in split.finditer(text))
    words = [[bytes([byte]) for byte in chunk.encode("utf-8")] for chunk in chunks]  # every word as a list of tokens
    frequencies = list(chunks.values())

    pair_counts = Counter()  # how often two tokens are neighbours in the whole text
    words_with = defaultdict(set)  # pair -> indices of the words it occurs in
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += frequencies[index]
            words_with[pair].add(index)

    # heapq pops the smallest entry, hence the minus sign: most frequent pair first, then the smaller byte strings.
    # Finding and changing an old entry would be slow. We push a new one instead and skip outdated ones when popped.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for rank in tqdm(range(256, vocab_size - 1), desc="merges", disable=None):
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:  # every word has become a single token: nothing is left to merge
            break
        _, best = heapq.heappop(heap)
        # These bytes are no token yet: wherever they stood free of their neighbours, they were merged in the same way.
        ranks[best[0] + best[1]] = rank
        # Only words that hold the pair change: take away their old pairs and add their new ones.
        changes = Counter()
        for index in words_with.pop(best):
            frequency = frequencies[index]
            for pair in pairwise(words[index]):
                changes[pair] -= frequency
            words[index] = merge(words[index], best)
            for pair in pairwise(words[index]):
                changes[pair] += frequency
                words_with[pair].add(index)
        for pair, change in changes.items():
            pair_counts[pair] += change
            if change and pair_counts[pair]:
                heapq.heappush(heap, (-pair_counts[pair], pair))
    return ranks


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Replace every occurrence of `pair` by one token, from left to right: merging (a, a) in a a a gives aa a."""
    merged = []
    position = 0
    while position < len(word):
        if word[position] == pair[0] and word[position + 1 : position + 2] == [pair[1]]:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def save(ranks: dict[bytes, int], path: str | Path) -> None:
    """Write tiktoken's text format: on every line the token's bytes in base64, a space, and its rank."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    with atomic(path, "wb") as file:
        file.write(b"".join(lines))


def load(path: str | Path) -> dict[bytes, int]:
    """Read what `save` wrote. A damaged file is a ValueError that names the line, not wrong tokens later on."""
    ranks = {}
    for rank, line in enumerate(Path(path).read_bytes().splitlines()):
        where = f"{path}, line {rank + 1}"
        fields = line.split()
        if len(fields) != 2:
            raise ValueError(f"{where}: expected a token in base64, a space and its rank")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except ValueError as error:
            raise ValueError(f"{where}: the token is not valid base64 ({error})") from None
        if fields[1] != b"%d" % rank:
            raise ValueError(f"{where}: expected rank {rank}, found {fields[1].decode('ascii', 'backslashreplace')}")
        if token in ranks:
            raise ValueError(f"{where}: the token {token!r} already has rank {ranks[token]}")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: {len(missing)} of the 256 single bytes are missing")
    return ranks


@dataclass
class Options:
    """The options of `python -m data.bpe`."""

    usage: ClassVar[str] = "python -m data.bpe --out=FILE [FILE_OR_FOLDER ...] [--key=value ...]"

    out: str = ""  # the vocabulary file to write; texts to learn from default to Python's standard library
    vocab_size: int = 4096  # tokens, with the end of text
    force: bool = False  # replace an existing --out file


def texts_of(sources: list[str], options: Options) -> list[str]:
    """The texts to learn from. Looks for every mistake first: now is better than after the work is done."""
    if not options.out:
        raise UserError(f"--out=FILE is missing; usage: {Options.usage}")
    out = Path(options.out)
    if options.vocab_size < 257:
        raise UserError(f"--vocab_size={options.vocab_size} is too small: 256 bytes and the end-of-text token make 257")
    if options.vocab_size > 10**8:
        raise UserError(f"--vocab_size={options.vocab_size} is more than any text has words; take 4096, say")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out={out}: Is a directory")
    if out.exists() and not options.force:
        raise UserError(f"--out={out} exists already; --force replaces it")
    files = find(sources)[0] if sources else stdlib_files()
    texts = [read(path) for path in tqdm(files, desc="reading", disable=None)]
    if not any(texts):
        raise UserError(f"there is no text to learn from: no files in {', '.join(sources)}, or empty ones")
    return texts


def main(argv: list[str]) -> None:
    sources, settings = flags(argv, Options)
    options = make(Options, settings)
    texts = texts_of(sources, options)
    start = time.perf_counter()
    ranks = train(texts, options.vocab_size)
    seconds = time.perf_counter() - start
    save(ranks, options.out)

    tokenizer = tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    num_tokens = sum(len(ids) for text in texts for ids in encode_in_pieces(tokenizer, text))
    print(f"{options.out}: {len(ranks) + 1:,} tokens with the end of text, learned in {seconds:.1f} seconds")
    print(f"{num_bytes / num_tokens:.2f} bytes per token on {num_bytes:,} bytes of text")


if __name__ == "__main__":
    run(main)
