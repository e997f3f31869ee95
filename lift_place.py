# Copyright (c) 2026 The LIFT/PLACE reference implementation authors. SPDX-License-Identifier: MIT
# One file, torch only: copy it into your project.
"""LIFT and PLACE: distillation losses that keep very small diffusion students stable (arXiv 2605.19729, CVPR 2026).

The method. Teacher output e_T and student output e_S (noise, velocity, ...) come from the same noised input. Ordinary
output distillation minimises ||e_T - e_S||^2. LIFT first asks how far a straight line through the two gets:

    b1 = cov(e_S, e_T) / var(e_S)          b0 = mean(e_T) - b1 mean(e_S)            least squares, closed form
    L_coarse = |b0| + |b1 - 1|             mean and scale disagree: few numbers, easy to learn, fatal for sampling
    L_fine   = ||e_T - (b0 + b1 e_S)||^2   what no line explains (b0, b1 detached: only e_S learns from it)
    w        = 1 - min(1, L_coarse)        detached: no fine loss until the coarse part is nearly aligned
    L_LIFT   = L_coarse + w L_fine         least at b0 = 0, b1 = 1, where e_S = e_T

PLACE does so piecewise: per sample and channel, the elements are sorted by error (e_T - e_S)^2, cut into groups of K
consecutive ones (K = 16), and each group gets a line of its own. K = H W is LIFT again. Nothing changes at inference.

    >>> import torch
    >>> from lift_place import PRESETS, lift, place
    >>> noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> student, teacher = noise.requires_grad_(), 1.2 * noise.detach() + 0.1  # a student off by a line
    >>> kd = place(student, teacher)
    >>> kd.loss.backward()  # add kd.loss to your objective
    >>> [round(part.mean().item(), 2) for part in (kd.b0, kd.b1, kd.coarse, kd.fine, kd.weight)]
    [0.1, 1.2, 0.3, 0.0, 0.7]
    >>> round(place(student, teacher, **PRESETS["tinyfusion"]).coarse.item(), 2)  # l2: 0.1^2 + 0.2^2
    0.05

The three published settings are constants of this one function (`place(student, teacher, **PRESETS[name])`; adding
`ridge=0` gives the numbers of the released code). There eps is added to a sum of squares; here to the mean, so / K.

    name           networks and data                            norm   reduction   eps       added to the objective
    diff-pruning   pruned pixel-space U-Nets: CelebA, LSUN      l1     sum         1e-7      x 1
    bk-sdm         block-pruned Stable Diffusion, latents       l1     mean        1e-8/K    x 1
    tinyfusion     depth-pruned DiT on ImageNet latents         l2     mean        1e-4/K    x 0.9
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["PRESETS", "Distillation", "adaptive", "lift", "place", "schedule"]

RADIX = 2**15  # from this many integers on torch sorts one row by radix on a CPU

Weight = float | Tensor | Callable[[Tensor], Tensor] | None

PRESETS: dict[str, dict] = {
    "diff-pruning": {"group_size": 16, "norm": "l1", "reduction": "sum", "eps": 1e-7},
    "bk-sdm": {"group_size": 16, "norm": "l1", "reduction": "mean", "eps": 1e-8 / 16},
    "tinyfusion": {"group_size": 16, "norm": "l2", "reduction": "mean", "eps": 1e-4 / 16},
}


class Distillation(NamedTuple):
    """What `lift` and `place` return: the loss, and everything worth logging. G groups per channel."""

    loss: Tensor  # (), what is added to the objective
    coarse: Tensor  # (), mean over all groups of |b0| + |b1 - 1|   (l2: b0^2 + (b1 - 1)^2)
    fine: Tensor  # (), mean over all elements of (e_T - b0 - b1 e_S)^2, b0 and b1 detached
    weight: Tensor  # (), w in [0, 1], detached
    b0: Tensor  # (B, C, G), intercept of each group, in order of growing error
    b1: Tensor  # (B, C, G), slope of each group


def place(
    student: Tensor,
    teacher: Tensor,
    *,
    group_size: int = 16,
    norm: str = "l1",
    reduction: str = "mean",
    eps: float = 1e-7,
    ridge: float = 1.0,
    weight: Weight = None,
) -> Distillation:
    """PLACE: a line for each group of elements that are equally wrong (paper, Method).

    Args:
        student: (B, C, *spatial), any number of spatial axes (image, latent, video). N = product of the spatial sizes.
        teacher: the same shape. It gets no gradient.
        group_size: K, the number of ELEMENTS in a group; must divide N. The paper uses 16.
        norm: "l1" or "l2", the distance of (b0, b1) from (0, 1). The weight w always uses l1.
        reduction: "mean", or "sum" over one sample and mean over the batch: the same loss times C N.
        eps: added to the biased variance of each group, in squared units of the outputs.
        ridge: where a slope that the data cannot determine is drawn to, b1 = (cov + ridge eps) / (var + eps): 1 is the
            identity, so that identical outputs cost exactly 0; 0 is the released code, where flat ones cost about 1.
        weight: w. None is the adaptive schedule; a number or scalar tensor fixes it (see `schedule`); a function gets
            the detached coarse l1 mean x and returns w: with several processes pass one that averages x over them,
            such as `lambda x: adaptive(all_reduce_mean(x))`, since nothing here communicates.

    Returns:
        Distillation, in float32 (float64 for float64 inputs), whatever the inputs or autocast say. It can be derived
        once, not twice.

    Raises:
        ValueError: unequal shapes, fewer than three axes, integer inputs, a group size that is below 2 or does not
            divide N, or an unknown norm or reduction.
    """
    shape = tuple(student.shape)
    student, teacher = _check(student, teacher, norm, reduction)  # (B, C, N)
    n = student.shape[-1]
    if group_size < 2 or n % group_size:
        fits = ", ".join(str(k) for k in range(2, n + 1) if n % k == 0) or "none: use more elements"
        raise ValueError(
            f"group_size {group_size} does not cut the N = {n} positions, in shape {shape}, "
            f"into equal groups of at least 2 elements; group sizes that do: {fits}"
        )
    order = _order((teacher - student).detach())  # (B, C, N)
    return _fit(student, teacher, order, group_size, norm, reduction, eps, ridge, weight)


def lift(
    student: Tensor,
    teacher: Tensor,
    *,
    per: str = "channel",
    norm: str = "l1",
    reduction: str = "mean",
    eps: float = 1e-7,
    ridge: float = 1.0,
    weight: Weight = None,
) -> Distillation:
    """LIFT: one line for each channel of each sample, or with per="sample" for each sample (paper, Method).

    Everything else is as in `place`; b0 and b1 are (B, C, 1), or (B, 1, 1) per sample.

    Raises:
        ValueError: unequal shapes, fewer than three axes, integer inputs, or an unknown per, norm or reduction.
    """
    student, teacher = _check(student, teacher, norm, reduction)  # (B, C, N)
    if per not in ("channel", "sample"):
        raise ValueError(f"per must be 'channel' or 'sample', not {per!r}")
    if per == "sample":
        student, teacher = student.flatten(1).unsqueeze(1), teacher.flatten(1).unsqueeze(1)  # (B, 1, C N)
    return _fit(student, teacher, None, student.shape[-1], norm, reduction, eps, ridge, weight)


def adaptive(x: Tensor) -> Tensor:
    """w = 1 - min(1, x) of the coarse l1 mean x: the paper's schedule (Method). x: () -> ()."""
    return 1 - x.clamp(max=1)


