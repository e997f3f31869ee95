"""What a run starts from: batches, the run of its teacher, the networks of its students, what an earlier run left."""

import errno
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, a_unet, same
from PIL import Image

from distil import data, machine, prepare, teachers
from distil.metrics import parameters
from distil.prepare import Run, batches, draw, smaller, start_of, teacher_settings
from distil.process import DDPM
from distil.settings import DEPTH_METHODS, OPEN, Settings, parse, plain, restored
from models import DiT, UNet, prune_depth

CPU = torch.device("cpu")


def some_latents(n=24) -> data.Images:
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((n, 2, 4, 8, 8), np.float32)
    return data.Images(latents, np.arange(n) % 2, "latents")


def a_run(settings: Settings, images: data.Images) -> Run:
    return Run(settings, CPU, images, *[None] * 6)


def a_teacher(depth=6) -> DiT:
    torch.manual_seed(0)
    net = DiT(8, 2, 4, 16, depth, 2, num_classes=2)
    for p in net.parameters():
        if p.requires_grad:  # with adaLN-Zero its blocks would do nothing
            torch.nn.init.normal_(p, std=0.15)
    return net.eval()


def the_loss(output, batch):
    return (output[:, :4] - batch.target).square().mean()


# ---- Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_whatever_part_of_it_a_process_takes():
    ramp = torch.arange(8, dtype=torch.uint8)
    pixels = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8) + ramp
    labels, net = torch.arange(32), DiT(8, 2, 1, 8, 1, 2, num_classes=32, class_dropout_prob=0.5)

    def drawn(seed, step, rows=slice(None)):
        cond = {"y": labels[rows], "unused": labels}
        batch = draw(Settings(seed=seed, flip=True), pixels[rows], cond, DDPM(), net, step, rows=rows)
        assert torch.equal(batch.x_t, DDPM().add_noise(batch.x0, batch.noise, batch.t))
        assert torch.equal(batch.target, batch.noise)
        return [*batch[:5], batch.cond["y"]]

    def equal(a, b):
        return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    whole = drawn(1, 7)
    assert all(equal(whole, drawn(1, 7)))
    assert all(equal([x[8:16] for x in whole], drawn(1, 7, slice(8, 16))))
    assert not any(equal(whole, drawn(2, 7)) + equal(whole, drawn(1, 8)))
    dropped = whole[5] == 32
    assert 4 < dropped.sum() < 28 and torch.equal(whole[5][~dropped], labels[~dropped])
    mirrored = whole[0][:, 0, 0, 0] > whole[0][:, 0, 0, -1]
    assert 4 < mirrored.sum() < 28 and whole[0].abs().max() <= 1
    batch = draw(Settings(), pixels, {"y": labels}, DDPM(), a_unet(), 0)
    assert torch.equal(batch.x0, data.to_float(pixels)) and batch.cond == {}
    part = prepare.Batch(*whole[:5], {"y": whole[5]}).part(slice(3, 5))
    assert all(equal([x[3:5] for x in whole], [*part[:5], part.cond["y"]]))


def test_a_step_sees_the_latents_of_images_and_mirror_images(monkeypatch):
    latents, settings = some_latents(), Settings(dataset="latents", data="x", batch_size=64, channels=24)
    net = prepare.new_network(settings, latents)
    assert (net.shape, net.num_classes, len(net.blocks)) == ((4, 8, 8), 2, 12)
    pixels, cond = next(data.batches(latents, 64, 0))
    batch = draw(settings, pixels, cond, DDPM(), net, 0)
    sides = [[torch.equal(x, side) for side in pair] for x, pair in zip(batch.x0, pixels, strict=True)]
    assert all(a != b for a, b in sides) and 10 < sum(b for _, b in sides) < 54
    assert set(batch.cond["y"].tolist()) == {0, 1, 2}  # 2: no class
    whole = list(itertools.islice(batches(settings, latents, DDPM(), net), 3))
    assert torch.equal(whole[0].x0, batch.x0)
    monkeypatch.setattr(prepare, "rank_and_world", lambda: (1, 4))  # of 64 rows the second process has 16 to 31
    for step, part in zip((1, 2), batches(settings, latents, DDPM(), net, start=1), strict=False):
        assert torch.equal(part.x_t, whole[step].x_t[16:32]) and torch.equal(
            part.cond["y"], whole[step].cond["y"][16:32]
        )
    plain_batch = next(batches(settings, latents, DDPM(), net, whole=True))  # what pruning learns from
    assert torch.equal(plain_batch.x0, pixels[:, 0])


