"""Networks of diffusers that read text: behind our call, cut down to students, saved, sampled by pipelines."""

import copy
import json
import re
import sys

import pytest
import torch
from torch import nn

import foreign
from diffusion import DDPM, process_named
from foreign import NARROW, MMDiT, TextUNet, bk_sdm, load, memory, process_of
from models import Tapped, UNet, prune_depth

diffusers = pytest.importorskip("diffusers")

SD21 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD1 = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8}
SD1["cross_attention_dim"] = 768
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "attention_head_dim": (1, 2, 2, 2),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
TINY_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}
SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}


def shaken(net):
    """`net` with all weights moved: fresh norms and biases are 1 and 0, and could be exchanged unnoticed."""
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def a_unet(**settings) -> TextUNet:
    torch.manual_seed(0)
    return shaken(TextUNet.of({**TINY_UNET, **settings}))


def an_mmdit(**settings) -> MMDiT:
    torch.manual_seed(0)
    return shaken(MMDiT.of({**TINY_SD3, **settings}))


def a_batch(net, b=2):
    generator = torch.Generator().manual_seed(2)
    cond = {"text": torch.randn(b, 5, 12, generator=generator)}
    if isinstance(net, MMDiT):
        cond["pooled"] = torch.randn(b, 10, generator=generator)
    return torch.randn(b, 4, 8, 8, generator=generator), torch.linspace(1, 900, b), cond


def parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ---- the call --------------------------------------------------------------------------------------------------------


