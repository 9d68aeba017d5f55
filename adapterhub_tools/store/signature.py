"""Signatures over a whole folder, made and checked by the OpenSSF library model-signing (extra ``[sign]``).

The signature is ``model.sig`` in the folder, or ``adapter_manifest.json.sig`` beside a manifest, which lists
no file of that name: a Sigstore bundle over an in-toto statement with the SHA-256 of every file. Keys are
elliptic-curve keys in PEM files; nothing is asked of a network. Covered is every file of the folder and of
the folders in it, but for the signature itself, ``README.md`` (cards are edited later), what belongs to git,
and ``.cache`` and ``.adapter_origin.json``, where downloads keep their records.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError
from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.store.files import store_error
from adapterhub_tools.store.strict_json import parse_json, read_json_object

if TYPE_CHECKING:
    from model_signing import hashing, manifest

SIGNATURE_FILE = "model.sig"
MANIFEST_SIGNATURE = f"{MANIFEST_NAME}.sig"
_IGNORED = (SIGNATURE_FILE, MANIFEST_SIGNATURE, "README.md", ".cache", ".adapter_origin.json")
NOT_COVERED = (*_IGNORED, ".git", ".github", ".gitattributes", ".gitignore")
"""What in a signed folder may differ from when it was signed; folders with all that is in them."""

_MODULES = ("model_signing", "OpenSSL")
_SIGN_AGAIN = "Get the folder again from where it was signed; or sign it, if the change is yours."
_MOST_FILES = 100_000


def signature_name(folder: Path) -> str:
    """Returns the name that a folder's signature has in it."""
    return MANIFEST_SIGNATURE if (folder / MANIFEST_NAME).is_file() else SIGNATURE_FILE


class Signer:
    """Signs folders with a private key.

    Args:
        key: the PEM file of an elliptic-curve key (P-256, P-384 or P-521) without a password.

    Raises:
        UnsupportedError: the extra ``[sign]`` is not installed.
        FormatError: the file is not such a key.
        StoreError: it cannot be read.
    """

    def __init__(self, key: Path) -> None:
        """Reads the key, so that a wrong one is told before any work."""
        require_extra("--sign")
        from model_signing import signing

        self._config: signing.Config = signing.Config()  # type: ignore[no-untyped-call]
        with _key_errors(key, "private"):
            self._config.use_elliptic_key_signer(private_key=key)

    def sign(self, folder: Path, name: str) -> bytes:
        """Returns the signature over a folder.

        Args:
            folder: the folder; every file in it is read.
            name: what the signature calls it; only informative.

        Raises:
            FormatError: there is a symbolic link or a special file in it.
            StoreError: a file cannot be read.
        """
        problems = [problem for _, problem in _walk(folder) if problem is not None]
        if problems:
            raise FormatError(*problems)
        self._config.set_hashing_config(_named_hashing(name))
        try:
            with tempfile.TemporaryDirectory(prefix="adaptertool-sign-") as scratch:
                place = Path(scratch) / SIGNATURE_FILE
                self._config.sign(folder, place)
                return place.read_bytes()
        except OSError as error:
            raise store_error(error, "sign it", error.filename or folder) from error


