"""Toy language models: random ones of every architecture, and small ones that learn subject-verb agreement.

A toy carries a word-level tokenizer over the words of the agreement task, so that the whole workflow runs in seconds
and without a download.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from circuitflow.data.agreement import sentences
from circuitflow.data.grammar import Grammar, read_grammar, vocabulary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output
from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.models.saving import check_model, save_model
from circuitflow.progress import progress

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"

POSITIONS = 512
"""Longest sequence of a toy."""

SENTENCES = 6000
"""Sentences that a toy is trained on (fewer in a very short training), in a new order every time round."""

ROW, ROWS = 32, 32
"""Tokens in a training row (about three sentences, each followed by END), and rows in a step."""

RATE = 6e-3
"""Highest learning rate; after a short warm-up it falls to zero along a half cosine."""

OTHER_WORDS = 0.1
"""Weight of the loss at words that do not agree with anything; with 1, agreement takes three times as many steps."""


def prepare_toy(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: train a toy and save it as :func:`circuitflow.models.sources.prepare_model` saves a model.

    Inputs: ``lexicon`` and ``templates`` of the agreement task. Params: as of ``prepare_model``, with a source of kind
    "toy": ``architecture``, ``layers``, ``d_model``, ``heads``, ``seed``, ``train_steps`` (150 are enough for 4 layers
    of width 32). The same source gives the same weights, bit for bit, on the same kind of machine: training uses one
    thread.

    :raises UserError: the toy would lack a required site, or its sizes do not fit together.
    """
    source = params["source"]
    _check_source(source)
    grammar = read_grammar(inputs["lexicon"], inputs["templates"])
    tokenizer = word_tokenizer(vocabulary(grammar))
    config = toy_config(
        source["architecture"],
        layers=source["layers"],
        d_model=source["d_model"],
        heads=source["heads"],
        vocab=len(tokenizer),
    )
    arch = check_model(config, params["architecture"], params["required_sites"])
    model = random_model(config, source["seed"])
    with one_thread():
        train_toy(model, tokenizer, grammar, source["train_steps"], source["seed"])
    save_model(model, tokenizer, arch, out)


def _check_source(source: Mapping[str, Any]) -> None:
    name, d_model, heads = source["architecture"], source["d_model"], source["heads"]
    if name not in ARCHITECTURES:
        raise UserError(
            f"model.source.architecture '{name}' is not supported: {nearest(name, ARCHITECTURES)}."
        )
    if d_model % (2 * heads):
        raise UserError(
            f"model.source.d_model {d_model} does not give each of {heads} heads an even width; "
            f"use a multiple of {2 * heads}, for example {max(2 * heads, d_model - d_model % (2 * heads))}."
        )


def toy_config(
    architecture: str, *, layers: int, d_model: int, heads: int, vocab: int, **settings: Any
) -> Any:
    """Configuration of a small model of any supported architecture; ``settings`` override transformers' names."""
    sizes: dict[str, Any] = {
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    sizes["n_inner" if architecture == "gpt2" else "intermediate_size"] = 4 * d_model
    if architecture not in ("gpt2", "gpt_neox"):
        sizes |= {"head_dim": d_model // heads, "num_key_value_heads": max(1, heads // 2)}
    return AutoConfig.for_model(architecture, **{**sizes, **settings})


def random_model(config: Any, seed: int) -> Any:
    """A float32 model with weights drawn from ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens carry their leading space, as those of larger models do.

    Every word is in the vocabulary with and without the space; decoding gives the text back.
    """
    entries = [PAD, UNKNOWN, END, *words, *(f" {word}" for word in words)]
    core = Tokenizer(
        models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token=UNKNOWN)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, unk_token=UNKNOWN, bos_token=END, eos_token=END
    )


def train_toy(
    model: Any, tokenizer: PreTrainedTokenizerFast, grammar: Grammar, steps: int, seed: int
) -> None:
    """Next-token training with AdamW, in evaluation mode (no dropout), with the weight on verbs."""
    rows = _rows(tokenizer, grammar, steps * ROWS, seed)
    weight = _weights(tokenizer, grammar)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=RATE, total_steps=max(steps, 2), pct_start=0.1
    )
    for step in range(steps):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress("toy training steps", step + 1, steps, loss=loss.item())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one thread: the number of threads changes sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(
    tokenizer: PreTrainedTokenizerFast, grammar: Grammar, count: int, seed: int
) -> Int[Tensor, "count row"]:
    """Rows that start with a sentence and go on with others."""
    texts = [
        [*ids, tokenizer.eos_token_id] for ids in tokenizer(sentences(seed, SENTENCES, grammar))["input_ids"]
    ]
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < count:
        for index in torch.randperm(len(texts), generator=generator).tolist():
            row += texts[index]
            if len(row) >= ROW:
                rows.append(row[:ROW])
                row = []
    return torch.tensor(rows[:count]).reshape(count, ROW)


def _weights(tokenizer: PreTrainedTokenizerFast, grammar: Grammar) -> Float[Tensor, " vocab"]:
    """Weight of each token in the loss: 1 for words that agree with a noun, OTHER_WORDS for the rest."""
    slots = [slot for template in grammar.values() for slot in template.slots.values() if slot.agrees_with]
    forms = sorted({form for slot in slots for word in slot.words for form in (word.singular, word.plural)})
    weights = torch.full((len(tokenizer),), OTHER_WORDS)
    weights[[ids[0] for ids in tokenizer([f" {form}" for form in forms])["input_ids"]]] = 1.0
    return weights
