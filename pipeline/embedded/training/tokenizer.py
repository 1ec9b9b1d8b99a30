"""The tokenizer of both embedded models: one token per word or punctuation mark, lower case, unknown words to <unk>."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, TURN_START, TURN_END, IMAGE, VIDEO = SPECIAL_TOKENS = (
    "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>",
)  # fmt: skip
ROLES = ("user", "assistant", "system")

# One turn reads "<|im_start|>role <video>text<|im_end|>"; the tokenizer drops the white space.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'video' -%}{{ '<video>' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ '\n' + part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tokenizer(vocabulary: Sequence[str], max_length: int = 2048) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template; ids follow SPECIAL_TOKENS, ROLES and the sorted `vocabulary`."""
    words = [*SPECIAL_TOKENS, *ROLES, *vocabulary]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
