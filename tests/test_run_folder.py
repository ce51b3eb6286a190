"""Shards and claims, without a network: what a worker makes is a function of the index alone."""

import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from calib_guidance.backend import atomic
from calib_guidance.backend.atomic import new_worker, temporary_path
from calib_guidance.errors import ConfigurationError, StoppedError
from calib_guidance.runs import CorruptedShardError, RunFolder, integrity, read_run
from calib_guidance.runs.integrity import canonical_json, checked_json, sha256, with_checksum
from tests.runs import flip, tables

# Of a process that runs for as long as the tests.
CLAIM = {"worker": new_worker(), "host": "h", "pid": os.getpid(), "since": "2026-01-01T00:00:00+00:00"}
IDENTITY = {"model.sampler.steps": "100", "data.seed": 0, "data.labels": "balanced"}
FORK = get_context("fork")  # this module's imports are small, and a fork costs milliseconds


def begin(path, size=4, count=10, lease=600.0, identity=IDENTITY):
    folder = RunFolder(path, size, count, lease)
    folder.begin(identity, {"calib_guidance": "0"})
    return folder


def table(rows):
    buffers = []
    for index in rows:
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 3), index % 256, np.uint8)).save(buffer, format="PNG")
        buffers.append({"bytes": buffer.getvalue(), "path": None})
    return pa.table({"image": buffers, "index": list(rows), "label": [i % 10 for i in rows]})


def make(folder, shard):
    return folder.write(shard, table(shard), {"sums": np.array([sum(shard)], np.float64)}, seconds=1.0)


def work(path, size, count, pause=0.0, lease=600.0, together=None):
    folder = begin(path, size, count, lease)
    if together is not None:
        together.wait()
    for shards in (folder.take(), folder.reclaim(0.01)):
        for shard in shards:
            time.sleep(pause)
            make(folder, shard)


def write_later(path, content):
    time.sleep(0.1)
    path.write_bytes(content)


def take_all(path):
    folder = begin(path, size=4, count=6)
    for shard in folder.take():
        make(folder, shard)


