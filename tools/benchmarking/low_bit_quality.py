"""What weights in few bits cost MiniLM: `python -m graphopt.tools.benchmarking.low_bit_quality PASSES...`.

Each PASSES is run behind O2 on 16 batches of sentences; a line gives the bits a weight, the mean cosine of 128 held-out
sentence embeddings to those in float32, and the rank correlation of all similarities among them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import graphopt
from graphopt.data.dataset import open_data
from graphopt.tools.benchmarking.folding_cases import Subject, minilm

FIT_EVERY = 5  # of the batches for fitting, one in so many
HELD_OUT = 4  # batches


def quality(subject: Subject, specs: Sequence[str]) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """(passes, their first note, figures) one by one."""
    cut = len(subject.data) * 4 // 5
    data = [*subject.data[:cut:FIT_EVERY], *subject.data[cut : cut + HELD_OUT]]
    held_out = open_data(data, subject.program).held_out
    start = graphopt.optimize(subject.program, "O2", verify="off").program
    for spec in specs:
        result = graphopt.optimize(start, spec, data=data, verify="off")
        note = next((note for note in result.report.passes[-1].notes if "bits a weight" in note), "")
        yield spec, note, subject.figures(result.program, held_out)


def main() -> None:
    for spec, note, figures in quality(minilm(), sys.argv[1:]):
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{spec}: {told}; {note}", flush=True)


if __name__ == "__main__":
    main()
