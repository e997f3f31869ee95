"""What of a run cannot work."""

import pytest
from conftest import a_dit, a_unet, some_latents

from distil import checks, data, teachers
from distil.settings import Settings


def test_a_student_has_no_more_blocks_than_its_teacher():
    settings = Settings(dataset="latents", data="latents", student="mine")
    checks.check_students(settings, some_latents(), a_dit(4), a_dit(4))
    with pytest.raises(ValueError, match="--student mine has 6 blocks, its teacher 4: use a student with at most as m"):
        checks.check_students(settings, some_latents(), a_dit(4), a_dit(6))


def test_a_head_is_for_networks_that_can_have_one(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    net = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    net.save_pretrained(tmp_path)
    foreign, digits = teachers.load(tmp_path), data.load("digits")
    settings = Settings(head="statistics", norm_groups="keep")
    with pytest.raises(ValueError, match="but the students are of UNet2DModel: leave it out"):
        checks.check_students(settings, digits, foreign, None)
    given = Settings(head="statistics", norm_groups="keep", student="mine", lambda_feat=0.0)
    with pytest.raises(ValueError, match="but the student is of UNet2DModel: leave it out"):
        checks.check_students(given, digits, None, foreign)
    checks.check_students(given, digits, foreign, a_unet())
