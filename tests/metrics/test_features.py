"""Extractors by name, what they see and what they say of themselves."""

import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation import TimmFeatures, TorchvisionFeatures, features_from_name
from calib_guidance.networks import SmallResNet
from calib_guidance.weights.io import CheckpointError, save_weights

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def images(channels=3, size=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8, generator=generator)


def shown(x, size, mode):
    """As both libraries prepare images for the networks below, but for the crop."""
    x = F.interpolate(x.float(), (size, size), mode=mode, antialias=True).clamp(0, 255)
    return (x / 255 - MEAN) / STD


@pytest.mark.parametrize(
    ("model", "size", "mode"), [("resnet10t", 176, "bicubic"), ("test_vit2.r160_in1k", 160, "bicubic")]
)
def test_timm_models_see_what_they_were_trained_on(tmp_path, model, size, mode):
    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    settings = timm.data.resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    assert (settings["input_size"][-1], settings["interpolation"]) == (size, mode)
    save_weights(network, tmp_path / "w.safetensors")
    extractor = features_from_name(f"timm:{model}:{tmp_path / 'w.safetensors'}")
    found = extractor(images())
    mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    x = shown(images(), size, mode) * STD + MEAN
    expected = network.forward_head(network.forward_features((x - mean) / std), pre_logits=True)
    torch.testing.assert_close(found.pool, expected, atol=1e-5, rtol=1e-4)
    assert (extractor.width, found.spatial, found.logits) == (expected.shape[1], None, None)
    said = extractor.provenance()
    assert said["resize"]["size"] == size


def test_dinov2_is_measured_at_224_pixels():
    torch.manual_seed(0)
    extractor = TimmFeatures("vit_small_patch14_dinov2.lvd142m", weights=None)
    assert extractor(images()).pool.shape == (2, extractor.width) == (2, 384)
    assert extractor.network.pos_embed.shape[1] == 16 * 16 + 1
    assert (extractor.size, extractor.how) == (224, "bicubic")
    assert extractor.provenance()["resize"]["how"].endswith(", where timm's settings say 518")


def test_torchvision_models_give_the_input_of_their_last_layer(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    extractor = features_from_name(f"torchvision:resnet18:{tmp_path / 'w.pth'}")
    gray = images(1)
    found = extractor(gray).pool
    network.fc = nn.Identity()
    torch.testing.assert_close(found, network(shown(gray.expand(-1, 3, -1, -1), 224, "bilinear")), atol=1e-5, rtol=1e-4)
    assert extractor.provenance()["weights"] == str(tmp_path / "w.pth")


def test_an_eval_classifier_of_a_file_and_what_it_says_of_itself(tmp_path):
    torch.manual_seed(0)
    network = SmallResNet()
    save_weights(network, tmp_path / "eval_classifier.safetensors")
    describe(tmp_path, weights=str(tmp_path / "eval_classifier.safetensors"))
    extractor = features_from_name(f"classifier:{tmp_path / 'eval_classifier.yaml'}")
    found = extractor(images(1, 8))
    x = images(1, 8) / 127.5 - 1
    network.eval()
    torch.testing.assert_close(found.pool, network.forward_features(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits, network(x), atol=1e-5, rtol=1e-4)
    before = extractor.provenance()
    network.fc.bias.data += 1
    save_weights(network, tmp_path / "eval_classifier.safetensors")
    after = features_from_name(f"classifier:{tmp_path / 'eval_classifier.yaml'}").provenance()
    assert before["weights_sha256"] != after["weights_sha256"]
    assert before | after == after


def describe(folder, **more):
    small = {"class_path": "calib_guidance.networks.SmallResNet", "init_args": {"num_classes": 10}}
    content = {
        "class_path": "calib_guidance.classifiers.OffTheShelfClassifier",
        "init_args": {"network": small, "num_classes": 10, **more},
    }
    (folder / "eval_classifier.yaml").write_text(yaml.safe_dump(content))


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    """Found in the working directory, where an installed command does not look."""
    code = "import torch\nclass Mine(torch.nn.Flatten):\n    width = 12\n\nnarrow = torch.nn.Flatten\nnumber = 3\n"
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    extractor = features_from_name("my_features:Mine")
    x = images(3, 2)
    torch.testing.assert_close(extractor(x).pool, (x / 127.5 - 1).flatten(1))
    assert extractor.name == "my_features.Mine"
    with pytest.raises(ConfigurationError, match="Flatten does not say how wide .* set its attribute width"):
        features_from_name("my_features:narrow")
    with pytest.raises(ConfigurationError, match="my_features:number is neither a torch module"):
        features_from_name("my_features:number")


def test_what_is_not_understood(tmp_path):
    describe(tmp_path, wieghts="x")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "bad.pth").write_text("<!doctype html>")
    wrong = {
        "inceptoin": "expected inception",
        "timm:resnet10": "unknown 'timm/resnet10'",
        "torchvision:resnet18:BEST": "has no 'BEST'",
        f"classifier:{tmp_path / 'none.yaml'}": "cannot be read",
        f"classifier:{tmp_path / 'eval_classifier.yaml'}": "unexpected keyword argument 'wieghts'",
        f"classifier:{tmp_path / 'list.yaml'}": "describes no classifier",
        "nowhere:Mine": "No module named 'nowhere'",
        "torchvision:squeezenet1_0:none.pth": "no such weights file",
        f"inception:{tmp_path / 'bad.pth'}": "a web page",
    }
    for name, message in wrong.items():
        with pytest.raises((ConfigurationError, CheckpointError), match=message):
            features_from_name(name)
    with pytest.raises(ValueError, match="squeezenet1_0 has no linear layer"):
        TorchvisionFeatures("squeezenet1_0", None)
