"""Sample calls of every core ATen overload, and those that are left out, each with its reason.

Edge cases are part of the samples: special values, empty and zero-dimensional tensors, negative axes, broadcasting,
promotion of dtypes. Sizes that follow the number of rows become symbolic where a sample is compiled dynamically.
"""

from __future__ import annotations

import torch

from tests.core_aten import families
from tests.core_aten.tensors import Samples, call

BACKWARD = "computes gradients; artifacts run forward"
RANDOM = "draws random numbers"
COMPLEX = "works on complex numbers, which have no lowering"
IN_PLACE = "writes to its arguments; the normal form holds its functional twin"
DATA_DEPENDENT = "its result has a size or a Python value that depends on data"
EXCLUDED: dict[str, str] = {
    "_adaptive_avg_pool2d_backward.default": BACKWARD,
    "_fft_c2r.default": COMPLEX,
    "_fft_r2c.default": COMPLEX,
    "_local_scalar_dense.default": DATA_DEPENDENT,
    "_native_batch_norm_legit.default": IN_PLACE,
    "atan2.out": IN_PLACE,
    "avg_pool2d_backward.default": BACKWARD,
    "convolution_backward.default": BACKWARD,
    "embedding_dense_backward.default": BACKWARD,
    "max_pool2d_with_indices_backward.default": BACKWARD,
    "native_group_norm_backward.default": BACKWARD,
    "native_layer_norm_backward.default": BACKWARD,
    "nonzero.default": DATA_DEPENDENT,
    "rand.default": RANDOM,
    "randn.default": RANDOM,
    "randperm.default": RANDOM,
    "resize_.default": IN_PLACE,
}
EXCEPTIONS: dict[str, str] = {}  # supported overloads without a lowering, each with the reason
_INTEGER_POWER = "raises integers to a power that varies: repeated squaring has no expression without variables"
_INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
DTYPE_EXCEPTIONS: dict[tuple[str, torch.dtype], str] = {
    **{(name, dtype): _INTEGER_POWER for name in ("pow.Scalar", "pow.Tensor_Tensor") for dtype in _INTEGERS},
    ("upsample_bilinear2d.vec", torch.uint8): "PyTorch interpolates by weights of 16 bits; refused, not approximated",
    **{
        ("grid_sampler_2d.default", dtype): "PyTorch rounds positions to 8 or 11 bits and reads elsewhere"
        for dtype in (torch.float16, torch.bfloat16)
    },
}
UNSPECIFIED = frozenset({"empty.memory_format", "empty_strided.default"})  # only shape and dtype can be compared
FIRST_ONLY = frozenset({"_embedding_bag.default"})  # the other results serve gradients, and are empty or not as it runs


def core_overloads() -> list[torch._ops.OpOverload]:
    """Every overload of torch.ops.aten with the tag `core`, by name."""
    registered = torch._C._dispatch_get_all_op_names()  # dir(torch.ops.aten) knows only what was used before
    names = [name.removeprefix("aten::").partition(".") for name in registered if name.startswith("aten::")]
    found = [getattr(getattr(torch.ops.aten, name), overload or "default", None) for name, _, overload in names]
    return sorted((overload for overload in found if overload and torch.Tag.core in overload.tags), key=str)


def name_of(overload: torch._ops.OpOverload) -> str:
    """The name used here, without its namespace: "add.Tensor"."""
    return str(overload).removeprefix("aten.")


_UNARY = (
    "abs acos acosh alias asin asinh atan atanh bitwise_not ceil clone cos cosh erf exp expm1 floor isinf isnan log "
    "log10 log1p log2 logical_not neg reciprocal relu round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc"
)
_BINARY = (
    "atan2.default bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor div.Tensor eq.Tensor fmod.Tensor ge.Tensor "
    "gt.Tensor le.Tensor logical_and.default logical_or.default logical_xor.default lt.Tensor maximum.default "
    "minimum.default mul.Tensor ne.Tensor remainder.Tensor"
)
_WITH_SCALAR = "div eq fmod ge gt le lt mul ne remainder"

