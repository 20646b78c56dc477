"""All passes in order, and the runner that checks the graph between each two."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from regate_fx.errors import LayerRefusal, PassFailed, RegateError
from regate_fx.passes.base import Pass, PassContext, Refused
from regate_fx.passes.brackets import CloseBrackets, OpenBrackets
from regate_fx.passes.checkpointing import InlineCheckpoints
from regate_fx.passes.cleanup import RemoveUnused
from regate_fx.passes.dense_reference import DenseReference
from regate_fx.passes.elide import ElideTokens
from regate_fx.passes.functionalize import Functionalize
from regate_fx.passes.head_loss import FuseHeadLoss
from regate_fx.passes.layers import FindLayers
from regate_fx.passes.masked_rows import AddMaskedRows
from regate_fx.passes.masks import ProveMasks
from regate_fx.passes.placement import Place
from regate_fx.passes.plan_nodes import FindPlan
from regate_fx.passes.sinks import FoldSinks
from regate_fx.passes.token_axes import AnalyseTokenAxes
from regate_fx.passes.verify import verify

logger = logging.getLogger("regate_fx.passes")

NORMALISE: tuple[Pass, ...] = (
    InlineCheckpoints(),  # first: export rejects checkpoint nodes, and layers inside them are to be found
    Functionalize(),  # before any analysis: an in-place write is a dependence without an edge
    OpenBrackets(),  # before nodes are inserted: a bracket would change what an inserted node means
    AddMaskedRows(),  # it and what follows match functional operators
    FoldSinks(),
)
ANALYSE: tuple[Pass, ...] = (
    FindPlan(),  # names the symbols that all later passes speak of
    AnalyseTokenAxes(),
    ProveMasks(),  # reads axes to know batch from sequence indices
    FindLayers(),  # reads kinds: attention is what pairs positions
)
ELIDE: tuple[Pass, ...] = (
    Place(),  # decides for all layers before a single node is written
    ElideTokens(),
)
MASK: tuple[Pass, ...] = (Place(), DenseReference())
CLEAN: tuple[Pass, ...] = (RemoveUnused(),)
FUSE: tuple[Pass, ...] = (FuseHeadLoss(),)  # after the clean-up: who reads the logits is then to be seen
CLOSE: tuple[Pass, ...] = (CloseBrackets(),)  # last: from here on the position of a node matters again
FINISH = CLEAN + CLOSE
PIPELINE = NORMALISE + ANALYSE + ELIDE + CLEAN + FUSE + CLOSE
LAYERWISE = NORMALISE + ANALYSE + ELIDE + CLEAN + FUSE  # brackets are closed in each part by itself
REFERENCE = NORMALISE + ANALYSE + MASK + FINISH


@dataclass
class PipelineRun:
    """The rewritten graph, what was declined, seconds per pass, and the passes' findings."""

    graph_module: fx.GraphModule
    context: PassContext
    refusals: list[LayerRefusal] = field(default_factory=list)
    rewrites: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection, which walks all objects of the process again and again: passes make many and drop few."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def run_passes(
    gm: fx.GraphModule,
    ctx: PassContext,
    passes: Sequence[Pass] = PIPELINE,
    dump: Callable[[str, fx.GraphModule], None] | None = None,
    done: tuple[str, ...] = (),
) -> PipelineRun:
    """Run passes in order and verify the graph after each. done: names of the passes that `gm` has been through.

    A `Refused` from a pass propagates: the caller decides what becomes of the graph. Anything else that a pass
    raises, and any broken invariant, is a `PassFailed` that names the pass and those before it.
    """
    run = PipelineRun(gm, ctx)
    placeholders = len(gm.graph.find_nodes(op="placeholder"))
    for step in passes:
        before = (*done, *run.seconds)
        missing = [name for name in step.after if name not in before]
        if missing:
            raise PassFailed(step.name, before, f"it needs {', '.join(missing)} to have run.")
        started = time.perf_counter()
        try:
            result = step.run(run.graph_module, ctx)
            problem = verify(result.graph_module, placeholders, "functionalize" in (*before, step.name))
        except (Refused, RegateError):
            raise
        except Exception as error:
            raise PassFailed(step.name, before, f"{type(error).__name__}: {error}") from error
        if problem is not None:
            raise PassFailed(step.name, before, problem)
        run.graph_module = result.graph_module
        run.refusals.extend(result.refusals)
        run.rewrites[step.name] = result.rewrites
        run.seconds[step.name] = time.perf_counter() - started
        logger.debug("%s: %d rewrites, %.3f s", step.name, result.rewrites, run.seconds[step.name])
        if dump is not None:
            dump(step.name, result.graph_module)
    run.graph_module.recompile()  # once: what passes read and write is the graph
    return run
