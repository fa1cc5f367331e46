"""A kind of sentence -> its surface forms, tag, summary and what it depends on.

Each kind has two or three forms, some alike and some not, so that a resampled sentence may say the
same in other words and the similarity filter has work to do. Kinds that matter share their forms
with kinds that do not: a plan with its reminders, an approval with a nod, an alarm with a doubt.
When a kind is spoken belongs in `rules`. Invariants: forms of one kind carry the same numbers; no
two kinds that may stand at the same place share a form, so the text so far tells what was decided;
every sentence has 10 characters or more and exactly one closing mark, at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of sentence.

    Attributes:
        tag: the dataset's function tag.
        summary: two to four words.
        uses: kinds, or what they provide, whose latest sentence it depends on.
        paragraph: probability that it opens a paragraph.
        forms: surface forms, equally likely.
    """

    tag: str
    summary: str
    uses: tuple[str, ...]
    paragraph: float
    forms: tuple[str, ...]


def _computation(summary: str, uses: str, paragraph: float, *forms: str) -> Kind:
    return Kind("active_computation", summary, tuple(uses.split()), paragraph, forms)


def _reminder(plan: str, forms: tuple[str, ...]) -> Kind:
    return Kind("plan_generation", f"recall: {plan}", ("plan",), 0.4, forms)


_FIRST = "setup plan wait_slip"

_PRODUCTS = (
    "I will do the products first and then the sums.",
    "The plan is to multiply before adding.",
)
_IN_ORDER = (
    "I will work from left to right.",
    "The plan is to take everything in the order it is written.",
)
_APPROVAL = ("That looks right.", "Everything is consistent.", "Yes, all of this is fine.")
_CHECK = ("Let me check the steps once more.", "I should look at this again.")

