"""Play the environment in a terminal: you are the agent.

python -m agentic_rag_env.play --seed 0
python -m agentic_rag_env.play --dataset '{"name": "jsonl", "questions": "questions.jsonl", "corpus": "corpus.jsonl"}'
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from agentic_rag_env.actions import CLOSING_TAGS, Malformed, parse_action
from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.episode import FINAL_TURNS
from agentic_rag_env.registry import name_or_mapping
from agentic_rag_env.terminal import print_line, printable, rich_console, run_command
from agentic_rag_env.types import StepInfo

HELP = """\
Answer the question. Search as often as you have turns, then answer:
  search: words to look for
  answer: your answer
Tags work too: <search> words </search>, <answer> answer </answer>. Ctrl-D leaves.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Play until the player leaves or the episodes are over, then print the score.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0, or 2 where a setting can't work.
    """
    return run_command(lambda: _play(_parser().parse_args(arguments)))


def _play(options: argparse.Namespace) -> None:
    console = rich_console("Playing in a terminal")
    env = AgenticRAGEnv(
        dataset=options.dataset,
        retriever=options.retriever,
        max_turns=options.max_turns,
        top_k=options.top_k,
        final_turn=options.final_turn,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")  # the game goes on whatever is typed or piped in
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets the player edit the line
    _show(console, HELP, "dim")
    finished: list[StepInfo] = []
    seed = options.seed
    try:
        while len(finished) != options.episodes:
            finished.append(play_episode(env, _read_line, console, seed))
            seed = None
    except (EOFError, KeyboardInterrupt):
        _show(console, "\n")
    _show(console, score_line(finished) + "\n", "bold")


def play_episode(
    env: AgenticRAGEnv, read_line: Callable[[str], str], console: Any, seed: int | None = None
) -> StepInfo:
    """Ask one question and play it to the end.

    Args:
        env: The environment.
        read_line: Shows a prompt and returns the line that the player types, like `input`.
        console: The console of rich to write to.
        seed: Seed for `reset`.

    Returns:
        The info of the last step.

    Raises:
        EOFError: The player left.
    """
    prompt, info = env.reset(seed=seed)
    _show(console, f"\nQuestion: {prompt}", "bold cyan")
    over = False
    while not over:
        last = info["turn"] == env.rules.max_turns
        turns = "last turn: answer" if last else f"turn {info['turn'] + 1} of {env.rules.max_turns}"
        forced = last and env.rules.final_turn == "forced"
        text = expand(read_line(f"[{turns}] "), forced)
        observation, _, terminated, truncated, info = env.step(text)
        over = terminated or truncated
        action = parse_action(text)
        if info["action"] == "malformed" and isinstance(action, Malformed):
            _show(console, f"No action in that: {action.reason}. ", "yellow")
        _show(console, observation)
    _show(console, _verdict(env, info) + "\n", "bold")
    return info


def expand(line: str, forced: bool = False) -> str:
    """Turn the shortcuts `search: ...` and `answer: ...` into tags; other text stays as it is.

    Args:
        line: The line that the player typed.
        forced: Whether the environment has already written `<answer>`, so that a line without tags is the answer.
    """
    word, colon, content = line.strip().partition(":")
    word = word.strip().lower()
    if forced:
        content = content if colon and word == "answer" else line
        return line if any(tag in line for tag in CLOSING_TAGS) else f" {content.strip()} </answer>"
    if colon and word in ("search", "answer"):
        return f"<{word}> {content.strip()} </{word}>"
    return line


def score_line(finished: Sequence[StepInfo]) -> str:
    """The score of the finished episodes in one line."""
    if not finished:
        return "No question finished."
    correct = sum(info["correct"] for info in finished)
    f1 = sum(info["f1"] for info in finished) / len(finished)
    searches = sum(info["num_searches"] for info in finished) / len(finished)
    return f"Score: {correct} of {len(finished)} correct, F1 {f1:.2f}, {searches:.1f} searches per question."


def _verdict(env: AgenticRAGEnv, info: StepInfo) -> str:
    question = env.question
    assert question is not None
    golden = " / ".join(question.golden_answers)
    if info["correct"]:
        return f"Correct: {golden}"
    if info["error"]:
        return f"The search failed: {info['error']}"
    if info["answer"] is None:
        return f"Out of turns. The answer: {golden}"
    return f"Not quite (F1 {info['f1']:.2f}). The answer: {golden}"


def _read_line(prompt: str) -> str:
    line = input(prompt)
    if not sys.stdin.isatty():
        print_line(line)  # a terminal echoes by itself
    return line


def _show(console: Any, text: str, style: str = "") -> None:
    console.print(printable(text, console.encoding), style=style or None, end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agentic_rag_env.play", description="Play the environment yourself."
    )
    name_help = "registered name, or a JSON object with 'name' and settings (default: %(default)s)"
    parser.add_argument("--dataset", type=name_or_mapping, default="tiny", help=name_help)
    parser.add_argument("--retriever", type=name_or_mapping, default="bm25", help=name_help)
    parser.add_argument("--seed", type=int, help="seed of the questions (default: different every time)")
    parser.add_argument("--episodes", type=int, help="questions to play (default: until Ctrl-D)")
    parser.add_argument("--max-turns", type=int, default=4, help="turns that may search (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=3, help="passages per search (default: %(default)s)")
    parser.add_argument(
        "--final-turn", choices=FINAL_TURNS, default="no_search", help="the turn after those (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
