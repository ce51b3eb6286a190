"""What a command imports before it knows what is asked for, and what is deferred to its first use."""

import os
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from calib_guidance.cli import main
from calib_guidance.cli.commands import Answer
from calib_guidance.data import digits

# Each takes a tenth of a second or more.
HEAVY = {
    *(
        "datasets",
        "diffusers",
        "huggingface_hub",
        "jsonargparse",
        "lightning",
        "matplotlib",
        "open_clip",
        "pandas",
        "pyarrow",
    ),
    *("scipy", "sklearn", "sympy", "timm", "torch", "torchmetrics", "torchvision"),
}
# What Lightning and torch bring, and a run of the digits does not need.
UNUSED = {"diffusers", "open_clip", "pandas", "scipy", "sklearn", "sympy", "timm", "torchvision"}


def after(code):
    """Heavy modules that are imported once some code has run, in a process of its own."""
    listed = f"print(*sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{listed}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def run(*argv):
    return f"""
from calib_guidance.cli import main
try:
    main({list(argv)})
except SystemExit as stop:
    print(stop.code)
"""


def shell(*argv):
    """What a command prints when a shell starts it, and the heavy modules that it has imported at its end."""
    code = f"""
import atexit, sys
sys.argv = ["calib-guidance", *{list(argv)}]
atexit.register(lambda: print(*sorted({HEAVY} & sys.modules.keys()), file=sys.stderr))
from calib_guidance.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (("--help",), set()),
        (("predcit",), set()),
        (("configs",), set()),
        (("predict", "--config", "nope.yaml"), set()),
        (("fit", "--config=digts"), set()),
        (("predict", "--config=digits", "--model.denoiser.checkpoint=nope.pt"), set()),
        (("doctor", "--config", "digts"), set()),
        (("experiment", "--config=nope"), set()),
        (("status", "nowhere"), {"pyarrow"}),
        (("evaluate", "--help"), set()),
        (("evaluate", "samples.npz"), set()),
        (("evaluate", "samples.npz", "--reference=ref.npz", "--neighbors=0"), set()),
        (("evaluate", "/nowhere/samples.npz", "--reference=/nowhere/reference.npz"), set()),
        (("reference", "images", "--features=inception"), set()),
        (("compare-runs", "a", "b", "--reference=ref.npz", "--blocks=1"), set()),
    ],
)
def test_commands_parse_before_they_import(argv, allowed, tmp_path):
    assert after(run(*argv)) <= allowed


def test_the_package_is_imported_in_no_time():
    assert after("import calib_guidance") == set()


def test_the_command_line_imports_what_every_run_needs():
    imported = after(
        "from calib_guidance.backend.light_imports import defer_imports\ndefer_imports()\nimport calib_guidance.cli.lightning"
    )
    assert not imported & UNUSED


@pytest.mark.parametrize("first", ["MetricCollection", "Accuracy"])
def test_deferred_metrics_are_found_in_any_order(first):
    start = "from calib_guidance.backend.light_imports import defer_imports\ndefer_imports()"
    after(f"{start}\nfrom torchmetrics import {first}, Metric, MetricCollection\nassert issubclass(Metric, object)")


def test_deferred_modules_work(tmp_path):
    """Metrics beside the base class, plots of metrics, and compiled modules, once they are asked for; training does not."""
    after(
        """
