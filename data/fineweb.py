"""dataset = "fineweb": web pages of FineWeb's 10-billion-token sample, for GPUs; --shards=N times 100 million tokens.

The files hold tokens of GPT-2's tokenizer: 256 int32, of which the third is the number of tokens; then uint16 ids, each
document after an end-of-text token. They are decoded, so that any tokenizer can read them.
"""

from itertools import pairwise

import numpy as np

from core.errors import UserError
from data import vocabulary
from data.download import fetch

# 200 MB each. The revision cannot change.
URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/889765ea1f903759787add96995d81171b632d0c/"
VAL = ("fineweb_val_000000.bin", "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640")
TRAIN = [
    ("fineweb_train_000001.bin", "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e"),
    ("fineweb_train_000002.bin", "d4ba8d2d740905a836a4222d2aff01750560e7d49a51a745a1b3235520aec2cd"),
    ("fineweb_train_000003.bin", "f70fa272369730fd9e39f1848bfe4daa3289b6e490c1e7762777f00ea8b66246"),
    ("fineweb_train_000004.bin", "d8d88850f89fe2030e866380e90d544167467d407080403b830b903543925835"),
    ("fineweb_train_000005.bin", "36cef3fc41863eb6731b41e986edde38e368853ee6deb87b928990bf445a119c"),
    ("fineweb_train_000006.bin", "d80e5b209983e636655fc738fdf281f0132f0298bf4c0848f7e7a6bea6ca06f0"),
    ("fineweb_train_000007.bin", "fa9f94dce61686b5467bc6cd3078424203db23ac254d804a6d8d5d440afc1e11"),
    ("fineweb_train_000008.bin", "308e6937af5d78b7489a8aac3a3951dced5b46103e613f8bc4eb543f5092526c"),
    ("fineweb_train_000009.bin", "1635300891634346ecff3a78d6e489a69c647885f0dcd249fe3eb76fac683458"),
]
VAL_TOKENS = 10 << 20  # read of the validation file, as is the custom with it
END = 50256  # GPT-2's end of text


def files(config):
    """[(split, (name, SHA-256))] of the files asked for. UserError for more than there are."""
    if config.shards > len(TRAIN):
        raise UserError(f"--shards={config.shards}: fineweb has 1 to {len(TRAIN)} of them here")
    return [("train", file) for file in TRAIN[: config.shards]] + [("val", VAL)]


def signature(config):
    """A value that changes with the text: the checksums of what it is made from."""
    return files(config), VAL_TOKENS


def documents(config):
    """Yields (split, text). A file takes about two minutes, once; memory does not grow with their number."""
    gpt2 = vocabulary.load("gpt2")  # This comes first, since without it the downloads would be of no use.
    for split, (name, sha256) in files(config):
        file = fetch(URL + name, f"{config.data_dir}/raw/fineweb/{name}", sha256)
        ids = np.memmap(file, "<u2", "r", offset=256 * 4)
        if split == "val":
            ids = ids[:VAL_TOKENS]
        for begin, end in pairwise([-1, *np.flatnonzero(ids == END), len(ids)]):
            yield split, gpt2.decode(ids[begin + 1 : end].tolist())
