"""CLIP as a classifier of prompts, against open_clip's own path from images and texts to logits."""

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from calib_guidance.classifiers import CLIPClassifier
from calib_guidance.classifiers.clip import build_clip, low_discrepancy, resampling_matrix
from calib_guidance.scores import TemperedLogProb
from calib_guidance.weights.io import CheckpointError

ARCHITECTURE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PROMPTS = ["a photo of a red fox", "a blue car", "two cats"]
OPENAI = "hf://timm/vit_large_patch14_clip_336.openai/open_clip_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """open_clip's model and the same in a file."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**ARCHITECTURE).eval()
    for parameter in model.parameters():  # as initialized, embeddings of all images are much alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def images(n, height, width, dtype=torch.float32):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def test_logits_are_open_clips(saved, tmp_path):
    model, path = saved
    x = images(4, 16, 16)
    with torch.no_grad():
        pixels = (x + 1) / 2 - torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
        pixels = pixels / torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
        expected, _ = model.get_logits(pixels, open_clip.tokenize(PROMPTS, context_length=12))
        classifier = CLIPClassifier(PROMPTS, ARCHITECTURE, str(path)).freeze()
        torch.testing.assert_close(classifier(x), expected, atol=2e-5, rtol=1e-5)
        cosines = classifier.similarity(x)
        torch.testing.assert_close(cosines * model.logit_scale.exp(), expected, atol=2e-5, rtol=1e-5)
        assert cosines.std() > 0.02  # the prompts and images are told apart, so that the comparison means something

        # From other forms of the same file and architecture, in another order, at another temperature.
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.bin")
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}))
        other = CLIPClassifier(
            PROMPTS[::-1], str(tmp_path / "open_clip_config.json"), str(tmp_path / "w.bin"), temperature=4.0
        )
        torch.testing.assert_close(other(x), expected.flip(1) / 4, atol=2e-5, rtol=1e-5)
    assert {name.split(".")[0] for name, _ in classifier.named_parameters()} == {"visual"}  # no text network
    assert not any(p.requires_grad for p in classifier.parameters())


def test_the_scale_of_logits_is_bounded(saved):
    model, path = saved
    weights = model.state_dict() | {"logit_scale": torch.tensor(10.0)}
    save_file(weights, path.parent / "steep.safetensors")
    classifier = CLIPClassifier(PROMPTS, ARCHITECTURE, str(path.parent / "steep.safetensors"))
    assert classifier.logit_scale == 100


@pytest.mark.parametrize("size", [(16, 24), (40, 33), (9, 16)])
def test_resizing_is_torchs_antialiased_bicubic(size):
    x = images(2, *size, dtype=torch.float64) / 2  # so that nothing overshoots [-1, 1]
    classifier = CLIPClassifier(["a"], ARCHITECTURE).double()
    expected = F.interpolate(x, (16, 16), mode="bicubic", antialias=True)
    (shown,) = classifier._views(x, None)
    torch.testing.assert_close(shown, expected, atol=1e-12, rtol=0)


def test_preprocessing_is_open_clips():
    """Of an 8-bit image through Pillow, which rounds to complete gray levels after rows and after columns."""
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 3, 40), torch.linspace(0, 3, 40), indexing="ij"))
    smooth = torch.stack([grid[0].sin(), grid[1].cos(), (grid[0] * grid[1]).sin()]) * 60 + 128
    pixels = smooth.round().to(torch.uint8)
    expected = open_clip.image_transform(16, is_train=False)(Image.fromarray(np.asarray(pixels.permute(1, 2, 0))))
    classifier = CLIPClassifier(["a"], ARCHITECTURE)
    seen = []
    classifier.visual.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    classifier(pixels[None].float() / 127.5 - 1)
    torch.testing.assert_close(seen[0][0], expected, atol=1.01 / 255 / 0.26, rtol=0)


@pytest.mark.parametrize("size", [9, 16, 40])
def test_overshoot_is_clipped_as_by_open_clip(size):
    """Black and white noise, on which bicubic filters overshoot most; larger, smaller, and of the network's own size."""
    pixels = np.random.default_rng(0).integers(0, 2, (size, size, 3), dtype=np.uint8) * 255
    expected = open_clip.image_transform(16, is_train=False)(Image.fromarray(pixels))
    classifier = CLIPClassifier(["a"], ARCHITECTURE)
    seen = []
    classifier.visual.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1).requires_grad_()
    classifier(x).sum().backward()
    torch.testing.assert_close(seen[0][0], expected, atol=1.5 / 255 / 0.26, rtol=0)
    white = torch.ones(1, 3, size, size, requires_grad=True)
    classifier(white).sum().backward()
    assert (white.grad.abs().amax(dim=(0, 1)) > 0).all()  # a saturated area can be darkened


