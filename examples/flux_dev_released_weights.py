"""The released WithAnyone weights on FLUX.1 [dev], quantised and offloaded for smaller cards.

    python examples/flux_dev_released_weights.py --adapter withanyone.safetensors --face-pack antelopev2 \\
        --face ada.jpg --face bela.jpg --prompt "a photo of two friends at the beach" --offload model

Needs access to FLUX.1 [dev] (non-commercial licence), the released adapter, and insightface's antelopev2
models (non-commercial research only). The 8-bit transformer needs torchao
(`pip install -c constraints.txt torchao`); without it, `--quantize none`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel, TorchAoConfig
from transformers import SiglipImageProcessor, SiglipVisionModel

from withanyone import FaceAdapter, FaceAnalyzer, WithAnyonePipeline, slider_scales

FLUX = "black-forest-labs/FLUX.1-dev"
SIGLIP = "google/siglip-base-patch16-256-i18n"  # the image encoder that the released adapter was trained with


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=FLUX, help="a FLUX.1 folder or Hub id")
    parser.add_argument("--adapter", required=True, help="withanyone.safetensors, as released")
    parser.add_argument("--face-pack", required=True, help="the folder of antelopev2's ONNX models")
    parser.add_argument("--image-encoder", default=SIGLIP)
    parser.add_argument("--face", action="append", required=True, help="a photo; once for each person")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--similarity", type=float, default=1.0)
    parser.add_argument("--diversity", type=float, default=0.0, help="0: resemblance in form; 1: in spirit")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantize", choices=("none", "int8"), default="int8")
    parser.add_argument("--offload", choices=("none", "model", "group"), default="model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="flux_dev.png")
    args = parser.parse_args(argv)

    pipe = load(args.model, args.adapter, args.face_pack, args.image_encoder, args.quantize)
    place(pipe, args.offload, args.device)
    id_scale, siglip_scale = slider_scales(args.similarity, args.diversity)
    out = pipe(
        prompt=args.prompt,
        faces=args.face,
        id_scale=id_scale,
        siglip_scale=siglip_scale,
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    out.images[0].save(args.out)
    print(args.out)


def load(model: str, adapter: str, face_pack: str, image_encoder: str, quantize: str) -> WithAnyonePipeline:
    """FLUX.1 with the adapter's parts; the transformer in bfloat16, or its weights in 8 bits."""
    config = None
    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    transformer = FluxTransformer2DModel.from_pretrained(
        model, subfolder="transformer", quantization_config=config, dtype=torch.bfloat16
    )
    return WithAnyonePipeline.from_pretrained(
        model,
        transformer=transformer,
        face_adapter=FaceAdapter.from_single_file(adapter).to(torch.bfloat16),
        face_analyzer=FaceAnalyzer.from_pretrained(face_pack),
        image_encoder=SiglipVisionModel.from_pretrained(image_encoder, dtype=torch.bfloat16),
        feature_extractor=SiglipImageProcessor.from_pretrained(image_encoder),
        dtype=torch.bfloat16,
    )


def place(pipe: WithAnyonePipeline, offload: str, device: str) -> None:
    """All on the device; or one model at a time ("model"); or one layer at a time ("group", least memory)."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        on_cuda = torch.device(device).type == "cuda"
        pipe.enable_group_offload(
            torch.device(device), offload_type="leaf_level", use_stream=on_cuda, exclude_modules="vae"
        )
    else:
        pipe.to(device)


if __name__ == "__main__":
    main()
