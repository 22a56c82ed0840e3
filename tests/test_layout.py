"""Layouts against cells averaged by slicing, worked numbers, and their authors' mistakes."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minsd.noise import layout
from minsd.noise.collage import direct_cells

HALVES = {
    "prompt": "two shapes",
    "negative_prompt": "blurry",
    "width": 64,
    "height": 32,
    "regions": [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {
            "prompt": "a blue square",
            "box": [32, 0, 64, 32],
            "negative_prompt": "",
            "weight": 2,
            "lora": ["style.safetensors:0.8"],
        },
    ],
}


def changed(region=None, drop=(), **top):
    given = copy.deepcopy(HALVES) | top
    given["regions"][0] |= region or {}
    for key in drop:
        del given["regions"][0][key]
    return given


def write_mask(path, width=64, height=32, box=(8, 8, 24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(mask).save(path)
    return path


def test_a_layout_file(tmp_path):
    write_mask(tmp_path / "masks" / "square.png")
    (tmp_path / "edges.png").write_bytes(b"any")
    given = changed()
    given["regions"][1] = given["regions"][1] | {
        "mask": "masks/square.png",
        "control_image": "edges.png",
        "control_scale": 0.5,
    }
    del given["regions"][1]["box"]
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(given))
    read = layout.load(path)
    assert (read.prompt, read.negative_prompt, read.width, read.height) == ("two shapes", "blurry", 64, 32)
    sized = layout.ensure_sized(read, 128)
    assert layout.ensure_sized(sized, 128) is sized
    a, b = sized.regions
    # The first region's negative prompt is left out: it has the image's.
    assert (a.prompt, a.negative_prompt, a.weight, a.lora) == ("a red circle", "blurry", 1.0, ())
    assert (b.negative_prompt, b.weight, b.control_scale) == ("", 2.0, 0.5)
    assert b.lora == ((tmp_path / "style.safetensors", 0.8),)
    assert b.control_image == tmp_path / "edges.png" and read.control_images == [None, None, b.control_image]
    assert a.bounds == (0, 0, 32, 32) and a.pixels.sum() == 32 * 32
    assert b.bounds == (8, 8, 24, 24) and b.pixels.sum() == 16 * 16
    assert sized.notes == ()


def test_json_of_a_layout_draws_the_same_layout(tmp_path, monkeypatch):
    """All keys spelled out, file names absolute; the region's place as it was given."""
    mask = write_mask(tmp_path / "square.png")
    (tmp_path / "edges.png").write_bytes(b"any")
    given = changed(region={"control_image": "edges.png"})
    given["regions"].append({"prompt": "a hole", "mask": "square.png", "control_scale": 0.5})
    monkeypatch.chdir(tmp_path)
    sized = layout.load(given).sized(64, 32)
    spelled = sized.to_json()
    keys = ["prompt", "box", "negative_prompt", "weight", "control_scale", "lora", "control_image"]
    assert [list(region) for region in spelled["regions"]] == [
        keys,
        keys[:-1],
        ["prompt", "mask", *keys[2:-1]],
    ]
    assert spelled == {
        "prompt": "two shapes",
        "negative_prompt": "blurry",
        "width": 64,
        "height": 32,
        "regions": [
            given["regions"][0]
            | {"negative_prompt": "blurry", "weight": 1.0, "control_scale": 1.0, "lora": []}
            | {"control_image": str(tmp_path / "edges.png")},
            given["regions"][1] | {"control_scale": 1.0, "lora": [f"{tmp_path / 'style.safetensors'}:0.8"]},
            {"prompt": "a hole", "mask": str(mask), "negative_prompt": "blurry", "weight": 1.0}
            | {"control_scale": 0.5, "lora": []},
        ],
    }
    monkeypatch.chdir("/")
    again = layout.load(json.loads(json.dumps(spelled))).sized(64, 32)
    assert again.to_json() == spelled
    assert all((a.pixels == b.pixels).all() for a, b in zip(again.regions, sized.regions))


