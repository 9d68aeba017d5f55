"""What a reference names: ``hf://owner/name@revision/folder``, or a version in a registry of one's own.

A reference may come from a file or from a server, so every part is checked before it becomes part of a URL
or of a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapterhub_tools.errors import FormatError, escape
from adapterhub_tools.store.files import path_reason

HUB_SCHEME = "hf"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_USER_INFO = re.compile(r"(?<=://)(?:[^/@\s]*:|hf_)[^/@\s]*(?=@)")
_REFS = re.compile(r"refs/(?:pr/[0-9]{1,9}|convert/[A-Za-z0-9._-]{1,60})")
_REMEDY = "Write hf://owner/name, hf://owner/name@revision, or hf://owner/name@revision/folder."
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:[/?#].*)?")
_VERSION = re.compile(r"sha256:[0-9a-f]{64}|[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReference:
    """Something in a repository of the Hub.

    Attributes:
        id: ``"owner/name"``; old repositories have a name alone.
        revision: a branch, tag or commit; None for the default branch.
        folder: a folder inside the repository; empty for its root.
    """

    id: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        """Returns the reference as it is written."""
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{HUB_SCHEME}://{self.id}{revision}{'/' * bool(self.folder)}{self.folder}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryReference:
    """An adapter in a registry that is a folder, or a prefix in an object store.

    Attributes:
        root: the registry's URL, without a final slash.
        name: ``"owner/name"``; empty for the registry as a whole.
        version: a tag, a number, or ``"sha256:<hex>"``; None for the latest.
    """

    root: str
    name: str = ""
    version: str | None = None

    def __str__(self) -> str:
        """Returns the reference as it is written."""
        version = "" if self.version is None else f"@{self.version}"
        return f"{self.root}{'/' * bool(self.name)}{self.name}{version}"


Reference = HubReference | RegistryReference


def is_remote(text: str) -> bool:
    """Returns whether a text names something by URL rather than by a local path."""
    return _SCHEME.match(text) is not None


def parse_reference(text: str, *, registry: str | None = None) -> Reference:
    """Reads a reference to one adapter or model.

    Args:
        text: ``hf://…``, another URL of a registry, or ``owner/name``.
        registry: the URL of the registry in which a bare ``owner/name`` lies; None for the Hub.

    Raises:
        FormatError: it is not a reference, or a part of it is hostile.
    """
    found = _SCHEME.match(text)
    if found is None:
        if registry is not None:
            return _registry(f"{registry}/{text}", text)
        return _hub(text, text)
    if found[1].lower() == HUB_SCHEME:
        return _hub(text[found.end() :], text)
    if found[1].lower() in ("http", "https"):
        raise _refused(text, "the address of a web page is not a reference")
    return _registry(text, text)


def parse_registry(text: str) -> RegistryReference:
    """Reads the URL of a whole registry.

    Raises:
        FormatError: it is not a URL that can be one.
    """
    return RegistryReference(root=_root(text, text))


def check_tag(tag: str) -> str:
    """Returns a tag of a registry or a git tag that may be part of a URL and of a path.

    Raises:
        FormatError: it may not.
    """
    if _VERSION.fullmatch(tag) is None or tag.startswith("sha256") or tag.isdigit():
        message = f"{escape(tag)!r} is not a tag: letters, digits, '.', '_' and '-', and not a number alone."
        raise FormatError.of("tag", message, loc="--tag", remedy="Choose a name such as v1.0.")
    return tag


def check_revision(revision: str, text: str = "") -> str:
    """Returns a revision whose name git would accept.

    Raises:
        FormatError: it is hostile or no git name.
    """
    if not _is_git_name(revision):
        raise _refused(text or revision, f"the revision {escape(revision)!r} is not a git name")
    return revision


def check_git_name(name: str, option: str, example: str) -> str:
    """Returns the name of a branch or tag that an option gives, if git would accept it.

    Args:
        name: the name.
        option: such as ``"--tag"``.
        example: a name to choose instead.

    Raises:
        FormatError: it is hostile or no git name.
    """
    if not _is_git_name(name):
        message = (
            f"{escape(name)!r} is not a name that git takes: letters, digits, '.', '_', '-' and '/' are safe."
        )
        raise FormatError.of(
            option.strip("-"), message, loc=option, remedy=f"Choose a name such as {example}."
        )
    return name


def _is_git_name(revision: str) -> bool:
    if is_commit(revision) or _REFS.fullmatch(revision):
        return True
    parts = revision.split("/")
    wrong = (
        not revision
        or len(revision) > 255
        or any(not part or part.startswith((".", "-")) or part.endswith((".", ".lock")) for part in parts)
        or ".." in revision
        or "@{" in revision
        or any(char in "\\~^:?*[ \"'<>|#%&" or not char.isprintable() for char in revision)
    )
    return not wrong


def is_commit(revision: str) -> bool:
    """Returns whether a revision is the id of a commit, and so can name nothing else."""
    return _COMMIT.fullmatch(revision) is not None


def check_id(id: str, text: str = "") -> str:
    """Returns a repository id that may be part of a URL.

    Raises:
        FormatError: it may not.
    """
    parts = id.split("/")
    for part in parts:
        bad = (
            _NAME.fullmatch(part) is None or ".." in part or "--" in part or part.endswith((".", "-", ".git"))
        )
        if bad or len(parts) > 2:
            raise _refused(text or id, f"{escape(id)!r} is not a repository id")
    return id


def is_id(id: str) -> bool:
    """Returns whether a text is a repository id that may be part of a URL."""
    try:
        check_id(id)
    except FormatError:
        return False
    return True


def _hub(rest: str, text: str) -> HubReference:
    """Reads what stands after ``hf://``; a revision ends at the next slash, unless it is ``refs/…``."""
    head, at, tail = rest.partition("@")
    parts = head.split("/")
    if not at:
        id, folder = "/".join(parts[:2]), "/".join(parts[2:])
        return HubReference(id=check_id(id, text), folder=_folder(folder, text))
    if len(parts) > 2:
        raise _refused(text, "the revision stands behind the id, before the folder")
    refs = _REFS.match(tail)
    end = refs.end() if refs else (tail + "/").index("/")
    revision = check_revision(unquote(tail[:end]), text)
    folder = tail[end:]
    if folder and not folder.startswith("/"):
        raise _refused(text, "the revision is followed by something that is no folder")
    return HubReference(id=check_id(head, text), revision=revision, folder=_folder(folder[1:], text))


