"""``calib-guidance export DIR --to npz|png|hf``: the samples of a run, for other programs."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.store import DamagedShardError, RunFolder

_ROWS = 64  # images in memory at a time, beside the bytes of one shard


def _batches(run: RunFolder, rows: Mapping[range, int]) -> Iterator[pa.RecordBatch]:
    """The ``rows`` of each shard in order of index, a few at a time.

    Every file is checked against its record before its first row is given out.
    """
    for shard, expected in rows.items():
        with pq.ParquetFile(pa.BufferReader(run.read_bytes(shard))) as file:
            if file.metadata.num_rows != expected:  # a run has made it anew meanwhile, with more samples
                raise ConfigurationError(f"{run.path} changed while it was exported: export it again")
            yield from file.iter_batches(_ROWS)


def _pixels(png: bytes) -> np.ndarray:
    """Image ``(H, W, C)`` uint8 of a PNG."""
    image = np.asarray(Image.open(io.BytesIO(png)))
    return image[:, :, None] if image.ndim == 2 else image


def _header(shape: tuple[int, ...], dtype: type) -> bytes:
    """What an ``.npy`` file of that array begins with."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _images(batch: pa.RecordBatch) -> list[bytes]:
    """The PNG of every row."""
    return batch.column("image").field("bytes").to_pylist()


def write_npz(path: Path, batches: Iterator[pa.RecordBatch], rows: int) -> None:
    """``arr_0``, images uint8 ``(rows, H, W, C)``, and ``arr_1``, their classes int64, which ADM's evaluator reads.

    The same as ``numpy.savez(path, images, labels)``, without ever holding all images.
    """
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for batch in batches:
                images = np.stack([_pixels(png) for png in _images(batch)])
                if not labels:
                    file.write(_header((rows, *images.shape[1:]), np.uint8))
                file.write(images.tobytes())
                labels.append(batch.column("label").to_numpy())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
            file.write(_header((rows,), np.int64) + np.concatenate(labels).astype(np.int64).tobytes())


def write_png(path: Path, batches: Iterator[pa.RecordBatch], names: Sequence[str] | None) -> None:
    """``CLASS/INDEX.png``; the class is its number, four digits wide, or the name that ``names`` gives it."""
    path.mkdir()
    for batch in batches:
        for index, label, png in zip(
            batch.column("index").to_pylist(), batch.column("label").to_pylist(), _images(batch), strict=True
        ):
            if names is not None and label >= len(names):
                raise ConfigurationError(f"sample {index} is of class {label}, and --names has {len(names)} names")
            folder = path / (f"{label:04d}" if names is None else names[label])
            folder.mkdir(exist_ok=True)
            (folder / f"{index:08d}.png").write_bytes(png)


def write_hf(path: Path, batches: Iterator[pa.RecordBatch], fingerprint: str) -> None:
    """A folder for ``datasets.load_from_disk``: image, label, index, seed …, a row per sample.

    ``save_to_disk`` maps all that it copies into memory. Here it writes the folder of the first rows, whose one file, an Arrow
    stream, is then replaced by one of all rows.
    """
    import datasets  # only this format needs the seconds that it takes to import

    datasets.disable_progress_bars()  # of those few rows
    first = next(batches)
    schema = datasets.Features.from_arrow_schema(first.schema).arrow_schema
    table = datasets.table.InMemoryTable(pa.Table.from_batches([first]).cast(schema))
    datasets.Dataset(table, fingerprint=fingerprint).save_to_disk(path)
    (stream,) = path.glob("*.arrow")
    with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


def _class_names(file: Path | None) -> list[str] | None:
    """Names of the classes, which become folders: a line each, in order."""
    if file is None:
        return None
    try:
        names = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise ConfigurationError(f"--names: {file} cannot be read: {error.strerror}") from error
    for number, name in enumerate(names):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ConfigurationError(f"--names: class {number} of {file} is named {name!r}, which no folder can be")
        if names.index(name) != number:
            raise ConfigurationError(f"--names: {file} names two classes {name!r}, which would share a folder")
    return names


