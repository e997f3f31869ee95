"""A student repaired without training: two numbers for each step, image and channel, predicted in closed form.

    python -m distil.calibrate RUN                  every student of a run, or the one in the folder of a saved network
    python -m distil.calibrate RUN --images DIR     fitted on images of yours instead of those that the run held out
    python -m distil.calibrate FOLDER --teacher TEACHER --images DIR        of a student that belongs to no run

A part of what a collapsed student says wrong is a line, and this part lets its samples run off: where it says e, its
teacher says b0 + b1 e. In the paper's Figure 2 the teacher gives b0 and b1 at every step. They can be predicted: they
are nearly linear in mean and deviation of x_t and of e, which the student's instance norms erased. One least-squares
fit finds ten numbers for each timestep and channel. From then on they lie beside the student's weights, and
distil.sample and distil.evaluate use them, unless they are told --no-calibration. The teacher is needed for the fit
alone.

Symbols: B batch, C channels, S timesteps of the sampler; x_t, e_S and e_T as in `lift_place`.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distil import disk, machine, report, teachers
from distil.process import Process, split
from models import Network, correct, fingerprint, sealed, statistics

FILE = "calibration.safetensors"  # beside the weights of a student
LARGEST = 1e10  # mean square of what a fit weighs, outputs of about 300; beyond it rounding is larger than the ridge

# ---- What a calibration is -------------------------------------------------------------------------------------------


class Calibration(nn.Module):
    """`models.correct` with weights for the timesteps of a sampler, and between two of them those on the line between.

    times    (S,) float32, growing
    weights  (S, C, 5, 2) float32
    about    how they came about, as JSON takes it; "student" is the fingerprint of the network that they are for
    """

    def __init__(self, times: Tensor, weights: Tensor, about: dict[str, Any]):
        super().__init__()
        self.register_buffer("times", times)
        self.register_buffer("weights", weights)
        self.about = about

    def forward(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_t (B, C, *spatial), t (B,), output (B, C or 2 C, *spatial) -> the output, its prediction corrected."""
        t = t.float()
        after = torch.searchsorted(self.times, t).clamp(max=len(self.times) - 1)  # (B,), the first not below t
        before = (after - 1).clamp(min=0)
        gap = (self.times[after] - self.times[before]).clamp(min=1e-6)
        share = ((t - self.times[before]) / gap).clamp(0, 1)[:, None, None, None]  # (B, 1, 1, 1)
        return correct(x_t, output, torch.lerp(self.weights[before], self.weights[after], share))

    def attach(self, module: nn.Module) -> RemovableHandle:
        """From now on a network of others, called as pipelines of diffusers do it, returns what is corrected; until
        `handle.remove()`. It takes x_t and t first, and returns the output in a tuple or in an object of one field."""

        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            x_t, t = (*args, *kwargs.values())[:2]
            corrected = self.to(x_t.device)(x_t, torch.as_tensor(t, device=x_t.device).expand(len(x_t)), output[0])
            return (corrected, *output[1:]) if isinstance(output, tuple) else type(output)(corrected)

        return module.register_forward_hook(hook, with_kwargs=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes calibration.safetensors into the folder of a saved student."""
        tensors = {"times": self.times, "weights": self.weights}
        with disk.whole(Path(folder) / FILE) as part:
            part.write_bytes(to_bytes(tensors, metadata={**sealed(tensors), "about": json.dumps(self.about)}))


class Calibrated(Network):
    """A network whose predictions a calibration corrects; like any other in all that sampling and scoring ask for.

    To prune or train it take `net`: a calibration is for these weights only, so what would change them is refused.

    Guidance and variance: each prediction is corrected, with and without the condition, before guidance extrapolates
    from one to the other; what a network says of its variance stays.
    """

    def __init__(self, net: Network, calibration: Calibration):
        super().__init__()
        self.net, self.head = net, calibration

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        return self.head(x_t, t, self.net(x_t, t, cond))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the network and its calibration; `load(folder)` gives both back."""
        self.net.save(folder)
        self.head.save(folder)

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise ValueError("a calibration is for these weights only: take `net`, the network without it, and fit it anew")

    norms = keep_blocks = set_head = reset_parameters = recompute = _refuse


for _name in (*Network.__annotations__, "fit", "no_condition", "attention_macs", "settle"):  # as the network has them
    setattr(Calibrated, _name, property(attrgetter(f"net.{_name}")))
Calibrated.pruning = property(Calibrated._refuse)


def load(folder: str | os.PathLike, calibrated: bool = True) -> Network:
    """The network of `teachers.load`, with the calibration that lies beside it, if there is one and `calibrated`.

    ValueError: its file is damaged, or was made for other weights.
    """
    net, path = teachers.load(folder), Path(folder) / FILE
    if not calibrated or not path.is_file():
        return net
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("times", "weights")}
        about, shape = json.loads(metadata["about"]), (len(tensors["times"]), net.shape[0], 5, 2)
        made_for, seal = about["student"], sealed(tensors)["fingerprint"]
        if tensors["weights"].shape != shape or metadata.get("fingerprint", seal) != seal:  # older ones have no seal
            raise ValueError("another shape or checksum")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: fit it again, or leave it out with --no-calibration") from error
    if made_for != fingerprint(net.state_dict().values()):
        raise ValueError(f"{path} was made for other weights: fit it again, or leave it out with --no-calibration")
    return Calibrated(net, Calibration(**tensors, about=about)).eval()


