"""What doctor finds of the sshds that listen: how they were started, what they read, and what that comes to."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Dict, Optional, Tuple

import pytest

from adoptd.doctor.findings import Grade, worst
from adoptd.doctor.listeners import (
    Listener,
    Setting,
    Started,
    changed_since,
    files_of,
    hidden_from,
    read_at_s,
    says,
    settings_of,
    started_by,
)
from adoptd.doctor.processes import Running
from adoptd.doctor.sshd import (
    SshdFacts,
    judge_age,
    judge_files,
    judge_grace,
    judge_listener,
    judge_sshd,
    judge_view,
    judge_wrappers,
    patience_ms,
    settings_in_force,
)
from adoptd.pam_lines import adopt_lines

RUNS = Running(7, "sshd", "", "/usr/sbin/sshd", 1000.0, "S", 0)
YES = {"usepam": "yes", "port": "22"}


@pytest.mark.parametrize(
    ("title", "started"),
    [
        ("sshd: /usr/sbin/sshd -D -o UsePAM=no [listener] 0 of 10-100 startups", Started(settings=("UsePAM=no",))),
        ("sshd: /usr/sbin/sshd -D -oUsePAM=no [listener] 0 of 10-100 startups", Started(settings=("UsePAM=no",))),
        ("sshd: /usr/sbin/sshd -o UsePAM no -f /x [listener] 0 of 10-100 startups", Started("/x", ("UsePAM=no",))),
        ("hpc-sshd: /opt/sbin/hpc-sshd [listener] 0 of 10-100 startups", Started()),
        ("hpc-sshd: alice [priv]", None),
        ("sshd-session: alice@pts/0", None),
    ],
)
def test_how_one_was_started(title: str, started: Optional[Started]) -> None:
    """Its title has what counts before its file."""
    assert started_by(title) == started


def test_what_it_reads(tmp_path: Path) -> None:
    """Included files where they are included; of what is said twice the first counts, and what is in a Match never."""
    main, part, loop = tmp_path / "main", tmp_path / "d/10.conf", tmp_path / "d/20.conf"
    part.parent.mkdir()
    main.write_text(f"Port 22\nInclude {tmp_path}/d/*.conf\nUsePAM yes\nMatch User x\n PermitTTY no\n")
    part.write_text("# UsePAM yes\nusepam = no\n")
    loop.write_text(f"Include {main}\nUseDNS no\n")
    assert says(str(main), "usepam") == Setting(f"{part}:2", "usepam", "no")
    assert says(str(main), "permittty") is None
    assert [line.key for line in settings_of(str(main))] == ["port", "usepam", "usedns", "usepam"]
    assert [file.path for file in files_of(str(main))] == [str(main), str(part), str(loop)]
    part.unlink()
    assert says(str(main), "usepam") == Setting(f"{main}:3", "usepam", "yes")
    blank = tmp_path / "a blank.conf"
    blank.write_text('UsePAM "no"\n')
    main.write_text(f'Include "{blank}" {tmp_path}/none\nUsePAM yes\n')
    assert says(str(main), "usepam") == Setting(f"{blank}:1", "usepam", "no")


def test_a_pipe_among_them(tmp_path: Path) -> None:
    """It is not opened, and named when sshd waits for it."""
    main = tmp_path / "main"
    main.write_text(f"Include {tmp_path}/p*\nUsePAM no\n")
    facts = SshdFacts(Started(str(main)), {}, "no answer in 4 s", listener=Listener(RUNS, Started(str(main))))
    assert "is no regular file" not in " ".join(each.seen for each in judge_sshd(facts, "sshd", account_alone=False))
    os.mkfifo(tmp_path / "pipe")
    (found,) = judge_sshd(facts, "sshd", account_alone=False)
    assert f"{tmp_path}/pipe is no regular file" in found.seen


@pytest.mark.parametrize(("device", "endless"), [("/dev/zero", True), ("/dev/null", False)])
def test_what_sshd_is_not_made_to_read(tmp_path: Path, device: str, endless: bool) -> None:
    """It takes memory for a line that has no end until there is none left."""
    main = tmp_path / "main"
    main.write_text(f"Include {tmp_path}/*.conf\n")
    (tmp_path / "x.conf").symlink_to(device)
    values, fault = settings_in_force("/usr/bin/true", Started(str(main)), 10.0)
    assert (values, fault) == ({}, "not asked" if endless else None)


def test_a_directory_among_them(tmp_path: Path) -> None:
    """sshd passes over one that is matched, so it is asked."""
    main = tmp_path / "main"
    main.write_text(f"Include {tmp_path}/d/*\n")
    (tmp_path / "d/below").mkdir(parents=True)
    assert settings_in_force("/usr/bin/true", Started(str(main)), 10.0) == ({}, None)


def test_settings_with_a_line_for_each_name(tmp_path: Path) -> None:
    """Of whom sshd itself keeps out all are read; of any other key the first line counts."""
    program, main = tmp_path / "sshd", tmp_path / "main"
    main.write_text("")
    program.write_text("#!/bin/sh\nprintf '%s\\n' 'usepam yes' 'port 22' 'port 23' 'denyusers bob' 'denyusers *'\n")
    program.chmod(0o755)
    values, fault = settings_in_force(str(program), Started(str(main)), 10.0)
    assert (values, fault) == ({"usepam": "yes", "port": "22", "denyusers": "bob *"}, None)


def test_a_place_that_is_not_the_one(tmp_path: Path) -> None:
    """What says yes is not told to be what says no."""
    file = tmp_path / "c"
    file.write_text("UsePAM yes\n")
    facts = SshdFacts(Started(str(file)), {"usepam": "no"}, listener=Listener(RUNS, Started(str(file))))
    (found,) = judge_sshd(facts, "sshd", account_alone=False)
    assert found.seen.startswith(f"{file}: UsePAM is no")


def test_changed_since_it_was_read(tmp_path: Path) -> None:
    """By the pid file, which is written at each reload; without one nothing is said."""
    main, pid_file = tmp_path / "main", tmp_path / "pid"
    main.write_text("UsePAM yes\n")
    listener = Listener(RUNS, Started(str(main)))
    assert read_at_s(listener, str(pid_file)) is None
    pid_file.write_text("8\n")
    assert read_at_s(listener, str(pid_file)) is None
    pid_file.write_text("7\n")
    for minutes, changed in ((1, []), (-1, [str(main)])):
        read_s = time.time() + 60 * minutes
        os.utime(pid_file, (read_s, read_s))
        found = read_at_s(listener, str(pid_file))
        assert found == pytest.approx(read_s)
        assert found is not None
        assert changed_since(files_of(str(main)), found) == changed
    assert list(judge_age([])) == []
    (finding,) = judge_age(["/x"])
    assert (finding.grade, "reload ssh" in finding.remedy) == (Grade.WARNING, True)


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({}, Grade.OK, ()),
        ({"state": "T"}, Grade.FAILURE, ("is stopped", "kill -CONT 7")),
        ({"program": "/usr/sbin/sshd (deleted)"}, Grade.WARNING, ("before an upgrade", "restart ssh")),
    ],
)
def test_as_it_runs(change: Dict[str, str], grade: Grade, words: Tuple[str, ...]) -> None:
    """Not what its files say."""
    found = list(judge_listener(Listener(dataclasses.replace(RUNS, **change), Started())))  # type: ignore[arg-type]
    assert worst(found) is grade
    assert all(word in f"{found[0].seen} {found[0].remedy}" for word in words)


@pytest.mark.parametrize(
    ("fault", "runs", "grade", "words"),
    [
        ("Missing privilege separation directory: /run/sshd", True, Grade.FAILURE, ("turned away", "mkdir")),
        ("Missing privilege separation directory: /run/sshd", False, Grade.WARNING, ("mkdir",)),
        ("sshd: no hostkeys available -- exiting.", True, Grade.WARNING, ("ssh-keygen -A",)),
        ("Privilege separation user sshd does not exist", True, Grade.WARNING, ("getent passwd sshd",)),
        ("line 3: Bad configuration option", True, Grade.WARNING, ("would not come up",)),
    ],
)
def test_faults(fault: str, runs: bool, grade: Grade, words: Tuple[str, ...]) -> None:
    """Some keep those out who connect now, some those who connect after the next start."""
    listener = Listener(RUNS, Started("/none")) if runs else None
    (found,) = judge_sshd(SshdFacts(Started("/none"), {}, fault, listener=listener), "sshd", account_alone=False)
    assert found.grade is grade
    assert all(word in f"{found.seen} {found.remedy}" for word in words)


def test_what_one_with_a_view_of_its_own_does_not_see(tmp_path: Path) -> None:
    """What is not here cannot be hidden; what it sees as we do is not."""
    own = dataclasses.replace(RUNS, pid=os.getpid())
    (tmp_path / "there").touch()
    paths = (f"{tmp_path}/there", f"{tmp_path}/none")
    assert hidden_from(own, paths) == []
    (tmp_path / "proc").mkdir()
    assert hidden_from(own, paths, tmp_path / "proc") == [f"{tmp_path}/there"]
    assert list(judge_view(Listener(RUNS, Started()), [])) == []
    (found,) = judge_view(Listener(RUNS, Started()), ["/run/adoptd/pam.sock"])
    assert (found.grade, "does not see /run/adoptd/pam.sock" in found.seen) == (Grade.FAILURE, True)


def test_who_can_change_what_it_reads(tmp_path: Path) -> None:
    """Root alone: the main file, what that includes, and the directories of both."""
    main, part = tmp_path / "main", tmp_path / "d/10.conf"
    part.parent.mkdir()
    main.write_text(f"Include {tmp_path}/d/*.conf\n")
    part.write_text("UsePAM yes\n")
    for path in (tmp_path, part.parent, main, part):
        path.chmod(0o755)
    assert list(judge_files(files_of(str(main)))) == []
    for path, bits in ((main, 0o666), (part, 0o664), (part.parent, 0o777)):
        path.chmod(bits)
        (found,) = judge_files(files_of(str(main)))
        assert (found.grade, f"{path} has mode {bits:04o}" in found.seen) == (Grade.FAILURE, True)
        path.chmod(0o755)
    os.chown(part, 60001, -1)
    (found,) = judge_files(files_of(str(main)))
    assert f"{part} is owned by uid 60001" in found.seen


@pytest.mark.parametrize(
    ("grace", "options", "warned"),
    [
        ("120", "", False),
        ("0", "timeout_ms=30000", False),
        ("", "timeout_ms=30000", False),
        ("1", "", True),
        ("10", "timeout_ms=30000", True),
        ("10", "timeout_ms=9000", False),
        ("10", "timeout_ms=much", False),
    ],
)
def test_the_time_that_a_login_is_given(tmp_path: Path, grace: str, options: str, warned: bool) -> None:
    """By sshd, beside what our lines may take of it; a session line comes after that time."""
    (tmp_path / "sshd").write_text(
        f"account required pam_adopt.so {options}\nsession required pam_adopt.so {options}\n"
    )
    found = list(judge_grace(grace, patience_ms(adopt_lines("sshd", tmp_path))))
    assert [each.grade for each in found] == ([Grade.WARNING] if warned else [])


@pytest.mark.parametrize(
    ("values", "grade", "words"),
    [
        ({}, Grade.OK, "UsePAM yes"),
        ({"denyusers": "*"}, Grade.FAILURE, "nobody gets in"),
        ({"denyusers": "bob"}, Grade.OK, "DenyUsers bob"),
        ({"denyusers": "bob *"}, Grade.FAILURE, "nobody gets in"),
        ({"denyusers": "bob eve"}, Grade.OK, "DenyUsers bob ...:"),
        ({"allowgroups": "wheel"}, Grade.OK, "AllowGroups wheel ...: sshd turns the others away"),
    ],
)
def test_whom_sshd_itself_turns_away(values: Dict[str, str], grade: Grade, words: str) -> None:
    """The administrator's choice, and said; that nobody comes in is none."""
    facts = SshdFacts(Started("/c"), {**YES, **values}, None, "sshd", Listener(RUNS, Started("/c")))
    found = list(judge_sshd(facts, "sshd", account_alone=False))
    assert worst(found) is grade
    assert any(words in each.seen for each in found)


