"""Position from content alone: what a token says, and what lies on the way to another, decides how far apart they are.

Nothing here reads a position. `state(x, last)` makes of the input of attention what the tokens do to those around them:
places (repo) and phases (selective_rope), by which `rotate` turns queries and keys once, so that the fused kernel
stays; decays of every channel (wall) and reflections (path), which only the `logits` of a pair can gather up. What they
add up to lies beside the keys in the cache, and so they go on from one call to the next.
"""

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import Encoding
from posenc import frequencies

BLOCK = 32  # keys that path solves for together


class RePo(Encoding):
    """Real-valued positions that each token gives itself, and rope at them (Li et al. 2025, "Context re-positioning").

        z_h = (W silu(W_g x) * W_c x)_h,  pairs of q and k turned by z w_m,  w_m = base^(-2m/D)

    A network C -> C/8 -> H, about C^2 / 4 parameters a layer; query heads that share a key share its places. Tokens may
    lie in any order, far apart or at one place, whatever their distance in the text, so nothing is new past T but the
    number of keys: it rises as none does. The fused kernel stays. The authors leave the first 5 of 16 layers to rope,
    and tune a model that was trained with it, hence the base: `["rope", "repo", "repo", "repo"]`. Trap: a place
    says what a token is and not where, so one layer alone is as blind to order as none; it has to come from below, by
    rope or the causal mask.
    """

    name = "repo"
    standing = "alive"
    positionless = True
    relative = True
    arguments = {"base": 500000.0}

    def setup(self):
        self.require(self.head_dim % 2 == 0, f"the width of a head must be even, not {self.head_dim}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        width = max(1, self.n_embd // 8)
        self.gate, self.content = (nn.Linear(self.n_embd, width, bias=False) for _ in range(2))
        self.final = nn.Linear(width, self.n_kv_head, bias=False)

    def state(self, x, last):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.final.weight.dtype)
            place = self.final(F.silu(self.gate(x)) * self.content(x))  # (B, T, H_kv)
            return {"place": place.transpose(1, 2)[..., None]}

    def rotate(self, pairs):
        return turned(pairs, pairs.state["place"], self.base)


