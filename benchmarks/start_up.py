"""CPU seconds of a command before it does anything: imports, options, and the parts of a run.

    python benchmarks/start_up.py

User and system time of a process of its own, median and range over rounds, after one that compiles bytecode and fills the
caches. The bytecode of libraries is kept in a temporary folder, so environments without bytecode are measured like the
others. The second column is the ratio to ``import torch``, which nothing that samples is faster than.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import Ratio, keep, machine, parser, ratio

ROOT = Path(__file__).parents[1]
_MAIN = "from calib_guidance.cli import main; main()"
# Ends where the first batch would be sampled.
_FIRST_BATCH = """
import os
from calib_guidance.cli.commands import defer_imports, main
defer_imports()
from calib_guidance.tasks import GuidedSampling
GuidedSampling.predict_step = lambda *_: os._exit(0)
main()
"""
_FEW = ["--data.num_samples=20", "--data.batch_size=20", "--model.sampler.steps=2", "--trainer.accelerator=cpu"]
_HELP = (
    "fit",
    "validate",
    "test",
    "predict",
    "doctor",
    "evaluate",
    "experiment",
    "export",
    "reference",
    "report",
    "status",
)


def forms(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Code and arguments of each process, by what it shows."""
    finished = ["predict", "--config=digits", f"--trainer.default_root_dir={folder}/run", *_FEW]
    begun = ["predict", "--config=digits", f"--trainer.default_root_dir={folder}/started"]
    return {
        "import torch": ("import torch", []),
        "import calib_guidance": ("import calib_guidance", []),
        "no command": (_MAIN, ["--help"]),
        **{f"{command} --help": (_MAIN, [command, "--help"]) for command in _HELP},
        "unknown command": (_MAIN, ["predcit"]),
        "unknown configuration": (_MAIN, ["predict", "--config=nope.yaml"]),
        "missing weights": (_MAIN, ["predict", "--config=digits", "--model.denoiser.checkpoint=nope.pt"]),
        "a finished run again": (_MAIN, finished),
        "status of a run": (_MAIN, ["status", f"{folder}/run"]),
        "first batch of digits": (_FIRST_BATCH, begun),
    }


def cpu_seconds(code: str, argv: list[str], environment: dict[str, str]) -> float:
    """User and system time of a process, whatever its exit status."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, env=environment, **quiet)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # it is waited for
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the table."""
    options = parser(__doc__, rounds=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "XDG_CACHE_HOME": f"{folder}/cache"}
        measured = forms(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in measured}
        for round_ in range(options.rounds + 1):
            for name, (code, argv) in measured.items():
                seconds = cpu_seconds(code, argv, environment)
                if round_:
                    times[name].append(seconds)
    print(machine())
    print("| process | CPU seconds | import torch / process |\n|---|---:|---:|")
    ratios = {name: ratio(times["import torch"], seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"| {name} | {Ratio.of(seconds)} | {ratios[name]} |")
    keep(options.json, "start_up", {f"{name}: import torch / process": value for name, value in ratios.items()})


if __name__ == "__main__":
    main()
