"""Where the numbers of a run go, by name: `logger=[jsonl,tensorboard,wandb]`. A logger of one's own is one file."""

from algorithms.training.loggers.base import LOGGERS, Logger
from algorithms.training.loggers.jsonl import JsonLines
from algorithms.training.loggers.tensorboard import TensorBoard
from algorithms.training.loggers.wandb import WeightsAndBiases

__all__ = ["LOGGERS", "JsonLines", "Logger", "TensorBoard", "WeightsAndBiases"]
