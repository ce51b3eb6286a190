"""Post-hoc averages of weights: EDM2's own numbers, and a training whose every step is known."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from calib_guidance.callbacks import PostHocEMA
from calib_guidance.cli import main
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.training.ema import (
    coefficients,
    decay,
    exponent_of_std,
    find_snapshots,
    gram_matrix,
    reconstruct,
    std_of_exponent,
)
from calib_guidance.weights.io import read_weights, save_weights


@pytest.fixture
def fixture(golden):
    from safetensors.torch import load_file

    from tests.conftest import PARITY

    return {name: value.numpy() for name, value in load_file(PARITY / "edm2_ema.safetensors").items()}


def test_exponents_and_lengths(fixture):
    found = np.array([exponent_of_std(std) for std in fixture["std"]])
    np.testing.assert_allclose(found, fixture["exponent"], rtol=1e-10)
    np.testing.assert_allclose([std_of_exponent(e) for e in fixture["exponent"]], fixture["std_back"], rtol=1e-12)
    assert exponent_of_std(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent_of_std(0.10) == pytest.approx(6.94, abs=0.01)
    for std in (0.0, 0.29):
        with pytest.raises(ValueError, match=r"below 0\.289"):
            exponent_of_std(std)


def test_decays(fixture):
    for row, std in zip(fixture["beta"], (0.05, 0.10), strict=True):
        found = [decay(std, 2048 * (i + 1), 2048) for i in range(len(row))]
        match = min(np.abs(np.array(found) - row).max(), np.abs(np.array(found[:-1]) - row[1:]).max())
        assert match < 1e-14
        assert found[0] == 0


def test_coefficients(fixture):
    stds, images = fixture["in_std"], fixture["in_images"]
    np.testing.assert_allclose(gram_matrix(stds, images), fixture["gram"], rtol=1e-12)
    for column, std in enumerate(fixture["out_std"]):
        found = coefficients(stds, images, std)
        np.testing.assert_allclose(found, fixture["coefficients"][:, column], rtol=1e-6, atol=1e-9)
        early = coefficients(stds, images, std, images[9])
        np.testing.assert_allclose(early[:10], fixture["coefficients_early"][:, column], rtol=1e-6, atol=1e-9)
        assert (early[10:] == 0).all()
    # A length that is there needs no other.
    there = coefficients(stds, images, 0.10)
    np.testing.assert_allclose(there, (stds == 0.10) & (images == images.max()), atol=1e-8)
    with pytest.raises(ValueError, match="no snapshot at 5 images"):
        coefficients(stds, images, 0.1, 5)


class Walk(L.LightningModule):
    """A random walk in place of a training: the weights at every step are known."""

    def __init__(self, steps):
        super().__init__()
        self.network = nn.Module()
        self.network.weight = nn.Parameter(torch.zeros(4))
        self.network.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.weights_metadata = {"prediction": "velocity"}
        self.path = torch.randn(steps, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.network.weight.copy_(self.path[self.global_step])
            self.network.count.add_(1)
        return 0 * self.network.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(tmp_path, callback, steps, ckpt_path=None, **options):
    module = Walk(400)
    data = DataLoader([{"image": torch.zeros(1)}] * 3200, batch_size=8)
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_steps=steps, default_root_dir=tmp_path, callbacks=[callback], enable_checkpointing=False, **options
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


def average(path, std):
    """Profile t^γ over steps, in closed form, as tracking discretizes it."""
    gamma, n = exponent_of_std(std), len(path)
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    return torch.from_numpy(np.diff(edges)) @ path.double()


def test_any_length_after_training(tmp_path, capsys):
    """Snapshots of 0.05 and 0.10 give what tracking that length would have given."""
    module, _ = fit(tmp_path, PostHocEMA(every_n_images=8 * 25), 400)
    snapshots = find_snapshots(tmp_path / "ema")
    assert len(snapshots) == 2 * 16
    assert snapshots[-1].images == 3200
    path = module.path
    for std in (0.05, 0.1):
        (last,) = [s for s in snapshots if s.images == 3200 and s.std == std]
        read = read_weights(last.path)
        torch.testing.assert_close(read.state["weight"].double(), average(path, std), atol=2e-2, rtol=2e-3)
        assert read.state["weight"].dtype == torch.float16
        assert read.metadata["prediction"] == "velocity"
    for std in (0.07, 0.15):
        state, metadata = reconstruct(snapshots, std)
        torch.testing.assert_close(state["weight"].double(), average(path, std), atol=0.1, rtol=0.02)
        assert state["weight"].dtype == torch.float32
        assert state["count"] == 400
        assert metadata["prediction"] == "velocity"
        wrong = average(path, 0.1)
        assert (state["weight"] - wrong).abs().max() > 0.2
    early, _ = reconstruct(snapshots, 0.07, 1600)
    torch.testing.assert_close(early["weight"].double(), average(path[:200], 0.07), atol=0.1, rtol=0.02)
    output = tmp_path / "network.safetensors"
    main(["ema", str(tmp_path / "ema"), "--std", "0.07", "--output", str(output)])
    assert "length 0.07 at 3200 images, from 32 snapshots" in capsys.readouterr().out
    assert torch.equal(read_weights(output).state["weight"], reconstruct(snapshots, 0.07)[0]["weight"])
    other = tmp_path / "other.safetensors"
    found = read_weights(output).state
    save_weights({"weight": found["weight"] / 1.25, "count": found["count"]}, other)
    main(["ema", str(tmp_path / "ema"), "--std", "0.07", "--output", str(output), "--compare", str(other)])
    assert f"relative difference to {other}: 2.50e-01" in capsys.readouterr().out
    save_weights({"weight": torch.ones(3)}, other)
    with pytest.raises(SystemExit):
        main(["ema", str(tmp_path / "ema"), "--std", "0.07", "--output", str(output), "--compare", str(other)])
    assert "has other names or shapes than the snapshots" in capsys.readouterr().err
    main(["ema", str(tmp_path / "ema"), "--std", "0.01", "--output", str(output), "--half"])
    assert "not reliable" in capsys.readouterr().out
    assert read_weights(output).state["weight"].dtype == torch.float16


def test_a_resumed_training_has_the_same_averages(tmp_path):
    complete, first = PostHocEMA(every_n_images=800), PostHocEMA(every_n_images=800)
    fit(tmp_path / "complete", complete, 60)
    _, trainer = fit(tmp_path / "parts", first, 25)
    trainer.save_checkpoint(tmp_path / "at25.ckpt")
    second = PostHocEMA(every_n_images=800)
    fit(tmp_path / "parts", second, 60, str(tmp_path / "at25.ckpt"))
    assert second.images == complete.images == 480
    for std, state in complete.averages.items():
        torch.testing.assert_close(second.averages[std]["weight"], state["weight"], atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigurationError, match=r"lengths 0\.05, 0\.1, the configuration"):
        PostHocEMA(stds=[0.07]).load_state_dict(second.state_dict())


def test_accumulated_batches_count_once(tmp_path):
    callback = PostHocEMA(every_n_images=10_000)
    module, _ = fit(tmp_path, callback, 10, accumulate_grad_batches=4)
    assert callback.images == 320
    assert len(find_snapshots(tmp_path / "ema")) == 2  # at the end
    torch.testing.assert_close(callback.averages["0.1"]["weight"].double(), average(module.path[:10], 0.1))


def test_what_cannot_be_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="no snapshots, which the callback PostHocEMA writes"):
        find_snapshots(tmp_path)
    with pytest.raises(ConfigurationError, match="below trainer.default_root_dir"):
        PostHocEMA(folder="../elsewhere")
    with pytest.raises(ConfigurationError, match="every_n_images"):
        PostHocEMA(every_n_images=0)
    for number, size in ((8, 2), (16, 3)):
        save_weights({"weight": torch.zeros(size)}, tmp_path / f"{number}.safetensors", ema_std=0.1, ema_images=number)
    with pytest.raises(CheckpointError, match="other names or shapes"):
        reconstruct(find_snapshots(tmp_path), 0.05)
    with pytest.raises(SystemExit):
        main(["ema", str(tmp_path), "--std", "0.4", "--output", str(tmp_path / "out.safetensors")])