from calib_guidance.backend.light_imports import defer_imports
defer_imports()
import lightning as L, torch, torchmetrics
from lightning.pytorch.utilities.compile import OptimizedModule, to_uncompiled
torch.distributed.init_process_group("gloo", "file://%s", rank=0, world_size=1)
torch.distributed.destroy_process_group()
torch.optim.Adam([torch.ones(1, requires_grad=True)]).step()
assert "sympy" not in sys.modules and "matplotlib" not in sys.modules
metric = torchmetrics.Metric
assert "scipy" not in sys.modules
assert isinstance(torchmetrics.Accuracy(task="binary"), metric) and torchmetrics.Metric is metric
mean = torchmetrics.MeanMetric()
mean.update(1.0)
assert mean.plot() is not None
from torchmetrics.classification import BinaryAccuracy
assert BinaryAccuracy is torchmetrics.classification.BinaryAccuracy
module = L.LightningModule()
assert not isinstance(module, OptimizedModule)
compiled = torch.compile(module)
assert isinstance(compiled, torch._dynamo.OptimizedModule) and isinstance(compiled, OptimizedModule)
assert to_uncompiled(compiled) is module
assert callable(torch._dynamo.trace_rules.clear_lru_cache) and callable(torch._dynamo.trace_rules.lookup)
torch._dynamo.graph_break()
"""
        % (tmp_path / "rendezvous")
    )


class TestRemembered:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.fixture
    def run(self, tmp_path):
        (tmp_path / "run/samples").mkdir(parents=True)
        (tmp_path / "run/samples/0.parquet").write_text("0")
        (tmp_path / "weights.pt").write_text("weights")
        config = tmp_path / "run.yaml"
        config.write_text(f"model: {{classifier: {{weights: {tmp_path}/weights.pt}}}}")
        argv = ["predict", "--config", str(config), f"--trainer.default_root_dir={tmp_path}/run"]
        Answer(argv, "run").write("a table", tmp_path / "run")
        return argv

    def test_the_same_command_gets_the_same_report(self, run):
        assert Answer(run, "run").read() == "a table"
        assert Answer([*run, "--data.seed=1"], "run").read() is None

    @pytest.mark.parametrize("name", ["weights.pt", "run.yaml", "run/samples/0.parquet"])
    @pytest.mark.parametrize("change", ["touch", "remove"])
    def test_not_where_a_file_has_changed(self, run, tmp_path, name, change):
        path = tmp_path / name
        if change == "touch":
            os.utime(path, (1, 1))
        else:
            path.unlink()
        assert Answer(run, "run").read() is None

    def test_not_where_there_is_a_new_file(self, run, tmp_path):
        (tmp_path / "run/samples/1.parquet").touch()
        assert Answer(run, "run").read() is None

    def test_not_where_a_file_changes_during_the_run(self, run, tmp_path):
        answer = Answer([*run, "--data.seed=2"], "run")
        (tmp_path / "weights.pt").write_text("other weights")
        answer.write("a table", tmp_path / "run")
        assert answer.read() is None

    @pytest.mark.parametrize("command", ["predict", "doctor"])
    def test_help_is_printed_without_imports_the_second_time(self, command):
        first, second = (shell(command, "--help") for _ in range(2))
        assert "usage:" in first[0]
        assert first[0] == second[0]
        assert "torch" in first[1]
        assert not second[1]

    def test_a_finished_run_is_reported_without_imports(self, in_root, tmp_path, monkeypatch, capsys):
        few = ("--data.num_samples=20", "--data.batch_size=10", "--model.sampler.steps=3", "--trainer.accelerator=cpu")
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
        command = ("predict", "--config=digits", f"--trainer.default_root_dir={tmp_path}/run", *few, *quiet)

        def here():
            """What the command prints when this process runs it as a shell's."""
            monkeypatch.setattr(sys, "argv", ["calib-guidance", *command])
            main()
            return capsys.readouterr().out

        first, (again, imported) = here(), shell(*command)
        assert "\n20 samples, 3 NFE each\n" in first
        assert again == first
        assert not imported
        (tmp_path / "run/metrics.json").unlink()
        assert here() == first
        assert (tmp_path / "run/metrics.json").exists()


def test_the_digits_are_scikit_learns():
    known = load_digits()
    images, labels = (torch.cat(parts) for parts in zip(digits("train"), digits("heldout"), strict=True))
    found = sorted(zip(labels.tolist(), ((images + 1) * 8).flatten(1).int().tolist(), strict=True))
    assert found == sorted(zip(known.target.tolist(), known.data.astype(int).tolist(), strict=True))
