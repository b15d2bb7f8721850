// The official npm SDK against a gateway: node sdk.mjs BASE_URL; prints what it got as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(process.env.NODE_MODULES + "/"));
const { OpenAI } = require("openai");
const llm = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const got = {};

const model = (got.model = (await llm.models.list()).data[0].id);
const messages = [{ role: "user", content: "the dog says: ✓ 你好 🙂" }];
const options = { model, temperature: 0, max_tokens: 16 };
const whole = await llm.chat.completions.create({ ...options, messages });
got.whole = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens];
const stream = await llm.chat.completions.create({
  ...options, messages, stream: true, stream_options: { include_usage: true },
});
let text = "", reason = null, usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  reason = chunk.choices[0]?.finish_reason ?? reason;
  usage = chunk.usage ?? usage;
}
got.streamed = [text, reason, usage.completion_tokens];
let helped = "";
const runner = llm.chat.completions.stream({ ...options, messages }).on("content", (part) => (helped += part));
await runner.done();
got.helped = helped;
const completion = await llm.completions.create({ ...options, prompt: "the quick brown fox" });
got.completion = completion.choices[0].text;
const response = await llm.responses.create({ model, input: messages[0].content, temperature: 0, max_output_tokens: 16 });
got.response = [response.output_text, response.status];
try {
  await llm.chat.completions.create({ ...options, messages, temperature: 9 });
} catch (error) {
  got.error = [error.constructor.name, error.status, error.param, error.type];
}
console.log(JSON.stringify(got));
