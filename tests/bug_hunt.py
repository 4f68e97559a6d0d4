"""Real bugs of public RLHF code, put into ours one at a time: which test catches each?

    python tests/bug_hunt.py --list        the bugs, as an exercise: no answers
    python tests/bug_hunt.py               puts in each, runs the tests, prints who caught it
    python tests/bug_hunt.py --only 5      one bug
    python tests/bug_hunt.py --check       only that every edit still fits the source; runs no test

None of these bugs crashes: the loss goes down and plots look like plots. Most were found in
repositories that people had learnt from. Each is an edit of a few words, applied to a temporary
copy of the project, where the tests run that are most likely to fail; the first that fails, and
passes without the bug, is the answer. The exit code is 0 only if every bug was caught.

The exercise: take a bug of --list, say which equation no longer holds, then look who caught it.
Harder: make the mathematics wrong while every test passes; write the test that was missing.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A bug is shown to these tests/test_*.py after those that it names.
FAST = ["ppo", "gpt", "reward", "data", "loop", "sample", "train", "tasks"]


class Bug(NamedTuple):
    title: str
    seen: str           # where
    where: str          # our file, and the test files most likely to catch it
    wrong: str          # what goes wrong, in a sentence
    edits: list         # (old text, new text); old text occurs exactly once in the file


OURS = "made up for this list"
LOSS = "            # The first step is"        # there a minibatch's loss is complete

BUGS = [
    Bug("sampling without the causal mask", "ZiyueWang25/RLHF-Shakespeare", "gpt.py: gpt",
        "Tokens are drawn without the mask and scored with it, so from another distribution.",
        [("distance < 0, BLOCKED", 'distance < 0, BLOCKED * globals().get("causal", 1.0)'),
         ("        logits = model.logits(x[:, -1])", "        global causal\n        causal = 0.0\n"
          "        logits = model(tokens, pad=padding(tokens))[:, -1]\n"
          "        causal = 1.0\n#")]),
    Bug("temperature in the sampler, not in the scorer", "ARENA, no-magic", "gpt.py: gpt",
        "Completions come from a sharper distribution than the one whose KL is computed.",
        [("extend, model, frozen", "extend, model, temperature=0.7, frozen")]),
    Bug("top-k in the sampler, full softmax in the scorer", "nanochat, ttumiel/minRLHF",
        "gpt.py: gpt", "Tokens outside the top k share the probability: KL estimates are biased.",
        [("extend, model, frozen", "extend, model, top_k=50, frozen")]),
    Bug("positions counted otherwise in sampling than in scoring", "trlx #509, OpenRLHF #217",
        "gpt.py: gpt", "With the cache every token is read as if it stood at position 0.",
        [("torch.arange(start, end, d", "torch.arange(0, end - start, d")]),
    Bug("no distances while sampling", "keras-hub #2861", "gpt.py: gpt", "The bias is as long as "
        "the query, 1, and so 0: what comes before a token is read as a set.",
        [("bias = -distance * slopes", "bias = -distance * (start == 0) * slopes")]),
    Bug("distances of the wrong sign", "attention-gym #86", "gpt.py: gpt", "The farther back a "
        "token is, the more it weighs.", [("bias = -distance", "bias = distance")]),
    Bug("padding masked in the first pass only", "C2C #19", "gpt.py: gpt loop", "Every sampled "
        "token but the first depends on it.", [("if pad is None:", "if pad is None or start:")]),
    Bug("the scorer attends to padding", "NeMo-Aligner #68", "gpt.py: gpt loop",
        "A completion's log-probability depends on the longest prompt of its batch.",
        [("stream(x, pad=pad, blocks", "stream(x, blocks")]),
    Bug("token t scored by the logits at t", "lucidrains/PaLM-rlhf-pytorch #31", "gpt.py: gpt",
        "A token's log-probability is read one position too late, off the logits of the next.",
        [("torch.cat((prompts, tokens), dim=1)[:, :-1]", "torch.cat((prompts, tokens), dim=1)"),
         ("prompts.size(1) - 1:]", "prompts.size(1):]")]),
    Bug("logits of the last position only", "nanoGPT's shortcut, in RLHF code", "gpt.py: gpt",
        "forward() returns one position, which is enough to sample and too little to score.",
        [("self.stream(tokens, **options))", "self.stream(tokens, **options)[:, -1:])")]),
    Bug("dropout on while scoring", "vallari24", "gpt.py: gpt loop",
        "Two passes over a text disagree: ratios are not 1, the KL of a policy to itself is not 0.",
        [("self.out(y * y)", "self.out(F.dropout(y * y, 0.1, self.training))")]),
    Bug("log-softmax in half precision", "minimind #814", "gpt.py: ppo",
        "Log-probabilities carry errors of a hundredth, which look like a change of the policy.",
        [("logits.float().log_softmax(-1)", "logits.bfloat16().log_softmax(-1).float()")]),
    Bug("targets not shifted", "nanoGPT's forks", "gpt.py: gpt tasks",
        "Pretraining asks for the token just read: the loss falls to 0, the model only copies.",
        [("(logits, rows[:, 1:])", "(logits, rows[:, :-1])")]),
    Bug("held-out text trained on", OURS, "gpt.py: gpt tasks",
        "Bits per byte on held-out text come out too good, and no plot tells.",
        [('train = texts["train"]\n', 'train = torch.cat((texts["train"], texts["held_out"]))\n')]),
    Bug("the last sampled token never reaches the reward model", "ZiyueWang25, ckkissane, minRLHF",
        "ppo.py: loop", "The token that earns the score is not in the text that is scored, so it "
        "is rewarded at random.", [("        scores = self.score_fn(tokens)\n",
          "        scores = self.score_fn(tokens[:, :-1])\n        if scores.dim() == 2:\n"
          "            scores = torch.cat((scores, scores[:, -1:]), dim=1)\n")]),
    Bug("reward z-scored in every batch", "ZiyueWang25, ckkissane", "ppo.py: loop",
        "The score's unit changes from batch to batch, so beta has no fixed meaning.",
        [('rewards(batch["scores"], ', 'rewards(whiten(batch["scores"][:, None])[:, 0], ')]),
    Bug("sign of the score flipped", "OpenAI, a refactoring (Ziegler 2019, 4.4)", "ppo.py: ppo",
        "The policy becomes as bad as it can be, in fluent English.",
        [("scores = scores.detach()", "scores = -scores.detach()")]),
    Bug("train/test split shuffled twice", "ckkissane", "reward.py: reward",
        "Rows to train on and to measure on come from two shuffles: test items are trained on.",
        [("is_sample = learn", "is_sample = [torch.cat(x)[torch.randperm(len(learn[0]), generator="
          "torch.Generator().manual_seed(0))] for x in zip(report, choose, learn)]")]),
    Bug("softmax applied before cross-entropy", "nanoChatGPT", "reward.py: reward",
        "A probability is read as log-odds, so no passage comes out below one half.",
        [("loss(linear(weight) + bias, ", "loss((linear(weight) + bias).sigmoid(), ")]),
    Bug("calibrated on the rows of the report", OURS, "reward.py: reward",
        "The calibration slope that is reported is 1 whatever the model is worth.",
        [("is_sample = choose", "is_sample = report")]),
    Bug("the trunk of the reward model trained", OURS, "reward.py: reward",
        "A million weights are fitted to a few thousand ratings, which they learn by heart.",
        [("targets, weights, 10_000.0, loss)\n", "targets, weights, 10_000.0, loss)\n"
          "        adam = torch.optim.Adam(self.trunk.parameters(), lr=1e-3)\n"
          "        (weights * loss(self(tokens), targets)).sum().backward()\n"
          "        adam.step()\n")]),
    Bug("the judge told the rated words", OURS, "reward.py: reward",
        "Judge and reward model share what they know, so the judge is fooled along.",
        [('["vocabulary"], {})', '["vocabulary"], rated["words"])')]),
    Bug("KL penalty inside the surrogate, own token only", "ZiyueWang25", "ppo.py: loop",
        "A token pays for its own drift and not for where it leads: the fixed point is not pi*.",
        [("beta - in_loss, mask)", "0.0, mask)"),
         (LOSS, '            ratio = (logprobs - batch["logprobs"][rows]).exp()\n'
          '            k1 = logprobs - batch["ref_logprobs"][rows]\n'
          "            loss = loss + self.controller.beta * masked_mean(ratio * k1, mask)\n"
          + LOSS)]),
    Bug("gradient through the reward", "ZiyueWang25", "ppo.py: ppo",
        "Rewards are data; without the detach their own gradient joins the policy's.",
        [("(logprobs - ref_logprobs).detach()", "(logprobs - ref_logprobs)")]),
    Bug("k1's sign flipped", "rlhf-book", "ppo.py: ppo",
        "Drift from the reference is paid for, not charged.",
        [("(logprobs - ref_logprobs).detach()", "(ref_logprobs - logprobs).detach()")]),
    Bug("k3 inverted", "ZiyueWang25, trlx, llm_optimization, rlhf-book", "ppo.py: ppo",
        "exp(k1) - 1 - k1 is positive and looks like a KL, but estimates another quantity.",
        [("torch.expm1(-k1) + k1", "torch.expm1(k1) - k1")]),
    Bug("GRPO's k3 from exchanged policies", "rlhf-book", "ppo.py: loop",
        "The penalty in the loss is that of drifting from pi, its gradient another one.",
        [('(logprobs, part["ref_logprobs"])', '(part["ref_logprobs"], logprobs)')]),
    Bug("reference shares weights with the policy", "nanoChatGPT", "ppo.py: loop",
        "The reference moves along, KL is always 0, and nothing holds the policy.",
        [("self.policy = copy.deepcopy(self.ref)", "self.policy = self.ref")]),
    Bug("score added on padding", "trl #3750, miles #1827", "ppo.py: ppo", "The score lands on "
        "the last column and not on the last real token, so short completions earn nothing.",
        [("last = mask.cumsum(1)", "last = torch.ones_like(mask).cumsum(1)")]),
    Bug("controller fed per-token KL", "trlx #438", "ppo.py: loop", "The target is in nats per "
        "completion, the measurement per token, so beta falls for ever.",
        [('update(metrics["ref_kl"], ', 'update(metrics["ref_kl"] / config.length, ')]),
    Bug("rewards used where returns belong", "rlhf-book #216", "ppo.py: ppo",
        "A token's advantage is its own reward: what it leads to, the score, does not count.",
        [("delta = rewards[:, t] + gamma * next_value - values[:, t]", "delta = rewards[:, t]"),
         ("delta + gamma * lam * advantage, advantage)", "delta, advantage)")]),
    Bug("padding leaks into returns", "rlhf-book #216", "ppo.py: ppo", "What stands on padding is "
        "added to the returns of the real tokens before it.",
        [("    rewards, mask = _masked(rewards, mask)\n    to_go",
          "    _, mask = _masked(rewards, mask)\n    to_go")]),
    Bug("a completion among the others it is compared with", OURS, "ppo.py: ppo",
        "Its own return is in its baseline: gradients are too small, the more so in small groups.",
        [("others = (total - grouped) / (group - 1)", "others = total / group")]),
    Bug("a group of several prompts", OURS, "ppo.py: loop",
        "Completions are compared with those of other prompts: easy prompts look like good texts.",
        [("torch.arange(config.batch) // self.group", "torch.arange(config.batch)")]),
    Bug("advantages whitened inside each sequence", "thomfoster/minRLHF", "ppo.py: ppo",
        "Good and bad completions come out alike, for each has mean 0, padding included.",
        [("whitened = (x - mean) * torch.rsqrt(variance + 1e-8)", "whitened = "
          "(x - x.mean(1, keepdim=True)) / (x.std(1, correction=0, keepdim=True) + 1e-8)")]),
    Bug("whitening over padding", "thomfoster/minRLHF", "ppo.py: loop", "The zeros of padding "
        "count as advantages, so the scale depends on how many completions end early.",
        [("return whiten(advantages, mask)", "return whiten(advantages)")]),
    Bug("returns built from whitened advantages", "ash80/RLHF_in_notebooks", "ppo.py: ppo",
        "A value function fitted to them forecasts in another unit than rewards have.",
        [("advantages + values\n    return", "whiten(advantages, mask) + values\n    return")]),
    Bug("whitening that adds the mean back", "ash80/RLHF_in_notebooks", "ppo.py: ppo",
        "Advantages keep their mean, so every token drawn is pushed up, or every one down.",
        [("mask=None, shift_mean=True)", "mask=None, shift_mean=False)")]),
    Bug("values see the token they are a baseline for", "asked at alibaba/ROLL #3",
        "ppo.py: loop", "The value before token t is read after it: good tokens earn no advantage.",
        [("return scores[:, -1], scores[:, :-1]", "return scores[:, -1], scores[:, 1:]")]),
    Bug("values fitted to padding", OURS, "ppo.py: loop",
        "After the end they learn numbers that no token earned, at the real tokens' expense.",
        [("    mask = mask.cpu()\n", "    mask = torch.ones_like(mask.cpu())\n")]),
    Bug("mask shifted by one", "trlx #582", "ppo.py: loop",
        "The loss reads the first padding token and leaves out the last real one.",
        [("     mask)\n            if kl_in", "     mask.roll(1, 1))\n            if kl_in")]),
    Bug("prompt tokens in the loss", "Search-R1 #21, of what tools answered", "ppo.py: loop",
        "Tokens that the policy was given are credited with what followed: it learns prompts.",
        [(LOSS, '            given = batch["prompts"][rows]\n'
          "            logits = self.policy(given, pad=given == PAD)[:, :-1]\n"
          "            own = part[\"advantages\"][:, :1] * token_logprobs(logits, given[:, 1:])\n"
          "            loss = loss - masked_mean(own, given[:, :-1] != PAD)\n" + LOSS)]),
    Bug("clip taken with max for negative advantages", "rasbt/reasoning-from-scratch",
        "ppo.py: ppo", "For A < 0 an unlikelier token is pushed down without end.",
        [("(ratio * advantages, clipped * advantages)", "(ratio, clipped) * advantages")]),
    Bug("old log-probabilities taken from the policy of now", "tensorforce #312", "ppo.py: loop",
        "The ratio is always 1, nothing is ever clipped, and approx_kl never stops an update.",
        [('loss(logprobs, part["logprobs"]', "loss(logprobs, logprobs.detach()")]),
    Bug("early stop leaks stale gradients", "thomfoster/minRLHF", "ppo.py: loop",
        "The gradient of the minibatch that stops an update joins the first step of the next one.",
        [("            if infos and", "            loss.backward()\n            if infos and"),
         ("optimizer_step(loss, self.optimizer, lr, 1.0, weight)\n",
          "torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)\n"
          "            self.optimizer.param_groups[0][\"lr\"] = lr\n"
          "            self.optimizer.step()\n            self.optimizer.zero_grad()\n")]),
    Bug("early stop at a multiple of what was set", "Spinning Up, 1.5 times, as its text says",
        "ppo.py: loop", "An update goes farther from the policy that sampled than its limit.",
        [("> config.max_update_kl", "> 1.5 * config.max_update_kl")]),
    Bug("a sampler of its own without the seed", OURS, "gpt.py: loop tasks",
        "Every --seed draws the same completions, so runs agree more than they should.",
        [("(len(prompts), length)", "(len(prompts), length, generator=torch.Generator())")]),
    Bug("a stage without its own seed", OURS, "train.py: train",
        "A stage goes on with the numbers of the one before, so it depends on what was reused.",
        [('        torch.manual_seed(data.fold(f"{args.seed} {name}", 2**31))\n', "")]),
    Bug("metrics of the last minibatch for those of the update", "cleanrl #522", "ppo.py: loop",
        "clipfrac and approx_kl are logged as they stood at the end, with a minibatch's noise.",
        [("for info in infos)", "for info in infos[-1:])")]),
    Bug("prompts drawn with replacement", OURS, "ppo.py: loop",
        "A batch has some prompts twice and others not at all.",
        [("torch.randperm(P)", "torch.randint(P, (P,))")]),
    Bug("beta lost on resume", "verl #2653", "ppo.py: loop",
        "An adapted beta is not in the checkpoint, so a run cut off goes on with the first one.",
        [(',\n                      "controller": self.controller', "")]),
    Bug("reference lost on resume", "NeMo-RL #3722", "ppo.py: loop", "The reference is made from "
        "the loaded policy, KL starts at 0 again, and each resume allows the drift once more.",
        [("        self.parts = {",
          "        self.policy.register_load_state_dict_post_hook(\n"
          "            lambda *_: self.ref.load_state_dict(self.policy.state_dict()))\n"
          "        self.parts = {")]),
    Bug("momentum lost on resume", OURS, "gpt.py: train",
        "A pretraining that was cut off goes on, but to other weights than one that was not.",
        [("(steps, model=model, optimizer=optimizer)", "(steps, model=model)")]),
    Bug("the random stream lost on resume", OURS, "train.py: train",
        "A run that was cut off draws its first batches once more, and ends in other weights.",
        [('            torch.set_rng_state(partial["rng"])\n', "")]),
    Bug("the learning rate never set", OURS, "gpt.py: gpt loop", "Warm-up and decay are computed "
        "and not used; the optimizer keeps its own.", [('    group["lr"] = lr\n', "")]),
    Bug("a resumed loop skips a step", OURS, "train.py: train",
        "The more often a run is cut off, the fewer steps it has been trained for.",
        [('"partial", step=self.step + 1,', '"partial", step=self.step + 2,')]),
    Bug("a resumed loop repeats a step", OURS, "train.py: train",
        "The last step before each cut is done twice, on the weights that it left.",
        [('"partial", step=self.step + 1,', '"partial", step=self.step,')]),
    Bug("an option in no stage's key", OURS, "train.py: train tasks",
        "Another --lam is given, and the old policy is shown as its result.",
        [("\nppo       lam  ", "\nnone      lam  "),
         ("function(options,",
          "function(SimpleNamespace(**{**vars(args), **vars(options)}),")]),
    Bug("an option missing in one of its stages", OURS, "train.py: tasks train",
        "After another --length the judge is still the one that read passages of the old length.",
        [("\nreward judge rho ppo  length", "\nreward rho ppo  length"),
         ("function(options,",
          "function(SimpleNamespace(**{**vars(args), **vars(options)}),")]),
    Bug("a script missing in a stage's key", OURS, "train.py: train",
        "gpt.py is edited, and the GPT that the old code pretrained stands.",
        [("SOURCES[function.__module__", 'SOURCES[function.__module__.replace("gpt", "data")')]),
    Bug("keys that do not chain", OURS, "train.py: train",
        "Another corpus repeats the GPT, but the reward model on the GPT of the old one stands.",
        [("digest(str(inputs))", "digest(str({x: y for x, y in inputs.items() "
          'if x not in "data pretrain reward judge rho"}))')]),
    Bug("an edit of labels/words.csv that counts for nothing", OURS, "train.py: train",
        "Of what readers rated only the passages are in the key, so the old reward model stands.",
        [("str([texts for", 'str([texts["passages"] if "passages" in texts else texts for')]),
    Bug("the optimum of prompts pooled as if they were one", OURS, "ppo.py: ppo",
        "Samples of easy prompts outweigh those of hard ones; but each prompt must be answered.",
        [("    objective = beta * (tilted.logsumexp(-1)",
          "    tilted, base, scores = tilted.flatten(), base.flatten(), scores.flatten()\n"
          "    objective = beta * (tilted.logsumexp(-1)")]),
    Bug("a run's samples pooled without regard to prompt", OURS, "ppo.py: tasks",
        "The same in evaluate(): J* is too high, and the policy's share of the way too low.",
        [("rows.view(3, len(test_prompts), -1)", "rows.view(3, 1, -1)")]),
    Bug("pooled samples weighed by exchanged counts", OURS, "ppo.py: ppo",
        "rho's samples count as if the policy had drawn so many, so J* is biased.",
        [("(rho[1].numel(), pi[1].numel())", "(pi[1].numel(), rho[1].numel())")]),
    Bug("the bootstrap draws pi's scores and log-ratios apart", OURS, "ppo.py: ppo",
        "Near pi* they rise together; drawn apart they do not, and J's error comes out too large.",
        [("x[..., torch.randint(x.size(-1), x.shape[-1:])]",
          "x.gather(-1, torch.randint(x.size(-1), x.shape))")]),
    Bug("measured on the prompts it was trained on", OURS, "ppo.py: tasks",
        "A policy that knows its prompts by heart looks like one that can write.",
        [('texts["test_openings"], options', 'texts["openings"], options')]),
    Bug("rated speeches of the plays taken for samples", OURS, "reward.py: reward",
        "They count twice, and the reward model is calibrated on texts that PPO never sees.",
        [("play is None))", "not play))")]),
    Bug("the error of J given as that of J*", OURS, "ppo.py: ppo",
        "The optimum looks as certain as the policy, however few samples carry its weight.",
        [('again["optimum"]["objective"],', 'again["objective"],')]),
    Bug("a policy kept before its last iterations", OURS, "ppo.py: tasks",
        "The checkpoint after 4 iterations has done 3: its samples are not those meant.",
        [("        if i in KEPT:", "        if i + 1 in KEPT:")]),
    Bug("another sample's Positive Prob beside a text", OURS, "sample.py: sample",
        "All numbers are right, and stand beside the wrong texts.",
        [("dim=1), positive, ref_kl)", "dim=1), positive[::-1], ref_kl)")]),
    Bug("a rating session shifted by one row", OURS, "sample.py: sample",
        "The reader is shown the text before, and the answer is kept beside the next one.",
        [(r'to go\n{text}\n")', r'to go\n{todo[i - 1][0]}\n")')]),
    Bug("every process draws the same completions", OURS, "gpt.py: tasks", "A batch holds each "
        "completion as often as there are processes, so it is noisier than it looks.",
        [("prompts, uniform, size", "prompts, "
          "uniform[torch.arange(len(uniform)) % len(uniform[share(len(uniform))])], size")]),
    Bug("keys of one block in the cache of another", OURS, "gpt.py: gpt",
        "From the second token on all blocks read what the first one has kept.",
        [("past_v = cache[self]", "past_v = [y[:, :bias.size(-1) - x.size(1)] for y in next("
          "iter(cache.values()))]")]),
    Bug("gradients averaged over processes, not over tokens", OURS, "ppo.py: tasks",
        "A process with few tokens in its share counts as much as one with many.",
        [('mask.sum() / batch["mask"][everyones].sum()', "len(rows) / len(everyones)")]),
    Bug("processes' gradients added up", OURS, "gpt.py: tasks", "With N processes the gradient is "
        "N times too large; clipping hides it.", [("all_reduce(x.mul_(weight))", "all_reduce(x)")]),
    Bug("early stop decided by each process alone", OURS, "ppo.py: tasks",
        "One stops where another goes on, and each waits for the other for ever.",
        [("            average(info.values(), weight)\n", "")]),
]


def edited(bug, folder=ROOT):
    """The source with the bug in it; ValueError unless each old text is there once."""
    file = bug.where.split(":")[0]
    source = (folder / file).read_text()
    for old, new in bug.edits:
        if (n := source.count(old)) != 1:
            raise ValueError(f"{bug.title}: {n} times in {file}, not once:\n{old}")
        source = source.replace(old, new)
    compile(source, file, "exec")
    return source


def check(bugs):
    """All edits on all sources, before any test is run: exit where one no longer fits."""
    wrong = []
    for bug in bugs:
        try:
            edited(bug)
        except (ValueError, SyntaxError) as error:
            wrong.append(str(error))
    if wrong:
        sys.exit("The source has changed; bring these edits up to date.\n\n" + "\n\n".join(wrong))


def copy_project(source, folder):
    """What the tests need, from one folder to another: scripts, settings, tests, labels, corpus."""
    for pattern in ("*.py", "pytest.ini", "tests/*.py", "labels/*", "corpus/*"):
        for path in source.glob(pattern):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)


def failure(project, bug, tests, known={}):
    """The first of tests, but known ones, that fails on a copy of the project, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(project, Path(folder))
        if bug:
            Path(folder, bug.where.split(":")[0]).write_text(edited(bug, project))
        # -B: a bytecode file is known by second and size, and an edit may leave both as they were.
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "--tb=no", "-rfE"]
        command += ["-p", "no:cacheprovider", *tests]
        command += [f"--deselect={test}" for test, fails in dict(known).items() if fails]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("FAILED", "ERROR") and "::" in rest:
            return rest.split(" - ")[0]
    if done.returncode not in (0, 5):           # 5: all are deselected
        title = bug.title if bug else "the project as it is"
        sys.exit(f"{title}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def hunt(project, bug, known):
    """The first test that fails with this bug and not without it, likely files first, or None.
    known: which of the tests that saw bugs fail without one too; it grows.
    """
    likely = bug.where.split()[1:]
    for names in (likely, [name for name in FAST if name not in likely]):
        files = [f"tests/test_{name}.py" for name in names]
        while failed := failure(project, bug, files, known):
            test = failed.split("[")[0]
            if test not in known:
                known[test] = failure(project, None, [test])
            if not known[test]:
                return failed.removeprefix("tests/")
            print(f"{test} fails on the source as it is, so it counts for nothing here", flush=True)


def show_list(numbered):
    """The exercise: each bug, where it was seen, what goes wrong. No answers."""
    print(f"Here are {len(numbered)} bugs, most of public RLHF code. Which test catches each?\n")
    for number, bug in numbered:
        print(f"{number:2}. {bug.title}   ({bug.where.split(':')[0]}; seen: {bug.seen})")
        print(textwrap.fill(bug.wrong, 96, initial_indent="    ", subsequent_indent="    ") + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the bugs, without answers")
    parser.add_argument("--check", action="store_true", help="only check that each edit fits")
    parser.add_argument("--only", type=int, nargs="+", metavar="N",
                        choices=range(1, len(BUGS) + 1), help="these bugs alone, by number")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="bugs tried at the same time")
    args = parser.parse_args()
    numbered = [(n, bug) for n, bug in enumerate(BUGS, 1) if not args.only or n in args.only]
    if args.list:
        return show_list(numbered)
    check([bug for _, bug in numbered])
    if args.check:
        return print(f"all {len(numbered)} edits fit the source")
    print("Each takes seconds to minutes. A test counts if it passes without the bug.", flush=True)
    missed, known = 0, {}
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(ROOT, project)         # one state for all bugs, whatever is edited meanwhile
        caught = pool.map(lambda item: hunt(project, item[1], known), numbered)
        try:
            for (number, bug), test in zip(numbered, caught):
                missed += test is None
                test = test or "NOT CAUGHT"
                print(f"{number:2}. {bug.title:<60}  {bug.seen:<42}  {test}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{len(numbered) - missed} of {len(numbered)} bugs caught")
    sys.exit(missed > 0 or any(known.values()))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                 # head, say, has read what it wanted
        os._exit(0)                         # any other exit would try to write the rest
