"""The table of published networks: architectures at full size, recognition, and what shapes do not tell."""

import json
import re
from dataclasses import replace

import lightning as L
import pytest
import torch
import torchvision
from torch import nn

import calib_guidance
from calib_guidance.classifiers import Ensemble, NoiseAwareClassifier
from calib_guidance.data import SampleRequests
from calib_guidance.denoisers import ADMDenoiser, EDMDenoiser
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import DiT, EncoderUNet, UNet
from calib_guidance.samplers import Heun
from calib_guidance.tasks import GuidedSampling
from calib_guidance.weights import registry
from calib_guidance.weights.io import CheckpointError, load_weights, save_weights
from tests.conftest import ROOT, replace_cards
from tests.edm_files import edm_bytes

IGNORED = {"dims", "use_checkpoint", "use_fp16", "pool"}
# Shapes by name in the published files.
SIGNATURE_SHAPES = {
    "adm_imagenet64": (
        295_904_454,
        {
            "input_blocks.0.0.weight": (192, 3, 3, 3),
            "input_blocks.5.1.qkv.weight": (1152, 384, 1),
            "middle_block.1.qkv.weight": (2304, 768, 1),
            "output_blocks.15.0.skip_connection.weight": (192, 384, 1, 1),
            "label_emb.weight": (1000, 768),
            "out.2.weight": (6, 192, 3, 3),
        },
    ),
    "adm_imagenet128": (
        421_529_606,
        {
            "time_embed.2.weight": (1024, 1024),
            "input_blocks.7.1.qkv.weight": (1536, 512, 1),
            "input_blocks.6.1.qkv.weight": None,
            "input_blocks.14.1.proj_out.weight": (1024, 1024, 1),
            "output_blocks.14.0.skip_connection.weight": (256, 512, 1, 1),
            "out.2.bias": (6,),
        },
    ),
    "adm_imagenet256": (
        553_838_086,
        {
            "label_emb.weight": (1000, 1024),
            "input_blocks.17.1.qkv.weight": (3072, 1024, 1),
            "output_blocks.17.0.in_layers.2.weight": (256, 512, 3, 3),
        },
    ),
    "adm_imagenet256_uncond": (
        552_814_086,
        {"label_emb.weight": None, "input_blocks.17.1.qkv.weight": (3072, 1024, 1)},
    ),
    "adm_imagenet512": (
        558_997_638,
        {"input_blocks.0.0.weight": (128, 3, 3, 3), "output_blocks.20.0.in_layers.2.weight": (128, 256, 3, 3)},
    ),
    "adm_classifier64": (
        65_438_568,
        {
            "out.2.positional_embedding": (512, 65),
            "out.2.c_proj.weight": (1000, 512, 1),
            "input_blocks.19.1.qkv.weight": (1536, 512, 1),
        },
    ),
    "adm_classifier128": (
        42_568_040,
        {
            "out.2.positional_embedding": (512, 65),
            "out.2.qkv_proj.weight": (1536, 512, 1),
            "input_blocks.14.1.qkv.weight": (1536, 512, 1),
        },
    ),
    "adm_classifier256": (54_096_360, {"out.2.positional_embedding": (512, 65)}),
    "adm_classifier512": (
        54_448_360,
        {"out.2.positional_embedding": (512, 65), "input_blocks.0.0.weight": (64, 3, 3, 3)},
    ),
    "edm_imagenet64": (295_899_267, {"out.2.weight": (3, 192, 3, 3), "label_emb.weight": (1000, 768)}),
}


@pytest.mark.parametrize("name", SIGNATURE_SHAPES)
def test_full_size_architectures(name):
    parameters, shapes = SIGNATURE_SHAPES[name]
    network = registry.reference(name)
    assert sum(p.numel() for p in network.parameters()) == parameters == registry.CARDS[name].parameters
    state = network.state_dict()
    for key, shape in shapes.items():
        assert (tuple(state[key].shape) if key in state else None) == shape, key
    assert registry.identify(state)[0] == name
    assert registry.identify({k: v for k, v in state.items() if k != "time_embed.0.bias"}) == []


