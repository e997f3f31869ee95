"""The U-Net and the DiT against the published ones, pruning against published sizes and choices, saving, loading."""

import copy
import hashlib
import json
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from conftest import same
from safetensors.torch import load_file, save_file
from torch import nn

from distil.metrics import macs, parameters
from distil.process import Guided
from models import (
    FILES,
    DiT,
    Network,
    UNet,
    correct,
    fingerprint,
    group_widths,
    load,
    load_checkpoint,
    lonely_norms,
    prune_channels,
    prune_depth,
    regroup,
    statistics,
    timestep_embedding,
    uniform_blocks,
    usual_groups,
)

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = json.loads((GOLDEN / "unet_configs.json").read_text())
PRUNED = json.loads((GOLDEN / "pruned_widths.json").read_text())
TAYLOR = json.loads((GOLDEN / "taylor_kept.json").read_text())
PUBLISHED = {
    "celeba": {"image_size": 64, "dropout": 0.1},
    "cifar10": {"image_size": 32, "channel_mults": (1, 2, 2, 2), "dropout": 0.1},
    "bedroom": {"image_size": 256, "channel_mults": (1, 1, 2, 2, 4, 4)},
}
TINY = {"image_size": 16, "channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
SMALL = {**TINY, "image_size": 8, "in_channels": 1, "norm_groups": 8, "attention_resolutions": (4,)}
SMALL_DIT = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3, "depth": 6}


def on_meta(config: dict, network: type[Network] = UNet) -> Network:
    """A network of sizes without numbers: the published ones are large, and most tests ask only for sizes."""
    with torch.device("meta"):
        return network(**config)


def sizes(net: UNet) -> dict[str, list[int]]:
    """{layer: [channels in, channels out]}, for norms [channels, groups]; as the layers say and as their weights do."""
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.GroupNorm):
            found[name] = [layer.num_channels, layer.num_groups]
            assert layer.weight.shape == layer.bias.shape == (layer.num_channels,)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            found[name] = list(layer.weight.shape[1::-1])
            kind = "channels" if isinstance(layer, nn.Conv2d) else "features"
            assert found[name] == [getattr(layer, f"in_{kind}"), getattr(layer, f"out_{kind}")]
            assert layer.bias.shape == (found[name][1],)
    return found


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def golden(name: str) -> tuple[dict, dict]:
    """Weights, and inputs with outputs, of a golden network."""
    files = [load_file(path) for path in sorted(GOLDEN.glob(f"{name}*.safetensors"))]
    found = {key: value for file in files for key, value in file.items()}
    prefix = "state_dict/"
    weights = {key.removeprefix(prefix): found.pop(key).float() for key in list(found) if key.startswith(prefix)}
    return weights, found


def a_small_net() -> UNet:
    torch.manual_seed(0)
    return UNet(**SMALL).eval()


@pytest.fixture
def small() -> UNet:
    return a_small_net()


@lru_cache
def pruned_once(ratio: float, importance: str, norm_groups: str) -> UNet:
    return prune_channels(a_small_net(), ratio, importance, norm_groups)


def lean(ratio: float = 0.5, importance: str = "magnitude", norm_groups: str = "keep") -> UNet:
    """The small network, pruned."""
    return copy.deepcopy(pruned_once(ratio, importance, norm_groups))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0, 500, 999])


@pytest.fixture
def small_dit() -> DiT:
    """With random weights everywhere: with adaLN-Zero its blocks would do nothing."""
    torch.manual_seed(0)
    net = DiT(**SMALL_DIT)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    return net.eval()


@pytest.fixture
def labelled() -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 1000, (5,), generator=generator), {"y": torch.arange(5) % 3}


@pytest.fixture(scope="module")
def tiny_dit() -> tuple[DiT, dict]:
    weights, numbers = golden("dit_tiny0")
    net = DiT(**json.loads((GOLDEN / "dit_tiny0.json").read_text())["kwargs"]).eval()
    table = net.pos_embed.clone()
    net.load_state_dict(weights)
    assert torch.equal(net.pos_embed, table)  # the official table of positions
    return net, numbers


# ---- the networks ----------------------------------------------------------------------------------------------------


def watch_features(net: Network) -> list:
    """Fills up, in a forward pass, with [name, shape] of the features in the order in which the layers run."""
    seen = []
    for name in net.feature_layers():
        hook = lambda layer, args, output, name=name: seen.append([name, list(net.feature(output).shape)])  # noqa: E731
        net.get_submodule(name).register_forward_hook(hook)
    return seen


