"""The command line as a user meets it: files, settings inside them, exit codes, one-line errors."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sd_parsers import ParserManager

from minsd import image
from minsd.app import options, requests, run
from minsd.config import SAMPLER_NAMES
from minsd.generate import main
from minsd.noise.initial import noise, read_metadata
from minsd.noise.methods import METHODS
from minsd.samplers import SAMPLERS

PROMPT = "a red circle and a blue square"


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three pictures of three steps, once for all tests that only look."""
    out = tmp_path_factory.mktemp("made")
    assert main([PROMPT, *"--seeds 3,5-6 --steps 3 --out".split(), str(out), "--save-noise", "--quiet"]) == 0
    return out


def test_pictures_and_lines(made):
    assert sorted(p.name for p in made.glob("*.png")) == ["00000-3.png", "00001-5.png", "00002-6.png"]
    assert not list(made.glob("*.tmp"))
    rows = lines(made)
    assert [(r["file"], r["seed"]) for r in rows] == [
        ("00000-3.png", 3),
        ("00001-5.png", 5),
        ("00002-6.png", 6),
    ]
    for row in rows:
        assert (
            row["prompt"] == PROMPT
            and row["steps"] == 3
            and row["sampler"] == "ddim"
            and row["model"] == "shapes"
        )
        assert row["unet_rows"] == 6  # three steps, both halves of guidance
        assert row["seconds"] > 0 and row["versions"]["torch"] == torch.__version__
    assert Image.open(made / "00000-3.png").size == (128, 128)


def test_settings_inside_the_picture(made):
    text = Image.open(made / "00001-5.png").text
    inside, row = json.loads(text["minsd"]), lines(made)[1]
    assert inside.items() <= row.items() and inside["seed"] == 5
    first, last = text["parameters"].splitlines()
    assert first == PROMPT
    assert last.startswith(
        "Steps: 3, Sampler: DDIM, CFG scale: 5.0, Seed: 5, Size: 128x128"
    ) and last.endswith("Model: shapes")


def test_saved_noise_is_the_seeds_own(made):
    for name, seed in (("00000-3", 3), ("00001-5", 5), ("00002-6", 6)):
        path = made / "extra" / f"{name}-noise.safetensors"
        assert torch.equal(load_file(path)["noise"], noise([seed], (4, 16, 16)))
        metadata = read_metadata(path)
        assert metadata["prompt"] == PROMPT and metadata["seed"] == str(seed)
        assert (metadata["init_noise"], metadata["updates"], metadata["model"]) == (
            "random",
            "none",
            "shapes",
        )


