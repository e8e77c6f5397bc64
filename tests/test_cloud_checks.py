"""The checker finds what Azure's validation lets through: each case is the course's own pipeline with one thing wrong."""

import pytest
import yaml

from slmops_course.cloud.checks import check_file, check_pipeline, machine_type, value_problems
from slmops_course.cloud.definition import CloudError, Port, load_pipeline, references
from slmops_course.profiles import PROFILES

from cloud_desk import PIPELINE, change, copy_pipeline  # isort: skip

# file, what is there, what is put there instead, what the checker says
WRONG = [
    ("pipeline", "jobs.gather.outputs.labels", "jobs.gathr.outputs.labels", "is taken from the step gathr, which is not"),
    ("pipeline", "jobs.gather.outputs.labels", "jobs.gather.outputs.label", "the output label of gather, which is not there"),
    ("pipeline", "${{parent.inputs.shards}}", "${{parent.inputs.shard}}", "the pipeline's input shard, which is not there"),
    ("pipeline", "${{parent.inputs.shards}}", "${{inputs.shards}}", "expected parent.inputs.NAME or parent.jobs.STEP"),
    ("pipeline", "${{parent.inputs.shards}}", "x${{parent.inputs.shards}}", "expected one reference such as"),
    ("pipeline", "${{parent.inputs.shards}}", "${{parent.inputs.task}}", "shards is of type integer and gets the folder task"),
    ("pipeline", "${{parent.inputs.shards}}", "${{parent.jobs.teacher.outputs.teacher}}", "a folder from the step teacher"),
    ("pipeline", "  shards: 4", "  shards: four", "shards is 'four'; expected an integer (from the pipeline's input shards)"),
    ("pipeline", "  shards: 4", "  shards: 2.5", "shards is 2.5; expected an integer"),
    ("pipeline", "  shards: 4", "  shards: true", "shards is True; expected an integer"),
    ("pipeline", "  shards: 4", "  shards: 0", "shards is 0; expected at least 1"),
    ("pipeline", "  min_kept: 0.8", "  min_kept: 80", "min_kept is 80; expected at most 1"),
    ("pipeline", "  student_epochs: 3.0", "  student_epochs: .nan", "epochs is nan; expected a number"),
    ("pipeline", "  recipe: int4-rtn", "  recipe: int3", "recipe is 'int3'; expected one of fp32, int8"),
    ("pipeline", "  model: smollm2-135m", "  model: 135", "model is 135; expected a string"),
    ("pipeline", "      shards: ${{parent.inputs.shards}}\n", "", "its component's input shards is not set and has no default"),
    ("pipeline", "      device:", "      devise:", "it sets the input devise, which its component does not have"),
    ("pipeline", "      model: ${{parent.outputs.model}}", "      modell: ${{parent.outputs.model}}", "sets the output modell"),
    ("pipeline", "      model: ${{parent.outputs.model}}", "      model: ${{parent.outputs.m}}", "which is no output"),
    ("pipeline", "      model: ${{parent.outputs.model}}", "      model:", "output model is written by 0 steps"),
    ("pipeline", "    type: custom_model", "    type: mlflow_model", "is of type mlflow_model and release writes custom_model"),
    ("pipeline", "slmops_course/data/support_desk", "slmops_course/data/no_desk", "which is not there; correct the path"),
    ("pipeline", "  default_compute: azureml:cpu-cluster", "", "it has no compute and the pipeline no default_compute"),
    ("pipeline", "compute: azureml:train-cluster", "compute: azureml:gpu-cluster", "azureml:gpu-cluster has no file"),
    ("pipeline", "    type: parallel", "    type: command", "is of type command and its component of type parallel"),
    ("pipeline", "goal: maximize", "goal: maximise", "expected a goal, minimize or maximize"),
    ("pipeline", "sampling_algorithm: grid", "sampling_algorithm: gird", "sampling_algorithm is 'gird'; expected one of grid"),
    ("pipeline", "max_total_trials: 2", "max_total_trials: 0", "its limit max_total_trials is 0; expected"),
    ("pipeline", "      trial_timeout: 7200", "", "its limit trial_timeout is None; expected"),
    ("pipeline", "values: [0.001, 0.0015]", "values: [low]", "its search_space learning_rate is 'low'; expected a number"),
    ("pipeline", "values: [0.001, 0.0015]", "values: []", "its search_space learning_rate has no values"),
    ("pipeline", "type: choice", "type: chioce", "is of type 'chioce'; expected one of choice"),
    ("pipeline", "type: choice", "type: uniform", "is uniform; a grid needs a choice of values"),
    ("pipeline", "      learning_rate:\n        type: choice", "      tokens:\n        type: choice", "both set and searched"),
    ("pipeline", "      epochs: ${{parent.inputs.student_epochs}}", "      rate: 1", "it sets the input rate"),
    ("components/shard", "${{inputs.shards}}", "${{inputs.shard}}", "names inputs.shard, which it does not declare"),
    ("components/shard", "${{inputs.shards}}", "4", "it declares inputs.shards and its command never uses it"),
    ("components/shard", "--out ${{outputs.shards}}", "", "it declares outputs.shards and its command never uses it"),
    ("components/shard", "--shards", "--shard", "its command sets --shard, which the step shard does not take"),
    ("components/shard", "--task ${{inputs.task}}", "${{inputs.task}}", "its command does not set --task, which the step"),
    ("components/shard", "steps shard", "steps chard", "its command calls the step 'chard'; expected one of shard, teacher"),
    ("components/shard", "environment:\n", "no_environment:\n", "it has no environment"),
    ("components/shard", "  image: ", "  img: ", "neither a build path nor an image"),
    ("components/shard", "../conda.yml", "conda.yml", "conda_file conda.yml is not there"),
    ("components/shard", "  image: ", "  build: {path: .}\n  image: ", "where no Dockerfile is; correct the path"),
    ("components/shard", "code: ../../..", "code: ..", "its code .. does not hold the course"),
    ("components/shard", "code: ../../..", "", "its code None does not hold the course"),
    ("components/gather", "    default: 0.8", "    default: most", "the default of min_kept is 'most'; expected a number"),
    ("components/gather", "    type: number", "    type: share", "min_kept is of the type 'share'; expected one of integer"),
    ("components/label", "label.py", "labels.py", "/labels.py' is not there"),
    ("components/label", "input_data: ${{inputs.shards}}", "", "it has no input_data"),
    ("components/label", 'mini_batch_size: "1"', "mini_batch_size: 10kb", "mini_batch_size is '10kb'; expected"),
]  # fmt: skip


