"""Files that appear whole or not at all, say when they are damaged, and belong to one process at a time."""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import types

import numpy as np
import pytest

from distil import disk
from distil.disk import lock, need_room, whole, write_json


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
        disk.temporary(path).write_text("half")
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
    assert disk.seal_of(path) is None and not disk.check_seal(path, "")  # of an earlier version
    disk.seal(path)
    assert disk.check_seal(path, "") and (np.load(path) == np.arange(100)).all()
    before = path.read_bytes()
    assert disk.seal_of(path) == hashlib.sha256(before[:-72]).hexdigest()
    for i in range(0, len(before) - 8, 37):
        path.write_bytes(before[:i] + bytes([before[i] ^ 4]) + before[i + 1 :])
        if disk.seal_of(path):  # else the flip is in the word itself, and all before it is whole
            with pytest.raises(disk.Damaged, match=r"a.npy is damaged.*: fetch it$"):
                disk.check_seal(path, "fetch it")
        else:
            assert i >= len(before) - 72


def test_one_process_has_a_folder_and_a_dead_one_has_none(tmp_path):
    folder, (out, into) = tmp_path / "runs" / "a", os.pipe()
    child = os.fork()
    if child == 0:
        with disk.lock(folder):
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
    found = disk.read_json(path, "")
    assert math.isnan(found.pop("e")) and found == value
    for content in ("", "[]", "{", '{"a": NaN', "[" * 100_000, "\xff"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(disk.Damaged, match=r"a.json is damaged .*: remove it$"):
            disk.read_json(path, "remove it")


def test_room_is_asked_for_before_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2_000_000_000))
    need_room(tmp_path, 2_000_000_000, "the images")
    with pytest.raises(OSError, match=rf"^the images take 2.5 GB and {tmp_path} has room for 2.0 GB: make room there$"):
        need_room(tmp_path, 2_500_000_000, "the images")


def a_record(step: int) -> dict:
    return {"step": step, "student": "place-0", "method": "place", "seed": 0, "loss": 0.5 + step}


def test_the_log_grows_line_by_line_and_forgets_what_will_come_again(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with disk.open_log(tmp_path, 0, "jsonl", {}) as log:
        for step in range(4):
            log(a_record(step))
            assert json.loads(path.read_text().splitlines()[-1]) == a_record(step)  # nothing is held back
    content = path.read_bytes().replace(b'"step": 1', b'"st\xffp": 1')  # a damaged byte
    path.write_bytes(content + b'{"step": 4, "stu')  # a kill
    with disk.open_log(tmp_path, 2, "jsonl", {}) as log:
        log(a_record(2))
    assert "log.jsonl: 2 of 5 lines cannot be read and are dropped" in capsys.readouterr().err
    assert [json.loads(line) for line in path.read_text().splitlines()] == [a_record(step) for step in (0, 2)]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_log_also_goes_to(kind, tmp_path, monkeypatch):
    library, told = types.ModuleType(kind), []
    run = types.SimpleNamespace(log=lambda line, step: told.append((line, step)), finish=lambda: told.append("end"))
    library.init = lambda **about: told.append(about) or run
    monkeypatch.setitem(sys.modules, kind, library)
    with disk.open_log(tmp_path, 0, kind, {"lr": 1}) as log:
        log(a_record(2))
    assert told == [
        {"project": "lift-place", "name": tmp_path.name, "config": {"lr": 1}},
        ({"place-0/loss": 2.5}, 2),
        "end",
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == a_record(2)
