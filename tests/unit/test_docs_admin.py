"""docs/admin.md and docs/deployment.md say what is there: configuration, commands, options, files, fields, links.

The stacks are logged in through elsewhere (tests/lab/test_admin_page.py, tests/package/test_admin_page.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Callable, List, Mapping

import pytest
import yaml

from adoptd import config
from adoptd.cli import adoptctl_parser, adoptd_parser
from adoptd.config import Config
from adoptd.doctor.pam import judge_stack
from adoptd.log import JOURNAL_FIELDS
from adoptd.pam_lines import OPTIONS, adopt_lines, lines_of, wrong_options
from documents import DOCS, ROOT, Block, anchors, blocks, files, links, read

PAGE = read("docs/admin.md")
PARSERS: Mapping[str, Callable[[], argparse.ArgumentParser]] = {"adoptd": adoptd_parser, "adoptctl": adoptctl_parser}
PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md"))))


def commands(text: str) -> List[str]:
    """Every command line of ours on a page: lines of shell blocks, and what is in code in the prose."""
    lines = [line for block in blocks(text, "sh", "console", "") for line in block.text.splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", prose)
    parts = [part.strip().lstrip("$# ") for line in lines for part in re.split(r"&&|;", line)]
    return [part.partition("  #")[0].strip() for part in parts if re.match(r"(adoptd|adoptctl) [a-z]", part)]


def parses(command: str) -> bool:
    """Whether the program's own parser takes it; words in capitals and brackets are as a reader would fill them in."""
    words = shlex.split(re.sub(r"[\[\]](?!\S*\]:)|\.\.\.", "", command))
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
        try:
            PARSERS[words[0]]().parse_args(words[1:])
        except SystemExit as end:
            return end.code == 0
    return True


