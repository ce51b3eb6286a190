"""Steadier classifier gradients."""

import pytest
import torch

from calib_guidance.classifiers import GaussianMixtureClassifier
from calib_guidance.denoisers import GaussianMixture
from calib_guidance.diffusion import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GradientStabilizer, SwitchedGuidance
from calib_guidance.samplers import DDIM

MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02])
Y = torch.arange(3)


def random(seed):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(stabilizer, rows=Y, **options):
    """Records of a trajectory."""
    records, noise = [], SampleStreams([0] * len(rows), rows.tolist(), MIXTURE.image_shape)
    guidance = ClassifierGuidance(GaussianMixtureClassifier(MIXTURE), scale=3.0, stabilizer=stabilizer, **options)
    DDIM(6)(MIXTURE, noise, Y[rows], guidance, [records.append])
    return records


def test_the_average_is_that_of_all_gradients_with_falling_weights():
    steady, state = GradientStabilizer(ema=0.7), {}
    for k in range(1, 6):
        found = steady(random(k), random(99), state)
        weights = [0.3 * 0.7 ** (k - j) for j in range(1, k + 1)]
        expected = sum(w * random(j) for j, w in enumerate(weights, 1)) / (1 - 0.7**k)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(GradientStabilizer(ema=0.7)(random(1), random(99), {}), random(1))


def test_clipping_shortens_long_gradients_alone():
    gradient = random(1) * torch.tensor([0.01, 1.0, 0.0]).view(3, 1, 1, 1)
    found = GradientStabilizer(max_norm=2.0)(gradient, random(2), {})
    torch.testing.assert_close(found.flatten(1).norm(dim=1)[1], torch.tensor(2.0).double())
    torch.testing.assert_close(found[[0, 2]], gradient[[0, 2]])
    torch.testing.assert_close(found[1] / found[1].norm(), gradient[1] / gradient[1].norm())


def test_projection_scales_the_part_along_what_the_classifier_sees():
    gradient, seen = random(1), random(2)
    found = GradientStabilizer(parallel=0.0)(gradient, seen, {})
    assert (found * seen).sum((1, 2, 3)).abs().max() < 1e-12
    half = GradientStabilizer(parallel=0.5)(gradient, seen, {})
    torch.testing.assert_close(half, (found + gradient) / 2)
    torch.testing.assert_close(GradientStabilizer(parallel=0.0)(gradient, torch.zeros_like(seen), {}), gradient)


def test_the_order_is_average_clip_project():
    steady, state, mean = GradientStabilizer(0.5, 1.5, 0.0), {}, None
    for k in range(3):
        found = steady(random(k), random(9), state)
        mean = random(k) if mean is None else (mean * (1 - 0.5**k) * 0.5 + 0.5 * random(k)) / (1 - 0.5 ** (k + 1))
    clipped = mean * (1.5 / mean.flatten(1).norm(dim=1)).clamp(max=1).view(3, 1, 1, 1)
    seen = random(9)
    along = (clipped * seen).sum((1, 2, 3), keepdim=True) / seen.square().sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, clipped - along * seen)


@pytest.mark.parametrize("options", [{}, {"classifier_input": "x_t"}, {"backprop_through_denoiser": True}])
def test_in_a_trajectory(options):
    plain, steady = run(None, **options), run(GradientStabilizer(ema=0.8), **options)
    torch.testing.assert_close(steady[0].guided.aux.gradient, plain[0].guided.aux.gradient)
    assert not torch.allclose(steady[1].guided.aux.gradient, plain[1].guided.aux.gradient)
    # State is of one trajectory and of each sample.
    for rows in (torch.tensor([1]), torch.tensor([2, 0])):
        again = run(GradientStabilizer(ema=0.8), rows, **options)
        torch.testing.assert_close(again[-1].x_next, steady[-1].x_next[rows], atol=1e-5, rtol=1e-4)
    nothing = run(GradientStabilizer(), **options)
    assert torch.equal(nothing[-1].x_next, plain[-1].x_next)


def test_each_part_of_switched_guidance_has_its_own():
    classifier = GaussianMixtureClassifier(MIXTURE)
    early, late = (ClassifierGuidance(classifier, stabilizer=GradientStabilizer(ema=0.9)) for _ in range(2))
    records, noise = [], SampleStreams([0] * 3, range(3), MIXTURE.image_shape)
    DDIM(4)(MIXTURE, noise, Y, SwitchedGuidance(early, late, 400), [records.append])
    first = next(r for r in records if r.t <= 400)
    x0 = first.guided.aux
    expected = ClassifierGuidance(classifier)(MIXTURE, first.x_t, int(first.t), Y).aux
    torch.testing.assert_close(x0.gradient, expected.gradient)


@pytest.mark.parametrize(("options", "named"), [({"ema": 1.0}, "below 1, got 1.0"), ({"max_norm": 0.0}, "got 0.0")])
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        GradientStabilizer(**options)
