"""The processes: how images are noised, what the network is asked to predict, and how samples are drawn.

A process owns time. A network is any callable `net(x_t, t, cond) -> output` with x_t (B, C, *spatial) and t (B,);
the losses and the training loop never ask which process they serve:

    process = DDPM()
    t, noise = process.sample_t(len(x0)), torch.randn_like(x0)    # (B,), (B, C, H, W); x0 in [-1, 1]
    prediction = net(process.add_noise(x0, noise, t), t, None)
    loss = (prediction - process.target(x0, noise, t)).square().mean()
    images = process.sample(net.eval(), (16, 3, 64, 64), steps=100).clamp(-1, 1)

A network may also predict its variance: then its output has 2 C channels, and the second half says where between its
two bounds the log-variance of a sampling step lies.

Symbols: B batch, C channels, T number of training timesteps, a_t = prod_{i <= t} (1 - beta_i) ("alpha_bar").
Sources: DDPM (arXiv 2006.11239), DDIM (2010.02502), learned variance (2102.09672), guidance (2207.12598), v-prediction
(2202.00512), SFDDM (2405.14961), rectified flow (2209.03003), its logit-normal times and shift (SD3, 2403.03206).
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil import machine
from distil.presets import PROCESSES, SPACINGS, TIMESTEPS

Net = Callable[[Tensor, Tensor, dict[str, Tensor] | None], Tensor]
Source = torch.Generator | Sequence[torch.Generator] | None  # of random numbers: one, or one per sample


class Process:
    """What all processes have in common."""

    steps: int  # T, or how many units of t there are
    sampler: str  # how samples are drawn, in words
    latest: float  # the noisiest time
    clean: float  # the time of the clean image, where a sampler ends
    whole_t: bool  # times are integers
    can_clip: bool = False  # its sampler may clamp the predicted image at every step
    clip_x0: bool = False  # and does

    def fold(self, steps: int | Sequence[int], end: str = "published") -> "Process":
        """The process of a student of fewer steps, see `DDPM.fold`; ValueError for what cannot be folded."""
        raise ValueError("only DDPM can be folded to fewer steps; a flow is sampled in any number of steps as it is")

    def phi(self, t: Tensor) -> Tensor:
        """The times (B,) of the process that this one was folded from that `t` (B,) stands for."""
        return t

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean images and noise.

        Args:
            x0, noise: (B, C, *spatial), any number of spatial axes. t: (B,) times, on the device of x0.

        Returns: (B, C, *spatial), float32 (float64 for float64 input).

        Raises:
            ValueError: shapes that differ, or a `t` that is not one time (of DDPM: one integer) per sample.
        """
        if x0.shape != noise.shape or t.shape != x0.shape[:1] or (self.whole_t and t.is_floating_point()):
            raise ValueError(
                f"add_noise needs x0 and noise of one shape (B, C, ...) and {'integer ' if self.whole_t else ''}t of "
                f"shape (B,), got x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)} {t.dtype}"
            )
        of_x0, of_noise = self._shares(t, x0)  # (B, 1, 1, 1) each
        return of_x0 * x0 + of_noise * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict from x_t. Same shapes as `add_noise`."""
        raise NotImplementedError

    def sample_t(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Times for one training batch, (batch,); ValueError for a `batch` below 1.

        They are drawn where the generator lives, so that a CPU seed means the same on every machine.
        """
        if batch < 1:
            raise ValueError(f"sample_t needs a batch of at least 1, got {batch}")
        where = device if generator is None else generator.device
        return self._draw_t(batch, generator, where).to(device or where)

    def bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, teacher_output: Tensor | None = None) -> Tensor:
        """The variational bound of networks that predict a variance, (); 0 where a process has none."""
        return output.new_zeros(())

    def check_eta(self, eta: float) -> None:
        """ValueError for an `eta` that the sampler does not have."""
        raise NotImplementedError

    def timesteps(self, steps: int) -> list:
        """The times that a sampler of `steps` steps visits, noisiest first; ValueError outside 1 .. T."""
        if not 1 <= steps <= self.steps:
            raise ValueError(f"the sampler takes 1 to {self.steps} steps, got steps={steps}")
        return self._times(steps)

    def step(self, x: Tensor, output: Tensor, t: Any, t_next: Any, eta: float = 0, generator: Source = None) -> Tensor:
        """One sampling step from time t to t_next < t, given the network's output at x; `clean` is the clean image.

        x and the result: (B, C, *spatial); output: that, or (B, 2 C, *spatial) with a variance.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self, net: Net, shape: Sequence[int], steps: int | Sequence[Any] = 100,
        cond: dict[str, Tensor] | None = None, *, eta: float = 0.0, noise: Tensor | None = None,
        generator: Source = None,
    ) -> Tensor:  # fmt: skip
        """Draws samples, from pure noise to an image, with `steps` evaluations of the network.

        Args:
            net: called as `net(x_t, t, cond)` with t (B,), in the mode it is in: call `net.eval()` first.
            shape: (B, C, *spatial) of the result, float32, as it comes out: without `clip_x0` nothing is clipped.
            steps: how many of `timesteps`, or the times themselves, noisiest first.
            eta: of DDIM: 0 is deterministic given the starting noise; 1 is ancestral DDPM sampling, with the variance
                that the network has learned if it predicts one.
            noise: the starting point, of `shape`; the same for several networks makes their samples comparable.
            generator: source of the starting noise and, with eta > 0, of each step's; a CPU one serves any device.
                A list of them, one per sample, makes a sample independent of its batch.

        Raises:
            ValueError: `steps` outside 1 .. T or not falling, an `eta` that the process does not have, `noise` not of
                `shape`, or a network whose output is neither of `shape` nor, with a variance, of twice the channels.
        """
        self.check_eta(eta)
        plan = self._plan(steps, eta, generator)
        x = _start(net, shape, noise, generator)  # (B, C, H, W)
        for t, advance in plan:
            output = net(x, torch.full(x.shape[:1], t, device=x.device), cond).float()
            if split(output, x.shape[1])[0].shape != x.shape:
                raise ValueError(f"the network must predict the shape {tuple(x.shape)}, got {tuple(output.shape)}")
            x = advance(x, output)
        return x

    def _plan(self, steps: int | Sequence[Any], eta: float, generator: Source) -> list[tuple[Any, Callable]]:
        """The times at which the network is asked, each with what makes the next x of x and its output."""
        times = self.timesteps(steps) if isinstance(steps, int) else list(steps)
        if not times or any(t <= t_next for t, t_next in pairwise([*times, self.clean])) or times[0] > self.latest:
            raise ValueError(f"timesteps must fall, from at most {self.latest} to above {self.clean}, got {times}")
        advance = partial(self.step, eta=eta, generator=generator)
        return [(t, partial(advance, t=t, t_next=t_next)) for t, t_next in pairwise([*times, self.clean])]


def _betas(alpha_bar: Tensor) -> Tensor:
    """The betas (T,) that give alpha_bar (T + 1,), which starts with the clean image; at most 0.999, as published."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _grid(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


