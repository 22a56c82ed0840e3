"""Images as people have them. Truth: the format's definition, the 8-bit original, diffusers' load_image."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from minsd.image import fit, read, to_tensor

RAMP = np.linspace(0, 1, 96)[None].repeat(64, 0)
EIGHT = (255 * RAMP).round().astype(np.uint8)


def save(path, values, **how):
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path, **how)
    return path


def pixels(picture):
    return (to_tensor([picture])[0].permute(1, 2, 0).numpy() + 1) * 127.5  # (H, W, 3), 0..255


def png16(path, values, colour_type):
    """A 16-bit PNG of (H,W,C) values, which Pillow cannot write in colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "white"),
    [
        ("depth.png", np.uint16, 65535),
        ("depth.tif", np.uint16, 65535),
        ("depth.pgm", np.uint16, 65535),
        ("wide16.tif", np.int32, 65535),
        ("wide8.tif", np.int32, 255),
        ("wide.tif", np.int32, 2**31 - 1),
        ("float.tif", np.float32, 1),
        ("float8.tif", np.float32, 255),
        ("float16.tif", np.float32, 65535),
    ],
)
def test_fine_greyscale_keeps_its_levels(tmp_path, name, kind, white):
    values = RAMP * white if kind == np.float32 else (RAMP * white).round()
    picture = read(save(tmp_path / name, values.astype(kind)))
    assert np.abs(pixels(picture)[..., 1] - 255 * RAMP).max() < (0.51 if white == 255 else 0.01)
    small, wanted = fit(picture, 32, 32), fit(Image.fromarray(EIGHT), 32, 32)
    assert small.size == (32, 32) and np.abs(pixels(small) - pixels(wanted)).max() < 1.01
    opened = Image.open(tmp_path / name)  # given as it is by a caller of the Python API
    assert np.abs(pixels(opened) - pixels(picture)).max() < 0.01


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    for name in ("dark.png", "dark.pgm", "dark.tif"):
        assert pixels(read(save(tmp_path / name, np.full((8, 8), 200, np.uint16)))).max() < 1


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_of_every_colour_type(tmp_path, colour_type, channels):
    values = (RAMP * 65535).round()[..., None].repeat(channels, -1)
    picture = read(png16(tmp_path / "x.png", values, colour_type))
    assert np.abs(pixels(picture) - 255 * RAMP[..., None]).max() <= 1  # Pillow keeps 8 bits of colour


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_orientation_is_that_of_diffusers(tmp_path, orientation, name):
    from diffusers.utils import load_image

    picture = Image.fromarray(np.stack([EIGHT, EIGHT[::-1], 0 * EIGHT], -1))
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / name, picture, exif=exif)
    assert np.array_equal(np.asarray(read(path)), np.asarray(load_image(str(path))))


def test_transparency_is_dropped_as_in_diffusers_or_laid_on_a_colour(tmp_path):
    from diffusers.utils import load_image

    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 0, 0, 255)
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    for name, picture, how in (
        ("rgba.png", Image.fromarray(rgba), {}),
        ("la.png", Image.fromarray(rgba).convert("LA"), {}),
        ("p.png", palette, {"transparency": palette.getpixel((0, 7))}),
        ("p.gif", palette, {"transparency": palette.getpixel((0, 7))}),
    ):
        path = save(tmp_path / name, picture, **how)
        assert np.array_equal(np.asarray(read(path)), np.asarray(load_image(str(path)))), name
        on_white = np.asarray(read(path, on="white"))
        assert (on_white[6] == 255).all() and on_white[1, 0, 0] in (200, 60) and on_white[1, 0, 1] < 100, name


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_those_of_diffusers(tmp_path, mode):
    from diffusers.utils import load_image

    colours = Image.fromarray(np.stack([EIGHT, 255 - EIGHT, EIGHT // 2], -1)).convert(mode)
    path = save(tmp_path / "x.tif", colours)
    assert np.array_equal(np.asarray(read(path)), np.asarray(load_image(str(path))))


def test_the_first_frame_is_used_and_reported(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match="has 3 frames or pages: the first is used"):
            red = np.asarray(read(tmp_path / name))[4, 4]
        assert red[0] > 240 and red[1] < 16 and red[2] < 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(save(tmp_path / "one.gif", frames[0]))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (-RAMP, "run from -1 to"),
        (RAMP * np.nan, "nan"),
        (RAMP * 1e9, "scale them to 0..1"),
        (np.full_like(RAMP, np.inf), "inf"),
    ],
)
def test_values_without_a_white_are_refused(tmp_path, values, says):
    path = save(tmp_path / "x.tif", values.astype(np.float32))
    with pytest.raises(ValueError, match=says):
        read(path)


def test_damaged_files_and_other_formats_are_refused_in_one_line(tmp_path):
    whole = save(tmp_path / "x.png", EIGHT).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "x.eps", "text.png"):
        with pytest.raises(ValueError, match="is not an image that can be read") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no image"):
        read(tmp_path / "none.png")


def test_every_reader_takes_them(tmp_path):
    """Control images, masks and images to invert or begin from are read alike."""
    from minsd.controlnet import read_control_image
    from minsd.noise import layout
    from minsd.noise.stability import psnr

    fine = save(tmp_path / "depth.png", (65535 * RAMP).round().astype(np.uint16))
    eight = save(tmp_path / "eight.png", EIGHT)
    control, coarse = (read_control_image(path, 96, 64) for path in (fine, eight))
    assert (control - coarse).abs().max() < 0.6 / 255 and len(control[0, 0].unique()) == 96
    scaled = read_control_image(fine, 64, 64)
    assert scaled.shape == (1, 3, 64, 64) and scaled.min() >= 0 and scaled.max() <= 1

    shape = np.zeros((64, 96), bool)
    shape[16:48, 24:72] = True
    cut = np.zeros((64, 96, 4), np.uint8)
    cut[..., :3] = 255
    cut[..., 3] = 255 * shape  # white everywhere, but transparent outside
    masks = {
        "alpha.png": Image.fromarray(cut),
        "fine.png": Image.fromarray((65535 * shape).astype(np.uint16)),
        "one.png": Image.fromarray(shape),
        "float.tif": Image.fromarray(shape.astype(np.float32)),
    }
    for name, mask in masks.items():
        save(tmp_path / name, mask)
        regions = [{"prompt": "a star", "mask": str(tmp_path / name)}]
        sized = layout.load({"prompt": "x", "regions": regions}).sized(96, 64)
        assert np.array_equal(sized.regions[0].pixels, shape), name
    assert psnr(read(eight), read(eight)) == np.inf
