"""What a GPU makes of it, in one unattended command: every speed, then a run at the paper's size.

    python benchmarks/gpu.py                             # at most 25 minutes (`--minutes`); benchmarks/DEVICE.json
    python benchmarks/gpu.py --minutes 9                 # ends after 9; the same command goes on where it stopped
    python benchmarks/gpu.py --official ../LIFT_PLACE    # beside the authors' code, imported from a clone of it
    python benchmarks/gpu.py --quick --device cpu        # tiny networks, few steps: does it run?
    python benchmarks/bench.py --show benchmarks/DEVICE.json

The JSON is written after every part. A part that it holds is left out, one that failed is recorded with its error and
tried again by the next call. The pictures, the curves and the scores of the runs lie in a folder beside the JSON.
Networks have random weights until `runs`, whose number of steps is what fits into the minutes of PLAN.

Exit code 0: all is there; 1: a part failed; 143: the time was over, the same command goes on.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from benchmarks import answers, bench, calibrate
from benchmarks.answers import Row
from benchmarks.bench import Cases, Setup
from distil import disk, machine, metrics, networks, students
from distil.batches import draw
from distil.command import check
from distil.process import make_process
from distil.settings import Settings
from distil.students import ShardedStudent, Student
from distil.text_to_image import MMDiT, TextUNet

METHODS = ("none", "out", "lift", "place")
PLAN = {"teacher": 5.0, "students": 2.5}  # minutes of training: of the teacher, and of the students of each run

# Stable Diffusion 2.1 with BK-SDM's Base at 512 pixels, and Stable Diffusion 3 with half of its blocks at 1024: the
# network, its config, the shape of a latent, of what it is told, the batch, how the student is made. Then small ones.
TEXT: dict[str, tuple] = {
    "sd": (TextUNet, {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "use_linear_projection": True,
                      "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024},
           (4, 64, 64), {"text": (77, 1024)}, 8, {"student": "base"}),
    "mmdit": (MMDiT, {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
                      "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
                      "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192},
              (16, 128, 128), {"text": (333, 4096), "pooled": (2048,)}, 4, {"prune": 0.5}),
}  # fmt: skip
SMALL: dict[str, tuple] = {
    "sd": (TextUNet, {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "use_linear_projection": True,
                      "attention_head_dim": (1, 2, 2, 2), "cross_attention_dim": 16, "norm_num_groups": 4},
           (4, 8, 8), {"text": (4, 16)}, 2, {"student": "base"}),
    "mmdit": (MMDiT, {"sample_size": 8, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
                      "joint_attention_dim": 36, "caption_projection_dim": 16, "pooled_projection_dim": 24,
                      "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8},
              (4, 8, 8), {"text": (4, 36), "pooled": (24,)}, 2, {"prune": 0.5}),
}  # fmt: skip


def timed(b: Setup, cases: Cases) -> Iterable[Row]:
    """A row for every case: seconds of a call and of the first one, and on a GPU the most memory beyond what was there
    before; or why it does not run."""
    rows: dict[str, Row] = {name: {"what": name} for name in cases}
    for name, case in list(cases.items()):
        began = time.perf_counter()
        try:
            case()
            if b.gpu:
                torch.cuda.synchronize()
            rows[name]["first_s"] = time.perf_counter() - began
            if b.gpu:
                rows[name]["peak_GiB"] = bench.peak_bytes(case, b.device) / 2**30
        except Exception as error:
            rows[name]["error"] = machine.sentence(error)
            del cases[name]
    took = b.medians(cases) if cases else {}
    for name, s in took.items():
        rows[name] |= {"s": s, "vs_first_row": s / next(iter(took.values()))}
    yield from rows.values()


# ---- The parts that bench.py does not have ---------------------------------------------------------------------------


def ways(b: Setup) -> Iterable[Row]:
    """The step of PLACE and features in several ways: precision, memory layout, and torch.compile, which also fuses the
    many small kernels of a thin student, or records them once as CUDA graphs, whose replay allocates nothing, so that
    its peak says nothing. peak: beyond weights and optimizer."""
    layouts, cases = {"": torch.contiguous_format, ", channels last": torch.channels_last}, {}
    compilers = {", compiled": "default", ", CUDA graphs": "reduce-overhead"}
    names = [*product(("fp32", b.half), layouts, [""]), *product([b.half], [", channels last"], compilers)]
    for name in names[:2] if b.quick else names:  # a compiler takes minutes on a CPU
        precision, layout, how = name
        settings = b.settings(precision=precision)
        tapped = students.Tapped(b.new_teacher().to(memory_format=layouts[layout]))
        net = b.pruned(settings.prune).to(memory_format=layouts[layout])
        one = Student(settings, train.resolve(settings, "place"), 0, net, tapped)
        for module in (tapped, one.model) if how else ():
            module.compile(mode=compilers[how])
        cases["".join(name)] = partial(b.step, [one], settings, tapped)
    for row in timed(b, cases):
        if "graphs" in row["what"]:
            row.pop("peak_GiB", None)
        yield row


def text_step(b: Setup, kind: str, recompute: bool) -> Callable[[], None]:
    """A step of PLACE and features of a text-to-image student with random weights."""
    network, config, shape, told, batch, student = (SMALL if b.quick else TEXT)[kind]
    settings = Settings(dataset="latents", arch=kind, batch_size=batch, recompute=recompute, **student)
    cond = {name: torch.zeros(size) for name, size in told.items()}
    with b.device:
        teacher = network.of(config).eval().requires_grad_(False)
    teacher.fit(shape, cond, settings.caption_dropout)
    run = networks.Run(settings, b.device, None, checkpoint={})
    net = networks.start_of(run, networks.SMALLER[teacher.pruning](run, teacher, None, None, 0), 0, {})
    kd, process = train.resolve(settings, "place"), make_process(settings.process)
    tapped = students.tap(teacher, net, kd.taps)
    one = Student(settings, kd, 0, net, tapped)
    teacher.settle(students.find_dtype(settings, b.device, frozen=True))
    latents = torch.randn(batch, 2, *shape)
    cond = {name: value.expand(batch, *value.shape) for name, value in cond.items()}

    def step() -> None:
        shown = draw(settings, latents, cond, process, teacher, 0)
        train.step(settings, [one], tapped, process, shown, 0)

    return step


def text(b: Setup, kind: str) -> Iterable[Row]:
    """Rows of one kind of network, alone on the device."""
    for how in (False, True):
        release()
        case = text_step(b, kind, how)
        there = torch.cuda.memory_allocated() / 2**30 if b.gpu else 0.0
        name = f"batch {(SMALL if b.quick else TEXT)[kind][4]}{', recompute' * how}"
        for row in timed(b, {name: case}):
            yield row | {"before_GiB": there}
        del case


def release() -> None:
    """Gives the memory of what is no more back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def stable_diffusion(b: Setup) -> Iterable[Row]:
    """A step with BK-SDM's Base of Stable Diffusion 2.1 at 512 pixels, bf16, without and with --recompute. before: the
    networks, optimizer and average; peak: beyond that."""
    yield from text(b, "sd")


