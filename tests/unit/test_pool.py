"""Live trajectories on a base whose answers are known."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch

from comfyui_agd.agd_core.guidance import RULES, cfg
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.model import EncodedPrompts
from comfyui_agd.training.pool import Batch, TrajectoryPool
from comfyui_agd.training.solvers import SOLVERS, Ancestral, SecondOrder, solver_step

TWO_SIZES = replace(CONFIG, aspect_ratios=("1:1", "2:1"))


def pool_of(config=CONFIG, rows: range = range(4)) -> TrajectoryPool:
    model = AnalyticModel()

    def predict(x, sigma, positive, negative):
        return model.denoise(x, sigma, positive), model.denoise(x, sigma, negative)

    prompts = EncodedPrompts(model.encode(PROMPTS), model.encode(["", "a blot"]))
    return TrajectoryPool(model, prompts, config, rows, predict)


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
    first, second = pool_of(config), pool_of(config)
    batches = go_on(first, 10)
    second.load_state_dict(*first.state_dict())
    for batch in [*batches, *go_on(second, 10, 1)]:
        expected = config.rule(batch.x, batch.sigma, batch.cond, batch.uncond, batch.omega)
        assert torch.equal(batch.target, expected)
    assert any(not torch.allclose(b.target, cfg(b.cond, b.uncond, b.omega), atol=0.01) for b in batches)


@pytest.mark.parametrize("teacher", BETTER)
def test_trajectories_follow_the_teachers_rule(teacher):
    """Also where a column is brought to its phases: a step to the end goes to the target itself."""
    config = replace(CONFIG, teacher=teacher, solvers=("euler",), steps_min=2, steps_max=2, apg_threshold=3.0)
    pool, plain = pool_of(config, range(16)), pool_of(replace(config, teacher="cfg"), range(16))
    batch = pool.next(0)
    assert not torch.allclose(batch.x, plain.next(0).x, atol=0.01)
    first = pool.chosen.numbers["position"] == 0
    sigma_next = pool._sigma(torch.arange(16), pool.chosen, 1)
    pool.advance(batch, torch.zeros_like(batch.x), 0.0)
    for row in first.nonzero()[:, 0].tolist():
        kept, x = sigma_next[row] / batch.sigma[row], pool.columns[batch.column].x[row]
        torch.testing.assert_close(x, kept * batch.x[row] + (1 - kept) * batch.target[row])
    assert first.any()


def test_batches_are_varied():
    """All prompts, all phases, all solvers, both schedules; rows at phases of their own."""
    pool, numbers = pool_of(), {name: set() for name in ("positive", "negative", "solver", "scheduler", "steps")}
    phases = []
    for step in range(150):
        go_on(pool, 1, step)
        phases.append(pool.chosen.numbers["position"].tolist())
        for name, seen in numbers.items():
            seen |= set(pool.chosen.numbers[name].tolist())
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
        assert pool.chosen.numbers["position"] < pool.chosen.numbers["steps"]
        assert (batch.x - batch.cond).std() < 3 * batch.sigma
    assert 60 / CONFIG.steps_max <= len(omegas) <= 60 / CONFIG.steps_min + 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_is_that_of_its_solver(solver):
    """From its noise to its end, DPM-Solver++ 2M with the prediction before, the student's where that was followed."""
    config = replace(CONFIG, pool=1, solvers=(solver,), schedulers=("karras",), steps_min=6, steps_max=6, on_policy=0.5)
    pool, sigmas, compared = pool_of(config, range(1)), AnalyticModel().sigmas("karras", 6), []
    before, sigma_before = None, None
    for step in range(60):
        batch, policy, generator = pool.next(step), pool.chosen.policy.item(), torch.Generator()
        position = pool.chosen.numbers["position"].item()
        generator.set_state(pool.generators[0].get_state())
        student = batch.target + 0.1
        denoised, sigma, sigma_next = student if policy < 0.5 else batch.target, batch.sigma, sigmas[position + 1, None]
        assert sigma == sigmas[position]
        noise = torch.randn(batch.x.shape[1:], generator=generator)[None]
        pool.advance(batch, student, 1.0)
        if sigma_next > 0 and (position == 0 or before is not None):
            ancestral = Ancestral(torch.tensor([solver == "euler_ancestral"]), noise)
            second = SecondOrder(torch.tensor([solver == "dpmpp_2m"]), before, sigma_before) if position > 0 else None
            expected = solver_step(batch.x, denoised, sigma, sigma_next, ancestral, second)
            torch.testing.assert_close(pool.columns[0].x, expected)
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


