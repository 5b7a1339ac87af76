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
const generate = document.getElementById('generate')
if (generate) await offerGenerating(generate)
const verify = document.getElementById('verify')
if (verify) offerVerifying(verify)
