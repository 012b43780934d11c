"""Codes of where a token stands, whatever it is compared with, added to the token embeddings or further in.

The hook is `embed(pos)`: positions (T,) to vectors (T, C) that are added to the token embeddings before the first
layer, embeddings and codes each normalised by itself. `ffn(pos, width)` adds inside every feed-forward layer instead.
Layers above see sums of a token and a place, and have to learn from them how far two places are apart.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import Encoding
from posenc import angles, frequencies, sinusoids


class Fourier(Encoding):
    """A learned function of position: sines of learned frequencies through a small network (after Li et al. 2021).

        PE[p] = W2 gelu(W1 [cos(p w), sin(p w), ln(1 + p)]),  w of C/2 frequencies drawn log-uniform in [1e-4, 1]

    Added to the token embeddings; about 2 C^2 parameters, whatever the length. Without the network and at the fixed
    frequencies of `sinusoidal` it is that encoding. Past T it is defined everywhere and trained nowhere: the network
    meets phases of its slow waves, and logarithms, that it never saw, and the loss climbs as it does for sinusoids.
    """

    name = "fourier"
    standing = "history"
    shared = True

    def setup(self):
        self.frequency = nn.Parameter(torch.empty(self.n_embd // 2))
        self.inner = nn.Linear(2 * (self.n_embd // 2) + 1, self.n_embd)
        self.outer = nn.Linear(self.n_embd, self.n_embd)

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name == "frequency":
            parameter.uniform_(math.log(1e-4), 0, generator=generator).exp_()

    def embed(self, pos):
        with torch.autocast(pos.device.type, enabled=False):
            angle = angles(pos, self.frequency.dtype, self.frequency.to)
            p = pos[:, None].to(self.frequency.dtype)
            features = torch.cat((angle.cos(), angle.sin(), torch.log1p(p)), dim=-1)  # (T, C + 1)
            return self.outer(F.gelu(self.inner(features)))


class Recurrent(Encoding):
    """Every position's vector from the one before it (the discrete form of FLOATER, Liu et al. 2020).

        learned:  PE[p] = PE[p-1] + W2 gelu(W1 norm(PE[p-1])),  PE[0] learned
        linear:   x_p = 2 cos(w) x_{p-1} - x_{p-2}, which is sin(p w) or cos(p w): exactly `sinusoidal`

    Added to the token embeddings. learned has 2 C^2 parameters and takes T small steps one after the other, rolled out
    once a training step and once per weights afterwards. Past T it goes on from where it was, into places that training
    never saw. Trap: the two-term form drifts (by .39 at p = 16,000 for w = .001, in float32), so linear is rolled out
    as products of rotations in float64.
    """

    name = "recurrent"
    standing = "history"
    arguments = {"form": ("learned", "linear"), "base": 10000.0}
    max_length = 1 << 20
    way_out = "its table has a row for each of them, made one after the other; attend to a window of text with --crop"
    forms = {"form": {"linear": ("base",)}}
    shared = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        if self.form == "learned":
            self.start = nn.Parameter(torch.empty(self.n_embd))
            self.inner, self.outer = nn.Linear(self.n_embd, self.n_embd), nn.Linear(self.n_embd, self.n_embd)

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name == "start":
            parameter.normal_(generator=generator)

    def embed(self, pos):
        rows = rows_beyond(pos[-1], self.train_length)
        if self.form == "linear":
            table = self.once((rows, pos.device), lambda: self.roll_linear(rows).to(pos.device))
        else:
            table = self.once_per_weights((rows,), lambda: self.roll_learned(rows))
        return F.embedding(pos, table)

    @torch.compiler.disable  # which would unroll it
    def roll_learned(self, rows):
        with torch.autocast(self.start.device.type, enabled=False):
            x = [self.start]
            for _ in range(rows - 1):
                x.append(x[-1] + self.outer(F.gelu(self.inner(F.rms_norm(x[-1], x[-1].shape)))))
            return torch.stack(x)

    def roll_linear(self, rows):
        turn = torch.polar(torch.ones(self.n_embd // 2).double(), frequencies(self.n_embd, self.base, torch.float64))
        turned = turn.expand(rows - 1, -1).cumprod(dim=0)
        turned = torch.cat((torch.ones_like(turn)[None], turned))
        return torch.stack((turned.imag, turned.real), dim=-1).flatten(-2).float()


class FeedForwardPE(Encoding):
    """Sinusoids added inside the feed-forward layers: attention gets no position (a proposal without a paper).

        FFN(x) = W2 act(W1 x + b1 + PE[p]),  PE the sinusoids of `sinusoidal`, as wide as the layer

    No parameters. What a position's own activations say of it reaches the others through the layers above. Past T it is
    as lost as other absolute codes.
    """

    name = "ffn"
    standing = "history"
    arguments = {"base": 10000.0}
    shared = True

    def setup(self):
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def ffn(self, pos, width):
        return self.once((pos, width), lambda: sinusoids(pos, width + width % 2, self.base)[:, :width])


def rows_beyond(last, rows):
    """`rows` doubled until a table of so many reaches `last`, a tensor of one int64: so tables are seldom made anew."""
    while rows <= int(last):
        rows *= 2
    return rows
