"""Avalanche's strategies under our learner and monitor; what every strategy must do is in the battery."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import avalanche.training.supervised as supervised
import pytest
import torch
from avalanche_bench import digits, equal, network, values
from torch import Tensor, nn

from continual import Learner, Strategy, Stream, Training
from continual.checking import check_file
from continual.engine import ENGINES, Engine
from continual.errors import CompositionError, SpecError, StateError, StreamError, TrainingError
from continual.foreign import quiet
from continual.interop.avalanche import benchmark_from
from continual.interop.avalanche.module import MASKED, Competing, Logits, TaskLogits
from continual.interop.avalanche.watch import bytes_kept
from continual.library import library_names
from continual.models.build import build_model
from continual.randomness import Randomness
from continual.run import run_cell
from continual.study import Study, run_study

MLP = {"kind": "mlp", "hidden": [8]}
TRAINING: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 16}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Naive": {},
    "Replay": {"mem_size": 30},
    "EWC": {"ewc_lambda": 20.0},
    "SynapticIntelligence": {"si_lambda": 5.0},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "AGEM": {"patterns_per_exp": 10, "sample_size": 10},
    "GDumb": {"mem_size": 40},
    "DER": {"mem_size": 30, "batch_size_mem": 8, "alpha": 0.5, "beta": 0.5},
    "ER_ACE": {"mem_size": 30, "batch_size_mem": 8},
    "MIR": {"mem_size": 30, "subsample": 20, "batch_size_mem": 8},
}
"""Strategies that take a model as it is, and need no solver."""


def strategy(name: str, arguments: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    given = ARGUMENTS.get(name, {}) if arguments is None else arguments
    engine = {"kind": "avalanche", "strategy": name, "arguments": given}
    return {"engine": engine, "training": {**TRAINING, **training}}


def learner(what: Any, model: Any = MLP, **options: Any) -> Learner:
    return Learner(model, what, **{"seed": 3, "device": "cpu", "progress": False, **options})


def weights(what: Any, stream: Stream | None = None, model: Any = MLP) -> list[Tensor]:
    one = learner(what, model)
    one.run(digits(experiences=2) if stream is None else stream)
    return values(one.model)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_weights_are_those_of_a_script_of_avalanche(name: str) -> None:
    stream, module = digits(), network()
    run = learner(strategy(name, active="all", lr=0.05, epochs=2), module).run(stream)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    with Randomness(3).framework(), quiet("avalanche"):
        theirs = getattr(supervised, name)(
            model=plain,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=16,
            train_epochs=2,
            evaluator=None,
            **ARGUMENTS[name],
        )
        accuracies = []
        benchmark = benchmark_from(stream)
        for experience in benchmark.train_stream:
            theirs.train(experience, eval_streams=[])
            seen = sorted(experience.classes_seen_so_far)
            theirs.model.eval()
            row = []
            for test in list(benchmark.test_stream)[: experience.current_experience + 1]:
                inputs = torch.stack([item[0] for item in test.dataset])
                labels = torch.tensor([item[1] for item in test.dataset])
                found = torch.tensor(seen)[theirs.model(inputs)[:, seen].argmax(1)]
                row.append(float((found == labels).float().mean()))
            accuracies.append(row)
    assert equal(values(module), values(theirs.model))
    for ours, expected in zip(run.result["matrix"], accuracies, strict=True):
        assert ours[: len(expected)] == pytest.approx(expected)


def test_a_class_that_is_not_met_yet_has_no_part_in_the_training() -> None:
    stream = digits(experiences=1)
    masked = learner(strategy("Naive"), network())
    masked.run(stream)
    small, everything = network(), network()
    with torch.no_grad():
        first = nn.Linear(16, 2)
        first.weight.copy_(small[2].weight[:2])  # type: ignore[arg-type]
        first.bias.copy_(small[2].bias[:2])  # type: ignore[arg-type]
    small[2] = first
    learner(strategy("Naive", active="all"), small).run(stream)
    learner(strategy("Naive", active="all"), everything).run(stream)
    got = dict(masked.model.named_parameters())
    prefix = next(name for name in got if name.endswith("2.weight")).removesuffix("2.weight")
    torch.testing.assert_close(got[f"{prefix}2.weight"][:2], small[2].weight)
    torch.testing.assert_close(got[f"{prefix}0.weight"], small[0].weight)
    assert torch.equal(got[f"{prefix}2.weight"][2:], network()[2].weight[2:])  # type: ignore[index]
    assert not torch.allclose(got[f"{prefix}0.weight"], everything[0].weight, atol=1e-4)  # type: ignore[arg-type]


def test_masks_by_task_against_the_slow_way() -> None:
    model = build_model(network(), objective="classification")
    competing = Competing("experience")
    competing.owner_K = torch.tensor([0, 0, 1, 1, 2, -1, -1, -1, -1, -1])
    heads = TaskLogits(model, competing)
    inputs, tasks = torch.randn(4, 64), torch.tensor([1, 0, 2, 1])
    plain = model({"inputs": inputs}).logits
    expected = plain.clone()
    for row, task in enumerate(tasks.tolist()):
        for label in range(10):
            if competing.owner_K[label] != task:
                expected[row, label] = MASKED
    assert torch.equal(heads(inputs, tasks), expected)
    heads.known_train_tasks_labels = {0, 1}
    every = heads(inputs, None)
    assert every.keys() == {0, 1} and torch.equal(every[1][0], expected[0])
    competing.masks = False
    assert torch.equal(heads(inputs, tasks), plain)
    seen = Competing("seen")
    seen.owner_K = competing.owner_K
    assert torch.equal(Logits(model, seen)(inputs), plain.masked_fill(seen.owner_K < 0, MASKED))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "adam"),
        ("optimizer", "adamw"),
        ("lr", 0.02),
        ("momentum", 0.9),
        ("weight_decay", 0.1),
        ("epochs", 2),
        ("batch_size", 8),
        ("clip", 0.01),
        ("active", "all"),
    ],
)
def test_every_training_key_that_is_translated_changes_the_weights(key: str, value: Any) -> None:
    assert not equal(weights(strategy("Naive")), weights(strategy("Naive", **{key: value})))


def test_which_classes_compete_within_a_task() -> None:
    stream = digits("task", 2)
    own, seen, everything = (weights(strategy("Naive", active=which), stream) for which in (None, "seen", "all"))
    assert equal(own, weights(strategy("Naive", active="experience"), stream))
    assert not equal(own, seen) and not equal(seen, everything)


def test_a_fresh_optimizer_forgets_its_momentum() -> None:
    kept = strategy("Naive", momentum=0.9)
    fresh = strategy("Naive", momentum=0.9, fresh_optimizer=True)
    first = digits(experiences=1)
    assert equal(weights(kept, first), weights(fresh, first))
    assert not equal(weights(kept), weights(fresh))


def test_iterations_are_optimiser_steps_and_clip_bounds_the_gradient() -> None:
    what = strategy("Naive", iterations=5, epochs=None)
    run = learner(what).run(digits(experiences=2))
    assert [update.steps for update in run.updates] == [5, 5]
    assert [update.rows for update in run.updates] == [80, 80]
    long = learner(strategy("Naive", iterations=40, epochs=None)).run(digits(experiences=1))
    assert long.updates[0].steps == 40
    before = network()
    module = network()
    learner(strategy("Naive", iterations=1, epochs=None, clip=0.01, lr=1.0, active="all"), module).run(
        digits(experiences=1)
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(values(module), values(before), strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        ({"head_lr": 0.1}, "has no training.head_lr"),
        ({"accumulate": 2}, "has no training.accumulate"),
        ({"loss": "binary"}, "has no training.loss"),
        ({"schedule": "cosine"}, "has no training.schedule"),
        ({"warmup": 0.1}, "has no training.warmup"),
        ({"precision": "bf16"}, "has no training.precision"),
        ({"early_stopping": {}}, "has no training.early_stopping"),
        ({"active": "asymmetric"}, "has no training.active: asymmetric"),
    ],
)
def test_a_training_key_that_would_be_ignored_is_refused(training: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        Strategy.load(strategy("Naive", **training))


def test_every_training_key_is_translated_or_refused() -> None:
    translated = {"optimizer", "lr", "momentum", "weight_decay", "epochs", "iterations", "batch_size", "clip", "active"}
    refused = {"head_lr", "accumulate", "schedule", "warmup", "precision", "early_stopping", "loss"}
    assert translated | refused | {"fresh_optimizer"} == set(Training.model_fields)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"engine": {"kind": "avalanch", "strategy": "Naive"}},
            SpecError,
            "unknown engine kind 'avalanch'.*Did you mean",
        ),
        ({"engine": {"strategy": "Naive"}}, SpecError, "'engine' names no kind: allowed are 'avalanche'"),
        ({"engine": {"kind": "avalanche"}}, SpecError, "the key 'strategy' is missing"),
        ({"engine": {"kind": "torch:Tensor", "strategy": "Naive"}}, SpecError, "'torch:Tensor' is not an engine"),
        ({"penalty": {"kind": "ewc"}}, CompositionError, "takes no parts of ours: leave 'penalty' out"),
        ({"data": "cumulative"}, CompositionError, "trains on each experience as it comes"),
    ],
)
def test_what_cannot_be_composed_is_said_at_once(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        Strategy.load({**strategy("Naive"), **changes})


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("Naiv", {}, "unknown strategy 'Naiv': .*Did you mean 'Naive'"),
        ("EWC", {}, "EWC: the argument 'ewc_lambda' is missing"),
        (
            "EWC",
            {"ewc_lambda": 1.0, "lamda": 2},
            "EWC: unknown argument 'lamda': allowed are 'decay_factor', 'ewc_lambda'",
        ),
        ("EWC", {"ewc_lambda": 1.0, "train_mb_size": 2}, "'train_mb_size' is given by training.batch_size"),
        ("GEM", {"patterns_per_exp": 5}, None),
        ("avalanche_bench:Items", {}, "is no strategy: derive it from avalanche"),
    ],
)
def test_arguments_are_checked_before_any_row_is_read(
    name: str, arguments: dict[str, Any], sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sentence is None:
        monkeypatch.setattr("continual.interop.avalanche.strategies.find_spec", lambda package: None)
        sentence = "GEM solves its quadratic programs with quadprog, .* pip install 'continual-memory"
    chosen = Strategy.load(strategy(name, arguments))
    with pytest.raises(SpecError, match=sentence):
        chosen.check(objective="classification", gives_features=True)


def test_what_avalanche_itself_refuses_becomes_a_sentence() -> None:
    with pytest.raises(SpecError, match=r"EWC: Avalanche refuses these arguments \(You need to set `online`"):
        learner(strategy("EWC", {"ewc_lambda": 1.0, "decay_factor": 0.5})).run(digits())
    with pytest.raises(
        TrainingError, match=r"Avalanche's LwF failed on experience '.*' \(TypeError: .*take a strategy of ours"
    ):
        learner(strategy("LwF", {"alpha": "much", "temperature": 2.0})).run(digits())


def test_objectives_models_rows_and_streams_that_it_cannot_take() -> None:
    chosen = Strategy.load(strategy("Naive"))
    with pytest.raises(CompositionError, match="trains classifiers, and the objective is regression"):
        chosen.check(objective="regression", gives_features=True)
    with pytest.raises(CompositionError, match="needs to know all classes of the stream"):
        chosen.check(objective="classification", gives_features=True, open_stream=True)
    with pytest.raises(CompositionError, match="ICaRL works on features, and this model gives logits itself"):
        learner(strategy("ICaRL", {"memory_size": 10}), network()).run(digits())
    with pytest.raises(SpecError, match="engine/avalanche needs to know how many classes the stream will have"):
        learner(strategy("Naive")).update((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
    words = [{"input_ids": [[1, 2, part], [3, part], [4, part], [5, part]], "labels": [0, 1, 0, 1]} for part in (6, 7)]
    tokens = Stream.from_tables(*words, split={"by": "joint"}, scenario="domain")
    with pytest.raises(StreamError, match="Avalanche takes rows of dense 'inputs', and these have input_ids"):
        learner(strategy("Naive"), Words()).run(tokens)
    with pytest.raises(
        CompositionError, match=r"active: experience needs task labels.*take 'seen' or 'all' in 'class'"
    ):
        learner(strategy("Naive", active="experience")).run(digits())


class Words(nn.Module):
    """Gives logits of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.layer(input_ids).mean(1)
        return logits