# ---- Teachers --------------------------------------------------------------------------------------------------------


TEACHERS = {
    "": "digits8-2c8cece3",
    "--arch dit": "digits8-1e5948fb",
    "--process flow": "digits8-779d870e",
    "--image-size 16 --channels 32 --teacher-steps 9": "digits16-122ed962",
    "--dataset celeba --prune 0.5 --teacher train": "celeba64-b667e6a1",
    "--dataset latents --data x": "latents-6ea9d9ac",
    "--dataset cifar10 --prune 0 --fold-steps 125 --kd out --teacher train": "cifar1032-a0897735",
}


def test_a_teacher_is_kept_where_earlier_runs_look_for_it():
    """The names are those of runs before this file was written: their teachers are found again."""
    for arguments, folder in TEACHERS.items():
        own = teacher_settings(parse(arguments.split()))
        assert own.out == f"runs/teachers/{folder}" and (own.kd, own.prune, own.lambda_diff) == (("none",), 0.0, 1.0)
    default = teacher_settings(parse([])).out
    for same_teacher in (
        "--kd out --prune 0.5 --steps 7 --lr 1",
        "--fold-steps 5 --kd out",
        "--device cpu --save-every 9",
    ):
        assert teacher_settings(parse(same_teacher.split())).out == default
    for other in ("--seed 1", "--channels 32", "--teacher-steps 9", "--process flow", "--teacher-lr 1", "--clip 2"):
        assert teacher_settings(parse(other.split())).out != default


@pytest.fixture
def on_gpu(monkeypatch):
    """A command line on a machine with a GPU and 10,000 images."""
    monkeypatch.setattr(data, "image_files", lambda folder: ["a.png"] * 10_000)
    return lambda *arguments: prepare.sized(parse(list(arguments)), torch.device("cuda"))


def gray(size: int, channels: int = 1) -> data.Images:
    return data.Images(np.zeros((8, channels, size, size), np.uint8), None, "folder")


