"""The tables, the page and the plot of `quality.py`, from its rows."""

import math
from collections.abc import Iterable, Iterator

from PIL import Image

from comfyui_agd.benchmarks import metrics
from comfyui_agd.benchmarks.colour_key import colour, with_key
from comfyui_agd.benchmarks.command_line import named_for
from comfyui_agd.benchmarks.experiment import BLOCKS, BUDGETS, REUSE, TRAINING_BATCH, TRUE_STEPS, Sizes
from comfyui_agd.benchmarks.methods import AUTHORS_RATE, BUDGET, METHODS
from comfyui_agd.benchmarks.output import Figure, columns_of
from comfyui_agd.examples.toy.bases import Base
from comfyui_agd.examples.toy.measure import omega_star
from comfyui_agd.examples.toy.sampling import SAMPLER, STEPS
from comfyui_agd.examples.toy.scenes import HELD_OUT_UNWANTED
from comfyui_agd.examples.toy.standard_errors import BLOCKS as JACKKNIFE_BLOCKS
from comfyui_agd.examples.toy.tables import Column, console_table, markdown_table
from comfyui_agd.training.plot import Diagram, stacked

_FIGURES = (
    Figure("parameters, %", "parameters_percent", 1, 1),
    Figure("trainings", "trainings", 1, 0),
    Figure("evaluations per step", "evaluations_per_step", 1, 2),
    Figure("ms per picture", "seconds_per_image", 1000, 0),
    Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
    Figure("above CFG's, points", "prompt_accuracy_above_cfg", 100, 1),
    Figure("Fréchet to real", "frechet_to_real", 1, 1),
    Figure("above CFG's", "frechet_above_cfg", 1, 1),
    Figure("Fréchet to CFG", "frechet_to_cfg", 1, 1),
    Figure("distance to CFG's picture", "distance_to_cfg", 1, 3),
    Figure("precision", "precision", 1, 3),
    Figure("recall", "recall", 1, 3),
    Figure("gap closed", "gap_closed", 1, 3),
    Figure("cosine", "direction_cosine", 1, 3),
    Figure("unwanted without, %", "unwanted_without", 100, 1),
    Figure("unwanted with negative, %", "unwanted_with", 100, 1),
    Figure("of CFG's reduction", "negative_reduction", 1, 2),
)
_NOT_AT_FEWER_STEPS = ("parameters_percent", "gap_closed", "direction_cosine")
_AT_FEWER_STEPS = [figure for figure in _FIGURES if figure.key not in _NOT_AT_FEWER_STEPS]
_COMPARED = [figure for figure in _FIGURES if figure.key in ("prompt_accuracy", "frechet_to_real", "distance_to_cfg")]
# Of which the spread between trainings is shown.
_BETWEEN = [
    figure._replace(key=f"{figure.key}_between")
    for figure in _FIGURES
    if figure.key in (*(each.key for each in _COMPARED), "gap_closed", "negative_reduction")
]
_PLOTS = (
    ("Prompt accuracy, %", "prompt_accuracy", 100),
    ("Frechet distance to real pictures", "frechet_to_real", 1),  # PIL's font lacks the accent
)
# As many as can be distinguished.
_PLOTTED = (
    *("unguided", "cfg", "cfg_interval", "adaptive", "meng", "static_lora", "paper_attention", "paper_additive"),
    *("training_free", "attention_guidance", "nag", "calibrated", "ours", "ours_longer"),
)
_NAMED = 3  # of the rows that are better than another
_KEY_COLUMNS = 5


def in_order(rows: list[dict]) -> list[dict]:
    """As the methods are listed; rows of methods that are gone are left out."""
    places = {name: i for i, name in enumerate(METHODS)}
    known = [row for row in rows if row["method"] in places]
    return sorted(known, key=lambda row: (places[row["method"]], row["omega"], -row["steps"]))


def _evaluations(row: dict) -> float:
    return row["evaluations_per_step"] * row["steps"]


