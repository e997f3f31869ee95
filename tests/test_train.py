"""The run: what it trains, that it resumes exactly, that it can be split over processes, and what it refuses."""

import contextlib
import copy
import errno
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, a_unet, free_ports
from PIL import Image
from safetensors.torch import load_file

import lift_place
import models
import train
from distil import checks, data, disk, doctor, metrics, report, sample, teachers
from distil import students as students_file
from distil.batches import Batch
from distil.fast_loss import place
from distil.networks import teacher_settings
from distil.presets import METHODS
from distil.process import DDPM, process_of
from distil.sample import start_noise
from distil.settings import Settings, parse, plain
from distil.students import Student, feature_loss, masked_feature_loss, mean_feature_loss

# a small teacher (16, 32 channels), few steps, 16 samples: every part of a run in about a second
TEACHER = ["--channels", "16", "--teacher-steps", "3"]
TINY = [*TEACHER, "--prune", "0.5", "--steps", "6",
        "--batch-size", "8", "--eval-samples", "0", "--sample-steps", "2", "--log-every", "2", "--save-every", "99",
        "--preview-every", "0", "--device", "cpu"]  # fmt: skip
SAVED = ["--save-every", "2"]  # where a checkpoint on the way is looked at
FOLD = ["--fold-steps", "5", "--sample-steps", "5"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One working directory for the file: the tiny teachers and the digit classifier are trained once."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(metrics, "digit_classifier", functools.partial(metrics.digit_classifier, steps=20))


@pytest.fixture
def _quick(monkeypatch):
    """Drawing curves.png and counting operations take longer than training."""
    monkeypatch.setattr(report, "curves", lambda *_: None)
    monkeypatch.setattr(metrics, "macs", lambda net: 0)


def run(*arguments: str) -> None:
    tiny = TINY[len(TEACHER) :] if "--teacher" in arguments else TINY  # one that is given has its own size
    assert train.main(parse([*tiny, *arguments])) == 0


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs") / folder / "model.safetensors")


def same(a: str, b: str, tolerance: float = 0.0) -> bool:
    """Whether the networks in two folders have the same weights."""
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all((one[name] - two[name]).abs().max() <= tolerance for name in one)


def log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/{folder}/log.jsonl").read_text().splitlines()]


def found(folder: str) -> dict:
    return json.loads(Path(f"runs/{folder}/metrics.json").read_text())


# ---- Other processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """start(commands, **options): `in_process` in a process that is forked from one that has loaded torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch_pruning", "sklearn.datasets"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context.Process(target=int).start()  # starts the server
    started = []

    def start(commands: list[list[str]], **options) -> multiprocessing.Process:
        started.append(context.Process(target=in_process, args=(os.getcwd(), commands), kwargs=options))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()


def in_process(
    folder: str, commands: list[list[str]], rank: int | None = None, ports=(), kill_at: int = -1,
    signal_at: int = -1,
) -> None:  # fmt: skip
    """These runs of train.py, as one of two processes if it has a rank; SIGKILL before the step `kill_at`, SIGTERM
    before the step `signal_at`."""
    os.chdir(folder)
    report.curves, metrics.macs, step = lambda *_: None, lambda net: 0, train.step

    def step_or_die(*given):
        with open(f"steps-{os.getpid()}", "a") as file:
            file.write("x")
        if given[5] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # no chance to tidy up
        if given[5] == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    train.step = step_or_die
    for i, arguments in enumerate(commands):
        if rank is not None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = ports[i]
        run(*arguments)


def as_two(processes, commands: list[list[str]], signal_at: int = -1) -> list[int]:
    """The exit codes of two processes that share these runs, of which the second one gets the signal."""
    ports = free_ports(len(commands))  # one for each run
    both = [processes(commands, rank=rank, ports=ports, signal_at=signal_at if rank else -1) for rank in (0, 1)]
    for process in both:
        process.join(120)
    return [process.exitcode for process in both]


@contextlib.contextmanager
def interrupted(at: int):
    """Inside the block Ctrl-C comes before the step `at`, and ends the run as it should."""
    step = train.step

    def interrupt(*given):
        if given[5] == at:
            signal.raise_signal(signal.SIGINT)
        return step(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, "step", interrupt)
        yield
    assert ended.value.code == 128 + signal.SIGINT


# ---- The whole run ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_the_readme_lists_and_repeating_it_trains_nothing(capsys, monkeypatch):
    arguments = ["--kd", "none", "place", "--seeds", "0", "1", "--out", "runs/all", "--eval-samples", "16"]
    run(*arguments)
    out, names = Path("runs/all"), ("place-1/README.md", "place-1/config.json", "none-0/model.safetensors")
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "samples.png", "curves.png", "metrics.json", "README.md",
                 *(f"student/{name}" for name in names)):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    rows = found("all")["students"]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in (0, 1) for m in ("none", "place")]
    scores = {"frechet_pixels", "frechet_digits", "precision", "recall", "teacher_mse", "saturated", "parameters"}
    assert all(scores <= row.keys() and row["seconds"] > 0 for row in rows)
    assert rows[0]["parameters"] < found("all")["teacher"]["parameters"]
    assert "| place (n=2)" in (first := capsys.readouterr().out) and "FID" not in first
    assert first.count("teacher: training one for 3 steps") == 1

    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    run(*arguments)
    assert "this run is finished, nothing to train" in (again := capsys.readouterr().out) and "| place (n=2)" in again
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}

    monkeypatch.setattr(report, "curves", lambda *_: None)  # seen by now, and slow
    records = log("all")
    run(*arguments, "--sample-steps", "3")  # only the evaluation differs: sampled again, not trained again
    assert "finished" not in (text := capsys.readouterr().out) and "teacher: training" not in text
    assert found("all")["settings"]["sample_steps"] == 3 and log("all") == records
    assert before[out / "checkpoint.pt"] == (out / "checkpoint.pt").stat().st_mtime_ns

    # the log explains every student, and the average is what is saved
    assert [r["step"] for r in records if r["student"] == "place-0"] == [0, 2, 4, 5]
    for record in records:
        assert {"loss", "coarse", "fine", "w", "b0", "b1", "mse", "grad_norm", "lr"} <= record.keys()
        assert record["w"] == pytest.approx(1 - min(1, record["coarse"]), abs=1e-6)
        assert record["lr"] == pytest.approx(5e-3 * train.lr_factor(parse([*TINY, *arguments]), record["step"]))
    states = torch.load(out / "checkpoint.pt", weights_only=True)["students"]
    saved = weights("all/student/place-0")
    assert all(torch.equal(saved[name], states["place-0"]["ema"][name]) for name in saved)
    assert not torch.equal(states["none-0"]["ema"]["conv_in.weight"], states["none-0"]["module"]["conv_in.weight"])

    # a student teaches and starts other runs
    run("--teacher", "runs/all/student/place-0", "--student", "runs/all/student/none-0", "--out", "runs/next")
    row = found("next")
    assert row["teacher"]["parameters"] == row["students"][0]["parameters"] == rows[0]["parameters"]
    assert not same("next/student", "all/student/none-0") and not Path("runs/next/samples.png").exists()

    # or goes on with wider norms and a head
    wider = ["--norm-groups", "scale", "--head", "statistics"]
    run("--student", "runs/all/student/none-0", *wider, "--steps", "1", "--eval-samples", "0", "--out", "runs/wide")
    wide, narrow = models.load("runs/wide/student"), models.load("runs/all/student/none-0")
    assert min(models.group_widths(narrow).values()) < min(models.group_widths(wide).values())
    assert wide.head is not None and narrow.head is None
    assert wide.head.mlp[2].bias.abs().max() > 0  # one step away from the identity


def test_a_folder_of_images_is_scored_on_pixels(tmp_path, capsys):
    for i, pixels in enumerate(torch.randint(0, 256, (24, 20, 16, 3), dtype=torch.uint8, generator=torch.Generator())):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    where = ["--data", str(tmp_path), "--image-size", "8", "--channels", "32", "--prune", "0.3", "--out", "runs/folder"]
    run(*where, "--eval-samples", "16", "--steps", "1", "--teacher-steps", "1")
    (row,) = found("folder")["students"]
    assert row["frechet_digits"] is None and row["frechet_pixels"] > 0
    assert "Frechet digits" not in capsys.readouterr().out


