"""Rules of detectors by hand, the embedded model's judge on rendered images, and the command."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from minsd import image, judge
from minsd.judges import objects, shapes
from minsd.judges.objects import Detection, geneval, iou, relations
from minsd.weights.shapes import data, detector


def at(name, x, y, score=0.95, side=10, colour=None):
    return Detection(name, score, (x, y, x + side, y + side), colour=colour)


# --- GenEval's rules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),  # u = (-0.933, 0)
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),  # (-0.66, -0.66)
        ((0, 0, 100, 100), (15, 0, 115, 100), set()),
        ((0, 0, 100, 100), (30, 0, 130, 100), set()),  # u_x = -0.333
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),  # exactly -0.5
        ((0, 0, 100, 100), (42, 0, 142, 100), {"left of"}),  # -0.524
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations_by_hand(a, b, expected):
    assert relations(a, b) == expected
    mirrored = {"left of": "right of", "above": "below"}
    assert relations(b, a) == {mirrored[name] for name in expected}


def test_overlap_by_hand():
    a, b = (0, 0, 100, 100), (50, 0, 150, 100)
    assert iou(a, b) == pytest.approx(1 / 3)
    assert iou(a, b, 1.0) == pytest.approx(0.33775, abs=1e-5)  # GenEval counts the last pixel too


@pytest.mark.parametrize(
    "scores, right", [((0.95, 0.93, 0.91, 0.89), True), ((0.95, 0.93, 0.91, 0.905), False)]
)
def test_counting_by_hand(scores, right):
    found = [at("cat", 20 * k, 0, score) for k, score in enumerate(scores)]
    asked = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 3}],
        "exclude": [{"class": "cat", "count": 4}],
    }
    assert (not geneval(found, asked)) == right


def test_each_clause_with_one_detection_removed_doubled_recoloured_and_moved():
    cat, dog = at("cat", 0, 0, colour="red"), at("dog", 50, 0, colour="blue")
    colours = {"include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1}]}
    beside = {
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    }
    for asked in (colours, beside):
        assert geneval([cat, dog], asked) == []
        assert geneval([cat], asked) and geneval([dog], asked)
    assert geneval([cat, at("cat", 20, 0, 0.5), dog], colours) == []  # the best one counts
    assert geneval([cat._replace(colour="green"), dog], colours)
    assert geneval([at("cat", 100, 0, colour="red"), dog], beside)
    assert geneval([cat._replace(score=0.3), dog], colours)  # not above the limit
    twice = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]}
    assert geneval([cat], twice) == [] and geneval([cat, at("cat", 2, 0, 0.9)], twice)
    assert geneval([cat, at("cat", 2, 0, 0.9)], twice, nms=0.3) == []  # two boxes of one cat


def second_opinion(found, asked):
    """GenEval's rules written again, plainly, for the comparison below."""
    limit = 0.9 if asked["tag"] == "counting" else 0.3
    named = {}
    for one in sorted(found, key=lambda d: d.score, reverse=True):
        if one.score > limit and len(named.setdefault(one.name, [])) < 16:
            named[one.name].append(one)
    good = True
    earlier = []
    for clause in asked["include"]:
        mine = named.get(clause["class"], [])[: clause["count"]]
        fine = len(mine) >= clause["count"]
        if fine and "color" in clause:
            fine = sum(one.colour == clause["color"] for one in mine) >= clause["count"]
        if fine and "position" in clause:
            name, target = clause["position"]
            fine = earlier[target] is not None
            for one in mine if fine else ():
                for other in earlier[target]:
                    middle = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in (one, other)]
                    size = [(d.box[2] - d.box[0], d.box[3] - d.box[1]) for d in (one, other)]
                    axis = 0 if name in ("left of", "right of") else 1
                    d = [middle[0][k] - middle[1][k] for k in (0, 1)]
                    r = max(abs(d[axis]) - 0.1 * (size[0][axis] + size[1][axis]), 0)
                    u = r / max((d[0] ** 2 + d[1] ** 2) ** 0.5, 1e-9)
                    before = name in ("left of", "above")
                    fine &= u > 0.5 and (d[axis] < 0) == before
        good &= fine
        earlier.append(mine if fine else None)
    for clause in asked.get("exclude", ()):
        good &= len(named.get(clause["class"], [])) < clause["count"]
    return good


