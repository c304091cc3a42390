"""Half precision only where the machine computes in it: elsewhere it takes a hundred times as long."""

from __future__ import annotations

import pytest
import torch

from train import trainer
from train.config import TrainConfig, load_config
from train.frozen import precision_of
from withanyone import precision


@pytest.fixture(params=[True, False], ids=["bf16 CPU", "plain CPU"])
def has_bfloat16(request, monkeypatch) -> bool:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: request.param)
    if request.param:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return request.param


def test_autocast_of_the_miniature_follows_the_cpu(has_bfloat16):
    assert precision.computes_bfloat16() is has_bfloat16
    assert precision.computes_bfloat16("cuda")
    a = torch.ones(2, 2)
    with precision.autocast():
        assert (a @ a).dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_the_dtype_of_weights_is_the_one_asked_for_or_the_devices(has_bfloat16):
    names = {asked: precision.dtype_name(asked, "cpu") for asked in (None, "auto", "float16")}
    assert names == {None: "float32", "auto": "bfloat16" if has_bfloat16 else "float32", "float16": "float16"}
    assert precision.dtype_name(None, "mps") == precision.dtype_name("auto", "mps") == "float32"
    assert precision.dtype_name(None, "cuda") == precision.dtype_name("auto", "cuda") == "bfloat16"


def test_auto_follows_the_machine_and_what_is_asked_for_is_kept(has_bfloat16):
    auto = TrainConfig(mixed_precision="auto", frozen_dtype="auto", cpu=True)
    expected = ("bf16", torch.bfloat16) if has_bfloat16 else ("no", torch.float32)
    assert precision_of(auto) == expected
    asked = TrainConfig(mixed_precision="bf16", frozen_dtype="bfloat16", cpu=True)
    assert precision_of(asked) == ("bf16", torch.bfloat16)


def test_the_miniatures_phases_run_on_any_cpu():
    for name in ("mini_1", "mini_adapter", "reproduce_2", "reproduce_3"):
        config = load_config(f"{name}.yaml")
        assert (config.mixed_precision, config.frozen_dtype) == ("auto", "auto"), name


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
@pytest.mark.parametrize("others", [0, 2], ids=["alone", "stacked"])
def test_our_muon_is_torchs_within_bfloat16(shape, others):
    """One matrix, by itself and stacked with others of its shape and one of another."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)
    beside = [torch.randn(shape, generator=generator) for _ in range(others)] + [torch.randn(8, 8)]
    results = []
    for kind in (torch.optim.Muon, precision._StackedMuon):
        parameter = torch.nn.Parameter(start.clone())
        rest = [torch.nn.Parameter(matrix.clone()) for matrix in beside]
        optimizer = kind([parameter, *rest], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            parameter.grad = gradient.clone()
            for matrix, other in zip(beside, rest, strict=True):
                other.grad = 100 * matrix
            optimizer.step()
        results.append((parameter.detach() - start, optimizer.state_dict()["state"][0]["momentum_buffer"]))
    (update, momentum), (float_update, float_momentum) = results
    assert torch.equal(momentum, float_momentum)
    assert torch.nn.functional.cosine_similarity(update.flatten(), float_update.flatten(), dim=0) > 0.999
    assert (update - float_update).norm() < 0.03 * update.norm()


def test_muon_is_torchs_own_where_the_machine_has_bfloat16(has_bfloat16):
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    expected = torch.optim.Muon if has_bfloat16 else precision._StackedMuon
    assert type(precision.make_muon([matrix], lr=0.1)) is expected
    assert type(precision.make_muon([{"params": [matrix], "lr": 0.1}])) is expected


def test_trainings_leave_cudnns_attention_out(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    precision.avoid_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to"):  # which a trainer checks right after it
        trainer.Trainer(TrainConfig(report_to=["tensorboard"], output_dir="x"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
