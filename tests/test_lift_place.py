"""lift_place.py against the released code (golden numbers), against the definition, and in the ways it can be misused.

distil/fast_loss.py takes the same tests: `every_loss` is both functions of both files.

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
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lift_place
from distil import fast_loss
from lift_place import PRESETS, Distillation, adaptive, schedule

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "loss_index.json").read_text())
VARIANTS = sorted({case["variant"] for case in INDEX["cases"]})
F32, F64 = torch.float32, torch.float64
VALUE_RTOL = {F32: 1e-4, F64: 1e-9}
GRAD_RTOL = {F32: 2e-3, F64: 1e-8}

FILES = {"plain": lift_place, "fast": fast_loss}
LOSSES = {
    f"{name} {what}": loss
    for name, file in FILES.items()
    for what, loss in {
        "place": partial(file.place, group_size=4),
        "lift": file.lift,
        "lift by sample": partial(file.lift, per="sample"),
    }.items()
}
both_files = pytest.mark.parametrize("file", FILES.values(), ids=FILES)
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
bounded = settings(max_examples=20, deadline=None, derandomize=True, database=None)


# ---- the released code -----------------------------------------------------------------------------------------------


@lru_cache
def tensors(name):
    return load_file(GOLDEN / f"loss_{name}.safetensors")


def golden_pair(case, dtype):
    named = (tensors("inputs")[f"{case['input']}/{who}"] for who in ("student", "teacher"))
    student, teacher = (x.to(dtype, copy=True) for x in named)
    return student.requires_grad_(), teacher


def replay(file, case, dtype, **options):
    """One golden case: the student, our result, and the factors of the release's coarse and fine part."""
    student, teacher = golden_pair(case, dtype)
    variant, k, options = case["variant"], case["K"], {"norm": case["norm"], "ridge": 0.0} | options
    if variant.startswith("lift"):
        per, n = variant.removeprefix("lift_"), student[0, 0].numel()
        # The release multiplies LIFT's coarse part by its argument P (K of the case), not by the size N of a channel.
        eps = case["eps"] / (n if per == "channel" else student[0].numel())
        kd = file.lift(student, teacher, per=per, eps=eps, reduction="sum", coarse_weight=k / n, **options)
        return student, kd, (len(student[0]) * k, len(student[0]) * n)
    reduction = "sum" if variant.startswith("diffpruning") else "mean"
    # Published eps is added to a sum of squares everywhere but here; ours to the mean.
    eps = case["eps"] if variant == "diffpruning_place" else case["eps"] / k
    kd = file.place(student, teacher, group_size=k, eps=eps, reduction=reduction, **options)
    scale = student[0].numel() if reduction == "sum" else 1
    return student, kd, (scale, scale)


def cases(variant):
    return [case for case in INDEX["cases"] if case["variant"] == variant]


def off(got, want, rtol, atol=0.0):
    """Whether got misses want; NaN misses. Tensors: relative in the L2 norm."""
    got, want = (torch.as_tensor(x, dtype=F64).detach() for x in (got, want))
    return not (got - want).norm() <= rtol * want.norm() + atol


@both_files
@both_dtypes
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_lines_are_those_of_the_release(variant, dtype, file):
    wrong, gradients, lines = [], 0, 0
    noise = max((10 * torch.finfo(dtype).eps) ** 2, 1e-22)
    for case in cases(variant):
        student, kd, (of_coarse, of_fine) = replay(file, case, dtype)
        parts = {"coarse": of_coarse * kd.coarse, "fine": of_fine * kd.fine, "total": kd.loss}
        # The release computes b1 and then b1 - 1, so where that is near 0 it is itself only right to 1e-16 or so;
        # fine is the square of such errors (in float32 of ours) where the teacher is a line of the student.
        slack = {"coarse": of_coarse * 1e-15, "fine": of_fine * noise, "w": 0.0}
        slack["total"] = slack["coarse"] + slack["fine"]
        for name, got in {**parts, "w": kd.weight}.items():
            if off(got, case[name], VALUE_RTOL[dtype], slack[name]):
                wrong.append((case["id"], case["input"], name, got.item(), case[name]))

        stored = {what: tensors(variant).get(f"{case['id']}/{what}") for what in ("slope", "intercept")}
        for name, part in parts.items():
            if (want := tensors(variant).get(f"{case['id']}/grad_{name}")) is not None:
                gradients += 1
                (got,) = torch.autograd.grad(part, student, retain_graph=True)
                if off(got, want, max(GRAD_RTOL[dtype], GRAD_RTOL[want.dtype])):
                    wrong.append((case["id"], case["input"], f"grad_{name}"))
        if stored["slope"] is not None:
            lines += 1
            slope, intercept = stored["slope"].flatten(), stored["intercept"].flatten()
            near = max(VALUE_RTOL[dtype], VALUE_RTOL[slope.dtype]) * (1 + slope.abs() + intercept.abs())
            for name, got, want in (("b1", kd.b1, slope), ("b0", kd.b0, intercept)):
                if not ((got.flatten() - want).abs() <= near).all():
                    wrong.append((case["id"], case["input"], name))
    assert gradients >= 25 and lines >= 20
    assert not wrong, wrong


