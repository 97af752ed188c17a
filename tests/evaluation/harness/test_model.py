"""The model `relay` of lm-evaluation-harness: its public functions, and end to end with tasks of local files."""

import copy
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen2ForCausalLM

from relay_hf import RelayForMaskedDiffusion
from relay_hf.evaluation.harness import GENERATION_OPTIONS, RelayLM
from relay_hf.evaluation.likelihood import LikelihoodBound
from relay_hf.evaluation.stop_texts import StopTexts

from ...conftest import text_config

# Some are the beginning of another, or equal.
CONTEXTS = ["Tell me", "abc", "Tell me a story about cats", "Tell", "x", "abc", "eight ch"]


def generation_requests(contexts: list[str], task: str = "write", **options: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, dict(options)), 0, metadata=(task, number, 1))
        for number, context in enumerate(contexts)
    ]


def likelihood_requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0, metadata=("score", i, 1)) for i, pair in enumerate(pairs)]


def alone(model: RelayForMaskedDiffusion, tokenizer: Any, context: str, **options: Any) -> Any:
    prompt = tokenizer(context, return_tensors="pt")
    output = model.generate(**prompt, return_dict_in_generate=True, **options)
    return tokenizer.decode(output.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True), output


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, [None], "", [""]], ids=["null", "list of null", "empty", "list of empty"])
def test_generate_until_no_text_stops_at_none(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any, until: Any
) -> None:
    model = text_model(block_size=8)
    lm = RelayLM(model, tokenizer=tokenizer)
    written = lm.generate_until(generation_requests(CONTEXTS[:1], until=until, max_gen_toks=20), disable_tqdm=True)
    assert written == [alone(model, tokenizer, CONTEXTS[0], max_new_tokens=20)[0]]


@pytest.mark.parametrize("block_size", [8, None])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generate_until_equals_generate_alone_cut_at_the_stop_text(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any, block_size: int | None, batch_size: int
) -> None:
    model = text_model(block_size=block_size, token_shift=block_size is not None)
    whole = [alone(model, tokenizer, context, max_new_tokens=20)[0] for context in CONTEXTS]
    # The second goes across a block border: the context before it has 26 tokens, and blocks have 8.
    stop = [whole[0][9:11], whole[2][4:7]]
    cut = [min((text.split(s)[0] for s in stop), key=len) for text in whole]
    assert [len(text) for text in whole] == [20] * len(whole)
    assert cut != whole

    lm = RelayLM(model, tokenizer=tokenizer, batch_size=batch_size)
    written = lm.generate_until(generation_requests(CONTEXTS, until=stop, max_gen_toks=20), disable_tqdm=True)
    assert written == cut
    for context, text, record in zip(CONTEXTS, whole, lm.generation_forwards, strict=True):
        # The first stop text ends the row in the block it completes, and the row's later tokens are never computed.
        ends = [text.index(s) + len(s) for s in stop if s in text]
        assert record.new_tokens == min(ends, default=20)
        rows = RelayLM(model, tokenizer=tokenizer)
        rows.generate_until(generation_requests([context], until=stop, max_gen_toks=20), disable_tqdm=True)
        assert vars(rows.generation_forwards[0]) == {**vars(record), "doc_id": 0}
    # Without stop texts the counts are those of `generate`.
    lm = RelayLM(model, tokenizer=tokenizer, batch_size=batch_size)
    lm.generate_until(generation_requests(CONTEXTS, max_gen_toks=20), disable_tqdm=True)
    for context, record in zip(CONTEXTS, lm.generation_forwards, strict=True):
        output = alone(model, tokenizer, context, max_new_tokens=20)[1]
        for name in ("denoise_forwards", "commit_forwards", "prefill_forwards"):
            assert getattr(record, name) == int(getattr(output, name)[0])


