from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ArtifactError, FeedError, RunError, UnknownNameError, UsageError
from graphopt.runtime import InferenceSession, ValueInfo, loading
from graphopt.runtime import session as session_module
from graphopt.runtime.dtypes import DTYPES
from graphopt.runtime.manifest import TensorInfo
from graphopt.runtime.tensors import aligned_copy, copy_tensor

W, B = np.arange(8, dtype=np.float32), np.ones(8, np.float32)


@pytest.fixture(scope="module")
def session(artifact: Path) -> InferenceSession:
    return InferenceSession(artifact)


def rows(count: int) -> np.ndarray:
    return np.arange(8 * count, dtype=np.float32).reshape(count, 8)


def test_it_looks_like_onnx_runtime(session: InferenceSession) -> None:
    assert session.get_inputs() == [ValueInfo("x", ["rows", 8], "tensor(float)")]
    assert [item.name for item in session.get_outputs("twins")] == ["sum", "difference", "same"]
    assert session.get_inputs("halves")[0].type == "tensor(bfloat16)"
    assert session.entries == ("count", "fixed", "grow", "halves", "main", "scalar", "twins")
    (y,) = session.run(None, {"x": rows(3)})
    np.testing.assert_allclose(y, rows(3) * W + B)


def test_a_folder_runs_like_a_file(parts: Any, tmp_path: Path) -> None:
    session = InferenceSession(parts.write(f"{tmp_path}/tiny/"), verify="code")
    np.testing.assert_allclose(session.run(None, {"x": rows(2)})[0], rows(2) * W + B)


def test_last_run_says_what_ran(artifact: Path) -> None:
    session = InferenceSession(artifact)
    assert session.last_run is None
    session.run(None, {"x": rows(3)})
    assert session.last_run is not None
    assert (session.last_run.entry, dict(session.last_run.sizes)) == ("main", {"rows": 3})
    assert session.last_run.seconds > 0


def test_outputs_by_name(session: InferenceSession) -> None:
    feed = {"x": rows(2), "y": np.ones((2, 8), np.float32)}
    difference, total = session.run(["difference", "sum"], feed, entry="twins")
    np.testing.assert_array_equal(difference, rows(2) - 1)
    np.testing.assert_array_equal(total, rows(2) + 1)
    assert len(session.run([], feed, entry="twins")) == 3
    with pytest.raises(UnknownNameError, match=r"unknown output 'summ'; did you mean 'sum'\?"):
        session.run(["summ"], feed, entry="twins")
    with pytest.raises(UsageError, match=r"output names are 'sum'; give a list, \['sum'\]"):
        session.run("sum", feed, entry="twins")
    with pytest.raises(UnknownNameError, match=r"unknown entry 'mian'; did you mean 'main'\?"):
        session.run(None, feed, entry="mian")


X = "expected float32 [rows, 8]"


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ([], "the feed is a list; give a dict of input name and numpy array"),
        ({}, "input 'x' is missing; give all of: x, y"),
        ({"x": rows(1), "z": rows(1)}, "unknown input 'z'; there are: x, y"),
        ({"x": rows(1), "y": rows(1), "yy": rows(1)}, "unknown input 'yy'; did you mean 'y'?"),
        ({"x": [[1.0]], "y": rows(1)}, "input 'x' is a list; give a numpy array float32 [rows, 8]"),
        ({"x": np.float32(1), "y": rows(1)}, "input 'x' is a float32; give a numpy array float32 [rows, 8]"),
        (
            {"x": rows(1).astype(np.float64), "y": rows(1)},
            f"input 'x' has dtype float64, {X}; convert it with .astype('float32')",
        ),
        ({"x": rows(1).astype(object), "y": rows(1)}, f"input 'x' has dtype object, {X}"),
        ({"x": rows(1)[0], "y": rows(1)}, f"input 'x' has shape [8], {X}"),
        ({"x": rows(1), "y": rows(1)[:, :7]}, f"input 'y' has shape [1, 7], {X}: axis 1 must be 8"),
        (
            {"x": rows(1), "y": rows(2)},
            "size 'rows' is 1 in input 'x' (axis 0) and 2 in input 'y' (axis 0); make them equal",
        ),
    ],
)
def test_a_wrong_feed_is_one_line(session: InferenceSession, feed: Any, words: str) -> None:
    with pytest.raises(FeedError) as caught:
        session.run(None, feed, entry="twins")
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "size 'rows' is 0 in input 'x' (axis 0); the least is 1"),
        (65, "size 'rows' is 65 in input 'x' (axis 0); the artifact was compiled for at most 64"),
    ],
)
def test_sizes_out_of_bounds(session: InferenceSession, count: int, words: str) -> None:
    with pytest.raises(FeedError) as caught:
        session.run(None, {"x": rows(count)})
    assert str(caught.value) == words


@pytest.mark.parametrize("count", [1, 64])
def test_sizes_at_the_bounds(session: InferenceSession, count: int) -> None:
    np.testing.assert_allclose(session.run(None, {"x": rows(count)})[0], rows(count) * W + B)


