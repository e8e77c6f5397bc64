"""What ExecuTorch's export refuses. That the program answers as PyTorch does is in test_runtimes_agreement.py."""

import pytest

from slmops_course.models import ModelError
from slmops_course.runtimes.executorch import convert_to_executorch, install_executorch, open_executorch
from slmops_course.runtimes.worker import RuntimesError


@pytest.fixture(scope="module")
def environment(runtimes_folder):
    return install_executorch(runtimes_folder / "executorch-environment")


@pytest.mark.slow
def test_four_bits_are_smaller_and_run(environment, tiny_model_folder, tiny_task, tmp_path):
    out = convert_to_executorch(tiny_model_folder, tmp_path / "four", environment=environment, bits=4, cache_tokens=200)
    weights = (tiny_model_folder / "model.safetensors").stat().st_size
    assert (out / "model.pte").stat().st_size < weights
    with open_executorch(out, environment=environment) as model:
        assert model.reply(tiny_task.messages("card"), max_new_tokens=4).output_tokens
        with pytest.raises(RuntimesError, match=r"the prompt has \d+ tokens, and 200 fit"):
            model.reply(tiny_task.messages("card " * 200))
        assert model.reply(tiny_task.messages("card"), max_new_tokens=4).output_tokens
    assert [path.name for path in tmp_path.iterdir()] == ["four"]


def test_what_cannot_be_exported_is_said_and_leaves_what_was_there(tiny_model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(RuntimesError, match="no format of 16 bits here: expected one of 32, 4"):
        convert_to_executorch(tiny_model_folder, tmp_path / "out", environment=tmp_path, bits=16)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        convert_to_executorch(tmp_path / "out", tmp_path / "out", environment=tmp_path)
    with pytest.raises(RuntimesError, match="nothing-there holds no finished installation"):
        convert_to_executorch(tiny_model_folder, tmp_path / "out", environment=tmp_path / "nothing-there")
    with pytest.raises(RuntimesError, match="nothing-there holds no finished installation"):
        open_executorch(tmp_path, environment=tmp_path / "nothing-there")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
