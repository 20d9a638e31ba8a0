"""Gates behind attentions of many spellings: bit-exact at first, idempotent, declined with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.analysis.attention import NoAttention, find_attentions
from graphopt.contract import PassContext
from graphopt.data.dataset import open_data
from graphopt.errors import UsageError
from graphopt.passes.gated_attention import GatedAttention
from graphopt.passes.gated_attention.account import measure_attention
from graphopt.passes.gated_attention.gates import find_gate
from graphopt.program import Program
from tests.passes.checking import captured, check_pass

FORMS = [GatedAttention(mode=mode, form=form) for mode in ("headwise", "elementwise") for form in ("doubled", "plain")]


class Own(nn.Module):
    """One packed product for queries, keys and values; `written` writes the attention out."""

    def __init__(self, written: bool = False, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.written, self.heads = written, heads
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.packed(F.layer_norm(x, (16,))).chunk(3, -1)
        )
        if self.written:
            attended = torch.softmax(q @ k.transpose(-1, -2) / 2 + x.new_ones(x.shape[1]), -1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """PyTorch's own module: with weights it is written out with batch and heads on one axis."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return found


def encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Own().eval(), (torch.randn(3, 5, 16),)


MODELS: dict[str, nn.Module] = {
    "fused": Own(),
    "written out": Own(written=True),
    "encoder layer": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    **{
        f"module, weights {need}, batch first {first}": Torch(need, first)
        for need in (False, True)
        for first in (False, True)
    },
}


@pytest.mark.parametrize("pass_", FORMS, ids=lambda item: f"{item.mode} {item.form}")
@pytest.mark.parametrize("name", MODELS)
def test_gates_begin_as_the_identity(name: str, pass_: GatedAttention) -> None:
    program = captured(MODELS[name].eval(), torch.randn(3, 5, 16))
    result = check_pass(program, pass_, rewrites=1)
    assert equal(program, result.program, *program.examples)
    parts = 16 if pass_.mode == "elementwise" else 4
    assert result.notes[0].startswith(f"gates added {parts * 17} parameters and {3 * 5 * 16 * parts} multiply-adds")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pass_", FORMS, ids=lambda item: f"{item.mode} {item.form}")
def test_every_float_type_stays_the_same_to_the_bit(pass_: GatedAttention, dtype: torch.dtype) -> None:
    program = captured(Own(written=True).to(dtype).eval(), torch.randn(2, 5, 16, dtype=dtype))
    result = check_pass(program, pass_, rewrites=1)
    assert equal(program, result.program, *program.examples)


def test_symbolic_sizes_stay() -> None:
    program = captured(Own().eval(), torch.randn(3, 5, 16), dynamic={"x": {0: "batch", 1: "length"}})
    result = check_pass(program, GatedAttention(), rewrites=1)
    for shape in ((1, 1), (4, 4), (2, 7)):
        assert equal(program, result.program, torch.randn(*shape, 16))


