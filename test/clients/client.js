// A workload in Node.js. It knows gRPC (grpc-js), the messages of the Workload
// API from a FileDescriptorSet, and nothing of spiffed. As client.py:
//
//   client.js SOCKET DESCRIPTORS SPIFFE-ID   a process that has this one identity
//   client.js SOCKET DESCRIPTORS -           a process that has none
'use strict';
const assert = require('node:assert/strict');
const crypto = require('node:crypto');
const fs = require('node:fs');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [socket, descriptors, identity] = process.argv.slice(2);
const TIMEOUT = 20_000; // milliseconds
const methods = loader.loadFileDescriptorSetFromBuffer(fs.readFileSync(descriptors), {keepCase: true, defaults: true});
const API = grpc.loadPackageDefinition(methods).SpiffeWorkloadAPI;
const client = new API('unix://' + socket, grpc.credentials.createInsecure());

const calls = [ // all that the Workload API has, with a request that is good in itself
  ['FetchX509SVID', {}],
  ['FetchX509Bundles', {}],
  ['FetchJWTSVID', {audience: ['test']}],
  ['FetchJWTBundles', {}],
  ['ValidateJWTSVID', {audience: 'test', svid: 'a.b.c'}],
];

function metadata(value) {
  const m = new grpc.Metadata();
  if (value !== undefined) m.set('workload.spiffe.io', value);
  return m;
}

// mapOf makes a map of what protobuf.js takes from a FileDescriptorSet as the list
// of pairs that a map is on the wire.
const mapOf = (pairs) => Object.fromEntries(pairs.map(({key, value}) => [key, value]));

const deadline = () => ({deadline: Date.now() + TIMEOUT});

// stream opens a method that streams, and returns a function for the next answer.
function stream(name, request, header) {
  const call = client[name](request, metadata(header), deadline());
  const answers = [], waiting = [];
  let ended = null;
  const hand = (answer) => waiting.length ? waiting.shift()(answer) : answers.push(answer);
  call.on('data', (data) => hand({data}));
  call.on('error', (err) => { ended = err; hand({err}); });
  call.on('end', () => { if (!ended) hand({err: new Error(name + ' has ended')}); });
  return {
    cancel: () => call.cancel(),
    next: async () => {
      const {data, err} = answers.length ? answers.shift() : await new Promise((resolve) => waiting.push(resolve));
      if (err) throw err;
      return data;
    },
  };
}

function unary(name, request, header) {
  return new Promise((resolve, reject) =>
    client[name](request, metadata(header), deadline(), (err, data) => err ? reject(err) : resolve(data)));
}

// once calls any method, and returns the first answer.
async function once(name, request, header) {
  if (!API.service[name].responseStream) return unary(name, request, header);
  const s = stream(name, request, header);
  try {
    return await s.next();
  } finally {
    s.cancel();
  }
}

async function refused(want, name, request, header) {
  await assert.rejects(once(name, request, header), (err) => {
    assert.equal(err.code, want, `${name} with ${header}: ${err.message}`);
    return true;
  });
}

// certificates that stand one after the other (Workload API, X509SVID).
function certificates(der) {
  const found = [];
  while (der.length) {
    let length = der[1], head = 2;
    if (length & 0x80) {
      head += length & 0x7f;
      length = der.readUIntBE(2, head - 2);
    }
    found.push(new crypto.X509Certificate(der.subarray(0, head + length)));
    der = der.subarray(head + length);
  }
  return found;
}

// checked checks an answer of FetchX509SVID, and returns the leaf's serial number.
function checked(answer) {
  assert.deepEqual(answer.svids.map((s) => s.spiffe_id), [identity]);
  const svid = answer.svids[0];
  const chain = certificates(svid.x509_svid), roots = certificates(svid.bundle);
  assert.equal(chain[0].subjectAltName.split(', ').filter((n) => n.startsWith('URI:')).join(), 'URI:' + identity);
  const key = crypto.createPrivateKey({key: svid.x509_svid_key, format: 'der', type: 'pkcs8'});
  assert.ok(chain[0].checkPrivateKey(key), 'the key is of another certificate');
  [...chain.slice(1), roots.find((r) => chain.at(-1).checkIssued(r))].forEach((issuer, i) =>
    assert.ok(chain[i].checkIssued(issuer) && chain[i].verify(issuer.publicKey), `certificate ${i} is not by the next`));
  return chain[0].serialNumber;
}

function checkedToken(token, jwks) {
  const [head, payload, signature] = token.split('.');
  const header = JSON.parse(Buffer.from(head, 'base64url')), claims = JSON.parse(Buffer.from(payload, 'base64url'));
  assert.equal(header.alg, 'ES256');
  const jwk = JSON.parse(jwks).keys.find((k) => k.kid === header.kid);
  const key = {key: crypto.createPublicKey({key: jwk, format: 'jwk'}), dsaEncoding: 'ieee-p1363'};
  assert.ok(crypto.verify('sha256', Buffer.from(`${head}.${payload}`), key, Buffer.from(signature, 'base64url')), 'signature');
  assert.equal(claims.sub, identity);
  assert.deepEqual([claims.aud].flat(), ['test']);
  assert.ok(claims.exp > Date.now() / 1000);
}

async function main() {
  for (const [name, request] of calls) {
    for (const wrong of [undefined, 'True']) await refused(grpc.status.INVALID_ARGUMENT, name, request, wrong);
  }
  if (identity === '-') {
    for (const [name, request] of calls.slice(0, 4)) await refused(grpc.status.PERMISSION_DENIED, name, request, 'true');
    await refused(grpc.status.INVALID_ARGUMENT, ...calls[4], 'true'); // whoever it is may have a token judged
    return;
  }
  const svids = stream('FetchX509SVID', {}, 'true');
  const answer = await svids.next();
  const serial = checked(answer);
  const domain = identity.split('/').slice(0, 3).join('/');

  const bundles = mapOf((await once('FetchX509Bundles', {}, 'true')).bundles);
  assert.deepEqual(Object.keys(bundles), [domain]);
  assert.ok(bundles[domain].equals(answer.svids[0].bundle));

  const tokens = (await once('FetchJWTSVID', {audience: ['test']}, 'true')).svids;
  assert.deepEqual(tokens.map((t) => t.spiffe_id), [identity]);
  const keys = mapOf((await once('FetchJWTBundles', {}, 'true')).bundles);
  assert.deepEqual(Object.keys(keys), [domain]);
  checkedToken(tokens[0].svid, keys[domain]);

  const valid = await once('ValidateJWTSVID', {audience: 'test', svid: tokens[0].svid}, 'true');
  assert.equal(valid.spiffe_id, identity);
  assert.equal(mapOf(valid.claims.fields).sub.string_value, identity);
  await refused(grpc.status.INVALID_ARGUMENT, 'ValidateJWTSVID', {audience: 'other', svid: tokens[0].svid}, 'true');

  console.log('waits for a rotation');
  assert.notEqual(checked(await svids.next()), serial, 'an answer, and the same SVID');
  svids.cancel();
}

main().then(() => { console.log('done'); client.close(); }, (err) => { console.error(err); process.exit(1); });