def _sound(run: RunFolder, partial: bool) -> list[range]:
    """The shards to export.

    Raises:
        ConfigurationError: some are missing, and that was not asked for, or all are.
    """
    # Without --partial a damaged file ends the export when it is come to; with it, it has to be known before.
    states = {shard: run.state(shard, verify=partial) for shard in run.shards()}
    done = [shard for shard, state in states.items() if state.name == "done"]
    missing = {shard: state for shard, state in states.items() if state.name != "done"}
    if missing and not partial:
        shard, state = next(iter(missing.items()))
        raise ConfigurationError(
            f"{run.path} is not complete: {sum(map(len, missing))} of {run.num_requests} samples are missing or damaged, the "
            f"first in {shard.start}–{shard[-1]} ({state.reason or state.name}). The same predict command makes them; "
            "--partial exports what is there"
        )
    if not done:
        raise ConfigurationError(f"{run.path} holds no samples yet")
    return done


def _default_output(run: RunFolder, form: str, shape: tuple[int, ...]) -> Path:
    names = {"npz": f"samples_{'x'.join(map(str, shape))}.npz", "png": "samples_png", "hf": "samples_hf"}
    return run.path / names[form]


def export(args: Sequence[str]) -> None:
    """``calib-guidance export``: see its ``--help``.

    Args:
        args: the words after ``export``.

    Raises:
        ConfigurationError: no run, one that is not complete or is damaged, an output that is there already or cannot be
            written, or class names that do not fit. Nothing is left behind then.
    """
    parser = argparse.ArgumentParser(
        prog="calib-guidance export",
        description="The samples of a run for other programs, in order of index, checked against their checksums.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder (trainer.default_root_dir)")
    parser.add_argument(
        "--to",
        choices=("npz", "png", "hf"),
        required=True,
        help="npz: arr_0 and arr_1 for guided-diffusion's evaluator; png: a folder per class; hf: datasets.load_from_disk",
    )
    parser.add_argument(
        "--output", type=Path, help="file or folder to make (in DIR: samples_NxHxWxC.npz, samples_png, samples_hf)"
    )
    parser.add_argument("--partial", action="store_true", help="export what there is of a run that is not complete")
    parser.add_argument("--names", type=Path, help="png: text file with the name of each class, a line each")
    options = parser.parse_args(list(args))
    if options.names is not None and options.to != "png":
        raise ConfigurationError("--names is for --to png, whose folders are named by class")
    names = _class_names(options.names)
    try:
        run = RunFolder.open(options.folder)
        shards = _sound(run, options.partial)
        records = {shard: run.record(shard) for shard in shards}
        rows = {shard: record["rows"] for shard, record in records.items()}
        total = sum(rows.values())
        if not total:
            raise ConfigurationError(f"{run.path} holds no samples: all were left out")
        first = _pixels(_images(next(_batches(run, rows)))[0])
        output = options.output or _default_output(run, options.to, (total, *first.shape))
        if output.exists():
            raise ConfigurationError(f"{output} exists already: remove it, or name another --output")
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            batches = _batches(run, rows)
            if options.to == "npz":
                write_npz(temporary, batches, total)
            elif options.to == "png":
                write_png(temporary, batches, names)
            else:
                checksums = "".join(record["sha256"] for record in records.values())
                write_hf(temporary, batches, fingerprint=hashlib.sha256(checksums.encode()).hexdigest())
            os.rename(temporary, output)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)
    except DamagedShardError as error:
        raise ConfigurationError(
            f"{options.folder}: {error}. The same predict command makes it anew; --partial exports the rest"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{error.filename or options.output}: {error.strerror or error}") from error
    left_out = sum(len(record["left_out"]) for record in records.values())
    missing = run.num_requests - total - left_out
    print(
        f"wrote {total} samples to {output}"
        + (f"; {left_out} were left out of the run (calib-guidance status says why)" if left_out else "")
        + (f"; {missing} of {run.num_requests} are not made yet" if missing else "")
    )
