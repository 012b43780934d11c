"""Tempers: factors on queries that grow with the number of keys in sight, against attention that spreads over them.

    q_i <- f_i q_i,   n_i = the keys that query i sees, T the training length

n stands still in a layer with a window, and so does f. What is a function of the position alone, as its authors have
it, acts on layers without window or chunk.

    su        ln n / ln T from T on, else 1 (Su 2021, kexue.fm/archives/8823); --log_n is this one, at test time
    ssmax     s ln n, with a learned s for every head, at first 1 / ln(T/2) (Nakanishi 2025, "Scalable-softmax", eq. 5)
    llama4    1 + 0.1 ln(1 + floor((i + 1) / T)) (Llama 4's code, with a floor of 8,192)
    inkling   1 + 0.1 ln max(1, (i + 1) / T) (Inkling's code)
    adaptive  (1 + softplus(a x) (ln (n + 1))^(2 tanh(b x))) / (1 + ln 2), with the token's x and vectors a and b that
              every head learns (Vasylenko et al. 2025, "Long-context generalization with sparse attention"; the divisor
              makes it one at first, when a and b are zero)
"""

import math

import torch
import torch.nn.functional as F

TEMPERS = ("none", "su", "ssmax", "llama4", "inkling", "adaptive")
BY_POSITION = ("llama4", "inkling")


def shape(kind, n_embd, n_head):
    """The shape of what a temper of that kind learns, or None."""
    return {"ssmax": (n_head, 1, 1), "adaptive": (2 * n_head, n_embd)}.get(kind)


def first_value(kind, trained):
    """What the numbers that it learns are at first, with T = `trained`."""
    return 1 / math.log(max(2, trained / 2)) if kind == "ssmax" else 0.0


def factor(kind, n, i, trained, learned=None, x=None):
    """The factor on queries, float, which broadcasts over (B, H, T, D).

    n (T,) keys in sight and i (T,) indices of the queries, both float32 or wider; trained: T; learned: of the `shape`
    above; x (B, T, C): the input of attention.
    """
    n, i = n[:, None], i[:, None]
    if kind == "su":
        return n.clamp(min=trained).log() / math.log(trained)
    if kind == "ssmax":
        return learned * n.log()
    if kind == "llama4":
        return 1 + 0.1 * torch.floor((i + 1) / trained).log1p()
    if kind == "inkling":
        return 1 + 0.1 * ((i + 1) / trained).clamp(min=1).log()
    a, b = F.linear(x, learned).to(n.dtype).transpose(1, 2)[..., None].chunk(2, dim=1)  # (B, H, T, 1) each
    return (1 + F.softplus(a) * (n + 1).log() ** (2 * b.tanh())) / (1 + math.log(2))
