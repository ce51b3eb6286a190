"""Training modules: losses, label dropout and refusals."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib_guidance.classifiers import Ensemble, NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.data import DigitImages, Digits, SampleRequests, digits
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.errors import CheckpointError
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import EncoderUNet, SmallResNet, UNet
from calib_guidance.samplers import DDPM
from calib_guidance.tasks import CalibrateClassifier, GuidedSampling, TrainDiffusion
from calib_guidance.training import WarmupCosine, smooth_ece
from calib_guidance.weights.io import read_weights, save_weights
from tests.conftest import ROOT
from tests.digits import digits_unet


class Oracle(nn.Module):
    """Answers with the target that it was told, and the smallest variance."""

    num_classes = 10

    def __init__(self, learned):
        super().__init__()
        self.learned, self.labels = learned, []

    def forward(self, x, t, y):
        self.labels.append(y)
        return torch.cat([self.answer, -torch.ones_like(self.answer)], dim=1) if self.learned else self.answer


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_the_loss_of_a_perfect_prediction_is_nought(prediction, variance):
    """The posterior's own mean and variance leave no divergence either."""
    x0, y = (part[:4] for part in digits("train"))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 300, 600, 900])
    network = Oracle(variance == "learned_range")
    module = TrainDiffusion(network, "cosine", prediction=prediction, variance=variance)
    abar = torch.tensor(NoiseSchedule(named_betas("cosine")).alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    network.answer = {"epsilon": noise, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0, "x0": x0}[prediction]
    assert module.loss(x0, y, t, noise).abs().max() < 1e-3
    wrong = network.answer + 0.5
    network.answer = wrong
    loss = module.loss(x0, y, t, noise)
    assert (loss >= 0.25 - 1e-4).all()
    if variance == "learned_range":
        assert (loss > 0.25 + 1e-6).all()


def test_label_dropout_hides_labels():
    for share, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.5, 150, 250)):
        torch.manual_seed(0)
        network = Oracle(learned=False)
        module = TrainDiffusion(network, variance="fixed", label_dropout=share)
        module.log = lambda *a, **k: None
        x0, y = (part[:400] for part in digits("train"))
        network.answer = torch.zeros_like(x0)
        module.training_step({"image": x0, "label": y}, 0)
        (seen,) = network.labels
        assert low <= int((seen == -1).sum()) <= high
        assert torch.equal(seen[seen >= 0], y[seen >= 0])


def test_the_objective_is_cross_entropy_and_smooth_ece():
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 10
    classifier = OffTheShelfClassifier(SmallResNet(), 10)
    plain = CalibrateClassifier(classifier, label_smoothing=0.1)
    torch.testing.assert_close(plain.loss(logits, y), F.cross_entropy(logits, y, label_smoothing=0.1))
    both = CalibrateClassifier(classifier, smooth_ece_weight=0.7, smooth_ece_beta=0.05)
    torch.testing.assert_close(both.loss(logits, y), F.cross_entropy(logits, y) + 0.7 * smooth_ece(logits, y, 0.05))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smooth_ece_weight": -1.0}, "must be at least 0"),
        ({"smooth_ece_beta": 0.0}, "must be above 0"),
        ({"label_smoothing": 2.0}, r"lie in \[0, 1\]"),
    ],
)
def test_calibration_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibrateClassifier(OffTheShelfClassifier(SmallResNet(), 10), **arguments)


@pytest.mark.parametrize("task", ["classifier", "diffusion"])
def test_a_schedule_without_a_length_takes_that_of_the_run(task):
    def schedule(optimizer):
        return WarmupCosine(optimizer, warmup_steps=1)

    classifier = OffTheShelfClassifier(SmallResNet(), 10)
    if task == "classifier":
        module = CalibrateClassifier(classifier, lr_scheduler=schedule)
    else:
        module = TrainDiffusion(classifier.network, lr_scheduler=schedule)
    module._trainer = SimpleNamespace(estimated_stepping_batches=7)
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    module.lr_schedulers = lambda: scheduler
    module.on_train_start()
    assert scheduler.total_steps == 7


def test_diffusion_starts_from_weights_that_were_made_as_it_will_train(tmp_path):
    file = ROOT / "checkpoints/digits/diffusion.safetensors"
    rounded = tmp_path / "rounded.safetensors"
    shipped = read_weights(file)
    save_weights({name: value.half() for name, value in shipped.state.items()}, rounded, **shipped.metadata)

    network = digits_unet()
    TrainDiffusion(network, "cosine", prediction="v", checkpoint=rounded)
    for name, value in network.state_dict().items():
        assert torch.equal(value, shipped.state[name].half().float())
    with pytest.raises(
        CheckpointError, match="was trained with prediction: v, the configuration says prediction: epsilon"
    ):
        TrainDiffusion(digits_unet(), "cosine", prediction="epsilon", checkpoint=rounded)


