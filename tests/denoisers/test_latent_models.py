"""Autoencoders and files of the newer latent models: VA-VAE, RAE, LightningDiT, REPA-E."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import calib_guidance
from calib_guidance.backend.images import to_uint8
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import FlowDenoiser, RAEDecoder, RAEEncoder, VAEDecoder
from calib_guidance.diffusion.paths import path_coefficients
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import DiT, DiTDH, LightningDiT
from calib_guidance.samplers import FlowODE
from calib_guidance.weights.cards import CARDS
from calib_guidance.weights.io import CheckpointError
from calib_guidance.weights.ldm_vae import latent_statistics, ldm_decoder, read_ldm_decoder


@torch.no_grad()
def test_vavae(golden, tmp_path):
    """From latent diffusion's names, among entries of losses; pixels by either rule; latents by their statistics."""
    fixture = golden("vavae")
    state = {name: value.float() for name, value in fixture.weights().items()}
    file = tmp_path / "vavae.pt"
    torch.save({"state_dict": state | {"loss.discriminator.weight": torch.zeros(3)}}, file)
    decode = VAEDecoder(str(file), 1.0)
    fixture.assert_close("decoded", decode(fixture["z"]))
    for key, rule in (("lightningdit_uint8", "round_up_half"), ("repae_uint8", "truncate")):
        assert torch.equal(to_uint8(fixture["decoded"], rule).permute(0, 2, 3, 1), fixture[key])
    mean, std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    torch.save({"mean": mean.view(1, 8, 1, 1), "std": std.view(1, 8, 1, 1)}, tmp_path / "latents_stats.pt")
    network = LightningDiT(8, 8, 10, 32, 1, 2)
    denoiser = FlowDenoiser(network, vae=str(file), latent_stats=str(tmp_path / "latents_stats.pt"))
    latents = (fixture["z"] - mean.view(8, 1, 1)) / std.view(8, 1, 1)
    fixture.assert_close("decoded", denoiser.decode(latents))
    with pytest.raises(CheckpointError, match="expected an autoencoder"):
        ldm_decoder({name: value for name, value in state.items() if "decoder" not in name})
    lacking = {name: value for name, value in state.items() if name != "decoder.mid.attn_1.q.weight"}
    with pytest.raises(CheckpointError, match="missing: decoder.mid_block.attentions.0.to_q.weight"):
        ldm_decoder(lacking)


def test_latents_are_scaled_as_lightningdit_does(golden):
    fixture = golden("lightningdit_ode")
    mean, std = fixture["latent_mean"].flatten(), fixture["latent_std"].flatten()
    vae = nn.Module()
    vae.post_quant_conv, vae.decoder = None, nn.Module()
    vae.decoder.conv_in, vae.decoder.forward = nn.Conv2d(8, 8, 1), lambda z: z
    decoder = VAEDecoder(vae, (1 / std).tolist(), latent_mean=mean.tolist())
    fixture.assert_close("vae_input", decoder(fixture["latents"]))