def test_the_unet_gives_the_published_output_gradient_and_features():
    weights, numbers = golden("unet_tiny0")
    net = UNet(**TINY).eval()
    net.load_state_dict(weights)
    features, x = watch_features(net), numbers["x"].clone().requires_grad_()
    output = net(x, numbers["t"])
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert relative(output, numbers["output"]) < 1e-5
    assert relative(gradient, numbers["grad_input_of_sum_of_squares"]) < 1e-5
    assert features == CONFIGS["tiny0"]["features"]
    assert torch.equal(net(numbers["x"], numbers["t"].float()), net(numbers["x"], numbers["t"]))
    for dim, name in ((32, "timestep_embedding"), (33, "timestep_embedding_odd_dim")):
        torch.testing.assert_close(timestep_embedding(numbers["t"], dim), numbers[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "features"), [("celeba", 41), ("cifar10", 34), ("bedroom", 48)])
def test_published_unets(name, features):
    net, expected = on_meta(PUBLISHED[name]), CONFIGS[name]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict"]
    assert list(net.state_dict()) == list(expected["state_dict"])  # old checkpoints list the weights by position
    assert (parameters(net), macs(net)) == (expected["params"], expected["macs"])
    assert len(net.feature_layers()) == features
    if expected["features"]:
        seen = watch_features(net)
        net(torch.zeros(1, *net.shape, device="meta"), torch.zeros(1, device="meta"))
        assert seen == expected["features"]
        assert net.feature_channels(net.feature_layers()) == [shape[1] for _, shape in expected["features"]]


def test_the_dit_gives_the_official_output_blocks_and_gradient(tiny_dit):
    net, numbers = copy.deepcopy(tiny_dit[0]), tiny_dit[1]
    blocks, x = [], numbers["x"].clone().requires_grad_()
    for block in net.blocks:
        block.register_forward_hook(lambda layer, args, output: blocks.append(output))
    output = net(x, numbers["t"], {"y": numbers["y"]})
    torch.testing.assert_close(output, numbers["output"], rtol=1e-5, atol=1e-5)
    for i, block in enumerate(blocks):
        torch.testing.assert_close(block, numbers[f"block_{i}_output"], rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, numbers["grad_x_of_sum_of_squares"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_the_guided_dit_gives_the_official_output(tiny_dit, scale):
    net, numbers = tiny_dit
    guided = Guided(net, scale, net.no_condition(), net.guided_channels)
    with torch.no_grad():
        output = guided(numbers["cfg_x"][:2], numbers["cfg_t"][:2], {"y": numbers["cfg_y"][:2]})
    torch.testing.assert_close(output, numbers[f"cfg_output_scale_{scale}"][:2], rtol=1e-5, atol=1e-5)


def test_published_dits():
    expected = json.loads((GOLDEN / "dit_configs.json").read_text())
    shapes = {name: list(value.shape) for name, value in on_meta({}, DiT).state_dict().items()}
    assert shapes == expected["shapes"]
    for depth, published in ((28, 675_129_632), (14, 340_457_504), (7, 173_121_440), (4, 101_405_984)):
        net = on_meta({"depth": depth}, DiT)
        assert parameters(net) == expected["sizes"][str(depth)]["params"] == published
        # the official counter takes norms and softmax into account, too: a tenth of a percent
        assert macs(net) == pytest.approx(expected["sizes"][str(depth)]["macs"], rel=1e-3)


def test_what_the_networks_say_of_themselves(small, small_dit):
    for net, said in (
        (small, ("unet", (1, 8, 8), {}, (), 0.0, None, None, False, "channels", [], None)),
        (small_dit, ("dit", (2, 4, 4), {}, ("y",), 0.1, 2, 3, True, "blocks", list(small_dit.blocks), None)),
    ):
        names = "arch shape process conditions condition_dropout guided_channels num_classes predicts_variance pruning"
        values = [getattr(net, name) for name in names.split()]
        assert (*values, list(net.blocks), net.source) == said
        assert net.stages() == list(net.blocks) and net.fit(net.shape) is None
    assert small.no_condition() is None and DiT(**SMALL_DIT, class_dropout_prob=0.0).no_condition() is None
    assert small_dit.no_condition()["y"].item() == 3
    plain = DiT(**SMALL_DIT, learn_sigma=False)
    assert not plain.predicts_variance and plain.final_layer.linear.out_features == 2 * 4
    assert (small.attention_macs(), small_dit.attention_macs()) == (0, 6 * 2 * 4**2 * 16)
    names = small_dit.feature_layers()
    assert names == [f"blocks.{i}" for i in range(6)] and small_dit.feature_channels(names) == [16] * 6


# ---- A head of statistics --------------------------------------------------------------------------------------------


def with_head(net):
    """Its copy with a head that does something."""
    net = copy.deepcopy(net)
    net.set_head("statistics")
    torch.manual_seed(5)
    nn.init.normal_(net.head.mlp[2].weight, std=0.1)
    return net


def test_statistics_and_what_is_corrected_by_them():
    x, output = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.rand(2, 6, 4, 5)
    found, e = statistics(x, output[:, :3]), output[:, :3]
    expected = [
        torch.ones(2, 3),
        x.mean((2, 3)),
        x.std((2, 3), correction=0),
        e.mean((2, 3)),
        e.std((2, 3), correction=0),
    ]
    torch.testing.assert_close(found, torch.stack(expected, dim=2))
    assert torch.equal(correct(x, output, torch.zeros(2, 3, 5, 2)), output)
    weights = torch.zeros(2, 3, 5, 2)
    weights[0, 1, 2] = torch.tensor([0.5, -0.25])  # of the deviation of x_t, in b0 and in b1 - 1
    changed, std = correct(x, output, weights), x[0, 1].std(correction=0)
    torch.testing.assert_close(changed[0, 1], output[0, 1] * (1 - 0.25 * std) + 0.5 * std)
    changed[0, 1] = output[0, 1]
    assert torch.equal(changed, output)  # the other image, the other channels, the variance


def test_a_head_starts_as_the_identity_and_is_kept_by_all_that_handles_networks(small, small_dit, batch, tmp_path):
    x_t, t = batch
    small_dit.final_layer.linear.weight.data.normal_()
    told = torch.randn(2, 2, 4, 4), t[:2], {"y": torch.tensor([0, 2])}
    for bare, inputs in ((small, (x_t, t)), (small_dit, told)):
        net = copy.deepcopy(bare).eval()
        plain, names = net(*inputs), set(net.state_dict())
        net.set_head("statistics")
        assert torch.equal(net(*inputs), plain) and net.config["head"] == "statistics"
        own = set(net.state_dict()) - names
        assert own == {f"head.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
        nn.init.normal_(net.head.mlp[2].weight, std=0.1)
        output = net(*inputs)
        assert not torch.equal(output, plain)
        net.save(tmp_path)
        assert torch.equal(load(tmp_path)(*inputs), output)
        assert torch.equal(net.like(net.config, net.state_dict())(*inputs), output)
        net.reset_parameters()  # random ones start as the identity, too
        assert not net.head.mlp[2].weight.any() and not net.head.mlp[2].bias.any()
        net.set_head(None)
        assert net.head is None and net.config["head"] is None and set(net.state_dict()) == names
    pruned = [prune_channels(net, 0.5, seed=0) for net in (small, with_head(small))]
    assert pruned[1].head is not None
    torch.testing.assert_close(pruned[1].state_dict()["head.mlp.2.weight"], with_head(small).head.mlp[2].weight)
    pruned[1].set_head(None)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in pruned), strict=True))
    assert regroup(with_head(small), 2).head is not None
    shallow = prune_depth(with_head(small_dit), 2)
    assert torch.equal(shallow.head.mlp[2].weight, with_head(small_dit).head.mlp[2].weight)


