"""What came out: the evaluation at the end of a run, tables over runs, FID of saved networks.

    python -m distil.evaluate RUN [RUN ...]    one table over finished runs: mean ± std over all students of a method
    python -m distil.evaluate RUN --num 50000 --dataset celeba      FID, KID, precision, recall of its students; the
                                               same command resumes; RUN may also be the folder of a saved network
    python -m distil.evaluate RUN --protocol imagenet --reference FILE.npz      the same as in the paper's Table 3, with
                                               the Inception Score
    python -m distil.evaluate RUN --prompts FILE --num 30000 --dataset folder --data coco --clip MODEL      the same of
                                               networks that read text, with their CLIP score
    torchrun --nproc-per-node 8 -m distil.evaluate -- RUN ...       shares the sampling

Inception is used only with `--num`; below 10,000 samples its distance is called FID@n.
`python -m distil.sample` draws images and measures nothing.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distil import data, disk, inception, machine, metrics, pictures, report, sample, shards
from distil.command import Parser, flag, option
from distil.process import Process, process_of
from distil.settings import FREE, Settings, plain
from distil.text_to_image import ClipScore, Vae
from models import Network

SAME = FREE | {"kd", "seeds"}  # settings in which runs may differ whose students of one method are averaged

# ---- The end of a run ------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How one row of the table was sampled."""

    net: Network
    process: Process
    steps: int | list[float]  # how many, or their timesteps