# How the betas grow, (T, beta_start, beta_end) -> (T,): in equal steps (DDPM); their roots do (Stable Diffusion); as a
# sigmoid (diffusers). Or how alpha_bar falls, whatever the ends: as a squared cosine (arXiv 2102.09672, in diffusers
# squaredcos_cap_v2); as a sigmoid (arXiv 2212.11972; SFDDM's code).
SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": lambda n, start, end: _grid(start, end, n),
    "scaled_linear": lambda n, start, end: _grid(start**0.5, end**0.5, n) ** 2,
    "sigmoid": lambda n, start, end: _grid(-6, 6, n).sigmoid() * (end - start) + start,
    "cosine": lambda n, *_: _betas(((_grid(0, 1, n + 1) + 0.008) / 1.008 * math.pi / 2).cos().square()),
    "sigmoid_alpha_bar": lambda n, *_: _betas(1 / (1 + math.exp(-3)) - _grid(-3, 3, n + 1).sigmoid()),
}


class DDPM(Process):
    """Prediction of the noise, of v, or of the image, sampled by DDIM.

    Args:
        steps: T, the number of training timesteps; timesteps are the integers 0 .. T - 1.
        beta_start, beta_end: variance of the noise added by the first and by the last timestep, in (0, 1).
        spacing: which timesteps a sampler of few steps visits, see `timesteps`.
        schedule: how the betas grow, see `SCHEDULES`.
        prediction: what the network predicts, "noise", "v" = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512), or
            "x0".
        clip_x0: whether a sampler clamps the predicted image to [-1, 1] at every step, and the noise with it. Of
            pixels only; the paper's samples are drawn without, SFDDM's with.
        timesteps: how those of a training batch are drawn: in "antithetic" pairs t and T - 1 - t (ddim), or "uniform",
            each by itself (DiT, Stable Diffusion).

    Attributes: `betas` and `alpha_bar`, both (`steps`,) float32, and `index`, int64, the timesteps of the process that
    this one was folded from; on the CPU.

    Raises:
        ValueError: `steps` below 1, not 0 < beta_start <= beta_end < 1, or an unknown word.
    """

    clean, whole_t = -1, True

    def __init__(
        self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2, spacing: str = "leading",
        schedule: str = "linear", prediction: str = "noise", clip_x0: bool = False, timesteps: str = "antithetic",
    ):  # fmt: skip
        words = {"spacing": SPACINGS, "schedule": tuple(SCHEDULES), "prediction": ("noise", "v", "x0"),
                 "timesteps": TIMESTEPS}  # fmt: skip
        for name, known in words.items():
            if (given := locals()[name]) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {given!r}")
        if steps < 1:
            raise ValueError(f"DDPM needs at least 1 timestep, got steps={steps}; the published models use 1000")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"DDPM needs 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        self.spacing, self.prediction, self.clip_x0, self.pairs = spacing, prediction, clip_x0, timesteps != "uniform"
        self.sampler, self.can_clip = "DDIM with clipped x0" if clip_x0 else "DDIM", True
        self.betas = SCHEDULES[schedule](steps, beta_start, beta_end).float()  # (T,)
        self.alpha_bar = (1 - self.betas).cumprod(0)  # (T,), the product in float32 as in the published models
        self.steps, self.index = steps, torch.arange(steps)
        self._tables()

    def _tables(self) -> None:
        self.latest = self.steps - 1
        self._a = [*self.alpha_bar.tolist(), 1.0]  # for the sampler; a_{-1} = 1, the clean image, is where -1 finds it
        self._on: dict[tuple[str, torch.device], Tensor] = {}  # tables, copied to each device once
        self.__dict__.pop("_posterior", None)

    def fold(self, steps: int | Sequence[int], end: str = "published") -> "DDPM":
        """The process of a student that needs only T' < T steps: this one at T' of its T timesteps (SFDDM).

        The student's timestep t' stands for `phi(t')` here: a'_t' = a_phi(t'), so x'_t' IS x_phi(t') for the same image
        and noise. T' = T gives the same process, and T' need not divide T.

        steps  these timesteps, growing; or T', then phi(t') = c t' with c = T // T', as published
        end    "last" sets phi(t') = (t' + 1) T // T' - 1 instead, which ends at T - 1: sampling starts from noise as
               pure as here (c t' does not, for T = 1000 and T' = 128 it ends at 889), but the first error of a sampler
               is multiplied by 1 / sqrt(a), which is 157 at T - 1 and 26 at the published end for T' = 5
        """
        if isinstance(steps, int):
            if end not in ("published", "last"):
                raise ValueError(f"a fold ends as 'published' or at the 'last' timestep, not {end!r}")
            if not 1 <= steps <= self.steps:
                raise ValueError(f"a process of {self.steps} timesteps folds to 1 to {self.steps} steps, not {steps}")
            if end == "published" and 1 == steps < self.steps:
                raise ValueError(
                    "the published fold to 1 step is t = 0 alone, without noise: let it end last, --fold-end last"
                )
            ends = [(t + 1) * self.steps // steps - 1 for t in range(steps)]
            steps = [t * (self.steps // steps) for t in range(steps)] if end == "published" else ends
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= self.steps:
            raise ValueError(f"the timesteps of a fold must be growing numbers from 0 to {self.steps - 1}: {steps}")
        folded = copy.copy(self)
        folded.steps, folded.index = len(steps), torch.tensor(steps)
        folded.alpha_bar = self.alpha_bar[folded.index]
        logs = torch.log1p(-self.betas.double()).cumsum(0)[folded.index]  # float64: beta' is a small difference
        folded.betas = -torch.expm1(logs.diff(prepend=logs.new_zeros(1))).float()
        folded._tables()
        return folded

    def phi(self, t: Tensor) -> Tensor:
        return self._at(t, t, "index")

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x0): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (DDPM eq. 4)."""
        a = self._at(t, like, "alpha_bar")  # (B, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise itself, or v, or x0."""
        if self.prediction != "v":
            return noise if self.prediction == "noise" else x0
        a = self._at(t, x0, "alpha_bar")  # (B, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    def noise_in(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction for x_t means, the inverse of `target`: (B, C, *spatial)."""
        if self.prediction == "noise":
            return prediction
        a = self._at(t, x_t, "alpha_bar")  # (B, 1, 1, 1)
        if self.prediction == "x0":
            return (x_t - a.sqrt() * prediction) / (1 - a).sqrt()
        return a.sqrt() * prediction + (1 - a).sqrt() * x_t

    def _at(self, t: Tensor, like: Tensor, name: str) -> Tensor:
        """Row t of a table of this process, (B, 1, 1, 1) or with columns (columns, B, 1, 1, 1), where `like` is."""
        if (name, like.device) not in self._on:
            self._on[name, like.device] = getattr(self, name).to(like.device)
        return self._on[name, like.device][..., t].unflatten(-1, (-1, *[1] * (like.ndim - 1)))

    @cached_property
    def _posterior(self) -> Tensor:
        """(4, T): q(x_{t-1} | x_t, x0) has the mean row 0 * x0 + row 1 * x_t and the log-variance row 2; row 3 is
        log beta_t. The variance at t = 0 would be 0; that of t = 1 stands in for it (DDPM eq. 7)."""
        betas = self.betas.double()
        a = (1 - betas).cumprod(0)  # (T,)
        before = F.pad(a[:-1], (1, 0), value=1.0)  # (T,), a_{t-1}
        variance = betas * (1 - before) / (1 - a)
        variance[0] = variance[1] if len(variance) > 1 else betas[0]
        means = betas * before.sqrt() / (1 - a), (1 - before) * (1 - betas).sqrt() / (1 - a)
        return torch.stack([*means, variance.log(), betas.log()]).float()

    def _reverse(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), of an output (B, 2C, ...); only the second half has a gradient."""
        (eps, v), a = output.float().chunk(2, dim=1), self._at(t, x_t, "alpha_bar")
        x0 = (x_t - (1 - a).sqrt() * self.noise_in(eps.detach(), x_t, t)) / a.sqrt()  # (B, C, ...)
        of_x0, of_x_t, low, high = self._at(t, x_t, "_posterior")  # (B, 1, 1, 1) each
        return of_x0 * x0 + of_x_t * x_t, low + (v + 1) / 2 * (high - low)

    def bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, teacher_output: Tensor | None = None) -> Tensor:
        """The variational bound at t, from which the learned variance learns; bits per element, mean of the batch: ().

        KL of the true step x_t -> x_{t-1} from the network's (Nichol and Dhariwal, L_vlb), or with `teacher_output` of
        the teacher's step from the network's (TinyFusion); at t = 0 the negative log-likelihood of the 8-bit x0.

        output, teacher_output  (B, 2C, ...); the gradient reaches the second half of `output` alone
        x0, x_t                 (B, C, ...);  t (B,)
        """
        mean, log_variance = self._reverse(output, x_t, t)
        if teacher_output is None:
            of_x0, of_x_t, true_log_variance, _ = self._at(t, x_t, "_posterior")
            true_mean = of_x0 * x0 + of_x_t * x_t
        else:
            true_mean, true_log_variance = (part.detach() for part in self._reverse(teacher_output, x_t, t))
        gap = true_log_variance - log_variance
        kl = 0.5 * (gap.exp() - gap - 1 + (true_mean - mean).square() * (-log_variance).exp())  # (B, C, ...)
        nats = torch.where(t.reshape(-1, *[1] * (x0.ndim - 1)) == 0, _nll(x0, mean, 0.5 * log_variance), kl)
        return nats.mean() / math.log(2)

    def _draw_t(self, batch: int, generator: torch.Generator | None, where: Any) -> Tensor:
        """Integers. In antithetic pairs t and T - 1 - t easy and hard ones balance, each single t is still uniform."""
        if not self.pairs:
            return torch.randint(0, self.steps, (batch,), generator=generator, device=where)
        u = torch.randint(0, self.steps, (batch // 2 + 1,), generator=generator, device=where)
        return torch.cat([u, self.steps - 1 - u])[:batch]

    def _times(self, steps: int) -> list[int]:
        """Evenly spaced down to 0; "linspace" from T - 1 on, as in DiT, "leading" from T - T / steps on, as in ddim;
        "quad" the squares of evenly spaced numbers from 0.8 T on, as in ddim for CIFAR-10.

        Of 100 quadratic ones 96 are different; ddim takes steps from one to the same too, which change nothing.

        Where `steps` divides T they are the published range(0, T, T // steps), reversed. Otherwise the published rule
        visits more than `steps` of them (T = 1000, steps = 300: 334); here there are always exactly `steps`, with
        gaps that differ by at most one.
        """
        if self.spacing == "quad":
            squares = np.linspace(0, math.sqrt(0.8 * self.steps), steps) ** 2
            return sorted({int(t) for t in squares}, reverse=True)
        if self.spacing == "linspace":
            stride = (self.steps - 1) / max(steps - 1, 1)  # added up, as there: rounding decides over halves
            return [round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0)][::-1]
        return [i * self.steps // steps for i in reversed(range(steps))]

    def check_eta(self, eta: float) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 as noisy as DDPM), got {eta}")

    def step(self, x: Tensor, output: Tensor, t: int, t_next: int, eta: float = 0, generator: Source = None) -> Tensor:
        """One DDIM step (eq. 12). Coefficients are Python floats: no tables to move, nothing to wait for."""
        prediction, v = split(output, x.shape[1])
        eps = self.noise_in(prediction, x, torch.full(x.shape[:1], t, device=x.device))
        a, a_next = self._a[t], self._a[t_next]
        beta = 1 - a / a_next  # of this step, which may span several timesteps
        sigma = eta * math.sqrt(beta * (1 - a_next) / (1 - a))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if self.prediction == "x0":
            x0 = prediction  # not by way of the noise, which loses digits where a is small
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        if sigma == 0:
            return x
        noise = _randn(x.shape, generator, x.device)
        if eta < 1 or v is None:
            return x + sigma * noise
        low, high = 2 * math.log(sigma), math.log(beta)  # v = -1 is the lower bound of the log-variance, 1 the upper
        return x + (0.5 * (low + (v + 1) / 2 * (high - low))).exp() * noise


class PNDM(DDPM):
    """DDPM, sampled by diffusers' PNDMScheduler as pipelines of Stable Diffusion 1 and 2 are: a linear multistep method
    (arXiv 2202.09778) that asks the network once more than it has steps. ImportError without diffusers."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.sampler, self.can_clip = "PNDM", False
        if self.prediction == "x0":
            raise ValueError("PNDM samples networks that predict noise or v, not x0: use DDIM")
        self._scheduler(2)  # refuses where diffusers is missing

    def _scheduler(self, steps: int) -> Any:
        scheduler = machine.library("diffusers", "PNDM", '-e ".[sd]"').PNDMScheduler(
            self.steps, trained_betas=self.betas.numpy(), skip_prk_steps=True, steps_offset=1,
            prediction_type={"noise": "epsilon", "v": "v_prediction"}[self.prediction],
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        return scheduler

    def check_eta(self, eta: float) -> None:
        if eta != 0 or self.clip_x0:
            raise ValueError("PNDM samples without new noise and without clamping: use it with eta 0 and no clip_x0")

    def timesteps(self, steps: int) -> list:
        if not isinstance(steps, int) or not 1 < steps < self.steps:
            raise ValueError(f"PNDM takes a number of 2 to {self.steps - 1} steps, got {steps}")
        return super().timesteps(steps)

    def _plan(self, steps: int | Sequence[Any], eta: float, generator: Source) -> list[tuple[Any, Callable]]:
        self.timesteps(steps)  # refuses what it cannot do
        scheduler = self._scheduler(steps)

        def advance(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
            return scheduler.step(split(output, x.shape[1])[0], t, x).prev_sample

        return [(int(t), partial(advance, t=t)) for t in scheduler.timesteps]


class RectifiedFlow(Process):
    """Velocity prediction on straight lines from data to noise, z_s = (1 - s) x0 + s noise, sampled by Euler steps.

    The network gets t = 1000 s as floats, so it may be the same as for DDPM. Training times are logit-normal.

    shift: m moves all times, in training and in sampling, towards the noise: s -> m s / (1 + (m - 1) s). SD3 takes 3; 1
    leaves them. (diffusers' FlowMatchEulerDiscreteScheduler, asked for a NUMBER of steps, ends its grid at the smallest
    time of training, so that its last step does almost nothing: 4 steps visit t = 1000, 667, 334, 1 and at shift 3
    1000, 857.7, 602.2, 8.9. Given the sigmas of `RectifiedFlow().timesteps(4)` / 1000, as diffusers' own Flux pipeline
    does, it visits ours: 1000, 900, 750, 500.)
    ValueError if it is not above 0.
    """

    sampler, steps, latest, clean, whole_t = "Euler", 1000, 1000, 0.0, False

    def __init__(self, shift: float = 1.0):
        if not 0 < shift < math.inf:
            raise ValueError(f"RectifiedFlow needs a shift above 0, got {shift}; SD3 takes 3, and 1 shifts nothing")
        self.shift = shift

    def _shifted(self, s):
        return self.shift * s / (1 + (self.shift - 1) * s)

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        s = (t / self.steps).reshape(-1, *[1] * (like.ndim - 1))  # (B, 1, 1, 1)
        return 1 - s, s

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity d z_s / d s = noise - x0, at every time the same."""
        return noise - x0

    def _draw_t(self, batch: int, generator: torch.Generator | None, where: Any) -> Tensor:
        s = torch.randn(batch, generator=generator, device=where).sigmoid()
        return self.steps * self._shifted(s)

    def _times(self, steps: int) -> list[float]:
        """s = 1, 1 - 1/steps, .., 1/steps, shifted; the last step goes from the last of them to s = 0."""
        # of s = 1 rounding may make a little more
        return [self.steps * min(1.0, self._shifted(i / steps)) for i in range(steps, 0, -1)]

    def check_eta(self, eta: float) -> None:
        if eta != 0:
            raise ValueError(f"a flow is sampled without new noise: eta must be 0, got {eta}")

    def step(
        self, x: Tensor, output: Tensor, t: float, t_next: float, eta: float = 0.0, generator: Source = None
    ) -> Tensor:
        """One Euler step; the output is the velocity."""
        if output.shape != x.shape:
            raise ValueError(f"a flow needs a velocity of shape {tuple(x.shape)}, got {tuple(output.shape)}")
        return x + (t_next - t) / self.steps * output


class Guided(nn.Module):
    """A network guided away from no condition: u + scale (c - u) of its outputs c with and u without `cond`.

    scale     1 is the network itself, more follows the condition more closely
    null      the `cond` of one sample that stands for none, as `net.no_condition()` gives it
    channels  how many are guided, the others are those of c; None: those of x_t, never those of the variance
    """

    def __init__(self, net: nn.Module, scale: float, null: dict[str, Tensor], channels: int | None = None):
        super().__init__()
        self.net, self.scale, self.null, self.channels = net, scale, null, channels

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        both = {
            key: torch.cat([value, self.null[key].to(value, non_blocking=True).expand_as(value)])
            for key, value in cond.items()
        }
        with_cond, without = self.net(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)  # (B, C or 2C, ...)
        k = x_t.shape[1] if self.channels is None else self.channels
        c, u = with_cond[:, :k], without[:, :k]
        return torch.cat([u + self.scale * (c - u), with_cond[:, k:]], dim=1)


def check_guidance(what: str, net: nn.Module, scale: float) -> None:
    """ValueError where a network, called `what`, is to be guided and knows nothing to be guided away from."""
    if scale != 1 and not net.conditions:
        raise ValueError(f"{what} is told nothing, so it cannot be guided: use --guidance 1")
    if scale != 1 and net.no_condition() is None:
        raise ValueError(f"{what} was trained with a class for every image, so it cannot be guided: use --guidance 1")


def check_name(what: str, net: nn.Module, name: str) -> None:
    """ValueError where a network, called `what`, knows another process, or predicts a variance that it has not."""
    if (theirs := net.process.get("name", name)) != name:
        raise ValueError(f"{what} was trained for the process {theirs}: use --process {theirs}")
    if net.predicts_variance and PROCESSES[name][0] == "flow":
        raise ValueError(f"{what} predicts a variance, of which the process {name} has none")


def check_sampler(process: Process, steps: int, eta: float) -> None:
    """ValueError for steps or an eta that the sampler does not have, or for one step from where nothing is noise."""
    process.check_eta(eta)
    if process.latest > 0 and process.timesteps(steps)[0] == 0:
        raise ValueError("one step begins at t = 0, where nothing is noise: use more steps")


def check_clip(clip_x0: bool, latents: bool) -> None:
    """ValueError where what has no bounds is to be clamped."""
    if clip_x0 and latents:
        raise ValueError("--clip-x0 is of pixels, which lie in [-1, 1]; latents have no bounds: leave it out")


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, channels, ...) in an output, and where its variance lies, if it has 2 `channels`, or None."""
    return output.chunk(2, dim=1) if output.shape[1] == 2 * channels else (output, None)


def _nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the probability, in nats, that a Gaussian rounded to the 8-bit levels of [-1, 1] gives x; same shapes.

    With the approximation of its distribution function that ADM, DiT and TinyFusion have.
    """

    def below(edge: Tensor) -> Tensor:
        z = (edge - mean) * (-log_std).exp()
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())

    high, low = below(x + 1 / 255).where(x < 0.999, 1.0), below(x - 1 / 255).where(x > -0.999, 0.0)
    return -(high - low).clamp(min=1e-12).log()


def _randn(shape: Sequence[int], generator: Source, device: torch.device) -> Tensor:
    """Normal noise on `device`, drawn where the generator lives, so that a CPU seed means the same on every machine."""
    if isinstance(generator, Sequence):
        return torch.stack([_randn(shape[1:], one, one.device) for one in generator]).to(device)
    where = device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=where).to(device)


def _start(net: Net, shape: Sequence[int], noise: Tensor | None, generator: Source) -> Tensor:
    """The starting point of a sampler, `shape`, float32 where the network is: `noise`, or drawn."""
    if noise is not None and noise.shape != tuple(shape):
        raise ValueError(f"the starting noise must have the shape {tuple(shape)}, not {tuple(noise.shape)}")
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None  # a plain function has none
    sources = [parameter, noise, generator[0] if isinstance(generator, Sequence) else generator]
    device = next((source.device for source in sources if source is not None), torch.device("cpu"))
    return _randn(shape, generator, device) if noise is None else noise.to(device, torch.float32)


def make_process(
    name: str = "ddpm", fold: int | Sequence[int] | None = None, spacing: str = "leading", clip_x0: bool = False,
    timesteps: str = "antithetic", sampler: str = "ddim", **arguments: Any,
) -> Process:  # fmt: skip
    """The process of that name in `presets.PROCESSES`, with other `arguments` where they are given.

    fold, spacing, clip_x0, timesteps, sampler: of DDPM, a flow leaves them aside. A folded process knows its own
    timesteps alone: `phi` is the identity.
    """
    kind, usual = PROCESSES[name]
    if kind == "flow":
        return RectifiedFlow(**{**usual, **arguments})
    kind = {"ddim": DDPM, "pndm": PNDM}[sampler]
    process = kind(**{**usual, **arguments}, spacing=spacing, clip_x0=clip_x0, timesteps=timesteps)
    if fold is not None:
        process = process.fold(fold)
        process.index = torch.arange(process.steps)
    return process


def process_of(
    net: nn.Module, name: str = "ddpm", spacing: str = "leading", clip_x0: bool = False, **options: str
) -> Process:
    """The process as this network knows it (`net.process`). name: of networks that do not say; options: as of
    `make_process`."""
    return make_process(**{"name": name, "spacing": spacing, "clip_x0": clip_x0, **options, **net.process})


def fold_of(net: nn.Module, folded: Process) -> dict[str, Any]:
    """`Network.process` of the students of `net` whose process was folded from that of `net`."""
    former = net.process.get("fold", range(int(folded.index[-1]) + 1))
    return {**net.process, "fold": [former[t] for t in folded.index.tolist()]}
