"""What a run at CelebA size costs, by what it does: seconds of each part, and its share of the whole.

    python benchmarks/shares.py            # a few minutes on two cores; benchmarks/shares.json
    python benchmarks/shares.py --quick    # tiny networks: does it run?
    python benchmarks/bench.py --show benchmarks/shares.json

Each part is called by itself, a few times, and multiplied by how often a run of the published settings does it (500,000
steps); a batch is of 8 images, as everywhere in bench.py. Images are random, networks have random weights.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks import answers, bench
from benchmarks.answers import Row
from distil import data, disk, evaluate, importance, machine, metrics, pictures
from distil.batches import batches

CELEBA, GENERATED = 162_770, 50_000  # images to train on, and to score


def medians(b: bench.Setup, call: Callable[[], object], turns: float = 1.0) -> float:
    return b.medians({"": call}, turns)[""]


def training(b: bench.Setup) -> Iterable[Row]:
    """A run of 500,000 steps, PLACE with features at 90 %: its parts, how often, and their shares of all seconds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        settings = b.settings(out=folder, **({"sample_steps": 2} if b.quick else {}))
        student, steps = b.student(settings), settings.steps
        shape = (256 if b.quick else 20_000, 3, b.size, b.size)
        file = np.lib.format.open_memmap(Path(folder, "images.npy"), "w+", np.uint8, shape)  # as the cache keeps them
        images = data.Images(file, None, "celeba")
        stream = opened.enter_context(contextlib.closing(batches(settings, images, b.process, b.teacher)))
        batch = next(stream)
        with torch.no_grad():
            output, other = (net(batch.x_t, batch.t) for net in (student.ema, b.teacher))
        with disk.open_log(Path(folder), 0, settings.log, {}) as log:
            log({"step": 0, "loss": 0.0})  # for the curves of previews
        jpeg = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (27, 22, 3), np.uint8)  # smooth, as photographs are
        Image.fromarray(pixels).resize((178, 218), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
        files = [io.BytesIO(jpeg.getvalue()) for _ in range(64)]

        whole = medians(b, partial(b.step, [student], settings))
        took = {"images, noise, times": (steps, medians(b, partial(next, stream)))}
        with torch.no_grad():
            took["teacher"] = (steps, medians(b, partial(b.tapped, batch.x_t, batch.t)))
        rest = whole - sum(s for _, s in took.values())
        took["student, losses, update"] = (steps, rest)
        diagnosed = partial(train.diagnose, student.kd, batch, output, other, None, 0)
        took["lines of the log"] = (steps // settings.log_every, medians(b, diagnosed))
        saved = partial(train.save_checkpoint, settings, [student], Path(folder), 1, images)
        took["checkpoints"] = (steps // settings.save_every, medians(b, saved))
        shown = [("place", student.ema)]
        looked = partial(evaluate.preview, settings, images, None, shown, b.process, b.device, n=4 if b.quick else 32)
        took["previews"] = (steps // settings.save_every, medians(b, looked, 0))
        x0, noise = batch.x0, torch.randn_like(batch.x0)
        gradients = partial(
            importance.accumulate_gradients, b.teacher, b.process, x0, noise, timesteps=[500], progress=False
        )
        took["Taylor importance"] = (1000 * settings.taylor_batch // len(x0), medians(b, gradients))
        decoded = medians(b, lambda: [pictures.decode(one, b.size, 3) for one in files]) / len(files)
        took["JPEGs to pixels, once"] = (CELEBA, decoded)
        size = Path(folder, "checkpoint.pt").stat().st_size
    total = sum(times * s for times, s in took.values())
    for name, (times, s) in took.items():
        row = {"what": name, "times": times, "s": s, "hours": times * s / 3600, "percent": 100 * times * s / total}
        if name == "checkpoints":
            row["MiB"] = size / 2**20
        yield row


def scoring(b: bench.Setup) -> Iterable[Row]:
    """Scoring that student by 50,000 images, DDIM with 100 steps, beside as many real ones."""
    from torchvision.models import inception_v3

    net, batch, few = b.pruned(0.9).eval(), 2 if b.quick else 16, 100 if b.quick else 4000
    inception = inception_v3(weights=None, init_weights=False).eval()  # as large as the one that scores
    step = medians(b, partial(b.process.sample, net, (batch, *net.shape), 1))
    shown = torch.rand(1 if b.quick else 8, 3, 299, 299)
    with torch.no_grad():
        read = medians(b, partial(inception, shown))
    features = torch.randn(2, few, 64 if b.quick else 2048)
    compared = medians(b, partial(metrics.precision_recall, *features), 0)
    took = {
        "samples": GENERATED * 100 * step / batch,
        "Inception features of both": 2 * GENERATED * read / len(shown),
        "neighbours, for precision and recall": compared * (GENERATED / few) ** 2,
        "Frechet distance": medians(b, partial(metrics.frechet, *features), 0),
    }
    for name, s in took.items():
        yield {"what": name, "hours": s / 3600, "percent": 100 * s / sum(took.values())}


SECTIONS = {f.__name__: f for f in (training, scoring)}


def main(arguments: list[str] | None = None) -> int:
    parser = answers.parser_of("shares.py", __doc__, SECTIONS, "benchmarks/shares.json")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(arguments)
    with machine.refusing("shares.py"):
        b = bench.Setup(options)
        if b.device.type != "cpu":
            raise ValueError("this is measured on a CPU: leave --device out")
    return answers.answer(options, b, SECTIONS)


if __name__ == "__main__":
    sys.exit(main())
