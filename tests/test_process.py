"""The processes: noise, targets, times and samplers, against the exact answer and against diffusers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distil.presets import PROCESSES
from distil.process import DDPM, Guided, Process, RectifiedFlow, fold_of, make_process, process_of, split
from models import UNet

bounded = settings(max_examples=50, deadline=None, derandomize=True, database=None)
EVERY = {name: make_process(name) for name in PROCESSES}
every_process = pytest.mark.parametrize("process", EVERY.values(), ids=EVERY)
shapes = pytest.mark.parametrize(
    "shape", [(4, 3, 8, 8), (4, 2, 5), (4, 3, 2, 4, 4)], ids=["image", "sequence", "video"]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ray(process: Process, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x_t = alpha x0 + sigma noise, in float64: alpha and sigma, (B, 1, ...)."""
    if isinstance(process, DDPM):
        a = process.alpha_bar.double()[t]
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
    else:
        alpha, sigma = 1 - t.double() / 1000, t.double() / 1000
    return tuple(x.reshape(-1, *[1] * (like.ndim - 1)) for x in (alpha, sigma))


def oracle(process: Process, mean, std, bend: float = 0.0):
    """The exact output E[target | x_t] when the data are N(mean, std^2), std = 0 is a point mass; and a bend."""

    def net(x, t, cond=None):
        alpha, sigma = ray(process, t, x)
        off = (x.double() - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0, noise = mean + alpha * std**2 * off, sigma * off
        kind = getattr(process, "prediction", "velocity")
        output = {"noise": noise, "v": alpha * noise - sigma * x0, "velocity": noise - x0, "x0": x0}[kind]
        return (output + bend * torch.tanh(3 * x.roll(1, -1) + t.reshape(alpha.shape) / 1000)).float()

    return net


# ---- noise and targets -----------------------------------------------------------------------------------------------


def test_schedule():
    process = DDPM()
    exact = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    assert process.betas.shape == process.alpha_bar.shape == (1000,) and process.alpha_bar.dtype == torch.float32
    assert process.alpha_bar[0].item() == pytest.approx(1 - 1e-4, rel=1e-6)
    assert process.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    torch.testing.assert_close(process.alpha_bar.double(), exact, rtol=2e-5, atol=0)


@shapes
@every_process
def test_noise_is_a_weighted_sum_and_the_target_its_prediction_sample_by_sample(process, shape):
    x0, noise = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0, 10, 500, process.latest])
    alpha, sigma = ray(process, t, x0)
    torch.testing.assert_close(process.add_noise(x0, noise, t), alpha * x0 + sigma * noise, rtol=1e-5, atol=1e-5)
    assert process.add_noise(x0.float(), noise.float(), t).dtype == torch.float32
    kinds = {"noise": noise, "v": alpha * noise - sigma * x0, "velocity": noise - x0}
    wanted = kinds[getattr(process, "prediction", "velocity")]
    torch.testing.assert_close(process.target(x0, noise, t), wanted, rtol=1e-5, atol=1e-5)
    if isinstance(process, DDPM):
        found = process.noise_in(process.target(x0, noise, t), process.add_noise(x0, noise, t), t)
        torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-5)
    else:  # which is the slope of the line, whole numbers or not
        slope = (process.add_noise(x0, noise, t + 1.0) - process.add_noise(x0, noise, t)) * 1000
        torch.testing.assert_close(process.target(x0, noise, t), slope, rtol=1e-4, atol=1e-4)
        assert torch.equal(process.add_noise(x0, noise, t.float()), process.add_noise(x0, noise, t))
        assert torch.equal(process.add_noise(x0, noise, t)[3], noise[3])


def test_a_first_call_under_inference_mode_does_not_spoil_training():
    process, t = DDPM(), torch.tensor([1, 2], device="meta")  # a device that the table has to be copied to
    x0 = torch.zeros(2, 1, 4, 4, device="meta", requires_grad=True)
    with torch.inference_mode():
        process.add_noise(x0, x0, t)
    process.add_noise(x0, x0, t).sum().backward()
    assert x0.grad is not None


# ---- times -----------------------------------------------------------------------------------------------------------