def test_the_check_finds_what_is_wrong() -> None:
    """A command that is not there, and an option that is not, are found."""
    text = (
        "```sh\nadoptctl whereami --json\nadoptctl nonsense\n```\nand `adoptd doctor --no-such-option`, `adoptd.toml`\n"
    )
    assert [(command, parses(command)) for command in commands(text)] == [
        ("adoptctl whereami --json", True),
        ("adoptctl nonsense", False),
        ("adoptd doctor --no-such-option", False),
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/admin.md", "docs/deployment.md", "docs/security.md"])
def test_every_command_line_is_one(page: str) -> None:
    """The programs' own parsers take each."""
    found = commands(read(page))
    assert found or page == "docs/security.md"
    assert [command for command in found if not parses(command)] == []


def toml_blocks() -> List[Block]:
    """Those of all pages that show configuration."""
    return [block for page in PAGES for block in blocks(read(page), "toml")]


@pytest.mark.parametrize("block", toml_blocks(), ids=lambda block: f"{block.heading}-{block.line}")
def test_every_configuration_is_right(block: Block, tmp_path: Path) -> None:
    """As the agent loads it."""
    file = tmp_path / "adoptd.toml"
    file.write_text(block.text, encoding="utf-8")
    assert config.load(file) is not None


def test_every_table_is_shown() -> None:
    """With an example of each."""
    shown = {name for block in blocks(PAGE, "toml") for name in re.findall(r"^\[(\w+)\]$", block.text, re.MULTILINE)}
    assert shown == set(Config.__dataclass_fields__)


def test_every_stack_is_read_without_fault(tmp_path: Path) -> None:
    """The lines are found by the agent's own reading, and none has a word that the module refuses."""
    found = blocks(PAGE, "pam")
    assert len(found) >= 7
    for block in found:
        ((name, text),) = files([block]).items()
        service = Path(name).name
        for included in re.findall(r"(?:@include|include|substack)\s+(\S+)", text):
            (tmp_path / included).write_text("", encoding="utf-8")
        (tmp_path / service).write_text(text, encoding="utf-8")
        ours = adopt_lines(service, tmp_path)
        assert bool(ours) == (service == "sshd")
        assert [fault for line in ours for fault in wrong_options(line)] == []


# What the doctor says of a stack on purpose, as the page tells: whole stacks without a word of it are not here.
MEANT = {
    "Begin by observing": "mode=observe",
    "Administrators without a job": "differ in action_generic_failure",
    "Administrators who are never adopted": "is not asked for those of whom pam_succeed_if.so",
    "The account line alone": "in the account stack only",
}
DEBIAN = {
    "common-auth": "auth [success=1 default=ignore] pam_unix.so nullok\nauth requisite pam_deny.so\n",
    "common-account": "account [success=1 new_authtok_reqd=done default=ignore] pam_unix.so\n"
    "account requisite pam_deny.so\naccount required pam_permit.so\n",
    "common-session": "session required pam_unix.so\nsession optional pam_systemd.so\n",
    "common-password": "password required pam_unix.so\n",
}


@pytest.mark.parametrize("heading", dict.fromkeys(block.heading for block in blocks(PAGE, "pam")))
def test_the_doctor_finds_nothing_that_is_not_meant(heading: str, tmp_path: Path) -> None:
    """Of each stack, on Debian's common files."""
    texts = {**DEBIAN, **files([block for block in blocks(PAGE, "pam") if block.heading == heading])}
    for name, text in texts.items():
        (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
    found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
    assert found
    wrong = [each.seen for each in found if each.grade.name != "OK"]
    assert [seen for seen in wrong if MEANT.get(heading, "\0") not in seen] == []
    assert bool(wrong) == (heading in MEANT)


def test_options_and_defaults_are_the_modules() -> None:
    """The table of what to decide on."""
    described = read("docs/man/pam_options.txt")
    rows = re.findall(r"^\| `(action_\w+)` \| `(\w+)`.*\|.*`(\w+)`.*\|$", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == {"action_generic_failure", "action_adopt_failure", "action_unknown"}
    for name, default, closed in rows:
        assert f"\n{name} ({default}):" in described
        assert OPTIONS[name][0](closed)


def test_journal_fields_are_the_logs() -> None:
    """All that have names of their own, and no other."""
    table = PAGE[PAGE.index("| field | |") :].split("\n\n")[0]
    named = set(re.findall(r"`([A-Z_]+)`", table)) - {"ADOPTD_"}
    assert named == {*JOURNAL_FIELDS.values(), "ADOPTD_EVENT"}


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    """By promtool; its job is the one that the alerts ask for, its port the metrics', its rules the package's."""
    (block,) = blocks(PAGE, "yaml")
    file = tmp_path / "prometheus.yml"
    file.write_text(block.text, encoding="ascii")
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = yaml.safe_load(block.text)
    (job,) = shown["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in read("dashboards/alerts.yml")
    targets = job["static_configs"][0]["targets"]
    assert {int(target.rpartition(":")[2]) for target in targets} == {Config().metrics.port}
    assert [(ROOT / "dashboards" / Path(name).name).exists() for name in shown["rule_files"]] == [True, True]


def test_the_firewall_rules_are_nftables_own(tmp_path: Path) -> None:
    """nft takes them, in a chain such as the page speaks of; and they let in both IP versions."""
    (block,) = blocks(PAGE, "nft")
    file = tmp_path / "rules"
    head = "table inet filter {\nchain input {\ntype filter hook input priority filter; policy accept;\n"
    file.write_text(f"{head}{block.text}\n}}\n}}\n", encoding="ascii")
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") or "nft"
    done = subprocess.run(
        ["unshare", "--net", nft, "--check", "--file", file], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    port = str(Config().callerid.port)
    assert [line.split()[:3] for line in block.text.splitlines()[1:]] == [["tcp", "dport", port]] * 3
    assert {"ip", "ip6"} <= set(block.text.split())


def test_ports_and_units_are_those_of_the_code() -> None:
    """Figures that a firewall is made from."""
    settings = Config()
    assert f"| TCP {settings.callerid.port}, `[callerid] port` |" in PAGE
    assert f"| TCP {settings.metrics.port}, `[metrics] port` |" in PAGE
    for unit in re.findall(r"\b(adoptd[\w-]*\.(?:socket|service))\b", PAGE):
        assert (ROOT / "packaging/systemd" / unit).exists(), unit
    assert f"adoptd_{_version()}_" in PAGE


def _version() -> str:
    from adoptd import __version__

    return __version__


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    """To a file of the clone, and to a heading of it where one is named."""
    for link in links(read(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
