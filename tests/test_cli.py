"""What users run: every shipped YAML, through the public interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from PIL import Image

import calib_guidance
from calib_guidance.cli import main
from calib_guidance.cli.parsed import read_configuration
from calib_guidance.data.digits import digits
from calib_guidance.networks import SmallResNet
from calib_guidance.runs import RunFolder
from calib_guidance.weights.io import read_weights, save_weights
from tests import processes
from tests.conftest import ROOT
from tests.runs import QUICK, metrics, samples_of, tables
from tests.sketches import REDUCTION

PREDICT = ["predict", "--config", "lightning_configs/predict/digits.yaml"]
NEWER = ("flow", "edm2", "edm2_classifier_free", "edm2_autoguided")  # with samplers and weights of their own
OVERLAYS = sorted(
    str(p.relative_to(ROOT))
    for f in ("score/*", "digits/*", "guidance/unguided", "guidance/relu", "guidance/on_x_t", "guidance/with_labels")
    for p in (ROOT / "lightning_configs").glob(f"{f}.yaml")
    if ("\n  guidance:" in p.read_text() or "\n  denoiser:" in p.read_text())  # the others are for fit
    and p.stem not in NEWER
)
ALONE = '--trainer.callbacks=[{"class_path": "SampleWriter"}]'  # nothing is measured or drawn
SCORES = "calib_guidance.scores"
FITS = sorted(
    p.name for p in (ROOT / "lightning_configs/fit").glob("digits*.yaml") if p.stem.removeprefix("digits_") not in NEWER
)


def predict(folder, *arguments, steps=3, samples=20, batch=10):
    main(
        [
            *PREDICT,
            *(a for a in arguments if a.startswith("--config=")),
            f"--trainer.default_root_dir={folder}",
            f"--data.init_args.num_samples={samples}",
            f"--data.init_args.batch_size={batch}",
            f"--model.init_args.sampler.init_args.steps={steps}",
            *QUICK,
            *(a for a in arguments if not a.startswith("--config=")),
        ]
    )


def refuse(capsys, *arguments):
    """The message with which a command ends before it samples anything."""
    with pytest.raises(SystemExit) as stop:
        predict(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_every_predict_configuration_samples(in_root, tmp_path, capsys, request, overlay):
    if overlay is None:
        request.getfixturevalue("plots_in_full")
    # Scores change what is measured and drawn by its values alone: the plots of one are enough.
    drawn = not (overlay or "").startswith("lightning_configs/score")
    configs = [overlay, None if drawn else "digits/no_plots"]
    predict(tmp_path, *(f"--config={config}" for config in configs if config))
    found = samples_of(tmp_path)
    assert found["index"].tolist() == list(range(20))
    assert found["label"].tolist() == [i % 10 for i in range(20)]
    assert found["image"].shape == (20, 1, 8, 8)
    found = metrics(tmp_path)
    guided = overlay is None or "unguided" not in overlay
    assert found["nfe"] == (6 if overlay and "classifier_free" in overlay else 3)
    assert {"fd", "precision", "recall", "classifier_accuracy", "seconds_per_image"} <= found.keys()
    assert ("integral_ece" in found) == guided
    (diffusion,) = [weights for weights in found["weights"].values() if "prediction" in weights]
    assert (diffusion["prediction"], diffusion["file"]) == ("v", "checkpoints/digits/diffusion.safetensors")
    figures = {p.name for p in (tmp_path / "plots").glob("*")}
    of_guidance = {"ece_t", "reliability", "gradient_norm", "guidance_schedule"} if guided else set()
    names = {"samples", "trajectory", *of_guidance}
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "pdf")} | {"animation.gif"}
    assert figures == (expected if drawn else set())
    for figure in (name for name in figures if name.endswith(".png")):
        assert min(Image.open(tmp_path / "plots" / figure).size) > (200 if overlay is None else 200 / REDUCTION)
    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["sampler"]["init_args"]["steps"] == "3"
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed
    assert f"wrote to {tmp_path}: samples, metrics.json" in printed
    RunFolder(tmp_path, 1, 1).remove()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # restart knows all that a run writes


@pytest.mark.parametrize("name", FITS)
def test_every_fit_configuration_trains_and_exports_what_predict_reads(in_root, tmp_path, name):
    config = yaml.safe_load((ROOT / "lightning_configs/fit" / name).read_text())
    if "base" in config:
        resolved = read_configuration([f"--config=fit/{name}"]).options.as_dict()
        config = {key: resolved[key] for key in ("trainer", "model", "data")}
    exported = tmp_path / "classifier.safetensors"
    for callback in config["trainer"]["callbacks"]:
        if "Export" in callback["class_path"]:
            callback["init_args"]["path"] = exported.name
    config["trainer"] |= {"max_steps": 2, "max_epochs": None, "default_root_dir": str(tmp_path), "logger": False}
    config["trainer"] |= {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": 1}
    if "total_steps" in config["model"]["init_args"]["lr_scheduler"]["init_args"]:
        config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] = 2
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), *QUICK])
    shipped = ROOT / "checkpoints/digits" / f"{name.removeprefix('digits_').removesuffix('.yaml')}.safetensors"
    if name != "digits_calibration.yaml":
        found, expected = read_weights(exported).state, read_weights(shipped).state
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    if "classifier" in config["model"]["init_args"]:  # and the YAML beside it names it for predict
        description = yaml.safe_load((tmp_path / "classifier.yaml").read_text())
        weights = {"OffTheShelfClassifier": "weights", "NoiseAwareClassifier": "checkpoint"}
        name = weights[description["class_path"].rpartition(".")[2]]
        assert description["init_args"][name] == exported.name  # relative to the YAML


def test_the_flow_model_trains_and_samples(in_root, tmp_path):
    main(["fit", "--config=digits_flow", "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}/fit", *QUICK])
    trained, shipped = (
        read_weights(path).state
        for path in (tmp_path / "fit/network.safetensors", "checkpoints/digits/flow.safetensors")
    )
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in shipped.items()}
    few = ["--data.num_samples=20", "--data.batch_size=10", "--model.sampler.num_steps=3", ALONE]
    overlays = ["--config=digits/flow"]
    main(["predict", "--config=digits", *overlays, *few, f"--trainer.default_root_dir={tmp_path}/run", *QUICK])
    found = samples_of(tmp_path / "run")
    assert found["label"].tolist() == [i % 10 for i in range(20)]
    assert found["image"].float().std() > 30


def test_the_edm2_style_model_trains(in_root, tmp_path):
    """Its snapshots give any average afterwards, of the shapes of what is shipped."""
    config = yaml.safe_load((ROOT / "lightning_configs/fit/digits_edm2.yaml").read_text())
    for callback in config["trainer"]["callbacks"]:
        callback["init_args"]["every_n_images"] = 128
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))
    argv = ["--trainer.max_steps=6", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}/fit"]
    main(["fit", f"--config={tmp_path}/few.yaml", *argv, *QUICK])
    main(["ema", f"{tmp_path}/fit/ema", "--std=0.1", f"--output={tmp_path}/network.safetensors"])
    state = read_weights(tmp_path / "network.safetensors").state
    assert all(value.isfinite().all() for value in state.values())
    for name in ("edm2", "edm2_early"):
        shipped = read_weights(f"checkpoints/digits/{name}.safetensors").state
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in shipped.items()}


@pytest.mark.parametrize("overlay", ["edm2", "edm2_classifier_free", "edm2_autoguided"])
def test_the_edm2_style_model_samples(in_root, tmp_path, overlay):
    few = ["--data.num_samples=20", "--data.batch_size=10", "--model.sampler.num_steps=3", ALONE]
    overlays = [f"--config=digits/{overlay}"]
    main(["predict", "--config=digits", *overlays, *few, f"--trainer.default_root_dir={tmp_path}/run", *QUICK])
    found = samples_of(tmp_path / "run")
    assert found["label"].tolist() == [i % 10 for i in range(20)]
    assert found["image"].float().std() > 30


@torch.no_grad()
def test_the_shipped_models_denoise_alike():
    """Errors of x̂0 of held-out digits: those of the flow and the EDM2-style model are near the diffusion model's, labels help."""
    x0, y = (each[:200] for each in digits("heldout"))
    sigmas = np.array([0.4, 1.5, 6.0])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

    def errors(name, labels):
        denoiser = calib_guidance.load_pretrained(name)
        predict = denoiser.prepare(denoiser.schedule.at_sigmas(sigmas), labels)
        found = [predict((x0 + s * noise) / np.hypot(1, s), i).x0 - x0 for i, s in enumerate(sigmas.tolist())]
        return torch.stack([each.square().mean() for each in found])

    expected, found = errors("digits", y), {}
    for name, most in (("digits_flow", 1.2), ("digits_edm2", 1.05), ("digits_edm2_early", 1.7)):
        found[name] = errors(name, y)
        assert (found[name] < most * expected).all(), (name, found[name] / expected)
        assert (found[name][1:] < 0.75 * errors(name, torch.full_like(y, -1))[1:]).all()
    assert (found["digits_edm2_early"] > found["digits_edm2"]).all()


