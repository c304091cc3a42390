"""The command line: `withanyone generate`, `withanyone faces`, `withanyone draw`.

Heavy imports wait until a command needs them, so that `--help` and a typing mistake answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .faces import Face
    from .pipeline import WithAnyonePipeline, WithAnyonePipelineOutput

LARGEST_SEED = 2**63 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with one line on stderr if something given was wrong."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"withanyone: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("withanyone: stopped.", file=sys.stderr)
        return 130
    return 0


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="withanyone", description="Pictures of particular people from a prompt."
    )
    parser.add_argument("--verbose", action="store_true", help="say more about what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("generate", help="make pictures of people from their photos and a prompt")
    add.set_defaults(run=generate)
    add.add_argument(
        "--face",
        nargs="+",
        action="append",
        metavar="PHOTO",
        help="one person: a photo, or several of the same person; once for each person, left to right",
    )
    add.add_argument("--prompt", required=True, help="what the picture shows")
    add.add_argument("--negative-prompt", help="what it should not show; needs true guidance above 1")
    add.add_argument(
        "--out", required=True, metavar="FILE", help="png, jpg or webp; several become FILE_1, FILE_2 ..."
    )
    add.add_argument(
        "--bbox",
        action="append",
        type=bbox,
        metavar="X1,Y1,X2,Y2",
        help="where a face goes, in pixels of the picture; once for each person (default: a layout)",
    )
    add.add_argument(
        "--similarity", type=float, help="0 to 1.5: how much the faces count (default: the model's)"
    )
    add.add_argument(
        "--diversity", type=float, help="0 keeps more of the photo, 1 only who it is (default: the model's)"
    )
    add.add_argument(
        "--seed", type=int, help="0 or more; the same seed gives the same picture (default: a new one)"
    )
    add.add_argument("--width", type=int, help="pixels (default: the model's)")
    add.add_argument("--height", type=int, help="pixels (default: the model's)")
    add.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    add.add_argument(
        "--guidance", type=float, help="guidance, distilled into the model (default: the model's)"
    )
    add.add_argument(
        "--true-guidance",
        type=float,
        help="above 1: a second pass a step with the negative prompt, twice the time (default: the model's)",
    )
    add.add_argument(
        "--candidates",
        type=int,
        help="of each picture, drawn at once; the likest faces go on (default: the model's)",
    )
    add.add_argument(
        "--num-images", type=int, default=1, help="pictures, with the seeds SEED, SEED + 1, ... (default 1)"
    )
    add.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(add)
    released = add.add_argument_group(
        "FLUX.1 with released weights", "with --model black-forest-labs/FLUX.1-dev"
    )
    released.add_argument(
        "--adapter", metavar="FILE", help="withanyone.safetensors, or a folder of save_pretrained"
    )
    released.add_argument("--image-encoder", metavar="MODEL", help="the SigLIP model of the adapter")
    released.add_argument(
        "--offload", choices=OFFLOADS, default="none", help="keep parts in main memory (default: none)"
    )

    find = commands.add_parser(
        "faces", help="show the faces that are found in photos, and how alike they are"
    )
    find.set_defaults(run=faces)
    find.add_argument("photo", nargs="+")
    find.add_argument("--json", action="store_true", help="print JSON")
    add_model_arguments(find, device=False)

    draw = commands.add_parser("draw", help="draw a person to try the miniature with")
    draw.set_defaults(run=draw_person)
    draw.add_argument("number", type=int, help="which person: 0 or more; the same number is the same person")
    draw.add_argument("--out", required=True, metavar="FILE")
    draw.add_argument(
        "--photos", type=int, default=1, help="different pictures of the person: FILE_1, FILE_2 ..."
    )
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    parser.add_argument(
        "--model", help="a pipeline folder or Hub id (default: the bundled miniature, drawn people only)"
    )
    parser.add_argument(
        "--face-pack", metavar="FOLDER", help="insightface models, such as antelopev2 (default: the model's)"
    )
    if device:
        parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
        parser.add_argument(
            "--dtype",
            choices=DTYPES,
            help="default: bfloat16 on cuda, else float32; auto: bfloat16 on a CPU that computes in it, too",
        )


def bbox(text: str) -> tuple[float, ...]:
    """ "10,20,60,90" -> (10.0, 20.0, 60.0, 90.0); the pipeline checks where it lies."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not a box: give four numbers, such as 10,20,60,90")
    return numbers


