"""Steering: one particle loop (`loop`) with a row for each method (`rows`), on any world and any reward."""

from tiltlib.steer.loop import Look, Method, State, Steered, run, steps
from tiltlib.steer.rows import METHODS

__all__ = ["METHODS", "Look", "Method", "State", "Steered", "run", "steps"]
