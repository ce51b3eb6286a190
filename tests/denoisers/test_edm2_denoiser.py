"""EDM2's denoiser and sampler against EDM2, and its files."""

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import calib_guidance
from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import (
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    EDM2Denoiser,
    TinyDecoder,
    UnconditionalModel,
    VAEDecoder,
    fit_linear_decoder,
)
from calib_guidance.diffusion import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import EDM2UNet
from calib_guidance.samplers import Heun
from calib_guidance.weights import registry
from calib_guidance.weights.edm2 import edm2_architecture, from_edm2
from calib_guidance.weights.io import CheckpointError
from tests.conftest import replace_cards
from tests.edm_files import edm_bytes


class Recorded:
    def __init__(self, *tensors):
        self.tensors = iter(tensors)

    def __call__(self):
        return next(self.tensors).clone()


def edm2(golden, name, half_gains=False):
    fixture = golden(name)
    state = from_edm2(fixture.weights())
    network = EDM2UNet(**edm2_architecture(state, fixture.json["config"]))
    network.load_state_dict(state)
    return EDM2Denoiser(network, half_gains=half_gains)


def denoised(denoiser, x, sigma, y=None):
    levels = denoiser.schedule.at_sigmas(sigma.double().view(-1).numpy())
    scale = torch.tensor(levels.alphas_cumprod).sqrt().view(-1, 1, 1, 1)
    each = torch.arange(len(x)) if sigma.ndim else 0
    with torch.no_grad():
        return denoiser.prepare(levels, y)(scale * x, each).x0


def test_denoised_images_match_the_reference(golden):
    fixture = golden("edm2_unet_a")
    denoiser, y = edm2(golden, "edm2_unet_a"), fixture["class_labels"].argmax(1)
    fixture.assert_close("D_x", denoised(denoiser, fixture["x"], fixture["sigma"], y))
    fixture.assert_close("D_x_no_labels", denoised(denoiser, fixture["x"], fixture["sigma"]))
    fixture.assert_close("D_x_no_labels", denoised(denoiser, fixture["x"], fixture["sigma"], torch.full_like(y, -1)))
    fixture.assert_close("D_x_scalar_sigma", denoised(denoiser, fixture["x"], fixture["scalar_sigma"], y))
    assert denoiser.clip
    latent = golden("edm2_unet_b")
    for half_gains, end in ((True, ""), (False, "_upcast")):
        denoiser = edm2(golden, "edm2_unet_b", half_gains)
        latent.assert_close(f"D_x{end}", denoised(denoiser, latent["x"], latent["sigma"]))
    assert not denoiser.clip
    with pytest.raises(ValueError, match="set vae"):
        denoiser.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("name", ["edm2_heun", "edm2_heun_guided", "edm2_heun_churn"])
def test_every_step_of_the_sampler(golden, name):
    fixture = golden(name)
    h = fixture.json["hyperparameters"]
    denoiser = edm2(golden, "edm2_unet_a")
    if h["guidance"] != 1:
        guide = Autoguidance(edm2(golden, "edm2_unet_guide"))
        denoiser = Combination(denoiser, ClassifierFreeGuidance(h["guidance"]), guide)
    churn = (h["S_churn"], h["S_min"], float(h["S_max"]), h["S_noise"])
    runs = {"x": True} | ({"dtype64.x": False} if name == "edm2_heun" else {})
    for key, float32 in runs.items():
        sampler, records = (
            Heun(h["num_steps"], h["sigma_min"], h["sigma_max"], h["rho"], *churn, float32_state=float32),
            [],
        )
        noise = Recorded(fixture["latents"], *(fixture["noise"] if h["S_churn"] else ()))
        images = sampler(denoiser, noise, fixture["class_labels"].argmax(1), None, [records.append])
        assert next(noise.tensors, None) is None
        assert records[0].x_t.dtype == (torch.float32 if float32 else torch.float64)
        for step, record in enumerate(records):
            ve = np.sqrt(1 + sampler.sigmas[record.i - 1] ** 2) if record.i else 1.0
            fixture.assert_close(key, record.x_next * ve, fixture[key][step], step)
        assert torch.equal(images, records[-1].x_next.float())


def test_an_unconditional_guide_is_classifier_free_guidance(golden):
    """The same labels reach both; a guide without classes ignores them."""
    fixture, guide = golden("edm2_unet_a"), golden("edm2_unet_guide")
    main, other, y = edm2(golden, "edm2_unet_a"), edm2(golden, "edm2_unet_guide"), fixture["class_labels"].argmax(1)
    both = Combination(main, ClassifierFreeGuidance(1.4), UnconditionalModel(other))
    free = denoised(other, fixture["x"], fixture["sigma"])
    cond = denoised(main, fixture["x"], fixture["sigma"], y)
    torch.testing.assert_close(denoised(both, fixture["x"], fixture["sigma"], y), free + 1.4 * (cond - free))
    guide.assert_close("D_x", denoised(other, guide["x"], guide["sigma"], guide["class_labels"].argmax(1)))


