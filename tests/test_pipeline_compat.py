"""What FLUX.1's ecosystem offers still does the same with faces.

Each setting (LoRA, quantisation, step caches, offloading, compilation) is compared to the same setting on a
transformer with the faces built into its blocks' own `forward` (`with_faces_inside`): base plus adapter,
without a hook. Outputs must be equal.
"""

from __future__ import annotations

import dataclasses
import functools

import accelerate
import diffusers.hooks
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig, TorchAoConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests import tiny
from withanyone import FaceAdapter, WithAnyonePipeline
from withanyone.adapter import add_faces, parameter_table, transformer_blocks

CPU = torch.device("cpu")
BOXES = [(4, 8, 30, 40), (24, 6, 60, 44)]
SETTINGS = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "output_type": "latent",
}


def faces() -> list:
    return [tiny.face(1), tiny.face(2)]


def run(pipe, **kwargs) -> np.ndarray:
    """Latents (1, 16, 16) of a call with two faces from seed 0; both branches act."""
    generator = torch.Generator().manual_seed(0)
    kwargs = {"id_scale": 0.4, "siglip_scale": 0.8, "prompt": "two people", **SETTINGS, **kwargs}
    return pipe(faces=faces(), bboxes=BOXES, generator=generator, **kwargs).images.float().numpy()