@pytest.mark.parametrize(
    ("name", "scenario", "why"),
    [("avalanche-der", "task", "without task labels"), ("avalanche-icarl", "domain", "classes that come again")],
)
def test_a_scenario_in_which_a_strategy_cannot_work_is_refused(name: str, scenario: Any, why: str) -> None:
    with pytest.raises(CompositionError, match=f"cannot be trained in the scenario '{scenario}': .*{why}"):
        learner(name).run(digits(scenario))


def test_a_strategy_that_does_little_in_a_scenario_says_so() -> None:
    run = learner(strategy("MIR")).run(digits("domain", 2))
    assert any(
        "engine/avalanche: it replays no class that was in the last batch" in note for note in run.result["notes"]
    )
    assert learner(strategy("MIR")).run(digits("class", 2)).result["notes"] == []


@pytest.mark.parametrize("name", ["ICaRL", "StreamingLDA"])
def test_strategies_with_logits_of_their_own_read_no_active(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} makes logits of its own"):
        Strategy.load(strategy(name, active="all"))


def test_streaming_lda_takes_whole_epochs_and_answers_with_its_own_means() -> None:
    with pytest.raises(SpecError, match="takes whole epochs"):
        Strategy.load(strategy("StreamingLDA", {}, iterations=3, epochs=None))
    one = learner({"use": "avalanche-slda"})
    one.run(digits(experiences=2))
    test = digits(experiences=2)[1].test
    assert test is not None
    batch = test[torch.arange(10)]
    theirs = one._engine._strategy  # type: ignore[union-attr]
    features = one.model.backbone(batch)
    torch.testing.assert_close(one.answer(batch).logits, theirs.predict(features))
    assert not torch.allclose(one.answer(batch).logits[:, :4], one.model(batch).logits[:, :4])


