"""A real Prometheus server, and promtool."""

import http.client
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import yaml

from tests.services.binaries import require
from tests.services.program import Program

HASTY: Final = ("--scrape.discovery-reload-interval=500ms",)
"""Flags with which new targets are taken up at once; without, Prometheus gathers changes for 5 s."""


class PromtoolRefusal(AssertionError):
    """promtool found a configuration wrong; the message is its output."""


class Prometheus(Program):
    """`prometheus`, at :9090 of an address of its own, with an empty database.

    *scrape* is a list of scrape configurations or a whole configuration, as data or as YAML text. *interval* is the
    scrape and evaluation interval unless the configuration has its own. *flags* go to the command line.
    """

    name = "prometheus"

    def __init__(
        self,
        scrape: str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
        *,
        interval: str = "1s",
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        address: str | None = None,
        binary: Path | None = None,
    ) -> None:
        super().__init__(address=address, binary=binary, env=env)
        self.config = _whole_config(scrape, interval=interval)
        self.url = f"http://{self.address}:9090"
        self._flags = flags

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The samples of an instant query, each `{"metric": …, "value": [time, text]}`.

        ValueError with Prometheus' words if it refuses the query.
        """
        data = self._api("query", query=promql)
        if data["resultType"] in ("scalar", "string"):
            return [{"metric": {}, "value": data["result"]}]
        samples: list[dict[str, Any]] = data["result"]
        return samples

    def query_value(self, promql: str) -> float | None:
        """The value of a query that has one sample, None if it has no sample, ValueError if it has more."""
        samples = self.query(promql)
        if len(samples) > 1:
            raise ValueError(f"{promql} has {len(samples)} samples: {samples}")
        return float(samples[0]["value"][1]) if samples else None

    def targets(self) -> list[dict[str, Any]]:
        """The active targets, with `labels`, `discoveredLabels`, `scrapeUrl`, `health`, `lastError` and others."""
        active: list[dict[str, Any]] = self._api("targets", state="active")["activeTargets"]
        return active

    def _api(self, what: str, **parameters: str) -> dict[str, Any]:
        status, answer = self.call(f"/api/v1/{what}?{urlencode(parameters)}")
        if status != 200:
            raise ValueError(f"{parameters}: {answer['error'] if isinstance(answer, dict) else answer}")
        data: dict[str, Any] = answer["data"]
        return data

    def _arguments(self) -> Sequence[str]:
        file = self.directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return [
            f"--config.file={file}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={self.address}:9090",
            "--log.level=warn",
            *self._flags,
        ]

    def _ready(self) -> bool:
        try:
            return self.call("/-/ready", timeout=2.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False


def promtool_check_config(text: str) -> None:
    """Let `promtool check config` read the text; PromtoolRefusal if it is wrong."""
    _promtool("check", "config", files={"prometheus.yml": text})


def promtool_check_rules(text: str) -> None:
    """Let `promtool check rules` read the text, and lint it; PromtoolRefusal if it is wrong."""
    _promtool("check", "rules", "--lint=all", "--lint-fatal", files={"rules.yml": text})


def promtool_test_rules(text: str, *tests: Mapping[str, Any]) -> None:
    """Let `promtool test rules` run *tests*, as in its `tests:`, on rules; PromtoolRefusal if one fails."""
    cases = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "fuzzy_compare": True, "tests": list(tests)}
    _promtool("test", "rules", files={"tests.yml": yaml.safe_dump(cases), "rules.yml": text})


def _promtool(*arguments: str, files: Mapping[str, str]) -> None:
    """With the first of *files*; the others lie beside it."""
    promtool = require("promtool")
    with tempfile.TemporaryDirectory(prefix="promtool-") as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text)
        command = [str(promtool), *arguments, next(iter(files))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise PromtoolRefusal(done.stdout + done.stderr)


def _whole_config(scrape: str | Sequence[Mapping[str, Any]] | Mapping[str, Any], *, interval: str) -> dict[str, Any]:
    data = yaml.safe_load(scrape) if isinstance(scrape, str) else scrape
    config: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"scrape_configs": list(data)}
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval, **config.get("global", {})}
    return config
