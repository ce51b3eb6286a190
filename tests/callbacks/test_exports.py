"""What ``fit`` exports and what it does not write: NaN, bounds of temperatures, fast_dev_run, paths."""

import json
import logging
import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch.utils.data import DataLoader

from calib_guidance.callbacks import ExportClassifier, ExportWeights
from calib_guidance.classifiers import fit_temperature
from calib_guidance.errors import CheckpointError, ConfigurationError
from calib_guidance.tasks import TrainDiffusion
from calib_guidance.weights.io import in_half, read_weights
from tests.conftest import ROOT
from tests.tasks.test_calibrate_classifier import fit


class NaNWeight(L.Callback):
    """Makes a weight NaN before the validation at a step, and puts it back."""

    def __init__(self, step: int):
        self.step = step

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step:
            bias = pl_module.classifier.network.fc.bias
            self.kept = bias.detach().clone()
            bias.data[3] = math.nan

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            pl_module.classifier.network.fc.bias.data.copy_(self.kept)


class TestNaN:
    @pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
    @pytest.mark.parametrize("scores", [[math.nan, 2.0, 1.0], [2.0, math.nan, 1.0, 1.5, math.nan, 0.5]])
    def test_it_never_counts_as_best(self, mode, sign, scores, caplog):
        callback, best = ExportClassifier(mode=mode), math.inf
        for step, score in enumerate(scores):
            trainer = SimpleNamespace(callback_metrics={"val/nll": torch.tensor(sign * score)}, global_step=step)
            assert callback._improved(trainer) == (score < best)
            best = score if score < best else best
            callback.load_state_dict(json.loads(json.dumps(callback.state_dict())))  # a resumed run
        assert f"val/nll is NaN after step {scores.index(math.nan)}" in caplog.text
        callback.load_state_dict({"best": math.nan})  # of a checkpoint that an older version wrote
        assert callback._improved(SimpleNamespace(callback_metrics={"val/nll": torch.tensor(1.0)}, global_step=9))

    @pytest.mark.parametrize("monitor", [None, "val/nll"])
    def test_the_classifier_before_and_after_is_exported(self, in_root, tmp_path, caplog, monitor, capsys):
        nan = {"class_path": f"{__name__}.NaNWeight", "init_args": {"step": 16}}
        with caplog.at_level(logging.WARNING):
            fit(tmp_path, trainer={"max_epochs": 3}, export={"monitor": monitor}, callbacks=[nan])
        exported = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote") and ".yaml" in line
        ]
        assert ["step 8" in exported[0], "step 24" in exported[1], len(exported)] == [True, True, 2]
        assert "fc.bias is not finite after step 16" in caplog.text

    def test_a_row_is_omitted_from_the_temperature(self):
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(200, 5, generator=generator)
        y = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
        level = torch.arange(200) % 2
        expected = fit_temperature(logits[2:], y[2:], level[2:], 2)
        logits[0], logits[1, 2] = math.nan, math.inf
        torch.testing.assert_close(fit_temperature(logits, y, level, 2), expected, rtol=0, atol=0)
        assert expected.isfinite().all()


class TestStepsAfterTheLastValidation:
    """An epoch has eight steps here, and a validation at its end."""

    def test_are_named(self, in_root, tmp_path, caplog):
        fit(tmp_path, trainer={"max_epochs": -1, "max_steps": 11})
        assert "steps up to 11 after the validation at step 8 are not in" in caplog.text
        assert "let training end with a validation (trainer.max_steps" in caplog.text

    def test_there_are_none_also_after_a_resume(self, in_root, tmp_path, caplog):
        fit(tmp_path, trainer={"max_epochs": 1})
        fit(tmp_path, "--ckpt_path=last", trainer={"max_epochs": 1})
        assert "are not in" not in caplog.text

    def test_without_a_validation_nothing_is_exported(self, in_root, tmp_path, caplog):
        fit(tmp_path, trainer={"max_epochs": 1, "limit_val_batches": 0})
        assert "steps up to 8 without any validation are not in" in caplog.text
        assert not (tmp_path / "classifier.safetensors").exists()


