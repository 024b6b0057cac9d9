"""The page and the plots of `frontier.py`, and what they conclude from its rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

from PIL import Image

from comfyui_agd.benchmarks.colour_key import colour, with_key
from comfyui_agd.benchmarks.experiment import TRUE_STEPS
from comfyui_agd.benchmarks.frontier_methods import FRONTIER, Group
from comfyui_agd.benchmarks.output import Figure, columns_of
from comfyui_agd.examples.toy.bases import Base
from comfyui_agd.examples.toy.sampling import SAMPLER, STEPS
from comfyui_agd.examples.toy.scenes import IMAGE_SIZE
from comfyui_agd.examples.toy.standard_errors import BLOCKS
from comfyui_agd.examples.toy.tables import Column, console_table, markdown_table
from comfyui_agd.training.plot import Diagram

_DISTANCE = Figure("distance to CFG", "distance_to_cfg", 1, 3)
_FIGURES = (
    Figure("evaluations", "evaluations", 1, 1),
    Figure("ms per picture", "seconds_per_image", 1000, 0),
    _DISTANCE,
    Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
    Figure("Fréchet to real", "frechet_to_real", 1, 1),
    Figure("above CFG's", "frechet_above_cfg", 1, 1),
)
LEVELS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # distances at which evaluations are compared
CANDIDATE_STEPS = (STEPS, STEPS // 2, STEPS // 4)  # of the CFG that candidates for the harder regime are judged by
# In the harder regime CFG's pictures at 50 steps must still show what is asked for, and those at 20 be no further away.
LEAST_ACCURACY, FURTHEST_AT_ALL_STEPS = 0.9, 0.4
_OURS = (Group.ADAPTER.value, Group.ADAPTER_WITH_CACHE.value)
_PLOT_SIZE, _PLOTTED_UP_TO, _FURTHEST = (1400, 820), 40, 1.25
_COLOURS = {
    Group.CFG: ("#000000",),
    Group.TRAINING_FREE: ("#e08a00",),
    Group.ADAPTER: ("#1f5fbf", "#63a4ff"),
    Group.ADAPTER_WITH_CACHE: ("#c2185b", "#ff6f91", "#7b1fa2", "#ff3d00", "#6d4c41"),
}
_KEY_COLUMNS = 4


def non_dominated(rows: Sequence[dict]) -> list[dict]:
    """The rows that are nearer to CFG than every other that takes no more evaluations, by rising evaluations."""
    found: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["evaluations"], row["distance_to_cfg"])):
        if not found or row["distance_to_cfg"] < found[-1]["distance_to_cfg"]:
            found.append(row)
    return found


def fewest(rows: Iterable[dict], distance: float) -> dict | None:
    """The row that is no further from CFG than this, with the fewest evaluations."""
    near = [row for row in rows if row["distance_to_cfg"] <= distance]
    return min(near, key=lambda row: row["evaluations"], default=None)


def of_groups(rows: Iterable[dict], *groups: Group) -> list[dict]:
    return [row for row in rows if row["group"] in {group.value for group in groups}]


def _named(row: dict | None) -> str:
    return f"{row['evaluations']:.1f} (`{row['method']}`, {row['setting']})" if row else "not reached"


def _ratio(own: dict | None, other: dict | None) -> str:
    """Of evaluations."""
    return f"{own['evaluations'] / other['evaluations']:.2f}" if own and other else "–"


_CONSOLE = (
    Column("regime", lambda row: row["regime"], -8),
    Column("method", lambda row: row["method"], -18),
    Column("setting", lambda row: row["setting"], -28),
    Column("evals", lambda row: f"{row['evaluations']:.1f}", 7),
    Column("distance", lambda row: f"{row['distance_to_cfg']:.3f}", 10),
    Column("accuracy", lambda row: f"{row['prompt_accuracy']:.3f}", 10),
    Column("Fréchet", lambda row: f"{row['frechet_to_real']:.1f}", 9),
)


def plain(rows: list[dict]) -> Iterator[str]:
    """For a terminal."""
    return console_table(_CONSOLE, rows)


def _candidate_columns() -> list[Column]:
    figures = [
        *(Figure(f"distance, {count} steps", f"distance_to_cfg_{count}", 1, 3) for count in CANDIDATE_STEPS),
        *(Figure(f"Fréchet, {count} steps", f"frechet_above_cfg_{count}", 1, 1) for count in CANDIDATE_STEPS),
    ]
    first = [
        Column("candidate", lambda row: row["regime"], -20),
        Column(f"accuracy, {TRUE_STEPS} steps", lambda row: f"{row['prompt_accuracy']:.2f}", 20),
    ]
    return [*first, *(Column(figure.heading, figure.text, 20) for figure in figures)]


def plain_candidates(rows: list[dict]) -> Iterator[str]:
    return console_table(_candidate_columns(), rows)


@dataclass(frozen=True)
class Report:
    """`tried`: the candidates for the harder regime; `regimes`: the chosen ones' rows; `made`: when and on what."""

    rows: list[dict]
    tried: list[dict]
    regimes: dict[str, dict]
    base: Base
    made: str

    @property
    def regimes_measured(self) -> list[str]:
        return [regime for regime in self.regimes if self._of(regime)]

    def page(self, name: str) -> str:
        """The page whose files have this name."""
        pictures = "/".join(map(str, sorted({row["pictures"] for row in self.rows})))
        parts = "\n\n".join(self._section(regime, name) for regime in self.regimes_measured)
        there = [name for name in FRONTIER if any(row["method"] == name for row in self.rows)]
        methods = "\n".join(f"- `{name}` ({FRONTIER[name].group.value}): {FRONTIER[name].what}." for name in there)
        usual = self.tried[0]
        return f"""# What is worth its evaluations

`python benchmarks/frontier.py --base {self.base.name}`, {self.made}. {_title(self.base)}, {pictures} pictures per row.
Written by the command; each value with its standard error.

## The regimes

How far CFG with few steps is from CFG with {TRUE_STEPS}: by its latents, and by how much its Fréchet distance to real
pictures is larger, for {usual["pictures"]} pictures. {SAMPLER.capitalize()}; omega {usual["settings"]["omega"]:g},
{self.base.scheduler} and {IMAGE_SIZE} x {IMAGE_SIZE} pixels but where a candidate says otherwise. Larger pictures are
scaled down for the judge. **The harder regime is {self.regimes["harder"]["regime"]}**: there CFG with half of {STEPS}
steps is furthest from CFG, of the candidates where CFG with {TRUE_STEPS} steps is right in
{LEAST_ACCURACY:.0%} of its pictures or more, and with {STEPS} steps within {FURTHEST_AT_ALL_STEPS:g} of that. Omegas
that adapters aren't trained for are shown, but not chosen.

{markdown_table(_candidate_columns(), self.tried)}

{parts}

## The methods

{methods}

{_ABOUT}"""

    def _of(self, regime: str) -> list[dict]:
        return [row for row in self.rows if row["regime"] == regime]

    def _section(self, regime: str, name: str) -> str:
        rows = self._of(regime)
        best = {id(row) for row in non_dominated(rows)}
        first = (
            Column("method", lambda row: f"`{row['method']}`"),
            Column("setting", lambda row: row["setting"]),
            Column("on the frontier", lambda row: "yes" if id(row) in best else ""),
        )
        return f"""## The {regime} regime: {_described(self.regimes[regime], self.base)}

### Which is on the frontier

{_ranges(rows)}

{_when_ours(rows)}

![distance to CFG against evaluations per picture]({name}-{regime}.png)

### At equal distance

The fewest evaluations with which each is no further from CFG than that. Ratio: of an adapter, alone or with a cache, to
the best that others have, CFG with fewer steps not among them.

{_levels(rows)}

Each cache and each sparse guidance, against the adapter at a distance no larger than its own:

{_against_adapter(rows)}

### All of it

{markdown_table([*first, *columns_of(_FIGURES)], rows)}"""

    def plot(self, regime: str) -> Image.Image:
        """Distance against evaluations: a dot per row, a line through what is best of each method, a ring around what
        is best of all."""
        rows = [row for row in self._of(regime) if row["evaluations"] <= _PLOTTED_UP_TO]
        rows = [row for row in rows if row["distance_to_cfg"] <= _FURTHEST]
        colours = _colours([name for name in FRONTIER if any(row["method"] == name for row in rows)])
        title = f"{_title(self.base)}, {regime} regime: distance to CFG with {TRUE_STEPS} steps"
        diagram = Diagram(title, 0, _PLOTTED_UP_TO, 0.0, _FURTHEST, "evaluations per picture", _PLOT_SIZE)
        for name, shade in colours.items():
            own = [row for row in rows if row["method"] == name]
            width = 1 if FRONTIER[name].group is Group.WITHOUT_US else 4
            diagram.curve([_point(row) for row in non_dominated(own)], shade, width=width)
            diagram.dots([_point(row) for row in own], shade)
        diagram.ring([_point(row) for row in non_dominated(rows)])
        named = {f"{name} ({FRONTIER[name].group.value})": shade for name, shade in colours.items()}
        return with_key(diagram.image, named, _KEY_COLUMNS)


