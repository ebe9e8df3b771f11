"""From predictions to something that holds."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.models.passkey import PasskeyLikelihood
from saccade.tune.candidates import DENSE, Candidate
from saccade.tune.confirm import MARGIN, Retrieval, Search, make_choices, make_recipe
from saccade.tune.score import CandidateScore
from saccade.tune.search import Choices, evaluate, frontier


def answer(log_prob, nll=None, *, found=True):
    return PasskeyLikelihood(log_prob, found, nll)


KNOWN, LOST = answer(-0.5, 2.0), answer(-1.5, found=False)
WRONG = Retrieval([64], [LOST], [KNOWN])


def rises(rise):
    """The right answer to the one question, and the text worse by `rise`."""
    return Retrieval([64], [answer(-0.5, 2.0 + math.log1p(rise))], [KNOWN])


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
    search = Search(choices, 0.01, lambda a: rises(slope * a.damage))
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
        Search(choices, 0.01, lambda a: rises(0.5 * a.damage)).run(tries, lambda note: None) for tries in (1, 5)
    )
    assert many.seconds <= few.seconds


def test_lost_pass_keys_make_it_back_off():
    choices = ladder_choices()

    def retrieve(assignment):
        return WRONG if assignment.damage > 0.02 else rises(0.01 * assignment.damage)

    search = Search(choices, 0.5, retrieve)
    best = search.run(6, lambda note: None)
    assert 0 < best.damage <= 0.02
    lost = [trial for trial in search.trials if not trial.holds]
    assert lost
    assert all(trial.passkey == "0/1, dense 1/1, loses 1.00 nats" and trial.rise is None for trial in lost)


def test_the_search_goes_between_what_held_and_what_did_not():
    notes = []
    search = Search(ladder_choices(), 0.5, lambda a: WRONG if a.damage > 0.008 else rises(0.0))
    best = search.run(8, notes.append)
    held = [trial.damage for trial in search.trials if trial.holds]
    lost = [trial.damage for trial in search.trials if not trial.holds]
    assert held
    assert max(held) == best.damage <= 0.008 < min(lost)
    assert len(notes) == len(search.trials)
    assert notes[-1].endswith(f"attention {search.trials[-1].seconds:.1f} s")


def test_nothing_is_tried_that_would_save_next_to_nothing():
    choices = ladder_choices()
    saves_little = Choices(
        choices.candidates, choices.seconds[..., :1] * torch.tensor([1, 0.99, 0.99, 0.99, 0.99]), choices.damage
    )
    search = Search(saves_little, 0.01, lambda a: pytest.fail("asked"))
    assert search.run(3, lambda note: None).damage == 0


def test_nothing_holds_means_dense():
    search = Search(ladder_choices(), 1e-9, lambda a: WRONG)
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
    search = Search(slow, 0.01, lambda a: pytest.fail("asked"))
    best = search.run(3, lambda note: None)
    assert best.chosen.eq(0).all()
    assert search.trials == []
    assert search.kept is None


def test_retrieval_holds_only_if_every_length_does():
    dense = [answer(-0.5), answer(-0.4), answer(-3.0, found=False)]
    assert Retrieval([32, 64, 64], [answer(-0.55), answer(-0.45), answer(-3.1, found=False)], dense).holds
    fainter = Retrieval([32, 64, 64], [answer(-0.5), answer(-0.4), answer(-3.3, found=False)], dense)
    assert fainter.losses == pytest.approx({32: 0.0, 64: 0.15})
    assert not fainter.holds
    assert not Retrieval([32, 64, 64], [answer(-0.5, found=False), answer(-0.4), answer(-3.0)], dense).holds


def test_answers_of_one_length_after_another():
    none = Retrieval([], [], [])
    assert none.holds
    assert none.rise is None
    both = none.join(32, [answer(-0.5)], [answer(-0.5)]).join(64, [answer(-2.0, found=False)], [KNOWN])
    assert both.lengths == [32, 64]
    assert both.losses == pytest.approx({32: 0.0, 64: 1.5})
    assert not both.holds


def test_perplexity_is_that_of_the_text_that_was_scored():
    mine = [answer(0.0), answer(0.0, 2.3), answer(0.0, 2.1)]
    dense = [answer(0.0), answer(0.0, 2.0), answer(0.0, 2.0)]
    assert Retrieval([32, 64, 64], mine, dense).rise == pytest.approx(math.exp(0.2) - 1)


def test_the_search_goes_on_while_a_mixture_holds_and_the_next_would_save_time():
    search = Search(ladder_choices(), 0.5, lambda a: rises(0.0))
    best = search.run(8, lambda note: None)
    assert all(trial.holds for trial in search.trials)
    assert best.seconds == frontier(ladder_choices())[0].seconds
