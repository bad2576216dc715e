"""Colours of pages and of text in them, as CSS, for light and dark themes. Pages of all rooms share them."""

from __future__ import annotations

COLOURS = """
:root { color-scheme: light dark; --text: #1d2126; --dim: #6b7280; --line: #d7dbe0; --page: #fff; --field: #0b6e8f;
  --answer: #0d5f2c; --on-answer: #d9f2e1; --cut: #b3261e; --note: #8a5a00; --bar: #7fb2c9;
  --tools: #874600; --reasoning: #5a2ca0; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --dim: #9aa3ad; --line: #3a4149; --page: #14171a;
  --field: #6cc7e6; --answer: #b5f0c8; --on-answer: #1d3d2a; --cut: #ff8a80; --note: #f0c674; --bar: #3f7489;
  --tools: #ffbe7d; --reasoning: #d6bcff; } }
"""
SPANS = """\
pre { font: 14px/1.55 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .6rem; border: 1px solid var(--line); border-radius: 6px; }
.frame, .start { color: var(--dim); } .field, .prompt { color: var(--field); }
.answer, .end { color: var(--answer); background: var(--on-answer); } .end { font-weight: bold; }
.tools, .call { color: var(--tools); } .reasoning { color: var(--reasoning); } .untrained { color: var(--answer); }
.reasoning.trained, .call.trained { background: var(--on-answer); } .untrained { font-style: italic; }
.weight { font: bold .75em system-ui, sans-serif; vertical-align: super; }
.trained:not(.reasoning, .call) { text-decoration: underline; }
.cut { color: var(--cut); text-decoration: line-through; } .legend span { margin-right: 1rem; }
.tokens .t { outline: 1px solid var(--line); } .t:hover { outline: 2px solid var(--field); }
"""
"""A row's text by the kinds of `yeonma.tokenization.explain`."""
