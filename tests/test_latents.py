"""Latent space, end to end with a tiny VAE: images -> encode -> distil a DiT -> resume -> sample -> decode."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import data
import evaluate
import foreign
import models
import train
from settings import DEPTH_METHODS

ROOT = Path(__file__).parents[1]
TINY = ["--dataset", "latents", "--data", "latents", "--channels", "24", "--teacher-steps", "3", "--prune", "0.5",
        "--steps", "6", "--batch-size", "8", "--eval-samples", "0", "--save-every", "2", "--device", "cpu"]  # fmt: skip


def tiny_vae(folder, seed=0, channels=4):
    torch.manual_seed(seed)
    widths, kinds = (8, 16), (["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2)
    net = AutoencoderKL(3, 3, *kinds, widths, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
                        sample_size=16, scaling_factor=0.5)  # fmt: skip
    net.save_pretrained(folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two VAEs, 21 pictures of two classes in odd sizes, and their latents in shards of 8."""
    folder = tmp_path_factory.mktemp("latents")
    tiny_vae(folder / "vae")
    tiny_vae(folder / "other-vae", seed=1)
    generator = np.random.default_rng(0)
    for i in range(21):
        place = folder / "images" / ("cat" if i % 3 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        size = (int(generator.integers(16, 40)), int(generator.integers(16, 40)), 3)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(data, "SHARD", 8)
    if not Path("latents").exists():
        assert encode() == 0


def encode(*changes: str, vae="vae", images="images", out="latents") -> int:
    return data.main(["encode", "--vae", vae, "--data", images, "--out", out, "--image-size", "16", "--batch", "3",
                      "--device", "cpu", *changes])  # fmt: skip


def answered(arguments: list[str]) -> None:
    """train.py only answers, and ends without a mistake."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 0


def weights(folder):
    return models.load_file(Path(folder) / "model.safetensors")


def refused(arguments, capsys, main=train.main) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    return err


# ------------------------------------------------------------------------------------------------------------ encoding


def test_latents_are_those_of_the_vae():
    latents = data.load("latents", "latents")
    assert latents.images.shape == (21, 2, 4, 8, 8) and latents.shape == (4, 8, 8) and latents.flip
    files = sorted(Path("images").rglob("*.png"))
    assert latents.labels.tolist() == [file.parent.name == "cat" for file in files]
    net = AutoencoderKL.from_pretrained("vae").eval()
    for i in (0, 9, 20):
        image = torch.from_numpy(data._adm(files[i], 16))
        both = torch.stack([image, image.flip(-1)]) / 127.5 - 1
        with torch.no_grad():
            posterior = net.encode(both).latent_dist
        noise = torch.from_numpy(np.random.default_rng((0, i)).standard_normal((2, 4, 8, 8), np.float32))
        expected = (posterior.mean + posterior.std * noise) * 0.5
        torch.testing.assert_close(
            torch.from_numpy(latents.images[i]), expected, rtol=2e-3, atol=2e-3
        )  # kept in 16 bit


def test_the_square_is_that_of_adm(tmp_path):
    """A picture of 4 times the size: halved by boxes until it is near, then bicubic, then the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = Image.fromarray(pixels).resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    image = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))[:, 4:20]
    np.testing.assert_array_equal(data._adm(tmp_path / "a.png", 16), image.transpose(2, 0, 1))


def test_encoding_goes_on_where_it_was_and_may_be_shared():
    files = {file.name: file.read_bytes() for file in Path("latents").iterdir()}
    assert len(files) == 5  # three shards, labels, the record
    (Path("latents") / "latents-00001.npy").unlink()
    (Path("latents") / "latents-00001.npy.part0").write_bytes(b"half a shard")
    before = (Path("latents") / "latents-00000.npy").stat().st_mtime_ns
    assert encode() == 0
    assert {file.name: file.read_bytes() for file in Path("latents").iterdir()} == files
    assert (Path("latents") / "latents-00000.npy").stat().st_mtime_ns == before
    vae = foreign.Vae("vae")
    for rank in (0, 1):
        data.encode(vae, Path("images"), Path("shared"), image_size=16, batch=3, rank=rank, world=2)
    assert {file.name: file.read_bytes() for file in Path("shared").iterdir()} == files


