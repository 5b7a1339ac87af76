// What pages do beyond reading and forms: copying, generating a key, verifying.
import { offerGenerating } from './generate.js'
import { offerVerifying } from './verify.js'

for (const button of document.querySelectorAll('button[data-copy]')) {
  button.hidden = false
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent)
    button.textContent = 'Copied'
  })
}
// maxlength counts letters, and the service bytes.
for (const field of document.querySelectorAll('input[data-bytes]')) {
  field.addEventListener('input', () => {
    const over = new TextEncoder().encode(field.value).length - field.dataset.bytes
    field.setCustomValidity(over > 0 ? `This is ${over} bytes too long. Many letters take two to four.` : '')
  })
}
const generate = document.getElementById('generate')
if (generate) await offerGenerating(generate)
const verify = document.getElementById('verify')
if (verify) offerVerifying(verify)
