"""Live trajectories on a base whose answers are known."""

from dataclasses import replace

import pytest
import torch

from comfyui_agd.agd_core.guidance import RULES, cfg
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.model import EncodedPrompts
from comfyui_agd.training.pool import Batch, TrajectoryPool
from comfyui_agd.training.solvers import SOLVERS, Ancestral, SecondOrder, solver_step

TWO_SIZES = replace(CONFIG, aspect_ratios=("1:1", "2:1"))


def pool_of(config=CONFIG, rows: range = range(4), filled: bool = True) -> TrajectoryPool:
    model = AnalyticModel()

    def predict(x, sigma, positive, negative):
        return model.denoise(x, sigma, positive), model.denoise(x, sigma, negative)

    prompts = EncodedPrompts(model.encode(PROMPTS), model.encode(["", "a blot"]))
    pool = TrajectoryPool(model, prompts, config, rows, predict)
    if filled:
        pool.fill()
    return pool


def go_on(pool: TrajectoryPool, count: int, first: int = 0, share: float = 0.0) -> list[Batch]:
    """Batches of a student that is half way to the teacher."""
    batches = []
    for step in range(first, first + count):
        batch = pool.next(step)
        pool.advance(batch, (batch.cond + batch.target) / 2, share)
        batches.append(batch)
    return batches


def tensors(batch: Batch, rows: slice = slice(None)) -> torch.Tensor:
    names = ("x", "sigma", "omega", "positive", "negative", "cond", "uncond")
    return torch.cat([getattr(batch, name)[rows].double().flatten() for name in names])


def assert_equal(some: list[Batch], others: list[Batch], rows: slice = slice(None)) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(tensors(one, rows), tensors(other))


@pytest.mark.parametrize("config", [CONFIG, replace(TWO_SIZES, reuse=3, on_policy=0.5)])
def test_a_row_is_the_same_however_many_share_the_batch(config):
    whole, first, second = (go_on(pool_of(config, rows), 20, share=1.0) for rows in (range(4), range(2), range(2, 4)))
    assert_equal(whole, first, slice(0, 2))
    assert_equal(whole, second, slice(2, 4))


def test_a_batch_holds_what_the_teacher_says_there():
    model = AnalyticModel()
    for batch in go_on(pool_of(), 20):
        prompts = [model.encode(PROMPTS)[i] for i in batch.positive]
        torch.testing.assert_close(batch.cond, model.denoise(batch.x, batch.sigma, prompts))
        torch.testing.assert_close(batch.target, cfg(batch.cond, batch.uncond, batch.omega))
        assert (batch.omega >= CONFIG.omega_min).all()
        assert (batch.omega <= CONFIG.omega_max).all()
        assert (batch.sigma > 0).all()


BETTER = [name for name in RULES if name != "cfg"]


@pytest.mark.parametrize("teacher", BETTER)
def test_the_target_follows_the_teachers_rule_wherever_a_batch_comes_from(teacher):
    """New, visited before, and from a saved pool."""
    config = replace(CONFIG, teacher=teacher, reuse=2, interval_sigma_min=1.0, apg_threshold=3.0)
    first, second = pool_of(config), pool_of(config, filled=False)
    batches = go_on(first, 10)
    second.load_state_dict(*first.state_dict())
    for batch in [*batches, *go_on(second, 10, 1)]:
        expected = config.rule(batch.x, batch.sigma, batch.cond, batch.uncond, batch.omega)
        assert torch.equal(batch.target, expected)
    assert any(not torch.allclose(b.target, cfg(b.cond, b.uncond, b.omega), atol=0.01) for b in batches)


@pytest.mark.parametrize("teacher", BETTER)
def test_trajectories_follow_the_teachers_rule(teacher):
    """Also while the pool is filled: a step to the end goes to the target itself."""
    config = replace(CONFIG, teacher=teacher, solvers=("euler",), steps_min=2, steps_max=2, apg_threshold=3.0)
    pool = pool_of(config)
    plain = pool_of(replace(config, teacher="cfg"))
    assert not all(torch.allclose(one, other, atol=0.01) for one, other in zip(pool.x, plain.x, strict=True))
    batch = pool.next(0)
    column, first = batch.column, pool.numbers["position"][:, batch.column] == 0
    sigma_next = pool._sigma(torch.arange(4), column, 1)
    pool.advance(batch, torch.zeros_like(batch.x), 0.0)
    for row in first.nonzero()[:, 0].tolist():
        kept = sigma_next[row] / batch.sigma[row]
        torch.testing.assert_close(pool.x[column][row], kept * batch.x[row] + (1 - kept) * batch.target[row])
    assert first.any()


