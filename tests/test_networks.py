"""The teacher that a run trains and the students that it makes: sizes, names, which channels and blocks stay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import a_dit, a_run, a_unet, same, some_latents

import train
from distil import checks, data, importance, networks, pictures, prepare
from distil.metrics import parameters
from distil.networks import smaller, start_of, teacher_settings
from distil.presets import DEPTH_METHODS
from distil.process import DDPM
from distil.settings import Settings, parse
from distil.students import Student, tap
from models import UNet, prune_depth


def the_loss(output, batch):
    return (output[:, :4] - batch.target).square().mean()


TEACHERS = {
    "": "digits8-2c8cece3",
    "--arch dit": "digits8-1e5948fb",
    "--process flow": "digits8-779d870e",
    "--image-size 16 --channels 32 --teacher-steps 9": "digits16-122ed962",
    "--dataset celeba --prune 0.5 --teacher train": "celeba64-b667e6a1",
    "--dataset latents --data x": "latents-6ea9d9ac",
    "--dataset cifar10 --prune 0 --fold-steps 125 --kd out --teacher train": "cifar1032-be04cb63",
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
    published = {"dataset": "cifar10", "process": "sfddm", "teacher": "train", "prune": 0.0, "fold_steps": 128}
    own = teacher_settings(Settings(**published, kd=("out",)))
    assert (own.clip, own.flip, own.timesteps) == (0.0, False, "uniform")  # as SFDDM's teacher was trained
    for other in ("--seed 1", "--channels 32", "--teacher-steps 9", "--process flow", "--teacher-lr 1", "--clip 2"):
        assert teacher_settings(parse(other.split())).out != default


@pytest.fixture
def on_gpu(monkeypatch):
    """A command line on a machine with a GPU and 10,000 images."""
    monkeypatch.setattr(pictures, "image_files", lambda folder: ["a.png"] * 10_000)
    return lambda *arguments: prepare.sized(parse(list(arguments)), torch.device("cuda"))


def gray(size: int, channels: int = 1) -> data.Images:
    return data.Images(np.zeros((8, channels, size, size), np.uint8), None, "folder")


@pytest.mark.parametrize(
    ("arguments", "mults", "groups"),
    [
        ("", (1, 2, 2, 2), None),  # as published: 32 of 128 channels
        ("--channels 32", (1, 2, 2, 2), 8),
        ("--channels 32 --image-size 28", (1, 2, 2), 8),
        ("--channels 32 --image-size 8", (1, 2, 2), 8),  # no level of one pixel
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
    config = networks.network_config(settings)
    assert (tuple(config["channel_mults"]), config.get("norm_groups")) == (mults, groups)
    with torch.device("meta"):
        net = networks.new_network(settings, gray(settings.image_size))
    assert net.shape == (1, settings.image_size, settings.image_size)
    assert {norm.num_groups for norm in net.norms().values()} == {groups or 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 33", "--image-size 33 cannot be halved, .*: use --image-size 32, or one level with"),
        (
            "--image-size 16 --channel-mults 1,2,2,2,2",
            "one pixel in the last of 5 levels: use --channel-mults 1,2,2,2$",
        ),
        ("--image-size 28 --channel-mults 1,2,2,2", "image_size 28 cannot be halved 3 times"),
        (
            "--channels 20 --teacher-norm-groups 8",
            "--channels 20 cannot be split into 8 groups: give a multiple of 8, or",
        ),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(arguments, message, on_gpu):
    settings = on_gpu("--data", "x", *arguments.split())
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        networks.new_network(settings, gray(settings.image_size))


def test_another_shape_or_other_groups_are_another_teacher(on_gpu):
    others = ("", "--channels 32", "--channel-mults 1,2", "--teacher-norm-groups 8", "--teacher-norm-groups 16")
    own = [teacher_settings(on_gpu("--data", "x", *more.split())) for more in others]
    assert len({settings.out for settings in own}) == 5
    assert networks.network_config(own[2])["channel_mults"] == (1, 2) and own[3].teacher_norm_groups == 8


def test_a_teacher_of_norms_of_one_channel_and_little_pruning_are_said(capsys, monkeypatch):
    settings = Settings(channels=8, prune=0.9, importance="random")
    checks.check_students(settings, data.load("digits"), None, None)
    assert "6 norms of the teacher have one channel a group" in capsys.readouterr().err
    run = a_run(settings, data.load("digits"))
    networks.of_channels(run, a_unet(), DDPM(), None, 0)
    err = capsys.readouterr().err
    assert "--prune 0.9 leaves 8% of the parameters instead of about 1%, for no norm loses a group" in err
    torch.manual_seed(0)
    networks.of_channels(run, UNet(8, 1, channels=32, channel_mults=(1, 2), norm_groups=4), DDPM(), None, 0)
    checks.check_students(Settings(), data.load("digits"), None, None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("flow", [True, False])
def test_a_flow_predicts_no_variance(flow):
    settings = Settings(arch="dit", process="flow" if flow else "ddpm")
    net = networks.new_network(settings, data.load("digits"))
    assert net.predicts_variance is not flow and net.num_classes == 10


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_every_way_to_choose_blocks(method, capsys):
    teacher, latents = a_dit(), some_latents()
    for block in (1, 3) if method == "shortgpt" else ():  # their gates are closed, they do nothing
        for p in teacher.blocks[block].adaLN_modulation.parameters():
            torch.nn.init.zeros_(p)
    given = {"prune": 0.5, "depth_method": method, "batch_size": 8}
    given |= {"depth_steps": 2} if method == "learned" else {}
    settings = Settings(dataset="latents", data="x", seeds=(0, 1) if method == "random" else (0,), **given)
    nets = smaller(a_run(settings, latents), teacher, DDPM(), the_loss)
    lines = capsys.readouterr().out.splitlines()
    kept = [[int(i) for i in line.partition("blocks ")[2].partition(" of 6")[0].split(", ")] for line in lines]
    assert [len(net.blocks) for net in nets] == [3] * len(settings.seeds)
    assert all(same(net, prune_depth(teacher, keep)) for net, keep in zip(nets, kept, strict=True))
    if method in ("uniform", "first"):
        assert kept == [[0, 2, 5] if method == "uniform" else [0, 1, 2]]
    if method in ("random", "shortgpt"):
        assert all(keep[-1] == 5 for keep in kept) and all(keep == sorted(keep) for keep in kept)
    if method == "shortgpt":
        assert not {1, 3} & set(kept[0])
    run = a_run(settings, latents)
    run.checkpoint = {}  # which brings its own weights: nothing is measured again, and nothing is said
    assert len(smaller(run, teacher, DDPM(), None)[0].blocks) == 3 and not capsys.readouterr().out


def test_blocks_are_chosen_in_the_parts_that_memory_takes(monkeypatch):
    sizes, forward = [], importance.GatedDepth.forward

    def watched(self, x_t, *others):
        sizes.append(len(x_t))
        return forward(self, x_t, *others)

    monkeypatch.setattr(importance.GatedDepth, "forward", watched)
    given = {"prune": 0.5, "depth_method": "learned", "depth_steps": 2, "batch_size": 8, "accumulate": 4}
    smaller(a_run(Settings(dataset="latents", data="x", **given), some_latents()), a_dit(), DDPM(), the_loss)
    assert sizes == [2] * 8


def test_classes_that_may_be_others_are_said_and_such_that_cannot_be_refused(capsys):
    images = data.Images(np.zeros((4, 4, 8, 8), np.uint8), np.array([0, 1, 1, 1]), "latents")
    settings = Settings(dataset="latents", data="x", prune=0.5)
    checks.check_students(settings, images, a_dit(), None)
    assert not capsys.readouterr().err
    checks.check_students(settings, images._replace(labels=np.zeros(4, int)), a_dit(), None)
    assert "WARNING: the teacher knows 2 classes and the data has 1: class i" in capsys.readouterr().err
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=f"the data has a class {wrong[0] or wrong[1]}"):
            networks.check_conditions("the teacher", ("y",), "here", images._replace(labels=np.array(wrong)), 3)


def test_blocks_may_be_named_and_a_student_given():
    teacher, latents = a_dit(), some_latents()
    run = a_run(Settings(dataset="latents", data="x", keep=(0, 2, 5)), latents)
    assert same(smaller(run, teacher, DDPM(), None)[0], prune_depth(teacher, [0, 2, 5]))
    run.student = a_dit(2)
    assert smaller(run, teacher, DDPM(), None) == [run.student]


def test_a_run_that_goes_on_has_the_blocks_that_it_began_with():
    latents = some_latents()
    settings = Settings(dataset="latents", data="x", depth_method="first", prune=0.5)
    (small,) = smaller(a_run(settings, latents), a_dit(), DDPM(), None)
    assert small.kept == [0, 1, 2]
    student = Student(settings, train.resolve(settings, "place"), 0, small, tap(a_dit(), small, slice(None)))
    run = replace(a_run(settings, latents), checkpoint={"students": {"place-0": student.state()}})
    (again,) = smaller(run, a_dit(), DDPM(), None)
    assert again.kept == [0, 1, 2] and same(again, small)
    (older,) = smaller(replace(run, checkpoint={"students": {"place-0": {}}}), a_dit(), DDPM(), None)
    assert len(older.blocks) == 3


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
    ("given", "images", "threshold", "timesteps"),
    [({"dataset": "celeba"}, 64, 0.0, range(1000)), ({"dataset": "lsun_bedroom"}, 4, 0.01, range(1000)),
     ({"importance": "taylor", "batch_size": 6, "steps": 3}, 6, 0.0, range(1000)),
     ({"importance": "taylor", "taylor_batch": 2, "taylor_steps": 4}, 2, 0.0, range(0, 1000, 250))],
)  # fmt: skip
def test_importance_is_that_of_the_published_batch_and_of_all_timesteps(
    given, images, threshold, timesteps, monkeypatch
):
    seen, teacher = [], a_unet()
    teacher.requires_grad_(True)
    monkeypatch.setattr(
        networks.importance,
        "accumulate_gradients",
        lambda net, process, x0, noise, thr, times, **_: seen.append((len(x0), len(noise), thr, list(times))),
    )
    monkeypatch.setattr(networks, "prune_channels", lambda net, *_, **__: net)
    smaller(a_run(Settings(**given), data.load("digits")), teacher, DDPM(), None)
    assert seen == [(images, images, threshold, list(timesteps))]


@pytest.mark.parametrize("net", [a_unet(), a_dit()], ids=["unet", "dit"])
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
        teacher = networks.new_network(settings, latents)
    (student,) = smaller(a_run(settings, latents), teacher, DDPM(), None)
    assert len(student.blocks) == depth and parameters(student) == count


def test_seeds_that_draw_weights_differ_whatever_they_draw_of_the_blocks(capsys):
    latents = some_latents()
    for blocks in ({"keep": (0, 1)}, {"prune": 0.0}):
        settings = Settings(dataset="latents", data="x", init="random", seeds=(0, 1), **blocks)
        settings = replace(settings, depth_method="random")
        checks.check_students(settings, latents, a_dit(4), None)
        teacher = a_dit(4)
        nets = smaller(a_run(settings, latents), teacher, DDPM(), None)
        assert not same(*(start_of(a_run(settings, latents), net, seed, {}) for seed, net in enumerate(nets)))
