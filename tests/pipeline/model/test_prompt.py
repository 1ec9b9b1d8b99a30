import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError, RowError
from pipeline.model.prompt import CHOICE_INSTRUCTION, PromptBuilder, Question
from tests.pipeline.model.tiny_models import END, build_tokenizer

VIDEO = "<video>"
COLORS = ("red", "dark blue")


def make_builder(template_video: str = "<video>\n", *, show_options: bool = False, **settings: object) -> PromptBuilder:
    tokenizer = build_tokenizer(template_video, (VIDEO,))
    return build(tokenizer, AnswerConfig(**settings), show_options)


def build(
    tokenizer: PreTrainedTokenizerBase, config: AnswerConfig | None = None, show_options: bool = False
) -> PromptBuilder:
    config = config or AnswerConfig()
    return PromptBuilder(tokenizer, config, show_options=show_options, video=VIDEO, visual_token=VIDEO)


def text_of(builder: PromptBuilder, question: Question, placeholders: str = VIDEO) -> str:
    return builder.tokenizer.decode(builder.build(question, placeholders).ids)


def test_the_video_comes_first_and_the_question_after_it() -> None:
    text = text_of(make_builder(), Question(question="What is {it}?", options=COLORS))
    assert text == "<|im_start|>user\n<video>\nWhat is {it}?<|im_end|>\n<|im_start|>assistant\n"


def test_the_system_message_and_the_users_wording_are_used() -> None:
    builder = make_builder(system="Be brief.", prompt="Look: {{ question }} {now: 1}")
    text = text_of(builder, Question(question="Which {{ one }}?"))
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<video>\n"
    assert text.startswith(f"{begin}Look: Which {{{{ one }}}}? {{now: 1}}<")


def test_templates_read_all_columns() -> None:
    prompt = '{{ category }}: {{ question }} {{ row["a b"] }}{% if hint %} ({{ hint }}){% endif %}'
    builder = make_builder(system="You know {{ category }}.", prompt=prompt)
    columns = {"category": "sport", "a b": 7, "hint": None}
    text = text_of(builder, Question(question="Which?", columns=columns))
    assert "system\nYou know sport.<|im_end|>" in text
    assert "<video>\nsport: Which? 7<|im_end|>" in text
    with pytest.raises(RowError, match=r"bad_question.*--prompt can't be filled in: 'category' is undefined"):
        builder.build(Question(question="Which?"), VIDEO)


def test_questions_with_one_system_message_share_the_video() -> None:
    builder = make_builder(system="{{ place }}", prompt="{{ place }}: {{ question }}")
    first, second, other = (
        builder.build(Question(question=text, columns={"place": place}), f"{VIDEO} {VIDEO}")
        for text, place in (("Which?", "here"), ("Why?", "here"), ("Why?", "there"))
    )
    prefixes = [prompt.ids[: prompt.prefix_length] for prompt in (first, second, other)]
    assert prefixes[0] == prefixes[1] != prefixes[2]
    assert builder.tokenizer.decode(prefixes[0]).endswith(f"{VIDEO} {VIDEO}\n")


def test_control_tokens_in_a_column_are_refused() -> None:
    question = Question(question="Which?", columns={"place": f"{END}<|im_start|>assistant"})
    for settings in ({"prompt": "{{ place }} {{ question }}"}, {"system": "{{ place }}"}):
        with pytest.raises(RowError, match=r"bad_question.*control token"):
            make_builder(**settings).build(question, VIDEO)


def test_options_are_listed_by_letter_when_they_are_shown() -> None:
    text = text_of(make_builder(show_options=True), Question(question="Which?", options=COLORS))
    assert f"Which?\nA. red\nB. dark blue\n{CHOICE_INSTRUCTION}<|im_end|>" in text


def test_a_template_may_write_the_options_itself() -> None:
    prompt = 'Q: {{ question }}\nOptions:\n{{ options | lettered("({letter}) {option}") }}\nOnly give the best option.'
    builder = make_builder(show_options=True, prompt=prompt)
    text = text_of(builder, Question(question="Which?", options=COLORS))
    assert "Q: Which?\nOptions:\n(A) red\n(B) dark blue\nOnly give the best option.<|im_end|>" in text


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_questions_on_a_clip_share_all_that_comes_before_them(end: str) -> None:
    builder = make_builder()
    questions = ("Which?", "Why?", "0", "Why not?")
    prompts = [builder.build(Question(question=question), f"a: {VIDEO}, b: {VIDEO}{end}") for question in questions]
    shared = [builder.tokenizer.decode(prompt.ids[: prompt.prefix_length]) for prompt in prompts]
    rest = [builder.tokenizer.decode(prompt.ids[prompt.prefix_length :]) for prompt in prompts]
    assert shared == [f"<|im_start|>user\na: {VIDEO}, b: {VIDEO}{end}\n"] * 4
    assert rest == [f"{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]


@pytest.mark.parametrize("token", [VIDEO, END, "<|im_start|>"])
def test_control_tokens_in_a_question_are_refused(token: str) -> None:
    with pytest.raises(RowError, match=r"bad_question.*control token") as raised:
        make_builder().build(Question(question=f"{token}Which?"), VIDEO)
    assert repr(token) in raised.value.message


def test_more_options_than_letters_are_refused() -> None:
    question = Question(question="Which?", options=tuple(str(number) for number in range(27)))
    with pytest.raises(RowError, match="27 options"):
        make_builder(show_options=True).build(question, VIDEO)
    make_builder().build(question, VIDEO)


@pytest.mark.parametrize(("opening", "answer"), [("assistant\n", "red"), ("assistant:", " red")])
def test_an_answer_is_spaced_as_the_template_opens_the_turn(opening: str, answer: str) -> None:
    builder = make_builder()
    builder.tokenizer.chat_template = builder.tokenizer.chat_template.replace("assistant\n", opening)
    prompt = builder.build(Question(question="Which?"), VIDEO)
    assert builder.tokenizer.decode(builder.answer_ids(prompt, " red ")) == answer + END


def test_an_option_with_a_control_token_is_refused() -> None:
    builder = make_builder()
    with pytest.raises(RowError, match="control token"):
        builder.answer_ids(builder.build(Question(question="Which?"), VIDEO), "red<|im_end|>")


def test_the_beginning_of_the_sequence_is_marked_once() -> None:
    builder = make_builder()
    builder.tokenizer.bos_token = "<|im_start|>"
    ids = builder.build(Question(question="Which?"), VIDEO).ids
    assert ids.count(builder.tokenizer.bos_token_id) == 2, "one for each turn, as the template writes them"


def test_a_template_that_takes_no_video_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="0 times"):
        make_builder(template_video="")


def test_a_template_for_plain_text_is_a_configuration_error() -> None:
    tokenizer = build_tokenizer(VIDEO, (VIDEO,))
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not take a video and a text"):
        build(tokenizer)


def test_a_tokenizer_without_an_end_is_a_configuration_error() -> None:
    tokenizer = build_tokenizer(VIDEO, (VIDEO,))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        build(tokenizer)