@pytest.mark.parametrize("first", [lambda path: begin(path, size=4, count=6), take_all], ids=["begins", "works"])
def test_another_worker_may_do_everything_between_any_two_system_calls(tmp_path, first, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def other_before(number, path):
        """Whether the first worker makes so many calls; the other one works right before that one."""
        calls = itertools.count()

        def look(frame, event, function):
            if event == "c_call" and function.__module__ in ("posix", "_io", "io") and next(calls) == number:
                sys.setprofile(None)
                take_all(path)

        sys.setprofile(look)
        try:
            first(path)
        finally:
            sys.setprofile(None)
        take_all(path)
        assert states(begin(path, size=4, count=6), verify=True) == ["done"] * 2
        return next(calls) > number

    count = next(n for n in itertools.count() if not other_before(n, tmp_path / str(n)))
    assert count > 10


def symlink_to_claim(path):
    real = path.with_name("real")
    real.write_bytes(checked_json(CLAIM))
    path.symlink_to(real)


def states(folder, verify=False):
    return [folder.state(shard, verify).name for shard in folder.shards()]


def test_a_run_is_cut_into_shards_and_made_in_order(tmp_path):
    folder = begin(tmp_path)
    assert folder.shards() == [range(0, 4), range(4, 8), range(8, 10)]
    assert states(folder) == ["open"] * 3
    taken = []
    for shard in folder.take():
        taken.append(shard)
        assert folder.state(shard).name == "claimed"
        assert make(folder, shard)
    assert taken == folder.shards()
    assert states(folder, verify=True) == ["done"] * 3
    assert folder.remaining() == folder.foreign() == list(folder.take()) == list(folder.reclaim()) == []
    assert not list((tmp_path / "claims").iterdir())
    found = folder.read(range(4, 8))
    assert found["index"].tolist() == [4, 5, 6, 7]
    assert found["image"].shape == (4, 1, 2, 3)
    assert found["image"][:, 0, 0, 0].tolist() == [4, 5, 6, 7]
    assert folder.read_sums(range(8, 10))["sums"].tolist() == [17]
    record = folder.record(range(8, 10))
    assert (record["first"], record["requested"], record["rows"], record["failed"]) == (8, 2, 2, [])
    assert RunFolder.open(tmp_path).shards() == folder.shards()


def test_samples_of_another_shard_are_not_written(tmp_path):
    folder = begin(tmp_path)
    assert folder.claims.acquire(range(0, 4))
    with pytest.raises(ValueError, match="expected the samples of"):
        folder.write(range(0, 4), table([0, 1, 2, 2]))
    with pytest.raises(ValueError, match="expected the samples of"):
        folder.write(range(0, 4), table([0, 1, 2]))
    assert states(folder)[0] == "claimed"
    assert folder.write(range(0, 4), table([0, 1, 3]), failed=[{"index": 2, "step": 7, "reason": "NaN"}])
    assert folder.record(range(0, 4))["failed"] == [{"index": 2, "step": 7, "reason": "NaN"}]


class TestIdentity:
    def test_another_is_refused_naming_keys_and_values(self, tmp_path):
        work(tmp_path, 4, 10)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(ConfigurationError) as error:
            begin(tmp_path, identity={"model.sampler.steps": "50", "data.seed": 0, "model.guidance.scale": 2.0})
        message = str(error.value)
        assert "model.sampler.steps: 100 in the folder, now 50" in message
        assert "model.guidance.scale: (not set) in the folder, now 2.0" in message
        assert "data.labels: balanced in the folder, now (not set)" in message
        assert "data.seed" not in message
        with pytest.raises(ConfigurationError, match="shard_size: 4 in the folder, now 5"):
            begin(tmp_path, size=5)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def test_more_samples_extend_and_regenerate_a_short_tail(self, tmp_path):
        work(tmp_path, 4, 10)
        for name in ("metrics.json", "plots/samples.png", "mine.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("of 10 samples")
        folder = begin(tmp_path, count=17)
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", "samples", "shards", "claims", "mine.json"}
        assert states(folder) == ["done", "done", "open", "open", "open"]
        assert folder.state(range(8, 12)).reason == "made with 2 samples, and 4 are requested now"
        work(tmp_path, 4, 17)
        work(tmp_path / "once", 4, 17)
        assert tables(tmp_path) == tables(tmp_path / "once")

    def test_fewer_samples_are_a_finished_run(self, tmp_path):
        """All but a shard that is cut: it is made again, and those beyond are kept and not counted."""
        work(tmp_path, 4, 20)
        every = tables(tmp_path)
        (tmp_path / "metrics.json").write_text("of 20 samples")
        process = FORK.Process(target=lambda: begin(tmp_path, count=20).claims.acquire(range(16, 20)))
        process.start()
        process.join()
        folder = begin(tmp_path, count=12)
        assert states(folder, verify=True) == ["done"] * 3
        assert folder.foreign() == []
        assert folder.surplus() == [range(12, 16), range(16, 20)]
        assert RunFolder.open(tmp_path).num_requests == 12
        assert not (tmp_path / "metrics.json").exists()
        assert states(begin(tmp_path, count=10)) == ["done", "done", "open"]
        work(tmp_path, 4, 10)
        work(tmp_path / "once", 4, 10)
        assert tables(tmp_path) == every | tables(tmp_path / "once")
        work(tmp_path, 4, 20)
        assert tables(tmp_path) == every

    def test_fewer_samples_wait_for_workers(self, tmp_path):
        working = begin(tmp_path, count=20)
        working.claims.acquire(range(4, 8))
        assert begin(tmp_path, count=10).extended().num_requests == 20
        working.claims.release()
        assert begin(tmp_path, count=10).extended().num_requests == 10

    def test_restart_removes_what_a_run_writes_and_says_so(self, tmp_path):
        work(tmp_path, 4, 10)
        ours = ("metrics.json", "config.yaml", "plots/samples.png", "evaluation/metrics.json")
        theirs = (
            "samples/mine.txt",
            "samples/a.parquet",
            "samples/0000.parquet",
            "shards/mine/note",
            "claims/00000000.old",
        )
        theirs += ("plots/mine.png", "mine.json", "samples_png/0000/00000000.png")
        for name in (*ours, *theirs):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("?")
        said = RunFolder(tmp_path, 1, 1).remove()
        assert said == "shards (6), samples (3), metrics.json, plots (1), config.yaml, evaluation (1), run.json"
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(theirs)
        assert RunFolder(tmp_path, 1, 1).remove() == ""

    def test_samples_without_identity_are_refused_and_those_with_a_record_removed(self, tmp_path):
        work(tmp_path, 4, 10)
        (tmp_path / "run.json").unlink()
        with pytest.raises(ConfigurationError, match="no run.json"):
            begin(tmp_path)
        (tmp_path / "samples/00000012.parquet").write_text("somebody's")
        assert RunFolder(tmp_path, 4, 10).remove() == "shards (6), samples (3)"
        assert list(tables(tmp_path)) == ["00000012.parquet"]
        with pytest.raises(ConfigurationError, match="holds 1 files of samples"):
            begin(tmp_path)

    @pytest.mark.parametrize("name", ["samples", "shards", "claims", "plots", "evaluation"])
    def test_restart_removes_nothing_through_links(self, tmp_path, name):
        work(tmp_path / "run", 4, 10)
        work(tmp_path / "other", 4, 10)
        (tmp_path / "other" / name).mkdir(exist_ok=True)
        (tmp_path / "other" / name / "metrics.json").write_text("?")
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "other" / name)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigurationError, match=f"run/{name} is a link"):
            RunFolder(tmp_path / "run", 4, 10).remove()
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_run_that_somebody_works_on_is_not_removed(self, tmp_path):
        folder = begin(tmp_path)
        folder.claims.acquire(range(4, 8))
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()} on .* works on it"):
            RunFolder(tmp_path, 4, 10).remove()
        folder.claims.release()
        RunFolder(tmp_path, 4, 10).remove()
        assert read_run(tmp_path) is None

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{}",
            "[]",
            '{"format": 3, "identity": {}, "fingerprint": "0"}',
            '{"format": 2}',
            "[" * 100_000,
            '{"a":' * 100_000,
        ],
    )
    def test_a_corrupted_run_json_is_said_to_be_one(self, tmp_path, content):
        begin(tmp_path)
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ConfigurationError, match="run.json is corrupted"):
            begin(tmp_path)
        with pytest.raises(ConfigurationError, match="holds no run"):
            RunFolder.open(tmp_path / "none")

    @pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
    def test_run_json_must_be_a_file(self, tmp_path, put):
        begin(tmp_path)
        (tmp_path / "run.json").unlink()
        put(tmp_path / "run.json")
        for look in (RunFolder.open, begin):
            with pytest.raises(ConfigurationError, match="not a regular file"):
                look(tmp_path)

    def test_an_empty_run_json_is_being_written(self, tmp_path, monkeypatch):
        """By a worker on a file system without hard links."""
        monkeypatch.setattr(integrity, "_WRITTEN_WITHIN", 60.0)
        begin(tmp_path)
        file = tmp_path / "run.json"
        content = file.read_bytes()
        file.write_bytes(b"")
        with FORK.Pool(1) as pool:
            written = pool.apply_async(write_later, (file, content))
            begin(tmp_path)
            written.get()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            *(({"shard_size": n}, "num_samples and shard_size must be at least 1") for n in (-4, 0)),
            *(({"num_samples": n}, "num_samples and shard_size must be at least 1") for n in (-10, 0)),
            ({"num_samples": 10**30}, "are more than 1,000,000 files"),
            *(({"shard_size": n}, "shard_size is") for n in (4.0, "4", None, True)),
            *(({name: ...}, f"{name} is 'missing'") for name in ("identity", "num_samples", "versions", "created")),
            ({"identity": ["a"]}, "identity is"),
        ],
    )
    def test_every_field_is_checked(self, tmp_path, changes, said):
        """Of a run.json with right checksums."""
        begin(tmp_path)
        content = json.loads((tmp_path / "run.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        if "identity" in content:
            content["fingerprint"] = sha256(canonical_json(content["identity"]))
        (tmp_path / "run.json").write_text(json.dumps(with_checksum(content)))
        for look in (RunFolder.open, begin, read_run):
            with pytest.raises(ConfigurationError, match=said):
                look(tmp_path)

    def test_a_changed_number_is_found(self, tmp_path):
        begin(tmp_path)
        text = (tmp_path / "run.json").read_text()
        (tmp_path / "run.json").write_text(text.replace('"num_samples": 10', '"num_samples": 8'))
        with pytest.raises(ConfigurationError, match="its checksum is wrong"):
            RunFolder.open(tmp_path)


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "said", "only_verified"),
        [
            (lambda p: flip(p / "samples/00000004.parquet"), "its checksum is wrong", True),
            (lambda p: os.truncate(p / "samples/00000004.parquet", 100), "has 100 bytes", False),
            (lambda p: (p / "samples/00000004.parquet").unlink(), "00000004.parquet is missing", False),
            (lambda p: flip(p / "shards/00000004.json", 30), "00000004.json cannot be read", False),
            (lambda p: (p / "shards/00000004.json").write_text("[]"), "00000004.json cannot be read", False),
            (
                lambda p: flip(p / "shards/00000004.safetensors", -3),
                "00000004.safetensors is not what was written",
                False,
            ),
            (lambda p: (p / "shards/00000004.safetensors").unlink(), "00000004.safetensors is missing", False),
        ],
    )
    def test_it_is_found_and_only_that_shard_regenerated(self, tmp_path, damage, said, only_verified):
        work(tmp_path, 4, 10)
        before, folder, shard = tables(tmp_path), begin(tmp_path), range(4, 8)
        damage(tmp_path)
        assert states(folder, verify=True) == ["done", "corrupted", "done"]
        assert said in folder.state(shard, verify=True).reason
        assert folder.state(shard).name == ("done" if only_verified else "corrupted")
        with pytest.raises(CorruptedShardError, match=said):
            folder.read(shard)
        made = []
        for each in folder.take():
            made.append(each)
            make(folder, each)
        assert made == [shard]
        assert states(folder, verify=True) == ["done"] * 3
        assert tables(tmp_path) == before

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            (("one", "00000000"), "00000004.json is the record of the shard that starts at 0"),
            (("other", "00000004"), "00000004.json is the record of another run"),
        ],
    )
    def test_a_shard_that_was_copied_here_does_not_count(self, tmp_path, source, said):
        """Its checksums are right, and its samples are others'."""
        for name, seed in (("one", 0), ("other", 1)):
            other = begin(tmp_path / name, identity=IDENTITY | {"data.seed": seed})
            for shard in other.take():
                make(other, shard)
        before, folder = tables(tmp_path / "one"), begin(tmp_path / "one")
        for part in ("samples/{}.parquet", "shards/{}.json", "shards/{}.safetensors"):
            shutil.copy(tmp_path / source[0] / part.format(source[1]), tmp_path / "one" / part.format("00000004"))
        for each in (folder, RunFolder.open(tmp_path / "one")):
            assert states(each) == ["done", "corrupted", "done"]
            assert each.state(range(4, 8)).reason == said
        for shard in folder.take():
            make(folder, shard)
        assert states(folder, verify=True) == ["done"] * 3
        assert tables(tmp_path / "one") == before

    def test_a_record_with_another_field_is_found(self, tmp_path):
        work(tmp_path, 4, 10)
        path = tmp_path / "shards/00000004.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": 3}))
        assert states(RunFolder.open(tmp_path)) == ["done", "corrupted", "done"]
        work(tmp_path, 4, 10)
        assert states(RunFolder.open(tmp_path), verify=True) == ["done"] * 3

    @pytest.mark.parametrize(
        "changes",
        [
            {"rows": 3},
            {"rows": 5, "failed": []},
            {"rows": -1, "requested": -1},
            {"requested": 0, "rows": 0},
            {"requested": 40, "rows": 40},
            {"requested": 10**15, "rows": 10**15},
            {"rows": 3, "failed": [{"index": 99, "step": None, "reason": "?"}]},
            {"rows": 3, "failed": ["?"]},
            {"rows": 3, "failed": [{"index": 4, "step": "?", "reason": "?"}]},
            {"bytes": -1},
            {"seconds": float("nan")},
            {"seconds": "1"},
            {"sha256": None},
            {"worker": ...},
            {"run": 7},
            {"rows": 2, "failed": [{"index": i, "step": None, "reason": "lost"} for i in (4, 5)]},  # not the table's
        ],
    )
    def test_every_field_of_a_record_is_checked(self, tmp_path, changes):
        """Of a record with the right checksum."""
        work(tmp_path, 4, 10)
        path = tmp_path / "shards/00000004.json"
        record = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
        path.write_text(json.dumps(with_checksum(record)))
        folder = RunFolder.open(tmp_path)
        assert states(folder, verify=True) == ["done", "corrupted", "done"]
        assert folder.remaining(verify=True) == [range(4, 8)]
        work(tmp_path, 4, 10)
        assert states(folder, verify=True) == ["done"] * 3

    @pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
    def test_a_record_must_be_a_file(self, tmp_path, put):
        work(tmp_path, 4, 10)
        (tmp_path / "shards/00000004.json").unlink()
        put(tmp_path / "shards/00000004.json")
        assert states(RunFolder.open(tmp_path)) == ["done", "corrupted", "done"]

    def test_a_table_without_a_record_does_not_count(self, tmp_path):
        work(tmp_path, 4, 10)
        (tmp_path / "shards/00000004.json").unlink()
        folder = begin(tmp_path)
        assert states(folder) == ["done", "open", "done"]
        with pytest.raises(CorruptedShardError, match="has no record"):
            folder.read(range(4, 8))

    def test_foreign_files_are_named(self, tmp_path):
        work(tmp_path, 4, 10)
        names = [
            "samples/a.parquet",
            "samples/00000002.parquet",
            "samples/00000012.parquet",
            "shards/00000004.txt",
            "claims/x",
        ]
        for name in names:
            (tmp_path / name).write_text("?")
        folder = begin(tmp_path)
        assert sorted(str(p.relative_to(tmp_path)) for p in folder.foreign()) == sorted(names)
        assert folder.remaining() == []


