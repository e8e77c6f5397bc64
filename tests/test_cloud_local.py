"""The pipeline's file is executed here: the same steps, commands, values and connections, with a tiny model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slmops_course.artifacts import Store
from slmops_course.cloud import labelling, steps
from slmops_course.cloud.definition import CloudError, load_pipeline
from slmops_course.cloud.entry import run_batches
from slmops_course.cloud.local import fill_in, run_here, run_pipeline, run_process, search_points, with_inputs
from slmops_course.operations.bundles import bundle_digest, bundle_files
from slmops_course.operations.registry import Registry
from slmops_course.teachers import load_labelled

from cloud_desk import PIPELINE, TINY_INPUTS, change, copy_pipeline, with_must_pass  # isort: skip


class Commands:
    """Carries out commands in this process and remembers them."""

    def __init__(self):
        self.steps = []

    def __call__(self, command, variables):
        self.steps.append(command[3] if command[2].endswith("steps") else "label")
        run_here(command, variables)


@pytest.fixture(scope="module")
def desk(tiny_task_folder, tmp_path_factory):
    return with_must_pass(tiny_task_folder, tmp_path_factory.mktemp("cloud"))


@pytest.fixture(scope="module")
def inputs(desk, tiny_model_folder):
    return {**TINY_INPUTS, "task": desk, "model": str(tiny_model_folder)}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return tmp_path_factory.mktemp("cloud") / "build"


@pytest.fixture(scope="module")
def commands():
    return Commands()


@pytest.fixture(scope="module")
def ran(build, inputs, commands):
    return run_pipeline(load_pipeline(PIPELINE), build, inputs=inputs, execute=commands)


def test_the_whole_file_runs_here_and_registers_the_model(ran, build, commands):
    assert commands.steps == ["shard", "teacher", "label", "gather", "distil", "distil", "optimize", "evaluate", "release"]
    version = ran.registered["model"]
    assert (version.name, version.number, version.report.passed) == ("support_desk", 1, True)
    assert version.report.model_digest == bundle_digest(bundle_files(ran.outputs["optimize"]["onnx"]))
    stages = {step["stage"] for step in version.lineage["steps"].values()}
    assert stages == {f"cloud-{name}" for name in (*commands.steps, "distil-trial") if name != "distil"}
    assert Registry(build / "registry").get("support_desk", 1).files == version.files


def test_the_labels_are_those_of_all_shards(ran, desk):
    assert sorted(path.name for path in ran.outputs["shard"]["shards"].iterdir()) == ["shard-000.jsonl", "shard-001.jsonl"]
    labelled = load_labelled(ran.outputs["gather"]["labels"])
    ids = [one.id for one in labelled.kept] + [one.where for one in labelled.rejected]
    assert sorted(ids) == ["unlabelled-0", "unlabelled-1", "unlabelled-2"]


def test_a_sweep_keeps_the_trial_with_the_best_logged_metric(ran):
    trials = ran.trials["distil"]
    assert [trial["learning_rate"] for trial in trials] == [0.001, 0.0015]
    best = max(trials, key=lambda trial: trial["dev_exact_match"])
    metrics = json.loads((ran.outputs["distil"]["student"] / "metrics.json").read_text("utf-8"))
    assert metrics["dev_exact_match"] == best["dev_exact_match"]
    assert ran.artifacts["distil"].manifest["settings"]["values"]["learning_rate"] == best["learning_rate"]


def test_a_second_run_finds_every_step_done(ran, build, inputs, commands):
    before = len(commands.steps)
    again = run_pipeline(load_pipeline(PIPELINE), build, inputs=inputs, execute=commands)
    assert commands.steps[before:] == []
    assert again.trials == ran.trials
    assert again.registered["model"].number == 1


def test_a_change_in_the_file_is_a_change_in_the_run(ran, build, inputs, commands, tmp_path):
    before = len(commands.steps)
    pipeline = change(copy_pipeline(tmp_path), "values: [0.001, 0.0015]", "values: [0.001, 0.003]")
    change(pipeline.parent / "components" / "optimize.yml", "default: int4-rtn", "default: int8")
    change(pipeline, "      recipe: ${{parent.inputs.recipe}}\n", "")
    told = []

    def until_optimize(command, variables):
        told.append(command)
        if command[3] == "optimize":
            raise CloudError("far enough")
        commands(command, variables)

    with pytest.raises(CloudError, match="far enough"):
        run_pipeline(load_pipeline(pipeline), build, inputs=inputs, execute=until_optimize)
    assert commands.steps[before:] == ["distil"], "one trial is new, and nothing before it"
    assert told[0][told[0].index("--learning-rate") + 1] == "0.003"
    assert told[1][told[1].index("--recipe") + 1] == "int8"


def test_no_machine_path_is_in_what_is_registered(ran, inputs):
    text = json.dumps(ran.registered["model"].lineage)
    assert str(inputs["model"]) not in text
    assert str(inputs["task"]) not in text


# --- What goes wrong ---


def test_a_pipeline_with_a_problem_is_refused_before_anything_runs(tmp_path, inputs):
    pipeline = change(copy_pipeline(tmp_path), "jobs.gather.outputs.labels", "jobs.gathr.outputs.labels")
    commands = Commands()
    with pytest.raises(CloudError, match=r"cannot be run: distil: its input labels is taken from the step gathr"):
        run_pipeline(load_pipeline(pipeline), tmp_path / "build", inputs=inputs, execute=commands)
    assert commands.steps == []
    assert not (tmp_path / "build").exists()


def test_a_value_or_an_input_that_does_not_fit_is_refused(tmp_path):
    for inputs, says in (({"shards": "many"}, "shards is 'many'"), ({"shard": 2}, "has no input 'shard'")):
        with pytest.raises(CloudError, match=says):
            run_pipeline(load_pipeline(PIPELINE), tmp_path / "build", inputs=inputs, execute=Commands())


def test_a_failed_step_ends_the_run_and_leaves_no_artifact(tmp_path, desk, tiny_model_folder):
    (tmp_path / "desk").mkdir()
    for path in desk.iterdir():
        if path.name != "unlabelled.jsonl":
            shutil.copy(path, tmp_path / "desk")
    inputs = {**TINY_INPUTS, "task": tmp_path / "desk", "model": str(tiny_model_folder)}
    with pytest.raises(CloudError, match=r"steps shard failed \(There are 0 unlabelled messages for 2 shards"):
        run_pipeline(load_pipeline(PIPELINE), tmp_path / "build", inputs=inputs, execute=run_process)
    assert [path.name for path in (tmp_path / "build" / "artifacts").glob("cloud-*")] == []


def test_a_metric_that_is_never_logged_is_named(ran, build, inputs, tmp_path):
    pipeline = change(copy_pipeline(tmp_path), "primary_metric: dev_exact_match", "primary_metric: dev_accuracy")
    with pytest.raises(CloudError, match=r"trial 0 logged \['dev_exact_match'\]: expected dev_accuracy"):
        run_pipeline(load_pipeline(pipeline), build, inputs=inputs, execute=Commands())


def test_a_model_that_the_gate_refused_or_did_not_see_is_not_released(ran, tmp_path, capsys):
    onnx, report = ran.outputs["optimize"]["onnx"], tmp_path / "report"
    shutil.copytree(ran.outputs["evaluate"]["report"], report)
    release = ["release", "--onnx", str(onnx), "--report", str(report), "--out", str(tmp_path / "model")]
    assert steps.main(release) == 0
    assert bundle_files(tmp_path / "model") == bundle_files(onnx)
    found = json.loads((report / "gate.json").read_text("utf-8"))
    found["checks"][1]["passed"] = False
    (report / "gate.json").write_text(json.dumps(found), "utf-8")
    release[-1] = str(tmp_path / "refused")
    assert steps.main(release) == 1
    assert "The release gate refused the model (exact match: " in capsys.readouterr().err
    found["model_digest"] = "0" * 64
    (report / "gate.json").write_text(json.dumps(found), "utf-8")
    assert steps.main(release) == 1
    assert "about other files than these" in capsys.readouterr().err
    assert list((tmp_path / "refused").iterdir()) == []


# --- Single steps ---


@pytest.mark.parametrize(("shards", "files"), [(1, [3]), (2, [2, 1]), (9, [1, 1, 1])])
def test_every_message_is_in_one_shard(desk, tmp_path, shards, files):
    steps.run_shard(task=desk, shards=shards, out=tmp_path)
    found = [path.read_text("utf-8").splitlines() for path in sorted(tmp_path.glob("*"))]
    assert [len(lines) for lines in found] == files
    assert sorted(json.loads(line)["id"] for lines in found for line in lines) == [f"unlabelled-{i}" for i in range(3)]
    with pytest.raises(CloudError, match="3 unlabelled messages for 0 shards"):
        steps.run_shard(task=desk, shards=0, out=tmp_path)


def labelled_shards(folder: Path, parts: list[list[str]], rejected: list[str]) -> Path:
    answer = {"intent": "card_lost", "urgency": "low"}
    for number, ids in enumerate(parts):
        (folder / f"shard-{number:03}").mkdir(parents=True)
        rows = [{"id": name, "text": name, "answer": answer} for name in ids]
        (folder / f"shard-{number:03}" / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        bad = [{"where": name, "reason": "no", "content": ""} for name in rejected * (number == 0)]
        (folder / f"shard-{number:03}" / "rejected.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bad), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("parts", "rejected", "says"),
    [
        ([["unlabelled-2"], ["unlabelled-0"]], ["unlabelled-1"], None),
        ([["unlabelled-2", "unlabelled-0"]], [], "labels of 2 messages, 2 of them known: expected each of the task's 3"),
        ([["unlabelled-2", "unlabelled-0"], ["unlabelled-0"]], ["unlabelled-1"], "labels of 4 messages, 3 of them known"),
        ([["unlabelled-2", "unlabelled-0", "x"]], [], "labels of 3 messages, 2 of them known"),
        ([["unlabelled-2"]], ["unlabelled-0", "unlabelled-1"], "labels of 1 of 3 messages can be used: expected at least 60%"),
        ([], [], "labels of 0 messages"),
    ],
)
def test_labels_are_gathered_whole_or_not_at_all(desk, tmp_path, parts, rejected, says):
    out = tmp_path / "out"
    out.mkdir()
    gather = {"task": desk, "labelled": labelled_shards(tmp_path / "in", parts, rejected), "min_kept": 0.6, "out": out}
    if says:
        with pytest.raises(CloudError, match=says):
            steps.run_gather(**gather)
        assert list(out.iterdir()) == []
    else:
        steps.run_gather(**gather)
        assert [example.id for example in load_labelled(out).kept] == ["unlabelled-0", "unlabelled-2"]


def test_a_metric_goes_to_the_run_of_this_process_and_to_none_where_there_is_none(tmp_path):
    from slmops_course.cloud.local import _tracked

    book, run_id = _tracked(tmp_path, "trial")
    steps.log_metric("m", 0.5, environ={"MLFLOW_TRACKING_URI": book.uri, "MLFLOW_RUN_ID": run_id})
    assert book.ask("get_run", run_id).data.metrics == {"m": 0.5}
    steps.log_metric("m", 0.5, environ={})


ENTRY = """
def init():
    import sys
    print(sys.argv[1:])