@both_files
@both_dtypes
@pytest.mark.parametrize(
    ("preset", "variant", "norm"),
    [
        ("diff-pruning", "diffpruning_place", "l1"),
        ("bk-sdm", "bksdm_place", "l1"),
        ("tinyfusion", "tinyfusion_place", "l2"),
    ],
)
def test_presets_are_the_published_settings(preset, variant, norm, dtype, file):
    published = [case for case in cases(variant) if case["K"] == 16 and case["norm"] == norm]
    options = {**PRESETS[preset], "ridge": 0.0}
    totals = {case["id"]: file.place(*golden_pair(case, dtype), **options).loss for case in published}
    assert len(totals) >= 15
    wrong = [case["id"] for case in published if off(totals[case["id"]], case["total"], VALUE_RTOL[dtype])]
    assert not wrong, wrong


@both_files
@both_dtypes
def test_ablation_weights_are_those_of_the_release(dtype, file):
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
            total = replay(file, case, dtype, weight=weights[name])[1].loss
            rtol = max(VALUE_RTOL[dtype], 1e-7)  # the release keeps w in float32
            assert not off(total, want, rtol), (case["id"], name, total.item(), want)


def test_schedules_are_those_of_the_release_and_end_where_they_should():
    for kind in ("linear", "cosine"):
        for total, rows in INDEX["schedules"][kind].items():
            for step, w in rows:
                assert schedule(kind, step, int(total)) == pytest.approx(w, abs=1e-6), (total, step)
        assert [schedule(kind, step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])
    assert schedule("adaptive", 5, 10) is None
    assert [schedule("constant", step, 10) for step in (0, 5, 99)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"adaptive, constant, linear, cosine, not 'step'"):
        schedule("step", 5, 10)


# ---- the definition --------------------------------------------------------------------------------------------------


