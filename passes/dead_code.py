"""Remove nodes that no output depends on.

Before: y = relu(x); z = sin(x); return y        After: y = relu(x); return y

Inputs stay, read or not. Random operators stay: taking one away would change what the next one draws.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Edit
from graphopt.effects import has_effect
from graphopt.program import Program


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes that no output depends on."""

    name = "dead-code"
    measured = False
    unrecorded = "an output depends on it"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in reversed(list(editor.graph.nodes)):
                if node.users or node.op in ("output", "placeholder"):
                    continue
                if has_effect(node):
                    editor.decline(self.name, node, f"{node.target} draws random numbers or has another effect")
                else:
                    editor.remove(self.name, node)
        return edit.finish()