def test_the_weights_average_is_what_is_exported(in_root, tmp_path):
    """With a decay of 1 the average stays what the first step made, whatever training does after it."""
    config = yaml.safe_load((ROOT / "lightning_configs/fit/digits_diffusion.yaml").read_text())
    averaging, export = config["trainer"]["callbacks"]
    trained = {"class_path": export["class_path"], "init_args": {"path": "trained.safetensors"}}
    export["init_args"]["path"] = "average.safetensors"
    averaging["init_args"]["decay"] = 1.0
    config["trainer"] |= {"max_steps": 3, "default_root_dir": str(tmp_path), "logger": False, "limit_val_batches": 0}
    config["trainer"]["callbacks"] = [trained, averaging, export]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml"), *QUICK])
    before, after = (read_weights(tmp_path / f"{n}.safetensors").state for n in ("average", "trained"))
    assert any(not torch.equal(before[k], after[k]) for k in before)


class TestRequests:
    @pytest.mark.parametrize("overlay", ["score/js", "score/tilted"])
    def test_a_sample_depends_on_no_batch_and_the_noise_and_labels_not_at_all(self, in_root, tmp_path, overlay):
        sizes = (10, 20) if "tilted" in overlay else (1, 5, 12)
        runs = {}
        for size in sizes:
            config = f"--config=lightning_configs/{overlay}.yaml"
            predict(tmp_path / str(size), config, ALONE, batch=size, samples=sizes[-1], steps=4)
            runs[size] = samples_of(tmp_path / str(size))
        together = runs[sizes[-1]]
        for size in sizes[:-1]:
            for key in ("index", "label", "seed"):
                assert torch.equal(runs[size][key], together[key])
            # Written as 8-bit integers: images within 1e-4 differ by at most one level, and rarely.
            difference = (runs[size]["image"].int() - together["image"].int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.01

    def test_the_same_run_gives_the_same_bytes_and_another_seed_others(self, in_root, tmp_path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            predict(tmp_path / name, f"--data.init_args.seed={seed}", ALONE)
        a, b, c = (tables(tmp_path / name) for name in "abc")
        assert a == b
        assert a.keys() == c.keys()
        assert a != c

    def test_label_policies(self, in_root, tmp_path):
        (tmp_path / "labels.txt").write_text("\n".join(str(9 - i % 10) for i in range(20)))
        predict(tmp_path / "one", "--data.init_args.labels=7", ALONE)
        predict(tmp_path / "file", f"--data.init_args.labels={tmp_path / 'labels.txt'}", ALONE)
        predict(tmp_path / "random", "--data.init_args.labels=uniform", ALONE)
        assert samples_of(tmp_path / "one")["label"].tolist() == [7] * 20
        assert samples_of(tmp_path / "file")["label"].tolist() == [9 - i % 10 for i in range(20)]
        assert len(set(samples_of(tmp_path / "random")["label"].tolist())) > 3

    def test_samples_are_a_data_set(self, in_root, tmp_path):
        predict(tmp_path, ALONE)
        rows = load_dataset(
            "parquet", data_files=str(tmp_path / "samples/*.parquet"), split="train", cache_dir=str(tmp_path)
        )
        assert rows.num_rows == 20
        assert rows[3]["label"] == 3
        assert rows[3]["image"].size == (8, 8)


def test_the_number_of_classes_need_not_be_repeated(in_root, tmp_path, capsys):
    """The classifier's ten; the samples are those of the stated ten, so that such a run resumes one that states them."""
    more = tmp_path / "derived.yaml"
    more.write_text(yaml.safe_dump({"data": {"init_args": {"num_classes": None}}}))
    predict(tmp_path / "run", f"--config={more}", ALONE)
    derived = samples_of(tmp_path / "run")
    assert derived["label"].tolist() == [i % 10 for i in range(20)]
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/samples").iterdir()}
    predict(tmp_path / "run", ALONE)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/samples").iterdir()} == written
    message = refuse(
        capsys, tmp_path / "other", f"--config={more}", "--config=lightning_configs/guidance/unguided.yaml"
    )
    assert "data.num_classes: neither the denoiser nor a classifier has classes: state how many" in message


def run_processes(folder, *arguments, devices, launched):
    command = [*PREDICT, f"--trainer.default_root_dir={folder}", *QUICK, *arguments]
    command += ["--trainer.strategy=ddp", f"--trainer.devices={devices}", "--model.init_args.sampler.init_args.steps=3"]
    if not launched:
        return processes.succeed(*command, ranks=devices)
    command = [sys.executable, "-m", "calib_guidance", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "launched"), [(25, True), (8, False)])
def test_two_processes_write_the_samples_of_one(in_root, tmp_path, samples, launched):
    """25 does not divide, and of 8 in batches of 10 the second process has none. Lightning launches the second, or torchrun."""
    callbacks = yaml.safe_load(Path(PREDICT[-1]).read_text())["trainer"]["callbacks"]
    callbacks[-1]["init_args"] = {"plots": False}
    arguments = [f"--data.init_args.num_samples={samples}", "--data.init_args.batch_size=10"]
    arguments.append(f"--trainer.callbacks={json.dumps(callbacks)}")
    run_processes(tmp_path / "two", *arguments, devices=2, launched=launched)
    predict(tmp_path / "one", arguments[-1], samples=samples)
    assert tables(tmp_path / "one") == tables(tmp_path / "two")
    found, expected = (metrics(tmp_path / name) for name in ("two", "one"))
    for key in ("fd", "precision", "recall", "classifier_accuracy", "integral_ece"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key


class TestRefusals:
    """Each before any sampling: nothing is written into the output folder."""

    @pytest.fixture
    def out(self, in_root, tmp_path):
        yield tmp_path / "out"
        assert not list((tmp_path / "out").rglob("*.parquet"))
        assert not (tmp_path / "out/config.yaml").exists()

    def test_inference_mode(self, out, capsys):
        assert "set trainer.inference_mode to false" in refuse(capsys, out, "--trainer.inference_mode=true")

    def test_an_unknown_option_of_a_callback(self, out, capsys):
        report = '--trainer.callbacks=[{"class_path": "RunReport", "init_args": {"pictures": false}}]'
        assert "RunReport has no option 'pictures'; it has: plots" in refuse(capsys, out, report)

    def test_a_checkpoint_path(self, out, capsys):
        assert "predict takes no --ckpt_path" in refuse(capsys, out, "--ckpt_path=some.ckpt")

    @pytest.mark.parametrize("label", [10, -1])
    def test_a_class_outside(self, out, capsys, label):
        assert f"'{label}' is not a class number from 0 to 9" in refuse(capsys, out, f"--data.init_args.labels={label}")

    def test_a_label_file_that_does_not_fit(self, out, capsys, tmp_path):
        assert "nor a file" in refuse(capsys, out, "--data.init_args.labels=nothing.txt")
        (tmp_path / "labels.txt").write_text("1\n2\n")
        assert "has 2 class numbers, data.num_samples is 20" in refuse(
            capsys, out, f"--data.init_args.labels={tmp_path / 'labels.txt'}"
        )

    def test_classes_of_requests_and_classifier_differ(self, out, capsys):
        message = refuse(capsys, out, "--data.init_args.num_classes=11")
        assert "the requests have 11 classes, the classifier 10" in message

    def test_classes_of_requests_and_denoiser_differ(self, out, capsys):
        overlay = "--config=lightning_configs/guidance/with_labels.yaml"
        assert "11 classes, the denoiser 10" in refuse(capsys, out, overlay, "--data.init_args.num_classes=11")

    def test_an_image_size_that_the_network_cannot_take(self, out, capsys):
        assert "multiples of 2" in refuse(capsys, out, "--model.init_args.denoiser.init_args.image_size=9")

    def test_an_image_size_that_the_noise_aware_classifier_cannot_take(self, out, capsys):
        overlay = "--config=lightning_configs/digits/noise_aware.yaml"
        message = refuse(capsys, out, overlay, "--model.init_args.denoiser.init_args.image_size=16")
        assert "made for 8×8" in message

    def test_a_missing_checkpoint(self, out, capsys):
        message = refuse(capsys, out, "--model.init_args.denoiser.init_args.checkpoint=nothing.safetensors")
        assert "nothing.safetensors: no such weights file" in message

    def test_a_wrong_checkpoint_names_the_keys(self, out, capsys, tmp_path):
        save_weights(SmallResNet(), tmp_path / "wrong.safetensors")
        message = refuse(
            capsys, out, f"--model.init_args.denoiser.init_args.checkpoint={tmp_path / 'wrong.safetensors'}"
        )
        assert "missing: input_blocks.0.0.bias" in message
        assert "unexpected: fc.bias" in message

    def test_a_checkpoint_trained_otherwise(self, out, capsys):
        message = refuse(capsys, out, "--model.init_args.denoiser.init_args.prediction=epsilon")
        assert "was trained with prediction: v, the configuration says prediction: epsilon" in message
        message = refuse(capsys, out, "--model.init_args.denoiser.init_args.network=adm_imagenet128")
        assert (
            "network: adm_imagenet128 was made with noise schedule linear, here cosine; prediction epsilon, here v"
            in message
        )

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("divergence=kl", "known: rkl, fkl, js, hellinger"),
            ("alpha=-1", "alpha must be at least 0"),
            ("epsilon=1.5", "epsilon must be above 0 and below 1"),
        ],
    )
    def test_values_of_the_score(self, out, capsys, argument, message):
        assert message in refuse(capsys, out, f"--model.init_args.guidance.init_args.score.init_args.{argument}")

    def test_no_tilt(self, out, capsys):
        overlay = "--config=lightning_configs/score/tilted.yaml"
        message = refuse(capsys, out, overlay, "--model.init_args.guidance.init_args.score.init_args.tilt=0")
        assert "tilt must be a number other than 0" in message

    def test_torn_groups(self, out, capsys):
        overlay = "--config=lightning_configs/score/tilted.yaml"
        message = refuse(capsys, out, overlay, "--data.init_args.batch_size=4")
        assert "data.batch_size must be a multiple of 10, got 4" in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                {"model": {"init_args": {"guidance": {"init_args": {"score": {"init_args": {"aplha": 1}}}}}}},
                "DivergenceRegularized has no option 'aplha' (did you mean 'alpha'?); it has: divergence, alpha, epsilon",
            ),
            ({"trainer": {"devcies": 2}}, "does not accept option 'trainer.devcies'"),
            ({"modle": {"init_args": {"x": 1}}}, "does not accept option 'modle.init_args.x'"),
            (
                {"data": {"init_args": {"num_samples": "many"}}},
                "data.num_samples: Expected a <class 'int'>. Got value: many",
            ),
            (
                {"model": {"init_args": {"guidance": {"init_args": {"score": {"class_path": f"{SCORES}.Tempered"}}}}}},
                "model.guidance.score: there is no calib_guidance.scores.Tempered (did you mean 'TemperedLogProb'?)",
            ),
            (
                {"trainer": {"callbacks": [{"class_path": "calib_guidance.callback.SampleWriter"}]}},
                "there is no calib_guidance.callback.SampleWriter (No module named 'calib_guidance.callback')",
            ),
            (
                {"model": {"init_args": {"sampler": {"class_path": f"{SCORES}.Tilted"}}}},
                "model.sampler: Import path calib_guidance.scores.Tilted does not correspond to a subclass of Sampler",
            ),
        ],
    )
    def test_a_misspelled_key(self, out, capsys, tmp_path, content, message):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
        main_arguments = [*PREDICT, f"--config={tmp_path / 'more.yaml'}", f"--trainer.default_root_dir={out}"]
        with pytest.raises(SystemExit) as stop:
            main(main_arguments)
        assert stop.value.code == 2
        found = capsys.readouterr().err
        assert message in found
        assert "usage:" not in found

    def test_an_overlay_before_the_class_whose_options_it_sets(self, out, capsys):
        overlays = "--config=lightning_configs/guidance/unguided.yaml", "--config=lightning_configs/score/plain.yaml"
        message = refuse(capsys, out, *overlays)
        assert "model.guidance: options are given, but no class_path names the class" in message
        assert "Union" not in message

    @pytest.mark.parametrize("options", ["", ", init_args: {classifier: digits_classifier}"])
    def test_options_with_dots_beside_the_mapping_of_their_part(self, out, capsys, tmp_path, options):
        part = f"model.guidance: {{class_path: ClassifierGuidance{options}}}"
        (tmp_path / "dots.yaml").write_text(f"{part}\nmodel.guidance.scale: 2\n")
        message = refuse(capsys, out, f"--config={tmp_path / 'dots.yaml'}")
        assert "have no keys with dots (model.guidance.…) beside it" in message

    def test_another_number_of_heads_than_was_trained(self, out, capsys):
        message = refuse(capsys, out, "--model.init_args.denoiser.init_args.network.init_args.num_head_channels=16")
        assert "was trained with attention_heads: 4×2, the configuration says attention_heads: 4×4" in message

    def test_a_sine_with_ddim(self, out, capsys):
        message = refuse(capsys, out, "--model.sampler=DDIM", "--model.guidance.schedule.gamma=0.1")
        assert "set the guidance schedule's gamma to 0" in message

    def test_a_noise_difference_without_classifier_free_guidance(self, out, capsys):
        message = refuse(capsys, out, "--model.init_args.guidance.init_args.apply_to=cfg_residual")
        assert "needs classifier-free guidance" in message

    def test_a_folder_that_cannot_be_written(self, in_root, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in refuse(capsys, tmp_path / "file" / "out")


def test_the_module_is_a_command(in_root):
    done = subprocess.run([sys.executable, "-m", "calib_guidance", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "  predict " in done.stdout


class TestOverview:
    def test_help_names_every_command(self, capsys):
        main(["--help"])
        out = capsys.readouterr().out
        for command in (
            "fit",
            "validate",
            "test",
            "predict",
            "doctor",
            "evaluate",
            "experiment",
            "export",
            "reference",
        ):
            assert f"  {command} " in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [(["predcit", "--config", "x"], "unknown command 'predcit' (did you mean 'predict'?)"), ([], "which command?")],
    )
    def test_an_unknown_command_is_answered_with_them(self, capsys, words, message):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert "  experiment " in err


def test_one_sample_is_measured_as_far_as_it_can_be(in_root, tmp_path, capsys):
    predict(tmp_path, samples=1, batch=1)
    found = metrics(tmp_path)
    assert found["num_measured"] == 1
    assert found["classifier_accuracy"] in (0, 1)
    assert any("fid skipped: needs 2 samples" in note for note in found["notes"])
    with pytest.raises(SystemExit):  # and before Inception's weights are fetched
        main(["evaluate", str(tmp_path), "--reference", str(tmp_path / "nope.npz")])
    assert "nope.npz" in capsys.readouterr().err