def test_latents_and_pixels(golden):
    """Raw latents by channel, a decoder that gives [0, 1], and pixels cut off."""
    fixture = golden("uint8_rules")

    class Stub(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in, self.given = nn.Conv2d(4, 4, 1), None

        def forward(self, z):
            self.given = z
            return fixture["edm2_vae.decoded"]

    vae = nn.Module()
    vae.quant_conv, vae.post_quant_conv, vae.decoder = nn.Identity(), None, Stub()
    denoiser = EDM2Denoiser(EDM2UNet(8, 4, None, 16, (1,), 1, ()), vae=vae)
    images = denoiser.decode(fixture["edm2_vae.latents"])
    fixture.assert_close("edm2_vae.raw_latents", denoiser.vae.decoder.given)
    fixture.assert_close("edm2_vae.scale", denoiser.vae.scale.flatten())
    fixture.assert_close("edm2_vae.bias", -(denoiser.vae.mean * denoiser.vae.scale).flatten())
    assert torch.equal(to_uint8(images, "truncate"), fixture["edm2_vae.uint8"])
    assert torch.equal(to_uint8(fixture["edm2_rgb.x"], "round_up_half"), fixture["edm2_rgb.uint8"])
    for project, rule in (("sit", "round_up_half"), ("repa", "truncate")):
        assert torch.equal(to_uint8(fixture["decoded"], rule), fixture[f"{project}.uint8"])
    with pytest.raises(ValueError, match="latent_scale must be above 0"):
        VAEDecoder(vae, [1.0, 0.0, 1.0, 1.0])


class ColorClassifier(nn.Module):
    """The mean of one color channel for each of three classes."""

    def forward(self, images):
        return 4 * images.mean((2, 3))


def test_a_classifier_guides_latents_through_the_full_the_tiny_and_the_linear_decoder():
    """The tiny one decodes EDM2's latents as the full one where both have the same layers."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    small = AutoencoderTiny(**blocks)

    class Full(nn.Module):
        """Decodes what the autoencoder encodes, the tiny one 0.18215 times that."""

        def __init__(self):
            super().__init__()
            self.conv_in, self.small = nn.Conv2d(1, 1, 1), small.decoder

        def forward(self, raw):
            return self.small(0.18215 * raw)

    vae = nn.Module()
    vae.quant_conv, vae.post_quant_conv, vae.decoder = nn.Identity(), None, Full()
    denoiser = EDM2Denoiser(EDM2UNet(8, 4, None, 16, (1,), 1, ()), vae=vae).requires_grad_(False)
    latents = 0.5 * torch.randn(16, 4, 8, 8)
    tiny = TinyDecoder(small, latents="edm2")
    with torch.no_grad():
        torch.testing.assert_close(tiny(latents), denoiser.decode(latents), atol=1e-5, rtol=1e-5)
    linear, _ = fit_linear_decoder(denoiser.decode, [latents])
    y = torch.tensor([0, 1, 2])
    scores = {}
    for name, decoder in {"none": None, "full": None, "tiny": tiny, "linear": linear}.items():
        classifier = OffTheShelfClassifier(ColorClassifier(), 3)
        guide = ClassifierGuidance(classifier, scale=0.0 if name == "none" else 2.0, decoder=decoder)
        noise = SampleStreams([0] * 3, range(3), denoiser.image_shape)
        images = denoiser.decode(Heun(num_steps=12)(denoiser, noise, y, guide).float())
        scores[name] = float(ColorClassifier()(images).log_softmax(1)[torch.arange(3), y].mean())
    assert scores["tiny"] == pytest.approx(scores["full"], abs=1e-4), scores
    assert min(scores["full"], scores["linear"]) > scores["none"], scores


class Encoder:
    """Stands for EDM2's encoder in a pickle: a persistent object with NumPy arrays."""

    def __reduce__(self):
        import sys

        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        state = {
            "scale": np.float32([0.1, 0.2]),
            "bias": np.arange(6.0).reshape(2, 3),
            "vae_name": "sd-vae",
            "_vae": None,
        }
        return rebuild, ({"type": "class", "version": 6, "module_src": "", "class_name": "Encoder", "state": state},)


@pytest.fixture
def card(monkeypatch, golden):
    """A small twin of a published card."""
    fixture = golden("edm2_unet_b")
    state = from_edm2(fixture.weights())
    arguments = edm2_architecture(state, fixture.json["config"]) | {"dtype": "float32"}
    count = sum(value.numel() for value in state.values())
    published = registry.CARDS["edm2_img512_xs"]
    card = registry.Card(
        published.name, "edm2", published.source, "L", "EDM2Denoiser", 2 * count, count, "EDM2UNet", arguments,
        published.settings, {}, None, published.variants,
    )  # fmt: skip
    replace_cards(monkeypatch, {card.name: card})
    yield card
    registry.reference.cache_clear()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("numpy", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_a_pickle_of_edm2_gives_edm2s_outputs(golden, card, tmp_path, monkeypatch, protocol, numpy):
    """From the format with its source code and encoder; in float16 as published; read by name and from the pickle alone."""
    fixture = golden("edm2_unet_b")
    content = edm_bytes(fixture.weights(), protocol, fixture.json["config"], encoder=Encoder(), loss_fn=None)
    assert b"multiarray" in content
    if protocol == 2:  # names lie in lines of text
        content = content.replace(b"numpy._core.multiarray", numpy.encode()).replace(
            b"numpy.core.multiarray", numpy.encode()
        )
    file = tmp_path / "checkpoints" / card.file
    file.parent.mkdir()
    file.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for denoiser in (EDM2Denoiser(card.name, str(file)), calib_guidance.load_pretrained(card.name, vae=None)):
        fixture.assert_close("D_x", denoised(denoiser, fixture["x"], fixture["sigma"]))
        assert denoiser.provenance["published"] == [card.name]
    cast = EDM2Denoiser(None, str(file), half_gains=False)
    fixture.assert_close("D_x_upcast", denoised(cast, fixture["x"], fixture["sigma"]))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("case", ["code", "nan", "lacking", "no network", "block", "sigma_data"])
def test_hostile_and_damaged_pickles_are_refused(golden, card, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    fixture = golden("edm2_unet_b")
    state, config, name = fixture.weights(), dict(fixture.json["config"]), "unet.emb_noise.weight"
    contents = {
        "code": lambda: edm_bytes(state, encoder=Hostile()),
        "nan": lambda: edm_bytes(state | {name: torch.full_like(state[name], torch.nan)}),
        "lacking": lambda: edm_bytes({n: v for n, v in state.items() if n != name}),
        "no network": lambda: pickle.dumps({"encoder": 1}),
        "block": lambda: edm_bytes({n: v for n, v in state.items() if "enc.4x4_block0" not in n}),
        "sigma_data": lambda: edm_bytes(state, init_kwargs=config | {"sigma_data": 0.7}),
    }
    (tmp_path / "file.pkl").write_bytes(contents[case]())
    with pytest.raises(CheckpointError):
        EDM2Denoiser(None, "file.pkl")
    assert not (tmp_path / "hacked").exists()


def test_published_sizes_without_memory():
    names = [name for name, card in registry.CARDS.items() if card.kind == "edm2"]
    assert len(names) == 13
    for name in names:
        reference = registry.reference(name)
        assert sum(value.numel() for value in reference.state_dict().values()) == registry.CARDS[name].parameters
        assert registry.identify(reference.state_dict(), "edm2") == [name]
        assert (reference.num_classes is None) == name.endswith("uncond")
        assert reference.in_channels == (4 if "512" in name else 3)
    assert registry.by_file("checkpoints/edm2-img512-s-2147483-0.025.pkl").name == "edm2_img512_s"


def test_guided_models_by_name(golden, monkeypatch, tmp_path):
    """Small twins of both networks, whose published files lie in one folder."""
    fixture, made = golden("edm2_unet_a"), {}
    for name, network in (("edm2_img64_s", "edm2_unet_a"), ("edm2_img64_xs", "edm2_unet_guide")):
        state, config = golden(network).weights(), golden(network).json["config"]
        own = from_edm2(state)
        arguments = edm2_architecture(own, config) | {"dtype": "float32"}
        count, published = sum(value.numel() for value in own.values()), registry.CARDS[name]
        made[name] = registry.Card(
            name, "edm2", published.source, "L", "EDM2Denoiser", 2 * count, count, "EDM2UNet", arguments,
            published.settings, {}, None, published.variants,
        )  # fmt: skip
        ending = {"edm2_img64_s": "s-1073741-0.045", "edm2_img64_xs": "xs-0134217-0.110"}[name]
        (tmp_path / f"edm2-img64-{ending}.pkl").write_bytes(edm_bytes(state, init_kwargs=config))
    replace_cards(monkeypatch, made)
    denoiser = calib_guidance.load_pretrained("edm2_img64_s_autoguided", tmp_path, half_gains=False)
    registry.reference.cache_clear()
    x, sigma, y = fixture["x"], fixture["sigma"], fixture["class_labels"].argmax(1)
    guide = denoised(edm2(golden, "edm2_unet_guide"), x, sigma, y)
    torch.testing.assert_close(
        denoised(denoiser, x, sigma, y), guide + 1.7 * (fixture["D_x"] - guide), atol=2e-4, rtol=1e-4
    )
    with pytest.raises(
        CheckpointError, match="edm2-img64-xs-0134217-0.110.pkl: no such weights file; the public .* is at http"
    ):
        calib_guidance.load_pretrained("edm2_img64_s_autoguided", tmp_path / "elsewhere")
