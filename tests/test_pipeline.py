"""Whole guided trajectories against diffusers' pipeline; seeds, batches, refine, decoding."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import small_pipeline
from PIL import Image

import minsd
from minsd import image, pipeline
from minsd.noise.initial import noise
from minsd.samplers import SAMPLERS

PROMPT, NEGATIVE = "a red circle and a blue square", "a green star"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guided_ddim_trajectory_equals_diffusers(kind, shapes_folder, tmp_path):
    """SD1-like with eps, SD2-like with v (linear projections, padding with 0): same latents and image."""
    theirs = small_pipeline(shapes_folder / "tokenizer", kind, sd2=kind == "v_prediction")
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    sd = minsd.load(str(tmp_path), "cpu")
    start = noise([3, 4], (4, 16, 16))
    options = {
        "negative_prompt": [NEGATIVE] * 2,
        "num_inference_steps": 10,
        "guidance_scale": 7.5,
        "latents": start.clone(),
    }
    expected = theirs([PROMPT] * 2, output_type="latent", **options).images
    latents = sd.sample(PROMPT, start, negative_prompt=NEGATIVE, steps=10, guidance_scale=7.5)
    assert (latents - expected).norm() / expected.norm() <= 1e-4
    pictures = theirs([PROMPT] * 2, output_type="np", **options).images
    for ours, picture in zip(sd.decode(latents), pictures):
        assert np.abs(np.asarray(ours) / 255 - picture).max() <= 1.01 / 255


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_rescale_and_zero_terminal_snr_equal_diffusers(kind, shapes_folder, tmp_path):
    """The model that predicts v has zero terminal SNR and begins there. Two images, each with a scale of
    its own."""
    theirs = small_pipeline(shapes_folder / "tokenizer", kind, sd2=kind == "v_prediction")
    if kind == "v_prediction":
        changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        theirs.scheduler = theirs.scheduler.from_config(theirs.scheduler.config, **changed)
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    sd = minsd.load(str(tmp_path), "cpu")
    start = noise([3, 4], (4, 16, 16))
    options = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
    expected = theirs(
        [PROMPT] * 2, output_type="latent", num_inference_steps=10, latents=start.clone(), **options
    ).images
    latents = sd.sample(PROMPT, start, steps=10, **options)
    assert (latents - expected).norm() / expected.norm() <= 1e-4
    plain = sd.sample(PROMPT, start, steps=10, guidance_scale=7.5)
    assert (plain - expected).norm() / expected.norm() > 1e-2 and sd.guidance_rescale == 0
    called = sd(PROMPT, noise=start, steps=10, height=128, width=128, **options)
    assert [p.tobytes() for p in called] == [p.tobytes() for p in sd.decode(latents)]
    with pytest.raises(ValueError, match="guidance_rescale must be from 0 to 1, not 2"):
        sd(PROMPT, guidance_rescale=2)


def test_same_seed_same_noise_and_the_same_picture_whatever_the_batch(small):
    assert torch.equal(noise([7], (4, 16, 16))[0], noise([5, 6, 7], (4, 16, 16))[2])
    three = small(PROMPT, seeds=[5, 6, 7], steps=3)
    again = small(PROMPT, seeds=[5, 6, 7], steps=3)
    alone = small(PROMPT, seeds=7, steps=3)[0]
    assert np.array_equal(np.asarray(three[2]), np.asarray(again[2]))
    assert np.abs(np.asarray(three[2]).astype(int) - np.asarray(alone)).max() <= 2
    assert np.abs(np.asarray(three[2]).astype(int) - np.asarray(three[1])).max() > 2


def test_noise_instead_of_seeds_and_a_prompt_a_picture(small):
    by_seed = small([PROMPT, NEGATIVE], seeds=[1, 2], steps=2)
    by_noise = small([PROMPT, NEGATIVE], noise=noise([1, 2], (4, 16, 16)), steps=2)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(by_seed, by_noise))
    other = small(PROMPT, seeds=[2], steps=2)[0]
    assert not np.array_equal(np.asarray(other), np.asarray(by_seed[1]))


def test_guidance_of_one_runs_the_conditional_half_alone(small):
    rows = []
    handle = small.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    small.sample(PROMPT, noise([0], (4, 16, 16)), steps=2, guidance_scale=1.0)
    small.sample(PROMPT, noise([0], (4, 16, 16)), steps=2, guidance_scale=2.0)
    handle.remove()
    assert rows == [1, 1, 2, 2]


def test_refine_sees_every_step_and_may_differentiate(small):
    seen = []

    def refine(i, t, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(
                small.unet(leaf, t, small.encode_prompt(PROMPT)).square().sum(), leaf
            )
        seen.append((i, t, float(gradient.abs().sum())))
        return x - 0.01 * gradient

    changed = small.sample(PROMPT, noise([0], (4, 16, 16)), steps=4, refine=refine)
    plain = small.sample(PROMPT, noise([0], (4, 16, 16)), steps=4)
    assert [(i, t) for i, t, _ in seen] == [(0, 751), (1, 501), (2, 251), (3, 1)] and all(
        g > 0 for *_, g in seen
    )
    assert not torch.equal(changed, plain)
    assert all(
        p.grad is None and not p.requires_grad
        for m in (small.unet, small.vae, small.text.model)
        for p in m.parameters()
    )


def test_any_size_that_is_a_multiple_of_8(small):
    assert small(PROMPT, steps=1, height=72, width=136)[0].size == (136, 72)


def test_encode_then_decode_is_the_vae_there_and_back(small):
    picture = small(PROMPT, steps=1)[0]
    latents = small.encode(picture)
    x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, _ = small.vae.encode(x)
    torch.testing.assert_close(latents, mean * small.config.vae.scaling_factor)
    assert small.decode(latents)[0].size == picture.size


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_to_image(small, sampler):
    """Strength 0 is the image through the VAE, 1 is text to image, and 0.3 costs three steps of ten."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 200, 3), np.uint8)).resize(
        (400, 128)
    )
    latents, start, seen = small.encode(image.fit(picture, 128, 128)), noise([1], (4, 16, 16)), []
    how = {"steps": 10, "sampler": sampler, "seeds": [1]}
    plain = small.sample(PROMPT, start, **how)
    near = small.sample(
        PROMPT, start, init=latents, strength=0.3, progress=lambda i, t: seen.append(t), **how
    )
    assert torch.equal(small.sample(PROMPT, start, init=latents, strength=1.0, **how), plain)
    assert torch.equal(small.sample(PROMPT, start, init=latents, strength=0.0, **how), latents)
    assert len(seen) == 3 + (sampler == "pndm") and all(t < 350 for t in seen)
    assert 0 < (near - latents).norm() < (plain - latents).norm()


