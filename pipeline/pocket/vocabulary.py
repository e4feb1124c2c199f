"""The pocket model's tokenizer: byte-level BPE of 2048 pieces, lossless on any text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sentei.pipeline.tasks.notes import LIST_NOTE, LIST_QUESTION, PAIR_NOTE, PASSKEY_NOTE, PASSKEY_QUESTION
from sentei.pipeline.tasks.prompt import WORDS
from sentei.pipeline.text.corpus import Document

VOCAB_SIZE = 2048
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
# The model continues text, so a chat is its messages joined: one that ends in a question keeps its ending.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def train_tokenizer(documents: Sequence[Document], *, max_positions: int) -> PreTrainedTokenizerFast:
    """Learn the merges from training documents; each task word is shown often enough to become one piece."""
    core = Tokenizer(models.BPE())
    # A newline is a piece of its own, so that lines can be tokenized one by one and put together.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_training_text(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def _training_text(documents: Sequence[Document]) -> Iterator[str]:
    # Every fourth document is plenty for 2048 pieces and keeps this step at a few seconds.
    yield from (document.text for document in documents[::4])
    for word in WORDS:
        notes = PASSKEY_NOTE.format(word) + PASSKEY_QUESTION + f" {word}" + PAIR_NOTE.format(word, word)
        yield (notes + LIST_NOTE.format(word) + LIST_QUESTION.format(word)) * 600