def test_a_head_learns_where_an_output_is_flat():
    net = DiT(**SMALL_DIT, head="statistics")  # its output is 0 at first: the root of its variance has no gradient
    net(torch.randn(2, 2, 4, 4), torch.tensor([3, 7]), {"y": torch.tensor([0, 1])}).sub(1).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert net.head.mlp[2].bias.grad.abs().max() > 0


@lru_cache
def published(name, ratio):
    """The student of a published size, on the meta device; its size does not depend on the scores."""
    return prune_channels(on_meta(PUBLISHED[name]), float(ratio), "random")


def test_the_celeba_student_with_a_head_is_built_counted_and_stepped():
    net = copy.deepcopy(published("celeba", "0.9"))
    net.set_head("statistics")
    assert parameters(net.head) == 32 * 32 + 32 + 32 * 30 + 30 == 2_046 and parameters(net) == 1_312_076 + 2_046
    assert macs(net) > 0
    net = net.to_empty(device="cpu")
    net.reset_parameters()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(2):
        loss = (net(torch.randn(1, 3, 64, 64), torch.tensor([500])) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and net.head.mlp[0].weight.grad.abs().max() > 0 < net.head.mlp[2].weight.abs().max()


def test_dropout_is_set_everywhere_and_recorded(small, small_dit, batch):
    small.set_dropout(0.9)
    assert {layer.p for layer in small.modules() if isinstance(layer, nn.Dropout)} == {0.9} == {small.config["dropout"]}
    assert not torch.equal(small.train()(*batch), small(*batch))
    config = dict(small_dit.config)
    small_dit.set_dropout(0.9)  # it has none
    assert small_dit.config == config


# ---- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ratio"), [(n, r) for n in PRUNED for r in PRUNED[n] if r != "layers"])
def test_pruned_sizes_equal_the_published_ones(name, ratio):
    net, expected, student = on_meta(PUBLISHED[name]), PRUNED[name][ratio], published(name, ratio)
    known = dict(zip(PRUNED[name]["layers"], expected["sizes"], strict=True))
    assert sizes(student) == known
    assert (parameters(student), macs(student)) == (expected["params"], expected["macs"])
    if (name, ratio) == ("celeba", "0.9"):
        scaled = prune_channels(net, float(ratio), "random", norm_groups="scale")
        assert parameters(scaled) == expected["params"]
        assert {name: size[0] for name, size in sizes(scaled).items()} == {n: size[0] for n, size in known.items()}
        for layer in net.norms():
            (full, full_groups), (width, groups) = sizes(net)[layer], sizes(scaled)[layer]
            assert width // groups >= full // full_groups > 1  # the published student has one channel in most groups


def test_the_teacher_of_figure_1_has_its_published_size():
    student = prune_channels(on_meta(PUBLISHED["celeba"]), 0.6, "random")
    assert parameters(student) == 16_648_921 and round(macs(student) / 1e9, 2) == 5.76


def test_sizes_of_the_digits_demo():
    teacher = on_meta({**SMALL, "channels": 64, "attention_resolutions": ()})
    student = prune_channels(teacher, 0.9, "random")
    assert (parameters(teacher), parameters(student)) == (2_594_369, 40_288)
    widths = {name: size[1] for name, size in sizes(student).items()}
    assert {widths[f"{name}.conv1"] for name in ("down.0.block.0", "up.0.block.1")} == {8}
    assert {widths[f"{name}.conv1"] for name in ("down.1.block.0", "mid.block_1")} == {16}


def inflate(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each channel twice. Both copies are written alike; only one of them, left and right in turn, is ever read."""
    if weight.shape[0] != shape[0]:
        weight = weight.repeat_interleave(2, dim=0)
    if weight.ndim > 1 and weight.shape[1] != shape[1]:
        wide = weight.new_zeros(shape)
        k = torch.arange(weight.shape[1])
        wide[:, 2 * k + k % 2] = weight
        weight = wide
    return weight


def test_magnitude_removes_exactly_the_channels_that_nobody_reads(small, batch):
    # every weight is +-0.1, so all channels are written with the same norm and only the reading decides
    half = lean(0.5, "random")
    for name, p in half.named_parameters():
        p.data = torch.randn_like(p).sign() * 0.1 if p.ndim > 1 else torch.rand_like(p)
        if name.endswith((".q.weight", ".k.weight", ".q.bias", ".k.bias")):
            p.data.mul_(0.01)  # nearly uniform attention: its scale depends on the width, its result then hardly does
    shapes = {name: p.shape for name, p in small.state_dict().items()}
    small.load_state_dict({name: inflate(p, shapes[name]) for name, p in half.state_dict().items()})
    pruned = prune_channels(small, 0.5)
    assert pruned.config == half.config and same(pruned, half)
    # a group of pairs has the mean and variance of its halves, so nothing is lost
    assert relative(pruned(*batch), small(*batch)) < 1e-4


def test_magnitude_keeps_the_largest_of_each_norm_group(small):
    # 32 channels, 8 groups of 4, half of them go: make two of each group large and find their biases again
    block = small.get_submodule("down.0.block.0")
    large = torch.tensor([4 * group + offset for group in range(8) for offset in ((0, 3) if group % 2 else (1, 2))])
    block.conv1.weight.data[large] *= 10
    block.conv1.bias.data.copy_(torch.arange(32))
    pruned = prune_channels(small, 0.5)
    assert pruned.get_submodule("down.0.block.0.conv1").bias.tolist() == large.tolist()


def numbers(shape: torch.Size, seed: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) that depend on no random generator: those with which the golden file was made."""
    k = torch.arange(1, shape.numel() + 1, dtype=torch.float64)
    return ((torch.sin(12.9898 * k + 78.233 * seed) * 43758.5453) % 1 - 0.5).float().view(shape)


@pytest.mark.parametrize("ratio", TAYLOR)
def test_taylor_keeps_the_channels_that_the_published_pruner_keeps(ratio):
    net = UNet(**{**TINY, "channels": 64})
    for i, p in enumerate(net.parameters()):
        p.data, p.grad = numbers(p.shape, i), numbers(p.shape, 1000 + i)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias.data = torch.arange(len(layer.bias)).float()  # tells afterwards which channels stayed
    student = prune_channels(net, float(ratio), "taylor")
    assert {name: student.get_submodule(name).bias.tolist() for name in TAYLOR[ratio]} == TAYLOR[ratio]
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("norm_groups", "training", "dtype"), [("keep", False, torch.float32), ("scale", True, torch.bfloat16)]
)
def test_prune_returns_an_independent_plain_network(small, batch, norm_groups, training, dtype):
    small.requires_grad_(False).to(dtype).train(training)  # as a teacher is
    small.process = {"fold": 5}
    before, config = copy.deepcopy(small), copy.deepcopy(small.config)
    with torch.no_grad():
        student = prune_channels(small, 0.5, norm_groups=norm_groups)
    assert type(student) is UNet and student.training == training and student.process == {"fold": 5}
    assert all(p.requires_grad and p.dtype == dtype for p in student.parameters())
    student(batch[0].to(dtype), batch[1]).square().sum().backward()
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert same(small, before) and small.config == config and sizes(small) == sizes(before)
    assert not any(module._forward_hooks for module in small.modules())


def test_scale_differs_from_keep_in_the_config_only():
    keep, scale = lean(0.75), lean(0.75, norm_groups="scale")
    assert same(keep, scale)
    assert {**keep.config, "norm_groups": 0} == {**scale.config, "norm_groups": 0}
    assert keep.norm_out.num_groups == keep.norm_out.num_channels == 8  # instance norm
    assert scale.norm_out.num_channels // scale.norm_out.num_groups == 4  # as before pruning


@pytest.mark.parametrize(
    ("first", "second", "groups"), [("keep", "keep", 8), ("keep", "scale", 4), ("scale", "scale", 2)]
)
def test_a_pruned_network_can_be_pruned_again(small, batch, first, second, groups):
    once = lean(norm_groups=first)
    twice = prune_channels(once, 0.5, norm_groups=second)
    assert parameters(twice) < 0.5 * parameters(once)
    assert set(twice.state_dict()) == set(small.state_dict())  # no layer comes or goes
    assert twice(*batch).isfinite().all() and sizes(twice)["norm_out"] == [8, groups]


def test_groups_that_a_new_width_cannot_keep_become_fewer(batch):
    groups = {**dict.fromkeys(on_meta(SMALL).norms(), 8), "up.0.block.0.norm1": 12}  # sees 64 + 32 channels
    student = prune_channels(UNet(**{**SMALL, "norm_groups": groups}), 0.7)
    assert sizes(student)["up.0.block.0.norm1"] == [19 + 16, 7]
    assert student(*batch).isfinite().all()


def test_the_ends_of_the_ratio(small, batch):
    least, all_of_it = prune_channels(small, 0.999), prune_channels(small, 0)
    assert sizes(least)["mid.attn_1.q"][1] == 1 and sizes(least)["norm_out"] == [8, 8]  # one channel in each group
    assert least(*batch).isfinite().all()
    assert all_of_it is not small and same(all_of_it, small) and all_of_it.config == small.config
    assert torch.equal(all_of_it(*batch), small(*batch))


def test_random_importance_depends_on_the_seed_alone(small):
    state = torch.get_rng_state()
    again, other = (prune_channels(small, 0.5, "random", seed=seed) for seed in (0, 2))
    assert same(lean(0.5, "random"), again) and not same(again, other)
    assert torch.equal(state, torch.get_rng_state())  # and leaves the global one alone


def test_importance_may_be_a_function_of_the_group_that_sees_gradients(small, batch):
    small(*batch).square().mean().backward()
    seen = []

    def last_channels(group):
        seen.append(group[0].dep.target.module.weight.grad is not None)
        return torch.arange(len(group[0].idxs))

    student = prune_channels(small, 0.5, last_channels)
    assert seen and all(seen)
    kept = torch.arange(32).view(8, 4)[:, 2:].flatten()
    assert torch.equal(student.conv_in.bias, small.conv_in.bias[kept])


def test_regroup_keeps_the_weights_and_changes_the_function(batch):
    student = lean(0.7)  # two or more channels a group
    student.process = {"fold": 5}
    wide = regroup(student, 3)
    assert same(wide, student) and wide.process == {"fold": 5} and not wide.training
    assert {**wide.config, "norm_groups": 0} == {**student.config, "norm_groups": 0}
    own = group_widths(wide)
    assert regroup(student, own).config == wide.config
    assert own["mid.block_1.norm1"] == 3 and own["norm_out"] == 4  # of 24 and 16 channels: 3 does not divide 16
    assert not torch.allclose(wide(*batch), student(*batch), atol=1e-3)
    for norm in student.norms().values():
        norm.num_groups = norm.num_channels // {16: 4, 24: 3, 32: 4, 40: 4, 48: 3}[norm.num_channels]
    assert torch.equal(wide(*batch), student(*batch))
    assert {norm.num_groups for norm in regroup(student, 1000).norms().values()} == {1}
    with torch.no_grad():
        wide.conv_in.weight.zero_()
    assert student.conv_in.weight.any()
    assert regroup(on_meta(PUBLISHED["celeba"]), 4).norm_out.num_groups == 32


# ---- depth pruning ---------------------------------------------------------------------------------------------------


def test_a_shallower_network_is_independent_and_survives_saving(small_dit, labelled, tmp_path):
    small_dit.process = {"name": "flow"}
    student = prune_depth(small_dit, [0, 2, 5])
    hooked = copy.deepcopy(small_dit)  # the teacher with its other blocks switched off says the same
    for i in (1, 3, 4):
        hooked.blocks[i].register_forward_hook(lambda block, args, output: args[0])
    torch.testing.assert_close(student(*labelled), hooked(*labelled))
    student.save(tmp_path / "student")
    loaded = load(tmp_path / "student")
    assert loaded.config == student.config and loaded.config["depth"] == 3
    assert loaded.process == student.process == {"name": "flow"}
    assert torch.equal(loaded(*labelled), student(*labelled))
    before = small_dit(*labelled)
    nn.init.zeros_(student.blocks[0].attn.qkv.weight)
    assert torch.equal(small_dit(*labelled), before)


def test_evenly_spaced_blocks():
    # the scheme that TinyFusion calls oracle
    assert uniform_blocks(28, 14) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    assert uniform_blocks(6, 6) == list(range(6)) and uniform_blocks(6, 1) == [0]


def test_the_groups_of_a_new_network_follow_its_width():
    widths = {4: 1, 6: 1, 8: 2, 10: 2, 16: 4, 32: 8, 48: 12, 64: 16, 96: 24, 128: 32, 160: 32, 256: 32, 384: 32, 7: 1}
    assert {width: usual_groups(width) for width in widths} == widths  # 32 where the published ones have them
    net = lean(0.9)
    assert lonely_norms(net) > 0 == lonely_norms(regroup(net, 2)) == lonely_norms(nn.GroupNorm(1, 1))


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_saved_networks_come_back_bit_for_bit(small, batch, tmp_path):
    folder = tmp_path / "deep" / "net"
    for net in (small, lean(0.75), lean(0.75, norm_groups="scale")):
        for process in ({}, {"name": "sd", "fold": [0, 40, 999]}):
            net.process = process
            net.save(folder)  # also over an older one
            again = load(folder)
            assert again.config == net.config and same(again, net) and not again.training
            assert again.process == process and sizes(again) == sizes(net)
            assert torch.equal(again(*batch), net(*batch))
            assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["class"] == "UNet"


def test_a_fingerprint_changes_with_any_bit():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2]), torch.ones(3, dtype=torch.bfloat16)]
    digest = hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in tensors)).hexdigest()
    assert fingerprint(tensors) == fingerprint(iter(tensors)) == digest[:16]
    assert fingerprint([tensors[0].T.contiguous().T, *tensors[1:]]) == digest[:16]  # not with the memory layout
    for i in range(3):
        changed = [x.clone() for x in tensors]
        changed[i].view(torch.uint8).view(-1)[-1] ^= 1
        assert fingerprint(changed) != digest[:16]


