"""Stable Diffusion: the networks of diffusers behind our call, students, and the whole way of a user.

That way goes from captioned images over latents and students back into a pipeline of diffusers (conftest.py).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LETTERS, ROOT, a_tokenizer, free_ports, refused, same
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from distil import data, metrics, pictures, sample, text_to_image
from distil import latents as latent_space
from distil.batches import batches
from distil.prepare import prepare
from distil.presets import SD_STUDENTS
from distil.process import DDPM
from distil.settings import parse
from distil.students import Tapped
from distil.teachers import load
from distil.text_to_image import MMDiT, TextEncoder, TextUNet, Vae, bk_sdm
from models import UNet, prune_depth

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
train = pytest.importorskip("train")

SD1 = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
    "cross_attention_dim": 768,
}  # fmt: skip
SD21 = SD1 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SD3 = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "pos_embed_max_size": 192, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
}  # fmt: skip
TINY_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16, 16, 16), "attention_head_dim": (1, 2, 2, 2),
    "cross_attention_dim": 12, "norm_num_groups": 4,
}  # fmt: skip
TINY_SD3 = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}  # fmt: skip
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
    sizes = {"text": (5, 12), "pooled": (10,)}
    cond = {name: torch.randn(b, *sizes[name], generator=generator) for name in net.conditions}
    return torch.randn(b, 4, 8, 8, generator=generator), torch.linspace(1, 900, b), cond


# ---- the call --------------------------------------------------------------------------------------------------------


def test_the_wrapped_networks_are_diffusers_own():
    net = a_unet()
    x, t, cond = a_batch(net)
    for when in (t, t.long()):
        assert torch.equal(net(x, when, cond), net.net(x, when, encoder_hidden_states=cond["text"]).sample)
    net = an_mmdit()
    x, t, cond = a_batch(net)
    theirs = net.net(x, cond["text"], cond["pooled"], t).sample
    assert torch.equal(net(x, t, cond), theirs) and theirs.std() > 0.1


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_a_teacher_in_half_precision_takes_and_returns_what_the_loop_has(make):
    net = make()
    x, t, cond = a_batch(net)
    exact = net(x, t, cond)
    net.settle(torch.float16)
    assert torch.equal(net(x, t, cond), exact)  # only bfloat16 reaches as far
    net.settle(torch.bfloat16)
    half = net(x, t, cond)
    assert half.dtype == torch.float32 and 0 < (half - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_gradient_checkpointing_changes_no_gradient(make):
    net = make().train()
    x, t, cond = a_batch(net)
    tapped, gradients = Tapped(net), []
    for recompute in (False, True):
        if recompute:
            net.recompute()
        prediction, features = tapped(x, t, cond)
        net.zero_grad()
        (prediction.square().mean() + sum(f.square().mean() for f in features)).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert net.net.is_gradient_checkpointing
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- students --------------------------------------------------------------------------------------------------------


def test_the_published_sizes_from_the_configs_alone():
    with torch.device("meta"):
        for config, full, students in (
            (SD21, 865_910_724, {"base": 583.5, "small": 485.8, "tiny": 326.8}),
            (SD1, 859_520_964, {"base": 579.4, "C_small": 425.3, "C_extreme": 142.2}),
        ):
            teacher = TextUNet.of(config)
            assert metrics.parameters(teacher) == full
            for size, millions in students.items():
                student = bk_sdm(teacher, size)
                assert round(metrics.parameters(student) / 1e6, 1) == millions
                assert next(student.parameters()).is_meta and student.config["sample_size"] == 64
        assert bk_sdm(TextUNet.of(SD21), "C_small").config["attention_head_dim"] == [4, 8, 16, 16]
        teacher = MMDiT.of(SD3)
        assert round(metrics.parameters(teacher) / 1e6) == 2028
        for keep, millions in (([*range(1, 24, 2)], 1008.6), ([*range(3, 24, 4)], 498.7), ([*range(0, 12, 2)], 498.7)):
            assert round(metrics.parameters(prune_depth(teacher, keep)) / 1e6, 1) == millions


def without(net: TextUNet, size: str) -> TextUNet:
    """What BK-SDM says a student computes: the teacher's own modules, less those that the paper takes out."""
    unet = net.net
    if size == "tiny":
        del unet.down_blocks[3], unet.up_blocks[0]
        unet.down_blocks[2].downsamplers = None
    if size != "base":
        unet.mid_block = None
    for stage in (*unet.down_blocks, *unet.up_blocks):
        del stage.resnets[1]
        if hasattr(stage, "attentions"):
            del stage.attentions[1]
    return net


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
@pytest.mark.parametrize("linear", [True, False], ids=["sd2", "sd1"])
def test_students_compute_what_the_teacher_does_without_the_removed_layers(size, linear, tmp_path):
    teacher = a_unet(use_linear_projection=linear)
    teacher.process = {"name": "sd"}
    x, t, cond = a_batch(teacher)
    full = teacher(x, t, cond)
    student = bk_sdm(teacher, size)
    assert torch.equal(teacher(x, t, cond), full)  # untouched
    ours = student(x, t, cond)
    assert not student.training and all(p.requires_grad for p in student.parameters())
    assert student.process == teacher.process
    torch.testing.assert_close(ours, without(teacher, size)(x, t, cond), rtol=1e-5, atol=1e-5)
    assert (ours - full).abs().max() > 0.1
    student.save(tmp_path)
    assert same(load(tmp_path), student)
    own = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(own(x, t, cond["text"]).sample, ours, rtol=1e-5, atol=1e-5)
    half = bk_sdm(a_unet().bfloat16().train(), size)
    assert half.training and next(half.parameters()).dtype == torch.bfloat16