class SelectiveRoPE(Encoding):
    """Rotations that add up along the text, each token deciding by how much (Movahedi et al. 2025, "Selective RoPE").

        angle_tm = w_m sum_{s<=t} phi_sm,  phi = conv(W2 W1 x'),  w_m = base^(-2m/D)

    x' is x with the slice of every head normalised to length 1, W2 W1 a product of `rank` r, conv a causal convolution
    of every channel over `taps` tokens. `bias` adds exp(b) to phi and `gate` multiplies it by a sigmoid of x', one for
    a head: phi = 1 is rope. r (C + H D/2) parameters a layer; query heads that share a key share its angles. Turned
    once, so the fused kernel stays. Past T the loss rises as rope's does: phases have a mean, and the slow pairs reach
    sums that training never showed. Traps: the sum is in float32 at least, as a text of 10^5 tokens turns far; and
    without the convolution the authors' code takes differences of phi, whose sum is phi_t itself, which is repo's idea
    and not this one. Mamba-3 has the same rotation.
    """

    name = "selective_rope"
    standing = "alive"
    positionless = True
    relative = True
    arguments = {"base": 500000.0, "rank": 16, "taps": 4, "gate": False, "bias": False}

    def setup(self):
        self.require(self.head_dim % 2 == 0, f"the width of a head must be even, not {self.head_dim}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.require(1 <= self.rank <= self.n_embd, f"rank must lie in 1 ... {self.n_embd}, not {self.rank}")
        self.require(1 <= self.taps <= 64, f"taps must lie in 1 ... 64, not {self.taps}")
        self.recalls, width = self.taps - 1, self.n_kv_head * self.head_dim // 2
        self.down, self.up = nn.Linear(self.n_embd, self.rank, bias=False), nn.Linear(self.rank, width, bias=False)
        self.conv = ShortConvolution(width, self.taps)
        self.gate = nn.Linear(self.n_embd, self.n_kv_head) if self.gate else None
        biased = self.__dict__.pop("bias")  # The argument would hide the hook of that name.
        self.offset = nn.Parameter(torch.empty(self.n_kv_head, self.head_dim // 2)) if biased else None

    def state(self, x, last):
        with torch.autocast(x.device.type, enabled=False):
            x = recalled(x.to(self.up.weight.dtype), last, self.recalls)
            x = F.normalize(x.unflatten(-1, (self.n_head, -1)), dim=-1).flatten(-2)
            phase = self.conv(self.up(self.down(x))).unflatten(-1, (self.n_kv_head, -1))  # (B, T, H_kv, D/2)
            if self.offset is not None:
                phase = phase + self.offset.exp()
            if self.gate is not None:
                phase = phase * self.gate(x[:, self.recalls :]).sigmoid()[..., None]
            return {"total": phase.transpose(1, 2).cumsum(dim=2) + last.get("total", 0)}

    def rotate(self, pairs):
        return turned(pairs, pairs.state["total"], self.base)


class Wall(Encoding):
    """Every channel of a key fades by gates of its own on the way to the query (Tilde Research 2026, "Wall attention").

        S_ij = sum_d q_id k_jd exp(P_id - P_jd) / sqrt(D),  P_t = sum_{s<=t} ln sigmoid(W_g x_s + b),  b = 8 at first

    C^2 + C parameters a layer: a gate for every query head and channel, also where heads share keys. With b = 8 it
    begins as none, to 3 in 10^4 a token. `forget` adds fox's gate of a head, G_i - G_j, which also begins at 8. It is
    xpos whose decay the content decides; and as there, the two factors e^(P_i) and e^(-P_j) overflow. So each product
    is anchored between its queries and its keys, where both factors are at most 1: the keys before a call at its first
    query, those within it by halves, the second half of a block asking the first, down to single tokens. That holds
    for any gates. All is computed in float32 at least; the cache holds P, as wide as the keys of all heads. Past T
    what the gates let go is gone, and what they keep spreads over more keys: the loss rises slowly. Trap: logits shrink
    to 0 and not to minus infinity, so what has faded is averaged over and not hidden.
    """

    name = "wall"
    standing = "alive"
    positionless = True
    relative = True
    arguments = {"bias": 8.0, "forget": False}

    def setup(self):
        self.first = self.__dict__.pop("bias")  # The argument would hide the hook of that name.
        self.fade = nn.Linear(self.n_embd, self.n_head * self.head_dim)
        self.forget = nn.Linear(self.n_embd, self.n_head) if self.forget else None

    def init_parameter(self, name, parameter, generator):
        super().init_parameter(name, parameter, generator)
        if name.endswith("bias"):
            parameter.fill_(self.first)

    def state(self, x, last):
        return sums_of(dict(faded=self.fade, total=self.forget), x, last, self.n_head)

    def logits(self, pairs):
        p, of_keys = pairs.own["faded"], pairs.state["faded"]
        with torch.autocast(p.device.type, enabled=False):
            q, k = pairs.q.to(p.dtype) * self.head_dim**-0.5, pairs.k.to(p.dtype)
            before, anchor = k.shape[2] - q.shape[2], p[:, :, :1]
            logits = within(q, k[:, :, before:], p)
            if before:
                far = k[:, :, :before] * (anchor - of_keys[:, :, :before]).exp()
                logits = torch.cat(((q * (p - anchor).exp()) @ far.mT, logits), dim=-1)
        return logits if self.forget is None else logits + (pairs.own["total"] - pairs.state["total"].mT)


class PaTH(Encoding):
    """Every token on the way from key to query reflects what passes it along a direction of its own (Yang et al. 2025,
    "PaTH attention").

        S_ij = q_i H_i H_{i-1} ... H_{j+1} k_j / sqrt(D),  H_t = I - b_t w_t w_t^T,  b_t = 2 sigmoid(W x_t + c)
        w_t = silu(conv(W2 W1 x_t)), of length 1, conv a causal convolution of every channel over 3 tokens

    r (C + H D) + H C parameters a layer, with rank r = 32; heads that share a key share w and b.
    The products of queries with a block of 32 keys are one triangular solve,

        tril(QK') - tril(QW') (I + stril(B WW'))^-1 stril(B WK')

    and queries pass the blocks one after another, from the last to the first. Solves are in float32 at least: there are
    none in half precision. The cache keeps k, w and b as they came, and every token goes back over all blocks: decoded
    after 2,000 others it takes ten times as long as with none. (Keys that each token rewrites, as the authors' cache
    has them, would need one product; none here are rewritten.) Under a window there are no sinks, as what lies between
    is lost. `forget` is PaTH-FoX: fox's gate is added, and divided by sqrt(D) with the rest, as in the authors' code.
    Reflections can track states that attention alone cannot. Past T far keys are scattered and not hidden, so the loss
    rises slowly unless they are forgotten, which keeps it flat.
    """

    name = "path"
    standing = "alive"
    unbroken = True
    positionless = True
    relative = True
    arguments = {"forget": False, "rank": 32, "taps": 3}
    variants = ("path(forget=True)",)

    def setup(self):
        self.require(1 <= self.rank <= 10**4, f"rank must lie in 1 ... 10^4, not {self.rank}")
        self.require(1 <= self.taps <= 64, f"taps must lie in 1 ... 64, not {self.taps}")
        self.recalls, width = self.taps - 1, self.n_kv_head * self.head_dim
        self.down, self.up = nn.Linear(self.n_embd, self.rank, bias=False), nn.Linear(self.rank, width, bias=False)
        self.conv = ShortConvolution(width, self.taps)
        self.strength = nn.Linear(self.n_embd, self.n_kv_head)
        self.forget = nn.Linear(self.n_embd, self.n_head) if self.forget else None

    def state(self, x, last):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.up.weight.dtype)
            w = F.silu(self.conv(self.up(self.down(recalled(x, last, self.recalls)))))
            w = F.normalize(w.unflatten(-1, (self.n_kv_head, -1)), dim=-1)
            kept = {"w": w.transpose(1, 2), "b": 2 * self.strength(x).sigmoid().transpose(1, 2)[..., None]}
            return kept | sums_of(dict(total=self.forget), x, last, self.n_head)

    def logits(self, pairs):
        w, b = (pairs.state[name].repeat_interleave(self.n_head // self.n_kv_head, dim=1) for name in "wb")
        with torch.autocast(w.device.type, enabled=False):
            logits = reflected(pairs.q.to(w.dtype), pairs.k.to(w.dtype), w, b)
        if self.forget is not None:
            logits = logits + (pairs.own["total"] - pairs.state["total"].mT)
        return logits * self.head_dim**-0.5


class ShortConvolution(nn.Module):
    """(B, taps - 1 + T, width) -> (B, T, width): a causal convolution of every channel by itself, over that many tokens
    the last of which is the token's own."""

    def __init__(self, width, taps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, taps))  # the tap of the token itself comes last

    def forward(self, x):
        T = x.shape[1] - self.weight.shape[1] + 1
        return sum(x[:, m : m + T] * tap for m, tap in enumerate(self.weight.unbind(dim=1)))


def recalled(x, last, count):
    """x (B, T, C) after the `count` tokens before it, zeros where there are none: (B, count + T, C)."""
    before = last["x"][:, 0] if "x" in last else x.new_zeros(len(x), count, x.shape[2])
    return torch.cat((before.to(x.dtype), x), dim=1)


def turned(pairs, place, base):
    """The Pairs' q and k, whose pairs (m, m + D/2) turn by the place of their token (B, H_kv, S, 1 or D/2) times rope's
    frequencies. The queries are those of the last tokens."""
    angle = place * frequencies(pairs.k.shape[-1], base, place.dtype, place.device)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]

    def turn(x):
        a, b = x.to(angle.dtype).unflatten(1, (angle.shape[1], -1)).chunk(2, dim=-1)  # (B, H_kv, heads, T, D/2)
        c, s = cos[..., -x.shape[2] :, :], sin[..., -x.shape[2] :, :]
        return torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)), dim=-1).flatten(1, 2)

    return turn(pairs.q).to(pairs.q.dtype), turn(pairs.k).to(pairs.k.dtype)


