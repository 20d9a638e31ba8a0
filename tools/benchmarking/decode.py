"""`--suite decode`: tokens a second of one decoder with weights in several forms, beside ONNX Runtime and the memory.

A token takes all weights once, so that no form can be faster than memory is read: the roofline of a form is what it
touches a token over the bandwidth that reading alone reaches in the same turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.low_bit.grids import Grid
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.decode_cases import SHAPE, TITLE, build
from graphopt.tools.benchmarking.decode_onnx import DecoderFile
from graphopt.tools.benchmarking.decode_sides import PROMPT
from graphopt.tools.benchmarking.llama import Llama, Shape, capture_decoder, entries_of
from graphopt.tools.benchmarking.memory_reads import READS, write_reads
from graphopt.tools.benchmarking.networks import Network, Publish, Report, format_suite, format_tables, run_networks
from graphopt.tools.benchmarking.report import output_error
from graphopt.tools.benchmarking.turns import TURN, Entrant, Measurement, take_turns
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

if TYPE_CHECKING:
    from graphopt.program import Program

PEERED = {"float32": None, "W4": Grid("affine", 4)}  # the forms that ONNX Runtime has, and where weights lie then
PROMPT_TOKENS = 16
MEMORY_SHARE, MEMORY_MORE = 1.1, 32 << 20  # growth of memory asked for: times what is packed, and bytes more
ROOF_SHARE, OVER_PEER = 0.8, 1.15  # one of which W4 is asked to reach
_READ_BYTES = 512 << 20


def run_decode(forms: Mapping[str, str], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each form."""
    shape = SHAPE
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        with progress(f"{TITLE}: making weights"):
            module = build(shape)
        with progress(f"{TITLE}: capturing"):
            program = capture_decoder(module)
        read = write_reads(Path(folder), _READ_BYTES, len(settings.cores))
        networks: list[Network] = [
            (
                {"name": name, "title": name, "passes": passes, "peer": name in PEERED},
                partial(measure_form, name, passes, module, program, read, settings, Path(folder)),
            )
            for name, passes in forms.items()
        ]
        about = {
            "title": TITLE,
            "vocabulary": shape.vocabulary,
            "product_weights": shape.weights(),
            "cache_bytes": shape.cache_bytes(),
            "prompt_tokens": PROMPT_TOKENS,
        }
        run_networks("decode", networks, settings, lambda report: publish({**report, **about}), TURN)


def measure_form(
    name: str,
    passes: str,
    module: Llama,
    program: Program,
    read: str,
    settings: Settings,
    folder: Path,
) -> dict[str, Any]:
    entrants = [*write_form(name, passes, module, program, settings, folder), Entrant(READS, read)]
    with progress(f"{name}: measuring"):
        return measure_entrants(entrants, module.shape, settings)


def write_form(
    name: str, passes: str, module: Llama, program: Program, settings: Settings, folder: Path
) -> list[Entrant]:
    """The decoder with weights in one form, and as ONNX Runtime takes it, if it does.

    The artifact is not run against PyTorch in float64, as `compile` does it: that takes minutes at this size. Its side
    tells how far it is from the outputs that PyTorch gave in float32.
    """
    import graphopt
    from graphopt.compile import prepare
    from graphopt.database import open_store

    artifact, peer = folder / f"{name}.gopt", folder / f"{name}.onnx"
    with progress(f"{name}: compiling"):
        database = settings.tuning.options()["database"]
        lowered = graphopt.optimize(program, passes, verify="off", database=database).program
        compilation = prepare(entries_of(lowered), "cpu", len(settings.cores))
        compilation.assemble(compilation.lower(open_store(database))).save(artifact)
    if name not in PEERED:
        return [Entrant("decoder", str(artifact))]
    with progress(f"{name}: writing ONNX"):
        DecoderFile(module, PEERED[name]).write(peer)
    return [Entrant("decoder", str(artifact)), Entrant("onnxruntime-decoder", str(peer))]


