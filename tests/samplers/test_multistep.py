"""DPM-Solver++ and UniPC against diffusers' schedulers step by step, against closed forms, and against DDIM."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from test_heun import MIXTURE, linear, streams

from calib_guidance.classifiers import GaussianMixtureClassifier
from calib_guidance.denoisers import ClassifierFreeGuidance, Combination, GaussianMixture
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
from calib_guidance.samplers import DDIM, DPMSolver, UniPC

SPACED = {"steps": 12, "spacing": "karras", "sigma_min": 0.02, "sigma_max": 60.0}
REFERENCES = {
    "dpm": (DPMSolver, {}, DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde": (DPMSolver, {"sde": True}, DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPC, {}, UniPCMultistepScheduler, {"solver_type": "bh2"}),
}


def mixture(**options):
    return GaussianMixture(**MIXTURE, class_conditional=True, **options)


@pytest.mark.parametrize("apply_to", [None, "score", "cfg_residual"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", REFERENCES)
def test_every_step_of_the_reference(name, order, apply_to):
    """The reference is given the levels and, at its own samples, x̂0 shifted as the score is."""
    kind, options, reference, settings = REFERENCES[name]
    denoiser, y = mixture(), torch.arange(6) % 3
    if apply_to == "cfg_residual":
        denoiser = Combination(denoiser, ClassifierFreeGuidance(1.5))
    guidance = ClassifierGuidance(linear(), scale=0.3, apply_to=apply_to) if apply_to else None
    sampler = kind(order=order, **options, **SPACED, guidance_scaling="score")
    sampler.check(denoiser, guidance)
    drawn, records, source = [], [], streams(6, denoiser)

    def noise():
        drawn.append(source())
        return drawn[-1]

    images = sampler(denoiser, noise, y, guidance, [records.append])
    levels = sampler.levels(denoiser)
    assert len(drawn) == (12 if name == "sde" else 1)
    assert [r.i for r in records] == list(range(11, -1, -1))

    scheduler = reference(
        trained_betas=np.full(1000, 0.01),
        prediction_type="sample",
        solver_order=order,
        use_karras_sigmas=True,
        **settings,
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = torch.from_numpy(np.append(levels.sigmas[::-1], 0.0))
    scheduler.timesteps = torch.arange(11, -1, -1)
    predict = denoiser.prepare(levels, y)
    guide = guidance and guidance.prepare(levels, y)
    x = drawn[0]
    for record in records:
        i, abar = record.i, levels.alphas_cumprod[record.i]
        guided = guide(predict, x, i) if guide else None
        x0 = guided.prediction.x0 if guide else predict(x, i).x0
        if apply_to == "score":
            x0 = x0 + (1 - abar) / math.sqrt(abar) * guided.score
        torch.testing.assert_close(record.x_t, x.float(), atol=1e-5, rtol=1e-5)
        extra = {}
        if name == "sde":
            extra["variance_noise"] = drawn[12 - i] if i else torch.zeros_like(x)
        x = scheduler.step(x0.float(), torch.tensor(i), x, **extra).prev_sample
        torch.testing.assert_close(record.x_next, x.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images, x.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "order", "least", "most"),
    [(DPMSolver, 1, 1.7, 2.3), (DPMSolver, 2, 3.3, 4.7), (UniPC, 1, 3.3, 4.7), (UniPC, 2, 5.5, 9.5)],
)
def test_order_of_convergence_along_the_closed_form_of_one_gaussian(kind, order, least, most):
    """x_σ − μ grows as √(s² + σ²) along each axis. UniPC's corrector raises the order by one."""
    mean, variance = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.09, 0.25, 1.0]).double()
    denoiser = GaussianMixture([mean.tolist()], [variance.diag().tolist()])
    y, low, high = torch.zeros(16, dtype=torch.long), 0.05, 20.0
    mean, variance = mean.view(3, 1, 1), variance.view(3, 1, 1)
    start = streams(16, denoiser)().double()
    x_ve = start * math.sqrt(1 + high**2)
    exact = mean + (x_ve - mean) * ((variance + low**2) / (variance + high**2)).sqrt()
    errors = []
    for n in (16, 32, 64):
        records = []
        sampler = kind(n, spacing="logsnr", sigma_min=low, sigma_max=high, order=order)
        sampler(denoiser, start.clone, y, observers=[records.append])
        # The last level, from which one step leads to x̂0.
        errors.append(float((records[-1].x_t * math.sqrt(1 + low**2) - exact).abs().max()))
    assert least < errors[0] / errors[1] < most
    assert least < errors[1] / errors[2] < most


@pytest.mark.parametrize("term", ["score", "ddpm_equivalent"])
@pytest.mark.parametrize(("sde", "eta"), [(False, 0.0), (True, 1.0)])
def test_first_order_is_ddim_guided_and_not(sde, eta, term):
    denoiser, y, guided = (
        mixture(noise_schedule="cosine"),
        torch.arange(9) % 3,
        {"guidance_scaling": term, "data_std": 0.5},
    )
    for guidance in (None, ClassifierGuidance(linear(), scale=0.2)):
        first = DPMSolver("ddim20", sde, spacing="timesteps", order=1, **guided)(
            denoiser, streams(9, denoiser), y, guidance
        )
        ddim = DDIM("ddim20", eta, **guided)(denoiser, streams(9, denoiser), y, guidance)
        torch.testing.assert_close(first, ddim, atol=2e-5, rtol=2e-5)
        second = DPMSolver("ddim20", sde, spacing="timesteps", **guided)(denoiser, streams(9, denoiser), y, guidance)
        assert (second - ddim).abs().max() > 1e-2


