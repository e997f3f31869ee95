"""The processes: how images are noised, what the network is asked to predict, and how samples are drawn.

A process owns time. A network is any callable `net(x_t, t, cond) -> prediction` with x_t (B, C, *spatial) and t (B,);
the losses and the training loop never ask which process they serve:

    process = DDPM()
    t = process.sample_t(len(x0))                             # (B,)
    noise = torch.randn_like(x0)                              # (B, C, H, W), x0 in [-1, 1]
    prediction = net(process.add_noise(x0, noise, t), t, None)
    loss = (prediction - process.target(x0, noise, t)).square().mean()
    images = process.sample(net.eval(), (16, 3, 64, 64), steps=100).clamp(-1, 1)

A network may also predict its variance: then it has 2 C channels, and the second half says where between its two bounds
the log-variance of a sampling step lies. `Guided(net, scale, null)` is a network that is guided away from no condition.
`DDPM` predicts noise (or v) at integer timesteps; `RectifiedFlow`, with the same methods, a velocity at t = 1000 s.

Symbols: B batch, C channels, T number of training timesteps, a_t = prod_{i <= t} (1 - beta_i) ("alpha_bar").
Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2021, arXiv 2010.02502), learned variance (Nichol
and Dhariwal 2021, arXiv 2102.09672), guidance (Ho and Salimans 2022, arXiv 2207.12598), SFDDM (arXiv 2405.14961).
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Net = Callable[[Tensor, Tensor, dict[str, Tensor] | None], Tensor]


class DDPM:
    """Prediction of the noise, or of v, sampled by DDIM.

    Args:
        steps: T, the number of training timesteps; timesteps are the integers 0 .. T - 1.
        beta_start, beta_end: variance of the noise added by the first and by the last timestep, in (0, 1).
        spacing: which timesteps a sampler of few steps visits, see `timesteps`.
        schedule: how the betas grow, "linear" or, as Stable Diffusion's do, "scaled_linear": their roots do.
        prediction: what the network predicts, "noise" or "v" = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512).
        clip_x0: whether a sampler clamps the predicted image to [-1, 1] at every step, and the noise with it. Of
            pixels only; the paper's samples are drawn without, SFDDM's with.

    Attributes: `sampler` (its name), `steps` (T), `betas` and `alpha_bar`, both (T,) float32 on the CPU; `folded_from`,
    the T of the process that this one was folded from (`fold`), or its own.

    Raises:
        ValueError: `steps` below 1, not 0 < beta_start <= beta_end < 1, or an unknown word.
    """

    @property
    def sampler(self) -> str:
        return "DDIM with clipped x0" if self.clip_x0 else "DDIM"

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        spacing: str = "leading",
        schedule: str = "linear",
        prediction: str = "noise",
        clip_x0: bool = False,
    ):
        for name, given, known in (
            ("spacing", spacing, ("leading", "linspace")),
            ("schedule", schedule, ("linear", "scaled_linear")),
            ("prediction", prediction, ("noise", "v")),
        ):
            if given not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, not {given!r}")
        if steps < 1:
            raise ValueError(f"DDPM needs at least 1 timestep, got steps={steps}; the published models use 1000")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"DDPM needs 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        self.steps = self.folded_from = steps
        self.spacing, self.prediction, self.clip_x0 = spacing, prediction, clip_x0
        power = 1 if schedule == "linear" else 2
        roots = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), steps, dtype=torch.float64)
        self.betas = (roots**power).float()  # (T,)
        self.alpha_bar = (1 - self.betas).cumprod(0)  # (T,), the product in float32 as in the published models
        self._tables()

    def _tables(self) -> None:
        self._a = [*self.alpha_bar.tolist(), 1.0]  # for the sampler; a_{-1} = 1, the clean image, is where -1 finds it
        self._on: dict[tuple[str, torch.device], Tensor] = {}  # tables, copied to each device once
        self.__dict__.pop("_posterior", None)

    def fold(self, steps: int) -> "DDPM":
        """The process of a student that needs only T' = `steps` steps: this one at T' of its T timesteps (SFDDM).

        The student's timestep t' stands for `phi(t')` = (t' + 1) T // T' - 1 here: a'_t' = a_phi(t'), so x'_t' IS
        x_phi(t') for the same image and noise. These are evenly spaced, with gaps that differ by at most one, and end
        at T - 1: sampling starts from noise as pure as here. (The published c t', c = T // T', ends before it, for
        T = 1000 and T' = 128 at 889.) T' = T gives the same process, and T' need not divide T.

        Raises:
            ValueError: `steps` outside 1 .. T.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"a process of {self.steps} timesteps folds to 1 to {self.steps} steps, not {steps}")
        folded = copy.copy(self)
        folded.steps, folded.folded_from = steps, self.steps
        phi = folded.phi(torch.arange(steps))  # (T',)
        folded.alpha_bar = self.alpha_bar[phi]
        logs = torch.log1p(-self.betas.double()).cumsum(0)[phi]  # in float64, for beta' is a small difference
        folded.betas = -torch.expm1(logs.diff(prepend=logs.new_zeros(1))).float()
        folded._tables()
        return folded

    def phi(self, t: Tensor) -> Tensor:
        """The timesteps of the process this one was folded from that `t` (B,) stands for; `t` itself if it was not."""
        return (t + 1) * self.folded_from // self.steps - 1

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (DDPM eq. 4).

        Args:
            x0, noise: (B, C, *spatial), any number of spatial axes. t: (B,) integers in [0, T), on the device of x0.

        Returns: (B, C, *spatial), float32 (float64 for float64 input).

        Raises:
            ValueError: shapes that differ, or a `t` that is not one integer per sample.
        """
        if x0.shape != noise.shape or t.shape != x0.shape[:1] or t.is_floating_point():
            raise ValueError(
                "add_noise needs x0 and noise of one shape (B, C, ...) and integer t of shape (B,), got "
                f"x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)} {t.dtype}"
            )
        a = self._at(t, x0, "alpha_bar")  # (B, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict from x_t: the noise itself, or v. Same shapes as `add_noise`."""
        if self.prediction == "noise":
            return noise
        a = self._at(t, x0, "alpha_bar")  # (B, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    def noise_in(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction for x_t means, the inverse of `target`: (B, C, *spatial)."""
        if self.prediction == "noise":
            return prediction
        a = self._at(t, x_t, "alpha_bar")  # (B, 1, 1, 1)
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
        variance[0] = variance[min(1, len(variance) - 1)] if len(variance) > 1 else betas[0]
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

    def sample_t(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Timesteps for one training batch, (batch,) int64 in [0, T), in antithetic pairs t and T - 1 - t.

        Pairs balance easy and hard timesteps within a batch, which lowers the variance of the gradient; each single
        t is still uniform. The draw is made on the generator's device, so a CPU generator gives the same timesteps
        on every machine.

        Raises:
            ValueError: `batch` below 1.
        """
        if batch < 1:
            raise ValueError(f"sample_t needs a batch of at least 1, got {batch}")
        where = device if generator is None else generator.device
        u = torch.randint(0, self.steps, (batch // 2 + 1,), generator=generator, device=where)
        return torch.cat([u, self.steps - 1 - u])[:batch].to(device or where)

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps that a sampler of `steps` steps visits, noisiest first, evenly spaced down to 0.

        Spacing "linspace": from T - 1 on, as in guided diffusion and DiT. "leading": as in ddim, from T - T / steps on.
        Where `steps` divides T they are the published range(0, T, T // steps), reversed. Otherwise the published rule
        visits more than `steps` of them (T = 1000, steps = 300: 334); here there are always exactly `steps`, with
        gaps that differ by at most one.

        Raises:
            ValueError: `steps` outside 1 .. T.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"the sampler takes 1 to {self.steps} steps, got steps={steps}")
        if self.spacing == "linspace":
            return [round(i * (self.steps - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
        return [i * self.steps // steps for i in reversed(range(steps))]

    @torch.no_grad()
    def sample(
        self,
        net: Net,
        shape: Sequence[int],
        steps: int | Sequence[int] = 100,
        cond: dict[str, Tensor] | None = None,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Draws samples by DDIM (eq. 12), from pure noise to an image, with `steps` evaluations of the network.

        Args:
            net: called as `net(x_t, t, cond)` with t (B,) int64, in the mode it is in: call `net.eval()` first.
            shape: (B, C, *spatial) of the result.
            steps: how many of `timesteps`, or the timesteps themselves, noisiest first.
            cond: handed to the network unchanged.
            eta: 0 is deterministic given the starting noise; 1 is ancestral DDPM sampling, with the variance that the
                network has learned if it predicts one.
            noise: the starting point, of `shape`; the same for several networks makes their samples comparable.
            generator: source of the starting noise and, with eta > 0, of each step's; a CPU one serves any device.
                A list of them, one per sample, makes a sample independent of its batch.
            progress: wraps the loop over steps, for instance `tqdm`.

        Returns: x_0, `shape`, float32, as it comes out: without `clip_x0` nothing is clipped.

        Raises:
            ValueError: `steps` outside 1 .. T or not falling, `eta` outside [0, 1], `noise` not of `shape`, or a
                network whose prediction is neither of `shape` nor, with a variance, of twice as many channels.
        """
        ts = self.timesteps(steps) if isinstance(steps, int) else list(steps)
        if not ts or any(t <= t_next for t, t_next in pairwise([self.steps, *ts, -1])):
            raise ValueError(f"timesteps must fall, from at most {self.steps - 1} to at least 0, got {ts}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 as noisy as DDPM), got {eta}")
        x = _start(net, shape, noise, generator)  # (B, C, H, W)
        pairs = list(zip(ts, ts[1:] + [-1], strict=True))
        for t, t_next in pairs if progress is None else progress(pairs):
            now = torch.full(x.shape[:1], t, device=x.device)  # (B,)
            output = net(x, now, cond).float()
            prediction, v = split(output, x.shape[1])
            if prediction.shape != x.shape:
                raise ValueError(f"the network must predict noise of shape {tuple(x.shape)}, got {tuple(output.shape)}")
            x = self.step(x, self.noise_in(prediction, x, now), t, t_next, eta, generator, v)
        return x

    def step(
        self,
        x: Tensor,
        eps: Tensor,
        t: int,
        t_next: int,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        v: Tensor | None = None,
    ) -> Tensor:
        """One DDIM step from timestep t to t_next < t, given the predicted noise eps; t_next = -1 is the clean image.

        x, eps and the result: (B, C, *spatial). Coefficients are Python floats: no tables to move, nothing to wait for.
        v: where the log-variance of an ancestral step (eta = 1) lies, -1 at its lower bound, 1 at its upper one.
        """
        a, a_next = self._a[t], self._a[t_next]
        beta = 1 - a / a_next  # of this step, which may span several timesteps
        sigma = eta * math.sqrt(beta * (1 - a_next) / (1 - a))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        if sigma == 0:
            return x
        noise = _randn(x.shape, generator, x.device)
        if eta < 1 or v is None:
            return x + sigma * noise
        low, high = 2 * math.log(sigma), math.log(beta)
        return x + (0.5 * (low + (v + 1) / 2 * (high - low))).exp() * noise


class Guided(nn.Module):
    """A network guided away from no condition: u + scale (c - u) of its outputs c with and u without `cond`.

    Args:
        net: takes `cond`, and `null` in its place.
        scale: 1 is the network itself, more follows the condition more closely.
        null: the `cond` of one sample that stands for none, as `net.no_condition()` gives it.
        channels: how many are guided, the others are those of c; None: those of x_t, never those of the variance.
    """

    def __init__(self, net: nn.Module, scale: float, null: dict[str, Tensor], channels: int | None = None):
        super().__init__()
        self.net, self.scale, self.null, self.channels = net, scale, null, channels

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        both = {key: torch.cat([value, self.null[key].to(value).expand_as(value)]) for key, value in cond.items()}
        with_cond, without = self.net(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)  # (B, C or 2C, ...)
        k = x_t.shape[1] if self.channels is None else self.channels
        c, u = with_cond[:, :k], without[:, :k]
        return torch.cat([u + self.scale * (c - u), with_cond[:, k:]], dim=1)


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, channels, ...) in an output, and where its variance lies, if it has 2 `channels`, or None."""
    return output.chunk(2, dim=1) if output.shape[1] == 2 * channels else (output, None)


def _nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the probability, in nats, that a Gaussian rounded to the 8-bit levels of [-1, 1] gives x; same shapes."""
    high = torch.special.ndtr((x - mean + 1 / 255) * (-log_std).exp()).where(x < 0.999, 1.0)
    low = torch.special.ndtr((x - mean - 1 / 255) * (-log_std).exp()).where(x > -0.999, 0.0)
    return -(high - low).clamp(min=1e-12).log()


def _randn(
    shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Tensor:
    """Normal noise on `device`, drawn where the generator lives, so that a CPU seed means the same on every machine."""
    if isinstance(generator, Sequence):
        return torch.stack([_randn(shape[1:], one, device) for one in generator])
    where = device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, device=where).to(device)


def _start(
    net: Net,
    shape: Sequence[int],
    noise: Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """The starting point of a sampler, `shape`, float32 where the network is: `noise`, or drawn."""
    if noise is not None and noise.shape != tuple(shape):
        raise ValueError(
            f"the starting noise must have the shape of the samples, {tuple(shape)}, not {tuple(noise.shape)}"
        )
    device = _device_of(net, generator if noise is None else noise)
    return _randn(shape, generator, device) if noise is None else noise.to(device, torch.float32)


def _device_of(net: Net, source: Tensor | torch.Generator | Sequence[torch.Generator] | None) -> torch.device:
    """The device of a module's parameters; a plain function has none, then that of the noise or its generator."""
    source = source[0] if isinstance(source, Sequence) else source
    parameter = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    given = source if parameter is None else parameter
    return torch.device("cpu") if given is None else given.device


class RectifiedFlow:
    """Velocity prediction on straight lines from data to noise, z_s = (1 - s) x0 + s noise, sampled by Euler steps.

    The network gets t = 1000 s as floats, so it may be the same as for DDPM. Sources: Liu et al. 2022 (arXiv
    2209.03003); logit-normal times and shift: Esser et al. 2024, "SD3" (arXiv 2403.03206), section 3.1 and eq. 23.

    Args:
        shift: m moves all times, in training and in sampling, towards the noise: s -> m s / (1 + (m - 1) s). SD3 takes
            3; 1 leaves them. It is applied once. (diffusers' FlowMatchEulerDiscreteScheduler applies it twice when it
            is asked for a NUMBER of steps: 4 steps at shift 3 visit t = 1000, 857.7, 602.2, 8.9. Given the sigmas of
            `RectifiedFlow().timesteps(4)` / 1000, as diffusers' own Flux pipeline does, it visits ours: 1000, 900, 750,
            500.)

    Attributes: `sampler` (its name), `steps`, how many units of t there are, 1000.

    Raises:
        ValueError: a `shift` that is not above 0.
    """

    sampler, steps = "Euler", 1000

    def __init__(self, shift: float = 1.0):
        if not 0 < shift < math.inf:
            raise ValueError(f"RectifiedFlow needs a shift above 0, got {shift}; SD3 takes 3, and 1 shifts nothing")
        self.shift = shift

    def _shifted(self, s):
        return self.shift * s / (1 + (self.shift - 1) * s)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_s = (1 - s) x0 + s noise with s = t / 1000.

        Args:
            x0, noise: (B, C, *spatial), any number of spatial axes. t: (B,) in [0, 1000], on the device of x0.

        Returns: (B, C, *spatial), float32 (float64 for float64 input).

        Raises:
            ValueError: shapes that differ, or a `t` that is not one number per sample.
        """
        if x0.shape != noise.shape or t.shape != x0.shape[:1]:
            raise ValueError(
                "add_noise needs x0 and noise of one shape (B, C, ...) and t of shape (B,), got "
                f"x0 {tuple(x0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}"
            )
        s = (t / self.steps).reshape(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict from z_s: the velocity d z_s / d s = noise - x0, at every time the same."""
        return noise - x0

    def sample_t(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Times for one training batch, (batch,) float32 in (0, 1000): logit-normal (mean 0, std 1), then shifted.

        The draw is made on the generator's device, so a CPU generator gives the same times on every machine.

        Raises:
            ValueError: `batch` below 1.
        """
        if batch < 1:
            raise ValueError(f"sample_t needs a batch of at least 1, got {batch}")
        where = device if generator is None else generator.device
        s = torch.randn(batch, generator=generator, device=where).sigmoid()
        return (self.steps * self._shifted(s)).to(device or where)

    def timesteps(self, steps: int) -> list[float]:
        """The times t that a sampler of `steps` steps visits, noisiest first: s = 1, 1 - 1/steps, .., 1/steps, shifted.

        The last step goes from the last of them to s = 0.

        Raises:
            ValueError: `steps` outside 1 .. 1000.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"the sampler takes 1 to {self.steps} steps, got steps={steps}; SD3 takes 28")
        return [self.steps * self._shifted(i / steps) for i in range(steps, 0, -1)]

    @torch.no_grad()
    def sample(
        self,
        net: Net,
        shape: Sequence[int],
        steps: int = 28,
        cond: dict[str, Tensor] | None = None,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Draws samples with `steps` Euler steps, from pure noise to an image; otherwise as `DDPM.sample`.

        Raises:
            ValueError: `steps` outside 1 .. 1000, an `eta` other than 0 (the flow is deterministic), `noise` not of
                `shape`, or a network whose prediction is not of `shape`.
        """
        ts = self.timesteps(steps)
        if eta != 0:
            raise ValueError(f"a flow is sampled without new noise: eta must be 0, got {eta}")
        z = _start(net, shape, noise, generator)  # (B, C, H, W)
        pairs = list(zip(ts, ts[1:] + [0.0], strict=True))
        for t, t_next in pairs if progress is None else progress(pairs):
            v = net(z, torch.full(z.shape[:1], t, device=z.device), cond)
            if v.shape != z.shape:
                raise ValueError(f"the network must predict a velocity of shape {tuple(z.shape)}, got {tuple(v.shape)}")
            z = self.step(z, v.float(), t, t_next)
        return z

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        """One Euler step from time t to t_next < t, given the predicted velocity v; t_next = 0 is the clean image."""
        return z + (t_next - t) / self.steps * v


Process = DDPM | RectifiedFlow
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "schedule": "scaled_linear"}
PROCESSES: dict[str, tuple[type[Process], dict[str, Any]]] = {  # by the names that a run writes down
    "ddpm": (DDPM, {}),
    "flow": (RectifiedFlow, {}),
    "sd": (DDPM, STABLE),  # Stable Diffusion 1, 2-base and 2.1-base
    "sd-v": (DDPM, {**STABLE, "prediction": "v"}),  # Stable Diffusion 2 and 2.1 at 768 pixels
    "sd3": (RectifiedFlow, {"shift": 3.0}),  # Stable Diffusion 3 and 3.5
}


def process_named(name: str, spacing: str = "leading", clip_x0: bool = False) -> Process:
    """The process of that name in `PROCESSES`; the rest is the sampler's, where it has a choice (DDPM)."""
    kind, settings = PROCESSES[name]
    return kind(**settings, **({"spacing": spacing, "clip_x0": clip_x0} if kind is DDPM else {}))
