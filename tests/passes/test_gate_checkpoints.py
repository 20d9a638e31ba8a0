"""Networks trained with gates, saved in both layouts, against the ungated program that takes their checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.analysis.attention import NoAttention, find_attentions
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.passes.gated_attention import GatedAttention
from graphopt.passes.gated_attention.checkpoint import Rows, matching_names
from graphopt.passes.gated_attention.gates import find_gate
from tests.passes.checking import captured, fingerprint

HEADS, GROUPS, WIDTH, FEATURES = 4, 2, 6, 16


class Attention(nn.Module):
    """Grouped queries. `gates` is the layout of q_proj, "" where it makes queries alone; `full` adds what Qwen3 has."""

    def __init__(self, gates: str, mode: str, full: bool) -> None:
        super().__init__()
        self.gates, self.mode = gates, mode
        scores = (HEADS if mode == "headwise" else HEADS * WIDTH) if gates else 0
        self.q_proj = nn.Linear(FEATURES, HEADS * WIDTH + scores, bias=full)
        self.k_proj, self.v_proj = (nn.Linear(FEATURES, GROUPS * WIDTH, bias=full) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * WIDTH, FEATURES, bias=False)
        self.q_norm = nn.RMSNorm(WIDTH) if full else None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        made, gate = self.q_proj(x), None
        if self.gates == "per-group":
            parts = made.view(batch, length, GROUPS, -1)
            made, gate = parts.split([HEADS // GROUPS * WIDTH, parts.shape[-1] - HEADS // GROUPS * WIDTH], -1)
        elif self.gates:
            parts = made.view(batch, length, HEADS, -1)
            made, gate = parts.split([WIDTH, parts.shape[-1] - WIDTH], -1)
        q = made.reshape(batch, length, HEADS, WIDTH)
        if self.q_norm is not None:
            q = self.q_norm(q)
        k, v = (layer(x).view(batch, length, GROUPS, WIDTH).transpose(1, 2) for layer in (self.k_proj, self.v_proj))
        q = q.transpose(1, 2)
        if self.q_norm is not None:
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        if gate is not None:
            y = y * torch.sigmoid(gate.reshape(batch, length, HEADS, -1))
        found: Tensor = self.o_proj(y.reshape(batch, length, -1))
        return found


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] / torch.tensor([1.0, 10.0, 100.0]).repeat(2)
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


class Network(nn.Module):
    """Two blocks; a buffer stands for state that a checkpoint may have."""

    def __init__(self, gates: str = "", mode: str = "", full: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(FEATURES), "attention": Attention(gates, mode, full)}) for _ in range(2)
        )
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["attention"](layer["norm"](x))
        return x + self.shift


def saved(folder: Path, module: nn.Module, prefix: str = "") -> str:
    path = folder / "model.safetensors"
    save_file({f"{prefix}{name}": value for name, value in module.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("rows", "mode", "full"),
    [
        ("per-group", "headwise", True),
        ("per-group", "elementwise", False),
        ("per-head", "headwise", False),
        ("per-head", "elementwise", True),
    ],
)
def test_the_program_becomes_the_trained_network(tmp_path: Path, rows: Rows, mode: str, full: bool) -> None:
    trained = Network(rows, mode, full).eval()
    x = torch.randn(2, 5, FEATURES)
    program = captured(Network(full=full).eval(), x)
    printed, tensors = fingerprint(program)
    pass_ = GatedAttention(mode=mode, checkpoint=saved(tmp_path, trained), rows=rows)  # type: ignore[arg-type]
    result = pass_.run(program, PassContext())
    assert len(result.rewrites) == 2
    torch.testing.assert_close(result.program(x)[0], trained(x), rtol=1e-5, atol=1e-5)
    assert fingerprint(program)[0] == printed
    assert all(torch.equal(old, new) for old, new in zip(fingerprint(program)[1], tensors, strict=True))


def test_the_other_layout_is_another_network(tmp_path: Path) -> None:
    trained = Network("per-head", "elementwise").eval()
    x = torch.randn(2, 5, FEATURES)
    pass_ = GatedAttention(mode="elementwise", checkpoint=saved(tmp_path, trained), rows="per-group")
    result = pass_.run(captured(Network().eval(), x), PassContext())
    assert not torch.allclose(result.program(x)[0], trained(x), atol=1e-3)


def test_it_is_approximate_and_says_by_how_much(tmp_path: Path) -> None:
    trained = Network("per-head", "headwise").eval()
    x = torch.randn(2, 5, FEATURES)
    program = captured(Network().eval(), x)
    spec = f"gated-attention{{checkpoint={saved(tmp_path, trained)},rows=per-head}}"
    with pytest.raises(UsageError, match="needs both data and metric"):
        graphopt.optimize(program, spec)
    data = [{"x": torch.randn(2, 5, FEATURES).numpy()} for _ in range(5)]
    result = graphopt.optimize(program, spec, data=data, metric="cosine")
    torch.testing.assert_close(result.program(x)[0], trained(x), rtol=1e-5, atol=1e-5)
    assert len(result.report.passes[0].rewrites) == 2


def test_prefixes_shards_other_types_and_layers_without_gates(tmp_path: Path) -> None:
    """The first block has no gate; weights are in two files, in bfloat16, below "model."."""
    trained = Network("per-group", "elementwise").bfloat16().float().eval()
    first = Network().bfloat16().float().eval().layers[0]
    trained.layers[0] = first
    state = {f"model.{name}": value.bfloat16() for name, value in trained.state_dict().items()}
    names = sorted(state)
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file({name: state[name] for name in names[::2]}, folder / "1.safetensors")
    save_file({"head.weight": torch.ones(3)} | {name: state[name] for name in names[1::2]}, folder / "2.safetensors")

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.network(x)
            return found

    x = torch.randn(2, 5, FEATURES)
    pass_ = GatedAttention(mode="elementwise", checkpoint=str(folder), rows="per-group")
    result = pass_.run(captured(Whole().eval(), x), PassContext())
    torch.testing.assert_close(result.program(x)[0], trained(x), rtol=1e-5, atol=1e-5)
    assert [item.reason for item in result.declined] == ["model.layers.0.attention.q_proj.weight has no rows of gates"]
    attentions = [item for item in find_attentions(result.program) if not isinstance(item, NoAttention)]
    assert [find_gate(item.output) is not None for item in attentions] == [False, True]
    assert "1 tensors of the checkpoint are not in the program: head.weight" in result.notes


def test_a_wrong_checkpoint_says_what_it_has(tmp_path: Path) -> None:
    x = torch.randn(2, 5, FEATURES)
    program = captured(Network().eval(), x)
    wide = Network("per-head", "headwise")

    def error(state: dict[str, Tensor], **options: str) -> str:
        save_file(state, tmp_path / "bad.safetensors")
        pass_ = GatedAttention(checkpoint=str(tmp_path / "bad.safetensors"), **({"rows": "per-head"} | options))  # type: ignore[arg-type]
        with pytest.raises(UsageError) as caught:
            pass_.run(program, PassContext())
        return str(caught.value).replace(str(tmp_path), "")

    state = dict(wide.state_dict())
    query = "layers.0.attention.q_proj.weight"
    assert error(state, mode="elementwise") == (
        f"{query} of /bad.safetensors is [28, 16], where the program's queries [24, 16] with mode=elementwise gates "
        "take [48, 16]"
    )
    assert error({name: value for name, value in state.items() if name != "layers.1.norm.bias"}).startswith(
        "the checkpoint /bad.safetensors has no tensor for the program's layers.1.norm.bias [16]"
    )
    assert error(state | {"layers.0.norm.weight": torch.ones(8)}) == (
        "layers.0.norm.weight of /bad.safetensors is [8], where the program's layers.0.norm.weight is [16]"
    )
    assert "is [3, 16], where the program's queries" in error(state | {query: torch.ones(3, 16)})
    assert "q_proj.bias of /bad.safetensors is [28], the program has no bias for its queries" in error(
        state | {"layers.0.attention.q_proj.bias": torch.ones(28)}
    )
    assert "no attention takes a gate from" in error(dict(Network().state_dict()))
    assert "may be a.layers.0.attention.q_proj.weight or b.layers" in error(
        {f"{part}.{name}": value.clone() for part in "ab" for name, value in state.items()}
    )


def test_files_that_are_none(tmp_path: Path) -> None:
    program = captured(Network().eval(), torch.randn(2, 5, FEATURES))

    def error(path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            GatedAttention(checkpoint=str(path), rows="per-head").run(program, PassContext())
        return str(caught.value)

    assert "neither a .safetensors file nor a folder" in error(tmp_path)
    assert "neither a .safetensors file nor a folder" in error(tmp_path / "model.bin")
    assert "cannot be read" in error(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 20)
    assert "torn.safetensors cannot be read" in error(tmp_path / "torn.safetensors")
    for name in ("1", "2"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "torn.safetensors").unlink()
    assert "tensor a is both in 1.safetensors and in 2.safetensors" in error(tmp_path)


def test_packed_keys_have_no_groups(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self, scores: int) -> None:
            super().__init__()
            self.q, self.kv, self.out = nn.Linear(16, 16 + scores), nn.Linear(16, 32), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (self.q(x), *self.kv(x).chunk(2, -1)))
            found: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return found

    program = captured(Packed(0).eval(), torch.randn(2, 5, 16))
    path = saved(tmp_path, Packed(4))
    with pytest.raises(UsageError, match="as rows=per-group needs"):
        GatedAttention(checkpoint=path, rows="per-group").run(program, PassContext())
    assert len(GatedAttention(checkpoint=path, rows="per-head").run(program, PassContext()).rewrites) == 1


def test_options_go_together() -> None:
    with pytest.raises(UsageError, match="checkpoint and rows go together"):
        GatedAttention(checkpoint="a.safetensors")
    with pytest.raises(UsageError, match="checkpoint and rows go together"):
        GatedAttention(rows="per-head")
    with pytest.raises(UsageError, match="a checkpoint has none; leave it out"):
        GatedAttention(checkpoint="a.safetensors", rows="per-head", form="plain")


def test_names_match_but_for_a_prefix() -> None:
    ours = ["m.model.layers.0.q.weight", "m.model.layers.1.q.weight", "m.head.weight"]
    theirs = ["model.layers.0.q.weight", "model.layers.1.q.weight", "head.weight"]
    assert matching_names(ours, theirs, ours[0]) == dict(zip(ours, theirs, strict=True))
    assert matching_names(["layers.0.q.weight"], theirs, "layers.0.q.weight") == {"layers.0.q.weight": theirs[0]}
    assert matching_names(["a.b"], ["c.d"], "a.b") == {}
    both = ["encoder.layers.0.q.weight", "decoder.layers.0.q.weight", "decoder.norm"]
    assert matching_names(["layers.0.q.weight", "norm"], both, "layers.0.q.weight")["norm"] == "decoder.norm"
