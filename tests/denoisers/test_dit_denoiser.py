"""Diffusion transformers over latents: files as they are published, decoding, and guidance through the decoder."""

import copy
import dataclasses
import json
import weakref
from unittest import mock

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calib_guidance.backend.images import from_uint8
from calib_guidance.classifiers import Classifier
from calib_guidance.denoisers import (
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    LinearDecoder,
    TinyDecoder,
    VAEDecoder,
    fit_linear_decoder,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GuidanceSchedule
from calib_guidance.networks import DiT
from calib_guidance.samplers import DDPM
from calib_guidance.scores import TemperedLogProb
from calib_guidance.tasks import GuidedSampling
from calib_guidance.weights import registry
from calib_guidance.weights.dit import to_diffusers, to_dit
from calib_guidance.weights.io import CheckpointError, Weights, load_weights
from docs.fit_linear_decoder import main
from tests.conftest import replace_cards

VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
NEW_TO_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tiny_dit(**changes):
    arguments = {"sample_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    return DiT(**arguments | changes).eval()


@pytest.fixture(scope="module")
def fixture(golden):
    return golden("dit_tiny")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(**VAE, latent_channels=4).eval()


@pytest.fixture(scope="module")
def network(fixture):
    network = tiny_dit()
    load_weights(network, Weights("fixture", to_dit(fixture.weights())))
    return network


@pytest.fixture(scope="module")
def denoiser(network, vae):
    return DiTDenoiser(network, vae=vae)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, network, vae):
    """A folder as diffusers wrote it in 2022: weights of the transformer as .bin, old names in the autoencoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("transformer", "vae"):
        (folder / name).mkdir()
    (folder / "model_index.json").write_text("{}")
    config = {"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-5, **network.architecture}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    torch.save(to_diffusers(network.state_dict()), folder / "transformer/diffusion_pytorch_model.bin")
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4, **VAE}))
    state = {}
    for name, value in vae.state_dict().items():
        for new, old in NEW_TO_OLD.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = value.contiguous()
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, folder / "vae/diffusion_pytorch_model.safetensors")
    return folder


def levels(denoiser, t):
    return denoiser.schedule.at([t])


class TestFiles:
    @torch.no_grad()
    def test_a_folder_of_a_pipeline(self, pipeline, denoiser, fixture):
        read = DiTDenoiser(None, str(pipeline), vae=str(pipeline))
        assert torch.equal(read.decode(fixture["x"]), denoiser.decode(fixture["x"]))
        # The folder has no table of positions, for the published one is computed; the fixture's is another.
        positions = read.network.transformer.pos_embed.pos_embed
        torch.testing.assert_close(positions, fixture["pos_embed_sincos"], atol=1e-6, rtol=0)
        positions.copy_(fixture["weights.pos_embed"])
        y = torch.tensor([0, 3, -1])
        found, expected = (d.prepare(levels(d, 500), y)(fixture["x"], 0) for d in (read, denoiser))
        assert torch.equal(found.x0, expected.x0)

    @torch.no_grad()
    @pytest.mark.parametrize("form", ["pt", "ema", "safetensors", "ours"])
    def test_files_of_every_layout(self, form, fixture, denoiser, tmp_path):
        path = tmp_path / ("dit.safetensors" if form in ("safetensors", "ours") else "DiT.pt")
        if form == "pt":
            torch.save(fixture.weights(), path)
        elif form == "ema":
            torch.save({"ema": fixture.weights(), "args": {"lr": 1e-4}}, path)
        else:
            save_file(fixture.weights() if form == "safetensors" else denoiser.network.state_dict(), path)
        read = DiTDenoiser(tiny_dit(), str(path))
        y = torch.tensor([0, 3, -1])
        found, expected = (d.prepare(levels(d, 30), y)(fixture["x"], 0) for d in (read, denoiser))
        assert torch.equal(found.x0, expected.x0)
        assert torch.equal(found.variance, expected.variance)

    def test_from_the_hub(self, pipeline, denoiser, fixture, monkeypatch):
        asked = []

        def download(repo, name, revision=None):
            asked.append((repo, name, revision))
            path = pipeline / name
            if not path.is_file():
                raise RemoteEntryNotFoundError("404", response=mock.Mock())
            return str(path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        read = DiTDenoiser(None, "hf://someone/dit@v1", vae="hf://someone/dit@v1")
        assert torch.equal(read.decode(fixture["x"]), denoiser.decode(fixture["x"]))
        assert ("someone/dit", "transformer/config.json", "v1") in asked
        assert ("someone/dit", "vae/config.json", "v1") in asked
        with pytest.raises(CheckpointError, match="expected hf://OWNER/NAME"):
            DiTDenoiser(None, "hf://nobody")

        def offline(*args, **kwargs):
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
        with pytest.raises(CheckpointError, match="the hub cannot be reached"):
            DiTDenoiser(None, "hf://someone/dit", vae="hf://someone/dit")

    def test_what_does_not_fit_is_named(self, pipeline, fixture, tmp_path):
        with pytest.raises(CheckpointError, match="num_attention_heads: 4, the configuration's has 8"):
            DiTDenoiser(tiny_dit(num_heads=8), str(pipeline))
        with pytest.raises(CheckpointError, match=r"config\.json describes a AutoencoderKL, expected a DiT"):
            DiTDenoiser(None, str(pipeline / "vae"))
        with pytest.raises(CheckpointError, match="expected a AutoencoderTiny"):
            TinyDecoder(str(pipeline))
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            DiTDenoiser(None, str(tmp_path))
        (tmp_path / "config.json").write_text((pipeline / "transformer/config.json").read_text())
        with pytest.raises(CheckpointError, match=r"neither diffusion_pytorch_model\.safetensors"):
            DiTDenoiser(None, str(tmp_path))
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match="not JSON"):
            DiTDenoiser(None, str(tmp_path))
        torch.save(fixture.weights(), tmp_path / "dit.pt")
        with pytest.raises(CheckpointError, match="do not say how many heads"):
            DiTDenoiser(None, str(tmp_path / "dit.pt"))
        with pytest.raises(CheckpointError, match=r"dit\.pt does not fit DiT; .*of another shape"):
            DiTDenoiser(tiny_dit(patch_size=4), str(tmp_path / "dit.pt"))
        with pytest.raises(CheckpointError, match=r"unexpected: .*transformer_blocks\.1"):
            DiTDenoiser(tiny_dit(depth=1), str(tmp_path / "dit.pt"))

    def test_a_published_file_is_identified_and_its_settings_are_kept(self, tmp_path, monkeypatch, fixture):
        """A tiny network in the place of DiT-XL/2, with its official names."""
        arguments = {"sample_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 16, "num_classes": 10}
        network = tiny_dit(num_heads=16)
        small = dataclasses.replace(
            registry.CARDS["dit_xl_2_256"],
            arguments=arguments,
            signature_shapes={},
            parameters=sum(value.numel() for value in network.state_dict().values()),
        )
        replace_cards(monkeypatch, {**registry.CARDS, "dit_xl_2_256": small})
        monkeypatch.setattr(registry, "reference", registry.reference.__wrapped__)
        torch.save(fixture.weights(), tmp_path / "dit.pt")
        path = str(tmp_path / "dit.pt")
        with pytest.raises(CheckpointError, match=r"made with num heads 16, here 4\..* set num_heads: 16"):
            DiTDenoiser(tiny_dit(), path)
        for setting in ({"noise_schedule": "cosine"}, {"prediction": "v"}, {"num_steps": 500}):
            with pytest.raises(CheckpointError, match=f"{next(iter(setting))}: "):
                DiTDenoiser(tiny_dit(num_heads=16), path, **setting)
        for name in (None, "dit_xl_2_256"):
            read = DiTDenoiser(name, path, dtype="bfloat16")
            assert read.provenance["published"] == ["dit_xl_2_256"]
            assert read.network.architecture == network.architecture
            assert read.network.transformer.proj_out_1.weight.dtype == torch.bfloat16
        load_weights(network, Weights(path, to_dit(fixture.weights())))
        read = DiTDenoiser("dit_xl_2_256", path)
        for key, value in network.state_dict().items():
            assert torch.equal(value, read.network.state_dict()[key]), key
        # diffusers' layout lacks the table of positions, which is computed.
        torch.save(to_diffusers(network.state_dict()), path)
        positions = DiTDenoiser("dit_xl_2_256", path).network.transformer.pos_embed.pos_embed
        torch.testing.assert_close(positions, fixture["pos_embed_sincos"], atol=1e-6, rtol=0)

    def test_a_bin_that_would_execute_something_is_refused(self, pipeline, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        (tmp_path / "config.json").write_text((pipeline / "transformer/config.json").read_text())
        torch.save({"pos_embed.proj.weight": Evil()}, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(CheckpointError, match="without executing"):
            DiTDenoiser(None, str(tmp_path))
        assert not (tmp_path / "ran").exists()


class TestPredictions:
    @torch.no_grad()
    def test_classifier_free_guidance_as_published(self, fixture, denoiser):
        """Three of four channels are guided, and the fourth and the variance are the conditional model's."""
        weight = fixture.json["hyperparameters"]["cfg_scale"]
        t, y = fixture["cfg_t"][:2], fixture["cfg_y"][:2]
        x = fixture["cfg_x"][:2]
        free = Combination(denoiser, ClassifierFreeGuidance(weight), channels=3)
        chosen = free.schedule.at(t.tolist())
        found = free.prepare(chosen, y)(x, torch.arange(2))
        abar = torch.tensor(chosen.alphas_cumprod).view(-1, 1, 1, 1)
        noise = (x.double() - abar.sqrt() * found.x0.double()) / (1 - abar).sqrt()
        fixture.assert_close("cfg_output", noise, fixture["cfg_output"][:2, :4])
        fixture.assert_close("cfg_output", 2 * found.variance - 1, fixture["cfg_output"][:2, 4:])
        plain = fixture["cfg_plain_output"][:, :4]
        difference = weight * (plain[:2] - plain[2:])
        to_noise = -(abar / (1 - abar)).sqrt().float()
        torch.testing.assert_close(to_noise * found.residual[:, :3], difference[:, :3], atol=2e-4, rtol=1e-3)
        assert not found.residual[:, 3].any()
        assert difference[:, 3].abs().max() > 0.1

    @torch.no_grad()
    def test_without_classes_the_null_class_is_given(self, network, denoiser, fixture):
        free, y = DiTDenoiser(network, class_conditional=False), torch.tensor([1, 2, 3])
        at = levels(free, 700)
        expected = denoiser.prepare(at, torch.full((3,), -1))(fixture["x"], 0)
        for found in (free.prepare(at, y), free.prepare(at, None), denoiser.prepare(at, None)):
            assert torch.equal(found(fixture["x"], 0).x0, expected.x0)
        assert (denoiser.prepare(at, y)(fixture["x"], 0).x0 - expected.x0).abs().max() > 0.1
        assert free.num_classes is None
        assert not free.clip

    def test_settings_that_cannot_be_name_the_cause(self, network, vae):
        with pytest.raises(ValueError, match="decode_batch must be at least 1"):
            DiTDenoiser(network, vae=vae, decode_batch=0)
        with pytest.raises(ValueError, match="set vae"):
            DiTDenoiser(network).decode(torch.zeros(1, 4, 8, 8))
        with pytest.raises(ValueError, match="latent_scale"):
            DiTDenoiser(network, vae=vae, latent_scale=0)
        with pytest.raises(ValueError, match="bfloat16"):
            DiTDenoiser(network, vae=vae, vae_dtype="float16")
        with pytest.raises(ValueError, match="init_args.dtype"):
            DiTDenoiser(network, vae=vae, dtype="bfloat16")
        with pytest.raises(ValueError, match="vae_dtype is for an autoencoder"):
            DiTDenoiser(network, vae=torch.nn.Conv2d(4, 3, 1), vae_dtype="bfloat16")


class Storages(TorchDispatchMode):
    """Bytes of the tensors that are alive, among those made while it is on: now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def _gone(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = True
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out


class Linear(Classifier):
    """Logits of the mean colors of a 4×4 grid, smooth and cheap, in any floating type."""

    def __init__(self):
        super().__init__()
        self.num_classes, self.calls = 10, 0
        self.weight = nn.Parameter(torch.randn(10, 48, generator=torch.Generator().manual_seed(3)))

    def forward(self, x, t=None):
        self.calls += 1
        return torch.tanh(nn.functional.adaptive_avg_pool2d(x, 4)).flatten(1) @ self.weight.T


class TestDecoding:
    def test_parts_give_the_images_and_gradients_of_the_full_decoder(self, network, vae, fixture):
        x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        found = []
        for decode_batch in (None, 2):
            source = x.clone().requires_grad_()
            images = DiTDenoiser(network, vae=vae, decode_batch=decode_batch).decode(source)
            found.append((images, *torch.autograd.grad(images.square().sum(), source)))
        for complete, parts in zip(*found, strict=True):
            torch.testing.assert_close(parts, complete, atol=1e-5 * float(complete.detach().abs().max()), rtol=0)
        with torch.no_grad():
            expected = vae.decode(x / 0.18215).sample
        torch.testing.assert_close(found[0][0], expected, atol=1e-5, rtol=1e-5)
        assert found[0][0].shape == (5, 3, 16, 16)

    @pytest.mark.parametrize("parts", ["one", "all"])
    def test_memory_is_that_of_one_part(self, network, vae, parts):
        """The activations of a part, and the images of all; with everything at once, those of all parts."""
        peaks = []
        for count in (2, 8):
            denoiser = DiTDenoiser(network, vae=vae, decode_batch=1 if parts == "one" else None)
            x = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with Storages() as storages:
                torch.autograd.grad(denoiser.decode(x).square().sum(), x)
            peaks.append(storages.peak)
        assert peaks[1] < 1.6 * peaks[0] if parts == "one" else peaks[1] > 3.5 * peaks[0]


class TestGuidance:
    def test_the_gradient_through_the_decoder_against_finite_differences(self, network, vae):
        """Algorithm 3's ∇ of S(f(decode(x̂0))) with respect to x̂0, in float64, by central differences in random directions."""
        denoiser = DiTDenoiser(copy.deepcopy(network), vae=copy.deepcopy(vae), decode_batch=1).double()
        classifier, y = Linear().double(), torch.tensor([4, 7])
        free = Combination(denoiser, ClassifierFreeGuidance(1.5), channels=3)
        guidance = ClassifierGuidance(classifier, scale=0.5, apply_to="cfg_residual")
        at = levels(free, 300)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        predict = free.prepare(at, y)
        guided, x0 = guidance.prepare(at, y, free.decode)(predict, x, 0), predict(x, 0).x0.detach()

        def score(latents):
            with torch.no_grad():
                return TemperedLogProb()(classifier(free.decode(latents)).float(), y).double()

        # The score is computed in float32, which a step of 1e-2 leaves four digits of.
        for _ in range(4):
            direction = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
            difference = (score(x0 + 1e-2 * direction) - score(x0 - 1e-2 * direction)) / 2e-2
            analytic = (guided.aux.gradient * direction).sum(dim=(1, 2, 3))
            torch.testing.assert_close(analytic, difference, atol=2e-4, rtol=2e-3)
        shift, residual = guided.prediction.x0 - x0, guided.prediction.residual
        torch.testing.assert_close(shift.flatten(1).norm(dim=1), 0.5 * residual.flatten(1).norm(dim=1))

    def test_samples_climb_the_score_at_some_steps_or_all_and_through_any_decoder(self, denoiser, fixture):
        y = torch.tensor([0, 3, 5])
        classifier = Linear()
        score = TemperedLogProb()
        linear, _ = fit_linear_decoder(
            denoiser.decode, [torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))]
        )
        torch.manual_seed(0)
        tiny = TinyDecoder(
            AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        )
        free = Combination(denoiser, ClassifierFreeGuidance(1.5), channels=3)
        values, calls = {}, {}
        for name, arguments in {
            "none": {"scale": 0.0},
            "full": {},
            "every": {"schedule": GuidanceSchedule(every=3)},
            "interval": {"schedule": GuidanceSchedule(interval=[300, 700])},
            "linear": {"decoder": linear},
            "tiny": {"decoder": tiny},
        }.items():
            guidance = ClassifierGuidance(classifier, **{"scale": 0.5, "apply_to": "cfg_residual"} | arguments)
            classifier.calls = 0
            noise = SampleStreams([0] * 3, range(3), denoiser.image_shape)
            latents = DDPM("6")(free, noise, y, guidance)
            calls[name] = classifier.calls
            values[name] = float(score(classifier(denoiser.decode(latents)), y).mean())
        assert calls == {"none": 0, "full": 6, "every": 2, "interval": 2, "linear": 6, "tiny": 6}
        assert len(set(values.values())) == 6
        assert values["full"] > values["every"] > values["none"]


