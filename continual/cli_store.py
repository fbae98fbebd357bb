"""The commands of ``continual store``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from continual.refresh.records import Outcome

store_app = typer.Typer(
    help="Keep a model that is refreshed again and again: a gate before every version, rollback, lineage, erasure.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Place = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        help="What the store may use: package.module:Class, a folder, whom its rules tell. Repeatable.",
    ),
]
Version = Annotated[int | None, typer.Option("--version", help="A version; default: the live one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@store_app.command("init")
def init_command(
    store: Place,
    model: Annotated[str, typer.Option("--model", help="HF name or folder, mlp, or package.module:Class.")] = "mlp",
    strategy: Annotated[
        str, typer.Option("--strategy", help="A strategy of `continual list`, or a YAML file.")
    ] = "rehearsal",
    gate: Annotated[
        str | None, typer.Option("--gate", help="Such as 'max drop 0.02 at 95%'; further rules go into rules.yaml.")
    ] = None,
    rules: Annotated[Path | None, typer.Option("--rules", help="A rule file, copied into the store.")] = None,
    scenario: Annotated[
        str, typer.Option("--scenario", help="class (new classes may come), domain (they are fixed) or task.")
    ] = "class",
    objective: Annotated[
        str, typer.Option("--objective", help="classification, regression, causal-lm or seq2seq.")
    ] = "classification",
    text: Annotated[str | None, typer.Option("--text", help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column of the label.")] = None,
    features: Annotated[list[str] | None, typer.Option("--feature", help="Numeric column; repeat it for each.")] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", help="Column of row ids, which `erase` speaks of rows by.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root of every random draw.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the strategy, such as training.lr=0.01. Repeatable.")
    ] = None,
) -> None:
    """Make a store; its first version comes with the first update."""
    from continual.errors import SpecError
    from continual.refresh import Store
    from continual.refresh.asked import TEXT_MODEL
    from continual.refresh.rules import gate_phrase
    from continual.spec import overrides_of

    if gate is not None and rules is not None:
        raise SpecError("both --gate and --rules are given: write the gate into the rule file, or leave --rules out.")
    given: Any = rules if gate is None else {"gate": gate_phrase(gate)}
    columns = {"text": text, "label": label, "features": features or None, "id": id_column}
    if model == "mlp" and not features and text is None:
        raise SpecError(
            "an mlp (what --model is where nothing is named) reads numbers, and no --feature names a column of them: name each, or "
            f"{TEXT_MODEL}, with --model."
        )
    made = Store.create(
        store,
        model=model,
        strategy=strategy,
        rules=given,
        scenario=scenario,  # type: ignore[arg-type]
        objective=objective,  # type: ignore[arg-type]
        columns={key: value for key, value in columns.items() if value is not None},
        seed=seed,
        overrides=overrides_of(settings),
    )
    chosen = made.folder.settings
    print(f"{store}: a store of {chosen.model.get('name', chosen.model['kind'])} with '{chosen.strategy_name}'")
    print(f"rules: {store / 'rules.yaml'} · next: continual store update {store} ROWS")


@store_app.command("update")
def update_command(
    store: Place,
    rows: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet file, or a folder of `datasets`.")],
    name: Annotated[str | None, typer.Option("--name", help="Of the experience; default: the file's.")] = None,
    device: Device = "auto",
    again: Annotated[bool, typer.Option("--again", help="Train anew on rows that were refused before.")] = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Give up an update with other rows that broke off.")
    ] = False,
    new_labels: Annotated[
        list[str] | None,
        typer.Option("--new-label", help="A label that is a class of its own although it looks like another."),
    ] = None,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Learn rows that the rules stop for how they differ; it is kept.")
    ] = False,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Learn new rows, measure all earlier ones, and go live if the gate says so.

    Exit status: 0 live, or known already; 1 it could not be done; 3 refused by the gate, or taken back by a rollback; 4 the rows
    cannot tell; 5 stopped by drift.
    """
    from continual.refresh import Store

    outcome = Store(store, trust=trust or ()).update(
        rows,
        name=name,
        device=device,
        again=again,
        abandon=abandon,
        new_labels=new_labels or (),
        accept_drift=accept_drift,
        on_note=lambda note: print(f"note: {note}", file=sys.stderr, flush=True),
    )
    print(outcome.model_dump_json(indent=1) if as_json else shown(outcome))
    status = {"failed": 3, "rolled back": 3, "cannot tell": 4, "stopped": 5}.get(outcome.happened, 0)
    if status:
        raise typer.Exit(status)


@store_app.command("abandon")
def abandon_command(store: Place, trust: Trust = None) -> None:
    """Give up an update that broke off; its own command would go on with it."""
    from continual.refresh import Store

    print(Store(store, trust=trust or ()).abandon())


