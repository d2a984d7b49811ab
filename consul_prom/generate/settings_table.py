"""The table of settings in README and in `consul-prom config settings`."""

from consul_prom.settings.settings import ROWS, Row


def settings_table() -> str:
    """README's table of all settings, in Markdown."""
    lines = ["| Variable | Type | Default | Meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.env}` | {row.kind} | {_default(row)} | {row.help} |" for row in ROWS]
    return "\n".join((*lines, ""))


def _default(row: Row) -> str:
    shown = row.shown or row.default
    return f"`{shown}`" if row.default or "<" in shown else shown
