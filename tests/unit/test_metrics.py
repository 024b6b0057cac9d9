"""Metrics and standard errors of sets whose answers are known."""

import pytest
import torch

from comfyui_agd.benchmarks import metrics
from comfyui_agd.benchmarks.metrics import UnwantedSeen
from comfyui_agd.examples.toy.standard_errors import jackknife, mean_and_error


def normal(rows: int, seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_the_frechet_distance_of_shifted_gaussians_is_the_square_of_the_shift():
    shift = torch.tensor([3.0, 0.0, 4.0, 0.0])
    distance, error = metrics.frechet(normal(4000, 0) + shift, normal(4000, 1))
    assert distance == pytest.approx(25, abs=4 * error)
    assert 0 < error < 0.5


def test_the_frechet_distance_of_scaled_gaussians_is_that_of_their_deviations():
    distance, error = metrics.frechet(3 * normal(4000, 0), normal(4000, 1))
    assert distance == pytest.approx(4 * (3 - 1) ** 2, abs=4 * error)


def test_a_difference_of_distances_is_surer_than_either():
    samples, reference = normal(1000, 0) + 2, normal(4000, 1)
    difference, error = metrics.frechet_above(samples + torch.tensor([0.1, 0, 0, 0]), samples, reference)
    assert difference == pytest.approx(2.1**2 - 2**2, abs=4 * error)
    assert error < metrics.frechet(samples, reference)[1] / 5
    assert metrics.frechet_above(samples, samples, reference) == (0, 0)


def test_the_jackknife_of_a_mean_is_its_usual_standard_error():
    values = normal(1600, 2, 1)[:, 0]
    mean, error = jackknife(lambda own: values[own].mean().item(), len(values))
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(1 / 40, rel=0.5)
    assert mean_and_error(values)[1] == pytest.approx(1 / 40, rel=0.05)


def test_the_error_of_a_share_is_the_binomial_one():
    share, error = mean_and_error(torch.arange(100) < 20)
    assert share == pytest.approx(0.2)
    assert error == pytest.approx((0.2 * 0.8 / 99) ** 0.5)


def precision_and_recall(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    precision = metrics.precision(samples, metrics.Reference(reference, metrics.radii(reference)))[0]
    return precision, metrics.recall(samples, reference)[0]


def test_equal_sets_have_full_precision_and_recall():
    samples = normal(200, 3)
    assert precision_and_recall(samples, samples) == (1, 1)


def test_disjoint_sets_have_neither():
    assert precision_and_recall(normal(200, 3) + 100, normal(200, 4)) == (0, 0)


def test_samples_of_one_of_two_clusters_have_full_precision_and_half_the_recall():
    clusters = torch.cat([normal(300, 5, 2), normal(300, 6, 2) + 100])
    precision, recall = precision_and_recall(normal(300, 7, 2) / 2, clusters)
    assert precision > 0.95
    assert 0.25 < recall < 0.5


def test_the_radius_is_the_distance_to_the_third_neighbour():
    assert metrics.radii(torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])).tolist() == [6, 5, 3, 5, 9]


def test_the_share_of_a_reduction_is_relative_to_cfg():
    often, seldom, never = torch.arange(100) < 80, torch.arange(100) < 30, torch.zeros(100, dtype=torch.bool)
    share, error = metrics.share_of_reduction(UnwantedSeen(often, seldom), UnwantedSeen(often, never))
    assert share == pytest.approx(50 / 80)
    assert error > 0
    rarer = UnwantedSeen(torch.arange(100) < 40, torch.arange(100) < 20)  # drawn half as often, and halved
    assert metrics.share_of_reduction(rarer, UnwantedSeen(often, torch.arange(100) < 40))[0] == pytest.approx(1)
