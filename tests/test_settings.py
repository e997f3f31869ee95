"""The command line: presets of the published rows, names, and that it is answered without torch."""

import dataclasses
import subprocess
import sys

import pytest
from conftest import ROOT

import lift_place
from distil import command, data, evaluate, networks, presets, process, settings, students
from distil.presets import PRESETS, preset
from distil.settings import Settings, parse, plain

# ---- Presets ---------------------------------------------------------------------------------------------------------

PIXELS = {
    "arch": "unet", "importance": "taylor", "norm_groups": "keep", "constants": "diff-pruning",
    "lambda_diff": 1, "lambda_out": 1, "lambda_feat": 1e-6, "group_size": 16, "sample_steps": 100, "teacher": "auto",
}  # fmt: skip
CELEBA = PIXELS | {"image_size": 64, "lr": 2e-4, "clip": 1, "ema": 0.9999, "dropout": 0.1, "batch_size": 96}
CELEBA |= {"taylor_threshold": 0}
BEDROOM = PIXELS | {"image_size": 256, "lr": 2e-5, "clip": 0, "ema": 0.999, "dropout": 0, "batch_size": 16}
BEDROOM |= {"taylor_threshold": 0.01}  # that of its scripts, which give none
TEXT = {"arch": "sd", "process": "sd", "constants": "bk-sdm", "steps": 50_000, "lr": 5e-5, "batch_size": 128}
TEXT |= {
    "ema_warmup": True,
    "timesteps": "uniform",
    "sampler": "pndm",
    "lambda_diff": 1,
    "lambda_out": 1,
    "lambda_feat": 1,
    "caption_dropout": 0.1,
    "weight_decay": 1e-2,
}
IMAGENET = {
    "arch": "dit", "steps": 500_000, "batch_size": 256, "lr": 2e-4, "lr_end": 1e-4, "decay": "cosine", "clip": 1,
    "ema": 0.9999, "lambda_diff": 0.1, "lambda_out": 0.9, "lambda_feat": 1e-2, "feat_stages": 100, "group_size": 16,
    "constants": "tinyfusion", "depth_method": "learned", "sample_steps": 250, "eta": 1, "spacing": "linspace",
    "guidance": 1.5, "image_size": 256, "teacher": "auto",
}  # fmt: skip
FOLD = {"steps": 10_000, "batch_size": 50, "lr": 2e-4, "ema": 0, "init": "random", "sample_steps": 125}
FOLD |= {"lambda_diff": 0, "lambda_out": 1, "lambda_hidden": 1, "dropout": 0, "clip": 0, "flip": False}
DIGITS = {"steps": 1500, "norm_groups": "keep", "init": "teacher", "lambda_diff": 1, "lambda_feat": 1e-6, "clip": 1}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--dataset celeba --prune 0.5", CELEBA | {"steps": 200_000}),  # Table 1
        ("--dataset celeba --prune 0.7", CELEBA | {"steps": 240_000}),
        ("--dataset celeba --prune 0.9", CELEBA | {"steps": 500_000}),
        ("--dataset lsun_bedroom --prune 0.3", BEDROOM | {"steps": 200_000}),
        ("--dataset lsun_bedroom --prune 0.5", BEDROOM | {"steps": 500_000}),
        ("--dataset lsun_bedroom --prune 0.7", BEDROOM | {"steps": 700_000}),
        ("--dataset latents --arch sd --student base", TEXT | {"out": "runs/latents-sd-base-place"}),  # Table 2
        ("--dataset latents --arch mmdit", TEXT | {"arch": "mmdit", "process": "sd3", "constants": "tinyfusion",
                                                   "sampler": "ddim",
                                                   "lambda_diff": 0.1, "lambda_out": 0.9, "lambda_feat": 1e-2}),
        *((f"--dataset imagenet --prune {prune}", IMAGENET) for prune in (0.5, 0.75, 0.857)),  # Table 3
        ("--dataset cifar10 --prune 0 --fold-steps 125 --kd out", FOLD),  # SFDDM
        ("", DIGITS | {"out": "runs/digits8-prune0.9-place", "fold_steps": None, "eta": 0}),
        ("--fold-steps 5 --kd out", {"init": "teacher", "lambda_diff": 0, "sample_steps": 5, "steps": 1500}),
        ("--fold-steps 5 --kd out", {"fold_end": "published", "out": "runs/digits8-prune0.9-out-fold_steps5"}),
        ("--fold-steps 0,40,999 --kd out", {"fold_end": None, "sample_steps": 3, "fold_steps": [0, 40, 999]}),
        ("--arch dit --process flow", {"eta": 0, "out": "runs/digits8-dit-prune0.9-place-process=flow"}),
        ("--arch dit --keep 0,3,7 --kd none out", {"eta": 1, "out": "runs/digits8-dit-keep0.3.7-none-out"}),
        ("--data x --seeds 0 1", {"out": "runs/folder-prune0.9-place-2seeds-data=x-importance=random"}),
        ("--data x", {"norm_groups": "scale", "clip_x0": True}),  # what serves people's own images
        ("--data x --norm-groups keep --no-clip-x0", {"norm_groups": "keep", "clip_x0": False}),
        ("--data x --process flow", {"clip_x0": False}),
        ("--dataset cifar10", {"spacing": "quad", "taylor_batch": 128, "taylor_threshold": 0.05}),
        ("--dataset cifar10 --fold-steps 5", {"spacing": "leading"}),
        ("--data x --student y", {"norm_groups": "keep"}),
        ("--dataset celeba --prune 0.6", {"steps": 240_000}),  # between two ratios: the next
        ("--dataset celeba --prune 0.95", {"steps": 500_000}),  # above all: the last
    ],
)  # fmt: skip
def test_a_command_line_resolves_to_the_published_settings(arguments, expected):
    seeds = ["--importance", "random"] * ("--seeds" in arguments)
    shown = plain(parse([*arguments.split(), *seeds]))
    assert {name: shown[name] for name in expected} == expected
    unknown = {"image_size", *presets.OPEN} if shown["dataset"] in presets.SIZES else {"image_size"}
    assert None not in {shown[name] for name in set(PRESETS[0]) & shown.keys() - unknown}


