"""Exit status and message of commands that cannot run: one line, before any work, with the value that came and a cure."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from calib_guidance.backend import atomic
from calib_guidance.cli import commands, main
from calib_guidance.cli.lightning import subclasses_listed_once
from calib_guidance.experiments import experiment as experiment_module
from tests.conftest import ROOT
from tests.runs import QUICK
from tests.test_status_and_export import make

PREDICT = ["predict", "--config=digits", "--data.num_samples=10", "--data.batch_size=10", "--model.sampler.steps=2"]
WRITER, REPORT = {"class_path": "SampleWriter"}, {"class_path": "RunReport", "init_args": {"plots": False}}
FEW = {"trainer": {"callbacks": [WRITER, REPORT]}}


@pytest.fixture(scope="module", autouse=True)
def _classes_listed_once():
    with subclasses_listed_once():
        yield


@pytest.fixture
def run(in_root, tmp_path, capsys):
    """Status and last line of a command, with files in the place of {NAME}."""

    def run(*argv, **files):
        places = {}
        for name, content in files.items():
            places[name] = tmp_path / name.replace("_", ".")
            data = content if isinstance(content, bytes | str) else yaml.safe_dump(content)
            places[name].write_bytes(data if isinstance(data, bytes) else data.encode())
        argv = [word.format(**places, tmp=tmp_path) for word in argv]
        status = 0
        try:
            main(argv)
        except SystemExit as stop:
            status = stop.code
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calib-guidance: ")]
        said = [line for line in said if "this runs code from outside" not in line]
        assert len(said) <= 1
        return status, "".join(said).replace(str(tmp_path), "TMP")

    return run


def overlay(**content):
    return ("--config={a_yaml}",), {"a_yaml": content}


def text(content, base=None):
    files = {"a_yaml": content} | ({} if base is None else {"base_yaml": base})
    return ("--config={a_yaml}",), files


TYPO = {"class_path": "calib_guidance.callbacks.RunReport", "init_args": {"polts": False}}
PREDICT_REFUSES = {
    "a seed of Lightning": (("--seed_everything=-1",), {}, "seed_everything: -1 is not in bounds"),
    "no devices": (("--trainer.devices=0",), {}, "trainer: `Trainer(devices='0')` value is not a valid input"),
    "a GPU where there is none": (("--trainer.accelerator=gpu",), {}, "trainer: No supported gpu backend found"),
    "a seed that int64 does not hold": ((f"--data.seed={2**63}",), {}, "data.seed must be at least 0 and below 2**63"),
    **{
        f"precision {name}": ((f"--trainer.precision={name}",), {}, f"32-true, bf16-mixed or 16-mixed, got {name}")
        for name in ("16-true", "bf16-true", "64-true")
    },
    "no writer": (
        *overlay(trainer={"callbacks": [REPORT]}),
        "has no SampleWriter, and samples that nothing writes are lost",
    ),
    "no callbacks": (("--trainer.callbacks=[]",), {}, "with `callbacks+:` it adds to them"),
    "callbacks null": (("--trainer.callbacks=null",), {}, "has no SampleWriter"),
    "two writers": (*overlay(trainer={"callbacks": [WRITER, WRITER]}), "several SampleWriters, and a run has one"),
    "an option of a callback": (
        *overlay(trainer={"callbacks": [WRITER, TYPO]}),
        "trainer.callbacks: RunReport has no option 'polts' (did you mean 'plots'?); it has: plots",
    ),
    "an option of a callback that is added": (
        *overlay(trainer={"callbacks+": [TYPO]}),
        "trainer.callbacks: RunReport has no option 'polts' (did you mean 'plots'?); it has: plots",
    ),
    "latin-1": (*text("data:\n  labels: é\n".encode("latin-1")), "TMP/a.yaml is not UTF-8 text: byte 0xe9 in line 2"),
    "a key twice": (
        *text("data:\n  seed: 1\n  seed: 2\n"),
        "TMP/a.yaml is not valid YAML: line 3, column 3: the key 'seed' stands",
    ),
    "a syntax error": (*text("data: [\n"), "TMP/a.yaml is not valid YAML: line 2, column 1"),
    "a syntax error in a base": (*text("base: base.yaml\n", "data: [\n"), "TMP/base.yaml is not valid YAML: line 2"),
    "a deep file": (*text("[" * 10_000), "TMP/a.yaml is not valid YAML"),
    "a file that is too deep for libyaml": (*text("[" * 100_000), "TMP/a.yaml is not valid YAML"),
    "no folder": (("--trainer.default_root_dir=null",), {}, "trainer.default_root_dir is not set"),
    "an empty folder": (("--trainer.default_root_dir=",), {}, "must be a folder of this machine, got ''"),
    "a bucket": (("--trainer.default_root_dir=s3://a/b",), {}, "must be a folder of this machine, got 's3://a/b'"),
    "a folder in a file": (
        ("--trainer.default_root_dir={a_yaml}/run",),
        {"a_yaml": ""},
        "trainer.default_root_dir: TMP/a.yaml/run cannot be written: TMP/a.yaml: Not a directory",
    ),
    "no file of a classifier": (
        ("--model.guidance.classifier=no/missing.yaml",),
        {},
        "model.guidance.classifier: there is no file no/missing.yaml",
    ),
    **{
        f"a classifier's file with {name}": (
            ("--model.guidance.classifier={classifier_yaml}",),
            {"classifier_yaml": content},
            message,
        )
        for name, content, message in (
            ("a syntax error", "class_path: [\n", "TMP/classifier.yaml is not valid YAML: line 2"),
            ("latin-1", b"class_path: \xe9\n", "TMP/classifier.yaml is not UTF-8 text"),
            ("a key twice", "class_path: A\nclass_path: B\n", "the key 'class_path' stands twice"),
            ("a list", "- a\n", "model.guidance.classifier: TMP/classifier.yaml has no class_path"),
            ("an unknown class", "class_path: Nothing\n", "TMP/classifier.yaml: there is no Nothing"),
            (
                "another kind of class",
                "class_path: DDIM\n",
                "TMP/classifier.yaml describes DDIM, which cannot be used here",
            ),
            (
                "an unknown option",
                "class_path: OffTheShelfClassifier\ninit_args: {netwrk: 1}\n",
                "TMP/classifier.yaml: OffTheShelfClassifier has no option 'netwrk' (did you mean 'network'?)",
            ),
        )
    },
    "a label that is none": (
        ("--data.labels={labels_txt}",),
        {"labels_txt": "1\n" * 8 + "two\n3\n"},
        "TMP/labels.txt, line 9: 'two' is not a class number from 0 to 9",
    ),
    "too few labels": (
        ("--data.labels={labels_txt}",),
        {"labels_txt": "1\n2\n"},
        "TMP/labels.txt has 2 class numbers, data.num_samples is 10",
    ),
    "too many shards": (("--data.num_samples=1000001", "--data.batch_size=1"), {}, "raise data.shard_size"),
}


@pytest.mark.parametrize("case", PREDICT_REFUSES)
def test_predict_refuses(run, tmp_path, case):
    argv, files, message = PREDICT_REFUSES[case]
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and the case is of one without")
    root = () if any("default_root_dir" in word for word in argv) else ("--trainer.default_root_dir={tmp}/out",)
    few = () if "callbacks" in str((argv, files)) else ("--config={few_yaml}",)
    status, said = run(*PREDICT, *root, *QUICK, *few, *argv, **({"few_yaml": FEW} | files))
    assert status == 2, said
    assert message in said
    assert not list(tmp_path.rglob("*.parquet"))
    assert not (tmp_path / "out/run.json").exists()
    assert not (ROOT / "s3:").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (
            ["fit", "--config=digits_diffusion", "--ckpt_path=missing.ckpt"],
            2,
            "--ckpt_path: there is no file missing.ckpt",
        ),
        (["fit", "--config=digits_diffusion", "--ckpt_path=best"], 2, "name a file, or last"),
        (
            ["fit", "--config=digits_diffusion", "--trainer.devices=0"],
            2,
            "Expected accelerator: auto, cpu or gpu; devices: auto",
        ),
        (
            ["fit", "--config=digits_diffusion", "--trainer.default_root_dir=gs://a"],
            2,
            "must be a folder of this machine",
        ),
        (["doctor", "--config=digits", "--model.guidance.classifier=missing.yaml"], 2, "there is no file missing.yaml"),
        (["doctor", "--config=digits", "--trainer.callbacks=[]"], 2, "has no SampleWriter"),
        (["experiment", "--config={tmp}/run/samples"], 2, "is neither a file"),
        (["experiment", "--config={tmp}/deep.yaml"], 2, "TMP/deep.yaml is not valid YAML"),
        (["status", "{tmp}/run/run.json"], 2, "run.json/run.json: Not a directory"),
        (
            ["export", "{tmp}/run", "--to=npz", "--output={tmp}/run/run.json/x"],
            2,
            "run.json: exists, and is not a folder",
        ),
        (["export", "{tmp}/run", "--to=png", "--names={tmp}/none"], 2, "TMP/none cannot be read: No such file"),
        (["evaluate", "{tmp}/none", "--reference=none.npz"], 2, "TMP/none"),
        (["report", "{tmp}/none"], 2, "TMP/none: no such folder"),
    ],
)
def test_others_refuse(run, tmp_path, argv, status, message):
    make(tmp_path / "run")
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    found, said = run(*argv, *(QUICK if argv[0] in ("fit", "doctor") else ()))
    assert (found, message in said) == (status, True), said


def test_all_samples_fail(run, tmp_path):
    """Status 3 like that of some, with a report, and again where nothing is left to do."""
    denoiser = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())["model"]["init_args"][
        "denoiser"
    ]
    faulty = {"class_path": "tests.faulty.Faulty", "init_args": {"denoiser": denoiser, "label": 7}}
    argv = [*PREDICT, "--config={a_yaml}", "--data.labels=7", "--trainer.default_root_dir={tmp}/run", *QUICK]
    for _ in range(2):
        status, said = run(*argv, a_yaml={"model": {"init_args": {"denoiser": faulty}}})
        assert status == 3
        assert said.startswith("calib-guidance: 10 samples failed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (")
    assert (tmp_path / "run/metrics.json").exists()


def test_fast_dev_run_writes_nothing(run, tmp_path):
    assert run(*PREDICT, "--trainer.default_root_dir={tmp}/run", *QUICK, "--trainer.fast_dev_run=true") == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("form", ["npz", "png", "hf"])
def test_a_full_disk_in_export(run, tmp_path, monkeypatch, form, number):
    make(tmp_path / "run")

    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "replace", full)
    status, said = run("export", "{tmp}/run", f"--to={form}")
    assert status == 4
    assert f"{os.strerror(number)}. What is complete is kept; free disk space and re-run to resume" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "samples", "shards", "claims"}


def test_a_reader_that_has_gone(tmp_path):
    """``calib-guidance status RUN | head -1``: no traceback, and the status of a closed pipe."""
    make(tmp_path, num_samples=4000, shards=())
    program = "import sys; from calib_guidance.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "status", str(tmp_path), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_table_without_its_place_is_found_before_the_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_module, "Experimenter", None)
    status, said = run(
        "experiment", "--config=digits_tau2", "--output={tmp}/out", "--into={readme_md}", readme_md="no marks"
    )
    assert status == 2
    assert "TMP/readme.md has no place for the table: put <!-- " in said


def test_a_traceback_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIB_GUIDANCE_TRACEBACK", "1")
    with pytest.raises(NotADirectoryError):
        commands.main(["status", str(make(tmp_path).path / "run.json")])
