"""Calibrating a classifier through the command line: training options, measures, export and temperature."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import nn

from calib_guidance.classifiers import OffTheShelfClassifier, fit_temperature
from calib_guidance.cli import main
from calib_guidance.evaluation import read_classifier
from calib_guidance.networks import SmallResNet
from calib_guidance.tasks import CalibrateClassifier
from calib_guidance.training.lr_schedules import WarmupCosine
from calib_guidance.weights.io import CheckpointError, read_weights, save_weights
from tests import processes
from tests.conftest import ROOT
from tests.sketches import REDUCTION

CONFIG = ROOT / "lightning_configs/fit/digits_calibration.yaml"


def configuration(folder, *, export=None, model=None, trainer=None, callbacks=(), data=None, plots=False):
    """The digits' calibration configuration made short, as a file; its network has few channels."""
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"]["classifier"]["init_args"]["network"]["init_args"]["widths"] = [8, 16]
    trainer = {"max_epochs": 1, "check_val_every_n_epoch": 1, "default_root_dir": str(folder), "logger": False} | (
        trainer or {}
    )
    config["trainer"] |= trainer | {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    config["trainer"]["callbacks"][-2]["init_args"] = {"plots": plots}
    config["trainer"]["callbacks"][-1]["init_args"] |= export or {}
    config["trainer"]["callbacks"] += list(callbacks)
    config["model"]["init_args"] |= model or {}
    config["data"]["init_args"] |= {"heldout_draws": 1} | (data or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "fit.yaml")


def fit(folder, *arguments, command="fit", **settings):
    main([command, "--config", configuration(folder, **settings), *arguments])


def measures(folder, stage="val"):
    """What the last validation or test measured."""
    return json.loads(sorted((folder / "calibration").glob(f"{stage}-*.json"))[-1].read_text())


def refuse(capsys, *arguments, **settings):
    with pytest.raises(SystemExit) as stop:
        fit(*arguments, **settings)
    assert stop.value.code == 2
    return capsys.readouterr().err


def small_classifier():
    return OffTheShelfClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10)


class TestObjective:
    def test_the_weight_of_the_smooth_ece_warms_up(self, monkeypatch):
        module = CalibrateClassifier(small_classifier(), smooth_ece_weight=2.0, smooth_ece_warmup_steps=4)
        logits, y = torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
        extra = []
        for step in (0, 1, 4, 9):
            monkeypatch.setattr(CalibrateClassifier, "global_step", step)
            extra.append(float(module.loss(logits, y) - F.cross_entropy(logits, y)))
        assert extra[0] == 0
        assert extra[1] == pytest.approx(extra[2] / 4, rel=1e-4)
        assert extra[2] == pytest.approx(extra[3])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"smooth_ece_weight": -0.1}, "smooth_ece_weight (λ) must be at least 0"),
            ({"smooth_ece_beta": 0.0}, "smooth_ece_beta (β) must be above 0"),
            ({"smooth_ece_form": "kernel"}, "known: per_sample, binned"),
            ({"freeze": ["network.fc.*", "head.*"]}, "freeze: 'head.*' fits no parameter"),
            ({"freeze": ["*"]}, "leaves nothing to train"),
        ],
    )
    def test_refusals(self, in_root, tmp_path, capsys, arguments, message):
        assert message in refuse(capsys, tmp_path, model=arguments)

    def test_labels_outside_the_classifiers(self, in_root, tmp_path, capsys):
        classifier = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["classifier"]
        classifier["init_args"]["num_classes"] = classifier["init_args"]["network"]["init_args"]["num_classes"] = 7
        message = refuse(capsys, tmp_path, model={"classifier": classifier})
        assert "the data has 10 classes, the classifier 7" in message