def test_batches_are_varied():
    """All prompts, all phases, all solvers, both schedules; rows at phases of their own."""
    pool, numbers = pool_of(), {name: set() for name in ("positive", "negative", "solver", "scheduler", "steps")}
    phases = []
    for step in range(150):
        (batch,) = go_on(pool, 1, step)
        phases.append(pool.numbers["position"][:, batch.column].tolist())
        for name, seen in numbers.items():
            seen |= set(pool.numbers[name].flatten().tolist())
    counts = {name: len(seen) for name, seen in numbers.items()}
    assert counts == {"positive": len(PROMPTS), "negative": 2, "solver": 3, "scheduler": 2, "steps": 3}
    assert {phase for row in phases for phase in row} == {0, 1, 2, 3, 4}
    assert sum(len(set(row)) > 1 for row in phases) > 100


def test_a_finished_trajectory_starts_anew_from_noise():
    """x follows the schedule: never a sigma of 0, never more than `steps` moves, and a new omega with each start."""
    pool, omegas = pool_of(replace(CONFIG, pool=1), range(1)), set()
    for step in range(60):
        (batch,) = go_on(pool, 1, step)
        omegas.add(batch.omega.item())
        assert pool.numbers["position"][0, 0] < pool.numbers["steps"][0, 0]
        assert (batch.x - batch.cond).std() < 3 * batch.sigma
    assert 60 / CONFIG.steps_max <= len(omegas) <= 60 / CONFIG.steps_min + 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_is_that_of_its_solver(solver):
    """From its noise to its end, DPM-Solver++ 2M with the prediction before, the student's where that was followed."""
    config = replace(CONFIG, pool=1, solvers=(solver,), schedulers=("karras",), steps_min=6, steps_max=6, on_policy=0.5)
    pool, sigmas, compared = pool_of(config, range(1)), AnalyticModel().sigmas("karras", 6), []
    before, sigma_before = None, None
    for step in range(60):
        position, generator = int(pool.numbers["position"][0, 0]), torch.Generator()
        generator.set_state(pool.generators[0].get_state())
        batch, policy = pool.next(step), pool.policy[0, 0].item()
        student = batch.target + 0.1
        denoised, sigma, sigma_next = student if policy < 0.5 else batch.target, batch.sigma, sigmas[position + 1, None]
        assert sigma == sigmas[position]
        noise = torch.randn(batch.x.shape[1:], generator=generator)[None]
        pool.advance(batch, student, 1.0)
        if sigma_next > 0 and (position == 0 or before is not None):
            ancestral = Ancestral(torch.tensor([solver == "euler_ancestral"]), noise)
            second = SecondOrder(torch.tensor([solver == "dpmpp_2m"]), before, sigma_before) if position > 0 else None
            expected = solver_step(batch.x, denoised, sigma, sigma_next, ancestral, second)
            torch.testing.assert_close(pool.x[0], expected)
            compared.append(policy < 0.5)
        before, sigma_before = denoised, sigma
    assert compared.count(True) > 10
    assert compared.count(False) > 10


@pytest.mark.parametrize("reuse", [1, 3])
def test_restored_generators_are_as_if_the_batch_had_not_been(reuse):
    config = replace(TWO_SIZES, reuse=reuse)
    pool, undisturbed = pool_of(config), go_on(pool_of(config), 20)
    for step, expected in enumerate(undisturbed):
        pool.next(step)
        pool.restore_generators()
        assert_equal([expected], go_on(pool, 1, step))


def test_an_interrupt_inside_the_teacher_can_be_undone():
    pool, expected = pool_of(), go_on(pool_of(), 2)
    predict = pool.predict

    def interrupted(*_):
        raise KeyboardInterrupt

    go_on(pool, 1)
    pool.predict = interrupted
    with pytest.raises(KeyboardInterrupt):
        pool.next(1)
    pool.restore_generators()
    pool.predict = predict
    assert_equal(expected[1:], go_on(pool, 1, 1))


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_restored_pool_goes_on_to_the_bit(stop, tmp_path):
    config = replace(TWO_SIZES, reuse=3, on_policy=0.5)
    whole, first = go_on(pool_of(config), 20, share=1.0), pool_of(config)
    go_on(first, stop, share=1.0)
    torch.save(first.state_dict(), tmp_path / "state")
    second = pool_of(config, filled=False)
    second.load_state_dict(*torch.load(tmp_path / "state", weights_only=True))
    assert_equal(whole[stop:], go_on(second, 20 - stop, stop, share=1.0))


