"""Side experiments: their mechanism, and each one on a task and a model so small that it takes seconds.

How fast training is has a module of its own, test_experiments_speed.py.
"""

import json
import re
from dataclasses import replace

import pytest

from slmops_course import experiments, training
from slmops_course.experiments import speed
from slmops_course.experiments.labelling import label_sets, take_surer
from slmops_course.experiments.methods import METHODS, compare_contrastive, compare_noise, first_of_each, mislabel, try_method
from slmops_course.experiments.students import Bench, compare_shapes, shapes_of
from slmops_course.pipeline import Course
from slmops_course.plots import frontier
from slmops_course.tasks import Example
from slmops_course.teachers import Labelled, load_labelled

RECORD = experiments.Record(
    "losses", [{"name": "a", "exact_match": 0.5}], "desk", "model", "fast", "2026-01-31", "x86_64, 2 cores, avx2", 0, 125.0
)


@pytest.fixture(scope="module")
def bench(course):
    return Bench(course)


@pytest.fixture(scope="module")
def tried(course):
    """Every method's row."""
    return {name: try_method(name, course.base().path, course.task, course.profile) for name in METHODS}


class TestRecords:
    def test_what_is_kept_comes_back_marked_as_kept(self, tmp_path):
        experiments.keep(RECORD, tmp_path)
        assert experiments.load_kept("losses", tmp_path) == replace(RECORD, kept=True)

    def test_a_kept_record_says_that_it_was_skipped_and_where_it_is_from(self, tmp_path):
        sentence = str(replace(RECORD, kept=True))
        for part in ("skips", "2026-01-31", "x86_64, 2 cores, avx2", "seed 0", "2 minutes", "slmops experiment losses"):
            assert part in sentence

    def test_a_record_of_this_run_does_not_say_that_it_was_skipped(self):
        assert "skips" not in str(RECORD)

    def test_an_unknown_experiment_is_refused(self, course):
        with pytest.raises(experiments.ExperimentError, match="There is no experiment 'loses': expected one of luck, losses, "):
            experiments.run(course, "loses")

    def test_missing_figures_are_named_with_the_command_that_makes_them(self, tmp_path):
        with pytest.raises(experiments.ExperimentError, match=r"No figures .* `slmops experiment losses --save` makes it"):
            experiments.load_kept("losses", tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"name": "losses"}'])
    def test_unreadable_figures_are_named(self, text, tmp_path):
        (tmp_path / "losses.json").write_text(text, "utf-8")
        with pytest.raises(experiments.ExperimentError, match=r"losses\.json cannot be read"):
            experiments.load_kept("losses", tmp_path)

    def test_the_fast_profile_shows_what_is_kept_and_the_full_one_measures(self, course, capsys):
        shown = experiments.show(course, "temperatures")
        assert shown.kept
        assert "skips" in capsys.readouterr().out
        full = Course(course.store, course.task, profile="full", model=course.model_name)
        full.profile = course.profile
        measured = experiments.show(full, "temperatures")
        assert (measured.kept, measured.task) == (False, "tiny_desk")
        assert experiments.show(full, "temperatures") == measured  # not measured twice


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
class TestKeptFigures:
    def test_they_say_when_where_and_from_which_seed(self, name):
        record = experiments.load_kept(name)
        assert record.name == name
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", record.date)
        assert re.fullmatch(r"\w+, \d+ cores, [\w ]+", record.machine)
        assert (record.task, record.model, record.seed) == ("support_desk", "smollm2-135m", experiments.SEED)
        assert record.duration_s > 10

    def test_scores_lie_in_their_intervals(self, name):
        scores = [row["exact_match"] for row in experiments.load_kept(name).rows if isinstance(row.get("exact_match"), dict)]
        assert all(0 <= s["low"] <= s["value"] <= s["high"] <= 1 and s["count"] > 50 for s in scores)

    def test_no_two_rows_have_one_name(self, name):
        rows = experiments.load_kept(name).rows
        keys = ("name", "figure", "precision", "way", "adapter", "desk")
        assert len(rows) > 1
        assert len({json.dumps([row.get(key) for key in keys]) for row in rows}) == len(rows)


