"""NVIDIA's GPU of this machine, as its driver tells."""

from __future__ import annotations

import ctypes
import re
from functools import cache

PREFIX = "cuda:"  # of the feature that names the architectures a library has code for: "cuda:sm_80+sm_90"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@cache
def gpu_architecture() -> tuple[int, int] | None:
    """Compute capability of the first GPU, as (8, 7); None where there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(found, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return found[0].value, found[1].value


def runs(feature: str) -> bool:
    """Whether this machine's GPU runs code for one of the architectures: that of its own major number, not above it.

    One that is no "sm_87" or "sm_110" it does not run.
    """
    here = gpu_architecture()
    archs = (re.fullmatch(r"sm_(\d{2,3})", arch) for arch in feature.removeprefix(PREFIX).split("+"))
    capabilities = (divmod(int(arch[1]), 10) for arch in archs if arch)
    return here is not None and any(major == here[0] and minor <= here[1] for major, minor in capabilities)