def test_folders_of_older_versions_load(batch, tmp_path):
    """Their config.json also has the widths of a pruned network, and the timesteps of a folded one."""
    student = lean(0.75)
    student.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    widths = {name: size[1] for name, size in sizes(student).items() if name.endswith(("conv1", "conv_in", ".q"))}
    fold = {"fold": [199, 399, 599, 799, 999]}  # the ends of five parts, which folds stood for then
    for said, process in (({"fold_steps": None}, {}), ({"fold_steps": 5}, fold), ({"process": {"fold": 5}}, fold)):
        old = {**config, "widths": widths, **said}
        (tmp_path / "config.json").write_text(json.dumps(old))
        again = load(tmp_path)
        assert again.process == process and again.config == student.config
        assert same(again, student) and torch.equal(again(*batch), student(*batch))
        again.save(tmp_path / "new")
        assert load(tmp_path / "new").process == process


def test_a_pruned_network_takes_a_checkpoint_of_its_own_shapes_only(small, tmp_path):
    student, other = lean(), lean(0.5, "random")
    torch.save(other.state_dict(), tmp_path / "student.pt")
    load_checkpoint(student, tmp_path / "student.pt")
    assert same(student, other)
    torch.save(small.state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(
        ValueError, match=r"UNet\(.*: temb\.dense\.0\.weight is \(64, 32\) by the config, but \(128, 32\)"
    ):
        load_checkpoint(student, tmp_path / "teacher.pt")


def test_a_save_that_fails_leaves_the_older_network_whole_and_a_cut_file_is_refused(small, tmp_path, monkeypatch):
    (tmp_path / ".model.safetensors.part").write_bytes(b"half")  # of a process that was killed
    small.save(tmp_path)
    for broken in ("models.json.dumps", "os.fsync"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(broken, lambda *args, **kwargs: 1 / 0)
            lean().save(tmp_path)
        assert same(load(tmp_path), small) and {file.name for file in tmp_path.iterdir()} == {*FILES}
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)


def spoil(weights: dict, how: str) -> dict:
    """Weights that cannot be used, or that can: in half precision."""
    name, tensor = next(iter(weights.items()))
    changed = {"nan": tensor * torch.nan, "int": tensor.long(), "half": tensor.half()}
    return {**weights, name: changed[how]}


def test_weights_that_are_no_finite_floats_and_changed_bits_are_refused(small, tmp_path):
    small.save(tmp_path)
    file = tmp_path / FILES[0]
    weights, content = load_file(file), bytearray(file.read_bytes())
    for i in (-1, -1000, len(content) // 2):
        changed = content.copy()
        changed[i] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.safetensors .*damaged"):
            load(tmp_path)
    for how in ("nan", "int"):
        save_file(spoil(weights, how), file)
        with pytest.raises(ValueError, match="is not all finite floats"):
            load(tmp_path)
        torch.save(spoil(weights, how), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"weights\.pt holds no weights .* is not all finite floats"):
            load_checkpoint(small, tmp_path / "weights.pt")
    save_file(spoil(weights, "half"), file)
    assert all(p.dtype == torch.float32 for p in load(tmp_path).parameters())


def test_folders_without_a_network_say_what_is_missing(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a saved network: there is no such folder$"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors and no config\.json$"):
        load(tmp_path)
    small.save(tmp_path / "student")
    with pytest.raises(FileNotFoundError, match=r"no config\.json; networks in it: student$"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as in the folder of a training run
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors; networks in it: student$"):
        load(tmp_path)


BLOCK = "down.0.block.0."
ABSURD = [("channels", 10**9), ("num_res_blocks", 10**9), ("channel_mults", [1, 10**12]), ("image_size", -8)]
DAMAGED = [  # another config.json or other settings in it, weights of other shapes (None: absent), what is said
    ("{", {}, ""),
    ("[]", {}, 'must have a "class", one of: UNet'),
    ({"class": "VNet"}, {}, 'must have a "class", one of: UNet'),
    ({"colour": 1}, {}, "colour"),
    ({"norm_groups": 7}, {}, "cannot be split into 7 groups"),
    ({"num_res_blocks": 2}, {}, "."),
    ({"class": "DiT"}, {}, "."),
    ({"process": 3}, {}, "."),
    ({"channel_mults": [[[1]]]}, {}, "."),
    *[({name: size}, {}, f"{name} is .* does not fit the weights") for name, size in ABSURD],  # at once
    ({}, {"conv_in.bias": None}, r"conv_in\.bias is \(32,\) by the config, but absent in the weights"),
    ({}, {"mid.attn_1.q.weight": None}, r"mid\.attn_1\.q\.weight is .* but absent in the weights"),
    ({}, {"logits.weight": (4, 4)}, r"logits\.weight is absent by the config, but \(4, 4\) in the weights"),
    ({}, {"conv_in.weight": (24, 1, 3, 3), "conv_in.bias": (24,)}, "shapes of the weights do not fit together"),
    ({}, {f"{BLOCK}conv1.weight": (32, 24, 3, 3)}, "shapes of the weights do not fit together"),
    ({}, {f"{BLOCK}temb_proj.weight": (32, 100)}, "shapes of the weights do not fit together"),
    ({}, {f"{BLOCK}norm2.weight": (24,), f"{BLOCK}norm2.bias": (24,)}, "shapes of the weights do not fit together"),
    ({}, {f"{BLOCK}norm2.weight": (20,), f"{BLOCK}norm2.bias": (20,)}, "20 channels, they cannot be split"),
    ({}, {"conv_out.weight": (3, 32, 3, 3), "conv_out.bias": (3,)}, "give 3 channels, the config 1"),
    ({}, {"conv_in.weight": (32, 3, 3, 3)}, r"x_t must be \(B, 3, H, W\)"),
    ({}, {f"{BLOCK}conv1.bias": (24,)}, f"{BLOCK}conv1"),
    ({}, {f"{BLOCK}conv1.weight": (32,)}, f"{BLOCK}conv1"),
    ({}, {"conv_in.weight": (32, 1, 1, 1)}, "conv_in"),  # the image would grow
    ({}, {"temb.dense.0.weight": (128, 24)}, "temb"),  # another embedding of the timestep
]


@pytest.mark.parametrize(("settings", "shapes", "message"), DAMAGED, ids=[row[-1] for row in DAMAGED])
def test_damaged_folders_are_one_clear_error(settings, shapes, message, small, tmp_path):
    small.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {name: torch.zeros(shape or ()) for name, shape in shapes.items()}
    save_file({name: x for name, x in weights.items() if shapes.get(name, ()) is not None}, tmp_path / FILES[0])
    (tmp_path / FILES[1]).write_text(settings if isinstance(settings, str) else json.dumps({**config, **settings}))
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        load(tmp_path)


# ---- refusals --------------------------------------------------------------------------------------------------------


A_UNET, A_DIT = partial(UNet, **SMALL), partial(DiT, **SMALL_DIT)
ON_META, X, T = on_meta(SMALL), torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
PRUNE = partial(prune_channels, ON_META)
REFUSED = [
    (partial(A_UNET, norm_groups=7), "down.0.block.0.norm1 has 32 channels, they cannot be split into 7 groups"),
    (partial(A_UNET, norm_groups=0), "0 groups"),
    (partial(A_UNET, norm_groups={"norm_out": 8}), "norm_groups: down.0.block.0.norm1"),
    (partial(A_UNET, norm_groups={"norm_outt": 8}), "norm_groups names norm_outt, but no norm"),
    (partial(A_UNET, image_size=9), "halved"),
    (partial(A_UNET, channels=2), "channels must be at least 4"),
    (partial(A_UNET, channel_mults=()), "positive"),
    (partial(A_UNET, num_res_blocks=0), "positive"),
    (partial(A_UNET, dropout=1.0), "dropout"),
    *[
        (partial(A_UNET(), bad, T), r"x_t must be \(B, 1, H, W\)")
        for bad in (X[0], X.expand(-1, 3, -1, -1), X[..., :7])
    ],
    (partial(A_UNET(), X, T, {"y": T}), "no condition, but cond holds y"),
    (partial(A_DIT, input_size=5), "multiples of patch_size"),
    (partial(A_DIT, hidden_size=18), "multiples"),
    (partial(A_DIT, depth=0), "positive"),
    (partial(A_DIT(), torch.zeros(2, 2, 4, 4), T), "needs the classes"),
    (partial(A_DIT(), torch.zeros(2, 1, 4, 4), T, {"y": T}), "x_t must be"),
    *[(partial(PRUNE, ratio), r"\[0, 1\)") for ratio in (1, -0.1, float("nan"))],
    (partial(PRUNE, 0.5, "magnitud"), '"magnitude", "taylor", "random" or a function'),
    (partial(PRUNE, 0.5, "taylor"), r'"taylor" needs gradients: call accumulate_gradients\(net, \.\.\.\) first'),
    (partial(PRUNE, 0.5, norm_groups="drop"), '"keep" or "scale"'),
    (
        partial(prune_channels, UNet(2, 1, channels=8, channel_mults=(1, 1), norm_groups=4), 0.9, "random"),
        "or 2x2 pixels",
    ),
    (partial(prune_channels, nn.Linear(1, 1), 0.5), "not a Linear"),
    (partial(regroup, ON_META, 0), "at least 1, not 0"),
    (partial(regroup, ON_META, {}), "must name the norms down.0.block.0.norm1, .*, not none"),
    (partial(regroup, A_DIT(), 4), "norms of groups, and a DiT has none"),
    (partial(regroup, ON_META, {"norm_out": 2}), "must name the norms down.0.block.0.norm1, .*, not norm_out"),
    *[(partial(prune_depth, A_DIT(), keep), "block") for keep in ([], [2, 1], [0, 0], [-1], [6], 0, 7)],
    (partial(ON_META.fit, (3, 8, 8)), r"takes samples of shape \(1, 8, 8\), not \(3, 8, 8\)"),
    (ON_META.recompute, "a UNet cannot recompute"),
    (partial(A_UNET, head="neck"), "a head is \"statistics\" or None, of a UNet or a DiT: 'neck' on a UNet"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_new_random_weights_are_those_of_a_new_network_of_the_same_seed(small_dit, labelled):
    sizes = {"channels": 8, "channel_mults": (1, 2), "attention_resolutions": (8, 4), "norm_groups": 4}
    for make in (partial(UNet, 8, 1, **sizes), partial(DiT, **SMALL_DIT)):
        net = make()
        torch.manual_seed(5)
        net.reset_parameters()
        torch.manual_seed(5)
        assert same(net, make())
    pruned, before = lean(), lean()
    pruned.reset_parameters()
    weights = [name for name, p in pruned.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(pruned.get_parameter(name), before.get_parameter(name)) for name in weights)
    small_dit.reset_parameters()
    assert not small_dit(*labelled).any()  # as adaLN-Zero starts
    assert torch.equal(small_dit.pos_embed, DiT(**SMALL_DIT).pos_embed)  # a fixed table, which never learns
    for net in (small_dit.requires_grad_(False).requires_grad_(True), prune_depth(small_dit, 2)):
        assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["pos_embed"]
