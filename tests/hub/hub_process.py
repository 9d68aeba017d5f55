"""The Hub server as a test sees it: start, stop and kill it, arm faults, look at what it stores and saw."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 30


def free_port() -> int:
    """A loopback port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class HubServer:
    """One server process, its ports and its control endpoint."""

    user = "alice"
    foreign_user = "bob"
    tokens: Mapping[str, str] = {
        "write": "hf_test_alice_write_0123456789",
        "read": "hf_test_alice_read_0123456789",
        "foreign": "hf_test_bob_write_0123456789",
        "expired": "hf_test_alice_expired_0123456789",
    }

    def __init__(self, data: Path) -> None:
        """Chooses the ports; `start` runs the process."""
        self.data = data
        self._ports = {name: free_port() for name in ("hub", "cdn", "other", "control")}
        self.endpoint = f"http://127.0.0.1:{self._ports['hub']}"
        self.cdn = f"http://localhost:{self._ports['cdn']}"
        self.other = f"http://localhost:{self._ports['other']}"
        self.control = f"http://127.0.0.1:{self._ports['control']}"
        self.refused = f"http://127.0.0.1:{free_port()}"
        self.unknown_host = "http://no-such-host.invalid"
        self.tls = f"https://127.0.0.1:{self._ports['hub']}"
        self._process: subprocess.Popen[bytes] | None = None

    # -- the process ------------------------------------------------------------------------------------
    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process on its ports and its data folder, and waits until it listens."""
        assert not self.running
        command = [sys.executable, "-m", "tests.hub.server", "--data", str(self.data)]
        for name, port in self._ports.items():
            command += [f"--{name}", str(port)]
        for token_name, token in self.tokens.items():
            user = self.foreign_user if token_name == "foreign" else self.user
            command += ["--token", f"{token}:{user}:{token_name}"]
        # stdin is the leash: when this process ends, however it ends, the pipe closes and the server leaves.
        with (self.data / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() != b"READY":
            raise AssertionError(
                f"the Hub server did not start: {(self.data / 'server.log').read_text()[-4000:]}"
            )

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        assert self._process is not None
        self._process.kill()
        self.wait_dead()

    def wait_dead(self, timeout: float = START_SECONDS) -> int:
        """Waits for the process to end (a `kill` fault ends it); gives its exit status."""
        assert self._process is not None
        status = self._process.wait(timeout)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def stop(self) -> None:
        """Ends the process at the end of a run."""
        if self.running:
            self.kill()

    # -- control ----------------------------------------------------------------------------------------
    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.control + path, data=data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode(errors='replace')}") from None

    def reset(self) -> None:
        """Disarms every fault, empties the request log, and puts the settings back."""
        self._call("POST", "/reset")

    def settings(self, **values: int) -> None:
        """Changes page_size, lfs_bytes, multipart_bytes or part_bytes until the next test."""
        self._call("POST", "/settings", values)

    def arm(
        self,
        kind: str,
        *,
        path: str = "",
        method: str = "",
        origin: str = "hub",
        times: int = 1,
        skip: int = 0,
        seed: int = 0,
        **arguments: object,
    ) -> None:
        """Arms a fault (see server/faults.py for the kinds).

        Args:
            kind: what happens.
            path: regular expression, searched in the decoded path with its query; empty: any.
            method: "GET", or several as "GET|HEAD"; empty: any.
            origin: "hub", "cdn" or "other".
            times: how many matching requests it hits; -1: all of them.
            skip: how many matching requests pass before.
            seed: chooses positions that the arguments leave open.
            arguments: of this kind.
        """
        match = {"path": path, "method": method, "origin": origin, "times": times, "skip": skip, "seed": seed}
        self._call("POST", "/faults", {"kind": kind, **match, "arguments": arguments})

    def disarm(self) -> None:
        """Disarms every fault; the log stays."""
        self._call("DELETE", "/faults")

    def fired(self) -> list[dict[str, Any]]:
        """The faults that happened: kind, method, path, in order."""
        return list(self._call("GET", "/faults"))

    def requests(self, origin: str | None = None) -> list[dict[str, Any]]:
        """Every request since the last reset, in order, of one origin or of all."""
        seen = self._call("GET", "/requests")
        return [record for record in seen if origin is None or record["origin"] == origin]

    def tokens_seen(self, origin: str) -> set[str]:
        """The Authorization headers that an origin saw since the last reset."""
        return {r["authorization"] for r in self.requests(origin) if r["authorization"]}

    # -- repositories -----------------------------------------------------------------------------------
    def repo_name(self, stem: str = "repo", user: str | None = None) -> str:
        """A repository name that no other test has."""
        return f"{user or self.user}/{stem}-{secrets.token_hex(5)}"

    def seed(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
        message: str = "seed",
        tag: str | None = None,
    ) -> str:
        """Puts files into a repository in one commit, making it if need be. Returns the commit id."""
        folder = self.data / "incoming" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        sources = {}
        for number, (name, content) in enumerate(files.items()):
            (folder / str(number)).write_bytes(content)
            sources[name] = str(folder / str(number))
        body = {
            "repo": repo, "private": private, "gated": gated, "revision": revision, "message": message,
            "files": sources, "tag": tag,
        }  # fmt: skip
        return str(self._call("POST", "/seed", body)["commit"])

    def state(self, repo: str) -> dict[str, Any]:
        """What is stored: private, refs, commits with their files. Empty if there is no such repository."""
        return dict(self._call("GET", f"/state?repo={quote(repo, safe='')}"))

    def head(self, repo: str, revision: str = "main") -> str:
        """The commit a branch, a tag, `refs/…` or a commit id names."""
        refs = self.state(repo)["refs"]
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return str(refs[name])
        return revision

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a revision, read from the server's own folder."""
        records = self.state(repo)["commits"][self.head(repo, revision)]["files"]
        return {path: self.blob_path(record["sha256"]).read_bytes() for path, record in records.items()}

    def blob_path(self, sha256: str) -> Path:
        """Where the server keeps content."""
        return self.data / "blobs" / sha256[:2] / sha256

    def blob_of(self, content: bytes) -> Path:
        """Where the server keeps this content, or would."""
        return self.blob_path(hashlib.sha256(content).hexdigest())

    # -- clients ----------------------------------------------------------------------------------------
    def env(
        self, home: Path, *, token: str | None = "write", endpoint: str | None = None, **extra: str
    ) -> dict[str, str]:
        """The environment of a client process: this endpoint, a fresh HF_HOME, nothing of the caller's Hub.

        Args:
            home: becomes HF_HOME and HOME; made if need be.
            token: "write", "read", "foreign", "expired", None for no token, or a token itself.
            endpoint: another one than the Hub's.
            extra: further variables.
        """
        home.mkdir(parents=True, exist_ok=True)
        dropped = ("HF_", "HUGGING", "ADAPTERTOOL_", "TRANSFORMERS_")
        proxies = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and k.lower() not in proxies}
        settings = {
            "HF_ENDPOINT": endpoint or self.endpoint,
            "HF_HOME": str(home / "hf"),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "ADAPTERTOOL_RETRY_WAIT": "0.05",
            "ADAPTERTOOL_TIMEOUT": "0.8",
            "ADAPTERTOOL_TIME_LIMIT": "20",
            "NO_PROXY": "*",
            "PYTHONPATH": str(REPOSITORY),
        }
        if token is not None:
            settings["HF_TOKEN"] = self.tokens.get(token, token)
            settings["ADAPTERTOOL_TOKEN_ENDPOINT"] = endpoint or self.endpoint
        return {**kept, **settings, **extra}