def scores(name):
    return {name: score.value for name, score in experiments.load_kept(name).scores.items()}


def test_a_records_key_holds_all_functions_of_its_module_and_the_training_loop(course):
    experiments.run(course, "temperatures")
    (manifest,) = course.store.root.glob("experiment-temperatures-*/manifest.json")
    code = json.loads(manifest.read_text("utf-8"))["code"]
    assert {"Bench", "sweep_temperature", "train", "distillation_loss", "matching_loss"} <= set(code)


class TestWhatTheChaptersSay:
    """Claims about kept figures in the chapters' answers: new figures that break one ask for new words."""

    def test_matched_layers_bring_more_than_the_teachers_distribution(self):
        found = scores("losses")
        assert found["labels"] < found["forward KL"] < found["labels + inner layers"]
        assert min(found, key=found.get) == "reverse KL"

    def test_the_order_of_the_rows_moves_a_score_by_twelve_points(self):
        values = scores("luck").values()
        assert max(values) - min(values) == pytest.approx(0.12, abs=0.005)
        assert scores("losses")["reverse KL"] < min(values)
        assert max(values) - min(values) < scores("losses")["labels + inner layers"] - scores("losses")["labels"]
        sweep = scores("temperatures").values()
        assert max(sweep) - min(sweep) < 1.5 * (max(values) - min(values))

    def test_the_temperatures_scores_have_no_one_peak(self):
        first, second, third, fourth = scores("temperatures").values()
        assert first < second > third < fourth

    def test_filters_clean_the_labels_and_the_right_labels_bring_little(self):
        rows = {row["name"]: row for row in experiments.load_kept("labels").rows}
        assert rows["all labels"]["right"] < 0.88 < 0.93 < rows["all three filters"]["right"]
        assert rows["the right labels"]["difference"]["value"] < 0.03
        assert rows["the second teacher's labels"]["right"] < 0.65
        best = max((row for row in rows.values() if "exact_match" in row), key=lambda row: row["exact_match"]["value"])
        assert best["name"] == "both teachers agree"
        assert best["difference"]["low"] > 0
        assert sum(row["difference"]["low"] > 0 for row in rows.values()) == 1

    def test_the_contrastive_loss_brings_nothing(self):
        found = scores("contrastive")
        assert found["few: with contrastive"] < found["few: cross-entropy"]
        assert found["all: with contrastive"] < found["all: cross-entropy"]

    def test_depth_pays_and_which_layers_matters_as_much(self):
        found = scores("shapes")
        assert found["5 layers"] < found["10 layers"] < found["15 layers"] < found["20 layers"]
        assert found["the top 10"] < found["the bottom 10"] < found["10 layers"] < found["the bottom 5 and the top 5"]
        assert found["the bottom 5 and the top 5"] == pytest.approx(found["15 layers"], abs=0.01)
        luck = max(scores("luck").values()) - min(scores("luck").values())
        assert found["the bottom 5 and the top 5"] - found["10 layers"] < luck < found["10 layers"] - found["the top 10"]

    def test_narrow_layers_lose_and_the_left_out_tokens_are_not_missed(self):
        rows = {row["name"]: row for row in experiments.load_kept("shapes").rows}
        sizes = {name: sum(row["parameters"].values()) for name, row in rows.items()}
        narrow = ["30 layers, 1/3 as wide", "15 layers, 2/3 as wide", "10 layers"]
        assert max(sizes[name] for name in narrow) < 1.01 * min(sizes[name] for name in narrow)
        assert sorted(narrow, key=scores("shapes").get) == narrow
        assert rows["10 layers, whole vocabulary"]["difference"]["high"] < 0

    def test_three_shapes_are_on_the_frontier(self):
        rows = experiments.load_kept("shapes").rows
        points = [{"name": r["name"], "size_bytes": 4 * sum(r["parameters"].values()), "scores": r} for r in rows]
        assert [point["name"] for point in frontier(points)] == ["5 layers", "the bottom 5 and the top 5", "20 layers"]

    def test_our_loop_trains_adapters_faster_than_all_weights_and_than_two_other_trainers(self):
        rows = {row["name"]: row for row in experiments.load_kept("speed").rows}
        full, ours, trl, olive = (rows[name] for name in (speed.FULL, speed.OURS, speed.TRL, speed.OLIVE))
        rates = [round(row["tokens_per_s"]) for row in (full, ours, trl, olive)]
        assert rates == [603, 643, 198, 273]
        assert ours["tokens_per_s"] >= full["tokens_per_s"]
        assert ours["tokens_per_s"] >= 2 * olive["tokens_per_s"]
        assert min(full["exact_match"], ours["exact_match"]) > max(trl["exact_match"], olive["exact_match"])
        assert (min(r["exact_match"] for r in rows.values()), full["exact_match"]) == pytest.approx((0.058, 0.128), abs=0.0005)
        assert max(full["growth_bytes"], ours["growth_bytes"]) < 50e6 < 330e6 < trl["growth_bytes"] < 345e6
        assert {len(row["runs"]) for row in rows.values()} == {3}

    def test_eight_bits_for_the_embedding_help_only_the_student_that_was_never_rounded(self):
        found, rows = experiments.load_kept("mixed").differences, experiments.load_kept("mixed").rows
        assert found["never rounded, int4-rtn"].value == pytest.approx(-0.07, abs=0.005)
        assert -0.01 < found["never rounded, int4-mixed-last"].value < 0
        mixtures = [found[f"trained for 4 bits, int4-mixed-{which}"].value for which in ("last", "down", "snr")]
        assert max(mixtures) <= found["trained for 4 bits, int4-rtn"].value
        size = {row["name"].partition(", ")[2]: row["size_bytes"] for row in rows}
        assert size["int4-mixed-last"] / size["int4-rtn"] == pytest.approx(9 / 8, abs=0.005)
        assert size["int2-mixed"] / size["int4-rtn"] == pytest.approx(7 / 8, abs=0.005)
        for student in ("trained for 4 bits", "never rounded"):
            loss = found[f"{student}, int4-rtn"].value - found[f"{student}, int2-mixed"].value
            assert loss == pytest.approx(0.03, abs=0.005)
            assert scores("mixed")[f"{student}, int2-rtn"] < 0.03

    def test_few_bits_can_be_learned_and_rounding_hinders_the_learning(self):
        found = scores("rounding")
        assert list(found) == sorted(found, key=found.get, reverse=True) == ["never rounded", "4 bits", "2 bits", "ternary"]
        assert found["2 bits"] == pytest.approx(1 / 3, abs=0.03)
        assert found["ternary"] == pytest.approx(1 / 5, abs=0.03)
        afterwards = experiments.load_kept("mixed").differences["never rounded, int4-rtn"].value
        assert found["4 bits"] - found["never rounded"] < afterwards

    def test_wrong_labels_cost_points_and_leaving_the_doubtful_ones_out_brings_half_of_them_back(self):
        clean, some, many, cured = scores("noise").values()
        assert clean - some == pytest.approx(0.08, abs=0.005)
        assert clean - many == pytest.approx(0.22, abs=0.005)
        assert (cured - many) / (clean - many) == pytest.approx(0.5, abs=0.05)
        last = experiments.load_kept("noise").rows[-1]
        assert (last["wrong"], last["rows"], last["dropped"]) == (119, 1922, 824)

    def test_an_adapter_answers_in_its_own_desks_form_whoever_asks(self):
        rows = [row for row in experiments.load_kept("desks").rows if row["figure"] == "cross-talk"]
        rows = [row for row in rows if row["precision"] == "fp32"]
        away = [row for row in rows if row["desk"] != row["adapter"]]
        assert len(rows) == 9
        assert all(row["valid"] == 0 and row["exact_match"] == 0 for row in away)
        valid = [row["valid_own"] for row in away]
        assert (min(valid), max(valid)) == pytest.approx((0.85, 0.97), abs=0.01)
        home = [row["exact_match"] for row in rows if row["desk"] == row["adapter"]]
        assert (min(home), max(home)) == pytest.approx((0.42, 0.78), abs=0.005)

    def test_switched_adapters_are_the_merged_models_and_share_one_base(self):
        rows = experiments.load_kept("desks").rows
        assert all(row["share"] == 1 for row in rows if row["figure"] == "equal" and row["precision"] == "fp32")
        serving = {(row["precision"], row["way"].split()[0]): row for row in rows if row["figure"] == "serving"}
        megabytes = {key: round(row["memory_bytes"] / 1e6) for key, row in serving.items()}
        assert megabytes == {("fp32", "one"): 793, ("fp32", "three"): 2140, ("int4", "one"): 245, ("int4", "three"): 498}
        for precision, slower in (("fp32", 1.12), ("int4", 1.19)):
            one, three = serving[precision, "one"], serving[precision, "three"]
            assert one["latency_by_desk_s"] / three["latency_by_desk_s"] == pytest.approx(slower, abs=0.01)
            assert one["latency_in_turns_s"] == pytest.approx(one["latency_by_desk_s"], rel=0.02)

    def test_full_tuning_is_ahead_and_adapters_save_memory_and_disk(self):
        rows = {row["name"]: row for row in experiments.load_kept("methods").rows}
        assert max(scores("methods"), key=scores("methods").get) == "full"
        assert rows["QLoRA"]["memory_bytes"] < rows["LoRA"]["memory_bytes"] < rows["full"]["memory_bytes"]
        assert rows["LoRA"]["training_s"] < 1.05 * rows["full"]["training_s"]
        assert rows["LoRA"]["kept_bytes"] < rows["full"]["kept_bytes"] / 50


