"""distil/evaluate.py: what the end of a run measures, tables over runs, and FID of saved networks."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, a_unet
from PIL import Image
from test_metrics import means
from test_report import cells
from test_report import metrics as a_metrics
from torch_fidelity.metric_isc import isc_features_to_metric

from distil import data, evaluate, inception, machine, metrics, pictures, report, sample, shards
from distil.process import DDPM
from distil.settings import Settings
from models import DiT

FEW = ["--num", "12", "--dataset", "digits", "--sample-steps", "2", "--device", "cpu", "--real", "100"]


@pytest.fixture(scope="module", autouse=True)
def _inside(tmp_path_factory):
    """One folder for all tests, in which the digit classifier is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("evaluate"))
        patch.setattr(metrics, "digit_classifier", functools.partial(metrics.digit_classifier, steps=20))
        yield


# ---- The end of a run ------------------------------------------------------------------------------------------------


def measured(out, teacher, nets, process=None, **options):
    """What `measure` returns for students with these networks, and the settings."""
    Path(out).mkdir(exist_ok=True)
    Path(out, "log.jsonl").write_text("")
    settings = Settings(**{"eval_samples": 12, "sample_steps": 3, "out": out} | options)
    names = [f"{method}-{seed}" for method in settings.kd for seed in settings.seeds]
    students = [
        SimpleNamespace(name=name, method=name[:-2], seed=int(name[-1]), seconds=1.23, ema=net)
        for name, net in zip(names, nets, strict=True)
    ]
    splits = (data.load("digits", split=split) for split in ("train", "test"))
    found = evaluate.measure(settings, *splits, teacher, None, students, process or DDPM(), torch.device("cpu"))
    return json.loads(json.dumps(found)), settings


def test_teacher_and_students_are_scored_on_the_same_noise():
    teacher, nets = a_unet(0), [a_unet(seed) for seed in range(1, 5)]
    found, _ = measured("run", teacher, nets, kd=("out", "place"), seeds=(0, 1), dropout=0.1)
    assert list(found) == ["settings", "machine", "protocol", "teacher", "students", "floor"]
    rows = [(row["method"], row["seed"], row["seconds"]) for row in found["students"]]
    assert rows == [(method, seed, 1.2) for method in ("out", "place") for seed in (0, 1)]
    sizes = {"parameters": metrics.parameters(teacher), "macs": metrics.macs(teacher)}
    assert found["teacher"].items() >= sizes.items() and found["teacher"]["teacher_mse"] == 0
    of_teacher, of_student = (
        sample.sample(net, DDPM(), 12, seed=0, steps=3, progress=False) for net in (teacher, nets[2])
    )
    real, classifier = data.load("digits").images, metrics.digit_classifier(8)
    expected = metrics.score(of_student, of_teacher, real, classifier)
    assert {key: found["students"][2][key] for key in expected} == expected and tuple(expected) == metrics.SCORES
    assert "1500 real, 12 generated, 297 held out; DDIM, 3 steps, eta 0; EMA" in found["protocol"]
    assert sorted(path.name for path in Path("run").glob("*.png")) == ["curves.png", "samples.png"]
    assert report.table(report.rows(found)).count("\n") == 5


def test_large_sets_are_compared_by_some_of_their_images(monkeypatch):
    monkeypatch.setattr(shards, "ROOM", 40 * 64)  # bytes: 40 images
    found, _ = measured("some", a_unet(0), [a_unet(1)], kd=("out",))
    assert "40 real, 12 generated" in found["protocol"]
    of_teacher = sample.sample(a_unet(0), DDPM(), 12, seed=0, steps=3, progress=False)
    real = data.load("digits").images[np.linspace(0, 1499, 40).round().astype(int)]
    assert found["teacher"]["frechet_pixels"] == metrics.score(of_teacher, None, real)["frechet_pixels"]


