"""What is wrong with a student, and what to do about it.

    python -m distil.doctor RUN                                         every student of a run; or the folder of one
    python -m distil.doctor FOLDER --teacher TEACHER --images DIR       folders of saved networks, diffusers' too

Prints how many of its norms have one channel a group; at several timesteps, how much of its distance to the teacher a
line for each image and channel explains; what the sampler makes of the first error; what each remedy gains on a few
samples; and one line of advice. Writes nothing but `runs/cache`.
"""

import copy
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from distil import calibrate, checks, data, machine, metrics, networks, prepare, report, sample, shards, teachers
from distil.calibrate import Calibrated, Calibration
from distil.command import Parser
from distil.earlier import open_checkpoint
from distil.fast_loss import lift
from distil.process import Process, check_guidance, process_of, split
from distil.settings import Settings, restored
from models import Network, fingerprint, lonely_norms

# ---- Students beside their teacher -----------------------------------------------------------------------------------


class Way(NamedTuple):
    """One row of a comparison."""

    name: str
    net: Network
    about: dict[str, Any]  # method and seed, as `report.table` takes them
    process: Process | None = None  # None: the students' own


class Case(NamedTuple):
    """Students, their teacher, and what they are compared on."""

    students: dict[str, Network]
    folders: dict[str, Path]  # theirs
    teacher: Network
    own: Process  # of the teacher
    process: Process  # of the students, whose `phi` gives times of the teacher
    clamped: Process  # the same, with an image clamped at every step; where there is no such, without
    x0: Tensor  # (N, C, H, W), images to fit on
    held_out: bool  # whether nothing was trained on these
    cond: dict[str, Tensor]  # what networks are told of these, (N, ...) each
    real: data.Images  # to compare samples with
    classifier: metrics.DigitClassifier | None  # the ruler of digits; of other images there is none
    count: int  # samples of each network
    sampler: dict[str, Any]  # arguments of `sample.sample`
    again: str  # flags that any command for these students needs

    @property
    def times(self) -> list[float]:
        return self.sampler["process"].timesteps(self.sampler["steps"])

    def fit(self, times: Sequence[float] | None = None) -> dict[str, Calibration]:
        """The calibration of each student, at the sampler's times or at these."""
        progress = partial(tqdm, desc="fitting", unit="timestep", leave=False)
        given = list(self.students.values()), self.teacher, self.process, self.x0, times or self.times, self.cond
        found = calibrate.fit_calibrations(*given, batch=self.sampler["batch"] or 256, progress=progress)
        return dict(zip(self.students, found, strict=True))

    def compare(self, ways: Iterable[Way]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Rows for `report.table` and samples (n, C, H, W), of the teacher and each way, all from the same noise."""
        vae = self.sampler["vae"]
        real = shards.some(self.real.images) if vae is None else sample.decoded(vae, self.real, self.count)
        labels = sample.classes_in_turn(self.teacher, self.count).get("y")
        rows, samples, ruler = [], {}, metrics.Ruler(real, self.classifier)
        for name, net, about, process in [Way("teacher", self.teacher, {"method": "teacher"}, self.own), *ways]:
            changes = {"net": net, "process": process or self.sampler["process"], "label": f"sampling {name}"}
            samples[name] = sample.sample(n=self.count, **{**self.sampler, **changes})
            scores = ruler.score(samples[name], samples["teacher"], labels)
            rows.append({**about, "parameters": metrics.parameters(net), **scores})
        return rows, samples


def open_case(run: Path, flags: sample.Flags, images: str | None = None, n: int = 300) -> Case:
    """The students of a run, or the network in a folder, with the teacher and the images of the run that it belongs to
    or those that are given. n images to fit on: held out ones where there are such, else some of the others.

    images: a name of `data.DATASETS`, or a folder. ValueError, OSError: what is missing, or does not fit.
    """
    told = sample.sampler_of([run], flags)
    job = sample.prepare([run], replace(told, process=flags.process, teacher=flags.teacher, no_calibration=True))
    folders, settings, device = sample.find_networks([run]), run_settings(run), machine.find_device(flags.device)
    if settings is None and None in (flags.teacher, images):
        raise ValueError(f"{run} belongs to no run: give --teacher, a network, and --images, a folder or digits")
    sample.check_names(folder.name for folder in folders.values())
    students = {folder.name: job.nets[name].to(device).eval() for name, folder in folders.items()}
    first, sampler = next(iter(students.values())), job.arguments[next(iter(folders))]
    if images is None:
        dataset, (real, held_out) = settings.dataset, prepare.open_data(settings, first.shape[0])
    else:
        dataset, where = (images, None) if images in data.DATASETS else ("folder", images)
        read = partial(data.load, dataset, where, first.shape[1], channels=first.shape[0])
        real, held_out = read(), read("test") if where is None else None
    if "text" in first.conditions:  # it has been loaded, with its text encoders
        teacher = job.nets["teacher"]
    elif flags.teacher:
        teacher = teachers.load(flags.teacher)
    else:
        given = prepare.open_network("teacher", settings)
        teacher = prepare.open_teacher(settings, real, given, its_own=images is None)
    if teacher is None:
        raise ValueError(f"the teacher of {run} is not kept here: name it with --teacher")
    if flags.teacher is None:
        check_taught(sample.run_of(run), teacher)
    for name, net in {"the teacher": teacher, **students}.items():
        networks.check_conditions(name, net.conditions, images or settings.data, real, net.num_classes)
        checks.check_classes(name, net, teacher)
    for net in (*students.values(), teacher):
        net.fit(real.shape, real.no_condition)
    check_guidance("the teacher", teacher, told.guidance)
    own = process_of(teacher.to(device).eval(), told.process, told.spacing, told.clip_x0, sampler=told.sampler)
    clamped = process_of(first, told.process, told.spacing, clip_x0=True)
    process = folded(own, teacher, clamped, first)
    source = held_out or real
    rows = shards.spaced(len(source.images), n)
    pixels, known = torch.from_numpy(source.images[rows]), source.conditions(rows)
    x0 = data.to_float(pixels) if pixels.dtype == torch.uint8 else pixels[:, 0]  # of latents, those not mirrored
    cond = {key: known[key].to(device) for key in teacher.conditions}
    folders = {folder.name: folder for folder in folders.values()}
    classifier = metrics.digit_classifier(real.shape[2]) if dataset == "digits" else None
    others = (("--teacher", flags.teacher), ("--images", images))
    again = "".join(f" {name} {shlex.quote(value)}" for name, value in others if value)
    return Case(students, folders, teacher, own, process, clamped, x0.to(device), held_out is not None, cond, real,
                classifier, job.count, sampler, again)  # fmt: skip


def check_taught(run: Path, teacher: Network) -> None:
    """ValueError where the checkpoint of the run says that its students learned from a teacher with other weights."""
    if (path := run / "checkpoint.pt").exists():
        taught = {state.get("teacher") for state in open_checkpoint(path)["students"].values()}
        if taught - {None, fingerprint(teacher.state_dict().values())}:
            raise ValueError(f"the students of {run} learned from a teacher with other weights: name it with --teacher")


def folded(own: Process, teacher: Network, its: Process, student: Network) -> Process:
    """The process of a student as a fold of `own`, that of its teacher, which may be a fold as well; `its`: as the
    student alone knows it. ValueError if it is none."""
    pairs = (teacher, own), (student, its)
    theirs, fold = (list(net.process.get("fold", range(process.steps))) for net, process in pairs)
    if set(fold) <= set(theirs):
        process = own if fold == theirs else own.fold([theirs.index(t) for t in fold])
        if checks.agree(its, process):
            return process
    remedy = "name the teacher that they were made from with --teacher"
    raise ValueError(f"the students have timesteps or a process that this teacher has not: {remedy}")


def run_settings(folder: Path) -> Settings | None:
    """The settings of that run."""
    return next((restored(config) for config in sample.runs_of([folder]).values()), None)


# ---- What is wrong ---------------------------------------------------------------------------------------------------


def first_gain(process: Process, t: float) -> float:
    """By how much the error of the first output is larger in the image that is predicted from it alone, unclamped."""
    x, process = torch.zeros(1, 1, 1, 1), copy.copy(process)
    process.clip_x0 = False
    said, other = (process.step(x, output, t, process.clean) for output in (x, x + 1e-3))
    return (other - said).abs().item() * 1e3


@torch.no_grad()
def lines(
    student: Network, teacher: Network, process: Process, x0: Tensor, times: Iterable[float],
    cond: dict[str, Tensor] | None = None,
) -> list[list[float]]:  # fmt: skip
    """A row for each of these timesteps: t, the mean squared distance of the outputs, what is left of it after one line
    for each image and channel, and the means of |b0| and |b1 - 1|. One noise for all; process: of the student."""
    noise, rows = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0), []
    for t in times:
        now = torch.full(x0.shape[:1], t, device=x0.device)
        x_t = process.add_noise(x0, noise, now)
        e_s = split(student(x_t, now, cond), x0.shape[1])[0].float()
        e_t = split(teacher(x_t, process.phi(now), cond), x0.shape[1])[0].float()
        line, total = lift(e_s, e_t), (e_t - e_s).square().mean()
        sizes = total, line.fine, line.b0.abs().mean(), (line.b1 - 1).abs().mean()
        rows.append([t, *(value.item() for value in sizes)])
    return rows


# ---- What helps ------------------------------------------------------------------------------------------------------

REMEDIES = {  # what a student is sampled with, and how a user gets that
    "as it is": "nothing",
    "clamped": "sample it with --clip-x0",
    "calibrated": "python -m distil.calibrate {student}",
    "calibrated, clamped": "python -m distil.calibrate {student}, then sample it with --clip-x0",
}


def remedies(name: str, calibration: Calibration, case: Case) -> list[Way]:
    """The student with each of `REMEDIES`; without clamping where its process, or what its samples are, has none."""
    net, process = case.students[name], case.sampler["process"]
    ways = [("as it is", net, None), ("calibrated", Calibrated(net, calibration), None)]
    if case.sampler["vae"] is None and process.can_clip and not process.clip_x0:
        ways += [("clamped", net, case.clamped), ("calibrated, clamped", ways[1][1], case.clamped)]
    return [Way(f"{name}, {remedy}", one, {"method": remedy}, how) for remedy, one, how in ways]


def advice(student: str, distances: dict[str, float], lonely: int, headed: bool = True) -> str:
    """One line: the remedy after which samples are nearest to the teacher's, if it is worth the trouble. student: how a
    command names it. headed: whether it may have a head."""
    best, before = min(distances, key=distances.get), distances["as it is"]
    if before <= 1.25 * distances[best]:
        return "advice: nothing; no remedy here brings it much nearer to its teacher"
    gain = f"its samples' distance to the teacher's falls from {before:.3g} to {distances[best]:.3g}"
    cause = ""
    if lonely:
        cause = "; the cause are norms: train on with train.py --student ... --norm-groups scale"
        cause += ", or --head statistics" if headed else ""
    return f"advice: {REMEDIES[best].format(student=student)}: {gain}{cause}"


def opened(program: str, about: str, argv: list[str] | None, num: int) -> tuple[Case, sample.Flags]:
    """The case that the command line of a `program` that is `about` students describes, num samples unless it says
    otherwise; exit code 2 if there is none."""
    parser = Parser(program, about)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of a saved network")
    parser.add_argument("--images", help="to fit on and to compare with: a folder, or digits [the run's]")
    parser.add_options(sample.Flags)
    flags, given = parser.read(argv, sample.Flags, "run", "images")
    flags = replace(flags, num=flags.num or (None if flags.prompts else num))
    with machine.refusing(program):
        case = open_case(given["run"], flags, given["images"])
        if (few := min(case.count, len(case.real.images))) < 2:
            what = "--num or more --prompts" if few == case.count else "more --images"
            raise ValueError(f"samples and images are compared, at least 2 of each, and there is {few}: give {what}")
        return case, flags


def main(argv: list[str] | None = None) -> int:
    case, _ = opened("distil.doctor", __doc__, argv, num=64)
    with machine.refusing("distil.doctor"):
        times, calibrations = case.times, case.fit()
    gain = first_gain(case.sampler["process"], times[0])
    ways = {name: remedies(name, calibration, case) for name, calibration in calibrations.items()}
    (teacher, *rows), _ = case.compare(way for of_one in ways.values() for way in of_one)
    x0, cond = case.x0[:64], {key: value[:64] for key, value in case.cond.items()}
    few = times[:: max(1, len(times) // 6)]
    for name, net in case.students.items():
        its, rows = rows[: len(ways[name])], rows[len(ways[name]) :]
        lonely, norms = lonely_norms(net), len(net.norms())
        found = []
        for t, total, fine, *line in lines(net, case.teacher, case.process, x0, few, cond):
            share = (total - fine) / total if total else 0.0
            found.append([f"{t:.0f}", *(f"{value:.3f}" for value in (total, share, *line))])
        print(f"\n{name}: {lonely} of {norms} norms have one channel a group, which erases its mean and scale")
        print(f"an error of the first output is {gain:.3g} times as large in the image made of it, before clamping\n")
        print(report.aligned([["t", "distance of outputs", "share of a line", "mean |b0|", "mean |b1 - 1|"], *found]))
        print(f"\n{report.table([teacher, *its])}\n")
        distances, where = {row["method"]: row["teacher_mse"] for row in its}, shlex.quote(str(case.folders[name]))
        print(advice(f"{where}{case.again}", distances, lonely, net.can_head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
