"""What a source of conversations gives: entries, and pictures that are not read yet."""

from typing import NamedTuple, Protocol


class Picture(Protocol):
    """A picture of an entry. name: as the data names it, for messages."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """The bytes of its file, undecoded. FileNotFoundError if there is none; another OSError or
        a ValueError if it cannot be read. All of them name it."""
        ...

    def exists(self) -> bool:
        """Whether there is such a file: by listings, which are made once. It is not read."""
        ...

    def nearest(self) -> str | None:
        """A file beside it whose name differs in the extension only: .gif for .jpg, or .JPG."""
        ...


class Entry(NamedTuple):
    """conversations: as LLaVA's JSON has it; `conversation.parse` makes turns of it."""

    id: str
    conversations: object
    pictures: tuple[Picture, ...]


class Source(Protocol):
    """Entries at random access. It can be pickled, and read by several threads at one time.

    fingerprint: SHA-256 of what it says, in hex: of the text, and of options that change what is
    said. Not of the pictures' files, which nobody wants to read twice.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry:
        """Raises conversation.Refused for what is no entry."""
        ...
