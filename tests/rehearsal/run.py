"""The rehearsal's process: python -m tests.rehearsal.run LIBRARY OUT. Writes what each case did to OUT, as JSON.

LIBRARY is device.cpp, compiled.
"""

import ctypes
import gc
import json
import sys
import time


def main(library: str, out: str) -> None:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before torch, which asks for its hooks once
    from tests.rehearsal.cases import CASES, run_case

    gc.disable()  # a tenth of the time; the tensors hold no memory
    results = {}
    for name in CASES:
        start = time.process_time()
        results[name] = run_case(name)
        results[name]["seconds"] = round(time.process_time() - start, 2)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
