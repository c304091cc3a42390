"""`python -m withanyone.bench COMMAND`: MultiID-Bench, and any bench in its layouts, for any method.

generate   pictures of every case by a pipeline (resumable)
score      a folder of pictures, from any method -> results.json (resumable)
table      results beside the published Tables 1 and 2: Markdown, CSV, LaTeX
plot       similarity against copying, per case, slider sweep, real pictures, attributes
check      results against a baseline: exits 1 and names what got worse beyond its interval
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

logger = logging.getLogger(__name__)

RUNS = Path("runs/bench")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WORSE, CANNOT = 1, 2  # exit codes: a metric got worse; something given was wrong


# ---- generate --------------------------------------------------------------------------------------------


def _add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=Path, required=True, help="folder of cases, or parquet files")
    parser.add_argument("--layout", help="multiid-bench, omnicontext or folder (default: recognised)")
    parser.add_argument("--limit", type=int, help="the first so many cases only")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: the best there is)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    parser.add_argument(
        "--model",
        required=True,
        help="pipeline folder or Hub id; `target`, `reference`: the cases' own pictures (rows GT and Ref)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one picture a case and seed")
    parser.add_argument("--similarity", type=float, nargs="+", default=[], help="slider; several: a sweep")
    parser.add_argument("--diversity", type=float, nargs="+", default=[], help="slider; several: a sweep")
    parser.add_argument("--sweep", action="store_true", help="5 x 5 positions of the two sliders")
    parser.add_argument("--max-side", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--pipeline", help="module:Class with from_pretrained (default: this package's)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: bfloat16 on cuda, else float32; auto: bfloat16 on a CPU that computes in it, too",
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument(
        "--candidates", type=int, help="of each picture, the likest faces go on (default: the model's)"
    )


def _generate(args: argparse.Namespace) -> int:
    from .cases import read_cases
    from .generate import PIPELINE, SWEEP_DIVERSITY, SWEEP_SIMILARITY, Plan, generate, positions

    if args.sweep and (args.similarity or args.diversity):
        raise ValueError("`sweep` has its own positions: leave out similarity and diversity, or the sweep.")
    similarity, diversity = args.similarity, args.diversity
    if args.sweep:
        similarity, diversity = SWEEP_SIMILARITY, SWEEP_DIVERSITY
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"`seeds` must be different numbers from 0 on, got {args.seeds}.")
    given = {"num_inference_steps": args.steps, "num_candidates": args.candidates}
    plan = Plan(
        read_cases(args.cases, args.layout),
        str(args.out),
        args.model,
        tuple(args.seeds),
        tuple(positions(similarity, diversity)),
        args.max_side,
        args.pipeline or PIPELINE,
        args.device,
        args.dtype,
        {name: value for name, value in given.items() if value is not None},
    )
    failures = generate(plan, workers=args.workers, limit=args.limit)
    for picture, wrong in failures.items():
        print(f"not made: {picture}: {wrong}", file=sys.stderr)
    print(args.out)
    return 0


# ---- score -----------------------------------------------------------------------------------------------


def _add_score(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    parser.add_argument(
        "--pictures", type=Path, required=True, help="folder of <case>.png; or of a sweep's folders"
    )
    parser.add_argument("--out", type=Path, required=True, help="results.json (of a sweep: sweep.json)")
    parser.add_argument("--method", help="what to call it (default: the pictures' folder)")
    parser.add_argument("--bench", help="what to call the bench (default: by layout; MultiID-Bench, ...)")
    parser.add_argument(
        "--judges",
        nargs="+",
        default=["paper"],
        help="`paper`, `mini`, or NAME=KIND:WHERE of pack, onnx, adaface, facenet, clip, aesthetic, or "
        "module:attribute (default: paper)",
    )
    parser.add_argument("--judges-folder", type=Path, help="where the set `paper` lies")
    parser.add_argument(
        "--strict", action="store_true", help="stop at a broken case or an absent judge instead of naming it"
    )
    parser.add_argument(
        "--cache", type=Path, default=RUNS / "seen", help="what was seen in pictures (default: %(default)s)"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")


def _score(args: argparse.Namespace) -> int:
    from .cases import read_cases
    from .judges import expand, load_panel
    from .results import write_results
    from .sweep import make_sweep, sweep_folders

    cases = read_cases(args.cases, args.layout)
    judges = expand(args.judges, args.judges_folder)
    panel = load_panel(judges, device=args.device or "cpu", strict=args.strict)
    if not args.pictures.is_dir():
        raise ValueError(
            f"`pictures` {args.pictures} is not a folder: give the folder of a method's pictures."
        )
    method = args.method or args.pictures.resolve().name
    folders = sweep_folders(args.pictures)
    if not folders:
        write_results(_score_folder(args, cases, judges, panel, args.pictures, method, args.out), args.out)
        print(args.out)
        return 0
    scored = []
    for folder in folders:
        out = args.out.with_name(f"{args.out.stem}.{folder.name}.json")
        logger.info("%s", folder.name)
        results = _score_folder(args, cases, judges, panel, folder, f"{method}, {folder.name}", out)
        write_results(results, out)
        scored.append(results)
    write_results(make_sweep(method, scored), args.out)
    print(args.out)
    return 0


def _score_folder(args, cases, judges, panel, pictures: Path, method: str, out: Path) -> dict:
    """Results of one folder of pictures; its rows are kept beside `out`."""
    from .generate import read_stamp
    from .results import make_results
    from .scoring import score_cases

    scored = score_cases(
        cases,
        pictures,
        judges,
        rows=out.with_name(f"{out.stem}.rows"),
        memory=args.cache,
        panel=panel,
        workers=args.workers,
        limit=args.limit,
        device=args.device or "cpu",
        strict=args.strict,
    )
    total = len(cases) if args.limit is None else min(args.limit, len(cases))
    results = make_results(
        method, cases, scored, panel, bench=args.bench, bootstrap={"resamples": args.resamples},
        generation=read_stamp(pictures), workers=args.workers, total=total,
    )  # fmt: skip
    _say(results)
    return results


def _say(results: dict) -> None:
    from .figures import METRICS

    bench, run = results["bench"], results["run"]
    print(
        f"{results['method']} on {bench['name']}: {bench['cases']} of {bench['of']} cases, {bench['people']} "
        f"people, {run['seconds']:.0f} s, {run['rows_kept']} rows from before; likeness by "
        f"{' and '.join(results['identity_by'])}"
    )
    for name, version in results["judges"].items():
        if "absent" in version:
            print(f"  absent: {name}: {version['absent']}")
    for name, figure in results["metrics"]["all"].items():
        interval = f"[{figure['low']:.3f}, {figure['high']:.3f}]"
        print(f"  {METRICS[name].label:14} {figure['mean']:7.3f} {interval:18} n {figure['n']}")
    for name, wrong in results["broken_cases"].items():
        print(f"  left out: {wrong or name}")
    for kind, told in results["problems"].items():
        print(f"  {kind}: {told['count']}; {told['first'][0]}")


# ---- table, plot, check ----------------------------------------------------------------------------------


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="*", type=Path, help="results.json or sweep.json of any methods")
    parser.add_argument("--format", default="markdown", help="markdown, csv or latex")
    parser.add_argument("--intervals", action="store_true", help="with intervals")
    parser.add_argument("--attributes", action="store_true", help="what was copied, attribute by attribute")
    parser.add_argument("--subset", default="all", choices=("all", "single", "multi"), help="of --attributes")
    parser.add_argument("--only-own", action="store_true", help="without the published tables")
    parser.add_argument("--out", type=Path, help="file (default: printed)")


def _table(args: argparse.Namespace) -> int:
    from .results import read_results
    from .sweep import is_sweep, read_sweep
    from .tables import attribute_table, make_tables, render, sweep_table

    sweeps = [path for path in args.results if is_sweep(path)]
    results = [read_results(path) for path in args.results if path not in sweeps]
    tables = make_tables(results)
    if args.only_own:
        tables = tables[2:]
    text = render(tables, args.format, args.intervals)
    if args.attributes:
        text += "".join("\n" + attribute_table(result, args.subset) for result in results)
    text += "".join("\n" + sweep_table(read_sweep(path)) for path in sweeps)
    if args.out is None:
        print(text, end="")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        print(args.out)
    return 0


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=("tradeoff", "cases", "sweep", "real", "attributes"),
        help="tradeoff: Figure 5; cases: a dot a face; sweep: the sliders; real: likeness of two real "
        "pictures against a method's; attributes: what was copied",
    )
    parser.add_argument("results", nargs="*", type=Path, help="results.json (sweep: sweep.json)")
    parser.add_argument("--several", action="store_true", help="tradeoff: several people (Table 2)")
    parser.add_argument("--subset", default="all", choices=("all", "single", "multi"), help="of attributes")
    parser.add_argument("--out", type=Path, required=True, help="png, pdf or svg")


def _plot(args: argparse.Namespace) -> int:
    from . import plots
    from .results import read_results
    from .sweep import read_sweep

    if args.kind != "tradeoff" and not args.results:
        raise ValueError(f"`results` is empty: give the files to plot `{args.kind}` from.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.kind == "sweep":
        if len(args.results) != 1:
            raise ValueError(f"`results` has {len(args.results)} files: give one sweep.json.")
        plots.plot_sweep(read_sweep(args.results[0]), args.out)
    else:
        results = [read_results(path) for path in args.results]
        if args.kind == "tradeoff":
            said = plots.plot_tradeoff(results, args.out, several=args.several)
            print("\n".join(said))
        else:
            draw = {
                "cases": plots.plot_cases,
                "real": plots.plot_real,
                "attributes": partial(plots.plot_attributes, subset=args.subset),
            }
            draw[args.kind](results, args.out)
    print(args.out)
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--metrics", nargs="+", help="these only (default: all that have a better side)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="how much worse is still fine")
    parser.add_argument("--level", type=float, help="of the intervals (default: the baseline's, 0.95)")


def _check(args: argparse.Namespace) -> int:
    from .gate import compare
    from .results import read_results

    verdicts = compare(
        read_results(args.results), read_results(args.baseline), chosen=args.metrics,
        tolerance=args.tolerance, level=args.level,
    )  # fmt: skip
    for verdict in verdicts:
        print(f"{'WORSE' if verdict.worse else 'ok   '} {verdict}")
    worse = [f"{verdict.subset}.{verdict.metric}" for verdict in verdicts if verdict.worse]
    if worse:
        print(f"worse than {args.baseline}: {', '.join(worse)}", file=sys.stderr)
        return WORSE
    return 0


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "generate": (_add_generate, _generate),
    "score": (_add_score, _score),
    "table": (_add_table, _table),
    "plot": (_add_plot, _plot),
    "check": (_add_check, _check),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it worked, 1 if `check` found something worse, 2 with one line on stderr if
    something given was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m withanyone.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("withanyone.bench").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print("bench: stopped; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
