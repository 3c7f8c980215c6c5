"""Tables that are made from the records at every build: nobody types a result in."""

from collections.abc import Mapping
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import meta_jax
from experiments import benchmark_costs, ledger
from experiments.benchmark_costs import Cost
from meta_jax import citations, registry
from meta_jax.lookup import UsageError

_FAMILIES = {
    "metric_based": "metric-based",
    "model_based": "model-based",
    "optimization_based": "optimization-based",
    "reinforcement": "reinforcement learning",
}
_SETTINGS = {"5w1s": "5-way 1-shot", "5w5s": "5-way 5-shot", "20w1s": "20-way 1-shot"}
_SETTINGS["20w5s"] = "20-way 5-shot"


def methods() -> str:
    """All learners of the library, family by family, as a Markdown table."""
    lines = ["| `--learner` | in Python | family | |", "|---|---|---|---|"]
    for name in registry.names("learner"):
        found = registry.find("learner", name)
        package, floor, *_ = found.factory.__module__.split(".")
        if package != meta_jax.__name__:  # somebody's own, such as the examples of extensions
            continue
        family = _FAMILIES[floor]
        python = _public_name(found.factory)
        lines.append(f"| `{name}` | {{py:obj}}`~{python}` | {family} | {registry.summary(found)} |")
    return "\n".join(lines)


def _public_name(factory: object) -> str:
    """The public name of a registered factory."""
    spaces = {"meta_jax": meta_jax, "meta_jax.reinforcement": meta_jax.reinforcement}
    for space, module in spaces.items():
        for name in module.__all__:
            if getattr(module, name) is factory:
                return f"{space}.{name}"
    raise UsageError(f"{factory} is registered but not public: list it in a namespace")


def accuracies(rows: list[dict]) -> str:
    """Accuracies on Omniglot by method and setting, the best one first, as a Markdown table."""
    by_method: dict[str, dict[str, dict]] = {}
    for row in rows:
        method, _, test = row["row"].partition("/omniglot_")
        if row["metric"] == "accuracy" and test in _SETTINGS:
            by_method.setdefault(method, {})[test] = row
    best = sorted(by_method, key=lambda name: -_score(by_method[name].get("5w1s")))
    head = ["method", *_SETTINGS.values(), "queries", "training"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in best:
        found = by_method[method]
        cells = [_accuracy(found.get(test)) for test in _SETTINGS]
        any_row = next(iter(found.values()))
        together = "together" if any_row["transductive"] else "one by one"
        lines.append(
            f"| `{method}` | {' | '.join(cells)} | {together} | "
            f"{any_row['train_minutes']:.0f} min |"
        )
    return "\n".join(lines)


def costs(rows: list[dict], measured: Mapping[str, Cost]) -> str:
    """What methods cost on 5-way 1-shot tasks, the quickest to answer first, as Markdown.

    Args:
      rows: Rows of the ledger.
      measured: Costs by the name of the weights.
    """
    head = ["method", "accuracy, %", "training, min", "memory, MiB", "adapting, ms", "query, ms"]
    found = {}
    for row in rows:
        method, _, test = row["row"].partition("/omniglot_")
        cost = measured.get(Path(row["weights"]).name)
        if test == "5w1s" and cost is not None:
            cells = [f"{row['value']:.1f}", f"{row['train_minutes']:.0f}", f"{cost.memory_mib:.1f}"]
            cells += [f"{cost.adapt_ms:.3g}", f"{cost.query_ms:.2g}"]
            found[f"| `{method}` | {' | '.join(cells)} |"] = cost.adapt_ms + 75 * cost.query_ms
    lines = sorted(found, key=found.__getitem__)
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def _score(row: dict | None) -> float:
    return -1.0 if row is None else row["value"]


def _accuracy(row: dict | None) -> str:
    return "" if row is None else f"{row['value']:.1f} ± {row['ci95']:.1f}"


def bibliography() -> str:
    """The BibTeX of every paper, under the learners that it describes."""
    parts = []
    for paper in citations.papers():
        names = ", ".join(f"`{name}`" for name in paper.learners)
        parts.append(f"{names}:\n\n```bibtex\n{paper.bibtex}\n```")
    return "\n\n".join(parts)


class Table(SphinxDirective):
    """`{table-of} NAME`: a table of this file by its name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parses the table's Markdown."""
        papers = Path(citations.__file__).with_name("papers.bib")
        for path in (ledger.LEDGER, benchmark_costs.COSTS, papers):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(TABLES[self.arguments[0]]())


def _accuracies() -> str:
    return accuracies(ledger.read())


def _costs() -> str:
    return costs(ledger.read(), benchmark_costs.read())


TABLES = {
    "methods": methods,
    "accuracies": _accuracies,
    "costs": _costs,
    "bibliography": bibliography,
}


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("table-of", Table)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
