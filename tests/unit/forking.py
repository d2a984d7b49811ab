"""Something that is done in a forked child."""

import os
from collections.abc import Callable


def in_child(act: Callable[[], object]) -> None:
    """Call *act* in a child, which then ends at once; AssertionError where that raised."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:  # noqa: BLE001  # the child must never return into the tests
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
