"""Quantization after training: `placement` where, `calibration` which range, `weights` which codes, `writing` them."""

from graphopt.passes.quantize.quantization import Quantize

__all__ = ["Quantize"]