class TestStudents:
    def test_all_see_as_many_rows_however_few_they_are(self, bench):
        seen = []

        def counting(model, batch):
            seen.append(len(batch.indexes))
            return training.next_token_loss(model, batch)

        counts = []
        for examples in (bench.examples, bench.examples[:4]):
            seen.clear()
            bench.measure("x", bench.cut(), loss=counting, examples=examples)
            counts.append(sum(seen))
        assert counts[0] == pytest.approx(counts[1], abs=bench.profile.comparison.batch_size)

    def test_scores_are_compared_with_the_first(self, bench):
        bench.first = None
        assert bench.score("first", bench.cut(), bench.trimmed)["difference"]["value"] == 0
        first = bench.first
        other = bench.score("other", bench.teacher, bench.tokenizer)
        assert bench.first is first
        right = sum(outcome.answer == outcome.expected for outcome in first) / len(first)
        assert other["difference"]["value"] == pytest.approx(other["exact_match"]["value"] - right)

    @pytest.mark.parametrize(
        ("name", "rows"),
        [
            ("losses", ["labels", "labels + inner layers", "forward KL", "reverse KL", "forward KL + inner layers"]),
            ("temperatures", ["T = 1", "T = 2", "T = 4", "T = 8"]),
        ],
    )
    def test_an_experiment_has_a_row_for_each_student(self, course, name, rows):
        found = experiments.run(course, name).rows
        assert [row["name"] for row in found] == rows
        assert found[0]["difference"]["value"] == 0

    def test_shapes_of_a_known_depth(self):
        shapes = {name: layers for _, name, layers in shapes_of(30, 10)}
        assert [len(layers) for layers in shapes.values()] == [10, 5, 15, 20, 10, 10, 10]
        assert shapes["the bottom 10"] == list(range(10))
        assert shapes["the top 10"] == list(range(20, 30))
        assert shapes["the bottom 5 and the top 5"] == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]

    def test_shapes_differ_in_what_they_keep(self, course):
        rows = {row["name"]: row["parameters"] for row in compare_shapes(course)}
        assert rows["2 layers, 1/3 as wide"]["layers"] < rows["2 layers, 2/3 as wide"]["layers"] < rows["2 layers"]["layers"]
        assert rows["2 layers, whole vocabulary"]["embeddings"] >= rows["2 layers"]["embeddings"]


