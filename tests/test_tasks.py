"""What the study can do besides: prompts with an end, comparisons, more than one process."""

import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import gpt
import ppo
import reward
import sample
import train
import what_matters
from conftest import TOY, argv, assert_close, content, explains, randn, run_script
from gpt import PAD

# ---- prompts ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def continued(study, texts, tmp_path_factory):
    """The folder of a study that continues speeches, from comparisons."""
    out = shutil.copytree(study, tmp_path_factory.mktemp("continued") / "out")
    options = ["--task", "continue", "--reward", "comparisons", "--algorithm", "rloo"]
    # At this rate the policy is seen to change.
    arguments = argv(texts, out, *options, "--lr", 0.01, "--max-update-kl", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "MIN_ESS", 0)        # J* is logged though few samples know it
        assert run_script(train, *arguments) == 0
    return out


def state_of(folder, name):
    return data.load_checkpoint(folder / f"{name}.pt")


def test_prompts_are_openings_of_speeches_that_go_on(continued, texts):
    """The blank line, a speaker's name and one or two whole lines; more of the speech follows."""
    tokenizer = data.load_tokenizer(continued / "tokenizer.tiktoken")
    prompts = state_of(continued, "rho")["prompts"]
    play = data.load_corpus(texts / "play.txt")[0]
    assert len(prompts) == TOY["prompts"] and prompts.size(1) <= train.LONGEST_PROMPT
    lengths, lines = set(), set()
    for row in prompts.tolist():
        ids = [i for i in row if i != PAD]
        assert row == [PAD] * (len(row) - len(ids)) + ids, "padding stands on the left"
        text = data.decode(tokenizer, row)
        assert re.fullmatch(r"\n\n[A-Z ]+\.\n([^\n]+\n){1,2}", text), repr(text)
        assert any(play[found.end()] != "\n" for found in re.finditer(re.escape(text), play)), text
        lengths.add(len(ids))
        lines.add(text.count("\n"))
    assert len(lengths) > 2 and lines == {4, 5}, "they should differ in length"


def test_completions_end_where_speeches_do_and_each_prompt_has_its_share(continued):
    """512 samples of rho for 16 prompts are 32 each; after the end nothing is left."""
    rho, run = state_of(continued, "rho"), state_of(continued, "ppo_beta2")
    assert rho["tokens"].shape == (512, 16) and run["fresh"]["tokens"].shape == (128, 16)
    for tokens in (rho["tokens"], run["fresh"]["tokens"]):
        ended = 0
        for row in tokens.tolist():
            n = row.index(rho["end"]) + 1 if rho["end"] in row else 16
            assert PAD not in row[:n] and set(row[n:]) <= {PAD}, row
            ended += n < 16
        assert 0 < ended < len(tokens), "some should end early and some not"
    # log pi - log rho of each, after the prompt at its place and of its real tokens.
    models = [gpt.load_gpt(state) for state in (run, state_of(continued, "pretrain"))]
    for tokens, found in ((rho["tokens"], run["rho_log_ratio"]),
                          (run["fresh"]["tokens"], run["fresh"]["log_ratio"])):
        tokens, prompts = tokens.long(), train.repeat(rho["prompts"], len(tokens))
        with torch.no_grad():
            policy, ref = (ppo.token_logprobs(gpt.completion_logits(model, prompts, tokens), tokens)
                           for model in models)
        expected = ((policy - ref) * (tokens != PAD)).sum(1)
        assert_close(found, expected, "log pi - log rho", atol=0.15, rtol=0)
        assert expected.std() > 0.3, "too little drift to see"
    assert_close(run["fresh"]["exact_kl"].mean().item(), run["fresh"]["log_ratio"].mean().item(),
                 "two estimates of the same KL", atol=0.3, rtol=0)


