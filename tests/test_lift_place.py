"""lift_place.py against the released code (golden numbers), against the definition, and in the ways it can be misused.

`golden/` holds a slice of numbers measured on the official code. One case is one input under one variant, K and norm;
its values are those of the official code in float64, its tensors are float64 where the official run was, else float32.
Left out, because there the official numbers are rounding noise or say nothing new: PLACE where elements of equal error
lie on both sides of a cut, so that the sort's choice decides the groups (all of regimes near_tiny and equal, and near
at 32x32: values move by 0.1 to 140 %); gradients of near_tiny and equal, where float32 is up to 100 % off float64; LIFT
at K = 64, where K is only a factor; and BK-SDM with its signature defaults, numerically the TinyFusion cases.
"""

import ast
import doctest
import json
import math
import sys
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lift_place
from lift_place import PRESETS, Distillation, adaptive, lift, place, schedule

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "loss_index.json").read_text())
VARIANTS = sorted({case["variant"] for case in INDEX["cases"]})
F32, F64 = torch.float32, torch.float64
VALUE_RTOL = {F32: 1e-4, F64: 1e-9}
GRAD_RTOL = {F32: 2e-3, F64: 1e-8}

LOSSES = {"place": partial(place, group_size=4), "lift": lift, "lift-sample": partial(lift, per="sample")}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
bounded = settings(max_examples=30, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------- the released code


@lru_cache
def tensors(name):
    return load_file(GOLDEN / f"loss_{name}.safetensors")


def golden_pair(case, dtype):
    student, teacher = (
        tensors("inputs")[f"{case['input']}/{who}"].to(dtype, copy=True) for who in ("student", "teacher")
    )
    return student.requires_grad_(), teacher


def stored(case, what):
    return tensors(case["variant"]).get(f"{case['id']}/{what}")


def replay(case, dtype, **options):
    """One golden case: the student, our result, and what turns our two means into the release's parts and total."""
    student, teacher = golden_pair(case, dtype)
    variant, k, options = case["variant"], case["K"], {"norm": case["norm"], "ridge": 0.0} | options
    channel = student[0, 0].numel()
    if variant.startswith("lift"):
        per = variant.removeprefix("lift_")
        group = channel if per == "channel" else student[0].numel()
        kd = lift(student, teacher, per=per, eps=case["eps"] / group, **options)
        # The release multiplies LIFT's coarse part by its argument P (K of the case), not by the size N of a channel,
        # so its total is no multiple of ours: the two parts are scaled apart.
        scale = len(student[0]) * k, len(student[0]) * channel
        return student, kd, scale, scale[0] * kd.coarse + scale[1] * kd.weight * kd.fine
    reduction = "sum" if variant.startswith("diffpruning") else "mean"
    # Published eps is added to a sum of squares everywhere but here; ours to the mean.
    eps = case["eps"] if variant == "diffpruning_place" else case["eps"] / k
    kd = place(student, teacher, group_size=k, eps=eps, reduction=reduction, **options)
    scale = student[0].numel() if reduction == "sum" else 1
    return student, kd, (scale, scale), kd.loss


def cases(variant):
    return [case for case in INDEX["cases"] if case["variant"] == variant]


def off(got, want, rtol, atol=0.0):
    """Whether got misses want; NaN misses. Tensors: relative in the L2 norm."""
    got, want = (torch.as_tensor(x, dtype=F64).detach() for x in (got, want))
    return not (got - want).norm() <= rtol * want.norm() + atol


@both_dtypes
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_those_of_the_release(variant, dtype):
    wrong, noise = [], max((10 * torch.finfo(dtype).eps) ** 2, 1e-22)
    for case in cases(variant):
        _, kd, scale, total = replay(case, dtype)
        # The release computes b1 and then b1 - 1, so where that is near 0 it is itself only right to 1e-16 or so;
        # fine is the square of such errors (in float32 of ours) where the teacher is a line of the student.
        slack = {"coarse": scale[0] * 1e-15, "fine": scale[1] * noise, "w": 0.0}
        slack["total"] = slack["coarse"] + slack["fine"]
        ours = {"coarse": scale[0] * kd.coarse, "fine": scale[1] * kd.fine, "total": total, "w": kd.weight}
        for name, got in ours.items():
            if off(got, case[name], VALUE_RTOL[dtype], slack[name]):
                wrong.append((case["id"], case["input"], name, got.item(), case[name]))
    assert not wrong, wrong


@both_dtypes
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_release(variant, dtype):
    wrong, compared = [], 0
    for case in cases(variant):
        student, kd, scale, total = replay(case, dtype)
        parts = {"grad_coarse": scale[0] * kd.coarse, "grad_fine": scale[1] * kd.fine, "grad_total": total}
        for name, part in parts.items():
            if (want := stored(case, name)) is None:
                continue
            (got,) = torch.autograd.grad(part, student, retain_graph=True)
            compared += 1
            if off(got, want, max(GRAD_RTOL[dtype], GRAD_RTOL[want.dtype])):
                wrong.append((case["id"], case["input"], name))
    assert compared >= 25
    assert not wrong, wrong


@both_dtypes
@pytest.mark.parametrize("variant", VARIANTS)
def test_slopes_and_intercepts_are_those_of_the_release(variant, dtype):
    wrong, compared = [], 0
    for case in cases(variant):
        if (slope := stored(case, "slope")) is None:
            continue
        intercept = stored(case, "intercept")
        _, kd, *_ = replay(case, dtype)
        rtol = max(VALUE_RTOL[dtype], VALUE_RTOL[slope.dtype])
        compared += 1
        for name, got, want in (("b1", kd.b1, slope), ("b0", kd.b0, intercept)):
            error = (got.flatten() - want.flatten()).abs()
            if not (error <= rtol * (1 + slope.abs() + intercept.abs()).flatten()).all():
                wrong.append((case["id"], case["input"], name, error.max().item()))
    assert compared >= 20
    assert not wrong, wrong


@both_dtypes
@pytest.mark.parametrize(
    ("preset", "variant", "norm"),
    [
        ("diff-pruning", "diffpruning_place", "l1"),
        ("bk-sdm", "bksdm_place", "l1"),
        ("tinyfusion", "tinyfusion_place", "l2"),
    ],
)
def test_presets_are_the_published_settings(preset, variant, norm, dtype):
    published = [case for case in cases(variant) if case["K"] == 16 and case["norm"] == norm]
    totals = {case["id"]: place(*golden_pair(case, dtype), **PRESETS[preset], ridge=0.0).loss for case in published}
    assert len(totals) >= 15
    wrong = [case["id"] for case in published if off(totals[case["id"]], case["total"], VALUE_RTOL[dtype])]
    assert not wrong, wrong


@both_dtypes
def test_ablation_weights_are_those_of_the_release(dtype):
    weights = {
        "curriculum_False": 1.0,
        "learnable_init0.3": torch.tensor(0.3),
        "cosine_step50001_of200000": schedule("cosine", 50_001, 200_000),
        "cosine_step150001_of200000": schedule("cosine", 150_001, 200_000),
        "linear_step50001_of200000": schedule("linear", 50_001, 200_000),
        "linear_step150001_of200000": schedule("linear", 150_001, 200_000),
    }
    ablations = [case for case in INDEX["cases"] if "ablation" in case]
    assert len(ablations) == 10
    for case in ablations:
        assert case["ablation"].keys() == weights.keys()
        for name, want in case["ablation"].items():
            *_, total = replay(case, dtype, weight=weights[name])
            rtol = max(VALUE_RTOL[dtype], 1e-7)  # the release keeps w in float32
            assert not off(total, want, rtol), (case["id"], name, total.item(), want)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_those_of_the_release(kind):
    for total, rows in INDEX["schedules"][kind].items():
        for step, w in rows:
            assert schedule(kind, step, int(total)) == pytest.approx(w, abs=1e-6), (total, step)


# ------------------------------------------------------------------------------------------------- the definition


def outputs(shape=(2, 3, 4, 8), seed=0, dtype=F64):
    """A student, and a teacher that partly agrees: no ties, 0 < w < 1."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, *shape, generator=generator, dtype=F64)
    return student.to(dtype), (0.9 * student + 0.2 * noise + 0.1).to(dtype)


pairs = st.builds(
    outputs, shape=st.sampled_from([(2, 3, 8), (1, 2, 4, 8), (3, 1, 8, 4), (2, 2, 2, 4, 4)]), seed=st.integers(0, 2**16)
)


def assert_same(got: Distillation, want: Distillation, rtol=1e-9, atol=1e-12):
    for name, a, b in zip(Distillation._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def by_definition(student, teacher, group_size, norm, eps, ridge):
    """PLACE as the paper writes it, one group at a time."""
    b0, b1, residual = [], [], []
    for s, t in zip(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), strict=True):
        for group in (t - s).square().argsort().split(group_size):
            x, y = s[group], t[group]
            cov = ((x - x.mean()) * (y - y.mean())).mean()
            b1.append((cov + ridge * eps) / (x.var(correction=0) + eps))
            b0.append(y.mean() - b1[-1] * x.mean())
            residual.append(y - b0[-1] - b1[-1] * x)
    b0, b1 = (torch.stack(b).view(*student.shape[:2], -1) for b in (b0, b1))
    p = 1 if norm == "l1" else 2
    coarse = (b0.abs() ** p + (b1 - 1).abs() ** p).mean()
    fine = torch.stack(residual).square().mean()
    w = 1 - min(1.0, (b0.abs().mean() + (b1 - 1).abs().mean()).item())
    return Distillation(coarse + w * fine, coarse, fine, torch.tensor(w, dtype=F64), b0, b1)


@bounded
@given(
    pairs,
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from([1e-7, 0.1]),  # 0.1: ridge shows
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_place_is_its_definition(pair, group_size, norm, eps, ridge):
    got = place(*pair, group_size=group_size, norm=norm, eps=eps, ridge=ridge)
    assert_same(got, by_definition(*pair, group_size, norm, eps, ridge))


@every_loss
@bounded
@given(pair=pairs, seed=st.integers(0, 2**16))
def test_permuting_positions_changes_nothing(loss, pair, seed):
    student, teacher = (x.flatten(2) for x in pair)
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_same(loss(student[..., order], teacher[..., order]), loss(student, teacher))


@every_loss
@bounded
@given(pair=pairs, seed=st.integers(0, 2**16))
def test_permuting_samples_permutes_only_the_lines(loss, pair, seed):
    student, teacher = pair
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    want = loss(student, teacher)
    assert_same(loss(student[order], teacher[order]), want._replace(b0=want.b0[order], b1=want.b1[order]))


@every_loss
@bounded
@given(pair=pairs, a=st.floats(0.2, 3), b=st.floats(-2, 2))
def test_a_teacher_on_a_line_of_the_student_gives_that_line_and_no_fine_loss(loss, pair, a, b):
    student, _ = pair
    kd = loss(student, a * student + b, eps=1e-20)  # sorted groups can be narrow: the default eps would show
    torch.testing.assert_close(kd.b1, torch.full_like(kd.b1, a), rtol=0, atol=1e-6)
    torch.testing.assert_close(kd.b0, torch.full_like(kd.b0, b), rtol=0, atol=1e-6)
    assert kd.coarse.item() == pytest.approx(abs(b) + abs(a - 1), abs=1e-6)
    assert kd.fine < 1e-20


@bounded
@given(pairs)
def test_one_group_of_all_positions_is_lift(pair):
    assert_same(place(*pair, group_size=pair[0][0, 0].numel()), lift(*pair))


@bounded
@given(pairs)
def test_lift_per_sample_is_least_squares_over_the_whole_sample(pair):
    kd = lift(*pair, per="sample", eps=1e-20)
    student, teacher = (x.flatten(1).unsqueeze(-1) for x in pair)  # (B, C N, 1)
    line = torch.linalg.lstsq(torch.cat([torch.ones_like(student), student], -1), teacher).solution  # (B, 2, 1)
    torch.testing.assert_close(kd.b0, line[:, :1])
    torch.testing.assert_close(kd.b1, line[:, 1:])


@every_loss
@bounded
@given(pair=pairs)
def test_sum_is_the_mean_times_the_size_of_a_sample(loss, pair):
    mean = loss(*pair)
    assert_same(loss(*pair, reduction="sum"), mean._replace(loss=mean.loss * pair[0][0].numel()))


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 4, 4, 4)], ids=["sequence", "video"])
def test_any_number_of_spatial_axes_is_the_same_loss(loss, shape):
    student, teacher = outputs(shape)
    assert_same(loss(student, teacher), loss(student.view(2, 3, 8, 8), teacher.view(2, 3, 8, 8)))


@every_loss
def test_memory_layout_does_not_matter(loss):
    student, teacher = outputs()
    assert_same(loss(student.to(memory_format=torch.channels_last), teacher), loss(student, teacher))


# ------------------------------------------------------------------------------------------------------ gradients


@every_loss
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_coarse_gradient_is_the_derivative(loss, norm, reduction):
    student, teacher = outputs((2, 2, 8))
    # w = 0, because b0 and b1 are held fixed in the fine part: there the gradient is not the derivative.
    coarse_only = partial(loss, teacher=teacher, norm=norm, reduction=reduction, weight=0.0)
    assert torch.autograd.gradcheck(lambda s: coarse_only(s).loss, student.requires_grad_())


@bounded
@given(pairs, st.sampled_from([4, 8]))
def test_the_fine_gradient_holds_the_lines_fixed(pair, group_size):
    student, teacher = (x.flatten(2) for x in pair)
    kd = place(student.requires_grad_(), teacher, group_size=group_size)
    (got,) = torch.autograd.grad(kd.fine, student)
    order = (teacher - student).square().argsort(-1)
    b0, b1 = (  # (B, C, N), for every position the line of its group
        torch.zeros_like(teacher).scatter(-1, order, b.detach().repeat_interleave(group_size, -1)) for b in kd[-2:]
    )
    torch.testing.assert_close(got, 2 * b1 * (b1 * student.detach() + b0 - teacher) / student.numel())


def by_autograd(student, teacher, order, n, eps, ridge):
    """b0, b1 and the fine loss of groups of n in this order, as one would write them first; autograd derives them."""
    s, t = (x.flatten(2).gather(-1, order).unflatten(-1, (-1, n)) for x in (student, teacher))  # (B, C, G, n)
    s_mean, t_mean = s.mean(-1), t.mean(-1)  # (B, C, G)
    cov = ((s - s_mean[..., None]) * (t - t_mean[..., None])).mean(-1)
    b1 = (cov + ridge * eps) / (s.var(-1, correction=0) + eps)
    b0 = t_mean - b1 * s_mean
    fine = (t - b0.detach()[..., None] - b1.detach()[..., None] * s).square().mean()
    return fine, b0, b1


@both_dtypes
@bounded
@given(
    pairs,
    st.sampled_from(["lift", 2, 4, 8]),
    st.sampled_from([1e-7, 0.1]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2**16),
)
def test_the_gradient_by_hand_is_that_of_autograd(dtype, pair, group_size, eps, ridge, seed):
    student, teacher = (x.to(dtype) for x in pair)
    student.requires_grad_()
    if group_size == "lift":
        group_size, order = student[0, 0].numel(), torch.arange(student[0, 0].numel()).expand(*student.shape[:2], -1)
        kd = lift(student, teacher, eps=eps, ridge=ridge)
    else:
        order = (teacher - student).detach().flatten(2).abs().argsort(-1)
        kd = place(student, teacher, group_size=group_size, eps=eps, ridge=ridge)
    got = kd.fine, kd.b0, kd.b1
    want = by_autograd(student.double(), teacher.double(), order, group_size, eps, ridge)
    # any gradient that may arrive: the loss is one function of these three, an objective of one's own another
    generator = torch.Generator().manual_seed(seed)
    arriving = [torch.randn(x.shape, generator=generator, dtype=F64) for x in want]
    (got,) = torch.autograd.grad(got, student, [x.to(dtype) for x in arriving])
    (want,) = torch.autograd.grad(want, student, arriving)
    # a group of two that nearly agree has a gradient of 1 / eps, from differences that float32 hardly resolves
    assert not off(got, want, 1e-2 if dtype == F32 else 1e-8)


@pytest.mark.parametrize("shape", [(2, 3, 128, 128), (9, 5, 33, 32), (1, 1, 2, 2**15)], ids=str)
def test_many_rows_sorted_at_once_are_in_the_order_of_each_row_alone(shape):
    student, teacher = outputs(shape, dtype=F32)
    assert student.numel() > lift_place.RADIX  # else a row is sorted alone, as on other devices
    student[:, :, 1] = teacher[:, :, 1]  # ties
    error = (teacher - student).flatten(2)
    order = lift_place._order(error.clone())
    assert torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))
    assert torch.equal(error.abs().gather(-1, order), error.abs().sort(-1).values)


@every_loss
def test_the_adaptive_weight_carries_no_gradient(loss):
    student, teacher = outputs()
    kd = loss(student.requires_grad_(), teacher)
    assert 0 < kd.weight < 1
    whole, coarse, fine = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in kd[:3])
    torch.testing.assert_close(whole, coarse + kd.weight * fine)


@every_loss
def test_only_the_student_gets_a_gradient_and_the_inputs_stay_as_they_are(loss):
    student, teacher = (x.requires_grad_() for x in outputs())
    copies = student.detach().clone(), teacher.detach().clone()
    loss(student, teacher.detach()).loss.backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


# --------------------------------------------------------------------------------------- equal, flat, half precision


channels = st.one_of(  # 8 positions of one channel: anything, flat, nearly flat
    st.lists(st.floats(-1e3, 1e3, width=16), min_size=8, max_size=8),
    st.floats(-1e3, 1e3, width=16).map(lambda value: [value] * 8),
    st.tuples(st.floats(-1, 1), st.floats(1e-8, 1e-2)).map(lambda x: [x[0] + x[1] * math.sin(i) for i in range(8)]),
)
images = st.lists(channels, min_size=2, max_size=2).map(lambda rows: torch.tensor([rows], dtype=F64))  # (1, 2, 8)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32], ids=["f16", "bf16", "f32"])


@every_loss
@all_dtypes
@bounded
@given(image=images, norm=st.sampled_from(["l1", "l2"]))
def test_identical_outputs_cost_exactly_nothing_and_pull_nowhere(loss, dtype, image, norm):
    student, teacher = image.to(dtype).requires_grad_(), image.to(dtype)
    kd = loss(student, teacher, norm=norm)
    kd.loss.backward()
    assert (kd.loss, kd.coarse, kd.fine, kd.weight) == (0, 0, 0, 1)
    assert torch.equal(student.grad, torch.zeros_like(student))


@every_loss
@pytest.mark.parametrize("ridge", [0.0, 0.5, 1.0])
def test_ridge_is_the_slope_of_a_flat_student(loss, ridge):
    flat = torch.full((1, 2, 8), 0.3)
    kd = loss(flat, flat + 0.1, ridge=ridge)
    torch.testing.assert_close(kd.b1, torch.full_like(kd.b1, ridge))
    torch.testing.assert_close(kd.b0, torch.full_like(kd.b0, 0.4 - 0.3 * ridge))


@every_loss
@all_dtypes
@bounded
@given(
    student=images,
    teacher=images,
    norm=st.sampled_from(["l1", "l2"]),
    reduction=st.sampled_from(["mean", "sum"]),
    ridge=st.sampled_from([0.0, 1.0]),
)
def test_finite_outputs_give_a_finite_loss_and_gradient(loss, dtype, student, teacher, norm, reduction, ridge):
    student = student.to(dtype).requires_grad_()
    kd = loss(student, teacher.to(dtype), norm=norm, reduction=reduction, ridge=ridge)
    kd.loss.backward()
    assert all(part.isfinite().all() for part in kd)
    # The gradient of a nearly flat group is about |error| / eps: more than the 65504 that float16 can hold.
    finite = student.grad.isnan().logical_not() if dtype == torch.float16 else student.grad.isfinite()
    assert finite.all()


@every_loss
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@all_dtypes
def test_moments_are_float32_whatever_the_inputs_and_autocast_say(loss, dtype, autocast):
    student, teacher = outputs(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kd = loss(student, teacher)
    assert {part.dtype for part in kd} == {F32}
    assert_same(kd, loss(student.float(), teacher.float()), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- the weight


@every_loss
@pytest.mark.parametrize(
    "worsen",
    [lambda t, d: t * (1 + d), lambda t, d: t / (1 + d), lambda t, d: t - d],
    ids=["too large", "too small", "shifted"],
)
def test_the_weight_falls_from_1_as_alignment_worsens(loss, worsen):
    _, teacher = outputs()
    weights = [loss(worsen(teacher, d), teacher).weight.item() for d in (0.0, 0.1, 0.3, 0.6, 0.9, 2.0)]
    assert weights[0] == 1
    assert all(0 <= worse < better for better, worse in pairwise(weights))


@pytest.mark.parametrize("x", [0.0, 0.25, 1.0, 7.0])
def test_adaptive_is_1_minus_x_down_to_0(x):
    assert adaptive(torch.tensor(x)) == max(0.0, 1 - x)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, torch.tensor(0.3), torch.tensor(0.3, dtype=F64, requires_grad=True)])
def test_a_given_weight_is_used_and_detached(loss, weight, reduction):
    student, teacher = outputs()
    kd = loss(student.requires_grad_(), teacher, weight=weight, reduction=reduction)
    assert kd.weight.item() == pytest.approx(float(torch.as_tensor(weight).detach()))
    assert kd.weight.shape == () and not kd.weight.requires_grad
    size = student[0].numel() if reduction == "sum" else 1
    torch.testing.assert_close(kd.loss, size * (kd.coarse + kd.weight * kd.fine))


@every_loss
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_weight_function_receives_the_detached_l1_mean_and_adaptive_is_the_default(loss, norm):
    student, teacher = outputs()
    seen = []

    def spy(x):
        seen.append(x)
        return adaptive(x)

    kd = loss(student.requires_grad_(), teacher, norm=norm, weight=spy)
    (x,) = seen
    assert x.shape == () and not x.requires_grad
    torch.testing.assert_close(x, (kd.b0.abs().mean() + (kd.b1 - 1).abs().mean()).detach())
    assert_same(kd, loss(student, teacher, norm=norm), rtol=0, atol=0)


def test_schedules_start_and_end_where_they_should():
    assert schedule("adaptive", 5, 10) is None
    assert [schedule("constant", step, 10) for step in (0, 5, 99)] == [1.0, 1.0, 1.0]
    for kind in ("linear", "cosine"):
        assert [schedule(kind, step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])
    with pytest.raises(ValueError, match=r"cosine.*'step'"):
        schedule("step", 5, 10)


# -------------------------------------------------------------------------------------------- use in other projects


some_weights = pytest.mark.parametrize("weight", [None, adaptive, 0.3], ids=["default", "function", "number"])


@every_loss
@some_weights
def test_it_never_waits_for_the_device(loss, weight):
    student, teacher = (x.to("meta") for x in outputs())  # without data, reading a value (.item(), if x > 0) raises
    kd = loss(student.requires_grad_(), teacher, weight=weight)
    kd.loss.backward()
    assert {part.device.type for part in kd} == {"meta"}


@every_loss
@some_weights
def test_it_compiles_as_one_graph(loss, weight):
    student, teacher = outputs(dtype=F32)
    student.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda s, t: loss(s, t, weight=weight), fullgraph=True, backend="eager")
    got, want = compiled(student, teacher), loss(student, teacher, weight=weight)
    assert_same(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(kd.loss, student)[0] for kd in (got, want)))


def test_the_examples_of_the_docstring_run():
    result = doctest.testmod(lift_place)
    assert result.attempted > 0 and result.failed == 0


def test_it_imports_torch_and_the_standard_library_only():
    nodes = list(ast.walk(ast.parse(Path(lift_place.__file__).read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


# ------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("group_size", [7, 128, 1, 0, -4])
def test_a_group_size_that_does_not_fit_is_refused_with_those_that_do(group_size):
    with pytest.raises(ValueError, match=rf"{group_size}\b.*\(1, 2, 8, 8\).*\b2, 4, 8, 16, 32, 64\b"):
        place(*outputs((1, 2, 8, 8)), group_size=group_size)


@every_loss
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 4)),
        (torch.zeros(1, 2, 8), torch.zeros(2, 2, 8)),
        (torch.zeros(16, 8), torch.zeros(16, 8)),
        (torch.zeros(1, 2, 8, dtype=torch.int64), torch.zeros(1, 2, 8, dtype=torch.int64)),
        (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, dtype=torch.uint8)),
    ],
    ids=["spatial", "batch", "two axes", "integers", "integer teacher"],
)
def test_outputs_that_cannot_be_compared_are_refused_by_their_shapes(loss, student, teacher):
    with pytest.raises(ValueError) as error:
        loss(student, teacher)
    assert str(tuple(student.shape)) in str(error.value) and str(tuple(teacher.shape)) in str(error.value)


@pytest.mark.parametrize(
    ("loss", "option", "choices"),
    [
        (place, "norm", ("l1", "l2")),
        (place, "reduction", ("mean", "sum")),
        (lift, "norm", ("l1", "l2")),
        (lift, "reduction", ("mean", "sum")),
        (lift, "per", ("channel", "sample")),
    ],
)
def test_an_unknown_option_is_refused_with_the_known_ones(loss, option, choices):
    with pytest.raises(ValueError) as error:
        loss(*outputs((1, 2, 8, 8)), **{option: "other"})
    assert all(word in str(error.value) for word in (option, "other", *choices))