tries = []

def run(batch):
    from slmops_course.errors import CourseError
    tries.append(batch)
    if len(tries) < {fails_until}:
        raise CourseError("no luck")
    return [name for name in batch if "bad" not in name] {more}
"""


@pytest.mark.parametrize(
    ("names", "fails_until", "more", "failures", "expected"),
    [
        (["a", "b", "c"], 0, "", 0, 3),
        (["a", "b", "c"], 3, "", 0, 3),
        (["a", "b"], 4, "", 0, "left 2 of 2 files without a result (no luck)"),
        (["a", "bad"], 0, "", 0, "left 1 of 2 files without a result (it gave none)"),
        (["a", "bad"], 0, "", 1, 1),
        (["bad"], 0, "", -1, 0),
        (["a"], 0, "+ ['more']", 0, "run gave 2 results for 1 files"),
        ([], 0, "", 0, 0),
    ],
)
def test_an_entry_script_is_called_as_azure_calls_it(tmp_path, capsys, names, fails_until, more, failures, expected):
    script = tmp_path / "entry.py"
    script.write_text(ENTRY.format(fails_until=fails_until, more=more), "utf-8")
    call = {"batch_size": 2, "retries": 2, "failures": failures}
    if isinstance(expected, str):
        with pytest.raises(CloudError) as caught:
            run_batches(script, ["--x", "1"], [Path(name) for name in names], **call)
        assert expected in str(caught.value)
    else:
        assert len(run_batches(script, ["--x", "1"], [Path(name) for name in names], **call)) == expected
    assert "['--x', '1']" in capsys.readouterr().out


def test_a_shard_with_a_row_that_is_no_message_is_refused_not_skipped(desk, tmp_path):
    from slmops_course.tasks import TaskError, load_task

    (tmp_path / "shard-000.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n', "utf-8")
    with pytest.raises(TaskError, match=r"shard-000.jsonl is no shard \(shard-000.jsonl line 2: it has no text"):
        labelling.label_file(tmp_path / "shard-000.jsonl", tmp_path, task=load_task(desk), teacher=None)
    (tmp_path / "shard-001.jsonl").write_text("", "utf-8")
    with pytest.raises(TaskError, match="it holds no message"):
        labelling.label_file(tmp_path / "shard-001.jsonl", tmp_path, task=load_task(desk), teacher=None)


def test_a_toy_of_any_task_goes_through_the_first_steps_and_a_bad_model_is_not_released(tiny_task, tmp_path):
    """The toy's own result is nonsense: the gate must say so. Its quick steps are run here, the slow one is not."""
    from slmops_course.cloud.toy import write_toy
    from slmops_course.tasks import load_task

    toy = write_toy(tiny_task, tmp_path / "toy")
    again = write_toy(tiny_task, tmp_path / "again")
    assert [path.read_bytes() for path in sorted(toy["task"].iterdir())] == [
        path.read_bytes() for path in sorted(again["task"].iterdir())
    ]
    assert {name: len(rows) for name, rows in load_task(toy["task"]).splits.items()} == {
        "train": 12, "dev": 3, "test": 6, "unlabelled": 3
    }  # fmt: skip

    def until_optimize(command, variables):
        if command[3] == "optimize":
            raise CloudError("far enough")
        run_here(command, variables)

    with pytest.raises(CloudError, match="far enough"):
        run_pipeline(load_pipeline(PIPELINE), tmp_path / "build", inputs=toy, execute=until_optimize)
    assert len(list((tmp_path / "build" / "artifacts").glob("cloud-distil-trial-*"))) == 2


