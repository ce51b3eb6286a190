"""Off-the-shelf classifiers: names, weights, preprocessing, smoothing and folding."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from calib_guidance.classifiers import NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.classifiers.smoothing import SmoothActivation, smooth_activations
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.networks import EncoderUNet, SmallResNet
from calib_guidance.tasks.base import tell_smoothing
from calib_guidance.weights.io import CheckpointError, load_weights, read_weights, save_weights
from tests.conftest import ROOT


class CountReLU(TorchFunctionMode):
    """Counts the ReLUs that run, as modules or as functions."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
        return func(*args, **(kwargs or {}))


def relus_run(model, x):
    with CountReLU() as counter, torch.no_grad():
        model.eval()(x)
    return counter.count


MODELS = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "densenet121", 64),
    ("torchvision", "googlenet", 64),
    ("torchvision", "squeezenet1_0", 64),
    ("torchvision", "shufflenet_v2_x0_5", 64),
    ("torchvision", "vgg11_bn", 32),
    ("timm", "resnet18", 64),
    ("timm", "regnetx_002", 64),
]


@pytest.mark.parametrize(("library", "name", "size"), MODELS)
def test_softplus_replaces_every_relu_that_runs(library, name, size):
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(name, num_classes=7)
    else:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=7, **options)
    x = torch.randn(1, 3, size, size)
    assert relus_run(model, x) > 0
    before = model(x)
    sharp, soft = smooth_activations(model, 1e4)(x), None
    assert relus_run(model, x) == 0
    torch.testing.assert_close(sharp, before, atol=1e-3, rtol=1e-2)  # β → ∞ is ReLU
    if library == "torchvision" and name == "resnet18":
        soft = smooth_activations(torchvision.models.resnet18(num_classes=7), 3.0)
        assert {type(m) for m in soft.modules() if isinstance(m, (nn.ReLU, SmoothActivation))} == {SmoothActivation}


@pytest.mark.parametrize("name", ["torchvision/densenet121", "torchvision/resnet18"])
def test_freezing_keeps_the_smoothing(name):
    classifier = OffTheShelfClassifier(name, 5, softplus_beta=3.0).freeze()
    assert relus_run(classifier, torch.randn(1, 3, 64, 64)) == 0


def test_other_activations_are_left_alone_unless_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.ReLU(), nn.ReLU6())
    smooth_activations(model, 3.0)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, SmoothActivation, nn.ReLU6]
    assert isinstance(smooth_activations(model, 3.0, ["ReLU", "ReLU6"])[3], SmoothActivation)


@pytest.mark.parametrize(
    ("beta", "activations", "message"),
    [
        (3.0, ["ReLU"], r"Sequential has Hardswish, SiLU, and activations: \['ReLU'\] names none of them"),
        (3.0, ["SiLU"], "'SiLU' cannot be smoothed.*known: ReLU, ReLU6.*smooth already.*has Hardswish, SiLU"),
        (3.0, ["relu6"], r"'relu6' cannot be smoothed.*known: ReLU, ReLU6"),
        (0.0, ["Hardswish"], "above 0"),
    ],
)
def test_what_cannot_be_smoothed_says_what_the_network_has(beta, activations, message):
    with pytest.raises(ValueError, match=message):
        smooth_activations(nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Hardswish()), beta, activations)