def test_students_of_few_steps_stand_beside_their_teacher_in_as_many():
    folded = DDPM().fold(5, "last")
    found, settings = measured("fold", a_unet(0), [a_unet(1)], folded, fold_steps=5, sample_steps=5, kd=("out",))
    assert settings.usual_steps == 50
    assert [row["method"] for row in found["same_steps"]] == ["teacher, 5 steps", "teacher, 5 folded"]
    usual = sample.sample(a_unet(0), DDPM(), 12, seed=0, steps=50, progress=False)
    for row, steps in zip(found["same_steps"], (5, [999, 799, 599, 399, 199]), strict=True):
        x = sample.sample(a_unet(0), DDPM(), 12, seed=0, steps=steps, progress=False)
        assert row["teacher_mse"] == metrics.score(x, usual, data.load("digits").images)["teacher_mse"] > 0
    assert "; teacher DDIM, 50 steps; others DDIM, 5 steps, eta 0; EMA" in found["protocol"]
    assert Path("fold/interpolations.png").is_file()


def test_between_two_images_the_class_stays(monkeypatch):
    monkeypatch.setattr(metrics, "macs", lambda net: 0)  # asks networks without numbers
    torch.manual_seed(0)
    nets = [DiT(8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10).eval() for _ in range(2)]
    told, forward = set(), nets[0].forward
    nets[0].forward = lambda x_t, t, cond: told.add(tuple(cond["y"].tolist())) or forward(x_t, t, cond)
    options = {"fold_steps": 5, "sample_steps": 5, "kd": ("out",), "guidance": 2.0}
    found, _ = measured("told", nets[0], nets[1:], DDPM().fold(5, "last"), **options)
    assert len(found["same_steps"]) == 2 and Path("told/interpolations.png").is_file()
    assert (0,) * 16 + (1,) * 16 in told


def test_networks_that_are_told_the_class():
    torch.manual_seed(0)
    nets = [DiT(8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10) for _ in range(2)]
    found, _ = measured("dit", nets[0], nets[1:], arch="dit", kd=("out",), eta=0.0)
    assert all(0 <= found[name]["right_class"] <= 1 for name in ("teacher", "floor"))
    assert found["floor"]["right_class"] == metrics.digit_classifier(8).accuracy
    assert "guidance 1.5, classes in turn; EMA" in found["protocol"]


def test_a_run_that_is_not_evaluated_has_sizes_and_curves():
    found, _ = measured("none", a_unet(0), [a_unet(1)], eval_samples=0, kd=("out",))
    assert found["protocol"] == "not evaluated" and "floor" not in found and len(found["teacher"]) == 2
    assert {path.name for path in Path("none").glob("*.png")} == {"curves.png", "samples.png"}  # 32 are drawn anyway
    measured("bare", a_unet(0), [a_unet(1)], eval_samples=0, preview_every=0, kd=("out",))
    assert [path.name for path in Path("bare").glob("*.png")] == ["curves.png"]


# ---- Tables over runs ------------------------------------------------------------------------------------------------


def write_run(folder, content):
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_command_line_joins_runs(tmp_path, capsys):
    one = write_run(tmp_path / "one", a_metrics())
    two = write_run(tmp_path / "two", a_metrics(px=(6.0, math.inf), seeds=(2, 3)))
    three = write_run(tmp_path / "three", a_metrics(px=(6.0,), seeds=(2,)))
    assert evaluate.main([one, three]) == 0
    out = capsys.readouterr().out
    assert cells(out)["place (n=3)"][0] == "4.00 ± 2.00" and out.count("| teacher ") == 1
    assert out.count("as usual") == 1 and "WARNING" not in out

    again = write_run(tmp_path / "again", a_metrics())
    assert evaluate.main([one, two, again, f"{one}/"]) == 0  # a run that is named twice counts once
    out = capsys.readouterr().out
    assert cells(out)["place (n=6)"][0] == "inf" and "| run " not in out
    assert out.endswith("WARNING: place with seed 0 counts 2 times; place with seed 1 counts 2 times\n")