@pytest.mark.parametrize(
    ("arguments", "mults", "groups"),
    [
        ("", (1, 2, 2, 2), None),  # as published: 32 of 128 channels
        ("--channels 32", (1, 2, 2, 2), 8),
        ("--channels 32 --image-size 28", (1, 2, 2), 8),
        ("--channels 20 --image-size 16 --channel-mults 1,2", (1, 2), 5),
        ("--channels 32 --teacher-norm-groups 4 --image-size 30", (1, 2), 4),
        ("--channels 8 --image-size 33 --channel-mults 1", (1,), 2),
        ("--dataset celeba --teacher train --channels 64", (1, 2, 2, 2, 4), 16),
        ("--dataset digits --channels 32 --data", (1, 2), 8),  # which says so itself
    ],
)
def test_a_network_of_our_own_fits_its_width_and_its_images(arguments, mults, groups, on_gpu):
    where = [] if "digits" in arguments else ["--data", "x"]
    settings = on_gpu(*arguments.removesuffix(" --data").split(), *where)
    config = prepare.network_config(settings)
    assert (tuple(config["channel_mults"]), config.get("norm_groups")) == (mults, groups)
    with torch.device("meta"):
        net = prepare.new_network(settings, gray(settings.image_size))
    assert net.shape == (1, settings.image_size, settings.image_size)
    assert {norm.num_groups for norm in net.norms().values()} == {groups or 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 33", "--image-size 33 cannot be halved, .*: use --image-size 32, or one level with"),
        ("--image-size 28 --channel-mults 1,2,2,2", "image_size 28 cannot be halved 3 times"),
        ("--channels 20 --teacher-norm-groups 8", "cannot be split into 8 groups"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(arguments, message, on_gpu):
    settings = on_gpu("--data", "x", *arguments.split())
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        prepare.new_network(settings, gray(settings.image_size))


def test_gray_images_are_gray_for_a_teacher_of_our_own_and_otherwise_what_the_teacher_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gray").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(f"gray/{i}.png")
    for channels in (1, 3):
        UNet(8, channels, channels=8, channel_mults=(1, 2), norm_groups=4).save(f"net{channels}")
    torch.save(UNet(8, 3, channels=8, channel_mults=(1, 2), norm_groups=4).state_dict(), "net.pth")
    found = []
    for teacher in ("train", "net1", "net3", "net.pth"):
        settings = Settings(data="gray", image_size=8, channels=8, teacher=teacher)
        given = prepare.open_network("teacher", settings)
        found.append(prepare.open_data(settings, given and given.channels)[0].shape[0])
    assert found == [1, 1, 3, 3]


def test_another_shape_or_other_groups_are_another_teacher(on_gpu):
    others = ("", "--channels 32", "--channel-mults 1,2", "--teacher-norm-groups 8", "--teacher-norm-groups 16")
    own = [teacher_settings(on_gpu("--data", "x", *more.split())) for more in others]
    assert len({settings.out for settings in own}) == 5
    assert prepare.network_config(own[2])["channel_mults"] == (1, 2) and own[3].teacher_norm_groups == 8


def test_a_teacher_of_norms_of_one_channel_and_little_pruning_are_said(capsys, monkeypatch):
    settings = Settings(channels=8, prune=0.9, importance="random")
    prepare.check_students(settings, data.load("digits"), None, None)
    assert "6 norms of the teacher have one channel a group" in capsys.readouterr().err
    run = a_run(settings, data.load("digits"))
    prepare.of_channels(run, a_unet(), DDPM(), None, 0)
    err = capsys.readouterr().err
    assert "--prune 0.9 leaves 8% of the parameters instead of about 1%, for no norm loses a group" in err
    torch.manual_seed(0)
    prepare.of_channels(run, UNet(8, 1, channels=32, channel_mults=(1, 2), norm_groups=4), DDPM(), None, 0)
    prepare.check_students(Settings(), data.load("digits"), None, None)
    assert not capsys.readouterr().err


def test_the_size_of_a_run_on_a_folder_follows_the_device_and_the_number_of_images(monkeypatch):
    names = [f"{i}.png" for i in range(300)]
    monkeypatch.setattr(data, "image_files", lambda folder: names)
    open_, cuda = parse(["--data", "x", "--lr", "0.1"]), torch.device("cuda")
    assert (open_.steps, open_.image_size, open_.lr) == (None, None, 0.1)
    small, large = prepare.sized(open_, CPU), prepare.sized(open_, cuda)
    assert (small.lr, small.out, small.image_size, small.channels) == (
        0.1,
        "runs/folder-prune0.9-place-data=x-lr0.1",
        32,
        32,
    )
    assert (large.channels, large.steps, large.batch_size, large.channel_mults) == (64, 10_000, 64, None)
    names *= 100
    full = prepare.sized(parse(["--data", "x", "--seed", "3"]), cuda)
    assert full.channels == 128 and teacher_settings(full).out == "runs/teachers/folder64-c226ae90"  # as ever
    wide = prepare.sized(parse(["--data", "x", "--channels", "48", "--steps", "7"]), CPU)
    assert (wide.channels, wide.channel_mults, wide.teacher_norm_groups, wide.steps) == (48, None, None, 7)
    for settings in (small, large, wide):
        assert None not in {getattr(settings, name) for name in OPEN} and prepare.sized(settings, CPU) == settings
        assert teacher_settings(settings).lr == settings.teacher_lr
    assert prepare.sized(Settings(), cuda) == Settings()
    teacher, student = prepare.sketch(small, prepare.pretended(small))
    assert (len(student.conv_in.weight), student.conv_in.weight.device.type) == (4, "meta")  # of 32
    assert 0.01 < parameters(student) / parameters(teacher) < 0.02


def test_a_dry_run_says_what_there_is_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_unet().save("net")
    (tmp_path / "x").mkdir()
    last = {
        "--channels 16": ["digits; what is not in data/", "is trained first, 1,700 steps", "1,500 steps of 32 images"],
        "--teacher net": ["digits", "teacher: net", "; students "],
        "--teacher nope.pth": ["digits", "nope.pth is missing"],
        "--dataset celeba --data y": [
            "y is missing",
            "is missing: it is that of https",
            "teacher 78,700,803 parameters",
        ],
        "--dataset imagenet --data x": ["data: x", "DiT-XL-2-256x256.pt is missing"],
        "--dataset latents --arch sd --data x --teacher a/b": [
            "data: x",
            "a/b is no folder here, so it is taken from the",
        ],
    }
    for arguments, words in last.items():
        lines = prepare.dry_run(parse([*arguments.split(), "--device", "cpu"])).splitlines()
        told = lines[lines.index("}") + 1 :]
        assert len(told) == len(words) and all(map(str.__contains__, told, words)), told
    assert "1,312,076 (1.7%)" in prepare.dry_run(parse(["--dataset", "celeba"]))
    line = prepare.dry_run(parse(["--head", "statistics"])).splitlines()[-1]
    assert line.startswith("images of 1x8x8; teacher ") and "; students 41,674 (1.6%), " in line  # none is counted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "x"]


@pytest.mark.parametrize("flow", [True, False])
def test_a_flow_predicts_no_variance(flow):
    settings = Settings(arch="dit", process="flow" if flow else "ddpm")
    net = prepare.new_network(settings, data.load("digits"))
    assert net.predicts_variance is not flow and net.num_classes == 10


# ---- Students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_every_way_to_choose_blocks(method, capsys):
    teacher, latents = a_teacher(), some_latents()
    given = {"prune": 0.5, "depth_method": method, "depth_steps": 2, "batch_size": 8}
    settings = Settings(dataset="latents", data="x", seeds=(0, 1) if method == "random" else (0,), **given)
    nets = smaller(a_run(settings, latents), teacher, DDPM(), the_loss)
    lines = capsys.readouterr().out.splitlines()
    kept = [[int(i) for i in line.partition("blocks ")[2].partition(" of 6")[0].split(", ")] for line in lines]
    assert [len(net.blocks) for net in nets] == [3] * len(settings.seeds)
    assert all(same(net, prune_depth(teacher, keep)) for net, keep in zip(nets, kept, strict=True))
    if method in ("uniform", "first"):
        assert kept == [[0, 2, 5] if method == "uniform" else [0, 1, 2]]
    if method in ("random", "shortgpt"):
        assert all(keep[-1] == 5 for keep in kept) and kept == sorted(kept)
    run = a_run(settings, latents)
    run.checkpoint = {}  # which brings its own weights: nothing is measured again, and nothing is said
    assert len(smaller(run, teacher, DDPM(), None)[0].blocks) == 3 and not capsys.readouterr().out


def test_blocks_may_be_named_and_a_student_given():
    teacher, latents = a_teacher(), some_latents()
    run = a_run(Settings(dataset="latents", data="x", keep=(0, 2, 5)), latents)
    assert same(smaller(run, teacher, DDPM(), None)[0], prune_depth(teacher, [0, 2, 5]))
    run.student = a_teacher(2)
    assert smaller(run, teacher, DDPM(), None) == [run.student]


def test_channels_are_drawn_or_measured():
    teacher, images, process = a_unet(), data.load("digits"), DDPM()
    teacher.requires_grad_(True)

    def pruned(importance, steps=2, **changes):
        settings = Settings(importance=importance, prune=0.5, steps=steps, batch_size=4, **changes)
        return smaller(a_run(settings, images), teacher, process, None)

    first, second = pruned("random", seeds=(0, 1))
    assert not same(first, second) and same(first, pruned("random")[0])
    nets = [first, pruned("magnitude")[0], pruned("taylor", taylor_steps=2)[0]]
    assert not any(same(a, b) for a, b in ((nets[0], nets[1]), (nets[1], nets[2]), (nets[0], nets[2])))
    assert len({tuple(tuple(x.shape) for x in net.parameters()) for net in nets}) == 1
    scaled = pruned("magnitude", norm_groups="scale")[0]
    assert [len(x) for x in scaled.parameters()] == [len(x) for x in first.parameters()]


@pytest.mark.parametrize(
    ("given", "images", "timesteps"),
    [({"dataset": "celeba"}, 64, range(1000)), ({"dataset": "lsun_bedroom"}, 4, range(1000)),
     ({"importance": "taylor", "batch_size": 6, "steps": 3}, 6, range(1000)),
     ({"importance": "taylor", "taylor_batch": 2, "taylor_steps": 4}, 2, range(0, 1000, 250))],
)  # fmt: skip
def test_importance_is_that_of_the_published_batch_and_of_all_timesteps(given, images, timesteps, monkeypatch):
    seen, teacher = [], a_unet()
    teacher.requires_grad_(True)
    monkeypatch.setattr(
        prepare.importance,
        "accumulate_gradients",
        lambda net, process, x0, noise, thr, times, **_: seen.append((len(x0), len(noise), thr, list(times))),
    )
    monkeypatch.setattr(prepare, "prune_channels", lambda net, *_, **__: net)
    smaller(a_run(Settings(**given), data.load("digits")), teacher, DDPM(), None)
    assert seen == [(images, images, 0.0, list(timesteps))]


@pytest.mark.parametrize("net", [a_unet(), a_teacher()], ids=["unet", "dit"])
def test_a_student_starts_as_the_settings_say(net):
    net.eval().requires_grad_(False)
    run = a_run(Settings(dropout=0.3, fold_steps=5, kd=("out",)), data.load("digits"))
    student = start_of(run, net, 0, {"fold": [0, 500]})
    assert same(student, net) and student.process == {"fold": [0, 500]} and net.process == {}
    assert {name for name, p in student.named_parameters() if not p.requires_grad} <= {"pos_embed"}
    assert not any(p.requires_grad for p in net.parameters())
    rates = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates <= {0.3} and student.config.get("dropout", 0.3) == 0.3 and net.config.get("dropout", 0.0) == 0.0
    run = a_run(Settings(init="random"), data.load("digits"))
    drawn = [start_of(run, net, seed, {}) for seed in (0, 0, 1)]
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2]) and not same(drawn[0], net)
    assert [x.shape for x in drawn[0].parameters()] == [x.shape for x in net.parameters()]


