"""How fast it is: prints a table for each question and writes all numbers, hardware and versions as JSON.

    python benchmarks/bench.py                             # everything at CelebA size: 6 to 20 minutes on two cores
    python benchmarks/bench.py --only loss step            # some of it
    python benchmarks/bench.py --official ../LIFT_PLACE    # beside the authors' code, imported from a clone of it
    python benchmarks/bench.py --quick                     # tiny networks, one repetition: does it run?
    python benchmarks/bench.py --show benchmarks/cpu.json  # the tables of a former run

Seconds are medians. What is compared takes turns, so that a busy machine slows all of it; compare within one run only.
On a GPU the networks run in bfloat16 and channels_last, as in training, with a batch of 96 instead of 8; the authors'
step runs as released, in float32. Networks have random weights: their speed does not depend on them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import lift_place
import train
from benchmarks import official
from benchmarks.answers import Row, answer, parser_of, saved
from distil import fast_loss, machine
from distil.batches import Batch, draw
from distil.command import check, flag
from distil.metrics import macs
from distil.process import DDPM
from distil.settings import Settings
from distil.students import Student, Tapped, autocast, find_dtype
from models import UNet, prune_channels

Cases = dict[str, Callable[[], Any]]

# ---- How it is measured ----------------------------------------------------------------------------------------------


def seconds(cases: Cases, repeat: int, device: torch.device, limit: float = math.inf) -> dict[str, list[float]]:
    """Seconds of every case, `repeat` times, taking turns; what comes first in a turn moves on by one each time.
    limit: seconds after which no further turn begins."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in cases}
    names, start = list(cases), time.perf_counter()
    for turn in range(repeat + 1):  # the first one warms up
        if turn > 1 and time.perf_counter() - start > limit:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait()
            began = time.perf_counter()
            cases[name]()
            wait()
            if turn > 0:
                times[name].append(time.perf_counter() - began)
    return times


def peak_bytes(case: Callable[[], Any], device: torch.device) -> int:
    """The most memory that the case holds at once beyond what is there before."""
    case()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ sizes^p, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


# ---- What is measured ------------------------------------------------------------------------------------------------


TINY = {"channels": 32, "norm_groups": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}


class Setup:
    """The device, the networks and the batch of a run of this file; ValueError for flags that cannot be used."""

    def __init__(self, options: argparse.Namespace) -> None:
        for name in ("threads", "repeat"):
            if getattr(options, name) is not None:
                check(flag(name), getattr(options, name), {"low": 1, "high": 10**4})
        if options.out and Path(options.out).is_dir():
            raise ValueError(f"--out {options.out} is a folder: name a file in it")
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = machine.find_device(options.device)
        self.quick, self.compile = options.quick, options.compile
        self.gpu = self.device.type == "cuda"
        if self.gpu:
            torch.cuda.set_device(self.device)
        emulated = self.gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.half = "fp16" if emulated else "bf16"
        self.repeat = options.repeat or (1 if self.quick else 30 if self.gpu else 5)
        self.limit = 20.0 if self.gpu else math.inf  # seconds of a comparison: that of large batches needs fewer turns
        self.size, self.batch = (16, 2) if self.quick else (64, 96 if self.gpu else 8)
        torch.manual_seed(0)
        self.teacher = self.new_teacher()
        self.tapped, self.process = Tapped(self.teacher), DDPM()
        self.pixels = torch.randint(0, 256, (4 * self.batch, 3, self.size, self.size), dtype=torch.uint8)
        self.authors = None if options.official is None else official.authors(options.official)

    def new_teacher(self) -> UNet:
        """The paper's for CelebA."""
        net = machine.on_device(UNet(self.size, dropout=0.1, **(TINY if self.quick else {})), self.device)
        return net.eval().requires_grad_(False)

    def seconds(self, cases: Cases, turns: float = 1.0) -> dict[str, list[float]]:
        """Those of every case; turns: in multiples of `repeat`."""
        return seconds(cases, max(1, int(turns * self.repeat)), self.device, self.limit)

    def medians(self, cases: Cases, turns: float = 1.0) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds(cases, turns).items()}

    def settings(self, **changes: Any) -> Settings:
        """Those of the paper's CelebA student at 90 %."""
        given = {"dataset": "celeba", "prune": 0.9, "batch_size": self.batch, "image_size": self.size}
        return Settings(**{**given, "device": str(self.device), "compile": self.compile, **changes})

    def pruned(self, prune: float) -> UNet:
        return machine.on_device(prune_channels(self.teacher, prune, "random"), self.device).requires_grad_(True)

    def student(self, settings: Settings, method: str = "place", seed: int = 0) -> Student:
        return Student(settings, train.resolve(settings, method), seed, self.pruned(settings.prune), self.tapped)

    def draw(self, settings: Settings) -> Batch:
        return draw(settings, self.pixels[: settings.batch_size], {}, self.process, self.teacher, 0)

    def step(self, students: list[Student], settings: Settings, teacher: nn.Module | None = None) -> None:
        """A step of training, from the images on, for which an earlier one's memory may be taken."""
        if self.gpu:
            torch.compiler.cudagraph_mark_step_begin()
        usual = self.tapped if any(student.kd.features for student in students) else self.teacher
        train.step(settings, students, teacher or usual, self.process, self.draw(settings), 0)


