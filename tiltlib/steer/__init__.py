"""Steering: one particle loop (`loop`) with a row for each method (`rows`), on any world and any reward."""

from tiltlib.steer.loop import Look, Method, State, Steered, run, steps
from tiltlib.steer.rollover import Rolled, rollover_budget
from tiltlib.steer.rows import METHODS
from tiltlib.steer.search import Refined, Searched, Tree, refine, tree_search

__all__ = [
    "METHODS",
    "Look",
    "Method",
    "Refined",
    "Rolled",
    "Searched",
    "State",
    "Steered",
    "Tree",
    "refine",
    "rollover_budget",
    "run",
    "steps",
    "tree_search",
]
