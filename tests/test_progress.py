"""Progress of runs: phases, counts, times left, lines in log files, and previews."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minsd.app import options, progress, requests
from minsd.app.jobs import plan
from minsd.app.progress import Progress, Show, in_words
from minsd.app.run import attempt
from minsd.app.session import Session
from minsd.generate import main
from minsd.noise import drivers, initno
from minsd.noise.drivers import Step

PROMPT = "a red circle and a blue square"


class Heard(Show):
    """Keeps what it is told: (name, total, steps counted, Steps) per phase, and the previews."""

    def __init__(self):
        self.phases = []
        self.previews = []

    def phase(self, name, total=None):
        self.phases.append([name, total, 0, []])

    def advance(self):
        self.phases[-1][2] += 1

    def say(self, message):
        if isinstance(message, Step):
            self.phases[-1][3].append((message.done, message.most))

    def preview(self, step, images):
        self.previews.append((step, images))


def drawn(shapes, heard, *words):
    command, lines = requests.read(options.parse([PROMPT, "--seed", "1", "--steps", "4", *words]))
    jobs, _ = plan(shapes, command, lines)
    finished = attempt(Session(shapes, command, True), list(jobs), heard)
    assert not isinstance(finished, Exception), finished
    return finished.drawn


@pytest.mark.parametrize(
    "words, name, counted",
    [
        ("--init-noise select --candidates 3", "selecting the noise", [(0, 3)]),
        ("--init-noise select --candidates 3 --num-images 2", "selecting the noise", [(0, 6), (3, 6)]),
        (
            "--init-noise optimize --objective syngen --optimize-steps 2",
            "optimising the noise",
            [(0, 2), (1, 2), (2, 2)],
        ),
        (
            "--init-noise select --objective syngen --candidates 2 --num-images 2",
            "selecting the noise",
            [(2, 4), (4, 4)],
        ),
    ],
)
def test_every_phase_is_named_and_counted(shapes, words, name, counted):
    heard = Heard()
    drawn(shapes, heard, *words.split())
    assert heard.phases == [[name, None, 0, counted], ["sampling", 4, 4, []], ["decoding", None, 0, []]]


def test_the_steps_of_initno_and_best(shapes):
    heard = Heard()
    drawn(shapes, heard, "--init-noise", "initno")
    [[name, _, _, steps], *_] = heard.phases
    assert name == "optimising the noise"
    assert steps == [(k + 1, 5 * 10 + 51) for k in range(len(steps))] and steps
    assert initno.Settings(rounds=2, round_steps=3, variant="paper").evaluations == 6
    heard = Heard()
    drawn(shapes, heard, "--init-noise", "best")
    [[name, _, _, steps], *_] = heard.phases
    assert name == "selecting the noise" and steps[:2] == [(0, 8), (1, 6)]


def test_an_inversion_counts_both_ways(shapes, tmp_path):
    Image.new("RGB", (128, 128), "grey").save(tmp_path / "grey.png")
    command, lines = requests.read(options.parse(["--invert", str(tmp_path / "grey.png"), "--steps", "3"]))
    jobs, _ = plan(shapes, command, lines)
    heard = Heard()
    attempt(Session(shapes, command, True), list(jobs), heard)
    assert heard.phases == [["inverting and drawing again", 6, 6, []]]


def test_previews_change_nothing_and_end_at_the_image(shapes):
    heard = Heard()
    with_previews = drawn(shapes, heard, "--preview", "2")
    plain = drawn(shapes, Show())
    assert [step for step, _ in heard.previews] == [2, 4]
    image, last = (np.asarray(p).astype(float) for p in (with_previews.images[0], heard.previews[1][1][0]))
    assert np.array_equal(image, np.asarray(plain.images[0]))
    assert np.abs(image - last).mean() < 3  # of 255: the last prediction is nearly the image
    assert with_previews.extras[0]["preview"].width >= 2 * 128


def test_previews_of_large_images_are_small(shapes):
    from minsd.app.preview import Previews

    heard = Heard()
    heard.phase("sampling")
    previews = Previews(shapes, 1, heard)
    x = torch.zeros(1, 4, 40, 80)
    previews.watch(lambda x, t: torch.zeros_like(x))(x, 500)
    previews.after(0, 480)
    assert heard.previews[0][1][0].size == (8 * 32, 8 * 16)


def test_a_preview_lies_in_the_folder_while_drawing(tmp_path):
    words = ["--steps", "2", "--seeds", "0,1", "--preview", "1", "--quiet", "--out", str(tmp_path)]
    assert main([PROMPT, *words]) == 0
    assert Image.open(tmp_path / "extra" / "preview.png").width >= 2 * 128
    assert (tmp_path / "extra" / "00001-1-preview.png").exists()
    assert main([PROMPT, "--preview", "0"]) == 2


def test_parts_and_prefixes_keep_the_count():
    said = []
    drivers.part_of(said.append, 2, 5)(Step("x", 3, 4))
    drivers.part_of(said.append, 2, 5)("only words")
    assert (said[0].done, said[0].most, said[1]) == (2 * 4 + 3, 5 * 4, "only words")
    assert drivers.prefixed("seed 3: ", said[0]) == "seed 3: x" and drivers.prefixed("a ", "b") == "a b"
    assert drivers.prefixed("seed 3: ", said[0]).done == 11


def test_log_files_get_few_lines(tmp_path, capfd, monkeypatch):
    """A line per LOG_SECONDS at most, each ended by a line break."""
    show = Progress(3, tmp_path)
    for interval, least, most in ((30, 0, 0), (0.2, 1, 3)):
        monkeypatch.setattr(progress, "LOG_SECONDS", interval)
        show.batch(1)
        show.phase("sampling", 60)
        for _ in range(60):
            show.advance()
            progress.time.sleep(0.01)
        show.close()
        lines = capfd.readouterr().err.splitlines()
        assert least <= len(lines) <= most, lines
        assert all(re.match(r"minsd: image 1/3, sampling +\d+%.* \d+/60 \[", line) for line in lines)


def test_time_left_is_judged_by_the_images_done(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    show = Progress(6, tmp_path, hidden=True)
    show.batch(2)
    assert show.images == "images 1-2/6"
    now += 300
    for _ in range(2):
        show.made(tmp_path, {})
    show.batch(1)
    assert show.images == "image 3/6 (about 10 min left)"  # four more at 150 s
    assert [in_words(s) for s in (40, 99, 600, 12_600)] == ["40 s", "99 s", "10 min", "3.5 h"]


def test_a_run_in_a_pipe_says_only_its_images(tmp_path, capfd):
    assert main([PROMPT, "--seed", "3", "--steps", "2", "--json", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr()
    assert said.err == "minsd: seed 3\n" and json.loads(said.out)["seed"] == 3
