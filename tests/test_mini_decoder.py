"""The decoder's refiner learns from latents of pictures and from latents that the base made of them."""

import numpy as np
import pytest
import torch

from withanyone.mini import PRETRAINED, base, decoder, latents, pictures
from withanyone.mini.decoder import PicturePool
from withanyone.mini.latents import PatchAutoencoder, psnr, to_tensor

SHARD_SIZE = 10


@pytest.fixture(scope="module")
def maker():
    return decoder.Maker.from_pretrained(PRETRAINED, PRETRAINED / "face_adapter")


@pytest.fixture(scope="module")
def portraits(picture_shards):
    return pictures.shard_paths(picture_shards, "train")[0]


def small_vae(blocks: int = 1) -> PatchAutoencoder:
    """The shipped code with a small untrained refiner."""
    torch.manual_seed(1)
    shipped = PatchAutoencoder.from_pretrained(PRETRAINED / "vae", dtype=torch.float32)
    vae = PatchAutoencoder(block_out_channels=(16,) * 4, layers_per_block=blocks)
    vae.encoder.load_state_dict(shipped.encoder.state_dict())
    vae.decoder.load_state_dict(shipped.decoder.state_dict())
    return vae.eval()


def disturbed(pool: PicturePool, strength: float) -> PicturePool:
    """The pool's latents with noise, as if the base had made them."""
    with torch.no_grad():
        clean = small_vae().encode(to_tensor(pool.pixels)).latent_dist.mode()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return PicturePool(pool.pixels, pool.bboxes, pool.kps, clean + strength * noise)


def test_the_base_keeps_more_of_a_picture_the_less_noise_it_had(maker, portraits, tmp_path):
    shard, captions = pictures.read_shard(portraits, "pixels", "kps")
    faces = decoder.faces_of_shard(portraits, tmp_path, maker.face_models, shard["kps"], pictures.PORTRAIT)
    given = decoder.GivenFaces.of_rows(faces, range(4))
    with torch.no_grad():
        clean = maker.vae.encode(to_tensor(shard["pixels"][:4])).latent_dist.mode()
    told = [texts[0] for texts in captions[:4]]
    errors = []
    for level in (0.2, 0.4, 0.8):
        rng = np.random.default_rng(0)
        made = maker.make(pictures.PORTRAIT, shard["pixels"][:4], told, given, level, rng)
        errors.append(float((made - clean).pow(2).mean()))
    assert 0 < errors[0] < errors[1] / 1.5 and errors[1] < errors[2] / 1.5
    assert errors[0] < 0.05  # of a mean square of 1: the picture is still there


def test_a_shards_made_pictures_are_kept(maker, portraits, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "MADE_PICTURES", 0.3)
    first = decoder.made_pool(portraits, tmp_path, maker)
    assert first.made.shape == (3, 24, 16, 16) and first.made.dtype == torch.float16
    monkeypatch.setattr(decoder.Maker, "make", None)  # not made again
    again = decoder.made_pool(portraits, tmp_path, maker)
    assert torch.equal(first.made, again.made) and np.array_equal(first.pixels, again.pixels)
    shard, _ = pictures.read_shard(portraits, "pixels")
    assert all(any(np.array_equal(row, other) for other in shard["pixels"]) for row in first.pixels)


def test_sampling_from_the_first_step_is_sampling(maker):
    """`sample` and the tail of it that the decoder learns from are one code: from step 0 the same picture."""
    captions = ["a photo of a person"]
    whole = base.sample(maker.transformer, maker.vae, maker.models, captions, pictures.PORTRAIT, steps=3)
    noise = torch.randn((1, 24, 16, 16), generator=torch.Generator().manual_seed(0))
    token_ids = maker.models.token_ids(captions)
    tokens = base.sample_from(
        maker.transformer, maker.models, base.pack(noise), token_ids, pictures.PORTRAIT, 3, 2.0
    )
    with torch.no_grad():
        picture = base.decode_tokens(maker.vae, tokens, pictures.PORTRAIT).clamp(-1, 1)[0]
    expected = (picture.permute(1, 2, 0) + 1) * 127.5
    assert np.abs(expected.numpy() - whole[0]).max() <= 0.5