@pytest.mark.usefixtures("_quick")
def test_a_teacher_that_was_trained_here_is_not_taken_for_other_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(9):
        Image.new("L", (8, 8), 20 * i).save(f"photos/{i}.png")
    common = ["--image-size", "8", "--teacher-steps", "1", "--steps", "1", "--kd", "none"]
    run("--data", "photos", *common, "--out", "runs/one")
    assert train.main(parse([*TINY, "--data", "./photos/", *common, "--out", "runs/one"])) == 0  # is the same folder
    run("--data", "photos/", *common, "--accumulate", "2", "--out", "runs/two")
    (folder,) = Path("runs/teachers").glob("folder8-*")  # one teacher for all
    Image.new("L", (8, 8), 255).save("photos/0.png")
    with pytest.raises(SystemExit):
        run("--data", "photos", *common, "--out", "runs/three")
    said = capsys.readouterr().err
    assert f"{folder}/teacher was written (9 images then, 9 now, but not the same)" in said
    assert f"or remove {folder}, and a teacher of these is trained" in said and not Path("runs/three").exists()
    shutil.rmtree(folder)
    run("--data", "photos", *common, "--out", "runs/three")


@pytest.mark.usefixtures("_quick")
def test_a_run_does_not_go_on_under_another_teacher(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_unet().save("net")
    command = [*TINY[len(TEACHER) :], *SAVED, "--teacher", "net", "--kd", "none", "out", "--out", "runs/a"]
    with interrupted(at=3):
        train.main(parse(command))
    a_unet(1).save("net")
    with pytest.raises(SystemExit):
        train.main(parse(command))
    assert "it has learned from a teacher with other weights: bring that back" in capsys.readouterr().err
    a_unet().save("net")
    assert train.main(parse(command)) == 0
    assert doctor.open_case(Path("runs/a"), sample.Flags()).students
    a_unet(1).save("net")
    with pytest.raises(ValueError, match="runs/a learned from a teacher with other weights: name it with --teacher"):
        doctor.open_case(Path("runs/a"), sample.Flags())


@pytest.mark.usefixtures("_quick")
def test_a_run_goes_on_where_its_images_have_moved_and_in_less_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_unet(channels=3).save("net")
    Path("here").mkdir()
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 90, 9)).save(f"here/{i}.png")
    command = [*TINY[len(TEACHER) :], *SAVED, "--teacher", "net", "--kd", "out", "--out", "runs/a"]
    with interrupted(at=3):
        train.main(parse([*command, "--data", "here"]))
    shutil.copytree("here", "there")
    moved = [*command, "--data", "there", "--accumulate", "2"]
    assert train.main(parse(moved)) == 0 and "resumed at step" in capsys.readouterr().out
    assert train.main(parse(moved)) == 0 and "this run is finished" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save("there/0.png")
    with pytest.raises(SystemExit):
        train.main(parse(moved))
    assert "the data has changed since runs/a/checkpoint.pt was written" in capsys.readouterr().err


def test_celeba_at_full_size_from_a_ddim_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (8, 218, 178, 3), dtype=torch.uint8, generator=torch.Generator())
    Path("files/img_align_celeba").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(f"files/img_align_celeba/{i:06}.jpg")
    lines = [f"{i:06}.jpg {0 if i < 6 else 2}\n" for i in range(8)]
    Path("files/list_eval_partition.txt").write_text("".join(lines))
    ema = {f"module.{name}": tensor for name, tensor in models.UNet(64).state_dict().items()}
    torch.save([ema, {}, 0, 0, ema], "ema.ckpt")
    where = ["--dataset", "celeba", "--data", "files", "--teacher", "ema.ckpt", "--out", "runs/celeba"]
    few = ["--prune", "0.9", "--importance", "random", "--steps", "2", "--batch-size", "1", "--device", "cpu"]
    few += ["--preview-every", "0"]
    assert train.main(parse([*where, *few])) == 0
    rows = (found("celeba")["teacher"], *found("celeba")["students"])
    sizes = [(row["parameters"], round(row["macs"] / 1e9, 3)) for row in rows]
    assert sizes == [(78_700_803, 23.923), (1_312_076, 0.768)]
    assert log("celeba")[-1]["step"] == 1 and 0 < log("celeba")[-1]["mse"] < 10


@pytest.mark.usefixtures("_quick")
def test_a_flow_is_trained_by_the_same_command(monkeypatch):
    for library in ("diffusers", "transformers", "accelerate"):  # which nobody needs for this
        monkeypatch.setitem(sys.modules, library, None)
    run("--process", "flow", "--importance", "taylor", "--taylor-steps", "2", "--steps", "2", "--out", "runs/flow")
    teacher = Path(teacher_settings(parse([*TINY, "--process", "flow"])).out)
    assert json.loads((teacher / "config.json").read_text())["process"] == "flow" and log("flow")[-1]["step"] == 1
    assert models.load("runs/flow/student").process == models.load(teacher / "teacher").process == {"name": "flow"}


def test_students_of_a_fold_of_another_process_are_sampled_without_being_told(capsys):
    fold = ["--process", "sfddm", "--fold-steps", "128", "--sample-steps", "5", "--kd", "out", "--eval-samples", "0"]
    run(*fold, "--steps", "1", "--out", "runs/sfddm")
    net = teachers.load("runs/sfddm/student")
    assert process_of(net).steps == 128 and net.process["fold"][-1] == 1016
    assert sample.main(["runs/sfddm/student", "--num", "2", "--out", "runs/of-sfddm"]) == 0
    assert "--process sfddm" in refused(["--teacher", "runs/sfddm/student", "--out", "runs/other"], capsys)


@pytest.mark.usefixtures("_quick")
def test_a_student_does_not_depend_on_its_company_and_its_seed_draws_its_dropout():
    arguments = ["--prune", "0", "--lambda-feat", "0", "--dropout", "0.2", "--steps", "3"]
    run("--kd", "place", *arguments, "--out", "runs/alone")
    run("--kd", "none", "place", *arguments, "--seeds", "3", "0", "--out", "runs/together")
    assert same("alone/student", "together/student/place-0")
    assert not same("alone/student", "together/student/place-3")  # unpruned: nothing but the dropout differs


@pytest.mark.usefixtures("_quick")
def test_slow_steps_say_after_seconds_how_many_minutes_are_left_and_say_it_once(monkeypatch, capsys):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(train, "perf_counter", lambda: next(clock))
    run("--steps", "30", "--out", "runs/minutes")
    said = [line for line in capsys.readouterr().out.splitlines() if "minutes for the other" in line]
    assert said == [f"{Path('runs/minutes')}: about 9 minutes for the other 26 steps"]


@pytest.mark.usefixtures("_quick")
def test_half_precision_keeps_weights_and_losses_in_float32():
    for precision in ("bf16", "fp32"):
        run("--precision", precision, "--steps", "2", "--out", f"runs/{precision}")
    assert all(tensor.dtype == torch.float32 for tensor in weights("bf16/student").values())
    assert not same("bf16/student", "fp32/student")
    half, single = log("bf16")[0]["coarse"], log("fp32")[0]["coarse"]
    assert half == pytest.approx(single, rel=0.05) and half != single


