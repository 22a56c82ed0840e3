"""Prompt sets against their published files, statistics by hand, and a study from end to end."""

import collections
import csv
import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest

from minsd import judge
from minsd.app import prompt_sets, statistics, study
from minsd.app.results import compute, read
from minsd.app.statistics import Resample

# --- prompt sets ----------------------------------------------------------------------------------


def test_geneval_is_the_published_file():
    """The hash is of evaluation_metadata.jsonl in the published repository."""
    items = prompt_sets.geneval()
    lines = "".join(json.dumps(item) + "\n" for item in items)
    published = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert hashlib.sha256(lines.encode()).hexdigest() == published
    counts = dict(single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100)
    assert collections.Counter(item["tag"] for item in items) == counts


def test_the_sets_of_attend_and_excite():
    sets = {name: prompt_sets.attend_and_excite(name) for name in ("animals", "animals-objects", "objects")}
    counts = [len(set(prompts)) for prompts in sets.values()]
    assert counts == [66, 144, 66] == [math.comb(12, 2), 12 * 12, math.comb(12, 2)]
    assert sets["animals"][0] == "a cat and a dog" and "an elephant and a rabbit" in sets["animals"]
    for name in ("animals-objects", "objects"):
        for prompt in sets[name]:
            halves = [half.split() for half in prompt.split(" and ")]
            assert len(halves) == 2
            assert halves[1][-2] in prompt_sets.THEIR_COLOURS and halves[1][-1] in prompt_sets.OBJECTS
            for half in halves:  # an article, but none for glasses
                assert (half[0] in ("a", "an")) == (half[-1] != "glasses")
                assert half[0] not in ("a", "an") or (half[0] == "an") == (half[1][0] in "aeiou")
    for a, b in (prompt.split(" and ") for prompt in sets["objects"]):
        assert a.split()[-2] != b.split()[-2]  # two colours
    assert sets["objects"] == prompt_sets.attend_and_excite("objects")  # drawn from a fixed seed


def test_the_embedded_models_sets_ask_for_what_their_captions_say():
    from minsd.judges.shapes import read_caption

    items = prompt_sets.load("shapes-geneval")
    counts = dict(single_object=6, two_object=26, colors=40, color_attr=40, position=40, counting=40)
    assert collections.Counter(item["tag"] for item in items) == counts
    for name in (name for name in prompt_sets.SETS if name.startswith("shapes")):
        items = prompt_sets.load(name)
        assert len({item["prompt"] for item in items}) == len(items)
        for item in items:
            assert read_caption(item["prompt"])["include"] == item["include"]
    assert len(prompt_sets.load("shapes-geneval", 2)) == 12


