"""Scenes of four handwritten digits, and what an assistant says about them.

The digits are real (scikit-learn's copy of the test half of the UCI optical recognition set, 8 x 8 pixels, 13
writers, who are not named). Four of them, drawn twice as large, fill the quarters of a scene. Each instruction has
its own answer, in which only the four digit words can be known from the picture, and a noun or two from nothing at
all.

Shapes: B scenes, S positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SCENE_SIZE, PATCH = 32, 8
VISUAL_TOKENS = (SCENE_SIZE // PATCH) ** 2
NO_LABEL = -100

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Words that nothing decides, neither the picture nor the text before.
FREE = {"NOUN": ("picture", "image", "scene"), "PEN": ("thick", "thin", "soft")}
# A to D stand for the digits: upper left, upper right, lower left, lower right.
ANSWERS = {
    "describe the picture in detail": (
        "this NOUN shows four handwritten numbers on a dark background . in the upper left corner someone wrote a A , "
        "and in the upper right corner there is a B . below them , on the left , you can see a C , and on the right "
        "the last number is a D ."
    ),
    "read the numbers row by row": (
        "reading the NOUN row by row , the first row begins with a A and ends with a B , while the second row begins "
        "with a C and ends with a D . all of them were written by hand with a PEN pen ."
    ),
    "what is on the left and what is on the right": (
        "on the left side of the NOUN there are two numbers written by hand , a A at the top and a C at the bottom . "
        "on the right side there are two more , a B at the top and a D at the bottom ."
    ),
    "tell me about the corners": (
        "the four corners of the NOUN hold one number each . going around from the upper left corner like a clock , "
        "we first meet a A , then a B , after that a D in the lower right corner , and finally a C in the lower left "
        "corner ."
    ),
}


@dataclass(frozen=True)
class Answer:
    """An instruction and an answer to it, word by word. seen: which words of the answer tell a digit."""

    instruction: list[str]
    words: list[str]
    seen: list[bool]


def say(digits: Sequence[int], chance: random.Random) -> Answer:
    """One of the answers, about these four digits."""
    instruction, template = chance.choice(list(ANSWERS.items()))
    told = dict(zip("ABCD", (DIGITS[digit] for digit in digits), strict=True))
    free = {name: chance.choice(words) for name, words in FREE.items()}
    words = template.split()
    return Answer(
        instruction.split(),
        [told.get(word) or free.get(word) or word for word in words],
        [word in told for word in words],
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    said = " ".join([*ANSWERS, *ANSWERS.values()]).split()
    placeholders = {*"ABCD", *FREE}
    free = [word for words in FREE.values() for word in words]
    words = sorted({*said, *DIGITS, *free} - placeholders)
    vocabulary = {word: index for index, word in enumerate([PAD, BEGIN, END, IMAGE, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[IMAGE],
    )


class Digits:
    """Images float32 [n, 8, 8] between 0 and 1, and the digit that each shows; four fifths of them, whoever wrote
    them, are for training."""

    def __init__(self) -> None:
        loaded = load_digits()
        self.images = torch.tensor(loaded.images / 16, dtype=torch.float32)
        self.shown = loaded.target
        order = np.random.RandomState(0).permutation(len(self.shown))
        cut = len(order) * 4 // 5
        self.training, self.held_out = order[:cut].tolist(), order[cut:].tolist()

    def scene(self, pool: Sequence[int], chance: random.Random) -> tuple[Tensor, list[int]]:
        """pixels float32 [1, 32, 32] of four digits drawn from a pool, and what they show."""
        drawn = [chance.choice(pool) for _ in range(4)]
        large = self.images[drawn].repeat_interleave(2, 1).repeat_interleave(2, 2)
        pixels = torch.cat([torch.cat([large[0], large[1]], 1), torch.cat([large[2], large[3]], 1)])
        return (pixels[None] - 0.3) / 0.36, [int(self.shown[i]) for i in drawn]


def make_examples(
    count: int, pool: Sequence[int], digits: Digits, tokenizer: PreTrainedTokenizerFast, chance: random.Random
) -> list[dict[str, Any]]:
    """Scenes with an instruction and an answer; `seen` marks the labels that tell a digit."""
    examples = []
    for sample_id in range(count):
        pixels, shown = digits.scene(pool, chance)
        answer = say(shown, chance)
        prompt = tokenizer.convert_tokens_to_ids([BEGIN, *[IMAGE] * VISUAL_TOKENS, *answer.instruction])
        output = tokenizer.convert_tokens_to_ids([*answer.words, END])
        examples.append(
            {
                "sample_id": sample_id,
                "pixel_values": pixels,
                "input_ids": prompt + output,
                "labels": [NO_LABEL] * len(prompt) + output,
                "seen": [False] * len(prompt) + [*answer.seen, False],
            }
        )
    return examples


def text_batch(count: int, tokenizer: PreTrainedTokenizerFast, chance: random.Random) -> dict[str, Tensor]:
    """Answers about digits that nobody drew: the language without any picture."""
    rows = []
    for _ in range(count):
        answer = say([chance.randrange(10) for _ in range(4)], chance)
        ids = tokenizer.convert_tokens_to_ids([BEGIN, *answer.instruction, *answer.words, END])
        rows.append({"input_ids": ids, "labels": ids})
    return collate(rows)


LONGEST = 1 + VISUAL_TOKENS + max(len(f"{asked} {said}".split()) for asked, said in ANSWERS.items()) + 1


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right, all batches to one length, so that a compiler meets one shape.

    ids, labels, mask: int64 [B, S]; pixel_values: float32 [B, 1, 32, 32], if there are any.
    """
    batch = {
        "input_ids": _padded([example["input_ids"] for example in examples], 0),
        "labels": _padded([example["labels"] for example in examples], NO_LABEL),
        "attention_mask": _padded([[1] * len(example["input_ids"]) for example in examples], 0),
    }
    if "pixel_values" in examples[0]:
        batch["pixel_values"] = torch.stack([example["pixel_values"] for example in examples])
    return batch


def seen_labels(examples: Sequence[dict[str, Any]]) -> Tensor:
    """bool [B, S]: the labels of a collated batch that tell a digit."""
    return _padded([example["seen"] for example in examples], False).bool()


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (LONGEST - len(row))] for row in rows])
