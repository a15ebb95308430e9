"""Time from `nextscale demo` to the page in a browser and to the first pictures, in seconds.

python -m benchmarks.demo_start models/var-cifar10 [ROUNDS]    # needs gradio, playwright and chromium
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from nextscale.common.devices import find_device
from nextscale.common.machine import describe_machine
from tests.browser import Visitor, open_browser


def time_start(model: str) -> dict[str, float]:
    """Seconds since the command was started until each event."""
    seconds, command = {}, [sys.executable, "-m", "nextscale.cli", "demo", model]
    with open_browser() as browser:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None, "its output is read"
            address = process.stdout.readline().split("the page is at ")[1].split()[0]
            seconds["address printed"] = time.perf_counter() - start
            visitor = Visitor(browser, address)
            seconds["page shown"] = time.perf_counter() - start
            visitor.button("Generate").click()
            visitor.page.locator("#pictures img").first.wait_for()
            seconds["first scale shown"] = time.perf_counter() - start
            visitor.wait_for_text("status", "images a second")
            seconds["four pictures shown"] = time.perf_counter() - start
            visitor.close()
            process.terminate()
    return seconds


def main() -> None:
    """Print the median and the range over the rounds, after one round that fills the caches."""
    model, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    runs = [time_start(model) for _ in range(rounds + 1)][1:]
    table = {
        event: {"median": statistics.median(r[event] for r in runs), "all": sorted(r[event] for r in runs)}
        for event in runs[0]
    }
    print(json.dumps({"model": model, "machine": describe_machine(find_device("auto")), "seconds": table}, indent=2))


if __name__ == "__main__":
    main()