# ---- The questions: each function answers one, row by row ------------------------------------------------------------


def formula(student: Tensor, teacher: Tensor, sort: bool = True) -> Tensor:
    """LIFT, or sorted PLACE, as their formulas read, in the constants of the authors' U-Nets: nothing is rearranged,
    nothing is done by hand. What the others are held against where the authors' code is not at hand."""
    s, t = student.flatten(2), teacher.flatten(2)  # (B, C, N)
    if sort:
        order = (t - s).square().argsort(-1)  # (B, C, N)
        s, t = (x.gather(-1, order).unflatten(-1, (-1, 16)) for x in (s, t))  # (B, C, G, K)
    s_mean, t_mean = s.mean(-1, keepdim=True), t.mean(-1, keepdim=True)
    b1 = ((s - s_mean) * (t - t_mean)).mean(-1, keepdim=True) / ((s - s_mean).square().mean(-1, keepdim=True) + 1e-7)
    b0 = t_mean - b1 * s_mean
    coarse = b0.abs().mean() + (b1 - 1).abs().mean()
    fine = (t - b0.detach() - b1.detach() * s).square().mean()
    return (coarse + (1 - coarse.clamp(max=1)).detach() * fine) * student[0].numel()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda s, t: nn.functional.mse_loss(s, t) * s[0].numel(),
    "lift": lambda s, t: fast_loss.lift(s, t, reduction="sum").loss,
    "place": lambda s, t: fast_loss.place(s, t, reduction="sum").loss,
    "lift (plain)": lambda s, t: lift_place.lift(s, t, reduction="sum").loss,
    "place (plain)": lambda s, t: lift_place.place(s, t, reduction="sum").loss,
    "lift (formula)": partial(formula, sort=False),
    "place (formula)": formula,
}


def loss(b: Setup) -> Iterable[Row]:
    """Forward and backward of the losses alone, float32, K = 16; peak: memory beyond the two inputs.

    Images, latents of 1024 pixels (Stable Diffusion 3) and of 16 frames of video; of 16 pixels, what the calls take.
    """
    shapes = [(16, 3, 64, 64), (8, 16, 128, 128), (2, 4, 16, 64, 64), (16, 3, 4, 4)] + [(96, 3, 64, 64)] * b.gpu
    for shape in [(2, 3, 16, 16)] if b.quick else shapes:
        pair, losses, l1 = outputs(shape, b.device), dict(LOSSES), SimpleNamespace(use_l2=False)
        if b.authors:
            theirs = b.authors.losses
            for name, own in {"lift": theirs.imp_regression_constraint_loss_LIFT, "place": theirs.LIFT_PLACE}.items():
                losses[f"authors' {name}"] = partial(of_images, own, args=l1)
        cases = {name: backward(function, *pair) for name, function in losses.items()}
        took = b.medians(cases, 5)
        peak = {name: peak_bytes(case, b.device) for name, case in cases.items()}
        for name in cases:
            row = {"shape": "x".join(map(str, shape)), "loss": name}
            row |= {"ms": 1e3 * took[name], "peak_MiB": peak[name] / 2**20}
            kind = name.split()[0]
            for base, theirs in (("formula", f"{kind} (formula)"), ("authors", f"authors' {kind}")):
                if theirs in cases:
                    row |= {f"time_vs_{base}": took[name] / took[theirs]}
                    row |= {f"memory_vs_{base}": peak[name] / peak[theirs]}
            yield row


