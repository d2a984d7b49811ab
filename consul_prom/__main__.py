"""The command ``consul-prom``, also as ``python -m consul_prom``."""

from consul_prom.cli import commands


def main() -> None:
    commands(prog_name="consul-prom")


if __name__ == "__main__":
    main()
