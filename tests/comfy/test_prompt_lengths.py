"""Prompts of several lengths in one batch: each row is evaluated as it is alone, with its own tokens and no others."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.sampler_helpers
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.model.denoiser import ComfyDenoiser
from comfyui_agd.agd_core.comfyui.model.text_encoder import EncodedPrompt
from comfyui_agd.tests.support.family_adapters import config_of
from comfyui_agd.tests.support.runtime import TinyUNet, random_prompts, tiny
from comfyui_agd.tests.support.small import config_for, randomised
from comfyui_agd.tests.support.tiny_families import conditioning, tiny_model

CHUNK = 77  # tokens of CLIP's
CHUNKS, NEGATIVE_CHUNKS = (5, 2, 1, 3, 7, 2, 4), (1, 1, 2, 3, 1, 1, 1)
ROWS, TOKENS = len(CHUNKS), CHUNK * sum(CHUNKS)
CASES = [("unet", "delta"), ("unet", "cross_attention"), ("sd3", "delta"), ("lumina2", "delta"), ("pixart", "delta")]


def encoded(name: str, chunks: int, text: str, kind: str = "positive") -> EncodedPrompt:
    length = CHUNK * chunks
    if name == "unet":
        conds = random_prompts(lengths=(length, 1), seed=chunks + len(text)).positive
    else:
        ((cond, entries),) = conditioning(name, text, length)
        conds = [[cond, {"pooled_output": None, **entries}]]
    return EncodedPrompt(comfy.sampler_helpers.convert_cond(conds)[0], kind)


class Case:
    """A tiny base, an adapter of it that does something, and a batch of states with prompts of several lengths."""

    def __init__(self, name: str, kind: str):
        self.model = tiny(TinyUNet()) if name == "unet" else tiny_model(name)
        self.denoiser = ComfyDenoiser(self.model)
        layers = describe_base(self.model.model).layers
        small = {"hidden": 8, "rank": 2, "encoder_width": 8}
        config = config_for(layers, kind, prompt_tokens=16, **small) if name == "unet" else config_of(name, kind)
        self.adapter = randomised(Adapter(config))
        side = 512 if name == "pixart" else 64
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, *self.denoiser.latent_shape(side, side), generator=generator)
        self.sigma, self.omega = torch.linspace(0.2, 0.9, ROWS), torch.linspace(2.0, 8.0, ROWS)
        self.prompts = [encoded(name, chunks, f"prompt {row}") for row, chunks in enumerate(CHUNKS)]
        self.negative = [encoded(name, chunks, "unwanted", "negative") for chunks in NEGATIVE_CHUNKS]

    def teacher(self, rows: list[int]) -> torch.Tensor:
        return self.denoiser.denoise(self.x[rows], self.sigma[rows], [self.prompts[row] for row in rows])

    def student(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions, and the gradients of a loss that rows add up to."""
        self.adapter.zero_grad()
        prompts, negative = ([each[row] for row in rows] for each in (self.prompts, self.negative))
        out = self.denoiser.student(self.adapter, self.x[rows], self.sigma[rows], prompts, negative, self.omega[rows])
        out.square().sum().backward()
        found = [parameter.grad.flatten() for parameter in self.adapter.parameters() if parameter.grad is not None]
        return out.detach(), torch.cat(found)

    @contextmanager
    def counting_tokens(self) -> Iterator[list[int]]:
        """The rows times the tokens of each of the network's evaluations."""
        counts: list[int] = []

        def count(module, args, kwargs):
            counts.append(kwargs["context"].shape[0] * kwargs["context"].shape[1])

        handle = self.model.model.diffusion_model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield counts
        finally:
            handle.remove()


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request):
    found = Case(*request.param)
    with found.denoiser.session():
        yield found


def test_a_row_of_the_base_is_what_it_is_alone_and_no_token_is_evaluated_twice(case):
    with case.counting_tokens() as counts:
        together = case.teacher(list(range(ROWS)))
    assert sum(counts) == TOKENS
    assert len(counts) < ROWS  # rows of equal lengths are evaluated together
    alone = torch.cat([case.teacher([row]) for row in range(ROWS)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    backwards = case.teacher(list(range(ROWS))[::-1])
    torch.testing.assert_close(backwards.flip(0), alone, rtol=1e-4, atol=1e-4)


def test_a_row_of_the_student_is_what_it_is_alone_and_so_are_its_gradients(case):
    with case.counting_tokens() as counts:
        together, gradients = case.student(list(range(ROWS)))
    # Where prompts go through the blocks, both kinds do once more, for their keys and values.
    assert sum(counts) <= 2 * TOKENS + CHUNK * sum(NEGATIVE_CHUNKS)
    alone, parts = zip(*(case.student([row]) for row in range(ROWS)), strict=True)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    whole = torch.stack(parts).sum(0)
    torch.testing.assert_close(gradients, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())
    assert (together - case.teacher(list(range(ROWS)))).abs().max() > 1e-3


def test_lengths_whose_common_multiple_is_far_from_any_of_them_are_evaluated_one_by_one(case):
    """Of each of these pairs ComfyUI's own limit, compared two at a time, lets one be repeated."""
    rows = [CHUNKS.index(chunks) for chunks in (1, 2, 3, 4)]
    with case.counting_tokens() as counts:
        case.teacher(rows)
    assert counts == [CHUNK * chunks for chunks in (1, 2, 3, 4)]
