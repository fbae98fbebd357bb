"""One run: a strategy over a stream into a folder, cut off anywhere and gone on with.

The folder holds ``run.json`` (what was asked for), ``checkpoint/`` (the learner's state), and when it is done
``result.json``, ``scores.safetensors`` (the score of every test row after every update) and ``adapter/`` where the
strategy trains one. Of several processes the main one alone reads and writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from continual.disk import alone, check_seal, read_object, recover_folder, sweep, write_text
from continual.errors import ContinualError, StateError, shown
from continual.kinds import Scenario
from continual.learner import Learner, Update
from continual.learner.checkpoint import check_same
from continual.learner.core import resolve_device, slow_precision
from continual.learner.processes import Processes
from continual.models.build import base_on_disk, gives_features
from continual.models.spec import parse_model_spec
from continual.strategy import Strategy, written
from continual.streams.spec import read_stream_spec
from continual.streams.stream import Stream
from continual.suitability import unsuited

SAVE_EVERY = 500


def run_cell(
    stream: str | Path | Mapping[str, Any],
    strategy: str | Path | Mapping[str, Any] | Strategy,
    *,
    seed: int = 0,
    out: Path,
    data: Path | None = None,
    model: str | Mapping[str, Any] | nn.Module | None = None,
    scenario: Scenario | None = None,
    device: str = "auto",
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    strategy_name: str | None = None,
    save_every: int = SAVE_EVERY,
    track: str | None = None,
    progress: bool | None = None,
    on_update: Callable[[Update], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a strategy over a stream and write ``out/result.json``; returns its content.

    Args:
        model: None takes the stream's own.
        resume: go on from the checkpoint in ``out``; a finished run is returned as it is.
        overrides: dotted key of the strategy → value; they become part of its name.
        strategy_name: what reports call it instead.
        on_update: called with each :class:`~continual.learner.update.Update`, in the main process.
        on_note: called before the training with what should be known of it, in the main process; it is among the result's
            notes as well.

    Raises:
        CompositionError: parts that cannot work on this objective or model; no data has been read.
        StateError: ``out`` holds another run, or nothing to resume, or is in use.
    """
    out = Path(out)
    chosen = Strategy.load(strategy, overrides=overrides)
    plain = chosen.name
    chosen.name = strategy_name or _with_overrides(plain, overrides or {})
    processes = Processes(resolve_device(device))
    spec, _ = read_stream_spec(stream)
    base = model if model is not None else (spec.model or "mlp")
    chosen.check(objective=spec.objective, gives_features=gives_features(base, spec.objective))
    loaded = Stream.load(stream, data=data, seed=seed, scenario=scenario)
    request = {
        "stream": loaded.name,
        "stream_fingerprint": loaded.fingerprint(),
        "strategy": chosen.name,
        "strategy_fingerprint": chosen.fingerprint(),
        "seed": seed,
        "model": base if isinstance(base, str | Mapping) else type(base).__qualname__,
    }
    with ExitStack() as held:

        def begin() -> dict[str, Any] | None:
            if resume and not (out / "run.json").is_file():
                raise StateError(f"there is no run to resume in '{out}': leave --resume out to begin one.")
            held.enter_context(alone(out, "run"))
            found = _look(out, request, resume, base, plain)
            if found is None and resume and chosen.engine is not None:
                raise StateError(
                    f"the run in '{out}' broke off, and {chosen.engine.name} cannot be gone on with in the middle of a stream: "
                    "delete the folder and run it again, or name another out folder."
                )
            if found is None:
                sweep(out)
                recover_folder(out / "checkpoint")
            return found

        finished = processes.from_main(begin)
        if finished is not None:
            return finished
        learner = _learner(
            out, base, chosen, seed, resume, device=device, save_every=save_every, track=track, progress=progress
        )
        processes.from_main(lambda: write_text(out / "run.json", json.dumps(request, indent=1)))
        if resume and on_note is not None and processes.is_main:
            on_note(learner.whereabouts())
        slow = slow_precision(learner.strategy.training, learner.device)
        if slow is not None and on_note is not None and processes.is_main:
            on_note(slow)
        note = unsuited(chosen, loaded.scenario, loaded.objective, None if loaded.open else len(loaded))
        if note is not None:
            learner.notes += [] if note in learner.notes else [note]
            if on_note is not None and processes.is_main:
                on_note(note)
        try:
            run = learner.run(loaded, on_update=on_update if processes.is_main else None)
        except ContinualError:
            if processes.is_main and not (out / "checkpoint").exists():
                (out / "run.json").unlink(missing_ok=True)
            raise
        finally:
            learner.close()
        run.result["provenance"]["stream_per_seed"] = spec.split.random
        _write(out, learner, run.result)
    return run.result


