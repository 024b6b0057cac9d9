"""Every row of docs/compatibility.md in the real runtime: what it costs, and whose picture it is."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from comfyui_agd.tests.support import runtime
from comfyui_agd.tests.support.runtime import ksampler, patched, since, training_free
from comfyui_agd.tests.support.transformer_workflows import TRANSFORMER_ROWS
from comfyui_agd.tests.support.workflows import (
    AROUND,
    PROMPTS,
    ROWS,
    TRAINING_FREE_STEPS,
    EvaluationCounter,
    Row,
    no_agd,
)

DOCS = Path(__file__).resolve().parents[3] / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def plain(base):
    return ksampler(base, PROMPTS, steps=1)


def evaluate(row: Row, variant: str, base, agd) -> tuple[torch.Tensor, float]:
    """The sampled latent, and the evaluations that one prediction took."""
    counter = EvaluationCounter()
    with torch.inference_mode():
        sampled = row.run(lambda model, **options: counter(agd(model, **options)), base, variant)
    return sampled, counter.evaluations


KINDS = [("cross_attention", 0), ("delta", 0), ("delta", 4)]


def cases(kinds: list | None = None):
    """Every row and variant. Where kinds of adapters can't differ, the default one is enough."""
    for row in ROWS:
        once = row.needs_both or row.own_evaluation or row.as_base or len(row.variants) > len(KINDS)
        for variant in row.variants[:1] if row.variants == AROUND else row.variants:
            name = f"{row.what}-{variant}" if variant else row.what
            if kinds is None:
                yield pytest.param(row, variant, id=name)
            for kind in () if kinds is None else kinds[-1:] if once else kinds:
                yield pytest.param(row, variant, kind, id=f"{name}-{kind[0]}-{kind[1]}")


@pytest.mark.parametrize(("row", "variant", "kind"), cases(KINDS))
def test_row(base, adapters, plain, row, variant, kind):
    if row.since:
        since(row.since)
    messages, file = [], adapters(kind)
    agd = partial(patched, file=file, notify=messages.append)
    without, evaluations = evaluate(row, variant, base, no_agd)
    assert evaluations == pytest.approx(row.without)
    with_agd, evaluations = evaluate(row, variant, base, agd)
    assert evaluations == pytest.approx(row.with_agd)
    assert torch.isfinite(with_agd).all()
    if row.needs_both or row.own_evaluation or row.as_base:
        assert torch.equal(with_agd, without)
    else:
        untrained, _ = evaluate(row, variant, base, partial(patched, file=adapters(kind, make=as_it_is)))
        assert not torch.equal(with_agd, untrained)
    if row.variants == AROUND:
        assert torch.equal(evaluate(row, "after", base, partial(patched, file=file))[0], with_agd)
    expected = [f"No speed-up: {row.needs_both.format(variant)} needs both predictions"] if row.needs_both else []
    bypassed = f"The adapter is bypassed: {row.own_evaluation} guides by itself"
    expected += [bypassed] if row.own_evaluation else []
    assert [re.split(r"[.,] ", message)[0] for message in messages] == expected
    assert torch.equal(ksampler(base, PROMPTS, steps=1), plain)


def as_it_is(adapter):
    """One that has learnt nothing."""
    return adapter


@pytest.mark.parametrize(("row", "variant"), cases())
def test_row_with_training_free_guidance(base, plain, row, variant, monkeypatch, smooth):
    if row.since:
        since(row.since)
    monkeypatch.setattr(runtime, "FEWEST_STEPS", TRAINING_FREE_STEPS)
    without, _ = evaluate(row, variant, base, no_agd)
    messages = []
    agd = partial(training_free, notify=messages.append)
    if not row.with_training_free:
        with pytest.raises(ValueError, match="guidance of an AGD node already"):
            evaluate(row, variant, base, agd)
        return
    guided, evaluations = evaluate(row, variant, base, agd)
    assert evaluations == pytest.approx(row.with_training_free, abs=row.within)
    assert torch.isfinite(guided).all()
    assert torch.allclose(guided, without, atol=2e-4) == (row.with_training_free == row.without)
    assert bool(messages) == (row.training_free_warns and not row.as_base)
    monkeypatch.undo()
    assert torch.equal(ksampler(base, PROMPTS, steps=1), plain)


def tables() -> Iterator[dict[str, tuple[float, float, float]]]:
    """Of the documentation's tables, evaluations without AGD, with an adapter and training-free for each row."""
    for table in re.findall(r"(?:^\|.*\n)+", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE):
        cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines()[2:]]
        yield {what: tuple(0.0 if n == "refused" else float(n) for n in counts[:3]) for what, *counts in cells}


def test_the_documented_tables_are_what_is_tested():
    assert list(tables()) == [
        {row.what: (row.without, row.with_agd, round(row.with_training_free, 2)) for row in rows}
        for rows in (ROWS, TRANSFORMER_ROWS)
    ]
