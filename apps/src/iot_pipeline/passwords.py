"""Passwords in files, which may change while they are used.

A server learns of a new password at one moment and its clients at another. In between, a client's
file holds both, one a line::

    passwords = PasswordFile("/etc/iot-pipeline/iot-storage.kafka.password")
    place, password = passwords.choose()
    # log in; refused: choose() again gives the other one
    passwords.keep(place)  # it let us in: begin with it from now on
"""

from __future__ import annotations

from pathlib import Path


class PasswordFile:
    """Stands for a password wherever a client keeps one. It holds none itself."""

    def __init__(self, path: str) -> None:
        """Nothing is read yet."""
        self.path = path
        self._turn = 0

    def __repr__(self) -> str:
        """Its path; there is no more to tell."""
        return f"PasswordFile({self.path!r})"

    def read(self) -> list[str]:
        """The passwords that the file holds now, at least one.

        Raises:
            OSError, ValueError: it cannot be read, or holds none.
        """
        # An editor may have put a byte order mark before the first. Only a line feed ends one, with
        # the carriage return of other systems before it: a password may hold any other character.
        lines = Path(self.path).read_bytes().decode("utf-8-sig").split("\n")
        passwords = [line for line in (each.removesuffix("\r") for each in lines) if line]
        if not passwords:
            raise ValueError(f"{self.path} is empty")
        return passwords

    def choose(self) -> tuple[int, str]:
        """The place and text of the password whose turn it is; the next call gives the one after.

        Raises:
            OSError, ValueError: as `read`.
        """
        passwords = self.read()
        place = self._turn % len(passwords)
        self._turn = place + 1
        return place, passwords[place]

    def keep(self, place: int) -> None:
        """Begin with this one from now on: it let us in."""
        self._turn = place
