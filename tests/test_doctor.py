"""distil/doctor.py: what it says of students whose illness was planted."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import a_unet, refused
from PIL import Image

from distil import calibrate, doctor, metrics, sample, shards
from distil.process import DDPM, RectifiedFlow
from models import regroup


@pytest.fixture(autouse=True)
def _images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 20 * i + 20, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{i}.png")


def asked(capsys, *arguments):
    few = ["--teacher", "teacher", "--images", "images", "--num", "12", "--sample-steps", "4"]
    assert doctor.main([*arguments, *few]) == 0
    return capsys.readouterr().out


def test_a_student_that_is_a_line_off_is_to_be_calibrated(capsys):
    teacher = a_unet()
    teacher.save("teacher")
    student = a_unet()
    student.conv_out.weight.data *= 0.5
    student.conv_out.bias.data += 0.3
    student.save("student")
    out = asked(capsys, "student")
    norms = len(teacher.norms())
    assert f"student: 0 of {norms} norms have one channel a group" in out
    shares = [float(line.split("|")[3]) for line in out.splitlines() if re.match(r"\| \d+ ", line)]
    assert len(shares) == 4 and min(shares) > 0.99
    said = out.splitlines()[-1]
    command = "python -m distil.calibrate student --teacher teacher --images images"
    assert said.startswith(f"advice: {command}: ") and "the cause" not in said
    before, after = map(float, re.search(r"falls from (\S+) to (\S+)", said).groups())
    assert after < 0.2 * before
    assert not list(Path("student").glob("calibration*"))


def test_a_student_that_is_its_teacher_needs_nothing(capsys):
    net = regroup(a_unet(), 1)
    net.save("teacher")
    net.save("student")
    out = asked(capsys, "student")
    assert f"{len(net.norms())} of {len(net.norms())} norms have one channel a group" in out
    assert out.splitlines()[-1] == "advice: nothing; no remedy here brings it much nearer to its teacher"
    assert [line.split("|")[3].strip() for line in out.splitlines() if re.match(r"\| \d+ ", line)] == ["0.000"] * 4


def test_a_flow_of_no_run_says_its_process_itself(capsys):
    for name in ("teacher", "student"):
        net = a_unet()
        net.process = {"name": "flow"}
        net.save(name)
    assert "advice: nothing" in asked(capsys, "student")
    words = refused(doctor.main, ["student", "--teacher", "teacher", "--images", "images", "--process", "sd"], capsys)
    assert "student was trained for the process flow" in words


def test_a_student_that_pndm_samples_stands_beside_a_teacher_that_it_samples():
    net = a_unet()
    net.save("teacher")
    net.save("student")
    case = doctor.open_case(
        Path("student"), sample.Flags(teacher="teacher", sampler="pndm", sample_steps=4, num=6), "images"
    )
    rows, _ = case.compare(doctor.Way(name, one, {"method": name}) for name, one in case.students.items())
    assert case.own.sampler == "PNDM" and rows[1]["teacher_mse"] == 0
    calibration = calibrate.fit_calibration(net, net, case.process, case.x0, case.times)
    ways = doctor.remedies("student", calibration, case)
    assert [way.about["method"] for way in ways] == ["as it is", "calibrated"]  # PNDM has no clamping


def test_norms_of_one_channel_a_group_are_named_as_the_cause():
    said = doctor.advice("it", {"as it is": 4.0, "clamped": 0.5, "calibrated": 0.1}, lonely=3)
    assert said.startswith("advice: python -m distil.calibrate it: ") and "falls from 4 to 0.1" in said
    assert "--norm-groups scale, or --head statistics" in said
    assert "--head" not in doctor.advice("it", {"as it is": 4.0, "clamped": 0.5}, lonely=3, headed=False)
    assert doctor.advice("it", {"as it is": 4.0, "clamped": 0.5}, 0).startswith("advice: sample it with --clip-x0")


def test_the_sampler_multiplies_the_first_error():
    noisiest = DDPM().alpha_bar[980].item()
    assert doctor.first_gain(DDPM(), 980) == pytest.approx(((1 - noisiest) / noisiest) ** 0.5, rel=1e-3)
    assert doctor.first_gain(DDPM(clip_x0=True), 980) == doctor.first_gain(DDPM(), 980)  # before clamping
    assert doctor.first_gain(RectifiedFlow(), 1000.0) == pytest.approx(1.0)


def test_samples_are_compared_with_as_many_images_as_memory_holds(monkeypatch):
    a_unet().save("student")
    flags = sample.Flags(teacher="student", sample_steps=2, num=6)
    case = doctor.open_case(Path("student"), flags, "images")
    whole = case.real.images[np.arange(12)]
    seen = []
    ruler = metrics.Ruler
    monkeypatch.setattr(metrics, "Ruler", lambda real, classifier: seen.append(real) or ruler(real, classifier))
    case.compare([])
    monkeypatch.setattr(shards, "ROOM", 4.5 * 64)  # bytes: four images
    case.compare([])
    monkeypatch.setattr(shards, "MOST", 3)
    case.compare([])
    for found, rows in zip(seen, (range(12), [0, 4, 7, 11], [0, 6, 11]), strict=True):
        assert np.array_equal(found, whole[list(rows)])


def test_a_student_in_a_folder_called_teacher_is_refused_for_it_would_be_compared_with_itself(capsys):
    a_unet().save("teacher")
    few = ["teacher", "--teacher", "teacher", "--images", "images", "--num", "12", "--sample-steps", "4"]
    for program in (doctor, calibrate):
        assert "in a folder called teacher" in refused(program.main, few, capsys)
    assert not Path("teacher/calibration.safetensors").exists()
