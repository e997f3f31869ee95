"""The U-Net against the published one, pruning against the published sizes, saving, feature taps."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch_pruning
from safetensors.torch import load_file
from torch import nn

from diffusion import DDPM
from models import (
    Tapped,
    UNet,
    accumulate_gradients,
    feature_channels,
    feature_loss,
    load,
    prune_channels,
    timestep_embedding,
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


def on_meta(config: dict) -> UNet:
    """A network of sizes without numbers: the published ones are large, and most tests ask only for sizes."""
    with torch.device("meta"):
        return UNet(**config)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def macs(net: UNet) -> int:
    size = net.config["image_size"]
    x = torch.zeros(1, net.config["in_channels"], size, size, device="meta")
    return torch_pruning.utils.count_ops_and_params(net, (x, torch.zeros(1, device="meta")))[0]


def sizes(net: UNet) -> dict[str, list[int]]:
    """{layer: [channels in, channels out]}, for norms [channels, groups]."""
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.GroupNorm):
            found[name] = [layer.num_channels, layer.num_groups]
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            found[name] = list(layer.weight.shape[1::-1])
    return found


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def tiny() -> dict:
    """The golden network: weights, input, output, gradient of the output's sum of squares."""
    return load_file(GOLDEN / "unet_tiny0.safetensors") | load_file(GOLDEN / "unet_tiny0_up.safetensors")


@pytest.fixture
def tiny_net(tiny: dict) -> UNet:
    net = UNet(**TINY).eval()
    prefix = "state_dict/"
    net.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tiny.items() if k.startswith(prefix)})
    return net


@pytest.fixture
def small() -> UNet:
    torch.manual_seed(0)
    return UNet(**SMALL).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0, 500, 999])


# ---- the network -----------------------------------------------------------------------------------------------------


def test_output_and_gradient_equal_the_published_network(tiny, tiny_net):
    x = tiny["x"].clone().requires_grad_()
    output = tiny_net(x, tiny["t"])
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert relative(output, tiny["output"]) < 1e-5
    assert relative(gradient, tiny["grad_input_of_sum_of_squares"]) < 1e-5
    assert torch.equal(tiny_net(tiny["x"], tiny["t"].float()), tiny_net(tiny["x"], tiny["t"]))


