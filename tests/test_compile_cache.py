"""What is found in a compile cache on disk was made by the same version of the operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import build
from torch import fx

import regate_fx
from regate_fx import dynamo_settings, ops


def test_the_caches_of_a_gated_model_are_keyed_by_the_operators() -> None:
    tags: list[str] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    gated = regate_fx.compile(build("llama"), backend=compiler, validate=False)
    ids = torch.randint(3, 90, (2, 9))
    with torch.compiler.config.patch(cache_key_tag="own-"):
        gated(input_ids=ids, labels=ids, token_mask=torch.rand(2, 9) < 0.7)
        assert torch.compiler.config.cache_key_tag == "own-"
    expected = dynamo_settings.digest(Path(ops.__file__).parent)
    assert tags == [f"own-regate_fx-{expected}"]


def test_a_changed_operator_has_another_key(tmp_path: Path) -> None:
    operator = tmp_path / "attention.py"
    operator.write_text("def fake(q): return q.new_empty(q.shape)")
    first = dynamo_settings.digest(tmp_path)
    assert dynamo_settings.digest(tmp_path) == first
    operator.write_text("def fake(q): return q.new_empty(q.shape[1:])")
    changed = dynamo_settings.digest(tmp_path)
    operator.rename(tmp_path / "rows.py")
    assert len({first, changed, dynamo_settings.digest(tmp_path)}) == 3