def test_icarl_answers_with_the_nearest_mean_of_its_exemplars() -> None:
    one = learner({"use": "avalanche-icarl", "training": TRAINING})
    one.run(digits(experiences=2))
    theirs = one._engine._strategy  # type: ignore[union-attr]
    test = digits(experiences=2)[1].test
    assert test is not None
    batch = test[torch.arange(10)]
    features = nn.functional.normalize(one.model.backbone(batch))
    expected = -torch.cdist(features, theirs.model.eval_classifier.class_means)
    torch.testing.assert_close(one.answer(batch).logits, expected, rtol=1e-4, atol=1e-5)
    found = one.predict(batch["inputs"])["labels"]
    assert torch.equal(found, expected[:, :4].argmax(1))


class Mine(supervised.Naive):  # type: ignore[misc]
    """A strategy of a user's."""

    def __init__(self, *, factor: float, **given: Any) -> None:
        super().__init__(**given)
        self.factor = factor

    def criterion(self) -> Any:
        return self.factor * super().criterion()


def test_plugins_beside_the_strategy_and_a_strategy_of_ones_own() -> None:
    plain = weights(strategy("Naive"))
    with_plugin = strategy("Naive")
    with_plugin["engine"]["plugins"] = [{"plugin": "LwFPlugin", "arguments": {"alpha": 2.0}}]
    assert equal(weights(with_plugin), weights(strategy("LwF", {"alpha": 2.0, "temperature": 2})))
    assert not equal(weights(with_plugin), plain)
    for plugin, sentence in (
        ({"plugin": "LwFPlugn"}, "unknown plugin 'LwFPlugn': .*Did you mean 'LwFPlugin'"),
        ({"plugin": "EWCPlugin"}, "EWCPlugin: the argument 'ewc_lambda' is missing"),
        ({"plugin": "LwFPlugin", "arguments": {"model": 1}}, "unknown argument 'model'"),
    ):
        with_plugin["engine"]["plugins"] = [plugin]
        with pytest.raises(SpecError, match=sentence):
            Strategy.load(with_plugin).check(objective="classification", gives_features=True)


