"""Processes, devices, seeds, and files that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from distil import machine
from distil.machine import find_device, fingerprint, hash_seed, need_room, refusing, whole, write_json

# ---- Processes and devices -------------------------------------------------------------------------------------------


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    x = torch.arange(3.0)
    with machine.processes("auto"), machine.rank_0_first():
        assert machine.rank_and_world() == (0, 1) and machine.mean_over_ranks(x) is x


def test_a_device_is_found_or_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == find_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps", "cuda:0", "tpu"):
        with pytest.raises(ValueError, match=rf"--device {name} is not on this machine: choose from auto, cpu$"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun
    assert find_device("auto") == find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"choose from auto, cpu, cuda:0, cuda:1$"):
        find_device("cuda:2")
    net = torch.nn.Conv2d(3, 4, 3)
    assert machine.on_device(net, torch.device("cpu")) is net and net.weight.is_contiguous()


def test_what_the_seconds_of_a_run_depend_on():
    found = json.loads(json.dumps(machine.describe()))
    assert found.keys() == {"processor", "cores", "threads", "gpu", "torch", "python"}
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__ and found["processor"]


# ---- Seeds and fingerprints ------------------------------------------------------------------------------------------


def test_seeds_are_those_of_earlier_runs_and_near_ones_differ():
    assert [hash_seed(0), hash_seed(0, 1)] == [20281953224300287, 60933004782367880]
    assert hash_seed(3, 7, 0, 2) == 9278909671385738
    drawn = {hash_seed(a, b) for a in range(30) for b in range(30)}
    assert len(drawn) == 900 and max(drawn) < 2**56 and hash_seed(1, 23) != hash_seed(12, 3)


def test_a_fingerprint_changes_with_any_bit():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2]), torch.ones(3, dtype=torch.bfloat16)]
    digest = hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in tensors)).hexdigest()
    assert fingerprint(tensors) == fingerprint(iter(tensors)) == digest[:16]
    assert fingerprint([tensors[0].T.contiguous().T, *tensors[1:]]) == digest[:16]  # not with the memory layout
    for i in range(3):
        changed = [x.clone() for x in tensors]
        changed[i].view(torch.uint8).view(-1)[-1] ^= 1
        assert fingerprint(changed) != digest[:16]


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path) as part:
        part.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(RuntimeError), whole(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    child = os.fork()
    if child == 0:  # SIGKILL in the middle of a write: no chance to tidy up
        with whole(path) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and path.read_text() == "old"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]} and path.read_text().endswith("}\n")


def test_room_is_asked_for_before_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2_000_000_000))
    need_room(tmp_path, 2_000_000_000, "the images")
    with pytest.raises(OSError, match=rf"^the images take 2.5 GB and {tmp_path} has room for 2.0 GB: make room there$"):
        need_room(tmp_path, 2_500_000_000, "the images")


def a_record(step: int) -> dict:
    return {"step": step, "student": "place-0", "method": "place", "seed": 0, "loss": 0.5 + step}


def test_the_log_grows_line_by_line_and_forgets_what_will_come_again(tmp_path):
    path = tmp_path / "log.jsonl"
    with machine.open_log(tmp_path, 0, "jsonl", {}) as log:
        for step in range(4):
            log(a_record(step))
            assert json.loads(path.read_text().splitlines()[-1]) == a_record(step)  # nothing is held back
    with path.open("a") as file:
        file.write('{"step": 4, "stu')  # a kill
    with machine.open_log(tmp_path, 2, "jsonl", {}) as log:
        log(a_record(2))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [a_record(step) for step in range(3)]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_log_also_goes_to(kind, tmp_path, monkeypatch):
    library, told = types.ModuleType(kind), []
    run = types.SimpleNamespace(log=lambda line, step: told.append((line, step)), finish=lambda: told.append("end"))
    library.init = lambda **about: told.append(about) or run
    monkeypatch.setitem(sys.modules, kind, library)
    with machine.open_log(tmp_path, 0, kind, {"lr": 1}) as log:
        log(a_record(2))
    assert told == [
        {"project": "lift-place", "name": tmp_path.name, "config": {"lr": 1}},
        ({"place-0/loss": 2.5}, 2),
        "end",
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == a_record(2)


def test_a_progress_bar_that_no_terminal_shows_is_a_line_every_ten_seconds(capsys):
    for _ in machine.progress_bar(range(500), desc="steps"):
        pass
    err = capsys.readouterr().err
    assert "\r" not in err and 1 <= err.count("\n") <= 2 and err.endswith("\n") and "steps: 100%" in err


# ---- Words to the user -----------------------------------------------------------------------------------------------


def test_what_a_user_gave_is_refused_in_one_sentence_and_the_rest_keeps_its_traceback(capsys):
    for error in (ValueError("no"), FileNotFoundError("no"), ImportError("no")):
        with pytest.raises(SystemExit) as stop, refusing("prog"):
            raise error
        assert stop.value.code == 2 and capsys.readouterr() == ("", "prog: error: no\n")
    with pytest.raises(ZeroDivisionError), refusing("prog"):
        raise ZeroDivisionError
    machine.say("to all")
    machine.note("to the user")
    assert capsys.readouterr() == ("to all\n", "to the user\n")


def test_an_optional_library_says_how_it_is_installed(tmp_path, monkeypatch):
    assert machine.library("json", "this", "json") is json
    absent, broken = "nowhere_to_be", "broken_inside"
    with pytest.raises(ImportError, match=r"^this needs nowhere_to_be: pip install it-is$"):
        machine.library(absent, "this", "it-is")
    Path(tmp_path / "broken_inside.py").write_text("import nowhere_to_be")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^No module named 'nowhere_to_be'$"):  # what is missing is another
        machine.library(broken, "this", "it-is")


def test_signals_are_only_noted_inside_the_block():
    for number in (signal.SIGINT, signal.SIGTERM):
        former = signal.getsignal(number)
        with machine.Stop() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
        assert signal.getsignal(number) is former
    with machine.Stop() as stop:
        inside = threading.Thread(target=lambda: machine.Stop().__enter__().__exit__())
        inside.start()  # another thread may not touch signals, and does not
        inside.join()
        assert signal.getsignal(signal.SIGINT) == stop.ask
