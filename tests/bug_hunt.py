"""Real bugs of public RLHF code, put into ours one at a time: which test catches each?

    python tests/bug_hunt.py --list        the bugs, as an exercise: no answers
    python tests/bug_hunt.py               puts in each, runs the tests, prints who caught it
    python tests/bug_hunt.py --only 5      one bug
    python tests/bug_hunt.py --check       only that every edit still fits the source; runs no test

None of these bugs crashes. The loss goes down, samples change, plots look like plots; most were
found in repositories that people had trained with and learnt from. Each is told in one
sentence and is an edit of a few words, applied to a temporary copy of the project. The fast
tests run there, those of the files most likely to fail first, and the first that fails is
the answer. The exit code is 0 only if every bug was caught.

The exercise: take a bug of --list. Say what would be seen in the plots (often: nothing), which
equation no longer holds, and which test you would write; then look who caught it. Harder:
edit the source yourself so that the mathematics is wrong and every test still passes, then
write the test that was missing.
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
# The tests/test_*.py that a bug is shown to.
FAST = ["ppo", "gpt", "loop", "reward", "data", "train", "tasks"]


class Bug(NamedTuple):
    title: str
    seen: str           # where
    wrong: str          # what goes wrong, in a sentence
    tests: str          # the test files most likely to catch it
    file: str           # of ours
    edits: list         # (old text, new text); old text occurs exactly once in file


BUGS = [
    # ---- sampling is scoring
    Bug("sampling without the causal mask", "ZiyueWang25/RLHF-Shakespeare",
        "The sampler re-reads the text with no mask, the scorer with one, so tokens are drawn from "
        "another distribution than their log-probabilities say.",
        "gpt loop", "gpt.py",
        [("    blocked = key > query\n",
          '    blocked = (key > query) & globals().get("causal", True)\n'),
         ("        logits = model(new, cache)[:, -1] ",
          "        global causal\n        causal, text = False, torch.cat(tokens, dim=1)\n"
          "        logits = model(text, pad=padding(text))[:, -1]\n        causal = True ")]),
    Bug("temperature in the sampler, not in the scorer", "ARENA, no-magic",
        "Completions come from a sharper distribution than the one whose KL is computed.",
        "gpt loop", "gpt.py",
        [("length, uniform=uniform[:, rows])",
          "length, temperature=0.7, uniform=uniform[:, rows])")]),
    Bug("top-k in the sampler, full softmax in the scorer", "nanochat, ttumiel/minRLHF",
        "Tokens outside the top k are never drawn but share the probability, so KL estimates are "
        "biased and can be negative.",
        "gpt loop", "gpt.py",
        [("length, uniform=uniform[:, rows])",
          "length, top_k=50, uniform=uniform[:, rows])")]),
    Bug("positions counted otherwise in sampling than in scoring", "trlx #509, OpenRLHF #217",
        "With the cache every token is read as if it stood at position 0, and the ratio is not 1 "
        "before the first step.",
        "gpt loop", "gpt.py",
        [("self.cos[start:end]", "self.cos[:T]"), ("self.sin[start:end]", "self.sin[:T]")]),
    Bug("the scorer attends to padding", "NeMo-Aligner #68",
        "The sampler skips the padding before a prompt, the scorer reads it as tokens, so a "
        "completion's log-probability depends on the longest prompt of its batch.",
        "loop gpt", "gpt.py",
        [("    hidden = model.hidden(inputs, pad=padding(inputs))",
          "    hidden = model.hidden(inputs)")]),
    Bug("token t scored by the logits at t", "lucidrains/PaLM-rlhf-pytorch #31",
        "A token's log-probability is read one position too late, off the logits of the next.",
        "gpt loop", "gpt.py",
        [("    inputs = torch.cat((prompts, tokens), dim=1)[:, :-1]",
          "    inputs = torch.cat((prompts, tokens), dim=1)"),
         ("hidden = hidden[:, prompts.size(1) - 1:]", "hidden = hidden[:, prompts.size(1):]")]),
    Bug("logits of the last position only", "nanoGPT's shortcut, taken over into RLHF code",
        "forward() returns one position, which is enough to sample and too little to score.",
        "gpt", "gpt.py",
        [("return self.logits(self.hidden(tokens, cache, pad))",
          "return self.logits(self.hidden(tokens, cache, pad)[:, -1:])")]),
    Bug("dropout on while scoring", "vallari24",
        "Two passes over the same text disagree, so ratios are not 1 and the KL of a policy to "
        "itself is not 0.",
        "gpt loop", "gpt.py",
        [("return x + self.out(y * y)",
          "return x + self.out(F.dropout(y * y, 0.1, self.training))")]),
    Bug("log-softmax in half precision", "minimind #814",
        "Log-probabilities carry errors of a hundredth, which look like a change of the policy.",
        "ppo", "ppo.py",
        [("of_tokens(logits.float().log_softmax(-1), tokens)",
          "of_tokens(logits.bfloat16().log_softmax(-1), tokens)")]),

    # ---- the reward model
    Bug("the last sampled token never reaches the reward model", "ZiyueWang25, ckkissane, minRLHF",
        "The token that earns the score is not in the text that is scored, so it is rewarded at "
        "random.",
        "loop", "ppo.py",
        [('"scores": self.score_fn(tokens)', '"scores": self.score_fn(tokens[:, :-1])')]),
    Bug("reward z-scored in every batch", "ZiyueWang25, ckkissane",
        "The score's unit changes from batch to batch, so beta has no fixed meaning and the "
        "optimum is another one.",
        "loop", "ppo.py",
        [('        rewards = kl_penalised_rewards(batch["scores"], ',
          '        raw = batch["scores"]\n        rewards = kl_penalised_rewards('
          "(raw - raw.mean()) / (raw.std() + 1e-8), ")]),
    Bug("sign of the score flipped", "a refactoring at OpenAI (Ziegler 2019, section 4.4)",
        "The policy becomes as bad as it can be, in fluent English.",
        "ppo", "ppo.py",
        [("scores = scores.detach()", "scores = -scores.detach()")]),
    Bug("train/test split shuffled twice", "ckkissane",
        "The rows to train on and the rows to measure on come from two shuffles, so test items are "
        "trained on and all looks well.",
        "train", "train.py",
        [('    rows, choose = rated["rows"][name], rated["rows"]["choose"]\n',
          '    rows, choose = rated["rows"][name], rated["rows"]["choose"]\n'
          '    rows = torch.randperm(len(rated["ratings"]))[:len(rows)]\n')]),
    Bug("softmax applied before cross-entropy", "nanoChatGPT",
        "A probability from 0 to 1 is read as log-odds, so no passage can come out below one half, "
        "and gradients are small.",
        "reward", "reward.py",
        [("binary_cross_entropy_with_logits(log_odds, ",
          "binary_cross_entropy_with_logits(log_odds.sigmoid(), ")]),

    # ---- reward shaping and KL
    Bug("KL penalty inside the surrogate, own token only", "ZiyueWang25",
        "The penalty is a live term of the loss: a token pays for its own drift and not for "
        "where it leads, and the fixed point is not pi*.",
        "loop", "ppo.py",
        [("                                       beta, mask)\n",
          "                                       0.0, mask)\n"),
         ("            # The first step is",
          '            ratio = (logprobs - batch["logprobs"][rows]).exp()\n'
          '            k1 = logprobs - batch["ref_logprobs"][rows]\n'
          "            loss = loss + self.controller.beta * masked_mean(ratio * k1, mask)\n"
          "            # The first step is")]),
    Bug("gradient through the reward", "ZiyueWang25",
        "Rewards are data; without the detach their own gradient, -beta grad log pi, joins the "
        "policy's.",
        "ppo", "ppo.py",
        [("(logprobs - ref_logprobs).detach()", "(logprobs - ref_logprobs)")]),
    Bug("k1's sign flipped", "rlhf-book",
        "Drift from the reference is paid for, not charged.",
        "ppo", "ppo.py",
        [("(logprobs - ref_logprobs).detach()", "(ref_logprobs - logprobs).detach()")]),
    Bug("k3 inverted", "ZiyueWang25, trlx, llm_optimization, rlhf-book",
        "exp(k1) - 1 - k1 is positive and looks like a KL, but estimates another quantity.",
        "ppo", "ppo.py",
        [("torch.expm1(-k1) + k1", "torch.expm1(k1) - k1")]),
    Bug("reference shares weights with the policy", "nanoChatGPT",
        "The reference moves along, KL is always 0, and nothing holds the policy.",
        "loop", "ppo.py",
        [("self.policy = copy.deepcopy(ref).requires_grad_(True)",
          "self.policy = self.ref.requires_grad_(True)")]),
    Bug("score added on padding", "trl #3750, miles #1827",
        "The score lands on the last column and not on the last real token, so short completions "
        "earn nothing.",
        "loop", "ppo.py",
        [("last = (mask * position).argmax(1, keepdim=True)",
          "last = torch.full((len(k1), 1), k1.size(1) - 1, device=mask.device)")]),
    Bug("controller fed per-token KL", "trlx #438",
        "The target is in nats per completion, the measurement per token, so beta falls for ever.",
        "loop", "ppo.py",
        [('self.controller.update(metrics["ref_kl"], ',
          'self.controller.update(metrics["ref_kl"] / config.length, ')]),

    # ---- advantages and losses
    Bug("rewards used where returns belong", "rlhf-book #216",
        "A token's advantage is its own reward: what it leads to, the score above all, does not "
        "count.",
        "ppo loop", "ppo.py",
        [("delta = rewards[:, t] + gamma * next_value - values[:, t]", "delta = rewards[:, t]"),
         ("delta + gamma * lam * advantage, advantage)", "delta, advantage)")]),
    Bug("padding leaks into returns", "rlhf-book #216",
        "What stands on padding, where log-probabilities mean nothing, is added to the returns of "
        "the real tokens before it.",
        "ppo", "ppo.py",
        [("    rewards, mask = _masked(rewards, mask)\n    return rewards.flip",
          "    _, mask = _masked(rewards, mask)\n    return rewards.flip")]),
    Bug("a completion among the others it is compared with", "made up for this list",
        "Its own return is in its baseline, which then depends on its tokens: all gradients are a "
        "share too small, and differ with the size of the group.",
        "ppo loop", "ppo.py",
        [("others = (total - grouped) / (group - 1)", "others = total / group")]),
    Bug("advantages whitened inside each sequence, padding included", "thomfoster/minRLHF",
        "Good and bad completions come out alike, for each has mean 0.",
        "ppo", "ppo.py",
        [("    mean = masked_mean(x, mask)\n", "    mean = x.mean(1, keepdim=True)\n"),
         ("variance = masked_mean((x - mean) ** 2, mask)",
          "variance = ((x - mean) ** 2).mean(1, keepdim=True)")]),
    Bug("whitening over padding", "thomfoster/minRLHF",
        "The zeros of padding count as advantages, so mean and deviation depend on how many "
        "completions end early.",
        "loop", "ppo.py",
        [("self.update(batch, whiten(advantages, mask))",
          "self.update(batch, whiten(advantages))")]),
    Bug("returns built from whitened advantages", "ash80/RLHF_in_notebooks",
        "The value function is fitted to numbers in another unit than rewards have.",
        "ppo", "ppo.py",
        [("return advantages, advantages + values",
          "return advantages, whiten(advantages, mask) + values")]),
    Bug("whitening that adds the mean back", "ash80/RLHF_in_notebooks",
        "Advantages keep their mean, so every token drawn is pushed up, or every one down.",
        "ppo", "ppo.py",
        [("def whiten(x, mask=None, shift_mean=True)",
          "def whiten(x, mask=None, shift_mean=False)")]),
    Bug("value function sees the token it is a baseline for", "asked at alibaba/ROLL #3",
        "The value before token t is read after it, so good tokens are explained away and earn no "
        "advantage.",
        "loop", "ppo.py",
        [("F.pad(self.features_fn(tokens), (0, 0, 1, -1))", "self.features_fn(tokens)")]),
    Bug("value function fitted to padding", "made up for this list",
        "After the end it is taught numbers that no token earned, and real tokens get what is left "
        "of its capacity.",
        "loop", "ppo.py",
        [("            x = self.terms(x)[real] ",
          "            real = torch.ones_like(real)\n            x = self.terms(x)[real] ")]),
    Bug("mask shifted by one", "trlx #582",
        "The loss reads the first padding token and leaves out the last real one.",
        "loop", "ppo.py",
        [("   config.clip, mask)", "   config.clip, mask.roll(1, 1))")]),
    Bug("prompt tokens in the loss", "Search-R1 #21, of what tools answered",
        "Tokens that the policy was given are credited with what followed, so it learns to write "
        "prompts.",
        "loop", "ppo.py",
        [("            # The first step is",
          '            given = batch["prompts"][rows]\n'
          "            logits = self.policy(given, pad=given == PAD)[:, :-1]\n"
          "            own = advantages[rows][:, :1] * token_logprobs(logits, given[:, 1:])\n"
          "            loss = loss - masked_mean(own, given[:, :-1] != PAD)\n"
          "            # The first step is")]),
    Bug("clip taken with max for negative advantages", "rasbt/reasoning-from-scratch",
        "For A < 0 the larger term is taken: a token that has become unlikelier is pushed down "
        "without end, one that has become likelier is let go.",
        "ppo", "ppo.py",
        [("    surrogate = torch.min(ratio * advantages, clipped * advantages)",
          "    one, two = ratio * advantages, clipped * advantages\n"
          "    surrogate = torch.where(advantages < 0, torch.max(one, two),\n"
          "                            torch.min(one, two))")]),
    Bug("old log-probabilities taken from the policy of now", "tensorforce #312",
        "The ratio is always 1, nothing is ever clipped, and approx_kl never stops an update.",
        "loop", "ppo.py",
        [('policy_loss(logprobs, batch["logprobs"][rows],',
          "policy_loss(logprobs, logprobs.detach(),")]),

    # ---- the loop
    Bug("early stop leaks stale gradients", "thomfoster/minRLHF",
        "The minibatch that stops an update has been through backward(), and its gradient joins "
        "the first step of the next one.",
        "loop", "ppo.py",
        [('            if infos and info["approx_kl"] > config.max_update_kl:\n',
          "            loss.backward()\n"
          '            if infos and info["approx_kl"] > config.max_update_kl:\n'),
         ("descend(loss, self.policy, [self.optimizer], 1.0, weight)\n",
          "nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)\n"
          "            self.optimizer.step()\n"
          "            self.optimizer.zero_grad(set_to_none=True)\n")]),
    Bug("early stop at a multiple of what was set", "Spinning Up, 1.5 times, as its text says",
        "An update goes farther from the policy that sampled than its limit, and no plot tells.",
        "loop", "ppo.py",
        [('info["approx_kl"] > config.max_update_kl',
          'info["approx_kl"] > 1.5 * config.max_update_kl')]),
    Bug("sampler without the seed", "made up for this list",
        "Every --seed draws the same completions, so runs agree more than they should.",
        "loop", "ppo.py",
        [("self.sampler = Generator(prompts.device).manual_seed(seed)",
          "self.sampler = Generator(prompts.device)")]),
    Bug("metrics of the last minibatch for those of the update", "cleanrl #522",
        "clipfrac and approx_kl are logged as they stood at the end, with a minibatch's noise.",
        "loop", "ppo.py",
        [("for info in infos])", "for info in infos[-1:]])")]),
    Bug("beta lost on resume", "verl #2653",
        "An adapted beta is not in the checkpoint, so a run cut off goes on with the first one.",
        "loop", "ppo.py",
        [(' "controller", "sampler",', ' "sampler",')]),
    Bug("reference lost on resume", "NeMo-RL #3722",
        "The reference is made from the loaded policy, KL starts at 0 again, and each resume "
        "allows the drift once more.",
        "loop", "ppo.py",
        [('        names = ("policy", "value"',
          "        self.policy.register_load_state_dict_post_hook(\n"
          "            lambda *_: self.ref.load_state_dict(self.policy.state_dict()))\n"
          '        names = ("policy", "value"')]),

    # ---- prompts, comparisons, several processes
    Bug("the optimum of prompts pooled as if they were one", "made up for this list",
        "Samples of easy prompts outweigh those of hard ones, which no policy can do: each prompt "
        "must be answered.",
        "tasks", "ppo.py",
        [("    objective = beta * (tilted.logsumexp(-1)",
          "    tilted, base, scores = tilted.flatten(), base.flatten(), scores.flatten()\n"
          "    objective = beta * (tilted.logsumexp(-1)")]),
    Bug("the worse one preferred", "made up for this list",
        "The reward model learns what readers like least.",
        "tasks", "reward.py",
        [("better = (targets - targets[other]).sign()",
          "better = (targets[other] - targets).sign()")]),
    Bug("every process draws the same completions", "made up for this list",
        "A batch holds each completion as often as there are processes, so it is noisier than it "
        "looks.",
        "tasks", "gpt.py",
        [("uniform=uniform[:, rows])", "uniform=uniform[:, :rows.stop - rows.start])")]),
    Bug("gradients averaged over processes, not over tokens", "made up for this list",
        "A process with few tokens in its share counts as much as one with many.",
        "tasks", "ppo.py",
        [('weight = mask.sum() / batch["mask"][everyones].sum()',
          "weight = len(rows) / len(everyones)")]),
    Bug("gradients of processes added up", "made up for this list",
        "With N processes the gradient is N times too large; clipping hides it.",
        "tasks", "gpt.py",
        [("add_up(x.mul_(weight))", "add_up(x)")]),
]


def edited(bug, folder=ROOT):
    """The source of bug.file with the bug in it; ValueError unless each old text is there once."""
    source = (folder / bug.file).read_text()
    for old, new in bug.edits:
        count = source.count(old)
        if count != 1:
            raise ValueError(f"{bug.title}: this text occurs {count} times in {bug.file}, "
                             f"not once:\n{old}")
        source = source.replace(old, new)
    compile(source, bug.file, "exec")
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
    for path in [*source.glob("*.py"), *source.glob("*.md"), source / "pytest.ini"]:
        if path.exists():
            shutil.copy(path, folder)
    for name in ("tests", "labels", "corpus"):
        if (source / name).exists():
            shutil.copytree(source / name, folder / name,
                            ignore=shutil.ignore_patterns("__pycache__"))


def failures(project, files, bug=None, known=()):
    """Tests that fail on a copy of the project: with a bug the first but known ones, else all."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(project, Path(folder))
        if bug:
            Path(folder, bug.file).write_text(edited(bug, project))
        # -B: a bytecode file is known by second and size, and an edit may leave both as they were.
        command = [sys.executable, "-B", "-m", "pytest", "-q", "--tb=no", "-rfE"]
        command += ["-p", "no:cacheprovider", *["-x"] * bool(bug), *files]
        command += [f"--deselect={test}" for test in known]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    failed = [rest.split(" - ")[0] for word, _, rest in lines
              if word in ("FAILED", "ERROR") and "::" in rest]
    if done.returncode and not failed:
        title = bug.title if bug else "the project as it is"
        sys.exit(f"{title}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed


def files_of(project, names):
    files = [f"tests/test_{name}.py" for name in names]
    return [file for file in files if (project / file).exists()]


def hunt(project, bug, known):
    """The first test that fails with this bug and not without it, likely files first, or None."""
    for names in (bug.tests.split(), [name for name in FAST if name not in bug.tests.split()]):
        files = files_of(project, names)
        if files and (failed := failures(project, files, bug, known)):
            return failed[0].removeprefix("tests/")


def show_list(numbered):
    """The exercise: each bug, where it was seen, what goes wrong. No answers."""
    print(f"Here are {len(numbered)} bugs, most of public RLHF code. Which test catches each?\n")
    for number, bug in numbered:
        print(f"{number:2}. {bug.title}   ({bug.file}; seen: {bug.seen})")
        print(textwrap.fill(bug.wrong, 96, initial_indent="    ", subsequent_indent="    ") + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the bugs as an exercise, "
                        "without answers")
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
    missed = 0
    with tempfile.TemporaryDirectory() as folder, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        project = Path(folder)
        copy_project(ROOT, project)         # one state for all bugs, whatever is edited meanwhile
        files = files_of(project, FAST)
        known = sum(pool.map(lambda file: failures(project, [file]), files), [])
        for test in known:
            print(f"{test} fails on the source as it is, so it counts for nothing here", flush=True)
        caught = pool.map(lambda item: hunt(project, item[1], known), numbered)
        for (number, bug), test in zip(numbered, caught):
            missed += test is None
            print(f"{number:2}. {bug.title:<60}  {bug.seen:<52}  {test or 'NOT CAUGHT'}",
                  flush=True)
    print(f"{len(numbered) - missed} of {len(numbered)} bugs caught")
    sys.exit(missed > 0 or len(known) > 0)


if __name__ == "__main__":
    main()