def _point(row: dict) -> tuple[float, float]:
    return row["evaluations"], row["distance_to_cfg"]


def _title(base: Base) -> str:
    return base.title[0].upper() + base.title[1:]


def _described(candidate: dict, base: Base) -> str:
    own = candidate["settings"]
    size = own.get("size", IMAGE_SIZE)
    return f"omega {own['omega']:g}, {SAMPLER}, {own.get('scheduler', base.scheduler)}, {size} x {size} pixels"


def _ranges(rows: list[dict]) -> str:
    """Markdown: who is nearest to CFG for so many evaluations or fewer."""
    best = non_dominated(rows)
    parts = [list(own) for _, own in groupby(best, key=lambda row: row["method"])]
    ends = [part[0]["evaluations"] for part in parts[1:]]
    lines = []
    for part, end in zip(parts, [*ends, None], strict=True):
        until = f"to {end:.1f}" if end else "on"
        lines.append({"from": f"{part[0]['evaluations']:.1f} {until}", "first": part[0], "last": part[-1]})
    columns = [
        Column("evaluations, from", lambda line: line["from"]),
        Column("nearest to CFG", lambda line: f"`{line['first']['method']}` ({line['first']['group']})"),
        Column("distance", lambda line: " to ".join(dict.fromkeys(_DISTANCE.text(line[k]) for k in ("first", "last")))),
    ]
    return markdown_table(columns, lines)