def test_a_strategy_of_a_users_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    with pytest.raises(SpecError, match="Mine: the argument 'factor' is missing"):
        Strategy.load(strategy("mine:Mine", {})).check(objective="classification", gives_features=True)
    assert equal(weights(strategy("mine:Mine", {"factor": 1.0})), weights(strategy("Naive")))
    assert equal(weights(strategy("mine:Mine", {"factor": 0.0}), model=network()), values(network()))


def test_a_loss_that_is_not_finite_ends_the_update_with_a_sentence() -> None:
    one = learner(strategy("Naive", lr=1e30))
    with pytest.raises(TrainingError, match=r"not finite at step [0-9]+: lower training\.lr"):
        one.run(digits())


def test_bytes_are_counted_once_and_through_everything() -> None:
    base = torch.zeros(1000)
    held = {"a": [base[:10], base], "b": (lambda kept: (yield kept))(torch.zeros(7, dtype=torch.float64))}
    next(held["b"])  # type: ignore[call-overload]
    assert bytes_kept(held, set()) == 4000 + 56
    assert bytes_kept(held, {base.untyped_storage().data_ptr()}) == 56
    one = learner(strategy("Replay", {"mem_size": 5}))
    run = one.run(digits())
    rows = sum(len(experience.train) for experience in digits())
    inputs = rows * 64 * 4
    assert inputs <= run.result["cost"]["state_bytes"]["engine/avalanche"] <= inputs * 1.5
    assert learner(strategy("Naive")).run(digits()).result["cost"]["state_bytes"]["engine/avalanche"] < 1000
    adam = learner(strategy("Naive", optimizer="adam")).run(digits()).result["cost"]
    parameters = adam["trainable_parameters"]
    assert 2 * 4 * parameters <= adam["state_bytes"]["optimizer"] <= 2 * 4 * parameters + 1000


