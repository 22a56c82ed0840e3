"""Textual inversion against diffusers loading the same files, and files that are no embeddings."""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import minsd
from minsd.adapters import split_name
from minsd.generate import main
from minsd.weights import embedding, lora

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
WEB_UI = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "other", "step": 9}


def save(content, path, **how):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path, **how)
    return path


FORMS = {
    "mine-1.safetensors": {"emb_params": VECTORS},
    "word.safetensors": {"<x-1>": VECTORS[:1]},
    "mine.pt": WEB_UI,
    "early.pt": WEB_UI | {"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)})},
    "learned_embeds.bin": {"<x-1>": VECTORS[0]},
}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_parity_with_diffusers_loading_the_same_file(name, small_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    path = save(FORMS[name], tmp_path / name)
    sd = minsd.load(str(small_folder), "cpu")
    word = embedding.read(path, None, sd)
    assert word.name == ("<x-1>" if "x-1" in str(FORMS[name].keys()) else path.stem)
    prompt = f"a red circle, {word.name}, a star"
    before = sd.encode_prompt(prompt)
    assert word.name in embedding.add(word, sd)
    pipe = StableDiffusionPipeline.from_pretrained(small_folder, local_files_only=True, safety_checker=None)
    theirs = path if name != "early.pt" else save(WEB_UI, tmp_path / "twin.pt")
    pipe.load_textual_inversion(str(theirs), token=word.name)
    expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    states = sd.encode_prompt(prompt)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert (states - before).abs().max() > 1e-2
    count = len(word.vectors[0])
    assert sd.text.positions(prompt, word.name) == list(range(5, 5 + count))  # after the comma
    assert sd.text.tokens(prompt)[5 : 5 + count] == [word.name.lower()] * count
    assert sd.text.positions(prompt, "star") == [7 + count]
    with pytest.raises(ValueError, match="two embeddings are called"):
        embedding.add(word, sd)


def test_a_word_is_found_alone_in_any_case_and_stays_in_one_chunk(small_folder, tmp_path):
    sd = minsd.load(str(small_folder), "cpu")
    embedding.add(
        embedding.read(save({"emb_params": VECTORS}, tmp_path / "bad.safetensors"), "Bad-5", sd), sd
    )
    vectors = sd.text.added["bad-5"]
    assert [i for i in sd.text.ids("a BAD-5, (bad-5:1.2)") if i in vectors] == vectors * 2
    assert not set(vectors) & set(sd.text.ids("bad-55 and notbad-5"))
    ids = sd.text.ids("a star " * 37 + "bad-5")  # 74 tokens before it
    assert ids[78:81] == vectors


def test_bundled_embeddings_come_with_their_lora(small_folder, tmp_path):
    sd = minsd.load(str(small_folder), "cpu")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = {f"{layer}.lora_{x}.weight": torch.ones(64, 64) for x in ("up", "down")}
    file |= {
        "bundle_emb.one.string_to_param.*": VECTORS.clone(),
        "bundle_emb.two.emb_params": VECTORS[:1].clone(),
    }
    path = save(file, tmp_path / "style.safetensors")
    assert len(lora.read(path, sd).parts) == 1
    words = embedding.bundled(path, sd)
    assert [(word.name, len(word.vectors[0])) for word in words] == [("one", 3), ("two", 1)]
    with pytest.raises(ValueError, match="give it with --lora"):
        embedding.read(path, None, sd)
    args = ["a one star", "--model", str(small_folder), "--lora", str(path), "--steps", "1", "--seed", "0"]
    assert main([*args, "--height", "64", "--width", "64", "--quiet", "--out", str(tmp_path / "o")]) == 0


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.safetensors", {"emb_params": torch.zeros(2, 768)}, "made for Stable Diffusion 1.x: .* 768"),
        ("x.safetensors", {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, "made for SDXL"),
        ("x.safetensors", {"emb_params": torch.zeros(76, 32)}, "1 to 75 vectors"),
        ("x.safetensors", {"emb_params": torch.full((1, 32), torch.nan)}, "not finite"),
        ("x.safetensors", {f"{x}.lora_up.weight": torch.zeros(2, 32) for x in "abc"}, "looks like a LoRA"),
        ("x.safetensors", {f"model.diffusion_model.{x}": torch.zeros(1) for x in "abc"}, "original layout"),
        ("x.pt", {"string_to_param": {"*": torch.zeros(2, 32).long()}}, "1 to 75 vectors"),
        ("x.pt", [1, 2], "tensors and plain data"),
        ("x.pt", {"emb": warnings.catch_warnings}, "can run code"),
        ("x.png", None, "stored in an image"),
        ("ctrl\x07.safetensors", {"emb_params": VECTORS}, "cannot be a word"),
    ],
)
def test_one_clear_line_for_what_is_no_embedding_of_the_model(name, content, says, small, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"") if content is None else save(content, path)
    with pytest.raises(ValueError, match=says) as error:
        embedding.read(path, None, small)
    assert "\n" not in str(error.value)


def test_what_is_too_large_or_not_there(small, tmp_path, capfd):
    with (tmp_path / "x.pt").open("wb") as file:
        file.truncate(2**26)
    with pytest.raises(ValueError, match="more than 32 MiB"):
        embedding.read(tmp_path / "x.pt", None, small)
    assert main(["a star", "--embedding", str(tmp_path / "y.pt:word")]) == 2
    assert "there is no embedding" in capfd.readouterr().err
    assert split_name("a:b/x.pt:word") == (split_name("a:b/x.pt")[0], "word")
    assert split_name("x.pt")[1] is None and split_name("folder:x")[1] is None


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.integers(0, 4000), byte=st.integers(0, 255), cut=st.integers(0, 3000))
def test_damaged_pickles_end_in_one_line(at, byte, cut, small, tmp_path):
    path = save(WEB_UI, tmp_path / "sound.pt", _use_new_zipfile_serialization=bool(cut % 2))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    (tmp_path / "x.pt").write_bytes(data[: len(data) - (cut if cut < 1500 else 0)])
    try:
        embedding.read(tmp_path / "x.pt", None, small)
    except ValueError as error:
        assert "\n" not in str(error)


def test_embeddings_are_recorded_and_taken_over(small_folder, tmp_path):
    path = save({"emb_params": VECTORS}, tmp_path / "style.safetensors")
    args = ["--model", str(small_folder), "--steps", "1", "--height", "64", "--width", "64", "--quiet"]
    out = ["--out", str(tmp_path / "o")]
    assert main(["a mine star", "--embedding", f"{path}:mine", "--seed", "3", *args, *out]) == 0
    like = ["--like", str(tmp_path / "o" / "00000-3.png"), "--quiet", *out]
    assert main([*like, "--model", str(small_folder)]) == 2  # the embedding lies outside the image's folder
    assert main([*like, "--trust"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o" / "runs.jsonl").read_text().splitlines()]
    assert [row["embedding"] for row in rows] == [[f"{path}:mine"]] * 2
    first, second = ((tmp_path / "o" / row["file"]) for row in rows)
    assert minsd.image.read(first).tobytes() == minsd.image.read(second).tobytes()
    assert load_file(path)["emb_params"].equal(VECTORS)