def transformer(kind: str, implementation: str) -> Program:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    common: dict[str, Any] = {"vocab_size": 50, "use_cache": False, "attn_implementation": implementation}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model: nn.Module
    if kind == "bert":
        model = BertModel(BertConfig(**common, **wide))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, **common, **ends))
    else:  # grouped queries, rotary embedding and norms of queries
        model = Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=4, **common, **wide))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(ids)[0]
            return found

    return captured(First().eval(), torch.randint(0, 50, (2, 6)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen3"])
def test_networks_of_transformers(kind: str, implementation: str) -> None:
    program = transformer(kind, implementation)
    for pass_ in FORMS:
        result = check_pass(program, pass_, rewrites=2)
        assert equal(program, result.program, *program.examples)


def test_a_gate_sees_what_the_queries_are_made_from_and_scales_its_own_head() -> None:
    module = Own().eval()
    x = torch.randn(2, 5, 16)
    program = GatedAttention().run(captured(module, x), PassContext()).program
    weight, bias = gate_weights(program)
    with torch.no_grad():
        weight.copy_(torch.randn(4, 16))
        bias.copy_(torch.randn(4))
        normed = F.layer_norm(x, (16,))
        gate = 2 * torch.sigmoid(normed @ weight.t() + bias)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in module.packed(normed).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        expected = x + module.out((attended * gate[..., None]).flatten(2))
    torch.testing.assert_close(program(x)[0], expected)


def test_headwise_is_elementwise_with_repeated_rows() -> None:
    x = torch.randn(2, 5, 16)
    program = captured(Own().eval(), x)
    headwise, elementwise = (
        GatedAttention(mode=mode).run(program, PassContext()).program for mode in ("headwise", "elementwise")
    )
    values = torch.randn(4, 16), torch.randn(4)
    with torch.no_grad():
        for weight, value in zip(gate_weights(headwise), values, strict=True):
            weight.copy_(value)
        for weight, value in zip(gate_weights(elementwise), values, strict=True):
            weight.copy_(value.repeat_interleave(4, 0))
    torch.testing.assert_close(headwise(x)[0], elementwise(x)[0])


def test_chosen_attentions_only() -> None:
    program = transformer("bert", "sdpa")
    result = check_pass(program, GatedAttention(layers=(1,)), rewrites=1)
    attentions = [item for item in find_attentions(result.program) if not isinstance(item, NoAttention)]
    assert [find_gate(item.output) is not None for item in attentions] == [False, True]
    notes = GatedAttention(layers=(0, 2)).run(program, PassContext()).notes
    assert notes[0] == "there is no attention 2: the program has 2, counted from 0"


def test_declines_say_why() -> None:
    class TwoProducts(Own):
        def forward(self, x: Tensor) -> Tensor:
            q = (self.out(x) + self.packed(x)[..., :16]).unflatten(-1, (4, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, -1)

    class Open(Own):
        def forward(self, x: Tensor) -> Tensor:
            q = self.out(x).unflatten(-1, (4, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q)

    x = torch.randn(2, 5, 16)
    check_pass(captured(TwoProducts(), x), GatedAttention(), 0, "come from linear, linear_1 and not from one product")
    check_pass(captured(Classes(), x), GatedAttention(), 0, "is no product of two computed tensors")
    check_pass(captured(Open(), x), GatedAttention(form="plain"), 0, "does not go into one product by a weight alone")
    square = captured(Own(), torch.randn(5, 5, 16))
    check_pass(square, GatedAttention(), 0, "batch and length are both 5")
    gated = GatedAttention().run(captured(Own(), x), PassContext()).program
    check_pass(gated, GatedAttention(mode="elementwise"), 0, "it is gated already")


def test_a_weight_that_cannot_be_doubled_is_left() -> None:
    module = Own().half()
    with torch.no_grad():
        module.out.weight[0, 0] = 40000.0
    program = captured(module, torch.randn(2, 5, 16, dtype=torch.float16))
    check_pass(program, GatedAttention(form="plain"), 0, "is not finite in torch.float16")


def test_fitting_learns_from_labels() -> None:
    """Labels that need the second head to be silent: its gate falls, and the loss with it."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.head = Own(heads=2), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.own(x).mean(1))
            return found

    module = Classifier().eval()
    with torch.no_grad():
        module.head.weight.mul_(20)
    feeds = [torch.randn(8, 5, 16) for _ in range(30)]
    program = captured(module, feeds[0])
    silent = GatedAttention().run(program, PassContext()).program
    with torch.no_grad():
        gate_weights(silent)[1].copy_(torch.tensor([0.0, -6.0]))
    data = [({"x": feed.numpy()}, silent(feed)[0].argmax(-1).numpy()) for feed in feeds]
    result = graphopt.optimize(program, "gated-attention{fit-steps=100}", data=data, metric="accuracy")
    (step,) = result.report.passes
    before, after = (float(word) for word in step.notes[0].split()[-3::2])
    assert after < before
    account = measure_attention(result.program, open_data(data, program).fit)
    ((first, second),) = account.mean_gates().values()
    assert second < 0.9 < first + 0.3
    kept = program.graph_module.state_dict()
    fitted = result.program.graph_module.state_dict()
    assert all(torch.equal(value, fitted[name]) for name, value in kept.items())


def test_fitting_needs_labels_and_a_metric() -> None:
    program = captured(Own(), torch.randn(2, 5, 16))
    data = [{"x": torch.randn(2, 5, 16).numpy()} for _ in range(4)]
    with pytest.raises(UsageError, match="needs both data and metric"):
        graphopt.optimize(program, "gated-attention{fit-steps=5}")
    with pytest.raises(UsageError, match="the data has none; give labels"):
        graphopt.optimize(program, "gated-attention{fit-steps=5}", data=data, metric="cosine")
    with pytest.raises(UsageError, match="fit-steps=-1 must be 0 or more"):
        GatedAttention(fit_steps=-1)
    with pytest.raises(UsageError, match="names no attention"):
        GatedAttention(layers=())


def test_the_account_of_attention_is_that_of_its_weights() -> None:
    x = torch.randn(2, 5, 16)
    module = Own(written=True).eval()
    samples = open_data([{"x": x.numpy()}, {"x": x.numpy()}], captured(module, x)).fit
    account = measure_attention(captured(module, x), samples)
    with torch.no_grad():
        normed = F.layer_norm(x, (16,))
        q, k, _ = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in module.packed(normed).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
    assert account.first_token_share == pytest.approx(float(weights[..., 0].mean()), rel=1e-5)
    assert account.gates == {}


def test_the_account_knows_masks_and_grouped_queries() -> None:
    sdpa, eager = (transformer("qwen3", implementation) for implementation in ("sdpa", "eager"))
    with torch.no_grad():
        for name, weight in eager.graph_module.state_dict().items():
            weight.copy_(sdpa.graph_module.state_dict()[name])
    data = open_data([{sdpa.inputs[0].name: torch.randint(0, 50, (2, 6)).numpy()}] * 2, sdpa)
    fused, written = (measure_attention(program, data.fit) for program in (sdpa, eager))
    assert fused.first_token_share == pytest.approx(written.first_token_share, rel=1e-5)
    assert fused.largest == pytest.approx(written.largest, rel=1e-4)


def equal(left: Program, right: Program, *inputs: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left(*inputs), right(*inputs), strict=True))


def gate_weights(program: Program) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first gate."""
    (attention, *_) = [item for item in find_attentions(program) if not isinstance(item, NoAttention)]
    gate = find_gate(attention.output)
    assert gate is not None
    weight, bias = (program.graph_module.get_parameter(str(node.target)) for node in gate.scores.args[1:])  # type: ignore[union-attr]
    return weight, bias