def test_the_monitor_asks_the_strategy_and_leaves_its_training_alone() -> None:
    one = learner(strategy("Replay"))
    one.run(digits())
    again = learner(strategy("Replay"), monitor=False)
    again.run(digits())
    assert equal(values(one.model), values(again.model))
    test = digits()[0].test
    assert test is not None
    batch = test[torch.arange(6)]
    state = torch.get_rng_state()
    first, second = one.answer(batch).logits, one.answer(batch).logits
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(first, one.model(batch).logits)


def test_it_cannot_be_saved_and_update_by_update_is_the_same_as_a_run(tmp_path: Path) -> None:
    one, other = learner(strategy("Replay"), folder=tmp_path / "checkpoint"), learner(strategy("Replay"))
    for experience in digits():
        one.update(experience)
    other.run(digits())
    assert equal(values(one.model), values(other.model))
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(StateError, match="what engine/avalanche remembers cannot be saved"):
        one.save(tmp_path / "state")


# In a folder


def test_a_cell_writes_what_every_cell_writes(tmp_path: Path) -> None:
    out = tmp_path / "cell"
    overrides = {"training.epochs": 1}
    run_cell("split-digits", "avalanche-replay", out=out, device="cpu", overrides=overrides, progress=False)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert len(result["matrix"]) == 5 and result["intervals"]["accuracy"]
    assert result["strategy"] == "avalanche-replay[training.epochs=1]"
    cost, origin = result["cost"], result["provenance"]
    assert cost["train_seconds"] > 0 and cost["rows_trained"] > 0 and cost["state_bytes"]["engine/avalanche"] > 0
    assert (
        origin["versions"]["avalanche-lib"].startswith("0.6") and origin["settings"]["engine"]["strategy"] == "Replay"
    )
    assert (out / "scores.safetensors").is_file() and not (out / "checkpoint").exists()
    plain = run_cell("split-digits", "naive", out=tmp_path / "plain", device="cpu", overrides=overrides, progress=False)
    assert set(plain) == set(result) and set(plain["cost"]) == set(cost)
    assert "avalanche-lib" not in plain["provenance"]["versions"]
    again = run_cell("split-digits", "avalanche-replay", out=out, device="cpu", overrides=overrides, resume=True)
    assert again == result


