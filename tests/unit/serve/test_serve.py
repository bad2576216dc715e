"""`yeonma serve` gives OpenAI's client the answers of `yeonma generate`: one at a time, concurrently and streamed."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from transformers import LlamaForCausalLM

from tests.adapters import adapter_on, tiny_base
from tests.runs import WORDS, characters, command
from tests.servers import Server, serving
from yeonma import load
from yeonma.data.rows import Row
from yeonma.model.logprobs import example_logprobs
from yeonma.policy import Policy
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode

TEMPLATE = "below is an article.\n\n{document}\n\ntitle: {title}"
TWO_TEMPLATE = (
    "below is an order.\n\n{order}\n\nand its input:\n{input}\n\nanswer: {answer}\n---\n"
    "below is an order.\n\n{order}\n\nanswer: {answer}\n"
)
DOCUMENTS = [f"{number}. {word} and {WORDS[number - 3]}." for number, word in enumerate(WORDS)]
MAX_NEW_TOKENS = 24
COLUMN = "body"


@dataclass(frozen=True)
class Folders:
    base: Path
    one: Path
    two: Path
    framed: Path
    after: str
    """The text after the answer in the template of `framed`: the end of the answer to `framed_document`."""
    framed_document: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("serve")
    base = tiny_base(root / "base", characters())
    one = adapter_on(base, root / "one", TEMPLATE, columns={"document": COLUMN, "title": "document"})
    two = adapter_on(base, root / "two", TWO_TEMPLATE, seed=1, r=8, cutoff_len=400)
    loaded = load(one)
    for document in DOCUMENTS:
        whole = generate_answer(loaded, document)
        after = whole[-5:]
        if after == after.strip() and "\n" not in after and len(whole) > len(after):
            break
    else:
        raise AssertionError("no answer ends in plain text")
    text = after.replace("{", "{{").replace("}", "}}")
    framed = adapter_on(base, root / "framed", TEMPLATE + text)  # of the same weights
    return Folders(base, one, two, framed, after, document)


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    errors = tmp_path_factory.mktemp("server") / "errors"
    limits = ("--max_new_tokens", str(MAX_NEW_TOKENS), "--max_new_tokens_limit", "100")
    with serving(errors, folders.one, folders.two, folders.framed, *limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def generate_answer(loaded: Policy, document: str, **options: Any) -> str:
    """Generates the answer for a row whose column has its name of training. Clients use the template's field name."""
    return loaded.generate({COLUMN: document}, **{"max_new_tokens": MAX_NEW_TOKENS, **options})


def user_messages(content: str) -> Any:
    return [{"role": "user", "content": content}]


def chat(client: OpenAI, content: str, model: str = "one", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=user_messages(content), **options)


def stream(client: OpenAI, content: str, model: str = "one", **options: Any) -> tuple[list[str], list[Any]]:
    """The pieces of text, and the chunks."""
    chunks = list(chat(client, content, model, stream=True, **options))
    parts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    return parts, chunks


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def trained_prompt(loaded: Policy, values: dict[str, str]) -> list[int]:
    """The token ids before the answer, as in training."""
    adapter = loaded.prompt_builder.adapter
    rows = [Row(1, {**values, adapter.template.answer_field: "any"}, "row")]
    rendered = [adapter.template.render(row) for row in rows]
    (example,) = encode(rendered, rows, loaded.prompt_builder.tokenizer, adapter.rules)
    assert isinstance(example, Example)
    return example.token_ids[: int(example.trained.argmax())].tolist()


def test_the_ready_line_has_the_address_and_the_models(server: Server, client: OpenAI) -> None:
    assert server.ready_line.startswith("Serving one, two, framed, base at http://127.0.0.1:")
    assert [model.id for model in client.models.list()] == ["one", "two", "framed", "base"]
    assert client.models.retrieve("two").id == "two"


def test_chat_answer_equals_that_of_generate(folders: Folders, client: OpenAI) -> None:
    loaded = load(folders.one)
    for document in DOCUMENTS[:3]:
        answer = chat(client, document)
        assert text_of(answer) == generate_answer(loaded, document)
        ids = loaded.prompt_ids({COLUMN: document})
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
        assert answer.choices[0].finish_reason in ("stop", "length")