@pytest.mark.parametrize(("prune", "depth", "count"), [(0.5, 14, 340_457_504), (0.75, 7, 173_121_440),
                                                       (6 / 7, 4, 101_405_984)])  # fmt: skip
def test_the_students_of_table_3_have_their_published_size(prune, depth, count):
    settings = Settings(dataset="imagenet", prune=prune, depth_method="uniform")
    latents = data.Images(np.zeros((1, 2, 4, 32, 32), np.float32), np.zeros(1, np.int64), "imagenet")
    with torch.device("meta"):
        teacher = prepare.new_network(settings, latents)
    (student,) = smaller(a_run(settings, latents), teacher, DDPM(), None)
    assert len(student.blocks) == depth and parameters(student) == count


# ---- What an earlier run left ----------------------------------------------------------------------------------------


def test_a_finished_run_is_recognised_and_another_one_refused(tmp_path):
    settings = Settings(out=str(tmp_path))
    about = images_of().about

    def read_checkpoint(settings, folder):
        return prepare.read_checkpoint(settings, folder, about)

    assert read_checkpoint(settings, tmp_path) is None and prepare.read_metrics(settings, tmp_path) is None
    rows = {"teacher": {}, "students": [], "protocol": ""}
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": plain(settings), **rows}))
    torch.save({"step": 3, "settings": plain(settings), "students": {}}, tmp_path / "checkpoint.pt")
    watched = {"out": "elsewhere", "device": "cpu", "log": "wandb", "log_every": 7, "save_every": 9, "preview_every": 3}
    assert prepare.read_metrics(Settings(**watched), tmp_path)["settings"] == plain(settings)
    for sampled in ({"sample_steps": 7}, {"eta": 1.0}, {"eval_samples": 0}, {"clip_x0": True}, {"guidance": 2.0}):
        other = Settings(**sampled)
        assert prepare.read_metrics(other, tmp_path) is None and read_checkpoint(other, tmp_path)["step"] == 3
    older = {name: value for name, value in plain(settings).items() if name not in ("ema_warmup", "timesteps",
             "halve_group_size", "lift_per", "taylor_batch", "taylor_steps", "sampler")}  # fmt: skip
    torch.save({"step": 3, "settings": older, "students": {}}, tmp_path / "checkpoint.pt")
    assert read_checkpoint(settings, tmp_path)["step"] == 3
    with pytest.raises(ValueError, match=r"--ema-warmup was True, is False, --timesteps was antithetic, is uniform\)"):
        read_checkpoint(Settings(ema_warmup=False, timesteps="uniform"), tmp_path)
    for read in (prepare.read_metrics, read_checkpoint):
        with pytest.raises(ValueError, match=r"--lr was 0.005, is 0.001, --clip was 1.0, is 2.0\): give the former"):
            read(Settings(lr=0.001, clip=2.0), tmp_path)


