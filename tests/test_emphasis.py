"""Prompt weights, BREAK and chunks: against the published syntax, transformers run chunk by chunk, and
what must hold for any prompt."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minsd
from minsd import emphasis
from minsd.emphasis import Fragment, chunked, fragments, is_weighted
from minsd.noise import losses

up, down = 1.1, 1 / 1.1
# The examples in the documentation of the web UI's parser, and cases worked out by its rules.
EXAMPLES = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", up), (" word", 1)],
    "(unbalanced": [("unbalanced", up)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", up)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * up * up),
        (" ", up),
        ("on", 1),
        (" a ", up),
        ("hill", 0.5 * up),
        (", sun, ", up),
        ("sky", up**4),
        (".", up),
    ],
    "(a: .5 ) [b](c:-1)": [("a", 0.5), (" ", 1), ("b", down), ("c", -1)],
    "a) b] c:1.2)": [("a) b] c:1.2)", 1)],
    r"a \ b \\ c": [("a  b \\ c", 1)],
    "(a BREAK b:1.2)  BREAK": [("a", 1.2), None, ("b", 1.2), None],
    "([a)b]": [("a", 1), ("b", down)],  # crossed
    "(1.2.3:1.2.3)": [("1.2.3:1.2.3", up)],
    "": [("", 1)],
}


def pairs(prompt, weights=True):
    return [part and (part.text, pytest.approx(part.weight)) for part in fragments(prompt, weights)]


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_the_syntax_of_the_web_ui(prompt):
    assert pairs(prompt) == EXAMPLES[prompt]


@pytest.mark.parametrize(
    ("prompt", "weighted"),
    [
        ("a (red:1.2) circle", True),
        ("a ((cat) dog:2) x", True),
        ("a cat BREAK a dog", True),
        ("(1990:1.5)", True),
        ("(see fig:2)", True),  # of the form of (cat:2); the web UI takes it as a weight too
        ("a man (in a hat) [smiling]", False),
        ("a photo (16:9) at (10:30)", False),
        ("a cat:1.2 and a dog:0.5)", False),
        (r"\(a cat:1.2\)", False),
        ("a BREAKfast, COFFEE-BREAK, a break", False),
    ],
)
def test_only_unmistakable_syntax_counts_unasked(prompt, weighted):
    assert is_weighted(prompt) == weighted
    plain = [Fragment(prompt, 1.0, range(len(prompt)))]
    assert fragments(prompt, False) == plain
    assert (fragments(prompt) == plain) != weighted


@pytest.mark.parametrize("weight", ["inf", "-Infinity", "NaN ", " 1e400", ".5E-1", "9" * 400])
def test_weights_that_are_no_plain_numbers_are_refused(weight):
    prompt = f"a (red (cat:{weight})) dog"
    for weights in (None, True):
        with pytest.raises(ValueError, match=r"is not a plain number|a weight beyond 1e\+06") as error:
            fragments(prompt, weights)
        assert "write such as (cat:1.3)" in str(error.value)
    assert fragments(prompt, False)[0].text == prompt
    assert fragments(rf"\(cat:{weight}\), cat:{weight})") is not None  # no brackets around it


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*"()[]:\\ 1.,é", "BREAK", "cat", ":1.2)", "(a:"]), max_size=30).map("".join))
def test_any_prompt_keeps_its_characters(prompt):
    parts = fragments(prompt, True)
    texts = [part for part in parts if part is not None]
    places = [at for part in texts for at in part.where]
    assert "".join(prompt[at] for at in places) == "".join(part.text for part in texts)
    assert places == sorted(set(places)) and all(math.isfinite(part.weight) for part in texts)
    lost = "".join(c for at, c in enumerate(prompt) if at not in places)
    assert re.fullmatch(r"[()\[\]\\:\s\d.+-]*(BREAK[()\[\]\\:\s\d.+-]*)*", lost)  # brackets, weights, breaks
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", prompt.replace("BREAK", ""))
    assert [(part.text, part.weight) for part in fragments(escaped, True)] == [
        (prompt.replace("BREAK", ""), 1)
    ]


def test_a_hundred_open_brackets_are_enough():
    assert fragments("(" * 100 + "a", True)[0].weight == pytest.approx(1.1**100)
    with pytest.raises(ValueError, match="more than 100 open brackets"):
        fragments("(" * 101 + "a", True)
    assert fragments("[a](b)" * 10**4, True)  # nothing quadratic


def test_chunks():
    assert chunked([], 3) == [[]] and chunked([None], 3) == [[]]
    assert chunked([[1], [2], [3], [4]], 3) == [[1, 2, 3], [4]]
    assert chunked([[1], [2], [3, 4], [5]], 3) == [[1, 2], [3, 4, 5]]  # a unit is not divided
    assert chunked([None, [1], None, None, [2], None], 3) == [[], [1], [], [2]]


# --- text states and positions --------------------------------------------------------------------


def run(text, *chunks):
    """transformers' states of chunks of token ids without start and end, one after the other."""
    start, end = text.tokenizer("").input_ids
    rows = [[start, *ids, end] for ids in chunks]
    with torch.no_grad():
        states = text.model(torch.tensor([row + [text.pad_token_id] * (77 - len(row)) for row in rows]))
    return states.last_hidden_state.flatten(0, 1)[None]


