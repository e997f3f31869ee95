"""The rectified flow: its lines, its times, and its sampler against the exact answer and against diffusers."""

import json
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from diffusion import DDPM, RectifiedFlow
from models import UNet, load


def scheduler(shift):
    return pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)


def sigmas(steps):
    """Evenly spaced from 1 down to 1 / steps: what diffusers has to be told so that it shifts once."""
    return np.linspace(1.0, 1 / steps, steps)


def small_net(z, t, cond=None):
    s = (t / 1000).reshape(-1, *[1] * (z.ndim - 1))
    return z.roll(1, -1) - 0.5 * z + torch.tanh(3 * z + s)


def gaussian_oracle(mean, std):
    """The exact velocity E[noise - x0 | z_s] when the data are N(mean, std^2); std = 0 is a point mass."""

    def net(z, t, cond=None):
        s = (t / 1000).reshape(-1, *[1] * (z.ndim - 1))
        return -mean + (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2) * (z - (1 - s) * mean)

    return net


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 2, 5), (4, 3, 2, 4, 4)], ids=["image", "sequence", "video"])
def test_noise_and_target_are_a_point_and_the_slope_of_a_line(shape):
    flow, t = RectifiedFlow(shift=3), torch.tensor([0.0, 10.0, 500.0, 1000.0])
    x0, noise = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    z, h = flow.add_noise(x0, noise, t), 1.0
    for i, s in enumerate((t / 1000).tolist()):
        torch.testing.assert_close(z[i], (1 - s) * x0[i] + s * noise[i], rtol=1e-6, atol=1e-7)
    assert torch.equal(z[0], x0[0]) and torch.equal(z[3], noise[3])
    slope = (flow.add_noise(x0, noise, t + h) - z) / (h / 1000)
    torch.testing.assert_close(flow.target(x0, noise, t), slope, rtol=1e-4, atol=1e-4)
    assert torch.equal(flow.add_noise(x0, noise, t.long()), z)