@bounded
@given(batch=st.integers(1, 200), steps=st.integers(1, 1000), seed=st.integers(0, 2**32))
def test_timesteps_come_in_antithetic_pairs(batch, steps, seed):
    t = DDPM(steps).sample_t(batch, seeded(seed))
    assert t.shape == (batch,) and t.dtype == torch.int64 and 0 <= t.min() <= t.max() < steps
    drawn = batch // 2 + 1
    assert torch.equal(t[drawn:], steps - 1 - t[: max(batch - drawn, 0)])


@every_process
def test_training_times_follow_the_generator_and_are_distributed_as_published(process):
    t = process.sample_t(100_000, seeded())
    assert torch.equal(t, process.sample_t(100_000, seeded())) and t.shape == (100_000,)
    assert not torch.equal(t, process.sample_t(100_000, seeded(1)))
    if isinstance(process, DDPM):  # uniform
        assert ((t * 10 // process.steps).bincount(minlength=10) - 10_000).abs().max() < 500
    else:  # logit-normal, shifted once
        assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1000
        s, m = t.double() / 1000, process.shift
        logits = (s / (m - (m - 1) * s)).logit()  # of the inverse of m s / (1 + (m - 1) s)
        assert abs(logits.mean()) < 0.02 and abs(logits.std() - 1) < 0.02
        assert logits.abs().gt(1).double().mean().item() == pytest.approx(0.3173, abs=0.01)


def test_uniform_timesteps_are_drawn_alone():
    t = make_process(timesteps="uniform").sample_t(100_000, seeded())
    assert t.dtype == torch.int64 and (t.min(), t.max()) == (0, 999)
    assert torch.bincount(t).float().std() < 2 * 100**0.5 and abs(torch.corrcoef(t.view(2, -1).float())[0, 1]) < 0.02
    assert make_process("flow", timesteps="uniform").sample_t(4).is_floating_point()


def test_quadratic_timesteps_are_those_of_ddim():
    """https://github.com/ermongroup/ddim, skip_type "quad"; from one to the same a step changes nothing."""
    for total, steps in ((1000, 100), (1000, 98), (1000, 10), (200, 7), (5, 5), (1000, 1)):
        published = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), steps) ** 2]
        ours = DDPM(total, spacing="quad").timesteps(steps)
        assert ours == sorted(set(published), reverse=True)
    assert len(DDPM(spacing="quad").timesteps(100)) == 96 and DDPM(spacing="quad").timesteps(100)[0] == 800


def test_timesteps_from_end_to_end_are_those_of_dit():
    """https://github.com/facebookresearch/DiT, space_timesteps: a stride that is added up, then rounded."""
    for total, steps in ((1000, 250), (1000, 21), (1000, 53), (100, 7), (1000, 1000), (5, 1)):
        at, published = 0.0, []
        for _ in range(steps):
            published.append(round(at))
            at += (total - 1) / max(steps - 1, 1)
        assert DDPM(total, spacing="linspace").timesteps(steps) == published[::-1]


def test_training_times_of_a_flow_are_those_of_the_reference_trainer():
    """It draws an index int(1000 u), u logit-normal, into diffusers' list of shifted timesteps."""
    u = torch.randn(100_000, generator=seeded()).sigmoid()
    theirs = diffusers_flow(3.0).timesteps[(u * 1000).long()]
    ours, levels = RectifiedFlow(3.0).sample_t(100_000, seeded(1)), torch.linspace(0.05, 0.95, 19)
    # of 1000; an unshifted draw is off by 100 to 270
    assert (theirs.quantile(levels) - ours.quantile(levels)).abs().max() < 8


