"""Metrics of sets of samples against golden data, torch-fidelity, torchmetrics and closed forms."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric
from torchmetrics.image import InceptionScore as TheirInceptionScore
from torchmetrics.image.kid import poly_mmd

from calib_guidance.backend.distributed import DistributedContext
from calib_guidance.metrics import (
    bootstrap_sums,
    covariance_root,
    density_coverage,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distance_std,
    in_balls,
    inception_score,
    inception_score_adm,
    kernel_distance,
    kernel_distance_subsets,
    mean_and_covariance,
    precision_recall,
    sample_count_note,
)
from calib_guidance.metrics.neighbors import count_in_balls

POLYNOMIAL = {
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}


@pytest.fixture(scope="module")
def fixture(golden):
    return golden("metrics_features")


@pytest.fixture(scope="module")
def sets(fixture):
    return fixture["features_1"], fixture["features_2"]


@pytest.fixture(scope="module")
def probabilities(golden):
    return golden("metrics_inception_score")["probabilities"].double()


def within(fixture, name, value, values=None):
    tolerance = fixture.json["tolerance"][name]
    expected = fixture.json["values"][name] if values is None else values[name]
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, msg=lambda m: f"{name}: {m}", **tolerance)


def small_sets(n=60, m=50, d=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(m, d, generator=generator), 1.2 * torch.randn(n, d, generator=generator) + 0.3


def test_kernel_distance_of_complete_sets(fixture, sets):
    reference, generated = sets
    within(fixture, "kid_whole_sets", kernel_distance(reference, generated))
    equal = kernel_distance(reference[: len(generated)], generated)
    within(fixture, "kid_equal_size", equal)
    features = [f.double() for f in (reference[: len(generated)], generated)]
    assert float(equal) == pytest.approx(kernel_mmd(*(f.numpy() for f in features), **POLYNOMIAL), rel=1e-9)
    assert float(equal) == pytest.approx(float(poly_mmd(*features)), rel=1e-9)


def test_kernel_distance_of_subsets(fixture, sets):
    reference, generated = sets
    found = kernel_distance_subsets(reference, generated)
    within(fixture, "kid_subsets_mean", found.mean())
    within(fixture, "kid_subsets_std", found.std(correction=0))
    doubles = reference.double(), generated.double()
    settings = {"kid_subsets": 10, "kid_subset_size": 300, "rng_seed": 7, "verbose": False} | POLYNOMIAL
    fidelity = kid_features_to_metric(*doubles, **settings)
    ours = kernel_distance_subsets(*doubles, subsets=10, subset_size=300, seed=7)
    assert float(ours.mean()) == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-9)
    assert float(ours.std(correction=0)) == pytest.approx(fidelity["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_has_no_bias():
    """The mean over pairs of independent sets of one distribution is 0 within its error, at 5 samples as at any number."""
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([kernel_distance(*torch.randn(2, 5, 3, generator=generator)) for _ in range(2000)])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 3 * error < 0.2


def test_density_and_coverage(fixture, sets):
    reference, generated = sets
    density, coverage = density_coverage(reference, generated)
    within(fixture, "density_k5", density)
    within(fixture, "coverage_k5", coverage)


def test_blocks_change_nothing(monkeypatch):
    reference, generated = small_sets()
    complete = [kernel_distance(reference, generated), *density_coverage(reference, generated)]
    complete += precision_recall(reference, generated)
    monkeypatch.setattr("calib_guidance.metrics.neighbors._ROWS", 7)
    monkeypatch.setattr("calib_guidance.metrics.neighbors._COLUMNS", 3)  # fewer than k + 1 at first
    monkeypatch.setitem(kernel_distance.__globals__, "_BLOCK", 9)
    blocks = [kernel_distance(reference, generated), *density_coverage(reference, generated)]
    blocks += precision_recall(reference, generated)
    torch.testing.assert_close(blocks, complete, rtol=1e-12, atol=0)
    # Every pair at once, with its true distance.
    near = (reference[:, None] - reference).double().norm(dim=2).sort(dim=1).values[:, 5]
    inside = (generated[:, None] - reference).double().norm(dim=2) <= near
    assert float(complete[1]) == pytest.approx(float(inside.sum() / (5 * len(generated))))
    assert float(complete[2]) == pytest.approx(float(inside.any(0).double().mean()))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_distances_that_float32_cannot_tell_apart(offset):
    """Neighbors at equal distances, duplicates, and points that lie on surfaces of balls: as in float64, pair by pair."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    reference = torch.cat([grid, grid[:20], torch.randn(40, 3, generator=generator) * 2]) + offset
    generated = torch.cat([grid[::2] + 1e-7, grid[5:9], torch.randn(50, 3, generator=generator) * 3]).double() + offset
    true = (generated[:, None] - reference.double()).square().sum(2)
    radii = [
        (x[:, None].double() - x.double()).square().sum(2).fill_diagonal_(torch.inf).sort(dim=1).values[:, 2]
        for x in (reference, generated)
    ]
    precise, recalled = in_balls(reference, generated, k=3)
    assert torch.equal(precise, (true <= radii[0]).any(1))
    assert torch.equal(recalled, (true <= radii[1][:, None]).any(0))
    of_points, of_balls = count_in_balls(reference, generated, k=3)
    assert torch.equal(of_points, (true <= radii[0]).sum(1))
    assert torch.equal(of_balls, (true <= radii[0]).sum(0))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_distances(monkeypatch, world_size):
    """Each has blocks of rows of its own; threads stand for processes."""
    monkeypatch.setattr("calib_guidance.metrics.neighbors._ROWS", 7)
    reference, generated = small_sets()
    parts, barrier, computed = [None] * world_size, threading.Barrier(world_size, timeout=60), []

    class Thread(DistributedContext):
        def sum(self, tensor):
            parts[self.rank] = tensor.clone()
            barrier.wait()
            total = sum(parts)
            barrier.wait()
            computed.append(int((parts[self.rank] != 0).sum()))
            return total

    with ThreadPoolExecutor(world_size) as pool:
        ranks = [Thread(rank, world_size) for rank in range(world_size)]
        found = list(pool.map(lambda rank: in_balls(reference, generated, 3, processes=rank), ranks))
    for each in found:
        for mine, alone in zip(each, in_balls(reference, generated, 3), strict=True):
            assert torch.equal(mine, alone)
    assert max(computed) < len(reference)