def test_heads_and_order_of_the_published_attention():
    heads = {name: registry.nonstate_hparams(registry.reference(name)) for name in SIGNATURE_SHAPES}
    assert {name for name, what in heads.items() if "new" in what["attention_order"]} == {"adm_imagenet64"}
    assert heads["adm_imagenet128"]["attention_heads"] == "16×4"  # a fixed number; the others have 64 channels each
    assert heads["adm_imagenet64"]["attention_heads"] == "3×6, 3×9, 8×12, 4×9, 4×6"
    assert heads["adm_classifier128"]["attention_heads"] == "2×4, 2×6, 3×8"
    assert (
        heads["adm_imagenet256"]["attention_heads"] == heads["adm_imagenet512"]["attention_heads"] == "2×8, 11×16, 3×8"
    )
    assert all(what["norm_groups"].endswith("×32") and "," not in what["norm_groups"] for what in heads.values())


def test_a_network_whose_weights_are_known_takes_no_time_to_make_random_ones():
    state = registry.reference("adm_classifier128").state_dict()
    network, entry = registry.build(None, "adm_classifier", "bfloat16", state)
    assert entry.name == "adm_classifier128"
    made = registry.make_network("adm_classifier128", "bfloat16")
    for (name, found), (other, expected) in zip(network.named_parameters(), made.named_parameters(), strict=True):
        assert (name, found.dtype, found.stride()) == (other, expected.dtype, expected.stride())
        assert found.device.type == "cpu"


def test_others_are_identified_by_a_few_shapes():
    with torch.device("meta"):
        resnets = {depth: torchvision.models.get_model(f"resnet{depth}").state_dict() for depth in (50, 101)}
    assert registry.identify(resnets[50]) == ["resnet50_v1", "resnet50_v2"]
    assert registry.identify(resnets[101], "classifier") == ["resnet101_v1", "resnet101_v2"]
    assert registry.identify(resnets[101], "adm") == []


def test_lsun_files_are_not_reported_under_an_imagenet_name():
    """Five published files have the shapes of ADM-256 without labels; the file's name tells them apart."""
    state = registry.reference("adm_imagenet256_uncond").state_dict()
    lsun = [f"adm_lsun_{name}" for name in ("bedroom", "cat", "horse", "horse_nodropout")]
    assert registry.identify(state) == ["adm_imagenet256_uncond", *lsun]
    assert registry.identify(state, path="models/lsun_cat.pt") == ["adm_lsun_cat"]
    assert registry.identify(state, path="256x256_diffusion_uncond.pt") == ["adm_imagenet256_uncond"]
    assert registry.identify(state, path="64x64_diffusion.pt") == ["adm_imagenet256_uncond", *lsun]
    with torch.device("meta"):
        network, card = registry.build(None, "adm", state=state)
    assert card.settings == {"noise_schedule": "linear", "prediction": "epsilon", "num_steps": 1000}
    assert network.state_dict().keys() == state.keys()


def test_where_public_files_are():
    assert registry.by_file("checkpoints/128x128_diffusion.pt").name == "adm_imagenet128"
    assert registry.by_file("/data/sd-vae-ft-ema/diffusion_pytorch_model.safetensors").name == "sd_vae_ft_ema"
    assert registry.by_file("checkpoints/diffusion.pt") is None
    for library in (torchvision.models.ResNet50_Weights, torchvision.models.ResNet101_Weights):
        for weights in library:
            entry = registry.by_file(weights.url.rpartition("/")[2])
            assert entry.source == weights.url
            assert entry.parameters == weights.meta["num_params"]
            assert abs(entry.bytes / 2**20 - weights.meta["_file_size"]) < 0.01
            assert weights.name in entry.used_by
    with pytest.raises(
        ValueError, match="unknown published network 'adm_imagenet32'; known: adm_imagenet64, .*class_path"
    ):
        registry.entry("adm_imagenet32", "adm")
    with pytest.raises(ValueError, match="known: adm_classifier64"):
        registry.entry("adm_imagenet64", "adm_classifier")


