"""A folder imports only from the folders on lower floors, and only the top ones know Lightning."""

import ast
from pathlib import Path

import calib_guidance

ROOT = Path(calib_guidance.__file__).parent
# Lowest floor first. No two folders share a floor.
FLOORS = """
    diffusion scores backend networks weights denoisers classifiers guidance samplers training metrics runs data plots
    evaluation tasks callbacks report cli experiments
""".split()  # noqa: SIM905, one name after the other reads best
AT_THE_ROOT = {"__init__", "__main__", "errors"}
KNOW_LIGHTNING = {"tasks", "callbacks", "data", "cli", "experiments"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "calib_guidance":
                yield from (f"calib_guidance.{alias.name}" for alias in node.names if alias.name in FLOORS)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def folders():
    for path in sorted(ROOT.rglob("*.py")):
        folder, *rest = path.relative_to(ROOT).parts
        if rest:
            yield folder, path


def test_the_root_holds_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == AT_THE_ROOT
    assert {folder for folder, _ in folders()} == set(FLOORS)


def test_imports_lead_down():
    wrong = []
    for folder, path in folders():
        for name in imports(path):
            ours, *parts = name.split(".")
            known = ours == "calib_guidance" and parts and parts[0] in FLOORS
            if known and FLOORS.index(parts[0]) > FLOORS.index(folder):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_only_the_top_knows_lightning():
    knowing = {folder for folder, path in folders() if any(name.split(".")[0] == "lightning" for name in imports(path))}
    assert knowing <= KNOW_LIGHTNING


def test_scores_know_no_diffusion():
    for path in (ROOT / "scores").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("calib_guidance")}
        assert all(name.startswith("calib_guidance.scores") for name in ours)


def test_networks_know_no_files():
    """Architectures know neither weights files nor the names of published models."""
    for path in (ROOT / "networks").glob("*.py"):
        assert not {"safetensors", "pickle", "huggingface_hub", "pathlib", "os"} & {
            n.split(".")[0] for n in imports(path)
        }