RUNS = sorted((ROOT / "benchmarks").rglob("metrics.json"))


@pytest.mark.parametrize("path", RUNS, ids=[path.parent.name for path in RUNS])
def test_the_settings_of_every_committed_run_can_be_used(path):
    former = json.loads(path.read_text("utf-8"))["settings"]
    with pytest.raises(ValueError, match="--lr was"):
        prepare.refuse_other_settings(replace(restored(former), lr=0.5), former, path)


@pytest.mark.parametrize("command", ["", "--data photos --image-size 32", "--fold-steps 10 --kd out --fold-end last"])
@pytest.mark.parametrize("name", ["flip", "head", "timesteps", "ema_warmup", "lift_per", "sampler", "fold_end"])
def test_the_run_of_an_earlier_version_without_a_setting_is_no_other_run(command, name):
    now = parse(command.split())
    former = plain(now)
    del former[name]
    prepare.refuse_other_settings(now, former, Path("checkpoint.pt"))


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone_and_a_wrong_one_refused(tmp_path, monkeypatch):
    settings, about, path = Settings(out=str(tmp_path)), images_of().about, tmp_path / "checkpoint.pt"
    content = {"step": 3, "settings": plain(settings), "data": about, "students": {}}
    torch.save(content, path)
    for seal in (False, True):  # the first is of an earlier version
        if seal:
            machine.seal(path)
        assert prepare.read_checkpoint(settings, tmp_path, about)["step"] == 3
        passing = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.EMFILE, errno.EACCES)]
        for error in (*passing, MemoryError(), RuntimeError("can't allocate memory")):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
                with pytest.raises(OSError, match=r"cannot be read now .*it was left as it is"):
                    prepare.read_checkpoint(settings, tmp_path, about)
            assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(ValueError, match=r"the data has changed since .*\(8 images then, 9 now\): bring them back"):
        prepare.read_checkpoint(settings, tmp_path, about | {"images": 9})
    with pytest.raises(ValueError, match=r"\(8 images then, 8 now, but not the same\)"):
        prepare.read_checkpoint(settings, tmp_path, about | {"fingerprint": "another"})
    wrong = ([], {}, 7, content | {"step": 10**9}, content | {"step": -1}, content | {"step": "x"},
             content | {"students": []}, content | {"settings": None})  # fmt: skip
    for other in wrong:
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"checkpoint.pt .*: move it away, or give another --out"):
            prepare.read_checkpoint(settings, tmp_path, about)
    for other in ("[]", "7", "{", '{"settings": {}}', "[" * 100_000):
        (tmp_path / "metrics.json").write_text(other)
        with pytest.raises(ValueError, match=r"metrics.json is .*: remove it, and the same command evaluates again"):
            prepare.read_metrics(settings, tmp_path)


