"""Nothing lost and nobody let in: damaged folders, images that fail, several runs, images of strangers.

Every test of a folder goes through the command line, and ends with what lies on the disk.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import minsd
from minsd import config, files, image, pipeline
from minsd.app import folder as folders
from minsd.app import options, run, seeds
from minsd.app.jobs import Jobs, Piece, _unique
from minsd.generate import main
from minsd.noise import initial, losses

SIZE = ["--steps", "1", "--height", "64", "--width", "64"]
ROOT = minsd.__path__[-1] if len(minsd.__path__) > 1 else None  # of a checkout


def draw(out, *args, prompt="a red circle"):
    """Draw small images to a folder; the exit code."""
    return main([*([] if prompt is None else [prompt]), *map(str, args), *SIZE, "--out", str(out)])


def rows(folder, name="runs.jsonl"):
    return [json.loads(line) for line in (folder / name).read_bytes().split(b"\n") if line]


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def true_rows(folder):
    """(prompt, seed) of each row that is true of the image it names."""
    found = []
    for row in rows(folder):
        if (folder / row["file"]).exists():
            settings = image.verified(folder / row["file"], whole=True)
            if (settings["prompt"], settings["seed"]) == (row["prompt"], row["seed"]):
                found.append((row["prompt"], row["seed"]))
    return found


def png(path, settings, size=(8, 8)):
    """An image with these settings inside."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("minsd", settings if isinstance(settings, str) else json.dumps(settings))
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def python(code, **environment):
    """A Python program beside this one."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


# --- a row means an image ---------------------------------------------------------------------------------


def test_a_name_used_again_is_the_image_that_has_it(tmp_path, capfd, monkeypatch):
    assert draw(tmp_path, "--seed", 0) == 0
    (tmp_path / "00000-0.png").unlink()
    assert draw(tmp_path, "--seed", 0, prompt="a blue square") == 0  # takes the name again
    assert names(tmp_path) == ["00000-0.png"] and len(rows(tmp_path)) == 2
    assert draw(tmp_path, "--seed", 0, "--resume", prompt="a blue square") == 0
    assert "0 of 1 images are still to be made" in capfd.readouterr().err and len(names(tmp_path)) == 1
    assert draw(tmp_path, "--seed", 0, "--resume") == 0
    assert "1 of 1 images are still to be made" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(tmp_path, "--seeds", "0-1", "--resume") == 0  # ends with a merge
    assert [(r["file"], r["prompt"]) for r in rows(tmp_path)] == [
        ("00000-0.png", "a blue square"),
        ("00001-0.png", "a red circle"),
    ]


@pytest.mark.parametrize("newer", ["runs.jsonl", "runs-1.jsonl"])
def test_of_rows_of_one_name_that_of_the_image_there_wins_wherever_it_stands(tmp_path, newer):
    assert draw(tmp_path, "--seed", 0) == 0
    (row,) = rows(tmp_path)
    other = {**row, "prompt": "another"}
    older = ({"runs.jsonl", "runs-1.jsonl"} - {newer}).pop()
    (tmp_path / older).write_text(json.dumps(other) + "\n")
    (tmp_path / newer).write_text(json.dumps(row) + "\n")
    folders.merge(tmp_path, [tmp_path / "runs-1.jsonl"])
    assert rows(tmp_path) == [row]
    (tmp_path / row["file"]).unlink()  # nothing decides: the last row
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (other, row, other)))
    folders.merge(tmp_path, [])
    assert rows(tmp_path) == [other]


def test_rows_end_at_line_feeds_alone(tmp_path, monkeypatch):
    marks = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]
    prompts = [f"a red circle{mark}and a star" for mark in marks]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    out = tmp_path / "o"
    for _ in range(2):
        assert draw(out, "--prompts", tmp_path / "p.jsonl", "--seed", 0, "--resume", prompt=None) == 0
        assert [row["prompt"] for row in rows(out)] == prompts
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(out, "--prompts", tmp_path / "p.jsonl", "--seed", 0, "--resume", prompt=None) == 0
    assert [row["prompt"] for row in rows(out)] == prompts and len(names(out)) == len(marks)


def cut(share):
    return lambda path, data: path.write_bytes(data[: int(share * len(data))])


def zeros(begin, end):
    def damage(path, data):
        a, b = int(begin * len(data)), int(end * len(data))
        path.write_bytes(data[:a] + bytes(b - a) + data[b:])

    return damage


def other_file(make):
    """The file is removed, and another put in its place."""

    def damage(path, data):
        path.unlink()
        make(path)

    return damage


def with_settings(**changed):
    def damage(path, data):
        settings = json.loads(Image.open(path).text["minsd"])
        png(path, settings | changed, (64, 64))

    return damage


BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0\0\0\0\0"

DAMAGE = {
    "empty": cut(0),
    "8 bytes": lambda path, data: path.write_bytes(data[:8]),
    "third": cut(0.3),
    "half": cut(0.5),
    "last byte": lambda path, data: path.write_bytes(data[:-1]),
    "no end": lambda path, data: path.write_bytes(data[:-12]),
    "zeros at the end": zeros(0.8, 1),
    "zeros in the middle": zeros(0.5, 0.6),
    "all zeros": zeros(0, 1),
    "foreign": other_file(lambda path: Image.new("RGB", (64, 64)).save(path)),
    "jpeg": other_file(lambda path: Image.new("RGB", (64, 64)).save(path, "JPEG")),
    "text": other_file(lambda path: path.write_text("no image")),
    "folder": other_file(lambda path: path.mkdir()),
    "pipe": other_file(os.mkfifo),
    "dangling link": other_file(lambda path: path.symlink_to("nowhere")),
    "link to itself": other_file(lambda path: path.symlink_to(path.name)),
    "bomb": lambda path, data: path.write_bytes(BOMB),
    "nested": other_file(lambda path: png(path, "[" * 100_000, (64, 64))),
    "digits": other_file(lambda path: png(path, '{"seed": ' + "9" * 5000 + "}", (64, 64))),
    "no object": other_file(lambda path: png(path, "[1]", (64, 64))),
    "another size": with_settings(width=128),
    "another image": with_settings(seed=99),
    "odd settings": with_settings(candidates=[1]),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of three images, for tests that copy it."""
    out = tmp_path_factory.mktemp("three")
    assert draw(out, "--seeds", "0-2", "--quiet") == 0
    return out