@pytest.mark.parametrize(
    ("allow", "deny", "grade"),
    [
        ("", "", None),
        ("", "# ALL: ALL\n", None),
        ("", "ALL: PARANOID\nin.telnetd: ALL\n", Grade.OK),
        ("", "ALL: ALL\n", Grade.FAILURE),
        ("", "in.ftpd, sshd : all : deny\n", Grade.FAILURE),
        ("", "in.ftpd: ALL\n", None),
        ("", "ALL: ALL EXCEPT 10.0.0.0/8\n", Grade.OK),
        ("sshd: 10.0.0.0/8\n", "ALL: ALL\n", Grade.OK),
        ("in.ftpd: 10.0.0.0/8\n", "ALL: \\\n ALL\n", Grade.FAILURE),
        ("", "ALL EXCEPT sshd: ALL\n", None),
        ("", "ALL EXCEPT in.ftpd, sshd : ALL\n", None),
        ("", "ALL EXCEPT in.ftpd: ALL\n", Grade.FAILURE),
        ("", "ALL EXCEPT ALL EXCEPT sshd: ALL\n", Grade.FAILURE),
        ("ALL EXCEPT sshd: 10.0.0.0/8\n", "ALL: ALL\n", Grade.FAILURE),
    ],
)
def test_whom_tcp_wrappers_turn_away(allow: str, deny: str, grade: Optional[Grade]) -> None:
    """Before sshd has said a word."""
    found = list(judge_wrappers(allow, deny))
    assert [each.grade for each in found] == ([] if grade is None else [grade])