def test_runs_that_differ_stand_in_rows_of_their_own_with_shares_of_their_own_teachers(tmp_path, capsys):
    one = write_run(tmp_path / "one", a_metrics())
    other = write_run(tmp_path / "other", a_metrics(norm_groups="scale"))
    assert evaluate.main([one, other]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][2:]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in found] == [
        [report.FLOOR, "-"], ["teacher", "-"], ["place (n=2)", "norm_groups keep"],
        ["place (n=2)", "norm_groups scale"],
    ]  # fmt: skip

    small = a_metrics(norm_groups="scale", steps=7) | {"protocol": "in 10 steps"}
    small["teacher"] |= {"parameters": 86_884}
    old = write_run(tmp_path / "old", a_metrics())  # without the setting `steps`, which is then not compared
    assert evaluate.main([old, write_run(tmp_path / "small", small)]) == 0
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert [(row[0], row[1], row[-2]) for row in found] == [
        (report.FLOOR, "-", "-"), ("teacher", "norm_groups keep", "100.00"),
        ("place (n=2)", "norm_groups keep", "1.67"),
        ("teacher", "norm_groups scale", "100.00"), ("place (n=2)", "norm_groups scale", "50.00"),
    ]  # fmt: skip
    assert "norm_groups keep: as usual\nnorm_groups scale: in 10 steps\nWARNING: not the same protocol" in notes

    faster = write_run(tmp_path / "faster", a_metrics() | {"protocol": "in 10 steps"})
    assert evaluate.main([one, faster]) == 0
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    assert [row.split("|")[2].strip() for row in table.splitlines()[2:]][-2:] == [one, faster]
    assert f"{one}: as usual\n{faster}: in 10 steps\nWARNING" in notes

    many = dict.fromkeys(("lr", "steps", "clip"), 2)
    both = [
        write_run(tmp_path / f"{i}", a_metrics(norm_groups=str(i), **{n: i * x for n, x in many.items()}))
        for i in (1, 2)
    ]
    assert evaluate.main(both) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[4:6]] == both


# ---- FID and its relatives -------------------------------------------------------------------------------------------


def test_a_run_and_its_students_are_evaluated(capsys):
    net = a_unet()
    for name in ("out-0", "place-0"):
        net.save(f"runs/first/student/{name}")
    assert evaluate.main(["runs/first", *FEW], means) == 0
    out = capsys.readouterr().out
    assert "FID" not in out and "| first-out-0 " in out and "| first-place-0 " in out
    assert "features means" in out and "100 of 1500 images of digits (train), 12 generated" in out
    found = json.loads(Path("runs/evaluation/first-place-0/scores.json").read_text())
    real = metrics.reference(data.load("digits"), means, count=100).features
    images = np.load("runs/evaluation/first-place-0/samples.npy")
    assert found["frechet"] == metrics.frechet(real, means(torch.from_numpy(images)))
    assert found["parameters"] == metrics.parameters(net) and found["protocol"] in out
    assert found["precision"] is found["recall"] is None  # of 12 images

    extract = inception.Inception(network=means)
    assert evaluate.main(["runs/first/student/out-0", *FEW, "--out", "b"], extract) == 0
    out = capsys.readouterr().out
    assert "| out-0 " in out and "FID@12" in out and "inception-clean" in out


def test_the_protocols_are_those_of_the_papers_tables():
    """How its evaluation code is called, docs/as-published.md: images, real ones, network, neighbours, sampler."""
    of = {name: evaluate.Flags(**evaluate.IMAGES | row) for name, row in evaluate.PROTOCOLS.items()}
    assert {name: (row.num, row.real, row.mode, row.k, row.resize) for name, row in of.items()} == {
        "celeba": (49_984, 162_770, "legacy_pytorch", 5, None),
        "lsun_bedroom": (4_992, 50_000, "legacy_pytorch", 5, None),
        "coco": (30_000, 50_000, "legacy_pytorch", 5, 256),
        "imagenet": (50_000, 50_000, "torch_fidelity", 3, None),
    }
    assert (of["coco"].sample_steps, of["coco"].guidance, of["coco"].sampler) == (25, 7.5, "pndm")
    imagenet = of["imagenet"]
    assert (imagenet.sample_steps, imagenet.guidance, imagenet.eta, imagenet.spacing) == (250, 1.5, 1.0, "linspace")