def test_generate_until_requests_of_several_tasks_share_batches(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model = text_model(block_size=8)
    requests = [
        request
        for task, contexts in {"first": CONTEXTS[:3], "second": CONTEXTS[1:4]}.items()
        for request in generation_requests(contexts, task, max_gen_toks=9)
    ]
    generate, batches = model.generate, []
    model.generate = lambda **options: batches.append(len(options["input_ids"])) or generate(**options)
    lm = RelayLM(model, tokenizer=tokenizer, batch_size=4)
    written = lm.generate_until(requests, disable_tqdm=True)
    assert batches == [4, 2]
    assert written == [alone(model, tokenizer, request.args[0], max_new_tokens=9)[0] for request in requests]
    assert [(r.task_name, r.doc_id) for r in lm.generation_forwards] == [(r.task_name, r.doc_id) for r in requests]


def test_stop_text_counts_new_tokens_only(tokenizer: Any) -> None:
    ids = tokenizer(["say a", "x[EOS]"], padding=True, padding_side="left", return_tensors="pt")["input_ids"]
    stops = StopTexts(tokenizer, ["ab", "", "[EOS]"], ids.shape[1])
    for new, expected in {"b": False, "ab": True, "aXb": False, "xxxxab": True, "x[EOS]": True}.items():
        written = torch.tensor(tokenizer([new, "x" * len(tokenizer(new)["input_ids"])])["input_ids"])
        assert stops(torch.cat([ids, written], dim=-1), None).tolist() == [expected, False]


def test_generate_until_padding_that_is_the_stop_token_ends_no_other_row(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    """The harness pads with [EOS] where a tokenizer has no [PAD], and takes [EOS] for a stop text."""
    model = text_model(seed=3)
    model.generation_config.suppress_tokens.remove(tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    whole = [alone(model, tokenizer, context, max_new_tokens=40)[0] for context in CONTEXTS]
    assert min(map(len, whole)) < 8 < 20 < max(map(len, whole)) < 40
    padding_with_eos = copy.deepcopy(tokenizer)
    padding_with_eos.pad_token = tokenizer.eos_token
    lm = RelayLM(model, tokenizer=padding_with_eos, batch_size=8)
    assert lm.generate_until(generation_requests(CONTEXTS, max_gen_toks=40), disable_tqdm=True) == whole


@pytest.mark.parametrize(
    "option",
    [
        {"unmasking_threshold": 1.0},
        {"use_relay": False},
        {"sub_block_size": 2},
        {"unmasking_policy": "confidence_budget"},
        {"use_sub_block_cache": True},
        {"fuse_commits": True},
        {"relay_start": "self"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_decoding_options_by_model_and_by_task_act_as_in_generate(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any, option: dict[str, Any]
) -> None:
    model = text_model(token_shift=True)
    model.generation_config.sub_block_size = 4
    text, output = alone(model, tokenizer, CONTEXTS[0], max_new_tokens=30, **option)
    plain = alone(model, tokenizer, CONTEXTS[0], max_new_tokens=30)
    assert (text, int(output.denoise_forwards)) != (plain[0], int(plain[1].denoise_forwards))
    for for_model, for_task in ((option, {}), ({}, option)):
        lm = RelayLM(model, tokenizer=tokenizer, **for_model)
        requests = generation_requests(CONTEXTS[:1], max_gen_toks=30, **for_task)
        assert lm.generate_until(requests, disable_tqdm=True) == [text]
        assert lm.generation_forwards[0].denoise_forwards == int(output.denoise_forwards)


def test_static_steps_by_model_write_the_same(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model = text_model(token_shift=True)
    lm = RelayLM(model, tokenizer=tokenizer, batch_size=4, cache_implementation="static")
    written = lm.generate_until(generation_requests(CONTEXTS, max_gen_toks=20), disable_tqdm=True)
    assert written == [alone(model, tokenizer, context, max_new_tokens=20)[0] for context in CONTEXTS]
    assert model.static_rooms.kept


def test_decoding_options_are_those_of_generate_that_tasks_do_not_set(
    text_model: Callable[..., RelayForMaskedDiffusion],
) -> None:
    ours = text_model().generation_config.to_dict().keys() - GenerationConfig().to_dict().keys()
    assert set(GENERATION_OPTIONS) == ours - {"t_max", "t_min", "sampling_seeds", "output_history"}


def test_checkpoint_that_samples_by_a_schedule_decodes_greedily_unless_a_task_samples(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model = text_model()
    text = alone(model, tokenizer, "abc", max_new_tokens=12)[0]
    model.generation_config.update(do_sample=True, t_max=9.0, t_min=5.0)
    lm = RelayLM(model, tokenizer=tokenizer)
    assert lm.generate_until(generation_requests(["abc"], max_gen_toks=12), disable_tqdm=True) == [text]
    assert lm.loglikelihood(likelihood_requests([("abc", text)]), disable_tqdm=True)[0][1]
    sampled = generation_requests(["abc"], max_gen_toks=12, do_sample=True, temperature=1.0)
    assert lm.generate_until(sampled, disable_tqdm=True) != [text]


def test_sampling_with_temperature_is_passed_on(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    lm = RelayLM(text_model(), tokenizer=tokenizer, batch_size=2)
    requests = generation_requests(["abc"] * 4, max_gen_toks=12, do_sample=True, temperature=5.0)
    assert len(set(lm.generate_until(requests, disable_tqdm=True))) > 1
    assert lm.generation_forwards[3].new_tokens == 12


# -- log-likelihood ---------------------------------------------------------------------------------------------------


def test_loglikelihood_is_bound_and_greedy_match_in_any_batch_and_order(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model = text_model(token_shift=True)
    greedy = {context: alone(model, tokenizer, context, max_new_tokens=13)[0] for context in CONTEXTS}
    pairs = [(context, text) for context, text in greedy.items()]
    pairs += [(context, text[:5]) for context, text in greedy.items()]  # sub-blocks: the beginning may differ, or not
    pairs += [(context, "z" + text[1:]) for context, text in greedy.items()]
    pairs += [("", "hello"), ("Tell me ", "more")]
    answers = {}
    for batch_size, order in ((1, 1), (4, -1), (64, 1)):
        lm = RelayLM(model, tokenizer=tokenizer, batch_size=batch_size, mc_samples=5)
        found = lm.loglikelihood(likelihood_requests(pairs[::order]), disable_tqdm=True)
        answers[batch_size] = found[::order]
    for size in (4, 64):
        assert [is_greedy for _, is_greedy in answers[size]] == [is_greedy for _, is_greedy in answers[1]]
        assert [value for value, _ in answers[size]] == pytest.approx([value for value, _ in answers[1]], rel=1e-5)
    is_greedy = [answer[1] for answer in answers[1]]
    assert all(is_greedy[: len(greedy)])
    assert not any(is_greedy[2 * len(greedy) : 3 * len(greedy)])

    # An empty context is the end-of-text token; a space at the end of the context belongs to the continuation.
    ids = [tokenizer(text)["input_ids"] for text in ("Tell me", " more", "hello")]
    tokens = [([tokenizer.eos_token_id], ids[2]), (ids[0], ids[1])]
    expected = [value for _, value in sorted(LikelihoodBound(model, samples=5)(tokens))]
    assert [answer[0] for answer in answers[1][-2:]] == expected


def test_loglikelihood_greedy_match_ends_at_the_stop_token_whoever_shares_the_batch(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model = text_model(token_shift=True)
    text = alone(model, tokenizer, "abc", max_new_tokens=12)[0]
    model.generation_config.eos_token_id = tokenizer(text[6])["input_ids"][0]
    stopped, output = alone(model, tokenizer, "abc", max_new_tokens=12)
    length = output.sequences.shape[1] - 3
    assert length < 12
    pairs = [("abc", stopped), ("abc", text), ("abc", stopped + "[PAD]" * (12 - length)), ("Tell me", "x" * 12)]
    for batch in (pairs, pairs[:3]):
        found = RelayLM(model, tokenizer=tokenizer, batch_size=4).loglikelihood(likelihood_requests(batch))
        assert [is_greedy for _, is_greedy in found][:3] == [True, False, True]


def test_loglikelihood_runs_the_longest_first_in_batches_and_shows_progress(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    model = text_model(block_size=8)
    pairs = [("abcdefgh" * n, "bc") for n in (1, 3, 2)] + [("a" * 24, "de"), ("a" * 24, "fgh")]
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)), prepend=True)
    generate, batches = model.generate, []
    model.generate = lambda **options: batches.append(options["input_ids"].shape) or generate(**options)
    RelayLM(model, tokenizer=tokenizer, batch_size="auto").loglikelihood(likelihood_requests(pairs))
    assert [tuple(shape) for shape in batches] == [(1, 24), (4, 24)]
    assert shapes[-9:][::3] == [(2, 24), (1, 16), (1, 8)]  # a prefill and the two passes over the masks of each shape
    printed = capsys.readouterr().err
    assert "Decoding greedily: 100%" in printed
    assert "Bounding log-likelihoods: 100%" in printed


def test_loglikelihood_settings_reach_the_bound(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    model, requests = text_model(), likelihood_requests([("Tell me", "abcdefg")])
    values = [
        RelayLM(model, tokenizer=tokenizer, **options).loglikelihood(requests, disable_tqdm=True)[0][0]
        for options in ({}, {"mc_samples": 31}, {"mc_seed": 1}, {"use_relay": False})
    ]
    assert len(set(values)) == 4


def test_loglikelihood_of_long_request_drops_the_beginning_of_the_context(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    lm = RelayLM(text_model(), tokenizer=tokenizer, max_length=20)
    long, short = lm.loglikelihood(likelihood_requests([("x" * 90 + "y" * 14, "abcdef"), ("y" * 14, "abcdef")]))
    assert long[1] == short[1]
    ids = [tokenizer(text)["input_ids"] for text in ("y" * 14, "abcdef")]
    assert long[0] == short[0] == next(lm.likelihood([tuple(ids)]))[1]
    with pytest.raises(ValueError, match="continuation has 20 tokens, but `max_length=20`"):
        lm.loglikelihood(likelihood_requests([("x", "a" * 20)]))


def test_loglikelihood_rolling_sums_windows_that_cover_the_text_once(
    text_model: Callable[..., RelayForMaskedDiffusion], tokenizer: Any
) -> None:
    lm = RelayLM(text_model(token_shift=True), tokenizer=tokenizer, max_length=20, mc_samples=4)
    texts = ["abcdefgh" * 6, "abc"]  # 48 tokens: windows of 19, 19 and 10
    found = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("p", 0, 1)) for text in texts], disable_tqdm=True
    )
    ids = [tokenizer(text)["input_ids"] for text in texts]
    windows = [([tokenizer.eos_token_id], ids[0][:19]), (ids[0][18:19], ids[0][19:38]), (ids[0][28:38], ids[0][38:])]
    assert found[0] == pytest.approx(sum(next(lm.likelihood([window]))[1] for window in windows))
    assert found[1] == next(lm.likelihood([([tokenizer.eos_token_id], ids[1])]))[1]


# -- end to end -------------------------------------------------------------------------------------------------------


def test_simple_evaluate_loads_by_path_and_reports_both_kinds_of_tasks(
    checkpoint: Path, tasks: Path, tokenizer: Any
) -> None:
    assert get_model("relay") is RelayLM
    results = lm_eval.simple_evaluate(
        model="relay",
        model_args={"pretrained": str(checkpoint), "mc_samples": 4, "unmasking_threshold": 0.5},
        tasks=["choose", "write"],
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    model = RelayForMaskedDiffusion.from_pretrained(checkpoint)
    for sample in results["samples"]["write"]:
        text, _ = alone(model, tokenizer, sample["doc"]["question"], max_new_tokens=10, unmasking_threshold=0.5)
        assert sample["filtered_resps"] == [text.split("a")[0]]
    estimate = LikelihoodBound(model, samples=4)
    correct = 0
    for sample in results["samples"]["choose"]:
        context, choices = tokenizer(sample["doc"]["question"])["input_ids"], sample["doc"]["choices"]
        bounds = [next(estimate([(context, tokenizer(f" {choice}")["input_ids"])]))[1] for choice in choices]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(bounds)
        correct += bounds.index(max(bounds)) == sample["doc"]["answer"]
    assert results["results"]["choose"]["acc,none"] == pytest.approx(correct / 3)
    assert (results["config"]["mc_samples"], results["config"]["mc_seed"]) == (4, 0)
    costs = results["config"]["generation_forwards"]["write"]
    assert costs["requests"] == 3
    assert 1 <= costs["denoise_forwards"] <= 10
    assert costs["new_tokens"] <= 10


def test_command_evaluates_a_checkpoint_and_writes_forwards(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relay_hf.evaluation", "--model", "relay", "--tasks", str(tasks / "write.yaml")]
    command += ["--model_args", f"pretrained={checkpoint},use_relay=False", "--device", "cpu", "--batch_size", "2"]
    command += ["--gen_kwargs", "unmasking_threshold=0.9", "--output_path", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout.replace(" ", "")
    assert "|Tasks|Version|Filter|n-shot|Metric|" in table
    assert "|write|" in table
    (path,) = tmp_path.glob("results*.json")
    assert json.loads(path.read_text())["config"]["generation_forwards"]["write"]["requests"] == 3


def test_checkpoint_of_the_research_fork_loads_by_path(reference: Path, tokenizer: Any, tmp_path: Path) -> None:
    shutil.copytree(reference / "checkpoint", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lm = RelayLM(str(tmp_path / "model"), device="cpu")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "Fast_dLLM_Qwen"
    assert lm.likelihood.carries_state
    expected = LikelihoodBound(RelayForMaskedDiffusion.from_pretrained(reference / "checkpoint"))
    assert list(lm.likelihood([([1, 2], [3, 4, 5])])) == list(expected([([1, 2], [3, 4, 5])]))


def test_plain_decoder_with_relay_options_and_adapter_loads_by_path(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(text_config(vocab_size=len(tokenizer)))
    base.save_pretrained(tmp_path / "base")
    options = {"mask_token_id": tokenizer.mask_token_id, "block_size": 8}
    model = RelayForMaskedDiffusion.from_pretrained(tmp_path / "base", **options)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = list(LikelihoodBound(adapted.eval())([([1, 2], [3, 4, 5])]))

    # Read back, a tokenizer beside a Qwen2 has one token more; the harness would resize the embeddings to fit.
    options["tokenizer"] = tokenizer
    plain = RelayLM(str(tmp_path / "base"), device="cpu", **options)
    lm = RelayLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu", **options)
    assert list(lm.likelihood([([1, 2], [3, 4, 5])])) == expected
    assert list(plain.likelihood([([1, 2], [3, 4, 5])])) != expected
    assert len(lm.generate_until(generation_requests(CONTEXTS, max_gen_toks=9), disable_tqdm=True)) == len(CONTEXTS)
    assert len(lm.loglikelihood(likelihood_requests([("a", "bc")]), disable_tqdm=True)) == 1


def test_command_without_the_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match=r"install lm-evaluation-harness with `pip install 'relay-hf\[eval\]'`"):
        runpy.run_module("relay_hf.evaluation", run_name="__main__")
