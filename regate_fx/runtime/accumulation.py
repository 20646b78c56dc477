"""How many labels the batches of one optimizer step count, known before the first of them is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.runtime.samples import Counts, Samples


@dataclass(frozen=True)
class Window:
    """The batches of one optimizer step, known by the objects that count them: those travel with a batch."""

    step: int
    counts: Sequence[Counts]

    def count(self, ratio: float, align: str) -> int:
        """Labels that count where `ratio` of the candidates is kept. Raises `Unsupported` where only the masks tell."""
        numbers = [counts.counted(ratio) for counts in self.counts]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            raise Unsupported(
                f"a loss normalised over several batches with align={align!r}",
                "which labels count is known when their masks are, not before.",
                "Use align='predictor', or let each batch be a mean of its own: for Trainer, set "
                "trainer.model_accepts_loss_kwargs = False.",
            )
        return sum(known)


def check_announced(window: Window | None, step: int, counts: Counts) -> None:
    """Raise `Unsupported` unless the batch with these counts is one of the window, and the window of this step."""
    if window is not None and window.step == step and any(counts is known for known in window.counts):
        return
    raise Unsupported(
        "num_items_in_batch with a gate",
        "it was not counted by the gate for this batch and step, and where it also counts labels that the gate "
        "drops, the loss shrinks with their share.",
        "Leave it out: the loss is the mean over counted labels. For Trainer, use "
        "regate_fx.integrations.attach; in a loop of your own, pass what count_labels returns.",
    )


def collated(batch: Mapping[str, Any]) -> Samples:
    samples = batch.get("sample_id")
    if not isinstance(samples, Samples):
        raise InvalidInput(
            "sample_id",
            f"is {type(samples).__name__} in a batch whose labels are to be counted beforehand.",
            "Collate with gate.collate.",
        )
    return samples