# ---- The fit ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_calibrations(
    students: Sequence[Network], teacher: Network, process: Process, images: Tensor, timesteps: Iterable[float],
    cond: dict[str, Tensor] | None = None, *, draws: int = 1, ridge: float = 1e-5, seed: int = 0, batch: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Calibration]:  # fmt: skip
    """The calibrations with which students are nearest to their teacher, on images noised to each timestep.

    Of each timestep and channel it is the least of sum (e_T - e_S - b0 - (b1 - 1) e_S)^2 over all elements, where
    (b0, b1 - 1) = statistics(x_t, e_S) @ weights: ten linear unknowns, solved in float64. A student that says what its
    teacher says is left as it is, exactly. All students of one call share its passes through the teacher.

    Args:
        students, teacher: in the mode in which they are to be used, on the device of `images`.
        process: of the students, which tells at which of its own times the teacher is asked.
        images: (N, C, H, W) in [-1, 1], or latents; best ones that the students have not seen.
        timesteps: those that the sampler visits, `process.timesteps(steps)`.
        cond: what the networks are told of the images, (N, ...) each. Of every second image they are told their
            `no_condition()` instead, if all have one, so that guidance finds both its predictions corrected.
        draws: how many noises each image gets.
        ridge: draws the weights to 0, the identity; in units of a statistic's mean square.
        batch: images at a time. progress: wraps the loop over timesteps, for instance `tqdm`.

    ValueError where outputs are not finite, or so large that no line can be found.
    """
    times, channels, cond, solutions = sorted(timesteps), images.shape[1], dict(cond or {}), []
    nulls = [net.no_condition() for net in (teacher, *students)]
    for key, nothing in (nulls[0] if None not in nulls else {}).items():
        cond[key] = cond[key].clone()
        cond[key][1::2] = nothing.to(cond[key])
    for i, t in enumerate(progress(times)):
        generator = torch.Generator().manual_seed(machine.hash_seed(seed, i))
        grams = torch.zeros(len(students), channels, 10, 10).double()
        moments = torch.zeros(len(students), channels, 10, 1).double()
        for _ in range(draws):
            noise = torch.randn(images.shape, generator=generator)  # (N, C, H, W)
            for rows in torch.arange(len(images)).split(batch):
                x0, told = images[rows], {key: value[rows] for key, value in cond.items()}
                now = torch.full(x0.shape[:1], t, device=x0.device)  # (B,)
                x_t = process.add_noise(x0, noise[rows].to(x0), now)
                e_t = split(teacher(x_t, process.phi(now), told), channels)[0]
                for k, student in enumerate(students):
                    gram, moment = equations(x_t, split(student(x_t, now, told), channels)[0], e_t)
                    grams[k] += gram
                    moments[k] += moment
        if not (grams.isfinite().all() and moments.isfinite().all()):
            raise ValueError(f"outputs are not finite at timestep {t:g}: nothing can be fitted to what has diverged")
        if grams.amax() > LARGEST * draws * len(images):
            raise ValueError(f"outputs are too large at timestep {t:g}: nothing can be fitted to what has diverged")
        grams += ridge * draws * len(images) * torch.eye(10).double()
        weights = torch.linalg.solve(grams, moments)
        solutions.append(weights.unflatten(2, (5, 2)).squeeze(4).float())
    about = {"teacher": fingerprint(teacher.state_dict().values())}
    about |= {"images": len(images), "draws": draws, "ridge": ridge, "seed": seed}
    found = []
    for student, weights in zip(students, torch.stack(solutions, dim=1), strict=True):  # (S, C, 5, 2)
        its = about | {"student": fingerprint(student.state_dict().values())}
        found.append(Calibration(torch.tensor(times).float(), weights, its).to(images.device))
    return found


