"""Subjects are found where they stand, whatever tokens they are cut into. Truth: characters,
placed by the test itself.
"""

import gzip
import importlib.util
import json
import random
import unicodedata
import warnings
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

import minsd
from minsd.noise.losses import automatic_subjects, resolve
from minsd.text import TextEncoder
from minsd.words import split

NOUNS = """
cat cats cat-s dog bird ball balls baseballs bird-cage dog's cats T-shirt o'clock rock'n'roll R2-D2 café naïve
jalapeño 4k 8 1980s x2 2.5 1,000 Σίσυφος ΟΔΟΣ Straße İstanbul हिन्दी 猫 고양이 start START stop tart art heart
hearts
sail tailor's it's they're don't can’t mother-in-law's émigré U.S.A café-bar grandmother’s ice-cream e-mail
a the i s t re d'd sun sunflower o’neill Ångström
""".split()
NOUNS += [unicodedata.normalize("NFD", noun) for noun in NOUNS if not noun.isascii()]
ADJECTIVES = """
red big tiny two 3 old 'quoted' "shiny" (bright) [dark] -cold- semi-transparent 2nd 😀 👩‍🚀 “curly” ‘single’
blue's
cat dog café the s' ''s #1 50% $5 … — very_old either/or <lora:x:1> (2)
""".split()
JOINTS = [" and ", " with ", ", ", " , ", ",", " AND ", ",\n", " and\n", " with\u00a0", "，"]
WRAPS = """
(_) '_' "_" “_” ‘_’ [_] {_} *_* <_> ((_)) (_:1.3) ((_:1.2) (_:-.5) [_:0.5] (_)1.3 _::2 _! _. _… _🐱 _' #_
""".split()  # _ is the noun


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
        opening, closing = (rng.choice(WRAPS) if rng.random() < 0.4 else "_").split("_")
        if noun[0].isdigit() and opening[:1] in tuple("([{"):  # numbers alone in brackets are no subjects
            opening = closing = ""
        prompt += opening
        spans.append((len(prompt), len(prompt) + len(noun)))
        prompt += noun + closing
    return prompt, spans


def covered(text, prompt, places):
    spans = text.spans(prompt)
    return min(spans[k - 1][0] for k in places), max(spans[k - 1][1] for k in places)