def test_images_are_scored_as_a_published_table_was(capsys):
    a_unet().save("net")
    real = data.load("digits").images[:120]
    np.savez("reference.npz", arr_0=real.transpose(0, 2, 3, 1))
    classes = torch.eye(16)

    def network(x):  # (B, 3, H, W) -> (B, 16)
        return torch.nn.functional.adaptive_avg_pool2d(x[:, :1], 4).flatten(1)

    extract = inception.Inception("torch_fidelity", network=network, classes=classes)
    flags = ["--protocol", "imagenet", "--reference", "reference.npz", "--num", "110", "--sample-steps", "2"]
    assert evaluate.main(["net", *flags, "--guidance", "1", "--resize", "16", "--npz"], extract) == 0
    out = capsys.readouterr().out
    assert "precision and recall k=3" in out and "reference.npz (120 images), 110 generated" in out
    assert "resized to 16x16" in out and "eta 1" in out and "float32" in out and " IS@110 |" in out
    images = np.load("runs/evaluation/net/samples.npz")["arr_0"]  # (N, H, W, C), not resized
    assert images.shape == (110, 8, 8, 1) and images.dtype == np.uint8
    seen = extract(torch.from_numpy(pictures.squash(images.transpose(0, 3, 1, 2), 16)))
    found = json.loads(Path("runs/evaluation/net/scores.json").read_text())
    expected = isc_features_to_metric(seen @ classes.T, shuffle=False, splits=1)["inception_score_mean"]
    assert found["inception_score"] == pytest.approx(expected)
    assert found["precision"] == metrics.precision_recall(extract(torch.from_numpy(real)), seen, 3)[0]


def test_images_that_are_not_finite_are_not_scored_as_the_gray_that_they_are_stored_as():
    lost = a_unet()
    lost.conv_out.bias.data.fill_(1e38)
    lost.save("lost")
    assert evaluate.main(["lost", *FEW, "--num", "12", "--out", "scored"], means) == 0
    found = json.loads(Path("scored/lost/scores.json").read_text())
    assert found["non_finite"] == 12 and found["frechet"] == found["kid"] == "Infinity"


@pytest.mark.slow
def test_two_processes_fill_one_file():
    a_unet().save("net")
    arguments = ["net", *FEW, "--num", "20", "--batch", "5"]
    assert evaluate.main([*arguments, "--out", "one"], means) == 0
    program = "import sys\nfrom distil import evaluate\n\n\ndef means(images):\n"
    program += "    return (images / 127.5 - 1).flatten(1)[:, ::4]\n\n\nsys.exit(evaluate.main(extract=means))\n"
    Path("program.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run(
        [*torchrun, "program.py", *arguments, "--out", "two"],
        check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count("| net ") == 1  # only one of them prints
    one, two = (np.load(f"{out}/net/samples.npy").astype(int) for out in ("one", "two"))
    assert abs(one - two).max() <= 1 and (np.load("two/net/done.npy") == 1).all()


def test_the_one_process_that_reads_the_real_images_checks_them_all(tmp_path, monkeypatch):
    for i in range(8):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(shards, "SHARD", 4)
    monkeypatch.setattr(machine, "rank_and_world", lambda: (0, 2))
    flags = evaluate.Flags(dataset="folder", data=str(tmp_path), real=8)
    cache = {*Path(data.CACHE).glob("*")}
    monkeypatch.setattr(machine.dist, "barrier", lambda: None)
    assert len(evaluate.open_reference(flags, (3, 8, 8), means).features) == 8
    (entry,) = (one for one in {*Path(data.CACHE).glob("*")} - cache if one.name.startswith(tmp_path.name))
    file = entry / "images-00001.npy"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"images-00001.npy is damaged"):
        evaluate.open_reference(flags, (3, 8, 8), means)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        evaluate.compare([Path("net")], flags, means)


