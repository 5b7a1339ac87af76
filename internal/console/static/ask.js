// Asking the service. An answer that is no success is an error with the server's words.

export class Refused extends Error {
  constructor(status, body) {
    super(body.message ?? `The server answers ${status}.`)
    this.status = status
    this.code = body.errorCode
  }
}

export async function ask(path, options = {}) {
  let response
  try {
    response = await fetch(`/console/api/${path}`, { ...options, redirect: 'error', cache: 'no-store' })
  } catch {
    throw new Error('The server cannot be reached.')
  }
  const body = await response.json().catch(() => ({}))
  if (response.status !== 200) throw new Refused(response.status, body)
  return body
}

// Where a person has to sign in again, the page says so, and keeps what it holds.
export function explain(error, place) {
  place.hidden = false
  place.textContent = error.message
  if (error.code !== 'signed_out') return
  const link = document.createElement('a')
  link.href = `/console/sign-in?to=${encodeURIComponent(location.pathname + location.search)}`
  link.textContent = 'Sign in'
  place.append(' ', link)
}

export const pause = (ms) => new Promise((done) => setTimeout(done, ms))
export const base64 = (bytes) => btoa(String.fromCharCode(...bytes))
export const unbase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0))
export const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('')
export const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))
export function join(...parts) {
  const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0))
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all
}
