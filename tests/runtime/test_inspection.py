"""`regate-fx inspect`: its numbers against selection itself, its page against a parser, and its errors."""

from __future__ import annotations

import html.parser
import io
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_models import build
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from regate_fx import cli
from regate_fx.errors import StoreMismatch
from regate_fx.inspection.data import TokenTexts
from regate_fx.inspection.page import render
from regate_fx.inspection.run import open_run, read_state
from regate_fx.inspection.statistics import TokenMeans, hardest_and_easiest, labels_of, spread
from regate_fx.inspection.terminal import sample_panel, visible
from regate_fx.inspection.tokens import SampleView, SampleViewer, Standing
from regate_fx.runtime import DualCycle, ReGate, Signals, policies, teacher_losses
from regate_fx.runtime.shared_difficulty import pack

PAD, END, IMAGE = 0, 2, 3
NASTY = {5: "<script>alert(1)</script>", 6: "\"'&<b>", 7: "\n", 8: "</span>", 9: "\x1b[31m"}
WORDS = {**{i: f"w{i}" for i in range(97)}, **NASTY}
SAMPLES = (3, 11, 12, 40)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    S = max(len(row["input_ids"]) for row in rows) + 2

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[*row[name], *[fill] * (S - len(row[name]))] for row in rows])

    ids = padded("input_ids", PAD)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != PAD).long()}


