"""Visitors: what each brought and made, kept apart, and gone when they go.

A visit is one open page, known by Gradio's session hash, which only that page has. Faces are held in memory;
a photo's file is deleted as soon as its faces are found. Pictures lie in a folder of the visit that no
address leads to: the page gets them inside its own event stream. Only programs, which fetch files, get an
address, one that cannot be guessed and that ends with their session.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from withanyone.faces import Face
from withanyone.readout import Reading

PREFIX = "withanyone-"


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for. Numbers a minute count the last sixty seconds."""

    people: int = 8
    photos_per_person: int = 5
    faces_per_photo: int = 8
    upload_bytes: int = 20_000_000
    prompt: int = 2000
    name: int = 24
    steps: int = 100
    candidates: int = 8
    pictures_at_once: int = 4
    pictures_kept: int = 40
    uploads_per_minute: int = 60
    pictures_per_minute: int = 40
    calls_per_minute: int = 120  # of programs, from one address
    upload_seconds: float = 120.0  # an upload that nothing came to fetch
    result_seconds: float = 600.0  # a program's result
    idle_seconds: float = 3600.0  # a page without a sign of life


@dataclass
class Photo:
    """The faces of one photo, largest first, and which of them is meant. `drawn`: (number, photo) of a drawn
    person."""

    faces: list[Face]
    chosen: int = 0
    drawn: tuple[int, int] | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(6))

    @property
    def face(self) -> Face:
        return self.faces[self.chosen]


@dataclass
class Person:
    name: str
    photos: list[Photo]
    color: int
    id: str = field(default_factory=lambda: secrets.token_hex(6))


@dataclass(frozen=True)
class Picture:
    """A picture that was made: its file (PNG with settings), and what was read out of it."""

    path: Path
    settings: dict[str, Any]
    reading: Reading | None
    said: list[dict[str, str]]
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class Permit:
    """A job may go on while its file exists, so that ending a visit ends its jobs, in any process."""

    def __init__(self, folder: Path):
        self.path = folder / f"job-{secrets.token_hex(8)}"
        self.path.touch()

    def __bool__(self) -> bool:
        return self.path.exists()

    def revoke(self) -> None:
        self.path.unlink(missing_ok=True)


class Visit:
    """One visitor's people, pictures and jobs."""

    def __init__(self, folder: Path, limits: Limits):
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.limits = limits
        self.people: list[Person] = []
        self.pictures: dict[str, Picture] = {}
        self.permits: list[Permit] = []
        self.lock = threading.RLock()
        self.last_seen = time.monotonic()

    def permit(self) -> Permit:
        """For a new job; ValueError while another one runs."""
        with self.lock:
            self.permits = [permit for permit in self.permits if permit]
            if self.permits:
                raise ValueError("A picture of yours is being made: wait for it, or cancel it first.")
            self.permits.append(Permit(self.folder))
            return self.permits[-1]

    def cancel(self) -> bool:
        """Stop what is being made; whether there was anything."""
        with self.lock:
            running = [permit for permit in self.permits if permit]
            for permit in running:
                permit.revoke()
            return bool(running)

    def keep(self, picture: Picture) -> None:
        with self.lock:
            self.pictures[picture.id] = picture
            while len(self.pictures) > self.limits.pictures_kept:
                oldest = self.pictures.pop(next(iter(self.pictures)))
                oldest.path.unlink(missing_ok=True)

    def color_for_new(self) -> int:
        taken = {person.color for person in self.people}
        return next(i for i in range(len(self.people) + 1) if i not in taken)


