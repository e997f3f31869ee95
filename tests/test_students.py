"""A network in training: features and their losses, adapters, precision, weight average, what a checkpoint keeps."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import a_unet as small_unet
from conftest import same

import train
from distil.settings import Settings
from distil.students import (
    Student,
    Tapped,
    autocast,
    feature_loss,
    find_dtype,
    layer_map,
    masked_feature_loss,
    mean_feature_loss,
    predict,
    tap,
    tap_like,
    timed,
)
from models import DiT, prune_channels, prune_depth

CPU = torch.device("cpu")
a_unet = functools.partial(small_unet, attention_resolutions=(4,))
X, T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 500])


def a_dit(depth: int) -> DiT:
    torch.manual_seed(0)
    return DiT(8, 2, 1, 16, depth, 2, num_classes=3)


def a_student(method: str, net=None, teacher=None, **changes) -> Student:
    settings = Settings(kd=(method,), **changes)
    return Student(settings, train.resolve(settings, method), settings.seeds[0], net or a_unet(), teacher)


# ---- Features --------------------------------------------------------------------------------------------------------


def test_features_are_the_outputs_of_the_named_layers_in_the_order_in_which_they_run():
    net, order, outputs = a_unet(), [], []
    names = {net.get_submodule(name): name for name in net.feature_layers()}

    def note(layer, inputs, output):
        order.append(names[layer])
        outputs.append(output)

    for layer in names:
        layer.register_forward_hook(note)
    tapped = Tapped(net)
    output, features = predict(tapped, X, T, {})
    assert order == tapped.names and len(order) == 14 and same(features, outputs)
    assert same(output, net(X, T))
    assert same(Tapped(net, tapped.names[::-1])(X, T)[1], features[::-1]) and predict(net, X, T, {})[1] == []
    with pytest.raises(AttributeError, match="nothing"):
        Tapped(net, ["mid.nothing"])
    with pytest.raises(ValueError, match="3 widths"):
        Tapped(net, adapters_to=[8, 8, 8])


def test_forwards_do_not_disturb_each_other():
    net, inner = a_unet(), []
    tapped, other = Tapped(net, adapters_to=net.feature_channels(net.feature_layers())), Tapped(net, ["mid.block_1"])
    expected = tapped(X, T)[1]
    assert len(other(X, T)[1]) == 1
    with pytest.raises(ValueError, match="x_t"):
        tapped(X[..., :7], T)
    assert tapped.recorder.outputs is None and other.recorder.outputs is None  # nothing of a call stays behind

    def once_more(*_):
        handle.remove()
        inner.append(tapped(2 * X, T)[1])

    handle = net.mid.attn_1.register_forward_hook(once_more)  # a forward within a forward
    assert same(tapped(X, T)[1], expected) and not same(inner[0], expected)
    twin = copy.deepcopy(tapped)
    torch.nn.init.zeros_(twin.net.conv_in.weight)
    assert not same(twin(X, T)[1], expected) and same(tapped(X, T)[1], expected)


def test_a_tapped_network_compiles_in_one_graph():
    tapped = Tapped(a_unet(channel_mults=(1,), attention_resolutions=()), adapters_to=[16] * 6)
    compiled = torch.compile(tapped, backend="eager", fullgraph=True)
    for scale in (1, 2):  # the second call must not see the first one's features
        torch.testing.assert_close(compiled(scale * X, T), tapped(scale * X, T))


def test_the_published_feature_losses_by_hand():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 5, 4, generator=generator) for _ in range(3)] for _ in range(2))
    student[1][0, 0, 0] = 1e4  # a massive activation

    def masked(h):
        flat = h.reshape(len(h), -1).numpy()
        far = np.abs(flat - flat.mean(1, keepdims=True)) >= 2 * flat.std(1, ddof=1, keepdims=True)
        return np.where(far, 0, flat)

    pairs = list(zip(student, teacher, strict=True))
    squares = [((s - t) ** 2).numpy() for s, t in pairs]
    assert feature_loss(student, teacher).item() == pytest.approx(sum(x.sum() / 2 for x in squares), rel=1e-5)
    assert mean_feature_loss(student, teacher).item() == pytest.approx(sum(x.mean() for x in squares), rel=1e-5)
    expected = np.mean([((masked(s) - masked(t)) ** 2).mean() for s, t in pairs])
    assert masked_feature_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5) and expected < 10
    images = [[h.unflatten(1, (5, 1)) for h in side] for side in (student, teacher)]  # (B, C, H, W), as those of U-Nets
    assert masked_feature_loss(*images).item() == pytest.approx(expected, rel=1e-5)
    for loss in (feature_loss, mean_feature_loss, masked_feature_loss):
        s, t = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
        loss([s], [t]).backward()
        assert s.grad.abs().sum() > 0 and t.grad is None


def test_layer_maps_are_the_published_ones():
    assert layer_map(14, 28) == [2 * i + 1 for i in range(14)] and layer_map(7, 28) == [4 * i + 3 for i in range(7)]
    assert layer_map(7, 14) == [2 * i + 1 for i in range(7)]
    assert layer_map(4, 28) == [1, 8, 15, 22] and layer_map(4, 7) == [1, 3, 4, 6]
    with pytest.raises(ValueError, match="cannot be mapped"):
        layer_map(5, 4)
    for student, teacher in itertools.combinations_with_replacement(range(1, 13), 2):
        chosen = layer_map(student, teacher)
        assert len(set(chosen)) == student and chosen == sorted(chosen) and chosen[-1] < teacher


def test_features_get_adapters_where_channels_were_pruned_or_widths_differ():
    teacher, last = a_unet(), slice(-1, None)
    cases = ((0.5, slice(None), True, 14), (0.0, slice(None), True, 14), (0.5, last, False, 1), (0.0, last, False, 0))
    for ratio, taps, adapt, adapters in cases:
        net = prune_channels(teacher, ratio)
        theirs, ours = tap(teacher, net, taps), tap_like(net, tap(teacher, net, taps), taps, adapt)
        assert ours.names == theirs.names == teacher.feature_layers()[taps] and len(ours.adapters or ()) == adapters
        assert [f.shape for f in ours(X, T)[1]] == [f.shape for f in theirs(X, T)[1]]
        for adapter in ours.adapters or ():
            assert adapter.bias is None and adapter.kernel_size == (1, 1) and adapter.weight.abs().max() <= 0.005
    dit = a_dit(6)
    theirs = tap(dit, prune_depth(dit, 2), slice(None))
    ours = tap_like(prune_depth(dit, 2), theirs, slice(None), True)
    assert (theirs.names, ours.names, ours.adapters) == (["blocks.2", "blocks.5"], ["blocks.0", "blocks.1"], None)


# ---- Students --------------------------------------------------------------------------------------------------------


def test_the_precision_of_the_networks(monkeypatch):
    dtypes = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in dtypes.items():
        assert find_dtype(Settings(precision=name), CPU) == dtype
        with autocast(Settings(precision=name), CPU):
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    cuda = torch.device("cuda")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert find_dtype(Settings(), cuda) == dtype and find_dtype(Settings(precision="fp32"), cuda) == torch.float32
    assert a_student("none", precision="fp16").scaler.is_enabled() and not a_student("none").scaler.is_enabled()


def test_adapters_learn_but_are_neither_clipped_nor_averaged_nor_saved():
    teacher = a_unet()
    net = prune_channels(teacher, 0.5)
    tapped, weights = tap(teacher, net, slice(None)), copy.deepcopy(net.state_dict())
    given = {"lr": 1e-2, "warmup": 0, "clip": 1e-12, "lambda_feat": 1.0}
    student = a_student("feat", net, tapped, **given)
    before = [adapter.weight.clone() for adapter in student.model.adapters]
    output, features = predict(student.parallel, X, T, {})
    (student.kd.features(features, tapped(X, T)[1], 64) + output.square().sum()).backward()
    assert train.update(Settings(**given), student, 0, torch.zeros(())) > 1e-3  # the norm before clipping
    assert all((a.weight - b).abs().max() > 1e-3 for a, b in zip(student.model.adapters, before, strict=True))
    assert all((p - weights[name]).abs().max() < 1e-5 for name, p in net.named_parameters())  # these are clipped
    assert student.ema.state_dict().keys() == weights.keys() and all(p.grad is None for p in teacher.parameters())
    assert a_student("none", a_unet(), tapped).model.state_dict().keys() == teacher.state_dict().keys()
    assert {group["weight_decay"] for group in a_student("out", weight_decay=0.3).optimizer.param_groups} == {0.3}


def test_the_average_warms_up_then_keeps_its_rate():
    settings, student = Settings(ema=0.5, steps=100), a_student("none", ema=0.5, steps=100)
    expected = student.ema.conv_in.weight.clone()
    assert torch.equal(expected, student.net.conv_in.weight) and student.net.training and not student.ema.training
    for at in range(20):
        student.net.conv_in.weight.grad = torch.ones_like(student.net.conv_in.weight)
        train.update(settings, student, at, torch.zeros(()))
        rate = min(0.5, (1 + at) / (10 + at))
        expected = rate * expected + (1 - rate) * student.net.conv_in.weight.detach()
    torch.testing.assert_close(student.ema.conv_in.weight, expected)


def test_a_run_may_go_on_on_a_device_where_weights_lie_otherwise_in_memory():
    def learn(student, at):
        torch.manual_seed(at)
        for p in student.model.parameters():
            p.grad = torch.randn_like(p)
        train.update(Settings(), student, at, torch.zeros(()))

    first, usual, other = (a_student("out", a_unet()) for _ in range(3))
    learn(first, 0)
    state = first.state()
    usual.restore(copy.deepcopy(state))
    for moments in state["optimizer"]["state"].values():  # as a GPU leaves them
        for name, moment in moments.items():
            if moment.ndim == 4:
                moments[name] = moment.to(memory_format=torch.channels_last)
    other.restore({**state, "scaler": {}})
    learn(usual, 1)
    learn(other, 1)
    assert same(usual.state(), other.state())


def test_the_seconds_of_a_gpu_are_those_between_its_marks(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1500
            self.at = Event.clock

        def synchronize(self):
            pass

        def elapsed_time(self, other):  # milliseconds
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    one, two = a_student("out", a_unet()), a_student("none", a_unet())
    one.device = two.device = torch.device("cuda")
    for group in ((one,), (one, two)):
        with timed(*group):
            pass
    assert (one.seconds, two.seconds) == (3.0, 1.5) == (one.seconds, two.seconds)


def test_a_state_brings_everything_back_and_has_the_keys_of_earlier_checkpoints(tmp_path):
    teacher = a_unet()
    tapped = tap(teacher, teacher, slice(None))
    student, other = (a_student("feat", a_unet(), tapped, seeds=(seed,), fold_steps=None) for seed in (0, 1))
    student.seconds = 2.5
    for p in student.model.parameters():
        p.grad = torch.ones_like(p)
    train.update(Settings(), student, 0, torch.zeros(()))
    state = student.state()
    assert list(state) == ["seconds", "bad", "stopped", "module", "ema", "optimizer", "scaler"]
    assert {name.split(".")[0] for name in state["module"]} == {"net", "adapters"}
    torch.save(state, tmp_path / "state.pt")
    assert not same(other.state(), state)
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(other.state(), state) and other.name == "feat-1"
    adapters = [a_student("feat", a_unet(), tapped, seeds=(seed,)).model.adapters[0].weight for seed in (0, 0, 1)]
    assert same(adapters[0], adapters[1]) and not same(adapters[0], adapters[2])  # drawn from the student's seed
