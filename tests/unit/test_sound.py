"""A video's latent and its sound's as one."""

import pytest
import torch

from comfyui_agd.agd_core.sound import Sound

SOUND = Sound(channels=8, bins=16, per_frame=8)


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 15, 27), (3, 5, 7), (13, 17, 30)])
def test_both_as_one_come_apart_again(size):
    video, sound = torch.randn(2, 4, *size), torch.randn(2, *SOUND.shape(size[0]))
    both = SOUND.join(video, sound)
    assert both.shape == (2, 4 + SOUND.extra_channels(size), *size)
    assert torch.equal(both[:, :4], video)  # as a preview shows it
    for found, given in zip(SOUND.split(both), (video, sound), strict=True):
        assert torch.equal(found, given)
    assert both.norm() ** 2 == pytest.approx(float(video.norm() ** 2 + sound.norm() ** 2))  # the rest are zeros


def test_the_sound_is_as_long_as_the_video():
    """97 pictures at 25 a second: ComfyUI's LTXVEmptyLatentAudio makes 97 steps."""
    assert SOUND.shape(13) == (8, 97, 16)
