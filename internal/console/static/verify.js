// Verifying, in the browser, that the log holds an event (RFC 6962, 2.1.1) under a
// checkpoint that its key has signed (C2SP tlog-checkpoint, signed-note).
import { ask, base64, explain, hex, join, pause, sha256, unbase64 } from './ask.js'

const utf8 = new TextEncoder()
const same = (a, b) => a.length === b.length && a.every((x, i) => x === b[i])
const node = (left, right) => sha256(join([1], left, right))

// The root that a leaf and its proof lead to, in a tree of size leaves (RFC 9162, 2.1.3.2).
export async function rootOf(leaf, index, size, path) {
  let fn = BigInt(index)
  let sn = BigInt(size) - 1n
  if (fn > sn) throw new Error('The checkpoint does not cover the event.')
  let hash = await sha256(join([0], leaf))
  for (const p of path) {
    if (sn === 0n) throw new Error('The proof is too long.')
    if (fn & 1n || fn === sn) {
      hash = await node(p, hash)
      while (!(fn & 1n) && fn !== 0n) [fn, sn] = [fn >> 1n, sn >> 1n]
    } else {
      hash = await node(hash, p)
    }
    fn >>= 1n
    sn >>= 1n
  }
  if (sn !== 0n) throw new Error('The proof is too short.')
  return hash
}

// A verifier key is name+hash+base64(type, key); its hash binds the two.
export async function parseKey(text) {
  const [, name, id, encoded] = /^([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/=]+)$/.exec(text.trim()) ?? []
  if (!name) throw new Error('That is no verifier key. It has the form name+hash+key, in one line.')
  const key = unbase64(encoded)
  const hash = (await sha256(join(utf8.encode(`${name}\n`), key))).subarray(0, 4)
  if (hex(hash) !== id || key[0] !== 1 || key.length !== 33) throw new Error('The verifier key is damaged, or is not an Ed25519 key.')
  return { name, hash, key: await crypto.subtle.importKey('raw', key.subarray(1), 'Ed25519', false, ['verify']) }
}

// A checkpoint: origin, size, root; then signatures, one of which must be the key's.
export async function openCheckpoint(note, vkey) {
  const end = note.lastIndexOf('\n\n') + 1
  const [origin, size, root] = note.slice(0, end).split('\n')
  if (end < 1 || !/^(0|[1-9][0-9]*)$/.test(size)) throw new Error('The checkpoint is malformed.')
  for (const line of note.slice(end + 1).split('\n')) {
    const [dash, name, encoded] = line.split(' ')
    if (dash !== '—' || name !== vkey.name) continue
    const signature = unbase64(encoded)
    if (!same(signature.subarray(0, 4), vkey.hash)) continue
    if (!(await crypto.subtle.verify('Ed25519', vkey.key, signature.subarray(4), utf8.encode(note.slice(0, end))))) break
    if (origin !== vkey.name) throw new Error('The checkpoint is of another log than the key.')
    return { origin, size: BigInt(size), root: unbase64(root) }
  }
  throw new Error('The checkpoint is not signed by that key.')
}

async function proofOf(event, say) {
  for (let patience = 30; ; patience--) {
    try {
      return await ask(`event/${encodeURIComponent(event)}/proof`)
    } catch (error) {
      if (error.code !== 'pending' || patience === 0) throw error
      say('No signed checkpoint covers the event yet. Asking again, for up to some minutes.')
      await pause(5000)
    }
  }
}

export function offerVerifying(form) {
  const part = (name) => document.getElementById(`verify-${name}`)
  async function run() {
    part('result').hidden = false
    part('steps').replaceChildren()
    part('data').textContent = ''
    part('verdict').textContent = 'Checking …'
    const say = (text, className = 'good') => {
      const item = document.createElement('li')
      item.className = className
      item.textContent = text
      part('steps').append(item)
    }
    let waiting
    try {
      if (!crypto.subtle) throw new Error('This page was not reached over https, so the browser has no cryptography for it.')
      const event = part('event').value.trim()
      history.replaceState(null, '', `?event=${encodeURIComponent(event)}`) // for who comes back, or reloads
      const vkey = part('key').value.trim() ? await parseKey(part('key').value) : null
      const proof = await proofOf(event, (text) => { waiting ??= say(text, '') ?? true })
      part('data').textContent = JSON.stringify(proof, null, 2)
      const leaf = JSON.parse(proof.event)
      if (leaf.id !== event) throw new Error('The server answers with another event than the one that was asked for.')
      say(`The server’s proof is about ${leaf.type} of ${leaf.time}, event ${proof.index}.`)
      const [origin, size, stated] = proof.checkpoint.split('\n')
      const root = await rootOf(utf8.encode(proof.event), proof.index, size, proof.path.map(unbase64))
      say(`The event’s ${utf8.encode(proof.event).length} bytes and ${proof.path.length} hashes lead to the root ${base64(root)}.`)
      if (!same(root, unbase64(stated))) throw new Error('That is not the root of the checkpoint: the event, or the log, was changed.')
      say(`The checkpoint of ${origin} over ${size} events has that root.`)
      if (!vkey) {
        say('The signature was not checked, because there is no verifier key. Whoever runs the server could have made all of this up.', 'bad')
        part('verdict').textContent = 'Included, but not authenticated'
        return
      }
      const signed = await openCheckpoint(proof.checkpoint, vkey)
      if (!same(root, signed.root) || String(signed.size) !== size) throw new Error('The signed checkpoint has another root.')
      say(`The checkpoint is signed by the key ${vkey.name}.`)
      part('verdict').textContent = 'Verified: the log holds this event, unchanged'
    } catch (error) {
      say(error.message, 'bad')
      if (error.code === 'signed_out') explain(error, part('steps').lastChild)
      part('verdict').textContent = 'Not verified'
    }
  }
  form.addEventListener('submit', (event) => {
    event.preventDefault()
    void run()
  })
}