def with_processor(rows: list[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
    assert processor.pad_token == "w0"
    return collate(rows)


@dataclass(frozen=True)
class Last:
    """A policy of one's own."""

    def score(self, signals: Signals) -> Tensor:
        return signals.label.double()


LAST = Last()


def example(sample_id: int) -> dict[str, Any]:
    """A prompt of two images and a word, then an answer with every nasty word."""
    words = [4, 5, 6, 7, 8, 9, 10 + sample_id % 7, 20 + sample_id % 5, 5, END]
    prompt = [IMAGE, IMAGE, 30]
    return {"sample_id": sample_id, "input_ids": prompt + words, "labels": [-100] * len(prompt) + words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, the checkpoint of a gate, the data set and the tokenizer that belong to it."""
    folder = tmp_path_factory.mktemp("run")
    data = [example(sample_id) for sample_id in SAMPLES]
    arguments = {"collator": collate, "special_ids": [END], "visual_ids": [IMAGE], "placeholder_id": PAD}
    losses = teacher_losses(build("llama"), data, folder / "store", **arguments, progress=False)
    gate = ReGate(losses, schedule=DualCycle(keep=0.4))
    ema = torch.rand(gate.difficulty.ema.shape, generator=torch.Generator().manual_seed(0))
    gate.difficulty.load(ema.where(ema > 0.2, torch.nan))
    gate.global_step = 1234
    torch.save(gate.state_dict(), folder / "gate.pt")
    (folder / "checkpoint-5").mkdir()
    gate.save(folder / "checkpoint-5" / "regate.safetensors")
    rows = datasets.Dataset.from_list(data)
    rows.save_to_disk(folder / "data")
    datasets.DatasetDict({"train": rows}).save_to_disk(folder / "all")
    rows.to_parquet(folder / "rows.parquet")
    words = models.WordLevel({word: i for i, word in WORDS.items()}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def viewer(folder: Path, *names: str, **arguments: Any) -> SampleViewer:
    run = open_run([folder / name for name in names or ("store", "gate.pt")])
    assert run.losses is not None
    return SampleViewer(run, run.losses, **{"collator": collate, **arguments})


def view(folder: Path, sample_id: int = 11, **arguments: Any) -> SampleView:
    texts = TokenTexts(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    return viewer(folder, **arguments).whole(example(sample_id), texts)


@pytest.mark.parametrize("keep", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("policy", [None, "random", "rho1", LAST])
def test_kept_is_what_training_would_keep(folder: Path, keep: float | None, policy: Any) -> None:
    run = open_run([folder / "store", folder / "gate.pt"])
    schedule = DualCycle(keep=0.4 if keep is None else keep, warmup=0, cycle=1, dense=0)
    gate = ReGate(run.losses, schedule=schedule, policy=policy or "regate", collator=collate)
    gate.difficulty.load(run.state.ema)
    gate.global_step = run.state.step
    for sample_id in SAMPLES:
        mask = gate.select(gate.collate([example(sample_id)]))[0]
        seen = view(folder, sample_id, keep=keep, policy=policy)
        labels = example(sample_id)["labels"]
        assert [token.position for token in seen.tokens] == list(range(len(labels)))
        for token in seen.tokens:
            t = token.position
            if labels[t] == -100:
                assert token.standing is (Standing.VISUAL if t < 2 else Standing.PROMPT)
                continue
            assert token.computed == bool(mask[t])
            assert token.counted == bool(mask[t - 1])
            assert (token.standing is Standing.DROPPED) == (not token.counted)
        assert seen.kept == math.ceil(schedule.keep * seen.competing)


def test_standing_and_reason_of_each_label(folder: Path) -> None:
    seen = view(folder)
    standings = [token.standing for token in seen.labels]
    assert standings[0] is Standing.FREE
    assert standings[-1] is Standing.SPECIAL
    assert seen.competing == len(seen.labels) - 2
    competing = sorted((token for token in seen.labels if token.rank), key=lambda token: token.rank)
    assert [token.rank for token in competing] == list(range(1, seen.competing + 1))
    assert [token.score for token in competing] == sorted((t.score for t in competing), reverse=True)
    assert [t.standing is Standing.KEPT for t in competing] == [t.rank <= seen.kept for t in competing]
    last = competing[-1]
    assert seen.reason(last) == (
        f"Dropped: rank {seen.competing} of {seen.competing} by regate, and the first {seen.kept} are kept."
    )
    assert seen.reason(seen.tokens[0]) == "Stands for a picture: always computed."


def test_without_the_data_labels_have_numbers(folder: Path) -> None:
    bare, whole = viewer(folder).bare(11), view(folder)
    assert {token.standing for token in bare.tokens} == {Standing.LABEL}
    for one, other in zip(bare.tokens, whole.labels, strict=True):
        assert (one.reference, one.ema, one.score) == (other.reference, other.ema, other.score)
    assert "can be told with the data set" in bare.reason(bare.tokens[0])
    without_state = viewer(folder, "store").bare(11)
    assert all(token.ema is None for token in without_state.tokens)
    assert [t.reference for t in without_state.tokens] == [t.reference for t in bare.tokens]


def test_what_one_rank_observed_last_is_seen(folder: Path, tmp_path: Path) -> None:
    """The state of a run with several ranks has, beside the shared table, what they have not exchanged yet."""
    state = torch.load(folder / "gate.pt", weights_only=True)
    observed = [(torch.tensor([1]), torch.tensor([7.0])), (torch.tensor([1, 2]), torch.tensor([8.0, 9.0]))]
    torch.save({**state, "pending": pack(observed)}, tmp_path / "gate.pt")
    found = read_state(tmp_path / "gate.pt").ema
    assert found[[1, 2]].tolist() == [7.0, 9.0]
    assert torch.equal(found[3:].nan_to_num(-1), state["ema"][3:].nan_to_num(-1))


@pytest.mark.parametrize(
    "changed",
    [
        {"ema": [1.0]},
        {"ema": 3},
        {"pending": b"nothing"},
        {"pending": None},
        {"pending": pack([(torch.tensor([10**6]), torch.tensor([1.0]))])},
        {"global_step": "many"},
        {"settings": None},
    ],
)
def test_a_state_that_holds_something_else(folder: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    state = torch.load(folder / "gate.pt", weights_only=True)
    torch.save(state | changed, tmp_path / "gate.pt")
    with pytest.raises(StoreMismatch, match=r"gate\.pt: it is no saved state of a gate"):
        read_state(tmp_path / "gate.pt")


def test_a_label_that_nothing_predicts(folder: Path, tmp_path: Path) -> None:
    row = {"sample_id": 0, "input_ids": [4, 5, 6], "labels": [4, 5, 6]}
    teacher_losses(
        build("llama"), [row], tmp_path / "store", collator=collate, placeholder_id=PAD, progress=False
    )
    seen = viewer(tmp_path, "store").whole(row, TokenTexts())
    assert seen.labels[0].standing is Standing.UNPREDICTED
    assert seen.reason(seen.labels[0]) == "No position predicts it: never in the loss."
    assert not seen.labels[0].counted


def test_a_batch_of_embeddings_has_no_prompt_to_show(folder: Path) -> None:
    def embedded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        batch["inputs_embeds"] = torch.zeros(*batch.pop("input_ids").shape, 4)
        return batch

    texts = TokenTexts(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    seen = viewer(folder, collator=embedded).whole(example(11), texts)
    assert [token.text.strip() for token in seen.tokens[:4]] == ["[no id]", "[no id]", "[no id]", "w4"]


class Page(html.parser.HTMLParser):
    """What a browser would make of a page."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(self.tags[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        described = self._open[-1][1].get("aria-describedby") if self._open else None
        if described:
            self.texts[described] = self.texts.get(described, "") + data


def test_the_page_shows_every_label_once_and_runs_nothing(folder: Path) -> None:
    views = [view(folder, 11), view(folder, 12)]
    text = render(views, "Tokens of <store>")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "p",
            "br",
            "section",
            "div",
            "span",
            "b",
        ),
        *("details", "summary", "table", "thead", "tbody", "tr", "th", "td"),
    }
    assert not any(
        name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs
    )
    assert "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == sum(len(seen.labels) for seen in views)
    tokens = [attributes for _, attributes in page.tags if attributes.get("aria-describedby")]
    assert [attributes["aria-describedby"] for attributes in tokens] == ids
    assert all(attributes["tabindex"] == "0" for attributes in tokens)
    for seen in views:
        for token in seen.labels:
            name = f"{seen.sample_id}-{token.position}"
            assert page.texts[name] == visible(token.text)
            (attributes,) = (found for found in tokens if found["aria-describedby"] == name)
            assert str(token.standing) in attributes["class"].split()
            assert seen.reason(token) in text
    rows = sum(tag == "tr" for tag, _ in page.tags)
    assert rows == sum(len(seen.labels) + 1 for seen in views)
    assert text.count("[2 visual tokens]") == text.count("[1 prompt token]") == 2


def test_texts_of_tokens_are_not_markup(folder: Path) -> None:
    texts = {visible(token.text).strip() for token in view(folder).labels}
    assert {"<script>alert(1)</script>", "\"'&<b>", "⏎", "</span>", "\\x1b[31m"} <= texts
    written = render([view(folder)], "x")
    assert "<script" not in written
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in written


def test_the_terminal_shows_the_same(folder: Path) -> None:
    seen = view(folder)
    console = Console(width=200, file=io.StringIO())
    console.print(sample_panel(seen))
    shown = console.file.getvalue()
    assert f"{seen.kept} of the {seen.competing} labels that compete are kept" in shown
    assert "[2 visual tokens]" in shown and "[1 prompt token]" in shown
    for token in seen.labels:
        wrapped = f"⟦{visible(token.text)}⟧" in shown
        assert wrapped == any(
            other.text == token.text and other.standing is Standing.DROPPED for other in seen.labels
        )
    assert "\x1b[31m" not in shown


values = st.lists(st.none() | st.integers(0, 64).map(lambda n: n / 8), max_size=30)


def tensor(numbers: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in numbers])


