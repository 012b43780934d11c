"""tokenizer.json, as published models have it: read as a tokenizer of ours, and written from one."""

import contextlib
import json
import re
from itertools import pairwise

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from core import files
from core.errors import UserError, brief
from data import vocabulary

CONFIG, GENERATION = "config.json", "generation_config.json"  # beside a published model's tokenizer.json
END = "tokenizer_config.json"  # beside a run's: {"eos_token_id": the id that ends a text, or a list of several}
IDS = 1 << 24  # the most ids: a list of their bytes is as long as the largest one says


def byte_characters():
    """The character that stands for each of the 256 bytes in GPT-2's vocabulary files: itself where it can be seen,
    else the next one from 256 on (Radford et al. 2019, encoder.py)."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


class Tokenizer:
    """A tokenizer.json that answers as a tiktoken.Encoding does.

    begin: the ids that a text starts with. ends: the ids that end one, of which the first is eot_token.
    """

    def __init__(self, path, ends):
        """path: the file. ends: the ids that end a text, as a file beside it says. UserError for what is not whole."""
        self.path, self.inner = path, open_inner(path)
        some = self.encode("a")  # and what is put around it
        self.begin = some.ids[: [*some.special_tokens_mask, 0].index(0)]
        self.special = {
            token.content: id for id, token in self.inner.get_added_tokens_decoder().items() if token.special
        }
        self.bytes = bytes_of_ids(self.inner, path)
        self.n_vocab = len(self.bytes)
        wrong = [id for id in ends or [None] if type(id) is not int or id not in range(self.n_vocab)]
        if wrong:
            said = f"{path}: eos_token_id={brief(wrong[0])} is no id in it"
            raise UserError(f"{said}; set it in the {CONFIG} or {GENERATION} beside it")
        self.ends, self.eot_token = list(dict.fromkeys(ends)), ends[0]

    @property
    def special_tokens_set(self):
        return set(self.special)

    def encode(self, text, **how):
        """The tokenizers.Encoding of a text. UserError for one that is no UTF-8, or that the vocabulary cannot say."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no UTF-8, which {self.path} needs: {error}") from None
        with refusals(f"{self.path} cannot encode {brief(text)!r}"):
            return self.inner.encode(text, **how)

    def encode_ordinary(self, text):
        return self.encode(text, add_special_tokens=False).ids

    def encode_single_token(self, text):
        return self.inner.token_to_id(text)

    def decode_single_token_bytes(self, token):
        return self.bytes[token]

    def decode_bytes(self, tokens):
        return b"".join(self.bytes[token] for token in tokens)


@contextlib.contextmanager
def refusals(said):
    """What the tokenizers library raises in the block, as a UserError that begins with `said`. It raises nothing
    narrower than Exception, and its panics, which Rust reports on stderr too, are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{said} ({error}); download it again") from None


def open_inner(path):
    """The tokenizers.Tokenizer of a file, to which special tokens in a text are text. UserError for a damaged one."""
    require_file(path, "save one there with transformers: tokenizer.save_pretrained")
    with refusals(f"{path} is damaged"):
        opened = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # A path need not be UTF-8.
    opened.encode_special_tokens = True
    opened.no_truncation()
    opened.no_padding()
    return opened


def bytes_of_ids(opened, path):
    """[bytes] of every id; an id that the vocabulary leaves out has none. UserError where there are no tokens, or two
    have one id, or their decoder is another than those of bytes and of sentencepiece."""
    ids, added = opened.get_vocab(with_added_tokens=True), opened.get_added_tokens_decoder()
    if not ids:
        raise UserError(f"{path} has no tokens; download it again")
    largest = max(ids.values())
    if largest >= IDS:
        raise UserError(f"{path} has a token of id {largest}, and ids lie below {IDS}; download it again")
    if len(set(ids.values())) < len(ids):  # Which of them it stands for, chance would decide at every start.
        raise UserError(f"{path} has {len(ids)} tokens of {len(set(ids.values()))} ids; download it again")
    decoder = json.dumps(json.loads(opened.to_str())["decoder"])
    if "ByteLevel" not in decoder and "Metaspace" not in decoder and "ByteFallback" not in decoder:
        raise UserError(f"{path}: its decoder is not supported; those of bytes and of sentencepiece are")
    listed = [b""] * (largest + 1)
    of_character = {character: byte for byte, character in enumerate(byte_characters())}
    for text, id in ids.items():
        if id in added:
            listed[id] = text.encode()
        elif "ByteLevel" in decoder and of_character.keys() >= set(text):
            listed[id] = bytes(of_character[character] for character in text)
        elif re.fullmatch("<0x[0-9A-F]{2}>", text):
            listed[id] = bytes([int(text[3:5], 16)])
        else:
            listed[id] = text.replace("\u2581", " ").encode()
    return listed


def load(path):
    """The Tokenizer of a file in a published model's folder or in a run's."""
    return Tokenizer(path, ends_beside(path))


def ends_beside(path):
    """The ids that end a text: those that the END beside a tokenizer.json says, else those of a published model's
    config.json and generation_config.json together; [] without any. UserError for a file that cannot be read."""
    for names in ((END,), (CONFIG, GENERATION)):
        beside = [path.with_name(name) for name in names]
        said = [read_object(file).get("eos_token_id") for file in beside if file.exists()]
        ends = [id for ids in said for id in (ids if isinstance(ids, list) else [ids]) if id is not None]
        if ends:
            return ends
    return []


def read_object(path, instead="download it again"):
    """The object in a JSON file of a published model. UserError for what is missing, with what to do `instead`, or
    damaged."""
    require_file(path, instead)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def require_file(path, instead):
    """UserError where no file is, with what to do `instead`; and where it is a pipe, which could be waited for without
    end, or something else that is no file."""
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}; {instead}")
    if not path.is_file():
        raise UserError(f"{path} is no regular file; {instead}")


def copy(tokenizer, folder):
    """Put the file of a Tokenizer into a folder, and beside it which tokens end a text: `load` reads them there."""
    ends = tokenizer.ends
    end = json.dumps({"eos_token_id": ends if ends[1:] else ends[0]})
    for name, content in ((END, end.encode()), (vocabulary.FILE, tokenizer.path.read_bytes())):
        with files.atomic(folder / name, "wb") as file:
            file.write(content)


def merges(ranks):
    """{bytes: id} in the order learned -> the pairs that make the tokens: the two parts that earlier merges make of a
    token. A token of which they leave more than two is met as a whole word alone."""
    pairs = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranked = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, i = min(ranked)
            if lowest >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


def dialect(pattern):
    """tiktoken's regular expression in Oniguruma's syntax, where $ ends lines too and {1,3}+ is a repetition."""
    return pattern.replace("}+", "}").replace("$", r"\z")


def inner(tokenizer):
    """The tokenizers.Tokenizer with the ids of a tokenizer of ours."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.inner
    special = {text: tokenizer.encode_single_token(text) for text in tokenizer.special_tokens_set}
    ranks = {text: id for id, text in enumerate(vocabulary.token_bytes(tokenizer)) if text}
    character = byte_characters()
    write = lambda text: "".join(character[byte] for byte in text)  # noqa: E731
    pairs = [tuple(map(write, pair)) for pair in merges(ranks)]
    made = tokenizers.Tokenizer(
        models.BPE({write(text): id for text, id in ranks.items()} | special, pairs, ignore_merges=bool(pairs))
    )
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [pre_tokenizers.Split(tokenizers.Regex(dialect(tokenizer._pat_str)), "isolated")] if pairs else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    return made