def test_values_are_warmed_up_on_real_tokens_of_every_prompt(continued, monkeypatch):
    """rho's samples, as many of each prompt; at every token the score is still to come."""
    rho, pretrained, rewarded = (state_of(continued, x) for x in ("rho", "pretrain", "reward"))
    args, seen = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, length=16,
                                 toward="positive"), {}

    def spy(self, features, returns, mask):
        seen.update(features=features, returns=returns, mask=mask)

    monkeypatch.setattr(ppo.ValueFunction, "fit", spy)
    config = ppo.PPOConfig(length=16)
    run, model = train.make_run(args, config, 0, pretrained, rewarded, rho)
    tokens = rho["tokens"].long()
    scores = reward.score(model(tokens), **rho["constants"]["reward"]["positive"])
    assert torch.equal(seen["mask"], tokens != PAD), "what is no token has no value"
    assert_close(seen["returns"], scores[:, None].expand(512, 16), "the score at every token")
    prompts = train.repeat(rho["prompts"], 512)
    assert_close(seen["features"], run.read(prompts, tokens)["features"], "of these prompts",
                 atol=1e-4, rtol=0)


def test_rho_is_given_the_prompts_that_its_policies_are(continued, monkeypatch, capsys):
    """So that what a reader compares are answers to the same, up to the same end."""
    ends, cut_after = [], sample.cut_after
    monkeypatch.setattr(sample, "cut_after",
                        lambda tokens, end: ends.append(end) or cut_after(tokens, end))
    arguments = ["--checkpoint", continued / "ppo_beta2.pt", "--compare", "--jsonl", "--num", 6]
    assert run_script(sample, *arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = data.load_tokenizer(continued / "tokenizer.tiktoken")
    given = [data.decode(tokenizer, row).strip("\n") + "\n"
             for row in state_of(continued, "rho")["prompts"].tolist()]
    for row in rows:
        assert any(row["text"].startswith(prompt) for prompt in given), row
    assert ends == 2 * [state_of(continued, "rho")["end"]]
    assert {row["model"] for row in rows} == {"pretrain", "ppo_beta2"} and len(rows) == 12


def test_the_optimum_that_is_logged_is_the_mean_over_prompts(continued):
    """beta log of the mean of exp(r / beta) over the 32 samples of rho for each of 16 prompts."""
    rho = state_of(continued, "rho")
    assert train.repeat(torch.tensor([[1], [2]]), 4).flatten().tolist() == [1, 1, 2, 2]
    scores = reward.score(rho["log_odds"]["reward"], **rho["constants"]["reward"]["positive"])
    each = [2 * math.log(group.div(2).exp().mean()) for group in scores.split(32)]
    found = state_of(continued, "ppo_beta2")["history"][0]["optimum"]
    assert_close(found, sum(each) / 16, "J*", atol=1e-4, rtol=0)


def test_too_few_speeches_and_options_that_do_not_fit_are_explained(texts, tmp_path, command):
    """One line each, before anything is trained."""
    (tmp_path / "play.txt").write_text("A line of prose, and no speech at all.\n" * 900)
    few = argv(texts, tmp_path / "out", "--task", "continue", "--corpus", tmp_path / "play.txt",
               "--vocab-size", 260)
    explains(command(train, *few), "openings of speeches to continue")
    explains(command(train, *argv(texts, tmp_path, "--task", "continue", "--per-prompt", 5)),
             "must be a multiple of --per-prompt 5")
    explains(command(train, *argv(texts, tmp_path, "--task", "continue", "--length", 60)), "to 48")
    explains(command(train, *argv(texts, tmp_path, "--algorithm", "rloo", "--per-prompt", 1)),
             "must be 2 or more")


def test_the_optimum_of_several_prompts_is_the_mean_of_theirs():
    """J*, its score and drift; standard errors of independent estimates; samples add up."""
    scores, weights, beta = randn(5, 400), randn(5, 400, seed=1) / 3, 0.4
    found = ppo.optimum(scores, beta, weights)
    each = [ppo.optimum(*row[:1], beta, row[1]) for row in zip(scores, weights)]
    for key in ("objective", "score", "ref_kl"):
        assert_close(found[key], sum(x[key] for x in each) / 5, key)
    assert_close(found["ess"], min(x["ess"] for x in each), "of the prompt that has fewest")
    assert_close(found["objective_se"], math.hypot(*(x["objective_se"] for x in each)) / 5, "error")
    best = [ppo.best_of_n(row, 16)[0] for row in scores]
    assert_close(ppo.best_of_n(scores, 16)[0], sum(best) / 5, "best of 16")


def test_the_bound_of_several_prompts_holds_as_often_as_it_says():
    """1,000 pools of 12 samples for each of 3 prompts: above the true J* in at most 5 %.

    r is -log of an exponential's quantile, so E[exp(r)] = 2, and of rho's samples weights are 0.
    """
    generator, above = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        # P(u) = 2 u on 0 to 1 gives E[1 / u] = 2, with a tail of infinite variance.
        u = torch.rand(3, 12, generator=generator, dtype=torch.float64).sqrt()
        bound = ppo.optimum_bound(-u.log(), 1.0, torch.zeros(3, 12))
        above += bound > math.log(2)
        mean = (1 / u).mean(1).log().mean().item()
        assert_close(bound, mean - math.log(20) / 3, "the bound's closed form")
    assert above <= 50, f"{above} of 1,000 bounds were above what they bound"


# ---- comparisons --------------------------------------------------------------------------

def test_comparison_loss_is_bradley_terrys():
    """Over the pairs of its rounds, by hand; ties cost nothing, and a constant changes nothing."""
    r, targets = randn(30), torch.randint(5, (30,)) / 4
    expected = torch.zeros(30, dtype=torch.float64)
    for seed in range(3):
        other = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()
        for i, j in enumerate(other):
            if targets[i] != targets[j]:
                better, worse = (i, j) if targets[i] > targets[j] else (j, i)
                expected[i] += math.log1p(math.exp(r[worse] - r[better])) / 3
    found = reward.comparison_loss(r, targets, rounds=3)
    assert_close(found, expected, "-log sigmoid(r(better) - r(worse))")
    assert_close(reward.comparison_loss(r + 7, targets, rounds=3), found, "a constant cancels")
    assert reward.comparison_loss(r, torch.full((30,), 0.25)).abs().sum() == 0, "ties are left out"


def test_a_bag_fitted_to_comparisons_orders_passages_and_has_the_ratings_mean():
    """Of words worth 2, 0, -2 it learns the order; its bias comes from the ratings."""
    vocabulary = [b" love", b" sea", b" death", b" my"]
    tokens = torch.tensor([[i, 3] for i in (0, 1, 2)] * 40)
    targets = torch.tensor([0.9, 0.5, 0.3] * 40)
    bag = reward.Bag(vocabulary).fit(tokens, targets, torch.ones(120), {}, 0.5, 0.5,
                                     loss=reward.comparison_loss)
    love, sea, death = bag(tokens[:3])[:, -1].tolist()
    assert love > sea + 0.5 and sea > death + 0.5, "the order is not learnt"
    p = bag(tokens)[:, -1].sigmoid()
    assert_close(p.mean(), targets.mean(), "P(positive) on average", atol=0.02, rtol=0)


def test_pair_accuracy_is_the_share_of_pairs_in_order():
    """Of two passages of different ratings the better has the higher p; a tie is half."""
    ratings, p = torch.tensor([2.0, 1.0, 1.0, -1.0, 0.0]), torch.tensor([0.7, 0.8, 0.4, 0.4, 0.1])
    wins = [1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0
            for i, j in itertools.permutations(range(5), 2) if ratings[i] > ratings[j]]
    found = reward.rating_metrics(p, ratings)["pair_accuracy"]
    assert_close(found, sum(wins) / len(wins), "pair accuracy")


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_the_calibration_slope_of_stretched_log_odds_is_known(k):
    """Log-odds k times too far from 0 have slope 1 / k; calibrate makes it 1."""
    log_odds = randn(2000)
    targets = log_odds.sigmoid()
    assert_close(reward.calibration_slope(k * log_odds, targets).item(), 1 / k, "slope", atol=1e-3,
                 rtol=0)


def test_the_reward_model_learns_what_it_is_asked_to(continued, study):
    """Comparisons for the reward model; the judge, another kind, is the same for both."""
    assert content(continued / "judge.pt") == content(study / "judge.pt")
    states = [state_of(folder, "reward") for folder in (study, continued)]
    one, two = (state["model"]["bag.weight"] for state in states)
    assert states[0]["names"] == states[1]["names"] and not torch.equal(one, two)
    agree = torch.corrcoef(torch.stack((one, two)))[0, 1]
    assert agree > 0.8, f"the same words should please both: {agree:.2f}"


# ---- several processes --------------------------------------------------------------------

def work(rank, processes, port, arguments, log, die_at):
    """One of the processes that torchrun would start; it kills itself at PPO's step die_at."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                   "TORCHELASTIC_RUN_ID": "a test",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(f"{log}{rank}.out", "w"), open(f"{log}{rank}.err", "w")
    step = ppo.PPO.step

    def fatal(self, i):
        if i == die_at and rank == processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, i)

    ppo.PPO.step = fatal
    code = run_script(train, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for the others, as a process that ends does.
    os._exit(code)


def together(arguments, folder, processes=2, die_at=None):
    """Run train.py in processes that share the work: their exit codes, their errors."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "sample", "torch._dynamo"])
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = [server.Process(target=work, args=(i, processes, port, arguments, folder / "log",
                                                 die_at)) for i in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return ([process.exitcode for process in started],
            [Path(f"{folder / 'log'}{i}.err").read_text() for i in range(processes)])


needs_fork = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                                reason="this machine cannot fork")


@needs_fork
def test_two_processes_do_what_one_does(study, texts, tmp_path):
    """The same samples, losses and gradients within rounding: only sums are made in another order.

    Pretraining from the start, and PPO of texts that end. Process 0 alone speaks.
    """
    arguments = argv(texts, tmp_path / "new", "--until", "pretrain", "--fp32")
    assert together(arguments, tmp_path / "a") == ([0, 0], ["", ""])
    alone = argv(texts, tmp_path / "alone", "--until", "pretrain", "--fp32")
    assert run_script(train, *alone) == 0
    one, two = (state_of(tmp_path / name, "pretrain")["history"] for name in ("alone", "new"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert_close([row["loss"] for row in two], [row["loss"] for row in one], "losses", atol=2e-3,
                 rtol=0)
    assert (tmp_path / "a" / "log1.out").read_text() == ""

    one = ["--until", "ppo", "--fp32", "--beta", 0.5, "--iterations", 2, "--task", "continue"]
    shutil.copytree(tmp_path / "alone", tmp_path / "both")
    assert run_script(train, *argv(texts, tmp_path / "alone", *one)) == 0
    for name in ("reward", "judge", "rho"):
        shutil.copy(tmp_path / "alone" / f"{name}.pt", tmp_path / "both")
    assert together(argv(texts, tmp_path / "both", *one), tmp_path / "b") == ([0, 0], ["", ""])
    runs = [state_of(tmp_path / name, "ppo_beta0.5") for name in ("alone", "both")]
    rows, others = (run["history"] for run in runs)
    # The first rollout is rho's, so it is the same to the last token.
    for key in ("score", "judge", "distinct_2", "policy_loss", "approx_kl", "grad_norm",
                "value_loss"):
        assert_close(others[0][key], rows[0][key], key, atol=1e-4, rtol=1e-3)
    weights = [run["model"]["lm_head.weight"] for run in runs]
    start = state_of(tmp_path / "alone", "pretrain")["model"]["lm_head.weight"]
    moved = (weights[0] - start).norm()
    assert (weights[1] - weights[0]).norm() < 0.2 * moved, "the updates differ"


@needs_fork
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(study, texts, tmp_path):
    """One line; then the same bits as two processes that nothing befell."""
    arguments = ["--until", "ppo", "--checkpoint-every", 0, "--beta", 0.25]
    for name in ("killed", "whole"):
        shutil.copytree(study, tmp_path / name)
    assert together(argv(texts, tmp_path / "whole", *arguments), tmp_path / "w")[0] == [0, 0]
    codes, errors = together(argv(texts, tmp_path / "killed", *arguments), tmp_path / "k", die_at=2)
    assert codes == [2, -signal.SIGKILL]
    assert errors[0] == ("stopped: another process of this run has ended. To go on from the last "
                         "checkpoint, run the same command again.\n")
    assert together(argv(texts, tmp_path / "killed", *arguments), tmp_path / "k")[0] == [0, 0]
    assert "going on after step 2" in (tmp_path / "k" / "log0.out").read_text()
    found, whole = (content(tmp_path / name / "ppo_beta0.25.pt") for name in ("killed", "whole"))
    assert found == whole, "the bits differ"


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_hold_every_row_once(processes, monkeypatch):
    """In order, and as even as can be."""
    monkeypatch.setattr(gpt.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gpt.dist, "get_world_size", lambda: processes)
    for n in (5, 16, 17):
        rows = []
        for rank in range(processes):
            monkeypatch.setattr(gpt.dist, "get_rank", lambda rank=rank: rank)
            part = gpt.share(n)
            assert abs(part.stop - part.start - n / processes) < 1
            rows += range(n)[part]
        assert rows == list(range(n))


# ---- the measuring scripts ----------------------------------------------------------------------

def test_what_matters_changes_one_thing_at_a_time_and_keeps_its_rows(study, tmp_path, monkeypatch,
                                                                     command):
    """Every change runs, on a study of its own length; what is kept is not run again."""
    monkeypatch.setattr(what_matters, "KEPT", tmp_path / "kept.csv")
    monkeypatch.setattr(ppo, "MIN_ESS", 10)
    right, seen = (ppo.kl_penalised_rewards, ppo.whiten), []
    step = ppo.PPO.step
    monkeypatch.setattr(ppo.PPO, "step", lambda run, i: seen.append(run) or step(run, i))
    arguments = ["--study", study, "--beta", 2, "--iterations", 1, "--batch", 8, "--seeds", 1]
    code, said, errors = command(what_matters, *arguments)
    assert code == 0, errors
    rows = list(csv.DictReader((tmp_path / "kept.csv").read_text().splitlines()))
    assert [row["change"] for row in rows] == list(what_matters.CHANGES) and len(seen) == len(rows)
    assert (ppo.kl_penalised_rewards, ppo.whiten) == right, "what was changed stays changed"
    runs = dict(zip(what_matters.CHANGES, seen))
    assert {run.config.length for run in seen} == {16}
    assert runs["twice the batch"].config.batch == 16 and runs["lambda 1"].config.lam == 1
    assert_close(runs["learning rate / 2"].config.lr, runs["default"].config.lr / 2, "half")
    assert runs["Adam's epsilon 1e-5"].optimizer.param_groups[0]["eps"] == 1e-5
    assert runs["default"].optimizer.param_groups[0]["eps"] == 1e-3, "the shipped one"
    # The values that the batch was read with: 0 but where they were warmed up.
    assert not runs["values start at 0"].batch["values"].any()
    assert runs["default"].batch["values"].any()
    assert command(what_matters, *arguments)[0] == 0 and len(seen) == len(rows), "run once more"
    explains(command(what_matters, *arguments, "--beta", 3), "no run at beta 3")