# ---- What the data does not know -------------------------------------------------------------------------------------


def images_of(n: int = 8, **more) -> data.Images:
    return data.Images(np.zeros((n, 1, 8, 8), np.uint8), None, "folder", **more)


class OtherVae:
    """Stands for a VAE whose latents are not those of the data."""

    def __init__(self, where, device):
        self.where = where

    def check(self, record):
        raise ValueError(f"{self.where} did not make them")


def test_what_the_data_does_not_know_is_asked_for(monkeypatch):
    settings = Settings(data="pictures", image_size=8, eval_samples=9)
    prepare.check_conditions("--teacher X", (), "pictures", images_of())
    with pytest.raises(
        ValueError, match="--teacher X needs classes, and pictures has none: put its images into one fo"
    ):
        prepare.check_conditions("--teacher X", ("y",), "pictures", images_of())
    with pytest.raises(ValueError, match="--teacher X needs captions, and pictures has none: make its latents with"):
        prepare.check_conditions("--teacher X", ("text",), "pictures", images_of())
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: images_of(5))
    with pytest.raises(ValueError, match="pictures holds 5 images, too few to compare samples with"):
        prepare.open_data(settings)
    assert len(prepare.open_data(Settings(data="pictures", eval_samples=0, group_size=8))[0].images) == 5


