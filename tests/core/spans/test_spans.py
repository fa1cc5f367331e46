"""Spans: the walk, the token ranges, the tables, and their cover check."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from taprobe_core.errors import ModelError, NotEnoughDataError, SpanError
from taprobe_core.spans import (
    cover_faults,
    flatten_text,
    input_sha256,
    make_spans,
    token_ranges,
    tokenize_text,
    walk_sentences,
)

BOS = "<|bos|>"
CORPUS = ["So we add one. Then we wait, and 1+2=3.\n\nWait, שלום é 👩‍🚀 x²−1."] * 8


def small_tokenizer(nfc: bool, bos: str | None = BOS) -> PreTrainedTokenizerFast:
    """A byte-level BPE with few merges, so that characters fall apart into bytes."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC() if nfc else None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return small_tokenizer(nfc=False)


@pytest.fixture(scope="module")
def small_nfc() -> PreTrainedTokenizerFast:
    return small_tokenizer(nfc=True)


@pytest.fixture(scope="module")
def real_llama(real_tokenizers: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(real_tokenizers / "deepseek-r1-distill-llama-8b")


@pytest.fixture(scope="module")
def real_qwen(real_tokenizers: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(real_tokenizers / "deepseek-r1-distill-qwen-14b")


SPACE = st.sampled_from(["", "", " ", " ", "\n\n", "\t", "\r\n", "\u00a0", " \u2003\u3000"])
AWKWARD = st.sampled_from(
    [
        "é",
        "e\u0301",
        "a\u0301\u0323",
        "\u0301",
        "क़",
        "한",
        "👩‍🚀",
        "🏳️‍🌈",
        "שלום",
        "x²−1",
        "$\\frac{1}{2}$",
        "1,000",
    ]
)
WORD = st.one_of(
    AWKWARD,
    st.sampled_from(["a", "So", "wait,", "1+2=3.", "..."]),
    st.characters(codec="utf-8").filter(str.strip),
)
SENTENCE = st.lists(st.tuples(WORD, SPACE), min_size=1, max_size=3)


@st.composite
def traces(draw: st.DrawFn) -> tuple[str, list[str], int]:
    """A text, its sentences with other whitespace than the text's, and where they start."""
    head = draw(st.sampled_from(["", "Solve. \n<think>\n"]))
    parts = draw(st.lists(SENTENCE, min_size=1, max_size=6))
    text = head + "".join(word + space for sentence in parts for word, space in sentence)
    inner = draw(SPACE)
    return text, [inner.join(word for word, _ in sentence) for sentence in parts], len(head)


def solid(text: str) -> str:
    return "".join(text.split())


@given(traces())
def test_walk_tiles_the_text_except_for_whitespace(trace: tuple[str, list[str], int]) -> None:
    text, sentences, start = trace
    ranges = walk_sentences(text, sentences, start, len(text))
    reached = start
    for (first, stop), sentence in zip(ranges, sentences, strict=True):
        assert text[reached:first].strip() == ""
        assert text[first:stop] == text[first:stop].strip() != ""
        assert solid(text[first:stop]) == solid(sentence)
        reached = stop
    assert text[reached:].strip() == ""


@given(traces(), st.data())
def test_walk_refuses_any_changed_character(
    trace: tuple[str, list[str], int], data: st.DataObject
) -> None:
    text, sentences, start = trace
    index = data.draw(st.integers(0, len(sentences) - 1))
    old = solid(sentences[index])
    at = data.draw(st.integers(0, len(old) - 1))
    new = data.draw(st.characters(codec="utf-8").filter(lambda c: c.strip() and c != old[at]))
    sentences[index] = old[:at] + new + old[at + 1 :]
    with pytest.raises(SpanError, match=f"sentence {index} differs from the text"):
        walk_sentences(text, sentences, start, len(text))


def test_walk_never_searches_so_repeated_sentences_keep_their_order() -> None:
    text = "Wait. Wait.\n\nWait.  No. Wait."
    sentences = ["Wait.", "Wait.", "Wait.", "No.", "Wait."]
    ranges = walk_sentences(text, sentences, 0, len(text))
    assert ranges == [(0, 5), (6, 11), (13, 18), (20, 23), (24, 29)]


LEFT = "characters are left over after the last of"


@pytest.mark.parametrize(
    ("sentences", "what", "where"),
    [
        (["ab c.", "De\u200bf."], r"expected '\u200bf.', found 'f.'", "sentence 1, character 8"),
        (["ab c.", "Def.", "X"], "'X', found the end of the text", "sentence 2, character 11"),
        (["ab c."], f"4 {LEFT} 1 sentences: 'Def.'", "character 6"),
        ([], rf"8 {LEFT} 0 sentences: 'ab\nc. Def.'", "character 0"),
        (["ab c.", " \n"], "sentence 1 is empty", "sentence 1"),
        (["ab d." + "y" * 90], "expected 'd." + "y" * 22 + "'..., found 'c.Def.'", "character 3"),
    ],
)
def test_walk_says_what_differs_and_where(sentences: list[str], what: str, where: str) -> None:
    text = "ab\nc. Def.\n"
    with pytest.raises(SpanError) as caught:
        walk_sentences(text, sentences, 0, len(text))
    assert what in caught.value.what
    assert caught.value.where is not None
    assert where in caught.value.where
    assert caught.value.fix


def linear_rule(
    offsets: list[tuple[int, int]], chars: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The rule in its plain words, one scan per sentence."""
    ranges = []
    for start, end in chars:
        first = next(i for i, offset in enumerate(offsets) if offset[1] > start)
        rest = range(first, len(offsets))
        stop = next((i for i in rest if offsets[i][0] >= end), len(offsets))
        ranges.append((first, max(stop, first + 1)))
    return ranges


@pytest.mark.parametrize("name", ["small", "small_nfc", "real_llama", "real_qwen"])
def test_token_ranges_hold_every_token_of_every_character(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)

    @settings(deadline=None)
    @given(traces())
    def check(trace: tuple[str, list[str], int]) -> None:
        text, sentences, start = trace
        chars = walk_sentences(text, sentences, start, len(text))
        tokenized = tokenize_text(text, tokenizer)
        n_tokens = len(tokenized.token_ids)
        ranges = tokenized.place(chars)
        assert tokenized.token_ids[0] == tokenizer.bos_token_id
        assert tokenized.token_ids.count(tokenizer.bos_token_id) == 1
        assert all(1 <= first < stop <= n_tokens for first, stop in ranges)
        for (one, one_stop), (two, two_stop) in pairwise(ranges):
            assert one <= two
            assert one_stop - 1 <= two
            assert one_stop <= two_stop
        for (first_char, stop_char), (first, stop) in zip(chars, ranges, strict=True):
            for at in range(first_char, stop_char):
                holders = [i for i, (a, b) in enumerate(tokenized.offsets, 1) if a <= at < b]
                assert set(holders) <= set(range(first, stop))
                assert tokenized.offsets[first - 1][0] <= at or first == 1
                assert stop == n_tokens or tokenized.offsets[stop - 1][0] > at
        if not name.endswith(("nfc", "qwen")):
            assert token_ranges(tokenized.offsets, chars) == linear_rule(tokenized.offsets, chars)

    check()


@pytest.mark.parametrize(
    ("offsets", "chars", "expected"),
    [
        ([(0, 2), (2, 6), (6, 7)], [(0, 3), (4, 7)], [(0, 2), (1, 3)]),  # straddles: both have it
        (
            [(0, 2), (1, 2), (1, 2), (2, 3)],
            [(1, 2), (2, 3)],
            [(0, 3), (3, 4)],
        ),  # bytes of a character
        ([(0, 1), (1, 1), (1, 3)], [(0, 1), (1, 3)], [(0, 1), (2, 3)]),  # a token of no characters
        ([(0, 2), (1, 2), (3, 4)], [(0, 3), (3, 4)], [(0, 2), (2, 3)]),  # character 2 composed away
        (
            [(0, 2), (3, 4)],
            [(2, 3), (3, 4)],
            [(0, 1), (1, 2)],
        ),  # a sentence that is only such a one
        ([(0, 2)], [(0, 2), (2, 3)], [(0, 1), (0, 1)]),  # the same at the end of the text
        ([(0, 3), (2, 3), (1, 4)], [(0, 2), (3, 4)], [(0, 3), (2, 3)]),  # offsets step back
        ([(0, 1)], [], []),
    ],
)
def test_token_ranges_of_awkward_offsets(
    offsets: list[tuple[int, int]], chars: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert token_ranges(offsets, chars) == expected


@pytest.mark.parametrize(("offsets", "chars"), [([], [(0, 1)]), ([(0, 5)], [(0, 1), (3, 3)])])
def test_token_ranges_refuse_what_holds_no_token(
    offsets: list[tuple[int, int]], chars: list[tuple[int, int]]
) -> None:
    with pytest.raises(SpanError, match="has no"):
        token_ranges(offsets, chars)


def test_a_text_that_begins_with_bos_keeps_one(small: PreTrainedTokenizerFast) -> None:
    plain, marked = tokenize_text("So we.", small), tokenize_text(f"{BOS}So we.", small)
    assert plain.token_ids == marked.token_ids
    shift = len(BOS)
    assert [(a + shift, b + shift) for a, b in plain.offsets] == marked.offsets


@pytest.mark.parametrize(("text", "at"), [(f"So {BOS}we.", 3), (f"{BOS}So{BOS}", 9)])
def test_bos_inside_a_text_is_refused(text: str, at: int, small: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SpanError, match=f"again at token .* in character {at}"):
        tokenize_text(text, small)


def test_without_a_bos_token_a_text_is_read_as_it_is(small: PreTrainedTokenizerFast) -> None:
    plain = small_tokenizer(nfc=False, bos=None)
    tokenized = tokenize_text("So we.", plain)
    assert tokenized.token_ids == tokenize_text("So we.", small).token_ids[1:]
    assert len(tokenized.offsets) == len(tokenized.token_ids)
    made = make_spans(PROBLEMS, SENTENCES, plain, "base", "fail")
    assert made.texts["bos_token_id"].to_list() == [None, None]
    assert cover_faults(made.texts, made.spans, SENTENCES) == []
    with_bos = make_spans(PROBLEMS, SENTENCES, small, "base", "fail").spans
    assert (with_bos["start_token"] - made.spans["start_token"]).unique().to_list() == [1]


def test_without_bos_and_prompt_the_first_sentence_begins_at_token_0() -> None:
    problems = pl.DataFrame([problem_row(3, "Wait, 1+2=3.", prompt="")])
    sentences = pl.DataFrame(sentence_rows(3, ["Wait,", "1+2=3."]))
    made = make_spans(problems, sentences, small_tokenizer(nfc=False, bos=None), "base", "fail")
    assert made.spans["start_token"][0] == 0
    assert cover_faults(made.texts, made.spans, sentences) == []
    early = made.spans.with_columns(start_token=pl.col("start_token") - 1)
    assert any("is not within [0, " in line for line in cover_faults(made.texts, early, sentences))


def test_a_text_that_the_tokenizer_fails_on_costs_itself() -> None:
    tokenizer = small_tokenizer(nfc=False)
    endless = Split(Regex(r"(b+)+$"), "isolated")  # gives up after steps that double with each b
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([endless, ByteLevel(False)])
    thinking = "Wait, " + "b" * 60 + "."
    problems = pl.DataFrame([problem_row(3, "Wait, 1+2=3."), problem_row(9, thinking)])
    sentences = pl.DataFrame(sentence_rows(3, ["Wait, 1+2=3."]) + sentence_rows(9, [thinking]))
    made = make_spans(problems, sentences, tokenizer, "base", "skip")
    assert made.texts["problem_id"].to_list() == [3]
    (skipped,) = made.skipped.iter_rows(named=True)
    assert (skipped["problem_id"], skipped["error"]) == (9, "SpanError")
    assert "fails on the text of" in skipped["what"]


def test_an_interrupt_of_the_tokenizer_is_no_fault_of_the_text(
    small: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(small), "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize_text("So we.", small)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ModelError, match="no character offsets"):
        make_spans(PROBLEMS, SENTENCES, ByT5Tokenizer(), "base", "skip")


def problem_row(
    problem_id: int, thinking: str, prompt: str = "Solve. \n<think>\n"
) -> dict[str, object]:
    return {
        "problem_id": problem_id,
        "prompt": prompt,
        "base_text": f"{prompt}{thinking}</think>\nAnswer: 3.",
        "thinking_start_char": len(prompt),
        "thinking_end_char": len(prompt) + len(thinking),
    }


def sentence_rows(problem_id: int, sentences: list[str]) -> list[dict[str, object]]:
    return [
        {"problem_id": problem_id, "sentence_idx": index, "sentence": sentence}
        for index, sentence in enumerate(sentences)
    ]


GOOD = ["So we add one.", "1+2=3.", "So we add one."]
PROBLEMS = pl.DataFrame(
    [problem_row(7, "So we\nadd one.\n\n1+2=3. So we add one.\n"), problem_row(3, "Wait, 1+2=3.")]
)
SENTENCES = pl.DataFrame(sentence_rows(3, ["Wait,", "1+2=3."]) + sentence_rows(7, GOOD))


@pytest.mark.parametrize("view", ["base", "flattened"])
def test_tables_place_every_sentence_and_cut_the_text(
    view: str, small: PreTrainedTokenizerFast
) -> None:
    made = make_spans(
        PROBLEMS, SENTENCES.sample(fraction=1.0, shuffle=True, seed=1), small, view, "fail"
    )
    assert cover_faults(made.texts, made.spans, SENTENCES) == []
    assert made.texts["problem_id"].to_list() == [3, 7]
    assert len(made.spans) == len(SENTENCES)
    assert made.skipped.is_empty()
    text = made.texts.row(1, named=True)
    ends = made.spans.filter(problem_id=7)["end_token"]
    assert len(text["token_ids"]) == text["n_tokens"] == ends.max()
    assert small.decode(text["token_ids"]).rstrip().endswith("So we add one.")
    if view == "flattened":
        assert text["text"] == flatten_text("Solve. \n<think>\n", GOOD)
        assert text["text"].endswith("So we add one. 1+2=3. So we add one.")


def test_the_hash_follows_tokens_and_ranges() -> None:
    base = input_sha256([9, 1, 2], [(1, 3)])
    assert base == input_sha256([9, 1, 2], [(1, 3)])
    others = {input_sha256([9, 1, 3], [(1, 3)]), input_sha256([9, 1, 2], [(2, 3)])}
    split = {input_sha256([9, 1, 2, 1, 3], []), input_sha256([9], [(1, 2), (1, 3)])}
    assert len({base, *others, *split}) == 5


def test_a_bad_problem_is_skipped_with_its_reason(small: PreTrainedTokenizerFast) -> None:
    sentences = pl.DataFrame(sentence_rows(3, ["Wait,", "1+2=4."]) + sentence_rows(7, GOOD))
    made = make_spans(PROBLEMS, sentences, small, "base", "skip")
    assert made.texts["problem_id"].to_list() == [7]
    (skipped,) = made.skipped.iter_rows(named=True)
    assert (skipped["problem_id"], skipped["stage"], skipped["error"]) == (3, "spans", "SpanError")
    assert "expected '4.', found '3.'" in skipped["what"]
    assert skipped["where"].startswith("problem 3, sentence 1, character ")
    assert cover_faults(made.texts, made.spans, sentences) == []
    with pytest.raises(SpanError, match="problem 3, sentence 1"):
        make_spans(PROBLEMS, sentences, small, "base", "fail")


def test_a_text_beyond_the_context_costs_its_problem(small: PreTrainedTokenizerFast) -> None:
    whole = make_spans(PROBLEMS, SENTENCES, small, "base", "skip")
    lengths = dict(whole.texts.select("problem_id", "n_tokens").rows())
    short = min(lengths.values())
    assert lengths[3] == short

    made = make_spans(PROBLEMS, SENTENCES, small, "base", "skip", max_tokens=short)

    assert made.texts.equals(whole.texts.filter(problem_id=3))
    assert made.spans.equals(whole.spans.filter(problem_id=3))
    (row,) = made.skipped.iter_rows(named=True)
    assert row["what"] == f"the text has {lengths[7]} tokens, but the model takes {short}"
    assert "rollouts.exclude_ids: [7]" in row["fix"]
    with pytest.raises(SpanError, match=f"{lengths[7]} tokens, but the model takes {short}"):
        make_spans(PROBLEMS, SENTENCES, small, "base", "fail", max_tokens=short)
    with pytest.raises(NotEnoughDataError, match=r"none of 2 problem.*problem 3: .*problem 7: "):
        make_spans(PROBLEMS, SENTENCES, small, "base", "skip", max_tokens=short - 1)


def test_a_prompt_that_begins_the_reasoning_has_no_flattened_text(
    small: PreTrainedTokenizerFast,
) -> None:
    begun = problem_row(3, " 1+2=3.", prompt="Solve. \n<think>\nWait,")
    problem = pl.DataFrame([{**begun, "thinking_start_char": len("Solve. \n<think>")}])
    own = SENTENCES.filter(problem_id=3)

    assert make_spans(problem, own, small, "base", "fail").texts.height == 1
    with pytest.raises(SpanError, match=r"already begins the reasoning .*\n.*text_view to base"):
        make_spans(problem, own, small, "flattened", "fail")


@pytest.mark.parametrize(
    ("problems", "sentences"),
    [
        (PROBLEMS, SENTENCES.filter(pl.col("sentence_idx") != 1)),  # a gap; too few
        (PROBLEMS, SENTENCES.clear()),
        (PROBLEMS.with_columns(thinking_end_char=999), SENTENCES),
        (PROBLEMS.clear(), SENTENCES),
    ],
)
def test_no_placed_problem_at_all_is_an_error(
    problems: pl.DataFrame, sentences: pl.DataFrame, small: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(NotEnoughDataError):
        make_spans(problems, sentences, small, "base", "skip")


ROW = (pl.col("problem_id") == 7) & (pl.col("sentence_idx") == 1)
TEXT = pl.col("problem_id") == 7


def planted(name: str, value: pl.Expr, where: pl.Expr = ROW) -> pl.Expr:
    return pl.when(where).then(value).otherwise(pl.col(name)).alias(name)


@pytest.mark.parametrize(
    ("on_texts", "on_spans", "fault"),
    [
        (None, planted("start_char", pl.col("start_char") + 1), "are not the sentence"),
        (None, planted("end_char", pl.col("end_char") + 1), "are not the sentence"),
        (None, planted("start_char", pl.lit(16)), "does not follow"),
        (None, planted("start_token", pl.col("start_token") - 4), "runs back"),
        (None, planted("end_token", pl.col("start_token")), "is not within"),
        (None, planted("end_token", pl.col("end_token") + 99), "is not within"),
        (None, planted("n_tokens", pl.col("n_tokens") + 1), "is not the length"),
        (None, planted("sentence_idx", pl.lit(5)), "do not number 3 sentences"),
        (None, planted("problem_id", pl.lit(8)), "has spans but no text"),
        (planted("n_tokens", pl.lit(99), TEXT), None, "the last sentence ends at"),
        (planted("bos_token_id", pl.lit(1), TEXT), None, "stands 0 times"),
        (planted("token_ids", pl.lit([0, 5]), TEXT), None, "2 token ids"),
        (planted("input_sha256", pl.lit("ab"), TEXT), None, "is not the hash"),
    ],
)
def test_cover_faults_sees_each_planted_fault(
    on_texts: pl.Expr | None, on_spans: pl.Expr | None, fault: str, small: PreTrainedTokenizerFast
) -> None:
    made = make_spans(PROBLEMS, SENTENCES, small, "base", "fail")
    texts = made.texts if on_texts is None else made.texts.with_columns(on_texts)
    spans = made.spans if on_spans is None else made.spans.with_columns(on_spans)
    found = cover_faults(texts, spans, SENTENCES)
    assert any(fault in line for line in found), found
    assert all(line.startswith(("problem 7: ", "problem 8: ")) for line in found)


def real_setting(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    problems, sentences = [], []
    for each in sorted(folder.iterdir()):
        problem_id = int(each.name.removeprefix("problem_"))
        trace = json.loads((each / "base_solution.json").read_text(encoding="utf-8"))
        chunks = json.loads((each / "chunks_labeled.json").read_text(encoding="utf-8"))
        row = problem_row(problem_id, trace["solution"].split("</think>")[0], trace["prompt"])
        problems.append({**row, "base_text": trace["full_cot"]})
        sentences += sentence_rows(problem_id, [chunk["chunk"] for chunk in chunks])
    return pl.DataFrame(problems), pl.DataFrame(sentences)


@pytest.mark.real_data
@pytest.mark.parametrize("setting", ["correct_base_solution", "incorrect_base_solution"])
@pytest.mark.parametrize("name", ["real_llama", "real_qwen"])
def test_real_rollouts_are_covered_in_both_views(
    name: str, setting: str, real_rollouts: Path, request: pytest.FixtureRequest
) -> None:
    model = {
        "real_llama": "deepseek-r1-distill-llama-8b",
        "real_qwen": "deepseek-r1-distill-qwen-14b",
    }
    tokenizer = request.getfixturevalue(name)
    folder = real_rollouts / model[name] / "temperature_0.6_top_p_0.95" / setting
    problems, sentences = real_setting(folder)
    repeated = len(sentences) - len(sentences.unique(["problem_id", "sentence"]))
    assert repeated >= 8
    wanted = [solid(each) for each in sentences.sort("problem_id", "sentence_idx")["sentence"]]
    for view in ("base", "flattened"):
        made = make_spans(problems, sentences, tokenizer, view, "fail")
        assert cover_faults(made.texts, made.spans, sentences) == []
        token_ids = dict(made.texts.select("problem_id", "token_ids").iter_rows())
        read = [
            solid(
                tokenizer.decode(
                    token_ids[row["problem_id"]][row["start_token"] : row["end_token"]]
                )
            )
            for row in made.spans.iter_rows(named=True)
        ]
        assert read == wanted
        before = pl.col("end_token").shift(1).over("problem_id")
        gaps = made.spans.select(pl.col("start_token") - before).to_series().drop_nulls()
        assert gaps.is_between(0, 3).all()
