"""Python takes this file for the package core where one beside it is run by its path, `python lab/gallery.py`."""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of train.py, where the package is
del sys.modules["core"]
importlib.import_module("core")
