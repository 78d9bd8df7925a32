// Vercel's AI SDK: `generateObject`.
// npm install ai @ai-sdk/openai-compatible zod; node scripts/clients/vercel_generate_object.mjs http://127.0.0.1:8000/v1 MODEL
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject } from "ai";
import { z } from "zod";

const schema = z.object({ name: z.string().max(40), age: z.number().int().min(0).max(120) });
const [baseURL, model] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "here", baseURL, apiKey: "-", supportsStructuredOutputs: true });
const { object } = await generateObject({
  model: provider(model),
  schema,
  prompt: "Anna Varga is 44 years old. Who is she?",
  maxOutputTokens: 200,
  temperature: 0,
});
console.log(schema.parse(object));
