"""FID and its relatives: sampling to disk that resumes, features and their cache, the command line, the run card."""

import json
import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import models
from diffusion import DDPM

ROOT = Path(__file__).parents[1]
SHAPE = (1, 8, 8)
SETTINGS = {"seed": 3, "steps": 4, "eta": 0.0}


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def net():
    return tiny(0)


def tiny(seed):
    torch.manual_seed(seed)
    return models.UNet(
        8, in_channels=1, channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=8
    ).eval()


class Wrapped(models.Network):
    """A network that first calls `before` with the size of the batch."""

    def __init__(self, net, before):
        super().__init__()
        self.shape = net.shape
        self.net, self.before = net, before

    def forward(self, x_t, t, cond=None):
        self.before(len(x_t))
        return self.net(x_t, t, cond)


def sampled(folder, net, n=23, through=None, shape=SHAPE, batch=5, **settings):
    """The images in `folder` after sampling all that are missing, and their marks."""
    settings = SETTINGS | settings
    images, done = evaluate.open_samples(folder, net, n, shape, **settings)
    evaluate.fill(images, done, through or net, DDPM(), **settings, batch=batch, progress=False)
    return np.array(images), np.array(done)


def means(images):
    """Sixteen numbers of an image in the place of Inception's 2,048."""
    return evaluate.pixels(images)[:, ::4]


# ---------------------------------------------------------------------------------------------------- sampling to disk


def test_a_killed_sampling_goes_on_where_it_stopped(net):
    whole, _ = sampled("whole", net)
    calls = []

    def kill(size):
        calls.append(size)
        if len(calls) > 2 * SETTINGS["steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled("killed", net, through=Wrapped(net, kill))
    assert np.load("killed/done.npy").sum() == 10  # two batches of five were safe
    calls.clear()
    resumed, done = sampled("killed", net, through=Wrapped(net, calls.append))
    assert (resumed == whole).all() and (done == 1).all()
    assert sum(calls) == 13 * SETTINGS["steps"]  # only what was missing
    assert not (whole[1:] == whole[:-1]).all((1, 2, 3)).any()

    expected = data.to_uint8(evaluate.sample(net, DDPM(), 23, **SETTINGS, batch=5, progress=False))
    assert (whole == expected.numpy()).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_stored_bytes_do_not_depend_on_the_batch(net, eta):
    """But for the rounding of the network's arithmetic, which may tip a value over to the next of the 256 levels."""
    one, many = (sampled(f"batch{batch}", net, eta=eta, batch=batch)[0].astype(int) for batch in (1, 23))
    assert abs(one - many).max() <= 1 and (one != many).mean() < 0.01
    other, _ = sampled("seed", net, eta=eta, seed=4)
    assert (one != other).mean() > 0.5


def test_a_batch_that_does_not_fit_is_halved(net):
    sizes = []

    def before(size):
        sizes.append(size)
        if size > 6:
            raise torch.OutOfMemoryError

    images, done = sampled("halved", net, through=Wrapped(net, before), batch=16)
    assert (done == 1).all() and sizes[:2] == [16, 8] and max(sizes[2:]) == 4
    assert abs(images.astype(int) - sampled("whole", net)[0]).max() <= 1

    def never(size):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        sampled("never", net, through=Wrapped(net, never))


def test_samples_of_other_settings_are_refused_and_left_alone(net):
    sampled("samples", net)
    before = Path("samples/samples.npy").read_bytes()
    for changed, words in (({"steps": 5}, "steps was 4, is 5"), ({"n": 24}, "n was 23, is 24")):
        with pytest.raises(ValueError, match=words):
            sampled("samples", net, **changed)
    with pytest.raises(ValueError, match="weights was"):
        sampled("samples", tiny(1))
    assert Path("samples/samples.npy").read_bytes() == before
    with pytest.raises(OSError, match="GB left"):
        evaluate.open_samples("huge", net, 10**12, (3, 256, 256))


def test_images_that_are_not_finite_are_marked(net):
    class Diverging(models.Network):
        shape = SHAPE

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x_t, t, cond=None):
            return torch.where(x_t[:, :1, :1, :1] > 0, math.nan, x_t * self.scale)

    images, done = sampled("diverged", net, through=Diverging())
    assert set(done) == {1, 2} and (images[done == 2] == 128).all()