def test_rules_against_a_second_writing_of_them():
    rng = np.random.default_rng(0)
    names, colours = ("cat", "dog", "cup"), ("red", "blue", None)
    verdicts = []
    for _ in range(1000):
        found = [
            at(
                str(rng.choice(names)),
                *(float(v) for v in rng.uniform(0, 100, 2)),
                float(rng.choice([0.1, 0.5, 0.91, 0.99]) + rng.uniform(0, 0.005)),
                float(rng.uniform(5, 40)),
                colours[rng.integers(3)],
            )
            for _ in range(rng.integers(0, 9))
        ]
        tag = str(rng.choice(["counting", "colors", "position"]))
        include = [{"class": str(rng.choice(names)), "count": int(rng.integers(1, 4))}]
        if tag == "colors":
            include[0] |= {"color": "red", "count": 1}
        if tag == "position":
            relation = str(rng.choice(objects.RELATIONS))
            include[0]["count"] = 1
            include.append({"class": str(rng.choice(names)), "count": 1, "position": [relation, 0]})
        asked = {"tag": tag, "include": include}
        if tag == "counting":
            asked["exclude"] = [include[0] | {"count": include[0]["count"] + 1}]
        verdicts.append(second_opinion(found, asked))
        assert (not geneval(found, asked)) == verdicts[-1], (found, asked)
    assert 50 < sum(verdicts) < 950


def test_tiam_wants_every_object():
    found = [at("cat", 0, 0, 0.25), at("dog", 20, 0, 0.24)]
    assert objects.tiam(found, ["cat", "dog", "cup"]) == [True, False, False]


def test_layouts_match_boxes_for_the_greatest_sum():
    asked = {
        "regions": [
            {"prompt": "a red circle", "box": [0, 0, 0.5, 1]},
            {"prompt": "a blue circle", "box": [0.4, 0, 0.9, 1]},
        ]
    }
    # The first detection overlaps both regions; only matched to the second does every region get one.
    found = [
        Detection("circle", 0.9, (20, 0, 70, 100)),
        Detection("circle", 0.8, (0, 0, 30, 100)),
        Detection("circle", 0.7, (95, 0, 100, 10)),
        Detection("star", 0.9, (0, 0, 50, 100)),
    ]
    values = objects.layout(found, asked, (100, 100), data.SHAPES)
    both = (30 / 50 + 30 / 70) / 2  # boxes 0-30 of 0-50, and 20-70 of 40-90
    assert values == pytest.approx({"box_iou": both, "box_half": 0.5, "box_any": 1.0, "strays": 1.0})
    assert objects.class_of("a photo of a teddy bear", objects.COCO) == "teddy bear"
    assert objects.class_of("a car with a dog", objects.COCO) == "dog"
    assert objects.class_of("a crown", objects.COCO) is None


# --- the embedded model ---------------------------------------------------------------------------


def test_captions_of_the_data_are_read_and_others_are_not():
    for index in range(200):
        example = data.example(3, index)
        asked = shapes.read_caption(example.caption)
        assert asked is not None, example.caption
        named = sorted(
            (example.words[shape], example.words[colour] if colour is not None else None)
            for colour, shape, _ in example.named
        )
        assert sorted((one["class"], one.get("color")) for one in asked["include"]) == named
    beside = shapes.read_caption("a photo of a red circle left of an orange star")
    assert beside["include"][1]["position"] == ["left of", 0] and beside["include"][1]["class"] == "circle"
    for other in ("a cat", "a red circle and", "two circles", "", "a red circle a blue square"):
        assert shapes.read_caption(other) is None, other


def test_more_than_one_of_a_kind_and_layouts_of_masks():
    example = next(e for e in (data.example(5, k) for k in range(100)) if len(e.objects) == 1)
    picture = Image.fromarray(example.render()[0])
    (drawn,) = example.objects
    clause = shapes.clause(drawn.colour, drawn.shape)
    layout = {"regions": [{"prompt": "a circle", "mask": "m.png"}]}
    for count, right in ((1, 1.0), (2, 0.0)):
        asked = {"include": [clause | {"count": count}], "layout": layout}
        (one,) = shapes.Shapes({}).pictures([picture], [""], [asked])
        assert one.values == {"right": right, "no_neglect": right, "strict": right}


