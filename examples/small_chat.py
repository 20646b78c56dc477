"""What the trainer examples share: made-up conversations, a tokenizer for them, a small Llama, and their arguments.

Everything is made here, from seeds; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKERS = ["<pad>", "<end>", "<user>", "<assistant>", "<image>"]
NOUNS = ["bird", "boat", "book", "cup", "door", "fish", "hat", "key", "lamp", "shoe", "star", "tree"]
COLOURS = ["black", "blue", "green", "red", "white", "yellow"]
OTHERS = [
    "a",
    "and",
    "first",
    "is",
    "last",
    "of",
    "see",
    "sort",
    "that",
    "the",
    "then",
    "things",
    "what",
    "you",
]
TEMPLATE = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ words(message.content) }}<end>{% endgeneration %}"
    "{% else %}{{ words(message.content) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(MARKERS + NOUNS + COLOURS + OTHERS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS[2:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversations(number: int, seed: int = 0) -> Dataset:
    """Columns `sample_id` and `messages`: things to be sorted, and the answer."""
    return Dataset.from_list(
        [{"sample_id": i, "messages": chat} for i, chat in enumerate(_chats(number, seed))]
    )


def _chats(number: int, seed: int) -> Iterator[list[dict[str, str]]]:
    chance = random.Random(seed)
    for _ in range(number):
        things = [f"{chance.choice(COLOURS)} {noun}" for noun in chance.sample(NOUNS, chance.randint(3, 6))]
        question = f"sort the things that you see a {' and a '.join(things)}"
        things.sort(key=lambda thing: thing.split()[1])
        answer = f"first is the {' then the '.join(things)} and that is the last of them"
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tokenized(tokenizer: PreTrainedTokenizerFast, data: Dataset) -> Dataset:
    """Columns `sample_id`, `input_ids` and `labels`, which are -100 outside the answers."""

    def tokenize(messages: list[dict[str, str]]) -> dict[str, list[int]]:
        chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(chat["input_ids"], chat["assistant_masks"], strict=True)
        return {"input_ids": chat["input_ids"], "labels": [id if answer else -100 for id, answer in pairs]}

    return data.map(tokenize, input_columns="messages", remove_columns="messages")


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(tokenizer))


def arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # Inductor is the default of regate_fx.compile; for a model this small, compiling would take most of the time.
    parser.add_argument("--backend", default="eager", help="inductor, aot_eager or eager")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--padding-free", action="store_true", help="TRL only")
    parser.add_argument("--folder", help="for reference losses and checkpoints; by default a temporary one")
    args = parser.parse_args()
    args.cpu = not torch.accelerator.is_available()  # with which several processes talk through gloo
    PartialState(cpu=args.cpu)
    # They have to agree on the folder.
    (args.folder,) = broadcast_object_list([args.folder or tempfile.mkdtemp()])
    return args
