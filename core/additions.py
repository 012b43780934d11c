"""What settings add to attention beside an encoding: tempers, output gates, short convolutions.

**Tempers** are factors on queries that grow with the number of keys in sight, against attention that spreads over them.

    q_i <- f_i q_i,   n_i = the keys that query i sees, T the training length

n stands still in a layer with a window, and so does f. What is a function of the position alone, as its authors have
it, acts on layers without window or chunk.

    su        ln n / ln T from T on, else 1 (Su 2021, kexue.fm/archives/8823); --log_n is this one, at test time
    ssmax     s ln n, with a learned s for every head, at first 1 / ln(T/2) (Nakanishi 2025, "Scalable-softmax")
    llama4    1 + 0.1 ln(1 + floor((i + 1) / T)) (Llama 4's code, with 8,192 for T)
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


MIXED = 4  # tokens in a short convolution, a key's own among them


def parameters(config, temper, trained):
    """{name: (its shape, None for one that these settings do without; its first value)} of what a GPTConfig adds to the
    attention of a layer with that temper, T = `trained`. They begin where they change nothing; but ssmax is one at T/2
    keys alone, and the sink is one more key with a logit of 0."""
    H, C, D = config.n_head, config.n_embd, config.n_embd // config.n_head
    mixer = (MIXED, config.kv_heads, 1, D) if config.short_conv else None
    return {
        "temper": (
            {"ssmax": (H, 1, 1), "adaptive": (2 * H, C)}.get(temper),
            1 / math.log(max(2, trained / 2)) if temper == "ssmax" else 0.0,
        ),
        "qk_scale": ((H, 1, 1) if config.learn_qk_scale else None, config.qk_scale),
        "sink_logit": ((H,) if config.sink_logit else None, 0.0),
        "gate": ({"none": None, "elementwise": (C, C)}.get(config.gate, (H, C)), 0.0),
        "conv_k": (mixer, 0.0),
        "conv_v": (mixer, 0.0),
    }


def factor(kind, n, i, trained, learned=None, x=None):
    """The factor on queries, float, which broadcasts over (B, H, T, D).

    n (T,) keys in sight and i (T,) indices of the queries, both float32 or wider; trained: T; learned: as `parameters`
    has it; x (B, T, C): the input of attention.
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


def gated(y, kind, logits):
    """Attention's output y (B, T, H, D) times the gate of logits (B, T, C), or (B, T, H) for one factor a head. A logit
    of 0 makes a factor of 1: twice a sigmoid (Qiu et al. 2025), or a softplus over ln 2."""
    logits = logits.view(*y.shape[:3], -1)
    factor = F.softplus(logits) / math.log(2) if kind == "softplus" else 2 * torch.sigmoid(logits)
    return y * factor.to(y.dtype)


def mixed(x, before, weight):
    """x (B, H, T, D) plus a sum over the last MIXED tokens, each channel by itself: a depthwise causal convolution.

    before (B, H, MIXED - 1, D) are the tokens before those of x, weight (MIXED, H, 1, D) begins with the token's own.
    """
    wide, T = torch.cat((before, x), dim=2), x.shape[2]
    shifted = [wide[:, :, MIXED - 1 - m : MIXED - 1 - m + T] for m in range(MIXED)]  # m tokens before
    return x + sum(part * weight[m].to(x.dtype) for m, part in enumerate(shifted))
