"""lut-matmul: what fires and what does not, that results are those of the codes, and what is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.operators.low_bit import MOST_GROUP
from graphopt.passes.lut_matmul import LutMatmul
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize.budget import Choice, least_noise
from graphopt.program import Program
from tests.passes.checking import captured, check_pass, targets

ops = torch.ops.graphopt


class Attention(nn.Module):
    """q, k and v read one value; the output projection another."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(size, size), nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


class Spelled(nn.Module):
    """The same product as linear, matmul, mm and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(64, 96) / 8) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(96))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = self.weights
        return torch.matmul(x, a), torch.mm(x, b), torch.addmm(self.bias, x, c), nn.functional.linear(x, a.t())


def attention(rows: int | None = 7, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    x = torch.randn(1, rows or 7, 64)
    return captured(Attention().eval(), x, dynamic=None if rows else {"x": {1: "seq"}})


def run(program: Program, **options: Any) -> Program:
    return LutMatmul(**options).run(program, PassContext()).program


def noise(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def calls(program: Program, target: Any) -> list[torch.fx.Node]:
    return [node for node in program.nodes() if node.target is target]


@pytest.mark.parametrize("table", ["exact", "int8"])
def test_activations_are_built_once_for_all_that_read_them(table: Any) -> None:
    program = attention(3)
    result = check_pass(program, LutMatmul(table=table, group_size=32), 4)
    assert targets(result.program).count("graphopt.lut_build") == 2
    assert targets(result.program).count("graphopt.lut_gemv") == 4 and "aten.linear" not in targets(result.program)
    assert noise(result.program(*program.examples)[0], program(*program.examples)[0]) < 0.03


@pytest.mark.parametrize(
    ("rows", "operator_name"), [(1, "lut_gemv"), (4, "lut_gemv"), (5, "wq_gemm"), (None, "lut_gemv")]
)
def test_the_number_of_rows_decides(rows: int | None, operator_name: str) -> None:
    names = targets(run(attention(rows), table="int8" if rows == 5 else "exact"))
    assert names.count(f"graphopt.{operator_name}") == 4


def test_every_spelling_of_the_product_fires() -> None:
    """The numbers are those of rounded weights times rounded activations."""
    torch.manual_seed(0)
    program = captured(Spelled().eval(), torch.randn(5, 64))
    result = check_pass(program, LutMatmul(group_size=32), 4)
    codes, scale, _ = ops.lut_build(program.examples[0], 32)
    x = codes.float() * scale.repeat_interleave(32, 1)
    assert targets(result.program).count("graphopt.lut_build") == 1
    for node, found in zip(calls(result.program, ops.wq_gemm.default), result.program(*program.examples), strict=True):
        weight, steps, zero, bias = (_held(result.program, node.args[place]) for place in (3, 4, 5, 7))
        numbers = (weight.float() - zero.repeat_interleave(32, 1)) * steps.repeat_interleave(32, 1)
        wanted = x @ numbers.t() + (0 if bias is None else bias)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _held(program: Program, node: Any) -> Any:
    return None if node is None else program.graph_module.state_dict(keep_vars=True)[str(node.target)]


@pytest.mark.parametrize("form", ["int4", "nf4"])
@pytest.mark.parametrize("module", [Attention, Spelled])
def test_weights_in_codes_are_taken_as_they_are(form: str, module: Any) -> None:
    """Whatever the options; the result differs by the rounding of activations, and for nf4 of its table."""
    torch.manual_seed(0)
    program = captured(module().eval(), torch.randn(5, 64))
    quantized = graphopt.optimize(program, f"quantize{{weights={form},group-size=32}}").program
    result = check_pass(quantized, LutMatmul(bits=2, grid="odd"), 4)
    assert result.notes[1].endswith("codes as they were")
    results = zip(result.program(*program.examples), quantized(*program.examples), strict=True)
    for found, wanted in list(results)[:3]:  # the last one was no product of codes before
        assert noise(found, wanted) < (2e-4 if form == "int4" else 2e-3)


class Left(nn.Module):
    """Everything that is to stay, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Embedding(80, 64)
        self.small, self.deep = nn.Linear(64, 8), nn.Parameter(torch.randn(3, 64, 64))
        self.square = nn.Parameter(torch.randn(64, 64))

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = self.tied(ids)
        logits = y @ self.tied.weight.t()
        pairs = torch.matmul(y, x.transpose(-1, -2))
        scaled = torch.addmm(torch.ones(64), x, self.square, alpha=2.0)
        added = torch.addmm(x, x, self.square)
        return logits, self.small(y), torch.matmul(y[0], self.deep), pairs, scaled, added, self.square @ x.t()


