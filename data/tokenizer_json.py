"""tokenizer.json, as published models have it: read as a tokenizer of ours, and written from one."""

import json
import re
from itertools import pairwise

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from core.errors import UserError
from data import vocabulary


def byte_characters():
    """The character that stands for each of the 256 bytes in GPT-2's vocabulary files: itself where it can be seen,
    else the next one from 256 on (Radford et al. 2019, encoder.py)."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


class Tokenizer:
    """A tokenizer.json, asked as a tiktoken.Encoding is. `begin`: the ids that a text starts with."""

    def __init__(self, path, ends):
        """path: the file. ends: config.json's eos_token_id, an id or several. UserError for what is not whole."""
        if not path.exists():
            raise UserError(
                f"{path.parent} has no {path.name}; save one there with transformers: tokenizer.save_pretrained"
            )
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            raise UserError(f"{path} is damaged ({error}); download it again") from None
        self.inner.encode_special_tokens = True  # text that looks like a special token is text
        self.inner.no_truncation()
        self.inner.no_padding()
        some = self.inner.encode("a")  # and what is put around it
        self.begin = some.ids[: [*some.special_tokens_mask, 0].index(0)]
        decoder = json.dumps(json.loads(self.inner.to_str())["decoder"])
        if "ByteLevel" not in decoder and "Metaspace" not in decoder and "ByteFallback" not in decoder:
            raise UserError(f"{path}: its decoder is not supported; those of bytes and of sentencepiece are")
        added = self.inner.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path} has no tokens; download it again")
        self.n_vocab = max(vocabulary.values()) + 1
        self.bytes = [b""] * self.n_vocab
        of_character = {character: byte for byte, character in enumerate(byte_characters())}
        for text, id in vocabulary.items():
            if id in added:
                self.bytes[id] = text.encode()
            elif "ByteLevel" in decoder and of_character.keys() >= set(text):
                self.bytes[id] = bytes(of_character[character] for character in text)
            elif re.fullmatch("<0x[0-9A-F]{2}>", text):
                self.bytes[id] = bytes([int(text[3:5], 16)])
            else:
                self.bytes[id] = text.replace("\u2581", " ").encode()
        self.eot_token = ends[0] if isinstance(ends, list) and ends else ends
        if self.eot_token not in range(self.n_vocab):
            raise UserError(f"{path}: config.json's eos_token_id={ends} is no id in it; set it there")

    @property
    def special_tokens_set(self):
        return set(self.special)

    def encode_ordinary(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_single_token(self, text):
        return self.inner.token_to_id(text)

    def decode_single_token_bytes(self, token):
        return self.bytes[token]

    def decode_bytes(self, tokens):
        return b"".join(self.bytes[token] for token in tokens)


def merges(ranks):
    """{bytes: id} in the order learned -> the pairs that make the tokens: the two parts that earlier merges make of a
    token. Where they leave more, it is met as a whole word alone."""
    found = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranked = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, i = min(ranked)
            if lowest >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append(tuple(parts))
    return found


def dialect(pattern):
    """tiktoken's regular expression in Oniguruma's syntax, where $ ends lines too and {1,3}+ is a repetition."""
    return pattern.replace("}+", "}").replace("$", r"\z")


def inner(encoding):
    """A tokenizer's tokenizers.Tokenizer, with the same ids."""
    if hasattr(encoding, "inner"):  # `Tokenizer`, which has it from such a folder
        return encoding.inner
    special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    ranks = {text: id for id, text in enumerate(vocabulary.token_bytes(encoding)) if text}
    character = byte_characters()
    write = lambda text: "".join(character[byte] for byte in text)  # noqa: E731
    pairs = [tuple(map(write, pair)) for pair in merges(ranks)]
    made = tokenizers.Tokenizer(
        models.BPE({write(text): id for text, id in ranks.items()} | special, pairs, ignore_merges=bool(pairs))
    )
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [pre_tokenizers.Split(tokenizers.Regex(dialect(encoding._pat_str)), "isolated")] if pairs else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    return made
