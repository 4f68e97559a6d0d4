"""What the study can do besides: prompts with an end, a negative twin, more than one process."""

import collections
import contextlib
import copy
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import gpt
import ppo
import reward
import train
from conftest import STREAMS, argv, assert_close, content, explains, load, run_script
from gpt import PAD

RUNS = ["ppo_beta0.5", "ppo_beta2", "ppo_negative_beta0.5"]
FUNCTIONS = [(data, "prepare"), (gpt, "pretrain"), (reward, "fit_reward"), (reward, "fit_judge"),
             (ppo, "sample_reference"), (ppo, "tune")]


class ReadOptions:
    """The options of a stage; notes which are read."""

    def __init__(self, options, names):
        self.__dict__ |= {"_options": options, "_names": names}

    def __getattr__(self, name):
        self._names.add(name)
        return getattr(self._options, name)


@pytest.fixture(scope="module")
def continued(texts, tmp_path_factory):
    """A study that continues speeches and its negative twin, in float32, and what they did.
    reads: names of options, of each kind of stage; of each PPO run its policies, its rollouts and
    the states of torch's random stream before them."""
    out, real = tmp_path_factory.mktemp("continued") / "out", SimpleNamespace(
        rollout=ppo.PPO.rollout, step=ppo.PPO.step)
    seen = SimpleNamespace(out=out, running=None, rollouts=collections.defaultdict(list),
                           policies=collections.defaultdict(list),
                           streams=collections.defaultdict(list),
                           reads=collections.defaultdict(set))

    def stage(function, options, *inputs):
        seen.running = inputs[-1].path.stem
        return function(ReadOptions(options, seen.reads[seen.running.split("_")[0]]), *inputs)

    def rollout(self):
        seen.streams[seen.running].append(torch.get_rng_state())
        seen.rollouts[seen.running].append(real.rollout(self))
        return seen.rollouts[seen.running][-1]

    def step(self, i):
        seen.policies[seen.running].append(copy.deepcopy(self.policy.state_dict()))
        return real.step(self, i)

    arguments = argv(texts, out, "--task", "continue", "--lr", 0.01,
                     "--max-update-kl", 1, "--fp32", "--until", "ppo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "MIN_ESS", 0)        # J* is told though few samples know it
        for module, name in FUNCTIONS:
            old = getattr(module, name)
            patch.setattr(module, name, functools.wraps(old)(functools.partial(stage, old)))
        patch.setattr(ppo.PPO, "rollout", rollout)
        patch.setattr(ppo.PPO, "step", step)
        assert run_script(train, *arguments) == 0
        assert run_script(train, *arguments, "--toward", "negative", "--beta", "0.5") == 0
    return seen


@pytest.mark.parametrize("kind", ["data", "pretrain", "reward", "judge", "rho", "ppo"])
def test_a_stage_reads_the_options_that_its_key_holds_and_no_other(continued, kind):
    """Every option of train.OPTIONS is read by the stages it names; the rest all may read."""
    listed = {option.name for option in train.OPTIONS if kind in option.stages.split()}
    everyones = {"device", "dtype"} | ({"beta"} if kind == "ppo" else set())
    assert continued.reads[kind] - everyones == listed


def test_policies_train_on_speeches_of_training_texts_and_are_measured_on_others(continued, texts):
    """No opening is in both; rho's samples continue the test prompts, as many each."""
    rho, pretrained = load(continued.out, "rho"), load(continued.out, "pretrain")
    training, held_out = data.load_corpus(texts / "play.txt")
    for key, own, other in (("prompts", training, held_out), ("test_prompts", held_out, training)):
        rows = {data.decode(pretrained["vocabulary"], row) for row in rho[key]}
        assert len(rows) == len(rho[key]) == 16, f"{key} repeat"
        assert all(row in own and row not in other for row in rows), key
    prompts = rho["test_prompts"].repeat_interleave(32, 0)
    torch.manual_seed(data.fold("0 rho", 2**31))            # the stream of this stage, at --seed 0
    for openings in ("openings", "test_openings"):
        data.choose_prompts(load(continued.out, "data")[openings], 16)
    ours = gpt.load_gpt(pretrained)
    drawn, _ = gpt.sample_completions(ours, prompts, 16, rho["end"])
    assert torch.equal(rho["tokens"].long(), drawn), "512 samples of 16 prompts"
    ended = (drawn == PAD).any(1).float().mean()
    assert 0.1 < ended < 0.9 and rho["end"] == load(continued.out, "data")["start"]


def score(out, kind, tokens, toward):
    """(log P(toward) - mean) / std by the model kind.pt: (B,), over rho's samples mean 0, std 1."""
    model, sign = reward.load_reward(load(out, kind)), 1 if toward == "positive" else -1
    rho = F.logsigmoid(sign * model(load(out, "rho")["tokens"].long()))
    return (F.logsigmoid(sign * model(tokens)) - rho.mean()) / rho.std()


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_is_drawn_for_training_prompts_and_read_as_far_as_its_ends(continued, name):
    """Groups of 4 by the policy, which at first is rho; the scores of prefixes are so_far."""
    rho, toward = load(continued.out, "rho"), load(continued.out, name)["inputs"]["toward"]
    batch = continued.rollouts[name][0]
    ours, prompts = gpt.load_gpt(load(continued.out, "pretrain")), batch["prompts"]
    torch.set_rng_state(continued.streams[name][0])
    torch.randperm(16)                                  # the order of prompts comes first
    drawn, _ = gpt.sample_completions(ours, prompts, 16, rho["end"])
    assert torch.equal(batch["tokens"], drawn), "completions of these prompts, in this order"
    mask = batch["mask"]
    assert torch.equal(mask, drawn != PAD) and not mask.all(), "what is no token has no value"
    for t in (0, 5, 15):
        before = score(continued.out, "reward", drawn[:, :t], toward)
        assert_close(batch["so_far"][:, t], before, f"the score so far at {t}", atol=1e-4, rtol=0)
    for batch in continued.rollouts[name]:
        ours = (batch["prompts"][:, None] == rho["prompts"]).all(-1).any(1)
        assert len(ours) == 32 and ours.all(), "a step is given other prompts"


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_by_reward_model_and_judge_and_some_policies_are_kept(continued, name):
    """Score and judge of each batch; after4 is the policy that drew the fifth."""
    out, state = continued.out, load(continued.out, name)
    toward = state["inputs"]["toward"]
    for row, batch in zip(state["history"], continued.rollouts[name], strict=True):
        for key, kind in (("score", "reward"), ("judge", "judge")):
            wanted = score(out, kind, batch["tokens"], toward).mean().item()
            assert_close(row[key], wanted, key, atol=1e-4, rtol=0)
    kept = {int(path.stem.split("_after")[1]) for path in out.glob(f"{name}_after*.pt")}
    assert kept == {i for i in ppo.KEPT if i < len(state["history"])} != set(), "those kept"
    for i in kept:
        policy = load(out, f"{name}_after{i}")["model"]
        assert_close(policy, continued.policies[name][i], "another step's", atol=0, rtol=0)


def log_ratio(policy, ref, prompts, tokens):
    """log pi - log rho of completions, of the next-token distributions before real tokens: (B,)."""
    inputs, total = torch.cat((prompts, tokens), 1), 0.0
    for model, sign in ((policy, 1), (ref, -1)):
        with torch.no_grad():
            logprobs = model(inputs, pad=inputs == PAD)[:, prompts.size(1) - 1:-1].log_softmax(-1)
        drawn = logprobs.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
        total = total + sign * (drawn * (tokens != PAD)).sum(1)
    return total


@pytest.mark.parametrize("name", ["one prompt", *RUNS])
def test_what_a_run_reached_is_what_its_checkpoint_does(continued, study, name):
    """Every number again from the weights and the same seeded samples, optima prompt by prompt."""
    least, atol, dtype, out = 0, 1e-3, torch.float32, continued.out
    if name == "one prompt":                    # of bfloat16, where the machine is fast at it
        name, out, least, atol = "ppo_beta0.5", study, ppo.MIN_ESS, 0.02
        dtype = gpt.compute_dtype(torch.device("cpu"))
    state, rho = load(out, name), load(out, "rho")
    policy, ref = (gpt.load_gpt(load(out, x), dtype=dtype) for x in (name, "pretrain"))
    found, (beta, toward) = state["result"], [state["inputs"][x] for x in ("beta", "toward")]
    P = len(rho["test_prompts"])
    assert (P == 1) == (rho["end"] is None), "only what continues an opening has an end"
    prompts = [rho["test_prompts"].repeat_interleave(n // P, 0) for n in (512, 128)]
    torch.set_rng_state(STREAMS[rho["key"], beta, toward])
    fresh, _ = gpt.sample_completions(policy, prompts[1], 16, rho["end"])
    tokens = [rho["tokens"].long(), fresh]
    scores, judge = ([score(out, kind, x, toward) for x in tokens] for kind in ("reward", "judge"))
    ratios = [log_ratio(policy, ref, *pair) for pair in zip(prompts, tokens)]
    J, start = (scores[1] - beta * ratios[1]).mean().item(), scores[0].mean().item()
    p = reward.load_reward(load(out, "reward"))(fresh).sigmoid()
    for key, x in (("score", scores[1].mean()), ("judge", judge[1].mean()), ("positive", p.mean()),
                   ("ref_kl", ratios[1].mean()), ("objective", J), ("reference_objective", start)):
        assert_close(found[key], float(x), key, atol=atol, rtol=0)

    # All samples of a prompt together, as of a mixture of 512 / P by rho and 128 / P by pi.
    scores, judge, ratios = (torch.cat([x.view(P, -1) for x in pair], 1).double()
                             for pair in (scores, judge, ratios))
    base = 1 / (512 + 128 * ratios.exp())
    tilted = base * (scores / beta).exp()
    best = (beta * (tilted.sum(1) / base.sum(1)).log()).mean().item()
    ess = (tilted.sum(1) ** 2 / tilted.square().sum(1)).min().item()
    assert_close(found["optimum"]["ess"], ess, "effective sample size", rtol=0.05, atol=0)
    assert ess > least, "too few to tell"
    assert_close(found["optimum"]["objective"], best, "J*", atol=atol, rtol=0)
    assert_close(found["fraction_of_optimum"], (J - start) / (best - start), "of the way",
                 rtol=0.05, atol=0)
    assert_close(found["kl_to_optimum"], (best - J) / beta, "KL(pi to pi*)", atol=5 * atol, rtol=0)
    tilted = base * scores.exp()                # the forty-first beta from 100 down is 1
    kl, *means = found["frontier"][40]
    wanted = [((tilted * x).sum(1) / tilted.sum(1)).mean().item() for x in (scores, judge)]
    assert_close(means, wanted, "score and judge of the optimum at beta 1", atol=atol, rtol=0)
    best = (tilted.sum(1) / base.sum(1)).log().mean().item()
    assert_close(kl, wanted[0] - best, "its drift", atol=2 * atol, rtol=0)
    each = [ppo.best_of_n(x, 16)[0] for x in scores[:, :512 // P]]
    assert_close(found["best_of_n"][2][:2], [16, sum(each) / P], "best of 16", atol=atol, rtol=0)


def test_the_reward_model_is_the_kind_asked_for_and_learns_from_the_feedback(texts, again,
                                                                             monkeypatch):
    """The judge stays a bag that learns from ratings."""
    seen = []
    for kind in (reward.RewardModel, reward.Bag):
        monkeypatch.setattr(kind, "fit", lambda self, *inputs, fit=kind.fit:
                            seen.append((type(self), inputs[-1])) or fit(self, *inputs))
    more = ["--until", "reward", "--length", 12]
    for options in ([], ["--reward-model", "bag", "--feedback", "comparisons"]):
        assert run_script(train, *argv(texts, again, *more, *options)) == 0
    assert seen == [(reward.RewardModel, reward.soft_loss), (reward.Bag, reward.soft_loss),
                    (reward.Bag, reward.comparison_loss)]
    assert type(reward.load_reward(load(again, "reward"))) is reward.Bag


def test_an_adaptive_beta_is_the_one_that_the_run_is_measured_at(texts, again, capsys, monkeypatch):
    """beta after the last update, by its target and horizon in completions (32 an iteration).
    And every stage's models compute in the dtype of the run."""
    runs, step, dtypes, init = [], ppo.PPO.step, set(), gpt.GPT.__init__
    monkeypatch.setattr(gpt.GPT, "__init__", lambda self, config, dtype=torch.float32: (
        dtypes.add(dtype) or init(self, config, dtype)))
    monkeypatch.setattr(gpt, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(ppo.PPO, "step", lambda self, i: runs.append(self) or step(self, i))
    options = "--until ppo --adaptive-kl-target 0.01 --adaptive-kl-horizon 100 --lr 0.01".split()
    assert run_script(train, *argv(texts, again, *options, "--iterations", 5, "--length", 12)) == 0
    assert dtypes == {torch.bfloat16}, "a model in another dtype"
    said = capsys.readouterr().out
    for row, x in zip(runs[-1].batch["tokens"][:2], runs[-1].batch["scores"], strict=False):
        text = data.decode(load(again, "data")["vocabulary"], row).strip()
        assert f"--- score {x:.2f}\n{text}\n" in said, "another text's score is shown"
    state, controller = load(again, "ppo_beta0.5"), ppo.AdaptiveKL(0.5, 0.01, 100)
    for row in state["history"]:
        assert row["beta"] == controller.beta
        controller.update(row["ref_kl"], 32)
    assert state["result"]["beta"] == controller.beta != state["history"][-1]["beta"]


def test_too_few_speeches_are_explained(tmp_path, command):
    """The task to continue speeches needs a text that has some."""
    (tmp_path / "play.txt").write_text("A line of prose, and no speech at all.\n" * 900)
    rows = "".join(f"sample {i},{i % 3 - 1}\n" for i in range(100))
    (tmp_path / "labels.csv").write_text("text,rating\n" + rows)
    few = argv(tmp_path, tmp_path / "out", "--task", "continue", "--vocab-size", 260)
    explains(command(train, *few), "the corpus has only 0 openings: ")


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
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this machine cannot fork")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "torch._dynamo"])
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = [server.Process(target=work, args=(i, processes, port, arguments, folder / "log",
                                                 die_at)) for i in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)       # processes that disagree wait for each other for ever
        process.kill()
        process.join()
    return ([process.exitcode for process in started],
            [Path(f"{folder / 'log'}{i}.err").read_text() for i in range(processes)])


def test_two_processes_do_what_one_does(texts, continued, tmp_path):
    """The same samples and losses within rounding: only sums are made in another order.
    Pretraining, and PPO of texts that end, whose updates end early; process 0 alone speaks."""
    out = tmp_path / "two"
    arguments = argv(texts, out, "--fp32", "--until", "pretrain")
    assert together(arguments, tmp_path / "a") == ([0, 0], ["", ""])
    one, two = (load(folder, "pretrain")["history"] for folder in (continued.out, out))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert_close([row["loss"] for row in two], [row["loss"] for row in one], "losses", atol=2e-3,
                 rtol=0)
    assert (tmp_path / "a" / "log1.out").read_text() == ""
    shutil.copytree(continued.out, tmp_path / "one")
    shutil.copytree(continued.out, tmp_path / "both")
    options = ["--fp32", "--until", "ppo", "--task", "continue", "--beta", 0.25, "--iterations", 2,
               "--minibatch", 8, "--epochs", 3, "--lr", 0.001, "--max-update-kl", 0.01]
    assert run_script(train, *argv(texts, tmp_path / "one", *options)) == 0
    assert together(argv(texts, tmp_path / "both", *options), tmp_path / "b") == ([0, 0], ["", ""])
    runs = [load(tmp_path / name, "ppo_beta0.25") for name in ("one", "both")]
    rows, others = (run["history"] for run in runs)
    # The first rollout is rho's, so it is the same to the last token.
    for key in ("score", "judge", "policy_loss", "approx_kl", "grad_norm", "clipfrac",
                "entropy", "exact_kl", "tokens", "epochs"):
        assert_close(others[0][key], rows[0][key], key, atol=1e-4, rtol=1e-3)
    assert 0.25 < rows[0]["epochs"] < 3, f"{rows[0]['epochs']}: the update should end between"
    weights = [run["model"]["lm_head.weight"] for run in runs]
    moved = (weights[0] - load(tmp_path / "one", "pretrain")["model"]["lm_head.weight"]).norm()
    assert (weights[1] - weights[0]).norm() < 0.2 * moved, "the updates differ"


def test_a_killed_process_ends_the_run_and_the_next_start_resumes(study, texts, tmp_path):
    """One line; then the same bits as two processes that nothing befell."""
    arguments = ["--until", "ppo", "--beta", 0.25]
    for name in ("killed", "whole"):
        shutil.copytree(study, tmp_path / name)
    assert together(argv(texts, tmp_path / "whole", *arguments), tmp_path / "w")[0] == [0, 0]
    codes, errors = together(argv(texts, tmp_path / "killed", *arguments), tmp_path / "k", die_at=2)
    assert codes == [2, -signal.SIGKILL]
    assert errors[0].startswith("stopped: another process of this run has ended. ") and \
        errors[0].count("\n") == 1 and "run the same command again" in errors[0].lower()
    assert together(argv(texts, tmp_path / "killed", *arguments), tmp_path / "k")[0] == [0, 0]
    assert "resuming after step 2" in (tmp_path / "k" / "log0.out").read_text()
    found, whole = (content(tmp_path / name / "ppo_beta0.25.pt") for name in ("killed", "whole"))
    assert found == whole, "the bits differ"
