"""Training-free guidance."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calib_guidance.classifiers import Classifier, CLIPClassifier, Ensemble, GaussianMixtureClassifier
from calib_guidance.denoisers import CFGPlusPlus, Combination, Denoiser, GaussianMixture, Prediction
from calib_guidance.diffusion import Interval, SampleStreams
from calib_guidance.diffusion.schedules import NoiseSchedule
from calib_guidance.guidance import ClassifierGuidance, TrainingFreeGuidance
from calib_guidance.samplers import DDIM, DDPM, AdaptiveODE, DPMSolver, FlowODE, FlowSDE, Heun, UniPC
from calib_guidance.samplers.evaluate import Evaluate, on_device
from calib_guidance.scores import DivergenceRegularized, TemperedLogProb

MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02])
Y = torch.arange(3)


class Linear(Classifier):
    """log-softmax of W·vec(x)."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.num_classes = torch.nn.Parameter(weight), len(weight)

    def forward(self, x, t=None):
        return x.flatten(1) @ self.weight.T


class LinearNoise(Denoiser):
    """ε = A·vec(x_t)."""

    image_shape, num_classes = (3, 4, 4), None

    def __init__(self, matrix, alphas_cumprod):
        super().__init__()
        self.matrix = matrix
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.schedule = NoiseSchedule(betas)

    def prepare(self, levels, y):
        abar = torch.tensor(levels.alphas_cumprod)

        def predict(x_t, i):
            noise = (x_t.flatten(1) @ self.matrix.T).view_as(x_t)
            return Prediction((x_t - (1 - abar[i]).sqrt() * noise) / abar[i].sqrt())

        return predict


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "rho_only", "mu_only", "recur", "decrease"])
@pytest.mark.parametrize("step", [0, 5, 9])
def test_a_step_is_the_published_one(golden, name, step):
    data = golden("tfg")
    options = dict(data.json["settings"][name])
    recurrence = options.pop("recur_steps")
    options |= {"samples": options.pop("eps_bsz"), "iterations": options.pop("iter_steps")}
    bank = iter(data["noise_bank"])

    class FromBank(TrainingFreeGuidance):
        def draw(self, numbers, call, x_t):
            return torch.stack([next(bank) for _ in range(self.samples)])

    guidance = FromBank(Linear(data["W"]), **options)
    denoiser = LinearNoise(data["A"], data["alpha_bar"].flip(0).numpy())
    levels, sampler, x = denoiser.schedule.levels, DDIM("10", eta=1.0), data["x"]
    i, y = 9 - step, torch.full((2,), 3)
    np.testing.assert_allclose(guidance.strengths(levels)[:, i], data[f"{name}_{step}_rms"].numpy(), rtol=1e-12)
    evaluate = Evaluate(sampler, denoiser, guidance, y, x)
    c = SimpleNamespace(**{k: on_device(v, x) for k, v in sampler.coefficients(levels).items()}, state={})
    abar, before = float(data["alpha_bar"][step]), float(data["alpha_bar_prev"][step])
    for _ in range(recurrence):
        mean, std = sampler.step(x, i, evaluate, c)
        mean, _ = evaluate.finish(mean, i)
        found = mean + std * next(bank) if i else mean
        x = np.sqrt(abar / before) * found + np.sqrt(1 - abar / before) * next(bank)
    torch.testing.assert_close(found, data[f"{name}_{step}"], atol=2e-5, rtol=2e-5)


def run(guidance, sampler=None, rows=Y, denoiser=MIXTURE):
    noise = SampleStreams([0] * len(rows), rows.tolist(), MIXTURE.image_shape)
    sampler = sampler or DDIM(8, eta=1.0)
    sampler.check(denoiser, guidance)
    return sampler(denoiser, noise, Y[rows], guidance)


def tfg(**options):
    return TrainingFreeGuidance(GaussianMixtureClassifier(MIXTURE), **{"rho": 0.05, "mu": 0.02} | options)


@pytest.mark.parametrize("sampler", [DDIM(8, eta=1.0), DDIM(8, recurrence=2), DDPM("8"), DPMSolver(8), UniPC(8)])
def test_a_sample_depends_on_no_batch(sampler):
    expected = run(tfg(), sampler)
    assert not torch.allclose(expected, run(None, sampler), atol=1e-3)
    assert torch.equal(run(tfg(), sampler), expected)
    for rows in (torch.tensor([1]), torch.tensor([2, 0])):
        torch.testing.assert_close(run(tfg(), sampler, rows), expected[rows], atol=1e-4, rtol=1e-3)


