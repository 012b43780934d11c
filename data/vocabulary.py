"""Text to tokens and back: every tokenizer is a tiktoken.Encoding, or answers as one, whatever its vocabulary.

bytes        the 256 bytes and an end-of-text token; the default
bpe          4,096 tokens learned by data/bpe.py from the source of the Python standard library; shipped
gpt2, ...    tiktoken's own, downloaded by tiktoken on first use
a file       FILE.tiktoken, as `python -m data.bpe` writes it
a file       tokenizer.json of a published model (tokenizer_json.py); hf:FOLDER is the one in that folder
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import regex
import tiktoken

from core.errors import UserError

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"  # a published model's; beside a checkpoint that names it so
BORDER = regex.compile(r"(?r)(?<=\p{L})[ \n]")  # the last one; see `cut`
PIECE = 1 << 16  # characters that a tokenizer is given at once
SHIPPED = {"bpe": Path(__file__).parent / "python4096.tiktoken"}


def load(name):
    """A tokenizer's name -> tiktoken.Encoding. UserError says what to type, or where to put a file."""
    if path := published(name):
        try:
            from data import tokenizer_json  # It needs the extra packages.
        except ImportError:
            raise UserError(f"tokenizer {name} takes more packages: pip install -r requirements-hf.txt") from None
        return tokenizer_json.load(path)
    if name == "bytes":
        return make(name, r"(?s:.)", {bytes([byte]): byte for byte in range(256)})
    from data import bpe  # At the top of this file, `python -m data.bpe` would find itself imported already.

    path = SHIPPED.get(name, Path(name))
    if path.suffix == ".tiktoken":
        try:
            return make(name, bpe.PATTERN, bpe.load(path))
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer {name} cannot be read: {error}") from None
    known = ["bytes", *SHIPPED, *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(
            f"no tokenizer is called '{name}'; choose from {', '.join(known)}, or a file FILE.tiktoken or {FILE}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on what it met: of requests, of the file system, of a checksum
        url = getattr(getattr(error, "request", None), "url", None)
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", Path(tempfile.gettempdir()) / "data-gym-cache")
        place = f"get {url} elsewhere and put it at {folder}/{hashlib.sha1(url.encode()).hexdigest()}" if url else error
        raise UserError(f"the vocabulary of tokenizer {name} cannot be had: {place}; or use --tokenizer=bpe") from None


def published(name):
    """The path of the tokenizer.json that a tokenizer's name means, or None: a path to one, or hf:FOLDER."""
    path = Path(name.removeprefix("hf:")).expanduser()
    path = path / FILE if name.startswith("hf:") else path
    return path if path.name == FILE else None


def make(name, pattern, ranks):
    """A tiktoken.Encoding that cuts text by the regular expression `pattern` and merges by `ranks`, {bytes: id}. The
    end-of-text token gets the id behind them."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def begin(tokenizer):
    """The ids that every text starts with: none, but in some published models."""
    return getattr(tokenizer, "begin", [])


def ends(tokenizer):
    """The ids that end a text, of which the first stands behind documents: one, but in some published models."""
    return getattr(tokenizer, "ends", [tokenizer.eot_token])


def cut(texts):
    """A text, a str or several in a row, yielded in pieces of at most PIECE characters. Where one piece ends and the
    next begins depends on the text alone.

    They part between a letter and the space or line break behind it, where every tokenizer parts words. A text that has
    none of these for so long, such as a million spaces, is cut all the same.
    """
    rest = ""
    for text in [texts] if isinstance(texts, str) else texts:
        text, begin = rest + text, 0
        while len(text) - begin > PIECE:
            border = BORDER.search(text, begin + 1, begin + PIECE)
            end = border.start() if border else begin + PIECE
            yield text[begin:end]
            begin = end
        rest = text[begin:]
    if rest:
        yield rest


def encode_in_pieces(tokenizer, texts):
    """A text, a str or several in a row, yielded as the ids (list) of one piece after the other. Together they are what
    the tokenizer makes of it as a whole (see `cut`), in memory and time that no length of it exhausts."""
    for index, piece in enumerate(cut(texts)):
        # Some tokenizers put a space before all that they are given. A piece that goes on is therefore encoded behind a
        # character that merges with none of its own, and whose ids are taken off again.
        lead = "" if index == 0 else "a" if piece[0].isspace() else "\n"
        encode = tokenizer.encode_ordinary if getattr(tokenizer, "name", "") != "bytes" else utf8
        yield list(encode(lead + piece)[len(encode(lead)) :])


def encode(tokenizer, text):
    """The ids (list) of a text, a str, without what stands around it."""
    return [id for ids in encode_in_pieces(tokenizer, text) for id in ids]


def utf8(text):
    """The bytes of a text. Those of a command line that are no UTF-8 become U+FFFD, as tiktoken has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def fingerprint(tokenizer):
    """A checksum of what every id stands for: tokenizers of one fingerprint read each other's tokens."""
    digest = hashlib.sha256()
    for token in token_bytes(tokenizer):
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()[:16]


def token_bytes(tokenizer):
    """The bytes of every id; special tokens, and ids that the vocabulary leaves out, have none."""
    special = {tokenizer.encode_single_token(text) for text in tokenizer.special_tokens_set}
    listed = []
    for token in range(tokenizer.n_vocab):
        try:
            listed.append(b"" if token in special else tokenizer.decode_single_token_bytes(token))
        except KeyError:
            listed.append(b"")
    return listed


def byte_lengths(tokenizer):
    """(V,) int64: how many bytes of text each id stands for; bits per byte divides by their sum."""
    return np.array([len(token) for token in token_bytes(tokenizer)])
