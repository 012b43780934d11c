"""RMSNorm (Zhang & Sennrich 2019), with a gradient that takes few passes over memory on the CPU."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def unit(x, eps):
    """x (..., C) / rms(x) over C, computed in float32 at least; and 1 / rms(x) (..., 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    scale = (norm.square() / x.shape[-1] + eps).rsqrt()
    y = x * scale
    # A cast that does nothing is left out: torch 2.11 loses the gradient of one when it compiles a Function.
    return (y if y.dtype == x.dtype else y.to(x.dtype)), scale


class Unit(torch.autograd.Function):
    """`unit` with its gradient: with s = 1 / rms(x) and y = s x, the gradient g of y becomes s (g - y mean(g y)). A few
    passes, where torch's own RMSNorm takes ten on the CPU (docs/log.md)."""

    @staticmethod
    def forward(ctx, x, eps):
        y, scale = unit(x, eps)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)  # the part of the gradient that would change the length
        return torch.addcmul(grad, y, along.to(y.dtype), value=-1 / y.shape[-1]).mul(scale).to(y.dtype), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.is_cuda:  # torch has a kernel for it there
            return super().forward(x)
        if torch.is_grad_enabled():
            y = Unit.apply(x, self.eps)
            return y if self.weight is None else y * self.weight
        y, _ = unit(x, self.eps)
        return y if self.weight is None else y.mul_(self.weight)  # in place, as nothing else refers to y