@torch.no_grad()
def test_decoder_of_rae(golden, tmp_path):
    """Statistics by channel and position; pixels in [0, 1] cut off."""
    fixture = golden("rae_latents")
    state = fixture.weights("weights.decoder.")
    torch.save(state, tmp_path / "model.pt")
    torch.save({"mean": fixture["latent_mean"], "var": fixture["latent_var"]}, tmp_path / "stat.pt")
    norm = {"image_mean": fixture["image_mean"].tolist(), "image_std": fixture["image_std"].tolist()}
    decode = RAEDecoder(str(tmp_path / "model.pt"), str(tmp_path / "stat.pt"), 2, **norm)
    images = decode(fixture["latents"])
    fixture.assert_close("decoded", (images + 1) / 2)
    assert torch.equal(to_uint8(2 * fixture["decoded"] - 1, "truncate").permute(0, 2, 3, 1), fixture["decoded_uint8"])
    plain = RAEDecoder(str(tmp_path / "model.pt"), None, 2, **norm)
    assert (plain(fixture["latents"]) - images).abs().max() > 0.01
    with pytest.raises(CheckpointError, match="expected a decoder of RAE"):
        RAEDecoder({"weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="expected mean and var"):
        RAEDecoder(state, {"mean": fixture["latent_mean"]}, 2)


@torch.no_grad()
def test_encoder_of_rae(golden, tmp_path):
    """DINOv2's tokens without its last affine parameters; positions and images of another size are resized."""
    fixture = golden("rae_latents")
    state = fixture.weights("weights.encoder.encoder.") | {"layernorm.weight": torch.full((16,), 7.0)}
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"mean": fixture["latent_mean"], "var": fixture["latent_var"]}, tmp_path / "stat.pt")
    norm = {"image_mean": fixture["image_mean"].tolist(), "image_std": fixture["image_std"].tolist()}
    encode = RAEEncoder(str(tmp_path), str(tmp_path / "stat.pt"), 42, 2, **norm)
    fixture.assert_close("encoder_tokens", encode.tokens(fixture["images"]))
    fixture.assert_close("encoded", encode(2 * fixture["images"] - 1))
    fixture.assert_close("encoded_resized", encode(2 * fixture["images_other_size"] - 1))
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="expected DINOv2 with registers"):
        RAEEncoder(str(tmp_path / "other.safetensors"))


def test_rae_by_its_file_and_a_linear_probe_on_its_latents(golden, tmp_path):
    """The classifier looks at x̂0 in latent space, without a decoder; guidance makes its class more likely."""
    fixture = golden("rae_net")
    torch.save({"ema": fixture.weights(), "model": {}}, tmp_path / "stage2_model.pt")
    config = fixture.json["config"]
    network = DiTDH(
        4, **{key: config[key] for key in ("in_channels", "num_classes", "hidden_size", "depth", "num_heads")}
    )
    denoiser = FlowDenoiser(network, str(tmp_path / "stage2_model.pt"), "linear", "data_to_noise", 1)
    t, y = fixture["t"].double().clamp(1e-4, 1 - 1e-6), torch.where(fixture["y"] == 8, -1, fixture["y"])
    c = path_coefficients("linear", t.numpy())
    scale, tau, x = torch.from_numpy(c.scale).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1), fixture["x"].double()
    with torch.no_grad():
        x0 = denoiser.prepare(denoiser.schedule.at_sigmas(c.ratio), y)(x / scale, torch.arange(len(y))).x0
    inner = (fixture["t"] > 1e-2) & (fixture["t"] < 1 - 1e-3)
    fixture.assert_close("output", ((x - x0) / tau)[inner], fixture["output"][inner])
    torch.manual_seed(0)
    probe = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 8))
    classifier = OffTheShelfClassifier(probe, 8, normalize="none")
    guidance = ClassifierGuidance(classifier, scale=30.0, decoder=nn.Identity())
    y = torch.arange(6) % 8
    sampler, found = FlowODE(8, shift=3.0, end=0.001), {}
    for name, guide in (("plain", None), ("guided", guidance)):
        latents = sampler(denoiser, SampleStreams([0] * 6, range(6), (12, 4, 4)), y, guide)
        found[name] = classifier(latents).log_softmax(1)[torch.arange(6), y].mean()
    assert found["guided"] > found["plain"] + 0.5


