"""Citations: every learner that a paper describes has its BibTeX, and the file names no other."""

import pytest

from meta_jax import citations, registry
from meta_jax.lookup import UsageError

WITHOUT_PAPER = {"kernel", "nearest_neighbour"}


def test_every_learner_has_a_paper_and_every_paper_a_learner():
    cited = {name for paper in citations.papers() for name in paper.learners}
    ours = {name for name in registry.names("learner") if ":" not in name}
    builtin = {
        name
        for name in ours
        if registry.find("learner", name).factory.__module__.startswith("meta_jax.")
    }
    assert cited == builtin - WITHOUT_PAPER


def test_entries_are_bibtex_with_keys_of_their_own():
    papers = citations.papers()
    assert len({paper.key for paper in papers}) == len(papers)
    for paper in papers:
        assert paper.bibtex.count("{") == paper.bibtex.count("}"), paper.key
        assert paper.bibtex.endswith("\n}"), paper.key
        for field in ("title", "author", "year"):
            assert f"\n  {field} = {{" in paper.bibtex, paper.key
        assert "learners" not in paper.bibtex


def test_a_method_of_several_papers_has_all_of_them():
    text = registry.cite("in_context")
    assert text.count("\n\n@") + 1 == 7
    assert "Conditional Neural Processes" in text


def test_an_unknown_learner_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"'mamml': there are papers of anil, .*maml"):
        registry.cite("mamml")
