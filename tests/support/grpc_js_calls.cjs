// Calls of grpc-js, for tests/integration/test_grpc_js.py: node FILE MODULES ADDRESS PROTOS GOOGLEAPIS < GIVEN > ANSWERS.
const { createRequire } = require('node:module');
const { readFileSync } = require('node:fs');

const [modules, address, protos, googleapis] = process.argv.slice(2);
const load = createRequire(`${modules}/`);
const grpc = load('@grpc/grpc-js');
const definition = load('@grpc/proto-loader').loadSync('unroll_proto/v1/unroll.proto', {
  includeDirs: [protos, googleapis], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true,
});
const { UnrollService } = grpc.loadPackageDefinition(definition).unroll.v1;
const given = JSON.parse(readFileSync(0, 'utf8')).map(({ steps, values }) => ({ steps, values: Buffer.from(values, 'base64') }));
const { gzip, deflate, identity } = grpc.compressionAlgorithms;

const connect = (options = {}) => new UnrollService(address, grpc.credentials.createInsecure(), options);
const call = (client, method, request, options = {}) => new Promise((resolve) => {
  client[method](request, new grpc.Metadata(), { deadline: Date.now() + 60_000, ...options },
    (error, answer) => resolve(error ? refusal(error) : answer));
});
const refusal = ({ code, details, metadata }) => ({
  code, details, status: metadata.get('grpc-status-details-bin').map((each) => each.toString('base64')),
});
const batch = () => ({
  model: 'jv', lengths: given.map(({ steps }) => steps), values: Buffer.concat(given.map(({ values }) => values)),
  return_final_states: true,
});
const single = ({ steps, values }) => ({ model: 'jv', lengths: [steps], values });
const logits = (answer) => answer.logits?.toString('base64') ?? answer;

// What a stream answers to some requests, with the status that it ends with.
const stream = (client, requests, onAnswer = () => {}) => new Promise((resolve) => {
  const answers = [];
  const carried = client.Unroll({ deadline: Date.now() + 60_000 });
  carried.on('data', (answer) => { answers.push(answer); onAnswer(carried, answer); });
  carried.on('error', () => {});
  carried.on('status', ({ code }) => resolve({ answers, code }));
  requests.forEach((request) => carried.write(request));
  carried.end();
});

async function streamed(client) {
  const keys = given.map((_, index) => `${index}`);
  const width = given[0].values.length / given[0].steps;
  const part = (from, to) => keys.map((key, index) => ({
    key, first_step: from, values: given[index].values.subarray(from * width, Math.min(to, given[index].steps) * width),
  }));
  const single = part(0, 2).map(({ key, ...chunk }) => ({ key, chunk }));
  const rest = part(2, 1000);
  const requests = [
    ...keys.map((key) => ({ key, open: { model: 'jv', return_logits: true } })),
    ...single,
    { chunks: { keys: rest.map(({ key }) => key), first_steps: rest.map(() => 2), values: rest.map(({ values }) => values) } },
    ...keys.map((key) => ({ key, close: {} })),
  ];
  const { answers, code } = await stream(client, requests);
  const found = Object.fromEntries(keys.map((key) => [key, { logits: [], closed: 0, batched: 0 }]));
  for (const { key, event, steps, steps_batch: several, closed } of answers) {
    if (event === 'steps') found[key].logits.push(steps.logits);
    if (event === 'closed') found[key].closed = closed.snapshot.step;
    if (event === 'steps_batch') {
      several.keys.forEach((each, index) => {
        found[each].logits.push(several.logits[index]);
        found[each].batched += 1;
      });
    }
  }
  const joined = Object.values(found).map((each) => ({ ...each, logits: Buffer.concat(each.logits).toString('base64') }));
  return { code, sequences: joined };
}

async function main() {
  const client = connect();
  const unary = (path, data) => new Promise((resolve) => client.makeUnaryRequest(
    path, (each) => each, (each) => each, Buffer.from(data),
    (error, answer) => resolve(error ? refusal(error) : answer.toString('base64'))));
  const answers = {
    streamed: await streamed(client),
    unknown: await call(client, 'Classify', { ...single(given[0]), model: 'nobody' }),
    wrong: await call(client, 'Classify', { ...single(given[0]), lengths: [1000] }),
    late: await call(client, 'Classify', batch(), { deadline: Date.now() - 1 }),
    large: await call(client, 'Classify', { model: 'jv', lengths: [1], values: Buffer.alloc(17 * 2 ** 20) }),
    health: await unary('/grpc.health.v1.Health/Check', ''),
    missing: await unary('/unroll.v1.UnrollService/Nothing', ''),
    malformed: await unary('/unroll.v1.UnrollService/Classify', [0xff]),
    cancelled: await stream(client, [{ key: 'a', open: { model: 'jv' } }], (carried) => carried.cancel()),
  };
  for (const [name, algorithm] of Object.entries({ identity, gzip, deflate })) {
    const packing = connect({ 'grpc.default_compression_algorithm': algorithm });
    const answer = await call(packing, 'Classify', batch());
    answers[name] = { logits: logits(answer), states: answer.final_states.map(({ state }) => state[0].toString('base64')) };
    packing.close();
  }
  answers.atOnce = await Promise.all(Array.from({ length: 300 }, (_, index) =>
    call(client, 'Classify', single(given[index % given.length])).then(logits)));
  client.close();
  process.stdout.write(JSON.stringify(answers));
}

main();
