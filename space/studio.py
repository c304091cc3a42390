"""The studio: one model for all visitors, a line before it, and pictures with previews as they form."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from withanyone import WithAnyonePipeline, flow, slider_scales
from withanyone.candidates import num_run
from withanyone.faces import Face, load_image
from withanyone.mini import PRETRAINED, gallery
from withanyone.pipeline import RELEASED_SAMPLING, combine_photos
from withanyone.readout import ANTELOPEV2, Calibration, Reading, describe, read_picture
from withanyone.settings import mark_picture, stamp_picture

from .machines import Settings, load
from .safety import WITHHELD, ContentFilter, load_filter
from .visits import Permit

logger = logging.getLogger(__name__)

SHAPES = ("square", "landscape", "portrait")
FLUX_SIZES = {"square": (1024, 1024), "landscape": (1216, 832), "portrait": (832, 1216)}
MAX_SEED = 2**31 - 1
PREVIEW_SIDE = 512  # pixels, at most
PREVIEW_SECONDS = 0.3  # between two previews


@dataclass(frozen=True)
class Order:
    """One picture, as it is asked for. `people`: for each the faces of their photos; `drawn`: for each the
    (number, photo) of its drawn photos, where they are that."""

    prompt: str
    people: tuple[tuple[Face, ...], ...]
    names: tuple[str, ...]
    similarity: float
    diversity: float
    shape: str
    steps: int
    guidance: float
    seed: int
    candidates: int = 1
    bboxes: tuple[tuple[float, ...], ...] | None = None
    visible_mark: bool = False
    drawn: tuple[tuple[tuple[int, int], ...] | None, ...] | None = None

    @property
    def work(self) -> int:
        """Steps of all candidates together, but for the schedule's shift; without people there is one."""
        count = self.candidates if self.people else 1
        return sum(num_run(1 - step / self.steps, count) for step in range(self.steps))


# What happens to a job, in order of time. `index`: which of the job's orders.
@dataclass(frozen=True)
class Waiting:
    place: int  # 1: next
    loading: bool = False


@dataclass(frozen=True)
class Working:
    index: int
    step: int
    steps: int
    seconds_left: float | None
    preview: Image.Image | None


@dataclass(frozen=True)
class Made:
    index: int
    image: Image.Image  # carries its settings and the mark in `info`
    settings: dict[str, Any]
    reading: Reading | None
    said: list[dict[str, str]]


@dataclass(frozen=True)
class Withheld:
    index: int
    text: str = WITHHELD


@dataclass(frozen=True)
class Cancelled:
    pass


@dataclass(frozen=True)
class Failed:
    error: ValueError


Update = Waiting | Working | Made | Withheld | Cancelled | Failed


class _Stopped(Exception):
    """Raised inside the denoising loop to leave it."""


class Line:
    """First come, first served; `width` at once."""

    def __init__(self, width: int = 1):
        self.width = width
        self._tickets: list[object] = []
        self._changed = threading.Condition()

    def join(self) -> object:
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        return ticket

    def place(self, ticket: object) -> int:
        """How many are to go before this ticket's turn; 0: it is its turn."""
        with self._changed:
            return max(0, self._tickets.index(ticket) + 1 - self.width)

    def wait(self, ticket: object, goes_on: Callable[[], bool]) -> bool:
        """Until it is this ticket's turn; False where it need not be any more."""
        with self._changed:
            while self._tickets.index(ticket) >= self.width:
                if not goes_on():
                    return False
                self._changed.wait(0.1)
        return goes_on()

    def leave(self, ticket: object) -> None:
        with self._changed:
            self._tickets.remove(ticket)
            self._changed.notify_all()


@dataclass
class Pace:
    """Seconds a step and a megapixel take on this machine: what remaining times are reckoned from."""

    seconds: float | None = None

    def learn(self, seconds: float, steps: int, megapixels: float) -> None:
        new = seconds / max(1e-6, steps * megapixels)
        self.seconds = new if self.seconds is None else 0.5 * self.seconds + 0.5 * new

    def expect(self, steps: int, megapixels: float) -> float | None:
        return None if self.seconds is None else self.seconds * steps * megapixels


