"""evaluate.py against independent implementations, closed forms and the published sizes."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
from diffusion import DDPM
from models import Network, UNet

SCORE = dict.fromkeys(evaluate.SCORES, 1.0) | {"non_finite": 0}


def gaussian(n, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + shift


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="train"), data.load("digits", split="test")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return evaluate.digit_classifier(8, tmp_path_factory.mktemp("cache"), steps=200)


# Frechet distance


def test_frechet_equals_clean_fid_on_folders(tmp_path):
    fid = pytest.importorskip("cleanfid.fid")
    generator = np.random.default_rng(0)
    sets = {}
    for name, top in (("real", 256), ("fake", 180)):
        sets[name] = torch.from_numpy(generator.integers(0, top, (60, 3, 4, 4), np.uint8))
        (tmp_path / name).mkdir()
        for i, image in enumerate(sets[name]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03}.png")
    theirs = fid.compute_fid(
        str(tmp_path / "real"),
        str(tmp_path / "fake"),
        custom_feat_extractor=lambda x: evaluate.pixels(x.to(torch.uint8)),  # x: (B, 3, H, W) floats in [0, 255]
        custom_fn_resize=lambda x: x,
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        verbose=False,
    )
    ours = evaluate.frechet(evaluate.pixels(sets["real"]), evaluate.pixels(sets["fake"]))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_frechet_equals_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(300, 20, seed=0), gaussian(400, 20, seed=1, shift=0.3)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert evaluate.frechet(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_closed_forms():
    a = gaussian(500, 16, seed=0)
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(a, a + 0.5) == pytest.approx(16 * 0.25)
    # a scaled by 2 about its mean: tr S (1 - 2)^2, and the mean moves by itself
    assert evaluate.frechet(a, 2 * a) == pytest.approx((a.mean(0).square().sum() + a.T.cov().trace()).item())
    assert evaluate.frechet(a[:, :1], a[:, :1] + 3) == pytest.approx(9)  # one dimension


def test_frechet_with_singular_covariances():
    a = gaussian(40, 16, seed=0)
    flat = torch.cat([a, torch.zeros(40, 200), a], 1)  # constant and repeated columns, fewer images than dimensions
    assert evaluate.frechet(flat, flat) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(flat, flat + 0.1) == pytest.approx(232 * 0.01, rel=1e-6)
    constant = torch.zeros(40, 16)
    assert evaluate.frechet(a, constant) == pytest.approx((a.mean(0).square().sum() + a.T.cov().trace()).item())


def test_frechet_of_what_is_not_finite_or_does_not_fit():
    a = gaussian(20, 4, seed=0)
    for bad in (math.nan, math.inf):
        b = a.clone()
        b[3, 1] = bad
        assert evaluate.frechet(a, b) == evaluate.frechet(b, a) == math.inf
    for other in (a[:, :3], a[:1], a[0]):
        with pytest.raises(ValueError, match="frechet needs"):
            evaluate.frechet(a, other)


# Precision and recall


def brute_force(real, fake, k):
    """The definition, one pair of points at a time."""

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real, fake = real.tolist(), fake.tolist()
    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    precision = [any(math.dist(f, r) < radius for r, radius in zip(real, real_radii, strict=True)) for f in fake]
    recall = [any(math.dist(r, f) < radius for f, radius in zip(fake, fake_radii, strict=True)) for r in real]
    return statistics.mean(precision), statistics.mean(recall)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_precision_recall_equals_brute_force(k, chunk):
    real = gaussian(60, 4, seed=0)
    fake = 1.5 * gaussian(45, 4, seed=1, shift=0.5)
    assert evaluate.precision_recall(real, fake, k, chunk) == pytest.approx(brute_force(real, fake, k))
    # float32 features far from the origin, as a network gives them
    far = ((real + 1000).float(), (fake + 1000).float())
    assert evaluate.precision_recall(*far, k, chunk) == pytest.approx(brute_force(*far, k))


def test_precision_recall_at_the_ends():
    a = gaussian(50, 4, seed=0)
    assert evaluate.precision_recall(a, a) == (1, 1)
    assert evaluate.precision_recall(a, a + 100) == (0, 0)
    narrow = a[:1] + 1e-4 * gaussian(50, 4, seed=1)  # good but all alike
    precision, recall = evaluate.precision_recall(a, narrow)
    assert precision == 1 and recall <= 0.02
    with pytest.raises(ValueError, match="more than 5 images, not 5 and 50"):
        evaluate.precision_recall(a[:5], a)


# Sampling


class Halver(Network):
    """Arithmetic of one element at a time, so that no batch can change it; counts its calls in train mode."""

    def __init__(self):
        super().__init__()
        self.shape = (1, 4, 4)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t, t, cond=None):
        return self.dropout(x_t) * self.scale


def draw(net, n, batch, seed=3, **options):
    return evaluate.sample(net, DDPM(), n, seed=seed, steps=4, batch=batch, progress=False, **options)


def test_start_noise_belongs_to_seed_and_image():
    noise = evaluate.start_noise(50, (1, 8, 8), seed=1)
    parts = [evaluate.start_noise(n, (1, 8, 8), 1, first) for first, n in ((0, 20), (20, 0), (20, 29), (49, 1))]
    assert torch.equal(noise, torch.cat(parts)) and noise.dtype == torch.float32
    assert not torch.equal(noise[1:], noise[:-1])
    assert not torch.equal(noise, evaluate.start_noise(50, (1, 8, 8), seed=2))
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_interpolated_noise_turns_from_one_start_to_the_other():
    noise = evaluate.interpolate((3, 16, 16), seed=4, n=5)
    ends = evaluate.start_noise(4, (3, 16, 16), 4)
    torch.testing.assert_close(noise[[0, 4, 5, 9]], ends)
    unit = torch.nn.functional.normalize(noise[:5].flatten(1))
    steps = (unit[1:] * unit[:-1]).sum(1)  # cosines of equal angles
    assert steps.max() - steps.min() < 0.02
    assert (noise.std((1, 2, 3)) - 1).abs().max() < 0.1  # a straight line would pass 0.7


def test_samples_do_not_depend_on_the_batch():
    whole = draw(Halver(), 10, batch=10)
    assert whole.shape == (10, 1, 4, 4) and whole.dtype == torch.float32
    for batch in (1, 3, 64):
        assert torch.equal(draw(Halver(), 10, batch), whole)
    assert torch.equal(draw(Halver(), 4, batch=4), whole[:4])
    assert not torch.equal(draw(Halver(), 10, 10, seed=4), whole)
    assert torch.equal(draw(Halver(), 10, 10, eta=1.0), draw(Halver(), 10, 10, eta=1.0))


def test_a_real_network_samples_alike_in_every_batch():
    torch.manual_seed(0)
    net = UNet(8, in_channels=1, channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=4)
    images = [evaluate.sample(net, DDPM(), 6, seed=0, steps=3, batch=batch, progress=False) for batch in (2, 6)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_every_module_keeps_its_mode():
    net = Halver()
    net.inner, net.frozen = Halver(), nn.Dropout().eval()
    draw(net, 2, 2)
    assert net.training and net.inner.dropout.training and not net.frozen.training

    net.scale.data = torch.zeros(7)  # fails inside the sampler
    with pytest.raises(RuntimeError):
        draw(net, 2, 2)
    assert net.training and not net.frozen.training


# Sizes


def test_published_sizes_of_celeba():
    net = UNet(64, channels=128, channel_mults=(1, 2, 2, 2, 4), num_res_blocks=2, attention_resolutions=(16,))
    assert evaluate.parameters(net) == 78_700_803
    assert evaluate.macs(net) == 23_922_959_232
    assert evaluate.macs(net, (3, 32, 32)) < evaluate.macs(net) / 3.9
    assert {p.device.type for p in net.parameters()} == {"cpu"} and net.training


# Extractors and score


def test_pixels():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(evaluate.pixels(images), images.flatten(1) / 127.5 - 1)
    assert torch.equal(evaluate.pixels(images.numpy()), images.flatten(1) / 127.5 - 1)
    large = torch.randint(0, 256, (1200, 3, 32, 32), dtype=torch.uint8)
    means = (large / 127.5 - 1).unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(evaluate.pixels(large), means)


def test_digit_classifier_is_good_and_cached(digits, tmp_path):
    state = torch.get_rng_state()
    first = evaluate.digit_classifier(8, tmp_path, steps=200)
    assert torch.equal(torch.get_rng_state(), state)
    _, test = digits
    assert first.accuracy > 0.97
    assert np.mean(first.predict(test.images).numpy() == test.labels) == first.accuracy
    features = first.features(test.images)
    assert features.shape == (297, 64) and not features.requires_grad

    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    second = evaluate.digit_classifier(8, tmp_path, steps=200)
    assert file.stat().st_mtime_ns == written and second.accuracy == first.accuracy
    assert torch.equal(second.features(test.images), features)

    file.write_bytes(file.read_bytes()[:1000])  # damaged: made anew, and the same
    third = evaluate.digit_classifier(8, tmp_path, steps=200)
    torch.testing.assert_close(third.features(test.images), features, rtol=1e-3, atol=1e-2)
    assert [file] == list(tmp_path.iterdir())


def test_digit_classifier_at_16():
    assert evaluate.DigitClassifier().features(torch.zeros(3, 1, 16, 16, dtype=torch.uint8)).shape == (3, 64)


def test_score_of_real_and_spoiled_digits(digits, classifier):
    train, test = digits
    real = data.to_float(test.images)
    floor = evaluate.score(real, None, train.images, classifier)
    assert tuple(floor) == evaluate.SCORES
    assert floor["teacher_mse"] is None and floor["saturated"] == floor["non_finite"] == 0
    assert floor["frechet_pixels"] < 1 and floor["precision"] > 0.9 and floor["recall"] > 0.9

    spoiled = real + 0.7 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    scores = evaluate.score(spoiled, real, train.images, classifier)
    assert scores["frechet_pixels"] > 3 * floor["frechet_pixels"]
    assert scores["frechet_digits"] > 3 * floor["frechet_digits"]
    assert scores["precision"] < floor["precision"]
    assert scores["teacher_mse"] == pytest.approx((spoiled - real).square().mean().item(), rel=1e-5)
    assert scores["saturated"] == pytest.approx((spoiled.abs() > 1.2).double().mean().item())
    assert json.loads(json.dumps(scores)) == scores

    # the first metrics see what a viewer sees: beyond [-1, 1] and below half a gray level nothing changes
    seen = evaluate.score(torch.where(real.abs() == 1, 5 * real, real + 0.003), real, train.images, classifier)
    assert [seen[key] for key in evaluate.SCORES[:4]] == [floor[key] for key in evaluate.SCORES[:4]]
    assert seen["saturated"] > 0.1

    without = evaluate.score(real, real, train.images)
    assert without["frechet_digits"] is None and without["teacher_mse"] == 0
    assert without["frechet_pixels"] == floor["frechet_pixels"] and without["precision"] != floor["precision"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_sampler_is_reported(digits, classifier, value):
    train, test = digits
    teacher = data.to_float(test.images)
    sound = evaluate.score(teacher, teacher, train.images, classifier)
    samples = teacher.clone()
    samples[:99, 0, 2] = value
    scores = evaluate.score(samples, teacher, train.images, classifier)
    assert scores["non_finite"] == 99
    assert scores["frechet_pixels"] == scores["frechet_digits"] == scores["teacher_mse"] == math.inf
    assert 0 < scores["precision"] <= 2 / 3 < sound["precision"]  # 99 of 297 lie in no ball
    assert scores["saturated"] == pytest.approx(99 / 297 / 8)

    lost = evaluate.score(torch.full_like(teacher, value), teacher, train.images, classifier)
    assert lost["non_finite"] == 297 and lost["precision"] == lost["recall"] == 0 and lost["saturated"] == 1
    assert "(297 not finite)" in evaluate.table([{"method": "none", **lost, "parameters": 9, "seconds": 1.0}])


# The protocol and the table


def test_protocol_names_everything(classifier):
    line = evaluate.protocol(
        1500, 1800, 297, sampler="DDIM", steps=50, eta=0.0, ema=0.99, seed=7, classifier=classifier
    )
    assert "\n" not in line and "FID" not in line
    told = ("k=5", "1500 real", "1800 generated", "297 held out", "DDIM, 50 steps, eta 0", "EMA 0.99", "seed 7")
    for part in (*told, "8 bits", f"{classifier.accuracy:.1%}"):
        assert part in line
    plain = evaluate.protocol(9, 9, 0, sampler="DDIM", steps=2, eta=1, ema=0, seed=0)
    assert "digit" not in plain and "held out" not in plain


def metrics(px=(2.0, 4.0), protocol="as usual", seeds=(0, 1), **settings):
    student = {"method": "place", "parameters": 43_442, "macs": 1, "seconds": 30.0}
    return {
        "protocol": protocol,
        "settings": {"norm_groups": "keep", "out": f"runs/{seeds}", "seeds": seeds} | settings,
        "floor": {**SCORE, "frechet_pixels": 0.14, "teacher_mse": None},
        "teacher": {**SCORE, "frechet_pixels": 0.4, "teacher_mse": 0.0, "parameters": 2_594_369, "macs": 2},
        "students": [
            {**SCORE, **student, "seed": seed, "frechet_pixels": x} for seed, x in zip(seeds, px, strict=True)
        ],
    }


def cells(text):
    """A table as {first cell: the other cells}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_table_means_and_layout():
    text = evaluate.table(evaluate.rows(metrics()))
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned
    assert [line.strip("|").split("|")[0].strip() for line in text.splitlines()] == [
        "method", ":---------------", evaluate.FLOOR, "teacher", "place (n=2)",
    ]  # fmt: skip
    found = cells(text)
    assert found["place (n=2)"] == [
        "3.00 ± 1.41", "1.00", "1.00", "1.00", "1.00", "1.00", "43,442", "1.67", "30.0",
    ]  # fmt: skip
    assert found["teacher"][:1] + found["teacher"][4:] == ["0.400", "0", "1.00", "2,594,369", "100.00", "-"]
    assert found[evaluate.FLOOR][4:] == ["-", "1.00", "-", "-", "-"]


