"""Processes, devices, seeds, signals, and what is said to the user."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import free_ports

from distil import machine
from distil.machine import find_device, hash_seed, refusing

# ---- Processes and devices -------------------------------------------------------------------------------------------


def test_one_process_needs_no_others(monkeypatch):
    x = torch.arange(3.0)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("WORLD_SIZE", "RANK"):  # some clusters set these, and torchrun all of its words
        with machine.processes("auto"), machine.rank_0_first():
            assert machine.rank_and_world() == (0, 1) and machine.mean_over_ranks(x) is x
        monkeypatch.setenv(name, "2")
    assert machine.launched() is None


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


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SystemExit(2), 2, ""),
        (SystemExit("a sentence"), 1, "a sentence\n"),
        (SystemExit(None), 0, ""),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt\n"),
        (ValueError("why"), 1, "ValueError: why\n"),
    ],
)
def test_a_process_with_a_gpu_leaves_at_once_and_says_why(error, code, said, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    machine.leave(error)
    assert codes == [code] and capsys.readouterr().err.endswith(said)


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
    assert find_device("auto") == find_device("cuda") == torch.device("cuda:0")  # set_device wants the 0
    assert torch.cuda._utils._get_device_index(find_device("auto")) == 0  # as torch.cuda.set_device asks
    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun
    assert find_device("auto") == find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"choose from auto, cpu, cuda:0, cuda:1$"):
        find_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 has no GPU of its own: start 2 on this machine, --nproc-per-node"):
        find_device("auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match=f"--device {name} is one device, and torchrun has started several"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")  # gloo does not serve Apple's GPU
    net = torch.nn.Conv2d(3, 4, 3)
    assert machine.on_device(net, torch.device("cpu")) is net and net.weight.is_contiguous()


def test_more_processes_than_gpus_are_one_sentence(monkeypatch, capsys):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **where}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop, machine.processes("auto"):
        pytest.fail("it has no GPU")
    assert (
        stop.value.code == 2 and "torchrun: error: process 1 has no GPU of its own: start 1" in capsys.readouterr().err
    )


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


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt. Whoever is started with & by a script inherits that it is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_signals_are_only_noted_inside_the_block(ctrl_c):
    for number in (signal.SIGINT, signal.SIGTERM):
        former = signal.getsignal(number)
        with machine.Stop() as stop:
            assert stop.number == 0
            os.kill(os.getpid(), number)
            assert stop.agreed(torch.device("cpu")) == number
        assert signal.getsignal(number) is former
    with machine.Stop() as stop:
        inside = threading.Thread(target=lambda: machine.Stop().__enter__().__exit__(None))
        inside.start()  # another thread may not touch signals, and does not
        inside.join()
        assert signal.getsignal(signal.SIGINT) == stop.ask
    with pytest.raises(KeyboardInterrupt), machine.Stop():  # nobody asks any more: it is not lost
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_a_process_that_answers_none():
    program = "import time\nfrom distil import machine\nwith machine.Stop():\n    print('in', flush=True)\n"
    program += "    while True:\n        time.sleep(0.01)\n"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)  # what comes within a second is the same
        said = [child.stdout.readline() for _ in range(2)]
        assert said == ["\n", "stopping after this step; once more to stop now\n"]
        time.sleep(1.2)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        child.kill()
