"""Memory on paper: what is counted equals what real tensors keep, and the strategies divide what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from train.config import make_config
from train.memory import (
    Parts,
    counting_saved,
    estimate,
    parameters_of,
    saved_by_decoder,
    saved_by_step,
    table,
)


def test_a_layers_saved_tensors_are_its_inputs():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with counting_saved([net]) as total:
        out = net(torch.empty(5, 8, device="meta"))
        kept = total()
    assert out.shape == (5, 4)
    assert kept == 4 * (5 * 8 + 5 * 16 + 5 * 16)  # input, before and after GELU; no weight


def test_attention_is_counted_as_flash_attention_keeps_it():
    q, k, v = (torch.empty(2, 3, 7, 16, device="meta", requires_grad=True) for _ in range(3))
    with counting_saved([]) as total:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        kept = total()
    assert out.shape == q.shape
    assert kept == 4 * (4 * 2 * 3 * 7 * 16 + 2 * 3 * 7)


def _parts() -> Parts:
    components = tiny.flux_components()
    adapter = tiny.face_adapter(to_out_std=0.1)
    encoders = [components["text_encoder"], components["text_encoder_2"], tiny.image_encoder()]
    return Parts(
        components["transformer"].to("meta"), components["vae"].to("meta"), encoders, adapter.to("meta")
    )


def test_more_samples_and_no_checkpointing_keep_more():
    def kept(batch, checkpointing):
        return saved_by_step(_parts(), batch, 64, 64, 16, 1, checkpointing)

    one, two = kept(1, False), kept(2, False)
    assert 1.7 * one < two < 2.1 * one
    assert kept(1, True) < 0.7 * one


def test_decoding_pictures_keeps_in_proportion():
    vae = _parts().vae
    one, three = (saved_by_decoder(vae, n, 64, 64) for n in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.02)


def test_strategies_divide_what_they_spread():
    config = make_config({"buckets": [[64, 64]], "train_batch_size": 4, "text_lengths": [16]})
    rows = {s: estimate(config, _parts(), s, 4) for s in ("one", "ddp", "fsdp2", "zero2")}
    trained = parameters_of(_parts().adapter)
    assert rows["ddp"]["optimiser"] == 8 * trained and rows["fsdp2"]["optimiser"] == 2 * trained
    assert rows["zero2"]["gradients"] == trained and rows["zero2"]["adapter"] == 4 * trained
    assert rows["fsdp2"]["adapter"] == trained + 2 * trained
    shown = table({"a": rows["ddp"]})
    assert f"| **sum** | **{sum(rows['ddp'].values()) / 1e9:.1f}** |" in shown
    with pytest.raises(ValueError, match="`strategy`"):
        estimate(config, _parts(), "pipeline", 4)