ACTIVATIONS = {
    "ReLU": (nn.ReLU(), lambda self, x: F.relu(x)),
    "ReLU6": (nn.ReLU6(), lambda self, x: F.relu6(input=x)),
    "LeakyReLU": (nn.LeakyReLU(0.2), lambda self, x: F.leaky_relu(x, 0.2)),
    "Hardtanh": (nn.Hardtanh(-2.0, 1.5), lambda self, x: F.hardtanh(x, -2.0, max_val=1.5)),
    "Hardsigmoid": (nn.Hardsigmoid(), lambda self, x: F.hardsigmoid(x)),
    "Hardswish": (nn.Hardswish(inplace=True), lambda self, x: F.hardswish(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("functional", [False, True])
def test_smoothed_activations_keep_bounds_and_become_the_original(name, functional):
    """Against the convolution of the original with the logistic density; that of ReLU is Softplus(β)."""
    module, function = ACTIVATIONS[name]
    calls = type("Calls", (nn.Module,), {"forward": function})
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    sharp, soft = (
        smooth_activations(calls() if functional else nn.Sequential(copy.deepcopy(module)), beta, [name])(x.clone())
        for beta in (1e4, 3.0)
    )
    plain = function(None, x)
    torch.testing.assert_close(sharp, plain, atol=1e-3, rtol=0)
    if name != "Hardswish":  # x·(a smoothed one) instead of the smoothed product
        z = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
        density = 3 / (2 * torch.cosh(1.5 * z)).square()
        expected = (function(None, x[:, None] + z) * density).sum(1) * (z[1] - z[0])
        torch.testing.assert_close(soft, expected, atol=1e-4, rtol=1e-4)
    assert (soft - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "activations"), [("mobilenet_v2", ["ReLU6"]), ("mobilenet_v3_small", ["ReLU", "Hardswish", "Hardsigmoid"])]
)
def test_mobile_networks_at_large_beta_are_the_original(name, activations):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    plain = OffTheShelfClassifier(f"torchvision/{name}", 5).eval()
    sharp, soft = (copy.deepcopy(plain), copy.deepcopy(plain))
    for classifier, beta in ((sharp, 1e4), (soft, 1.0)):
        smooth_activations(classifier.network, beta, activations)
        classifier.softplus_beta, classifier.activations = beta, tuple(activations)
        classifier.freeze()
    torch.testing.assert_close(sharp(x), plain(x), atol=1e-3, rtol=1e-2)
    found = soft.smoothing_change(x)
    before, after = plain(x).softmax(1), soft(x).softmax(1)
    distance = float((before - after).abs().sum(1).mean() / 2)
    assert found == pytest.approx((float((before.argmax(1) != after.argmax(1)).float().mean()), distance), abs=1e-4)
    assert sharp.smoothing_change(x) == pytest.approx((0, 0), abs=1e-3)


@pytest.mark.parametrize("name", ["torchvision/densenet121", "torchvision/resnet18"])
def test_smoothing_change_compares_with_the_network_as_it_came(name):
    """Functions and modules, folded for inference or not."""
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3, 64, 64), OffTheShelfClassifier(name, 5).eval()
    expected = plain(x).softmax(1)
    smooth = copy.deepcopy(plain)
    smooth_activations(smooth.network, 1.0)
    smooth.softplus_beta = 1.0
    for classifier in (smooth, copy.deepcopy(smooth).freeze()):
        distance = (classifier(x).softmax(1) - expected).abs().sum(1).mean() / 2
        assert classifier.smoothing_change(x)[1] == pytest.approx(float(distance), abs=1e-4)
        assert distance > 1e-3


def test_gross_smoothing_is_warned_of_and_slight_told(monkeypatch):
    class Threshold(nn.Module):
        """Class 1 where x > 0; Softplus(0.01) puts every image there."""

        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return torch.stack([torch.full((len(x),), 1.0), self.act(x.flatten(1).mean(1))], 1)

    images = torch.linspace(-1, -0.1, 8)[:, None, None, None].expand(8, 3, 4, 4)
    gross = OffTheShelfClassifier(Threshold(), 2, softplus_beta=0.01).freeze()
    with pytest.warns(
        UserWarning, match=r"softplus_beta 0.01 in place of ReLU changes .* Threshold .* 100% of the first 8 .*raise"
    ):
        tell_smoothing(gross, images)
    slight = OffTheShelfClassifier(Threshold(), 2, softplus_beta=50.0).freeze()
    told = []
    monkeypatch.setattr("calib_guidance.tasks.base.rank_zero_info", told.append)
    tell_smoothing(nn.Sequential(slight), images)
    assert "0% of the first 8 images, and its probabilities by 0.00" in told[0]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_freezing_folds_batch_norm_and_changes_no_output(name):
    torch.manual_seed(0)
    classifier = OffTheShelfClassifier(name, 5, resize=224 if "vit" in name else None)
    for module in classifier.modules():  # statistics that folding must not ignore
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    before = classifier.eval()(x)
    (expected,) = torch.autograd.grad(before[:, 0].sum(), x)
    classifier.freeze()
    after = classifier(x)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    (gradient,) = torch.autograd.grad(after[:, 0].sum(), x)
    torch.testing.assert_close(gradient, expected, atol=2e-4, rtol=1e-3)
    assert not any(p.requires_grad for p in classifier.parameters())
    if name == "torchvision/resnet18":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())