def check_signature(folder: Path, public_key: Path) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """Compares a folder with its signature.

    Args:
        folder: the signed folder.
        public_key: the PEM file of the signer's public key.

    Returns:
        The files that the signature covers, and what is wrong: nothing if it is that key's signature over
        exactly these files.

    Raises:
        UnsupportedError: the extra ``[sign]`` is not installed.
        FormatError: the key is not a public key.
        StoreError: a file cannot be read.
    """
    require_extra("--pubkey")
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    folder = folder.resolve()
    config: verifying.Config = verifying.Config()  # type: ignore[no-untyped-call]
    with _key_errors(public_key, "public"):
        config.use_elliptic_key_verifier(public_key=public_key)
    name = signature_name(folder)
    place = folder / name
    if place.is_symlink() or not place.is_file():
        return (), (
            _problem(
                name,
                "no-signature",
                "the folder has no signature.",
                "Get it from where it was signed: without its signature nothing vouches for it.",
            ),
        )
    files = list(_walk(folder))
    problems = tuple(problem for _, problem in files if problem is not None)
    if problems:
        return (), problems
    try:
        bundle = read_json_object(place, file=name)
    except FormatError as error:
        return (), error.problems
    try:
        # Of signatures without a key hint the library warns on standard output, which is not ours to fill.
        with contextlib.redirect_stdout(io.StringIO()):
            config.set_hashing_config(_hashing_of(bundle)).verify(folder, place)
        return tuple(sorted(_listed(bundle))), ()
    except InvalidSignature:
        return (), (_problem(name, "bad-signature", "it was changed, or is not by this key."),)
    except ValueError as error:
        if str(error).startswith("Signature mismatch"):
            return (), _changed_files(folder, name, bundle, [file for file, _ in files]) or (
                _problem(name, "signed-files", f"the files are not those that were signed: {error}."),
            )
        return (), (_refused(name, str(error)),)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        broken = f"it is not a signature by the library model-signing ({type(error).__name__})."
        return (), (_problem(name, "signature-format", broken),)
    except OSError as error:
        raise store_error(error, "read it", error.filename or folder) from error


def covered_files(folder: Path) -> tuple[str, ...]:
    """Returns the files that a signature over a folder covers, sorted.

    Raises:
        StoreError: a folder cannot be read.
    """
    return tuple(sorted(name for name, _ in _walk(folder)))


def require_extra(option: str) -> None:
    """Checks that the library is installed.

    Raises:
        UnsupportedError: it, or what it needs, is not.
    """
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise UnsupportedError.of(
            "no-model-signing",
            f"signatures need the library model-signing; not installed: {', '.join(missing)}.",
            loc=option,
            remedy="Install it with: pip install 'adaptertool[sign]'.",
        )


def _walk(folder: Path) -> Iterator[tuple[str, Problem | None]]:
    """Yields every file that a signature has to cover, with the problem if it is none that can be signed."""

    def fail(error: OSError) -> None:
        raise store_error(error, "list the folder", error.filename or folder) from error

    count = 0
    for place, folders, names in os.walk(folder, onerror=fail):
        top = os.path.relpath(place, folder)
        if top == ".":
            folders[:] = [name for name in folders if name not in NOT_COVERED]
        for name in sorted((*folders, *names)):
            path = os.path.join(place, name)
            relative = name if top == "." else f"{top}/{name}"
            if relative in NOT_COVERED or (name in folders and not os.path.islink(path)):
                continue
            count += 1
            problem = None
            if count > _MOST_FILES:
                raise FormatError.of("too-many-files", f"more than {_MOST_FILES:,} files.", file=str(folder))
            if os.path.islink(path):
                problem = Problem(
                    kind="symlink",
                    message="it is a symbolic link, and what it leads to may change.",
                    file=relative,
                    remedy="Copy the folder with its contents, such as with cp -rL.",
                )
            elif not os.path.isfile(path):
                problem = Problem(
                    kind="not-regular",
                    message="it is not a regular file.",
                    file=relative,
                    remedy="Remove it.",
                )
            yield relative, problem


