"""Loads a saved model through AutoModel and solves one puzzle in the terminal, step by step.

python -m relay_hf.demo.solve FOLDER QUESTION
"""

import sys

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import relay_hf  # noqa: F401  (registers the model with AutoModel)

from ..tasks.sudoku import BoardShape, is_legal, parse_boards

FRESH, PLAIN = "\033[1;32m", "\033[0m"


class BoardStreamer(BaseStreamer):
    """Draws the board after every denoising step, cells revealed in that step in bold green if it is a terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.board = ""
        self.steps = 0

    def put(self, value: Tensor) -> None:
        """The prompt draws the puzzle; the finished board was drawn by the last step already."""
        board = str(self.tokenizer.decode(value.reshape(-1)))
        if not self.board:
            self._draw("puzzle", board)

    def put_draft(self, value: Tensor) -> None:
        self.steps += 1
        board = str(self.tokenizer.decode(value))
        revealed = sum(old != new for old, new in zip(self.board, board, strict=True))
        self._draw(f"step {self.steps}: {revealed} revealed, {board.count('.')} to go", board)

    def end(self) -> None:
        verdict = "solved" if bool(is_legal(parse_boards([self.board])[0])) else "filled in wrongly"
        print(f"\n{verdict} in {self.steps} denoise forwards", flush=True)

    def _draw(self, title: str, board: str) -> None:
        before, self.board = self.board or board, board
        fresh, plain = (FRESH, PLAIN) if sys.stdout.isatty() else ("", "")
        shape = BoardShape.of_cells(len(board))
        print(f"\n{title}")
        for row in range(shape.size):
            if row and row % shape.box_height == 0:
                print()
            cells = range(row * shape.size, (row + 1) * shape.size)
            drawn = [f"{fresh}{board[i]}{plain}" if before[i] != board[i] else board[i] for i in cells]
            print("  ".join(" ".join(drawn[i : i + shape.box_width]) for i in range(0, shape.size, shape.box_width)))
        sys.stdout.flush()


def main(folder: str, question: str) -> None:
    """Solves `question` with the model in `folder`."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(question, return_tensors="pt")
    with torch.inference_mode():
        model.generate(inputs["input_ids"], streamer=BoardStreamer(tokenizer))


if __name__ == "__main__":
    main(*sys.argv[1:])
