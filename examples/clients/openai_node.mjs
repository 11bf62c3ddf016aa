// The openai client of Node with documents as chunks: `npm install openai`.
// Start `blocktune serve --model data/tiny`, then: node examples/clients/openai_node.mjs
import OpenAI from "openai";

const [baseURL = "http://127.0.0.1:8000/v1"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
const [{ id: model }] = (await client.models.list()).data;
const stream = await client.chat.completions.create({
  model,
  temperature: 0,
  messages: [{ role: "user", content: "Where is Anna Belt?" }],
  documents: [{ id: "a", title: "Anna Belt", text: "Anna Belt is in Lower Kirby." }],
  stream: true,
  stream_options: { include_usage: true },
});
let usage;
for await (const part of stream) {
  process.stdout.write(part.choices[0]?.delta.content ?? "");
  usage = part.usage ?? usage;
}
console.log(`\n${usage.prompt_tokens_details.cached_tokens} prompt tokens were cached`);