def test_tinyfusions_layout_is_read(tmp_path):
    latents = data.load("latents", "latents")
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i in range(12):
        np.save(tmp_path / "imagenet256_features" / f"{i}.npy", latents.images[i])
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", latents.labels[i : i + 1])
    read = data.load("imagenet", tmp_path, cache=tmp_path / "cache")
    order = sorted(range(12), key=str)  # their order is that of the names
    np.testing.assert_array_equal(read.images[:], latents.images[order])
    np.testing.assert_array_equal(read.labels, latents.labels[order])
    np.testing.assert_array_equal(data.load("imagenet", tmp_path, cache=tmp_path / "cache").labels, read.labels)
    (tmp_path / "imagenet256_labels" / "3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.npy is missing"):
        data.load("imagenet", tmp_path, cache=tmp_path / "other-cache")


def test_a_step_sees_the_latents_of_images_and_mirror_images():
    latents = data.load("latents", "latents")
    settings = train.Settings(dataset="latents", data="latents", batch_size=64, channels=24)
    net = train.new_network(settings, latents)
    pixels, cond = next(data.batches(latents, 64, 0, pin=False))
    whole = train.batch(settings, pixels, cond, slice(None), True, train.DDPM(), 0, torch.device("cpu"), net)
    mirrored = [torch.equal(x, pair[1]) for x, pair in zip(whole.x0, pixels, strict=True)]
    plain = [torch.equal(x, pair[0]) for x, pair in zip(whole.x0, pixels, strict=True)]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True)) and 10 < sum(mirrored) < 54
    assert set(whole.cond["y"].tolist()) == {0, 1, 2}  # 2: no class


# ------------------------------------------------------------------------------------------------------------- the run


