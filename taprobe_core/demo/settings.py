"""The demo's settings: which grade a base trace has."""

from __future__ import annotations

SETTINGS = {"correct_base_solution": True, "incorrect_base_solution": False}
"""The demo's settings, and whether their base traces end in the right answer."""