def test_timestep_embedding_of_even_and_odd_dimension(tiny):
    for dim, name in ((32, "timestep_embedding"), (33, "timestep_embedding_odd_dim")):
        torch.testing.assert_close(timestep_embedding(tiny["t"], dim), tiny[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    net, expected = on_meta(PUBLISHED[name]), CONFIGS[name]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected["state_dict"]
    assert list(net.state_dict()) == list(expected["state_dict"])  # old checkpoints list the weights by position
    assert (count(net), macs(net)) == (expected["params"], expected["macs"])
    assert len(net.feature_layers()) == {"celeba": 41, "cifar10": 34, "bedroom": 48}[name]
    if expected["features"]:
        tapped = Tapped(net)
        x = torch.zeros(1, 3, net.config["image_size"], net.config["image_size"], device="meta")
        features = tapped(x, torch.zeros(1, device="meta"))[1]
        assert [[n, list(f.shape)] for n, f in zip(tapped.names, features, strict=True)] == expected["features"]
        assert feature_channels(net) == [shape[1] for _, shape in expected["features"]]


def test_config_rebuilds_the_network_and_survives_json(small):
    for net in (small, prune_channels(small, 0.5, norm_groups="scale")):
        again = UNet(**json.loads(json.dumps(net.config)))
        assert again.config == net.config and sizes(again) == sizes(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_groups": 7}, "down.0.block.0.norm1 has 32 channels"),
        ({"norm_groups": 0}, "0 groups"),
        ({"norm_groups": {"norm_out": 8}}, "norm_groups: down.0.block.0.norm1"),
        ({"widths": {"conv_in": 12}}, "has 12 channels"),
        ({"widths": {"conv_in": 0}}, "at least one channel"),
        ({"widths": {"conv_inn": 8}}, "conv_inn"),
        ({"widths": {"down.0.block.0.conv2": 8}}, "down.0.block.0.conv2"),  # follows from the width of the stream
        ({"image_size": 9}, "halved"),
        ({"channels": 2}, "channels must be at least 4"),
        ({"channel_mults": ()}, "positive"),
        ({"num_res_blocks": 0}, "positive"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        on_meta({**SMALL, **change})


def test_inputs_that_do_not_fit_are_one_clear_error(small, batch):
    x, t = batch
    for bad in (x[0], x.expand(-1, 3, -1, -1), x[..., :7]):
        with pytest.raises(ValueError, match=r"x_t must be \(B, 1, H, W\)"):
            small(bad, t)
    with pytest.raises(ValueError, match="no condition, but cond holds y"):
        small(x, t, {"y": t})


# ---- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ratio"), [(n, r) for n in PRUNED for r in PRUNED[n] if r != "layers"])
def test_pruned_sizes_equal_the_published_ones(name, ratio):
    net, expected = on_meta(PUBLISHED[name]), PRUNED[name][ratio]
    student = prune_channels(net, float(ratio), "random")  # the sizes do not depend on the scores
    assert sizes(student) == dict(zip(PRUNED[name]["layers"], expected["sizes"], strict=True))
    assert (count(student), macs(student)) == (expected["params"], expected["macs"])


@pytest.mark.parametrize("ratio", ["0.7", "0.9"])
def test_scale_has_the_published_widths_and_groups_of_several_channels(ratio):
    net = on_meta(PUBLISHED["celeba"])
    student = prune_channels(net, float(ratio), "random", norm_groups="scale")
    assert count(student) == PRUNED["celeba"][ratio]["params"]
    published = dict(zip(PRUNED["celeba"]["layers"], PRUNED["celeba"][ratio]["sizes"], strict=True))
    assert {name: size[0] for name, size in sizes(student).items()} == {name: published[name][0] for name in published}
    for name in net.plan.norms:
        (full, full_groups), (width, groups) = sizes(net)[name], sizes(student)[name]
        assert width // groups >= full // full_groups > 1  # the published student at 0.9 has one channel in most groups


def test_sizes_of_the_digits_demo():
    demo = {**SMALL, "channels": 64, "attention_resolutions": ()}
    teacher = on_meta(demo)
    student = prune_channels(teacher, 0.9, "random")
    assert (count(teacher), count(student)) == (2_594_369, 40_288)
    assert {student.config["widths"][f"{name}.conv1"] for name in ("down.0.block.0", "up.0.block.1")} == {8}
    assert {student.config["widths"][f"{name}.conv1"] for name in ("down.1.block.0", "mid.block_1")} == {16}


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


def test_magnitude_removes_exactly_the_channels_that_nobody_reads(batch):
    # every weight is +-0.1, so all channels are written with the same norm and only the reading decides
    torch.manual_seed(0)
    big = UNet(**SMALL).eval()
    lean = prune_channels(big, 0.5, "random").eval()
    for name, p in lean.named_parameters():
        p.data = torch.randn_like(p).sign() * 0.1 if p.ndim > 1 else torch.rand_like(p)
        if name.endswith((".q.weight", ".k.weight", ".q.bias", ".k.bias")):
            p.data.mul_(0.01)  # nearly uniform attention: its scale depends on the width, its result then hardly does
    shapes = {name: p.shape for name, p in big.state_dict().items()}
    big.load_state_dict({name: inflate(p, shapes[name]) for name, p in lean.state_dict().items()})

    pruned = prune_channels(big, 0.5)
    assert pruned.config == lean.config
    assert same_weights(pruned, lean)
    # a group of pairs has the mean and variance of its halves, so nothing is lost
    assert relative(pruned(*batch), big(*batch)) < 1e-4


def test_magnitude_keeps_the_largest_of_each_norm_group(small):
    # 32 channels, 8 groups of 4, half of them go: make two of each group large and find their biases again
    block = small.get_submodule("down.0.block.0")
    large = torch.tensor([4 * group + offset for group in range(8) for offset in ((0, 3) if group % 2 else (1, 2))])
    block.conv1.weight.data[large] *= 10
    block.conv1.bias.data.copy_(torch.arange(32))
    pruned = prune_channels(small, 0.5)
    assert pruned.get_submodule("down.0.block.0.conv1").bias.tolist() == large.tolist()


@pytest.mark.parametrize("norm_groups", ["keep", "scale"])
def test_prune_returns_an_independent_plain_network(small, batch, norm_groups):
    small.requires_grad_(False)  # as a teacher is
    before, config = copy.deepcopy(small), copy.deepcopy(small.config)
    with torch.no_grad():
        student = prune_channels(small, 0.5, norm_groups=norm_groups)
    assert type(student) is UNet and not student.training
    assert all(p.requires_grad for p in student.parameters())
    student(*batch).square().sum().backward()
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert same_weights(small, before) and small.config == config and sizes(small) == sizes(before)
    assert not any(module._forward_hooks for module in small.modules())
    assert prune_channels(small.train().double(), 0.5).training
    assert prune_channels(small.bfloat16(), 0.5).conv_in.weight.dtype == torch.bfloat16


def test_scale_differs_from_keep_in_the_config_only(small):
    keep, scale = prune_channels(small, 0.75), prune_channels(small, 0.75, norm_groups="scale")
    assert same_weights(keep, scale)
    assert {**keep.config, "norm_groups": 0} == {**scale.config, "norm_groups": 0}
    assert keep.norm_out.num_groups == keep.norm_out.num_channels == 8  # instance norm
    assert scale.norm_out.num_channels // scale.norm_out.num_groups == 4  # as before pruning


@pytest.mark.parametrize("first", ["keep", "scale"])
@pytest.mark.parametrize("second", ["keep", "scale"])
def test_a_pruned_network_can_be_pruned_again(small, batch, first, second):
    once = prune_channels(small, 0.5, norm_groups=first)
    twice = prune_channels(once, 0.5, norm_groups=second)
    assert count(twice) < 0.5 * count(once)
    assert set(twice.state_dict()) == set(small.state_dict())  # no layer comes or goes
    assert twice(*batch).isfinite().all()
    if first == second == "keep":
        assert sizes(twice)["norm_out"] == [8, 8]
    if first == second == "scale":
        assert sizes(twice)["norm_out"] == [8, 2]


def test_groups_that_a_new_width_cannot_keep_become_fewer(batch):
    groups = {**dict.fromkeys(on_meta(SMALL).plan.norms, 8), "up.0.block.0.norm1": 12}  # sees 64 + 32 channels
    student = prune_channels(UNet(**{**SMALL, "norm_groups": groups}), 0.7)
    assert sizes(student)["up.0.block.0.norm1"] == [19 + 16, 7]
    assert student(*batch).isfinite().all()


def test_extreme_ratio_leaves_one_channel_in_each_group(small, batch):
    student = prune_channels(small, 0.999)
    assert sizes(student)["mid.attn_1.q"][1] == 1 and sizes(student)["norm_out"] == [8, 8]
    assert student(*batch).isfinite().all()


def test_ratio_zero_is_an_equal_copy(small, batch):
    twin = prune_channels(small, 0)
    assert twin is not small and same_weights(twin, small) and torch.equal(twin(*batch), small(*batch))
    assert UNet(**twin.config).plan.full == small.plan.full and not twin.config["widths"]


def test_random_importance_depends_on_the_seed_alone(small):
    state = torch.get_rng_state()
    one, again, other = (prune_channels(small, 0.5, "random", seed=seed) for seed in (1, 1, 2))
    assert same_weights(one, again) and not same_weights(one, other)
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


def test_accumulated_gradients_are_the_sum_over_timesteps(batch):
    torch.manual_seed(0)
    net = UNet(**{**SMALL, "dropout": 0.5}).train().requires_grad_(False)  # a teacher, whatever its mode
    net.conv_in.weight.grad = torch.ones_like(net.conv_in.weight)  # of something else
    x0, noise, process = batch[0], torch.randn(3, 1, 8, 8), DDPM()
    with torch.no_grad():
        assert accumulate_gradients(net, process, x0, noise, timesteps=[0, 10, 990], progress=False) == 3
    assert net.training and not any(p.requires_grad for p in net.parameters())

    twin = copy.deepcopy(net).eval().requires_grad_(True)
    total = 0
    for t in (0, 10, 990):
        a = process.alpha_bar[t]
        prediction = twin(a.sqrt() * x0 + (1 - a).sqrt() * noise, torch.full((3,), t))
        total = total + (noise - prediction).square().sum(dim=(1, 2, 3)).mean()
    for p, expected in zip(net.parameters(), torch.autograd.grad(total, twin.parameters()), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-4)
    first = prune_channels(net, 0.5, "taylor")
    assert not same_weights(first, prune_channels(net, 0.5, "magnitude"))
    assert first(*batch).isfinite().all() and all(p.grad is None for p in first.parameters())


class Given(nn.Module):
    """A network and a process in one, whose loss at timestep t is losses[t] * weight^2."""

    def __init__(self, losses: list[float]):
        super().__init__()
        self.losses, self.weight, self.seen = torch.tensor(losses), nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t):
        self.seen.append(int(t[0]))
        return self.weight * x_t

    def add_noise(self, x0, noise, t):
        return self.losses[t].sqrt().view(-1, 1, 1, 1) * x0

    def target(self, x0, noise, t):
        return torch.zeros_like(x0)


@pytest.mark.parametrize(("thr", "summed"), [(0, [0, 1, 2, 3]), (0.3, [0, 1, 2, 3]), (0.5, [0, 1, 2]), (1, [0, 1])])
def test_accumulation_stops_before_the_first_small_loss(thr, summed, capsys):
    losses = [2.0, 10.0, 5.0, 4.0]  # 10 is the largest so far from t = 1 on; 5 is not below half of it
    net = Given(losses)
    one = torch.ones(2, 1, 1, 1)
    assert accumulate_gradients(net, net, one, one, thr, range(4)) == len(summed)
    assert net.weight.grad.item() == pytest.approx(2 * sum(losses[t] for t in summed))
    assert net.seen == list(range(min(len(summed) + 1, 4)))
    assert "importance" in capsys.readouterr().err


def test_what_gives_no_taylor_importance_is_one_clear_error(small):
    with pytest.raises(ValueError, match=r'"taylor" needs gradients: call accumulate_gradients\(net, \.\.\.\) first'):
        prune_channels(small, 0.5, "taylor")
    one, broken = torch.ones(2, 1, 1, 1), Given([1.0, float("nan")])
    with pytest.raises(ValueError, match="loss at timestep 1 is nan"):
        accumulate_gradients(broken, broken, one, one, timesteps=range(2), progress=False)
    for thr in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share of the largest loss"):
            accumulate_gradients(broken, broken, one, one, thr, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1}, r"\[0, 1\)"),
        ({"ratio": -0.1}, r"\[0, 1\)"),
        ({"ratio": float("nan")}, r"\[0, 1\)"),
        ({"ratio": 0.5, "importance": "magnitud"}, '"magnitude", "taylor", "random" or a function'),
        ({"ratio": 0.5, "norm_groups": "drop"}, '"keep" or "scale"'),
        ({"ratio": 0.5, "net": nn.Linear(1, 1)}, "not a Linear"),
    ],
)
def test_bad_pruning_arguments_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(**{"net": on_meta(SMALL), **arguments})


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_saved_networks_come_back_bit_for_bit(small, batch, tmp_path):
    for net in (small, prune_channels(small, 0.6), prune_channels(small, 0.6, norm_groups="scale")):
        net.save(tmp_path / "deep" / "net")  # also over an older one
        again = load(tmp_path / "deep" / "net")
        assert again.config == net.config and same_weights(again, net) and not again.training
        assert torch.equal(again(*batch), net(*batch))
        assert sorted(file.name for file in (tmp_path / "deep" / "net").iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
    assert json.loads((tmp_path / "deep" / "net" / "config.json").read_text())["class"] == "UNet"


def test_a_save_that_fails_leaves_the_older_network_whole(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    monkeypatch.setattr("models.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_channels(small, 0.5).save(tmp_path)
    assert same_weights(load(tmp_path), small)


def test_what_cannot_be_loaded_says_why(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors and no config\.json$"):
        load(tmp_path / "nowhere")
    small.save(tmp_path / "student")
    with pytest.raises(FileNotFoundError, match=r"no config\.json; networks in it: student$"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as in the folder of a training run
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors; networks in it: student$"):
        load(tmp_path)

    folder = tmp_path / "student"
    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    for broken, message in (
        ("{", "cannot be loaded"),
        ("[]", 'must have a "class", one of: UNet'),
        (json.dumps({**config, "class": "VNet"}), 'must have a "class", one of: UNet'),
        (json.dumps({**config, "colour": 1}), "colour"),
        (json.dumps({**config, "norm_groups": 7}), "cannot be split into 7 groups"),
        (
            json.dumps({**config, "channels": 64}),
            r"temb\.dense\.0\.weight is \(256, 64\) by the config, but \(128, 32\)",
        ),
        (json.dumps({**config, "num_res_blocks": 2}), "absent in the weights"),
    ):
        (folder / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(folder)


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_run_in_the_published_order(tiny, tiny_net):
    tapped = Tapped(tiny_net)
    output, features = tapped(tiny["x"], tiny["t"])
    assert torch.equal(output, tiny_net(tiny["x"], tiny["t"]))
    shapes = [[name, list(f.shape)] for name, f in zip(tapped.names, features, strict=True)]
    assert shapes == CONFIGS["tiny0"]["features"]
    order = []  # as the layers really run
    for name in tapped.names:
        tiny_net.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    tiny_net(tiny["x"], tiny["t"])
    assert order == tapped.names


def test_features_follow_the_names_that_were_asked_for(small, batch):
    names = small.feature_layers()
    features = Tapped(small)(*batch)[1]
    backwards = Tapped(small, names[::-1])(*batch)[1]
    assert all(torch.equal(a, b) for a, b in zip(features, backwards[::-1], strict=True))
    with pytest.raises(AttributeError, match="nothing"):
        Tapped(small, ["mid.nothing"])


def test_adapters_bring_features_to_the_teacher(small, batch):
    student = prune_channels(small, 0.5)
    tapped = Tapped(student, adapters_to=feature_channels(small))
    theirs = Tapped(small)(*batch)[1]
    output, ours = tapped(*batch)
    assert [f.shape for f in ours] == [f.shape for f in theirs]
    for adapter in tapped.adapters:
        assert adapter.bias is None and adapter.kernel_size == (1, 1) and adapter.weight.abs().max() <= 0.005
    assert count(tapped) - count(tapped.net) == count(tapped.adapters) > 0  # an EMA over tapped.net leaves them out

    loss = feature_loss(ours, theirs)
    assert loss.shape == ()
    by_hand = sum((a - b).square().sum(dim=(1, 2, 3)).mean() for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(loss, by_hand)
    (output.square().sum() + loss).backward()
    assert all(p.grad is not None for p in tapped.parameters())
    assert all(p.grad is None for p in small.parameters())  # the teacher is a constant
    with pytest.raises(ValueError, match="3 widths"):
        Tapped(student, adapters_to=[8, 8, 8])


def test_nothing_stays_behind_after_a_forward(small, batch):
    tapped, other = Tapped(small), Tapped(small, ["mid.block_1"])
    assert len(tapped(*batch)[1]) == len(small.feature_layers()) and len(other(*batch)[1]) == 1
    with pytest.raises(ValueError, match="x_t"):
        tapped(batch[0][..., :7], batch[1])
    small(*batch)
    assert tapped.recorder.outputs is None and other.recorder.outputs is None


def test_a_forward_within_a_forward_keeps_the_two_apart(small, batch):
    tapped, inner = Tapped(small), []
    expected = tapped(*batch)[1]

    def once_more(*_):
        handle.remove()
        inner.append(tapped(batch[0] * 2, batch[1])[1])

    handle = small.mid.attn_1.register_forward_hook(once_more)
    outer = tapped(*batch)[1]
    assert all(torch.equal(a, b) for a, b in zip(outer, expected, strict=True))
    assert len(inner) == 1 and not torch.equal(inner[0][0], expected[0])


def test_copies_of_a_tapped_network_are_independent(small, batch):
    tapped = Tapped(small, adapters_to=feature_channels(small))
    expected = tapped(*batch)[1]
    twin, bare = copy.deepcopy(tapped), copy.deepcopy(tapped.net)
    with torch.no_grad():
        for p in twin.net.parameters():
            p.mul_(2)
    assert not torch.equal(twin(*batch)[1][0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(tapped(*batch)[1], expected, strict=True))
    assert torch.equal(bare(*batch), small(*batch))


def test_a_tapped_network_compiles_in_one_graph(batch):
    net = UNet(8, 1, channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(8,), norm_groups=4)
    tapped = Tapped(net, adapters_to=[16] * len(net.feature_layers()))
    compiled = torch.compile(tapped, backend="eager", fullgraph=True)
    x, t = batch
    for scale in (1, 2):  # the second call must not see the first one's features
        output, features = compiled(scale * x, t)
        expected, theirs = tapped(scale * x, t)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(features, theirs)
