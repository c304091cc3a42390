"""The face adapter: face tokens, cross-attention after every block, and how a transformer gets it.

After every block of FLUX.1 the image tokens x (never the text tokens) become

    x + id_scale * CA_arc[i](x, arc tokens) + siglip_scale * CA_sig[i](x, sig tokens)

where a token attends only to the faces whose box touches it (WithAnyone, arXiv 2510.14975, and its released
code). Module names are those of the released checkpoint.

What is computed when. `encode` runs once a picture: it makes the face tokens and every block's keys and
values, which depend on no timestep. Each denoising step then gathers the image tokens under boxes, and only
those. Where a face has few tokens (the arc branch: 8) the query projection is folded into the keys and the
output projection into the values. A branch whose scale is 0 is not there at all.

The conditioning is an argument of the transformer's call, never state of the adapter:

    adapter.attach(transformer)
    conditioning = adapter.encode(embeddings, image_features, bboxes, height, width)
    transformer(..., joint_attention_kwargs={"ip_hidden_states": conditioning})
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from . import bases, checkpoint
from .bases import HOOK_NAME, transformer_blocks
from .conditioning import BranchConditioning, FaceConditioning, TokenGroups, group_tokens
from .layout import token_mask

logger = logging.getLogger(__name__)

CONDITIONING_KEY = "ip_hidden_states"  # a name that FluxAttention drops quietly
BRANCHES = ("arc", "sig")


# The maths


class FaceCrossAttention(nn.Module):
    """CA(x, f): the image tokens x under boxes attend to the tokens f of their faces; no bias, no rotary.

    `norm1` is for the face tokens, `norm2` for the image tokens; heads are `head_dim` wide, the scale is
    1 / sqrt(head_dim).
    """

    def __init__(self, hidden_size: int, inner_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.to_q = nn.Linear(hidden_size, inner_dim, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner_dim, bias=False)  # keys first, then values
        self.to_out = nn.Linear(inner_dim, hidden_size, bias=False)

    def keys_values(self, face_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (P, heads, L, head_dim) of `face_tokens` (P, L, D)."""
        keys, values = self.to_kv(self.norm1(face_tokens)).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    @property
    def can_fold(self) -> bool:
        """False where the projections' weights are stored in a form of their own: quantised, 8-bit floats."""
        return all(
            type(linear) is nn.Linear
            and type(linear.weight) is nn.Parameter
            and linear.weight.element_size() > 1
            for linear in (self.to_q, self.to_out)
        )

    def fold(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K W_q / sqrt(d) and V W_o by head, (P, heads, L, D) each: no projections are left to do."""
        to_q = self.to_q.weight.unflatten(0, (-1, self.head_dim))  # (heads, d, D)
        to_out = self.to_out.weight.T.unflatten(0, (-1, self.head_dim))  # (heads, d, D)
        return keys @ (to_q * self.head_dim**-0.5), values @ to_out

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, groups: TokenGroups, folded: bool
    ) -> torch.Tensor:
        """What attention adds to the image tokens x (M, C, D); keys and values of each group of them, (G,
        heads, S * L, *)."""
        attend = self._attend_folded if folded else self._attend
        x = self.norm2(x.to(self.norm2.weight.dtype))
        return attend(x, keys, values, groups.mask(keys.shape[-2] // groups.faces.shape[1]), groups)

    def _attend(self, x, keys, values, mask, groups: TokenGroups) -> torch.Tensor:
        queries = self._heads(groups.split(self.to_q(x)))  # (G, heads, T C, d)
        out = F.scaled_dot_product_attention(
            queries, keys.to(queries.dtype), values.to(queries.dtype), attn_mask=mask
        )
        return self.to_out(groups.join(out.transpose(1, 2).flatten(2), x.shape[1]))  # (M, C, D)

    def _attend_folded(self, x, keys, values, mask, groups: TokenGroups) -> torch.Tensor:
        num_heads, num_keys = keys.shape[1:3]
        scores = groups.split(x) @ keys.flatten(1, 2).mT.to(x.dtype)  # (G, T C, heads S L)
        scores = scores.unflatten(-1, (num_heads, num_keys))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).flatten(-2)
        return groups.join(weights @ values.flatten(1, 2).to(weights.dtype), x.shape[1])  # (M, C, D)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def folding_pays(num_face_tokens: int, head_dim: int) -> bool:
    """An image token costs heads * L rows of width D each way folded, heads * head_dim otherwise."""
    return 2 * num_face_tokens <= head_dim


def add_faces(
    hidden_states: torch.Tensor,
    conditioning: FaceConditioning,
    attentions: dict[str, FaceCrossAttention],
    block: int,
) -> torch.Tensor:
    """`hidden_states` (B * C, N, D) with what one block sees of the faces; outside boxes as they were."""
    groups, batch_size = conditioning.groups, conditioning.batch_size
    if hidden_states.shape[1] != conditioning.num_tokens or hidden_states.shape[0] % batch_size:
        raise ValueError(
            f"The transformer runs {hidden_states.shape[0]} pictures of {hidden_states.shape[1]} image "
            f"tokens, but the faces are for {batch_size} of {conditioning.num_tokens}; call `encode` "
            "with the same `height` and `width` and one list of boxes for each picture."
        )
    # Every row may come in C copies: tokens first, (B N, C, D).
    flat = hidden_states.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(0, 1)
    x = flat.index_select(0, groups.tokens)  # (M, C, D)
    residual = None
    for name, branch in conditioning.branches.items():
        added = attentions[name](x, branch.keys[block], branch.values[block], groups, branch.folded)
        residual = added if residual is None else residual + added
    flat = flat.index_add(0, groups.tokens, residual.to(flat.dtype))
    return flat.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(0, 1)  # (B C, N, D)


class FaceHook(ModelHook):
    """Runs after one block of the transformer and adds the faces to its image tokens."""

    def __init__(self, adapter: FaceAdapter, block: int, image_output: int, kwargs_position: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.attentions = {name: adapter.attentions(name)[block] for name in adapter.branches}
        self.block = block
        self.image_output = image_output
        self.kwargs_position = kwargs_position

    def new_forward(self, module: nn.Module, *args, **kwargs):
        output = self.fn_ref.original_forward(*args, **kwargs)
        if "joint_attention_kwargs" in kwargs:
            call_kwargs = kwargs["joint_attention_kwargs"]
        else:  # gradient checkpointing passes everything by position
            call_kwargs = args[self.kwargs_position] if len(args) > self.kwargs_position else None
        conditioning = None if call_kwargs is None else call_kwargs.get(CONDITIONING_KEY)
        if not isinstance(conditioning, FaceConditioning) or conditioning.is_empty:
            return output
        i = self.image_output
        hidden_states = add_faces(output[i], conditioning, self.attentions, self.block)
        return (*output[:i], hidden_states, *output[i + 1 :])


# The model


@dataclass(frozen=True)
class AdapterPart:
    """Modules of the adapter that belong together, and whether the denoising loop needs them."""

    name: str
    modules: tuple[nn.Module, ...]
    in_loop: bool


class FaceAdapter(ModelMixin, ConfigMixin):
    """Turns faces into tokens and lets the image tokens of a transformer attend to them.

    Args:
        hidden_size: width D of the transformer.
        num_blocks: blocks of the transformer, double-stream first.
        inner_dim: width of the attention; it has inner_dim / head_dim heads.
        head_dim: width of a head, 64 in all released weights.
        embedding_dim: width of the recognition embedding.
        image_feature_dim: width of the image encoder's last hidden state.
        num_id_tokens: tokens made of an embedding.
        id_hidden_size: inner width of the embedding's MLP; None: 4 D.
        image_hidden_size: inner width of the image features' MLP; None: D.
        tokens_per_image_feature: tokens made of each image feature.
        pixels_per_token: pixels of the output along a side of an image token (VAE factor 8, patch 2: 16).
        branches: `("arc", "sig")`, or one of them where a branch is trained apart.

    Defaults are the released weights'. Untrained, every `to_out` is 0, so the adapter changes nothing.
    """

    _no_split_modules = ["FaceCrossAttention"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 3072,
        num_blocks: int = 57,
        inner_dim: int = 1536,
        head_dim: int = 64,
        embedding_dim: int = 512,
        image_feature_dim: int = 768,
        num_id_tokens: int = 8,
        id_hidden_size: int | None = None,
        image_hidden_size: int | None = None,
        tokens_per_image_feature: int = 1,
        pixels_per_token: int = 16,
        branches: Sequence[str] = BRANCHES,
    ) -> None:
        super().__init__()
        if inner_dim % head_dim:
            raise ValueError(f"`inner_dim` is {inner_dim}; give a multiple of `head_dim` ({head_dim}).")
        if not branches or list(branches) != [name for name in BRANCHES if name in branches]:
            raise ValueError(f"`branches` is {branches!r}; give ('arc', 'sig'), ('arc',) or ('sig',).")
        id_hidden_size = id_hidden_size or 4 * hidden_size
        image_hidden_size = image_hidden_size or hidden_size
        for name in branches:
            attentions = (FaceCrossAttention(hidden_size, inner_dim, head_dim) for _ in range(num_blocks))
            self.add_module(f"ipa_{name}", nn.ModuleList(attentions))
            self.add_module(
                f"arcface_in_{name}", _mlp(embedding_dim, id_hidden_size, num_id_tokens * hidden_size)
            )
        if "sig" in branches:
            out = tokens_per_image_feature * hidden_size
            self.siglip_in_sig = _mlp(image_feature_dim, image_hidden_size, out)
        # Tensors of a released file that no computation uses, kept for writing it back (never on a device).
        self.unused_tensors: dict[str, torch.Tensor] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        """For training from nothing: unit-variance queries, keys and values; nothing added yet."""
        for module in self.modules():
            if isinstance(module, FaceCrossAttention):
                nn.init.normal_(module.to_q.weight, std=self.config.hidden_size**-0.5)
                nn.init.normal_(module.to_kv.weight, std=self.config.hidden_size**-0.5)
                nn.init.zeros_(module.to_out.weight)
            elif isinstance(module, nn.Sequential):
                for linear in (module[0], module[3]):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.zeros_(linear.bias)

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(self.config.branches)

    def attentions(self, branch: str) -> nn.ModuleList:
        """The cross-attention of every block of one branch."""
        return getattr(self, f"ipa_{branch}")

    def parts(self) -> list[AdapterPart]:
        """The adapter in parts, each with its place in time.

        After `encode`, the denoising loop needs neither the MLPs nor `norm1` and `to_kv`; a folded branch
        needs no more than `norm2`.
        """
        parts = []
        for branch in self.branches:
            inputs = ("arcface_in_arc",) if branch == "arc" else ("arcface_in_sig", "siglip_in_sig")
            parts += [AdapterPart(name, (getattr(self, name),), in_loop=False) for name in inputs]
            folds = branch == "arc" and self._folds("arc", self.config.num_id_tokens)
            for name in ("norm1", "norm2", "to_q", "to_kv", "to_out"):
                modules = tuple(getattr(attention, name) for attention in self.attentions(branch))
                in_loop = name == "norm2" or (name in ("to_q", "to_out") and not folds)
                parts.append(AdapterPart(f"ipa_{branch}.*.{name}", modules, in_loop))
        return parts

    def put_encoding_aside(self) -> None:
        """Move to the CPU what `encode` alone needs: 4.2 of the released adapter's 5.2 GiB in bfloat16."""
        for part in self.parts():
            if not part.in_loop:
                for module in part.modules:
                    module.to("cpu")

    # Faces to conditioning

    def face_tokens(
        self, branch: str, embeddings: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens (P, L, D) of P faces for one branch.

        arc: those of the `embeddings` (P, embedding_dim). sig: those of the `image_features`
        (P, S, image_feature_dim), and after them those of the embeddings through an MLP of its own.
        """
        hidden_size = self.config.hidden_size
        tokens = getattr(self, f"arcface_in_{branch}")(embeddings)
        tokens = tokens.unflatten(-1, (-1, hidden_size))  # (P, 8, D)
        if branch == "arc":
            return tokens
        image_tokens = self.siglip_in_sig(image_features)
        image_tokens = image_tokens.unflatten(-1, (-1, hidden_size)).flatten(1, 2)  # (P, S, D)
        return torch.cat([image_tokens, tokens.to(image_tokens.dtype)], dim=1)

    def encode(
        self,
        embeddings: torch.Tensor,
        image_features: torch.Tensor | None,
        bboxes: Sequence[Sequence[Sequence[float]]],
        height: int,
        width: int,
        *,
        id_scale: float | torch.Tensor | None = None,
        siglip_scale: float | torch.Tensor | None = None,
    ) -> FaceConditioning:
        """Everything of the adapter that depends on no timestep, once a picture; differentiable.

        Args:
            embeddings: (B, F, embedding_dim) raw recognition embeddings, F the most faces of a row.
            image_features: (B, F, S, image_feature_dim) the image encoder's last hidden state of each face
                crop; may be None where the sig branch has no part.
            bboxes: B lists of boxes (x1, y1, x2, y2) in output pixels. Row b has len(bboxes[b]) faces, none
                allowed; what `embeddings` and `image_features` hold beyond them is ignored. Boxes may overlap
                and are clipped to the picture.
            height, width: the picture's size in pixels, multiples of `pixels_per_token`.
            id_scale, siglip_scale: strength of the arc and the sig branch, a number or (B,). Default: 0 and
                1, the released demo's, or 1 for the branch of a single-branch adapter. A branch that is 0 in
                all rows is left out.

        Raises:
            ValueError: a shape, box or scale that does not fit; the message names it.
        """
        face_mask = token_mask(bboxes, height, width, self.config.pixels_per_token)  # (B, N, F)
        num_faces = [len(boxes) for boxes in bboxes]
        return self.encode_masked(
            embeddings, image_features, face_mask, num_faces, id_scale=id_scale, siglip_scale=siglip_scale
        )

    def encode_masked(
        self,
        embeddings: torch.Tensor,
        image_features: torch.Tensor | None,
        face_mask: torch.Tensor,
        num_faces: Sequence[int],
        *,
        id_scale: float | torch.Tensor | None = None,
        siglip_scale: float | torch.Tensor | None = None,
    ) -> FaceConditioning:
        """`encode` where the boxes are known as tokens already, as training has them for every picture.

        face_mask: (B, N, F) bool of `layout.token_mask`, on the CPU; num_faces: how many of F each row has.
        """
        self._check_faces(embeddings, image_features, num_faces)
        scales = self._branch_scales(id_scale, siglip_scale, len(num_faces))
        if scales.get("sig") is not None and image_features is None and any(num_faces):
            raise ValueError(
                "`image_features` is None, which only an adapter without the sig branch, or "
                "`siglip_scale=0`, allows; give (B, F, S, "
                f"{self.config.image_feature_dim}) or set `siglip_scale` to 0."
            )

        # Only the faces there are: (P, ...).
        rows = [b for b, count in enumerate(num_faces) for _ in range(count)]
        faces = [f for count in num_faces for f in range(count)]
        groups = group_tokens(face_mask, num_faces).to(self.device)
        branches = {}
        for name, scale in scales.items() if rows else ():
            features = None if name == "arc" else self._to_own(image_features[rows, faces])
            tokens = self.face_tokens(name, self._to_own(embeddings[rows, faces]), features)
            branches[name] = self._encode_branch(name, tokens, scale[rows], groups)
        return FaceConditioning(len(num_faces), face_mask.shape[1], groups, branches)

    forward = encode

    def _encode_branch(
        self, name: str, tokens: torch.Tensor, scale: torch.Tensor, groups: TokenGroups
    ) -> BranchConditioning:
        """Keys and values of every block for face `tokens` (P, L, D), the values times `scale` (P,), put
        together for each of the `groups`: no step and no block has to do it again."""
        folded = self._folds(name, tokens.shape[1])
        keys, values = [], []
        for attention in self.attentions(name):
            key, value = attention.keys_values(tokens)
            # to_out is linear: scaling the values scales what the branch adds.
            value = value * scale.to(value)[:, None, None, None]
            if folded:
                key, value = attention.fold(key, value)
            keys.append(groups.of_groups(key))
            values.append(groups.of_groups(value))
        if torch.is_grad_enabled() and any(
            key.requires_grad or value.requires_grad for key, value in zip(keys, values, strict=True)
        ):
            # Apart, so that a block's gradient is as large as its own keys, not as all blocks'.
            return BranchConditioning(tuple(keys), tuple(values), folded)
        return BranchConditioning(torch.stack(keys), torch.stack(values), folded)

    def _folds(self, branch: str, num_face_tokens: int) -> bool:
        """Whether a branch of so many tokens a face is encoded with its projections in keys and values."""
        pays = folding_pays(num_face_tokens, self.config.head_dim)
        return pays and all(attention.can_fold for attention in self.attentions(branch))

    def _to_own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def _check_faces(self, embeddings, image_features, num_faces: Sequence[int]) -> None:
        """Raises ValueError where the tensors do not hold each row's number of faces."""
        if not num_faces:
            raise ValueError("`bboxes` is empty; give one list of boxes for each picture of the batch.")
        needed = (len(num_faces), max(num_faces))
        tensors = {"embeddings": (embeddings, 3, self.config.embedding_dim)}
        if image_features is not None:
            tensors["image_features"] = (image_features, 4, self.config.image_feature_dim)
        for name, (tensor, ndim, width) in tensors.items():
            shape = tuple(tensor.shape)
            if len(shape) != ndim or shape[-1] != width or shape[0] != needed[0] or shape[1] < needed[1]:
                wanted = "(B, F, " + ("S, " if ndim == 4 else "") + f"{width})"
                raise ValueError(
                    f"`{name}` has shape {shape}; give {wanted} with B = {needed[0]} pictures and F at least "
                    f"{needed[1]} faces, as many as `bboxes` has in its longest row."
                )

    def _branch_scales(self, id_scale, siglip_scale, batch_size: int) -> dict[str, torch.Tensor]:
        """The scale (B,) of each branch that is not 0 everywhere."""
        given = {"arc": ("id_scale", id_scale), "sig": ("siglip_scale", siglip_scale)}
        released = {"arc": 0.0, "sig": 1.0}
        scales = {}
        for branch, (name, scale) in given.items():
            if scale is None:
                scale = (
                    (released[branch] if len(self.branches) == 2 else 1.0) if branch in self.branches else 0.0
                )
            scale = check_scale(scale, name, batch_size)
            if (scale == 0).all():
                continue
            if branch not in self.branches:
                raise ValueError(
                    f"`{name}` is {scale.tolist()}, but this adapter has no {branch} branch; set it to 0 or "
                    "use an adapter with both branches."
                )
            scales[branch] = scale
        return scales

    # On and off a transformer

    def attach(self, transformer: nn.Module) -> None:
        """Add the faces after every block of `transformer`, through diffusers' hook registry.

        The transformer stays as it is otherwise: without conditioning its output is bit for bit the base's,
        and its state dict keeps its keys. Attaching again changes nothing; attaching another adapter replaces
        the first.

        Compiled blocks (`compile_repeated_blocks`) are reused by pictures of the same kind. One face or
        several, boxes apart or overlapping, one branch or both are kinds of their own and compile anew, about
        three graphs each: raise `torch._dynamo.config.recompile_limit` (8) where a process sees several.

        Raises:
            ValueError: an unknown transformer, one of another width or number of blocks, or one whose blocks
                were already compiled or cached (attach first: hooks added later are ignored or run in the
                wrong order).
        """
        self._check_fits(transformer)
        if self.is_attached(transformer):
            return
        bases.check_attachable(transformer)
        for index, (block, image_output) in enumerate(transformer_blocks(transformer)):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.remove_hook(HOOK_NAME, recurse=False)
            parameters = list(inspect.signature(type(block).forward).parameters)
            position = parameters.index("joint_attention_kwargs") - 1  # without self
            registry.register_hook(FaceHook(self, index, image_output, position), HOOK_NAME)

    def detach(self, transformer: nn.Module) -> None:
        """Restore the base `transformer`. Nothing happens where no adapter is attached."""
        if not any(bases.attached_hooks(transformer)):
            return
        if not self.is_attached(transformer):
            raise ValueError("Another adapter is attached to the `transformer`; call `detach` on that one.")
        bases.check_detachable(transformer)
        for block, _ in transformer_blocks(transformer):
            HookRegistry.check_if_exists_or_initialize(block).remove_hook(HOOK_NAME, recurse=False)

    def is_attached(self, transformer: nn.Module) -> bool:
        """True where this adapter's faces are added in every block of `transformer`."""
        hooks = bases.attached_hooks(transformer)
        return bool(hooks) and all(hook is not None and hook.adapter is self for hook in hooks)

    def _check_fits(self, transformer: nn.Module) -> None:
        num_blocks = len(transformer_blocks(transformer))
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        if width != self.config.hidden_size:
            raise ValueError(
                f"The adapter is for a `transformer` of width {self.config.hidden_size}, this one is {width} "
                "wide; use the base the adapter was trained on, or an adapter trained on this base."
            )
        if num_blocks != self.config.num_blocks:
            raise ValueError(
                f"The adapter is for a `transformer` of {self.config.num_blocks} blocks, this one has "
                f"{num_blocks}; use the base the adapter was trained on, or an adapter trained on this base."
            )

    # Files

    def to_json_string(self) -> str:
        """The config as it is saved: without the path it was read from, which tells about a machine."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `ModelMixin.from_pretrained`, but strict, and from safetensors alone.

        Raises:
            ValueError: weights that are missing, unexpected, of another shape, cut off or a pickle.
        """
        source = os.fspath(pretrained_model_name_or_path)
        checkpoint.refuse_pickles(kwargs)
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir():
            config = cls.load_config(folder)
            if "quantization_config" not in config:  # whose tensors have names and shapes of their own
                with torch.device("meta"):
                    expected = checkpoint.shapes_of(cls.from_config(config).state_dict())
                checkpoint.check_shapes(checkpoint.read_shapes(folder), expected, str(folder))
        wants_info = kwargs.pop("output_loading_info", False)
        adapter, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        checkpoint.check_keys(info["missing_keys"], info["unexpected_keys"], source)
        return (adapter, info) if wants_info else adapter

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        *,
        branch: str | None = None,
        dtype: torch.dtype | None = None,
        pixels_per_token: int | None = None,
    ) -> FaceAdapter:
        """The adapter in a `.safetensors` file of the released layout; its sizes are read from the shapes.

        Args:
            path: `withanyone.safetensors`, or a training checkpoint of one branch (`ipa.*`).
            branch: which branch a single-branch file holds, `"arc"` or `"sig"`; the names do not tell.
            dtype: of the parameters; None: as in the file.
            pixels_per_token: where the file does not say, 16.

        Raises:
            ValueError: not a safetensors file, or keys that are missing, unexpected or of another shape; all
                are named. `siglip_in_arc.*`, which no computation uses, is kept for `save_single_file` and
                logged.
        """
        loaded = checkpoint.read_single_file(path, branch)
        return cls._from_loaded(loaded, str(path), dtype, pixels_per_token)

    @classmethod
    def merge_branches(
        cls, arc_file: str | os.PathLike, sig_file: str | os.PathLike, *, dtype: torch.dtype | None = None
    ) -> FaceAdapter:
        """One adapter of two single-branch checkpoints that were trained apart on the same base."""
        arc, sig = checkpoint.read_single_file(arc_file, "arc"), checkpoint.read_single_file(sig_file, "sig")
        source = f"{arc_file} and {sig_file}"
        return cls._from_loaded(checkpoint.merge(arc, sig, str(arc_file), str(sig_file)), source, dtype, None)

    @classmethod
    def _from_loaded(
        cls,
        loaded: checkpoint.Loaded,
        source: str,
        dtype: torch.dtype | None,
        pixels_per_token: int | None,
    ) -> FaceAdapter:
        config = checkpoint.infer_config(loaded)
        if pixels_per_token is not None:
            config["pixels_per_token"] = pixels_per_token
        with torch.device("meta"):
            adapter = cls(**config)
        shapes = (checkpoint.shapes_of(tensors) for tensors in (loaded.tensors, adapter.state_dict()))
        checkpoint.check_shapes(*shapes, source)
        adapter.load_state_dict(loaded.tensors, strict=True, assign=True)
        adapter.unused_tensors = loaded.unused
        if loaded.unused:
            logger.info(
                "%s holds %s: unused, kept for writing back.", source, ", ".join(sorted(loaded.unused))
            )
        if dtype is not None:
            adapter.to(dtype)
        return adapter.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `ModelMixin.save_pretrained`, which with `push_to_hub=True` takes no path objects."""
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def save_single_file(self, path: str | os.PathLike) -> None:
        """Write the released layout; an adapter of one branch becomes a single-branch training checkpoint."""
        checkpoint.write_single_file(path, self.state_dict(), self.unused_tensors, dict(self.config))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, GELU, LayerNorm, Linear: what turns an embedding or an image feature into face tokens."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.LayerNorm(hidden_dim, eps=1e-5),
        nn.Linear(hidden_dim, out_dim),
    )


def check_scale(scale: float | torch.Tensor, name: str, batch_size: int = 1) -> torch.Tensor:
    """`scale` (a number or (B,)) as (B,) float32, or a ValueError where it is negative, NaN or infinite."""
    given = scale
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if scale.ndim > 1 or scale.numel() not in (1, batch_size):
        raise ValueError(
            f"`{name}` has shape {tuple(scale.shape)}; give one number, or one for each of {batch_size}."
        )
    if not (torch.isfinite(scale).all() and (scale >= 0).all()):
        raise ValueError(f"`{name}` is {given}; give a finite number of at least 0.")
    return scale.flatten().expand(batch_size)


# Size on paper


@dataclass(frozen=True)
class PartSize:
    """One line of the adapter's size: parameters, bytes, and whether the denoising loop needs them."""

    part: str
    parameters: int
    bytes: int
    in_loop: bool


def parameter_table(adapter: FaceAdapter) -> list[PartSize]:
    """Parameters and bytes of each part of `adapter`, which may be on the meta device."""
    table = []
    for part in adapter.parts():
        parameters = [p for module in part.modules for p in module.parameters()]
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in parameters)
        table.append(PartSize(part.name, count, size, part.in_loop))
    return table