def test_noise_equals_diffusers():
    theirs, flow = scheduler(3.0), RectifiedFlow()
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = theirs.timesteps[[0, 400, 999]]
    torch.testing.assert_close(flow.add_noise(x0, noise, t), theirs.scale_noise(x0, t, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_are_logit_normal_and_shifted_once(shift):
    flow = RectifiedFlow(shift)
    t = flow.sample_t(100_000, torch.Generator().manual_seed(0))
    assert t.shape == (100_000,) and t.dtype == torch.float32 and t.min() > 0 and t.max() < 1000
    s = t.double() / 1000
    unshifted = s / (shift - (shift - 1) * s)  # the inverse of m s / (1 + (m - 1) s)
    logits = unshifted.logit()
    assert abs(logits.mean()) < 0.02 and abs(logits.std() - 1) < 0.02
    assert logits.abs().gt(1).double().mean().item() == pytest.approx(0.3173, abs=0.01)
    assert torch.equal(t, flow.sample_t(100_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(t, flow.sample_t(100_000, torch.Generator().manual_seed(1)))


def test_training_times_are_those_of_the_reference_trainer():
    """It draws an index int(1000 u), u logit-normal, into diffusers' list of shifted timesteps."""
    u = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    theirs = scheduler(3.0).timesteps[(u * 1000).long()]
    ours = RectifiedFlow(3.0).sample_t(100_000, torch.Generator().manual_seed(1))
    levels = torch.linspace(0.05, 0.95, 19)
    assert (
        theirs.quantile(levels) - ours.quantile(levels)
    ).abs().max() < 8  # of 1000; an unshifted draw is off by 100 to 270


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_sampler_equals_diffusers_where_it_shifts_once(shift, steps):
    theirs, flow = scheduler(shift), RectifiedFlow(shift)
    theirs.set_timesteps(sigmas=sigmas(steps))
    assert flow.timesteps(steps) == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    z = noise
    for t in theirs.timesteps:
        z = theirs.step(small_net(z, t.expand(2)), t, z).prev_sample
    ours = flow.sample(small_net, noise.shape, steps, noise=noise)
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)
    assert 0.3 < ours.std() < 30 and not torch.allclose(ours, noise)


def test_a_number_of_steps_shifts_twice_in_diffusers_and_once_here():
    """The documented difference. Should diffusers change this, the docstring of RectifiedFlow has to change too."""
    theirs = scheduler(3.0)
    theirs.set_timesteps(4)
    assert theirs.timesteps.tolist() == pytest.approx([1000, 857.7, 602.2, 8.93], abs=0.1)
    assert RectifiedFlow(3.0).timesteps(4) == pytest.approx([1000, 900, 750, 500])
    assert "1000, 857.7, 602.2, 8.9" in RectifiedFlow.__doc__ and "1000, 900, 750" in RectifiedFlow.__doc__


@pytest.mark.parametrize("steps", [1, 7, 28])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 4)], ids=["image", "video"])
def test_sampler_recovers_a_point_mass_exactly(steps, shape):
    x0 = torch.linspace(-1, 1, 4)
    x = RectifiedFlow(3.0).sample(gaussian_oracle(x0, 0.0), shape, steps)
    torch.testing.assert_close(x, x0.expand(shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampler_reaches_the_distribution_of_the_data(shift):
    noise = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = RectifiedFlow(shift).sample(gaussian_oracle(0.5, 0.3), noise.shape, 500, noise=noise)
    torch.testing.assert_close(x, 0.5 + 0.3 * noise, rtol=0, atol=0.02)  # the flow between two Gaussians is affine


def test_sampling_hands_on_conditions_and_follows_generators():
    flow, seen = RectifiedFlow(), []

    def net(z, t, cond):
        seen.append((t, cond))
        return small_net(z, t)

    cond = {"text": torch.ones(2, 3, 4)}
    one, again = (flow.sample(net, (2, 1, 4, 4), 3, cond, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again) and len(seen) == 6 and all(given is cond for _, given in seen)
    assert all(t.shape == (2,) and t.is_floating_point() for t, _ in seen)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = flow.sample(net, (2, 1, 4, 4), 3, generator=generators)
    alone = flow.sample(net, (1, 1, 4, 4), 3, generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both[1:], alone)
    wrapped = []
    flow.sample(net, (1, 1, 4, 4), 5, progress=lambda steps: wrapped.extend(steps) or steps)
    assert [t for t, _ in wrapped] == flow.timesteps(5)


def test_what_cannot_be_done_is_said():
    flow, x = RectifiedFlow(), torch.zeros(2, 1, 4, 4)
    for shift in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shift above 0"):
            RectifiedFlow(shift)
    with pytest.raises(ValueError, match=r"t of shape \(B,\)"):
        flow.add_noise(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="of one shape"):
        flow.add_noise(x, x[:1], torch.zeros(2))
    with pytest.raises(ValueError, match="at least 1"):
        flow.sample_t(0)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000 steps"):
            flow.sample(small_net, x.shape, steps)
    with pytest.raises(ValueError, match="eta must be 0, got 1"):
        flow.sample(small_net, x.shape, 2, eta=1.0)
    with pytest.raises(ValueError, match="starting noise"):
        flow.sample(small_net, x.shape, 2, noise=x[:1])
    with pytest.raises(ValueError, match="velocity of shape"):
        flow.sample(lambda z, t, cond: z[:, :, :2], x.shape, 2)


def test_it_takes_the_place_of_ddpm():
    public = {name for name in vars(DDPM) if not name.startswith("_")}
    own = {"bound", "fold", "noise_in", "phi"}  # of a learned variance, of fewer steps, and of a sampler's inside
    assert public - set(dir(RectifiedFlow)) == own


def test_our_unet_learns_a_flow():
    """Two images, a hundred steps: the loss falls, and the sampler comes nearer to them than to anything else."""
    torch.manual_seed(0)
    flow = RectifiedFlow()
    net = UNet(8, 1, channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=8)
    pair = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)]) * torch.linspace(0.2, 1, 8)
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(100):
        x0 = pair[torch.randint(0, 2, (16,))]
        noise, t = torch.randn_like(x0), flow.sample_t(16)
        loss = (net(flow.add_noise(x0, noise, t), t) - flow.target(x0, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    x = flow.sample(net.eval(), (16, 1, 8, 8), 20, generator=torch.Generator().manual_seed(1))
    to_pair = (x[:, None] - pair[None]).square().mean((2, 3, 4))  # (16, 2)
    assert to_pair.amin(1).mean() < 0.1 and set(to_pair.argmin(1).tolist()) == {0, 1}


def test_a_flow_is_trained_and_sampled_by_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for library in ("diffusers", "transformers", "accelerate"):  # which nobody needs for this
        monkeypatch.setitem(sys.modules, library, None)
    few = ["--process", "flow", "--steps", "2", "--teacher-steps", "2", "--batch-size", "8", "--channels", "16"]
    assert train.main([*few, "--eval-samples", "0", "--prune", "0.5", "--importance", "taylor"]) == 0
    student = load(tmp_path / "runs/digits8-prune0.5-flow-place/student")
    x = evaluate.sample(student, RectifiedFlow(), 6, seed=0, steps=2)
    assert x.shape == (6, 1, 8, 8) and x.isfinite().all()
    teacher = next((tmp_path / "runs/teachers").glob("*/config.json"))
    assert json.loads(teacher.read_text())["process"] == "flow"

    settings = train.Settings(arch="dit", process="flow")
    assert settings.eta == 0 and train.Settings(arch="dit").eta == 1
    assert not train.new_network(settings, data.load("digits")).config["learn_sigma"]
    for wrong in (["--eta", "1"], ["--fold-steps", "8"]):
        with pytest.raises(SystemExit):
            train.main([*few, *wrong])
        assert "--process flow has none of it" in capsys.readouterr().err
