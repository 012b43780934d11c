"""Read token folders wholly, and say which of them are as they were written.

python -m data.check [FOLDER ...]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.errors import UserError, run
from core.flags import flags, make
from data import folders


@dataclass
class Options:
    """The options of `python -m data.check`."""

    usage: ClassVar[str] = "python -m data.check [FOLDER ...] [--data_dir=data]"

    data_dir: str = "data"  # where the folders are that are checked if none is named: those in its tokens/


def main(argv):
    """Checks folder after folder. Returns the exit status: 2 where one of them is damaged."""
    named, settings = flags(argv, Options)
    home = Path(make(Options, settings).data_dir) / "tokens"
    paths = [Path(name) for name in named] or sorted(path.parent for path in home.glob(f"*/{folders.META}"))
    if not paths:
        raise UserError(f"no token folders in {home}; name one, or another --data_dir")
    damaged = []
    for path in paths:
        try:
            _, meta = folders.check(path, whole=True)
            print(f"{path}: {sum(meta['tokens'].values()):,} tokens, as they were written")
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError("; ".join(damaged))


if __name__ == "__main__":
    run(main)
