"""bench/alignment.py without a checkpoint: its prompts, its similarities on a tiny CLIP, its gains."""

import csv
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
import bench  # noqa: E402
from bench import alignment  # noqa: E402
from minsd.weights.shapes import detector  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["alignment.py", *map(str, argv)])
    alignment.main()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, shapes_folder):
    """A random CLIPModel and its processor, saved by transformers itself."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(shapes_folder / "tokenizer")
    torch.manual_seed(0)
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, **tokens},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_sets_of_prompts():
    sets = {name: alignment.attend_and_excite(name) for name in ("animals", "animals-objects", "objects")}
    counts = [len(set(prompts)) for prompts in sets.values()]
    assert counts == [66, 144, 66] == [math.comb(12, 2), 12 * 12, math.comb(12, 2)]
    assert sets["animals"][0] == "a cat and a dog" and "an elephant and a rabbit" in sets["animals"]
    for name in ("animals-objects", "objects"):
        for prompt in sets[name]:
            halves = [half.split() for half in prompt.split(" and ")]
            assert len(halves) == 2
            assert halves[1][-2] in alignment.COLOURS and halves[1][-1] in alignment.OBJECTS
            for half in halves:  # an article, but none for glasses
                assert (half[0] in ("a", "an")) == (half[-1] != "glasses")
                assert half[0] not in ("a", "an") or (half[0] == "an") == (half[1][0] in "aeiou")
    for a, b in (prompt.split(" and ") for prompt in sets["objects"]):
        assert a.split()[-2] != b.split()[-2]  # two colours
    assert sets["objects"] == alignment.attend_and_excite("objects")  # drawn from a fixed seed


@pytest.mark.filterwarnings("ignore:a single subject")
def test_similarities_of_a_checkpoint(monkeypatch, tmp_path, clip, small_folder):
    """Rows of the CSV against cosines of CLIP's own projections, computed image by image."""
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a red circle and a blue square", "a green star"]
    drawn = {}
    draw = alignment.draw

    def kept(*args):
        drawn.update(draw(*args))
        return drawn

    monkeypatch.setattr(alignment, "draw", kept)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    (tmp_path / "p.txt").write_text("\n".join([*prompts, ""]))
    options = f"--seeds 1 --steps 2 --methods plain select --device cpu --csv --sheets {tmp_path}".split()
    files = ["--prompts", tmp_path / "p.txt", "--clip", clip, "--pickscore", clip]
    run(monkeypatch, "--model", small_folder, *files, *options)
    model = CLIPModel.from_pretrained(clip)
    processor = CLIPProcessor.from_pretrained(clip)

    def cosine(picture, text):
        def pooled(features):  # a tensor before transformers 5
            return features if torch.is_tensor(features) else features.pooler_output

        with torch.no_grad():
            pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            a = pooled(model.get_image_features(pixels))
            b = pooled(model.get_text_features(**processor.tokenizer(text, return_tensors="pt")))
        return torch.cosine_similarity(a, b).item()

    with (tmp_path / "alignment_clip.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["plain", "select"]
    for method, row in rows.items():
        pictures = drawn[method][0]
        full = [cosine(*pair) for pair in zip(pictures, prompts)]
        pairs = [(p, prompt.split(" and ")) for p, prompt in zip(pictures, prompts)]
        least = [min(cosine(p, half) for half in halves) for p, halves in pairs]
        assert float(row["clip"]) == pytest.approx(np.mean(full), abs=2e-4)
        assert float(row["clip_least_half"]) == pytest.approx(np.mean(least), abs=2e-4)
        expected = model.logit_scale.exp().item() * np.mean(full)
        assert float(row["pickscore"]) == pytest.approx(expected, abs=5e-3)
    # Two guided steps per image; before them, with `select`, an evaluation per candidate.
    assert [float(rows[m]["unet_rows"]) for m in rows] == [4, 4 + alignment.CANDIDATES]
    assert Image.open(tmp_path / "alignment-p.png").width > 2 * 256


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is no CLIPModel"),
    ],
)
def test_missing_files_are_one_line(tmp_path, clip, spoil, message):
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        alignment.Similarity(tmp_path, "cpu")
    assert "\n" not in str(error.value)


def test_a_missing_prompts_file_is_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--prompts", tmp_path / "none.txt")
    assert "there is no file" in capsys.readouterr().err.splitlines()[-1]


def test_a_gain_is_paired():
    """60 images, 12 repaired and 3 broken: the interval of the mean of +1, 0 and -1, not of two rates."""
    right = detector.Verdict((), (), 0)
    wrong = detector.Verdict((), ("missing",), 1)
    pairs = [(right, wrong)] * 12 + [(wrong, right)] * 3 + [(right, right)] * 25 + [(wrong, wrong)] * 20
    pixels = np.zeros((1, 1, 3), np.uint8)
    results = [
        [alignment.Judged([], k, pixels, pair[of], {}) for k, pair in enumerate(pairs)] for of in (0, 1)
    ]
    found = alignment.gain(*results)
    variance = sum((c - 9 / 60) ** 2 for c in itertools.chain([1] * 12, [-1] * 3, [0] * 45)) / 59
    half = 1.96 * (variance / 60) ** 0.5
    assert (found["gain"], found["repaired"], found["broken"]) == (0.15, 12, 3)
    low, high = map(float, found["gain_95"].split(".."))
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=6e-4)
