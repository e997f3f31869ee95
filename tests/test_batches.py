"""What a step shows: the same whatever part of a batch a process takes."""

import itertools

import torch
from conftest import a_unet, some_latents

from distil import data, networks
from distil.batches import Batch, batches, draw
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
    pixels, cond = next(data.batches(latents, 64, 0))
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
