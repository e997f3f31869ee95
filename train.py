"""Distil a pruned diffusion student from its teacher, in one command.

    python train.py                                              # the digits demo: minutes on a CPU
    python train.py --kd none out lift place --seeds 0 1 2       # several methods and seeds, one teacher pass per batch
    python train.py --data FOLDER --image-size 32 --prune 0.7    # any folder of images
    python train.py --arch dit --prune 0.5 --kd none out place   # a class-conditional transformer that loses blocks

A run reads settings -> data -> teacher (given, cached, or trained first) -> students (pruned from the teacher) ->
distil -> evaluate, and lives in one folder: config.json, log.jsonl, checkpoint.pt, student/, samples.png, curves.png,
metrics.json. The same command resumes it. Everything random is a function of (seed, step), so a resumed run equals an
uninterrupted one, and but for dropout and learned blocks it does not matter over how many processes a batch is split.

Ctrl-C and SIGTERM finish a step of training, save, and exit with 130 and 143, so that a scheduler may queue the command
again; once more ends at once. Exit code 2: something cannot be used. 3: a student diverged and keeps its last finite
weights.
"""

from __future__ import annotations

import sys

from distil.settings import Settings, parse_command, plain

if __name__ == "__main__":
    GIVEN = parse_command(description=__doc__)  # answered before torch, which takes seconds

import contextlib
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from distil import data, disk, evaluate, fast_loss, machine, report
from distil.batches import Batch, batches
from distil.earlier import read_checkpoint
from distil.machine import Stop, hash_seed, mean_over_ranks, rank_0_first, rank_and_world, say
from distil.networks import Run, new_network, smaller, start_of, teacher_settings
from distil.prepare import SEEN, dry_run, open_teacher, outlook, prepare, sketch
from distil.process import Process, fold_of, make_process, process_of, split
from distil.students import FEATURES, PATIENCE, ShardedStudent, Student, autocast, find_dtype, predict, tap, timed
from lift_place import PRESETS, Distillation, adaptive, schedule
from models import Network, fingerprint

# ---- The objective ---------------------------------------------------------------------------------------------------

Output = tuple[Tensor, list[Tensor]]  # of a network: (B, C or 2 C, H, W), and its features, (B, ...) each
Distance = Callable[[Tensor, Tensor, Any, int], tuple[Tensor, Distillation | None]]  # (e_S, e_T, w, step) -> (), lines


class Method(NamedTuple):
    """A name of --kd, resolved: what is compared with what, how, and how much it counts."""

    name: str
    data: Callable[[Tensor, Tensor], Tensor]  # (prediction, target) -> the diffusion loss, ()
    output: Distance | None  # between the predictions of student and teacher
    features: Callable[[list[Tensor], list[Tensor], int], Tensor] | None  # between theirs; C H W of the output -> ()
    watch: Distance  # LIFT or PLACE: the lines that are logged
    lambda_diff: float
    lambda_out: float
    lambda_feat: Callable[[int], float]  # at a step
    taps: slice  # which of the features are compared
    adapt: bool  # FitNet: where channels were pruned, the student's features pass adapters
    learns_weight: bool  # w of LIFT and PLACE is a parameter


