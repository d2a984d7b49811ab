"""What the agent answers when it does not do what was asked."""


class Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Unsupported(Refused):
    """Consul could do it and this agent cannot: said aloud, so that nothing is silently ignored."""

    def __init__(self, what: str) -> None:
        super().__init__(501, f"The dev agent does not support {what}")