def _at_equal_steps(rows: list[dict]) -> list[dict]:
    """With CFG's half the steps, as many evaluations as one pass with all."""
    return [row for row in rows if row["steps"] == STEPS or (row["method"], row["steps"]) == ("cfg", STEPS // 2)]


def _with_trainings(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("trainings", 1) > 1]


def _with_gaps(rows: list[dict]) -> list[dict]:
    """A row of each method that has a gap to measure; it is measured at all omegas at once."""
    return list({row["method"]: row for row in rows if _gap_figures([row])}.values())


def _gap_figures(rows: list[dict]) -> list[Figure]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("gap_closed_at_"))
    return [Figure(f"at omega {key.rsplit('_', 1)[1]}", key) for key in keys if not key.endswith(("_se", "_between"))]


def _at_equal_time(rows: list[dict], budget: int) -> list[dict]:
    """The rows that take about so many evaluations per picture."""
    return [row for row in rows if 0.85 * budget <= _evaluations(row) <= 1.05 * budget]


def significantly_better(row: dict, other: dict) -> bool:
    """Whether `row` takes no more evaluations than the other and is better in accuracy or Fréchet distance, by two
    standard errors of their difference to CFG, and worse in neither by as much."""
    if _evaluations(row) > 1.02 * _evaluations(other):
        return False
    gains = []
    for key, sign in (("prompt_accuracy_above_cfg", 1), ("frechet_above_cfg", -1)):
        error = math.hypot(row[f"{key}_se"], other[f"{key}_se"])
        gains.append(sign * (row[key] - other[key]) / error if error else 0.0)
    return max(gains) > 2 and min(gains) > -2


def _dominance(rows: list[dict]) -> list[dict]:
    """The rows at omega*, where all numbers of steps are, each with the rows that are better for no more, as text."""
    own = [row for row in rows if row["omega"] in (1.0, omega_star(row["model"]))]
    named = {id(row): f"`{row['method']}` at {row['steps']} steps" for row in own}
    found = []
    for row in own:
        by = [named[id(other)] for other in own if significantly_better(other, row)]
        more = [f"{len(by) - _NAMED} more"] if len(by) > _NAMED else []
        found.append(row | {"by": ", ".join(by[:_NAMED] + more) or "none"})
    return found


def _shown(row: dict, key: str) -> str:
    return "" if row.get(key) is None else f"{row[key]:.3f}"


_CONSOLE = (
    Column("method", lambda row: row["method"], -24),
    Column("omega", lambda row: f"{row['omega']:g}", 6),
    Column("steps", lambda row: str(row["steps"]), 6),
    Column("evals", lambda row: f"{_evaluations(row):.1f}", 7),
    Column("accuracy", lambda row: f"{row['prompt_accuracy']:.4f}", 10),
    Column("Fréchet", lambda row: f"{row['frechet_to_real']:.2f}", 9),
    Column("distance", lambda row: _shown(row, "distance_to_cfg"), 10),
    Column("gap", lambda row: _shown(row, "gap_closed"), 7),
    Column("negative", lambda row: _shown(row, "negative_reduction"), 10),
)


def plain(rows: list[dict]) -> Iterator[str]:
    """For a terminal."""
    return console_table(_CONSOLE, rows)


_METHOD = Column("method", lambda row: f"`{row['method']}`")
_PARAMETERS = Column("parameters, %", lambda row: f"{row['parameters_percent']:.1f}")
_SETTING = (
    _METHOD,
    Column("omega", lambda row: f"{row['omega']:g}"),
    Column("steps", lambda row: str(row.get("steps", "–"))),
)
_SETTING_IN_TIME = (
    *_SETTING,
    Column("evaluations per picture", lambda row: f"{_evaluations(row):.1f}"),
)
_DOMINATED = (*_SETTING_IN_TIME, Column("surely better for no more evaluations", lambda row: row["by"]))


def _table(first: Iterable[Column], figures: Iterable[Figure], rows: list[dict]) -> str:
    return markdown_table([*first, *columns_of(figures)], rows)


def _budgets(rows: list[dict]) -> str:
    parts = []
    for budget in BUDGETS:
        table = _table(_SETTING_IN_TIME, _AT_FEWER_STEPS, _at_equal_time(rows, budget))
        parts.append(f"### {budget} evaluations per picture\n\n{table}")
    return "\n\n".join(parts)


def page(rows: list[dict], real: dict, sizes: Sizes, base: Base, made: str) -> str:
    """quality.md. `real`: the row of real pictures; `made`: when and on what."""
    name = named_for("quality", base.name)
    pictures = "/".join(map(str, sorted({row["pictures"] for row in rows})))
    return f"""# How good guidance in one pass is

`python benchmarks/quality.py --base {base.name}`, {made}. {base.title.capitalize()}, {pictures} pictures per row.
Written by the command; each value with its standard error.

## At equal sampler steps, and CFG with half of them

{STEPS} steps of {SAMPLER}/{base.scheduler}; CFG's half of them are as many evaluations as one pass with all.

{_table(_SETTING, _FIGURES, [real, *_at_equal_steps(rows)])}

## Gap closed by omega

{_table((_METHOD, _PARAMETERS), _gap_figures(rows), _with_gaps(rows))}

{_spread(rows)}## At equal evaluations

With as many steps as so many evaluations per picture allow.

{_budgets(rows)}

### Which are dominated

A row is, where another takes no more evaluations and is better in prompt accuracy or Fréchet distance by more than two
standard errors, and worse in neither. Both are compared through their difference to CFG with the same captions and
noise.

{_table(_DOMINATED, _COMPARED, _dominance(rows))}

![prompt accuracy and Fréchet distance against evaluations per picture]({name}.png)

{_about_methods(rows, sizes)}
{_about_measurements(sizes)}"""


def _spread(rows: list[dict]) -> str:
    """The section about several trainings, if there were."""
    if not (several := _with_trainings(rows)):
        return ""
    return f"""## Between trainings

Standard deviations between trainings of the same method with other seeds. Where there are several, other tables have
their means.

{_table((*_SETTING, Column("trainings", lambda row: str(row["trainings"]))), _BETWEEN, several)}

"""


def _about_methods(rows: list[dict], sizes: Sizes) -> str:
    there = dict.fromkeys(row["method"] for row in rows)
    listed = "\n".join(f"- `{name}`: {METHODS[name].what}." for name in there)
    batches = -(-sizes.iterations // REUSE)
    return f"""## The methods

- `real`: real pictures of the same captions, once through the autoencoder; no sampler can draw better ones.
{listed}

Trained methods have, unless their line says otherwise, {sizes.iterations} iterations of batch {TRAINING_BATCH}, on
{batches} recorded batches of the teacher's two predictions ({sizes.captions} captions; each state {REUSE} times,
with other omegas up to 6), AdamW with 10 % warm-up and a cosine, clipping at 1 and a moving average of 0.99. Two
learning rates are tried for `meng` (1e-4 and 5e-4) and `static_lora` (5e-4 and 2e-3): the one counts that closes more
of the gap on captions kept for this choice; `ours` has 2e-3, the longer ones 3e-3, the adapters of the paper's authors
{AUTHORS_RATE:g}, the best of four in `ablation.py`. Methods that use the negative prompt learn from half empty, half
random ones; those that ignore it learn from as many batches with empty ones only. Adapters have the largest width
within {BUDGET:g} % of the base's parameters, unless their line says otherwise.
"""


def _about_measurements(sizes: Sizes) -> str:
    left_out = ", ".join(f'"{word}"' for word in HELD_OUT_UNWANTED)
    return f"""## What is measured

- **Evaluations** are counted: rows that reach the model. Seconds are those inside KSampler and depend on what else the
  machine did.
- **Prompt accuracy**: pictures in which the judge sees every attribute of a held-out caption.
- **Fréchet distance** in the judge's 128 features, to 4096 real held-out pictures and to CFG's pictures of the same
  captions, noise and omega. It is biased upwards by the number of pictures, for all methods alike.
- **Precision and recall**: improved ones (Kynkäänniemi et al. 2019), k = {metrics.NEIGHBOURS}, in the same features.
- **Above CFG's**: the difference to CFG's 20 steps at the same omega, captions and noise, whose error is much smaller.
- **Distance to CFG's picture**: root mean square distance of the final latents to those of CFG's {TRUE_STEPS} steps at
  the same omega, sampler, captions and noise, over that of the unguided ones: 0 is CFG's picture, 1 is as far as no
  guidance. On the first {sizes.compared} captions.
- **Gap closed and direction cosine**: towards the method's own teacher, on its trajectories over
  {sizes.gap_captions} held-out captions, with an empty negative prompt.
- **Negative prompts**: captions that leave attributes open, such as "a small shape on a blue background". For each, an
  attribute or a combination is unwanted that the base draws there unguided: one that is no negative prompt of the
  training, where {left_out} and a tenth of all combinations are left out. The share of pictures that
  show it, without and with the negative prompt, from the same noise; the last column is by which share it became rarer,
  over that of CFG.
- **Standard errors**: binomial for shares, over batches for seconds, over {BLOCKS} blocks of captions for the gap,
  and a jackknife over {JACKKNIFE_BLOCKS} blocks of captions and seeds for the rest. They are about other captions and
  other noise. Where a method was trained several times, n, its figures are means, and errors have the spread s between
  trainings in them too: the root of se² + s²/n. Where it was trained once they know nothing of other trainings.
"""


def plot(rows: list[dict], best_omega: float) -> Image.Image:
    """Prompt accuracy and Fréchet distance against evaluations per picture, of the main methods at omega*."""
    rows = [row for row in rows if row["method"] in _PLOTTED and row["omega"] in (1.0, best_omega)]
    names = list(dict.fromkeys(row["method"] for row in rows))
    # Neighbours in the list differ in brightness too.
    colours = {name: colour(i / len(names), 0.9, (0.9, 0.6)[i % 2]) for i, name in enumerate(names)}
    return with_key(stacked([_diagram(rows, colours, plot) for plot in _PLOTS], sideways=True), colours, _KEY_COLUMNS)


def _diagram(rows: list[dict], colours: dict[str, str], plot: tuple) -> Image.Image:
    """A line per method, through its numbers of steps."""
    title, key, factor = plot
    values = [factor * row[key] for row in rows]
    margin = 0.05 * (max(values) - min(values)) or 1.0
    last = -(-max(map(_evaluations, rows)) // 5) * 5
    diagram = Diagram(title, 0, int(last), min(values) - margin, max(values) + margin, "evaluations per picture")
    for method, shade in colours.items():
        points = [(_evaluations(row), factor * row[key]) for row in rows if row["method"] == method]
        diagram.curve(points, shade, width=1, dots=True)
    return diagram.image