def stable_diffusion_3(b: Setup) -> Iterable[Row]:
    """The same with half the blocks of Stable Diffusion 3 at 1024 pixels."""
    yield from text(b, "mmdit")


def sharded(b: Setup) -> Iterable[Row]:
    """A step of PLACE and features with a student as large as its teacher, whole and split by FSDP2 over one process:
    what splitting costs by itself."""
    settings = b.settings(prune=0.0)
    kd = train.resolve(settings, "place")

    def case(kind: type[Student]) -> Callable[[], None]:
        net = copy.deepcopy(b.teacher).requires_grad_(True)
        return partial(b.step, [kind(settings, kd, 0, net, b.tapped)], settings)

    cases = {"whole": case(Student)}  # made before there is a group of processes, so not within DDP
    dist.init_process_group("nccl" if b.gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cases["FSDP2"] = case(ShardedStudent)
        yield from timed(b, cases)
    finally:
        dist.destroy_process_group()


# ---- A run at the paper's size ---------------------------------------------------------------------------------------


def pace(b: Setup) -> Iterable[Row]:
    """A step of what the runs train, the teacher by itself and all students with one pass of it, and how many steps fit
    into the minutes of PLAN."""
    settings = b.settings(importance="magnitude")
    alone = Student(settings, train.resolve(settings, "none"), 0, copy.deepcopy(b.teacher).requires_grad_(True))
    group = [b.student(settings, method) for method in METHODS]
    cases = {"teacher": partial(b.step, [alone], settings), "students": partial(b.step, group, settings)}
    for row in timed(b, cases):
        steps = 2 if b.quick else max(100, round(60 * PLAN[row["what"]] / row["s"], -2))
        yield {"what": row["what"], "parameters": metrics.parameters((alone, group[0])[row["what"] == "students"].net)
               } | row | {"steps": int(steps)}  # fmt: skip


def photographs(folder: Path, n: int) -> Path:
    """A folder of n square crops of the two photographs that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    random, images = np.random.default_rng(0), load_sample_images().images  # two, (427, 640, 3) uint8 each
    for i in range(n):
        size = int(random.integers(96, 256))
        y, x = (int(random.integers(0, side - size)) for side in (427, 640))
        Image.fromarray(images[i % 2][y : y + size, x : x + size]).save(folder / f"{i:04d}.jpg", quality=92)
    return folder


def run_settings(b: Setup, norms: str) -> Settings:
    """The paper's networks for CelebA on photographs, for the steps that `pace` found."""
    steps = {row["what"]: row["steps"] for row in b.sections["pace"]["rows"]}
    net = {"channels": 128, "channel_mults": (1, 2, 2, 2, 4), "num_res_blocks": 2, "teacher_norm_groups": 32}
    small = {"channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "teacher_norm_groups": 8, "sample_steps": 2}
    return Settings(
        dataset="folder", data=str(photographs(b.folder / "photographs", 12 if b.quick else 2000)), image_size=b.size,
        batch_size=b.batch, kd=METHODS, importance="magnitude", norm_groups=norms, clip_x0=False, eval_samples=0,
        teacher_steps=steps["teacher"], steps=steps["students"], teacher_lr=2e-4, lr=1e-3, warmup=100, decay="cosine",
        ema=0.995, dropout=0.1, preview_every=0, device=str(b.device), out=str(b.folder / norms),
        **(small if b.quick else net),
    )  # fmt: skip


def run(b: Setup, norms: str) -> Iterable[Row]:
    """Distils, repairs, samples and compares; rows as of a run's table."""
    settings, out = run_settings(b, norms), b.results / norms
    few = ["--num", "6", "--fit", "6", "--ways", "plain", "calibrated"]
    try:
        train.main(settings)
        release()
        calibrate.main([settings.out, str(out), *(few if b.quick else ["--num", "600"])])
    except SystemExit as stop:
        if stop.code in (2, train.DIVERGED):  # the others say that the time is over
            raise RuntimeError(f"it ended with exit code {stop.code}, its output says why") from stop
        raise
    for name in ("curves.png", "log.jsonl"):
        shutil.copy(Path(settings.out) / name, out)
    found = disk.read_json(out / "metrics.json", "remove it")
    for row in [found["teacher"], *found["students"]]:
        yield {name: value for name, value in row.items() if value is not None}


def kept(b: Setup) -> Iterable[Row]:
    """Students of 90 % from photographs at the paper's size, with as many groups in their norms as the teacher, as in
    the paper: as they are, clamped at every step, calibrated, and both."""
    yield from run(b, "keep")


def scaled(b: Setup) -> Iterable[Row]:
    """The same with as many channels per group as the teacher."""
    yield from run(b, "scale")


# ---- The command -----------------------------------------------------------------------------------------------------

OWN = (ways, stable_diffusion, stable_diffusion_3, sharded, pace, kept, scaled)
PARTS = {part.__name__: part for part in (bench.loss, bench.step, bench.students, bench.overhead, bench.sampling, *OWN)}


@contextlib.contextmanager
def deadline(minutes: float) -> Iterator[None]:
    """Inside the block SIGTERM ends the program with exit code 143, and comes by itself after so many minutes. A
    training that is under way saves itself first."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    former, clock = signal.signal(signal.SIGTERM, end), threading.Timer(60 * minutes, signal.raise_signal, [15])
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        signal.signal(signal.SIGTERM, former)


def started(path: Path, about: Row) -> Row:
    """What an earlier call wrote to `path`, else the beginning of it; ValueError if that measured something else."""
    if not path.exists():
        return {**about, "sections": {}}
    result = disk.read_json(path, "remove it, or give another --out")
    keys = [("options",), ("official",), ("machine", "gpu"), ("machine", "torch")]
    for key in keys:
        was, now = (reduce(lambda found, name: found.get(name, {}), key, found) for found in (result, about))
        if was != now:
            raise ValueError(f"{path} is of another {key[-1]} ({was}, now {now}): give another --out")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = answers.parser_of("gpu.py", __doc__, PARTS, "benchmarks/DEVICE.json")
    parser.add_argument("--minutes", type=float, default=25, help="it ends after so many; give it again [25]")
    parser.set_defaults(out=None)  # DEVICE is known later
    options = parser.parse_args(arguments)
    with machine.refusing("gpu.py"):
        check("--minutes", options.minutes, {"above": 0, "high": 10**4})
        device = machine.find_device(options.device)
        if device.type != "cuda" and not options.quick:
            raise ValueError("there is no GPU here: with --quick it tries everything on tiny networks")
        name = "small" if options.quick else re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
        path = Path(options.out or ("runs" if options.quick else "benchmarks"), "" if options.out else f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"machine": machine.describe(), "options": {"small": options.quick}, "official": bool(options.official)}
        result = started(path, about)
        b = Setup(options)
        b.sections, b.folder, b.results = result["sections"], Path("runs", f"gpu-{path.stem}"), path.with_suffix("")
    with deadline(options.minutes):
        try:
            done = answers.measure(b, {name: PARTS[name] for name in options.only}, result, path)
        except SystemExit as stop:
            print(f"\nended before all was done; the same command goes on: {path}")
            return stop.code
    print(f"\nall numbers: {path}" + ("" if done else "; some parts failed, the same command tries them again"))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
