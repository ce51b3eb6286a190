"""Any score with any denoiser, sampler and classifier, two or three steps each."""

import itertools

import pytest
import torch
from torch import nn

from calib_guidance.classifiers import Classifier, Ensemble, NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    EDMDenoiser,
    RemapClasses,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule, SwitchedGuidance
from calib_guidance.networks import DiT, EncoderUNet, SmallResNet, UNet
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, TemperedLogProb, Tilted

Y = torch.tensor([0, 1, 2, 1])
SCORES = {
    "log_prob": TemperedLogProb(),
    "tempered": TemperedLogProb(1.0, 0.5),
    "entropy": EntropyRegularized(0.1, "linear"),
    **{name: DivergenceRegularized(name, 0.1) for name in ("rkl", "fkl", "js", "hellinger")},
    "tilted": Tilted(-0.2, 2),
}
SAMPLERS = {
    "ddpm": DDPM("2"),
    "ddim": DDIM("2"),
    "heun": Heun(2),
    "churn": Heun(2, s_churn=1.0, guide_correction=True),
    "dpm_solver": DPMSolver(3),
    "dpm_solver_sde": DPMSolver(3, sde=True, spacing="karras"),
    "unipc": UniPC(3),
}
OTHER_TERMS = {
    "ddim_ancestral": DDIM("2", guidance_scaling="ddpm_equivalent", data_std=1.6),
    "dpm_solver_ancestral": DPMSolver(3, guidance_scaling="ddpm_equivalent", data_std=1.6),
    "dpm_solver_sde_score": DPMSolver(3, sde=True, guidance_scaling="score"),
    "unipc_ancestral": UniPC(3, guidance_scaling="ddpm_equivalent", data_std=1.6),
}


class Decoder(nn.Module):
    """Latents of four channels to gray images of twice the side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 1)

    def forward(self, x0):
        return self.conv(nn.functional.interpolate(x0, scale_factor=2.0, mode="nearest"))


def random_(module):
    """No layer stays zero, as it is initialized, so that everything matters."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return module


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    adm = {"channel_mult": (1,), "num_res_blocks": 1, "use_scale_shift_norm": True}
    edm = random_(UNet(8, 1, 32, 1, num_classes=3, **adm))
    network, weaker = (random_(UNet(8, 1, 32, 2, num_classes=3, **adm)) for _ in range(2))
    plain = ADMDenoiser(network)
    dit = random_(DiT(4, 2, 32, 1, 2, num_classes=3))
    denoisers = {
        "adm": plain,
        "unconditional": ADMDenoiser(network, class_conditional=False),
        "edm": EDMDenoiser(edm),
        "dit": DiTDenoiser(dit, vae=Decoder()),
        "classifier_free": Combination(plain, ClassifierFreeGuidance(1.5)),
        "autoguidance": Combination(plain, ClassifierFreeGuidance(1.5), negative=Autoguidance(ADMDenoiser(weaker))),
        "dit_three_channels": Combination(DiTDenoiser(dit, vae=Decoder()), ClassifierFreeGuidance(1.5), channels=3),
        "remapped": RemapClasses(plain, [2, 0, 1]),
    }
    noise_aware = NoiseAwareClassifier(
        random_(EncoderUNet(8, 1, 32, 3, 1, channel_mult=(1,), num_head_channels=32, resblock_updown=False))
    )
    first, second = (OffTheShelfClassifier(SmallResNet(3, 1, (16, 16), 1), 3, softplus_beta=3.0) for _ in range(2))
    classifiers = {"off_the_shelf": first, "noise_aware": noise_aware, "ensemble": Ensemble([first, second])}
    return denoisers, classifiers


def guide(classifier: Classifier, score, apply_to="score", **options):
    at = "x_t" if isinstance(classifier, NoiseAwareClassifier) else "x0"
    return ClassifierGuidance(classifier, score, 3.0, apply_to=apply_to, **{"classifier_input": at} | options)


def run(sampler, denoiser, guidance=None):
    sampler.check(denoiser, guidance)
    noise = SampleStreams([0] * len(Y), range(len(Y)), denoiser.image_shape)
    return sampler(denoiser, noise, Y, guidance)


@pytest.mark.parametrize("name", [*SAMPLERS, *OTHER_TERMS])
def test_every_score_denoiser_and_classifier(parts, name):
    """Any two of sampler, denoiser, classifier and score come together: each pair of the first two with every fourth score."""
    denoisers, classifiers = parts
    samplers = SAMPLERS | OTHER_TERMS
    sampler = samplers[name]
    scores = list(SCORES.values()) if name in SAMPLERS else [SCORES["js"], SCORES["tilted"]]
    every = min(4, len(scores))
    for number, (kind, denoiser) in enumerate(denoisers.items()):
        plain, seen = run(sampler, denoiser), set()
        # Noise-aware classifiers read images with noise, and a DiT has latents.
        ways = [way for way in classifiers if not ("dit" in kind and way == "noise_aware")]
        turn = number + [*samplers].index(name)
        chosen = scores[turn % every :: every]
        for way, score in enumerate(chosen, turn // 2):
            images = run(sampler, denoiser, guide(classifiers[ways[way % len(ways)]], score))
            assert images.isfinite().all()
            assert not torch.allclose(images, plain, atol=1e-5)
            seen.add(images.numpy().tobytes())
        assert len(seen) == len(chosen)


@pytest.mark.parametrize("apply_to", ["cfg_residual", "sample"])
def test_other_ways_to_enter(parts, apply_to):
    denoisers, classifiers = parts
    free = apply_to == "cfg_residual"
    for (kind, denoiser), (name, sampler) in itertools.product(denoisers.items(), SAMPLERS.items()):
        guided = guide(classifiers["off_the_shelf"], None, apply_to, schedule=GuidanceSchedule(0.3))
        if isinstance(denoiser, Combination) if free else isinstance(sampler, Heun):
            assert not torch.allclose(run(sampler, denoiser, guided), run(sampler, denoiser), atol=1e-5), (kind, name)
        elif not free:
            with pytest.raises(ValueError, match="Heun"):
                sampler.check(denoiser, guided)


@pytest.mark.parametrize("name", SAMPLERS)
def test_switched_recurrent_and_through_the_denoiser(parts, name):
    denoisers, classifiers = parts
    sampler = SAMPLERS[name]
    switched = SwitchedGuidance(
        guide(classifiers["ensemble"], SCORES["tilted"]), guide(classifiers["noise_aware"], None), switch_at=500
    )
    for kind in ("adm", "edm", "classifier_free"):
        plain = run(sampler, denoisers[kind])
        through = guide(classifiers["off_the_shelf"], SCORES["js"], backprop_through_denoiser=True)
        for guidance in (switched, through):
            assert not torch.equal(run(sampler, denoisers[kind], guidance), plain)
    if isinstance(sampler, (DDPM, DDIM)):
        again = type(sampler)("2", recurrence=2)
        assert not torch.allclose(run(again, denoisers["dit"], through), run(again, denoisers["dit"]), atol=1e-5)
