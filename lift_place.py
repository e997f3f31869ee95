# Copyright (c) 2026 The LIFT/PLACE reference implementation authors. SPDX-License-Identifier: MIT
# One file, torch only (Python 3.11, torch 2.7 or newer): copy it into your project.
"""LIFT and PLACE: distillation losses that keep very small diffusion students stable (arXiv 2605.19729, CVPR 2026).

The method. Teacher output e_T and student output e_S (noise, velocity, ...) come from the same noised input. Ordinary
output distillation minimises ||e_T - e_S||^2. LIFT first asks how far a straight line through the two gets:

    b1 = cov(e_S, e_T) / var(e_S)          b0 = mean(e_T) - b1 mean(e_S)            least squares, closed form
    L_coarse = |b0| + |b1 - 1|             mean and scale disagree: few numbers, easy to learn, fatal for sampling
    L_fine   = mean (e_T - b0 - b1 e_S)^2  what no line explains (b0, b1 detached: only e_S learns from it)
    w        = 1 - min(1, L_coarse)        detached: no fine loss until the coarse part is nearly aligned
    L_LIFT   = L_coarse + w L_fine         least, 0, only where e_S = e_T

PLACE does so piecewise: per sample and channel, the elements are sorted by error (e_T - e_S)^2, cut into groups of K
consecutive ones (K = 16), and each group gets a line of its own. K = H W is LIFT again. Nothing changes at inference.
The paper writes squared norms; as in the released code both terms are means, or with reduction="sum" C N times that.

Begin with a student whose output varies, pruned or pretrained, and clip the gradient: where a group has the standard
deviation d the coarse gradient grows as 1 / d^2. An output layer of zeros counts as slope 1, so w starts near 1 and the
next gradient is thousands of times as large: train such a student on the squared error first.

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
`ridge=0` gives the numbers of the released code). The last two publish an eps for the sum over a group; here it is
added to the mean, hence / K. For another K give group_size and eps. The paper's rows add a loss between features, too.

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

__all__ = ["PRESETS", "Distillation", "adaptive", "lift", "place", "schedule"]

Weight = float | Tensor | Callable[[Tensor], Tensor] | None

PRESETS: dict[str, dict] = {
    "diff-pruning": {"norm": "l1", "reduction": "sum", "eps": 1e-7},
    "bk-sdm": {"norm": "l1", "reduction": "mean", "eps": 1e-8 / 16},
    "tinyfusion": {"norm": "l2", "reduction": "mean", "eps": 1e-4 / 16},
}


class Distillation(NamedTuple):
    """What `lift` and `place` return: the loss, and everything worth logging (`.detach()` it). G groups per channel."""

    loss: Tensor  # (), or (B,) for reduction="none": what is added to the objective
    coarse: Tensor  # (), mean over all groups of |b0| + |b1 - 1|   (l2: b0^2 + (b1 - 1)^2)
    fine: Tensor  # (), mean over all elements of (e_T - b0 - b1 e_S)^2, b0 and b1 detached
    weight: Tensor  # (), w in [0, 1] or what the caller gave, detached
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
            Axis 1 is channels: transpose features (B, L, D), unpatchify a transformer's output, put the frames of a
            video behind its channels, and leave a learned variance out.
        teacher: the same shape. It gets no gradient.
        group_size: K, the number of ELEMENTS in a group; must divide N. The paper uses 16.
        norm: "l1" or "l2", the distance of (b0, b1) from (0, 1). The weight w always uses l1. The gradient of "l1"
            is as large for a good student as for a bad one; that of "l2" vanishes as the squared error's does.
        reduction: "mean"; "sum" over one sample and mean over the batch, the same loss times C N; or "none", one loss
            per sample, whose mean is "mean", to be multiplied by weights that depend on the timestep.
        eps: added to the biased variance of each group, in squared units of the outputs (1e-7: of about 1).
        ridge: where a slope that the data cannot determine is drawn to, b1 = (cov + ridge eps) / (var + eps): 1 is the
            identity, so that identical outputs cost exactly 0; 0 is the released code, where flat ones cost 1 or more.
        weight: w of the whole batch. None is the adaptive schedule; a number or scalar tensor fixes it (see
            `schedule`); a function gets the detached coarse l1 mean x and returns w. Nothing here communicates: with
            several processes, or parts of a batch, pass one that takes the mean of x (not of w) over them, such as
            `lambda x: adaptive(all_reduce_mean(x))`. A tensor that requires a gradient gets one, as in the paper's
            ablation: make it the sigmoid of a parameter, for its gradient, fine, only ever pushes it down.

    Returns:
        Distillation, in float32 (float64 for float64 inputs), whatever the inputs or autocast say.

    Raises:
        ValueError: no tensors, a gradient of the teacher alone, unequal shapes, fewer than three axes, an empty tensor,
            integer inputs, a group size that is below 2 or does not divide N, an unknown norm or reduction, or a weight
            of more than one element.
    """
    student, teacher = flatten(student, teacher, norm, reduction)  # (B, C, N)
    check_group_size(group_size, student.shape[-1])
    order = (teacher - student).detach().abs().argsort(dim=-1, stable=True)  # (B, C, N), sorts as the square does
    s, t = (x.gather(-1, order).unflatten(-1, (-1, group_size)) for x in (student, teacher))  # (B, C, G, K)
    return _fit(s, t, norm, reduction, eps, ridge, weight)


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
    coarse_weight: float = 1.0,
) -> Distillation:
    """LIFT: one line for each channel of each sample, or with per="sample" for each sample (paper, Method).

    Everything else is as in `place`; b0 and b1 are (B, C, 1), or (B, 1, 1) per sample.

    Args:
        coarse_weight: multiplies the coarse term. 1 is the paper's equation. The released LIFT multiplies it by its
            group-size argument (16 or 32) where the sum over N elements would give N: 16 / N or 32 / N is that code.
    """
    student, teacher = flatten(student, teacher, norm, reduction, per)  # (B, C, N), or (B, 1, C N) per sample
    return _fit(student.unsqueeze(2), teacher.unsqueeze(2), norm, reduction, eps, ridge, weight, coarse_weight)


