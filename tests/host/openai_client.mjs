// OpenAI's own client for JavaScript, unmodified: {baseURL, apiKey, asked} as JSON on stdin, each answer as JSON out.
import { text } from "node:stream/consumers";
import OpenAI from "openai";
import { Stream } from "openai/streaming";

const { baseURL, apiKey, asked } = JSON.parse(await text(process.stdin));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function answered(request) {
  try {
    const response = await client.audio.speech.create(request);
    const headers = Object.fromEntries(response.headers);
    if (request.stream_format !== "sse") {
      return { headers, sound: Buffer.from(await response.arrayBuffer()).toString("base64") };
    }
    const events = [];
    for await (const event of Stream.fromSSEResponse(response, new AbortController())) events.push(event);
    return { headers, events };
  } catch (error) {
    const { status, param, code, type } = error;
    return { error: { kind: error.constructor.name, status, param, code, type } };
  }
}

const answers = [];
for (const request of asked) answers.push(await answered(request));
process.stdout.write(JSON.stringify(answers));
