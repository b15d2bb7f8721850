"""OpenAI's own SDK: a streamed chat, then an answer that must keep to a schema."""

import json
import os

import openai

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}
port = os.environ.get("HTTP_PORT", "8000")
llm = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
model = llm.models.list().data[0].id

question = [{"role": "user", "content": "Which city is the capital of France?"}]
stream = llm.chat.completions.create(model=model, messages=question, max_tokens=40, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

answer = llm.chat.completions.create(
    model=model,
    messages=question,
    max_tokens=200,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
)
text = answer.choices[0].message.content or ""
if answer.choices[0].finish_reason == "stop":
    print(json.loads(text))
else:
    print("cut after", answer.usage.completion_tokens, "tokens:", text)