def test_table_numbers_keep_three_digits():
    cases = {1275.4: "1275", 43.71: "43.7", 8.666: "8.67", 0.0163: "0.0163", 0.000012: "0.0000", -0.5: "-0.500"}
    for value, text in cases.items():
        row = {"method": "out", **SCORE, "frechet_pixels": value, "parameters": 10, "seconds": 1}
        assert cells(evaluate.table([row]))["out"][0] == text


def test_table_of_other_data_and_of_a_diverged_seed():
    rows = evaluate.rows(metrics(px=(2.0, math.inf)) | {"floor": None})
    for row in rows:
        row["frechet_digits"] = None
    rows[-1]["non_finite"] = 3
    text = evaluate.table(rows)
    assert "digits" not in text and evaluate.FLOOR not in text
    assert cells(text)["place (n=2, 3 not finite)"][0] == "inf"


def test_table_of_a_run_that_was_not_evaluated():
    sizes = {"parameters": 100, "macs": 1}
    run = {"teacher": sizes, "students": [{"method": "out", "seed": 0, "seconds": 2.0, **sizes}]}
    assert cells(evaluate.table(evaluate.rows(run))) == {
        "method": ["params", "% of teacher", "seconds"],
        ":--------": ["-------:", "-------------:", "--------:"],
        "teacher": ["100", "100.00", "-"],
        "out": ["100", "100.00", "2.00"],
    }


