#!/usr/bin/env bash
# better-auth 1.7.25 (npm), jwt plugin with rotationInterval: nothing rotates by itself. The
# first request for a token after the signing key expired makes the next key, and so does every
# other one that comes before that is stored. Each signs with its own, and all of them are published,
# by default for 30 days after they expire, though only one of them ever signs again. The set
# grows by the number of requests that happen to come together, at every rotation.
#
# Why it matters: whoever verifies those tokens sees a burst of unknown key IDs within milliseconds. A
# verifier that reads the JWKS once a burst, or at most once in some seconds, refuses good tokens, and one
# that bounds the number of keys in a set refuses all of them after some rotations.
#
# Seen, with 16 requests together:
#   before:                1 key
#   after one expiry:      17 keys, 16 key IDs in 16 tokens
#   the next 16 tokens:    1 key ID, 17 keys
#
# Needs node 20 and npm. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
echo '{"private":true,"type":"module"}' >package.json
npm install --silent --ignore-scripts --no-audit --no-fund better-auth@1.7.25
cat >ask.mjs <<'JS'
import { betterAuth } from 'better-auth'
import { memoryAdapter } from 'better-auth/adapters/memory'
import { jwt } from 'better-auth/plugins'

const tables = { user: [], session: [], account: [], verification: [], jwks: [] }
const url = 'http://localhost/api/auth'
const auth = betterAuth({
  baseURL: 'http://localhost',
  secret: 'of this finding, of 32 characters or more',
  database: memoryAdapter(tables),
  emailAndPassword: { enabled: true },
  rateLimit: { enabled: false },
  telemetry: { enabled: false },
  plugins: [jwt({ jwks: { rotationInterval: 2 } })],
})
const signedUp = await auth.handler(new Request(`${url}/sign-up/email`, {
  method: 'POST', headers: { 'content-type': 'application/json', origin: 'http://localhost' },
  body: JSON.stringify({ email: 'ada@example.com', password: 'correct horse battery', name: 'Ada' }),
}))
const cookie = signedUp.headers.get('set-cookie').split(';')[0]
const published = async () => (await (await auth.handler(new Request(`${url}/jwks`))).json()).keys.length
const tokens = async (n) => {
  const all = await Promise.all(Array.from({ length: n }, () => auth.handler(new Request(`${url}/token`, { headers: { cookie } }))))
  const kids = await Promise.all(all.map(async (r) => JSON.parse(Buffer.from((await r.json()).token.split('.')[0], 'base64url')).kid))
  return new Set(kids).size
}
await tokens(1)
const before = await published()
await new Promise((resolve) => setTimeout(resolve, 2100))
const kids = await tokens(16)
const after = await published()
const next = await tokens(16)
console.log(`before:                ${before} key`)
console.log(`after one expiry:      ${after} keys, ${kids} key IDs in 16 tokens`)
console.log(`the next 16 tokens:    ${next} key ID, ${await published()} keys`)
process.exit(before === 1 && kids > 1 && after === before + kids && next === 1 ? 0 : 1)
JS
node ask.mjs 2>/dev/null
