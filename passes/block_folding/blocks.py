"""The repeated blocks that may be folded, and what folding does to a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch.fx import Node

from graphopt.analysis.blocks import Block, find_repeats
from graphopt.edit import GraphEditor
from graphopt.program import Program


@dataclass(frozen=True)
class Blocks:
    """One chain of isomorphic blocks of the main graph; `foldable` are the positions that may go or be shared."""

    blocks: tuple[Block, ...]
    foldable: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]

    def boundaries(self) -> tuple[Node, ...]:
        """The input of the first block and the output of each, in order: the stream that runs through them."""
        return (self.blocks[0].input, *(block.output for block in self.blocks))


def find_blocks(program: Program, chosen: str | tuple[int, ...]) -> Blocks | str:
    """The chain with the most nodes on the way to any one output, or a clause that says why there is none.

    `chosen` is "auto", positions from 0, or a pattern (`*`, `?`) of module paths, such as "*layer.*": only blocks that
    hold such a module may be folded. With "auto" the first block stays: what it adds to embeddings all others read.
    """
    outputs = [None, *([spec.name] for spec in program.outputs)] if len(program.outputs) > 1 else [None]
    repeats = tuple(item for names in outputs for item in find_repeats(program, outputs=names))
    if chosen != "auto" and isinstance(chosen, str):
        repeats = tuple(item for item in repeats if any(_matches(block, chosen) for block in item.blocks))
        if not repeats:
            return f"no repeated block has a module like {chosen}"
    if not repeats:
        return "there are no repeated blocks: no two consecutive parts compute the same up to their weights"
    blocks = max(repeats, key=lambda item: sum(len(block.nodes) for block in item.blocks)).blocks
    if isinstance(chosen, tuple):
        if beyond := [position for position in chosen if position >= len(blocks)]:
            return f"there is no block {beyond[0]}: the program has {len(blocks)}, counted from 0"
        wanted: Iterable[int] = chosen
    elif chosen == "auto":
        wanted = range(1, len(blocks))
    else:
        wanted = (number for number, block in enumerate(blocks) if _matches(block, chosen))
    reasons = [(number, _why_not(blocks[number])) for number in wanted]
    refused = tuple((number, reason) for number, reason in reasons if reason is not None)
    return Blocks(blocks, tuple(number for number, reason in reasons if reason is None), refused)


def _matches(block: Block, pattern: str) -> bool:
    stacks = (node.meta.get("nn_module_stack") or {} for node in block.nodes)
    return any(fnmatch(str(path), pattern) for stack in stacks for path, _ in stack.values())


def _why_not(block: Block) -> str | None:
    if not block.is_closed:
        others = ", ".join(node.name for node in block.live_outs if node is not block.output)
        return f"{others or 'a size or state'} inside it is also read outside"
    before, after = block.input.meta["val"], block.output.meta["val"]
    if before.dtype != after.dtype or list(map(str, before.shape)) != list(map(str, after.shape)):
        return f"it takes {before.dtype} {list(before.shape)} and gives {after.dtype} {list(after.shape)}"
    return None


def remove_blocks(editor: GraphEditor, rule: str, blocks: Sequence[Block], positions: Iterable[int]) -> list[int]:
    """Let each of these blocks be its input; returns the positions that went."""
    inputs: dict[Node, Node] = {}
    gone = []
    for position in sorted(positions):
        block = blocks[position]
        source = inputs.get(block.input, block.input)
        inner = [node for node in block.nodes if node is not block.output]
        if editor.replace(rule, [block.output], lambda _, source=source: [source], inner=inner):  # type: ignore[misc]
            inputs[block.output] = source
            gone.append(position)
    return gone
