// Generating a key whose private half is opened in this page. The recipient is stored in
// this browser before the service is asked, and forgotten after the receipt: whatever is
// lost in between, asking again gives the same key. The receipt is stored with it before it
// is sent: one whose answer was lost is repeated, as another key would be made otherwise.
import { ask, explain, pause, Refused } from './ask.js'
import { makeRecipient, open, pem, pkcs1, prove } from './seal.js'

const store = 'recipients'

function database() {
  return new Promise((done, failed) => {
    const opening = indexedDB.open('orgkeys', 1)
    opening.onupgradeneeded = () => opening.result.createObjectStore(store, { keyPath: 'org' })
    opening.onsuccess = () => done(opening.result)
    opening.onerror = () => failed(new Error('This browser stores nothing for this page, so a key could be lost: leave private browsing, or use orgkeysctl.'))
  })
}

async function stored(mode, act) {
  const db = await database()
  try {
    return await new Promise((done, failed) => {
      const change = db.transaction(store, mode, { durability: 'strict' })
      const request = act(change.objectStore(store))
      change.oncomplete = () => done(request.result)
      change.onabort = change.onerror = () => failed(new Error('This browser could not store the recipient. Nothing was generated.'))
    })
  } finally {
    db.close()
  }
}

// Refusals that prove that there is no key for the recipient. After any other, such as of a
// role that was taken away, there may be one that only this recipient opens.
const hopeless = ['quota_exceeded', 'recipient_unacceptable', 'sealed_unavailable', 'enrollment_closed']

// The key of the recipient. While the service makes it the answer is 202.
async function fetchSealed(recipient) {
  for (let patience = 60; ; patience--) {
    try {
      return await ask('key', {
        method: 'POST', body: JSON.stringify({ recipient: recipient.pem }),
        headers: { 'Content-Type': 'application/json' },
      })
    } catch (error) {
      if (error.code !== 'pending' || patience === 0) throw error
      await pause(2000)
    }
  }
}

// What a receipt is answered with for a key that was deleted or withdrawn meanwhile.
const gone = ['key_not_found', 'enrollment_closed']

// The person said that the key's file is saved: the service is told, and then the recipient
// is forgotten. So it is for a key that is gone.
async function finish(recipient) {
  const { keyId, body } = recipient.receipt
  try {
    await ask(`key/${keyId}/receipt`, { method: 'POST', body, headers: { 'Content-Type': 'application/json' } })
  } catch (error) {
    if (!(error instanceof Refused && gone.includes(error.code))) throw error
  }
  await stored('readwrite', (s) => s.delete(recipient.org))
}

export async function offerGenerating(section) {
  const part = (name) => document.getElementById(`generate-${name}`)
  const { org } = section.dataset
  const start = part('start')
  section.hidden = false
  if (!crypto.subtle) {
    start.disabled = true
    return explain(new Error('This page was not reached over https, so the browser has no cryptography for it. Use https, or orgkeysctl.'), part('problem'))
  }
  const step = (text) => {
    const item = document.createElement('li')
    item.className = 'good'
    item.textContent = text
    part('steps').append(item)
  }
  try {
    const kept = await stored('readonly', (s) => s.get(org))
    if (kept?.receipt) await finish(kept)
    else if (kept) start.textContent = 'Open the key that is not saved yet'
  } catch (error) {
    start.disabled = true
    return explain(error, part('problem'))
  }

  async function generate() {
    let recipient = await stored('readonly', (s) => s.get(org))
    if (recipient?.receipt) {
      await finish(recipient)
      recipient = undefined
    }
    if (!recipient) {
      recipient = { org, ...(await makeRecipient()) }
      await stored('readwrite', (s) => s.put(recipient))
      step('This browser made a recipient, and keeps it.')
    }
    let answer
    try {
      answer = await fetchSealed(recipient)
    } catch (error) {
      if (error instanceof Refused && hopeless.includes(error.code)) await stored('readwrite', (s) => s.delete(org))
      throw error
    }
    if (answer.recipient !== recipient.id || answer.org !== org) throw new Error('The answer is for somebody else. Nothing of it was used.')
    step(`The HSM made key ${answer.keyId}, and sealed it to this browser.`)
    const pkcs8 = await open(answer.sealed, recipient)
    const signature = await prove(pkcs8, answer)
    step('The private key is open, and is the one that the log names.')
    offer(recipient, answer, pkcs8, signature)
  }

  function offer(recipient, answer, pkcs8, signature) {
    const file = URL.createObjectURL(new Blob([pem('RSA PRIVATE KEY', pkcs1(pkcs8))], { type: 'application/x-pem-file' }))
    pkcs8.fill(0)
    const save = part('save')
    save.href = file
    save.download = 'private_key.pem'
    part('done').hidden = false
    start.hidden = true
    save.focus()
    part('finish').onclick = async () => {
      part('problem').hidden = true
      part('finish').disabled = true
      try {
        const receipt = { keyId: answer.keyId, body: JSON.stringify({ recipient: answer.recipient, signature }) }
        await stored('readwrite', (s) => s.put({ ...recipient, receipt }))
        await finish({ ...recipient, receipt })
        URL.revokeObjectURL(file)
        location.assign(`/console/keys/${answer.keyId}`)
      } catch (error) {
        part('finish').disabled = false
        explain(error, part('problem'))
      }
    }
  }

  start.addEventListener('click', async () => {
    start.disabled = true
    part('problem').hidden = true
    part('steps').replaceChildren()
    try {
      await generate()
    } catch (error) {
      explain(error, part('problem'))
    }
    start.disabled = false
  })
}
