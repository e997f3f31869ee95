"""benchmarks/bench.py and its neighbours: that they run and say what they promise. Never a time."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refused

import lift_place
import models
from benchmarks import answers, bench, fold, head, peers, shares

PAGES = "\n".join(page.read_text("utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
TABLES = re.findall(r"<!-- bench\.py (\S+) (\w+) -->\n(.*?)\n\n", PAGES, re.DOTALL)
CPU = torch.device("cpu")
COLUMNS = {  # of every row of a section
    "loss": {"shape", "loss", "ms", "peak_MiB"},
    "step": {"what", "batch", "s"},
    "students": {"students", "s_per_step", "vs_n_runs"},
    "growth": {"what", "ms"},
    "sampling": {"network", "batch", "images_per_s", "gmacs", "macs_ratio", "speed_up"},
    "ways": {"what", "s", "speed_up", "first_s"},
    "overhead": {"what", "out_s", "place_s", "overhead_percent"},
}


def test_a_quick_run_prints_every_table_and_writes_all_numbers(tmp_path, capsys):
    sections = [name for name in bench.SECTIONS if name != "startup"]  # that one starts other processes
    path = tmp_path / "bench.json"
    assert bench.main(["--quick", "--device", "cpu", "--only", *sections, "--out", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert result["machine"].keys() >= {"processor", "cores", "threads", "gpu", "torch", "python"}
    assert not result["official"] and "--official" in printed
    assert list(result["sections"]) == sections
    assert bench.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    for name, section in result["sections"].items():
        assert f"\n{name}: {section['what']}" in printed
        assert all(row.keys() >= COLUMNS[name] for row in section["rows"])
        numbers = [value for row in section["rows"] for value in row.values() if not isinstance(value, str)]
        assert torch.tensor(numbers).isfinite().all()
    losses = [row["loss"] for row in result["sections"]["loss"]["rows"]]
    assert losses == ["mse", *(f"{kind}{how}" for how in ("", " (plain)", " (formula)") for kind in ("lift", "place"))]


def test_what_cannot_be_compared_with_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--quick", "--device", "cpu", "--official", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"bench.py: error: --official {tmp_path} is no clone")


@pytest.mark.parametrize(("file", "section", "written"), TABLES, ids=[section for _, section, _ in TABLES])
def test_the_tables_of_the_pages_are_those_of_the_committed_run(file, section, written):
    assert written == answers.table(json.loads((ROOT / file).read_text("utf-8"))["sections"][section]["rows"])


def test_the_command_finds_the_modules_of_the_repository(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/bench.py", "--show", ROOT / "benchmarks/cpu-loss.json"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert out.startswith("loss: Forward and backward of the losses alone")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show", "nowhere.json"], "bench.py: error: there is no file nowhere.json: name one that a benchmark wrote"),
        (["--show", "wrong.json"], "wrong.json is not what a benchmark writes"),
        (["--repeat", "-1"], "--repeat -1 cannot be used, it must be at least 1"),
        (["--threads", "0"], "--threads 0 cannot be used, it must be at least 1"),
        (["--quick", "--out", "."], "--out . is a folder: name a file in it"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text('{"sections": [1]}')
    assert words in refused(bench.main, arguments, capsys)


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert bench.exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_the_peak_counts_what_is_held_at_once():
    mib = 2**18  # float32

    def at_once():
        return [torch.ones(mib) for _ in range(4)]

    def one_after_the_other():
        for _ in range(4):
            torch.ones(mib)

    assert bench.peak_bytes(at_once, CPU) == pytest.approx(4 * 2**20, rel=0.01)
    assert bench.peak_bytes(one_after_the_other, CPU) == pytest.approx(2**20, rel=0.01)


@pytest.mark.parametrize("kind", ["lift", "place"])
def test_the_formula_is_the_loss_with_the_constants_of_the_release(kind):
    found = []
    for function in (
        bench.LOSSES[f"{kind} (formula)"],
        lambda s, t: getattr(lift_place, kind)(s, t, reduction="sum", ridge=0.0).loss,
    ):
        student, teacher = bench.outputs((2, 3, 16, 16), CPU)
        loss = function(student.double(), teacher.double())
        found.append([loss.detach(), *torch.autograd.grad(loss, student)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_time_limit_ends_the_turns_but_the_first():
    seen = []
    times = bench.seconds({"a": lambda: seen.append("a")}, 9, CPU, limit=0.0)
    assert seen == ["a", "a"] and len(times["a"]) == 1


def test_cases_take_turns_after_one_turn_to_warm_up():
    seen = []
    times = bench.seconds({name: lambda name=name: seen.append(name) for name in "abc"}, 2, CPU)
    assert "".join(seen) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


# ---- The studies beside it -------------------------------------------------------------------------------------------


def test_peers_have_our_weights_and_are_timed_in_small(tmp_path, capsys):
    for attention in ((), (8,)):
        torch.manual_seed(0)
        net = models.UNet(16, **{**bench.TINY, "attention_resolutions": attention}).eval()
        x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 700])
        for ours in (net, models.prune_channels(net, 0.5, "random")):
            with torch.no_grad():
                torch.testing.assert_close(peers.of_diffusers(ours.eval()).eval()(x_t, t).sample, ours(x_t, t))
    path = tmp_path / "peers.json"
    assert peers.main(["--quick", "--threads", "1", "--out", str(path)]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert [row["what"] for row in sections["unet_step"]["rows"]] == ["out", "out, diffusers"]
    assert all(section["rows"] and "error" not in section for section in sections.values())
    assert "ours_vs_this" in capsys.readouterr().out
    assert "is no clone of TinyFusion" in refused(peers.main, ["--quick", "--tinyfusion", str(tmp_path)], capsys)


def test_the_shares_of_a_run_add_up_in_small(tmp_path):
    path = tmp_path / "shares.json"
    assert shares.main(["--quick", "--threads", "1", "--out", str(path)]) == 0
    for section in json.loads(path.read_text())["sections"].values():
        assert sum(row["percent"] for row in section["rows"]) == pytest.approx(100)
        assert all(row["hours"] > 0 for row in section["rows"])


def test_the_studies_that_train_refuse_in_one_sentence_before_they_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "fold.py: error: --sample-steps 1 cannot be used" in refused(fold.main, ["5", "1"], capsys)
    assert "fold.py: error: steps few cannot be used, it must be a whole number" in refused(fold.main, ["few"], capsys)
    nowhere = ["out", "--dataset", "folder", "--data", "nowhere"]
    assert "head.py: error: there is no folder nowhere" in refused(head.main, nowhere, capsys)
    assert "--num 1 cannot be used" in refused(head.main, ["out", "--num", "1"], capsys)
    assert not [*tmp_path.iterdir()]
    folders = [fold.settings_of(5, end, clip=False).out for end in (None, "published", "last")]
    assert folders == [f"runs/fold/pruned{end}" for end in ("", "-fold-published-5", "-fold-last-5")]


READS = {"x_t": [0, 1, 2], "e": [0, 3, 4], "means": [0, 1, 3], "deviations": [0, 2, 4], "constants": [0]}


@pytest.mark.parametrize("variant", head.VARIANTS)
def test_a_variant_of_the_head_starts_as_the_identity_and_reads_its_statistics_alone(variant):
    torch.manual_seed(0)
    x_t, t = torch.randn(2, 2, 8, 8), torch.tensor([5, 700])
    plain = models.UNet(8, 2, **bench.TINY).eval()
    with head.heads(variant), torch.no_grad():
        net = copy.deepcopy(plain)
        net.set_head("statistics")
        output = plain(x_t, t)
        assert torch.equal(net(x_t, t), output)
        for p in net.head.parameters():
            p.copy_(torch.randn_like(p))
        changed = net(x_t, t) - output
        assert changed.abs().max() > 1e-3
        ours = torch.stack([torch.ones(64), output[0, 0].flatten()], dim=1)
        line = ours @ torch.linalg.lstsq(ours, changed[0, 0].flatten()[:, None]).solution  # (64, 1)
        rest = (changed[0, 0].flatten() - line[:, 0]).abs().max()
        assert (rest > 1e-4) == (variant == "time")  # all others add a line
    if variant != "time":
        net(x_t, t).square().sum().backward()
        moved = net.head.mlp[2].bias.grad.unflatten(0, (-1, 5, 2)).abs().sum((0, 2))  # (5,), by statistic
        assert moved.nonzero().flatten().tolist() == READS.get(variant, [0, 1, 2, 3, 4])
