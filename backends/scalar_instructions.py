"""The instructions of targets whose kernels have no vectors, as a GPU's, in LLVM's language: for trials on a CPU.

Each is the arithmetic of the same name in `cuda/prelude.cu`, bit for bit.
"""

from __future__ import annotations

QUADS = "graphopt_multiply_quads"


def scalar_definitions() -> str:
    """total + the products of the four bytes of two words, signed, wrapping around at 32 bits."""
    lines, total = [], "%total"
    for number in range(4):
        for operand, name in (("%left", "a"), ("%right", "b")):
            lines += [
                f"%{name}down{number} = lshr i32 {operand}, {8 * number}",
                f"%{name}part{number} = trunc i32 %{name}down{number} to i8",
                f"%{name}{number} = sext i8 %{name}part{number} to i32",
            ]
        lines += [f"%ab{number} = mul i32 %a{number}, %b{number}", f"%sum{number} = add i32 {total}, %ab{number}"]
        total = f"%sum{number}"
    body = "".join(f"  {line}\n" for line in lines)
    return f"define i32 @{QUADS}(i32 %total, i32 %left, i32 %right) {{\n{body}  ret i32 {total}\n}}\n"
