"""Which images a step sees, and what it shows of them to teacher and students alike: noise, times, conditions, all
functions of (seed, step)."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distil import data
from distil.machine import hash_seed, rank_and_world
from distil.process import Process
from distil.settings import Settings
from models import Network

WORKERS = 2  # threads that fetch batches; twice as many batches wait in memory


class Batch(NamedTuple):
    """What a step shows to teacher and students alike; B samples of shape C, H, W."""

    x0: Tensor  # (B, C, H, W), clean
    noise: Tensor  # (B, C, H, W)
    x_t: Tensor  # (B, C, H, W), noised
    target: Tensor  # (B, C, H, W), what the process asks for
    t: Tensor  # (B,)
    cond: dict[str, Tensor]  # of the networks, (B, ...) each; {} for those that take none

    def part(self, rows: slice) -> Batch:
        return Batch(*(x[rows] for x in self[:-1]), {key: value[rows] for key, value in self.cond.items()})

    def parts(self, n: int) -> dict[int, Batch]:
        """The batch in at most n parts, by their first rows."""
        pieces = [(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(len(self.t)).chunk(n)]
        return {first: self.part(slice(first, end)) for first, end in pieces}


def batch_indices(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which of `n` images step `step` sees: (batch,) int64, of independent permutations, one per (seed, epoch), laid
    end to end and cut into batches, which may exceed n. ValueError: n or batch below 1, step or seed below 0."""
    if n < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(f"batch_indices needs n, batch >= 1 and step, seed >= 0, got {n=}, {batch=}, {step=}, {seed=}")
    first, stop = step * batch, (step + 1) * batch
    epochs = range(first // n, (stop - 1) // n + 1)
    parts = [_permutation(n, seed, epoch)[max(first - epoch * n, 0) : stop - epoch * n] for epoch in epochs]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def fetched(
    images: data.Images, batch: int, seed: int, start: int = 0, *, rows: slice = slice(None), pin: bool = False
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images, (B, C, H, W) uint8 or (B, 2, C, H, W) float32, and their `conditions`, by the `batch_indices` of steps
    start, start + 1, ... without end. Threads fetch a few steps ahead until the generator is closed; what indexing
    raises is raised at the step that it concerns. rows: the part of a batch that this rank sees. pin: for a GPU, in
    page-locked memory, so that `.to(device, non_blocking=True)` overlaps."""

    def fetch(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = batch_indices(len(images.images), batch, step, seed)[rows]
        pixels, cond = torch.from_numpy(images.images[index]), images.conditions(index)
        if pin:
            pixels, cond = pixels.pin_memory(), {key: value.pin_memory() for key, value in cond.items()}
        return pixels, cond

    pool = ThreadPoolExecutor(WORKERS)
    ahead = start + 2 * WORKERS
    try:
        waiting = deque(pool.submit(fetch, step) for step in range(start, ahead))
        for step in itertools.count(ahead):
            yield waiting.popleft().result()
            waiting.append(pool.submit(fetch, step))
    finally:
        pool.shutdown(cancel_futures=True)


def batches(
    settings: Settings, images: data.Images, process: Process, net: Network, start: int = 0, whole: bool = False
) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ... as this process sees them: its share, or with `whole` all rows.

    What is random is drawn for the whole batch from (seed, step), so it does not depend on the number of processes.

    net: says which conditions the networks take, and in what share of the samples they are dropped, for teacher and
    students alike, so that samples can be guided; the batches lie on its device. `whole` ones are not mirrored.
    """
    rank, world = (0, 1) if whole else rank_and_world()
    rows = slice(rank * settings.batch_size // world, (rank + 1) * settings.batch_size // world)
    settings = replace(settings, flip=settings.flip and not whole)
    of_gpu = next(net.parameters()).device.type == "cuda"
    stream = fetched(images, settings.batch_size, settings.seed, start, rows=rows, pin=of_gpu)
    with contextlib.closing(stream):
        for step, (pixels, cond) in enumerate(stream, start):
            yield draw(settings, pixels, cond, process, net, step, rows)


def draw(
    settings: Settings, pixels: Tensor, cond: dict[str, Tensor], process: Process, net: Network, step: int,
    rows: slice = slice(None),
) -> Batch:  # fmt: skip
    """The `rows` of the batch of a step: images in [-1, 1] or latents, noise, times, conditions.

    pixels: (B, C, H, W) uint8, the images of these rows; or (B, 2, C, H, W) float32, latents of an image and its mirror
    image. cond: what the data knows of them. net: as of `batches`.
    """
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(hash_seed(settings.seed, step))

    def uniform() -> Tensor:  # (B,)
        return torch.rand(settings.batch_size, generator=generator, device=device)[rows]

    pixels = pixels.to(device, non_blocking=True)
    mirrored = uniform() < 0.5 if settings.flip else torch.zeros(len(pixels), dtype=torch.bool, device=device)  # (B,)
    if pixels.dtype == torch.uint8:  # of latents the mirror images are there
        pixels = data.to_float(torch.stack([pixels, pixels.flip(-1)], dim=1))  # (B, 2, C, H, W)
    x0 = pixels[torch.arange(len(pixels), device=device), mirrored.long()]  # (B, C, H, W)
    noise = torch.randn(settings.batch_size, *x0.shape[1:], generator=generator, device=device)[rows]  # (B, C, H, W)
    t = process.sample_t(settings.batch_size, generator=generator, device=device)[rows]  # (B,)
    cond = {key: cond[key].to(device, non_blocking=True) for key in net.conditions}
    if net.condition_dropout > 0:
        dropped = uniform() < net.condition_dropout  # (B,)
        for key, null in net.no_condition().items():
            shape = (-1, *[1] * (cond[key].ndim - 1))
            cond[key] = torch.where(dropped.reshape(shape), null.to(cond[key], non_blocking=True), cond[key])
    return Batch(x0, noise, process.add_noise(x0, noise, t), process.target(x0, noise, t), t, cond)
