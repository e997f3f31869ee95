"""Networks to images.

    python -m distil.sample RUN                        16 images of each student of a run, and a grid of them
    python -m distil.sample RUN --num 100 --out DIR    the same of more; RUN may also be the folder of a saved network
    python -m distil.sample RUN --prompts FILE         of students that read text: an image for each line of the file,
                                                       beside the teacher's from the same noise

Image i of a seed starts from the same noise in every network, so images of two networks can be compared one by one.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from distil import calibrate, data, disk, machine, pictures, report, shards, teachers
from distil.command import SEED, Parser, check_fields, flag, option
from distil.presets import PROCESSES, SAMPLER, SAMPLERS, SPACINGS
from distil.process import Guided, Process, check_clip, check_guidance, check_name, check_sampler, process_of
from distil.text_to_image import TextEncoder, Vae
from models import Network, fingerprint

Conditions = Callable[[list[int]], dict[str, Tensor]]  # numbers of images -> what the network is told of them

# ---- From noise to images --------------------------------------------------------------------------------------------


def start_noise(n: int, shape: Sequence[int], seed: int, first: int = 0) -> Tensor:
    """Standard normal noise (n, *shape), float32 on the CPU, for images first .. first + n - 1: that of image i depends
    on (seed, i) alone."""
    noise = np.empty((n, *shape), np.float32)
    for i in range(n):
        np.random.default_rng((seed, first + i)).standard_normal(dtype=np.float32, out=noise[i])
    return torch.from_numpy(noise)


def interpolate(shape: Sequence[int], seed: int, n: int = 16) -> Tensor:
    """Start noise (2 n, *shape) on two arcs of n points, from that of image 0 to 1 and from that of 2 to 3: unlike
    straight lines, what lies between is as long as noise is."""
    a, b = start_noise(4, shape, seed).reshape(2, 2, 1, -1).unbind(1)  # the ends of both ways, (2, 1, C H W) each
    w = torch.linspace(0, 1, n)[:, None]  # (n, 1)
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1))[..., None]  # (2, 1, 1)
    noise = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()  # (2, n, C H W)
    return noise.reshape(2 * n, *shape)


def sample_batches(
    net: Network, process: Process, rows: Sequence[int], *, seed: int, steps: int | Sequence[float], eta: float = 0.0,
    cond: dict[str, Tensor] | Conditions | None = None, guidance: float = 1.0, vae: Vae | None = None,
    batch: int | None = None, device: torch.device | str | None = None, bf16: bool = False, progress: bool = True,
    label: str = "sampling",
) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
    """The images numbered `rows`, a batch at a time: (their numbers, samples (b, C, H, W) float32 where the net is).

    Image i is a function of (seed, i), and `batch` changes it by no more than rounding. steps: how many, or their
    timesteps. cond: the conditions of all images, or a function. batch: None is 256, on CUDA twice as many each time,
    up to 2048, past which nothing gets faster, and half as many where they do not fit; on a CPU fewer large images (16
    of 64x64), so that what a layer returns stays in its cache. device: None is the net's.
    """
    if device is not None:
        machine.on_device(net, torch.device(device))
    where, called, modes = next(net.parameters()).device, net, [(module, module.training) for module in net.modules()]
    if guidance != 1 and net.conditions:
        called = Guided(net, guidance, net.no_condition(), net.guided_channels)

    def draw(part: list[int]) -> Tensor:
        noise = torch.cat([start_noise(1, net.shape, seed, i) for i in part])  # (b, C, H, W)
        told = cond(part) if callable(cond) else {key: value[part] for key, value in (cond or {}).items()}
        told = {key: value.to(where) for key, value in told.items()}
        # The noise on the way is drawn on the CPU, so that a seed means the same on every device.
        later = [torch.Generator().manual_seed(machine.hash_seed(seed, i)) for i in part] if eta > 0 else None
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            x = process.sample(called, noise.shape, steps, told, eta=eta, noise=noise, generator=later)
        return x if vae is None else vae.decode(x)

    usual = max(1, min(256, 2**16 // math.prod(net.shape[1:]))) if where.type == "cpu" else 256
    done, size, largest = 0, batch or usual, batch or (2048 if where.type == "cuda" else usual)
    net.eval()
    try:
        with machine.progress_bar(total=len(rows), desc=label, unit="img", disable=not progress, leave=False) as bar:
            while done < len(rows):
                part, x = list(rows[done : done + size]), None
                try:
                    x = draw(part)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                if x is None:  # the memory is free once the error is forgotten
                    torch.cuda.empty_cache()
                    size = largest = len(part) // 2
                    continue
                yield part, x
                done += len(part)
                bar.update(len(part))
                size = min(2 * size, largest)
    finally:
        for module, training in modes:  # each in the mode that it had
            module.training = training


def sample(net: Network, process: Process, n: int, **options: Any) -> Tensor:
    """n samples (n, C, H, W), float32 on the CPU, in [-1, 1] units, NOT clamped; options: as of `sample_batches`."""
    return torch.cat([x.cpu() for _, x in sample_batches(net, process, range(n), **options)])


def visible(samples: Tensor) -> np.ndarray:
    """Samples (n, C, H, W) as they are looked at: uint8, clamped, where a pixel is NaN gray."""
    return data.to_uint8(samples.nan_to_num()).cpu().numpy()


def decoded(vae: Vae, latents: data.Images, n: int) -> np.ndarray:
    """The images (n, 3, H, W) uint8 behind n latents (not mirrored), evenly spaced over all of them."""
    rows = shards.spaced(len(latents.images), n)
    parts = np.array_split(rows, -(-len(rows) // 64))
    images = [vae.decode(torch.from_numpy(latents.images[part][:, 0])) for part in parts]
    return data.to_uint8(torch.cat(images)).numpy()


def classes_in_turn(net: Network, n: int) -> dict[str, Tensor]:
    """The conditions of n samples of a network that is told the class, {} for another."""
    return {} if net.num_classes is None else {"y": torch.arange(n) % net.num_classes}


# ---- Many images, on disk --------------------------------------------------------------------------------------------


def open_samples(folder: Path, net: Network, n: int, shape: Sequence[int], **record: Any) -> list[np.ndarray]:
    """Room for n samples of `net` in `folder`, new or as an earlier call left it: memory-mapped [images, done].

    samples.npy (n, C, H, W) uint8; done.npy (n,) uint8, 0 for an image that is still to come, 1 for one that is there,
    2 for one that was not finite; samples.json: the record of what else the images depend on, as JSON takes it.
    All processes have to call this. ValueError if the folder holds other samples, OSError if they do not fit on disk.
    """
    folder, (rank, world) = Path(folder), machine.rank_and_world()
    own = {"weights": fingerprint(net.state_dict().values()), "time": net.process}
    record = {"n": n, "shape": list(shape), **record, **own}
    extents = {"samples.npy": (n, *shape), "done.npy": (n,)}
    if rank == 0 and not (folder / "samples.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        disk.need_room(folder, n * math.prod(shape), f"{n} samples")
        for name, extent in extents.items():
            np.lib.format.open_memmap(folder / name, "w+", np.uint8, extent)
            disk.reserve(folder / name)
        disk.write_json(folder / "samples.json", record)  # last: without it the files are not looked at
    if world > 1:
        dist.barrier()
    again = "remove its folder and give the same command again"
    former = {"sampler": "ddim", "time": net.process, "process": record.get("process"),  # older ones do not say these
              **disk.read_json(folder / "samples.json", again)}  # fmt: skip
    changes = [f"{key} was {former.get(key)}, is {new}" for key, new in record.items() if former.get(key) != new]
    if changes:
        remedy = "give --precision, --sample-steps, --num and what else is named here as it was, or another --out"
        raise ValueError(f"{folder} holds other samples ({', '.join(changes)}): {remedy}")
    for name, extent in extents.items():  # for writing, numpy would fill a file up that was cut off
        shards.open_array(folder / name, extent, check=False)
    return [np.load(folder / name, mmap_mode="r+") for name in extents]


def fill(images: np.ndarray, done: np.ndarray, net: Network, process: Process, **options: Any) -> None:
    """Samples the images that `open_samples` says are not done; options: as of `sample_batches`. Of several processes,
    number r of world fills the rows r, r + world, ...; the call ends when all of them are done."""
    rank, world = machine.rank_and_world()
    missing = [i for i in range(rank, len(done), world) if not done[i]]
    for rows, x in sample_batches(net, process, missing, **options):
        images[rows] = visible(x)
        images.flush()  # the image first, then the word that it is there
        done[rows] = np.where(x.flatten(1).isfinite().all(1).cpu().numpy(), 1, 2)
        done.flush()
    if world > 1:
        dist.barrier()


# ---- What this command and evaluate's share: flags, networks, prompts ------------------------------------------------

ASKED_FOR = ("vae", "teacher")  # where runs differ in these, `prepare` asks for them if they are needed


@dataclass(frozen=True)
class Flags:
    """How networks are sampled. None: as their runs sampled, else by SAMPLER."""

    num: int | None = option(None, "images of each network; 16, calibrate 300, doctor 64; or one a prompt", int, low=1)
    seed: int = option(0, "of the starting noise", int, **SEED)
    sampler: str | None = option(None, "DDIM or diffusers' PNDM; as the run's", choices=SAMPLERS)
    sample_steps: int | None = option(None, "its steps; as the run's, else 100 or all", int, low=1, high=1024)
    eta: float | None = option(None, "DDIM eta, 0 deterministic, 1 ancestral; as the run's", float, low=0, high=1)
    spacing: str | None = option(None, "of the timesteps; as the run's", choices=SPACINGS)
    clip_x0: bool | None = option(None, "clamp the predicted image at every step; as the run did", bool)
    guidance: float | None = option(None, "scale of classifier-free guidance, 1: none; as the run's", float, low=0)
    process: str | None = option(None, "what networks predict; as the run's", choices=tuple(PROCESSES))
    vae: str | None = option(None, "of networks on latents: folder or hub id; as the run's")
    prompts: str | None = option(None, "file with a prompt a line, for networks that read text")
    teacher: str | None = option(None, "that of the students; a pipeline where they read text; as the run's")
    no_calibration: bool = option(False, "leave out what distil.calibrate has put beside their weights", bool)
    no_t5: bool = option(False, "without the largest text encoder of Stable Diffusion 3", bool)
    batch: int | None = option(None, "images at a time; what fits on a GPU, on a CPU 16 of 64x64", int, low=1)
    compile: bool = option(False, "torch.compile the networks: slow to start; on CPUs it gains nothing", bool)
    precision: str | None = option(None, "bf16 where a GPU has it, else fp32", choices=("fp32", "bf16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = option("runs/samples", "folder for the images", folder=True)

    __post_init__ = check_fields


class Job(NamedTuple):
    """Networks that can be sampled: what the flags of a command have come to."""

    nets: dict[str, Network]
    arguments: dict[str, dict[str, Any]]  # of each of them: those of `sample_batches`
    record: dict[str, Any]  # all that the images depend on but the weights, for `open_samples`
    count: int  # images of each network
    shape: tuple[int, int, int]  # (C, H, W) of an image
    prompts: list[str]  # one for each image; [] for networks that read no text


def run_of(folder: Path) -> Path | None:
    """The run that `folder` is, or in whose student/ it lies; None for another folder."""
    for place in (folder, *folder.resolve().parents[:2]):
        config = place / "config.json"
        try:
            remedy = "it must be the folder of a run or of a network"
            if config.is_file() and "kd" in disk.read_json(config, remedy):  # the others are of networks
                return place
        except ValueError:
            if place is folder:  # above it lies what is not asked for
                raise
    return None


def runs_of(folders: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """{run: its settings, as config.json has them} of the runs that these folders belong to."""
    runs = {run for run in map(run_of, folders) if run is not None}
    return {run: disk.read_json(run / "config.json", "bring it back") for run in runs}


def sampler_of(folders: Sequence[Path], flags: Flags) -> Flags:
    """The flags with all that was not given filled in: as the runs that these folders belong to sampled, else by
    SAMPLER. ValueError if the runs did it differently, for then images of their networks could not be compared."""
    configs, found = runs_of(folders).values(), {}
    for name in [name for name in SAMPLER if getattr(flags, name) is None]:
        values = {SAMPLER[name] if config.get(name) is None else config[name] for config in configs} or {SAMPLER[name]}
        if len(values) > 1 and name not in ASKED_FOR:
            raise ValueError(f"the runs were sampled with different {name}: give {flag(name)}")
        found[name] = values.pop() if len(values) == 1 else None
    return replace(flags, **found)


def find_networks(runs: Sequence[Path]) -> dict[str, Path]:
    """The folders of the students of these runs, and of the networks in these folders, by name."""
    found: dict[str, Path] = {}
    several = [run.name == "student" and not (run / "config.json").exists() for run in runs]
    for run in [run.parent if of_run else run for run, of_run in zip(runs, several, strict=True)]:
        students, name = sorted(file.parent for file in run.glob("student/**/config.json")), run.resolve().name
        if not students and (run / ".lock").exists() and not any(run.glob("**/model.safetensors")):
            raise ValueError(f"{run} is a run that has no student yet: let its command end, or give it again")
        for folder in students or [run]:
            called = f"{name}-{folder.name}" if len(students) > 1 else name
            if called in found:
                raise ValueError(f"{folder} has the name of one before it: give it a call of its own")
            found[called] = folder
    return found


def check_names(names: Iterable[str]) -> None:
    """ValueError where a network that is to stand beside its teacher is called so, too."""
    if "teacher" in names:
        raise ValueError("a student in a folder called teacher would take the teacher's place in tables: rename it")


def open_networks(runs: Sequence[Path], calibrated: bool = True) -> dict[str, Network]:
    """The networks of `find_networks`, by name, those with a calibration marked so. ValueError if they do not belong in
    one table or picture."""
    nets: dict[str, Network] = {}
    for name, folder in find_networks(runs).items():
        net = calibrate.load(folder, calibrated)
        first = next(iter(nets.values()), net)
        if net.shape != first.shape or process_of(net).steps != process_of(first).steps:
            raise ValueError(f"{folder} has another image shape or number of timesteps: give it a call of its own")
        nets[f"{name}-calibrated" if calibrated and (folder / calibrate.FILE).is_file() else name] = net
    return nets


def open_text(flags: Flags, device: torch.device) -> tuple[list[str], TextEncoder]:
    """The prompts of networks that read text, and what encodes them. ValueError if something is missing."""
    if flags.prompts is None:
        raise ValueError("these networks read text: give --prompts FILE, with a prompt a line")
    if flags.teacher is None:
        raise ValueError("these networks need --teacher, the pipeline whose text encoders and VAE they take")
    try:
        lines = Path(flags.prompts).read_text("utf-8-sig").splitlines()  # Windows begins a text with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {flags.prompts} is no text in UTF-8: save it so") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flags.prompts} holds no prompt")
    return prompts, TextEncoder(flags.teacher, device, t5=not flags.no_t5)


def check_runs(folders: Sequence[Path], out: str) -> None:
    """ValueError where `out` lies among the images that a run has seen; a word on runs that are not finished."""
    for run, config in runs_of(folders).items():
        pictures.check_apart("--out", out, config.get("data"))
        if not (run / "metrics.json").exists() and machine.rank_and_world()[0] == 0:
            machine.note(f"{run} is not finished: its students are previews, of an earlier step")


def check_text(folders: Sequence[Path], text: TextEncoder) -> None:
    """ValueError where networks have learned from the embeddings of other encoders, as their data says."""
    for run, config in runs_of(folders).items():
        record = Path(config.get("data") or "", data.RECORD)
        theirs = disk.read_json(record, "bring it back").get("text_encoders") if record.is_file() else None
        if theirs and theirs != text.record["text_encoders"]:
            change = "give" if "text_encoder_3" in text.record["text_encoders"] else "leave out"
            raise ValueError(f"{run} has learned from the embeddings of {', '.join(theirs)}: {change} --no-t5")


def open_vae(where: str | None, shape: Sequence[int], device: torch.device) -> tuple[Vae | None, tuple[int, int, int]]:
    """The VAE of networks for samples of this shape, None for pixels; and the shape (C, H, W) of the images."""
    if where is None and shape[0] in (1, 3):
        return None, tuple(shape)
    if where is None:
        raise ValueError(f"these networks make latents of {shape[0]} channels: name the VAE with --vae")
    vae = Vae(where, device)
    if shape[0] != vae.channels:
        raise ValueError(f"--vae {where} has {vae.channels} channels, the networks have {shape[0]}")
    return vae, (3, shape[1] * vae.factor, shape[2] * vae.factor)


def prepare(runs: Sequence[Path], flags: Flags) -> Job:
    """Loads the networks of these folders and what sampling them takes; ValueError, OSError, ImportError if not."""
    device, asked, flags = machine.find_device(flags.device), flags.process, sampler_of(runs, flags)
    check_runs(runs, flags.out)
    nets = open_networks(runs, not flags.no_calibration)
    first, given, text = next(iter(nets.values())), [], None
    if any("text" in net.conditions for net in nets.values()):
        given, text = open_text(flags, device)
        check_text(runs, text)
        flags = replace(flags, vae=flags.vae or flags.teacher)
        check_names(nets)
        nets = {"teacher": teachers.load(flags.teacher), **nets}
        null = {key: value[0] for key, value in text.encode([""]).items()}
        for net in nets.values():
            net.fit(first.shape, null, 0.0)
    elif flags.prompts is not None:
        raise ValueError("--prompts is for networks that read text, and these do not")
    for name, net in nets.items():
        check_guidance(name, net, flags.guidance)
        if asked is not None:
            check_name(name, net, asked)
    count = flags.num or len(given) or 16
    prompts = [given[i % len(given)] for i in range(count)] if given else []
    vae, shape = open_vae(flags.vae, first.shape, device)
    check_clip(flags.clip_x0, latents=vae is not None)
    how = {"spacing": flags.spacing, "clip_x0": flags.clip_x0, "sampler": flags.sampler}
    processes = {name: process_of(net, flags.process, **how) for name, net in nets.items()}
    steps = flags.sample_steps or min(100, *(process.steps for process in processes.values()))
    for name, process in processes.items():  # these refuse what the process does not have
        check_sampler(process, steps, flags.eta)
        if flags.clip_x0 and not process.clip_x0:
            raise ValueError(f"--clip-x0 is of DDPM, and {name} is sampled by {process.sampler} steps: leave it out")

    def told(rows: list[int]) -> dict[str, Tensor]:
        return text.encode([prompts[i] for i in rows])

    fast = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    bf16 = (flags.precision or fast) == "bf16"
    options = {"seed": flags.seed, "steps": steps, "eta": flags.eta, "guidance": flags.guidance, "bf16": bf16}
    record = {**options, **how, "process": flags.process, **(vae.record if vae else {})}
    if text is not None:
        record |= {"prompts": given[:count], **text.record}
    options |= {"vae": vae, "batch": flags.batch, "device": device, "progress": machine.rank_and_world()[0] == 0}
    arguments = {}
    for name, net in nets.items():
        cond = classes_in_turn(net, count) if text is None else told
        arguments[name] = options | {"net": net, "process": processes[name], "cond": cond, "label": f"sampling {name}"}
        if flags.compile:
            net.compile()
    return Job(nets, arguments, record, count, shape, prompts)


def draw(job: Job, out: Path) -> None:
    """Writes all images of a job into `out`, and a picture of some."""
    from PIL import Image

    shown: dict[str, list[Tensor]] = {}
    for name, net in job.nets.items():
        shown[name] = []
        for rows, x in sample_batches(rows=range(job.count), **job.arguments[name]):
            for i, image in zip(rows, visible(x), strict=True):
                Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(out / name / f"{i:05d}.png")
            shown[name].append(x[: max(0, 32 - rows[0])].cpu())  # what a picture shows
        net.cpu()
    columns = 8 if job.prompts else report.columns(next(iter(job.nets.values())).num_classes, job.count)
    report.grid(out / "samples.png", {name: torch.cat(parts) for name, parts in shown.items()}, columns)
    print(f"{job.count} images each: {', '.join(str(out / name) for name in shown)}; some of them: {out}/samples.png")
    older = [file for name in shown for file in (out / name).glob("*.png")
             if file.stem.isdecimal() and int(file.stem) >= job.count]  # fmt: skip
    if older:
        print(f"older images are there too, {len(older)} with numbers from {job.count:05d} on: remove or ignore them")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("distil.sample", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or of a saved network")
    parser.add_options(Flags)
    flags, given = parser.read(argv, Flags, "runs")
    with machine.refusing("distil.sample"):
        job, out = prepare(given["runs"], flags), Path(flags.out)
        for name in job.nets:
            (out / name).mkdir(parents=True, exist_ok=True)
    with machine.refusing("distil.sample", (OSError,)):
        draw(job, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
