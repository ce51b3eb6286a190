"""Flow models: files as SiT and REPA publish them, what they must agree with, and training of one's own."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

import calib_guidance
from calib_guidance.data import digits
from calib_guidance.denoisers import FlowDenoiser
from calib_guidance.diffusion.paths import path_coefficients
from calib_guidance.networks import DiT, UNet
from calib_guidance.samplers import FlowODE
from calib_guidance.tasks import TrainDiffusion
from calib_guidance.training import FlowMatching
from calib_guidance.weights import registry
from calib_guidance.weights.dit import to_dit
from calib_guidance.weights.io import CheckpointError, save_weights
from tests.conftest import replace_cards

TINY = {"sample_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def cards(monkeypatch, golden):
    """Small twins of the published cards, by name; shapes of a DiT among them."""
    made = {}
    for name, fixture, out in (
        ("sit_xl_2_256", "sit_net", 8),
        ("repa_xl_2_256", "repa_net", 4),
        ("dit_xl_2_256", "sit_net", 8),
    ):
        arguments = {**TINY, "out_channels": out, "num_classes": golden(fixture).json["config"]["num_classes"]}
        state = DiT(**arguments).state_dict().values()
        card, count = registry.CARDS[name], sum(value.numel() for value in state)
        made[name] = registry.Card(
            name,
            card.kind,
            card.source,
            "MIT",
            card.used_by,
            4 * count,
            count,
            "DiT",
            arguments,
            card.settings,
            {},
            card.file,
        )
    replace_cards(monkeypatch, made)
    yield made
    registry.reference.cache_clear()


def velocity(denoiser, fixture):
    """The network's velocity, got back from x̂0; close to τ = 0 not at all."""
    t = fixture["t"].double().clamp(1e-4, 1 - 1e-6)
    tau = 1 - t if denoiser.time_direction == "noise_to_data" else t
    y = torch.where(fixture["y"] == denoiser.network.num_classes, -1, fixture["y"])
    c = path_coefficients("linear", tau.numpy())
    scale, tau = (torch.from_numpy(a).view(-1, 1, 1, 1) for a in (c.scale, c.sigma))
    x, each = fixture["x"].double(), torch.arange(len(y))
    with torch.no_grad():
        x0 = denoiser.prepare(denoiser.schedule.at_sigmas(c.ratio), y)(x / scale, each).x0
    return (x - x0) / tau * (-1 if denoiser.time_direction == "noise_to_data" else 1)


def assert_velocity(fixture, denoiser):
    inner = (fixture["t"] > 1e-3) & (fixture["t"] < 1 - 1e-3)
    assert inner.sum() > 1
    fixture.assert_close("output", velocity(denoiser, fixture)[inner], fixture["output"][inner])


@pytest.mark.parametrize("name", ["sit_xl_2_256", "repa_xl_2_256"])
def test_published_files_give_the_published_outputs(golden, cards, tmp_path, monkeypatch, name):
    """Bare, as they are downloaded, and nested, as the training scripts write them; by name and by shape."""
    fixture = golden(name.partition("_")[0] + "_net")
    state = fixture.weights()
    assert any(n.startswith("projectors.") for n in state) == (name == "repa_xl_2_256")
    files = {"bare": state, "nested": {"model": {n: v * 2 for n, v in state.items()}, "ema": state}}
    files["nested"] |= {"opt": {"lr": 1.0}, "args": argparse.Namespace(cfg_scale=1.5), "steps": 4}
    for file, content in files.items():
        torch.save(content, tmp_path / f"{file}.pt")
        for network in (None, name):
            denoiser = FlowDenoiser(network, str(tmp_path / f"{file}.pt"))
            assert_velocity(fixture, denoiser)
            assert denoiser.provenance["published"] == [name]
            assert denoiser.provenance["path"] == "linear"
            assert denoiser.has_learned_variance is False
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "bare.pt").rename(tmp_path / "checkpoints" / cards[name].file)
    assert_velocity(fixture, calib_guidance.load_pretrained(name, vae=None))


def test_uses_that_would_compute_something_else_are_refused(golden, cards, tmp_path):
    state, file = golden("sit_net").weights(), str(tmp_path / "sit.pt")
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="made with time direction noise_to_data, here data_to_noise"):
        FlowDenoiser(None, file, time_direction="data_to_noise")
    with pytest.raises(CheckpointError, match="made with path linear, here gvp"):
        FlowDenoiser("sit_xl_2_256", path="gvp")
    torch.save(state, tmp_path / "DiT-XL-2-256x256.pt")  # the same shapes, and another prediction
    with pytest.raises(CheckpointError, match="is dit_xl_2_256 by its name and shapes: DiTDenoiser takes it"):
        FlowDenoiser("sit_xl_2_256", str(tmp_path / "DiT-XL-2-256x256.pt"))
    network = DiT(**TINY, num_classes=10, out_channels=4)
    with pytest.raises(CheckpointError, match=r"transformer.proj_out_2.weight \(file \(32, 48\), network \(16, 48\)\)"):
        FlowDenoiser(network, file)
    # Of one's own weights nothing but their metadata says which way time runs.
    own = DiT(**TINY, num_classes=7)
    save_weights(own, tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="does not say its path"):
        FlowDenoiser(own, str(tmp_path / "own.safetensors"))
    with pytest.raises(ValueError, match="time_direction.*noise_to_data"):
        FlowDenoiser(own, time_direction="backwards")
    with pytest.raises(ValueError, match="set vae to the autoencoder"):
        FlowDenoiser(own).decode(torch.zeros(1, 4, 8, 8))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("case", ["code", "nan", "lacking", "extra", "projectors"])
