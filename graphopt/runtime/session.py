"""InferenceSession: run a compiled artifact from any thread, with numpy arrays in and out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError, RunError, UnknownNameError, UsageError
from graphopt.runtime.dtypes import DTYPES
from graphopt.runtime.feed import FeedCheck
from graphopt.runtime.library import ffi, find_function
from graphopt.runtime.loading import Model, Verify, load
from graphopt.runtime.manifest import Entry, Manifest, TensorInfo, Variant
from graphopt.runtime.profiling import Round, medians, time_calls
from graphopt.runtime.stages import Stages
from graphopt.runtime.tensors import CPU, GPU, SMALL, copy_tensor, from_device, widen, zeros
from graphopt.runtime.threads import Runner, resolve
from graphopt.runtime.weights import state_name

SET_DENORMALS = "graphopt_set_denormals"
_POOLED_ALLOCATOR = 2
_SIZES_KEPT = 32  # the allocator keeps the buffers of every size it ever saw; past this many they are given back


@dataclass(frozen=True)
class ValueInfo:
    """An input or output as ONNX Runtime describes it: `shape` has integers and names, `type` is "tensor(float)"."""

    name: str
    shape: list[int | str]
    type: str


@dataclass(frozen=True)
class RunInfo:
    """The last run: seconds inside the compiled code, the symbolic sizes it had, and the entry.

    `exits` has for every sample the exit that it took, counted from 0, where the model has exits.
    """

    seconds: float
    sizes: Mapping[str, int]
    entry: str
    exits: tuple[int, ...] | None = None


class _Bound:
    """One entry of one session: its checks and its function with the weights already in place."""

    def __init__(self, name: str, model: Model, machine: Any) -> None:
        self.name = name
        self.entry: Entry = model.manifest.entries[name]
        self.check = FeedCheck(self.entry)
        self.outputs = {item.name: index for index, item in enumerate(self.entry.outputs)}
        self.answers = range(self.outputs[self.entry.exits] if self.entry.exits else len(self.outputs))
        self.returned = self.entry.returned
        self.results: tuple[TensorInfo, ...] = (*self.entry.outputs, *self.returned)
        for item in self.results:
            if item.dtype not in DTYPES:
                raise ArtifactError(
                    f"output {item.name} has dtype {item.dtype[:40]!r}, which this graphopt does not know"
                )
        self.state = tuple(item.name for item in self.entry.state)
        self.bytes = tuple(DTYPES[item.dtype].carrier.itemsize for item in self.entry.outputs)
        self.function = bind_function(name, model, machine)


class InferenceSession:
    """A compiled model. Calls on one session take turns; `clone` gives an independent one over the same weights.

    `threads=None` uses every CPU that the process may use. `verify="full"` hashes the whole file before any of its
    code is opened, "code" leaves the weights unread until they are used. The file stays mapped: put another one in
    its place by renaming, never by writing into it. Raises ArtifactError when `path` is no artifact, damaged, of
    another format, or made for another CPU.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, verify: Verify = "full") -> None:
        self._start(load(path, verify), resolve(threads))

    def _start(self, model: Model, threads: int) -> None:
        self._model = model
        self._runner = Runner(threads)
        self._lock = threading.Lock()
        self._machine = new_machine(model)
        self._bound = {name: _Bound(name, model, self._machine) for name in model.manifest.entries}
        self._written = frozenset(name for bound in self._bound.values() for name in bound.entry.written)
        self._set_denormals = find_function(model.library, SET_DENORMALS)
        self._sizes_seen: set[tuple[object, ...]] = set()
        self._last_run: tuple[float, dict[str, int], str, tuple[int, ...] | None] | None = None
        self._sequence = 0
        self.reset()

    @property
    def entries(self) -> tuple[str, ...]:
        """The functions the artifact holds; a plain model has one, "main"."""
        return tuple(self._bound)

    @property
    def manifest(self) -> Manifest:
        """What the artifact says about itself."""
        return self._model.manifest

    @property
    def variant(self) -> Variant:
        """The one of the manifest's variants whose code runs here."""
        return self._model.variant

    @property
    def threads(self) -> int:
        """How many threads a run uses."""
        return self._runner.threads

    @property
    def last_run(self) -> RunInfo | None:
        """About the latest run that succeeded; None before the first."""
        if self._last_run is None:
            return None
        seconds, sizes, entry, exits = self._last_run
        return RunInfo(seconds, MappingProxyType(sizes), entry, exits)

    @property
    def report(self) -> Any:
        """What the compiler wrote down, as plain JSON values."""
        return self._model.report()

    def samples(self, entry: str = "main") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A feed recorded when the artifact was compiled, and the outputs to expect for it."""
        return self._model.samples(self._entry(entry).name)

    def get_inputs(self, entry: str = "main") -> list[ValueInfo]:
        """The inputs of an entry, in order."""
        return [_value_info(item) for item in self._entry(entry).entry.inputs]

    def get_outputs(self, entry: str = "main") -> list[ValueInfo]:
        """The outputs of an entry that `run` returns where none are named, in that order."""
        bound = self._entry(entry)
        return [_value_info(bound.entry.outputs[index]) for index in bound.answers]

    @property
    def sequence(self) -> int:
        """How often the state was put back, which tells one sequence from the next."""
        return self._sequence

    def reset(self) -> int:
        """Put the state back to what it was when the session was opened; returns the new `sequence`."""
        state = {item.name: item for bound in self._bound.values() for item in bound.entry.state}
        with self._lock:
            self._state = {name: self._initial(item) for name, item in state.items()}
            self._sequence += 1
            return self._sequence

    def _initial(self, item: TensorInfo) -> Any:
        """Memory of the session's own where the code writes into it, else the mapped file's."""
        stored = self._model.tensors.get(state_name(item.name))
        if stored is None:
            try:
                return zeros(tuple(map(int, item.shape)), item.dtype)
            except (MemoryError, ValueError, OverflowError) as error:
                raise ArtifactError(
                    f"state {item.name[:80]!r} is {item.dtype[:40]} {list(item.shape)}, for which there is no memory; "
                    "get the file again"
                ) from error
        return copy_tensor(stored, item.dtype) if item.name in self._written else stored

    def clone(self) -> InferenceSession:
        """A session of its own, with initial state, over the same mapped weights."""
        other = object.__new__(InferenceSession)
        other._start(self._model, self.threads)
        return other

    def run(
        self, output_names: Sequence[str] | None, feed: Mapping[str, np.ndarray], entry: str = "main"
    ) -> list[np.ndarray]:
        """Compute the outputs named from arrays by input name; the arrays belong to the caller.

        None means all in order, but for those that tell of exits, which have to be named.

        Raises FeedError naming the input whose name, dtype, rank or size is wrong, BoundInputError where a bound input
        has another value, UnknownNameError for an unknown output or entry, RunError when the compiled code fails; after
        an error the state is what it was before, but for what RunError left in state that is written in place.
        """
        bound = self._bound.get(entry) or self._entry(entry)
        wanted = bound.answers if output_names is None else self._select(bound, output_names)
        with self._lock:
            state = [self._state[name] for name in bound.state]
            inputs, sizes = bound.check.bind(feed, state)
            seconds, results = self._call(bound, inputs, state)
            arrays = self._arrays(bound, results, inputs, state)
            told = bound.entry.exits
            exits = None if told is None else tuple(arrays(bound.outputs[told]).tolist())
            if sizes:
                self._bound_memory(sizes)
            self._last_run = seconds, sizes, entry, exits
            return [arrays(index) for index in wanted]

    def _arrays(
        self, bound: _Bound, results: list[Any], inputs: list[Any], state: list[Any]
    ) -> Callable[[int], np.ndarray]:
        """Every output by its number as an array of the caller's; the new state is taken over."""
        if bound.entry.stages:  # arrays of their own already
            return lambda index: widen(results[index], bound.results[index].dtype)
        outputs = self._own(bound, results, inputs, state)
        if bound.returned:
            following = zip(bound.returned, outputs[len(bound.entry.outputs) :], strict=True)
            self._state = self._state | {item.name: tensor for item, tensor in following}  # all of it or nothing
        return lambda index: from_device(outputs[index], bound.results[index].dtype)

    def generate(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> Iterator[int]:
        """The tokens that follow the prompt, each as soon as it is known: a new sequence, for which state is reset.

        Temperature 0 takes the likeliest token, above 0 one is drawn: of the `top_k` likeliest, and of these of the
        fewest that have `top_p` of the probability. Equal seeds draw equal tokens. It ends after `max_tokens`, or
        before one of `stop_tokens`. Close the iterator, or leave it, to end early; other runs of the session meanwhile
        would change its state. Raises UsageError, before the first token, where the artifact is no decoder's or the
        cache has not that many positions; and at the next token where another sequence was begun on the session.
        """
        from graphopt.runtime.generation import Decoder, check_request, check_stop_tokens
        from graphopt.runtime.sampling import Sampling, seeded

        decoder = Decoder(self)
        prompt = check_request(prompt_ids, max_tokens, decoder.capacity)
        sampling = Sampling(temperature, top_k, top_p)
        return decoder.generate(prompt, max_tokens, sampling, seeded(seed), check_stop_tokens(stop_tokens))

    def profile(
        self, feed: Mapping[str, np.ndarray], entry: str = "main", rounds: int = 20
    ) -> dict[str, tuple[float, float]]:
        """Run `rounds` times, leaving the state alone: kernel name -> (calls a run, median seconds a call)."""
        return medians(self.profile_rounds(feed, entry, rounds))

    def profile_rounds(self, feed: Mapping[str, np.ndarray], entry: str = "main", rounds: int = 20) -> list[Round]:
        """As `profile`, and each round by itself: kernel name -> seconds of each of its calls."""
        bound = self._entry(entry)
        if rounds < 1:
            raise UsageError(f"rounds is {rounds}; give 1 or more")
        with self._lock:
            state = [
                copy_tensor(self._state[item.name], item.dtype)
                if item.name in bound.entry.written
                else self._state[item.name]
                for item in bound.entry.state
            ]
            inputs, _ = bound.check.bind(feed, state)
            machine = new_machine(self._model)
            function = bind_function(entry, self._model, machine)
            try:
                return self._runner.run(
                    lambda: time_calls(machine, lambda: self._guarded(entry, function, (*inputs, *state)), rounds)
                )
            except BaseException:
                bound.check.forget()  # as in `_call`
                raise

    def _entry(self, name: str) -> _Bound:
        if name not in self._bound:
            raise UnknownNameError("entry", name, self._bound)
        return self._bound[name]

    def _select(self, bound: _Bound, names: Sequence[str] | None) -> Sequence[int]:
        if isinstance(names, str):
            raise UsageError(f"output names are {names!r}; give a list, [{names!r}], or None for all outputs")
        if not names:
            return bound.answers
        for name in names:
            if name not in bound.outputs:
                raise UnknownNameError("output", name, bound.outputs)
        return [bound.outputs[name] for name in names]

    def _call(self, bound: _Bound, inputs: list[Any], state: list[Any]) -> tuple[float, list[Any]]:
        begin = time.perf_counter()
        try:
            result = self._runner.run(self._guarded, bound.name, bound.function, (*inputs, *state))
        except BaseException:
            bound.check.forget()  # a call that was interrupted may still be reading
            raise
        seconds = time.perf_counter() - begin
        results = as_list(result)
        if len(results) != len(bound.results):
            raise RunError(
                f"entry {bound.name!r} gave {len(results)} tensors instead of {len(bound.results)}; compile again"
            )
        return seconds, results

    def _guarded(self, entry: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Call with denormals flushed to zero on this thread, if the library knows how; they slow kernels 200 times.

        Workers of the pool run compiled code alone and are told so once.
        """
        flush = self._set_denormals
        try:
            if flush is not None:
                self._runner.prepare_workers(partial(flush, 1))
                flush(1, 1)
            return function(*arguments)
        except Exception as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise RunError(f"entry {entry!r} of {self.manifest.name} failed: {reason}") from e
        finally:
            if flush is not None:
                flush(0, 1)

    def _own(self, bound: _Bound, results: list[Any], inputs: list[Any], state: list[Any]) -> list[Any]:
        """Results that share no memory with inputs, weights, state or each other: the caller may write into them.

        New state comes first and may be the old one or a weight, which nobody writes into.
        """
        if not bound.returned and all(
            tensor.numel() * each <= SMALL for tensor, each in zip(results, bound.bytes, strict=True)
        ):
            return results  # which `from_device` copies
        count = len(bound.entry.outputs)
        owned = list(results)
        taken = [_span(tensor, item) for tensor, item in zip(inputs, bound.entry.inputs, strict=True)]
        for index in range(count, len(results)):
            item = bound.results[index]
            if _overlaps(_span(results[index], item), taken):
                owned[index] = copy_tensor(results[index], item.dtype)
        taken += [_span(tensor, item) for tensor, item in zip(state, bound.entry.state, strict=True)]
        taken += [_span(tensor, item) for tensor, item in zip(owned[count:], bound.returned, strict=True)]
        for index, item in enumerate(bound.entry.outputs):
            tensor = results[index]
            span = _span(tensor, item)
            if _overlaps(span, taken) or span[0] in self._model.addresses or tensor.shape in self._model.constants:
                owned[index] = copy_tensor(tensor, item.dtype)
            taken.append(span)
        return owned

    def _bound_memory(self, sizes: Mapping[str, int]) -> None:
        """Give buffers back after many different sizes: TVM's pool matches exactly and frees nothing by itself."""
        if not sizes:
            return
        self._sizes_seen.add(tuple(sizes.values()))
        if len(self._sizes_seen) > _SIZES_KEPT:
            self._sizes_seen.clear()
            release_memory()


def release_memory() -> None:
    """Hand the allocator's unused buffers back to the system; those in use stay."""
    ffi().get_global_func("vm.builtin.memory_manager.clear")()


def new_machine(model: Model) -> Any:
    """A virtual machine over the model's library; on a GPU, the CPU comes last and holds sizes."""
    machine = model.library["vm_load_executable"]()
    devices = (GPU, CPU) if model.variant.on_gpu else (CPU,)
    machine["vm_initialization"](*(part for device in devices for part in (device, 0, _POOLED_ALLOCATOR)))
    return machine


def bind_function(entry: str, model: Model, machine: Any) -> Any:
    """The entry as a function of inputs and state, which for stages calls those of its stages."""
    found = model.manifest.entries[entry]
    if not found.stages:
        return bind_weights(entry, model, machine)
    functions = {name: bind_weights(name, model, machine) for name in found.stages}
    stages = Stages(found, {name: model.manifest.entries[name] for name in found.stages})

    def call(name: str, inputs: list[Any]) -> list[Any]:
        return as_list(functions[name](*inputs))

    def run(*inputs: Any) -> list[np.ndarray]:
        answers, exits = stages.run(call, inputs)
        return [*answers, exits]

    return run


def as_list(result: Any) -> list[Any]:
    """What a function of the library gives: a tensor or several."""
    return [result] if isinstance(result, ffi().Tensor) else list(result)


def bind_weights(entry: str, model: Model, machine: Any) -> Any:
    """The entry's function with the weights, its last arguments, bound once instead of passed with every call."""
    weights = [model.weight(name) for name in model.variant.weights[entry]]
    bound = f"graphopt.{entry}"
    try:
        machine["save_function"](entry, bound, 1, *weights)
        return machine[bound]
    except Exception as e:
        reason = str(e).strip().splitlines()[0]
        raise ArtifactError(
            f"library {model.variant.library} has no function {entry!r} ({reason}); compile again"
        ) from e


def _span(tensor: Any, info: TensorInfo) -> tuple[int, int]:
    start: int = tensor.data_ptr()
    return start, start + tensor.numel() * DTYPES[info.dtype].carrier.itemsize


def _overlaps(span: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    start, end = span
    return any(start < other_end and other_start < end for other_start, other_end in others)


def _value_info(item: TensorInfo) -> ValueInfo:
    return ValueInfo(item.name, list(item.shape), f"tensor({DTYPES[item.dtype].onnx})")