def resolve(settings: Settings, name: str) -> Method:
    """The method that --kd calls `name`, with the constants of these settings."""
    constants = {**PRESETS[settings.constants]}
    constants["norm"] = settings.norm or constants["norm"]
    compare = FEATURES[settings.constants]
    total = constants["reduction"] == "sum"  # over a sample; then the mean over the batch
    folded, (distance_name, _) = settings.fold_steps is not None, settings.terms(name)
    lambda_feat = settings.lambda_hidden if folded else settings.lambda_feat

    def part_of(n: int, at: int) -> int:  # which of n equal parts of the run this step is in
        return at * n // settings.steps

    def squared(a: Tensor, b: Tensor) -> Tensor:  # (B, ...) each -> ()
        return mse_loss(a.float(), b.float()) * (a[0].numel() if total else 1)

    def absolute(a: Tensor, b: Tensor, elements: int) -> Tensor:  # (B, ...) each -> (), as if of so many elements
        return l1_loss(a.float(), b.float()) * (elements if total else 1)

    def lift(student: Tensor, teacher: Tensor, w: Any, at: int) -> tuple[Tensor, Distillation]:
        lines = fast_loss.lift(student, teacher, per=settings.lift_per, weight=w, **constants)
        return lines.loss, lines

    def place(student: Tensor, teacher: Tensor, w: Any, at: int) -> tuple[Tensor, Distillation]:
        k = settings.group_size >> part_of(settings.halve_group_size + 1, at)  # halved after each
        lines = fast_loss.place(student, teacher, group_size=k, weight=w, **constants)
        return lines.loss, lines

    def features(student: list[Tensor], teacher: list[Tensor], elements: int) -> Tensor:
        if folded:  # SFDDM weighs the means of the output and of the last feature alike
            return absolute(student[-1], teacher[-1], elements)
        return compare(student, teacher)

    def feature_weight(at: int) -> float:  # constant, or falling to 0 over equal parts of the run (TinyFusion)
        if folded or settings.feat_stages < 2:
            return lambda_feat
        return lambda_feat * (1 - part_of(settings.feat_stages, at) / (settings.feat_stages - 1))

    by_lines = {"lift": lift, "place": place}
    distances: dict[str | None, Distance | None] = by_lines | {
        None: None,
        "squared": lambda student, teacher, *_: (squared(student, teacher), None),
        "absolute": lambda student, teacher, *_: (absolute(student, teacher, student[0].numel()), None),
    }
    return Method(
        name=name,
        data=squared,
        output=distances[distance_name],
        features=features if settings.compares_features(name) else None,
        watch=by_lines.get(distance_name, by_lines["place"]),
        lambda_diff=settings.lambda_diff,
        lambda_out=settings.lambda_out,
        lambda_feat=feature_weight,
        taps=slice(-1, None) if folded else slice(None),
        adapt=not folded,
        learns_weight=settings.schedule == "learned" and distance_name in by_lines,
    )


def objective(
    method: Method, process: Process, batch: Batch, student: Output, teacher: Output | None, w: Any, step: int
) -> tuple[Tensor, Distillation | None]:
    """L = lambda_diff L_diffusion + lambda_out L_KD + lambda_feat L_FeatKD (paper, Method).

    Of networks that predict their variance, the variational bound joins L_diffusion and the same bound to the teacher
    L_KD (TinyFusion); OutKD, LIFT and PLACE look at the prediction alone.

    Args:
        student, teacher: what they say at `batch.x_t`; None without a teacher.
        w: what `place` takes as its weight.

    Returns:
        the loss, (), and the lines of LIFT or PLACE where the method has them.
    """
    (output, features), lines = student, None
    loss = method.lambda_diff * diffusion_loss(method, process, batch, output)
    if method.output is not None:
        prediction, variance = split(output, batch.x_t.shape[1])
        teacher_prediction, _ = split(teacher[0], batch.x_t.shape[1])
        kd, lines = method.output(prediction, teacher_prediction, w, step)
        if variance is not None:
            kd = kd + process.bound(output, batch.x0, batch.x_t, batch.t, teacher[0])
        loss = loss + method.lambda_out * kd
    if method.features is not None:
        loss = loss + method.lambda_feat(step) * method.features(features, teacher[1], batch.x_t[0].numel())
    return loss, lines


def diffusion_loss(method: Method, process: Process, batch: Batch, output: Tensor) -> Tensor:
    """L_diffusion of an output (B, C or 2 C, H, W): its distance to what the process asks for, ()."""
    prediction, variance = split(output, batch.x_t.shape[1])
    loss = method.data(prediction, batch.target)
    return loss if variance is None else loss + process.bound(output, batch.x0, batch.x_t, batch.t)