def _fit(s, t, norm, reduction, eps, ridge, weight, coarse_weight=1.0) -> Distillation:
    """The least-squares line of t on s in each group of (B, C, G, K), and the loss of all lines."""
    # With the error e = t - s the fit reads b1 - 1 = cov(s, e) / var(s) and b0 = mean(e) - (b1 - 1) mean(s): the same
    # line, without the cancellation of two nearly equal numbers when the student is good.
    e = t.detach() - s  # (B, C, G, K)
    e_mean, s_mean = e.mean(-1, keepdim=True), s.mean(-1, keepdim=True)  # (B, C, G, 1)
    centred = s - s_mean  # (B, C, G, K), kept once for the backward pass
    cov, var = ((centred * x).mean(-1, keepdim=True) for x in (e - e_mean, centred))  # (B, C, G, 1)
    slope = (cov + (ridge - 1) * eps) / (var + eps)  # (B, C, G, 1), b1 - 1
    b0 = e_mean - slope * s_mean  # (B, C, G, 1)

    residual = e - b0.detach() - slope.detach() * s  # (B, C, G, K), t - b0 - b1 s
    fine = residual.square().mean((1, 2, 3))  # (B,)
    l1 = (b0.abs() + slope.abs()).mean((1, 2, 3))  # (B,)
    coarse = l1 if norm == "l1" else (b0.square() + slope.square()).mean((1, 2, 3))  # (B,)
    w = weigh(l1.mean(), weight)
    loss = coarse_weight * coarse + w * fine  # (B,)
    if reduction != "none":
        loss = loss.mean() * (s[0].numel() if reduction == "sum" else 1)  # C N: what the sum over one sample would be
    return Distillation(loss, coarse.mean(), fine.mean(), w.detach(), b0.squeeze(-1), 1 + slope.squeeze(-1))