def test_two_processes_fill_one_file(net):
    net.save("net")
    arguments = ["net", "--num", "20", "--dataset", "digits", "--sample-steps", "4", "--batch", "5", "--device", "cpu"]
    arguments += ["--real", "100"]
    assert evaluate.main([*arguments, "--out", "one"], evaluate.pixels) == 0
    Path("program.py").write_text("import sys, evaluate\nsys.exit(evaluate.main(extract=evaluate.pixels))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    done = subprocess.run(
        [*torchrun, "program.py", *arguments, "--out", "two"],
        check=True, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count("| net ") == 1  # only one of them prints
    one, two = (np.load(f"{out}/net/samples.npy").astype(int) for out in ("one", "two"))
    assert abs(one - two).max() <= 1 and (np.load("two/net/done.npy") == 1).all()


# ------------------------------------------------------------------------------------------------ features and metrics


@pytest.mark.parametrize("mode", evaluate.MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_reach_inception_as_those_of_clean_fid(mode, channels):
    from cleanfid import fid

    images = np.random.default_rng(0).integers(0, 256, (5, channels, 20, 20), np.uint8)
    Path("images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(f"images/{i}.png")

    def network(x):  # sees where a pixel is
        return x[:, :, ::7, ::5].flatten(1)

    theirs = fid.get_folder_features(
        "images", model=network, mode=mode, num_workers=0, device=torch.device("cpu"), verbose=False
    )
    ours = evaluate.features(evaluate.Inception(mode, network=network), images)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3)


def test_reference_features_are_computed_once():
    calls = []

    def extract(images):
        calls.append(len(images))
        return means(images)

    def features(**options):
        calls.clear()
        return evaluate.reference(images, extract, cache="cache", **{"count": 250, **options})

    images = data.load("digits")
    first = features()
    assert first.shape == (250, 16) and first.dtype == torch.float32 and calls == [100, 100, 50]
    rows = np.linspace(0, 1499, 250).round().astype(int)
    torch.testing.assert_close(first, means(torch.from_numpy(images.images[rows])))
    assert torch.equal(features(), first) and not calls

    (file,) = Path("cache").iterdir()
    assert file.name.startswith("features-digits-1x8x8-train-250-") and "-extract-" in file.name
    assert len(features(count=9999)) == 1500 and calls
    images = data.load("digits", split="test")
    features(split="test")
    assert calls
    images = data.load("digits", image_size=16)
    features()
    assert calls
    images = data.load("digits", seed=1)  # the same name, other images
    features()
    assert calls and len(list(Path("cache").iterdir())) == 5
    evaluate.reference(images, means, cache="cache", count=250)
    assert len(list(Path("cache").iterdir())) == 6


def test_precision_and_recall_equal_prdc():
    from prdc import compute_prdc

    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 8)).astype(np.float32)
    fake = (1.2 * generator.normal(size=(200, 8)) + 0.3).astype(np.float32)
    theirs = compute_prdc(real, fake, nearest_k=5)
    ours = evaluate.precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k=5)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0.1 < ours[0] < 0.99


def test_kernel_distance_equals_clean_fid_and_always_is_the_same():
    from cleanfid import fid

    generator = np.random.default_rng(0)
    real, fake = (generator.normal(shift, size=(300, 8)).astype(np.float32) for shift in (0, 0.5))
    np.random.seed(0)
    theirs = fid.kernel_distance(real, fake, num_subsets=10, max_subset_size=200)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    ours = [evaluate.kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), 10, 200) for _ in range(2)]
    assert ours == [theirs, theirs] and theirs > 0
    assert (np.random.get_state()[1] == before).all()


# ---------------------------------------------------------------------------------------------------- the command line


def scores(n):
    numbers = {"frechet": 12.345, "kid": 0.0012, "precision": 0.7, "recall": 0.5}
    return [{"name": "place", "n": n, **numbers, "non_finite": 0, "parameters": 1_312_076, "macs": 767_000_000}]


def test_the_word_fid_is_kept_for_inception():
    inception = evaluate.Inception(network=means)
    assert "| FID@9999 |" in evaluate.fid_table(scores(9_999), inception)
    full = evaluate.fid_table(scores(10_000), inception)
    assert "|   FID |" in full and "| 12.35 |" in full.replace("12.34 ", "12.35 ") and "1,312,076" in full
    assert "FID" not in evaluate.fid_table(scores(50_000), means)


def test_a_run_and_its_students_are_evaluated(net, capsys):
    for name in ("out-0", "place-0"):
        net.save(f"runs/first/student/{name}")
    arguments = ["--num", "12", "--dataset", "digits", "--sample-steps", "2", "--device", "cpu", "--real", "100"]
    assert evaluate.main(["runs/first", *arguments], means) == 0
    out = capsys.readouterr().out
    assert "FID" not in out and "| first-out-0 " in out and "| first-place-0 " in out
    assert "features means" in out and "100 of 1500 images of digits (train), 12 generated" in out
    found = json.loads(Path("runs/evaluation/first-place-0/scores.json").read_text())
    real = evaluate.reference(data.load("digits"), means, count=100)
    images = np.load("runs/evaluation/first-place-0/samples.npy")
    assert found["frechet"] == evaluate.frechet(real, means(torch.from_numpy(images)))
    assert found["parameters"] == evaluate.parameters(net) and found["protocol"] in out

    assert evaluate.main(["runs/first/student/out-0", *arguments, "--out", "b"], evaluate.Inception(network=means)) == 0
    out = capsys.readouterr().out
    assert "| out-0 " in out and "FID@12" in out and "inception-clean" in out


