"""Many pictures: prompts files, resuming, several processes, kills."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import minsd
from minsd import pipeline
from minsd.app import run as running
from minsd.generate import main


def rows(folder, name="runs.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def by_job(folder):
    return {(r["prompt"], r["seed"], r["steps"]): pixels(folder / r["file"]) for r in rows(folder)}


def test_prompts_of_a_text_file_share_batches(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("# shapes\na red circle\n\n  a blue square and a green star \n")
    sizes, denoise = [], pipeline.StableDiffusion.denoise
    monkeypatch.setattr(
        pipeline.StableDiffusion,
        "denoise",
        lambda self, p, x, **how: sizes.append(len(x)) or denoise(self, p, x, **how),
    )
    assert (
        main(
            [
                "--prompts",
                str(tmp_path / "p.txt"),
                *"--seeds 3-4 --steps 2 --out".split(),
                str(tmp_path / "o"),
                "--quiet",
            ]
        )
        == 0
    )
    assert [(r["prompt"], r["seed"]) for r in rows(tmp_path / "o")] == [
        ("a red circle", 3),
        ("a red circle", 4),
        ("a blue square and a green star", 3),
        ("a blue square and a green star", 4),
    ]
    assert sizes == [4]
    assert (
        main(
            [
                "a blue square and a green star",
                *"--seed 4 --steps 2 --out".split(),
                str(tmp_path / "one"),
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        np.abs(
            pixels(tmp_path / "one/00000-4.png")
            - by_job(tmp_path / "o")["a blue square and a green star", 4, 2]
        ).max()
        <= 2
    )


def test_objects_of_a_jsonl_file_have_options_of_their_own(tmp_path):
    lines = [
        {"prompt": "a red circle", "seed": 1, "num_images": 2},
        {"prompt": "a red circle", "seeds": [1, 7], "sampler": "euler", "steps": 2},
        {"prompt": "a star", "negative-prompt": "a heart", "guidance_scale": 3, "height": 64},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        main(
            [
                "--prompts",
                str(tmp_path / "p.jsonl"),
                *"--seed 5 --steps 1 --out".split(),
                str(tmp_path / "o"),
                "--quiet",
            ]
        )
        == 0
    )
    made = [
        tuple(r[k] for k in ("seed", "sampler", "steps", "guidance_scale", "height", "negative_prompt"))
        for r in rows(tmp_path / "o")
    ]
    assert made == [
        (1, "ddim", 1, 5.0, 128, ""),
        (2, "ddim", 1, 5.0, 128, ""),
        (1, "euler", 2, 5.0, 128, ""),
        (7, "euler", 2, 5.0, 128, ""),
        (5, "ddim", 1, 3, 64, "a heart"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "x"}\n{"prompt": "x",}', "line 2: not JSON: "),
        ('{"prompt": "x", "stepz": 3}', "line 1: unknown key 'stepz'"),
        ('{"prompt": "x", "steps": "3"}', "line 1: 'steps' must be a whole number, not \"3\""),
        ('{"prompt": "x", "karras": 1}', "'karras' must be true or false"),
        ('{"prompt": "x", "sampler": "magic"}', "'sampler' must be one of"),
        ('{"prompt": "x", "steps": 0}', "line 1: --steps must be from 1"),
        ('{"prompt": "x", "model": "y"}', "holds for the whole run"),
        ('["x"]', "must be an object"),
        ('{"seed": 1}', 'there is no "prompt"'),
        ("\n\n", "holds no prompts"),
        ('{"prompt": "x", "noise": "none.safetensors"}', "line 1: there is no noise file"),
        ('{"prompt": "x", "seed": 99999999999999999999}', "line 1: --seed must be from 0"),
        ('{"prompt": "\\ud800"}', "not text in UTF-8"),
        ('{"prompt": "x", "seed": 9223372036854775807, "num_images": 2}', "line 1: seeds go up to"),
        ("[" * 100_000, "too many"),
        ('{"prompt": "x", "width": 99999992}', "line 1: --width must be a multiple of 8 from 8 to 16384"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path, capfd, monkeypatch, content, says):
    monkeypatch.setattr(minsd.pipeline, "load", None)
    (tmp_path / "p.jsonl").write_text(content)
    assert main(["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o")]) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_other_bad_prompts_files(tmp_path, capfd):
    for args, says in (
        (["--prompts", str(tmp_path / "no.txt")], "there is no prompts file"),
        (["--prompts", "x.csv"], "takes a .txt"),
        (["x", "--prompts", "x.txt"], "not both"),
        (["x", "--resume"], "--resume needs --seed"),
        (["--prompts", str(tmp_path)], "takes a .txt"),
        (["--prompts", "x.txt", "--like", "x.png"], "leave out --prompts"),
    ):
        assert main(args) == 2 and says in capfd.readouterr().err


def test_what_a_sampler_does_not_take_is_told_by_line_before_anything_is_drawn(tmp_path, capfd):
    (tmp_path / "p.jsonl").write_text(
        '\ufeff{"prompt": "a red circle"}\n{"prompt": "a star", "sampler": "lcm", "steps": 60}'
    )
    assert main(["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o"), "--quiet"]) == 2
    error = capfd.readouterr().err
    assert (
        "p.jsonl, line 2: the lcm sampler takes 1 to 50 steps" in error
        and error.count("\n") == 1
        and not (tmp_path / "o").exists()
    )


@pytest.mark.parametrize("how", [[], ["--layout-preview"]], ids=str)
def test_a_layout_that_does_not_fit_is_told_by_line_before_anything_is_drawn(tmp_path, capfd, how):
    """Whether it does is known only with the size."""
    for name, right in (("good", 64), ("bad", 640)):
        boxes = [
            {"prompt": "a red circle", "box": [0, 0, 32, 64]},
            {"prompt": "a star", "box": [32, 0, right, 64]},
        ]
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"prompt": "a red circle and a star", "regions": boxes})
        )
    good, bad = (str(tmp_path / f"{name}.json") for name in ("good", "bad"))
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"layout": name, "excite": True}) for name in (good, bad))
    )
    args = ["--prompts", str(tmp_path / "p.jsonl"), *"--seed 1 --steps 1 --out".split(), str(tmp_path / "o")]
    assert main([*args, "--layout", good, *how] if how else args) == 2
    error = capfd.readouterr().err
    assert error.startswith(
        f"minsd: error: {tmp_path / 'p.jsonl'}, line 2: {bad}: region 2: the box [32, 0, 640, 64]"
    )
    assert error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_resume_makes_what_is_missing_and_nothing_else(tmp_path, capfd):
    args = [
        "a red circle",
        *"--seeds 0-5,3 --steps 1 --out".split(),
        str(tmp_path),
        "--resume",
    ]  # 3 is asked for twice
    assert main([*args, "--quiet"]) == 0
    first = {r["seed"]: r["file"] for r in rows(tmp_path)}
    kept = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / first[1]).unlink()  # a picture lost
    (tmp_path / "runs.jsonl").write_text(
        kept[0] + kept[1] + kept[2] + kept[4] + kept[5][:50]
    )  # 3's line lost, 5's torn
    (tmp_path / "tmpabc.tmp").write_bytes(b"half a picture")
    (tmp_path / "00099-9.png").write_bytes(b"not ours")
    assert main(args) == 0
    assert "1 of 6 images are still to be made" in capfd.readouterr().err
    good = list(running.recorded([tmp_path / "runs.jsonl"]))
    assert sorted(r["seed"] for r in good if (tmp_path / r["file"]).exists()) == [0, 1, 2, 3, 4, 5]
    assert {r["seed"]: r["file"] for r in good}.items() >= {k: v for k, v in first.items() if k != 1}.items()
    assert (
        main([*args[:-1], "--resume", "--guidance-scale", "2", "--quiet"]) == 0
    )  # other settings, other pictures
    assert len(list(running.recorded([tmp_path / "runs.jsonl"]))) == 7 + 6


def launch(processes, *args):
    root = minsd.__path__[-1] if len(minsd.__path__) > 1 else None  # of a checkout
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        *"--master-port=0 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m minsd.generate".split(),
        *args,
    ]
    return subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_all(pid):
    """torchrun's workers are leaders of sessions of their own: killed first, by their parent's number."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split()
    for each in (pid, *map(int, children)):
        os.kill(each, signal.SIGKILL)