def test_a_mask_is_read_once(tmp_path):
    mask = write_mask(tmp_path / "m.png")
    read = layout.load({**HALVES, "regions": [{"prompt": "a", "mask": str(mask)}]})
    write_mask(mask, box=(32, 0, 64, 32))
    assert read.sized(64, 32).regions[0].bounds == (8, 8, 24, 24)
    mask.unlink()
    assert read.sized(64, 32).sized(128, 64).regions[0].bounds == (16, 16, 48, 48)


def test_references_to_adapters():
    for text, path, scale in (
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("C:/a.safetensors:-1e-05", "C:/a.safetensors", -1e-05),
        ("a:b", "a:b", 1.0),
    ):
        assert layout.split_scale(text) == (Path(path), scale)
        assert layout.split_scale(layout.join_scale(Path(path), scale)) == (Path(path), scale)


def test_boxes_in_fractions_and_in_pixels():
    boxes = [[0, 0, 1, 1], [0.25, 0.5, 0.75, 1.0], [16, 0, 33, 32]]
    read = layout.load({**HALVES, "regions": [{"prompt": "", "box": box} for box in boxes]}).sized(64, 32)
    assert [r.bounds for r in read.regions] == [(0, 0, 64, 32), (16, 16, 48, 32), (16, 0, 33, 32)]
    given = changed(region={"box": [0.5, 0, 1, 1]})
    del given["width"], given["height"]
    open_size = layout.load(given)
    assert open_size.width is None
    assert layout.ensure_sized(open_size, 64).regions[0].bounds == (32, 0, 64, 64)
    assert open_size.sized(128, 64).regions[0].bounds == (64, 0, 128, 64)
    with pytest.raises(ValueError, match="region 2: the box .* an image of 32x32 pixels"):
        open_size.sized(32, 32)


def test_nothing_given_is_changed(tmp_path):
    mask = write_mask(tmp_path / "m.png", 128, 64, (16, 16, 80, 64))
    before, given = mask.read_bytes(), {**HALVES, "regions": [{"prompt": "a", "mask": str(mask)}]}
    kept = copy.deepcopy(given)
    read = layout.load(given).sized(64, 32)
    layout.preview(read)
    assert given == kept and mask.read_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        read.regions[0].pixels[0, 0] = True


