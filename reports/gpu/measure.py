"""The same runs on the CPU in fp32, on a GPU in fp32 and on a GPU in bf16: rows per second, peak memory, agreement.

Agreement is the largest difference between two accuracy matrices, GPU fp32 against CPU fp32; ``--tolerance`` is what may differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from continual.provenance import commit, hardware, now, versions
from continual.run import run_cell

CELLS = (("split-digits", "rehearsal"), ("docstrings", "lora-rehearsal"), ("docstrings", "adalora-rehearsal"))
WITH_DATA = (("clinc150", "lora-rehearsal"),)
SETTINGS = (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"))


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["matrix"], other["matrix"], strict=True)
    cells = [
        (a, b) for left, right in pairs for a, b in zip(left, right, strict=True) if a is not None and b is not None
    ]
    return max(abs(a - b) for a, b in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help="folder of clinc150; without it that run is left out")
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--tests", action="store_true", help="run the test suite on this machine as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device on this machine: run this where there is one.")
    rows = []
    agree = True
    for stream, strategy in CELLS + (WITH_DATA if arguments.data else ()):
        results = {}
        for device, precision in SETTINGS:
            with tempfile.TemporaryDirectory() as place:
                results[device, precision] = run_cell(
                    stream,
                    strategy,
                    out=Path(place) / "run",
                    data=arguments.data,
                    device=device,
                    overrides={"training.precision": precision},
                    progress=False,
                )
        difference = largest_difference(results["cpu", "fp32"], results["cuda", "fp32"])
        agree &= difference <= arguments.tolerance
        for (device, precision), result in results.items():
            rows.append(
                {
                    "stream": stream,
                    "strategy": strategy,
                    "device": device,
                    "precision": precision,
                    "accuracy": result["metrics"]["accuracy"],
                    "rows_per_second": result["cost"]["rows_per_second"],
                    "peak_memory_bytes": result["cost"]["peak_memory_bytes"],
                    "fp32_difference_to_cpu": difference,
                }
            )
            print(rows[-1], flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q"], check=False).returncode if arguments.tests else None
    report = {
        "runs": rows,
        "tolerance": arguments.tolerance,
        "test_status": tests,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware("cuda"),
        "measured": now(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not agree or tests:
        sys.exit(1)


if __name__ == "__main__":
    main()
