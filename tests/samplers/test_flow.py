"""Flow denoisers and samplers against SiT and REPA step by step, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from test_parity import RecordedNoise

from calib_guidance.classifiers import GaussianMixtureClassifier
from calib_guidance.denoisers import (
    ClassifierFreeGuidance,
    Combination,
    EDMDenoiser,
    FlowDenoiser,
    GaussianMixture,
    Prediction,
)
from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion import Interval
from calib_guidance.diffusion.paths import path_coefficients, path_time, shifted_time
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GradientStabilizer
from calib_guidance.networks import DiT
from calib_guidance.samplers import DDIM, DDPM, AdaptiveODE, DPMSolver, FlowODE, FlowSDE, Heun, UniPC
from calib_guidance.samplers.diffusion_forms import diffusion
from calib_guidance.weights.dit import to_dit
from calib_guidance.weights.io import Weights, load_weights

SIT = {"sample_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3}


def flow(golden, name, path="linear", **changes):
    """The denoiser of a network fixture."""
    fixture = golden(name)
    is_sit = name == "sit_net"
    network = DiT(**SIT | changes, out_channels=8 if is_sit else 4, num_classes=fixture.json["config"]["num_classes"])
    weights = {n: v for n, v in fixture.weights().items() if not n.startswith("projectors.")}
    load_weights(network, Weights("fixture", to_dit(weights)))
    return FlowDenoiser(network, path=path, time_direction="noise_to_data" if is_sit else "data_to_noise")


def run(denoiser, sampler, fixture, name, guided=None, batch=2):
    """x after each step, least noisy last, of a run of a fixture."""
    start, noise = fixture[f"{name}.z"][:batch], fixture.tensors.get(f"{name}.noise", torch.empty(0, batch))[:, :batch]
    records = []
    scale = sampler.start(lambda: torch.ones(1), sampler.levels(denoiser))
    recorded = RecordedNoise(start / scale, *noise)
    images = sampler(guided or denoiser, recorded, fixture[f"{name}.y"][:batch], None, [records.append])
    assert next(recorded.tensors, None) is None
    # What observers see is in VP coordinates.
    scales = path_coefficients(sampler.path, sampler.at(sampler.levels(denoiser))[0]).scale
    states = [record.x_next * (scales[record.i - 1] if record.i else 1) for record in records]
    assert torch.equal(images, states[-1].float())
    return states


def assert_states(fixture, name, states, skip):
    """``states`` against the stored ones after the first ``skip``, which are the start."""
    stored = fixture[f"{name}.x"]
    for step, state in enumerate(states):
        row = min(step + skip, len(stored) - 1)
        fixture.assert_close(f"{name}.x", state, stored[row][: len(state)], row)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_zero_steps_leave_x_where_it_is(method):
    """Of a Gaussian, by its own velocity, x̂0 = m + (1 − τ)·s²/((1 − τ)²·s² + τ²)·(x − (1 − τ)·m)."""
    model, records = GaussianMixture([[1.0, -0.5]], [0.04]), []
    sampler = FlowODE(6, method, start=0.9, zero_steps=2)
    noise = SampleStreams([0] * 3, range(3), model.image_shape)()
    sampler(model, lambda: noise.clone(), torch.zeros(3, dtype=torch.long), None, [records.append])
    mean, tau = torch.tensor([1.0, -0.5]).double().view(2, 1, 1), np.linspace(0.9, 0.0, 7)

    def velocity(x, tau):
        x0 = mean + (1 - tau) * 0.04 / ((1 - tau) ** 2 * 0.04 + tau**2) * (x - (1 - tau) * mean)
        return (x - x0) / tau

    x = noise.double() * math.hypot(0.1, 0.9)
    for k, record in enumerate(records):
        if k >= 2:
            first = velocity(x, tau[k])
            step = (tau[k + 1] - tau[k]) * first
            if method == "heun" and k < 5:
                step = (tau[k + 1] - tau[k]) * (first + velocity(x + step, tau[k + 1])) / 2
            x = x + step
        found = record.x_next * math.hypot(tau[k + 1], 1 - tau[k + 1])
        torch.testing.assert_close(found.double(), x, atol=1e-5, rtol=1e-5)


ODE = {
    "linear_euler": ({"num_steps": 5}, "linear"),
    "linear_heun": ({"num_steps": 4, "method": "heun", "correct_last": True}, "linear"),
    "vp_euler": ({"num_steps": 4, "path": "vp", "end": 1e-3}, "vp"),
}


@pytest.mark.parametrize("name", ODE)
def test_odes_of_sit(golden, name):
    options, path = ODE[name]
    denoiser, fixture = flow(golden, "sit_net", path), golden("sit_ode")
    sampler = FlowODE(**options)
    sampler.check(denoiser, None)
    states = run(denoiser, sampler, fixture, name)
    assert_states(fixture, name, states, 1)
    assert sampler.nfe(denoiser) == len(fixture[f"{name}.t_calls"])
    if name == "linear_heun":  # without the last correction it is another sample
        other = run(denoiser, FlowODE(4, "heun"), fixture, name)[-1]
        assert (other - states[-1]).abs().max() > 1e-3


def guided_sit(golden, channels=3):
    return Combination(flow(golden, "sit_net"), ClassifierFreeGuidance(1.5), channels=channels)


def test_sit_guides_three_channels(golden):
    fixture, denoiser = golden("sit_ode"), flow(golden, "sit_net")
    name = "linear_euler_cfg"
    assert_states(fixture, name, run(denoiser, FlowODE(4), fixture, name, guided_sit(golden)), 1)
    wrong = run(denoiser, FlowODE(4), fixture, name, guided_sit(golden, None))[-1]
    assert (wrong - fixture[f"{name}.x"][-1][:2]).abs().max() > 1e-2


SDE = {
    "linear_sigma_mean": {"num_steps": 6},
    "linear_sigma_mean_cfg": {"num_steps": 6},
    "linear_sbdm_mean": {"num_steps": 6, "form": "sbdm", "start": 0.95},
    "linear_constant_tweedie": {"num_steps": 5, "form": "constant", "norm": 0.5, "last_step": "tweedie"},
    "linear_linear_euler": {
        "num_steps": 5,
        "form": "linear",
        "norm": 0.8,
        "last_step": "euler",
        "last_step_size": 0.05,
    },
    "linear_decreasing_none": {"num_steps": 4, "form": "decreasing", "last_step": "none"},
    "gvp_sigma_mean": {"num_steps": 5, "path": "gvp"},
    "vp_sbdm_mean": {"num_steps": 24, "form": "sbdm", "path": "vp"},
    "linear_sigma_heun": {"num_steps": 5, "method": "heun"},
}


@pytest.mark.parametrize("name", SDE)
def test_sdes_of_sit(golden, name):
    fixture = golden("sit_sde")
    denoiser = flow(golden, "sit_net", SDE[name].get("path", "linear"))
    sampler = FlowSDE(**SDE[name])
    states = run(denoiser, sampler, fixture, name, guided_sit(golden) if name.endswith("cfg") else None)
    is_none = sampler.last_step == "none"  # whose last state is stored twice
    assert len(states) == len(fixture[f"{name}.x"]) - is_none
    assert_states(fixture, name, states, 0)
    if name == "linear_sigma_heun":  # two for each drift of SiT, which computes velocity and score apart
        assert 2 * sampler.nfe(denoiser) == len(fixture[f"{name}.t_calls"])


def test_the_adaptive_ode_of_sit(golden):
    """SiT's result and ours, of rtol 1e-3, are as near to a more exact one."""
    fixture, name = golden("sit_ode"), "linear_dopri5"
    exact, found = (
        run(flow(golden, "sit_net"), AdaptiveODE(rtol=rtol, together=True), fixture, name)[-1].float()
        for rtol in (1e-5, 1e-3)
    )
    for each in (fixture[f"{name}.x"][-1], found):
        torch.testing.assert_close(each, exact, atol=2e-3, rtol=1e-3)
    assert not torch.equal(found, exact)