def test_the_courses_pipeline_has_no_problem():
    assert check_file(PIPELINE) == []


@pytest.mark.parametrize(("file", "old", "new", "says"), WRONG, ids=lambda value: str(value)[:24])
def test_what_is_wrong_is_named(file, old, new, says, tmp_path):
    pipeline = copy_pipeline(tmp_path)
    change(pipeline.parent / f"{file}.yml", old, new)
    problems = check_file(pipeline)
    assert [problem for problem in problems if says in problem], problems


def test_a_cycle_is_named_with_its_steps(tmp_path):
    pipeline = copy_pipeline(tmp_path)
    assert check_file(pipeline) == []  # a copy has no problem of its own
    there = "teacher: ${{parent.jobs.teacher.outputs.teacher}}\n\n  gather"
    change(pipeline, there, there.replace("jobs.teacher.outputs.teacher", "jobs.gather.outputs.labels"))
    assert any("label" in problem and "wait for each other" in problem for problem in check_file(pipeline))
    with pytest.raises(CloudError, match=r"gather -> label -> gather|label -> gather -> label"):
        load_pipeline(pipeline).order()


def test_each_step_comes_after_those_it_waits_for():
    pipeline = load_pipeline(PIPELINE)
    order = pipeline.order()
    assert sorted(order) == sorted(pipeline.steps)
    for name, step in pipeline.steps.items():
        assert all(order.index(earlier) < order.index(name) for earlier in step.waits_for)
    assert pipeline.steps["distil"].waits_for == {"teacher", "gather"}


