"""What the README prints has to run as it is printed."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regate_fx

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippet_trains_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backend differs from what is printed: Inductor would take most of a minute."""
    monkeypatch.setattr(regate_fx, "compile", functools.partial(regate_fx.compile, backend="eager"))
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet is not None
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = torch.randint(50, (2, 12))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 9:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    scope = {"model": model, "loader": [batch, batch]}

    exec(snippet.group(1), scope)

    assert scope["gated"].report.gated == 2
    unmoved = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert unmoved == []
    counted = scope["out"].counted
    assert counted.any()
    assert not counted[labels == -100].any()


def test_the_commands_name_what_exists() -> None:
    """Extras and scripts of the two commands: the tests and the checks in .ci/run start from these lines."""
    commands = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)\n```", README)
    assert [name for name, _ in commands] == ["demo", "tests"]
    root = Path(__file__).parent.parent
    for _, command in commands:
        for script in re.findall(r"\S+\.py", command):
            assert (root / script).is_file()
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert f"\n{extra} = [" in (root / "pyproject.toml").read_text()
