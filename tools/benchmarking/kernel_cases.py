"""The kernels of `--suite kernels`: each is a program that holds one operator, in the shapes that real models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.errors import UnknownNameError

if TYPE_CHECKING:
    from graphopt.program import Program

MOST_COLD = 256 << 20  # bytes of different weights that one run reads at most, so that no cache keeps them
MOST_COPIES = 100
SEED = 0

Built = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """`build` gives (module, example inputs); what counts in it are the nodes of `operator`, with weights of the shape
    `weight` where that is given. `calls`: how often MiniLM runs it at 128 tokens.
    """

    kind: str
    name: str
    operator: str
    build: Callable[[], Built]
    weight: tuple[int, ...] | None = None
    calls: int = 0

    def wanted(self, program: Program) -> tuple[str, ...]:
        """The names of the nodes that count."""
        return tuple(node.name for node in program.nodes() if self._counts(node))

    def _counts(self, node: Any) -> bool:
        if node.op != "call_function" or not str(node.target).startswith(f"aten.{self.operator}."):
            return False
        shapes = [tuple(item.meta["val"].shape) for item in node.all_input_nodes if "val" in item.meta]
        return self.weight is None or self.weight in shapes


def seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    def built() -> Built:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return build()

    return built


def cold_bytes() -> int:
    """Twice the last cache: read in turn, nothing is still there when it is read again."""
    from graphopt.runtime.caches import cache_sizes

    return min(2 * max(cache_sizes().values()), MOST_COLD)


def gemm(rows: int, inner: int, columns: int, calls: int = 0) -> Case:
    """rows x inner times inner x columns: a chain of linears there and back, of so many weights that none is cached."""

    def build() -> Built:
        import torch
        from torch import nn

        copies = max(1, min(MOST_COPIES, -(-cold_bytes() // (8 * inner * columns))))
        there_and_back = ((nn.Linear(inner, columns), nn.Linear(columns, inner)) for _ in range(copies))
        return nn.Sequential(*(linear for pair in there_and_back for linear in pair)).eval(), (
            torch.randn(rows, inner),
        )

    kind, name = ("gemv", f"{inner}x{columns}") if rows == 1 else ("gemm", f"{rows}x{inner}x{columns}")
    return Case(kind, f"{kind} {name}", "linear", seeded(build), (columns, inner), calls)


def attention(model: str, heads: int, tokens: int, size: int, pairs: int | None = None, causal: bool = False) -> Case:
    """`pairs` of keys and values for the heads, by default one each."""

    def build() -> Built:
        import torch
        from torch import nn

        class Attention(nn.Module):
            def forward(self, query: Any, key: Any, value: Any) -> Any:
                return nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=causal, enable_gqa=pairs is not None
                )

        sizes = (heads, pairs or heads, pairs or heads)
        return Attention().eval(), tuple(torch.randn(1, count, tokens, size) for count in sizes)

    return Case("attention", f"attention {model}", "scaled_dot_product_attention", seeded(build))


def convolution(size: int, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> Case:
    """Between two small 1x1 convolutions, so that its input and output are laid out as inside a model."""

    def build() -> Built:
        import torch
        from torch import nn

        middle = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups)
        model = nn.Sequential(nn.Conv2d(7, before, 1), middle, nn.ReLU(), nn.Conv2d(after, 5, 1))
        return model.eval(), (torch.randn(1, 7, size, size),)

    kind = "depthwise" if groups == before == after else "conv"
    name = f"{kind} {kernel}x{kernel} {before}-{after} at {size}" + (f" stride {stride}" if stride > 1 else "")
    return Case(kind, name, "conv2d", seeded(build), (after, before // groups, kernel, kernel))


def first_convolution() -> Case:
    def build() -> Built:
        import torch
        from torch import nn

        return nn.Conv2d(3, 64, 7, 2, padding=3).eval(), (torch.randn(1, 3, 224, 224),)

    return Case("conv", "conv 7x7 3-64 at 224 stride 2", "conv2d", seeded(build))


def normalization(kind: str, rows: int, columns: int) -> Case:
    def build() -> Built:
        import torch
        from torch import nn

        made = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
        module = nn.Softmax(-1) if kind == "softmax" else made[kind](columns)
        return module.eval(), (torch.randn(rows, columns),)

    return Case("norm", f"{kind} {rows}x{columns}", kind, seeded(build))


def movement(name: str, operator: str, function: Callable[..., Any], *shapes: tuple[int, ...]) -> Case:
    """`function` of tensors of these shapes; what counts is the node that its kernel stores."""

    def build() -> Built:
        import torch
        from torch import nn

        class Movement(nn.Module):
            def forward(self, a: Any, b: Any = None) -> Any:
                return function(a) if b is None else function(a, b)

        return Movement().eval(), tuple(torch.randn(*shape) for shape in shapes)

    return Case("movement", f"movement {name}", operator, seeded(build))


def embedding(count: int, width: int, tokens: int) -> Case:
    def build() -> Built:
        import torch
        from torch import nn

        return nn.Embedding(count, width).eval(), (torch.randint(0, count, (1, tokens)),)

    return Case("movement", f"movement embedding {tokens} of {count}x{width}", "embedding", seeded(build))


def _pixel_shuffle(x: Any) -> Any:
    from torch.nn.functional import pixel_shuffle

    return pixel_shuffle(x, 2)


def windows(x: Any) -> Any:
    """[1, 8 7, 8 7, 96] as 64 windows of 7 x 7, as Swin has them."""
    return x.view(1, 8, 7, 8, 7, 96).permute(0, 1, 3, 2, 4, 5).contiguous()


CASES = (
    gemm(128, 384, 1152, calls=6),
    gemm(128, 384, 384, calls=6),
    gemm(128, 384, 1536, calls=6),
    gemm(128, 1536, 384, calls=6),
    gemm(197, 384, 1536),
    gemm(128, 768, 3072),
    gemm(1, 768, 2048),
    gemm(1, 768, 32000),
    attention("MiniLM", 12, 128, 32),
    attention("ViT-S/16", 6, 197, 64),
    attention("GPT-2", 12, 128, 64, causal=True),
    attention("Llama-style", 12, 64, 64, pairs=4, causal=True),
    first_convolution(),
    convolution(56, 64, 64, 3),
    convolution(56, 64, 256, 1),
    convolution(56, 128, 128, 3, stride=2),
    convolution(28, 128, 128, 3),
    convolution(14, 256, 256, 3),
    convolution(14, 1024, 256, 1),
    convolution(7, 512, 512, 3),
    convolution(7, 512, 2048, 1),
    convolution(112, 96, 96, 3, stride=2, groups=96),
    convolution(56, 144, 144, 3, groups=144),
    convolution(14, 576, 576, 3, groups=576),
    convolution(56, 96, 96, 7, groups=96),
    convolution(14, 384, 384, 7, groups=384),
    normalization("layer_norm", 128, 384),
    normalization("layer_norm", 3136, 96),
    normalization("rms_norm", 64, 768),
    normalization("softmax", 1536, 128),
    movement("transpose 1024x1024", "clone", lambda x: x.t().contiguous(), (1024, 1024)),
    movement("transpose 197x384", "clone", lambda x: x.t().contiguous(), (197, 384)),
    movement("transpose 12x128x64", "clone", lambda x: x.transpose(1, 2).contiguous(), (12, 128, 64)),
    movement("NCHW to NHWC 64 at 112", "clone", lambda x: x.permute(0, 2, 3, 1).contiguous(), (1, 64, 112, 112)),
    movement("NHWC to NCHW 64 at 112", "clone", lambda x: x.permute(0, 3, 1, 2).contiguous(), (1, 112, 112, 64)),
    movement("pixel_shuffle 64 at 56", "pixel_shuffle", lambda x: _pixel_shuffle(x), (1, 64, 56, 56)),
    movement("windows 7x7 of 56x56x96", "clone", windows, (1, 56, 56, 96)),
    movement("add transposed 1024x1024", "add", lambda x, y: x + y.t(), (1024, 1024), (1024, 1024)),
    movement("roll 56x56x96", "roll", lambda x: x.roll((-3, -3), (1, 2)), (1, 56, 56, 96)),
    movement("flip 1024x1024", "flip", lambda x: x.flip(1), (1024, 1024)),
    embedding(30522, 384, 128),
    embedding(32000, 768, 64),
)


def choose_cases(text: str | None) -> tuple[Case, ...]:
    """Those whose name or kind is in "a,b", all without; raises UnknownNameError."""
    if text is None:
        return CASES
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {name for case in CASES for name in (case.kind, case.name)}
    for name in names:
        if name not in known:
            raise UnknownNameError("kernel", name, known)
    return tuple(case for case in CASES if case.kind in names or case.name in names)
