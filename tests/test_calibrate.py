"""distil/calibrate.py: the fit finds what was planted, a calibration is kept bit for bit, the command does it all."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import a_unet, refused
from PIL import Image
from safetensors import safe_open
from torch import nn

import train
from benchmarks import calibrate as study
from distil import calibrate, data, doctor, evaluate, machine, metrics, report, sample
from distil.calibrate import FILE, Calibrated, Calibration, fit_calibration
from distil.doctor import open_case
from distil.process import DDPM, Guided, RectifiedFlow, process_of
from distil.settings import parse
from models import DiT, Network, UNet, correct, fingerprint, prune_channels, regroup, statistics

TIMES = [40, 400, 800]


def dit(seed=0, **options):
    torch.manual_seed(seed)
    net = DiT(8, in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3, **options).eval()
    nn.init.normal_(net.final_layer.linear.weight, std=0.3)
    nn.init.normal_(net.final_layer.adaLN_modulation[1].weight, std=0.3)
    return net


class Planted(Network):
    """A teacher that is its student with a line in each image and channel, linear in the five statistics."""

    def __init__(self, student, weights):
        super().__init__()
        self.student, self.weights, self.shape = student, weights, student.shape

    def no_condition(self):
        return self.student.no_condition()

    def forward(self, x_t, t, cond=None):
        output = self.student(x_t, t, cond)
        return correct(x_t, output, self.weights[torch.searchsorted(torch.tensor(TIMES), t.long())])


@pytest.fixture(scope="module", autouse=True)
def _ruler():
    """No test here asks what the ruler of digits says: it is not trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "digit_classifier", lambda size: metrics.DigitClassifier().eval())
        yield


def images(n=24, channels=1, seed=1):
    x = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x * torch.linspace(0.2, 1, n)[:, None, None, None]  # of many contrasts


def planted(channels):
    return 0.2 * torch.randn(len(TIMES), channels, 5, 2, generator=torch.Generator().manual_seed(2))


