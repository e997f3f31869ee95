"""distil/metrics.py against independent implementations and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import Trap

from distil import data, metrics
from models import DiT, UNet, regroup


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="train"), data.load("digits", split="test")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return metrics.digit_classifier(8, tmp_path_factory.mktemp("cache"), steps=200)


def gaussian(n, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + shift


def means(images):
    """Sixteen numbers of an image in the place of Inception's 2,048."""
    return metrics.pixels(images)[:, ::4]


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_macs_of_a_transformer_count_its_attention_and_leave_it_as_it_is():
    net = DiT(8, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    assert metrics.macs(net) == 637_480 + 3 * 2 * 16**2 * 32  # 16 tokens of width 32 in three blocks
    assert {p.device.type for p in net.parameters()} == {"cpu"} and net.training


def test_macs_of_norms_of_one_channel_on_a_single_pixel():
    net = UNet(8, 1, channels=4, channel_mults=(1, 1, 1, 1), num_res_blocks=1, attention_resolutions=(), norm_groups=4)
    assert metrics.macs(net) == metrics.macs(regroup(net, 2)) > 0


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_equals_clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = gaussian(300, 20, seed=0), gaussian(400, 20, seed=1, shift=0.3)
    theirs = fid.frechet_distance(a.mean(0).numpy(), np.cov(a.T), b.mean(0).numpy(), np.cov(b.T))
    assert metrics.frechet(a, b) == pytest.approx(float(theirs), rel=1e-9)


def test_frechet_closed_forms():
    a = gaussian(500, 16, seed=0)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, a + 0.5) == pytest.approx(16 * 0.25)
    # a scaled by 2 about its mean: tr S (1 - 2)^2, and the mean moves by itself
    assert metrics.frechet(a, 2 * a) == pytest.approx((a.mean(0).square().sum() + a.T.cov().trace()).item())
    assert metrics.frechet(a[:, :1], a[:, :1] + 3) == pytest.approx(9)  # one dimension
    flat = torch.cat([a[:40], torch.zeros(40, 200), a[:40]], 1)  # singular: constant and repeated columns, few images
    assert metrics.frechet(flat, flat) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(flat, flat + 0.1) == pytest.approx(232 * 0.01, rel=1e-6)


def test_frechet_of_what_is_not_finite_or_does_not_fit():
    a = gaussian(20, 4, seed=0)
    for bad in (math.nan, math.inf):
        b = a.clone()
        b[3, 1] = bad
        assert metrics.frechet(a, b) == metrics.frechet(b, a) == math.inf
    for other in (a[:, :3], a[:1], a[0]):
        with pytest.raises(ValueError, match="frechet needs"):
            metrics.frechet(a, other)


# ---- Precision, recall, kernel distance ------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "chunk"), [(1, 7), (5, 7), (5, 512)])
def test_precision_recall_equals_prdc(k, chunk):
    prdc = pytest.importorskip("prdc")
    real, fake = gaussian(60, 4, seed=0), 1.5 * gaussian(45, 4, seed=1, shift=0.5)
    far = (real + 1000).float(), (fake + 1000).float()  # far from the origin, as a network gives them
    for pair in ((real, fake), far):
        theirs = prdc.compute_prdc(*(x.double().numpy() for x in pair), nearest_k=k)
        ours = metrics.precision_recall(*pair, k, chunk)
        assert ours == pytest.approx((theirs["precision"], theirs["recall"])) and 0.1 < min(ours) < max(ours) < 0.99


def test_precision_recall_at_the_ends():
    a = gaussian(50, 4, seed=0)
    assert metrics.precision_recall(a, a) == (1, 1)
    assert metrics.precision_recall(a, a + 100) == (0, 0)
    precision, recall = metrics.precision_recall(a, a[:1] + 1e-4 * gaussian(50, 4, seed=1))  # good but all alike
    assert precision == 1 and recall <= 0.02
    with pytest.raises(ValueError, match="more than 5 images, not 5 and 50"):
        metrics.precision_recall(a[:5], a)


def test_kernel_distance_equals_clean_fid_and_always_is_the_same():
    fid = pytest.importorskip("cleanfid.fid")
    generator = np.random.default_rng(0)
    real, fake = (generator.normal(shift, size=(300, 8)).astype(np.float32) for shift in (0, 0.5))
    np.random.seed(0)
    theirs = fid.kernel_distance(real, fake, num_subsets=10, max_subset_size=200)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    ours = [metrics.kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), 10, 200) for _ in range(2)]
    assert ours == [theirs, theirs] and theirs > 0 and (np.random.get_state()[1] == before).all()