class TestTemperatureReport:
    @pytest.fixture
    def seen(self):
        """Logits of two levels, and a third in which every prediction is right."""
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(300, 5, generator=generator)
        level = torch.arange(300) % 3
        y = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
        y[level == 2] = logits[level == 2].argmax(1)
        return {"logits": logits, "label": y, "level": level}

    def test_before_and_after_and_bounds(self, seen, capsys, caplog):
        callback = ExportClassifier(temperature="by_level")
        callback._seen = [{k: v[:100] for k, v in seen.items()}, {k: v[100:] for k, v in seen.items()}]
        strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda sums, reduce_op: sums)
        module = SimpleNamespace(classifier=SimpleNamespace(num_classes=5), num_levels=3, level_range="level {}".format)
        found = callback._fit_temperature(SimpleNamespace(strategy=strategy, is_global_zero=True), module)
        assert found[2] == 0.05
        assert "the temperature of t = level 2 is at a bound (0.05 or 20)" in caplog.text
        lines = capsys.readouterr().out.splitlines()[2:]
        for k, line in enumerate(lines[:2]):
            x, y = (seen[key][seen["level"] == k].double().numpy() for key in ("logits", "label"))

            def nll(t, x=x, y=y):
                return -log_softmax(x / t, axis=1)[np.arange(len(y)), y.astype(int)].mean()

            def ece(t, x=x, y=y):
                p = np.exp(log_softmax(x / t, axis=1))
                confidence, right = p.max(1), p.argmax(1) == y
                edges = np.ceil(confidence * 15)
                return sum(abs((right - confidence)[edges == b].sum()) for b in range(1, 16)) / len(y)

            best = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
            expected = [best, nll(1), nll(best), ece(1), ece(best)]
            assert [float(cell) for cell in line.split()[-5:]] == pytest.approx(expected, abs=6e-4)
        assert len(lines) == 3


class TestPaths:
    @pytest.mark.parametrize("callback", [ExportClassifier, ExportWeights])
    @pytest.mark.parametrize("path", ["/tmp/w.safetensors", "../w.safetensors", "a/../../w.safetensors"])
    def test_exports_go_below_the_root(self, callback, path):
        with pytest.raises(ConfigurationError, match="below trainer.default_root_dir.*set it to w.safetensors"):
            callback(path=path)
        with pytest.raises(ConfigurationError, match="expected a .safetensors file"):
            callback(path="w.pt")

    def test_no_shipped_configuration_writes_outside_of_its_folder(self):
        for path in (ROOT / "lightning_configs/fit").glob("*.yaml"):
            for callback in (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks", []):
                if callback["class_path"].rpartition(".")[2].startswith("Export"):
                    assert not str(callback["init_args"]["path"]).startswith("checkpoints"), path.name

    def test_fast_dev_run_writes_nothing(self, in_root, tmp_path, capsys):
        fit(
            tmp_path,
            "--trainer.callbacks+",
            '{"class_path": "ExportWeights", "init_args": {"module": "classifier.network"}}',
        )
        before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
        assert {"classifier.safetensors", "network.safetensors"} <= {path.name for path in before}
        out = capsys.readouterr().out
        assert f"wrote {tmp_path / 'classifier.safetensors'}" in out
        assert f"wrote {tmp_path / 'network.safetensors'}" in out
        arguments = ["--trainer.fast_dev_run", "true", "--trainer.callbacks+"]
        fit(tmp_path, *arguments, '{"class_path": "ExportWeights", "init_args": {"module": "classifier.network"}}')
        after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
        after.pop(tmp_path / "fit.yaml"), before.pop(tmp_path / "fit.yaml")  # the test's own
        assert {k: v for k, v in after.items() if k.is_file()} == {k: v for k, v in before.items() if k.is_file()}
        assert "wrote" not in capsys.readouterr().out


def test_half_rounds_the_weights_and_refuses_what_float16_cannot_hold(in_root, tmp_path):
    for half in (False, True):
        fit(tmp_path / str(half), export={"half": half})
    full, rounded = (read_weights(tmp_path / name / "classifier.safetensors").state for name in ("False", "True"))
    floats = {name for name, value in full.items() if value.is_floating_point()}
    assert floats == {name for name, value in rounded.items() if value.dtype == torch.float16}
    for name, value in full.items():
        assert torch.equal(rounded[name], value.to(rounded[name].dtype))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: fc\.bias has values above float16's 65,504"):
        in_half({"bn.bias": torch.zeros(2), "fc.bias": torch.tensor([65_504.0, 7e4])}, "a.safetensors")


class Ones(TrainDiffusion):
    """A loss that is the image's number: 1 for all, or 0 … 4."""

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1))

    def loss(self, x0, y, t, noise):
        return x0.flatten() + 0 * noise.flatten()


@pytest.mark.parametrize("values", [[1.0] * 5, [0.0, 1.0, 2.0, 3.0, 1e-8]])
def test_the_loss_of_held_out_images_on_unequal_ranks_is_their_mean(tmp_path, values):
    """5 images on 2 ranks, in batches of 2: rank 0 has 3 of them."""

    class Data(L.LightningDataModule):
        def val_dataloader(self):
            rank, size = self.trainer.global_rank, self.trainer.world_size
            mine = [{"image": torch.full((1, 1, 1), v), "label": 0} for v in values[rank::size]]
            return DataLoader(mine, batch_size=2)

    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", default_root_dir=tmp_path, **options)
    (found,) = trainer.validate(Ones(), datamodule=Data(), verbose=False)
    assert found["val/loss"] == pytest.approx(sum(values) / 5, rel=1e-6)
    assert found["val/loss_unconditional"] == pytest.approx(sum(values) / 5, rel=1e-6)
