"""Records of rendered pictures hold the same pictures, boxes and landmarks."""

from __future__ import annotations

import numpy as np

from train.catalogue import build_catalogue
from train.shards import ShardReader
from withanyone.mini import pictures
from withanyone.mini.recycle import write_records


def test_records_hold_what_the_pictures_shard_holds(tmp_path):
    shard = pictures.render_shard(tmp_path / "pictures", 0, size=6)
    (tar,) = write_records(tmp_path / "pictures", tmp_path / "shards")
    assert write_records(tmp_path / "pictures", tmp_path / "shards") == []
    arrays, captions = pictures.read_shard(shard)
    people = (arrays["identities"] >= 0).sum(1)

    class Pack:
        """Embeddings are not the point here."""

        stamp = ""
        made: dict = {}

        def embed(self, image, kps):
            return np.ones((len(kps), 512), np.float32)

    catalogue = build_catalogue([str(tar)], paired=False, pack=Pack())
    assert len(catalogue) == (people > 0).sum() and not catalogue.bad
    reader = ShardReader()
    for place, index in enumerate(np.flatnonzero(people)):
        record = catalogue.read(place, reader)
        assert record.caption == captions[index][0]
        difference = record.image.astype(int) - arrays["pixels"][index]
        assert np.abs(difference).mean() < 3  # JPEG
        np.testing.assert_allclose(record.bboxes, arrays["bboxes"][index][: people[index]], atol=1e-3)
        np.testing.assert_allclose(record.kps, arrays["kps"][index][: people[index]], atol=1e-3)
