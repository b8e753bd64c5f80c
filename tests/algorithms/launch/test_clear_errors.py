"""What a user reads when something fails."""

from __future__ import annotations

import pytest
import torch

from algorithms.launch.clear_errors import clear_errors

#: As torch 2.13 says it.
FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 3.00 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
)


def test_a_full_gpu_names_the_settings_that_help(capsys):
    with pytest.raises(SystemExit) as ended, clear_errors():
        raise torch.OutOfMemoryError(FULL)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. Lower learner.micro_batch_tokens or "
        "learner.chunk_tokens, or set learner.gradient_checkpointing=true; a run that is resumed takes them, too. In a "
        "new run, num_envs makes rollouts smaller, and preflight=true plans the memory.\n"
    )


@pytest.mark.parametrize(
    ("error", "helps"), [(OSError("the disk is full"), True), (FloatingPointError("the loss is nan"), False)]
)
def test_resuming_is_offered_where_it_helps(capsys, tmp_path, error, helps):
    (tmp_path / "checkpoints" / "000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000010" / "manifest.json").touch()
    with pytest.raises(SystemExit), clear_errors(tmp_path):
        raise error
    assert ("To go on: python -m algorithms.run resume=" in capsys.readouterr().err) is helps


def test_the_command_to_resume_holds_where_a_path_has_a_blank(capsys, tmp_path):
    run_dir = tmp_path / "my run"
    (run_dir / "checkpoints" / "000010").mkdir(parents=True)
    (run_dir / "checkpoints" / "000010" / "manifest.json").touch()
    with pytest.raises(SystemExit), clear_errors(run_dir):
        raise OSError("the disk is full")
    assert f"python -m algorithms.run resume='{run_dir}'\n" in capsys.readouterr().err


def test_another_error_of_torch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), clear_errors():
        raise RuntimeError("shapes cannot be multiplied")