def check(text, offsets, seed, count):
    """Every subject is named as placed, is not refused, and has exactly the tokens that the
    tokenizer's own `offsets` put there, in chunks of 75 with a start and an end token around each.
    """
    rng = random.Random(seed)
    text.prompt_weights = False  # the offsets are those of the text as it stands
    for _ in range(count):
        prompt, spans = made(rng)
        names = automatic_subjects(prompt)
        assert [name.partition("#")[0] for name in names] == [prompt[a:b] for a, b in spans], prompt
        at = offsets(prompt)
        at = [(77 * (k // 75) + 1 + k % 75, a, b) for k, (a, b) in enumerate(at)]
        places = [[k for k, a, b in at if a < end and b > start] for start, end in spans]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert resolve(text, prompt, None) == places, (prompt, names)
            assert resolve(text, prompt, names) == places, (prompt, names)


def own_offsets(text):
    return lambda prompt: text.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"][1:-1]


class Rewriting:
    """A tokenizer that rewrites text first and has no offsets, as transformers' slow one with ftfy
    or without it.
    """

    is_fast = False

    def __init__(self, tokenizer, rewrites):
        self.tokenizer = tokenizer
        self.rewrites = rewrites
        if "“" in rewrites:
            self.fix_text = self.rewritten
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    def rewritten(self, text):
        return "".join(self.rewrites.get(c, c) for c in text)

    def __call__(self, text, **options):
        return self.tokenizer(self.rewritten(text), **options)

    def offsets(self, prompt):
        """The offsets in the rewritten prompt, moved back."""
        back = [k for k, c in enumerate(prompt) for _ in self.rewrites.get(c, c)] + [len(prompt)]
        given = self.tokenizer(self.rewritten(prompt), return_offsets_mapping=True)["offset_mapping"]
        return [(back[start], back[end - 1] + 1) for start, end in given[1:-1]]


FTFY = {"“": '"', "”": '"', "‘": "'", "’": "'", "，": ",", "ﬁ": "fi"}
BERT = {"\u200d": ""}


def test_no_subject_that_minsd_chose_is_refused_or_misplaced(embedded):
    check(embedded, own_offsets(embedded), 0, 500)


@pytest.mark.parametrize("rewrites", [FTFY, BERT], ids=["ftfy", "bert"])
def test_nor_under_a_tokenizer_that_rewrites_text(embedded, rewrites):
    tokenizer = Rewriting(embedded.tokenizer, rewrites)
    check(TextEncoder(Model, tokenizer, 0), tokenizer.offsets, 1, 200)


@pytest.mark.slow
def test_nor_under_the_rules_of_clip(clip):
    check(clip, own_offsets(clip), 2, 4000)


@pytest.mark.slow
@pytest.mark.parametrize("rewrites", [FTFY, BERT], ids=["ftfy", "bert"])
def test_nor_under_the_rules_of_clip_after_rewriting(clip, rewrites):
    tokenizer = Rewriting(clip.tokenizer, rewrites)
    check(TextEncoder(Model, tokenizer, 0), tokenizer.offsets, 3, 1000)


def test_subjects_of_later_chunks_have_the_positions_of_their_rows(embedded):
    star = 1 + len(embedded.tokenizer("a heart and a " + "red " * 80).input_ids) - 2
    assert star > 75
    prompt = "a heart and a " + "red " * 80 + "star"
    assert resolve(embedded, prompt, None) == [[2], [star + 2]]  # an end and a start token between them
    assert embedded.tokens(prompt)[star + 2] == "star</w>"


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
        ("[blue]", ["blue"]),
        ("a cat, 4k", ["cat", "4k"]),
        ("(a red cat:1.3), (cat)1.2, cat::2, a dog:1.5", ["cat#1", "cat#2", "cat#3", "dog"]),
        ("<lora:x:1> a cat <lora:add_detail:0.8>, <lora:y:.5>", ["cat"]),
        ("a cat<lora:x:1> and a cat", ["cat#1", "cat#2"]),
        ("two cats (2), (a clock at 10:30), (route 66:1.2)", ["cats", "30", "66"]),
        ("version 2.5 and 1,000 dogs, a field of 1,000", ["2.5", "dogs", "1,000#2"]),
        ("the U.S.A. and the dogs' bone", ["U.S.A", "bone"]),
        ("'90s rock 'n' roll, \"a 'b'\"", ["roll", "b"]),
        ("a cafe\u0301-bar and a cafe\u0301", ["cafe\u0301-bar", "cafe\u0301"]),
        ("猫、犬", ["猫", "犬"]),
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


def test_a_list_of_subjects_is_split_at_its_commas():
    assert split("cat, red dog ,2,5") == ["cat", "red dog", "2", "5"]
    assert split("1,000, dog,1,000,000") == ["1,000", "dog", "1,000,000"]


def test_a_tokenizer_that_rewrites_text_is_never_guessed_at(embedded, monkeypatch):
    monkeypatch.setattr(embedded, "_text_tokens", lambda text: ["other</w>"])
    assert embedded.spans("a star")  # its own offsets
    monkeypatch.setattr(type(embedded.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="rewrites the prompt .*--token-indices"):
        embedded.positions("a star", "star")


def test_only_the_stretch_that_a_tokenizer_rewrites_is_unknown(embedded):
    """ftfy writes "&amp;" as "&": no way of rewriting one character after another gives that."""
    tokenizer = Rewriting(embedded.tokenizer, {})
    tokenizer.rewritten = lambda text: text.replace("&amp;", "&")
    text = TextEncoder(Model, tokenizer, 0)
    prompt = "a circle &amp; a R&amp;B star"
    plain = "a circle & a R&B star"
    assert text.positions(prompt, "circle") == embedded.positions(plain, "circle")
    assert text.positions(prompt, "star") == embedded.positions(plain, "star")
    with pytest.raises(ValueError, match="rewrites 'R', .*--token-indices") as error:
        text.positions(prompt, "R")
    assert "\n" not in str(error.value)
