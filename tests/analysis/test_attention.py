"""Attentions in spellings that networks have: found, and gated row by row and head by head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.analysis.attention import Attention, NoAttention, find_attentions
from graphopt.analysis.einsum import read_einsum
from graphopt.contract import PassContext
from graphopt.interpreter import ProgramInterpreter
from graphopt.passes.gated_attention import GatedAttention
from graphopt.passes.gated_attention.gates import find_gate
from graphopt.program import Program
from tests.passes.checking import captured

HEADS, WIDTH = 4, 4


class Spelling(nn.Module):
    """`attend` makes [batch, length, 16] of q, k, v [batch, length, heads, width], and of a mask [batch, length]."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, WIDTH)) for layer in (self.q, self.k, self.v))
        found: Tensor = self.out(self.attend(q, k, v, mask).reshape(x.shape))
        return found


def einsums(scores: str, values: str) -> Spelling:
    """Heads between rows and channels, [batch, length, heads, width], where the equations say so."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if scores.startswith(("bh", "...")):
            q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        weights = (torch.einsum(scores, q, k) / 2 + mask[:, None, None, :]).softmax(-1)
        y = torch.einsum(values, weights, v)
        return y if y.shape[1] == q.shape[1] and not scores.startswith(("bh", "...")) else y.transpose(1, 2)

    return Spelling(attend)


def written(weigh: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    """`weigh` makes weights of scores [batch, heads, queries, keys] and the mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        return (weigh(q @ k.transpose(-1, -2) / 2, mask) @ v).transpose(1, 2)

    return Spelling(attend)


def with_sinks(scores: Tensor, mask: Tensor) -> Tensor:
    """A column that takes weight and has no value, as in gpt-oss."""
    sinks = torch.arange(1.0, 5.0).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    joined = torch.cat([scores, sinks], -1)
    return (joined - joined.amax(-1, keepdim=True)).softmax(-1)[..., :-1]


