"""What a call of the transformer needs to know about faces, and which image tokens see which of them.

`FaceAdapter.encode` makes a `FaceConditioning`. It travels as an argument of the transformer's call, so that
gradient checkpointing, offload and compilation handle it like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch


@dataclass(frozen=True)
class TokenGroups:
    """Image tokens under boxes, grouped by the faces they lie under: tokens of a group share keys and values.

    M tokens in G groups, P faces in the batch. For batched attention a group is padded to T tokens and S
    faces. Every picture has the same fields, so that a compiled block fits the next picture too; only `seen`
    is None where there is nothing to mask, which is where no boxes overlap.
    """

    tokens: torch.Tensor  # (M,) position among the B * N image tokens, group after group
    padded: torch.Tensor  # (G, T) which of the M tokens stands in a group's slot
    slots: torch.Tensor  # (M,) the slot among G * T where each token stands
    faces: torch.Tensor  # (G, S) the faces that a group sees
    seen: torch.Tensor | None  # (G, S) False where `faces` is padding; None: nowhere

    def to(self, *args, **kwargs) -> TokenGroups:
        """On another device."""
        return _map_tensors(self, lambda tensor: _move(tensor, *args, **kwargs))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (M, C, D), C pictures a row, into padded groups (G, T * C, D)."""
        return _pick(x, self.padded).flatten(1, 2)

    def join(self, x: torch.Tensor, num_copies: int) -> torch.Tensor:
        """Padded groups (G, T * C, D) back into tokens (M, C, D)."""
        return x.unflatten(1, (-1, num_copies)).flatten(0, 1).index_select(0, self.slots)

    def of_groups(self, x: torch.Tensor) -> torch.Tensor:
        """Rows per face (P, heads, L, C) to rows per group (G, heads, S * L, C)."""
        return _pick(x, self.faces).transpose(1, 2).flatten(2, 3)

    def mask(self, num_tokens: int) -> torch.Tensor | None:
        """Which face tokens a group may attend to, (G, 1, 1, S * num_tokens) bool; None: to all."""
        if self.seen is None:
            return None
        return self.seen.repeat_interleave(num_tokens, dim=1)[:, None, None, :]


@dataclass(frozen=True)
class BranchConditioning:
    """One branch's keys and values of every block and group of tokens, the branch's scale already in the
    values.

    Folded, they hold `to_q` and `to_out` too and are as wide as the transformer (C = D), else C = head_dim.
    They are indexed by block: one tensor, or under autograd a tuple of each block's own.
    """

    keys: torch.Tensor | tuple[torch.Tensor, ...]  # (blocks, G, heads, S * L, C)
    values: torch.Tensor | tuple[torch.Tensor, ...]  # (blocks, G, heads, S * L, C)
    folded: bool


@dataclass(frozen=True)
class FaceConditioning:
    """What a call of the transformer needs to know about faces: made by `FaceAdapter.encode`.

    Passed as `joint_attention_kwargs={"ip_hidden_states": conditioning}`. A batch that is a multiple C of
    `batch_size` is C pictures of each row, row after row, as `num_images_per_prompt` orders them.
    """

    batch_size: int
    num_tokens: int  # image tokens of one picture
    groups: TokenGroups
    branches: dict[str, BranchConditioning]  # those with a scale other than 0

    @property
    def is_empty(self) -> bool:
        """True where nothing would be added: no face, or both scales 0."""
        return not self.branches

    def to(self, *args, **kwargs) -> FaceConditioning:
        """On another device, or with the keys and values in another dtype; arguments as in `torch.Tensor.to`.

        Offloading hooks call this on every argument; what is there already is handed back as it is.
        """
        return _map_tensors(self, lambda tensor: _move(tensor, *args, **kwargs))

    def detach(self) -> FaceConditioning:
        """The same without gradients."""
        return _map_tensors(self, lambda tensor: tensor.detach())


def _pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] along the first dimension for an index of two; faster backwards."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _move(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`tensor.to(...)`, but indices keep their dtype."""
    moved = tensor.to(*args, **kwargs)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)


def _map_tensors(value, fn: Callable[[torch.Tensor], torch.Tensor]):
    """`value` with `fn` applied to every tensor in it; the same object where nothing changed."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple):
        items = tuple(_map_tensors(item, fn) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    if isinstance(value, dict):
        items = {key: _map_tensors(item, fn) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    if isinstance(value, (TokenGroups, BranchConditioning, FaceConditioning)):
        items = {field.name: _map_tensors(getattr(value, field.name), fn) for field in fields(value)}
        unchanged = all(items[name] is getattr(value, name) for name in items)
        return value if unchanged else replace(value, **items)
    return value


def _unique_lines(rows: torch.Tensor, absent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different lines of `rows` (M,) and `absent` (M, F), sorted, and which of them each of M is.

    As bits of one number while they fit, which sorts ten times as fast as lines do.
    """
    num_faces = absent.shape[1]
    if num_faces > 32:
        return torch.cat([rows[:, None], absent.long()], dim=1).unique(dim=0, return_inverse=True)
    shifts = torch.arange(num_faces - 1, -1, -1)
    codes = (rows << num_faces) + (absent.long() << shifts).sum(dim=1)
    codes, group = codes.unique(return_inverse=True)
    return torch.cat([(codes >> num_faces)[:, None], (codes[:, None] >> shifts) & 1], dim=1), group


def group_tokens(face_mask: torch.Tensor, num_faces: Sequence[int]) -> TokenGroups:
    """Groups of the image tokens in `face_mask` (B, N, F) that lie under the same faces.

    `num_faces` are the faces of each row; face (b, f) gets number sum(num_faces[:b]) + f among the P of the
    batch.
    """
    face_mask = face_mask.cpu()
    rows, positions = face_mask.any(-1).nonzero(as_tuple=True)  # (M,) each
    # One line a token: its row and the faces it is not under, so that groups sort by row, then by first face.
    lines, group = _unique_lines(rows, ~face_mask[rows, positions])  # (G, 1 + F), (M,)
    order = group.argsort(stable=True)
    group, tokens = group[order], (rows * face_mask.shape[1] + positions)[order]
    num_groups, sizes = len(lines), torch.bincount(group, minlength=len(lines))  # (G,)
    longest = int(sizes.max()) if num_groups else 0
    starts = sizes.cumsum(0) - sizes
    slots = group * longest + torch.arange(len(group)) - starts[group]
    padded = torch.zeros(num_groups * longest, dtype=torch.long)
    padded[slots] = torch.arange(len(group))

    first = [0, *accumulate(num_faces)]
    sets = [[first[row] + f for f, absent in enumerate(line) if not absent] for row, *line in lines.tolist()]
    most = max(map(len, sets), default=0)
    faces = torch.tensor([s + [s[0]] * (most - len(s)) for s in sets], dtype=torch.long)
    seen = torch.tensor([[k < len(s) for k in range(most)] for s in sets], dtype=torch.bool)
    return TokenGroups(
        tokens, padded.reshape(num_groups, longest), slots, faces, None if seen.all() else seen
    )