def test_moments_in_blocks_are_those_of_numpy(monkeypatch):
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + 1000
    monkeypatch.setattr("calib_guidance.metrics.frechet._ROWS", 7)
    mean, covariance = mean_and_covariance(features)
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy().T), rtol=1e-12)


def in_order(logits):
    """Rows that the shuffle of the splits puts back into this order, in which OpenAI's evaluator takes them."""
    return torch.empty_like(logits).index_copy_(
        0, torch.from_numpy(np.random.RandomState(2020).permutation(len(logits))), logits
    )


def test_inception_score(golden, probabilities):
    fixture = golden("metrics_inception_score")
    logits = probabilities.log()
    given = inception_score(in_order(logits))
    within(fixture, "split_scores", given, fixture)
    within(fixture, "mean", given.mean(), fixture)
    within(fixture, "std", given.std(correction=0), fixture)
    within(fixture, "single_split", inception_score(logits, splits=1).squeeze(), fixture)
    shuffled = inception_score(logits)
    within(fixture, "shuffled_mean", shuffled.mean(), fixture)
    within(fixture, "shuffled_std", shuffled.std(correction=0), fixture)
    fidelity = isc_features_to_metric(logits)
    assert float(shuffled.mean()) == pytest.approx(fidelity["inception_score_mean"], rel=1e-9)
    assert float(shuffled.std(correction=0)) == pytest.approx(fidelity["inception_score_std"], rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory that theirs takes
        theirs = TheirInceptionScore(torch.nn.Identity(), splits=1)
        theirs.update(logits)
        assert float(inception_score(logits, splits=1)) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_inception_score_of_uneven_splits(probabilities):
    p = probabilities[:1003].numpy() / probabilities[:1003].sum(1, keepdim=True).numpy()

    def direct(part):
        return np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean())

    logits = torch.from_numpy(p).log()
    edges = [i * 1003 // 10 for i in range(11)]
    splits = [direct(p[a:b]) for a, b in pairwise(edges)]
    np.testing.assert_allclose(inception_score(in_order(logits)), splits, rtol=1e-12)


def test_inception_score_of_adms_evaluator(probabilities):
    """Its loop over blocks of 5,000 in order, the last one shorter; shuffled splits are another convention."""
    p = (probabilities[:1200] / probabilities[:1200].sum(1, keepdim=True)).numpy()
    scores = []
    for i in range(0, len(p), 500):
        part = p[i : i + 500]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    found = inception_score_adm(torch.from_numpy(p).log(), block=500)
    np.testing.assert_allclose(found, scores, rtol=1e-12)
    assert abs(float(inception_score(torch.from_numpy(p).log(), splits=3).mean() - found.mean())) > 1e-3
    assert inception_score_adm(torch.from_numpy(p).log()).shape == (1,)


def test_precision_and_recall_of_adms_evaluator():
    """Its evaluator in NumPy: features, norms, products and distances in float16, radii included."""
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(300, 256, generator=generator).abs()
    made = 1.1 * torch.randn(280, 256, generator=generator).abs() + 0.05

    def distances(u, v):
        u, v = u.numpy().astype(np.float16), v.numpy().astype(np.float16)
        norm_u, norm_v = (np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v))
        product = (u.astype(np.float64) @ v.astype(np.float64).T).astype(np.float16)
        return np.maximum(norm_u[:, None] - 2 * product + norm_v, 0).astype(np.float32)

    def radii(x):
        return np.partition(distances(x, x), np.arange(4), axis=1)[:, 3]

    expected = [
        np.mean(np.any(distances(made, real) <= radii(real), axis=1)),
        np.mean(np.any(distances(real, made) <= radii(made), axis=1)),
    ]
    found = list(map(float, precision_recall(real, made, half=True)))
    assert found == pytest.approx(expected, abs=1e-9)
    assert found != pytest.approx(list(map(float, precision_recall(real, made))), abs=1e-9)
    # Distances that float16 cannot hold are those of float32.
    far = [float(v) for v in precision_recall(100 * real, 100 * made, half=True)]
    assert far == pytest.approx([float(v) for v in precision_recall(real, made)], abs=0.01)