def test_processes_killed_and_taken_up_again_make_each_picture_once(tmp_path):
    lines = [
        {"prompt": prompt, "steps": n}
        for n in range(6, 12)
        for prompt in ("a red circle", "a blue square and a green star")
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))  # six batches of six
    job = ["--prompts", str(tmp_path / "p.jsonl"), "--seeds", "0-2", "--quiet"]
    out = tmp_path / "o"
    process = launch(2, *job, "--out", str(out), "--resume")
    while process.poll() is None and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.05)
    kill_all(process.pid)
    process.wait()
    before = {p.name: p.read_bytes() for p in out.glob("*.png")}
    assert 3 <= len(before) < 36

    process = launch(2, *job, "--out", str(out), "--resume")
    assert process.wait() == 0, process.stderr.read().decode()
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert not list(out.glob("runs-*.jsonl"))
    many = by_job(out)
    assert len(many) == len(rows(out)) == len(list(out.glob("*.png"))) == 36

    assert main([*job, "--out", str(tmp_path / "one")]) == 0
    one = by_job(tmp_path / "one")
    assert one.keys() == many.keys() and all(np.abs(one[k] - many[k]).max() <= 2 for k in one)


def test_processes_split_the_work_whatever_fits_each(tmp_path, monkeypatch):
    args = ["a red circle", "--seeds", "0-10", "--steps", "1", "--quiet", "--out", str(tmp_path)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, size in ((0, 3), (1, 2)):  # GPUs with unequal free memory
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(pipeline.StableDiffusion, "batch_size", lambda self, h, w, size=size: size)
        assert main(args) == 0
    assert sorted(r["seed"] for r in rows(tmp_path)) == list(range(11))
    assert main(["a red circle", "--num-images", "2"]) == 2  # each would draw seeds of its own


def test_one_process_takes_up_what_several_left(tmp_path):
    args = ["a red circle", "--seeds", "0-3", "--steps", "1", "--quiet", "--resume", "--out", str(tmp_path)]
    assert main(args) == 0
    one, two, three, four = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").unlink()
    (tmp_path / "runs-0.jsonl").write_text(
        one + '{"file": ["a"]}\n{"file": "00000-0.png", "candidates": [1]}\n'
    )
    (tmp_path / "runs-3.jsonl").write_text(two + three + four[:40])
    assert main(args) == 0
    assert not list(tmp_path.glob("runs-*")) and [r["seed"] for r in rows(tmp_path)] == [0, 1, 2, 3]
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_merge_broken_off_leaves_everything_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "runs.jsonl").write_text('{"file": "a"}\n')
    (tmp_path / "runs-0.jsonl").write_text('{"file": "b"}\n')
    monkeypatch.setattr(os, "replace", lambda *names: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(OSError, match="No space"):
        running.merge(tmp_path, [tmp_path / "runs-0.jsonl"])
    assert rows(tmp_path) == [{"file": "a"}] and rows(tmp_path, "runs-0.jsonl") == [{"file": "b"}]
    assert not list(tmp_path.glob("*.tmp"))


def test_merging_again_changes_nothing(tmp_path):
    for name, files in (("runs.jsonl", "ab"), ("runs-0.jsonl", "bc"), ("runs-1.jsonl", "d")):
        seconds = 1.0 if name == "runs.jsonl" else None
        (tmp_path / name).write_text(
            "".join(json.dumps({"file": f, "seconds": seconds}) + "\n" for f in files)
        )
    for _ in range(2):
        running.merge(tmp_path, [tmp_path / "runs-0.jsonl", tmp_path / "runs-1.jsonl"])
        assert [(r["file"], r["seconds"]) for r in rows(tmp_path)] == [
            ("a", 1.0),
            ("b", 1.0),
            ("c", None),
            ("d", None),
        ]
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "runs.jsonl"]