@bounded
@given(total=st.integers(1, 1000), data=st.data())
def test_a_sampler_visits_exactly_the_steps_asked_for(total, data):
    steps = data.draw(st.integers(1, total))
    for spacing, last in (("leading", total - 1), ("linspace", total)):
        ts = DDPM(total, spacing=spacing).timesteps(steps)
        gaps = {a - b for a, b in pairwise(ts)}
        assert len(ts) == steps and ts[-1] == 0 and ts[0] <= last
        assert len(gaps) <= 2 and max(gaps, default=1) - min(gaps, default=1) <= 1 and min(gaps, default=1) >= 1
    assert ts[0] == (total - 1 if steps > 1 else 0)
    if total % steps == 0:
        assert DDPM(total).timesteps(steps) == list(reversed(range(0, total, total // steps)))  # the published rule


# ---- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_flow(shift):
    return pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)


def diffusers_sample(scheduler, net, noise, **options):
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def diffusers_ddpm(kind, process, steps, **options):
    scheduler = getattr(pytest.importorskip("diffusers"), kind)(
        trained_betas=process.betas.tolist(),
        num_train_timesteps=process.steps,
        prediction_type={"noise": "epsilon", "v": "v_prediction", "x0": "sample"}[process.prediction],
        clip_sample=process.clip_x0,
        timestep_spacing=process.spacing,
        **options,
    )
    scheduler.set_timesteps(steps)
    assert process.timesteps(steps) == scheduler.timesteps.tolist()
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 20])
@pytest.mark.parametrize("name", ["ddpm", "sd", "sd-v"])
def test_ddim_equals_that_of_diffusers(name, eta, steps):
    process = make_process(name)
    net, noise = oracle(process, 0, 1, bend=0.2), torch.randn(2, 3, 8, 8, generator=seeded(1))
    theirs = diffusers_sample(diffusers_ddpm("DDIMScheduler", process, steps), net, noise, generator=seeded(2), eta=eta)
    ours = process.sample(net, noise.shape, steps, eta=eta, noise=noise, generator=seeded(2))
    assert (ours - theirs).abs().max() < 2e-4
    assert 0.5 < ours.std() < 3  # a comparison of numbers of a sensible size


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("prediction", ["noise", "v", "x0"])
def test_every_schedule_and_prediction_is_sampled_as_in_diffusers(name, prediction):
    schedule = {"squaredcos_cap_v2": "cosine"}.get(name, name)
    process = DDPM(500, 1e-4, 0.03, schedule=schedule, prediction=prediction)
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(500, 1e-4, 0.03, name)
    torch.testing.assert_close(process.betas, scheduler.betas, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(process.alpha_bar, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-9)
    net, noise = oracle(process, 0, 1, bend=0.2), torch.randn(2, 3, 8, 8, generator=seeded(1))
    theirs = diffusers_sample(diffusers_ddpm("DDIMScheduler", process, 20), net, noise)
    assert (process.sample(net, noise.shape, 20, noise=noise) - theirs).abs().max() < 1e-3 and theirs.std() < 3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clipping_on_the_way_equals_that_of_diffusers(eta):
    process, start = DDPM(clip_x0=True), torch.randn(2, 1, 4, 4, generator=seeded())
    scheduler = diffusers_ddpm("DDIMScheduler", process, 20)

    def net(x_t, t, cond=None):
        return 0.7 * x_t.roll(1, -1) - 0.2  # far from any noise: most pixels are clipped

    x = diffusers_sample(scheduler, net, start, generator=seeded(1), eta=eta, use_clipped_model_output=True)
    ours = process.sample(net, start.shape, 20, eta=eta, noise=start, generator=seeded(1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() <= 1 and DDPM().sample(net, start.shape, 20, noise=start).abs().max() > 1
    assert process.sampler == "DDIM with clipped x0" and DDPM().sampler == "DDIM"


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_pndm_is_that_of_the_pipelines_of_stable_diffusion(name):
    process = make_process(name, sampler="pndm")
    net, noise = oracle(process, 0, 1, bend=0.2), torch.randn(2, 4, 8, 8, generator=seeded(1))
    scheduler = pytest.importorskip("diffusers").PNDMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
        prediction_type={"noise": "epsilon", "v": "v_prediction"}[process.prediction],
    )  # fmt: skip
    scheduler.set_timesteps(25)
    theirs = diffusers_sample(scheduler, net, noise)
    ours, again = (process.sample(net, noise.shape, 25, noise=noise) for _ in range(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, again) and process.sampler == "PNDM" and isinstance(process, DDPM)
    assert (ours - make_process(name).sample(net, noise.shape, 25, noise=noise)).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_ancestral_sampling_with_learned_variance_equals_that_of_diffusers(prediction):
    process = DDPM(spacing="linspace", prediction=prediction)
    assert diffusers_ddpm("DDPMScheduler", process, 250, variance_type="learned_range")
    scheduler = diffusers_ddpm("DDPMScheduler", process, 40, variance_type="learned_range")
    predict, start = oracle(process, 0, 1, bend=0.2), torch.randn(2, 2, 4, 4, generator=seeded())

    def net(x, t, cond=None):
        return torch.cat([predict(x, t), torch.tanh(x.roll(2, -1))], dim=1)

    x = diffusers_sample(scheduler, net, start, generator=seeded(1))
    ours = process.sample(net, start.shape, 40, eta=1.0, noise=start, generator=seeded(1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_flow_equals_that_of_diffusers_where_it_shifts_once(shift, steps):
    theirs, flow = diffusers_flow(shift), RectifiedFlow(shift)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    t = theirs.timesteps[[0, 400, 999]]
    torch.testing.assert_close(flow.add_noise(x0, noise, t), theirs.scale_noise(x0, t, noise), rtol=1e-5, atol=1e-6)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))  # what it has to be told so that it shifts once
    assert flow.timesteps(steps) == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    net = oracle(flow, 0, 1, bend=1.0)
    ours = flow.sample(net, noise.shape, steps, noise=noise)
    torch.testing.assert_close(ours, diffusers_sample(theirs, net, noise), rtol=1e-4, atol=1e-4)
    assert 0.3 < ours.std() < 30 and not torch.allclose(ours, noise)


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.41, 0.45, 0.46])
def test_a_flow_starts_from_pure_noise_whatever_rounding_makes_of_its_shift(shift):
    process, start = RectifiedFlow(shift), torch.randn(1, 1, 4, 4, generator=seeded())
    assert process.timesteps(3)[0] == 1000.0
    assert process.sample(lambda x, t, cond: 0 * x, start.shape, 3, noise=start).equal(start)


def test_diffusers_ends_a_number_of_steps_at_the_smallest_time_of_training():
    """The documented difference. Should diffusers change this, the docstring of RectifiedFlow has to change too."""
    theirs = diffusers_flow(3.0)
    theirs.set_timesteps(4)
    assert theirs.timesteps.tolist() == pytest.approx([1000, 857.7, 602.2, 8.93], abs=0.1)
    plain = diffusers_flow(1.0)
    plain.set_timesteps(4)
    assert plain.timesteps.tolist() == pytest.approx([1000, 667, 334, 1])
    assert RectifiedFlow(3.0).timesteps(4) == pytest.approx([1000, 900, 750, 500])
    assert "1000, 857.7, 602.2, 8.9" in RectifiedFlow.__doc__ and "1000, 667, 334, 1" in RectifiedFlow.__doc__
    assert "1000, 900, 750" in RectifiedFlow.__doc__


# ---- sampling --------------------------------------------------------------------------------------------------------


@every_process
def test_a_step_from_the_true_output_leads_to_the_same_image_at_the_next_time(process):
    """Outputs are raw: noise, v or velocity, and of DDPM with a variance, which is for eta = 1 alone."""
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=seeded())
    times = [*process.timesteps(5), process.clean]
    for t, t_next in pairwise(times):
        now, then = torch.full((2,), t), torch.full((2,), max(t_next, 0))
        x, output = process.add_noise(x0, noise, now), process.target(x0, noise, now)
        wanted = x0 if t_next == process.clean else process.add_noise(x0, noise, then)
        torch.testing.assert_close(process.step(x, output, t, t_next), wanted, rtol=1e-3, atol=1e-3)
        if isinstance(process, DDPM):
            both = torch.cat([output, torch.randn_like(output)], dim=1)
            for eta in (0.0, 0.5):
                with_variance, without = (process.step(x, y, t, t_next, eta, seeded()) for y in (both, output))
                assert torch.equal(with_variance, without)


