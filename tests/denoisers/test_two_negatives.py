"""Two negatives at once: by their formula, at the cost of one evaluation more, with every pair."""

import itertools

import pytest
import torch
from torch import nn

from calib_guidance.denoisers import (
    APG,
    ADMDenoiser,
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    IndependentCondition,
    Negative,
    PerturbedAttention,
    PerturbedTime,
    SlidingWindows,
    SmoothedAttention,
    TwoNegatives,
    Unconditional,
    UnconditionalModel,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDIM

ADM = {"channel_mult": (1,), "use_scale_shift_norm": True, "attention_resolutions": (1,), "num_classes": 3}
Y = torch.tensor([0, 1, 2, 1, -1])


class Counted(UNet):
    """Counts the images that it and its copies are given."""

    count = 0

    def decode(self, x, emb):
        Counted.count += len(x)
        return super().decode(x, emb)


def unet(seed):
    torch.manual_seed(seed)
    network = Counted(8, 1, 32, 2, 1, **ADM)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return ADMDenoiser(network)


@pytest.fixture(scope="module")
def denoiser():
    return unet(0)


class Averaged(Negative):
    """A negative that knows only pairs."""

    def prepare(self, denoiser, levels, y):
        predict, other = denoiser.prepare(levels, y), denoiser.prepare(levels, torch.zeros_like(y))
        return lambda x_t, i: (predict(x_t, i), other(x_t, i))


WEAK = unet(1)
NEGATIVES = {
    "unconditional": Unconditional(),
    "unconditional_model": UnconditionalModel(WEAK),
    "autoguidance": Autoguidance(WEAK),
    "independent_condition": IndependentCondition(),
    "perturbed_time": PerturbedTime(0.5),
    "perturbed_attention": PerturbedAttention(["middle_block.1"]),
    "smoothed_attention": SmoothedAttention(["middle_block.1"], 0.5),
    "sliding_windows": SlidingWindows(4, 3),
    "two": TwoNegatives(Autoguidance(WEAK), PerturbedTime(0.5), 0.3),
    "pairs_only": Averaged(),
}


def predictions(negative, denoiser, y=Y):
    negative.check(denoiser)
    pair = negative.prepare(denoiser, denoiser.schedule.at([100, 500]), y)
    x = SampleStreams([0] * len(y), range(len(y)), denoiser.image_shape)()
    getattr(pair, "start", lambda x: None)(x)
    return pair(x, 1)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [p for p in itertools.permutations(NEGATIVES, 2) if "autoguidance" in p] + [
    ("perturbed_attention", "smoothed_attention"), ("unconditional", "sliding_windows"), ("perturbed_time", "two"),
    ("independent_condition", "perturbed_attention"), ("pairs_only", "pairs_only"),
])  # fmt: skip
def test_both_negatives_with_the_same_random_numbers_as_alone(denoiser, first, second):
    cond, _ = predictions(Unconditional(), denoiser)
    (_, a), (_, b) = (predictions(NEGATIVES[name], denoiser) for name in (first, second))
    both = TwoNegatives(NEGATIVES[first], NEGATIVES[second], 0.3)
    found, mixed = predictions(both, denoiser)
    torch.testing.assert_close(found.x0, cond.x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.x0, 0.7 * a.x0 + 0.3 * b.x0, atol=1e-5, rtol=1e-5)
    for fraction, one in ((0.0, a), (1.0, b)):
        alone = predictions(TwoNegatives(NEGATIVES[first], NEGATIVES[second], fraction), denoiser)[1]
        torch.testing.assert_close(alone.x0, one.x0, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_weights(denoiser):
    """c + s₁·(c − u₁) + s₂·(c − u₂) of w = 1 + s₁ + s₂ and f = s₂/(s₁ + s₂)."""
    s1, s2, x = 1.2, 0.14, SampleStreams([0] * 5, range(5), denoiser.image_shape)()
    negative = TwoNegatives(Autoguidance(WEAK), SlidingWindows(4, 3, masked=False), s2 / (s1 + s2))
    found = Combination(denoiser, ClassifierFreeGuidance(1 + s1 + s2), negative)(x, 500, Y).x0
    cond, weak = denoiser(x, 500, Y).x0, WEAK(x, 500, Y).x0
    windows = Combination(denoiser, ClassifierFreeGuidance(0.0), SlidingWindows(4, 3, masked=False))(x, 500, Y).x0
    torch.testing.assert_close(found, cond + s1 * (cond - weak) + s2 * (cond - windows), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NEGATIVES)
def test_the_second_negative_costs_no_conditional_prediction(denoiser, name):
    """Counted in images, crops as one each; a negative that knows only pairs costs a conditional one more."""
    for negative in (TwoNegatives(Unconditional(), NEGATIVES[name]), TwoNegatives(NEGATIVES[name], Unconditional())):
        Counted.count = 0
        predictions(negative, denoiser)
        crops = 9 if name == "sliding_windows" else 1
        expected = {"two": 4, "pairs_only": 4 if negative.second is NEGATIVES[name] else 3}.get(name, 2 + crops)
        assert Counted.count == expected * len(Y)
        assert negative.nfe(denoiser) == Combination(denoiser, negative=negative).nfe == expected


@pytest.mark.parametrize("name", NEGATIVES)
def test_a_sample_depends_on_no_batch(denoiser, name):
    """With momentum, and random numbers of each sample."""
    negative = TwoNegatives(Unconditional(), NEGATIVES[name], 0.6)
    combination, y = Combination(denoiser, APG(3.0), negative), torch.arange(16) % 3

    def sample(rows):
        noise = SampleStreams([3] * len(rows), rows, denoiser.image_shape)
        return DDIM(3, eta=0.5)(combination, noise, y[rows])

    expected = sample(list(range(16)))
    for rows in ([4], [15, 0, 3]):
        torch.testing.assert_close(sample(rows), expected[rows], atol=2e-3, rtol=1e-3)


def test_what_one_of_them_refuses_is_refused(denoiser):
    with pytest.raises(ValueError, match="'nowhere' must be the name of one module"):
        Combination(denoiser, negative=TwoNegatives(Unconditional(), PerturbedAttention(["nowhere"])))
    unlabeled = ADMDenoiser(denoiser.network, class_conditional=False)
    with pytest.raises(ValueError, match="Unconditional needs a class-conditional denoiser"):
        Combination(unlabeled, negative=TwoNegatives(Unconditional(), PerturbedAttention(["middle_block.1"])))
    with pytest.raises(ValueError, match="fraction must be at least 0 and at most 1, got 1.5"):
        TwoNegatives(Unconditional(), Unconditional(), 1.5)