class TestLabels:
    def test_filters_take_labels_away_and_the_key_mends_them(self, course, tmp_path):
        labelled = load_labelled(course.labels().path)
        key = {e.id: {"intent": "card_lost", "urgency": "low"} for e in labelled.kept}
        sets = label_sets(course, labelled, key)
        assert all(len(left.kept) <= len(labelled.kept) for left in sets.values())
        assert {e.answer["intent"] for e in sets["the right labels"].kept} == {"card_lost"}
        assert len(sets["the right labels"].kept) == len(labelled.kept)
        assert "the right labels" not in label_sets(course, labelled, {})

    def test_the_surer_teacher_decides(self):
        first = Labelled((Example("a", "x", {"i": "1"}), Example("b", "y", {"i": "1"}), Example("c", "z", {"i": "1"})), ())
        second = Labelled((Example("a", "x", {"i": "2"}), Example("b", "y", {"i": "2"})), ())
        taken = take_surer(first, {"a": 0.9, "b": 0.4, "c": 0.1}, second, {"a": 0.5, "b": 0.6})
        assert [example.answer["i"] for example in taken.kept] == ["1", "2", "1"]

    def test_a_filter_that_leaves_nothing_trains_no_student(self, course):
        rows = experiments.run(course, "labels").rows
        assert all(("exact_match" in row) == (row["labels"] > 0) for row in rows)


