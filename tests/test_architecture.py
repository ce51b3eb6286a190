"""A module imports only from lower floors, and only the top one knows Lightning."""

import ast
from pathlib import Path

import calib_guidance

ROOT = Path(calib_guidance.__file__).parent
FLOORS = [
    {
        "compilation",
        "configurations",
        "convolutions",
        "errors",
        "images",
        "rng",
        "run_folder",
        "scores",
        "losses",
        "noise_schedule",
        "parameterization",
        "precision",
        "processes",
        "lr_schedules",
        "threads",
    },
    {"networks", "checkpoints", "edm_pickle", "hub", "published"},
    {"denoisers", "classifiers"},
    {"guidance"},
    {"samplers", "figures"},
    {"metrics", "data", "modules", "callbacks"},
    {"checkpoint_io"},
    {"lightning_cli"},
    {"compare", "doctor", "evaluate", "export", "halving", "reference", "report", "runs", "status", "sweep"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
KNOW_LIGHTNING = {"modules", "callbacks", "data", "checkpoint_io", "lightning_cli", "doctor"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def test_every_part_has_a_floor():
    assert {part for part, _ in modules()} == set(FLOOR)


def test_imports_lead_down():
    wrong = []
    for part, path in modules():
        for name in imports(path):
            words = name.split(".")
            if words[0] == "calib_guidance" and len(words) > 1 and words[1] != part and FLOOR[words[1]] > FLOOR[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_the_top_knows_lightning():
    knowing = {part for part, path in modules() if any(name.split(".")[0] == "lightning" for name in imports(path))}
    assert knowing <= KNOW_LIGHTNING


def test_scores_know_no_diffusion():
    for path in (ROOT / "scores").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("calib_guidance")}
        assert all(name.startswith("calib_guidance.scores") for name in ours)
