"""Descendants of rope: other rotations of queries and keys, and rules to lay over a trained rope at test time.

The hook is `rotate(pairs)`, which returns queries and keys transformed by their positions, before the products that
make the logits. A rotation that stays true as the context grows is done once, as a key enters the cache
(`rotate_once`); one that depends on the context's length, or on which query looks, is done anew for every call. Rules
that need another angle for far keys than for near ones have two products, and so override `logits`.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import Encoding, distances
from posenc import RoPE, angles, frequencies
from zoo.biases import clamped

AT_ONCE = 1 << 14  # tokens that enter an empty cache together
LARGEST = 80.0  # a power e^80 of queries or keys leaves float32 room for their products


class XPos(RoPE):
    """RoPE whose products also decay with distance, faster in the fast pairs (Sun et al. 2022, section 3).

        rope, times zeta_m^(n / 512),  zeta_m = (2m + gamma D) / ((1 + gamma) D)

    as q zeta^(i/512) and k zeta^(-j/512). No parameters; the fused kernel stays. Past T the decay softens what rope
    breaks, at long distances only: 512 is four default training lengths. Traps: those powers overflow (float16 at
    position 4,532), so exponents count from the middle of the queries of a call, and the cache holds plain keys, whose
    scale is never stale; and (1 + i/512)^-1 in place of zeta^(i/512) is not a function of i - j at all. `wall` has the
    same decay, from content.

    In float16 queries and keys are scaled, and the logits computed, in float32. That holds for 65,000 queries at once,
    after any number of keys. Another `scale_base` or `gamma` that holds for fewer than the 16,384 which enter a cache
    at once has no positions past those.
    """

    name = "xpos"
    standing = "history"
    arguments = {key: value for key, value in RoPE.arguments.items() if key != "dims"}
    arguments |= {"gamma": 0.4, "scale_base": 512.0}
    dims = 0  # all of them
    variants = ()
    stretches = ()

    def setup(self):
        super().setup()
        self.require(self.gamma > 0 and self.scale_base > 0, "gamma and scale_base must be above 0")
        self.rotate_once = False
        # The powers of zeta_0 = gamma / (1 + gamma) are the largest, half as many tokens from the middle.
        queries = 2 * LARGEST * self.scale_base / math.log(1 + 1 / self.gamma)
        overflow = f"{queries:.0f} queries at once are what float32 holds; a larger scale_base holds for more"
        self.require(queries >= self.train_length, overflow)
        if queries < AT_ONCE:
            self.max_length, self.way_out = int(queries), overflow

    def rotate(self, pairs):
        middle = (pairs.i[0] + pairs.i[-1]) // 2
        q, k = super().rotate(pairs)
        return self.scale(q, pairs.i - middle), self.scale(k, middle - pairs.j)

    def scale(self, x, power):
        dtype = torch.promote_types(x.dtype, torch.float32)
        m = torch.arange(self.head_dim // 2, device=x.device, dtype=dtype)
        zeta = (2 * m + self.gamma * self.head_dim) / ((1 + self.gamma) * self.head_dim)
        scale = zeta.repeat(2) ** (power[:, None].to(dtype) / self.scale_base)  # (T, D)
        return (x * scale).to(dtype if x.dtype == torch.float16 else x.dtype)


class PoPE(Encoding):
    """Polar position embedding: content makes lengths, positions make angles (Gopalakrishnan et al. 2025, arXiv
    2509.10534).

        S = sum_c softplus(q_c) softplus(k_c) cos(n w_c - d_hc) / sqrt(D),  w_c = base^(-c/D),  c = 0 ... D-1

    In rope the angle between a pair of q and one of k is content as well as position, and either can pass for the
    other; here no length depends on where, and no angle on what. H D parameters a layer: the phases d in -2 pi ... 0,
    zero at first or, with start="uniform", anywhere in there. The fused kernel stays, over queries and keys of 2D
    numbers, (u cos, u sin), and values padded to as many; the cache holds keys of twice the width. Past T the slow
    channels meet new angles, as rope's do; its authors claim that it extrapolates all the same. Traps: the logits are
    still divided by sqrt(D) and not sqrt(2D); theirs turns keys by d, and here queries turn back, which is the same
    where each head has keys of its own, and serves heads that share them; a temper multiplies what comes out, as
    softplus(f q) is not f softplus(q), but qk_scale acts inside.
    """

    name = "pope"
    standing = "alive"
    arguments = {"base": 10000.0, "start": ("zero", "uniform")}
    relative = True

    def setup(self):
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.phase = nn.Parameter(torch.empty(self.n_head, 1, self.head_dim))

    def init_parameter(self, name, parameter, generator):
        parameter.uniform_(-2 * math.pi if self.start == "uniform" else 0.0, 0.0, generator=generator)

    def rotate(self, pairs):
        phase = clamped(self.phase, -2 * math.pi, 0)
        q = self.polar(pairs.q, self.angle(pairs.q, pairs.i) - phase)
        return q, self.polar(pairs.k, self.angle(pairs.k, pairs.j))

    def angle(self, x, pos):
        dtype = torch.promote_types(x.dtype, torch.float32)
        every = 2 * self.head_dim  # `frequencies` gives one for every other of so many dimensions
        return self.once(
            (pos, dtype), lambda: angles(pos, dtype, lambda dtype: frequencies(every, self.base, dtype, pos.device))
        )

    def polar(self, x, angle):
        radius = F.softplus(x.to(angle.dtype))
        return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1).to(x.dtype)


class ReRoPE(RoPE):
    """Rectified RoPE: distances of a window and beyond all count as the window (Su 2023, kexue.fm/archives/9708).

        n' = n for n < w, else w + (n - w) / leak,  where leak=0 stands for infinity

    For a trained rope model, at test time: `--posenc=rerope`. `window` w is T/2 unless given. No distance past T is
    ever met, so the loss stays near its value at T; all far keys look equally far. Costs two products of queries
    and keys and the fused kernel.
    """

    name = "rerope"
    standing = "history"
    arguments = RoPE.arguments | {"window": 0, "leak": 0.0}
    variants = ()
    stretches = ()

    def setup(self):
        super().setup()
        turn_off = f"write {self.name}(scaling='none')"
        changes = f"{self.scaling} changes with the context, which {self.name} makes unnecessary; {turn_off}"
        self.require(self.rotate_once, changes)
        self.require(not self.turns_values, f"{self.name} turns no values")
        self.require(self.window >= 0, f"window must not be negative, is {self.window}")
        self.require(self.leak == 0 or self.leak >= 1, f"leak must be 0 (for infinity) or at least 1, not {self.leak}")
        self.window = self.window or max(1, self.train_length // 2)

    def rotate(self, pairs):
        return pairs.q, pairs.k  # which `logits` turns, twice

    def far(self, i, j):
        """Positions of queries (T,) and keys (S,) for distances of the window and beyond."""
        share = 1 / self.leak if self.leak else 0.0
        wide = torch.float32 if i.device.type == "mps" else torch.float64  # float32 counts to 2^24 alone
        return self.window + (i - self.window).to(wide) * share, j.to(wide) * share

    def maps(self, i, j):
        """[(positions of queries (T,), of keys (S,), (T, S) bool where they hold)], the first for all other pairs."""
        return [(i, j, None), (*self.far(i, j), distances(i, j) >= self.window)]

    def logits(self, pairs):
        logits = None
        for i, j, holds in self.maps(pairs.i, pairs.j):
            turned = super().logits(replace(pairs, q=self.turn(pairs.q, i), k=self.turn(pairs.k, j)))
            logits = turned if holds is None else torch.where(holds, turned, logits)
        return logits


class SelfExtend(ReRoPE):
    """Self-Extend: exact distances in a window, positions shared by groups of tokens beyond (Jin et al. 2024, sec. 3).

        n' = n for n < w, else floor(i / G) - floor(j / G) + w - floor(w / G)

    For a trained rope model, at test time: `--posenc=self_extend`. `window` w is T/2 unless given; distances stay
    below T up to a context of w + (T - w) G, 16.5 T for the default `group` G. Costs what ReRoPE costs. Trap:
    rounding i and j down each by itself makes it not quite a function of i - j.
    """

    name = "self_extend"
    standing = "history"
    arguments = RoPE.arguments | {"window": 0, "group": 32}
    relative = False
    leak = 0.0

    def setup(self):
        super().setup()
        self.require(self.group >= 1, f"group must be at least 1, not {self.group}")

    def far(self, i, j):
        return i // self.group + self.window - self.window // self.group, j // self.group


class DCA(ReRoPE):
    """Dual chunk attention: no distance is larger than those that training showed, and near ones are exact (An et al.
    2024a, arXiv 2402.17463).

        n' = n                                  for j in the chunk of i, c tokens each
             min(i mod c + c, c + w) - j mod c  for j in the chunk before: exact for n <= w
             min(2 c - 1, c + w) - j mod c      for j further off

    For a trained rope model, at test time: `--posenc=dca`. As in the authors' code `chunk_len` c is 5 T/8 and `window`
    w is T/8 unless given, so that n' stays within 3 T/4; that code's factor on cos and sin for long contexts, of which
    it says that the paper had none, is left out. Costs three products of queries and keys and the fused kernel. Up to c
    tokens it is rope. Past T the loss rises slowly, as rerope's does: of a far key it knows the place within its chunk,
    and not which chunk. Trap: it is no function of i - j.

    Qwen2.5-1M's configuration asks for it.
    """

    name = "dca"
    standing = "alive"
    arguments = RoPE.arguments | {"chunk_len": 0, "window": 0}
    relative = False
    leak = 0.0

    def setup(self):
        w = self.train_length // 8
        self.window, self.chunk_len = self.window or max(1, w), self.chunk_len or max(1, self.train_length * 3 // 4 - w)
        super().setup()
        self.require(self.chunk_len > 0, f"chunk_len must not be negative, is {self.chunk_len}")

    def maps(self, i, j):
        c, before = self.chunk_len, (i // self.chunk_len)[:, None] - j // self.chunk_len  # the chunks between, (T, S)
        after = (i % c + c).clamp(max=c + self.window)
        furthest = torch.full_like(i, min(2 * c - 1, c + self.window))
        return [(i, j, None), (after, j % c, before == 1), (furthest, j % c, before > 1)]


class STRING(ReRoPE):
    """STRING: the last distances within T, which training rarely showed, are replaced by those it showed most (An et
    al. 2024b, arXiv 2410.18745).

        n' = n for n < s, else n - s + w

    For a trained rope, at test time: `--posenc=string`. `window` s is T/3 unless given, and `local` w is 128 as in the
    authors' code, but T/16 where that is less. It is meant for contexts up to T, whose far end it makes better known;
    n' stays below T up to T + s - w tokens, past which it breaks as rope does. Costs what ReRoPE costs. Traps: n' falls
    from s - 1 to w, so that two distances share an angle, and for w = 0 the key at s would look like the query's own;
    the authors' code for whole texts meets that key twice. Theirs for Llama also multiplies cos and sin by .1 ln 2 + 1;
    theirs for Qwen2 does not, nor does this.
    """

    name = "string"
    standing = "control"
    arguments = RoPE.arguments | {"window": 0, "local": 0}
    leak = 0.0

    def setup(self):
        self.window = self.window or max(1, int(0.33 * self.train_length))
        self.local = self.local or max(1, min(128, self.train_length // 16))
        super().setup()
        self.require(0 < self.local <= self.window, f"local must lie in 1 ... {self.window}, the window")

    def far(self, i, j):
        return i - self.window + self.local, j