def test_masks_of_another_size_are_resized_with_a_note(tmp_path):
    mask = write_mask(tmp_path / "m.png", 128, 64, (16, 16, 80, 64))
    read = layout.load({**HALVES, "regions": [{"prompt": "a", "mask": str(mask)}]}).sized(64, 32)
    assert read.regions[0].bounds == (8, 8, 40, 32) and read.regions[0].pixels.sum() == 32 * 24
    assert len(read.notes) == 1 and re.search("region 1.*128x64.*resized.*64x32", read.notes[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            changed(region={"box": [0, 0, 80, 32]}),
            r"region 1: the box \[0, 0, 80, 32\] .* inside an image of 64x32 pixels",
        ),
        (changed(region={"box": [-0.1, 0, 1, 1]}), "inside fractions 0 to 1"),
        (changed(region={"box": [32, 0, 32, 32]}), "x0 < x1"),
        (changed(region={"box": [0, 0, 32]}), "four numbers"),
        (changed(region={"box": [0, 0, True, 1]}), "four numbers"),
        (changed(region={"box": [0, 0, float("nan"), 1]}), "four numbers"),
        (changed(region={"box": [0, 0, 1, 10**400]}), "four numbers"),
        (changed(region={"box": [0.2, 0.2, 0.201, 0.201]}), "region 1 is empty"),
        (
            changed(region={"box": [4, 4, 11, 11]}),
            r"region 1 is too small: its 7x7 pixels, 49 in all, .* 32 pixels .* 11x11",
        ),
        (changed(region={"bbox": [0, 0, 1, 1]}), "region 1: unknown key 'bbox'; known are prompt, box, mask"),
        (changed(region={"weight": 0}), "region 1: the weight must be more than 0"),
        (changed(region={"weight": "1"}), "'weight' must be a number"),
        (changed(region={"lora": "style.safetensors"}), "'lora' must be a list"),
        (changed(region={"lora": [3]}), "FILE:SCALE"),
        (changed(region={"lora": ["a.safetensors:1.2.3"]}), "FILE:SCALE, such as"),
        (changed(region={"mask": "m.png"}), "one of the two"),
        (changed(drop=["box"]), "one of the two"),
        (changed(drop=["prompt"]), "region 1: there is no 'prompt'"),
        (changed(prompts="x"), "unknown key 'prompts'; known are prompt, negative_prompt, width"),
        (changed(prompt=3), "'prompt' must be text, not 3"),
        (changed(width=60), "the layout: the layout's width must be a multiple of 8 from 8 to 16384, not 60"),
        (changed(height=16392), "the layout's height must be a multiple of 8 from 8 to 16384, not 16392"),
        (changed(width=64.0), "'width' must be a whole number"),
        ({"regions": []}, "there is no 'prompt'"),
        ({"prompt": "a", "width": 64}, "width and height, or neither"),
        ({"prompt": "a", "regions": {}}, "'regions' must be a list"),
        ({"prompt": "a", "regions": ["a"]}, 'region 1: this must be an object .* not "a"'),
    ],
)
def test_mistakes_in_a_layout(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        layout.load(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ([0.6, 0, 0.4, 1], "fractions 0 to 1"),
        ([-0.1, 0, 1, 1], "fractions 0 to 1"),
        ([48, 0, 16, 32], "the image"),
    ],
)
def test_a_box_that_no_image_has_is_refused_before_the_size_is_known(tmp_path, box, inside):
    (tmp_path / "l.json").write_text(json.dumps({"prompt": "", "regions": [{"prompt": "", "box": box}]}))
    with pytest.raises(ValueError, match=f"l.json: region 1: the box .* inside {inside}$"):
        layout.load(tmp_path / "l.json")


@pytest.mark.parametrize("box", [[0.5, 0, 1, 1.5], [0, 0.25, 1.01, 0.75], [0, 0, 0.5, 40.5]])
def test_a_box_read_as_pixels_for_one_number_above_1_gets_a_hint(box):
    """Meant as fractions, it is a box of a pixel or two, or leaves the image: saying only that
    would mislead."""
    with pytest.raises(ValueError, match="region 1.*a number above 1 makes all four of a box pixels"):
        layout.load(changed(region={"box": box}))
    with pytest.raises(
        ValueError, match="region 1 is empty: its box .* wide and high$"
    ):  # and no mask to mend
        layout.load(changed(region={"box": [0.2, 0.2, 0.201, 0.201]}))


def test_files_that_are_missing_or_broken(tmp_path):
    def write(text):
        (tmp_path / "l.json").write_text(text, encoding="latin-1")
        return tmp_path / "l.json"

    with pytest.raises(ValueError, match="l.json: not JSON: .* at line 3, column 2"):
        layout.load(write('{"prompt": "a",\n "width": 64,\n x}'))
    with pytest.raises(ValueError, match="the key 'width' is given twice"):
        layout.load(write('{"prompt": "a", "width": 64, "width": 32}'))
    with pytest.raises(ValueError, match="not text in UTF-8"):
        layout.load(write('{"prompt": "\xe9"}'))
    with pytest.raises(ValueError, match="l.json: this must be an object"):
        layout.load(write("[1]"))
    with pytest.raises(FileNotFoundError, match="no layout .*none.json"):
        layout.load(tmp_path / "none.json")
    region = {"prompt": "a", "mask": "none.png"}
    with pytest.raises(FileNotFoundError, match="region 1: there is no mask file .*none.png"):
        layout.load(write(json.dumps({**HALVES, "regions": [region]})))
    with pytest.raises(ValueError, match="region 1: the mask .*l.json is not an image"):
        layout.load(write(json.dumps({**HALVES, "regions": [{"prompt": "a", "mask": "l.json"}]})))
    with pytest.raises(FileNotFoundError, match="region 1: there is no control image .*c.png"):
        layout.load(changed(region={"control_image": str(tmp_path / "c.png")}))
    write_mask(tmp_path / "empty.png", box=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="region 1 is empty"):
        layout.load(write(json.dumps({**HALVES, "regions": [{"prompt": "a", "mask": "empty.png"}]})))