def test_prompt_ids_are_those_of_training(folders: Folders, client: OpenAI) -> None:
    with_ids = {"return_token_ids": True}
    document = DOCUMENTS[0]
    expected = trained_prompt(load(folders.one), {"document": document})
    assert chat(client, document, extra_body=with_ids).prompt_token_ids == expected
    assert chat(client, document, "base", extra_body=with_ids).prompt_token_ids == expected
    text = TEMPLATE.replace("{document}", document).replace("{title}", "")
    completion = client.completions.create(model="one", prompt=text, extra_body=with_ids)
    assert completion.choices[0].prompt_token_ids == expected
    two = load(folders.two)
    for row in ({"order": "sort", "input": "b a"}, {"order": "wait"}):
        answer = chat(client, json.dumps(row), "two", extra_body=with_ids)
        assert answer.prompt_token_ids == trained_prompt(two, row)
    answer_to_text = chat(client, "wait", "two", extra_body=with_ids)
    assert answer_to_text.prompt_token_ids == trained_prompt(two, {"order": "wait"})


def test_adapters_on_one_base_do_not_mix(folders: Folders, client: OpenAI) -> None:
    document = DOCUMENTS[1]
    alone = generate_answer(load(folders.one, adapter_weights=False), document)
    second = load(folders.two).generate({"order": document}, max_new_tokens=MAX_NEW_TOKENS)
    for _ in range(2):  # alternately
        assert text_of(chat(client, document)) == generate_answer(load(folders.one), document)
        assert text_of(chat(client, document, "two")) == second
        assert text_of(chat(client, document, "base")) == alone
    assert len({generate_answer(load(folders.one), document), second, alone}) == 3


def test_a_stream_has_the_same_text(client: OpenAI) -> None:
    whole = chat(client, DOCUMENTS[2])
    parts, chunks = stream(client, DOCUMENTS[2], stream_options={"include_usage": True})
    assert "".join(parts) == text_of(whole)
    assert len(parts) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_sixteen_concurrent_requests_get_the_answers_of_sequential_ones(client: OpenAI) -> None:
    requests = [
        (f"{number}. {WORDS[number % 10]}", ("one", "two", "base")[number % 3], 8 + number)
        for number in range(16)
    ]
    expected = [text_of(chat(client, text, model, max_tokens=limit)) for text, model, limit in requests]
    assert len(set(expected)) > 12

    def send(number: int) -> str:
        text, model, limit = requests[number]
        if number % 2:
            return "".join(stream(client, text, model, max_tokens=limit)[0])
        return text_of(chat(client, text, model, max_tokens=limit))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(send, range(16))) == expected


