"""Weights of one to eight bits: the value, the grids it lies on, how it is found, and the files that hold it."""

from graphopt.low_bit.gguf_file import read_gguf
from graphopt.low_bit.gptq import Hessian, compensated
from graphopt.low_bit.gptq_file import read_awq, read_gptq
from graphopt.low_bit.grids import Grid
from graphopt.low_bit.place import place_weights
from graphopt.low_bit.rounding import least_error_steps, rounded
from graphopt.low_bit.storage import load_weights, save_weights
from graphopt.low_bit.weight import LowBitWeight

__all__ = [
    "Grid",
    "Hessian",
    "LowBitWeight",
    "compensated",
    "least_error_steps",
    "load_weights",
    "place_weights",
    "read_awq",
    "read_gguf",
    "read_gptq",
    "rounded",
    "save_weights",
]
