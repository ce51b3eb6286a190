"""The benchmarks can be started, and their comparison names what got slower. How long anything takes is not tested."""

import importlib
import json
import sys

import pytest

from calib_guidance.backend.cost import GPUS
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.networks import SmallResNet
from tests.conftest import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a benchmark by name, as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "timing"))
def test_each_finds_what_it_uses_and_says_its_options(benchmark, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        benchmark(name).main()
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_forms_take_turns_and_the_first_round_does_not_count(benchmark):
    calls = []
    times = benchmark("timing").in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "ab" * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def file(path, machine="m", **ratios):
    path.write_text(json.dumps({"step": {"machine": machine, "torch": "t", "ratios": ratios}}))
    return str(path)


@pytest.mark.parametrize(
    ("now", "is_slower"),
    [
        ([1.2, 1.1, 1.3, 5], True),
        ([1.2, 1.1, 1.6, 5], False),
        ([1.4, 1.38, 1.42, 5], False),
        ([2.0, 1.9, 2.1, 5], False),
    ],
    ids=["below", "spreads overlap", "within a tenth", "faster"],
)
def test_what_got_slower_is_named(benchmark, monkeypatch, capsys, tmp_path, now, is_slower):
    known = file(tmp_path / "baseline.json", network=[1.5, 1.45, 1.55, 5], gone=[1.0, 1.0, 1.0, 5])
    new = file(tmp_path / "new.json", network=now, new=[3.0, 3.0, 3.0, 5])
    monkeypatch.setattr(sys, "argv", ["compare.py", new, "--baseline", known])
    if is_slower:
        with pytest.raises(SystemExit, match=r"step: network is 0\.80 of what it was"):
            benchmark("compare").main()
    else:
        benchmark("compare").main()
    out = capsys.readouterr().out
    assert "| new | – | 3 (3 … 3) | new |" in out
    assert "| gone | 1 (1 … 1) | – | gone |" in out
    assert ("nothing got slower" in out) is not is_slower


def test_what_is_lower_than_on_another_machine_does_not_fail(benchmark, monkeypatch, capsys, tmp_path):
    known = file(tmp_path / "baseline.json", "amx_bf16", network=[1.5, 1.45, 1.55, 5])
    new = file(tmp_path / "new.json", "AVX2", network=[1.2, 1.1, 1.3, 5])
    monkeypatch.setattr(sys, "argv", ["compare.py", new, "--baseline", known])
    benchmark("compare").main()
    out = capsys.readouterr().out
    assert "lower than on the other kind of machine:\n  step: network is 0.80 of what it was" in out
    assert "nothing got slower" not in out


def test_what_is_kept_beside_the_next_batch_is_what_is_kept_first(benchmark, in_root):
    """The benchmark compares the bytes of both forms itself."""
    module = benchmark("run_folder")
    module.beside("digits", 1, 4, 2, 2)
    assert [ratio.rounds for ratio in module.RATIOS.values()] == [1]


def test_systems_run_small(benchmark, monkeypatch, capsys):
    """Every complete system, with every guidance, as on a GPU; how fast is not asked."""
    monkeypatch.setattr(sys, "argv", ["systems.py", "--tiny", "--rounds=1", "--steps=2"])
    module = benchmark("systems")
    monkeypatch.setattr(module, "model_of", lambda device: GPUS["H100"])  # in place of a second of measuring
    module.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| ") for row in rows} == set(module.SYSTEMS)
    assert len(rows) == 2 + 4 + 4 + 4 + 2
    assert all(float(row[3]) > 0 for row in rows)


def test_predicted_memory_is_what_is_allocated(benchmark):
    """Of a gradient, whose activations are kept: without weights on the meta device, and by PyTorch's allocator on the CPU."""
    module = benchmark("gpu_path")
    part = module.Part(lambda: OffTheShelfClassifier(SmallResNet(10, 1, (16,), 2), 10), (16, 1, 16, 16), gradient=True)
    _, predicted = module.operators(part)
    assert 0.75 < module.allocated(part) / predicted < 1.25
