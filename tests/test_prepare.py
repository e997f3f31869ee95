"""From settings to a run: data, networks, the device, a dry run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import a_unet, same
from PIL import Image

from distil import data, networks, pictures, prepare
from distil.metrics import parameters
from distil.networks import teacher_settings
from distil.presets import OPEN
from distil.settings import Settings, parse
from models import UNet

CPU = torch.device("cpu")


def test_gray_images_are_gray_for_a_teacher_of_our_own_and_otherwise_what_the_teacher_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gray").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(f"gray/{i}.png")
    for channels in (1, 3):
        net = UNet(8, channels, channels=8, channel_mults=(1, 2), norm_groups=4)
        net.save(f"net{channels}")
        torch.save(net.state_dict(), f"net{channels}.pth")
    found = []
    for teacher in ("train", "net1", "net3", "net1.pth", "net3.pth"):
        settings = Settings(data="gray", image_size=8, channels=8, teacher=teacher)
        given = prepare.open_network("teacher", settings)
        found.append(prepare.open_data(settings, given and given.channels)[0].shape[0])
    assert found == [1, 1, 3, 1, 3]
    shapes = [prepare.pretended(Settings(data="gray", image_size=8), channels).shape for channels in (None, 3)]
    assert shapes == [(1, 8, 8), (3, 8, 8)]  # a dry run says the same
    assert prepare.pretended(Settings(data="gray", image_size=8)).labels is None
    for i, kind in enumerate("aab"):
        Path("two", kind).mkdir(parents=True, exist_ok=True)
        Image.new("P", (8, 8), i).save(f"two/{kind}/{i}.png")  # a palette of grays
    known = prepare.pretended(Settings(data="two", image_size=8))
    assert known.labels.tolist() == [0, 0, 1] and known.shape == (1, 8, 8)
    Image.new("I;16B", (8, 8)).save("two/b/3.tif")
    assert prepare.pretended(Settings(data="two", image_size=8)).shape == (1, 8, 8)
    teacher = ["--data", "gray", "--teacher", "net3", "--device", "cpu"]
    sizes = [prepare.prepare(parse([*teacher, *more])).images.shape for more in ([], ["--out", "again"])]
    assert sizes == [(3, 8, 8)] * 2  # as large as the teacher takes them, where nothing else was asked for
    with pytest.raises(ValueError, match=r"it takes samples of shape \(3, 8, 8\), not \(3, 16, 16\)"):
        prepare.prepare(parse([*teacher, "--image-size", "16"]))


def test_the_size_of_a_run_on_a_folder_follows_the_device_and_the_number_of_images(monkeypatch):
    names = [f"{i}.png" for i in range(300)]
    monkeypatch.setattr(pictures, "image_files", lambda folder: names)
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
        "--channels 16": [
            "digits; they come with scikit-learn",
            "is trained first, 1,700 steps",
            "1,500 steps of 32 images",
        ],
        "--teacher net": ["digits", "teacher: net", "; students "],
        "--teacher nope.pth": ["digits", "nope.pth is missing"],
        "--dataset celeba --data y": [
            "y is missing",
            "is missing: fetch https",
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
    line = prepare.dry_run(parse(["--head", "statistics"])).splitlines()[-1]
    assert line.startswith("images of 1x8x8; teacher ") and "; students 41,674 (1.6%), " in line  # none is counted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "x"]


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
    networks.check_conditions("--teacher X", (), "pictures", images_of())
    with pytest.raises(
        ValueError, match="--teacher X needs classes, and pictures has none: put its images into one fo"
    ):
        networks.check_conditions("--teacher X", ("y",), "pictures", images_of())
    with pytest.raises(ValueError, match="--teacher X needs captions, and pictures has none: make its latents with"):
        networks.check_conditions("--teacher X", ("text",), "pictures", images_of())
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: images_of(5))
    with pytest.raises(ValueError, match="pictures holds too few images to compare samples with, 5 and not 6"):
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
