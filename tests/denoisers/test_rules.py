"""Rules that combine predictions: closed forms, diffusers' guiders, and published runs."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from calib_guidance import denoisers, guidance, samplers
from calib_guidance.denoisers import (
    APG,
    FDG,
    MAMBOG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    FeedbackGuidance,
    GaussianMixture,
    Level,
    Negative,
    Prediction,
    RescaledGuidance,
    Rule,
    Scheduled,
)
from calib_guidance.denoisers.rules.base import from_x0, to_x0
from calib_guidance.denoisers.rules.feedback import offset_and_temperature
from calib_guidance.diffusion import Interval
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC
from calib_guidance.samplers.spacing import karras_sigmas

SHAPE = (3, 2, 8, 8)
CONVERTED = (RescaledGuidance, APG, CFGZeroStar, TCFG, MAMBOG)


def random(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(abar=0.3, x_t=None, progress=0.5):
    abar = torch.tensor(abar, dtype=torch.float64)
    sigma = (1 / abar - 1).sqrt()
    return Level(
        random(9) if x_t is None else x_t, torch.tensor(500.0), abar, sigma, torch.tensor(progress, dtype=torch.float64)
    )


def apply(rule, cond, uncond, at=None, state=None):
    return rule(cond, uncond, at or level(), {} if state is None else state)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-12)


def test_every_rule_is_one_file_and_every_file_a_public_rule():
    rules = {value for value in vars(denoisers).values() if inspect.isclass(value) and issubclass(value, Rule)}
    concrete = {rule for rule in rules if not inspect.isabstract(rule)}
    files = {rule.__module__ for rule in concrete}
    assert len(files) == len(concrete) == 10
    assert all(len(inspect.getsource(inspect.getmodule(rule)).splitlines()) < 115 for rule in concrete)


def test_no_option_is_a_yaml_boolean():
    """YAML reads on, off, yes and no as booleans."""
    parts = [p for module in (denoisers, guidance, samplers) for p in vars(module).values() if inspect.isclass(p)]
    names = {
        name for part in parts if part.__init__ is not object.__init__ for name in inspect.signature(part).parameters
    }
    assert "representation" in names
    assert not [name for name in names if isinstance(yaml.safe_load(name), bool)]


# -------------------------------------------------------------------- representations


@pytest.mark.parametrize("abar", [0.001, 0.3, 0.99998])
def test_conversions(abar):
    x0, noise = random(1), random(2)
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
    at = level(abar, x_t)
    close(from_x0(x0, at, "epsilon"), noise, 1e-9)
    close(from_x0(x0, at, "v"), noise - x0, 1e-9)
    for on in ("x0", "epsilon", "v"):
        close(to_x0(from_x0(random(3), at, on), at, on), random(3), 1e-10)
    # The velocity of x = (1 − t)·x0 + t·ε, which is x_t/(√ᾱ + √(1−ᾱ)) at t = σ/(1 + σ).
    t = at.sigma / (1 + at.sigma)
    x = x_t / (math.sqrt(abar) + math.sqrt(1 - abar))
    close(from_x0(x0, at, "v"), (x - x0) / t, 1e-9)


def test_a_difference_is_converted_as_the_formulas_say():
    a, b, at = random(1), random(2), level()
    close(from_x0(a, at, "epsilon") - from_x0(b, at, "epsilon"), -(a - b) / at.sigma)
    close(from_x0(a, at, "v") - from_x0(b, at, "v"), -(a - b) * (1 + at.sigma) / at.sigma)


@pytest.mark.parametrize("rule", CONVERTED)
def test_what_a_rule_is_defined_on_matters(rule):
    """So that no rule may take whatever the network predicts."""
    results = [apply(rule(3.0, representation=on), random(1), random(2)) for on in ("x0", "epsilon", "v")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (results[a] - results[b]).abs().max() > 1e-3
    default = {RescaledGuidance: "epsilon", APG: "x0", CFGZeroStar: "v", TCFG: "epsilon", MAMBOG: "v"}[rule]
    close(apply(rule(3.0), random(1), random(2)), results[("x0", "epsilon", "v").index(default)])
    with pytest.raises(ValueError, match="x0, epsilon, v"):
        rule(representation="score")


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    "rule",
    [
        ClassifierFreeGuidance(1.0),
        RescaledGuidance(1.0),
        APG(1.0),
        APG(1.0, momentum=-0.75, max_norm=2.5),
        CFGZeroStar(1.0),
        TCFG(1.0),
        MAMBOG(1.0),
        FDG([1.0, 1.0, 1.0]),
        FDG([1.0, 1.0], 0.0, "v"),
        CFGPlusPlus(1.0),
        Scheduled(ClassifierFreeGuidance(1.0)),
        Scheduled(ClassifierFreeGuidance(9.0), minimum=-1.0),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_weight_1_is_the_conditional_prediction(rule):
    at = level(progress=0.0) if getattr(rule, "minimum", 0) < 0 else level()
    close(apply(rule, random(1), random(2), at), random(1))


@pytest.mark.parametrize(
    "rule", [ClassifierFreeGuidance(0.0), CFGPlusPlus(0.0), FDG([0.0, 0.0]), MAMBOG(0.0, damping=0.0)]
)
def test_weight_0_is_the_negative(rule):
    close(apply(rule, random(1), random(2)), random(2))


@pytest.mark.parametrize(
    "rule",
    [
        RescaledGuidance(3.0, rescale=0.0),
        APG(3.0, parallel=1.0, max_norm=None, momentum=0.0),
        APG(3.0, parallel=1.0, max_norm=1e9, momentum=0.0),
        MAMBOG(3.0, damping=0.0),
        FDG([3.0, 3.0, 3.0]),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_limits_are_classifier_free_guidance(rule):
    close(apply(rule, random(1), random(2)), random(2) + 3 * (random(1) - random(2)))


@pytest.mark.parametrize(
    "rule",
    [RescaledGuidance(), APG(), CFGZeroStar(), TCFG(), MAMBOG(), FDG(), FDG(parallel=0.0), FeedbackGuidance()],
)
def test_equal_predictions_stay_what_they_are_and_have_finite_gradients(rule):
    """As of samples without label. A norm of 0 has no gradient."""
    levels = NoiseSchedule(named_betas("linear")).at([100, 500])
    for value in (random(1), torch.zeros(SHAPE, dtype=torch.float64)):
        c, u = (value.clone().requires_grad_() for _ in range(2))
        x0 = apply(rule, c, u, state=rule.start(levels, torch.zeros(3)))
        close(x0.detach(), value, 1e-7)  # CFG-Zero* adds 1e-8 to ‖u‖²
        if value.any():
            gradients = torch.autograd.grad(x0.square().sum(), (c, u))
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_rescaling_gives_the_conditional_standard_deviation():
    found = apply(RescaledGuidance(6.0, rescale=1.0, representation="x0"), random(1), random(2))
    close(found.std(dim=(1, 2, 3)), random(1).std(dim=(1, 2, 3)))


def test_cfg_zero_star_of_parallel_predictions_is_the_conditional_one():
    close(apply(CFGZeroStar(7.0, representation="x0"), random(1), -0.3 * random(1)), random(1), 1e-7)


def test_cfg_zero_star_whose_scale_is_1_is_classifier_free_guidance():
    u, other = random(2), random(1)
    across = other - (other * u).sum((1, 2, 3), keepdim=True) / u.square().sum((1, 2, 3), keepdim=True) * u
    close(apply(CFGZeroStar(3.0, representation="x0"), u + across, u), u + 3 * across, 1e-7)  # 1e-8 in ‖u‖²


def test_tcfg_projects_on_the_leading_singular_vector():
    c, u = random(1), random(2) + 0.5 * random(1)
    found = apply(TCFG(4.0, representation="x0"), c, u)
    for n in range(len(c)):
        _, _, vh = torch.linalg.svd(torch.stack([c[n].flatten(), u[n].flatten()]), full_matrices=False)
        damped = ((u[n].flatten() @ vh[0]) * vh[0]).view_as(u[n])
        close(found[n], damped + 4 * (c[n] - damped), 1e-10)
    close(apply(TCFG(4.0, representation="x0"), c, -c), -c + 4 * (c + c))


def test_mambo_g_damps_by_sample():
    c, u = random(1), random(2)
    found = apply(MAMBOG(5.0, 2.0, representation="x0"), c, u)
    for n in range(len(c)):
        weight = 1 + 4 * math.exp(-2 * float((c[n] - u[n]).norm() / u[n].norm()))
        close(found[n], u[n] + weight * (c[n] - u[n]))


def test_apg_step_by_step():
    """Momentum before clipping, clipping before projection, and the momentum unclipped."""
    rule, state, momentum = APG(4.0, parallel=0.2, max_norm=3.0, momentum=-0.5), {}, 0.0
    for step in range(4):
        c, u = random(2 * step), random(2 * step + 1)
        momentum = (c - u) - 0.5 * momentum
        found = apply(rule, c, u, state=state)
        for n in range(len(c)):
            m, direction = momentum[n].flatten().numpy(), c[n].flatten().numpy()
            s = m * min(1, 3.0 / np.linalg.norm(m))
            direction = direction / np.linalg.norm(direction)
            along = s @ direction * direction
            expected = c[n].flatten().numpy() + 3 * (s - along + 0.2 * along)
            np.testing.assert_allclose(found[n].flatten().numpy(), expected, atol=1e-12)
    assert momentum.flatten(1).norm(dim=1).min() > 3.0  # otherwise clipping was not tested


def kernel_blur(image):
    """Binomial 5×5 with reflected borders, pixel by pixel."""
    weights, out = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256, np.zeros_like(image)
    padded = np.pad(image, 2, mode="reflect")
    for y, x in np.ndindex(*image.shape):
        out[y, x] = (padded[y : y + 5, x : x + 5] * weights).sum()
    return out


@pytest.mark.parametrize("side", [8, 12])
def test_fdg_guides_every_band_by_its_weight(side):
    c, u = random(1, (2, 1, side, side)), random(2, (2, 1, side, side))

    def bands(image):
        low = F.interpolate(
            torch.from_numpy(kernel_blur(image)).view(1, 1, side, side), scale_factor=0.5, mode="bilinear"
        )
        up = F.interpolate(low, scale_factor=2, mode="bilinear")[0, 0].numpy()
        return image - kernel_blur(up), kernel_blur(up)

    found = apply(FDG([10.0, 5.0]), c, u)
    for n in range(2):
        (high_c, low_c), (high_u, low_u) = (bands(p[n, 0].numpy()) for p in (c, u))
        expected = high_u + 10 * (high_c - high_u) + low_u + 5 * (low_c - low_u)
        np.testing.assert_allclose(found[n, 0].numpy(), expected, atol=1e-12)
    flat = torch.ones(1, 1, side, side, dtype=torch.float64)  # the lowest frequency alone
    close(apply(FDG([10.0, 5.0]), 2 * flat, flat), 6 * flat)
    assert apply(FDG([2.0, 3.0, 4.0]), random(1, (1, 1, 9, 7)), random(2, (1, 1, 9, 7))).shape == (1, 1, 9, 7)
    with pytest.raises(ValueError, match="fewer weights"):
        apply(FDG([1.0] * 8), c, u)


def test_fdg_scales_the_part_along_the_conditional_band():
    """In every band by its own η, and with its norms on the representation that is named."""
    c, u = random(1, (2, 1, 8, 8)), random(2, (2, 1, 8, 8))
    up = FDG()._up

    def bands(image):
        low = torch.stack([torch.from_numpy(kernel_blur(each[0].numpy()))[None] for each in image])
        low = F.interpolate(low, scale_factor=0.5, mode="bilinear")
        return image - up(low, [8, 8]), low

    results = [apply(FDG([10.0, 5.0], [0.3, 0.6], on), c, u, level(x_t=random(9, c.shape))) for on in ("x0", "v")]
    guided = []
    for weight, parallel, c_b, u_b in zip((10, 5), (0.3, 0.6), bands(c), bands(u), strict=True):
        shift, direction = (c_b - u_b).flatten(1).numpy(), c_b.flatten(1).numpy()
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        along = (shift * direction).sum(1, keepdims=True) * direction
        guided.append(c_b + (weight - 1) * torch.from_numpy(shift - along + parallel * along).view_as(c_b))
    close(results[0], guided[0] + up(guided[1], [8, 8]))
    assert (results[0] - results[1]).abs().max() > 1e-3
    for on in ("x0", "epsilon", "v"):
        at = level(x_t=random(9, c.shape))
        close(apply(FDG([1.0, 1.0], 0.0, on), c, u, at), c)
        close(apply(FDG([3.0, 2.0], 1 - 1e-14, on), c, u, at), apply(FDG([3.0, 2.0]), c, u), 1e-10)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("count", [7, 50])
def test_rising_schedules_have_the_mean_of_the_weight(shape, count):
    """w − 1 follows the curve, which rises towards the image."""
    c, u, rule = random(1), random(2), Scheduled(ClassifierFreeGuidance(3.0), shape)
    steps = [(step + 0.5) / count for step in range(count)]
    factors = [((apply(rule, c, u, level(progress=s)) - c) / (c - u) / 2).mean() for s in steps]
    assert float(sum(factors)) / count == pytest.approx(1, abs=1e-9)
    assert factors == sorted(factors)
    assert factors[-1] > 1.8 > 0.2 > factors[0]
    clamped = Scheduled(ClassifierFreeGuidance(3.0), shape, minimum=0.5)
    close(apply(clamped, c, u, level(progress=0.01)), c + 0.5 * 2 * (c - u))


def test_the_exponential_schedule():
    c, u = random(1), random(2)
    found = apply(Scheduled(ClassifierFreeGuidance(3.0), "exponential", decay=2.0), c, u, level(progress=0.25))
    close(found, c + math.exp(-2 * 0.75) * 2 * (c - u))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ClassifierFreeGuidance(math.inf), "weight"),
        (lambda: RescaledGuidance(rescale=1.5), "at least 0 and at most 1, got 1.5"),
        (lambda: APG(max_norm=0), "max_norm must be above 0, or null"),
        (lambda: APG(momentum=-1.0), "momentum must be above -1 and below 1"),
        (lambda: MAMBOG(damping=-1), "damping must be at least 0"),
        (lambda: FDG([3.0]), "two or more"),
        (lambda: FDG([3.0, 2.0], [1.0]), "one for each of 2 weights"),
        (lambda: FDG(representation="score"), "x0, epsilon, v"),
        (lambda: CFGPlusPlus(7.5), "between 0 and 1, got 7.5"),
        (lambda: FeedbackGuidance(pi=1.0), "pi must be above 0 and below 1"),
        (lambda: FeedbackGuidance(max_weight=2.0, weight=2.5), "max_weight must be above weight"),
        (lambda: Scheduled(shape="sine"), "linear, cosine, exponential"),
        (lambda: Scheduled(CFGPlusPlus()), "CFG\\+\\+"),
    ],
)
def test_wrong_options_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


# ------------------------------------------------------------------------ in a sampler


class Replay(Denoiser):
    """Predictions from a list, one after the other, as functions of the input in X = x0 + σ·ε and σ; keeps the inputs."""

    clip, num_classes = False, 2

    def __init__(self, pairs, shape):
        super().__init__()
        self.pairs, self.image_shape, self.inputs = pairs, shape, []
        self.schedule = NoiseSchedule(named_betas("linear"))

    def prepare(self, levels, y):
        def predict(x_t, i):
            raise AssertionError("every level is combined")

        return predict


class Both(Negative):
    def prepare(self, denoiser, levels, y):
        sigmas, calls = levels.sigmas, iter(denoiser.pairs)

        def predict_pair(x_t, i):
            x = x_t * math.sqrt(1 + sigmas[i] ** 2)
            denoiser.inputs.append(x)
            return tuple(Prediction(x0) for x0 in next(calls)(x, sigmas[i]))

        return predict_pair


def at_sigmas(kind, sigmas, **options):
    """A sampler at σ ``(N,)``, the noisiest first."""

    class Fixed(kind):
        def levels(self, denoiser):
            return denoiser.schedule.at_sigmas(sigmas[::-1].copy())

    return Fixed(len(sigmas), **options)


def sample(sampler, rule, pairs, noises):
    """The records of all steps, and X before every evaluation."""
    denoiser = Replay(pairs, noises[0].shape[1:])
    combination, noises = Combination(denoiser, rule, Both()), iter(noises)
    sampler.check(combination, None)
    records, x = [], next(noises)
    y, drawn = torch.zeros(len(x), dtype=torch.long), [x]
    sampler(combination, lambda: drawn.pop() if drawn else next(noises), y, None, [records.append])
    return records, denoiser.inputs


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp2m"])
def test_cfg_plus_plus_in_sigma_is_the_published_solver(golden, name):
    data = golden("cfgpp")
    sigmas = data["sigmas"].numpy()[:-1]
    pairs = [lambda x, sigma, k=k: (x - sigma * data["eps_c"][k], x - sigma * data["eps_u"][k]) for k in range(6)]
    sampler = (
        at_sigmas(DPMSolver, sigmas) if name == "dpmpp2m" else at_sigmas(DDIM, sigmas, eta=float(name == "euler_a"))
    )
    noise = data["euler_a_noise"] if name == "euler_a" else []
    # Upstream starts from X = x_T·√(1 + σ²), which is x_T here.
    records, inputs = sample(sampler, CFGPlusPlus(data.json["lambda"]), pairs, [data["x_T"], *noise])
    for k, record in enumerate(records):
        scale = np.append(sigmas, 0.0)[k + 1]
        x = record.x_next * math.sqrt(1 + scale**2)
        torch.testing.assert_close(x, data[f"{name}_x"][k], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(record.guided.prediction.x0, data[f"{name}_x0hat"][k], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            inputs[k] / math.sqrt(1 + sigmas[k] ** 2), data[f"{name}_calls"][k], atol=1e-5, rtol=1e-5
        )


def test_cfg_plus_plus_in_ddim_is_the_published_one(golden):
    """All but the last step, where upstream's ᾱ' is ᾱ_0 and here 1."""
    data = golden("cfgpp")
    sigmas = (1 / data["ddim_alpha_t"] - 1).sqrt().numpy()
    pairs = [lambda x, sigma, k=k: (x - sigma * data["eps_c"][k], x - sigma * data["eps_u"][k]) for k in range(6)]
    records, _ = sample(at_sigmas(DDIM, sigmas), CFGPlusPlus(data.json["lambda"]), pairs, [data["x_T"]])
    for k, record in enumerate(records):
        torch.testing.assert_close(record.guided.prediction.x0, data["ddim_x0hat"][k], atol=1e-5, rtol=1e-5)
        if k < 5:
            torch.testing.assert_close(record.x_next, data["ddim_x"][k], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(records[-1].x_next, data["ddim_x0hat"][-1], atol=1e-5, rtol=1e-5)


MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02], class_conditional=True)
LABELS = torch.tensor([0, 1, 2])


def run(sampler, rule):
    noise = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    return sampler(Combination(MIXTURE, rule), lambda: noise, LABELS)


def test_cfg_plus_plus_is_classifier_free_guidance_of_a_rising_weight():
    sampler = DDIM(12)
    levels = sampler.levels(MIXTURE)

    class Weighted(ClassifierFreeGuidance):
        """λ·σ/(σ − σ')"""

        def forward(self, x0_cond, x0_uncond, level, state):
            following = torch.tensor(np.append(0.0, levels.sigmas[:-1]))
            own = int(np.abs(levels.sigmas - float(level.sigma)).argmin())
            weight = 0.4 * levels.sigmas[own] / (levels.sigmas[own] - following[own])
            return x0_uncond + weight * (x0_cond - x0_uncond)

    torch.testing.assert_close(run(sampler, CFGPlusPlus(0.4)), run(sampler, Weighted()), atol=1e-5, rtol=1e-5)


def test_cfg_plus_plus_at_1_is_not_conditional_sampling():
    conditional = run(DDIM(12), ClassifierFreeGuidance(1.0))
    assert (run(DDIM(12), CFGPlusPlus(1.0)) - conditional).abs().max() > 0.01
    unconditional = run(DDIM(12), ClassifierFreeGuidance(0.0))
    torch.testing.assert_close(run(DDIM(12), CFGPlusPlus(0.0)), unconditional, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sde", [False, True])
def test_cfg_plus_plus_of_order_1_is_that_of_ddim(sde):
    solver, ddim = DPMSolver(12, sde, spacing="timesteps", order=1), DDIM(12, eta=float(sde))
    torch.testing.assert_close(run(solver, CFGPlusPlus(0.7)), run(ddim, CFGPlusPlus(0.7)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", [DDPM("4"), Heun(4), UniPC(4)], ids=["ddpm", "heun", "unipc"])
def test_samplers_that_cannot_renoise_refuse_cfg_plus_plus(sampler):
    with pytest.raises(ValueError, match="set the sampler to DDIM or DPMSolver"):
        sampler.check(Combination(MIXTURE, CFGPlusPlus()), None)
    with pytest.raises(ValueError, match="set the sampler to DDIM or DPMSolver"):
        run(sampler, CFGPlusPlus())


def test_rules_that_steer_the_step_are_outermost():
    for rule in (CFGPlusPlus(), FeedbackGuidance()):
        with pytest.raises(ValueError, match="outermost"):
            Combination(Combination(MIXTURE, rule), ClassifierFreeGuidance())


@pytest.mark.parametrize("way", ["sde", "euler", "heun"])
@pytest.mark.parametrize("variant", ["pure", "cfg", "lig"])
def test_feedback_guidance_is_the_published_one(golden, way, variant):
    data = golden("fbg")
    h = data.json["hyper_parameters"]
    options = {"pi": h["pi"], "temperature": h["temp"], "offset": h["offset"], "max_weight": h["max_guidance"]}
    if variant != "pure":
        options["weight"] = h["constant_guidance"]
    if variant == "lig":
        options["sigma_interval"] = [h["t_end"], h["t_start"]]
    weights = []

    class Spy(FeedbackGuidance):
        def after_step(self, level, state):
            weights.append(state["weight"].flatten().clone())
            super().after_step(level, state)

        def forward(self, x0_cond, x0_uncond, level, state):
            x0 = super().forward(x0_cond, x0_uncond, level, state)
            self.last = state["weight"].flatten()
            return x0

    rule = Spy(**options)
    sigmas = karras_sigmas(h["steps"], h["sigma_min"], h["sigma_max"], h["rho"])[::-1]
    pairs = [lambda x, sigma, k=k: (data["D_c"][k], data["D_u"][k]) for k in range(24)]
    if way == "heun":
        sampler = Heun(h["steps"], h["sigma_min"], h["sigma_max"], h["rho"])
        noises = [data["noise"]]
    else:
        sampler = at_sigmas(DDIM, sigmas, eta=float(way == "sde"))
        # Here x_T is x_t, upstream's is X = σ·noise.
        noises = [data["noise"] * sigmas[0] / math.sqrt(1 + sigmas[0] ** 2), *data["step_noise"]]
    records, inputs = sample(sampler, rule, pairs, noises)
    torch.testing.assert_close(
        torch.stack([*weights, rule.last]), data[f"{way}_{variant}_lambda"], atol=1e-4, rtol=1e-4
    )
    expected = data[f"{way}_{variant}_inputs"]
    assert len(inputs) == len(expected)
    torch.testing.assert_close(torch.stack(inputs), expected, atol=1e-4, rtol=1e-5)
    x = records[-1].x_next
    torch.testing.assert_close(x, data[f"{way}_{variant}_x"], atol=1e-4, rtol=1e-4)


def test_feedback_settings(golden):
    for steps, pi, t0, t1, delta, tau in golden("fbg")["settings"].tolist():
        sigmas = karras_sigmas(int(steps), 0.002, 80.0, 7.0)
        offset, temperature = offset_and_temperature(sigmas, pi, t0, t1)
        assert round(offset, 4) == pytest.approx(delta)
        assert round(temperature / abs(offset) * abs(round(offset, 4)), 4) == pytest.approx(tau)


def test_feedback_outside_an_interval_waits():
    """Steps outside it are not counted, and the state is not stale inside."""
    states = []

    class Spy(FeedbackGuidance):
        def after_step(self, level, state):
            super().after_step(level, state)
            states.append((state["log_p"].clone(), "x" in state))

    rule = Spy(temperature=0.1, offset=-0.5)
    noise = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    DDIM(10)(Combination(MIXTURE, rule, interval=Interval([300, 700])), lambda: noise, LABELS)
    log_p = [s[0] for s in states]
    assert not any(s[1] for s in states)
    moved = [not torch.equal(a, b) for a, b in zip([torch.zeros(3).double(), *log_p], log_p, strict=False)]
    inside = [300 <= t <= 700 for t in DDIM(10).levels(MIXTURE).times[::-1]][:-1]
    assert moved == inside


def test_a_rule_sees_the_combined_channels_alone():
    """As the norms of a rule should not depend on channels that it leaves alone."""
    levels = NoiseSchedule(named_betas("linear")).at_sigmas([1.0])
    c, u, x = random(1), random(2), random(3)

    def predicted(channels):
        combination = Combination(Replay([lambda x, sigma: (c, u)], SHAPE[1:]), APG(3.0), Both(), channels=channels)
        return combination.prepare(levels, torch.zeros(3, dtype=torch.long))(x, 0)

    found = predicted(1)
    close(found.x0[:, :1], apply(APG(3.0), c[:, :1], u[:, :1]))
    close(found.x0[:, 1:], c[:, 1:])
    assert not found.residual[:, 1:].any()
    close(predicted(None).x0, apply(APG(3.0), c, u))


def test_rules_with_state_refuse_samples_with_steps_of_their_own():
    predict = Combination(MIXTURE, APG()).prepare(MIXTURE.schedule.at([100, 500, 900]), LABELS)
    with pytest.raises(ValueError, match="APG carries a state"):
        predict(torch.zeros(3, 2, 1, 1), LABELS)
    stateless = Combination(MIXTURE, APG(momentum=0.0)).prepare(MIXTURE.schedule.at([100, 500, 900]), LABELS)
    assert stateless(torch.zeros(3, 2, 1, 1), LABELS).x0.isfinite().all()


@pytest.mark.parametrize("by", ["step_interval", "sigma_interval"])
def test_an_interval_is_the_published_one(golden, by):
    """One decision per step, for both evaluations of Heun's: 12 guided ones of 63."""
    data, calls = golden("guidance_interval"), []

    class Normal(Denoiser):
        """The exact denoiser of N(m, 0.25·I), m by label."""

        clip, num_classes, image_shape = False, 1, (2, 4, 4)

        def __init__(self):
            super().__init__()
            self.schedule = NoiseSchedule(named_betas("linear"))

        def prepare(self, levels, y):
            def predict(x_t, i):
                calls.append((len(x_t), levels.sigmas[i]))
                x = x_t * math.sqrt(1 + levels.sigmas[i] ** 2)
                mean = torch.where((y < 0).view(-1, 1, 1, 1), data["mean_u"], data["mean_c"])
                return Prediction(mean + (x - mean) * 0.25 / (0.25 + levels.sigmas[i] ** 2))

            return predict

    interval = {"step_interval": data.json["interval"], "sigma_interval": [0.28, 1.61]}[by]
    rule = ClassifierFreeGuidance(data.json["w"])
    combination = Combination(Normal(), rule, interval=Interval(**{by: interval}))
    x = Heun(data.json["steps"])(combination, lambda: data["noise"], torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(x, data["x"], atol=1e-5, rtol=1e-5)
    guided = [sigma for count, sigma in calls if count == 2]  # a doubled batch
    np.testing.assert_allclose(guided, data["sigma_uncond_calls"].numpy(), rtol=1e-9)
    np.testing.assert_allclose([sigma for _, sigma in calls], data["sigma_cond_calls"].numpy(), rtol=1e-9)
