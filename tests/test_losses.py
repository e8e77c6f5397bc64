import math

import pytest
import torch

from slmops_course.losses import (
    contrastive_loss,
    distillation_loss,
    first_difference,
    forward_divergence,
    inner_states,
    matching_loss,
    reverse_divergence,
)
from slmops_course.training import (
    Row,
    TrainingError,
    TrainingSettings,
    answer_states,
    make_batch,
    next_token_loss,
    train,
)


class TestDivergences:
    # The teacher holds two tokens possible, the student only the first of them.
    teacher = torch.tensor([[0.5, 0.5 - 1e-6, 1e-6]]).log()
    narrow = torch.tensor([[1 - 2e-6, 1e-6, 1e-6]]).log()

    def test_a_distribution_does_not_differ_from_itself(self):
        assert forward_divergence(self.teacher, self.teacher).item() == pytest.approx(0, abs=1e-6)
        assert reverse_divergence(self.teacher, self.teacher).item() == pytest.approx(0, abs=1e-6)

    def test_known_values(self):
        p, q = self.teacher.exp()[0], self.narrow.exp()[0]
        assert forward_divergence(self.narrow, self.teacher).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
        assert reverse_divergence(self.narrow, self.teacher).item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-4)

    def test_to_leave_out_what_the_teacher_holds_possible_costs_more_forwards_than_backwards(self):
        assert forward_divergence(self.narrow, self.teacher) > 5 * reverse_divergence(self.narrow, self.teacher)


class TestDistillation:
    @pytest.fixture
    def soft(self, model, rows):
        """The model's own states, row by row, and its head: a teacher that equals its student."""
        with torch.no_grad():
            states = [answer_states(model, make_batch(rows, [i])) for i in range(len(rows))]
        return states, model.lm_head.weight.detach().clone()

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
    def test_a_student_equal_to_its_teacher_has_no_loss(self, model, rows, soft, temperature):
        loss = distillation_loss(*soft, temperature=temperature, label_share=0.0)
        assert loss(model, make_batch(rows, [3, 0, 1])).item() == pytest.approx(0, abs=1e-5)

    def test_another_student_has_some(self, model, rows, soft):
        loss = distillation_loss(*soft, temperature=2.0, label_share=0.0)
        model.model.layers[1].mlp.down_proj.weight.data += 0.5
        assert loss(model, make_batch(rows, [0, 1])).item() > 1e-3

    def test_the_divergence_can_be_turned_round(self, model, rows, soft):
        states, head = soft
        losses = [
            distillation_loss(states, head * 3, temperature=1.0, label_share=0.0, divergence=way)(model, make_batch(rows, [0]))
            for way in (forward_divergence, reverse_divergence)
        ]
        teacher, student = (states[0] @ head.T * 3).log_softmax(-1), (states[0] @ head.T).log_softmax(-1)
        assert losses[1].item() == pytest.approx((student.exp() * (student - teacher)).sum(-1).mean().item(), rel=1e-3)
        assert losses[0].item() != pytest.approx(losses[1].item(), rel=1e-2)

    def test_with_a_label_share_of_one_it_is_the_plain_loss(self, model, rows, soft):
        batch = make_batch(rows, [0, 1])
        loss = distillation_loss(*soft, temperature=2.0, label_share=1.0)
        assert loss(model, batch).item() == pytest.approx(next_token_loss(model, batch).item(), rel=1e-5)

    def test_it_is_the_divergence_from_the_teacher_times_the_squared_temperature(self, model, rows, soft):
        states, head = soft
        batch, temperature = make_batch(rows, [0]), 3.0
        teacher = (states[0] @ head.T * 1.5 / temperature).softmax(-1)
        student = (states[0] @ head.T / temperature).softmax(-1)
        expected = temperature**2 * (teacher * (teacher / student).log()).sum(-1).mean()
        found = distillation_loss(states, head * 1.5, temperature=temperature, label_share=0.0)(model, batch)
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)

    @pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
    def test_an_impossible_distillation_temperature_is_refused(self, temperature):
        with pytest.raises(TrainingError, match=f"distillation temperature is {temperature}: expected above 0"):
            distillation_loss([], None, temperature=temperature, label_share=0.0)

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_an_impossible_label_share_is_refused(self, share):
        with pytest.raises(TrainingError, match=f"label_share is {share}: expected 0 to 1"):
            distillation_loss([], None, temperature=2.0, label_share=share)