def test_template_text_after_the_answer_is_not_sent(folders: Folders, client: OpenAI) -> None:
    whole = generate_answer(load(folders.one), folders.framed_document)
    assert whole.endswith(folders.after)
    expected = whole.removesuffix(folders.after)
    assert text_of(chat(client, folders.framed_document, "framed")) == expected
    assert "".join(stream(client, folders.framed_document, "framed")[0]) == expected


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: OpenAI) -> None:
    whole = text_of(chat(client, DOCUMENTS[3]))
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["never in it", stop]):
        answer = chat(client, DOCUMENTS[3], stop=stops)
        assert (text_of(answer), answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage.completion_tokens < MAX_NEW_TOKENS
        assert "".join(stream(client, DOCUMENTS[3], stop=stops)[0]) == expected


def test_a_seed_makes_sampling_reproducible(client: OpenAI) -> None:
    def sampled(**options: Any) -> str:
        return text_of(chat(client, DOCUMENTS[4], temperature=1.0, top_p=0.95, **options))

    assert sampled(seed=7) == sampled(seed=7) != sampled(seed=8)
    assert len({sampled() for _ in range(4)}) > 1
    assert sampled(seed=7, extra_body={"top_k": 1}) == text_of(chat(client, DOCUMENTS[4]))


def test_several_prompts_of_one_request_get_an_answer_each(client: OpenAI) -> None:
    texts = ["storm and", "the wind and the library", "a"]
    alone = [
        client.completions.create(model="two", prompt=text, max_tokens=9).choices[0].text for text in texts
    ]
    together = client.completions.create(model="two", prompt=texts, max_tokens=9)
    assert [choice.text for choice in together.choices] == alone
    assert together.usage is not None
    streamed = ["", "", ""]
    for chunk in client.completions.create(model="two", prompt=texts, max_tokens=9, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == alone


def test_a_header_says_that_a_prompt_was_shortened(client: OpenAI) -> None:
    long = client.chat.completions.with_raw_response.create(
        model="two", messages=user_messages(" ".join(WORDS) * 10), extra_body={"return_token_ids": True}
    )
    assert long.headers["yeonma-shortened"] == "true"
    assert len(json.loads(long.text)["prompt_token_ids"]) <= 400 - MAX_NEW_TOKENS
    short = client.chat.completions.with_raw_response.create(model="two", messages=user_messages("wait"))
    assert "yeonma-shortened" not in short.headers


def refusal(error: type[openai.APIStatusError], call: Any) -> str:
    """The error's message; the body must have OpenAI's format."""
    with pytest.raises(error) as caught:
        call()
    body = json.loads(caught.value.response.text)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return str(body["error"]["message"])


def test_an_unknown_model_gets_a_list_of_the_models(client: OpenAI) -> None:
    message = refusal(openai.NotFoundError, lambda: chat(client, "x", "gpt-4"))
    assert message == "there is no model 'gpt-4'; there are one, two, framed, base"
    refusal(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))


@pytest.mark.parametrize("size", [1_000_001, 20_000_000])
def test_an_oversize_request_is_refused(client: OpenAI, size: int) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, "x" * size)
    assert caught.value.status_code == 413
    assert "larger than 1,000,000 bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 101}, "max_tokens is 101, but this server allows at most 100"),
        ({"max_completion_tokens": 101}, "max_completion_tokens is 101"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"seed": 2**32}, "seed must be a whole number"),
        ({"n": 0}, "n must be a whole number from 1 to 64"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be a whole number from 0 to 20"),
        ({"extra_body": {"best_of": 2}}, "best_of is not supported with this value"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be an object of token ids with numbers from -100 to 100"),
        ({"logit_bias": {"97": 1}}, "logit_bias: this model has"),
        ({"verbosity": "low"}, "verbosity is not supported: this model's chat template has no such argument"),
        ({"tools": [{"type": "function"}]}, "tools are not supported: this model was trained"),
        ({"stop": ["a"] * 5}, "a list of at most 4 strings"),
        ({"stop": ""}, "stop must be a string"),
        ({"extra_body": {"min_p": 1.1}}, "min_p must be a number from 0 to 1"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos is not supported with this value"),
        ({"extra_body": {"stream": 1}}, "stream must be true or false"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(client: OpenAI, options: Any, message: str) -> None:
    assert message in refusal(openai.BadRequestError, lambda: chat(client, "x", **options))


@pytest.mark.parametrize(
    ("model", "messages", "message"),
    [
        ("one", [], "messages must be a list of 1 to 4096 messages"),
        (
            "one",
            [{"role": "system", "content": "be kind"}, *user_messages("x")],
            "leave out the one with role system, for which the template has no place",
        ),
        (
            "one",
            [*user_messages("x"), {"role": "assistant", "content": "y"}, *user_messages("z")],
            "send only the last one, because the template has no place for those before it",
        ),
        (
            "one",
            [{"role": "system", "content": "be kind"}],
            "takes exactly one message, with role user: the last message must be the user's",
        ),
        ("one", user_messages(""), 'field "document" is empty'),
        (
            "one",
            user_messages([{"type": "image_url"}]),
            "messages[0].content must be a string, or a list of parts of type text",
        ),
        ("two", user_messages("{"), "JSON object with these string fields: input, order"),
        ("two", user_messages('{"ordre": "x"}'), "there is no field 'ordre'"),
        ("two", user_messages('{"order": 1}'), "JSON object with these string fields"),
        ("two", user_messages('{"input": "x"}'), 'field "order" is missing'),
    ],
)
def test_messages_that_do_not_fit_the_template_are_refused(
    client: OpenAI, model: str, messages: Any, message: str
) -> None:
    create: Any = client.chat.completions.create
    answer = refusal(openai.BadRequestError, lambda: create(model=model, messages=messages))
    assert message in answer


def test_a_prompt_longer_than_the_model_is_refused(client: OpenAI) -> None:
    message = refusal(
        openai.BadRequestError, lambda: client.completions.create(model="one", prompt="a" * 4090)
    )
    assert "exceed the model's 4096 positions" in message


def test_a_text_that_no_tokens_could_make_fit_is_refused_before_it_is_tokenised(client: OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="one", prompt=["a", "a" * 65_537]),
        lambda: chat(client, "a" * 65_537),
        lambda: chat(client, json.dumps({"order": "a", "input": "a" * 65_536}), "two"),
    ):
        message = refusal(openai.BadRequestError, call)
        assert message.endswith("bytes, and the model's 4,096 positions hold at most 65,536: shorten it")


def post(server: Server, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    all_headers = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): text for name, text in headers.items()},
    }
    request = urllib.request.Request(f"{server.url}/chat/completions", body, all_headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_malformed_requests_are_refused(server: Server) -> None:
    good = json.dumps({"model": "one", "messages": user_messages("x"), "max_tokens": 1}).encode()
    assert post(server, good)[0] == 200
    for body in (
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b'{"model": "one"}',
        b'{"model": 1, "messages": []}',
    ):
        status, answer = post(server, body)
        assert status == 400 and answer["error"]["message"]
    for lone_surrogate in (good.replace(b'"x"', b'"x\\ud800"'), good.replace(b"max_tokens", b"\\udc00")):
        status, answer = post(server, lone_surrogate)
        assert status == 400 and answer["error"]["message"]
    # browsers send text/plain to other sites without asking
    assert post(server, good, Content_Type="text/plain")[0] == 415
    assert post(server, good, Content_Encoding="gzip")[0] == 415
    assert post(server, good, Host="evil.example")[0] == 403
    assert post(server, good, Host="localhost:99")[0] == 200


def test_only_requests_with_the_key_are_answered(folders: Folders, tmp_path: Path) -> None:
    environment = {"YEONMA_API_KEY": "sesame"}
    with serving(tmp_path / "errors", folders.one, "--host", "0.0.0.0", environment=environment) as server:
        assert "requests need the API key" in server.ready_line and "sesame" not in server.ready_line
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for key in ("wrong", "sesam"):
            with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                for call in (client.models.list, lambda client=client: chat(client, "x")):
                    message = refusal(openai.AuthenticationError, call)
                    assert message == "the API key is missing or wrong"
        for key, challenge in (
            ("Bearer x", 'Bearer realm="yeonma", error="invalid_token"'),
            ("", 'Bearer realm="yeonma"'),
        ):
            request = urllib.request.Request(f"{url}/models", headers={"Authorization": key} if key else {})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            assert (caught.value.code, caught.value.headers["WWW-Authenticate"]) == (401, challenge)
        with OpenAI(base_url=url, api_key="sesame", max_retries=0) as client:
            assert text_of(chat(client, DOCUMENTS[0], max_tokens=MAX_NEW_TOKENS)) == generate_answer(
                load(folders.one), DOCUMENTS[0]
            )


@pytest.mark.slow
def test_ctrl_c_fails_running_requests_and_stops_the_server_cleanly(tmp_path: Path) -> None:
    base, token_limit = tiny_base(tmp_path / "base", characters(), positions=1_000_000), 900_000
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0.0  # some other token's logit is always above 0
    model.save_pretrained(base)
    errors, folder = tmp_path / "errors", adapter_on(base, tmp_path / "endless", TEMPLATE)
    with (
        serving(errors, folder, "--max_new_tokens_limit", str(token_limit)) as server,
        server.client() as client,
    ):
        chunks = client.completions.create(
            model="endless", prompt="storm", max_tokens=token_limit, stream=True
        )
        next(iter(chunks))
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)
    assert errors.read_text().endswith("yeonma: stopped\n")


def startup_error(*arguments: Path | str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yeonma.serve.server.load_served_models", lambda *_: pytest.fail("it starts serving"))
        done = command(Path(), "serve", *map(str, arguments))
    assert (done.status, done.out) == (2, "")
    return done.err


def test_a_port_in_use_is_reported_before_anything_is_loaded(server: Server) -> None:
    port = server.url.split(":")[2].split("/")[0]
    message = startup_error("nowhere", "--port", port)
    assert message.startswith(
        f"yeonma: --port {port}: the port is in use at 127.0.0.1; stop the other server"
    )


def test_public_host_without_a_key_and_invalid_host_or_key_are_refused(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YEONMA_API_KEY", raising=False)
    message = startup_error(folders.one, "--host", "0.0.0.0")
    assert (
        "--host 0.0.0.0: other machines could connect, and no API key is set; set $YEONMA_API_KEY" in message
    )
    assert "no such address" in startup_error(folders.one, "--host", "no.such.host.invalid")
    assert "spaces" in startup_error(folders.one, "--api_key", "a b")
    monkeypatch.setenv("YEONMA_API_KEY", "열쇠")
    assert "YEONMA_API_KEY: the key contains" in startup_error(folders.one)


def test_folders_that_cannot_be_served_together_are_refused(folders: Folders, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", characters(), seed=1)
    elsewhere = adapter_on(other, tmp_path / "elsewhere", TEMPLATE)
    assert "its base is" in startup_error(folders.one, elsewhere, "--port", "0")
    message = startup_error(folders.one, folders.one, tmp_path / "none", "--port", "0")
    assert "given twice" in message and "no such folder" in message
    assert "leave no room" in startup_error(folders.two, "--max_new_tokens", "500", "--port", "0")
    message = startup_error(
        folders.one, "--max_new_tokens", "500", "--max_new_tokens_limit", "100", "--port", "0"
    )
    assert "500 exceeds max_new_tokens_limit 100" in message
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        message = startup_error(folders.one, "--engine", "vllm", "--port", "0")
        assert "vLLM cannot serve this: it is not installed" in message


def test_tokens_have_their_log_probabilities_of_training(folders: Folders, client: OpenAI) -> None:
    answer = chat(client, DOCUMENTS[5], logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True})
    content = answer.choices[0].logprobs.content
    ids = answer.choices[0].token_ids
    assert len(content) == len(ids) == answer.usage.completion_tokens
    shown = [token.token for token in content if token.token not in ("<pad>", "<s>", "<unk>")]
    assert "".join(shown).strip() == text_of(answer)
    assert [bytes(token.bytes).decode() for token in content] == [token.token for token in content]
    expected = training_logprobs(load(folders.one), answer.prompt_token_ids, ids)
    assert [token.logprob for token in content] == pytest.approx(expected, abs=1e-5)
    for token in content:
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, tops[0])  # greedy
    sampled = chat(client, DOCUMENTS[5], logprobs=True, temperature=2.0, seed=1, max_tokens=9)
    raw = [token.logprob for token in sampled.choices[0].logprobs.content]
    with_ids = chat(
        client,
        DOCUMENTS[5],
        temperature=2.0,
        seed=1,
        max_tokens=9,
        extra_body={"return_token_ids": True},
    )
    expected = training_logprobs(load(folders.one), with_ids.prompt_token_ids, with_ids.choices[0].token_ids)
    assert raw == pytest.approx(expected, abs=1e-5)  # the temperature does not change them


def training_logprobs(loaded: Policy, prompt: list[int], answer: list[int]) -> list[float]:
    """The log-probabilities of an answer's tokens, by the function of training."""
    ids = np.array([*prompt, *answer])
    with torch.no_grad(), loaded.active():
        logprobs = example_logprobs(
            loaded.transformers_model,
            loaded.support,
            [ids],
            [np.arange(len(ids)) >= len(prompt)],
            share_prefix=False,
        )
    return logprobs.tolist()


def test_streamed_log_probabilities_are_those_of_the_whole_answer(client: OpenAI) -> None:
    options = {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 1.0}
    whole = chat(client, DOCUMENTS[2], **options)
    texts, tokens = ["", ""], [[], []]
    for chunk in chat(client, DOCUMENTS[2], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    for index, choice in enumerate(whole.choices):
        assert [token.token for token in tokens[index]] == [token.token for token in choice.logprobs.content]
        numbers = [token.logprob for token in choice.logprobs.content]
        assert [token.logprob for token in tokens[index]] == pytest.approx(numbers, abs=1e-5)


def test_every_choice_has_its_own_seed(client: OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    answer = chat(client, DOCUMENTS[6], n=4, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts[0] == text_of(chat(client, DOCUMENTS[6], **options))
    assert texts[:2] == [
        choice.message.content for choice in chat(client, DOCUMENTS[6], n=2, **options).choices
    ]
    one = chat(client, DOCUMENTS[6], **options).usage
    assert answer.usage.prompt_tokens == one.prompt_tokens
    with ThreadPoolExecutor(4) as pool:  # in company
        others = [pool.submit(chat, client, document, max_tokens=9) for document in DOCUMENTS[:3]]
        again = pool.submit(chat, client, DOCUMENTS[6], n=4, **options).result()
        assert [choice.message.content for choice in again.choices] == texts
        assert all(text_of(other.result()) for other in others)
    two = client.completions.create(model="two", prompt=["storm and", "a"], n=2, **options)
    alone = client.completions.create(model="two", prompt="a", n=2, **options)
    assert [choice.text for choice in two.choices[2:]] == [choice.text for choice in alone.choices]


def test_an_echoed_prompt_is_scored_as_in_training(folders: Folders, client: OpenAI) -> None:
    texts = ["a storm and the wind", "a storm and the library of the wind", "a"]
    loaded = load(folders.two)
    options: Any = {"model": "two", "echo": True, "logprobs": 2}
    scored = client.completions.create(prompt=texts, max_tokens=0, **options)
    assert [choice.text for choice in scored.choices] == texts
    assert scored.usage is not None and scored.usage.completion_tokens == 0
    generated = client.completions.create(prompt=texts, max_tokens=3, **options)
    for choice, longer, text in zip(scored.choices, generated.choices, texts, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and longer.logprobs is not None
        ids = loaded.text_prompt(text, 1).token_ids.tolist()
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        expected = training_logprobs(loaded, ids[:1], ids[1:])
        assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
        tokens = logprobs.tokens
        assert [
            text[at : at + len(token)] for at, token in zip(logprobs.text_offset, tokens, strict=True)
        ] == tokens
        for token, number, top in zip(
            tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert top[token] == number and len(top) in (2, 3)
        assert longer.text.startswith(text) and len(longer.text) > len(text)
        assert longer.logprobs.tokens[: len(ids)] == tokens
        whole = longer.logprobs.token_logprobs
        assert whole[1 : len(ids)] == pytest.approx(expected, abs=1e-5)
        assert len(whole) - len(ids) == 3 or longer.finish_reason == "stop"
    pieces, numbers = ["", "", ""], [[], [], []]
    for chunk in client.completions.create(prompt=texts, max_tokens=3, stream=True, **options):
        for part in chunk.choices:
            pieces[part.index] += part.text
            numbers[part.index] += part.logprobs.text_offset if part.logprobs else []
    assert pieces == [choice.text for choice in generated.choices]
    assert numbers == [choice.logprobs.text_offset for choice in generated.choices]


def test_token_ids_are_a_prompt_as_they_are(folders: Folders, client: OpenAI) -> None:
    loaded = load(folders.two)
    texts = ["storm and", "the wind"]
    ids = [loaded.text_prompt(text, 1).token_ids.tolist() for text in texts]
    expected = client.completions.create(model="two", prompt=texts, max_tokens=9)
    given = client.completions.create(
        model="two", prompt=ids, max_tokens=9, extra_body={"return_token_ids": True}
    )
    assert [choice.text for choice in given.choices] == [choice.text for choice in expected.choices]
    assert [choice.prompt_token_ids for choice in given.choices] == ids
    alone = client.completions.create(model="two", prompt=ids[0], max_tokens=9, echo=True)
    assert alone.choices[0].text == texts[0] + expected.choices[0].text
    message = refusal(
        openai.BadRequestError, lambda: client.completions.create(model="two", prompt=[10_000], max_tokens=1)
    )
    assert message.startswith("prompt: token 10000: this model has")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b c"]},
    },
    "required": ["name", "number", "kind"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


def check_json(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"name", "number", "kind"}
    assert len(value["name"]) <= 6 and value["number"] in range(100) and value["kind"] in ("a", "b c")


def test_an_answer_follows_a_json_schema(client: OpenAI) -> None:
    options: Any = {"response_format": JSON_FORMAT, "max_tokens": 100}
    answer = chat(client, DOCUMENTS[0], **options)
    check_json(text_of(answer))
    assert answer.choices[0].finish_reason == "stop"
    sampled = chat(client, DOCUMENTS[0], n=3, temperature=1.5, seed=2, **options)
    texts = [choice.message.content for choice in sampled.choices]
    assert len(set(texts)) == 3
    for text in texts:
        check_json(text)
    plain = text_of(chat(client, DOCUMENTS[1]))
    with ThreadPoolExecutor(3) as pool:  # in company of an answer without a schema, streamed
        without = pool.submit(chat, client, DOCUMENTS[1])
        with_schema = pool.submit(stream, client, DOCUMENTS[0], **options)
        assert "".join(with_schema.result()[0]) == text_of(answer)
        assert text_of(without.result()) == plain
    any_object = chat(
        client, DOCUMENTS[0], temperature=1.0, seed=1, max_tokens=100, response_format={"type": "json_object"}
    )
    if any_object.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text_of(any_object)), dict)
    assert text_of(any_object).lstrip().startswith("{")
    short = {"type": "object", "properties": {"kind": {"const": "b c"}}, "required": ["kind"]}
    form = {"type": "json_object", "schema": {**short, "additionalProperties": False}}
    completion = client.completions.create(
        model="two", prompt="a", max_tokens=100, extra_body={"response_format": form}
    )
    assert json.loads(completion.choices[0].text) == {"kind": "b c"}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}, "Invalid type: strin"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
            "cannot be followed: Unimplemented keys",
        ),
        ({"type": "json_schema"}, "response_format.json_schema is missing"),
        ({"type": "grammar"}, "response_format.type must be text, json_object or json_schema"),
        ({"type": "json_object", "x": 1}, "response_format.x is not supported"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(
    client: OpenAI, form: Any, message: str
) -> None:
    answer = refusal(openai.BadRequestError, lambda: chat(client, "x", extra_body={"response_format": form}))
    assert message in answer and len(answer) < 600


def test_bias_and_penalties_change_the_answer(client: OpenAI) -> None:
    with_ids = {"return_token_ids": True}
    first = chat(client, DOCUMENTS[3], extra_body=with_ids).choices[0].token_ids
    banned = chat(client, DOCUMENTS[3], logit_bias={str(first[0]): -100}, extra_body=with_ids).choices[0]
    assert first[0] not in banned.token_ids
    only = chat(client, DOCUMENTS[3], logit_bias={str(first[0]): 100}, max_tokens=5, extra_body=with_ids)
    assert only.choices[0].token_ids == [first[0]] * 5
    spread = chat(
        client,
        DOCUMENTS[3],
        logit_bias={str(first[0]): 100},
        presence_penalty=2,
        frequency_penalty=2,
        max_tokens=5,
        extra_body=with_ids,
    )
    assert spread.choices[0].token_ids == [first[0]] * 5  # 100 - 2 - 2 * 4 is still above all others
    certain = chat(client, DOCUMENTS[3], temperature=1.0, seed=4, extra_body={"min_p": 1.0})
    assert text_of(certain) == text_of(chat(client, DOCUMENTS[3]))


def test_neutral_values_of_known_parameters_change_nothing(client: OpenAI) -> None:
    neutral: dict[str, Any] = {
        "n": 1, "logprobs": None, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "best_of": 1, "suffix": "", "service_tier": "auto", "store": False, "metadata": {}, "user": "me",
        "safety_identifier": "x", "prompt_cache_key": "x", "parallel_tool_calls": True, "reasoning_effort": "medium",
        "verbosity": "medium", "modalities": ["text"], "response_format": {"type": "text"}, "tools": [],
        "tool_choice": "none", "prediction": None, "audio": None, "web_search_options": None, "stream_options": None,
        "top_k": -1, "min_p": 0, "repetition_penalty": 1, "length_penalty": 1, "use_beam_search": False,
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "ignore_eos": False, "min_tokens": 0,
        "add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {},
        "include_stop_str_in_output": False, "echo": False, "stop": None, "functions": [], "guided_json": None,
        "return_token_ids": False, "typical_p": 1.0, "mirostat": 0,
    }  # fmt: skip
    assert text_of(chat(client, DOCUMENTS[0], extra_body=neutral)) == text_of(chat(client, DOCUMENTS[0]))
    plain = client.completions.create(model="two", prompt="storm", max_tokens=9).choices[0].text
    given = {**neutral, "logprobs": False}
    answer = client.completions.create(model="two", prompt="storm", max_tokens=9, extra_body=given)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == (plain, None)
