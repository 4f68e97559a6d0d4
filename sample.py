"""Samples from any checkpoint: the last step of the reader's path.

    python sample.py                                                   the pretrained model's, from out/
    python sample.py --checkpoint out/ppo_beta0.2.pt --num 20          a tuned model's, with Positive Prob
    python sample.py --checkpoint out/ppo_beta0.2.pt --compare         the pretrained model's before each
    python sample.py --checkpoint out/ppo_beta0.2.pt --jsonl           {"text":, "positive":, "ref_kl":} a line

Positive Prob is what the reward model beside the checkpoint says of the text; ref_kl is
log pi - log rho of the tokens drawn, in nats: at temperature 1 its mean is KL(pi to rho).
"""

import argparse
import json
from pathlib import Path

import torch

import data
import reward
from gpt import completion_logits, generate, in_chunks, load_gpt
from ppo import token_logprobs


def parse():
    """The options; Parser answers what is out of range with one line."""
    count = data.number(int, 1)
    parser = data.Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="out/pretrain.pt", help="pretrain.pt or ppo_beta*.pt, in the folder that train.py wrote")
    parser.add_argument("--num", type=count, default=5, help="how many samples")
    parser.add_argument("--length", type=count, default=64, help="tokens of each")
    parser.add_argument("--prompt", default="", help="text to continue; empty: begin where a speech begins")
    parser.add_argument("--temperature", type=data.number(float, 0), default=1.0, help="below 1 plays safe, 0 always takes the likeliest token")
    parser.add_argument("--top-k", type=count, help="draw from the k likeliest tokens only (unset: from all, as in training)")
    parser.add_argument("--seed", type=data.number(int, 0, 2**31), default=0, help="the same seed gives the same samples")
    parser.add_argument("--best-of", type=count, default=1, metavar="N", help="of N samples show the one that the reward model likes best")
    parser.add_argument("--compare", action="store_true", help="show the pretrained model's samples as well, side by side")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a line, for other programs")
    return parser.parse_args()


def load(path):
    """(GPT, its checkpoint, tokenizer) of a checkpoint file and the tokenizer beside it."""
    state = data.load_checkpoint(path, "pretrain", "ppo")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    return load_gpt(state), state, tokenizer


def beside(path, state, kind):
    """The pretrain or reward checkpoint beside a checkpoint, None if there is none; UserError unless they belong together."""
    file = path.with_name(f"{kind}.pt")
    if not file.exists():
        return None
    found = data.load_checkpoint(file, kind)
    one, other = (state["inputs"][kind], found["model"]) if state["kind"] == "ppo" else (found["inputs"]["pretrain"], state["model"])
    if one != data.digest(other):
        raise data.UserError(f"{file} and {path} are not of the same study. Run train.py again.")
    return found


@torch.no_grad()
def draw(model, prompt, args, judge, rho):
    """args.num samples as (tokens, P(positive) or None, ref_kl or None); of each args.best_of the likeliest positive."""
    generator = torch.Generator().manual_seed(args.seed)
    start = prompt.size(1)
    skip = 0 if args.prompt else start                  # an unprompted sample is shown and judged without the boundary
    samples = []
    for _ in range(args.num):
        tokens = generate(model, prompt.expand(args.best_of, -1), args.length, args.temperature, args.top_k, generator)
        p = reward.positive(judge, tokens[:, skip:]) if judge else torch.zeros(len(tokens))
        best = tokens[p.argmax()][None]
        new = best[:, start:]
        kl = [token_logprobs(completion_logits(m, prompt, new), new).sum().item() for m in (model, rho)] if rho else None
        samples.append((best[0, skip:].tolist(), p.max().item() if judge else None, kl[0] - kl[1] if kl else None))
    return samples


def main():
    args = parse()
    path = Path(args.checkpoint)
    model, state, tokenizer = load(path)
    judged, base = beside(path, state, "reward"), beside(path, state, "pretrain") if state["kind"] == "ppo" else None
    judge, rho = judged and reward.load_reward(judged), base and load_gpt(base)
    if judge is None and args.best_of > 1:
        raise data.UserError(f"--best-of needs the reward model, and {path.with_name('reward.pt')} is not there. Run train.py first.")
    if args.compare and rho is None:
        raise data.UserError("--compare needs a ppo checkpoint with its pretrain.pt beside it.")
    ids = tokenizer.encode_ordinary(args.prompt) if args.prompt else tokenizer.encode_ordinary(data.BOUNDARY)[:1]
    if len(ids) + args.length > model.config.block_size:
        raise data.UserError(f"a prompt of {len(ids)} tokens and --length {args.length} do not fit the context of "
                             f"{model.config.block_size} tokens. Shorten either.")
    prompt = torch.tensor([ids])
    rows = [draw(model, prompt, args, judge, rho)]
    if args.compare and rho:
        rows.insert(0, draw(rho, prompt, args, judge, None))
    for number, together in enumerate(zip(*rows), 1):
        for name, (tokens, p, kl) in zip(["before", "after"] if len(rows) > 1 else [""], together):
            text = tokenizer.decode(tokens)
            if args.jsonl:
                print(json.dumps({"text": text, "positive": p, "ref_kl": kl, **({"model": name} if name else {})}, ensure_ascii=False))
                continue
            print(f"----- {number} {name}".rstrip() + f"\n{text}\n")
            said = [] if p is None else [f"Positive Prob: {100 * p:.1f}%"]
            print("   ".join(said if kl is None else [*said, f"KL: {kl:.1f} nats"]) + "\n")


if __name__ == "__main__":
    data.run(main)
