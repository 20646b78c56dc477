"""The gate inside a model's forward, and beside it in a loop of one's own.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from collated import reference_of
from restatement import NO_LABEL, Token
from small_models import FIRST_WORD, VOCABULARY, build
from torch import Tensor
from torch.utils.data import DataLoader

import regate_fx
from regate_fx.errors import InvalidInput, StoreMismatch, Unsupported
from regate_fx.runtime import DualCycle, ReferenceLosses, ReGate
from regate_fx.runtime.samples import Samples

END = 2
SPARSE = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)


@pytest.fixture
def docs(generator: torch.Generator) -> dict[int, list[Token]]:
    """Prompts and answers by sample id, with random reference losses."""
    found = {}
    for sample_id in (4, 11, 12, 30):
        length = int(torch.randint(9, 14, (), generator=generator))
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()
        refs = torch.rand(length, generator=generator).tolist()
        prompt = [Token(token) for token in ids[:3]]
        words = [Token(token, token, ref) for token, ref in zip(ids[3:], refs[3:], strict=True)]
        found[sample_id] = [*prompt, *words, Token(END, END, 0.0)]
    return found


@pytest.fixture
def losses(docs: dict[int, list[Token]]) -> ReferenceLosses:
    return reference_of(docs)


def examples(docs: dict[int, list[Token]]) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": sample_id,
            "input_ids": [token.id for token in tokens],
            "labels": [token.label for token in tokens],
        }
        for sample_id, tokens in docs.items()
    ]


def pad_right(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that knows nothing of sample ids."""
    assert all("sample_id" not in row for row in rows)
    S = max(len(row["input_ids"]) for row in rows)
    batch = {name: [] for name in ("input_ids", "labels", "attention_mask")}
    for row in rows:
        fill = S - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [1] * fill)
        batch["labels"].append(row["labels"] + [NO_LABEL] * fill)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * fill)
    return {name: torch.tensor(values) for name, values in batch.items()}


def batches(gate: ReGate, docs: dict[int, list[Token]]) -> Iterator[dict[str, Any]]:
    yield from DataLoader(examples(docs), batch_size=2, collate_fn=gate.collate)


def make(losses: ReferenceLosses, **arguments: Any) -> ReGate:
    return ReGate(losses, **{"schedule": SPARSE, "special_ids": [END], "collator": pad_right, **arguments})