def test_inception_score_of_certain_predictions():
    certain = torch.full((6, 3), -torch.inf).scatter(1, (torch.arange(6) % 3)[:, None], 0.0)
    assert inception_score(in_order(certain), splits=2).tolist() == pytest.approx([3, 3])


def test_frechet_distance_with_what_is_known_of_the_reference(fixture, sets):
    reference, generated = (mean_and_covariance(f) for f in sets)
    root = covariance_root(reference[1])
    torch.testing.assert_close(root @ root.T, reference[1])
    within(fixture, "frechet_distance", frechet_distance(*reference, *generated, root1=root))
    within(fixture, "frechet_mean_term", (reference[0] - generated[0]).square().sum())


def test_frechet_distance_of_singular_covariances():
    """Features that a set does not vary in add nothing to the root: known from the other ones alone."""
    reference, generated = (mean_and_covariance(torch.nn.functional.pad(f, (0, 3))) for f in small_sets())
    narrow = [mean_and_covariance(f) for f in small_sets()]
    expected = float(frechet_distance(*narrow[0], *narrow[1]))
    assert float(frechet_distance(*reference, *generated)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_too_few_samples():
    assert "without full rank" in sample_count_note(20, 20)
    assert sample_count_note(21, 20).startswith("21 samples: biased upwards")
    assert sample_count_note(10_000, 2048) is None


def test_frechet_distance_of_infinitely_many_samples():
    """The distance of a normal distribution to itself is 0; that of 4,000 samples is not."""
    d = 24
    samples = torch.randn(4000, d, generator=torch.Generator().manual_seed(0))
    reference = torch.zeros(d), torch.eye(d)
    found = extrapolated_frechet_distance(reference, samples, 400)
    assert found.sizes[0] == 400
    assert found.sizes[-1] == 4000
    assert len(found.distances) == 15
    complete = frechet_distance(*reference, *mean_and_covariance(samples))
    torch.testing.assert_close(found.distances[-1], complete)
    assert abs(found.value) < 0.1 * complete
    # Of the mean D/N, and of the covariance Σ_ij (Σ̂ − I)²_ij/4, on average D(D + 1)/(4N).
    assert float(found.slope) == pytest.approx(d + d * (d + 1) / 4, rel=0.1)
    torch.testing.assert_close(found.distances, found.value + found.slope / found.sizes, rtol=0.25, atol=0)
    with pytest.raises(ValueError, match="more than 24"):
        extrapolated_frechet_distance(reference, samples[:240], 24)


def test_bootstrap_sums():
    values = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([1, 3])
    sums = bootstrap_sums(values, resamples=400, seed=3)
    torch.testing.assert_close((sums / 500).std(0), values.std(0) / 500**0.5, rtol=0.1, atol=0)
    rng = np.random.RandomState(3)
    drawn = torch.stack([values[torch.from_numpy(rng.randint(500, size=500))].sum(0) for _ in range(400)])
    torch.testing.assert_close(sums, drawn)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_sums(values[:0])


REFERENCE, GENERATED = small_sets()


def test_bad_arguments_are_refused():
    few = REFERENCE[:5]
    for match, call in {
        "more than 5 points and a point to look for, got 5": lambda: density_coverage(few, GENERATED),
        "a point to look for, got 50 and 0": lambda: density_coverage(REFERENCE, GENERATED[:0]),
        "two samples or more": lambda: kernel_distance(REFERENCE, GENERATED[:1]),
        "subsets of 1000 cannot be drawn from 50 reference and 60": lambda: kernel_distance_subsets(
            REFERENCE, GENERATED
        ),
        "of 60 samples cannot have 61 splits": lambda: inception_score(GENERATED, splits=61),
    }.items():
        with pytest.raises(ValueError, match=match.strip()):
            call()


def test_std_of_a_frechet_distance_is_the_jackknifes():
    """Leaving out one sample after the other estimates the same derivative by differences."""
    reference, generated = small_sets(n=400, m=300)
    statistics = mean_and_covariance(reference)
    found = frechet_distance_std(statistics, generated)
    n = len(generated)
    without = torch.stack(
        [frechet_distance(*statistics, *mean_and_covariance(generated[torch.arange(n) != i])) for i in range(n)]
    )
    jackknife = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    assert float(found) == pytest.approx(float(jackknife), rel=0.02)
    assert frechet_distance_std(statistics, generated[:4]).isnan()
    # Directions that neither set has give no infinite deviation.
    wide = [torch.cat([f, 0 * f], dim=1) for f in (reference, generated)]
    assert float(frechet_distance_std(mean_and_covariance(wide[0]), wide[1])) == pytest.approx(float(found), rel=1e-6)


def test_std_of_balanced_draws_is_what_varies_within_classes():
    """Against 300 draws with the same number of each of three classes, which are far apart."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(300) % 3
    centres = 4 * torch.eye(3, 4)
    reference = mean_and_covariance(torch.randn(2000, 4, generator=generator) + centres[torch.arange(2000) % 3])
    root, distances, spreads = covariance_root(reference[1]), [], []
    for _ in range(300):
        generated = 1.3 * torch.randn(300, 4, generator=generator) + centres[labels] + torch.tensor([1.5, 0, 0, 0])
        distances.append(frechet_distance(*reference, *mean_and_covariance(generated), root))
        spreads.append([frechet_distance_std(reference, generated, root, strata) for strata in (labels, None)])
    within, complete = torch.tensor(spreads, dtype=torch.float64).mean(0)
    assert float(within) == pytest.approx(float(torch.stack(distances).std()), rel=0.12)
    assert complete > 1.1 * within
