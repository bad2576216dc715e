"""Secrets in text: each form in each place of a folder, and ordinary cards and tokenizers, which have none."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import uuid
from pathlib import Path

import pytest

from tests.secret_shapes import PLACES, examples, missed, weights
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.export.hub_push import collect
from yeonma.export.publish_check import find_problems
from yeonma.export.secret_scan import find_secrets, plain_readings


def test_at_least_95_percent_of_the_known_forms_are_found_in_every_place(tmp_path: Path) -> None:
    forms = examples(0)
    assert len(forms) == len({example.rule for example in forms}) == 221
    found = missed(tmp_path, range(1))
    assert set(found) == set(PLACES)
    for place, rules in found.items():
        assert len(rules) <= 0.05 * len(forms), (place, rules)


def test_a_secret_is_named_once_with_its_place_and_never_repeated() -> None:
    token = "ghp_" + "k3Jd8" * 7 + "Q"
    (problem,) = find_problems("x.json", json.dumps({"a": ["b", {"c": token}]}), {})
    assert (problem.what, problem.place) == ("contains a GitHub token", "x.json:1")
    text = '{\n"a": ["b", {"c": "\\u0067' + token[1:] + '"}]}'
    (problem,) = find_problems("x.json", text, {})
    assert problem.place == "x.json: a[1].c" and token not in str(problem)
    (problem,) = find_problems("README.md", f"one\ntwo \\u0067{token[1:]}", {})
    assert problem.place == "README.md:2"


@pytest.mark.parametrize(
    "text",
    [
        "api_key = 8fK2mQ9xZr4TvB7nLw3Y",
        "MODEL_API_KEY: '8fK2mQ9xZr4TvB7nLw3Y'",
        "<clientSecret>8fK2mQ9xZr4TvB7nLw3Y</clientSecret>",
        "| password | 8fK2mQ9xZr4TvB7nLw3Y |",
        "https://me:8fK2mQ9x@example.org/",
        "curl -H 'Authorization: Bearer 8fK2mQ9xZr4TvB7nLw3Y' localhost",
        "curl https://example.org \\\n  -u mina:8fK2mQ9x",
        r'"{\"api_key\": \"\\u0038fK2mQ9xZr4TvB7nLw3Y\"}"',
        "api_key%3D8fK2mQ9xZr4TvB7nLw3Y",
    ],
)
def test_a_random_value_beside_a_telling_name_is_a_secret(text: str) -> None:
    assert find_problems("README.md", text, {})


@pytest.mark.parametrize(
    "text",
    [
        'api_key = "YOUR_API_KEY"',
        'api_key = os.environ["OPENAI_API_KEY"]',
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "curl -H 'Authorization: Bearer $HF_TOKEN' -u user:password",
        "curl -u $USER:$TOKEN",
        "https://user:password@example.org and amqp://guest:guest@localhost",
        "AKIAIOSFODNN7EXAMPLE wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "tokenizer_class: Qwen2TokenizerFast, eos_token: <|im_end|>",
        "public_key: 8fK2mQ9xZr4TvB7nLw3Y, key_id: 8fK2mQ9xZr4TvB7nLw3Y",
        "token_sha256: " + hashlib.sha256(b"a").hexdigest(),
        "sk-toggleable__label-arrow sk-container-id-1 scikit-learn",
        'client = OpenAI(base_url="http://localhost:8000/v1", api_key="token-abc123")',
        "password: 비밀번호를 여기에 적으세요",
    ],
)
def test_placeholders_hashes_and_names_are_no_secrets(text: str) -> None:
    assert find_problems("README.md", text, {}) == []


def ordinary_card(numbers: random.Random) -> str:
    """A model card as people and tools write them: hashes, addresses, numbers, placeholders, two languages."""
    name = numbers.choice(["mina/Llama-3.1-8B", "org-lab/qwen2.5-7b-ko", "KoreaAI/smol-1.7B-v0.2"])
    noise = numbers.randbytes(64)
    commit, sha256 = noise.hex()[:40], hashlib.sha256(noise).hexdigest()
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n" + numbers.randbytes(numbers.randrange(30, 3000))).decode()
    identity = uuid.UUID(bytes=noise[:16])
    rows = "\n".join(
        f"| {step} | {numbers.random() * 3:.4f} | {numbers.random():.2e} | {numbers.randrange(10**6):,} |"
        for step in range(0, 500, 50)
    )
    parts = [
        f"base_model: {name}\nrevision: {commit}\ntags:\n- lora\n- transformers\nmodel-index:\n- name: {name}",
        f"The weights' SHA-256 is `{sha256}`, the commit {commit}. tokenizer_sha256: {sha256}",
        f"![curve](data:image/png;base64,{picture})",
        f"<img src='https://img.shields.io/badge/run-{identity}-blue?style=flat&logo=data:image/svg;base64,{picture[:40]}'>",
        f"https://huggingface.co/{name}/resolve/{commit}/model.safetensors?download=true&etag={sha256[:32]}",
        f"[wandb](https://wandb.ai/mina/runs/{noise.hex()[:8]}) session {identity} seed: {numbers.randrange(2**32)}",
        f"```python\nlogin(token='hf_...')\napi_key = os.environ['OPENAI_API_KEY']\nclient = OpenAI(api_key='EMPTY')\n"
        f"model = AutoModel.from_pretrained('{name}', revision='{commit}', token=True)\n```",
        "```bash\nexport HF_TOKEN=<your token>\ncurl -H 'Authorization: Bearer $HF_TOKEN' http://localhost:8000/v1/models\n"
        "docker run -e HUGGING_FACE_HUB_TOKEN=$HF_TOKEN vllm/vllm-openai --model x --api-key token-abc123\n```",
        f"| step | loss | learning_rate | tokens |\n| --- | --- | --- | --- |\n{rows}",
        "# 뉴스 제목\n\n이 어댑터는 기사 본문에서 제목을 만듭니다. 토큰: 1,234개, 비밀번호나 키는 없습니다.",
        f"@misc{{key2024, doi={{10.57967/hf/{numbers.randrange(9999)}}}, eprint={{{numbers.random() * 3000:.5f}}}}}",
        f"trl=={numbers.randrange(9)}.1.0 --hash=sha256:{sha256}\ntorch==2.13.0 --hash=md5:{noise.hex()[:32]}",
        "special tokens: `<|im_start|>`, `<|reserved_special_token_117|>`, `[PAD151666]`, `<0x0A>`, `▁the`",
        f"attn_implementation: flash_attention_2, dtype: bfloat16, quant: int8_float16, q4_K_M, id: {identity}",
        "Contact: mina@example.org, https://discord.gg/aB3dE9fGhJ, https://x.com/mina_ai",
    ]
    numbers.shuffle(parts)
    front, *rest = parts
    return f"---\nlicense: apache-2.0\n---\n{front}\n\n" + "\n\n".join(
        rest[: numbers.randrange(5, len(rest))]
    )


def ordinary_tokenizer(numbers: random.Random) -> str:
    """tokenizer.json with words, pieces of code and addresses, and base64, as large vocabularies have."""
    words = "api key token secret password auth Bearer access_token client_secret AWS AKIA ghp_ sk- hf_ eyJ -----BEGIN"
    pieces = [*words.split(), "https://", "://", "user:", "@", "=", '":"', "/home/", "\\u0120", "ĠauthToken"]
    made = {
        "".join(numbers.choice(pieces) for _ in range(numbers.randrange(1, 3)))
        if numbers.random() < 0.3
        else base64.b64encode(numbers.randbytes(numbers.randrange(1, 16))).decode()
        for _ in range(500)
    }
    merges = [f"{numbers.choice(pieces)} {numbers.choice(pieces)}" for _ in range(300)]
    model = {
        "type": "BPE",
        "vocab": {piece: index for index, piece in enumerate(sorted(made))},
        "merges": merges,
    }
    added = [{"id": index, "content": f"<|reserved_special_token_{index}|>"} for index in range(50)]
    return json.dumps({"added_tokens": added, "model": model}, ensure_ascii=numbers.random() < 0.5, indent=1)


def test_nothing_is_wrong_with_200_ordinary_cards_and_200_tokenizers(tmp_path: Path) -> None:
    weights(tmp_path, {"format": "pt"})
    made = [byte_level(), sentencepiece_bpe(), unigram()]
    for seed in range(200):
        (tmp_path / "README.md").write_text(ordinary_card(random.Random(seed)), encoding="utf-8")
        if seed < len(made):
            made[seed].save_pretrained(tmp_path)
        else:
            text = ordinary_tokenizer(random.Random(seed))
            (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        sent = collect(tmp_path, None, False, {}, ["minsu"])
        assert {"README.md", "tokenizer.json"} <= {file.name for file in sent}


def test_escapes_and_references_are_read_as_what_they_stand_for() -> None:
    assert plain_readings("a b") == []
    assert plain_readings(r"\u0061\x62\u{63}\/d\n&#101;&amp;") == ["abc/d e&"]
    assert plain_readings("%61%20b") == ["a b"]
    assert plain_readings(r"\\u0061") == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "a.",
        "=",
        "key ",
        "api_key=a1B2c3D4e5,",
        "kind: secret ",
        "ey.",
        "s.",
        "hvb.",
        "a://b",
        "curl -u aaa:bbb ",
    ],
)
def test_hostile_text_takes_time_in_proportion_to_its_length(unit: str) -> None:
    """A step that grew with the square of the length would take many minutes for this text, not seconds."""
    find_secrets((unit * (1_000_000 // len(unit)))[:1_000_000], {})
