"""distil/fast_loss.py against lift_place.py on numbers of every kind; test_lift_place.py runs its tests on both."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lift_place import F32, F64, assert_same, bounded, off, outputs, pairs

import lift_place
from distil import fast_loss

WAYS = {  # name of the function, its own options
    "place 2": ("place", {"group_size": 2}),
    "place 8": ("place", {"group_size": 8}),
    "lift": ("lift", {"per": "channel"}),
    "lift, less coarse": ("lift", {"per": "channel", "coarse_weight": 0.25}),
    "lift by sample": ("lift", {"per": "sample"}),
}
every_way = pytest.mark.parametrize(("function", "options"), WAYS.values(), ids=WAYS)


def gradients(kd, student, seed):
    """Those of the loss, of anything that may be made of the other results, and of a loss that uses only some."""
    generator = torch.Generator().manual_seed(seed)
    results = [kd.coarse, kd.fine, kd.b0, kd.b1]
    arriving = [torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype) for x in results]
    objectives = [(kd.loss.sum(), None), (results, arriving), (kd.b1.square().sum(), None), (kd.fine, None)]
    return [torch.autograd.grad(what, student, given, retain_graph=True)[0] for what, given in objectives]


@every_way
@bounded
@given(
    pair=pairs,
    norm=st.sampled_from(["l1", "l2"]),
    reduction=st.sampled_from(["mean", "sum"]),
    eps=st.sampled_from([1e-7, 0.1]),
    ridge=st.sampled_from([0.0, 1.0]),
    weight=st.sampled_from([None, 0.3]),
    flat=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_both_files_agree_to_the_last_digits_of_float64(function, options, pair, flat, seed, **given):
    student, teacher = pair
    if flat:  # one channel of each sample; with such groups gradients are of the size 1 / eps
        student[:, -1] = 0.3
    student.requires_grad_()
    results = [getattr(file, function)(student, teacher, **options, **given) for file in (lift_place, fast_loss)]
    assert_same(*results, rtol=1e-9, atol=1e-9 if flat else 1e-12)
    for want, got in zip(*(gradients(kd, student, seed) for kd in results), strict=True):
        assert not off(got, want, 1e-7, 1e-12)


def of_all_errors(shape, seed, unit=64):
    """Numbers whose errors in a channel are all different, k / unit of either sign; bfloat16 holds them exactly."""
    generator, n = torch.Generator().manual_seed(seed), shape[2:].numel()
    order = torch.rand(*shape[:2], n, generator=generator).argsort(-1)
    error = (order + 1) / unit * (torch.randint(0, 2, order.shape, generator=generator) * 2 - 1)
    student = torch.randint(-64, 65, order.shape, generator=generator) / 64
    return student.view(shape), (student + error).view(shape)


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 3, 4, 8), (2, 3, 2, 4, 4)], ids=["1-D", "2-D", "3-D"])
def test_both_files_agree_in_every_precision_and_number_of_axes(function, options, dtype, shape):
    for seed in range(3):
        student, teacher = (x.to(dtype) for x in of_all_errors(torch.Size(shape), seed))
        assert (teacher.double() - student.double()).abs().flatten(2).sort(-1).values.diff().min() > 0  # no ties
        student[:, 1] = 0.25  # flat
        teacher[:, 1] = teacher[:, 1] if seed else 0.5  # both
        student.requires_grad_()
        # the default eps would give gradients beyond the largest float16 where the student is flat
        results = [getattr(file, function)(student, teacher, eps=1e-3, **options) for file in (lift_place, fast_loss)]
        assert {part.dtype for kd in results for part in kd} == {F64 if dtype == F64 else F32}
        assert_same(*results, rtol=1e-4, atol=1e-5)
        for want, got in zip(*(gradients(kd, student, seed) for kd in results), strict=True):
            assert got.dtype == dtype and not off(got, want, max(1e-4, 4 * torch.finfo(dtype).eps), 1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 128, 128), (9, 5, 33, 32), (1, 1, 2, 2**15), (2, 3, 8)], ids=str)
def test_rows_sorted_together_are_in_the_order_of_each_row_alone(shape):
    student, teacher = outputs(shape, dtype=F32)
    assert (student.numel() >= fast_loss.RADIX) == (shape != (2, 3, 8))  # fewer are sorted as on other devices
    student[:, -1, ..., ::2] = teacher[:, -1, ..., ::2]  # ties
    error = 50 * (teacher - student).flatten(2)  # from far below to far above 1
    order = fast_loss._order(error.clone())
    assert torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))
    assert torch.equal(order, error.abs().argsort(dim=-1, stable=True))  # ties in the order in which they lie

    student, teacher = of_all_errors(torch.Size(shape), 0, unit=2**17)
    results = [file.place(student.requires_grad_(), teacher, group_size=8) for file in (lift_place, fast_loss)]
    assert_same(*results, rtol=1e-4, atol=1e-5)
    want, got = (torch.autograd.grad(kd.loss, student)[0] for kd in results)
    assert not off(got, want, 1e-4)


def test_elements_that_are_equally_wrong_keep_their_order_in_both_files():
    student = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    teacher = (student + torch.randn(student.shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    student = student.bfloat16().requires_grad_()
    assert (teacher - student).abs().flatten(2).sort(-1).values.diff().eq(0).sum() > 10_000  # bfloat16 has few numbers
    results = [file.place(student, teacher) for file in (lift_place, fast_loss)]
    assert_same(*results, rtol=1e-4, atol=1e-5)


@every_way
def test_it_says_that_it_has_no_second_derivative(function, options):
    student, teacher = outputs()
    kd = getattr(fast_loss, function)(student.requires_grad_(), teacher, **options)
    (first,) = torch.autograd.grad(kd.loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_way
def test_it_keeps_less_for_the_backward_pass(function, options):
    kept = {}
    for file in (lift_place, fast_loss):
        student, teacher = (x.clone() for x in outputs((2, 3, 32, 32), dtype=F32))
        inputs, storages = {student.data_ptr(), teacher.data_ptr()}, {}

        def keep(x, inputs=inputs, storages=storages):
            if x.data_ptr() not in inputs:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            kd = getattr(file, function)(student.requires_grad_(), teacher, **options)
            kd.loss.backward()
        kept[file] = sum(storages.values())
    assert kept[fast_loss] < 0.7 * kept[lift_place], kept


def test_the_two_files_offer_the_same_arguments():
    for name in ("place", "lift"):
        assert inspect.signature(getattr(fast_loss, name)) == inspect.signature(getattr(lift_place, name))


def test_outputs_that_lie_in_memory_as_on_a_gpu_are_taken():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2))
    found = fast_loss.place(*(x.to(memory_format=torch.channels_last) for x in (student, teacher)))
    assert student.numel() >= fast_loss.RADIX
    for one, other in zip(found, fast_loss.place(student, teacher), strict=True):
        torch.testing.assert_close(one, other)


@every_way
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_both_files_agree_where_the_variance_is_that_of_rounding(function, options, noise):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (level + noise * torch.randn(2, 2, 8, 8, generator=generator) for level in (0.3, 0.7))
        results = [
            getattr(file, function)(student.requires_grad_(), teacher, **options) for file in (lift_place, fast_loss)
        ]
        want, got = (torch.autograd.grad(kd.loss, student)[0] for kd in results)
        assert want.norm() > 0 and not off(got, want, 1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_both_files_agree_where_an_image_has_one_pixel(norm):
    student, teacher = (torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    results = [file.lift(student.requires_grad_(), teacher, norm=norm) for file in (lift_place, fast_loss)]
    want, got = (torch.autograd.grad(kd.loss, student)[0] for kd in results)
    assert want.abs().min() > 0 and not off(got, want, 1e-5)
