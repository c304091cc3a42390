"""The adapter's maths against an independent reference, and what attaching it may and may not change."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from diffusers.hooks import apply_first_block_cache

from tests import reference, tiny
from withanyone import adapter as adapter_module
from withanyone.adapter import FaceAdapter, check_scale, folding_pays, parameter_table
from withanyone.conditioning import group_tokens
from withanyone.layout import token_mask

SIZE = (96, 128)  # height, width: 6 x 8 image tokens
FEATURE_TOKENS, FEATURE_DIM = 9, 24
ONE = [[(10, 10, 50, 60.5)]]
APART = [[(10, 10, 50, 60.5), (70, 20, 120, 90)]]
OVERLAPPING = [[(10, 10, 60, 60.5), (40, 20, 120, 90), (0, 0, 128, 40)]]
NESTED = [[(0, 0, 128, 96), (30, 30, 60, 60)]]
FIVE = [[(0, 0, 40, 40), (30, 20, 90, 60), (10.2, 40, 80, 96), (100, 0, 128, 30), (60, 60, 110, 96)]]
BATCH = [[(0, 0, 50, 50), (20, 20, 60, 70)], [(5, 30, 100, 70)]]


def scaled(seed: int, *shape: int, factor: float = 1.0) -> torch.Tensor:
    return factor * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def faces_for(bboxes, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings as long as a recogniser's (norm about 20) and image features for `bboxes`."""
    shape = (len(bboxes), max(map(len, bboxes)))
    features = scaled(seed + 100, *shape, FEATURE_TOKENS, FEATURE_DIM)
    return scaled(seed, *shape, tiny.EMBEDDING_DIM, factor=0.9), features


def call(batch: int, height: int, width: int, seed: int = 0) -> dict:
    """A transformer call's arguments, without faces."""
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return {
        "hidden_states": scaled(seed, batch, rows * columns, 4 * tiny.LATENT_CHANNELS),
        "encoder_hidden_states": scaled(seed + 1, batch, 5, tiny.TEXT_WIDTH),
        "pooled_projections": scaled(seed + 2, batch, tiny.TEXT_WIDTH),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(5, 3),
    }


