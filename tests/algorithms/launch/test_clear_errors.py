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
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. Lower learner.micro_batch_tokens "
        "(training) or num_envs (rollouts), or set learner.gradient_checkpointing=true; preflight=true plans the "
        "memory of a run.\n"
    )


def test_another_error_of_torch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), clear_errors():
        raise RuntimeError("shapes cannot be multiplied")