def test_the_readme_of_checkpoints_has_the_table():
    lines = ["| name | file | source | size | license | used by |", "|---|---|---|---:|---|---|"]
    for card in registry.CARDS.values():
        address = card.source.replace("hf://", "https://huggingface.co/")
        source = f"<{card.source}>" if address == card.source else f"[{card.source}]({address})"
        size = f"{card.bytes / 1e9:.2f} GB" if card.bytes >= 1e9 else f"{card.bytes / 1e6:.0f} MB"
        lines.append(f"| `{card.name}` | `{card.file}` | {source} | {size} | {card.license} | {card.used_by} |")
    assert "\n".join(lines) in (ROOT / "checkpoints/README.md").read_text()
    for name, entry in registry.CARDS.items():
        assert entry.name == name
        assert entry.file_name or entry.source.endswith(entry.file)
        assert entry.license
        if entry.parameters is not None and entry.kind not in ("clip", "edm2"):  # float32, and little more
            assert 4 * entry.parameters <= entry.bytes < 4.05 * entry.parameters


@pytest.fixture
def small(monkeypatch, golden):
    """A small published ADM network, guided-diffusion's weights of the fixture, and a small classifier."""
    entries = {}
    for name, kind, fixture in (
        ("adm_small", "adm", "adm_unet_c"),
        ("adm_small_classifier", "adm_classifier", "adm_classifier"),
    ):
        config, weights = golden(fixture).json["config"], golden(fixture).weights()
        architecture = {k: v for k, v in config.items() if k not in IGNORED} | {"dtype": "float16"}
        if kind == "adm_classifier":
            architecture = {k: v for k, v in architecture.items() if k not in ("num_classes", "num_heads_upsample")}
        entries[name] = registry.Card(
            name,
            kind,
            source=f"https://example.org/{name}.pt",
            license="MIT",
            used_by="",
            bytes=2_000_000,
            parameters=sum(w.numel() for w in weights.values()),
            network="UNet" if kind == "adm" else "EncoderUNet",
            arguments=architecture,
            settings={"noise_schedule": "cosine", "prediction": "epsilon", "num_steps": 1000},
        )
    replace_cards(monkeypatch, {**registry.CARDS, **entries})
    yield {
        name: golden(fixture)
        for name, fixture in (("adm_small", "adm_unet_c"), ("adm_small_classifier", "adm_classifier"))
    }
    registry.reference.cache_clear()