@given(numbers=values)
def test_spread(numbers: list[float | None]) -> None:
    known = sorted(value for value in numbers if value is not None)
    found = spread(tensor(numbers))
    assert (found.count, found.known) == (len(numbers), len(known))
    if known:
        assert found.mean == pytest.approx(sum(known) / len(known))
        assert (found.quantiles[0], found.quantiles[-1]) == (known[0], known[-1])
        middle = known[(len(known) - 1) // 2], known[len(known) // 2]
        assert found.quantiles[3] == sum(middle) / 2
        assert sum(found.heights) == len(known)


@given(
    rows=st.lists(
        st.tuples(st.integers(4, 7), st.integers(0, 9), st.none() | st.integers(0, 9)), max_size=20
    ),
    by=st.sampled_from(["reference", "ema", "excess"]),
)
def test_means_of_tokens(rows: list[tuple[int, int, int | None]], by: str) -> None:
    means = TokenMeans()
    for token, reference, ema in rows:
        means.add(torch.tensor([token]), tensor([reference]), tensor([ema]))
    expected = {}
    for token in {token for token, _, _ in rows}:
        own = [(reference, ema) for other, reference, ema in rows if other == token]
        known = {
            "reference": [reference for reference, _ in own],
            "ema": [ema for _, ema in own if ema is not None],
            "excess": [ema - reference for reference, ema in own if ema is not None],
        }[by]
        if len(own) >= 2 and known:
            expected[str(token)] = sum(known) / len(known)
    hardest, easiest = means.hardest_and_easiest(by, 2, str)
    shown = {extreme.name: extreme.value for extreme in [*hardest, *easiest]}
    assert len(shown) == len(hardest) + len(easiest) == min(4, len(expected))
    for name, value in shown.items():
        assert value == pytest.approx(expected[name])
    ordered = sorted(expected.values(), reverse=True)
    assert [extreme.value for extreme in hardest] == pytest.approx(ordered[: len(hardest)])
    assert [extreme.value for extreme in easiest] == pytest.approx(ordered[::-1][: len(easiest)])


def test_single_labels_are_named_by_sample_and_number(folder: Path) -> None:
    run = open_run([folder / "store"])
    labels = labels_of(run.losses, None)
    hardest, _ = hardest_and_easiest(labels, "reference", 1)
    at = int(run.losses.losses.argmax())
    row = int(torch.searchsorted(run.losses.starts, at, right=True)) - 1
    assert hardest[0].name == f"sample {SAMPLES[row]}, label {at - int(run.losses.starts[row])}"
    assert len(labels_of(run.losses, None, most=2).sample_id.unique()) == 2


def test_texts_of_a_sequence() -> None:
    class Joining:
        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    assert TokenTexts(Joining()).of_sequence([1, 2]) == ["w1", " w2"]
    assert TokenTexts().of_sequence([1]) == ["#1 "]


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names of the command line are looked up in the working folder, and in this module."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "my_training", sys.modules[__name__])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


DATA = ("--data", "data", "--collator", "my_training:collate")


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(here: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = inspect(
        *("store", "gate.pt", *DATA, "--tokenizer", "tokenizer", "--sample", "12", "--sample", "3"),
        *("--html", str(page), "--top", "3"),
    )
    assert "Checkpoint after 1,234 optimizer steps." in shown
    assert "Sample 12" in shown and "Sample 3 " in shown
    assert "share 0.4" in shown  # the checkpoint's own
    assert "w4" in shown
    assert "Hardest and easiest repeated tokens by excess" in shown
    assert Page(page.read_text()).tags


@pytest.mark.parametrize("options", [[], ["--collator", "my_training:with_processor"]])
@pytest.mark.parametrize("data", ["all", "rows.parquet"])
def test_data_are_named_as_for_the_teacher(here: Path, data: str, options: list[str]) -> None:
    shown = inspect("store", "--data", data, "--processor", "tokenizer", "--sample", "11", *options)
    assert re.search(r"Sample 11 .*share 0.5", shown)
    assert "w14" in shown and "w21" in shown


def test_samples_without_an_id_are_numbered(folder: Path, tmp_path: Path) -> None:
    rows = [{name: value for name, value in example(3).items() if name != "sample_id"}]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.json")
    numbered = [{"sample_id": 0, **rows[0]}]
    teacher_losses(
        build("llama"), numbered, tmp_path / "store", collator=collate, placeholder_id=PAD, progress=False
    )
    arguments = ["--data", str(tmp_path / "rows.json"), "--tokenizer", str(folder / "tokenizer")]
    assert "Sample 0 " in inspect(str(tmp_path / "store"), *arguments, "--number")


def test_the_folder_of_a_checkpoint(here: Path) -> None:
    for arguments in (["store", "checkpoint-5"], ["checkpoint-5/regate.safetensors", "store"]):
        shown = inspect(*arguments, "--sample", "12")
        assert "Checkpoint after 1,234 optimizer steps." in shown
        assert "share 0.4" in shown
    assert "student's running mean" in inspect("checkpoint-5")


def test_the_command_with_less(here: Path) -> None:
    shown = inspect("store")
    assert "Hardest and easiest labels by teacher's loss" in shown
    assert "Sample 3 " in shown
    assert "student's running mean" not in shown
    shown = inspect("gate.pt")
    assert "student's running mean" in shown
    assert f"{10 * len(SAMPLES)}" in shown
    assert "policy Last" in inspect("store", *DATA, "--policy", "my_training:LAST", "--keep", "0.2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data"],
            r"data: it holds neither manifest\.json, as a store does, nor regate\.safetensors, as a ch",
        ),
        (["nowhere"], r"nowhere: there is nothing\."),
        (["store", "store"], r"paths: name 2 stores\."),
        (["gate.pt", "--sample", "3"], r"paths: name no store to look samples up in\."),
        (["store", "other.pt"], r"other\.pt: it belongs to other reference losses than those in store"),
        (["broken.pt"], r"broken\.pt: it is no saved state of a gate \(UnpicklingError\)"),
        (["weights.pt"], r"weights\.pt: it is no saved state of a gate \(KeyError\)"),
        (["store", "--sample", "99"], r"sample_id: \[99\] are not among the 4 samples"),
        (["store", *DATA, "--sample", "99"], r"sample: 99 is not in the data\."),
        (["store", "--data", "./nothing"], r"data: \./nothing is not there\."),
        (["store", "--data", "gate.pt"], r"data: gate\.pt is none of \['\.csv', '\.json'"),
        (
            ["store", "--data", "broken.json"],
            r"data: broken\.json cannot be read: .* Give a folder of save_to_disk",
        ),
        (["store", "--data", "all", "--split", "test"], r"split: is 'test', the data set has \['train'\]"),
        (["store", "--data", "no_ids.json"], r"sample_id: is no column of no_ids\.json, which has \['input_"),
        (["store", *DATA[:2], "--collator", "my_training:with_processor"], r"processor: is needed by my_tra"),
        (
            ["store", "--data", "relabelled.json", *DATA[2:]],
            r"sample_id: the labels of sample 3 are not those",
        ),
        (["store", *DATA[:2], "--collator", "collate"], r"collator: is 'collate'\. Give module:object"),
        (["store", *DATA[:2], "--collator", "nowhere:f"], r"collator: 'nowhere:f' cannot be imported"),
        (
            ["store", *DATA[:2], "--collator", "my_training:f"],
            r"collator: 'my_training:f' cannot be imported",
        ),
        (["store", "--tokenizer", "data"], r"processor: cannot be loaded from 'data'"),
        (["store", "--policy", "best"], r"policy: is 'best'\."),
        (["store", "own.pt"], r"policy: of the run is 'Last', one of your own\. Name it as module:object\."),
        (["store", "--keep", "1.5"], r"keep: is 1\.5\."),
        (["store", "--html", "nowhere/page.html"], r"html: nowhere/page\.html cannot be written"),
    ],
)
def test_what_is_refused(here: Path, arguments: list[str], message: str) -> None:
    state = torch.load(here / "gate.pt", weights_only=True)
    torch.save({**state, "fingerprint": "another"}, here / "other.pt")
    torch.save({**state, "settings": policies.policy_settings(LAST)}, here / "own.pt")
    torch.save({"weight": torch.ones(1)}, here / "weights.pt")
    for name in ("broken.pt", "broken.json"):
        (here / name).write_bytes(b"nothing of the kind")
    row = example(3)
    rows = datasets.Dataset.from_list([row])
    rows.remove_columns("sample_id").to_json(here / "no_ids.json")
    datasets.Dataset.from_list([{**row, "labels": row["labels"][::-1]}]).to_json(here / "relabelled.json")
    result = CliRunner().invoke(cli.app, ["inspect", *arguments])
    assert result.exit_code == 1
    assert re.search(
        rf"^(InvalidInput|StoreMismatch) \S*{message}", result.stderr, re.MULTILINE | re.DOTALL
    ), result.stderr