def test_normalization_and_resize_are_what_torchvision_does():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 48, 48)
    expected = v2.functional.resize(image, [32, 32], antialias=True)
    expected = v2.functional.normalize(expected, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    classifier = OffTheShelfClassifier(nn.Flatten(), 5, normalize="imagenet", resize=32)
    torch.testing.assert_close(classifier(image * 2 - 1), expected.flatten(1), atol=1e-5, rtol=1e-5)
    raw = OffTheShelfClassifier(nn.Flatten(), 5)
    torch.testing.assert_close(raw(image), image.flatten(1))


def test_wrong_names_and_values_say_what_is_allowed():
    with pytest.raises(ValueError, match="torchvision/NAME or timm/NAME"):
        OffTheShelfClassifier("resnet50")
    with pytest.raises(ValueError, match="known: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, or a local file"):
        OffTheShelfClassifier("torchvision/resnet50", weights="V3")
    with pytest.raises(ValueError, match="known: pretrained, or a local file"):
        OffTheShelfClassifier("timm/resnet18", weights="IMAGENET1K_V2")
    with pytest.raises(ValueError, match="known: none, imagenet"):
        OffTheShelfClassifier(nn.Identity(), normalize="auto")
    with pytest.raises(ValueError, match="resize"):
        OffTheShelfClassifier(nn.Identity(), resize=0)
    with pytest.raises(ValueError, match="needs the step t"):
        NoiseAwareClassifier(EncoderUNet(8, 1, 32, 10, 1, channel_mult=(1,), num_head_channels=32))(
            torch.zeros(1, 1, 8, 8)
        )


class TestWeights:
    def test_every_format_gives_the_same_network(self, tmp_path):
        torch.manual_seed(0)
        network = SmallResNet()
        save_weights(network, tmp_path / "a.safetensors")
        torch.save(network.state_dict(), tmp_path / "b.pt")
        torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "c.pth")
        torch.save({"model": network.state_dict()}, tmp_path / "d.pth")
        x = torch.randn(2, 1, 8, 8)
        for name in ("a.safetensors", "b.pt", "c.pth", "d.pth"):
            other = SmallResNet()
            load_weights(other, tmp_path / name)
            torch.testing.assert_close(other.eval()(x), network.eval()(x), atol=0, rtol=0)

    def test_a_named_network_reads_a_local_file(self, tmp_path):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=4)
        torch.save(network.state_dict(), tmp_path / "resnet18.pth")
        x = torch.randn(1, 3, 32, 32)
        classifier = OffTheShelfClassifier("torchvision/resnet18", 4, weights=str(tmp_path / "resnet18.pth"))
        torch.testing.assert_close(classifier.eval()(x), network.eval()(x))

    def test_missing_file_and_wrong_architecture_name_the_cause(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nothing\.pt: no such weights file"):
            read_weights(tmp_path / "nothing.pt")
        save_weights(SmallResNet(widths=(32, 64)), tmp_path / "small.safetensors")
        with pytest.raises(CheckpointError, match=r"missing: stages\.2.*of another shape: "):
            load_weights(SmallResNet(widths=(32, 48, 64)), tmp_path / "small.safetensors")
        save_weights(SmallResNet(blocks=2), tmp_path / "deep.safetensors")
        with pytest.raises(CheckpointError, match=r"unexpected: .*stages"):
            load_weights(SmallResNet(), tmp_path / "deep.safetensors")

    def test_truncated_and_malicious_files_are_refused(self, tmp_path):
        complete = tmp_path / "complete.safetensors"
        save_weights(SmallResNet(), complete)
        (tmp_path / "cut.safetensors").write_bytes(complete.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            read_weights(tmp_path / "cut.safetensors")

        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(CheckpointError, match="without executing code"):
            read_weights(tmp_path / "evil.pt")
        assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("kind", "option", "value", "allowed"),
    [
        (OffTheShelfClassifier, "normalize", "cifar", "'none', 'imagenet'"),
        (OffTheShelfClassifier, "dtype", "half", "'float32', 'float16', 'bfloat16', 'auto'"),
        (ADMDenoiser, "noise_schedule", "sqrt", "'linear', 'cosine'"),
        (ADMDenoiser, "prediction", "score", "'epsilon', 'v', 'x0'"),
    ],
)
def test_the_command_line_lists_the_values_of_an_option(kind, option, value, allowed):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "part")
    with pytest.raises(ArgumentError, match=rf"(?s)part\.{option}.*{allowed}.*{value}"):
        parser.parse_args([f"--part.{option}={value}"])


