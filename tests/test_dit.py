"""The transformer: parity with the official DiT, depth pruning, learned variance, guidance, TinyFusion's objective."""

import copy
import itertools
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import evaluate
import lift_place
import models
import train
from diffusion import DDPM, Guided, split
from models import DiT, GatedDepth, Tapped

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "dit_tiny0.safetensors")


@pytest.fixture(scope="module")
def tiny(golden):
    net = DiT(**json.loads((GOLDEN / "dit_tiny0.json").read_text())["kwargs"]).eval()
    table = net.pos_embed.clone()
    names = {name.removeprefix("state_dict/"): value.float() for name, value in golden.items() if "state_dict/" in name}
    net.load_state_dict(names)
    assert torch.equal(net.pos_embed, table)  # the official table of positions
    return net


def small(depth=6, **changes) -> DiT:
    """A DiT with random weights everywhere: with adaLN-Zero its blocks would do nothing."""
    torch.manual_seed(0)
    net = DiT(**{"input_size": 4, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3, **changes},
              depth=depth)  # fmt: skip
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.15)
    return net.eval()


def inputs(net, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *net.shape, generator=generator)
    return x, torch.randint(0, 1000, (n,), generator=generator), {"y": torch.arange(n) % net.config["num_classes"]}


# ------------------------------------------------------------------------------------------------------------- parity


def test_output_blocks_and_gradient_equal_the_official_ones(tiny, golden):
    x = golden["x"].clone().requires_grad_()
    output, features = Tapped(copy.deepcopy(tiny))(x, golden["t"], {"y": golden["y"]})
    torch.testing.assert_close(output, golden["output"], rtol=1e-5, atol=1e-5)
    for i, feature in enumerate(features):
        torch.testing.assert_close(feature, golden[f"block_{i}_output"], rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, golden["grad_x_of_sum_of_squares"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance_equals_the_official_one(tiny, golden, scale):
    guided = Guided(tiny, scale, tiny.no_condition(), tiny.guided_channels)
    with torch.no_grad():
        output = guided(golden["cfg_x"][:2], golden["cfg_t"][:2], {"y": golden["cfg_y"][:2]})
    torch.testing.assert_close(output, golden[f"cfg_output_scale_{scale}"][:2], rtol=1e-5, atol=1e-5)


def test_names_and_sizes_are_the_published_ones():
    expected = json.loads((GOLDEN / "dit_configs.json").read_text())
    with torch.device("meta"):
        net = DiT()
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == expected["shapes"]
    for depth, parameters in ((28, 675_129_632), (14, 340_457_504), (7, 173_121_440), (4, 101_405_984)):
        with torch.device("meta"):
            net = DiT(depth=depth)
        assert sum(p.numel() for p in net.parameters()) == expected["sizes"][str(depth)]["params"] == parameters
        # the official counter takes norms and softmax into account, too: a tenth of a percent
        assert evaluate.macs(net) == pytest.approx(expected["sizes"][str(depth)]["macs"], rel=1e-3)


@pytest.mark.parametrize("form", ["ema", "model", "plain"])
def test_public_checkpoints_load(tiny, tmp_path, form):
    state = tiny.state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {
        "ema": {"model": other, "ema": state, "opt": {}, "args": Namespace(model="DiT-XL/2")},
        "model": {"model": state},
        "plain": state,
    }
    torch.save(content[form], tmp_path / "DiT.pt")
    net = DiT(**tiny.config)
    models.load_checkpoint(net, tmp_path / "DiT.pt")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="does not fit DiT"):
        models.load_checkpoint(small(), tmp_path / "DiT.pt")


def test_the_table_of_positions_never_learns():
    net = small().requires_grad_(False).requires_grad_(True)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"input_size": 5}, "multiples of patch_size"), ({"hidden_size": 18}, "multiples"), ({"depth": 0}, "positive")],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        DiT(**{"input_size": 4, "hidden_size": 16, "num_heads": 2, "depth": 1, **changes})


def test_wrong_inputs_are_refused():
    net = small()
    x, t, cond = inputs(net)
    with pytest.raises(ValueError, match="needs the classes"):
        net(x, t)
    with pytest.raises(ValueError, match="x_t must be"):
        net(x[:, :1], t, cond)


# ------------------------------------------------------------------------------------------------------ depth pruning


