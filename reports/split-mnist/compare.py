"""Ours beside the published figures of van de Ven & Tolias (arXiv 1904.07734; repository GMvandeVen/continual-learning).

Reads the folder that `continual study reports/split-mnist/study.yaml --out FOLDER` wrote and prints a Markdown table.
The published figures were read off the repository's figure (± .005; "~" marks lines that overlap there).
"""

from __future__ import annotations

import sys
from pathlib import Path

from continual.report import load_results
from continual.report.aggregate import aggregate

PUBLISHED = {
    "split-mnist-task": {
        "naive": ".839",
        "ewc": ".991",
        "si": "~ .99",
        "lwf": "> .99",
        "er": "> .985",
        "dgr": "> .99",
        "joint": "~ .996",
    },
    "split-mnist-domain": {
        "naive": ".597",
        "ewc": ".622",
        "si": ".682",
        "lwf": ".719",
        "er": ".938",
        "dgr": ".958",
        "joint": ".984",
    },
    "split-mnist-class": {
        "naive": "~ .20",
        "ewc": ".204",
        "si": "~ .23",
        "lwf": ".223",
        "er": ".892",
        "dgr": ".907",
        "icarl": ".921",
        "generative-classifier": ".937",
        "joint": ".980",
    },
}


def main() -> None:
    streams = {stream.stream: stream for stream in aggregate(load_results([Path(sys.argv[1])]))}
    print("| scenario | strategy | published | ours, mean [95 % interval over seeds] | seeds | difference |")
    print("|---|---|---|---|---|---|")
    for name, rows in PUBLISHED.items():
        found = {one.strategy: one for one in streams[name].strategies}
        for strategy, published in rows.items():
            if strategy not in found:
                continue
            ours = found[strategy].metrics["accuracy"]
            assert ours is not None
            ends = f" [{ours.low:.3f}, {ours.high:.3f}]" if ours.low is not None else ""
            difference = ours.mean - float(published.strip("~> "))
            scenario = name.removeprefix("split-mnist-")
            print(
                f"| {scenario} | `{strategy}` | {published} | {ours.mean:.3f}{ends} | {ours.count} | {difference:+.3f} |"
            )


if __name__ == "__main__":
    main()
