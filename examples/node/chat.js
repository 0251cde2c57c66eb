// Streams a chat, appends turns to a session, and aborts a request: node chat.js [address]
//
// The stubs are made from protos/paceline/v1/inference.proto when the program starts; there is no build step.

import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTOS = process.env.PACELINE_PROTOS ?? fileURLToPath(new URL('../../protos', import.meta.url));
const ADDRESS = process.argv[2] ?? '127.0.0.1:9000';
const DEADLINE_S = 120;

const definition = protoLoader.loadSync('paceline/v1/inference.proto', {
  includeDirs: [PROTOS],
  keepCase: true, // token_ids, as in the proto
  longs: String, // seeds have 64 bits
  enums: String,
  oneofs: true, // event.event names the one that is set
});
const { Inference } = grpc.loadPackageDefinition(definition).paceline.v1;
const client = new Inference(ADDRESS, grpc.credentials.createInsecure());

const options = () => ({ deadline: Date.now() + DEADLINE_S * 1000 });

/** One call with one answer, as a promise. */
function ask(method, request) {
  return new Promise((resolve, reject) =>
    client[method](request, options(), (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

/** Prints an answer as it comes. `onStarted` hears who took the request. Resolves to how it finished. */
async function print(call, onStarted = () => {}) {
  let finished;
  for await (const event of call) {
    if (event.event === 'started') onStarted(event.started);
    if (event.event === 'tokens') process.stdout.write(event.tokens.text);
    if (event.event === 'finished') finished = event.finished;
  }
  process.stdout.write('\n');
  return finished;
}

async function streamAChat() {
  const messages = [{ role: 'user', content: 'What is the capital of France?' }];
  const call = client.Chat({ messages, sampling: { temperature: 0, max_tokens: 32 } }, options());
  const { usage } = await print(call, ({ replica_id }) => console.log(`answered by ${replica_id}`));
  console.log(`${usage.completion_tokens} tokens, ${usage.accepted_tokens} of them drafted`);
}

async function talkInASession() {
  const { session_id } = await ask('CreateSession', { messages: [{ role: 'system', content: 'Be brief.' }] });
  for (const content of ['My name is Ada.', 'What is my name?']) {
    const turn = { session_id, append: true, messages: [{ role: 'user', content }] }; // only what is new
    await print(client.Chat({ ...turn, sampling: { temperature: 0, max_tokens: 24 } }, options()));
  }
  const { turns, history_tokens } = await ask('GetSession', { session_id });
  console.log(`a session of ${turns} turns and ${history_tokens} tokens`);
  await ask('CloseSession', { session_id });
}

async function abortARequest() {
  const sampling = { max_tokens: 2000, ignore_eos: true, temperature: 0 };
  const call = client.Generate({ text: 'Once upon a time', sampling }, options());
  let answer;
  const finished = await print(call, ({ request_id }) => {
    answer = sleep(300).then(() => ask('Abort', { request_id })); // from here or from anywhere else
  });
  console.log(`aborted: ${(await answer).aborted}, finished with ${finished.reason}`);
}

try {
  await streamAChat();
  await talkInASession();
  await abortARequest();
} catch (error) {
  console.error(`${grpc.status[error.code] ?? 'error'}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
