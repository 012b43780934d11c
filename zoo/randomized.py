"""Other positions for any encoding.

The hook is `positions(pos, length)`: indices of tokens to the positions that all other hooks are given. `redraw` is
called before every training step, the place to draw random ones.
"""

import torch

from core.encoding import Encoding
from core.specs import parse

MOST = 1 << 26  # positions to draw from; every step shuffles all of them


class Randomized(Encoding):
    """Training on random positions, so that a test's positions are none of them new (Ruoss et al. 2023).

        train: T positions drawn from 0 ... L - 1 without replacement, in order, anew for every step
        test:  0, s, 2s, ... with the stride s = floor(L / length), at least 1

    around any `inner` encoding, which is built for L = `length`, 16 T unless given. The authors sample at test time
    too; a fixed stride is their mean, and lets a cache be exact. Costs what the inner one costs. In distribution the
    loss is worse than with the inner encoding, since neighbours are rarely one apart. Past T every position has been
    met, but strides as short as the test's were rare: the loss is nearly flat to 2 T, and then rises.

    `form="pose"` is PoSE (Zhu et al. 2023, arXiv 2309.10400), which tunes a trained model for L on windows of T:

        train: r tokens at 0 ... r - 1, the others shifted by u,  r ~ U(1, (T+1)/2), u ~ U(0, L - T), for every step
        test:  0, 1, 2, ...

    Neighbours stay one apart, but for one gap, so every distance below L is met and those within a sentence are as
    they were. The authors also take the text behind the gap from further on in its document; here it follows on.
    """

    name = "randomized"
    standing = "history"
    arguments = {"inner": "rope", "length": 0, "form": ("uniform", "pose")}
    nested = ("inner",)
    by_length = True  # another length of the context is another stride
    variants = ("randomized(inner=learned)", "randomized(inner=t5)", 'randomized(form="pose")')

    def setup(self):
        self.length = self.length or 16 * self.train_length
        self.require(
            self.length >= self.train_length, f"length must be at least {self.train_length}, not {self.length}"
        )
        self.require(self.length <= MOST, f"length must be at most {MOST}, not {self.length}")
        cls, arguments, layer = parse(self.inner)
        self.require(not layer, f"{', '.join(layer)} belongs to the layer: randomized(inner=..., window=32)")
        self.require(cls is not Randomized, "the inner encoding must be another one")
        self.inner = cls(**(self.sizes | {"train_length": self.length}), **arguments)
        self.by_length = self.form == "uniform"
        self.rotate_once = self.form == "pose" and self.inner.rotate_once
        self.drawn = None  # positions (length,) of this training step; no buffer, or DDP would send it around
        for name in DELEGATED:
            setattr(self, name, getattr(self.inner, name))

    def init_parameter(self, name, parameter, generator):
        self.inner.init_parameter(name.removeprefix("inner."), parameter, generator)

    def redraw(self, length, generator, device):
        drawn = getattr(self, self.form)(length, generator)
        # A copy that blocks would wait until the GPU has done all that it was given.
        self.drawn = drawn.to(device, non_blocking=torch.device(device).type == "cuda")

    # The forms: positions (length,) of a training step, of 0 ... L - 1.

    def uniform(self, length, generator):
        return torch.randperm(self.length, generator=generator)[:length].sort().values

    def pose(self, length, generator):
        kept = torch.randint(1, (length + 1) // 2 + 1, (), generator=generator)
        shift = torch.randint(self.length - length + 1, (), generator=generator)
        index = torch.arange(length)
        return index + shift * (index >= kept)

    def positions(self, pos, length):
        if self.training and self.drawn is not None:
            return self.drawn[pos]
        return pos * max(1, self.length // length) if self.by_length else pos


# The hooks and facts that `randomized` takes from its inner encoding.
DELEGATED = (
    "embed", "ffn", "rotate", "distance_bias", "distance_scale", "bias", "state", "asks", "logits", "weights", "values",
    "turn_values", "turns_values",
    "embeds", "biases", "scales", "has_state", "recalls", "unbroken", "weighs", "writes_out", "shared", "chunk",
    "max_length", "way_out",
)  # fmt: skip