def test_where_use_pam_is_said(tmp_path: Path) -> None:
    """In a file, on the command line, or nowhere."""
    file = tmp_path / "c"
    file.write_text("Port 22\nUsePAM no\n")
    for started, words in (
        (Started(str(file)), f"{file}:2: UsePAM is no"),
        (Started(str(file), ("UsePAM=no",)), "-o UsePAM=no on its command line"),
        (Started(f"{tmp_path}/none"), "(by default): UsePAM is no"),
    ):
        facts = SshdFacts(started, {"usepam": "no"}, listener=Listener(RUNS, started))
        (found,) = judge_sshd(facts, "sshd", account_alone=False)
        assert (found.grade, words in found.seen) == (Grade.FAILURE, True), found


def test_the_service_it_asks() -> None:
    """An older sshd asks as the service of its own name."""
    for name, grade in (("sshd", Grade.OK), ("hpc-sshd", Grade.WARNING)):
        facts = SshdFacts(Started("/c"), YES, None, name, Listener(RUNS, Started("/c")))
        found = list(judge_sshd(facts, "sshd", account_alone=False))
        assert worst(found) is grade
    assert "--service hpc-sshd" in found[-1].remedy
    facts = SshdFacts(Started("/c"), YES, None, "sshd", Listener(RUNS, Started("/c")))
    assert worst(list(judge_sshd(facts, "cockpit", account_alone=False))) is Grade.OK


def test_none_that_runs() -> None:
    """As ssh.socket has it, until somebody comes."""
    assert worst(list(judge_sshd(SshdFacts(Started("/c"), YES), "sshd", account_alone=False))) is Grade.WARNING
    kept = SshdFacts(Started("/c"), YES, socket=True)
    assert worst(list(judge_sshd(kept, "sshd", account_alone=False))) is Grade.OK