def test_cut_outs_hold_the_latents_and_the_landmarks_of_their_place(portraits):
    plain = decoder.read_pool(portraits)
    pool = disturbed(plain, 0.0)
    drawn = decoder.draw_cut_outs([plain, pool], 40, 64, np.random.default_rng(0))
    assert 10 < len(drawn.made) < 36 and len(drawn.faces) > 15
    rows = list(drawn.made)
    with torch.no_grad():
        encoded = small_vae().encode(drawn.pictures[rows]).latent_dist.mode()
    # patches are coded one by one, so a cut-out's latents are the cut-out of the latents
    assert torch.allclose(encoded, torch.stack([drawn.made[row] for row in rows]), atol=1e-4)
    for row, kps in drawn.faces:
        place = next(
            (top, left, i)
            for i, picture in enumerate(to_tensor(plain.pixels))
            for top in range(0, 65, 8)
            for left in range(0, 65, 8)
            if torch.equal(picture[:, top : top + 64, left : left + 64], drawn.pictures[row])
        )
        true = plain.kps[place[2]] - np.array([place[1], place[0]], np.float32)
        assert any(np.allclose(kps, person) for person in true)


def test_more_blocks_change_nothing_before_they_are_trained():
    vae = PatchAutoencoder.from_pretrained(PRETRAINED / "vae", dtype=torch.float32).eval()
    wider = decoder.widened(vae, vae.config.layers_per_block + 2).eval()
    z = torch.randn((1, 24, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(wider.decode(z).sample, vae.decode(z).sample)
    assert len(wider.refiner.blocks) == len(vae.refiner.blocks) + 2


def test_the_refiner_learns_to_see_through_what_the_base_made(portraits, tmp_path):
    pool = disturbed(decoder.read_pool(portraits), 0.5)
    x, vae = to_tensor(pool.pixels), small_vae()
    with torch.no_grad():
        before = psnr(x, vae.decode(pool.made).sample).mean()
    decoder.train_refiner(vae, tmp_path, [pool], 150, batch_size=4, size=64)
    with torch.no_grad():
        after = psnr(x, vae.decode(pool.made).sample).mean()
    assert after > before + 1
    assert torch.equal(vae.encoder.weight, small_vae().encoder.weight)  # the code stays


def test_faces_count_as_the_recogniser_sees_them(maker, portraits, tmp_path):
    pool = decoder.read_pool(portraits)
    plain, seen = small_vae(), small_vae()
    decoder.train_refiner(plain, tmp_path / "plain", [pool], 2, batch_size=2)
    decoder.train_refiner(
        seen, tmp_path / "seen", [pool], 2, batch_size=2, recognizer=maker.face_models.recognizer
    )
    assert not torch.equal(plain.refiner.conv_out.weight, seen.refiner.conv_out.weight)


def test_training_that_is_finished_is_only_loaded(portraits, tmp_path):
    pools = [decoder.read_pool(portraits)]
    through, again = small_vae(), small_vae()
    decoder.train_refiner(through, tmp_path, pools, 4, batch_size=2)
    assert through.refiner.conv_out.weight.abs().max() > 0
    decoder.train_refiner(again, tmp_path, pools, 4, batch_size=2)
    assert torch.equal(through.refiner.conv_in.weight, again.refiner.conv_in.weight)


def test_figures_are_of_what_the_base_made(portraits):
    plain = decoder.read_pool(portraits)
    vae = small_vae()
    far, near = (decoder.made_figures(vae, [disturbed(plain, s)]) for s in (0.5, 0.1))
    assert far["pictures"] == len(plain.pixels) and far["psnr_db"] < near["psnr_db"] - 3
    assert latents.psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)) == pytest.approx(20)