def test_a_teacher_in_half_precision_leaves_the_arithmetic_of_students_and_nearly_what_it_says():
    generator = torch.Generator().manual_seed(0)  # where errors nearly tie rounding moves elements to other groups
    x, t, found = torch.randn(4, 1, 8, 8, generator=generator), DDPM().sample_t(4, generator), []
    for precision in ("fp32", "bf16"):
        settings = Settings(kd=("none", "out", "place"), lambda_feat=0.0, teacher_precision=precision)
        torch.manual_seed(0)
        teacher, net = (models.UNet(8, 1, **SMALL) for _ in range(2))
        kds = [train.resolve(settings, name) for name in settings.kd]
        students = [Student(settings, kd, 0, copy.deepcopy(net)) for kd in kds]
        numbers = train.step(settings, students, teacher, DDPM(), Batch(x, x, x, x, t, {}), 0, True)
        found.append([{name: value.item() for name, value in of_one.items()} for of_one in numbers])
        assert all(p.dtype == torch.float32 for student in students for p in student.model.parameters())
    single, half = found
    assert half[0]["loss"] == single[0]["loss"] and half[0]["grad_norm"] == single[0]["grad_norm"]  # it hears nothing
    for one, other in zip(half[1:], single[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.01) and one["loss"] != other["loss"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


# ---- The objective ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs():
    """Outputs of student and teacher (4, 4, 8, 8), a batch of (4, 2, 8, 8), two features each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    x0, noise = (torch.randn(4, 2, 8, 8, generator=generator) for _ in range(2))
    own, theirs = ([torch.randn(4, 16, side, generator=generator) for side in (8, 4)] for _ in range(2))
    t = torch.tensor([0, 3, 500, 999])
    return student, teacher, own, theirs, Batch(x0, noise, DDPM().add_noise(x0, noise, t), noise, t, {})


PIXELS, FOLDED = {"lambda_feat": 2.0}, {"fold_steps": 1000, "lambda_hidden": 2.0, "sample_steps": 5, "lambda_diff": 0.5}
TRANSFORMER = {"arch": "dit", "lambda_feat": 2.0, "steps": 1000}
TEXT = {"dataset": "latents", "arch": "sd", "student": "base", "lambda_feat": 2.0}
KINDS = {"pixels": PIXELS, "folded": FOLDED, "transformer": TRANSFORMER, "text": TEXT}


CASES = [(kind, method) for kind in KINDS for method in METHODS
         if kind != "folded" or METHODS[method][1] is not None]  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_objective_is_the_papers_sum(kind, method, outputs):
    """Against a plain formula: sums of squares (Diff-Pruning), SFDDM's absolute errors, means and the bound
    (TinyFusion), means (BK-SDM)."""
    student, teacher, own, theirs, batch = outputs
    settings = Settings(**{"kd": (method,), "lambda_diff": 0.5, "lambda_out": 0.25, **KINDS[kind]})
    variance, process, constants = kind == "transformer", DDPM(), lift_place.PRESETS[settings.constants]
    if not variance:
        student, teacher = student[:, :2], teacher[:, :2]
    e_s, e_t = student[:, :2], teacher[:, :2]
    total = 2 * 8 * 8 if constants["reduction"] == "sum" else 1
    assert (total > 1) == (kind in ("pixels", "folded"))

    expected = 0.5 * total * (e_s - batch.target).square().mean()
    if variance:
        expected += 0.5 * process.bound(student, batch.x0, batch.x_t, batch.t)
    if method in ("lift", "place"):
        loss = functools.partial(lift_place.place, group_size=16) if method == "place" else lift_place.lift
        expected += 0.25 * loss(e_s, e_t, **constants).loss
    elif method in ("out", "out+feat"):
        expected += 0.25 * total * ((e_s - e_t).abs() if kind == "folded" else (e_s - e_t).square()).mean()
    if variance and method not in ("none", "feat"):
        expected += 0.25 * process.bound(student, batch.x0, batch.x_t, batch.t, teacher)
    if kind == "folded" and method != "none":
        expected += 2.0 * total * (own[-1] - theirs[-1]).abs().mean()
    elif kind != "folded" and method not in ("none", "out"):
        kinds = {"pixels": feature_loss, "transformer": masked_feature_loss, "text": mean_feature_loss}
        expected += 2.0 * kinds[kind](own, theirs)
    kd = train.resolve(settings, method)
    loss, parts = train.objective(kd, process, batch, (student, own), (teacher, theirs), None, 0)
    torch.testing.assert_close(loss, expected)
    assert (parts is not None) == (method in ("lift", "place")) and kd.name == method
    alone = train.objective(train.resolve(settings, "none"), process, batch, (student, []), None, None, 0)[0]
    torch.testing.assert_close(0.5 * train.diffusion_loss(kd, process, batch, student), alone)


def test_constants_may_be_changed():
    a, b = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for given, constants in (({"group_size": 32}, {"group_size": 32}), ({"norm": "l2"}, {"norm": "l2"})):
        loss, parts = train.resolve(Settings(**given), "place").output(a, b, 0.3, 0)
        assert loss == place(a, b, reduction="sum", weight=0.3, **constants).loss and parts.weight == 0.3


def test_groups_are_halved_after_equal_parts_of_a_run():
    a, b = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    kd = train.resolve(Settings(halve_group_size=2, steps=9), "place")
    sizes = [64 // kd.output(a, b, None, step)[1].b0.shape[2] for step in range(9)]
    assert sizes == [16] * 3 + [8] * 3 + [4] * 3
    assert kd.output(a, b, 0.3, 4)[0] == place(a, b, group_size=8, reduction="sum", weight=0.3).loss


def test_a_line_may_be_that_of_a_sample():
    a, b = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    loss, parts = train.resolve(Settings(kd=("lift",), lift_per="sample"), "lift").output(a, b, None, 0)
    assert loss == lift_place.lift(a, b, per="sample", reduction="sum").loss and parts.b0.shape == (2, 1, 1)


def test_the_average_warms_up_if_it_is_told_to():
    for warm, share in ((True, 0.1), (False, 0.9)):
        settings = Settings(ema=0.9, ema_warmup=warm, lr=1e-9)
        student = Student(settings, train.resolve(settings, "none"), 0, models.UNet(8, 1, **SMALL))
        start = student.ema.conv_in.weight.clone()
        student.net.conv_in.weight.data += 1
        train.update(settings, student, 0, torch.zeros(()))
        torch.testing.assert_close(student.ema.conv_in.weight, start + 1 - share, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("lambda_feat", ["0", "1e-6"])
def test_a_learned_w_is_a_parameter_that_falls_and_is_resumed(lambda_feat):
    """With nothing but the fine loss to feel, w can only shrink, as it does in the published ablation."""
    arguments = ["--kd", "none", "place", "--schedule", "learned", "--lambda-feat", lambda_feat, "--log-every", "1"]
    arguments += ["--accumulate", "2", *SAVED, "--out", f"runs/learned{lambda_feat}"]
    run(*arguments)
    ws = [record["w"] for record in log(f"learned{lambda_feat}") if record["method"] == "place"]
    assert ws[0] == 0.5 and ws == sorted(ws, reverse=True) and len(set(ws)) == 6
    path = Path(f"runs/learned{lambda_feat}/checkpoint.pt")
    state = torch.load(path, weights_only=True)["students"]
    assert state["place-0"]["module"]["logit"].sigmoid() < ws[-1] and "logit" not in state["none-0"]["module"]
    models.load(f"runs/learned{lambda_feat}/student/place-0")  # a network as all are
    shutil.copy(path.with_name("checkpoint.prev.pt"), path)
    path.with_name("metrics.json").unlink()
    run(*arguments)
    assert torch.equal(torch.load(path, weights_only=True)["students"]["place-0"]["module"]["logit"],
                       state["place-0"]["module"]["logit"])  # fmt: skip


def test_the_feature_weight_falls_to_zero_in_a_hundred_stages():
    at = train.resolve(Settings(arch="dit", steps=1000), "place").lambda_feat
    values = [at(step) for step in range(1000)]
    assert values[0] == 1e-2 and values[-1] == 0 and len(set(values)) == 100
    assert values[500] == pytest.approx(1e-2 * (1 - 50 / 99)) and values == sorted(values, reverse=True)
    assert {train.resolve(Settings(steps=1000), "place").lambda_feat(step) for step in (0, 999)} == {1e-6}
    fold = train.resolve(Settings(fold_steps=5, kd=("out",), feat_stages=9, lambda_hidden=3.0), "out")
    assert {fold.lambda_feat(step) for step in (0, 1499)} == {3.0}


def test_the_learning_rate_warms_up_and_decays():
    settings = Settings(steps=100, warmup=9, decay="cosine")
    rates = [train.lr_factor(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == max(rates) > 0.9 and rates[-1] < 0.001
    assert train.lr_factor(Settings(steps=100, warmup=0, decay="constant"), 99) == 1
    assert train.lr_factor(Settings(steps=100, warmup=0, decay="cosine", lr=1.0, lr_end=0.2), 50) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("methods", "given", "compared", "passes"),
    [(("feat",), {"lambda_feat": 0.0}, (), [0, 1]), (("feat",), {}, ("feat",), [1, 1]), (("none",), {}, (), [0, 1]),
     (("none", "out", "place"), {"precision": "bf16"}, ("place",), [1, 1]),
     (("none", "out", "place"), {"teacher_precision": "bf16"}, ("place",), [1, 1]),
     (("out",), {"precision": "bf16", "teacher_precision": "fp32"}, (), [1, 1]),
     (("out",), {"fold_steps": 5, "lambda_hidden": 0.0}, (), [1, 1])],
)  # fmt: skip
def test_a_teacher_is_asked_once_for_all_students_and_only_if_one_of_them_listens(
    methods, given, compared, passes, monkeypatch
):
    settings, clock = Settings(kd=methods, **given), itertools.count()
    monkeypatch.setattr(students_file, "perf_counter", lambda: float(next(clock)))  # each timed part takes one second
    net, calls = models.UNet(8, 1, **SMALL), []
    kds = [train.resolve(settings, name) for name in methods]
    assert [kd.name for kd in kds if kd.features is not None] == [name for name in methods if name in compared]
    teacher = train.tap(net, net, slice(None)) if any(kd.features for kd in kds) else net
    students = [Student(settings, kd, 0, models.UNet(8, 1, **SMALL), teacher) for kd in kds]
    process = DDPM() if settings.fold_steps is None else DDPM().fold(5)
    net.register_forward_hook(lambda _, given, output: calls.append((given[1].tolist(), output.dtype)))
    x, t = torch.randn(4, 1, 8, 8), process.sample_t(4)
    for at, watched in enumerate((False, True)):
        before = len(calls)
        numbers = train.step(settings, students, teacher, process, Batch(x, x, x, x, t, {}), at, watched)
        assert len(calls) - before == passes[at] and ("mse" in numbers[0]) == watched
    half = "bf16" in (settings.teacher_precision or settings.precision)
    assert calls[-1] == (process.phi(t).tolist(), torch.bfloat16 if half else torch.float32)
    asked = {student.method: passes[0] * bool(student.kd.output or student.kd.features) for student in students}
    assert {student.method: student.seconds for student in students} == {
        name: 2 * (1 + 1 + asks)
        for name, asks in asked.items()  # its pass, its update, the teacher's
    }


def test_the_weight_of_the_fine_term_is_that_of_all_processes(monkeypatch):
    settings, net, x = Settings(lambda_feat=0.0), models.UNet(8, 1, **SMALL), torch.randn(4, 1, 8, 8)
    monkeypatch.setattr(train, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(train, "mean_over_ranks", lambda coarse: 0 * coarse + 0.25)
    student = Student(settings, train.resolve(settings, "place"), 0, models.UNet(8, 1, **SMALL))
    batch = Batch(x, x, x, x, torch.arange(4), {})
    assert train.step(settings, [student], net, DDPM(), batch, 0, True)[0]["w"] == 0.75


@pytest.mark.parametrize("name", ["lift", "place", "out"])
def test_a_log_line_says_the_lines_of_its_own_loss_and_without_one_those_of_place(name):
    student, teacher = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts = lift_place.lift(student, teacher) if name == "lift" else lift_place.place(student, teacher)
    batch, kd = Batch(student, student, student, student, torch.arange(4), {}), train.resolve(Settings(), name)
    found = {key: value.item() for key, value in train.diagnose(kd, batch, student, teacher, None, 0).items()}
    mse = (student - teacher).square().mean()
    expected = (parts.coarse, parts.fine, parts.weight, parts.b0.mean(), parts.b1.mean(), mse)
    names = ("coarse", "fine", "w", "b0", "b1", "mse")
    assert found == pytest.approx({key: x.item() for key, x in zip(names, expected, strict=True)}, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "lambda_feat"), [("out", 0.0), *itertools.product(("feat", "lift", "place"), (0.0, 1.0))]
)
def test_parts_of_a_batch_add_up_to_it(method, lambda_feat, monkeypatch):
    gradients, teacher, process, asked = [], models.UNet(8, 1, **SMALL), DDPM(), []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    tapped = train.tap(teacher, teacher, slice(None))
    x0, noise = (torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x0, t = x0 * torch.arange(8)[:, None, None, None], process.sample_t(8, torch.Generator().manual_seed(2))  # uneven
    batch = Batch(x0, noise, process.add_noise(x0, noise, t), noise, t, {})

    def update(settings, student, at, loss):
        gradients.append([p.grad.clone() for p in student.model.parameters()])
        return torch.zeros(())

    monkeypatch.setattr(train, "update", update)
    ws: list[float] = []
    logged: list[torch.Tensor] = []
    for parts in (1, 3, 8):  # of 8: 3, 3 and 2
        settings = Settings(kd=(method,), accumulate=parts, lambda_feat=lambda_feat)
        torch.manual_seed(3)
        net, kd = models.UNet(8, 1, **SMALL), train.resolve(settings, method)
        net.load_state_dict(teacher.state_dict())
        net.conv_out.weight.data *= 1.2
        student, told, before = Student(settings, kd, 0, net, tapped), tapped if kd.features else teacher, len(asked)
        (numbers,) = train.step(settings, [student], told, process, batch, 0, watched=method == "place")
        assert {"loss", "grad_norm"} <= numbers.keys()
        logged.append(torch.stack([*numbers.values()]))
        # twice where w follows from the outputs and the features are too large to be kept
        passes = (
            parts * (1 + (parts > 1 and kd.output is kd.watch and lambda_feat > 0)) * bool(kd.output or kd.features)
        )
        assert len(asked) - before == passes
        if method == "place":
            ws.append(numbers["w"].item())
    assert len(set(ws)) <= 1 or ws == pytest.approx([ws[0]] * 3, rel=1e-5)
    assert all(0 < w < 1 for w in ws)
    for other in logged[1:]:
        torch.testing.assert_close(other, logged[0], rtol=1e-4, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


def test_a_part_is_asked_twice_with_the_same_dropout():
    settings, net, x = Settings(accumulate=2, lambda_feat=0.0), models.UNet(8, 1, **SMALL), torch.randn(4, 1, 8, 8)
    net.set_dropout(0.5)
    student, outputs = Student(settings, train.resolve(settings, "place"), 0, net), []
    net.register_forward_hook(lambda *given: outputs.append(given[-1].detach()))
    train.step(settings, [student], models.UNet(8, 1, **SMALL), DDPM(), Batch(x, x, x, x, torch.arange(4), {}), 0)
    first, second, *again = outputs
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)


# ---- Resuming --------------------------------------------------------------------------------------------------------

KILLED = {
    "unet": ["--kd", "feat", "place", "--dropout", "0.1"],
    "fold": [*FOLD, "--kd", "out"],
    "dit": ["--arch", "dit", "--kd", "place", "--depth-method", "learned", "--depth-steps", "2"],
}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("kind", KILLED)
def test_a_killed_run_resumes_bit_for_bit(kind, processes, capsys):
    arguments, whole, killed = (
        [*KILLED[kind], "--seeds", "0", "--log-every", "1", *SAVED],
        f"{kind}-whole",
        f"{kind}-killed",
    )
    run(*arguments, "--out", f"runs/{whole}")
    process = processes([[*arguments, "--preview-every", "2", "--out", f"runs/{killed}"]], kill_at=3)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [torch.load(f"runs/{killed}/checkpoint.pt", weights_only=True)["step"], log(killed)[-1]["step"]] == [2, 2]
    assert Path(f"runs/{killed}/samples.png").is_file()  # of 32 samples of its students, which changed nothing
    assert {path.parent for path in Path(f"runs/{killed}/student").rglob("config.json")}
    run(*arguments, "--preview-every", "2", "--out", f"runs/{killed}")
    assert f"runs/{killed}: resumed at step 2 of 6" in capsys.readouterr().out
    for folder in {path.parent for path in Path(f"runs/{whole}/student").rglob("config.json")}:
        assert same(str(folder.relative_to("runs")), str(folder.relative_to("runs")).replace(whole, killed))
    assert log(whole) == log(killed) and {record["step"] for record in log(whole)} == set(range(6))


@pytest.mark.usefixtures("_quick")
def test_ctrl_c_saves_the_step_that_was_reached_and_the_same_command_goes_on(capsys):
    arguments = ["--kd", "out", "--steps", "5", "--save-every", "99"]
    run(*arguments, "--out", "runs/unstopped")
    with interrupted(at=2):
        run(*arguments, "--out", "runs/stopped")
    assert "runs/stopped: stopped and saved; the same command goes on" in capsys.readouterr().out
    assert torch.load("runs/stopped/checkpoint.pt", weights_only=True)["step"] == 3
    assert not Path("runs/stopped/student").exists()
    Path("runs/stopped/.checkpoint.pt.elsewhere-1.part").touch()  # a kill on another machine left it
    run(*arguments, "--out", "runs/stopped")
    assert same("stopped/student", "unstopped/student") and log("stopped") == log("unstopped")
    assert not list(Path("runs/stopped").glob(".checkpoint*"))


@pytest.mark.usefixtures("_quick")
def test_two_processes_train_what_one_trains_and_resume_what_one_began(processes, monkeypatch):
    # unpruned: before a norm of one channel per group a bias has no gradient but rounding, which Adam blows up
    arguments = ["--kd", "feat", "place", "--prune", "0", "--lambda-feat", "1e-3"]
    save = train.save_checkpoint

    def save_and_keep(settings, students, folder, steps, images):
        save(settings, students, folder, steps, images)
        if folder.name == "fold-one" and steps == 2:
            Path("runs/fold-two").mkdir()
            shutil.copy(folder / "checkpoint.pt", "runs/fold-two/checkpoint.pt")

    monkeypatch.setattr(train, "save_checkpoint", save_and_keep)
    run(*arguments, "--out", "runs/one")
    folded = [*FOLD, *arguments, "--kd", "out", "--accumulate", "2", *SAVED]
    run(*folded, "--out", "runs/fold-one")
    commands = [[*arguments, "--out", "runs/two"], [*folded, "--out", "runs/fold-two"]]
    assert as_two(processes, commands) == [0, 0]
    for name in ("feat-0", "place-0"):
        assert same(f"one/student/{name}", f"two/student/{name}", 1e-5)
    assert same("fold-one/student", "fold-two/student", 1e-5)
    one, two = ([r["w"] for r in log(name) if r["student"] == "place-0"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)  # one weight for the whole batch
    assert len(log("two")) == len(log("one")) and log("fold-two")[0]["step"] == 2


@pytest.mark.usefixtures("_quick")
def test_two_processes_train_their_teacher_first(processes):
    few = ["--teacher-steps", "2", "--teacher-lr", "4e-4", "--steps", "1", "--kd", "out", "--out", "runs/with-teacher"]
    assert as_two(processes, [few]) == [0, 0]
    assert log("with-teacher") and Path(teacher_settings(parse([*TINY, *few])).out, "teacher").exists()


@pytest.mark.usefixtures("_quick")
def test_processes_that_do_not_find_the_same_run_are_refused(processes, tmp_path, monkeypatch):
    """As with folders of their own on each machine: one finds a checkpoint, the other one none."""
    a_unet().save(tmp_path / "net")
    command = ["--teacher", str(tmp_path / "net"), "--kd", "out", "--prune", "0", *SAVED, "--out", "runs/apart"]
    with interrupted(at=3):
        run(*command)
    ports, both = free_ports(1), []
    for rank in (0, 1):
        both.append(processes([command], rank=rank, ports=ports))
        monkeypatch.chdir(tmp_path)
    for process in both:
        process.join(120)
    monkeypatch.undo()
    assert [process.exitcode for process in both] == [2, 2] and not Path(tmp_path / "runs/apart/config.json").exists()


@pytest.mark.usefixtures("_quick")
def test_processes_agree_on_the_step_at_which_they_stop(processes):
    arguments = ["--kd", "out", "--prune", "0", "--steps", "9", "--save-every", "99"]
    run(*arguments, "--out", "runs/agreed-whole")  # which also trains the teacher
    codes = as_two(processes, [[*arguments, "--out", "runs/agreed"]], signal_at=2)
    assert codes == [128 + signal.SIGTERM] * 2
    assert torch.load("runs/agreed/checkpoint.pt", weights_only=True)["step"] == 4  # one step after it was told


@pytest.mark.usefixtures("_quick")
def test_a_signal_during_the_last_checkpoint_ends_the_run_before_its_evaluation(monkeypatch):
    save = train.save_checkpoint

    def saved(*given):
        save(*given)
        signal.raise_signal(signal.SIGTERM)

    a_unet().save("ready")
    monkeypatch.setattr(train, "save_checkpoint", saved)
    with pytest.raises(SystemExit) as ended:
        run("--teacher", "ready", "--kd", "none", "--steps", "2", "--out", "runs/late")
    assert ended.value.code == 128 + signal.SIGTERM
    assert Path("runs/late/checkpoint.pt").exists() and not Path("runs/late/metrics.json").exists()


@pytest.mark.usefixtures("_quick")
def test_a_trained_teacher_leaves_no_preview_of_itself():
    """The last one is of a step that depends on when the run was killed."""
    few = ["--teacher-steps", "3", "--steps", "1", "--save-every", "1", "--preview-every", "1"]
    few += ["--teacher-lr", "3e-4"]  # that no other test trains
    run(*few, "--kd", "none", "--out", "runs/previewed")
    folder = Path(teacher_settings(parse([*TINY, *few])).out)
    assert (folder / "samples.png").exists() and (folder / "teacher").exists() and not (folder / "student").exists()


@pytest.mark.usefixtures("_quick")
def test_the_run_folder_of_an_earlier_version_goes_on(capsys):
    """As those before this file was written left it: a checkpoint of these keys, and a finished run's metrics."""
    run("--kd", "feat", "--prune", "0", "--out", "runs/before")
    teacher = models.load(teacher_settings(parse(TINY)).out + "/teacher")
    settings = parse([*TINY, "--kd", "feat", "--prune", "0", "--out", "runs/old"])
    tapped = train.tap(teacher, teacher, slice(None))
    student = Student(settings, train.resolve(settings, "feat"), 0, teacher.requires_grad_(True), tapped)
    module = {
        **{f"net.{name}": x for name, x in teacher.state_dict().items()},
        **{f"adapters.{i}.weight": adapter.weight.detach() for i, adapter in enumerate(student.model.adapters)},
    }
    old = json.loads((ROOT / "benchmarks/digits8-keep/metrics.json").read_text())["settings"]
    assert old.keys() <= plain(settings).keys()  # no setting has gone
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    state = {"seconds": 1.5, "module": module, "ema": teacher.state_dict()}
    state |= {"optimizer": optimizer.state_dict(), "scaler": {}}
    Path("runs/old").mkdir()
    torch.save({"step": 0, "settings": plain(settings), "students": {"feat-0": state}}, "runs/old/checkpoint.pt")
    Path("runs/old/config.json").write_text(json.dumps(plain(settings)))
    Path("runs/old/log.jsonl").write_text('{"step": 0, "student": "feat-0"}\n{"step": 3, "stu')
    run("--kd", "feat", "--prune", "0", "--out", "runs/old")
    assert "runs/old: resumed at step 0 of 6" in capsys.readouterr().out
    assert same("before/student", "old/student") and log("before") == log("old")


@pytest.mark.usefixtures("_quick")
def test_what_lies_in_the_way_is_refused_by_name_and_left_alone(capsys):
    arguments = ["--kd", "place", *SAVED, "--out", "runs/way"]
    run(*arguments)
    path, teacher = Path("runs/way/checkpoint.pt"), Path(teacher_settings(parse([*TINY, "--seed", "9"])).out)
    before = path.read_bytes()
    other = refused([*TINY, *arguments, "--lr", "0.001", "--clip", "2"], capsys)
    assert "--lr was 0.005, is 0.001, --clip was 1.0, is 2.0" in other
    assert path.read_bytes() == before
    Path("runs/way/metrics.json").unlink()
    path.write_bytes(before[: len(before) // 2])
    run(*arguments)  # from the checkpoint before it
    said = capsys.readouterr().out
    (aside,) = path.parent.glob("checkpoint.pt.broken-*")
    assert f"moved to {aside}; the run goes on from the checkpoint before it" in said and "resumed at step 4" in said
    assert torch.load(path, weights_only=True)["step"] == 6
    Path("runs/way/metrics.json").unlink()
    aside.unlink()
    for file in (path, path.with_name("checkpoint.prev.pt")):
        file.write_bytes(before[: len(before) // 2])
    sentence = refused([*TINY, *arguments], capsys)
    (aside,) = path.parent.glob("checkpoint.pt.broken-*")
    assert str(path) in sentence and str(aside) in sentence and "step 0" in sentence
    run(*arguments)
    assert torch.load(path, weights_only=True)["step"] == 6
    teacher.mkdir(parents=True)  # of a run that has not begun
    (teacher / "checkpoint.pt").write_bytes(b"half a file")
    arguments = [*TINY, "--seed", "9", "--out", "runs/none"]
    assert str(teacher / "checkpoint.pt") in refused(arguments, capsys, said="1,500 images of 1x8x8; teacher ")
    assert not Path("runs/none").exists()


@pytest.mark.usefixtures("_quick")
def test_a_model_of_the_diffusers_tutorial_gives_a_student_for_its_pipeline(capsys):
    """Its basic training in small; its pipeline is read, pruned, distilled, interrupted, resumed, and runs again."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **blocks)
    scheduler = diffusers.DDPMScheduler(200, beta_schedule="squaredcos_cap_v2")
    optimizer, images = torch.optim.AdamW(net.parameters(), 1e-3), data.to_float(data.load("digits").images[:8])
    for _ in range(3):
        noise, t = torch.randn_like(images), torch.randint(0, 200, (8,))
        loss = (net(scheduler.add_noise(images, noise, t), t, return_dict=False)[0] - noise).square().mean()
        loss.backward()
        optimizer.step()
    diffusers.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained("tutorial")

    arguments = ["--teacher", "tutorial", "--prune", "0.5", "--kd", "feat", "place", "--importance", "taylor"]
    arguments += ["--taylor-steps", "4", "--sample-steps", "4", "--out", "runs/tutorial"]
    with interrupted(at=1):
        run(*arguments)
    run(*arguments, "--eval-samples", "6")
    assert "runs/tutorial: resumed at step 2 of" in capsys.readouterr().out
    student = teachers.load("runs/tutorial/student/place-0")
    assert student.process == {"name": "ddpm", "steps": 200, "schedule": "cosine"}
    small = diffusers.UNet2DModel.from_pretrained("runs/tutorial/student/place-0")
    assert tuple(small.config.block_out_channels) == (8, 16)
    pipeline = diffusers.DDPMPipeline.from_pretrained("tutorial", unet=small)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    card = Path("runs/tutorial/student/place-0/README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("tutorial", unet=student)' in card and "pipeline().images" in card
    run("--teacher", "tutorial", "--student", "runs/tutorial/student/place-0", "--kd", "place", "--sample-steps", "4",
        "--out", "runs/tutorial-again")  # fmt: skip
    assert Path("runs/tutorial-again/student/config.json").exists()


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def spoiled(monkeypatch, name: str, steps) -> None:
    """The loss of the method `name` is no number at these steps."""
    objective = train.objective

    def spoil(method, *given):
        loss, parts = objective(method, *given)
        return (loss * math.nan if method.name == name and given[-1] in steps else loss), parts

    monkeypatch.setattr(train, "objective", spoil)


def is_standard(text: str) -> bool:
    """Whether this is JSON without the words NaN and Infinity as numbers."""
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return True


@pytest.mark.usefixtures("_quick")
def test_a_student_that_diverges_stops_with_finite_weights_and_the_others_go_on(monkeypatch, capsys):
    arguments = ["--kd", "none", "out", "--prune", "0", "--steps", "35", "--log-every", "7", "--save-every", "8"]
    run("--kd", "none", *arguments[3:], "--out", "runs/sound")
    spoiled(monkeypatch, "out", range(3, 99))
    for _ in range(2):  # the second command finds the run finished
        assert train.main(parse([*TINY, *arguments, "--out", "runs/diverged"])) == 3
        out = capsys.readouterr().out
        assert "out-0 diverged and stopped before step 20" in out
    assert [row.get("stopped") for row in found("diverged")["students"]] == [None, 20]
    assert same("sound/student", "diverged/student/none-0")
    states = torch.load("runs/diverged/checkpoint.pt", weights_only=True)["students"]
    for tensor in (*weights("diverged/student/out-0").values(), *states["out-0"]["module"].values()):
        assert tensor.isfinite().all()
    lines = Path("runs/diverged/log.jsonl").read_text().splitlines()
    assert all(map(is_standard, lines)) and is_standard(Path("runs/diverged/metrics.json").read_text())
    last = [line for line in log("diverged") if line["student"] == "out-0"][-1]
    assert (last["step"], last["loss"], last["skipped"]) == (20, "NaN", 18)


@pytest.mark.usefixtures("_quick")
def test_the_sentence_of_a_student_that_diverges_and_a_step_that_does_alone(monkeypatch, capsys):
    learn = ["--kd", "out", "--lambda-feat", "0", "--steps", "25"]
    with monkeypatch.context() as patch:
        spoiled(patch, "out", range(99))
        assert train.main(parse([*TINY, *learn, "--out", "runs/never"])) == 3
    err = capsys.readouterr().err
    assert "out-0 stopped before step 10: 10 steps in a row were not finite" in err
    assert all(word in err for word in ("loss nan", "mse ", "lr ", "a smaller --lr"))
    with monkeypatch.context() as patch:
        spoiled(patch, "out", {4})
        run(*learn, "--out", "runs/once")
    assert log("once")[-1]["skipped"] == 1 and "stopped" not in found("once")["students"][0]


def test_a_teacher_whose_outputs_are_not_finite_says_no_importance(capsys):
    lost = a_unet()
    lost.conv_out.bias.data.fill_(1e38)
    lost.save("lost")
    arguments = ["--teacher", "lost", "--importance", "taylor", "--steps", "2", "--eval-samples", "0"]
    with pytest.raises(SystemExit) as stop:
        train.main(parse([*arguments, "--device", "cpu", "--out", "runs/lost"]))
    said = capsys.readouterr().err.splitlines()[-1]  # after the bar of its progress
    assert stop.value.code == 2 and said.startswith("train.py: error: the teacher's loss at timestep 0 is inf")


@pytest.mark.usefixtures("_quick")
def test_a_teacher_that_diverges_is_not_kept(monkeypatch, capsys):
    spoiled(monkeypatch, "none", range(99))
    arguments = [*TINY, "--teacher-steps", "12", "--seed", "7", "--out", "runs/orphan"]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            train.main(parse(arguments))
        assert ended.value.code == 3 and "the teacher diverged and is not kept" in capsys.readouterr().out
    teacher = Path(teacher_settings(parse(arguments)).out)
    assert (teacher / "checkpoint.pt").exists() and not (teacher / "teacher").exists()


def test_a_rate_that_explodes_leaves_finite_weights():
    """A real divergence, over Adam's moments and the average."""
    settings = Settings(lr=1e3, steps=60, warmup=0, clip=0.0, weight_decay=0.0, lambda_feat=0.0, decay="constant")
    torch.manual_seed(0)
    net, process = models.UNet(8, 1, **SMALL), DDPM()
    student = Student(settings, train.resolve(settings, "none"), 0, net)
    x0, noise = (torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    t = process.sample_t(8, torch.Generator().manual_seed(2))
    batch = Batch(x0, noise, process.add_noise(x0, noise, t), noise, t, {})
    for at in range(60):
        with torch.no_grad():
            batch.x_t.mul_(1e3 if at < 20 else 1)
        train.step(settings, [student], None, process, batch, at)
    state = student.state()
    moments = [x for entry in state["optimizer"]["state"].values() for x in entry.values()]
    assert student.updates < 60
    assert all(x.isfinite().all() for x in [*state["module"].values(), *state["ema"].values(), *moments])


@pytest.mark.usefixtures("_quick")
def test_a_second_run_of_a_folder_is_refused_and_one_of_a_teacher_waits(processes, capsys):
    arguments = [*TINY, "--seed", "5", "--out", "runs/both"]
    with disk.lock("runs/both"):
        sentence = refused(arguments, capsys)
        assert f"runs/both is in use by process {os.getpid()} on" in sentence and "another --out" in sentence
    assert not Path("runs/both").exists()
    both = [processes([["--seed", "5", "--teacher-steps", "30", "--out", f"runs/{name}"]]) for name in ("a", "b")]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0] and same("a/student", "b/student")
    steps = [Path(f"steps-{process.pid}").stat().st_size for process in both]
    assert sorted(steps) == [6, 36]  # one trained the teacher, too


@pytest.mark.usefixtures("_quick")
def test_a_folder_that_cannot_be_written_is_found_before_the_teacher_is_trained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--out {tmp_path / 'file'} is a file" in refused([*TINY, "--seed", "8", "--out", str(out)], capsys)
    assert "/proc/run cannot be written" in refused([*TINY, "--seed", "8", "--out", "/proc/run"], capsys)


@pytest.mark.usefixtures("_quick")
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(monkeypatch, capsys):
    arguments, save = ["--kd", "out", *SAVED, "--out", "runs/full"], torch.save

    def full(content, file):
        if content["step"] > 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "the disk is full after 4 bytes of it" in err and "Traceback" not in err
    assert torch.load("runs/full/checkpoint.pt", weights_only=True)["step"] == 2
    assert not [*Path("runs/full").glob(".*")]
    run(*arguments)


# ---- Fewer steps -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick")
def test_a_fold_is_sampled_in_its_own_steps_and_teaches_folds(capsys):
    run(*FOLD, "--kd", "out", "place", "--eval-samples", "16", "--out", "runs/fold")
    rows = found("fold")
    assert [row["method"] for row in rows["same_steps"]] == ["teacher, 5 steps"]  # whose timesteps are the fold's
    text = capsys.readouterr().out
    assert "| place, 5 steps " in text and "| teacher, 5 steps " in text
    assert "teacher DDIM, 50 steps; others DDIM, 5 steps" in rows["protocol"]
    assert Path("runs/fold/interpolations.png").stat().st_size > 0
    saved, noise = models.load("runs/fold/student/place-0"), start_noise(16, (1, 8, 8), 0)
    teacher = models.load(Path(teacher_settings(parse(TINY)).out) / "teacher")
    assert saved.process == {"name": "ddpm", "fold": [0, 200, 400, 600, 800]}
    usual = DDPM().sample(teacher, noise.shape, 50, noise=noise)
    theirs = [row for row in rows["students"] if row["method"] == "place"] + rows["same_steps"]
    for row, x in zip(
        theirs,
        (
            DDPM().fold(5).sample(saved, noise.shape, 5, noise=noise),
            DDPM().sample(teacher, noise.shape, 5, noise=noise),
        ),
        strict=True,
    ):
        assert row["teacher_mse"] == pytest.approx((x - usual).square().mean().item(), rel=1e-4)
    assert rows["teacher"]["teacher_mse"] == 0

    arguments = ["--kd", "out", "--teacher", "runs/fold/student/place-0", "--steps", "1"]
    run(*arguments, "--fold-steps", "1", "--fold-end", "last", "--sample-steps", "1", "--eval-samples", "6",
        "--out", "runs/fold-of-fold")  # fmt: skip
    assert [row["method"] for row in found("fold-of-fold")["same_steps"]] == ["teacher, 1 steps", "teacher, 1 folded"]
    run(*arguments, "--fold-steps", "1,3", "--sample-steps", "2", "--out", "runs/listed")
    run(*arguments, "--sample-steps", "5", "--out", "runs/pruned-fold")
    folds = {"fold-of-fold": [800], "listed": [200, 600], "pruned-fold": [0, 200, 400, 600, 800]}
    assert {name: models.load(f"runs/{name}/student").process["fold"] for name in folds} == folds


# ---- Refusals --------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys, said: str = "") -> str:
    """The one sentence with which train.py ends, after it has said no more than what starts like this."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(parse(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: error: "), err
    assert out.startswith(said) if said else not out
    return err


REFUSED = [
    ("--prune 1.2", "--prune 1.2", "below 1"),
    ("--kd plaice", "--kd plaice", "did you mean place"),
    ("--kd place place", "--kd", "once"),
    ("--dataset cleba", "--dataset cleba", "digits"),
    ("--teacher /nowhere", "/nowhere", "network"),
    ("--steps 0", "--steps 0", "at least 1"),
    ("--eval-samples 3", "--eval-samples 3", "at least 6"),
    ("--fold-steps 1025", "--fold-steps 1025", "at most 1024"),
    ("--fold-steps 1001", "--fold-steps", "1 to 1000 steps, not 1001"),
    ("--fold-steps 0 --kd out", "--fold-steps", "1 to 1000 steps, not 0"),
    ("--fold-steps 5,3", "--fold-steps", "growing"),
    ("--fold-steps 1", "--fold-steps", "let it end last"),
    ("--fold-end last", "--fold-end", "--fold-steps and a number"),
    ("--fold-steps 3,5 --fold-end last", "--fold-end", "--fold-steps and a number"),
    ("--fold-steps 10 --sample-steps 11", "--sample-steps 11", "at most 10"),
    ("--fold-steps 10 --kd feat", "--kd feat", "none, out, lift, place"),
    ("--fold-steps 10 --kd none", "--kd none", "--lambda-diff 1"),
    ("--fold-steps 10 --arch dit", "--fold-steps", "--arch unet"),
    ("--process flow --eta 1", "--process flow has none of it"),
    ("--process flow --fold-steps 8", "--process flow has none of it"),
    ("--prune 0 --seeds 0 1", "--seeds", "--init random"),
    ("--seeds 0 1 --importance magnitude", "--seeds", "--importance random"),
    ("--arch dit --seeds 0 1 --depth-method uniform", "--depth-method random"),
    ("--arch dit --prune 0.75 --seeds 0 1", "keeps 2 of 8 blocks: the seeds would draw the same"),
    ("--arch dit --keep 0,99", "numbers from 0 to 7, not [0, 99]"),
    ("--arch dit --keep 0,two", "0,two"),
    ("--arch dit --dataset celeba", "--arch dit has no preset for celeba"),
    ("--arch sd --dataset latents --data x", "--arch sd needs --teacher, a diffusers pipeline"),
    ("--dataset imagenet --depth-method luck", "--depth-method luck"),
    ("--dataset imagenet", "latents need --data"),
    ("--dataset lsun_church", "church_outdoor_train_lmdb", "--data"),
    ("--group-size 12 --halve-group-size 3", "--halve-group-size 3 cannot be used", "groups of 12 elements"),
    ("--sampler pndm --process flow", "--sampler and --fold-steps are of DDPM"),
    ("--sampler pndm --eta 1", "--sampler pndm goes without --eta"),
    ("--schedule learned --fsdp", "--schedule learned does not go with --fsdp"),
    ("--recompute", "--recompute is for --arch sd and mmdit", "--accumulate"),
    ("--head neck", "--head neck", "choose from statistics"),
    ("--student train", "train is not a saved network: there is no such folder"),
    ("--teacher {twice} --fold-steps 5 --sample-steps 5", "--fold-steps takes a teacher that predicts no variance"),
    ("--teacher {twice} --process flow", "predicts a variance"),
    ("--arch sd --dataset latents --data x --head statistics", "--head is for --arch unet and dit: leave it out"),
    ("--arch dit --norm-groups scale", "--norm-groups is of a U-Net that loses channels", "leave it out"),
    ("--keep 0,2", "--keep is of a transformer that loses blocks", "--arch dit", "leave it out"),
    ("--arch dit --keep 0,2 --prune 0.5", "--prune says how many blocks go, and --keep which ones stay"),
    ("--importance magnitude --taylor-steps 5", "--taylor-steps is of --importance taylor: leave it out"),
    ("--caption-dropout 0.5", "--caption-dropout is for networks that read captions"),
    ("--lambda-hidden 3", "--lambda-hidden is of --fold-steps"),
    ("--flip", "--flip is not of digits"),
    ("--arch dit --keep 0,1 --student {dit}", "--keep names blocks of the teacher", "give one of the two"),
    ("--arch dit --channel-mults 1,2", "--channel-mults", "--arch unet"),
    ("--group-size 7", "7", "64", "2, 4, 8, 16, 32, 64"),
    ("--image-size 12", "8 or 16", "12"),
    ("--device cuda:99", "--device cuda:99", "cpu"),
    ("--lr nan", "--lr nan", "above 0"),
    ("--lr inf", "--lr inf", "at most 1000000.0"),
    ("--lambda-out inf", "--lambda-out inf", "at most"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999", "at most 9223372036854775807"),
    ("--channels 5", "5", "groups"),
    ("--channels 1000000", "--channels 1000000", "at most 8192"),
    ("--eval-samples 1000000000000000000000000000000", "--eval-samples", "at most 10000000"),
    ("--vae x", "--vae is for latents", "digits"),
    ("--bogus", "--bogus"),
    ("--dataset folder", "--dataset folder needs --data"),
    ("--data nowhere", "there is no folder nowhere"),
    ("--data {own}/notes.txt", "{own}/notes.txt is a file: data must name a folder of images"),
    ("--kds out", "there is no --kds; did you mean --kd?"),
    ("--out {own}", "--out {own} holds files that are not of a run (README.md, notes.txt): give another folder"),
    ("--out {dit}", "holds files that are not of a run (config.json, model.safetensors)"),
    ("--data {photos} --out {photos}", "--out {photos} lies in --data {photos}, its pictures would be taken for"),
    ("--data {photos} --out {photos}/runs/new", "--out {photos}/runs/new lies in --data"),
    ("--teacher nope.pth", "--teacher nope.pth: there is no such file"),
    ("--dataset celeba --teacher nope.pth", "--teacher nope.pth: there is no such file"),  # before data are fetched
    ("--dataset celeba --data x", "the public teacher for celeba cannot be downloaded"),
    ("--log wandb", "--log wandb", "pip install wandb"),
    ("--fsdp", "--fsdp splits the students", "torchrun"),
    ("--teacher {rgb}", "takes samples of shape (3, 16, 16), not (1, 8, 8)"),
    ("--student {rgb}", "--student", "does not fit digits"),
    ("--teacher {dit}", "is a DiT", "goes with --arch dit"),
    ("--arch dit --teacher {dit}", "knows the classes 0 to 2, but the data has a class 9"),
    ("--arch dit --process flow --teacher {dit}", "predicts a variance, of which the process flow has none"),
    ("--teacher {sd}", "was trained for the process sd: use --process sd"),
    ("--teacher {fold} --fold-steps 6 --kd out", "folds to 1 to 5 steps, not 6"),
    ("--teacher {fold} --sample-steps 6", "--sample-steps 6", "the teacher has 5 timesteps"),
    ("--student {fold}", "has 5 timesteps, this run 1000", "use --fold-steps 5"),
    ("--student {fold} --fold-steps 2 --kd out", "has 5 timesteps, this run 2"),
    ("--student {fold} --fold-steps 5 --fold-end last --kd out", "--student", "other noise at a timestep"),
    ("--guidance 7", "is told nothing, so it cannot be guided"),
    ("--schedule learned --kd none out", "--schedule is of --kd lift and place"),
    ("--teacher auto", "no public teacher is known for digits, only for celeba"),
    ("--kd none,out", "--kd none,out is not known", "several are separated by spaces"),
    ("--taylor-threshold 5", "--taylor-threshold 5.0", "at most 1"),
    ("--prune 90", "--prune 90.0 cannot be used, it must be below 1; 90 % is 0.9"),
    ("--prune 90%", "--prune 90% cannot be used, it must be a number, as 0.9"),
    ("--steps 1e3", "--steps 1e3 cannot be used, it must be a whole number, as 1000"),
    ("--channel-mults 1,a", "--channel-mults 1,a cannot be used", "commas between them, as 1,2,2"),
    ("--seed -1", "--seed -1 cannot be used, it must be at least 0\n"),
    ("--arch dit --depth-method learned --prune 0.8 --teacher {deep}", "options a group, too many to choose from"),
    ("--sample-steps 1", "--sample-steps 1 cannot be used", "use more steps"),
    ("--teacher {rgb} --channels 8", "--channels is of a teacher that is trained here", "{rgb}", "leave it out"),
    ("--teacher {dit} --arch dit --teacher-steps 9", "--teacher-steps is of a teacher that is trained here"),
    ("--sampler pndm --sample-steps 1", "--sample-steps 1 cannot be used", "2 to 999 steps"),
    ("--sampler pndm --sample-steps 1000", "--sample-steps 1000 cannot be used", "2 to 999 steps"),
    ("--arch dit --teacher {sure}", "cannot be guided: use --guidance 1"),
    ("--arch dit --teacher {plain} --student {sure}", "--student", "cannot be guided: use --guidance 1"),
    ("--student {more}", "other layers than its teacher, 15 features against 11", "--lambda-feat 0"),
    ("--student {level}", "other layers than its teacher", "--lambda-feat 0"),
    ("--arch dit --student {thin}", "tokens of width 8 from patches of 2, its teacher of 64 from 2", "--lambda-feat 0"),
    ("--arch dit --student {coarse}", "width 64 from patches of 4", "--lambda-feat 0"),
    ("--arch dit --teacher {plain} --student {thin}", "predicts a variance and its teacher none"),
    ("--arch dit --student {many}", "knows 12 classes, its teacher 10"),
    ("--arch dit --guidance 1 --teacher {sure} --student {plain}", "learns without the class", "its teacher cannot"),
]


DITS = {  # by what sets them apart
    "thin": {"num_classes": 10}, "many": {"num_classes": 12}, "plain": {"num_classes": 10, "learn_sigma": False},
    "sure": {"num_classes": 10, "learn_sigma": False, "class_dropout_prob": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Saved networks that do not go with the digits."""
    folder = tmp_path_factory.mktemp("networks")
    nets = {"rgb": models.UNet(16, 3, **SMALL), "dit": models.DiT(8, 2, 1, 8, 1, 2, num_classes=3)}
    nets |= {"usual": models.UNet(8, 1, **SMALL), "sd": models.UNet(8, 1, **SMALL), "fold": models.UNet(8, 1, **SMALL)}
    nets["sd"].process, nets["fold"].process = {"name": "sd"}, {"fold": [0, 200, 400, 600, 800]}
    nets |= {"twice": models.UNet(8, 1, 2, **SMALL)}
    nets |= {"more": models.UNet(8, 1, **SMALL | {"num_res_blocks": 2})}
    nets |= {"level": models.UNet(8, 1, **SMALL | {"channel_mults": (1, 2, 2)})}
    nets |= {name: models.DiT(8, 2, 1, 8, 1, 2, **more) for name, more in DITS.items()}
    nets |= {"deep": models.DiT(8, 2, 1, 8, 29, 2, num_classes=10)}
    nets |= {"coarse": models.DiT(8, 4, 1, 64, 1, 2, num_classes=10)}
    for name, net in nets.items():
        net.save(folder / name)
    (folder / "own").mkdir()
    for name in ("README.md", "notes.txt", ".hidden"):
        (folder / "own" / name).write_text("of the user")
    (folder / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(folder / "photos" / f"{i}.png")
    return {name: folder / name for name in (*nets, "own", "photos")}


# of these a dry run says what is missing, or does not look for the library or the processes
UNSEEN = ("--vae x", "--log wandb", "--fsdp", "--teacher /nowhere", "nope.pth", "--dataset lsun_church",
          "--dataset imagenet", "--data x", "--student train")  # fmt: skip


def test_a_dry_run_holds_a_teacher_against_a_folder_of_which_it_reads_no_image(networks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(parse("--data {photos} --teacher {fold}".format(**networks).split()), True)
    assert "--sample-steps 50 cannot be used, the teacher has 5 timesteps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(parse("--data {photos} --image-size 32 --teacher {fold}".format(**networks).split()), True)
    assert "it takes samples of shape (1, 8, 8), not (1, 32, 32): use one that fits" in capsys.readouterr().err
    own = parse(["--student", str(networks["usual"]), "--teacher", str(networks["usual"])])
    assert train.main(own, True) == 0 and "(100.0%)" in capsys.readouterr().out  # the student is the given one
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "words"), [(arguments, words) for arguments, *words in REFUSED])
def test_bad_input_is_one_sentence_dry_or_not_and_writes_nothing(
    arguments, words, networks, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    sentence = refused(arguments.format(**networks).split(), capsys)
    assert all(word.format(**networks) in sentence for word in words), sentence
    if not arguments.endswith(UNSEEN):
        with pytest.raises(SystemExit) as stop:
            train.main(parse(arguments.format(**networks).split()), True)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out and err.endswith(sentence)
    assert not any(tmp_path.iterdir())


def test_the_teacher_that_is_trained_does_not_come_among_the_images(networks, monkeypatch, capsys):
    monkeypatch.chdir(networks["photos"])
    sentence = refused(["--data", ".", "--out", str(networks["own"].parent / "new")], capsys)
    assert "the folder of the teacher, runs/teachers/folder32-" in sentence and "lies in --data ." in sentence
    assert not (networks["own"].parent / "new").exists() and not Path("runs").exists()


def test_the_folder_of_a_run_is_taken_again_whatever_a_killed_start_left_in_it():
    left = ([], [".lock"], [".config.json.host-1.part", ".lock"], ["checkpoint.pt"], ["config.json", "notes.txt"])
    for files in left:
        folder = Path("left", str(len(files)) + "".join(files[:1]))
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text('{"kd": ["place"]}')
        checks.check_out(Settings(out=str(folder)))


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(checks, "rank_and_world", lambda: (0, 3))
    assert "--batch-size 32 cannot be split over 3 processes" in refused([], capsys)