class TestLighterDecoders:
    @pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
    def test_a_decoder_that_is_linear_is_found_exactly(self, upsampling, tmp_path):
        generator = torch.Generator().manual_seed(0)
        truth = LinearDecoder(None, upsampling, factor=4)
        nn.init.normal_(truth.map.weight, generator=generator)
        nn.init.normal_(truth.map.bias, generator=generator)
        latents = torch.randn(6, 4, 5, 5, generator=generator)
        found, explained = fit_linear_decoder(truth, latents.split(4), upsampling)
        torch.testing.assert_close(found(latents), truth(latents), atol=1e-5, rtol=1e-5)
        assert explained == pytest.approx(1, abs=1e-6)
        found.save(tmp_path / "linear.safetensors")
        again = LinearDecoder(tmp_path / "linear.safetensors", upsampling, factor=4)
        assert torch.equal(again(latents), found(latents))
        with pytest.raises(CheckpointError, match=f"upsampling: {upsampling}"):
            LinearDecoder(
                tmp_path / "linear.safetensors", "bilinear" if upsampling == "nearest" else "nearest", factor=4
            )

    def test_of_any_other_decoder_it_is_the_nearest(self, vae):
        """No other map is nearer, and the fraction that it explains is the one that its residuals say."""
        decode = VAEDecoder(vae)
        latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        found, explained = fit_linear_decoder(decode, [latents])
        with torch.no_grad():
            images = decode(latents)
            error = (found(latents) - images).square().mean()
            spread = (images - images.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
            assert explained == pytest.approx(1 - float(error / spread), abs=1e-5)
            assert 0 < explained < 0.99
            for parameter in found.parameters():
                parameter += 0.01
                assert (found(latents) - images).square().mean() > error
                parameter -= 0.01

    def test_too_few_latents_are_refused(self):
        with pytest.raises(ValueError, match="undetermined"):
            fit_linear_decoder(LinearDecoder(), [torch.zeros(1, 4, 2, 2)])
        with pytest.raises(ValueError, match="no latents"):
            fit_linear_decoder(LinearDecoder(), [])
        with pytest.raises(ValueError, match="nearest, bilinear"):
            LinearDecoder(upsampling="cubic")

    @torch.no_grad()
    def test_the_tiny_decoder_is_the_autoencoders_on_the_models_latents(self, tmp_path):
        torch.manual_seed(0)
        model = AutoencoderTiny().eval()
        model.save_pretrained(tmp_path)
        latents = torch.randn(2, 4, 4, 4)
        assert torch.equal(TinyDecoder(str(tmp_path))(latents), model.decode(latents).sample)


def test_a_run_without_a_decoder_is_refused_before_it_samples(network, denoiser):
    module = GuidedSampling(Combination(DiTDenoiser(network)), DDPM("3"))
    module._trainer = mock.Mock(datamodule=mock.Mock(num_classes=10, batch_size=2, num_samples=2, shard_size=None))
    assert [problem for problem in module.problems() if "set vae" in problem]
    module.denoiser = denoiser
    assert not list(module.problems())


@torch.no_grad()
def test_the_script_fits_a_linear_decoder_to_a_folder_of_images(pipeline, vae, tmp_path, capsys):
    pixels = torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for n, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"{n}.png")
    path = tmp_path / "linear.safetensors"
    main([f"--vae={pipeline}", f"--images={tmp_path}", f"--output={path}", "--size=16", "--batch=2"])
    latents = vae.encode(from_uint8(pixels.permute(0, 3, 1, 2))).latent_dist.mean * 0.18215
    expected, explained = fit_linear_decoder(VAEDecoder(vae), [latents])
    torch.testing.assert_close(LinearDecoder(path, factor=2)(latents), expected(latents), atol=1e-4, rtol=1e-4)
    assert f"explains {100 * explained:.1f} % of the variance of 3 decoded images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([f"--vae={pipeline}", f"--images={tmp_path / 'none'}", f"--output={path}"])
