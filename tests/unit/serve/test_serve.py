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
        ({"n": 2}, "n is not supported with this value"),
        ({"logprobs": True}, "logprobs is not supported with this value"),
        ({"tools": [{"type": "function"}]}, "tools are not supported: this model was trained"),
        ({"stop": ["a"] * 5}, "a list of at most 4 strings"),
        ({"stop": ""}, "stop must be a string"),
        ({"extra_body": {"min_p": 0.1}}, "min_p is not supported"),
        ({"extra_body": {"stream": 1}}, "stream must be true or false"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(client: OpenAI, options: Any, message: str) -> None:
    assert message in refusal(openai.BadRequestError, lambda: chat(client, "x", **options))


@pytest.mark.parametrize(
    ("model", "messages", "message"),
    [
        ("one", [], "messages must be a list of messages"),
        (
            "one",
            [{"role": "system", "content": "be kind"}, *user_messages("x")],
            "takes exactly one message, with role user",
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
    # `--device cuda` so that none of them starts serving
    done = command(Path(), "serve", *map(str, arguments), "--device", "cuda")
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
        assert "vLLM cannot serve this: it is not installed, or there is no GPU" in message
