"""What LiteRT's converter refuses; and, where it is installed, that what it writes answers."""

import pytest

from slmops_course.models import ModelError
from slmops_course.runtimes.litert import RECIPES, convert_to_litert, install_litert, open_litert
from slmops_course.runtimes.worker import RuntimesError


@pytest.fixture(scope="module")
def environment(runtimes_folder):
    return install_litert(runtimes_folder / "litert-environment")


def test_what_cannot_be_converted_is_said(tiny_model_folder, tmp_path):
    with pytest.raises(RuntimesError, match="no recipe 'int3' here: expected one of float, int8"):
        convert_to_litert(tiny_model_folder, tmp_path / "out", environment=tmp_path, recipe="int3")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        convert_to_litert(tmp_path, tmp_path / "out", environment=tmp_path)
    with pytest.raises(RuntimesError, match="empty holds no finished installation"):
        convert_to_litert(tiny_model_folder, tmp_path / "out", environment=tmp_path / "empty")
    with pytest.raises(RuntimesError, match="empty holds no finished installation"):
        open_litert(tmp_path, environment=tmp_path / "empty")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_converted_and_answers(environment, tiny_model_folder, tiny_task, tmp_path, recipe):
    out = convert_to_litert(tiny_model_folder, tmp_path / "out", environment=environment, recipe=recipe)
    with open_litert(out, environment=environment) as model:
        reply = model.reply(tiny_task.messages("card"), max_new_tokens=4)
        assert 0 < reply.time_to_first_token_s <= reply.latency_s
        with pytest.raises(RuntimesError, match=r"the prompt has \d+ tokens, and 1024 fit"):
            model.reply(tiny_task.messages("card " * 1000))
