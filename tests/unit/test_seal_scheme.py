"""The choice of a scheme: the one that is named and no other; "auto" takes what is set up here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Tuple

import pytest

from adoptd.seal import SCHEMES, Seal, SealError, SealFault, open_seal
from adoptd.seal import munge as munge_module
from munged import Munged, running_munged


@pytest.fixture(scope="module")
def munged() -> Iterator[Munged]:
    with running_munged() as running:
        yield running


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(bytes(range(64)))
    path.chmod(0o600)
    return path


def test_an_unknown_scheme_is_refused(key_file: Path) -> None:
    """Nothing is matched by prefix or case."""
    assert SCHEMES == ("auto", "slurm", "munge", "key")
    for scheme in ("", "Munge", "mun", "none", "auth/slurm"):
        with pytest.raises(ValueError, match="is not one of auto, slurm, munge, key"):
            open_seal(scheme, key_file, None, 10)


def test_with_nothing_set_up_auto_names_both_places(tmp_path: Path) -> None:
    """The administrator reads what was looked for where."""
    with pytest.raises(SealError) as refusal:
        open_seal("auto", tmp_path / "adoptd.key", str(tmp_path / "munge.socket"), 10)
    assert refusal.value.fault is SealFault.UNAVAILABLE
    assert f'munge: munge_encode: Failed to access "{tmp_path}/munge.socket"' in str(refusal.value)
    assert f"key: {tmp_path}/adoptd.key does not exist" in str(refusal.value)


def test_without_the_library_auto_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MUNGE may not be installed at all."""
    monkeypatch.setattr(munge_module, "LIBRARY", "libmunge-of-nobody.so.2")
    with pytest.raises(SealError, match=r"libmunge-of-nobody\.so\.2 cannot be loaded.*does not exist"):
        open_seal("auto", tmp_path / "adoptd.key", None, 10)


def test_auto_does_not_pass_over_a_wrong_key(tmp_path: Path, key_file: Path) -> None:
    """A key that is there but open to all, or a dangling link, is a mistake to be told, not to be skipped."""
    key_file.chmod(0o644)
    with pytest.raises(SealError, match="of mode 0644"):
        open_seal("auto", key_file, str(tmp_path / "absent"), 10)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SealError, match="a symbolic link"):
        open_seal("auto", tmp_path / "link", str(tmp_path / "absent"), 10)


def test_a_named_scheme_never_becomes_another(munged: Munged, key_file: Path, tmp_path: Path) -> None:
    """munge without munged stays munge; key without a key is an error although munged runs."""
    with contextlib.closing(open_seal("munge", key_file, str(tmp_path / "absent"), 10)) as seal:
        assert seal.scheme == "munge"
        with pytest.raises(SealError):
            seal.seal(b"question")
    with pytest.raises(SealError, match="No such file"):
        open_seal("key", tmp_path / "absent", munged.socket, 10)


def test_auto_takes_munge_before_a_key(munged: Munged, key_file: Path, tmp_path: Path) -> None:
    """munged answers: munge. It does not: the key."""
    assert scheme_of(open_seal("auto", key_file, munged.socket, 10)) == ("munge", True)
    assert scheme_of(open_seal("auto", key_file, str(tmp_path / "absent"), 10)) == ("key", False)


def scheme_of(seal: Seal) -> Tuple[str, bool]:
    with contextlib.closing(seal):
        assert seal.open(seal.seal(b"question")).payload == b"question"
        return seal.scheme, seal.may_block


def test_under_munge_pyjwt_is_not_loaded(munged: Munged, tmp_path: Path) -> None:
    """A node that seals with MUNGE does not pay for the other scheme's imports."""
    script = (
        "import sys; from pathlib import Path; from adoptd.seal import open_seal;"
        "open_seal('auto', Path(sys.argv[1]), sys.argv[2], 10); sys.exit('jwt' in sys.modules)"
    )
    source = Path(munge_module.__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "absent"), munged.socket]
    assert subprocess.run(command, env={"PYTHONPATH": str(source)}, timeout=60).returncode == 0
