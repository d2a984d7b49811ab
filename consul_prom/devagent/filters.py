"""The filter expressions that consul-prom sends: equality and membership, joined by `and`.

Source: https://developer.hashicorp.com/consul/api-docs/features/filtering
"""

import re
from collections.abc import Callable
from typing import Any

from consul_prom.devagent.errors import Unsupported

Predicate = Callable[[dict[str, Any]], bool]

_SELECTOR = r'(?P<selector>[A-Za-z]\w*(?:\.[A-Za-z]\w*|\["[^"]*"\])*)'
_VALUE = r'"(?P<value>[^"\\]*)"'
_EQUAL = re.compile(rf"\s*{_SELECTOR}\s*==\s*{_VALUE}\s*", re.ASCII)
_CONTAINS = re.compile(rf"\s*{_SELECTOR}\s+contains\s+{_VALUE}\s*", re.ASCII)
_IN = re.compile(rf"\s*{_VALUE}\s+in\s+{_SELECTOR}\s*", re.ASCII)
_AND = re.compile(r"(?<=\s)and(?=\s)")
_STEP = re.compile(r'\w+|\["([^"]*)"\]')


def compiled(expression: str, *, selectors: frozenset[str]) -> Predicate:
    """What the expression says of a document; `selectors` are the document's keys that it may name."""
    matches: list[Predicate] = []
    position = 0
    while position < len(expression):
        if matches:
            joint = _AND.match(expression, position)
            if joint is None:
                raise Unsupported(f"the filter {expression}")
            position = joint.end()
        match, position = _match(expression, position, selectors)
        matches.append(match)
    return lambda document: all(match(document) for match in matches)


def _match(expression: str, position: int, selectors: frozenset[str]) -> tuple[Predicate, int]:
    for pattern, test in ((_EQUAL, _equal), (_CONTAINS, _contains), (_IN, _contains)):
        if found := pattern.match(expression, position):
            path = [step[1] or step[0] for step in _STEP.finditer(found["selector"])]
            if path[0] in selectors and len(path) == 1 + (path[0] == "Meta"):
                return test(path, found["value"]), found.end()
    raise Unsupported(f"the filter {expression}")


def _equal(path: list[str], value: str) -> Predicate:
    return lambda document: _at(document, path) == value


def _contains(path: list[str], value: str) -> Predicate:
    return lambda document: value in (_at(document, path) or ())


def _at(document: dict[str, Any], path: list[str]) -> Any:
    for step in path[:-1]:
        document = document[step]
    return document.get(path[-1])
