"""What a user is told while a first call compiles."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
import torch
from small_models import build

import regate_fx
from regate_fx.waiting import Waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    # Between a fixture and its test pytest sets `sys.stderr` itself.
    monkeypatch.setattr("regate_fx.waiting.sys", SimpleNamespace(stderr=found))
    return found


def test_stages_are_shown_at_a_terminal(screen: Terminal) -> None:
    waiting = Waiting()
    waiting.tell("capturing Llama")
    waiting.tell("compiling a graph of 4 layers by inductor")
    waiting.over()
    first, second, third = screen.getvalue().splitlines()
    assert first == "regate_fx: capturing Llama ..."
    assert second == "regate_fx: compiling a graph of 4 layers by inductor ..."
    assert third.startswith("regate_fx: this call took ")


def test_a_call_without_stages_says_nothing(screen: Terminal) -> None:
    Waiting().over()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("why", ["no terminal", "switched off", "another process"])
def test_nothing_is_shown_elsewhere(why: str, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no terminal":
        monkeypatch.setattr(screen, "isatty", lambda: False)
    if why == "another process":
        monkeypatch.setenv("LOCAL_RANK", "1")
    if why == "switched off":
        monkeypatch.setattr("regate_fx.waiting.is_progress_bar_enabled", lambda: False)
    waiting = Waiting()
    waiting.tell("capturing Llama")
    waiting.over()
    assert screen.getvalue() == ""


def test_a_closed_standard_error_is_no_reason_to_stop(screen: Terminal) -> None:
    screen.close()
    waiting = Waiting()
    waiting.tell("capturing Llama")
    waiting.over()


@pytest.mark.parametrize("scope", ["model", "layers"])
def test_a_first_call_logs_its_stages_and_later_ones_nothing(
    scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", scope=scope)
    ids = torch.randint(3, 90, (2, 9))
    call = {"input_ids": ids, "labels": ids, "token_mask": torch.rand(2, 9) < 0.7}
    caplog.set_level(logging.INFO, logger="regate_fx")
    gated(**call)
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"capturing {type(model).__name__} ..."
    compiling = "compiling a graph of 2 layers by eager ..." if scope == "model" else "compiling part 1 of"
    assert any(line.startswith(compiling) for line in told)
    assert "comparing with the untouched model ..." in told
    assert told[-1].startswith("this call took")
    caplog.clear()
    gated(**call)
    assert caplog.records == []


def test_a_failed_call_ends_its_stages(screen: Terminal) -> None:
    gated = regate_fx.compile(build("llama"), backend="no such backend")
    ids = torch.randint(3, 90, (2, 9))
    with pytest.raises(Exception, match="no such backend"):
        gated(input_ids=ids, labels=ids, token_mask=torch.rand(2, 9) < 0.7)
    assert screen.getvalue().splitlines()[-1].startswith("regate_fx: this call took")