def test_hostile_and_damaged_files_are_refused(golden, cards, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    state = golden("repa_net").weights()
    name = "blocks.0.attn.qkv.weight"
    content = {
        "code": {"ema": state, "args": Hostile()},
        "nan": state | {name: torch.full_like(state[name], torch.nan)},
        "lacking": {n: v for n, v in state.items() if n != name},
        "extra": state | {"blocks.2.attn.qkv.weight": state[name]},
        "projectors": {n: v for n, v in state.items() if n.startswith("projectors.")},
    }
    torch.save(content[case], "file.pt")
    with pytest.raises(CheckpointError):
        FlowDenoiser("repa_xl_2_256", "file.pt")
    assert not (tmp_path / "hacked").exists()


def test_full_size_without_memory():
    for name, count in (("sit_xl_2_256", 675_129_632), ("repa_xl_2_256", 675_111_184)):
        with torch.device("meta"):
            denoiser = FlowDenoiser(name)
        state = denoiser.network.state_dict()
        assert sum(value.numel() for value in state.values()) == count == registry.CARDS[name].parameters
        assert name in (alike := registry.identify(state, "flow"))
        assert all(registry.CARDS[other].network == registry.CARDS[name].network for other in alike)
        assert denoiser.image_shape == (4, 32, 32)
    # REPA's projector: 1152 → 2048 → 2048 → 768.
    projector = sum(a * b + b for a, b in ((1152, 2048), (2048, 2048), (2048, 768)))
    assert registry.CARDS["repa_xl_2_256"].bytes == 4 * (count + projector)


class Exact(torch.nn.Module):
    num_classes = 10

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []

    def forward(self, x, t, y):
        self.seen.append((x, t))
        return self.answer


@pytest.mark.parametrize("direction", ["data_to_noise", "noise_to_data"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_flow_matching_has_its_least_at_the_velocity(path, direction):
    """x and velocity as :mod:`calib_guidance.diffusion.paths` has them, the derivative by t of the direction."""
    x0, y = (part[:4] for part in digits("train"))
    noise, tau = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.4, 0.7, 0.95])
    c = (torch.from_numpy(a).float().view(-1, 1, 1, 1) for a in path_coefficients(path, tau.numpy()))
    alpha, sigma, d_alpha, d_sigma = c
    sign = 1 if direction == "data_to_noise" else -1
    network = Exact(sign * (d_alpha * x0 + d_sigma * noise))
    module = TrainDiffusion(network, objective=FlowMatching(path, direction, 10.0))
    assert module.loss(x0, y, tau, noise).abs().max() < 1e-9
    ((x, t),) = network.seen
    torch.testing.assert_close(x, alpha * x0 + sigma * noise)
    torch.testing.assert_close(t, 10 * (tau if sign > 0 else 1 - tau))
    network.answer = network.answer + 0.5
    torch.testing.assert_close(module.loss(x0, y, tau, noise), torch.full((4,), 0.25))
    logit_normal = FlowMatching(times="logit_normal", mean=-0.4, std=1.2)
    torch.testing.assert_close(logit_normal.quantile(torch.tensor([0.5])), torch.sigmoid(torch.tensor([-0.4])))
    with pytest.raises(ValueError, match="time_scale and std"):
        FlowMatching(std=0)
    with pytest.raises(ValueError, match="path.*gvp"):
        FlowMatching("vp")


def test_what_is_trained_says_how_it_is_sampled(tmp_path):
    """A training step, the export's metadata, and a denoiser that needs to be told nothing."""
    torch.manual_seed(0)
    network = UNet(8, 1, 32, 1, 1, channel_mult=(1, 1), num_classes=10)
    module = TrainDiffusion(network, objective=FlowMatching("gvp", "noise_to_data"))
    module.log = lambda *a, **k: None
    x0, y = (part[:16] for part in digits("train"))
    module.training_step({"image": x0, "label": y}, 0).backward()
    assert network.input_blocks[0][0].weight.grad is not None
    module.on_validation_epoch_start()
    module.validation_step({"image": x0, "label": y}, 0)
    assert module._heldout[0] == 16
    assert torch.isfinite(module._heldout).all()
    file = tmp_path / "network.safetensors"
    save_weights(network, file, **module.weights_metadata)
    denoiser = FlowDenoiser(network, str(file), is_latent=False)
    assert (denoiser.path, denoiser.time_direction, denoiser.time_scale) == ("gvp", "noise_to_data", 1000.0)
    noise = torch.randn(2, 1, 8, 8)
    images = FlowODE(3, path="gvp")(denoiser, noise.clone, y[:2])
    # An untrained network predicts 0, so that x stays where it is.
    torch.testing.assert_close(images, noise)
    with pytest.raises(CheckpointError, match="trained with path: gvp, the configuration says path: linear"):
        FlowDenoiser(network, str(file), path="linear")
    bare = {n: v.contiguous() for n, v in network.state_dict().items()}
    save_file(bare, tmp_path / "bare.safetensors")
    FlowDenoiser(network, str(tmp_path / "bare.safetensors"), "linear", "data_to_noise", 1)
    assert to_dit(bare).keys() == bare.keys()