class Rate:
    """At most `most` events a minute for each key; old keys are forgotten."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic):
        self.most = most
        self._clock = clock
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def allow(self, key: str, count: int = 1) -> bool:
        now = self._clock()
        with self._lock:
            for old in [k for k, times in self._times.items() if not times or now - times[-1] > 60]:
                del self._times[old]
            times = self._times.setdefault(key, deque())
            while times and now - times[0] > 60:
                times.popleft()
            if len(times) + count > self.most:
                return False
            times.extend([now] * count)
            return True


class Visits:
    """All visits of one running page, their folders, and the inbox in which uploads arrive.

    inbox: where Gradio accepts files from (below its upload folder): uploads, and results for programs.
    """

    def __init__(self, upload_folder: str | os.PathLike, limits: Limits | None = None):
        self.limits = limits or Limits()
        upload_folder = Path(upload_folder).resolve()
        for folder in {upload_folder, Path(tempfile.gettempdir()).resolve()}:
            remove_orphans(folder)
        mine = f"{PREFIX}{os.getpid()}-"
        self.root = Path(tempfile.mkdtemp(prefix=mine)).resolve()
        self.inbox = upload_folder / f"{mine}{secrets.token_hex(8)}"
        self.results = self.inbox / "results"
        self.results.mkdir(parents=True, mode=0o700)
        self._visits: dict[str, Visit] = {}
        self._ends: dict[Path, tuple[str, float]] = {}  # result's folder -> session, end
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.uploads = Rate(self.limits.uploads_per_minute)
        self.makes = Rate(self.limits.pictures_per_minute)
        self.calls = Rate(self.limits.calls_per_minute)
        self.forget: Callable[[str], None] = lambda session: None  # called once a session has ended
        self.finish = weakref.finalize(self, _remove, self.root, self.inbox)  # also when Python ends
        threading.Thread(target=_sweep_on, args=(weakref.ref(self), self._closed), daemon=True).start()

    def __len__(self) -> int:
        return len(self._visits)

    def get(self, session: str | None) -> Visit:
        """The visit of this session; a new one where there is none."""
        if not session:
            raise ValueError("This request belongs to no session: open the page, or use a Gradio client.")
        with self._lock:
            visit = self._visits.get(session)
            if visit is None:
                visit = self._visits[session] = Visit(self.root / secrets.token_hex(16), self.limits)
            visit.last_seen = time.monotonic()
            return visit

    def end(self, session: str | None) -> None:
        """Everything of this session goes: its jobs, its people, its files."""
        with self._lock:
            visit = self._visits.pop(session or "", None)
            mine = [folder for folder, (owner, _) in self._ends.items() if owner == session]
            for folder in mine:
                del self._ends[folder]
        if visit is not None:
            visit.cancel()
            visit.people, visit.pictures = [], {}
            shutil.rmtree(visit.folder, ignore_errors=True)
        for folder in mine:
            shutil.rmtree(folder, ignore_errors=True)

    # -- files -----------------------------------------------------------------------------------------------

    def new_upload(self, name: str) -> Path:
        """A path of its own for an upload, whatever else has the same name or content."""
        folder = self.inbox / secrets.token_hex(24)
        folder.mkdir(mode=0o700)
        return folder / name

    @contextlib.contextmanager
    def uploaded(self, path: Any):
        """The upload at `path`, which is deleted afterwards. ValueError where it is none."""
        file = self.upload_at(path)
        try:
            yield file
        finally:
            shutil.rmtree(file.parent, ignore_errors=True)

    def upload_at(self, path: Any) -> Path:
        """A file that was uploaded; anything else is refused, lest somebody name a file of this machine."""
        file = Path(path).resolve() if isinstance(path, str) and "\0" not in path else None
        if file is None or file.parent.parent != self.inbox or file.parent == self.results:
            raise ValueError("This photo was not uploaded here: upload it first.")
        if not file.is_file():
            raise ValueError(
                "This upload is gone (uploads are kept for two minutes): upload the photo again."
            )
        return file

    def new_result(self, session: str | None, name: str) -> Path:
        """Where a program's result goes: an address nobody guesses, until its session or its time ends."""
        folder = self.results / secrets.token_hex(24)
        folder.mkdir(mode=0o700)
        with self._lock:
            self._ends[folder] = (session or "", time.monotonic() + self.limits.result_seconds)
        return folder / name

    def may_serve(self, path: str) -> bool:
        """Is this one of the results that programs may fetch?"""
        file = Path(path).resolve()
        return file.parent.parent == self.results and file.parent in self._ends

    # -- the end ---------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what has outlived its time."""
        now = time.monotonic()
        with self._lock:
            idle = [s for s, v in self._visits.items() if now - v.last_seen > self.limits.idle_seconds]
            over = [folder for folder, (_, end) in self._ends.items() if now > end]
            for folder in over:
                del self._ends[folder]
        for session in idle:
            self.end(session)
            self.forget(session)
        for folder in over:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.inbox.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - folder.stat().st_mtime > self.limits.upload_seconds
                if folder != self.results and old:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        for session in list(self._visits):
            self.end(session)
        self._closed.set()
        self.finish()


def remove_orphans(folder: Path) -> None:
    """Remove what processes left behind that were killed: their numbers stand in the folders' names."""
    if os.name != "posix":  # elsewhere a process cannot be asked for without harm
        return
    for left in folder.glob(f"{PREFIX}*"):
        number = left.name.removeprefix(PREFIX).partition("-")[0]
        if not number.isdigit():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (PermissionError, OverflowError):  # somebody else's
            continue


def _sweep_on(visits: weakref.ref[Visits], closed: threading.Event) -> None:
    while not closed.wait(5.0):
        alive = visits()
        if alive is None:
            return
        alive.sweep()
        del alive


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
