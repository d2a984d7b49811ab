"""Text of other programs in our messages: one line, printable, short, and without secrets."""

import pytest

from consul_prom.consul.quoting import quote


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No cluster leader", "No cluster leader"),
        (" two\n\tlines ", "two lines"),
        ("\x1b[2Jcleared\0", "\ufffd[2Jcleared\ufffd"),
        ("x" * 300, "x" * 200),
        (" " * 100_000, ""),
        ("", ""),
    ],
)
def test_without_secrets(text: str, shown: str) -> None:
    """Text without a secret in it is one printable line of bounded length."""
    assert quote(text, {"s3cret"}) == shown
    assert quote(text, ()) == shown


def test_secrets_of_all_lengths() -> None:
    """Every length of a secret is hidden, also where the cut falls into it, and the longer of two that overlap."""
    for length in range(1, 300):
        secret = ("0123456789" * 30)[:length]
        assert quote(f"it is {secret} here", {secret, secret[: length // 2]}) in {
            f"it is ***{' here'[:n]}" for n in range(6)
        }
        assert quote("-" * 190 + secret, {secret}) == "-" * 190 + "***"


@pytest.mark.parametrize("text", ["it is a secret", "it is a&#32;secret", "a  secret", "a%20secret", "a+secret"])
def test_white_space(text: str) -> None:
    """A secret with white space is found in a line that was joined, and in an encoded one."""
    assert quote(text, {"a  secret"}) in {"it is ***", "***"}
