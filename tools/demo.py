"""`make demo`: one real model captured, optimized, compiled, shipped, run without torch, compared and timed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.program import Program

SENTENCES = (
    "A cat sleeps on the sofa.",
    "The kitten is taking a nap on the couch.",
    "Interest rates rose by a quarter of a percent.",
    "The central bank made borrowing more expensive this week, surprising most of the analysts who had been asked.",
    "How do I bake bread?",
    "Mix flour, water, salt and yeast, let the dough rise for an hour, then put it into a hot oven for thirty minutes.",
)
LEAST_COSINE = 0.99999
TOKENS = 128


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where model.gopt goes (default demo)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of 0.2 s for each runtime (default 15)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    artifact = options.folder / "model.gopt"

    from graphopt.tools.demo_model import minilm
    from graphopt.tools.doctor import describe_torch

    print(f"torch          {describe_torch()}")
    module, examples = minilm()
    program, report = build(module, examples, artifact)
    expected = embed_with_torch(module)
    shipped, embeddings = embed_without_torch(artifact)
    print_similarity(embeddings)
    cosine = float((expected * embeddings).sum(1).min())
    print_figures(report, artifact, shipped, cosine)
    latency = time_beside_onnxruntime(program, artifact, options.rounds)
    (options.folder / "demo.json").write_text(json.dumps({"cosine": cosine, **shipped, "latency": latency}, indent=1))
    if cosine < LEAST_COSINE:
        print(f"FAILED: cosine {cosine:.7f} is below {LEAST_COSINE}", file=sys.stderr)
        return 1
    return 0 if latency["agree"] else 1


def build(module: Any, examples: Any, artifact: Path) -> tuple[Program, Any]:
    """Capture, optimize at O2, compile for this CPU and save; returns the captured program and the report."""
    import graphopt
    from graphopt.backends.tuner.store import Store
    from graphopt.tools.compile import print_artifact, summarize
    from graphopt.tools.demo_model import dynamic_shapes

    begin = time.perf_counter()
    program = graphopt.capture(module, examples, dynamic_shapes=dynamic_shapes(), name="all-MiniLM-L6-v2")
    captured = time.perf_counter()
    result = graphopt.optimize(program, "O2")
    optimized = time.perf_counter()
    compiled = graphopt.compile(result.program, "cpu", database=Store.empty())  # README's figures are untuned
    compiled.save(str(artifact))
    done = time.perf_counter()
    times = f"capture {captured - begin:.1f} s, optimize {optimized - captured:.1f} s, compile {done - optimized:.1f} s"
    print(f"built          {artifact}: {times}")
    print_artifact(summarize(compiled, str(artifact)))
    return program, result.report


def embed_with_torch(module: Any) -> Any:
    import torch
    from tokenizers import Tokenizer

    from graphopt.tools.demo_model import model_folder

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(SENTENCES))
    ids = torch.tensor([item.ids for item in encoded])
    mask = torch.tensor([item.attention_mask for item in encoded])
    with torch.no_grad():
        return module(ids, mask)["sentence_embedding"].numpy()


def embed_without_torch(artifact: Path) -> tuple[dict[str, Any], Any]:
    """What the shipped process said about itself, and its embeddings."""
    import numpy as np

    from graphopt.tools import demo_embed
    from graphopt.tools.demo_model import model_folder

    tokenizer = str(model_folder() / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "embeddings.npy"
        command = [sys.executable, "-m", demo_embed.__name__, str(artifact), tokenizer, str(output)]
        done = subprocess.run(command, input="\n".join(SENTENCES), capture_output=True, text=True)
        if done.returncode:
            raise GraphoptError(f"the torch-free process failed: {done.stderr}")
        return json.loads(done.stdout), np.load(output)


def print_similarity(embeddings: Any) -> None:
    print("\nsimilarity")
    for number, (row, sentence) in enumerate(zip(embeddings @ embeddings.T, SENTENCES, strict=True), 1):
        short = sentence if len(sentence) < 48 else sentence[:45] + "..."
        print(f"  {number}  {'  '.join(f'{value:5.2f}' for value in row)}   {short}")


def print_figures(report: Any, artifact: Path, shipped: dict[str, Any], cosine: float) -> None:
    from graphopt.tools.table import format_bytes

    print(f"\nlowest cosine  {cosine:.7f} against PyTorch (at least {LEAST_COSINE})")
    print(f"nodes          {report.nodes_before} -> {report.nodes_after}")
    print(f"artifact       {format_bytes(artifact.stat().st_size)}")
    print(f"load           {shipped['load_seconds']:.3f} s, hashes checked, no torch, onnx or tvm in the process")
    print(f"peak memory    {format_bytes(shipped['peak_bytes'])}\n")


def time_beside_onnxruntime(program: Program, artifact: Path, rounds: int) -> dict[str, Any]:
    from graphopt.tools.benchmarking.comparison import Settings, choose_cores, compare
    from graphopt.tools.benchmarking.peers import check_peers, peer_entrants
    from graphopt.tools.benchmarking.report import format_notes, format_rows
    from graphopt.tools.benchmarking.turns import Entrant
    from graphopt.tools.subject import program_subject

    subject = program_subject(program)
    feed = subject.draw({"batch": 1, "seq": TOKENS}, 0)
    with tempfile.TemporaryDirectory() as folder:
        peers, failures = peer_entrants(program, check_peers("onnxruntime"), Path(folder))
        entrants = [Entrant("graphopt", str(artifact)), *peers]
        expected = list(subject.run(feed).values())
        report = compare(entrants, failures, feed, expected, Settings(choose_cores(None), rounds))
    print(f"latency at {TOKENS} tokens\n{format_notes(report)}\n{format_rows(report)}")
    return report


if __name__ == "__main__":
    folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != folder]  # its files are modules of graphopt.tools only
    try:
        sys.exit(main())
    except GraphoptError as e:
        sys.exit(f"demo: {e}")