class TestClaims:
    def test_one_of_many_gets_it(self, tmp_path):
        folders = [begin(tmp_path) for _ in range(8)]
        start, won = threading.Barrier(8), []

        def attempt(folder):
            start.wait()
            for shard in folder.shards():
                if folder.claims.acquire(shard):
                    won.append((shard, folder))

        threads = [threading.Thread(target=attempt, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(shard.start for shard, _ in won) == [0, 4, 8]
        for shard, folder in won:
            assert [f for f in folders if f.claims.holds(shard)] == [folder]

    def test_without_hard_links_too(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
        first, second = begin(tmp_path), begin(tmp_path)
        assert first.claims.acquire(range(0, 4))
        assert not second.claims.acquire(range(0, 4))
        (tmp_path / "claims/00000004").touch()  # created and not yet written
        assert not second.claims.acquire(range(4, 8))
        os.utime(tmp_path / "claims/00000004", (0, 0))
        assert second.claims.acquire(range(4, 8))

    @pytest.mark.parametrize(
        "put",
        [
            lambda path: path.write_text("?"),
            lambda path: path.write_text("{}"),
            lambda path: path.write_text("[" * 9_000),
            lambda path: path.write_bytes(bytes(20_000)),
            lambda path: path.write_text(json.dumps(CLAIM)),
            lambda path: path.write_bytes(checked_json(CLAIM | {"worker": "a-b-c-d"})),
            lambda path: path.write_bytes(checked_json(CLAIM | {"worker": 1})),
            lambda path: path.write_bytes(checked_json(CLAIM | {"pid": "1"})),
            lambda path: path.write_bytes(checked_json({"worker": CLAIM["worker"]})),
            lambda path: path.write_bytes(checked_json(CLAIM | {"since": " " * 20_000})),
            lambda path: symlink_to_claim(path),
            lambda path: path.symlink_to("nowhere"),
            lambda path: path.symlink_to(path.parent),
            lambda path: path.mkdir(),
            os.mkfifo,
        ],
    )
    def test_what_no_worker_wrote_is_replaced_with_a_message(self, tmp_path, caplog, put):
        folder, path = begin(tmp_path), tmp_path / "claims/00000004"
        put(path)
        assert folder.state(range(4, 8)) == ("open", "its claim is damaged")
        assert folder.claims.acquire(range(4, 8))
        assert "claims/00000004 is not a claim that a worker wrote: replaced" in caplog.text
        assert make(folder, range(4, 8))
        work(tmp_path, 4, 10)
        assert states(folder) == ["done"] * 3

    def test_the_claim_above_is_one_but_for_its_faults(self, tmp_path):
        folder = begin(tmp_path)
        (tmp_path / "claims/00000004").write_bytes(checked_json(CLAIM))
        assert folder.state(range(4, 8)).name == "claimed"
        assert not folder.claims.acquire(range(4, 8))

    def test_a_claim_of_the_future_is_not_a_sign_of_life(self, tmp_path, monkeypatch):
        monkeypatch.setattr(atomic, "_machine", lambda: "elsewhere")
        assert begin(tmp_path, lease=60).claims.acquire(range(0, 4))
        monkeypatch.undo()
        here = begin(tmp_path, lease=60)
        assert not here.claims.acquire(range(0, 4))
        os.utime(tmp_path / "claims/00000000", (time.time() + 3600, time.time() + 3600))
        assert here.claims.acquire(range(0, 4))

    def test_a_dead_process_is_found_at_once(self, tmp_path):
        process = FORK.Process(target=lambda: begin(tmp_path).claims.acquire(range(0, 4)))
        process.start()
        process.join()
        folder = begin(tmp_path)
        assert folder.claims.of(range(0, 4)).alive is False
        assert folder.state(range(0, 4)) == ("open", f"process {process.pid} on {os.uname().nodename} died")
        assert folder.claims.acquire(range(0, 4))

    def test_on_another_machine_the_lease_decides(self, tmp_path, monkeypatch):
        other = begin(tmp_path, lease=60)
        monkeypatch.setattr(atomic, "_machine", lambda: "elsewhere")
        here = begin(tmp_path, lease=60)
        monkeypatch.undo()
        assert here.claims.acquire(range(0, 4))
        assert other.claims.of(range(0, 4)).alive is None
        assert not other.claims.acquire(range(0, 4))
        path = tmp_path / "claims/00000000"
        os.utime(path, (time.time() - 59, time.time() - 59))
        assert not other.claims.acquire(range(0, 4))
        os.utime(path, (time.time() - 61, time.time() - 61))
        assert other.claims.acquire(range(0, 4))
        # The one that was thought dead throws away what it made.
        assert not make(here, range(0, 4))
        assert other.claims.holds(range(0, 4))
        here.claims.release(range(0, 4))
        assert make(other, range(0, 4))

    def test_renewing_keeps_it(self, tmp_path):
        folder = begin(tmp_path, lease=0.0)
        folder.claims.acquire(range(0, 4))
        path = tmp_path / "claims/00000000"
        os.utime(path, (0, 0))
        folder.claims.renew()
        assert path.stat().st_mtime > time.time() - 10

    def test_a_live_worker_is_not_waited_for_and_a_dead_one_reclaimed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(atomic, "_machine", lambda: "elsewhere")
        dead, alive = begin(tmp_path, lease=1.0), begin(tmp_path, lease=1.0)
        monkeypatch.undo()
        dead.claims.acquire(range(0, 4))
        alive.claims.acquire(range(4, 8))
        here = begin(tmp_path, lease=1.0)
        assert [make(here, shard) for shard in here.take()] == [True]
        renewing = threading.Timer(0.3, os.utime, args=(tmp_path / "claims/00000004",))
        renewing.start()
        assert [(shard, make(here, shard)) for shard in here.reclaim(0.05)] == [(range(0, 4), True)]
        assert states(here)[0::2] == ["done", "done"]

    def test_what_dead_workers_left_is_tidied(self, tmp_path):
        def die():
            folder = begin(tmp_path)
            folder.claims.acquire(range(0, 4))
            folder.claims.acquire(range(4, 8))
            make(folder, range(0, 4))
            folder.claims.acquire(range(0, 4))
            temporary_path(tmp_path / "samples/00000004.parquet").write_text("half")
            export = temporary_path(tmp_path / "samples_png")
            export.mkdir()
            (export / "0.png").write_text("half")
            os._exit(0)

        process = FORK.Process(target=die)
        process.start()
        process.join()
        assert len(list(tmp_path.rglob(".*.tmp"))) == 2
        mine = temporary_path(tmp_path / "samples/00000008.parquet")
        mine.write_text("half")
        exporting = temporary_path(tmp_path / "samples_png")
        exporting.mkdir()
        begin(tmp_path)
        assert set(tmp_path.rglob(".*.tmp")) == {mine, exporting}
        assert [p.name for p in (tmp_path / "claims").iterdir()] == ["00000004"]


class TestErrorsWhileWorking:
    """Each ends the run with what is complete kept, and with a cure."""

    @pytest.mark.parametrize("number", [errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT])
    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch, number):
        folder = begin(tmp_path)
        first, second = itertools.islice(folder.take(), 1), range(4, 8)
        assert make(folder, next(first))
        assert folder.claims.acquire(second)

        def refuse(handle):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StoppedError, match=r"1 complete shards are kept.*re-run to resume"):
            make(folder, second)
        monkeypatch.undo()
        folder.claims.release()
        work(tmp_path, 4, 10)
        assert states(folder, verify=True) == ["done"] * 3
        assert not list(tmp_path.rglob("*.tmp"))

    @pytest.mark.parametrize("how", [lambda path: path.rename(path.with_name("moved")), shutil.rmtree])
    def test_a_folder_that_is_moved_or_deleted(self, tmp_path, how):
        path = tmp_path / "run"
        folder = begin(path)
        assert make(folder, next(folder.take()))
        assert folder.claims.acquire(range(4, 8))
        how(path)
        with pytest.raises(StoppedError, match="the run folder was moved or deleted"):
            make(folder, range(4, 8))
        with pytest.raises(StoppedError, match="the run folder was moved or deleted"):
            next(folder.take([range(8, 10)]))
        folder.claims.renew()
        folder.claims.release()
        assert not path.exists()  # nothing is started in its place


def test_four_workers_share_and_one_is_killed(tmp_path):
    """Nothing twice, all of it, and the bytes of one worker."""
    work(tmp_path / "one", 4, 160)
    together = FORK.Barrier(4)
    arguments = (tmp_path / "four", 4, 160, 0.02, 600.0, together)
    workers = [FORK.Process(target=work, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    folder = RunFolder(tmp_path / "four", 4, 160)
    while all((claim := folder.claims.of(s)) is None or claim.pid != workers[2].pid for s in folder.shards()):
        time.sleep(0.001)
    os.kill(workers[2].pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, -signal.SIGKILL, 0]
    folder = RunFolder.open(tmp_path / "four")
    assert states(folder, verify=True) == ["done"] * 40
    assert tables(tmp_path / "four") == tables(tmp_path / "one")
    made = [folder.record(shard)["worker"] for shard in folder.shards()]
    assert all(sum(name.split("-")[1] == str(worker.pid) for name in made) > 0 for worker in (*workers[:2], workers[3]))


def test_it_is_light_to_import():
    """So that ``status`` answers at once, and a thousand processes can be started and killed."""
    script = "import sys, calib_guidance.runs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"numpy", "pyarrow"} <= set(done.stdout.split())
    assert not {"torch", "lightning", "datasets"} & set(done.stdout.split())
