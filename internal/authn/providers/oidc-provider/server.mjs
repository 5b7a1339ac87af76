// A real OpenID provider for tests: node-oidc-provider over https, whose access tokens are JWTs.
// "client" is a server; "orgkeysctl" is a command line, a public client: it must use PKCE, and its
// tokens are opaque unless each request for one names the resource. POST /test/rotate adds a signing key and keeps the last one.
//
// "console" is a web application with a secret, where its address is given.
//
//   node server.mjs CERT KEY [REDIRECT]     prints the issuer when it listens
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { generateKeyPair, exportJWK } from 'jose'
import { Provider } from 'oidc-provider'
import { createMemoryAdapter } from 'oidc-provider/lib/adapters/memory_adapter.js'

const [cert, key] = process.argv.slice(2, 4).map((file) => readFileSync(file))
const redirect = process.argv[4]
const resource = 'https://orgkeys.example'
const keys = []
const adapter = createMemoryAdapter() // what outlasts a rotation: sessions, grants, codes
let issuer, provider

async function rotate() {
  const { privateKey } = await generateKeyPair('ES256', { extractable: true })
  keys.unshift({ ...(await exportJWK(privateKey)), kid: `key-${Date.now()}-${Math.random()}`, alg: 'ES256', use: 'sig' })
  keys.length = Math.min(keys.length, 2)
  provider = new Provider(issuer, {
    adapter,
    jwks: { keys: [...keys] },
    clients: [{
      client_id: 'client', client_secret: 'secret', redirect_uris: [`${issuer}/callback`],
      grant_types: ['client_credentials', 'authorization_code'], token_endpoint_auth_method: 'client_secret_post', id_token_signed_response_alg: 'ES256',
    }, {
      client_id: 'orgkeysctl', application_type: 'native', token_endpoint_auth_method: 'none', redirect_uris: ['http://127.0.0.1/callback'],
      grant_types: ['authorization_code', 'refresh_token', 'urn:ietf:params:oauth:grant-type:device_code'], id_token_signed_response_alg: 'ES256',
    }, ...(redirect ? [{
      client_id: 'console', client_secret: 'of-the-console', redirect_uris: [redirect],
      grant_types: ['authorization_code'], id_token_signed_response_alg: 'ES256',
    }] : [])],
    pkce: { required: (ctx, client) => client.clientId !== 'client' },
    cookies: { keys: ['of the test'] },
    findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
    extraTokenClaims: () => ({ org_id: ['acme'], realm_access: { roles: ['offline_access', 'org-admins'] } }),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      deviceFlow: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: (ctx, client) => (client.clientId === 'client' ? resource : undefined),
        useGrantedResource: (ctx) => ctx.oidc.client.clientId === 'client',
        getResourceServerInfo: () => ({ scope: 'keys', audience: 'orgkeys', accessTokenFormat: 'jwt', jwt: { sign: { alg: 'ES256' } } }),
      },
    },
  })
}

// interact logs the one user in and consents for her.
async function interact(req, res) {
  const { prompt, params, session } = await provider.interactionDetails(req, res)
  if (prompt.name === 'login') {
    return provider.interactionFinished(req, res, { login: { accountId: 'ada-1' } })
  }
  const grant = new provider.Grant({ accountId: session.accountId, clientId: params.client_id })
  grant.addOIDCScope('openid offline_access')
  grant.addResourceScope(resource, 'keys')
  return provider.interactionFinished(req, res, { consent: { grantId: await grant.save() } })
}

const server = https.createServer({ cert, key }, async (req, res) => {
  try {
    if (req.url === '/test/rotate') {
      await rotate()
      return res.end()
    }
    if (req.url.startsWith('/interaction/')) {
      return await interact(req, res)
    }
    return provider.callback()(req, res)
  } catch (error) {
    console.error(error)
    res.statusCode = 500
    res.end()
  }
})
server.listen(0, '127.0.0.1', async () => {
  issuer = `https://127.0.0.1:${server.address().port}`
  await rotate()
  console.log(issuer)
})
process.stdin.resume().on('end', () => process.exit())