def test_a_threshold_that_nothing_read_belongs_to_no_run():
    former = plain(Settings(dataset="cifar10", importance="magnitude")) | {"taylor_threshold": 0.0}
    assert settings.restored(former).taylor_threshold == 0.05


def test_a_run_is_named_by_what_differs_from_the_preset():
    given = {
        "": "", "--seeds 1 2": "-seeds1.2", "--lr 0.01 --norm-groups scale": "-norm_groups=scale-lr0.01",
        "--teacher runs/a/student": "-teacher=a.student", "--teacher /x.pth --compile": "-teacher=x",
        "--eval-samples 9 --save-every 9 --log tensorboard": "",  # these change no weights
    }  # fmt: skip
    named = {arguments: parse(arguments.split()).out for arguments in given}
    assert named == {arguments: f"runs/digits8-prune0.9-place{tail}" for arguments, tail in given.items()}
    assert parse(["--student", "../a"]).out == "runs/digits8-a-place" and parse(["--data", "."]).out[-5:] == "data="
    names = "lr warmup clip lambda-diff lambda-out lambda-feat steps batch-size channels teacher-steps teacher-lr seed"
    many = [word for name in names.split() for word in (f"--{name}", "17")]
    long = [parse([*many, "--weight-decay", decay]).out for decay in ("1", "2")]
    assert long[0] != long[1] and max(map(len, long)) < 160


def test_all_presets_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--list-presets"])
    table, notes = capsys.readouterr().out.split("\n\n")
    head, *lines = table.splitlines()
    assert "A line is for every --prune up to its own, the last one of a data set for all above" in notes
    assert stop.value.code == 0 and len(lines) == len(PRESETS) and len({len(line) for line in (head, *lines)}) == 1
    assert "lambda_feat" in head and lines[5].split()[:4] == ["celeba", "unet", "0.9", "500000"]


def test_the_names_here_are_those_of_the_other_files():
    assert set(presets.CONSTANTS) == set(lift_place.PRESETS) == set(students.FEATURES)
    for name, (kind, _) in presets.PROCESSES.items():
        assert isinstance(process.make_process(name), process.DDPM if kind == "ddpm" else process.RectifiedFlow)
    assert {*networks.NEW} < {*presets.ARCHS} == {row["arch"] for row in PRESETS}
    assert {row["dataset"] for row in PRESETS} == set(data.DATASETS)
    for row in PRESETS:
        _, image_size, *_ = data.DATASETS[row["dataset"]]
        assert row.get("image_size") in (image_size, None)
        assert PRESETS[0].keys() - {"image_size"} <= row.keys() <= {*Settings.__dataclass_fields__, "network"}
    for name in presets.PRECISIONS:
        assert students.find_dtype(Settings(precision=name), students.torch.device("cpu")).is_floating_point
    assert {*settings.FREE, *settings.EVALUATION} <= Settings.__dataclass_fields__.keys()
    assert Settings.__dataclass_fields__.keys() >= evaluate.SAME


def test_help_is_grouped_by_what_people_want_to_say(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    titles = [text.index(f"\n{title}:\n") for title in settings.GROUPS.values()]
    assert titles == sorted(titles) and list(settings.GROUPS) == [
        n for n in Settings.__dataclass_fields__ if n in settings.GROUPS
    ]
    flags = [text.index(f"\n  {command.flag(name)} ") for name in settings.GROUPS]  # each right below its title
    assert all(title < flag < title + 200 for title, flag in zip(titles, flags, strict=True))


# ---- The parser ------------------------------------------------------------------------------------------------------


def test_the_command_line_is_read_without_torch():
    """In one process each: --help, --list-presets and a mistake of train.py, as a user starts it."""
    watch = f"import atexit, runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
    watch += "atexit.register(lambda: print('\\n', {'torch', 'numpy', 'tqdm'} & sys.modules.keys()))\n"
    watch += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    for argument, code, words in (
        ("--help", 0, "Distil a pruned diffusion student"),
        ("--list-presets", 0, "lambda_out"),
        ("--kd=plaice", 2, ""),
    ):
        done = subprocess.run([sys.executable, "-c", watch, argument], capture_output=True, text=True, check=False)
        assert done.returncode == code and words in done.stdout and done.stdout.splitlines()[-1] == " set()"
    assert done.stderr.startswith("train.py: error: --kd plaice is not known") and done.stderr.count("\n") == 1


def test_settings_survive_json_and_cannot_be_changed():
    given = parse(["--arch", "dit", "--keep", "0,2", "--kd", "none", "place", "--lr", "0.1"])
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in plain(given).items()}
    assert Settings(**lists) == given and plain(given)["keep"] == [0, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.lr = 1.0


def test_what_settings_say_of_themselves():
    folded = Settings(fold_steps=5, kd=("out",))
    assert (folded.usual_steps, folded.sample_steps, Settings(sample_steps=7).usual_steps) == (50, 5, 7)
    assert (folded.terms("out"), folded.terms("feat")) == (("absolute", True), None)
    assert Settings().terms("out") == ("squared", False) and Settings().terms("place") == ("place", True)
    assert Settings(process="sd3").is_flow and not Settings(process="sd-v").is_flow
    assert preset("digits", 0.9)["arch"] == "unet" and preset("latents", 0.5, "sd")["process"] == "sd"
