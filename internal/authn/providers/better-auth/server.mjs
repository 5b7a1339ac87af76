// better-auth with its OAuth provider, jwt and organization plugins over https. One user owns an
// organization; "client" gets access tokens for itself and for her, and she gets tokens for
// her session. POST /test/rotate has the signing key expire, so that better-auth makes another by itself.
//
//   node server.mjs CERT KEY     prints the issuer when it listens
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { oauthProvider } from '@better-auth/oauth-provider'
import { betterAuth } from 'better-auth'
import { memoryAdapter } from 'better-auth/adapters/memory'
import { toNodeHandler } from 'better-auth/node'
import { jwt, organization } from 'better-auth/plugins'

const [cert, key] = process.argv.slice(2).map((file) => readFileSync(file))
const resource = 'https://orgkeys.example'
const ada = { email: 'ada@example.com', password: 'of the test', name: 'Ada' }
const tables = Object.fromEntries([
  'user', 'session', 'account', 'verification', 'jwks', 'organization', 'member', 'invitation',
  'oauthClient', 'oauthResource', 'oauthClientResource', 'oauthRefreshToken', 'oauthAccessToken', 'oauthConsent', 'oauthClientAssertion',
].map((table) => [table, []]))
let base, auth, handler

// membership is what tokens say of a user: the one organization and her role in it.
async function membership(user) {
  const { adapter } = await auth.$context
  const member = await adapter.findOne({ model: 'member', where: [{ field: 'userId', value: user.id }] })
  const own = member && await adapter.findOne({ model: 'organization', where: [{ field: 'id', value: member.organizationId }] })
  return { org_id: own?.slug, org_role: member?.role }
}

function open() {
  auth = betterAuth({
    baseURL: base,
    secret: 'of the test, and of 32 characters at least',
    database: memoryAdapter(tables),
    emailAndPassword: { enabled: true },
    rateLimit: { enabled: false },
    telemetry: { enabled: false },
    plugins: [
      organization(),
      jwt({ jwt: { issuer: `${base}/api/auth`, audience: resource, definePayload: ({ user }) => membership(user) } }),
      oauthProvider({
        loginPage: '/login',
        consentPage: '/consent',
        scopes: ['openid', 'keys'],
        resources: [resource],
        clientRegistrationDefaultResources: [resource],
        generateClientId: () => 'client',
        generateClientSecret: () => 'secret',
        clientPrivileges: () => true,
        customAccessTokenClaims: ({ user, metadata }) => (user ? membership(user) : { org_id: metadata.org_id, org_role: metadata.org_role }),
      }),
    ],
  })
  handler = toNodeHandler(auth)
}

// populate signs the user up, and has her make the organization and the client.
async function populate() {
  const signUp = await auth.api.signUpEmail({ body: ada, asResponse: true })
  const headers = new Headers({ cookie: cookies(signUp) })
  await auth.api.createOrganization({ body: { name: 'Acme', slug: 'acme' }, headers })
  await auth.api.adminCreateOAuthClient({
    headers,
    body: {
      redirect_uris: ['https://app.example/callback'], token_endpoint_auth_method: 'client_secret_post',
      grant_types: ['authorization_code', 'client_credentials'], scope: 'openid keys', client_credentials_scopes: ['keys'],
      skip_consent: true, metadata: { org_id: 'acme', org_role: 'owner' },
    },
  })
}

const cookies = (response) => response.headers.getSetCookie().map((cookie) => cookie.split(';')[0]).join('; ')

// login is the page that better-auth sends a browser to: it logs the one user in, without asking.
async function login(req, res) {
  const answer = await auth.handler(new Request(`${base}/api/auth/sign-in/email`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', origin: base },
    body: JSON.stringify({ email: ada.email, password: ada.password, oauth_query: req.url.split('?')[1] }),
  }))
  const { url } = await answer.json()
  res.writeHead(302, { location: url, 'set-cookie': answer.headers.getSetCookie() }).end()
}

async function rotate() {
  const { adapter } = await auth.$context
  await adapter.updateMany({ model: 'jwks', where: [], update: { expiresAt: new Date() } })
}

const server = https.createServer({ cert, key }, async (req, res) => {
  try {
    if (req.url.endsWith('/test/rotate')) {
      await rotate()
      return res.end()
    }
    if (req.url.startsWith('/login?')) {
      return await login(req, res)
    }
    return await handler(req, res)
  } catch (error) {
    console.error(error)
    res.statusCode = 500
    res.end()
  }
})
server.listen(0, '127.0.0.1', async () => {
  base = `https://127.0.0.1:${server.address().port}`
  open()
  await populate()
  console.log(`${base}/api/auth`)
})
process.stdin.resume().on('end', () => process.exit())
