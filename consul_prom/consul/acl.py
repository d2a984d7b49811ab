"""The ACL rules that error messages and generated policies name."""


def write_rule(name: str) -> str:
    """What a worker's token needs, and a command's; it implies reading."""
    return f'service "{name}" {{ policy = "write" }}'