def _with_overrides(name: str, overrides: Mapping[str, Any]) -> str:
    """``rehearsal[training.epochs=3]``: what reports call a strategy of which settings were changed."""
    pairs = written(overrides)
    return f"{name}[{','.join(pairs)}]" if pairs else name


def _look(out: Path, request: dict[str, Any], resume: bool, base: Any, plain: str) -> dict[str, Any] | None:
    """The result of a finished run; None when there is something to do.

    Args:
        plain: the strategy's name without what was set in it, which runs of older versions have.
    """
    asked = out / "run.json"
    if not asked.is_file():
        if (out / "result.json").exists():
            raise StateError(f"'{out}' holds a result of something else: name another out folder.")
        return None
    known = read_object(asked, "name another out folder.")
    for key, value in request.items():
        if known.get(key) != json.loads(json.dumps(value)) and (key, known.get(key)) != ("strategy", plain):
            found = f"{key}: {shown(known.get(key))} there, {shown(value)} asked for"
            if key.endswith("_fingerprint"):
                what = key.removesuffix("_fingerprint")
                found = (
                    f"of the same {what} '{request[what]}', but its settings{' or rows' * (what == 'stream')} differ"
                )
            raise StateError(f"'{out}' holds another run ({found}): name another out folder.")
    if not resume:
        raise StateError(f"'{out}' holds this run already: add --resume to go on with it, or name another out folder.")
    if (out / "result.json").is_file():
        result = read_object(out / "result.json", "delete it and resume the run.")
        _check_base(out, result, base)
        return result
    return None


def _check_base(out: Path, result: dict[str, Any], base: Any) -> None:
    """Refuse a finished run that was made on other weights than those that lie under the model's name now."""
    origin, now = result.get("provenance"), base_on_disk(base)
    there = origin.get("base_model_sha256") if isinstance(origin, dict) else None
    if there is not None and now not in (None, there):
        raise StateError(
            f"'{out}' holds a run on another base model (SHA-256 {shown(there, 20)} there, {shown(now, 20)} now): name another out "
            "folder."
        )


def _learner(out: Path, base: Any, strategy: Strategy, seed: int, resume: bool, **options: Any) -> Learner:
    checkpoint = out / "checkpoint"
    if resume and checkpoint.exists():
        try:
            learner = Learner.load(checkpoint, model=base, strategy=strategy, folder=checkpoint, **options)
        except StateError:
            _check_whole(checkpoint)
            raise
        check_same("seed", learner.seed, seed)
        _check_model(out, learner.model.spec, base)
        return learner
    return Learner(base, strategy, seed=seed, folder=checkpoint, **options)


def _check_whole(checkpoint: Path) -> None:
    """Raise :class:`StateError` when a file of the checkpoint is damaged; there is no earlier one to fall back on."""
    try:
        check_seal(checkpoint)
    except StateError as error:
        cause = str(error).rpartition(": ")[0]
        raise StateError(f"{cause}: delete '{checkpoint}' and resume, which begins the run again.") from error


def _check_model(out: Path, saved: Mapping[str, Any], base: Any) -> None:
    """Raise :class:`StateError` when a checkpoint is of another model than the one asked for."""
    if isinstance(base, nn.Module):
        return
    asked = parse_model_spec(base).model_dump(mode="json", by_alias=True, exclude_unset=True)
    there = json.loads(json.dumps({key: saved.get(key) for key in asked}))
    if there != asked:
        raise StateError(
            f"the checkpoint in '{out}' is of another model ({shown(there)} there, {shown(asked)} asked for): resume it "
            "with the model it was made with, or name another out folder."
        )


def _write(out: Path, learner: Learner, result: dict[str, Any]) -> None:
    scores = learner.monitor.tensors() if learner.monitor is not None else {}
    if scores:
        learner.processes.from_main(lambda: _write_scores(out, scores))
    if any(part.slot == "adapter" for part in learner.parts):
        learner.export(out / "adapter")
    text = json.dumps(result, indent=1, allow_nan=False)
    learner.processes.from_main(lambda: write_text(out / "result.json", text))


def _write_scores(out: Path, scores: dict[str, Tensor]) -> None:
    temporary = out / ".scores.tmp"
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in scores.items()}, temporary)
        temporary.replace(out / "scores.safetensors")
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StateError(
            f"the scores could not be written to '{out}' ({error}): free some space and resume the run."
        ) from error