def _named_hashing(name: str) -> hashing.Config:
    """Returns what hashes a folder and gives it a name of ours: that of a folder being built is random."""
    from model_signing import hashing, manifest

    class Named(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            found = super().hash(model_path, files_to_hash=files_to_hash)
            kind = manifest.SerializationType.from_args(found.serialization_type)
            items = [kind.new_item(item.identifier, item.digest) for item in found.resource_descriptors()]
            return manifest.Manifest(name, items, kind)

    config: hashing.Config = Named()  # type: ignore[no-untyped-call]
    config.set_ignored_paths(paths=_IGNORED, ignore_git_paths=True)
    return config


def _hashing_of(bundle: dict[str, Any]) -> hashing.Config:
    """Returns what hashes a folder as a signature says, but leaves out no more than NOT_COVERED.

    A signature may name further files that it leaves out; here they count as files that were not signed.
    """
    from model_signing import hashing

    class Strict(hashing.Config):
        def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
            pass

    config: hashing.Config = Strict()  # type: ignore[no-untyped-call]
    kind = _payload(bundle).get("predicate", {}).get("serialization", {})
    if kind.get("method") == "shards":
        # The library writes the size as 1000.0, which its own reader then cannot use.
        size = int(kind["shard_size"])
        config.use_shard_serialization(hashing_algorithm=kind["hash_type"], shard_size=size)
    else:
        config.use_file_serialization(hashing_algorithm=kind.get("hash_type", "sha256"))
    tops = {name.split("/")[0] for name in _listed(bundle)}
    left = [name for name in NOT_COVERED if name not in tops]
    return config.set_ignored_paths(paths=left, ignore_git_paths=False)


def _payload(bundle: dict[str, Any]) -> dict[str, Any]:
    import base64

    payload = parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"]), file=SIGNATURE_FILE)
    if not isinstance(payload, dict):
        raise TypeError("the payload is no object")
    return payload


def _listed(bundle: dict[str, Any]) -> dict[str, str]:
    """Returns the files that a signature names, with their digests; of one over pieces, with the last."""
    payload = _payload(bundle)
    predicate = payload.get("predicate", {})
    sharded = predicate.get("serialization", {}).get("method") == "shards"
    return {
        item["name"].rsplit(":", 2)[0] if sharded else item["name"]: str(item["digest"])
        for item in predicate.get("resources", payload["subject"])
    }


def _changed_files(folder: Path, name: str, bundle: dict[str, Any], files: list[str]) -> tuple[Problem, ...]:
    """Returns what differs from a signature that is the key's own; nothing where it is not by SHA-256."""
    from adapterhub_tools.store.digest import file_sha256

    listed, problems = _listed(bundle), []
    for file in sorted({*listed, *files}):
        if file not in files:
            problems.append(("missing-file", "it was signed, but is missing.", file))
        elif file not in listed:
            problems.append(("not-covered", "it is not among the files that were signed.", file))
        elif len(listed[file]) == 64 and (found := file_sha256(folder / file)) != listed[file]:
            message = f"its SHA-256 is {found}, but {name} is over {listed[file]}."
            problems.append(("signed-files", message, file))
    return tuple(
        Problem(kind=kind, message=message, file=file, remedy=_SIGN_AGAIN) for kind, message, file in problems
    )


@contextlib.contextmanager
def _key_errors(path: Path, which: str) -> Iterator[None]:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except OSError as error:
        raise store_error(error, "read the key", path) from error
    except (AttributeError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        # An encrypted key is a TypeError; one of another kind has no curve.
        reason = str(error).splitlines()[0].rstrip(".?") if str(error) else type(error).__name__
        raise FormatError.of(
            "key",
            f"expected the PEM file of a {which} elliptic-curve key (P-256, P-384 or P-521) without a "
            f"password: {reason}.",
            file=str(path),
            remedy="Make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; and its "
            "public half with: openssl ec -in key.pem -pubout -out key.pub.",
        ) from error


def _refused(name: str, reason: str) -> Problem:
    """Returns the problem that the library's message tells; it knows only one class of error."""
    if reason.startswith("Key mismatch"):
        remedy = (
            "Give the public key of whoever signed it; if that is the one given, do not trust the folder."
        )
        return _problem(name, "other-key", "it was made by another key than the one given.", remedy)
    first = reason.splitlines()[0].rstrip(".") if reason else "no reason given"
    return _problem(name, "signature-format", f"it cannot be read: {first}.")


def _problem(name: str, kind: str, message: str, remedy: str = _SIGN_AGAIN) -> Problem:
    return Problem(kind=kind, message=message, file=name, remedy=remedy)
