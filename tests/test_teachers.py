"""Networks that others published: files of every format, diffusers folders, the hub, schedulers, downloads."""

import argparse
import hashlib
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import Trap
from safetensors.torch import save_file

from distil import teachers
from distil.process import RectifiedFlow, process_of
from distil.students import Tapped
from distil.teachers import PUBLIC, load, public_teacher
from models import UNet, load_checkpoint, prune_channels, regroup

diffusers = pytest.importorskip("diffusers")

TINY = {"image_size": 8, "channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "norm_groups": 4}


def a_net(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(**TINY).eval()


def prefixed(state: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def holds(net: torch.nn.Module, state: dict) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# ---- files -----------------------------------------------------------------------------------------------------------

FORMATS = {  # what a file holds, from the last weights and their average, which is what has to be read
    "plain": lambda last, mean: mean,
    "plain with module.": lambda last, mean: prefixed(mean),
    "ddim": lambda last, mean: [prefixed(last), {"state": {}, "param_groups": []}, 7, 1000, prefixed(mean)],
    "ddim without average": lambda last, mean: [prefixed(mean), {"state": {}}, 7, 1000],
    "DiT": lambda last, mean: {"model": last, "ema": mean, "opt": {}, "args": argparse.Namespace(lr=1e-4)},
    "model": lambda last, mean: {"model": mean, "step": 3},
    "state_dict": lambda last, mean: {"state_dict": prefixed(mean)},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_fills_the_network(name, zipped, tmp_path):
    last, mean = a_net(0).state_dict(), a_net(1).state_dict()
    torch.save(FORMATS[name](last, mean), tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    net = a_net(2).train()
    load_checkpoint(net, tmp_path / "model.ckpt")
    assert holds(net, mean) and net.training


def test_safetensors_fill_the_network_whatever_its_dtype(tmp_path):
    state = a_net(1).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    net = a_net(2).bfloat16()
    load_checkpoint(net, str(tmp_path / "model.safetensors"))
    assert holds(net, {name: tensor.bfloat16() for name, tensor in state.items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(zipped, tmp_path):
    torch.save([Trap(tmp_path / "ran"), {}], tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth holds a pickled .* would run code from the file") as caught:
        load_checkpoint(a_net(0), tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [False, True], ids=["pruned file", "training checkpoint"])
def test_the_command_in_the_refusal_converts_a_pickled_module(training, tmp_path, monkeypatch):
    last, mean = a_net(0), a_net(1)
    torch.save([last, {}, 7, 1000, list(mean.parameters())] if training else mean, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="python -c") as caught:
        load_checkpoint(a_net(2), tmp_path / "old.pth")
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'))
    net = a_net(2)
    load_checkpoint(net, tmp_path / "weights.pt")
    assert holds(net, mean.state_dict())


def test_damaged_files_are_one_clear_error(tmp_path):
    state = a_net(0).state_dict()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "new.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in (0, 3, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{path.name} \({length:,} bytes\) is cut off, damaged, or no check"):
                load_checkpoint(a_net(0), path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_checkpoint(a_net(0), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [[], {}, {"step": 3}, [1, 2], {"ema": 0.5}, torch.zeros(3)], ids=str)
def test_files_without_weights_are_one_clear_error(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds no weights"):
        load_checkpoint(a_net(0), tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path):
    net, state = a_net(0), a_net(1).state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    del state["conv_in.bias"]
    state["conv_in.weight"] = torch.zeros(8, 1, 3, 3)
    state["logits.weight"] = torch.zeros(10)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(net, tmp_path / "model.pt")
    for part in (
        "model.pt does not fit UNet(image_size=8, ",
        "channel_mults=[1, 2]",
        "conv_in.weight is (8, 3, 3, 3) by the config, but (8, 1, 3, 3) in the weights",
        "conv_in.bias is (8,) by the config, but absent in the weights",
        "logits.weight is absent by the config, but (10,) in the weights",
    ):
        assert part in str(caught.value)
    torch.save({"other": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"and \d+ more$"):
        load_checkpoint(net, tmp_path / "model.pt")
    assert holds(net, before)


# ---- diffusers' UNet2DModel ------------------------------------------------------------------------------------------

# the settings of the published networks, which differ from diffusers' defaults
PUBLISHED = {
    "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None,
}  # fmt: skip
SMALL = {
    "sample_size": 16, "block_out_channels": (32, 32, 64), "layers_per_block": 2, "norm_num_groups": 8, "dropout": 0.1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), **PUBLISHED,
}  # fmt: skip
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def theirs(**settings):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**{**SMALL, **settings}).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms and biases would else be 1 and 0, and could be exchanged unnoticed
    return net


def agree(ours: UNet, other) -> bool:
    size, channels = ours.config["image_size"], ours.config["in_channels"]
    x, t = torch.randn(3, channels, size, size), torch.tensor([0, 500, 999])
    with torch.no_grad():
        difference = (ours(x, t) - other(x, t).sample).abs().max()
    return difference < 1e-5 * other(x, t).sample.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"in_channels": 1, "out_channels": 2, "layers_per_block": 1, "sample_size": 8},
        {  # widths as in LSUN: pairs of equal ones, the attention on the way between
            "block_out_channels": (32, 32, 64, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
    ],
)
def test_a_diffusers_folder_gives_the_same_outputs(settings, tmp_path, monkeypatch):
    other = theirs(**settings)
    other.save_pretrained(tmp_path / "unet")
    monkeypatch.setitem(sys.modules, "diffusers", None)  # not needed for reading
    for folder in (tmp_path / "unet", tmp_path):
        net = load(folder)
        assert type(net) is UNet and not net.training and agree(net, other)
        assert net.config["dropout"] == 0.1
    net.save(tmp_path / "ours")
    assert agree(load(tmp_path / "ours"), other)


def test_an_old_diffusers_folder_gives_the_same_outputs(tmp_path):
    other = theirs()
    state = other.state_dict()
    for new, old in OLD_NAMES.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    early = {"sample_size", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", *PUBLISHED}
    config = {name: value for name, value in other.config.items() if name in early | {"norm_num_groups"}}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    assert agree(load(tmp_path), other)


def test_an_old_folder_of_other_settings_gives_the_same_outputs(tmp_path):
    other = theirs(norm_eps=1e-5)
    names = {f".{new}.": f".{old}." for new, old in OLD_NAMES.items()}
    state = other.state_dict()
    for new, old in names.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    other.save_config(tmp_path)
    net, x, t = load(tmp_path), torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    assert type(net) is teachers.PixelUNet and torch.equal(call(net, x, t, None), call(other, x, t, None))


def test_the_published_config_is_that_of_our_table():
    config = {  # of google/ddpm-cat-256, the same network as bedroom and church
        "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "center_input_sample": False,
        "block_out_channels": [128, 128, 256, 256, 512, 512], "in_channels": 3, "out_channels": 3, "sample_size": 256,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], "layers_per_block": 2,
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4, "time_embedding_type": "positional",
        "mid_block_scale_factor": 1, "norm_num_groups": 32, **PUBLISHED,
    }  # fmt: skip
    with torch.device("meta"):
        assert UNet(**teachers._unet_config(config)).config == UNet(**PUBLIC["lsun_church"].config).config


TUTORIAL = {  # of diffusers' training tutorial in small: its own defaults for all that is not said
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 16, 32), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
RESNETS = {"down_block_types": ["ResnetDownsampleBlock2D"] * 3, "up_block_types": ["ResnetUpsampleBlock2D"] * 3}
SKIPS = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
}
OTHERS = {
    "tutorial": ({}, True),
    "our widths, other eps": ({**PUBLISHED, "norm_eps": 1e-5}, True),
    "other widths": ({"block_out_channels": (16, 24, 40)}, True),
    "classes": ({"num_class_embeds": 5, "time_embedding_dim": 96}, True),
    "not square": ({"sample_size": (16, 32), "mid_block_type": None}, True),
    "any size": ({"sample_size": None, "attn_norm_num_groups": 8}, True),
    "other blocks": (RESNETS, True),
    "skips": (SKIPS, False),
    "scale and shift": ({"resnet_time_scale_shift": "scale_shift"}, False),
    "learned times": ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, False),
}


def call(net, x, t, y):
    with torch.no_grad():
        if isinstance(net, teachers.PixelUNet):
            return net(x, t, {"y": y} if net.conditions else None)
        return net(x, t, **({"class_labels": y} if net.class_embedding is not None else {})).sample


@pytest.mark.parametrize("name", OTHERS)
def test_a_unet_of_any_settings_is_a_teacher_and_pruned_it_is_one_of_diffusers_again(name, tmp_path):
    change, prunable = OTHERS[name]
    other = theirs(**{**inspected(PUBLISHED), "dropout": 0.0, **TUTORIAL, **change})
    other.save_pretrained(tmp_path / "unet")
    net = load(tmp_path)
    assert type(net) is teachers.PixelUNet and net.arch == "unet" and not net.training
    net.fit((3, 16, 32) if name == "not square" else (3, 16, 16))
    x, t, y = torch.randn(2, *net.shape), torch.tensor([3, 900]), torch.tensor([0, 4])
    assert torch.equal(call(net, x, t, y), call(other, x, t, y))
    assert [feature.ndim for feature in Tapped(net)(x, t, {"y": y} if net.conditions else None)[1]] == [4] * (
        9 if net.config["mid_block_type"] is None else 11
    )
    if not prunable:
        with pytest.raises(ValueError, match="a UNet2DModel like this cannot be pruned, give it a --student: "):
            prune_channels(net, 0.5)
        return
    assert torch.equal(call(prune_channels(net, 0.0), x, t, y), call(other, x, t, y))
    for ratio, groups in ((0.5, "keep"), (0.5, "scale"), (0.9, "keep")):
        small = prune_channels(net, ratio, "random", groups)
        small.process = {"name": "ddpm", "schedule": "cosine"}
        small.save(tmp_path / "small")
        again = diffusers.UNet2DModel.from_pretrained(tmp_path / "small").eval()
        assert torch.equal(call(again, x, t, y), call(small, x, t, y)) and again.config.sample_size is not None
        assert load(tmp_path / "small").process == small.process and load(tmp_path / "small").shape == net.shape
        widths, head = again.config.block_out_channels, again.config.attention_head_dim or 1
        assert len({*widths}) == len({*other.config.block_out_channels}) and widths[1] % head == 0
        assert again.config.norm_num_groups == (2 if groups == "scale" else 4)
        share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())
        assert share < 0.55
        fewer = regroup(small, 100)
        assert fewer.config["norm_num_groups"] == 1 and torch.equal(fewer.net.conv_in.weight, small.net.conv_in.weight)


def inspected(names) -> dict:
    """diffusers' own defaults."""
    arguments = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    return {name: arguments[name].default for name in names}


def test_the_channels_that_stay_are_the_ones_that_weigh_most():
    """In whole heads, an equal number of each group, and every second frequency of the timestep."""
    with pytest.raises(ValueError, match="its class_embed_type is 'timestep': use one that counts classes"):
        teachers.PixelUNet.of({**TUTORIAL, "class_embed_type": "timestep"})
    net = teachers.PixelUNet.of({**TUTORIAL, "norm_eps": 1e-5})
    attention = "down_blocks.1.attentions.0."
    for name, p in net.net.named_parameters():
        p.data = torch.ones_like(p)
        if name.startswith(attention) and p.ndim == 2:
            p.data[8:] = 2.0  # the second head
        if name == "time_embedding.linear_1.weight":
            p.data[:] = torch.arange(16.0)
        if name == "down_blocks.0.resnets.0.conv1.weight":
            p.data *= torch.arange(16)[:, None, None, None]
    small = prune_channels(net, 0.5).net.state_dict()
    assert small[attention + "to_v.weight"].shape == (8, 8) and (small[attention + "to_v.weight"] == 2).all()
    kept = small["down_blocks.0.resnets.0.conv1.weight"][:, 0, 0, 0].tolist()
    assert kept == [2, 3, 6, 7, 10, 11, 14, 15]  # two of each group of four
    assert small["time_embedding.linear_1.weight"][0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet1DModel"}, "a UNet1DModel, of diffusers only UNet2DConditionModel, SD3.*, UNet2DModel"),
        ({"down_block_types": ["DownBlock2D", "UpwardBlock2D", "DownBlock2D"]}, "UpwardBlock2D does not exist"),
        ({}, "by the config, but absent in the weights"),
        ({"norm_eps": 1e-5}, "by the config, but absent in the weights"),
    ],
)
def test_what_is_no_network_is_refused(change, message, tmp_path):
    config = {"_class_name": "UNet2DModel", **json.loads(json.dumps(SMALL)), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"conv_in.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        load(tmp_path)


def test_dropout_is_that_of_residual_blocks_and_saved():
    net = teachers.PixelUNet(theirs())
    net.set_dropout(0.25)
    rates = {name: module.p for name, module in net.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if ".resnets." in name} == {0.25} == {net.net.config["dropout"]}
    assert {rate for name, rate in rates.items() if ".attentions." in name} == {0.0}


def test_blocks_with_numbers_that_are_not_saved_are_refused(tmp_path):
    kinds = {"down_block_types": ("DownBlock2D", "KDownBlock2D"), "up_block_types": ("KUpBlock2D", "UpBlock2D")}
    theirs(block_out_channels=(32, 32), **kinds).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its .*kernel is computed and not saved, .*: use other blocks"):
        load(tmp_path)


def test_settings_that_a_config_leaves_out_are_those_of_diffusers():
    needed = teachers.NEEDED
    assert inspected(needed) == {**needed, **teachers.DEFAULTS}
    assert {name: needed[name] for name in teachers.DEFAULTS} == PUBLISHED
    for name in PUBLISHED:
        config = {"_class_name": "UNet2DModel", **json.loads(json.dumps(SMALL))}
        assert teachers._unet_config(config) is not None
        del config[name]
        assert teachers._unet_config(config) is None


UNFILLED = {"_class_name": "UNet2DModel", **SMALL}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, FileNotFoundError, r"is not a saved network: it has no model\.safetensors and no config\.json"),
        ("{", ValueError, "cannot be loaded: "),
        ("[]", FileNotFoundError, r"has no model\.safetensors"),
        (json.dumps({"_class_name": ["UNet2DModel"]}), ValueError, "cannot be loaded: "),
        (json.dumps(UNFILLED), FileNotFoundError, r"no diffusion_pytorch_model\.safetensors and no .*\.bin"),
    ],
)
def test_folders_that_hold_no_network_say_what_is_missing(config, error, message, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).count("cannot be loaded") < 2
    (tmp_path / "model.safetensors").touch()
    if config == "[]":
        with pytest.raises(ValueError, match=r'config\.json must have a "class"'):
            load(tmp_path)


# ---- the scheduler of a pipeline -------------------------------------------------------------------------------------

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
X0 = {"prediction": "x0"}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
D = diffusers.DDPMScheduler


@pytest.mark.parametrize(
    ("scheduler", "process"),
    [
        (diffusers.PNDMScheduler(**STABLE), {"name": "sd"}),
        (diffusers.DDIMScheduler(**STABLE, prediction_type="v_prediction"), {"name": "sd-v"}),
        (D(), {"name": "ddpm"}),
        (FLOW(shift=3.0), {"name": "sd3"}),
        (FLOW(), {"name": "flow"}),
        (FLOW(shift=2.0), {"name": "flow", "shift": 2.0}),
        (D(**COSINE), {"name": "ddpm", "schedule": "cosine"}),
        (D(prediction_type="v_prediction"), {"name": "ddpm", "prediction": "v"}),
        (D(200, beta_end=0.1, beta_schedule="sigmoid"), {"schedule": "sigmoid", "steps": 200, "beta_end": 0.1}),
        (diffusers.UniPCMultistepScheduler(**COSINE, prediction_type="sample"), {"schedule": "cosine"} | X0),
    ],
)  # fmt: skip
def test_a_pipeline_says_for_which_process_it_was_trained(scheduler, process, tmp_path):
    theirs(layers_per_block=1).save_pretrained(tmp_path / "unet")
    assert load(tmp_path).process == {}
    scheduler.save_pretrained(tmp_path / "scheduler")
    net = load(tmp_path)
    assert net.process == load(tmp_path / "unet").process == {"name": "ddpm", **process}
    net.save(tmp_path / "ours")
    ours = process_of(load(tmp_path / "ours"))
    if isinstance(ours, RectifiedFlow):
        assert ours.shift == scheduler.shift
        return
    torch.testing.assert_close(ours.alpha_bar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    x0, noise, kind = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), scheduler.config.prediction_type
    t = torch.tensor([3, ours.steps - 9])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), D.add_noise(scheduler, x0, noise, t), rtol=1e-3, atol=1e-4)
    velocity = D.get_velocity(scheduler, x0, noise, t)
    target = {"epsilon": noise, "sample": x0, "v_prediction": velocity}[kind]
    torch.testing.assert_close(ours.target(x0, noise, t), target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (D(rescale_betas_zero_snr=True), "DDPMScheduler whose rescale_betas_zero_snr is True, of which only False can"),
        (D(trained_betas=[0.1, 0.2]), r"whose trained_betas is \[0.1, 0.2\]"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "whose timestep_type is 'continuous'"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "whose prediction_type is 'flow_pr"),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler whose beta_schedule is None, of which only linear, scaled_"),
        (FLOW(shift=3.0, use_dynamic_shifting=True), "whose use_dynamic_shifting is True"),
        (FLOW(num_train_timesteps=500), "whose num_train_timesteps is 500, of which only 1000"),
    ],
)
@pytest.mark.parametrize("place", ["scheduler", "."])
def test_a_scheduler_that_no_process_here_has_is_refused_by_name(scheduler, message, place, tmp_path):
    theirs(layers_per_block=1).save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / place)
    with pytest.raises(ValueError, match=message) as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, whose files a test puts into the folder `hub.folder`."""

    def snapshot_download(name, allow_patterns):
        fake.asked.append((name, allow_patterns))
        if fake.error:
            raise fake.error
        for file in fake.folder.rglob("*.*"):
            inside = file.relative_to(fake.folder)
            if inside.as_posix() in allow_patterns:
                (fake.cache / inside).parent.mkdir(parents=True, exist_ok=True)
                (fake.cache / inside).write_bytes(file.read_bytes())
        return str(fake.cache)

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download, fake.asked, fake.error = snapshot_download, [], None
    fake.folder, fake.cache = tmp_path / "remote", tmp_path / "cache"
    fake.folder.mkdir()
    fake.cache.mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize("inside", ["", "unet"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_hub_id_is_fetched_and_loaded(hub, inside, safe):
    other = theirs()
    other.save_pretrained(hub.folder / inside, safe_serialization=safe)
    diffusers.DDPMScheduler().save_pretrained(hub.folder / "scheduler")
    if not safe and not list(hub.folder.rglob("*.bin")):  # newer diffusers write safetensors whatever they are told
        file = next(hub.folder.rglob("*.safetensors"))
        file.unlink()
        torch.save(other.state_dict(), file.with_suffix(".bin"))
    net = load("someone/ddpm")
    assert agree(net, other) and net.process == {"name": "ddpm"}
    assert len(hub.asked) == (1 if safe else 2) and len(list(hub.cache.rglob("*model*"))) == 1


def test_our_own_students_load_from_the_hub_and_folders_come_first(hub, tmp_path):
    a_net(0).save(hub.folder)
    assert holds(load("someone/student"), a_net(0).state_dict())
    a_net(1).save(tmp_path / "someone" / "student")
    hub.asked.clear()
    assert holds(load("someone/student"), a_net(1).state_dict()) and not hub.asked


def test_hub_ids_that_cannot_be_fetched_say_why(hub, monkeypatch):
    for kind in (OSError, type("ProxyError", (Exception,), {})):  # the hub's HTTP library has errors of its own
        hub.error = kind("no connection to the hub\nand much more")
        with pytest.raises(FileNotFoundError, match=r"no folder google/ddpm, .* be fetched: no connection .*hub$"):
            load("google/ddpm")
    hub.error = None
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load("google/ddpm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder google/ddpm, .* pip install huggingface_hub"):
        load("google/ddpm")
    for path in ("ddpm", "a/b/c", "/a/b", "../a", "./b"):
        with pytest.raises(FileNotFoundError, match="is not a saved network"):
            load(path)


# ---- public teachers -------------------------------------------------------------------------------------------------


def test_the_table_holds_the_published_networks():
    sizes = {"celeba": 78_700_803, "cifar10": 35_746_307, "lsun_bedroom": 113_673_219, "lsun_church": 113_673_219,
             "imagenet": 675_129_632}  # fmt: skip
    for name, public in PUBLIC.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in public.kind(**public.config).parameters()) == sizes.pop(name)
        assert public.url.startswith("https://") and (public.md5 is None or len(bytes.fromhex(public.md5)) == 16)
    assert not sizes and len({public.file for public in PUBLIC.values()}) == len(PUBLIC)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """The file behind the public teacher of a data set `dots`."""
    file = tmp_path / "remote.pt"
    torch.save(a_net(1).state_dict(), file)
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLIC, "dots", teachers.Public("dots.pt", file.as_uri(), md5, TINY, "google/dots"))
    return file


@pytest.mark.parametrize("known", [True, False], ids=["md5", "no md5"])
def test_the_public_teacher_is_downloaded_once(known, remote, tmp_path, monkeypatch):
    if not known:
        monkeypatch.setitem(PUBLIC, "dots", PUBLIC["dots"]._replace(md5=None))
    folder, content = tmp_path / "deep" / "teachers", remote.read_bytes()
    for _ in range(2):
        net = public_teacher("dots", folder)
        assert holds(net, a_net(1).state_dict()) and not net.training
        remote.unlink(missing_ok=True)  # nobody asks for it again
    assert [file.name for file in folder.iterdir()] == ["dots.pt"]
    remote.write_bytes(content)
    (folder / "dots.pt").write_bytes(b"something else")
    if known:  # only a checksum tells that this is another file
        assert holds(public_teacher("dots", folder), a_net(1).state_dict())
    else:
        with pytest.raises(ValueError, match=r"dots\.pt is no teacher for dots: .* is cut off, damaged, or no checkp"):
            public_teacher("dots", folder)


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        ({}, None, "/remote.pt cannot be downloaded: .*No such file"),
        ({"url": "http://127.0.0.1:1/file"}, 0, r"127\.0\.0\.1:1/file cannot be downloaded: .*refused"),
        ({}, 1000, r"/remote.pt sent 1,000 bytes whose md5 is not .*; they were removed"),
        ({"md5": None}, 1000, r"\(1,000 bytes\) is cut off, damaged, or no checkpoint"),
    ],
)
@pytest.mark.parametrize("former", [None, b"former"])
def test_failed_downloads_name_the_alternatives(change, length, message, former, remote, tmp_path, monkeypatch):
    public = PUBLIC["dots"]._replace(**change)
    monkeypatch.setitem(PUBLIC, "dots", public)
    remote.unlink() if length is None else remote.write_bytes(remote.read_bytes()[:length])
    if former and public.md5:  # without a checksum it would be taken as it is
        (tmp_path / "teachers").mkdir()
        (tmp_path / "teachers" / "dots.pt").write_bytes(former)
    others = r"with a browser and give it as --teacher PATH .*dots\.pt\), or use --teacher google/dots or --teacher "
    with pytest.raises(OSError, match=f"{message}.*; if that does not help, fetch .* {others}train$"):
        public_teacher("dots", tmp_path / "teachers")
    assert all(file.read_bytes() == former for file in (tmp_path / "teachers").iterdir())


def test_other_data_sets_have_no_public_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"no public teacher is known for cats, only for celeba, .*--teacher train"):
        public_teacher("cats", tmp_path)


def test_a_teacher_behind_a_page_for_people_is_fetched_by_hand(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLIC, "celeba", PUBLIC["celeba"]._replace(config=TINY))
    message = r"cannot be downloaded by a program: fetch https://drive\.google\.com.* as --teacher PATH .*celeba\.pth\)"
    with pytest.raises(FileNotFoundError, match=message):
        public_teacher("celeba", tmp_path)
    mean = a_net(1).state_dict()
    torch.save([prefixed(a_net(0).state_dict()), {}, 7, 1000, prefixed(mean)], tmp_path / PUBLIC["celeba"].file)
    assert holds(public_teacher("celeba", tmp_path), mean)
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / PUBLIC["celeba"].file)
    with pytest.raises(ValueError, match=r"ddim_celeba\.pth is no teacher for celeba: "):
        public_teacher("celeba", tmp_path)


def test_a_pruned_network_is_no_public_teacher(tmp_path, monkeypatch):
    sizes = {"image_size": 8, "in_channels": 1, "channel_mults": (1, 2), "attention_resolutions": (), "norm_groups": 4}
    public = teachers.Public("whole.pth", "page", None, {**sizes, "channels": 16}, by_hand=True)
    monkeypatch.setitem(PUBLIC, "dots", public)
    torch.save(prune_channels(UNet(**sizes, channels=16), 0.5).state_dict(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"is no teacher for dots: .* by the config, but .* in the weights"):
        public_teacher("dots", tmp_path)
