"""The run: what it trains, that it resumes exactly, that it can be split over processes, and what it refuses."""

import contextlib
import copy
import importlib.machinery
import json
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import diffusion
import foreign
import lift_place
import models
import settings
import train
from diffusion import DDPM

ROOT = Path(__file__).parents[1]
# a small teacher (16, 32 channels), few steps, 16 samples: every part of a run in about a second
TINY = ["--channels", "16", "--teacher-steps", "3", "--prune", "0.5", "--steps", "6",
        "--batch-size", "8", "--eval-samples", "16", "--sample-steps", "2", "--log-every", "2", "--save-every", "2",
        "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One working directory for the file: the tiny teacher and the digit classifier are trained once."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *TINY, *arguments]


def run(*arguments: str) -> None:
    assert train.main([*TINY, *arguments]) == 0


def answered(arguments: list[str]) -> None:
    """train.py only answers, and ends without a mistake."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 0


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def log(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the whole run


def test_a_run_leaves_everything_the_readme_lists_and_repeating_it_trains_nothing(capsys):
    arguments = ["--kd", "none", "feat", "place", "--seeds", "0", "1", "--out", "runs/all"]
    run(*arguments)
    out = Path("runs/all")
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "samples.png", "curves.png", "metrics.json",
                 "README.md", "student/place-1/README.md", "student/place-1/model.safetensors"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    metrics = json.loads((out / "metrics.json").read_text())
    students = [(student["method"], student["seed"]) for student in metrics["students"]]
    assert students == [(method, seed) for seed in (0, 1) for method in ("none", "feat", "place")]
    scores = {
        "frechet_pixels",
        "frechet_digits",
        "precision",
        "recall",
        "teacher_mse",
        "saturated",
        "parameters",
        "seconds",
    }
    assert all(scores <= student.keys() for student in metrics["students"])
    assert metrics["students"][0]["parameters"] < metrics["teacher"]["parameters"]
    first = capsys.readouterr().out
    assert "| place (n=2)" in first and "FID" not in first

    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    run(*arguments)
    again = capsys.readouterr().out
    assert "finished" in again and "| place (n=2)" in again
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}

    records = log(out)
    run(*arguments, "--sample-steps", "3")  # only the evaluation differs: sampled again, not trained again
    assert "finished" not in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["settings"]["sample_steps"] == 3
    assert before[out / "checkpoint.pt"] == (out / "checkpoint.pt").stat().st_mtime_ns and log(out) == records


def test_the_log_explains_every_student():
    run("--kd", "none", "lift", "place", "--out", "runs/log", "--eval-samples", "0")
    records = log("runs/log")
    assert [r["step"] for r in records if r["student"] == "place-0"] == [0, 2, 4, 5]
    for record in records:
        assert {"loss", "coarse", "fine", "w", "b0", "b1", "mse", "grad_norm", "lr"} <= record.keys()
        assert record["w"] == pytest.approx(1 - min(1, record["coarse"]), abs=1e-6)


def test_the_log_also_goes_to_wandb_when_asked(monkeypatch):
    lines = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **about: contextlib.nullcontext(
        types.SimpleNamespace(log=lambda line, step: lines.append((line, step)))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(
        "--kd",
        "place",
        "--log",
        "wandb",
        "--teacher",
        "runs/log/student/none-0",
        "--out",
        "runs/wandb",
        "--eval-samples",
        "0",
    )
    assert ({"place-0/w": log("runs/wandb")[-1]["w"]}, 5) in lines


def test_a_student_is_saved_as_its_average_and_teaches_and_starts_other_runs():
    run("--kd", "out", "--out", "runs/first", "--eval-samples", "0")
    saved = models.load("runs/first/student")
    checkpoint = torch.load("runs/first/checkpoint.pt", weights_only=True)
    state = checkpoint["students"]["out-0"]
    assert same(dict(saved.state_dict()), state["ema"])
    assert not same(state["ema"], state["module"])
    run("--kd", "place", "--teacher", "runs/first/student", "--out", "runs/second", "--eval-samples", "0")
    sizes = json.loads(Path("runs/second/metrics.json").read_text())
    assert sizes["teacher"]["parameters"] == sum(p.numel() for p in saved.parameters())


def test_a_given_student_is_trained_instead_of_a_pruned_one():
    run("--kd", "out", "--prune", "0.7", "--out", "runs/small", "--eval-samples", "0")
    run("--kd", "out", "place", "--student", "runs/small/student", "--out", "runs/given", "--eval-samples", "0")
    small = json.loads(Path("runs/small/metrics.json").read_text())["students"][0]["parameters"]
    assert {row["parameters"] for row in json.loads(Path("runs/given/metrics.json").read_text())["students"]} == {small}
    assert not same(weights("runs/given/student/out-0"), weights("runs/small/student"))


def test_taylor_pruning_takes_other_channels_than_magnitude():
    for importance in ("taylor", "magnitude"):
        run(
            "--kd",
            "none",
            "--importance",
            importance,
            "--lr",
            "1e-12",
            "--out",
            f"runs/{importance}",
            "--eval-samples",
            "0",
        )
    assert not same(weights("runs/taylor/student"), weights("runs/magnitude/student"), tolerance=1e-3)


def test_a_folder_of_images_trains_and_is_scored_on_pixels(tmp_path, capsys):
    from PIL import Image

    for i, pixels in enumerate(torch.randint(0, 256, (24, 20, 16, 3), dtype=torch.uint8, generator=torch.Generator())):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    run("--data", str(tmp_path), "--image-size", "8", "--channels", "32", "--prune", "0.3", "--out", "runs/folder")
    metrics = json.loads(Path("runs/folder/metrics.json").read_text())
    assert metrics["students"][0]["frechet_digits"] is None and metrics["students"][0]["frechet_pixels"] > 0
    assert "Frechet digits" not in capsys.readouterr().out


def test_celeba_at_full_size_from_a_ddim_checkpoint(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (8, 218, 178, 3), dtype=torch.uint8, generator=torch.Generator())
    (tmp_path / "files/img_align_celeba").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"files/img_align_celeba/{i:06}.jpg")
    lines = [f"{i:06}.jpg {0 if i < 6 else 2}\n" for i in range(8)]
    (tmp_path / "files/list_eval_partition.txt").write_text("".join(lines))
    teacher = models.UNet(64)
    ema = {f"module.{name}": tensor for name, tensor in teacher.state_dict().items()}
    torch.save([ema, {}, 0, 0, dict(ema)], "ema.ckpt")

    arguments = ["--data", "files", "--teacher", "ema.ckpt", "--prune", "0.9", "--kd", "place", "--out", "runs/celeba"]
    assert train.main(["--dataset", "celeba", "--steps", "2", "--batch-size", "4", "--device", "cpu", *arguments]) == 0
    metrics = json.loads(Path("runs/celeba/metrics.json").read_text())
    sizes = [(row["parameters"], round(row["macs"] / 1e9, 3)) for row in (metrics["teacher"], metrics["students"][0])]
    assert sizes == [(78_700_803, 23.923), (1_312_076, 0.768)]
    assert log("runs/celeba")[-1]["step"] == 1 and 0 < log("runs/celeba")[-1]["mse"] < 10


def test_settings_name_what_the_other_files_hold():
    assert set(settings.CONSTANTS) == set(lift_place.PRESETS) == set(train.FEATURES)
    assert set(settings.PROCESSES) == set(diffusion.PROCESSES) and set(settings.ARCHS) == set(train.KINDS)
    assert {name for name, (kind, _) in diffusion.PROCESSES.items() if kind is diffusion.RectifiedFlow} == {
        *settings.FLOWS
    }
    assert (*foreign.BK_SDM, *foreign.NARROW) == settings.SD_STUDENTS and set(settings.PRECISIONS) == set(train.DTYPES)
    for dataset, arch in settings.SHARED:
        assert settings.preset(dataset, 0.5, arch).get("image_size") == data.DATASETS[dataset].image_size
    assert {dataset for dataset, _ in settings.SHARED} == set(data.DATASETS)


def test_the_command_line_is_read_without_torch():
    code = "import sys, settings; settings.parse(['--dry-run'])"
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules or 'numpy' in sys.modules)); "
    done = subprocess.run([sys.executable, "-c", check + code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    help_ = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "Distil a pruned diffusion student" in help_.stdout and "--fold-steps" in help_.stdout


def test_dry_run_prints_the_resolved_settings_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answered(["--dry-run", "--kd", "none", "place"])
    settings = json.loads(capsys.readouterr().out)
    assert settings["kd"] == ["none", "place"] and settings["steps"] == train.preset("digits", 0.9)["steps"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dataset", "prune", "steps"),  # the rows of the paper's Table 1
    [("celeba", 0.5, 200_000), ("celeba", 0.7, 240_000), ("celeba", 0.9, 500_000),
     ("lsun_bedroom", 0.3, 200_000), ("lsun_bedroom", 0.5, 500_000), ("lsun_bedroom", 0.7, 700_000)],
)  # fmt: skip
def test_every_row_of_table_1_is_a_preset(dataset, prune, steps, capsys):
    answered(["--dataset", dataset, "--prune", str(prune), "--dry-run"])
    settings = json.loads(capsys.readouterr().out)
    assert (settings["steps"], settings["importance"], settings["taylor_threshold"]) == (steps, "taylor", 0)
    assert [settings[f"lambda_{term}"] for term in ("diff", "out", "feat")] == [1, 1, 1e-6]
    assert (
        settings["group_size"] == 16 and settings["constants"] == "diff-pruning" and settings["norm_groups"] == "keep"
    )
    celeba = dataset == "celeba"
    expected = (2e-4, 1.0, 0.9999, 0.1) if celeba else (2e-5, 0.0, 0.999, 0.0)
    assert tuple(settings[name] for name in ("lr", "clip", "ema", "dropout")) == expected
    assert settings["image_size"] == (64 if celeba else 256) and settings["sample_steps"] == 100


def test_a_ratio_between_two_presets_takes_the_next_and_all_are_listed(capsys):
    assert train.Settings(dataset="celeba", prune=0.6).steps == train.Settings(dataset="celeba", prune=0.7).steps
    assert train.Settings(dataset="celeba", prune=0.95).steps == train.Settings(dataset="celeba", prune=0.9).steps
    answered(["--list-presets"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(settings.PRESETS) and "lambda_feat" in lines[0] and "500000" in lines[6]


# ------------------------------------------------------------------------------------------------------- the objective


@pytest.fixture(scope="module")
def outputs():
    """Student output, target, teacher output (4, 2, 8, 8), and two features each."""
    generator = torch.Generator().manual_seed(0)
    three = [torch.randn(4, 2, 8, 8, generator=generator) for _ in range(3)]
    features = [[torch.randn(4, 5, side, side, generator=generator) for side in (8, 4)] for _ in range(2)]
    return three, features


@pytest.mark.parametrize("method", train.METHODS)
def test_the_objective_is_the_papers_sum(method, outputs):
    (student, target, teacher), (own, theirs) = outputs
    settings = train.Settings(kd=(method,), lambda_diff=0.5, lambda_out=0.25)
    distance, features = train.METHODS[method]
    batch = train.Batch(torch.zeros_like(target), target, torch.zeros(4, dtype=torch.int64), {})
    own, theirs = (own, theirs) if features else ([], [])
    loss, parts = train.objective(settings, DDPM(), method, batch, target, student, teacher, own, theirs, None, 2.0)

    def squares(a, b):
        return (a - b).square().flatten(1).sum(1).mean()

    expected = 0.5 * squares(student, target)
    if distance == "mse":
        expected += 0.25 * squares(student, teacher)
    if distance in ("lift", "place"):
        expected += 0.25 * getattr(lift_place, distance)(student, teacher, reduction="sum").loss
    if features:
        expected += 2.0 * sum(squares(a, b) for a, b in zip(own, theirs, strict=True))
    torch.testing.assert_close(loss, expected)
    assert (parts is not None) == (distance in ("lift", "place"))


def test_a_student_does_not_depend_on_its_company():
    run("--kd", "place", "--dropout", "0.2", "--out", "runs/alone", "--eval-samples", "0")
    run(
        "--kd",
        "none",
        "feat",
        "place",
        "--dropout",
        "0.2",
        "--seeds",
        "3",
        "0",
        "--out",
        "runs/together",
        "--eval-samples",
        "0",
    )
    assert same(weights("runs/alone/student"), weights("runs/together/student/place-0"))
    assert not same(weights("runs/alone/student"), weights("runs/together/student/place-3"))


def test_parts_of_a_batch_add_up_to_it():
    arguments = ["--kd", "out", "feat", "--prune", "0", "--lambda-feat", "1e-3", "--eval-samples", "0"]
    run(*arguments, "--out", "runs/one-part")
    run(*arguments, "--accumulate", "3", "--out", "runs/three-parts")  # of 8: 3, 3 and 2
    for name in ("out-0", "feat-0"):
        assert same(
            weights(f"runs/one-part/student/{name}"), weights(f"runs/three-parts/student/{name}"), tolerance=1e-5
        )


def test_half_precision_keeps_weights_and_losses_in_float32():
    run("--kd", "place", "--precision", "bf16", "--out", "runs/half", "--eval-samples", "0")
    run("--kd", "place", "--out", "runs/single", "--eval-samples", "0")
    half, single = weights("runs/half/student"), weights("runs/single/student")
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert not same(half, single)
    first = [log(f"runs/{name}")[0] for name in ("half", "single")]
    assert (
        first[0]["coarse"] == pytest.approx(first[1]["coarse"], rel=0.05) and first[0]["coarse"] != first[1]["coarse"]
    )


def test_adapters_learn_but_are_neither_clipped_nor_averaged_nor_saved():
    settings = train.Settings(kd=("feat",), lr=1e-2, warmup=0, clip=1e-12, lambda_feat=1.0)
    teacher = models.UNet(
        8, 1, channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=8
    )
    tapped = models.Tapped(teacher)
    net = models.prune_channels(teacher, 0.5)
    student = train.Student(settings, "feat", 0, copy.deepcopy(net), tapped)
    before = [adapter.weight.clone() for adapter in student.bare.adapters]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 500])
    output, features = student.module(x, t)
    batch = train.Batch(x, x, t, {})
    loss, _ = train.objective(settings, DDPM(), "feat", batch, x, output, None, features, tapped(x, t)[1], None, 1.0)
    loss.backward()
    assert student.update(settings, 0) > 1e-3  # the norm before clipping
    assert all((a.weight - b).abs().max() > 1e-3 for a, b in zip(student.bare.adapters, before, strict=True))
    assert student.ema.state_dict().keys() == net.state_dict().keys()


def test_the_average_warms_up_then_keeps_its_rate():
    settings = train.Settings(ema=0.5, steps=100)
    net = models.UNet(8, 1, channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=8)
    student = train.Student(settings, "none", 0, net, None)
    expected = student.ema.conv_in.weight.clone()
    for step in range(20):
        student.net.conv_in.weight.grad = torch.ones_like(student.net.conv_in.weight)
        student.update(settings, step)
        rate = min(0.5, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * student.net.conv_in.weight.detach()
    torch.testing.assert_close(student.ema.conv_in.weight, expected)


def test_the_learning_rate_warms_up_and_decays():
    settings = train.Settings(steps=100, warmup=9, decay="cosine")
    rates = [train.lr_factor(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == max(rates) > 0.9 and rates[-1] < 0.001
    assert train.lr_factor(train.Settings(steps=100, warmup=0, decay="constant"), 99) == 1


# --------------------------------------------------------------------------------------------------------- fewer steps

FOLD = ["--fold-steps", "5", "--sample-steps", "5"]


@pytest.fixture
def _no_curves(monkeypatch):
    """Other tests look at curves.png; drawing it takes longer than training."""
    monkeypatch.setattr(train.evaluate, "curves", lambda *_: None)


@pytest.mark.usefixtures("_no_curves")
def test_a_fold_of_a_pruned_student_resumes_exactly_and_is_sampled_in_its_own_steps(monkeypatch, capsys):
    save = train.save_checkpoint

    def save_and_keep(settings, students, folder, step):
        save(settings, students, folder, step)
        if folder.name == "fold" and step == 2:
            Path("runs/fold-went-on").mkdir()
            shutil.copy(folder / "checkpoint.pt", "runs/fold-went-on/checkpoint.pt")

    monkeypatch.setattr(train, "save_checkpoint", save_and_keep)
    arguments = [*FOLD, "--kd", "out", "place"]
    run(*arguments, "--out", "runs/fold")
    run(*arguments, "--out", "runs/fold-went-on", "--eval-samples", "0")
    assert "resumed at step 2 of 6" in capsys.readouterr().out
    for name in ("out-0", "place-0"):
        student = weights(f"runs/fold/student/{name}")
        assert same(student, weights(f"runs/fold-went-on/student/{name}"))
    assert log("runs/fold")[-4:] == log("runs/fold-went-on")[-4:]

    metrics = json.loads(Path("runs/fold/metrics.json").read_text())
    assert [row["method"] for row in metrics["same_steps"]] == ["teacher, 5 steps", "teacher, 5 folded"]
    assert metrics["teacher"]["teacher_mse"] == 0 < metrics["same_steps"][0]["teacher_mse"]
    table = train.evaluate.table(train.evaluate.rows(metrics))
    assert "| place, 5 steps " in table and "| teacher, 5 folded " in table
    assert "teacher DDIM, 50 steps; others DDIM, 5 steps" in metrics["protocol"]
    assert Path("runs/fold/interpolations.png").stat().st_size > 0

    saved = models.load("runs/fold/student/place-0")  # knows how to be sampled
    assert saved.config["fold_steps"] == 5 and train.evaluate.process_of(saved).steps == 5
    noise = train.evaluate.start_noise(16, (1, 8, 8), 0)
    x = DDPM().fold(5).sample(saved, noise.shape, 5, noise=noise)
    teacher = models.load(Path(train.teacher_settings(train.parse(TINY)).out) / "teacher")
    usual = DDPM().sample(teacher, noise.shape, 50, noise=noise)
    row = next(row for row in metrics["students"] if row["method"] == "place")
    assert row["teacher_mse"] == pytest.approx((x - usual).square().mean().item(), rel=1e-4)
    row, (_, folded) = metrics["same_steps"][0], metrics["same_steps"]
    x = DDPM().sample(teacher, noise.shape, 5, noise=noise)
    assert row["teacher_mse"] == pytest.approx((x - usual).square().mean().item(), rel=1e-4)
    x = DDPM().sample(teacher, noise.shape, [999, 799, 599, 399, 199], noise=noise)
    assert folded["teacher_mse"] == pytest.approx((x - usual).square().mean().item(), rel=1e-4)

    # a folded student teaches students of as many or fewer steps
    arguments = ["--kd", "out", "--eval-samples", "0", "--teacher", "runs/fold/student/place-0"]
    run(*arguments, "--fold-steps", "1", "--sample-steps", "1", "--out", "runs/fold-of-fold")
    assert models.load("runs/fold-of-fold/student").config["fold_steps"] == 1
    run(*arguments, "--sample-steps", "5", "--out", "runs/pruned-fold")
    assert models.load("runs/pruned-fold/student").config["fold_steps"] == 5
    for fold, words in ((["--fold-steps", "2"], "take a divisor of 5"), ([], "the teacher has 5 timesteps")):
        assert train.main([*TINY, *fold, *arguments, "--sample-steps", "2" if fold else "6", "--out", "runs/no"]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert train.main([*TINY, "--student", "runs/fold/student/place-0", "--out", "runs/no"]) == 2
    assert "use --fold-steps 5" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("_no_curves")
def test_the_teacher_of_a_fold_sees_its_own_timestep_of_the_same_image(monkeypatch):
    seen, predict = [], train.predict

    def record(module, x_t, t, cond):
        seen.append((x_t, t))
        return predict(module, x_t, t, cond)

    monkeypatch.setattr(train, "predict", record)
    arguments = ["--fold-steps", "7", "--sample-steps", "7", "--steps", "1", "--eval-samples", "0"]
    run(*arguments, "--kd", "out", "place", "--out", "runs/times")
    (x, t), *students = seen
    assert len(students) == 2  # and one teacher pass for both of them
    for own_x, own_t in students:
        assert own_x is x and own_t.max() < 7
        assert t.tolist() == [[141, 284, 427, 570, 713, 856, 999][i] for i in own_t]


def test_the_objective_of_a_fold_is_absolute_errors(outputs):
    (student, target, teacher), (own, theirs) = outputs
    batch, process = (
        train.Batch(torch.zeros_like(target), target, torch.zeros(4, dtype=torch.int64), {}),
        DDPM().fold(9),
    )
    for method, distance in (("out", lambda: (student - teacher).abs().flatten(1).sum(1).mean()),
                             ("place", lambda: lift_place.place(student, teacher, reduction="sum").loss)):  # fmt: skip
        settings = train.Settings(kd=(method,), fold_steps=9, lambda_out=0.25, lambda_hidden=2.0)

        def loss(*features, settings=settings, method=method):
            seen = settings, process, method, batch, target, student, teacher, *features, None, 0.0
            return train.objective(*seen)[0]

        expected = 0.25 * distance() + 2.0 * (own[0] - theirs[0]).abs().mean() * (2 * 8 * 8)
        torch.testing.assert_close(loss(own[:1], theirs[:1]), expected)  # and no term for the data
        torch.testing.assert_close(loss([], []), 0.25 * distance())


def test_the_last_feature_needs_an_adapter_only_where_widths_differ():
    settings = train.Settings(kd=("out",), fold_steps=10)
    teacher = models.UNet(8, 1, channels=16, channel_mults=(1, 2), num_res_blocks=1, norm_groups=8)
    tapped = models.Tapped(teacher, teacher.feature_layers()[-1:])
    assert tapped.names == ["up.0.block.1"]
    for ratio, adapters in ((0.5, 1), (0.0, 0)):
        student = train.Student(settings, "out", 0, models.prune_channels(teacher, ratio), tapped)
        assert len(student.bare.adapters or ()) == adapters
        _, (feature,) = student.module(torch.zeros(2, 1, 8, 8), torch.tensor([0, 9]))
        assert feature.shape == (2, 16, 8, 8)
    assert isinstance(train.Student(settings, "none", 0, teacher, tapped).module, models.UNet)


@pytest.mark.usefixtures("_no_curves")
def test_random_weights_differ_by_seed_and_take_the_pruned_shape():
    arguments = ["--kd", "out", "--lr", "1e-12", "--steps", "1", "--eval-samples", "0", "--importance", "magnitude"]
    run(*arguments, "--out", "runs/init-teacher")
    run(*arguments, "--init", "random", "--seeds", "0", "1", "--out", "runs/init-random")
    folders = ("init-teacher/student", "init-random/student/out-0", "init-random/student/out-1")
    teacher, first, second = (weights(f"runs/{folder}") for folder in folders)
    for a, b in ((teacher, first), (first, second)):
        assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in b.items()}
        assert not same(a, b, tolerance=1e-3)


@pytest.mark.usefixtures("_no_curves")
def test_two_processes_fold_what_one_folds():
    arguments = [*FOLD, "--kd", "out", "place", "--prune", "0", "--eval-samples", "0"]
    run(*arguments, "--out", "runs/fold-one")
    subprocess.run(two_processes(*arguments, "--out", "runs/fold-two"), check=True, capture_output=True, timeout=300)
    for name in ("out-0", "place-0"):
        one, two = (weights(f"runs/fold-{number}/student/{name}") for number in ("one", "two"))
        assert same(one, two, tolerance=1e-5), name


def test_the_published_fold_is_a_preset(capsys):
    answered(["--dataset", "cifar10", "--prune", "0", "--fold-steps", "125", "--kd", "out", "--dry-run"])
    settings = json.loads(capsys.readouterr().out)
    expected = {"steps": 10_000, "batch_size": 50, "lr": 2e-4, "ema": 0, "init": "random", "sample_steps": 125,
                "lambda_diff": 0, "lambda_out": 1, "lambda_hidden": 1}  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert train.Settings(fold_steps=5).init == "teacher" and train.Settings().lambda_diff == 1


# --------------------------------------------------------------------------------------------------- resume, processes


def test_a_killed_run_resumes_bit_for_bit():
    arguments = ["--kd", "feat", "place", "--dropout", "0.1", "--steps", "40", "--eval-samples", "0"]
    run(*arguments, "--out", "runs/whole")
    checkpoint = Path("runs/killed/checkpoint.pt")
    process = subprocess.Popen(command(*arguments, "--out", "runs/killed"), stderr=subprocess.DEVNULL)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()  # SIGKILL: no chance to tidy up
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 40
    run(*arguments, "--out", "runs/killed")
    for name in ("feat-0", "place-0"):
        assert same(weights(f"runs/whole/student/{name}"), weights(f"runs/killed/student/{name}"))
    assert log("runs/whole") == log("runs/killed")


def test_a_signal_saves_the_step_that_was_reached():
    arguments = ["--kd", "place", "--steps", "4000", "--save-every", "4000", "--out", "runs/signal"]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    while not Path("runs/signal/log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in text
    assert torch.load("runs/signal/checkpoint.pt", weights_only=True)["step"] > 0


def two_processes(*arguments: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*torchrun, *command(*arguments)[1:]]


def test_two_processes_train_what_one_trains():
    # unpruned: before a norm of one channel per group a bias has no gradient but rounding, which Adam blows up
    arguments = ["--kd", "out", "feat", "place", "--prune", "0", "--lambda-feat", "1e-3", "--eval-samples", "0"]
    run(*arguments, "--out", "runs/one")
    subprocess.run(two_processes(*arguments, "--out", "runs/two"), check=True, capture_output=True, timeout=300)
    for name in ("out-0", "feat-0", "place-0"):
        assert same(weights(f"runs/one/student/{name}"), weights(f"runs/two/student/{name}"), tolerance=1e-5), name
    one = [r for r in log("runs/one") if r["student"] == "place-0"]
    two = [r for r in log("runs/two") if r["student"] == "place-0"]
    assert [r["w"] for r in two] == pytest.approx([r["w"] for r in one], rel=1e-3)  # one weight for the whole batch


def test_two_processes_resume_what_one_began(monkeypatch):
    arguments = ["--kd", "feat", "place", "--prune", "0", "--eval-samples", "0"]
    save = train.save_checkpoint

    def save_and_keep(settings, students, folder, step):
        save(settings, students, folder, step)
        if folder.name == "began" and step == 2:
            Path("runs/went-on").mkdir()
            shutil.copy(folder / "checkpoint.pt", "runs/went-on/checkpoint.pt")

    monkeypatch.setattr(train, "save_checkpoint", save_and_keep)
    run(*arguments, "--out", "runs/began")
    done = subprocess.run(
        two_processes(*arguments, "--out", "runs/went-on"), check=True, capture_output=True, text=True
    )
    assert "resumed at step 2 of 6" in done.stdout
    for name in ("feat-0", "place-0"):
        assert same(weights(f"runs/began/student/{name}"), weights(f"runs/went-on/student/{name}"), tolerance=1e-5)


def test_a_batch_is_a_function_of_seed_and_step_whatever_part_of_it_a_process_takes():
    pixels = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8) + torch.arange(
        8, dtype=torch.uint8
    )

    labels, net = torch.arange(32), models.DiT(8, 2, 1, 8, 1, 2, num_classes=32, class_dropout_prob=0.5)

    def draw(seed, step, rows=slice(None)):
        settings, cond = train.Settings(seed=seed), {"y": labels[rows]}
        drawn = train.batch(settings, pixels[rows], cond, rows, True, DDPM(), step, torch.device("cpu"), net)
        return [*drawn[:3], drawn.cond["y"]]

    whole = draw(1, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, draw(1, 7), strict=True))
    assert all(torch.equal(a[8:16], b) for a, b in zip(whole, draw(1, 7, slice(8, 16)), strict=True))
    for other in (draw(2, 7), draw(1, 8)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    dropped = whole[3] == 32
    assert 4 < dropped.sum() < 28 and torch.equal(whole[3][~dropped], labels[~dropped])


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prune", "1.2"], ["--prune 1.2", "below 1"]),
        (["--prune", "-0.1"], ["--prune -0.1", "at least 0"]),
        (["--kd", "plaice"], ["--kd plaice", "did you mean place"]),
        (["--kd", "place", "place"], ["--kd", "once"]),
        (["--dataset", "cleba"], ["--dataset cleba", "digits"]),
        (["--data", "/nowhere"], ["/nowhere", "folder"]),
        (["--teacher", "/nowhere"], ["/nowhere", "network"]),
        (["--steps", "0"], ["--steps 0", "at least 1"]),
        (["--eval-samples", "3"], ["--eval-samples 3", "at least 6"]),
        (["--fold-steps", "0"], ["--fold-steps 0", "at least 1 and at most 1000"]),
        (["--fold-steps", "-5"], ["--fold-steps -5", "at least 1 and at most 1000"]),
        (["--fold-steps", "1001"], ["--fold-steps 1001", "at least 1 and at most 1000"]),
        (["--fold-steps", "ten"], ["--fold-steps", "ten"]),
        (["--fold-steps", "10", "--sample-steps", "11"], ["--sample-steps 11", "at most 10"]),
        (["--fold-steps", "10", "--kd", "feat"], ["--kd feat", "none, out, lift, place"]),
        (["--fold-steps", "10", "--kd", "none"], ["--kd none", "--lambda-diff 1"]),
        (["--fold-steps", "10", "--arch", "dit"], ["--fold-steps", "--arch unet"]),
        (["--prune", "0", "--seeds", "0", "1"], ["--seeds", "--init random"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--group-size", "7"], ["7", "64", "2, 4, 8, 16, 32, 64"]),
        (["--image-size", "12"], ["8 or 16", "12"]),
        (["--seeds", "0", "1", "--importance", "magnitude"], ["--seeds", "--importance random"]),
        (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
        (["--lr", "nan"], ["--lr nan", "above 0"]),
        (["--schedule", "liner"], ["did you mean linear"]),
        (["--bogus"], ["--bogus"]),
        (["--dataset", "lsun_church"], ["church_outdoor_train_lmdb", "--data"]),
        (["--log", "wandb"], ["--log wandb", "pip install wandb"]),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("train.py: error: ")
    assert all(word in err for word in words), err
    assert not any(tmp_path.iterdir())


def test_a_truncated_checkpoint_is_kept_aside_and_the_run_can_go_on(capsys):
    arguments = ["--kd", "place", "--out", "runs/truncated", "--eval-samples", "0"]
    run(*arguments)
    Path("runs/truncated/metrics.json").unlink()
    path = Path("runs/truncated/checkpoint.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert train.main([*TINY, *arguments]) == 2
    err = capsys.readouterr().err
    (aside,) = path.parent.glob("checkpoint.pt.broken-*")
    assert str(path) in err.splitlines()[-1] and str(aside) in err and "step 0" in err
    assert aside.stat().st_size == len(whole) // 2
    run(*arguments)
    assert torch.load(path, weights_only=True)["step"] == 6


def test_a_damaged_teacher_is_refused_before_anything_is_trained(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(train.teacher_settings(train.parse(TINY)).out)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    assert train.main(TINY) == 2
    assert str(folder / "checkpoint.pt") in capsys.readouterr().err and not (tmp_path / train.parse(TINY).out).exists()


def test_a_checkpoint_of_other_settings_is_refused_by_name_and_left_alone(capsys):
    arguments = ["--kd", "place", "--out", "runs/other", "--eval-samples", "0"]
    run(*arguments)
    before = Path("runs/other/checkpoint.pt").read_bytes()
    assert train.main([*TINY, *arguments, "--lr", "0.001", "--clip", "2"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--lr was 0.005, is 0.001" in err and "--clip was 1.0, is 2.0" in err and "--steps" not in err
    assert Path("runs/other/checkpoint.pt").read_bytes() == before


def test_a_teacher_that_does_not_fit_the_data_is_refused(capsys):
    net = models.UNet(16, 3, channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=8)
    net.save("runs/rgb")
    assert train.main([*TINY, "--teacher", "runs/rgb", "--out", "runs/unfit"]) == 2
    assert "samples of shape (3, 16, 16), but the data is (1, 8, 8)" in capsys.readouterr().err
    assert not Path("runs/unfit").exists()