def test_a_picture_of_any_size_is_cut_to_the_runs(small):
    picture = Image.new("RGB", (400, 128), "red")
    picture.paste("blue", (0, 0, 130, 128))  # cut away
    whole = small(PROMPT, seeds=1, init_image=picture, strength=0.0)[0]
    assert whole.size == (128, 128)
    assert np.array_equal(
        np.asarray(whole), np.asarray(small.decode(small.encode(Image.new("RGB", (128, 128), "red")))[0])
    )


def test_compiling_changes_no_picture_and_happens_once(small_folder):
    """Through the compiler's front end alone: what it captures is whole, and serves every timestep."""
    sd, graphs = minsd.load(str(small_folder), "cpu"), []
    expected = np.asarray(sd(PROMPT, seeds=1, steps=4)[0]).astype(int)
    sd.compile(backend=lambda module, inputs: graphs.append(1) or module.forward, fullgraph=True)
    assert np.abs(np.asarray(sd(PROMPT, seeds=1, steps=4)[0]) - expected).max() <= 2
    assert len(graphs) == 1


def test_attention_backends(small_folder):
    sd = minsd.load(str(small_folder), "cpu")
    auto = np.asarray(sd(PROMPT, seeds=1, steps=2)[0]).astype(int)
    sd.set_attention("reference")
    assert np.abs(np.asarray(sd(PROMPT, seeds=1, steps=2)[0]) - auto).max() <= 2
    with pytest.raises(ValueError, match="no attention backend is called 'magic'"):
        sd.set_attention("magic")


def test_too_large_for_memory_goes_in_tiles_and_says_so(small, monkeypatch):
    latents = torch.randn(1, 4, 72, 72, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 2**20)
    with pytest.warns(UserWarning, match="bands of rows: 576x576"):
        assert small.decode(latents)[0].size == (576, 576)


def test_overflow_is_never_a_black_picture(small, monkeypatch):
    with pytest.raises(FloatingPointError, match="not finite"):
        small.decode(torch.full((1, 4, 16, 16), torch.inf))
    short, decode, ones = copy.copy(small), type(small.vae).decode, torch.ones(1, 4, 16, 16)
    short.unet, short.vae = copy.deepcopy(small.unet).bfloat16(), copy.deepcopy(small.vae).bfloat16()
    z = (ones.bfloat16() / small.config.vae.scaling_factor).float()
    expected = np.asarray(image.from_tensor(copy.deepcopy(short.vae).float().decode(z))[0])

    def overflowing(self, z):  # as float16 does on real VAEs
        return decode(self, z) * (1 if z.dtype == torch.float32 else torch.inf)

    monkeypatch.setattr(type(small.vae), "decode", overflowing)
    with pytest.warns(UserWarning, match="decoded again in float32"):
        again = np.asarray(short.decode(ones)[0])
    assert np.abs(again.astype(int) - expected).max() <= 1
    for sd in (copy.copy(small), short):
        sd.vae = copy.deepcopy(sd.vae)
        sd.vae.decoder.conv_out.bias.fill_(torch.nan)  # of a damaged file
        with pytest.raises(FloatingPointError, match="even in float32"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sd.decode(ones)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"height": 100}, "multiple of 8"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 2000}, "from 1 to 1000"),
        ({"sampler": "magic"}, "no sampler is called 'magic'"),
        ({"guidance_scale": float("nan")}, "must be a number"),
        ({"karras": True}, "dpmpp_2m"),
        ({"init_image": Image.new("RGB", (9, 9)), "strength": 1.1}, "from 0 to 1"),
        ({"init_image": Image.new("RGB", (9, 9)), "strength": 0.01}, "leaves none of 50 steps"),
        ({"seeds": [-1]}, "a seed must be"),
        ({"seeds": [1, 2], "noise": torch.zeros(1, 4, 16, 16)}, "one prompt, seed and noise"),
    ],
)
def test_what_a_caller_gets_wrong(small, options, says):
    with pytest.raises(ValueError, match=says):
        small(PROMPT, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_on_the_gpu_stays_near_the_cpu(shapes):
    gpu = minsd.load("shapes", "cuda")
    assert gpu.dtype == torch.float16
    a, b = (np.asarray(sd(PROMPT, seeds=1, steps=10)[0]).astype(int) for sd in (gpu, shapes))
    assert np.abs(a - b).mean() < 2
