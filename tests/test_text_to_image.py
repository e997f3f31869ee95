"""Stable Diffusion from captioned images to students: encode, distil, resume, sample, and back into diffusers.

The pipelines are tiny and random, and otherwise real: written by diffusers, with tokenizers, text encoders and a VAE.
"""

import contextlib
import csv
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import foreign
import train
from foreign import MMDiT, TextEncoder, TextUNet, load

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a", "ab", "a b", "c", "cab", "b a c", "bb", "ca"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAMILIES = ("sd", "mmdit")


def a_tokenizer(folder: Path):
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def an_encoder(kind, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 12, "max_position_embeddings": 8}
    tokens = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return kind(transformers.CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **tokens))


def a_vae(**settings):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1, **blocks, **settings
    )


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """{family: folder of a pipeline}."""
    folder = tmp_path_factory.mktemp("pipelines")
    tokenizer = a_tokenizer(folder)
    torch.manual_seed(0)
    unet = TextUNet.of(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16, 16),
            "attention_head_dim": (1, 2, 2, 2),
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            "use_linear_projection": True,
        }
    )
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    diffusers.StableDiffusionPipeline(
        vae=a_vae(sample_size=64),
        text_encoder=an_encoder(transformers.CLIPTextModel),
        tokenizer=tokenizer,
        unet=unet.net,
        scheduler=diffusers.DDIMScheduler(**scheduler, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd")
    mmdit = MMDiT.of(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 36,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 8,
        }
    )
    diffusers.StableDiffusion3Pipeline(
        vae=a_vae(sample_size=64, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=an_encoder(transformers.CLIPTextModelWithProjection),
        text_encoder_2=an_encoder(transformers.CLIPTextModelWithProjection, 1),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=mmdit.net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder / "mmdit")
    return {family: folder / family for family in FAMILIES}


def an_image(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (70 + i, 80, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i, caption in enumerate(CAPTIONS):
            an_image(i).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", caption])
    return folder


def encode(pipeline: Path, images: Path, out: Path, *more: str) -> int:
    where = ["--vae", str(pipeline), "--text", str(pipeline), "--data", str(images), "--out", str(out)]
    return data.main(["encode", *where, "--image-size", "64", "--batch", "3", *more])


@pytest.fixture(scope="module")
def latents(pipelines, images, tmp_path_factory) -> dict[str, Path]:
    """{family: folder of latents}."""
    folder = tmp_path_factory.mktemp("latents")
    assert [encode(pipelines[family], images, folder / family) for family in FAMILIES] == [0, 0]
    return {family: folder / family for family in FAMILIES}


STUDENT = {"sd": ["--student", "base"], "mmdit": ["--keep", "0,2"]}


def command(family: str, pipelines, latents, out: Path, *more: str) -> list[str]:
    where = ["--data", str(latents[family]), "--teacher", str(pipelines[family]), "--out", str(out)]
    small = ["--batch-size", "4", "--log-every", "1", "--eval-samples", "0"]
    return ["--dataset", "latents", "--arch", family, *STUDENT[family], *where, *small, *more]


# ---- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_pipeline(family, pipelines):
    encoder = TextEncoder(pipelines[family])
    with_others = diffusers.DiffusionPipeline.from_pretrained(
        pipelines[family], **({} if family == "sd" else {"text_encoder_3": None, "tokenizer_3": None})
    )
    prompts = ["a b", "a much longer prompt than fits", ""]
    ours = encoder.encode(prompts)
    if family == "sd":
        theirs = [with_others.encode_prompt(prompts, "cpu", 1, False)[0]]
    else:
        text, _, pooled, _ = with_others.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
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
    found = ours.encode(["a b"])
    torch.testing.assert_close(found, {"text": text, "pooled": pooled}, rtol=1e-4, atol=1e-4)
    small = TextEncoder(tmp_path, t5=False)
    assert small.stored == (8, 32)
    torch.testing.assert_close(small.encode(["a b"])["text"][:, :8], text[:, :8], rtol=1e-4, atol=1e-4)
    assert small.record["text_fingerprint"] != ours.record["text_fingerprint"]


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_lie_beside_their_latents(family, pipelines, latents):
    found, encoder = data.load("latents", latents[family]), TextEncoder(pipelines[family])
    assert found.shape == (4, 8, 8) and len(found.images) == 8 and found.labels is None
    rows = np.array([5, 0, 2])
    for name, value in found.conditions(rows).items():
        exact = encoder.encode([CAPTIONS[i] for i in rows])[name]
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact.bfloat16())
        assert torch.equal(found.no_condition[name], encoder.encode([""])[name][0].bfloat16())
    pixels, cond = next(data.batches(found, 8, seed=0))
    index = data.batch_indices(8, 8, 0, 0)
    assert pixels.shape == (8, 2, 4, 8, 8)
    assert {name: torch.equal(value, found.conditions(index)[name]) for name, value in cond.items()}
    assert set(cond) == set(encoder.shapes)


def test_a_broken_image_gives_its_place_with_the_caption_of_its_stand_in(pipelines, images, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_CORRUPT", 0.5)
    for file in images.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    assert encode(pipelines["sd"], tmp_path, tmp_path / "out") == 0
    text = data.load("latents", tmp_path / "out").conditions(np.arange(8))["text"]
    assert torch.equal(text[3], text[4]) and not torch.equal(text[3], text[2])


def test_captions_of_every_layout_are_the_same(images, tmp_path):
    tables, both = tmp_path / "jsonl", data.captioned(images)
    tables.mkdir()
    for i in range(len(CAPTIONS)):
        an_image(i).save(tables / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": text, "more": 1}) for i, text in enumerate(CAPTIONS)]
    (tables / "metadata.jsonl").write_text("\n".join(rows))
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for i, caption in enumerate(CAPTIONS):
        with tarfile.open(tars[i // 4], "a") as tar:
            png = io.BytesIO()
            an_image(i).save(png, "PNG")
            about = (".json", json.dumps({"caption": caption})) if i % 2 else (".txt", caption + "\n")
            for suffix, content in ((".png", png.getvalue()), (about[0], about[1].encode())):
                member = tarfile.TarInfo(f"{i:03d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert both.captions == CAPTIONS
    for source in (tables, tmp_path):
        found = data.captioned(source)
        assert found.captions == CAPTIONS
        for name, other in zip(found.files, both.files, strict=True):
            assert Image.open(found.open(name)).tobytes() == Image.open(both.open(other)).tobytes()
    assert data.captioned(tars[1]).captions == CAPTIONS[4:]


def test_captions_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        data.captioned(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no captions: it needs metadata\.csv or metadata\.jsonl"):
        data.captioned(tmp_path)
    for content, message in (
        ("file_name,caption\n0.png,a\n", "needs file_name and text, but one is .*caption"),
        ("file_name,text\n0.png,a\n", "names 1 images that are not there, such as 0.png"),
        ("file_name,text\n", "holds no image with a caption"),
    ):
        (tmp_path / "metadata.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            data.captioned(tmp_path)


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_from_captioned_images_to_a_student_inside_the_pipeline(
    family, pipelines, latents, tmp_path, capsys, monkeypatch
):
    run, few = tmp_path / "run", ["--steps", "8", "--batch-size", "8", "--lr", "1e-2", "--save-every", "4"]
    assert train.main(command(family, pipelines, latents, run, "--kd", "none", "out", "place", *few)) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {name: [line["loss"] for line in lines if line["method"] == name] for name in ("none", "out", "place")}
    assert len(lines) == 24 and np.isfinite([*losses.values()]).all() and lines[1]["w"] > 0
    assert sum(losses["none"][-3:]) < 0.92 * sum(losses["none"][:3])  # it learns these eight latents
    assert losses["none"][0] != losses["place"][0]

    # the same student alone, killed half-way and resumed
    keep = train.save_checkpoint

    def killed(settings, students, folder, step):
        keep(settings, students, folder, step)
        raise KeyboardInterrupt

    alone = command(family, pipelines, latents, tmp_path / "alone", *few)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(alone)
    assert not (tmp_path / "alone" / "student").exists() and train.main([*alone, "--recompute"]) == 2
    assert "--recompute was False, is True" in capsys.readouterr().err and train.main(alone) == 0
    student, again, teacher = (load(where) for where in (run / "student" / "place-0", tmp_path / "alone" / "student",
                                                         pipelines[family]))  # fmt: skip
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())

    metrics, sizes = (
        json.loads((run / "metrics.json").read_text()),
        [evaluate.parameters(x) for x in (student, teacher)],
    )
    assert [metrics["students"][1]["parameters"], metrics["teacher"]["parameters"]] == sizes
    assert 0 < metrics["students"][1]["macs"] < metrics["teacher"]["macs"] and sizes[0] < 0.8 * sizes[1]

    (tmp_path / "prompts.txt").write_text("a b\n\ncab\n")
    capsys.readouterr()
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "images"), "--sample-steps", "2"]
    assert evaluate.main([str(tmp_path / "alone"), *more]) == 0
    assert capsys.readouterr().out.startswith("2 prompts, an image each")
    a, b = (np.asarray(Image.open(tmp_path / "images" / name / "00001.png")) for name in ("teacher", "alone"))
    assert a.shape == (64, 64, 3) and (a != b).any()
    assert Image.open(tmp_path / "images" / "samples.png").size[0] > 128

    own = getattr(diffusers, student.kind).from_pretrained(run / "student" / "place-0")
    none = {} if family == "sd" else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines[family], **{student.folder: own}, **none)
    image = pipeline("a b", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    card = (run / "student" / "place-0" / "README.md").read_text()
    assert f'DiffusionPipeline.from_pretrained("{pipelines[family]}", {student.folder}=student)' in card


def test_training_drops_captions_for_teacher_and_students_alike(latents):
    found = data.load("latents", latents["sd"])
    settings = train.Settings(dataset="latents", arch="sd", student="base", teacher="x", batch_size=8)
    net = TextUNet.of({"sample_size": 8, "block_out_channels": (8, 8), "cross_attention_dim": 16, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")})  # fmt: skip
    null, share = found.no_condition, []
    process = train.process_named("sd")
    for dropout in (0.0, 0.5):
        net.fit(found.shape, null, dropout)
        for step in range(40):
            pixels, cond = torch.from_numpy(found.images[np.arange(8)]), found.conditions(np.arange(8))
            drawn = train.batch(settings, pixels, cond, slice(0, 8), True, process, step, torch.device("cpu"), net)
            dropped = (drawn.cond["text"] == null["text"]).flatten(1).all(1)
            assert torch.equal(drawn.cond["text"][~dropped], cond["text"][~dropped])
            share.append(dropped.float().mean().item())
    assert sum(share[:40]) == 0 and 0.35 < sum(share[40:]) / 40 < 0.65
    assert settings.caption_dropout == 0.1  # the preset


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(pipelines, latents, tmp_path):
    """By DDP and by FSDP, over gloo: a student as near to that of one process as sums in another order can be."""
    few = ["--steps", "2", "--device", "cpu", "--lr", "1e-3"]
    run = lambda name, *how: command("mmdit", pipelines, latents, tmp_path / name, *few, *how)  # noqa: E731
    assert train.main(run("one")) == 0
    with contextlib.ExitStack() as held:  # a port for each of the two runs
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    (tmp_path / "both.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        f"for port, run in zip({ports}, {[run('ddp'), run('fsdp', '--fsdp')]}):\n"
        "    os.environ['MASTER_PORT'] = port\n    assert train.main(run) == 0\n"
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


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_say_why(pipelines, latents, tmp_path, capsys):
    def error(family, *more):
        assert train.main(command(family, pipelines, latents, tmp_path / "run", *more)) == 2
        return capsys.readouterr().err

    sd, mmdit = str(pipelines["sd"]), str(pipelines["mmdit"])
    assert "needs --teacher, a diffusers pipeline" in error("sd", "--teacher", "auto")
    assert "is a MMDiT, but --arch sd takes a TextUNet" in error("sd", "--teacher", mmdit)
    assert "was trained for the process sd: use --process sd" in error("sd", "--process", "sd-v")
    assert "was trained for the process sd3: use --process sd3" in error("mmdit", "--process", "flow")
    assert "reads embeddings of widths {'text': 36, 'pooled': 24}, but the data has {'text': 16}" in error(
        "mmdit", "--data", str(latents["sd"])
    )
    assert "is not a saved network" in error("sd", "--student", "huge")
    assert not (tmp_path / "run").exists()
    assert train.main(["--dataset", "latents", "--arch", "sd", "--data", str(latents["sd"]), "--teacher", sd]) == 2
    assert "needs --student: base, small, tiny" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_without_the_libraries_the_commands_say_what_to_install(
    missing, pipelines, images, latents, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    install = "pip install -r requirements-diffusers.txt\n"
    assert encode(pipelines["sd"], images, tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith(install)
    if missing == "diffusers":
        assert train.main(command("sd", pipelines, latents, tmp_path / "run")) == 2
        assert capsys.readouterr().err.endswith(install)
        assert evaluate.main([str(pipelines["sd"]), "--prompts", "x", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.endswith(install)
    assert data.load("latents", latents["sd"]).shape == (4, 8, 8)


def test_evaluation_of_what_cannot_be_sampled_says_why(pipelines, tmp_path, capsys):
    for more, message in (
        (["--num", "6", "--dataset", "digits"], "give --prompts FILE, with a prompt a line"),
        (["--prompts", "p.txt"], "these networks need --teacher"),
        (["--prompts", str(tmp_path / "empty.txt"), "--teacher", str(pipelines["sd"])], "holds no prompt"),
    ):
        (tmp_path / "empty.txt").write_text("\n")
        assert evaluate.main([str(pipelines["sd"]), "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    assert foreign.EXPORT.keys() == set(FAMILIES)