class Headless(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class TestNumberOfClasses:
    """Read from the network or its weights; what is stated beside it must agree."""

    @pytest.mark.parametrize("name", ["squeezenet1_0", "densenet121", "vit_b_16", "resnet18"])
    def test_of_a_named_network(self, name):
        with torch.device("meta"):
            assert OffTheShelfClassifier(f"torchvision/{name}").num_classes == 1000

    @pytest.mark.parametrize("library", ["torchvision", "timm"])
    def test_of_a_weights_file(self, tmp_path, library):
        """By its last layer, or as the file states; 7 of them."""
        name = f"{library}/resnet18"
        make = (
            torchvision.models.resnet18 if library == "torchvision" else lambda **k: timm.create_model("resnet18", **k)
        )
        torch.save(make(num_classes=7).state_dict(), tmp_path / "theirs.pth")
        classifier = OffTheShelfClassifier(name, weights=str(tmp_path / "theirs.pth"))
        assert classifier.num_classes == 7
        assert classifier.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
        file = str(tmp_path / "ours.safetensors")
        save_weights(classifier.network, file, **classifier.weights_metadata)
        assert OffTheShelfClassifier(name, weights=file).num_classes == 7
        with pytest.raises(CheckpointError, match="trained with num_classes: 7, the configuration says num_classes: 8"):
            OffTheShelfClassifier(name, 8, file)

    def test_of_a_module(self):
        assert OffTheShelfClassifier(SmallResNet(4)).num_classes == 4
        assert OffTheShelfClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 5))).num_classes == 5
        assert OffTheShelfClassifier(Headless(), 3).num_classes == 3
        with pytest.raises(ValueError, match="num_classes is 11, but SmallResNet has 4: omit num_classes"):
            OffTheShelfClassifier(SmallResNet(4), 11)
        with pytest.raises(ValueError, match="Headless does not show how many classes it has: state num_classes"):
            OffTheShelfClassifier(Headless())


@pytest.mark.parametrize("name", ["classifier", "eval_classifier", "noise_aware"])
def test_shipped_classifiers_state_what_they_are(name):
    with safe_open(ROOT / f"checkpoints/digits/{name}.safetensors", "pt") as file:
        stated = file.metadata()
    assert stated["architecture"] == ("EncoderUNet" if name == "noise_aware" else "SmallResNet")
    assert stated["num_classes"] == "10"
    assert name == "noise_aware" or (stated["normalize"], stated["resize"]) == ("none", "None")
