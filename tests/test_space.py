"""The Space without a page: visits kept apart, the line, cancelling, machines, the guard, the desk."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from space import safety, studio
from space.desk import Desk
from space.guard import Guard, visitor_address
from space.machines import MACHINES, Machine, Settings, load, machine_for, place
from space.studio import Cancelled, Failed, Line, Made, Order, Studio, Waiting, Withheld, Working
from space.visits import Limits, Permit, Rate, Visits
from tests import tiny_faces
from withanyone import WithAnyonePipeline
from withanyone.mini.scheduler import SeededFlowMatchScheduler
from withanyone.settings import MARK, read_settings, save_picture


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> WithAnyonePipeline:
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def visits(tmp_path: Path):
    made = Visits(tmp_path / "uploads", Limits(uploads_per_minute=5, people=3))
    yield made
    made.close()


@pytest.fixture
def desk(pipe, visits) -> Desk:
    return Desk(Studio(pipe), visits)


def upload(visits: Visits, content: bytes | Path, name: str = "photo.png") -> dict:
    path = visits.new_upload(name)
    path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    return {"path": str(path), "name": name}


def order(people=(), **changes) -> Order:
    settings = dict(
        prompt="ab",
        people=people,
        names=tuple(f"P{i}" for i in range(len(people))),
        similarity=1.0,
        diversity=0.5,
        shape="square",
        steps=2,
        guidance=4.0,
        seed=0,
    )
    return Order(**{**settings, **changes})


# -- visits -------------------------------------------------------------------------------------------------


def test_a_visit_leaves_nothing_behind(visits) -> None:
    visit = visits.get("a")
    (visit.folder / "picture.png").write_bytes(b"x")
    result = visits.new_result("a", "picture.png")
    result.write_bytes(b"x")
    other = visits.get("b")
    permit = visit.permit()
    assert visits.may_serve(str(result)) and permit
    visits.end("a")
    assert not visit.folder.exists() and not result.parent.exists() and not permit
    assert other.folder.exists() and not visits.may_serve(str(result))
    assert visits.get("a") is not visit  # who comes back starts anew


def test_everything_goes_when_the_page_closes(tmp_path) -> None:
    visits = Visits(tmp_path)
    visits.get("a")
    visits.new_upload("photo.png").write_bytes(b"x")
    visits.close()
    assert not visits.root.exists() and not visits.inbox.exists()


def test_what_outlives_its_time_is_swept(tmp_path) -> None:
    limits = Limits(idle_seconds=0.05, result_seconds=0.05, upload_seconds=0.05)
    visits = Visits(tmp_path, limits)
    forgotten = []
    visits.forget = forgotten.append
    folder, photo, result = (
        visits.get("a").folder,
        visits.new_upload("a.png"),
        visits.new_result("a", "b.png"),
    )
    photo.write_bytes(b"x")
    time.sleep(0.1)
    visits.sweep()
    assert not folder.exists() and not photo.exists() and not result.parent.exists() and forgotten == ["a"]
    visits.close()


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path) -> None:
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    left, living, other = (tmp_path / f"withanyone-{name}-x" for name in (dead.pid, os.getpid(), "notes"))
    for folder in (left, living, other):
        folder.mkdir()
    Visits(tmp_path).close()
    assert [folder.exists() for folder in (left, living, other)] == [False, True, True]


@pytest.mark.parametrize("path", ["/etc/passwd", "", None, 3, "a\0b", ["x"], "../../etc/passwd"])
def test_only_uploads_are_read(visits, path) -> None:
    with pytest.raises(ValueError, match="not uploaded"):
        visits.upload_at(path)
    result = visits.new_result("a", "b.png")
    result.write_bytes(b"x")
    visit_file = visits.get("a").folder / "c.png"
    visit_file.write_bytes(b"x")
    for other in (result, visit_file, visits.inbox / ".." / "x" / "y"):
        with pytest.raises(ValueError, match="not uploaded"):
            visits.upload_at(str(other))
    assert not visits.may_serve(str(visit_file)) and not visits.may_serve(str(visits.results))


def test_an_upload_is_read_once_and_gone(visits) -> None:
    file = upload(visits, b"x")
    with visits.uploaded(file["path"]) as path:
        assert path.read_bytes() == b"x"
    assert not path.parent.exists()
    with pytest.raises(ValueError, match="gone"):
        visits.upload_at(file["path"])


def test_one_job_a_visit(visits) -> None:
    visit = visits.get("a")
    permit = visit.permit()
    with pytest.raises(ValueError, match="cancel"):
        visit.permit()
    assert visit.cancel() and not permit and not visit.cancel()
    assert visit.permit()


def test_rates_count_a_minute(monkeypatch) -> None:
    now = [0.0]
    rate = Rate(3, clock=lambda: now[0])
    assert [rate.allow("a", 2), rate.allow("a", 2), rate.allow("a"), rate.allow("b", 3)] == [
        True,
        False,
        True,
        True,
    ]
    now[0] = 61.0
    assert rate.allow("a", 3) and len(rate._times) == 1


# -- the line and making ------------------------------------------------------------------------------------


def test_the_line_is_first_come_first_served() -> None:
    line, served = Line(), []
    tickets = [line.join() for _ in range(3)]
    assert [line.place(ticket) for ticket in tickets] == [0, 1, 2]

    def visitor(i: int) -> None:
        if line.wait(tickets[i], lambda: i != 1):  # the second one leaves early
            served.append(i)
        line.leave(tickets[i])

    threads = [threading.Thread(target=visitor, args=(i,)) for i in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert served == [0, 2]


def test_a_picture_comes_with_steps_previews_settings_and_the_mark(
    pipe, visits, painted_photos, monkeypatch
) -> None:
    monkeypatch.setattr(studio, "PREVIEW_SECONDS", 0.0)
    made_by = Studio(pipe)
    faces = tuple(tuple(made_by.find_faces(photo)[:1]) for photo in painted_photos[1:3])
    updates = list(made_by.make([order(faces, steps=4, seed=0)], Permit(visits.get("a").folder)))
    working = [update for update in updates if isinstance(update, Working)]
    assert [update.step for update in working] == [0, 1, 2, 3, 4]
    assert [update.preview is not None for update in working] == [False, False, True, True, False]
    assert working[2].preview.size == (64, 64)
    made = updates[-1]
    assert isinstance(made, Made) and made.image.info["Software"] == MARK
    assert made.settings["seed"] == 0 and made.settings["people"] == 2 and len(made.reading.people) == 2


@pytest.mark.parametrize("stochastic", [False, True])
def test_previews_come_near_the_picture(pipe, monkeypatch, stochastic) -> None:
    """The clean estimate of the step before the last is nearly the picture; noise would be far off."""
    monkeypatch.setattr(studio, "PREVIEW_SECONDS", 0.0)
    scheduler = SeededFlowMatchScheduler.from_config(pipe.scheduler.config, stochastic_sampling=stochastic)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    views = [u for u in Studio(pipe).make([order(steps=12)], _permit()) if isinstance(u, (Working, Made))]
    picture = np.asarray(views[-1].image).astype(float)
    previews = [np.asarray(view.preview).astype(float) for view in views[:-1] if view.preview is not None]
    distances = [np.abs(preview - picture).mean() for preview in previews]
    assert distances[-1] < (8 if stochastic else 4) and distances[-1] < distances[0]


def test_previews_of_large_pictures_are_smaller(pipe, monkeypatch) -> None:
    monkeypatch.setattr(studio, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(studio, "PREVIEW_SIDE", 32)
    views = [u for u in Studio(pipe).make([order(steps=4)], _permit()) if isinstance(u, Working)]
    assert {view.preview.size for view in views if view.preview is not None} == {(32, 32)}


def _permit():
    return studio._Always()


def test_several_visitors_at_once_get_their_own_pictures(pipe, visits, painted_photos) -> None:
    made_by = Studio(pipe)
    face = tuple(made_by.find_faces(painted_photos[0])[:1])

    def picture(seed: int, session: str) -> np.ndarray:
        permit = visits.get(session).permit()
        *_, last = made_by.make([order((face,), seed=seed)], permit)
        return np.asarray(last.image)

    alone = [picture(seed, "alone") for seed in range(4)]
    together: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: picture(s, str(s))})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(together[seed], alone[seed]) for seed in range(4))


def test_cancelling_works_at_once_and_frees_the_line(pipe, visits) -> None:
    made_by, permit = Studio(pipe), visits.get("a").permit()
    updates = made_by.make([order(steps=100)], permit)
    for update in updates:
        if isinstance(update, Working) and update.step == 2:
            break
    started = time.monotonic()
    permit.revoke()
    rest = list(updates)
    assert isinstance(rest[-1], Cancelled) and time.monotonic() - started < 1
    *_, last = made_by.make([order()], visits.get("b").permit())  # would wait for ever behind a lost ticket
    assert isinstance(last, Made)


def test_a_closed_connection_ends_the_job(pipe, visits) -> None:
    made_by, permit = Studio(pipe), visits.get("a").permit()
    updates = made_by.make([order(steps=100)], permit)
    next(updates)
    updates.close()  # what Gradio does when the visitor is gone
    *_, last = made_by.make([order()], visits.get("b").permit())
    assert isinstance(last, Made) and not permit


def test_the_work_of_a_picture_counts_the_candidates_that_are_run() -> None:
    somebody = (object(),)
    assert order(steps=20, candidates=8).work == 20  # nobody to choose by
    assert order((somebody,), steps=20).work == 20
    assert order((somebody,), steps=20, candidates=2).work == 37  # one until 0.85
    assert 20 * 2 < order((somebody,), steps=20, candidates=8).work < 20 * 8


def test_who_waits_is_told_the_place(pipe, visits) -> None:
    made_by = Studio(pipe)
    first = made_by.line.join()
    updates = made_by.make([order()], visits.get("a").permit())
    assert next(updates) == Waiting(1)
    made_by.line.leave(first)
    assert isinstance(list(updates)[-1], Made)


def test_what_the_pipeline_refuses_is_told(pipe, visits) -> None:
    (failed,) = [
        u for u in Studio(pipe).make([order(bboxes=((0, 0, 5, 5),))], _permit()) if isinstance(u, Failed)
    ]
    assert "bboxes" in str(failed.error)


def test_an_error_of_ours_ends_the_job_in_words(pipe, visits, monkeypatch) -> None:
    made_by = Studio(pipe)
    monkeypatch.setattr(made_by, "_picture", lambda *args: 1 / 0)
    *_, last = made_by.make([order()], visits.get("a").permit())
    assert isinstance(last, Failed) and "try again" in str(last.error)


def test_the_filter_withholds_a_picture_and_the_job_goes_on(pipe, visits) -> None:
    shown = iter([True, False])
    made_by = Studio(pipe, content_filter=lambda image: next(shown))
    *_, first, second = [
        u for u in made_by.make([order(), order(seed=1)], _permit()) if isinstance(u, (Made, Withheld))
    ]
    assert isinstance(first, Withheld) and isinstance(second, Made)


def test_the_standard_safety_checker_is_a_filter() -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    flagged = safety.checker_filter(checker, processor)
    picture = Image.new("RGB", (64, 64), "teal")
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(2.0)  # a cosine that nothing reaches
        assert not flagged(picture)
        checker.concept_embeds_weights.fill_(-2.0)
        assert flagged(picture)
    assert safety.load_filter(None) is None
    with pytest.raises(ValueError, match="WITHANYONE_SAFETY_CHECKER"):
        safety.load_filter("/nowhere/at/all")


# -- machines -----------------------------------------------------------------------------------------------


def test_the_environment_chooses_model_and_machine() -> None:
    read = Settings.from_environment
    assert read({}) == Settings()
    given = read(
        {"WITHANYONE_MODEL": "m", "WITHANYONE_MEMORY": "16", "SPACE_ID": "a/b", "SPACES_ZERO_GPU": "1"}
    )
    assert (given.model, given.memory, given.public, given.zero_gpu) == ("m", "16", True, True)
    assert machine_for("8", 80) is MACHINES["8"]
    fits = {80: "full", 40: "full", 23.6: "24", 15.8: "16", 11.7: "12", 7.9: "8", 6: "8"}
    assert {total: machine_for(None, total) for total in fits} == {
        t: MACHINES[name] for t, name in fits.items()
    }
    with pytest.raises(ValueError, match="WITHANYONE_MEMORY"):
        machine_for("17", None)


@pytest.mark.parametrize("computes", [True, False], ids=["with-bfloat16", "without"])
def test_a_cpu_that_computes_in_bfloat16_does_so(monkeypatch, computes: bool) -> None:
    monkeypatch.setattr("withanyone.precision.computes_bfloat16", lambda device: computes)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    pipe, previews = load(Settings())
    assert previews
    for part in (pipe.transformer, pipe.face_adapter, pipe.vae, pipe.image_encoder, pipe.text_encoder_2):
        assert part.dtype == (torch.bfloat16 if computes else torch.float32)


def test_each_machines_weights_fit_its_memory() -> None:
    assert all(machine.gigabytes < int(name) for name, machine in MACHINES.items() if name != "full")


@pytest.mark.parametrize("weights, offload, near", [("int8", "none", 0.05), ("bfloat16", "group", 1e-6)])
def test_a_placed_pipeline_still_makes_the_picture(
    tiny_model, painted_photos, weights, offload, near
) -> None:
    def picture(machine: Machine) -> np.ndarray:
        pipe = WithAnyonePipeline.from_pretrained(tiny_model)
        pipe.set_progress_bar_config(disable=True)
        place(pipe, machine, torch.device("cpu"))
        out = pipe(
            "ab", faces=[painted_photos[0]], generator=torch.Generator().manual_seed(0), output_type="np"
        )
        return out.images[0]

    plain = Machine("bfloat16", "bfloat16", "none", False, True, 0)
    changed = dataclasses.replace(plain, transformer=weights, text_encoder_2=weights, offload=offload)
    assert np.abs(picture(plain) - picture(changed)).mean() < near


def test_zero_gpu_is_asked_for_longer_where_there_is_more_to_do(pipe) -> None:
    made_by = Studio(pipe)
    made_by.size = lambda shape, people: (1024, 1024)
    short, long = (made_by.estimate_seconds([order(steps=steps)]) for steps in (10, 50))
    assert 15 <= short < long < made_by.estimate_seconds([order(steps=50)] * 3)


def test_the_zero_gpu_function_is_a_generator_that_spaces_takes(pipe, visits) -> None:
    pytest.importorskip("spaces")
    made_by = Studio(pipe, settings=Settings(zero_gpu=True))
    *_, last = made_by.make([order()], visits.get("a").permit())
    assert isinstance(last, Made)


# -- the guard ----------------------------------------------------------------------------------------------


@pytest.fixture
def web(visits) -> httpx.Client:
    """The guard before an application that answers everything."""
    from starlette.testclient import TestClient

    async def answer(request):
        return PlainTextResponse("gradio")

    inner = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    return TestClient(Guard(inner, visits))


def test_uploads_have_limits_and_paths_of_their_own(web, tmp_path) -> None:
    visits = Visits(tmp_path, Limits(uploads_per_minute=5, upload_bytes=1000))
    web.app.visits = visits
    paths = [
        web.post("/gradio_api/upload", files={"files": ("a b/../c.png", b"x")}).json()[0] for _ in range(2)
    ]
    assert paths[0] != paths[1] and all(visits.upload_at(path).read_bytes() == b"x" for path in paths)
    large = web.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 100_000)})
    assert large.status_code == 413 and "larger than" in large.text
    assert web.post("/gradio_api/upload", files={"other": ("a", b"x")}).status_code == 400
    assert web.post("/gradio_api/upload", content=b"nothing").status_code == 400
    assert web.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 429
    visits.close()


def test_an_upload_without_a_stated_length_is_cut_off(web, tmp_path) -> None:
    visits = web.app.visits = Visits(tmp_path, Limits(upload_bytes=1000))
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'

    def endless():
        yield head
        for _ in range(100):
            yield b"x" * 1000

    answer = web.post(
        "/gradio_api/upload", content=endless(), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413
    assert [p for p in visits.inbox.iterdir() if p != visits.results] == []
    visits.close()


def test_no_file_is_served_but_results(web, visits) -> None:
    result = visits.new_result("a", "picture.png")
    result.write_bytes(b"x")
    secret = visits.get("a").folder / "picture.png"
    secret.write_bytes(b"x")
    file = upload(visits, b"x")
    assert web.get(f"/gradio_api/file={result}").text == "gradio"
    refused = [
        secret,
        file["path"],
        "/etc/passwd",
        "http://example.org/a.png",
        visits.results,
        f"{visits.results}/../../{secret}",
        str(result.parent),
    ]
    for path in refused:
        for prefix in ("/gradio_api/file=", "//gradio_api//file=", "/file="):
            assert web.get(f"{prefix}{path}").status_code == 403, (prefix, path)
    assert web.get("/gradio_api/proxy=http://a").status_code == 404
    assert web.get("/config").text == "gradio"
    assert web.head("/").status_code == 200 and web.get("/").text == "gradio"


def test_a_proxy_is_believed_only_where_there_is_one() -> None:
    class Request:
        headers = {"x-forwarded-for": "1.2.3.4, 5.6.7.8"}

        class client:
            host = "9.9.9.9"

    assert visitor_address(Request(), behind_proxy=True) == "1.2.3.4"
    assert visitor_address(Request(), behind_proxy=False) == "9.9.9.9"


# -- the desk -----------------------------------------------------------------------------------------------


def test_photos_become_people_and_their_files_go(desk, visits, painted_photos) -> None:
    visit = visits.get("a")
    said, tone, found = desk.bring(visit, [upload(visits, p) for p in painted_photos[1:3]], None, False)
    assert tone == "good" and found is None and len(visit.people) == 2
    desk.bring(visit, [upload(visits, painted_photos[0])], visit.people[0].id, False)
    assert [len(person.photos) for person in visit.people] == [2, 1]
    assert [p for p in visits.inbox.iterdir() if p != visits.results] == []
    assert visit.people[0].color != visit.people[1].color


@pytest.mark.parametrize(
    "content, named",
    [(b"%PDF-1.7 and so on", "PDF"), (b"", "empty"), (b"\x89PNG\r\n\x1a\n cut", "could not be read")],
    ids=["pdf", "empty", "cut"],
)
def test_what_is_no_photo_is_named_at_once(desk, visits, content, named) -> None:
    said, tone, _ = desk.bring(visits.get("a"), [upload(visits, content, "holiday.jpg")], None, False)
    assert named in said and "holiday.jpg" in said and tone == "warn" and str(visits.inbox) not in said


def test_no_face_too_many_pixels_and_too_many_people_are_told(desk, visits, painted_photos, tmp_path) -> None:
    visit = visits.get("a")
    tiny_faces.blank().save(tmp_path / "blank.png")
    said, tone, _ = desk.bring(visit, [upload(visits, tmp_path / "blank.png")], None, False)
    assert "No face" in said and "sharp" in said and tone == "warn" and not visit.people
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")  # 400 megapixels in 50 kB
    said, _, _ = desk.bring(visit, [upload(visits, tmp_path / "huge.png")], None, False)
    assert "megapixels" in said
    said, tone, _ = desk.bring(visit, [upload(visits, painted_photos[1]) for _ in range(4)], None, False)
    assert len(visit.people) == 3 and "3 people at most" in said and tone == "warn"


def test_a_group_photo_fills_all_people_and_a_face_can_be_chosen(desk, visits, painted_photos) -> None:
    visit = visits.get("a")
    two = tiny_faces.paint_face(Image.open(painted_photos[0]), (94, 20, 126, 60), 4)
    path = visits.new_upload("two.png")
    two.save(path)
    said, _, _ = desk.bring(visit, [{"path": str(path), "name": "two.png"}], None, False)
    (person,) = visit.people
    photo = person.photos[0]
    assert "2 faces" in said and photo.chosen == 0
    desk.act(visit, {"do": "choose", "person": person.id, "photo": photo.id, "face": 1})
    small = photo.face
    assert photo.chosen == 1
    said, tone = desk.act(visit, {"do": "split", "person": person.id, "photo": photo.id})
    assert len(visit.people) == 2 and person.photos[0].face is small and "2 people" in said
    for action in ({"do": "choose", "face": 7}, {"do": "choose", "face": "x"}, {"do": "fly"}):
        with pytest.raises(ValueError):
            desk.act(visit, {"person": person.id, "photo": photo.id, **action})
    desk.act(visit, {"do": "rename", "person": person.id, "name": "<b>Ada</b> " + "x" * 100})
    assert person.name.startswith("<b>Ada</b>") and len(person.name) == 24
    desk.act(visit, {"do": "remove", "person": person.id})
    with pytest.raises(ValueError, match="gone"):
        desk.act(visit, {"do": "remove", "person": person.id})


def test_a_dropped_picture_brings_its_settings_back(desk, visits, tmp_path) -> None:
    settings = {
        "prompt": "x",
        "seed": 0,
        "similarity": 0.7,
        "diversity": 0.3,
        "shape": "portrait",
        "people": 2,
        "num_inference_steps": 7,
        "num_candidates": 2,
        "guidance_scale": 3.0,
        "bboxes": [[1, 2, 30, 40]],
    }
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "made.png", settings)
    said, _, found = desk.bring(visits.get("a"), [upload(visits, tmp_path / "made.png")], None, True)
    assert (
        "2 people" in said
        and found["seed"] == 0
        and found["steps"] == 7
        and found["candidates"] == 2
        and found["boxes"] == [[1, 2, 30, 40]]
    )
    assert found["similarity"] == 0.7 and found["shape"] == "portrait" and found["guidance"] == 3.0


def test_settings_that_a_stranger_wrote_are_checked(desk) -> None:
    wild = {
        "prompt": 5,
        "seed": -1,
        "similarity": 99,
        "diversity": "x",
        "shape": "round",
        "num_inference_steps": 1e9,
        "num_candidates": 1e9,
        "guidance_scale": float("nan"),
        "bboxes": "no",
        "people": "many",
    }
    assert desk.restorable(wild) == {}
    assert len(desk.restorable({"prompt": "a" * 10_000})["prompt"]) == 2000
    assert desk.restorable({"id_scale": 0.5, "siglip_scale": 0.5}) == {"similarity": 1.0, "diversity": 0.5}


ORDER = {
    "prompt": "ab",
    "people": [],
    "names": [],
    "similarity": 1,
    "diversity": 0,
    "shape": "square",
    "steps": 2,
    "guidance": 4,
    "candidates": 4,
    "seed": 0,
    "boxes": None,
    "consent": True,
    "visible_mark": False,
}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompt": " \n"}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": "a" * 10_000}, "2000"),
        ({"similarity": 2}, "1.5"),
        ({"similarity": float("nan")}, "nan"),
        ({"diversity": -0.1}, "Diversity"),
        ({"diversity": True}, "Diversity"),
        ({"steps": 0}, "Steps"),
        ({"steps": 2.5}, "whole"),
        ({"steps": 101}, "100"),
        ({"guidance": float("inf")}, "Guidance"),
        ({"candidates": 0}, "Candidates"),
        ({"candidates": 9}, "8"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"seed": 1e30}, "seed"),
        ({"shape": "round"}, "round"),
        ({"shape": None}, "shape"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_orders_are_checked_in_words(desk, changes, named) -> None:
    with pytest.raises(ValueError, match=named):
        desk.order(**{**ORDER, **changes})


def test_orders_with_people_need_consent_and_boxes_inside(desk, visits, painted_photos) -> None:
    visit = visits.get("a")
    desk.bring(visit, [upload(visits, painted_photos[0])], None, False)
    given = {**ORDER, "people": [visit.people[0].photos], "names": ["A"]}
    assert desk.order(**given).seed == 0
    with pytest.raises(ValueError, match="agree"):
        desk.order(**{**given, "consent": False})
    with pytest.raises(ValueError, match="outside"):
        desk.order(**{**given, "boxes": [[0, 0, 999, 30]]})
    with pytest.raises(ValueError, match="2 boxes"):
        desk.order(**{**given, "boxes": [[0, 0, 30, 30]] * 2})
    for text in ("here", "[1, 2]", "[[1, 2, null, 4]]", "{}x", "[" * 100_000):
        with pytest.raises(ValueError, match="x1, y1"):
            desk.read_boxes(text)


def test_boxes_follow_the_pictures_size(desk, visits, painted_photos) -> None:
    visit = visits.get("a")
    desk.bring(visit, [upload(visits, painted_photos[0])], None, False)
    assert desk.kept_boxes(visit, "square", "[[8, 8, 16, 24]]", (32, 32)) == [[16, 16, 32, 48]]
    suggested = desk.suggested_boxes(visit, "square")
    assert desk.kept_boxes(visit, "square", "[[8, 8, 16, 24]]", (32, 64)) == suggested  # another shape
    assert desk.kept_boxes(visit, "square", "nonsense", (32, 32)) == suggested


def test_kept_pictures_are_saved_with_their_settings_and_the_oldest_go(pipe, tmp_path) -> None:
    visits = Visits(tmp_path, Limits(pictures_kept=2))
    desk, visit = Desk(Studio(pipe), visits), visits.get("a")
    *_, made = desk.studio.make([order()], _permit())
    pictures = [desk.keep(visit, made) for _ in range(3)]
    assert [picture.path.exists() for picture in pictures] == [False, True, True]
    settings = read_settings(pictures[2].path)
    assert settings["prompt"] == "ab" and json.dumps(settings)
    visits.close()
