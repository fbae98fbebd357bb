"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from continual.cli_store import store_app
from continual.errors import ContinualError, one_line

app = typer.Typer(
    name="continual",
    help="Keeps a model learning from a stream of tasks and proves, after every update, what it still remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(store_app, name="store")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="The data of the stream, or the folder that holds them; nothing else is looked at. Without it: beside the "
        "YAML file, the working folder, the folder in CONTINUAL_DATA.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]


@app.command("run")
def run_command(
    stream: Annotated[str, typer.Argument(help="A stream of `continual list`, or a YAML file.")],
    strategy: Annotated[str, typer.Argument(help="A strategy of `continual list`, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, result.json and figures.")],
    seed: Annotated[int, typer.Option("--seed", help="Root of every random draw.")] = 0,
    data: Data = None,
    model: Annotated[
        str | None, typer.Option("--model", help="HF name or folder, mlp, or package.module:Class.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option("--scenario", help="task, domain or class; default: the stream's.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option("--precision", help="fp32 or bf16; default: the strategy's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the strategy, such as training.lr=0.01. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the out folder.")] = False,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Optimiser steps between checkpoints.")] = 500,
    track: Annotated[str | None, typer.Option("--track", help="Tracker of accelerate, such as tensorboard.")] = None,
) -> None:
    """Run one strategy over one stream; print what is still known after every update."""
    from continual.learner.core import resolve_device
    from continual.learner.processes import Processes
    from continual.report import write_run_figures
    from continual.run import run_cell
    from continual.spec import overrides_of

    overrides = overrides_of(settings)
    if precision is not None:
        overrides["training.precision"] = precision
    result = run_cell(
        stream,
        strategy,
        seed=seed,
        out=out,
        data=data,
        model=model,
        scenario=scenario,  # type: ignore[arg-type]
        device=device,
        resume=resume,
        overrides=overrides,
        save_every=save_every,
        track=track,
        on_update=lambda update: print(update, end="\n\n", flush=True),
        on_note=lambda note: print(f"note: {note}", end="\n\n", flush=True),
    )
    processes = Processes(resolve_device(device))
    page = processes.from_main(lambda: str(write_run_figures(out)))
    processes.leave()
    if processes.is_main:
        _show(result, out, page)
    if processes.count > 1:  # a thread of torch's may end the process with an abort while Python takes itself apart
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _show(result: dict[str, Any], out: Path, page: str) -> None:
    shown = {name: value for name, value in result["metrics"].items() if value is not None}
    print(f"{result['stream']} · {result['strategy']} · seed {result['seed']}")
    print("  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    print(f"{out / 'result.json'} · {page}")


@app.command("study")
def study_command(
    file: Annotated[Path, typer.Argument(help="The study's YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the runs; default: runs/ and its name.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes at a time.")] = 1,
    data: Data = None,
    device: Device = "auto",
    page: Annotated[Path | None, typer.Option("--report", help="Where the page goes as well.")] = None,
) -> None:
    """Run strategies × streams × seeds; a finished cell is never run twice.

    The file names streams, strategies and seeds, at the top or in groups; a stream or strategy is a name, a file, or
    {use: NAME, name: LABEL, set: {training.epochs: 5}}. A set at the top or in a group holds for all of its strategies.
    """
    from continual.study import Study, run_study

    study = Study.load(file)
    folder = out or Path("runs") / (study.name)
    for note in study.notes(device):
        print(f"note: {note}", flush=True)
    outcomes = run_study(study, folder, workers=workers, data=data, device=device)
    table = folder / "report.md"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
    if page is not None and (folder / "report.html").is_file():
        from continual.disk import write_text

        write_text(page, (folder / "report.html").read_text(encoding="utf-8"))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in (outcome for outcome in outcomes if outcome.message):
        mark = " failed" if outcome in failed else ""
        print(f"continual: {outcome.cell.label}{mark}: {outcome.message}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cells done · {page or folder / 'report.html'}")
    if failed:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders with runs below them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option("--title", help="Its title.")] = "What is still known",
    tables: Annotated[
        bool,
        typer.Option(
            "--tables", help="Also results.csv, significance.csv and a LaTeX table beside the page, named as it is."
        ),
    ] = False,
) -> None:
    """Write one self-contained page about runs, and print their table."""
    from continual.report import load_failures, load_results, markdown_table, write_page, write_tables

    results = load_results(folders)
    write_page(results, out, title, failures=load_failures(folders))
    print(markdown_table(results))
    print(" · ".join(map(str, [out, *(write_tables(results, out.parent, out.stem) if tables else [])])))


