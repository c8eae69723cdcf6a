"""docs/deployment.md: the playbook is YAML of Ansible's shape, and what it makes of Debian's stack is right.

Ansible itself is not run: of its modules lineinfile is carried out here as its documentation describes it, and its
templates by the few expressions that the playbook has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, List, Mapping

import pytest
import yaml

from adoptd import config
from adoptd.doctor.pam import judge_stack
from adoptd.pam_lines import adopt_lines, lines_of, wrong_options
from documents import ROOT, blocks, read

PAGE = read("docs/deployment.md")
DENY = "action_generic_failure=deny action_adopt_failure=deny"
# Debian 12's own, comments left out; the includes are its common files.
SSHD = """\
@include common-auth
account    required     pam_nologin.so
@include common-account
session    required     pam_loginuid.so
session    optional     pam_keyinit.so force revoke
@include common-session
session    optional     pam_mail.so standard noenv # [1]
session    required     pam_limits.so
@include common-password
"""
COMMON = {
    "common-auth": "auth [success=1 default=ignore] pam_unix.so nullok\nauth requisite pam_deny.so\n",
    "common-account": "account [success=1 new_authtok_reqd=done default=ignore] pam_unix.so\n"
    "account requisite pam_deny.so\naccount required pam_permit.so\n",
    "common-session": "session required pam_unix.so\nsession optional pam_systemd.so\n",
    "common-password": "password required pam_unix.so\n",
}
KEYWORDS = frozenset(
    {"name", "notify", "tags", "register", "changed_when", "failed_when", "loop", "when", "become", "vars"}
)


def play() -> Dict[str, Any]:
    """The only play of the only playbook."""
    (block,) = blocks(PAGE, "yaml")
    (found,) = yaml.safe_load(block.text)
    assert isinstance(found, dict)
    return found


def module_of(task: Mapping[str, Any]) -> str:
    """The one word of a task that is not Ansible's own."""
    (name,) = [word for word in task if word not in KEYWORDS]
    return name


def test_the_play_is_of_ansibles_shape() -> None:
    """Names, hosts, batches, modules by their full names; handlers that are notified are there."""
    found = play()
    assert {"name", "hosts", "serial", "tasks", "handlers", "vars"} <= set(found)
    assert found["max_fail_percentage"] == 0
    notified = {task["notify"] for task in found["tasks"] if "notify" in task}
    assert notified == {handler["name"] for handler in found["handlers"]}
    for task in [*found["tasks"], *found["handlers"]]:
        assert task["name"]
        assert re.fullmatch(r"ansible\.builtin\.\w+", module_of(task))
    tags = {task["tags"] for task in found["tasks"]}
    used = re.findall(r"--tags (\S+)", PAGE)
    assert {word.rstrip("`") for words in used for word in words.split(",")} == tags


def test_it_checks_what_it_writes(tmp_path: Path) -> None:
    """The configuration is right, and units are those of the package."""
    tasks = {module_of(task): task for task in play()["tasks"]}
    file = tmp_path / "adoptd.toml"
    file.write_text(tasks["ansible.builtin.copy"]["ansible.builtin.copy"]["content"], encoding="utf-8")
    assert config.load(file).seal.scheme == "munge"
    for unit in tasks["ansible.builtin.systemd"]["loop"]:
        assert (ROOT / "packaging/systemd" / unit).exists()


def templated(text: str, mode: str, options: str) -> str:
    """The expressions of the playbook, evaluated; any other is an error."""
    found = play()["vars"]
    words = f"{options}{' mode=observe' if mode == 'observe' else ''}".strip()
    known = {
        "adoptd_pam_file": found["adoptd_pam_file"],
        "adoptd_control": found["adoptd_control"],
        "adoptd_words": words,
        "'absent' if adoptd_mode == 'off' else 'present'": "absent" if mode == "off" else "present",
    }
    return re.sub(r"\{\{ (.*?) \}\}", lambda match: known[match[1]], text)


def lineinfile(text: str, arguments: Mapping[str, str]) -> str:
    """ansible.builtin.lineinfile: the last line that matches is replaced, else one is added; absent removes all."""
    lines = text.splitlines()
    matching = [index for index, line in enumerate(lines) if re.search(arguments["regexp"], line)]
    if arguments["state"] == "absent":
        lines = [line for index, line in enumerate(lines) if index not in matching]
    elif matching:
        lines[matching[-1]] = arguments["line"]
    elif arguments["insertafter"] == "EOF":
        lines.append(arguments["line"])
    else:
        after = [index for index, line in enumerate(lines) if re.search(arguments["insertafter"], line)]
        lines.insert(after[-1] + 1, arguments["line"])
    return "\n".join(lines) + "\n"


def applied(text: str, mode: str, options: str = "") -> str:
    """The stack after the playbook ran."""
    for task in play()["tasks"]:
        if module_of(task) == "ansible.builtin.lineinfile":
            arguments = task["ansible.builtin.lineinfile"]
            text = lineinfile(text, {name: templated(value, mode, options) for name, value in arguments.items()})
    return text


@pytest.mark.parametrize(("mode", "options"), [("observe", ""), ("enforce", ""), ("enforce", DENY), ("observe", DENY)])
def test_the_stack_it_makes(mode: str, options: str, tmp_path: Path) -> None:
    """One account line behind the include, the session line last, options that the module takes; twice is once."""
    for name, text in COMMON.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    made = applied(SSHD, mode, options)
    assert applied(made, mode, options) == made
    (tmp_path / "sshd").write_text(made, encoding="utf-8")
    ours = adopt_lines("sshd", tmp_path)
    assert [line.kind for line in ours] == ["account", "session"]
    assert [fault for line in ours for fault in wrong_options(line)] == []
    stack = lines_of("sshd", tmp_path)
    for kind in ("account", "session"):
        assert [line.module for line in stack if line.kind == kind][-1] == "pam_adopt.so"
    assert ("mode=observe" in ours[0].options) == (mode == "observe")
    assert set(options.split()) <= set(ours[0].options)
    worst: List[str] = [f.seen for f in judge_stack("sshd", tmp_path / "sshd", stack) if f.grade.name == "FAILURE"]
    assert worst == []


def test_back_is_where_it_came_from() -> None:
    """Off after on leaves Debian's file as it was."""
    for mode in ("observe", "enforce"):
        assert applied(applied(SSHD, mode, DENY), "off") == SSHD


def test_every_metric_is_one() -> None:
    """With labels that it has, by the page that is made from the code."""
    metrics = read("docs/metrics.md")
    queries = "\n".join(block.text for block in blocks(PAGE, "promql"))
    names = set(re.findall(r"\badoptd_\w+", queries))
    assert len(names) >= 5
    for name in names:
        assert f"`{name}`" in metrics, name
    for value in re.findall(r'\w+="(\w+)"', queries):
        assert f"`{value}`" in metrics, value
    for label in re.findall(r"by \(([^)]*)\)", queries):
        for word in (each.strip() for each in label.split(",")):
            assert word in ("instance", "le") or f"| `{word}` |" in metrics, word


def test_what_is_counted_is_not_summed() -> None:
    """Of the series that are 0 the sum is 0, however many there are."""
    queries = "\n".join(block.text for block in blocks(PAGE, "promql"))
    assert "count(adoptd_probe_attached == 0)" in queries
    assert not re.search(r"sum\b[^\n]*== 0", queries)
