"""The samples of a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calib_guidance.data.base import ImageSource, Row
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import CorruptedShardError, RunFolder, read_run
from calib_guidance.runs.store import label_names


class RunImages(ImageSource):
    """The samples of a run, each shard checked against its record.

    Attributes:
        run: the run folder.
    """

    kind = "run folder"
    labelled = True

    def __init__(self, name: str):
        self.run = RunFolder.open(name)
        done, lack = self.run.done()
        if lack:
            raise ConfigurationError(f"{name} {lack}")
        records = [self.run.record(shard) for shard in done]
        self.failed = sum(len(record["failed"]) for record in records)
        self.ends = np.cumsum([record["rows"] for record in records])
        self.class_names = label_names(pq.read_schema(self.run.file(done[0], "parquet")))
        super().__init__(name, int(self.ends[-1]))

    def read(self, blocks: Iterable[range]) -> Iterator[list[Row]]:
        number, first, rows = -1, 0, []  # of the shard in memory
        for block in blocks:
            found = []
            for position in block:
                wanted = int(np.searchsorted(self.ends, position, side="right"))
                if wanted != number:
                    number, first, rows = wanted, int(self.ends[wanted - 1]) if wanted else 0, self._shard(wanted)
                found.append(rows[position - first])
            yield found

    def _shard(self, number: int) -> list[Row]:
        shard = self.run.shards()[number]
        try:
            samples = pq.read_table(pa.BufferReader(self.run.read_bytes(shard))).to_pylist()
        except CorruptedShardError as error:
            raise ConfigurationError(f"{self.name}: {error}. Re-run predict to regenerate the shard") from error
        if len(samples) != np.diff(self.ends, prepend=0)[number]:
            raise ConfigurationError(f"{self.name} changed while it was read: re-run the command")
        return [Row(f"sample {row['index']}", row["image"]["bytes"], row["label"], row["index"]) for row in samples]

    def provenance(self) -> dict[str, Any]:
        rule = read_run(self.run.path)["identity"].get("uint8_rule")
        shards = self.run.samples_sha256()
        return {"run": self.run.fingerprint, "shards_sha256": shards, "uint8_rule": rule, "failed": self.failed}
