"""The DDPM process: its schedule, its noising, and its sampler against the exact answer and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion import DDPM


class SmallNet(nn.Module):
    """A small network of x and t that keeps x near unit size: the exact answer for N(0, 1) data plus a bend."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.alpha_bar = DDPM().alpha_bar

    def forward(self, x, t, cond=None):
        a = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * x + 0.2 * torch.tanh(self.conv(x) + t.float().reshape(-1, 1, 1, 1) / 1000)


def gaussian_oracle(process, mean, std):
    """The exact noise prediction E[noise | x_t] when the data are N(mean, std^2); std = 0 is a point mass."""

    def net(x, t, cond=None):
        a = process.alpha_bar[t].reshape(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return net


def small_net(seed=0):
    torch.manual_seed(seed)
    return SmallNet().eval()


def test_schedule():
    process = DDPM()
    exact = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    assert process.betas.shape == process.alpha_bar.shape == (1000,)
    assert process.alpha_bar.dtype == torch.float32
    assert process.alpha_bar[0].item() == pytest.approx(1 - 1e-4, rel=1e-6)
    assert process.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    torch.testing.assert_close(process.alpha_bar.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 2, 5), (4, 3, 2, 4, 4)], ids=["image", "sequence", "video"])
def test_add_noise_is_the_weighted_sum_sample_by_sample(shape):
    process, t = DDPM(), torch.tensor([0, 10, 500, 999])
    x0, noise = torch.randn(shape), torch.randn(shape)
    xt = process.add_noise(x0, noise, t)
    for i, a in enumerate(process.alpha_bar[t].tolist()):
        torch.testing.assert_close(xt[i], math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i])
    assert process.target(x0, noise, t) is noise


@pytest.mark.parametrize("t", [0, 300, 999])
def test_add_noise_marginal(t):
    process, generator = DDPM(), torch.Generator().manual_seed(0)
    x0 = torch.full((200, 1, 32, 32), 0.7)
    xt = process.add_noise(x0, torch.randn(x0.shape, generator=generator), torch.full((200,), t))
    a = process.alpha_bar[t].item()
    assert xt.mean().item() == pytest.approx(0.7 * math.sqrt(a), abs=5 * math.sqrt((1 - a) / x0.numel()))
    assert xt.var().item() == pytest.approx(1 - a, rel=0.02)


@settings(deadline=None)
@given(batch=st.integers(1, 200), steps=st.integers(1, 1000), seed=st.integers(0, 2**32))
def test_timesteps_come_in_antithetic_pairs(batch, steps, seed):
    t = DDPM(steps).sample_t(batch, torch.Generator().manual_seed(seed))
    assert t.shape == (batch,)
    assert t.dtype == torch.int64
    assert 0 <= t.min() <= t.max() < steps
    drawn = batch // 2 + 1
    assert torch.equal(t[drawn:], steps - 1 - t[: max(batch - drawn, 0)])