def test_latents_are_shown_by_the_vae_that_made_them_and_by_no_other(monkeypatch):
    monkeypatch.setattr(prepare.text_to_image, "Vae", OtherVae)
    settings = Settings(dataset="latents", data="latents", eval_samples=8)
    assert prepare.open_vae(settings, images_of(), CPU) is None  # pixels
    with pytest.raises(ValueError, match="does not say which VAE made its latents: name it with --vae"):
        prepare.open_vae(settings, images_of(record={"vae": None}), CPU)
    with pytest.raises(ValueError, match="mine did not make them"):
        prepare.open_vae(settings, images_of(record={"vae": "mine"}), CPU)


def test_a_folder_may_be_called_as_a_student_of_stable_diffusion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        prepare.open_network("student", Settings(student="tiny"))
    a_unet(3).save("tiny")
    for name in ("student", "teacher"):
        assert same(prepare.open_network(name, Settings(**{name: "tiny"})).build(None), a_unet(3))
    assert prepare.open_network("student", Settings(arch="sd", dataset="latents", student="tiny")) is None


def test_a_student_has_no_more_blocks_than_its_teacher():
    settings = Settings(dataset="latents", data="latents", student="mine")
    prepare.check_students(settings, some_latents(), a_teacher(4), a_teacher(4))
    with pytest.raises(ValueError, match="--student mine has 6 blocks, its teacher 4: use a student with at most as m"):
        prepare.check_students(settings, some_latents(), a_teacher(4), a_teacher(6))


def test_a_head_is_for_networks_that_can_have_one(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    net = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    net.save_pretrained(tmp_path)
    foreign, digits = teachers.load(tmp_path), data.load("digits")
    settings = Settings(head="statistics", norm_groups="keep")
    with pytest.raises(ValueError, match="but the students are of UNet2DModel: leave it out"):
        prepare.check_students(settings, digits, foreign, None)
    given = Settings(head="statistics", norm_groups="keep", student="mine", lambda_feat=0.0)
    with pytest.raises(ValueError, match="but the student is of UNet2DModel: leave it out"):
        prepare.check_students(given, digits, None, foreign)
    prepare.check_students(given, digits, foreign, a_unet())


def test_seeds_that_draw_weights_differ_whatever_they_draw_of_the_blocks(capsys):
    latents = some_latents()
    for blocks in ({"keep": (0, 1)}, {"prune": 0.0}):
        settings = Settings(dataset="latents", data="x", init="random", seeds=(0, 1), **blocks)
        settings = replace(settings, depth_method="random")
        prepare.check_students(settings, latents, a_teacher(4), None)
        teacher = a_teacher(4)
        nets = smaller(a_run(settings, latents), teacher, DDPM(), None)
        assert not same(*(start_of(a_run(settings, latents), net, seed, {}) for seed, net in enumerate(nets)))
