"""Every guider of diffusers: the same numbers as the rule here, or the named difference."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers import guiders
from diffusers.guiders import adaptive_projected_guidance, frequency_decoupled_guidance
from diffusers.hooks import smoothed_energy_guidance_utils

from calib_guidance.denoisers import (
    APG,
    FDG,
    MAMBOG,
    TCFG,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    Level,
    Negative,
    Prediction,
    RescaledGuidance,
    SmoothedAttention,
    TwoNegatives,
)
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas

SHAPE = (3, 2, 8, 8)


def random(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(rule, cond, uncond, state=None):
    """On the predictions as they are: guiders are not told x_t."""
    none = torch.zeros((), dtype=torch.float64)
    return rule(cond, uncond, Level(cond, none, none + 0.5, none + 1, none + 0.5), {} if state is None else state)


def blurred(image):
    """Binomial 5×5 with reflected borders: kornia's, in two passes."""
    weights = torch.tensor([1, 4, 6, 4, 1], dtype=image.dtype) / 16
    image = F.pad(image, (2, 2, 2, 2), mode="reflect")
    image = sum(w * image[:, :, k : image.shape[2] - 4 + k] for k, w in enumerate(weights))
    return sum(w * image[..., k : image.shape[3] - 4 + k] for k, w in enumerate(weights))


def pyrup(image):
    return blurred(F.interpolate(image, scale_factor=2, mode="bilinear"))


def build_laplacian_pyramid(image, levels):
    bands = []
    for _ in range(levels - 1):
        low = F.interpolate(blurred(image), scale_factor=0.5, mode="bilinear")
        bands.append(image - pyrup(low))
        image = low
    return [*bands, image]