def test_clip_score_of_networks_that_read_text(pipelines, captioned, capsys, monkeypatch):
    seen = {}

    class Clip:
        def __init__(self, where, device, size):
            self.where = where, size

        def __call__(self, images, prompts):
            seen[len(seen)] = (images.shape, prompts, self.where)
            return 0.25

    monkeypatch.setattr(evaluate, "ClipScore", Clip)
    Path("prompts.txt").write_text("a b\n\ncab\n")
    more = ["--prompts", "prompts.txt", "--teacher", str(pipelines["sd"]), "--sample-steps", "2", "--clip", "a/model"]
    assert evaluate.main([str(pipelines["sd"]), *more, "--out", "clip"]) == 0
    assert capsys.readouterr().out == "CLIP score 0.2500  teacher\nCLIP score 0.2500  sd\n"
    assert list(seen.values()) == [((2, 3, 64, 64), ["a b", "cab"], ("a/model", None))] * 2

    more += ["--num", "7", "--dataset", "folder", "--data", str(captioned), "--resize", "32"]
    assert evaluate.main([str(pipelines["sd"]), *more, "--out", "fid"], means) == 0
    assert "8 of 8 images of folder (train), 7 generated" in capsys.readouterr().out
    assert seen[3] == ((7, 3, 64, 64), ["a b", "cab"] * 3 + ["a b"], ("a/model", 32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net", "--num", "5", "--dataset", "digits"], "--num 5 cannot be used, it must be at least 6"),
        (["net", "--num", "50"], "--num needs the real images: --dataset, one of "),
        (["net", "--num", "50", "--reference", "no.npz"], "--reference no.npz cannot be read"),
        (["net", "--num", "50", "--protocol", "table3"], "--protocol table3 is not known, choose from celeba"),
        (["net", "--num", "50", "--dataset", "digit"], "did you mean digits?"),
        (["net", "--num", "50", "--dataset", "digits", "--real", "5"], "--real 5"),
        (["net", "--num", "50", "--dataset", "digits", "--eta", "2"], "--eta 2.0"),
        (["net", "--num", "50", "--dataset", "digits", "--data", "x"], "digits are embedded"),
        (["net", "--num", "50", "--dataset", "digits", "--process", "flow", "--eta", "1"], "eta must be 0, got 1.0"),
        (["net", "--num", "50", "--dataset", "digits", "--clip", "m"], "--clip compares images with their prompts"),
        (["net", "--num", "50", "--reference", "wide.npz"], "--reference wide.npz is of 99 features, and here are "),
        (["net", "--num", "50", "--dataset", "digits", "--mode", "new"], "--mode new is not known"),
        (["nowhere", "--num", "50", "--dataset", "digits"], "nowhere is not a saved network"),
        (["net", "--prompts", "p.txt"], "--prompts needs --num or --clip"),
        (["{sd}", "--num", "6", "--dataset", "digits"], "give --prompts FILE, with a prompt a line"),
        *(([*given, "net"], f"{given[0]} is for --num or --prompts; without them the table of the finished run is")
          for given in (["--sample-steps", "7"], ["--k", "3"], ["--mode", "clean"], ["--reference", "no.npz"],
                        ["--data", "nowhere"], ["--npz"], ["--out", "elsewhere"])),
        (["net/config.json"], "net/config.json is a file: name the folder of a finished run"),
        (["nowhere"], "nowhere/metrics.json: No such file or directory; name the folder of a finished run"),
        *((["bad", content], "bad/metrics.json is not what train.py writes: ") for content in (
            "", "{", "[]", "7", json.dumps({"protocol": "p"}), json.dumps(a_metrics()).replace("0.4", '"much"'),
        )),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, words, pipelines, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_unet().save("net")
    np.savez("wide.npz", mu=np.zeros(99), sigma=np.eye(99))
    if arguments[0] == "bad":
        arguments = [write_run("good", a_metrics()), write_run("bad", arguments[1])]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([argument.format(sd=pipelines["sd"]) for argument in arguments], means)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and words in err
    assert err.startswith("distil.evaluate: error: ") and err.count("\n") == 1 and not Path("runs").exists()
