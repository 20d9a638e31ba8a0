"""Libraries for a GPU run whole on this CPU, in a process of its own: `-m` this module, a folder and cases checks them.

NVIDIA's libraries are replaced by ones that run kernels, compiled by g++ from the very source that nvcc gets, on the
CPU; TVM's runtime, the code that launches, memory planning and the session are what a machine with a GPU has. What it
cannot show: the order in which threads really run, and what NVIDIA's compiler makes of the source.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_DECLARED = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\((.*)\);$', re.MULTILINE)
_OPTIONS = ["-shared", "-fPIC", "-O1", "-w"]


def build_driver(folder: Path) -> None:
    """The libraries in the place of NVIDIA's, for LD_LIBRARY_PATH."""
    for name in ("libcuda.so.1", "libcudart.so.13"):
        versions = folder / "versions"
        versions.write_text(f"{name} {{ global: *; }};\n")
        flags = [f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", "-ldl"]
        driver = str(HERE / "emulated_driver.c")
        subprocess.run(["gcc", *_OPTIONS, driver, "-o", str(folder / name), *flags], check=True)


def compile_source(source: str, folder: Path) -> bytes:
    """What the emulated driver loads as a module: the path of a library."""
    for header in ("cuda.h", "cuda_fp16.h", "math_constants.h"):
        (folder / header).touch()
    wrappers = []
    for name, parameters in _DECLARED.findall(source):
        kinds = [each.replace("__restrict__", "").rpartition(" ")[0].strip() for each in parameters.split(", ")]
        values = ", ".join(f"*({kind}*)arguments[{number}]" for number, kind in enumerate(kinds))
        code = source.partition(f" {name}({parameters}) {{")[2].partition("\n}\n")[0]
        waits = "true" if "__syncthreads" in code else "false"
        wrappers.append(
            f"static void** arguments_{name};\n"
            f'extern "C" void emulate_{name}(void** arguments, unsigned grid, unsigned block) {{\n'
            f"  arguments_{name} = arguments;\n"
            f"  run([]() {{ void** arguments = arguments_{name}; {name}({values}); }}, grid, block, {waits});\n}}\n"
        )
    number = len(list(folder.glob("kernels*.cpp")))
    path = folder / f"kernels{number}.cpp"
    path.write_text((HERE / "emulated_kernels.h").read_text() + source + "\n" + "".join(wrappers))
    library = path.with_suffix(".so")
    subprocess.run(["g++", *_OPTIONS, f"-I{folder}", str(path), "-o", str(library)], check=True)
    return f"{library}\0".encode()


def run_emulated(folder: Path) -> str:
    """What checking the models below prints. Raises CalledProcessError where one is wrong."""
    build_driver(folder)
    known = os.environ.get("LD_LIBRARY_PATH", "")
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{known}"}
    command = [sys.executable, "-m", "tests.backends.cuda.emulator", str(folder)]
    root = HERE.parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_models(folder: Path, names: list[str]) -> None:
    import torch

    from graphopt.arrays import array_of, tensor_of
    from graphopt.backends.cuda import family
    from graphopt.backends.tuner.store import Store
    from graphopt.compile import prepare
    from tests.backends.cuda.cases import CASES

    vars(family).update(
        find_compiler=lambda archs: lambda source: compile_source(source, folder),
        check_machine_code=lambda library, archs: None,
    )
    for name in names or CASES:
        program, feeds = CASES[name]()
        compilation = prepare(program, "cuda:sm_87", None)
        session = compilation.assemble(compilation.lower(Store(folder / "store"))).session()
        for feed in feeds:
            wanted = program(*feed)
            given = {spec.name: array_of(value) for spec, value in zip(program.inputs, feed, strict=True)}
            found = session.run(None, given)
            for spec, array, want in zip(program.outputs, found, wanted, strict=True):
                got = tensor_of(array, spec.dtype)
                exact = not want.is_floating_point() or name.startswith("exact")
                close = torch.equal(got, want) if exact else torch.allclose(got, want, rtol=1e-4, atol=1e-5)
                assert close, f"{name}: {spec.name} differs by {(got.float() - want.float()).abs().max()}"
        print(name, flush=True)


if __name__ == "__main__":
    check_models(Path(sys.argv[1]), sys.argv[2:])
