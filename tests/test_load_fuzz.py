"""Hostile files: each is refused by a ValueError or FileNotFoundError of one line, or read as by safetensors.

The reference is the safetensors library itself: a file that `read_header` accepts, the library must
open, with the same names and shapes.
"""

import json
import os
import random
import struct
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minsd
from minsd.weights.load import load_model
from minsd.weights.safetensors_file import ITEM_SIZE, guess, read_header

# The suite tries some hundred files, always the same. MINSD_FUZZ=20: twenty times as many, new ones
# on every run.
TIMES = int(os.environ.get("MINSD_FUZZ", 0))


def fuzz(count):
    return settings(
        max_examples=count * (TIMES or 1),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not TIMES,
    )


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
REAL = [  # names by which the loader recognises files
    *(
        UNET + name
        for name in (
            "input_blocks.0.0.weight",
            "input_blocks.1.0.in_layers.2.weight",
            "input_blocks.3.0.op.weight",
            "out.2.bias",
            "middle_block.1.proj_in.weight",
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        )
    ),
    VAE + "decoder.conv_in.weight",
    VAE + "encoder.down.0.block.0.conv1.weight",
    TEXT + "transformer.text_model.embeddings.token_embedding.weight",
    TEXT + "model.token_embedding.weight",
    TEXT + "model.transformer.resblocks.0.attn.in_proj_weight",
    "a",
    "b.weight",
]
NAMES = [*REAL, "__metadata__", "ö\n", "\ud800"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from([*ITEM_SIZE, "F4", "C64", "f32", ""]) | JUNK
NUMBERS = st.integers(0, 64) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 10**30]) | JUNK


def one_line(call):
    """The message of the call's one-line refusal, or None if it succeeds; any other end fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000
        message.encode()  # it can be printed
        return message


def load(path, **more):
    return load_model(str(path), device=torch.device("cpu"), dtype=torch.float32, **more)


def sound(content: bytes, path) -> None:
    """A file that passes is opened by the library, which finds the same names and shapes."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(header)
        for name in header:
            assert file.get_slice(name).get_shape() == header[name]["shape"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer(shapes_folder):
    return shapes_folder / "tokenizer"


@fuzz(100)
@given(content=st.binary(max_size=200))
def test_bytes(place, content):
    sound(content, place / "x.safetensors")


@fuzz(100)
@given(
    header=JUNK | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JUNK, max_size=4),
    data=st.binary(max_size=40),
)
def test_any_json(place, tokenizer, header, data):
    content = json.dumps(header).encode()
    path = place / "x.safetensors"
    sound(struct.pack("<Q", len(content)) + content + data, path)
    assert one_line(lambda: load(path, tokenizer=tokenizer))


@fuzz(100)
@given(
    entries=st.dictionaries(
        st.sampled_from(NAMES),
        st.fixed_dictionaries(
            {
                "dtype": DTYPES,
                "shape": st.lists(NUMBERS, max_size=5) | JUNK,
                "data_offsets": st.tuples(NUMBERS, NUMBERS) | JUNK,
            }
        ),
        max_size=4,
    ),
    data=st.binary(max_size=64),
)
def test_headers_of_the_right_form(place, tokenizer, entries, data):
    content = json.dumps(entries).encode()
    path = place / "x.safetensors"
    sound(struct.pack("<Q", len(content)) + content + data, path)
    assert one_line(lambda: load(path, tokenizer=tokenizer))
    assert one_line(lambda: load_model("shapes", device=torch.device("cpu"), dtype=torch.float32, vae=path))


@fuzz(100)
@given(
    shapes=st.dictionaries(
        st.sampled_from(REAL),
        st.tuples(
            st.sampled_from(["F16", "F32", "I64"]),
            st.lists(st.sampled_from([0, 1, 2, 3, 4, 32, 64, 77]) | st.just(2**40), max_size=4),
        ),
        min_size=1,
    )
)
def test_sound_files_of_wrong_sizes(place, tokenizer, shapes):
    """Sparse files with a correct header that hold no model."""
    header, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        if 0 not in shape and any(n > 100 for n in shape):
            shape = [0, *shape][:4]  # enormous and empty
        numbers = 1
        for n in shape:
            numbers *= n
        if numbers > 2**24:
            shape, numbers = [0], 0
        end = position + numbers * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    content = json.dumps(header).encode()
    path = place / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + position)
    assert read_header(path) == header
    assert one_line(lambda: load(path, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def small_file(place):
    path = place / "small.safetensors"
    save_file(
        {f"model.diffusion_model.{i}": torch.randn(i + 1) for i in range(5)}, path, metadata={"format": "pt"}
    )
    return path.read_bytes()


@fuzz(100)
@given(cut=st.integers(0, 10_000))
def test_truncation(place, small_file, cut):
    path = place / "cut.safetensors"
    path.write_bytes(small_file[: min(cut, len(small_file) - 1)])
    assert "not a sound safetensors file" in one_line(lambda: read_header(path))


@fuzz(200)
@given(seed=st.integers(0, 2**32))
def test_bits_flipped_in_the_header(place, small_file, seed):
    draw, content = random.Random(seed), bytearray(small_file)
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
    sound(bytes(content), place / "flipped.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": ' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 2_000_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9," * 1_000_000 + b'9], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": null}',
        json.dumps({"x" * 10_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(),
        b'{"a": NaN}',
        b"{}" + b" " * 100_000,
    ],
    ids=[
        "nested",
        "opened",
        "dimensions",
        "number",
        "utf-16",
        "mark",
        "notes",
        "notes of numbers",
        "no notes",
        "name",
        "nan",
        "blank",
    ],
)
def test_headers_made_to_be_slow_or_large(place, content):
    path = place / "slow.safetensors"
    sound(struct.pack("<Q", len(content)) + content + bytes(4 if b"x" * 99 in content else 0), path)
    one_line(lambda: load(path))


CONFIGS = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]


@fuzz(25)
@given(data=st.data())
@example(data=None)
def test_configs(shapes_folder, tmp_path_factory, data):
    """A folder's JSON with a value replaced: it loads, or is refused in one line."""
    folder = tmp_path_factory.mktemp("config")
    for part in shapes_folder.iterdir():
        if part.name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
            (folder / part.name).mkdir()
            for file in part.iterdir():
                (folder / part.name / file.name).symlink_to(file)
    index = folder / "model_index.json"
    index.write_bytes((shapes_folder / "model_index.json").read_bytes())
    if data is None:
        assert one_line(lambda: load(folder)) is None
        return
    path = folder / data.draw(st.sampled_from(CONFIGS))
    config = json.loads(path.read_text())
    junk = JUNK | st.lists(st.integers(-1, 256), max_size=4) | st.integers(-1, 2**40)
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(junk)
    path.unlink()
    path.write_text(json.dumps(config))
    one_line(lambda: minsd.load(str(folder), "cpu"))


def test_a_guess_is_made_of_any_names(small_folder):
    assert "VAE alone" in guess(load_file(small_folder / "vae" / "diffusion_pytorch_model.safetensors"))
    assert "UNet alone" in guess(load_file(small_folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert guess([]) is None