def test_from_images_to_decoded_samples_of_a_distilled_student(capsys):
    arguments = [*TINY, "--kd", "none", "place", "--eval-samples", "8", "--sample-steps", "2", "--out", "runs/whole"]
    assert train.main(arguments) == 0
    metrics = json.loads(Path("runs/whole/metrics.json").read_text())
    assert metrics["students"][1]["parameters"] < metrics["teacher"]["parameters"]
    assert all(np.isfinite(student["frechet_pixels"]) for student in metrics["students"])
    assert "guidance 1.5" in metrics["protocol"] and Path("runs/whole/samples.png").exists()
    student = models.load("runs/whole/student/place-0")
    assert len(student.blocks) == 6 and student.shape == (4, 8, 8)

    # the student teaches another, and its images are scored at their own size, with the settings of its run
    assert train.main([*TINY, "--teacher", "runs/whole/student/place-0", "--out", "runs/next"]) == 0
    assert len(models.load("runs/next/student").blocks) == 3
    capsys.readouterr()
    numbers = ["--num", "8", "--dataset", "folder", "--data", "images", "--vae", "vae", "--device", "cpu"]
    assert evaluate.main(["runs/whole", *numbers, "--out", "scores"], evaluate.pixels) == 0
    images = np.load("scores/whole-place-0/samples.npy")
    assert images.shape == (8, 3, 16, 16) and "2 steps (linspace), eta 1, guidance 1.5" in capsys.readouterr().out
    options = {"seed": 0, "steps": 2, "eta": 1.0, "guidance": 1.5, "cond": {"y": torch.arange(8) % 2}}
    process = train.DDPM(spacing="linspace")
    samples = evaluate.sample(student, process, 8, vae=foreign.Vae("vae"), progress=False, **options)
    assert abs(data.to_uint8(samples).numpy().astype(int) - images).max() <= 1
    latents = evaluate.sample(student, process, 8, progress=False, **options)
    torch.testing.assert_close(foreign.Vae("vae").decode(latents), samples, rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_resumes_bit_for_bit(monkeypatch):
    arguments = [*TINY, "--kd", "out+feat", "place", "--depth-method", "learned", "--depth-steps", "2"]
    assert train.main([*arguments, "--out", "runs/through"]) == 0
    save = train.save_checkpoint

    def save_then_die(settings, students, folder, step):
        save(settings, students, folder, step)
        if step == 4 and folder.name == "died":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_then_die)
        train.main([*arguments, "--out", "runs/died"])
    assert train.main([*arguments, "--out", "runs/died"]) == 0
    for name in ("out+feat-0", "place-0"):
        a, b = (weights(f"runs/{folder}/student/{name}") for folder in ("through", "died"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert Path("runs/through/log.jsonl").read_text() == Path("runs/died/log.jsonl").read_text()


def test_two_processes_train_what_one_trains():
    arguments = [*TINY, "--kd", "out+feat", "place", "--lambda-feat", "1"]
    assert train.main([*arguments, "--out", "runs/one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "train.py"), *arguments, "--out", "runs/two"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in ("out+feat-0", "place-0"):
        a, b = (weights(f"runs/{folder}/student/{name}") for folder in ("one", "two"))
        assert all((a[key] - b[key]).abs().max() <= 1e-5 for key in a)


@pytest.mark.parametrize(
    ("prune", "depth", "parameters"), [(0.5, 14, 340_457_504), (0.75, 7, 173_121_440), (6 / 7, 4, 101_405_984)]
)
def test_every_row_of_table_3_is_a_preset(prune, depth, parameters, capsys):
    answered(["--dataset", "imagenet", "--prune", str(prune), "--kd", "place", "--dry-run"])
    shown = json.loads(capsys.readouterr().out)
    expected = {
        "arch": "dit", "steps": 500_000, "batch_size": 256, "lr": 2e-4, "lr_end": 1e-4, "decay": "cosine", "clip": 1.0,
        "ema": 0.9999, "lambda_diff": 0.1, "lambda_out": 0.9, "lambda_feat": 1e-2, "feat_stages": 100,
        "constants": "tinyfusion", "group_size": 16, "depth_method": "learned", "sample_steps": 250, "eta": 1.0,
        "spacing": "linspace", "guidance": 1.5, "image_size": 256, "teacher": "auto",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    settings = train.Settings(dataset="imagenet", prune=prune)
    latents = data.Images(np.zeros((1, 2, 4, 32, 32), np.float32), np.zeros(1, np.int64), "imagenet", True)
    with torch.device("meta"):
        teacher = train.new_network(settings, latents)
    run = train.Run(settings, torch.device("cpu"), latents, *[None] * 7)
    keep = train.choose_blocks(run, teacher, train.DDPM(), "uniform", 0)
    assert len(keep) == depth and evaluate.parameters(models.prune_depth(teacher, keep)) == parameters


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_every_way_to_choose_blocks_runs(method, capsys):
    arguments = [*TINY, "--steps", "1", "--depth-method", method, "--depth-steps", "2", "--out", f"runs/{method}"]
    assert train.main(arguments) == 0
    kept = capsys.readouterr().out.partition("keep the blocks ")[2].partition(" of 12")[0]
    assert len(kept.split(", ")) == 6 and len(models.load(f"runs/{method}/student").blocks) == 6


def test_blocks_may_be_named(capsys):
    assert train.main([*TINY, "--steps", "1", "--keep", "0,2,11", "--out", "runs/named"]) == 0
    assert "keep the blocks 0, 2, 11 of 12" in capsys.readouterr().out
    teacher = models.load(next(Path("runs/teachers").glob("latents*/teacher")))
    student = models.load("runs/named/student")
    drift = student.blocks[2].attn.qkv.weight - teacher.blocks[11].attn.qkv.weight
    assert drift.abs().max() < 5e-3  # one step of 2e-4 away, and averaged


# ------------------------------------------------------------------------------------------------------------ refusals


def test_latents_that_do_not_fit_are_refused(capsys, tmp_path):
    models.DiT(8, 2, 3, 8, 1, 2, num_classes=2).save("rgb")
    assert "(3, 8, 8), but the data is (4, 8, 8)" in refused([*TINY, "--teacher", "rgb"], capsys)
    models.DiT(8, 2, 4, 8, 1, 2, num_classes=1).save("one-class")
    assert "classes 0 to 0, but the data has a class 1" in refused([*TINY, "--teacher", "one-class"], capsys)
    assert "--image-size 16" in refused([*TINY, "--image-size", "32"], capsys)
    shutil.copytree("latents", tmp_path / "cut")
    (tmp_path / "cut" / "latents-00002.npy").unlink()
    assert "latents-00002.npy is missing" in refused([*TINY, "--data", str(tmp_path / "cut")], capsys)
    (tmp_path / "cut" / "latents-00002.npy").write_bytes(b"no array")
    assert "damaged" in refused([*TINY, "--data", str(tmp_path / "cut")], capsys)
    for folder, words in ((tmp_path, "holds no latents"), (tmp_path / "nowhere", "there is no folder")):
        assert words in refused([*TINY, "--data", str(folder)], capsys)
    assert encode(images="images/cat", out="no-classes") == 0
    assert "one folder a class" in refused([*TINY, "--data", "no-classes"], capsys)


def test_another_vae_is_refused(capsys):
    err = refused([*TINY, "--eval-samples", "8", "--vae", "other-vae", "--out", "runs/other"], capsys)
    assert "made by another VAE (vae vae, fingerprint" in err and not Path("runs/other").exists()
    assert encode(vae="other-vae") == 2
    assert "made otherwise (vae was vae, is other-vae" in capsys.readouterr().err
    tiny_vae("wide-vae", channels=6)
    models.DiT(8, 2, 4, 8, 1, 2, num_classes=2).save("dit")
    numbers = ["dit", "--num", "8", "--dataset", "folder", "--data", "images", "--device", "cpu"]
    words = "6 channels, the networks have 4"
    assert words in refused([*numbers, "--vae", "wide-vae"], capsys, main=evaluate.main)
    assert "name the VAE with --vae" in refused(numbers, capsys, main=evaluate.main)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vae": "nowhere"}, "neither a folder nor a Hugging Face id"),
        ({"vae": "images"}, "cannot be loaded"),
        ({"images": "nowhere"}, "there is no folder"),
        ({"out": "odd", "more": ["--image-size", "17"]}, "no multiple of 2"),
        ({"out": "odd", "more": ["--batch", "0"]}, "--batch 0"),
    ],
)
def test_encode_refuses_what_it_cannot_use(changes, words, capsys):
    assert encode(*changes.pop("more", []), **changes) == 2
    err = capsys.readouterr().err.splitlines()
    assert words in err[-1] and err[-1].startswith("data.py: ") and not Path("odd").exists()


def test_without_diffusers_one_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert encode(out="none") == 2
    assert "pip install -r requirements-diffusers.txt" in capsys.readouterr().err
    assert train.main([*TINY, "--out", "runs/no-vae"]) == 0  # to train on latents needs none


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "dit", "--dataset", "celeba"], "--arch dit has no preset for celeba"),
        (["--dataset", "imagenet", "--depth-method", "luck"], "--depth-method luck"),
        (["--dataset", "imagenet"], "latents need --data"),
        (["--arch", "dit", "--seeds", "0", "1", "--depth-method", "uniform"], "prune with --depth-method random"),
        (["--arch", "dit", "--keep", "0,99"], "numbers from 0 to 7, not [0, 99]"),
        (["--arch", "dit", "--keep", "0,two"], "0,two"),
        (
            ["--arch", "dit", "--prune", "0.75", "--seeds", "0", "1"],
            "keeps 2 of 8 blocks: the seeds would draw the same",
        ),
        (["--keep", "0,1"], "use --prune, or --arch dit"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, words, capsys):
    try:
        code = train.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
