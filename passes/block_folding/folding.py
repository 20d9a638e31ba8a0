"""Remove the repeated blocks that a network needs least, or let groups of them share one set of weights.

Before: x1 = block1(x0); x2 = block2(x1); x3 = block3(x2)
remove: x1 = block1(x0); x3 = block3(x1)
share:  x1 = block1(x0); x2 = block2(x1), whose products read the weights of block 1 and whose norms its own; ...

Removal takes operators, weights and time away in the same measure; sharing takes weights away and nothing else, unless
children keep terms of their own (`scale`, `rank`; see `sharing` for what is best kept and whose weights to take). Both
change results: `heal-steps` lets what is left learn from the whole network's outputs (Jing et al. 2024, "FoldGPT",
arXiv 2407.00928, for removal, then sharing, then distillation). `chart` measures every step on the way, each one healed
as well where the last one is. Declines a block from which more than its output is read, one whose input and output
differ in type or sizes, and to share a block that has terms already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from graphopt.analysis.storage import stored_weights
from graphopt.contract import Pass, PassContext, PassResult, Timing, TradeOff
from graphopt.data.metric import measure
from graphopt.edit import Edit, GraphEditor
from graphopt.errors import PassError, UsageError
from graphopt.passes.block_folding.blocks import Blocks, find_blocks, remove_blocks
from graphopt.passes.block_folding.gating import learned_gates
from graphopt.passes.block_folding.healing import LEARNING_RATE, heal
from graphopt.passes.block_folding.hidden_units import HiddenUnits, find_hidden_units
from graphopt.passes.block_folding.ranking import (
    Scores,
    angular_distances,
    block_influence,
    boundary_values,
    in_order_of_loss,
)
from graphopt.passes.block_folding.sharing import Parent, Sharing, share_weights
from graphopt.program import Program

_LATENCY = re.compile(r"(\d+(?:\.\d*)?)(us|ms|s)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_REMOVING = ("remove", "ranking")  # options without an effect where no block goes
_SHARING = ("group", "parent", "weights", "align", "scale", "rank")  # and where none shares


@dataclass(frozen=True)
class BlockFolding(Pass):
    """Remove the repeated blocks that are needed least, or let groups of blocks share their weights."""

    name = "block-folding"
    preserves = "approximate"
    measured = False
    mode: Literal["remove", "share", "both"] = "remove"
    remove: int | float | str = 1
    group: int = 2
    parent: Parent = "first"
    weights: Literal["parent", "mean"] = "parent"
    align: bool = False
    scale: bool = False
    rank: int = 0
    ranking: Literal["block-influence", "angular", "gate", "loss-drop"] = "block-influence"
    blocks: Literal["auto"] | tuple[int, ...] | str = "auto"
    heal_steps: int = 0
    heal_rate: float = LEARNING_RATE
    chart: bool = False

    def __post_init__(self) -> None:
        latency = isinstance(self.remove, str) and _LATENCY.fullmatch(self.remove) is not None
        rate = isinstance(self.remove, float) and 0 < self.remove < 1
        if not (latency or rate or (isinstance(self.remove, int) and self.remove > 0)):
            raise UsageError(
                f"remove={self.remove!r} is no number of blocks (1), share of them (0.25) or latency to reach (8ms)"
            )
        if self.group < 2:
            raise UsageError(f"group={self.group} shares nothing; give 2 or more")
        if self.rank < 0:
            raise UsageError(f"rank={self.rank} must be 0 or more")
        self._check_effects()
        if self.chart and self.mode == "share":
            raise UsageError("chart=true measures what removing blocks brings, but mode=share keeps all; leave it out")
        if self.heal_steps < 0:
            raise UsageError(f"heal-steps={self.heal_steps} must be 0 or more")
        if not 0 < self.heal_rate < 1:
            raise UsageError(f"heal-rate={self.heal_rate} must be over 0 and under 1, such as 0.0003 or 0.002")
        if self.heal_rate != LEARNING_RATE and not self.heal_steps:
            raise UsageError(f"heal-rate={self.heal_rate} has no effect with heal-steps=0; give both")

    def _check_effects(self) -> None:
        """Raises UsageError for an option that would change nothing."""
        idle = {"remove": _SHARING, "share": _REMOVING, "both": ()}[self.mode]
        about, other = ("share", "remove") if self.mode == "remove" else ("go", "share")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in idle and value != field.default:
                raise UsageError(
                    f"{field.name}={value!r} is about blocks that {about}, but mode={other}; give another mode"
                )
        keeps = self.rank or self.scale
        if self.align and self.weights == "parent" and self.parent != "closest" and not keeps:
            raise UsageError(
                "align=true changes nothing where blocks take all of their parent's weights; "
                "give weights=mean, parent=closest, scale=true or a rank"
            )
        if self.weights == "mean" and self.parent != "first" and not self.align:
            raise UsageError(f"parent={self.parent!r} changes nothing with weights=mean, unless align=true")

    def run(self, program: Program, context: PassContext) -> PassResult:
        found = find_blocks(program, self.blocks)
        if isinstance(found, str):
            return PassResult(program, notes=(found,))
        notes: list[str] = []
        order = [] if self.mode == "share" else self.choose(program, found, context, notes)
        result, healed = self.fold(program, context, order)
        points = self._trade_offs(program, context, found, order, (result, healed)) if self.chart else ()
        final = healed or result
        return replace(final, notes=(*notes, *final.notes), trade_offs=points)

    def fold(
        self, program: Program, context: PassContext, order: Sequence[int]
    ) -> tuple[PassResult, PassResult | None]:
        """Without the blocks in `order`, those that are left sharing if they are to: as it is, and healed."""
        edit = Edit(program, context, self.name)
        (editor,) = [item for item in edit.graphs() if not item.path]
        found = find_blocks(edit.program, self.blocks)
        assert isinstance(found, Blocks)
        for position, reason in found.refused:
            editor.decline(self.name, found.blocks[position].output, reason)
        gone: list[int] = []
        if self.mode != "share":
            gone = remove_blocks(editor, self.name, found.blocks, order)
            removed = ", ".join(map(str, gone)) or "none"
            edit.notes.append(f"removed {len(gone)} of {len(found.blocks)} blocks: {removed}")
        if self.mode != "remove":
            self._share(editor, found, [number for number in range(len(found.blocks)) if number not in gone])
        result = edit.finish()
        if not (self.heal_steps and result.rewrites):
            return result, None
        trained = tail_weights(result.program, program, found, gone)
        layers = taught_layers(result.program, found, gone)
        healed, note = heal(result.program, program, trained, layers, context, self.heal_steps, self.heal_rate)
        return result, replace(result, program=healed, notes=(*result.notes, note))

    def _trade_offs(
        self,
        program: Program,
        context: PassContext,
        found: Blocks,
        order: Sequence[int],
        last: tuple[PassResult, PassResult | None],
    ) -> tuple[TradeOff, ...]:
        """The network whole, then without more and more of the blocks in `order`: how good and how fast it is."""
        data, metric = context.data, context.metric
        assert data is not None and metric is not None
        points: list[TradeOff] = []
        for count in range(len(order) + 1):
            context.progress(f"{self.name}: measuring without {count} blocks", count, len(order) + 1)
            if count < len(order):
                folded, healed = self.fold(program, context, order[:count])
            else:
                folded, healed = last
            timing = context.measure(folded.program)
            for variant, result in (("as folded", folded), ("healed", healed)):
                if result is not None:
                    value = measure(result.program, data.held_out, metric, reference=program)
                    seconds = None if timing is None else timing.seconds
                    points.append(TradeOff("blocks kept", len(found.blocks) - count, variant, value, seconds))
        return tuple(points)

    def choose(self, program: Program, found: Blocks, context: PassContext, notes: list[str]) -> list[int]:
        """The blocks that are to go, the one that is needed least first."""
        total = len(found.blocks)
        most = min(len(found.foldable), total - 1)
        if not most:
            notes.append("no block may be removed")
            return []
        order, scores = self._order(program, found, context, self._count(total, most))
        notes.append(f"{self.ranking} of blocks {describe(scores)}")
        if isinstance(self.remove, str):
            order = self._until_fast(program, order[:most], context, notes)
        return order[: self._count(total, most)]

    def _count(self, total: int, most: int) -> int:
        """How many blocks are to go; as many as may where a latency decides."""
        if isinstance(self.remove, str):
            return most
        return min(most, round(self.remove * total) if isinstance(self.remove, float) else self.remove)

    def _order(self, program: Program, found: Blocks, context: PassContext, count: int) -> tuple[list[int], Scores]:
        """Positions of blocks, the first to go first, and the score of each that was looked at."""
        data = context.data
        assert data is not None and context.metric is not None
        metric = context.metric
        if self.ranking == "loss-drop":

            def score(positions: tuple[int, ...]) -> float:
                context.progress(f"{self.name}: without {', '.join(map(str, positions))}", 0, 1)
                return measure(without(program, self.blocks, positions), data.fit, metric, reference=program)

            return in_order_of_loss(found.foldable, count, score)
        if self.ranking == "gate":
            left = 1 - count / len(found.foldable)
            gates = learned_gates(program, self.blocks, found.foldable, left, data.for_fitting(), context)
            return sorted(gates, key=lambda position: gates[position]), gates
        names = [node.name for node in found.boundaries()]
        values = boundary_values(program, names, data.fit)
        if self.ranking == "angular":
            distances = angular_distances(values, count)
            runs = {first: list(range(first, first + count)) for first in distances}
            allowed = [first for first, run in runs.items() if set(run) <= set(found.foldable)]
            if not allowed:
                raise PassError(f"{self.name}: no run of {count} blocks may be removed; remove fewer")
            return runs[min(allowed, key=lambda first: distances[first])], distances
        influence = block_influence(values)
        return sorted(found.foldable, key=lambda position: influence[position]), influence

    def _until_fast(self, program: Program, order: Sequence[int], context: PassContext, notes: list[str]) -> list[int]:
        """As few of the blocks in `order` as bring the latency to what is asked for."""
        parts = _LATENCY.fullmatch(str(self.remove))
        assert parts is not None
        wanted = float(parts[1]) * _UNITS[parts[2]]
        for count in range(len(order) + 1):
            context.progress(f"{self.name}: measuring without {count} blocks", count, len(order) + 1)
            timing: Timing | None = context.measure(without(program, self.blocks, order[:count]))
            if timing is None:
                raise PassError(f"{self.name}: remove={self.remove} needs {context.target} at hand; give a number")
            notes.append(f"{timing.seconds * 1e3:.3f} ms without {count} blocks")
            if timing.seconds <= wanted:
                return list(order[:count])
        notes.append(f"{self.remove} cannot be reached by removing blocks")
        return list(order)

    def _share(self, editor: GraphEditor, found: Blocks, kept: Sequence[int]) -> None:
        """Groups of consecutive blocks that are left read one set of weights."""
        sharing = [found.blocks[number] for number in kept if number in found.foldable]
        kinds: tuple[HiddenUnits, ...] = ()
        if self.align:
            whole = find_blocks(editor.edit.original, self.blocks)
            assert isinstance(whole, Blocks)
            kinds = find_hidden_units(editor.edit.original, whole.blocks[0])
            counts = " and ".join(str(units.count) for units in kinds) or "no"
            editor.edit.notes.append(f"{counts} hidden units of each block may change places")
        how = Sharing(self.parent, self.weights, self.rank, self.scale, kinds)
        before = stored_bytes(editor.edit.program)
        for start in range(0, len(sharing), self.group):
            share_weights(editor, self.name, sharing[start : start + self.group], how)
        saved = before - stored_bytes(editor.edit.program)
        own = ", less what their terms take" if how.has_terms else ""
        advice = "; give a smaller rank" if saved < 0 else ""
        editor.edit.notes.append(f"blocks share {saved} bytes of weights in groups of {self.group}{own}{advice}")


def without(program: Program, chosen: str | tuple[int, ...], positions: Iterable[int]) -> Program:
    """The program without these of its blocks."""
    edit = Edit(program, PassContext(), BlockFolding.name)
    (editor,) = [item for item in edit.graphs() if not item.path]
    found = find_blocks(edit.program, chosen)
    assert isinstance(found, Blocks)
    remove_blocks(editor, BlockFolding.name, found.blocks, positions)
    return edit.finish().program


def tail_weights(program: Program, original: Program, found: Blocks, gone: Sequence[int]) -> list[str]:
    """Parameters that are left of the block before the first one that went and of all after it, and all new ones."""
    names = {name for name, _ in program.graph_module.named_parameters()}
    new = names - {name for name, _ in original.graph_module.named_parameters()}
    read = {
        str(weight.target)
        for number, block in enumerate(found.blocks)
        if number >= first_taught(gone) and number not in gone
        for weight in block.weights
        if weight.op == "get_attr"
    }
    return sorted(names & read | new)


def stored_bytes(program: Program) -> int:
    """What the weights that some node reads take, each storage once."""
    return sum(item.bytes for item in stored_weights(program))


def taught_layers(program: Program, found: Blocks, gone: Sequence[int]) -> dict[str, str]:
    """For the output of each block that learns, what its successor read in the whole network.

    A product with terms of its own has another name than in the whole network, and such an output is left out.
    """
    names = {node.name for node in program.graph_module.graph.nodes}
    kept = [number for number in range(len(found.blocks)) if number not in gone]
    followers = [*kept[1:], len(found.blocks)]
    return {
        found.blocks[number].output.name: found.blocks[follower - 1].output.name
        for number, follower in zip(kept, followers, strict=True)
        if number >= first_taught(gone) and found.blocks[number].output.name in names
    }


def first_taught(gone: Sequence[int]) -> int:
    """The block before the first one that went; all of them where none did."""
    return max(0, min(gone, default=1) - 1)


def describe(scores: Scores) -> str:
    return ", ".join(f"{position}: {score:.4g}" for position, score in sorted(scores.items()))