def measure_entrants(entrants: list[Entrant], shape: Shape, settings: Settings) -> dict[str, Any]:
    """Ours, peers, and the side that reads, in turns. Raises GraphoptError where one of them cannot run."""
    feed = {PROMPT: np.random.default_rng(0).integers(0, shape.vocabulary, PROMPT_TOKENS)}
    measured, failures, others = take_turns(entrants, feed, settings.cores, settings.rounds, patience=settings.patience)
    if failures:
        raise GraphoptError(failures[0].reason)
    ours, *peers, reading = measured
    return {**judge(ours, reading, peers, shape), "elsewhere": others.elsewhere, "stolen": others.stolen}


def judge(ours: Measurement, reading: Measurement, peers: list[Measurement], shape: Shape) -> dict[str, Any]:
    """Tokens a second, and what they are held against."""
    bandwidth = reading.about["bytes"] / reading.median
    touched, packed = ours.about["touched_bytes"], ours.about["packed_bytes"]
    found: dict[str, Any] = {
        "tokens_per_second": 1 / ours.median,
        "median": ours.median,
        "median_alone": ours.median_alone,
        "touched_bytes": touched,
        "packed_bytes": packed,
        "bandwidth": bandwidth,
        "share_of_roofline": touched / bandwidth / ours.median,
        "growth_bytes": ours.about["growth_bytes"],
        "growth_allowed": MEMORY_SHARE * packed + shape.cache_bytes() + MEMORY_MORE,
        "load_seconds": ours.load_seconds,
        "error": ours.about["error"],
        "valid": all(side.valid for side in (ours, *peers)),
        "sides": {side.side: side.about for side in (ours, *peers)},
    }
    for peer in peers:
        same = [one == other for one, other in zip(ours.about["tokens"], peer.about["tokens"], strict=True)]
        found |= {
            "peer_tokens_per_second": 1 / peer.median,
            "over_peer": peer.median / ours.median,
            "peer_growth_bytes": peer.about["growth_bytes"],
            "peer_distance": output_error(peer.outputs[0], ours.outputs[0]),
            "same_tokens": same.index(False) if False in same else len(same),
        }
    return found


def is_right(model: Report) -> bool:
    """Whether it was measured; times decide nothing."""
    return "failed" not in model


def rows(model: Report) -> list[dict[str, Any]]:
    beside = "over_peer" in model
    return [
        {
            "tokens/s": f"{model['tokens_per_second']:.1f}" + ("" if model["valid"] else " (disturbed)"),
            "MB a token": f"{model['touched_bytes'] / 1e6:.1f}",
            "GB/s read": f"{model['bandwidth'] / 1e9:.1f}",
            "of the roofline": f"{100 * model['share_of_roofline']:.0f} %",
            "onnxruntime tokens/s": f"{model['peer_tokens_per_second']:.1f}" if beside else "-",
            "ratio": f"{model['over_peer']:.2f}x" if beside else "-",
            "memory MB (asked)": f"{model['growth_bytes'] / 1e6:.0f} ({model['growth_allowed'] / 1e6:.0f})",
        }
    ]


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    text = f"{model['title']} by {model['passes']}\n{format_table(rows(model))}"
    text += f"\nlogits are within {model['error']:.2g} of PyTorch's"
    if "over_peer" in model:
        text += (
            f" and {model['peer_distance']:.2g} of ONNX Runtime's, with the first {model['same_tokens']} tokens equal"
        )
    return text


def format_markdown(report: Report) -> str:
    shape = (
        f"{report['title']}, vocabulary {report['vocabulary']}, {report['product_weights'] / 1e6:.0f} million weights "
        f"in products; {format_suite(report)}"
    )
    return format_tables(report, rows, shape)


__all__ = ["format_markdown", "format_model", "format_suite", "is_right", "run_decode"]