def fit_calibration(student: Network, *arguments: Any, **options: Any) -> Calibration:
    """That of one student; arguments as of `fit_calibrations`."""
    return fit_calibrations([student], *arguments, **options)[0]


def equations(x_t: Tensor, e_s: Tensor, e_t: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of a batch, gram (C, 10, 10) and moment (C, 10, 1), float64 on the CPU: sums over images of
    means over elements. What each statistic weighs in b0 and in b1 is wanted; e_T - e_S is to come out."""
    f = statistics(x_t, e_s).cpu().double()  # (B, C, 5)
    e, wanted = (output.cpu().double().flatten(2) for output in (e_s, e_t))  # (B, C, N)
    one_e = torch.stack([torch.ones_like(e), e], dim=2)  # (B, C, 2, N)
    products = one_e @ one_e.mT / e.shape[2]  # (B, C, 2, 2)
    against = (one_e @ (wanted - e)[..., None]).squeeze(3) / e.shape[2]  # (B, C, 2)
    gram = torch.einsum("bcf,bcop,bcg->cfogp", f, products, f)
    return gram.reshape(-1, 10, 10), torch.einsum("bcf,bco->cfo", f, against).reshape(-1, 10, 1)


# ---- The command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    from distil import doctor  # which stands on this file

    case, flags = doctor.opened("distil.calibrate", __doc__, argv, num=300)
    with machine.refusing("distil.calibrate"):
        for folder in case.folders.values():
            if not os.access(folder, os.W_OK):
                raise OSError(f"the calibration belongs into {folder}, which cannot be written: give a copy of it")
        calibrations = case.fit()
        Path(flags.out).mkdir(parents=True, exist_ok=True)
    ways, picture = [], Path(flags.out) / "calibration.png"
    with machine.refusing("distil.calibrate", (OSError,)):
        for name, calibration in calibrations.items():
            calibration.save(case.folders[name])
            method, _, seed = name.rpartition("-")  # as train.py calls students of a run; others have names of theirs
            method = method if method and seed.isdecimal() else name
            student = case.students[name]
            for kind, net in (("", student), (", calibrated", Calibrated(student, calibration))):
                ways.append(doctor.Way(f"{name}{kind}", net, {"method": f"{method}{kind}", "seed": seed}))
        rows, samples = case.compare(ways)
        report.grid(picture, samples)
    about = f"{len(calibration.times)} timesteps fitted on {len(case.x0)} images; {case.count} samples each"
    print(f"{report.table(rows)}\n\n{about}\n{FILE} lies beside the weights of each student; pictures: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
