"""`place` and `lift` of lift_place.py, the same numbers in half the memory and less time on a CPU (docs/speed.md).

Training uses these. The derivative is written by hand, so that nothing of the forward pass but a few numbers a group
is kept; and elements are sorted as integers. What they return cannot be differentiated a second time, nor by
torch.func.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import lift_place
from lift_place import Distillation

RADIX = 2**15  # from this many integers on torch sorts one row by radix on a CPU


@wraps(lift_place.place)
def place(student: Tensor, teacher: Tensor, **options: Any) -> Distillation:
    options = lift_place.place.__kwdefaults__ | options
    if options["reduction"] == "none":  # of no use in training here, so there is no fast way
        return lift_place.place(student, teacher, **options)
    student, teacher = lift_place.flatten(student, teacher, options["norm"], options["reduction"])  # (B, C, N)
    n = options.pop("group_size")
    lift_place.check_group_size(n, student.shape[-1])
    return _fit(student, teacher, _order((teacher - student).detach()), n, **options)


@wraps(lift_place.lift)
def lift(student: Tensor, teacher: Tensor, **options: Any) -> Distillation:
    options = lift_place.lift.__kwdefaults__ | options
    if options["reduction"] == "none":
        return lift_place.lift(student, teacher, **options)
    student, teacher = lift_place.flatten(student, teacher, options["norm"], options["reduction"], options.pop("per"))
    return _fit(student, teacher, None, student.shape[-1], **options)


def _order(error: Tensor) -> Tensor:
    """Indices (B, C, N) that sort each channel by |error|, as e^2 does, but nothing overflows. Overwrites `error`."""
    # floats that are not negative sort as their bits do, and integers sort faster: none of them is NaN
    key = error.abs_().view(torch.int32 if error.dtype == torch.float32 else torch.int64)  # (B, C, N)
    if key.device.type != "cpu" or key.dtype == torch.int64 or key.numel() < RADIX:
        return key.argsort(dim=-1, stable=True)
    key = key.contiguous()
    # one long row of integers is sorted by radix there: join some rows, with the row's number in front of the key
    n, order = key.shape[-1], torch.empty_like(key, dtype=torch.int64)
    together = -(-RADIX // n)
    for rows, out in zip(key.view(-1, n).split(together), order.view(-1, n).split(together), strict=True):
        row = torch.arange(len(rows))[:, None]  # (rows, 1)
        out.copy_(((row << 31) + rows).flatten().argsort(stable=True).view(rows.shape) - n * row)
    return order


def _fit(student, teacher, order, n, norm, reduction, eps, ridge, weight, coarse_weight=1.0) -> Distillation:
    """A line for each n consecutive elements of (B, C, N), taken in this order, and the loss of all lines."""
    b0, slope, fine = _Lines.apply(student, teacher, order, n, eps, ridge)
    x = (b0.abs() + slope.abs()).mean()
    coarse = x if norm == "l1" else (b0.square() + slope.square()).mean()
    w = lift_place.weigh(x, weight)
    loss = coarse_weight * coarse + w * fine
    if reduction == "sum":
        loss = loss * student[0].numel()  # C N: the sum over one sample, as the pixel-space diffusion loss is
    return Distillation(loss, coarse, fine, w.detach(), b0, 1 + slope)


class _Lines(torch.autograd.Function):
    """b0, b1 - 1 (B, C, G) and the fine loss () of all groups; with its derivative by hand, in half the memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, order: Tensor | None, n: int, eps: float, ridge: float):
        e, s = _grouped(teacher - student, order, n), _grouped(student, order, n)  # (B, C, G, n)
        e_mean, s_mean = e.mean(-1, keepdim=True), s.mean(-1, keepdim=True)  # (B, C, G, 1)
        e, s = e.sub_(e_mean), _centred(s, s_mean, order)
        n_var = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square() + n * eps  # (B, C, G, 1)
        slope = ((s * e).sum(-1, keepdim=True) + (ridge - 1) * n * eps) / n_var  # (B, C, G, 1)
        residual = e.addcmul_(s, slope, value=-1)  # (B, C, G, n), t - b0 - b1 s
        fine = torch.linalg.vector_norm(residual, dim=-1).square().mean() / n
        ctx.save_for_backward(student, teacher, order, e_mean, s_mean, n_var, slope)
        ctx.n = n
        return (e_mean - slope * s_mean).squeeze(-1), slope.squeeze(-1), fine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b0: Tensor, grad_slope: Tensor, grad_fine: Tensor):
        student, teacher, order, e_mean, s_mean, n_var, slope = ctx.saved_tensors
        grad_b0, grad_slope, b1 = grad_b0.unsqueeze(-1), grad_slope.unsqueeze(-1), 1 + slope  # (B, C, G, 1)
        # With s and e centred: d slope / ds = (e - (b1 + slope) s) / n_var, d b0 / ds = -s_mean d slope / ds - b1 / n,
        # and with b0 and b1 held fixed d fine / ds = -2 b1 (e - slope s) / (B C N). Where s is flat, n_var is as small
        # as n eps: what rounding leaves of the means is as large as the gradient then, so it is taken out again.
        line = (grad_slope - s_mean * grad_b0) / n_var  # (B, C, G, 1)
        of_t = line - grad_fine * 2 / student.numel() * b1  # (B, C, G, 1), with t = e + s
        of_s = -(of_t + line) * b1  # (B, C, G, 1)
        t = _centred(_grouped(teacher, order, ctx.n), e_mean + s_mean, order)  # (B, C, G, n)
        s = _centred(_grouped(student, order, ctx.n), s_mean, order)  # (B, C, G, n)
        grad = t.mul_(of_t).addcmul_(s, of_s)  # (B, C, G, n)
        grad = grad.sub_(grad.mean(-1, keepdim=True) + grad_b0 * b1 / ctx.n).flatten(2)  # (B, C, N)
        grad = grad if order is None else s.flatten(2).scatter_(-1, order, grad)  # back where they came from
        return grad, None, None, None, None, None


def _grouped(x: Tensor, order: Tensor | None, n: int) -> Tensor:
    """(B, C, N) in this order, and in groups of n: (B, C, G, n)."""
    return (x if order is None else x.gather(-1, order)).unflatten(-1, (-1, n))


def _centred(x: Tensor, mean: Tensor, order: Tensor | None) -> Tensor:
    """Grouped x (B, C, G, n) without this mean (B, C, G, 1); one that was put in order is a copy, and overwritten."""
    return x - mean if order is None else x.sub_(mean)
