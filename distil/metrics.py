"""The numbers: sizes, Frechet distance, kernel distance, precision and recall, and the features that they are taken on.

What every run measures, and on what:

    frechet_pixels     Frechet distance of Gaussians fitted to the pixels in [-1, 1] (of 16x16 block means if larger)
    frechet_digits     the same on 64 features of a small digit classifier that is trained here; None for other data
    precision, recall  k-nearest-neighbour manifolds with k = 5, on the digit features; None for other data, for raw
                       pixels are near each other whatever they show, and None for fewer than 100 images
    teacher_mse        mean squared distance to the teacher's final samples from the same noise, in [-1, 1] units
    saturated          share of pixels with |x| > 1.2: how far the sampler left the range of images
    non_finite         number of generated images that hold a NaN or an infinity
    right_class        of networks that are told the class: share of the samples that the digit classifier finds in it

The first four see samples clamped to [-1, 1] and rounded to 8 bits, as a viewer does, the others the raw output of the
sampler. None compares with numbers from an Inception network, and a Frechet distance shrinks as the number of images
grows: compare within one table, against its floor (real images against real ones) and its teacher.

An extractor is a function with a name: uint8 images (B, C, H, W) -> features (B, D) float32.
"""

import copy
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil import data, disk, machine, shards
from distil.inception import Extract
from models import Network, read_weights, sealed

SCORES = ("frechet_pixels", "frechet_digits", "precision", "recall", "teacher_mse", "saturated", "non_finite")
NEIGHBOURS = 100  # images at least, real and generated, for precision and recall to mean something
COUNTED: dict[tuple, int] = {}  # multiply-adds of networks of known shapes: those of one run are mostly alike


def parameters(net: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in net.parameters())


def macs(net: Network) -> int:
    """Multiply-adds of one forward pass of one sample, of `net.shape`.

    Counted by torch-pruning, as in the paper, on tensors without numbers: convolutions, linear layers and norms; the
    products inside attention for transformers only (there the paper's counter knows them).
    """
    from torch_pruning.utils import count_ops_and_params

    kind = (type(net), net.shape, str(net.config), *(tuple(p.shape) for p in net.parameters()))
    if kind in COUNTED:
        return COUNTED[kind]
    x, t = torch.empty(1, *net.shape, device="meta"), torch.empty(1, device="meta")
    one = {"y": torch.tensor(0)} if net.num_classes is not None else net.no_condition() or {}  # the cond of one sample
    cond = {key: torch.empty(1, *value.shape, dtype=value.dtype, device="meta") for key, value in one.items()}
    counted = copy.deepcopy(net).to("meta")
    for norm in counted.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = 1  # counts the same, and takes one sample of one pixel too
    COUNTED[kind] = int(count_ops_and_params(counted, (x, t, cond))[0]) + net.attention_macs()
    return COUNTED[kind]


# ---- Features --------------------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> Tensor:
    """The pixels in [-1, 1]; of images larger than 16x16 the means of 16x16 blocks."""
    size = [min(side, 16) for side in images.shape[2:]]
    return F.adaptive_avg_pool2d(images / 127.5 - 1, size).flatten(1)