def _folder(folder: str, text: str) -> str:
    folder = folder.removesuffix("/")
    if not folder:
        return ""
    reason = path_reason(folder)
    if not reason and not folder.isprintable():
        reason = "holds control characters"
    if reason or any(part.startswith(".") for part in folder.split("/")):
        raise _refused(text, f"the folder {escape(folder)!r} {reason or 'is hidden'}")
    return folder


def _registry(url: str, text: str) -> RegistryReference:
    before, at, version = url.rpartition("@")
    if not at or "/" in version:
        before, version = url, ""
    root, _, name = before.rpartition("/")
    root, _, owner = root.rpartition("/")
    if root.rstrip("/").endswith(":"):
        raise _refused(text, "that names no adapter in a registry")
    if at and version and _VERSION.fullmatch(version) is None:
        raise _refused(text, f"the version {escape(version)!r} is neither a tag, a number nor a digest")
    return RegistryReference(
        root=_root(root, text), name=check_id(f"{owner}/{name}", text), version=version or None
    )


def _root(url: str, text: str) -> str:
    url = url.rstrip("/")
    parts = urlsplit(url)
    if not parts.scheme or parts.scheme == HUB_SCHEME or parts.username or parts.password:
        raise _refused(text, "that is not the URL of a registry (such as file:///srv/adapters)")
    if parts.scheme == "file" and (parts.netloc or not parts.path):
        raise _refused(text, "a folder is written file:///absolute/path")
    path = unquote(parts.path)
    if any(part in (".", "..") for part in path.split("/")) or not path.isprintable() or "\\" in path:
        raise _refused(text, "the path holds '..', '.', a backslash or control characters")
    return url


def _refused(text: str, reason: str) -> FormatError:
    shown = escape(_USER_INFO.sub("…", text))
    return FormatError.of("reference", f"{shown!r}: {reason}.", remedy=_remedy(text))


def _remedy(text: str) -> str:
    """Returns how what was probably meant is written."""
    if text.startswith(("/", "./")):
        place = Path(text).absolute().as_uri()
        return f"In a registry that is a folder it is written {place}; on the Hub hf://owner/name."
    page = _PAGE.fullmatch(text)
    if page is not None and is_id(page[1]):
        return f"Write hf://{page[1]}."
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() not in (HUB_SCHEME, "http", "https"):
        place = "file:///folder" if scheme[1].lower() == "file" else f"{scheme[1]}://bucket/prefix"
        return f"Write {place}/owner/name, or {place}/owner/name@version."
    return _REMEDY
