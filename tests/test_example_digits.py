"""The main job, small and without a compiler backend: both runs, their numbers and their figures."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
SCENES, EPOCHS = 96, 3


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits_vlm

    return digits_vlm


def test_both_runs(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = example.Size(32, 1, SCENES, 32, EPOCHS, 2, 2, 2, 4, 1, 3, "eager")
    monkeypatch.setattr(example, "QUICK", tiny)
    monkeypatch.setattr(sys, "argv", ["digits_vlm.py", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    example.main()
    dense, gated = json.loads((tmp_path / "runs.json").read_text())
    steps = EPOCHS * SCENES // example.BATCH
    assert dense["name"] == "dense"
    assert dense["steps"] == {"dense": steps, "sparse": 0}
    assert dense["decoder_tokens"] == steps * example.BATCH * example.LONGEST
    # Two dense steps, then cycles of one dense and three sparse ones.
    assert gated["steps"] == {"dense": 2 + steps // 4, "sparse": steps - 2 - steps // 4}
    assert gated["label_tokens"] < 0.75 * dense["label_tokens"]
    assert gated["decoder_tokens"] < 0.8 * dense["decoder_tokens"]
    reached, gated_reached = dense["curve"]["accuracy"], gated["curve"]["accuracy"]
    assert reached[0] == gated_reached[0]  # the same start
    assert len(reached) == len(gated_reached) == 1 + tiny.evaluations
    assert reached[-1] != reached[0]
    for figure in ("curves.png", "words.png"):
        with Image.open(tmp_path / figure) as drawn:
            assert drawn.size[0] > 800
            assert len(set(drawn.convert("L").getdata())) > 50


def test_answers_tell_what_the_scene_shows(example: Any) -> None:
    digits, tokenizer = example.Digits(), example.make_tokenizer()
    examples = example.make_examples(40, digits.held_out, digits, tokenizer, random.Random(0))
    from digits_scenes import DIGITS, IMAGE, VISUAL_TOKENS

    assert not set(digits.training) & set(digits.held_out)
    for made in examples:
        words = tokenizer.convert_ids_to_tokens(made["input_ids"])
        told = [word for word, seen in zip(words, made["seen"], strict=True) if seen]
        assert len(told) == 4
        assert set(told) <= set(DIGITS)
        assert words.count(IMAGE) == VISUAL_TOKENS
        answer = [word for word, label in zip(words, made["labels"], strict=True) if label != -100]
        assert 30 <= len(answer) - 1 <= 60
        assert answer[-1] == tokenizer.eos_token
