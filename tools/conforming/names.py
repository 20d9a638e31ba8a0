"""What tests are run, how, and what may come of them."""

from __future__ import annotations

SUITES = ("node", "simple", "light", "pytorch-converted", "pytorch-operator")
MODES = ("eager", "compiled", "roundtrip")
OUTCOMES = ("passed", "refused", "wrong", "failed", "crashed", "not-applicable")
