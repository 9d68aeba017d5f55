"""Which Hub is talked to, and which token it may see: a token goes only to the endpoint it was issued for."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from adapterhub_tools.errors import HubError, escape
from adapterhub_tools.hub import library

DEFAULT_ENDPOINT = "https://huggingface.co"
TOKEN_ENDPOINT = "ADAPTERTOOL_TOKEN_ENDPOINT"
"""The variable that says for which endpoint the token of huggingface_hub was issued."""

Origin = tuple[str, str, int]
_PORTS = {"http": 80, "https": 443}
_LOGIN = re.compile(r"(?:^|(?<=://))(?:[^/@]*|[^/@]*:(?!\d*/)[^@]*)(?=@)")
"""What stands before the host, also without a scheme; a password may hold a slash, a port may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A Hub.

    Attributes:
        url: its URL without a final slash.
        token: the token issued for it, if there is one; never shown.
    """

    url: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Endpoint:
        """Returns the endpoint that ``HF_ENDPOINT`` names, or that of huggingface.co, with its token.

        Raises:
            HubError: it is not a URL, or not https although it is another machine.
        """
        url = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if "://" not in url:
            message = f"{escape(without_secrets(url))!r} is not the URL of a server."
            raise HubError.of("endpoint", message, loc="HF_ENDPOINT", remedy="Write https://hub.example.")
        plain = cls(url=url)
        plain.check_url(url)
        issued_for = (os.environ.get(TOKEN_ENDPOINT) or DEFAULT_ENDPOINT).rstrip("/")
        host = urlsplit(url).netloc
        if origin_of(issued_for) == origin_of(url):
            return cls(url=url, token=library.current_token() or library.token_named(host))
        return cls(url=url, token=library.token_named(host))

    @property
    def is_default(self) -> bool:
        """Whether this is huggingface.co."""
        return self.url == DEFAULT_ENDPOINT

    @property
    def shown(self) -> str:
        """The host, for messages."""
        return escape(urlsplit(self.url).netloc)

    @property
    def missing_token(self) -> str:
        """Why no token was sent, and what to do about it."""
        try:
            withheld = library.current_token() is not None
        except HubError:
            withheld = False
        if withheld:
            return (
                "No token was sent: the token of huggingface_hub is only sent where it was issued for"
                f" (see {TOKEN_ENDPOINT})."
            )
        also = "" if self.is_default else f" and {TOKEN_ENDPOINT}={self.url}"
        return f"No token was sent: log in with `hf auth login`, or set HF_TOKEN{also}."

    def headers_for(self, url: str) -> dict[str, str]:
        """Returns the token's header if the URL has this endpoint's origin, else none."""
        if self.token is None or origin_of(url) != origin_of(self.url):
            return {}
        return {"authorization": f"Bearer {self.token}"}

    def is_own(self, url: str) -> bool:
        """Returns whether a URL has this endpoint's origin."""
        return origin_of(url) == origin_of(self.url)

    def check_url(self, url: str) -> str:
        """Returns a URL that may be asked: https, or http on this machine while the endpoint is there too.

        Raises:
            HubError: it may not.
        """
        try:
            parts = urlsplit(url)
            origin = origin_of(url)
        except ValueError:
            parts, origin = urlsplit(""), ("", "", 0)
        if parts.scheme not in _PORTS or not origin[1] or parts.username or parts.password:
            raise HubError.of(
                "bad-answer",
                f"{escape(without_secrets(url))!r} is not a URL that can be asked.",
                remedy="Check HF_ENDPOINT; if that is right, the server is broken or hostile.",
            )
        here = is_loopback(origin[1])
        if parts.scheme == "http" and not (here and is_loopback(origin_of(self.url)[1])):
            raise HubError.of(
                "insecure",
                f"{escape(without_secrets(url))!r} is not encrypted, and is not this machine's own.",
                remedy="Use an https endpoint.",
            )
        return url

    def resolve(self, base: str, location: str) -> str:
        """Returns the URL that a Location header means, if it may be asked.

        Raises:
            HubError: it may not.
        """
        try:
            return self.check_url(urljoin(base, location))
        except ValueError as error:
            raise HubError.of(
                "bad-answer",
                f"the server redirects to {escape(location)!r}, which is not a URL.",
                remedy="The server is broken or hostile; check HF_ENDPOINT.",
            ) from error


def origin_of(url: str) -> Origin:
    """Returns scheme, host and port of a URL.

    Raises:
        ValueError: the port is no number.
    """
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def is_loopback(host: str) -> bool:
    """Returns whether a host name is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_secrets(url: str) -> str:
    """Returns a URL as it may be shown: without a query, which may hold a signature, and without a login."""
    return _LOGIN.sub("…", url.partition("?")[0])
