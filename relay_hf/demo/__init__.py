"""The demo: trains Relay on Sudoku beside its baselines, saves the model with a card, loads it and solves a puzzle."""

import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

from .arguments import DemoArguments

__all__ = ["DemoArguments", "run_demo"]


def run_demo(arguments: DemoArguments) -> None:
    """Runs the study, writes the report and shows the saved model at work in a new process."""
    # Not above: the other commands would wait for TRL and datasets.
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    from ..tasks.sudoku import make_sudoku_tokenizer
    from .keeping import KeptStudy
    from .pace import fit_to_machine, free_cores, threads_for
    from .report import write_report
    from .study import load_puzzles, run_study

    # Libraries' notes about training in general would bury the progress bars.
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()

    began = time.monotonic()
    tokenizer, puzzles = make_sudoku_tokenizer(arguments.size), load_puzzles(arguments)
    kept = KeptStudy(arguments, puzzles)
    try:
        with threads_for(free_cores()) as threads:
            print(f"\nthreads: {threads}, as many as there are cores with nothing else to do", flush=True)
            if kept.plan is None:
                sizes, note = fit_to_machine(arguments, tokenizer, puzzles["train"])
                kept.keep_plan({"arguments": asdict(sizes), "note": note})
            else:
                print(f"\ngoing on with what `{kept.folder}` holds; `--fresh` would start anew", flush=True)
            sizes = replace(DemoArguments(**kept.plan["arguments"]), output_dir=arguments.output_dir)
            study = run_study(sizes, tokenizer, puzzles, kept)
            folder = write_report(study, sizes)
    except KeyboardInterrupt:
        print(f"\n`{arguments.command}` goes on with what is trained; `{arguments.command} --fresh` starts anew")
        raise
    if kept.plan["note"]:
        print(f"\n{kept.plan['note']}")
    kept.remove()
    print(
        f"\nmodel, card and picture: {folder}\n\nloading it in a new process and solving a held-out puzzle:", flush=True
    )
    question = study.puzzles["test"][0]["question"]
    subprocess.run([sys.executable, "-m", "relay_hf.demo.solve", str(folder), question], check=True)
    print(f"\ndone in {time.monotonic() - began:.0f} s")
