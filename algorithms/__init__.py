"""The zoo: one file is one algorithm. The commands stand beside them; the rooms below hold what they share."""

#: The files here that are commands; every other one is an algorithm.
COMMANDS = frozenset({"run", "evaluate", "compare", "show", "ask"})
