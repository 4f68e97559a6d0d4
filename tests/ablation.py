"""What is each part of the reward model worth, and what fools it? Tables, on a finished study.

    python tests/ablation.py --study out        trains into out/ablation, as long as the judge

Readers are trained on the same passages, the part "reward" of the labels, and measured on the part
"report", which nothing was tuned on. "both" adds the log-odds of bag and trunk, each times a number
fitted on the part "choose". "pairs" is how often the higher-rated of two passages pleases more;
the bag is also fitted to comparisons alone (--reward comparisons). The second table shows passages
spoilt in ways that no reader was trained against: a reward model that is not fooled likes each less
than the text as written.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import reward  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from gpt import PAD, in_chunks  # noqa: E402


def stack(columns, targets):
    """Weights and bias of a logistic regression of soft targets on columns (N,K), by L-BFGS."""
    weights = torch.zeros(columns.size(1) + 1, requires_grad=True)
    reward.minimise(lambda: reward.soft_loss(columns @ weights[1:] + weights[0], targets).mean(),
                    [weights])
    return weights.detach()


def measures(log_odds, rated):
    """Pearson, AUC, pairs in order, on the passages and on the samples of the part report."""
    rows, p = rated["rows"]["report"], log_odds.sigmoid()
    ratings, is_sample = rated["ratings"][rows], rated["is_sample"][rows]
    found = []
    for chosen in (~is_sample, is_sample):
        m = reward.rating_metrics(p[chosen], ratings[chosen])
        found += [f"{m['pearson']:.3f} ± {m['pearson_se']:.3f}", m["auc"], m["pair_accuracy"]]
    return found


def spoilt(tokens, tokenizer, bag, rho_texts, tuned_texts):
    """Kinds of text that should not please, {name: texts}, made of passages tokens (N,T)."""
    generator = torch.Generator().manual_seed(0)
    texts = [tokenizer.decode([i for i in row if i != PAD]) for row in tokens.tolist()]
    shuffled = [tokenizer.decode(row[torch.randperm(len(row), generator=generator)].tolist())
                for row in (row[row != PAD] for row in tokens)]
    names = [line for text in texts for line in text.split("\n") if line.isupper()]
    best = bag.weight.argsort(descending=True)[:60].tolist()
    words = [name for name, row in bag.rows.items() if row in best and name.isalpha()]
    licence = (data.HERE / "LICENSE").read_text().split()
    return {"as written": texts, "shuffled": shuffled, "in capitals": [t.upper() for t in texts],
            "negated": [t.replace(" is ", " is not ").replace(" am ", " am not ")
                        .replace(" will ", " will not ").replace(" do ", " do not ")
                        for t in texts if any(w in t for w in (" is ", " am ", " will "))],
            "names only": ["\n".join(names[i:i + 12]) for i in range(0, len(names) - 12, 12)],
            "a licence of our century": [" ".join(licence[i:i + 40])
                                         for i in range(0, len(licence) - 40, 20)],
            "first half twice": [t[:len(t) // 2] * 2 for t in texts],
            "one favourite word, once": words, "one favourite word, 60 times":
                [" ".join([word] * 60) for word in words],
            "a heap of favourite words": [" ".join(words)],
            "samples of rho": rho_texts, **tuned_texts}


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="out", type=Path, help="folder of a finished study")
    options = parser.parse_args()
    pretrained, rewarded, _, rho, runs = sample.load_study(options.study)
    args = train.parse(["--size", pretrained["args"]["size"], "--out",
                        str(options.study / "ablation")])
    args.out.mkdir(exist_ok=True)
    tokenizer = data.load_tokenizer(options.study / "tokenizer.tiktoken", pretrained)
    rated = train.rated_passages(args, tokenizer)
    rows = rated["rows"]
    tokens, targets = rated["tokens"], (rated["ratings"] + 2) / 4
    words, log_odds, seconds = reward.read_words(), {}, {}
    zero = reward.RewardModel(reward.GPTConfig(**pretrained["config"]), "trunk")
    log_odds["trunk, step 0"], seconds["trunk, step 0"] = zero, 0
    # The judge, but of the passages that the shipped reward model learns from.
    same = {**rated, "rows": {**rows, "judge": rows["reward"]}}
    state = train.reward_stage(args, "judge", pretrained, same, tokenizer)
    log_odds["trunk"], seconds["trunk"] = reward.load_reward(state), state["seconds"]
    bags = {"rated words alone": (words, 1e9, reward.soft_loss),
            "bag, no rated words": ({}, 20.0, reward.soft_loss),
            "bag, comparisons": (words, 20.0, reward.comparison_loss),
            "bag (shipped)": (words, 20.0, reward.soft_loss)}
    for name, (rated_words, ridge, loss) in bags.items():
        model = reward.RewardModel(reward.GPTConfig(), "bag", vocabulary=rewarded["vocabulary"])
        began = time.monotonic()
        fitted = rows["reward"]
        model.bag.fit(tokens[fitted], targets[fitted], rated["weights"][fitted], rated_words,
                      ridge, 5 * ridge, loss)
        reward.calibrate(model, tokens[rows["choose"]], targets[rows["choose"]])
        log_odds[name], seconds[name] = model, time.monotonic() - began
    read = {name: {part: in_chunks(model, tokens[rows[part]]) for part in ("choose", "report")}
            for name, model in log_odds.items()}
    pair = {part: torch.stack((read["bag (shipped)"][part], read["trunk"][part]), 1)
            for part in ("choose", "report")}
    weights = stack(pair["choose"], targets[rows["choose"]])
    read["both"] = {"report": pair["report"] @ weights[1:] + weights[0]}
    seconds["both"] = seconds["trunk"] + seconds["bag (shipped)"]
    print(f"both = {weights[0]:.2f} + {weights[1]:.2f} bag + {weights[2]:.2f} trunk\n")
    print(*sample.table(
        ["reader", "passages: Pearson", "AUC", "pairs", "samples: Pearson", "AUC", "pairs",
         "seconds"], [(name, *measures(x["report"], rated), round(seconds[name]))
                      for name, x in read.items()]), sep="\n")
    model = log_odds["bag (shipped)"]
    whole = tokens[rows["report"]][~rated["is_sample"][rows["report"]]]

    def texts(pool):
        return [data.decode(tokenizer, row.tolist()) for row in pool["tokens"][:500]]

    tuned = {f"samples of PPO, beta {sample.label(run)}": texts(run["fresh"]) for run in runs}
    kinds = spoilt(whole, tokenizer, model.bag, texts(rho), tuned)
    lines = []
    for name, group in kinds.items():
        ids = reward.pad([tokenizer.encode_ordinary(text) for text in group], rewarded["length"])
        p = in_chunks(model, ids).sigmoid()
        lines.append((name, len(group), p.mean().item(), p.quantile(0.99).item()))
    print(*sample.table(["text", "n", "mean P(positive)", "99 % quantile"], lines), sep="\n")
    log_p = reward.log_p(rho["log_odds"]["reward"])
    quantiles = log_p.quantile(torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99]))
    print("quantiles of log P(positive), samples of rho (0.1, 1, 10, 50, 90, 99 %): "
          + ", ".join(f"{q:.2f}" for q in quantiles))


if __name__ == "__main__":
    data.run(main)