CASES = {
    "noise": (a_unet, DDPM, 1),
    "colour": (lambda: a_unet(channels=3), DDPM, 3),
    "v": (a_unet, lambda: DDPM(prediction="v"), 1),
    "flow": (a_unet, RectifiedFlow, 1),
    "classes and a variance": (dit, DDPM, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fit_finds_the_line_that_was_planted(name):
    make, process, channels = CASES[name]
    student, weights, x0 = make(), planted(channels), images(64, channels)
    teacher, cond = Planted(student, weights), {"y": torch.arange(64) % 3} if student.conditions else None
    arguments = (student, teacher, process(), x0, TIMES, cond)
    found = fit_calibration(*arguments, draws=2, ridge=1e-13)
    assert found.times.tolist() == TIMES and found.weights.shape == (3, channels, 5, 2)
    x_t, told = images(6, channels, seed=3), {"y": torch.arange(6) % 3} if student.conditions else {}
    for t in TIMES:  # on images and noise that the fit has not seen
        at = torch.full((6,), t)
        expected, plain = teacher(x_t, at, told), student(x_t, at, told)
        corrected = Calibrated(student, found)(x_t, at, told)
        assert (expected - plain).abs().max() > 0.1
        torch.testing.assert_close(corrected, expected, rtol=0, atol=2e-3)
        assert torch.equal(corrected[:, channels:], plain[:, channels:])  # of the variance
    drawn = fit_calibration(*arguments, draws=2, ridge=1e6).weights
    assert drawn.abs().max() < 1e-3 < found.weights.abs().max()  # to the identity


def test_it_is_the_least_squares_of_the_outputs():
    student, teacher, x0, process = a_unet(), a_unet(1), images(40), DDPM()
    generator = torch.Generator().manual_seed(machine.hash_seed(0, 0))
    x_t = process.add_noise(x0, torch.randn(x0.shape, generator=generator), torch.full((40,), 400))
    with torch.no_grad():
        e_s, e_t = (net(x_t, torch.full((40,), 400)).double() for net in (student, teacher))
    f = statistics(x_t, e_s).double().expand(-1, 64, -1)  # (B, N, 5)
    e = e_s.flatten(2).mT  # (B, N, 1)
    unknowns = torch.stack([f, f * e], dim=3).flatten(2).flatten(0, 1)  # (B N, 10)
    expected = torch.linalg.lstsq(unknowns, (e_t - e_s).flatten()[:, None]).solution.view(5, 2)
    for batch in (256, 7):
        found = fit_calibration(student, teacher, process, x0, [400], draws=1, ridge=1e-14, batch=batch)
        torch.testing.assert_close(found.weights[0, 0], expected.float(), rtol=1e-3, atol=1e-3)


def test_a_perfect_student_is_left_as_it_is():
    student, x_t, t = a_unet(), images(6), torch.tensor([0, 40, 55, 400, 799, 999])
    found = fit_calibration(student, a_unet(), DDPM(), images(), TIMES)
    assert torch.equal(found.weights, torch.zeros(3, 1, 5, 2))
    assert torch.equal(Calibrated(student, found)(x_t, t), student(x_t, t))


def test_outputs_that_are_not_finite_are_refused(tmp_path, monkeypatch, capsys):
    wild, x0 = a_unet(1), images()
    wild.conv_out.weight.data *= 3e38
    for student, teacher in ((wild, a_unet()), (a_unet(), wild)):
        with pytest.raises(ValueError, match="outputs are not finite at timestep 400: "):
            calibrate.fit_calibrations([a_unet(), student], teacher, DDPM(), x0, [400, 800])
    large = a_unet(1)
    large.conv_out.bias.data += 1e10  # finite, but all statistics of it are the same
    with pytest.raises(ValueError, match="outputs are too large at timestep 400: "):
        calibrate.fit_calibrations([large], a_unet(), DDPM(), x0, [400])
    monkeypatch.chdir(tmp_path)
    wild.save("wild")
    a_unet().save("teacher")
    told = ["wild", "--teacher", "teacher", "--images", "digits", "--num", "6", "--sample-steps", "2"]
    for command in (calibrate, doctor):
        assert "outputs are not finite at timestep" in refused(command.main, told, capsys)
    assert not [*tmp_path.glob(f"**/{FILE}")]


def test_between_two_timesteps_the_weights_lie_on_the_line():
    weights = planted(1)
    calibration = Calibration(torch.tensor(TIMES).float(), weights, {})
    x, e = images(7), images(7, seed=5)
    t = torch.tensor([0.0, 40.0, 130.0, 400.0, 600.0, 800.0, 999.0])
    expected = [weights[0], weights[0], 0.75 * weights[0] + 0.25 * weights[1], weights[1],
                0.5 * weights[1] + 0.5 * weights[2], weights[2], weights[2]]  # fmt: skip
    torch.testing.assert_close(calibration(x, t, e), correct(x, e, torch.stack(expected)))
    one = Calibration(torch.tensor([400.0]), weights[:1], {})
    assert torch.equal(one(x, t, e), correct(x, e, weights[:1].expand(7, -1, -1, -1)))


def test_students_of_one_call_get_what_each_gets_alone():
    students, arguments = [a_unet(1), a_unet(2)], (a_unet(), DDPM().fold(10), images(), [2, 9])
    together = calibrate.fit_calibrations(students, *arguments)
    for student, found in zip(students, together, strict=True):
        alone = fit_calibration(student, *arguments)
        assert torch.equal(found.weights, alone.weights) and found.about == alone.about


def test_guidance_extrapolates_between_corrected_predictions():
    student, x, t = dit(), images(4, 2), torch.full((4,), 400)
    told, null = {"y": torch.tensor([0, 1, 2, 0])}, {"y": torch.full((4,), 3)}
    asked = []

    class Asked(Planted):
        def forward(self, x_t, t, cond=None):
            asked.append(cond["y"].tolist())
            return super().forward(x_t, t, cond)

    found = fit_calibration(student, Asked(student, planted(2)), DDPM(), x, [400], told)
    assert asked == [[0, 3, 2, 3]] and told["y"].tolist() == [0, 1, 2, 0]  # every second image without its class
    fit_calibration(dit(class_dropout_prob=0.0), Asked(student, planted(2)), DDPM(), x, [400], told)
    assert asked[1:] == [[0, 1, 2, 0]]  # for a student knows no other way
    net = Calibrated(student, found)
    guided = Guided(net, 2.0, net.no_condition(), net.guided_channels)(x, t, told)
    c, u = net(x, t, told), net(x, t, null)
    torch.testing.assert_close(guided[:, :2], (u + 2 * (c - u))[:, :2])
    assert torch.equal(guided[:, 2:], student(x, t, told)[:, 2:])


def test_a_calibrated_network_is_like_any_other():
    for inner in (a_unet(), dit()):
        calibration = Calibration(torch.tensor([400.0]), planted(inner.shape[0])[:1], {})
        net = Calibrated(inner, calibration)
        inner.process = {"fold": 20}
        for name in Network.__annotations__.keys() - {"blocks", "pruning"} | {"num_classes", "predicts_variance"}:
            if hasattr(inner, name):
                assert getattr(net, name) is getattr(inner, name), name
        assert process_of(net).steps == 20 and net.no_condition() == inner.no_condition()
        assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in inner.parameters())
        before = fingerprint(net.state_dict().values())
        calibration.weights[0, 0, 0, 0] += 1e-3
        assert fingerprint(net.state_dict().values()) != before  # samples on disk tell the difference


def test_what_would_change_the_weights_below_a_calibration_is_refused():
    for inner in (a_unet(), dit()):
        calibration, before = Calibration(torch.tensor([400.0]), planted(inner.shape[0])[:1], {}), dict(inner.config)
        net, weights = Calibrated(inner, calibration), fingerprint(inner.state_dict().values())
        for change in (partial(prune_channels, net, 0.5), partial(regroup, net, 2), partial(net.set_head, "statistics"),
                       net.reset_parameters, partial(net.keep_blocks, [0])):  # fmt: skip
            with pytest.raises(ValueError, match="take `net`, the network without it"):
                change()
        assert inner.config == before and net.head is calibration
        assert fingerprint(inner.state_dict().values()) == weights


def test_times_of_any_precision_are_taken():
    calibration = Calibration(torch.tensor([0.0, 400.0, 900.0]), planted(1), {})
    x, times = images(3), torch.tensor([0, 250, 950])
    want = calibration(x, times, x)
    assert torch.equal(calibration(x, times.double(), x), want) and not torch.equal(want, x)


def test_saved_and_loaded_bit_for_bit_and_off_by_one_word(tmp_path):
    student, teacher, x, t = a_unet(), a_unet(1), images(4), torch.tensor([0, 100, 400, 900])
    student.save(tmp_path)
    assert type(calibrate.load(tmp_path)) is UNet
    found = fit_calibration(student, teacher, DDPM(), images(), TIMES, draws=1)
    Calibrated(student, found).save(tmp_path)
    loaded = calibrate.load(tmp_path)
    assert torch.equal(loaded(x, t), Calibrated(student, found)(x, t)) and not torch.equal(loaded(x, t), student(x, t))
    assert torch.equal(calibrate.load(tmp_path, calibrated=False)(x, t), student(x, t))
    with safe_open(tmp_path / FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["images"] == 24 and about["draws"] == 1 and not loaded.training


def test_a_calibration_of_other_weights_is_refused(tmp_path):
    student = a_unet()
    student.save(tmp_path)
    fit_calibration(student, a_unet(1), DDPM(), images(), TIMES, draws=1).save(tmp_path)
    a_unet(2).save(tmp_path)
    with pytest.raises(ValueError, match="made for other weights: fit it again, or"):
        calibrate.load(tmp_path)
    a_unet().save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    wide = fit_calibration(a_unet(0, 3), a_unet(1, 3), DDPM(), images(channels=3), TIMES, draws=1)
    wide.about["student"] = json.loads(safe_open(tmp_path / FILE, "pt").metadata()["about"])["student"]
    nameless = fit_calibration(student, a_unet(1), DDPM(), images(), TIMES, draws=1)
    nameless.about.clear()
    contents = [b"1234", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]]
    for odd in (wide, nameless):
        odd.save(tmp_path)
        contents.append((tmp_path / FILE).read_bytes())
    for content in contents:
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: fit it again, or"):
            calibrate.load(tmp_path)
    assert type(calibrate.load(tmp_path, calibrated=False)) is UNet


# ---- Networks of others ----------------------------------------------------------------------------------------------


def test_a_pipeline_of_diffusers_samples_with_it(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    settings = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
    unet = diffusers.UNet2DModel(
        8, **settings, **blocks, norm_num_groups=4, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    pipeline = diffusers.DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    student = calibrate.teachers.load(tmp_path)
    calibration = fit_calibration(student, unet_like(student), DDPM(), images(), DDPM().timesteps(5))

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipeline(3, generator=generator, num_inference_steps=5, eta=0.0, output_type="np").images

    before, handle = draw(), calibration.attach(pipeline.unet)
    after, noise = draw(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = DDPM().sample(Calibrated(student, calibration), noise.shape, 5, noise=noise)
    seen = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(after - seen).max() < 1e-3 < abs(after - before).max()
    x, t = images(2), torch.tensor([400, 400])
    assert torch.equal(unet(x, 400, return_dict=False)[0], unet(x, timestep=t).sample)
    handle.remove()
    assert (draw() == before).all()


def unet_like(net):
    """Its shape with other weights."""
    other = net.like(net.config, net.state_dict()).eval()
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return other


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run of two students stands in runs/tiny."""
    folder = tmp_path_factory.mktemp("calibrate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "curves", lambda *_: None)  # would take longer than training
        patch.setattr(metrics, "macs", lambda net: 0)
        tiny = ["--channels", "16", "--steps", "4", "--teacher-steps", "4", "--batch-size", "4", "--sample-steps", "3"]
        assert train.main(parse([*tiny, "--kd", "none", "place", "--eval-samples", "0", "--out", "runs/tiny"])) == 0
    return folder


def test_the_command_calibrates_a_run_which_is_then_sampled_so(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(metrics, "macs", lambda net: 0)
    assert calibrate.main(["runs/tiny", "--num", "12", "--out", "shown"]) == 0
    table = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows == ["teacher", "none", "none, calibrated", "place", "place, calibrated"]
    assert "3 timesteps fitted on 297 images; 12 samples each" in table
    assert Path("shown/calibration.png").is_file()
    nets = [calibrate.load(f"runs/tiny/student/{name}-0") for name in ("none", "place")]
    teacher = open_case(Path("runs/tiny"), sample.Flags()).teacher
    x0 = data.to_float(data.load("digits", split="test").images[:40])
    for net in nets:  # nearer to the teacher at every timestep that the sampler visits
        for t in net.head.times.tolist():
            now = torch.full((40,), int(t))
            x_t = DDPM().add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)), now)
            with torch.no_grad():
                before, after = ((one(x_t, now) - teacher(x_t, now)).square().mean() for one in (net.net, net))
            assert after < before

    def samples(*flags):
        assert sample.main(["runs/tiny", "--num", "2", "--out", "images", *flags]) == 0
        return {file.parent.name: file.read_bytes() for file in Path("images").glob("*/00000.png")}

    assert samples("--no-calibration").keys() == {"tiny-none-0", "tiny-place-0"}
    both = samples()
    assert both["tiny-none-0-calibrated"] != both["tiny-none-0"] and len(both) == 4
    real = ["--dataset", "digits", "--num", "12", "--out", "scores"]
    assert evaluate.main(["runs/tiny/student/none-0", *real], metrics.pixels) == 0
    assert "| none-0-calibrated |" in capsys.readouterr().out


def test_a_student_in_a_run_finds_its_teacher_and_another_is_told(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    inside = open_case(Path("runs/tiny/student/none-0"), sample.Flags(), n=10)
    assert inside.x0.shape == (10, 1, 8, 8) and inside.classifier and len(inside.real.images) == 1500
    assert len(inside.times) == 3  # as the run samples
    rows = np.linspace(0, 296, 10).round().astype(int)
    assert torch.equal(inside.x0, data.to_float(data.load("digits", split="test").images[rows]))
    a_unet(1).save(tmp_path / "alone")
    a_unet(2).save(tmp_path / "its teacher")
    for i in range(7):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    told = ["--teacher", str(tmp_path / "its teacher"), "--images", str(tmp_path)]
    few = ["--num", "6", "--sample-steps", "2", "--out", str(tmp_path / "shown")]
    assert calibrate.main([str(tmp_path / "alone"), *told, *few]) == 0
    assert "2 timesteps fitted on 7 images" in capsys.readouterr().out
    assert (tmp_path / "alone" / FILE).is_file()
    other = open_case(Path("runs/tiny"), sample.Flags(), images=str(tmp_path))  # than the teacher was trained on
    assert {*inside.students} < {*other.students} and len(other.real.images) < 10
    shutil.rmtree("runs/teachers")
    assert "the teacher of runs/tiny is not kept here" in refused(calibrate.main, ["runs/tiny"], capsys)


def test_a_student_that_may_not_be_written_is_refused_before_the_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_unet().save("net")
    monkeypatch.setattr(calibrate, "fit_calibrations", lambda *_, **__: pytest.fail("fitted in vain"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = refused(calibrate.main, ["net", "--teacher", "net", "--images", "digits", "--num", "6"], capsys)
    assert "the calibration belongs into net, which cannot be written" in said


def test_a_fold_of_a_fold_is_asked_at_the_times_of_its_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, fold in {"teacher": list(range(0, 1000, 10)), "student": list(range(0, 1000, 100))}.items():
        net = a_unet()
        net.process = {"fold": fold}
        net.save(name)
    case = open_case(Path("student"), sample.Flags(teacher="teacher", sample_steps=5), "digits", n=8)
    assert case.own.steps == 100 and case.process.phi(torch.arange(10)).tolist() == list(range(0, 100, 10))
    assert [len(found.times) for found in case.fit().values()] == [5]


def test_a_name_is_cut_where_a_seed_stands_and_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "digit_classifier", lambda size: None)
    monkeypatch.setattr(metrics, "macs", lambda net: 0)
    for name, shown in {"my-student": "my-student", "place-12": "place", "7": "7"}.items():
        a_unet(1).save(name)
        few = ["--num", "6", "--sample-steps", "2", "--out", "shown"]
        assert calibrate.main([name, "--teacher", name, "--images", "digits", *few]) == 0
        rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert rows[2:] == ["teacher", shown, f"{shown}, calibrated"]


def test_the_pictures_of_a_study_are_of_its_first_seed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    rows = [{"method": "teacher"}, *({"method": "out", "seed": seed} for seed in (1, 11))]
    shown = {}
    monkeypatch.setattr(report, "grid", lambda path, samples, lines: shown.update(samples))
    monkeypatch.setattr(report, "table", lambda rows: "")
    study.write(tmp_path / "out", Path("runs/tiny"), 3, "", rows, {"teacher": 0, "out-1": 1, "out-11": 2})
    assert shown == {"teacher": 0, "out": 1}


@pytest.mark.parametrize(("more", "size"), [({}, 256), ({"batch": 3}, 3)])
def test_images_are_fitted_as_many_at_a_time_as_they_are_sampled(more, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_unet().save("net")
    case, asked = open_case(Path("net"), sample.Flags(teacher="net", sample_steps=2, **more), "digits", n=8), []
    monkeypatch.setattr(calibrate, "fit_calibrations", lambda *_, batch, **__: asked.append(batch) or [None])
    case.fit()
    assert asked == [size]


REFUSED = [
    (["alone"], "alone belongs to no run: give --teacher, a network, and --images, a folder or digits"),
    (["alone", "--teacher", "wide", "--images", "digits"], "use one that fits"),
    (["alone", "--teacher", "nowhere", "--images", "digits"], "nowhere is not a saved network"),
    (["alone", "--teacher", "alone", "--images", "nowhere"], "nowhere"),
    (["nowhere"], "nowhere is not a saved network"),
    (["alone", "--sample-steps", "0"], "--sample-steps 0 cannot be used"),
    (["alone", "--teacher", "alone", "--images", "digits", "--num", "1"], "at least 2 of each, and there is 1: give"),
    (["told", "--teacher", "told", "--images", "flat"], "the teacher needs classes, and flat has none: put its images"),
    (["told", "--teacher", "told", "--images", "digits"], "knows the classes 0 to 2, but the data has a class 9"),
    (["told", "--teacher", "alone", "--images", "sorted"], "told knows 3 classes, its teacher no: use a student"),
    (["sure", "--teacher", "sure", "--images", "sorted", "--guidance", "2"], "cannot be guided: use --guidance 1"),
    (["alone", "--teacher", "few", "--images", "digits"], "timesteps or a process that this teacher has not"),
    (["few", "--teacher", "other", "--images", "digits"], "timesteps or a process that this teacher has not"),
    (["few", "--teacher", "cosine", "--images", "digits"], "timesteps or a process that this teacher has not"),
    (["alone", "--teacher", "alone", "--images", "digits", "--out", "alone/config.json"], "is a file: give a folder"),
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of saved networks and of images, of which refusals change nothing."""
    folder = tmp_path_factory.mktemp("networks")
    a_unet().save(folder / "alone")
    a_unet(channels=3).save(folder / "wide")
    for name, process in {"few": [0, 300], "other": [0, 500, 900]}.items():
        net = a_unet()
        net.process = {"fold": process}
        net.save(folder / name)
    net.process = {"schedule": "cosine"}
    net.save(folder / "cosine")
    for name, dropout in {"told": 0.1, "sure": 0.0}.items():
        DiT(8, 2, 1, 8, 1, 2, num_classes=3, class_dropout_prob=dropout).save(folder / name)
    for i in range(6):
        for place in ("flat", f"sorted/{i % 3}"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / place / f"{i}.png")
    return folder


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_bad_input_is_one_sentence(arguments, words, networks, monkeypatch, capsys):
    monkeypatch.chdir(networks)
    assert words in refused(calibrate.main, arguments, capsys)
    assert not [*networks.glob(f"**/{FILE}")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], "nowhere is not a saved network"),
        (["alone", "file"], "OUT file is a file: give a folder"),
        (["alone", "out"], "alone belongs to no run"),
        (["alone", "out", "--fit", "0"], "--fit 0 cannot be used"),
    ],
)
def test_the_study_refuses_in_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_unet().save("alone")
    Path("file").write_text("")
    assert words in refused(study.main, arguments, capsys)
    assert not Path("out").exists()