def test_like_makes_the_same_picture_again(made, tmp_path):
    assert main(["--like", str(made / "00001-5.png"), "--out", str(tmp_path), "--quiet"]) == 0
    again = pixels(tmp_path / "00000-5.png")
    assert np.abs(again - pixels(made / "00001-5.png")).max() <= 2  # made alone now, in a batch of three then
    assert main(["--like", str(tmp_path / "00000-5.png"), "--out", str(tmp_path), "--quiet"]) == 0
    assert np.array_equal(pixels(tmp_path / "00001-5.png"), again)
    assert (
        main(
            [
                "--like",
                str(made / "00001-5.png"),
                *"--seed 9 --steps 2 --out".split(),
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    assert lines(tmp_path)[-1]["seed"] == 9 and lines(tmp_path)[-1]["steps"] == 2


@pytest.mark.parametrize(
    "how",
    [
        ["--attention-maps"],
        ["--excite"],
        ["--init-noise", "select", "--candidates", "2", "--score", "stability"],
        ["--init-noise", "select", "--candidates", "3", "--score", "attention"],
        ["--init-noise", "optimize", "--optimize-steps", "1", "--optimize-mode", "detach"],
        ["--invert"],
    ],
    ids=" ".join,
)
def test_every_kind_of_picture_can_be_made_again(made, tmp_path, how):
    what = [*how, str(made / "00000-3.png")] if how == ["--invert"] else [PROMPT, *how, "--seed", "2"]
    assert main([*what, "--steps", "2", "--out", str(tmp_path), "--quiet"]) == 0
    first = lines(tmp_path)[0]
    picture = str(tmp_path / first["file"])
    maps = how if how == ["--attention-maps"] else []  # asked for, not a setting of the picture
    # An inverted image lies in another folder: only by --trust, as elsewhere below.
    trust = ["--trust"] if how == ["--invert"] else []
    assert main(["--like", picture, *maps, *trust, "--out", str(tmp_path), "--quiet"]) == 0
    assert lines(tmp_path)[1] | {"file": 0, "seconds": 0} == first | {"file": 0, "seconds": 0}
    assert np.array_equal(pixels(tmp_path / lines(tmp_path)[1]["file"]), pixels(picture))
    if how != ["--invert"]:  # a method of its own: of the picture only its seed, not how that was found
        assert main(["--like", picture, "--init-noise", "random", "--out", str(tmp_path), "--quiet"]) == 0
        plain = lines(tmp_path)[2]
        assert (plain["seed"], plain["init_noise"], plain.get("score"), plain["unet_rows"]) == (
            first["seed"],
            "random",
            None,
            4,
        )


def test_noise_from_a_file_is_what_the_picture_begins_from(made, tmp_path):
    save_file({"noise": noise([5], (4, 16, 16))}, tmp_path / "five.safetensors")
    args = [
        PROMPT,
        *"--seed 77 --noise".split(),
        str(tmp_path / "five.safetensors"),
        *"--steps 3 --out".split(),
        str(tmp_path),
        "--quiet",
    ]
    assert main(args) == 0
    assert np.abs(pixels(tmp_path / "00000-77.png") - pixels(made / "00001-5.png")).max() <= 2


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "00041-7.png").write_bytes(b"mine")
    for _ in range(2):
        assert main([PROMPT, "--seed", "7", "--steps", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["00041-7.png", "00042-7.png", "00043-7.png"]
    assert (tmp_path / "00041-7.png").read_bytes() == b"mine"


def test_json_output_and_sizes_and_an_empty_prompt(tmp_path, capfd):
    size = ["--height", "72", "--width", "136"]
    assert (
        main(
            ["", "--seed", "1", "--num-images", "2", "--steps", "1", *size, "--out", str(tmp_path), "--json"]
        )
        == 0
    )
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]  # nothing else there
    assert [r["seed"] for r in rows] == [1, 2] and rows == lines(tmp_path)
    assert Image.open(tmp_path / rows[0]["file"]).size == (136, 72)
    assert "seeds 1 to 2" in err


def test_a_random_seed_is_printed_and_kept(tmp_path, capfd):
    for _ in range(2):
        assert main([PROMPT, "--steps", "1", "--out", str(tmp_path)]) == 0
    first, second = (row["seed"] for row in lines(tmp_path))
    assert first != second and f"seed {first}" in capfd.readouterr().err


def test_the_names_offered_are_those_there_are():
    assert options.OPTIONS["sampler"].choices == tuple(SAMPLERS)
    assert options.OPTIONS["init_noise"].choices == tuple(METHODS)


def test_every_option_identifies_an_image_or_says_why_it_changes_none():
    for option in options.OPTIONS.values():
        assert bool(option.identity) != bool(option.harmless), option.name
    keys = {*options.IDENTITY, "candidates"}
    per_line = {"noise": "noise_file", "seeds": "seed", "num_images": "seed", "token_indices": "subjects"}
    per_line["objective_set"] = "objective"
    per_line["layout_method"] = "crop_margin"
    assert keys >= {per_line.get(name, name) for name in options.PER_LINE}


def test_list_tokens(capfd, tmp_path):
    assert main([PROMPT, "--list-tokens", "--out", str(tmp_path / "none")]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].split() == ["0", "<|startoftext|>"] and out[3].split() == ["3", "circle</w>"]
    assert not (tmp_path / "none").exists()


def test_guidance_rescale_is_recorded_and_repeated(tmp_path, capfd, shapes):
    run = [PROMPT, "--seed", "0", "--steps", "2", "--out", str(tmp_path)]
    assert main([*run, "--guidance-rescale", "0.7"]) == 0
    assert main(run) == 0
    first, second = lines(tmp_path)
    assert (first["guidance_rescale"], second["guidance_rescale"]) == (0.7, None)
    pictures = [np.asarray(Image.open(tmp_path / row["file"])) for row in (first, second)]
    expected = [shapes(PROMPT, seeds=[0], steps=2, guidance_rescale=part)[0] for part in (0.7, None)]
    assert all(np.array_equal(a, b) for a, b in zip(pictures, expected))
    assert not np.array_equal(*pictures)
    assert main(["--like", str(tmp_path / first["file"]), "--out", str(tmp_path / "again")]) == 0
    (again,) = lines(tmp_path / "again")
    assert again["guidance_rescale"] == 0.7
    assert (tmp_path / "again" / again["file"]).exists()
    assert main([*run, "--guidance-rescale", "0.7", "--guidance-scale", "1", "--resume"]) == 0
    assert "changes nothing here" in capfd.readouterr().err
    assert main([*run, "--guidance-rescale", "0", "--resume"]) == 0 and len(lines(tmp_path)) == 3
    assert main([*run, "--guidance-rescale", "1.5"]) == 2
    assert "--guidance-rescale" in capfd.readouterr().err


def test_weights_and_chunks_are_said_and_recorded(tmp_path, capfd):
    run = ["--seed", "0", "--steps", "1", "--out", str(tmp_path)]
    assert main(["a (red:1.3) circle and " * 20, *run]) == 0
    said = capfd.readouterr().err
    assert "read in 2 chunks" in said and "--no-prompt-weights: as plain text" in said
    assert main(["a (red) circle", "--prompt-weights", "--clip-skip", "2", *run]) == 0
    assert "prompt weights" not in capfd.readouterr().err
    first, second = lines(tmp_path)
    assert (first["prompt_weights"], first["clip_skip"]) == (None, None)
    assert (second["prompt_weights"], second["clip_skip"]) == (True, 2)
    with Image.open(tmp_path / second["file"]) as picture:
        assert "Clip skip: 2" in picture.text["parameters"]
    assert main(["a circle", "--clip-skip", "9", *run]) == 2
    assert "clip skip must be from 1 (nothing is skipped) to 2, not 9" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "means"),
    [
        ("--cfg-scale 3", {"guidance_scale": 3.0}),
        ("--num_inference_steps=4", {"steps": 4}),
        ("--negative_prompt x", {"negative_prompt": "x"}),
        ("-n 2", {"num_images": 2}),
        ("--dtype fp16", {"dtype": "float16"}),
        ("--dtype BF16", {"dtype": "bfloat16"}),
        ("--device cuda:1", {"device": "cuda:1"}),
        ("--device gpu", {"device": "cuda"}),
        ("--init-noise InitNO", {"init_noise": "initno"}),
        ("--sampler k_euler_a", {"sampler": "euler_a", "karras": None}),
        ("--sampler DPM++_2M_Karras", {"sampler": "dpmpp_2m", "karras": True}),
        ("--sampler UniPC", {"sampler": "unipc"}),
        ("--seed -1", {"seed": None}),
    ],
)
def test_options_as_other_tools_spell_them(words, means):
    given = options.parse([PROMPT, *words.split()])
    assert {name: given[name] for name in means} == means and given["prompt"] == PROMPT
    for prompt in (["--prompt", PROMPT], [f"--prompt={PROMPT}"]):
        assert options.parse([*words.split(), *prompt]) == given


def test_every_sampler_is_known_by_its_name_elsewhere():
    for ours, theirs in SAMPLER_NAMES.items():
        for name in (ours, theirs, theirs.lower(), theirs.replace(" ", "_")):
            assert options.OPTIONS["sampler"].choose(name) == ours


def test_parameters_are_read_by_another_program(tmp_path, made):
    """By sd-parsers; and by the form's own rule, that a value with a comma or colon is a JSON string."""
    manager = ParserManager()
    (tmp_path / "my model, v2 final").mkdir()
    settings = json.loads(Image.open(made / "00000-3.png").text["minsd"])
    settings |= {"negative_prompt": "a heart", "karras": True, "sampler": "dpmpp_2m", "strength": 0.6}
    settings |= {
        "lora": ["styles/ink.safetensors:0.8"],
        "controlnet": "nets/canny",
        "control_image": "edges.png",
    }
    settings |= {"control_scale": 0.5}
    path = image.save_numbered(Image.new("RGB", (8, 8)), tmp_path, settings)
    found = manager.parse(path)
    (sampler,) = found.samplers
    assert (
        sampler.name == "DPM++ 2M Karras"
        and sampler.parameters["seed"] == "3"
        and sampler.model.name == "shapes"
    )
    assert [p.value for p in sampler.prompts] == [f"{PROMPT} <lora:ink:0.8>"]
    assert [p.value for p in sampler.negative_prompts] == ["a heart"]
    assert found.metadata["Denoising strength"] == "0.6"
    text = Image.open(path).text["parameters"]
    assert 'ControlNet 0: "Module: none, Model: canny, Weight: 0.5"' in text
    quoted = image.parameters(settings | {"model": "x/my model, v2: final"}).splitlines()[-1]
    assert json.loads(quoted.rpartition("Model: ")[2]) == "my model, v2: final"


def bad(*args, says):
    return pytest.param(args, says, id=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        bad(says="a prompt is needed"),
        bad("x", "--height", "100", says="multiple of 8 from 8 to 16384, not 100; the nearest is 96"),
        bad("x", "--width", "0", says="--width must be a multiple of 8 from 8"),
        bad("x", "--steps", "-3", says="--steps must be from 1 to 1000, not -3"),
        bad("x", "--steps", "ten", says="invalid int value: 'ten'"),
        bad("x", "--sampler", "magic", says="invalid choice: 'magic'"),
        bad("x", "--guidance-scale", "nan", says="--guidance-scale must be from -1000 to 1000, not nan"),
        bad("x", "--seed", "-2", says="--seed must be from 0"),
        bad("x", "--seeds", "1-", says="--seeds takes numbers and ranges"),
        bad("x", "--seeds", "1-4", "--seed", "2", says="--seeds already says"),
        bad("x", "--num-images", "0", says="--num-images must be from 1"),
        bad("x", "--modle", "y", says="unrecognized arguments: --modle y; did you mean --model?"),
        bad("a", "red", "circle", says='put the prompt in quotes, such as "a red circle"'),
        bad("x", "--sampler", "eulr", says="did you mean euler?"),
        bad("x", "--model", "shape", says="did you mean shapes?"),
        bad("x", "--vae", "nosuch", says="there is no VAE nosuch"),
        bad("x", "--lora", "x.safetensors:0,8", says="decimal comma: write x.safetensors:0.8"),
        bad("x", "--lora", "<lora:x:0.8>", says="give the file, such as x.safetensors:0.8"),
        bad("x", "--model", "nosuch", says="there is no model 'nosuch'"),
        bad(PROMPT, "--excite", "--subjects", "cat", says="'cat' is not in the prompt"),
        bad(PROMPT, "--excite", "--token-indices", "3,99", says="token index 99 is outside the prompt"),
        bad(PROMPT, "--excite", "--token-indices", "3-9", says="--token-indices takes positions"),
        bad(PROMPT, "--excite", "--token-indices", "3", "--subjects", "circle", says="not both"),
        bad(PROMPT, "--subjects", "circle", says="--subjects and --token-indices are for"),
        bad("x", "--init-noise", "select", "--init-image", "y.png", says="leave out --init-image"),
        bad("x", "--candidates", "3", says="--candidates is for"),
        bad("x", "--init-noise", "select", "--candidates", "0", says="--candidates must be from 1"),
        bad("x", "--optimize-steps", "3", says="--optimize-steps is for --init-noise optimize"),
        bad("--layout", "nosuch.json", says="there is no layout nosuch.json"),
        bad("x", "--layout-preview", says="--layout-preview is for --layout"),
        bad("x", "--crop-margin", "0.25", says="--crop-margin is for --layout"),
        bad("x", "--lora", "nosuch.safetensors:0.5", says="there is no LoRA nosuch.safetensors"),
        bad("x", "--control-image", "y.png", says="--controlnet and --control-image go together"),
        bad(
            "x",
            "--controlnet",
            "nosuch",
            "--control-image",
            "tests/nosuch.png",
            says="there is no image tests/nosuch.png",
        ),
        bad("--invert", "nosuch.png", says="there is no image nosuch.png"),
        bad("--invert", "y.png", "--sampler", "euler", says="leave out --sampler euler"),
        bad("--invert", "y.png", "--seeds", "0-3", says="leave out --seeds"),
        bad("x", "--vae", "nosuch", says="nosuch"),
        bad("x", "--init-image", "nosuch.png", says="there is no image nosuch.png"),
        bad("x", "--init-image", __file__, says="is not an image that can be read"),
        bad("x", "--strength", "0.5", says="--strength is for --init-image"),
        bad("x", "--karras", says="--karras is for --sampler dpmpp_2m"),
        bad("x", "--attention", "magic", says="invalid choice: 'magic'"),
        bad("x", "--noise", "nosuch.safetensors", says="no noise file nosuch.safetensors"),
        bad("--like", "nosuch.png", says="no image nosuch.png"),
        bad("x", "--save-noise", "n.safetensors", says="--save-noise takes no value any more"),
        bad("x", "--save-noise=n", says="--save-noise takes no value any more"),
        bad("x", "--attention", "triton", "--device", "cpu", says="for a GPU"),
        bad("x", "--width", "999999992", says="from 8 to 16384"),
        pytest.param(
            ("x", "--device", "cuda"),
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, says, tmp_path, capfd):
    out = tmp_path / "out"
    try:
        code = main([*args, "--out", str(out)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    stdout, stderr = capfd.readouterr()
    assert code == 2 and stdout == ""
    assert stderr.startswith("minsd: error: ") and stderr.count("\n") == 1 and says in stderr
    assert not out.exists()


def test_out_that_cannot_be_written(tmp_path, capfd):
    assert main(["x", "--out", "o" * 300]) == 2
    assert "cannot be written to" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["x", "--out", str(tmp_path / "file" / "sub")]) == 2
    assert "--out" in capfd.readouterr().err


def test_bad_noise_and_pictures(tmp_path, capfd):
    save_file({"noise": torch.zeros(1, 4, 8, 8)}, tmp_path / "small.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"noise": torch.full((1, 4, 16, 16), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "small.safetensors").read_bytes()[:-9])
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in {
        "small": "(1, 4, 8, 8)",
        "other": "one tensor called noise",
        "nan": "not finite",
        "cut": "truncated",
    }.items():
        assert (
            main(["x", "--noise", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "out")]) == 2
        )
        assert says in capfd.readouterr().err
    for name, says in {"plain": "carries no minsd settings", "text": "not an image"}.items():
        assert main(["--like", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / "out")]) == 2
        assert says in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_image_to_image_and_like(tmp_path, made):
    picture = made / "00000-3.png"
    args = [
        PROMPT,
        *"--seed 1 --init-image".split(),
        str(picture),
        *"--strength 0.5 --steps 4 --sampler dpmpp_2m --karras".split(),
    ]
    assert main([*args, "--out", str(tmp_path), "--quiet"]) == 0
    row = lines(tmp_path)[0]
    assert (row["init_image"], row["strength"], row["karras"], row["unet_rows"]) == (
        str(picture),
        0.5,
        True,
        4,
    )
    again = ["--like", str(tmp_path / row["file"]), "--out", str(tmp_path), "--quiet"]
    assert main([*again, "--trust"]) == 0
    assert np.array_equal(pixels(tmp_path / "00001-1.png"), pixels(tmp_path / "00000-1.png"))


def test_initno_with_its_maps(tmp_path, capfd):
    args = [PROMPT, *"--seed 1 --steps 4 --init-noise initno --attention-maps --out".split(), str(tmp_path)]
    assert main(args) == 0
    assert "subjects: circle, square" in capfd.readouterr().err
    row = lines(tmp_path)[0]
    assert (
        row["init_noise"] == "initno"
        and row["excite"] == "official"
        and row["subjects"] == ["circle", "square"]
    )
    assert row["initno"].keys() == {"success", "rounds", "steps", "losses"} and row["unet_rows"] > 8
    assert [p.name for p in (tmp_path / "extra").iterdir()] == ["00000-1-attention.png"]
    assert main(["--like", str(tmp_path / row["file"]), "--out", str(tmp_path), "--quiet"]) == 0
    assert np.array_equal(pixels(tmp_path / "00001-1.png"), pixels(tmp_path / "00000-1.png"))


def test_excite_alone_and_left_out(tmp_path, capfd):
    steps = ["--seed", "1", "--steps", "4", "--out", str(tmp_path), "--quiet"]
    assert main([PROMPT, "--excite", "--token-indices", "3,7", "--save-noise", *steps]) == 0
    assert main([PROMPT, "--init-noise", "initno", "--no-excite", "--save-noise", *steps]) == 0
    saved = [tmp_path / "extra" / f"0000{k}-1-noise.safetensors" for k in range(2)]
    assert main([PROMPT, "--noise", str(saved[1]), *steps]) == 0  # what InitNO found, drawn plainly
    excited, left_out, plain = lines(tmp_path)
    assert (excited["excite"], excited["subjects"], left_out["excite"]) == ("attend-and-excite", [3, 7], None)
    assert np.array_equal(pixels(tmp_path / left_out["file"]), pixels(tmp_path / plain["file"]))
    assert main([PROMPT, "--noise", str(saved[0]), *steps[:-1]]) == 0
    note = "updates while denoising also shaped the images of 00000-1-noise.safetensors (attend-and-excite)"
    assert note in capfd.readouterr().err
    assert main([PROMPT, "--noise", str(saved[1]), *steps[:-1]]) == 0
    assert "updates while denoising" not in capfd.readouterr().err


def test_noise_files_of_every_kind_draw_the_same(made, tmp_path):
    own = noise([3, 5, 6], (4, 16, 16))
    np.save(tmp_path / "n.npy", own.numpy())
    np.save(tmp_path / "double.npy", own.double().numpy())
    torch.save(own, tmp_path / "n.pt")
    torch.save({"latents": own}, tmp_path / "dict.pt")
    save_file({"noise": own}, tmp_path / "n.safetensors")
    names = [tmp_path / name for name in ("n.npy", "double.npy", "n.pt", "dict.pt", "n.safetensors")]
    for path in [*names, made / "extra"]:
        out = tmp_path / f"out-{path.name}"
        args = [PROMPT, *"--seeds 3,5-6 --steps 3 --quiet --out".split(), str(out), "--noise", str(path)]
        assert main(args) == 0
        for row in lines(out):
            twin = next(made.glob(f"*-{row['seed']}.png"))
            assert np.array_equal(pixels(out / row["file"]), pixels(twin)), path
    np.save(tmp_path / "one.npy", own[0].numpy())  # (4, h, w)
    assert (
        main(
            [
                PROMPT,
                *"--seed 3 --steps 1 --quiet".split(),
                "--out",
                str(tmp_path / "o"),
                "--noise",
                str(names[0])[:-5] + "one.npy",
            ]
        )
        == 0
    )


def test_noise_files_that_are_refused(tmp_path, capfd):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a"]))
    torch.save([torch.zeros(1, 4, 16, 16)], tmp_path / "list.pt")
    torch.save(pathlib.PurePosixPath("x"), tmp_path / "object.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "objects.npy": "is not a NumPy file of numbers",
        "words.npy": "is not a NumPy file of numbers",
        "cut.npy": "is not a NumPy file of numbers",
        "list.pt": "holds a list; a noise file holds one tensor",
        "object.pt": "is not a PyTorch file that holds a tensor alone",
        "cut.pt": "is not a PyTorch file that holds a tensor alone",
        "empty": "holds no noise files",
    }.items():
        assert main(["x", "--noise", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2, name
        error = capfd.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_noise_is_saved_across_a_resume_and_by_every_process(tmp_path, monkeypatch):
    args = [PROMPT, *"--seeds 0-3 --steps 1 --quiet --save-noise --resume --out".split(), str(tmp_path)]
    assert main([*args[:2], "0-1", *args[3:]]) == 0
    assert main(args) == 0
    saved = sorted(path.name for path in (tmp_path / "extra").iterdir())
    assert saved == [f"{row['file'][:-4]}-noise.safetensors" for row in lines(tmp_path)] and len(saved) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert main([*args[:2], "0-5", *args[3:]]) == 0
    assert len(list((tmp_path / "extra").iterdir())) == len(lines(tmp_path)) == 6


def test_selections_of_different_seeds_share_no_candidate(tmp_path):
    how = [
        *"--steps 4 --init-noise select --score attention --candidates 5 --quiet --out".split(),
        str(tmp_path),
    ]
    assert main([PROMPT, "--seeds", "3-4", *how]) == 0
    rows = lines(tmp_path)
    for row, asked in zip(rows, (3, 4)):
        assert row["asked_seed"] == asked == row["candidates"][0]["seed"]
        assert row["seed"] == min(row["candidates"], key=lambda c: c["score"])["seed"]
        assert row["file"].endswith(f"-{asked}.png") and all(
            0 <= c["seed"] < 2**63 for c in row["candidates"]
        )
    seeds = [c["seed"] for row in rows for c in row["candidates"]]
    assert len(set(seeds)) == 10

    chosen = rows[0]["seed"]
    assert main([PROMPT, "--seed", str(chosen), "--steps", "4", "--out", str(tmp_path), "--quiet"]) == 0
    assert (
        np.abs(pixels(tmp_path / lines(tmp_path)[-1]["file"]) - pixels(tmp_path / rows[0]["file"])).max() <= 2
    )
    assert main([PROMPT, "--seed", "4", *how]) == 0  # alone as in a list
    assert lines(tmp_path)[-1]["candidates"] == rows[1]["candidates"]
    assert main([PROMPT, "--seeds", "3-4", *how, "--resume"]) == 0 and len(lines(tmp_path)) == 4
    assert main(["--like", str(tmp_path / rows[0]["file"]), "--out", str(tmp_path), "--quiet"]) == 0
    again = lines(tmp_path)[-1]
    assert (again["candidates"], again["asked_seed"]) == (rows[0]["candidates"], 3)


def test_selections_of_earlier_versions_are_resumed_and_repeated(tmp_path):
    """They chose among consecutive seeds, and named the file by the chosen one."""
    how = [
        *"--steps 2 --init-noise select --score attention --candidates 3 --quiet --out".split(),
        str(tmp_path),
    ]
    assert main([PROMPT, "--seed", "7", *how]) == 0
    (row,) = lines(tmp_path)
    old = {k: v for k, v in row.items() if k != "asked_seed"}
    old |= {"candidates": [{"seed": s, "score": 0.5} for s in (7, 8, 9)], "seed": 8, "file": "00000-8.png"}
    (tmp_path / row["file"]).unlink()
    (tmp_path / "runs.jsonl").unlink()
    (tmp_path / ".lock").unlink()
    settings = {k: v for k, v in old.items() if k not in ("file", "seconds", "unet_rows")}
    image.save_numbered(Image.new("RGB", (128, 128)), tmp_path, settings)
    (tmp_path / "runs.jsonl").write_text(json.dumps(old) + "\n")
    assert main([PROMPT, "--seed", "7", *how, "--resume"]) == 0 and len(lines(tmp_path)) == 1
    assert main(["--like", str(tmp_path / "00000-8.png"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    (again,) = lines(tmp_path / "again")
    assert [c["seed"] for c in again["candidates"]] == [7, 8, 9] and again["asked_seed"] == 7


def test_selection_by_stability_with_its_sheet(tmp_path):
    args = [
        PROMPT,
        *"--seed 3 --steps 4 --init-noise select --score stability --candidates 3 --out".split(),
        str(tmp_path),
        "--quiet",
    ]
    assert main(args) == 0
    (row,) = lines(tmp_path)
    assert (
        row["score"] == "stability"
        and row["seed"] == max(row["candidates"], key=lambda c: c["score"])["seed"]
    )
    assert row["unet_rows"] >= 3 * 30  # ten steps down under guidance, ten up without, for each of three
    assert [p.name for p in (tmp_path / "extra").iterdir()] == ["00000-3-candidates.png"]


def test_optimisation_by_stability(tmp_path):
    how = ["--init-noise", "optimize", "--optimize-steps", "2", "--optimize-mode", "detach"]
    assert main([PROMPT, "--seed", "3", "--steps", "2", *how, "--out", str(tmp_path), "--quiet"]) == 0
    (row,) = lines(tmp_path)
    assert row["optimize_mode"] == "detach" and row["stability"]["after"] != row["stability"]["before"]


def test_inversion_of_a_picture(made, tmp_path):
    picture = made / "00000-3.png"
    assert main(["--invert", str(picture), "--steps", "20", "--out", str(tmp_path), "--quiet"]) == 0
    (row,) = lines(tmp_path)
    assert row["psnr"] > 20 and row["unet_rows"] == 40
    noise_file = tmp_path / "extra" / "00000-0-noise.safetensors"
    again = [
        "",
        "--noise",
        str(noise_file),
        *"--guidance-scale 1 --steps 20 --seed 0 --out".split(),
        str(tmp_path),
        "--quiet",
    ]
    assert main(again) == 0
    assert np.abs(pixels(tmp_path / "00001-0.png") - pixels(tmp_path / "00000-0.png")).max() <= 2


def test_layout_and_its_preview(tmp_path, capfd):
    boxes = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue square", "box": [0.5, 0, 1, 1]},
    ]
    (tmp_path / "l.json").write_text(json.dumps({"prompt": PROMPT, "regions": boxes}))
    args = [
        "--layout",
        str(tmp_path / "l.json"),
        *"--seed 1 --steps 2 --out".split(),
        str(tmp_path / "o"),
        "--quiet",
    ]
    paper = [*args, "--layout-method", "paper"]
    assert main([*args, "--layout-preview"]) == 0
    assert [p.name for p in (tmp_path / "o").rglob("*.png")] == ["layout-0.png"]
    assert main(paper) == 0
    (row,) = lines(tmp_path / "o")
    # Two regions, the whole, and one shared unconditional half; then a look at each region.
    assert row["prompt"] == PROMPT and row["unet_rows"] == 2 * 4 + 2
    assert row["layout"]["regions"][1]["box"] == [0.5, 0, 1, 1]
    assert main(["--like", str(tmp_path / "o" / row["file"]), "--out", str(tmp_path / "o"), "--quiet"]) == 0
    assert np.array_equal(pixels(tmp_path / "o/00000-1.png"), pixels(tmp_path / "o/00001-1.png"))

    assert main([*args, "--crop-margin", "0.25"]) == 0
    cropped = lines(tmp_path / "o")[2]
    assert (
        cropped["crop_margin"] == 0.25
        and cropped["unet_rows"] == 6 + 4 + 2
        and cropped["file"] == "00002-1.png"
    )
    assert np.abs(pixels(tmp_path / "o/00002-1.png") - pixels(tmp_path / "o/00001-1.png")).max() > 2
    assert main(["--like", str(tmp_path / "o/00002-1.png"), "--out", str(tmp_path / "o"), "--quiet"]) == 0
    assert np.array_equal(pixels(tmp_path / "o/00002-1.png"), pixels(tmp_path / "o/00003-1.png"))
    assert main([*args, "--crop-margin", "-1"]) == 2
    capfd.readouterr()
    late = [arg for arg in args if arg != "--quiet"] + ["--crop-margin", "0.25"]
    for more, noted in ((["--steps", "2"], False), (["--steps", "1"], True)):
        assert (
            main([*late, *more]) == 0
            and ("crop_margin changes nothing here" in capfd.readouterr().err) == noted
        )


def test_a_layout_is_drawn_as_was_measured_best(tmp_path, capfd, monkeypatch):
    """By crops and chosen noise on the embedded model, unless an option says otherwise."""
    monkeypatch.chdir(tmp_path)
    boxes = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue square", "box": [0.5, 0, 1, 1]},
    ]
    (tmp_path / "l.json").write_text(json.dumps({"prompt": PROMPT, "regions": boxes}))
    args = ["--layout", "l.json", *"--seed 1 --steps 2 --out o".split()]
    args += ["--height", "64", "--width", "64"]
    assert requests.LAYOUT_CANDIDATES == 50  # as measured; here less
    monkeypatch.setattr(requests, "LAYOUT_CANDIDATES", 4)
    chosen = ["--init-noise", "select", "--candidates", "4", "--crop-margin", "0.25"]
    assert main([*args, "--layout-overlay"]) == 0
    told = capfd.readouterr().err
    assert main([*args, *chosen]) == 0 and main(["--like", "o/00000-1.png", "--out", "o"]) == 0
    assert main([*args, "--layout-method", "paper"]) == 0
    first, same, again, paper = lines(tmp_path / "o")
    for row in (same, again):
        assert np.array_equal(pixels(f"o/{row['file']}"), pixels(f"o/{first['file']}"))
        assert row["crop_margin"] == 0.25 and len(row["candidates"]) == 4
    assert "crop_margin" not in paper and "candidates" not in paper and paper["seed"] == 1
    regions = first["attention_in_regions"]
    assert "--layout-method paper" in told
    parts = " and ".join(f"{one['fraction']:.0%}" for one in regions)
    assert f"its regions hold {parts} of their captions' attention" in told
    assert [one["area"] for one in regions] == [0.5, 0.5]
    scores = {one["seed"]: one["score"] for one in first["candidates"]}  # the product of the fractions
    product = regions[0]["fraction"] * regions[1]["fraction"]
    assert product == pytest.approx(scores[first["seed"]], abs=2e-3)
    with Image.open("o/extra/00000-1-layout.png") as over:
        assert over.size == (640, 640)
        assert over.getpixel((0, 320)) == over.getpixel((319, 320)) == (0xD6, 0x27, 0x28)  # the outlines
        assert over.getpixel((320, 320)) == (0x1F, 0x77, 0xB4)
    low = {"attention_in_regions": [{"fraction": 0.2, "area": 0.5}, {"fraction": 0.6, "area": 0.5}]}
    assert run._about_regions(low).endswith("attention; warning: region 1 may lack the caption's object")
    assert run._about_regions({}) == ""
    capfd.readouterr()
    for more, says in (
        (["--layout-method", "paper", "--crop-margin", "0.25"], "leave out --crop-margin"),
        (["--layout-method", "crop"], "did you mean crops?"),
    ):
        assert main([*args, *more]) == 2 and says in capfd.readouterr().err
    assert main([PROMPT, "--layout-method", "crops"]) == 2 and "is for --layout" in capfd.readouterr().err
    assert main([PROMPT, "--layout-overlay"]) == 2 and "is for --layout" in capfd.readouterr().err


@pytest.mark.parametrize(
    "box", [[0.6, 0, 0.4, 1], [0, 0, 0.5, 1.5], [0, 0, 0.001, 1], [0, 0, 256, 64]], ids=str
)
def test_a_bad_box_is_one_line_with_its_file(tmp_path, capfd, box):
    """Whatever else there is to say, here which subjects were found."""
    (tmp_path / "l.json").write_text(
        json.dumps({"prompt": PROMPT, "regions": [{"prompt": "a red circle", "box": box}]})
    )
    assert (
        main(
            [
                "--layout",
                str(tmp_path / "l.json"),
                *"--seed 1 --steps 1 --excite --out".split(),
                str(tmp_path / "o"),
            ]
        )
        == 2
    )
    error = capfd.readouterr().err
    assert (
        error.startswith("minsd: error: ")
        and error.count("\n") == 1
        and "l.json: region 1" in error
        and not (tmp_path / "o").exists()
    )


def test_adapters_and_controlnet(tmp_path, made, capfd, monkeypatch):
    from minsd.config import MODELS
    from minsd.controlnet import ControlNet

    g, name = torch.Generator().manual_seed(0), "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {
        f"{name}.lora_A.weight": torch.randn(2, 160, generator=g),
        f"{name}.lora_B.weight": torch.randn(160, 2, generator=g),
    }
    save_file(halves, tmp_path / "style.safetensors")
    net = ControlNet(MODELS["shapes"].unet)
    save_file(
        {key: 0.05 * torch.randn(p.shape, generator=g) for key, p in net.state_dict().items()},
        tmp_path / "net.safetensors",
    )
    plain = [PROMPT, "--seed", "3", "--steps", "3", "--out", str(tmp_path), "--quiet"]
    control = [
        "--controlnet",
        str(tmp_path / "net.safetensors"),
        "--control-image",
        str(made / "00000-3.png"),
    ]
    nothing = [["--lora", f"{tmp_path / 'style.safetensors'}:0"], [*control, "--control-scale", "0"]]
    something = [["--lora", f"{tmp_path / 'style.safetensors'}:0.5"], [*control, "--control-scale", "0.5"]]
    for more in ([], *nothing, *something):
        assert main([*plain, *more]) == 0
    first, no_lora, no_control, lora, controlled = (pixels(tmp_path / row["file"]) for row in lines(tmp_path))
    assert np.array_equal(first, no_lora) and np.array_equal(first, no_control)
    assert np.abs(first - lora).max() > 2 and np.abs(first - controlled).max() > 2
    assert lines(tmp_path)[4]["control_scale"] == 0.5 and lines(tmp_path)[3]["lora"][0].endswith(":0.5")

    (tmp_path / "edges.png").write_bytes((made / "00001-5.png").read_bytes())
    halves = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue square", "box": [0.5, 0, 1, 1]},
    ]
    own = {
        "control": {"control_image": "edges.png", "control_scale": 0.5},
        "lora": {"lora": ["style.safetensors:0.5"]},
    }
    for name, more in (("plain", {}), *own.items(), ("both", own["control"] | own["lora"])):
        layout = {"prompt": PROMPT, "regions": [halves[0], halves[1] | more]}
        (tmp_path / f"{name}.json").write_text(json.dumps(layout))
        given = control[:2] if more.get("control_image") else []
        run = [
            "--layout",
            str(tmp_path / f"{name}.json"),
            *"--layout-method paper --seed 3 --steps 2 --out".split(),
            str(tmp_path / "o"),
            "--quiet",
        ]
        assert main([*run, *given]) == 0
    rows = lines(tmp_path / "o")
    # With something of its own no pass shares a half. Two more rows look at the regions.
    assert [row["unet_rows"] for row in rows] == [10, 14, 14, 14]
    plain, *others = (pixels(tmp_path / "o" / row["file"]) for row in rows)
    assert all(
        np.abs(a - b).max() > 2
        for a, b in ((plain, others[0]), (plain, others[1]), (others[0], others[2]), (others[1], others[2]))
    )
    region = rows[3]["layout"]["regions"][1]
    assert region["lora"] == [f"{tmp_path / 'style.safetensors'}:0.5"] and region["control_image"] == str(
        tmp_path / "edges.png"
    )
    again = ["--like", str(tmp_path / "o" / rows[3]["file"]), "--out", str(tmp_path / "o"), "--quiet"]
    assert main([*again, "--trust"]) == 0
    assert np.array_equal(pixels(tmp_path / "o" / lines(tmp_path / "o")[4]["file"]), others[2])
    monkeypatch.chdir(tmp_path)  # a relative path; and other runs of the network between the collage's
    assert (
        main([*"--layout lora.json --seed 3 --steps 2 --out o --quiet --excite --attention-maps".split()])
        == 0
    )
    (tmp_path / "none.json").write_text(json.dumps({"prompt": PROMPT, "regions": []}))
    select = [
        *"--init-noise select --score attention --candidates 2 --steps 2 --seed 3 --quiet --out o".split()
    ]
    assert main(["--layout", "none.json", *select]) == 0
    (tmp_path / "dumb.json").write_text(
        json.dumps({"prompt": PROMPT, "regions": [halves[0] | {"prompt": "and"}]})
    )
    capfd.readouterr()
    assert main(["--layout", "dumb.json", *select]) == 2 and "region 1: " in capfd.readouterr().err
    lost = ["--layout", str(tmp_path / "lora.json"), "--out", str(tmp_path / "o"), "--seed", "3"]
    for more, message in (
        (control[:2], "--controlnet needs a control image"),
        (["--compile"], "adapters by region"),
    ):
        assert main([*lost, *more]) == 2 and message in capfd.readouterr().err
    (tmp_path / "edges.png").write_text("no picture")
    assert main(["--layout", str(tmp_path / "both.json"), *control[:2], "--out", str(tmp_path / "o")]) == 2
    assert "edges.png is not an image" in capfd.readouterr().err
    (tmp_path / "style.safetensors").unlink()
    assert main(lost) == 2 and "there is no LoRA" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("keys", "options", "says"),
    [
        (
            [{}, {"control_image": "edges.png"}],
            [],
            "region 2 has a control_image: give --controlnet FOLDER, or remove the key",
        ),
        (
            [{"control_scale": 1.0}, {}],
            [],
            "region 1 has a control_scale: give --controlnet FOLDER, or remove the key",
        ),
        (
            [{}, {"control_image": "edges.png", "control_scale": 0}],
            [],
            "a control_scale: give --controlnet FOLDER, or remove the keys",
        ),
        ([{"control_scale": 0.5}, {}], ["--controlnet", "net"], "--controlnet needs a control image"),
        (
            [{"control_scale": 0.5}, {"control_image": "edges.png"}],
            ["--controlnet", "net"],
            "region 1 has a control_scale and no control image: give it a control_image, "
            "give --control-image FILE for all regions",
        ),
    ],
)
def test_what_a_region_asks_of_a_controlnet_is_not_passed_over(
    tmp_path, capfd, monkeypatch, keys, options, says
):
    monkeypatch.setattr("minsd.pipeline.load", None)  # told before
    boxes = [
        {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue square", "box": [0.5, 0, 1, 1]},
    ]
    (tmp_path / "l.json").write_text(
        json.dumps({"prompt": PROMPT, "regions": [box | more for box, more in zip(boxes, keys)]})
    )
    Image.new("L", (64, 64)).save(tmp_path / "edges.png")
    args = ["--layout", str(tmp_path / "l.json"), "--seed", "1", "--out", str(tmp_path / "o")]
    assert main([*args, *options]) == 2
    error = capfd.readouterr().err
    assert (
        error.startswith("minsd: error: ")
        and error.count("\n") == 1
        and says in error
        and not (tmp_path / "o").exists()
    )
    assert main([*args, "--layout-preview", "--quiet"]) == 0  # which takes no ControlNet


def test_pictures_of_layouts_that_ask_for_no_controlnet_can_be_made_again(tmp_path, capfd):
    """A published folder always contains control images. The settings of an image state every scale."""
    for name, caption in (("PALL", PROMPT), ("P000", "a red circle"), ("P001", "a blue square")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "self_caption.json").write_text(json.dumps(caption))
        Image.new("L", (128, 128), 255).save(tmp_path / name / "mask_image.png")
    Image.new("L", (128, 128)).save(tmp_path / "P001" / "canny_image.png")
    out = ["--steps", "1", "--out", str(tmp_path / "o")]
    assert (
        main(["--layout", str(tmp_path), "--layout-method", "paper", "--seed", "1", *out]) == 0
        and "are not used" in capfd.readouterr().err
    )
    assert main(["--like", str(tmp_path / "o" / "00000-1.png"), "--trust", *out]) == 0
    first, again = lines(tmp_path / "o")
    assert again["layout"] == first["layout"] and first["layout"]["regions"][0]["control_scale"] == 1.0
    assert np.array_equal(pixels(tmp_path / "o" / first["file"]), pixels(tmp_path / "o" / again["file"]))


def test_interrupt_keeps_what_is_done(tmp_path, capfd, monkeypatch):
    from minsd import pipeline

    decode, calls = pipeline.StableDiffusion.decode, []
    monkeypatch.setattr(pipeline.StableDiffusion, "batch_size", lambda *args: 1)

    def interrupted(self, latents):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(pipeline.StableDiffusion, "decode", interrupted)
    assert main(["x", "--seeds", "0-3", "--steps", "1", "--out", str(tmp_path), "--quiet"]) == 130
    assert "1 of 4 images are done" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".png" or p.suffix == ".tmp"] == [
        "00000-0.png"
    ] and len(lines(tmp_path)) == 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys, minsd.generate\n"
        "try: minsd.generate.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    import minsd

    root = minsd.__path__[-1] if len(minsd.__path__) > 1 else minsd.__path__[0] + "/.."
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and "--negative-prompt" in result.stdout, result.stderr
