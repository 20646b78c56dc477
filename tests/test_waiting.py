"""What a user is told while a first call compiles."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from rich.console import Console
from small_models import build

import regate_fx
from regate_fx.waiting import Waiting


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_are_shown_at_a_terminal(screen: Console) -> None:
    waiting = Waiting(screen)
    waiting.tell("capturing Llama")
    waiting.tell("compiling a graph of 4 layers by inductor")
    waiting.over()
    assert "regate_fx: capturing Llama" in shown(screen)
    assert "compiling a graph of 4 layers by inductor" in shown(screen)


@pytest.mark.parametrize("why", ["no terminal", "switched off", "another process"])
def test_nothing_is_shown_elsewhere(why: str, screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO()) if why == "no terminal" else screen
    if why == "another process":
        monkeypatch.setenv("LOCAL_RANK", "1")
    if why == "switched off":
        monkeypatch.setattr("regate_fx.waiting.is_progress_bar_enabled", lambda: False)
    waiting = Waiting(console)
    waiting.tell("capturing Llama")
    waiting.over()
    assert shown(console) == ""


def test_what_the_model_prints_goes_where_it_always_goes(screen: Console) -> None:
    waiting, before = Waiting(screen), sys.stdout
    waiting.tell("capturing Llama")
    assert sys.stdout is before
    waiting.over()


@pytest.mark.parametrize("scope", ["model", "layers"])
def test_a_first_call_logs_its_stages_and_later_ones_nothing(
    scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", scope=scope)
    ids = torch.randint(1, 20, (2, 9))
    call = {"input_ids": ids, "labels": ids, "token_mask": torch.rand(2, 9) < 0.7}
    caplog.set_level(logging.INFO, logger="regate_fx")
    gated(**call)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert f"capturing {type(model).__name__} took" in told
    compiling = "compiling a graph of 2 layers by eager" if scope == "model" else "compiling part 1 of"
    assert compiling in told
    assert "comparing with the untouched model took" in told
    caplog.clear()
    gated(**call)
    assert caplog.records == []


def test_a_failed_call_leaves_no_line_behind(screen: Console) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="no such backend")
    gated._regate.engine.waiting._console = screen
    ids = torch.randint(1, 20, (2, 9))
    with pytest.raises(Exception, match="no such backend"):
        gated(input_ids=ids, labels=ids, token_mask=torch.rand(2, 9) < 0.7)
    assert gated._regate.engine.waiting._line is None
    assert "capturing" in shown(screen)
