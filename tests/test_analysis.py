"""notebooks/analysis.py: its lines are those of the loss, its sampler the process's, its students those of train.py."""

import json

import matplotlib
import pytest
import torch

import train
from distil import data, report
from distil.fast_loss import place
from distil.networks import teacher_settings
from distil.prepare import prepare
from distil.process import DDPM, RectifiedFlow
from distil.settings import Settings
from lift_place import PRESETS, lift
from models import DiT, UNet, load
from notebooks import analysis

matplotlib.use("Agg")
KINDS = {"ddpm": DDPM(), "flow": RectifiedFlow(), "v": DDPM(prediction="v"), "folded": DDPM(clip_x0=True).fold(20)}
PROCESSES = pytest.mark.parametrize("process", KINDS.values(), ids=KINDS)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 2, 4, 8, generator=generator)
    return 0.7 * teacher + 0.2 + 0.3 * torch.randn(teacher.shape, generator=generator), teacher


@pytest.fixture
def nets():
    torch.manual_seed(0)
    build = {"in_channels": 1, "channels": 8, "channel_mults": (1,), "num_res_blocks": 1, "norm_groups": 4}
    return [UNet(8, **build).eval().requires_grad_(False) for _ in range(2)]


def test_lines_leave_the_residual_that_the_losses_report(pair):
    student, teacher = pair
    one, several = torch.zeros(student.shape, dtype=torch.int64), analysis.group_numbers(student, teacher, 8)
    for parts, groups in ((lift(student, teacher), one), (place(student, teacher, group_size=8), several)):
        left = (teacher - analysis.apply_lines(student, parts, groups)).square().mean()
        torch.testing.assert_close(left, parts.fine, rtol=1e-4, atol=1e-7)


def test_groups_are_of_one_size_and_in_order_of_growing_error(pair):
    student, teacher = pair
    groups, error = analysis.group_numbers(student, teacher, 8), (teacher - student).abs()
    assert groups.unique(return_counts=True)[1].tolist() == [3 * 2 * 8] * 4
    for g in range(3):
        assert error[1, 0][groups[1, 0] == g].max() <= error[1, 0][groups[1, 0] == g + 1].min()


@PROCESSES
def test_a_sampling_path_ends_where_the_sampler_does(nets, process):
    noise = torch.randn(2, 1, 8, 8)
    path = analysis.sampling_path(nets[0], process, noise, 5)
    assert path.states.shape == (6, 2, 1, 8, 8) and path.outputs.shape == (5, 2, 1, 8, 8)
    assert torch.equal(path.states[-1], process.sample(nets[0], noise.shape, 5, noise=noise))