# ---- A step ----------------------------------------------------------------------------------------------------------


def step(
    settings: Settings, students: list[Student], teacher: nn.Module | None, process: Process, batch: Batch, at: int,
    watched: bool = False,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """One step of every student: one teacher pass for all of them, loss, gradient, update.

    Args:
        teacher: a network, `Tapped` when a student needs features; None trains on the data alone.
        batch: this process's share; taken in `settings.accumulate` parts.
        at: the number of this step.
        watched: whether the numbers that are returned are to say how far each student is from the teacher.

    Returns:
        of each student the loss, the norm of the gradient, and, if watched, what `diagnose` says: () each.
    """
    half, n = autocast(settings, batch.x_t.device), len(batch.t)
    frozen = autocast(settings, batch.x_t.device, frozen=True)
    parts = batch.parts(settings.accumulate)  # by their first rows
    learners = [student for student in students if student.kd.output or student.kd.features]
    said: dict[int, Output] = {}  # by the teacher, to be used again

    def teach(first: int) -> Output | None:
        if first in said or teacher is None or not (learners or watched):
            return said.get(first)
        part = parts[first]
        with timed(*learners), torch.no_grad(), frozen:
            answer = predict(teacher, part.x_t, process.phi(part.t), part.cond)
        if not answer[1]:  # features would take the memory that parts save
            said[first] = answer
        return answer

    def ask(student: Student, first: int) -> Output:
        torch.manual_seed(hash_seed(student.seed, at, rank_and_world()[0], first))  # of the dropout
        with half:
            return predict(student.parallel, parts[first].x_t, parts[first].t, parts[first].cond)

    ws = weights(settings, students, parts, teach, ask, at)
    numbers: list[dict[str, Tensor]] = [{} for _ in students]
    for first, part in parts.items():
        theirs, share = teach(first), len(part.t) / n
        for student, found, w in zip(students, numbers, ws, strict=True):
            with timed(student), student.sync(last=first == max(parts)):
                own = ask(student, first)
                loss, lines = objective(student.kd, process, part, own, theirs, w, at)
                student.scaler.scale(loss * share).backward()
            values = {"loss": loss}
            if watched and theirs is not None:
                values |= diagnose(student.kd, part, own[0], theirs[0], lines, at)
            for name, value in values.items():  # means over the whole batch
                found[name] = found.get(name, 0) + value.detach() * share
    losses = mean_over_ranks(torch.stack([found["loss"] for found in numbers]))
    for student, found, loss in zip(students, numbers, losses, strict=True):
        with timed(student):
            found["grad_norm"] = update(settings, student, at, loss)
    return numbers


@torch.no_grad()
def weights(
    settings: Settings, students: list[Student], parts: dict[int, Batch], teach: Callable, ask: Callable, at: int
) -> list[Any]:
    """w of each student at a step, as `lift_place.place` takes it: that of the whole batch, however it is split.

    Where w follows from the outputs and a process takes its share in several parts, they are looked at once before.
    """
    if settings.schedule == "learned":
        return [student.learned_weight for student in students]
    w, n = schedule(settings.schedule, at, settings.steps), sum(len(part.t) for part in parts.values())
    weighed = [i for i, student in enumerate(students) if student.kd.output is student.kd.watch]  # LIFT, PLACE
    if w is not None or not weighed or (len(parts) == 1 and rank_and_world()[1] == 1):
        return [w] * len(students)
    if len(parts) == 1:
        return [lambda x: adaptive(mean_over_ranks(x))] * len(students)
    coarse = parts[0].x_t.new_zeros(len(students))
    for first, part in parts.items():
        teacher_prediction, _ = split(teach(first)[0], part.x_t.shape[1])
        for i in weighed:
            with timed(students[i]):
                prediction, _ = split(ask(students[i], first)[0], part.x_t.shape[1])
                lines = students[i].kd.output(prediction, teacher_prediction, lambda x: x, at)[1]
            coarse[i] += lines.weight * (len(part.t) / n)
    return list(adaptive(mean_over_ranks(coarse)))


def update(settings: Settings, student: Student, at: int, loss: Tensor) -> Tensor:
    """Clip, step unless the loss () or the gradient is not finite, average. Returns the norm before clipping, ()."""
    optimizer, scaler = student.optimizer, student.scaler
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * lr_factor(settings, at)
    scaler.unscale_(optimizer)
    norm = student.norm(student.net.parameters(), settings.clip or math.inf)  # its adapters are not clipped
    student.advance(loss, norm)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    rate = min(settings.ema, (1 + at) / (10 + at) if settings.ema_warmup else 1)  # short runs forget their start
    with torch.no_grad():
        torch._foreach_lerp_(list(student.ema.parameters()), list(student.net.parameters()), 1 - rate)
    return norm


def lr_factor(settings: Settings, at: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or cosine to `lr_end`."""
    warm, end = min(1.0, (at + 1) / (settings.warmup + 1)), settings.lr_end / settings.lr
    cosine = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * at / settings.steps))
    return warm * (cosine if settings.decay == "cosine" else 1.0)


@torch.no_grad()
def diagnose(
    method: Method, batch: Batch, output: Tensor, teacher_output: Tensor, lines: Distillation | None, at: int
) -> dict[str, Tensor]:
    """What a log line says of a student beside its loss: what its own LIFT or PLACE has found, else PLACE would."""
    (output, _), (teacher_output, _) = (split(x, batch.x_t.shape[1]) for x in (output, teacher_output))
    lines = lines or method.watch(output, teacher_output, None, at)[1]
    more = {"b0": lines.b0.mean(), "b1": lines.b1.mean(), "mse": mse_loss(output.float(), teacher_output.float())}
    return {"coarse": lines.coarse, "fine": lines.fine, "w": lines.weight, **more}


# ---- The loop --------------------------------------------------------------------------------------------------------


def train(
    settings: Settings, students: list[Student], teacher: nn.Module | None, images: data.Images, process: Process,
    start: int, look: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Train all students side by side, from step `start` on: one batch, one noise, one teacher pass for all of them.

    look: shows how far they are; called every `settings.preview_every` steps.

    SystemExit(130) or (143): Ctrl-C or a scheduler's SIGTERM ended it early, after saving a checkpoint.
    """
    folder, learning = Path(settings.out), [student for student in students if student.stopped is None]
    stream = batches(settings, images, process, students[0].ema, start)
    bar = machine.progress_bar(initial=start, total=settings.steps, desc=folder.name, unit="step",
                               disable=rank_and_world()[0] > 0)  # fmt: skip
    every = settings.save_every if settings.preview_every is None else settings.preview_every
    logging, began = disk.open_log(folder, start, settings.log, plain(settings)), math.inf
    with Stop() as stop, logging as log, contextlib.closing(stream), bar:
        for at in range(start, settings.steps) if learning else ():
            diverged = [student for student in learning if student.diverged()] if at % PATIENCE == 0 else []
            watched = at % settings.log_every == 0 or at + 1 == settings.steps or bool(diverged)
            numbers = step(settings, learning, teacher, process, next(stream), at, watched)
            if at + 1 == settings.steps:
                diverged = [student for student in learning if student.diverged()]
            for student, found in zip(learning, numbers, strict=True) if watched else ():
                values = mean_over_ranks(torch.stack([value.detach().float() for value in found.values()])).tolist()
                record = {"step": at, "student": student.name, "method": student.method, "seed": student.seed}
                record["lr"] = student.optimizer.param_groups[0]["lr"]
                record |= dict(zip(found, values, strict=True)) | {"skipped": at + 1 - student.updates}
                log(record)
                keys = ["loss", "coarse", "w", *(["skipped"] if record["skipped"] else [])]
                shown = [f"{key} {record[key]:.3g}" for key in keys if key in record]
                bar.set_postfix_str(f"{student.name}: {', '.join(shown)}", refresh=False)
                if student in diverged:
                    stop_learning(student, record)
            bar.update()
            if at - start == 2:  # the first ones warm up
                began = perf_counter()
            elif at - start == 22 or perf_counter() - began > 5:
                left, began = (perf_counter() - began) / (at - start - 2) * (settings.steps - at - 1), math.inf
                if left > 60:
                    say(f"{folder}: about {left / 60:,.0f} minutes for the other {settings.steps - at - 1:,} steps")
            learning = [student for student in learning if student.stopped is None]
            last = at + 1 == settings.steps or not learning
            number = 0 if last else stop.agreed(students[0].device)
            if number or last or (at + 1) % settings.save_every == 0:
                save_checkpoint(settings, students, folder, at + 1, images)
            if last:  # asked here, for a signal may come while that is written
                number = stop.agreed(students[0].device, last)
            if number:
                say(f"{folder}: stopped and saved; the same command goes on")
                raise SystemExit(128 + number)
            if last:
                break
            if every and (at + 1) % every == 0:  # the last one is evaluated
                look()


def stop_learning(student: Student, record: dict[str, Any]) -> None:
    """The student keeps its last finite weights from here on; `record`, a line of the log, says why."""
    student.stopped = record["step"]
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in record.items() if isinstance(value, float))
    why = f"{student.patience} steps in a row were not finite ({numbers}). It keeps its last finite weights"
    remedy = "a smaller --lr would help, or with --teacher of this one a longer --warmup, --clip 1, --precision fp32"
    machine.note(f"{student.name} stopped before step {student.stopped}: {why}; {remedy}")


def preview(settings: Settings, students: list[Student], run: Run, process: Process) -> None:
    """The averages of the students as they are now: student/, samples.png and curves.png."""
    nets = {student.name: student.average() for student in students}
    if rank_and_world()[0] == 0:
        save_students(settings, nets)
        shown = [(student.method, nets[student.name]) for student in students]
        evaluate.preview(settings, run.images, run.vae, shown, process, run.device)
        if settings.fsdp:  # whole ones would stay in the memory of this GPU
            for net in nets.values():
                net.cpu()


def save_students(settings: Settings, nets: dict[str, Network]) -> list[Path]:
    """Writes student/, or where there are several student/NAME. Returns the folders."""
    folder = Path(settings.out) / "student"
    folders = [folder / name for name in nets] if len(nets) > 1 else [folder]
    for where, net in zip(folders, nets.values(), strict=True):
        net.save(where)
    return folders


def save_checkpoint(settings: Settings, students: list[Student], folder: Path, steps: int, images: data.Images) -> None:
    """Write checkpoint.pt: plain tensors and numbers, and keep the one before as checkpoint.prev.pt.

    A kill at any moment leaves one of the two whole. OSError where the disk is full, or weights are not finite.
    """
    states = {student.name: student.state() for student in students}
    with rank_0_first():  # a launcher that sees a process end ends the others, and this one is to finish
        if rank_and_world()[0] > 0:
            return
        path, former = folder / "checkpoint.pt", folder / "checkpoint.prev.pt"
        tensors = [x for state in states.values() for x in [*state["module"].values(), *state["ema"].values()]]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise OSError(f"{path} was not written: weights are not finite at step {steps}; an earlier one stays")
        disk.need_room(folder, 2 * sum(tensor.nbytes for tensor in tensors), f"{path}, with two moments a weight,")
        with disk.whole(path) as part:
            with part.open("wb") as file:
                torch.save({"step": steps, "settings": plain(settings), "data": images.about, "students": states}, file)
            disk.seal(part)
            if path.exists():
                path.replace(former)


def restore(student: Student, checkpoint: dict[str, Any], path: Path) -> None:
    """The student as the checkpoint at `path` has it; Damaged where that is no state of such a student."""
    try:
        state = checkpoint["students"][student.name]
        student.restore(state)
        if not all(tensor.isfinite().all() for part in ("module", "ema") for tensor in state[part].values()):
            raise ValueError("weights are not finite")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        remedy = "put a good copy there, or remove it, and the run starts from step 0"
        raise disk.Damaged(f"{path} holds no state of {student.name} ({machine.sentence(error)}): {remedy}") from error


def resume(
    settings: Settings, students: list[Student], teacher: nn.Module | None, run: Run, process: Process,
    checkpoint: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Train from the checkpoint on, or from the start; SystemExit as of `train`."""
    folder, start = Path(settings.out), 0
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        start = checkpoint["step"]
        for student in students:
            restore(student, checkpoint, folder / "checkpoint.pt")
        checkpoint.clear()  # the students have it; nobody needs it twice in memory
        say(f"{folder}: resumed at step {start} of {settings.steps}")
    if rank_and_world()[0] == 0:
        for left in folder.glob(".checkpoint.pt.*.part"):  # of a machine that the run was on before
            left.unlink(missing_ok=True)
        disk.write_json(folder / "config.json", plain(settings))
    look = functools.partial(preview, settings, students, run, process)
    train(settings, students, teacher, run.images, process, start, look)


DIVERGED = 3  # exit code

# ---- The run ---------------------------------------------------------------------------------------------------------


def train_teacher(run: Run) -> Network:
    """The teacher of this data set, kept for later runs; of several runs that want it one trains it, the others wait.
    SystemExit: stopped early, with 3 because it diverged."""
    settings = teacher_settings(run.settings)
    folder, process = Path(settings.out), make_process(settings.process, **settings.of_time)
    with disk.lock(folder):
        with machine.refusing("train.py"):
            teacher = open_teacher(run.settings, run.images)  # another run may have trained it meanwhile
            checkpoint = read_checkpoint(settings, folder, run.images.about)
            machine.agreed("the teacher", (teacher is None, checkpoint and checkpoint["step"]))
        if teacher is not None:
            return teacher
        say(f"teacher: training one for {settings.steps} steps in {folder}")
        torch.manual_seed(settings.seed)
        net = machine.on_device(new_network(settings, run.images), run.device)
        net.process = {"name": settings.process}
        student = Student(settings, resolve(settings, "none"), settings.seed, net)
        resume(settings, [student], None, run, process, checkpoint)
        if student.stopped is not None:
            say(f"{folder}: the teacher diverged and is not kept; a smaller --teacher-lr trains another one")
            raise SystemExit(DIVERGED)
        if rank_and_world()[0] == 0:
            if (folder / "student").exists():
                shutil.rmtree(folder / "student")  # a preview, of a step that depends on when the run was killed
            disk.write_json(folder / SEEN, run.images.about)
            student.ema.save(folder / "teacher")
        return student.ema


def make_students(run: Run, teacher: Network, process: Process, time: dict) -> tuple[list[Student], nn.Module]:
    """One student per method and seed, those of one seed alike; and the teacher, `Tapped` if one needs its features.

    process: of the teacher. time: `Network.process` of the students.
    """
    settings, methods = run.settings, [resolve(run.settings, name) for name in run.settings.kd]
    plainly = resolve(settings, settings.kd[0])._replace(lambda_diff=1.0)
    nets = smaller(run, teacher, process, lambda output, batch: diffusion_loss(plainly, process, batch, output))
    teacher.requires_grad_(False).zero_grad(set_to_none=True)
    comparing = [method for method in methods if method.features is not None]
    tapped = tap(teacher, nets[0], comparing[0].taps) if comparing else teacher
    kind, students = ShardedStudent if settings.fsdp else Student, []
    taught = {"teacher": tapped, "taught_by": fingerprint(teacher.state_dict().values())}
    machine.agreed("the teacher's weights", taught["taught_by"])
    for seed, net in zip(settings.seeds, nets, strict=True):
        students += [kind(settings, method, seed, start_of(run, net, seed, time), **taught) for method in methods]
    return students, tapped


def distil(run: Run) -> dict[str, Any] | None:
    """The whole run: teacher, students, training, evaluation. Returns what metrics.json holds, on rank 0."""
    settings, folder = run.settings, Path(run.settings.out)
    if run.metrics is not None:
        say(f"{folder}: this run is finished, nothing to train; its results:")
        announce(run.metrics, folder)
        return run.metrics
    if run.teacher is None:
        with machine.refusing("train.py"):  # a teacher whose students cannot be made
            pair = sketch(settings, run.images, student=run.student)
        say(outlook(settings, run.images, *pair, trained=False))
    teacher = run.teacher or train_teacher(run)
    teacher.process = {"name": settings.process, **teacher.process}  # its students are saved with it
    process = process_of(teacher, **settings.of_time)
    teacher = machine.on_device(teacher, run.device).eval().requires_grad_(True)  # Taylor pruning needs its gradients
    own, time = process, teacher.process
    if settings.fold_steps is not None:
        process = own.fold(settings.fold_steps, settings.fold_end)  # of the students
        time = fold_of(teacher, process)
    with machine.refusing("train.py"):
        students, tapped = make_students(run, teacher, own, time)
    if run.teacher is not None:
        say(outlook(settings, run.images, teacher, students[0].ema))
    teacher.settle(find_dtype(settings, run.device, frozen=True))
    if settings.compile:
        tapped.compile()
    resume(settings, students, tapped, run, process, run.checkpoint)
    for student in students:
        student.ema = student.average()
    with rank_0_first():  # a launcher waits a few minutes only for machines whose processes have not ended
        if rank_and_world()[0] > 0:
            return None
        folders = save_students(settings, {student.name: student.ema for student in students})
        metrics = evaluate.measure(settings, run.images, run.held_out, teacher, run.vae, students, process, run.device)
        for student, row in zip(students, metrics["students"], strict=True):
            if student.stopped is not None:
                row["stopped"] = student.stopped
        for where in dict.fromkeys((folder, folder / "student", *folders)):
            report.card(where, metrics)
        disk.write_json(folder / "metrics.json", metrics)
        announce(metrics, folder)
        return metrics


def announce(metrics: dict[str, Any], folder: Path) -> None:
    """Prints the table of a finished run."""
    say(f"\n{report.table(report.rows(metrics))}\n\n{metrics['protocol']}\nsamples, curves and numbers: {folder}")
    for row in metrics["students"]:
        if "stopped" in row:
            say(f"{row['method']}-{row['seed']} diverged and stopped before step {row['stopped']}")


def main(settings: Settings, only_look: bool = False) -> int:
    """The run of these settings, or with `only_look` what it would be. Returns the exit code, 3 if a student diverged.
    SystemExit, after one sentence: (2) for what cannot be used, (3) if the teacher diverged, (130) after Ctrl-C and
    (143) after SIGTERM."""
    if only_look:
        with machine.refusing("train.py"):
            print(dry_run(settings))
        return 0
    with machine.processes(settings.device), contextlib.ExitStack() as held:
        with machine.refusing("train.py"):  # what a user gave
            held.enter_context(disk.lock(settings.out, "wait for it, or give another --out"))
            run = prepare(settings)
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
        with machine.refusing("train.py", (OSError,)):  # disks and files; what else comes later keeps its traceback
            metrics = distil(run) or {"students": []}
    return DIVERGED if any("stopped" in row for row in metrics["students"]) else 0


if __name__ == "__main__":
    sys.exit(main(*GIVEN))
