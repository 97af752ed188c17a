"""Where the relay's gain comes from: the state of a trained text model is changed, and its predictions followed.

    python benchmarks/states.py runs/text [--arm "relay, W = 2"] [--beside rollout]

reads the models of `python benchmarks/study.py text`. First, all held-out prompts are decoded with the state unchanged,
of zeros, of another row, and with none. Then each denoise step of the model is looked at: which part of the positions
that are still masked does it already predict as its final text will have them? The same tokens are also shown to the
model with a changed state, and to a model that was trained without one. Last, from the second step on, by how far away
the nearest digit before is that is revealed: which positions gain? Prints tables and draws a picture.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from study_results import score_at, table
from study_runner import STATES, Runner
from text_workload import BLOCK, SUB_BLOCK, Balances
from torch import Tensor
from transformers.utils import logging

from relay_hf import RelayForMaskedDiffusion
from relay_hf.modeling.unmasking_relay import in_earliest_sub_block, make_policy, sub_blocks_of
from relay_hf.pictures.style import INK, choose_styles, new_figure, save_figure

THRESHOLD = 0.9
SHOWN = (1, 2, 3, 4, 6, 8)  # steps of the tables
MISTAKES = 5  # in the first step of the reply that is drawn
KINDS = {"revealed": "#E6E6E6", "masked, predicted right": "#9CCBEB", "masked, predicted wrong": "#F2A679"}
# Digits from the last one before that is revealed; the balance before the reply is known.
DISTANCES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, BLOCK))
OWN, BESIDE = "relay", "rollout"  # labels, which have their colours in all pictures
VIEWS: dict[str, dict[str, Any]] = {
    OWN: {},
    **{f"relay, state of {name}": {"state": name} for name in STATES},
    "relay, no state": {"use_relay": False},
}


@torch.inference_mode()
def predict(model: RelayForMaskedDiffusion, ids: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Most probable tokens of the reply (B, S), their probabilities, and the next state (B, L, W)."""
    output = model(ids, relay_state=state)
    logits = output.logits[:, BLOCK:].float()
    logits[..., model.config.mask_token_id] = -torch.inf
    probability, token = logits.softmax(-1).max(-1)
    return token, probability, output.relay_state