def test_the_wrapped_networks_are_diffusers_own():
    net = a_unet()
    x, t, cond = a_batch(net)
    assert torch.equal(net(x, t, cond), net.net(x, t, encoder_hidden_states=cond["text"]).sample)
    assert torch.equal(net(x, t.long(), cond), net.net(x, t.long(), encoder_hidden_states=cond["text"]).sample)
    net = an_mmdit()
    x, t, cond = a_batch(net)
    theirs = net.net(x, cond["text"], cond["pooled"], t).sample
    assert torch.equal(net(x, t, cond), theirs) and theirs.std() > 0.1


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_a_teacher_in_half_precision_takes_and_returns_what_the_loop_has(make):
    net = make()
    x, t, cond = a_batch(net)
    exact = net(x, t, cond)
    half = net.to(torch.bfloat16)(x, t, cond)
    assert half.dtype == torch.float32 and 0 < (half - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_a_condition_that_does_not_fit_is_named(make):
    net = make()
    x, t, cond = a_batch(net)
    for wrong, given in ((None, "nothing"), ({"y": t}, "y"), ({**cond, "y": t}, "text, (pooled, )?y")):
        with pytest.raises(ValueError, match=f"needs cond with text( and pooled)?, but got {given}$"):
            net(x, t, wrong)


# ---- students of Stable Diffusion 1 and 2 ----------------------------------------------------------------------------


def test_the_published_sizes_from_the_configs_alone():
    with torch.device("meta"):
        for config, full, students in (
            (SD21, 865_910_724, {"base": 583.5, "small": 485.8, "tiny": 326.8}),
            (SD1, 859_520_964, {"base": 579.4, "C_small": 425.3, "C_extreme": 142.2}),
        ):
            teacher = TextUNet.of(config)
            assert parameters(teacher) == full
            for size, millions in students.items():
                student = bk_sdm(teacher, size)
                assert round(parameters(student) / 1e6, 1) == millions
                assert next(student.parameters()).is_meta and student.config["sample_size"] == 64


def without(net: TextUNet, size: str) -> nn.Module:
    """What BK-SDM says a student computes: the teacher's own modules, less those that the paper takes out."""
    unet = net.net
    if size == "tiny":
        del unet.down_blocks[3], unet.up_blocks[0]
        unet.down_blocks[2].downsamplers = None
    if size != "base":
        unet.mid_block = None
    for part, lost in ((unet.down_blocks, 1), (unet.up_blocks, 1)):
        for stage in part:
            del stage.resnets[lost]
            if hasattr(stage, "attentions"):
                del stage.attentions[lost]
    return net


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
@pytest.mark.parametrize("linear", [True, False], ids=["sd2", "sd1"])
def test_students_compute_what_the_teacher_does_without_the_removed_layers(size, linear, tmp_path):
    teacher = a_unet(use_linear_projection=linear)
    x, t, cond = a_batch(teacher)
    full = teacher(x, t, cond)
    student = bk_sdm(teacher, size)
    assert torch.equal(teacher(x, t, cond), full)  # untouched
    ours = student(x, t, cond)
    assert not student.training and all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(ours, without(teacher, size)(x, t, cond), rtol=1e-5, atol=1e-5)
    assert (ours - full).abs().max() > 0.1
    student.save(tmp_path)
    again = load(tmp_path)
    assert same_weights(again, student)
    torch.testing.assert_close(again(x, t, cond), ours, rtol=1e-5, atol=1e-5)
    own = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(own(x, t, cond["text"]).sample, ours, rtol=1e-5, atol=1e-5)


def test_students_keep_mode_and_dtype():
    teacher = a_unet().bfloat16().train()
    student = bk_sdm(teacher, "base")
    assert student.training and next(student.parameters()).dtype == torch.bfloat16


def test_narrow_students_keep_all_layers_and_as_many_heads_as_divide(monkeypatch):
    monkeypatch.setitem(NARROW, "C_test", (4, 8, 8, 12))
    student = bk_sdm(a_unet(attention_head_dim=(1, 2, 2, 5)), "C_test")
    x, t, cond = a_batch(student)
    assert student(x, t, cond).shape == x.shape and not student.training
    assert student.config["attention_head_dim"] == [1, 2, 2, 4] and student.config["layers_per_block"] == 2
    with torch.device("meta"):
        assert bk_sdm(TextUNet.of(SD21), "C_small").config["attention_head_dim"] == [4, 8, 16, 16]


def test_other_students_are_refused():
    with pytest.raises(ValueError, match="huge is no student of BK-SDM, choose from base, small, tiny, C_base"):
        bk_sdm(a_unet(), "huge")
    with pytest.raises(ValueError, match="not 4 stages of 1, middle UNetMidBlock2DCrossAttn"):
        bk_sdm(bk_sdm(a_unet(), "base"), "base")
    for net in (an_mmdit(), UNet(8, channels=32, channel_mults=(1,))):
        with pytest.raises(ValueError, match=f"not a {type(net).__name__}"):
            bk_sdm(net, "base")


# ---- depth pruning of the MMDiT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"qk_norm": "rms_norm"}, SD35], ids=["sd3", "qk-norm", "sd3.5"])
def test_any_blocks_compute_what_diffusers_computes_when_it_skips_the_others(settings, tmp_path):
    net = an_mmdit(**settings)
    x, t, cond = a_batch(net)
    for keep in ([0], [3], [0, 2], [1, 3], [0, 1, 2], [0, 1, 2, 3]):
        skipped = [i for i in range(4) if i not in keep]
        theirs = net.net(x, cond["text"], cond["pooled"], t, skip_layers=skipped).sample
        student = prune_depth(net, keep)
        assert torch.equal(student(x, t, cond), theirs) and not student.training
        assert sum(block.context_pre_only for block in student.blocks) == 1 and student.blocks[-1].context_pre_only
        student.save(tmp_path)
        again = load(tmp_path)
        assert same_weights(again, student)
        torch.testing.assert_close(again(x, t, cond), theirs, rtol=1e-5, atol=1e-5)
    assert again.config["num_layers"] == 4 and same_weights(again, net)


def test_the_sizes_of_stable_diffusion_3():
    with torch.device("meta"):
        teacher = MMDiT.of(SD3)
        assert round(parameters(teacher) / 1e6) == 2028
        for keep, millions in (([*range(1, 24, 2)], 1008.6), ([*range(3, 24, 4)], 498.7), ([*range(0, 12, 2)], 498.7)):
            assert round(parameters(prune_depth(teacher, keep)) / 1e6, 1) == millions


def test_students_are_independent_of_their_teachers():
    teacher = an_mmdit()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = prune_depth(teacher, 2)
    for p in student.parameters():
        p.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    with pytest.raises(ValueError, match="growing numbers from 0 to 3"):
        prune_depth(teacher, [1, 4])


# ---- features and memory ---------------------------------------------------------------------------------------------


def features_of(net, names=None):
    x, t, cond = a_batch(net)
    prediction, features = Tapped(net, names)(x, t, cond)
    assert torch.equal(prediction, net(x, t, cond))
    return features


def test_features_of_equal_widths_are_the_stages():
    teacher = a_unet()
    for size in ("base", "small"):
        student = bk_sdm(teacher, size)
        stages = [f"net.{way}_blocks.{i}" for way in ("down", "up") for i in range(4)]
        assert student.feature_layers(teacher) == teacher.feature_layers(student) == teacher.feature_layers() == stages
        pairs = zip(features_of(student), features_of(teacher), strict=True)
        shapes = [s.shape for s, t in pairs if s.shape == t.shape]
        assert shapes == [(2, c, s, s) for c, s in zip((8, 16, 16, 16, 16, 16, 16, 8), (4, 2, 1, 1, 2, 4, 8, 8))]  # noqa: B905


@pytest.mark.parametrize("linear", [True, False], ids=["sd2", "sd1"])
def test_features_of_fewer_stages_and_of_other_widths(linear, monkeypatch):
    teacher = a_unet(use_linear_projection=linear)
    tiny = bk_sdm(teacher, "tiny")
    mine, theirs = tiny.feature_layers(teacher), teacher.feature_layers(tiny)
    assert mine[2:] == ["net.down_blocks.2.attentions.0.proj_out", *(f"net.up_blocks.{i}" for i in range(3))]
    assert theirs[2:] == ["net.down_blocks.2.attentions.1.proj_out", *(f"net.up_blocks.{i}" for i in range(1, 4))]
    assert mine[:2] == theirs[:2] == ["net.down_blocks.0", "net.down_blocks.1"]
    ours, others = features_of(tiny, mine), features_of(teacher, theirs)
    assert [f.shape for f in ours] == [f.shape for f in others]

    monkeypatch.setitem(NARROW, "C_test", (4, 8, 8, 8))
    narrow = bk_sdm(teacher, "C_test")
    names = narrow.feature_layers(teacher)
    assert names == teacher.feature_layers(narrow) and len(names) == 9
    for s, t in zip(features_of(narrow, names), features_of(teacher, names), strict=True):
        assert 2 * s.shape[1] == t.shape[1] and s.shape[2:] == t.shape[2:]


def test_features_of_an_mmdit_are_the_image_tokens_of_its_blocks():
    net, outputs = an_mmdit(), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    features = features_of(net)
    assert [f.shape for f in features] == [(2, 16, 16)] * 4  # 4x4 patches of width 2 * 8; the text has 5 tokens
    assert all(torch.equal(f, output[1]) for f, output in zip(features, outputs[:4], strict=True))


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_gradient_checkpointing_changes_no_gradient(make):
    net = make().train()
    x, t, cond = a_batch(net)
    tapped, gradients = Tapped(net), []
    for enabled in (False, True):
        net.checkpoint(enabled)
        prediction, features = tapped(x, t, cond)
        net.zero_grad()
        (prediction.square().mean() + sum(f.square().mean() for f in features)).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert net.net.is_gradient_checkpointing
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_memory_of_the_readme_is_what_a_small_network_takes(monkeypatch):
    """Weights, gradients, moments and average to the byte; activations, which nothing frees, within a third."""
    monkeypatch.setattr(MMDiT, "text_tokens", 5)
    width = {"attention_head_dim": 64, "caption_projection_dim": 128, "sample_size": 32, "pos_embed_max_size": 16}
    net = MMDiT.of({**TINY_SD3, "num_layers": 6, **width}).train()
    generator, n = torch.Generator().manual_seed(2), parameters(net)
    x, t = torch.randn(16, 4, 32, 32, generator=generator), torch.linspace(1, 900, 16)
    cond = {"text": torch.randn(16, 5, 12, generator=generator), "pooled": torch.randn(16, 10, generator=generator)}
    computed, kept = memory(net, net), []
    for recompute in (False, True):
        net.checkpoint(recompute)
        sizes, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), torch.autocast("cpu", torch.bfloat16):
            output = net(x, t, cond)
        kept.append(sum(size for place, size in sizes.items() if place not in own))
    assert 2 / 3 < (kept[1] + kept[0] / 6) / (16 * computed["activation"] + computed["copies"]) < 1

    output.float().square().mean().backward()
    optimizer, average = torch.optim.AdamW(net.parameters()), copy.deepcopy(net)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    tensors = [*net.parameters(), *(p.grad for p in net.parameters()), *average.parameters(), *moments]
    assert sum(tensor.nbytes for tensor in tensors) == computed["student"] == 20 * n
    assert computed["teacher"] == sum(p.nbytes for p in net.bfloat16().parameters())
    assert memory(net, net, 4)["student"] == 5 * n