@pytest.mark.parametrize("steps", [1, 7, 28])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 4)], ids=["image", "video"])
@every_process
def test_a_sampler_recovers_a_point_mass_exactly(process, shape, steps):
    x0 = torch.linspace(-1, 1, 4)
    for eta in (0.0, 1.0)[: 2 if isinstance(process, DDPM) else 1]:
        x = process.sample(oracle(process, x0, 0.0), shape, steps, eta=eta)
        torch.testing.assert_close(x, x0.expand(shape), rtol=0, atol=5e-4)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddpm", 1.0), ("flow", 0.0), ("sd3", 0.0)])
def test_a_sampler_recovers_a_gaussian(name, eta):
    process, noise = EVERY[name], torch.randn(20, 1, 32, 32, generator=seeded())
    x = process.sample(oracle(process, 0.3, 0.5), noise.shape, 500, eta=eta, noise=noise, generator=seeded(1))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02) and x.std().item() == pytest.approx(0.5, rel=0.02)
    if name != "ddpm":  # the flow between two Gaussians is affine
        torch.testing.assert_close(x, 0.3 + 0.5 * noise, rtol=0, atol=0.02)


@every_process
def test_samples_follow_from_the_generator_the_noise_and_the_network(process):
    shape, cond, calls = (2, 3, 8, 8), {"y": torch.tensor([3, 4])}, []
    net = nn.Conv2d(3, 3, 1)  # whose parameter says on which device samples are drawn

    def watched(x, t, cond):
        calls.append((t, cond))
        return net(x).bfloat16()

    def sample(seed, **options):
        return process.sample(watched, shape, 5, generator=seeded(seed), **options)

    x = process.sample(watched, shape, 30, cond)
    assert len(calls) == 30 and all(t.shape == (2,) and given is cond for t, given in calls)
    times = process.timesteps(30)
    assert [t[0].item() for t, _ in calls] == pytest.approx(times) and calls[0][0].dtype == torch.tensor(times).dtype
    calls.clear()
    process.sample(watched, shape, times[3:20:4])
    assert [t[0].item() for t, _ in calls] == pytest.approx(times[3:20:4])  # the very times it is given
    assert x.dtype == torch.float32 and not x.requires_grad and not x.is_inference()
    assert process.sample(watched, shape, 10, noise=torch.full(shape, 50.0)).abs().max() > 10  # nothing is clipped

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    noise = torch.randn(shape, generator=seeded())
    kept = noise.clone()
    assert torch.equal(sample(1, noise=noise), sample(0)) and torch.equal(noise, kept)  # the start decides everything
    if isinstance(process, DDPM):
        noisy = [sample(seed, noise=noise, eta=1.0) for seed in (1, 1, 2)]
        assert torch.equal(*noisy[:2]) and not torch.equal(*noisy[1:])
    both = process.sample(watched, shape, 3, generator=[seeded(1), seeded(2)])
    alone = process.sample(watched, (1, 3, 8, 8), 3, generator=[seeded(2)])
    torch.testing.assert_close(both[1:], alone)  # a generator per sample: it does not depend on its batch