def test_what_is_enough_to_fill_a_cell():
    """The sizes that the error names: 32 pixels in one cell; 11x11 anywhere, and 10x10 not quite
    anywhere."""

    def fills(x, y, w, h):
        read = layout.load({"prompt": "", "regions": [{"prompt": "", "box": [x, y, x + w, y + h]}]})
        try:
            read.sized(64, 64)
        except ValueError:
            return False
        return True

    assert fills(16, 16, 4, 8) and not fills(16, 16, 4, 7)
    assert all(fills(x, y, 11, 11) for x in range(8, 16) for y in range(8, 16))
    assert not all(fills(x, y, 10, 10) for x in range(8, 16) for y in range(8, 16))


def test_coverage_is_each_cells_mean():
    mask = np.random.default_rng(0).random((40, 56)) < 0.4
    for cell in (8, 16, 32):
        ours = layout.coverage(mask, cell)
        assert ours.shape == (-(-40 // cell), -(-56 // cell))
        for (i, j), value in np.ndenumerate(ours):
            part = mask[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]  # cut where the image ends
            assert value == pytest.approx(part.mean(), abs=1e-12)


def test_direct_cells():
    """A box aligned to a level's cells covers just its own; half a cell counts; a region too small
    keeps its centre's cell."""
    for box, cells in (
        ((8, 16, 504, 384), (8,)),
        ((32, 96, 416, 480), (8, 16, 32)),
        ((64, 0, 256, 320), (8, 16, 32, 64)),
    ):
        x0, y0, x1, y1 = box
        pixels = np.zeros((512, 512), bool)
        pixels[y0:y1, x0:x1] = True
        for cell in cells:
            ours = direct_cells(pixels, cell)
            assert ours.shape == (512 // cell,) * 2
            assert (ours.repeat(cell, 0).repeat(cell, 1) == pixels).all(), (box, cell)
    half = np.zeros((64, 64), bool)
    half[:, :12] = True  # one cell and half of the next
    assert direct_cells(half, 8).sum(0).tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    half[0, 11] = False  # a pixel less than half
    assert direct_cells(half, 8)[:, 1].tolist() == [False] + [True] * 7
    small = np.zeros((128, 128), bool)
    small[72:88, 40:56] = True  # centre at (80, 48): the last but one cell of 32 down, the second across
    assert [np.argwhere(direct_cells(small, cell)).tolist() for cell in (32, 64)] == [[[2, 1]], [[1, 0]]]


# --- the published folder -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A made-up folder of the published form, with a gap in its numbers."""
    for name, caption in {
        "PALL": "a park",
        "P000": "a brown dog",
        "P003": "a tree",
        "P010": "a bird",
    }.items():
        (tmp_path / name).mkdir()
        file = "blip_caption.json" if name == "P010" else "self_caption.json"
        (tmp_path / name / file).write_text(json.dumps(caption))
    (tmp_path / "P000" / "blip_caption.json").write_text('"a dog"')  # the other comes first
    write_mask(tmp_path / "P000" / "bbox_mask_image.png", 64, 48, (0, 16, 32, 48))
    write_mask(tmp_path / "P000" / "mask_image.png", 64, 48, (0, 0, 8, 8))
    write_mask(tmp_path / "P003" / "mask_image.png", 64, 48, (40, 0, 64, 48))
    write_mask(tmp_path / "P010" / "mask_image.png", 128, 96, (0, 0, 32, 32))
    write_mask(tmp_path / "P003" / "pose_image.png")
    write_mask(tmp_path / "PALL" / "canny_image.png")
    return tmp_path


def test_the_published_folder(folder):
    read = layout.ensure_sized(layout.load(folder), 128)
    assert (read.prompt, read.width, read.height) == ("a park", 64, 48)
    assert [r.prompt for r in read.regions] == ["a brown dog", "a tree", "a bird"]
    assert [r.bounds for r in read.regions] == [(0, 16, 32, 48), (40, 0, 64, 48), (0, 0, 16, 16)]
    assert [r.control_image for r in read.regions] == [None, folder / "P003" / "pose_image.png", None]
    assert read.control_image == folder / "PALL" / "canny_image.png"
    assert len(read.notes) == 1 and "region 3: its mask of 128x96" in read.notes[0]


def test_mistakes_in_a_folder(folder):
    (folder / "P010" / "mask_image.png").unlink()
    with pytest.raises(FileNotFoundError, match="no mask file .*P010.bbox_mask_image.png"):
        layout.load(folder)
    write_mask(folder / "P010" / "mask_image.png", 64, 48, (0, 0, 0, 0))
    with pytest.raises(ValueError, match="region 3 is empty"):
        layout.load(folder)
    write_mask(folder / "P010" / "mask_image.png", 64, 48)
    caption = folder / "P003" / "self_caption.json"
    caption.write_text('{"caption": "a tree"}')
    with pytest.raises(ValueError, match="P003.self_caption.json must hold one JSON string"):
        layout.load(folder)
    caption.write_text("a tree")
    with pytest.raises(ValueError, match="self_caption.json: not JSON: .* column 1"):
        layout.load(folder)
    caption.unlink()
    with pytest.raises(FileNotFoundError, match="no caption file .*P003.self_caption.json"):
        layout.load(folder)
    with pytest.raises(FileNotFoundError, match="no folder PALL"):
        layout.load(folder / "P000")


# --- preview --------------------------------------------------------------------------------------


def test_preview_shows_where_regions_lie_and_how_much_they_fill():
    given = {
        "prompt": "a park \u516c\u5712",
        "width": 128,
        "height": 64,
        "regions": [
            {"prompt": "left", "box": [0, 0, 60, 64]},
            {"prompt": "small \u72ac", "box": [96, 16, 128, 48]},
        ],
    }
    read = layout.load(given)
    picture = np.asarray(layout.preview(read)).astype(int)
    assert (
        picture.shape[1] == 640 and picture.shape[0] > 320
    )  # five pixels per pixel, and lines of text below

    def at(x, y):  # the colour at a pixel of the layout
        return picture[5 * y + 2, 5 * x + 2]

    white = np.array([255] * 3)
    red, blue = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in layout.COLOURS[:2])
    assert (at(80, 40) == white).all()
    assert np.abs(at(30, 40) - (0.7 * white + 0.3 * red)).max() <= 1
    # The cell of pixels 56 to 63 is half filled.
    assert np.abs(at(61, 40) - (0.85 * white + 0.15 * red)).max() <= 1
    assert np.abs(at(112, 40) - (0.7 * white + 0.3 * blue)).max() <= 1
    # Outlines lie on the region's own side.
    assert (picture[5 * 32, 5 * 60 - 1] == red).all() and (picture[5 * 32, 5 * 60] != red).any()
    legend = picture[320:]  # a line of text in each colour
    assert all(np.abs(legend - ink).sum(-1).min() < 60 for ink in (red, blue, 0 * red))
    assert layout.preview(layout.load({"prompt": "nothing but this"}), size=64).width >= 480
