"""What the doctor estimates for a run, against what the run takes.

    python benchmarks/doctor_estimate.py

Each round asks ``calib-guidance doctor`` for the total time of a run, then starts the run and measures it: seconds per image of
``predict``, and the training time of ``fit`` by Lightning's own clock. Both are processes of their own. Printed is the time
divided by the low and the high end of the estimate: 1 lies between them if the estimate is right.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import Ratio, keep, machine, parser, ratio

ROOT = Path(__file__).parents[1]
_UNITS = {"ms": 1e-3, "s": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0}
_TIMED = """
import sys
from lightning.pytorch.loops.fit_loop import _FitLoop
import time
from calib_guidance.cli import main
advance = _FitLoop.run
def run(loop):
    started = time.perf_counter()
    advance(loop)
    print("trained for", time.perf_counter() - started)
_FitLoop.run = run
main(sys.argv[1:])
"""
RUNS = {
    "digits, DDPM": ["predict", "--config=digits", "--data.num_samples=400"],
    "digits, SDE-DPM-Solver++, batches of 25": [
        *(
            "predict",
            "--config=digits",
            "--config=sampler/dpm_solver_sde",
            "--data.num_samples=200",
            "--data.batch_size=25",
        ),
        *("--model.sampler.steps=25", "--model.guidance.schedule.gamma=0"),
    ],
    "digits, trains a classifier": [
        *("fit", "--config=digits_classifier", "--trainer.max_epochs=20", "--trainer.limit_val_batches=0"),
        *("--trainer.enable_progress_bar=false", "--model.lr_scheduler=null"),
    ],
    "digits, trains a diffusion model": [
        *("fit", "--config=digits_diffusion", "--trainer.max_steps=60", "--trainer.limit_val_batches=0"),
        "--trainer.enable_progress_bar=false",
    ],
}


def start(command: list[str]) -> str:
    """What a command prints; ends this program where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def estimate(argv: list[str]) -> tuple[float, float]:
    """Seconds that the doctor expects: low and high."""
    command = [sys.executable, "-m", "calib_guidance", "doctor", *argv[1:]]
    low, high, unit = re.findall(r"total time: ([\d.,]+)(?: to ([\d.,]+))? (\w+) for", start(command))[0]
    low, high = (float(number.replace(",", "")) * _UNITS[unit] for number in (low, high or low))
    return low, high


def measure(argv: list[str], folder: Path) -> float:
    """Seconds that the run takes."""
    command = [sys.executable, "-c", _TIMED, *argv]
    text = start(command)
    if argv[0] == "fit":
        return float(re.findall(r"trained for ([\d.]+)", text)[0])
    found = json.loads((folder / "metrics.json").read_text())
    return found["seconds_per_image"] * found["num_samples"]


def main() -> None:
    """Print the table."""
    options = parser(__doc__, rounds=3).parse_args()
    print(machine())
    print("| run | estimate | measured | measured / low | measured / high |")
    print("|---|---:|---:|---:|---:|")
    ratios: dict[str, Ratio] = {}
    for name, argv in RUNS.items():
        lows, highs, times = [], [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                here = [*argv, f"--trainer.default_root_dir={folder}/run"]
                low, high = estimate(here)
                lows.append(low)
                highs.append(high)
                times.append(measure(here, Path(folder, "run")))
        ratios[f"{name}: measured / low"] = least = ratio(times, lows)
        ratios[f"{name}: measured / high"] = most = ratio(times, highs)
        expected, taken = f"{min(lows):.3g} to {max(highs):.3g} s", f"{min(times):.3g} to {max(times):.3g} s"
        print(f"| {name} | {expected} | {taken} | {least} | {most} |", flush=True)
    keep(options.json, "doctor_estimate", ratios)


if __name__ == "__main__":
    main()