@pytest.mark.parametrize("row", [True, False], ids=["row", "no row"])
@pytest.mark.parametrize("name", DAMAGE)
def test_only_a_complete_image_counts_as_done(tmp_path, three, name, row):
    out = tmp_path / "o"
    shutil.copytree(three, out)
    wanted = {r["seed"]: folders.key_of(r) for r in rows(out)}
    path = out / "00001-1.png"
    DAMAGE[name](path, path.read_bytes())
    if not row:
        kept = [json.dumps(r) + "\n" for r in rows(out) if r["seed"] != 1]
        (out / "runs.jsonl").write_text("".join(kept))
    notes = []
    given_back = []
    done = folders.done(out, given_back.append, notes.append)
    assert {wanted[0], wanted[2]} <= done and wanted[1] not in done
    if name == "another image":
        assert [r["seed"] for r in given_back] == [99] and not notes
    else:
        assert notes == ["00001-1.png is no complete image of minsd's: ignored"] and not given_back


def test_damaged_images_are_drawn_again_once(tmp_path, capfd, monkeypatch):
    last = len(DAMAGE)  # of the images, the last is left as it is
    assert draw(tmp_path, "--seeds", f"0-{last}", "--quiet") == 0
    for seed, damage in enumerate(DAMAGE.values()):
        path = tmp_path / f"{seed:05d}-{seed}.png"
        damage(path, path.read_bytes())
    capfd.readouterr()
    assert draw(tmp_path, "--seeds", f"0-{last}", "--resume") == 0
    error = capfd.readouterr().err
    assert f"{last} of {last + 1} images are still to be made" in error and "Traceback" not in error
    assert "00000-0.png, 00001-1.png, 00002-2.png and" in error
    for seed in range(last):
        assert image.verified(tmp_path / f"{last + 1 + seed:05d}-{seed}.png", whole=True)["seed"] == seed
    monkeypatch.setattr(run, "draw", None)  # nothing is drawn any more
    assert draw(tmp_path, "--seeds", f"0-{last}", "--resume") == 0


