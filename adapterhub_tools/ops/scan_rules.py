"""The rules of a scan: what each looks for, how serious it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_tools.errors import AdapterError, FormatError, Problem, UnsupportedError
from adapterhub_tools.ops.validation_report import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that a scan looks for.

    Attributes:
        id: a stable identifier; the ``kind`` of the problems that it finds.
        severity: ``"error"``, or ``"warning"`` for what no program runs or trusts by itself.
        finds: what it finds, in words.
        remedy: what to do about it.
        error: what ``raise_for_problems`` raises for it.
        sendable: whether a push sends a file that has it all the same, with a note.
    """

    id: str
    severity: str
    finds: str
    remedy: str
    error: type[AdapterError] = UnsupportedError
    sendable: bool = False

    def finding(self, message: str, *, file: str, loc: str = "") -> Finding:
        """Returns that it found something.

        Args:
            message: what; never the content of a secret.
            file: where.
            loc: the place in the file.
        """
        problem = Problem(
            kind=self.id, message=message, file=file, loc=loc, remedy=self.remedy, severity=self.severity
        )
        return Finding(error=self.error, problem=problem)


def _rule(id: str, severity: str, finds: str, remedy: str, **more: bool | type[AdapterError]) -> Rule:
    return Rule(id=id, severity=severity, finds=finds, remedy=remedy, **more)  # type: ignore[arg-type]


PICKLE = _rule(
    "pickle",
    "error",
    "a Python pickle, by its name or its first bytes, in a ZIP archive, or as objects in a NumPy file",
    "Loading it can run code. Convert it to safetensors in a place you trust, then remove it.",
)
PICKLE_CODE = _rule(
    "pickle-code",
    "error",
    "a pickle that imports more than is needed to rebuild tensors, or whose instructions are damaged",
    "Do not load it. Remove it, and ask whoever made it what these imports are for.",
)
NATIVE_CODE = _rule(
    "native-code",
    "error",
    "machine code: ELF, PE, Mach-O, WebAssembly or Java, or a name such as .so, .dll or .exe",
    "Remove it; models and adapters need none.",
)
EXECUTABLE_FORMAT = _rule(
    "executable-format",
    "error",
    "a model format that can carry code: Keras and HDF5, TensorFlow graphs, joblib, dill, model archives",
    "Convert it to safetensors in a place you trust, then remove it.",
)
REMOTE_CODE = _rule(
    "remote-code",
    "error",
    "a config that makes a loader run Python code: auto_map, custom pipelines, kernels of a repository",
    "Read that code, pin its revision, and load with trust_remote_code only then; or remove the entry.",
    sendable=True,
)
FOREIGN_IMPORT = _rule(
    "foreign-import",
    "error",
    "a config that makes a loader import a module of none of the known libraries",
    "Name a class of a known library, or remove the entry.",
)
TEMPLATE_CODE = _rule(
    "template-code",
    "error",
    "a chat template that reaches for Python's internals, openly or by strings put together",
    "Take the template of the base model; a chat template needs messages and strings only.",
    error=FormatError,
)
SECRET = _rule(
    "secret",
    "error",
    "an access key, token, private key, or URL with a password; the report never shows it",
    "Remove it from the file, and revoke it if it was ever published.",
    error=FormatError,
)
PATH_ESCAPE = _rule(
    "path-escape",
    "error",
    "a symbolic link, or a path in an index or manifest, that leads out of the folder or nowhere",
    "Put the file itself into the folder.",
    error=FormatError,
)
SPECIAL_FILE = _rule(
    "special-file",
    "error",
    "a named pipe, a device or a socket",
    "Remove it; reading it could wait for ever.",
    error=FormatError,
)
FILE_NAME = _rule(
    "file-name",
    "error",
    "a file name with control or direction characters, a backslash, or two names that differ in case only",
    "Rename the file.",
    error=FormatError,
)
ARCHIVE = _rule(
    "archive",
    "error",
    "an archive or compressed file, whose content a scan cannot answer for",
    "Unpack it in a place you trust, scan what was in it, and remove it.",
)
DISGUISED = _rule(
    "disguised",
    "error",
    "a file that is something else than its name says",
    "Find out what it is before anything opens it; get it again from its source.",
    error=FormatError,
)
POLYGLOT = _rule(
    "polyglot",
    "error",
    "a file that is also a ZIP archive, so that two programs see two different contents",
    "Get it again from its source, or save the tensors anew.",
    error=FormatError,
)
BROKEN_SAFETENSORS = _rule(
    "broken-safetensors",
    "error",
    "a safetensors file that readers could understand differently: bytes behind it, gaps, duplicate keys",
    "Save the tensors anew, or get the file again from its source.",
    error=FormatError,
)
BROKEN_CONFIG = _rule(
    "broken-config",
    "error",
    "a config that readers could understand differently: duplicate keys, other encodings, no JSON",
    "Restore the file from its source.",
    error=FormatError,
)
OVERSIZED = _rule(
    "oversized",
    "error",
    "a config larger than 16 MiB, more than 10,000 files, or folders deeper than 16",
    "Look at what it holds; no adapter or model needs that.",
    error=FormatError,
)
PYTHON_CODE = _rule(
    "python-code",
    "warning",
    "Python source or byte code",
    "Read it before anything imports it; an adapter needs none.",
)
NOTEBOOK = _rule(
    "notebook", "warning", "a Jupyter notebook", "Read it before you run it; an adapter needs none."
)
SCRIPT = _rule(
    "script",
    "warning",
    "a script of a shell or another language, by its name or its first line",
    "Read it before you run it; an adapter needs none.",
)
SYMLINK = _rule(
    "symlink",
    "warning",
    "a symbolic link inside the folder; the links of a Hub cache are expected",
    "Put the file itself into the folder; push refuses links.",
)
HIDDEN_FILE = _rule(
    "hidden-file",
    "warning",
    "a hidden file or folder (such as .env or .DS_Store), but for those of git, the Hub and this tool",
    "Look at it; remove it if nothing needs it.",
)
LOCAL_BASE = _rule(
    "local-base",
    "warning",
    "a base_model_name_or_path that is a local path or a URL",
    "Write the base's repository id: nobody else has that path, and it may show more than you want.",
    sendable=True,
)
LARGE_TEXT = _rule(
    "large-text",
    "warning",
    "a file of which only the first 64 MiB were searched for secrets",
    "Look through the rest by other means, or remove it.",
    sendable=True,
)

RULES: tuple[Rule, ...] = (
    PICKLE,
    PICKLE_CODE,
    NATIVE_CODE,
    EXECUTABLE_FORMAT,
    REMOTE_CODE,
    FOREIGN_IMPORT,
    TEMPLATE_CODE,
    SECRET,
    PATH_ESCAPE,
    SPECIAL_FILE,
    FILE_NAME,
    ARCHIVE,
    DISGUISED,
    POLYGLOT,
    BROKEN_SAFETENSORS,
    BROKEN_CONFIG,
    OVERSIZED,
    PYTHON_CODE,
    NOTEBOOK,
    SCRIPT,
    SYMLINK,
    HIDDEN_FILE,
    LOCAL_BASE,
    LARGE_TEXT,
)
"""Every rule, errors first."""
