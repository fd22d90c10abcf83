"""What can go wrong, by what is to be done about it, and the exit status each ends with."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Exit(IntEnum):
    """Exit statuses of `iot-pipeline`: those from 64 to 78 as in sysexits.h.

    An answer to what was asked is 0 or 1; whatever kept the command from answering is another.
    """

    OK = 0
    """Done, or the answer is yes."""
    FAILED = 1
    """Not all is as it should be: images are missing, documents differ, a record cannot go back."""
    USAGE = 64
    """The command line is wrong; nothing was done."""
    DATA = 65
    """Too many records could not be handled, or a backup is damaged; a restart will not help before
    someone looks."""
    UNREACHABLE = 69
    """The broker or the database did not answer."""
    INTERNAL = 70
    """An error nobody foresaw; its traceback is on standard error."""
    IO = 74
    """A file cannot be read or written, or nobody reads the output any more."""
    CONFIG = 78
    """A setting is wrong or missing; a restart will not help before it is set."""
    INTERRUPTED = 130
    """Ctrl-C, as a shell has it: 128 and the signal's number."""


class Reason(StrEnum):
    """Why a record is refused: the dead letter's header `error.class`."""

    TOO_LARGE = "too-large"
    UNREADABLE = "unreadable"
    INVALID_JSON = "invalid-json"
    NOT_AN_OBJECT = "not-an-object"
    MISSING_FIELD = "missing-field"
    INVALID_FIELD = "invalid-field"
    INVALID_BASE64 = "invalid-base64"
    KEY_MISMATCH = "key-mismatch"
    NOT_AN_IMAGE = "not-an-image"
    TRUNCATED_IMAGE = "truncated-image"
    TOO_MANY_PIXELS = "too-many-pixels"
    REFUSED_BY_DATABASE = "refused-by-database"


class PipelineError(Exception):
    """The base of every error this package raises on purpose."""

    exit_status: Exit = Exit.FAILED
    logged = False
    """Whether a log line has said it already."""


class ConfigError(PipelineError):
    """A setting is wrong or missing. The message says which and what to set."""

    exit_status = Exit.CONFIG


class UsageError(ConfigError):
    """What only a command line can say is wrong. The message says which and what to say."""

    exit_status = Exit.USAGE


class FileError(PipelineError):
    """A file cannot be read or written. The message says which and why."""

    exit_status = Exit.IO


class TooManyDeadLetters(PipelineError):
    """So many records were refused that the fault is more likely ours than theirs."""

    exit_status = Exit.DATA


class InvalidMessage(PipelineError):
    """One record or image cannot be handled, now or ever: it belongs in the dead-letter topic."""

    exit_status = Exit.DATA

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SinkUnavailable(PipelineError):
    """The broker or the database does not take writes at the moment: wait and try again."""

    exit_status = Exit.UNREACHABLE


class DamagedBackup(PipelineError):
    """A file is no backup, or not as it was written. The message says which, and in what way."""

    exit_status = Exit.DATA


class RecordTooLarge(InvalidMessage):
    """A record exceeds IOT_MAX_RECORD_BYTES or the topic's limit. It was not sent."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.TOO_LARGE, message)
