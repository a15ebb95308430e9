"""What a text condition costs: VAR-d16 with cross-attention to 64 tokens, against one of classes, on one CPU thread.

    python -m benchmarks.conditions [PAIRS] [DEPTH]

Random weights; one image of 256 x 256 with guidance, decoder included. The two models take turns, and processor time is
compared pair by pair, so that other work of the machine counts little.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch

from nextscale.config.condition import ConditionConfig
from nextscale.config.presets import preset
from nextscale.pipeline import Pipeline

PROMPT = "a bold italic serif R, red on blue, and a small green circle !!"  # 63 bytes: no token is padding


def main(pairs: int = 3, depth: int = 16) -> None:
    torch.set_num_threads(1)
    base = preset(f"var-d{depth}")
    text = replace(
        base.transformer, condition=ConditionConfig("text", max_tokens=64), mixers=("attention", "cross-attention")
    )
    classes = Pipeline.from_config(base).optimize()
    texts = Pipeline.from_config(replace(base, transformer=text, class_names=())).optimize()
    ratios = []
    for pair in range(pairs + 1):
        times = [measure(lambda: classes.sample([3])), measure(lambda: texts.sample(prompts=PROMPT))]
        if pair:  # the first one packs weights and compiles kernels
            ratios.append(times[1] / times[0])
            print(f"classes {times[0]:.2f} s, text {times[1]:.2f} s: {ratios[-1]:.3f} times", flush=True)
    print(f"median of {pairs} pairs: {statistics.median(ratios):.3f} times")


def measure(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
