"""What a step spends its time on: the profiler's events sorted into kinds of work, and what to try next.

Works on the kernels of a GPU, by their names, and on PyTorch's operators on the CPU, by their names and the shapes of
their inputs, which tell LoRA's products and the LM head's from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tables import about_machine, table

PRODUCTS, LORA, HEAD, ATTENTION = "products", "lora", "head", "attention"
ELEMENTWISE, REDUCTIONS, INDEXING, COPIES = "elementwise", "reductions", "indexing", "copies"
ALLOCATION, OPTIMIZER, OTHER = "allocation", "optimizer", "other"
PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (ELEMENTWISE, ("triton_poi",)),
    (REDUCTIONS, ("triton_red", "triton_per")),
    (ATTENTION, ("flash", "attention", "attn", "fmha", "bmm")),
    (OPTIMIZER, ("multi_tensor", "foreach", "adam", "sgd", "optimizer", "lpnorm")),
    (
        PRODUCTS,
        (
            *("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk", "scaled_mm", "grouped_mm"),
            *("aten::mm", "addmm", "linear_pointwise", "mkl_linear", "mkldnn_linear", "matmul"),
        ),
    ),
    (COPIES, ("memcpy", "copy", "catarray", "aten::cat", "clone", "contiguous", "transpose_kernel")),
    (
        INDEXING,
        ("index", "gather", "scatter", "embedding", "masked_fill", "masked_select", "sort", "unique"),
    ),
    (
        ALLOCATION,
        ("memset", "aten::empty", "new_empty", "resize_", "aten::zero", "new_zeros", "fill", "_like"),
    ),
    (
        REDUCTIONS,
        ("softmax", "norm", "reduce", "sum", "mean", "max", "logsumexp"),
    ),
    (
        ELEMENTWISE,
        (
            *("elementwise", "dropout", "aten::mul", "aten::add", "aten::sub", "aten::div"),
            *("silu", "sigmoid", "neg", "pow", "rsqrt", "sqrt", "exp", "cos", "sin", "where", "addcmul"),
            *("addcdiv", "lerp", "clamp", "reciprocal", "swiglu", "rotary", "aten::to", "tanh", "gelu"),
        ),
    ),
)
"""Kind -> parts of the names of its kernels and operators, in lower case. The first kind that has one counts."""


@dataclass(frozen=True)
class Widths:
    """What tells products apart by their shapes."""

    lora_r: int
    vocabulary: int


def kind_of(name: str, shapes: Iterable[Sequence[Any]] = (), widths: Widths | None = None) -> str:
    """The kind of a kernel or an operator; by its name alone without `widths` or without shapes."""
    lower = name.lower()
    kind = next((kind for kind, parts in PATTERNS if any(part in lower for part in parts)), OTHER)
    if widths is None or kind == OPTIMIZER:
        return kind
    sizes = {size for shape in shapes for size in shape}
    if widths.vocabulary in sizes:
        return HEAD
    return LORA if kind == PRODUCTS and widths.lora_r in sizes else kind


def by_kind(kernels: Iterable[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """Seconds and calls of (kind, seconds, calls), the largest first."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for kind, spent, count in kernels:
        seconds[kind] = seconds.get(kind, 0.0) + spent
        calls[kind] = calls.get(kind, 0) + count
    order = sorted(seconds, key=lambda kind: (-seconds[kind], kind))
    return [{"kind": kind, "seconds": seconds[kind], "calls": calls[kind]} for kind in order]


@dataclass(frozen=True)
class NextTry:
    """Something to try, and the seconds of a step that it can save at most."""

    what: str
    seconds: float


IDLE = "idle"
TRIES: Mapping[str, Mapping[str, str]] = {
    "en": {
        IDLE: "the device waits for launches: CUDA graphs, or more rows at once",
        PRODUCTS: "large products run below the device's rate: more rows at once, LoRA's products of a block together",
        ATTENTION: "another attention kernel, or fewer copied keys",
        ELEMENTWISE: "element-wise passes: compile the whole decoder layer",
        REDUCTIONS: "norms and softmax: compile the whole decoder layer",
        INDEXING: "gathers and scatters: lay tokens out so that fewer are moved",
        COPIES: "copies and casts: keep one number format and layout",
        ALLOCATION: "filled memory: reuse buffers",
        OPTIMIZER: "the update: flat buffers",
        OTHER: "kernels of no known kind: see the table of kernels",
    },
    "ko": {
        IDLE: "장치가 커널 실행 요청을 기다림: CUDA 그래프, 또는 한 번에 더 많은 행",
        PRODUCTS: "큰 행렬곱이 장치 속도에 못 미침: 한 번에 더 많은 행, 한 블록의 LoRA 행렬곱을 함께",
        ATTENTION: "다른 어텐션 커널, 또는 복사하는 키 줄이기",
        ELEMENTWISE: "원소별 연산: 디코더 층 전체를 컴파일",
        REDUCTIONS: "정규화와 소프트맥스: 디코더 층 전체를 컴파일",
        INDEXING: "모으기와 흩뿌리기: 옮기는 토큰이 적도록 배치",
        COPIES: "복사와 형 변환: 숫자 형식과 배치를 하나로",
        ALLOCATION: "메모리 채우기: 버퍼 재사용",
        OPTIMIZER: "갱신: 평평한 버퍼",
        OTHER: "종류를 알 수 없는 커널: 커널 표 참고",
    },
}


