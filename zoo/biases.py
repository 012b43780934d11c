"""Biases on the logits, by how far a key lies back and whatever the tokens say.

The hook is `distance_bias(n)`: distances n >= 0 of any shape to (H, *n.shape), added to q k / sqrt(D);
`distance_scale(n)` is a factor on that, of the same form. What the distance alone decides is a table, which a kernel on
a GPU reads without ever making (T, S). Where the positions i and j matter by themselves too (fire), the hook is
`bias(i, j)`. Biases stay in float32: half precision would merge distances.
"""

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import Encoding, along_heads, distances
from posenc import RoPE


class ScaledBias(Encoding):
    """A learned scalar for every head and distance, inside the division by sqrt(D) (a proposal without a paper).

        softmax((q k^T + B) / sqrt(D)),  B[h, min(n, T - 1)] starting at zero

    T H parameters a layer. Distances past T share the last entry, which only one query of a window trains, so the loss
    rises past T. Trap: what is learned counts 1 / sqrt(D) times as much as in `t5` or `alibi`: .5 acts as .0625 at
    D = 64.
    """

    name = "scaled_bias"
    standing = "history"
    relative = True

    def setup(self):
        self.weight = nn.Parameter(torch.empty(self.train_length, self.n_head))

    def distance_bias(self, n):
        return F.embedding(n.clamp(max=self.train_length - 1), self.weight).movedim(-1, 0) * self.head_dim**-0.5


class Kerple(Encoding):
    """Kernelized relative biases with two learned scalars for every head (Chi et al. 2022, section 4).

        log:    b = -r1 ln(1 + r2 n)      r1 ~ U(0, 2), r2 ~ U(0, 1)
        power:  b = -r1 n^r2              r1 ~ U(0, 1), r2 ~ U(0, 2), at most 2

    both at least .01. 2 H parameters a layer. Past T the loss stays flat or falls: far keys fade as in alibi, the log
    form slowly enough to keep using them. Trap: clamping in the forward pass gives a parameter below .01 no gradient,
    and it never comes back; here the gradient passes.
    """

    name = "kerple"
    standing = "history"
    arguments = {"form": ("log", "power")}
    relative = True
    variants = ('kerple(form="power")',)

    def setup(self):
        self.r1, self.r2 = (nn.Parameter(torch.empty(self.n_head)) for _ in range(2))

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name in ("r1", "r2"):
            parameter.uniform_(0, 2 if (name == "r1") == (self.form == "log") else 1, generator=generator)

    def distance_bias(self, n):
        r1 = along_heads(clamped(self.r1, 0.01), n)
        r2 = along_heads(clamped(self.r2, 0.01, 2 if self.form == "power" else None), n)
        if self.form == "log":
            return -r1 * torch.log1p(r2 * n)
        power = torch.exp(r2 * torch.log(n.clamp(min=1).to(r2.dtype)))  # n^r2, with a gradient at 0 too
        return -r1 * power * (n > 0)


class FIRE(Encoding):
    """Functional interpolation: a small network of the distance's share of the context (Li et al. 2023, section 4).

        b = MLP(psi(n) / psi(max(i, L))),  psi(x) = ln(c x + 1),  the MLP 1 -> 32 -> H with ReLU

    c starts at .1, L at T; both are learned. About 32 (H + 2) parameters a layer. The argument lies in 0 ... 1 at any
    length, so nothing is outside of what training met. Yet while L is T or more, training never sees max(i, L) change,
    and past T near keys get arguments that only nearer ones had: the loss rises. `L` below 1 (in units of T) lets it
    see that. It depends on i too: logits are not relative, and no table of distances can hold them.
    """

    name = "fire"
    standing = "history"
    arguments = {"width": 32, "c": 0.1, "L": 1.0}
    variants = ("fire(L=0.25)",)

    def setup(self):
        self.require(self.width >= 1, f"width must be at least 1, not {self.width}")
        self.require(self.c > 0 and self.L > 0, "c and L must be above 0")
        self.inner, self.outer = nn.Linear(1, self.width), nn.Linear(self.width, self.n_head)
        self.steepness = nn.Parameter(torch.empty(()))
        self.threshold = nn.Parameter(torch.empty(()))  # in units of T

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name in ("steepness", "threshold"):
            parameter.fill_(self.c if name == "steepness" else self.L)

    def bias(self, i, j):
        with torch.autocast(i.device.type, enabled=False):
            c, dtype = self.steepness.abs(), self.steepness.dtype
            whole = torch.maximum(i.to(dtype), (self.threshold * self.train_length).abs())[:, None]
            share = torch.log1p(c * distances(i, j).to(dtype)) / (torch.log1p(c * whole) + 1e-6)
            return self.outer(F.relu(self.inner(share[..., None]))).movedim(-1, 0)


