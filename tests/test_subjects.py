"""Subjects are found where they stand, whatever tokens they are cut into. Truth: characters,
placed by the test itself.
"""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

import minsd
from minsd.noise.losses import automatic_subjects, resolve
from minsd.text import TextEncoder, occurrences

NOUNS = """
cat dog bird ball balls baseballs bird-cage dog's cats' T-shirt o'clock rock'n'roll R2-D2
café cafe\u0301 naïve
jalapeño 4k 8 1980s x2 Σίσυφος Straße İstanbul हिन्दी
猫
고양이 \u1100\u1161\u11a8 start stop tart art heart hearts
sail tailor's it's they're ’tis mother-in-law's émigré U.S.A. AT&T
grandmother’s ice-cream well-being e-mail
""".split()
ADJECTIVES = """
red big tiny two 3 old, 'quoted' "shiny" (bright) [dark] -cold- semi-transparent 2nd 😀 and/or blue's
""".split()
JOINTS = [" and ", " with ", ", ", " , ", " AND ", " next to ", "; ", " -- ", " and\n", " with\u00a0"]


class Model:
    class config:
        max_position_embeddings = 77


def encoder(folder):
    return TextEncoder(Model, CLIPTokenizer.from_pretrained(folder), 0)


@pytest.fixture(scope="module")
def embedded():
    return encoder(Path(minsd.weights.__path__[0]) / "shapes/tokenizer")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP's own tokenizer, from the vocabulary in the wheel of open_clip_torch (which is not
    imported).
    """
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs open_clip_torch: pip install --no-deps open_clip_torch")
    lines = gzip.open(Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz", "rt").read()
    merges = lines.split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    vocabulary = letters + [f"{c}</w>" for c in letters] + ["".join(merge.split()) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return encoder(folder)


def made(rng):
    """A prompt of parts, and where each part's last word stands: characters."""
    prompt = rng.choice(["", "a photo of ", "two "])
    spans = []
    for k in range(rng.randint(1, 4)):
        prompt += rng.choice(JOINTS) if k else ""
        for _ in range(rng.randint(0, 2)):
            prompt += rng.choice(ADJECTIVES) + " "
        noun = rng.choice(NOUNS)
        weighted = rng.random() < 0.2
        prompt += "(" * weighted
        spans.append((len(prompt), len(prompt) + len(noun)))
        prompt += noun + ":1.3)" * weighted
    return prompt, spans


def covered(text, prompt, places):
    spans = text.spans(prompt)
    return min(spans[k - 1][0] for k in places), max(spans[k - 1][1] for k in places)


def check(text, seed, count):
    rng = random.Random(seed)
    seen = 0
    while seen < count:
        prompt, _ = made(rng)
        names = automatic_subjects(prompt)
        if len(text.ids(prompt)) > 77 or len(names) < 2:
            continue
        seen += 1
        places = resolve(text, prompt, names)  # none is refused
        for name, place in zip(names, places):
            word, _, number = name.partition("#")
            start, end = covered(text, prompt, place)
            inside = prompt[start:end]
            # A token may hold the quotation mark before its letters, as in 'START' -> 's tart '.
            assert word in inside and len(inside) <= len(word) + 1, (prompt, name, inside)
            whole = occurrences(prompt, word)
            assert len(whole) == 1 or number, (prompt, name)
            at = whole[int(number or 1) - 1]
            assert start <= at[0] and at[1] <= end, (prompt, name)
            before, after = prompt[: at[0]], prompt[at[1] :]
            assert not (before[-1:].isalnum() or after[:1].isalnum()), (prompt, name)
        assert sorted(places) == places, (prompt, names, places)  # in the order of the prompt


def test_no_subject_that_minsd_chose_is_refused_or_misplaced(embedded):
    check(embedded, 0, 300)


@pytest.mark.slow
def test_nor_under_the_rules_of_clip(clip):
    check(clip, 1, 4000)


@pytest.mark.slow
def test_spans_are_the_characters_of_each_token(clip):
    """The tokenizer's own offsets, where it has any, are the second opinion."""
    rng = random.Random(2)
    for _ in range(1000):
        prompt, _ = made(rng)
        offsets = clip.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"][1:-1]
        spans = clip.spans(prompt)
        assert len(spans) == len(offsets)
        for (a, b), (c, d) in zip(spans, offsets):
            assert a <= c and d <= b, (prompt, spans, offsets)  # ours are whole characters with their marks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "names", "places"),
    [
        ("a cat and a rabbit", ["cat", "rabbit"], [[2], [5]]),
        ("two baseballs next to three tennis balls", ["balls"], [[8]]),
        ("a bird and a bird-cage", ["bird", "bird-cage"], [[2], [5, 6, 7]]),
        ("a dog and a dog's bone", ["dog", "bone"], [[2], [7]]),
        (
            "two baseballs and three balls and four balls",
            ["baseballs", "balls#1", "balls#2"],
            [[2, 3], [6], [9]],
        ),
        ("the word 'START' and a stop sign", ["START", "sign"], None),
    ],
)
def test_clip_places(clip, prompt, names, places):
    assert automatic_subjects(prompt) == names
    found = resolve(clip, prompt, names)
    if prompt.startswith("two baseballs next"):  # as many pieces as "baseballs" has before it
        places = [[len(clip.ids(prompt)) - 2]]
    assert places is None or found == places
    if places is None:
        assert covered(clip, prompt, found[0]) == (9, 15)  # 's of the quotation mark, then tart


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("(a cat:1.3) and (a dog:0.8)", ["cat", "dog"]),
        ("a [blue] cat, [dark:.5] dog", ["cat", "dog"]),
        ("((a cat)) with ((a hat:1.1):2)", ["cat", "hat"]),
        ("a cat and a Cat", ["cat#1", "Cat#2"]),
        ("a cafe\u0301 and a café", ["cafe\u0301#1", "café#2"]),
        ("mother-in-law's house and the grandmother’s", ["house", "grandmother’s"]),
        ("time 10:30, a clock", ["30", "clock"]),
    ],
)
def test_the_words_that_name_subjects(prompt, names):
    assert automatic_subjects(prompt) == names


def test_words_are_found_as_the_user_writes_them(embedded):
    for prompt, subject, piece in (
        ("a red bird-cage and a bird", "bird", "bird"),
        ("a red bird-cage and a star", "cage", "cage"),  # a part of a compound, where no word is it
        ("a dog's bone", "dog", "dog"),
        ("a dog’s bone", "dog's", "dog’s"),
        ("a RED circle", "red circle", "RED circle"),
        ("a red  circle", "red circle", "red  circle"),
        ("the caf\u0065\u0301 Σ", "CAFÉ", "caf\u0065\u0301"),
        ("learn c++ and c", "c++", "c++"),
        ("AT&T and a star", "AT&T", "AT&T"),
    ):
        start, end = covered(embedded, prompt, embedded.positions(prompt, subject))
        assert prompt[start:end] == piece, (prompt, subject)
    assert embedded.positions("a bird-cage and a bird", "bird") == embedded.positions(
        "a bird-cage and a bird", "bird#1"
    )


def test_a_tokenizer_that_rewrites_text_is_never_guessed_at(embedded, monkeypatch):
    monkeypatch.setattr(embedded, "tokens", lambda prompt: ["<s>", "other</w>", "<e>"])
    assert embedded.spans("a star")  # its own offsets
    monkeypatch.setattr(type(embedded.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="rewrites the prompt .*--token-indices"):
        embedded.positions("a star", "star")
