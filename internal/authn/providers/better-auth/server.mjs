// better-auth with its jwt and organization plugins over https: a user signs up, makes an
// organization, and gets tokens for her session. POST /test/rotate has the signing key
// expire, so that better-auth makes another by itself.
//
//   node server.mjs CERT KEY     prints the issuer when it listens
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { betterAuth } from 'better-auth'
import { memoryAdapter } from 'better-auth/adapters/memory'
import { toNodeHandler } from 'better-auth/node'
import { jwt, organization } from 'better-auth/plugins'

const [cert, key] = process.argv.slice(2).map((file) => readFileSync(file))
const tables = { user: [], session: [], account: [], verification: [], jwks: [], organization: [], member: [], invitation: [] }
let auth, handler

async function definePayload({ user, session }) {
  const { adapter } = await auth.$context
  const member = await adapter.findOne({
    model: 'member',
    where: [{ field: 'organizationId', value: session.activeOrganizationId }, { field: 'userId', value: user.id }],
  })
  const active = await adapter.findOne({ model: 'organization', where: [{ field: 'id', value: session.activeOrganizationId }] })
  return { name: user.name, email: user.email, org_id: active?.slug, org_role: member?.role }
}

async function rotate() {
  const { adapter } = await auth.$context
  await adapter.updateMany({ model: 'jwks', where: [], update: { expiresAt: new Date() } })
}

const server = https.createServer({ cert, key }, async (req, res) => {
  if (req.url === '/test/rotate') {
    await rotate()
    return res.end()
  }
  return handler(req, res)
})
server.listen(0, '127.0.0.1', () => {
  const issuer = `https://127.0.0.1:${server.address().port}`
  auth = betterAuth({
    baseURL: issuer,
    secret: 'of the test, and of 32 characters at least',
    database: memoryAdapter(tables),
    emailAndPassword: { enabled: true },
    rateLimit: { enabled: false },
    telemetry: { enabled: false },
    plugins: [organization(), jwt({ jwt: { definePayload, audience: 'orgkeys' } })],
  })
  handler = toNodeHandler(auth)
  console.log(issuer)
})
process.stdin.resume().on('end', () => process.exit())