def of_images(function: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """A loss that takes images alone; frames of a video stand below one another: (B, C, F, H, W) -> (B, C, F H, W)."""
    return function(student.flatten(2, -2), teacher.flatten(2, -2), **options)


def outputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What a student in training and its teacher might say, (B, C, *spatial) each."""
    generator = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return student.requires_grad_(), 0.9 * student.detach() + 0.3 * noise + 0.05


def backward(function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Callable[[], None]:
    def case() -> None:
        function(student, teacher).backward()
        student.grad = None  # so that a case frees all that it takes, and nothing else

    return case


def step(b: Setup) -> Iterable[Row]:
    """A whole step of PLACE with features, the teacher's part of it, and how fast the device multiplies matrices."""
    gflop, cases, n = {}, {}, 256 if b.quick else 8192 if b.gpu else 2048
    x_t, t = torch.randn(b.batch, 3, b.size, b.size, device=b.device), torch.arange(b.batch, device=b.device)
    for precision in [b.half] if b.gpu else ["fp32", b.half]:
        settings = b.settings(precision=precision)
        half, student = autocast(settings, b.device), b.student(settings)
        matrix = torch.randn(n, n, device=b.device, dtype=find_dtype(settings, b.device))

        def teacher(half=half) -> None:
            with torch.no_grad(), half:
                b.teacher(x_t, t)

        cases[f"step, {precision}"] = partial(b.step, [student], settings)
        cases[f"teacher, {precision}"] = teacher
        cases[f"matrix product, {precision}"] = partial(torch.mm, matrix, matrix)
        gflop[f"teacher, {precision}"] = 2e-9 * b.batch * macs(b.teacher)
        gflop[f"matrix product, {precision}"] = 2e-9 * n**3
    if b.authors:
        cases["authors' step, fp32"] = official.step(b)
    took = b.medians(cases)
    for name in cases:
        row = {"what": name, "batch": b.batch, "s": took[name]}
        if name in gflop:
            row |= {"gflop": gflop[name], "gflop_per_s": gflop[name] / took[name]}
        if b.authors:
            row["time_vs_authors"] = took[name] / took["authors' step, fp32"]
        yield row


def students(b: Setup) -> Iterable[Row]:
    """n students in one run, which share each teacher pass, against n runs of one."""
    settings = b.settings()
    group = [b.student(settings, seed=seed) for seed in range(2 if b.quick else 6)]
    cases = {n: partial(b.step, group[:n], settings) for n in range(1, len(group) + 1)}
    took = b.medians(cases, 0.5)
    for n in cases:
        yield {"students": n, "s_per_step": took[n], "vs_n_runs": took[n] / (n * took[1])}


def growth(b: Setup) -> Iterable[Row]:
    """PLACE over image sizes, the step over batch sizes; p: time and memory grow as size^p over the last three rows."""
    sizes = (8, 16, 32) if b.quick else (8, 16, 32, 64, 128, 256)
    cases = {n: backward(LOSSES["place"], *outputs((4, 3, n, n), b.device)) for n in sizes}
    took = b.medians(cases, 3)
    peak = {n: peak_bytes(cases[n], b.device) for n in sizes}
    rows = [{"what": f"place, 4x3x{n}x{n}", "ms": 1e3 * took[n], "peak_MiB": peak[n] / 2**20} for n in sizes]
    last = [12 * n * n for n in sizes[-3:]]
    rows[-1]["p_time"] = exponent(last, [took[n] for n in sizes[-3:]])
    rows[-1]["p_memory"] = exponent(last, [peak[n] for n in sizes[-3:]])
    yield from rows
    batches = (1, 2) if b.quick else tuple(b.batch * 2**i // 8 for i in range(5))
    student = b.student(b.settings())
    cases = {n: partial(b.step, [student], b.settings(batch_size=n)) for n in batches}
    took = b.medians(cases, 0.5)
    rows = [{"what": f"step, batch {n}", "ms": 1e3 * took[n]} for n in batches]
    rows[-1]["p_time"] = exponent(batches[-3:], [took[n] for n in batches[-3:]])
    yield from rows


def sampling(b: Setup) -> Iterable[Row]:
    """Images per second of DDIM with 100 steps (a few are timed), float32 on a CPU and bfloat16 on a GPU. Where a step
    takes the teacher over 3 s, it and the smallest student alone; no batch for which it would need over 3 minutes."""
    nets = {"teacher": b.teacher} | {f"{p:.0%} pruned": b.pruned(p).eval() for p in (0.3, 0.5, 0.7, 0.9)}
    counts, names, a_step = {name: macs(net) for name, net in nets.items()}, list(nets), 0.0
    for net in nets.values() if b.compile else ():
        net.compile()
    for batch in (1,) if b.quick else (1, 4, 16, 64, 256, 1024):
        if 4 * a_step > 180:
            break
        steps, turns = 1 if b.quick else 5 if b.gpu else 2, 0.5
        if a_step > 3:
            names, steps, turns = ["teacher", "90% pruned"], 1, 0  # one turn
        noise = torch.randn(batch, 3, b.size, b.size, device=b.device)
        cases = {name: partial(ddim, b, nets[name], noise, steps) for name in names}
        took = b.medians(cases, turns)
        a_step = took["teacher"] / steps
        for name in names:
            row = {"network": name, "batch": batch, "images_per_s": batch / took[name] * steps / 100}
            row |= {"gmacs": counts[name] / 1e9, "macs_ratio": counts["teacher"] / counts[name]}
            yield row | {"speed_up": took["teacher"] / took[name]}


def ddim(b: Setup, net: nn.Module, noise: Tensor, steps: int, precision: str = "auto") -> None:
    with autocast(b.settings(precision=precision), b.device):
        b.process.sample(net, noise.shape, steps, noise=noise)


def ways(b: Setup) -> Iterable[Row]:
    """A step of DDIM of the student of 90 %, batch 16, in all ways to run it; first_s: the first, with compiling."""
    layouts = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    nets = {name: b.pruned(0.9).eval().to(memory_format=layout) for name, layout in layouts.items()}
    if b.compile:
        nets[", compiled"] = b.pruned(0.9).eval()
        nets[", compiled"].compile()
    noise, first = torch.randn(2 if b.quick else 16, 3, b.size, b.size, device=b.device), {}
    cases = {p + name: partial(ddim, b, net, noise, 1, p) for p in ("fp32", b.half) for name, net in nets.items()}
    for name, case in cases.items():
        began = time.perf_counter()
        case()
        if b.gpu:
            torch.cuda.synchronize()
        first[name] = time.perf_counter() - began
    took = b.medians(cases)
    for name in cases:
        yield {"what": name, "s": took[name], "speed_up": took["fp32"] / took[name], "first_s": first[name]}


def startup(b: Setup) -> Iterable[Row]:
    """Seconds until the command line answers."""
    commands = {"python -c 'import torch'": ["-c", "import torch"], "python train.py --help": ["train.py", "--help"]}
    run = partial(subprocess.run, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    took = b.medians({name: partial(run, [sys.executable, *c]) for name, c in commands.items()})
    yield from ({"command": name, "s": took[name]} for name in commands)


def overhead(b: Setup) -> Iterable[Row]:
    """What PLACE adds to a step of plain output distillation: of each turn, and the two losses alone over that step."""
    settings = b.settings(lambda_feat=0)
    group = {method: b.student(settings, method) for method in ("out", "place")}
    took = b.seconds({name: partial(b.step, [one], settings) for name, one in group.items()}, 2)
    pair = outputs((b.batch, 3, b.size, b.size), b.device)
    alone = b.medians({name: backward(LOSSES[name], *pair) for name in ("mse", "place")}, 10)
    out = statistics.median(took["out"])
    turns = [place / out - 1 for out, place in zip(took["out"], took["place"], strict=True)]
    row = {"what": "step, turn by turn", "out_s": out, "place_s": statistics.median(took["place"])}
    yield row | {"overhead_percent": 100 * statistics.median(turns)}
    row = {"what": "losses alone, over that step", "out_s": alone["mse"], "place_s": alone["place"]}
    yield row | {"overhead_percent": 100 * (alone["place"] - alone["mse"]) / out}


# ---- The command -----------------------------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (loss, step, students, growth, sampling, ways, startup, overhead)}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("bench.py", __doc__, SECTIONS, "runs/bench.json")
    parser.add_argument("--show", metavar="FILE", help="measure nothing, print the tables of such a JSON")
    options = parser.parse_args(arguments)
    with machine.refusing("bench.py"):
        if options.show:
            print(saved(Path(options.show)))
            return 0
        b = Setup(options)
    if b.authors is None:
        print("no --official DIR: nothing to compare with the authors' code")
    return answer(options, b, SECTIONS)


if __name__ == "__main__":
    sys.exit(main())