def test_an_empty_axis_where_the_bounds_allow_it(session: InferenceSession) -> None:
    assert [y.shape for y in session.run(None, {"x": rows(0), "y": rows(0)}, entry="twins")] == [(0, 8)] * 3


def test_a_scalar(session: InferenceSession) -> None:
    (y,) = session.run(None, {"x": np.array(3, np.float32)}, entry="scalar")
    assert (y.shape, float(y)) == ((), 6.0)


def unaligned() -> np.ndarray:
    raw = np.empty(5 * 8 * 4 + 64, np.uint8)
    return aligned_copy(raw, raw.dtype)[4 : 4 + 160].view(np.float32).reshape(5, 8)


def read_only() -> np.ndarray:
    array = aligned_copy(rows(5), np.dtype(np.float32))
    array.flags.writeable = False
    return array


LAYOUTS = {
    "aligned": aligned_copy(rows(5), np.dtype(np.float32)),
    "unaligned": unaligned(),
    "transposed": np.empty((8, 5), np.float32).T,
    "every other": np.empty((10, 16), np.float32)[::2, ::2],
    "backwards": np.empty((5, 8), np.float32)[::-1],
    "big-endian": np.empty((5, 8), ">f4"),
    "read-only": read_only(),
    "one value": np.broadcast_to(np.float32(2), (5, 8)),
    "odd address": np.empty(161, np.uint8)[1:].view(np.float32).reshape(5, 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_of_an_input(session: InferenceSession, name: str) -> None:
    array = LAYOUTS[name]
    if array.flags.writeable:
        array[...] = rows(5)
    before = array.copy()
    np.testing.assert_allclose(session.run(None, {"x": array})[0], before * W + B)
    np.testing.assert_array_equal(array, before)


def test_a_large_aligned_input_is_not_copied(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.runtime.tensors.aligned_copy", None)
    monkeypatch.setattr("graphopt.runtime.feed.SMALL", 0)
    session.run(None, {"x": LAYOUTS["aligned"]})
    session.run(None, {"x": LAYOUTS["read-only"]})


def test_a_call_that_was_interrupted_keeps_its_inputs(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, running = InferenceSession(artifact), []
    run = session._runner.run

    def interrupted(*call: Any) -> Any:
        running.append(call)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(session._runner, "run", interrupted)
        session.run(None, {"x": rows(2)})
    session.run(None, {"x": rows(2) + 7})
    np.testing.assert_allclose(np.from_dlpack(run(*running[0])), rows(2) * W + B)


def test_a_profile_that_was_interrupted_keeps_its_inputs(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, running = InferenceSession(artifact), []

    def interrupted(machine: Any, run: Any, rounds: int) -> Any:
        running.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "time_calls", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.profile({"x": rows(2)})
    session.run(None, {"x": rows(2) + 7})
    np.testing.assert_allclose(np.from_dlpack(running[0]()), rows(2) * W + B)


def test_weights_are_copied_to_a_gpu_once(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the functions of every session and profile, here of code for a CPU, over one model."""
    copied: list[int] = []

    def copy(tensor: Any) -> Any:
        copied.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(loading, "copy_to_gpu", copy)
    model = loading.load(artifact, "full")
    on_gpu = replace(model, variant=replace(model.variant, features=("cuda:sm_80",)))
    for _ in range(3):
        session_module.bind_weights("main", on_gpu, session_module.new_machine(model))
    assert copied == [model.tensors[name].data_ptr() for name in ("w", "b")]
    session_module.bind_weights("main", model, session_module.new_machine(model))
    assert len(copied) == 2


def test_outputs_survive_later_runs(session: InferenceSession) -> None:
    feeds = [np.full((2, 8), value, np.float32) for value in range(20)]
    results = [session.run(None, {"x": feed})[0] for feed in feeds]
    for feed, result in zip(feeds, results, strict=True):
        np.testing.assert_allclose(result, feed * W + B)


def test_outputs_outlive_the_session(artifact: Path) -> None:
    (y,) = InferenceSession(artifact).run(None, {"x": rows(2)})
    gc.collect()
    np.testing.assert_allclose(y, rows(2) * W + B)


def test_an_output_never_is_an_input(session: InferenceSession) -> None:
    x = LAYOUTS["aligned"]
    x[...] = rows(5)
    _, _, same = session.run(None, {"x": x, "y": x}, entry="twins")
    assert not np.shares_memory(same, x)
    same[...] = -1
    np.testing.assert_array_equal(x, rows(5))


def test_an_output_never_is_a_constant_of_the_library(session: InferenceSession) -> None:
    x = np.ones(8, np.float32)
    for _ in range(2):
        _, table = session.run(None, {"x": x}, entry="fixed")
        np.testing.assert_array_equal(table, np.arange(4))
        table[...] = -1


def test_only_outputs_that_lie_elsewhere_are_copied(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr("graphopt.runtime.session.SMALL", 0)  # small ones are copied in any case
    session = InferenceSession(artifact)

    def record(tensor: Any, dtype: str) -> Any:
        copied.append(tuple(tensor.shape))
        return copy_tensor(tensor, dtype)

    monkeypatch.setattr("graphopt.runtime.session.copy_tensor", record)
    session.run(None, {"x": np.ones(8, np.float32)}, entry="fixed")
    assert copied == [(4,)]  # the constant; y is what a kernel has just made


def test_state_is_kept_reset_and_out_of_reach(artifact: Path) -> None:
    session, one = InferenceSession(artifact), np.ones(8, np.float32)
    other = session.clone()
    for expected in (1, 2, 3):
        (total,) = session.run(None, {"x": one}, entry="count")
        np.testing.assert_array_equal(total, np.full(8, expected))
        total[...] = 100
    np.testing.assert_array_equal(other.run(None, {"x": one}, entry="count")[0], one)
    session.reset()
    np.testing.assert_array_equal(session.run(None, {"x": one}, entry="count")[0], one)


@pytest.mark.parametrize("shape", [(1 << 50, 1 << 12), (1 << 62, 8)])
def test_state_that_no_memory_holds_is_one_line(parts: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = (TensorInfo("cache", "float32", shape),)
    entry = replace(parts.manifest.entries["count"], state=state, written=("cache",))
    path = parts.write(
        tmp_path / "big.gopt", manifest=replace(parts.manifest, entries={**parts.manifest.entries, "count": entry})
    )
    with pytest.raises(ArtifactError, match=r"state 'cache' is float32 \[.*no memory") as raised:
        InferenceSession(path)
    assert "\n" not in str(raised.value)


def test_a_refused_feed_leaves_the_state(artifact: Path) -> None:
    session, one = InferenceSession(artifact), np.ones(8, np.float32)
    session.run(None, {"x": one}, entry="count")
    with pytest.raises(FeedError):
        session.run(None, {"x": one[:7]}, entry="count")
    np.testing.assert_array_equal(session.run(None, {"x": one}, entry="count")[0], 2 * one)


def test_bfloat16_goes_in_as_bits_or_ml_dtypes_and_comes_out_as_float32(session: InferenceSession) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = np.arange(16).reshape(2, 8).astype(ml_dtypes.bfloat16)
    for array in (half, half.view(np.uint16)):
        (y,) = session.run(None, {"x": array}, entry="halves")
        np.testing.assert_array_equal(y, 2 * np.arange(16, dtype=np.float32).reshape(2, 8))


def test_a_failing_library_is_one_line(parts: Any, tmp_path: Path) -> None:
    entries = {**parts.manifest.entries, "main": parts.manifest.entries["scalar"]}
    session = InferenceSession(parts.write(tmp_path / "a.gopt", manifest=replace(parts.manifest, entries=entries)))
    with pytest.raises(RunError, match=r"^entry 'main' of tiny failed: [^\n]+$"):
        session.run(None, {"x": np.array(1, np.float32)})


def test_profile_names_the_kernels_and_leaves_the_state(artifact: Path) -> None:
    session, one = InferenceSession(artifact), np.ones(8, np.float32)
    kernels = session.profile({"x": rows(4)}, rounds=3)
    assert len(kernels) == 2
    assert all(calls == 1 and seconds > 0 for calls, seconds in kernels.values())
    session.profile({"x": one}, entry="count", rounds=3)
    np.testing.assert_array_equal(session.run(None, {"x": one}, entry="count")[0], one)
    with pytest.raises(UsageError, match="rounds is 0"):
        session.profile({"x": rows(4)}, rounds=0)


def test_samples_and_report(session: InferenceSession) -> None:
    feed, expected = session.samples()
    np.testing.assert_allclose(session.run(None, feed)[0], expected["y"])
    assert session.report == {"kernels": {"multiply": "generic"}}


def test_many_sizes_give_memory_back(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = InferenceSession(artifact)
    released: list[object] = []
    release = session_module.release_memory
    monkeypatch.setattr(session_module, "release_memory", lambda: released.append(release()))
    kept = session.run(None, {"x": rows(3)})[0]
    for count in range(1, 65):
        np.testing.assert_allclose(session.run(None, {"x": rows(count)})[0], rows(count) * W + B)
    assert len(released) == 1
    np.testing.assert_allclose(kept, rows(3) * W + B)


def test_every_dtype_has_a_spelling_of_its_own() -> None:
    assert len({spelling.safetensors for spelling in DTYPES.values()}) == len(DTYPES)
    assert DTYPES["float32"].onnx == "float" and DTYPES["float64"].onnx == "double"


@pytest.mark.parametrize("count", [2, 2000])
def test_small_and_large_outputs_are_the_callers(session: InferenceSession, count: int) -> None:
    feed = {"x": rows(count)}
    (first,) = session.run(None, feed, entry="grow")
    first[...] = -1
    (second,) = session.run(None, feed, entry="grow")
    np.testing.assert_array_equal(second, np.concatenate([rows(count), rows(count)]))
    assert (first == -1).all()
