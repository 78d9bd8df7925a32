// openai for node: `chat.completions.parse` with zod.
// npm install openai zod; node scripts/clients/openai_parse.mjs http://127.0.0.1:8000/v1 MODEL
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const Person = z.object({ name: z.string().max(40), age: z.number().int().min(0).max(120) });
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "-" });
const answer = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "Anna Varga is 44 years old. Who is she?" }],
  response_format: zodResponseFormat(Person, "person"),
  max_tokens: 200,
  temperature: 0,
});
console.log(Person.parse(answer.choices[0].message.parsed));
