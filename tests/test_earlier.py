"""What an earlier run left: checkpoints and results, of this run or of another."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from distil import disk, earlier
from distil.settings import Settings, parse, plain, restored


def test_a_finished_run_is_recognised_and_another_one_refused(tmp_path):
    settings = Settings(out=str(tmp_path))
    about = {"images": 8, "fingerprint": ""}

    def read_checkpoint(settings, folder):
        return earlier.read_checkpoint(settings, folder, about)

    assert read_checkpoint(settings, tmp_path) is None and earlier.read_metrics(settings, tmp_path) is None
    rows = {"teacher": {}, "students": [], "protocol": ""}
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": plain(settings), **rows}))
    torch.save({"step": 3, "settings": plain(settings), "students": {}}, tmp_path / "checkpoint.pt")
    watched = {"out": "elsewhere", "device": "cpu", "log": "wandb", "log_every": 7, "save_every": 9, "preview_every": 3}
    assert earlier.read_metrics(Settings(**watched), tmp_path)["settings"] == plain(settings)
    for sampled in ({"sample_steps": 7}, {"eta": 1.0}, {"eval_samples": 0}, {"clip_x0": True}, {"guidance": 2.0}):
        other = Settings(**sampled)
        assert earlier.read_metrics(other, tmp_path) is None and read_checkpoint(other, tmp_path)["step"] == 3
    older = {name: value for name, value in plain(settings).items() if name not in ("ema_warmup", "timesteps",
             "halve_group_size", "lift_per", "taylor_batch", "taylor_steps", "sampler")}  # fmt: skip
    torch.save({"step": 3, "settings": older, "students": {}}, tmp_path / "checkpoint.pt")
    assert read_checkpoint(settings, tmp_path)["step"] == 3
    with pytest.raises(ValueError, match=r"--ema-warmup was True, is False, --timesteps was antithetic, is uniform\)"):
        read_checkpoint(Settings(ema_warmup=False, timesteps="uniform"), tmp_path)
    for read in (earlier.read_metrics, read_checkpoint):
        with pytest.raises(ValueError, match=r"--lr was 0.005, is 0.001, --clip was 1.0, is 2.0\): give the former"):
            read(Settings(lr=0.001, clip=2.0), tmp_path)


RUNS = sorted((ROOT / "benchmarks").rglob("metrics.json"))


@pytest.mark.parametrize("path", RUNS, ids=[path.parent.name for path in RUNS])
def test_the_settings_of_every_committed_run_can_be_used(path):
    former = json.loads(path.read_text("utf-8"))["settings"]
    with pytest.raises(ValueError, match="--lr was"):
        earlier.refuse_other_settings(replace(restored(former), lr=0.5), former, path)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("--dataset celeba --ema-warmup --timesteps antithetic", "ema_warmup"),
        ("--dataset imagenet --data x --timesteps antithetic", "timesteps"),
        ("--fold-steps 10 --kd out --fold-end last", "fold_end"),
        ("", "head"), ("", "lift_per"), ("", "sampler"), ("--data photos --image-size 32", "flip"),
    ],
)  # fmt: skip
def test_the_run_of_an_earlier_version_without_a_setting_is_no_other_run(command, name):
    now = parse(command.split())
    former = plain(now)
    del former[name]
    earlier.refuse_other_settings(now, former, Path("checkpoint.pt"))


def test_flags_of_a_teacher_that_was_given_make_no_other_run():
    former = plain(Settings(teacher="net", teacher_steps=40, channels=32))
    earlier.refuse_other_settings(Settings(teacher="net"), former, Path("checkpoint.pt"))
    with pytest.raises(ValueError, match="--channels was 32, is 64"):
        earlier.refuse_other_settings(Settings(), plain(Settings(channels=32)), Path("checkpoint.pt"))


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone_and_a_wrong_one_refused(tmp_path, monkeypatch):
    settings, about, path = Settings(out=str(tmp_path)), {"images": 8, "fingerprint": ""}, tmp_path / "checkpoint.pt"
    content = {"step": 3, "settings": plain(settings), "data": about, "students": {}}
    torch.save(content, path)
    for seal in (False, True):  # the first is of an earlier version
        if seal:
            disk.seal(path)
        assert earlier.read_checkpoint(settings, tmp_path, about)["step"] == 3
        passing = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.EMFILE, errno.EACCES)]
        for error in (*passing, MemoryError(), RuntimeError("can't allocate memory")):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
                with pytest.raises(OSError, match=r"cannot be read now .*it was left as it is"):
                    earlier.read_checkpoint(settings, tmp_path, about)
            assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(ValueError, match=r"the data has changed since .*\(8 images then, 9 now\): bring them back"):
        earlier.read_checkpoint(settings, tmp_path, about | {"images": 9})
    with pytest.raises(ValueError, match=r"\(8 images then, 8 now, but not the same\)"):
        earlier.read_checkpoint(settings, tmp_path, about | {"fingerprint": "another"})
    wrong = ([], {}, 7, content | {"step": 10**9}, content | {"step": -1}, content | {"step": "x"},
             content | {"students": []}, content | {"settings": None})  # fmt: skip
    for other in wrong:
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"checkpoint.pt .*: move it away, or give another --out"):
            earlier.read_checkpoint(settings, tmp_path, about)
    for other in ("[]", "7", "{", '{"settings": {}}', "[" * 100_000):
        (tmp_path / "metrics.json").write_text(other)
        with pytest.raises(ValueError, match=r"metrics.json is .*: remove it, and the same command evaluates again"):
            earlier.read_metrics(settings, tmp_path)