class DigitClassifier(nn.Module):
    """A small convolutional network on gray images (N, 1, H, W), H = W >= 8, with 64 features before its ten scores."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(8),  # (N, 16, 8, 8)
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),         # (N, 32, 4, 4)
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),            # (N, 1024)
            nn.Linear(1024, 64), nn.ReLU(),                                      # (N, 64)
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.register_buffer("accuracy", torch.tensor(math.nan).double())  # of held-out digits: share named right

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(data.to_float(images)))  # (N, 10)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.trunk(data.to_float(images))  # (N, 64)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self(images).argmax(1)  # (N,), the most likely digits


def fit_classifier(train: data.Images, test: data.Images, steps: int = 400) -> DigitClassifier:
    """A classifier of gray images of digits with labels, its accuracy that on `test`. Its seeds are fixed, and it takes
    one thread: a ruler must not change with what it measures."""
    images, labels = torch.from_numpy(np.array(train.images)), torch.tensor(train.labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(0)
            net = DigitClassifier()
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
            for _ in machine.progress_bar(range(steps), desc="digit classifier", leave=False):
                pick = torch.randint(len(images), (64,))
                shift = torch.randint(-1, 2, (2,)).tolist()  # up to a pixel each way, for there are few images
                loss = F.cross_entropy(net(images[pick].roll(shift, (2, 3))), labels[pick])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    finally:
        torch.set_num_threads(threads)
    net.eval().accuracy.fill_(np.mean(net.predict(np.array(test.images)).numpy() == test.labels))
    return net


def digit_classifier(image_size: int = 8, cache: str | Path = data.CACHE, steps: int = 400) -> DigitClassifier:
    """The ruler of `frechet_digits`: fitted once to the digits' train split (seconds), later read from `cache`."""
    from safetensors.torch import save_file

    # v2: count up when the network or its training changes
    path = Path(cache) / f"digit-classifier-{image_size}-{steps}-v2.safetensors"
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            net = DigitClassifier()
        net.load_state_dict(read_weights(path))
        return net.eval()
    except (OSError, RuntimeError, ValueError):
        pass  # there is none, or not a whole one: it is made anew
    train, test = (data.load("digits", image_size=image_size, split=split, seed=0) for split in ("train", "test"))
    net = fit_classifier(train, test, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(path) as part:
        save_file(net.state_dict(), part, metadata=sealed(net.state_dict()))
    return net


def features(
    extract: Extract, images: Tensor | np.ndarray, *, batch: int = 1000, rows: np.ndarray | None = None, label: str = ""
) -> Tensor:
    """extract(...) of images (N, C, H, W) uint8, or of `rows` of them, `batch` at a time: (N, D) on the CPU."""
    rows = np.arange(len(images)) if rows is None else rows
    starts = machine.progress_bar(
        range(0, len(rows), batch), desc=label, unit="img", unit_scale=batch, leave=False, disable=not label
    )
    return torch.cat([extract(torch.as_tensor(images[rows[i : i + batch]])).cpu() for i in starts])


class Reference(NamedTuple):
    """What generated images are compared with."""

    about: str  # which images, and how many
    gaussian: tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D) of their features
    features: Tensor | None  # (N, D); a file of statistics may lack them


def read_reference(path: str, extract: Extract) -> Reference:
    """The reference of an .npz as ADM and pytorch-fid publish them: `mu` and `sigma`, images (N, H, W, 3) as `arr_0`,
    or all of them. ValueError where it holds neither."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "arr_0") if name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"--reference {path} cannot be read as an .npz: {error}") from error
    found, images, (mu, sigma) = None, arrays.get("arr_0"), (arrays.get(name) for name in ("mu", "sigma"))
    of_images = images is not None and images.ndim == 4 and images.dtype == np.uint8 and len(images) > 1
    of_numbers = mu is not None and sigma is not None and mu.shape + mu.shape == sigma.shape and mu.ndim == 1
    if not (of_images or of_numbers):
        wanted = "mu (D,) and sigma (D, D), or two or more images as arr_0 (N, H, W, 3) uint8"
        raise ValueError(f"--reference {path} must hold {wanted}")
    if of_images:
        found = features(extract, images.transpose(0, 3, 1, 2), batch=100, label="features of the reference")
    statistics = (torch.tensor(mu), torch.tensor(sigma)) if of_numbers else gaussian(found)
    about = f"{Path(path).name} ({'statistics' if found is None else f'{len(found)} images'})"
    return Reference(about, tuple(x.double() for x in statistics), found)


def reference(real: data.Images, extract: Extract, *, count: int = 50_000, cache: str | Path = data.CACHE) -> Reference:
    """Of N = min(count, all) train images evenly spaced over `real`, features float32 kept in `cache` under a hash of
    what they are of."""
    rows = shards.spaced(len(real.images), count)
    some = real.images[rows[:: math.ceil(len(rows) / 64)]]  # not all have a fingerprint
    key = machine.digest(real.fingerprint.encode(), some.tobytes())[:8]
    size = "x".join(map(str, real.images.shape[1:]))
    path = Path(cache) / f"features-{real.name}-{size}-train-{len(rows)}-{extract.__name__}-{key}.npy"
    if not path.exists():
        found = features(extract, real.images, batch=100, rows=rows, label=f"features of {real.name}").float()
        path.parent.mkdir(parents=True, exist_ok=True)
        shards.save_array(path, found.numpy())
    found = torch.from_numpy(np.array(shards.open_array(path, None)))
    about = f"{len(found)} of {len(real.images)} images of {real.name} (train)"
    return Reference(about, gaussian(found), found)


# ---- Distances -------------------------------------------------------------------------------------------------------


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    return x.double().mean(0), torch.atleast_2d(x.double().T.cov())


def frechet(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features (N, D) and (M, D), N and M >= 2 (Heusel et al. 2017)."""
    if real.shape[1:] != fake.shape[1:] or real.ndim != 2 or min(len(real), len(fake)) < 2:
        raise ValueError(f"frechet needs (N, D) and (M, D), N, M >= 2, not {tuple(real.shape)} and {tuple(fake.shape)}")
    return frechet_gaussians(gaussian(real), gaussian(fake))


