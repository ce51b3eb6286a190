"""What makes ``fit`` fast changes neither names nor numbers, and no training step waits for the device."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from calib_guidance.callbacks import ExactResume
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.data import DigitImages, Digits
from calib_guidance.data.loading import collate
from calib_guidance.networks import SmallResNet, UNet
from calib_guidance.tasks import CalibrateClassifier, TrainDiffusion
from calib_guidance.training import CleanInput, DenoisedInput, NoisyInput
from tests.digits import digits_denoiser


def resnet():
    return OffTheShelfClassifier(SmallResNet(widths=(8, 8, 8), blocks=1), 10)


def unet(variance_channels=1):
    return UNet(8, 1, 32, 1 + variance_channels, 1, (), channel_mult=(1,), num_classes=10, num_heads=1)


NOISINGS = {
    "clean": CleanInput,
    "noisy": NoisyInput,
    "denoised online": lambda: DenoisedInput(digits_denoiser(), "100"),
}
MODULES = {
    **{
        f"{name}, {form}": lambda build=build, form=form: CalibrateClassifier(
            resnet(), build(), smooth_ece_weight=1.0, smooth_ece_form=form
        )
        for name, build in NOISINGS.items()
        for form in ("per_sample", "binned")
    },
    "diffusion": lambda: TrainDiffusion(unet()),
    "diffusion of fixed variance": lambda: TrainDiffusion(unet(0), variance="fixed"),
}


class NoReads(TorchDispatchMode):
    """Numbers that the host reads are an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host reads a number")
        return func(*args, **(kwargs or {}))


class Watched(L.Callback):
    """From the transfer of a batch to the end of its training step, with logging, the host reads nothing."""

    def __init__(self):
        self.steps = 0

    def setup(self, trainer, pl_module, stage):
        for owner, name in ((pl_module, "training_step"), (trainer.datamodule, "on_after_batch_transfer")):
            setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function):
        def run(*args, **kwargs):
            with NoReads():
                self.steps += 1
                return function(*args, **kwargs)

        return run


def trainer(folder, *callbacks, **options):
    made = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        limit_val_batches=0,
        **options,
    )
    made.callbacks.append(ExactResume())
    return made


@pytest.mark.parametrize("name", MODULES)
def test_no_training_step_reads_a_number(in_root, tmp_path, name):
    watched = Watched()
    data = Digits(batch_size=20, rotate=10.0, shift=0.1, seed=0)
    trainer(tmp_path, watched, max_steps=2, enable_checkpointing=False).fit(MODULES[name](), datamodule=data)
    assert watched.steps == 4
    with pytest.raises(AssertionError, match="the host reads"), NoReads():
        torch.ones(1).item()


@pytest.mark.parametrize("name", MODULES)
def test_no_training_step_asks_for_data_that_is_not_there(in_root, name):
    """On the meta device there are no numbers: reading any of them, as a list or an array too, is an error."""
    torch.manual_seed(0)
    batch = collate([DigitImages()[i] for i in range(20)])
    module = MODULES[name]().to("meta")
    loss = module.training_step({key: column.to("meta") for key, column in batch.items()}, 0)
    assert loss.shape == ()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.tolist()


class Deep(nn.Module):
    """A classifier network with dropout; the compiled one draws its own numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


def test_a_compiled_run_that_resumes_ends_where_the_uninterrupted_one_does(tmp_path):
    """Bit for bit, and with the names that a run without compiling gives its weights."""

    def fit(**options):
        torch.manual_seed(0)
        module = CalibrateClassifier(
            OffTheShelfClassifier(Deep(), 10), NoisyInput(), smooth_ece_weight=1.0, compile=True
        )
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        data = Digits(batch_size=300, rotate=10.0, seed=0)  # 4 steps an epoch
        trainer(tmp_path, keep, max_steps=6).fit(module, datamodule=data, **options)
        return module.state_dict()

    expected = fit()
    third = tmp_path / "step=3.ckpt"
    saved = torch.load(third, weights_only=False)["state_dict"]
    found = fit(ckpt_path=third)
    plain = CalibrateClassifier(OffTheShelfClassifier(Deep(), 10), NoisyInput())
    assert list(saved) == list(found) == list(plain.state_dict())
    assert not torch.equal(found["classifier.network.layers.1.weight"], saved["classifier.network.layers.1.weight"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0, msg=name)


def test_a_compiled_diffusion_model_computes_the_same_loss(monkeypatch):
    """With the compiler's front alone: its kernels are those of the networks, tested there."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    network = unet()
    plain = TrainDiffusion(network)
    names = list(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=generator)
    y, t = torch.arange(4), torch.tensor([0, 10, 500, 999])
    expected = plain.loss(x0, y, t, noise)
    compiled = TrainDiffusion(network, compile=True)
    torch.testing.assert_close(compiled.loss(x0, y, t, noise), expected, atol=1e-4, rtol=1e-4)
    assert list(compiled.state_dict()) == names
    assert network._compiled_call_impl is not None


@pytest.mark.parametrize(("chosen", "found"), [(None, False), (True, True), (False, False)])
def test_weights_are_laid_out_as_the_device_wants_them(in_root, tmp_path, chosen, found):
    """Left open, a CPU keeps them as they are."""
    module = CalibrateClassifier(resnet(), CleanInput(), channels_last=chosen)
    trainer(tmp_path, max_steps=1, enable_checkpointing=False).fit(module, datamodule=Digits(batch_size=20, seed=0))
    weight = next(p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == found


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_the_frozen_network_computes_in_bf16_unless_told_otherwise(in_root, precision, dtype):
    """Its convolutions; what the classifier gets, and the classifier's own, stay float32."""
    input_transform = DenoisedInput(digits_denoiser(), "100", **({} if precision is None else {"precision": precision}))
    module, seen = CalibrateClassifier(resnet(), input_transform), {"frozen": set(), "trained": set()}

    def note(where):
        return lambda layer, inputs, output: seen[where].add(output.dtype)

    for where, network in (("frozen", input_transform.denoiser), ("trained", module.classifier)):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(note(where))
    torch.manual_seed(0)
    module.training_step(collate([DigitImages()[i] for i in range(8)]), 0)
    assert seen == {"frozen": {dtype}, "trained": {torch.float32}}