def test_rendered_images_are_right_and_wrong_with_one_word_changed():
    """Truth is the renderer: >= 97 % of its images are right, and at most 3 % with a wrong word."""
    rng = np.random.default_rng(0)
    right, wrong, n = 0, 0, 0
    index = 0
    while n < 200:
        index += 1
        example = data.example(11, index)
        if any(place is None for _, _, place in example.named):
            continue  # the caption names an object that is not drawn
        n += 1
        picture = Image.fromarray(example.render()[0])
        asked = {"include": [shapes.clause(o.colour, o.shape) for o in example.objects]}
        asked["bodies"] = len(example.objects)
        found = shapes.detections(detector.find(picture))
        right += shapes.Shapes.rules(found, asked, picture.size)["right"]
        clause = asked["include"][int(rng.integers(len(asked["include"])))]
        if rng.random() < 0.5:
            clause["color"] = str(rng.choice([c for c in data.COLOURS if c != clause["color"]]))
        else:
            clause["class"] = str(rng.choice([s for s in data.SHAPES if s != clause["class"]]))
        wrong += shapes.Shapes.rules(found, asked, picture.size)["right"]
    assert right >= 194 and wrong <= 6


# --- the command ----------------------------------------------------------------------------------


def run(*argv):
    return judge.main([str(word) for word in argv])


@pytest.fixture
def folder(tmp_path):
    """Six rendered images with rows as minsd writes them."""
    lines = []
    for k in range(6):
        example = data.example(5, 100 + k)
        image.save(Image.fromarray(example.render()[0]), tmp_path / f"{k:05d}-{k}.png")
        prompt = " and ".join(
            f"{'an' if o.colour == 'orange' else 'a'} {o.colour} {o.shape}" for o in example.objects
        )
        lines.append({"file": f"{k:05d}-{k}.png", "prompt": prompt, "seed": k, "model": "shapes"})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def lines_of(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_each_image_is_judged_once_and_again_where_something_changed(folder, capsys):
    assert run(folder) == 0
    first = lines_of(folder)
    assert [line["file"] for line in first] == [f"{k:05d}-{k}.png" for k in range(6)]
    assert all(line["values"] == {"right": 1.0, "no_neglect": 1.0, "strict": 1.0} for line in first)
    assert run(folder) == 0 and "0 new scores" in capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "a cat"
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image.save(Image.new("RGB", (128, 128), "white"), folder / rows[1]["file"])
    assert run(folder) == 0 and "2 new scores" in capsys.readouterr().err
    after = lines_of(folder)
    assert after[2:] == first[2:]
    assert after[0]["values"] == {} and "asks for no shapes" in after[0]["reason"]
    assert after[1]["values"]["right"] == 0 and after[1]["found"] == []
    assert run(folder, "--again", "--export", folder / "all.csv") == 0
    assert "6 new scores" in capsys.readouterr().err
    assert len((folder / "all.csv").read_text().splitlines()) == 7


def test_an_image_that_was_drawn_again_is_judged_under_its_new_name(folder, capsys):
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    again = folder / "00006-0.png"
    (folder / rows[0]["file"]).rename(again)
    (folder / rows[1]["file"]).unlink()  # and was not drawn again: still an error
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"file": again.name}) + "\n")
    assert run(folder) == 1
    error = capsys.readouterr().err
    assert rows[0]["file"] not in error and rows[1]["file"] in error
    assert {line["file"] for line in lines_of(folder)} == {row["file"] for row in rows[2:]} | {again.name}