# Of the noise levels 10 to 0.1: those of a first expert, and of a second one that comes to them through the first's.
RANGES = [{"sigma_from": 4.0}, {"sigma_to": 4.0}]


@pytest.mark.parametrize("settings", [{}, *RANGES])
def test_an_interrupt_inside_any_evaluation_can_be_undone(settings):
    """While a column is brought to its phases or to what is learnt too: what was done of it is as if it hadn't been."""
    config = replace(CONFIG, **settings)
    undisturbed = pool_of(config)
    expected = go_on(undisturbed, 8)
    for at in range(len(undisturbed.denoiser.base_rows) // 2):
        pool, seen = pool_of(config), []
        interrupt_at(pool, at)
        with contextlib.suppress(KeyboardInterrupt):
            while len(seen) < 8:
                seen += go_on(pool, 1, len(seen))
        assert len(seen) < 8
        pool.restore_generators()
        restored = pool_of(config)
        restored.load_state_dict(*pool.state_dict())
        assert_equal(expected, seen + go_on(restored, 8 - len(seen), len(seen)))


def interrupt_at(pool: TrajectoryPool, evaluation: int) -> None:
    """The pool's evaluation of that number doesn't end, as when ComfyUI is interrupted."""
    numbers, predict = itertools.count(), pool.predict

    def interrupted(*args):
        if next(numbers) == evaluation:
            raise KeyboardInterrupt
        return predict(*args)

    pool.predict = interrupted


def test_a_caller_may_stop_before_any_evaluation_of_a_column_that_is_started():
    pool, rows = pool_of(), []

    def stop(done, total):
        rows.append(len(pool.denoiser.base_rows))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.next(0, stop)
    assert rows == [0]
    pool.restore_generators()
    assert_equal(go_on(pool_of(), 3), go_on(pool, 3))


def test_a_column_is_started_when_it_is_first_taken():
    """A pool that was saved by an earlier version, all of whose columns were started, goes on with them."""
    pool = pool_of(replace(CONFIG, pool=6))
    assert pool.denoiser.base_rows == []
    taken = {batch.column for batch in go_on(pool, 4)}
    assert {i for i, column in enumerate(pool.columns) if column.started} == taken
    assert len(taken) < 6
    shared, per_row = pool.state_dict()
    restored = pool_of(replace(CONFIG, pool=6))
    restored.load_state_dict({name: value for name, value in shared.items() if name != "started"}, per_row)
    assert all(column.started for column in restored.columns)


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_restored_pool_goes_on_to_the_bit(stop, tmp_path):
    config = replace(TWO_SIZES, reuse=3, on_policy=0.5)
    whole, first = go_on(pool_of(config), 20, share=1.0), pool_of(config)
    go_on(first, stop, share=1.0)
    torch.save(first.state_dict(), tmp_path / "state")
    second = pool_of(config)
    second.load_state_dict(*torch.load(tmp_path / "state", weights_only=True))
    assert_equal(whole[stop:], go_on(second, 20 - stop, stop, share=1.0))


def test_a_saved_state_does_not_move_with_the_pool():
    pool = pool_of()
    go_on(pool, 10)
    _, per_row = pool.state_dict()
    before = {name: value.clone() for name, value in per_row.items()}
    restored = pool_of()
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
    pool, costs = pool_of(replace(CONFIG, reuse=3, steps_min=1, steps_max=1)), []  # started columns are at their phase
    for step in range(9):
        batch = pool.next(step)
        costs.append(pool.advance(batch, batch.target, 0.0))
    assert costs == [8, 0, 0] * 3


@pytest.mark.parametrize("settings", [{}, {"reuse": 2}, *RANGES])
def test_all_evaluations_are_counted_and_those_that_start_a_column_reported(settings):
    """Of a column from none to all that it takes, in rows."""
    pool, spent, reported = pool_of(replace(CONFIG, **settings)), 0, 0
    for step in range(12):
        told = []
        batch = pool.next(step, lambda *report, told=told: told.append(report))
        spent += pool.advance(batch, batch.target, 0.0)
        assert spent == sum(pool.denoiser.base_rows)
        assert told == sorted(told)
        if told:
            assert (told[0][0], told[-1][0]) == (0, told[-1][1])
            reported += told[-1][1]
    visits = 12 // pool.config.reuse
    assert reported == spent - 2 * 4 * visits > 0


@pytest.mark.parametrize("settings", RANGES)
def test_only_states_in_the_range_are_learnt_from_and_rows_are_varied_there(settings):
    """Through other noise levels trajectories come to it, and past it they start anew, for nothing."""
    config = replace(CONFIG, **settings)
    pool, sigmas = pool_of(config), []
    predict = pool.predict
    pool.predict = lambda x, sigma, *rest: (sigmas.extend(sigma.tolist()), predict(x, sigma, *rest))[1]
    batches = go_on(pool, 60)
    assert all(config.learns_at(batch.sigma).all() for batch in batches)
    assert len({round(sigma, 4) for batch in batches for sigma in batch.sigma.tolist()}) > 3
    others = [sigma for sigma in sigmas if not config.learns_at(torch.tensor(sigma))]
    assert all(sigma >= 4.0 for sigma in others)
    assert bool(others) == ("sigma_to" in settings)


def test_a_range_without_a_noise_level_is_refused_before_any_evaluation():
    with pytest.raises(ValueError, match=r"No step .* from 0.2 to 0.20001 in 3 to 5 steps: choose a wider range"):
        pool_of(replace(CONFIG, sigma_from=0.2, sigma_to=0.20001))


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
        first, policy = pool.chosen.numbers["position"] == 0, pool.chosen.policy.clone()
        sigma_next = pool._sigma(torch.arange(16), pool.chosen, 1)
        student = batch.target + 5
        pool.advance(batch, student, share)
        for row in first.nonzero()[:, 0].tolist():  # those that didn't start anew
            on_policy = bool(policy[row] < 0.5) and follow
            aim = (student if on_policy else batch.target)[row]
            kept = sigma_next[row] / batch.sigma[row]
            x = pool.columns[batch.column].x[row]
            torch.testing.assert_close(x, kept * batch.x[row] + (1 - kept) * aim)
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
    pool = pool_of(replace(CONFIG, on_policy=0.3, steps_min=1, steps_max=1), range(400))
    pool.next(0)
    assert (pool.chosen.policy < 0.3).float().mean().item() == pytest.approx(0.3, abs=0.06)


def test_batches_wait_without_their_target_and_as_precise_as_the_base_computes(monkeypatch):
    pool = pool_of(replace(CONFIG, reuse=2))
    go_on(pool, 4)
    assert {each.x.dtype for each in pool.visited} == {torch.float32}
    assert not any("target" in vars(batch) for batch in pool.visited)
    monkeypatch.setattr(AnalyticModel, "computes_in", torch.bfloat16)
    half = pool_of(replace(CONFIG, reuse=2))
    batches = go_on(half, 4)
    for batch, kept in zip(batches[::2], half.visited, strict=True):
        assert (batch.x.dtype, kept.x.dtype, kept.sigma.dtype) == (torch.float32, torch.float16, torch.float32)
        torch.testing.assert_close(kept.cond.float(), batch.cond, rtol=1e-3, atol=1e-3)
    assert batches[1].x.dtype == torch.float32


def test_a_pool_goes_on_to_the_same_batches_in_half_precision(monkeypatch):
    monkeypatch.setattr(AnalyticModel, "computes_in", torch.bfloat16)
    config = replace(CONFIG, reuse=3, reuse_from=2)
    whole, stopped, resumed = (pool_of(config) for _ in range(3))
    expected = go_on(whole, 14)[8:]
    go_on(stopped, 8)
    resumed.load_state_dict(*stopped.state_dict())
    assert_equal(expected, go_on(resumed, 6, first=8))


def test_a_pool_goes_on_with_as_many_batches_to_reuse_as_it_began_with():
    began, resumed = (pool_of(replace(CONFIG, reuse=2, reuse_from=count)) for count in (2, 8))
    go_on(began, 8)
    resumed.load_state_dict(*began.state_dict())
    assert_equal(go_on(began, 6, first=8), go_on(resumed, 6, first=8))
    assert len(resumed.visited) == 2
