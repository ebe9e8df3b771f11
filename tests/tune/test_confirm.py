"""From predictions to something that holds."""

from __future__ import annotations

import pytest
import torch

from saccade.tune.candidates import DENSE, Candidate
from saccade.tune.confirm import MARGIN, Retrieval, Search, make_choices, make_recipe
from saccade.tune.score import CandidateScore
from saccade.tune.search import Choices, evaluate

RIGHT = Retrieval([64], [(-0.5, True)], [(-0.5, True)])
WRONG = Retrieval([64], [(-1.5, False)], [(-0.5, True)])


def ladder_choices(layers=6, heads=4):
    """Four steps: half the time each, three times the damage each."""
    candidates = [Candidate(DENSE)] + [Candidate("sink_window", {"window": n}) for n in (512, 256, 128, 64)]
    seconds = torch.tensor([1.0, 0.5, 0.3, 0.2, 0.15], dtype=torch.float64).repeat(layers, heads, 1) / heads
    steps = torch.tensor([0.0, 1.0, 3.0, 9.0, 27.0], dtype=torch.float64)
    weight = torch.linspace(0.2, 2.0, layers * heads, dtype=torch.float64).view(layers, heads, 1)
    return Choices(candidates, seconds, 1e-3 * steps * weight)


@pytest.mark.parametrize("slope", [0.02, 0.2, 2.0])
def test_what_is_kept_held(slope):
    choices = ladder_choices()
    search = Search(choices, 0.01, lambda a: slope * a.damage, lambda a: RIGHT)
    best = search.run(4, lambda note: None)
    assert slope * best.damage <= MARGIN * 0.01
    assert best.seconds <= float(choices.seconds[..., 0].sum())
    assert (search.kept is not None) == (best.damage > 0)
    if search.kept is not None:
        assert search.kept.holds
        assert search.kept.passkey == "1/1, dense 1/1, loses 0.00 nats"


def test_more_tries_do_not_make_it_slower():
    choices = ladder_choices()
    few, many = (
        Search(choices, 0.01, lambda a: 0.5 * a.damage, lambda a: RIGHT).run(tries, lambda note: None)
        for tries in (1, 5)
    )
    assert many.seconds <= few.seconds


def test_lost_pass_keys_make_it_back_off():
    choices = ladder_choices()

    def retrieve(assignment):
        return WRONG if assignment.damage > 0.02 else RIGHT

    search = Search(choices, 0.5, lambda a: 0.01 * a.damage, retrieve)
    best = search.run(6, lambda note: None)
    assert best.damage <= 0.02
    assert any(trial.passkey == "0/1, dense 1/1, loses 1.00 nats" for trial in search.trials if not trial.holds)


def test_nothing_holds_means_dense():
    search = Search(ladder_choices(), 1e-9, lambda a: 1.0, lambda a: WRONG)
    best = search.run(3, lambda note: None)
    assert best.damage == 0
    assert best.chosen.eq(0).all()


def test_steady_candidates_get_their_median_time():
    def score(seconds, density):
        return CandidateScore(seconds, 0.0, [density] * 2, [0.0] * 2, [0.0] * 2)

    rows = {f"layer{n}": [score(1.0, 1.0), score(s, 0.25), score(s, d)]
            for n, (s, d) in enumerate([(0.2, 0.1), (0.9, 0.6), (0.3, 0.2)])}  # fmt: skip
    candidates = [
        Candidate(DENSE), Candidate("sink_window", {"window": 8}), Candidate("xattention", {"threshold": 0.9}),
    ]  # fmt: skip
    choices = make_choices(candidates, rows)
    assert choices.seconds.sum(1)[:, 1].tolist() == pytest.approx([0.3, 0.3, 0.3])
    assert choices.seconds.sum(1)[:, 2].tolist() == pytest.approx([0.2, 0.9, 0.3])


def test_a_layers_time_is_shared_out_by_density():
    adaptive = CandidateScore(0.5, 0.1, [0.6, 0.2], [0.0] * 2, [0.0] * 2)
    rows = {"layer": [CandidateScore(1.0, 0.0, [1.0] * 2, [0.0] * 2, [0.0] * 2), adaptive]}
    choices = make_choices([Candidate(DENSE), Candidate("xattention", {})], rows)
    assert choices.seconds[0, :, 0].tolist() == pytest.approx([0.5, 0.5])
    assert choices.seconds[0, :, 1].tolist() == pytest.approx([0.05 + 0.3, 0.05 + 0.1])


def test_recipe_groups_heads(byte_model):
    model, _ = byte_model
    candidates = [Candidate(DENSE), Candidate("sink_window", {"window": 64})]
    damage = torch.zeros(2, 4, 2, dtype=torch.float64)
    choices = Choices(candidates, torch.tensor([1.0, 0.1], dtype=torch.float64).repeat(2, 4, 1), damage)
    assignment = evaluate(choices, torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]]))
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    recipe = make_recipe(model, names, assignment, candidates, {}, {candidates[1].key: 512})
    first, second = (recipe.layers[name].prefill for name in names)
    assert [(c.heads, c.mechanism) for c in first] == [((0, 2), "dense"), ((1, 3), "sink_window")]
    assert (second[0].heads, second[0].min_tokens) == ("all", 512)
    assert recipe.layers[names[0]].decode[0].mechanism == "dense"


def test_where_nothing_is_faster_nothing_is_measured():
    choices = ladder_choices()
    slow = Choices(choices.candidates, torch.full_like(choices.seconds, 1.0), choices.damage)
    search = Search(slow, 0.01, lambda a: pytest.fail("measured"), lambda a: pytest.fail("asked"))
    best = search.run(3, lambda note: None)
    assert best.chosen.eq(0).all()
    assert search.trials == []
    assert search.kept is None


def test_retrieval_holds_only_if_every_length_does():
    dense = [(-0.5, True), (-0.4, True), (-3.0, False)]
    assert Retrieval([32, 64, 64], [(-0.55, True), (-0.45, True), (-3.1, False)], dense).holds
    fainter = Retrieval([32, 64, 64], [(-0.5, True), (-0.4, True), (-3.3, False)], dense)
    assert fainter.losses == pytest.approx({32: 0.0, 64: 0.15})
    assert not fainter.holds
    assert not Retrieval([32, 64, 64], [(-0.5, False), (-0.4, True), (-3.0, True)], dense).holds