def test_without_strength_or_outside_its_interval_it_is_off():
    plain = run(None)
    assert torch.equal(run(tfg(rho=0.0, mu=0.0)), plain)
    assert torch.equal(run(tfg(interval=Interval([5000, 6000]))), plain)


def test_in_clean_space_alone_it_is_the_gradient_at_x0():
    """μ alone, N_iter 1, no noise: x' moves by √ᾱ'·μ_t·∇f(x̂0)."""
    guidance = tfg(rho=0.0, mu=0.3, sigma=0.0)
    levels, x = MIXTURE.schedule.respace(8).levels, torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    predict = MIXTURE.prepare(levels, Y)
    guided = guidance.prepare(levels, Y)(predict, x, 4)
    gradient = ClassifierGuidance(guidance.classifier).prepare(levels, Y)(predict, x, 4).aux.gradient
    before = np.sqrt(levels.alphas_cumprod[3])
    torch.testing.assert_close(guided.move, float(guidance.strengths(levels)[1, 4] * before) * gradient)
    torch.testing.assert_close(guided.prediction.x0, predict(x, 4).x0)
    # ρ alone carries the same gradient through the network.
    through = tfg(rho=0.3, mu=0.0, sigma=0.0)
    guided = through.prepare(levels, Y)(predict, x, 4)
    options = {"backprop_through_denoiser": True}
    gradient = ClassifierGuidance(guidance.classifier, **options).prepare(levels, Y)(predict, x, 4).aux.gradient
    alpha = levels.alphas_cumprod[4] / levels.alphas_cumprod[3]
    torch.testing.assert_close(guided.move, float(through.strengths(levels)[0, 4] / np.sqrt(alpha)) * gradient)


def test_with_a_rule_below():
    conditional = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02], class_conditional=True)
    for sampler in (DDIM(8), DPMSolver(8)):
        both = run(tfg(), sampler, denoiser=Combination(conditional, CFGPlusPlus()))
        assert not torch.allclose(both, run(None, sampler, denoiser=Combination(conditional, CFGPlusPlus())), atol=1e-4)


def test_any_differentiable_predictor_guides():
    """CLIP by its prompts, an ensemble, with any score: the step is what their gradients say."""
    torch.manual_seed(0)
    denoiser = LinearNoise(0.05 * torch.randn(48, 48), np.linspace(0.99, 0.05, 10))
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    clip = CLIPClassifier(["a", "b"], {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    linear = Linear(torch.randn(2, 48))
    levels, x, y = denoiser.schedule.levels, torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    t = torch.tensor([int(levels.times[4])] * 2)
    for classifier in (clip, linear, Ensemble([linear, Linear(torch.randn(2, 48))])):
        for score in (TemperedLogProb(1.0, 0.8), DivergenceRegularized("js", 0.1)):
            guide = TrainingFreeGuidance(classifier, score, rho=0.0, mu=0.3, sigma=0.0)
            guided = guide.prepare(levels, y)(denoiser.prepare(levels, None), x, 4)
            x0 = guided.prediction.x0.requires_grad_()
            value = score(classifier(x0, t), y, float(t[0]) / 9).sum()
            step = float(guide.strengths(levels)[1, 4] * np.sqrt(levels.alphas_cumprod[3]))
            torch.testing.assert_close(guided.move, step * torch.autograd.grad(value, x0)[0], atol=1e-6, rtol=1e-4)
            assert guided.move.abs().max() > 0


def test_what_cannot_be_is_refused():
    # Their x' has other coordinates, and some have two evaluations.
    for sampler in (Heun(4), FlowODE(4), FlowODE(4, method="heun"), FlowSDE(4), AdaptiveODE()):
        named = f"{type(sampler).__name__} has others: set the sampler to DDIM .eta: 1 in the source"
        with pytest.raises(ValueError, match=named):
            sampler.check(MIXTURE, tfg())
        with pytest.raises(ValueError, match=named):
            sampler(MIXTURE, lambda: torch.zeros(3, 2, 1, 1), Y, tfg())
    for options, named in (
        ({"rho": -1.0}, "at least 0, got -1.0"),
        ({"samples": 0}, "at least 1, got 0"),
        ({"rho_schedule": "cosine"}, "increase, decrease, constant"),
        ({"sigma_schedule": "increase"}, "decrease, constant"),
    ):
        with pytest.raises(ValueError, match=named):
            tfg(**options)