@pytest.mark.parametrize("cutouts", [0, 2])
def test_gradient_of_the_image_is_that_of_finite_differences(saved, cutouts):
    classifier = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1]), cutouts=cutouts).double().freeze()
    x, t, y = images(2, 20, 12, torch.float64).requires_grad_(), torch.tensor([7, 900]), torch.tensor([2, 0])

    def score(image):
        return TemperedLogProb(1.0, 0.5)(classifier(image, t), y).sum()

    (gradient,) = torch.autograd.grad(score(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5 * direction
    with torch.no_grad():
        difference = (score(x + step) - score(x - step)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, atol=0, rtol=1e-6)
    assert gradient.flatten(1).norm(dim=1).min() > 1e-3


class TestCutouts:
    def test_a_cutout_is_the_resized_crop(self):
        """Away from the border of the crop, behind which a cut-out sees the image resume."""
        x = images(1, 48, 40, torch.float64)

        def matrix(start, length, source):
            return resampling_matrix(*torch.tensor([start, length], dtype=torch.float64), source, 16)

        crop = x[:, :, 6:38, 8:32]
        expected = F.interpolate(crop, (16, 16), mode="bicubic", antialias=True)
        shown = matrix(6.0, 32.0, 48) @ x @ matrix(8.0, 24.0, 40).mT
        torch.testing.assert_close(shown[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], atol=1e-12, rtol=0)
        # A fraction of a pixel moves a ramp by that fraction.
        ramp = torch.arange(48, dtype=torch.float64)
        moved = (matrix(6.3, 32.0, 48) - matrix(6.0, 32.0, 48)) @ ramp
        torch.testing.assert_close(moved, torch.full_like(moved, 0.3), atol=1e-12, rtol=0)

    def test_logits_are_the_mean_over_views(self, saved):
        classifier = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1]), cutouts=3).freeze()
        complete = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1])).freeze()
        x, t = images(2, 32, 32), torch.tensor([5, 5])
        views = classifier._views(x, t)
        assert len(views) == 4
        with torch.no_grad():
            torch.testing.assert_close(classifier(x, t), torch.stack([complete(view) for view in views]).mean(0))

    def test_places_depend_on_t_and_on_no_other_sample(self, saved):
        classifier = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1]), cutouts=2).freeze()
        x = images(1, 32, 32).expand(3, -1, -1, -1)
        with torch.no_grad():
            logits = classifier(x, torch.tensor([10, 20, 10]))
            torch.testing.assert_close(logits[:1], classifier(x[:1], torch.tensor([10])))
        torch.testing.assert_close(logits[0], logits[2])
        assert (logits[0] - logits[1]).abs().max() > 1e-3

    def test_places_cover_the_image_evenly(self):
        """Every eighth of (size, height, width) is visited in turn, which random places do not do."""
        octant = ((low_discrepancy(torch.arange(37, 101)) * 2).long() * torch.tensor([4, 2, 1])).sum(1)
        assert (octant.bincount(minlength=8) - 8).abs().max() <= 2
        classifier = CLIPClassifier(["a"], ARCHITECTURE, cutouts=1, cutout_scale=(1.0, 1.0))
        complete, cutout = classifier._views(images(2, 20, 20), torch.tensor([3, 700]))
        torch.testing.assert_close(complete, cutout)


def test_half_precision_is_close_and_returns_float32(saved):
    x = images(4, 24, 24)
    with torch.no_grad():
        expected = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1])).freeze()(x)
        logits = CLIPClassifier(PROMPTS, ARCHITECTURE, str(saved[1]), dtype="bfloat16").freeze()(x)
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_published_architecture():
    """OpenAI's ViT-L/14 at 336 pixels, as its file on the hub has it."""
    with torch.device("meta"):
        state = build_clip("ViT-L-14-336-quickgelu").state_dict()
    assert sum(value.numel() for value in state.values()) == 427_944_193
    assert state["visual.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    assert state["visual.positional_embedding"].shape == (577, 1024)
    assert state["transformer.resblocks.11.mlp.c_fc.bias"].shape == (3072,)
    assert state["text_projection"].shape == (768, 768)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompts": "a fox"}, "a list of texts"),
            ({"prompts": []}, "a list of texts"),
            (
                {"prompts": ["one two three four five six seven eight nine ten eleven"]},
                "of its 13 tokens the model reads 12",
            ),
            ({"model": "ViT-L-14-335-quickgelu"}, "did you mean ViT-L-14-336-quickgelu"),
            ({"model": "nothing.json"}, r"nothing\.json is not a readable JSON file"),
            ({"model": ARCHITECTURE | {"depth": 3}}, "open_clip's format .*depth"),
            ({"model": "coca_ViT-B-32"}, "writes captions"),
            ({"model": "ViT-B-16-SigLIP"}, "a tokenizer that is not part of open_clip"),
            ({"cutouts": -1}, "cutouts"),
            ({"cutout_scale": (0.5, 1.5)}, "cutout_scale"),
            ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
            ({"dtype": "half"}, "known: float32, float16, bfloat16"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            CLIPClassifier(**{"prompts": PROMPTS, "model": ARCHITECTURE} | arguments)

    @pytest.mark.parametrize(
        ("model", "weights", "message"),
        [
            (ARCHITECTURE | {"quick_gelu": False}, OPENAI, "trained with QuickGELU.*with -quickgelu"),
            (ARCHITECTURE | {"quick_gelu": False}, "weights/ViT-L-14-openai.safetensors", "trained with QuickGELU"),
            (ARCHITECTURE, "hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K/open_clip_model.safetensors", "without -quick"),
            (
                ARCHITECTURE | {"quick_gelu": False},
                "hf://laion/CLIP-ViT-L-14-laion2B-s32B-b82K/open_clip_model.safetensors",
                r"mean \[0\.5, 0\.5, 0\.5\]: set mean",
            ),
        ],
    )
    def test_published_weights_of_another_activation_or_statistics(self, model, weights, message):
        with pytest.raises(ValueError, match=message):
            CLIPClassifier(PROMPTS, model, weights)

    def test_a_file_of_another_architecture(self, saved):
        wider = ARCHITECTURE | {"embed_dim": 24}
        with pytest.raises(CheckpointError, match=r"does not fit CLIP; of another shape: text_projection"):
            CLIPClassifier(PROMPTS, wider, str(saved[1]))

    def test_gray_images(self):
        with pytest.raises(ValueError, match="3 colors, not of 1"):
            CLIPClassifier(PROMPTS, ARCHITECTURE).check_image((1, 32, 32))

    def test_without_open_clip(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(ImportError, match=r"calib-guidance\[clip\]"):
            CLIPClassifier(PROMPTS, ARCHITECTURE)
