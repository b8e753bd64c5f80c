"""A run names the kernels of attention, as they are and not as one hopes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_learner import make_decoder
from toy_policy import make_policy
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms.rollout.attention_kernels import attention_kernels, in_words

PHASES = ("training", "prefill", "decode")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("allowed", "name"), [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")])
def test_the_kernel_that_torch_is_told_to_use(allowed, name, precision):
    for model in (make_policy("whole"), make_decoder(LlamaForCausalLM, LlamaConfig)):  # the second one is folded
        with sdpa_kernel(allowed):
            assert attention_kernels(model, precision) == dict.fromkeys(PHASES, name)


def test_an_attention_of_another_kind():
    model = make_policy("whole")
    model.set_attn_implementation("eager")
    assert attention_kernels(model, "float32") == dict.fromkeys(PHASES, "eager")


def test_nothing_is_left_behind():
    model = make_policy("whole")
    attention_kernels(model, "float32")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_in_words():
    assert in_words(dict.fromkeys(PHASES, "flash")) == "attention by flash"
    mixed = {"training": "flash", "prefill": "efficient", "decode": "math"}
    assert in_words(mixed) == "attention by flash in training, efficient in prefill, math in decode"
