"""What a stream asks for and what a model is trained to do, as the words that stand in the YAML files."""

from __future__ import annotations

from typing import Literal

Objective = Literal["classification", "regression", "causal-lm", "seq2seq"]
Scenario = Literal["task", "domain", "class"]