def test_a_truncated_image_that_was_drawn_again_is_no_error(folder, capsys):
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    old, again = folder / rows[0]["file"], folder / "00006-0.png"
    shutil.copy(old, again)
    twice = folder / "00007-1.png"  # drawn twice, without --resume
    shutil.copy(folder / rows[1]["file"], twice)
    old.write_bytes(old.read_bytes()[:300])
    with (folder / "runs.jsonl").open("a") as file:
        for row, path in ((rows[0], again), (rows[1], twice)):
            file.write(json.dumps(row | {"file": path.name}) + "\n")
    assert run(folder) == 0
    assert "error" not in capsys.readouterr().err
    files = {line["file"] for line in lines_of(folder)}
    assert files == {row["file"] for row in rows[1:]} | {again.name, twice.name}
    again.unlink()
    assert run(folder) == 1  # no image of these settings is whole
    assert len(capsys.readouterr().err.splitlines()) >= 1


def test_killed_runs_and_several_processes_judge_each_image_once(folder, monkeypatch, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    assert run(alone) == 0
    (folder / "scores-7.jsonl").write_text('{"file": "00000-0.png", "judge": "sha')  # cut by a kill
    line = next(line for line in lines_of(alone) if line["file"] == "00003-3.png")
    (folder / "scores-5.jsonl").write_text(json.dumps(line) + "\n")  # of a run of more processes
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert run(folder, "--batch", 1) == 0
    assert lines_of(folder) == lines_of(alone)
    assert [path.name for path in folder.glob("scores*")] == ["scores.jsonl"]


def test_one_bad_image_stops_nothing(folder, capsys):
    (folder / "00002-2.png").write_bytes(b"no image")
    (folder / "00004-4.png").unlink()
    assert run(folder, "--quiet") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "00002-2.png" in errors[0] and "00004-4.png" in errors[1]
    assert len(lines_of(folder)) == 4


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--judges", "shape"], "there is no judge 'shape': known are shapes, clip"),
        (["--judges", "pickscore"], "needs yuvalkirstain/PickScore_v1 (3.9 GB), not in the hub cache"),
        (["--judges", "clip", "--weights", "clop=x"], "--weights clop=...: the names are clip-b16"),
        (["--judges", "clip", "--weights", "clip-b16=nowhere"], "there is no such folder or file"),
        (["--export", "x.parquet"], "--export writes a table of the form .csv: not x.parquet"),
        (["--nms", "2"], "--nms must be above 0 and at most 1"),
        (["--batch", "0"], "--batch: must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(judge.judges, "_fetched", lambda *args: None)  # as offline
    assert run(folder, *argv) == 2
    out = capsys.readouterr().err.splitlines()
    assert len(out) == 1 and message in out[0]
    assert not list(folder.glob("scores*"))


def test_folders_without_prompts_and_missing_ones_are_one_line(tmp_path, capsys):
    image.save(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    for place in (tmp_path, tmp_path / "none"):
        assert run(place) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no images with prompts: give runs.jsonl" in first and "there is no folder" in second


def test_other_programs_folders(tmp_path):
    """A list of prompts, GenEval's form, text in PNGs, and a folder per prompt."""
    picture = Image.new("RGB", (16, 16), "white")
    listed = tmp_path / "listed"
    image.save(picture, listed / "a.png")
    (listed / "prompts.csv").write_text("file,prompt\na.png,a red circle\n")
    graded = tmp_path / "graded"
    image.save(picture, graded / "00003" / "samples" / "0000.png")
    item = {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a red cat"}
    (graded / "00003" / "metadata.jsonl").write_text(json.dumps(item))
    told = tmp_path / "told"
    told.mkdir()
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a photo of a bench\nNegative prompt: x\nSteps: 3")
    picture.save(told / "b.png", pnginfo=info)
    named = tmp_path / "named"
    image.save(picture, named / "a_cat_and_a_dog" / "0.png")
    assert [(p.file, p.prompt) for p in judge.pictures(listed)] == [("a.png", "a red circle")]
    (one,) = judge.pictures(graded)
    assert (one.file, one.asked) == ("00003/samples/0000.png", item)
    (one,) = judge.pictures(told)
    assert one.prompt == "a photo of a bench" and one.asked["tag"] == "single_object"  # GenEval's own
    (one,) = judge.pictures(named, by_folder=True)
    assert one.prompt == "a cat and a dog"


def test_the_list_names_weights_and_licences(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "yuvalkirstain/PickScore_v1, 3.9 GB, licence not stated" in out
