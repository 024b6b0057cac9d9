"""The options that benchmarks share, and what follows from them."""

import argparse
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

TOYS = ("toy", "toy-dit")  # the trained bases: `BASES` of examples/toy, which needs ComfyUI


def benchmark_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """With the options of every benchmark. `quick`: what --quick does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def add_results(parser: argparse.ArgumentParser, files: str) -> None:
    """The folder of the page that a benchmark writes."""
    parser.add_argument("--results", type=Path, help=f"where to write {files}; default: results, unless quick")


def add_work(parser: argparse.ArgumentParser, name: str, what: str = "what is kept") -> None:
    parser.add_argument("--work", type=Path, help=f"{what}; default: build/{name}, or build/{name}-quick")


def work_path(args: argparse.Namespace, name: str, toy: str = TOYS[0]) -> Path:
    """`toy`: the base whose it is."""
    folder = args.work or Path("build") / (f"{name}-quick" if args.quick else name)
    return folder.with_name(named_for(folder.name, toy))


def named_for(name: str, toy: str) -> str:
    """Of what belongs to that base: the first one's has the plain name."""
    return name if toy == TOYS[0] else f"{name}-{toy}"


def add_toys(parser: argparse.ArgumentParser) -> None:
    """The toys to measure on, as `args.base`."""
    parser.add_argument("--base", nargs="+", choices=TOYS, default=list(TOYS), help="the bases; default: both")


def add_trainings(parser: argparse.ArgumentParser) -> None:
    """How many times each adapter is trained, as `args.trainings`."""
    parser.add_argument("--trainings", type=int, default=1, help="of each adapter, with as many seeds; default: 1")


def add_base(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Which of these bases to measure on, and which ComfyUI with."""
    parser.add_argument("--model", nargs="+", choices=names, help="only these; default: SD 1.5 and SDXL")
    parser.add_argument("--tiny", action="store_true", help="tiny bases of the same layouts, to try the command")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, if it is not found by itself")


def matching(names: Sequence[str], asked: Sequence[str]) -> list[int]:
    """The indices of the names that have one of the texts `asked` in them."""
    return [i for i, name in enumerate(names) if any(text.lower() in name.lower() for text in asked)]


def selected(names: Sequence[str], asked: Sequence[str], what: str) -> list[int]:
    """As `matching`; an error where there are none."""
    found = matching(names, asked)
    if not found:
        sys.exit(f"No {what} has {' or '.join(asked)} in its name or section.")
    return found


def check_known(asked: Sequence[str] | None, known: Collection[str]) -> None:
    """An error where a method that is asked for is none."""
    if unknown := sorted(set(asked or ()).difference(known)):
        sys.exit(f"There is no method {', '.join(unknown)}; --list says which there are.")


def methods_on(
    there: dict[str, Collection[str]], asked: Sequence[str] | None, usual: Iterable[str], refusal: str
) -> dict[str, list[str]]:
    """By the base's name, those of the methods `asked` for, or else the `usual` ones, that are `there`. Where one that
    is asked for is on no base, an error: `refusal` with {bases} and {methods}."""
    wanted = asked or list(usual)
    found = {base: [name for name in wanted if name in own] for base, own in there.items()}
    if without := sorted(set(asked or ()).difference(*found.values())):
        sys.exit(refusal.format(bases=" and ".join(found), methods=", ".join(without)))
    return found


def measure_all(names: Iterable[str], measure: Callable[[str], None]) -> list[str]:
    """Measure each. Returns those that failed: one that does so in the night should not keep others from their turn."""
    failed = []
    for name in names:
        try:
            measure(name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return failed