def test_what_is_left_alone_says_why() -> None:
    torch.manual_seed(0)
    program = captured(Left().eval(), torch.tensor([[1, 2]]), torch.randn(64, 64))
    result = LutMatmul().run(program, PassContext())
    assert not result.rewrites and result.program is program
    reasons = " | ".join(item.reason for item in result.declined)
    for words in (
        "read 1 times more, by others",
        "512 weights are fewer than min-size=4096",
        "has 3 axes, not 2",
        "is computed",
        "scales its operands by alpha or beta",
        "adds a tensor of 2 axes",
        "multiplies a constant from the left",
    ):
        assert words in reasons, reasons


class Biased(nn.Module):
    """A bias that is given, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(b, x, self.weight), nn.functional.linear(x, self.weight, torch.tanh(b))


def test_a_computed_bias_is_added_to_the_product() -> None:
    torch.manual_seed(0)
    program = captured(Biased(), torch.randn(3, 64), torch.randn(64))
    result = check_pass(program, LutMatmul(bits=8), 2)
    assert [node.args[7] for node in calls(result.program, ops.lut_gemv.default)] == [None, None]
    for found, wanted in zip(result.program(*program.examples), program(*program.examples), strict=True):
        assert noise(found, wanted) < 1e-3
    cpu.lower({"main": result.program}, resolve_target("cpu:x86-64-v3"))


def test_groups_whose_sums_pass_int32_are_declined() -> None:
    program = captured(nn.Linear(MOST_GROUP + 1, 1, bias=False), torch.ones(1, MOST_GROUP + 1))
    (declined,) = LutMatmul(group_size=1 << 20).run(program, PassContext()).declined
    assert "give a group-size of at most 66311" in declined.reason
    check_pass(program, LutMatmul(group_size=MOST_GROUP), 1)


def test_tables_take_a_group_that_four_do_not_divide() -> None:
    torch.manual_seed(0)
    program = captured(nn.Linear(70, 80), torch.randn(3, 70))
    result = check_pass(program, LutMatmul(bits=8, table="int8"), 1)
    assert [node.args[9] for node in calls(result.program, ops.lut_gemv.default)] == [72]
    assert noise(result.program(*program.examples)[0], program(*program.examples)[0]) < 1e-3
    assert any("SNR of its result" in note for note in result.notes)


def test_tables_for_an_open_number_of_rows_are_noted() -> None:
    for rows, noted in ((None, 1), (3, 0), (9, 0)):
        notes = LutMatmul(table="int8").run(attention(rows), PassContext()).notes
        said = "takes row after row; give exact where there may be many: linear, linear_1"
        assert sum(said in note for note in notes) == noted


def test_a_quantized_input_is_left_to_other_passes() -> None:
    quantized = graphopt.optimize(attention(), "quantize").program
    result = LutMatmul().run(quantized, PassContext())
    assert not result.rewrites and any("qdq-fusion serves" in item.reason for item in result.declined)


def test_ignored_layers_stay() -> None:
    program = attention()
    result = check_pass(program, LutMatmul(ignored=("out",)), 3, "ignored=out names it")
    assert targets(result.program).count("aten.linear") == 1


def test_each_instance_is_refused_on_its_own() -> None:
    program = attention()
    ids = [item.id for item in LutMatmul().run(program, PassContext()).rewrites]
    for own in ids:
        alone = LutMatmul().run(program, PassContext(allow=lambda identity, own=own: identity == own))  # type: ignore[misc]
        assert [item.id for item in alone.rewrites] == [own]
        assert noise(alone.program(*program.examples)[0], program(*program.examples)[0]) < 0.02


class Correlated(nn.Module):
    """Two linears that read a value of few directions, its channels in no order of size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 80)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def correlated() -> tuple[Program, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    mixing = torch.randn(12, 64) * torch.rand(64) ** 2 * 3
    feeds = [{"x": torch.randn(32, 12) @ mixing + 0.05 * torch.randn(32, 64)} for _ in range(10)]
    return captured(Correlated().eval(), feeds[0]["x"]), feeds


def test_gptq_learns_from_the_data_and_gathers_once() -> None:
    program, feeds = correlated()
    lost = {}
    for spec in ("nearest", "gptq", "gptq,activation-order=true"):
        result = graphopt.optimize(program, f"lut-matmul{{bits=3,group-size=32,quantizer={spec}}}", data=feeds)
        lost[spec] = noise(result.program(feeds[-1]["x"])[1], program(feeds[-1]["x"])[1])
        names = targets(result.program)
        assert names.count("graphopt.lut_build") == 1
        assert names.count("aten.index_select") == ("order" in spec)
    assert lost["gptq"] < 0.5 * lost["nearest"] and lost["gptq,activation-order=true"] < 0.5 * lost["nearest"], lost


def test_hessians_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, each in a pass over the data of its own."""
    program = attention()
    whole = run(program, quantizer="gptq", bits=2)
    monkeypatch.setattr("graphopt.passes.lut_matmul.encoding.HESSIAN_BYTES", 1)
    parts = run(program, quantizer="gptq", bits=2)
    assert torch.equal(whole(*program.examples)[0], parts(*program.examples)[0])


def test_awq_scales_channels_and_folds() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96))
    with torch.no_grad():
        module[0].weight[::9] *= 30  # type: ignore[index, operator]
    program = captured(module.eval(), torch.randn(64, 64))
    losses = []
    for quantizer in ("mse", "awq"):
        result = graphopt.optimize(program, f"lut-matmul{{bits=3,quantizer={quantizer}}}")
        losses.append(noise(result.program(*program.examples)[0], program(*program.examples)[0]))
    assert losses[1] < 0.9 * losses[0]
    assert any("inputs of layers are those of the examples" in note for note in result.report.passes[-1].notes)


class Uneven(nn.Module):
    """Three products of one value, of which the first decides the result."""

    def __init__(self) -> None:
        super().__init__()
        self.much, self.some, self.little = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.much(x) + self.some(x) + 0.01 * self.little(x)


def test_a_budget_gives_bits_to_the_layers_that_need_them() -> None:
    torch.manual_seed(0)
    feeds = [{"x": torch.randn(8, 64)} for _ in range(20)]
    program = captured(Uneven().eval(), feeds[0]["x"])
    share = (3 * 64 * 64 / 2 - 2 * 64 * 64 / 8 + 3 * 8 * 128) / (
        3 * 64 * 64 * 4
    )  # two bits fewer in one, or one in two
    result = graphopt.optimize(program, f"lut-matmul{{group-size=32,size-budget={share}}}", data=feeds)
    bits = {node.args[8] for node in calls(result.program, ops.wq_gemm.default)}
    (note,) = [note for note in result.report.passes[-1].notes if "bits by layer" in note]
    assert "linear 4, linear_1 4, linear_2 2" in note and bits == {2, 4}
    with pytest.raises(UsageError, match=r"size-budget=0.01 cannot be met: in 2 bits weights take 0.125"):
        graphopt.optimize(program, "lut-matmul{group-size=32,size-budget=0.01}", data=feeds)
    with pytest.raises(UsageError, match="size-budget is judged on data"):
        graphopt.optimize(program, "lut-matmul{size-budget=0.1}")


def test_the_report_counts_bits_and_bytes() -> None:
    notes = LutMatmul(bits=2, group_size=32).run(attention(), PassContext()).notes
    size = 64 * 64 // 4 + 2 * 4 * 64 * 2
    assert notes[0] == f"4 weights take {4 * size} bytes instead of {4 * 4 * 4096} in float32, 4 bits a weight"
    assert notes[1].startswith(f"linear: 4 bits a weight, 16384 -> {size} bytes, SNR of its result ")


class Outlier(nn.Module):
    """One linear; its input has a channel that is far larger than the others of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 80, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 8, "table": "int8"},
        {"bits": 3, "quantizer": "gptq", "activation_order": True},
        {"grid": "nf4"},
    ],
)
@pytest.mark.parametrize("rows", [3, 40])
def test_noted_noise_is_that_of_weight_and_activations(options: dict[str, Any], rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 128) * torch.cat([torch.ones(127), torch.tensor([50.0])])
    program = captured(Outlier().eval(), x)
    result = LutMatmul(**options).run(program, PassContext())
    true = -10 * torch.log10(torch.tensor(noise(result.program(x)[0], program(x)[0]))).item()
    (note,) = [note for note in result.notes if "SNR" in note]
    assert float(note.removesuffix(" dB").rsplit(" ", 1)[1]) == pytest.approx(true, abs=0.1)
    assert ("on the rows that it was fitted to" in note) == (options.get("quantizer") == "gptq")
    dropped = options.get("table") == "int8" and rows > 4
    assert ("table=int8 is for up to 4 rows" in result.notes[-1]) == dropped


