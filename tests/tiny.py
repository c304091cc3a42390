"""Tiny random components in the released formats, so that tests need neither weights nor a network.

Every shape rule of FLUX.1 holds, only the numbers are small: the VAE shrinks by 8 and the transformer takes
2 x 2 latent patches, so one token is 16 x 16 pixels; the adapter's heads are 64 wide as released.

    transformer   width 32 (2 heads of 16), 2 double-stream and 3 single-stream blocks
    text          CLIP and T5 of width 32 on letters
    image encoder SigLIP of width 24 on 32 px: 16 tokens
    adapter       hidden_size 32, inner_dim 64, embeddings of 512 numbers, 8 identity tokens

Text encoders and weights are made anew at each call, from `seed`; nothing is cached, nothing is written.
"""

from __future__ import annotations

import string

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LATENT_CHANNELS = 4
HIDDEN_SIZE = 32
NUM_LAYERS = 2
NUM_SINGLE_LAYERS = 3
NUM_BLOCKS = NUM_LAYERS + NUM_SINGLE_LAYERS
TEXT_WIDTH = 32
IMAGE_FEATURE_DIM = 24
IMAGE_TOKENS = 16
IMAGE_SIZE = 32
EMBEDDING_DIM = 512
LETTERS = string.ascii_lowercase


def transformer(seed: int = 0, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    """A FLUX.1 transformer of width 32; `guidance_embeds=False` as in FLUX.1 [schnell]."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=NUM_LAYERS,
        num_single_layers=NUM_SINGLE_LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return model.eval().requires_grad_(False)


def text_encoder(seed: int = 1) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: one token a letter."""
    symbols = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def text_encoder_2(seed: int = 2) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(vocab_size=32, d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval().requires_grad_(False)


def tokenizer_2() -> T5TokenizerFast:
    """T5's tokenizer on letters: 30 pieces."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = specials + [(letter, -1.0 - 0.01 * number) for number, letter in enumerate(LETTERS)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def vae(seed: int = 3) -> AutoencoderKL:
    """Four levels of four channels: factor 8 like FLUX.1's."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    return model.eval().requires_grad_(False)


def image_encoder(seed: int = 4) -> SiglipVisionModel:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=IMAGE_FEATURE_DIM,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval().requires_grad_(False)


def feature_extractor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1 [dev]'s scheduler: shift by the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def flux_components(seed: int = 0, guidance_embeds: bool = True) -> dict:
    """The seven components of a FLUX.1 folder."""
    return {
        "scheduler": scheduler(),
        "vae": vae(seed + 3),
        "text_encoder": text_encoder(seed + 1),
        "tokenizer": tokenizer(),
        "text_encoder_2": text_encoder_2(seed + 2),
        "tokenizer_2": tokenizer_2(),
        "transformer": transformer(seed, guidance_embeds),
    }


def face_adapter(seed: int = 5, to_out_std: float = 0.0, **overrides):
    """A random adapter that fits `transformer()`; `overrides` go to FaceAdapter.

    A new adapter starts without effect; `to_out_std` above 0 gives it one.
    """
    from withanyone.adapter import FaceAdapter

    torch.manual_seed(seed)
    config = {
        "hidden_size": HIDDEN_SIZE,
        "num_blocks": NUM_BLOCKS,
        "inner_dim": 64,
        "embedding_dim": EMBEDDING_DIM,
        "image_feature_dim": IMAGE_FEATURE_DIM,
    }
    adapter = FaceAdapter(**{**config, **overrides})
    if to_out_std > 0:
        for name, weight in adapter.named_parameters():
            if name.endswith("to_out.weight"):
                torch.nn.init.normal_(weight, std=to_out_std)
    return adapter.eval().requires_grad_(False)


def pipeline(guidance_embeds: bool = True, **overrides):
    """A WithAnyonePipeline whose adapter has an effect and which finds no faces itself; give it `face(seed)`.

    `overrides`: other components, `timestep_shift`, `sampling_defaults`. 64 x 64 px and two steps by default.
    """
    from withanyone import WithAnyonePipeline

    parts = {
        **flux_components(guidance_embeds=guidance_embeds),
        "image_encoder": image_encoder(),
        "feature_extractor": feature_extractor(),
        "face_adapter": face_adapter(to_out_std=0.3),
        "sampling_defaults": {"height": 64, "width": 64, "num_inference_steps": 2},
    }
    pipe = WithAnyonePipeline(**{**parts, **overrides})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def face(seed: int):
    """A Face with a random embedding and a random crop."""
    from withanyone import Face

    box = np.array([10, 10, 50, 60], np.float32)
    kps = np.array([[20, 30], [40, 30], [30, 40], [22, 50], [38, 50]], np.float32)
    return Face(
        bbox=box,
        kps=kps,
        det_score=0.9,
        embedding=embedding(seed),
        face_crop=Image.fromarray(face_crop(seed)),
    )


def transformer_inputs(
    batch: int = 2,
    height: int = 64,
    width: int = 64,
    text_tokens: int = 5,
    seed: int = 6,
    guidance: bool = True,
) -> dict:
    """Arguments of one call of `transformer()` for a picture of `height` x `width` pixels.

    hidden_states (B, N, 16) with N = (height / 16) * (width / 16), encoder_hidden_states (B, T, 32).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = height // 16, width // 16
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] += torch.arange(rows)[:, None]
    img_ids[..., 2] += torch.arange(columns)[None]
    inputs = {
        "hidden_states": torch.randn(batch, rows * columns, 4 * LATENT_CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_tokens, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": img_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    return {**inputs, "guidance": torch.full((batch,), 4.0)} if guidance else inputs


def embedding(seed: int) -> np.ndarray:
    """A raw recognition embedding (512,) float32 of about the norm real ones have (20 to 25)."""
    return np.random.default_rng(seed).standard_normal(EMBEDDING_DIM).astype(np.float32)


def face_crop(seed: int, size: int = 64) -> np.ndarray:
    """A random square picture (size, size, 3) uint8 in place of a face crop."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def image_features(batch: int, faces: int, seed: int = 7) -> torch.Tensor:
    """Random image features (B, F, 16, 24) as `image_encoder()` gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, faces, IMAGE_TOKENS, IMAGE_FEATURE_DIM, generator=generator)


def embeddings(batch: int, faces: int, seed: int = 8) -> torch.Tensor:
    """Random raw embeddings (B, F, 512)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, faces, EMBEDDING_DIM, generator=generator)
