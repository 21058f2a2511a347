"""The sizing rule in charge of a real pool on the real machine, under a real load.

What is asserted are the decisions, each against what was measured when it was made; nothing depends
on how fast the machine is or on what else it does.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.oracles.scripts import run_script

SCRIPT = """
import hashlib, json, logging, threading, time
from wiseflow_nb.config import Settings
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.resources import ResourceMonitor

logging.disable(logging.CRITICAL)  # the alerts, which are not the point here
WHAT, SECONDS, PERIOD, MEGABYTES = {what!r}, 14.0, 0.25, 96
over = threading.Event()

def cpu():
    # Gives up the interpreter's lock, so that each worker can fill a core.
    end = time.monotonic() + 0.2
    while time.monotonic() < end and not over.is_set():
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 20_000)

def memory():
    held = bytearray(MEGABYTES << 20)
    held[::4096] = b"x" * len(held[::4096])
    over.wait(0.4)

load = cpu if WHAT == "CPU" else memory
idle = ResourceMonitor(Settings())
before = idle.sample_now().memory_utilization_ratio
pool = ThreadPoolManager(1, 8)
refill = lambda: [pool.submit(load) for _ in range(16 - pool.pending)]
refill()
end = time.monotonic() + 20
while pool.status().busy < 8 and time.monotonic() < end:
    time.sleep(0.01)
if WHAT == "CPU":
    asked = dict(cpu_threshold=50, memory_threshold=99)
else:
    # Half of what eight workers hold is too much, wherever the machine stands.
    limit = idle.sample_now().memory_limit_bytes
    middle = 100 * (before + 4 * (MEGABYTES << 20) / limit)
    asked = dict(cpu_threshold=99.9, memory_threshold=middle, warning_threshold_factor=0.99)
settings = Settings(max_thread_workers=8, min_thread_workers=1, resource_check_interval=PERIOD, **asked)
monitor = ResourceMonitor(settings)
monitor.start()
end = time.monotonic() + 20
while monitor.latest() is None and time.monotonic() < end:
    time.sleep(0.01)
steps = []
began = time.monotonic()
while (now := time.monotonic() - began) < SECONDS:
    time.sleep(PERIOD)
    refill()
    sample = monitor.latest()
    current = pool.target
    decision = monitor.calculate_optimal_thread_count(pending=pool.pending, workers=current)
    pool.resize(decision.target, decision.reason)
    steps.append(dict(now=now, current=current, target=decision.target, reason=decision.reason,
                      pressure=decision.pressure, cpu=sample.cpu_utilization_ratio,
                      memory=sample.memory_utilization_ratio, busy=pool.status().busy))
monitor.stop()
over.set()
pool.shutdown(cancel_futures=True)
print(json.dumps(dict(steps=steps, stats=[pool.stats().submitted, pool.stats().completed
    + pool.stats().cancelled])))
"""


@pytest.mark.parametrize("what", ["CPU", "memory"])
def test_a_real_load_is_answered(what: str) -> None:
    told: dict[str, Any] = json.loads(run_script(SCRIPT.replace("{what!r}", repr(what))).stdout)
    steps = told["steps"]
    assert len(steps) > 10
    # Eight workers were too many, and that was seen and acted upon, in the name of what was too high.
    cuts = [step for step in steps if step["target"] < step["current"]]
    assert cuts
    assert cuts[0]["current"] == 8
    # (Where other processes fill the machine, the CPU may be named beside the memory.)
    named = {step["reason"].split(" at ")[0] for step in cuts}
    assert what in named <= {what, "CPU"}
    for step in steps:
        assert 1 <= step["target"] <= 8
        if step["pressure"] != "none":
            assert step["target"] <= step["current"]
    # It ends below the warning level, or has given back all that it may.
    last = steps[-1]
    assert last["pressure"] == "none" or last["target"] <= 2
    # Cooled down between any two changes.
    changes = [step["now"] for step in steps if step["target"] != step["current"]]
    assert all(b - a > 3.0 for a, b in itertools.pairwise(changes))
    assert told["stats"][0] == told["stats"][1]
