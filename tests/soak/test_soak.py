"""The campaign behind docs/trust.md: `pytest -m soak`, hours on two cores; SOAK_SHARE=0.1 is a tenth of it.

What may come out of any of it: the right result; or one sentence and exit code 2 (3 after a divergence, 130 and 143
after a signal), with nothing lost. Never a traceback, never another result without a word.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lift_place
import models
from distil import data, disk, earlier, machine, metrics, sample, shards, teachers
from distil.command import flag
from distil.fast_loss import lift, place
from distil.latents import captioned
from distil.settings import Settings, plain

pytestmark = pytest.mark.soak
SHARE = float(os.environ.get("SOAK_SHARE", "1"))
ROOT = Path(__file__).parents[2]
TINY = ["--channels", "16", "--teacher-steps", "6", "--prune", "0.5", "--steps", "12", "--batch-size", "8",
        "--eval-samples", "12", "--sample-steps", "2", "--log-every", "1", "--save-every", "2", "--device", "cpu",
        "--lambda-feat", "0"]  # fmt: skip
KINDS = {
    "unet": ["--kd", "out", "place", "--dropout", "0.1"],
    "dit": ["--arch", "dit", "--kd", "place", "--depth-method", "learned", "--depth-steps", "2"],
    "fold": ["--fold-steps", "5", "--sample-steps", "5", "--kd", "out"],
    "two processes": ["--kd", "out"],
}


def times(n: int) -> int:
    return max(1, round(n * SHARE))


def record(what: str, outcome: object) -> None:
    """Notes what was done in runs/soak.json, which git ignores, beside what earlier parts of the campaign did."""
    path = Path("runs/soak.json")
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    disk.write_json(path, {**found, "machine": machine.describe(), what: {"outcome": outcome, "share": SHARE}})


# ---- Runs in processes of their own ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(folder, arguments): a run of train.py, forked from a process that has loaded torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch_pruning", "sklearn.datasets", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context.Process(target=int).start()

    ruler = tmp_path_factory.mktemp("ruler")
    metrics.digit_classifier(8, ruler)

    def start(folder: Path, arguments: list[str], **environment: str) -> multiprocessing.Process:
        if not folder.exists():  # making it takes longer than all the rest of a run
            shutil.copytree(ruler, folder / data.CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=child, args=(str(folder), arguments, environment))
        process.start()
        return process

    return start


def child(folder: str, arguments: list[str], environment: dict[str, str]) -> None:
    import train
    from distil import metrics
    from distil.command import leave_on_signals
    from distil.settings import parse

    leave_on_signals("train.py")
    os.chdir(folder)
    os.environ.update(environment)
    os.environ["HF_HUB_OFFLINE"] = "1"
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    metrics.macs = lambda net: 0  # slow, and nothing to lose
    code = train.main(parse(arguments))
    sys.exit(code)


def finish(process: multiprocessing.Process, folder: Path, allowed=(0,), seconds: float = 600) -> int:
    process.join(seconds)
    text = (folder / "output.txt").read_text()
    assert process.exitcode in allowed and "Traceback" not in text, (process.exitcode, text[-2000:])
    return process.exitcode


def pair(start, folder: Path, arguments: list[str]) -> list[multiprocessing.Process]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(folder, arguments, RANK=str(rank), LOCAL_RANK=str(rank), **about) for rank in (0, 1)]


def result(folder: Path) -> tuple[dict, list, list]:
    """Weights of all networks, the log without times, the scores without seconds."""
    nets = {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    records = [json.loads(line) for line in (folder / "runs/run/log.jsonl").read_text().splitlines()]
    rows = json.loads((folder / "runs/run/metrics.json").read_text())["students"]
    return nets, records, [{**row, "seconds": 0} for row in rows]


def same(a: Path, b: Path) -> bool:
    one, two = result(a), result(b)
    nets = one[0].keys() == two[0].keys() and all(
        torch.equal(x, two[0][name][key]) for name, net in one[0].items() for key, x in net.items()
    )
    return nets and one[1:] == two[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_are_killed_at_any_moment_end_as_if_they_were_not(kind, start, tmp_path):
    arguments, two = [*TINY, *KINDS[kind], "--out", "runs/run"], kind == "two processes"

    def begin(folder: Path) -> list[multiprocessing.Process]:
        return pair(start, folder, arguments) if two else [start(folder, arguments)]

    began = time.monotonic()
    for process in begin(tmp_path / "whole"):
        finish(process, tmp_path / "whole")
    took, draw, kills, rounds = time.monotonic() - began, random.Random(kind), 0, 0
    while kills < times(28):
        folder, rounds = tmp_path / f"killed-{rounds}", rounds + 1
        for _ in range(12):
            running = begin(folder)
            running[0].join(draw.uniform(0, 0.8 * took))
            alive = [process for process in running if process.is_alive()]
            for process in alive:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            kills += bool(alive)
            if not alive:
                break
        for process in begin(folder):
            finish(process, folder)
        assert same(tmp_path / "whole", folder), folder
        assert not [path for path in folder.rglob("*.part") if f"-{os.getpid()}." not in path.name]
        shutil.rmtree(folder)
    record(f"SIGKILL, {kind}", f"{kills} in {rounds} runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_any_moment_are_one_line_and_lose_no_step(number, start, tmp_path):
    arguments = [*TINY, "--kd", "out", "--out", "runs/run"]
    began = time.monotonic()
    finish(start(tmp_path / "whole", arguments), tmp_path / "whole")
    took, draw, sent = time.monotonic() - began, random.Random(int(number)), 0
    for i in range(times(10)):
        folder = tmp_path / str(i)
        process = start(folder, arguments)
        (folder / "output.txt").touch()
        process.join(draw.uniform(0.3, took))
        if process.is_alive() and (folder / "runs").exists():  # else it was not yet ours, or was done
            os.kill(process.pid, number)
            sent += 1
        finish(process, folder, (0, -number, 128 + number))
        finish(start(folder, arguments), folder)
        assert same(tmp_path / "whole", folder)
    record(signal.Signals(number).name, sent)


def test_runs_that_meet(start, tmp_path):
    arguments, ended = [*TINY, "--kd", "out"], []
    for i in range(times(6)):
        folder = tmp_path / f"out-{i}"
        both = [start(folder, [*arguments, "--out", "runs/run"]) for _ in range(2)]
        ended += [finish(process, folder, (0, 2)) for process in both]
        assert 0 in ended[-2:]
        folder = tmp_path / f"teacher-{i}"
        both = [start(folder, [*arguments, "--out", f"runs/{name}"]) for name in ("run", "other")]
        assert [finish(process, folder) for process in both] == [0, 0]
        assert same(tmp_path / "teacher-0", folder)
        students = [load_file(folder / f"runs/{name}/student/model.safetensors") for name in ("run", "other")]
        assert all(torch.equal(x, students[1][name]) for name, x in students[0].items())
    record("two runs with one --out", f"{times(6)}, of {len(ended)} commands {ended.count(2)} were refused")
    record("two runs that share a teacher", times(6))


def test_a_disk_that_is_full(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=24m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True).returncode:  # noqa: PLW1510
        pytest.skip("no tmpfs may be mounted here")
    try:
        arguments, refused = [*TINY, "--kd", "out", "--out", "runs/run"], 0
        finish(start(tmp_path / "whole", arguments), tmp_path / "whole")
        for i in range(times(20)):
            folder = disk / "run"
            folder.mkdir()
            free = random.Random(i).randrange(10_000, 6_000_000)
            with (disk / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
            refused += finish(start(folder, arguments), folder, (0, 2)) == 2
            assert not [*folder.rglob("*.part")]
            (disk / "ballast").unlink()
            finish(start(folder, arguments), folder)
            assert same(tmp_path / "whole", folder)
            shutil.rmtree(folder)
        record("full disks", f"{times(20)}, {refused} of them met, none lost a checkpoint")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- Command lines ---------------------------------------------------------------------------------------------------

WORDS = ["inf", "-inf", "nan", "0", "-1", "1", "2", "3", "5", "0.5", "1e30", "1e-30", "99999999999999999999", "", " ",
         "x", "\\", "../..", "/", "/proc/x", "/dev/null", "~", "0x10", "1,2", "1_000", "é", "a" * 300, "auto", "none",
         "true", "None", "loop", "file", "images"]  # fmt: skip


def test_command_lines(start, tmp_path):
    """Of one to three flags with values of all kinds, as train.py, and its siblings, get them."""
    draw, codes = random.Random(0), []
    kinds = {flag(item.name): item.metadata for item in dataclasses.fields(Settings)}
    names = sorted(kinds.keys() - {"--compile", "--steps", "--teacher-steps"})
    for i in range(times(500)):
        folder = tmp_path / str(i)
        (folder / "images").mkdir(parents=True)
        (folder / "loop").symlink_to("loop")
        (folder / "file").write_text("no image")
        Image.new("RGB", (9, 9)).save(folder / "images" / "a.png")
        given = []
        for name in draw.sample(names, draw.choice([1, 1, 2, 3])):
            few = [*kinds[name].get("choices", ()), *WORDS]
            given += [name] if kinds[name]["kind"] is bool else [name, draw.choice(few)]
        small = ["--steps", "1", "--teacher-steps", "1", "--channels", "16", "--batch-size", "4", "--eval-samples", "0"]
        process = start(folder, [*small, "--device", "cpu", *given])
        process.join(120)
        if process.is_alive():  # a large network, say: long, but no fault
            process.kill()
            process.join()
            codes.append("long")
            continue
        text = (folder / "output.txt").read_text()
        assert process.exitcode in (0, 2, 3, 130) and "Traceback" not in text, (given, process.exitcode, text[-3000:])
        codes.append(process.exitcode)
        shutil.rmtree(folder)
    counts = {str(code): codes.count(code) for code in dict.fromkeys(codes)}
    record("command lines", {"run": len(codes), "exit codes": counts})


# ---- Damaged files ---------------------------------------------------------------------------------------------------

NET = {"channels": 8, "channel_mults": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 4}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut, put in, zeroed, doubled; or all of them others."""
    at, n = draw.randrange(len(content)), draw.randrange(1, 40)
    flipped = bytearray(content)
    flipped[at] ^= 1 << draw.randrange(8)
    return draw.choice([
        bytes(flipped), bytes(flipped), bytes(flipped), content[:at], content[:at] + draw.randbytes(n) + content[at:],
        content[:at] + bytes(n) + content[at + n :], content + draw.randbytes(n), b"", draw.randbytes(50), b"[" * 10**5,
        b"null", b"{}", content[at:],
    ])  # fmt: skip