@store_app.command("status")
def status_command(
    store: Place,
    html: Annotated[Path | None, typer.Option("--html", help="Write the retention page there as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which version is live, what it still knows, and what the last update did."""
    from continual.refresh import Store

    opened = Store(store)
    print(opened.status().model_dump_json(indent=1) if as_json else opened.status())
    if html is not None:
        print(opened.page(html))


@store_app.command("history")
def history_command(store: Place, as_json: AsJson = False) -> None:
    """List everything that happened to the store, the oldest first."""
    from continual.refresh import Store

    for entry in Store(store).history():
        if as_json:
            print(entry.model_dump_json())
        else:
            version = "" if entry.version is None else f" {entry.version}"
            print(f"{entry.time}  {entry.event}{version}  {entry.sentence}".rstrip())


@store_app.command("compare")
def compare_command(
    store: Place,
    one: Annotated[int, typer.Argument(help="A version.")],
    other: Annotated[int | None, typer.Argument(help="Another one; default: the live one.")] = None,
) -> None:
    """Compare two versions, experience by experience, with where each comes from."""
    from continual.refresh import Store

    print(Store(store).compare(one, other))


@store_app.command("verify")
def verify_command(store: Place) -> None:
    """Prove the chain of versions and every byte; exit 1 where something is wrong."""
    from continual.errors import one_line
    from continual.refresh import Store

    opened = Store(store)
    wrong = opened.verify()
    for sentence in wrong:
        print(f"continual: {one_line(sentence)}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)
    print(f"{len(opened.versions())} versions, every byte as it was written")


@store_app.command("predict")
def predict_command(
    store: Place,
    rows: Annotated[Path, typer.Option("--input", "-i", help="JSONL, CSV or Parquet file; labels are not needed.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="JSONL file: each row with label, score and version.")],
    version: Version = None,
    device: Device = "auto",
    experience: Annotated[
        str | None, typer.Option("--experience", help="Whose classes compete; the scenario task needs it.")
    ] = None,
    out_of_scope: Annotated[
        float | None,
        typer.Option(
            "--out-of-scope",
            help="Mark rows less 'familiar' than this, on the scale of the head (choose it on known rows); not all heads say it.",
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Write each row with its label and score, by the live version."""
    from continual.refresh import Store
    from continual.refresh.predicting import predict_file

    opened = Store(store, trust=trust or ())
    count, used = predict_file(
        opened, rows, out, version=version, device=device, experience=experience, out_of_scope=out_of_scope
    )
    print(f"{out}: {count} rows by version {used}")


@store_app.command("promote")
def promote_command(
    store: Place, version: Annotated[int, typer.Argument(help="To make live.")], trust: Trust = None
) -> None:
    """Make a version live that the gate held back, or an earlier one."""
    from continual.refresh import Store

    print(Store(store, trust=trust or ()).promote(version))


@store_app.command("rollback")
def rollback_command(
    store: Place,
    version: Annotated[
        int | None, typer.Argument(help="Default: the one before the live one, in its own line.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Make a version live that was live before; the next update goes on from there."""
    from continual.refresh import Store

    print(Store(store, trust=trust or ()).rollback(version))


@store_app.command("erase")
def erase_command(
    store: Place,
    rows: Annotated[
        Path, typer.Option("--rows", help="Text file with an id a line; or the rows themselves, as for `update`.")
    ],
    trust: Trust = None,
) -> None:
    """Erase rows from every version, and say whose weights were trained on them and how to train anew; exit 1: none is known."""
    from continual.errors import StreamError, quoted
    from continual.refresh import Store

    opened = Store(store, trust=trust or ())
    if rows.suffix == ".txt":
        try:
            ids = [line.strip() for line in rows.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise StreamError(f"'{rows}' cannot be read ({error}): name a text file with an id a line.") from error
        if not ids:
            raise StreamError(f"'{rows}' names no rows: write an id a line.")
        found = opened.erase(ids)
    else:
        found = opened.erase_rows(rows)
    print(found.sentence)
    if found.unknown:
        more = f" and {len(found.unknown) - 5} more" if len(found.unknown) > 5 else ""
        print(
            f"note: no version of this store was ever given {quoted(found.unknown[:5])}{more} "
            f"({len(found.unknown)} of the {found.asked} named); later updates leave such rows out"
        )
    for place, count in sorted(found.places.items()):
        print(f"  {place}: {count}")
    if found.commands:
        print("to train anew without them:")
        for command in found.commands:
            print(f"  {command}")
    if len(found.unknown) == found.asked:
        raise typer.Exit(1)


@store_app.command("export")
def export_command(
    store: Place,
    to: Annotated[Path, typer.Option("--to", help="A new folder, which stock transformers and peft load.")],
    version: Version = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, help="Refuse an adapter of a higher rank, such as a server's limit."),
    ] = None,
    trust: Trust = None,
) -> None:
    """Write a version as a plain Hugging Face folder with a model card."""
    from continual.refresh import Store

    print(Store(store, trust=trust or ()).export(to, version=version, max_rank=max_rank))


def shown(outcome: Outcome) -> str:
    """An outcome as the command line prints it."""
    live = "no version is live" if outcome.live is None else f"version {outcome.live} is live"
    score = "" if outcome.score is None else f" · mean score {outcome.score:.3f}"
    version = "" if outcome.version is None else f"version {outcome.version} "
    lines = [f"{outcome.experience}: {version}{outcome.happened}{score} · {live}", outcome.sentence]
    lines += [f"drift: {found.sentence}" for found in outcome.found]
    lines += [f"note: {note}" for note in outcome.notes]
    return "\n".join(lines)
