"""The command ``consul-prom``, also as ``python -m consul_prom``."""


def main() -> None:
    try:
        from consul_prom.cli.main import commands
    except KeyboardInterrupt:  # click reports it from then on, in the same words
        raise SystemExit("Aborted!") from None
    commands(prog_name="consul-prom")


if __name__ == "__main__":
    main()
