"""What every test shares: no network, and one thread a process so that tests may run side by side."""

from __future__ import annotations

import os
import socket

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
    """A test that reaches for the network fails, wherever it runs; the machine's own ports are free to use."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            raise ConnectionRefusedError(f"Tests run without a network; something asked for {address}.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
