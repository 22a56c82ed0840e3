"""Text states against transformers' forward pass, for both families' padding; words to positions."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import minsd
from minsd.text import TextEncoder


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(f"{minsd.weights.__path__[0]}/shapes/tokenizer")


def encoder(tokenizer, pad=None):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return TextEncoder(
        CLIPTextModel(config).eval(), tokenizer, tokenizer.eos_token_id if pad is None else pad
    )


@pytest.fixture(scope="module")
def text(tokenizer):
    return encoder(tokenizer)


def test_states_equal_transformers_padding_with_the_end_token(text, tokenizer):
    prompts = ["a red circle and a blue square", ""]
    ids = tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = text.model(ids).last_hidden_state
    torch.testing.assert_close(text.encode(prompts), expected, rtol=0, atol=0)
    assert not text.encode(prompts).requires_grad


def test_sd2_pads_with_id_0(tokenizer):
    """The padding after the end token differs by family, and attention maps show it."""
    sd2 = encoder(tokenizer, pad=0)
    ids = tokenizer("a star").input_ids
    with torch.no_grad():
        expected = sd2.model(torch.tensor([ids + [0] * (77 - len(ids))])).last_hidden_state
    torch.testing.assert_close(sd2.encode(["a star"]), expected, rtol=0, atol=0)


def test_positions(text):
    prompt = "a red circle and a Blue square"
    assert text.tokens(prompt)[0] == "<|startoftext|>" and text.tokens(prompt)[3] == "circle</w>"
    assert text.positions(prompt, "circle") == [3]
    assert text.positions(prompt, "blue") == [6]  # the tokenizer folds case
    assert text.positions(prompt, "blue square") == [6, 7]
    assert text.positions("a circle and a red circle", "circle#2") == [6]


def test_a_word_of_several_pieces_has_several_positions(text):
    pieces = text.tokens("a zebra on the left")[2:-4]
    assert len(pieces) > 1 and not pieces[0].endswith("</w>")
    assert text.positions("a zebra on the left", "zebra") == list(range(2, 2 + len(pieces)))


@pytest.mark.parametrize(
    ("prompt", "subject", "says"),
    [
        ("a red circle", "square", "'square' is not in the prompt"),
        ("a red circle", "circ", "not in the prompt"),  # a part of a word is not the word
        ("a circle and a circle", "circle", "occurs 2 times.*circle#1"),
        ("a circle and a circle", "circle#3", "occurs only 2 times"),
        ("a circle", "circle#x", "number of the occurrence"),
        ("a circle", " ", "empty"),
    ],
)
def test_errors_of_positions(text, prompt, subject, says):
    with pytest.raises(ValueError, match=says) as error:
        text.positions(prompt, subject)
    assert "\n" not in str(error.value)