def measure(
    settings: Settings, images: data.Images, held_out: data.Images | None, teacher: Network, vae: Vae | None,
    students: Sequence[Any], process: Process, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Samples the teacher and every student from the same noise and scores them: what metrics.json holds.

    Writes curves.png, samples.png and, where the teacher was sampled in several ways, interpolations.png into
    `settings.out`; with `settings.eval_samples` 0 it is a `preview`. images: the train split. process: of the students,
    each with name, method, seed, the seconds of its training, and `ema`, the network to sample.
    """
    folder, n = Path(settings.out), settings.eval_samples
    found: dict[str, Any] = {"settings": plain(settings), "machine": machine.describe(), "protocol": "not evaluated"}
    found |= {"teacher": sizes(teacher), "students": []}
    for student in students:
        about = {"method": student.method, "seed": student.seed, "seconds": round(student.seconds, 1)}
        found["students"].append(about | sizes(student.ema))
    if n == 0:
        shown = [] if settings.preview_every == 0 else [(student.method, student.ema) for student in students]
        preview(settings, images, vae, shown, process, device)
        return found
    report.curves(folder / "curves.png", folder / "log.jsonl")

    real = shards.some(images.images) if vae is None else sample.decoded(vae, images, n)  # (N, C, H, W) uint8
    classifier = metrics.digit_classifier(settings.image_size) if settings.dataset == "digits" else None
    ruler = metrics.Ruler(real, classifier)
    told = conditions(teacher, images, n)
    options = {"seed": settings.seed, "eta": settings.eta, "guidance": settings.guidance, "device": device}
    # a teacher that was settled in half precision is rounded for good: students are drawn as it is
    options |= {"cond": told, "vae": vae, "bf16": next(teacher.parameters()).dtype == torch.bfloat16}

    def draw(name: str, way: Way) -> Tensor:
        return sample.sample(way.net, way.process, n, steps=way.steps, label=f"sampling {name}", **options)

    def score(x: Tensor) -> dict[str, Any]:
        return ruler.score(x, samples["teacher"], told.get("y"))

    ways = teacher_ways(settings, teacher, process)
    samples = {name: draw(name, way) for name, way in ways.items()}  # (n, C, H, W) each
    found["teacher"] |= score(samples["teacher"])
    others = [{"method": name, **sizes(teacher), **score(samples[name])} for name in ways if name != "teacher"]
    found |= {"same_steps": others} if others else {}
    if held_out is not None:
        labels = torch.from_numpy(held_out.labels) if "y" in told else None
        found["floor"] = ruler.score(data.to_float(held_out.images), labels=labels)
    notes = dict.fromkeys(ways, f"{found['teacher']['parameters']:,} parameters")
    for student, row in zip(students, found["students"], strict=True):
        way = Way(student.ema, process, settings.sample_steps)
        x = draw(student.name, way)
        row.update(score(x))
        samples.setdefault(student.method, x[:32].clone())  # pictures show the first seed of each method
        ways.setdefault(student.method, way)
        notes.setdefault(student.method, f"{row['parameters']:,} parameters\n{settings.steps:,} steps")
    report.grid(folder / "samples.png", samples, report.columns(teacher.num_classes, n), notes=notes)
    sampler = process.sampler
    if others:
        report.grid(folder / "interpolations.png", interpolations(settings, images, ways))
        sampler = f"teacher {sampler}, {ways['teacher'].steps} steps; others {sampler}"
    n_floor = 0 if held_out is None else len(held_out.images)
    found["protocol"] = report.protocol(settings, len(real), n_floor, sampler, tuple(told), classifier)
    return found


def interpolations(settings: Settings, images: data.Images, ways: dict[str, Way]) -> dict[str, Tensor]:
    """Of each way two rows of 16 images, (32, C, H, W): in a row noise turns from one start to another, and what the
    network is told stays."""
    net = ways["teacher"].net
    noise = sample.interpolate(net.shape, settings.seed)  # (32, C, H, W)
    told = {key: value.repeat_interleave(len(noise) // 2, 0).to(next(net.parameters()).device)
            for key, value in conditions(net, images, 2).items()}  # fmt: skip
    return {name: way.process.sample(way.net, noise.shape, way.steps, told, noise=noise) for name, way in ways.items()}


def preview(
    settings: Settings, images: data.Images, vae: Vae | None, nets: Sequence[tuple[str, Network]], process: Process,
    device: torch.device, n: int = 32,
) -> None:  # fmt: skip
    """Writes curves.png and, of n images of the first network of each method, from the same noise, samples.png.
    nets: (method, network) of the students of the run at `settings.out`. Latents are looked at if their VAE is known.
    Nothing is measured, and no random number of the training is drawn."""
    folder, samples = Path(settings.out), {}
    report.curves(folder / "curves.png", folder / "log.jsonl")
    if not nets or (images.record is not None and vae is None):
        return
    first = nets[0][1]
    options = {"seed": settings.seed, "steps": min(settings.sample_steps, process.steps), "eta": settings.eta}
    options |= {"guidance": settings.guidance, "cond": conditions(first, images, n), "vae": vae, "device": device}
    for method, net in nets:
        if method not in samples:
            samples[method] = sample.sample(net, process, n, label=f"preview of {method}", **options)
    report.grid(folder / "samples.png", samples, report.columns(first.num_classes, n))


def conditions(net: Network, images: data.Images, n: int) -> dict[str, Tensor]:
    """What n samples of a network are told: classes in turn, or the captions of the images that `decoded` shows."""
    told = sample.classes_in_turn(net, n)
    if net.conditions and not told:
        told = images.conditions(np.linspace(0, len(images.images) - 1, n).round().astype(int))
    return told


def sizes(net: Network) -> dict[str, int]:
    return {"parameters": metrics.parameters(net), "macs": metrics.macs(net)}


def teacher_ways(settings: Settings, teacher: Network, process: Process) -> dict[str, Way]:
    """How the teacher is sampled: in its usual number of steps; in as many as the students have (plain DDIM, what one
    would do instead); where these have other timesteps than the teacher, at those of the teacher that theirs stand for.
    """
    own, steps = process_of(teacher, settings.process, **settings.of_time), settings.sample_steps
    usual = min(settings.usual_steps, own.steps)
    ways = {"teacher": Way(teacher, own, usual)}
    if steps != usual:
        ways[f"teacher, {steps} steps"] = Way(teacher, own, steps)
    if process.steps != own.steps:
        theirs = process.phi(torch.tensor(process.timesteps(steps))).tolist()
        if theirs != own.timesteps(steps):
            ways[f"teacher, {steps} folded"] = Way(teacher, own, theirs)
    return ways


# ---- Tables over runs ------------------------------------------------------------------------------------------------


def join(runs: Sequence[Path]) -> str:
    """One table over finished runs, how its numbers came about, and a warning where they are not to be compared.
    A row is a method of a run; runs that differ in seeds or methods alone count as one, the others say what differs.
    ValueError for a folder that is not that of a finished run."""
    found, rows, runs = [], [], list({run.resolve(): run for run in runs}.values())
    for run in runs:
        path = run / "metrics.json"
        if run.is_file():
            raise ValueError(f"{run} is a file: name the folder of a finished run")
        try:
            metrics = disk.read_json(path, "it is not what train.py writes")
            rows.append(report.rows(metrics))
            found.append((metrics["protocol"], dict(metrics.get("settings", {}))))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: {error.strerror}; name the folder of a finished run") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what train.py writes: {type(error).__name__} {error}") from error
    labels, protocols = differences(runs, [settings for _, settings in found]), {}
    told: dict[str | None, set[str]] = {}  # runs that would count as one, but were scored otherwise, stand apart
    for label, (protocol, _) in zip(labels, found, strict=True):
        told.setdefault(label, set()).add(protocol)
    labels = [label if len(told[label]) == 1 else str(run) for run, label in zip(runs, labels, strict=True)]
    for label, (protocol, _), of_run in zip(labels, found, rows, strict=True):
        protocols.setdefault(protocol, {})[label] = None
        for row in of_run:
            row["run"] = label
    rows = report.shared([row for of_run in rows for row in of_run], len(set(labels)))
    students = Counter((row["method"], row["run"], row["parameters"], row["seed"]) for row in rows if "seed" in row)
    doubts = [f"{method} with seed {seed} counts {n} times" for (method, *_, seed), n in students.items() if n > 1]
    if len(protocols) > 1:
        doubts.insert(0, "not the same protocol for all rows, compare only those that share one")
        protocols = {f"{', '.join(map(str, of))}: {protocol}": of for protocol, of in protocols.items()}
    warning = [f"WARNING: {'; '.join(doubts)}"] if doubts else []
    return "\n".join([report.table(rows), "", *protocols, *warning])


def differences(runs: Sequence[Path], settings: Sequence[dict[str, Any]]) -> list[str | None]:
    """What sets each run apart from the others, the same for runs that count as one; None if all do. Settings that an
    earlier version did not have are not compared. Of runs that differ in more than three the folder is named."""
    known = [name for name in settings[0] if name not in SAME and all(name in of_run for of_run in settings)]
    differ = [name for name in known if any(of_run[name] != settings[0][name] for of_run in settings)]
    if not differ:
        return [None] * len(runs)
    labels = [", ".join(f"{name} {of_run[name]}" for name in differ) for of_run in settings]
    first = {label: str(run) for run, label in reversed(list(zip(runs, labels, strict=True)))}
    return labels if len(differ) <= 3 else [first[label] for label in labels]


# ---- FID and its relatives -------------------------------------------------------------------------------------------


# What --protocol stands for: how the paper's tables were scored (the counts are whole batches of the published code).
# IMAGES is what is done without one.
IMAGES = {"num": None, "dataset": None, "real": 50_000, "mode": "clean", "k": 5, "resize": None}
PROTOCOLS = {
    "celeba": {"num": 49_984, "dataset": "celeba", "real": 162_770, "mode": "legacy_pytorch"},
    "lsun_bedroom": {"num": 4_992, "dataset": "lsun_bedroom", "mode": "legacy_pytorch"},
    "coco": {"num": 30_000, "dataset": "folder", "mode": "legacy_pytorch", "resize": 256, "sample_steps": 25,
             "guidance": 7.5, "sampler": "pndm"},
    "imagenet": {"num": 50_000, "mode": "torch_fidelity", "k": 3, "sample_steps": 250, "eta": 1.0, "guidance": 1.5,
                 "spacing": "linspace"},
}  # fmt: skip


@dataclass(frozen=True)
class Flags(sample.Flags):
    num: int | None = option(None, "sample so many images of each network and compare their features", int, low=6)
    out: str = option("runs/evaluation", "folder for samples and scores", folder=True)
    protocol: str | None = option(None, "score as the paper's table does, in fp32", choices=tuple(PROTOCOLS))
    dataset: str | None = option(None, "the real images of --num", choices=tuple(data.DATASETS))
    data: str | None = option(None, "where their files are")
    reference: str | None = option(None, "or an .npz that stands for them: mu and sigma, or images as arr_0")
    real: int | None = option(None, "how many of them at most, evenly spaced; 50000", int, low=6)
    mode: str | None = option(None, "of Inception; clean. In the paper legacy_pytorch; torch_fidelity for "
                              "Table 3 and every Inception Score", choices=inception.MODES)  # fmt: skip
    k: int | None = option(None, "neighbours of precision and recall; 5", int, low=1, high=99)
    resize: int | None = option(None, "side to which images are brought first, in pixels", int, low=8)
    npz: bool = option(False, "also write the images as samples.npz, which ADM's evaluator reads", bool)
    clip: str | None = option(None, "CLIP model for the CLIP score of --prompts, as openai/clip-vit-large-patch14")


def compare(runs: Sequence[Path], flags: Flags, extract: metrics.Extract | None) -> None:
    """Samples the networks, on all processes; on rank 0 compares them with the real images and prints the table."""
    (rank, world), out = machine.rank_and_world(), Path(flags.out)
    with machine.refusing("distil.evaluate"):  # all that can be wrong, before hours of sampling
        if flags.num is None and flags.clip is None:
            raise ValueError("--prompts needs --num or --clip; python -m distil.sample draws images of prompts")
        if flags.num is not None and flags.dataset is None and flags.reference is None:
            known = ", ".join(data.DATASETS)
            raise ValueError(f"--num needs the real images: --dataset, one of {known}, or --reference FILE.npz")
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world:
            raise ValueError("processes of several machines cannot write into the same files: start them all on one")
        job, device = sample.prepare(runs, flags), machine.find_device(flags.device)
        if flags.clip is not None and not job.prompts:
            raise ValueError("--clip compares images with their prompts, and these networks read none: leave it out")
        clip = None if flags.clip is None else ClipScore(flags.clip, device, flags.resize)
        if rank == 0 and flags.num is not None:
            extract = extract or inception.Inception(flags.mode, device)
            real = open_reference(flags, job.shape, extract)
        about = (job.count, job.shape)
        rooms = {name: sample.open_samples(out / name, net, *about, **job.record) for name, net in job.nets.items()}
    for name, net in job.nets.items():
        sample.fill(*rooms[name], **job.arguments[name])
        net.cpu()
    if rank > 0:
        return
    if clip is not None:
        for name, (images, _) in rooms.items():
            print(f"CLIP score {clip(images, job.prompts):.4f}  {name}")
    if flags.num is not None:
        print(fid(flags, job, rooms, real, extract))


def open_reference(flags: Flags, shape: tuple[int, int, int], extract: metrics.Extract) -> metrics.Reference:
    """What images of this shape (C, H, W) are compared with."""
    if flags.reference is not None:
        found = metrics.read_reference(flags.reference, extract)
        theirs, ours = len(found.gaussian[0]), extract(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
        if theirs != ours:
            remedy = "give that which was made with these, or another --mode"
            raise ValueError(f"--reference {flags.reference} is of {theirs} features, and here are {ours}: {remedy}")
        return found
    real = data.load(flags.dataset, flags.data, image_size=flags.resize or shape[1], channels=shape[0])
    if real.record is not None:
        raise ValueError(f"--dataset {flags.dataset} holds latents: name the images behind them, or a --reference")
    if isinstance(real.images, shards.Shards):
        real.images.unread = set(range(len(real.images.files)))  # no other process reads them
    return metrics.reference(real, extract, count=flags.real)


def fid(flags: Flags, job: sample.Job, rooms: dict, real: metrics.Reference, extract: metrics.Extract) -> str:
    """The table of the networks' images against real ones; writes scores.json beside them. rooms: of `open_samples`."""
    how, small = job.record, flags.resize
    sampler = next(iter(job.arguments.values()))["process"].sampler
    protocol = (
        f"features {extract.__name__}, precision and recall k={flags.k} (of {metrics.NEIGHBOURS} images or more); "
        f"{real.about}, {job.count} generated, stored in 8 bits{f', resized to {small}x{small}' if small else ''}; "
        f"{sampler}, {how['steps']} steps ({how['spacing']}), eta {how['eta']:g}, guidance {how['guidance']:g}; "
        f"{'bf16' if how['bf16'] else 'float32'}; seed {how['seed']}"
    )
    device, rows = machine.find_device(flags.device), []
    search = device if device.type == "cuda" else "cpu"  # in float64, which mps lacks

    def seen(images: Tensor) -> Tensor:
        return extract(images if small is None else torch.from_numpy(pictures.squash(images.numpy(), small)))

    for name, net in job.nets.items():
        images, done = rooms[name]
        if flags.npz:
            with disk.whole(Path(flags.out) / name / "samples.npz") as part, part.open("wb") as file:
                np.savez(file, arr_0=images.transpose(0, 2, 3, 1))  # (N, H, W, C)
        fake = metrics.features(seen, images, batch=100, label=f"features of {name}")
        options = {"k": flags.k, "classes": getattr(extract, "classes", None), "device": search}
        row = {"name": name, "n": job.count, **metrics.feature_scores(real, fake, shuffle=bool(job.prompts), **options)}
        row |= {"non_finite": int((done == 2).sum()), **sizes(net)}
        if row["non_finite"]:  # stored as pixels they would count as images
            row |= {name: math.inf for name in ("frechet", "kid") if row[name] is not None}
        about = {"protocol": protocol, "machine": machine.describe()}
        disk.write_json(Path(flags.out) / name / "scores.json", row | about)
        rows.append(row)
    return f"{report.fid_table(rows, extract.__name__)}\n\n{protocol}"


def main(argv: list[str] | None = None, extract: metrics.Extract | None = None) -> int:
    """The command; `extract` stands for Inception."""
    parser = Parser("distil.evaluate", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or with --num of a network")
    parser.add_options(Flags)
    told, given = parser.read(argv, Flags, "runs")
    published = {"precision": "fp32", **PROTOCOLS[told.protocol]} if told.protocol else {}
    flags = replace(told, **{k: v for k, v in {**IMAGES, **published}.items() if getattr(told, k) is None})
    if flags.num is None and flags.prompts is None:
        with machine.refusing("distil.evaluate"):
            for item in fields(told):
                if getattr(told, item.name) != item.default:
                    otherwise = "without them the table of the finished run is printed"
                    raise ValueError(f"{flag(item.name)} is for --num or --prompts; {otherwise}")
            print(join(given["runs"]))
        return 0
    # they only wait, for each other and while rank 0 prepares real images; of what was checked disks and files may fail
    with machine.processes("cpu", hours=7 * 24), machine.refusing("distil.evaluate", (OSError,)):
        compare(given["runs"], flags, extract)
    return 0


if __name__ == "__main__":
    sys.exit(main())