@app.command("tune")
def tune_command(
    stream: Annotated[str, typer.Argument(help="A stream of `continual list`, or a YAML file.")],
    strategy: Annotated[str, typer.Argument(help="A strategy of `continual list`, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trials and tuned.yaml.")],
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            help="A setting and its values, such as training.lr=log:1e-5:1e-2 (or uniform:0.1:0.9, int:1:10, "
            "choice:sgd,adam), or a YAML file of them. Repeatable. Default: the strategy's rates and strengths.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials in all, those made before included.")] = 20,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds after which no further trial begins.")
    ] = None,
    experiences: Annotated[int, typer.Option("--experiences", min=1, help="How many, from the first on.")] = 3,
    valid_share: Annotated[
        float,
        typer.Option("--valid-share", min=0.01, max=0.9, help="Of the training rows, where there are no valid ones."),
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Root of every random draw.")] = 0,
    data: Data = None,
    model: Annotated[
        str | None, typer.Option("--model", help="HF name or folder, mlp, or package.module:Class.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option("--scenario", help="task, domain or class; default: the stream's.")
    ] = None,
    device: Device = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting that all trials have, as for `run`. Repeatable.")
    ] = None,
) -> None:
    """Choose a strategy's settings on valid rows of the first experiences, never on test rows; the same command goes on."""
    from continual.spec import overrides_of
    from continual.tune import tune

    def show(trial: Any) -> None:
        score = "failed" if trial.score is None else f"{trial.score:.4f}"
        chosen = "  ".join(f"{key}={value}" for key, value in trial.settings.items())
        more = f" ({trial.message})" if trial.message else ""
        print(f"trial {trial.number} of {trials}: {score}  {chosen}{more}", flush=True)

    found = tune(
        stream,
        strategy,
        out=out,
        search=search or (),
        trials=trials,
        timeout=timeout,
        experiences=experiences,
        share=valid_share,
        seed=seed,
        data=data,
        model=model,
        scenario=scenario,  # type: ignore[arg-type]
        device=device,
        overrides=overrides_of(settings),
        on_trial=show,
    )
    more = "" if found.finished else f" The time was up after {len(found.trials)} trials; the same command goes on."
    print(f"\n{found.statement}{more}")
    own = found.trials[0].score
    print(
        f"Best is trial {found.best.number}: {found.best.score:.4f}; the strategy as it is: "
        f"{'failed' if own is None else f'{own:.4f}'}. The best of {len(found.trials)} reads too high: measure it with "
        f"`continual run {stream} {found.path} -o FOLDER`."
    )
    print(found.path)


@app.command("list")
def list_command(
    parts: Annotated[bool, typer.Option("--parts", help="Also the parts that a strategy can be made of.")] = False,
) -> None:
    """Name the streams and strategies that are there."""
    from rich.console import Console
    from rich.table import Table

    from continual.library import Kind, find_spec, library_names
    from continual.spec import read_yaml

    console = Console(soft_wrap=False)
    kinds: tuple[Kind, ...] = ("streams", "strategies")
    for kind in kinds:
        table = Table("name", "what it is", box=None, pad_edge=False, title=kind, title_justify="left")
        for name in library_names(kind):
            table.add_row(name, str(read_yaml(find_spec(kind, name)).get("summary", "")))
        console.print(table, end="\n\n")
    if parts:
        from continual.parts.registry import PARTS

        table = Table("slot", "kinds", box=None, pad_edge=False, title="parts", title_justify="left")
        for slot, found in PARTS.items():
            if found:
                table.add_row(slot, ", ".join(sorted(found)))
        console.print(table)


@app.command("check")
def check_command(
    file: Annotated[
        str, typer.Argument(help="A stream, strategy or study, or the rules of a store: a YAML file or a name.")
    ],
    data: Data = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead: FILE is stream, strategy, study or rules.")
    ] = False,
) -> None:
    """Say what is wrong with a stream, a strategy, a study or the rules of a store, before anything runs."""
    from continual.checking import check_file, schema_of

    if schema:
        print(schema_of(file))
        return
    findings = check_file(file, data=data, seed=seed)
    for sentence in findings.wrong:
        print(f"continual: {sentence}", file=sys.stderr)
    for sentence in findings.right:
        print(sentence)
    if findings.wrong:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("continual-memory"))
        raise typer.Exit()


def main() -> NoReturn:
    """Console script: the user's mistakes are one sentence on standard error and status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(prog_name="continual")
    except ContinualError as error:
        rank = os.environ.get("RANK", "0")
        print(f"continual{'' if rank == '0' else f' (process {rank})'}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        print("continual: stopped; the same command goes on (a run needs --resume).", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        print(f"continual: {_unforeseen(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _unforeseen(error: Exception) -> str:
    """One sentence for an error that nobody put into words; its traceback goes to a file."""
    import tempfile
    import traceback
    from contextlib import suppress

    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in reason
    ):
        return f"there was not enough memory ({reason[:200]}): lower training.batch_size, or take a smaller model."
    where = "could not be written to a file"
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile("w", prefix="continual-", suffix=".txt", delete=False, encoding="utf-8") as file,
    ):
        where = f"is in '{file.name}'"
        traceback.print_exception(error, file=file)
    if isinstance(error, OSError):
        return f"the system refused something ({reason}): mend that and run it again; the traceback {where}."
    return f"it stopped with an error of its own ({reason}): the traceback {where}, please report it."


if __name__ == "__main__":
    main()
