"""benchmarks/deep_stacks.py: a deeper toy, and adapters that work in some of its blocks."""

import json

import pytest
import torch

from comfyui_agd.benchmarks import deep_stacks
from comfyui_agd.examples.toy import model as toy


def test_made_deeper_the_toy_is_what_it_was():
    deep = deep_stacks.deep_base().build().diffusion_model
    deep_stacks.deepen(deep)
    model, x = (
        toy.load_unet().model.diffusion_model,
        torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1)),
    )
    given = torch.tensor([3.0, 700.0]), torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(deep(x, *given), model.float()(x, *given), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_command_makes_it_deeper_and_compares_adapters(tmp_path, monkeypatch):
    monkeypatch.setattr(deep_stacks, "_POOL", 50)
    deep_stacks.main(["--quick", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "deep_stacks.json").read_text())
    names = [variant.name for variant in deep_stacks.variants()]
    assert [row["variant"] for row in rows if "teacher_evaluations" in row] == names
    assert "| the first and the last |" in (tmp_path / "deep_stacks.md").read_text()