def test_diffusion_refuses():
    with pytest.raises(ValueError, match="known: epsilon, v, x0"):
        TrainDiffusion(Oracle(False), prediction="noise")
    with pytest.raises(ValueError, match="known: fixed, learned_range"):
        TrainDiffusion(Oracle(False), variance="learned")
    with pytest.raises(ValueError, match=r"label_dropout must lie in \[0, 1\]"):
        TrainDiffusion(Oracle(False), label_dropout=1.5)


FIRST = [-218, -199, -168]


class TestDigits:
    def test_the_split_is_fixed_and_nothing_is_in_both_parts(self):
        train, heldout = digits("train"), digits("heldout")
        assert [len(p[0]) for p in (train, heldout)] == [1297, 500]
        assert heldout[1].bincount().tolist() == [50] * 10
        both = torch.cat([train[0], heldout[0]])
        assert both.min() == -1
        assert both.max() == 1
        assert len(both.flatten(1).unique(dim=0)) == len(both)  # no image occurs twice, so none can be in both parts
        # The first pixels of the first held-out images: another split would change them on any machine.
        assert (heldout[0][:3].sum((1, 2, 3)) * 8).round().int().tolist() == FIRST
        with pytest.raises(ValueError, match="known: train, heldout"):
            digits("test")

    def test_loaders(self):
        data = Digits(batch_size=64)
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (64, 1, 8, 8)
        images, labels = digits("train")
        assert torch.equal(batch["image"], images[batch["index"]])
        assert torch.equal(batch["label"], labels[batch["index"]])
        assert torch.cat([b["index"] for b in data.val_dataloader()]).tolist() == list(range(500))
        assert len(DigitImages("train")) == 1297


def test_shipped_classifiers_do_what_they_are_for(in_root):
    """The off-the-shelf one knows clean digits, the noise-aware one noisy ones, and the evaluation classifier is right."""
    images, y = digits("heldout")

    def accuracy(classifier, x, t=None):
        with torch.no_grad():
            return float((classifier.freeze()(x, t).argmax(1) == y).float().mean())

    guide = OffTheShelfClassifier(SmallResNet(), 10, "checkpoints/digits/classifier.safetensors")
    eval_classifier = OffTheShelfClassifier(
        SmallResNet(widths=(48, 96, 48), blocks=2), 10, "checkpoints/digits/eval_classifier.safetensors"
    )
    network = EncoderUNet(8, 1, 32, 10, 1, (2,), channel_mult=(1, 2), num_head_channels=32)
    aware = NoiseAwareClassifier(network, "checkpoints/digits/noise_aware.safetensors")
    assert accuracy(guide, images) > 0.97
    assert accuracy(eval_classifier, images) > 0.99
    generator = torch.Generator().manual_seed(0)
    t = torch.full((500,), 400)
    abar = NoiseSchedule(named_betas("cosine")).alphas_cumprod[400]
    noisy = abar**0.5 * images + (1 - abar) ** 0.5 * torch.randn(images.shape, generator=generator)
    assert accuracy(aware, noisy, t) > accuracy(guide, noisy) + 0.05


@pytest.mark.parametrize("steps", [100, 4000])
def test_temperatures_by_level_belong_to_the_denoisers_process(steps):
    """Ranges of t in 1,000 steps would give every t of 100 one temperature, and of 4,000 none."""
    network = UNet(8, 1, 32, 1, num_res_blocks=1, channel_mult=(1,), num_classes=3)
    denoiser = ADMDenoiser(network, num_steps=steps)
    options = {"temperature": [1.0, 2.0, 4.0], "num_classes": 3}
    problems, tempered = {}, {}
    for num_steps in (1000, steps):
        classifier = OffTheShelfClassifier(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), num_steps=num_steps, **options
        )
        module = GuidedSampling(denoiser, DDPM("4"), ClassifierGuidance(Ensemble([classifier, classifier])))
        module.trainer = L.Trainer(accelerator="cpu", logger=False, inference_mode=False)
        module.trainer.datamodule = SampleRequests(1, 3)
        problems[num_steps], tempered[num_steps] = list(module.problems()), classifier
    assert problems[steps] == []
    (message,) = problems[1000]
    assert re.search(f"of 1000 steps, and the denoiser's has {steps}: fit the temperatures for this process", message)
    t = torch.tensor([0, steps // 2, steps - 1])
    torch.testing.assert_close(tempered[steps].temper(torch.ones(3, 1), t), torch.tensor([[1.0], [0.5], [0.25]]))
    assert tempered[steps].weights_metadata["num_steps"] == steps