# ---- Features --------------------------------------------------------------------------------------------------------


def test_pixels():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(metrics.pixels(images), images.flatten(1) / 127.5 - 1)
    large = torch.randint(0, 256, (1200, 3, 32, 32), dtype=torch.uint8)
    expected = (large / 127.5 - 1).unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(metrics.features(metrics.pixels, large), expected)
    assert torch.equal(metrics.features(metrics.pixels, large.numpy(), batch=7), metrics.pixels(large))


def test_the_digit_classifier_is_good(digits, classifier):
    images, labels = torch.from_numpy(digits[1].images), torch.from_numpy(digits[1].labels)
    right = (classifier.predict(images) == labels).double().mean().item()
    assert classifier.accuracy > 0.95 and right == classifier.accuracy
    features = classifier.features(images)
    assert features.shape == (297, 64) and not features.requires_grad
    assert metrics.DigitClassifier().features(torch.zeros(3, 1, 16, 16, dtype=torch.uint8)).shape == (3, 64)


def test_the_digit_classifier_is_cached_and_made_anew_where_it_is_damaged(digits, tmp_path):
    state, threads, images = torch.get_rng_state(), torch.get_num_threads(), torch.from_numpy(digits[1].images)
    first = metrics.digit_classifier(8, tmp_path, steps=5)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    features, (file,) = first.features(images), tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    second = metrics.digit_classifier(8, tmp_path, steps=5)
    assert file.stat().st_mtime_ns == written and second.accuracy == first.accuracy
    assert torch.equal(second.features(images), features)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a weight
    for damaged in (file.read_bytes()[:1000], bytes(content)):
        file.write_bytes(damaged)
        torch.testing.assert_close(metrics.digit_classifier(8, tmp_path, steps=5).features(images), features)
        assert [file] == list(tmp_path.iterdir())


def test_inception_score_equals_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    fake, classes = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.randn(12, 6)
    fake += 5 * torch.eye(6).repeat_interleave(10, 0)  # neighbours are alike
    real = metrics.Reference("", metrics.gaussian(fake), None)
    # as ADM takes images, in their order and in parts of 5,000, and as BK-SDM does, in ten parts
    for images, shuffle, splits in (
        (fake, False, 1),
        (fake.repeat(84, 1), False, 2),
        (fake, True, 10),
        (fake[:4], True, 4),
    ):
        expected = theirs(images @ classes.T, shuffle=shuffle, splits=splits)["inception_score_mean"]
        found = metrics.feature_scores(real, images, classes=classes, shuffle=shuffle)
        assert found["inception_score"] == pytest.approx(expected, rel=1e-9)


def test_a_published_reference_is_read(tmp_path, digits):
    images, others = (torch.from_numpy(split.images[:150]).expand(-1, 3, -1, -1) for split in digits)
    seen, fake = means(images), means(others)
    mu, sigma = metrics.gaussian(seen)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "mu": mu.numpy(), "sigma": sigma.numpy()}
    whole = metrics.feature_scores(metrics.Reference("", (mu, sigma), seen), fake, k=3)
    assert whole["precision"] == metrics.precision_recall(seen, fake, 3)[0] and whole["inception_score"] is None
    for names in (("arr_0",), ("mu", "sigma"), tuple(arrays)):
        np.savez(tmp_path / "reference.npz", **{name: arrays[name] for name in names})
        found = metrics.feature_scores(metrics.read_reference(str(tmp_path / "reference.npz"), means), fake, k=3)
        known = ["frechet"] if "arr_0" not in names else ["frechet", "kid", "precision", "recall"]
        assert [name for name, value in found.items() if value is not None] == known
        assert found == pytest.approx({name: whole[name] if name in known else None for name in whole})
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "half.npz", mu=mu.numpy())
    np.savez(tmp_path / "trap.npz", mu=np.array([Trap(tmp_path / "touched")]), sigma=sigma.numpy())
    refusals = {"text": "as an .npz", "half": "must hold mu", "trap": "as an .npz", "no": "as an .npz"}
    halves = (
        {"mu": mu.numpy(), "arr_0": arrays["arr_0"].astype(np.float32) / 255},
        {"mu": mu.numpy(), "sigma": mu.numpy()},
    )
    for i, content in enumerate((*halves, {"arr_0": arrays["arr_0"][:1]})):
        np.savez(tmp_path / f"half{i}.npz", **content)
        refusals[f"half{i}"] = "must hold mu"
    for name, words in refusals.items():
        with pytest.raises(ValueError, match=rf"--reference .*{name}.npz .*{words}"):
            metrics.read_reference(str(tmp_path / f"{name}.npz"), means)
    assert not (tmp_path / "touched").exists()


