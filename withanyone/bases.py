"""The transformers that a face adapter fits: which blocks they have, and what already hangs on these.

The one place that knows FLUX.1's make: another base whose blocks return text and image apart is a line in
`BASES`.
"""

from __future__ import annotations

from diffusers.hooks import ModelHook
from torch import nn

HOOK_NAME = "withanyone"

# The block lists of each base in running order, and where the image tokens stand in the tuple that a block
# returns.
BASES: dict[str, tuple[tuple[str, int], ...]] = {
    "FluxTransformer2DModel": (("transformer_blocks", 1), ("single_transformer_blocks", 1)),
}


def transformer_blocks(transformer: nn.Module) -> list[tuple[nn.Module, int]]:
    """The blocks of `transformer` in running order, each with the place of the image tokens in its output."""
    base = next((parent.__name__ for parent in type(transformer).__mro__ if parent.__name__ in BASES), None)
    if base is None:
        hint = " Attach first, then compile." if hasattr(transformer, "_orig_mod") else ""
        name = type(transformer).__name__
        raise ValueError(f"`transformer` is a {name}; the adapter knows {', '.join(BASES)}.{hint}")
    return [(block, output) for name, output in BASES[base] for block in getattr(transformer, name)]


def attached_hooks(transformer: nn.Module) -> list[ModelHook | None]:
    """The adapter's hook on each block, None where there is none."""
    registries = (getattr(block, "_diffusers_hook", None) for block, _ in transformer_blocks(transformer))
    return [None if registry is None else registry.get_hook(HOOK_NAME) for registry in registries]


def check_attachable(transformer: nn.Module) -> None:
    """ValueError where a cache or compilation came first: hooks added now would run wrongly or not at all."""
    if _is_cached(transformer):
        raise ValueError(
            "A cache is enabled on the `transformer`, and an adapter attached after it would act on skipped "
            "steps; call `transformer.disable_cache()` (or remove the hooks on its blocks), attach, and "
            "enable the cache again."
        )
    if _is_compiled(transformer):
        raise ValueError(
            "The `transformer` is compiled already, and hooks added later would be ignored; attach the "
            "adapter before compiling (load the transformer anew)."
        )


def check_detachable(transformer: nn.Module) -> None:
    """ValueError where a cache or compilation lies over the hooks."""
    if _is_cached(transformer):
        raise ValueError(
            "A cache is enabled over the adapter; call `transformer.disable_cache()` (or remove the hooks on "
            "its blocks), then `detach`."
        )
    if _is_compiled(transformer):
        raise ValueError(
            "The `transformer` was compiled with the adapter, so it cannot be detached; calls without faces "
            "give the base's output already."
        )


def _is_cached(transformer: nn.Module) -> bool:
    """True under `enable_cache`, and where another hook decides whether a block runs, as caches do."""
    registries = (getattr(block, "_diffusers_hook", None) for block, _ in transformer_blocks(transformer))
    hooks = (item for registry in registries if registry is not None for item in registry.hooks.items())
    by_hand = any(name != HOOK_NAME and hasattr(hook, "new_forward") for name, hook in hooks)
    return by_hand or getattr(transformer, "is_cache_enabled", False)


def _is_compiled(transformer: nn.Module) -> bool:
    modules = [transformer, *(block for block, _ in transformer_blocks(transformer))]
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in modules)
