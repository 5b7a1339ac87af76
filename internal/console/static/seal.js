// Sealed keys: an AES-256 key under RSAES-OAEP, then the private key (PKCS#8) under AES
// key wrap with padding (RFC 5649). It is what PKCS#11 calls CKM_RSA_AES_KEY_WRAP.
import { base64, hex, join, sha256, unbase64 } from './ask.js'

const subtle = crypto.subtle
const hashes = { RSA_AES_KEY_WRAP_SHA_256: 'SHA-256', RSA_AES_KEY_WRAP_SHA_1: 'SHA-1' }

// A recipient: its public half as PEM, and its private half, which no script can read.
// WebCrypto ties a key to one hash, and only the answer says which one the HSM has.
export async function makeRecipient() {
  const made = await subtle.generateKey({ name: 'RSA-OAEP', modulusLength: 3072, publicExponent: new Uint8Array([1, 0, 1]), hash: 'SHA-256' }, true, ['wrapKey', 'unwrapKey'])
  const spki = new Uint8Array(await subtle.exportKey('spki', made.publicKey))
  const pkcs8 = new Uint8Array(await subtle.exportKey('pkcs8', made.privateKey))
  const keys = {}
  for (const [alg, hash] of Object.entries(hashes)) {
    keys[alg] = await subtle.importKey('pkcs8', pkcs8, { name: 'RSA-OAEP', hash }, false, ['unwrapKey'])
  }
  pkcs8.fill(0)
  return { keys, id: hex(await sha256(spki)), pem: pem('PUBLIC KEY', spki) }
}

// The private key of an answer, as PKCS#8. One changed byte is an error.
export async function open(sealed, recipient) {
  const key = recipient.keys[sealed.alg]
  if (!key) throw new Error('The sealed key has an algorithm that this page does not know.')
  const value = unbase64(sealed.value)
  try {
    const aes = await subtle.unwrapKey('raw', value.subarray(0, 384), key, { name: 'RSA-OAEP' }, 'AES-CBC', false, ['encrypt', 'decrypt'])
    return whole(await unwrap(aes, value.subarray(384)))
  } catch {
    throw new Error('The sealed key does not open: it was changed on the way, or is for another recipient.')
  }
}

const block = 16

// One block under AES alone. AES-CBC with a zero IV deciphers it, if a second block
// makes the padding valid: one that deciphers to a whole block of padding.
async function decipher(aes, text) {
  const cbc = { name: 'AES-CBC', iv: new Uint8Array(block) }
  const second = await subtle.encrypt(cbc, aes, text.map((b) => b ^ block))
  return new Uint8Array(await subtle.decrypt(cbc, aes, join(text, new Uint8Array(second).subarray(0, block))))
}

// RFC 5649, section 4.2, for more than one block (RFC 3394, 2.2.2).
async function unwrap(aes, wrapped) {
  const n = wrapped.length / 8 - 1
  if (!Number.isInteger(n) || n < 2) throw new Error('length')
  let a = wrapped.slice(0, 8)
  const r = wrapped.slice(8)
  for (let t = 6 * n; t > 0; t--) {
    const at = ((t - 1) % n) * 8
    const step = new Uint8Array(8)
    new DataView(step.buffer).setUint32(4, t)
    const b = await decipher(aes, join(a.map((x, i) => x ^ step[i]), r.subarray(at, at + 8)))
    a = b.slice(0, 8)
    r.set(b.subarray(8), at)
  }
  const view = new DataView(a.buffer)
  const length = view.getUint32(4)
  if (view.getUint32(0) !== 0xa65959a6 || length <= r.length - 8 || length > r.length || r.subarray(length).some((b) => b)) throw new Error('check')
  return r.slice(0, length)
}

// A reader of DER: enter returns the length of an element, and stands at its content.
function reader(der) {
  const at = { place: 0 }
  at.enter = (tag) => {
    if (der[at.place++] !== tag) throw new Error('The private key is no RSA key in PKCS#8.')
    let length = der[at.place++]
    if (length > 128) {
      let bytes = length - 128
      for (length = 0; bytes > 0; bytes--) length = length * 256 + der[at.place++]
    }
    return length
  }
  at.skip = (tag) => {
    const length = at.enter(tag)
    at.place += length
  }
  return at
}

// SoftHSM wraps the key with zeros behind it, up to a whole block, as part of it.
function whole(der) {
  const at = reader(der)
  const length = at.enter(0x30)
  const end = at.place + length
  if (end > der.length || der.subarray(end).some((b) => b)) throw new Error('length')
  return der.slice(0, end)
}

// PKCS#1, which is the last part of PKCS#8 (RFC 5958): version, algorithm, then the key in an OCTET STRING.
export function pkcs1(pkcs8) {
  const at = reader(pkcs8)
  at.enter(0x30)
  at.skip(0x02)
  at.skip(0x30)
  const length = at.enter(0x04)
  return pkcs8.subarray(at.place, at.place + length)
}

export function pem(label, der) {
  const text = base64(der).replace(/.{1,64}/g, '$&\n')
  return `-----BEGIN ${label}-----\n${text}-----END ${label}-----\n`
}

// What the public key is known by (RFC 7638), and the receipt that only its holder can sign.
export async function prove(pkcs8, answer) {
  const name = { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' }
  const key = await subtle.importKey('pkcs8', pkcs8, name, true, ['sign'])
  const { e, n } = await subtle.exportKey('jwk', key)
  const thumbprint = await sha256(new TextEncoder().encode(JSON.stringify({ e, kty: 'RSA', n })))
  const fingerprint = base64(thumbprint).replace(/\+/g, '-').replace(/\//g, '_').replace(/=/g, '')
  if (fingerprint !== answer.fingerprint) throw new Error('The sealed key opens to another key than the one that the server names.')
  const signing = await subtle.importKey('pkcs8', pkcs8, name, false, ['sign'])
  const text = ['orgkeys/receipt/v1', answer.origin, answer.org, answer.keyId, answer.recipient, answer.sha256, ''].join('\n')
  return base64(new Uint8Array(await subtle.sign(name.name, signing, new TextEncoder().encode(text))))
}
