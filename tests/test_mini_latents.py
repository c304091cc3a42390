"""The miniature's VAE: a linear code set in closed form, AutoencoderKL's interface, and its refiner."""

import numpy as np
import pytest
import torch

from withanyone.mini import PRETRAINED, latents
from withanyone.mini.latents import PatchAutoencoder, fit_code, psnr
from withanyone.mini.world import render


@pytest.fixture(scope="module")
def images():
    return [render([seed], seed, width=128, height=128).image for seed in range(6)]


@pytest.fixture(scope="module")
def vae(images):
    torch.manual_seed(0)
    vae = PatchAutoencoder(block_out_channels=(16,) * 4, layers_per_block=1)
    vae.set_linear_code(fit_code(images))
    return vae.eval()


def test_latents_have_unit_mean_square(vae, images):
    with torch.no_grad():
        z = vae.encode(latents.to_tensor(np.stack(images))).latent_dist.mode()
    assert z.shape == (6, 24, 16, 16)
    assert 0.9 < float(z.pow(2).mean()) < 1.1


def test_code_of_all_components_is_lossless(images):
    vae = PatchAutoencoder(latent_channels=192, block_out_channels=(16,) * 4, layers_per_block=1)
    vae.set_linear_code(fit_code(images, latent_channels=192))
    x = latents.to_tensor(np.stack(images[:2]))
    assert float((vae(x).sample - x).abs().max()) < 1e-3


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_decoding_undoes_encoding_whatever_the_whitening(images, whitening):
    code = fit_code(images, whitening=whitening)
    assert torch.allclose(code.encode @ code.decode, torch.eye(24), atol=1e-4)


def test_more_channels_keep_more(images):
    x = latents.to_tensor(np.stack(images))
    quality = []
    for channels in (8, 24):
        vae = PatchAutoencoder(latent_channels=channels, block_out_channels=(16,) * 4, layers_per_block=1)
        vae.set_linear_code(fit_code(images, latent_channels=channels))
        quality.append(float(psnr(x, vae(x).sample).mean()))
    assert quality[1] > quality[0] + 2


def test_untrained_refiner_changes_nothing(vae, images):
    z = vae.encode(latents.to_tensor(np.stack(images[:1]))).latent_dist.mode()
    assert torch.equal(vae.decode(z).sample, vae.decoder(z))


def test_latent_dist_is_deterministic(vae, images):
    dist = vae.encode(latents.to_tensor(np.stack(images[:1]))).latent_dist
    assert torch.equal(dist.sample(), dist.mode())
    assert torch.equal(dist.mean, dist.mode())


def test_tuples_without_return_dict(vae):
    x = torch.zeros(1, 3, 32, 48)
    (dist,) = vae.encode(x, return_dict=False)
    (picture,) = vae.decode(dist.mode(), return_dict=False)
    assert picture.shape == x.shape


def test_gradients_flow_through_decode(vae):
    z = torch.randn(1, 24, 4, 6, requires_grad=True)
    vae.decode(z).sample.pow(2).sum().backward()
    assert float(z.grad.abs().min()) > 0


def test_sizes_that_do_not_fit_are_named(vae):
    with pytest.raises(ValueError, match="`x` is 100 x 64 pixels.*multiples of 8"):
        vae.encode(torch.zeros(1, 3, 64, 100))


def test_patch_size_and_block_out_channels_agree():
    with pytest.raises(ValueError, match="`block_out_channels` has 3 entries"):
        PatchAutoencoder(block_out_channels=(16, 16, 16))


def test_saves_and_loads_bit_for_bit(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(vae(x).sample, again(x).sample)


def test_empty_pictures_are_refused():
    with pytest.raises(ValueError, match="`pictures` is empty"):
        fit_code([])


def test_shipped_code_keeps_pictures_of_unseen_people():
    vae = PatchAutoencoder.from_pretrained(PRETRAINED / "vae", dtype=torch.float32).eval()
    pictures = [render([2_000_000 + seed], seed, width=128, height=128).image for seed in range(4)]
    x = latents.to_tensor(np.stack(pictures))
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        linear, refined = vae.decoder(z).clamp(-1, 1), vae.decode(z).sample.clamp(-1, 1)
    assert float(psnr(x, linear).mean()) > 27
    assert float(psnr(x, refined).mean()) > 33