def test_commands_are_filled_in_word_by_word():
    values = {"task": Path("my desk"), "n": 3, "text": 'a "b" $(c)'}
    command = "python -m x --task ${{inputs.task}} --n=${{inputs.n}} --text ${{inputs.text}} --out ${{outputs.o}}"
    assert fill_in(command, values, {"o": Path("out")}) == [
        "python", "-m", "x", "--task", "my desk", "--n=3", "--text", 'a "b" $(c)', "--out", "out"
    ]  # fmt: skip


def test_a_grid_takes_all_and_random_draws_the_same_again():
    step = load_pipeline(PIPELINE).steps["distil"]
    grid = {"a": {"type": "choice", "values": [1, 2]}, "b": {"type": "choice", "values": [3, 4]}}
    limits = {"max_total_trials": 3}
    swept = replace(step, raw={"sampling_algorithm": "grid", "limits": limits, "search_space": grid})
    assert search_points(swept) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}]
    space = {
        "a": {"type": "loguniform", "min_value": -7, "max_value": -6},
        "b": {"type": "uniform", "min_value": 0, "max_value": 1},
    }
    drawn = replace(step, raw={"sampling_algorithm": {"type": "random"}, "limits": limits, "search_space": space})
    points = search_points(drawn)
    assert points == search_points(drawn)
    assert points != search_points(drawn, seed=1)
    assert all(2.718**-7.1 < point["a"] < 2.718**-5.9 and 0 <= point["b"] <= 1 for point in points)
    with pytest.raises(CloudError, match="by grid or random, not by bayesian"):
        search_points(replace(step, raw={"sampling_algorithm": "bayesian", "limits": limits, "search_space": grid}))


def test_a_command_of_another_program_is_not_run_in_this_process():
    with pytest.raises(CloudError, match="is no step of the course"):
        run_here(["rm", "-r", "x"], {})


def test_a_folder_given_as_an_input_is_found_from_anywhere(tmp_path):
    (tmp_path / "mine").mkdir()
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        changed = with_inputs(load_pipeline(PIPELINE), {"task": "mine"})
    finally:
        os.chdir(before)
    assert changed.inputs["task"] == {"type": "uri_folder", "path": str((tmp_path / "mine").resolve())}


@pytest.mark.slow
def test_every_step_runs_as_a_process_of_its_own(inputs, tmp_path):
    ran = run_pipeline(load_pipeline(PIPELINE), tmp_path / "build", inputs=inputs)
    assert ran.registered["model"].report.passed
    assert Store(tmp_path / "build" / "artifacts").root.is_dir()
