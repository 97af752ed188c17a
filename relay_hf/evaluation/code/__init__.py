"""Evaluation on code problems: `relay-hf eval MODEL` and `relay-hf compare A B`, see docs/evaluation.md."""

from .arguments import CodeEvalArguments, CompareArguments

__all__ = ["CodeEvalArguments", "CompareArguments", "run_evaluation"]


def run_evaluation(model: str, arguments: CodeEvalArguments) -> str:
    """Loads a model and evaluates it; returns a table for the terminal.

    Args:
        model: folder or Hub id of a relay model with its tokenizer.
        arguments: the benchmark, and how to decode and check the answers.

    Raises:
        ImportError, OSError: the model, the benchmark or the sandbox is missing.
        ValueError: the model is no relay model, or the arguments do not fit it.
    """
    # Not above: the other commands would wait for matplotlib.
    import os
    from pathlib import Path

    from ...loading.checkpoint import read_diffusion_config, read_generation_config, read_tokenizer
    from ...modeling import RelayForMaskedDiffusion
    from .answers import check_thresholds, decoding_options
    from .evaluate import evaluate_code
    from .problems import load_problems
    from .report import PICTURE, RESULTS, format_table

    load_problems(arguments.benchmark)  # before the model, which takes longer to load
    config = read_diffusion_config(model)
    defaults = read_generation_config(model, config)
    check_thresholds(config, defaults, decoding_options(arguments.options), arguments.thresholds)
    tokenizer = read_tokenizer(model, config)
    weights = RelayForMaskedDiffusion.from_pretrained(model, dtype=arguments.dtype, device_map=arguments.device)
    results = evaluate_code(weights.eval(), tokenizer, arguments, Path(os.path.abspath(model)).name)
    return f"{format_table(results)}\n\nanswers, {RESULTS} and {PICTURE}: {arguments.output_dir}"