def test_the_defaults_are_those_of_the_fast_profile():
    fast, inputs = PROFILES["fast"], load_pipeline(PIPELINE).inputs
    assert (inputs["teacher_epochs"], inputs["teacher_layers"]) == (fast.teacher.epochs, fast.teacher.trained_layers)
    assert inputs["teacher_learning_rate"] == fast.teacher.learning_rate
    assert inputs["student_epochs"] == fast.student.epochs
    assert (inputs["student_layers"], inputs["student_tokens"]) == (fast.student_shape.layers, fast.student_shape.tokens)
    assert fast.student.learning_rate in load_pipeline(PIPELINE).steps["distil"].search_space["learning_rate"]["values"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("type: pipeline\njobs: {}", "expected a pipeline with jobs"),
        ("type: command", "is of type 'command': expected a pipeline"),
        ("[1, 2]", "holds list: expected a YAML mapping"),
        ("a: [", "cannot be read"),
        ("type: pipeline\njobs: {a: {type: spark}}", "it is of type 'spark' and names no component file"),
        ("type: pipeline\njobs: {a: {type: command}}", "names no component file"),
        ("type: pipeline\njobs: {a: {type: command, component: nowhere.yml}}", "nowhere.yml cannot be read"),
        ("type: pipeline\njobs: {a: {type: command, component: p.yml}}", "expected a command or parallel component"),
        ("type: pipeline\njobs: [a]", "`jobs` holds list"),
    ],
)
def test_a_file_that_is_no_pipeline_is_one_problem(text, says, tmp_path):
    (tmp_path / "p.yml").write_text(text, "utf-8")
    problems = check_file(tmp_path / "p.yml")
    assert len(problems) == 1
    assert says in problems[0]
    assert "cannot be read" in check_file(tmp_path / "none.yml")[0]


@pytest.mark.parametrize(
    ("port", "right", "wrong"),
    [
        (Port("a", "integer", min=1, max=3), [1, "2", 3.0], [0, 4, 1.5, "1.5", "", None, True, [1]]),
        (Port("a", "number"), [1, 0.5, "1e-3"], ["", "one", float("inf"), None, False]),
        (Port("a", "string", enum=("x", "y")), ["x"], ["z", "", 1, None]),
        (Port("a", "boolean"), [True, False], [1, "true", None]),
        (Port("a", "uri_folder"), ["folder", {"type": "uri_folder", "path": "folder"}], ["", None, 3, {"path": None}, {}]),
    ],
)
def test_values_are_judged_by_their_port(port, right, wrong):
    assert [value_problems(port, value) for value in right] == [[]] * len(right)
    assert all(value_problems(port, value) for value in wrong)


def test_references_are_found_wherever_they_stand():
    assert references("--a ${{inputs.a}} --b ${{ outputs.b }}") == ["inputs.a", "outputs.b"]
    assert references("plain") == references(3) == references(None) == []


def test_a_step_without_a_size_of_machine_cannot_be_priced(tmp_path):
    pipeline = copy_pipeline(tmp_path)
    assert machine_type(load_pipeline(pipeline), load_pipeline(pipeline).steps["teacher"]) == "Standard_D8s_v3"
    change(pipeline.parent / "compute" / "train-cluster.yml", "size: Standard_D8s_v3", "")
    with pytest.raises(CloudError, match="has no size of machine"):
        machine_type(load_pipeline(pipeline), load_pipeline(pipeline).steps["teacher"])


def test_every_component_is_checked_once_and_every_file_is_used():
    pipeline = load_pipeline(PIPELINE)
    used = {step.component.path.name for step in pipeline.steps.values()}
    assert used == {path.name for path in (PIPELINE.parent / "components").glob("*.yml")}
    assert check_pipeline(pipeline) == []
    assert all(yaml.safe_load(path.read_text("utf-8")) for path in PIPELINE.parent.rglob("*.yml"))