def sums_of(gates, x, last, n_head):
    """gates: name -> a linear layer or None; x (B, T, C). Returns name -> (B, H, T, any) for each layer: the sum up to
    every token of the logarithms of the sigmoids of what it makes of x, which goes on from that in `last`."""
    with torch.autocast(x.device.type, enabled=False):
        logs = {name: F.logsigmoid(gate(x.to(gate.weight.dtype))) for name, gate in gates.items() if gate is not None}
        each = {name: x.unflatten(-1, (n_head, -1)).transpose(1, 2) for name, x in logs.items()}  # (B, H, T, any)
        return {name: x.cumsum(dim=2) + last.get(name, 0) for name, x in each.items()}


def within(q, k, p):
    """The products of q and k (B, H, T, D) with exp(p_i - p_j) in every channel, p falling: (B, H, T, T), 0 for j > i.

    Blocks of 1, 2, 4 ... tokens join two by two, and the queries of the second meet the keys of the first.
    """
    T, size = q.shape[2], 1
    while size < T:
        size *= 2
    q, k, p = (torch.cat((x, x[:, :, -1:].expand(-1, -1, size - T, -1)), dim=2) for x in (q, k, p))
    blocks = (q * k).sum(-1)[..., None, None]  # (B, H, blocks, their size, their size)
    while blocks.shape[2] > 1:
        halves = [x.unflatten(2, (-1, 2, blocks.shape[-1])).unbind(dim=3) for x in (q, k, p)]
        (_, q_late), (k_early, _), (p_early, p_late) = halves
        anchor = p_early[..., -1:, :]
        corner = (q_late * (p_late - anchor).exp()) @ (k_early * (anchor - p_early).exp()).mT
        first, second = blocks.unflatten(2, (-1, 2)).unbind(dim=3)
        above = torch.cat((first, torch.zeros_like(first)), dim=-1)
        blocks = torch.cat((above, torch.cat((corner, second), dim=-1)), dim=-2)
    return blocks[:, :, 0, :T, :T]