def test_encoding_is_the_reverse_ode_of_sit(golden):
    fixture, name = golden("sit_ode"), "linear_reverse_euler"
    denoiser = flow(golden, "sit_net")
    noise = FlowODE(3).encode(denoiser, fixture[f"{name}.z"], fixture[f"{name}.y"])
    fixture.assert_close(f"{name}.x", noise, fixture[f"{name}.x"][-1], 3)


REPA = {
    "sde_plain": (FlowSDE(6, "linear"), 1.0, None),
    "sde_interval": (FlowSDE(7), 1.8, (0, 0.7)),
    "sde_interval_low": (FlowSDE(7), 2.2, (0.3, 0.9)),
    "sde_cosine": (FlowSDE(6, "linear", path="gvp"), 1.5, (0, 0.8)),
    "ode_euler_interval": (FlowODE(8), 1.8, (0.25, 0.75)),
    "ode_heun_interval": (FlowODE(8, "heun"), 1.5, (0.125, 0.625)),
    "ode_euler_plain": (FlowODE(5), 1.0, None),
}


@pytest.mark.parametrize("name", REPA)
def test_samplers_of_repa(golden, name):
    """Guidance on all channels, in an interval of t with both ends, decided where a step starts."""
    sampler, weight, interval = REPA[name]
    fixture = golden("repa_sde" if "sde" in name else "repa_ode")
    denoiser = flow(golden, "repa_net", sampler.path)
    where = Interval(flow_interval=interval)
    if sampler.path == "gvp":
        where = Interval(sigma_interval=np.tan(np.pi / 2 * np.array(interval)))  # its t has other noise
    guided = Combination(denoiser, ClassifierFreeGuidance(weight), interval=where)
    if interval is not None:
        active = guided.interval.active(sampler.levels(denoiser))[::-1]
        assert active == fixture[f"{name}.guided"].bool().tolist()
    states = run(denoiser, sampler, fixture, name, guided if weight > 1 else None)
    assert_states(fixture, name, states, 0)