# ----------------------------------------------------------------------------------------------------------
# generate
# ----------------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> None:
    """Make pictures, save them with their settings, and say which seed was used."""
    from .mini import PRETRAINED, gallery
    from .settings import save_picture

    paths = picture_paths(args.out, args.num_images, "num_images")
    seed = check_seed(args.seed, args.num_images)
    model = args.model or str(PRETRAINED)
    miniature = gallery.is_miniature(model)
    if miniature:
        say_unknown_words(args.prompt)
    quieten(args)
    with out_of_memory_named():
        pipe = load_pipeline(
            model,
            adapter=args.adapter,
            face_pack=args.face_pack,
            image_encoder=args.image_encoder,
            device=args.device,
            dtype=args.dtype,
            offload=args.offload,
        )
        pipe.set_progress_bar_config(disable=args.quiet)
        given = call_settings(args, pipe, miniature)
        out = make_pictures(args, pipe, given, seed, miniature)
    defaults = pipe.config.sampling_defaults
    settings: dict[str, Any] = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        **{name: defaults[name] if value is None else value for name, value in given.items()},
        "bboxes": None if out.bboxes is None else [[round(float(v), 2) for v in box] for box in out.bboxes],
        "people": len(args.face or []),
        "model": "miniature" if miniature else model,
    }
    for i, (image, path) in enumerate(zip(out.images, paths, strict=True)):
        save_picture(
            image, path, {**settings, "width": image.width, "height": image.height, "seed": seed + i}
        )
        print(f"{path}  (seed {seed + i})")


def call_settings(args: argparse.Namespace, pipe: WithAnyonePipeline, miniature: bool) -> dict[str, Any]:
    """The call's numbers, by the pipeline's names; None where the model's default shall hold."""
    from .mini import gallery

    width, height = args.width, args.height
    if miniature:
        usual = gallery.size_for(len(args.face or []))
        width, height = (usual[i] if side is None else side for i, side in enumerate((width, height)))
    id_scale, siglip_scale = scales(args, pipe)
    return {
        "id_scale": id_scale,
        "siglip_scale": siglip_scale,
        "height": height,
        "width": width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "true_cfg_scale": args.true_guidance,
        "num_candidates": args.candidates,
    }


def make_pictures(
    args: argparse.Namespace, pipe: WithAnyonePipeline, settings: dict[str, Any], seed: int, miniature: bool
) -> WithAnyonePipelineOutput:
    import torch

    from .mini import gallery

    faces = [photos if len(photos) > 1 else photos[0] for photos in args.face or []] or None
    try:
        if miniature and faces:
            faces = pipe.find_faces(faces)
            gallery.check_drawn(faces)
        return pipe(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            faces=faces,
            bboxes=args.bbox,
            num_images_per_prompt=args.num_images,
            # One generator a picture: each can be made again alone, by its own seed.
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(args.num_images)],
            **settings,
        )
    except ValueError as error:
        if miniature and "no face found" in str(error):
            raise ValueError(f"{error} {gallery.NOTICE}") from error
        raise


def say_unknown_words(prompt: str) -> None:
    from .mini.world import unknown_words

    if unknown := unknown_words(prompt):
        words = ", ".join(unknown)
        print(f"The miniature does not know these words and passes over them: {words}.", file=sys.stderr)


def quieten(args: argparse.Namespace) -> None:
    """No bars of weights being loaded, and what libraries have to say only on request."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if args.quiet:
        diffusers_logging.disable_progress_bar()
    if not args.verbose:
        transformers_logging.set_verbosity_error()


@contextlib.contextmanager
def out_of_memory_named() -> Iterator[None]:
    """A card whose memory does not suffice, as a ValueError that says what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "The memory of the `device` is full: give --offload model (or sequential: least memory, slow), a "
            "smaller --width and --height, or fewer --num-images."
        ) from error


def picture_paths(out: str, count: int, name: str) -> list[Path]:
    """The files that will be written: `out` itself, or out_1, out_2 ... for several pictures."""
    from .settings import check_picture_path

    path = check_picture_path(out)
    if count < 1:
        raise ValueError(f"`{name}` is {count}: give 1 or more.")
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}_{i}") for i in range(1, count + 1)]


def check_seed(seed: int | None, count: int) -> int:
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= LARGEST_SEED - count:
        raise ValueError(f"`seed` is {seed}: give a number from 0 to {LARGEST_SEED - count}.")
    return seed


def scales(args: argparse.Namespace, pipe: WithAnyonePipeline) -> tuple[float, float]:
    """The two branches' scales, from the sliders; one that is not given stands at the model's default."""
    from .pipeline import slider_scales
    from .settings import slider_positions

    defaults = pipe.config.sampling_defaults
    similarity, diversity = slider_positions(defaults["id_scale"], defaults["siglip_scale"])
    if args.similarity is None and args.diversity is None:
        return defaults["id_scale"], defaults["siglip_scale"]
    return slider_scales(
        similarity if args.similarity is None else args.similarity,
        diversity if args.diversity is None else args.diversity,
    )