def with_faces(transformer, conditioning, **inputs) -> torch.Tensor:
    kwargs = {"joint_attention_kwargs": {"ip_hidden_states": conditioning}}
    return transformer(**inputs, **kwargs, return_dict=False)[0]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights in the released key layout; the attention (2 heads) is wider than the transformer."""
    return reference.random_checkpoint(tiny.HIDDEN_SIZE, tiny.NUM_BLOCKS, heads=2, feature_dim=FEATURE_DIM)


@pytest.fixture(scope="module")
def adapter(state) -> FaceAdapter:
    adapter = FaceAdapter(
        hidden_size=tiny.HIDDEN_SIZE,
        num_blocks=tiny.NUM_BLOCKS,
        inner_dim=128,
        image_feature_dim=FEATURE_DIM,
    )
    adapter.load_state_dict(state, strict=True)
    return adapter.eval()


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    return tiny.transformer(guidance_embeds=False)


# Parity


@torch.no_grad()
@pytest.mark.parametrize(
    ("bboxes", "size", "id_scale", "siglip_scale"),
    [
        (ONE, SIZE, 0.5, 0.5),
        (ONE, SIZE, 0.0, 1.0),
        (ONE, SIZE, 1.0, 0.0),
        (APART, SIZE, 0.3, 0.7),
        (OVERLAPPING, SIZE, 0.7, 0.9),
        (NESTED, SIZE, 0.7, 0.9),
        (FIVE, SIZE, 1.0, 0.7),
        (APART, (112, 144), 0.6, 0.6),
        ([[(3.5, 0, 40, 47), (41, 0, 79, 48)]], (48, 80), 1.5, 0.5),
        (BATCH, SIZE, 0.4, 0.8),
        (BATCH, (80, 112), torch.tensor([0.3, 0.0]), torch.tensor([0.0, 1.2])),
        ([[(0, 0, 50, 50)], [], [(20, 20, 60, 70), (60, 20, 90, 70)]], SIZE, 1.0, 1.0),
        ([[(0, 0, 128, 96)] * 8], SIZE, 1.0, 1.0),
    ],
)
def test_equal_to_a_reference_written_from_the_equations(
    adapter, state, transformer, bboxes, size, id_scale, siglip_scale
):
    embeddings, features = faces_for(bboxes)
    inputs = call(len(bboxes), *size)
    scales = {"id_scale": id_scale, "siglip_scale": siglip_scale}
    base = transformer(**inputs, return_dict=False)[0]
    expected = reference.run(transformer, state, embeddings, features, bboxes, *size, **scales, **inputs)

    adapter.attach(transformer)
    output = with_faces(transformer, adapter.encode(embeddings, features, bboxes, *size, **scales), **inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 0.1  # the reference does something


@torch.no_grad()
def test_permuting_people_with_their_boxes_changes_nothing(adapter, transformer):
    embeddings, features = faces_for(FIVE)
    order = [3, 0, 4, 2, 1]
    inputs = call(1, *SIZE)
    adapter.attach(transformer)
    scales = {"id_scale": 0.6, "siglip_scale": 0.6}
    straight = adapter.encode(embeddings, features, FIVE, *SIZE, **scales)
    permuted = [[FIVE[0][i] for i in order]]
    permuted = adapter.encode(embeddings[:, order], features[:, order], permuted, *SIZE, **scales)
    a, b = (with_faces(transformer, c, **inputs) for c in (straight, permuted))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@torch.no_grad()
def test_swapping_people_but_not_boxes_changes_the_output(adapter, transformer):
    embeddings, features = faces_for(APART)
    inputs = call(1, *SIZE)
    adapter.attach(transformer)
    a = with_faces(transformer, adapter.encode(embeddings, features, APART, *SIZE), **inputs)
    swapped = adapter.encode(embeddings.flip(1), features.flip(1), APART, *SIZE)
    assert (a - with_faces(transformer, swapped, **inputs)).abs().max() > 0.01


@torch.no_grad()
def test_several_pictures_of_each_row(adapter, transformer):
    """A batch of B * C runs like its pictures one by one: num_images_per_prompt."""
    embeddings, features = faces_for(BATCH)
    inputs = call(4, *SIZE)
    adapter.attach(transformer)
    together = with_faces(
        transformer, adapter.encode(embeddings, features, BATCH, *SIZE, id_scale=0.5), **inputs
    )
    for i in range(4):
        b = slice(i // 2, i // 2 + 1)
        alone = adapter.encode(embeddings[b], features[b], BATCH[b], *SIZE, id_scale=0.5)
        batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        single = {name: value[i : i + 1] if name in batched else value for name, value in inputs.items()}
        torch.testing.assert_close(
            together[i : i + 1], with_faces(transformer, alone, **single), atol=2e-6, rtol=0
        )


# What must not change


@torch.no_grad()
def test_without_faces_the_output_is_the_bases_bit_for_bit(adapter, transformer):
    embeddings, features = faces_for(APART)
    inputs = call(1, *SIZE)
    keys = list(transformer.state_dict())
    base = transformer(**inputs, return_dict=False)[0]
    adapter.attach(transformer)
    assert list(transformer.state_dict()) == keys
    assert torch.equal(transformer(**inputs, return_dict=False)[0], base)
    for empty in (
        adapter.encode(embeddings, features, APART, *SIZE, id_scale=0, siglip_scale=0.0),
        adapter.encode(embeddings, features, [[]], *SIZE),
        None,
    ):
        assert torch.equal(with_faces(transformer, empty, **inputs), base)
    adapter.detach(transformer)
    with_conditioning = with_faces(transformer, adapter.encode(embeddings, features, APART, *SIZE), **inputs)
    assert torch.equal(with_conditioning, base)


@torch.no_grad()
@pytest.mark.parametrize("bboxes", [ONE, APART, OVERLAPPING, BATCH])
def test_tokens_outside_every_box_get_exactly_nothing_in_every_block(
    adapter, transformer, bboxes, monkeypatch
):
    outside = ~token_mask(bboxes, *SIZE).any(-1)
    seen = []

    def recorded(hidden_states, *args):
        after = add_faces(hidden_states, *args)
        seen.append((hidden_states, after))
        return after

    add_faces = adapter_module.add_faces
    monkeypatch.setattr(adapter_module, "add_faces", recorded)
    adapter.attach(transformer)
    conditioning = adapter.encode(*faces_for(bboxes), bboxes, *SIZE, id_scale=1.0)
    with_faces(transformer, conditioning, **call(len(bboxes), *SIZE))
    assert len(seen) == tiny.NUM_BLOCKS
    for before, after in seen:
        assert torch.equal(before[outside], after[outside])
        assert ((before - after)[~outside].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_text_tokens_are_untouched_by_the_block_that_adds_faces(adapter, transformer):
    block = transformer.transformer_blocks[0]
    rotary = transformer.pos_embed(torch.zeros(5 + 48, 3))
    inputs = {
        "hidden_states": scaled(1, 1, 48, tiny.HIDDEN_SIZE),
        "encoder_hidden_states": scaled(2, 1, 5, tiny.HIDDEN_SIZE),
        "temb": scaled(3, 1, tiny.HIDDEN_SIZE),
        "image_rotary_emb": rotary,
    }
    text, image = block(**inputs)
    adapter.attach(transformer)
    conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE)
    text_too, image_too = block(**inputs, joint_attention_kwargs={"ip_hidden_states": conditioning})
    assert torch.equal(text, text_too)
    assert not torch.equal(image, image_too)


@torch.no_grad()
def test_faces_beyond_a_rows_boxes_are_ignored(adapter, transformer):
    embeddings, features = faces_for(BATCH)
    inputs = call(2, *SIZE)
    adapter.attach(transformer)
    output = with_faces(transformer, adapter.encode(embeddings, features, BATCH, *SIZE, id_scale=1), **inputs)
    embeddings[1, 1], features[1, 1] = torch.nan, torch.inf
    again = with_faces(transformer, adapter.encode(embeddings, features, BATCH, *SIZE, id_scale=1), **inputs)
    assert torch.equal(output, again)


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing(transformer):
    fresh = tiny.face_adapter()
    inputs = call(1, *SIZE)
    base = transformer(**inputs, return_dict=False)[0]
    fresh.attach(transformer)
    output = with_faces(transformer, fresh.encode(*faces_for(APART), APART, *SIZE, id_scale=1), **inputs)
    assert torch.equal(output, base)


# Gradients


def gradients(adapter, transformer, bboxes, inputs, run) -> dict[str, torch.Tensor]:
    adapter.zero_grad()
    target = scaled(9, *inputs["hidden_states"].shape)
    (run() - target).pow(2).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("bboxes", [APART, OVERLAPPING, BATCH])
def test_gradients_are_the_references_and_checkpointing_does_not_change_them(
    adapter, state, transformer, bboxes
):
    adapter = copy.deepcopy(adapter).requires_grad_(True)
    embeddings, features = faces_for(bboxes)
    inputs = call(len(bboxes), *SIZE)
    scales = {"id_scale": 0.4, "siglip_scale": torch.linspace(0.5, 1, len(bboxes))}
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in state.items()}

    def plain():
        return reference.run(transformer, leaves, embeddings, features, bboxes, *SIZE, **scales, **inputs)

    def ours():
        return with_faces(
            transformer, adapter.encode(embeddings, features, bboxes, *SIZE, **scales), **inputs
        )

    target = scaled(9, *inputs["hidden_states"].shape)
    (plain() - target).pow(2).mean().backward()
    adapter.attach(transformer)
    without = gradients(adapter, transformer, bboxes, inputs, ours)
    transformer.train()
    transformer.enable_gradient_checkpointing()
    checkpointed = gradients(adapter, transformer, bboxes, inputs, ours)

    largest = max(leaf.grad.abs().max() for leaf in leaves.values())
    assert largest > 1e-3
    for name, gradient in without.items():
        assert torch.equal(gradient, checkpointed[name]), name
        torch.testing.assert_close(gradient, leaves[name].grad, atol=1e-5 * float(largest), rtol=1e-3)


def test_a_scale_of_zero_leaves_its_branch_without_gradient(adapter):
    adapter = copy.deepcopy(adapter).requires_grad_(True)
    conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE, id_scale=0.0, siglip_scale=1.0)
    assert set(conditioning.branches) == {"sig"}


# How it travels


def test_conditioning_moves_with_to_and_is_itself_where_nothing_changes(adapter):
    with torch.no_grad():
        conditioning = adapter.encode(*faces_for(OVERLAPPING), OVERLAPPING, *SIZE, id_scale=1.0)
    assert conditioning.to("cpu") is conditioning
    assert conditioning.to(torch.device("cpu"), non_blocking=True) is conditioning
    moved = conditioning.to("meta", dtype=torch.bfloat16)
    assert moved.branches["arc"].keys.device.type == "meta"
    assert moved.branches["sig"].values.dtype == torch.bfloat16
    assert moved.groups.tokens.dtype == torch.long and moved.groups.seen.dtype == torch.bool
    assert conditioning.branches["arc"].keys.device.type == "cpu"


def test_conditioning_cannot_be_changed(adapter):
    conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE)
    with pytest.raises(AttributeError):
        conditioning.num_tokens = 3


@torch.no_grad()
def test_a_half_precision_transformer_with_a_full_precision_adapter(adapter, transformer):
    transformer.to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in call(1, *SIZE).items()}
    adapter.attach(transformer)
    output = with_faces(transformer, adapter.encode(*faces_for(APART), APART, *SIZE), **inputs)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_groups_are_the_sets_of_faces_that_tokens_lie_under():
    mask = token_mask(OVERLAPPING, *SIZE)
    groups = group_tokens(mask, [3])
    for g, (faces, seen) in enumerate(zip(groups.faces, groups.seen, strict=True)):
        members = groups.tokens[groups.slots // groups.padded.shape[1] == g]
        assert len(members)
        for n in members.tolist():
            assert mask[0, n].nonzero()[:, 0].tolist() == sorted(faces[seen].tolist())
    assert sorted(groups.tokens.tolist()) == mask[0].any(-1).nonzero()[:, 0].tolist()


def test_splitting_and_joining_tokens_gives_them_back():
    groups = group_tokens(token_mask(OVERLAPPING, *SIZE), [3])
    x = torch.randn(len(groups.tokens), 2, 7)
    assert torch.equal(groups.join(groups.split(x), 2), x)


# Attaching


def test_attaching_twice_adds_faces_once(adapter, transformer):
    inputs = call(1, *SIZE)
    with torch.no_grad():
        conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE)
        adapter.attach(transformer)
        once = with_faces(transformer, conditioning, **inputs)
        adapter.attach(transformer)
        assert torch.equal(with_faces(transformer, conditioning, **inputs), once)


def test_another_adapter_replaces_the_first(adapter, transformer):
    other = tiny.face_adapter(inner_dim=128, image_feature_dim=FEATURE_DIM, to_out_std=0.3)
    adapter.attach(transformer)
    other.attach(transformer)
    assert other.is_attached(transformer) and not adapter.is_attached(transformer)
    with pytest.raises(ValueError, match="Another adapter is attached"):
        adapter.detach(transformer)
    other.detach(transformer)
    other.detach(transformer)
    assert not other.is_attached(transformer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "width 64, this one is 32 wide"),
        ({"num_blocks": 7}, "7 blocks, this one has 5"),
    ],
)
def test_an_adapter_of_another_size_is_refused(transformer, config, message):
    with pytest.raises(ValueError, match=message):
        tiny.face_adapter(**config).attach(transformer)


def test_an_unknown_transformer_is_refused(adapter):
    with pytest.raises(
        ValueError, match="`transformer` is a Linear; the adapter knows FluxTransformer2DModel"
    ):
        adapter.attach(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_a_subclass_of_the_transformer_is_as_good(adapter, transformer):
    """fully_shard and others make a class of their own of each model."""
    inputs = call(1, *SIZE)
    conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE)
    adapter.attach(transformer)
    expected = with_faces(transformer, conditioning, **inputs)
    other = tiny.transformer(guidance_embeds=False)
    other.__class__ = type("Sharded", (FluxTransformer2DModel,), {})
    adapter.attach(other)
    assert torch.equal(with_faces(other, conditioning, **inputs), expected)


@torch.no_grad()
def test_first_block_cache_over_the_adapter_replays_it_once(adapter, transformer):
    """Identical steps: what the cache replays is what it computed."""
    inputs = call(1, *SIZE)
    conditioning = adapter.encode(*faces_for(APART), APART, *SIZE, id_scale=1.0)
    adapter.attach(transformer)
    expected = with_faces(transformer, conditioning, **inputs)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with transformer.cache_context("cond"):
        for _ in range(3):
            output = with_faces(transformer, conditioning, **inputs)
            torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)


def test_a_cache_that_came_first_is_refused_with_the_remedy(adapter, transformer):
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match=r"disable_cache\(\)"):
        adapter.attach(transformer)
    transformer.disable_cache()
    adapter.attach(transformer)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    adapter.attach(transformer)  # the same adapter is there already, below the cache
    with pytest.raises(ValueError, match=r"disable_cache\(\)"):
        adapter.detach(transformer)
    transformer.disable_cache()
    adapter.detach(transformer)
    assert not adapter.is_attached(transformer)


def test_a_cache_applied_by_hand_is_refused_too(adapter, transformer):
    apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(ValueError, match="remove the hooks on its blocks"):
        adapter.attach(transformer)


def test_compilation_that_came_first_is_refused(adapter, transformer):
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="before compiling"):
        adapter.attach(transformer)
    with pytest.raises(ValueError, match="Attach first, then compile"):
        adapter.attach(torch.compile(tiny.transformer(), backend="eager"))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_are_equal_and_reused_by_a_picture_with_other_boxes(adapter, transformer):
    torch._dynamo.reset()  # what other tests compiled in this process counts towards the same limit
    inputs = call(1, *SIZE)
    moved = [[(20, 0, 60, 50), (70, 40, 110, 90)]]
    adapter.attach(transformer)
    conditionings = [
        adapter.encode(*faces_for(boxes), boxes, *SIZE, id_scale=0.5) for boxes in (APART, moved)
    ]
    expected = [with_faces(transformer, conditioning, **inputs) for conditioning in conditionings]
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    graphs = []
    for conditioning, output in zip(conditionings, expected, strict=True):
        torch.testing.assert_close(with_faces(transformer, conditioning, **inputs), output, atol=1e-6, rtol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    moved = [[(20, 0, 76, 50), (80, 40, 120, 90)]]
    again = adapter.encode(*faces_for(moved), moved, *SIZE, id_scale=0.5)
    with_faces(transformer, again, **inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[-1]
    with pytest.raises(ValueError, match="cannot be detached"):
        adapter.detach(transformer)


# Bad input


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), torch.tensor([0.5, -1.0])])
def test_scales_are_finite_and_not_negative(adapter, scale):
    for name in ("id_scale", "siglip_scale"):
        with pytest.raises(ValueError, match=f"`{name}` .*finite number of at least 0"):
            adapter.encode(*faces_for(BATCH), BATCH, *SIZE, **{name: scale})


def test_as_many_scales_as_pictures():
    with pytest.raises(ValueError, match=r"`id_scale` has shape \(3,\)"):
        check_scale(torch.ones(3), "id_scale", 2)
    assert check_scale(0.5, "id_scale", 2).tolist() == [0.5, 0.5]


def test_tensors_that_do_not_fit_the_boxes_are_named(adapter):
    embeddings, features = faces_for(APART)
    with pytest.raises(ValueError, match=r"`embeddings` has shape \(1, 1, 512\).*at least 2 faces"):
        adapter.encode(embeddings[:, :1], features, APART, *SIZE)
    with pytest.raises(ValueError, match=r"`embeddings` has shape \(1, 2, 500\).*\(B, F, 512\)"):
        adapter.encode(embeddings[..., :500], features, APART, *SIZE)
    with pytest.raises(ValueError, match=r"`image_features` has shape \(1, 2, 24\).*\(B, F, S, 24\)"):
        adapter.encode(embeddings, features[:, :, 0], APART, *SIZE)
    with pytest.raises(ValueError, match="`image_features` is None"):
        adapter.encode(embeddings, None, APART, *SIZE, siglip_scale=1.0)
    with pytest.raises(ValueError, match="`bboxes` is empty"):
        adapter.encode(embeddings, features, [], *SIZE)


def test_image_features_are_not_needed_at_siglip_scale_0(adapter):
    conditioning = adapter.encode(faces_for(APART)[0], None, APART, *SIZE, id_scale=1.0, siglip_scale=0)
    assert set(conditioning.branches) == {"arc"}


def test_many_faces_are_grouped_as_few_are():
    """Beyond 32 faces lines are sorted as lines, not as bits of a number: the same groups, in that order."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((2, 30, 5), generator=generator) < 0.3
    few = group_tokens(mask, [5, 5])
    many = group_tokens(torch.nn.functional.pad(mask, (0, 30)), [5, 5])
    for name in ("tokens", "padded", "slots", "faces", "seen"):
        assert torch.equal(getattr(few, name), getattr(many, name)), name