@pytest.mark.parametrize(
    "name, text, prompts",
    [
        ("a.txt", "# no\na cat\n\na dog\na cat\n", ["a cat", "a dog"]),
        ("a.csv", "id,Prompts\n1,a cat\n2,a dog\n", ["a cat", "a dog"]),
        ("a.tsv", "caption\tx\na cat\t1\n", ["a cat"]),
        ("a.json", '["a cat", {"prompt": "a dog"}]', ["a cat", "a dog"]),
        ("a.jsonl", '{"prompt": "a cat", "tag": "x"}\n', ["a cat"]),
    ],
)
def test_prompts_from_files(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert [item["prompt"] for item in prompt_sets.load(str(tmp_path / name))] == prompts


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "id,words\n1,a cat\n", "has no column named prompt"),
        ("a.jsonl", "{broken", "a.jsonl, line 1: not JSON"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '{"prompts": ["a cat"]}', "a.json holds no list of prompts"),
        ("a.json", '["a cat", {"prompt": 3}]', 'entry 2: there is no "prompt"'),
        ("a.tsv", "id\tprompt\n1\ta cat\n2\n", 'line 3: there is no "prompt"'),
        ("a.jsonl", '{"prompt": "a", "tag": ["x"]}', "line 1: 'tag' must be text"),
        ("a.jsonl", '{"prompt": "a", "subjects": [2.5]}', "line 1: 'subjects' must be a list"),
        ("a.jsonl", '{"prompt": "a", "layout": {"regions": [{"box": [0, 0, 1, 1]}]}}', "'layout' must hold"),
        ("a.jsonl", '{"prompt": "a", "layout": {"regions": [{"prompt": "b", "box": [1, 0, 0, 1]}]}}', "box"),
        ("a.pdf", "x", "prompts come from"),
    ],
)
def test_bad_files_of_prompts_are_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        prompt_sets.load(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "include, message",
    [
        ('"cat"', "'include' must be a list of clauses"),
        ('["cat"]', "clause 1 of 'include' needs a \"class\""),
        ('[{"class": 3, "count": 1}]', 'needs a "class"'),
        ('[{"class": "cat"}]', 'needs a "count" from 1'),
        ('[{"class": "cat", "count": true}]', 'needs a "count" from 1'),
        ('[{"class": "cat", "count": 1, "color": 5}]', 'has a "color" that is no text'),
        ('[{"class": "cat", "count": 1, "position": "above"}]', 'needs a "position" of the form'),
        ('[{"class": "cat", "count": 1, "position": ["near", 0]}]', "relations are left of"),
        ('[{"class": "cat", "count": 1, "position": ["above", 0]}]', "without the number of an earlier"),
    ],
)
def test_malformed_clauses_are_one_line_with_the_line(tmp_path, include, message, capsys):
    good = '{"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}\n\n'
    line = f'"prompt": "a dog", "include": {include}'
    (tmp_path / "a.jsonl").write_text(good + "{" + line + "}\n")
    assert study.main(["draw", str(tmp_path / "s"), "--prompts", str(tmp_path / "a.jsonl")]) == 2
    (out,) = capsys.readouterr().err.splitlines()
    assert "a.jsonl, line 3: " in out and message in out
    assert not (tmp_path / "s").exists()
    (tmp_path / "prompts.jsonl").write_text('{"file": "a.png", ' + line + "}\n")
    assert judge.main([str(tmp_path), "--judges", "shapes"]) == 2
    (out,) = capsys.readouterr().err.splitlines()
    assert "prompts.jsonl, line 1: " in out and message in out


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_by_hand():
    difference = Resample([0, 1]).estimate(np.array([1.0, 3.0]))
    assert difference == (2.0, 1.0, 3.0)
    values, base = np.array([0.3, 0.2, 0.1]), np.array([0.2, 0.2, 0.4])
    assert statistics.wins(values, base).mean() == 0.5
    assert statistics.preference(np.array(21.0), np.array(20.0)) == pytest.approx(0.7311, abs=1e-4)
    assert statistics.mcnemar(40, 6) == pytest.approx(3.1e-7, rel=0.01)
    assert statistics.mcnemar(5, 0) == statistics.mcnemar(0, 5) == 0.0625
    assert statistics.mcnemar(0, 0) == 1.0


def test_rates_and_exact_test_agree_with_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 7), (3, 7), (150, 200), (200, 200)):
        truth = binomtest(k, n)
        interval = truth.proportion_ci(method="wilson")
        assert statistics.wilson(k, n) == pytest.approx((k / n, interval.low, interval.high), abs=1e-6)
        assert statistics.mcnemar(k, n - k) == pytest.approx(truth.pvalue, rel=1e-9)