def test_narrow_students_keep_all_layers_and_as_many_heads_as_divide(monkeypatch):
    monkeypatch.setitem(SD_STUDENTS, "C_test", (4, 8, 8, 12))
    student = bk_sdm(a_unet(attention_head_dim=(1, 2, 2, 5)), "C_test")
    x, t, cond = a_batch(student)
    assert student(x, t, cond).shape == x.shape and not student.training
    assert student.config["attention_head_dim"] == [1, 2, 2, 4] and student.config["layers_per_block"] == 2


@pytest.mark.parametrize("settings", [{}, {"qk_norm": "rms_norm"}, SD35], ids=["sd3", "qk-norm", "sd3.5"])
def test_any_blocks_compute_what_diffusers_computes_when_it_skips_the_others(settings, tmp_path):
    net = an_mmdit(**settings)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, t, cond = a_batch(net)
    for keep in ([0], [3], [0, 2], [1, 3], [0, 1, 2], [0, 1, 2, 3]):
        skipped = [i for i in range(4) if i not in keep]
        theirs = net.net(x, cond["text"], cond["pooled"], t, skip_layers=skipped).sample
        student = prune_depth(net, keep)
        assert torch.equal(student(x, t, cond), theirs) and not student.training
        assert [block.context_pre_only for block in student.blocks] == [False] * (len(keep) - 1) + [True]
        student.save(tmp_path)
        again = load(tmp_path)
        assert same(again, student)
        for p in student.parameters():
            p.data.zero_()
    assert again.config["num_layers"] == 4 and all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


def test_blocks_can_be_watched_and_switched_off():
    """What importance.py asks of a network, `block_tokens` and `skip_block`: as if the blocks were not there."""
    net = an_mmdit()
    x, t, cond = a_batch(net)
    on, seen = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1]]), []

    def switch(i):
        def hook(block, args, kwargs, output):
            before, after = net.block_tokens(args, kwargs, output)
            seen.append((before.shape, torch.equal(before, after)))
            return net.skip_block(on[:, i, None, None], args, kwargs, output)

        return hook

    full, without_two = net(x, t, cond), prune_depth(net, [0, 3])(x, t, cond)
    hooks = [block.register_forward_hook(switch(i), with_kwargs=True) for i, block in enumerate(net.blocks)]
    mixed = net(x, t, cond)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(mixed[0], without_two[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], full[1], rtol=1e-5, atol=1e-5)
    assert seen == [((2, 16, 16), False)] * 4


