"""Text states against transformers' own forward pass, for the two families' ways of padding; words to positions."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import minsd
from minsd.text import TextEncoder

SHAPES = f"{minsd.__path__[-1]}/weights/shapes"


@pytest.fixture(scope="module")
def tokenizer():
    from minsd.weights.load import SHAPES_FOLDER

    return CLIPTokenizer.from_pretrained(SHAPES_FOLDER / "tokenizer")


def encoder(tokenizer, pad, layers=2):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )
    return TextEncoder(CLIPTextModel(config).eval(), tokenizer, pad)