class TestTraining:
    def test_frozen_layers_stay_as_they_are(self, in_root, tmp_path):
        found = {}
        for steps in (1, 3):
            trainer = {"max_steps": steps, "val_check_interval": steps}
            fit(tmp_path / str(steps), model={"freeze": ["network.stem.*", "network.stages.*"]}, trainer=trainer)
            found[steps] = read_weights(tmp_path / str(steps) / "classifier.safetensors").state
        changed = {name for name in found[1] if not torch.equal(found[1][name], found[3][name])}
        assert changed == {"fc.weight", "fc.bias"}  # not even the BatchNorm statistics of the others

    @pytest.mark.parametrize(
        ("trainer", "model"),
        [
            (
                {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
                {"channels_last": True},
            ),
            ({}, {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}}),
            ({}, {"smooth_ece_weight": 1.0, "smooth_ece_form": "binned"}),
        ],
    )
    def test_options_train(self, in_root, tmp_path, trainer, model):
        fit(tmp_path, trainer=trainer | {"max_epochs": 2}, model=model)
        assert measures(tmp_path)["nll"]["overall"] < math.log(10) * 1.2

    def test_compiled_is_the_same_function(self):
        classifier = small_classifier()
        images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = classifier(images)
        module = CalibrateClassifier(classifier, compile=True)
        with torch.no_grad():
            torch.testing.assert_close(module.classifier(images), expected)
        assert list(module.classifier.network.state_dict()) == ["1.weight", "1.bias"]  # as predict reads them

    def test_synchronized_batch_norm_keeps_the_names(self):
        """It needs GPUs to run; what it is exported as must still fit the classifier."""
        classifier = OffTheShelfClassifier(SmallResNet(), 10)
        names = list(classifier.network.state_dict())
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(CalibrateClassifier(classifier))
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        assert list(converted.classifier.network.state_dict()) == names

    def test_warm_up_and_cosine(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = WarmupCosine(optimizer, warmup_steps=3, total_steps=11, final=0.1)
        rates = []
        for _ in range(13):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
        cosine = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2) for k in range(9)]
        assert rates[3:12] == pytest.approx(cosine)
        assert rates[12] == pytest.approx(0.2)
        assert "total_steps" not in schedule.state_dict()  # the resumed run's own length counts

    def test_the_schedule_knows_the_length_of_the_run(self, in_root, tmp_path):
        monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
        model = {
            "lr_scheduler": {
                "class_path": "calib_guidance.training.lr_schedules.WarmupCosine",
                "init_args": {"warmup_steps": 2},
            }
        }
        trainer = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 2}
        fit(tmp_path, trainer=trainer, model=model, callbacks=[monitor])
        (metrics,) = tmp_path.rglob("metrics.csv")
        with open(metrics) as file:
            rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
        expected = [1e-3, 2e-3, *(3e-3 * (1 + math.cos(math.pi * k / 14)) / 2 for k in range(14))]
        assert rates == pytest.approx(expected, rel=1e-5)


class TestMeasuring:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        """Two validations, with both loggers."""
        folder = tmp_path_factory.mktemp("run")
        loggers = [
            {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(folder / name)}}
            for name in ("CSVLogger", "TensorBoardLogger")
        ]
        fit(folder, trainer={"logger": loggers, "max_epochs": 2}, plots=True)
        return folder

    def test_every_measure_overall_and_by_level(self, run):
        found = measures(run)
        names = {
            "accuracy",
            "top5_accuracy",
            "nll",
            "brier",
            "ece",
            "adaptive_ece",
            "maximum_ece",
            "classwise_ece",
            "smooth_ece",
        }
        assert names <= found.keys()
        assert found["levels"] == ["0-199", "200-399", "400-599", "600-799", "800-999"]
        assert sum(found["count"]) == 297
        for name in ("accuracy", "nll", "brier"):  # means over samples: the overall one is that of the levels
            values, counts = found[name]["by_level"], found["count"]
            mean = sum(v * c for v, c in zip(values, counts, strict=True)) / sum(counts)
            assert found[name]["overall"] == pytest.approx(mean)

    def test_the_logs(self, run):
        (metrics,) = (run / "CSVLogger").rglob("metrics.csv")
        with open(metrics) as file:
            rows = [row for row in csv.DictReader(file) if row["val/nll"]]
        assert len(rows) == 2
        found = measures(run)
        assert float(rows[-1]["val/ece/t=200-399"]) == pytest.approx(found["ece"]["by_level"][1], abs=1e-6)
        bins = torch.tensor(found["bins"])
        assert bins[..., 0].sum() == 297
        gap = (bins[0, :, 1] - bins[0, :, 2]).abs().sum()
        assert float(gap) / found["count"][0] == pytest.approx(found["ece"]["by_level"][0])
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = (run / "TensorBoardLogger").rglob("events.out*")
        log = EventAccumulator(str(events.parent)).Reload()
        assert len(log.Images("val/reliability")) == 2
        assert "val/smooth_ece/t=800-999" in log.Tags()["scalars"]

    def test_the_diagrams(self, run):
        diagrams = sorted((run / "calibration").glob("*.png"))
        assert [p.stem for p in diagrams] == ["val-step00000008", "val-step00000016"]
        assert min(Image.open(diagrams[0]).size) > 500 / REDUCTION

    @pytest.mark.slow
    def test_two_processes_measure_what_one_does(self, in_root, tmp_path):
        """Of 297 images, also through denoising online; the noise is each image's own."""
        weights = {"classifier": yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["classifier"]}
        save_weights(SmallResNet(widths=(32, 64, 64), blocks=1), tmp_path / "w.safetensors")
        weights["classifier"]["init_args"]["weights"] = str(tmp_path / "w.safetensors")
        fit(tmp_path / "one", model=weights, command="validate")
        path = configuration(tmp_path / "two", model=weights, trainer={"devices": 2, "strategy": "ddp"})
        processes.succeed("validate", "--config", path, ranks=2)
        one, two = measures(tmp_path / "one"), measures(tmp_path / "two")
        assert one["count"] == two["count"]
        for name in ("accuracy", "nll", "brier", "ece", "adaptive_ece", "maximum_ece", "classwise_ece", "smooth_ece"):
            assert one[name]["overall"] == pytest.approx(two[name]["overall"], abs=1e-6), name
            assert one[name]["by_level"] == pytest.approx(two[name]["by_level"], abs=1e-6), name

    @pytest.mark.slow
    def test_two_processes_train(self, in_root, tmp_path):
        """The binned Smooth ECE over both, the average of the weights, and one temperature by level for both."""
        ema = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
        path = configuration(
            tmp_path,
            export={"temperature": "by_level"},
            callbacks=[ema],
            model={"smooth_ece_weight": 1.0, "smooth_ece_form": "binned"},
            trainer={"devices": 2, "strategy": "ddp"},
        )
        processes.succeed("fit", "--config", path, ranks=2)
        assert sum(measures(tmp_path)["count"]) == 297
        description = yaml.safe_load((tmp_path / "classifier.yaml").read_text())
        assert len(description["init_args"]["temperature"]) == 5
        assert description["init_args"]["num_steps"] == 1000