class TestDenoiser:
    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize("network", ["adm_small", None])
    def test_a_published_file_gives_the_published_outputs(self, tmp_path, small, network, half):
        fixture = small["adm_small"]
        weights = {k: v.half() if half and v.ndim > 2 else v for k, v in fixture.weights().items()}
        torch.save(weights, tmp_path / "any.pt")
        denoiser = ADMDenoiser(network, str(tmp_path / "any.pt"), dtype="float32")
        with torch.no_grad():
            output = denoiser.network(fixture["x"], fixture["t"], fixture["y"])
        if half:
            assert 0 < (output - fixture["output"]).abs().max() < 0.02 * fixture["output"].std()
        else:
            fixture.assert_close("output", output)
        assert denoiser.provenance["published"] == ["adm_small"]
        assert denoiser.provenance["file"] == str(tmp_path / "any.pt")
        assert denoiser.provenance["noise_schedule"] == "cosine"
        assert denoiser.provenance["attention_order"].endswith("legacy")
        assert denoiser.schedule.alphas_cumprod[500] == pytest.approx(0.49, abs=0.01)  # cosine's; linear has 0.078
        assert ADMDenoiser("adm_small").network.input_blocks[0][0].weight.dtype == torch.float16
        json.dumps(denoiser.provenance)

    def test_what_shapes_do_not_tell_must_agree(self, tmp_path, small):
        fixture = small["adm_small"]
        file = str(tmp_path / "any.pt")
        torch.save(fixture.weights(), file)
        architecture = dict(registry.CARDS["adm_small"].arguments) | {"dtype": "float32"}
        own = UNet(**architecture)
        assert ADMDenoiser(own, file).provenance["noise_schedule"] == "cosine"
        with pytest.raises(CheckpointError, match="adm_small, which was made with attention order .*order: False"):
            ADMDenoiser(UNet(**architecture | {"use_new_attention_order": True}), file)
        with pytest.raises(
            CheckpointError, match="made with attention heads .*set num_heads: .*num_head_channels: .*or name"
        ):
            ADMDenoiser(UNet(**architecture | {"num_head_channels": -1, "num_heads": 1}), file)
        for option, value in (("noise_schedule", "linear"), ("prediction", "v"), ("num_steps", 4000)):
            said = registry.CARDS["adm_small"].settings[option]
            message = f"made with {option.replace('_', ' ')} {said}, here {value}.*set {option}: {said}"
            with pytest.raises(CheckpointError, match=message):
                ADMDenoiser(UNet(**architecture), file, **{option: value})
            with pytest.raises(CheckpointError, match=message):
                ADMDenoiser("adm_small", **{option: value})
        # The same shapes, trained otherwise by somebody who says so.
        other = UNet(**architecture | {"use_new_attention_order": True})
        metadata = {"noise_schedule": "linear", "prediction": "v", "num_steps": 1000} | registry.nonstate_hparams(other)
        save_weights(fixture.weights(), tmp_path / "own.safetensors", **metadata)
        denoiser = ADMDenoiser(other, str(tmp_path / "own.safetensors"))
        assert (denoiser.prediction, denoiser.provenance["noise_schedule"]) == ("v", "linear")
        with pytest.raises(CheckpointError, match="was trained with attention_order: .*new"):
            ADMDenoiser(UNet(**architecture), str(tmp_path / "own.safetensors"))

    def test_what_nothing_tells_must_be_stated(self, tmp_path):
        network = UNet(8, 1, 32, 1, num_res_blocks=1, channel_mult=(1,))
        file = str(tmp_path / "own.pt")
        torch.save(network.state_dict(), file)
        with pytest.raises(
            CheckpointError, match="own.pt does not say its noise_schedule.*state noise_schedule in the YAML"
        ):
            ADMDenoiser(network, file)
        with pytest.raises(CheckpointError, match="does not say its prediction"):
            ADMDenoiser(network, file, "linear")
        assert ADMDenoiser(network, file, "linear", prediction="v").prediction == "v"
        with pytest.raises(
            CheckpointError, match="of none of the published.*num_heads or num_head_channels.*noise_schedule"
        ):
            ADMDenoiser(None, file)
        with pytest.raises(ValueError, match="give a published name .adm_imagenet64"):
            ADMDenoiser()
        with pytest.raises(ValueError, match="unknown published network 'adm_classifier64'"):
            ADMDenoiser("adm_classifier64")
        with pytest.raises(ValueError, match="dtype is for published networks"):
            ADMDenoiser(network, dtype="float32")

    def test_shapes_of_several_published_networks(self, tmp_path, small, monkeypatch):
        card = registry.CARDS["adm_small"]
        settings = card.settings | {"noise_schedule": "linear"}
        twin = replace(card, name="adm_twin", settings=settings)
        replace_cards(monkeypatch, {**registry.CARDS, "adm_twin": twin})
        torch.save(small["adm_small"].weights(), tmp_path / "any.pt")
        with pytest.raises(CheckpointError, match="of adm_small and adm_twin of the published.*state network"):
            ADMDenoiser(None, str(tmp_path / "any.pt"))
        assert ADMDenoiser("adm_twin", str(tmp_path / "any.pt")).provenance["published"] == ["adm_small", "adm_twin"]
        torch.save(small["adm_small"].weights(), tmp_path / "adm_small.pt")
        assert ADMDenoiser("adm_small", str(tmp_path / "adm_small.pt")).provenance["published"] == ["adm_small"]