KINDS: dict[str, Kind] = {
    "setup": Kind(
        "problem_setup",
        "restate the problem",
        (),
        0.0,
        (
            "We need z, where {givens}.",
            "We want z, and here {givens}.",
            "So I need z, where {givens}.",
        ),
    ),
    "facts": Kind(
        "fact_retrieval",
        "lines build on lines",
        ("setup",),
        0.3,
        (
            "Each line needs the value of the line above it.",
            "The value of y follows from x, and z follows from y.",
        ),
    ),
    "opening": Kind(
        "unknown",
        "begin the work",
        (),
        0.3,
        ("Okay, let me go step by step.", "Alright, this should not take long."),
    ),
    "more": Kind(
        "unknown",
        "say what is asked",
        (),
        0.2,
        ("There are three lines to work out.", "Only the value of z is asked for."),
    ),
    "doubt": Kind(
        "uncertainty_management",
        "unsure about order",
        ("setup",),
        0.5,
        ("Hmm, which order is right?", "Wait, how do I read this?"),
    ),
    "plan_products": Kind(
        "plan_generation",
        "plan: products first",
        ("setup",),
        0.7,
        _PRODUCTS,
    ),
    "plan_in_order": Kind(
        "plan_generation",
        "plan: left to right",
        ("setup",),
        0.7,
        _IN_ORDER,
    ),
    "x_product": _computation(
        "product in x",
        _FIRST,
        0.4,
        "First, {left} * {right} = {result}.",
        "Multiplying {left} by {right} gives {result}.",
    ),
    "x_sum": _computation(
        "sum in x",
        _FIRST,
        0.4,
        "First, {left} + {right} = {result}.",
        "Adding {left} and {right} gives {result}.",
    ),
    "x_from_product": _computation(
        "value of x",
        "setup x_product",
        0.2,
        "Then {left} + {right} = {result}.",
        "And then {left} + {right} = {result}.",
    ),
    "x_from_sum": _computation(
        "value of x",
        "setup x_sum",
        0.2,
        "Then {left} * {right} = {result}.",
        "And then {left} * {right} = {result}.",
    ),
    "conclusion": Kind(
        "result_consolidation",
        "state x",
        ("x",),
        0.2,
        ("So we have x = {result}.", "This means that x is {result}."),
    ),
    "bridge": Kind(
        "unknown", "turn to z", (), 0.7, ("Now for the second part.", "Good, on to the rest.")
    ),
    "nod": Kind("self_checking", "x looks right", ("x",), 0.1, _APPROVAL),
    "reminder_y_products": _reminder("products first", _PRODUCTS),
    "reminder_y_in_order": _reminder("left to right", _IN_ORDER),
    "reminder_z_products": _reminder("products first", _PRODUCTS),
    "reminder_z_in_order": _reminder("left to right", _IN_ORDER),
    "y": _computation(
        "value of y",
        "setup x",
        0.5,
        "Next, y = {left} - {right} = {result}.",
        "Next, I get y = {left} - {right} = {result}.",
    ),
    "z_product": _computation(
        "product in z",
        "setup plan",
        0.3,
        "For z, {left} * {right} = {result}.",
        "And for z, {left} * {right} = {result}.",
    ),
    "z_sum": _computation(
        "sum in z",
        "setup plan y",
        0.3,
        "For z, {left} + {right} = {result}.",
        "And for z, {left} + {right} = {result}.",
    ),
    "z_from_product": _computation(
        "value of z",
        "y z_product",
        0.2,
        "This gives z = {left} + {right} = {result}.",
        "This then gives z = {left} + {right} = {result}.",
    ),
    "z_from_sum": _computation(
        "value of z",
        "setup z_sum",
        0.2,
        "This gives z = {left} * {right} = {result}.",
        "This then gives z = {left} * {right} = {result}.",
    ),
    "check": Kind(
        "self_checking",
        "check the steps",
        ("z",),
        0.7,
        _CHECK,
    ),
    "wait_order": Kind(
        "uncertainty_management",
        "order was wrong",
        ("plan", "check"),
        0.7,
        ("Wait, products come before sums.", "Wait, left to right was the wrong order."),
    ),
    "wait_slip": Kind(
        "uncertainty_management",
        "product was wrong",
        ("x_product", "z_product", "check"),
        0.7,
        ("Wait, {left} * {right} is not {shown}.", "Hold on, {shown} is not {left} * {right}."),
    ),
    "alarm": Kind(
        "uncertainty_management",
        "doubt the order",
        ("plan", "check"),
        0.7,
        ("Hmm, which order is right?", "Wait, how do I read this?"),
    ),
    "stay": Kind(
        "uncertainty_management",
        "keep the order",
        ("alarm",),
        0.1,
        ("No, the order was fine.", "No, I can keep this result."),
    ),
    "move": Kind(
        "plan_generation",
        "switch to left-to-right",
        ("alarm",),
        0.1,
        _IN_ORDER,
    ),
    "approval": Kind(
        "self_checking",
        "steps look right",
        ("check",),
        0.1,
        _APPROVAL,
    ),
    "second_check": Kind("self_checking", "check once more", ("check", "z"), 0.7, _CHECK),
    "second_approval": Kind("self_checking", "still right", ("second_check",), 0.1, _APPROVAL),
    "recap": Kind(
        "result_consolidation",
        "recall the lines",
        ("x", "y", "z"),
        0.5,
        ("All three lines are done now.", "This was the last of the three lines."),
    ),
    "answer": Kind(
        "final_answer_emission",
        "give the answer",
        ("z",),
        0.8,
        ("So the answer is {result}.", "Therefore, z is {result} in the end."),
    ),
}
"""Every kind of sentence, by name."""

_PROVIDES = {
    **dict.fromkeys(("plan_products", "plan_in_order", "wait_order", "move"), "plan"),
    **dict.fromkeys(("x_from_product", "x_from_sum"), "x"),
    **dict.fromkeys(("z_from_product", "z_from_sum"), "z"),
}
"""What a kind gives to later sentences, where several kinds give the same."""


def dependencies(kinds: Sequence[str]) -> list[tuple[int, ...]]:
    """Return, per sentence, the ascending indices of the earlier sentences that it uses."""
    latest: dict[str, int] = {}
    found = []
    for index, kind in enumerate(kinds):
        found.append(tuple(sorted({latest[use] for use in KINDS[kind].uses if use in latest})))
        latest[_PROVIDES.get(kind, kind)] = index
    return found