class TestExport:
    def test_predict_names_the_yaml(self, in_root, tmp_path):
        """The complete way: fit, export, guide."""
        fit(tmp_path, trainer={"max_epochs": 2}, export={"temperature": "scalar"})
        main(
            [
                "predict",
                "--config=lightning_configs/predict/digits.yaml",
                f"--model.init_args.guidance.init_args.classifier={tmp_path / 'classifier.yaml'}",
                "--model.init_args.sampler.init_args.steps=3",
                "--data.init_args.num_samples=20",
                "--data.init_args.batch_size=10",
                f"--trainer.default_root_dir={tmp_path / 'samples'}",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
            ]
        )
        resolved = yaml.safe_load((tmp_path / "samples/config.yaml").read_text())
        guide = resolved["model"]["init_args"]["guidance"]["init_args"]["classifier"]
        assert guide["init_args"]["weights"] == str(tmp_path / "classifier.safetensors")
        assert guide["init_args"]["temperature"] != 1.0

    def test_an_exported_classifier_can_be_moved(self, in_root, tmp_path):
        """Its YAML names the weights relative to itself, for the command line and for evaluate."""
        fit(tmp_path / "made", trainer={"max_epochs": 1})
        moved = (tmp_path / "made").rename(tmp_path / "moved") / "classifier.yaml"
        weights = read_weights(moved.with_name("classifier.safetensors")).state
        for name, value in read_classifier(moved).network.state_dict().items():
            assert torch.equal(value, weights[name])
        fit(tmp_path / "again", f"--model.init_args.classifier={moved}", command="validate")
        assert measures(tmp_path / "again")["accuracy"] == measures(moved.parent)["accuracy"]

    def test_what_is_exported_measures_as_it_did(self, in_root, tmp_path):
        """With the temperature of each level, better than without: it was fitted on the same data."""
        fit(tmp_path, trainer={"max_epochs": 3}, export={"temperature": "by_level"})
        before = measures(tmp_path)
        argument = f"--model.init_args.classifier={tmp_path / 'classifier.yaml'}"
        fit(tmp_path / "again", argument, command="validate")
        after = measures(tmp_path / "again")
        assert after["accuracy"] == before["accuracy"]
        for k in range(5):
            assert after["nll"]["by_level"][k] <= before["nll"]["by_level"][k] + 1e-6
        assert after["nll"]["overall"] < before["nll"]["overall"] - 1e-3

    def test_the_best_is_kept(self, in_root, tmp_path):
        """At a rate that ruins the classifier later, the first validation is the best one."""
        ruin = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e3}}}
        ruin["lr_scheduler"] = {
            "class_path": "calib_guidance.training.lr_schedules.WarmupCosine",
            "init_args": {"warmup_steps": 10**6},
        }
        for name, export in (("best", {"monitor": "val/nll/t=0-199"}), ("last", {"monitor": None})):
            fit(tmp_path / name, model=ruin, export=export, trainer={"max_epochs": 3, "gradient_clip_val": None})
        reports = [json.loads(p.read_text()) for p in sorted((tmp_path / "best/calibration").glob("*.json"))]
        scores = [report["nll"]["by_level"][0] for report in reports]
        best, last = (read_weights(tmp_path / n / "classifier.safetensors").state for n in ("best", "last"))
        same = all(torch.equal(best[key], last[key]) for key in best)
        assert same == (min(range(3), key=scores.__getitem__) == 2)

    def test_the_average_of_the_weights_is_what_was_validated(self, in_root, tmp_path):
        """With a decay of 1 the average stays what the first step made."""
        ema = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 1.0}}
        trainer = {"max_epochs": 2, "check_val_every_n_epoch": 2}
        fit(tmp_path / "average", callbacks=[ema], trainer=trainer)
        fit(tmp_path / "trained", trainer=trainer)
        fit(tmp_path / "first", trainer={"max_steps": 1, "max_epochs": -1, "val_check_interval": 1})
        average, trained, first = (
            read_weights(tmp_path / n / "classifier.safetensors").state["fc.weight"]
            for n in ("average", "trained", "first")
        )
        assert not torch.equal(average, trained)
        torch.testing.assert_close(average, first)

    @pytest.mark.parametrize(
        ("export", "message"),
        [
            ({"monitor": "val/nlll"}, "'val/nlll' is not a score of the validation; known: val/accuracy"),
            ({"monitor": "val/ece/t=0-99"}, "val/ece/t=0-199"),
            ({"mode": "least"}, "known: min, max"),
            ({"temperature": "vector"}, "known: none, scalar, by_level"),
            ({"path": "weights.pt"}, "expected a .safetensors file"),
        ],
    )
    def test_refusals_come_before_training(self, in_root, tmp_path, capsys, export, message):
        assert message in refuse(capsys, tmp_path, export=export)
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_loading_compares_what_the_file_says(self, tmp_path):
        network = SmallResNet()
        classifier = OffTheShelfClassifier(network, 10, temperature=[1.5, 2.0], resize=8)
        save_weights(network, tmp_path / "w.safetensors", **classifier.weights_metadata)
        arguments = {"weights": str(tmp_path / "w.safetensors"), "resize": 8, "temperature": [1.5, 2.0]}
        OffTheShelfClassifier(SmallResNet(), 10, **arguments)
        for changed, found in (
            ({"temperature": 1.0}, r"\[1.5, 2.0\]"),
            ({"resize": None}, "8"),
            ({"num_steps": 500}, "1000"),
            ({"normalize": "imagenet"}, "none"),
        ):
            with pytest.raises(CheckpointError, match=f"was trained with {next(iter(changed))}: {found}"):
                OffTheShelfClassifier(SmallResNet(), 10, **arguments | changed)