def load_pipeline(
    model: str,
    *,
    adapter: str | None = None,
    face_pack: str | None = None,
    image_encoder: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str = "none",
) -> WithAnyonePipeline:
    """A pipeline ready to run: `model` with the parts that are named, on the best device there is."""
    import torch

    from . import FaceAdapter, FaceAnalyzer, WithAnyonePipeline
    from .precision import dtype_name

    place = pick_device(device)
    if offload != "none" and place.type == "cpu":
        raise ValueError(
            f"`offload` is {offload!r}, but on the cpu all parts are in main memory: leave it out."
        )
    weights = getattr(torch, dtype_name(dtype, place))
    parts: dict[str, Any] = {}
    if adapter:
        single = Path(adapter).is_file() or adapter.endswith(".safetensors")
        load = FaceAdapter.from_single_file if single else FaceAdapter.from_pretrained
        parts["face_adapter"] = load(adapter).to(weights)
    if face_pack:
        parts["face_analyzer"] = FaceAnalyzer.from_pretrained(face_pack)
    if image_encoder:
        from transformers import SiglipImageProcessor, SiglipVisionModel

        try:
            parts["image_encoder"] = SiglipVisionModel.from_pretrained(image_encoder, dtype=weights)
            parts["feature_extractor"] = SiglipImageProcessor.from_pretrained(image_encoder)
        except OSError as error:
            raise ValueError(f"`image_encoder` is {image_encoder!r}, which cannot be had: {error}") from error
    pipe = WithAnyonePipeline.from_pretrained(model, dtype=weights, **parts)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)
    return pipe


def pick_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(
            f"`device` is {name!r}, which torch does not find on this machine: give cuda, cuda:1, mps or cpu."
        ) from error
    if device.type == "meta":
        raise ValueError("`device` is 'meta', which computes nothing: give cuda, cuda:1, mps or cpu.")
    return device


# ----------------------------------------------------------------------------------------------------------
# faces, draw
# ----------------------------------------------------------------------------------------------------------


def faces(args: argparse.Namespace) -> None:
    """Print the faces of the photos: number, photo, box, score; and the cosine of each pair."""
    from .faces import FaceAnalyzer

    analyzer = FaceAnalyzer.from_pretrained(args.face_pack or face_pack_of(args.model))
    found = [(photo, face) for photo in args.photo for face in analyzer.detect(photo)]
    cosines = [[float(a.normed_embedding @ b.normed_embedding) for _, b in found] for _, a in found]
    if args.json:
        print(
            json.dumps(
                {"faces": [face_record(photo, face) for photo, face in found], "cosines": cosines}, indent=2
            )
        )
        return
    for photo in args.photo:
        if not any(name == photo for name, _ in found):
            print(f"{photo}: no face found (models: {analyzer.pack})")
    if not found:
        return
    print(f"{'face':>4}  {'score':>5}  {'x1':>6} {'y1':>6} {'x2':>6} {'y2':>6}  photo")
    for number, (photo, face) in enumerate(found, start=1):
        box = " ".join(f"{value:6.1f}" for value in face.bbox)
        print(f"{number:>4}  {face.det_score:5.3f}  {box}  {photo}")
    if len(found) > 1:
        print("\ncosine" + "".join(f"{number:>7}" for number in range(1, len(found) + 1)))
        for number, row in enumerate(cosines, start=1):
            print(f"{number:>6}" + "".join(f"{cosine:7.3f}" for cosine in row))


def face_pack_of(model: str | None) -> Path:
    """The face models inside a pipeline folder: its `face_analyzer`."""
    from .mini import PRETRAINED

    folder = Path(model or PRETRAINED).expanduser() / "face_analyzer"
    if not folder.is_dir():
        raise ValueError(
            f"`model` is {model!r}, which has no folder `face_analyzer`: name the models by --face-pack."
        )
    return folder


def face_record(photo: str, face: Face) -> dict[str, Any]:
    return {
        "photo": photo,
        "bbox": [round(float(value), 2) for value in face.bbox],
        "kps": [[round(float(value), 2) for value in point] for point in face.kps],
        "det_score": round(face.det_score, 4),
    }


def draw_person(args: argparse.Namespace) -> None:
    """Save one or several pictures of a drawn person."""
    from .mini.gallery import draw_photo

    for i, path in enumerate(picture_paths(args.out, args.photos, "photos")):
        draw_photo(args.number, i).save(path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())
