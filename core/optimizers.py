"""AdamW and Muon, which parameters each of them gets, and the learning rate of every step."""

import math

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are driven to about 1, for matrices alone.

        M <- mu M + (1 - mu) G,   U = orthogonalise(G + mu (M - G))
        W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) U

    The factor gives updates the size that AdamW's have (Liu et al. 2025, "Muon is scalable", section 2.2), so that one
    learning rate serves both. Matrices of one shape are orthogonalised together, in `dtype`.
    """

    def __init__(self, matrices, lr, weight_decay, momentum, dtype=torch.float32):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, rate, momentum = group["params"], group["lr"], group["momentum"]
            gradients = [matrix.grad for matrix in matrices]
            means = [self.state[matrix].setdefault("mean", torch.zeros_like(matrix)) for matrix in matrices]
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            ahead = torch.stack(gradients).lerp(torch.stack(means), momentum)  # Nesterov's, (count, rows, columns)
            updates = orthogonalise(ahead.to(self.dtype)).to(matrices[0].dtype)
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates), alpha=-rate * 0.2 * max(matrices[0].shape) ** 0.5)


def orthogonalise(x, steps=5):
    """(count, rows, columns) -> U V^T for each x = U S V^T, nearly: singular values land in 0.67 ... 1.21.

    A Newton-Schulz iteration of degree five, with the coefficients that Jordan et al. chose for steepness at 0. Five
    steps of it multiply small values by 485: those below 1/700 of the matrix's norm stay smaller. Of random square
    matrices that is 1 % of the values at a width of 64 and 2 % at 512, of matrices twice as wide as high none.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def whole_matrices(model):
    """The blocks' matrices that multiply whole tokens. What is small or per head (tempers, gates of heads, sinks,
    convolutions) is not among them, whatever its shape."""
    names = (".weight", ".gate") if model.config.gate == "elementwise" else ".weight"
    return [p for name, p in model.blocks.named_parameters() if p.dim() == 2 and name.endswith(names)]


def make(model, config, place):
    """AdamW, or Muon for the blocks' matrices and AdamW for all else. Nothing but those matrices decays."""
    matrices = whole_matrices(model)
    known = {id(p) for p in matrices}
    rest = {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0}
    rate, decay = config.learning_rate, config.weight_decay
    adamw = {"lr": rate, "betas": (config.beta1, config.beta2), "fused": place.device.type in ("cpu", "cuda")}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, rest], **adamw)]
    # bfloat16 is enough where the hardware multiplies it, and a hundred times slower where it does not.
    dtype = torch.bfloat16 if place.dtype == torch.bfloat16 else torch.float32
    return [torch.optim.AdamW([rest], **adamw), Muon(matrices, rate, decay, config.momentum, dtype)]


def learning_rate(config, step):
    """The learning rate of a step, as a share of its peak: up, then level and down (wsd), or up and along a cosine."""
    share = (step + 0.5) / config.max_steps
    if share < config.warmup:
        return share / config.warmup
    if config.schedule == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * (share - config.warmup) / (1 - config.warmup))
    else:
        fall = min(1.0, (1 - share) / config.decay) if config.decay else 1.0
    return config.final_lr + (1 - config.final_lr) * fall