def own(text, part):
    return text.tokenizer(part).input_ids[1:-1]


def test_a_weighted_prompt_is_multiplied_and_keeps_its_mean(shapes):
    """As the web UI documents it: states times weights, then the mean of the chunk restored."""
    text = shapes.text
    states = run(text, own(text, "a red circle and a blue square")).double()
    weights = torch.ones(77).double()
    weights[2:4] = 1.4
    weights[6] = 1 / 1.1
    expected = states * weights[:, None]
    expected *= states.mean() / expected.mean()
    context = text.encode(["a (red circle:1.4) and a [blue] square", "a star"])
    torch.testing.assert_close(context[:1].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(context[1:], text.encode(["a star"])) is True
    assert torch.equal(text.encode(["a [blue] (square)"]), run(text, own(text, "a [blue] (square)")))


def test_long_prompts_and_breaks_are_encoded_by_chunks(shapes):
    text = shapes.text
    long = own(text, "a red circle and " * 30)
    context = text.encode(["a red circle and " * 30, "a star BREAK a heart"])
    torch.testing.assert_close(context[:1], run(text, long[:75], long[75:]), rtol=1e-5, atol=1e-5)
    expected = run(text, own(text, "a star"), own(text, "a heart"))
    torch.testing.assert_close(context[1:], expected, rtol=1e-5, atol=1e-5)
    assert text.chunk_count("a star BREAK a heart") == 2 and text.chunk_count("a star") == 1
    short = text.encode(["a star"])
    filled = text.filled(short, 154)
    torch.testing.assert_close(filled, run(text, own(text, "a star"), []), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.encode(["a star", "a star BREAK a heart"])[:1], filled)
    assert text.filled(short, 77) is short


def test_positions_count_over_all_chunks(shapes):
    text = shapes.text
    prompt = "a (red circle:1.2) BREAK [a blue] square"
    ids = text.ids(prompt)
    assert len(ids) == 77 + 5 and ids[77] == ids[0]
    for word, places in (("red circle", [2, 3]), ("blue", [79]), ("square", [80])):
        assert text.positions(prompt, word) == places
        assert [ids[place] for place in places] == own(text, word)
    assert [place for place, (a, b) in enumerate(text.spans(prompt), 1) if b > a] == text.places(prompt)
    assert losses.automatic_subjects(prompt) == ["circle", "square"]
    for index in (4, 76, 77, 81):
        with pytest.raises(ValueError, match="outside the prompt, whose words are tokens 1 to 80"):
            losses.resolve(text, prompt, [2, index])
    assert losses.selector([[[2], [80]]]).shape == (1, 2, 154)


def test_maps_of_later_chunks_leave_out_their_own_start_and_last_token():
    torch.manual_seed(0)
    cross = torch.rand(1, 4, 4, 154).softmax(-1)
    maps = losses.subject_maps(cross, losses.selector([[[2], [80]]]))
    words = torch.cat([cross[..., 1:76], cross[..., 78:153]], -1)
    sharp = (100 * words).softmax(-1)
    torch.testing.assert_close(maps[0, 0], losses.smooth(sharp[0, ..., 1]))
    torch.testing.assert_close(maps[0, 1], losses.smooth(sharp[0, ..., 75 + 2]))
    short = losses.subject_maps(cross, losses.selector([[[2]]]))
    torch.testing.assert_close(short[0, 0], maps[0, 0])


def test_clip_skip_is_transformers_output_of_an_earlier_layer(small):
    text = minsd.text.TextEncoder(small.text.model, small.text.tokenizer, small.text.pad_token_id)
    text.skip(2)
    ids = torch.tensor([text.ids("a star") + [text.pad_token_id] * (77 - len(text.ids("a star")))])
    with torch.no_grad():
        hidden = text.model(ids, output_hidden_states=True).hidden_states[1]
        expected = getattr(text.model, "text_model", text.model).final_layer_norm(hidden)
    torch.testing.assert_close(text.encode(["a star"]), expected, rtol=0, atol=0)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="from 1 .* to 2"):
            text.skip(wrong)


def test_images_of_long_prompts_and_long_negative_prompts(small):
    how = {"steps": 2, "height": 64, "width": 64}
    long = "a red circle BREAK a star"
    alone = small(long, **how)[0]
    assert small("a red circle", negative_prompt=long, **how)[0].tobytes() != alone.tobytes()
    both = small([long, "a star"], [0, 0], **how)
    assert both[0].size == (64, 64)
    assert emphasis.is_weighted(long)