# ---- features --------------------------------------------------------------------------------------------------------


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
        shapes = [f.shape for f in features_of(student)]
        assert shapes == [f.shape for f in features_of(teacher)]
        widths, sizes = (8, 16, 16, 16, 16, 16, 16, 8), (4, 2, 1, 1, 2, 4, 8, 8)
        assert shapes == [(2, c, s, s) for c, s in zip(widths, sizes, strict=True)]


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

    monkeypatch.setitem(SD_STUDENTS, "C_test", (4, 8, 8, 8))
    narrow = bk_sdm(teacher, "C_test")
    names = narrow.feature_layers(teacher)
    assert names == teacher.feature_layers(narrow) and len(names) == 9
    ours, others = features_of(narrow, names), features_of(teacher, names)
    assert narrow.feature_channels(names) == [f.shape[1] for f in ours]
    for s, t in zip(ours, others, strict=True):
        assert 2 * s.shape[1] == t.shape[1] and s.shape[2:] == t.shape[2:]


def test_features_of_an_mmdit_are_the_image_tokens_of_its_blocks():
    net, outputs = an_mmdit(), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    features = features_of(net)
    assert [f.shape for f in features] == [(2, 16, 16)] * 4  # 4x4 patches of width 2 * 8; the text has 5 tokens
    assert all(torch.equal(f, output[1]) for f, output in zip(features, outputs[:4], strict=True))
    student = prune_depth(net, 2)
    assert student.feature_layers(net) == ["net.transformer_blocks.0", "net.transformer_blocks.1"]
    assert student.feature_channels(student.feature_layers()) == [16, 16]


