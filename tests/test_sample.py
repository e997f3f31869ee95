"""distil/sample.py: noise and samples that belong to a seed, samples on disk that resume, and the command."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import a_unet, refused
from PIL import Image
from torch import nn

from distil import data, sample
from distil.process import DDPM, RectifiedFlow
from models import DiT, Network, UNet

SHAPE = (1, 8, 8)
SETTINGS = {"seed": 3, "steps": 4, "eta": 0.0}


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def a_dit(classes, **more):
    torch.manual_seed(0)
    return DiT(8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=classes, **more)


class Wrapped(Network):
    """A network that first calls `before` with the size of the batch."""

    shape = SHAPE

    def __init__(self, net, before):
        super().__init__()
        self.net, self.before = net, before

    def forward(self, x_t, t, cond=None):
        self.before(len(x_t))
        return self.net(x_t, t, cond)


class Halver(Network):
    """Arithmetic of one element at a time, so that no batch can change it; dropout tells its mode."""

    shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.dropout, self.scale = nn.Dropout(0.5), nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t, cond=None):
        return self.dropout(x_t) * self.scale


def draw(net, n, batch, seed=3, **options):
    return sample.sample(net, DDPM(), n, seed=seed, steps=4, batch=batch, progress=False, **options)


# ---- From noise to images --------------------------------------------------------------------------------------------


def test_start_noise_belongs_to_seed_and_image():
    noise = sample.start_noise(50, SHAPE, seed=1)
    parts = [sample.start_noise(n, SHAPE, 1, first) for first, n in ((0, 20), (20, 0), (20, 29), (49, 1))]
    assert torch.equal(noise, torch.cat(parts)) and noise.dtype == torch.float32
    assert not torch.equal(noise[1:], noise[:-1]) and not torch.equal(noise, sample.start_noise(50, SHAPE, seed=2))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert noise[7, 0, 0, :2].tolist() == np.random.default_rng((1, 7)).standard_normal(2, np.float32).tolist()


def test_interpolated_noise_turns_from_one_start_to_the_other():
    noise = sample.interpolate((3, 16, 16), seed=4, n=5)
    torch.testing.assert_close(noise[[0, 4, 5, 9]], sample.start_noise(4, (3, 16, 16), 4))
    unit = nn.functional.normalize(noise[:5].flatten(1))
    steps = (unit[1:] * unit[:-1]).sum(1)  # cosines of equal angles
    assert steps.max() - steps.min() < 0.02
    assert (noise.std((1, 2, 3)) - 1).abs().max() < 0.1  # a straight line would pass 0.7


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_do_not_depend_on_the_batch(eta):
    whole = draw(Halver(), 10, batch=10, eta=eta)
    assert whole.shape == (10, 1, 4, 4) and whole.dtype == torch.float32
    assert all(torch.equal(draw(Halver(), 10, batch, eta=eta), whole) for batch in (1, 3, 64))
    assert torch.equal(draw(Halver(), 4, 4, eta=eta), whole[:4])
    assert not torch.equal(draw(Halver(), 10, 10, seed=4, eta=eta), whole)
    images = [draw(a_unet(), 6, batch, eta=eta) for batch in (2, 6)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_samples_are_those_of_the_process_from_the_start_noise():
    net, noise = a_unet(), sample.start_noise(5, SHAPE, 3)
    for process, steps in ((DDPM(), 4), (RectifiedFlow(), 3), (DDPM(), [900, 500, 20]), (DDPM().fold(7), 7)):
        expected = process.sample(net, noise.shape, steps, noise=noise)
        assert torch.equal(sample.sample(net, process, 5, seed=3, steps=steps, progress=False), expected)


def test_conditions_and_guidance_reach_the_network():
    net = a_dit(5)
    net.final_layer.linear.weight.data.normal_()
    nn.init.normal_(net.final_layer.adaLN_modulation[-1].weight)
    by_list = draw(net, 6, 4, cond={"y": torch.arange(6) % 5})
    assert torch.equal(draw(net, 6, 4, cond=lambda rows: {"y": torch.tensor(rows) % 5}), by_list)
    assert not torch.equal(draw(net, 6, 4, cond={"y": torch.zeros(6, dtype=torch.long)}), by_list)
    assert not torch.equal(draw(net, 6, 4, cond={"y": torch.arange(6) % 5}, guidance=2.0), by_list)


def test_every_module_keeps_its_mode():
    net = Halver()
    net.inner, net.frozen = Halver(), nn.Dropout().eval()
    draw(net, 2, 2)
    assert net.training and net.inner.dropout.training and not net.frozen.training
    net.scale.data = torch.zeros(7)  # fails inside the sampler
    with pytest.raises(RuntimeError):
        draw(net, 2, 2)
    assert net.training and not net.frozen.training


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def before(size):
        sizes.append(size)
        if size > 6:
            raise torch.OutOfMemoryError

    halved = draw(Wrapped(a_unet(), before), 23, batch=16)
    assert sizes[:2] == [16, 8] and max(sizes[2:]) == 4
    torch.testing.assert_close(halved, draw(a_unet(), 23, batch=16), rtol=1e-4, atol=1e-4)

    def never(size):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        draw(Wrapped(a_unet(), never), 2, 2)


def test_batches_of_large_images_are_smaller_on_a_cpu():
    sizes = []
    net = Wrapped(a_unet(), sizes.append)
    net.shape = (1, 64, 64)
    sample.sample(net, DDPM(), 40, seed=0, steps=1, progress=False)
    assert sizes == [16, 16, 8]


def test_decoded_shows_latents_evenly_spaced():
    class Vae:
        def decode(self, latents):
            return latents[:, :3] / 100

    latents = np.arange(70, dtype=np.float32).reshape(70, 1, 1, 1, 1) * np.ones((1, 2, 4, 2, 2), np.float32)
    latents[:, 1] = -1  # the mirror images
    shown = sample.decoded(Vae(), data.Images(latents, None, "latents"), 8)
    assert shown.shape == (8, 3, 2, 2) and shown.dtype == np.uint8
    assert (np.diff(shown[:, 0, 0, 0].astype(int)) > 0).all() and shown[0].max() == 128


# ---- On disk ---------------------------------------------------------------------------------------------------------


def sampled(folder, net, n=23, through=None, batch=5, **settings):
    """The images in `folder` after sampling all that are missing, and their marks."""
    settings = SETTINGS | settings
    images, done = sample.open_samples(folder, net, n, SHAPE, **settings)
    sample.fill(images, done, through or net, DDPM(), **settings, batch=batch, progress=False)
    return np.array(images), np.array(done)


def test_a_killed_sampling_goes_on_where_it_stopped():
    net, calls = a_unet(), []
    whole, _ = sampled("whole", net)

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
    expected = data.to_uint8(sample.sample(net, DDPM(), 23, **SETTINGS, batch=5, progress=False))
    assert (whole == expected.numpy()).all() and not (whole[1:] == whole[:-1]).all((1, 2, 3)).any()


def test_samples_of_other_settings_are_refused_and_left_alone():
    net = a_unet()
    sampled("samples", net)
    before = Path("samples/samples.npy").read_bytes()
    for changed, words in (({"steps": 5}, "steps was 4, is 5"), ({"n": 24}, "n was 23, is 24")):
        with pytest.raises(ValueError, match=words):
            sampled("samples", net, **changed)
    with pytest.raises(ValueError, match="weights was"):
        sampled("samples", a_unet(1))
    net.process = {"name": "flow"}
    with pytest.raises(ValueError, match=r"time was \{\}, is \{'name': 'flow'\}"):
        sampled("samples", net)
    net.process = {}
    assert Path("samples/samples.npy").read_bytes() == before
    with pytest.raises(OSError, match="GB"):
        sample.open_samples("huge", net, 10**12, (3, 256, 256))
    sample.open_samples("room", net, 1000, (3, 16, 16))
    assert Path("room/samples.npy").stat().st_blocks * 512 >= 1000 * 3 * 256  # it is taken, not promised


def test_samples_that_were_cut_off_are_refused(tmp_path):
    folder, net = tmp_path / "cut", a_unet()
    sample.open_samples(folder, net, 8, SHAPE)
    for name in ("samples.npy", "done.npy"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - 4])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            sample.open_samples(folder, net, 8, SHAPE)
        (folder / name).write_bytes(content)


def test_images_that_are_not_finite_are_marked():
    class Diverging(Halver):
        shape = SHAPE

        def forward(self, x_t, t, cond=None):
            return torch.where(x_t[:, :1, :1, :1] > 0, math.nan, x_t * self.scale)

    images, done = sampled("diverged", a_unet(), through=Diverging())
    assert set(done) == {1, 2} and (images[done == 2] == 128).all()


# ---- The command -----------------------------------------------------------------------------------------------------


def a_run(folder, **settings):
    """A finished run as far as sampling looks at it: two students and its settings."""
    for i, name in enumerate(("out-0", "place-0")):
        a_unet(i).save(f"{folder}/student/{name}")
    config = {"kd": ["out", "place"], "sample_steps": 3, "eta": 0.0, "teacher": "train"} | settings
    Path(folder, "config.json").write_text(json.dumps(config))
    return str(folder)


def test_images_of_the_students_of_a_run(capsys):
    assert sample.main([a_run("runs/first"), "--num", "5", "--out", "images"]) == 0
    assert "5 images each" in capsys.readouterr().out
    names = ["first-out-0", "first-place-0", "samples.png"]
    assert sorted(path.name for path in Path("images").iterdir()) == names
    images = np.stack([np.asarray(Image.open(f"images/first-out-0/{i:05d}.png")) for i in range(5)])  # (5, 8, 8)
    expected = sample.sample(a_unet(0), DDPM(), 5, seed=0, steps=3, progress=False)
    assert (images == sample.visible(expected)[:, 0]).all()

    assert list(sample.open_networks([Path("runs/first/student")])) == ["first-out-0", "first-place-0"]
    assert sample.main(["runs/first/student/place-0", "--sample-steps", "2", "--device", "cpu"]) == 0
    assert len(list(Path("runs/samples/place-0").glob("*.png"))) == 16 and Path("runs/samples/samples.png").is_file()
    assert "older" not in capsys.readouterr().out
    assert sample.main(["runs/first/student/place-0", "--sample-steps", "2", "--num", "5"]) == 0
    assert "older images are there too, 11 with numbers from 00005 on" in capsys.readouterr().out
    assert len(list(Path("runs/samples/place-0").glob("*.png"))) == 16


def test_images_are_not_written_among_those_that_were_trained_on(capsys):
    Path("photos").mkdir()
    a_run("runs/mine", data="photos")
    said = refused(sample.main, ["runs/mine", "--out", "photos/new"], capsys)
    assert "--out photos/new lies in --data photos" in said and not [*Path("photos").iterdir()]


def test_previews_of_a_run_that_is_not_finished_are_called_so(capsys):
    for finished in (False, True):
        a_run("runs/mine")
        if finished:
            Path("runs/mine/metrics.json").write_text("{}")
        assert sample.main(["runs/mine", "--num", "1", "--sample-steps", "2"]) == 0
        assert ("runs/mine is not finished: its students are previews" in capsys.readouterr().err) != finished


def test_what_lies_above_a_network_is_no_matter():
    a_unet().save("project/nets/net")
    Path("project/config.json").write_text("// of something else\n{}")
    assert sample.run_of(Path("project/nets/net")) is None
    Path("project/nets/net/config.json").write_text("{")
    with pytest.raises(ValueError, match="it must be the folder of a run or of a network"):
        sample.run_of(Path("project/nets/net"))


def test_a_disk_that_fails_on_the_way_is_one_sentence(monkeypatch, capsys):
    a_unet().save("net")
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "distil.sample: error: [Errno 28] No space left" in refused(sample.main, ["net", "--num", "1"], capsys)


def test_prompts_are_text_with_or_without_the_mark_of_windows(monkeypatch):
    monkeypatch.setattr(sample, "TextEncoder", lambda *_, **__: None)
    flags = sample.Flags(prompts="prompts.txt", teacher="net")
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\na caf\xc3\xa9\r\n")
    assert sample.open_text(flags, torch.device("cpu"))[0] == ["a cat", "a café"]
    Path("prompts.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--prompts prompts.txt is no text in UTF-8: save it so"):
        sample.open_text(flags, torch.device("cpu"))


def test_a_student_of_few_steps_is_sampled_in_them():
    net = a_unet()
    net.process = {"fold": [10, 200, 900]}
    net.save("net")
    sample.main(["net", "--num", "4", "--out", "images"])
    noise = sample.start_noise(4, SHAPE, 0)
    expected = sample.visible(DDPM().fold([10, 200, 900]).sample(net, noise.shape, 3, noise=noise))
    assert (np.asarray(Image.open("images/net/00003.png")) == expected[3, 0]).all()


def test_classes_come_in_turn():
    a_dit(3).save("net")
    job = sample.prepare([Path("net")], sample.Flags(num=7, device="cpu", sample_steps=2))
    assert job.arguments["net"]["cond"]["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample.main(["net", "--num", "7", "--sample-steps", "2"]) == 0


def test_flags_come_before_the_run_and_runs_have_to_agree():
    runs = [Path(a_run("a", eta=0.5, sample_steps=7)), Path(a_run("b", eta=1.0, sample_steps=7))]
    with pytest.raises(ValueError, match="sampled with different eta: give --eta"):
        sample.sampler_of(runs, sample.Flags())
    older = {**json.loads((runs[0] / "config.json").read_text()), "teacher": "folder"}
    (runs[0] / "config.json").write_text(json.dumps(older))
    found = sample.sampler_of(runs, sample.Flags(eta=0.25))
    assert found.teacher is None  # asked for where it is needed
    (runs[0] / "config.json").write_text(json.dumps({**older, "spacing": None}))  # once there was but the usual one
    (runs[1] / "config.json").write_text(json.dumps({**older, "spacing": "leading"}))
    assert sample.sampler_of(runs, sample.Flags()).spacing == "leading"
    a_unet().save(runs[0] / "student" / "none-0")
    assert sample.sampler_of([runs[0] / "student" / "none-0"], sample.Flags()).sample_steps == 7  # as its run did
    assert (found.eta, found.sample_steps, found.spacing, found.guidance) == (0.25, 7, "leading", 1.0)
    a_unet().save("net")
    assert sample.sampler_of([Path("net")], sample.Flags()).process == "ddpm"


@pytest.mark.parametrize("family", ["sd", "mmdit"])
def test_an_image_for_each_prompt_beside_the_teachers(family, pipelines, capsys):
    Path("prompts.txt").write_text("a b\n\ncab\n")
    more = ["--prompts", "prompts.txt", "--teacher", str(pipelines[family]), "--sample-steps", "2", "--out", "images"]
    assert sample.main([str(pipelines[family]), *more, "--guidance", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 images each")
    teacher, same = (np.asarray(Image.open(f"images/{name}/00001.png")) for name in ("teacher", family))
    assert teacher.shape == (64, 64, 3) and (teacher == same).all()
    assert Image.open("images/samples.png").size[0] > 128
    Path("prompts.txt").write_text("cab\n\na b\n")
    assert sample.main([str(pipelines[family]), *more, "--guidance", "2", "--out", "others"]) == 0
    for i in range(2):  # from the same noise: each is of its own prompt
        one, other = (np.asarray(Image.open(f"{out}/{family}/{i:05d}.png")) for out in ("images", "others"))
        assert (one != other).any()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of saved networks, of which refusals change nothing."""
    folder = tmp_path_factory.mktemp("networks")
    a_unet().save(folder / "net")
    UNet(16, in_channels=1, channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=4).save(folder / "large")
    UNet(8, in_channels=4, channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=4).save(folder / "latents")
    few = a_unet()
    few.process = {"fold": [0, 300, 600]}
    a_dit(3, class_dropout_prob=0.0).save(folder / "sure")
    few.save(folder / "few")
    few.process = {"name": "flow"}
    few.save(folder / "flow")
    (folder / "empty.txt").write_text("\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net", "--num", "0"], "--num 0 cannot be used, it must be at least 1"),
        (["net", "--batch", "0"], "--batch 0"),
        (["net", "--seed", "-1"], "--seed -1"),
        (["net", "--eta", "2"], "--eta 2.0 cannot be used"),
        (["net", "--sample-steps", "1001"], "1001"),
        (["net", "--process", "flow", "--eta", "1"], "a flow is sampled without new noise: eta must be 0, got 1.0"),
        (["net", "--spacing", "even"], "choose from leading, linspace"),
        (["net", "--device", "cuda:99"], "--device cuda:99 is not on this machine"),
        (["net", "net"], "net has the name of one before it"),
        (["net", "large"], "large has another image shape"),
        (["net", "few"], "few has another image shape or number of timesteps"),
        (["net", "--steps", "7"], "there is no --steps; did you mean --sample-steps?"),
        (["net", "--colour"], "unrecognized arguments: --colour"),
        (["net", "--out", "empty.txt"], "--out empty.txt is a file: give a folder"),
        (["net", "--out", "empty.txt/images"], "--out empty.txt is a file: give a folder"),
        (["net", "--out", "/proc/images"], "/proc/images"),
        (["nowhere"], "nowhere is not a saved network"),
        (["sure", "--guidance", "2"], "sure was trained with a class for every image, so it cannot be guided: use --"),
        (["net", "--sampler", "pndm", "--sample-steps", "1"], "PNDM takes a number of 2 to 999 steps, got 1"),
        (["net", "--sampler", "pndm", "--sample-steps", "1000"], "PNDM takes a number of 2 to 999 steps, got 1000"),
        (["sure", "--process", "flow"], "sure predicts a variance, of which the process flow has none"),
        (["flow", "--process", "ddpm"], "flow was trained for the process flow: use --process flow"),
        (["flow", "--clip-x0"], "--clip-x0 is of DDPM, and flow is sampled by Euler steps: leave it out"),
        (["net", "--sampler", "pndm", "--clip-x0"], "eta 0 and no clip_x0"),
        (["latents"], "these networks make latents of 4 channels: name the VAE with --vae"),
        (["net", "--prompts", "empty.txt"], "--prompts is for networks that read text"),
        (["{sd}"], "give --prompts FILE, with a prompt a line"),
        (["{sd}", "--prompts", "empty.txt"], "these networks need --teacher"),
        (["{sd}", "--prompts", "empty.txt", "--teacher", "{sd}"], "empty.txt holds no prompt"),
        (["{sd}", "--prompts", "nowhere.txt", "--teacher", "{sd}"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, pipelines, networks, monkeypatch, capsys):
    monkeypatch.chdir(networks)
    with pytest.raises(SystemExit) as stopped:
        sample.main([argument.format(sd=pipelines["sd"]) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and words in err
    assert err.startswith("distil.sample: error: ") and err.count("\n") == 1 and not Path("runs").exists()


def test_a_run_that_has_no_student_yet_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / ".lock").touch()  # as train.py leaves it, whatever comes after
    assert "is a run that has no student yet" in refused(sample.main, [str(tmp_path), "--num", "2"], capsys)
    student = tmp_path / "student"
    student.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):  # one of diffusers
        (student / name).touch()
    assert [*sample.find_networks([tmp_path]).values()] == [student]
    shutil.rmtree(student)
    a_unet().save(tmp_path / "teacher")
    assert "networks in it: teacher" in refused(sample.main, [str(tmp_path), "--num", "2"], capsys)