def test_guidance_moves_away_from_no_condition_in_the_channels_asked_for():
    def net(x, t, cond):
        return torch.cat([cond["y"][:, None, None, None] * x, t[:, None, None, None] + x], dim=1)

    x, t, cond = torch.randn(2, 2, 3, 3), torch.tensor([3.0, 4.0]), {"y": torch.tensor([5.0, 6.0])}
    for scale, channels in ((1.0, None), (4.0, None), (4.0, 1)):
        output = Guided(net, scale, {"y": torch.tensor(1.0)}, channels)(x, t, cond)
        y = (1 + scale * (cond["y"] - 1))[:, None, None, None]
        wanted = net(x, t, cond)
        wanted[:, : channels or 2] = (y * x)[:, : channels or 2]
        torch.testing.assert_close(output, wanted)


# ---- learned variance ------------------------------------------------------------------------------------------------


@settings(bounded, max_examples=25)
@given(st.integers(1, 999), st.integers(0, 2**31))
def test_the_bound_is_the_divergence_of_two_gaussians(t, seed):
    process, generator, steps = DDPM(), seeded(seed), torch.tensor([t])
    x0, noise = torch.randn(2, 1, 2, 3, 3, generator=generator)
    x_t, output = process.add_noise(x0, noise, steps), torch.randn(1, 4, 3, 3, generator=generator)
    eps, v = split(output, 2)

    # DDPM eq. 6 and 7 in float64, from the betas
    betas = np.linspace(1e-4, 2e-2, 1000).astype(np.float32).astype(np.float64)
    a = np.cumprod(1 - betas)
    variance = betas[t] * (1 - a[t - 1]) / (1 - a[t])

    def mean(x):
        return (betas[t] * np.sqrt(a[t - 1]) * x + (1 - a[t - 1]) * np.sqrt(1 - betas[t]) * x_t.double()) / (1 - a[t])

    predicted = (x_t.double() - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
    scale = (0.5 * (np.log(variance) + (v.double() + 1) / 2 * np.log(betas[t] / variance))).exp()
    true, ours = (torch.distributions.Normal(*of) for of in ((mean(x0), np.sqrt(variance)), (mean(predicted), scale)))
    kl = torch.distributions.kl_divergence(true, ours).mean().item() / math.log(2)
    assert process.bound(output, x0, x_t, steps).item() == pytest.approx(kl, rel=2e-3, abs=1e-6)

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
    assert RectifiedFlow().bound(output, x0, x0, t) == 0


def test_the_first_step_is_the_likelihood_of_8_bit_pixels():
    """The probabilities of the 256 levels add up to 1, and are those of ADM's approximation of a Gaussian."""
    process, t, x_t = DDPM(), torch.zeros(1, dtype=torch.int64), torch.full((1, 1, 1, 1), 0.2)
    output, levels = torch.tensor([0.3, 0.5])[None, :, None, None], torch.arange(256) / 127.5 - 1
    bits = [process.bound(output, level.view(1, 1, 1, 1), x_t, t).item() for level in levels]
    assert sum(2**-b for b in bits) == pytest.approx(1, abs=1e-3)
    betas = process.betas.double()
    a, variance = 1 - betas[0], betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))  # the least one, at t = 1
    mean, std = (0.2 - 0.3 * betas[0].sqrt()) / a.sqrt(), (0.75 * betas[0].log() + 0.25 * variance.log()).mul(0.5).exp()
    z = torch.stack([levels.double() + edge - mean for edge in (1 / 255, -1 / 255)]) / std
    high, low = nn.functional.gelu(z, approximate="tanh") / z  # which is z times the same approximation
    near = slice(150, 156)  # 2.5 standard deviations around the mean
    torch.testing.assert_close(torch.tensor(bits)[near], -(high - low).log2()[near].float(), rtol=1e-3, atol=1e-3)