def test_timesteps_are_uniform_and_follow_the_generator():
    process = DDPM(10)
    t = process.sample_t(100_000, torch.Generator().manual_seed(0))
    assert (t.bincount(minlength=10) - 10_000).abs().max() < 500
    assert torch.equal(t, process.sample_t(100_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(t, process.sample_t(100_000, torch.Generator().manual_seed(1)))


@settings(deadline=None)
@given(total=st.integers(1, 1000), data=st.data())
def test_sampler_visits_exactly_the_steps_asked_for(total, data):
    steps = data.draw(st.integers(1, total))
    ts = DDPM(total).timesteps(steps)
    gaps = {a - b for a, b in pairwise(ts)}
    assert len(ts) == steps
    assert ts[-1] == 0
    assert ts[0] < total
    assert all(gap in (total // steps, -(-total // steps)) for gap in gaps)
    if total % steps == 0:
        assert ts == list(reversed(range(0, total, total // steps)))  # the published rule


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 20])
def test_sampler_equals_diffusers(eta, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    net, noise = small_net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    theirs, generator = noise, torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = net(theirs, t.expand(2))
            theirs = scheduler.step(eps, t, theirs, eta=eta, generator=generator).prev_sample
    ours = DDPM().sample(net, noise.shape, steps, eta=eta, noise=noise, generator=torch.Generator().manual_seed(2))
    assert (ours - theirs).abs().max() < 2e-4
    assert 0.5 < ours.std() < 3  # a comparison of numbers of a sensible size


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 4)], ids=["image", "video"])
def test_sampler_recovers_a_point_mass_exactly(eta, steps, shape):
    process, x0 = DDPM(), torch.linspace(-1, 1, 4)
    x = process.sample(gaussian_oracle(process, x0, 0.0), shape, steps, eta=eta)
    torch.testing.assert_close(x, x0.expand(shape), rtol=0, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_recovers_a_gaussian(eta):
    process, generator = DDPM(), torch.Generator().manual_seed(0)
    x = process.sample(gaussian_oracle(process, 0.3, 0.5), (20, 1, 32, 32), 1000, eta=eta, generator=generator)
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.02)


def test_sampler_is_determined_by_its_generator_and_its_noise():
    process, net, shape = DDPM(), small_net(), (2, 3, 8, 8)

    def sample(seed, **kw):
        return process.sample(net, shape, 5, generator=torch.Generator().manual_seed(seed), **kw)

    assert torch.equal(sample(0, eta=1.0), sample(0, eta=1.0))
    assert not torch.equal(sample(0), sample(1))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept = noise.clone()
    assert torch.equal(sample(1, noise=noise), sample(0))  # eta = 0: the start decides everything
    assert not torch.equal(sample(1, noise=noise, eta=1.0), sample(2, noise=noise, eta=1.0))
    assert torch.equal(noise, kept)


def test_sampler_calls_the_network_by_the_convention():
    calls, cond = [], {"y": torch.tensor([3, 4])}

    def net(x, t, cond):
        calls.append((t, cond))
        return torch.zeros_like(x, dtype=torch.bfloat16)

    bar = []
    x = DDPM().sample(net, (2, 1, 4, 4), 300, cond, progress=lambda steps: bar.append(len(steps)) or steps)
    assert len(calls) == bar[0] == 300
    assert all(t.shape == (2,) and c is cond for t, c in calls)
    assert [int(t[0]) for t, _ in calls] == DDPM().timesteps(300)
    assert x.dtype == torch.float32


def test_samples_are_not_clipped_and_carry_no_graph():
    net = small_net()
    x = DDPM().sample(net, (2, 3, 8, 8), 10, noise=torch.full((2, 3, 8, 8), 50.0))
    assert x.abs().max() > 10
    assert not x.requires_grad
    assert not x.is_inference()
    assert all(p.grad is None for p in net.parameters())


def test_a_first_call_under_inference_mode_does_not_spoil_training():
    process, t = DDPM(), torch.tensor([1, 2], device="meta")  # a device that the table has to be copied to
    x0 = torch.zeros(2, 1, 4, 4, device="meta", requires_grad=True)
    with torch.inference_mode():
        process.add_noise(x0, x0, t)
    process.add_noise(x0, x0, t).sum().backward()
    assert x0.grad is not None


@settings(deadline=None)
@given(total=st.integers(1, 1000), data=st.data())
def test_a_fold_sees_the_same_images_at_evenly_spaced_timesteps(total, data):
    steps = data.draw(st.integers(1, total))
    teacher = DDPM(total)
    student = teacher.fold(steps)
    t = torch.arange(steps)
    phi = student.phi(t)
    assert phi[-1] == total - 1 and phi[0] >= 0
    assert set(phi.diff().tolist()) <= {total // steps, -(-total // steps)}
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(steps, 1, 2, 2, generator=generator) for _ in range(2))
    assert torch.equal(student.add_noise(x0, noise, t), teacher.add_noise(x0, noise, phi))
    assert student.steps == steps and student.sample_t(50).max() < steps
    torch.testing.assert_close((1 - student.betas).cumprod(0), student.alpha_bar, rtol=1e-3, atol=0)


def test_the_fold_of_all_steps_is_the_process_itself_and_folds_can_follow_each_other():
    process, t = DDPM(), torch.arange(1000)
    same = process.fold(1000)
    assert torch.equal(same.phi(t), t) and torch.equal(process.phi(t), t)
    assert torch.equal(same.alpha_bar, process.alpha_bar) and torch.equal(same.betas, process.betas)
    twice, once = process.fold(125).fold(25), process.fold(25)
    assert torch.equal(twice.alpha_bar, once.alpha_bar)
    assert twice.phi(torch.arange(25)).tolist() == list(range(4, 125, 5))  # the timesteps of 125, not of 1000
    torch.testing.assert_close(twice.betas, once.betas)
    assert process.fold(128).phi(torch.tensor([0, 1, 127])).tolist() == [6, 14, 999]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 25, 128])
def test_a_teacher_on_the_fold_samples_as_ddim_on_those_timesteps(steps, eta):
    net, noise, process = small_net(), torch.randn(2, 3, 4, 4), DDPM()
    student = process.fold(steps)
    visited = student.phi(torch.arange(steps)).tolist()[::-1]

    def wrapped(x, t, cond):
        return net(x, student.phi(t), cond)

    def sample(where, by, at):
        return where.sample(by, noise.shape, at, eta=eta, noise=noise, generator=torch.Generator().manual_seed(0))

    folded = sample(student, wrapped, steps)
    assert torch.equal(folded, sample(process, net, visited))
    assert (folded - sample(process, net, steps)).abs().max() > 1e-3  # which are not those that DDIM would take


def test_the_sampler_visits_the_timesteps_it_is_given():
    calls = []
    net = lambda x, t, cond: calls.append(int(t[0])) or 0 * x  # noqa: E731
    DDPM().sample(net, (1, 1, 2, 2), [999, 500, 3])
    assert calls == [999, 500, 3]
    process, x0 = DDPM().fold(5), torch.linspace(-1, 1, 4)
    x = process.sample(gaussian_oracle(process, x0, 0.0), (2, 1, 4, 4), 3)  # fewer than it has
    torch.testing.assert_close(x, x0.expand(2, 1, 4, 4), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: DDPM(0), "at least 1 timestep"),
        (lambda p: DDPM(10, 0.02, 0.01), "beta_start <= beta_end"),
        (lambda p: DDPM(10, 0.0, 0.01), "beta_start <= beta_end"),
        (lambda p: p.sample_t(0), "at least 1"),
        (lambda p: p.sample(None, (1, 1, 4, 4), 0), "1 to 1000 steps"),
        (lambda p: p.sample(None, (1, 1, 4, 4), 1001), "1 to 1000 steps"),
        (lambda p: p.sample(None, (1, 1, 4, 4), [5, 5]), "must fall"),
        (lambda p: p.sample(None, (1, 1, 4, 4), [1000, 0]), "at most 999"),
        (lambda p: p.sample(None, (1, 1, 4, 4), [0, -1]), "at least 0"),
        (lambda p: p.sample(None, (1, 1, 4, 4), []), "must fall"),
        (lambda p: p.fold(0), "1 to 1000 steps, not 0"),
        (lambda p: p.fold(1001), "1 to 1000 steps, not 1001"),
        (lambda p: p.fold(25).fold(26), "1 to 25 steps, not 26"),
        (lambda p: p.fold(25).sample(None, (1, 1, 4, 4), 26), "1 to 25 steps"),
        (lambda p: p.sample(None, (1, 1, 4, 4), eta=1.5), "eta"),
        (lambda p: p.sample(None, (1, 1, 4, 4), eta=-0.1), "eta"),
        (lambda p: p.sample(None, (1, 1, 4, 4), noise=torch.zeros(2, 1, 4, 4)), r"\(1, 1, 4, 4\).*\(2, 1, 4, 4\)"),
        (lambda p: p.sample(lambda x, t, c: x[:, :1], (1, 3, 4, 4)), r"\(1, 3, 4, 4\).*\(1, 1, 4, 4\)"),
        (lambda p: p.add_noise(torch.zeros(2, 1), torch.zeros(2, 2), torch.tensor([1, 2])), "one shape"),
        (lambda p: p.add_noise(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1])), "shape"),
        (lambda p: p.add_noise(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1.0, 2.0])), "integer t"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(DDPM())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clipping_on_the_way_equals_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    process = DDPM(clip_x0=True)
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, clip_sample=True, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)

    def net(x_t, t, cond=None):
        return 0.7 * x_t.roll(1, -1) - 0.2  # far from any noise: most pixels are clipped

    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x, generator = start, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, eta=eta, use_clipped_model_output=True, generator=generator).prev_sample
    ours = process.sample(net, start.shape, 20, eta=eta, noise=start, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() <= 1 and DDPM().sample(net, start.shape, 20, noise=start).abs().max() > 1
    assert process.sampler == "DDIM with clipped x0" and DDPM().sampler == "DDIM"
