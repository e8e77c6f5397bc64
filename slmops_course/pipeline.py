"""The whole path, step by step: each method of `Course` is one step and returns its artifact.

Notebooks, `slmops run` and the tests all call these steps, so that a chapter finds what its predecessor made, or makes
it itself.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slmops_course import (
    adapters,
    benchmark,
    cells,
    evaluation,
    general,
    models,
    olive,
    optimize,
    sensitivity,
    serving,
    tasks,
    teachers,
    textmetrics,
    training,
    tuning,
)
from slmops_course.artifacts import Artifact, Store
from slmops_course.chat import TorchChatModel, load_torch
from slmops_course.errors import CourseError
from slmops_course.models import DEFAULT_MODEL
from slmops_course.profiles import PROFILES
from slmops_course.students import StudentShape
from slmops_course.tasks import Task
from slmops_course.training import TrainingSettings
from slmops_course.tuning import Teaching

COMPARED = ("alone", "sequence", "logit")


@dataclass(frozen=True)
class Contender:
    """A stage's result as the scoreboard sees it: a folder, and how to open it as a ChatModel."""

    name: str
    artifact: Artifact
    kind: str  # see benchmark.open_model
    options: dict
    shots: int | None = None  # None: a tuned model's short prompt; else instructions and this many examples


