"""All stages of `make mini` in order at toy size, in the working folder's own copy of the package.

`python toy_build.py FACE_PACK`. Two steps of training teach a detector nothing, so behind its stage FACE_PACK
(a trained one) takes the toy's place.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from train.__main__ import main as train
from withanyone.mini import base, build, facepack, pictures
from withanyone.mini.__main__ import main as mini

TOY = {
    "text": ["--steps", "2", "--batch-size", "8"],
    "pictures": ["--shards", "16", "--validation-shards", "4"],
    "recognizer": ["--steps", "2", "--shards", "2", "--rounds", "1"],
    "detector": ["--steps", "2", "--shards", "2", "--rounds", "1"],
    "judge": ["--steps", "2", "--rounds", "1"],
    "reader": ["--steps", "2"],
    "image encoder": ["--steps", "2", "--crops", "40", "--batch-size", "8"],
    "base": ["--steps", "2", "--cooldown", "1", "--no-compile", "--tokens-per-step", "256"],
    "decoder": ["--steps", "2", "--shards", "4"],
    "shards": ["--identities", "12", "--references", "2", "--cp-scenes", "8"],
    "adapter": ["max_train_steps=2", "buckets=[[128,128,2]]", "lr_warmup_steps=1"],
}


def main(face_pack: Path) -> None:
    pictures.SHARD_SIZE, pictures.VALIDATION_SHARD_SIZE = 8, 8
    base.HELD_OUT_PICTURES = 8
    facepack.VALIDATION_IDENTITIES, facepack.VALIDATION_ROUNDS = 8, 2
    for name in ("RECOGNIZER_PICTURES", "DETECTOR_PICTURES", "JUDGE_PICTURES"):
        setattr(facepack, name, replace(getattr(facepack, name), identities=16))
    for name in ("RECOGNIZER", "DETECTOR", "JUDGE_TRAINING"):
        setattr(facepack, name, replace(getattr(facepack, name), batch_size=8))
    for stage in build.STAGES:
        run = mini if stage.module == build.MINI else train
        started = time.monotonic()
        run([*stage.arguments, *TOY.get(stage.name, [])])
        if stage.name == "detector":
            for path in face_pack.glob("*.onnx"):
                shutil.copy(path, facepack.PACK / path.name)
        print(f"finished: {stage.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
