"""What the face pack said of records that do not say it themselves, kept while shards are streamed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from .shards import Record


class FaceStore:
    """Landmarks (N, 5, 2) and embeddings (N, 512) of records, kept in an SQLite file under the record's
    content."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._process = -1

    def _open(self) -> sqlite3.Connection:
        if self._process != os.getpid():  # a connection must not cross a fork
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=120)
            self._process = os.getpid()
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS faces (record TEXT PRIMARY KEY, kps BLOB, embeddings BLOB)"
            )
        return self._connection

    @staticmethod
    def name(record: Record) -> str:
        """Names a picture with its boxes."""
        return hashlib.sha256(record.digest.encode() + record.bboxes.tobytes()).hexdigest()

    def get(self, record: Record) -> tuple[np.ndarray, np.ndarray] | None:
        found = self._open().execute(
            "SELECT kps, embeddings FROM faces WHERE record = ?", (self.name(record),)
        )
        row = found.fetchone()
        if row is None:
            return None
        kps, embeddings = (np.frombuffer(blob, np.float32) for blob in row)
        return kps.reshape(-1, 5, 2).copy(), embeddings.reshape(-1, 512).copy()

    def put(self, record: Record, kps: np.ndarray, embeddings: np.ndarray) -> None:
        blobs = (np.asarray(a, np.float32).tobytes() for a in (kps, embeddings))
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO faces VALUES (?, ?, ?)", (self.name(record), *blobs))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_connection": None, "_process": -1}