def test_the_sde_keeps_the_distribution():
    denoiser, n = GaussianMixture([[0.5, -0.3]], [[[0.3, 0.1], [0.1, 0.2]]]), 6000
    y = torch.zeros(n, dtype=torch.long)
    options = {"spacing": "logsnr", "sigma_min": 0.02, "sigma_max": 80.0}
    ode, sde = (DPMSolver(64, s, **options)(denoiser, streams(n, denoiser), y).flatten(1) for s in (False, True))
    assert (ode - sde).abs().mean() > 0.1
    torch.testing.assert_close(sde.mean(0), torch.tensor([0.5, -0.3]), atol=0.02, rtol=0)
    torch.testing.assert_close(sde.T.cov(), torch.tensor([[0.3, 0.1], [0.1, 0.2]]), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", [DPMSolver, UniPC])
def test_guided_by_the_exact_classifier_it_samples_the_class(kind):
    """x̂0 + (1−ᾱ)/√ᾱ·∇log p(y|x_t) is the conditional model's x̂0: the samples are its, one by one."""
    free, own, y = GaussianMixture(**MIXTURE), mixture(), torch.arange(300) % 3
    guidance = ClassifierGuidance(GaussianMixtureClassifier(free, noise_aware=True), classifier_input="x_t")
    sampler = kind(30, spacing="timesteps")  # complete steps, which the classifier knows
    expected = sampler(own, streams(300, own), y)
    found = sampler(free, streams(300, free), y, guidance)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    for k in range(3):
        torch.testing.assert_close(
            found[y == k].mean(0).flatten(), torch.tensor(MIXTURE["means"][k]), atol=0.08, rtol=0
        )


@pytest.mark.parametrize("kind", [DPMSolver, UniPC])
def test_fewer_steps_than_ddim_for_the_same_samples(kind):
    denoiser, y = mixture(), torch.arange(30) % 3
    levels = {"spacing": "logsnr", "sigma_max": denoiser.schedule.levels.sigmas[-1]}
    exact, fast = (kind(n, **levels)(denoiser, streams(30, denoiser), y) for n in (1000, 15))
    for ddim in (DDIM(15), DPMSolver(15, order=1, **levels)):
        ddim = ddim(denoiser, streams(30, denoiser), y)
        assert (fast - exact).abs().mean() < 0.2 * (ddim - exact).abs().mean()


@pytest.mark.parametrize("kind", [DPMSolver, UniPC])
def test_one_gradient_per_step_where_guidance_is_on(kind):
    denoiser, y, classifier, records = mixture(), torch.arange(3), linear(), []
    guidance = ClassifierGuidance(classifier, schedule=GuidanceSchedule(every=2))
    sampler = kind(**SPACED)
    sampler(denoiser, streams(3, denoiser), y, guidance, [records.append])
    assert [r.i for r in records if r.guided.aux.logits is not None] == [11, 9, 7, 5, 3, 1]
    assert classifier.calls == 6
    assert sampler.nfe(Combination(denoiser)) == 24
    assert sampler.nfe(denoiser) == 12


def test_spacings():
    denoiser = mixture()
    ends = [denoiser.schedule.levels.sigmas[0], 80.0]
    assert denoiser.schedule.levels.sigmas[-1] > 100
    for spacing, scale in (("karras", lambda s: s ** (1 / 7)), ("logsnr", np.log)):
        sigmas = UniPC(9, spacing).levels(denoiser).sigmas
        np.testing.assert_allclose(sigmas[[0, -1]], ends, rtol=1e-9)
        np.testing.assert_allclose(np.diff(scale(sigmas), 2), 0, atol=1e-9)
        np.testing.assert_allclose(
            UniPC("9", spacing, 0.1, 5.0).levels(denoiser).sigmas[[0, -1]], [0.1, 5.0], rtol=1e-9
        )
    levels = DPMSolver("ddim10", spacing="timesteps").levels(denoiser)
    assert levels.times.tolist() == list(range(0, 1000, 100))


@pytest.mark.parametrize("kind", [DPMSolver, UniPC])
def test_one_step_ends_in_its_prediction_clipped(kind):
    far = GaussianMixture([[3.0, -3.0]], [0.01])
    far.clip = True
    y = torch.zeros(2, dtype=torch.long)
    clipped = kind(1)(far, streams(2, far), y)
    torch.testing.assert_close(clipped, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(2, -1, -1, -1))
    assert kind(1, clip_denoised=False)(far, streams(2, far), y).abs().max() > 1.1


@pytest.mark.parametrize("kind", [DPMSolver, UniPC])
def test_what_cannot_be_says_why(kind):
    denoiser = mixture()
    for arguments, message in (
        ({"spacing": "even"}, "spacing: unknown 'even'; known: logsnr"),
        ({"spacing": "timesteps", "sigma_max": 80.0}, "remove sigma_min and sigma_max"),
        ({"spacing": "karras", "steps": "ddim25"}, "needs a number of at least 1"),
        ({"spacing": "karras", "steps": 0}, "needs a number of at least 1"),
        ({"order": 3}, "order: unknown 3; known: 1, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)
    for sampler, message in (
        (kind("2000", spacing="timesteps"), "cannot take 2000"),
        (kind(spacing="karras", sigma_min=200.0), "0 < sigma_min < sigma_max"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.check(denoiser, None)
    for guidance, message in (
        (ClassifierGuidance(linear(), apply_to="sample"), f"{kind.__name__} has none"),
        (ClassifierGuidance(linear(), schedule=GuidanceSchedule(0.3)), "gamma to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            kind().check(denoiser, guidance)