def test_boxes_known_as_tokens_give_the_same_conditioning(adapter):
    embeddings, features = (
        torch.randn(2, 3, 512),
        torch.randn(2, 3, tiny.IMAGE_TOKENS, tiny.IMAGE_FEATURE_DIM),
    )
    boxes = BATCH
    by_boxes = adapter.encode(embeddings, features, boxes, *SIZE, id_scale=0.5, siglip_scale=0.5)
    mask = token_mask(boxes, *SIZE)
    by_mask = adapter.encode_masked(embeddings, features, mask, [2, 1], id_scale=0.5, siglip_scale=0.5)
    assert torch.equal(by_boxes.groups.tokens, by_mask.groups.tokens)
    for name, branch in by_boxes.branches.items():
        for mine, theirs in zip(branch.keys, by_mask.branches[name].keys, strict=True):
            assert torch.equal(mine, theirs)


def test_another_size_than_encoded_for_is_named(adapter, transformer):
    adapter.attach(transformer)
    conditioning = adapter.encode(*faces_for(ONE), ONE, *SIZE)
    with pytest.raises(ValueError, match="1 pictures of 64 image tokens, but the faces are for 1 of 48"):
        with_faces(transformer, conditioning, **call(1, 128, 128))
    two = adapter.encode(*faces_for(BATCH), BATCH, *SIZE)
    with pytest.raises(ValueError, match="the faces are for 2 of 48"):
        with_faces(transformer, two, **call(3, *SIZE))