# ---- saved networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_networks_come_back_bit_for_bit_from_folders_and_pipelines(make, tmp_path):
    net = make()
    net.save(tmp_path / net.folder)
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / net.folder).iterdir()) == files
    assert len({file.stat().st_mode for file in (tmp_path / net.folder).iterdir()}) == 1  # as readable as each other
    for folder in (tmp_path, tmp_path / net.folder):
        again = load(folder)
        assert type(again) is type(net) and same_weights(again, net) and not again.training
        assert json.dumps(again.config) == json.dumps(net.config)


def test_weights_in_several_files_are_read(tmp_path):
    net = an_mmdit()
    net.net.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1 and same_weights(load(tmp_path), net)


def test_damaged_folders_are_one_clear_error(tmp_path):
    net = a_unet()
    net.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is cut off, damaged"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json, but no diffusion_pytorch_model\.safetensors"):
        load(tmp_path)
    weights.write_bytes(whole)
    for change, message in (
        ({"mid_block_type": None}, "absent by the config"),
        ({"layers_per_block": 3}, "absent in the weights"),
        ({"cross_attention_dim": 20}, r"to_k.weight is \(8, 20\) by the config, but \(8, 12\) in the weights"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_save_that_fails_leaves_the_older_network_whole(tmp_path, monkeypatch):
    net = a_unet()
    net.save(tmp_path)
    monkeypatch.setattr(type(net.net), "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bk_sdm(net, "base").save(tmp_path)
    assert same_weights(load(tmp_path), net) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_without_diffusers_the_sentence_says_what_to_install(make, tmp_path, monkeypatch):
    make().save(tmp_path / "theirs")
    UNet(8, channels=32, channel_mults=(1,)).save(tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install -r requirements-diffusers\.txt$"):
        load(tmp_path / "theirs")
    assert isinstance(load(tmp_path / "ours"), UNet)


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), "sd"),
        (
            diffusers.DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
            ),
            "sd-v",
        ),
        (diffusers.DDPMScheduler(), "ddpm"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sd3"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
    ],
)
def test_a_pipeline_says_for_which_process_it_was_trained(scheduler, name, tmp_path):
    assert process_of(tmp_path) is None
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert process_of(tmp_path) == name
    process = process_named(name)
    if isinstance(process, DDPM):
        torch.testing.assert_close(process.alpha_bar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
        assert process_named(name, "linspace").timesteps(2) == [999, 0]
    else:
        assert process.shift == scheduler.shift


def test_a_process_that_is_not_ours_is_refused(tmp_path):
    for scheduler in (
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDPMScheduler(prediction_type="v_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ):
        scheduler.save_pretrained(tmp_path / "scheduler")
        with pytest.raises(ValueError, match=f"describes a {type(scheduler).__name__} with settings that no process"):
            process_of(tmp_path)


def test_v_prediction_equals_diffusers():
    process = process_named("sd-v")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    x_t, v = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(process.noise_in(v, x_t, t), noise, rtol=1e-4, atol=1e-4)
    assert process_named("sd").noise_in(v, x_t, t) is v

    def net(x, t, cond):
        return 0.5 * x.roll(1, -1) + torch.tanh(x + t.reshape(-1, 1, 1, 1) / 1000)

    scheduler.set_timesteps(20)
    theirs = noise
    for step in scheduler.timesteps:
        theirs = scheduler.step(net(theirs, step.expand(3), None), step, theirs).prev_sample
    ours = process.sample(net, noise.shape, 20, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.std() > 0.1
    for word in ({"prediction": "x0"}, {"schedule": "cosine"}):
        with pytest.raises(ValueError, match=f"{next(iter(word))} must be"):
            DDPM(**word)


def test_the_module_names_its_students():
    assert set(NARROW) == {"C_base", "C_small", "C_tiny", "C_micro", "C_extreme"}
    assert all(re.search(rf"\b{name}\b", foreign.bk_sdm.__doc__) for name in foreign.BK_SDM)
