"""What every test shares: no network, and one thread a process so that tests may run side by side."""

from __future__ import annotations

import os
import socket
from pathlib import Path

# Read by huggingface_hub, transformers and gradio when they are imported, hence before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch and numpy read these at import; `make slow` may give more threads to a single process.
THREADS = int(os.environ.get("WITHANYONE_TEST_THREADS", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("MKL_NUM_THREADS", str(THREADS))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails, wherever it runs; the machine's own ports are free."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            raise ConnectionRefusedError(f"Tests run without a network; something asked for {address}.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with random weights, from the parts of tests/tiny.py and tests/tiny_faces.py."""
    from tests import tiny, tiny_faces
    from withanyone import FaceAnalyzer, WithAnyonePipeline

    folder = tmp_path_factory.mktemp("tiny_model")
    adapter = tiny.face_adapter()
    torch.manual_seed(0)
    for name, weight in adapter.named_parameters():
        if name.endswith("to_out.weight"):  # a new adapter starts without effect
            torch.nn.init.normal_(weight, std=0.3)
    pipe = WithAnyonePipeline(
        **tiny.flux_components(),
        image_encoder=tiny.image_encoder(),
        feature_extractor=tiny.feature_extractor(),
        face_adapter=adapter,
        face_analyzer=FaceAnalyzer.from_pretrained(tiny_faces.write_pack(folder / "pack")),
        sampling_defaults={"height": 64, "width": 64, "num_inference_steps": 2},
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def picture_shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards of drawn pictures for training, each of the test module's SHARD_SIZE."""
    from withanyone.mini import pictures

    folder = tmp_path_factory.mktemp("pictures")
    for shard in (0, 1):
        pictures.render_shard(folder, shard, size=request.module.SHARD_SIZE)
    return folder


@pytest.fixture(scope="session")
def painted_photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four photos in which `tiny_model` finds one face each; the first two show the same identity."""
    from tests import tiny_faces

    folder = tmp_path_factory.mktemp("painted")
    paths = []
    for i, identity in enumerate((1, 1, 2, 3)):
        box = (20 + 4 * i, 16, 90 + 4 * i, 104)
        paths.append(folder / f"person_{identity}_{i}.png")
        tiny_faces.paint_face(tiny_faces.blank(), box, identity).save(paths[-1])
    return paths