def frechet_gaussians(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> float:
    """Of two means (D,) and covariances (D, D), float64: |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2.

    The last trace is the sum of the square roots of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric: singular
    covariances (pixels that never change) do no harm. What is not finite is infinitely far away.
    """
    (m1, s1), (m2, s2) = real, fake
    if s1.shape != s2.shape:
        raise ValueError(f"features of {len(m1)} and of {len(m2)} numbers have no distance: give both one extractor")
    if not all(x.isfinite().all() for x in (m1, s1, m2, s2)):
        return math.inf
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * overlap).item())


def precision_recall(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 512) -> tuple[float, float]:
    """Precision and recall of features (N, D) and (M, D), N and M > k (Kynkäänniemi et al. 2019, as prdc has them).

    Each point has a ball that ends at its k-th neighbour in its own set. Precision is the share of fakes strictly
    inside the ball of a real, recall that of reals strictly inside the ball of a fake. `chunk` rows of distances are
    held at a time: 50,000 x 50,000 in 2,048 dimensions fits in 4 GB.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images, not {len(real)} and {len(fake)}")
    centre = real.mean(0, dtype=torch.float64)
    real, fake = real - centre, fake - centre  # float64; near 0, |a|^2 - 2ab + |b|^2 keeps its digits

    def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:  # squared, (chunk, len(b)) at a time
        norms = torch.linalg.vector_norm(b, dim=1).square()  # b.square() would be another copy of b
        for rows in a.split(chunk):
            yield torch.addmm(norms, rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))

    def radii(x: Tensor) -> Tensor:  # the nearest of k + 1 is the point itself
        return torch.cat([d.topk(k + 1, largest=False).values.amax(1) for d in distances(x, x)])

    real_radii, fake_radii = radii(real), radii(fake)
    real_inside, fake_inside = [], torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for d, radius in zip(distances(real, fake), real_radii.split(chunk), strict=True):
        real_inside.append((d < fake_radii).any(1))
        fake_inside |= (d < radius[:, None]).any(0)
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> float:
    """KID of features (N, D) and (M, D) as clean-fid has it (Bińkowski et al. 2018), always on the same subsets."""
    from cleanfid.fid import kernel_distance as clean_fid

    state = np.random.get_state()  # numpy's global random numbers, which clean-fid takes
    np.random.seed(0)
    try:
        return clean_fid(real.numpy(), fake.numpy(), subsets, size)
    finally:
        np.random.set_state(state)


def feature_scores(
    real: Reference, fake: Tensor, *, k: int = 5, classes: Tensor | None = None, shuffle: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, float | None]:  # fmt: skip
    """frechet (FID on Inception's), kid, inception_score, precision, recall of features (M, D), float32 on the CPU.

    None is what cannot be said: the last two below NEIGHBOURS images, they and kid against statistics alone, the
    Inception Score without `classes` (K, D), before which `shuffle` mixes the images. device: of the search for the
    k-th neighbours: 50,000 take a CPU minutes.
    """
    scores: dict[str, float | None] = {"frechet": frechet_gaussians(real.gaussian, gaussian(fake))}
    scores |= dict.fromkeys(("kid", "inception_score", "precision", "recall"))
    if real.features is not None:
        scores["kid"] = kernel_distance(real.features, fake)
        if min(len(real.features), len(fake)) >= NEIGHBOURS:
            found = precision_recall(real.features.to(device), fake.to(device), k)
            scores |= dict(zip(("precision", "recall"), found, strict=True))
    if classes is not None:
        from torch_fidelity.metric_isc import isc_features_to_metric

        parts = 10 if shuffle else math.ceil(len(fake) / 5000)  # torch-fidelity's of prompts, ADM's of classes
        options = {"shuffle": shuffle, "splits": min(parts, len(fake))}
        scores["inception_score"] = isc_features_to_metric(fake @ classes.T, **options)["inception_score_mean"]
    return scores


class Ruler:
    """What samples are measured by: real images (N, C, H, W) uint8, looked at once, and of digits a classifier."""

    def __init__(self, real: Tensor | np.ndarray, classifier: DigitClassifier | None = None):
        self.count, self.classifier = len(real), classifier
        self.pixels = gaussian(features(pixels, real))
        self.digits = None if classifier is None else features(classifier.features, real)  # (N, 64)

    def score(
        self, samples: Tensor, teacher_samples: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, float | int | None]:
        """The `SCORES` of samples (n, C, H, W) in [-1, 1] units, not clamped. With any non-finite image the Frechet
        distances and teacher_mse are infinite; such an image lies in no ball, which lowers precision, and its
        non-finite pixels count as saturated. teacher_samples: from the same noise. labels (n,): the classes that the
        samples were made for; with a classifier right_class is measured, too."""
        finite = samples.flatten(1).isfinite().all(1)  # (n,)
        images, whole = data.to_uint8(samples[finite]), bool(finite.all())  # (m, C, H, W)

        scores: dict[str, float | int | None] = {}
        if self.classifier and labels is not None:
            right = self.classifier.predict(images) == labels[finite]  # (m,)
            scores["right_class"] = right.double().sum().item() / len(samples)
        far = math.inf
        scores["frechet_pixels"] = frechet_gaussians(self.pixels, gaussian(features(pixels, images))) if whole else far
        scores |= dict.fromkeys(("frechet_digits", "precision", "recall", "teacher_mse"))
        if self.classifier:
            near = features(self.classifier.features, images) if len(images) else None  # (m, 64)
            scores["frechet_digits"] = frechet(self.digits, near) if whole else far
        if self.classifier and min(self.count, len(samples)) >= NEIGHBOURS:
            precision, recall = precision_recall(self.digits, near) if len(images) > 5 else (0.0, 0.0)
            scores |= {"precision": precision * len(images) / len(samples), "recall": recall}
        if teacher_samples is not None:
            mse = (samples.double() - teacher_samples).square().mean().item()
            scores["teacher_mse"] = far if math.isnan(mse) else mse
        scores["saturated"] = 1 - (samples.abs() <= 1.2).double().mean().item()  # put this way round, NaN counts
        scores["non_finite"] = len(samples) - len(images)
        return scores


def score(
    samples: Tensor, teacher_samples: Tensor | None, real: Tensor | np.ndarray,
    classifier: DigitClassifier | None = None, labels: Tensor | None = None,
) -> dict[str, float | int | None]:  # fmt: skip
    """`Ruler.score`, of samples that are the only ones measured against these real images."""
    return Ruler(real, classifier).score(samples, teacher_samples, labels)
