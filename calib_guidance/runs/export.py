"""``calib-guidance export DIR --to npz|png|hf``: samples of a run, for other programs."""

import argparse
import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calib_guidance.backend.atomic import atomic_path
from calib_guidance.backend.text import read_text
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs.folder import RunFolder
from calib_guidance.runs.integrity import sha256
from calib_guidance.runs.store import CorruptedShardError, label_names, pixels

_ROWS = 64  # images in memory at a time, beside the bytes of one shard


def _batches(run: RunFolder, rows: Mapping[range, int]) -> Iterator[pa.RecordBatch]:
    """The ``rows`` of each shard in order of index, a few at a time; each file is checked against its record first."""
    for shard, expected in rows.items():
        with pq.ParquetFile(pa.BufferReader(run.read_bytes(shard))) as file:
            if file.metadata.num_rows != expected:  # a run has extended it meanwhile
                raise ConfigurationError(f"{run.path} changed during the export: export it again")
            yield from file.iter_batches(_ROWS)


def _images(batch: pa.RecordBatch) -> list[bytes]:
    """The PNG of every row."""
    return batch.column("image").field("bytes").to_pylist()


def write_npz(path: Path, batches: Iterator[pa.RecordBatch], rows: int) -> None:
    """Write ``arr_0``, uint8 ``(rows, H, W, C)``, and ``arr_1``, int64 classes, as ``numpy.savez``, not all in memory."""
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            for batch in batches:
                images = np.stack([pixels(png) for png in _images(batch)])
                if not labels:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
                labels.append(batch.column("label").to_numpy())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.concatenate(labels).astype(np.int64))


def write_png(path: Path, batches: Iterator[pa.RecordBatch], names: Sequence[str] | None) -> None:
    """Write ``CLASS/INDEX.png``; the class is its name in ``names``, or its number with four digits."""
    path.mkdir()
    for batch in batches:
        indices, labels = (batch.column(name).to_pylist() for name in ("index", "label"))
        for index, label, png in zip(indices, labels, _images(batch), strict=True):
            if names is not None and label >= len(names):
                raise ConfigurationError(f"sample {index} is of class {label}, and --names has {len(names)} names")
            folder = path / (f"{label:04d}" if names is None else names[label])
            folder.mkdir(exist_ok=True)
            (folder / f"{index:08d}.png").write_bytes(png)


def write_hf(path: Path, batches: Iterator[pa.RecordBatch], fingerprint: str) -> None:
    """Write a folder for ``datasets.load_from_disk``: image, label, index, seed …, a row per sample.

    ``save_to_disk`` would take all into memory. Here it writes the first rows, and a stream of all replaces its Arrow file.
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


def read_class_names(file: Path | None) -> list[str] | None:
    """Names of the classes, which become folders: one per line, in order."""
    if file is None:
        return None
    names = [line.strip() for line in read_text(file).splitlines()]
    for number, name in enumerate(names):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ConfigurationError(f"--names: class {number} of {file} is named {name!r}, which is not a folder name")
        if names.index(name) != number:
            raise ConfigurationError(f"--names: {file} names two classes {name!r}, which would share a folder")
    return names


def _folder_names(run: RunFolder, shard: range) -> list[str] | None:
    """The class names that the samples state, if all of them can be folders."""
    names = label_names(pq.read_schema(run.file(shard, "parquet"))) or [""]
    return names if all(name.isprintable() and name.strip("./ ") and "/" not in name for name in names) else None


def _export(run: RunFolder, form: str, output: Path | None, partial: bool, names: Sequence[str] | None) -> str:
    """Export a run; what is to be said of it."""
    # Without --partial a corrupted file ends the export when it is read; with it, it must be known before.
    done, lack = run.done(verify=partial)
    if lack and not partial:
        raise ConfigurationError(f"{run.path} {lack}, or add --partial to export the others")
    if not done:
        raise ConfigurationError(f"{run.path} holds no samples yet")
    records = {shard: run.record(shard) for shard in done}
    rows = {shard: record["rows"] for shard, record in records.items()}
    if not (total := sum(rows.values())):
        raise ConfigurationError(f"{run.path} holds no samples: all failed")
    size = "x".join(map(str, (total, *pixels(_images(next(_batches(run, rows)))[0]).shape)))
    usual = {"npz": f"samples_{size}.npz", "png": "samples_png", "hf": "samples_hf"}
    output = output or run.path / usual[form]
    if output.exists():
        raise ConfigurationError(f"{output} exists already: remove it, or choose another --output")
    batches = _batches(run, rows)
    with atomic_path(output) as temporary:
        if form == "npz":
            write_npz(temporary, batches, total)
        elif form == "png":
            write_png(temporary, batches, names or _folder_names(run, next(iter(rows))))
        else:
            write_hf(temporary, batches, sha256("".join(record["sha256"] for record in records.values()).encode()))
    failed = sum(len(record["failed"]) for record in records.values())
    missing = run.num_requests - total - failed
    return (
        f"wrote {total} samples to {output}"
        + (f"; {failed} samples failed (calib-guidance status lists the reasons)" if failed else "")
        + (f"; {missing} of {run.num_requests} are not made yet" if missing else "")
    )


def export(args: Sequence[str]) -> None:
    """``calib-guidance export``: see its ``--help``. Nothing is left behind by an export that fails."""
    parser = argparse.ArgumentParser(
        prog="calib-guidance export",
        description="Export the samples of a run, in order of index, checked against their checksums.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder (trainer.default_root_dir)")
    parser.add_argument(
        "--to",
        choices=("npz", "png", "hf"),
        required=True,
        help="npz: arr_0 and arr_1 for guided-diffusion's evaluator; png: a folder per class; hf: datasets.load_from_disk",
    )
    parser.add_argument("--output", type=Path, help="default, in DIR: samples_NxHxWxC.npz, samples_png or samples_hf")
    parser.add_argument("--partial", action="store_true", help="export the samples that a run has so far")
    parser.add_argument("--names", type=Path, help="png: file with a class name per line; default: the samples' own")
    options = parser.parse_args(list(args))
    if options.names is not None and options.to != "png":
        raise ConfigurationError("--names is for --to png, whose folders are named by class")
    names = read_class_names(options.names)
    try:
        print(_export(RunFolder.open(options.folder), options.to, options.output, options.partial, names))
    except CorruptedShardError as error:
        raise ConfigurationError(
            f"{options.folder}: {error}. Re-run predict to regenerate the shard, or add --partial to export the others"
        ) from error