# Variants and sizes


@torch.no_grad()
@pytest.mark.parametrize("branch", ["arc", "sig"])
def test_an_adapter_of_one_branch_is_the_whole_one_with_the_other_at_0(adapter, transformer, state, branch):
    single = tiny.face_adapter(inner_dim=128, image_feature_dim=FEATURE_DIM, branches=(branch,))
    single.load_state_dict(
        {name: value for name, value in state.items() if f"_{branch}." in name}, strict=True
    )
    faces, inputs = faces_for(APART), call(1, *SIZE)
    scales = {"id_scale": float(branch == "arc"), "siglip_scale": float(branch == "sig")}
    adapter.attach(transformer)
    expected = with_faces(transformer, adapter.encode(*faces, APART, *SIZE, **scales), **inputs)
    single.attach(transformer)
    output = with_faces(transformer, single.encode(*faces, APART, *SIZE), **inputs)  # its own default scale
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="has no (sig|arc) branch"):
        single.encode(*faces, APART, *SIZE, id_scale=1.0, siglip_scale=1.0)


@pytest.mark.parametrize("branches", [(), ("sig", "arc"), ("arcs",), ("arc", "sig", "arc")])
def test_branches_are_arc_and_sig(branches):
    with pytest.raises(ValueError, match="`branches` is"):
        FaceAdapter(hidden_size=64, num_blocks=1, inner_dim=64, branches=branches)


