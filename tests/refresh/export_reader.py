"""Somebody who does not have this package: takes the code out of each README and runs it as it stands.

    python export_reader.py JOBS.json OUT.safetensors

A job names a folder and what to call in the code with which arguments; what comes back is kept under the job's name.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any


class Refusing:
    """Stands for a machine on which the package is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "continual":
            raise ImportError("this machine has no continual")


def run(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    os.chdir(job["folder"])
    with open("README.md", encoding="utf-8") as file:
        blocks = re.findall(r"^```python\n(.*?)^```$", file.read(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    scope: dict[str, Any] = {}
    if job.get("make"):
        exec(job["make"], scope)
    exec(compile(blocks[0], f"{job['folder']}/README.md", "exec"), scope)
    found: dict[str, Any] = {}
    for number, (call, arguments, options) in enumerate(job["calls"]):
        given = [torch.tensor(one["tensor"]) if isinstance(one, dict) else one for one in arguments]
        answer = scope[call](*given, **options)
        answer = answer if isinstance(answer, dict) else {"answer": answer}
        found |= {f"{number}.{key}": value for key, value in answer.items()}
    return found


def main() -> None:
    sys.meta_path.insert(0, Refusing())  # type: ignore[arg-type]
    try:
        import continual  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("continual can be imported")
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    from safetensors.torch import save_file

    tensors, texts = {}, {}
    for name, job in jobs.items():
        for key, value in run(job).items():
            if hasattr(value, "shape"):
                tensors[f"{name}/{key}"] = value.contiguous()
            else:
                texts[f"{name}/{key}"] = value
    save_file(tensors, sys.argv[2], metadata={"texts": json.dumps(texts)})
    assert "continual" not in sys.modules


if __name__ == "__main__":
    main()
