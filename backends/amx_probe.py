"""Whether AMX works on this machine: a CPU may list it where Linux or a virtual machine keeps the tiles from a process.

A child process asks for them and runs the instructions, since what is not there ends a process.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

# ldtilecfg [rdi]; tilezero tmm0; tilezero tmm1; tilezero tmm2; tdpbf16ps tmm0, tmm1, tmm2; tilerelease; ret
_CODE = "c4e2784907 c4e27b49c0 c4e27b49c8 c4e27b49d0 c4e26a5cc1 c4e27849c0 c3"
_CHILD = f"""
import ctypes, mmap
call = ctypes.CDLL(None).syscall
call.argtypes = [ctypes.c_long] * 3
assert call(158, 0x1023, 18) == 0
code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("{_CODE}"))
sizes = bytearray(64)
sizes[0], sizes[16:22], sizes[48:51] = 1, bytes([64, 0] * 3), bytes([16] * 3)
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)(bytes(sizes))
"""
_SECONDS = 30  # for a Python to start on a busy machine


@cache
def amx_works() -> bool:
    """Runs a child process, once."""
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", _CHILD], capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
