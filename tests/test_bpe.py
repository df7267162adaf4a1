"""Byte-level BPE by tiktoken's rule against Hugging Face's own library."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers

from simcot_latent.errors import UserError
from simcot_latent.interop.bpe import tokenizer_of_tokens


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_any_merges_are_refused_or_give_the_originals_ids(data: st.DataObject) -> None:
    """The check of merges (see the module): whatever passes it must agree with Hugging Face's library."""
    tokens = data.draw(st.permutations("abc")) + []
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        pair = data.draw(st.tuples(*[st.sampled_from(tokens)] * 2))
        if len("".join(pair)) > 6 or pair in merges:
            continue
        merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    if data.draw(st.booleans()):  # a token that is no merge's result
        extra = data.draw(st.text("abc", min_size=2, max_size=4))
        if extra not in tokens:
            tokens.insert(data.draw(st.integers(0, len(tokens))), extra)
    if data.draw(st.booleans()):  # ids in another order than that of the merges
        tokens = data.draw(st.permutations(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if data.draw(st.booleans()):
        merges.sort(key=lambda pair: vocab["".join(pair)])
    ignore_merges = data.draw(st.booleans())
    original = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    original.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]+"), "isolated")
    try:
        ours = tokenizer_of_tokens(
            "any", tokens, [" ".join(pair) for pair in merges], r"[\s\S]+", [], {}, ignore_merges=ignore_merges
        )
    except UserError:
        return
    for text in data.draw(st.lists(st.one_of(st.text("abc", max_size=10), st.sampled_from(tokens)), min_size=10)):
        assert ours.encode(text) == original.encode(text, add_special_tokens=False).ids


def test_tokens_that_no_text_gives_stand_for_nothing() -> None:
    tokens = ["a", "b", "c", "abc", "ab", "<x>"]
    ours = tokenizer_of_tokens("toy", tokens, ["a b"], r"[\s\S]+", [5], {"end": "<x>"})
    assert ours.encode("abc") == [4, 2]
    assert ours.special_tokens == {"<x>": 5, "<|unused_3|>": 3}
    assert ours.decode([3, 4]) == "ab"
    # .. but for a whole piece, where such a piece is taken as it is.
    ours = tokenizer_of_tokens("toy", tokens[:4], [], r"[\s\S]+", [], {}, ignore_merges=True)
    assert (ours.encode("abc"), ours.encode("abca")) == ([3], [0, 1, 2, 0])
