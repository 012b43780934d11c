"""Logits that depend on what the tokens say: biases by content, and rules in place of q k / sqrt(D).

The hook is `logits(pairs)`: all of the logits (B, H, T, S), from queries, keys, their positions, what `state(x, last)`
keeps for every token beside its key, and what `asks(x)` gives to queries alone. It gives up the fused kernel, which
computes q k / sqrt(D) and no more. `values(weights, pairs)` is the output of attention, to which shaw adds.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from core.encoding import Encoding, along_heads, distances
from posenc import sinusoids, slopes
from zoo.absolute import rows_beyond
from zoo.biases import Kerple


class Shaw(Encoding):
    """Learned vectors for clipped distances, added to keys and to values (Shaw et al. 2018, equations 3 and 4).

        e_ij = q_i (k_j + aK[c]) / sqrt(D),  z_i = sum_j alpha_ij (v_j + aV[c]),  c = min(n, K)

    Shared by the heads of a layer; 2 (K + 1) D parameters a layer, as causal attention meets one direction only.
    Queries meet the table and not a T x T x D tensor of keys. Past T all far keys count as K away, a distance that
    training met all the time: the loss rises slowly, as attention spreads over more of them. `with_values=False`
    leaves aV out. Trap: this clipped table is often sold as Transformer-XL's. `inkling` is what became of it.
    """

    name = "shaw"
    standing = "history"
    arguments = {"clip": 16, "with_values": True}
    relative = True
    variants = ("shaw(with_values=False)",)

    def setup(self):
        self.require(self.clip >= 1, f"clip must be at least 1, not {self.clip}")
        self.key = nn.Parameter(torch.empty(self.clip + 1, self.head_dim))
        self.value = nn.Parameter(torch.empty(self.clip + 1, self.head_dim)) if self.with_values else None

    def logits(self, pairs):
        row = distances(pairs.i, pairs.j).clamp(max=self.clip)
        return super().logits(pairs) + by_row(pairs.q * self.head_dim**-0.5, self.key.to(pairs.q.dtype), row)

    def values(self, weights, pairs):
        read = super().values(weights, pairs)
        if not self.with_values:
            return read
        row = distances(pairs.i, pairs.j).clamp(max=self.clip).expand_as(weights)
        of_rows = weights.new_zeros(*weights.shape[:3], self.clip + 1).scatter_add(-1, row, weights)
        return read + of_rows @ self.value.to(weights.dtype)  # the weights of a row's keys, summed, times the row


class TransformerXL(Encoding):
    """Transformer-XL's relative attention: fixed sinusoids of the distance, and four terms (Dai et al. 2019, sec. 3.3).

        (q_i k_j + q_i W r_n + u k_j + v W r_n) / sqrt(D),  r_n the sinusoid of n,  u, v learned for every head

    C^2 + 2 C parameters a layer; values are untouched. Train it with `--segments`, which reads a window segment by
    segment over the hidden states of the segment before (their gradient stopped): that, and not the bias, carried
    the paper's long contexts. Past T the projected sinusoids meet new phases, and the loss rises slowly. Traps: it is
    not a clipped table of 2 R + 1 rows, which is Shaw's; and W r depends on the weights alone, so decoding keeps it.
    """

    name = "transformer_xl"
    standing = "history"
    arguments = {"base": 10000.0}
    relative = True

    def setup(self):
        self.require(self.n_embd % 2 == 0, f"n_embd must be even, not {self.n_embd}")
        self.require(self.base > 1, f"base must be above 1, not {self.base}")
        self.project = nn.Linear(self.n_embd, self.n_head * self.head_dim, bias=False)
        self.u = nn.Parameter(torch.empty(self.n_head, 1, self.head_dim))
        self.v = nn.Parameter(torch.empty(self.n_head, 1, self.head_dim))

    def table(self, rows, device):
        """(rows, C): the projected sinusoids of all distances."""
        with torch.autocast(device.type, enabled=False):
            wave = sinusoids(torch.arange(rows, device=device), self.n_embd, self.base, self.project.weight.dtype)
            return self.project(wave)

    def logits(self, pairs):
        n, q = distances(pairs.i, pairs.j), pairs.q
        rows = rows_beyond(n[-1, 0], self.train_length)
        table = self.once_per_weights((rows,), lambda: self.table(rows, n.device)).to(q.dtype)
        table = table.unflatten(-1, (self.n_head, -1)).transpose(0, 1)  # (H, rows, D)
        q = q * self.head_dim**-0.5
        u, v = (x.to(q.dtype) * self.head_dim**-0.5 for x in (self.u, self.v))
        return (q + u) @ pairs.k.transpose(-2, -1) + by_row(q + v, table, n)


class CoPE(Encoding):
    """Contextual position encoding: keys are counted only if a gate opens on them (Golovneva et al. 2024, section 4).

        g_ij = sigmoid(q_i k_j / sqrt(D)),  p_ij = sum_{t=j..i} g_it,  b_ij = q_i e[p_ij], between rows for fractions

    p is at most M - 1, M = `max_position`. M D parameters a layer, starting at zero; and two gathers of B H T S
    elements, so it is slow. It counts words or lines where the content says so. Past T the gates, summed over more
    keys, push far keys to the last row together, which training met: the loss rises slowly. Positions themselves
    are never used. Trap: another CoPE, Clipped RoPE (Li et al. 2026), is rope's `clip`.
    """

    name = "cope"
    standing = "control"
    positionless = True
    arguments = {"max_position": 64}
    chunk = 32
    relative = True

    def setup(self):
        self.require(self.max_position >= 2, f"max_position must be at least 2, not {self.max_position}")
        self.weight = nn.Parameter(torch.empty(self.max_position, self.head_dim))

    def logits(self, pairs):
        logits = super().logits(pairs).masked_fill(~pairs.seen, -math.inf)
        gate = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        p = gate.sum(-1, keepdim=True) - gate.cumsum(-1) + gate  # the sum from j on
        p = p.clamp(0, self.max_position - 1)
        low = p.detach().long()
        at = pairs.q @ self.weight.to(pairs.q.dtype).T  # (B, H, T, max_position)
        step = F.pad(at.diff(dim=-1), (0, 1))
        return logits + torch.addcmul(at.gather(-1, low), p - low, step.gather(-1, low))


class FoX(Encoding):
    """Forgetting attention: a gate of every token lets what lies before it fade (Lin et al. 2025, section 3).

        b_ij = sum_{t=j+1..i} ln f_t = F_i - F_j,  f_t = sigmoid(w_h x_t + b_h)

    H (C + 1) parameters a layer. The cache keeps the running sum F beside the keys. Past T what is far has been
    forgotten, as in alibi, but by decisions of the content: the loss stays flat. Positions themselves are never
    used. Traps: F in half precision loses the small differences that matter (float32 has them to F / 2^24, and
    F grows with the text); and sinks are forgotten like anything else. Cable (arXiv 2503.08067) is the same formula: it
    adds up -softplus(w x), which is ln sigmoid(-w x).
    """

    name = "fox"
    standing = "alive"
    positionless = True
    relative = True

    def setup(self):
        self.gate = nn.Linear(self.n_embd, self.n_head)

    def state(self, x, last):
        with torch.autocast(x.device.type, enabled=False):
            forget = F.logsigmoid(self.gate(x.to(self.gate.weight.dtype)))  # (B, T, H)
            return {"total": forget.transpose(1, 2)[..., None].cumsum(dim=2) + last.get("total", 0)}

    def logits(self, pairs):
        return super().logits(pairs) + (pairs.own["total"] - pairs.state["total"].mT)


class Inkling(Encoding):
    """Relative logits: every token says how it looks at each distance, up to an extent (Thinking Machines 2026, code).

        b = (W_h x_i) P[n]  for n < E,  else 0

    W_h x has `width` numbers for every head; the E profiles P are shared by the heads. C H width + E width parameters a
    layer, P starting at zero; the bias costs what shaw's does, and its numbers belong to the queries, so the cache
    keeps nothing more. Past E there is none, and only content is left, by construction. `extent` E is T/2 unless given:
    the model has 1024 over everything, and in layers with a window of 512 just that. A row past T would never be
    trained. It is meant for normalised queries and keys. Traps: the bias is not divided by sqrt(D), and the product of
    q and k by D there (qk_scale = 1/sqrt(D) here); and a temper sharpens the bias with it.
    """

    name = "inkling"
    standing = "alive"
    arguments = {"width": 16, "extent": 0}
    relative = True

    def setup(self):
        self.extent = self.extent or max(1, self.train_length // 2)
        self.require(self.width >= 1 and self.extent >= 1, "width and extent must be at least 1")
        self.project = nn.Linear(self.n_embd, self.n_head * self.width, bias=False)
        self.profile = nn.Parameter(torch.empty(self.extent, self.width))

    def asks(self, x):
        relative = F.linear(x, self.project.weight.to(x.dtype))
        return {"relative": relative.unflatten(-1, (self.n_head, self.width)).transpose(1, 2)}

    def logits(self, pairs):
        row = distances(pairs.i, pairs.j).clamp(max=self.extent)
        relative = pairs.own["relative"] if pairs.temper is None else pairs.own["relative"] * pairs.temper
        table = F.pad(self.profile, (0, 0, 0, 1)).to(relative.dtype)  # a last row of zeros, for all that is farther
        return super().logits(pairs) + by_row(relative, table, row)


class GrapeA(Encoding):
    """GRAPE-A: alibi, whose slopes queries and keys decide (Zhang et al. 2025, arXiv 2512.07805).

        b = -n m_h softplus(o_h) (softplus(v_h q_i / sqrt(D)) + softplus(u_h k_j / sqrt(D))),  m_h alibi's slopes

    u, v are of length one, whatever the parameters, which start from N(0, 1/D); softplus(o) starts at 1. H (2D + 1)
    parameters a layer. At first it is about alibi times 1.4. The cost is that of a few sums of B H T S elements. Past T
    far keys fade as in alibi, but no key can refuse to: the factor is never zero. Trap: half precision would merge
    slopes times distances, so both are in float32. A temper changes the queries, and with them the slopes.
    """

    name = "grape_a"
    standing = "alive"
    relative = True

    def setup(self):
        self.register_buffer("slope", torch.tensor(slopes(self.n_head, "authors")), persistent=False)
        self.strength = nn.Parameter(torch.empty(self.n_head))
        self.u, self.v = (nn.Parameter(torch.empty(self.n_head, self.head_dim, 1)) for _ in range(2))

    def init_parameter(self, name, parameter, generator):
        if name == "strength":
            parameter.fill_(math.log(math.e - 1))
        else:
            parameter.normal_(std=self.head_dim**-0.5, generator=generator)

    def logits(self, pairs):
        slope = along_heads(self.slope * F.softplus(self.strength), pairs.seen)
        rate = self.rate(pairs.q, self.v) + self.rate(pairs.k, self.u).mT  # (B, H, T, S)
        return super().logits(pairs) - slope * distances(pairs.i, pairs.j) * rate

    def rate(self, x, direction):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(direction.dtype) * self.head_dim**-0.5
            return F.softplus(x @ F.normalize(direction, dim=1))  # (B, H, T, 1)


class DAPE(Kerple):
    """Data-adaptive biases: a network over all heads changes logits and biases together (Zheng et al. 2024, section 3).

        S + B + MLP([S ; B]),  S = q k^T / sqrt(D),  B the bias of kerple,  the MLP 2H -> 32 -> H with leaky ReLU

    applied to every pair of query and key: about 100 H parameters a layer, and a tensor of B 32 T S elements, which
    makes it the slowest here. Past T it keeps what kerple gives and corrects it by content. In float16 all of it is
    computed in float32, and so is the power form in bfloat16: powers are soon beyond 65,504, and beside large ones
    eight bits would lose the logit.
    """

    name = "dape"
    standing = "history"
    arguments = Kerple.arguments | {"width": 32}
    chunk = 64
    variants = ()

    def setup(self):
        super().setup()
        self.require(self.width >= 1, f"width must be at least 1, not {self.width}")
        self.inner, self.outer = nn.Linear(2 * self.n_head, self.width), nn.Linear(self.width, self.n_head)
        self.too_narrow = (torch.float16, torch.bfloat16) if self.form == "power" else (torch.float16,)

    def logits(self, pairs):
        if pairs.q.dtype in self.too_narrow:
            with torch.autocast(pairs.q.device.type, enabled=False):
                return self.logits(replace(pairs, q=pairs.q.float(), k=pairs.k.float()))
        s = (pairs.q * self.head_dim**-0.5) @ pairs.k.transpose(-2, -1)  # (B, H, T, S)
        b = self.bias(pairs.i, pairs.j)  # (H, T, S)
        on_s, on_b = self.inner.weight.chunk(2, dim=1)  # (width, H) each; the part of B is the same for all sequences
        from_b = on_b @ b.flatten(1) + self.inner.bias[:, None]
        into, out = (weight.to(s.dtype).expand(len(s), -1, -1) for weight in (on_s, self.outer.weight))
        hidden = torch.baddbmm(from_b.to(s.dtype), into, s.flatten(2))  # (B, width, T S)
        mixed = torch.bmm(out, F.leaky_relu(hidden)).view_as(s) + self.outer.bias[:, None, None]
        return s + b + mixed


def by_row(x, table, row):
    """x (B, H, T, D), table (rows, D) or (H, rows, D), row (T, S) -> (B, H, T, S): x times the row named there."""
    products = x @ table.mT  # (B, H, T, rows)
    return products.gather(-1, row.expand(*x.shape[:2], -1, -1))


class StickBreaking(Encoding):
    """Stick-breaking attention: going back, each key takes a share of what the nearer ones left (Tan et al. 2024,
    arXiv 2410.17980).

        w_ij = sigmoid(s_ij) prod_{j < t < i} (1 - sigmoid(s_it)),  s_ij = q_i k_j / sqrt(D),  w_ii = what is left

    No parameters, and no position: among keys that look alike the nearest wins. `rest="nowhere"` drops what is left, as
    the authors' reference does; giving it to the query's own token is the default of the models they trained. Computed
    as sums of logarithms in float32; costs the fused kernel. Past T more keys change nothing for a head that has spent
    its stick, so the loss stays flat. Traps: 1 minus the sum of the weights is rounding once the stick is short, where
    the sum of logarithms is exact; and a plain running product underflows, and has no gradient then.
    """

    name = "stick_breaking"
    standing = "alive"
    arguments = {"rest": ("own", "nowhere")}
    relative = True
    positionless = True  # The order of the keys is their nearness; positions only tell which one is the query's own.

    def weights(self, logits, parts):
        (pairs,) = parts
        own = pairs.i[:, None] == pairs.j
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(own, -math.inf)
        left = F.logsigmoid(-logits)  # what a key leaves of the stick it is given, as a logarithm: 0 if it is not seen
        given = F.pad(left[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        weights = (F.logsigmoid(logits) + given).exp()
        return torch.where(own, left.sum(-1, keepdim=True).exp(), weights) if self.rest == "own" else weights