def test_a_saved_state_does_not_move_with_the_pool():
    pool = pool_of()
    _, per_row = pool.state_dict()
    before = {name: value.clone() for name, value in per_row.items()}
    restored = pool_of(filled=False)
    restored.load_state_dict(*pool.state_dict())
    go_on(restored, 10)
    assert all(torch.equal(value, before[name]) for name, value in per_row.items())


def test_reuse_brings_the_same_states_with_other_omegas():
    pool = pool_of(replace(CONFIG, reuse=4))
    visits, again = [], []
    for step, batch in enumerate(go_on(pool, 40)):
        (visits if step % 4 == 0 else again).append(batch)
    for batch in again:
        seen = [v for v in visits if torch.equal(v.x, batch.x)]
        assert len(seen) == 1
        assert torch.equal(batch.cond, seen[0].cond)
        assert not torch.equal(batch.omega, seen[0].omega)
        torch.testing.assert_close(batch.target, cfg(batch.cond, batch.uncond, batch.omega))


def test_states_are_reused_from_recent_visits_only():
    pool = pool_of(replace(CONFIG, reuse=2, reuse_from=5))
    batches = go_on(pool, 40)
    assert len(pool.visited) == 5
    for step in range(1, 40, 2):
        recent = [b.x for b in batches[max(0, step - 2 * 5 + 1) : step] if b.column is not None]
        assert any(torch.equal(x, batches[step].x) for x in recent)


def test_only_new_visits_cost_evaluations():
    pool = pool_of(replace(CONFIG, reuse=3))
    costs = []
    for step in range(9):
        batch = pool.next(step)
        costs.append(pool.advance(batch, batch.target, 0.0))
    assert costs == [8, 0, 0] * 3


def test_filling_returns_what_it_cost():
    pool = pool_of(filled=False)
    seen = []
    spent = pool.fill(lambda done, total: seen.append((done, total)))
    assert spent == sum(pool.denoiser.base_rows)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_every_size_occurs_and_batches_are_of_one_size():
    config = replace(CONFIG, pool=1, aspect_ratios=("1:1", "2:1", "1:2"))
    shapes = [tuple(batch.x.shape[1:]) for batch in go_on(pool_of(config), 60)]
    wanted = {AnalyticModel().latent_shape(*bucket) for bucket in config.buckets()}
    assert set(shapes) == wanted
    assert len(wanted) == 3
    assert min(shapes.count(shape) for shape in wanted) > 10


@pytest.mark.parametrize(("share", "follow"), [(0.0, False), (0.24, False), (0.25, True), (1.0, True)])
def test_rows_on_policy_follow_the_student_from_on_policy_from_on(share, follow):
    """A step to the end goes to the denoised prediction itself, the student's or the teacher's."""
    config = replace(CONFIG, on_policy=0.5, on_policy_from=0.25, solvers=("euler",), steps_min=2, steps_max=2)
    pool, seen = pool_of(config, range(16)), set()
    for step in range(20):
        batch = pool.next(step)
        column, first = batch.column, pool.numbers["position"][:, batch.column] == 0
        policy, sigma_next = pool.policy[:, column].clone(), pool._sigma(torch.arange(16), column, 1)
        student = batch.target + 5
        pool.advance(batch, student, share)
        for row in first.nonzero()[:, 0].tolist():  # those that didn't start anew
            on_policy = bool(policy[row] < 0.5) and follow
            aim = (student if on_policy else batch.target)[row]
            kept = sigma_next[row] / batch.sigma[row]
            torch.testing.assert_close(pool.x[column][row], kept * batch.x[row] + (1 - kept) * aim)
            seen.add(on_policy)
    assert seen == ({True, False} if follow else {False})


def test_without_on_policy_the_student_changes_nothing():
    one, other = pool_of(), pool_of()
    for step in range(20):
        first, second = one.next(step), other.next(step)
        assert_equal([first], [second])
        one.advance(first, first.cond, 1.0)
        other.advance(second, torch.full_like(second.cond, float("nan")), 1.0)


def test_the_policy_is_that_share_of_the_trajectories():
    pool = pool_of(replace(CONFIG, on_policy=0.3, pool=10, steps_min=1, steps_max=1), range(40))
    assert (pool.policy < 0.3).float().mean().item() == pytest.approx(0.3, abs=0.06)
