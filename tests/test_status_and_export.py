"""What `calib-guidance status` and `calib-guidance export` say of a folder, and make of it."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from calib_guidance.cli import main
from calib_guidance.runs import RunFolder
from calib_guidance.runs.integrity import checked_json
from tests.conftest import ROOT
from tests.runs import flip, refused


def image(index, channels=3, size=4):
    """An image that only that sample has."""
    return np.random.default_rng(index).integers(0, 256, (size, size, channels), dtype=np.uint8)


def table(indices, channels=3, size=4):
    def png(index):
        buffer = io.BytesIO()
        pixels = image(index, channels, size)
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    numbers = {"index": list(indices), "label": [i % 3 for i in indices], "seed": [0 for _ in indices]}
    features = datasets.Features(dict.fromkeys(numbers, datasets.Value("int64")) | {"image": datasets.Image()})
    columns = numbers | {"image": [png(i) for i in indices]}
    return pa.Table.from_pydict(columns, schema=features.arrow_schema)


def make(folder, num_samples=10, shard_size=4, shards=None, failed=(), **image_options):
    """A folder in which those of its shards are done; half a second a sample."""
    run = RunFolder(folder, shard_size, num_samples)
    run.begin({"seed": 0}, {})
    for number, shard in enumerate(run.shards()):
        if shards is None or number in shards:
            assert run.claims.acquire(shard)
            good = [i for i in shard if i not in failed]
            bad = [{"index": i, "step": 17.0, "reason": "not finite"} for i in shard if i in failed]
            run.write(shard, table(good, **image_options), failed=bad, seconds=len(shard) / 2, device="cpu")
    return run


def look(folder, capsys, *arguments, status=0):
    """The survey, and what people read, of a folder with that exit status."""
    answers = []
    for more in ((), ("--json",)):
        try:
            main(["status", str(folder), *arguments, *more])
            code = 0
        except SystemExit as stop:
            code = stop.code
        assert code == status
        answers.append(capsys.readouterr().out)
    return json.loads(answers[1]), answers[0]


# status


def test_a_complete_folder(tmp_path, capsys):
    make(tmp_path)
    found, text = look(tmp_path, capsys, "--verify")
    assert found["complete"]
    assert found["sound"]
    assert found["samples"] == {"requested": 10, "written": 10, "failed": 0, "remaining": 0}
    assert found["shards"] == {"size": 4, "all": 3, "done": 3, "claimed": 0, "open": 0, "corrupted": 0}
    assert found["images_per_second"]["one_worker"] == 2.0
    assert text.splitlines()[-1] == "complete"


def test_what_is_left_and_how_long_it_takes(tmp_path, capsys):
    make(tmp_path, num_samples=400, shards=range(3))
    found, text = look(tmp_path, capsys, status=1)
    assert found["samples"] == {"requested": 400, "written": 12, "failed": 0, "remaining": 388}
    assert [(found["open"][i]["first"], found["open"][i]["last"]) for i in (0, -1)] == [(12, 15), (396, 399)]
    assert found["seconds_left"] == 194.0  # none is active: the pace of one, two images a second
    assert "  12–399\n" in text
    assert text.splitlines()[-1] == "388 samples are left: 3 min with one worker like these; none is active"


def test_who_works_on_what(tmp_path, capsys):
    """Alive, dead on this machine, and out of its lease on another."""
    run = make(tmp_path, num_samples=20, shards=[0])
    for shard in run.shards()[1:4]:
        assert run.claims.acquire(shard)
    for number, claim in ((2, "claims/00000008"), (3, "claims/00000012")):
        content = json.loads((tmp_path / claim).read_text())
        place, pid, started, name = content["worker"].split("-")
        worker = {2: f"{place}-{pid}-1{started}-{name}", 3: f"00000000-{pid}-{started}-{name}"}[number]
        (tmp_path / claim).write_bytes(checked_json(content | {"worker": worker, "host": "elsewhere"}))
    os.utime(tmp_path / "claims/00000012", (1, 1))
    found, text = look(tmp_path, capsys, status=1)
    assert [(claim["first"], claim["alive"]) for claim in found["claims"]] == [(4, True), (8, False), (12, False)]
    assert found["shards"] == {"size": 4, "all": 5, "done": 1, "claimed": 1, "open": 3, "corrupted": 0}
    assert found["images_per_second"] == {"one_worker": 2.0, "active_workers": 2.0}
    assert found["seconds_left"] == 8.0
    assert f"4–7 by process {os.getpid()} on" in text
    assert "8 s at the pace of the active workers" in text
    (worker,) = found["workers"]
    assert worker["active"]


def test_failed_samples_are_named(tmp_path, capsys):
    make(tmp_path, failed={5})
    found, text = look(tmp_path, capsys)
    assert found["complete"]
    assert found["samples"] == {"requested": 10, "written": 9, "failed": 1, "remaining": 0}
    assert found["failed"] == [{"index": 5, "step": 17.0, "reason": "not finite"}]
    assert "sample 5, t = 17: not finite" in text


DAMAGE = {
    "a flipped byte": (lambda folder: flip(folder / "samples/00000004.parquet"), "its checksum is wrong"),
    "a truncated file": (
        lambda folder: os.truncate(folder / "samples/00000004.parquet", 100),
        "has 100 bytes, its record says",
    ),
    "a missing file": (lambda folder: (folder / "samples/00000004.parquet").unlink(), "00000004.parquet is missing"),
    "a record cut in half": (lambda folder: os.truncate(folder / "shards/00000004.json", 50), "cannot be read"),
    "a record with another number": (
        lambda folder: (folder / "shards/00000004.json").write_text(
            (folder / "shards/00000004.json").read_text().replace('"rows": 4', '"rows": 3')
        ),
        "its checksum is wrong",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(tmp_path, capsys, damage):
    make(tmp_path)
    spoil, reason = DAMAGE[damage]
    spoil(tmp_path)
    found, text = look(tmp_path, capsys, "--verify", status=3)
    assert [(d["first"], d["last"]) for d in found["corrupted"]] == [(4, 7)]
    assert reason in found["corrupted"][0]["reason"]
    assert found["samples"] == {"requested": 10, "written": 6, "failed": 0, "remaining": 4}  # it does not count
    assert reason in text
    for form in ("npz", "png", "hf"):
        message = refused(capsys, "export", tmp_path, "--to", form, "--output", tmp_path / "out")
        assert "00000004" in message or "4–7" in message
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "samples", "shards", "claims"}  # nothing half made
    main(["export", str(tmp_path), "--to=npz", "--partial"])
    with np.load(tmp_path / "samples_6x4x4x3.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], np.stack([image(i) for i in (0, 1, 2, 3, 8, 9)]))


def test_foreign_files_are_named_and_not_counted(tmp_path, capsys):
    make(tmp_path)
    other = tmp_path / "samples/00000002.parquet"  # no shard begins there
    other.write_bytes((tmp_path / "samples/00000004.parquet").read_bytes())
    found, text = look(tmp_path, capsys, status=3)
    assert found["foreign"] == [str(other)]
    assert found["samples"]["written"] == 10
    assert str(other) in text
    main(["export", str(tmp_path), "--to=npz"])
    assert (tmp_path / "samples_10x4x4x3.npz").is_file()


def test_what_cannot_be_read(tmp_path, capsys):
    assert "holds no run" in refused(capsys, "status", tmp_path)
    (tmp_path / "file").touch()
    assert "file/run.json: Not a directory" in refused(capsys, "status", tmp_path / "file")
    make(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{")
    assert "run.json is corrupted" in refused(capsys, "status", tmp_path / "run")


def test_looking_needs_no_lightning(tmp_path):
    make(tmp_path)
    program = "import sys; from calib_guidance.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["status", tmp_path], ["export", tmp_path, "--to=npz"]):
        words = [sys.executable, "-c", program, *map(str, words)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"


# export


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_numpy_saves(tmp_path, channels):
    make(tmp_path, num_samples=150, shard_size=70, channels=channels)
    main(["export", str(tmp_path), "--to=npz"])
    path = tmp_path / f"samples_150x4x4x{channels}.npz"
    images, labels = np.stack([image(i, channels) for i in range(150)]), np.arange(150) % 3
    with np.load(path) as found:
        assert set(found.files) == {"arr_0", "arr_1"}
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], images)
        np.testing.assert_array_equal(found["arr_1"], labels)
    np.savez(tmp_path / "numpy.npz", images, labels)
    with zipfile.ZipFile(path) as mine, zipfile.ZipFile(tmp_path / "numpy.npz") as numpys:
        assert mine.testzip() is None
        for name in ("arr_0.npy", "arr_1.npy"):
            assert mine.read(name) == numpys.read(name)  # byte for byte, headers too
            assert mine.getinfo(name).compress_type == zipfile.ZIP_STORED


def test_memory_is_bounded(tmp_path):
    """Ten times the samples do not take more memory: peak of Python's and numpy's allocations."""
    peaks = []
    for number in (200, 2000):
        make(tmp_path / str(number), num_samples=number, shard_size=100, size=32)
        tracemalloc.start()
        main(["export", str(tmp_path / str(number)), "--to=npz"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]
    assert peaks[1] < 2000 * 32 * 32 * 3 / 4


def test_png_by_class(tmp_path, capsys):
    make(tmp_path, failed={4})
    main(["export", str(tmp_path), "--to=png"])
    assert "wrote 9 samples to" in (said := capsys.readouterr().out)
    assert "1 samples failed" in said
    found = {p.relative_to(tmp_path / "samples_png").as_posix(): p for p in tmp_path.glob("samples_png/*/*")}
    assert set(found) == {f"{i % 3:04d}/{i:08d}.png" for i in range(10) if i != 4}
    for path in found.values():
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image(int(path.stem)))


def test_png_by_name(tmp_path, capsys):
    make(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("hen\nowl\ngreat tit\n")
    main(["export", str(tmp_path), "--to=png", f"--names={names}", f"--output={tmp_path / 'birds'}"])
    assert sorted(p.name for p in (tmp_path / "birds/great tit").iterdir()) == [f"{i:08d}.png" for i in (2, 5, 8)]
    capsys.readouterr()
    for text, message in (
        ("hen\nowl\n", "sample 2 is of class 2, and --names has 2 names"),
        ("hen\nhen\nowl\n", "two classes 'hen'"),
        ("hen\n../owl\ntit\n", "is not a folder name"),
    ):
        names.write_text(text)
        assert message in refused(capsys, "export", tmp_path, "--to=png", f"--names={names}", f"--output={tmp_path}/x")
    assert "is for --to png" in refused(capsys, "export", tmp_path, "--to=npz", f"--names={names}")
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "samples", "shards", "claims", "names.txt", "birds"}


def test_hf_is_a_dataset(tmp_path):
    make(tmp_path, num_samples=150, shard_size=70)
    main(["export", str(tmp_path), "--to=hf"])
    found = datasets.load_from_disk(str(tmp_path / "samples_hf"))
    assert found["index"][:] == list(range(150))
    assert found["label"][:] == [i % 3 for i in range(150)]
    assert isinstance(found.features["image"], datasets.Image)
    for row in (0, 69, 70, 149):
        np.testing.assert_array_equal(np.asarray(found[row]["image"]), image(row))
    make(tmp_path / "longer", num_samples=151, shard_size=70)
    main(["export", str(tmp_path / "longer"), "--to=hf"])  # what datasets caches goes by the fingerprint
    assert datasets.load_from_disk(str(tmp_path / "longer/samples_hf"))._fingerprint != found._fingerprint


def test_a_shard_that_is_lost(tmp_path):
    make(tmp_path, failed={4, 5, 6, 7})
    for form in ("npz", "png", "hf"):
        main(["export", str(tmp_path), f"--to={form}"])
    with np.load(tmp_path / "samples_6x4x4x3.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], [0, 1, 2, 0, 2, 0])
    assert datasets.load_from_disk(str(tmp_path / "samples_hf"))["index"][:] == [0, 1, 2, 3, 8, 9]


def test_incomplete_folders_need_a_word(tmp_path, capsys):
    make(tmp_path, shards=[0, 2])
    message = refused(capsys, "export", tmp_path, "--to=npz")
    assert "4 of 10 samples are missing or corrupted, the first in 4–7 (not made yet)" in message
    main(["export", str(tmp_path), "--to=npz", "--partial"])
    assert "4 of 10 are not made yet" in capsys.readouterr().out
    with np.load(tmp_path / "samples_6x4x4x3.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], [0, 1, 2, 0, 2, 0])
    make(tmp_path / "empty", shards=[])
    assert "holds no samples yet" in refused(capsys, "export", tmp_path / "empty", "--to=npz", "--partial")


def test_nothing_is_overwritten(tmp_path, capsys):
    make(tmp_path)
    for form, name in (("npz", "samples_10x4x4x3.npz"), ("png", "samples_png"), ("hf", "samples_hf")):
        main(["export", str(tmp_path), f"--to={form}"])
        before = (tmp_path / name).stat().st_mtime_ns
        assert f"{name} exists already" in refused(capsys, "export", tmp_path, f"--to={form}")
        assert (tmp_path / name).stat().st_mtime_ns == before
    message = refused(capsys, "export", tmp_path, "--to=npz", f"--output={tmp_path}/run.json/x.npz")
    assert "run.json: exists, and is not a folder" in message