class Studio:
    """One pipeline for all visitors: loaded at first need, used by one of them at a time."""

    def __init__(
        self,
        pipe: WithAnyonePipeline | None = None,
        settings: Settings | None = None,
        content_filter: ContentFilter | None = None,
    ):
        self.settings = settings or Settings()
        self.miniature = pipe is None and gallery.is_miniature(self.settings.model)
        self.previews = True
        self.line = Line()
        self.pace = Pace()
        self._pipe = pipe
        self._filter = content_filter
        self._loading = threading.Lock()
        # The same threads again and again: each new one would take memory of its own.
        self._hands = ThreadPoolExecutor(self.line.width, thread_name_prefix="picture")
        self._draw = self._on_zero_gpu() if self.settings.zero_gpu else self._denoise

    # -- the model -------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        return self._pipe is not None

    @property
    def pipe(self) -> WithAnyonePipeline:
        with self._loading:
            if self._pipe is None:
                if self._filter is None:
                    self._filter = load_filter(self.settings.safety_checker)
                pipe, self.previews = load(self.settings)
                pipe.set_progress_bar_config(disable=True)
                report_providers(pipe)
                self._pipe = pipe
        return self._pipe

    def warm_up(self) -> None:
        """Load, and run everything once, so that the first visitor does not wait for it."""
        if self.miniature:
            faces = self.find_faces(gallery.draw_photo(0))
            order = Order("a person", (tuple(faces[:1]),), ("",), 1, 0.5, "square", 1, 1.0, 0)
            for _ in self._denoise([order], _Always()):
                pass
        else:
            _ = self.pipe

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The model's own settings; needs its configuration only, not its weights."""
        if self._pipe is not None:
            return dict(self._pipe.config.sampling_defaults)
        said = WithAnyonePipeline.load_config(self.settings.model)["sampling_defaults"]
        return {**RELEASED_SAMPLING, **said}

    @property
    def guidance_name(self) -> str:
        """The guidance that the model uses: a second pass, or the one distilled into FLUX.1 [dev]."""
        return "true_cfg_scale" if self.defaults["true_cfg_scale"] > 1 else "guidance_scale"

    @property
    def marks_visibly(self) -> bool:
        """Whether pictures say in their corner that they are AI-generated unless somebody says otherwise:
        where a model that makes photos is open to the public."""
        return self.settings.public and not self.miniature

    @cached_property
    def calibration(self) -> Calibration:
        """What the model's recogniser says of two photos of one person."""
        figures = PRETRAINED / "figures" / "faces.json"
        return Calibration.from_figures(figures) if self.miniature and figures.is_file() else ANTELOPEV2

    def size(self, shape: str, num_people: int) -> tuple[int, int]:
        """(width, height) of a picture."""
        if shape not in SHAPES:
            raise ValueError(f"`shape` is {shape!r}: give one of {', '.join(SHAPES)}.")
        if self.miniature:
            return gallery.size_for(num_people, shape)
        scale = (self.defaults["width"] or 1024) / 1024  # a model may have a size of its own
        width, height = (max(16, round(side * scale / 16) * 16) for side in FLUX_SIZES[shape])
        return width, height

    def find_faces(self, photo: Any, name: str = "photo") -> list[Face]:
        """The faces of a photo, largest first; for the miniature, those that look drawn.

        Raises:
            ValueError: it is no photo.
        """
        image = load_image(photo, name)
        found = self.pipe.face_analyzer.detect(image)
        if self.miniature:
            found = [face for face in found if face.det_score >= gallery.DRAWN_SCORE]
        return found

    # -- making ----------------------------------------------------------------------------------------------

    def make(self, orders: Sequence[Order], permit: Permit) -> Iterator[Update]:
        """Make pictures one after the other; what happens, as it happens, to the end.

        The work runs in a thread of its own, so that a job that is no longer permitted lets go of its visitor
        at once, though a large model finishes its step first. Leaving this generator early ends the job.
        """
        updates: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        ticket = self.line.join()
        context = contextvars.copy_context()  # ZeroGPU reads from it whose request this is

        def work() -> None:
            try:
                if self.line.wait(ticket, lambda: bool(permit)):
                    for update in self._draw(list(orders), permit):
                        updates.put(update)
            except _Stopped:
                pass
            except ValueError as error:
                updates.put(Failed(error))
            finally:
                self.line.leave(ticket)
                updates.put(None)

        place, told = None, 0
        threading.Thread(target=context.run, args=(work,), daemon=True).start()
        try:
            while True:
                try:
                    update = updates.get(timeout=0.1)
                except queue.Empty:
                    if not permit:
                        yield Cancelled()
                        return
                    try:
                        now = self.line.place(ticket)
                    except ValueError:  # it has left the line just now
                        continue
                    if now != place and now > 0:
                        yield Waiting(now)
                    elif now == 0 and place is None and not self.is_loaded:
                        yield Waiting(0, loading=True)
                    place = now
                    continue
                if not permit and not isinstance(update, Failed):
                    yield Cancelled()
                    return
                if update is None:
                    if told < len(orders):  # the traceback is in the log
                        yield Failed(ValueError("Something went wrong on our side: please try again."))
                    return
                told += isinstance(update, (Made, Withheld))
                yield update
                if isinstance(update, Failed):
                    return
        finally:
            permit.revoke()

    def estimate_seconds(self, orders: Sequence[Order], permit: Permit | None = None) -> int:
        """What ZeroGPU reserves for a job: its steps and sizes, with room for loading and encoding."""
        work = 0.0
        for order in orders:
            width, height = self.size(order.shape, len(order.people))
            work += order.work * width * height / 1e6
        return max(20, round(12 + 0.55 * work))

    def _on_zero_gpu(self) -> Callable[[list[Order], Permit], Iterator[Update]]:
        """The denoising as a function that borrows a GPU for as long as its orders need."""
        import spaces

        def denoise(orders: list[Order], permit: Permit) -> Iterator[Update]:
            yield from self._denoise(orders, permit)

        def duration(orders: list[Order], permit: Permit) -> int:
            return self.estimate_seconds(orders)

        return spaces.GPU(denoise, duration=duration)

    def _denoise(self, orders: list[Order], permit: Permit) -> Iterator[Update]:
        """The pipeline's calls, with steps as they are done. The pipeline blocks, so it has a thread."""
        inner: queue.SimpleQueue[Update | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                for index, order in enumerate(orders):
                    if not permit:
                        raise _Stopped
                    inner.put(self._picture(index, order, orders, permit, inner.put))
            except (ValueError, _Stopped, torch.OutOfMemoryError) as error:
                inner.put(error)
            finally:
                inner.put(None)

        job, ended = self._hands.submit(work), False
        try:
            while (update := inner.get()) is not None:
                ended = isinstance(update, BaseException)
                if isinstance(update, torch.OutOfMemoryError):
                    raise ValueError(
                        "The machine's memory is full: try a smaller shape or fewer people."
                    ) from update
                if isinstance(update, BaseException):
                    raise update
                yield update
            ended = True
        finally:
            if not ended:  # nobody reads on
                permit.revoke()
            if (error := job.exception()) is not None:  # waits until the work has ended
                logger.error("A picture could not be made.", exc_info=error)

    def _picture(
        self,
        index: int,
        order: Order,
        orders: Sequence[Order],
        permit: Permit,
        tell: Callable[[Update], None],
    ) -> Made | Withheld:
        pipe = self.pipe
        width, height = self.size(order.shape, len(order.people))
        id_scale, siglip_scale = slider_scales(order.similarity, order.diversity)
        megapixels = width * height / 1e6
        started = time.monotonic()
        tell(Working(index, 0, order.steps, self._left(orders, index, 0, started), None))
        watch = Preview(pipe, width, height) if self.previews else None

        def step_done(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if not permit:
                raise _Stopped
            image = watch.after_step(step, tensors["latents"]) if watch else None
            tell(Working(index, step + 1, order.steps, self._left(orders, index, step + 1, started), image))
            return tensors

        out = pipe(
            prompt=order.prompt,
            faces=[list(faces) for faces in order.people] or None,
            bboxes=order.bboxes,
            id_scale=id_scale,
            siglip_scale=siglip_scale,
            width=width,
            height=height,
            num_inference_steps=order.steps,
            num_candidates=order.candidates,
            generator=torch.Generator("cpu").manual_seed(order.seed),
            callback_on_step_end=step_done,
            **{self.guidance_name: order.guidance},
        )
        self.pace.learn(time.monotonic() - started, order.work, megapixels)
        image = out.images[0]
        if self._filter is not None and self._filter(image):
            return Withheld(index)
        reading, said = self._read(image, order, out.bboxes)
        if order.visible_mark:
            image = stamp_picture(image)
        settings = self.settings_of(order, image, out.bboxes)
        return Made(index, mark_picture(image, settings), settings, reading, said)

    def _left(self, orders: Sequence[Order], index: int, step: int, started: float) -> float | None:
        """Seconds to the end of the job: this picture by its own pace, the others by what was learnt."""

        def expect(order: Order) -> float | None:
            width, height = self.size(order.shape, len(order.people))
            return self.pace.expect(order.work, width * height / 1e6)

        order = orders[index]
        if step:
            here = (time.monotonic() - started) / step * (order.steps - step)
            whole = (time.monotonic() - started) / step * order.steps
        else:
            here = whole = expect(order)
        rest = [expect(later) or whole for later in orders[index + 1 :]]
        return None if here is None or None in rest else here + sum(rest)

    def _read(self, image: Image.Image, order: Order, bboxes: Any) -> tuple[Reading | None, list]:
        if not order.people or bboxes is None or self.pipe.face_analyzer is None:
            return None, []
        references = [
            combine_photos(np.stack([face.embedding for face in faces]))[0] for faces in order.people
        ]
        found = self.pipe.face_analyzer.detect(image)
        reading = read_picture(found, np.stack(references), bboxes, self.calibration)
        return reading, describe(reading, order.names, self.calibration)

    def settings_of(self, order: Order, image: Image.Image, bboxes: Any) -> dict[str, Any]:
        """What made a picture, as it stands in its file. No photo, no face and no name is in it."""
        return {
            "prompt": order.prompt,
            "seed": order.seed,
            "similarity": order.similarity,
            "diversity": order.diversity,
            "shape": order.shape,
            "width": image.width,
            "height": image.height,
            "num_inference_steps": order.steps,
            "num_candidates": order.candidates,
            self.guidance_name: order.guidance,
            "bboxes": None if bboxes is None else [[round(float(v), 2) for v in box] for box in bboxes],
            "people": len(order.people),
            "drawn": order.drawn,
            "model": "miniature" if self.miniature else self.settings.model,
        }


class Preview:
    """The picture that is forming: the clean estimate after each step, decoded small."""

    def __init__(self, pipe: WithAnyonePipeline, width: int, height: int):
        self.pipe, self.width, self.height = pipe, width, height
        self._estimates = flow.CleanEstimates()
        self._shown = 0.0

    @torch.no_grad()
    def after_step(self, step: int, latents: torch.Tensor) -> Image.Image | None:
        """A preview, where it is time for one, of the first candidate.

        latents: (candidates, N, C), as after step `step` (0: the first).
        """
        scheduler = self.pipe.scheduler
        clean = self._estimates.after_step(scheduler, step, latents)
        is_last = step + 1 >= len(scheduler.sigmas) - 1
        if clean is None or is_last or time.monotonic() - self._shown < PREVIEW_SECONDS:
            return None
        image = self.decode(clean[:1].to(latents.dtype))
        self._shown = time.monotonic()
        return image

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """Decoded at most PREVIEW_SIDE pixels long: (1, N, C) -> a picture."""
        shrink = max(1, max(self.width, self.height) // PREVIEW_SIDE)
        pixels = self.pipe.decode_latents(latents, self.height, self.width, shrink)
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]


@dataclass
class _Always:
    """A permit that holds."""

    given: bool = field(default=True)

    def __bool__(self) -> bool:
        return self.given

    def revoke(self) -> None:
        self.given = False


def report_providers(pipe: WithAnyonePipeline) -> None:
    """Say what the face models run on, and how to mend it where a CUDA card stands idle."""
    if pipe.face_analyzer is None:
        return
    active = pipe.face_analyzer.providers
    logger.info("Face models run on %s.", ", ".join(active))
    if torch.cuda.is_available() and "CUDAExecutionProvider" not in active:
        logger.warning(
            "There is a CUDA card, but onnxruntime does not use it: "
            "pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