def readers(folder: Path) -> dict:
    """{file: how it is read, to something that can be compared}: everything that we write and read again."""
    settings = Settings(out=str(folder / "run"))
    (folder / "run").mkdir()
    net, pictures = models.UNet(8, 1, **NET), folder / "pictures"
    net.save(folder / "net")
    for i in range(4):
        (pictures / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(pictures / str(i % 2) / f"{i}.png")
    data.load("folder", pictures, image_size=8, cache=folder / "cache")
    (entry,) = (folder / "cache").iterdir()
    about = {"images": 1, "fingerprint": "x"}
    torch.save({"step": 1, "settings": plain(settings), "data": about, "students": net.state_dict()},
               folder / "run" / "checkpoint.pt")  # fmt: skip
    disk.seal(folder / "run" / "checkpoint.pt")
    rows = {"students": [{"loss": np.inf}], "teacher": {}, "protocol": "", "settings": plain(settings)}
    disk.write_json(folder / "run" / "metrics.json", rows)
    record = {"count": 4, "size": [4, 2, 2], "shard": 8192, "classes": 2, "image_size": 16}
    latents = folder / "latents"
    shards.write_shards(latents, {"latents": ((2, 4, 2, 2), np.float16)}, 4,
                        lambda rows: {"latents": rows[:, None, None, None, None]}, batch=2, what="latents")  # fmt: skip
    shards.save_array(latents / "labels.npy", np.array([0, 1, 0, 1]))
    disk.write_json(latents / "latents.json", record)
    sample.open_samples(folder / "samples", net, 8, (1, 8, 8))
    (folder / "table").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "table" / "a.png")
    (folder / "table" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "b"}\n')

    def network():
        return teachers.load(folder / "net").state_dict()

    def encoded():
        found = data.load("latents", latents)
        return [found.images[:], found.labels]

    def checkpoint():
        return earlier.read_checkpoint(settings, folder / "run", about)

    return {
        folder / "net" / "model.safetensors": network,
        folder / "net" / "config.json": network,
        folder / "run" / "checkpoint.pt": checkpoint,
        folder / "run" / "metrics.json": lambda: earlier.read_metrics(settings, folder / "run"),
        entry / "images-00000.npy": lambda: data.load("folder", pictures, image_size=8, cache=folder / "cache").images[
            :
        ],
        latents / "latents-00000.npy": encoded,
        latents / "labels.npy": encoded,
        latents / "latents.json": encoded,
        folder / "samples" / "samples.npy": lambda: [
            x.shape for x in sample.open_samples(folder / "samples", net, 8, (1, 8, 8))
        ],
        folder / "samples" / "samples.json": lambda: len(sample.open_samples(folder / "samples", net, 8, (1, 8, 8))),
        folder / "table" / "metadata.jsonl": lambda: captioned(folder / "table").captions,
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


UNSEALED = ("config.json", "metrics.json", "latents.json", "samples.json", "metadata.jsonl")  # text, without checksum


def test_damaged_files(tmp_path):
    draw, counts = random.Random(0), {"refused": 0, "the same": 0, "other text": 0}
    files = readers(tmp_path)
    expected = {file: read() for file, read in files.items()}
    for file, read in itertools.islice(itertools.cycle(files.items()), times(500)):
        content = file.read_bytes()
        changed = damaged(content, draw)
        file.write_bytes(changed)
        try:
            found = read()
        except (ValueError, OSError) as error:
            kind, text = "refused", str(error)
            assert text.strip() and "\n" not in text.strip() and file.parent.name in text, (file, text)
        else:
            kind = "the same" if equal(found, expected[file]) else "other text"
            assert kind == "the same" or file.name in UNSEALED, (file, changed[:200])
        counts[kind] += 1
        for aside in file.parent.glob("*.broken-*"):
            aside.unlink()
        file.write_bytes(content)
    record("damaged files", counts)


# ---- Malicious files -------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it touches a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_payloads(tmp_path):
    import pickle
    import zipfile

    sprung, draw, tried = tmp_path / "sprung", random.Random(0), 0
    settings, about = Settings(out=str(tmp_path)), {"images": 1, "fingerprint": "x"}
    names = ("checkpoint.pt", "checkpoint.prev.pt", "weights.ckpt", "weights.pth", "weights.bin", "model.safetensors",
             "images-00000.npy", "labels.npy")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"class": "UNet", **models.UNet(8, 1, **NET).config}))

    def read(file: Path) -> None:
        if file.suffix == ".npy":
            shards.open_array(file, (1,))
        elif file.name.startswith("checkpoint"):
            earlier.read_checkpoint(settings, tmp_path, about)
        elif file.suffix == ".safetensors":
            teachers.load(tmp_path)
        else:
            models.load_checkpoint(models.UNet(8, 1, **NET), file)

    for name in itertools.islice(itertools.cycle(names), times(300)):
        file, trap = tmp_path / name, Trap(sprung)
        content = draw.choice([trap, [trap], {"step": trap}, {"a": torch.zeros(1), "b": trap}])
        how = draw.choice(["pickle", "zip", "numpy", "torch", "legacy", "sealed"])
        if how == "pickle":
            file.write_bytes(pickle.dumps(content, protocol=draw.randrange(6)))
        elif how == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(content))
                archive.writestr("archive/version", "3\n")
        elif how == "numpy":
            with file.open("wb") as opened:
                np.save(opened, np.array([trap], dtype=object), allow_pickle=True)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=how != "legacy")
        if how == "sealed":
            disk.seal(file)
        with contextlib.suppress(ValueError, OSError):
            read(file)
            pytest.fail(f"{file} was read")
        assert not sprung.exists(), (name, how)
        for left in tmp_path.glob("*.pt*"):
            left.unlink()
        tried += 1
    record("payloads", f"{tried}, none was run")


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_finite():
    """Of magnitudes from 1e-30 to 1e9, flat, sparse, equal, in all settings; values and gradients."""
    generator, draw, done, n = torch.Generator().manual_seed(0), random.Random(0), 0, 100

    def outputs(shape: tuple) -> torch.Tensor:
        x = torch.randn(n, *shape, generator=generator)
        size = 10 ** (torch.rand(n, 1, 1, 1, generator=generator) * 39 - 30)
        offset = torch.randn(n, 1, 1, 1, generator=generator) * draw.choice([0, 0, 1, 1e9])
        x = draw.choice([x, x, x * 0, (x > 1).float()]) * size + offset
        return x.clamp(-1e9, 1e9)

    while done < times(100_000):
        shape = draw.choice([(1, 8, 8), (3, 16, 16), (4, 4, 4)])
        teacher = outputs(shape)
        student = (teacher.clone() if draw.random() < 0.1 else outputs(shape)).requires_grad_()
        how = {"norm": draw.choice(["l1", "l2"]), "reduction": draw.choice(["none", "sum", "mean"])}
        loss = draw.choice([place, lift, lift_place.place, lift_place.lift])(student, teacher, **how).loss
        loss.sum().backward()
        assert loss.isfinite().all() and student.grad.isfinite().all(), (how, shape)
        done += n
    record("losses", done)
