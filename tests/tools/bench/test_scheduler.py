"""The simulator: what it reports, and that the oracle is one."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.bench import __main__ as bench
from tools.bench.scheduler import KINDS, draw_trace, run_fixed, run_oracle, run_ours


def test_the_scheduler_is_ahead_of_the_others_and_never_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert bench.main(["scheduler", "--traces", "140", "--json", str(path)]) == 0
    policies = json.loads(path.read_text())["policies"]
    ours = policies.pop("ours")
    assert ours["overruns"] == 0 and ours["oracle_ratio"] > 0.93
    assert set(ours["oracle_ratio_by_trace"]) == set(KINDS)
    assert ours["snapshot_share_max"] <= 0.03
    assert all(ours["oracle_ratio"] > other["oracle_ratio"] for other in policies.values()) and len(policies) == 2
    assert "slow disk" in capsys.readouterr().out


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.integers(0, 10**9))
def test_no_policy_in_time_is_ahead_of_the_oracle(kind: str, seed: int) -> None:
    trace = draw_trace(kind, seed)
    best = run_oracle(trace)
    for policy in (run_ours, run_fixed):
        outcome = policy(trace)
        assert outcome.end > trace.seconds or outcome.ipc <= 1.02 * best.ipc + trace.composition.copies + 1


@given(st.sampled_from(KINDS), st.integers(0, 10**6))
@settings(max_examples=30)
def test_work_takes_its_time_in_one_piece_or_in_two(kind: str, seed: int) -> None:
    trace, dice = draw_trace(kind, seed), random.Random(seed)
    now, work = dice.uniform(0, trace.seconds / 2), dice.uniform(0, trace.seconds / 4)
    whole = trace.machine.after(now, work)
    assert whole >= now
    assert trace.machine.after(trace.machine.after(now, work / 3), work * 2 / 3) == pytest.approx(whole)