def with_faces_inside(pipe, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """FluxPipeline on `transformer` with the faces in its blocks' classes; no hook, no argument."""
    embeddings, features = pipe.encode_faces(faces())
    conditioning = pipe.face_adapter.encode(
        embeddings, features, [BOXES], 64, 64, id_scale=0.4, siglip_scale=0.8
    )
    for index, (block, _) in enumerate(transformer_blocks(transformer)):
        base = type(block)
        attentions = {name: pipe.face_adapter.attentions(name)[index] for name in ("arc", "sig")}

        @functools.wraps(base.forward)
        def forward(self, *args, base=base, attentions=attentions, index=index, **kwargs):
            text, image = base.forward(self, *args, **kwargs)
            return text, add_faces(image, conditioning, attentions, index)

        block.__class__ = type(base.__name__, (base,), {"forward": forward})
        metadata = dataclasses.replace(TransformerBlockRegistry.get(base))
        TransformerBlockRegistry.register(type(block), metadata)
    components = {**pipe.components, "transformer": transformer}
    flux = FluxPipeline(**{name: part for name, part in components.items() if not name.startswith("face_")})
    flux.set_progress_bar_config(disable=True)
    return flux


def run_inside(flux: FluxPipeline, pipe, **kwargs) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    sigmas = pipe._sigmas(None, 4, 64, 64)
    kwargs = {"prompt": "two people", **SETTINGS, **kwargs}
    return flux(generator=generator, sigmas=sigmas, **kwargs).images.float().numpy()


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """What the pipeline gives without any setting."""
    pipe = tiny.pipeline()
    latents = run(pipe)
    assert np.array_equal(latents, run_inside(with_faces_inside(pipe, tiny.transformer()), pipe))
    return latents


# LoRA


def lora(seed: int, scale: float = 0.3) -> tuple[dict, dict]:
    """A LoRA of rank 4 on some of the transformer's layers, in the files' key names; and what it adds."""
    generator = torch.Generator().manual_seed(seed)
    state, added = {}, {}
    for name, layer in tiny.transformer().named_modules():
        if name.endswith(("attn.to_q", "attn.to_v", "attn.add_k_proj", "proj_mlp", "ff.net.2")):
            down = scale * torch.randn(4, layer.in_features, generator=generator)
            up = scale * torch.randn(layer.out_features, 4, generator=generator)
            state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            added[f"{name}.weight"] = up @ down
    assert len(added) > 10
    return state, added


def merged(added: dict, scale: float = 1.0) -> FluxTransformer2DModel:
    transformer = tiny.transformer()
    for name, weight in transformer.named_parameters():
        if name in added:
            weight.add_(scale * added[name])
    return transformer


def test_lora_loads_scales_fuses_and_unloads(plain):
    state, added = lora(1)
    pipe = tiny.pipeline()
    whole = run_inside(with_faces_inside(pipe, merged(added)), pipe)
    half = run_inside(with_faces_inside(pipe, merged(added, 0.5)), pipe)
    assert np.abs(whole - plain).max() > 1e-2

    pipe.load_lora_weights(dict(state), adapter_name="style")
    assert np.abs(run(pipe) - whole).max() < 1e-4
    assert np.abs(run(pipe, joint_attention_kwargs={"scale": 0.5}) - half).max() < 1e-4
    pipe.set_adapters("style", 0.5)
    assert np.abs(run(pipe) - half).max() < 1e-4
    pipe.disable_lora()
    assert np.array_equal(run(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    assert np.abs(run(pipe) - whole).max() < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.abs(run(pipe) - plain).max() < 1e-4


def test_lora_in_a_file_unloads_without_a_trace(plain, tmp_path):
    state, added = lora(2)
    WithAnyonePipeline.save_lora_weights(
        tmp_path, {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    )
    pipe = tiny.pipeline()
    pipe.load_lora_weights(tmp_path)
    assert np.abs(run(pipe) - run_inside(with_faces_inside(pipe, merged(added)), pipe)).max() < 1e-4
    pipe.unload_lora_weights()
    assert np.array_equal(run(pipe), plain)
    assert set(pipe.transformer.state_dict()) == set(tiny.transformer().state_dict())


# Quantisation


def dequantised(quantised: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A plain transformer with the values that a quantised one stands for."""
    transformer = tiny.transformer()
    state = {name: getattr(w, "dequantize", lambda w=w: w)() for name, w in quantised.state_dict().items()}
    assert any(not torch.equal(state[name], weight) for name, weight in transformer.state_dict().items())
    transformer.load_state_dict(state)
    return transformer


def test_torchao_int8_transformer(plain, tmp_path):
    tiny.transformer().save_pretrained(tmp_path)
    quantised = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    ).eval()
    assert "torchao" in type(quantised.transformer_blocks[0].attn.to_q.weight).__module__
    pipe = tiny.pipeline(transformer=quantised)
    latents = run(pipe)
    assert np.abs(latents - run_inside(with_faces_inside(pipe, dequantised(quantised)), pipe)).max() < 1e-4
    assert 1e-5 < np.abs(latents - plain).max() < 0.2


def test_int8_by_from_pretrained(tiny_model):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    pipe = WithAnyonePipeline.from_pretrained(tiny_model, quantization_config=config, dtype=torch.float32)
    assert "torchao" in type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__module__
    assert "torchao" not in type(pipe.face_adapter.ipa_sig[0].to_q.weight).__module__
    latents = run(pipe)
    assert (
        np.abs(latents - run_inside(with_faces_inside(pipe, dequantised(pipe.transformer)), pipe)).max()
        < 1e-4
    )


def dequantised_adapter(quantised) -> FaceAdapter:
    """A plain adapter with the values that a quantised one stands for."""
    adapter = tiny.face_adapter()
    state = {
        name: weight.dequantize() if hasattr(weight, "qdata") else weight.float()
        for name, weight in quantised.state_dict().items()
    }
    adapter.load_state_dict(state)
    assert not torch.equal(
        adapter.ipa_arc[0].to_q.weight, tiny.face_adapter(to_out_std=0.3).ipa_arc[0].to_q.weight
    )
    return adapter


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_quantised_adapter(plain, kind, offload):
    """Its projections cannot be folded into the keys, and its weights stay on the device for that."""
    adapter = tiny.face_adapter(to_out_std=0.3)
    if kind == "int8":
        quantize_(adapter, Int8WeightOnlyConfig())
    else:
        adapter.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run(tiny.pipeline(face_adapter=dequantised_adapter(adapter)))
    pipe = tiny.pipeline(face_adapter=adapter)
    in_loop = {part.name for part in adapter.parts() if part.in_loop}
    assert {"ipa_arc.*.to_q", "ipa_arc.*.to_out"} <= in_loop
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    assert np.abs(run(pipe) - expected).max() < 1e-4
    assert 1e-5 < np.abs(expected - plain).max() < 0.3


# Step caches

CACHES = {
    "FirstBlockCache": lambda: diffusers.hooks.FirstBlockCacheConfig(threshold=10.0),
    "MagCache": lambda: diffusers.hooks.MagCacheConfig(
        threshold=10.0, num_inference_steps=4, retention_ratio=0.0, mag_ratios=[1.0] * 4
    ),
    "TaylorSeer": lambda: diffusers.hooks.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1
    ),
    "PAB": lambda: diffusers.hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("name", CACHES)
def test_step_caches(plain, name, true_cfg_scale):
    pipe = tiny.pipeline()
    inside = with_faces_inside(pipe, tiny.transformer())
    pipe.transformer.enable_cache(CACHES[name]())
    inside.transformer.enable_cache(CACHES[name]())
    guidance = {"true_cfg_scale": true_cfg_scale, "negative_prompt": "abc"}
    expected = run_inside(inside, pipe, **guidance)
    latents = run(pipe, **guidance)
    assert np.abs(latents - expected).max() < 1e-6
    # Nothing of one picture stays for the next, and without the cache it is as before.
    assert np.array_equal(run(pipe, **guidance), latents)
    pipe.transformer.disable_cache()
    assert np.array_equal(run(pipe), plain)
    if true_cfg_scale == 1.0:
        assert np.abs(latents - plain).max() > 1e-4  # steps were skipped


def test_first_block_cache_that_never_skips_changes_nothing(plain):
    pipe = tiny.pipeline()
    pipe.transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=0.0))
    assert np.array_equal(run(pipe), plain)


def test_caches_with_faces_in_the_positive_pass_only():
    pipe, cached = tiny.pipeline(), tiny.pipeline()
    cached.transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=0.0))
    kwargs = {"true_cfg_scale": 2.0, "true_cfg_min_sigma": 0.9, "faces_in_negative": False}
    assert np.array_equal(run(cached, **kwargs), run(pipe, **kwargs))


def test_a_cache_before_the_adapter_is_refused():
    transformer = tiny.transformer()
    transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"cache is enabled on the `transformer`.*disable_cache"):
        tiny.pipeline(transformer=transformer)


# Offloading (on the CPU: the hooks run, only the devices are one)


def test_model_offload(plain):
    pipe = tiny.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(run(pipe), plain)
    assert np.array_equal(run(pipe), plain)  # the hooks are set anew after each call
    assert not hasattr(pipe.face_adapter, "_hf_hook")


def test_sequential_offload(plain, monkeypatch):
    # With the index that diffusers appends ("cpu:0") accelerate loses the parameters' class on the CPU.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **kwargs: offload(model, CPU, **kwargs)
    )
    pipe = tiny.pipeline()
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert next(pipe.transformer.parameters()).device.type == "meta"
    assert pipe.face_adapter.device.type == "cpu"
    assert np.array_equal(run(pipe), plain)
    assert np.array_equal(run(pipe), plain)


@pytest.mark.parametrize(
    "kwargs", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 2}]
)
def test_group_offload(plain, kwargs):
    pipe = tiny.pipeline()
    pipe.enable_group_offload(CPU, exclude_modules="vae", **kwargs)
    assert np.array_equal(run(pipe), plain)
    assert _is_offloaded(pipe.text_encoder) and _is_offloaded(pipe.transformer)
    assert not any(map(_is_offloaded, (pipe.face_adapter, pipe.image_encoder, pipe.vae)))


def _is_offloaded(model: torch.nn.Module) -> bool:
    registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
    return any("group_offloading" in registry.hooks for registry in registries)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group": lambda pipe: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "block": lambda pipe: pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offloading_with_faces_in_the_positive_pass_only(plain, name):
    guidance = {"true_cfg_scale": 2.0, "true_cfg_min_sigma": 0.9, "faces_in_negative": False}
    expected = run(tiny.pipeline(), **guidance)
    pipe = tiny.pipeline()
    OFFLOADS[name](pipe)
    for _ in range(2):
        assert np.array_equal(run(pipe, **guidance), expected)
        assert np.array_equal(run(pipe), plain)


def test_group_offload_of_the_transformer_alone(plain):
    pipe = tiny.pipeline()
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert np.array_equal(run(pipe), plain)
    assert pipe._is_offloaded


@pytest.mark.parametrize("name", OFFLOADS)
def test_faces_added_to_a_pipeline_that_is_offloaded_already(plain, name):
    flux = FluxPipeline(**tiny.flux_components())
    OFFLOADS[name](flux)
    parts = {"image_encoder": tiny.image_encoder(), "feature_extractor": tiny.feature_extractor()}
    pipe = WithAnyonePipeline.from_pipe(flux, face_adapter=tiny.face_adapter(to_out_std=0.3), **parts)
    pipe.set_progress_bar_config(disable=True)
    assert pipe._is_offloaded
    for _ in range(2):
        assert np.array_equal(run(pipe), plain)


@pytest.mark.parametrize("early", [False, True])
def test_layerwise_casting_of_the_transformer(early):
    """Storage in 8 bits, whether it comes before or after the adapter is attached."""
    transformer = tiny.transformer()
    if early:
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe = tiny.pipeline(transformer=transformer)
    if not early:
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    rounded = tiny.transformer()
    rounded.load_state_dict({name: weight.float() for name, weight in transformer.state_dict().items()})
    assert np.abs(run(pipe) - run_inside(with_faces_inside(pipe, rounded), pipe)).max() < 1e-4


@pytest.mark.parametrize("offload", ["model", "group", "none"])
def test_offloading_puts_aside_what_only_encoding_needs(plain, monkeypatch, offload):
    """What is moved off the device is destroyed here, and the picture is the same: no step needs it."""
    pipe = tiny.pipeline()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif offload == "group":
        pipe.enable_group_offload(CPU, offload_type="leaf_level")
    adapter, to = pipe.face_adapter, torch.nn.Module.to
    moved = []

    def to_and_destroy(module, *args, **kwargs):
        inside = [p for m in adapter.modules() if m is not adapter for p in m.parameters() if m is module]
        moved.extend(inside)
        for parameter in inside:
            parameter.data = torch.full_like(parameter, torch.nan)
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to_and_destroy)
    assert np.array_equal(run(pipe), plain)
    table = parameter_table(adapter)
    aside = sum(part.parameters for part in table if not part.in_loop)
    assert sum(p.numel() for p in moved) == (0 if offload == "none" else aside) and aside > 0
    if offload == "none":
        return
    monkeypatch.undo()
    adapter.load_state_dict(tiny.pipeline().face_adapter.state_dict())
    assert np.array_equal(run(pipe), plain)


# dtype, compilation, and several pipelines


def test_half_precision_and_mixed(plain, tiny_model):
    pipe = tiny.pipeline()
    pipe.to(torch.bfloat16)
    assert 1e-4 < np.abs(run(pipe) - plain).max() < 0.2
    mixed = WithAnyonePipeline.from_pretrained(
        tiny_model, dtype={"default": torch.bfloat16, "face_adapter": torch.float32}
    )
    assert mixed.transformer.dtype == torch.bfloat16 and mixed.face_adapter.dtype == torch.float32
    whole = run(WithAnyonePipeline.from_pretrained(tiny_model))
    assert 1e-4 < np.abs(run(mixed) - whole).max() < 0.2


def test_pipelines_may_share_a_transformer(plain):
    pipe = tiny.pipeline()
    flux = FluxPipeline.from_pipe(pipe)
    flux.set_progress_bar_config(disable=True)
    base = run_inside(flux, pipe)
    assert np.array_equal(base, run_inside(FluxPipeline(**tiny.flux_components()), pipe))
    other = WithAnyonePipeline.from_pipe(
        flux, **_face_parts(pipe, tiny.face_adapter(seed=50, to_out_std=0.3))
    )
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    different = run(other)
    assert np.abs(different - plain).max() > 1e-2
    assert np.array_equal(run(pipe), plain)
    assert np.array_equal(run(other), different)
    pipe.face_adapter.attach(pipe.transformer)
    pipe.face_adapter.detach(pipe.transformer)
    assert np.array_equal(run_inside(flux, pipe), base)


def _face_parts(pipe, adapter) -> dict:
    parts = {"image_encoder": pipe.image_encoder, "feature_extractor": pipe.feature_extractor}
    return {**parts, "face_adapter": adapter}


def test_a_compiled_transformer_before_the_adapter_is_refused():
    transformer = tiny.transformer()
    with pytest.raises(ValueError, match=r"`transformer` was compiled before the face adapter"):
        tiny.pipeline(transformer=torch.compile(transformer))
    pipe = tiny.pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"`faces_in_negative` is False.*compile_repeated_blocks"):
        run(pipe, true_cfg_scale=2.0, faces_in_negative=False)
    with pytest.raises(ValueError, match=r"`true_cfg_min_sigma` is 0.5.*compile_repeated_blocks"):
        run(pipe, true_cfg_scale=2.0, true_cfg_min_sigma=0.5)


@pytest.mark.slow
def test_compile_repeated_blocks(plain):
    torch._dynamo.reset()  # what other tests compiled in this process counts towards the same limit
    pipe = tiny.pipeline()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert np.abs(run(pipe) - plain).max() < 1e-5
    kwargs = {"true_cfg_scale": 2.0, "true_cfg_min_sigma": 0.9, "faces_in_negative": False}
    assert np.abs(run(pipe, **kwargs) - run(tiny.pipeline(), **kwargs)).max() < 1e-5
    # Without faces, and with other faces, too.
    assert (
        np.abs(
            run(pipe, id_scale=0.0, siglip_scale=0.0) - run(tiny.pipeline(), id_scale=0.0, siglip_scale=0.0)
        ).max()
        < 1e-5
    )
    with pytest.raises(ValueError, match=r"`transformer` is compiled already"):
        tiny.face_adapter(seed=9).attach(pipe.transformer)


@pytest.mark.slow
def test_compile_the_whole_transformer(plain):
    torch._dynamo.reset()  # what other tests compiled in this process counts towards the same limit
    pipe = tiny.pipeline()
    pipe.transformer = torch.compile(pipe.transformer)
    assert np.abs(run(pipe) - plain).max() < 1e-5