class TestClassifier:
    @pytest.mark.parametrize("network", ["adm_small_classifier", None])
    def test_a_published_file_gives_the_published_outputs(self, tmp_path, small, network):
        fixture = small["adm_small_classifier"]
        torch.save(fixture.weights(), tmp_path / "any.pt")
        classifier = NoiseAwareClassifier(network, str(tmp_path / "any.pt"), dtype="float32").freeze()
        fixture.assert_close("logits", classifier(fixture["x"], fixture["t"]))
        assert classifier.num_classes == fixture["logits"].shape[1]
        assert classifier.provenance["published"] == ["adm_small_classifier"]

    def test_another_order_of_the_attention_is_refused(self, tmp_path, small):
        torch.save(small["adm_small_classifier"].weights(), tmp_path / "any.pt")
        architecture = registry.CARDS["adm_small_classifier"].arguments
        other = EncoderUNet(**architecture | {"use_new_attention_order": not architecture["use_new_attention_order"]})
        with pytest.raises(CheckpointError, match="made with attention order"):
            NoiseAwareClassifier(other, str(tmp_path / "any.pt"))

    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_its_t_must_be_the_denoisers(self, small, schedule):
        """EDM's network knows σ alone, so that nothing but this tells which t the classifier is given."""
        classifier = NoiseAwareClassifier("adm_small_classifier", dtype="float32")
        size, classes = classifier.network.image_size, classifier.num_classes
        network = UNet(size, 3, 32, 3, 1, (), channel_mult=(1,), num_classes=classes)
        guidance = ClassifierGuidance(Ensemble([classifier, classifier]), classifier_input="x_t")
        module = GuidedSampling(EDMDenoiser(network, noise_schedule=schedule), Heun(2), guidance)
        module.trainer = L.Trainer(accelerator="cpu", logger=False, inference_mode=False)
        module.trainer.datamodule = SampleRequests(1, classes)
        problems = list(module.problems())
        if schedule == "cosine":
            assert problems == []
        else:
            (problem,) = problems
            assert "the noise of a cosine schedule of 1000 steps" in problem

    def test_of_ones_own_weights_the_noise_is_not_known(self, tmp_path, small):
        published_one = NoiseAwareClassifier("adm_small_classifier", dtype="float32")
        assert published_one.noise_schedule == "cosine"
        save_weights(published_one.network, tmp_path / "own.safetensors", **published_one.weights_metadata)
        own = NoiseAwareClassifier("adm_small_classifier", str(tmp_path / "own.safetensors"))
        assert own.noise_schedule is None


def test_a_pickle_of_edm_gives_edms_outputs(tmp_path, golden):
    """From the format with its source code, through the key map, to the denoised images."""
    fixture = golden("edm_net")
    (tmp_path / "network-snapshot.pkl").write_bytes(edm_bytes(fixture.weights()))
    denoiser = EDMDenoiser(checkpoint=str(tmp_path / "network-snapshot.pkl"))
    levels = denoiser.schedule.at_sigmas(fixture["sigma"].double().numpy())
    x_t = torch.tensor(levels.alphas_cumprod).sqrt().view(-1, 1, 1, 1) * fixture["x"]
    with torch.no_grad():
        x0 = denoiser.prepare(levels, fixture["labels"].argmax(1))(x_t, torch.arange(4)).x0
    fixture.assert_close("output", x0)
    assert denoiser.provenance["file"].endswith("network-snapshot.pkl")


def test_a_network_other_than_a_unet_has_no_other_hyperparameters(tmp_path):
    network = nn.Linear(2, 2)
    save_weights(network, tmp_path / "a.safetensors")
    assert load_weights(network, tmp_path / "a.safetensors") == {
        "file": str(tmp_path / "a.safetensors"),
        "bytes": 24,
        "published": [],
    }