def test_a_pruned_network_is_independent_and_survives_saving(tmp_path):
    net = small()
    x, t, cond = inputs(net)
    student = models.prune_depth(net, [0, 2, 5])
    hooked = copy.deepcopy(net)  # the teacher with its other blocks switched off says the same
    for i in (1, 3, 4):
        hooked.blocks[i].register_forward_hook(lambda block, args, output: args[0])
    torch.testing.assert_close(student(x, t, cond), hooked(x, t, cond))
    student.save(tmp_path / "student")
    loaded = models.load(tmp_path / "student")
    assert loaded.config == student.config and loaded.config["depth"] == 3
    assert torch.equal(loaded(x, t, cond), student(x, t, cond))
    before = net(x, t, cond)
    torch.nn.init.zeros_(student.blocks[0].attn.qkv.weight)
    assert torch.equal(net(x, t, cond), before)


@pytest.mark.parametrize("keep", [[], [2, 1], [0, 0], [-1], [6], 0, 7])
def test_blocks_that_cannot_stay_are_refused(keep):
    with pytest.raises(ValueError, match="block"):
        models.prune_depth(small(), keep)


def test_simple_choices():
    # the scheme that TinyFusion calls oracle
    assert models.uniform_blocks(28, 14) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    assert models.uniform_blocks(6, 6) == list(range(6)) and models.uniform_blocks(6, 1) == [0]
    drawn = {tuple(models.random_blocks(8, 4, seed)) for seed in range(20)}
    assert len(drawn) > 5 and all(len(set(keep)) == 4 and {0, 7} <= set(keep) for keep in drawn)
    assert models.random_blocks(8, 4, 3) == models.random_blocks(8, 4, 3) == sorted(models.random_blocks(8, 4, 3))


def useless(net, blocks):
    """The network with blocks that pass on what they get: their gates are closed."""
    for i in blocks:
        for p in net.blocks[i].adaLN_modulation.parameters():
            torch.nn.init.zeros_(p)
    return net


def test_influence_finds_the_blocks_that_do_nothing():
    net = useless(small(), (1, 3))
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(50, *net.shape, generator=generator) for _ in range(2))
    influence = models.block_influence(net, DDPM(), x0, noise, {"y": torch.arange(50) % 3}, progress=False)
    assert influence.shape == (6,) and set(influence.argsort()[:2].tolist()) == {1, 3}
    assert influence[[1, 3]].abs().max() < 1e-6 and influence[[0, 2, 4, 5]].min() > 1e-4

    # one block by hand, at all timesteps
    process, sums = DDPM(), []
    for t in range(0, 1000, 50):
        seen = {}
        hook = net.blocks[2].register_forward_hook(lambda b, args, out, seen=seen: seen.update(a=args[0], b=out))
        steps = torch.arange(t, t + 50)
        with torch.no_grad():
            net(process.add_noise(x0, noise, steps), steps, {"y": torch.arange(50) % 3})
        hook.remove()
        sums.append(torch.cosine_similarity(seen["a"], seen["b"], dim=-1).mean())
    assert influence[2] == pytest.approx(1 - torch.stack(sums).mean().item(), abs=1e-5)


@pytest.mark.parametrize("keep", [3, 4, 5])
def test_the_gated_network_with_one_hot_gates_is_the_rebuilt_one(keep):
    net = small()
    x, t, cond = inputs(net)
    gated = GatedDepth(copy.deepcopy(net), keep)
    torch.nn.init.normal_(gated.gates)
    chosen = gated.choice(gated.gates)
    assert len(chosen) == keep and GatedDepth(copy.deepcopy(net), keep).options.sum(1).unique().numel() == 1
    torch.testing.assert_close(gated(x, t, cond, hard=True), models.prune_depth(net, chosen)(x, t, cond))

    # a drawn pass is, sample by sample, the network rebuilt with the options that were drawn
    masks = []
    gated.net.register_forward_pre_hook(lambda *_: masks.append(gated.mask))
    drawn = gated(x, t, cond)
    for i, mask in enumerate(masks[0]):
        rebuilt = models.prune_depth(net, mask.round().nonzero().flatten().tolist())
        one = slice(i, i + 1)
        torch.testing.assert_close(drawn[one], rebuilt(x[one], t[one], {"y": cond["y"][one]}), rtol=1e-4, atol=1e-4)