def test_a_cell_that_broke_off_is_not_gone_on_with_and_one_of_a_study_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "cell", Learner._measure
    options: dict[str, Any] = {"out": out, "device": "cpu", "overrides": {"training.epochs": 1}, "progress": False}

    def stops(self: Learner, *given: Any) -> None:
        if self.updates == 2:
            raise KeyboardInterrupt
        kept(self, *given)

    monkeypatch.setattr(Learner, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run_cell("split-digits", "avalanche-naive", **options)
    monkeypatch.setattr(Learner, "_measure", kept)
    with pytest.raises(StateError, match="engine/avalanche cannot be gone on with in the middle of a stream"):
        run_cell("split-digits", "avalanche-naive", resume=True, **options)
    file = tmp_path / "study.yaml"
    file.write_text(
        "streams: [split-digits]\nstrategies: [avalanche-naive]\ntraining: {epochs: 1}\nmodel: {kind: mlp, hidden: [4]}\n"
    )
    study = Study.load(file)
    cell = study.cells()[0]
    assert not cell.resumable and replace(cell).settings == cell.settings
    folder = tmp_path / "runs" / cell.label
    folder.mkdir(parents=True)
    asked = {"stream": cell.stream, "strategy": cell.strategy, "seed": 0, "settings": {**cell.settings, "seed": 0}}
    (folder / "cell.json").write_text(json.dumps(asked), encoding="utf-8")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    outcomes = run_study(study, tmp_path / "runs", device="cpu", progress=False)
    assert [outcome.status for outcome in outcomes] == ["done"], outcomes[0].message
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert len(result["matrix"]) == 5


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.learner.core.Processes", lambda device: SimpleNamespace(count=2, device=device))
    with pytest.raises(CompositionError, match="engine/avalanche trains in one process, and there are 2"):
        learner("avalanche-naive")


def test_check_says_what_the_engine_is() -> None:
    assert "engine/avalanche" in check_file("avalanche-ewc").right[0]


def test_the_strategies_of_the_library_and_the_contract() -> None:
    names = {name.removeprefix("avalanche-") for name in library_names("strategies") if name.startswith("avalanche-")}
    wanted = "naive replay ewc si lwf gem agem gdumb der er-ace mir slda icarl"
    assert names == set(wanted.split()) and list(ENGINES) == ["avalanche"]
    chosen = Strategy.load("avalanche-er-ace")
    assert isinstance(chosen.engine, Engine) and chosen.make_engine() is not chosen.engine
    assert Strategy.load(chosen.to_dict()).fingerprint() == chosen.fingerprint()
    other = Strategy.load("avalanche-er-ace", overrides={"engine.arguments.mem_size": 7})
    assert other.fingerprint() != chosen.fingerprint()
    assert "engine" not in Strategy.load("naive").to_dict()


@pytest.mark.skipif(find_spec("quadprog") is None, reason="quadprog is not installed")
def test_gem_by_quadprog() -> None:
    run = learner(strategy("GEM", {"patterns_per_exp": 20}, epochs=4)).run(digits())
    plain = learner(strategy("Naive", epochs=4)).run(digits())
    assert run.metrics["accuracy"] is not None and plain.metrics["accuracy"] is not None
    assert run.metrics["accuracy"] > plain.metrics["accuracy"] + 0.1 and math.isfinite(run.metrics["accuracy"])
