"""What the README prints has to run as it is printed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import ReferenceLosses, ReGate, SampleLosses, Signals, teacher_losses

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippet(heading: str, index: int = 0) -> str:
    """The first Python under a heading, or a later one."""
    (section,) = re.findall(rf"\n## {heading}\n(.*?)\n## ", README, re.DOTALL)
    code: str = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[index]
    return code


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """Only the backend differs from what is printed: Inductor would take most of a minute."""
    monkeypatch.setattr(regate_fx, "compile", functools.partial(regate_fx.compile, backend="eager"))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).train()


def unmoved(model: LlamaForCausalLM, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]


def training_scope(model: LlamaForCausalLM, folder: Path) -> dict[str, Any]:
    """What a reader has at hand: a model, data with ids, a tokenizer."""
    ids = torch.randint(3, 50, (16, 12))
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    words = {f"w{index}": index for index in range(50)}
    return {
        "model": model,
        "data": Dataset.from_list(
            [{"sample_id": i, "input_ids": row, "labels": label} for i, (row, label) in enumerate(rows)]
        ),
        "folder": folder / "losses",
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w1", eos_token="w2"
        ),
        "collator": default_data_collator,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "DataLoader": DataLoader,
    }


@pytest.mark.parametrize(
    ("index", "prepare"),
    [(0, TrainingArguments), (1, SFTConfig), (2, None)],
    ids=["Trainer", "SFTTrainer", "accelerate"],
)
def test_a_model_trains_with_each_trainer(
    index: int, prepare: Any, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    scope = training_scope(model, tmp_path)
    losses = teacher_losses(
        model, scope["data"], scope["folder"], tokenizer=scope["tokenizer"], progress=False
    )
    AcceleratorState._reset_state(True)
    kinds = {"Trainer": Trainer, "SFTTrainer": SFTTrainer, "ReGate": ReGate, "attach": attach}
    scope |= {"regate_fx": regate_fx, "teacher_losses": teacher_losses, "gate": ReGate(losses), **kinds}
    if prepare is None:
        scope["accelerator"] = Accelerator(cpu=True)
    else:
        extra = {"bf16": False, "gradient_checkpointing": False} if prepare is SFTConfig else {}
        scope["args"] = prepare(
            str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, **extra
        )

    exec(snippet("With your trainer", index), scope)

    gate = scope["trainer"].regate.gate if prepare else scope["gate"]
    assert gate.state_dict()["global_step"] == 2
    assert not gate.difficulty.ema.isnan().all()
    AcceleratorState._reset_state(True)


def test_a_model_trains_with_regate(model: LlamaForCausalLM, tmp_path: Path) -> None:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scope = training_scope(model, tmp_path)

    exec(snippet("Train your own model with ReGATE"), scope)

    assert scope["gated"].report.gated == 2
    assert unmoved(model, before) == []
    assert not scope["gate"].difficulty.ema.isnan().any()
    assert scope["gate"].global_step == 1  # the second step is noticed by the next forward


def test_a_model_trains_with_a_mask(model: LlamaForCausalLM) -> None:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = torch.randint(50, (2, 12))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 9:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    scope: dict[str, Any] = {"model": model, "loader": [batch, batch]}

    exec(snippet("Choose the tokens yourself"), scope)

    assert scope["gated"].report.gated == 2
    assert unmoved(model, before) == []
    counted = scope["out"].counted
    assert counted.any()
    assert not counted[labels == -100].any()


def test_a_policy_of_ones_own() -> None:
    code = snippet("Rank them by another policy")
    body = code[code.index("@dataclass") : code.index("gate = ")].strip()
    assert len(body.splitlines()) <= 10
    samples = [SampleLosses(0, 0, [1.0, 2.0, 3.0, 9.0])]
    scope: dict[str, Any] = {"losses": ReferenceLosses.of(samples), "collator": default_data_collator}

    exec(code, scope)

    gate = scope["gate"]
    signals = Signals(
        ema=torch.tensor([[0.5, 4.0, torch.nan, 5.0]]),
        teacher=torch.tensor([[1.0, 2.0, 3.0, 9.0]]),
        slot=torch.arange(4)[None],
        sample_id=torch.zeros(1, 1, dtype=torch.int64),
        step=0,
    )
    score = gate.policy.score(signals)
    assert torch.equal(score.nan_to_num(-1), torch.tensor([[0.5, 2.0, -1, 0.0]]))
    assert gate.state_dict()["settings"]["policy.limit"] == 6.0


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