def test_large_images_are_checked_at_both_ends(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    settings = {"prompt": "x", "negative_prompt": "", "seed": 1, "steps": 1, "sampler": "ddim", "model": "m"}
    settings |= {"guidance_scale": 1.0, "width": 512, "height": 512}
    path = image.save_numbered(Image.fromarray(noise), tmp_path, settings)
    data = path.read_bytes()
    assert len(data) > image.SMALL and image.verified(path) == settings
    for damaged in (data[:-1], data[: len(data) // 2], data[:-5000] + bytes(5000), data[:90_000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a complete PNG"):
            image.verified(path)


def test_broken_rows_cost_themselves_and_are_named(tmp_path, capfd):
    assert draw(tmp_path, "--seeds", "0-2", "--quiet") == 0
    first, second, third = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    broken = [
        b"[" * 100_000,
        b'{"file": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"file": "\\ud800.png", "prompt": "\\udfff"}',
        b'{"file": "caf\xe9.png"}',
        b'{"file": ["a"]}',
        b'{"file": "00000-0.png", "candidates": [1]}',
        b'{"file": "../../../../etc/passwd", "seed": {}}',
        b"null",
        b"\0" * 100,
        b'{"a": ' * 100 + b"1" + b"}" * 100,
    ]
    (tmp_path / "runs.jsonl").write_bytes(
        b"\xef\xbb\xbf" + first + b"\n".join(broken) + b"\n" + third + second[:40]
    )
    (tmp_path / "runs-7.jsonl").mkdir()
    (tmp_path / "runs-8.jsonl").symlink_to("runs-8.jsonl")
    assert draw(tmp_path, "--seeds", "0-2", "--resume") == 0
    error = capfd.readouterr().err
    assert "0 of 3 images are still to be made" in error and "Traceback" not in error
    assert "line 2 of runs.jsonl, line 3 of runs.jsonl" in error and "more are no rows: ignored" in error
    again = list(folders.recorded([tmp_path / "runs.jsonl"]))
    assert sum(row.get("seed") == 1 for row in again) == 1  # given back


@pytest.mark.parametrize("name", [".lock", ".runs.lock"])
@pytest.mark.parametrize("kind", ["garbage", "link", "dangling", "folder", "pipe"])
def test_a_lock_of_any_kind_costs_no_image_and_no_file(tmp_path, capfd, name, kind):
    precious = tmp_path / "precious"
    precious.write_text("precious\n" * 99)
    out = tmp_path / "o"
    out.mkdir()
    path = out / name
    if kind == "garbage":
        path.write_bytes(b"\xff\xfe" + os.urandom(99))
    elif kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "new")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    for seed in (0, 1):
        assert draw(out, "--seeds", f"0-{seed}", "--resume") == 0
    error = capfd.readouterr().err
    assert names(out) == ["00000-0.png", "00001-1.png"] and "Traceback" not in error
    assert precious.read_text() == "precious\n" * 99 and not (tmp_path / "new").exists()
    assert (name in error) == (kind in ("link", "dangling", "folder", "pipe"))


def test_rows_are_written_through_no_link(tmp_path, capfd):
    (tmp_path / "precious").write_text("mine\n")
    out = tmp_path / "o"
    out.mkdir()
    (out / "runs.jsonl").symlink_to(tmp_path / "precious")
    assert draw(out, "--seed", 0) == 0
    assert (tmp_path / "precious").read_text() == "mine\n" and len(rows(out)) == 1
    assert "runs.jsonl was a symbolic link" in capfd.readouterr().err


def test_a_rows_file_that_cannot_be_written_costs_no_image(tmp_path, capfd):
    (tmp_path / "runs.jsonl").mkdir()
    assert draw(tmp_path, "--seeds", "0-1") == 0
    assert len(names(tmp_path)) == 2 and "runs.jsonl cannot be written to" in capfd.readouterr().err


def test_the_disk_has_an_image_before_its_name_and_its_row(tmp_path, monkeypatch):
    done = []
    synced, linked, appended = os.fsync, os.link, folders.append
    paths = {}

    def fsync(handle):
        done.append(("sync", os.fstat(handle).st_ino))
        synced(handle)

    def link(old, new):
        paths[os.path.basename(new)] = os.stat(old).st_ino
        done.append(("name", os.stat(old).st_ino))
        linked(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(
        run, "append", lambda path, row: done.append(("row", paths[row["file"]])) or appended(path, row)
    )
    assert draw(tmp_path, "--seeds", "0-2") == 0
    for file in paths.values():
        assert [what for what, which in done if which == file] == ["sync", "name", "row"]


def test_numbering_stays_among_the_names_of_images(tmp_path):
    for name in ("999999999999999-0.png", "9999999999999999999-0.png", "00041-7.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".lock").write_text("999999999999999-0.png")
    assert draw(tmp_path, "--seed", 1) == draw(tmp_path, "--seed", 2) == 0
    assert {"00042-1.png", "00043-2.png"} <= set(names(tmp_path))


def test_no_image_is_replaced_where_nothing_locks(tmp_path, monkeypatch):
    """Two processes that cannot lock choose the same number."""
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    monkeypatch.setattr(image, "number", lambda name: -1)
    for seed in (3, 3):
        assert draw(tmp_path, "--seed", seed) == 0
    assert names(tmp_path) == ["00000-3.png", "00001-3.png"]


def test_temporary_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path, capfd):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom minsd import files\n"
        "with files.temporary(Path(sys.argv[1] if len(sys.argv) > 1 else '.')) as file:\n"
        "    print(file.name, flush=True); time.sleep(60)"
    )
    (tmp_path / "extra").mkdir()
    living, dead, dead_extra = (
        python(f"import sys; sys.argv = ['', {str(where)!r}]\n{code}")
        for where in (tmp_path, tmp_path, tmp_path / "extra")
    )
    kept, removed, removed_extra = (Path(p.stdout.readline().strip()) for p in (living, dead, dead_extra))
    for process in (dead, dead_extra):
        process.kill()
        process.wait()
    assert removed.exists() and removed_extra.exists()
    elsewhere = tmp_path / "minsd-another.machine-1-00000000.tmp"
    theirs = tmp_path / "mine.tmp"
    for path in (elsewhere, theirs):
        path.write_text("")
    try:
        assert draw(tmp_path, "--seed", 0) == 0
        assert kept.exists() and elsewhere.exists() and theirs.exists()
        assert not removed.exists() and not removed_extra.exists()
        assert "removed 1 temporary files" in capfd.readouterr().err
        os.utime(kept, (0, 0))
        os.utime(elsewhere, (0, 0))
        assert draw(tmp_path, "--seed", 0) == 0
        assert kept.exists() and not elsewhere.exists()
    finally:
        living.kill()
        living.wait()


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_the_umask_is_kept(tmp_path, monkeypatch, mask):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = os.umask(mask)
    try:
        assert draw(tmp_path / "o", "--seeds", "0-1", "--save-noise") == 0
    finally:
        os.umask(before)
    found = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert len(found) >= 5  # image, noise, rows, locks
    assert {path.stat().st_mode & 0o777 for path in found} == {0o666 & ~mask}


HOLD = (
    "import time\nfrom pathlib import Path\nfrom minsd.app.hold import Hold\n"
    "hold = Hold(Path({out!r}), {resume}, False, print)\nhold.take()\n"
    "print('held', flush=True)\ntime.sleep({seconds})"
)


def test_of_two_runs_that_resume_the_second_says_who_works_there(tmp_path, capfd):
    assert draw(tmp_path, "--seed", 0) == 0
    first = python(HOLD.format(out=str(tmp_path), resume=True, seconds=60))
    try:
        assert first.stdout.readline() == "held\n"
        assert draw(tmp_path, "--seeds", "0-1", "--resume") == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert f"process {first.pid} on {files.HOST}, since 2" in error and "--wait" in error
        assert draw(tmp_path, "--seed", 1) == 0  # without --resume a folder may be shared
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert draw(tmp_path, "--seeds", "0-1", "--resume") == 0  # a kill ends the hold
    assert len(names(tmp_path)) == 2


def test_a_run_can_wait_for_the_other(tmp_path, capfd):
    tmp_path.joinpath("o").mkdir()
    first = python(HOLD.format(out=str(tmp_path / "o"), resume=True, seconds=4))
    assert first.stdout.readline() == "held\n"
    begin = time.monotonic()
    assert draw(tmp_path / "o", "--seed", 0, "--resume", "--wait") == 0
    assert time.monotonic() - begin > 1 and first.wait() == 0
    assert "waiting for the run that works on" in capfd.readouterr().err
    assert draw(tmp_path / "o", "--seed", 0, "--wait") == 2
    assert "--wait is for --resume" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("other", "free"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # a process of the same run
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),  # the same process again: another run
        ({"RANK": "0", "WORLD_SIZE": "3"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
    ],
)
def test_the_processes_of_one_run_count_as_one(tmp_path, monkeypatch, capfd, other, free):
    first = python(HOLD.format(out=str(tmp_path), resume=True, seconds=60), **other)
    try:
        assert first.stdout.readline() == "held\n"
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert draw(tmp_path, "--seeds", "0-1", "--resume") == (0 if free else 2)
        assert free or "rank 1 of 2: another run with --resume works on" in capfd.readouterr().err
    finally:
        first.kill()
        first.wait()


# --- one bad image stops nothing --------------------------------------------------------------------------


def overflowing(path, shape=(4, 8, 8), bad=(1,), count=3):
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    noise[list(bad)] = 3e38
    save_file({"noise": noise}, path)
    return path


def test_an_image_that_is_not_finite_costs_itself_alone(tmp_path, capfd):
    noise = overflowing(tmp_path / "n.safetensors")
    lines = [
        {"prompt": "a", "seed": 0},
        {"prompt": "b", "seed": 5, "noise": str(noise)},
        {"prompt": "c", "seed": 0},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "o"
    for _ in range(2):
        assert draw(out, "--prompts", tmp_path / "p.jsonl", "--resume", prompt=None) == 1
        error = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert len(error) == 2 and "p.jsonl, line 2: seed 6 of 'b' is not drawn" in error[0]
        assert "not finite" in error[0] and "--dtype" not in error[0]  # float32: no other dtype helps
        assert " images are not drawn" in error[1]
        assert sorted((r["prompt"], r["seed"]) for r in rows(out)) == [("a", 0), ("b", 5), ("b", 7), ("c", 0)]


def test_advice_names_a_dtype_where_one_helps():
    assert "--dtype float32" in config.overflow_advice(torch.float16)
    assert not any("--dtype" in config.overflow_advice(dtype) for dtype in (torch.float32, torch.bfloat16))
    sd = minsd.load("shapes", device="cpu")
    with pytest.raises(FloatingPointError, match="its latents reach"):
        sd.decode(torch.full((1, 4, 8, 8), 3e38))


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x")])
def test_whatever_stops_one_image_the_others_are_drawn(tmp_path, capfd, monkeypatch, error):
    sample = run.draw

    def failing(session, jobs, *rest):
        if any(job.seed == 2 for job in jobs):
            raise error
        return sample(session, jobs, *rest)

    monkeypatch.setattr(run, "draw", failing)
    assert draw(tmp_path, "--seeds", "0-3", "--json") == 1
    out, err = capfd.readouterr()
    assert [json.loads(line)["seed"] for line in out.splitlines()] == [0, 1, 3]
    assert "seed 2 of 'a red circle' is not drawn: " in err and "1 of 4 images are not drawn" in err
    assert draw(tmp_path, "--seed", 2) == (2 if isinstance(error, ValueError) else 1)
    assert capfd.readouterr().err.count("error: ") == 1  # a single image, a single line
    with pytest.raises(type(error)):
        draw(tmp_path, "--seeds", "0-3", "--debug")
    monkeypatch.setattr(run, "draw", sample)
    assert draw(tmp_path, "--seeds", "0-3", "--resume") == 0
    assert sorted(row["seed"] for row in rows(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError("CUDA error: misaligned address")]
)
def test_what_would_meet_every_image_ends_the_run(tmp_path, capfd, monkeypatch, error):
    monkeypatch.setattr(run, "draw", lambda *args: exec("raise error", {"error": error}))
    assert draw(tmp_path, "--seeds", "0-3") == 1
    assert "0 of 4 images are done" in capfd.readouterr().err


def test_an_image_that_cannot_be_saved_costs_itself_alone(tmp_path, capfd, monkeypatch):
    written = image.written

    def failing(picture, folder, settings):
        if settings["seed"] == 1:
            raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")
        return written(picture, folder, settings)

    monkeypatch.setattr(image, "written", failing)
    assert draw(tmp_path, "--seeds", "0-2") == 1
    assert names(tmp_path) == ["00000-0.png", "00001-2.png"] and not list(tmp_path.glob("*.tmp"))
    assert "seed 1 of" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are not UTF-8")
def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (64, 64), "red").save(name)
    out = Path(os.fsdecode(b"out\xe9"))
    more = ["--init-image", name, "--strength", "1", "--save-noise"]
    for _ in range(2):
        assert draw(out, "--seed", 0, *more, "--resume") == 0
    (row,) = rows(out)
    assert row["init_image"] == name and image.read_settings(out / row["file"])["init_image"] == name
    assert draw("again", "--like", out / row["file"], "--trust", prompt=None) == 0


@pytest.mark.parametrize(
    ("how", "size"),
    [(["--attention-maps"], (8, 64)), (["--excite"], (64, 8)), (["--init-noise", "initno"], (8, 8))],
    ids=str,
)
def test_maps_one_cell_wide(tmp_path, how, size):
    prompt = "a red circle and a blue square"
    sides = ["--height", str(size[0]), "--width", str(size[1])]
    assert main([prompt, *how, "--seed", "1", "--steps", "1", *sides, "--out", str(tmp_path), "--quiet"]) == 0


def test_a_single_cell_is_smoothed_to_itself():
    maps = torch.rand(2, 1, 1)
    assert torch.allclose(losses.smooth(maps), maps)
    row = torch.rand(2, 1, 7)
    assert torch.allclose(losses.smooth(row), losses.smooth(row.expand(2, 3, 7))[:, :1])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_narrow_standard_output(tmp_path, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    prompt = "円 \u2028 ž \x9b31m"
    assert draw(tmp_path, "--seeds", "0-3", "--json", prompt=prompt) == 0
    assert [json.loads(line)["prompt"] for line in raw.getvalue().decode("ascii").splitlines()] == [
        prompt
    ] * 4
    assert draw(tmp_path, "--list-tokens", prompt="円") == 0


# --- processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "1"}, "RANK is 1 in the environment without WORLD_SIZE"),
        ({"RANK": "0"}, "RANK is 0 in the environment without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment without RANK"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 and WORLD_SIZE 2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "ranks count from 0"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x' in the environment"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK is '1.0'"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
    ],
    ids=str,
)
def test_wrong_ranks_are_one_line(tmp_path, capfd, monkeypatch, environment, says):
    monkeypatch.setattr(pipeline, "load", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert draw(tmp_path / "o", "--seeds", "0-1") == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_every_failing_rank_says_so(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert draw(tmp_path, "--seeds", "0-2", "--model", "/nonexistent/x") == 2
        error = capfd.readouterr().err
        assert (
            error.startswith(f"minsd: error: rank {rank} of 3: there is no model") and error.count("\n") == 1
        )


def test_a_rank_with_a_failed_image_ends_after_the_others(tmp_path, capfd, monkeypatch):
    """Its exit code makes torchrun end all others."""
    (tmp_path / "o").mkdir()
    other = python(HOLD.format(out=str(tmp_path / "o"), resume=False, seconds=4), RANK="1", WORLD_SIZE="2")
    assert other.stdout.readline() == "held\n"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run, "draw", lambda *args: exec("raise FloatingPointError"))
    assert draw(tmp_path / "o", "--seeds", "0-1") == 1
    assert other.poll() is not None or other.wait(2) == 0
    assert "rank 0 of 2: 1 of 1 images are not drawn" in capfd.readouterr().err


def test_tiny_images_do_not_go_by_thousands_to_a_batch():
    sd = minsd.load("shapes", device="cpu")
    assert sd.batch_size(8, 8) == sd.batch_size(8, 16) == pipeline.BATCH_MOST == 256
    assert sd.batch_size(128, 128) == 16 and sd.batch_size(1024, 1024) == 1


# --- images of strangers ----------------------------------------------------------------------------------


def like(path, *args, out="o"):
    return main(["--like", str(path), "--out", str(path.parent / out), *args])


WRONG = [
    5,
    -1,
    10**30,
    0.5,
    "x",
    "\ud800",
    "a\x1b[31mb",
    [],
    ["x"],
    [[1]],
    {},
    {"x": {}},
    True,
    float("nan"),
    1e308,
]


@pytest.mark.parametrize("name", [n for n, o in options.OPTIONS.items() if o.like or o.like_method])
def test_settings_of_wrong_type_or_value_are_one_line(tmp_path, capfd, monkeypatch, name):
    """Either an error before anything is loaded, or the model's turn comes."""

    def loaded(*args, **more):
        raise FileNotFoundError("LOADING")

    monkeypatch.setattr("minsd.app.session.load", loaded)
    option = options.OPTIONS[name]
    for value in [*WRONG, None]:
        settings = {"prompt": "a star", "seed": 0, "init_noise": "random", "steps": 1}
        png(tmp_path / "x.png", settings | {name: value})
        assert like(tmp_path / "x.png") == 2, value
        error = capfd.readouterr().err.splitlines()[-1]
        assert "Traceback" not in error and error.isprintable()
        right = value is None or option.takes(value) or option.repeated or name == "layout"
        assert right or ("x.png: " in error and name.replace("_", "-") in error.replace("_", "-")), (
            value,
            error,
        )
        assert right or "LOADING" not in error


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": [1]},
        {"candidates": []},
        {"candidates": {"seed": 1}},
        {"candidates": [{"seed": "1"}]},
        {"candidates": [{"seed": 2**70}]},
        {"candidates": "5"},
        {"candidates": 0},
        {"init_noise": "select", "score": 5},
        {"init_noise": {}},
        {"init_noise": "nosuch"},
        {"excite": 5},
        {"excite": ["official"]},
        {"subjects": 5, "init_noise": "initno"},
        {"subjects": [{"a": 1}], "init_noise": "initno"},
        {"layout": []},
        {"layout": {"prompt": 5}},
        {"layout": {"prompt": "x", "regions": {"a": 1}}},
        {"lora": [["a", {}]]},
        {"lora": "a"},
        {"lora": [5]},
        {"height": 100},
    ],
    ids=str,
)
def test_settings_of_wrong_shape_are_one_line(tmp_path, capfd, monkeypatch, settings):
    monkeypatch.setattr(pipeline, "load", None)
    base = {"prompt": "a star", "seed": 0, "init_noise": "select"}
    assert like(png(tmp_path / "x.png", base | settings)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("minsd: error: ")


@pytest.mark.parametrize(
    "settings", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000, "[]", "null", "{"]
)
def test_metadata_that_is_no_settings(tmp_path, capfd, settings):
    path = png(tmp_path / "x.png", settings)
    assert like(path) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"minsd: error: {path} carries no minsd settings") and error.count("\n") == 1