class TestMatching:
    def inner(self, model, rows, layers):
        """The states of some layers, row by row."""
        found = {layer: [] for layer in layers}
        for i in range(len(rows)):
            with torch.no_grad(), inner_states(model, make_batch(rows, [i]), layers) as states:
                answer_states(model, make_batch(rows, [i]))
            for layer in layers:
                found[layer].append(states[layer])
        return found

    def test_inner_states_of_the_last_layer_are_the_final_ones_before_the_norm(self, model, rows):
        batch = make_batch(rows, [0, 2])
        with torch.no_grad(), inner_states(model, batch, [1]) as states:
            final = answer_states(model, batch)
        assert states[1].shape == final.shape
        assert torch.allclose(model.model.norm(states[1]), final, atol=1e-5)

    def test_no_hook_is_left_behind(self, model, rows):
        with inner_states(model, make_batch(rows, [0]), [0, 1]):
            pass
        assert not any(layer._forward_hooks for layer in model.model.layers)

    def test_a_student_whose_layers_are_its_teachers_adds_nothing(self, model, rows):
        batch, wanted = make_batch(rows, [3, 1]), self.inner(model, rows, [0, 1])
        found = matching_loss(wanted, weight=7.0)(model, batch).item()
        assert found == pytest.approx(next_token_loss(model, batch).item(), abs=1e-4)

    def test_opposite_states_add_twice_the_weight(self, model, rows):
        batch, wanted = make_batch(rows, [3, 1]), self.inner(model, rows, [0])
        opposite = {0: [-state for state in wanted[0]]}
        found = matching_loss(opposite, weight=7.0)(model, batch).item()
        assert found - next_token_loss(model, batch).item() == pytest.approx(14.0, abs=1e-3)

    def test_training_by_it_brings_the_layer_nearer(self, model, rows):
        torch.manual_seed(0)
        wanted = {0: [torch.randn_like(state) + 1 for state in self.inner(model, rows, [0])[0]]}
        batch = make_batch(rows, range(len(rows)))
        loss = matching_loss(wanted, weight=10.0, loss=lambda model, batch: answer_states(model, batch).sum() * 0)
        with torch.no_grad():
            before = loss(model, batch).item()
        train(model, rows, TrainingSettings(epochs=6, learning_rate=1e-2, batch_size=4), loss=loss)
        with torch.no_grad():
            assert loss(model, batch).item() < 0.9 * before

    @pytest.mark.parametrize("weight", [0, -1.0, math.nan])
    def test_an_impossible_weight_is_refused(self, weight):
        with pytest.raises(TrainingError, match=f"weight of the matching loss is {weight}: expected above 0"):
            matching_loss({}, weight=weight)


class TestContrastive:
    labels = ("lost", "lost", "lost", "lost", "refund", "refund", "refund", "refund", "other", "other", "other", "other")

    def points(self, model, rows, place):
        """Where each message lies, as the loss sees it."""
        with torch.no_grad():
            states = [answer_states(model, make_batch(rows, [i]))[place] for i in range(len(rows))]
        return torch.nn.functional.normalize(torch.stack(states), dim=1)

    def test_it_is_equation_two_of_the_paper(self, model, rows):
        chosen, place = [0, 1, 4, 5, 8], 2
        points = self.points(model, rows, place)[chosen]
        names = [self.labels[i] for i in chosen]
        terms = []
        for i in range(4):  # the last is alone with its label
            others = [j for j in range(5) if j != i]
            total = sum(math.exp(points[i] @ points[j] / 0.5) for j in others)
            positive = [j for j in others if names[j] == names[i]]
            terms.append(-sum(math.log(math.exp(points[i] @ points[j] / 0.5) / total) for j in positive) / len(positive))
        loss = contrastive_loss(self.labels, place=place, share=1.0, temperature=0.5)
        assert loss(model, make_batch(rows, chosen)).item() == pytest.approx(sum(terms) / 4, rel=1e-4)

    def test_remembered_messages_are_partners_too(self, model, rows):
        alone = contrastive_loss(self.labels, place=2, share=1.0, memory=0)
        alone(model, make_batch(rows, [0]))
        assert alone(model, make_batch(rows, [1])) == 0
        remembering = contrastive_loss(self.labels, place=2, share=1.0)
        remembering(model, make_batch(rows, [0, 4]))
        assert remembering(model, make_batch(rows, [1])).item() > 0

    def test_without_a_share_it_is_the_plain_loss(self, model, rows):
        batch = make_batch(rows, [0, 1, 4])
        found = contrastive_loss(self.labels, place=2, share=0.0)(model, batch).item()
        assert found == pytest.approx(next_token_loss(model, batch).item(), rel=1e-5)

    def test_training_by_it_brings_messages_of_one_label_together(self, model, rows):
        def apart():
            alike = self.points(model, rows, 2) @ self.points(model, rows, 2).T
            same = torch.tensor([[a == b for b in self.labels] for a in self.labels])
            return (alike[same].mean() - alike[~same].mean()).item()

        before = apart()
        loss = contrastive_loss(self.labels, place=2, share=1.0)
        train(model, rows, TrainingSettings(epochs=15, learning_rate=5e-3, batch_size=12), loss=loss)
        assert apart() > before + 0.2

    @pytest.mark.parametrize("settings", [{"share": 1.1}, {"share": -0.1}, {"temperature": 0}, {"temperature": math.nan}])
    def test_impossible_settings_are_refused(self, settings):
        with pytest.raises(TrainingError, match="expected 0 to 1, and above 0"):
            contrastive_loss(self.labels, place=0, **settings)


def test_answers_first_differ_where_they_say():
    assert first_difference([Row([1, 1, 5, 7, 1], 2), Row([9, 5, 7, 2], 1)]) == 2
    assert first_difference([Row([1, 5, 7], 1), Row([1, 6, 7], 1)]) == 0


def test_answers_that_never_differ_end_at_their_last_token():
    assert first_difference([Row([1, 5, 7], 1), Row([1, 5, 7], 1)]) == 1
