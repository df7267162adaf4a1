"""What we compare with, each as good as we know how to use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from simcot_latent.model.gpt import GPTConfig


def transformers_model(config: GPTConfig) -> PreTrainedModel:
    """The same shape in `transformers`: a Llama for grouped queries, else a GPT-2; fused attention is their default."""
    if config.n_kv_head is None:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                bos_token_id=None,
                eos_token_id=None,
                n_positions=config.context_length,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.ffn_width or 4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=True,
        )
    ).eval()


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T)."""
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def think_and_answer(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], thoughts: int, eot_id: int, answer_tokens: int
) -> Tensor:
    """A batched latent loop on `transformers`: key/value cache, logits at the last position only, greedy.

    Returns:
        Token ids (B, answer_tokens).
    """
    base: Any = model.base_model
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    device = model.device
    ids_BT, mask_BS = pad_left(prompts, 0, device)
    position_BT = (mask_BS.cumsum(1) - 1).clamp(min=0)
    out = base(input_ids=ids_BT, attention_mask=mask_BS, position_ids=position_BT, use_cache=True)
    position_B1, cache, hidden_B1D = position_BT[:, -1:] + 1, out.past_key_values, out.last_hidden_state[:, -1:]

    def feed(inputs_BTD: Tensor) -> Tensor:
        nonlocal position_B1, cache, mask_BS
        T = inputs_BTD.shape[1]
        mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(mask_BS), T)), dim=1)
        found = base(
            inputs_embeds=inputs_BTD,
            attention_mask=mask_BS,
            position_ids=position_B1 + torch.arange(T, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        position_B1, cache = position_B1 + T, found.past_key_values
        return found.last_hidden_state[:, -1:]

    for _ in range(thoughts - 1):
        hidden_B1D = feed(hidden_B1D)
    eot_B1D = embedding(torch.full((len(prompts), 1), eot_id, device=device))
    hidden_B1D = feed(torch.cat((hidden_B1D, eot_B1D), dim=1))
    written = [head(hidden_B1D).argmax(-1)]
    for _ in range(answer_tokens - 1):
        written.append(head(feed(embedding(written[-1]))).argmax(-1))
    return torch.cat(written, dim=1)


@torch.no_grad()
def write(model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """`transformers.generate`, greedy, exactly so many tokens."""
    ids_BT, mask_BT = pad_left(prompts, 0, model.device)
    return model.generate(  # type: ignore[no-any-return, operator]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


def transformers_step(
    config: GPTConfig, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Callable[[], None]:
    """A plain fine-tuning step on `transformers`: rows padded on the right, loss on the texts alone."""
    model: Any = transformers_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    length = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    ids_BT = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    label_BT = torch.tensor(
        [
            [-100] * len(prompt) + list(text) + [-100] * (length - len(prompt) - len(text))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    )

    def step() -> None:
        model(input_ids=ids_BT, attention_mask=mask_BT, labels=label_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def coconut_step(
    config: GPTConfig, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], thoughts: int
) -> Callable[[], None]:
    """A training step of `coconut-pytorch`: a model of the same width, depth and heads, the answer loss alone.

    It has no auxiliary decoder, so it does less than ours. With one residual stream it is an ordinary transformer.
    """
    from coconut_pytorch import Coconut  # only where it is asked for

    model = Coconut(
        num_reasoning_steps=thoughts,
        transformer={
            "num_tokens": config.vocab_size,
            "dim": config.n_embd,
            "depth": config.n_layer,
            "heads": config.n_head,
            "dim_head": config.head_width,
            "num_residual_streams": 1,
            "attend_kwargs": {"flash": True},
        },
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prompts = [torch.tensor(ids) for ids in questions]
    texts = [torch.tensor(ids) for ids in answers]

    def step() -> None:
        model(prompts, texts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
