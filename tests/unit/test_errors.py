"""The tree of exceptions."""

import inspect
import re

from consul_prom import errors
from consul_prom.errors import AgentError, ConsulPromError, SettingsError


def _classes() -> set[type[ConsulPromError]]:
    found = [member for _, member in inspect.getmembers(errors, inspect.isclass)]
    return {member for member in found if issubclass(member, ConsulPromError)}


def test_drawn_tree_is_the_real_one() -> None:
    """The module's docstring draws every class below its base."""
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"([│├└─ ]*)([A-Z]\w+)(?: {2,}.*)?", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = path[depth - 1] if depth else "Exception"
    assert drawn == {found.__name__: found.__bases__[0].__name__ for found in _classes()}


def test_reasons_are_labels_of_their_own() -> None:
    """Every failure of the agent has a reason that no other has."""
    reasons = [found.reason for found in _classes() if issubclass(found, AgentError)]
    assert len(reasons) == len(set(reasons)) >= 10
    assert all(re.fullmatch(r"[a-z_]+", reason) for reason in reasons)


def test_settings_error_is_a_value_error_that_knows_its_origin() -> None:
    """SettingsError is caught as ValueError, and says whether an argument is to blame."""
    error = SettingsError("port='x' must be a port", from_code=True)
    assert isinstance(error, ValueError)
    assert error.from_code
    assert str(error) == "port='x' must be a port"