class Course:
    """One task, one base model, one profile, one store of artifacts.

    Example: `Course(Store("build/artifacts")).teacher()`
    """

    def __init__(self, store: Store, task: Task | None = None, *, profile: str = "fast", model: str = DEFAULT_MODEL):
        if profile not in PROFILES:
            raise CourseError(f"There is no profile {profile!r}: expected one of {', '.join(PROFILES)}.")
        self.store, self.model_name, self.profile_name = store, model, profile
        self.task = task or tasks.load_task()
        self.profile = PROFILES[profile]

    @property
    def folder(self) -> Path:
        """The folder that the notebooks are in, with `deploy` and `clients`."""
        return course_folder()

    def base(self) -> Artifact:
        """The base model, as a Hugging Face folder."""
        return models.get_model(self.store, self.model_name)

    def teacher(self) -> Artifact:
        """The base model, fine-tuned on the labelled messages."""
        return self._train(
            "teacher", self.base(), self.task.splits["train"], self.profile.teacher, freeze=training.freeze_below
        )

    def labels(self) -> Artifact:
        """The unlabelled messages, as the teacher labels them."""
        teacher, messages = self.teacher(), self.task.splits["unlabelled"][: self.profile.unlabelled]
        dtype = training.fast_dtype()

        def write(folder: Path):
            with TorchChatModel(teacher.path, dtype=dtype) as chat:
                teachers.save_labelled(teachers.label_messages(messages, chat, self.task), folder)

        return self._build(
            "labels", {"messages": len(messages), "dtype": dtype}, {"teacher": teacher, **tasks.task_inputs(self.task)},
            write, teachers.label_messages,
        )  # fmt: skip

    def label_checks(self) -> Artifact:
        """What a filter can judge the teacher's labels by: `checks.json` holds, by message id, the probability that the
        teacher gives its own answer ("confidence"), and for some messages three answers drawn at random ("samples").
        """
        teacher, labels = self.teacher(), self.labels()
        dtype, kept = training.fast_dtype(), self._labelled()
        sampled = kept[: self.profile.sampled_messages]

        def write(folder: Path):
            model, tokenizer = load_torch(teacher.path, dtype=dtype)
            asks = [self.task.messages(example.text) for example in sampled]
            answers = teachers.sample_answers(model, tokenizer, asks, temperature=1.0)
            checks = {
                "confidence": textmetrics.answer_probabilities(model, tokenizer, self.task, kept),
                "samples": {example.id: replies for example, replies in zip(sampled, answers, strict=True)},
            }
            (folder / "checks.json").write_text(json.dumps(checks), "utf-8")

        return self._build(
            "label-checks", {"sampled": len(sampled), "dtype": dtype}, {"teacher": teacher, "labels": labels}, write,
            textmetrics.log_probabilities, teachers.sample_answers,
        )  # fmt: skip

    def compared_student(self, kind: str) -> Artifact:
        """A student trained for a short time: "alone", on "sequence"-level labels, or on the teacher's "logit"s as well.

        Raises CourseError for another kind.
        """
        if kind not in COMPARED:
            raise CourseError(f"There is no student {kind!r}: expected one of {', '.join(COMPARED)}.")
        epochs = self.profile.comparison.epochs
        if kind == "alone":
            # The student without a teacher gets as many steps as the others, on its fewer rows.
            epochs *= (len(self.task.splits["train"]) + len(self._labelled())) / len(self.task.splits["train"])
        settings, shape = replace(self.profile.comparison, epochs=epochs), self.profile.comparison_shape
        return self._student(f"student-{kind}", kind, settings, shape, self.profile.logits if kind == "logit" else None)

    def student(self) -> Artifact:
        """The student that goes on to be optimized and served: trained for longer, by the profile's own teaching."""
        return self._student("student", "logit", self.profile.student, self.profile.student_shape, self.profile.teaching)

    def _labelled(self) -> list[tasks.Example]:
        return teachers.load_labelled(self.labels().path).kept

    def _student(
        self, stage: str, kind: str, settings: TrainingSettings, shape: StudentShape, teaching: Teaching | None
    ) -> Artifact:
        teacher, own = self.teacher(), self.task.splits["train"]
        return self._train(
            stage, self.base() if kind == "alone" else teacher, (*own, *(self._labelled() if kind != "alone" else ())),
            settings, freeze=training.freeze_below, shape=shape, teaching=teaching, labels=kind != "alone",
        )  # fmt: skip

    def lora(self) -> Artifact:
        """The base model with a LoRA adapter trained by PEFT, merged; the adapter alone is in `adapter/`."""
        return self._train("lora", self.base(), self.task.splits["train"], self.profile.lora_training, lora=self.profile.lora)

    def olive_lora(self) -> Artifact:
        """The same job done by Olive's own fine-tuning pass, on the profile's number of rows."""
        base, lora = self.base(), self.profile.lora
        examples = self.task.splits["train"][: self.profile.olive_rows]
        settings = self.profile.olive_training

        def write(folder: Path):
            from transformers import AutoTokenizer

            work = (folder / "work").resolve()
            work.mkdir()
            rows = olive.write_conversations(work / "rows.jsonl", self.task, examples, AutoTokenizer.from_pretrained(base.path))
            config = olive.olive_config(
                model=base.path.resolve(), output=work / "out", passes=adapters.olive_lora_passes(lora, settings), rows=rows
            )
            olive.run_olive(config, work)
            olive.collect(work, folder, marker="config.json", config=config, model=base.path)

        return self._build(
            "olive-lora", {"lora": asdict(lora), "training": asdict(settings), "rows": len(examples)},
            {"base": base, **tasks.task_inputs(self.task)}, write, adapters.olive_lora_passes, olive.olive_config,
        )  # fmt: skip

    def olive_manners(self) -> Artifact:
        """Olive's fine-tuning by command, by file and from Python, each run on a toy: see `manners.json` in it."""
        examples = sorted(self.task.splits["train"], key=lambda example: (len(example.text), example.id))[:16]

        def write(folder: Path):
            from transformers import AutoTokenizer

            texts = [self.task.prompt, *(text for e in examples for text in (e.text, self.task.target(e.answer)))]
            toy = models.write_tiny_model(folder / "toy", texts=texts)
            rows = olive.write_conversations(
                folder / "rows.jsonl", self.task, examples, AutoTokenizer.from_pretrained(toy)
            )
            found = olive.finetune_three_ways(toy, rows, folder, rank=8, alpha=16, max_tokens=32)
            (folder / "manners.json").write_text(json.dumps(found), "utf-8")

        return self._build(
            "olive-manners", {"rows": len(examples)}, tasks.task_inputs(self.task), write, olive.finetune_three_ways,
            models.write_tiny_model,
        )  # fmt: skip

    def olive_commands(self) -> Artifact:
        """Olive's optimizing by command and by file, each run on a toy: see `commands.json` in it."""

        def write(folder: Path):
            texts = [self.task.prompt, *(example.text for example in self.task.splits["train"][:16])]
            toy = models.write_tiny_model(folder / "toy", texts=texts)
            found = olive.optimize_by_command(toy, folder, names=optimize.MODEL_FILES)
            (folder / "commands.json").write_text(json.dumps(found), "utf-8")

        return self._build(
            "olive-commands", {}, tasks.task_inputs(self.task), write, olive.optimize_by_command, models.write_tiny_model
        )

    def onnx(self, recipe: str, source: Artifact | None = None) -> Artifact:
        """The student, or another model of its kind, as an ONNX model, by one of Olive's recipes."""
        optimize.recipe_passes(recipe)
        student = source or self.student()
        return self._build(
            f"onnx-{recipe}", {"recipe": recipe}, {"model": student, **tasks.task_inputs(self.task)},
            lambda folder: optimize.optimize(recipe, model=student.path, task=self.task, folder=folder),
            optimize.optimize, optimize.recipe_passes, olive.olive_config,
        )  # fmt: skip

    def weight_scans(self) -> Artifact:
        """What the student, and the one that was never rounded, still know after their weights were changed: `scans.json`.

        Its values are the rows of sensitivity.scan, by "trained for 4 bits" and "never rounded".
        """
        students = {"trained for 4 bits": self.student(), "never rounded": self.compared_student("logit")}
        examples, dtype = self.task.splits["dev"][:64], training.fast_dtype()

        def write(folder: Path):
            scans = {name: sensitivity.scan(one.path, self.task, examples) for name, one in students.items()}
            (folder / "scans.json").write_text(json.dumps(scans), "utf-8")

        return self._build(
            "weight-scans", {"messages": len(examples), "dtype": dtype}, {**students, **tasks.task_inputs(self.task)}, write,
            sensitivity.scan, sensitivity.grade, sensitivity.to_grid, sensitivity.to_ternary, sensitivity.without_smallest,
        )  # fmt: skip

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        """Every stage's result by name, made when it is called for."""
        schema = {"schema": dict(self.task.schema)}
        table: dict[str, Callable[[], Contender]] = {
            "base zero-shot": lambda: Contender("base zero-shot", self.base(), "torch", {}, 0),
            "base few-shot": lambda: Contender("base few-shot", self.base(), "torch", {}, 4),
            "teacher": lambda: Contender("teacher", self.teacher(), "torch", {}),
            "lora": lambda: Contender("lora", self.lora(), "torch", {}),
            "olive lora": lambda: Contender("olive lora", self.olive_lora(), "torch", {}),
        }
        for kind in COMPARED:
            name = f"student {kind}"
            table[name] = lambda name=name, kind=kind: Contender(name, self.compared_student(kind), "torch", {})
        table["student"] = lambda: Contender("student", self.student(), "torch", {})
        for recipe in optimize.RECIPES:
            name = f"student {recipe}"
            table[name] = lambda name=name, recipe=recipe: Contender(name, self.onnx(recipe), "genai", {})
        for kind, name in (("foundry", "foundry in process"), ("foundry-service", "foundry service")):
            table[name] = lambda name=name, kind=kind: Contender(name, self.onnx(self.served_recipe), kind, schema)
        return table

    served_recipe = "int4-rtn"  # the student is trained for just this rounding

    def outcomes(self, name: str) -> list[evaluation.Outcome]:
        """What a contender made of the test messages."""
        return evaluation.outcomes_from_json((self.outcomes_artifact(name).path / "outcomes.jsonl").read_text("utf-8"))

    def outcomes_artifact(self, name: str) -> Artifact:
        """The test messages with a contender's replies, as an artifact."""
        contender = self._contender(name)
        examples = self.task.splits["test"][: self.profile.test_messages]
        if contender.shots is not None:
            examples = examples[: self.profile.base_messages]
        options = dict(contender.options)
        if contender.kind == "torch":
            # Scores are taken in the quickest format; speed and memory in fp32, see `speed`.
            options["dtype"] = training.fast_dtype()

        def write(folder: Path):
            asks = [self._conversation(contender, example.text) for example in examples]
            with benchmark.open_model(contender.kind, contender.artifact.path, **options) as chat:
                replies = [reply.text for reply in chat.generate(asks)]
            judged = evaluation.judge(self.task, examples, replies)
            (folder / "outcomes.jsonl").write_text(evaluation.outcomes_to_json(judged), "utf-8")

        settings = {"kind": contender.kind, "shots": contender.shots, "messages": len(examples), "options": options}
        return self._build(
            f"outcomes-{_slug(name)}", settings, {"model": contender.artifact, **tasks.task_inputs(self.task)}, write,
            evaluation.judge, benchmark.CHAT_MODELS[contender.kind], serving.json_grammar, serving.bare_schema,
        )  # fmt: skip

    def speed(self, name: str) -> benchmark.Speed:
        """A contender's speed and memory: PyTorch models in fp32, one message at a time, in a process of its own."""
        contender = self._contender(name)
        examples = self.task.splits["dev"][: self.profile.speed_messages]

        def write(folder: Path):
            asks = [self._conversation(contender, example.text) for example in examples]
            speed = benchmark.measure_speed(contender.kind, contender.artifact.path, asks, **contender.options)
            (folder / "speed.json").write_text(json.dumps(asdict(speed)), "utf-8")

        settings = {"kind": contender.kind, "shots": contender.shots, "messages": len(examples)}
        artifact = self._build(
            f"speed-{_slug(name)}", settings, {"model": contender.artifact, **tasks.task_inputs(self.task)}, write,
            benchmark.time_replies, benchmark.MemoryWatch, benchmark.CHAT_MODELS[contender.kind],
        )  # fmt: skip
        return benchmark.Speed(**artifact.json("speed.json"))

    def confidence(self, name: str) -> dict[str, float]:
        """The probability that a PyTorch contender gives to each of its own answers to the test messages, by message id.

        Replies that hold no answer are left out.
        """
        contender, outcomes = self._contender(name), self.outcomes_artifact(name)
        dtype = training.fast_dtype()

        def write(folder: Path):
            answered = [tasks.Example(o.id, o.text, o.answer) for o in self.outcomes(name) if o.answer]
            model, tokenizer = load_torch(contender.artifact.path, dtype=dtype)
            sure = textmetrics.answer_probabilities(model, tokenizer, self.task, answered)
            (folder / "confidence.json").write_text(json.dumps(sure), "utf-8")

        return self._build(
            f"confidence-{_slug(name)}", {"dtype": dtype}, {"model": contender.artifact, "outcomes": outcomes}, write,
            textmetrics.log_probabilities,
        ).json("confidence.json")  # fmt: skip

    def knowledge(self, name: str) -> list[general.Knowledge]:
        """What a PyTorch contender answers to questions about the world, without the task's prompt: has it forgotten?"""
        contender = self._contender(name)

        def write(folder: Path):
            with benchmark.open_model(contender.kind, contender.artifact.path, dtype=training.fast_dtype()) as chat:
                found = general.ask_questions(chat, general.load_questions())
            (folder / "knowledge.json").write_text(json.dumps([asdict(one) for one in found], ensure_ascii=False), "utf-8")

        artifact = self._build(
            f"knowledge-{_slug(name)}", {"kind": contender.kind, "dtype": training.fast_dtype()},
            {"model": contender.artifact, "questions": general.QUESTIONS}, write, general.ask_questions, general.says,
            benchmark.CHAT_MODELS[contender.kind],
        )  # fmt: skip
        return [general.Knowledge(**one) for one in artifact.json("knowledge.json")]

    def scoreboard(self, names: Sequence[str] | None = None) -> list[dict]:
        """One row a contender: scores with intervals, size, memory and speed. Size and memory are in bytes."""
        rows = []
        for name in names or self.contenders():
            outcomes, speed = self.outcomes(name), self.speed(name)
            scores = evaluation.score_outcomes(self.task, outcomes)
            rows.append(
                {
                    "name": name,
                    "messages": len(outcomes),
                    "scores": {key: asdict(score) for key, score in scores.items()},
                    "size_bytes": optimize.model_bytes(self._contender(name).artifact.path),
                    **{k: v for k, v in asdict(speed).items() if k != "messages"},
                }
            )
        return rows

    def _contender(self, name: str) -> Contender:
        table = self.contenders()
        if name not in table:
            raise CourseError(f"There is no model {name!r} on the scoreboard: expected one of {', '.join(table)}.")
        return table[name]()

    def _conversation(self, contender: Contender, text: str):
        if contender.shots is None:
            return self.task.messages(text)
        return self.task.instructed_messages(text, few_shots(self.task, contender.shots))

    def _build(self, stage: str, settings: dict, inputs: dict, write, *code) -> Artifact:
        def write_and_tidy(folder: Path):
            try:
                return write(folder)
            finally:
                benchmark.give_back_memory()

        settings = {"profile": self.profile_name, **settings}
        return self.store.build(stage, settings=settings, inputs=inputs, write=write_and_tidy, code=code)

    def _train(
        self, stage: str, source: Artifact, examples, settings: TrainingSettings, *, freeze=None, shape=None,
        teaching=None, labels=False, lora=None,
    ) -> Artifact:  # fmt: skip
        teacher = self.teacher() if teaching else None

        def write(folder: Path):
            measured = tuning.train_model(
                folder, source=source.path, task=self.task, examples=examples, settings=settings, freeze=freeze, shape=shape,
                teacher=teacher and teacher.path, teaching=teaching, lora=lora,
            )  # fmt: skip
            if lora:
                adapters.forget_base_folder(folder / "adapter")
            return measured

        recipe = {"training": asdict(settings), "examples": len(examples), "numbers": training.numbers()}
        inputs = {"source": source, **tasks.task_inputs(self.task)}
        if labels:
            inputs["labels"] = self.labels()
        if shape:
            recipe["shape"] = asdict(shape)
        if teaching:
            inputs["teacher"] = teacher
            recipe |= asdict(teaching)
        if lora:
            recipe["lora"] = asdict(lora)
        return self._build(stage, recipe, inputs, write, *tuning.deciding_code(shape=shape, teaching=teaching, lora=lora))