REPAE = {
    "sde_interval": (FlowSDE(7), 2.5, (0, 0.75)),
    "sde_plain": (FlowSDE(5), 1.0, None),
    "ode_heun_interval": (FlowODE(5, "heun"), 1.9, (0, 0.825)),
}


@pytest.mark.parametrize("name", REPAE)
def test_samplers_of_repae(golden, tmp_path, name):
    """Those of REPA, on a network whose tokens are pixels of the latents."""
    sampler, weight, interval = REPAE[name]
    fixture = golden("repae_sde")
    torch.save({"ema": golden("repae_net").weights()}, tmp_path / "repae.pt")
    network = DiT(4, 1, 16, 3, 2, 6, 6)
    denoiser = FlowDenoiser(network, str(tmp_path / "repae.pt"), "linear", "data_to_noise", 1)
    guided = Combination(denoiser, ClassifierFreeGuidance(weight), interval=Interval(flow_interval=interval))
    if interval is not None:
        active = guided.interval.active(sampler.levels(denoiser))[::-1]
        assert active == fixture[f"{name}.guided"].bool().tolist()
    assert_states(fixture, name, run(denoiser, sampler, fixture, name, guided if weight > 1 else None), 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sit_net", "repa_net", "repa_net_qknorm"])
def test_networks_of_sit_and_repa(golden, name):
    fixture = golden(name)
    changes = {"num_heads": 4, "qk_norm": True} if "qk" in name else {}
    denoiser = flow(golden, name, **changes)
    classes, t = fixture.json["config"]["num_classes"], fixture["t"].double()
    tau = (1 - t if name == "sit_net" else t).clamp(1e-5, 1 - 1e-6)  # where x̂0 says what the velocity is
    levels = denoiser.schedule.at_sigmas(tau / (1 - tau))
    y = torch.where(fixture["y"] == classes, -1, fixture["y"])
    scale = torch.hypot(tau, 1 - tau).view(-1, 1, 1, 1)
    x = fixture["x"].double()
    x0, variance, *_ = denoiser.prepare(levels, y)(x / scale, torch.arange(len(t)))
    assert variance is None
    tau = tau.view(-1, 1, 1, 1)
    sign = -1 if name == "sit_net" else 1
    fixture.assert_close("output", sign * (x - x0) / tau)
    fixture.assert_close("t_emb", denoiser.network.embed_time(fixture["t"]))
    if name == "sit_net":
        both = denoiser.network(fixture["x"], fixture["t"], y)
        fixture.assert_close("output_both_halves", both)


@pytest.mark.parametrize(("name", "path"), [("Linear", "linear"), ("GVP", "gvp"), ("VP", "vp")])
def test_paths(golden, name, path):
    """Coefficients, diffusion forms, and the conversions of a velocity, over SiT's t from noise to data."""
    fixture = golden("sit_paths")
    tau = 1 - fixture["t"].double().numpy()
    c = path_coefficients(path, tau)
    for key, value in {"alpha": c.alpha, "sigma": c.sigma, "d_alpha": -c.d_alpha, "d_sigma": -c.d_sigma}.items():
        fixture.assert_close(f"{name}.{key}", torch.from_numpy(value))
    np.testing.assert_allclose(path_time(path, 1 / (1 + c.ratio**2)), tau, rtol=1e-9)
    for form in ("sigma", "linear", "constant", "decreasing", "sbdm"):
        sampler = FlowSDE(form=form, path=path, start=0.99)
        key = f"{name}.diffusion_{'SBDM' if form == 'sbdm' else form}"
        fixture.assert_close(key, torch.from_numpy(diffusion(sampler.form, sampler.norm, sampler.path, tau)))
    alpha, sigma, d_alpha, d_sigma = (torch.from_numpy(a).view(-1, 1, 1, 1, 1) for a in c)
    x, v = fixture["x"].double(), -fixture["velocity"].double()
    x0 = (d_sigma * x - sigma * v) / (d_sigma * alpha - sigma * d_alpha)
    for step in range(len(tau)):
        fixture.assert_close(f"{name}.data", x0[step], fixture[f"{name}.data"][step], step)
        score = -(x - alpha[step] * x0[step]) / sigma[step] ** 2
        fixture.assert_close(f"{name}.score", score, fixture[f"{name}.score"][step], step)


def test_scores_of_repa(golden):
    fixture = golden("repa_convert")
    tau = fixture["t"]
    for name, path in (("linear", "linear"), ("cosine", "gvp")):
        alpha, sigma, d_alpha, d_sigma = (
            torch.from_numpy(a).view(-1, 1, 1, 1, 1) for a in path_coefficients(path, tau)
        )
        x, v = fixture["x"].double(), fixture["velocity"].double()
        x0 = (d_sigma * x - sigma * v) / (d_sigma * alpha - sigma * d_alpha)
        fixture.assert_close(f"{name}.score", -(x - alpha * x0) / sigma**2)
    fixture.assert_close("diffusion", 2 * torch.from_numpy(diffusion("linear", 1.0, "linear", tau.numpy())))


MEANS, COVARIANCES = [[-1.2, 0.4], [0.6, 1.1]], [[[0.5, 0.2], [0.2, 0.3]], [[0.25, -0.12], [-0.12, 0.4]]]


class Velocity(torch.nn.Module):
    """The velocity of a mixture in closed form, behind the interface of a network."""

    image_size, in_channels, out_channels, num_classes = 1, 2, 2, 2

    def __init__(self, mixture, path, direction, time_scale):
        super().__init__()
        self.mixture, self.path, self.direction, self.time_scale = mixture, path, direction, time_scale
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def check_image(self, shape):
        """Any."""

    def embed_time(self, t):
        return torch.stack([t, torch.zeros_like(t)], 1).double()

    def embed_labels(self, y):
        return torch.stack([torch.zeros(len(y)), y], 1).double()

    def decode(self, x, emb):
        t = emb[:, 0] / self.time_scale
        sign = 1 if self.direction == "data_to_noise" else -1
        tau = (t if sign > 0 else 1 - t).clamp(min=1e-7)
        c = path_coefficients(self.path, tau.numpy())
        alpha, sigma, d_alpha, d_sigma = (torch.from_numpy(a).view(-1, 1, 1, 1) for a in c)
        scale = torch.from_numpy(c.scale).view(-1, 1, 1, 1)
        abar = 1 / (1 + torch.from_numpy(c.ratio) ** 2)
        x0 = self.mixture.posterior_mean(x.double() / scale, abar, emb[:, 1].long())
        return sign * (d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma)


class Preconditioned(Velocity):
    """F of EDM's and EDM2's preconditioning, (D − c_skip·x)/c_out, of the same law."""

    def decode(self, x, emb):
        sigma = torch.exp(4 * emb[:, :1]).view(-1, 1, 1, 1)
        total = sigma**2 + 0.25
        x = x.double() * total.sqrt()
        x0 = self.mixture.posterior_mean(x / (1 + sigma**2).sqrt(), 1 / (1 + sigma**2), emb[:, 1].long())
        return (x0 - 0.25 / total * x) / (0.5 * sigma / total.sqrt())


# Few steps: what one law has in common it has at each.
SAMPLERS = [
    DDPM("15"),
    DDIM("15"),
    DPMSolver(8),
    UniPC(8),
    Heun(8),
    FlowODE(8),
    FlowODE(8, "heun", correct_last=True),
    FlowODE(8, "heun", "gvp", shift=3.0),
    FlowSDE(8),
    AdaptiveODE(rtol=1e-3, together=True),
    FlowSDE(8, "sbdm", path="vp"),
    FlowSDE(8, method="heun"),
]


@pytest.mark.parametrize("direction", ["data_to_noise", "noise_to_data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_denoisers_of_one_law_give_the_same_samples_under_every_sampler(path, direction):
    """With classifier guidance at work. The VP model's largest σ is 151; others start at pure noise."""
    mixture = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    network = Velocity(mixture, path, direction, 3.0).double()
    denoiser = FlowDenoiser(network, None, path, direction, 3.0, is_latent=False)
    twin = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    twin.__class__ = type("Twin", (GaussianMixture,), {"max_sigma": denoiser.max_sigma})
    guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture), scale=0.3)
    y = torch.arange(6) % 2
    for sampler in SAMPLERS:
        sampler.clip_denoised = False
        found, expected = (
            sampler(model, SampleStreams([0] * 6, range(6), (2, 1, 1)), y, guidance) for model in (denoiser, twin)
        )
        assert torch.isfinite(found).all()
        # At t of SiT's direction, 1 − τ in float32 has few digits of τ.
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_a_model_of_sigma_gives_the_same_samples(monkeypatch):
    """EDM2's coordinates; it starts at σ = 80."""
    mixture = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    denoiser = EDMDenoiser(Preconditioned(mixture, "linear", "data_to_noise", 1.0).double())
    monkeypatch.setattr(GaussianMixture, "max_sigma", denoiser.max_sigma)
    guidance = ClassifierGuidance(GaussianMixtureClassifier(mixture), scale=0.3)
    y = torch.arange(6) % 2
    for sampler in SAMPLERS:
        sampler.clip_denoised = False
        found, expected = (
            sampler(model, SampleStreams([0] * 6, range(6), (2, 1, 1)), y, guidance) for model in (denoiser, mixture)
        )
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_dopri5_takes_the_steps_of_scipy():
    """RK45 on the ODE of a mixture: the same step sizes, hence the same result to rounding."""
    from scipy.integrate import solve_ivp

    mixture = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    denoiser = FlowDenoiser(Velocity(mixture, "linear", "data_to_noise", 1.0).double(), is_latent=False)
    x, y = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(3)).double(), torch.tensor([0, 1])
    times = []

    def velocity(t, x, n):
        times.append(t)
        found = mixture.posterior_mean(
            torch.from_numpy(x).view(1, 2, 1, 1) / np.hypot(t, 1 - t),
            torch.tensor((1 - t) ** 2 / (t**2 + (1 - t) ** 2)).view(1, 1, 1, 1),
            y[n : n + 1],
        )
        return ((torch.from_numpy(x) - found.flatten()) / t).numpy()

    found = AdaptiveODE(start=0.98, end=0.02, rtol=1e-6)(denoiser, lambda: x.float(), y)
    scale = math.hypot(0.98, 0.02)
    for n in range(2):
        start = x[n].float().double().flatten().numpy() * scale
        solved = solve_ivp(velocity, (0.98, 0.02), start, "RK45", args=(n,), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found[n].flatten().numpy(), solved.y[:, -1], rtol=2e-6, atol=2e-6)
    assert len(times) > 60
    few = AdaptiveODE(start=0.98, end=0.02, rtol=0.1, atol=0.1)(denoiser, lambda: x.float(), y)
    assert (few - found).abs().max() > 1e-5