class LengthFirst(nn.Module):
    """x is [length, batch, features] and every product an einsum, as in XLNet."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Parameter(torch.randn(16, HEADS, WIDTH) / 4) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(HEADS, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (torch.einsum("ibf,fhd->ibhd", x, weight) for weight in (self.q, self.k, self.v))
        weights = torch.einsum("ibhd,jbhd->bhij", q + self.bias, k).softmax(3)
        y = torch.einsum("bhij,jbhd->ibhd", weights, v)
        return torch.einsum("ibhd,fhd->ibf", y, self.out)


class Windows(nn.Module):
    """Attention within windows of a feature map [batch, height, width, channels], as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x[:, :4].reshape(-1, 2, 2, 16)
        rows = x.view(-1, 1, 2, 2, 1, 16).permute(0, 1, 4, 2, 3, 5).reshape(-1, 4, 16)
        q, k, v = self.packed(rows).reshape(-1, 4, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        found: Tensor = self.out(y.transpose(1, 2).reshape(-1, 4, 16))
        return found


SPELLINGS: dict[str, nn.Module] = {
    "einsum, heads inside": einsums("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
    "einsum, heads outside": einsums("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    "einsum of all leading axes": einsums("...id, ...jd -> ...ij", "...ij, ...jd -> ...id"),
    "an added mask": written(lambda scores, mask: (scores + (1 - mask[:, None, None, :]) * -1e9).softmax(-1)),
    "a chosen mask": written(
        lambda scores, mask: torch.where(mask[:, None, None, :] == 0, torch.tensor(-1e9), scores).softmax(-1)
    ),
    "weights after a mask": written(
        lambda scores, mask: torch.where(mask[:, None, None, :] == 0, torch.zeros(()), scores.softmax(-1))
    ),
    "sinks": written(with_sinks),
    "bounded scores": written(lambda scores, mask: scores.clamp(min=-5).softmax(-1)),
    "length first": LengthFirst(),
    "windows": Windows(),
}


@pytest.mark.parametrize("mode", ["headwise", "elementwise"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_gated(name: str, mode: str) -> None:
    x, mask = torch.randn(3, 5, 16), torch.tensor([[1.0, 1, 1, 1, 0]] * 3)
    program = captured(SPELLINGS[name].eval(), x, mask)
    result = GatedAttention(mode=mode).run(program, PassContext())  # type: ignore[arg-type]
    assert len(result.rewrites) == 1, result.declined
    assert torch.equal(result.program(x, mask)[0], program(x, mask)[0])
    (attention,) = find_attentions(result.program)
    assert isinstance(attention, Attention)
    gate = find_gate(attention.output)
    assert gate is not None
    with torch.no_grad():
        for weight in gate_weights(result.program, gate.scores.args[1:]):
            weight.copy_(torch.randn(weight.shape))
    values = run(result.program, x, mask)
    output, product = (values[node.name].permute(attention.axes) for node in (attention.output, gate.product))
    scores = values[gate.sigmoid.name].unflatten(-1, (HEADS, -1)) * 2
    if name == "length first":
        scores = scores.transpose(0, 1)
    torch.testing.assert_close(product, output * scores.transpose(1, 2))


def test_a_softmax_of_a_product_by_a_weight_is_no_attention() -> None:
    """It weighs experts that are the same for every input."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.experts = (nn.Parameter(torch.randn(16, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.route).softmax(-1) @ self.experts.t()

    for module in (Router(), Einsum("bnf,fe->bne", torch.randn(16, 8))):
        (found,) = find_attentions(captured(module.eval(), torch.randn(2, 5, 16)))
        assert isinstance(found, NoAttention) and "no product of two computed tensors" in found.reason


class Einsum(nn.Module):
    """softmax of an einsum by a constant."""

    def __init__(self, equation: str, constant: Tensor) -> None:
        super().__init__()
        self.equation = equation
        self.constant = nn.Parameter(constant)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.constant).softmax(-1) @ x[..., :8, :4].new_ones(8, 4)


@pytest.mark.parametrize(
    ("equation", "letters"),
    [
        ("bnf,fe->bne", ("bnf", "fe", "bne")),
        ("...f, fe -> ...e", ("baf", "fe", "bae")),
        ("bnf,fe", None),
        ("bnf,ff->bn", None),
    ],
)
def test_letters_of_einsums(equation: str, letters: tuple[str, str, str] | None) -> None:
    graph = torch.fx.Graph()
    left, right = (graph.placeholder(name) for name in ("left", "right"))
    left.meta["val"], right.meta["val"] = torch.empty(2, 5, 8), torch.empty(8, 8)
    node = graph.call_function(torch.ops.aten.einsum.default, (equation, [left, right]))
    found = read_einsum(node)
    if letters is None:
        assert found is None
    else:
        assert found is not None
        assert (found.operands[0][1], found.operands[1][1], found.result) == letters


def run(program: Program, *inputs: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        ProgramInterpreter(program.graph_module, see=values.__setitem__).run(*inputs)
    return values


def gate_weights(program: Program, nodes: object) -> list[Tensor]:
    assert isinstance(nodes, tuple)
    return [program.graph_module.get_parameter(str(node.target)) for node in nodes]


ARCHITECTURES: dict[str, dict[str, object]] = {
    "albert": {"embedding_size": 8},
    "clip_text_model": {"eos_token_id": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 4},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mistral": {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
    "mpnet": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures_of_transformers(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = AutoConfig.for_model(kind, **{"vocab_size": 50, "use_cache": False, **sizes, **ids, **ARCHITECTURES[kind]})

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_config(config, attn_implementation="eager")

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            found: Tensor = self.model(tokens, attention_mask=mask)[0]
            return found

    tokens, mask = torch.randint(3, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    program = captured(First().eval(), tokens, mask)
    result = GatedAttention().run(program, PassContext())
    assert len(result.rewrites) == 2, result.declined
    assert torch.equal(result.program(tokens, mask)[0], program(tokens, mask)[0])