# ---- saved networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_networks_come_back_bit_for_bit_from_folders_and_pipelines(make, tmp_path, monkeypatch):
    net = make()
    net.save(tmp_path / net.folder)
    net.net.save_pretrained(tmp_path / "theirs")
    files = sorted((tmp_path / net.folder).iterdir())
    assert [file.name for file in files] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert len({file.stat().st_mode for file in files}) == 1  # as readable as each other
    theirs = [tmp_path / "theirs" / file.name for file in files]
    assert json.loads(files[0].read_text()) == json.loads(theirs[0].read_text())
    with safe_open(files[1], "pt") as file:
        assert file.metadata()["format"] == "pt"  # without which diffusers refuses it
    ours, expected = load_file(files[1]), load_file(theirs[1])
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    for folder in (tmp_path, tmp_path / net.folder):
        again = load(folder)
        assert type(again) is type(net) and same(again, net) and not again.training
        assert json.dumps(again.config) == json.dumps(net.config)
    monkeypatch.setattr(type(net.net), "to_json_string", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the older network stays whole
        make(sample_size=4).save(tmp_path / net.folder)
    assert same(load(tmp_path), net) and len(list((tmp_path / net.folder).iterdir())) == 2


@pytest.mark.parametrize("make", [a_unet, an_mmdit])
def test_a_student_says_at_which_size_it_has_learned(make, tmp_path):
    teacher = make()
    null = {name: torch.zeros(2, width) for name, width in teacher.widths.items()}
    teacher.fit((4, 16, 16), null)  # made for 8
    student = teacher.like(dict(teacher.net.config), teacher.net.state_dict())
    student.save(tmp_path)
    assert load(tmp_path).shape == (4, 16, 16)
    assert type(student.net).from_pretrained(tmp_path).config.sample_size == 16


def test_weights_in_several_files_are_read(tmp_path):
    net = an_mmdit()
    net.net.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1 and same(load(tmp_path), net)


# ---- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_pipeline(family, pipelines):
    encoder = TextEncoder(pipelines[family])
    none = {} if family == "sd" else {"text_encoder_3": None, "tokenizer_3": None}
    whole = diffusers.DiffusionPipeline.from_pretrained(pipelines[family], **none)
    prompts = ["a b", "a much longer prompt than fits", ""]
    ours = encoder.encode(prompts)
    if family == "sd":
        theirs = [whole.encode_prompt(prompts, "cpu", 1, False)[0]]
    else:
        text, _, pooled, _ = whole.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        theirs = [text, pooled]
        assert encoder.stored == (8, 32) and encoder.shapes == {"text": (264, 36), "pooled": (24,)}
        assert not text[:, 8:].any() and not text[:, :, 32:].any()  # what is not stored
    torch.testing.assert_close(list(ours.values()), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours["text"][0], ours["text"][1])


def test_embeddings_with_t5_are_those_of_the_pipeline_and_it_can_be_left_out(pipelines, tmp_path):
    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -3.0), *((letter, -3.0) for letter in LETTERS)]
    sizes = {"vocab_size": 40, "d_model": 36, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    tokenizer = transformers.T5Tokenizer(vocab=words, extra_ids=0)
    with_t5 = diffusers.DiffusionPipeline.from_pretrained(pipelines["mmdit"], text_encoder_3=t5, tokenizer_3=tokenizer)
    with_t5.save_pretrained(tmp_path)
    text, _, pooled, _ = with_t5.encode_prompt(["a b"], None, None, do_classifier_free_guidance=False)
    ours = TextEncoder(tmp_path)
    assert ours.stored == ours.shapes["text"] == (264, 36) and text[:, 8:].any()
    torch.testing.assert_close(ours.encode(["a b"]), {"text": text, "pooled": pooled}, rtol=1e-4, atol=1e-4)
    small = TextEncoder(tmp_path, t5=False)
    assert small.stored == (8, 32)
    torch.testing.assert_close(small.encode(["a b"])["text"][:, :8], text[:, :8], rtol=1e-4, atol=1e-4)
    assert small.record["text_fingerprint"] != ours.record["text_fingerprint"]


# ---- the whole way ---------------------------------------------------------------------------------------------------

STUDENT = {"sd": ["--student", "base"], "mmdit": ["--keep", "0,2"]}


def command(family: str, pipelines, latents, out: Path, *more: str) -> list[str]:
    where = ["--data", str(latents[family]), "--teacher", str(pipelines[family]), "--out", str(out)]
    small = ["--batch-size", "4", "--log-every", "1", "--eval-samples", "0", "--device", "cpu"]
    return ["--dataset", "latents", "--arch", family, *STUDENT[family], *where, *small, *more]


def trained(arguments: list[str]) -> int:
    return train.main(parse(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_captioned_images_to_a_student_inside_the_pipeline(
    family, pipelines, latents, tmp_path, capsys, monkeypatch
):
    run, few = tmp_path / "run", ["--steps", "8", "--batch-size", "8", "--lr", "1e-2", "--save-every", "4"]
    assert trained(command(family, pipelines, latents, run, "--kd", "none", "place", *few)) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {name: [line["loss"] for line in lines if line["method"] == name] for name in ("none", "place")}
    assert len(lines) == 16 and np.isfinite([*losses.values()]).all() and lines[1]["w"] > 0
    assert sum(losses["none"][-3:]) < 0.92 * sum(losses["none"][:3])  # it learns these eight latents
    assert losses["none"][0] != losses["place"][0]

    # the same student alone, killed half-way and resumed
    save = train.save_checkpoint

    def killed(*arguments) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    alone = command(family, pipelines, latents, tmp_path / "alone", *few)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(alone)
    assert "--lr was 0.01, is 0.02" in refused(trained, [*alone, "--lr", "2e-2"], capsys)
    assert not (tmp_path / "alone" / "student").exists() and trained([*alone, "--recompute"]) == 0  # in less memory
    places = (run / "student" / "place-0", tmp_path / "alone" / "student", pipelines[family])
    student, again, teacher = (load(place) for place in places)
    assert same(student, again) and student.config == again.config

    assert json.loads((run / "config.json").read_text())["vae"] == str(pipelines[family])  # as the latents say
    found, sizes = json.loads((run / "metrics.json").read_text()), [metrics.parameters(x) for x in (student, teacher)]
    rows = [next(row for row in found["students"] if row["method"] == "place"), found["teacher"]]
    assert [row["parameters"] for row in rows] == sizes and sizes[0] < 0.8 * sizes[1]
    assert 0 < rows[0]["macs"] < rows[1]["macs"]

    (tmp_path / "prompts.txt").write_text("a b\n\ncab\n")
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "images"), "--sample-steps", "2"]
    assert sample.main([str(tmp_path / "alone"), *more, "--device", "cpu"]) == 0
    a, b = (np.asarray(Image.open(tmp_path / "images" / name / "00001.png")) for name in ("teacher", "alone"))
    assert a.shape == (64, 64, 3) and (a != b).any()
    assert Image.open(tmp_path / "images" / "samples.png").size[0] > 128
    its = json.loads((latents[family] / "latents.json").read_text())["text_encoders"]
    sample.check_text([run], SimpleNamespace(record={"text_encoders": its}))
    with pytest.raises(ValueError, match=r"run has learned from the embeddings of text_encoder.*: give --no-t5"):
        sample.check_text([run / "student/none-0"], SimpleNamespace(record={"text_encoders": [*its, "text_encoder_3"]}))

    own = getattr(diffusers, student.source).from_pretrained(run / "student" / "place-0")
    none = {} if family == "sd" else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines[family], **{student.folder: own}, **none)
    image = pipeline("a b", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    card = (run / "student" / "place-0" / "README.md").read_text()
    assert f'DiffusionPipeline.from_pretrained("{pipelines[family]}", {student.folder}=student)' in card


def test_captions_are_dropped_for_teacher_and_students_as_often_as_asked(pipelines, latents, tmp_path):
    given = prepare(parse(command("sd", pipelines, latents, tmp_path / "run", "--caption-dropout", "0.5")))
    with contextlib.closing(batches(given.settings, given.images, DDPM(), given.teacher)) as stream:
        text = torch.cat([next(stream).cond["text"] for _ in range(5)])
    dropped = (text == given.teacher.no_condition()["text"]).all(2).all(1)  # (20,)
    assert 4 < dropped.sum() < 16


def test_the_clip_score_is_the_mean_cosine_of_pairs(tmp_path):
    torch.manual_seed(0)
    own = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "max_position_embeddings": 8}
    seen = {"image_size": 16, "patch_size": 8}
    kinds = {"text_config": own | words, "vision_config": own | seen, "projection_dim": 12}
    model = transformers.CLIPModel(transformers.CLIPConfig(**kinds)).eval()
    model.half().save_pretrained(tmp_path)  # it computes in float32 all the same
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor, tokenizer = transformers.CLIPImageProcessor(**sizes), a_tokenizer(transformers, tmp_path)
    for part in (processor, tokenizer):
        part.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (65, 3, 20, 20), np.uint8)  # a part of 64, and one more
    prompts = [" ".join(LETTERS[i % 7 : i % 7 + 1 + i % 3]) for i in range(65)]
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer([prompt], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        pixels = processor([image.transpose(1, 2, 0)], return_tensors="pt")
        with torch.no_grad():
            text = model.float().get_text_features(**tokens).pooler_output
            pixels = model.get_image_features(**pixels).pooler_output
        cosines.append(torch.cosine_similarity(text, pixels).item())
    assert text_to_image.ClipScore(tmp_path)(images, prompts) == pytest.approx(np.mean(cosines), abs=1e-5)
    small, whole = text_to_image.ClipScore(tmp_path, size=12), text_to_image.ClipScore(tmp_path)
    assert small(images, prompts) == pytest.approx(whole(pictures.squash(images, 12), prompts), abs=1e-6)
    (tmp_path / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"--clip .* cannot be loaded: its tokenizer knows \d words of 54"):
        text_to_image.ClipScore(tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one(pipelines, latents, tmp_path):
    """By DDP and by FSDP, over gloo: a student as near to that of one process as sums in another order can be. Under
    FSDP one that was stopped goes on bit for bit."""
    few = ["--steps", "2", "--lr", "1e-3"]

    def run(name: str, *how: str) -> list[str]:
        return command("mmdit", pipelines, latents, tmp_path / name, *few, *how)

    assert trained(run("one")) == 0
    (tmp_path / "both.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train\nfrom distil import networks\n"
        "from distil.settings import parse\n"  # weights lie as on a GPU
        "networks.on_device = lambda net, device: net.to(device, memory_format=torch.channels_last)\n"
        f"ports, whole = {free_ports(4)}, {[run('ddp'), run('fsdp', '--fsdp')]}\n"
        f"stopped, save = {run('stopped', '--fsdp', '--save-every', '1')}, train.save_checkpoint\n\n\n"
        "def run(arguments):\n    os.environ['MASTER_PORT'] = ports.pop()\n"
        "    assert train.main(parse(arguments)) == 0\n\n\n"
        "def stop(*given):\n    save(*given)\n    raise KeyboardInterrupt\n\n\n"
        "run(whole[0])\nrun(whole[1])\n"
        "train.save_checkpoint = stop\ntry:\n    run(stopped)\nexcept KeyboardInterrupt:\n    pass\n"
        "train.save_checkpoint = save\nrun(stopped)\n"
    )
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    both = [
        subprocess.Popen([sys.executable, tmp_path / "both.py"], env={**env, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    try:
        assert [process.wait(timeout=300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    start = load(pipelines["mmdit"]).keep_blocks([0, 2]).state_dict()
    one, ddp, fsdp = (load(tmp_path / name / "student").state_dict() for name in ("one", "ddp", "fsdp"))
    moved = sum((one[name] - start[name]).norm() for name in one)
    for two in (ddp, fsdp):
        assert 0 < sum((one[name] - two[name]).norm() for name in one) < 0.02 * moved
    assert [json.loads(line)["step"] for line in (tmp_path / "stopped/log.jsonl").read_text().splitlines()] == [0, 1]
    assert same(load(tmp_path / "stopped/student").state_dict(), fsdp)


# ---- what is refused -------------------------------------------------------------------------------------------------


def make(kind, change, tmp_path):
    """A saved network of that kind whose config.json, or whose weights, were changed."""
    kind().save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    if isinstance(change, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        weights.unlink()
    return load(tmp_path)


def called(net, **cond):
    x, t, own = a_batch(net)
    return net(x, t, {"own": own, "none": None}.get(cond.get("which"), cond))


OF_XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 20}
NULL = {"text": torch.zeros(5, 12), "pooled": torch.zeros(10)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: bk_sdm(a_unet(), "huge"), "huge is no student of BK-SDM, choose from base, small, tiny, C_base"),
        (lambda p: bk_sdm(bk_sdm(a_unet(), "base"), "base"), "not 4 of 1, middle UNetMidBlock2DCrossAttn"),
        (lambda p: bk_sdm(an_mmdit(), "base"), "not a MMDiT"),
        (lambda p: bk_sdm(UNet(8, channels=32, channel_mults=(1,)), "base"), "not a UNet"),
        (lambda p: prune_depth(an_mmdit(), [1, 4]), "growing numbers from 0 to 3"),
        (lambda p: called(a_unet(), which="none"), "needs cond with text, but got nothing$"),
        (lambda p: called(an_mmdit(), y=torch.zeros(2)), "needs cond with text and pooled, but got y$"),
        (lambda p: an_mmdit().fit((4, 8, 8), {"text": NULL["text"]}), r"'pooled': 10\}, but the data has .*12\}$"),
        (lambda p: an_mmdit().fit((4, 8, 8)), "but the data has none$"),
        (lambda p: an_mmdit().fit((3, 8, 8), NULL), "takes 4 channels, height and width multiples of 2"),
        (lambda p: a_unet().fit((4, 8, 12), {"text": NULL["text"]}), "multiples of 8, not"),
        (lambda p: an_mmdit().fit((4, 32, 32), NULL), "positions for a height and width of 16 at most"),
        (lambda p: make(a_unet, "cut", p), "is cut off, damaged"),
        (lambda p: make(a_unet, "gone", p), r"has a config\.json, but no diffusion_pytorch_model\.safetensors"),
        (lambda p: make(a_unet, {"mid_block_type": None}, p), "absent by the config"),
        (lambda p: make(a_unet, {"layers_per_block": 3}, p), "absent in the weights"),
        (lambda p: make(a_unet, {"cross_attention_dim": 20}, p), r"\(8, 20\) by the config, but \(8, 12\)"),
        (lambda p: a_unet(**OF_XL), "told more than a text .text_time., as Stable Diffusion XL is: use one of 1 or 2"),
        (lambda p: Vae("nowhere"), "--vae nowhere is neither a folder nor a Hugging Face id such as owner/name"),
        (lambda p: Vae("owner/name"), "--vae owner/name cannot be loaded: "),
        (Vae, "cannot be loaded: it holds no diffusion_pytorch_model"),
        (lambda p: a_unet(num_class_embeds=3), r"told a class beside the text .3.: use one that reads text alone"),
        (TextEncoder, "has no text encoders that can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(call, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: [(p / "tokenizer" / name).unlink() for name in os.listdir(p / "tokenizer") if "config" not in name],
         r"its tokenizer knows \d words of 54: its vocabulary is missing"),
        (lambda p: (p / "text_encoder/model.safetensors").write_bytes(bytes(9)), "SD has no text encoders that can be"),
        (lambda p: (p / "model_index.json").write_text("[]"), "SD has no text encoders that can be read"),
    ],
)  # fmt: skip
def test_a_pipeline_whose_text_encoders_are_not_whole_is_refused(spoil, message, pipelines, tmp_path):
    shutil.copytree(pipelines["sd"], tmp_path / "SD")
    spoil(tmp_path / "SD")
    with pytest.raises(ValueError, match=message) as caught:
        TextEncoder(tmp_path / "SD")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_when_a_diffusers_student_is_saved(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(text_to_image, "save_file", full)
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors cannot be written: No space left"):
        a_unet().save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("sd", ["--teacher", "auto"], "needs --teacher, a diffusers pipeline"),
        ("sd", ["--teacher", "MMDIT"], "is a MMDiT: it goes with --arch mmdit, not sd"),
        ("sd", ["--process", "sd-v"], "was trained for the process sd: use --process sd"),
        ("mmdit", ["--process", "flow"], "was trained for the process sd3: use --process sd3"),
        ("mmdit", ["--data", "LATENTS"], "of widths {'text': 36, 'pooled': 24}, but the data has {'text': 16}"),
        ("sd", ["--student", "huge"], "is not a saved network"),
    ],
)
def test_runs_that_cannot_be_say_why(family, more, message, pipelines, latents, tmp_path, capsys):
    places = {"MMDIT": str(pipelines["mmdit"]), "LATENTS": str(latents["sd"])}
    arguments = command(family, pipelines, latents, tmp_path / "run", *(places.get(word, word) for word in more))
    assert message in refused(trained, arguments, capsys) and not (tmp_path / "run").exists()


def test_a_run_of_stable_diffusion_needs_the_name_of_a_student(pipelines, latents, capsys):
    where = ["--data", str(latents["sd"]), "--teacher", str(pipelines["sd"])]
    err = refused(trained, ["--dataset", "latents", "--arch", "sd", *where], capsys)
    assert "needs --student: base, small, tiny" in err


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_without_the_libraries_the_commands_say_what_to_install(
    missing, pipelines, captioned, latents, tmp_path, capsys, monkeypatch
):
    a_unet().save(tmp_path / "theirs")
    UNet(8, channels=32, channel_mults=(1,)).save(tmp_path / "ours")
    monkeypatch.setitem(sys.modules, missing, None)
    install = f'needs {missing}: pip install -e ".[sd]"'
    words = ["--vae", str(pipelines["sd"]), "--text", str(pipelines["sd"]), "--data", str(captioned)]
    assert refused(latent_space.main, [*words, "--out", str(tmp_path / "out")], capsys).endswith(install)
    if missing == "diffusers":
        assert refused(trained, command("sd", pipelines, latents, tmp_path / "run"), capsys).endswith(install)
        with pytest.raises(ImportError, match=f"{re.escape(install)}$"):
            load(tmp_path / "theirs")
    assert isinstance(load(tmp_path / "ours"), UNet) and data.load("latents", latents["sd"]).shape == (4, 8, 8)