def reflected(q, k, w, b):
    """The products of the last T tokens' q (B, H, T, D) with keys k (B, H, S, D), which all tokens from the one after
    the key to the query reflect by w (B, H, S, D) and b (B, H, S, 1): (B, H, T, S). Any number for keys after it."""
    T, S = q.shape[2], k.shape[2]
    size = min(BLOCK, S)
    k, w, b = (F.pad(x, (0, 0, 0, -S % size)).unflatten(2, (-1, size)) for x in (k, w, b))  # (B, H, blocks, size, any)
    meets = torch.ones(T, k.shape[2] * size, dtype=q.dtype, device=q.device).tril(S - T).split(size, dim=-1)
    weighed, logits = b * w, []
    on_keys, on_later = (weighed @ k.mT).tril(-1), (weighed @ w.mT).tril(-1)  # what each token takes from those before
    for block in reversed(range(k.shape[2])):
        met = (q @ w[:, :, block].mT) * meets[block]  # along each direction, 0 for tokens after the query
        met = torch.linalg.solve_triangular(on_later[:, :, block], met, upper=False, left=False, unitriangular=True)
        logits.append(q @ k[:, :, block].mT - met @ on_keys[:, :, block])
        q = q - met @ weighed[:, :, block]  # as it arrives at the block before
    return torch.cat(logits[::-1], dim=-1)[..., :S]
