"""dataset = "shakespeare": the 1.1 million characters that nanoGPT's users know, split 90/10 as there."""

from data import text
from data.download import fetch

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def signature(config):
    """A value that changes with the text: the checksums of what it is made from."""
    return SHA256


def documents(config):
    """Yields (split, text)."""
    file = fetch(URL, f"{config.data_dir}/raw/tinyshakespeare.txt", SHA256)
    yield from text.cut(text.read(file), 0.1)
