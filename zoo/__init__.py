"""The encodings beyond posenc.py, in chapters by the place where position enters. A new one is a class in any
file here.

absolute     added to the token embeddings, or inside the feed-forward layers
biases       added to the logits, by distance
content      added to the logits, by what the tokens say
paths        by what the tokens say, and those between them
rotary       turning queries and keys: what descends from rope
randomized   other positions for any of them
"""

import importlib
import pkgutil

# Importing a chapter registers its encodings, so a new file needs no other line.
for chapter in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{chapter.name}")
