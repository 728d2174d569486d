"""What bound propagation says when it cannot continue."""

from certjax.types import Interval
from certjax.walk import Equation


class UnsupportedPrimitive(NotImplementedError):  # noqa: N818  a public name
    """A primitive without a rule, on values that depend on the perturbed input."""


def unsupported(
    equation: Equation, values: list, method: str, why: str = ""
) -> Exception:
    """The error for an equation: the primitive, its operands, the user's line."""
    shapes = ", ".join(
        f"{atom.aval.str_short()}{' (bounded)' if isinstance(value, Interval) else ''}"
        for atom, value in zip(equation.inputs, values, strict=True)
    )
    reason = why or f"there is no {method} rule for it"
    return UnsupportedPrimitive(
        f"cannot bound `{equation.primitive.name}` on {shapes} at {equation.where()}: "
        f"{reason}; rewrite this line with supported operations, or add a rule in "
        f"certjax/bounds/{method}.py"
    )