@PROCESSES
def test_a_student_that_is_a_line_away_is_corrected_to_the_teacher(nets, process):
    noise, teacher = torch.randn(2, 1, 8, 8), nets[0]

    def student(x, t, cond=None):
        return 0.5 * teacher(x, t) - 0.1

    path = analysis.sampling_path(teacher, process, noise, 5)
    wrong = process.sample(student, noise.shape, 5, noise=noise)
    assert (wrong - path.states[-1]).abs().max() > 0.1
    for options in ({}, {"teacher": teacher}, {"group_size": 16}):
        right, *_ = analysis.corrected_path(student, process, path, **options)
        torch.testing.assert_close(right, path.states[-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("process", [DDPM(), RectifiedFlow()], ids=["ddpm", "flow"])
def test_all_of_it_goes_for_transformers_that_are_told_the_class(process):
    """Of DDPM's they predict a variance, too, which no line and no map is about."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "learn_sigma": process.whole_t}
    student, teacher = (DiT(8, 2, 1, **size).eval().requires_grad_(False) for _ in range(2))
    for net in (student, teacher):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)  # with adaLN-Zero it would predict nothing
    noise, x0, cond = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8), {"y": torch.tensor([0, 2])}
    path = analysis.sampling_path(teacher, process, noise, 4, cond)
    assert torch.equal(path.states[-1], process.sample(teacher, noise.shape, 4, cond, noise=noise))
    assert path.outputs.shape == (4, 2, 1, 8, 8) and path.times[-1] == process.clean
    own = analysis.corrected_path(teacher, process, path, cond=cond)[0]
    torch.testing.assert_close(own, path.states[-1], rtol=1e-3, atol=1e-3)  # it has nothing to correct
    far = (process.sample(student, noise.shape, 4, cond, noise=noise) - path.states[-1]).square().mean()
    near = (analysis.corrected_path(student, process, path, cond=cond)[0] - path.states[-1]).square().mean()
    assert near < far
    times = [100, 900]
    maps = analysis.error_maps(student, teacher, process, x0, times, cond=cond)
    assert maps.shape == (2, 2, 8, 8) and maps.isfinite().all()
    found = analysis.error_by_timestep(student, teacher, process, x0, times, cond)
    torch.testing.assert_close(maps.mean((1, 2, 3)), found["total"])
    other = analysis.error_maps(student, teacher, process, x0, times, cond={"y": torch.tensor([1, 1])})
    assert not torch.allclose(maps, other)


def test_the_error_by_timestep_adds_up(nets):
    x0 = torch.randn(4, 1, 8, 8)
    found = analysis.error_by_timestep(*nets, DDPM(), x0, [0, 500])
    student, teacher = analysis.outputs_at(nets, DDPM(), x0, 500)
    assert found["total"][1] == pytest.approx((teacher - student).square().mean().item())
    mean = (teacher - student).mean((2, 3)).square()
    slope = lift(student, teacher).b1[..., 0] - 1
    coarse = (mean + slope.square() * student.var((2, 3), correction=0)).mean()
    assert found["coarse"][1].item() == pytest.approx(coarse.item(), rel=1e-3)
    line = lift(student, teacher)
    assert found["b0_abs"][1].item() == pytest.approx(line.b0.abs().mean().item())
    assert found["b1_abs"][1].item() == pytest.approx((line.b1 - 1).abs().mean().item())
    maps = analysis.error_maps(*nets, DDPM(), x0, [0, 500])
    torch.testing.assert_close(maps.mean((1, 2, 3)), found["total"])
    fold = DDPM().fold(20)  # whose teacher is asked at times of its own
    maps = analysis.error_maps(*nets, fold, x0, [0, 7])
    torch.testing.assert_close(maps.mean((1, 2, 3)), analysis.error_by_timestep(*nets, fold, x0, [0, 7])["total"])
    maps = analysis.error_maps(*nets, DDPM(), x0, [0, 500])
    student, teacher = analysis.outputs_at(nets, DDPM(), x0, 500, seed=1)
    both = analysis.error_maps(*nets, DDPM(), x0, [0, 500], draws=2)
    torch.testing.assert_close(both[1], (maps[1] + (teacher - student).square().mean(1)) / 2)


def test_share_of_the_worst_and_rank_correlation():
    flat, peak = torch.ones(10, 10), torch.zeros(10, 10)
    peak[3, 4] = 1
    assert analysis.share_of_worst(torch.stack([flat, peak])).tolist() == pytest.approx([0.1, 1.0])
    ramp = torch.arange(64.0).view(1, 1, 8, 8)
    maps = torch.cat([ramp, ramp.exp().clamp(max=1e30) + ramp, -ramp])  # (3, 1, 8, 8)
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(analysis.rank_correlation(maps).float(), expected)


def test_a_student_of_ones_own_loss_is_that_of_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "curves", lambda *_: None)  # would take longer than training
    common = {"steps": 3, "seeds": (0, 1), "lambda_feat": 0.0, "eval_samples": 0, "channels": 8, "teacher_steps": 2}
    common |= {"schedule": "linear"}
    settings = Settings(kd=("out", "place"), out="theirs", **common)
    train.distil(prepare(settings))
    teacher, images = load(f"{teacher_settings(settings).out}/teacher"), data.load("digits")
    losses = {
        "out": lambda e_s, e_t, step: analysis.sum_of_squares(e_s, e_t),
        "place": lambda e_s, e_t, step: place(e_s, e_t, weight=step / 3, **PRESETS["diff-pruning"]).loss,
    }
    ours = Settings(out="ours", **common)
    found = analysis.distil(teacher, images, ours, DDPM(), losses, snapshots=[1])
    assert found.keys() == {1, 3}
    for (name, seed), net in found[3].items():
        other = load(f"theirs/student/{name}-{seed}").state_dict()
        assert all(torch.equal(value, other[key]) for key, value in net.state_dict().items()), (name, seed)
        assert not torch.equal(net.conv_in.weight, found[1][name, seed].conv_in.weight)
    again = analysis.distil(teacher, images, ours, DDPM(), losses, snapshots=[1])  # read, not trained
    assert torch.equal(again[3]["out", 0].conv_in.weight, found[3]["out", 0].conv_in.weight)
    with pytest.raises(ValueError, match="other settings or losses"):
        analysis.distil(teacher, images, ours, DDPM(), {"out": losses["out"]})

    rows = analysis.rate(found[3], DDPM(), torch.randn(8, 1, 8, 8), images.images[:20], seed=0, steps=2, progress=False)
    assert [(row["method"], row["seed"]) for row in rows] == list(found[3])
    assert analysis.by_method(rows, "saturated").keys() == {"out", "place"}
    assert json.dumps(rows)


def test_plots_show_every_seed():
    _, axis = analysis.panels()
    analysis.dots(axis, {"out": [1.0, 2.0], "place": [3.0]})
    analysis.spread(axis, [0, 1], [[1.0, 2.0], [3.0, 4.0]], "place")
    values = [line.get_xdata().tolist() for line in axis.lines[:2]] + [axis.lines[2].get_ydata().tolist()]
    assert values == [[1.0, 2.0], [3.0], [2.0, 3.0]]
    _, axis = analysis.panels()
    analysis.trend(axis, {"600": {"out": [1.0, 2.0]}, "1200": {"out": [3.0]}}, ["out"])
    assert axis.lines[0].get_ydata().tolist() == [1.5, 3.0]
