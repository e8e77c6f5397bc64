"""What MLX's converter is given, and what it refuses. That it answers as PyTorch does is in test_runtimes_agreement.py."""

import json
import shutil

import pytest

from slmops_course.models import ModelError
from slmops_course.runtimes.mlx import check_mlx, convert_to_mlx, open_mlx
from slmops_course.runtimes.worker import RuntimesError

try:
    check_mlx()
except RuntimesError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
def copied(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "copied")


@pytest.mark.slow
def test_four_bits_are_smaller_and_run_and_the_original_stays(copied, tiny_task, tmp_path):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    out = convert_to_mlx(copied, tmp_path / "four")
    assert (out / "model.safetensors").stat().st_size < len(before["model.safetensors"]) / 4
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert (config["rope_theta"], config["quantization"]["bits"], config["quantization"]["group_size"]) == (10000.0, 4, 32)
    with open_mlx(out) as model:
        assert model.reply(tiny_task.messages("card"), max_new_tokens=4).output_tokens
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied", "four"]


def test_what_cannot_be_converted_is_said_and_leaves_what_was_there(copied, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(RuntimesError, match="no format of 5 bits here: expected one of 32, 16, 8, 4"):
        convert_to_mlx(copied, tmp_path / "out", bits=5)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        convert_to_mlx(tmp_path / "out", tmp_path / "out")
    config = json.loads((copied / "config.json").read_text("utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}), "utf-8")
    with pytest.raises(RuntimesError, match=r"convert_mlx\.py failed on copied .*no_such_type"):
        convert_to_mlx(copied, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