def test_encoding_and_sampling_are_inverse():
    mixture = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    denoiser = FlowDenoiser(Velocity(mixture, "linear", "data_to_noise", 1.0).double(), is_latent=False)
    guidance, y = ClassifierGuidance(GaussianMixtureClassifier(mixture), scale=0.3), torch.arange(4) % 2
    noise = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    for sampler, atol in (
        (AdaptiveODE(start=0.999, rtol=1e-6), 1e-3),
        (FlowODE(60, "heun", start=0.999), 2e-2),
    ):
        images = sampler(denoiser, lambda: noise, y, guidance)
        torch.testing.assert_close(sampler.encode(denoiser, images, y, guidance), noise, atol=atol, rtol=0)
        assert (sampler.encode(denoiser, images, y) - noise).abs().max() > 0.05  # without guidance it is another


def test_adaptive_ode_refuses_what_remembers_steps():
    guidance = ClassifierGuidance(
        GaussianMixtureClassifier(GaussianMixture(MEANS, COVARIANCES)), stabilizer=GradientStabilizer(ema=0.5)
    )
    with pytest.raises(ValueError, match="take FlowODE"):
        AdaptiveODE().check(GaussianMixture(MEANS, COVARIANCES), guidance)
    with pytest.raises(ValueError, match="rtol"):
        AdaptiveODE(rtol=0)