def test_the_learned_choice_drops_useless_blocks_and_leaves_the_network_alone():
    net = useless(small(depth=4), (1, 2))
    before = copy.deepcopy(net.state_dict())
    x, t, cond = inputs(net, 16)
    target = net(x, t, cond).detach()

    def loss(module, step):
        return (module(x, t, cond) - target).square().mean() / target.square().mean()

    state = torch.get_rng_state()
    for lora_rank in (8, 0):
        assert models.learned_blocks(net, 2, loss, 60, lora_rank=lora_rank, progress=False) == [0, 3]  # of 0 1 | 2 3
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="loss at step 0"):
        models.learned_blocks(net, 2, lambda module, step: loss(module, step) * math.nan, 5, progress=False)
    with pytest.raises(ValueError, match="1 to 3 can be chosen"):
        models.learned_blocks(net, 4, loss, 5, progress=False)


def test_low_rank_updates_start_at_zero_and_are_all_that_learns():
    net = small()
    x, t, cond = inputs(net)
    expected = net(x, t, cond)
    gated = GatedDepth(copy.deepcopy(net), 3, lora_rank=2)
    gated.mask = None
    torch.testing.assert_close(gated.net(x, t, cond), expected)
    learns = {name for name, p in gated.named_parameters() if p.requires_grad}
    linears = sum(isinstance(module, torch.nn.Linear) for module in net.modules())
    assert "gates" in learns and len(learns) == 1 + 2 * linears


# ---------------------------------------------------------------------------------------------------- learned variance


def test_ancestral_sampling_with_learned_variance_equals_that_of_diffusers():
    net, process = small(), DDPM(spacing="linspace")
    scheduler = DDPMScheduler(1000, 1e-4, 2e-2, "linear", variance_type="learned_range", clip_sample=False,
                              timestep_spacing="linspace")  # fmt: skip
    scheduler.set_timesteps(250)
    assert process.timesteps(250) == scheduler.timesteps.tolist()
    scheduler.set_timesteps(40)
    start, cond = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(0)), {"y": torch.tensor([0, 2])}
    x, ours = start, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.expand(2), cond), t, x, generator=ours).prev_sample
    theirs = process.sample(net, start.shape, 40, cond, eta=1.0, noise=start, generator=ours.manual_seed(1))
    torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@given(st.integers(1, 999), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_bound_is_the_divergence_of_two_gaussians(t, seed):
    process, generator = DDPM(), torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64).float() for _ in range(2))
    steps = torch.tensor([t])
    x_t = process.add_noise(x0, noise, steps)
    output = torch.randn(1, 4, 3, 3, generator=generator)
    eps, v = split(output, 2)

    # DDPM eq. 6 and 7 in float64, from the betas
    betas = np.linspace(1e-4, 2e-2, 1000).astype(np.float32).astype(np.float64)
    a = np.cumprod(1 - betas)
    variance = lambda s: betas[s] * (1 - a[s - 1]) / (1 - a[s])  # noqa: E731
    mean = lambda x: (betas[t] * np.sqrt(a[t - 1]) * x + (1 - a[t - 1]) * np.sqrt(1 - betas[t]) * x_t) / (1 - a[t])  # noqa: E731
    low, high = np.log(variance(t)), np.log(betas[t])
    predicted = (x_t.double() - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
    scale = (0.5 * (low + (v.double() + 1) / 2 * (high - low))).exp()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(mean(x0.double()), np.sqrt(variance(t))), normal(mean(predicted), scale)
    )
    assert process.bound(output, x0, x_t, steps).item() == pytest.approx(
        kl.mean().item() / math.log(2), rel=2e-3, abs=1e-6
    )

    # a network that knows the noise and chooses the lower bound is exact; so is a student that is its teacher
    exact = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert process.bound(exact, x0, x_t, steps).abs() < 1e-4
    assert process.bound(output, x0, x_t, steps, output).abs() < 1e-6


def test_only_the_variance_learns_from_the_bound():
    process, x0, noise = DDPM(), torch.rand(4, 2, 3, 3) * 2 - 1, torch.randn(4, 2, 3, 3)
    t = torch.tensor([0, 1, 500, 999])
    output, teacher = torch.randn(4, 4, 3, 3).requires_grad_(), torch.randn(4, 4, 3, 3).requires_grad_()
    process.bound(output, x0, process.add_noise(x0, noise, t), t, teacher).backward()
    eps, v = split(output.grad, 2)
    assert not eps.any() and (v[1:] != 0).all() and teacher.grad is None


