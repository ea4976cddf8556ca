"""A short soak run on every commit, and that the soak notices what it is there to notice. The long one: `make soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak


def test_a_short_soak_of_swaps(tiny):
    result = soak.swaps(40, str(tiny))
    assert result["turns"] == 40 and result["refreshes"] > 3


def test_a_short_soak_of_kills(tiny):
    result = soak.kills(3, str(tiny))
    assert result["kills"] == 3 and result["of these before the first step"] > 0 and 0 < result["step at the last kill"] < 20


def test_a_swap_that_does_nothing_is_noticed(tiny, monkeypatch):
    from helpers import adapters

    monkeypatch.setattr(adapters.AdapterBank, "swap", lambda self, name: 0.0)
    with pytest.raises(soak.Wrong, match="answered|no longer PEFT's"):
        soak.swaps(20, str(tiny))


def test_a_leak_is_noticed(tiny):
    """In a process of its own: beside the memory of a whole test session 3 MB a turn would be below the 5% that are allowed."""
    code = ("import sys; sys.path[:0] = sys.argv[2:]; import soak; leaked = []\n"
            "soak.swaps(30, sys.argv[1], after=lambda: leaked.append(bytearray(b'x') * 3_000_000))")
    tools = Path(soak.__file__).parent
    run = subprocess.run([sys.executable, "-c", code, str(tiny), str(tools)], capture_output=True, text=True)
    assert run.returncode != 0 and "memory grew by" in run.stderr, run.stderr[-2000:]


def test_a_lost_checkpoint_is_noticed(tiny):
    def lose(run_dir):
        for marker in run_dir.glob("checkpoints/*/complete.json"):
            marker.unlink()

    with pytest.raises(soak.Wrong, match="lost complete checkpoints"):
        soak.kills(2, str(tiny), between=lose)


def test_another_path_is_noticed(tiny):
    def disturb(run_dir):
        for state in run_dir.glob("checkpoints/*/trainer_state.json"):
            content = json.loads(state.read_text())
            content["log_history"] = [dict(entry, loss=0.5) for entry in content["log_history"]]
            state.write_text(json.dumps(content))

    with pytest.raises(soak.Wrong, match="the loss took another path"):
        soak.kills(2, str(tiny), between=disturb)