@torch.no_grad()
def test_repae_by_its_file(golden, tmp_path):
    """SiT with one latent pixel per token; statistics of the latents from the checkpoint, without ε."""
    fixture = golden("repae_net")
    torch.save({"ema": fixture.weights(), "vae": {"a": torch.zeros(1)}, "steps": 3}, tmp_path / "0400000.pt")
    network = DiT(4, 1, 16, 3, 2, 6, 6)
    file = str(tmp_path / "0400000.pt")
    denoiser = FlowDenoiser(network, file, "linear", "data_to_noise", 1)
    y = torch.where(fixture["y"] == 1000, -1, fixture["y"])
    fixture.assert_close("output", denoiser.network(fixture["x"], fixture["t"], y))
    mean, std = latent_statistics(file)
    fixture.assert_close("latents_bias", mean.view(1, -1, 1, 1))
    fixture.assert_close("latents_scale", 1 / std.view(1, -1, 1, 1))
    fixture.assert_close("denormalized", fixture["x"] * std.view(-1, 1, 1) + mean.view(-1, 1, 1))
    torch.save(
        {"latents_bias": fixture["latents_bias"], "latents_scale": fixture["latents_scale"]}, tmp_path / "stats.pt"
    )
    for found, expected in zip(latent_statistics(str(tmp_path / "stats.pt")), (mean, std), strict=True):
        torch.testing.assert_close(found, expected)
    torch.save({"other": mean}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="expected statistics of latents"):
        latent_statistics(str(tmp_path / "other.pt"))
    # The autoencoder that was tuned lies beside the averages.
    vae = golden("vavae").weights()
    torch.save({"ema": fixture.weights(), "vae": vae, "steps": 3}, tmp_path / "tuned.pt")
    torch.save(vae, tmp_path / "alone.pt")
    tuned, alone = (read_ldm_decoder(str(tmp_path / name)).state_dict() for name in ("tuned.pt", "alone.pt"))
    assert all(torch.equal(tuned[name], value) for name, value in alone.items())
    denoiser = FlowDenoiser(DiT(4, 1, 16, 3, 2, 6, 6), str(tmp_path / "tuned.pt"), "linear", "data_to_noise", 1)
    fixture.assert_close("output", denoiser.network(fixture["x"], fixture["t"], y))


def test_lightningdit_by_its_file(golden, tmp_path):
    fixture = golden("lightningdit_net")
    state = fixture.weights()
    torch.save({"ema": state, "model": {n: v * 0 for n, v in state.items()}}, tmp_path / "lightningdit.pt")
    network = LightningDiT(5, 8, 10, 32, 2, 2)
    denoiser = FlowDenoiser(network, str(tmp_path / "lightningdit.pt"), "linear", "noise_to_data", 1)
    y = torch.where(fixture["y"] == 10, -1, fixture["y"])
    with torch.no_grad():
        fixture.assert_close("output", denoiser.network(fixture["x"], fixture["t"], y))
    with pytest.raises(CheckpointError, match=r"LightningDiT; unexpected: feat_rope|LightningDiT; .*norm1"):
        FlowDenoiser(
            LightningDiT(5, 8, 10, 32, 2, 2, rms=False, rope=False),
            str(tmp_path / "lightningdit.pt"),
            "linear",
            "noise_to_data",
            1,
        )
    torch.save(state | {"pos_embed": state["pos_embed"] * torch.nan}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match="NaN"):
        FlowDenoiser(network, str(tmp_path / "nan.pt"), "linear", "noise_to_data", 1)


def test_autoencoders_by_name(golden, tmp_path):
    """Of the published files' names; those of VA-VAE's size count its parameters."""
    fixture = golden("rae_latents")
    torch.save(fixture.weights("weights.decoder."), tmp_path / "rae-decoder-256.pt")
    decoder = calib_guidance.load_pretrained("rae_decoder_256", tmp_path / "rae-decoder-256.pt", num_heads=2)
    assert isinstance(decoder, RAEDecoder)
    torch.save(fixture.weights("weights.decoder."), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not a model: RAEDecoder \(statistics\) takes its file"):
        calib_guidance.load_pretrained("rae_statistics_256", tmp_path / "other.pt")
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**CARDS["vavae_f16d32"].arguments)
    assert sum(p.numel() for p in vae.parameters()) == CARDS["vavae_f16d32"].parameters