def test_intervals_cover_the_truth_and_order_changes_nothing():
    """1,000 studies of 60 prompts x 4 seeds with a known difference: 92 to 97 % of the intervals hold
    it, although images of one prompt go together."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    resample = Resample(groups, draws=1000)
    held = 0
    for _ in range(1000):
        values = 0.3 + np.repeat(rng.normal(size=60), 4) + rng.normal(size=240)
        _, low, high = resample.estimate(values)
        held += low <= 0.3 <= high
    assert 920 <= held <= 970
    order = rng.permutation(240)
    again = Resample(groups[order], draws=1000).estimate(values[order])
    assert again == pytest.approx(resample.estimate(values))
    assert statistics.wins(values, values).mean() == 0.5


# --- methods --------------------------------------------------------------------------------------


def test_methods_by_name_and_by_hand():
    methods = study.split_methods(
        ["plain,noise", "select:attention:5", "mine: --init-noise select --candidates 3"]
    )
    assert methods == {
        "plain": [],
        "noise": ["--init-noise", "initno", "--no-excite"],
        "select:attention:5": "--init-noise select --score attention --candidates 5".split(),
        "mine": "--init-noise select --candidates 3".split(),
    }
    assert study.split_methods(["collage", "collage:0.25", "optimize:3"]) == {
        "collage": ["--layout-method", "paper"],
        "collage:0.25": ["--crop-margin", "0.25"],
        "optimize:3": "--init-noise optimize --optimize-steps 3".split(),
    }
    assert study.split_methods(["best", "syngen", "select:syngen:3", "f.py:my"]) == {
        "best": ["--init-noise", "best"],
        "syngen": ["--objective", "syngen"],
        "select:syngen:3": "--init-noise select --objective syngen --candidates 3".split(),
        "f.py:my": ["--objective", "f.py:my"],
    }
    for wrong in ("select", "select:attention", "optimize:x", "collage:x"):
        with pytest.raises(ValueError, match="there is no method"):
            study.split_methods([wrong])
    with pytest.raises(ValueError, match="share the folder"):
        study.split_methods(["select:attention:5", "select-attention-5: --excite"])


def made_up(columns):
    """Results of made-up values: two methods, twelve prompts."""
    from minsd.app.results import Results

    pairs = [(f"prompt {k}", k) for k in range(12)]
    values = {name: {m: np.array(v, float) for m, v in zip("ab", both)} for name, both in columns.items()}
    nothing = {key: {m: np.full(12, np.nan) for m in "ab"} for key in ("unet_rows", "seconds", "peak_mb")}
    return Results(["a", "b"], pairs, [""] * 12, {}, values, nothing, {}, {}, [])


def test_what_is_better_and_what_is_bold():
    from minsd.app import study_page

    up = (np.arange(12), np.arange(12) + 1)  # b is greater in every pair
    even = (np.arange(12), np.arange(12)[::-1])  # the same mean
    results = made_up({"clip": up, "strays": up, "pickscore": even, "right": (np.zeros(12), np.ones(12))})
    cells = compute(results, "a")
    pick = {(c.part, c.column): c for c in cells if c.method == "b"}
    assert pick["differences", "clip"].estimate == (1, 1, 1)
    assert pick["wins", "clip"].estimate == (100, 100, 100)
    assert pick["wins", "strays"].estimate == (0, 0, 0)  # less is better
    assert pick["differences", "right"].more == "12 repaired, 0 broken, p = 0.00049"  # 2 / 2^12
    assert pick["values", "right"].estimate[:1] == (100,)
    assert 0.3 < pick["preferred", "pickscore"].estimate.value / 100 < 0.7
    text = study_page.latex(results, cells)
    (a, b) = (line.split(" & ") for line in text.splitlines() if line[:3] in ("a &", "b &"))
    assert ["textbf" in cell for cell in a] == [False, False, True, False, False]
    assert ["textbf" in cell for cell in b] == [False, True, False, False, True]


# --- from end to end ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six prompts, two methods, four steps; then a third method is added."""
    folder = tmp_path_factory.mktemp("study") / "s"
    words = ["draw", str(folder), "--count", "1", "--options", "--steps 4", "--quiet", "--methods"]
    assert study.main([*words, "plain", "select:attention:2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(before) == 12
    assert study.main([*words, "plain", "guided: --guidance-scale 2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is drawn twice
    assert judge.main([str(folder), "--quiet"]) == 0
    return folder


def test_a_study_from_end_to_end(drawn, tmp_path):
    assert study.main(["table", str(drawn), "--out", str(tmp_path), "--latex", "--page", "--sheet", "2"]) == 0
    names = {"table.md", "table.csv", "table.tex", "differences.svg", "cost.svg", "index.html", "sheet.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    text = (tmp_path / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    numbers = {row[key] for row in rows for key in ("value", "low", "high")}
    counts = {row["n"] for row in rows} | {row["prompts"] for row in rows}
    body = "\n".join(line for line in text.splitlines() if line.startswith("| ") and "method" not in line)
    body = re.sub(r"^\| [^|]+\|", "|", body, flags=re.M)
    shown = re.findall(r"(?<![\w.])-?\d+\.?\d*", body)
    assert len(shown) > 60 and set(shown) <= numbers | counts
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 18 and 'src="data:image/jpeg' in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    # The table's numbers from the scores themselves.
    for method in ("plain", "guided"):
        lines = [json.loads(line) for line in (drawn / method / "scores.jsonl").read_text().splitlines()]
        rate = 100 * np.mean([line["values"]["right"] for line in lines])
        row = next(r for r in rows if (r["part"], r["method"], r["column"]) == ("values", method, "right"))
        assert float(row["value"]) == pytest.approx(rate, abs=0.05)
    results = read(drawn)
    assert results.methods == ["plain", "select:attention:2", "guided"] and len(results.pairs) == 6
    assert {seed for _, seed in results.pairs} == set(range(6))  # every prompt has a seed of its own
    costs = {c.method: c.estimate.value for c in compute(results, "plain") if c.column == "UNet rows"}
    assert costs == {"plain": 8, "select:attention:2": 10, "guided": 8}


def test_a_selection_is_paired_with_the_seed_it_began_at(drawn):
    rows = [
        json.loads(line) for line in (drawn / "select-attention-2" / "runs.jsonl").read_text().splitlines()
    ]
    assert any(row["seed"] != row["asked_seed"] for row in rows)
    assert [row["asked_seed"] for row in rows] == list(range(6))


def test_a_study_keeps_its_prompts_and_seeds(drawn, capsys):
    for words, message in (
        (["--seeds", "0-1"], "has other seeds"),
        (["--count", "2"], "has other prompts"),
        (["--options", "--steps 5"], "has other options"),
        (["--methods", "plain: --excite"], "has a method plain with other options"),
        (["--methods", "collage"], "needs prompts with a layout"),
        (["--methods", "frobnicate"], "method frobnicate: no objective is called 'frobnicate'; choose"),
    ):
        given = {"--count": "1", "--options": "--steps 4", "--methods": "plain"}
        flags = [word for pair in given.items() if pair[0] not in words for word in pair]
        assert study.main(["draw", str(drawn), *flags, *words]) == 2
        out = capsys.readouterr().err.splitlines()
        assert len(out) == 1 and message in out[0], out
    assert not (drawn / "prompts" / "frobnicate.jsonl").exists()


def test_two_draws_at_once_lose_no_method(tmp_path, monkeypatch):
    """The second begins and ends while the first has read the folder and not yet written to it."""
    words = ["draw", str(tmp_path), "--count", "1", "--options", "--steps 1", "--quiet", "--methods"]
    read_requests = study.requests.read

    def interrupted(*args):
        monkeypatch.setattr(study.requests, "read", read_requests)
        assert study.main([*words, "plain"]) == 0
        return read_requests(*args)

    monkeypatch.setattr(study.requests, "read", interrupted)
    assert study.main([*words, "x: --guidance-scale 2"]) == 0
    held = json.loads((tmp_path / "study.json").read_text())
    assert held["methods"] == {"plain": [], "x": ["--guidance-scale", "2"]}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--count", "0"], "--count: must be a whole number of at least 1, not '0'"),
        (["--count", "-2"], "--count: must be a whole number of at least 1, not '-2'"),
        (["--seeds", "apart:0"], "--seeds takes numbers and ranges"),
        (["--methods", "select:attention:0"], "--candidates must be from"),
        (["--methods", "plain", "optimize:200000"], "--optimize-steps must be from"),
        (["--methods", "plain", "collage"], "method collage: it needs prompts with a layout"),
        (["--methods", "x: --embedding none.pt"], "method x: there is no embedding none.pt"),
        (["--methods", "x: --prompts a.txt"], "--prompts is not for studies"),
        (["--options", "'"], "No closing quotation"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_refused_draw_writes_nothing(tmp_path, capsys, words, message):
    assert study.main(["draw", str(tmp_path / "s"), *words]) == 2
    (out,) = capsys.readouterr().err.splitlines()
    assert message in out
    assert not (tmp_path / "s").exists()


def test_impossible_numbers_of_a_table_are_one_line(drawn, capsys):
    for words in (["--sheet", "-3"], ["--sheet", "0"], ["--rows", "0"], ["--rows", "x"]):
        assert study.main(["table", str(drawn), *words]) == 2
        (out,) = capsys.readouterr().err.splitlines()
        assert f"{words[0]}: must be a whole number of at least 1, not '{words[1]}'" in out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 3}, "unknown key 'seed'; known are set, seeds"),
        ({"methods": None}, "there is no 'methods'"),
        ({"methods": ["plain"]}, "'methods' must be an object"),
        ({"methods": {"plain": "--steps 3"}}, "method 'plain' must have a list of options"),
        ({"methods": {"a:b": [], "a-b": []}}, "would share the folder a-b"),
        ({"seeds": 0}, "'seeds' must be text"),
        ({"prompts": [{"prompt": "a"}, {"tag": "x"}]}, 'prompt 2: there is no "prompt"'),
        ({"prompts": [{"prompt": "a", "include": [3]}]}, "prompt 1: clause 1 of 'include'"),
        ([], "not a study"),
    ],
)
def test_malformed_studies_are_one_line_for_every_command(drawn, tmp_path, capsys, changes, message):
    held = json.loads((drawn / "study.json").read_text())
    if isinstance(changes, dict):
        changes = {key: value for key, value in (held | changes).items() if value is not None}
    (tmp_path / "study.json").write_text(json.dumps(changes))
    for program in (
        lambda: study.main(["draw", str(tmp_path)]),
        lambda: judge.main([str(tmp_path)]),
        lambda: study.main(["table", str(tmp_path)]),
    ):
        assert program() == 2
        (out,) = capsys.readouterr().err.splitlines()
        assert "study.json" in out and message in out
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_a_column_mixes_no_weights(drawn, tmp_path, capsys):
    """Also of images of one method; judging again mends it."""
    shutil.copytree(drawn, tmp_path / "s")
    path = tmp_path / "s" / "plain" / "scores.jsonl"
    first, *rest = path.read_text().splitlines()
    other = json.loads(first)
    other["identity"]["dtype"] = "float16"
    path.write_text("\n".join([json.dumps(other), *rest]) + "\n")
    assert study.main(["table", str(tmp_path / "s")]) == 2
    (out,) = capsys.readouterr().err.splitlines()
    assert "scores of judge shapes" in out and "dtype float16; dtype float32" in out
    assert f"python -m minsd.judge {tmp_path / 's'} --judges shapes" in out
    assert judge.main([str(tmp_path / "s"), "--judges", "shapes"]) == 0
    assert "1 new scores" in capsys.readouterr().err
    assert study.main(["table", str(tmp_path / "s")]) == 0


def test_subjects_of_prompts_go_to_the_methods_that_take_them(tmp_path):
    """And a method's folder lies in the study, whatever its name."""
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a red circle and a blue square", "subjects": ["square"]}\n'
    )
    words = ["--prompts", str(tmp_path / "a.jsonl"), "--options", "--steps 1", "--quiet", "--seeds", "3"]
    words += ["--methods", "..: --guidance-scale 2", "x: --init-noise select --candidates 2"]
    assert study.main(["draw", str(tmp_path / "s"), *words]) == 0
    rows = [json.loads((tmp_path / "s" / name / "runs.jsonl").read_text()) for name in ("set", "x")]
    assert [row.get("subjects") for row in rows] == [None, ["square"]]


def test_methods_of_other_settings_of_the_model_load_it_again():
    def command(*words):
        return study.requests.read(study.options.parse(["a", *words]))[0]

    plain = study._model(command())
    assert plain == study._model(command("--resume", "--seed", "1", "--out", "x"))
    for words in (["--clip-skip", "2"], ["--prompt-weights"], ["--dtype", "bfloat16"]):
        assert study._model(command(*words)) != plain


def test_any_folder_of_folders_is_a_study(drawn, tmp_path):
    """Images without rows pair by their place among those of their prompt, which the table says."""
    for name in ("plain", "guided"):
        (tmp_path / name).mkdir()
        for path in (drawn / name).glob("*.png"):
            shutil.copy(path, tmp_path / name)
    assert judge.main([str(tmp_path / "plain"), "--judges", "shapes", "--quiet"]) == 0
    assert judge.main([str(tmp_path / "guided"), "--judges", "shapes", "--quiet"]) == 0
    results = read(tmp_path)
    assert results.methods == ["guided", "plain"] and len(results.pairs) == 6
    assert any("paired by their place" in note for note in results.notes)
    own = read(drawn)
    assert np.nanmean(results.values["right"]["plain"]) == np.nanmean(own.values["right"]["plain"])


def test_tables_without_scores_or_methods_are_one_line(drawn, tmp_path, capsys):
    for words, message in (
        (["table", str(tmp_path)], "holds no scores"),
        (["table", str(tmp_path / "none")], "there is no folder"),
        (["table", str(drawn), "--baseline", "x"], "is not among the methods: plain, select:attention:2"),
    ):
        assert study.main(words) == 2
        out = capsys.readouterr().err.splitlines()
        assert len(out) == 1 and message in out[0]


def test_compare_draws_judges_and_tables(tmp_path, capsys, monkeypatch):
    """One prompt, also of a model whose judges have no weights here: the page comes all the same."""
    monkeypatch.setattr(judge.judges, "_fetched", lambda *args: None)  # as offline
    options = ["--steps", "2", "--karras", "--sampler=dpmpp_2m", "--seeds", "0-1"]
    options += ["--quiet", "--out", str(tmp_path / "c")]
    assert study.main(["compare", "a red circle", "--methods", "plain", "x: --steps 1", *options]) == 0
    assert (tmp_path / "c" / "index.html").read_text().count("<img") == 4
    assert {"table.tex", "sheet.png"} <= {path.name for path in (tmp_path / "c").iterdir()}
    asked = json.loads((tmp_path / "c" / "study.json").read_text())["options"]
    assert asked == "--steps 2 --karras --sampler=dpmpp_2m"
    elsewhere = [*options[:-1], str(tmp_path / "d")]
    assert study.main(["compare", "a red circle", "--judges", "clip", *elsewhere]) == 2
    assert "judge clip needs openai/clip" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()  # found out before drawing
    for path in (tmp_path / "c").glob("*/scores.jsonl"):
        path.unlink()
    results = read(tmp_path / "c", unjudged=True)
    assert results.values == {} and len(results.pairs) == 2
    cells = compute(results, "plain")
    from minsd.app import study_page, study_plots

    report = study_page.report(results, cells, "plain", None)
    assert study_page.page(results, cells, "plain", report, 1).count("<img") == 2
    assert "<svg" in study_plots.differences(cells, "plain")
