"""Arguments that many overloads share, or that take more than a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests.core_aten.tensors import Call, Samples, Tensors, call


def unary(t: Tensors) -> list[Call]:
    return [call(t.x(t.rows, 5)), call(t.x()), call(t.x(0, 5))]


def binary(t: Tensors) -> list[Call]:
    return [
        call(t.x(t.rows, 5), t.divisor(t.rows, 5, number=1)),
        call(t.x(t.rows, 1), t.divisor(5, number=2)),
        call(t.x(t.rows, 5), t.divisor()),
        call(t.x(t.rows, 5), t.divisor(t.rows, 5, dtype=torch.int64)),
        call(t.x(t.rows, 5, dtype=torch.int8), t.divisor(t.rows, 5, number=1)),
        call(t.x(0, 5), t.divisor(5, number=2)),
    ]


def scalar(*numbers: float) -> Samples:
    return lambda t: [call(t.x(t.rows, 5), number) for number in numbers] + [call(t.x(), numbers[0])]


def modes(second: Callable[[Tensors], Sequence[float | torch.Tensor]]) -> Samples:
    return lambda t: [
        call(t.x(t.rows, 5), other, rounding_mode=mode) for other in second(t) for mode in (None, "floor", "trunc")
    ]


def scaled(t: Tensors) -> list[Call]:
    return [*binary(t), call(t.x(t.rows, 5), t.x(t.rows, 5, number=1), alpha=2)]


def reduction(t: Tensors) -> list[Call]:
    return [
        call(t.x(t.rows, 5), [1]),
        call(t.x(t.rows, 5), [0], True),
        call(t.finite(2, t.rows, 4), [-1, 0]),
        call(t.finite(2, t.rows, 4), [1], True),
        call(t.finite(2, 3, 40), [0, 1, 2]),
        call(t.x(), [0]),
    ]


def over_one(t: Tensors) -> list[Call]:
    return [
        call(t.x(t.rows, 5), 1),
        call(t.x(t.rows, 5), 0, True),
        call(t.finite(2, t.rows, 4), -2),
        call(t.finite(2, 3, 40), -1, True),
        call(t.x(), 0),
    ]


def whole(t: Tensors) -> list[Call]:
    return [call(t.x(t.rows, 5)), call(t.finite(2, t.rows, 4)), call(t.x())]


def reduction_of_nothing_too(t: Tensors) -> list[Call]:
    return [*reduction(t), call(t.x(0, 5), [0]), call(t.x(0, 5), [1]), call(t.x(t.rows, 0), [-1], True)]


def extreme_with_position(t: Tensors) -> list[Call]:
    return [call(t.distinct(t.rows, 5), 1), call(t.distinct(t.rows, 5), 0, True), call(t.small(2, t.rows, 4), -1)]


def arg_extreme(t: Tensors) -> list[Call]:
    return [*extreme_with_position(t), call(t.distinct(t.rows, 5)), call(t.finite(2, 3, 40), None, True), call(t.x())]


def softmax(t: Tensors) -> list[Call]:
    return [
        call(t.finite(t.rows, 5), -1, False),
        call(t.x(t.rows, 5), 1, False),
        call(t.finite(2, t.rows, 4), 0, False),
        call(t.finite(), 0, False),
    ]


def image_sizes(*forms: Sequence[object], spatial: int = 2) -> Samples:
    """Every form on a batch of images, the first also without the batch axis."""

    def samples(t: Tensors) -> list[Call]:
        size = (4, 5, 6)[-spatial:]
        return [
            *(call(t.finite(t.rows, 2, *size), *form) for form in forms),
            call(t.finite(2, *size), *forms[0]),
        ]

    return samples


def convolution(t: Tensors) -> list[Call]:
    image, line, volume = t.finite(t.rows, 4, 6, 7), t.finite(t.rows, 4, 9), t.finite(t.rows, 4, 3, 4, 5)
    filters, bias = t.finite(6, 4, 3, 2), t.finite(6)
    plain = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    return [
        call(image, filters, bias, *plain),
        call(image, filters, None, [2, 1], [1, 2], [1, 2], False, [0, 0], 1),
        call(image, t.finite(6, 2, 3, 3), bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
        call(line, t.finite(6, 4, 3), bias, [2], [1], [1], False, [0], 1),
        call(volume, t.finite(6, 4, 2, 3, 3), bias, [1, 1, 2], [0, 1, 1], [1, 1, 1], False, [0, 0, 0], 1),
        call(image, t.finite(4, 3, 3, 2), t.finite(3), [2, 1], [1, 0], [1, 2], True, [1, 0], 1),
        call(image, t.finite(4, 3, 3, 3), t.finite(6), [2, 2], [1, 1], [1, 1], True, [0, 1], 2),
        call(line, t.finite(4, 6, 4), bias, [2], [1], [1], True, [0], 1),
        call(volume, t.finite(4, 2, 2, 2, 2), None, [2, 2, 2], [0, 0, 0], [1, 1, 1], True, [0, 0, 0], 1),
    ]


def embedding_bag(t: Tensors) -> list[Call]:
    table, ids, starts = t.finite(10, 4), t.index(10, 8), torch.tensor([0, 3, 3, 6])
    return [
        *(call(table, ids, starts, False, mode) for mode in (0, 1, 2)),
        call(table, ids, starts, False, 0, False, t.finite(8)),
        call(table, ids, torch.tensor([0, 3, 3, 8]), False, 1, False, None, True),
        call(table, ids, starts, False, 1, False, None, False, 2),
    ]


def grid_sampler(t: Tensors) -> list[Call]:
    image, grid = t.finite(t.rows, 2, 5, 6), t.finite(t.rows, 3, 4, 2)
    bilinear = [(0, 0, False), (0, 0, True), (0, 1, False), (0, 2, False), (0, 2, True)]
    forms = [*bilinear, (1, 0, False), (1, 2, False), (2, 0, False), (2, 2, True)]
    return [call(image, grid, *form) for form in forms]


def index(t: Tensors) -> list[Call]:
    x, i, j = t.finite(4, 5, 6), t.index(4, t.rows, low=-4), t.index(4, t.rows, number=1)
    return [
        call(x, [i]),
        call(x, [i, j]),
        call(x, [None, i, None]),
        call(x, [i, None, j]),
        call(x, [t.index(4, 2, 1), t.index(4, 3)]),
        call(x, [None, t.index(4)]),
    ]


def index_put(t: Tensors) -> list[Call]:
    x, i, j = t.finite(4, 5, 6), t.permutation(4), t.index(4, 4, number=1)
    many, other = t.index(4, 9), t.index(4, 9, number=1)
    return [
        call(x, [i], t.finite(4, 5, 6, number=1)),
        call(x, [i, j], t.finite(6)),
        call(x, [None, i, None], t.finite()),
        call(x, [i, None, j], t.finite(4, 5)),
        call(x, [many, other], t.finite(9, 6), True),
        call(x, [many, None, other], t.finite(9, 5), True),
        call(x, [t.flags(4, 5)], t.finite()),
        call(t.finite(t.rows, 5), [None, t.permutation(5)], t.finite(t.rows, 5, number=1)),
    ]


def scatter(second: Callable[[Tensors], object], *more: object) -> Samples:
    """Every position at most once, so that the order of writes means nothing."""
    return lambda t: [
        call(t.finite(4, 5), 0, t.permutation(4).reshape(4, 1).repeat(1, 3), second(t), *more),
        call(t.finite(4, 5), -1, t.permutation(3).reshape(1, 3).repeat(2, 1), second(t), *more),
    ]


def scatter_many(t: Tensors) -> list[Call]:
    return [
        call(t.finite(4, 5), 0, t.index(4, 6, 3), t.finite(6, 3)),
        call(t.finite(4, 5), -1, t.index(5, 4, 7), t.finite(4, 8)),
        call(t.finite(t.rows, 5), 1, t.index(5, t.rows, 7), t.finite(t.rows, 7)),
        call(t.finite(2, 3, 4), 1, t.index(3, 2, 5, 2), t.finite(2, 5, 3)),
        call(t.finite(), 0, t.index(1), t.finite(number=1)),
    ]


def scatter_reduce(t: Tensors) -> list[Call]:
    kinds = ("sum", "prod", "mean", "amax", "amin")
    return [
        *(
            Call((*c.args, kind), {"include_self": own})
            for kind in kinds
            for own in (True, False)
            for c in scatter_many(t)[:1]
        ),
        *(Call((*c.args, "amax"), {}) for c in scatter_many(t)[1:]),
        call(t.x(4, 5), 0, t.index(4, 6, 3), t.x(6, 3), "amin"),
    ]


def batch_norm(t: Tensors) -> tuple[torch.Tensor, ...]:
    return t.finite(2), t.finite(2, number=1), t.finite(2, number=2), t.small(2)


def size(t: Tensors) -> list[Call]:
    return [call(t.x(t.rows, 5), axis) for axis in (0, -1)]


def pads(axes: int) -> Samples:
    return image_sizes(([1, 2, 3, 0, 2, 1][: 2 * axes],), ([0, 0, 1, 1, 0, 2][: 2 * axes],), spatial=axes)