def test_reference_features_are_computed_once(tmp_path):
    calls = []

    def extract(images):
        calls.append(len(images))
        return means(images)

    def features(images, **options):
        calls.clear()
        return metrics.reference(images, extract, cache=tmp_path, **{"count": 250, **options}).features

    images = data.load("digits")
    first = features(images)
    assert first.shape == (250, 16) and first.dtype == torch.float32 and calls == [100, 100, 50]
    rows = np.linspace(0, 1499, 250).round().astype(int)
    torch.testing.assert_close(first, means(torch.from_numpy(images.images[rows])))
    assert torch.equal(features(images), first) and not calls
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("features-digits-1x8x8-train-250-extract-")

    assert len(features(images, count=9999)) == 1500 and calls
    for others in (data.load("digits", image_size=16), data.load("digits", seed=1)):  # the same name, other images
        features(others)
        assert calls
    metrics.reference(images, means, cache=tmp_path, count=250)
    assert len(list(tmp_path.iterdir())) == 5


# ---- The scores of a run ---------------------------------------------------------------------------------------------


def test_score_of_real_and_spoiled_digits(digits, classifier):
    train, test = digits
    real, labels = data.to_float(test.images), torch.from_numpy(test.labels)
    floor = metrics.score(real, None, train.images, classifier)
    assert tuple(floor) == metrics.SCORES
    assert floor["teacher_mse"] is None and floor["saturated"] == floor["non_finite"] == 0
    assert floor["frechet_pixels"] < 1 and floor["precision"] > 0.9 and floor["recall"] > 0.9
    right = metrics.score(real, None, train.images, classifier, labels)["right_class"]
    assert right == classifier.accuracy and "right_class" not in metrics.score(real, None, train.images, None, labels)

    spoiled = real + 0.7 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    scores = metrics.score(spoiled, real, train.images, classifier)
    assert scores["frechet_pixels"] > 3 * floor["frechet_pixels"]
    assert scores["frechet_digits"] > 3 * floor["frechet_digits"] and scores["precision"] < floor["precision"]
    assert scores["teacher_mse"] == pytest.approx((spoiled - real).square().mean().item(), rel=1e-5)
    assert scores["saturated"] == pytest.approx((spoiled.abs() > 1.2).double().mean().item())
    assert json.loads(json.dumps(scores)) == scores

    # the first metrics see what a viewer sees: beyond [-1, 1] and below half a gray level nothing changes
    seen = metrics.score(torch.where(real.abs() == 1, 5 * real, real + 0.003), real, train.images, classifier)
    assert [seen[key] for key in metrics.SCORES[:4]] == [floor[key] for key in metrics.SCORES[:4]]
    assert seen["saturated"] > 0.1

    without = metrics.score(real, real, train.images)
    assert without["frechet_digits"] is None and without["teacher_mse"] == 0
    assert without["frechet_pixels"] == floor["frechet_pixels"] and without["precision"] is without["recall"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_sampler_is_reported(digits, classifier, value):
    train, test = digits
    teacher, labels = data.to_float(test.images), torch.from_numpy(test.labels)
    sound = metrics.score(teacher, teacher, train.images, classifier)
    samples = teacher.clone()
    samples[:99, 0, 2] = value
    scores = metrics.score(samples, teacher, train.images, classifier, labels)
    assert scores["non_finite"] == 99 and scores["right_class"] <= 2 / 3
    assert scores["frechet_pixels"] == scores["frechet_digits"] == scores["teacher_mse"] == math.inf
    assert 0 < scores["precision"] <= 2 / 3 < sound["precision"]  # 99 of 297 lie in no ball
    assert scores["saturated"] == pytest.approx(99 / 297 / 8)

    lost = metrics.score(torch.full_like(teacher, value), teacher, train.images, classifier, labels)
    assert lost["non_finite"] == 297 and lost["saturated"] == 1
    assert lost["precision"] == lost["recall"] == lost["right_class"] == 0
