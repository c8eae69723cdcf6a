"""The PAM lines as the agent's tools read them, against what the module itself accepts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import List, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adoptd.pam_lines import OPTIONS, AccountAlone, PamLine, adopt_lines, is_for, wrong_options

HOOK = Path(__file__).resolve().parents[2] / "pam_hook"

# For each argument whether options.c takes it, one character each.
DRIVER = r"""
#include <stdio.h>
#include "options.h"
#include "report.h"
void report(pam_handle_t *pamh, unsigned threshold, enum level level, const char *format, ...)
{
	(void)pamh; (void)threshold; (void)level; (void)format;
}
int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		struct options options;
		putchar(options_parse(NULL, 1, (const char **)&argv[i], &options) ? '1' : '0');
	}
	return 0;
}
"""


class Module:
    """options.c of the PAM module, compiled by itself."""

    def __init__(self, directory: Path) -> None:
        source = directory / "driver.c"
        source.write_text(DRIVER)
        self.program = directory / "driver"
        subprocess.run(
            ["gcc", "-D_GNU_SOURCE", f"-I{HOOK}", "-o", str(self.program), str(source), str(HOOK / "options.c")],
            check=True,
        )

    def takes(self, words: Sequence[str]) -> List[bool]:
        said = subprocess.run([str(self.program), *words], check=True, capture_output=True, text=True).stdout
        return [character == "1" for character in said]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return Module(tmp_path_factory.mktemp("options"))


def line(*options: str) -> PamLine:
    return PamLine(Path("/etc/pam.d/sshd"), 1, "account", "required", "pam_adopt.so", options)


WRONG = [
    "",
    "=",
    "debug",
    "action_no_jobs",
    "action_no_jobs=",
    "action_no_jobs=allow",
    "action_no_jobs=denyy",
    "action_no_jobs=den",
    "action_no_jobs= deny",
    "action_no_jobs=deny=1",
    "action_no_job=deny",
    "action_unknown=ignore",
    "action_adopt_failure=newest",
    "action_generic_failure=none",
    "ignore_root=true",
    "ignore_root=2",
    "ignore_root=01",
    "single_job_skip_rpc=",
    "disable_x11=yes",
    "join_container=1",
    "log_level=notice",
    "log_level=",
    "log_level=-1",
    "log_level=+1",
    "log_level= 1",
    "log_level=08",
    "log_level=0x",
    "log_level=3x",
    "log_level=00000000003",
    "log_level=\u0663",
    "mode=observed",
    "timeout_ms=49",
    "timeout_ms=30001",
    "timeout_ms=1000ms",
    "timeout_ms=-100",
    "timeout_ms=+100",
    "timeout_ms=0x100",
    "timeout_ms=\u0661\u0660\u0660",
    "timeout_ms=999999999999",
    "timeout_ms=001000",
    "service=",
    "nodename=",
    "nodename=n 1",
    "nodename=n\u00e9",
    "nodename=" + "n" * 64,
    "nodename=n/1",
    "socket=",
    "socket=run/x",
    "socket=/" + "x" * 107,
    "socket=/" + "\u00e9" * 54,
]
RIGHT = [
    "action_no_jobs=deny",
    "action_no_jobs=IGNORE",
    "action_unknown=Newest",
    "action_unknown=allow",
    "action_adopt_failure=deny",
    "action_generic_failure=allow",
    "ignore_root=0",
    "single_job_skip_rpc=0",
    "disable_x11=1",
    "join_container=FALSE",
    "log_level=debug5",
    "log_level=9",
    "log_level=QUIET",
    "log_level=10",
    "log_level=0x3",
    "log_level=0XA",
    "log_level=07",
    "log_level=9999999999",
    "Log_Level=debug",
    "ACTION_NO_JOBS=deny",
    "TIMEOUT_MS=50",
    "mode=observe",
    "timeout_ms=50",
    "timeout_ms=30000",
    "timeout_ms=00100",
    "service=*",
    "service=login",
    "nodename=" + "n" * 63,
    "nodename=a-b_c.d",
    "socket=/x",
    "socket=/" + "x" * 106,
]


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_is_named(word: str) -> None:
    """One sentence with the word, or with the option, its value and what was expected."""
    (fault,) = wrong_options(line("mode=enforce", word))
    name, _, value = word.partition("=")
    assert repr(word) in fault or (
        (fault.startswith(f"{name} is {value!r}, expected ") and fault[-1].isalnum()) or "*" in fault
    )


def test_module_and_tools_agree_on_every_word(module: Module) -> None:
    """doctor and explain refuse exactly what the module refuses."""
    assert [not wrong_options(line(word)) for word in WRONG] == module.takes(WRONG) == [False] * len(WRONG)
    assert [not wrong_options(line(word)) for word in RIGHT] == module.takes(RIGHT) == [True] * len(RIGHT)


WORDS = st.builds(
    lambda name, equals, value: name + equals + value,
    st.sampled_from([*OPTIONS, "x", ""]),
    st.sampled_from(["=", "=", "=", "", "=="]),
    st.sampled_from(["deny", "ALLOW", "0", "1", "true", "info", "100", "/x", "n1", "*", ""])
    | st.text(st.characters(min_codepoint=1, blacklist_categories=("Cs",)), max_size=6),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, min_size=1, max_size=30))
def test_module_and_tools_agree_on_any_word(module: Module, words: List[str]) -> None:
    """Also on words that nobody thought of."""
    assert [not wrong_options(line(word)) for word in words] == module.takes(words)


def test_every_wrong_word_of_a_line_is_told() -> None:
    """Not the first only: the administrator corrects a line once."""
    assert len(wrong_options(line("action_no_jobs=maybe", "mode=enforce", "tiemout_ms=5"))) == 2


@pytest.fixture
def pam_d(tmp_path: Path) -> Path:
    return tmp_path


def lines_of(directory: Path, **files: str) -> List[str]:
    for name, text in files.items():
        (directory / name.replace("_", "-")).write_text(text)
    return [
        f"{found.file.name}:{found.number} {found.kind} {' '.join(found.options)}".strip()
        for found in adopt_lines("sshd", directory)
    ]


def test_lines_that_do_not_load_the_module(pam_d: Path) -> None:
    """Comments, other modules, names that only look alike, incomplete lines."""
    text = "# account required pam_adopt.so\naccount required pam_adopt.so.bak\naccount required pam_slurm_adopt.so\n"
    text += "account required\n\naccount required xpam_adopt.so\naccount required pam_unix.so # pam_adopt.so\n"
    assert lines_of(pam_d, sshd=text) == []


def test_a_service_that_is_not_there(pam_d: Path) -> None:
    """OSError, which doctor words."""
    with pytest.raises(FileNotFoundError):
        adopt_lines("sshd", pam_d)


def test_a_stack_that_includes_itself(pam_d: Path) -> None:
    """libpam does not come back from it, so there is nothing to find in it."""
    with pytest.raises(OSError, match="it includes itself"):
        lines_of(pam_d, sshd="account required pam_adopt.so\naccount include sshd\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("account required pam_adopt.so", "sshd:1 account"),
        ("account\trequired\tpam_adopt.so\tmode=observe\n", "sshd:1 account mode=observe"),
        ("-account required /lib/security/pam_adopt.so", "sshd:1 account"),
        ("ACCOUNT required pam_adopt.so", "sshd:1 account"),
        ("account [success=1 default=ignore] pam_adopt.so service=*", "sshd:1 account service=*"),
        ("account required pam_adopt.so [service=a b] mode=observe", "sshd:1 account service=a b mode=observe"),
        ("account required \\\n pam_adopt.so \\\n mode=observe\n", "sshd:1 account mode=observe"),
        ("\n\nsession required pam_adopt.so", "sshd:3 session"),
    ],
)
def test_the_forms_a_line_may_have(pam_d: Path, text: str, found: str) -> None:
    """Tabs, optional lines, controls in brackets, continued lines, arguments with spaces."""
    assert lines_of(pam_d, sshd=text) == [found]


def test_includes_are_followed_by_kind(pam_d: Path) -> None:
    """`include` takes the lines of its own kind, `@include` all; the file named is the one that has the line."""
    found = lines_of(
        pam_d,
        sshd="@include common\naccount include sub\nauth substack sub\n",
        common="account required pam_adopt.so ignore_root=1\n",
        sub="account required pam_adopt.so mode=observe\nsession required pam_adopt.so\n",
    )
    assert found == ["common:1 account ignore_root=1", "sub:1 account mode=observe"]


@pytest.mark.parametrize(
    ("stack", "alone"),
    [
        ("account required pam_adopt.so\n", True),
        ("account required pam_adopt.so\nsession required pam_adopt.so\n", False),
        ("account required pam_adopt.so\n-session optional /lib/pam_adopt.so\n", False),
        ("account required pam_adopt.so\nsession optional pam_adopt.so MODE=observe\n", True),
        ("account required pam_adopt.so\nsession required pam_adopt.so service=su\n", True),
        ("account required pam_adopt.so service=SSHD\nsession required pam_adopt.so service=su\n", True),
        ("account required pam_adopt.so\nsession required pam_adopt.so service=*\n", False),
        ("account required pam_adopt.so service=su\n", False),
        ("account required pam_adopt.so\n@include common\n", False),
        ("session required pam_adopt.so\n", False),
        ("account required pam_unix.so\n", False),
    ],
)
def test_an_account_line_alone(pam_d: Path, stack: str, alone: bool) -> None:
    """Whether the account phase has to give all that a session is given; a session line that observes gives none."""
    (pam_d / "common").write_text("session required pam_adopt.so\n")
    (pam_d / "sshd").write_text(stack)
    assert AccountAlone(pam_d)("sshd") is alone


def test_a_stack_that_cannot_be_read_is_not_alone(pam_d: Path) -> None:
    """No such service, and a name that is no file of the directory."""
    (pam_d / "sshd").write_text("account required pam_adopt.so\n")
    (pam_d / "inner").mkdir()
    for service in ("login", "", ".", "..", "inner", "../pam.d/sshd", str(pam_d / "sshd"), "a\0b"):
        assert AccountAlone(pam_d)(service) is False


def test_an_edited_stack_is_read_again(pam_d: Path) -> None:
    """After some seconds, and not at each login; nor are more services kept than a host has."""
    now = [100.0]
    alone = AccountAlone(pam_d, lambda: now[0])
    (pam_d / "sshd").write_text("account required pam_adopt.so\n")
    assert alone("sshd")
    (pam_d / "sshd").write_text("account required pam_adopt.so\nsession required pam_adopt.so\n")
    now[0] += 4.0
    assert alone("sshd")
    now[0] += 2.0
    assert not alone("sshd")
    for number in range(100):
        alone(f"service{number}")
    assert len(alone._known) <= 16


def test_words_have_their_names_in_small_letters() -> None:
    """For whoever looks an option up; values stay as they are, a socket's path among them."""
    words = line("Action_Unknown=DENY", "SOCKET=/run/A.sock", "debug").words
    assert words == ("action_unknown=DENY", "socket=/run/A.sock", "debug")


@pytest.mark.parametrize(
    ("options", "service", "acts"),
    [
        ("", "sshd", True),
        ("", "su", False),
        ("service=su", "su", True),
        ("service=su", "sshd", False),
        ("service=SU", "su", True),
        ("service=su", "SU", True),
        ("service=*", "cron", True),
        ("service=su service=sshd", "sshd", True),
        ("service=", "sshd", False),
    ],
)
def test_whom_a_line_is_for(tmp_path: Path, options: str, service: str, acts: bool) -> None:
    """As in the module: in any case, and the last word counts."""
    (tmp_path / service).write_text(f"account required pam_adopt.so {options}\n")
    (line,) = adopt_lines(service, tmp_path)
    assert is_for(line, service) is acts
