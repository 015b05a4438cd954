"""Where things are that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Real images and SDXL-Turbo's configurations, which are no part of the project: tests that need them skip without.
SHARED = ROOT.parent / "shared"
# What the organisers' evaluator computes on inputs that anyone can make.
GOLDEN = ROOT / "tests" / "golden"