def guider(name, options, monkeypatch, step=20):
    # The pyramid of kornia, which is not installed.
    monkeypatch.setattr(frequency_decoupled_guidance, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(frequency_decoupled_guidance, "upsample_and_blur_func", pyrup)
    monkeypatch.setattr(frequency_decoupled_guidance, "build_laplacian_pyramid_func", build_laplacian_pyramid)
    made = getattr(guiders, name)(**options)
    made.set_state(step=step, num_inference_steps=50, timestep=torch.tensor(500))
    if momentum := options.get("adaptive_projected_guidance_momentum"):  # made where a pipeline begins
        made.momentum_buffer = adaptive_projected_guidance.MomentumBuffer(momentum)
    return made


APG_OPTIONS = {
    "adaptive_projected_guidance_momentum": -0.5,
    "adaptive_projected_guidance_rescale": 5.0,
    "eta": 0.3,
    "use_original_formulation": True,
}
AGREE = [
    ("ClassifierFreeGuidance", {}, ClassifierFreeGuidance(3.0), 1e-13),
    ("ClassifierFreeGuidance", {"guidance_rescale": 0.7}, RescaledGuidance(3.0, 0.7, representation="x0"), 1e-13),
    # The rule of the paper is diffusers' original formulation with w − 1.
    ("AdaptiveProjectedGuidance", APG_OPTIONS, APG(4.0, 0.3, 5.0, -0.5), 1e-12),
    # Their weaker model is the same one without some layers.
    ("AutoGuidance", {"auto_guidance_layers": [1], "dropout": 1.0}, ClassifierFreeGuidance(3.0), 1e-13),
    # In float32.
    ("ClassifierFreeZeroStarGuidance", {}, CFGZeroStar(3.0, representation="x0"), 1e-5),
    ("TangentialClassifierFreeGuidance", {}, TCFG(3.0, representation="x0"), 1e-3),
    ("MagnitudeAwareGuidance", {"alpha": 2.0}, MAMBOG(3.0, 2.0, representation="x0"), 1e-12),
    ("FrequencyDecoupledGuidance", {"guidance_scales": [3.0, 2.0, 1.5]}, FDG([3.0, 2.0, 1.5]), 1e-12),
    (
        "FrequencyDecoupledGuidance",
        {"guidance_scales": [3.0, 2.0], "parallel_weights": [0.2, 0.7], "use_original_formulation": True},
        FDG([4.0, 3.0], [0.2, 0.7]),
        1e-12,
    ),
]
LAYERS = {"perturbed_guidance_layers": [1], "skip_layer_guidance_layers": [1], "seg_guidance_layers": [1]}
TWO = {
    "PerturbedAttentionGuidance": ("perturbed_guidance_scale", "perturbed_guidance_stop"),
    "SkipLayerGuidance": ("skip_layer_guidance_scale", "skip_layer_guidance_stop"),
    "SmoothedEnergyGuidance": ("seg_guidance_scale", "seg_guidance_stop"),
}
ALONE = {"AdaptiveProjectedMixGuidance", "LTX2Guidance"}  # by tests of their own


def test_every_installed_guider_is_looked_at():
    kinds = {name for name, kind in vars(guiders).items() if inspect.isclass(kind)} - {"BaseGuidance"}
    assert kinds == {name for name, *_ in AGREE} | TWO.keys() | ALONE


@pytest.mark.parametrize(("name", "options", "rule", "atol"), AGREE)
def test_rules_are_those_of_diffusers(name, options, rule, atol, monkeypatch):
    scale = {} if name.startswith("Frequency") else {"guidance_scale": 3.0}
    theirs, state = guider(name, scale | options, monkeypatch), {}
    for step in range(3):
        c, u = random(2 * step), random(2 * step + 1)
        flat = name == "MagnitudeAwareGuidance"  # which cannot take four dimensions
        expected = theirs.forward(*((c.flatten(2), u.flatten(2)) if flat else (c, u))).pred.view(SHAPE)
        torch.testing.assert_close(apply(rule, c, u, state).to(expected), expected, atol=atol, rtol=0)


class Fixed(Negative):
    """A prediction that is given."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def prepare(self, denoiser, levels, y):
        cond = denoiser.prepare(levels, y)
        return lambda x_t, i: (cond(x_t, i), Prediction(self.x0))


class Given(Denoiser):
    image_shape, num_classes, clip = SHAPE[1:], 2, False

    def __init__(self, x0):
        super().__init__()
        self.x0, self.schedule = x0, NoiseSchedule(named_betas("linear"))

    def prepare(self, levels, y):
        return lambda x_t, i: Prediction(self.x0)


def combined(cond, rule, negative):
    return Combination(Given(cond), rule, negative)(torch.zeros_like(cond), 500, torch.zeros(3, dtype=torch.long)).x0


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_two_negatives_are_those_of_diffusers(name, rescale, monkeypatch):
    """u + w·(c − u) + s·(c − n), in float64."""
    c, u, n = random(1), random(2), random(3)
    scale, stop = TWO[name]
    layers = {key: value for key, value in LAYERS.items() if key.startswith(scale.removesuffix("scale"))}
    options = {"guidance_scale": 3.0, scale: 1.7, stop: 1.0, "guidance_rescale": rescale} | layers
    theirs = guider(name, options, monkeypatch).forward(c, u, n).pred
    weight = 1 + 2.0 + 1.7
    rule = RescaledGuidance(weight, rescale, representation="x0") if rescale else ClassifierFreeGuidance(weight)
    found = combined(c, rule, TwoNegatives(Fixed(u), Fixed(n), 1.7 / 3.7))
    torch.testing.assert_close(found, theirs, atol=1e-12, rtol=0)
    # Theirs does not change attention at the first step, even where it starts at 0; here an interval says where.
    first = guider(name, options | {stop.replace("stop", "start"): 0.0}, monkeypatch, step=0)
    assert first.num_conditions == 2


def test_three_negatives_are_those_of_diffusers(monkeypatch):
    """c + (w − 1)·(c − u) + s·(c − n) + (m − 1)·(c − k)"""
    c, *others = (random(k) for k in range(4))
    options = {"guidance_scale": 3.0, "stg_scale": 1.5, "modality_scale": 1.5}
    theirs = guider("LTX2Guidance", options, monkeypatch).forward(c, *others).pred
    u, n, k = map(Fixed, others)
    negative = TwoNegatives(TwoNegatives(u, n, 1.5 / 3.5), k, 0.5 / 4.0)
    torch.testing.assert_close(combined(c, ClassifierFreeGuidance(5.0), negative), theirs, atol=1e-12, rtol=0)


def test_diffusers_default_apg_is_another_rule(monkeypatch):
    """It adds w·(s⊥ + η·s∥) to u: off by (η − 1)·s∥ without momentum and clipping. FDG's alike."""
    c, u = random(1), random(2)
    options = {"guidance_scale": 3.0, "adaptive_projected_guidance_rescale": 0.0, "eta": 0.3}
    theirs = guider("AdaptiveProjectedGuidance", options, monkeypatch).forward(c, u).pred
    along = ((c - u) * c).sum((1, 2, 3), keepdim=True) / c.square().sum((1, 2, 3), keepdim=True) * c
    found = apply(APG(3.0, 0.3, None, 0.0), c, u)
    torch.testing.assert_close(theirs - found, (0.3 - 1) * along, atol=1e-12, rtol=0)
    assert (theirs - found).abs().max() > 0.01
    options = {"guidance_scales": [3.0, 2.0], "parallel_weights": 0.3}
    theirs = guider("FrequencyDecoupledGuidance", options, monkeypatch).forward(c, u).pred
    assert (theirs - apply(FDG([3.0, 2.0], 0.3), c, u)).abs().max() > 0.01


def test_the_mixed_apg_is_apg_after_steps_of_classifier_free_guidance(monkeypatch):
    """Their momentum is updated in the first steps, too; two guiders in one, which is not a rule here."""
    options = {"guidance_scale": 3.0, "adaptive_projected_guidance_scale": 3.0} | APG_OPTIONS
    theirs = guider("AdaptiveProjectedMixGuidance", options | {"use_original_formulation": False}, monkeypatch, 0)
    same = guider("AdaptiveProjectedMixGuidance", options, monkeypatch, 0)
    rule, state = APG(4.0, 0.3, 5.0, -0.5), {}
    for step in range(8):
        for each in (theirs, same):
            each.set_state(step=step, num_inference_steps=50, timestep=torch.tensor(500))
        c, u = random(2 * step), random(2 * step + 1)
        cfg, found = theirs.forward(c, u).pred, same.forward(c, u).pred
        ours = apply(rule, c, u, state)
        if step <= 5:
            torch.testing.assert_close(cfg, apply(ClassifierFreeGuidance(3.0), c, u), atol=1e-12, rtol=0)
        else:
            torch.testing.assert_close(found, ours, atol=1e-12, rtol=0)


def test_diffusers_exchanges_the_branches_of_smoothed_energy_guidance():
    """A finite blur is its infinite one; the published blur is in the golden data."""
    query = random(5).flatten(2).transpose(1, 2)
    blurred = smoothed_energy_guidance_utils._gaussian_blur_2d
    finite = blurred(query.clone(), 7, 1.0, 9999.0)
    torch.testing.assert_close(finite, query.mean(1, keepdim=True).expand_as(query))
    infinite = blurred(query.clone(), 7, 9999999.0, 9999.0)
    assert (infinite - query.mean(1, keepdim=True)).abs().max() > 0.01
    ours = SmoothedAttention(["0"], 1.0).smooth(random(5)).flatten(2).transpose(1, 2)
    assert (ours - finite).abs().max() > 0.01
