"""Run every speed script one after the other; each writes its figures beside itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("learner", "monitor", "frozen", "fisher", "ewc_step", "memory")


def main() -> None:
    for name in SCRIPTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--out", str(HERE / f"{name}.json")], check=True)


if __name__ == "__main__":
    main()
