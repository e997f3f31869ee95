"""Which images a step sees, and what it shows of them: the same whatever part of a batch a process takes."""

import itertools
import threading
import time

import hypothesis
import numpy as np
import pytest
import torch
from conftest import a_unet, some_latents
from hypothesis import given
from hypothesis import strategies as st

from distil import batches as order
from distil import data, networks
from distil.batches import Batch, batch_indices, batches, draw, fetched
from distil.process import DDPM
from distil.settings import Settings
from models import DiT


def test_a_batch_is_a_function_of_seed_and_step_whatever_part_of_it_a_process_takes():
    ramp = torch.arange(8, dtype=torch.uint8)
    pixels = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8) + ramp
    labels, net = torch.arange(32), DiT(8, 2, 1, 8, 1, 2, num_classes=32, class_dropout_prob=0.5)

    def drawn(seed, step, rows=slice(None)):
        cond = {"y": labels[rows], "unused": labels}
        settings = Settings(data="photos", seed=seed, batch_size=32, flip=True)
        batch = draw(settings, pixels[rows], cond, DDPM(), net, step, rows=rows)
        assert torch.equal(batch.x_t, DDPM().add_noise(batch.x0, batch.noise, batch.t))
        assert torch.equal(batch.target, batch.noise)
        return [*batch[:5], batch.cond["y"]]

    def equal(a, b):
        return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    whole = drawn(1, 7)
    assert all(equal(whole, drawn(1, 7)))
    assert all(equal([x[8:16] for x in whole], drawn(1, 7, slice(8, 16))))
    assert not any(equal(whole, drawn(2, 7)) + equal(whole, drawn(1, 8)))
    dropped = whole[5] == 32
    assert 4 < dropped.sum() < 28 and torch.equal(whole[5][~dropped], labels[~dropped])
    mirrored = whole[0][:, 0, 0, 0] > whole[0][:, 0, 0, -1]
    assert 4 < mirrored.sum() < 28 and whole[0].abs().max() <= 1
    batch = draw(Settings(), pixels, {"y": labels}, DDPM(), a_unet(), 0)
    assert torch.equal(batch.x0, data.to_float(pixels)) and batch.cond == {}
    part = Batch(*whole[:5], {"y": whole[5]}).part(slice(3, 5))
    assert all(equal([x[3:5] for x in whole], [*part[:5], part.cond["y"]]))


def test_a_step_sees_the_latents_of_images_and_mirror_images(monkeypatch):
    latents, settings = some_latents(), Settings(dataset="latents", data="x", batch_size=64, channels=24)
    net = networks.new_network(settings, latents)
    assert (net.shape, net.num_classes, len(net.blocks)) == ((4, 8, 8), 2, 12)
    pixels, cond = next(fetched(latents, 64, 0))
    batch = draw(settings, pixels, cond, DDPM(), net, 0)
    sides = [[torch.equal(x, side) for side in pair] for x, pair in zip(batch.x0, pixels, strict=True)]
    assert all(a != b for a, b in sides) and 10 < sum(b for _, b in sides) < 54
    assert set(batch.cond["y"].tolist()) == {0, 1, 2}  # 2: no class
    whole = list(itertools.islice(batches(settings, latents, DDPM(), net), 3))
    assert torch.equal(whole[0].x0, batch.x0)
    monkeypatch.setattr("distil.batches.rank_and_world", lambda: (1, 4))  # of 64 rows the second process has 16 to 31
    for step, part in zip((1, 2), batches(settings, latents, DDPM(), net, start=1), strict=False):
        assert torch.equal(part.x_t, whole[step].x_t[16:32]) and torch.equal(
            part.cond["y"], whole[step].cond["y"][16:32]
        )
    plain_batch = next(batches(settings, latents, DDPM(), net, whole=True))  # what pruning learns from
    assert torch.equal(plain_batch.x0, pixels[:, 0])


# ---- Which images a step sees, and when they are read ----------------------------------------------------------------

bounded = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)


@bounded
@given(n=st.integers(1, 50), batch=st.integers(1, 120), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_batches_laid_end_to_end_are_whole_epochs(n, batch, seed, epochs):
    steps = -(-n * epochs // batch)
    batches = [batch_indices(n, batch, step, seed) for step in range(steps)]
    assert all(index.shape == (batch,) and index.dtype == np.int64 for index in batches)
    order = np.concatenate(batches)[: n * epochs].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (epochs, 1)))


@bounded
@given(n=st.integers(1, 50), batch=st.integers(1, 120), step=st.integers(0, 10**6), seed=st.integers(0, 2**31))
def test_a_batch_is_a_pure_function_of_its_arguments(n, batch, step, seed):
    first = batch_indices(n, batch, step, seed)
    kept = first.copy()
    first[:] = -1  # nor may a caller change what the next one gets
    order._permutation.cache_clear()
    np.testing.assert_array_equal(batch_indices(n, batch, step, seed), kept)
    halves = [batch_indices(n, batch, 2 * step + i, seed) for i in (0, 1)]
    np.testing.assert_array_equal(batch_indices(n, 2 * batch, step, seed), np.concatenate(halves))


def test_epochs_and_seeds_differ():
    orders = [batch_indices(1000, 1000, epoch, seed).tolist() for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    golden = np.random.default_rng((7, 2)).permutation(10)[:4]  # step 5 begins epoch 2
    np.testing.assert_array_equal(batch_indices(10, 4, 5, 7), golden)


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_bad_batches(arguments):
    with pytest.raises(ValueError, match="batch_indices needs"):
        batch_indices(*arguments)


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")}


class Slow:
    """Keeps what it was asked for; one batch fails."""

    def __init__(self, failing=None):
        self.asked, self.failing = [], failing

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.asked.append(index)
        if len(self.asked) == self.failing:
            raise OSError("the disk is gone")
        time.sleep(0.001)
        return np.zeros((len(index), 1, 2, 2), np.uint8)


def test_an_error_of_a_prefetched_batch_comes_when_that_batch_is_due(monkeypatch):
    monkeypatch.setattr(order, "WORKERS", 1)
    source, before = Slow(failing=3), threads()
    stream = fetched(data.Images(source, None, "slow"), 2, seed=0)
    assert next(stream)[0].shape == next(stream)[0].shape == (2, 1, 2, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not threads() - before
    with pytest.raises(ValueError, match="batch_indices needs"):
        next(fetched(data.Images(source, None, "slow"), 0, seed=0))


def test_prefetching_is_a_few_batches_ahead_and_no_more():
    source = Slow()
    stream = fetched(data.Images(source, None, "slow"), 2, seed=0)
    next(stream)
    deadline = time.monotonic() + 10
    while len(source.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.asked) == 4
    stream.close()
    assert len(source.asked) == 4
