"""`make mini` from nothing: every stage finds what those before it left, and what comes out is a pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy_build
from withanyone.mini import PRETRAINED, build

ROOT = Path(__file__).resolve().parent.parent


def test_every_toy_argument_belongs_to_a_stage():
    assert toy_build.TOY.keys() <= {stage.name for stage in build.STAGES}


@pytest.mark.slow
def test_all_stages_from_nothing_make_a_pipeline(tmp_path):
    """A copy of the sources without any weights; toy sizes; then a picture of a person by what came out."""
    for part in ("withanyone", "train"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("pretrained", "judges"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = run(ROOT / "tests" / "toy_build.py", PRETRAINED / "face_analyzer")
    finished = [line.split(": ")[1] for line in said.splitlines() if line.startswith("finished: ")]
    assert finished == [stage.name for stage in build.STAGES]
    made = tmp_path / "withanyone" / "mini" / "pretrained"
    parts = {path.relative_to(PRETRAINED) for path in PRETRAINED.rglob("*.safetensors")}
    assert parts and parts <= {path.relative_to(made) for path in made.rglob("*.safetensors")}
    photo, picture = tmp_path / "photo.png", tmp_path / "picture.png"
    run("-m", "withanyone.cli", "draw", "3", "--out", photo)
    asked = ("--face", photo, "--prompt", "a person in a park")
    run("-m", "withanyone.cli", "generate", *asked, "--out", picture)
    assert picture.stat().st_size > 1000