def adaptive(x: Tensor) -> Tensor:
    """w = 1 - min(1, x) of the coarse l1 mean x: the paper's schedule (Method). x: () -> ()."""
    return 1 - x.clamp(max=1)


def weigh(x: Tensor, weight: Weight) -> Tensor:
    """w () of the coarse l1 mean x (), as `weight` says; ValueError for one of more than one element."""
    w = adaptive if weight is None else weight
    if isinstance(w, str):
        raise ValueError(f"weight must be a number or a function, not {w!r}: schedule({w!r}, step, total) gives one")
    w = w(x.detach().clone()) if callable(w) else w  # a copy, for reducing over processes works in place
    w = x.new_full((), w) if isinstance(w, (float, int)) else torch.as_tensor(w)  # as_tensor would make a GPU wait
    if w.numel() != 1:
        raise ValueError(f"weight must be a number, not {tuple(w.shape)}: weights of samples go with reduction='none'")
    return w.to(x).reshape(())


def schedule(kind: str, step: int, total: int) -> float | None:
    """The `weight` at one step under the schedules of the paper's ablation; ValueError for an unknown kind.

    Args:
        kind: "adaptive" (None: the loss decides), "constant" (1), "linear" or "cosine" (from 0 to 1).
        step: the optimizer steps done so far.
        total: the steps over which w grows.
    """
    p = min(max(step / max(total, 1), 0.0), 1.0)
    kinds = {"adaptive": None, "constant": 1.0, "linear": p, "cosine": 0.5 * (1 - math.cos(math.pi * p))}
    if kind not in kinds:
        raise ValueError(f"schedule must be one of {', '.join(kinds)}, not {kind!r}")
    return kinds[kind]


def flatten(student: Tensor, teacher: Tensor, norm: str, reduction: str, per: str = "channel") -> tuple[Tensor, Tensor]:
    """Refuse what cannot be meant; flatten the spatial axes and widen to float32 or more: (B, C, N) each."""
    for name, output in (("student", student), ("teacher", teacher)):
        if not isinstance(output, Tensor):
            raise ValueError(f"{name} must be a tensor, not a {type(output).__name__}: give what the network predicts")
    if torch.is_grad_enabled() and teacher.requires_grad and not student.requires_grad:
        raise ValueError("a gradient of the teacher alone: the order is (student, teacher); detach the teacher")
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(f"outputs need the same shape, of at least three axes (B, C, *spatial), got {shapes}")
    if student.numel() == 0:
        raise ValueError(f"outputs must hold at least one element, got {shapes}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"outputs must be floating point, got {shapes} of {student.dtype} and {teacher.dtype}")
    known = {"norm": ("l1", "l2"), "reduction": ("mean", "sum", "none"), "per": ("channel", "sample")}
    for name, given in (("norm", norm), ("reduction", reduction), ("per", per)):
        if given not in known[name]:
            raise ValueError(f"{name} must be one of {', '.join(known[name])}, not {given!r}")
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.flatten(2).to(wide), teacher.flatten(2).to(wide)  # (B, C, N)
    if per == "sample":
        return student.flatten(1).unsqueeze(1), teacher.flatten(1).unsqueeze(1)  # (B, 1, C N)
    return student, teacher


def check_group_size(group_size: int, n: int) -> None:
    """ValueError unless n elements can be cut into groups of this size, of at least 2."""
    if group_size < 2 or n % group_size:
        fits = ", ".join(str(k) for k in range(2, n + 1) if n % k == 0) or "none: use more elements"
        raise ValueError(
            f"group_size {group_size} does not cut N = {n} into equal groups of 2 or more; sizes that do: {fits}"
        )
