from __future__ import annotations

from pathlib import Path

import pytest

from taprobe_core.errors import ConfigError, DataError
from taprobe_core.rollouts import FolderRollouts, max_rollouts, open_source
from taprobe_core.rollouts.hub import HubRollouts
from taprobe_core.study.config import (
    DemoSource,
    HubSource,
    MirrorSource,
    PolicySource,
    Rollouts,
    Source,
)

PLACE = ("llama-8b", "t06", "correct")


@pytest.fixture
def mirror(tmp_path: Path) -> FolderRollouts:
    for name in ("problem_12", "problem_3", "problem_007", "problem_x", "problem_1" + "0" * 18):
        tmp_path.joinpath(*PLACE, name).mkdir(parents=True)
    tmp_path.joinpath(*PLACE, "problem_4").write_text("not a folder")
    tmp_path.joinpath(*PLACE, "problem_3", "problem.json").write_text("{}")
    tmp_path.joinpath("llama-8b", "t06", "incorrect").mkdir()
    return FolderRollouts(tmp_path)


def test_lists_the_problem_folders_and_nothing_else(mirror: FolderRollouts) -> None:
    assert mirror.list_problems(*PLACE) == [3, 12]
    assert mirror.list_problems("llama-8b", "t06", "incorrect") == []


@pytest.mark.parametrize(
    ("place", "what", "fix"),
    [
        (("lama-8b", "t06", "correct"), "no folder 'lama-8b' (there is: llama-8b)",
         "correct models.<key>.rollouts_dir: did you mean 'llama-8b'?"),
        (("llama-8b", "0.6", "correct"), "no folder '0.6' (there is: t06)",
         "correct rollouts.sampling: did you mean 't06'?"),
        (("llama-8b", "t06", "corect"), "no folder 'corect' (there is: correct, incorrect)",
         "correct settings: did you mean 'correct'?"),
    ],
)  # fmt: skip
def test_a_missing_folder_is_named_with_what_is_there(
    mirror: FolderRollouts, place: tuple[str, str, str], what: str, fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        mirror.list_problems(*place)

    assert caught.value.what == what
    assert caught.value.fix == fix
    assert str(mirror.folder) in str(caught.value.where)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no such folder in .*nowhere\nFix: correct rollouts\.source"
    ):
        FolderRollouts(tmp_path / "nowhere").list_problems(*PLACE)


def test_a_long_listing_is_cut(tmp_path: Path) -> None:
    for index in range(12):
        tmp_path.joinpath(f"m{index:02d}").mkdir()

    with pytest.raises(DataError, match=r"m09 and 2 more\)"):
        FolderRollouts(tmp_path).list_problems(*PLACE)


def test_a_folder_that_cannot_be_listed_is_not_a_missing_one(mirror: FolderRollouts) -> None:
    with pytest.raises(DataError, match=r"cannot be listed \(File name too long\)"):
        mirror.list_problems("x" * 300, "t06", "correct")


def test_fetch_gives_the_path_or_says_what_is_absent(mirror: FolderRollouts) -> None:
    assert mirror.fetch(*PLACE, 3, "problem.json").read_text() == "{}"
    with pytest.raises(DataError, match=r"problem 12 has no problem\.json in .*problem_12\nFix: "):
        mirror.fetch(*PLACE, 12, "problem.json")


@pytest.mark.parametrize(
    "part", ["", ".", "..", "../x", "a/../../b", "/etc", "C:\\x", "a\\b", "\0"]
)
@pytest.mark.parametrize("place", range(3))
def test_no_part_leads_out_of_the_source(mirror: FolderRollouts, part: str, place: int) -> None:
    parts = list(PLACE)
    parts[place] = part
    hub = HubRollouts("owner/name", "0" * 40)

    for source in (mirror, hub):
        with pytest.raises(ConfigError, match="not a folder inside"):
            source.list_problems(*parts)
        with pytest.raises(ConfigError, match="not a folder inside"):
            source.fetch(*parts, 3, "problem.json")
    with pytest.raises(ConfigError, match="not a folder inside"):
        mirror.fetch(*PLACE, 3, "../../problem.json")


def rollouts(source: Source) -> Rollouts:
    return Rollouts(source=source)


def test_open_source_follows_the_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = rollouts(DemoSource(kind="demo", n_rollouts=8))
    policy = rollouts(PolicySource(kind="policy", n_rollouts=300))
    mirror = rollouts(MirrorSource(kind="mirror", folder="data"))
    hub = rollouts(HubSource(kind="hub", repo="owner/name", revision="a" * 40))

    assert open_source(mirror).identity() == {"kind": "mirror", "folder": str(tmp_path / "data")}
    assert open_source(hub).identity() == {
        "kind": "hub", "repo": "owner/name", "revision": "a" * 40,
    }  # fmt: skip
    assert open_source(demo, tmp_path).identity() == {
        "kind": "demo", "n_problems": "20", "n_rollouts": "8",
    }  # fmt: skip
    assert open_source(policy, tmp_path).identity() == {
        "kind": "policy", "n_problems": "16", "n_rollouts": "300", "seed": "0",
    }  # fmt: skip
    assert [max_rollouts(each) for each in (demo, policy, mirror, hub)] == [8, 300, 100, 100]
    with pytest.raises(ConfigError, match="demo world has not been written"):
        open_source(demo)
