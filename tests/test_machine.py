"""Processes, devices, seeds, and files that appear whole or not at all."""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_ports

from distil import machine
from distil.machine import find_device, hash_seed, lock, need_room, refusing, whole, write_json

# ---- Processes and devices -------------------------------------------------------------------------------------------


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    x = torch.arange(3.0)
    with machine.processes("auto"), machine.rank_0_first():
        assert machine.rank_and_world() == (0, 1) and machine.mean_over_ranks(x) is x


def test_a_process_whose_partner_was_killed_says_so_in_one_sentence(tmp_path):
    program = """
import os, signal, torch
from distil import machine
with machine.processes("cpu"):
    machine.mean_over_ranks(torch.ones(2))
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    machine.mean_over_ranks(torch.ones(2))
"""
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    first, second = (
        subprocess.Popen([sys.executable, "-c", program], env={**env, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )
    said = first.communicate(timeout=100)[1]
    second.communicate(timeout=100)
    assert first.returncode == 1 and "Traceback" not in said, said
    assert "process 0 stops, for another one has ended; the same command goes on from what is saved" in said


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


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_are_those_of_earlier_runs_and_near_ones_differ():
    assert [hash_seed(0), hash_seed(0, 1)] == [20281953224300287, 60933004782367880]
    assert hash_seed(3, 7, 0, 2) == 9278909671385738
    drawn = {hash_seed(a, b) for a in range(30) for b in range(30)}
    assert len(drawn) == 900 and max(drawn) < 2**56 and hash_seed(1, 23) != hash_seed(12, 3)


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


def test_a_full_disk_and_what_dead_processes_left(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    child = os.fork()
    if child == 0:
        machine.temporary(path).write_text("half")
        os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / ".a.txt.elsewhere-1.part").write_text("of another machine")
    (tmp_path / f".a.txt.{platform.node()}-{os.getppid()}.part").write_text("of a living process")
    assert len([*tmp_path.iterdir()]) == 3
    write_json(path, {})
    assert len([*tmp_path.iterdir()]) == 3 and path.exists()
    full = r"a.txt cannot be written: the disk is full after 4 bytes of it, [\d,]+ are free"
    with pytest.raises(OSError, match=full), whole(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "{}\n"


def test_a_sealed_file_says_when_a_bit_has_changed(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100))
    assert machine.seal_of(path) is None and not machine.check_seal(path, "")  # of an earlier version
    machine.seal(path)
    assert machine.check_seal(path, "") and (np.load(path) == np.arange(100)).all()
    before = path.read_bytes()
    assert machine.seal_of(path) == hashlib.sha256(before[:-72]).hexdigest()
    for i in range(0, len(before) - 8, 37):
        path.write_bytes(before[:i] + bytes([before[i] ^ 4]) + before[i + 1 :])
        if machine.seal_of(path):  # else the flip is in the word itself, and all before it is whole
            with pytest.raises(machine.Damaged, match=r"a.npy is damaged.*: fetch it$"):
                machine.check_seal(path, "fetch it")
        else:
            assert i >= len(before) - 72


def test_one_process_has_a_folder_and_a_dead_one_has_none(tmp_path):
    folder, (out, into) = tmp_path / "runs" / "a", os.pipe()
    child = os.fork()
    if child == 0:
        with machine.lock(folder):
            os.write(into, b"x")
            signal.pause()
    os.read(out, 1)
    for _ in range(2):
        with pytest.raises(OSError, match=rf"{folder} is in use by process {child} on .*: wait$"), lock(folder, "wait"):
            pass
    threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
    with lock(folder):  # waits
        assert os.waitpid(child, 0)[1] == signal.SIGKILL and [*folder.iterdir()] == [folder / ".lock"]
    assert folder.exists()  # it was there before
    with lock(tmp_path / "new" / "deep"):
        pass
    assert not (tmp_path / "new").exists()
    with lock(tmp_path / "kept"):
        (tmp_path / "kept" / "file").write_text("")
    assert [*(tmp_path / "kept").iterdir()] == [tmp_path / "kept" / "file"]


def test_json_is_standard_and_comes_back(tmp_path):
    path, value = tmp_path / "a.json", {"a": [1.5, None, {"b": math.inf}], "c": -math.inf, "d": "word"}
    write_json(path, value | {"e": math.nan})
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = machine.read_json(path, "")
    assert math.isnan(found.pop("e")) and found == value
    for content in ("", "[]", "{", '{"a": NaN', "[" * 100_000, "\xff"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(machine.Damaged, match=r"a.json is damaged .*: remove it$"):
            machine.read_json(path, "remove it")


def test_room_is_asked_for_before_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2_000_000_000))
    need_room(tmp_path, 2_000_000_000, "the images")
    with pytest.raises(OSError, match=rf"^the images take 2.5 GB and {tmp_path} has room for 2.0 GB: make room there$"):
        need_room(tmp_path, 2_500_000_000, "the images")


def a_record(step: int) -> dict:
    return {"step": step, "student": "place-0", "method": "place", "seed": 0, "loss": 0.5 + step}


def test_the_log_grows_line_by_line_and_forgets_what_will_come_again(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with machine.open_log(tmp_path, 0, "jsonl", {}) as log:
        for step in range(4):
            log(a_record(step))
            assert json.loads(path.read_text().splitlines()[-1]) == a_record(step)  # nothing is held back
    content = path.read_bytes().replace(b'"step": 1', b'"st\xffp": 1')  # a damaged byte
    path.write_bytes(content + b'{"step": 4, "stu')  # a kill
    with machine.open_log(tmp_path, 2, "jsonl", {}) as log:
        log(a_record(2))
    assert "log.jsonl: 2 of 5 lines cannot be read and are dropped" in capsys.readouterr().err
    assert [json.loads(line) for line in path.read_text().splitlines()] == [a_record(step) for step in (0, 2)]


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
            assert stop.number == 0
            os.kill(os.getpid(), number)
            assert stop.agreed(torch.device("cpu")) == number
        assert signal.getsignal(number) is former
    with machine.Stop() as stop:
        inside = threading.Thread(target=lambda: machine.Stop().__enter__().__exit__())
        inside.start()  # another thread may not touch signals, and does not
        inside.join()
        assert signal.getsignal(signal.SIGINT) == stop.ask


def test_a_second_signal_ends_a_process_that_answers_none(capfd):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        with machine.Stop():
            os.write(into, b"x")
            while True:
                time.sleep(0.01)
    os.read(out, 1)
    for pause in (0.1, 1.2):  # what comes within a second is the same
        os.kill(child, signal.SIGINT)
        time.sleep(pause)
    assert "stopping after this step; once more to stop now" in capfd.readouterr().out
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