class TestTemperature:
    def test_it_minimizes_the_likelihood(self):
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(3000, 5, generator=generator)
        y = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).squeeze(1)
        level = torch.arange(3000) % 3
        logits[level == 1] *= 2
        one = fit_temperature(logits, y)
        several = fit_temperature(logits, y, level, num_levels=4)

        def best(chosen):
            def nll(t):
                return float(F.cross_entropy(logits[chosen].double() / t, y[chosen]))

            return minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x

        assert float(one) == pytest.approx(best(slice(None)), rel=1e-5)
        for k in range(3):
            assert float(several[k]) == pytest.approx(best(level == k), rel=1e-5)
        assert float(several[1]) == pytest.approx(2 * float(several[0]), rel=0.15)
        assert float(several[3]) == 1  # no data

    def test_parts_on_several_ranks_are_one(self):
        """Each rank holds a part; what is summed over them is what one process sums."""
        generator = torch.Generator().manual_seed(1)
        logits, y = 4 * torch.randn(400, 5, generator=generator), torch.randint(5, (400,), generator=generator)
        parts = [slice(0, 150), slice(150, 400)]
        from threading import Barrier, Thread

        barrier, shared, found = Barrier(2), [None, None], [None, None]

        def run(rank):
            def reduce(sums):
                shared[rank] = sums
                barrier.wait()
                total = shared[0] + shared[1]
                barrier.wait()
                return total

            found[rank] = fit_temperature(logits[parts[rank]], y[parts[rank]], reduce=reduce)

        threads = [Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        torch.testing.assert_close(found[0], fit_temperature(logits, y), rtol=1e-6, atol=0)
        assert torch.equal(found[0], found[1])

    def test_logits_are_divided_by_the_temperature_of_their_step(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        plain = OffTheShelfClassifier(network, 10)
        tempered = OffTheShelfClassifier(network, 10, temperature=[0.5, 2.0])
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0, 499, 500, 999])
        divided = plain(images) / torch.tensor([0.5, 0.5, 2.0, 2.0]).unsqueeze(1)
        torch.testing.assert_close(tempered(images, t), divided)
        with pytest.raises(ValueError, match="call it with t"):
            tempered(images)
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            OffTheShelfClassifier(network, 10, temperature=[1.0, 0.0])