def schedule(kind: str, step: int, total: int) -> float | None:
    """The `weight` at one step under the schedules of the paper's ablation.

    Args:
        kind: "adaptive" (None: the loss decides), "constant" (1), "linear" or "cosine" (from 0 to 1).
        step: the optimizer steps done so far.
        total: the steps over which w grows.

    Raises:
        ValueError: an unknown kind.
    """
    p = min(max(step / max(total, 1), 0.0), 1.0)
    kinds = {"adaptive": None, "constant": 1.0, "linear": p, "cosine": 0.5 * (1 - math.cos(math.pi * p))}
    if kind not in kinds:
        raise ValueError(f"schedule must be one of {', '.join(kinds)}, not {kind!r}")
    return kinds[kind]


def _check(student: Tensor, teacher: Tensor, norm: str, reduction: str) -> tuple[Tensor, Tensor]:
    """Refuse what cannot be meant; flatten the spatial axes and widen to float32 or more: (B, C, N) each."""
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher must have the same shape (B, C, *spatial), got {shapes}")
    if student.ndim < 3:
        raise ValueError(f"outputs need at least three axes (B, C, *spatial), got {shapes}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"outputs must be floating point, got {shapes} of {student.dtype} and {teacher.dtype}")
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', not {norm!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.flatten(2).to(wide), teacher.flatten(2).to(wide)


def _order(error: Tensor) -> Tensor:
    """Indices (B, C, N) that sort each channel by |error|, as e^2 does, but nothing overflows. Overwrites `error`."""
    # floats that are not negative sort as their bits do, and integers sort faster: none of them is NaN
    key = error.abs_().view(torch.int32 if error.dtype == torch.float32 else torch.int64)  # (B, C, N)
    if key.device.type != "cpu" or key.dtype == torch.int64 or key.numel() < RADIX:
        return key.argsort(-1)
    # one long row of integers is sorted by radix there: join some rows, with the row's number in front of the key
    n, order = key.shape[-1], torch.empty_like(key, dtype=torch.int64)
    together = -(-RADIX // n)
    for rows, out in zip(key.view(-1, n).split(together), order.view(-1, n).split(together), strict=True):
        row = torch.arange(len(rows))[:, None]  # (rows, 1)
        out.copy_(((row << 31) + rows).flatten().argsort().view(rows.shape) - n * row)
    return order


def _fit(student, teacher, order, n, norm, reduction, eps, ridge, weight) -> Distillation:
    """A line for each n consecutive elements of (B, C, N), taken in this order, and the loss of all lines."""
    b0, slope, fine = _Lines.apply(student, teacher, order, n, eps, ridge)
    x = (b0.abs() + slope.abs()).mean()
    coarse = x if norm == "l1" else (b0.square() + slope.square()).mean()
    if weight is None:
        weight = adaptive
    w = weight(x.detach()) if callable(weight) else weight
    w = w.detach().to(x) if isinstance(w, Tensor) else x.new_full((), w)
    loss = coarse + w * fine
    if reduction == "sum":
        loss = loss * student[0].numel()  # C N: the sum over one sample, as the pixel-space diffusion loss is
    return Distillation(loss, coarse, fine, w, b0, 1 + slope)


class _Lines(torch.autograd.Function):
    """b0, b1 - 1 (B, C, G) and the fine loss () of all groups; with its derivative by hand, in half the memory.

    With the error e = t - s the fit of t on s reads b1 - 1 = cov(s, e) / var(s) and b0 = mean(e) - (b1 - 1) mean(s):
    the same line, without the cancellation of two nearly equal numbers when the student is good.
    """

    @staticmethod
    def forward(ctx, student, teacher, order, n, eps, ridge):
        e, s = _grouped(teacher - student, order, n), _grouped(student, order, n)  # (B, C, G, n)
        e_mean, s_mean = e.mean(-1, keepdim=True), s.mean(-1, keepdim=True)  # (B, C, G, 1)
        e, s = e.sub_(e_mean), s - s_mean
        n_var = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square() + n * eps  # (B, C, G, 1)
        slope = ((s * e).sum(-1, keepdim=True) + (ridge - 1) * n * eps) / n_var  # (B, C, G, 1)
        residual = e.addcmul_(s, slope, value=-1)  # (B, C, G, n), t - b0 - b1 s
        fine = torch.linalg.vector_norm(residual, dim=-1).square().mean() / n
        ctx.save_for_backward(student, teacher, order, e_mean, s_mean, n_var, slope)
        ctx.n = n
        return (e_mean - slope * s_mean).squeeze(-1), slope.squeeze(-1), fine

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_b0, grad_slope, grad_fine):
        student, teacher, order, e_mean, s_mean, n_var, slope = ctx.saved_tensors
        grad_b0, grad_slope, b1 = grad_b0.unsqueeze(-1), grad_slope.unsqueeze(-1), 1 + slope  # (B, C, G, 1)
        # With s and e centred: d slope / ds = (e - (b1 + slope) s) / n_var, d b0 / ds = -s_mean d slope / ds - b1 / n,
        # and with b0 and b1 held fixed d fine / ds = -2 b1 (e - slope s) / (B C N).
        line = (grad_slope - s_mean * grad_b0) / n_var  # (B, C, G, 1)
        of_e = line - grad_fine * 2 / student.numel() * b1  # (B, C, G, 1)
        of_s = -(of_e * slope + line * b1)  # (B, C, G, 1)
        rest = of_e * e_mean + of_s * s_mean + grad_b0 * b1 / ctx.n  # (B, C, G, 1)
        e, s = _grouped(teacher - student, order, ctx.n), _grouped(student, order, ctx.n)  # (B, C, G, n)
        grad = e.mul_(of_e).addcmul_(s, of_s).sub_(rest).flatten(2)  # (B, C, N)
        grad = grad if order is None else s.flatten(2).scatter_(-1, order, grad)  # back where they came from
        return grad, None, None, None, None, None


def _grouped(x: Tensor, order: Tensor | None, n: int) -> Tensor:
    """(B, C, N) in this order, and in groups of n: (B, C, G, n)."""
    return (x if order is None else x.gather(-1, order)).unflatten(-1, (-1, n))