def test_students_of_other_size_get_a_line_of_their_own():
    rows = evaluate.rows(metrics())
    rows[-1]["parameters"] = 1000
    assert [line.split("|")[1].strip() for line in evaluate.table(rows).splitlines()].count("place") == 2


# The command line


def write_run(folder, content):
    folder.mkdir()
    (folder / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_command_line_joins_runs(tmp_path, capsys):
    one = write_run(tmp_path / "one", metrics())
    two = write_run(tmp_path / "two", metrics(px=(6.0, math.inf), seeds=(2, 3)))
    three = write_run(tmp_path / "three", metrics(px=(6.0,), seeds=(2,)))
    assert evaluate.main([one, three]) == 0
    out = capsys.readouterr().out
    assert cells(out)["place (n=3)"][0] == "4.00 ± 2.00" and out.count("| teacher ") == 1
    assert out.count("as usual") == 1 and "WARNING" not in out

    other = write_run(tmp_path / "other", metrics(protocol="with 10 steps", norm_groups="scale"))
    assert evaluate.main([one, two, other]) == 0
    out = capsys.readouterr().out
    assert cells(out)["place (n=6)"][0] == "inf"
    warnings = [line for line in out.splitlines() if line.startswith("WARNING")]
    assert sum("with 10 steps" in line for line in warnings) == 1 and sum("as usual" in line for line in warnings) == 1
    assert sum("place with seed 0 is in 2 runs" in line for line in warnings) == 1
    assert sum('differ in norm_groups: "keep", "scale"' in line for line in warnings) == 1 and len(warnings) == 5


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", json.dumps({"protocol": "p"}), json.dumps(metrics()).replace("0.4", '"much"')]
)
def test_command_line_refuses_broken_runs(content, tmp_path, capsys):
    good, bad = write_run(tmp_path / "good", metrics()), write_run(tmp_path / "bad", content)
    assert evaluate.main([good, bad]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(tmp_path / "bad") in captured.err


def test_command_line_refuses_missing_runs(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "nowhere" in captured.err


# Pictures


def test_grid_shows_every_method(tmp_path, digits):
    train, _ = digits
    samples = data.to_float(train.images[:40])
    broken = samples.clone()
    broken[0, 0, :, 4:] = math.nan
    path = tmp_path / "new" / "grid.png"
    evaluate.grid(path, {"place": broken, "teacher": samples, "a method with a long name": -samples}, columns=8)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert height > 3 * 2 * 24 and width > 8 * 24
    assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()  # nothing is cut off

    def where(color):
        return np.argwhere((pixels == color).all(2))

    lost = where(evaluate.NOT_FINITE)
    (top, left), (bottom, right) = lost.min(0), lost.max(0) + 1
    zoom = (bottom - top) // 8
    assert zoom >= 3 and len(lost) == (bottom - top) * (right - left) and right - left == 4 * zoom
    teacher, place = (where(tuple(bytes.fromhex(evaluate.COLORS[m][1:]))) for m in ("teacher", "place"))
    assert teacher[:, 0].min() < place[:, 0].min() <= top  # the teacher comes first, wherever the dict has it

    # crisp: the first tile of the teacher's band is its first image, each pixel a square
    column, row = right - 8 * zoom, teacher[teacher[:, 1] < left - 8 * zoom][:, 0].min()
    tile = pixels[:, column : column + 8 * zoom, 0]
    expected = train.images[0, 0].repeat(zoom, 0).repeat(zoom, 1)
    assert any((tile[y : y + 8 * zoom] == expected).all() for y in range(row + 1))


def test_grid_of_colour_and_of_latents(tmp_path):
    evaluate.grid(tmp_path / "a.png", {"teacher": torch.rand(3, 3, 64, 64)})
    assert Image.open(tmp_path / "a.png").width > 3 * 64
    with pytest.raises(ValueError, match="not 4"):
        evaluate.grid(tmp_path / "b.png", {"teacher": torch.rand(3, 4, 8, 8)})
    assert not (tmp_path / "b.png").exists()


def test_curves(tmp_path):
    records = [{"step": 0, "note": "not of a student"}]
    for method in ("none", "place"):
        for step in range(0, 500, 2):
            record = {"step": step, "student": f"{method}-0", "method": method, "seed": 0, "mse": 1 / (step + 1)}
            record["grad_norm"] = math.nan if step == 40 else 10.0
            if method == "place":
                record |= {"coarse": 1.0, "fine": 0.5, "w": 0.0, "b0": -0.1, "b1": 0.9}
            records.append(record)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 500, "stu')
    evaluate.curves(tmp_path / "file.png", log)
    evaluate.curves(tmp_path / "records.png", records)
    pixels = np.asarray(Image.open(tmp_path / "file.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and (pixels == np.asarray(Image.open(tmp_path / "records.png").convert("RGB"))).all()
    for method in ("none", "place"):
        assert (pixels == tuple(bytes.fromhex(evaluate.COLORS[method][1:]))).all(2).sum() > 50
    assert not (pixels == tuple(bytes.fromhex(evaluate.COLORS["lift"][1:]))).all(2).any()

    evaluate.curves(tmp_path / "empty.png", [])  # a run that was stopped before its first line
    assert (tmp_path / "empty.png").exists()
