"""`convert` of a GGUF file: small random decoders in one, quantised or not, and files that do not fit their model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from relay_hf import convert
from relay_hf.cli import main
from relay_hf.testing import CHAT_TEMPLATE

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "ab", "<|endoftext|>", "<|pad|>"]
AB, END, PAD = 256, 257, 258
# transformers takes the width of Qwen3's heads for known.
HEAD_DIMS = {"llama": 8, "qwen2": 8, "qwen3": 128}
# transformers' names -> those of the format.
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


def make_decoder(family: str, ties: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD_DIMS[family], max_position_embeddings=128, rms_norm_eps=1e-5,
        initializer_range=0.5, tie_word_embeddings=ties,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def pair_rotated(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection as Llama's files have them: the two that are rotated together lie side by side."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def describe(writer: gguf.GGUFWriter, config: PreTrainedConfig, feed_forward: int | None) -> None:
    """Fields of a file that stand for `config.json` and the tokenizer."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(HEAD_DIMS[config.model_type])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(BYTES) + 1) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Writes a random decoder into a file; the model that is returned has the weights as the file has them."""

    def write(
        family: str = "llama",
        ties: bool = False,
        quantized: bool = False,
        without: str = "",
        extra: str = "",
        feed_forward: int | None = None,
        scaling: gguf.RopeScalingType = gguf.RopeScalingType.NONE,
    ) -> tuple[Path, PreTrainedModel]:
        model = make_decoder(family, ties)
        path = tmp_path / "source" / "tiny.gguf"
        path.parent.mkdir()
        writer = gguf.GGUFWriter(path, family)
        describe(writer, model.config, feed_forward)
        writer.add_rope_scaling_type(scaling)
        for name, parameter in model.named_parameters():
            theirs, weight = name, parameter.detach()
            for old, new in NAMES.items():
                theirs = theirs.replace(old, new)
            if theirs == without:
                continue
            heads = {"q": 4, "k": 2}.get(name.split("_proj")[0][-1]) if family == "llama" else None
            array = (pair_rotated(weight, heads) if heads else weight).numpy()
            if quantized and array.ndim == 2:
                packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                # Quantised row by row, so the order of the rows does not matter.
                weight.copy_(_round(weight.numpy()))
            else:
                writer.add_tensor(theirs, array)
        if extra:
            writer.add_tensor(extra, np.ones(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return write


def _round(array: np.ndarray) -> Tensor:
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind))


@pytest.mark.parametrize(
    ("family", "ties", "quantized"),
    [("llama", False, False), ("llama", True, True), ("qwen2", True, False), ("qwen3", False, True)],
)
@torch.no_grad()
def test_gguf_in_blocks_of_one_same_logits(
    write_gguf: Callable, tmp_path: Path, family: str, ties: bool, quantized: bool
) -> None:
    source, twin = write_gguf(family, ties, quantized)
    convert(source.parent, tmp_path / "out", gguf_file=source.name, block_size=1)
    model, ids = AutoModel.from_pretrained(tmp_path / "out"), torch.arange(20)[None]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == ties
    logits = model(ids).logits[:, 1:, : len(TOKENS)]
    torch.testing.assert_close(logits, twin(ids).logits[:, :-1], atol=1e-4, rtol=1e-4)


def test_gguf_tokenizer_and_defaults_come_along(write_gguf: Callable, tmp_path: Path) -> None:
    source, _ = write_gguf()
    report = convert(source.parent, tmp_path / "out", gguf_file=source.name)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")
    assert tokenizer("abé<|endoftext|>")["input_ids"] == [AB, BYTES.index("Ã"), BYTES.index("©"), END]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (END, PAD, CHAT_TEMPLATE)
    assert tokenizer.mask_token_id == model.config.mask_token_id == report.mask_token_id == len(TOKENS)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (END, PAD)
    assert model.generate(torch.arange(5)[None], max_new_tokens=3).shape[0] == 1


def test_gguf_report_says_what_was_read(write_gguf: Callable, tmp_path: Path) -> None:
    source, _ = write_gguf()
    text = str(convert(source.parent, tmp_path / "out", gguf_file=source.name, dtype="bfloat16"))
    assert f"converted `{source}`" in text
    assert "family       llama on the backbone llama" in text
    assert "unpacked the tensors of the GGUF file to bfloat16" in text
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight.dtype, model.relay.norm.weight.dtype) == (torch.bfloat16, torch.float32)


def test_gguf_path_as_source_equals_folder_and_name(write_gguf: Callable, tmp_path: Path) -> None:
    source, _ = write_gguf()
    convert(source, tmp_path / "first")
    convert(source.parent, tmp_path / "second", gguf_file=source.name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "blk.1.ffn_up.weight"}, r"lacks 1 parameters of a llama model, e.g. `model.layers.1.mlp.up_proj"),
        ({"extra": "blk.0.attn_q.bias"}, "32 numbers more than"),
        ({"feed_forward": 32}, r"mlp.down_proj.weight` of shape \(32, 64\), but .* of shape \(32, 32\)"),
        ({"scaling": gguf.RopeScalingType.YARN}, r"scales its rotary positions \(yarn\)"),
        ({"extra": "rope_freqs.weight"}, "32 numbers more than"),
    ],
)
def test_gguf_that_is_not_the_whole_model_raises(
    write_gguf: Callable, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source, _ = write_gguf(**changes)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_without_its_package_raises(write_gguf: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = write_gguf()
    monkeypatch.setattr("relay_hf.conversion.gguf_file.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'relay-hf\[gguf\]'"):
        convert(source, tmp_path / "out")


def test_command_takes_gguf_file(write_gguf: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, _ = write_gguf()
    assert main(["convert", str(source.parent), str(tmp_path / "out"), "--gguf_file", source.name]) == 0
    assert "GGUF file" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 4, 40, 20_000])
def test_gguf_that_is_cut_off_raises(write_gguf: Callable, tmp_path: Path, kept: int) -> None:
    source, _ = write_gguf()
    source.write_bytes(source.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"tiny.gguf` is no complete GGUF file"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"<html>"])
def test_command_file_that_is_no_gguf_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    assert main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "out")]) == 2
    message = f"`{tmp_path}` has no file `x.gguf`: check" if content is None else "is no complete GGUF file"
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
