"""All that is taken from huggingface_hub: its HTTP session, its store of tokens, and the xet upload.

It is imported inside the functions, because it takes a while to load and most commands do not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from adapterhub_tools.errors import HubError, escape

_LOGIN = "Log in again with `hf auth login`, or set HF_TOKEN."


def session() -> Any:
    """Returns the shared HTTP client (httpx), with the user's proxies and certificates.

    Raises:
        HubError: a proxy or certificate that the environment names cannot be used.
    """
    from huggingface_hub import get_session

    try:
        return get_session()
    except (ImportError, ValueError, OSError) as error:
        # Which setting it was, the client does not always say.
        raise HubError.of(
            "network-settings",
            f"the environment's network settings cannot be used: {escape(error).rstrip('.')}.",
            remedy="Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE; SOCKS needs package socksio.",
        ) from error


def proxy_for(url: str) -> str:
    """Returns host and port of the proxy that a request goes through; empty without one. Never its login."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return ""
    named = getproxies()
    text = named.get(parts.scheme) or named.get("all") or ""
    return text.rpartition("://")[2].rpartition("@")[2].rstrip("/")


def transport_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of error that the client raises when a request gets no usable answer."""
    from huggingface_hub import errors

    # httpx or httpx2, whichever this version of huggingface_hub is built on.
    base = errors.HfHubHTTPError.__mro__[1]
    client = sys.modules[base.__module__.partition(".")[0]]
    return (client.HTTPError, client.InvalidURL, client.StreamError)


def offline_error() -> type[Exception]:
    """Returns the class of error that is raised where HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return OfflineModeIsEnabled


def current_token() -> str | None:
    """Returns the token of the environment or of the last login; None without one.

    Raises:
        HubError: it cannot be had although it should be there.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import OIDCError

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    failures: tuple[type[Exception], ...] = (OIDCError, OSError, *transport_errors())
    try:
        return _sendable(get_token())
    except failures as error:
        message = f"the token could not be read ({type(error).__name__})."
        raise HubError.of("token", message, remedy=_LOGIN) from error


def token_named(name: str) -> str | None:
    """Returns the stored token with a name, such as ``"hub.example:8443"``; None without one."""
    from huggingface_hub import constants
    from huggingface_hub.utils._auth import get_stored_tokens

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        found = get_stored_tokens().get(name)
    except (OSError, ValueError) as error:
        message = f"the stored tokens could not be read ({type(error).__name__})."
        raise HubError.of("token", message, remedy=_LOGIN) from error
    return _sendable(found) if isinstance(found, str) and found else None


def _sendable(token: str | None) -> str | None:
    """Returns a token that may stand in a header.

    Raises:
        HubError: it holds characters that no token has.
    """
    if token is not None and not (token.isascii() and token.isprintable()):
        message = "the token holds characters that no token has."
        raise HubError.of("token", message, remedy=_LOGIN)
    return token


def xet_is_on() -> bool:
    """Returns whether the chunked protocol of huggingface.co is installed and not switched off."""
    from huggingface_hub.utils._runtime import is_xet_available

    return bool(is_xet_available())


def upload_by_xet(
    endpoint: str,
    token: str | None,
    repo_id: str,
    files: Sequence[tuple[str, Path]],
    *,
    revision: str,
    pr: bool,
) -> None:
    """Sends the content of large files to the Hub by its chunked protocol; no commit is made.

    Args:
        endpoint: the Hub.
        token: the token issued for it.
        repo_id: the repository.
        files: path in the repository, and the local file.
        revision: the branch that the commit will go to.
        pr: whether it will be a pull request.

    Raises:
        HubError: it failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *transport_errors())
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files]
    try:
        HfApi(endpoint=endpoint, token=token or False).preupload_lfs_files(
            repo_id, additions, revision=revision, create_pr=pr, free_memory=False
        )
    except failures as error:
        raise HubError.of(
            "upload",
            f"the content could not be sent ({type(error).__name__}).",
            remedy="Try again; set HF_HUB_DISABLE_XET=1 to send it by plain HTTP.",
        ) from error