def outputs(shape=(2, 3, 4, 8), seed=0, dtype=F64):
    """A student, and a teacher that partly agrees: no ties, 0 < w < 1."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, *shape, generator=generator, dtype=F64)
    return student.to(dtype), (0.9 * student + 0.2 * noise + 0.1).to(dtype)


SHAPES = [(2, 3, 8), (1, 2, 4, 8), (3, 1, 8, 4), (2, 2, 2, 4, 4)]
pairs = st.builds(outputs, shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**16))


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


@both_files
@bounded
@given(
    pairs,
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from([1e-7, 0.1]),  # 0.1: ridge shows
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_place_is_its_definition(file, pair, group_size, norm, eps, ridge):
    got = file.place(*pair, group_size=group_size, norm=norm, eps=eps, ridge=ridge)
    assert_same(got, by_definition(*pair, group_size, norm, eps, ridge))


@every_loss
@bounded
@given(pair=pairs, seed=st.integers(0, 2**16))
def test_permuting_positions_changes_nothing_and_permuting_samples_permutes_the_lines(loss, pair, seed):
    student, teacher = (x.flatten(2) for x in pair)
    want, generator = loss(student, teacher), torch.Generator().manual_seed(seed)
    order = torch.randperm(student.shape[-1], generator=generator)
    assert_same(loss(student[..., order], teacher[..., order]), want)
    order = torch.randperm(len(student), generator=generator)
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


@both_files
@bounded
@given(pair=pairs)
def test_lift_is_one_group_of_all_positions_and_per_sample_it_is_least_squares(file, pair):
    assert_same(file.place(*pair, group_size=pair[0][0, 0].numel()), file.lift(*pair))
    kd = file.lift(*pair, per="sample", eps=1e-20)
    student, teacher = (x.flatten(1).unsqueeze(-1) for x in pair)  # (B, C N, 1)
    line = torch.linalg.lstsq(torch.cat([torch.ones_like(student), student], -1), teacher).solution  # (B, 2, 1)
    torch.testing.assert_close(kd.b0, line[:, :1])
    torch.testing.assert_close(kd.b1, line[:, 1:])


@every_loss
@bounded
@given(pair=pairs, norm=st.sampled_from(["l1", "l2"]))
def test_reductions_are_the_same_loss_of_a_sample_in_other_units(loss, pair, norm):
    mean = loss(*pair, norm=norm)
    assert_same(loss(*pair, norm=norm, reduction="sum"), mean._replace(loss=mean.loss * pair[0][0].numel()))
    none = loss(*pair, norm=norm, reduction="none")
    assert none.loss.shape == pair[0].shape[:1]
    assert_same(none._replace(loss=none.loss.mean()), mean)
    # each is the loss of its sample alone, under the weight of the whole batch
    alone = [loss(s[None], t[None], norm=norm, weight=mean.weight).loss for s, t in zip(*pair, strict=True)]
    torch.testing.assert_close(none.loss, torch.stack(alone))


@pytest.mark.parametrize("per", ["channel", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@both_files
def test_the_coarse_weight_of_lift_multiplies_the_coarse_part_alone(file, reduction, per):
    pair = outputs()
    one, half = (file.lift(*pair, per=per, reduction=reduction, coarse_weight=c) for c in (1.0, 0.5))
    coarse_only = file.lift(*pair, per=per, reduction=reduction, weight=0.0)
    assert_same(half, one._replace(loss=one.loss - 0.5 * coarse_only.loss))


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 4, 4, 4)], ids=["sequence", "video"])
def test_spatial_axes_and_memory_layout_do_not_matter(loss, shape):
    student, teacher = outputs(shape)
    image = student.view(2, 3, 8, 8), teacher.view(2, 3, 8, 8)
    assert_same(loss(student, teacher), loss(*image))
    assert_same(loss(image[0].to(memory_format=torch.channels_last), image[1]), loss(*image))


# ---- gradients -------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_coarse_gradient_is_the_derivative(loss, norm, reduction):
    student, teacher = outputs((2, 2, 8))
    # w = 0, because b0 and b1 are held fixed in the fine part: there the gradient is not the derivative.
    coarse_only = partial(loss, teacher=teacher, norm=norm, reduction=reduction, weight=0.0)
    assert torch.autograd.gradcheck(lambda s: coarse_only(s).loss, student.requires_grad_())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name.startswith("plain")])
def test_the_plain_file_has_second_derivatives(loss):
    student, teacher = outputs((1, 2, 8))
    smooth = partial(LOSSES[loss], teacher=teacher, norm="l2", weight=0.0, eps=0.1)
    assert torch.autograd.gradgradcheck(lambda s: smooth(s).loss, student.requires_grad_())


@every_loss
def test_only_the_student_gets_a_gradient_none_through_the_weight_and_the_inputs_stay(loss):
    student, teacher = (x.requires_grad_() for x in outputs())
    copies = student.detach().clone(), teacher.detach().clone()
    kd = loss(student, teacher)
    assert 0 < kd.weight < 1
    whole, coarse, fine = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in kd[:3])
    torch.testing.assert_close(whole, coarse + kd.weight * fine)
    kd.loss.backward()
    assert student.grad.norm() > 0 and teacher.grad is None
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


# ---- equal, flat, half precision -------------------------------------------------------------------------------------


channels = st.one_of(  # 8 positions of one channel: anything, flat, nearly flat
    st.lists(st.floats(-1e3, 1e3, width=16), min_size=8, max_size=8),
    st.floats(-1e3, 1e3, width=16).map(lambda value: [value] * 8),
    st.tuples(st.floats(-1, 1), st.floats(1e-8, 1e-2)).map(lambda x: [x[0] + x[1] * math.sin(i) for i in range(8)]),
)
images = st.lists(channels, min_size=2, max_size=2).map(lambda rows: torch.tensor([rows], dtype=F64))  # (1, 2, 8)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32], ids=["f16", "bf16", "f32"])
norms, reductions = st.sampled_from(["l1", "l2"]), st.sampled_from(["mean", "sum", "none"])


@every_loss
@all_dtypes
@bounded
@given(image=images, norm=norms)
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
@given(student=images, teacher=images, norm=norms, reduction=reductions, ridge=st.sampled_from([0.0, 1.0]))
def test_finite_outputs_give_a_finite_loss_and_gradient(loss, dtype, student, teacher, norm, reduction, ridge):
    student = student.to(dtype).requires_grad_()
    kd = loss(student, teacher.to(dtype), norm=norm, reduction=reduction, ridge=ridge)
    kd.loss.sum().backward()
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


# ---- the weight ------------------------------------------------------------------------------------------------------


WEIGHTS = [0.0, 0.3, 1.0, torch.tensor(0.3), torch.full((1, 1), 0.3), torch.tensor(0.3, dtype=F64, requires_grad=True)]


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_given_weight_is_used_and_learned_where_it_requires_it(loss, weight, reduction):
    student, teacher = outputs()
    kd = loss(student.requires_grad_(), teacher, weight=weight, reduction=reduction)
    assert kd.weight.item() == pytest.approx(float(torch.as_tensor(weight).detach()))
    assert kd.weight.shape == () and not kd.weight.requires_grad
    size = student[0].numel() if reduction == "sum" else 1
    torch.testing.assert_close(kd.loss, size * (kd.coarse + kd.weight * kd.fine))
    if torch.is_tensor(weight) and weight.requires_grad:  # a learned w
        (gradient,) = torch.autograd.grad(kd.loss, weight)
        torch.testing.assert_close(gradient, (size * kd.fine).detach().to(gradient))


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
    for value in (0.0, 0.25, 1.0, 7.0):
        assert adaptive(torch.tensor(value)) == max(0.0, 1 - value)


@every_loss
def test_a_weight_function_may_write_into_what_it_gets(loss):
    """As reductions over processes do; the coarse part that is returned stays that of this one."""
    student, teacher = outputs()
    assert loss(student, teacher, weight=lambda x: adaptive(x.zero_())).coarse == loss(student, teacher).coarse > 0


# ---- use in other projects, and misuse -------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("weight", [None, adaptive, 0.3], ids=["default", "function", "number"])
def test_it_compiles_as_one_graph_and_never_waits_for_the_device(loss, weight):
    student, teacher = outputs(dtype=F32)
    student.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda s, t: loss(s, t, weight=weight), fullgraph=True, backend="eager")
    got, want = compiled(student, teacher), loss(student, teacher, weight=weight)
    assert_same(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(kd.loss, student)[0] for kd in (got, want)))

    student, teacher = (x.detach().to("meta") for x in (student, teacher))  # reading a value there (.item()) raises
    kd = loss(student.requires_grad_(), teacher, weight=weight)
    kd.loss.backward()
    assert {part.device.type for part in kd} == {"meta"}


def test_the_examples_run_and_it_imports_torch_and_the_standard_library_only():
    result = doctest.testmod(lift_place)
    assert result.attempted > 0 and result.failed == 0
    nodes = list(ast.walk(ast.parse(Path(lift_place.__file__).read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


X, FEW = torch.zeros(1, 2, 8, 8), [str(k) for k in (2, 4, 8, 16, 32, 64)]
TWO = torch.tensor([0.1, 0.9])
REFUSED = {  # which functions, student, teacher, options, what the sentence says
    "the order": ("place lift", X, X.clone().requires_grad_(), {}, ["the order is (student, teacher)"]),
    "an object": ("place lift", X, [X], {}, ["teacher must be a tensor, not a list"]),
    "the name of a schedule": ("place lift", X, X, {"weight": "cosine"}, ["schedule('cosine', step, total) gives one"]),
    "spatial axes": ("place lift", X, X[..., :4], {}, ["same shape", "(1, 2, 8, 8)", "(1, 2, 8, 4)"]),
    "batches": ("place lift", X, X.expand(2, -1, -1, -1), {}, ["same shape", "(1, 2, 8, 8)", "(2, 2, 8, 8)"]),
    "two axes": ("place lift", X[0, 0], X[0, 0], {}, ["three axes", "(8, 8)"]),
    "no sample": ("place lift", X[:0], X[:0], {}, ["at least one element", "(0, 2, 8, 8)"]),
    "no position": ("place lift", X[..., :0], X[..., :0], {}, ["at least one element", "(1, 2, 8, 0)"]),
    "integers": ("place lift", X.long(), X.long(), {}, ["floating point", "torch.int64"]),
    "integer teacher": ("place lift", X, X.to(torch.uint8), {}, ["floating point", "torch.uint8"]),
    "norm": ("place lift", X, X, {"norm": "other"}, ["norm", "'other'", "l1", "l2"]),
    "reduction": ("place lift", X, X, {"reduction": "other"}, ["reduction", "'other'", "mean", "sum", "none"]),
    "per": ("lift", X, X, {"per": "other"}, ["per", "'other'", "channel", "sample"]),
    "two weights": ("place lift", X, X, {"weight": TWO}, ["weight must be a number", "(2,)"]),
    "two from a function": ("place lift", X, X, {"weight": lambda x: TWO}, ["weight must be a number", "(2,)"]),
    **{f"K {k}": ("place", X, X, {"group_size": k}, [f"group_size {k} ", "N = 64", *FEW]) for k in (7, 128, 1, 0, -4)},
    "prime N": ("place", X[..., :1, :7], X[..., :1, :7], {}, ["group_size 16 ", "N = 7", "that do: 7"]),
    "N of 1": ("place", X[..., :1, :1], X[..., :1, :1], {}, ["N = 1", "use more elements"]),
}


@both_files
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(name, file):
    functions, student, teacher, options, words = REFUSED[name]
    for function in functions.split():
        with pytest.raises(ValueError) as error:
            getattr(file, function)(student, teacher, **options)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
