"""Group normalisation for channels-last tensors on a CPU, where PyTorch's own backward takes half of a step."""

from __future__ import annotations

import torch
from torch import nn


class _GroupNorm(torch.autograd.Function):
    """The textbook formula in whole-tensor passes; statistics in float32. x: (n, positions, channels)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        n, positions, channels = x.shape
        count = positions * channels // groups
        total = x.sum(1, dtype=torch.float32).view(n, groups, -1).sum(-1)
        square = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_().view(n, groups, -1).sum(-1)
        mean = total / count
        rstd = (square / count - mean * mean).clamp_(min=0).add_(eps).rsqrt_()
        mean, rstd = (s.repeat_interleave(channels // groups, 1) for s in (mean, rstd))
        scale = rstd * weight
        shift = bias - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return (x * scale[:, None]).add_(shift[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        n, positions, channels = x.shape
        per_group = channels // ctx.groups
        count = positions * per_group
        of_x = (grad * x).sum(1, dtype=torch.float32)
        of_one = grad.sum(1, dtype=torch.float32)

        def group_sum(values):
            return values.view(n, ctx.groups, per_group).sum(-1).repeat_interleave(per_group, 1)

        slope = group_sum((of_one * mean - of_x) * weight) * rstd**3 / count
        offset = -slope * mean - group_sum(of_one * weight) * rstd / count
        grad_x = (grad * (rstd * weight)[:, None]).addcmul_(x, slope[:, None]).add_(offset[:, None])
        grad_weight = ((of_x - of_one * mean) * rstd).sum(0)
        return grad_x.to(x.dtype), grad_weight, of_one.sum(0), None, None


def _forward(module: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 4:
        return nn.functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
    n, channels, height, width = x.shape
    flat = (
        x.contiguous(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1)
        .reshape(n, height * width, channels)
    )
    y = _GroupNorm.apply(flat, module.weight, module.bias, module.num_groups, module.eps)
    return y.view(n, height, width, channels).permute(0, 3, 1, 2)


def use_fast_group_norm(model: nn.Module) -> None:
    """Make every GroupNorm of `model` use the formula above; on a GPU this does nothing."""
    if torch.cuda.is_available():
        return
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = _forward.__get__(module)
