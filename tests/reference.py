"""An independent face adapter, written from the method's equations alone: plain torch, all tokens, masks.

It shares no code with `withanyone`: face tokens, keys and values are computed anew in every block, every
image token goes through every branch, and a mask says which face tokens it may see. Weights come as a dict in
the released key layout.
"""

import math

import torch
import torch.nn.functional as F

HEAD_DIM = 64


def random_checkpoint(
    hidden_size, num_blocks, heads, *, embedding_dim=512, feature_dim=768, id_tokens=8, seed=0
):
    """Random weights in the released layout, strong enough that every part is visible in the output."""
    g = torch.Generator().manual_seed(seed)
    inner = heads * HEAD_DIM

    def linear(rows, columns):
        return torch.randn(rows, columns, generator=g) * columns**-0.5

    def small(rows):
        return 0.2 * torch.randn(rows, generator=g)

    state = {}
    for branch in ("arc", "sig"):
        mlps = {"arcface_in": (embedding_dim, 4 * hidden_size, id_tokens * hidden_size)}
        if branch == "sig":
            mlps["siglip_in"] = (feature_dim, hidden_size, hidden_size)
        for name, (a, b, c) in mlps.items():
            name = f"{name}_{branch}"
            state |= {f"{name}.0.weight": linear(b, a), f"{name}.0.bias": small(b)}
            state |= {f"{name}.2.weight": 1 + small(b), f"{name}.2.bias": small(b)}
            state |= {f"{name}.3.weight": linear(c, b), f"{name}.3.bias": small(c)}
        for i in range(num_blocks):
            name = f"ipa_{branch}.{i}"
            for norm in ("norm1", "norm2"):
                state |= {
                    f"{name}.{norm}.weight": 1 + small(hidden_size),
                    f"{name}.{norm}.bias": small(hidden_size),
                }
            state[f"{name}.to_q.weight"] = linear(inner, hidden_size)
            state[f"{name}.to_kv.weight"] = linear(2 * inner, hidden_size)
            state[f"{name}.to_out.weight"] = linear(hidden_size, inner)
    return state


def mlp(state, name, x):
    x = F.gelu(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
    x = F.layer_norm(x, x.shape[-1:], state[f"{name}.2.weight"], state[f"{name}.2.bias"], eps=1e-5)
    return x @ state[f"{name}.3.weight"].T + state[f"{name}.3.bias"]


def face_tokens(state, branch, embedding, features):
    """Tokens (L, D) of one face from its embedding (E,) and image features (S, C)."""
    hidden_size = state[f"ipa_{branch}.0.norm1.weight"].shape[0]
    identity = mlp(state, f"arcface_in_{branch}", embedding).reshape(-1, hidden_size)
    if branch == "arc":
        return identity
    return torch.cat([mlp(state, "siglip_in_sig", features), identity])


def cross_attention(state, branch, i, x, tokens, allowed):
    """CA(x, tokens) for one picture: x (N, D), tokens (L, D), allowed (N, L); 0 where nothing is allowed."""
    name = f"ipa_{branch}.{i}"
    width = x.shape[-1:]
    t = F.layer_norm(tokens, width, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"], eps=1e-5)
    x = F.layer_norm(x, width, state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"], eps=1e-5)
    q = x @ state[f"{name}.to_q.weight"].T
    kv = t @ state[f"{name}.to_kv.weight"].T
    inner = q.shape[-1]
    k, v = kv[:, :inner], kv[:, inner:]
    out = torch.zeros_like(q)
    for h in range(inner // HEAD_DIM):
        part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        scores = q[:, part] @ k[:, part].T / math.sqrt(HEAD_DIM)
        scores = torch.where(allowed, scores, torch.full_like(scores, -1e30))
        weights = torch.softmax(scores, dim=-1) * allowed
        out[:, part] = weights @ v[:, part]
    return out @ state[f"{name}.to_out.weight"].T


def under_box(box, height, width, patch=16):
    """Which image tokens, row by row, a box touches: (N,) bool."""
    x1, y1, x2, y2 = box
    inside = []
    for row in range(height // patch):
        for column in range(width // patch):
            in_columns = math.floor(x1 / patch) <= column < math.ceil(x2 / patch)
            in_rows = math.floor(y1 / patch) <= row < math.ceil(y2 / patch)
            inside.append(in_columns and in_rows)
    return torch.tensor(inside)


def run(transformer, state, embeddings, features, bboxes, height, width, id_scale, siglip_scale, **inputs):
    """The transformer's output with the adapter; scales are numbers or one a picture."""
    batch = len(bboxes)
    scales = {
        "arc": torch.as_tensor(id_scale, dtype=torch.float32).expand(batch),
        "sig": torch.as_tensor(siglip_scale, dtype=torch.float32).expand(batch),
    }

    def residual(i, x):
        out = []
        for b, boxes in enumerate(bboxes):
            total = torch.zeros_like(x[b])
            for branch, scale in scales.items() if boxes else ():
                tokens = [
                    face_tokens(state, branch, embeddings[b, f], features[b, f]) for f in range(len(boxes))
                ]
                allowed = [
                    under_box(box, height, width)[:, None].expand(-1, len(t))
                    for box, t in zip(boxes, tokens, strict=True)
                ]
                total = total + scale[b] * cross_attention(
                    state, branch, i, x[b], torch.cat(tokens), torch.cat(allowed, dim=1)
                )
            out.append(total)
        return torch.stack(out)

    handles = []
    for i, block in enumerate([*transformer.transformer_blocks, *transformer.single_transformer_blocks]):

        def hook(module, args, output, i=i):
            text, image = output
            return text, image + residual(i, image)

        handles.append(block.register_forward_hook(hook))
    try:
        return transformer(**inputs, return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