def test_an_image_loads_nothing_from_the_hub_or_elsewhere_unless_trusted(tmp_path, capfd, monkeypatch):
    asked = []

    def load(model, *args, **files):
        asked.append(model)
        raise FileNotFoundError("LOADING")

    monkeypatch.setattr("minsd.app.session.load", load)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("L", (64, 64), 255).save(elsewhere / "i.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("L", (64, 64), 255).save(folder / "i.png")
    (folder / "link.png").symlink_to(elsewhere / "i.png")
    (folder / "l.json").write_text(json.dumps({"prompt": "x", "regions": []}))
    region = {"prompt": "x", "mask": str(elsewhere / "i.png")}
    outside = str(elsewhere / "i.png")
    cases = {
        "model": ["stranger/beacon", "sd15", str(elsewhere), "/nonexistent/x", "../elsewhere"],
        "vae": [outside, str(folder / "link.png"), str(folder / ".." / "elsewhere" / "i.png")],
        "tokenizer": [str(elsewhere)],
        "init_image": [outside, "/dev/zero"],
        "invert": [outside],
        "layout": [str(folder / "l.json"), outside, {"prompt": "x", "regions": [region]}],
        "lora": [[outside], [f"{outside}:0.5"]],
        "controlnet": [str(elsewhere)],
    }
    monkeypatch.chdir(folder)
    for name, values in cases.items():
        for value in values:
            path = png(folder / "x.png", {"prompt": "x", "seed": 0, name: value})
            assert like(path) == 2
            error = capfd.readouterr().err
            assert error.count("\n") == 1 and str(path) in error and "--trust" in error, (name, value)
            assert f"--{name.replace('_', '-')}" in error and not asked
    for name, value in {"model": "stranger/beacon", "init_image": outside}.items():
        path = png(folder / "x.png", {"prompt": "x", "seed": 0, name: value})
        for more in (["--trust"], [f"--{name.replace('_', '-')}", value]):
            assert like(path, *more) == 2 and "LOADING" in capfd.readouterr().err
    for settings in ({"init_image": str(folder / "i.png")}, {"init_image": "i.png"}, {"model": "shapes"}):
        assert like(png(folder / "x.png", {"prompt": "x", "seed": 0} | settings)) == 2
        error = capfd.readouterr().err
        ((name, value),) = settings.items()
        assert "LOADING" in error and f"x.png loads {name} {value}" in error  # announced


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"steps": 1000}, ["--steps", "10"]),
        ({"init_noise": "optimize", "optimize_steps": 100_000}, ["--optimize-steps", "5"]),
        ({"init_noise": "select", "score": "attention", "candidates": 100_000}, ["--candidates", "5"]),
        (
            {"init_noise": "select", "score": "attention", "candidates": [{"seed": n} for n in range(5000)]},
            ["--candidates", "5"],
        ),
        ({"height": 16384, "width": 16384}, ["--height", "64"]),
        ({"layout": {"prompt": "x", "width": 8192, "height": 8192, "regions": []}}, ["--trust"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_long_work_needs_to_be_asked_for(tmp_path, capfd, monkeypatch, settings, flags):
    monkeypatch.setattr(
        "minsd.app.session.load", lambda *args, **more: exec("raise FileNotFoundError('LOADING')")
    )
    path = png(tmp_path / "x.png", {"prompt": "a star", "seed": 0} | settings)
    assert like(path) == 2
    error = capfd.readouterr().err
    assert "takes long" in error and "--trust" in error and error.count("\n") == 1
    for more in (flags, ["--trust"]):
        assert like(path, *more) == 2 and "LOADING" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b31m", "\r", "\x07", "\u202e", "\x7f", "\u2066", "\x00"])
def test_control_characters_reach_no_terminal(tmp_path, capfd, text):
    for name in (
        "vae",
        "tokenizer",
        "init_image",
        "invert",
        "layout",
        "model",
        "noise_file",
        "sampler",
        "dtype",
    ):
        path = png(tmp_path / "x.png", {"prompt": "a", "seed": 0, name: f"a{text}b"})
        assert like(path) == like(path, "--trust") == 2
        assert text.strip() not in capfd.readouterr().err.replace("\n", "") or not text.strip()
    assert files.printable(f"a{text}b").isprintable()
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", f"a{text}b": 1}))
    assert draw(tmp_path / "o", "--prompts", tmp_path / "p.jsonl", prompt=None) == 2
    assert all(line.isprintable() for line in capfd.readouterr().err.split("\n"))


def test_messages_are_bounded_and_words_of_all_scripts_kept():
    assert len(files.printable("x" * 10_000_000)) < 2100
    for text in ("円と四角", "a b", "👨\u200d👩\u200d👧", "नमस्ते", "می\u200cخواهم"):
        assert files.printable(text) == text


# --- many jobs --------------------------------------------------------------------------------------------


def test_too_many_images_are_refused_before_they_take_memory(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pipeline, "load", None)
    lines = [json.dumps({"prompt": f"a {i}", "seeds": "0-999999"}) for i in range(60)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    tracemalloc.start()
    try:
        assert draw(tmp_path / "o", "--prompts", tmp_path / "p.jsonl", prompt=None) == 2
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    error = capfd.readouterr().err
    assert "line 11: a run draws at most 10,000,000 images" in error and error.count("\n") == 1


def test_the_seeds_of_a_line_may_be_many_but_not_endless(tmp_path, capfd):
    for text, says in (
        ("9" * 5000, "seeds go up to"),
        ("0-" + "9" * 30, "seeds go up to"),
        ("5-1", "lowest first"),
    ):
        assert draw(tmp_path, "--seeds", text) == 2
        error = capfd.readouterr().err
        assert says in error and len(error) < 300
    assert list(seeds.parse("0-2, 3,9,1")) == [0, 1, 2, 3, 9, 1]
    assert seeds.parse("0-2,3").ranges == [range(0, 4)]


def pieces(shapes_jobs, *asked):
    template, _ = shapes_jobs
    return [Piece(replace(template, prompt=prompt), range(*span), 0) for prompt, span in asked]


@pytest.fixture(scope="module")
def shapes_jobs():
    """A job of the embedded model, and what made it."""
    from minsd.app import requests
    from minsd.app.jobs import plan

    sd = minsd.load("shapes", device="cpu")
    command, lines = requests.read(options.parse(["x", "--seeds", "0-999999"]))
    jobs, _ = plan(sd, command, lines)
    return jobs.pieces[0].template, jobs


def test_jobs_are_made_when_they_are_asked_for(shapes_jobs):
    tracemalloc.start()
    try:
        jobs = Jobs(_unique(pieces(shapes_jobs, *((f"p{n}", (0, 1_000_000)) for n in range(10)))))
        assert len(jobs) == 10_000_000 and jobs[-1].seed == 999_999 and jobs[2_000_003].prompt == "p2"
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert len(shapes_jobs[1]) == 1_000_000


def test_jobs_asked_for_twice_are_made_once_and_shares_cover_all(shapes_jobs):
    asked = [("a", (0, 10)), ("b", (5, 8)), ("a", (5, 15)), ("a", (3, 4)), ("b", (0, 20)), ("a", (14, 16))]
    jobs = Jobs(_unique(pieces(shapes_jobs, *asked)))
    every = [(prompt, seed) for prompt, span in asked for seed in range(*span)]
    assert [(job.prompt, job.seed) for job in jobs] == list(dict.fromkeys(every))
    assert [(jobs[k].prompt, jobs[k].seed) for k in range(len(jobs))] == list(dict.fromkeys(every))
    for world in (1, 2, 3, 7, 50):
        found = {}
        for rank in range(world):
            mine = [piece.job(k) for piece, numbers in jobs.share(rank, world) for k in numbers]
            found |= {(job.prompt, job.seed): rank for job in mine}
            keys = [key for piece, numbers in jobs.share(rank, world) for key in piece.keys(numbers)]
            assert keys == [folders.key_of(job.settings()) for job in mine]
        assert [found[one] for one in dict.fromkeys(every)] == [k % world for k in range(len(jobs))]


def test_noise_files_are_whole_or_absent(tmp_path, monkeypatch):
    noise = torch.zeros(1, 4, 8, 8)
    initial.save_noise(noise, tmp_path / "n.safetensors", {"prompt": "x"})
    assert torch.equal(initial.read_noise(tmp_path / "n.safetensors", (4, 8, 8)), noise)
    monkeypatch.setattr(os, "fsync", lambda handle: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(OSError, match="No space"):
        initial.save_noise(noise, tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]