# ---- folds -----------------------------------------------------------------------------------------------------------


@bounded
@given(total=st.integers(2, 1000), end=st.sampled_from(["published", "last"]), data=st.data())
def test_a_fold_sees_the_same_images_at_evenly_spaced_timesteps(total, end, data):
    steps = data.draw(st.integers(2, total))
    teacher = DDPM(total)
    student, t = teacher.fold(steps, end), torch.arange(steps)
    phi = student.phi(t)
    c = total // steps
    if end == "published":
        assert torch.equal(phi, c * t)
    else:
        assert phi[-1] == total - 1 and phi[0] >= 0 and set(phi.diff().tolist()) <= {c, -(-total // steps)}
    x0, noise = torch.randn(2, steps, 1, 2, 2, generator=seeded())
    assert torch.equal(student.add_noise(x0, noise, t), teacher.add_noise(x0, noise, phi))
    assert student.steps == steps and student.sample_t(50).max() < steps
    torch.testing.assert_close((1 - student.betas).cumprod(0), student.alpha_bar, rtol=1e-3, atol=0)


def test_a_fold_as_published_is_that_of_sfddms_code():
    """alphas_cumprod_teacher[t * int(T / T')], of a teacher whose alpha_bar falls as a sigmoid, T = 1024."""
    s = np.linspace(0, 1, 1025)
    a = (-1 / (1 + np.exp(-(s * 6 - 3))) + 1 / (1 + np.exp(-3.0))) / (1 / (1 + np.exp(-3.0)) - 1 / (1 + np.exp(3.0)))
    betas = np.clip(1 - (a / a[0])[1:] / (a / a[0])[:-1], 0, 0.999)
    theirs = np.cumprod(1 - betas)[[t * 8 for t in range(128)]]
    student = make_process("sfddm").fold(128)
    np.testing.assert_allclose(student.alpha_bar.numpy(), theirs, rtol=1e-4)
    assert student.phi(torch.tensor([0, 1, 127])).tolist() == [0, 8, 1016]


def test_the_fold_of_all_steps_is_the_process_itself_and_folds_can_follow_each_other():
    process, t = DDPM(), torch.arange(1000)
    same = process.fold(1000)
    assert torch.equal(same.phi(t), t) and torch.equal(process.phi(t), t)
    assert torch.equal(same.alpha_bar, process.alpha_bar) and torch.equal(same.betas, process.betas)
    for end in ("published", "last"):
        once, twice = process.fold(25, end), process.fold(125, end).fold(25, end)
        assert torch.equal(twice.alpha_bar, once.alpha_bar)
        torch.testing.assert_close(twice.betas, once.betas)
    assert twice.phi(torch.arange(25)).tolist() == list(range(4, 125, 5))  # the timesteps of 125, not of 1000
    assert process.fold(128, "last").phi(torch.tensor([0, 1, 127])).tolist() == [6, 14, 999]
    named = process.fold([3, 40, 999])
    assert named.steps == 3 and named.phi(torch.tensor([2, 0])).tolist() == [999, 3]

    net = UNet(8, 1, channels=8, channel_mults=(1,), norm_groups=4)
    net.process = fold_of(net, process.fold(5))
    assert net.process == {"fold": [0, 200, 400, 600, 800]}
    again = fold_of(net, process_of(net).fold([1, 4]))  # of its own timesteps, saved as those of all
    assert again == {"fold": [200, 800]}
    assert torch.equal(make_process(**again).alpha_bar, process.alpha_bar[[200, 800]])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ddpm", "sd-v"])
def test_a_teacher_on_the_fold_samples_as_ddim_on_those_timesteps(name, eta):
    process, noise = make_process(name), torch.randn(2, 3, 4, 4, generator=seeded())
    net = oracle(process, 0, 1, bend=0.2)
    for steps, end in ((1, "last"), (7, "last"), (7, "published"), (25, "published"), (128, "last")):
        student = process.fold(steps, end)
        visited = student.phi(torch.arange(steps)).tolist()[::-1]

        def sample(where, by, at):
            return where.sample(by, noise.shape, at, eta=eta, noise=noise, generator=seeded())

        folded = sample(student, lambda x, t, cond, phi=student.phi: net(x, phi(t), cond), steps)
        assert torch.equal(folded, sample(process, net, visited))
        if visited != process.timesteps(steps):
            assert (folded - sample(process, net, steps)).abs().max() > 1e-3  # those that DDIM would take are others


# ---- names, and refusals ---------------------------------------------------------------------------------------------


def test_processes_are_made_by_name_and_as_a_network_knows_them():
    assert make_process().prediction == "noise" and make_process("sd-v").prediction == "v"
    assert (make_process("flow").shift, make_process("sd3").shift) == (1.0, 3.0)
    folded = make_process("sd", fold=5, spacing="linspace", clip_x0=True)
    assert (folded.steps, folded.spacing, folded.clip_x0) == (5, "linspace", True)
    assert torch.equal(folded.alpha_bar, make_process("sd").fold(5).alpha_bar)
    assert isinstance(make_process("flow", fold=5, clip_x0=True), RectifiedFlow)  # which has neither

    net = UNet(8, 1, channels=8, channel_mults=(1,), norm_groups=4)
    assert process_of(net).steps == 1000 and isinstance(process_of(net, "flow"), RectifiedFlow)
    net.process = {"fold": 5}
    own = process_of(net, "sd-v", "linspace", True)
    assert own.phi(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]  # as a teacher it is asked at its own timesteps
    assert (own.steps, own.prediction, own.spacing, own.clip_x0) == (5, "v", "linspace", True)
    net.process = {"name": "sd3"}  # what a network says goes before what the settings say
    assert process_of(net, "ddpm").shift == 3.0


def test_the_processes_take_each_others_place():
    own = {"noise_in"}  # of the sampler's inside
    assert {name for name in vars(DDPM) if not name.startswith("_")} - own <= set(dir(RectifiedFlow))
    assert {name for name in vars(RectifiedFlow) if not name.startswith("_")} <= set(dir(DDPM()))


D, R, X, T = DDPM(), RectifiedFlow(), torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])
SHAPE = (1, 1, 4, 4)
REFUSED = [
    (lambda: DDPM(0), "at least 1 timestep"),
    (lambda: DDPM(10, 0.02, 0.01), "beta_start <= beta_end"),
    (lambda: DDPM(10, 0.0, 0.01), "beta_start <= beta_end"),
    *[(lambda word=word: DDPM(**{word: "x"}), word) for word in ("spacing", "schedule", "prediction", "timesteps")],
    *[(lambda shift=shift: RectifiedFlow(shift), "shift above 0") for shift in (0, -1.0, math.nan, math.inf)],
    (lambda: D.sample_t(0), "at least 1"),
    (lambda: R.sample_t(0), "at least 1"),
    (lambda: D.add_noise(X, X[:1], T), "one shape"),
    (lambda: D.add_noise(X, X, T[:1]), "shape"),
    (lambda: D.add_noise(X, X, T.float()), "integer t"),
    (lambda: R.add_noise(X, X[:1], T), "one shape"),
    (lambda: R.add_noise(X, X, torch.zeros(3)), r"t of shape \(B,\)"),
    *[(lambda n=n, p=p: p.sample(None, SHAPE, n), "1 to 1000 steps") for n in (0, 1001) for p in (D, R)],
    *[(lambda times=times: D.sample(None, SHAPE, times), "must fall") for times in ([5, 5], [])],
    (lambda: D.sample(None, SHAPE, [1000, 0]), "at most 999"),
    (lambda: D.sample(None, SHAPE, [0, -1]), "to above -1"),
    (lambda: R.sample(None, SHAPE, [1000.5, 3]), "at most 1000"),
    (lambda: R.sample(None, SHAPE, [5.0, 0.0]), "to above 0.0"),
    *[(lambda eta=eta: D.sample(None, SHAPE, eta=eta), "eta") for eta in (1.5, -0.1)],
    (lambda: R.sample(None, SHAPE, eta=1.0), "eta must be 0, got 1"),
    *[(lambda p=p: p.sample(None, SHAPE, noise=X), r"\(1, 1, 4, 4\).*\(2, 1, 4, 4\)") for p in (D, R)],
    *[(lambda p=p: p.sample(lambda x, t, c: x[:, :1], (1, 3, 4, 4)), r"\(1, 3, 4, 4\), got \(1, 1") for p in (D, R)],
    (lambda: R.sample(lambda x, t, c: torch.cat([x, x], 1), SHAPE, 2), r"\(1, 1, 4, 4\), got \(1, 2, 4, 4\)"),
    (lambda: D.sample(lambda x, t, c: torch.zeros(2, 3, 4, 4), (2, 2, 4, 4), 2), r"got \(2, 3, 4, 4\)"),
    (lambda: D.fold(0), "1 to 1000 steps, not 0"),
    (lambda: D.fold(1001), "1 to 1000 steps, not 1001"),
    (lambda: D.fold(25).fold(26), "1 to 25 steps, not 26"),
    (lambda: D.fold(1), "t = 0 alone"),
    (lambda: D.fold(5, "never"), "not 'never'"),
    *[(lambda t=t: D.fold(t), "growing numbers from 0 to 999") for t in ([], [3, 3], [-1, 3], [0, 1000])],
    (lambda: D.fold(25).sample(None, SHAPE, 26), "1 to 25 steps"),
    (lambda: R.fold(25), "only DDPM can be folded"),
    (lambda: make_process(sampler="pndm", prediction="x0"), "noise or v, not x0"),
    *[(lambda n=n: make_process(sampler="pndm").sample(None, SHAPE, n), "2 to 999 steps") for n in (1, 1000, [9, 3])],
    *[(lambda n=n: make_process(sampler="pndm").timesteps(n), "2 to 999 steps") for n in (1, 1000)],
    (lambda: make_process(sampler="pndm").sample(None, SHAPE, eta=0.5), "without new noise"),
    (lambda: make_process(sampler="pndm", clip_x0=True).sample(None, SHAPE), "without clamping"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