def _when_ours(rows: list[dict]) -> str:
    """For how many evaluations an adapter is on the frontier, as a sentence."""
    best, ranges = non_dominated(rows), []
    for ours, own in groupby(enumerate(best), key=lambda each: each[1]["group"] in _OURS):
        indices = [i for i, _ in own]
        if ours:
            end = f" to {best[indices[-1] + 1]['evaluations']:.1f}" if indices[-1] + 1 < len(best) else " on"
            ranges.append(f"from {best[indices[0]]['evaluations']:.1f}{end}")
    return f"**An adapter, alone or with a cache, is on the frontier {', '.join(ranges) or 'nowhere'}** evaluations."


def _levels(rows: list[dict]) -> str:
    """Markdown: a line per distance."""

    def column(heading: str, *groups: Group) -> Column:
        return Column(heading, lambda level: _named(fewest(of_groups(rows, *groups), level)))

    def ratio(*groups: Group) -> Callable[[float], str]:
        best = of_groups(rows, *groups)
        own = of_groups(rows, Group.ADAPTER, Group.ADAPTER_WITH_CACHE)
        return lambda level: _ratio(fewest(own, level), fewest(best, level))

    columns = [
        Column("distance", lambda level: f"{level:g}"),
        *(column(group.value, group) for group in Group),
        Column("ratio", ratio(Group.WITHOUT_US)),
        Column("ratio to CFG", ratio(Group.CFG)),
    ]
    return markdown_table(columns, LEVELS)


def _against_adapter(rows: list[dict]) -> str:
    """Markdown: a line per setting of what others have."""
    alone, cached = (of_groups(rows, group) for group in (Group.ADAPTER, Group.ADAPTER_WITH_CACHE))

    def best(row: dict) -> dict | None:
        return fewest([*alone, *cached], row["distance_to_cfg"])

    columns = [
        Column("method", lambda row: f"`{row['method']}`, {row['setting']}"),
        Column("evaluations", lambda row: f"{row['evaluations']:.1f}"),
        Column("distance", _DISTANCE.text),
        Column("adapter", lambda row: _named(fewest(alone, row["distance_to_cfg"]))),
        Column("adapter with a cache", lambda row: _named(fewest(cached, row["distance_to_cfg"]))),
        Column("ratio", lambda row: _ratio(best(row), row)),
    ]
    return markdown_table(columns, of_groups(rows, Group.WITHOUT_US))


def _colours(names: Sequence[str]) -> dict[str, str]:
    """CFG black, what others have in all hues, ours in strong blues and reds."""
    others = [name for name in names if FRONTIER[name].group is Group.WITHOUT_US]
    found = {name: colour(i / len(others), 0.75, (0.85, 0.5)[i % 2]) for i, name in enumerate(others)}
    for group, colours in _COLOURS.items():
        found |= dict(zip((name for name in names if FRONTIER[name].group is group), cycle(colours), strict=False))
    return {name: found[name] for name in names}


_ABOUT = f"""## What is measured

- **Evaluations** per picture are counted: rows that reach the model. Seconds are those inside KSampler and depend on
  what else the machine did.
- **Distance to CFG**: of the final latents to those of CFG with {TRUE_STEPS} steps, from the same captions and noise;
  root mean square, over that of the unguided base: 0 is CFG's picture, 1 is as far away as unguided.
- **On the frontier** is what is nearer to CFG than everything that takes no more evaluations.
- **Prompt accuracy**: pictures in which the judge sees every attribute of a held-out caption. **Fréchet distance** in
  the judge's 128 features, to 4096 real held-out pictures; **above CFG's**: the difference to that of CFG with
  {TRUE_STEPS} steps, of the same captions and noise. It is biased upwards by the number of pictures.
- **Standard errors**: binomial for shares, over batches for seconds, and a jackknife over {BLOCKS} blocks of captions
  and seeds for the rest. They are about other captions and other noise; of each adapter one was trained.
"""