def open_course(
    artifacts: Path | str, *, task: str = tasks.BUNDLED_TASK, model: str = DEFAULT_MODEL, profile: str = "fast"
) -> Course:
    """A course from a chapter's parameters. Rows of the task that cannot be used are in its `task.rejected`.

    `artifacts` is in the course's folder, see `course_folder`, unless it is an absolute path. In a notebook the cells that
    follow speak the reader's language. Progress bars are switched off, and so are the warnings that a notebook has no
    widgets to draw them with, and that bitsandbytes, which PEFT imports, finds no faster kernel on a model hub.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", message="IProgress not found")
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        cells.speak(shell)
    store = Store(course_folder() / artifacts)
    return Course(store, tasks.load_task(task, store=store), profile=profile, model=model)


def course_folder(place: Path | None = None) -> Path:
    """The nearest folder from a place upwards, by default the working folder, that holds the notebooks; else the place.

    Example: course_folder(Path("/course/translations/hi/notebooks")) -> Path("/course")
    """
    place = (place or Path.cwd()).resolve()
    parts = ("notebooks", "slmops_course")
    found = (folder for folder in (place, *place.parents) if all((folder / part).is_dir() for part in parts))
    return next(found, place)


def few_shots(task: Task, count: int) -> list[tasks.Example]:
    """The first training examples with different labels: the same for every message."""
    chosen: dict[str, tasks.Example] = {}
    for example in task.splits["train"]:
        chosen.setdefault(example.answer[task.label_field], example)
    return list(chosen.values())[:count]


def _slug(name: str) -> str:
    return name.replace(" ", "-")
