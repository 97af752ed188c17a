"""The page: a puzzle or a prompt on top, two runs of it side by side below, and a slider through their steps."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ...modeling import Bounds
from ...modeling.unmasking_relay import POLICIES
from ...pictures.timeline import Timeline
from ...tasks.sudoku import generate_puzzles
from ..arguments import DemoArguments
from .rendering import STYLE, render_board, render_legend, render_side, render_text
from .runs import Run, Runner, Runs

PUZZLES = 12
# The demo trains on the generator's seed 0.
PUZZLE_SEED = 1
# Seconds: a step is shown as long as the first, unless all of them would take longer than the second.
PAUSE, REPLAY = 0.7, 12.0
# Of a kind of page: the inputs, what computes the runs, what draws a run after a step, the states of the legend.
Parts = tuple[list[Any], Callable[..., Runs], Callable[[Run, int, str], str], tuple[str, ...]]
ON, OFF = "Relay on", "Relay off"
NO_CHANNEL = "This model has no relay channel: there is nothing to switch on."
ABOUT = (
    "The same weights fill in the same masks twice. On the left every denoise forward receives the relay state of the "
    "one before; on the right it receives only the tokens. A model trained without a relay, the fair baseline of the "
    "study, is not shown."
)


def build_page(runner: Runner, name: str) -> gr.Blocks:
    """The page for a model.

    Args:
        runner: holds the model.
        name: the model's name, in the title.
    """
    # Fonts of the system and no analytics: the page is to work without a network.
    with gr.Blocks(title=f"relay_hf: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\n\n{ABOUT}")
        build = _add_text_inputs if runner.board_size is None else _add_board_inputs
        inputs, compute, draw_run, states = build(runner)
        button = gr.Button("Run", variant="primary", elem_id="run")
        step = gr.Slider(0, 1, value=0, step=1, label="step: after this many denoise forwards", elem_id="step")
        with gr.Row():
            sides = [gr.HTML(elem_id="relay-on", padding=True), gr.HTML(elem_id="relay-off", padding=True)]
        if runner.board_size is not None:
            _show_before_the_run(runner, inputs[0], sides)
        gr.HTML(render_legend(states), padding=True)
        shown = gr.State(None)

        def draw(runs: Runs, step: int) -> list[str]:
            on = render_side(ON, note=NO_CHANNEL) if runs.on is None else draw_run(runs.on, step, ON)
            return [on, draw_run(runs.off, step, OFF)]

        def run(*values: Any, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008  (Gradio's own way)
            try:
                runs = compute(*values, progress)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            pause = min(PAUSE, REPLAY / max(runs.forwards, 1))
            for at in range(runs.forwards + 1):
                time.sleep(pause if at else 0)
                yield [runs, gr.Slider(0, runs.forwards, value=at), *draw(runs, at)]

        # Replays of several visitors may overlap: the runner sees to it that their runs do not.
        playing = button.click(
            run,
            inputs,
            [shown, step, *sides],
            api_name="run",
            concurrency_limit=None,
            show_progress="full",
            show_progress_on=step,
        )

        def show(runs: Runs | None, at: int) -> list[str]:
            return ["", ""] if runs is None else draw(runs, at)

        # Who moves the slider no longer watches the replay.
        step.input(show, [shown, step], sides, cancels=[playing], api_visibility="private", show_progress="hidden")
    return page


def launch_page(page: gr.Blocks, host: str, port: int) -> str:
    """Serves the page from a thread of its own and returns its address.

    Raises:
        OSError: the address cannot be listened on.
    """
    # What is switched off would need a network, start another server, or keep what users type.
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return url


def _add_board_inputs(runner: Runner) -> Parts:
    """For Sudoku."""
    size = runner.board_size
    extra = DemoArguments.extra_clues
    questions = generate_puzzles(PUZZLES, size, PUZZLE_SEED, progress=False, extra_clues=extra)["question"]
    choices = [(f"{number}: {q.count('.')} blanks", q) for number, q in enumerate(questions, start=1)]
    with gr.Row():
        picked = gr.Dropdown(choices, value=questions[0], label="Pick a puzzle", elem_id="pick")
        question = gr.Textbox(
            questions[0], label=f"or type one: {size * size} cells row by row, a dot for a blank", elem_id="puzzle"
        )
        threshold = _add_threshold(runner)
    picked.input(lambda text: text, picked, question, api_visibility="private", show_progress="hidden")

    def draw_run(run: Run, step: int, title: str) -> str:
        last = run.timeline.forwards
        verdict = "solved" if run.is_solved else "not a legal board"
        note = f"{verdict} after {last} denoise forwards" if step >= last else f"step {step} of {last}"
        return render_side(title, render_board(run.timeline, step), note, min(step, last))

    return [question, threshold], runner.solve, draw_run, ("given", "fresh", "known")


def _show_before_the_run(runner: Runner, question: gr.Textbox, sides: list[gr.HTML]) -> None:
    """Both sides show the puzzle, from the start and whenever another one is picked or typed."""

    def draw(text: str) -> list[str]:
        cells = "".join(text.split()).replace("0", ".")
        given = [cell != "." for cell in cells]
        try:
            timeline = Timeline(
                [0] * len(cells), [0 if g else 1 for g in given], [0.0] * len(cells), given, [*cells], 0
            )
            board = render_board(timeline, 0)
        except ValueError:  # not yet typed to the end
            return ["", ""]
        on, off = (render_side(title, board, "not run yet") for title in (ON, OFF))
        return [on if runner.has_channel else render_side(ON, note=NO_CHANNEL), off]

    for side, html in zip(sides, draw(question.value), strict=True):
        side.value = html
    question.change(draw, question, sides, api_visibility="private", show_progress="hidden")


def _add_text_inputs(runner: Runner) -> Parts:
    """For text."""
    prompt = gr.Textbox(lines=3, label="Prompt", elem_id="prompt")
    with gr.Row():
        new_tokens = gr.Slider(8, 256, value=64, step=8, label="new tokens", elem_id="new-tokens")
        threshold = _add_threshold(runner)

    def draw_run(run: Run, step: int, title: str) -> str:
        last = run.timeline.forwards
        body = render_text(run.timeline, step, runner.model.config.block_size)
        note = f"whole run: {last} denoise, {run.commits} commit, {run.prefills} prefill forwards"
        return render_side(title, body, note, min(step, last))

    return [prompt, new_tokens, threshold], runner.write, draw_run, ("given", "fresh", "free", "known", "masked")


def _add_threshold(runner: Runner) -> gr.Slider:
    """A slider in the range of the model's unmasking policy, at the model's own threshold; fixed if it has none."""
    options = runner.model.generation_config
    policy, value = POLICIES.find(options.unmasking_policy), options.unmasking_threshold
    bounds = policy.bounds or Bounds()
    return gr.Slider(
        bounds.least,
        max(bounds.shown, value),
        value=value,
        step=1 if bounds.is_whole else 0.01,
        label=f"threshold of {options.unmasking_policy}",
        info=policy.sentence(),
        interactive=policy.bounds is not None,
        elem_id="threshold",
    )
