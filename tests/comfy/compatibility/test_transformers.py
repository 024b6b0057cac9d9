"""Every row about transformers of docs/compatibility.md in the real runtime: what it costs, and whose picture it is.

That the table and these rows are the same, `test_table.py` checks.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.tests.support import runtime
from comfyui_agd.tests.support import transformer_workflows as w
from comfyui_agd.tests.support.family_adapters import adapted, adapter_of
from comfyui_agd.tests.support.runtime import since, training_free
from comfyui_agd.tests.support.tiny_controls import TINY_CONTROLS
from comfyui_agd.tests.support.tiny_families import flat, tiny_model
from comfyui_agd.tests.support.transformer_workflows import TRANSFORMER_ROWS
from comfyui_agd.tests.support.workflows import TRAINING_FREE_STEPS, EvaluationCounter, Row, no_agd

pytestmark = pytest.mark.usefixtures("no_dead_models")


def cases() -> Iterator[Any]:
    """Every row and variant; that a node behind the loader is the same as before it, the one of "before" finds."""
    for row in TRANSFORMER_ROWS:
        slow = [pytest.mark.slow] if row.what.startswith("torch.compile") else []
        for variant in row.variants:
            if not variant.endswith(", after"):
                yield pytest.param(row, variant, id=f"{row.what}-{variant}", marks=slow)


each_case = pytest.mark.parametrize(("row", "variant"), list(cases()))


def family_of(variant: str) -> str:
    return TINY_CONTROLS[variant].family if variant in TINY_CONTROLS else variant.split(", ")[0]


def evaluate(row: Row, variant: str, base, agd) -> tuple[torch.Tensor, float]:
    """The sampled latent, and the evaluations that one prediction took."""
    counter = EvaluationCounter(WrappersMP.APPLY_MODEL)
    with torch.inference_mode():
        sampled = flat(row.run(lambda model, **options: counter(agd(model, **options)), base, variant))
    return sampled, counter.evaluations


def new_adapter(family: str, model, **settings):
    """`model` with an adapter that has learnt nothing."""
    info, _ = adapter_of(family)
    with torch.random.fork_rng():
        weights = Adapter(info.config).state_dict()
    return apply_adapter(model, info, weights, source="the file", notify=lambda message: None)


@each_case
def test_row(row, variant):
    if row.since:
        since(row.since)
    family, said = family_of(variant), []
    base = tiny_model(family)
    without, evaluations = evaluate(row, variant, base, no_agd)
    assert evaluations == pytest.approx(row.without)
    with_agd, evaluations = evaluate(row, variant, base, partial(adapted, family, notify=said.append))
    assert evaluations == pytest.approx(row.with_agd)
    assert with_agd.isfinite().all()
    if row.needs_both or row.as_base:
        assert torch.equal(with_agd, without)
    else:
        assert not torch.equal(with_agd, evaluate(row, variant, base, partial(new_adapter, family))[0])
    if variant.endswith(", before"):
        after = variant.replace("before", "after")
        assert torch.equal(evaluate(row, after, base, partial(adapted, family))[0], with_agd)
    expected = [f"No speed-up: {row.needs_both} needs both predictions"] if row.needs_both else []
    expected += [row.says] if row.says else []
    assert [re.split(r"[.,] |\.", message)[0] for message in said] == expected
    again, fresh = (evaluate(row, variant, model, no_agd)[0] for model in (base, tiny_model(family)))
    # Not to the bit: ComfyUI before 0.30 itself rounds otherwise once weights were patched.
    torch.testing.assert_close(again, fresh, atol=1e-4, rtol=1e-3)


@each_case
def test_row_with_training_free_guidance(row, variant, monkeypatch, smooth):
    if row.since:
        since(row.since)
    monkeypatch.setattr(runtime, "FEWEST_STEPS", TRAINING_FREE_STEPS)
    base, said = tiny_model(family_of(variant)), []
    without, _ = evaluate(row, variant, base, no_agd)
    guided, evaluations = evaluate(row, variant, base, partial(training_free, notify=said.append))
    assert evaluations == pytest.approx(row.with_training_free, abs=row.within)
    assert guided.isfinite().all()
    assert torch.allclose(guided, without, atol=2e-4, rtol=1e-3) == (row.with_training_free == row.without)
    assert bool(said) == (row.training_free_warns and not row.as_base)


@pytest.mark.parametrize(
    ("workflow", "family"),
    [(w.combine, w.JOINT), (w.masks, w.CROSS), (w.start_image, "wan2.1-i2v"), (w.inpainting, w.CROSS)]
    + [(w.reference_latents, family) for family in w.EDITING],
)
def test_what_the_workflow_adds_is_seen_beside_the_adapter(workflow, family):
    model = adapted(family, tiny_model(family))
    with torch.inference_mode():
        found = workflow(no_agd, model, family)
    assert (found - w.sample(family, model)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("family", w.BOTH)
def test_the_unmasked_part_of_an_inpainted_picture_is_kept(family):
    painted = flat(w.inpainting(no_agd, adapted(family, tiny_model(family)), family)).view(-1, 8)
    given = flat(w.noise(family)["samples"]).view(-1, 8)
    torch.testing.assert_close(painted[:, 0], given[:, 0], atol=1e-4, rtol=1e-4)
    assert (painted[:, -1] - given[:, -1]).norm() > 0.1 * given[:, -1].norm()


@pytest.mark.parametrize("family", w.BOTH)
def test_a_masked_prompt_is_in_its_region_alone(family):
    """One step, whose result is the prediction itself."""
    model = adapted(family, tiny_model(family))
    left, right = (w.sample(family, model, w.prompts(family, text), steps=1) for text in ("a fox", "a dog"))
    regional = w.masks(no_agd, model, family, steps=1)
    torch.testing.assert_close(regional[..., :4], left[..., :4], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(regional[..., 4:], right[..., 4:], atol=2e-4, rtol=2e-4)
