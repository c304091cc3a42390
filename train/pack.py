"""What a face pack says about pictures, for records that do not say it themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from withanyone import FaceAnalyzer


class PackReader:
    """Landmarks and embeddings by a `FaceAnalyzer`; pictures are (H, W, 3) uint8 RGB.

    `stamp` names the two networks by their content: what was made by others is made again.
    """

    def __init__(self, analyzer: FaceAnalyzer) -> None:
        self.analyzer = analyzer
        digest = hashlib.sha256()
        for path in (analyzer.detection_path, analyzer.recognition_path):
            digest.update(Path(path).read_bytes())
        self.stamp = digest.hexdigest()[:16]
        # (shard, key) -> landmarks and embeddings: a record may be in two catalogues that are built in turn
        self.made: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (M, 4) and landmarks (M, 5, 2) of the faces found."""
        faces = self.analyzer.detect(image)
        bboxes = np.array([f.bbox for f in faces], np.float32).reshape(-1, 4)
        return bboxes, np.array([f.kps for f in faces], np.float32).reshape(-1, 5, 2)

    def embed(self, image: np.ndarray, kps: np.ndarray) -> np.ndarray:
        """Raw embeddings (N, 512) of the faces with landmarks (N, 5, 2)."""
        return self.analyzer.embed([self.analyzer.align(image, points) for points in kps])

    def largest(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Box (4,) and raw embedding (512,) of the largest face; None where there is none."""
        faces = self.analyzer.detect(image, max_faces=1)
        return (faces[0].bbox, faces[0].embedding) if faces else None