def next_tries(
    values: Mapping[str, Any], least_product_seconds: float, language: str = "en"
) -> list[NextTry]:
    """What a profile says to try next, that with the most to gain first.

    The time of products counts only as far as it is above `least_product_seconds`, which they take at the rate of a
    large product. All other work might be done within a product's kernel, so all of its time counts.
    """
    idle = max(0.0, values["step_seconds"] - values["busy_seconds"])
    waits = values["waits"] + values["copies_to_host"]
    seconds = {IDLE: idle, **{kind["kind"]: kind["seconds"] for kind in values["kinds"]}}
    products = sum(seconds.pop(kind, 0.0) for kind in (PRODUCTS, LORA, HEAD))
    if products:
        seconds[PRODUCTS] = max(0.0, products - least_product_seconds)
    words = dict(TRIES[language])
    if waits > 1:
        words[IDLE] += f" (waits: {waits})" if language == "en" else f" (대기 {waits}번)"
    found = [NextTry(words[kind], spent) for kind, spent in seconds.items()]
    return sorted(found, key=lambda one: (-one.seconds, one.what))


# The table of a step on the CPU

KINDS: Mapping[str, Mapping[str, str]] = {
    "en": {
        PRODUCTS: "products with frozen weights",
        LORA: "LoRA's products",
        HEAD: "LM head and loss",
        ATTENTION: "attention",
        ELEMENTWISE: "element-wise passes",
        REDUCTIONS: "norms and sums",
        INDEXING: "gathers and scatters",
        COPIES: "copies",
        ALLOCATION: "allocation and filling",
        OPTIMIZER: "update",
        OTHER: "other operators",
        IDLE: "outside of operators",
    },
    "ko": {
        PRODUCTS: "고정된 가중치와의 행렬곱",
        LORA: "LoRA의 행렬곱",
        HEAD: "LM 헤드와 손실",
        ATTENTION: "어텐션",
        ELEMENTWISE: "원소별 연산",
        REDUCTIONS: "정규화와 합",
        INDEXING: "모으기와 흩뿌리기",
        COPIES: "복사",
        ALLOCATION: "할당과 채우기",
        OPTIMIZER: "갱신",
        OTHER: "그 밖의 연산자",
        IDLE: "연산자 밖",
    },
}


def shares(values: Mapping[str, Any]) -> dict[str, float]:
    """Kind -> its part of a step on the CPU, with what was spent outside of operators."""
    seconds = {kind["kind"]: kind["seconds"] for kind in values["kinds"]}
    seconds[IDLE] = max(0.0, values["step_seconds"] - sum(seconds.values()))
    return {kind: seconds.get(kind, 0.0) / values["step_seconds"] for kind in KINDS["en"]}


def cpu_profile_section(result: Mapping[str, Any], language: str = "en") -> str:
    """The words and the table of cpu_profile.py's result."""
    runs, english = result["runs"], language == "en"
    parts = {name: shares(values) for name, values in runs.items()}
    rows = [
        (KINDS[language][kind], *(f"{part[kind]:.1%}" for part in parts.values())) for kind in KINDS[language]
    ]
    steps = ", ".join(f"{name} {values['step_seconds']:.1f} s" for name, values in runs.items())
    model, threads = result["model"]["name"], result["threads"]
    if english:
        about = f"{model}, float32, threads: {threads}. The second step, under the profiler: {steps}."
    else:
        about = f"{model}, float32, 스레드 수: {threads}. 프로파일러로 잰 두 번째 스텝: {steps}."
    columns = {"": "---", **dict.fromkeys(runs, "---:")}
    return "\n\n".join([about_machine(result, language), about, table(columns, rows)])
