"""Prompts to text states, and words to the token positions whose attention maps belong to them.

CLIP's text encoder (Radford et al. 2021) and its byte-pair tokenizer run through transformers.
Padding is done here: the families differ in it (SD1 pads with the end token, SD2 with id 0), and a
tokenizer may come from elsewhere.
"""

import re
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class TextEncoder:
    """A CLIPTextModel with its CLIPTokenizer. Token position 0 is the start token, as in attention
    maps."""

    def __init__(self, model: "CLIPTextModel", tokenizer: "CLIPTokenizer", pad_token_id: int):
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.max_length: int = model.config.max_position_embeddings  # 77

    def ids(self, prompt: str) -> list[int]:
        """Token ids with the start and end tokens, neither padded nor cut."""
        return self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> text states (B,77,D) on the model's device.

        A prompt that is too long is cut, with a warning that quotes the part cut off.
        """
        rows = []
        for prompt in prompts:
            ids = self.ids(prompt)
            if len(ids) > self.max_length:
                cut = str(self.tokenizer.decode(ids[self.max_length - 1 : -1])).strip()
                warnings.warn(
                    f"the prompt has more than {self.max_length - 2} tokens; cut off: {cut!r}", stacklevel=2
                )
                ids = ids[: self.max_length - 1] + ids[-1:]
            rows.append(ids + [self.pad_token_id] * (self.max_length - len(ids)))
        with torch.no_grad():
            return self.model(torch.tensor(rows, device=self.model.device)).last_hidden_state  # (B, 77, D)

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens, start and end included; `</w>` marks the end of a word."""
        return list(self.tokenizer.convert_ids_to_tokens(self.ids(prompt)))

    def positions(self, prompt: str, subject: str) -> list[int]:
        """Token positions of a word (or of consecutive words) of the prompt; `cat#2` means its
        second occurrence.

        ValueError if the word is missing, occurs several times without a number, or lies beyond the
        77th token.
        """
        word, _, number = subject.partition("#")
        if number and not re.fullmatch(r"[1-9]\d*", number):
            raise ValueError(f"subject {subject!r}: after # stands the number of the occurrence, 1, 2, ...")
        wanted = self.ids(word.strip())[1:-1]
        ids = self.ids(prompt)
        if not wanted:
            raise ValueError("a subject is empty: name a word of the prompt")
        starts = [i for i in range(1, len(ids) - len(wanted)) if ids[i : i + len(wanted)] == wanted]
        if not starts:
            raise ValueError(
                f"subject {word.strip()!r} is not in the prompt {prompt!r}: use its words exactly as written"
                " (--list-tokens)"
            )
        if len(starts) > 1 and not number:
            raise ValueError(
                f"subject {word!r} occurs {len(starts)} times in the prompt: write {word}#1, or use"
                " --token-indices"
            )
        if number and int(number) > len(starts):
            raise ValueError(f"subject {subject!r}: {word!r} occurs only {len(starts)} times in the prompt")
        start = starts[int(number or 1) - 1]
        if start + len(wanted) > self.max_length - 1:
            raise ValueError(
                f"subject {word!r} lies beyond the {self.max_length} tokens the model reads: shorten the"
                " prompt"
            )
        return list(range(start, start + len(wanted)))