class FixedVelocity(Denoiser):
    """x̂0 = x − τ·v of a fixed v, on the linear path."""

    image_shape, num_classes, clip, max_sigma = (2, 1, 1), None, False, math.inf
    schedule = GaussianMixture(MEANS, COVARIANCES).schedule

    def __init__(self, v):
        super().__init__()
        self.v = v

    def prepare(self, levels, y):
        tau = path_time("linear", levels.alphas_cumprod)
        scale = np.hypot(tau, 1 - tau)
        return lambda x, i: Prediction(float(scale[i]) * x - float(tau[i]) * self.v)


def test_a_score_moves_the_velocity_and_the_image_as_derived():
    """s·g in the score of x_τ gives v − s·τ/(1−τ)·g and x̂0 + s·τ²/(1−τ)·g; at pure noise guidance adds nothing."""
    mixture = GaussianMixture(MEANS, COVARIANCES)
    v = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    classifier, s, largest = GaussianMixtureClassifier(mixture), 0.7, 0.0
    denoiser, y, records = FixedVelocity(v), torch.tensor([0, 1, 1]), []
    guidance = ClassifierGuidance(classifier, scale=s)
    sampler = FlowODE(4)
    noise = SampleStreams([0] * 3, range(3), (2, 1, 1))
    sampler(denoiser, noise, y, guidance, [records.append])
    tau = sampler.at(sampler.levels(denoiser))[0]
    for record in records:
        t, scale = tau[record.i], np.hypot(tau[record.i], 1 - tau[record.i])
        x = record.x_t * scale
        following = record.x_next * (np.hypot(tau[record.i - 1], 1 - tau[record.i - 1]) if record.i else 1)
        velocity = (following - x) / (-0.25)
        # The classifier's gradient is at x̂0. In the score of x_τ = scale·x_t, the VP score is smaller by scale.
        g = record.guided.aux.gradient / scale
        shift = 0 if t == 1 else s * t / (1 - t) * g
        torch.testing.assert_close(velocity, v - shift, atol=1e-5, rtol=1e-5)
        largest = max(largest, 0 if t == 1 else float(shift.abs().max()))
    assert largest > 0.01