def test_a_student_of_few_steps_is_sampled_in_them(net, capsys):
    net.save("net")
    config = json.loads(Path("net/config.json").read_text())
    Path("net/config.json").write_text(json.dumps(config | {"fold_steps": 3}))
    arguments = ["net", "--num", "8", "--dataset", "digits", "--device", "cpu", "--real", "100"]
    assert evaluate.main(arguments, means) == 0
    assert "DDIM, 3 steps" in capsys.readouterr().out
    noise = evaluate.start_noise(8, SHAPE, 0)
    expected = data.to_uint8(DDPM().fold(3).sample(net, noise.shape, 3, noise=noise)).numpy()
    assert abs(np.load("runs/evaluation/net/samples.npy").astype(int) - expected).max() <= 1
    assert evaluate.main([*arguments, "--sample-steps", "4", "--out", "four"], means) == 2
    assert "1 to 3 steps" in capsys.readouterr().err


def test_without_weights_nothing_is_sampled(net, tmp_path, monkeypatch, capsys):
    net.save("net")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({"https": "127.0.0.1:9"})))
    try:
        code = evaluate.main(["net", "--num", "50000", "--dataset", "digits", "--mode", "legacy_pytorch"])
    finally:
        urllib.request.install_opener(None)
    out, err = capsys.readouterr()
    weights = tmp_path / "torch" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    assert code == 2 and not out and not Path("runs").exists()
    assert str(weights) in err and "https://" in err and "put it there" in err and err.count("evaluate.py: ") == 1

    weights.write_bytes(b"half a file")
    assert evaluate.main(["net", "--num", "50000", "--dataset", "digits", "--mode", "legacy_pytorch"]) == 2
    assert f"{weights} cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net", "--num", "5", "--dataset", "digits"], "--num 5 cannot be used, it must be at least 6"),
        (["net", "--num", "50"], "--num needs --dataset"),
        (["net", "--num", "50", "--dataset", "digits", "--batch", "0"], "--batch 0"),
        (["net", "--num", "50", "--dataset", "digits", "--sample-steps", "1001"], "1001"),
        (["net", "--num", "50", "--dataset", "digits", "--eta", "2"], "--eta 2.0"),
        (["net", "--num", "50", "--dataset", "digits", "--device", "cuda:99"], "--device cuda:99"),
        (["net", "net", "--num", "50", "--dataset", "digits"], "net has the name or another image shape of one before"),
        (["nowhere", "--num", "50", "--dataset", "digits"], "nowhere is not a saved network"),
        (["net", "--num", "50", "--dataset", "digits", "--data", "x"], "digits are embedded"),
    ],
)
def test_bad_input_is_one_sentence(net, arguments, words, capsys):
    net.save("net")
    assert evaluate.main(arguments, means) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("evaluate.py: ") and words in err
    assert not Path("runs").exists()


# -------------------------------------------------------------------------------------------------------- the run card


def test_the_card_of_a_run_and_of_its_student(net, monkeypatch):
    numbers = dict.fromkeys(evaluate.SCORES, 1.0) | {"non_finite": 0}
    settings = {"dataset": "digits", "image_size": 8, "prune": 0.9, "kd": ["out", "place"], "lr": 0.005}
    metrics = {
        "settings": settings,
        "machine": {"processor": "abacus", "gpu": "none"},
        "protocol": "how it was measured",
        "teacher": {**numbers, "parameters": 100, "macs": 10},
        "students": [{**numbers, "method": "place", "seed": 0, "seconds": 1.0, "parameters": 10, "macs": 1}],
    }
    net.save("run/student")
    Path("run/samples.png").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "--kd", "out", "place", "--out", "my run"])
    for folder in ("run", "run/student"):
        evaluate.card(folder, metrics)
    run, student = (Path(folder, "README.md").read_text() for folder in ("run", "run/student"))
    for text in (run, student):
        _, front, body = text.split("---\n", 2)
        assert "license: mit\n" in front and "\n- diffusion\n" in front
        assert "`python train.py --kd out place --out 'my run'`" in body and "abacus" in body
        assert evaluate.table(evaluate.rows(metrics)) in body and "how it was measured" in body
        assert json.loads(body.split("```json\n")[1].split("```")[0]) == settings
        if commit := evaluate._commit():
            assert f"commit `{commit}`" in body and len(commit.removesuffix("-dirty")) == 40
    assert "![samples.png](samples.png)" in run and "curves.png" not in run and "models.load" not in run
    assert "samples.png" not in student and "models.load('student')" in student
    assert sorted(path.name for path in Path("run/student").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert evaluate.parameters(models.load("run/student")) == evaluate.parameters(net)