def test_the_first_step_is_the_likelihood_of_8_bit_pixels():
    """The probabilities of the 256 levels add up to 1."""
    process, t = DDPM(), torch.zeros(256, dtype=torch.int64)
    x_t = torch.full((256, 1, 1, 1), 0.2)
    output = torch.tensor([0.3, 0.5])[None, :, None, None].expand(256, -1, -1, -1)
    levels = torch.arange(256)[:, None, None, None] / 127.5 - 1
    bits = [process.bound(output[i : i + 1], levels[i : i + 1], x_t[:1], t[:1]) for i in range(256)]
    assert sum(2 ** -b.item() for b in bits) == pytest.approx(1, abs=1e-3)


def test_spacing_and_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="spacing"):
        DDPM(spacing="quad")
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        DDPM().sample(lambda x, t, cond: torch.zeros(2, 3, 4, 4), (2, 2, 4, 4), 2)


# ------------------------------------------------------------------------------------------- TinyFusion's objective


def test_the_masked_feature_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 5, 4, generator=generator) for _ in range(3)] for _ in range(2))
    student[1][0, 0, 0] = 1e4  # a massive activation

    def masked(h):
        flat = h.reshape(len(h), -1).numpy()
        far = np.abs(flat - flat.mean(1, keepdims=True)) >= 2 * flat.std(1, ddof=1, keepdims=True)
        return np.where(far, 0, flat)

    expected = np.mean([((masked(s) - masked(t)) ** 2).mean() for s, t in zip(student, teacher, strict=True)])
    assert models.masked_feature_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert expected < 10


def test_layer_maps_are_the_published_ones():
    assert models.layer_map(14, 28) == [2 * i + 1 for i in range(14)]
    assert models.layer_map(7, 28) == [4 * i + 3 for i in range(7)]
    assert models.layer_map(7, 14) == [2 * i + 1 for i in range(7)]
    assert models.layer_map(4, 28) == [1, 8, 15, 22] and models.layer_map(4, 7) == [1, 3, 4, 6]
    with pytest.raises(ValueError, match="cannot be mapped"):
        models.layer_map(5, 4)
    for student, teacher in itertools.combinations_with_replacement(range(1, 13), 2):
        chosen = models.layer_map(student, teacher)
        assert len(set(chosen)) == student and chosen == sorted(chosen) and chosen[-1] < teacher


@pytest.mark.parametrize("method", ["none", "out+feat", "place"])
def test_the_objective_is_that_of_tinyfusion(method):
    settings = train.Settings(arch="dit", kd=(method,), steps=1000)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    output, teacher = (torch.randn(4, 2, 8, 8, generator=generator) for _ in range(2))
    own, theirs = ([torch.randn(4, 16, 8, generator=generator)] for _ in range(2))
    process, t = DDPM(), torch.tensor([0, 3, 500, 999])
    batch, x_t = train.Batch(x0, noise, t, {}), process.add_noise(x0, noise, t)
    loss, parts = train.objective(settings, process, method, batch, x_t, output, teacher, own, theirs, None, 0.01)
    ground_truth = (output[:, :1] - noise).square().mean() + process.bound(output, x0, x_t, t)
    feat = 0.01 * models.masked_feature_loss(own, theirs)
    if method == "none":
        expected = 0.1 * ground_truth + feat
    else:
        kd = process.bound(output, x0, x_t, t, teacher)
        if method == "place":
            constants = lift_place.PRESETS["tinyfusion"]
            kd = kd + lift_place.place(output[:, :1], teacher[:, :1], **constants).loss
            assert constants["norm"] == "l2" and parts.b0.shape == (4, 1, 4)
        else:
            kd = kd + (output[:, :1] - teacher[:, :1]).square().mean()
        expected = 0.1 * ground_truth + 0.9 * kd + feat
    torch.testing.assert_close(loss, expected)


def test_the_feature_weight_falls_to_zero_in_a_hundred_stages():
    settings = train.Settings(arch="dit", steps=1000)
    weights = [train.feature_weight(settings, step) for step in range(1000)]
    assert weights[0] == 1e-2 and weights[-1] == 0 and len(set(weights)) == 100
    assert weights[500] == pytest.approx(1e-2 * (1 - 50 / 99)) and weights == sorted(weights, reverse=True)
    pixel = train.Settings(steps=1000)
    assert {train.feature_weight(pixel, step) for step in (0, 999)} == {1e-6}