def follow(
    model: RelayForMaskedDiffusion, beside: RelayForMaskedDiffusion, prompts: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Denoises replies of one block as `generate` does, without a cache.

    Args:
        model: the relay model, whose predictions decide.
        beside: a model without a state, that sees the same tokens.
        prompts: (B, S), one block each.

    Yields:
        The (B, S) bool positions that are masked before a step, and the (B, S) tokens that each view predicts there;
        last, no masks and the final text as `"final"`.
    """
    policy, mask = make_policy("confidence_threshold", THRESHOLD), model.config.mask_token_id
    ids = torch.cat([prompts, torch.full_like(prompts, mask)], 1)
    state = model.relay.initial_state(*ids.shape, ids.device)
    # A token-shift model knows a block's first token from the prompt.
    ids[:, BLOCK] = predict(model, ids, state)[0][:, 0]
    sub_blocks = sub_blocks_of(BLOCK, SUB_BLOCK, torch.zeros(len(ids), dtype=torch.long))
    while (masked := ids[:, BLOCK:] == mask).any():
        token, probability, after = predict(model, ids, state)
        seen = {OWN: token, BESIDE: predict(beside, ids, None)[0]}
        for name, change in STATES.items():
            seen[f"relay, state of {name}"] = predict(model, ids, change(state))[0]
        seen["relay, no state"] = predict(model, ids, None)[0]
        yield masked, seen
        reveal = masked & policy(probability, masked & in_earliest_sub_block(masked, sub_blocks))
        ids[:, BLOCK:] = torch.where(reveal, token, ids[:, BLOCK:])
        state = after
    yield masked, {"final": ids[:, BLOCK:]}


def agreement(
    steps: Iterable[tuple[Tensor, dict[str, Tensor]]], answers: Tensor | None = None
) -> dict[str, list[float]]:
    """View -> percent of the masked positions that each step predicts as the final text, or the answer, has them.

    Steps that less than a quarter of the rows take are left out.

    Args:
        steps: what `follow` yields.
        answers: (B, S) the right replies; None = the final text.
    """
    *taken, (_, last) = steps
    wanted = last["final"] if answers is None else answers
    taken = [(masked, seen) for masked, seen in taken if masked.any(-1).float().mean() >= 0.25]
    return {
        view: [100 * (seen[view] == wanted)[masked].float().mean().item() for masked, seen in taken]
        for view in taken[0][1]
    }


def agreement_by_distance(steps: Iterable[tuple[Tensor, dict[str, Tensor]]], answers: Tensor) -> dict[str, list[float]]:
    """View -> percent of the masked positions that the second step and those after it predict as the answer has them,
    at each of `DISTANCES`; NaN where no position is as far.

    Args:
        steps: what `follow` yields.
        answers: (B, S) the right replies.
    """
    _, *taken, _ = steps
    found: dict[str, list[float]] = {view: [] for view in taken[0][1]}
    places = torch.arange(answers.shape[1])
    revealed = [torch.where(masked, -1, places).cummax(1).values for masked, _ in taken]  # last one up to a position
    for least, most in DISTANCES:
        chosen = [
            masked & (places - last >= least) & (places - last <= most)
            for (masked, _), last in zip(taken, revealed, strict=True)
        ]
        for view, shares in found.items():
            right = [(seen[view] == answers)[where] for (_, seen), where in zip(taken, chosen, strict=True)]
            shares.append(100 * torch.cat(right).float().mean().item())
    return found


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """One line per view: mean over the seeds, as far as all of them go, with bars of one standard deviation."""
    figure = new_figure("What a denoise step already knows of the final text")
    axes, styles = figure.add_subplot(), choose_styles(curves)
    for view, of_seeds in curves.items():
        steps = min(map(len, of_seeds))
        values = np.array([values[:steps] for values in of_seeds])  # (seeds, steps)
        colour, marker = styles[view]
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        axes.errorbar(range(1, steps + 1), values.mean(0), spread, label=view, color=colour, marker=marker, capsize=2)
    axes.set_xlabel("denoise step", color=INK)
    axes.set_ylabel("masked positions predicted as they will be (%)", color=INK)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)


def hard_row(steps: list[tuple[Tensor, dict[str, Tensor]]], answers: Tensor) -> int:
    """The first row of which the first step predicts `MISTAKES` digits wrong, so that there is something to mend."""
    masked, seen = steps[0]
    wrong = (masked & (seen[OWN] != answers)).sum(1)
    return int((wrong >= MISTAKES).int().argmax())


def draw_reply(steps: list[tuple[Tensor, dict[str, Tensor]]], row: int, workload: Balances, path: Path) -> None:
    """The digits that each step of one reply predicts, by the model itself and by the one without a state.

    Args:
        steps: what `follow` yields for held-out prompts.
        row: which prompt.
        workload: of the prompts.
        path: where to write.
    """
    *taken, (_, last) = steps
    taken = [(masked, seen) for masked, seen in taken if masked[row].any()]
    prompt = workload.asked(row + 1, seed=0, held_out=True)[row]
    right, final = workload.tokenizer(prompt["answer"])["input_ids"], last["final"][row].tolist()
    figure = new_figure("One reply: what each denoise step predicts", height=1.4 + 0.5 * len(taken))
    titles = {BESIDE: "trained without a state, shown the same tokens", OWN: "with the relay"}
    for axes, (view, title) in zip(figure.subplots(len(titles), 1), titles.items(), strict=True):
        kinds = np.zeros((len(taken), len(right)), int)
        for step, (masked, seen) in enumerate(taken):
            for place, token in enumerate(final):
                token = seen[view][row, place].item() if masked[row, place] else token
                kinds[step, place] = masked[row, place] * (1 + (token != right[place]))
                axes.text(
                    place, step, workload.tokenizer.decode([token]), ha="center", va="center", fontsize=8, color=INK
                )
        axes.imshow(kinds, ListedColormap(list(KINDS.values())), vmin=0, vmax=len(KINDS) - 1, aspect="auto")
        axes.set_xticks(range(len(right)), prompt["prompt"])
        axes.set_yticks(range(len(taken)), range(1, len(taken) + 1))
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_ylabel("denoise step", fontsize=8, color=INK)
        axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("movement that the digit answers", fontsize=8, color=INK)
    patches = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=8)
    save_figure(figure, path)


def run(folder: Path, arm: str, beside: str, **sizes: Any) -> str:
    """Both tables, as Markdown; they and the picture are written into the folder."""
    workload = Balances(**sizes)
    runner = Runner(workload, {}, folder)
    seeds = [line["seed"] for line in runner.results.lines() if (line["arm"], line["budget"]) == (arm, "steps")]
    scores: dict[str, dict[int, list[float]]] = {view: {} for view in VIEWS}
    known: dict[str, dict[str, list[list[float]]]] = {"final text": {}, "answer": {}}
    far: dict[str, dict[int, list[float]]] = {}
    asked, right = map(torch.tensor, workload.tokens(workload.asked(workload.test_rows, seed=0, held_out=True)))
    for seed in seeds:
        model, other = runner.model_of(arm, seed).eval(), runner.model_of(beside, seed).eval()
        for view, options in VIEWS.items():
            curve = runner.curve(model, seed, **options)
            scores[view][seed] = [score_at(curve, forwards) for forwards in workload.forwards]
        steps = list(follow(model, other, asked))
        for target, answers in (("final text", None), ("answer", right)):
            for view, values in agreement(steps, answers).items():
                known[target].setdefault(view, []).append(values)
        if seed == seeds[0]:
            draw_reply(steps, hard_row(steps, right), workload, folder / "reply.png")
        for view, values in agreement_by_distance(steps, right).items():
            far.setdefault(view, {})[seed] = values
    draw(known["final text"], folder / "states.png")
    columns = [f"{forwards:g} forwards" for forwards in workload.forwards]
    parts = [table("exact match, %", columns, scores), table(f"exact match, %, minus `{OWN}`", columns, scores, OWN)]
    for target, curves in known.items():
        padded = {view: [[*values, *[np.nan] * max(SHOWN)] for values in of_seeds] for view, of_seeds in curves.items()}
        at_steps = {
            view: {seed: [values[step - 1] for step in SHOWN] for seed, values in zip(seeds, of_seeds, strict=True)}
            for view, of_seeds in padded.items()
        }
        names, title = [f"step {step}" for step in SHOWN], f"predicted as in the {target}, %"
        parts += [table(title, names, at_steps), table(f"{title}, minus `{OWN}`", names, at_steps, OWN)]
    names = [f"{least} away" if least == most else f"{least} to {most}" for least, most in DISTANCES]
    title = "predicted as in the answer, %, from step 2 on"
    parts += [table(title, names, far), table(f"{title}, minus `{OWN}`", names, far, OWN)]
    text = "\n\n".join(parts)
    (folder / "states.md").write_text(text + "\n", encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of the study, with its default sizes")
    parser.add_argument("--arm", default="relay, W = 2")
    parser.add_argument("--beside", default="rollout", help="an arm without a state that sees the same tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    print(run(options.folder, options.arm, options.beside))


if __name__ == "__main__":
    main()
