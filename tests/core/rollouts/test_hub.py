"""The hub's reader against a small hub on this machine: the client's own code, a real HTTP server.

The client reads its endpoint and cache from the environment at import, so most tests set its
constants and one runs a fresh process with the environment that a user would set.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

from taprobe_core.errors import ConfigError, DataError, SourceUnavailableError
from taprobe_core.rollouts import content_digest, open_source, read_rollouts
from taprobe_core.rollouts.hub import HubRollouts
from taprobe_core.study.config import HubSource, Model, Rollouts, StandInCheckpoint

REPO, SHA = "owner/rollouts", "c0ffee" + "0" * 34
PLACE = ("tiny", "t1", "correct")
PROBLEM_IDS = (4, 30)
MODEL = Model(
    rollouts_dir="tiny",
    checkpoint=StandInCheckpoint(kind="stand_in", architecture="qwen2"),
    n_layers=4,
)


def tree() -> dict[str, bytes]:
    files: dict[str, Any] = {"README.md": "card"}
    for problem_id in PROBLEM_IDS:
        texts = (f"One of {problem_id}.", "Two.")
        chunks = [{"chunk": text, "chunk_idx": i} for i, text in enumerate(texts)]
        folder = f"tiny/t1/correct/problem_{problem_id}"
        files[f"{folder}/problem.json"] = {"problem": f"sum {problem_id}"}
        files[f"{folder}/base_solution.json"] = {
            "prompt": "Sum. \n<think>\n",
            "solution": " ".join(texts) + "\n</think>\n2",
        }
        files[f"{folder}/chunks_labeled.json"] = chunks
        files[f"{folder}/chunk_0/solutions.json"] = [{"rollout": "large"}]
    files["tiny/t1/incorrect/problem_9/problem.json"] = {"problem": "other"}
    return {path: json.dumps(value).encode() for path, value in files.items()}


class Hub(ThreadingHTTPServer):
    """Serves one dataset repository the way the client expects it; keeps what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = tree()
        self.asked: list[str] = []
        self.broken: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        api, resolve = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if any(part in path for part in self.server.broken):
            self._reply(503)
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self._file(revision, name)
        elif path in (api, f"{api}/revision/main"):
            self._json({"id": REPO, "sha": SHA})
        elif path.startswith(f"{api}/tree/"):
            revision, _, name = path.removeprefix(f"{api}/tree/").partition("/")
            self._tree(revision, name)
        else:
            self._reply(404, {"X-Error-Code": "RepoNotFound"})

    def _file(self, revision: str, name: str) -> None:
        if revision != SHA:
            self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif name not in self.server.files:
            self._reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            data = self.server.files[name]
            etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            self._reply(200, {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'}, data)

    def _tree(self, revision: str, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in self.server.files if path.startswith(prefix)]
        if revision != SHA:
            self._reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif not below:
            self._reply(404, {"X-Error-Code": "EntryNotFound"})
        else:
            heads = {path.removeprefix(prefix).partition("/")[:2] for path in below}
            self._json(
                [
                    {
                        "type": "directory" if slash else "file",
                        "path": prefix + head,
                        "oid": "0" * 40,
                        "size": 0,
                    }
                    for head, slash in sorted(heads)
                ]
            )

    def _json(self, value: Any) -> None:
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _reply(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    try:
        yield server
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()


def study(revision: str | None = SHA, **changes: Any) -> Rollouts:
    source = HubSource(kind="hub", repo=REPO, revision=revision)
    return Rollouts(source=source, sampling="t1", **changes)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def test_fetches_the_three_files_of_each_problem_and_no_other(hub: Hub) -> None:
    options = study(revision=None)
    source = open_source(options)

    tables = read_rollouts(source, MODEL, options, "correct")

    assert source.identity() == {"kind": "hub", "repo": REPO, "revision": SHA}
    assert tables.problems["problem_id"].to_list() == [4, 30]
    downloads = [line for line in hub.asked if line.startswith("GET /datasets")]
    assert len(downloads) == len(set(downloads)) == 3 * len(PROBLEM_IDS)
    assert not [line for line in hub.asked if "solutions.json" in line]


def test_a_branch_is_resolved_once(hub: Hub) -> None:
    source = HubRollouts(REPO)

    for _ in range(3):
        source.identity()
        source.list_problems(*PLACE)

    assert len(hub.asked) == 2


def test_a_digest_fetches_nothing(hub: Hub) -> None:
    by_id = study(problem_ids=(4,))
    source = open_source(by_id)

    digests = {
        content_digest(source, MODEL, options, setting)
        for options in (by_id, study(problem_ids=(30,)), study())
        for setting in ("correct", "incorrect")
    }

    assert len(digests) == 6
    assert [line for line in hub.asked if "/tree/" not in line] == []
    assert content_digest(open_source(study()), MODEL, by_id, "correct") in digests


def test_named_problems_at_a_pinned_commit_are_planned_without_a_request(hub: Hub) -> None:
    options = study(problem_ids=(4, 30))

    content_digest(open_source(options), MODEL, options, "correct")

    assert hub.asked == []


@pytest.mark.parametrize("revision", [None, SHA])
def test_offline_reads_what_was_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    options = study(revision=revision)
    online = read_rollouts(open_source(options), MODEL, options, "correct")
    digest = content_digest(open_source(options), MODEL, options, "correct")
    go_offline(monkeypatch)
    hub.asked.clear()

    offline = read_rollouts(open_source(options), MODEL, options, "correct")

    assert hub.asked == []
    assert offline.problems.equals(online.problems)
    assert offline.sentences.equals(online.sentences)
    assert content_digest(open_source(options), MODEL, options, "correct") == digest


def test_offline_without_a_cache_says_what_to_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    command = (
        f"hf download {REPO} --repo-type dataset --revision {SHA} "
        '--include "tiny/t1/correct/*/problem.json" '
        '--include "tiny/t1/correct/*/base_solution.json" '
        '--include "tiny/t1/correct/*/chunks_labeled.json"'
    )

    with pytest.raises(SourceUnavailableError) as caught:
        HubRollouts(REPO, SHA).list_problems(*PLACE)
    with pytest.raises(
        SourceUnavailableError, match="cannot resolve the main branch"
    ) as unresolved:
        HubRollouts(REPO).identity()

    assert caught.value.fix is not None
    assert caught.value.fix.startswith("unset HF_HUB_OFFLINE")
    assert command in caught.value.fix
    assert f"hf download {REPO} --repo-type dataset --revision main" in str(unresolved.value.fix)


def test_offline_a_file_never_fetched_is_a_doubt_and_a_known_gap_is_not(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files["tiny/t1/correct/problem_30/chunks_labeled.json"]
    options = study()
    online = read_rollouts(open_source(options), MODEL, options, "correct")
    fetched = HubRollouts(REPO, SHA).fetch("tiny", "t1", "incorrect", 9, "problem.json")
    go_offline(monkeypatch)

    offline = read_rollouts(open_source(options), MODEL, options, "correct")

    assert fetched.is_file()
    assert online.skipped["what"].to_list() == ["problem 30 has no chunks_labeled.json"]
    assert offline.skipped.equals(online.skipped)
    with pytest.raises(SourceUnavailableError, match=r"cannot fetch tiny/t1/incorrect/problem_9"):
        read_rollouts(open_source(options), MODEL, options, "incorrect")


def test_a_server_that_fails_is_never_a_bad_problem(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client waits between its own retries.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.broken = {"problem_30/base_solution.json"}
    options = study(on_bad_problem="skip")

    with pytest.raises(SourceUnavailableError, match="problem_30/base_solution") as caught:
        read_rollouts(open_source(options), MODEL, options, "correct")

    assert "check the connection and HF_ENDPOINT" in str(caught.value.fix)
    hub.broken = {"/tree/"}
    with pytest.raises(SourceUnavailableError, match="cannot list tiny/t1/correct"):
        HubRollouts(REPO, SHA).list_problems(*PLACE)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError, match="Connection refused"):
        HubRollouts(REPO, SHA).list_problems(*PLACE)
    with pytest.raises(SourceUnavailableError, match="cannot resolve the main branch"):
        HubRollouts(REPO).identity()


@pytest.mark.parametrize(
    ("source", "place", "kind", "message"),
    [
        (HubRollouts(REPO, SHA), ("tiny", "t1", "corect"), DataError,
         r"no folder 'corect' \(there is: correct, incorrect\) in .*\n.*did you mean 'correct'"),
        (HubRollouts(REPO, SHA), ("tinny", "t1", "correct"), DataError,
         r"no folder 'tinny' \(there is: tiny\) in owner/rollouts@c0ffee"),
        (HubRollouts("owner/other", SHA), PLACE, DataError,
         r"no such dataset repository, or no access to it in owner/other\nFix: correct rollouts"),
        (HubRollouts("owner/other"), PLACE, DataError, "no such dataset repository"),
        (HubRollouts(REPO, "1" * 40), PLACE, DataError,
         r"no such revision in owner/rollouts@1111.*\nFix: give rollouts.source.revision"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_explained(
    hub: Hub,
    source: HubRollouts,
    place: tuple[str, str, str],
    kind: type[DataError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        source.list_problems(*place)

    assert not isinstance(caught.value, SourceUnavailableError)


def test_a_malformed_repository_id_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'a/b/c' is not a repository id"):
        HubRollouts("a/b/c")


SCRIPT = """
import json, sys
from taprobe_core.rollouts import content_digest, open_source, read_rollouts
from taprobe_core.study.config import HubSource, Model, Rollouts, StandInCheckpoint
options = Rollouts(source=HubSource(kind="hub", repo=sys.argv[1]), sampling="t1")
checkpoint = StandInCheckpoint(kind="stand_in", architecture="qwen2")
model = Model(rollouts_dir="tiny", checkpoint=checkpoint, n_layers=4)
source = open_source(options)
tables = read_rollouts(source, model, options, "correct")
ids = tables.problems["problem_id"].to_list()
print(json.dumps([source.identity(), ids, content_digest(source, model, options, "correct")]))
"""


def test_the_environment_decides_endpoint_cache_and_network(hub: Hub, tmp_path: Path) -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, REPO],
            env={**kept, **home, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    online = run()
    hub.asked.clear()
    offline = run(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")

    assert online.returncode == offline.returncode == 0, online.stderr + offline.stderr
    assert json.loads(online.stdout)[:2] == [
        {"kind": "hub", "repo": REPO, "revision": SHA},
        list(PROBLEM_IDS),
    ]
    assert offline.stdout == online.stdout
    assert online.stderr == ""
    assert "offline: 2 problem(s) of tiny/t1/correct are in the cache" in offline.stderr
    assert hub.asked == []
    assert (tmp_path / "home" / "hub" / "datasets--owner--rollouts" / "refs" / "main").is_file()