def plain_ids(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as a loader without `gate.collate` gives it."""
    return batch | {"sample_id": batch["sample_id"].ids[:, 0]}


def test_in_the_forward_is_what_a_loop_of_ones_own_does(docs: Any, losses: Any) -> None:
    inside, beside = make(losses), make(losses)
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", gate=inside)
    by_hand = regate_fx.compile(copy.deepcopy(model), backend="eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (gated, by_hand)]
    for _ in range(2):
        for batch in batches(inside, docs):
            out = gated(**batch)
            mask = beside.select(batch)
            inputs = {name: value for name, value in batch.items() if name != "sample_id"}
            expected = by_hand(**inputs, token_mask=mask)
            beside.observe(batch, expected)
            assert torch.equal(out.loss, expected.loss)
            assert torch.equal(out.counted, expected.counted)
            assert 0 < int(out.counted.sum()) < int((batch["labels"] != NO_LABEL).sum())
            for result, optimizer in zip((out, expected), optimizers, strict=True):
                result.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            beside.step()
    assert beside.global_step == 4
    assert inside.global_step == 3  # the fourth is noticed by the next forward
    assert torch.equal(inside.difficulty.ema.nan_to_num(-1), beside.difficulty.ema.nan_to_num(-1))


def test_plain_ids_select_the_same(docs: Any, losses: Any) -> None:
    gate = make(losses)
    for batch in batches(gate, docs):
        assert isinstance(batch["sample_id"], Samples)
        assert torch.equal(gate.select(plain_ids(batch)), gate.select(batch))


def test_what_is_counted_is_what_was_selected(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    for batch in batches(gate, docs):
        choice = gate.choose(batch)
        out = gated(**batch)
        predicted = choice.token_mask.roll(1, dims=1) & (batch["labels"] != NO_LABEL)
        assert torch.equal(out.counted, predicted)
        assert choice.samples.counts.counted(choice.ratio) == int(out.counted.sum())
        assert torch.equal(out.token_loss > 0, out.counted)
        seen = gate.difficulty.look_up(choice.samples.slot)
        assert torch.equal(seen[out.counted], out.token_loss[out.counted])
        assert seen[~out.counted].isnan().all()


def test_steps_are_those_of_the_optimizer(docs: Any, losses: Any) -> None:
    gate = make(losses, schedule=DualCycle(keep=0.5, warmup=1, cycle=1, dense=0))
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    optimizer = torch.optim.AdamW(gated.parameters())
    batch = next(batches(gate, docs))
    for step, accumulated in ((0, 3), (1, 2), (2, 1)):
        for _ in range(accumulated):
            out = gated(**batch)
            assert gate.global_step == step
            assert bool(out.counted.sum() == (batch["labels"] != NO_LABEL).sum()) == (step == 0)
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gate.step()  # the user counts the third one himself
    gated(**batch)
    assert gate.global_step == 3


def test_a_loss_over_several_batches_is_the_mean_over_their_counted_labels(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    window = list(batches(gate, docs))
    items = torch.tensor(gate.count_labels(window))
    outs = [gated(**batch, num_items_in_batch=items) for batch in window]
    counted = sum(int(out.counted.sum()) for out in outs)
    assert int(items) == counted < sum(int((batch["labels"] != NO_LABEL).sum()) for batch in window)
    torch.testing.assert_close(
        sum(out.loss for out in outs), sum(out.token_loss.sum() for out in outs) / counted
    )


def test_a_number_of_labels_holds_for_its_batches_and_its_step_only(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    first, second = batches(gate, docs)
    items = torch.tensor(gate.count_labels([first]))
    gated(**first, num_items_in_batch=items)
    refusal = "num_items_in_batch with a gate is not supported: it was not counted by the gate for this batch"
    for other in (second, plain_ids(first)):
        with pytest.raises(Unsupported, match=refusal):
            gated(**other, num_items_in_batch=items)
    gate.step()
    with pytest.raises(Unsupported, match=refusal):
        gated(**first, num_items_in_batch=items)
    with pytest.raises(InvalidInput, match=r"sample_id: is Tensor in a batch .* Collate with gate\.collate"):
        gate.count_labels([plain_ids(first)])


@pytest.mark.parametrize("align", ["token", "both"])
def test_labels_cannot_be_counted_before_their_mask_is_known(docs: Any, losses: Any, align: Any) -> None:
    gate = make(losses, align=align)
    with pytest.raises(
        Unsupported, match=f"align='{align}' is not supported: which labels count is known when"
    ):
        gate.count_labels(list(batches(gate, docs)))
    dense = make(losses, align=align, schedule=DualCycle())
    assert dense.count_labels(list(batches(dense, docs))) == sum(
        int((batch["labels"][:, 1:] != NO_LABEL).sum()) for batch in batches(dense, docs)
    )


def test_a_step_before_the_labels_are_counted_is_noticed(docs: Any, losses: Any) -> None:
    gate = make(losses, schedule=DualCycle(keep=0.5, warmup=1, cycle=1, dense=0))
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    optimizer = torch.optim.AdamW(gated.parameters())
    batch = next(batches(gate, docs))
    for _ in range(2):
        items = torch.tensor(gate.count_labels([batch]))
        out = gated(**batch, num_items_in_batch=items)
        assert int(out.counted.sum()) == int(items)
        out.loss.backward()
        optimizer.step()
    assert int(items) < int((batch["labels"] != NO_LABEL).sum())


def test_a_gate_can_be_given_later(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", validate=False)
    assert gated.gate is None
    gated.gate = gate
    out = gated(**next(batches(gate, docs)))
    assert bool(out.counted.any())
    assert gated.gate is gate


def test_watchers_see_every_choice_and_stay_with_the_gate(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    seen: list[tuple[Any, Any]] = []
    gate.watchers.append(lambda choice, output: seen.append((choice, output)))
    outs = [gated(**batch) for batch in batches(gate, docs)]
    assert [output for _, output in seen] == outs
    assert pickle.loads(pickle.dumps(gated)).gate.watchers == []


def test_evaluation_neither_selects_nor_observes(docs: Any, losses: Any) -> None:
    gate = make(losses)
    model = build("llama").eval()
    gated = regate_fx.compile(model, backend="eager", gate=gate)
    batch = next(batches(gate, docs))
    inputs = {name: value for name, value in batch.items() if name != "sample_id"}
    with torch.no_grad():
        expected = model(**inputs)
        for given in (batch, inputs):
            out = gated(**given)
            assert torch.equal(out.loss, expected.loss)
            assert torch.equal(out.logits, expected.logits)
    assert gated.report is None
    assert gate.difficulty.ema.isnan().all()


def test_switched_off_it_is_the_untouched_model(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    gated.gating = False
    out = gated(**next(batches(gate, docs)))
    assert out.logits is not None
    assert gate.difficulty.ema.isnan().all()


def test_a_training_batch_without_ids_is_refused(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    batch = next(batches(gate, docs))
    del batch["sample_id"]
    with pytest.raises(InvalidInput, match="sample_id: is missing from the batch"):
        gated(**batch)
    with pytest.raises(InvalidInput, match="sample_id: is missing from the batch"):
        gated(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert gated(batch["input_ids"], batch["attention_mask"]).logits is not None


def test_ids_that_the_teacher_never_saw(docs: Any, losses: Any) -> None:
    gate = make(losses)
    batch = plain_ids(next(batches(gate, docs)))
    with pytest.raises(InvalidInput, match=r"sample_id: \[99\] are not among the 4 samples"):
        gate.select(batch | {"sample_id": torch.tensor([4, 99])})
    with pytest.raises(InvalidInput, match=r"sample_id: \[-1\] are not among"):
        gate.select(batch | {"sample_id": torch.tensor([4, -1])})


def test_labels_that_the_teacher_did_not_see(docs: Any, losses: Any) -> None:
    gate = make(losses)
    batch = plain_ids(next(batches(gate, docs)))
    ids = batch["sample_id"].tolist()
    with pytest.raises(InvalidInput, match=f"sample_id: the labels of sample {ids[1]} are not those"):
        gate.select(batch | {"sample_id": batch["sample_id"].flip(0)})
    other = batch["labels"].clone()
    other[1, 5] = FIRST_WORD if other[1, 5] != FIRST_WORD else FIRST_WORD + 1
    with pytest.raises(InvalidInput, match=f"the labels of sample {ids[1]} are not those"):
        gate.select(batch | {"labels": other})
    truncated = {name: value[:, :8] if value.dim() == 2 else value for name, value in batch.items()}
    with pytest.raises(InvalidInput, match=r"5 labels in the batch, .* with the teacher; 2 such samples"):
        gate.select(truncated)


@pytest.mark.parametrize(
    "ids", [torch.tensor([4.0, 11.0]), torch.tensor([4]), torch.tensor([[4], [11]]), torch.tensor(4)]
)
def test_ids_of_another_shape_or_dtype(docs: Any, losses: Any, ids: Tensor) -> None:
    gate = make(losses)
    batch = next(batches(gate, docs)) | {"sample_id": ids}
    with pytest.raises(InvalidInput, match="sample_id: is torch"):
        gate.select(batch)


def test_a_batch_changed_after_it_was_collated(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    batch = next(batches(gate, docs))
    with pytest.raises(InvalidInput, match="sample_id: was collated for labels"):
        gated(**(batch | {"labels": batch["labels"][:, :-1]}))
    mask = batch["attention_mask"].clone()
    mask[0, 0] = 0
    with pytest.raises(InvalidInput, match="token_mask: was counted as"):
        gated(**(batch | {"attention_mask": mask}))


def test_rows_that_changed_places_after_they_were_collated(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    batch = next(batches(gate, docs))
    samples = batch["sample_id"]
    moved = {name: value if name == "sample_id" else value.flip(0) for name, value in batch.items()}
    problem = (
        rf"sample_id: row 0 of the batch holds other tokens .* for sample {int(samples.ids[0, 0])} \(2 such"
    )
    for call in (lambda: gated(**moved), lambda: gate.select(moved), lambda: gate.observe(moved, None)):
        with pytest.raises(InvalidInput, match=problem):
            call()
    ids_only = batch | {"input_ids": batch["input_ids"].flip(0)}
    with pytest.raises(InvalidInput, match=problem):
        gate.select(ids_only)
    assert gate.difficulty.ema.isnan().all()
    del batch["input_ids"]  # a loop of one's own may select with the labels alone
    assert gate.select(batch).any()


def test_a_wrong_row_is_not_observed_where_its_error_comes_later(docs: Any, losses: Any) -> None:
    """As on an accelerator, which nobody waits for."""
    gate = make(losses, schedule=DualCycle())
    batch = next(batches(gate, docs))
    wrong = batch | {"labels": batch["labels"].clone()}
    wrong["labels"][1, -2] += 1
    samples = batch["sample_id"]
    seen = samples.without(samples.other_rows(wrong)).observed
    assert torch.equal(seen[0], samples.observed[0]) and seen[0].any()
    assert not seen[1].any()


def test_an_example_without_id(losses: Any) -> None:
    with pytest.raises(InvalidInput, match=r"sample_id: is missing from an example with \['input_ids'\]"):
        make(losses).collate([{"input_ids": [1]}])


def test_labels_are_needed(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    batch = next(batches(gate, docs))
    del batch["labels"]
    with pytest.raises(InvalidInput, match="labels: selection needs them"):
        gated(**batch)


def test_a_mask_beside_the_gate_is_refused(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate)
    batch = next(batches(gate, docs))
    mask = torch.ones_like(batch["labels"], dtype=torch.bool)
    with pytest.raises(InvalidInput, match="token_mask: was given together with sample_id"):
        gated(**batch, token_mask=mask)
    with pytest.raises(Unsupported, match="num_items_in_batch with a gate"):
        gated(**batch, num_items_in_batch=5)
    del batch["sample_id"]
    assert torch.equal(gated(**batch, token_mask=mask).counted, batch["labels"] != NO_LABEL)


def test_a_model_that_pairs_labels_otherwise(docs: Any, losses: Any) -> None:
    gate = make(losses, shifted=False)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    with pytest.raises(InvalidInput, match=r"shifted: is False, but .* shifted=True"):
        gated(**next(batches(gate, docs)))
    assert gate.difficulty.ema.isnan().all()


def test_a_sample_that_comes_twice_is_observed_once(docs: Any, losses: Any) -> None:
    gate = make(losses, schedule=DualCycle())
    (first, *_) = examples(docs)
    batch = gate.collate([first, first])

    class Output:
        token_loss = torch.stack([torch.full_like(batch["labels"][0], 1.0, dtype=torch.float32)] * 2)
        counted = batch["labels"] != NO_LABEL

    Output.token_loss[1] = 2.0
    gate.observe(batch, Output)
    seen = gate.difficulty.ema[~gate.difficulty.ema.isnan()]
    assert seen.tolist() == [2.0] * int(Output.counted[0].sum())


def test_state_goes_with_a_checkpoint(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    for batch in batches(gate, docs):
        gated(**batch)
    gate.global_step = 7
    state = pickle.loads(pickle.dumps(gate.state_dict()))
    again = make(losses)
    again.load_state_dict(state)
    assert again.global_step == 7
    assert torch.equal(again.difficulty.ema.nan_to_num(-1), gate.difficulty.ema.nan_to_num(-1))
    assert not again.difficulty.ema.isnan().all()
    for batch in batches(gate, docs):
        assert torch.equal(again.select(batch), gate.select(batch))
    with pytest.raises(InvalidInput, match=r"beta: differs from the saved run, as does all of \['beta'\]"):
        make(losses, beta=0.5).load_state_dict(state)
    others = reference_of({4: docs[4]})
    with pytest.raises(StoreMismatch, match="it belongs to other reference losses"):
        make(others).load_state_dict(state)


def test_a_resumed_run_is_the_uninterrupted_one(docs: Any, losses: Any) -> None:
    def start() -> tuple[ReGate, Any, torch.optim.Optimizer]:
        gate = make(losses, schedule=DualCycle(keep=0.5, warmup=2, cycle=2, dense=1))
        gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
        return gate, gated, torch.optim.AdamW(gated.parameters(), lr=1e-2)

    def train(gate: ReGate, gated: Any, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
        found = []
        for batch in [*batches(gate, docs)] * count:
            out = gated(**batch)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(out.loss.detach())
        return found

    whole = train(*start(), 3)
    gate, gated, optimizer = start()
    first = train(gate, gated, optimizer, 1)
    saved = copy.deepcopy((gate.state_dict(), gated.state_dict(), optimizer.state_dict()))
    again = start()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert again[0].global_step == 2
    assert torch.equal(torch.stack(first + train(*again, 2)), torch.stack(whole))


def test_copies_of_the_model_share_the_gate_or_carry_their_own(docs: Any, losses: Any) -> None:
    gate = make(losses)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    batch = next(batches(gate, docs))
    gated(**batch)
    copied = pickle.loads(pickle.dumps(gated))
    assert torch.equal(copied(**batch).loss, gated(**batch).loss)
    wrapped_again = regate_fx.compile(gated, backend="eager")
    with pytest.raises(Unsupported, match="sample_id"):
        wrapped_again(**batch)