class TestLoadPretrained:
    def test_a_denoiser_and_a_classifier_by_name(self, tmp_path, small, monkeypatch):
        """From ``checkpoints/`` below the current folder, or from the stated file."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "checkpoints").mkdir()
        torch.save(small["adm_small"].weights(), "checkpoints/adm_small.pt")
        torch.save(small["adm_small_classifier"].weights(), "elsewhere.pt")
        denoiser = calib_guidance.load_pretrained("adm_small", dtype="float32")
        fixture = small["adm_small"]
        with torch.no_grad():
            fixture.assert_close("output", denoiser.network(fixture["x"], fixture["t"], fixture["y"]))
        assert isinstance(denoiser, ADMDenoiser)
        assert denoiser.provenance["published"] == ["adm_small"]
        assert not any(p.requires_grad for p in denoiser.parameters())
        classifier = calib_guidance.load_pretrained("adm_small_classifier", "elsewhere.pt", dtype="float32")
        fixture = small["adm_small_classifier"]
        fixture.assert_close("logits", classifier(fixture["x"], fixture["t"]))
        assert not any(p.requires_grad for p in classifier.parameters())
        with pytest.raises(CheckpointError, match="made with noise schedule cosine, here linear"):
            calib_guidance.load_pretrained("adm_small", noise_schedule="linear")

    def test_an_edm_pickle_and_a_torchvision_classifier(self, tmp_path, small, monkeypatch):
        network = UNet(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2), num_classes=4, num_head_channels=64)
        arguments = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
        arguments |= {"attention_resolutions": (2,), "channel_mult": (1, 2), "num_classes": 4, "num_head_channels": 64}
        card = replace(
            registry.CARDS["edm_imagenet64"],
            name="edm_small",
            arguments=arguments,
            signature_shapes={},
            parameters=sum(value.numel() for value in network.state_dict().values()),
        )
        replace_cards(monkeypatch, {**registry.CARDS, "edm_small": card})
        save_weights(network, tmp_path / "edm.safetensors")
        denoiser = calib_guidance.load_pretrained("edm_small", tmp_path / "edm.safetensors")
        assert isinstance(denoiser, EDMDenoiser)
        assert (denoiser.sigma_data, denoiser.provenance["published"]) == (0.5, ["edm_small"])
        with torch.device("meta"):
            state = torchvision.models.get_model("resnet50").state_dict()
        state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}
        torch.save(state, tmp_path / "resnet.pth")
        classifier = calib_guidance.load_pretrained("resnet50_v2", tmp_path / "resnet.pth", normalize="imagenet")
        assert classifier(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
        assert (classifier.provenance["architecture"], classifier.normalize) == ("torchvision/resnet50", "imagenet")

    def test_a_dit_comes_with_its_autoencoder(self, tmp_path, monkeypatch):
        from diffusers import AutoencoderKL

        arguments = {"sample_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 4, "num_classes": 10}
        network = DiT(**arguments)
        card = replace(
            registry.CARDS["dit_xl_2_256"],
            arguments=arguments,
            signature_shapes={},
            parameters=sum(value.numel() for value in network.state_dict().values()),
        )
        replace_cards(monkeypatch, {**registry.CARDS, "dit_xl_2_256": card})
        monkeypatch.setattr(registry, "reference", registry.reference.__wrapped__)
        monkeypatch.chdir(tmp_path)
        save_weights(network, "checkpoints/DiT-XL-2-256x256.pt")
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = AutoencoderKL(**blocks, block_out_channels=[8] * 2, norm_num_groups=4, layers_per_block=1)
        vae.save_pretrained("checkpoints/sd-vae-ft-ema")
        denoiser = calib_guidance.load_pretrained("dit_xl_2_256")
        assert denoiser.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
        assert calib_guidance.load_pretrained("dit_xl_2_256", vae=None).vae is None
        decoder = calib_guidance.load_pretrained("sd_vae_ft_ema")
        assert torch.equal(decoder(torch.ones(1, 4, 8, 8)), denoiser.decode(torch.ones(1, 4, 8, 8)))

    def test_errors_say_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("adm_imagenet128", "adm_classifier64", "edm_imagenet64", "dit_xl_2_256", "resnet101_v2"):
            card = registry.CARDS[name]
            found = re.escape(f"checkpoints/{card.file}: no such weights file; the public {name} is at {card.source} (")
            with pytest.raises(CheckpointError, match=found):
                calib_guidance.load_pretrained(name)
            with pytest.raises(CheckpointError, match=re.escape(f"other.pt: no such weights file; the public {name}")):
                calib_guidance.load_pretrained(name, "other.pt")
        with pytest.raises(ValueError, match="unknown published network 'adm_imagenet32'; known: adm_imagenet64"):
            calib_guidance.load_pretrained("adm_imagenet32")
        with pytest.raises(ValueError, match=r"is for metrics alone: .*InceptionFeatures"):
            calib_guidance.load_pretrained("inception_2015")