def test_sums_are_looked_up_for_few_rows_and_few_bits() -> None:
    result = LutMatmul(bits=2, kernel="lut").run(attention(), PassContext())
    many = calls(result.program, ops.wq_gemm.default)
    assert len(many) == 4 and not any("kernel" in node.kwargs for node in many)
    assert "kernel=lut is for up to 4 rows" in result.notes[-1]
    four = graphopt.optimize(attention(3), "quantize{weights=int4}").program
    declined = LutMatmul(bits=2, kernel="lut").run(four, PassContext()).declined
    assert sum(item.reason.endswith("up to 3 bits, and its weight has 4") for item in declined) == 4


def test_a_program_without_products_says_so() -> None:
    program = captured(nn.ReLU(), torch.randn(3, 4))
    refused = LutMatmul().run(attention(), PassContext(allow=lambda identity: False))
    assert not refused.rewrites and not any("was found" in note for note in refused.notes)
    for passed in (LutMatmul(), Quantize()):
        result = passed.run(program, PassContext())
        assert not result.rewrites and result.notes[-1].startswith("no product with a constant weight was found")


def test_widths_of_equal_bytes_are_no_narrowing() -> None:
    choices = {"a": [Choice(3, 0.1), Choice(3, 0.2), Choice(2, 0.3)], "b": [Choice(5, 0.0), Choice(5, 0.9)]}
    assert least_noise(choices, 7) == {"a": 2, "b": 0}
    assert least_noise(choices, 1) == {"a": 2, "b": 0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": "ternary", "bits": 3}, "grid=ternary has 2 bits, not 3"),
        ({"bits": 9}, "grid=affine has 1 to 8 bits, not 9"),
        ({"group_size": 8}, "group-size=8 must be 16 or more"),
        ({"activation_order": True}, "activation-order is of quantizer=gptq"),
        ({"grid": "nf4", "table": "int8"}, "grid=nf4 has a codebook"),
        ({"grid": "nf4", "size_budget": 0.1}, "give grid=affine or odd"),
        ({"bits": 2, "size_budget": 0.1}, "and more bits"),
        ({"group_size": 18, "table": "int8"}, "multiple of 4"),
        ({"kernel": "unpack", "table": "int8"}, "kernel=unpack multiplies codes"),
        ({"kernel": "lut"}, "for 1 to 3 bits; give bits, table=int8 or kernel=auto"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LutMatmul(**options)


@pytest.mark.parametrize("grid", ["affine", "odd", "ternary", "sign", "nf4", "fp4"])
def test_every_grid_survives_a_file(grid: Any, tmp_path: Any) -> None:
    program = run(attention(), grid=grid, group_size=32)
    program.save(str(tmp_path / "low.pt2"))
    again = graphopt.capture(str(tmp_path / "low.pt2"))
    assert torch.equal(again(*program.examples)[0], program(*program.examples)[0])
    assert targets(again) == targets(program)


@pytest.mark.slow
def test_sentences_keep_their_embeddings_best_with_gptq() -> None:
    """`low_bit_quality` in three bits: 0.827 by rounding to the nearest, 0.955 with GPTQ."""
    from graphopt.tools.benchmarking.folding_cases import minilm
    from graphopt.tools.benchmarking.low_bit_quality import quality

    specs = ["lut-matmul{bits=3}", "lut-matmul{bits=3,quantizer=gptq}"]
    nearest, gptq = (figures["cosine"] for _, _, figures in quality(minilm(), specs))
    assert 0.75 < nearest < 0.9 and gptq > 0.94


@pytest.mark.parametrize("rows", [3, 9, None])
def test_what_it_makes_compiles(rows: int | None, tmp_path: Any) -> None:
    """q, k, v and the projection in three bits, with few rows, many and an open number."""
    program = run(attention(rows), bits=3, group_size=32)
    graphopt.compile(program, database=None).save(str(tmp_path / "low.gopt"))
    session = graphopt.load(str(tmp_path / "low.gopt"))
    x = program.examples[0]
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), program(x)[0], rtol=1e-4, atol=1e-4)