class TestMethods:
    def test_parameters_that_learn_are_fewest_in_a_head_and_most_in_full_tuning(self, tried):
        learns = {name: row["trained_parameters"] for name, row in tried.items()}
        assert learns["head, model frozen"] < learns["LoRA"] < learns["DoRA"] < learns["full"] < learns["head and layers"]
        assert learns["QLoRA"] == learns["LoRA"]

    def test_an_adapter_or_a_head_is_a_small_file_and_tuned_layers_are_the_whole_model(self, tried):
        kept = {name: row["kept_bytes"] for name, row in tried.items()}
        assert max(kept["LoRA"], kept["DoRA"], kept["head, model frozen"]) < kept["full"] / 5
        assert kept["full"] == 4 * tried["full"]["parameters"]

    def test_four_bits_do_not_change_how_many_parameters_there_are(self, tried):
        assert tried["QLoRA"]["parameters"] == tried["LoRA"]["parameters"]

    def test_a_share_of_the_labels_is_wrong_and_the_rest_untouched(self, tiny_task):
        examples = tiny_task.splits["train"]
        changed, wrong = mislabel(examples, 0.25, tiny_task)
        assert len(wrong) == 3
        for old, new in zip(examples, changed, strict=True):
            assert (new.id, new.text) == (old.id, old.text)
            assert (new.answer["intent"] != old.answer["intent"]) == (old.id in wrong)
        assert mislabel(examples, 0.25, tiny_task)[1] == wrong

    def test_no_share_changes_nothing(self, tiny_task):
        assert mislabel(tiny_task.splits["train"], 0.0, tiny_task) == (list(tiny_task.splits["train"]), set())

    def test_the_first_messages_of_each_label(self, tiny_task):
        chosen = [example.id for example in first_of_each(tiny_task, 2)]
        assert chosen == ["train-0", "train-1", "train-4", "train-5", "train-8", "train-9"]

    def test_noise_grows_and_the_cure_leaves_out_as_many_rows_as_are_wrong(self, course):
        rows = compare_noise(course)
        assert [row["wrong"] for row in rows[:3]] == [0, 1, 4]
        assert (rows[3]["dropped"], rows[3]["rows"]) == (4, 8)

    def test_each_loss_meets_few_messages_and_all(self, course):
        rows = compare_contrastive(course)
        assert [row["name"].split(":")[0] for row in rows] == ["few", "few", "all", "all"]