def test_pure_noise_is_finite_everywhere():
    """ᾱ = 0 in the denoiser, in rules of every representation, and under guidance."""
    mixture = GaussianMixture(MEANS, COVARIANCES, class_conditional=True)
    denoiser = FlowDenoiser(Velocity(mixture, "linear", "data_to_noise", 1.0).double(), is_latent=False)
    levels = denoiser.schedule.at_sigmas([math.inf, 1.0])
    assert levels.alphas_cumprod[0] == 0
    assert levels.sigmas[0] == math.inf
    x = torch.randn(4, 2, 1, 1).double()
    y = torch.tensor([0, 1, 0, 1])
    x0 = denoiser.prepare(levels, y)(x, 0).x0
    torch.testing.assert_close(x0.flatten(1), torch.tensor(MEANS).double()[y], atol=1e-6, rtol=0)


def test_shift_multiplies_sigma():
    tau = np.linspace(0.1, 0.9, 5)
    shifted = shifted_time(tau, 3.0)
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * tau / (1 - tau))
    assert shifted_time(np.array([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowODE(0), "num_steps must be at least 1"),
        (lambda: FlowODE(4, zero_steps=4), "zero_steps must be at least 0 and below 4, got 4"),
        (lambda: FlowODE(method="rk4"), "method.*euler"),
        (lambda: FlowODE(path="cosine"), "path.*gvp"),
        (lambda: FlowODE(shift=0), "shift > 0"),
        (lambda: FlowODE(start=0.2, end=0.3), "end < start"),
        (lambda: FlowSDE(form="sbdm"), "set start below 1"),
        (lambda: FlowSDE(last_step_size=0), "last_step_size"),
        (lambda: FlowSDE(form="wave"), "form.*sigma"),
    ],
)
def test_what_cannot_be_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()
