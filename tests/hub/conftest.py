"""The `hub_server` fixture: a real Hub server process on free loopback ports, one per test run (per worker).

What a test gets, in short (`hub_process.py` has every name)::

    def test_something(hub_server, tmp_path):
        repo = hub_server.repo_name("adapter")             # "alice/adapter-3f2c…", new for each call
        head = hub_server.seed(repo, {"README.md": b"hi"}, private=True)     # -> commit id; without a client
        head = hub_server.seed(repo, {"a.safetensors": b"…"}, revision="main", message="second")
        run([...], env=hub_server.env(tmp_path / "home", token="write"))     # a client process

- ``hub_server.endpoint``: the Hub (``HF_ENDPOINT``); ``.cdn``: where it redirects LFS content to, another
  host; ``.other``: a third origin that answers like the Hub but is nobody's business, so no token may reach
  it; ``.refused``: an endpoint where nothing listens; ``.unknown_host``: one that no DNS server resolves;
  ``.tls``: an ``https`` endpoint whose server does not speak TLS.
- ``hub_server.tokens``: ``write`` and ``read`` (read-only) of user ``alice``, ``foreign`` (a write token of
  user ``bob``), ``expired``. ``hub_server.env(home, token=None | "write" | …)`` gives a whole environment
  for a client process: HF_ENDPOINT, HF_HOME, HF_TOKEN and the endpoint it is for; xet, telemetry and
  proxies off; short waits.
- ``hub_server.arm(kind, path=…, method=…, origin=…, times=1, skip=0, seed=0, **arguments)``: a fault for
  the next matching request(s); ``path`` is a regular expression searched in the decoded path. The kinds and
  their arguments are listed in ``server/faults.py``. ``hub_server.fired()`` says which faults happened.
  Everything armed is disarmed, and the request log emptied, before each test.
- ``hub_server.requests(origin=None)``: every request seen so far, as dicts (``origin`` "hub", "cdn" or
  "other", ``method``, ``path``, ``query``, ``authorization``, ``range``, ``status``, ``fault``).
  ``hub_server.tokens_seen("cdn")``: the Authorization headers that this origin saw.
- ``hub_server.state(repo)``: ``private``, ``refs`` (full ref name -> commit), ``commits`` (id -> parent,
  title, files (path -> sha256, size, lfs, blob_id)). ``hub_server.files(repo, revision="main")``: path ->
  bytes.
- ``hub_server.settings(page_size=…, lfs_bytes=…, multipart_bytes=…, part_bytes=…)``. ``hub_server.data``:
  the folder of its database and blobs. ``hub_server.kill()`` (SIGKILL), and ``hub_server.start()`` again:
  the same ports and data.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.forked_client import ForkedClient
from tests.hub.hub_process import HubServer


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The process itself, started once per run."""
    server = HubServer(tmp_path_factory.mktemp("hub"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def hub_server(hub_process: HubServer) -> HubServer:
    """The running server, with no fault armed and an empty request log."""
    if not hub_process.running:  # a test that kills it may leave it dead
        hub_process.start()
    hub_process.reset()
    return hub_process


@pytest.fixture(scope="session")
def client(hub_process: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedClient]:
    """Runs `adaptertool` against the server: `client.run("pull", …)`, in forks of one warm process."""
    folder = tmp_path_factory.mktemp("client")
    running = ForkedClient(hub_process.env(folder / "home"), folder)
    try:
        yield running
    finally:
        running.close()