SAMPLES: dict[str, Samples] = {
    **{f"{name}.default": families.unary for name in _UNARY.split()},
    **dict.fromkeys(_BINARY.split(), families.binary),
    **{f"{name}.Scalar": families.scalar(3, -2, 1.5) for name in _WITH_SCALAR.split()},
    **{f"bitwise_{name}.Scalar": families.scalar(3, -2) for name in ("and", "or", "xor")},
    **dict.fromkeys(("amax.default", "amin.default"), families.reduction),
    **dict.fromkeys(("any.dims", "mean.dim", "sum.dim_IntList"), families.reduction_of_nothing_too),
    **dict.fromkeys(("any.default", "mean.default", "prod.default"), families.whole),
    **dict.fromkeys(("max.dim", "min.dim"), families.extreme_with_position),
    **dict.fromkeys(("argmax.default", "argmin.default"), families.arg_extreme),
    "_adaptive_avg_pool2d.default": families.image_sizes(([2, 3],), ([1, 1],), ([4, 4],)),
    "_adaptive_avg_pool3d.default": families.image_sizes(([2, 2, 3],), ([1, 1, 1],), ([3, 4, 4],), spatial=3),
    "_cdist_forward.default": lambda t: [
        *(call(t.finite(t.rows, 4), t.finite(6, 4), p, None) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))),
        call(t.finite(2, t.rows, 4), t.finite(2, 5, 4), 2.0, 2),
    ],
    "_embedding_bag.default": families.embedding_bag,
    "_log_softmax.default": families.softmax,
    "_native_batch_norm_legit.no_stats": lambda t: [
        call(t.finite(t.rows, 2, 5), *families.batch_norm(t)[:2], True, 0.1, 1e-5),
        call(t.finite(t.rows, 2, 5), None, None, True, 0.1, 1e-3),
    ],
    "_native_batch_norm_legit_no_training.default": lambda t: [
        call(t.finite(t.rows, 2, 5), *families.batch_norm(t), 0.1, 1e-5),
        call(t.finite(t.rows, 2, 5, 3), None, None, *families.batch_norm(t)[2:], 0.1, 1e-3),
        call(t.finite(t.rows, 2), *families.batch_norm(t), 0.1, 1e-5),
    ],
    "_pdist_forward.default": lambda t: [call(t.finite(5, 4), p) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))],
    "_softmax.default": families.softmax,
    "_to_copy.default": lambda t: [
        call(t.finite(t.rows, 5), dtype=kind)
        for kind in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool)
    ],
    "adaptive_avg_pool1d.default": families.image_sizes(([3],), ([1],), ([4],), spatial=1),
    "add.Scalar": lambda t: [call(t.x(t.rows, 5), 3), call(t.x(t.rows, 5), 1.5), call(t.x(t.rows, 5), 2, 3)],
    "add.Tensor": families.scaled,
    "addmm.default": lambda t: [
        call(t.finite(6), t.finite(t.rows, 4), t.finite(4, 6)),
        call(t.finite(t.rows, 6), t.finite(t.rows, 4), t.finite(4, 6), beta=2, alpha=3),
    ],
    "any.dim": families.over_one,
    "arange.start_step": lambda t: [
        call(0, 7, 1, dtype=t.dtype),
        call(3, -4, -2, dtype=t.dtype),
        call(0.5, 3.25, 0.5, dtype=t.dtype if t.dtype.is_floating_point else torch.float32),
        call(0, 6),
        call(0.0, 6, 2),
    ],
    "as_strided.default": lambda t: [
        call(t.x(4, 6), [3, 2], [6, 2], 1),
        call(t.x(4, 6), [2, 3, 2], [1, 6, 1]),
        call(t.x(4, 6), [24], [1]),
        call(t.x(4, 6), [5], [0], 3),
    ],
    "avg_pool1d.default": families.image_sizes(([2],), ([3], [2], [1], True, False), spatial=1),
    "avg_pool2d.default": families.image_sizes(
        ([2, 2],), ([3, 2], [2, 1], [1, 1], True, False), ([2], [2], [0], False, True, 3)
    ),
    "avg_pool3d.default": families.image_sizes(([2, 2, 2],), ([2], [1], [1], False, False), spatial=3),
    "bmm.default": lambda t: [call(t.finite(2, t.rows, 4), t.finite(2, 4, 5)), call(t.x(2, 3, 4), t.finite(2, 4, 5))],
    "cat.default": lambda t: [
        call([t.x(t.rows, 5), t.x(t.rows, 5, number=1)], -1),
        call([t.x(t.rows, 5), t.x(0, 5), t.x(2, 5)]),
        call([t.x(t.rows, 5), t.x(t.rows, 5, dtype=torch.int64)], 1),
    ],
    "clamp.Tensor": lambda t: [
        call(t.x(t.rows, 5), t.x(5, number=1), None),
        call(t.x(t.rows, 5), t.x(5, number=1), t.x(t.rows, 1)),
        call(t.x(t.rows, 5), None, t.x()),
    ],
    "clamp.default": lambda t: [call(t.x(t.rows, 5), -1, 2), call(t.x(t.rows, 5), max=1.5), call(t.x(t.rows, 5), 3, 1)],
    "col2im.default": lambda t: [
        call(t.finite(t.rows, 12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        call(t.finite(t.rows, 12, 4), [4, 5], [2, 2], [2, 1], [1, 0], [2, 2]),
        call(t.finite(12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
    ],
    "constant_pad_nd.default": lambda t: [
        call(t.x(t.rows, 5), [1, 2]),
        call(t.x(t.rows, 5), [1, -1, 0, 2], 1.5),
        call(t.x(2, t.rows, 4), [0, 1, 2, 0], -3),
    ],
    "convolution.default": families.convolution,
    "copy.default": lambda t: [
        call(t.x(t.rows, 5), t.x(5, number=1)),
        call(t.x(t.rows, 5), t.finite(t.rows, 1, dtype=torch.float64)),
        call(t.x(t.rows, 5), t.finite(dtype=torch.int64)),
    ],
    "cumsum.default": lambda t: [
        *families.over_one(t)[:1],
        *(call(c.args[0], c.args[1]) for c in families.over_one(t)[1:]),
        call(t.finite(t.rows, 5), 0, dtype=torch.float64),
    ],
    "diagonal.default": lambda t: [
        call(t.x(t.rows, 5)),
        call(t.x(4, 5), -1),
        call(t.x(4, 5), 2),
        call(t.x(2, t.rows, 4), 1, -1, 0),
    ],
    "div.Scalar_mode": families.modes(lambda t: (3, -2, 1.5)),
    "div.Tensor_mode": families.modes(
        lambda t: (t.divisor(t.rows, 5, number=1), t.divisor(5, number=2), t.divisor(t.rows, 5, dtype=torch.int64))
    ),
    "elu.default": lambda t: [call(t.x(t.rows, 5)), call(t.x(t.rows, 5), 0.5, 2.0, 1.5)],
    "embedding.default": lambda t: [
        call(t.finite(10, 4), t.index(10, t.rows, 3)),
        call(t.finite(10, 4), t.index(10, 6).int(), 2),
    ],
    "empty.memory_format": lambda t: [call([2, 3], dtype=t.dtype)],
    "empty_strided.default": lambda t: [call([2, 3], [1, 2], dtype=t.dtype)],
    "expand.default": lambda t: [
        call(t.x(t.rows, 1), [-1, 4]),
        call(t.x(5), [2, 3, 5]),
        call(t.x(), [2, 2]),
        call(t.x(1, 5), [0, 5]),
    ],
    "fill.Scalar": lambda t: [call(t.x(t.rows, 5), 1.5), call(t.x(), -2)],
    "flip.default": lambda t: [call(t.x(t.rows, 5), [0]), call(t.x(2, t.rows, 4), [-1, 0]), call(t.x(), [])],
    "fmod.Scalar": families.scalar(3, -2, 1.5),
    "full.default": lambda t: [
        call([2, 3], 1.5, dtype=t.dtype),
        call([], -2, dtype=t.dtype),
        call([2], 7),
        call([0], 1.5),
    ],
    "full_like.default": lambda t: [
        call(t.x(t.rows, 5), 2),
        call(t.x(t.rows, 5), 2.5, dtype=torch.float64),
        call(t.x(), True),
    ],
    "gather.default": lambda t: [
        call(t.x(t.rows, 5), 1, t.index(5, t.rows, 7)),
        call(t.x(4, 5), 0, t.index(4, 6, 3)),
        call(t.x(2, 3, 4), -2, t.index(3, 2, 5, 2)),
        call(t.x(), 0, t.index(1)),
    ],
    "gelu.default": lambda t: [
        call(t.finite(t.rows, 5)),
        call(t.finite(t.rows, 5), approximate="tanh"),
        call(t.finite()),
    ],
    "grid_sampler_2d.default": families.grid_sampler,
    "hardtanh.default": lambda t: [call(t.x(t.rows, 5)), call(t.x(t.rows, 5), 0, 3)],
    "index.Tensor": families.index,
    "index_put.default": families.index_put,
    "index_select.default": lambda t: [
        call(t.x(t.rows, 5), 1, t.index(5, 7)),
        call(t.x(4, 5), -2, t.index(4, t.rows).int()),
        call(t.x(), 0, t.index(1, 1)),
    ],
    "leaky_relu.default": lambda t: [call(t.x(t.rows, 5)), call(t.x(t.rows, 5), 0.2), call(t.x(), -1)],
    "masked_scatter.default": lambda t: [
        call(t.x(t.rows, 5), t.flags(t.rows, 5), t.finite(t.rows, 8)),
        call(t.x(t.rows, 5), t.flags(5), t.finite(40)),
        call(t.x(2, t.rows, 4), t.flags(2, t.rows, 1), t.finite(2, t.rows, 4)),
    ],
    "max_pool2d_with_indices.default": lambda t: [
        *families.image_sizes(([2, 2],), ([3, 2], [2, 1], [1, 1], [1, 2], True))(t),
        call(t.x(t.rows, 2, 5, 6), [3], [1], [1]),
    ],
    "max_pool3d_with_indices.default": families.image_sizes(([2, 2, 2],), ([2], [1], [1], [1], True), spatial=3),
    "mm.default": lambda t: [
        call(t.finite(t.rows, 4), t.finite(4, 6)),
        call(t.x(3, 4), t.finite(4, 6)),
        call(t.finite(3, 0), t.finite(0, 6)),
    ],
    "native_dropout.default": lambda t: [call(t.x(t.rows, 5), 0.5, False)],
    "native_group_norm.default": lambda t: [
        call(t.finite(3, 4, 5), t.finite(4), t.finite(4, number=1), 3, 4, 5, 2, 1e-5),
        call(t.finite(2, 6, 3, 4), None, None, 2, 6, 12, 3, 1e-3),
    ],
    "native_layer_norm.default": lambda t: [
        call(t.finite(t.rows, 5), [5], t.finite(5), t.finite(5, number=1), 1e-5),
        call(t.finite(t.rows, 3, 4), [3, 4], None, None, 1e-3),
        call(t.finite(t.rows, 5), [5], t.finite(5), None, 1e-5),
    ],
    "permute.default": lambda t: [call(t.x(t.rows, 5), [1, 0]), call(t.x(2, t.rows, 4), [-1, 0, 1]), call(t.x(), [])],
    "pow.Scalar": lambda t: [call(2.0, t.x(t.rows, 5)), call(2, t.small(t.rows, 5)), call(1, t.x(t.rows, 5))],
    "pow.Tensor_Scalar": lambda t: [
        *(call(t.x(t.rows, 5), number) for number in (0, 1, 2, 3)),
        *(call(t.x(t.rows, 5), number) for number in (0.5, -1.0, 2.5, -0.5)),
    ],
    "pow.Tensor_Tensor": lambda t: [
        call(t.x(t.rows, 5), t.x(t.rows, 5, number=1) if t.dtype.is_floating_point else t.small(t.rows, 5)),
        call(t.x(t.rows, 5), t.small(5)),
        call(t.x(t.rows, 5, dtype=torch.int8), t.small()),
    ],
    "prod.dim_int": lambda t: [*families.over_one(t), call(t.x(0, 5), 0)],
    "reflection_pad1d.default": families.pads(1),
    "reflection_pad2d.default": families.pads(2),
    "reflection_pad3d.default": families.pads(3),
    "repeat.default": lambda t: [
        call(t.x(t.rows, 5), [2, 1]),
        call(t.x(5), [2, 1, 3]),
        call(t.x(), [2]),
        call(t.x(5), [0]),
    ],
    "replication_pad2d.default": families.pads(2),
    "replication_pad3d.default": families.pads(3),
    "scalar_tensor.default": lambda t: [call(2, dtype=t.dtype), call(1.5), call(float("nan"))],
    "scatter.src": families.scatter(lambda t: t.finite(4, 3, number=1)),
    "scatter.value": families.scatter(lambda t: 2),
    "scatter_add.default": families.scatter_many,
    "scatter_reduce.two": families.scatter_reduce,
    "select.int": lambda t: [call(t.x(t.rows, 5), 1, -2), call(t.x(t.rows, 5), 0, 1), call(t.x(2, t.rows, 4), -1, 0)],
    "select_scatter.default": lambda t: [
        call(t.x(t.rows, 5), t.x(t.rows), 1, -2),
        call(t.x(t.rows, 5), t.x(5), 0, 1),
        call(t.x(5), t.x(), 0, 2),
    ],
    "slice.Tensor": lambda t: [
        call(t.x(t.rows, 5), 1, 1, 4),
        call(t.x(t.rows, 5), -1, -3, None, 2),
        call(t.x(t.rows, 5), 0, 1),
        call(t.x(4, 5), 0, 3, 1),
        call(t.x(4, 5), 0, -100, 100),
    ],
    "slice_scatter.default": lambda t: [
        call(t.x(t.rows, 5), t.x(t.rows, 3), 1, 1, 4),
        call(t.x(t.rows, 5), t.x(t.rows, 2), -1, -3, None, 2),
        call(t.x(4, 5), t.x(2, 5), 0, 2, 100),
    ],
    "sort.default": lambda t: [
        call(t.distinct(t.rows, 5)),
        call(t.distinct(t.rows, 5), 0, True),
        call(t.distinct(2, 3, 4 if t.dtype is torch.bool else 40), -1, True),
        call(t.distinct(2, 3, 4), 1),
        call(t.x()),
    ],
    "split_with_sizes.default": lambda t: [call(t.x(t.rows, 5), [2, 3], -1), call(t.x(4, 5), [1, 0, 3])],
    "squeeze.dim": lambda t: [call(t.x(t.rows, 1), 1), call(t.x(t.rows, 5), 0), call(t.x(1, 5), -2), call(t.x(), 0)],
    "squeeze.dims": lambda t: [call(t.x(t.rows, 1, 5, 1), [1, -1]), call(t.x(t.rows, 5), [0, 1])],
    "sub.Scalar": lambda t: [call(t.x(t.rows, 5), 3), call(t.x(t.rows, 5), 1.5), call(t.x(t.rows, 5), 2, 3)],
    "sub.Tensor": families.scaled,
    "sym_is_contiguous.default": lambda t: [call(t.x(4, 5))],
    "sym_numel.default": lambda t: [call(t.x(t.rows, 5))],
    "sym_size.int": families.size,
    "sym_storage_offset.default": lambda t: [call(t.x(t.rows, 5))],
    "sym_stride.int": families.size,
    "topk.default": lambda t: [
        call(t.distinct(t.rows, 5), 2),
        call(t.distinct(4, 5), 3, 0, False),
        call(t.distinct(2, 3, 40), 40),
        call(t.distinct(2, 3, 4), 1, 1),
        call(t.x(), 1),
    ],
    "unsqueeze.default": lambda t: [call(t.x(t.rows, 5), 1), call(t.x(t.rows, 5), -1), call(t.x(), 0)],
    "upsample_bilinear2d.vec": lambda t: [
        call(t.finite(t.rows, 2, 5, 6), *form)
        for form in (([7, 9], False, None), ([3, 4], True, None), (None, False, [2.0, 1.5]))
    ],
    "upsample_nearest2d.vec": lambda t: [
        call(t.finite(t.rows, 2, 5, 6), *form) for form in (([7, 9], None), (None, [2.0, 1.5]), ([3, 4], None))
    ],
    "var.correction": lambda t: [
        call(t.finite(t.rows, 5), [1]),
        call(t.finite(t.rows, 5), [0], correction=0, keepdim=True),
        call(t.finite(2, t.rows, 4), None, correction=2),
        call(t.finite(t.rows, 1), [1]),
    ],
    "var.dim": lambda t: [
        call(t.finite(t.rows, 5), [1]),
        call(t.finite(t.rows, 5), [0], False, True),
        call(t.x(t.rows, 5), [1]),
    ],
    "view.default": lambda t: [
        call(t.x(t.rows, 4), [-1, 2]),
        call(t.x(2, 6), [3, 4]),
        call(t.x(), [1, 1]),
        call(t.x(0, 5), [5, 0]),
    ],
    "where.self": lambda t: [
        call(t.flags(t.rows, 5), t.x(t.rows, 5), t.x(5, number=1)),
        call(t.flags(5), t.x(t.rows, 1), t.x()),
        call(t.flags(t.rows, 5), t.x(t.rows, 5), t.x(t.rows, 5, dtype=torch.int64)),
    ],
}
