"""Runs a suite from its command line: tables as they come, files after each step, so that Ctrl-C loses nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from graphopt.errors import UsageError
from graphopt.optional import missing_extra
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.networks import Publish, Report
from graphopt.tools.benchmarking.peers import ALL, check_peers
from graphopt.tools.output_file import check_suffix, replace_file
from graphopt.tools.table import wants_text, write_json

QUANTIZED = ("onnxruntime", "openvino")  # that take a QDQ file
CHART = ".png"
STDOUT = "-"

T = TypeVar("T")


@dataclass(frozen=True)
class Suite:
    """`measure` tells the report after each step to its argument; the others say or draw what is in a report."""

    measure: Callable[[Publish], None]
    describe_step: Callable[[Report], str]
    describe: Callable[[Report], str]
    markdown: Callable[[Report], str]
    draw: Callable[[str, Report], None]
    is_right: Callable[[Report], bool]


def run_suite(arguments: argparse.Namespace, settings: Settings) -> int:
    check_needed(arguments)
    suite = SUITES[arguments.suite](arguments, settings)
    latest: Report = {}

    def publish(report: Report) -> None:
        nonlocal latest
        latest = report
        if arguments.json != STDOUT:
            write_json(arguments, report)
        if arguments.markdown is not None:
            with replace_file(arguments.markdown) as stream:
                stream.write(suite.markdown(report).encode())
        if arguments.chart is not None:
            suite.draw(arguments.chart, report)
        if wants_text(arguments):
            print(suite.describe_step(report), end="\n\n", flush=True)

    try:
        suite.measure(publish)
    finally:
        if latest and wants_text(arguments):
            print(suite.describe(latest), flush=True)
        elif latest:
            write_json(arguments, latest)
    return 0 if suite.is_right(latest) else 1


def check_needed(arguments: argparse.Namespace) -> None:
    """Before the work. Raises UsageError or MissingExtraError."""
    try:
        import torch  # noqa: F401 - every suite captures models

        if arguments.suite in ("e2e", "int8"):
            import transformers  # noqa: F401
        if arguments.suite in ("int8", "gemv", "decode"):
            import onnxruntime  # noqa: F401
        if arguments.chart is not None:
            check_suffix(arguments.chart, (CHART,))
            import matplotlib  # noqa: F401
    except ImportError as e:
        raise missing_extra(f"--suite {arguments.suite}", e) or e from e


def models_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import summary
    from graphopt.tools.benchmarking.chart import draw_models
    from graphopt.tools.benchmarking.e2e import run_models
    from graphopt.tools.benchmarking.models import choose_models

    peers = check_peers(ALL if arguments.against is None else arguments.against, settings.dtype)
    names = choose_models(arguments.models)
    return Suite(
        lambda publish: run_models(names, peers, settings, publish),
        lambda report: summary.format_model(report["models"][-1]),
        summary.format_suite,
        summary.format_markdown,
        draw_models,
        lambda report: all(map(summary.is_right, report["models"])),
    )


def kernels_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import kernel_summary
    from graphopt.tools.benchmarking.chart import draw_kernels
    from graphopt.tools.benchmarking.kernel_cases import choose_cases
    from graphopt.tools.benchmarking.kernels import run_kernels

    if arguments.against is not None:
        raise UsageError(
            "--suite kernels stands beside torch's own kernels and the machine's peak; leave out --against"
        )
    cases = choose_cases(arguments.models)
    return Suite(
        lambda publish: run_kernels(cases, settings, publish),
        lambda report: kernel_summary.format_kernel(report["kernels"][-1]),
        kernel_summary.format_suite,
        kernel_summary.format_markdown,
        draw_kernels,
        lambda report: all(map(kernel_summary.is_right, report["kernels"])),
    )


def folding_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import folding
    from graphopt.tools.benchmarking.folding_cases import CASES
    from graphopt.tools.benchmarking.folding_chart import draw_folding

    cases = chosen_networks(arguments, CASES, "the whole network")
    return networks_suite(partial(folding.run_folding, cases, settings), folding, draw_folding)


def gating_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import gating
    from graphopt.tools.benchmarking.gating_cases import CASES
    from graphopt.tools.benchmarking.gating_chart import draw_gating

    cases = chosen_networks(arguments, CASES, "the network without gates")
    return networks_suite(partial(gating.run_gating, cases, settings), gating, draw_gating)


def int8_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import int8_summary
    from graphopt.tools.benchmarking.chart import draw_models
    from graphopt.tools.benchmarking.int8 import NAMES, run_int8
    from graphopt.tools.benchmarking.models import MODELS, choose_models

    peers = check_peers(",".join(QUANTIZED) if arguments.against in (None, ALL) else arguments.against)
    if others := [peer for peer in peers if peer not in QUANTIZED]:
        raise UsageError(f"{others[0]} takes no QDQ file; --suite int8 stands beside {', '.join(QUANTIZED)}")
    names = choose_models(arguments.models, {name: MODELS[name] for name in NAMES})
    return networks_suite(lambda publish: run_int8(names, peers, settings, publish), int8_summary, draw_models)


def exits_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import exits
    from graphopt.tools.benchmarking.exits_cases import CASES
    from graphopt.tools.benchmarking.exits_chart import draw_exits

    cases = chosen_networks(arguments, CASES, "the whole network")
    return networks_suite(partial(exits.run_exits, cases, settings), exits, draw_exits)


def quantization_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import quantization
    from graphopt.tools.benchmarking.quantization_cases import CASES
    from graphopt.tools.benchmarking.quantization_chart import draw_quantization

    cases = chosen_networks(arguments, CASES, "the float32 network")
    return networks_suite(partial(quantization.run_quantization, cases, settings), quantization, draw_quantization)


def gemv_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import gemv
    from graphopt.tools.benchmarking.gemv_cases import CASES
    from graphopt.tools.benchmarking.gemv_chart import draw_gemv

    cases = chosen_networks(arguments, CASES, "ONNX Runtime and reading memory")
    return networks_suite(partial(gemv.run_gemv, cases, settings), gemv, draw_gemv)


def overhead_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import overhead
    from graphopt.tools.benchmarking.overhead_chart import draw_overhead

    cases = chosen_networks(arguments, overhead.CASES, "its kernel and ONNX Runtime")
    return networks_suite(partial(overhead.run_overhead, cases, settings), overhead, draw_overhead)


def opening_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import opening
    from graphopt.tools.benchmarking.opening_chart import draw_opening

    cases = chosen_networks(arguments, opening.CASES, "ONNX Runtime")
    return networks_suite(partial(opening.run_opening, cases, settings), opening, draw_opening)


def decode_suite(arguments: argparse.Namespace, settings: Settings) -> Suite:
    from graphopt.tools.benchmarking import decode
    from graphopt.tools.benchmarking.decode_cases import PASSES
    from graphopt.tools.benchmarking.decode_chart import draw_decode

    cases = chosen_networks(arguments, PASSES, "ONNX Runtime")
    return networks_suite(partial(decode.run_decode, cases, settings), decode, draw_decode)


def chosen_networks(arguments: argparse.Namespace, cases: Mapping[str, T], beside: str) -> dict[str, T]:
    """Raises UsageError for --against: these suites bring what they stand beside."""
    from graphopt.tools.benchmarking.models import choose_models

    if arguments.against is not None:
        raise UsageError(f"--suite {arguments.suite} stands beside {beside}; leave out --against")
    return {name: cases[name] for name in choose_models(arguments.models, cases)}


def networks_suite(measure: Callable[[Publish], None], module: Any, draw: Callable[[str, Report], None]) -> Suite:
    """`module` has format_model, format_suite, format_markdown and is_right."""
    return Suite(
        measure,
        lambda report: module.format_model(report["models"][-1]),
        module.format_suite,
        module.format_markdown,
        draw,
        lambda report: all(map(module.is_right, report["models"])),
    )


SUITES: Mapping[str, Callable[[argparse.Namespace, Settings], Suite]] = {
    "e2e": models_suite,
    "kernels": kernels_suite,
    "folding": folding_suite,
    "gating": gating_suite,
    "exits": exits_suite,
    "int8": int8_suite,
    "quantization": quantization_suite,
    "gemv": gemv_suite,
    "decode": decode_suite,
    "overhead": overhead_suite,
    "opening": opening_suite,
}
