"""GroupQueryAttention with rows of different lengths, a past or none, against ONNX Runtime, over its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.tiny import Array

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """Sizes of the inputs by name, H query heads that share K, and what else the node has."""

    label: str = ""
    past: bool = False
    packed: bool = False
    rotary: int = 0  # the part of the head's width that turns
    ids: bool = False
    added: bool = False
    sink: bool = False
    heads: tuple[int, int] = (4, 2)
    width: int = 8
    batch: int | str = "n"
    cache: int = 0  # places of a cache with room for more, 0 where it grows
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.label

    def model(self) -> onnx.ModelProto:
        """Lengths and their largest come from an attention mask, as in the files of text generators."""
        heads, shared = self.heads
        n, e = self.batch, self.width
        f, i = TensorProto.FLOAT, TensorProto.INT64
        held: Any = self.cache or "p"
        most: Any = self.cache if self.cache else "p + s" if self.past else "s"
        widths = {"q": (heads + 2 * shared if self.packed else heads) * e}
        widths |= {} if self.packed else {"k": shared * e, "v": shared * e}
        inputs = [(name, f, [n, "s", width]) for name, width in widths.items()]
        inputs += [(name, f, [n, shared, held, e]) for name in ("past_k", "past_v") if self.past]
        inputs += [("mask", i, [n, most])] + ([("ids", i, [n, "s"])] if self.ids else [])
        inputs += [("added", f, [1, heads, "s", most])] if self.added else []
        names = [name if name in widths else "" for name in ("q", "k", "v")]
        names += [name if self.past else "" for name in ("past_k", "past_v")] + ["lengths", "total"]
        names += [name if self.rotary else "" for name in ("cos", "sin")]
        names += [name if on else "" for name, on in (("ids", self.ids), ("added", self.added), ("sink", self.sink))]
        attributes = {"num_heads": heads, "kv_num_heads": shared, "do_rotary": int(self.rotary > 0), **self.attributes}
        nodes = [
            helper.make_node("ReduceSum", ["mask", "axis"], ["sums"], keepdims=0),
            helper.make_node("Sub", ["sums", "one"], ["last"]),
            helper.make_node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
            helper.make_node("Shape", ["mask"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "one"], ["most"]),
            helper.make_node("Cast", ["most"], ["total"], to=TensorProto.INT32),
            helper.make_node("GroupQueryAttention", names, ["r", "new_k", "new_v"], "gqa", domain=DOMAIN, **attributes),
        ]
        angles = np.random.default_rng(3).uniform(-3, 3, (20, max(self.rotary, 2) // 2)).astype(np.float32)
        weights = {
            "axis": np.array([1], np.int64), "one": np.array(1, np.int64), "cos": np.cos(angles), "sin": np.sin(angles),
            "sink": np.linspace(-1, 2, heads).astype(np.float32),
        }  # fmt: skip
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(*item) for item in inputs],
            [helper.make_tensor_value_info(name, f, None) for name in ("r", "new_k", "new_v")],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feed(self, batch: int, new: int, past: int) -> tuple[dict[str, Array], list[int]]:
        """Values, and how many keys every row has after the step: the first as many as there are, others fewer."""
        random = np.random.default_rng(0)
        heads, shared = self.heads
        most = self.cache or past + new

        def floats(*shape: int) -> Array:
            return random.normal(size=shape).astype(np.float32)

        least = new if past else 1
        counts = [max(least, past + new - 2 * row) for row in range(batch)]
        width = (heads + 2 * shared if self.packed else heads) * self.width
        feed = {"q": floats(batch, new, width)}
        if not self.packed:
            feed |= {name: floats(batch, new, shared * self.width) for name in "kv"}
        if self.past:
            held = self.cache or past
            feed |= {name: floats(batch, shared, held, self.width) for name in ("past_k", "past_v")}
        feed["mask"] = (np.arange(most) < np.array(counts)[:, None]).astype(np.int64)
        if self.ids:
            first = np.array([count - new if past else 0 for count in counts])
            feed["ids"] = first[:, None] + np.arange(new)
        if self.added:
            feed["added"] = floats(1, heads, new, most)
        return feed, counts


def results(program: Program, feed: dict[str, Array]) -> list[Array]:
    return [value.numpy() for value in program(*(torch.from_numpy(feed[spec.name]) for spec in program.inputs))]


def gap(case: Case, ours: list[Array], new: int, counts: list[int], theirs: list[Array]) -> float:
    """The largest difference where the operator says what is there."""
    worst = 0.0
    for row, count in enumerate(counts):
        meant = new if case.past else count
        pairs = [(ours[0][row, :meant], theirs[0][row, :meant])]
        pairs += [(a[row, :, :count], b[row, :, :count]) for a, b in zip(ours[1:], theirs[1:], strict=True)]
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in pairs))
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return worst


def answers(case: Case, feed: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(case.model().SerializeToString(), options)
    found: list[Array] = session.run(None, feed)
    return found


ROTARY: dict[str, Any] = {"rotary": 16, "width": 16}
CASES = [
    Case("plain", attributes={"scale": 0.2}),
    Case("packed rotary", packed=True, **ROTARY),
    Case("partly interleaved", rotary=16, attributes={"rotary_interleaved": 1}, width=32),
    Case("window", attributes={"local_window_size": 2}),
    Case("added softcap", added=True, attributes={"softcap": 0.7}),
    Case("sink", sink=True),
    Case("all ways", attributes={"causal": 0}),
]
MORE = [
    Case("all heads", heads=(3, 3)),
    Case("interleaved", **ROTARY, attributes={"rotary_interleaved": 1}),
    Case("ids", **ROTARY, ids=True),
    Case("smooth", attributes={"smooth_softmax": 1}),
    Case("added", added=True, attributes={"local_window_size": 3}),
    Case("all ways sink", sink=True, added=True, attributes={"causal": 0}),
]


def with_past(case: Case, **changes: Any) -> Case:
    return Case(**{**case.__dict__, "past": True, **changes})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_step(case: Case) -> None:
    program = capture(case.model())
    for batch, new in ((3, 5), (1, 7), (2, 1)):
        feed, counts = case.feed(batch, new, 0)
        assert gap(case, results(program, feed), new, counts, answers(case, feed)) < 1e-5


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_with_a_past(case: Case) -> None:
    """A token for each of several rows, and several tokens for one row, as ONNX Runtime allows."""
    case = with_past(case)
    program = capture(case.model())
    for batch, new, past in ((3, 1, 5), (1, 3, 4), (1, 1, 1)):
        feed, counts = case.feed(batch, new, past)
        assert gap(case, results(program, feed), new, counts, answers(case, feed)) < 1e-5


@pytest.mark.parametrize("batch", [1, "n"])
def test_a_cache_with_room(batch: int | str) -> None:
    case = Case(past=True, cache=9, batch=batch, **ROTARY, attributes={"local_window_size": 3})
    program = capture(case.model())
    for rows, new, past in ((3, 1, 5), (1, 3, 4)):
        if batch in ("n", rows):
            feed, counts = case.feed(rows, new, past)
            assert gap(case, results(program, feed), new, counts, answers(case, feed)) < 1e-5


def targets(case: Case) -> set[str]:
    return {str(node.target) for node in capture(case.model()).nodes()}


def test_one_row_only_grows_its_cache() -> None:
    case = Case(past=True, batch=1)
    assert "aten.gather.default" not in targets(case)
    assert "aten.gather.default" in targets(with_past(case, batch="n"))
    feed, counts = case.feed(1, 3, 4)
    assert gap(case, results(capture(case.model()), feed), 3, counts, answers(case, feed)) < 1e-5


def test_a_first_step_is_causal_attention() -> None:
    found = [node for node in capture(Case(**ROTARY).model()).nodes() if "attention" in str(node.target)]
    assert [node.args[3:] for node in found] == [(None, 0.0, True)]
    assert found[0].kwargs == {"enable_gqa": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case("plain", **ROTARY), Case("cap", sink=True, attributes={"softcap": 0.7})], ids=str
)
def test_compiled(case: Case) -> None:
    for form in (case, with_past(case)):
        session = graphopt.compile(capture(form.model()), "cpu").session()
        for batch, new, past in ((3, 1, 5), (1, 3, 4)):
            feed, counts = form.feed(batch, new, past if form.past else 0)
            ours = session.run(None, feed)
            assert gap(form, ours, new, counts, answers(form, feed)) < 1e-5


REFUSED = [
    (Case(past=True, attributes={"k_quant_type": "PER_TENSOR"}), "k_quant_type is not imported"),
    (Case(past=True, attributes={"sliding_window_cache": 1}), "sliding_window_cache is not imported"),
    (Case(attributes={"qk_output": 1}), "qk_output"),
    (Case(attributes={"causal": 0, "local_window_size": 3}), "local_window_size without causal"),
    (Case(attributes={"do_rotary": 1}), "needs cos_cache"),
    (Case(heads=(4, 3)), "num_heads 4 is no multiple of kv_num_heads 3"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_imported_says_why(case: Case, words: str) -> None:
    with pytest.raises(CaptureError, match=f"GroupQueryAttention 'gqa'.*{words}"):
        capture(case.model())


def test_sizes_that_leave_open_how_the_cache_grows() -> None:
    model = Case(past=True).model()
    (mask,) = (value for value in model.graph.input if value.name == "mask")
    mask.type.tensor_type.shape.dim[1].dim_param = "total"
    with pytest.raises(CaptureError, match=r"leaves open whether it grows.*dynamic_shapes"):
        capture(model)
    assert capture(model, dynamic_shapes={"mask": {1: "p + s"}}).outputs[1].shape == ("n", 2, "p + s", 8)
    kept = capture(model, dynamic_shapes={"mask": {1: "p"}})
    assert kept.outputs[1].shape == ("n", 2, "p", 8)