class ScaleInvariant(RoPE):
    """Scale-invariant attention: far keys get less weight and more contrast (Anson et al. 2025, arXiv 2505.17083).

        L = a S + m,  a = sqrt(1 + 2 ln(1 + n/tau)),  m = -2 ln(1 + n/tau),  S = q k / sqrt(D)

    For normal S of variance one, E[e^L] = e^(1/2) / (1 + n/tau): the keys from n to 10 n have as much weight in sum at
    every n, and few of them take it. No parameters; a by itself is new, while m is kerple's log form with r1 = 2 and
    r2 = 1/tau. The factor gives up the fused kernel, but where a GPU reads tables of distances. It stands over the
    p-RoPE that its authors train with it, `base` and `fraction` being rope's, and fraction=0 leaves it alone. Past T
    its loss is flat in their table, and so is retrieval. Trap: the variance of S is one with `--qk_norm`, and
    anything without; then a and m do not belong to each other.
    """

    name = "scale_invariant"
    standing = "alive"
    arguments = RoPE.arguments | {"base": 1024.0, "fraction": 0.5, "tau": 10.0}
    variants = ("scale_invariant(fraction=0)",)
    stretches = ()

    def setup(self):
        super().setup()
        self.require(self.tau > 0, f"tau must be above 0, not {self.tau}")
        self.register_buffer("unit", torch.tensor(self.tau), persistent=False)

    def distance_bias(self, n):
        return (-2 * torch.log1p(n / self.unit)).expand(self.n_head, *n.shape)

    def distance_scale(self, n):
        return (1 - self.distance_bias(n)).sqrt()


class Sandwich(Encoding):
    """The products of sinusoids, as far as they depend on the distance, as a fixed bias (Chi et al. 2023, section 4).

        b = (sum_{m=1}^{d/2} cos(n / 10000^(2m/d)) - d/2) H / (8 h),  d = 128, h = 1 ... H

    No parameters. It falls about as the logarithm of the distance, and fast in the first heads, slowly in the last;
    past T it goes on falling, and the loss stays flat. Traps: copies that sum n w_m instead of cos(n w_m) are linear
    biases; and float32, in which a GPU computes it, has angles n w_m exact to n / 2^24 alone (the CPU takes float64).
    """

    name = "sandwich"
    standing = "history"
    arguments = {"dims": 128, "base": 10000.0}
    shared = True
    relative = True

    def setup(self):
        self.require(self.dims >= 2 and self.dims % 2 == 0, f"dims must be even, not {self.dims}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")

    def distance_bias(self, n):
        dtype, half = torch.float64 if n.device.type == "cpu" else torch.float32, self.dims // 2
        n = n.to(dtype)
        waves = sum(torch.cos(n / self.base ** (m / half)) for m in range(1, half + 1))
        compression = self.n_head / (8 * torch.arange(1, self.n_head + 1, device=n.device, dtype=dtype))
        return (along_heads(compression, n) * (waves - half)).to(torch.float32)

    def bias(self, i, j):
        # All layers share it, in windows of up to a chunk of queries.
        return self.once((i, j), lambda: super(Sandwich, self).bias(i, j))


def clamped(x, low, high=None):
    """x kept in low ... high, with the gradient of x itself, so that what lies outside can come back."""
    return x + (x.clamp(low, high) - x).detach()