@torch.no_grad()
@pytest.mark.parametrize("num_id_tokens", [4, 40])
def test_folding_changes_the_cost_and_not_the_result(num_id_tokens, transformer):
    """40 tokens a face are not folded, 4 are: both equal the reference."""
    assert folding_pays(num_id_tokens, 64) == (num_id_tokens == 4)
    state = reference.random_checkpoint(
        tiny.HIDDEN_SIZE, tiny.NUM_BLOCKS, 1, feature_dim=FEATURE_DIM, id_tokens=num_id_tokens
    )
    adapter = tiny.face_adapter(image_feature_dim=FEATURE_DIM, num_id_tokens=num_id_tokens)
    adapter.load_state_dict(state, strict=True)
    embeddings, features = faces_for(OVERLAPPING)
    inputs = call(1, *SIZE)
    expected = reference.run(transformer, state, embeddings, features, OVERLAPPING, *SIZE, 1.0, 0.5, **inputs)
    adapter.attach(transformer)
    conditioning = adapter.encode(embeddings, features, OVERLAPPING, *SIZE, id_scale=1.0, siglip_scale=0.5)
    torch.testing.assert_close(with_faces(transformer, conditioning, **inputs), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_folding_is_as_exact_in_half_precision():
    """Against float64, at a width where rounding adds up: folded at most a quarter further off."""
    torch.manual_seed(0)
    exact = adapter_module.FaceCrossAttention(hidden_size=768, inner_dim=384, head_dim=64).double()
    groups = group_tokens(token_mask(OVERLAPPING, *SIZE), [3])
    tokens = torch.randn(3, 8, 768).bfloat16()
    x = (20 * torch.randn(len(groups.tokens), 1, 768) * torch.rand(768)).bfloat16()  # some channels are loud

    def run(dtype, fold):
        attention = copy.deepcopy(exact).to(dtype)
        keys, values = attention.keys_values(tokens.to(dtype))
        keys, values = attention.fold(keys, values) if fold else (keys, values)
        keys, values = groups.of_groups(keys), groups.of_groups(values)
        return attention(x.to(dtype), keys, values, groups, fold).double()

    exact.load_state_dict({name: weight.bfloat16() for name, weight in exact.state_dict().items()})
    expected = run(torch.float64, False)
    plain, folded = ((run(torch.bfloat16, fold) - expected).square().mean().sqrt() for fold in (False, True))
    assert plain < 0.02 * expected.square().mean().sqrt()
    assert folded < 1.25 * plain


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `withanyone.safetensors`, written out from the released file's list."""
    d, shapes = 3072, {}
    for branch in ("arc", "sig"):
        for i in range(57):
            name = f"ipa_{branch}.{i}"
            for norm in ("norm1", "norm2"):
                shapes |= {f"{name}.{norm}.weight": (d,), f"{name}.{norm}.bias": (d,)}
            shapes |= {f"{name}.to_q.weight": (1536, d), f"{name}.to_kv.weight": (3072, d)}
            shapes[f"{name}.to_out.weight"] = (d, 1536)
        name = f"arcface_in_{branch}"
        shapes |= {f"{name}.0.weight": (4 * d, 512), f"{name}.0.bias": (4 * d,)}
        shapes |= {f"{name}.2.weight": (4 * d,), f"{name}.2.bias": (4 * d,)}
        shapes |= {f"{name}.3.weight": (8 * d, 4 * d), f"{name}.3.bias": (8 * d,)}
    shapes |= {"siglip_in_sig.0.weight": (d, 768), "siglip_in_sig.0.bias": (d,)}
    shapes |= {"siglip_in_sig.2.weight": (d,), "siglip_in_sig.2.bias": (d,)}
    shapes |= {"siglip_in_sig.3.weight": (d, d), "siglip_in_sig.3.bias": (d,)}
    return shapes


def test_flux1_devs_adapter_has_the_released_names_and_shapes_and_fits_flux1_dev():
    with torch.device("meta"):
        adapter = FaceAdapter().to(torch.bfloat16)
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert {name: tuple(value.shape) for name, value in adapter.state_dict().items()} == released_shapes()
    adapter.attach(flux)
    assert adapter.is_attached(flux)

    table = parameter_table(adapter)
    total = sum(value.numel() for value in adapter.state_dict().values())
    assert sum(part.parameters for part in table) == total
    assert sum(part.bytes for part in table) == 2 * total
    loop = sum(part.parameters for part in table if part.in_loop)
    assert total == pytest.approx(2.8e9, rel=0.01) and loop == pytest.approx(0.54e9, rel=0.01)


@torch.no_grad()
def test_the_denoising_loop_reads_no_parameter_that_the_table_leaves_out(adapter, transformer):
    """What the table says is not needed may hold anything after `encode`."""
    adapter = copy.deepcopy(adapter)
    inputs = call(1, *SIZE)
    adapter.attach(transformer)
    conditioning = adapter.encode(*faces_for(APART), APART, *SIZE, id_scale=0.5)
    expected = with_faces(transformer, conditioning, **inputs)
    needed = {part.part for part in parameter_table(adapter) if part.in_loop}
    for name, parameter in adapter.named_parameters():
        part = ".".join("*" if piece.isdigit() else piece for piece in name.split(".")[:3])
        if part not in needed:
            parameter.fill_(torch.nan)
    assert torch.equal(with_faces(transformer, conditioning, **inputs), expected)
